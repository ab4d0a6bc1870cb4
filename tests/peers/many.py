#!/usr/bin/env python3
"""8,000 connections (2,000 without CHAOS_CI=1) at once through chaos-proxy, all of them delayed 200 ms; then what they
cost when idle.

    tests/peers/many.py [--filter TEXT] [--build DIR] [-v]

The client and the upstream are load.c, one process each, which check every byte."""
import sys
import time

from common import CI, Load, Proxy, case, main, more_descriptors, note, pss, tasks, until

MANY = 8000 if CI else 2000
KERNEL_STACK = 16  # KiB a thread
MOST_MB = 20  # kernel stacks included


def memory(pid):
    """MB of the process and of the kernel's stacks of its threads; and the threads."""
    threads = tasks(pid)
    return (pss(pid) + KERNEL_STACK * threads) / 1024, threads


def check_round(got, least):
    assert got["ok"] == MANY and got["connected_ms"] > 0, "of %d replies at %d connections: %s" % (MANY, MANY, got)
    assert got["wrong"] == got["errors"] == got["refused"] == got["status_5xx"] == got["other"] == got["unanswered"] == 0, got
    assert got["least_ms"] >= least, "a delay was too short: %s" % got


@case
def thousands_at_once():
    more_descriptors(2 * MANY + 1000)  # the proxy holds both sides
    upstream = Load.serve()
    proxy = Proxy(upstream.port, {"enabled": True, "latency": 200}, args=("--max-conns", str(MANY), "--quiet"))
    empty, _ = memory(proxy.pid)
    load = Load(proxy.port, MANY, MANY, hold=True)
    first = load.result()
    check_round(first, 200)
    again = load.again(MANY)  # the same connections: kept alive, and nobody else's reply on them
    check_round(again, 200)
    for name, got in (("all new", first), ("again", again)):
        note("%d at once, delayed 200 ms, %s: no error; median %.0f, p99 %.0f, most %.0f ms" %
             (MANY, name, got["p50_ms"], got["p99_ms"], got["most_ms"]))
    busy, threads = memory(proxy.pid)
    note("while busy: %.1f MB, %d threads; before %.1f MB" % (busy, threads, empty))
    began = time.monotonic()
    while time.monotonic() < began + 10 and (time.monotonic() < began + 2 or memory(proxy.pid)[0] > MOST_MB):
        time.sleep(0.2)  # workers that have nothing to do go one after the other
    idle, threads = memory(proxy.pid)
    note("%d idle keep-alive connections: %.1f MB with kernel stacks, %d threads (goal %d MB)" % (MANY, idle, threads, MOST_MB))
    last = load.again(MANY)  # they are all still there
    check_round(last, 200)
    load.end()
    until(lambda: tasks(proxy.pid) < 200, 10, "the workers go with their connections")
    proxy.stop()
    assert idle <= MOST_MB, "%.1f MB for %d idle connections (%d threads), %d at most" % (idle, MANY, threads, MOST_MB)


if __name__ == "__main__":
    sys.exit(main())

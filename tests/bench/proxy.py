#!/usr/bin/env python3
"""chaos-proxy (chaos off), nginx and HAProxy side by side: same machine, same upstream, same wrk, turns interleaved.

    tests/bench/proxy.py DELAY_PROGRAM [--quick]

Prints one row per figure: name TAB measured TAB goal TAB ok|over|under|-. A ratio is the median of the ratios of each round.
"""
import os
import re
import resource
import socket
import statistics
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "peers"))
import real  # noqa: E402  the processes and their cleanup

UPSTREAM = """
    keepalive_requests 1000000000; keepalive_timeout 600s;
    server { listen 127.0.0.1:PORT backlog=4096; location / { return 200 "%s"; } }
""" % ("0123456789" * 10)

NGINX = """
    keepalive_requests 1000000000; keepalive_timeout 600s;
    upstream one { server 127.0.0.1:%d; keepalive 256; keepalive_requests 1000000000; keepalive_timeout 600s; }
    server {
        listen 127.0.0.1:PORT backlog=4096;
        location / { proxy_pass http://one; proxy_http_version 1.1; proxy_set_header Connection "";
                     proxy_set_header Host $http_host; proxy_set_header X-Forwarded-For $remote_addr; }
    }
"""

HAPROXY = """
global
    nbthread 1
    maxconn 4000
defaults
    mode http
    timeout connect 5s
    timeout client 600s
    timeout server 600s
    option http-keep-alive
    option forwardfor
    http-reuse always
listen one
    bind 127.0.0.1:%d backlog 4096
    server one 127.0.0.1:%d
"""


class Peer:
    def __init__(self, name, port, pids):
        self.name, self.port, self.pids = name, port, pids

    def cpu(self):
        """Seconds of CPU of its processes, all their threads, living and gone."""
        ticks = 0
        for pid in self.pids:
            with open("/proc/%d/stat" % pid) as f:
                fields = f.read().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self):
        """KiB: PSS, and the kernel's stacks, 16 KiB a thread."""
        pss = threads = 0
        for pid in self.pids:
            with open("/proc/%d/smaps_rollup" % pid) as f:
                pss += int(re.search(r"^Pss:\s+(\d+)", f.read(), re.M).group(1))
            threads += len(os.listdir("/proc/%d/task" % pid))
        return pss, threads


def start_haproxy(upstream_port):
    port = real.free_port()
    path = os.path.join(real.folder(), "haproxy.cfg")
    with open(path, "w") as f:
        f.write(HAPROXY % (port, upstream_port))
    process = real.spawn([real.tool("haproxy"), "-db", "-f", path], stdout=-3, stderr=-3)
    real.until(lambda: real.answers(port), 5, "haproxy listens")
    return Peer("HAProxy", port, [process.pid])


def start_peers(upstream_port):
    chaos = real.Proxy(upstream_port, real.OFF, ttl=1000, args=("--max-conns", "2000", "--quiet"))
    peers = [Peer("chaos-proxy", chaos.port, [chaos.process.pid])]
    nginx = real.Nginx(NGINX % upstream_port, "relay", "worker_connections 8192;")
    peers.append(Peer("nginx", nginx.port, nginx.workers()))
    if real.tool("haproxy"):
        peers.append(start_haproxy(upstream_port))
    return peers


def row(name, measured, goal="-", good=None):
    print("%s\t%s\t%s\t%s" % (name, measured, goal, "-" if good is None else "ok" if good else "missed"), flush=True)


def one_run(peer, connections, seconds, args):
    cpu = peer.cpu()
    got = real.Wrk(peer.port, seconds, connections, "/", args=args, fast=True).finish()
    if got["connect"] or got["read"] or got["write"] or got["timeout"] or got["other"] or got["failed"]:
        raise RuntimeError("%s: %s" % (peer.name, got))
    return got["requests"] / got["seconds"], (peer.cpu() - cpu) / got["requests"] * 1e6, got["p99"]


def rounds(peers, count, connections, seconds, args=()):
    """Each peer once in each round, the order turning; the first, short round only warms up."""
    taken = {p.name: [] for p in peers}
    for p in peers:
        one_run(p, connections, 1, args)
    for i in range(count):
        for p in peers[i % len(peers):] + peers[:i % len(peers)]:
            taken[p.name].append(one_run(p, connections, seconds, args))
            sys.stderr.write(".")
            sys.stderr.flush()
    return taken


def median_of(taken, name, column):
    return statistics.median(t[column] for t in taken[name])


def compare(title, peers, taken, with_goals):
    others = [p.name for p in peers if p.name != "chaos-proxy"]
    for p in peers:
        low, high = min(t[0] for t in taken[p.name]), max(t[0] for t in taken[p.name])
        row("%s: %s" % (title, p.name), "%6.0f req/s (%.0f..%.0f), %5.1f us CPU, p99 %.2f ms"
            % (median_of(taken, p.name, 0), low, high, median_of(taken, p.name, 1), median_of(taken, p.name, 2)))
    mine = taken["chaos-proxy"]
    speed = statistics.median(mine[i][0] / max(taken[o][i][0] for o in others) for i in range(len(mine)))
    row("%s: req/s, ratio to the better" % title, "%.2f" % speed, ">= 0.9" if with_goals else "-", speed >= 0.9 if with_goals else None)
    if "HAProxy" in others:
        cpu = statistics.median(mine[i][1] / taken["HAProxy"][i][1] for i in range(len(mine)))
        row("%s: CPU/request, ratio to HAProxy" % title, "%.2f" % cpu, "<= 1.15" if with_goals else "-", cpu <= 1.15 if with_goals else None)


def idle_memory(peer, count):
    """Memory while count keep-alive clients, each served once, stay connected."""
    before = peer.memory()
    clients = []
    try:
        for _ in range(count):
            s = socket.create_connection(("127.0.0.1", peer.port), 5)
            s.settimeout(5)
            clients.append(s)
            s.sendall(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n")
            if b"200 OK" not in s.recv(4096):
                raise RuntimeError("%s does not serve %d connections" % (peer.name, count))
        pss, threads = peer.memory()
    finally:
        for s in clients:
            s.close()
    stacks = threads * 16
    row("1,000 idle keep-alive: %s" % peer.name, "%5.1f MB (PSS %.1f + kernel stacks %.1f, %d threads); before %.1f MB"
        % ((pss + stacks) / 1024, pss / 1024, stacks / 1024, threads, (before[0] + before[1] * 16) / 1024))


def delays(program, upstream_port, quick):
    requests = 8 if quick else 40
    for delay in (0, 200):
        config = {"enabled": True, "latency": delay} if delay else real.OFF
        proxy = real.Proxy(upstream_port, config, args=("--quiet",))
        done = real.subprocess.run([program, str(proxy.port), "50", str(requests), str(delay)], capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise RuntimeError(done.stderr)
        count, least, median, p99, most = done.stdout.split()
        proxy.stop()
        if delay and float(least) < 0:
            raise RuntimeError("a delay of 200 ms was %s ms short" % least)
        if delay:
            row("delay 200 ms, 50 connections: client's time - 200, median", median + " ms", "< 0.5 ms", float(median) < 0.5)
            row("   p99, most, of %s requests" % count, "%s ms, %s ms" % (p99, most))
            row("   toxiproxy, quoted from another run, not measured here", "median 1.2, p99 5.4 ms")
        else:
            row("round trip without a delay, same client, median", median + " ms")


def main():
    quick = "--quick" in sys.argv
    missing = [t for t in ("nginx", "wrk", "ps") if not real.tool(t)]
    if missing:
        row("proxy figures: not measured, not installed: " + " ".join(missing), "-")
        return 1 if os.environ.get("CHAOS_CI") == "1" else 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20000) if hard > 0 else 20000, hard))
    if not real.tool("haproxy"):
        row("HAProxy: not installed, not measured", "-")
    upstream = real.Nginx(UPSTREAM, "upstream", "worker_connections 8192;")
    peers = start_peers(upstream.port)
    row("setup", "%d cores for wrk, proxy and upstream together; 100-byte replies; chaos off" % (os.cpu_count() or 0))
    compare("64 keep-alive", peers, rounds(peers, 5 if quick else 7, 64, 1 if quick else 3), True)
    compare("new connection each", peers, rounds(peers, 3 if quick else 5, 64, 1 if quick else 3, ("-H", "Connection: close")), False)
    if not quick:
        compare("1,000 keep-alive", peers, rounds(peers, 3, 1000, 3), False)
    for peer in peers:
        idle_memory(peer, 1000)
    for process in list(real.RUNNING):
        if process is not upstream.process:
            real.stop(process)
    delays(sys.argv[1], upstream.port, quick)
    return 0


if __name__ == "__main__":
    real.atexit.register(real.cleanup)
    real.signal.signal(real.signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())

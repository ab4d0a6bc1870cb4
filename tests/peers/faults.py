#!/usr/bin/env python3
"""chaos-proxy while the system fails it: libfiu's POSIX preload at 1 % under load, few descriptors, few threads, little
memory, stopped and continued. No crash, no leak, no wrong byte, and whole again afterwards.

    tests/peers/faults.py [--filter TEXT] [--build DIR] [-v]

Needs fiu-run and fiu-ctrl (fiu-utils). 100,000 requests with CHAOS_CI=1, else 5,000."""
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

from common import BUILD, CI, Load, Proxy, ask, case, connect, cpu, descriptors, dial, folder, main, need, note, once, pss, read_all, stop, tasks, tool, until

REQUESTS = 100000 if CI else 5000
CONNECTIONS = 128
# A send that is made to fail leaves both sides waiting for the other: the time-outs end that.
QUICK = ("--max-conns", "200", "--head-timeout", "2s", "--body-timeout", "2s", "--reply-timeout", "2s", "--idle-timeout", "3s")

# Not close and shutdown: they would fake a leak or a hang. Not a write cut short: a log line fits a pipe, where that cannot be.
NET = ["accept", "connect", "socket", "poll", "select", "pselect", "recv", "recvfrom", "recvmsg", "send", "sendto", "sendmsg"]
FILES = ["posix/io/oc/open", "posix/io/rw/read", "posix/io/rw/readv", "posix/io/rw/write", "posix/io/rw/writev"]
MEMORY = ["libc/mm/malloc", "libc/mm/calloc", "libc/mm/realloc", "posix/mm/mmap", "posix/mm/mprotect", "posix/mm/madvise", "libc/str/strdup"]
POINTS = ["posix/io/net/" + name for name in NET] + FILES + MEMORY + ["posix/proc/kill", "posix/proc/sigaction"]


def fine(got, count=None):
    """A round without any trouble."""
    assert got["ok"] == (count or got["ok"]) and not any(got[k] for k in ("wrong", "errors", "refused", "status_5xx", "other", "unanswered")), got


def clean(proxy, connections=CONNECTIONS, count=500):
    load = Load(proxy.port, connections, count)
    fine(load.result(), count)
    load.end()


class Fiu:
    """The proxy under fiu-run, and its failure points by remote control."""

    def __init__(self, upstream, config, args=QUICK):
        self.pipe = os.path.join(folder(), "fiu")
        # libfiu's own thread would take the signals that chaos-proxy waits for: it inherits this mask.
        hold = lambda: signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        self.proxy = Proxy(upstream, config, ttl=1000, args=args, under=[tool("fiu-run"), "-x", "-f", self.pipe], preexec_fn=hold)

    def control(self, *commands):
        for command in commands:
            done = subprocess.run([tool("fiu-ctrl"), "-f", self.pipe, "-c", command, str(self.proxy.pid)], capture_output=True, text=True, timeout=10)
            assert done.returncode == 0, "%s: %s %s" % (command, done.stdout, done.stderr)

    def enable(self, points, probability, more=""):
        self.control(*["enable_random name=%s,probability=%s%s" % (point, probability, more) for point in points])

    def disable(self, points):
        self.control(*["disable name=" + point for point in points])


def check_whole(fiu, before, connections, what):
    """Afterwards: alive, at its job, and no larger than before."""
    proxy = fiu.proxy
    assert proxy.alive(), "%s: ended with %s" % (what, proxy.process.poll())
    clean(proxy, connections)
    until(lambda: descriptors(proxy.pid) <= before["descriptors"] + connections, 5,
          "%s: %d descriptors, %d before" % (what, descriptors(proxy.pid), before["descriptors"]))
    grown = pss(proxy.pid) - before["pss"]
    assert grown < 12000, "%s: %d KiB more than before" % (what, grown)  # stacks and free lists of threads that came and went
    return grown


def measure(proxy):
    return {"descriptors": descriptors(proxy.pid), "pss": pss(proxy.pid)}


def storm(name, points, probability, count, length=2000, post=0, connections=CONNECTIONS):
    """Load while the points fail; the counts, and what the proxy grew by."""
    upstream = Load.serve()
    fiu = Fiu(upstream.port, {"enabled": True, "latency": 1, "latencyRate": 10, "errorRate": 1, "errorStatus": 418, "seed": 5})
    clean_before = Load(fiu.proxy.port, connections, 2000, length, post)
    got = clean_before.result()
    assert got["ok"] + got["other"] == 2000 and got["wrong"] == got["errors"] == 0, got
    clean_before.end()
    before = measure(fiu.proxy)
    fiu.enable(points, probability)
    rereads = threading.Event()

    def reread():
        while not rereads.wait(0.05) and fiu.proxy.alive():
            fiu.proxy.signal(signal.SIGHUP)
    thread = threading.Thread(target=reread, daemon=True)
    thread.start()
    load = Load(fiu.proxy.port, connections, count, length, post, seconds=150)
    got = load.result()
    load.end()
    rereads.set()
    thread.join(5)
    assert fiu.proxy.alive(), "%s: the proxy ended with %s" % (name, fiu.proxy.process.poll())
    fiu.disable(points)
    assert got["wrong"] == 0 and got["unanswered"] == 0, "%s: %s" % (name, got)
    fiu.proxy.put({"enabled": False})
    fiu.proxy.signal(signal.SIGHUP)
    until(lambda: fiu.proxy.state() == "off", 5, "%s: the config is read again (%s)" % (name, fiu.proxy.state()))
    grown = check_whole(fiu, before, connections, name)
    fiu.proxy.signal(signal.SIGTERM)
    assert fiu.proxy.wait_exit(12) == 0
    note("%s, %s each: %d requests in %.1f s: %d ok, %d injected, %d own 5xx, %d broken, 0 wrong; %d KiB more" %
         (name, probability, count, got["total_ms"] / 1000, got["ok"], got["other"], got["status_5xx"], got["errors"], grown))
    stop(upstream)


@case
def one_percent_of_everything():
    need("fiu-run", "fiu-ctrl")
    storm("all points", POINTS, 0.01, REQUESTS)


@case
def one_percent_with_uploads():
    need("fiu-run", "fiu-ctrl")
    storm("uploads of 30 KB", POINTS, 0.01, REQUESTS // 10, length=30000, post=30000)


@case
def memory_fails_often():
    need("fiu-run", "fiu-ctrl")
    storm("memory only", MEMORY, 0.2, REQUESTS // 10, connections=16)


@case
def accept_fails():
    """ECONNABORTED, EMFILE, ENFILE, ENOMEM, EINTR from every second accept."""
    need("fiu-run", "fiu-ctrl")
    upstream = Load.serve()
    fiu = Fiu(upstream.port, {"enabled": False})
    clean(fiu.proxy)
    before = measure(fiu.proxy)
    for name, number in (("ECONNABORTED", 103), ("EMFILE", 24), ("ENFILE", 23), ("ENOMEM", 12), ("EINTR", 4), ("EPROTO", 71)):
        fiu.enable(["posix/io/net/accept", "posix/io/net/accept4"][:1], 0.5, ",failinfo=%d" % number)
        for _ in range(10):
            reply = once(fiu.proxy.port, "/t/100")
            assert reply.status == 200 and len(reply.body) == 100, "%s: %d" % (name, reply.status)
        fiu.disable(["posix/io/net/accept"])
    check_whole(fiu, before, CONNECTIONS, "accept")
    fiu.proxy.stop()
    stop(upstream)


# ---- real limits -------------------------------------------------------------------------------------------------------

@case
def sixty_four_descriptors():
    """The connection limit is clamped to what fits; 150 clients get their turn all the same."""
    upstream = Load.serve()
    proxy = Proxy(upstream.port, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    sockets = [dial(proxy.port) for _ in range(150)]
    for n, s in enumerate(sockets):
        s.sendall(b"GET /n%d/50 HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n" % n)
    for n, s in enumerate(sockets):
        data = read_all(s)
        assert data.startswith(b"HTTP/1.1 200 ") and data.endswith((b"n%d/" % n * 25)[:50]), "connection %d: %r" % (n, data[:200])
        s.close()
    assert descriptors(proxy.pid) <= 64
    proxy.stop()
    stop(upstream)


@case
def descriptors_run_out():
    """EMFILE for real, in accept and towards the upstream: no spinning, and well again when there are some."""
    upstream = Load.serve()
    proxy = Proxy(upstream.port)
    clean(proxy, 4)
    keep = connect(proxy.port)
    limits = resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, (descriptors(proxy.pid) + 3, limits[1]))
    waiting = [dial(proxy.port, 20) for _ in range(60)]  # silent: they keep what they have got
    used, began = cpu(proxy.pid), time.monotonic()
    until(lambda: time.monotonic() > began + 1, 3, "a second of shortage")
    used = cpu(proxy.pid) - used
    assert proxy.alive() and used < 0.3, "%.2f s of CPU in a second without descriptors" % used
    status = ask(keep, "/k/10").status
    assert status in (200, 503), status
    resource.prlimit(proxy.pid, resource.RLIMIT_NOFILE, limits)
    for s in waiting:
        s.sendall(b"GET /w/10 HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n")
    heads = {read_all(s)[:12] for s in waiting}
    for s in waiting:
        s.close()
    assert heads == {b"HTTP/1.1 200"}, heads
    assert once(proxy.port, "/k/10").body == b"k/k/k/k/k/"
    keep.close()
    clean(proxy)
    note("out of descriptors: %.2f s of CPU in 1 s; a request on an old connection got %d; then all served" % (used, status))
    proxy.stop()
    stop(upstream)


def crowd(proxy, held=40):
    """Connections that all wait for an injected delay, more than there may be threads; each gets its own reply. The most
    threads seen."""
    sockets, most = [dial(proxy.port, 30) for _ in range(held)], 0
    for n, s in enumerate(sockets):
        s.sendall(b"GET /c%d/50 HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\n" % n)
    for n, s in enumerate(sockets):
        most = max(most, tasks(proxy.pid))
        data = read_all(s)
        assert data.startswith(b"HTTP/1.1 200 ") and data.endswith((b"c%d/" % n * 25)[:50]), "connection %d: %r" % (n, data[:200])
        s.close()
    return most


@case
def threads_run_out():
    """pthread_create fails: the connections wait for the threads there are."""
    upstream = Load.serve()
    options = {}
    if os.geteuid() == 0:  # the limit does not bind root: as a user who has no other process
        program = shutil.copy(os.path.join(BUILD, "chaos-proxy"), folder())
        options = {"program": program, "preexec_fn": lambda: (resource.setrlimit(resource.RLIMIT_NPROC, (12, 12)), os.setgid(54321), os.setuid(54321))}
    else:
        mine = subprocess.run(["ps", "-L", "-o", "lwp=", "-U", str(os.geteuid())], capture_output=True, text=True).stdout.count("\n")
        options = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NPROC, (mine + 12, mine + 12))}
    proxy = Proxy(upstream.port, {"enabled": True, "latency": 100}, **options)
    most = crowd(proxy)
    assert most <= 14, "%d threads: the limit did not bind" % most
    clean(proxy, 4, 40)
    proxy.stop()
    stop(upstream)
    note("thread limit of 12: 40 delayed clients served by %d threads at most" % most)


@case
def address_space_runs_out():
    """mmap fails for thread stacks and buffers: 3 MB are left when the proxy has started."""
    upstream = Load.serve()
    proxy = Proxy(upstream.port, {"enabled": True, "latency": 100})
    with open("/proc/%d/statm" % proxy.pid) as f:
        size = int(f.read().split()[0]) * resource.getpagesize() + (3 << 20)
    resource.prlimit(proxy.pid, resource.RLIMIT_AS, (size, size))
    most = crowd(proxy, 50)
    assert most < 40, "%d threads: the limit did not bind" % most
    note("3 MB of address space left: 50 delayed clients served by %d threads at most" % most)
    clean(proxy, 4, 40)
    proxy.stop()
    stop(upstream)


@case
def stopped_and_continued():
    """SIGSTOP and SIGCONT: every blocking call ends with EINTR, and no request notices."""
    upstream = Load.serve()
    proxy = Proxy(upstream.port, {"enabled": True, "latency": 50, "latencyRate": 50})
    load = Load(proxy.port, 8, 1500 if CI else 600, 20000, 20000)
    stops = 0
    while load.process.poll() is None and stops < 30:
        proxy.signal(signal.SIGSTOP)
        time.sleep(0.01)  # how long it stands still is what is tested
        proxy.signal(signal.SIGCONT)
        time.sleep(0.02)
        stops += 1
    fine(load.result())
    assert stops == 30, "the load was over after %d stops" % stops
    load.end()
    proxy.stop()
    stop(upstream)


if __name__ == "__main__":
    sys.exit(main(240))

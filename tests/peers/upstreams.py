#!/usr/bin/env python3
"""Upstreams that are down, swallowed, slow, lying or named; peers that reset at every stage; the end of the proxy with all
of that in flight.

    tests/peers/upstreams.py [--filter TEXT] [--build DIR] [-v]

The names need unshare and the right to mount over the hosts file in a namespace of one's own; without, that case is left out."""
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

from common import (CI, Proxy, Upstream, ask, case, connect, counted, descriptors, dial, folder, free_port, in_threads, main, note, once,
                    read_all, read_to_end, reset, tool, until)

GET = b"GET %s HTTP/1.1\r\nHost: t\r\n\r\n"
LARGE = bytes(range(256)) * 4096  # 1 MiB


def own_error(reply, status):
    """The proxy's own answer: says so, and is never taken for an injected one."""
    assert reply.status == status and "proxy-status" in reply.headers and reply.mark is None, (reply.status, reply.headers)


# ---- down, black-holed, slow -----------------------------------------------------------------------------------------

@case
def down_and_up_again():
    port = free_port()
    p = Proxy(port, args=("--connect-timeout", "1s"))
    kept = connect(p.port)
    for _ in range(3):
        own_error(once(p.port, "/"), 502)
        own_error(once(p.port, "/", "POST", b"x" * 30000), 502)
    up = Upstream(port=port)
    assert ask(kept, "/").status == 200, "a connection that never failed is still good"
    up.close()
    until(lambda: once(p.port, "/").status == 502, 3, "502 once it is gone")
    up = Upstream(port=port)
    assert once(p.port, "/").body == b"ok"
    kept.close()
    p.stop()
    up.close()


@case
def black_holed():
    """A listener whose backlog is full swallows the SYN: 504 after the connect time-out; others are not held up."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = []
        for _ in range(4):
            s = socket.socket()
            s.setblocking(False)
            s.connect_ex(full.getsockname())
            waiting.append(s)
        p = Proxy(full.getsockname()[1], {"enabled": True, "errorRate": 100, "match": {"paths": ["/injected"]}}, args=("--connect-timeout", "400ms"))
        began = time.monotonic()
        replies = in_threads([lambda: once(p.port, "/") for _ in range(20)])
        took = time.monotonic() - began
        for reply in replies:
            own_error(reply, 504)
            assert 0.35 <= reply.seconds < 3, reply.seconds
        assert took < 3, "20 at once took %.1f s: they waited for each other" % took
        assert once(p.port, "/injected").mark == "error"
        p.stop()
        for s in waiting:
            s.close()


@case
def slow_reply():
    """No reply head in time is 504, and it is not sent twice; a reply that stops half-way looks cut."""
    gate = threading.Event()

    def answer(request):
        if request.path == "/never":
            gate.wait(10)
        if request.path == "/half":
            request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf")
            gate.wait(10)
            return False
        return request.reply()
    up = Upstream(answer)
    p = Proxy(up.port, args=("--reply-timeout", "400ms", "--body-timeout", "400ms"))
    reply = once(p.port, "/never")
    own_error(reply, 504)
    assert 0.4 <= reply.seconds < 3 and up.calls["/never"] == 1, (reply.seconds, up.calls)
    s = dial(p.port)
    s.sendall(GET % b"/half")
    data = read_all(s)
    assert data.startswith(b"HTTP/1.1 200 ") and data.endswith(b"\r\n\r\nhalf"), data
    assert once(p.port, "/fine").body == b"ok"
    gate.set()
    p.stop()
    up.close()


# ---- lying -----------------------------------------------------------------------------------------------------------

LIES = [  # what the upstream sends; what the client must see: 502, or "cut": that, or a reply that looks cut
    (b"", 502), (b"\r\n\r\n", 502), (b"hello\r\n\r\n", 502), (b"HTTP/1.1 OK\r\n\r\n", 502), (b"HTTP/2 200 OK\r\n\r\n", 502), (b"HTTP/1.1 200", 502),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding", 502), (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", 502),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 502), (b"HTTP/1.1 200 OK\r\nContent-Length: 5, 6\r\n\r\nhello", 502),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 0x5\r\n\r\nhello", 502), (b"HTTP/1.1 200 OK\r\nX: a\x00b\r\n\r\n", 502),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n", 502), (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000 + b"\r\n\r\n", 502),
    (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n", 502), (b"\x16\x03\x01\x02\x00\x01\x00", 502),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", "cut"), (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", "cut"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\nzz\r\n", "cut"), (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel", "cut"),
]


@case
def lies():
    def answer(request):
        if request.path == "/honest":
            return request.reply(b"the truth")
        request.send(LIES[int(request.path[1:])][0])
        return False
    up = Upstream(answer)
    p = Proxy(up.port, args=("--reply-timeout", "2s"))
    wrong = []
    for n, (sent, want) in enumerate(LIES):
        s = dial(p.port)
        s.sendall(GET % (b"/%d" % n))
        data = read_all(s)
        s.close()
        good = data.startswith(b"HTTP/1.1 502 ") and data.count(b"HTTP/1.1") == 1 and b"proxy-status: chaos" in data.lower()
        if want == "cut" and not good:  # a whole message would end with its body, or with its last chunk
            good = data.startswith(b"HTTP/1.1 200 ") and b"hel" in data and not data.endswith(b"\r\n0\r\n\r\n")
        if not good:
            wrong.append("%r gave %r" % (sent[:60], data[:120]))
        if once(p.port, "/honest").body != b"the truth":
            wrong.append("after %r another request got a wrong reply" % sent[:60])
    assert not wrong, "%d of %d:\n     %s" % (len(wrong), len(LIES), "\n     ".join(wrong))
    p.stop()
    up.close()


@case
def more_than_promised():
    """Bytes behind a reply are nobody's: neither this client's nor the next one's."""
    def answer(request):
        extra = {"/body": b" and more", "/reply": b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison",
                 "/head": b"HTTP/1.1 200 OK\r\nContent-Le"}.get(request.path, b"")
        if request.method == "HEAD" or request.path == "/204":
            request.send(b"HTTP/1.1 %s\r\nContent-Length: 6\r\n\r\npoison" % (b"200 OK" if request.method == "HEAD" else b"204 No Content"))
        else:
            request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nright" + extra)
        if request.path == "/late":
            time.sleep(0.01)  # when the reply has been taken for whole, and the connection for idle
            request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\npoison")
            poisoned.set()
        return True
    poisoned = threading.Event()
    up = Upstream(answer)
    p = Proxy(up.port)
    for _ in range(3):
        assert once(p.port, "/late").body == b"right" and poisoned.wait(5)
        poisoned.clear()
        assert once(p.port, "/next").body == b"right", "after late bytes"
        for method, path, body in (("GET", "/body", b"right"), ("GET", "/reply", b"right"), ("HEAD", "/head", b""), ("GET", "/head", b"right"),
                                   ("GET", "/204", b"")):
            assert once(p.port, path, method).body == body, path
            for _ in range(2):
                assert once(p.port, "/next").body == b"right", "after " + path
    p.stop()
    up.close()


# ---- resets ------------------------------------------------------------------------------------------------------------

def healthy(p, was):
    """Serving, and nothing left of those who went."""
    for _ in range(3):
        assert once(p.port, "/ok").body == b"ok"
    until(lambda: descriptors(p.pid) <= was + 2, 5, "%d descriptors, %d before" % (descriptors(p.pid), was))
    assert p.alive()


@case
def client_resets_at_every_stage():
    gate = threading.Event()

    def answer(request):
        for _ in request.body():
            pass
        if request.path == "/wait":
            gate.wait(10)
        return request.reply(LARGE if request.path == "/large" else b"ok", framing="chunked" if request.path == "/chunks" else "length")
    up = Upstream(answer)
    p = Proxy(up.port, {"enabled": True, "latency": 60000, "match": {"paths": ["/delayed"]}}, program=counted())
    post = b"POST %s HTTP/1.1\r\nHost: t\r\nContent-Length: 100000\r\n\r\n"
    stages = {
        "before the head": lambda s: None,
        "in the head": lambda s: s.sendall(b"GET / HT"),
        "in the body": lambda s: s.sendall(post % b"/ok" + b"x" * 5000),
        "in a chunk": lambda s: s.sendall(b"POST /ok HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nffff\r\nabc"),
        "in the injected delay": lambda s: (s.sendall(GET % b"/delayed"), until(lambda: p.logged_faults() > told[0], 3, "delayed")),
        "while the upstream works": lambda s: (s.sendall(GET % b"/wait"), until(lambda: up.calls["/wait"] > calls[0], 3, "called")),
        "in the reply": lambda s: (s.sendall(GET % b"/large"), s.recv(1000)),
        "behind a pipelined request": lambda s: s.sendall(GET % b"/large" * 5),
    }
    once(p.port, "/ok")
    was = descriptors(p.pid)
    for name, reach in stages.items():
        for way in (reset, socket.socket.close):
            for _ in range(3):
                told, calls = [p.logged_faults()], [up.calls["/wait"]]
                s = dial(p.port)
                reach(s)
                way(s)
            assert once(p.port, "/ok").body == b"ok", "after a client went " + name
    gate.set()
    p.signal(signal.SIGUSR1)  # the delayed ones are released, and still call the upstream
    until(lambda: up.calls["/delayed"] == 6, 5, "6 calls for clients who gave up, not %d" % up.calls["/delayed"])
    healthy(p, was + 8)
    totals = p.totals()
    assert totals["connections_now"] == totals["waiting"] == 0, totals
    up.close()


@case
def upstream_resets_at_every_stage():
    """Cut before a reply: 502. Cut in the reply: the client sees a cut message, never a whole one."""
    def answer(request):
        stage = request.path[1:]
        if stage == "ok":
            return request.reply()
        if stage == "body":
            next(request.body())
        elif stage != "head":
            for _ in request.body():
                pass
        if stage == "status":
            request.send(b"HTTP/1.1 20")
        if stage == "reply":
            request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"y" * 5000)
        if stage == "chunk":
            request.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1388\r\n" + b"y" * 5000)
        if stage == "endless":
            request.send(b"HTTP/1.1 200 OK\r\n\r\n" + b"y" * 5000)
        if stage in ("reply", "chunk", "endless"):
            arrived.wait(5)  # a reset discards what is still under way
            arrived.clear()
        reset(request.conn)
        return False
    arrived = threading.Event()
    up = Upstream(answer)
    p = Proxy(up.port)
    once(p.port, "/ok")
    was = descriptors(p.pid)
    for stage in ("head", "body", "whole", "status", "reply", "chunk", "endless"):
        for method in ("POST", "GET"):
            if method == "GET" and stage == "body":
                continue
            calls = up.calls["/" + stage]
            s = dial(p.port)
            body = b"x" * 100000 if method == "POST" else b""
            s.sendall(b"%s /%s HTTP/1.1\r\nHost: t\r\nContent-Length: %d\r\n\r\n" % (method.encode(), stage.encode(), len(body)) + body)
            data = b""
            if stage in ("reply", "chunk", "endless"):
                while data.count(b"y") < 5000:
                    data += s.recv(65536)
                arrived.set()
            rest, was_reset = read_to_end(s)
            data += rest
            s.close()
            if stage in ("reply", "chunk", "endless"):
                assert data.startswith(b"HTTP/1.1 200 ") and not data.endswith(b"0\r\n\r\n"), (stage, data[-80:])
                assert stage != "endless" or was_reset or b"\r\ntransfer-encoding: chunked\r\n" in data.lower(), "a cut reply ends as a whole one does"
            else:
                assert data.startswith(b"HTTP/1.1 502 "), (stage, method, data[:200])
            assert method == "GET" or up.calls["/" + stage] == calls + 1, "a POST was sent %d times" % (up.calls["/" + stage] - calls)
    healthy(p, was + 2)
    p.stop()
    up.close()


@case
def stale_connections():
    """The upstream closes every connection after its reply, without a word: what may be sent again is, nothing is doubled."""
    def answer(request):
        for _ in request.body():
            pass
        request.reply(request.path.encode())
        return False
    up = Upstream(answer)
    p = Proxy(up.port)
    connections, failed = [connect(p.port) for _ in range(4)], 0
    for n in range(300):
        path, connection = "/n%d" % n, n % 4
        method, body = (("GET", None), ("POST", b"x" * 10), ("HEAD", None))[n % 3]
        reply = ask(connections[connection], path, method, body)
        calls = up.calls[path]
        if method == "POST" and reply.status == 502:
            failed += 1
            assert calls == 0, "502 for a POST that was called %d times" % calls
            connections[connection] = connect(p.port)
        else:
            assert (reply.status, calls) == (200, 1), "%s: %d, called %d times" % (method, reply.status, calls)
            assert reply.body == (b"" if method == "HEAD" else path.encode()), reply.body
    note("upstream that closes after each reply: 200 GET and HEAD fine, %d of 100 POST got 502, none sent twice" % failed)
    p.stop()
    up.close()


# ---- the end, and off --------------------------------------------------------------------------------------------------

def in_flight(p, up, gate):
    """Requests at every stage: delayed, at work upstream, in the middle of a reply. Returns them as (socket, end)."""
    sockets = []
    for path, end in [(b"/delayed", b"ok")] * 5 + [(b"/wait", b"ok")] * 5 + [(b"/trickle", b"last")] * 5:
        s = dial(p.port, 20)
        s.sendall(GET % path)
        sockets.append((s, end))
    until(lambda: p.logged_faults() >= 5 and up.calls["/wait"] == 5 and up.calls["/trickle"] == 5, 5, "15 requests are in flight")
    return sockets


def staged():
    gate = threading.Event()

    def answer(request):
        if request.path == "/trickle":
            request.send(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nfour")
            gate.wait(10)
            request.send(b"last")
            return True
        if request.path == "/wait":
            gate.wait(10)
        return request.reply()
    return Upstream(answer), gate


@case
def drain_finishes_what_is_in_flight():
    up, gate = staged()
    p = Proxy(up.port, {"enabled": True, "latency": 1000, "match": {"paths": ["/delayed"]}}, args=("--drain", "5s"))
    sockets = in_flight(p, up, gate)
    began = time.monotonic()
    p.signal(signal.SIGTERM)
    threading.Timer(0.5, gate.set).start()
    for s, end in sockets:
        data = read_all(s)
        assert data.startswith(b"HTTP/1.1 200 ") and data.endswith(end), data
        s.close()
    assert p.wait_exit(5) == 0
    took = time.monotonic() - began
    assert 0.4 < took < 3, took
    assert up.calls["/delayed"] == 5
    note("SIGTERM with 15 in flight, 5 of them delayed: all answered, ended after %.2f s" % took)
    up.close()


@case
def drain_ends_in_time():
    up, gate = staged()
    p = Proxy(up.port, {"enabled": True, "latency": 60000, "match": {"paths": ["/delayed"]}}, args=("--drain", "600ms"))
    sockets = in_flight(p, up, gate)
    began = time.monotonic()
    p.signal(signal.SIGTERM)
    assert p.wait_exit(5) == 0
    took = time.monotonic() - began
    assert 0.5 < took < 2.5, took
    for n, (s, end) in enumerate(sockets):
        data = read_all(s)
        s.close()
        if n >= 5:  # a delay that ends here may still be served; what the upstream works at cannot be whole
            assert not data.endswith(end), "request %d was cut off and looks whole: %r" % (n, data)
    gate.set()
    up.close()


@case
def off_releases_at_once():
    """Delays, hangs and paced replies all end when chaos goes off, and the requests are served as if it had never been."""
    up = Upstream(lambda r: r.reply(LARGE if r.path == "/paced" else b"ok"))
    p = Proxy(up.port, {"enabled": True, "rules": [
        {"name": "delayed", "match": {"paths": ["/delayed"]}, "latency": 60000},
        {"name": "hung", "match": {"paths": ["/hung"]}, "errorRate": 100, "errorMode": "hang"},
        {"name": "paced", "match": {"paths": ["/paced"]}, "bandwidth": 10}]})
    results = []

    def one(path, size):
        reply = once(p.port, path, timeout=20)
        results.append((path, time.monotonic()))
        assert reply.status == 200 and len(reply.body) == size, (path, reply.status, len(reply.body))

    def release():
        until(lambda: p.logged_faults() >= 9, 5, "9 faults")
        began.append(time.monotonic())
        p.signal(signal.SIGUSR1)
    began = []
    in_threads([release] + [lambda path=path, size=size: one(path, size) for path, size in
                            (("/delayed", 2), ("/hung", 2), ("/paced", len(LARGE))) for _ in range(3)])
    late = max(at for _, at in results) - began[0]
    assert late < 0.5, "the last one came %.2f s after SIGUSR1" % late
    note("SIGUSR1: 3 delays, 3 hangs, 3 paced replies ended within %.0f ms" % (late * 1000))
    p.stop()
    up.close()


# ---- names -------------------------------------------------------------------------------------------------------------

def ipv6():
    try:
        with socket.socket(socket.AF_INET6) as s:
            s.bind(("::1", 0))
        return True
    except OSError:
        return False


@case
def addresses():
    """By number and by name; of several addresses the one that answers."""
    hosts = ["127.0.0.1"] + (["::1"] if ipv6() else [])
    for host in hosts:
        up = Upstream(host=host)
        for name in {"127.0.0.1": ["127.0.0.1", "localhost"], "::1": ["[::1]", "localhost"]}[host]:
            if host == "::1" and name == "localhost" and not any(a[4][0] == "::1" for a in socket.getaddrinfo("localhost", 80)):
                continue
            p = Proxy("http://%s:%d" % (name, up.port))
            replies = [once(p.port, "/") for _ in range(3)]
            assert [r.body for r in replies] == [b"ok"] * 3, "%s for an upstream on %s" % (name, host)
            assert any("\r\nhost: 127.0.0.1:%d" % p.port in h.lower() for h in up.heads[-3:]), up.heads[-1]
            p.stop()
        up.close()
    if len(hosts) == 1:
        note("no IPv6 here: [::1] was not tried")


@case
def prefix():
    up = Upstream()
    p = Proxy("http://localhost:%d/base/v1/" % up.port)
    once(p.port, "/a?b=1")
    once(p.port, "/")
    assert [h.split(" ")[1] for h in up.heads] == ["/base/v1/a?b=1", "/base/v1/"], up.heads
    p.stop()
    up.close()


@case
def names_that_change():
    """A hosts file of our own, mounted where only the proxy sees it: the name moves, goes, and comes back."""
    hosts = os.path.join(folder(), "hosts")
    with open(hosts, "w") as f:
        f.write("127.0.0.1 service.test\n")
    under = [tool("unshare") or "unshare", *([] if os.geteuid() == 0 else ["-r"]), "-m", "sh", "-c", 'mount --bind "$0" /etc/hosts && exec "$@"', hosts]
    try:
        allowed = subprocess.run([*under, "true"], capture_output=True, timeout=10).returncode == 0
    except OSError:
        allowed = False
    if not allowed:
        return note("names that change: not tried, no mount namespace may be made here")
    def service(number, port=0):
        return Upstream(lambda r: r.reply(number, fields="Connection: close\r\n") and False, host={b"one": "127.0.0.1", b"two": "127.0.0.2"}[number], port=port)

    def write(text):
        with open(hosts, "w") as f:  # in place: another file would not be the one that is mounted
            f.write(text)
        return time.monotonic()
    one = service(b"one")
    port = one.port
    p = Proxy("http://service.test:%d" % port, under=under)
    assert once(p.port, "/").body == b"one"
    write("127.0.0.2 service.test\n")
    two = service(b"two", port)
    one.close()
    at = time.monotonic()
    until(lambda: once(p.port, "/").body == b"two", 5, "the new address is used when the old one is dead")
    moved = time.monotonic() - at
    write("# gone\n")
    two.close()
    for _ in range(3):
        own_error(once(p.port, "/"), 502)
    until(lambda: any("service.test" in json.dumps(line) for line in p.log()), 5, "the log says that the resolver fails")
    two = service(b"two", port)
    assert once(p.port, "/").body == b"two", "the last good address was forgotten when the resolver failed"
    note("a name that moved: followed %.2f s after the old address died; kept while the resolver fails" % moved)
    if CI:  # both answer: the name is looked up every 30 s, for new connections
        one, at = service(b"one", port), write("127.0.0.1 service.test\n")
        until(lambda: once(p.port, "/").body == b"one", 40, "the address changes by itself")
        note("a name that moved while both addresses answer: followed after %.0f s" % (time.monotonic() - at))
    p.stop()
    one.close()
    two.close()


if __name__ == "__main__":
    sys.exit(main())

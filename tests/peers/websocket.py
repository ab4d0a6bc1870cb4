#!/usr/bin/env python3
"""WebSocket sessions through chaos-proxy: Python's websockets on both sides, then the ws package of Node.

    tests/peers/websocket.py [--filter TEXT] [--build DIR] [-v]

Needs websockets (python3-websockets); and node with ws: found by NODE_PATH, in build/npm/node_modules (npm install
--prefix build/npm ws) or where Debian's node-ws puts it."""
import asyncio
import http
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

from common import BUILD, ROOT, Proxy, Skip, Upstream, case, dial, first_line, main, need, note, once, read_all, spawn, tool, until

try:
    from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatusCode
    from websockets.legacy.client import connect as open_session
    from websockets.legacy.server import serve as serve_sessions
except ImportError:  # it may be the system's python that has it
    if os.path.exists("/usr/bin/python3") and not os.environ.get("CHAOS_PEER_AGAIN"):
        os.environ["CHAOS_PEER_AGAIN"] = "1"
        os.execv("/usr/bin/python3", ["/usr/bin/python3", *sys.argv])
    open_session = None

SECONDS = 10  # for any step


# ---- the service -----------------------------------------------------------------------------------------------------

class Service:
    """Echoes in a thread of its own; /refuse answers 403, /bye closes with 4001 at the first message, /hello speaks first."""

    def __init__(self):
        self.seen, self.closed, self.ready = [], [], threading.Event()
        threading.Thread(target=asyncio.run, args=(self.run(),), daemon=True).start()
        assert self.ready.wait(SECONDS)

    async def run(self):
        server = await serve_sessions(self.session, "127.0.0.1", 0, process_request=self.look, max_size=1 << 24, ping_interval=None)
        self.port = server.sockets[0].getsockname()[1]
        self.ready.set()
        await asyncio.Future()

    async def look(self, path, headers):
        self.seen.append((path, headers))
        if path == "/refuse":
            return http.HTTPStatus.FORBIDDEN, {"X-Why": "not today"}, b"no sessions here\n"

    async def session(self, ws):
        try:
            if ws.path == "/hello":
                await ws.send("hello")
            async for message in ws:
                if ws.path == "/bye":
                    await ws.close(4001, "as told")
                    return
                await ws.send(message)
        except ConnectionClosed:
            pass
        finally:
            await ws.wait_closed()
            self.closed.append((ws.path, ws.close_code))


SERVICE = []


def service():
    if open_session is None:
        raise Skip("not installed: websockets for Python (python3-websockets)")
    if not SERVICE:
        SERVICE.append(Service())
    return SERVICE[0]


def run(session):
    return asyncio.run(asyncio.wait_for(session, 30))


def connect(proxy, path="/echo", **options):
    return open_session("ws://127.0.0.1:%d%s" % (proxy.port, path), max_size=1 << 24, open_timeout=SECONDS, ping_interval=None, **options)


async def echoes(ws, message):
    await ws.send(message)
    got = await asyncio.wait_for(ws.recv(), SECONDS)
    assert got == message, "%d came back of %d, %s" % (len(got), len(message), type(got))


# ---- cases -----------------------------------------------------------------------------------------------------------

@case
def session():
    p = Proxy(service().port)
    rng = random.Random(5)

    async def talk(**options):
        async with connect(p, **options) as ws:
            assert not [name for name in ws.response_headers if name.lower().startswith("x-chaos")], ws.response_headers
            for message in ("text", "", "caf\u00e9 \u2603", b"\x00\xff", b"", rng.randbytes(65535), rng.randbytes(1 << 20), "z" * 200000):
                await echoes(ws, message)
            await asyncio.wait_for(await ws.ping("are you there"), SECONDS)
            await ws.send([b"in ", b"three ", b"frames"])
            assert await asyncio.wait_for(ws.recv(), SECONDS) == b"in three frames"
            await ws.close(4002, "enough")
            return ws.close_code
    assert run(talk()) == 4002
    assert run(talk(compression=None)) == 4002
    until(lambda: service().closed[-2:] == [("/echo", 4002)] * 2, 3, "the server saw both ends")
    path, headers = service().seen[-1]
    assert headers["Via"] and headers["X-Forwarded-For"] == "127.0.0.1" and headers["Upgrade"].lower() == "websocket", headers
    p.stop()


@case
def server_closes_and_speaks_first():
    p = Proxy(service().port)

    async def talk():
        async with connect(p, "/hello") as ws:
            assert await asyncio.wait_for(ws.recv(), SECONDS) == "hello"
        async with connect(p, "/bye") as ws:
            await ws.send("now")
            try:
                await asyncio.wait_for(ws.recv(), SECONDS)
                raise AssertionError("no close came")
            except ConnectionClosed:
                return ws.close_code, ws.close_reason
    assert run(talk()) == (4001, "as told")
    p.stop()


@case
def twenty_at_once():
    p = Proxy(service().port)

    async def one(n):
        rng = random.Random(n)
        async with connect(p) as ws:
            for i in range(20):
                await echoes(ws, rng.randbytes(rng.randrange(20000)) if i % 2 else "%d.%d" % (n, i))

    async def all_of_them():
        await asyncio.gather(*[one(n) for n in range(20)])
    began = time.monotonic()
    run(all_of_them())
    note("20 sessions of 20 messages at once: %.2f s" % (time.monotonic() - began))
    p.stop()


@case
def refused_by_the_upstream():
    p = Proxy(service().port)

    async def talk():
        try:
            async with connect(p, "/refuse"):
                raise AssertionError("a session in spite of 403")
        except InvalidStatusCode as error:
            return error.status_code, error.headers["X-Why"]
    assert run(talk()) == (403, "not today")
    p.stop()


@case
def errors_answer_instead():
    p = Proxy(service().port, {"enabled": True, "errorRate": 100, "errorStatus": 503, "retryAfter": 3})
    before = len(service().seen)

    async def talk():
        try:
            async with connect(p):
                raise AssertionError("a session in spite of an error")
        except InvalidStatusCode as error:
            return error.status_code, error.headers["X-Chaos-Injected"], error.headers["Retry-After"]
    assert run(talk()) == (503, "error", "3")
    assert len(service().seen) == before, "the upstream was asked"
    p.stop()


@case
def latency_delays_the_handshake():
    p = Proxy(service().port, {"enabled": True, "latency": 300})

    async def talk():
        began = time.monotonic()
        async with connect(p) as ws:
            opened = time.monotonic() - began
            mark = ws.response_headers.get("X-Chaos-Injected")
            began = time.monotonic()
            for n in range(10):
                await echoes(ws, "message %d" % n)
            return opened, time.monotonic() - began, mark
    opened, talked, mark = run(talk())
    assert 0.3 <= opened < 2 and talked < 0.3 and mark == "latency", (opened, talked, mark)
    p.stop()


@case
def drain_ends_a_session():
    p = Proxy(service().port, args=("--drain", "700ms"))

    async def talk():
        async with connect(p) as ws:
            await echoes(ws, "before")
            began = time.monotonic()
            p.signal(signal.SIGTERM)
            try:
                while True:
                    await asyncio.wait_for(ws.recv(), 5)
            except ConnectionClosedError:
                return time.monotonic() - began
    took = run(talk())
    assert p.wait_exit(5) == 0 and took < 2, "the session ended %.2f s after SIGTERM, --drain 700ms" % took
    until(lambda: service().closed[-1][0] == "/echo", 3, "the server saw the end")
    note("SIGTERM with an open session, --drain 700ms: ended after %.2f s" % took)


@case
def peer_vanishes():
    """Whoever is gone, the other side is told, and the proxy keeps nothing."""
    p = Proxy(service().port)

    async def abandon():
        ws = await connect(p)
        await echoes(ws, "still here")
        ws.transport.abort()
    before = len(service().closed)
    for _ in range(5):
        run(abandon())
    until(lambda: len(service().closed) == before + 5, 5, "the server saw 5 ends")
    assert once(p.port, "/refuse").status == 403
    p.stop()


# ---- byte by byte ------------------------------------------------------------------------------------------------------

UPGRADE = b"GET /raw HTTP/1.1\r\nHost: t\r\nConnection: Upgrade\r\nUpgrade: %s\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


def receive(s, enough):
    data = b""
    while enough not in data:
        got = s.recv(65536)
        assert got, "closed after %r" % data[-80:]
        data += got
    return data


@case
def bytes_right_behind_the_heads():
    """A client that does not wait for 101, a server that speaks in the same packet, and each side's end by itself."""
    def tunnel(request):
        request.send(SWITCH + b"first words\n")
        while True:
            data = request.recv()
            if not data:  # the client has finished; the server has not
                request.send(b"last words\n")
                return False
            request.send(data.upper())
    up = Upstream(tunnel)
    p = Proxy(up.port)
    s = dial(p.port, SECONDS)
    s.sendall(UPGRADE % b"websocket" + b"early\n")
    data = receive(s, b"EARLY\n")
    head, body = data.split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.1 101 ") and b"\r\nupgrade: websocket" in head.lower() and body == b"first words\nEARLY\n", data
    s.sendall(b"\x00\r\n\r\nGET / HTTP/1.1\r\n\r\n")  # not ours to understand
    receive(s, b"\x00\r\n\r\nGET / HTTP/1.1\r\n\r\n")
    s.shutdown(socket.SHUT_WR)
    assert read_all(s) == b"last words\n"
    s.close()
    p.stop()
    up.close()


@case
def ordinary_reply_keeps_the_connection():
    up = Upstream(lambda r: r.reply(b"plain"))
    p = Proxy(up.port)
    s = dial(p.port, SECONDS)
    for _ in range(3):
        s.sendall(UPGRADE % b"websocket")
        data = receive(s, b"plain")
        assert data.startswith(b"HTTP/1.1 200 ") and b"upgrade:" not in data.lower(), data
    s.sendall(b"GET /after HTTP/1.1\r\nHost: t\r\n\r\n")
    assert receive(s, b"plain").startswith(b"HTTP/1.1 200 ")
    s.close()
    p.stop()
    up.close()


@case
def only_what_may_be_tunnelled():
    """h2c goes on as plain HTTP/1.1; a 101 that nobody asked for is no reply."""
    up = Upstream(lambda r: r.reply(b"plain") if r.path != "/unasked" else r.send(SWITCH))
    p = Proxy(up.port)
    s = dial(p.port, SECONDS)
    s.sendall(b"GET /h2c HTTP/1.1\r\nHost: t\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n")
    data = receive(s, b"plain")
    assert data.startswith(b"HTTP/1.1 200 ") and b"upgrade:" not in data.lower(), data
    s.sendall(b"GET /name HTTP/1.1\r\nHost: t\r\nUpgrade: websocket\r\n\r\n")  # without Connection: Upgrade it is nothing
    receive(s, b"plain")
    s.close()
    for head in up.heads:
        assert "upgrade" not in head.lower() and "http2-settings" not in head.lower(), "the upstream saw %r" % head
    assert once(p.port, "/unasked").status == 502
    p.stop()
    up.close()


# ---- Node ------------------------------------------------------------------------------------------------------------

def node_environment():
    need("node")
    places = [os.environ.get("NODE_PATH", ""), os.path.join(BUILD, "npm", "node_modules"), "/usr/share/nodejs"]
    environment = dict(os.environ, NODE_PATH=":".join(place for place in places if place))
    if subprocess.run([tool("node"), "-e", "require('ws')"], env=environment, capture_output=True, timeout=20).returncode:
        raise Skip("not installed: ws for Node (npm install --prefix build/npm ws)")
    return environment


@case
def node_on_both_sides():
    environment = node_environment()
    script = os.path.join(ROOT, "tests", "peers", "websocket.js")
    server = spawn([tool("node"), script, "serve"], env=environment, stdout=subprocess.PIPE, text=True)
    p = Proxy(int(first_line(server)))
    done = subprocess.run([tool("node"), script, "ask", "ws://127.0.0.1:%d/" % p.port], env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done
    p.stop()


if __name__ == "__main__":
    sys.exit(main())

"""A Runtime API server that answers as AWS's own emulator does (aws-lambda-runtime-interface-emulator: states, texts, framing).
Not a test: the Makefile leaves it out.

    api = RuntimeApi()                          on a port of its own; .address is what AWS_LAMBDA_RUNTIME_API wants
    answer = api.ask(b"{}")                     one invocation, waited for: .kind ("response" or "error"), .fields, .body
    api.spoil("response", Spoil("untaken"))     the next call of that kind goes wrong

All that came is kept: .calls in order, .refused with their status, .problems (whatever no server should be sent)."""
import collections
import json
import re
import select
import socket
import threading
import time
import uuid

from common import reset

VERSION = "/2018-06-01"
LIMIT = 6 * 1024 * 1024 + 100
ARN = "arn:aws:lambda:eu-central-1:123456789012:function:orders"
REASONS = {200: "OK", 202: "Accepted", 400: "Bad Request", 403: "Forbidden", 404: "Not Found", 405: "Method Not Allowed",
           413: "Request Entity Too Large", 500: "Internal Server Error"}
TYPE = re.compile(r"(Runtime|Function)\.[A-Z][a-zA-Z]+")  # of an error; anything else is shown as Unknown


class Gone(Exception):
    """The client hung up, or the server is stopped."""


class Call:
    """One request as it came. pieces: of a chunked body, each with its time; whole: False = the connection ended in its middle."""

    def __init__(self, connection, head):
        self.connection, self.head, self.at = connection, head, time.monotonic()
        lines = head.decode("latin-1").split("\r\n")
        self.line = lines[0]
        self.method, self.path, self.version = (lines[0].split(" ") + ["", "", ""])[:3]
        self.pairs = [tuple(part.strip() for part in line.partition(":")[::2]) for line in lines[1:]]
        self.fields = {name.lower(): value for name, value in self.pairs}
        self.body, self.pieces, self.trailers, self.whole, self.status = b"", [], {}, True, 0
        found = re.fullmatch(VERSION + r"/runtime/(?:invocation/(next)|(init)/error|invocation/([^/]+)/(response|error))", self.path)
        self.kind, self.id = (found.group(1) or found.group(2) or found.group(4), found.group(3)) if found else (None, None)

    @property
    def type(self):
        return self.fields.get("lambda-runtime-function-error-type")

    def json(self):
        return json.loads(self.body)

    def __repr__(self):
        return "%s %s %r %r" % (self.line, self.status, self.fields, self.body[:200])


class Invocation:
    def __init__(self, body, headers):
        self.body, self.headers = body, headers
        self.id = dict((name.lower(), value) for name, value in headers).get("lambda-runtime-aws-request-id", "")
        self.given, self.answer, self.over = 0, None, threading.Event()  # given: how often it was handed out

    def wait(self, seconds=8):
        assert self.over.wait(seconds), "no answer to %s in %s s" % (self.id, seconds)
        return self.answer

    @property
    def seconds(self):
        """From its first delivery to its answer."""
        return self.answer.at - self.began


class Spoil:
    """What goes wrong with one call. where: "untaken" (read, not acted on), "taken" (acted on, no answer), "head" and "body" (half of
    that part of the answer sent), "after" (the whole answer, no word of closing), each with a close, or with a RST; "instead": these
    bytes are the answer, the call is acted on, and the connection stays open or not; "early": these bytes, then a close or a RST, when
    only the head was read, and the invocation is over."""

    def __init__(self, where, rst=False, data=b"", keep=False):
        self.where, self.rst, self.data, self.keep = where, rst, data, keep


def status(code, body="", fields=""):
    """An answer to put in the place of the right one."""
    data = body.encode() if isinstance(body, str) else body
    return Spoil("instead", data=reply(code, data, fields), keep=True)


def reply(code, body, fields="", framing="length"):
    """framing: length, chunked in one chunk (as Go does with all over 2 KiB), pieces of 4,001, closed."""
    head = "HTTP/1.1 %d %s\r\n%sDate: %s\r\n" % (code, REASONS.get(code, "Whatever"), fields, time.strftime("%a, %d %b %Y %H:%M:%S GMT",
                                                                                                       time.gmtime()))
    if framing == "closed":
        return (head + "Connection: close\r\n\r\n").encode() + body
    if framing == "length":
        return (head + "Content-Length: %d\r\n\r\n" % len(body)).encode() + body
    step = max(len(body), 1) if framing == "chunked" else 4001
    pieces = [body[i:i + step] for i in range(0, len(body), step)]
    return (head + "Transfer-Encoding: chunked\r\n\r\n").encode() + b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + b"0\r\n\r\n"


def said(kind, message):
    return json.dumps({"errorMessage": message, "errorType": kind}, separators=(",", ":")) + "\n"


class RuntimeApi:
    def __init__(self, concurrency=1, limit=LIMIT, framing=None, port=0):
        self.concurrency, self.limit, self.framing = concurrency, limit, framing  # framing: of events; None = as Go does
        self.calls, self.refused, self.problems, self.spoils = [], [], [], collections.defaultdict(collections.deque)
        self.queue, self.running, self.answered, self.state = collections.deque(), {}, set(), "Started"
        self.waiting, self.most_waiting, self.connections, self.init_error = 0, 0, 0, None
        self.changed = threading.Condition()
        self.open, self.closed = set(), False
        self.server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.server.bind(("127.0.0.1", port))
        self.server.listen(128)
        self.port = self.server.getsockname()[1]
        self.address = "127.0.0.1:%d" % self.port
        threading.Thread(target=self.accept, daemon=True).start()

    # ---- for tests ----

    def invoke(self, body=b"{}", deadline=60.0, deadline_ms=None, request_id=None, trace=None, arn=ARN, kind="application/json",
               headers=(), **more):
        """Queues an event. deadline: seconds from now, None = not told; headers: more pairs; client_context and such by name. A
        request_id of False leaves it out."""
        if not isinstance(body, (bytes, str)):
            body = json.dumps(body)
        body = body.encode() if isinstance(body, str) else body
        if deadline_ms is None and deadline is not None:
            deadline_ms = int((time.time() + deadline) * 1000)
        pairs = [("Content-Type", kind), ("Lambda-Runtime-Aws-Request-Id", str(uuid.uuid4()) if request_id is None else request_id),
                 ("Lambda-Runtime-Deadline-Ms", deadline_ms), ("Lambda-Runtime-Invoked-Function-Arn", arn), ("Lambda-Runtime-Trace-Id", trace)]
        pairs += [("Lambda-Runtime-" + name.title().replace("_", "-"), value) for name, value in more.items()]
        invocation = Invocation(body, [(name, str(value)) for name, value in pairs if value not in (None, False)] + list(headers))
        with self.changed:
            self.queue.append(invocation)
            self.changed.notify_all()
        return invocation

    def ask(self, body=b"{}", seconds=8, **more):
        return self.invoke(body, **more).wait(seconds)

    def spoil(self, kind, *spoils):
        """The next calls of this kind, in order; None = that one is answered rightly. A function (api, socket, call) answers by itself
        and says whether the connection stays."""
        self.spoils[kind].extend(spoils)

    def count(self, kind=None, whole=True):
        with self.changed:
            return sum((kind is None or call.kind == kind) and (call.whole or not whole) for call in self.calls)

    def idle(self):
        """How many calls of next wait for an event."""
        with self.changed:
            return self.waiting

    def stop(self):
        with self.changed:
            self.closed = True
            self.changed.notify_all()
            sockets = list(self.open)
        try:
            self.server.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.server.close()
        for sock in sockets:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    # ---- connections ----

    def accept(self):
        while True:
            try:
                sock, _ = self.server.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.changed:
                self.open.add(sock)
                number = self.connections = self.connections + 1
            threading.Thread(target=self.serve, args=(sock, number), daemon=True).start()

    def serve(self, sock, number):
        rest, keep = bytearray(), True
        try:
            while keep:
                call = self.read(sock, rest, number)
                keep = self.answer(sock, call)
        except (OSError, Gone, EOFError):
            pass  # hung up on, or stopped: what such a test is about
        with self.changed:
            self.open.discard(sock)
        sock.close()

    @staticmethod
    def more(sock, rest):
        data = sock.recv(1 << 20)
        if not data:
            raise EOFError
        rest += data

    def read(self, sock, rest, number):
        while b"\r\n\r\n" not in rest:
            self.more(sock, rest)
        end = rest.index(b"\r\n\r\n")
        call = Call(number, bytes(rest[:end]))
        del rest[:end + 4]
        with self.changed:
            self.calls.append(call)
        self.look(call)
        if self.spoils[call.kind] and getattr(self.spoils[call.kind][0], "where", "") == "early":
            self.early(sock, call)
        try:
            self.read_body(sock, rest, call)
        except (EOFError, OSError):
            call.whole = False
            with self.changed:
                self.changed.notify_all()
            raise
        call.at = time.monotonic()
        if rest:
            self.problem(call, "something behind the request: %r" % bytes(rest[:40]))
        return call

    def early(self, sock, call):
        spoil = self.spoils[call.kind].popleft()
        call.whole = False
        self.take(call)
        sock.sendall(spoil.data)
        self.hang_up(sock, spoil)
        raise EOFError

    def read_body(self, sock, rest, call):
        def line():
            while b"\r\n" not in rest:
                self.more(sock, rest)
            end = rest.index(b"\r\n")
            text = bytes(rest[:end])
            del rest[:end + 2]
            return text
        if "transfer-encoding" not in call.fields:
            length = int(call.fields.get("content-length", 0))
            while len(rest) < length:
                self.more(sock, rest)
            call.body = bytes(rest[:length])
            del rest[:length]
            return
        while True:
            size = line()
            if not re.fullmatch(rb"[0-9a-fA-F]+", size):
                self.problem(call, "chunk size %r" % size)
                raise EOFError
            size = int(size, 16)
            if not size:
                break
            while len(rest) < size + 2:
                self.more(sock, rest)
            if rest[size:size + 2] != b"\r\n":
                self.problem(call, "no CRLF behind a chunk")
            with self.changed:
                call.pieces.append((time.monotonic(), bytes(rest[:size])))
                self.changed.notify_all()
            del rest[:size + 2]
        call.body = b"".join(piece for _, piece in call.pieces)
        while True:
            field = line().decode("latin-1")
            if not field:
                return
            name, _, value = field.partition(":")
            call.trailers[name.lower()] = value.strip()

    def problem(self, call, what):
        with self.changed:
            self.problems.append("%s: %s" % (call.line, what))

    def look(self, call):
        """Notes what is not clean HTTP/1.1."""
        names = [name.lower() for name, _ in call.pairs]
        for name, value in call.pairs:
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or re.search(r"[\x00-\x08\x0a-\x1f\x7f]", value):
                self.problem(call, "bad field %r: %r" % (name, value))
        for name in set(names):
            if names.count(name) > 1:
                self.problem(call, "%s twice" % name)
        framing = [name for name in ("content-length", "transfer-encoding") if name in names]
        if call.version != "HTTP/1.1" or not call.head.decode("latin-1").isascii():
            self.problem(call, "not HTTP/1.1")
        if call.fields.get("host") != self.address:
            self.problem(call, "Host: %s" % call.fields.get("host"))
        if len(framing) != (call.method == "POST"):
            self.problem(call, "framing %s" % framing)
        if call.fields.get("transfer-encoding", "chunked") != "chunked" or not call.fields.get("content-length", "0").isdigit():
            self.problem(call, "framing %s" % call.fields)
        if "expect" in names:
            self.problem(call, "Expect")

    # ---- answers ----

    def take_spoil(self, call):
        with self.changed:
            return self.spoils[call.kind].popleft() if self.spoils[call.kind] else None

    def answer(self, sock, call):
        spoil = self.take_spoil(call)
        if callable(spoil):
            return spoil(self, sock, call)
        if spoil and spoil.where == "untaken":
            return self.hang_up(sock, spoil)
        data, keep = self.act(sock, call)
        if call.kind == "next" and not spoil:
            spoil = self.take_spoil(call)  # one that came while the call waited
        if callable(spoil):
            return spoil(self, sock, call)
        if spoil and spoil.where == "untaken":
            return self.hang_up(sock, spoil)
        where = spoil.where if spoil else None
        call.status = int(data[9:12])
        if call.status >= 300:
            with self.changed:
                self.refused.append(call)
        end = data.index(b"\r\n\r\n") + 4
        if where == "instead":
            data, keep = spoil.data, spoil.keep
        elif where:
            data = data[:{"taken": 0, "head": end // 2, "body": end + (len(data) - end) // 2, "after": len(data)}[where]]
        sock.sendall(data)
        if where in ("head", "body", "after", "taken"):
            return self.hang_up(sock, spoil)
        return keep

    @staticmethod
    def hang_up(sock, spoil):
        if spoil.rst:
            reset(sock)
        return False

    def act(self, sock, call):
        """What the call does, as (answer, keep)."""
        kind = "Content-Type: application/json\r\n"
        if not call.kind:
            return reply(404, b"404 page not found\n", "Content-Type: text/plain; charset=utf-8\r\n"), True
        if call.method != ("GET" if call.kind == "next" else "POST"):
            return reply(405, b"", "Allow: %s\r\n" % ("GET" if call.kind == "next" else "POST")), True
        if call.kind == "next":
            return self.next(sock), self.framing != "closed"
        code, text = self.init(call) if call.kind == "init" else self.take(call)
        return reply(code, (text or '{"status":"OK"}\n').encode(), kind), True

    def refuse(self, state, wanted):
        return 403, said("InvalidStateTransition", "State transition from %s to %s failed for runtime. Error: State transition is not allowed"
                         % (state, wanted))

    def init(self, call):
        with self.changed:
            if self.state != "Started":
                return self.refuse(self.state, "InitError")
            self.state, self.init_error = "InitError", call
        return 202, None

    def take(self, call):
        """A response or an error, for the invocation in its path."""
        with self.changed:
            invocation = self.running.get(call.id)
            if not invocation and call.id in self.answered:
                return self.refuse("ResponseSent", "Invocation" + call.kind.title())
            if not invocation:
                return 400, said("InvalidRequestID", "Invalid request ID")
            mode = call.fields.get("lambda-runtime-function-response-mode", "streaming")
            too_large = call.kind == "response" and len(call.body) > self.limit and not call.pieces
            del self.running[call.id]
            if self.concurrency == 1:
                self.answered.clear()  # only the current one is known
            self.answered.add(call.id)
            self.state = "ResponseSent"
            invocation.answer = call
            self.changed.notify_all()
        invocation.over.set()
        if mode != "streaming":
            return 400, said("InvalidFunctionResponseMode", "Invalid function response mode")
        if too_large:
            return 413, said("RequestEntityTooLarge", "Exceeded maximum allowed payload size (%d bytes)." % self.limit)
        return 202, None

    def next(self, sock):
        """Waits for an event. The one that was handed out and not answered comes again."""
        with self.changed:
            self.state = "Ready"
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
            self.changed.notify_all()
            try:
                while not (self.queue or (self.concurrency == 1 and self.running)):
                    self.changed.wait(0.05)
                    if self.closed or (select.select([sock], [], [], 0)[0] and not sock.recv(1, socket.MSG_PEEK)):
                        raise Gone
                if self.concurrency == 1 and self.running:
                    invocation = next(iter(self.running.values()))
                else:
                    invocation = self.queue.popleft()
                    invocation.began = time.monotonic()
                    self.running[invocation.id] = invocation
                invocation.given += 1
                self.state = "Running"
            finally:
                self.waiting -= 1
        framing = self.framing or ("chunked" if len(invocation.body) > 2048 else "length")
        return reply(200, invocation.body, "".join("%s: %s\r\n" % pair for pair in invocation.headers), framing)

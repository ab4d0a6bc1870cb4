#!/usr/bin/env python3
"""The Lambda wrapper on the wire: examples/lambda.c and lambda_function.c under a Runtime API server that answers as AWS's
emulator does (runtime_api.py), and under @vercel/fun of npm.

    tests/peers/lambda.py [--filter TEXT] [--build DIR] [-v]

The static programs for x86-64 (musl-gcc) and arm64 (gcc-aarch64-linux-gnu, qemu-user-static) go through many of the same cases.
Needs node with @vercel/fun (npm install --prefix build/npm @vercel/fun) for a part of them."""
import base64
import functools
import glob
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import aws
import common
from common import CASES, ROOT, Skip, case, compiled, first_line, folder, free_port, in_threads, main, need, note, spawn, stop, tool, until
from runtime_api import ARN, LIMIT, RuntimeApi, Spoil, status

ON = {"enabled": True, "expiresAt": "never"}
FAIL = {**ON, "errorRate": 100}
OFF = {"enabled": False}
ALL = ["http", "direct", "async", "sqs", "stream"]
PARAMETER, TOKEN = "/team/stage/chaos", "session-token"
TTL = 100
VERSION = re.search(r'define CHAOS_VERSION +"(.*)"', open(ROOT + "/chaos.h").read()).group(1)
GET = json.dumps({"version": "2.0", "rawPath": "/orders", "requestContext": {"http": {"method": "GET"}}})
REFUSED = "Runtime API"  # what the last words of a function say


# ---- programs --------------------------------------------------------------------------------------------------------

@functools.lru_cache(None)
def made(target):
    """A program in build/, made if it is older than its parts."""
    path = os.path.join(common.BUILD, target)
    if os.path.dirname(os.path.abspath(path)).startswith(os.path.join(ROOT, "build")):
        names = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
        done = subprocess.run(["make", "-s", "build/" + target], cwd=ROOT, env=names, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, "make build/%s: %s" % (target, done.stderr[-500:])
    return path


MAKING = threading.Lock()


def program(name):
    """native: as make builds it; static, arm64: as they go to Lambda; function: lambda_function.c."""
    with MAKING:
        return program_of(name)


@functools.lru_cache(None)
def program_of(name):
    if name == "native":
        return [made("chaos-lambda")]
    if name == "static":
        need("musl-gcc")
        return [made("lambda/x86_64/bootstrap")]
    if name == "arm64":
        need("aarch64-linux-gnu-gcc", "qemu-aarch64-static")
        return [tool("qemu-aarch64-static"), made("lambda/arm64/bootstrap")]
    return [compiled("lambda_" + name)]


def on(*names):
    """A case for each of these programs."""
    def add(function):
        def make(name):
            def run():
                function(name)
            run.__name__ = "%s_%s" % (function.__name__, name)
            CASES.append(run)
        for name in names:
            make(name)
        return function
    return add


class Function:
    """A function in an environment like Lambda's, and the API that gives it work. At the end of a `with` it must still be there, and
    the API must have had nothing to refuse; .odd = that is what the case is about."""

    def __init__(self, name="native", config=None, api=None, address=None, under=(), **variables):
        self.api = api or RuntimeApi()
        self.odd = False
        where = tempfile.mkdtemp(prefix="lambda-", dir=folder())
        self.out, self.err = where + "/stdout", where + "/stderr"
        environment = {
            "AWS_LAMBDA_RUNTIME_API": address or self.api.address, "_HANDLER": "x", "LAMBDA_TASK_ROOT": where, "AWS_REGION": "eu-central-1",
            "AWS_LAMBDA_FUNCTION_NAME": "orders", "AWS_LAMBDA_LOG_STREAM_NAME": "2026/03/12/[$LATEST]0123", "AWS_SESSION_TOKEN": TOKEN,
            "PATH": "/nonexistent", "http_proxy": "http://127.0.0.1:1", "HTTP_PROXY": "http://127.0.0.1:1"}
        if config is not None:
            environment["CHAOS_CONFIG"] = config if isinstance(config, str) else json.dumps(config)
        environment.update(variables)
        with open(self.out, "wb") as out, open(self.err, "wb") as err:
            self.began = time.monotonic()
            self.process = spawn([*under, *program(name)], env={k: v for k, v in environment.items() if v is not None}, cwd=where, stdout=out,
                                 stderr=err)
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, failed, *rest):
        gone = self.process.poll()
        stop(self.process)
        self.api.stop()
        if failed:
            return
        assert not self.api.problems, self.api.problems[:3]
        assert self.odd or gone is None, "it ended with %s: %s" % (gone, self.said())
        assert self.odd or not self.api.refused, self.api.refused[:3]

    def ask(self, *args, **more):
        return self.api.ask(*args, **more)

    def text(self, name):
        with open(name, encoding="utf-8") as f:
            return f.read()

    def said(self):
        """What stderr has besides log lines."""
        return "".join(line for line in self.text(self.err).splitlines(True) if not line.startswith("{"))

    def log(self, action=None):
        lines = [json.loads(line) for line in self.text(self.err).splitlines() if line.startswith("{")]
        return [line for line in lines if action in (None, line["action"])]

    def end(self, seconds=5):
        """Its exit code, when it ends by itself."""
        self.odd = True
        return self.process.wait(seconds)

    def lost(self, code=1):
        """The function must end because of the API, and say so in one line."""
        got = self.end()
        assert got == code, "exit code %d: %s" % (got, self.said())
        lines = [line for line in self.said().splitlines() if REFUSED in line]
        assert len(lines) == 1, "last words: %r" % self.said()
        return lines[0]

    def report(self):
        """Stops the API, so that the function (lambda_function.c) ends and tells its counters."""
        until(self.api.idle, 5, "it waits for an event")
        self.api.stop()
        assert self.end() == 1
        return json.loads(self.text(self.out).splitlines()[-1])


def once(api, invocation, kind=None, seconds=8):
    """The answer; there must be one only, then the function must wait for work."""
    answer = invocation.wait(seconds)
    until(lambda: api.count("next") and api.idle(), 5, "it asks for the next event")
    assert kind in (None, answer.kind), answer
    posts = [call for call in api.calls if call.id == invocation.id]
    assert len(posts) == 1, "answered %d times: %r" % (len(posts), posts)
    return answer


# ---- the Runtime API, byte for byte ----------------------------------------------------------------------------------

@on("native", "static", "arm64")
def every_byte_of_its_calls(name):
    with Function(name) as f:
        first = f.api.invoke(b'{"a":1}')
        once(f.api, first)
        second = f.api.invoke(b'{"fail": true}')
        once(f.api, second)
        common_part = "Host: %s\r\nUser-Agent: chaos-h/%s" % (f.api.address, VERSION)
        path = "/2018-06-01/runtime/invocation/"
        asked = "GET %snext HTTP/1.1\r\n%s" % (path, common_part)
        response = "POST %s%s/response HTTP/1.1\r\n%s\r\nContent-Type: application/json\r\nContent-Length: 7" % (path, first.id, common_part)
        body = {"errorMessage": "the event asked for a failure", "errorType": "Function.Asked", "stackTrace": []}
        error = ("POST %s%s/error HTTP/1.1\r\n%s\r\nContent-Type: application/json\r\nLambda-Runtime-Function-Error-Type: Function.Asked\r\n"
                 "Content-Length: %d" % (path, second.id, common_part, len(second.answer.body)))
        got = [call.head.decode() for call in f.api.calls]
        for i, want in enumerate((asked, response, asked, error, asked)):
            assert got[i] == want, "call %d:\n%s\nnot\n%s" % (i, got[i], want)
        assert first.answer.body == b'{"a":1}' and second.answer.json() == body, second.answer
        assert f.api.connections == 1


@on("native", "arm64")
def one_connection_for_all(name):
    with Function(name) as f:
        for i in range(200):
            assert f.ask(b'{"n":%d}' % i).body == b'{"n":%d}' % i
        assert f.api.connections == 1 and f.api.most_waiting == 1, f.api.connections
        assert f.log() == f.log("open"), f.log()


@on("native", "static", "arm64")
def payloads_of_any_kind(name):
    bodies = [b"", b"\0", bytes(range(256)) * 3, "caf\u00e9 \U0001f600".encode(), b"\r\n\r\n", b"x" * 2047, b"x" * 2049, b"y" * 65535,
              os.urandom(65537), os.urandom(1 << 20)]
    for framing in (None, "length", "chunked", "pieces", "closed"):
        with Function(name, api=RuntimeApi(framing=framing)) as f:
            for body in bodies:
                answer = once(f.api, f.api.invoke(body), "response")
                assert answer.body == body, "%s: %d bytes became %d" % (framing, len(body), len(answer.body))


@on("native", "arm64")
def heads_in_any_form(name):
    """Names in lower case, no space behind the colon, many fields, byte by byte."""
    def slow(api, sock, call):
        data = api.next(sock).replace(b"Lambda-Runtime-Aws-Request-Id: ", b"lambda-runtime-aws-request-id:")
        for i in range(len(data)):
            sock.sendall(data[i:i + 1])
        return True
    with Function(name) as f:
        f.api.spoil("next", slow)
        more = [("X-%d" % i, "v" * 20) for i in range(40)]
        answer = once(f.api, f.api.invoke(b'{"slow":1}', trace="Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700;Parent=9a9197af755a6419;Sampled=1",
                                         headers=more, client_context=base64.b64encode(b"c" * 2600).decode()))
        assert answer.body == b'{"slow":1}'
    for fields in ("Connection: close\r\n", "Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n"):
        with Function(name) as f:
            f.api.spoil("response", status(202, '{"status":"OK"}', fields))
            once(f.api, f.api.invoke(b"1"))
            once(f.api, f.api.invoke(b"2"))
            assert f.api.connections == (2 if "close" in fields else 1)


@on("native", "arm64")
def the_largest_event_and_reply(name):
    with Function(name) as f:
        body = os.urandom(LIMIT)
        assert once(f.api, f.api.invoke(body), "response", 20).body == body
        too_much = f.api.invoke(os.urandom(LIMIT + 1))
        answer = once(f.api, too_much, "error", 20)
        assert answer.type == "Function.ResponseSizeTooLarge" and answer.json()["errorType"] == answer.type, answer
        assert once(f.api, f.api.invoke(b"and on"), "response").body == b"and on"


@case
def an_event_that_is_too_large():
    with Function() as f:
        huge = f.api.invoke(b"z" * (7 << 20))
        assert "too large" in f.lost(), f.said()
        assert not huge.answer and f.api.count("response", False) == 0
    assert f.api.connections <= 4, f.api.connections


@case
def every_field_of_an_event():
    trace = "Root=1-5bef4de7-ad49b0e87f6ef6c87fc2e700;Parent=9a9197af755a6419;Sampled=1"
    context, identity = '{"client":{"app_title":"a \\"b\\""}}', '{"cognitoIdentityId":"x","cognitoIdentityPoolId":"y"}'
    with Function("function") as f:
        full = f.api.invoke(b'{"a":1}', trace=trace, client_context=context, cognito_identity=identity, kind="application/json",
                            aws_tenant_id="t", deadline_ms=1900000000123)
        got = once(f.api, full, "response").json()
        want = {"request_id": full.id, "trace_id": trace, "function_arn": ARN, "client_context": context, "cognito_identity": identity,
                "content_type": "application/json", "variable": trace, "deadline_ms": 1900000000123, "len": 7, "calls": 1}
        assert got == want, got
        bare = f.api.invoke(b"", deadline=None, arn=None, kind=None, request_id="8-8")
        got = once(f.api, bare, "response").json()
        want = dict.fromkeys(want, "")
        want.update(request_id="8-8", deadline_ms=0, len=0, calls=2, variable=got["variable"])
        assert got == want, got
        assert got["variable"] in ("", "(none)"), "the trace id of the event before: " + got["variable"]
        long = "c" * 3583
        assert once(f.api, f.api.invoke(b"", client_context=long, trace="T2")).json()["variable"] == "T2"
        odd = f.api.invoke(b"", deadline_ms="soon", kind="text/x; a=\"b\"")
        got = once(f.api, odd).json()
        assert got["deadline_ms"] == 0 and got["content_type"] == 'text/x; a="b"', got


@case
def answers_of_handlers():
    with Function("function") as f:
        for command, kind, error, message in (
                ("empty", "response", None, None), ("size 0", "response", None, None), ("return", "error", "Function.HandlerFailed", None),
                ("fail Function.Bad really", "error", "Function.Bad", "really"), ("fail Runtime.Worse x", "error", "Runtime.Worse", "x"),
                ("fail bad x", "error", "Function.Unknown", "x"), ("fail Function.lower x", "error", "Function.Unknown", "x"),
                ("fail Function.X9 x", "error", "Function.Unknown", "x"), ("fail Other.Word x", "error", "Function.Unknown", "x"),
                ("fail Function. x", "error", "Function.Unknown", "x"), ("say 100", "error", "Function.Quoted", '"' * 100),
                ("pieces 4000000", "response", None, None), ("pieces %d" % LIMIT, "response", None, None),
                ("pieces %d" % (LIMIT + 1), "error", "Function.ResponseSizeTooLarge", None)):
            answer = once(f.api, f.api.invoke(b"do:" + command.encode()), kind)
            length = int(command.split()[1]) if command.split()[0] in ("size", "pieces") else 0
            if kind == "response":
                assert answer.body == b"x" * length, "%s: %d bytes" % (command, len(answer.body))
                continue
            told = answer.json()
            assert sorted(told) == ["errorMessage", "errorType", "stackTrace"] and told["stackTrace"] == [], told
            assert answer.type == told["errorType"] == error, "%s: %s, %s" % (command, answer.type, told)
            assert message is None or told["errorMessage"] == message, told
            assert answer.fields["content-type"] == "application/json"
        crash = f.api.invoke(b"do:exit")
        assert f.end() == 3 and not crash.answer


@case
def a_reply_that_is_streamed():
    gate = os.path.join(folder(), "gate")
    with Function("function", GATE=gate) as f:
        for command, kind, lines in (("stream", "text/plain", b"one\ntwo\n"), ("stream-fail", "text/plain", b"one\n"),
                                     ("prelude", "application/vnd.awslambda.http-integration-response", None)):
            invocation = f.api.invoke(b"do:" + command.encode())

            def call():
                return next((c for c in list(f.api.calls) if c.id == invocation.id), None)
            until(lambda: call() and b"one\n" in b"".join(piece for _, piece in call().pieces), 5, "the first line")
            assert not invocation.answer, "the end before the gate is open"
            open(gate, "w").close()
            answer = once(f.api, invocation, "response")
            os.unlink(gate)
            assert answer.fields["lambda-runtime-function-response-mode"] == "streaming", answer.fields
            assert answer.fields["transfer-encoding"] == "chunked" and answer.fields["content-type"] == kind, answer.fields
            if command == "prelude":
                prelude, gap, body = answer.body.partition(b"\0" * 8)
                assert gap and body == b"one\ntwo\n", answer.body
                assert json.loads(prelude) == {"statusCode": 201, "headers": {"X-A": "b"}, "cookies": ["c=d"]}
            else:
                assert answer.body == lines, answer.body
            if command != "stream-fail":
                assert not answer.trailers, answer.trailers
                continue
            assert sorted(answer.trailers) == ["lambda-runtime-function-error-body", "lambda-runtime-function-error-type"], answer.trailers
            assert answer.trailers["lambda-runtime-function-error-type"] == "Function.Torn"
            assert set(answer.fields["trailer"].lower().replace(" ", "").split(",")) == set(answer.trailers), answer.fields["trailer"]
            told = json.loads(base64.b64decode(answer.trailers["lambda-runtime-function-error-body"], validate=True))
            assert told == {"errorMessage": 'in the "middle"', "errorType": "Function.Torn", "stackTrace": []}, told
        assert f.api.connections == 1
        assert once(f.api, f.api.invoke(b"do:echo")).body == b"do:echo"


@on("static", "arm64")
def a_reply_that_is_streamed_by_the_example(name):
    with Function(name) as f:
        for _ in range(3):
            answer = once(f.api, f.api.invoke(b'{"stream": true}'), "response")
            assert answer.body == b"line 1\nline 2\nline 3\n" and answer.pieces and not answer.trailers, answer
        assert f.api.connections == 1


@on("function", "arm64")
def loops_in_parallel(name):
    """Managed Instances: several events at once, each answered once, under its own id."""
    api = RuntimeApi(concurrency=4)
    with Function(name, api=api, AWS_LAMBDA_MAX_CONCURRENCY="4") as f:
        until(lambda: api.idle() == 4, 5, "four calls of next at once")
        assert common.tasks(f.pid) >= 4
        if name == "arm64":
            for invocation, n in [(api.invoke(b'{"n":%d}' % n), n) for n in range(100)]:
                assert invocation.wait().body == b'{"n":%d}' % n
            return
        began = time.monotonic()
        naps = [api.invoke(b"do:nap 300", trace="T%d" % i) for i in range(4)]
        got = [nap.wait().json() for nap in naps]
        assert time.monotonic() - began < 1.1, "one after the other"
        for nap, told in zip(naps, got):
            assert told["request_id"] == nap.id and told["variable"] == "(none)", told
        many = [api.invoke(b"do:echo %d" % i) for i in range(200)]
        for i, invocation in enumerate(many):
            assert invocation.wait().body == b"do:echo %d" % i
        ids = [call.id for call in api.calls if call.id]
        assert len(ids) == len(set(ids)) == 204, len(ids)
        assert api.connections == 4 and api.most_waiting == 4


@case
def loops_in_parallel_end_together():
    """A loop that cannot go on ends the process, as one loop alone does; half a runtime would be a riddle."""
    for kind in ("response", "next"):
        api = RuntimeApi(concurrency=3)
        with Function("function", api=api, AWS_LAMBDA_MAX_CONCURRENCY="3", FUNCTION="empty") as f:
            until(lambda: api.idle() == 3, 5, "three calls of next at once")
            api.spoil(kind, status(500, '{"errorMessage":"x","errorType":"InternalServerError"}'))
            for _ in range(2):
                api.invoke(b"{}")
            assert f.end(3) == 1, f.said()
            assert "500" in f.said(), f.said()
    api = RuntimeApi(concurrency=2)
    with Function("function", api=api, AWS_LAMBDA_MAX_CONCURRENCY="2") as f:  # one that works may end its work
        until(lambda: api.idle() == 2, 5, "two calls of next at once")
        api.spoil("response", status(500))
        works, ends = api.invoke(b"do:nap 200"), api.invoke(b"do:empty")
        ends.wait()
        assert f.end(3) == 1 and "500" in f.said(), f.said()
        assert works.answer and works.answer.json()["request_id"] == works.id, "the answer of the other one is lost"


@case
def how_many_loops():
    for value, loops in (("", 1), ("0", 1), ("-3", 1), ("x", 1), ("1", 1), ("2", 2), ("64", 64)):
        api = RuntimeApi(concurrency=64)
        with Function(api=api, AWS_LAMBDA_MAX_CONCURRENCY=value) as f:
            until(lambda: api.idle() == loops, 5, "%s loops for %r" % (loops, value))
            assert common.tasks(f.pid) == loops
            assert api.ask(b"1").body == b"1"


@case
def an_init_that_fails():
    why = 'no "database"\nhere'
    for text in (why, "w" * 390, "", "\x01" * 150):
        with Function("function", INIT=text) as f:
            assert f.end() == 1
            assert [call.kind for call in f.api.calls] == ["init"], f.api.calls
            call = f.api.init_error
            assert call.type and re.fullmatch(r"(Function|Runtime)\.[A-Z][A-Za-z]+", call.type), call
            told = json.loads(call.body.decode("utf-8", "replace"))
            assert told == {"errorMessage": text, "errorType": call.type, "stackTrace": []}, call
            assert "init" in f.said() and (text != why or "database" in f.said()), f.said()
    with Function("function", INIT=why) as f:  # the API wants nothing to do with it
        f.api.spoil("init", status(403))
        assert f.end() == 1 and f.api.count() == 1
    with Function("function", INIT=why, address="127.0.0.1:%d" % free_port()) as f:
        assert f.end() == 1 and "init" in f.said(), f.said()


# ---- an API that refuses, breaks, or is not there --------------------------------------------------------------------

@case
def answers_that_refuse():
    """Logged with the id and the reason; then it goes on."""
    texts = {413: ("RequestEntityTooLarge", "Exceeded maximum allowed payload size (6291556 bytes)."), 403: ("InvalidStateTransition", "x"),
             400: ("InvalidRequestID", "Invalid request ID"), 404: (None, None), 502: (None, None), 409: ("", None)}
    with Function() as f:
        for n, (code, (kind, message)) in enumerate(texts.items(), 1):
            body = json.dumps({"errorMessage": message, "errorType": kind}) + "\n" if kind else "" if kind == "" else "not found\n"
            for event, call in ((b"1", "response"), (b'{"fail": true}', "error")):
                f.api.spoil(call, status(code, body))
                invocation = f.api.invoke(event)
                once(f.api, invocation, call)
                line = f.log("lambda")[-1]
                assert line["level"] == "warn" and invocation.id in json.dumps(line), line
                assert (kind or str(code)) in json.dumps(line), "%d without a word of it: %s" % (code, line)
            assert len(f.log("lambda")) == 2 * n, f.log("lambda")
        assert f.ask(b"and on").body == b"and on"
        assert f.api.connections == 1


@case
def a_reply_that_the_api_finds_too_large():
    """Refused before it is read, as AWS does: the connection ends in the middle of the body."""
    answer = status(413, '{"errorMessage":"Exceeded maximum allowed payload size (6291556 bytes).","errorType":"RequestEntityTooLarge"}\n').data
    with Function() as f:
        for rst in (False, True):
            f.api.spoil("response", Spoil("early", rst, answer))
            invocation = f.api.invoke(os.urandom(5 << 20))
            once(f.api, invocation)
            assert invocation.id in json.dumps(f.log("lambda")[-1]), f.log()
        assert once(f.api, f.api.invoke(b"and on")).body == b"and on"
    with Function("function") as f:  # the same in the middle of a stream
        f.api.spoil("response", Spoil("early", True, answer))
        once(f.api, f.api.invoke(b"do:stream"))
        assert f.log("lambda"), f.log()
        assert once(f.api, f.api.invoke(b"do:echo")).body == b"do:echo"


@on("native", "static", "arm64")
def an_answer_of_500_ends_it(name):
    text = '{"errorMessage":"Internal Server Error","errorType":"InternalServerError"}\n'
    for call, event in (("next", b"1"), ("response", b"1"), ("error", b'{"fail": true}'), ("response", b'{"stream": true}')):
        with Function(name) as f:
            f.api.spoil(call, status(500, text))
            f.api.invoke(event)
            assert "500" in f.lost(), f.said()
            assert f.api.count(call) == 1, f.api.calls


@on("native", "arm64")
def a_lost_connection_for_next(name):
    """Dialled anew, and the event that comes again is answered once."""
    for where in ("untaken", "taken", "head", "body", "after"):
        for rst in (False, True):
            with Function(name) as f:
                once(f.api, f.api.invoke(b"first"))
                f.api.spoil("next", Spoil(where, rst), Spoil(where, rst))
                invocation = f.api.invoke(b"x" * 5000)  # for the call that waits already
                answer = once(f.api, invocation, "response")
                assert answer.body == b"x" * 5000, "%s: %d bytes" % (where, len(answer.body))
                assert once(f.api, f.api.invoke(b"on"), "response").body == b"on"


@case
def a_connection_that_closes_while_idle():
    with Function() as f:
        for n in range(3):
            until(f.api.idle, 5, "it waits")
            for sock in list(f.api.open):
                sock.shutdown(socket.SHUT_RDWR)
            until(lambda: f.api.connections == n + 2 and f.api.idle(), 5, "it dials anew")
            assert once(f.api, f.api.invoke(b"%d" % n)).body == b"%d" % n


@case
def a_connection_that_closes_while_the_handler_works():
    """Seen before the answer is sent, which then goes over a new one: nothing is lost."""
    with Function("function") as f:
        for n, command in enumerate((b"do:nap 60", b"do:nap 60", b"do:nap-stream")):
            f.api.spoil("next", Spoil("after", n == 1))
            invocation = f.api.invoke(command)
            once(f.api, invocation, "response")
            assert invocation.given == 1 and not f.log("lambda"), f.log("lambda")
            assert f.api.connections == n + 2, f.api.connections


@on("native", "arm64")
def a_lost_connection_for_an_answer(name):
    """Never sent again: nobody knows whether it arrived."""
    for event, kind in ((b"1", "response"), (b'{"fail": true}', "error"), (b'{"stream": true}', "response")):
        for where in ("untaken", "taken", "head", "body", "after"):
            for rst in (False, True):
                with Function(name) as f:
                    f.api.spoil(kind, Spoil(where, rst))
                    invocation = f.api.invoke(event)
                    invocation.wait()
                    until(lambda: f.api.idle(), 5, "it asks for the next event")
                    kinds = [call.kind for call in f.api.calls]
                    # An answer that did not arrive makes the API hand out the event again: that is another run, not another try.
                    assert kinds == (["next", kind] * invocation.given) + ["next"], "%s: %s" % (where, kinds)
                    assert invocation.given == (2 if where == "untaken" else 1), invocation.given
                    assert len(f.log("lambda")) == (0 if where == "after" else 1), f.log()
                    assert where == "after" or invocation.id in json.dumps(f.log("lambda")) or event == b'{"stream": true}', f.log()
                    assert once(f.api, f.api.invoke(b"on")).body == b"on"


@case
def answers_that_are_not_http():
    garbage = [b"HTTP/1.1 banana\r\n\r\n", b"\0\1\2\3", b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
               b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nshort", b"\r\n\r\n",
               b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100000]
    for data in garbage:
        with Function() as f:  # always: it gives up
            f.api.spoil("next", *[Spoil("instead", data=data)] * 20)
            f.api.invoke(b"1")
            f.lost()
            assert f.api.count("next") <= 4 and f.api.count("response") == 0, f.api.calls
        with Function() as f:  # once, in the place of an answer's answer
            f.api.spoil("response", Spoil("instead", data=data))
            invocation = f.api.invoke(b"1")
            once(f.api, invocation)
            assert invocation.id in json.dumps(f.log("lambda")), f.log()
            assert once(f.api, f.api.invoke(b"2")).body == b"2"


@on("native", "arm64")
def an_event_without_a_request_id(name):
    for value in (False, "", "a b", "../x", "a\x01b"):
        with Function(name) as f:
            f.api.invoke(b"1", request_id=value)
            assert ("not valid HTTP" if value == "a\x01b" else "request id") in f.lost(), f.said()
            assert f.api.count("response", False) == f.api.count("error", False) == 0
    with Function(name) as f:  # as long as it may be, and beyond: never to a wrong id
        assert once(f.api, f.api.invoke(b"1", request_id="r" * 128)).body == b"1"
        f.odd = True
        f.api.invoke(b"1", request_id="r" * 200)
        until(lambda: f.process.poll() is not None or f.api.count("response") > 1, 5, "it ends or answers")
        assert not f.api.refused, "posted to another id: %s" % f.api.refused[0].line


@on("native", "static", "arm64")
def no_api_at_all(name):
    port = free_port()
    api = RuntimeApi()
    for address, words in ((None, "AWS_LAMBDA_RUNTIME_API"), ("", "AWS_LAMBDA_RUNTIME_API"), ("api.example.com:9001", "ADDR:PORT"), ("127.0.0.1:x", "ADDR:PORT"),
                           ("127.0.0.1:99999", "ADDR:PORT"), ("http://127.0.0.1:9001", "ADDR:PORT"), ("127.0.0.1:%d" % port, "refused")):
        f = Function(name, api=api, AWS_LAMBDA_RUNTIME_API=address)
        line = f.lost()
        assert words in line and (words != "refused" or str(port) in line), line
        assert time.monotonic() - f.began < 3
    api.stop()


@case
def an_api_that_says_no_to_next():
    for code in (400, 403, 404, 410, 503):
        with Function() as f:
            f.api.spoil("next", *[status(code, "what do you want\n")] * 20)
            f.api.invoke(b"1")
            line = f.lost()
            assert str(code) in line and "what do you want" in line, line
            assert f.api.count() == 1


@on("function", "arm64")
def an_api_that_dies(name):
    with Function(name) as f:  # while it waits
        once(f.api, f.api.invoke(b"do:echo"))
        f.api.stop()
        f.lost()
    if name == "arm64":
        return
    with Function(name) as f:  # while the handler works
        invocation = f.api.invoke(b"do:nap 200")
        until(lambda: invocation.given, 5, "it is handed out")
        f.api.stop()
        f.lost()
        assert invocation.id in json.dumps(f.log("lambda")), f.log()


# ---- faults ----------------------------------------------------------------------------------------------------------

def fixtures():
    found = {os.path.basename(path)[:-5]: json.load(open(path)) for path in sorted(glob.glob(ROOT + "/tests/vectors/lambda/*.json"))}
    assert len(found) > 40
    return found


def strictly(pairs):
    assert len(dict(pairs)) == len(pairs), "a member twice: %s" % pairs
    return dict(pairs)


def check_fixture(f, name, fixture, injected):
    event = json.dumps(fixture["event"], ensure_ascii=False)
    answer = f.ask(event)
    if injected:
        want = fixture["injected"]
        got = json.loads(answer.body, object_pairs_hook=strictly)
        assert (answer.kind, got) == (want["to"], want["body"]), "%s: %s %s" % (name, answer.kind, answer.body)
        assert answer.fields["content-type"] == "application/json"
        assert answer.type == ("Function.ChaosInjected" if want["to"] == "error" else None), "%s: %s" % (name, answer.type)
    else:
        assert answer.kind == "response" and answer.body == event.encode(), "%s: %s %s" % (name, answer.kind, answer.body)


@on("function", "static", "arm64")
def every_shape_of_event(name):
    """tests/vectors/lambda: by default, with each source named alone, with all, and off."""
    config = {**FAIL, "retryAfter": 7}
    programs = [(config, ["http", "direct"]), ({**config, "events": ALL}, ALL), ({**config, "events": []}, []), (OFF, [])]
    programs += [({**config, "events": [source]}, [source]) for source in ALL]
    for config, sources in programs:
        with Function(name, config, FUNCTION="echo") as f:
            for key, fixture in fixtures().items():
                if name == "function" or fixture["source"] in sources:  # the example has answers of its own
                    check_fixture(f, key, fixture, fixture["source"] in sources)
            lines = f.log("inject")
            assert len(lines) <= 50 and all(line["request_id"] for line in lines), lines[:3]


@case
def what_match_sees():
    """The method, path and headers of each shape that has them: a rule for each, that one hits and no other."""
    for key, fixture in fixtures().items():
        seen = {"methods": [fixture["method"]]} if "method" in fixture else {}
        if "path" in fixture:
            seen["paths"] = [fixture["path"]]
        if "headers" in fixture:
            seen["headers"] = fixture["headers"]
        if not seen:
            continue
        wrong = [{**seen, part: other} for part, other in (("methods", ["OTHER"]), ("paths", [seen.get("paths", ["/x"])[0] + "x"]),
                                                         ("headers", {"x-not-there": "*"}), ("headers", {"x-canary": "yes!"})) if part in seen]
        with Function("function", {**FAIL, "retryAfter": 7, "match": seen}, FUNCTION="echo") as f:
            check_fixture(f, key, fixture, True)
        rules = [{"name": "r%d" % i, "match": match, "errorRate": 100} for i, match in enumerate(wrong)]
        with Function("function", {**ON, "rules": rules}, FUNCTION="echo") as f:
            check_fixture(f, key, fixture, False)


def http_event(**members):
    event = {"version": "2.0", "rawPath": "/orders", "headers": {"user-agent": "x"}, "requestContext": {"stage": "$default", "http": {"method": "GET"}}}
    event.update(members)
    return event


@case
def what_match_sees_of_odd_requests():
    with Function("function", {**FAIL, "match": {"headers": {"x-team": "blue"}}}, FUNCTION="echo") as f:
        for headers, hit in (({"x-team": "blue"}, True), ({"X-Team": "blue"}, True), ({"X-TEAM": "blue"}, True), ({"x-team": "Blue"}, False),
                             ({"x-team": ["blue", "red"]}, True), ({"x-team": None}, False), ({}, False), (None, False), ("x-team", False),
                             ({"x-team": "bl\u0075e"}, True), ({"x-team": "x" * 9000}, False), ({"x-team": 5}, False)):
            kind = f.ask(http_event(headers=headers)).body
            assert (b"statusCode" in kind) == hit, "%s: %s" % (str(headers)[:60], kind[:80])
    with Function("function", {**FAIL, "match": {"paths": ["/a b/*"]}}, FUNCTION="echo") as f:
        for path, hit in (("/a%20b/c", True), ("/a b/c", True), ("/a b/c/d", False), ("/a b/", True), ("/ab/c", False)):
            assert (b"statusCode" in f.ask(http_event(rawPath=path)).body) == hit, path
    with Function("function", FAIL, FUNCTION="echo") as f:  # default `exclude`; paths that are too long always pass
        for path in ("/health", "/healthz", "/ping", "/livez", "/" + "a" * 1100, "/" + "a" * 5000, "/" + "%41" * 700):
            assert b"statusCode" not in f.ask(http_event(rawPath=path)).body, path[:20]
        assert b"statusCode" in f.ask(http_event(rawPath="/" + "a" * 1000)).body
        agent = f.ask(http_event(headers={"User-Agent": "Amazon-Route53-Health-Check-Service (ref x)"}))
        assert b"statusCode" not in agent.body


@case
def odd_events():
    """Not JSON, or only just: never a wrong guess that fails an event which `events` does not name."""
    queue = {"eventSource": "aws:sqs", "body": "@"}
    deep = "[" * 80 + "]" * 80
    with Function("function", FAIL, FUNCTION="echo") as f:
        for text in (json.dumps({"Records": [queue]}).replace('"@"', '"\\ud83d"'), json.dumps({"Records": [queue]}).replace('"@"', deep),
                     '{"detail-type":"x","detail":{"a":%s}}' % deep, '{"detail":{"a":"\\ud800"},"detail-type":"x"}',
                     '{"RequestType":"Create","ResponseURL":"https://x","ResourceProperties":{"a":%s}}' % deep,
                     '{"ResourceProperties":{"a":"\\udfff"},"ResponseURL":"https://x"}'):
            answer = f.ask(text)
            assert answer.kind == "response" and answer.body == text.encode(), "%s: %s" % (text[:60], answer)
        for text in ("", "{", "plain", "\xff", '{"a":1', "{} {}", "[1,2", "nul", '{"a":1}x', " ", "\0"):
            answer = f.ask(text.encode("latin-1"))
            assert answer.kind == "error" or answer.body == text.encode("latin-1"), answer
        http = json.dumps(http_event(body="@"))
        for text in (http, " \n\t" + http + "\r\n ", http.replace('"@"', '"' + "b" * 1000000 + '"')):
            answer = f.ask(text)
            assert answer.kind == "response" and answer.json()["statusCode"] == 503, answer
        assert not f.api.refused
    with Function("function", OFF, FUNCTION="echo") as f:
        for text in (b"", b"\xff\xfe", b"{", b'"\\ud800"'):
            assert once(f.api, f.api.invoke(text), "response").body == text


@on("native", "static", "arm64")
def off_is_the_handler_and_nothing_else(name):
    for config, state in ((OFF, "off"), (None, "off"), ({**FAIL, "expiresAt": "2001-01-01T00:00:00Z"}, "expired"), ("{", None), ({"enabeld": True}, "invalid"),
                          ({**FAIL, "canary": 0}, "not-canary")):
        with Function(name, config) as f:
            for event in (b"1", b'{"a":1}'):
                assert once(f.api, f.api.invoke(event), "response").body == event
            answer = once(f.api, f.api.invoke(GET), "response").json()
            assert answer["statusCode"] == 200 and "hello" in answer["body"], answer
            assert [line["action"] for line in f.log()] == ["open"] and not f.said() and not f.text(f.out), f.text(f.err)
            assert state in (None, f.log()[0]["state"]), f.log()
    with Function(name, FAIL, CHAOS_DISABLE="1") as f:
        assert f.ask(GET).json()["statusCode"] == 200
        assert f.log("open")[0]["state"] == "killed"
    with Function(name, "ftp://x") as f:  # a source of no known form: it says so, and works without
        assert f.ask(b"1").body == b"1" and "ftp" in f.said(), f.said()


@case
def an_error_keeps_the_handler_from_running():
    with Function("function", FAIL) as f:
        for _ in range(3):
            assert f.ask(GET).json()["statusCode"] == 503
            assert f.ask(b"{}").kind == "error"
        got = f.report()
        assert got["calls"] == 0 and got["error"] == got["requests"] == 6 and got["ok"] == got["failed"] == 0, got


@on("function")
def an_error_in_the_place_of_the_reply(name):
    """errorWhen after: the handler runs once, and nobody sees what it said."""
    config = {**FAIL, "errorWhen": "after", "errorStatus": 500}
    events = ((b"{}", "error"), (GET, "response"))
    with Function(name, config) as f:
        for n, (event, kind) in enumerate(events * 2, 1):
            answer = once(f.api, f.api.invoke(event), kind)
            told = answer.json()
            assert told["errorType" if kind == "error" else "statusCode"] in ("Function.ChaosInjected", 500), told
            assert b"request_id" not in answer.body
        got = f.report()
        assert got["calls"] == got["error"] == got["ok"] == n, got
    for mode in ("stream", "prelude", "fail Function.Own x", "return", "size %d" % (LIMIT + 1), "stream-fail"):
        with Function(name, config, FUNCTION=mode) as f:
            answer = once(f.api, f.api.invoke(GET), "response")
            assert answer.json()["statusCode"] == 500 and not answer.pieces, "%s: %s" % (mode, answer)
            assert f.report()["calls"] == 1


@case
def delays_then_the_handler_once():
    with Function("function", {**ON, "latency": 300}) as f:
        invocation = f.api.invoke(GET)
        told = once(f.api, invocation, "response").json()
        assert told["calls"] == 1 and 0.3 <= invocation.seconds < 0.9, (told, invocation.seconds)
        line = f.log("inject")[0]
        assert (line["fault"], line["delay_ms"], line["request_id"]) == ("latency", 300, invocation.id), line
        spared = f.api.invoke({"Records": [{"eventSource": "aws:sqs"}]})
        assert once(f.api, spared).json()["calls"] == 2 and spared.seconds < 0.2, spared.seconds
        got = f.report()
        assert got["latency"] == 1 and got["excluded"] == 1 and 300 <= got["delay_ms"] < 500 and got["skipped"] == 0, got


@on("function", "arm64")
def delays_end_before_the_deadline(name):
    """At its 500 ms before; less left = no delay; a deadline that is over already is not known."""
    slack = 0.45

    def clamped(left, want):
        with Function(name, {**ON, "latency": 60000}) as f:
            until(f.api.idle, 5, "it waits")
            invocation = f.api.invoke(b"{}", deadline=left)
            once(f.api, invocation, "response")
            assert want - 0.02 <= invocation.seconds < want + slack, "%s s left: %.3f" % (left, invocation.seconds)
            planned = f.log("inject")[-1]["delay_ms"]
            assert want * 1000 - 100 <= planned <= want * 1000 + 5, "%s s left: %d ms planned" % (left, planned)
            if name == "function":
                got = f.report()
                assert got["skipped"] == got["latency"] == got["calls"] == 1, got

    def whole(**deadline):
        with Function(name, {**ON, "latency": 200}) as f:
            invocation = f.api.invoke(b"{}", **deadline)
            once(f.api, invocation, "response")
            assert 0.2 <= invocation.seconds < 0.2 + slack, "%s: %.3f" % (deadline, invocation.seconds)
    rows = [(1.2, 0.7), (0.9, 0.4), (0.5, 0.0), (0.3, 0.0), (0.05, 0.0)]
    in_threads([lambda row=row: clamped(*row) for row in rows if name == "function" or row[1] == 0.4])
    deadlines = [{"deadline_ms": 5000}, {"deadline": -1}, {"deadline": None}, {"deadline_ms": "x"}, {"deadline": 3600 * 24 * 400}, {"deadline": 60}]
    in_threads([lambda deadline=deadline: whole(**deadline) for deadline in deadlines if name == "function" or deadline == deadlines[0]])


@case
def the_injected_reply():
    body = 'a "quoted" \\ line\nand \u00e9 \U0001f600 \u0001'
    for code, text in ((200, "200 OK"), (404, None), (429, "429 Too Many Requests"), (500, "500 Internal Server Error"),
                       (504, "504 Gateway Timeout"), (599, None), (299, None)):
        with Function("function", {**FAIL, "errorStatus": code, "errorBody": body, "retryAfter": 0}) as f:
            for key in ("http-api", "rest-api", "alb", "alb-multi-value"):
                got = f.ask(fixtures()[key]["event"]).json()
                headers = got.get("headers") or {k: v[0] for k, v in got["multiValueHeaders"].items()}
                assert got["statusCode"] == code and got["body"] == body and headers["Retry-After"] == "0", got
                if "alb" in key:
                    assert re.fullmatch(r"%d .+" % code, got["statusDescription"]), got["statusDescription"]
                    assert text in (None, got["statusDescription"]), got
            assert f.ask(b"{}").json()["errorMessage"] == body
    worst = "\x01" * 1024
    with Function("function", {**FAIL, "errorBody": worst}) as f:
        for key in ("alb-multi-value", "direct"):
            got = f.ask(fixtures()[key]["event"]).json()
            assert got.get("body", got.get("errorMessage")) == worst
    with Function("function", FAIL) as f:
        assert "Retry-After" not in f.ask(GET).json()["headers"]


@on("function", "arm64")
def the_same_id_rolls_afresh(name):
    """An async event comes again with its old id: it must have another chance."""
    with Function(name, {**FAIL, "errorRate": 50}, FUNCTION="echo") as f:
        kinds = [f.ask(b"{}", request_id="11111111-2222-3333-4444-555555555555", trace="Root=1-1-1").kind for _ in range(40)]
        assert 5 <= kinds.count("error") <= 35, kinds.count("error")


@case
def budgets_and_dry_runs():
    with Function("function", {**FAIL, "maxConcurrent": 1}) as f:
        assert [f.ask(b"{}").kind for _ in range(4)] == ["error"] * 4, "the place was not given back"
        assert f.report()["over_budget"] == 0
    with Function("function", {**ON, "latency": 20, "maxConcurrent": 1}) as f:
        for _ in range(3):
            f.ask(b"{}")
        assert f.report()["latency"] == 3
    with Function("function", {**FAIL, "maxFaults": 2}) as f:
        assert [f.ask(b"{}").kind for _ in range(4)] == ["error", "error", "response", "response"]
        assert f.report()["over_budget"] == 2
    with Function("function", {**FAIL, "dryRun": True}, CHAOS_EMF="1") as f:
        assert f.ask(b"{}").kind == "response" and f.log("dryrun") and not f.log("inject")
        got = f.report()
        assert got["would_inject"] == got["calls"] == 1 and "_aws" not in f.text(f.out), f.text(f.out)


@case
def modes_that_lambda_cannot_do():
    for mode in ({"errorMode": "reset"}, {"errorMode": "hang"}, {"errorMode": "truncate"}):
        with Function("function", {**FAIL, **mode}) as f:
            for _ in range(3):
                assert once(f.api, f.api.invoke(GET), "response").json()["request_id"]
            assert len(f.log("unsupported")) == 1 and not f.log("inject"), f.log()
            got = f.report()
            assert got["unsupported"] == got["calls"] == 3, got


@on("function", "static")
def lines_for_cloudwatch(name):
    """EMF on stdout, on request, when a fault fires; the log line names the invocation."""
    for config, fault, delay in ((FAIL, "error", 0), ({**ON, "latency": 30}, "latency", 30)):
        with Function(name, config, CHAOS_EMF="1") as f:
            began = time.time() * 1000
            first, second = f.api.invoke(GET), f.api.invoke(b"{}")
            first.wait(), second.wait()
            lines = [json.loads(line, object_pairs_hook=strictly) for line in f.text(f.out).splitlines()]
            assert len(lines) == 2, lines
            for line, invocation, log in zip(lines, (first, second), f.log("inject")):
                stamp = line["_aws"].pop("Timestamp")
                assert isinstance(stamp, int) and began - 1 <= stamp <= time.time() * 1000 + 1, stamp
                metrics = [{"Name": "InjectedCount", "Unit": "Count"}, {"Name": "InjectedDelay", "Unit": "Milliseconds"}]
                assert line == {"_aws": {"CloudWatchMetrics": [{"Namespace": "Chaos", "Dimensions": [["Service", "Fault"]], "Metrics": metrics}]},
                                "Service": "orders", "Fault": fault, "InjectedCount": 1, "InjectedDelay": delay, "requestId": invocation.id}, line
                assert log["request_id"] == invocation.id and log["fault"] == fault and log["level"] == "info" and log["source"] == "chaos", log
    for value in (None, "0"):
        with Function(name, FAIL, CHAOS_EMF=value) as f:
            f.ask(GET)
            assert not f.text(f.out), f.text(f.out)


# ---- the config, read inside invocations -----------------------------------------------------------------------------

class File:
    def __init__(self, config):
        self.path = tempfile.mkdtemp(prefix="config-", dir=folder()) + "/chaos.json"
        self.source = "file:" + self.path
        self.put(config)

    def put(self, config):
        with open(self.path + ".new", "w") as f:
            f.write(config if isinstance(config, str) else json.dumps(config))
        os.rename(self.path + ".new", self.path)


def extension(config=None):
    """The Parameters and Secrets extension, and what a function needs to find it."""
    new = aws.Extension(TOKEN)
    if config is not None:
        new.values[PARAMETER] = json.dumps(config), 1, time.time()
    return new, {"config": "ssm:" + PARAMETER, "PARAMETERS_SECRETS_EXTENSION_HTTP_PORT": str(new.port)}


def change(ext, config):
    _, version, _ = ext.values.get(PARAMETER, ("", 0, 0))
    ext.values[PARAMETER] = json.dumps(config), version + 1, time.time()


@case
def a_config_that_changes():
    """Followed when its TTL is over, never before, and by nobody but an invocation."""
    config = File(OFF)
    with Function("function", config.source, TTL=str(TTL), FUNCTION="echo") as f:
        assert f.ask(GET).body == GET.encode()
        for now, injected in ((FAIL, True), (OFF, False), (FAIL, True), ("{", False), (FAIL, True)):
            config.put(now)
            changed = time.monotonic()
            while (f.ask(GET).body != GET.encode()) != injected:
                assert time.monotonic() < changed + TTL / 1000 + 0.6, "not followed: %s" % now
            for _ in range(3):
                assert (f.ask(GET).body != GET.encode()) == injected
        os.unlink(config.path)
        until(lambda: f.ask(GET).body == GET.encode(), TTL / 1000 + 0.6, "off when it is gone")
        assert {line["state"] for line in f.log("state")} == {"on", "off", "invalid"}, f.log("state")


@on("function", "static", "arm64")
def a_config_from_parameter_store(name):
    """The extension is asked in the first invocation, with name and token; not again within the TTL (30 s off, 10 s on)."""
    ext, variables = extension(FAIL)
    with Function(name, **variables) as f:
        until(f.api.idle, 5, "it waits")
        assert not ext.seen, "asked before there is an invocation: the extension does not answer then"
        for _ in range(5):
            assert f.ask(GET).json()["statusCode"] == 503
        assert len(ext.seen) == 1, ext.seen
        assert ext.seen[0].path == "/systemsmanager/parameters/get" and ext.seen[0].query["name"] == PARAMETER, ext.seen[0]
        assert ext.seen[0].fields["x-aws-parameters-secrets-token"] == TOKEN
        line = f.log("config")[0]
        assert line["way"] == "extension" and line["state"] == "on" and line["config_version"] == 1, line
    ext.stop()


@case
def a_parameter_that_changes():
    ext, variables = extension()
    with Function("function", TTL=str(TTL), FUNCTION="echo", **variables) as f:
        ext.say = lambda seen: (400, "not ready to serve traffic, please wait")
        assert f.ask(GET).body == GET.encode(), "the extension is not ready"
        ext.say = None
        for _ in range(2):
            change(ext, FAIL)
            until(lambda: f.ask(GET).body != GET.encode(), TTL / 1000 + 0.5, "on")
            change(ext, OFF)
            until(lambda: f.ask(GET).body == GET.encode(), TTL / 1000 + 0.5, "off")
        count, began = len(ext.seen), time.monotonic()
        while time.monotonic() < began + 0.5:
            f.ask(GET)
        assert 3 <= len(ext.seen) - count <= 0.5 / (TTL / 1000 * 0.8) + 2, "%d fetches in 0.5 s" % (len(ext.seen) - count)
        count = len(ext.seen)
        until(f.api.idle, 5, "it waits")
        time.sleep(3 * TTL / 1000)  # nothing must happen: there is nothing to wait for
        assert len(ext.seen) == count, "asked between invocations"
    ext.stop()


@case
def a_parameter_store_that_hangs():
    """It costs an invocation at most 250 ms, and the last good config stays for max_stale only."""
    ext, variables = extension(FAIL)
    ext.say = aws.SILENCE
    with Function("function", TTL=str(TTL), STALE="600", FUNCTION="echo", **variables) as f:
        invocation = f.api.invoke(GET)
        assert once(f.api, invocation).body == GET.encode()
        assert 0.2 <= invocation.seconds < 0.6, invocation.seconds
        ext.say = None
        until(lambda: f.ask(GET).body != GET.encode(), 2, "on")
        ext.say = aws.SILENCE
        began, slow = time.monotonic(), 0
        while True:
            invocation = f.api.invoke(GET)
            answer = invocation.wait()
            assert invocation.seconds < 0.6, invocation.seconds
            slow += invocation.seconds > 0.2
            if answer.body == GET.encode():
                break
        lasted = time.monotonic() - began
        assert 0.3 < lasted < 2 and slow, "%.2f s, %d slow" % (lasted, slow)
        until(lambda: f.ask(GET) and f.log("state")[-1]["state"] == "stale", 2, "the state is stale")
    ext.stop()


@case
def a_long_delay_looks_at_the_config():
    """And ends when that is off."""
    config, (ext, variables) = File({**ON, "latency": 20000}), extension({**ON, "latency": 20000})

    def watch(turn, **variables):
        with Function("function", TTL=str(TTL), **variables) as f:
            for n in range(1, 3):
                turn({**ON, "latency": 20000})
                ready = time.monotonic() + TTL / 1000
                until(lambda: time.monotonic() > ready, 1, "the TTL is over")
                invocation = f.api.invoke(GET)
                until(lambda: len(f.log("inject")) == n, 5, "it delays")
                held = time.monotonic() + 2.5 * TTL / 1000
                until(lambda: time.monotonic() > held, 1, "some TTLs")
                assert not invocation.answer
                off = time.monotonic()
                turn(OFF)
                told = once(f.api, invocation, "response").json()
                assert invocation.answer.at - off < TTL / 1000 + 0.4, "%.3f s after it is off" % (invocation.answer.at - off)
                assert told["request_id"] == invocation.id and told["calls"] == n, told
    in_threads([lambda: watch(config.put, config=config.source), lambda: watch(lambda new: change(ext, new), **variables)])
    ext.stop()


@case
def a_long_delay_ends_by_the_deadline_whatever_the_config_does():
    """A look at the config that begins in the delay's last 100 ms, and hangs, must not go on beyond it."""
    def watch(hangs):
        ext, variables = extension({**ON, "latency": 60000})
        with Function("function", TTL=str(TTL), **variables) as f:
            until(f.api.idle, 5, "it waits")
            invocation = f.api.invoke(GET, deadline=1.1)
            until(lambda: invocation.given and time.monotonic() > invocation.began + 0.5, 5, "the end is near")
            if hangs:
                ext.say = aws.SILENCE
            assert once(f.api, invocation).json()["calls"] == 1
            assert 0.55 < invocation.seconds < 0.73, "%.3f s, where 1.1 - 0.5 are allowed (hangs: %s)" % (invocation.seconds, hangs)
        ext.stop()
    in_threads([lambda hangs=hangs: watch(hangs) for hangs in (False, True, True)])


@case
def an_end_that_comes_inside():
    end = time.time() + 0.8
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(end)) + ".%03dZ" % (end % 1 * 1000)
    with Function("function", {"enabled": True, "latency": 20000, "expiresAt": stamp}) as f:
        invocation = f.api.invoke(GET)
        once(f.api, invocation)
        assert abs(time.time() - end) < 0.4, "%.3f s off" % (time.time() - end)
        assert once(f.api, f.api.invoke(GET)).json()["calls"] == 2
        assert f.log("state")[-1]["state"] == "expired"


@case
def frozen_between_invocations():
    """SIGSTOP after each answer, for longer than the TTL: the config is as new as the invocation."""
    config = File(OFF)
    with Function("function", config.source, TTL=str(TTL), FUNCTION="echo") as f:
        for now in (FAIL, OFF, FAIL):
            until(f.api.idle, 5, "it waits")
            os.kill(f.pid, signal.SIGSTOP)
            config.put(now)
            woken = time.monotonic() + 1.3 * TTL / 1000
            until(lambda: time.monotonic() > woken, 1, "the TTL is over")
            os.kill(f.pid, signal.SIGCONT)
            assert (f.ask(GET).body != GET.encode()) == (now is FAIL), now


@case
def loops_in_parallel_share_the_config():
    ext, variables = extension({**ON, "errorRate": 50, "latency": 5})
    api = RuntimeApi(concurrency=4)
    with Function("function", api=api, AWS_LAMBDA_MAX_CONCURRENCY="4", TTL=str(TTL), FUNCTION="echo", **variables) as f:
        answers = [invocation.wait() for invocation in [api.invoke(b"{}") for _ in range(400)]]
        kinds = [answer.kind for answer in answers]
        assert 120 < kinds.count("error") < 280, kinds.count("error")
        seconds = answers[-1].at - answers[0].at
        assert 1 <= len(ext.seen) <= seconds / (TTL / 1000 * 0.8) + 2, "%d fetches in %.2f s" % (len(ext.seen), seconds)
        got = f.report()
        # The loops that came while the first one was still asking had no config yet.
        assert 300 <= got["requests"] <= 400 and got["error"] + got["latency"] == got["requests"], got
        assert got["error"] == kinds.count("error") == 400 - got["calls"], got
    ext.stop()


# ---- @vercel/fun ---------------------------------------------------------------------------------------------------

class Fun:
    """A function under @vercel/fun, in node."""

    def __init__(self, name, **variables):
        need("node")
        modules = os.path.join(ROOT, "build", "npm", "node_modules")
        if not os.path.isdir(modules + "/@vercel/fun"):
            raise Skip("not installed: @vercel/fun (npm install --prefix build/npm @vercel/fun)")
        where = tempfile.mkdtemp(prefix="fun-", dir=folder())
        argv = program(name)
        if len(argv) == 1:
            os.symlink(argv[0], where + "/bootstrap")
        else:
            with open(where + "/bootstrap", "w") as f:
                f.write("#!/bin/sh\nexec %s\n" % " ".join(argv))
            os.chmod(where + "/bootstrap", 0o755)
        environment = {"PATH": os.environ["PATH"], "NODE_PATH": modules, "XDG_CACHE_HOME": where + "/cache", "HOME": where,
                       "VARIABLES": json.dumps(variables)}
        self.err = where + "/stderr"
        with open(self.err, "w") as err:
            self.process = spawn([tool("node"), ROOT + "/tests/peers/lambda.js", where], env=environment, stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, stderr=err, text=True)
        assert json.loads(self.line(20))["ready"]

    def line(self, seconds=8):
        while True:
            line = first_line(self.process, seconds)
            assert line, "nothing more: " + open(self.err).read()[-300:]
            if '"ready"' in line or '"payload"' in line:  # its function writes to the same stdout
                return line

    def ask(self, event):
        self.process.stdin.write(event + "\n")
        self.process.stdin.flush()
        return json.loads(self.line())

    def log(self, action):
        lines = [json.loads(line) for line in open(self.err).read().splitlines() if line.startswith("{")]
        return [line for line in lines if line["action"] == action]

    def end(self):
        self.process.stdin.close()
        code = self.process.wait(10)
        self.process.stdin = None
        stop(self.process)
        return code


@on("native", "static", "arm64")
def under_fun(name):
    f = Fun(name)
    pids = set()
    for n in range(5):
        got = f.ask('{"n":%d}' % n)
        assert got["payload"] == '{"n":%d}' % n and got["error"] is None, got
        pids |= {child["pid"] for child in got["after"]}
        assert n == 0 or [child["state"] for child in got["before"]] == ["T"], "not frozen: %s" % got
    got = f.ask('{"fail": true}')
    assert got["error"] == "Handled" and json.loads(got["payload"])["errorType"] == "Function.Asked", got
    assert f.ask('{"stream": true}')["payload"] == "line 1\nline 2\nline 3\n"
    assert json.loads(f.ask(GET)["payload"])["statusCode"] == 200
    assert len(pids) == 1, "another process: %s" % pids
    assert f.end() == 0


@on("native", "arm64")
def under_fun_with_faults(name):
    """Its deadline, 5000 ms after 1970, is over: that means unknown, so the delay is a whole one."""
    config = File(FAIL)
    f = Fun(name, CHAOS_CONFIG=config.source)
    got = f.ask("{}")
    assert got["error"] == "Handled" and json.loads(got["payload"])["errorType"] == "Function.ChaosInjected", got
    got = f.ask(GET)
    assert got["error"] is None and json.loads(got["payload"])["statusCode"] == 503, got
    assert f.ask('{"Records":[{"eventSource":"aws:sqs"}]}')["error"] is None
    assert len(f.log("inject")) == 2 and f.end() == 0
    f = Fun(name, CHAOS_CONFIG=json.dumps({**ON, "latency": 250}))
    for _ in range(2):
        began = time.monotonic()
        assert f.ask('{"a":1}')["payload"] == '{"a":1}'
    assert 0.25 <= time.monotonic() - began < 1.2
    assert f.end() == 0


@case
def under_fun_when_it_ends():
    f = Fun("function", FUNCTION="exit")
    got = f.ask("{}")
    assert got["error"] == "Unhandled" and "Process exited" in got["payload"], got
    assert f.end() == 0
    f = Fun("function", INIT="no database")
    got = f.ask("{}")
    assert got["error"] == "Unhandled" and json.loads(got["payload"])["errorMessage"] == "no database", got
    assert f.end() == 0


# ---- deployment ------------------------------------------------------------------------------------------------------

def template():
    """examples/deploy/sam.yaml; its tags become {tag: value}."""
    try:
        import yaml
    except ImportError:
        raise Skip("not installed: python's yaml") from None

    class Loader(yaml.SafeLoader):
        pass
    Loader.add_multi_constructor("!", lambda loader, tag, node: {tag: loader.construct_sequence(node) if isinstance(node, yaml.SequenceNode)
                                                                 else loader.construct_scalar(node)})
    with open(ROOT + "/examples/deploy/sam.yaml") as f:
        return yaml.load(f, Loader)


@case
def the_template_for_sam():
    need("cfn-lint")
    path = ROOT + "/examples/deploy/sam.yaml"
    done = subprocess.run([tool("cfn-lint"), "--non-zero-exit-code", "informational", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    text = open(path).read()
    assert not re.search(r"(?m)[:-] [&*]\w", text), "CloudFormation knows no YAML aliases"
    got = template()
    functions = {name: r["Properties"] for name, r in got["Resources"].items() if r["Type"] == "AWS::Serverless::Function"}
    common_part = got["Globals"]["Function"]
    assert common_part["Runtime"] == "provided.al2023" and common_part["Environment"]["Variables"]["CHAOS_CONFIG"]["Sub"].startswith("ssm:$")
    assert sorted(f["Architectures"][0] for f in functions.values()) == ["arm64", "x86_64"]
    for f in functions.values():
        zipped = os.path.normpath(os.path.join(os.path.dirname(path), f["CodeUri"]))
        assert zipped == ROOT + "/build/lambda/chaos-example-%s.zip" % f["Architectures"][0], zipped
        layer = got["Parameters"][f["Layers"][0]["Ref"]]["AllowedPattern"]
        end = {"arm64": "-Arm64", "x86_64": ""}[f["Architectures"][0]]
        assert re.fullmatch(layer, "arn:aws:lambda:eu-central-1:187925254637:layer:AWS-Parameters-and-Secrets-Lambda-Extension%s:12" % end)
    policies = [r["Properties"]["PolicyDocument"] for r in got["Resources"].values() if r["Type"] == "AWS::IAM::ManagedPolicy"]
    assert len(policies) == 1 and len(policies[0]["Statement"]) == 1 and all(f["Policies"] == [{"Ref": "ReadChaos"}] for f in functions.values())
    allowed = policies[0]["Statement"][0]
    assert allowed["Action"] == "ssm:GetParameter" and allowed["Resource"]["Sub"].endswith(":parameter${ChaosParameter}"), allowed
    assert "*" not in json.dumps(allowed)
    value = got["Resources"]["Chaos"]["Properties"]["Value"]
    with Function("native", value) as f:
        assert f.log("open")[0]["state"] == "off" if f.ask(b"1") else None
    for config in re.findall(r"--value '(.*)'", text):
        with Function("native", config) as f:
            f.ask(b"1")
            assert f.log("open")[0]["state"] == ("off" if "false" in config else "on"), config


# ---- figures -------------------------------------------------------------------------------------------------------

def run_seconds(pid):
    """Of CPU, all its threads, in ns resolution."""
    return sum(int(open(path).read().split()[0]) for path in glob.glob("/proc/%d/task/*/schedstat" % pid)) / 1e9


def memory(pid):
    """KiB: all that is resident, and what of it is its own."""
    text = open("/proc/%d/smaps_rollup" % pid).read()
    return [sum(map(int, re.findall(r"^%s:\s+(\d+)" % key, text, re.M))) for key in ("Rss", "Private_(?:Clean|Dirty)")]


@case
def figures():
    for name in ("static", "native"):
        starts = []
        for _ in range(11):
            with Function(name) as f:
                until(lambda: f.api.calls, 5, "the first call")
                starts.append((f.api.calls[0].at - f.began) * 1000)
        with Function(name, OFF) as f:
            for _ in range(200):
                f.ask(b'{"a":1}')
            before, began = run_seconds(f.pid), time.monotonic()
            for _ in range(1000):
                f.ask(b'{"a":1}')
            spent, wall = run_seconds(f.pid) - before, time.monotonic() - began
            resident, own = memory(f.pid)
        size = os.path.getsize(program(name)[0])
        note("%s: %d bytes; exec to first next %.1f ms (median of 11, best %.1f; spawned by Python); %d KiB resident, %d its own; off %.0f us CPU an "
             "invocation (%.0f us in all)" % (name, size, sorted(starts)[5], min(starts), resident, own, spent * 1000, wall * 1000))
        if name == "static":
            assert size <= 160 * 1024 and resident <= 4096 and sorted(starts)[5] < 50, "far from the goals"
    need("aarch64-linux-gnu-gcc")
    note("arm64: %d bytes (glibc)" % os.path.getsize(made("lambda/arm64/bootstrap")))


if __name__ == "__main__":
    sys.exit(main(limit=240))

#!/usr/bin/env python3
"""The programs as users run them: every flag and variable of chaos-proxy, --check, exit codes, signals; then the
in-process example and the upstream of the demo.

Programs are taken from build/, or from $CHAOS_BUILD. Prints FAIL lines and "N passed, N failed"."""
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback

TOP = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.environ.get("CHAOS_BUILD", os.path.join(TOP, "build"))
PROXY = os.path.join(BUILD, "chaos-proxy")
MIDDLEWARE = os.path.join(BUILD, "chaos-middleware")
UPSTREAM = os.path.join(TOP, "build", "chaos-upstream")
FOLDER = tempfile.TemporaryDirectory()
DEADLINE = 10
started = []


def environment(extra=None):
    env = {k: v for k, v in os.environ.items() if not k.startswith("CHAOS_")}
    env.update(extra or {})
    return env


def run(*args, env=None):
    return subprocess.run([PROXY, *args], env=environment(env), capture_output=True, text=True, timeout=DEADLINE)


class Program:
    """A server that says "NAME listening on ADDR:PORT" first, and writes its log to a file."""

    def __init__(self, *command, env=None, stderr=None):
        self.log_path = os.path.join(FOLDER.name, "log%d" % len(started))
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(command, env=environment(env), stdout=subprocess.PIPE, stderr=stderr or log)
        started.append(self.process)
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE)
        self.line = self.process.stdout.readline().decode() if ready else ""
        match = re.fullmatch(r"\S+ listening on (\S+):(\d+)\n", self.line)
        if not match:
            self.process.kill()
            raise AssertionError("no listening line but %r; log: %s" % (self.line, self.log()))
        self.port = int(match.group(2))

    def log(self):
        with open(self.log_path) as log:
            return log.read()

    def lines(self, action):
        return [o for o in map(json.loads, self.log().splitlines()) if o["action"] == action]

    def signal(self, sig):
        self.process.send_signal(sig)

    def wait(self, seconds=DEADLINE):
        return self.process.wait(seconds)

    def __enter__(self):
        return self

    def __exit__(self, *unused):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def proxy(*args, env=None, stderr=None, upstream=None):
    return Program(PROXY, "--upstream", "http://127.0.0.1:%d" % (upstream or service.port), *args, env=env, stderr=stderr)


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)


def ask(port, path="/", headers="", conn=None):
    """One request; the reply as (status, headers in lower case, body). status 0: closed without a reply."""
    s = conn or connect(port)
    s.sendall(("GET %s HTTP/1.1\r\nHost: test\r\n%s\r\n" % (path, headers)).encode())
    return read_reply(s, close=conn is None)


def read_reply(s, close=True):
    data = b""
    while b"\r\n\r\n" not in data:
        got = s.recv(65536)
        if not got:
            s.close()
            return 0, {}, data
        data += got
    head, body = data.split(b"\r\n\r\n", 1)
    lines = head.decode().split("\r\n")
    fields = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in lines[1:])}
    while len(body) < int(fields.get("content-length", 0)):
        body += s.recv(65536)
    if close:
        s.close()
    return int(lines[0].split()[1]), fields, body


def recording_upstream(gate=None):
    """Answers each connection once, when the gate is open, and notes the heads it saw."""
    server, heads = socket.create_server(("127.0.0.1", 0)), []

    def answer(conn):
        data = b""
        while b"\r\n\r\n" not in data:
            data += conn.recv(65536)
        heads.append(data.decode())
        if gate:
            gate.wait(DEADLINE)
        try:
            conn.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        except OSError:
            pass  # the proxy gave up: that is what such a test is about
        conn.close()

    def serve():
        while True:
            try:
                conn, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(conn,), daemon=True).start()
    threading.Thread(target=serve, daemon=True).start()
    return server, heads


def until(what, seconds=DEADLINE):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = what()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError("not within %s s" % seconds)


def write(name, text):
    """Replaces a file at once, as an operator should."""
    path = os.path.join(FOLDER.name, name)
    with open(path + ".new", "w") as f:
        f.write(text)
    os.rename(path + ".new", path)
    return path


def equal(got, want, what=""):
    assert got == want, "%s: %r, not %r" % (what, got, want)


def help_rows():
    """(flag, takes a value, variable or None) of every line of --help."""
    rows = []
    for line in run("--help").stdout.splitlines():
        match = re.match(r"  (--[a-z-]+)( [A-Z][A-Z:]*)? +(?:(CHAOS_[A-Z_]+) )?", line)
        if match:
            rows.append((match.group(1), bool(match.group(2)), match.group(3)))
    return rows


VALUES = {"--listen": "127.0.0.1:0", "--upstream": "http://127.0.0.1:1", "--config": "{}", "--host-header": "h", "--key-header": "k",
          "--instance": "i", "--quiet": None, "--admin": "127.0.0.1:0", "--admin-any": None, "--max-conns": "9", "--head-limit": "2048"}


# ---- usage ----------------------------------------------------------------------------------------------------------

def case_help():
    got = run("--help")
    equal((got.returncode, got.stderr), (0, ""))
    documented = """--listen --upstream --config --ttl --max-stale --max-conns --head-limit --head-timeout --body-timeout --idle-timeout
        --connect-timeout --reply-timeout --drain --host-header --key-header --admin --admin-any --instance --quiet --health --check --version --help"""
    equal([row[0] for row in help_rows()], documented.split(), "flags")
    for flag, _, variable in help_rows():
        want = None if flag in ("--health", "--check", "--version", "--help") else "CHAOS_" + flag[2:].upper().replace("-", "_")
        equal(variable, want, flag)


def case_every_flag_and_variable_is_parsed():
    for flag, takes, variable in help_rows():
        if not variable:
            continue
        value = VALUES.get(flag, "20s")
        base = [] if flag == "--config" else ["--config", "{}"]
        args = [flag, value] if takes else [flag]
        equal(run(*base, "--check", *args).returncode, 0, " ".join(args))
        if takes:
            equal(run(*base, "--check", "%s=%s" % (flag, value)).returncode, 0, flag + "=")
        equal(run(*base, "--check", env={variable: value or "1"}).returncode, 0, variable)
        if flag not in ("--listen", "--upstream", "--config", "--host-header", "--key-header", "--admin", "--instance"):
            got = run(*base, "--check", env={variable: "wrong"})
            equal((got.returncode, got.stderr.count("\n")), (2, 1), variable + "=wrong")
            assert variable in got.stderr and "wrong" in got.stderr, got.stderr


def case_version():
    got = run("--version", env={"CHAOS_TTL": "wrong"})  # a bad variable must not hide the version
    equal((got.returncode, got.stderr), (0, ""))
    with open(os.path.join(TOP, "chaos.h")) as header:
        version = re.search(r'#define CHAOS_VERSION +"(.*)"', header.read()).group(1)
    equal(got.stdout.splitlines()[0], "chaos-proxy " + version)
    for word in ("inline", "env", "file", "ssm", "appconfig"):
        assert word in got.stdout, got.stdout


def case_bad_settings_say_so_in_one_line():
    up = ["--upstream", "http://127.0.0.1:1"]
    rows = [
        (["--bogus"], "--bogus"), (["--bogus=1"], "--bogus"), (["-l", "1"], "-l"), (["extra"], "extra"), ([""], "argument"),
        (["--ttl"], "--ttl"), (["--ttl", ""], "--ttl"), (["--ttl="], "--ttl"), (["--ttl", "x"], "'x'"), (["--ttl", "5h"], "5m"),
        (["--ttl", "-5"], "-5"), (["--ttl", "1.5s"], "1.5s"), (["--ttl", "2 s"], "2 s"), (["--ttl", "9"], "10.."), (["--ttl", "ms"], "'ms'"),
        (["--ttl", "86400001"], "86400000"), (["--ttl", "99999999999999999999"], "--ttl"), (["--ttl", "2147483648"], "--ttl"),
        (["--ttl", "2000000m"], "--ttl"), (["--max-conns", "0"], "1.."), (["--max-conns", "5s"], "5s"), (["--head-limit", "1023"], "1024"),
        (["--head-limit", "65537"], "65536"), (["--idle-timeout", "0"], "1.."), (["--quiet=1"], "--quiet"), ([], "--upstream"),
        (["--admin"], "ADDR:PORT"), (["--admin-any=1"], "--admin-any"), (["--health"], "ADDR:PORT"), (["--health="], "ADDR:PORT"),
        (["--check"], "--config"), (["--check", "--config", "foo.json"], "foo.json"),
        (up + ["--config", "{\"latncy\": 5}"], "column"), (up + ["--config", "{\"latency\": }"], "column"), (up + ["--config", "foo.json"], "foo.json"),
        (up + ["--config", "ssm:/a?b"], "ssm"), (up + ["--config", "appconfig:a/b"], "appconfig"),
        (["--upstream", "ftp://127.0.0.1"], "ftp"), (["--upstream", "https://127.0.0.1"], "https"), (["--upstream", "http://"], "http"),
        (["--upstream", "http://127.0.0.1:99999"], "99999"), (up + ["--listen", "127.0.0.1:99999"], "99999"), (up + ["--listen", "x:y:z"], "x:y:z"),
        (up + ["--host-header", "a.example\n"], "host_header"), (up + ["--host-header", "a\r\nX-Evil: y"], "host_header"),
        (up + ["--key-header", "x y"], "key_header"), (up + ["--key-header", "X:"], "key_header"),
    ]
    for args, word in rows:
        got = run(*args)
        errors = [line for line in got.stderr.splitlines() if not line.startswith("{")]  # log lines aside
        equal((got.returncode, got.stdout, len(errors)), (2, "", 1), "%s: %s" % (args, got.stderr))
        assert errors[0].startswith("chaos-proxy: ") and word in errors[0], "%s: %s" % (args, errors[0])


def case_flag_wins_over_variable():
    with proxy("--ttl", "2s", env={"CHAOS_TTL": "3s", "CHAOS_INSTANCE": "from-env"}) as p:
        line = until(lambda: p.lines("open"))[0]
        equal(line["instance"], "from-env", "variable")
        assert 2000 in line.values(), line
    got = run("--check", "--config", "{}", "--ttl", "2s", env={"CHAOS_TTL": "wrong"})
    equal(got.returncode, 0, "a variable that is not used is not looked at")


def case_times_have_units():
    for text, ms in (("250ms", 250), ("2s", 2000), ("5m", 300000), ("1234", 1234)):
        with proxy("--ttl", text) as p:
            line = until(lambda: p.lines("open"))[0]
            assert ms in line.values(), "%s: %s" % (text, line)


def case_everything_from_variables():
    env = {"CHAOS_LISTEN": "127.0.0.1:0", "CHAOS_UPSTREAM": "http://127.0.0.1:%d" % service.port, "CHAOS_QUIET": "1",
           "CHAOS_CONFIG": '{"enabled":true,"errorRate":100,"errorStatus":418}'}
    with Program(PROXY, env=env) as p:
        equal(ask(p.port)[0], 418)
        equal(p.log(), "", "quiet")


# ---- --check --------------------------------------------------------------------------------------------------------

def case_check_prints_the_canonical_form():
    text = '{ "errorRate": 5, "enabled": true,\n "latency": {"max": 9, "min": 2}, "seed": 7 }'
    path = write("good.json", text)
    outputs = [run("--check", "--config", text), run("--check", "--config", "file:" + path),
               run("--check", "--config", "env:MINE", env={"MINE": text}), run("--check", env={"CHAOS_CONFIG": text})]
    for got in outputs:
        equal((got.returncode, got.stderr), (0, "ceiling: 1024 connections / 5.225 ms = 195981 requests/s\n"))
        equal(json.loads(got.stdout), json.loads(text))
        equal(got.stdout, outputs[0].stdout)
    again = run("--check", "--config", outputs[0].stdout)
    equal(again.stdout, outputs[0].stdout, "canonical of the canonical")
    assert outputs[0].stdout.startswith('{"enabled"') or outputs[0].stdout.startswith('{ "enabled"'), outputs[0].stdout


def case_check_says_where():
    rows = [('{ "enabled": true,\n  "latncy": 5 }', "line 2, column 4", "latency"), ('{"latency":5.0}', "line 1, column 12", "5"),
            ("", "line 1, column 1", ""), ("{", "line 1, column 2", ""), ('{"errorRate":101}', "line 1, column 14", "errorRate")]
    for text, where, word in rows:
        path = write("bad.json", text)
        runs = [run("--check", "--config", "file:" + path), run("--check", "--config", "env:MINE", env={"MINE": text})]
        if text:
            runs.append(run("--check", "--config", text))
        for got in runs:
            equal((got.returncode, got.stdout, got.stderr.count("\n")), (1, "", 1), "%r: %s" % (text, got.stderr))
            assert where in got.stderr and word in got.stderr, "%r: %s" % (text, got.stderr)
    big = write("big.json", "{" + " " * 65536)
    got = run("--check", "--config", "file:" + big)
    equal(got.returncode, 1)
    assert "too large" in got.stderr or "65536" in got.stderr or "64 KiB" in got.stderr, got.stderr
    for source in ("file:" + os.path.join(FOLDER.name, "missing.json"), "env:CHAOS_NOT_SET", "file:" + FOLDER.name):
        got = run("--check", "--config", source)
        equal((got.returncode, got.stderr.count("\n")), (1, 1), source)
        assert source in got.stderr, got.stderr


def case_check_tells_the_ceiling():
    rows = [
        ({"latency": 200}, [], "1024 connections / 200 ms = 5120"), ({"latency": 200}, ["--max-conns", "50"], "50 connections / 200 ms = 250"),
        ({"latency": 200, "latencyRate": 10}, [], "1024 connections / 20 ms = 51200"), ({"latency": 200, "errorRate": 50}, [], "/ 100 ms = 10240"),
        ({"latency": {"min": 100, "max": 300}}, [], "/ 200 ms = 5120"), ({"latency": {"mean": 200, "max": 9000}}, [], "/ 200 ms = 5120"),
        ({"latency": {"p50": 100, "p95": 200, "p99": 300, "max": 1100}}, [], "/ 109.5 ms = 9352"), ({"latency": 1}, [], "/ 1 ms = 1024000"),
        ({"latency": 7, "rules": [{"name": "a", "latency": 10}, {"name": "b", "latency": 40}, {"name": "c", "latency": 20}]}, [], "/ 40 ms = 25600"),
        ({"latency": 500, "rules": [{"name": "a", "latency": 10}]}, [], "/ 10 ms = 102400"),  # the top level is but their default
        ({"latency": 900000}, ["--max-conns", "1"], "1 connections / 900000 ms = 0.001"),
        ({}, [], ""), ({"errorRate": 100, "latency": 200}, [], ""), ({"latency": 200, "latencyRate": 0}, [], ""), ({"bandwidth": 9}, [], ""),
    ]
    for config, args, want in rows:
        got = run("--check", "--config", json.dumps(dict(config, enabled=True)), *args)
        equal((got.returncode, got.stdout.count("\n"), got.stderr.count("\n")), (0, 1, 1 if want else 0), "%s: %s" % (config, got.stderr))
        assert not want or got.stderr.startswith("ceiling: ") and got.stderr.endswith(want + " requests/s\n"), "%s: %s" % (config, got.stderr)


# ---- running --------------------------------------------------------------------------------------------------------

def case_first_line():
    with proxy() as p:
        equal(p.line, "chaos-proxy listening on 127.0.0.1:%d\n" % p.port)
        status, _, body = ask(p.port)
        equal((status, body), (200, b"hello from chaos-upstream\n"))
    with Program(PROXY, "--upstream", "http://127.0.0.1:%d" % service.port, "--listen", "[::1]:0") as p:
        equal(p.line, "chaos-proxy listening on [::1]:%d\n" % p.port)


def case_cannot_listen():
    with proxy() as p:
        got = run("--upstream", "http://127.0.0.1:1", "--listen", "127.0.0.1:%d" % p.port, "--quiet")
        equal((got.returncode, got.stdout, got.stderr.count("\n")), (1, "", 1), got.stderr)
        assert "127.0.0.1:%d" % p.port in got.stderr and os.strerror(98) in got.stderr, got.stderr


def case_bad_config_file_is_off():
    path = write("off.json", "{ not json")
    with proxy("--config", "file:" + path) as p:
        equal(ask(p.port)[0], 200, "a broken file must not break the service")
        assert "invalid" in p.log(), p.log()


def case_usr1_is_off_for_good():
    path = write("usr1.json", '{"enabled":true,"errorRate":100}')
    with proxy("--config", "file:" + path, "--ttl", "50ms") as p:
        equal(ask(p.port)[0], 503)
        p.signal(signal.SIGUSR1)
        until(lambda: ask(p.port)[0] == 200)
        write("usr1.json", '{"enabled":true,"errorRate":100,"errorStatus":418}')
        p.signal(signal.SIGHUP)
        end = time.monotonic() + 0.3  # several TTLs
        while time.monotonic() < end:
            equal(ask(p.port)[0], 200, "latched")


def case_usr1_releases_delays():
    with proxy("--config", '{"enabled":true,"latency":60000}') as p:
        conn = connect(p.port)
        conn.sendall(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
        until(lambda: p.lines("inject"))
        begin = time.monotonic()
        p.signal(signal.SIGUSR1)
        equal(read_reply(conn)[0], 200)
        took = time.monotonic() - begin
        assert took < 1, "released after %.3f s" % took


def case_hup_reads_now():
    path = write("hup.json", '{"enabled":true,"errorRate":100}')
    with proxy("--config", "file:" + path, "--ttl", "5m") as p:
        equal(ask(p.port)[0], 503)
        write("hup.json", '{"enabled":false}')
        equal(ask(p.port)[0], 503, "within the TTL")
        p.signal(signal.SIGHUP)
        until(lambda: ask(p.port)[0] == 200, 2)
        os.unlink(path)
        write("hup.json", '{"enabled":true,"errorRate":100,"errorStatus":418}')
        p.signal(signal.SIGHUP)
        until(lambda: ask(p.port)[0] == 418, 2)


def refused(port):
    try:
        connect(port).close()
        return False
    except ConnectionResetError:  # caught in the backlog at that very moment
        return False
    except ConnectionRefusedError:
        return True


def case_term_and_int_drain():
    for sig in (signal.SIGTERM, signal.SIGINT):
        gate = threading.Event()
        server, heads = recording_upstream(gate)
        with proxy(upstream=server.getsockname()[1]) as p:
            fresh = connect(p.port)
            busy = connect(p.port)
            busy.sendall(b"GET /busy HTTP/1.1\r\nHost: t\r\n\r\n")
            until(lambda: heads)
            p.signal(sig)
            until(lambda: refused(p.port))
            equal(fresh.recv(10), b"", "a connection without a request")
            equal(p.process.poll(), None, "waits for the request in progress")
            gate.set()
            equal(read_reply(busy)[2], b"ok", "the request in progress")
            equal(p.wait(), 0, "exit code")
            fresh.close()
        server.close()


def case_drain_is_bounded():
    for drain, least, most in (("0", 0, 2), ("500ms", 0.4, 3)):
        gate = threading.Event()
        server, heads = recording_upstream(gate)
        with proxy("--drain", drain, upstream=server.getsockname()[1]) as p:
            busy = connect(p.port)
            busy.sendall(b"GET /busy HTTP/1.1\r\nHost: t\r\n\r\n")
            until(lambda: heads)
            begin = time.monotonic()
            p.signal(signal.SIGTERM)
            equal(p.wait(), 0, "exit code")
            took = time.monotonic() - begin
            assert least <= took <= most, "--drain %s took %.2f s" % (drain, took)
            busy.close()
        gate.set()
        server.close()


def case_disable_beats_the_config():
    with proxy("--config", '{"enabled":true,"errorRate":100}', env={"CHAOS_DISABLE": "1"}) as p:
        equal(ask(p.port)[0], 200)
        p.signal(signal.SIGHUP)
        equal(ask(p.port)[0], 200)


def case_log():
    with proxy("--config", '{"enabled":true,"errorRate":100}', "--instance", "me") as p:
        equal(ask(p.port)[0], 503)
        line = json.loads(p.log().splitlines()[0])
        equal((line["source"], line["action"], line["instance"]), ("chaos", "open", "me"))
        equal(until(lambda: p.lines("inject"))[0]["fault"], "error")
    with proxy("--config", '{"enabled":true,"errorRate":100}', "--quiet") as p:
        equal(ask(p.port)[0], 503)
        p.signal(signal.SIGTERM)
        equal(p.wait(), 0)
        equal(p.log(), "", "quiet")


def case_log_reader_gone():
    reader, writer = os.pipe()
    os.close(reader)
    with proxy("--config", '{"enabled":true,"errorRate":50}', stderr=writer) as p:
        os.close(writer)
        for _ in range(20):
            assert ask(p.port)[0] in (200, 503)
        equal(p.process.poll(), None, "alive")


# ---- every flag does something --------------------------------------------------------------------------------------

def case_head_limit():
    with proxy("--head-limit", "1024") as p:
        equal(ask(p.port, headers="X: %s\r\n" % ("a" * 2000))[0], 431)
        equal(ask(p.port, headers="X: %s\r\n" % ("a" * 500))[0], 200)


def case_head_timeout():
    with proxy("--head-timeout", "200ms") as p:
        conn = connect(p.port)
        conn.sendall(b"GET / HT")
        equal(read_reply(conn)[0], 408)


def case_idle_timeout():
    with proxy("--idle-timeout", "200ms") as p:
        conn = connect(p.port)
        equal(ask(p.port, conn=conn)[0], 200)
        begin = time.monotonic()
        equal(conn.recv(10), b"")
        assert 0.1 < time.monotonic() - begin < 3
        conn.close()


def case_body_timeout():
    with proxy("--body-timeout", "200ms") as p:
        conn = connect(p.port)
        conn.sendall(b"POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 10\r\n\r\nabc")
        begin = time.monotonic()
        while conn.recv(65536):  # 408, or the cut reply the upstream had begun: the point is that it ends
            pass
        assert time.monotonic() - begin < 5
        conn.close()


def case_reply_timeout():
    with proxy("--reply-timeout", "200ms") as p:
        equal(ask(p.port, "/slow/5000")[0], 504)


def case_connect_timeout():
    # A listener whose backlog is full swallows a SYN: the connection neither opens nor fails.
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = []
        for _ in range(4):
            s = socket.socket()
            s.setblocking(False)
            s.connect_ex(full.getsockname())
            waiting.append(s)
        with proxy("--connect-timeout", "300ms", upstream=full.getsockname()[1]) as p:
            begin = time.monotonic()
            assert ask(p.port)[0] in (502, 504)
            assert 0.2 < time.monotonic() - begin < 4, time.monotonic() - begin
        for s in waiting:
            s.close()


def case_no_upstream():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        with proxy(upstream=s.getsockname()[1]) as p:
            status, fields, _ = ask(p.port)
            equal(status, 502)
            assert "proxy-status" in fields and "x-chaos-injected" not in fields, fields


def case_max_conns():
    with proxy("--max-conns", "1") as p:
        first = connect(p.port)
        equal(ask(p.port, conn=first)[0], 200)
        second = connect(p.port)
        second.sendall(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
        ready, _, _ = select.select([second], [], [], 0.3)
        equal(ready, [], "a second connection while one is the limit")
        first.close()
        equal(read_reply(second)[0], 200, "its turn")


def case_host_header():
    server, heads = recording_upstream()
    port = server.getsockname()[1]
    with proxy(upstream=port) as p:
        equal(ask(p.port)[0], 200)
        assert "\r\nhost: test\r\n" in heads[-1].lower(), heads[-1]
    with proxy("--host-header", "other.example", upstream=port) as p:
        equal(ask(p.port)[0], 200)
        assert "\r\nhost: other.example\r\n" in heads[-1].lower() and "\r\nhost: test\r\n" not in heads[-1].lower(), heads[-1]
    server.close()


def case_key_header():
    config = '{"enabled":true,"errorRate":50,"seed":5}'
    with proxy("--config", config, "--key-header", "X-User") as p:
        verdicts = {}
        for n in range(60):
            verdicts.setdefault(n % 20, set()).add(ask(p.port, headers="X-User: user%d\r\n" % (n % 20))[0])
        assert all(len(v) == 1 for v in verdicts.values()), "same key, same verdict: %s" % verdicts
        equal({s for v in verdicts.values() for s in v}, {200, 503}, "different keys differ")
    with proxy("--config", config) as p:
        equal({ask(p.port, headers="X-User: one\r\n")[0] for _ in range(60)}, {200, 503}, "without the flag each request rolls afresh")


def case_max_stale():
    folder = os.path.join(FOLDER.name, "stale")
    os.mkdir(folder)
    with open(os.path.join(folder, "c.json"), "w") as f:
        f.write('{"enabled":true,"errorRate":100}')
    # A file that turns into a folder cannot be read: that is "unreachable", not "not found".
    with proxy("--config", "file:" + os.path.join(folder, "c.json"), "--ttl", "100ms", "--max-stale", "500ms") as p:
        equal(ask(p.port)[0], 503)
        os.unlink(os.path.join(folder, "c.json"))
        os.mkdir(os.path.join(folder, "c.json"))
        until(lambda: ask(p.port)[0] == 200, 3)


# ---- the other programs ---------------------------------------------------------------------------------------------

def middleware(config):
    return Program(MIDDLEWARE, env={"CHAOS_CONFIG": config})


def case_middleware_off():
    with middleware("{}") as p:
        conn = connect(p.port)
        for _ in range(3):
            status, fields, body = ask(p.port, conn=conn)
            equal((status, body), (200, b"hello from the handler\n"))
            assert "x-chaos-injected" not in fields, fields
        equal(ask(p.port, "/nothing", conn=conn)[0], 404)
        conn.close()
        p.signal(signal.SIGTERM)
        equal(p.wait(), 0)


def case_middleware_error():
    with middleware('{"enabled":true,"errorRate":100,"errorStatus":429,"errorBody":"slow down","retryAfter":7}') as p:
        status, fields, body = ask(p.port)
        equal((status, body, fields["x-chaos-injected"], fields["retry-after"], fields["cache-control"]),
              (429, b"slow down", "error", "7", "no-store"))
        equal(ask(p.port, "/healthz")[0], 200, "excluded by default")


def case_middleware_latency_and_rules():
    config = {"enabled": True, "rules": [{"name": "slow", "match": {"headers": {"x-user": "test-*"}}, "latency": 120}]}
    with middleware(json.dumps(config)) as p:
        begin = time.monotonic()
        status, fields, _ = ask(p.port, headers="X-User: test-1\r\n")
        took = time.monotonic() - begin
        equal((status, fields["x-chaos-injected"], fields["x-chaos-delay-ms"]), (200, "latency", "120"))
        assert 0.12 <= took < 2, took
        assert "x-chaos-injected" not in ask(p.port, headers="X-User: real-1\r\n")[1]


def case_middleware_ends_while_a_request_waits():
    with middleware('{"enabled":true,"latency":60000}') as p:
        conn = connect(p.port)
        conn.sendall(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
        until(lambda: p.lines("inject"))
        p.signal(signal.SIGTERM)
        equal(read_reply(conn)[0], 200, "released")
        equal(p.wait(), 0)


def case_middleware_without_chaos():
    with middleware("no such source") as p:  # said on stderr; the service itself must run
        equal(ask(p.port)[0], 200)
        assert "no chaos" in p.log(), p.log()


def case_upstream():
    letters = "".join(chr(ord("a") + n % 26) for n in range(20000)).encode()
    conn = connect(service.port)
    equal(ask(service.port, "/bytes/20000", conn=conn)[2], letters)
    equal(ask(service.port, "/healthz?x=1", conn=conn)[2], b"ok\n")
    equal(ask(service.port, "/nothing", conn=conn)[0], 404)
    conn.sendall(b"POST /echo HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nabcdeHEAD /bytes/9 HTTP/1.0\r\n\r\n")  # pipelined
    data = b""
    while True:
        got = conn.recv(65536)
        if not got:
            break
        data += got
    conn.close()
    assert b"\r\n\r\nabcdeHTTP/1.1 200" in data and data.endswith(b"Connection: close\r\n\r\n"), data
    with connect(service.port) as chunked:
        chunked.sendall(b"GET /chunked/30 HTTP/1.0\r\n\r\n")
        data = b""
        while not data.endswith(b"0\r\n\r\n"):
            data += chunked.recv(65536)
        equal(data.split(b"\r\n\r\n", 1)[1], b"1e\r\n" + letters[:30] + b"\r\n0\r\n\r\n")


def main():
    global service
    wanted = sys.argv[sys.argv.index("--filter") + 1] if "--filter" in sys.argv else ""
    passed = failed = 0
    with Program(UPSTREAM) as service:
        for name, case in list(globals().items()):
            if not name.startswith("case_") or wanted not in name:
                continue
            begin = time.monotonic()
            try:
                case()
                passed += 1
                if "-v" in sys.argv:
                    print("ok   %s %.2f s" % (name, time.monotonic() - begin))
            except Exception as error:  # any failure of a case is reported, and the next one runs
                failed += 1
                line = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.name == name]
                print("FAIL %s line %s: %s: %s" % (name, line, type(error).__name__, error))
            sys.stdout.flush()
    for process in started:
        if process.poll() is None:
            process.kill()
    print("%d passed, %d failed" % (passed, failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

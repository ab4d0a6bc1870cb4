#!/usr/bin/env python3
"""The admin listener of chaos-proxy: /metrics through the parser of Prometheus' own client library and against traffic that was
really sent, /config against the config that was really given, /healthz and --health against what is alive, silent or lying.

    tests/peers/admin.py [--filter TEXT] [-v]

Needs prometheus_client (python3-prometheus-client in Debian); missing, its cases are a loud skip, with CHAOS_CI=1 a failure."""
import http.client
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback

sys.dont_write_bytecode = True
import cli
from cli import DEADLINE, PROXY, Program, ask, connect, equal, recording_upstream, run, until, write

try:
    from prometheus_client.parser import text_string_to_metric_families
except ImportError:
    # Debian's packages are Debian's python's, which need not be the first on PATH.
    if os.path.exists("/usr/bin/python3") and not os.environ.get("CHAOS_PEER_AGAIN"):
        os.environ["CHAOS_PEER_AGAIN"] = "1"
        os.execv("/usr/bin/python3", ["/usr/bin/python3", *sys.argv])
    text_string_to_metric_families = None

HEALTH_WITHIN = 2.5  # --health promises 2 s


class Skip(Exception):
    pass


def admin(*args, upstream=None, env=None):
    """A proxy with --admin; .admin is the port it printed in its second line."""
    p = Program(PROXY, "--upstream", "http://127.0.0.1:%d" % (upstream or cli.service.port), "--admin", "127.0.0.1:0", *args, env=env)
    late = threading.Timer(DEADLINE, p.process.kill)
    late.start()
    line = p.process.stdout.readline().decode()
    late.cancel()
    match = re.fullmatch(r"chaos-proxy admin on 127\.0\.0\.1:(\d+)\n", line)
    assert match, "second line: %r" % line
    p.admin = int(match.group(1))
    return p


def get(port, path, method="GET"):
    conn = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)
    try:
        conn.request(method, path)
        reply = conn.getresponse()
        return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
    finally:
        conn.close()


def raw(port, data, shut=False):
    """Sends bytes and reads to the end; b"" when the end was a reset."""
    with connect(port) as s:
        try:
            s.sendall(data)
            if shut:
                s.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        got = b""
        try:
            while True:
                more = s.recv(65536)
                if not more:
                    return got
                got += more
        except ConnectionResetError:
            return got


def families(port):
    if not text_string_to_metric_families:
        raise Skip("prometheus_client is not installed")
    status, fields, body = get(port, "/metrics")
    equal((status, fields["content-type"]), (200, "text/plain; version=0.0.4; charset=utf-8"))
    return list(text_string_to_metric_families(body.decode("utf-8")))


def metrics(port):
    """{name: value}, with labels {"name{value}": value}."""
    return {s.name + ("{%s}" % ",".join(s.labels.values()) if s.labels else ""): s.value for f in families(port) for s in f.samples}


def config_of(port):
    status, fields, body = get(port, "/config")
    equal((status, fields["content-type"]), (200, "application/json"))
    return json.loads(body.decode("utf-8"))


def canonical(config):
    return json.loads(run("--check", "--config", json.dumps(config)).stdout)


# ---- where it listens -----------------------------------------------------------------------------------------------

def case_off_unless_asked():
    with cli.proxy() as p:
        p.signal(signal.SIGTERM)
        equal(p.process.stdout.read(), b"", "nothing after the first line")


def case_two_lines():
    with admin() as p:
        equal(p.line, "chaos-proxy listening on 127.0.0.1:%d\n" % p.port)
        equal(get(p.admin, "/healthz")[2], b"ok\n")
        equal(ask(p.port)[0], 200)
        equal(ask(p.port, "/metrics")[0], 404, "the proxy's own port has no such page: the upstream's answer")
    with admin(env={"CHAOS_ADMIN": "127.0.0.1:1"}) as p:  # the flag wins
        equal(get(p.admin, "/healthz")[0], 200)


def case_ipv6_and_names():
    for address, shown in (("[::1]:0", r"\[::1\]"), ("localhost:0", r"(\[::1\]|127\.0\.0\.1)"), ("0", r"127\.0\.0\.1"), (":0", r"127\.0\.0\.1")):
        with Program(PROXY, "--upstream", "http://127.0.0.1:1", "--admin", address) as p:
            line = p.process.stdout.readline().decode()
            assert re.fullmatch(r"chaos-proxy admin on %s:[1-9]\d*\n" % shown, line), "%s: %r" % (address, line)
            equal(run("--health", line.split()[-1]).returncode, 0, address)


def case_not_loopback_needs_insisting():
    up = ["--upstream", "http://127.0.0.1:1", "--quiet"]
    for address in ("0.0.0.0:0", "[::]:0", "192.0.2.1:0"):
        got = run(*up, "--admin", address)
        equal((got.returncode, got.stdout, got.stderr.count("\n")), (2, "", 1), address + ": " + got.stderr)
        assert "loopback" in got.stderr and "--admin-any" in got.stderr and address in got.stderr, got.stderr
    with Program(PROXY, *up, "--admin", "0.0.0.0:0", "--admin-any") as p:
        line = p.process.stdout.readline().decode()
        assert line.startswith("chaos-proxy admin on 0.0.0.0:"), line
        equal(get(int(line.rsplit(":", 1)[1]), "/healthz")[0], 200)
    with Program(PROXY, *up, env={"CHAOS_ADMIN": "0.0.0.0:0", "CHAOS_ADMIN_ANY": "1"}) as p:
        assert p.process.stdout.readline().startswith(b"chaos-proxy admin on 0.0.0.0:")


def case_bad_addresses():
    for address in ("x", "127.0.0.1", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:65536", "127.0.0.1:-1", "::1:80", "[::1]", "a" * 300 + ":1",
                    "no.such.host.invalid:1"):
        for flag in ("--admin", "--health"):
            got = run("--upstream", "http://127.0.0.1:1", flag, address)
            code = 1 if flag == "--health" and "invalid" in address else 2  # a name that is not known today may be tomorrow
            equal((got.returncode, got.stdout, got.stderr.count("\n")), (code, "", 1), "%s %s: %s" % (flag, address, got.stderr))
            assert flag in got.stderr and address in got.stderr, got.stderr


def case_port_in_use_is_told_before_anything_runs():
    with admin() as p:
        got = run("--upstream", "http://127.0.0.1:1", "--admin", "127.0.0.1:%d" % p.admin, "--quiet")
        equal((got.returncode, got.stdout, got.stderr.count("\n")), (1, "", 1), got.stderr)
        assert str(p.admin) in got.stderr and os.strerror(98) in got.stderr, got.stderr
        equal(get(p.admin, "/healthz")[0], 200)


# ---- /metrics -------------------------------------------------------------------------------------------------------

def case_a_real_parser_reads_it():
    with admin("--instance", 'i "1" \\ \u00e9', env={"CHAOS_SERVICE": "pay"}) as p:
        all_of_it = families(p.admin)
        names = [f.name for f in all_of_it]
        equal(len(names), len(set(names)), "each family once")
        assert len(names) >= 27, names
        for family in all_of_it:
            assert family.name.startswith("chaos_") and family.type in ("counter", "gauge") and family.documentation, family
            equal({s.name for s in family.samples} - {family.name, family.name + "_total"}, set())
        info = [s for f in all_of_it for s in f.samples if s.name == "chaos_info"][0]
        version = run("--version").stdout.split()[1]
        equal((info.labels, info.value), ({"version": version, "service": "pay", "instance": 'i "1" \\ \u00e9'}, 1))
        states = [s for f in all_of_it for s in f.samples if s.name == "chaos_state"]
        equal({s.labels["state"]: s.value for s in states if s.value}, {"off": 1})
        equal(len(states), 8)


def case_metrics_agree_with_the_traffic():
    config = {"enabled": True, "expiresAt": 4000000000, "exclude": ["/spared"], "rules": [
        {"name": "fail", "match": {"paths": ["/fail"]}, "errorRate": 100}, {"name": "slow", "match": {"paths": ["/slow/0"]}, "latency": 30},
        {"name": "spared", "match": {"paths": ["/spared"]}, "errorRate": 100}]}
    path = write("metrics.json", json.dumps(config))
    with admin("--config", "file:" + path, "--ttl", "5m") as p:
        until(lambda: metrics(p.admin)["chaos_state{on}"] == 1)
        for path, times, status in (("/fail", 7, 503), ("/slow/0", 5, 200), ("/spared", 3, 404), ("/", 4, 200)):
            for _ in range(times):
                equal(ask(p.port, path)[0], status, path)
        equal(raw(p.port, b"BAD\r\n\r\n").split(b" ")[1], b"400")
        m = until(lambda: (lambda m: m["chaos_connections_open"] == 0 and m)(metrics(p.admin)))
        want = {"chaos_requests_total": 19, "chaos_injected_total{error}": 7, "chaos_injected_total{latency}": 5, "chaos_injected_total{reset}": 0,
                "chaos_spared_total{exclude}": 3, "chaos_spared_total{budget}": 0, "chaos_outcomes_total{2xx}": 9, "chaos_outcomes_total{4xx}": 3,
                "chaos_outcomes_total{5xx}": 0, "chaos_proxied_total": 12, "chaos_rejected_total": 1, "chaos_upstream_errors_total": 0,
                "chaos_connections_total": 20, "chaos_waiting": 0, "chaos_config_version": 1, "chaos_config_changes_total": 1,
                "chaos_config_fetches_total": 1, "chaos_config_errors_total": 0, "chaos_end_timestamp_seconds": 4000000000,
                "chaos_would_inject_total": 0, "chaos_log_dropped_total": 0, "chaos_skipped_total": 0}
        equal({k: m[k] for k in want}, want)
        assert 0.15 <= m["chaos_delay_seconds_total"] < 2, m["chaos_delay_seconds_total"]
        assert 0 < m["chaos_outcome_seconds_total"] < 10, m["chaos_outcome_seconds_total"]
        assert 0 <= m["chaos_config_age_seconds"] < 60, m["chaos_config_age_seconds"]
        equal(m["chaos_log_lines_total"], len(p.log().splitlines()), "log lines")
        p.signal(signal.SIGUSR1)
        m = until(lambda: (lambda m: m["chaos_state{killed}"] == 1 and m)(metrics(p.admin)))
        equal(m["chaos_state{on}"], 0)


def case_metrics_of_a_dead_upstream_and_a_bad_config():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        path = write("bad-metrics.json", "{ nonsense")
        with admin("--config", "file:" + path, upstream=s.getsockname()[1]) as p:
            equal(ask(p.port)[0], 502)
            m = until(lambda: (lambda m: m["chaos_upstream_errors_total"] == 1 and m)(metrics(p.admin)))
            equal((m["chaos_state{invalid}"], m["chaos_config_errors_total"], m["chaos_requests_total"]), (1, 1, 0))
            assert "chaos_end_timestamp_seconds" not in m, m


def case_counters_only_grow():
    with admin("--config", '{"enabled":true,"errorRate":30,"latency":1}', "--quiet") as p:
        done = threading.Event()

        def traffic():
            while not done.is_set():
                ask(p.port)
        threads = [threading.Thread(target=traffic) for _ in range(4)]
        for t in threads:
            t.start()
        try:
            before = metrics(p.admin)
            end = time.monotonic() + DEADLINE
            while before["chaos_requests_total"] < 500 and time.monotonic() < end:
                now = metrics(p.admin)
                for name in now:
                    assert "_total" not in name or now[name] >= before[name], "%s fell from %s to %s" % (name, before[name], now[name])
                before = now
        finally:
            done.set()
            for t in threads:
                t.join()
        assert before["chaos_requests_total"] >= 500, before["chaos_requests_total"]


# ---- /config --------------------------------------------------------------------------------------------------------

def case_config_is_the_one_in_use():
    first = {"enabled": True, "latency": {"min": 1, "max": 9}, "seed": 5, "expiresAt": "2090-01-02T03:04:05Z", "note": 'quo"te \u20ac'}
    path = write("config.json", json.dumps(first))
    with admin("--config", "file:" + path, "--ttl", "5m", "--instance", "me") as p:
        got = config_of(p.admin)
        equal(got["config"], canonical(first))
        equal((got["state"], got["problem"], got["version"], got["instance"], got["end"]), ("on", "", 1, "me", "2090-01-02T03:04:05Z"))
        assert "service" not in got and got["reason"] and 0 <= got["age_ms"] < 60000, got
        second = {"enabled": True, "dryRun": True, "rules": [{"name": "r", "match": {"paths": ["/a*"]}, "errorRate": 1}]}
        write("config.json", json.dumps(second))
        p.signal(signal.SIGHUP)
        got = until(lambda: (lambda g: g["version"] == 2 and g)(config_of(p.admin)))
        equal((got["config"], got["state"]), (canonical(second), "dry-run"))
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", got["end"]), got["end"]  # the lease
        write("config.json", '{"enabled": true, "latncy": 5}')
        p.signal(signal.SIGHUP)
        got = until(lambda: (lambda g: g["state"] == "invalid" and g)(config_of(p.admin)))
        equal((got["config"], got["end"]), (None, None))
        assert "latncy" in got["problem"] and "line 1" in got["problem"], got
        p.signal(signal.SIGUSR1)
        until(lambda: config_of(p.admin)["state"] == "killed")


def case_config_without_one():
    with admin() as p:
        got = config_of(p.admin)
        equal((got["state"], got["version"], got["age_ms"], got["end"], got["config"]), ("off", 0, -1, None, None))
        assert "instance" not in got, got


def case_config_of_strange_names():
    with admin(env={"CHAOS_INSTANCE": 'a"b\\c\n\x01\udcff', "CHAOS_SERVICE": "caf\u00e9"}) as p:
        got = config_of(p.admin)
        equal((got["instance"], got["service"]), ('a"b\\c\n\x01?', "caf\u00e9"))


def case_config_of_any_size():
    # Control bytes take six in JSON, and each rule repeats what it inherits: the largest text there can be.
    big = {"enabled": True, "errorRate": 1, "errorBody": "\x01" * 1024, "note": "\x02" * 256,
           "rules": [{"name": "r%d" % n, "match": {"paths": ["/%d%s" % (n, "\x03" * 250)]}} for n in range(16)]}
    with admin("--config", "file:" + write("big-config.json", json.dumps(big))) as p:
        want = run("--check", "--config", "file:" + write("big-config.json", json.dumps(big)))
        equal(want.returncode, 0, want.stderr)
        for _ in range(5):
            status, fields, body = get(p.admin, "/config")
            equal((status, int(fields["content-length"])), (200, len(body)))
            got = json.loads(body)["config"]
            equal((got["errorBody"], [r["name"] for r in got["rules"]]), (big["errorBody"], [r["name"] for r in big["rules"]]))


# ---- what a client may send -----------------------------------------------------------------------------------------

def case_head_is_get_without_a_body():
    with admin() as p:
        for path in ("/healthz", "/config"):
            status, fields, body = get(p.admin, path, "HEAD")
            whole = get(p.admin, path)
            equal((status, body, fields["content-type"], fields["content-length"]), (200, b"", whole[1]["content-type"], str(len(whole[2]))))
        assert raw(p.admin, b"HEAD /metrics HTTP/1.1\r\nHost: t\r\n\r\n").endswith(b"\r\n\r\n")


def case_other_methods_and_paths():
    with admin() as p:
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"):
            for path in ("/healthz", "/config", "/off"):
                status, fields, _ = get(p.admin, path, method)
                equal((status, fields["allow"]), (405, "GET, HEAD"), method)
        for path in ("/", "/nothing", "/healthz/", "/healthzz", "/HEALTHZ", "//healthz", "/metrics/../config", "*"):
            status, fields, _ = get(p.admin, path)
            equal((status, "allow" in fields), (404, False), path)
        for path in ("/healthz?", "/healthz?verbose=1"):
            equal(get(p.admin, path)[0], 200, path)
        status, fields, _ = get(p.admin, "/healthz")
        equal((fields["connection"], fields["cache-control"]), ("close", "no-store"))


def case_bad_requests():
    rows = [b"\r\n\r\n", b"GET\r\n\r\n", b"GET /healthz\r\n\r\n", b"GET /healthz HTTP/2.0\r\n\r\n", b"get /healthz HTTP/1.1\r\n\r\n",
            b"GET /" + b"a" * 300 + b" HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET /health\x01z HTTP/1.1\r\n\r\n",
            b"GET /healthz HTTP/1.1 \r\n\r\n"]
    with admin() as p:
        for row in rows:
            equal(raw(p.admin, row)[:13], b"HTTP/1.1 400 ", row)
        for row in (b"GET /healthz HTTP/1.0\r\n\r\n", b"GET /healthz HTTP/1.1\r\nHost: t\r\n\r\nGET /config HTTP/1.1\r\n\r\n"):
            data = raw(p.admin, row)
            assert data.startswith(b"HTTP/1.1 200 ") and data.endswith(b"\r\n\r\nok\n"), data
        for row in (b"", b"G", b"GET /healthz HTTP/1.1\r\nHost"):  # gives up halfway: nobody to answer
            equal(raw(p.admin, row, shut=True), b"", row)
        equal(get(p.admin, "/healthz")[0], 200)


def case_huge_heads():
    with admin() as p:
        for size in (8192, 9000, 100000, 3000000):
            with connect(p.admin) as s:  # may send it all and then read its answer: no reset in between
                s.sendall(b"GET /healthz HTTP/1.1\r\nX: " + b"a" * size + b"\r\n\r\n")
                data = b"".join(iter(lambda: s.recv(65536), b""))
            equal((data[:13], data.count(b"HTTP/1.1")), (b"HTTP/1.1 431 ", 1), str(size))
        head = b"GET /healthz HTTP/1.1\r\nX: "
        data = raw(p.admin, head + b"a" * (8192 - len(head) - 4) + b"\r\n\r\n")
        assert data.startswith(b"HTTP/1.1 200 "), data[:80]


def case_slow_clients_block_nobody():
    with admin("--config", '{"enabled":true,"errorRate":100}') as p:
        begin = time.monotonic()
        silent = [connect(p.admin) for _ in range(8)]
        slow = connect(p.admin)
        slow.sendall(b"GET /healthz HT")
        hoarder = connect(p.admin)  # asks, and never reads
        hoarder.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        for path in ("/healthz", "/metrics", "/config"):
            started = time.monotonic()
            equal(get(p.admin, path)[0], 200)
            assert time.monotonic() - started < 0.5, "%s took %.2f s" % (path, time.monotonic() - started)
        equal(ask(p.port)[0], 503)
        for part in b"TP/1.1\r\nX: abcdefghijklmnopqrstuvwxyz":  # a byte now and then does not buy time
            time.sleep(0.1)
            try:
                slow.sendall(bytes([part]))
            except OSError:
                break
        data = slow.recv(65536)
        took = time.monotonic() - begin
        assert data.startswith(b"HTTP/1.1 408 "), data
        for s in silent:
            equal(s.recv(65536)[:13], b"HTTP/1.1 408 ")
            s.close()
        assert 1.9 < took < 6, took
        slow.close()
        hoarder.close()


def case_more_silent_clients_than_places():
    with admin() as p:
        silent = [connect(p.admin) for _ in range(40)]
        begin = time.monotonic()
        health(p.admin, 0)
        equal(get(p.admin, "/healthz")[0], 200)  # behind two full tables of them, the oldest of which make room
        took = time.monotonic() - begin
        assert took < 2, "%.1f s" % took
        equal(ask(p.port)[0], 200)
        for s in silent:
            s.close()


def case_many_parallel_clients():
    with admin() as p:
        bad = []

        def client():
            for n in range(20):
                try:
                    got = get(p.admin, ("/healthz", "/metrics", "/config")[n % 3])
                    if got[0] != 200 or len(got[2]) != int(got[1]["content-length"]):
                        bad.append(got)
                except OSError as error:
                    bad.append(error)
        threads = [threading.Thread(target=client) for _ in range(48)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        equal(bad, [])


def case_no_descriptor_is_left():
    with admin() as p:
        def count():
            return len(os.listdir("/proc/%d/fd" % p.process.pid))
        if not os.path.isdir("/proc/%d/fd" % p.process.pid):
            raise Skip("/proc is not there")
        get(p.admin, "/healthz")
        before = until(count)
        for n in range(300):
            with connect(p.admin) as s:
                if n % 3:
                    s.sendall(b"GET /healthz HTTP/1.1\r\n\r\n"[:n])
                if n % 4 == 0:  # a reset
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        until(lambda: count() <= before, 5)
        equal(get(p.admin, "/healthz")[0], 200)


def case_stop_does_not_wait_for_it():
    gate = threading.Event()
    server, heads = recording_upstream(gate)
    with admin("--drain", "5s", upstream=server.getsockname()[1]) as p:
        clients = [connect(p.admin) for _ in range(5)]
        busy = connect(p.port)
        busy.sendall(b"GET /busy HTTP/1.1\r\nHost: t\r\n\r\n")
        until(lambda: heads)
        p.signal(signal.SIGTERM)
        until(lambda: cli.refused(p.port))
        equal(get(p.admin, "/healthz")[0], 200, "it still serves the request in progress")
        gate.set()
        equal(cli.read_reply(busy)[2], b"ok")
        begin = time.monotonic()
        equal(p.wait(), 0)
        assert time.monotonic() - begin < 1.5, "silent admin clients held it up"
        assert cli.refused(p.admin)
        for s in clients:
            s.close()
    server.close()


# ---- --health -------------------------------------------------------------------------------------------------------

def health(port, want, word=""):
    begin = time.monotonic()
    got = run("--health", "127.0.0.1:%d" % port, env={"CHAOS_TTL": "wrong"})  # no other setting matters to it
    took = time.monotonic() - begin
    equal((got.returncode, got.stdout, got.stderr.count("\n")), (want, "", want), got.stderr)
    assert word in got.stderr, got.stderr
    assert took < HEALTH_WITHIN, "%.2f s" % took


def liar(reply, then=None):
    """A server that answers the first request so, and then closes, or does something else."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        conn, _ = server.accept()
        try:
            conn.recv(65536)
            conn.sendall(reply)
            if then:
                then(conn)
        except OSError:
            pass
        conn.close()
    threading.Thread(target=serve, daemon=True).start()
    return server


def case_health_of_a_proxy():
    with admin() as p:
        health(p.admin, 0)
        equal(run("--health=127.0.0.1:%d" % p.admin).returncode, 0)
        equal(run("--health", str(p.admin)).returncode, 0)
        p.signal(signal.SIGSTOP)
        os.waitpid(p.process.pid, os.WUNTRACED)  # until its last thread stands still
        health(p.admin, 1, "2 s")
        p.signal(signal.SIGCONT)
        health(p.admin, 0)


def case_health_of_a_dead_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        health(s.getsockname()[1], 1, os.strerror(111))


def case_health_of_a_silent_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        health(server.getsockname()[1], 1, "2 s")


def case_health_of_liars():
    def drip(conn):
        for _ in range(100):
            conn.sendall(b"x")
            time.sleep(0.05)

    def flood(conn):
        for _ in range(1000):
            conn.sendall(b"x" * 65536)
    rows = [(b"", None), (b"\x00\xff garbage", None), (b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 3\r\n\r\nok\n", None),
            (b"HTTP/1.1 200 OK\r\n\r\nhello from something else\n", None), (b"HTTP/1.1 200 OK\r\n", drip), (b"HTTP/1.1 200 OK\r\n\r\n", flood),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", None), (b"ok\n", None)]
    for reply, then in rows:
        with liar(reply, then) as server:
            health(server.getsockname()[1], 1)


def main():
    wanted = sys.argv[sys.argv.index("--filter") + 1] if "--filter" in sys.argv else ""
    passed = failed = skipped = 0
    with Program(cli.UPSTREAM) as cli.service:
        for name, case in list(globals().items()):
            if not name.startswith("case_") or wanted not in name:
                continue
            begin = time.monotonic()
            try:
                case()
                passed += 1
                if "-v" in sys.argv:
                    print("ok   %s %.2f s" % (name, time.monotonic() - begin))
            except Skip as reason:
                missing = os.environ.get("CHAOS_CI") == "1"
                failed, skipped = failed + missing, skipped + (not missing)
                print("%s %s: %s" % ("FAIL" if missing else "skip", name, reason))
            except Exception as error:  # any failure of a case is reported, and the next one runs
                failed += 1
                line = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.name == name]
                print("FAIL %s line %s: %s: %s" % (name, line, type(error).__name__, error))
            sys.stdout.flush()
    for process in cli.started:
        if process.poll() is None:
            process.kill()
    print("%d passed, %d failed%s" % (passed, failed, ", %d skipped" % skipped if skipped else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

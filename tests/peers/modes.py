#!/usr/bin/env python3
"""Every fault of chaos-proxy on the wire, as curl and Python's http.client see it: one table, then what it does not show.

    tests/peers/modes.py [--filter TEXT] [--build DIR] [-v]

Needs curl. The table is printed at the end of a run by hand; tests/run shows it when something failed."""
import http.client
import itertools
import random
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

from common import (DIGESTS, MARK, VALIDATORS, Proxy, Upstream, ask, case, connect, counted, in_threads, main, need, note, once, tool, until)

BODY = random.Random(3).randbytes(100001).replace(b"\r", b"r")
STAMPS = "".join("%s: %s\r\n" % pair for pair in
                 [("ETag", '"v1"'), ("Last-Modified", "Mon, 02 Nov 2026 10:00:00 GMT"), ("Age", "7"), ("Cache-Control", "max-age=600")] +
                 [(name, "sha-256=:%s=:" % ("A" * 43)) for name in DIGESTS])
RATE = 200  # KiB/s of the paced replies


def answer(request):
    """/MODE/KIND?NAME: the kind says how the reply is framed."""
    parts = request.path.split("?")[0].split("/")
    kind = parts[2] if len(parts) > 2 else "length"
    for _ in request.body():
        pass
    fields = STAMPS + "X-Upstream: yes\r\n"
    if kind in ("204", "304"):
        return request.reply(status=kind + " Whatever", body=b"" if kind == "204" else BODY, fields=fields)
    if kind == "empty":
        return request.reply(b"", fields=fields)
    if kind == "one":
        return request.reply(b"1", fields=fields)
    return request.reply(BODY, fields=fields, framing=kind if kind in ("chunked", "closed") else "length")


UPSTREAM = []
NAMES = ("n%d" % n for n in itertools.count())  # one for each request, by which the upstream counts it


def upstream():
    if not UPSTREAM:
        UPSTREAM.append(Upstream(answer))
    return UPSTREAM[0]


def proxy(config, **options):
    p = Proxy(upstream().port, dict({"enabled": True}, **config), program=counted(), **options)
    assert all(line.get("state") != "invalid" for line in p.log()), "the config is refused: %s" % p.log()[-1]["reason"]
    return p


# ---- two clients ---------------------------------------------------------------------------------------------------

class Seen:
    """What a client saw of one request, and the upstream."""

    def __init__(self, how, status, fields, body, name, seconds):
        self.how, self.status, self.fields, self.body, self.seconds = how, status, fields, body, seconds
        self.calls = upstream().calls[name]

    def __repr__(self):
        return "%s, status %s, %d bytes, upstream called %d times, fields %s" % (self.how, self.status, len(self.body), self.calls, self.fields)


PATIENCE = 0.5  # of a client that is let hang


def with_curl(port, mode, kind):
    name, began = next(NAMES), time.monotonic()
    method = ["-I"] if kind == "head" else ["-i"]
    done = subprocess.run([tool("curl"), "-s", *method, "--max-time", str(PATIENCE if "hang" in mode else 15),
                           "http://127.0.0.1:%d/%s/%s?%s" % (port, mode, kind, name)], capture_output=True)
    head, _, body = done.stdout.partition(b"\r\n\r\n")
    fields = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in head.decode("latin-1").split("\r\n")[1:])}
    return Seen(done.returncode, int(head.split()[1]) if head else 0, fields, body, name, time.monotonic() - began)


def with_python(port, mode, kind):
    """The exception's name, or "-"."""
    name, how, status, fields, body, began = next(NAMES), "-", 0, {}, b"", time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE if "hang" in mode else 15)
    try:
        connection.request("HEAD" if kind == "head" else "GET", "/%s/%s?%s" % (mode, kind, name))
        reply = connection.getresponse()
        status, fields = reply.status, {k.lower(): v for k, v in reply.getheaders()}
        while True:  # in pieces, so that what came before a break is seen
            piece = reply.read1(8192) if kind in ("chunked", "closed") else reply.read()
            body += piece
            if not piece or kind not in ("chunked", "closed"):
                break
    except http.client.IncompleteRead as error:
        how, body = "IncompleteRead", body + error.partial
    except (OSError, http.client.HTTPException) as error:
        how = type(error).__name__
    connection.close()
    return Seen(how, status, fields, body, name, time.monotonic() - began)


# ---- the table -----------------------------------------------------------------------------------------------------

KINDS = ["length", "chunked", "closed", "head", "204", "304"]
BODILESS = ["head", "204", "304", "empty"]
WHOLE = (0, "-")
# What curl ends with, what Python raises, how often the upstream is called, the status a client sees (None: the upstream's)
NO_REPLY = {
    "reset": (56, "ConnectionResetError", 0, 0),
    "close": (52, "RemoteDisconnected", 0, 0),
    "hang": (28, "TimeoutError", 0, 0),
    "status": (0, "-", 0, 503),
    "after-reset": (56, "ConnectionResetError", 1, 0),
    "after-close": (52, "RemoteDisconnected", 1, 0),
    "after-hang": (28, "TimeoutError", 1, 0),
    "after-status": (0, "-", 1, 418),
    "latency": (0, "-", 1, None),
    "bandwidth": (0, "-", 1, None),
    "off": (0, "-", 1, None),
}
CUT = {"length": (18, "IncompleteRead"), "chunked": (18, "IncompleteRead"), "closed": (56, "ConnectionResetError"), "one": (18, "IncompleteRead")}


def rule(name, **faults):
    return dict({"name": name, "match": {"paths": ["/%s/**" % name]}}, **faults)


def error(name, mode, **more):
    return rule(name, errorRate=100, errorMode=mode, **more)


def no_reply_rules():
    rules = [error("reset", "reset"), error("close", "close"), error("hang", "hang"),
             error("status", "status", errorStatus=503, errorBody="out of order", retryAfter=7)]
    rules += [error("after-" + mode, mode, errorWhen="after") for mode in ("reset", "close", "hang")]
    rules += [error("after-status", "status", errorWhen="after", errorStatus=418, errorBody="too late", retryAfter=9)]
    return rules + [rule("latency", latency=120), rule("bandwidth", bandwidth=RATE)]


def original(kind):
    return {"empty": b"", "one": b"1"}.get(kind, b"" if kind in BODILESS else BODY)


def check_untouched(seen, kind):
    """The upstream's reply as it is, without a mark."""
    assert seen.body == original(kind), "body of %d bytes" % len(seen.body)
    assert MARK.lower() not in seen.fields and "x-upstream" in seen.fields, "fields"
    assert seen.fields["cache-control"] == "max-age=600" and all(name.lower() in seen.fields for name in VALIDATORS + DIGESTS), "fields"


def check_marked(seen, word):
    """Marked, and nothing that would let a cache keep or validate it."""
    assert seen.fields.get(MARK.lower()) == word, "mark %r" % seen.fields.get(MARK.lower())
    assert seen.fields.get("cache-control") == "no-store", "Cache-Control: %s" % seen.fields.get("cache-control")
    left = [name for name in VALIDATORS if name.lower() in seen.fields]
    assert not left, "still there: %s" % left


def check_injected(seen, mode, kind):
    body, after = ("too late", "9") if "after" in mode else ("out of order", "7")
    check_marked(seen, "error")
    assert seen.body == (b"" if kind == "head" else body.encode()), "body %r" % seen.body[:80]
    assert seen.fields.get("retry-after") == after and "x-upstream" not in seen.fields, "fields"


def check_slow(seen, mode, kind):
    """Late but whole; a bodiless reply has nothing to be paced."""
    assert seen.body == original(kind), "body of %d bytes" % len(seen.body)
    if mode == "latency":
        assert seen.seconds >= 0.12, "%.3f s" % seen.seconds
        assert seen.fields.get("x-chaos-delay-ms") == "120", "delay"
    elif seen.body:
        assert seen.seconds >= 0.7 * len(BODY) / 1024 / RATE, "%.3f s" % seen.seconds
    if mode == "latency" or seen.body:
        check_marked(seen, mode)


def check_truncated(seen, kind):
    whole = original(kind)
    assert whole.startswith(seen.body) and len(seen.body) < len(whole), "%d of %d bytes" % (len(seen.body), len(whole))
    if kind in ("length", "one"):
        assert len(seen.body) == len(whole) // 2 and int(seen.fields["content-length"]) == len(whole), "%d of %d bytes" % (len(seen.body), len(whole))
    if kind == "chunked":
        assert seen.fields.get("transfer-encoding") == "chunked" and seen.body, "fields"


def check_corrupted(seen, kind):
    whole = original(kind)
    assert len(seen.body) == len(whole) and seen.body != whole, "%d of %d bytes, changed: %s" % (len(seen.body), len(whole), seen.body != whole)
    framing = {"chunked": seen.fields.get("transfer-encoding") == "chunked", "closed": "content-length" not in seen.fields}
    assert framing.get(kind, seen.fields.get("content-length") == str(len(whole))), "framing"
    left = [name for name in DIGESTS if name.lower() in seen.fields]
    assert not left, "still there: %s" % left


def check_row(port, mode, kind, expected):
    """One row with both clients; the text of the row, or its failure."""
    curl_exit, exception, calls, status = expected
    seen = {"curl": with_curl(port, mode, kind), "python": with_python(port, mode, kind)}
    for client, want in (("curl", curl_exit), ("python", exception)):
        s = seen[client]
        assert s.how == want, "%s: %s instead of %s (%r)" % (client, s.how, want, s)
        assert s.calls == calls, "%s: upstream called %d times, not %d" % (client, s.calls, calls)
        if status is None:
            status = int(kind) if kind in ("204", "304") else 200
        assert s.status == status, "%s: status %d instead of %d" % (client, s.status, status)
        try:
            if mode == "off" or (mode in ("truncate", "corrupt") and kind in BODILESS):
                check_untouched(s, kind)
            elif mode in ("latency", "bandwidth"):
                check_slow(s, mode, kind)
            elif "status" in mode:
                check_injected(s, mode, kind)
            elif mode == "truncate":
                check_truncated(s, kind)
                check_marked(s, mode)
            elif mode == "corrupt":
                check_corrupted(s, kind)
                check_marked(s, mode)
        except AssertionError as wrong:
            raise AssertionError("%s: %s: %r" % (client, wrong, s))
    return "%-13s %-8s %4s  %-21s %6s  %d" % (mode, kind, curl_exit, exception, status or "-", calls)


HEADINGS = "%-13s %-8s %4s  %-21s %6s  %s" % ("mode", "reply", "curl", "python", "status", "upstream")


def table(port, rows):
    """Runs the rows, a few at once; fails with all that went wrong."""
    lines, wrong = [None] * len(rows), []
    queue = iter(enumerate(rows))
    lock = threading.Lock()

    def work():
        while True:
            with lock:
                i, row = next(queue, (None, None))
            if row is None:
                return
            try:
                lines[i] = check_row(port, *row)
            except Exception as failure:  # the other rows are of interest too
                wrong.append("%s %s: %s" % (row[0], row[1], failure if isinstance(failure, AssertionError) else repr(failure)))
    in_threads([work] * 6)
    for line in lines:
        if line:
            note(line)
    assert not wrong, "%d of %d rows:\n     %s" % (len(wrong), len(rows), "\n     ".join(sorted(wrong)))


@case
def without_the_real_reply():
    need("curl")
    p = proxy({"rules": no_reply_rules()})
    note(HEADINGS)
    rows = [(mode, kind, expected) for mode, expected in NO_REPLY.items() for kind in KINDS]
    table(p.port, rows)
    totals = p.totals()
    each = 2 * len(KINDS)  # two clients
    assert [totals[k] for k in ("reset", "close", "hang", "error", "latency")] == [2 * each] * 4 + [each], totals
    assert totals["bandwidth"] == each and totals["skipped"] in (0, each // 2), totals
    assert p.logged_faults() == each * (len(NO_REPLY) - 1), "the log tells of %d faults" % p.logged_faults()


def damage(mode):
    need("curl")
    p = proxy({"rules": [error("truncate", "truncate"), error("corrupt", "corrupt")]})
    kinds = KINDS + ["empty", "one"]
    rows = []
    for kind in kinds:
        how = WHOLE if mode == "corrupt" or kind in BODILESS else CUT[kind]
        rows.append((mode, kind, (*how, 1, None)))
    table(p.port, rows)
    for _ in range(3):  # the connections of the upstream are in order
        seen = with_python(p.port, "off", "length")
        assert seen.how == "-" and seen.calls == 1, seen
        check_untouched(seen, "length")
    totals = p.totals()
    assert totals[mode] == 2 * len(kinds) and totals["skipped"] == 2 * len(BODILESS), totals
    assert totals["upstream_errors"] == 0, totals


@case
def truncated():
    damage("truncate")


@case
def corrupted():
    damage("corrupt")


@case
def damage_after_post_and_on_kept_connections():
    p = proxy({"rules": [error("truncate", "truncate"), error("corrupt", "corrupt", errorWhen="after")]})
    connection = connect(p.port)
    for kind in ("length", "chunked", "one"):  # a corrupted reply keeps its framing, so the connection can go on
        for _ in range(3):
            reply = ask(connection, "/corrupt/" + kind, "POST", BODY)
            assert reply.mark == "corrupt" and len(reply.body) == len(original(kind)) and reply.body != original(kind), (kind, reply.headers)
        assert ask(connection, "/off/" + kind).body == original(kind)
    connection.close()
    different = {once(p.port, "/corrupt/length").body == once(p.port, "/corrupt/length").body for _ in range(4)}
    connection = connect(p.port)
    try:
        ask(connection, "/truncate/chunked", "POST", BODY)
        raise AssertionError("a truncated reply looks whole")
    except http.client.IncompleteRead:
        pass
    note("corrupt: %s" % ("the same bytes each time" if different == {True} else "bytes differ from time to time"))
    p.stop()


@case
def fail_option_and_urllib():
    """As scripts use them: curl -f, and urllib's exceptions."""
    need("curl")
    p = proxy({"rules": no_reply_rules()})
    url = "http://127.0.0.1:%d/%s/length?" % (p.port, "%s") + next(NAMES)
    done = subprocess.run([tool("curl"), "-sf", "-o", "-", "-w", "%{http_code} %{size_download}", url % "status"], capture_output=True, timeout=15)
    assert (done.returncode, done.stdout.split()[0]) == (22, b"503"), done
    try:
        urllib.request.urlopen(url % "status", timeout=15)
        raise AssertionError("no HTTPError")
    except urllib.error.HTTPError as error_seen:
        assert (error_seen.code, error_seen.read(), error_seen.headers["Retry-After"]) == (503, b"out of order", "7")
    for mode, kind in (("reset", ConnectionResetError), ("close", http.client.RemoteDisconnected)):
        try:
            urllib.request.urlopen(url % mode, timeout=15)
            raise AssertionError("no exception")
        except (urllib.error.URLError, OSError) as error_seen:
            inner = getattr(error_seen, "reason", error_seen)
            assert type(inner) is kind, "%s: %r" % (mode, error_seen)
    p.stop()


@case
def errors_with_a_request_body():
    """A fault must not leave the request's body for the next request on the connection."""
    p = proxy({"rules": no_reply_rules()})
    connection = connect(p.port)
    for _ in range(3):
        for mode, status in (("status", 503), ("after-status", 418), ("off", 200)):
            name = next(NAMES)
            reply = ask(connection, "/%s/length?%s" % (mode, name), "POST", BODY[:20000])
            assert reply.status == status and upstream().calls[name] == (mode != "status"), (mode, reply.status)
            if reply.headers.get("connection") == "close":
                connection = connect(p.port)
    connection.close()
    p.stop()


# ---- delays --------------------------------------------------------------------------------------------------------

def delays(p, config, count):
    """Injected delays in ms, as replies say; each was really waited."""
    p.switch(dict({"enabled": True}, **config))

    def some():
        connection, got = connect(p.port), []
        for _ in range(count // 10):
            reply = ask(connection, "/slow/one?" + next(NAMES))
            said = int(reply.headers.get("x-chaos-delay-ms", 0))
            assert reply.status == 200 and reply.mark == ("latency" if "x-chaos-delay-ms" in reply.headers else None), reply.headers
            assert reply.seconds * 1000 >= said, "%d ms said, %.1f waited" % (said, reply.seconds * 1000)
            assert reply.seconds * 1000 < said + 500, "%d ms became %.0f" % (said, reply.seconds * 1000)
            got.append(said)
        connection.close()
        return got
    return sorted(sum(in_threads([some] * 10), []))


@case
def latency_kinds():
    p = proxy({})
    fixed = delays(p, {"latency": 60, "seed": 1}, 20)
    assert fixed == [60] * 20, fixed
    uniform = delays(p, {"latency": {"min": 20, "max": 80}, "seed": 1}, 100)
    assert 20 <= uniform[0] < 30 and 70 < uniform[-1] <= 80 and 35 <= uniform[50] <= 65, uniform
    mean = delays(p, {"latency": {"mean": 30, "max": 100}, "seed": 1}, 100)
    assert mean[-1] <= 100 and mean[0] < 10 and 8 <= mean[50] <= 40, mean
    points = delays(p, {"latency": {"p50": 20, "p95": 80, "p99": 120, "max": 150}, "seed": 1}, 100)
    assert points[-1] <= 150 and 25 <= sum(n <= 20 for n in points) <= 75 and sum(n > 20 for n in points[:95]) > 10, points
    share = delays(p, {"latency": 30, "latencyRate": 50, "seed": 1}, 100)
    assert set(share) == {0, 30} and 25 <= share.count(30) <= 75, share
    totals = p.totals()
    total = sum(fixed + uniform + mean + points + share)
    assert totals["delay_ms"] >= total - 300 and totals["delay_ms"] <= total * 1.5 + 1000, "%d ms counted of %d" % (totals["delay_ms"], total)
    note("latency, median and most: 60 fixed %d %d; 20..80 %d %d; mean 30 %d %d; p50 20, p95 80 %d %d; half of the requests %d of 100" %
         (fixed[10], fixed[-1], uniform[50], uniform[-1], mean[50], mean[-1], points[50], points[-1], share.count(30)))


@case
def bandwidth_in_time():
    """Paced within bounds however the reply is framed, alone and beside others; a delay and a pace together."""
    p = proxy({"bandwidth": RATE})
    least = len(BODY) / 1024 / RATE
    jobs = [lambda kind=kind: once(p.port, "/x/%s?%s" % (kind, next(NAMES))) for kind in ("length", "chunked", "closed") * 3]
    for reply in in_threads(jobs):
        assert reply.body == BODY and 0.75 * least <= reply.seconds <= 2 * least + 0.5, "%d bytes in %.2f s" % (len(reply.body), reply.seconds)
        assert reply.mark == "bandwidth", reply.headers
    p.switch({"enabled": True, "bandwidth": RATE, "latency": 200})
    reply = once(p.port, "/x/length")
    assert reply.mark == "latency" and 0.75 * least + 0.2 <= reply.seconds <= 2 * least + 0.7, (reply.mark, reply.seconds)
    p.stop()


# ---- who is hit ----------------------------------------------------------------------------------------------------

FAIL = {"enabled": True, "errorRate": 100, "errorStatus": 503}


def hit(port, path="/any/one", method="GET", headers=None):
    """Was this request failed? Told by status, mark and upstream alike."""
    name = next(NAMES)
    reply = once(port, path + "?" + name, method, headers=headers)
    assert (reply.status == 503) == (reply.mark == "error") == (upstream().calls[name] == 0), (reply.status, reply.mark)
    return reply.status == 503


@case
def match_exclude_rules():
    p = proxy({})
    p.switch(dict(FAIL, match={"methods": ["POST"], "paths": ["/a/*"], "headers": {"X-Team": "blue*"}}))
    blue = {"X-Team": "bluebird"}
    got = [hit(p.port, "/a/b", "POST", blue), hit(p.port, "/a/b", "GET", blue), hit(p.port, "/a/b/c", "POST", blue), hit(p.port, "/a/b", "POST"),
           hit(p.port, "/a/b", "POST", {"X-Team": "red"}), hit(p.port, "/%61/b", "POST", blue)]
    assert got == [True, False, False, False, False, True], got
    p.switch(FAIL)
    spared = ["/health", "/healthz", "/livez", "/readyz", "/ping"]
    assert [hit(p.port, path) for path in spared + ["/any"]] == [False] * 5 + [True]
    agents = ["ELB-HealthChecker/2.0", "kube-probe/1.29", "Amazon-Route53-Health-Check-Service (ref x)", "curl/8"]
    assert [hit(p.port, headers={"User-Agent": agent}) for agent in agents] == [False, False, False, True]
    p.switch(dict(FAIL, exclude=["/pay/**"]))
    assert [hit(p.port, path) for path in ("/pay/a/b", "/healthz", "/any")] == [False, True, True]
    p.switch(dict(FAIL, exclude=[]))
    assert [hit(p.port, path) for path in spared] == [True] * 5
    p.switch({"enabled": True, "errorStatus": 503, "rules": [
        {"name": "spare", "match": {"paths": ["/orders/vip/*"]}, "errorRate": 0},
        {"name": "orders", "match": {"paths": ["/orders/**"]}, "errorRate": 100},
        {"name": "writes", "match": {"methods": ["PUT", "POST"]}, "errorRate": 100}]})
    rows = [("/orders/vip/1", "GET"), ("/orders/vip/1", "POST"), ("/orders/1", "GET"), ("/users/1", "PUT"), ("/users/1", "GET")]
    got = [hit(p.port, path, method) for path, method in rows]
    assert got == [False, False, True, True, False], got
    p.switch(dict(FAIL, dryRun=True))
    assert not any([hit(p.port) for _ in range(5)]) and len(p.log("dryrun")) == 5
    totals = p.totals()
    assert totals["would_inject"] == 5 and totals["excluded"] == 5 + 3 + 1, totals


@case
def canary_and_instances():
    p = proxy({})
    slot = p.log("open")[0]["canary_slot"]
    for config, expected in (({"canary": 0}, False), ({"canary": slot}, False), ({"canary": slot + 1}, True), ({"canary": 100}, True),
                             ({"instances": ["other-*"]}, False), ({"instances": ["other", "peer-*"]}, True)):
        p.switch(dict(FAIL, **config))
        assert [hit(p.port) for _ in range(3)] == [expected] * 3, config
        assert (p.state() == "on") == expected, (config, p.state())
    p.stop()


@case
def budgets():
    p = proxy({})
    p.switch(dict(FAIL, maxFaults=7))
    assert [hit(p.port) for _ in range(12)] == [True] * 7 + [False] * 5
    p.switch({"enabled": True, "latency": 400, "maxConcurrent": 3})
    replies = in_threads([lambda: once(p.port, "/any/one?" + next(NAMES)) for _ in range(12)])
    delayed = sum(r.mark == "latency" for r in replies)
    assert delayed == 3, "%d at once, 3 allowed" % delayed
    assert max(r.seconds for r in replies if not r.mark) < 0.35, "the others waited too"
    assert once(p.port, "/any/one").mark == "latency", "a budget did not come back"
    totals = p.totals()
    assert totals["over_budget"] == 5 + 9, totals


@case
def client_gives_up_and_the_call_happens():
    """As with a really slow service: the client is gone, the work is done all the same."""
    need("curl")
    p = proxy({"latency": 500})
    name = next(NAMES)
    done = subprocess.run([tool("curl"), "-s", "--max-time", "0.15", "-d", "pay", "http://127.0.0.1:%d/pay/one?%s" % (p.port, name)])
    assert done.returncode == 28 and upstream().calls[name] == 0
    until(lambda: upstream().calls[name] == 1, 3, "the upstream got the call")
    p.stop()


if __name__ == "__main__":
    sys.exit(main())

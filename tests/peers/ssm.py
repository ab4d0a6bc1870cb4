#!/usr/bin/env python3
"""The SSM control plane against real peers: moto's Parameter Store, botocore, the aws-cli in both versions, libcurl; first call by
call, then chaos-proxy steered through it under load.

    tests/peers/ssm.py [--filter TEXT] [--build DIR] [-v]

Needs moto_server, botocore, an aws-cli, libcurl's headers and openssl; a missing one is a loud skip, with CHAOS_CI=1 a failure."""
import glob
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time

sys.dont_write_bytecode = True
import aws
import common
from aws import (KEYS, MARK, NOWHERE, REGION, Moto, Silent, SignatureChecker, Ssm, Tunnels, Watch, call, calls, env, fake_cli, has_curl, marked, moto,
                 need_aws, new_mark, path_with, profile)
from common import Proxy, Skip, Upstream, ask, case, connect, descriptors, dial, first_line, folder, in_threads, main, note, once, read_to_end, spawn, stop, until

NASTY = '{"quote \\" backslash \\\\ slash \\/":"tab \t line \n return \r bell \x07 delete \x7f",\'a\':"é ñ 漢 \u2028 😀 \U0010ffff"} $HOME `id` %s \\u0041 '
VALUES = {
    "config": '{"enabled":true,"latency":200,"errorRate":5,"errorStatus":503}',
    "nasty": NASTY,
    "file": "file:///etc/hostname",  # the aws-cli would read it, if it were an argument of its own
    "flag": "--no-verify-ssl",
    "big": ('{"note":"%s"}' % ("0123456789abcdef" * 600))[:8190] + '"}',
    "wide": "é\\\"" * 2730,  # 8,190 characters, and half of them are escaped
    "one": "x",
    "spaces": "  \n in between \t\n\n",
}
NO_RETRY = {"AWS_MAX_ATTEMPTS": "1"}  # of the aws-cli, which otherwise tries for longer than it is given


def both(function):
    """The same case by each way."""
    for way in ("curl", "cli"):
        def run(way=way):
            if way == "cli":
                need_aws()
            function(way)
        run.__name__ = "%s_by_%s" % (function.__name__, way)
        case(run)
    return function


def expect(result, code, *words):
    assert result.code == code, "%s instead of %s: %r" % (result.code, code, result)
    for word in words:
        assert re.search(word, result.err, re.I), "%r is not in %r" % (word, result.err)


def here(modified_ms):
    return abs(modified_ms / 1000 - time.time()) < 60


def matches(got, value, way, version, kind="String"):
    expect(got, "ok")
    assert got.value == value, "%r instead of %r" % (got.value[:300], value[:300])
    assert (got.type, got.way, got.version, got.terminated) == (kind, way, version, True), repr(got)
    assert here(got.modified_ms), "last modified at %d" % got.modified_ms


# ---- call by call --------------------------------------------------------------------------------------------------

@both
def round_trips(way):
    """Ours writes, botocore reads; and the other way round. By the aws-cli only those that are of interest there."""
    m = moto()

    def one(key):
        ours, theirs, value = "/%s/ours/%s" % (way, key), "/%s/theirs/%s" % (way, key), VALUES[key]
        put = call(way, "put", ours, m.env(), value, type="String")
        expect(put, "ok")
        assert (put.version, put.way) == (1, way), repr(put)
        stored = m.get(ours)
        assert (stored["Value"], stored["Type"]) == (value, "String"), repr(stored)
        m.put(theirs, "before")
        m.put(theirs, value)
        matches(call(way, "get", theirs, m.env()), value, way, 2)
    keys = list(VALUES) if way == "curl" else ["nasty", "file", "wide"]
    in_threads([lambda k=k: [one(key) for key in keys[k::2]] for k in range(2)])


@case
def with_the_aws_cli():
    """What ours writes the aws-cli reads, and the other way round; and a second put makes a second version."""
    need_aws()
    m = moto()

    def one(way):
        name = "/with/cli/" + way
        expect(call(way, "put", name, m.env(), NASTY, type="String"), "ok")
        assert call(way, "put", name, m.env(), NASTY + "2").version == 2
        read = aws.cli("ssm", "get-parameter", "--name", name, environment=m.env())["Parameter"]
        assert (read["Value"], read["Version"], read["Type"]) == (NASTY + "2", 2, "String"), read
        aws.cli("ssm", "put-parameter", "--overwrite", "--name", name, "--value", NASTY, environment=m.env())
        matches(call(way, "get", name, m.env()), NASTY, way, 3)
    in_threads([lambda: one("curl"), lambda: one("cli")])


@case
def with_the_other_aws_cli():
    """Version 2 tells dates in ISO 8601, of the local zone."""
    m = moto()
    found = {os.path.realpath(p) for d in os.environ["PATH"].split(":") + ["/usr/bin", "/usr/local/bin"] for p in glob.glob(d + "/aws")}
    second = [p for p in found if b"aws-cli/2" in subprocess.run([p, "--version"], capture_output=True, env=env()).stdout]
    if not second:
        raise Skip("not installed: an aws-cli of version 2")
    environment = m.env(PATH=path_with(second[0]), TZ="America/Bogota", AWS_ENDPOINT_URL=None)

    def one(name, zone):
        expect(call("cli", "put", name, dict(environment, TZ=zone), NASTY, type="SecureString", endpoint=m.url), "ok")
        matches(call("cli", "get", name, dict(environment, TZ=zone), endpoint=m.url), NASTY, "cli", 1, "SecureString")
    in_threads([lambda: one("/v2/a", "America/Bogota"), lambda: one("/v2/b", "Asia/Kolkata")])
    listed, none = in_threads([lambda: call("cli", "list", "/v2/", environment, endpoint=m.url),
                               lambda: call("cli", "get", "/v2/none", environment, endpoint=m.url)])
    assert sorted(listed.value.split()) == ["/v2/a", "/v2/b"], repr(listed)
    expect(none, "config not found", "ParameterNotFound")


@both
def secure_strings(way):
    m, ours, theirs = moto(), "/secure/ours/" + way, "/secure/theirs/" + way
    m.put(theirs, "secret", kind="SecureString")
    matches(call(way, "get", theirs, m.env()), "secret", way, 1, "SecureString")
    expect(call(way, "put", ours, m.env(), "mine", type="SecureString"), "ok")
    expect(call(way, "put", ours, m.env(), "mine too"), "ok")  # no type: it stays what it is
    stored = m.get(ours)
    assert (stored["Type"], stored["Value"], stored["Version"]) == ("SecureString", "mine too", 2), stored


@both
def types_as_aws_wants_them(way):
    """A new parameter needs a type, an old one keeps its own: moto is not strict here, the fake is."""
    s = Ssm()
    environment = env(s.port, **NO_RETRY)
    new = call(way, "put", "/new", environment, "1")
    expect(new, "ok")
    assert s.types["/new"] == "String" and new.version == 1, (s.types, new)
    s.types["/old"], s.values["/old"] = "SecureString", ("0", 7)
    put = call(way, "put", "/old", environment, "1")
    expect(put, "ok")
    assert (s.types["/old"], s.values["/old"], put.version) == ("SecureString", ("1", 8), 8), (s.types, put)
    s.values["/raw"] = (NASTY, 3)  # AWS answers in UTF-8, moto in escapes
    got = call(way, "get", "/raw", environment)
    matches(got, NASTY, way, 3)
    assert not (new.err or put.err or got.err), "success leaves a text: %r %r %r" % (new, put, got)
    s.stop()


@both
def other_region_and_arn(way):
    m, name = moto(), "/regional/" + way
    there = m.client("ssm", region="eu-west-1")
    there.put_parameter(Name=name, Value='{"enabled":true,"latency":1}', Type="String")
    m.put(name, "before")
    m.put(name, "here")

    def by_flag():
        assert call(way, "get", name, m.env(), region="eu-west-1").value == '{"enabled":true,"latency":1}'

    def by_variable():
        assert call(way, "get", m.get(name)["ARN"], m.env(region=None, AWS_DEFAULT_REGION=REGION)).value == "here"
        assert call(way, "get", name + ":1", m.env()).value == "before"
        assert call(way, "get", name, m.env(AWS_REGION="eu-west-1", AWS_DEFAULT_REGION="eu-north-1")).value != "here"

    def by_source():
        watch = Watch(way, "ssm:%s?region=eu-west-1" % name, m.env())
        r = watch.refresh()
        assert (r.code, r.state, r.way, r.version) == ("ok", "on", way, 1), repr(r)
        watch.stop()
    in_threads([by_flag, by_variable, by_source])


@both
def missing_and_refused(way):
    m = moto()
    jobs = [lambda: expect(call(way, "get", "/none/" + way, m.env(**NO_RETRY)), "config not found", "ParameterNotFound"),
            lambda: expect(call(way, "put", "ssm-is-not-allowed", m.env(**NO_RETRY), "x", type="String"), "bad value", "prefixed"),
            lambda: expect(call(way, "get", "/none/" + way, m.env(region=None, **NO_RETRY)), "unreachable", "region"),
            lambda: expect(call(way, "get", "/none/" + way, m.env(keys=None, **NO_RETRY)), "access denied", "credentials")]
    in_threads([lambda k=k: [job() for job in jobs[k::2]] for k in range(2)])


@both
def lists(way):
    """25 names are three pages. A neighbour whose name begins alike is not below the path."""
    m, below = moto(), "/list-%s/" % way
    names = sorted(below + n for n in ["a", "b/c", "b/d/e"] + ["n%02d" % i for i in range(22)])
    for name in names + ["/list-%s-not/x" % way]:
        m.put(name, 'a value with "Name":"/no/name" in it, é\\ud800')
    jobs = [lambda: call(way, "list", below, m.env()), lambda: call(way, "list", "/list-nothing/", m.env())]
    full, empty = in_threads(jobs) if way == "cli" else [job() for job in jobs]
    expect(full, "ok")
    assert sorted(full.value.split("\n")) == [""] + names and full.terminated and full.way == way, repr(full)
    expect(empty, "ok")
    assert empty.value == "", repr(empty)
    if way == "curl":
        for cap in (1, 500):
            expect(call(way, "list", below, m.env(), cap=cap), "too large")
            expect(call(way, "get", names[0], m.env(), cap=min(cap, 100)), "too large")


@both
def who_may(way):
    """moto checks signatures and policies here, as AWS does."""
    m = moto()
    reader = m.user("reader-" + way, "ssm:GetParameter")
    keys, token = m.session("role-" + way, "ssm:*")
    name = "/who/may/" + way
    m.put(name, "secret")
    m.check_signatures(True)

    def allowed():
        matches(call(way, "get", name, m.env(keys=reader)), "secret", way, 1)
        expect(call(way, "put", "/who/role-" + way, m.env(keys=keys, token=token), NASTY), "ok")

    def refused(action, text=None, **options):
        return lambda: call(way, action, name, m.env(**options, **NO_RETRY), text)
    jobs = [allowed, refused("get", keys=(reader[0], "wrong")), refused("put", "x", keys=reader), refused("get", keys=keys, token="wrong")]
    if way == "curl":
        jobs += [refused("get", keys=keys), refused("get"), refused("list", keys=reader)]
    words = [None, "SignatureDoesNotMatch", "AccessDenied|not authorized", "InvalidClientTokenId", "InvalidClientTokenId", "InvalidClientTokenId",
             "AccessDenied|not authorized"]
    try:
        results = in_threads(jobs) if way == "cli" else [job() for job in jobs]
    finally:
        m.check_signatures(False)
    for result, word in list(zip(results, words))[1:]:
        expect(result, "access denied", word)


@case
def signatures():
    """Each signed request computed again with botocore; with a session token it must be signed too."""
    def one(way, token):
        s = SignatureChecker(token=token)
        s.values["/p"] = (NASTY, 4)
        matches(call(way, "get", "/p", env(s.port, token=token)), NASTY, way, 4)
        if way == "curl":
            expect(call(way, "put", "/é", env(s.port, token=token), VALUES["wide"], type="String"), "ok")
            assert s.values["/é"] == (VALUES["wide"], 1)
            matches(call(way, "get", "/p", env("http://localhost:%d/" % s.port, token=token)), NASTY, way, 4)
            expect(call(way, "get", "/p", env(s.port, token="other")), "access denied", "InvalidSignature")
            expect(call(way, "get", "/p", env(s.port, keys=(KEYS[0], "wrong"), token=token)), "access denied", "InvalidSignature")
            assert len(s.wrong) == 2, s.wrong
        else:
            assert not s.wrong, s.wrong
        s.stop()
    need_aws()
    in_threads([lambda: one("cli", None), lambda: (one("cli", "TOKEN+/=="), one("curl", None), one("curl", "TOKEN+/=="))])


FAILURES = [  # code, what the text must say, the answer
    ("config not found", "ParameterNotFound", Ssm.failure("ParameterNotFound", None)),
    ("config not found", "ParameterNotFound", Ssm.failure("ParameterNotFound", None, prefix="com.amazonaws.ssm#")),
    ("config not found", "ParameterVersionNotFound", Ssm.failure("ParameterVersionNotFound", "no 9")),
    ("throttled", "Rate exceeded", Ssm.failure("ThrottlingException", "Rate exceeded")),
    ("throttled", "Rate exceeded", Ssm.failure("ThrottlingException", "Rate exceeded", member="Message")),
    ("throttled", "TooManyUpdates", Ssm.failure("TooManyUpdates", "slowly")),
    ("access denied", "not authorized to perform: ssm", Ssm.failure("AccessDeniedException", "User: u is not authorized to perform: ssm:GetParameter")),
    ("access denied", "UnrecognizedClient", Ssm.failure("UnrecognizedClientException", "The security token included in the request is invalid.")),
    ("access denied", "expired", Ssm.failure("ExpiredTokenException", "The security token included in the request is expired")),
    ("access denied", "InvalidSignature", Ssm.failure("InvalidSignatureException", "Signature expired: 20260101T000000Z is now earlier than")),
    ("bad value", "ValidationException", Ssm.failure("ValidationException", "1 validation error detected")),
    ("unreachable", "500|InternalServerError", Ssm.failure("InternalServerError", "oops", 500)),
    ("unreachable", "503", (503, "<html>busy</html>")),
    ("unreachable", "", (200, "")),
    ("unreachable", "", (200, "garbage \x01\x02 {")),
    ("unreachable", "", (200, "{}")),
    ("unreachable", "", (200, '{"Parameter":{"Name":"/p"}}')),
    ("unreachable", "", (200, '{"Parameter":{"Name":"/p","Value":null,"Version":1}}')),
    ("unreachable", "", (200, '{"Parameter":{"Name":"/p","Value":{"enabled":true},"Version":1}}')),
    ("unreachable", "", (200, '{"Parameter":[{"Value":"x"}]}')),
    ("unreachable", "", (200, '{"Parameter":{"Value":"x"')),
    ("unreachable", "", (301, "", ("Location", "http://127.0.0.1:1/"))),
    ("unreachable", "", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{\"Parameter\":"),
    ("unreachable", "", b"nonsense\r\n\r\n"),
    ("unreachable", "", b""),
    ("too large|unreachable", "", (200, '{"Parameter":{"Value":"%s"}}' % ("x" * 3000000))),
]


@case
def what_aws_may_say():
    s = Ssm()
    s.values["/p"] = ("x", 1)
    for code, word, answer in FAILURES:
        s.say = answer
        got = call("curl", "get", "/p", env(s.port))
        assert re.fullmatch(code, got.code) and re.search(word, got.err, re.I) and got.way == "curl", "%s for %s: %r" % (code, str(answer)[:100], got)
        assert not re.search(r"[\x00-\x1f\x7f]", got.err), "control characters: %r" % got.err
    assert len(s.seen) == len(FAILURES), "%d requests for %d calls" % (len(s.seen), len(FAILURES))
    s.say = None
    matches(call("curl", "get", "/p", env(s.port)), "x", "curl", 1)
    s.stop()


@case
def what_aws_may_say_through_the_cli():
    need_aws()

    def one(row):
        s = Ssm()
        s.say = row[2]
        got = call("cli", "get", "/p", env(s.port, **NO_RETRY))
        assert got.code == row[0] and re.search(row[1], got.err, re.I), "%s for %s: %r" % (row[0], str(row[2])[:100], got)
        s.stop()
    rows = [FAILURES[i] for i in (3, 6, 9, 11)]
    in_threads([lambda k=k: [one(row) for row in rows[k::2]] for k in range(2)])


# ---- nobody there, nobody answers ----------------------------------------------------------------------------------

@both
def nobody_there(way):
    environment = env(1, PATH=os.environ["PATH"], **NO_RETRY)  # port 1 of loopback is closed
    got = call(way, "get", "/p", environment)
    expect(got, "unreachable", "connect")
    assert got.ms < 4000, repr(got)


@both
def no_answer(way):
    """Ends in time, several times over, and leaves nothing behind: no descriptor, no child, no process of its group."""
    s, mark, timeout = Silent(), new_mark(), 300 if way == "curl" else 1200
    results = calls(way, "get", "/p", env(s.port, **{MARK: mark}), timeout=timeout, times=4 if way == "curl" else 2)
    for got in results:
        expect(got, "unreachable")
        assert timeout - 50 <= got.ms <= timeout + 700, repr(got)
        assert got.fds == results[0].fds, "descriptors: %s" % [r.fds for r in results]
    assert len(s.seen) >= (4 if way == "curl" else 1), "it never got so far as to ask"
    until(lambda: not marked(mark), 1, "the aws-cli is gone")
    s.stop()


CLI = [  # a script in place of the aws-cli; the code, what the text must say; kept to its time-out or not
    ('echo "{\\"Parameter\\":{\\"Value\\":\\"v\\",\\"Version\\":2,\\"Type\\":\\"String\\"}}"', "ok", "", False),
    ("echo garbage", "unreachable", "", False),
    ("exit 0", "unreachable", "", False),
    ("yes", "unreachable|too large", "", None),
    ("yes >&2", "unreachable", "", True),
    ("head -c 3000000 /dev/zero >&2; exit 1", "unreachable", "", False),
    ("echo; echo 'An error occurred (ParameterNotFound) when calling the GetParameter operation: ' >&2; exit 254", "config not found", "ParameterNotFound", False),
    ("echo 'An error occurred (ThrottlingException) when calling' >&2; exit 255", "throttled", "Throttling", False),
    ("echo '{\"Parameter\":{\"Value\":\"v\"}}'; exit 3", "unreachable", "", False),
    ("kill -9 $$", "unreachable", "", False),
    ("kill -SEGV $$", "unreachable", "", False),
    ("trap '' TERM INT HUP; sleep 600; sleep 600", "unreachable", "killed", True),
    ("sleep 600 & (sleep 600 & sleep 600) & echo '{}'", "unreachable", "", None),
    ("exec >&- 2>&-; sleep 600", "unreachable", "", True),
    ("cat; echo '{\"Parameter\":{\"Value\":\"in the end\"}}'", "ok", "", False),  # its stdin is empty
]


@case
def strange_clis():
    """Whatever stands in PATH as aws: an answer in time, nothing left behind."""
    timeout = 700

    def one(script, code, word, waits):
        mark = new_mark()
        got = calls("cli", "get", "/p", env(1, PATH=fake_cli(script), **{MARK: mark}), timeout=timeout, times=2)
        for g in got:
            assert re.fullmatch(code, g.code) and re.search(word, g.err, re.I) and g.way == "cli", "%s for %s: %r" % (code, script, g)
            assert g.ms <= timeout + 800 and waits in (None, g.ms >= timeout), "%s: %d ms" % (script, g.ms)
            assert g.fds == got[0].fds, "%s: descriptors %s" % (script, [x.fds for x in got])
        until(lambda: not marked(mark), 1, "all that %s started is gone" % script)
    in_threads([lambda k=k: [one(*row) for row in CLI[k::4]] for k in range(4)])


@case
def no_cli():
    """Without any way the text says what there is not."""
    for path in (tempfile.mkdtemp(dir=folder()), "/nonexistent", ""):
        for action in ("get", "put", "list"):
            got = call("cli", action, "/p", env(1, PATH=path), "x")
            assert got.code != "ok" and re.search("aws-cli|aws.*PATH", got.err) and got.ms < 500, repr(got)
    got = call("curl", "get", "/p", env(1, PATH="/nonexistent", keys=None))
    assert got.code != "ok" and "aws-cli" in got.err and "credentials" in got.err, repr(got)
    not_a_program = os.path.dirname(aws.written("#!/bin/sh\n", 0o644, "aws"))
    got = call("cli", "get", "/p", env(1, PATH=not_a_program))
    assert got.code not in ("ok", "config not found") and "aws" in got.err, repr(got)


@case
def bad_arguments():
    """Refused before anything is asked."""
    s = Ssm()
    for code, name, options in (("bad argument", "", {}), ("bad argument", "/p", {"cap": 0}), ("bad argument", "/" + "p" * 2048, {}),
                                ("value out of range", "/p", {"timeout": 99}), ("value out of range", "/p", {"timeout": 600001}),
                                ("value out of range", "/p", {"timeout": -1})):
        for action in ("get", "list"):
            got = call("curl", action, name, env(s.port, PATH=NOWHERE), **options)
            assert got.code == code and got.err and not s.seen, (name[:10], options, got)
    s.stop()


@case
def the_command_line():
    """No shell, no file:// of the aws-cli, region and endpoint as flags; a value goes in whole."""
    where = tempfile.mkdtemp(dir=folder())
    script = 'for a in "$@"; do printf "%%s\\0" "$a" >> %s/argv; done\necho "{\\"Version\\":1,\\"Parameters\\":[]}"' % where

    def argv(*arguments, **options):
        got = call(*arguments, **options)
        assert got.code in ("ok", "unreachable"), repr(got)
        with open(where + "/argv") as f:
            words = f.read().split("\0")[:-1]
        os.remove(where + "/argv")
        return words, json.loads(words[words.index("--cli-input-json") + 1])

    path = fake_cli(script)
    name = "/a; touch %s/no $(id) 'é\"\\" % where
    words, sent = argv("cli", "get", name, env("http://127.0.0.1:1/x", PATH=path))
    assert words[:2] == ["ssm", "get-parameter"] and sent == {"Name": name, "WithDecryption": True}, (words, sent)
    assert words[words.index("--region") + 1] == REGION and words[words.index("--endpoint-url") + 1] == "http://127.0.0.1:1/x", words
    assert words[words.index("--output") + 1] == "json", words
    for value in ("file:///etc/hostname", NASTY):
        words, sent = argv("cli", "put", "/p", env(1, PATH=path), value, type="SecureString")
        assert words[:2] == ["ssm", "put-parameter"], words
        assert sent == {"Name": "/p", "Value": value, "Type": "SecureString", "Overwrite": True}, sent
    words, sent = argv("cli", "list", "/p/", env(1, PATH=path))
    assert words[:2] == ["ssm", "get-parameters-by-path"] and sent == {"Path": "/p/", "Recursive": True}, (words, sent)
    assert os.listdir(where) == [], os.listdir(where)
    ssm, other = "http://127.0.0.1:2", "http://127.0.0.1:3"
    for more, options, expected in (({"AWS_ENDPOINT_URL_SSM": ssm, "AWS_ENDPOINT_URL": other}, {}, ssm), ({"AWS_ENDPOINT_URL": other}, {}, other),
                                    ({"AWS_ENDPOINT_URL_SSM": ssm}, {"endpoint": other}, other), ({}, {}, None),
                                    ({"AWS_ENDPOINT_URL": ssm, "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true"}, {}, None)):
        words, _ = argv("cli", "get", "/p", env(PATH=path, region=None, **more), **options)
        given = words[words.index("--endpoint-url") + 1] if "--endpoint-url" in words else None
        assert given == expected and "--region" not in words, (more, words)


@case
def where_curl_goes():
    """Which endpoint; AWS's own host is only named to an HTTP proxy of the test, and never asked for."""
    first, second, tunnels = Ssm(), Ssm(), Tunnels()
    first.values["/p"], second.values["/p"] = ("first", 1), ("second", 1)
    for more, options, expected in (({"AWS_ENDPOINT_URL_SSM": first.url, "AWS_ENDPOINT_URL": second.url}, {}, "first"),
                                    ({"AWS_ENDPOINT_URL": second.url}, {}, "second"), ({"AWS_ENDPOINT_URL": first.url}, {"endpoint": second.url}, "second")):
        assert call("curl", "get", "/p", env(**more), **options).value == expected, (more, options)
    more = {"AWS_ENDPOINT_URL": first.url, "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true", "https_proxy": tunnels.url}
    expect(call("curl", "get", "/p", env(**more)), "unreachable")
    expect(call("curl", "get", "/p", env(region="cn-north-1", https_proxy=tunnels.url)), "unreachable")
    assert tunnels.hosts() == ["ssm.us-east-1.amazonaws.com:443", "ssm.cn-north-1.amazonaws.com.cn:443"], tunnels.seen
    for fake in (first, second, tunnels):
        fake.stop()


@both
def over_tls(way):
    if way == "curl":
        TLS.append(Moto(tls=True, keep=True))
        TLS[0].put("/tls", "safe")
    if not TLS:
        raise Skip("moto with TLS did not start")
    jobs = [lambda: matches(call(way, "get", "/tls", TLS[0].env(AWS_CA_BUNDLE=TLS[0].bundle)), "safe", way, 1),
            lambda: expect(call(way, "get", "/tls", TLS[0].env(**NO_RETRY)), "unreachable", "certificate|SSL")]
    in_threads(jobs)


TLS = []


# ---- a handle on ssm: ----------------------------------------------------------------------------------------------

ON = {"enabled": True, "errorRate": 50, "errorStatus": 503}


@both
def how_long_it_lives(way):
    """The lease runs from the parameter's own date; an age of 61 minutes is over before it began."""
    s = Ssm()
    watch = Watch(way, "ssm:/p", env(s.port))
    s.values["/p"] = (ON, 5, time.time() - 61 * 60)
    r = watch.refresh()
    assert (r.code, r.state, r.version, r.way) == ("ok", "expired", 5, way) and "lease" in r.reason, repr(r)
    modified = time.time() - 59 * 60
    s.values["/p"] = (ON, 6, modified)
    r = watch.refresh()
    assert (r.state, r.version) == ("on", 6) and abs(r.end_ms / 1000 - modified - 3600) < 1, repr(r)
    line = watch.log("config")[-1]
    assert (line["config_version"], line["way"]) == (6, way), line
    if way == "curl":
        r = watch.refresh(shift=62)
        assert r.state == "expired", repr(r)
        s.values["/p"] = (ON, 7, time.time())  # put again, the same text: a new lease
        assert watch.refresh().state == "on"
        for expires, state in (("never", "on"), (int(time.time()) + 3600, "on"), ("2026-01-01T00:00:00Z", "expired")):
            s.values["/p"] = (dict(ON, expiresAt=expires), 8, time.time() - 3 * 3600)
            r = watch.refresh()
            assert r.state == state, (expires, r)
    watch.stop()
    s.stop()


@case
def fails_safe():
    """Not found is off, invalid is off, all else is the last good one for max_stale."""
    s = Ssm()
    watch = Watch("curl", "ssm:/p", env(s.port), ttl=10000, stale=20000)
    assert (watch.opened.state, watch.opened.code) == ("off", "ok"), repr(watch.opened)
    r = watch.refresh()
    assert (r.code, r.state, r.fetch_errors) == ("config not found", "off", 0) and "ParameterNotFound" in r.problem, repr(r)
    for failure, code in ((Ssm.failure("ThrottlingException", "Rate exceeded"), "throttled"), (Ssm.failure("AccessDeniedException", "no"), "access denied"),
                          ((503, "busy"), "unreachable"), (b"", "unreachable"), ((200, "{}"), "unreachable")):
        s.say, s.values["/p"] = None, (ON, 1, time.time())
        r = watch.refresh()
        assert (r.code, r.state, r.problem) == ("ok", "on", ""), repr(r)
        s.say = failure
        r = watch.refresh(shift=25)
        assert (r.code, r.state, r.version) == (code, "on", 1) and r.problem, repr(r)
        r = watch.refresh(shift=6)
        assert (r.code, r.state) == (code, "stale"), repr(r)
        s.say, s.values["/p"] = None, (ON, 2, time.time())
        assert watch.refresh().state == "on", "the lease or the failures of before still count"
        del s.values["/p"]
        r = watch.refresh()
        assert (r.code, r.state) == ("config not found", "off"), repr(r)
    for wrong in ("{", "", "null", "{\"enabled\":\"yes\"}", "{\"enable\":true}", "x" * 8000):
        s.values["/p"] = (ON, 3)
        assert watch.refresh().state == "on"
        s.values["/p"] = (wrong, 4)
        r = watch.refresh()
        assert r.state == "invalid" and r.code != "ok" and r.problem, (wrong, r)
        assert watch.lines[-1]["level"] == "error", watch.lines[-1]
    s.values["/p"] = ({"enabled": False}, 5)
    assert watch.refresh().state == "off"
    watch.stop()
    s.stop()


@case
def how_often_by_which_way():
    """By the aws-cli a config that is on is good for 15 s, else for 10 s; max_stale comes on top."""
    s, broken = Ssm(), tempfile.mkdtemp(dir=folder()) + "/broken"
    s.values["/p"] = (ON, 1)
    script = """[ -e %s ] && exit 1\necho '{"Parameter":{"Value":"{\\\\"enabled\\\\":true}","Version":1}}'""" % broken
    for way, seconds in (("cli", 75), ("curl", 70)):
        s.say, watch = None, Watch(way, "ssm:/p", env(s.port, PATH=fake_cli(script)))
        assert watch.refresh().state == "on", watch.lines
        s.say = (503, "busy")
        with open(broken, "w"):
            assert watch.refresh(shift=seconds - 2).state == "on", watch.lines
        r = watch.refresh(shift=3)
        assert (r.state, r.way) == ("stale", way), repr(r)
        watch.stop()
    s.stop()


@case
def strange_sources():
    for source in ("ssm:", "ssm:?region=us-east-1", "ssm:/p?version=3", "ssm:/p?region=", "appconfig:", "appconfig:a/b", "appconfig:a/b/c/d", "appconfig:a//c",
                   "appconfig:/b/c", "appconfig:a/b/"):
        watch = Watch("cli", source, env())
        assert watch.opened.code == "bad argument" and watch.opened.err, (source, watch.opened)
        watch.stop()


# ---- chaos-proxy steered through it --------------------------------------------------------------------------------

NAME = "/proyecto-grupo-7/prod/chaos"
TTL, STALE = 1.0, 2.0


class SsmProxy(Proxy):
    """chaos-proxy on NAME. with .admin, a port."""

    def __init__(self, upstream, environment, **options):
        super().__init__(upstream.port, config=None, env=environment, ttl=int(TTL * 1000),
                         args=["--config", "ssm:" + NAME, "--max-stale", "%dms" % (STALE * 1000), "--admin", "127.0.0.1:0"], **options)
        found = re.fullmatch(r"chaos-proxy admin on 127\.0\.0\.1:(\d+)\n", first_line(self.process))
        assert found, "no admin line"
        self.admin = int(found.group(1))

    def page(self, path):
        return once(self.admin, path).body.decode()


class Traffic:
    """Two clients that ask all the time, on connections they keep. Each reply is kept: when it was asked for, when it was there,
    and if it was injected."""

    def __init__(self, port):
        self.port, self.replies, self.broken, self.halt = port, [], [], threading.Event()
        self.threads = [threading.Thread(target=self.run, daemon=True) for _ in range(2)]
        for thread in self.threads:
            thread.start()

    def run(self):
        try:
            connection = connect(self.port)
            while not self.halt.wait(0.02):
                reply = ask(connection, "/")
                if (reply.status, reply.mark, reply.body) != (200, None, b"ok") and (reply.status, reply.mark) != (503, "error"):
                    self.broken.append("%d %s %r" % (reply.status, reply.mark, reply.body[:60]))
                self.replies.append((reply.began, time.monotonic(), reply.mark is not None))
            connection.close()
        except Exception as error:  # whatever it is, a request was lost
            self.broken.append(repr(error))

    def injected(self):
        return [r for r in list(self.replies) if r[2]]

    def finish(self):
        self.halt.set()
        for thread in self.threads:
            thread.join(5)
        assert not self.broken, "%d of %d replies are wrong: %s" % (len(self.broken), len(self.replies), self.broken[:3])


class Fleet:
    """One proxy that goes by libcurl, one by the aws-cli, and traffic through both."""

    def __init__(self, endpoint):
        self.upstream = Upstream()
        self.proxies = {"curl": SsmProxy(self.upstream, env(endpoint)),
                        "cli": SsmProxy(self.upstream, env(endpoint, keys=None, AWS_SHARED_CREDENTIALS_FILE=profile()))}
        self.traffic = {way: Traffic(p.port) for way, p in self.proxies.items()}
        self.took = {}

    def on(self, since, within=None):
        for way, traffic in self.traffic.items():
            bound = within or TTL + (1 if way == "curl" else 2)
            until(lambda: any(r[0] >= since for r in traffic.injected()), since + bound - time.monotonic(), "faults by " + way)

    def gone(self, what, since, within, slack):
        """Faults that began before the deadline, and then no more. Half of the replies are injected while on."""
        for way, traffic in self.traffic.items():
            deadline = since + within + slack[way == "cli"]
            until(lambda: time.monotonic() - max(r[0] for r in traffic.injected()) > 0.3, deadline + 0.3 - time.monotonic(),
                  "%s: faults by %s are gone" % (what, way))
            self.took.setdefault(what, {})[way] = max(r[1] for r in traffic.injected()) - since

    def states(self, state):
        for way, p in self.proxies.items():
            until(lambda: p.state() == state, 2, "%s is %s (%s)" % (way, state, p.state()))

    def signal(self, number):
        for p in self.proxies.values():
            p.signal(number)


@case
def steered_under_load():
    """On, off, delete, break, throttled, lost: faults are gone within TTL + 1 s, or max_stale + TTL, and no request is lost."""
    need_aws()
    if has_curl() is None:
        raise Skip("not installed: libcurl")
    m = Moto()
    front = Proxy(m.port, ttl=60000)  # this proxy makes the control plane itself fail
    m.put(NAME, ON)
    fleet = Fleet(front.port)
    fleet.on(time.monotonic(), 5)
    for way, p in fleet.proxies.items():
        page = json.loads(p.page("/config"))
        assert (page["way"], page["version"], page["state"], page["config"]["errorRate"]) == (way, 1, "on", 50), page
        assert re.search(r'chaos_info{[^}]*way="%s"' % way, p.page("/metrics")) and "chaos_config_version 1.0\n" in p.page("/metrics"), p.page("/metrics")[:200]
        assert p.log("config")[-1]["config_version"] == 1 and p.log("config")[-1]["way"] == way, p.log("config")

    def now(action):
        action()
        return time.monotonic()
    prompt = (1, 2)  # beyond the TTL; the aws-cli needs a second to start when the machine is busy
    fleet.gone("off", now(lambda: m.put(NAME, {"enabled": False})), TTL, prompt)
    fleet.states("off")
    fleet.on(now(lambda: m.put(NAME, ON)))
    fleet.gone("deleted", now(lambda: m.delete(NAME)), TTL, prompt)
    fleet.states("off")
    fleet.on(now(lambda: m.put(NAME, ON)))
    fleet.gone("broken", now(lambda: m.put(NAME, '{"enabled":true,')), TTL, prompt)
    fleet.states("invalid")
    fleet.on(now(lambda: m.put(NAME, ON)))
    lost = (1, 1)  # state alone ends it: the aws-cli has no part in that
    since = now(lambda: front.switch({"enabled": True, "errorRate": 100, "errorStatus": 400,
                                      "errorBody": '{"__type":"ThrottlingException","message":"Rate exceeded"}'}))
    fleet.on(since + STALE - 1 - 0.5, 3)  # the last good config still holds
    fleet.gone("throttled", since, TTL + STALE, lost)
    fleet.states("stale")
    assert "throttled" in fleet.proxies["curl"].log("fetch-failed")[-1]["error"].lower() or \
        "Rate exceeded" in fleet.proxies["curl"].log("fetch-failed")[-1]["error"], fleet.proxies["curl"].log("fetch-failed")[-1]
    front.switch({"enabled": False})
    fleet.signal(signal.SIGHUP)  # the next fetch of its own may be seconds away
    fleet.on(time.monotonic(), 12)
    since = now(m.stop)
    fleet.gone("stopped", since, TTL + STALE, lost)
    fleet.states("stale")
    for traffic in fleet.traffic.values():
        traffic.finish()
    for way, p in fleet.proxies.items():
        assert len(p.log("fallback")) == (way == "cli"), p.log("fallback")
        began = time.monotonic()
        p.signal(signal.SIGTERM)
        code = p.wait_exit(15)
        assert code == 0 and time.monotonic() - began < 2.5, "%s ends with %d after %.1f s" % (way, code, time.monotonic() - began)
    note("last fault after: " + "; ".join("%s %s s" % (what, " ".join("%s %.1f" % pair for pair in took.items())) for what, took in fleet.took.items()))
    note("%d requests, none lost" % sum(len(t.replies) for t in fleet.traffic.values()))


@case
def a_silent_control_plane():
    """The proxy listens, serves and ends all the same, while its fetches hang."""
    need_aws()
    s, upstream, mark = Silent(), Upstream(), new_mark()
    began = time.monotonic()
    environments = [env(s.port, **{MARK: mark}), env(s.port, keys=None, AWS_SHARED_CREDENTIALS_FILE=profile(), **{MARK: mark})]
    proxies = in_threads([lambda e=e: SsmProxy(upstream, e) for e in environments])
    assert time.monotonic() - began < 5, "listening after %.1f s" % (time.monotonic() - began)
    until(lambda: len(s.seen) >= 2, 5, "both fetches hang")
    for p in proxies:
        reply = once(p.port, "/")
        assert (reply.status, reply.body, reply.mark) == (200, b"ok", None)
        assert json.loads(p.page("/config"))["state"] == "off"
        p.signal(signal.SIGHUP)
    began = time.monotonic()
    for p in proxies:
        p.signal(signal.SIGTERM)
    assert [p.wait_exit(15) for p in proxies] == [0, 0]
    assert time.monotonic() - began < 2.5, "ended after %.1f s" % (time.monotonic() - began)
    until(lambda: not marked(mark), 1, "the aws-cli is gone too")
    s.stop()


@case
def going_off_while_a_fetch_hangs():
    """The kill switch is prompt, and age lets go of who is held."""
    s, upstream = Ssm(), Upstream()
    s.values[NAME] = ({"enabled": True, "errorRate": 100, "rules": [{"name": "held", "match": {"paths": ["/held"]}, "errorMode": "hang"},
                                                                   {"name": "rest"}]}, 1)
    p, old = SsmProxy(upstream, env(s.port)), SsmProxy(upstream, env(s.port))
    assert once(p.port, "/").mark == "error"
    held = dial(old.port)
    held.sendall(b"GET /held HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    until(lambda: old.log("inject"), 1, "it is held")
    since, s.say, asked = time.monotonic(), aws.SILENCE, len(s.seen)
    until(lambda: len(s.seen) > asked, 3, "a fetch hangs")
    p.signal(signal.SIGUSR1)
    until(lambda: once(p.port, "/").status == 200, 0.5, "no faults any more")
    assert json.loads(p.page("/config"))["state"] == "killed"
    until(lambda: p.state() == "killed", 1.5, "the log tells of it")
    read_to_end(held)
    held.close()
    assert time.monotonic() - since < TTL + STALE + 0.5, "held for %.1f s" % (time.monotonic() - since)
    until(lambda: old.state() == "stale", 1.5, "the log tells of it")
    p.stop()
    old.stop()
    s.stop()


@case
def the_wake_descriptor_while_a_fetch_hangs():
    """Event loops wait on it: it must tell of the end by age even if nobody else notices."""
    s = Ssm()
    s.values[NAME] = (ON, 1)
    process = spawn([aws.program("curl"), "wake", "ssm:" + NAME, "ttl=500", "stale=500"], env=env(s.port), stdout=subprocess.PIPE, text=True)
    assert json.loads(first_line(process))["on"]
    s.say = aws.SILENCE
    line = json.loads(first_line(process, 20))
    assert (line["on"], line["state"]) == (False, "stale") and line["ms"] < 1000 + 500, line
    stop(process)
    s.stop()


@case
def children_of_a_proxy():
    """The aws-cli is started from a thread with all signals blocked, in a process full of sockets: it must see none of that. And
    many fetches that fail leave nothing behind."""
    where = tempfile.mkdtemp(dir=folder())
    path = fake_cli("grep -E '^(SigBlk|SigIgn):' /proc/self/status > %s/signals\n(ls -l /proc/$$/fd > %s/fds)\n"
                    "echo $$ $(ps -o pgid= -p $$) > %s/group; echo x >> %s/times; exit 255" % (where, where, where, where))
    p = SsmProxy(Upstream(), env(1, keys=None, PATH=path))
    keep = [connect(p.port) for _ in range(3)]
    for connection in keep:
        assert ask(connection, "/").status == 200

    def times():
        return os.path.getsize(where + "/times") // 2
    until(lambda: times() >= 2, 5, "two fetches")
    def childless():
        return not subprocess.run(["ps", "-o", "pid=", "--ppid", str(p.pid)], capture_output=True).stdout.strip()
    until(childless, 3, "no child")
    before = descriptors(p.pid)
    for _ in range(10):
        seen = times()
        p.signal(signal.SIGHUP)
        until(lambda: times() > seen, 3, "one more fetch")
    until(childless, 2, "no child, no zombie")
    until(lambda: descriptors(p.pid) <= before, 3, "no descriptor more than %d" % before)  # one more fetch may have begun
    with open(where + "/signals") as f:
        masks = {line.split(":")[0]: int(line.split()[1], 16) for line in f}
    masks["SigIgn"] &= ~(3 << 31)  # glibc's own 32 and 33, which it never leaves to default
    assert masks == {"SigBlk": 0, "SigIgn": 0}, masks
    with open(where + "/fds") as f:
        fds = {int(line.split()[-3]): line.split()[-1] for line in f if " -> " in line}
    # The shell keeps its script open; it redirects in a child, so that what it moves aside does not look like one of ours.
    assert fds[0] == "/dev/null" and not [t for n, t in fds.items() if n > 2 and not t.startswith((where, os.path.dirname(path.split(":")[0])))], fds
    assert not any("socket:" in t for t in fds.values()), fds
    with open(where + "/group") as f:
        pid, group = f.read().split()
    assert pid == group, "pid %s in group %s" % (pid, group)
    for connection in keep:
        assert ask(connection, "/").status == 200
    p.stop()


@case
def checked_once():
    """chaos-proxy --check reads the parameter; --version names the ways."""
    m, proxy = moto(), os.path.join(common.BUILD, "chaos-proxy")

    def run(*arguments):
        return subprocess.run([proxy, *arguments], env=m.env(), capture_output=True, text=True, timeout=15)
    m.put("/check/good", {"enabled": True, "errorRate": 0, "latency": 20})
    m.put("/check/bad", '{"enabled":true,\n "latencey":20}')
    done = run("--check", "--config", "ssm:/check/good")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"enabled": True, "latency": 20}), done
    for name, words in (("bad", "line 2.*latencey"), ("none", "ParameterNotFound")):
        done = run("--check", "--config", "ssm:/check/" + name)
        assert (done.returncode, done.stdout) == (1, "") and re.search(words, done.stderr) and done.stderr.count("\n") == 1, done
    said = run("--version").stdout
    assert "cli" in said and ("curl" in said) == (has_curl() is not None) and "appconfig" in said, said


@case
def falls_back_once():
    """Without credentials for libcurl the aws-cli's own profile serves, which is said once; without anything that is said, too."""
    if has_curl() is None:
        raise Skip("not installed: libcurl")
    need_aws()
    m = moto()
    m.put("/fallback", ON)
    watch = Watch("curl", "ssm:/fallback", m.env(keys=None, AWS_SHARED_CREDENTIALS_FILE=profile()))
    for _ in range(3):
        r = watch.refresh()
        assert (r.code, r.state, r.way) == ("ok", "on", "cli"), repr(r)
    assert len(watch.log("fallback")) == 1 and "credentials" in watch.log("fallback")[0]["reason"], watch.lines
    watch.stop()
    watch = Watch("curl", "ssm:/fallback", m.env(region=None, AWS_CONFIG_FILE=aws.written("[default]\nregion = us-east-1\n")))
    assert (watch.refresh().way, watch.log("fallback")[0]["reason"]) == ("cli", "no region"), watch.lines
    watch.stop()
    assert NOWHERE == os.environ["HOME"], "the environment of this test is not clean"


if __name__ == "__main__":
    sys.exit(main(200))

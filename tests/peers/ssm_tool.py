#!/usr/bin/env python3
"""chaos-ssm against a real Parameter Store (moto), read back with the real aws-cli: every command, flag and exit code, every refusal,
and what happens when SSM answers late, wrong, or to somebody else first."""
import datetime
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import aws
import common
from common import Proxy, Upstream, case, folder, free_port, main, note, once, spawn, until
from aws import moto

ENV = dict(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="seventeen-secrets", AWS_DEFAULT_REGION="us-east-1")
DONE, COULD_NOT, USAGE, REFUSED, NOT_FOUND, LOST_RACE = range(6)
OFF = '{"enabled":false}'
DENIED = (400, {"__type": "com.amazonaws.ssm#AccessDeniedException", "message": "User u is not authorized"})
THROTTLED = (400, {"__type": "ThrottlingException", "message": "Rate exceeded"})
BROKEN = (400, {"__type": "SerializationException", "message": "no such thing"})


def tool():
    return os.path.join(common.BUILD, "chaos-ssm")


# A chaos-ssm without libcurl runs the aws-cli for each call. One case does so; for the others, which are not about that, this
# stands in: the real one takes half a second, and tries again what was throttled.
QUICK_AWS = """#!%s -SE
import http.client, json, os, sys
words = [w for w in sys.argv[3:] if w != "--no-paginate"]
flags = dict(zip(words[::2], words[1::2]))
action = "".join(w.title() for w in sys.argv[2].split("-"))
try:
    host = http.client.HTTPConnection(flags["--endpoint-url"].split("/")[2], timeout=10)
    host.request("POST", "/", os.fsencode(flags["--cli-input-json"]), {"Content-Type": "application/x-amz-json-1.1", "X-Amz-Target": "AmazonSSM." + action,
                 "Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/%%s/ssm/aws4_request" %% flags.get("--region")})
    reply = host.getresponse()
    text = reply.read().decode()
except OSError as error:
    sys.exit("Could not connect to the endpoint URL: %%s" %% error)
if reply.status == 200:
    print(text)
else:
    said = json.loads(text) if text.startswith("{") else {"__type": "%%d" %% reply.status, "message": text}
    sys.stderr.write("\\nAn error occurred (%%s) when calling the %%s operation: %%s\\n" %%
                     (said["__type"].split("#")[-1], action, said.get("message") or said.get("Message")))
    sys.exit(254)
""" % sys.executable
BUILT = []


def has_curl():
    if not BUILT:
        BUILT.append("ssm:curl" in subprocess.run([tool(), "--version"], capture_output=True, text=True, timeout=10).stdout)
        if not BUILT[0]:
            BUILT.append(os.path.dirname(aws.written(QUICK_AWS, 0o755, "aws")) + ":" + os.environ["PATH"])
    return BUILT[0]


def environment(**more):
    path = os.environ["PATH"] if has_curl() else BUILT[1]
    return {**aws.env(keys=None, region=None), **ENV, "PATH": path, **more}


def raw(*args, stdin="", **more):
    done = subprocess.run([tool(), *args], input=stdin, capture_output=True, text=True, timeout=25, env=environment(**more))
    assert ENV["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr, "the secret key is told"
    assert all(line.startswith("chaos-ssm: ") for line in done.stderr.splitlines()), "stderr is %r" % done.stderr
    return done


def ssm(code, *args, url=None, **more):
    """Runs it against moto, or what stands at url; its stdout and stderr."""
    done = raw(*args, "--endpoint-url", url or moto().url, **more)
    equal(done.returncode, code, "exit code of %s, which says %s" % (" ".join(args)[:150], done.stderr))
    return done.stdout, done.stderr


def equal(got, want, what=""):
    assert got == want, "%s: %r, not %r" % (what, got, want)


def has(text, *words):
    for word in words:
        assert word in text, "%r is not in %r" % (word, text)


def stored(name):
    """As the aws-cli reads it."""
    return aws.cli("ssm", "get-parameter", "--name", name, "--with-decryption",
                   environment={**environment(AWS_ENDPOINT_URL=moto().url), "PATH": os.environ["PATH"]})["Parameter"]


def value(name):
    found = moto().get(name)
    return found and found["Value"]


def utc(seconds):
    return datetime.datetime.fromtimestamp(time.time() + seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def seconds_to(end):
    return datetime.datetime.fromisoformat(end.replace("Z", "+00:00")).timestamp() - time.time()


def change(out):
    """The lines old, new and rollback of stdout, in this order."""
    found = re.fullmatch(r"old: (.*?)\nnew: (.*?)\n(?:rollback: (.*)\n)?", out, re.S)
    assert found, "stdout is %r" % out
    return found.groups()


class Relay(aws.Fake):
    """Stands before moto. hooks: {action: function of the request's JSON}; what one returns is answered instead."""

    def __init__(self, **hooks):
        moto()  # a Skip must come from here, not from a thread
        super().__init__()
        self.hooks, self.actions = hooks, []

    def answer(self, seen):
        action = seen.fields["x-amz-target"].split(".")[1]
        self.actions.append(action)
        hook = self.hooks.get(action)
        return (hook and hook(json.loads(seen.body))) or self.forward(seen)

    @staticmethod
    def forward(seen):
        fields = {k: v for k, v in seen.fields.items() if k in ("authorization", "content-type", "x-amz-target", "x-amz-date")}
        try:
            with urllib.request.urlopen(urllib.request.Request(moto().url, seen.body, fields), timeout=10) as reply:
                return reply.status, reply.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()


def always(answer):
    return lambda _: answer


# ---- usage ---------------------------------------------------------------------------------------------------------

COMMANDS = "put get set enable disable check explain watch".split()
FLAGS = """--name --path --region --endpoint-url --value --type --expires --no-expiry --force --request --header --key --instance
    --interval --version --help""".split()


@case
def help_and_version():
    for args in (["--help"], ["put", "--help"], ["disable", "--help", "--name", "/x"]):
        done = raw(*args)
        equal((done.returncode, done.stderr), (0, ""))
        equal(re.findall(r"^  ([a-z][a-z-]*) ", done.stdout, re.M), COMMANDS + ["chaos-ssm"] * 2, "commands, and two examples")
        equal(re.findall(r"^  (--[a-z-]+)", done.stdout, re.M), FLAGS)
        has(done.stdout, "0 done; 1 could not", "2 bad usage; 3 refused", "4 nothing stored", "5 written")
        assert max(map(len, done.stdout.splitlines())) <= 132
    done = raw("--version")
    with open(os.path.join(common.ROOT, "chaos.h")) as f:
        version = re.search(r'#define CHAOS_VERSION +"(.*)"', f.read()).group(1)
    equal((done.returncode, done.stdout.splitlines()[0]), (0, "chaos-ssm " + version))
    has(done.stdout, "ssm:cli")


@case
def bad_usage():
    put, get = ["put", "--name", "/x", "--value", "{}"], ["get", "--name", "/x"]
    rows = [
        ([], "command"), (["start"], "'start'"), (["--name", "/x"], "--name"), (["--frce"], "--frce"), ([*get, "--frce"], "--frce"),
        (["get"], "--name"), (["put", "--name", "/x"], "--value"), (["put", "--value", "{}"], "--name"), (["get", "--name"], "NAME"),
        (["get", "--name="], "NAME"), ([*get, "more"], "'more'"), ([*get, "--force"], "--force does not go with get"),
        ([*get, "--expires", "5m"], "--expires"), ([*put, "--type", "Strin"], "Strin"), ([*put, "--expires", "soon"], "'soon'"),
        ([*put, "--expires", "5"], "'5'"), ([*put, "--expires", "1.5h"], "1.5h"), ([*put, "--expires", "-5m"], "-5m"),
        ([*put, "--expires", "999h"], "999h"), ([*put, "--expires", "99999999999999999999"], "9999"), ([*put, "--expires", "m"], "'m'"),
        ([*put, "--force=1"], "--force"), ([*put, "--expires", "5m", "--no-expiry"], "--no-expiry"),
        (["enable", "--name", "/x"], "--expires"), (["enable", "--name", "/x", "--no-expiry"], "--no-expiry"),
        (["disable"], "--path"), (["disable", "--name", "/x", "--path", "/y/"], "both"), (["disable", "--path", "y/"], "y/"),
        (["disable", "--name", "/x", "--force"], "--force"), (["set", "--name", "/x"], "KEY=VALUE"),
        (["set", "errorRate", "--name", "/x"], "'errorRate'"), (["set", "=5", "--name", "/x"], "'=5'"),
        (["set", "match.paths=5", "--name", "/x"], "match.paths"), (["set", 'a"b=5', "--name", "/x"], 'a"b'),
        (["check"], "FILE"), (["check", "a", "b"], "FILE"), (["check", ""], "FILE"), (["check", "{}", "--name", "/x"], "--name"),
        (["explain", "--value", "{}"], "--request"), (["explain", "--value", "{}", "--request", "get /x"], "--request"),
        (["explain", "--value", "{}", "--request", "GET x"], "--request"), (["explain", "--request", "GET /x"], "--name"),
        (["explain", "--request", "GET /x", "--value", "{}", "--name", "/x"], "both"),
        (["explain", "--request", "GET /x", "--value", "{}", "--header", "none"], "none"),
        (["watch"], "--name"), (["watch", "--name", "/x", "--interval", "99ms"], "99ms"),
    ]
    for args, word in rows:
        done = raw(*args, AWS_ENDPOINT_URL="http://127.0.0.1:1")
        equal((done.returncode, done.stdout, done.stderr.count("\n")), (USAGE, "", 1), "%s says %r" % (args, done.stderr))
        has(done.stderr, word)


@case
def check():
    path = os.path.join(folder(), "config.json")
    text = '\n{ "errorRate": 5,\n  "enabled": true }\n'
    with open(path, "w") as f:
        f.write(text)
    for args, stdin in ((["check", path], ""), (["check", "@" + path], ""), (["check", "-"], text), (["check", text], "")):
        done = raw(*args, stdin=stdin)
        equal((done.returncode, done.stdout, done.stderr), (DONE, '{"enabled":true,"errorRate":5}\n', ""), str(args))
    with open(path, "w") as f:
        f.write('{\n  "enabled": true,\n  "erorRate": 5\n}\n')
    for args in ((path,), ("-",)):
        done = raw("check", *args, stdin=open(path).read())
        equal((done.returncode, done.stdout), (REFUSED, ""))
        has(done.stderr, args[0], "line 3, column 4", "erorRate", 'did you mean "errorRate"')
    for bad, words in (("", "line 1"), ('{"enabled":1}', "enabled"), ("\ufeff{}", "BOM"), ("{}\0", "line 1"), ('{"note":"%s"}' % ("x" * 70000), "65536")):
        done = raw("check", "-", stdin=bad)
        equal((done.returncode, done.stdout), (REFUSED, ""), bad[:20])
        has(done.stderr, words)
    done = raw("check", folder() + "/none.json")
    equal((done.returncode, done.stdout), (COULD_NOT, ""))
    has(done.stderr, "none.json", "No such file")
    done = raw("check", '{"note":"{{x}}","errorBody":"%s","rules":[%s]}' % ("x" * 1000, ",".join(
        '{"name":"%d","errorBody":"%s"}' % (n, "y" * 1000) for n in range(4))))
    equal(done.returncode, DONE)
    has(done.stderr, "bytes, SSM takes 4096", '"{{"')


# ---- put, get ------------------------------------------------------------------------------------------------------

@case
def put_a_new_one_then_roll_back():
    config, real = '{"enabled":true, "errorRate":5, "owner":"ana"}', {"PATH": os.environ["PATH"]}
    out, err = ssm(DONE, "put", "--name", "/first/chaos", "--value", config, **real)
    old, new, rollback = change(out)
    equal(old, "none")
    has(err, "no end was given", "30 minutes", "--expires", "wrote version 1 of /first/chaos in us-east-1 (%s): on until 20" % moto().url)
    found = stored("/first/chaos")
    equal((found["Value"], found["Type"], found["Version"]), (new, "String", 1))
    end = json.loads(new)["expiresAt"]
    equal(new, config[:-1] + ', "expiresAt":"%s"}' % end, "the rest of the text")
    assert 1790 < seconds_to(end) <= 1801, end
    out, err = ssm(DONE, "get", "--name", "/first/chaos", **real)
    equal(out, new + "\n")
    has(err, "/first/chaos in us-east-1 (%s)" % moto().url, "version 1, String, by ", "changed 20", "on until %s (30 min)" % end)
    note("by " + re.search(r", by (\w+),", err).group(1))
    equal(rollback, "%s disable --name /first/chaos --region us-east-1 --endpoint-url %s" % (tool(), moto().url))
    bare = {k: v for k, v in environment(**real).items() if k != "AWS_DEFAULT_REGION"}
    done = subprocess.run(["sh", "-c", rollback], capture_output=True, text=True, timeout=20, env=bare)
    equal(done.returncode, DONE, done.stderr)
    equal(stored("/first/chaos")["Value"], new.replace("true", "false"))


@case
def put_from_a_file_and_stdin():
    path = os.path.join(folder(), "put.json")
    text = '{\n  "enabled": true,\n  "latency": 100\n}'
    with open(path, "w") as f:
        f.write(text + "\n\n")
    for source, stdin in (("@" + path, ""), ("-", text + "\n")):
        out, err = ssm(DONE, "put", "--name", "/put/file", "--value", source, "--expires", "10m", stdin=stdin)
        new = value("/put/file")
        end = json.loads(new)["expiresAt"]
        equal(new, text[:-2] + ',\n  "expiresAt": "%s"\n}' % end, "laid out like the rest")
        equal(change(out)[1], new)
        assert 590 < seconds_to(end) <= 601, end
        assert "no end was given" not in err, err
    done = raw("put", "--name", "/put/file", "--value", "@" + folder() + "/none.json")
    equal((done.returncode, done.stdout), (COULD_NOT, ""))


@case
def put_ends():
    name = ["put", "--name", "/put/ends"]
    for args, config, want in (
            (["--no-expiry"], '{"enabled":true}', "never"), (["--no-expiry"], '{"enabled":true,"expiresAt":"never"}', "never"),
            (["--expires", "24h"], '{"enabled":true}', 86400), (["--expires", "90s"], '{"enabled":true,"expiresAt":"never"}', 90),
            (["--expires", "2m"], '{"enabled":true,"expiresAt":"2020-01-01T00:00:00Z"}', 120),
            ([], '{"enabled":true,"expiresAt":"%s"}' % utc(3600), 3600), ([], '{"enabled":true,"expiresAt":%d}' % (time.time() + 3600), None)):
        out, _ = ssm(DONE, *name, "--value", config, *args)
        equal(change(out)[1], value("/put/ends"))
        end = json.loads(value("/put/ends"))["expiresAt"]
        if isinstance(want, int):
            assert want - 10 < seconds_to(end) <= want + 1, (config, end)
        else:
            equal(end, want or int(re.search(r"\d{9,}", config).group()))


@case
def put_keeps_the_type():
    for kind in ("SecureString", "String"):
        name = "/put/type/" + kind
        ssm(DONE, "put", "--name", name, "--value", '{"enabled":true}', "--type", kind)
        ssm(DONE, "set", "errorRate=5", "--name", name)
        ssm(DONE, "disable", "--name", name)
        found = stored(name)
        equal((found["Type"], json.loads(found["Value"])["errorRate"], found["Version"]), (kind, 5, 3))
        has(ssm(DONE, "get", "--name", name)[1], "version 3, %s," % kind, ", off")


@case
def put_refuses():
    big = '{"enabled":%s,"rules":[' + ",".join('{"name":"%d","errorBody":"%s"}' % (n, "y" * 1000) for n in range(4)) + "]}"
    moto().put("/put/no", OFF)
    for config, args, words in (
            ('{"enabled":tru}', [], "line 1, column 12"), ('{"enabled":true,\n "errorRate":"5"}', [], 'line 2, column 15: "errorRate"'),
            ('{"enabled":true,"enabled":false}', [], "duplicate"), ("", [], None), ('{"enabled":true,"bogus":1}', [], "bogus"),
            ('{"enabled":false,"bogus":1}', [], "bogus"), (big % "true", [], "SSM takes 4096"), (big % "false", [], "SSM takes 4096"),
            ('{"enabled":true,"note":"{{x}}"}', [], "{{"), ('{"enabled":true,"expiresAt":"never"}', [], "--no-expiry"),
            ('{"enabled":true,"expiresAt":"%s"}' % utc(86500), [], "24 h"), ('{"enabled":true}', ["--expires", "1441m"], "24 h"),
            ('{"enabled":true,"expiresAt":"%s"}' % utc(-1), [], "past"), ('{"enabled":true,"expiresAt":"1999-01-01T00:00:00Z"}', [], "2000")):
        source = ["--value", "-"] if not config else ["--value", config]
        out, err = ssm(REFUSED, "put", "--name", "/put/no", *source, *args)
        equal(out, "")
        has(err, "refused: ", words or "line 1")
    equal((moto().get("/put/no")["Version"], value("/put/no")), (1, OFF), "nothing was written")
    for extra in (0, 1):  # exactly 4,096 bytes, and one more
        names = ",".join('{"name":"%d","errorBody":"%s"}' % (n, "y" * 1000) for n in range(3))
        config = '{"enabled":true,"expiresAt":"never","rules":[%s,{"name":"z","errorBody":"%%s"}]}' % names
        config %= "z" * (4096 - len(config) + 2 + extra)
        equal(len(config), 4096 + extra)
        ssm(REFUSED if extra else DONE, "put", "--name", "/put/size", "--value", config, "--no-expiry")


@case
def off_is_never_refused():
    held = '{"enabled":true,"owner":"ana","expiresAt":"never"}'
    for config in ('{"enabled":false,"owner":"bob","expiresAt":"never"}', '{"enabled":false,"expiresAt":"%s"}' % utc(90000 * 10),
                   '{"expiresAt":"2020-01-01T00:00:00Z"}', "{}", OFF):
        moto().put("/off/held", held)
        out, err = ssm(DONE, "put", "--name", "/off/held", "--value", config)
        equal(value("/off/held"), config)
        equal(change(out)[:2], (held, config))
        assert "no end" not in err, err
    for args in (["enabled=false"], ["enabled=false", "owner=bob"]):
        moto().put("/off/held", held)
        ssm(DONE, "set", *args, "--name", "/off/held")
        equal(json.loads(value("/off/held"))["enabled"], False)


@case
def held_by_another():
    mine, end = ["--value", '{"enabled":true,"owner":"ana","name":"one","errorRate":9}'], utc(3000)
    theirs = '{"enabled":true,"owner":"bob","name":"two","expiresAt":"%s"}' % end
    for there, refused in (
            (theirs, True), (theirs.replace("bob", "ana"), True), (theirs.replace("two", "one"), True),
            ('{"enabled":true,"dryRun":true,"owner":"bob","expiresAt":"never"}', True), ('{"enabled":true,"owner":"bob"}', True),
            (theirs.replace("bob", "ana").replace("two", "one"), False), (theirs.replace("true", "false"), False),
            (theirs.replace(end, utc(-5)), False), ("broken {", False), ('{"owner":"bob"}', False)):
        moto().put("/held", there)
        out, err = ssm(REFUSED if refused else DONE, "put", "--name", "/held", *mine)
        if refused:
            equal((out, value("/held")), ("", there))
            has(err, "/held in us-east-1", "held", "--force")
    moto().put("/held", theirs)
    has(ssm(REFUSED, "put", "--name", "/held", *mine)[1], "'bob'", "'two'", end)
    has(ssm(REFUSED, "set", "owner=ana", "--name", "/held")[1], "'bob'")
    ssm(DONE, "set", "errorRate=3", "--name", "/held")
    ssm(DONE, "put", "--name", "/held", *mine, "--force")
    equal(json.loads(value("/held"))["owner"], "ana")


@case
def what_is_not_a_config_is_not_shown():
    moto().put("/db/password", "hunter2-hunter2", "SecureString")
    out, err = ssm(DONE, "put", "--name", "/db/password", "--value", '{"enabled":true}')
    equal(change(out)[0], "15 bytes that are no chaos config, not shown")
    assert "hunter" not in out + err
    moto().put("/db/password", "hunter2-hunter2", "SecureString")
    out, err = ssm(DONE, "get", "--name", "/db/password")
    equal(out, "hunter2-hunter2\n")
    has(err, "invalid, so it is off: line 1, column 1")
    assert "hunter" not in err, err
    moto().put("/db/escape", '{"enabled":true,"owner":"\\u001b[2J","expiresAt":"never"}')
    out, err = ssm(REFUSED, "put", "--name", "/db/escape", "--value", '{"enabled":true}')
    assert "\x1b" not in out + err, "control bytes reach the terminal"


@case
def get_tells_the_state():
    for config, want in ((OFF, "off"), ("{}", "off"), ('{"enabled":true}', r"on until \S+Z \((60|59) min, its lease\)"),
                         ('{"enabled":true,"expiresAt":"never"}', "on without an end"),
                         ('{"enabled":true,"dryRun":true,"expiresAt":"%s"}' % utc(600), r"dry-run until \S+ \(10 min\)"),
                         ('{"enabled":true,"expiresAt":"2026-01-01T00:00:00Z"}', "expired since 2026-01-01T00:00:00Z"),
                         ('{"enabled":\n true,}', r"invalid, so it is off: line 2, column 7: .*")):
        version = moto().put("/get/state", config)
        out, err = ssm(DONE, "get", "--name", "/get/state")
        equal(out, config + "\n")
        assert re.fullmatch(r"chaos-ssm: \S+ in us-east-1 \(\S+\): version %d, String, by \w+, changed 20\S+Z, %s\n" % (version, want), err), err
    out, err = ssm(NOT_FOUND, "get", "--name", "/get/nothing")
    equal(out, "")
    has(err, "/get/nothing in us-east-1 (%s)" % moto().url, "--region")


# ---- set, enable, disable ------------------------------------------------------------------------------------------

@case
def set_keeps_the_rest():
    end = '"expiresAt":"%s"' % utc(1000)
    for before, args, after in (
            ('{"enabled":true,"latency":5,%s}', ["latency=200"], '{"enabled":true,"latency":200,%s}'),
            ('{"enabled":true,"latency":5,%s}', ["latency="], '{"enabled":true,%s}'),
            ('{"enabled":true, %s ,\n "latency" : 5 }', ["latency="], '{"enabled":true, %s }'),
            ('{ "latency" : 5 , "enabled":true, %s}', ["latency=", "seed=7"], '{ "enabled":true, %s, "seed":7}'),
            ('{\n\t"enabled": true,\n\t%s,\n\t"errorRate": 5\n}\n', ["seed=1"], '{\n\t"enabled": true,\n\t%s,\n\t"errorRate": 5,\n\t"seed": 1\n}\n'),
            ('{"note":"a \\"latency\\":1, {[\\\\","enabled":true,%s}', ["latency=7"], '{"note":"a \\"latency\\":1, {[\\\\","enabled":true,%s,"latency":7}'),
            ('{"rules":[{"name":"latency","latency":{"min":1,"max":2}}],"enabled":true,%s,"latency":{"mean":5,"max":9}}', ["latency=7", "rules="],
             '{"enabled":true,%s,"latency":7}'),
            ('{"enabled":true,%s}', ['match={"paths":["/a","/b"]}', "exclude=[]", "errorMode=reset", "note=it's me", 'errorBody="a \\"b"'],
             '{"enabled":true,%s,"match":{"paths":["/a","/b"]},"exclude":[],"errorMode":"reset","note":"it\'s me","errorBody":"a \\"b"}'),
            ('{"enabled":true,%s}', ['note="5"', "errorBody=caf\xe9 {", "dryRun=true", "canary="],
             '{"enabled":true,%s,"note":"5","errorBody":"caf\xe9 {","dryRun":true}')):
        moto().put("/set/keep", before % end)
        out, _ = ssm(DONE, "set", *args, "--name", "/set/keep")
        equal(value("/set/keep"), after % end, "set %s" % args)
        equal(change(out)[:2], (before % end, after % end))
    moto().put("/set/keep", "{}")
    ssm(DONE, "set", "errorRate=5", "--name", "/set/keep")
    equal(value("/set/keep"), '{"errorRate":5}', "off stays off, and needs no end")
    out, err = ssm(DONE, "set", "enabled=true", "--name", "/set/keep", "--expires=5m")
    assert 290 < seconds_to(json.loads(value("/set/keep"))["expiresAt"]) <= 301
    has(out, "rollback: ")
    moto().put("/set/keep", '{"enabled":true,"errorRate":40,"expiresAt":"never"}')  # somebody has insisted: down must not need it again
    ssm(DONE, "set", "errorRate=0", "--name", "/set/keep")
    equal(value("/set/keep"), '{"enabled":true,"errorRate":0,"expiresAt":"never"}')


@case
def set_refuses():
    moto().put("/set/no", '{"enabled":true,"expiresAt":"%s"}' % utc(1000))
    for args, code, word in ((["errorRat=5"], REFUSED, "errorRate"), (["errorRate=500"], REFUSED, "0..100"), (["latency={"], USAGE, "latency"),
                             (["owner=5"], REFUSED, "owner"), (["expiresAt=never"], REFUSED, "--no-expiry"),
                             (["expiresAt=2026-01-01T00:00:00Z"], REFUSED, "past"), (["note={{x}}"], USAGE, "note"), (["note=x{{x}}"], REFUSED, "{{"),
                             (["note=" + "x" * 5000], USAGE, "note"), (["note=" + "x" * 2000], REFUSED, "note"),
                             (['note=say "x"'], USAGE, "note"), (["note=a\tb"], USAGE, "note"), (['note="x'], USAGE, "note"),
                             (["enabled=false", "bogus=1"], REFUSED, "bogus")):
        out, err = ssm(code, "set", *args, "--name", "/set/no")
        equal(out, "")
        has(err, word)
    equal(moto().get("/set/no")["Version"], 1)
    ssm(NOT_FOUND, "set", "errorRate=5", "--name", "/set/nothing")
    ssm(NOT_FOUND, "set", "enabled=false", "--name", "/set/nothing")
    moto().put("/set/no", '{"enabled":false,"expiresAt":"never"}')
    has(ssm(REFUSED, "set", "enabled=true", "--name", "/set/no")[1], "--no-expiry")
    moto().put("/set/no", '{"enabled":true,}')
    has(ssm(REFUSED, "set", "errorRate=5", "--name", "/set/no")[1], "line 1, column 17")
    ssm(DONE, "set", "enabled=false", "note=stopped", "--name", "/set/no")
    equal(value("/set/no"), '{"enabled":false,"note":"stopped"}')


@case
def enable_and_disable():
    text = '{ "enabled" : true, "errorRate": 7, "expiresAt": "%s", "owner": "ana" }' % utc(500)
    moto().put("/onoff", text)
    out, err = ssm(DONE, "disable", "--name", "/onoff")
    off = text.replace("true", "false")
    equal((change(out), stored("/onoff")["Value"]), ((text, off, None), off))
    has(err, "wrote version 2 of /onoff in us-east-1 (%s): off" % moto().url, "TTL")
    out, err = ssm(DONE, "enable", "--name", "/onoff", "--expires", "1h")
    on = json.loads(value("/onoff"))
    assert 3590 < seconds_to(on.pop("expiresAt")) <= 3601
    equal(on, {"enabled": True, "errorRate": 7, "owner": "ana"})
    has(err, "wrote version 3", "on until")
    has(out, "rollback: ")
    ssm(REFUSED, "enable", "--name", "/onoff", "--expires", "25h")
    ssm(NOT_FOUND, "enable", "--name", "/onoff/none", "--expires", "1h")
    moto().put("/onoff", "[]")
    ssm(REFUSED, "enable", "--name", "/onoff", "--expires", "1h")
    equal(value("/onoff"), "[]")


@case
def disable_whatever_is_stored():
    for there, want in (("{}", OFF), (OFF, OFF), ("broken {", OFF), ('{"enabled":true,}', OFF), ("[]", OFF), ("hunter2", OFF),
                        ('{"enabled":true,"later":1}', OFF), ('{"\\u0065nabled":true,"errorRate":5}', '{"enabled":false,"errorRate":5}'),
                        ('{"errorRate":5}', '{"errorRate":5,"enabled":false}'),
                        ('{"enabled":true,"expiresAt":"never","owner":"bob"}', '{"enabled":false,"expiresAt":"never","owner":"bob"}')):
        moto().put("/disable/any", there)
        out, err = ssm(DONE, "disable", "--name", "/disable/any")
        equal(value("/disable/any"), want, there)
        if want == OFF and there[:2] not in ("{}", OFF[:2]):
            has(err, "invalid", "safe default")
            assert there not in out + err, "%r is shown" % there
    moto().put("/disable/any", "broken {")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([tool(), "disable", "--name", "/disable/any", "--endpoint-url", moto().url], stdout=writer, stderr=writer, timeout=25,
                          env=environment())
    os.close(writer)
    equal((done.returncode, value("/disable/any")), (DONE, OFF), "nobody reads what it says")
    out, err = ssm(NOT_FOUND, "disable", "--name", "/disable/none", "--region", "eu-west-1")
    equal((out, value("/disable/none")), ("", None))
    has(err, "nothing is stored under /disable/none in eu-west-1 (%s)" % moto().url, "are off")


@case
def disable_when_ssm_does_not_answer_well():
    on = '{"enabled":true,"errorRate":5,"expiresAt":"never"}'
    relay = Relay()
    for answer, word in ((DENIED, "access denied"), (THROTTLED, "throttled"), (BROKEN, "no such thing"), ((200, "{}"), "unreachable"),
                         ((200, '{"Parameter":'), "unreachable")):
        moto().put("/disable/blind", on)
        relay.hooks = {"GetParameter": always(answer)}
        out, err = ssm(DONE, "disable", "--name", "/disable/blind", url=relay.url)
        equal((value("/disable/blind"), change(out)), (OFF, ("not readable", OFF, None)), word)
        has(err, word, "the safe default is written", "wrote version")
    moto().put("/disable/blind", on)
    puts = iter([THROTTLED, THROTTLED, None])
    relay.hooks = {"PutParameter": lambda _: next(puts)}
    ssm(DONE, "disable", "--name", "/disable/blind", url=relay.url)
    equal(value("/disable/blind"), on.replace("true", "false"), "a throttled write is tried again")
    moto().put("/disable/blind", on)
    pattern = (400, {"__type": "ParameterPatternMismatchException", "message": "no match"})
    relay.hooks = {"PutParameter": lambda body: None if body["Value"] == OFF else pattern}
    has(ssm(DONE, "disable", "--name", "/disable/blind", url=relay.url)[1], "the safe default is written")
    equal(value("/disable/blind"), OFF)
    moto().put("/disable/blind", on)
    relay.hooks = {"PutParameter": always(DENIED)}
    out, err = ssm(COULD_NOT, "disable", "--name", "/disable/blind", url=relay.url)
    equal((out, value("/disable/blind")), ("", on))
    has(err, "cannot write /disable/blind in us-east-1", "access denied", "ssm:PutParameter")
    relay.hooks = {"PutParameter": always((503, "<html>" + "x" * 9000))}
    has(ssm(COULD_NOT, "disable", "--name", "/disable/blind", url=relay.url)[1], "cannot write /disable/blind", "unreachable")
    relay.hooks = {"GetParameter": always(DENIED)}
    ssm(DONE, "set", "enabled=false", "--name", "/disable/blind", url=relay.url)
    equal(value("/disable/blind"), OFF)
    relay.stop()


@case
def off_of_every_size_and_spelling():
    """What one cannot write with this tool may be stored all the same, and has to be stopped."""
    moto().put("/off/escaped", '{ "\\u0065nabled": true, "errorRate": 7 }')
    ssm(DONE, "set", "enabled=false", "--name", "/off/escaped")
    equal(json.loads(value("/off/escaped")), {"enabled": False, "errorRate": 7})
    rules = ",".join('{"name":"r%d","errorRate":1,"match":{"paths":["/%s"]}}' % (n, "x" * 240) for n in range(15))
    large = '{"enabled":true,"expiresAt":"never","rules":[%s]}' % rules
    assert len(large) > 4096
    for stop in (["set", "enabled=false"], ["disable"]):
        moto().put("/off/large", large, tier="Advanced")
        ssm(DONE, *stop, "--name", "/off/large")
        equal(json.loads(value("/off/large")), {**json.loads(large), "enabled": False}, stop)
    kept = (400, {"__type": "ValidationException", "message": "This parameter uses the advanced-parameter tier. You can't downgrade a "
                  "parameter from the advanced-parameter tier to the standard-parameter tier."})
    relay = Relay(PutParameter=lambda body: None if body.get("Tier") == "Advanced" else kept)
    moto().put("/off/advanced", '{"enabled":true,"errorRate":5}', tier="Advanced")
    ssm(DONE, "disable", "--name", "/off/advanced", url=relay.url)
    equal((value("/off/advanced"), relay.actions.count("PutParameter")), ('{"enabled":false,"errorRate":5}', 2))
    relay.stop()


@case
def disable_below_a_path():
    on = '{"enabled":true,"errorRate":%d,"expiresAt":"never"}'
    for n in range(12):  # more than one page
        moto().put("/path/deep/%02d" % n, on % n)
    others = {"/path/broken": '{"enabled":true,', "/path/password": "hunter2", "/path/db": '{"host":"db"}', "/pathological": on % 50,
              "/path/secret": "p\\ss w0rd", "/path/flag": "feature-enabled", "/path/beta": '{"beta":{"enabled":true}}',
              "/path/newer": '{"enabled":true,"keyOfTomorrow":1}'}
    stopped = ("/path/broken", "/path/newer")
    for name, text in others.items():
        moto().put(name, text)
    relay = Relay(PutParameter=lambda body: DENIED if body["Name"] in ("/path/deep/03", "/path/deep/08") else None)
    out, err = ssm(COULD_NOT, "disable", "--path", "/path/", url=relay.url)
    for n in range(12):
        equal(value("/path/deep/%02d" % n), on % n if n in (3, 8) else (on % n).replace("true", "false"), n)
    for name, text in others.items():
        equal(value(name), OFF if name in stopped else text, name)
    has(err, "cannot write /path/deep/03", "cannot write /path/deep/08", "left as it is: /path/password", "left as it is: /path/db", "19 found")
    assert "hunter" not in out + err
    equal(out.count("new: "), 12)
    moto().put("/path/password", "hunter2")
    reads = iter([THROTTLED, THROTTLED, None])
    gone = (400, {"__type": "ParameterNotFound"})
    relay.hooks = {"GetParameter": lambda body: next(reads) if body["Name"] == "/path/password" else gone if body["Name"] == "/path/newer" else None}
    out, err = ssm(DONE, "disable", "--path", "/path/", url=relay.url)  # a read that is throttled, and one that comes too late
    equal(value("/path/password"), "hunter2", "what could not be read at once is kept")
    equal(json.loads(value("/path/deep/08")), {"enabled": False, "errorRate": 8, "expiresAt": "never"})
    has(err, "19 found below /path/ in us-east-1", "all are off")
    has(ssm(NOT_FOUND, "disable", "--path", "/path/none/")[1], "nothing is stored below /path/none/")
    relay.hooks = {"GetParametersByPath": always(DENIED)}
    has(ssm(COULD_NOT, "disable", "--path", "/path/", url=relay.url)[1], "access denied", "--name")
    pages = iter([None, DENIED])
    relay.hooks = {"GetParametersByPath": lambda _: next(pages)}
    for n in range(12):
        moto().put("/path/deep/%02d" % n, on % n)
    ssm(COULD_NOT, "disable", "--path", "/path/", url=relay.url)
    states = [json.loads(value("/path/deep/%02d" % n))["enabled"] for n in range(12)]
    assert 0 < sum(states) < 12, "what was listed before the listing failed is stopped: %s" % states
    relay.stop()


# ---- somebody else, or nobody --------------------------------------------------------------------------------------

@case
def lost_races():
    moto().put("/race", '{"enabled":true,"errorRate":1,"expiresAt":"%s"}' % utc(1000))
    relay = Relay()

    def between(text):
        def once(_):
            relay.hooks = {}
            if text:
                moto().put("/race", text)
            else:
                moto().delete("/race")
        relay.hooks = {"PutParameter": once}
    between('{"enabled":true,"errorRate":2,"owner":"bob"}')
    out, err = ssm(LOST_RACE, "put", "--name", "/race", "--value", '{"enabled":true,"errorRate":3}', url=relay.url)
    equal(json.loads(value("/race"))["errorRate"], 3)
    has(err, "lost a race", "1 was the version before, yours is 3", "/race:2", "disable")
    has(change(out)[2], "disable --name /race")
    has(ssm(DONE, "get", "--name", "/race:2")[0], "bob")
    between('{"enabled":true,"errorRate":2}')
    has(ssm(LOST_RACE, "set", "latency=5", "--name", "/race", url=relay.url)[1], "yours is 5")
    between('{"enabled":true,"errorRate":2}')
    ssm(LOST_RACE, "enable", "--expires", "5m", "--name", "/race", url=relay.url)
    between('{"enabled":true,"errorRate":2}')
    out, err = ssm(DONE, "disable", "--name", "/race", url=relay.url)
    has(err, "somebody else wrote version 8 in between; off is in force")
    equal(json.loads(value("/race"))["enabled"], False)
    between(None)
    ssm(LOST_RACE, "put", "--name", "/race", "--value", '{"enabled":true}', url=relay.url)
    moto().delete("/race")
    between('{"enabled":true}')
    ssm(LOST_RACE, "put", "--name", "/race", "--value", '{"enabled":true}', url=relay.url)
    ssm(DONE, "put", "--name", "/race", "--value", '{"enabled":true}', url=relay.url)
    relay.stop()


@case
def put_that_cannot_look_first():
    relay = Relay(GetParameter=always(DENIED))
    moto().put("/blind", OFF)
    out, err = ssm(COULD_NOT, "put", "--name", "/blind", "--value", '{"enabled":true}', url=relay.url)
    equal((out, value("/blind")), ("", OFF))
    has(err, "access denied", "nothing is written", "--force", "ssm:GetParameter")
    out, err = ssm(DONE, "put", "--name", "/blind", "--value", '{"enabled":true}', "--force", url=relay.url)
    equal((change(out)[0], json.loads(value("/blind"))["enabled"]), ("not readable", True))
    ssm(DONE, "put", "--name", "/blind", "--value", OFF, url=relay.url)
    equal(value("/blind"), OFF)
    ssm(COULD_NOT, "set", "errorRate=5", "--name", "/blind", url=relay.url)
    relay.hooks = {"PutParameter": always((400, {"__type": "ValidationException", "message": "1 validation error: not this"}))}
    out, err = ssm(REFUSED, "put", "--name", "/blind", "--value", '{"enabled":true}', url=relay.url)
    has(err, "cannot write /blind", "not this")
    relay.stop()


@case
def nobody_there():
    url = "http://127.0.0.1:%d" % free_port()
    for args in (["get"], ["disable"], ["put", "--value", '{"enabled":true}']):
        began = time.monotonic()
        out, err = ssm(COULD_NOT, *args, "--name", "/gone", url=url)
        equal(out, "")
        has(err, "/gone in us-east-1 (%s)" % url, "unreachable", "check the network")
        assert time.monotonic() - began < 15
    ssm(COULD_NOT, "disable", "--path", "/gone/", url=url)
    keyless = environment(PATH="/nonexistent")
    del keyless["AWS_ACCESS_KEY_ID"]
    done = subprocess.run([tool(), "get", "--name", "/x"], capture_output=True, text=True, timeout=20, env=keyless)
    equal((done.returncode, done.stdout), (COULD_NOT, ""))
    has(done.stderr, "no way to SSM", "no aws-cli", "install the aws-cli")


@case
def region_and_endpoint():
    name = "/odd/chaos"
    out = raw("put", "--name", name, "--value", '{"enabled":true}', "--region=eu-west-1", AWS_ENDPOINT_URL=moto().url)
    equal(out.returncode, DONE, out.stderr)
    has(out.stdout, "--region eu-west-1 --endpoint-url %s\n" % moto().url)
    has(raw("get", "--name", name, AWS_REGION="eu-west-1", AWS_ENDPOINT_URL="http://127.0.0.1:1", AWS_ENDPOINT_URL_SSM=moto().url).stderr,
        "/odd/chaos in eu-west-1 (%s): version 1," % moto().url)
    ssm(NOT_FOUND, "get", "--name", name)
    strange = os.path.join(folder(), "it's odd")
    os.makedirs(strange, exist_ok=True)
    link = os.path.join(strange, "chaos-ssm")
    if not os.path.exists(link):
        os.symlink(tool(), link)
    done = subprocess.run([link, "put", "--name", "/odd/two", "--value", '{"enabled":true}', "--endpoint-url", moto().url + "/?a=$b&c"],
                          capture_output=True, text=True, timeout=20, env=environment())
    equal(done.returncode, DONE, done.stderr)
    words = subprocess.run(["sh", "-c", "printf '%%s\\n' %s" % change(done.stdout)[2]], capture_output=True, text=True, timeout=5).stdout
    equal(words.splitlines(), [link, "disable", "--name", "/odd/two", "--region", "us-east-1", "--endpoint-url", moto().url + "/?a=$b&c"])


# ---- watch ---------------------------------------------------------------------------------------------------------

@case
def watch():
    relay = Relay()
    process = spawn([tool(), "watch", "--name", "/watched", "--interval", "100ms", "--endpoint-url", relay.url], stdout=subprocess.PIPE,
                    text=True, env=environment())

    def line(want):
        said = common.first_line(process, 15)
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ %s\n" % want, said), "it says %r, not %r" % (said, want)
        assert -10 < seconds_to(said.split(" ")[0]) <= 1
    line("config not found: .*")
    moto().put("/watched", OFF)
    line("version 1, off")
    moto().put("/watched", OFF)
    line("version 2, off")
    moto().put("/watched", '{"enabled":true,"expiresAt":"%s"}' % utc(3))
    line(r"version 3, on until \S+ \(0 min\)")
    line(r"version 3, expired since \S+")
    moto().put("/watched", '{"enabled":true,"dryRun":true}')
    line(r"version 4, dry-run until .*its lease\)")
    moto().put("/watched", "hunter2")
    line("version 5, invalid, so it is off: line 1, column 1: .*")
    for answer, want in ((DENIED, "access denied: .*"), (THROTTLED, "throttled: .*"), ((500, "oops"), "unreachable: .*")):
        relay.hooks = {"GetParameter": always(answer)}
        line(want)
        seen = len(relay.actions)
        until(lambda: len(relay.actions) >= seen + 3, 15, "it goes on looking")  # and says nothing more: the next line is another
    relay.hooks = {}
    line("version 5, invalid.*")
    moto().delete("/watched")
    line("config not found: .*")
    process.send_signal(signal.SIGTERM)
    equal(process.wait(10), 0)
    equal(process.stdout.read(), "")
    relay.stop()


@case
def watch_ends_at_once():
    silent = aws.Silent()
    for number in (signal.SIGINT, signal.SIGTERM):
        process = spawn([tool(), "watch", "--name", "/x", "--interval", "1h", "--endpoint-url", moto().url], stdout=subprocess.PIPE, text=True,
                        env=environment())
        has(common.first_line(process), "config not found")
        began = time.monotonic()
        process.send_signal(number)
        equal(process.wait(10), 0)
        assert time.monotonic() - began < 2, "an hour's pause holds it up"
    if has_curl():
        process = spawn([tool(), "watch", "--name", "/x", "--endpoint-url", silent.url], stdout=subprocess.PIPE, text=True, env=environment())
        until(lambda: silent.seen, 10, "it asks")
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        equal(process.wait(2), 0)
        equal(process.stdout.read(), "")
    silent.stop()


# ---- explain -------------------------------------------------------------------------------------------------------

WORD = 2 ** 64 - 1


def mix(x):
    x = (x + 0x9e3779b97f4a7c15) & WORD
    x = ((x ^ x >> 30) * 0xbf58476d1ce4e5b9) & WORD
    x = ((x ^ x >> 27) * 0x94d049bb133111eb) & WORD
    return x ^ x >> 31


def fnv(text):
    h = 0xcbf29ce484222325
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001b3) & WORD
    return h


def roll(seed, rule, key, purpose):
    """As the manual of chaos.h says, in 0..9999."""
    return (mix(((mix(seed ^ (fnv(rule) if rule else 0)) ^ fnv(key)) + purpose * 0xd1342543de82ef95) & WORD) >> 32) * 10000 >> 32


def explain(request, config, *args, code=DONE):
    """What it prints, as {first word: [rest]}; what this shell does is no part of it."""
    done = raw("explain", "--request", request, "--value", json.dumps(config) if isinstance(config, dict) else config, *args, CHAOS_DISABLE="1",
               CHAOS_INSTANCE="i-0")
    equal(done.returncode, code, done.stderr)
    said = {}
    for line in done.stdout.splitlines():
        word, rest = line.split(": ", 1)
        said.setdefault(word, []).append(rest)
    return said if code == DONE else done.stderr


ON = {"enabled": True, "expiresAt": "never"}


@case
def explain_rules_and_chances():
    rules = [{"name": "pay", "match": {"paths": ["/pay/*"], "methods": ["POST"]}, "errorRate": 20, "latency": {"min": 5, "max": 50}, "latencyRate": 50},
             {"name": "vip", "match": {"headers": {"x-user": "vip-*"}}, "errorRate": 100, "errorMode": "reset"}]
    config = {**ON, "match": {"headers": {"host": "*"}}, "rules": rules}
    host = ["--header", "Host: shop"]
    for request, headers, match, verdict in (
            ("POST /pay/1?x=2", host, "rule 1, 'pay'", "by these chances"), ("GET /pay/1", host, "none: no rule fits", "pass"),
            ("POST /pay/1/2", host, "none: no rule fits", "pass"), ("GET /", ["--header", "X-USER:  vip-7", *host], "rule 2, 'vip'", "by these chances"),
            ("POST /pay/1", [], "none: the top-level match does not fit", "pass")):
        said = explain(request, config, *headers)
        equal((said["match"], said["verdict"], said["state"]), ([match], [verdict], ["on without an end"]), request)
    said = explain("POST /pay/1", config, *host)
    equal(said["chances"], ["20 % error 503, 40 % delayed by 5 to 50 ms, 40 % neither"])
    has(said["roll"][0], "afresh")
    said = explain("GET /", {**ON, "errorRate": 10, "errorStatus": 429, "errorWhen": "after", "latency": {"p50": 1, "p95": 2, "p99": 3, "max": 4}})
    equal((said["match"], said["chances"]), (["the top level, there are no rules"],
                                             ["10 % error 429 after the handler, 90 % delayed by p50 1, p95 2, p99 3, at most 4 ms, 0 % neither"]))
    equal(explain("GET /", {**ON, "errorRate": 3, "errorMode": "hang", "bandwidth": 9})["chances"],
          ["3 % hang, 0 % delayed by 0 ms, 97 % neither; replies that are not failed are paced"])


@case
def explain_exclude_and_gates():
    config = {**ON, "errorRate": 100, "seed": 1}
    for request, args, spared in (("GET /healthz", [], True), ("GET /", ["--header", "User-Agent: kube-probe/1.30"], True), ("GET /", [], False)):
        said = explain(request, config, "--key", "k", *args)
        equal(said["verdict"], ["pass, because exclude spares this request; else: error 503" if spared else "error 503"])
        equal("exclude" in said, spared)
    equal(explain("GET /healthz", {**config, "exclude": []}, "--key", "k")["verdict"], ["error 503"])
    for more, gate in (({"enabled": False}, "the config is not on"), ({"expiresAt": "2026-01-01T00:00:00Z"}, "the config is not on"),
                       ({"dryRun": True}, "it is a dry run")):
        equal(explain("GET /", {**config, **more}, "--key", "k")["verdict"], ["pass, because %s; else: error 503" % gate])
    has(explain("GET /", '{"enabled":true,\n"x":1}', code=REFUSED), "line 2, column 2")
    for instance in ("i-1", "i-2", "web-3"):
        slot = (mix(fnv(instance)) >> 32) * 100 >> 32
        for canary in (slot, slot + 1):
            said = explain("GET /", {**config, "canary": canary}, "--key", "k", "--instance", instance)
            has(said["instance"][0], "slot is %d of" % slot, "takes part" if canary > slot else "does not take part")
            equal(said["verdict"], ["error 503" if canary > slot else "pass, because this instance does not take part; else: error 503"])
        said = explain("GET /", {**config, "instances": ["i-*"]}, "--key", "k", "--instance", instance)
        equal(said["verdict"][0] == "error 503", instance.startswith("i-"), instance)
    has(explain("GET /", {**config, "canary": 50})["instance"][0], "--instance ID tells")
    has(explain("GET /", {**ON, "errorRate": 50}, "--key", "k")["roll"][0], "without a seed")


@case
def explain_agrees_with_the_manual_and_the_proxy():
    rule = {"name": "all", "errorRate": 40, "latency": 30, "latencyRate": 50}
    config = {**ON, "seed": 2026, "rules": [rule]}
    upstream = Upstream()
    proxy = Proxy(upstream.port, config, args=["--key-header", "X-Key"])
    kinds = set()
    for n in range(14):
        key = "user-%d" % n
        said = explain("GET /x", config, "--key", key)
        error, delay = roll(2026, "all", key, 1), roll(2026, "all", key, 2)
        want = ["error %d of 0..9999, %sbelow the 4000 of errorRate 40" % (error, "" if error < 4000 else "not ")]
        if error >= 4000:
            want.append("delay %d of 0..9999, %sbelow the 5000 of latencyRate 50" % (delay, "" if delay < 5000 else "not "))
        equal(said["roll"], want, key)
        verdict = "error 503" if error < 4000 else "latency, 30 ms" if delay < 5000 else "pass"
        equal(said["verdict"], [verdict], key)
        reply = once(proxy.port, "/x", headers={"X-Key": key})
        equal((reply.status, reply.mark), {"e": (503, "error"), "l": (200, "latency"), "p": (200, None)}[verdict[0]], key)
        kinds.add(verdict[0])
        if verdict[0] == "e":  # who is hit at 40 is hit at 41
            equal(explain("GET /x", {**config, "rules": [{**rule, "errorRate": 41}]}, "--key", key)["verdict"], ["error 503"])
    equal(kinds, {"e", "l", "p"})
    proxy.stop()
    upstream.close()


@case
def explain_what_is_stored():
    moto().put("/explain", json.dumps({**ON, "errorRate": 100, "seed": 1}))
    out, _ = ssm(DONE, "explain", "--request", "GET /", "--name", "/explain", "--key", "k")
    has(out, "state: on without an end\n", "verdict: error 503\n")
    ssm(NOT_FOUND, "explain", "--request", "GET /", "--name", "/explain/none")
    moto().put("/explain", "no config")
    ssm(REFUSED, "explain", "--request", "GET /", "--name", "/explain")


if __name__ == "__main__":
    sys.exit(main(limit=120))

#!/usr/bin/env python3
"""What stands beside a program on AWS, as fakes: the Parameters and Secrets extension of Lambda, the AppConfig agent, and the two
services that hand out credentials.

    tests/peers/agents.py [--filter TEXT] [--build DIR] [-v]

Needs botocore, which checks the signatures made with those credentials, and libcurl's headers; a missing one is a loud skip, with
CHAOS_CI=1 a failure. The aws-cli is never started: it would look for credentials by itself."""
import os
import select
import socket
import subprocess
import sys
import time

sys.dont_write_bytecode = True
import aws
from aws import KEYS, SILENCE, AppConfigAgent, ContainerCredentials, Extension, Imds, SignatureChecker, Watch, call, env, fake_cli, go_time, parameter
from common import CI, Skip, case, free_port, in_threads, main, need, until

NAME = "/proyecto-grupo-7/prod/chaos"
ON = '{"enabled":true,"latency":20}'
SESSION = "FwoGZXIvYXdzE+/=="
NO_CLI = "/nonexistent"  # as PATH


def equal(seen, wanted, about):
    assert seen == wanted, "%r instead of %r: %r" % (seen, wanted, about)


# ---- the Lambda extension ------------------------------------------------------------------------------------------

def lambda_env(extension, token=SESSION, **more):
    """As in a Lambda function; there is no other way."""
    return env(token=token, **{"AWS_LAMBDA_RUNTIME_API": "127.0.0.1:9001", "PATH": NO_CLI, "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
                               "PARAMETERS_SECRETS_EXTENSION_HTTP_PORT": str(extension if isinstance(extension, int) else extension.port), **more})


@case
def extension():
    """From not ready to on; what it is asked; its dates, its version, its names in the URL."""
    x = Extension(SESSION)
    x.say = (400, "not ready to serve traffic, please wait")
    watch = Watch("curl", "ssm:" + NAME, lambda_env(x))
    r = watch.refresh()
    equal((r.code, r.state, r.way), ("unreachable", "off", "extension"), r)
    assert "not ready" in r.problem, repr(r)
    x.say = None
    r = watch.refresh()
    equal((r.code, r.state, r.fetch_errors), ("config not found", "off", 1), r)
    modified = time.time() - 600
    x.values[NAME] = (ON, 12, modified)
    r = watch.refresh()
    equal((r.code, r.state, r.way, r.version), ("ok", "on", "extension", 12), r)
    assert abs(r.end_ms / 1000 - modified - 3600) < 1, "the lease ends at %d" % r.end_ms
    line = watch.log("config")[-1]
    equal((line["way"], line["config_version"]), ("extension", 12), line)
    asked = x.seen[-1]
    assert "name=%2Fproyecto-grupo-7%2Fprod%2Fchaos" in asked.target and asked.query["withDecryption"] == "true", asked
    x.values[NAME] = (ON, 13, time.time() - 61 * 60)
    equal(watch.refresh().state, "expired", watch.lines[-1])
    x.values[NAME] = ("{", 14, time.time())
    equal(watch.refresh().state, "invalid", watch.lines[-1])
    del x.values[NAME]
    equal(watch.refresh().state, "off", watch.lines[-1])
    assert not watch.log("fallback"), watch.lines
    watch.stop()
    odd = "/a b/ñ%41&name=x#?"
    x.values[odd] = ("odd", 1, time.time())
    got = call("cli", "get", odd, lambda_env(x))
    equal((got.code, got.value, got.way, got.version), ("ok", "odd", "extension", 1), got)
    x.stop()


@case
def extension_dates():
    """Go's, with and without a fraction; a number; none, which means a lease from now on."""
    x, now = Extension(SESSION), int(time.time()) - 1000
    watch = Watch("cli", "ssm:" + NAME, lambda_env(x))
    for version, shown in enumerate((go_time(now), go_time(now).replace(".000", ""), go_time(now).replace("Z", "000000Z"), now, float(now),
                                     go_time(now).replace("Z", "+00:00"), None, "yesterday", ""), 1):
        x.say = (200, parameter(NAME, ON, version, shown if shown is not None else 0))
        if shown is None:
            x.say[1]["Parameter"]["LastModifiedDate"] = None
        known = version < 7
        r = watch.refresh()
        equal((r.state, r.version), ("on", version), r)
        wanted = (now if known else time.time()) + 3600
        assert abs(r.end_ms / 1000 - wanted) < 5, "%r: the lease ends %.0f s off" % (shown, r.end_ms / 1000 - wanted)
    watch.stop()
    x.stop()


@case
def extension_refuses():
    """A wrong or missing token, failures in the words of AWS: the last good config is kept for a while, then none."""
    x = Extension("another token")
    x.values[NAME] = (ON, 1, time.time())
    watch = Watch("curl", "ssm:" + NAME, lambda_env(x), ttl=10000, stale=20000)
    r = watch.refresh()
    assert r.code not in ("ok", "config not found") and r.state == "off" and r.way == "extension" and "401" in r.problem, repr(r)
    x.token = SESSION
    equal(watch.refresh().state, "on", watch.lines[-1])
    for what, code in (("api error AccessDeniedException: User: u is not authorized to perform: ssm:GetParameter", "access denied"),
                       ("api error ThrottlingException: Rate exceeded", "throttled"), ("api error InternalServerError: oops", "unreachable")):
        x.say = x.failure(what)
        r = watch.refresh()
        equal((r.code, r.state, r.way), (code, "on", "extension"), r)
    r = watch.refresh(shift=31)
    equal(r.state, "stale", r)
    x.say = None
    equal(watch.refresh().state, "on", watch.lines[-1])
    x.say = x.failure("ParameterNotFound: ")
    equal(watch.refresh().state, "off", watch.lines[-1])
    watch.stop()
    x.stop()


STRANGE = [(200, ""), (200, "ok"), (200, "{}"), (200, '{"Parameter":null}'), (200, '{"Parameter":{"Value":null}}'), (200, '{"Parameter":{"Value":"{}"'), (204, ""),
           (302, "", ("Location", "http://127.0.0.1:1/")), (404, "404 page not found"), (500, ""), (502, "x" * 100000), (200, "y" * 200000),
           (200, '{"Parameter":{"Value":"%s"}}' % ("z" * 3000000)), b"", b"\x00" * 100, b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200\r\n\r\n" + b"a" * 70000,
           b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}",
           b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n{}", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
           b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc", b"HTTP/1.1 200 OK\r\nX: " + b"h" * 100000 + b"\r\n\r\n{}"]


def stays_on(fake, watch, good):
    """None of these answers is a config, nor a reason to be off at once; each is told of, and nothing is left open."""
    for say in STRANGE:
        fake.say = None
        r = watch.refresh()
        equal((r.code, r.state), ("ok", "on"), (good, r))
        before = r.fds
        fake.say = say
        r = watch.refresh()
        assert r.code in ("unreachable", "too large") and r.problem, (str(say)[:80], r)
        assert r.state == "on" and r.fds == before and r.ms < 1500, (str(say)[:80], r)


@case
def extension_talks_nonsense():
    x = Extension(SESSION)
    x.values[NAME] = (ON, 1, time.time())
    watch = Watch("cli", "ssm:" + NAME, lambda_env(x))
    stays_on(x, watch, "extension")
    watch.stop()
    x.stop()


@case
def extension_is_silent():
    """A call must not hang for long: it may be made inside an invocation."""
    x = Extension(SESSION)
    x.say = SILENCE
    got = call("curl", "get", NAME, lambda_env(x))
    assert got.code == "unreachable" and got.way == "extension" and got.ms < 3000, repr(got)
    assert call("curl", "get", NAME, lambda_env(x), timeout=200).ms < 600
    x.stop()


@case
def extension_or_another_way():
    """Without a session token, outside Lambda, or with nobody there the next way is taken; puts and lists never go there."""
    x, s = Extension(SESSION), SignatureChecker(token=SESSION)
    s.values[NAME], x.values[NAME] = ("by curl", 1), ("by the extension", 2, time.time())

    def got(environment, action="get"):
        return call("curl", action, NAME, environment, "new")
    both = {"AWS_ENDPOINT_URL": s.url}
    equal(got(lambda_env(x, **both)).value, "by the extension", x.seen)
    equal(got(lambda_env(x, AWS_LAMBDA_RUNTIME_API=None, **both)).value, "by the extension", x.seen)
    count = len(x.seen)
    r = got(lambda_env(free_port(), **both))
    equal((r.value, r.way), ("by curl", "curl"), r)
    r = got(env(s.port, token=SESSION, PATH=NO_CLI))
    equal((r.value, r.way), ("by curl", "curl"), r)
    s.keys = {KEYS[0]: (KEYS[1], None)}
    r = got(lambda_env(x, token=None, **both))
    equal((r.value, r.way), ("by curl", "curl"), r)
    s.keys = {KEYS[0]: (KEYS[1], SESSION)}
    r = got(lambda_env(x, **both), "put")
    equal((r.code, r.way, s.values[NAME][0]), ("ok", "curl", "new"), r)
    equal(len(x.seen), count, x.seen)
    s.keys = None  # it reads its own region only
    watch = Watch("curl", "ssm:%s?region=eu-west-1" % NAME, lambda_env(x, **both))
    equal((watch.refresh().way, len(x.seen)), ("curl", count), watch.lines)
    assert "/eu-west-1/ssm/" in s.seen[-1].fields["authorization"], s.seen[-1]
    watch.stop()
    r = call("curl", "get", NAME, lambda_env(x, AWS_SESSION_TOKEN="a\r\nb: c", **both))
    assert r.code != "ok" and len(x.seen) == count, repr(r)
    x.stop()
    s.stop()


# ---- the AppConfig agent -------------------------------------------------------------------------------------------

SOURCE, KEY = "appconfig:shop/prod/chaos", "shop/prod/chaos"


def agent_env(agent, **more):
    return env(keys=None, PATH=NO_CLI, AWS_APPCONFIG_EXTENSION_HTTP_PORT=str(agent.port), **more)


@case
def appconfig():
    """On, changed, broken, gone; its version is shown, when it is a number."""
    a = AppConfigAgent()
    watch = Watch("cli", SOURCE, agent_env(a))
    r = watch.refresh()
    equal((r.code, r.state, r.way), ("config not found", "off", "agent"), r)
    a.values[KEY] = (ON, "7")
    r = watch.refresh()
    equal((r.code, r.state, r.way, r.version), ("ok", "on", "agent", 7), r)
    assert abs(r.end_ms / 1000 - time.time() - 3600) < 5, "the lease ends at %d" % r.end_ms
    line = watch.log("config")[-1]
    equal((line["way"], line["config_version"]), ("agent", 7), line)
    end = r.end_ms
    equal(watch.refresh(shift=60).end_ms, end, "the lease runs on")
    a.values[KEY] = ('{"enabled":false}', "8")
    r = watch.refresh()
    equal((r.state, r.version), ("off", 8), r)
    for version in (None, "v2-beta", "", "-1", "99999999999999999999999"):
        a.values[KEY] = ('{"enabled":true,"note":"%s"}' % version, version)
        r = watch.refresh()
        equal((r.code, r.state), ("ok", "on"), (version, r))
    a.values[KEY] = ("enabled: true", "9")
    equal(watch.refresh().state, "invalid", watch.lines[-1])
    a.values[KEY] = (ON, "10")
    r = watch.refresh()
    equal((r.state, r.version), ("on", 10), r)
    r = watch.refresh(shift=3601)
    equal(r.state, "expired", r)
    a.values[KEY] = (ON.replace("20", "21"), "11")
    equal(watch.refresh().state, "on", watch.lines[-1])
    del a.values[KEY]
    r = watch.refresh()
    equal((r.code, r.state), ("config not found", "off"), r)
    watch.stop()
    a.stop()


@case
def appconfig_framings():
    """Chunked, to the end of the connection, one byte at a time, in an HTTP/1.0 reply; and the older name of the version's field."""
    a = AppConfigAgent()
    watch = Watch("cli", SOURCE, agent_env(a))
    body = b'{"enabled":true,"note":"%s"}' % (b"x" * 240)
    head = b"HTTP/1.1 200 OK\r\nConfiguration-Version: 3\r\n"
    chunks = b"".join(b"%x;ext=1\r\n%s\r\n" % (len(body[i:i + 7]), body[i:i + 7]) for i in range(0, len(body), 7)) + b"0\r\nTrailer: x\r\n\r\n"
    for version, say in ((3, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks), (3, head + b"Connection: close\r\n\r\n" + body),
                         (4, b"HTTP/1.0 200 OK\r\nConfigurationVersion: 4\r\n\r\n" + body)):
        a.say = (200, '{"enabled":false}')
        equal(watch.refresh().state, "off", watch.lines[-1])
        a.say = say
        r = watch.refresh()
        equal((r.code, r.state, r.version), ("ok", "on", version), (say[:60], r))
    a.say = None
    a.values[KEY] = ('{"enabled":true,"note":"%s"}' % ("é" * 120), "5")
    slow = a.upstream.answer

    def drip(request):
        send = request.send
        request.send = lambda data: [send(data[i:i + 1]) for i in range(len(data))]
        return slow(request)
    a.upstream.answer = drip
    r = watch.refresh()
    equal((r.code, r.state, r.version), ("ok", "on", 5), r)
    watch.stop()
    a.stop()


@case
def appconfig_fails():
    a = AppConfigAgent()
    a.values[KEY] = (ON, "1")
    watch = Watch("cli", SOURCE, agent_env(a), ttl=10000, stale=20000)
    strange = [s for s in STRANGE if isinstance(s, bytes) or s[0] != 200]
    for say in strange + [(400, "bad request"), (504, "timeout")]:
        a.say = None
        equal(watch.refresh().state, "on", watch.lines[-1])
        a.say = say
        r = watch.refresh()
        assert r.state == ("off" if say[:1] == (404,) else "on") and r.code != "ok", (str(say)[:60], r)
    a.say = (200, "{" + " " * 70000 + "}")
    equal(watch.refresh().code == "ok", False, watch.lines[-1])
    a.say = (500, "oops")
    r = watch.refresh(shift=31)
    equal((r.code, r.state), ("unreachable", "stale"), r)
    assert "500" in r.problem, repr(r)
    a.stop()
    r = watch.refresh()
    equal((r.code, r.state), ("unreachable", "stale"), r)
    watch.stop()


@case
def appconfig_is_silent():
    a = AppConfigAgent()
    a.say = SILENCE
    watch = Watch("cli", SOURCE, agent_env(a))
    r = watch.refresh()
    assert r.code == "unreachable" and r.state == "off" and r.ms < 3500, repr(r)
    watch.stop()
    a.stop()


@case
def appconfig_names():
    """Percent-encoded in the URL, as they are in the source."""
    a = AppConfigAgent()
    a.values["my app/ñ/a&b?c#d"] = (ON, "1")
    watch = Watch("cli", "appconfig:my app/ñ/a&b?c#d", agent_env(a))
    r = watch.refresh()
    equal((r.code, r.state), ("ok", "on"), (r, a.seen))
    watch.stop()
    a.stop()


# ---- credentials: EC2 ----------------------------------------------------------------------------------------------

def curl_env(s, **more):
    """Nothing of its own: credentials come from elsewhere, or not at all."""
    return env(s.port, **{"keys": None, "PATH": NO_CLI, **more})


def imds_env(s, i, **more):
    return curl_env(s, **{"AWS_EC2_METADATA_DISABLED": None, "AWS_EC2_METADATA_SERVICE_ENDPOINT": i.url, **more})


def signed_with(token="IMDSTOKEN"):
    s = SignatureChecker(token=token)
    s.values[NAME] = (ON, 1, time.time())
    return s


@case
def instance_metadata():
    """Version 2, kept for as long as they are good, and used for the signature with their session token."""
    i, s = Imds(), signed_with()
    watch = Watch("curl", "ssm:" + NAME, imds_env(s, i))
    for _ in range(3):
        r = watch.refresh()
        equal((r.code, r.state, r.way), ("ok", "on", "curl"), (r, i.seen, s.wrong))
    equal([(x.method, x.path) for x in i.seen],
          [("PUT", "/latest/api/token"), ("GET", Imds.ROLES), ("GET", Imds.ROLES + "the-role")], "asked once")
    assert i.seen[0].fields["x-aws-ec2-metadata-token-ttl-seconds"].isdigit() and not i.used_v1()
    equal(i.seen[0].fields.get("content-length"), "0", i.seen[0])
    equal((len(s.seen), s.wrong), (3, []), s.seen)
    watch.stop()
    got = call("curl", "get", NAME, imds_env(s, i, AWS_EC2_METADATA_SERVICE_ENDPOINT=i.url + "/"))
    equal((got.code, got.way), ("ok", "curl"), got)
    six = Imds(host="::1")
    got = call("curl", "get", NAME, imds_env(s, six))
    equal((got.code, got.way), ("ok", "curl"), got)
    for fake in (i, six, s):
        fake.stop()


@case
def instance_metadata_renews():
    """New ones are fetched before the old end; while that fails the old ones are used to their end, and not beyond."""
    i, s = Imds(life=300), signed_with()
    watch = Watch("curl", "ssm:" + NAME, imds_env(s, i))
    equal(watch.refresh().state, "on", watch.lines)
    count = i.count(method="PUT")
    i.token = "SECOND"
    s.keys = {KEYS[0]: (KEYS[1], "SECOND")}
    equal(watch.refresh().code, "ok", (watch.lines, s.wrong))
    equal(i.count(method="PUT"), count + 1, "those that end in 5 minutes are renewed")
    i.broken = True
    r = watch.refresh()
    equal((r.code, r.way), ("ok", "curl"), r)
    assert i.count(method="PUT") > count + 1, "no attempt at new ones"
    i.broken, i.life = False, 1.2
    equal(watch.refresh().code, "ok", watch.lines)
    i.broken, ends = True, time.time() + 2.2  # an Expiration has whole seconds
    until(lambda: watch.refresh().code != "ok", ends - time.time() + 0.5, "expired credentials are not used")
    assert not s.wrong, s.wrong
    i.broken, i.life = False, 6 * 3600
    equal(watch.refresh().code, "ok", watch.lines)
    count = len(i.seen)
    equal((watch.refresh().code, len(i.seen)), ("ok", count), "good for hours: not asked again")
    watch.stop()
    i.stop()
    s.stop()


@case
def instance_metadata_refuses():
    """Never version 1; what is wrong is said; the credentials of the environment come first."""
    s = signed_with()

    def refused(word, **how):
        i = Imds()
        for name, value in how.items():
            setattr(i, name, value)
        got = call("curl", "get", NAME, imds_env(s, i))
        assert got.code != "ok" and word in got.err and got.ms < 3500, "%s: %r" % (how, got)
        assert not i.used_v1(), i.used_v1()
        i.stop()
        return got
    for status in (403, 404, 405, 500):
        refused("IMDSv2", refuse_v2=status)
    refused("AssumeRoleUnauthorizedAccess", code="AssumeRoleUnauthorizedAccess")
    refused("metadata", role=None)
    refused("metadata", role="x" * 4000)
    for say in ((200, ""), (200, "a b\x01c"), (200, "x" * 100000), b"", b"garbage", (302, "", ("Location", "http://127.0.0.1:1/"))):
        refused("", say=say)
    in_threads([lambda: refused("", say=SILENCE), lambda: refused("", say=lambda seen: (200, "t") if seen.method == "PUT" else SILENCE)])
    i = Imds()
    for more in ({"AWS_EC2_METADATA_DISABLED": "true"}, {"AWS_EC2_METADATA_DISABLED": "TRUE"}):
        got = call("curl", "get", NAME, dict(imds_env(s, i), **more))
        assert got.code != "ok" and "credentials" in got.err, repr(got)
    s.keys = {KEYS[0]: (KEYS[1], None)}
    got = call("curl", "get", NAME, imds_env(s, i, keys=KEYS))
    equal((got.code, len(i.seen)), ("ok", 0), (got, i.seen))
    i.stop()
    got = call("curl", "get", NAME, imds_env(s, i))
    assert got.code != "ok" and got.ms < 2500, "nobody there: %r" % got
    s.stop()


# ---- credentials: ECS and EKS --------------------------------------------------------------------------------------

def container_env(s, url, **more):
    return curl_env(s, AWS_CONTAINER_CREDENTIALS_FULL_URI=url, **more)


@case
def container_credentials():
    """The token file is read again for each request, and comes before the variable."""
    c, s = ContainerCredentials(life=60), signed_with("CONTAINERTOKEN")
    path = aws.written("first\n")
    environment = container_env(s, c.url + "/v1/credentials?x=1", AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=path, AWS_CONTAINER_AUTHORIZATION_TOKEN="never")
    watch = Watch("curl", "ssm:" + NAME, environment)
    r = watch.refresh()
    equal((r.code, r.state, r.way), ("ok", "on", "curl"), (r, s.wrong))
    with open(path, "w") as f:
        f.write("second")
    equal(watch.refresh().code, "ok", watch.lines)
    equal(c.given(), ["first", "second"], c.seen)
    equal({(x.method, x.target) for x in c.seen}, {("GET", "/v1/credentials?x=1")}, c.seen)
    watch.stop()
    c.life = 6 * 3600
    watch = Watch("curl", "ssm:" + NAME, environment)
    equal((watch.refresh().code, watch.refresh().code, len(c.seen)), ("ok", "ok", 3), "good for hours: asked once")
    watch.stop()
    for more, given in (({"AWS_CONTAINER_AUTHORIZATION_TOKEN": "Basic dXNlcg=="}, "Basic dXNlcg=="), ({}, None)):
        got = call("curl", "get", NAME, container_env(s, c.url, **more))
        equal((got.code, c.given()[-1]), ("ok", given), got)
    got = call("curl", "get", NAME, container_env(s, "http://localhost:%d/x" % c.port))
    equal(got.code, "ok", got)
    six = ContainerCredentials(host="::1")
    got = call("curl", "get", NAME, container_env(s, six.url + "/x"))
    equal(got.code, "ok", got)
    i = Imds()  # a container's own come first
    got = call("curl", "get", NAME, imds_env(s, i, AWS_CONTAINER_CREDENTIALS_FULL_URI=c.url))
    equal((got.code, len(i.seen)), ("ok", 0), (got, i.seen))
    for fake in (c, s, six, i):
        fake.stop()


def went_inside(name, more=""):
    """Runs a case once more in namespaces of its own, where the loopback is its own. False = this is that run."""
    if os.environ.get("CHAOS_TEST_INSIDE") == "1":
        return False
    need("unshare", "ip")
    rights = [] if os.geteuid() == 0 else ["-r"]
    inside = 'ip link set lo up && %s exec "$@"' % more
    again = ["unshare", *rights, "-n", "-m", "sh", "-c", inside, "sh", sys.executable, __file__, *sys.argv[1:], "--filter", name]
    got = subprocess.run(again, env=dict(os.environ, CHAOS_TEST_INSIDE="1"), capture_output=True, text=True, timeout=60)
    if "not permitted" in got.stderr and not CI:
        raise Skip("no namespaces may be made here")
    assert got.returncode == 0 and got.stdout.endswith("1 passed, 0 failed\n"), got.stdout + got.stderr
    return True


@case
def secrets_stay_out_of_errors():
    """The answer with the credentials comes into the same buffer as SSM's, which may have no body to replace it."""
    c, s = ContainerCredentials(), SignatureChecker(token="CONTAINERTOKEN")
    for say in ((503, ""), (400, ""), (200, ""), b""):
        s.say = say
        got = call("curl", "get", NAME, container_env(s, c.url))
        assert got.code != "ok" and not any(word in str(got) for word in (*KEYS, "CONTAINERTOKEN", "AccessKeyId")), got
    c.stop()
    s.stop()


@case
def silent_name_server():
    """It is not waited for beyond the time-out."""
    resolver = aws.written("nameserver 127.0.0.1\n", 0o644)
    if went_inside("silent_name_server", "mount --bind %s /etc/resolv.conf &&" % resolver):
        return
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 53))
    got = call("curl", "get", NAME, env("http://ssm.example.test", PATH=NO_CLI), timeout=500)
    assert got.code == "unreachable" and 450 <= got.ms < 2000, got
    assert select.select([server], [], [], 0)[0], "nobody has asked it"
    server.close()


@case
def task_credentials():
    """ECS: a path at 169.254.170.2, which is on the loopback there."""
    if went_inside("task_credentials", "ip addr add 169.254.170.2/32 dev lo &&"):
        return
    c, s = ContainerCredentials(host="169.254.170.2", port=80), signed_with("CONTAINERTOKEN")
    for more in ({}, {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://127.0.0.1:9/"}):  # the task's own come first
        got = call("curl", "get", NAME, curl_env(s, AWS_CONTAINER_CREDENTIALS_RELATIVE_URI="/v2/credentials/5f1e", **more))
        equal((got.code, s.wrong), ("ok", []), got)
    equal([(x.method, x.target) for x in c.seen], [("GET", "/v2/credentials/5f1e")] * 2, c.seen)
    c.say = (404, "no such id")
    got = call("curl", "get", NAME, curl_env(s, AWS_CONTAINER_CREDENTIALS_RELATIVE_URI="/v2/credentials/gone"))
    assert got.code != "ok" and "404" in str(got), got
    c.stop()
    s.stop()


@case
def container_credentials_refused():
    """Plain HTTP goes to this machine and AWS's own addresses only; a token that would break the head is not sent."""
    c, s = ContainerCredentials(), signed_with("CONTAINERTOKEN")
    for url in ("http://192.0.2.1/x", "http://192.0.2.1:80/x", "http://127.0.0.1.example.invalid/x", "http://127.0.0.1@192.0.2.1/x", "http://localhost.example.invalid/",
                "http://169.254.170.20/x", "http://169.254.170.2.example.invalid/", "ftp://127.0.0.1/x", "127.0.0.1/x", "file:///etc/passwd", "http://", "x"):
        got = call("curl", "get", NAME, container_env(s, url))
        assert got.code != "ok" and "credentials from" in got.err and got.ms < 300, "%s: %r" % (url, got)
    for token in ("a\r\nX-Other: b", "a\nb", "a\rb", "a\x00b", "a\x01b", "x" * 20000):
        got = call("curl", "get", NAME, container_env(s, c.url, AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=aws.written(token)))
        if "\0" in token and got.code == "ok":
            assert c.given()[-1] == "a", c.seen  # cut there: harmless
            continue
        assert got.code != "ok" and "token" in got.err, "%r: %r" % (token[:20], got)
    seen = [x for x in c.seen if x.fields.get("authorization") != "a"]
    assert not seen, "asked all the same: %s" % seen
    got = call("curl", "get", NAME, container_env(s, c.url, AWS_CONTAINER_AUTHORIZATION_TOKEN="a\r\nX-Other: b"))
    assert got.code != "ok" and not any("x-other" in x.fields for x in c.seen), repr(got)
    got = call("curl", "get", NAME, container_env(s, c.url, AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE="/nonexistent/token"))
    assert got.code != "ok" and "/nonexistent/token" in got.err, repr(got)
    c.stop()
    s.stop()


@case
def container_credentials_fail():
    s = signed_with("CONTAINERTOKEN")

    def refused(say, word=""):
        c = ContainerCredentials()
        c.say = say
        got = call("curl", "get", NAME, container_env(s, c.url))
        assert got.code != "ok" and word in got.err and got.ms < 3500, "%s: %r" % (str(say)[:60], got)
        assert "wJalr" not in got.err, "a secret is told: %r" % got
        assert not s.seen, "SSM is asked, with %s" % str(say)[:120]
        c.stop()
    for status in (400, 401, 403, 404, 500):
        refused((status, {"message": "no"}), str(status))
    whole = aws.credentials(KEYS, "T", 3600)
    for wrong in ("", "{", "[]", {}, {k: v for k, v in whole.items() if k != "SecretAccessKey"}, dict(whole, AccessKeyId=7), dict(whole, SecretAccessKey="x" * 300),
                  dict(whole, Token="t" * 5000), dict(whole, Token=7), aws.credentials(KEYS, "T", -5)):
        refused((200, wrong))
    for say in (b"", b"nonsense", (200, "x" * 200000)):
        refused(say)
    refused(SILENCE)
    s.stop()


@case
def without_credentials_the_cli_is_tried():
    """And the log says why, once."""
    s, i = signed_with(), Imds()
    i.refuse_v2 = 403
    script = 'echo "{\\"Parameter\\":{\\"Value\\":\\"{\\\\\\"enabled\\\\\\":true}\\",\\"Version\\":6,\\"LastModifiedDate\\":$(date +%s)}}"'
    watch = Watch("curl", "ssm:" + NAME, imds_env(s, i, PATH=fake_cli(script)))
    for _ in range(3):
        r = watch.refresh()
        equal((r.code, r.state, r.way, r.version), ("ok", "on", "cli", 6), r)
    lines = watch.log("fallback")
    assert len(lines) == 1 and lines[0]["way"] == "cli" and "IMDSv2" in lines[0]["reason"], lines
    i.refuse_v2 = None
    r = watch.refresh()
    equal((r.code, r.way, r.version), ("ok", "curl", 1), r)
    watch.stop()
    i.stop()
    s.stop()


if __name__ == "__main__":
    sys.exit(main(90))

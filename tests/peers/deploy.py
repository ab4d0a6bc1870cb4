#!/usr/bin/env python3
"""examples/deploy: the image built and run (buildah, podman and runc, on a debian:bookworm-slim made by debootstrap), the manifests for
Kubernetes and ECS against their schemas, deploy-chaos.sh with fakes that record, with the real aws-cli and moto, and with the docker
CLI on podman, and deploy-chaos.ps1 against it, command by command.

    tests/peers/deploy.py [--filter TEXT] [--build DIR] [-v]

Needs root and apt's debootstrap buildah podman runc shellcheck; kubectl; moto_server, botocore, an aws-cli; and of npm, in build/npm or
NODE_PATH, kubernetes-models yaml @vscode/tree-sitter-wasm. A missing one is a loud skip, with CHAOS_CI=1 a failure."""
import glob
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True
import aws
import common
from aws import Moto, moto
from common import CI, ROOT, Skip, Upstream, case, folder, free_port, main, need, note, once, spawn, stop, until
from containers import LIMITS, Container, image, inspect, podman, store

DEPLOY = os.path.join(ROOT, "examples", "deploy")
REGION = aws.REGION
NAME = "/team/stage/chaos"
ACCOUNT = "123456789012"
BOTH = ("proxy", "ssm")


def read(*names):
    with open(os.path.join(DEPLOY, *names)) as f:
        return f.read()


# ---- the image -----------------------------------------------------------------------------------------------------

def proxy(upstream, *args, target="proxy", **more):
    return Container(image(target), "--listen", "127.0.0.1:0", "--upstream", "http://127.0.0.1:%d" % upstream.port, "--admin", "127.0.0.1:0",
                     *args, **more)


def config_folder(config):
    new = tempfile.mkdtemp(prefix="config-", dir=folder())
    os.chmod(new, 0o755)
    change(new, config)
    return new


def change(where_to, config):
    with open(where_to + "/new", "w") as f:
        f.write(json.dumps(config))
    os.rename(where_to + "/new", where_to + "/chaos.json")


@case
def image_is_small_and_nothing_but_the_program():
    is_ = inspect(image())
    note("image: %d bytes; --target ssm: %.0f MB, %.0f MB of them this base (debian:bookworm-slim itself has about 75)" %
         (is_["Size"], inspect(image("ssm"))["Size"] / 1e6, inspect("docker.io/library/debian:bookworm-slim")["Size"] / 1e6))
    assert is_["Size"] < 250000, is_["Size"]
    root = podman("image", "mount", image()).stdout.strip()
    try:
        files = [os.path.join(at, f) for at, _, names in os.walk(root) for f in names]
        assert files == [root + "/chaos-proxy"], files
        assert os.stat(files[0]).st_mode & 0o7777 == 0o755 and b"not a dynamic" in subprocess.run(
            ["ldd", files[0]], capture_output=True, env={**os.environ, "LC_ALL": "C"}).stderr, "the program is no static one"
    finally:
        podman("image", "unmount", image(), check=False)


@case
def images_say_how_they_are_run():
    for target in BOTH:
        is_ = inspect(image(target))
        config = is_["Config"]
        assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", is_["User"]), "user %r: a number, so that runAsNonRoot can tell" % is_["User"]
        assert config["Entrypoint"] == ["/chaos-proxy"] and "Healthcheck" not in is_, config
        assert {"CHAOS_LISTEN=0.0.0.0:8080", "CHAOS_ADMIN=127.0.0.1:9090"} <= set(config["Env"]) and list(config["ExposedPorts"]) == ["8080/tcp"]
    assert not re.search(r"^\s*HEALTHCHECK", read("Dockerfile"), re.M)


@case
def a_request_through_the_image_with_faults_on_and_off():
    for target in BOTH:
        service = Upstream(lambda r: r.reply(b"from the service"))
        config = config_folder({"enabled": False})
        box = proxy(service, "--config", "file:/chaos/chaos.json", "--ttl", "200ms", target=target,
                    flags=["-v", config + ":/chaos:ro", "--memory", "128m"])
        plain = once(box.port, "/")
        assert (plain.status, plain.body, plain.mark) == (200, b"from the service", None), plain.status
        change(config, {"enabled": True, "errorRate": 100, "errorStatus": 418})
        until(lambda: once(box.port, "/").status == 418, 3, "the fault is on")
        assert once(box.port, "/").mark == "error"
        assert once(box.port, "/", headers={"User-Agent": "kube-probe/1.29"}).status == 200, "a probe gets a fault"
        change(config, {"enabled": False})
        until(lambda: once(box.port, "/").status == 200, 3, "the fault is off")
        pid = int(podman("inspect", "--format", "{{.State.Pid}}", box.name).stdout)
        with open("/proc/%d/status" % pid) as f:
            status = f.read()
        assert re.search(r"^Uid:(\s+65532){4}$", status, re.M) and re.search(r"^CapEff:\s+0+$", status, re.M), "it runs with too many rights"
        assert box.stop() == 0, "SIGTERM"
        service.close()


@case
def health_from_inside():
    """As an orchestrator asks, with what the image has set; then of a proxy that is not there."""
    for target in BOTH:
        box = Container(image(target), "--upstream", "http://127.0.0.1:9", network="none", flags=[
            "--health-cmd", "CMD /chaos-proxy --health 127.0.0.1:9090", "--health-interval", "disable"])
        assert box.port == 8080
        well = box.exec("/chaos-proxy", "--health", "127.0.0.1:9090")
        assert well.returncode == 0, well.stderr
        assert podman("healthcheck", "run", box.name, check=False).returncode == 0, "podman's own health check"
        assert box.exec("/chaos-proxy", "--health", "127.0.0.1:9091").returncode == 1
        assert box.stop() == 0
        alone = podman("run", "--rm", "--network", "none", *LIMITS, image(target), "--health",
                       "127.0.0.1:9090", check=False)
        assert alone.returncode == 1, alone


@case
def a_container_that_cannot_run_says_why():
    for args, words, code in (([], "--upstream", 2), (["--upstream", "http://127.0.0.1:9", "--listen", "8.8.8.8:1"], "8.8.8.8", 1),
                              (["--upstream", "http://127.0.0.1:9", "--ttl", "soon"], "--ttl", 2)):
        done = podman("run", "--rm", "--network", "none", *LIMITS, image(), *args, check=False)
        last = done.stderr.strip().splitlines()[-1]
        assert done.returncode == code and words in last and last.startswith("chaos-proxy: "), "%d %r" % (done.returncode, done.stderr)


@case
def start_time():
    """From `podman run`, and from the exec of the program, to the first request that came through."""
    service, runs = Upstream(), 10 if CI else 5
    took = {}
    for target in BOTH:
        image(target)
        took[target] = []
        for _ in range(runs if target == "proxy" else 3):
            box = proxy(service, target=target)
            assert once(box.port, "/").status == 200
            took[target].append((time.monotonic() - box.began) * 1000)
            box.remove()
    root = podman("image", "mount", image()).stdout.strip()
    bare = []
    try:
        for _ in range(runs):
            began = time.monotonic()
            process = spawn([root + "/chaos-proxy", "--listen", "127.0.0.1:0", "--upstream", "http://127.0.0.1:%d" % service.port],
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={})
            port = int(common.first_line(process).rsplit(":", 1)[1])
            assert once(port, "/").status == 200
            bare.append((time.monotonic() - began) * 1000)
            stop(process)
    finally:
        podman("image", "unmount", image(), check=False)
    service.close()
    middle = {k: statistics.median(v) for k, v in took.items()}
    note("start to first proxied request, median of %d: podman run %.0f ms (--target ssm, of 3, %.0f ms), the program itself %.1f ms" %
         (runs, middle["proxy"], middle["ssm"], statistics.median(bare)))
    assert middle["proxy"] < 3000 and middle["ssm"] < 3000, middle


def credentials(**more):
    return {"AWS_ACCESS_KEY_ID": aws.KEYS[0], "AWS_SECRET_ACCESS_KEY": aws.KEYS[1], "AWS_EC2_METADATA_DISABLED": "true", **more}


@case
def ssm_image_is_steered_by_the_parameter():
    name, service = NAME + "-image", Upstream()
    moto().put(name, {"enabled": False})
    endpoint = credentials(AWS_ENDPOINT_URL=moto().url)
    box = proxy(service, "--config", "ssm:%s?region=%s" % (name, REGION), "--ttl", "300ms", target="ssm", environment=endpoint)
    assert once(box.port, "/").status == 200
    moto().put(name, {"enabled": True, "errorRate": 100})
    until(lambda: once(box.port, "/").status == 503, 5, "the fault is on")
    assert box.log("config")[-1]["way"] == "curl", box.log("config")[-1]
    # and back by the chaos-ssm that is in the image
    variables = [word for pair in endpoint.items() for word in ("-e", "%s=%s" % pair)]
    off = podman("run", "--rm", "--network", "host", *LIMITS, *variables, "--entrypoint", "/chaos-ssm", image("ssm"),
                 "disable", "--name", name, "--region", REGION)
    assert json.loads(moto().get(name)["Value"])["enabled"] is False, off.stdout
    until(lambda: once(box.port, "/").status == 200, 5, "the fault is off")
    assert box.stop() == 0
    service.close()


@case
def ssm_image_trusts_the_certificates_it_has_and_no_others():
    """TLS as on AWS: the certificates are where libcurl looks for them; moto's own is added by a mount, and is refused without."""
    secure, name, service = Moto(tls=True), NAME + "-tls", Upstream()
    secure.put(name, {"enabled": True, "errorRate": 100})
    answers = []
    for flags in (["-v", secure.bundle + ":/etc/ssl/certs/ca-certificates.crt:ro"], []):
        os.chmod(os.path.dirname(secure.bundle), 0o755)
        box = proxy(service, "--config", "ssm:%s?region=%s" % (name, REGION), target="ssm", flags=flags,
                    environment=credentials(AWS_ENDPOINT_URL=secure.url))
        answers.append(once(box.port, "/").status)
        log = box.text()
        box.remove()
    assert answers == [503, 200] and "certificate" in log, (answers, log[-500:])
    root = podman("image", "mount", image("ssm")).stdout.strip()
    try:
        with open(root + "/etc/ssl/certs/ca-certificates.crt") as f:
            assert f.read().count("BEGIN CERTIFICATE") > 100
    finally:
        podman("image", "unmount", image("ssm"), check=False)
    secure.stop()
    service.close()


# ---- Kubernetes and ECS --------------------------------------------------------------------------------------------

def node(*args, stdin=""):
    need("node")
    places = [os.environ.get("NODE_PATH", ""), os.path.join(common.BUILD, "npm", "node_modules")]
    environment = {**os.environ, "NODE_PATH": os.pathsep.join(p for p in places if p)}
    # --liftoff-only: else node compiles the grammar once more, better, and does not end for ten seconds
    done = subprocess.run(["node", "--liftoff-only", os.path.join(ROOT, "tests", "peers", "deploy.js"), *args], input=stdin,
                          capture_output=True, text=True, timeout=60, env=environment)
    if "Cannot find module" in done.stderr and "kubernetes-models/" not in done.stderr:
        raise Skip("not installed: %s (npm install --prefix build/npm kubernetes-models yaml @vscode/tree-sitter-wasm)" %
                   re.search(r"Cannot find module '([^']+)'", done.stderr).group(1))
    assert done.returncode == 0, done.stderr[-500:]
    return json.loads(done.stdout)


def kustomize(path):
    need("kubectl")
    done = subprocess.run(["kubectl", "kustomize", path], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr[-300:]
    return done.stdout


def objects(text):
    got = node("kubernetes", stdin=text)
    assert not got["problems"], got["problems"]
    return {d["kind"]: d for d in got["documents"]}


def kubernetes(*names):
    return os.path.join(DEPLOY, "kubernetes", *names)


def sidecar(deployment):
    (one,) = deployment["spec"]["template"]["spec"]["initContainers"]
    return one


@case
def kubernetes_sidecar():
    base, beside = (objects(kustomize(kubernetes(*path))) for path in (("base",), ("overlays", "beside")))
    one = sidecar(beside["Deployment"])
    assert one["restartPolicy"] == "Always" and one["image"].endswith("/chaos-proxy:latest"), one
    # nothing of the app's own is touched, its probes least of all
    rest = json.loads(json.dumps(beside["Deployment"]))
    del rest["spec"]["template"]["spec"]["initContainers"]
    assert rest == base["Deployment"] and beside["Service"] == base["Service"]
    secure = one["securityContext"]
    assert secure["runAsNonRoot"] and secure["readOnlyRootFilesystem"] and not secure["allowPrivilegeEscalation"]
    assert "%d:%d" % (secure["runAsUser"], secure["runAsGroup"]) in read("Dockerfile") and secure["capabilities"] == {"drop": ["ALL"]}
    assert "readinessProbe" not in one and one["livenessProbe"]["exec"] == one["startupProbe"]["exec"]
    admin = one["livenessProbe"]["exec"]["command"][-1]
    assert "--admin=" + admin in one["args"] and one["livenessProbe"]["exec"]["command"][:2] == ["/chaos-proxy", "--health"]
    (app,) = base["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert "--upstream=http://127.0.0.1:%d" % app["ports"][0]["containerPort"] in one["args"]
    source = next(v for v in one["env"] if v["name"] == "CHAOS_CONFIG")["value"]
    assert source.startswith("ssm:"), "a config as a value never rolls back: %s" % source


@case
def kubernetes_service_port_in_and_out():
    beside, through = (objects(kustomize(kubernetes("overlays", o))) for o in ("beside", "through"))
    assert beside["Deployment"] == through["Deployment"], "switching restarts pods"
    ports = [o["Service"]["spec"]["ports"][0].pop("targetPort") for o in (beside, through)]
    assert ports == ["http", sidecar(through["Deployment"])["ports"][0]["containerPort"]] and beside["Service"] == through["Service"], ports
    assert "--listen=0.0.0.0:%d" % ports[1] in sidecar(through["Deployment"])["args"]
    # a Service that is not as expected is not switched at all
    tree = tempfile.mkdtemp(prefix="kubernetes-", dir=folder())
    shutil.copytree(kubernetes(), tree + "/k")
    with open(tree + "/k/base/service.yaml") as f:
        text = f.read()
    with open(tree + "/k/base/service.yaml", "w") as f:
        f.write(text.replace("targetPort: http", "targetPort: 3001"))
    done = subprocess.run(["kubectl", "kustomize", tree + "/k/overlays/through"], capture_output=True, text=True, timeout=30)
    assert done.returncode != 0, done.stdout


@case
def kubernetes_by_configmap():
    need("kubectl")
    tree = tempfile.mkdtemp(prefix="kubernetes-", dir=folder())
    shutil.copytree(kubernetes(), tree + "/k")
    path = tree + "/k/overlays/beside/kustomization.yaml"
    with open(path) as f:
        text = f.read()
    assert text.count("  # - ../../configmap") == 1
    with open(path, "w") as f:
        f.write(text.replace("  # - ../../configmap", "  - ../../configmap"))
    got = objects(kustomize(tree + "/k/overlays/beside"))
    one, spec = sidecar(got["Deployment"]), got["Deployment"]["spec"]["template"]["spec"]
    assert got["ConfigMap"]["metadata"]["name"] == "chaos" == spec["volumes"][0]["configMap"]["name"], "a hash in the name makes a rollback a rollout"
    assert json.loads(got["ConfigMap"]["data"]["chaos.json"]) == {"enabled": False}
    (mount,) = one["volumeMounts"]
    assert "subPath" not in mount and mount["readOnly"] and mount["name"] == spec["volumes"][0]["name"]
    source = next(v for v in one["env"] if v["name"] == "CHAOS_CONFIG")["value"]
    assert source == "file:%s/chaos.json" % mount["mountPath"]
    assert one["image"].endswith("/chaos-proxy:latest-static"), "not the small image: %s" % one["image"]
    assert sorted(v["name"] for v in one["env"]) == ["CHAOS_CONFIG", "CHAOS_INSTANCE", "CHAOS_SERVICE"]
    said = read("kubernetes", "configmap", "kustomization.yaml")
    assert "subPath" in said and "environment" in said


@case
def kubernetes_schemas_catch_what_is_wrong():
    """The check itself: a wrong type, an unknown field, a missing one."""
    text = kustomize(kubernetes("overlays", "beside"))
    for old, new, words in (("runAsNonRoot", "runAsNonRot", "no such field"), ("replicas: 3", "replicas: three", "integer"),
                            ("    matchLabels:\n      app: app\n", "    matchLabels: 7\n", "matchLabels"), ("kind: Service", "kind: Servise", "Servise")):
        assert text.count(old) == 1, old
        problems = node("kubernetes", stdin=text.replace(old, new))["problems"]
        assert any(words in p for p in problems), (new, problems)


@case
def ecs_task():
    aws.need_botocore()
    from botocore.validate import ParamValidator
    task = json.loads(read("ecs-task.json"))
    shape = aws.Session().get_service_model("ecs").operation_model("RegisterTaskDefinition").input_shape
    report = ParamValidator().validate(task, shape)
    assert not report.has_errors(), report.generate_report()
    assert ParamValidator().validate({**task, "cpuu": "1", "memory": 5}, shape).has_errors(), "the check itself"
    app, one = task["containerDefinitions"]
    assert {"containerName": one["name"], "condition": "HEALTHY"} in app["dependsOn"], "it must end after the app"
    variables = {v["name"]: v["value"] for v in one["environment"]}
    assert one["healthCheck"]["command"] == ["CMD", "/chaos-proxy", "--health", variables["CHAOS_ADMIN"]]
    assert one["user"] in read("Dockerfile") and one["readonlyRootFilesystem"] and not one["essential"] and one["restartPolicy"]["enabled"]
    assert one["restartPolicy"]["restartAttemptPeriod"] == 60, "ECS's default is 300 s: a proxy that ends before stays dead"
    assert variables["CHAOS_IDLE_TIMEOUT"] == "75s", "an ALB keeps its connections for 60 s"
    assert variables["CHAOS_LISTEN"].endswith(":%d" % one["portMappings"][0]["containerPort"]) and variables["CHAOS_CONFIG"].startswith("ssm:")
    assert variables["CHAOS_UPSTREAM"].endswith(":%d" % app["portMappings"][0]["containerPort"])
    got = moto().client("ecs").register_task_definition(**task)["taskDefinition"]
    assert [c["name"] for c in got["containerDefinitions"]] == ["app", "chaos-proxy"]
    # the service gets that revision with the route: before, it has one without the proxy
    ecs = moto().client("ecs")
    ecs.create_cluster(clusterName="C")
    old = ecs.register_task_definition(family="app-before", containerDefinitions=[{"name": "app", "image": "app:1", "memory": 64}])["taskDefinition"]
    ecs.create_service(cluster="C", serviceName="app", taskDefinition=old["taskDefinitionArn"], desiredCount=0)
    aws.need_aws()
    for command in re.findall(r"^    (aws ecs update-service .*)$", read("README.md"), re.M):
        done = subprocess.run(["sh", "-c", command], env=moto().env(), capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stderr
        there = json.loads(done.stdout)["service"]["taskDefinition"]
        assert there in (got["family"], got["taskDefinitionArn"]), (there, command)


# ---- deploy-chaos.sh -----------------------------------------------------------------------------------------------

# One program for all: writes down how it was called, then says what the test wants it to.
FAKE = r"""#!/bin/sh
name=${0##*/}
{ printf '%s' "$name"; for word; do printf '\t%s' "$word"; done; echo; } >>"$FAKE_LOG"
if [ -n "$FAKE_FAIL" ]; then case "$name $*" in "$FAKE_FAIL"*) printf 'a first line\n\n%s\n\n' "the reason" >&2; exit 7 ;; esac; fi
case "$name $1 $2 $3" in
"aws sts "*) echo 123456789012 ;;
"aws ecr describe-repositories"*) [ -n "$FAKE_REPOSITORY" ] || { printf '\nAn error occurred (RepositoryNotFoundException) when calling it\n' >&2; exit 254; } ;;
"aws ssm get-parameter"*) [ -n "$FAKE_VALUE" ] || { printf '\nAn error occurred (ParameterNotFound) when calling it: \n' >&2; exit 254; }; printf '%s\n' "$FAKE_VALUE" ;;
"aws ecr get-login-password"*) echo a-password ;;
"docker login "*) cat >"$FAKE_LOG.password" ;;
"terraform "*" output"*) printf '%s' "$FAKE_STATE" ;;
esac
"""


class Place:
    """A copy of the folder, with a terraform template of its own, and fakes first on the PATH."""

    def __init__(self, *fakes):
        self.root = tempfile.mkdtemp(prefix="deploy-", dir=folder())
        self.deploy = self.root + "/examples/deploy"
        os.makedirs(self.deploy + "/terraform")
        for name in ("deploy-chaos.sh", "off.json", "Dockerfile"):
            shutil.copy(os.path.join(DEPLOY, name), self.deploy)
        with open(self.deploy + "/terraform/terraform.tfvars.example", "w") as f:
            f.write('region = "us-east-1"\n')
        self.bin, self.log = self.root + "/bin", self.root + "/log"
        os.mkdir(self.bin)
        for name in fakes:
            self.fake(name)

    def fake(self, name, text=FAKE):
        with open(os.path.join(self.bin, name), "w") as f:
            f.write(text)
        os.chmod(os.path.join(self.bin, name), 0o755)

    def run(self, *args, environment=None, path=None, shell="sh", **fakes):
        """The script; .out, .err, .code, and .calls: what the fakes were called with."""
        if os.path.exists(self.log):
            os.remove(self.log)
        new = environment or aws.env(region=REGION)
        new.update({"FAKE_LOG": self.log, "FAKE_FAIL": "", "FAKE_VALUE": "", "FAKE_REPOSITORY": "", "FAKE_STATE": "",
                    "PATH": path or self.bin + ":" + os.environ["PATH"], **fakes})
        done = subprocess.run([shell, self.deploy + "/deploy-chaos.sh", *args], capture_output=True, text=True, timeout=120, env=new, cwd="/",
                              stdin=subprocess.DEVNULL)
        self.out, self.err, self.code = done.stdout, done.stderr, done.returncode
        self.calls = []
        if os.path.exists(self.log):
            with open(self.log) as f:
                self.calls = [line.rstrip("\n").split("\t") for line in f]
        return self

    def reason(self):
        """The last line on stderr, which is all there is of the script's own."""
        own = [line for line in self.err.splitlines() if line.startswith("deploy-chaos: ")]
        assert len(own) == 1 and self.err.splitlines()[-1] == own[0], self.err
        return own[0][len("deploy-chaos: "):]

    def commands(self):
        return [line for line in self.out.splitlines() if not line.startswith("#")]


def fakes():
    return Place("aws", "docker", "terraform")


def shown(words):
    return " ".join(w if w == "|" or re.fullmatch(r"[A-Za-z0-9_./:=@%+,-]+", w) else "'%s'" % w for w in words)


@case
def script_passes_shellcheck():
    need("shellcheck")
    done = subprocess.run(["shellcheck", os.path.join(DEPLOY, "deploy-chaos.sh")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-1500:]


@case
def script_dry_run_runs_nothing():
    place = fakes()
    for shell in ("sh", "bash", "dash"):
        if not common.tool(shell):
            continue
        place.run("--dry-run", "--terraform", shell=shell)
        assert (place.code, place.err, place.calls) == (0, "", []), (place.code, place.err, place.calls)
        text = place.out
        order = ["aws sts", "docker version", "aws ecr describe", "aws ssm get-parameter", "cp ", "terraform -chdir=examples/deploy/terraform init",
                 "terraform -chdir=examples/deploy/terraform apply", "docker build", "aws ecr create-repository", "aws ecr get-login-password", "docker push",
                 "aws ssm put-parameter"]
        places = [text.find(word) for word in order]
        assert -1 not in places and places == sorted(places), list(zip(order, places))
    assert os.listdir(place.deploy + "/terraform") == ["terraform.tfvars.example"]
    # it needs neither tools nor credentials
    place.run("--dry-run", environment=aws.env(region=REGION, keys=None), path=only("sh", "sed", "grep", "tr", "dirname"))
    assert place.code == 0 and place.commands() == [c for c in text.splitlines() if not re.match("#|terraform ", c)], (place.err, place.commands())
    place.run("--dry-run", "--no-image")
    assert place.code == 0 and "docker" not in place.out and " ecr " not in place.out


def only(*names):
    """A PATH with these and nothing else."""
    new = tempfile.mkdtemp(prefix="path-", dir=folder())
    for name in names:
        os.symlink(common.tool(name), os.path.join(new, name))
    return new


@case
def script_does_what_the_dry_run_printed():
    place = fakes()
    flags = ["--terraform", "--yes", "--image", "group-7/chaos:v1.2", "--parameter", "/proyecto-grupo-7/prod/chaos", "--target", "proxy",
             "--region", "eu-west-1"]
    printed = place.run(*flags, "--dry-run").commands()
    place.run(*flags)
    assert place.code == 0 and not place.err, place.err
    # as called; asked for the parameter twice: at first, and before it is written
    registry = ACCOUNT + ".dkr.ecr.eu-west-1.amazonaws.com"
    expected = [line.replace("ACCOUNT.dkr", ACCOUNT + ".dkr") for line in printed if not line.startswith("cp ")]
    called = [shown(words) for words in place.calls]
    again = next(line for line in expected if "get-parameter" in line)
    expected.insert(-1, again)
    pipe = next(i for i, line in enumerate(expected) if " | " in line)
    expected[pipe:pipe + 1] = expected[pipe].split(" | ")
    assert called == expected, "\n".join(["called:", *called, "printed:", *expected])
    with open(place.log + ".password") as f:
        assert f.read() == "a-password\n"
    assert "a-password" not in place.out and not any("a-password" in word for words in place.calls for word in words)
    assert registry + "/group-7/chaos:v1.2" in place.out
    assert os.path.exists(place.deploy + "/terraform/terraform.tfvars")
    # what is there is left as it is
    with open(place.deploy + "/terraform/terraform.tfvars", "w") as f:
        f.write("mine\n")
    place.run(*flags, FAKE_REPOSITORY="1", FAKE_VALUE='{"enabled":false}', FAKE_STATE="ssm:/proyecto-grupo-7/prod/chaos?region=eu-west-1")
    assert place.code == 0, place.err
    assert not re.search("put-parameter|create-repository|^cp ", place.out, re.M) and "left as it is" in place.out
    with open(place.deploy + "/terraform/terraform.tfvars") as f:
        assert f.read() == "mine\n"


@case
def script_stops_at_the_first_failure():
    place = fakes()
    all_calls = place.run("--terraform").calls
    assert place.code == 0 and len(all_calls) == 14, all_calls
    seen = set()
    for number, words in enumerate(all_calls):
        failing = shown(words[:3])
        if failing in seen or words[1:2] and "output" in words:  # that one may fail: then there is no state
            continue
        seen.add(failing)
        if os.path.exists(place.deploy + "/terraform/terraform.tfvars"):
            os.remove(place.deploy + "/terraform/terraform.tfvars")
        place.run("--terraform", FAKE_FAIL=" ".join(words[:3]))
        assert place.code == 1, (failing, place.code, place.out)
        assert place.calls == all_calls[:number + 1], "after %s it goes on: %s" % (failing, place.calls[number:])
        reason = place.reason()
        assert "the reason" in reason or "ended with exit code 7" in reason, (failing, reason)
        assert os.path.exists(place.deploy + "/terraform/terraform.tfvars") == (number > 3), "%s: the template is copied too early" % failing
    place.run("--terraform", FAKE_FAIL="terraform -chdir=examples/deploy/terraform output")
    assert place.code == 0, place.err


@case
def script_names_what_is_missing():
    place = fakes()
    tools = ["sh", "sed", "grep", "tr", "dirname", "mktemp", "tail", "rm", "cp", "cat"]
    for missing in ("aws", "docker", "terraform"):
        path = only(*tools)
        for name in {"aws", "docker", "terraform"} - {missing}:
            os.symlink(os.path.join(place.bin, name), os.path.join(path, name))
        place.run("--terraform", path=path)
        assert (place.code, place.calls) == (1, []) and place.reason() == "%s is not installed, or not on the PATH" % missing, place.err
        if missing != "aws":
            place.run(*(["--no-image"] if missing == "docker" else []), path=path)
            assert place.code == 0, "%s is not needed here: %s" % (missing, place.err)
    assert "region" in place.run(environment=aws.env(region=None)).reason() and place.code == 2
    assert place.run(environment={**aws.env(region=None), "AWS_DEFAULT_REGION": REGION}).code == 0


@case
def script_refuses_bad_names():
    place = fakes()
    for flag, values in {
        "--image": ["Chaos", "chaos:", "chaos:a b", ":latest", "a//b", "-x", "chaos_-proxy", "chaos:1:2", "registry.example.com/chaos", "chaos;id", "$(id)",
                    "chaos\nproxy", "chaos:" + "x" * 129, "é"],
        "--parameter": ["chaos", "/", "/a//b", "/a b", "/a'b", "/aws/chaos", "/ssm/x", "/a\nb"],
        "--region": ["here", "us-east", "us_east_1", "us-east-1;id", "US-EAST-1"],
        "--target": ["prod", "", "ssm|proxy"],
    }.items():
        for value in values:
            place.run(flag, value)
            assert (place.code, place.calls, place.out) == (2, [], ""), (flag, value, place.code, place.out)
            assert flag in place.reason(), place.err
    for args in (["--force"], ["chaos"], ["--image"], ["--region", ""], ["--dry-run=1"], ["-h"]):
        place.run(*args)
        assert (place.code, place.calls) == (2, []) and "(see --help)" in place.reason(), (args, place.err)
    place.run("--help")
    assert place.code == 0 and place.out.startswith("usage: ") and place.calls == []
    for good in ("chaos", "a.b_c-d/e__f:1.0-x"):
        assert place.run("--dry-run", "--image", good).code == (2 if "__" in good else 0), (good, place.err)
    assert "ACCOUNT.dkr.ecr.cn-north-1.amazonaws.com.cn/" in place.run("--dry-run", "--region", "cn-north-1").out


@case
def script_leaves_a_running_experiment_alone():
    place = fakes()
    for value, words in (('{"enabled":true,"errorRate":5,"owner":"ana","expiresAt":"2030-01-31T12:00:00Z"}', ["until 2030-01-31T12:00:00Z:", '"owner":"ana"']),
                         ('{ "enabled" : true,\n  "latency": 200,\n  "expiresAt": 1900000000 }', ["until 1900000000", '"latency": 200']),
                         ('{"enabled":true}', ["until 60 minutes after its last change"])):
        place.run("--terraform", FAKE_VALUE=value)
        reason = place.reason()
        assert place.code == 1 and all(w in reason for w in [NAME, "in use", "chaos-ssm disable --name " + NAME, *words]), reason
        assert [c[:3] for c in place.calls][-1] == ["aws", "ssm", "get-parameter"] and not os.path.exists(place.deploy + "/terraform/terraform.tfvars")
    place.run(FAKE_VALUE='{"enabled":false,"note":"\\"enabled\\":true is what it was"}')
    assert place.code == 0, place.err


@case
def script_leaves_terraform_state_alone():
    place = fakes()
    applied = lambda: any("apply" in c for c in place.calls)
    place.run("--terraform", FAKE_STATE="ssm:/other/chaos?region=" + REGION)
    assert place.code == 1 and "/other/chaos" in place.reason() and not applied(), place.err
    place.run("--terraform", FAKE_STATE="ssm:%s?region=eu-west-1" % NAME)
    assert place.code == 1 and "eu-west-1" in place.reason() and not applied()
    place.run("--terraform", FAKE_VALUE='{"enabled":false}', FAKE_STATE="Warning: No outputs found\n")
    assert place.code == 1 and "terraform import" in place.reason() and not applied()
    place.run("--terraform", FAKE_STATE="Warning: No outputs found\n")
    assert place.code == 0 and applied()


def with_real_aws():
    """The real aws-cli; by a flag it finds moto in both versions."""
    aws.need_aws()
    place = Place("docker", "terraform")
    place.fake("aws", '#!/bin/sh\nexec "%s" "$@" --endpoint-url "$AWS_ENDPOINT_URL"\n' % common.tool("aws"))
    return place


@case
def script_creates_the_parameter_for_real():
    place, name = with_real_aws(), NAME + "-script"
    place.run("--parameter", name, environment=moto().env())
    assert place.code == 0, place.err
    got = moto().get(name)
    assert (json.loads(got["Value"]), got["Type"], got["Version"]) == ({"enabled": False}, "String", 1)
    assert [r["repositoryName"] for r in moto().client("ecr").describe_repositories()["repositories"]] == ["chaos-proxy"]
    registry = ACCOUNT + ".dkr.ecr.%s.amazonaws.com" % REGION
    assert ["docker", "push", registry + "/chaos-proxy:latest"] in place.calls
    assert ["docker", "login", "--username", "AWS", "--password-stdin", registry] in place.calls
    with open(place.log + ".password") as f:
        assert f.read().strip()
    place.run("--parameter", name, environment=moto().env())
    assert place.code == 0 and moto().get(name)["Version"] == 1 and "left as it is" in place.out, place.err
    value = '{"enabled":true,"errorRate":5,"expiresAt":"2030-01-31T12:00:00Z"}'
    moto().put(name, value)
    place.run("--parameter", name, environment=moto().env())
    assert place.code == 1 and "in use until 2030-01-31T12:00:00Z: " + value in place.reason() and moto().get(name)["Version"] == 2


@case
def script_says_why_aws_would_not():
    place = with_real_aws()
    place.run(environment=moto().env(keys=None))
    assert place.code == 1 and "credentials" in place.reason() and place.calls == []
    keys = moto().user("deploy", "sts:GetCallerIdentity", "ecr:DescribeRepositories")
    moto().check_signatures(True)
    try:
        place.run("--no-image", environment=moto().env(keys=(keys[0], "wrong")))
        assert place.code == 1 and "no valid credentials" in place.reason(), place.err
        place.run("--no-image", environment=moto().env(keys=keys))
        assert place.code == 1 and place.reason().startswith("cannot read parameter " + NAME) and "AccessDenied" in place.err, place.err
    finally:
        moto().check_signatures(False)
    place.run("--no-image", environment=aws.env("http://127.0.0.1:%d" % free_port(), AWS_MAX_ATTEMPTS="1"))
    assert place.code == 1 and "connect" in place.reason(), place.err


@case
def script_applies_terraform_for_real():
    """The real terraform with the real folder and moto: the names of variables and of the output are what the script takes them for.
    Where the AWS provider is not on the machine, it is a skip in CI too: neither Debian nor npm has it."""
    places = (os.environ.get("CHAOS_TF_PLUGINS", ""), "/opt/tf-plugins", "/usr/share/terraform/plugins")
    plugins = [p for p in places if glob.glob(p + "/registry.terraform.io/hashicorp/aws/*/*/terraform-provider-aws*")]
    if not plugins or not common.tool("terraform"):
        print("SKIP script_applies_terraform_for_real: no terraform with the AWS provider on this machine")
        note("not tested: deploy-chaos.sh with the real terraform")
        return
    if not CI:
        raise Skip("half a minute, so with CHAOS_CI=1 only")
    place, name = with_real_aws(), NAME + "-terraform"
    os.remove(place.bin + "/terraform")
    shutil.rmtree(place.deploy + "/terraform")
    shutil.copytree(DEPLOY + "/terraform", place.deploy + "/terraform",
                    ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*", "terraform.tfvars"))
    moto().client("iam").create_role(RoleName="LabRole", AssumeRolePolicyDocument=aws.policy(["sts:AssumeRole"]))

    def run(*args):
        return place.run("--terraform", "--no-image", *args, environment=moto().env(
            CHECKPOINT_DISABLE="1", TF_CLI_ARGS_init="-plugin-dir=" + plugins[0], TF_CLI_CONFIG_FILE=None, TF_IN_AUTOMATION="1", HOME=folder()))
    run("--parameter", name)
    assert place.code == 1 and place.reason().startswith("terraform failed") and moto().get(name) is None, "nobody was there to say yes"
    run("--parameter", name, "--yes")
    assert place.code == 0, (place.err[-1500:], place.out[-500:])
    assert json.loads(moto().get(name)["Value"]) == {"enabled": False} and "left as it is" in place.out
    run("--parameter", name + "-other", "--yes")
    assert place.code == 1 and "terraform's state holds ssm:%s?region=%s" % (name, REGION) in place.reason(), place.err[-500:]
    assert moto().get(name) and not moto().get(name + "-other")
    os.remove(place.deploy + "/terraform/terraform.tfstate")
    run("--parameter", name, "--yes")
    assert place.code == 1 and "terraform import" in place.reason(), place.err[-500:]
    # what it says to do, where the region is not the one of terraform.tfvars
    other = ("--parameter", name + "-eu", "--region", "eu-west-1")
    moto().client("ssm", region="eu-west-1").put_parameter(Name=name + "-eu", Value=json.dumps({"enabled": False}), Type="String")
    run(*other, "--yes")
    folder_of, command = re.search(r"in (\S+), (terraform import .*)", place.reason()).groups()
    done = subprocess.run(["sh", "-c", command], cwd=place.root + "/" + folder_of, capture_output=True, text=True, timeout=60,
                          env={**moto().env(CHECKPOINT_DISABLE="1", TF_IN_AUTOMATION="1", TF_CLI_CONFIG_FILE=None, HOME=folder())})
    assert done.returncode == 0, done.stderr[-800:]
    run(*other)
    assert place.code == 1 and place.reason().startswith("terraform failed"), "it asks now, and nobody says yes: %s" % place.err[-500:]


@case
def docker_builds_what_the_script_says():
    """The docker CLI in earnest, on podman's service; login and push, for which there is no registry, are recorded."""
    need("docker")
    image("ssm")  # so that the layers are there
    place = fakes()
    address = "unix://" + place.root + "/docker.sock"
    environment = {**os.environ, "BUILDAH_ISOLATION": "chroot", "XDG_RUNTIME_DIR": place.root}
    service = spawn(["podman", *store(), "--runtime", "runc", "--cgroup-manager", "cgroupfs", "system", "service", "--time", "0", address],
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    until(lambda: os.path.exists(place.root + "/docker.sock"), 10, "podman's service listens")
    real = common.tool("docker")
    place.fake("docker", '#!/bin/sh\ncase $1 in login | push) exec "%s/recorder" "$@" ;; esac\nexec "%s" "$@"\n' % (place.bin, real))
    place.fake("recorder")
    for name in ("chaos.h", "examples/proxy.c", "examples/ssm.c"):
        shutil.copy(os.path.join(ROOT, name), os.path.join(place.root, name))
    shutil.copy(os.path.join(ROOT, ".dockerignore"), place.root)
    place.run(environment={**aws.env(region=REGION), "DOCKER_HOST": address, "DOCKER_BUILDKIT": "0"})
    stop(service)
    assert place.code == 0, (place.err[-800:], place.out[-800:])
    name = ACCOUNT + ".dkr.ecr.%s.amazonaws.com/chaos-proxy:latest" % REGION
    assert ["recorder", "push", name] in place.calls
    assert inspect(name)["User"] == inspect(image("ssm"))["User"]
    podman("rmi", name, check=False)


# ---- deploy-chaos.ps1 ----------------------------------------------------------------------------------------------

def parsed(language, name):
    got = node("script", language, os.path.join(DEPLOY, name))
    assert not got["errors"], got["errors"]
    return got


@case
def powershell_is_powershell():
    got = parsed("powershell", "deploy-chaos.ps1")
    assert not got["unknown"], "never set, or never read: %s" % got["unknown"]
    broken = tempfile.mkdtemp(prefix="powershell-", dir=folder()) + "/broken.ps1"
    with open(broken, "w") as f:
        f.write(read("deploy-chaos.ps1").replace("if ($dry) { return }", "if ($dry { return }"))
    assert node("script", "powershell", broken)["errors"], "the check itself"


@case
def powershell_does_what_the_shell_does():
    shell, power = parsed("bash", "deploy-chaos.sh")["calls"], parsed("powershell", "deploy-chaos.ps1")["calls"]
    own = ["fail", "cannot create a temporary file"]  # PowerShell needs none
    assert own in shell and own not in power
    shell.remove(own)
    for one, other in zip(shell, power):
        assert one == other, "sh: %s\nps1: %s" % (one, other)
    assert len(shell) == len(power) and len(power) > 50, (len(shell), len(power))
    # so it prints what the other prints
    values = {"region": REGION, "parameter": NAME, "repository": "chaos-proxy", "tag": "latest", "target": "ssm", "here": "examples/deploy",
              "tf": "examples/deploy/terraform", "approve": "false", "registry": "ACCOUNT.dkr.ecr.%s.amazonaws.com" % REGION}
    printed = [shown(re.sub(r"\$(\w+)", lambda m: values[m.group(1)], w) for w in (c[2:] if c[0] == "run" else c[1:]))
               for c in power if c[0] in ("run", "ask", "show")]
    printed = printed[1:4] + printed[:1] + printed[4:]  # FindParameter is written before it is called
    assert printed == fakes().run("--dry-run", "--terraform").commands(), printed


@case
def powershell_has_the_same_flags_and_help():
    shell, power = read("deploy-chaos.sh"), read("deploy-chaos.ps1")
    help_of = [re.search(r"^usage: .*?(?=^TEXT$|^'@$)", text, re.M | re.S).group(0) for text in (shell, power)]
    assert help_of[0] == help_of[1]
    flags = set(re.findall(r"^  (--[a-z-]+)", help_of[0], re.M))
    taken = [set(re.findall(r"^ +(--[a-z-]+)\)", shell, re.M)), set(re.findall(r"^ +'(--[a-z-]+)' \{", power, re.M))]
    assert flags == taken[0] == taken[1] and len(flags) == 9, (flags, taken)


@case
def scripts_write_nothing_but_off():
    assert json.loads(read("off.json")) == {"enabled": False} and json.loads(read("kubernetes", "configmap", "chaos.json")) == {"enabled": False}
    for name in ("deploy-chaos.sh", "deploy-chaos.ps1"):
        text = read(name)
        assert text.count("put-parameter") == 1 and "off.json" in text and "--overwrite" not in text
        assert re.findall(r'"enabled"\W{0,3}true', text) == ['"enabled":true'], "it is only looked for"
        assert all(len(line) <= 140 for line in text.splitlines())


@case
def readme_names_what_is_there():
    text = read("README.md")
    for name in re.findall(r"^\| `([^`]+)`(?:, `([^`]+)`)?", text.split("## ")[0], re.M):
        for one in filter(None, name):
            assert os.path.exists(os.path.join(DEPLOY, one)) or one in ("sam.yaml", "terraform/"), one  # those are other tests' matter
    for line in re.findall(r".*docker run.*CHAOS_CONFIG=.*", text + read("Dockerfile")):
        assert re.search(r"-e 'CHAOS_CONFIG=ssm:/[a-z/]+\?region=", line), "in a container there is no other region: " + line
    for path in re.findall(r"(?:apply -k|-f|file://)\s*(examples/deploy/\S+)", text):
        assert os.path.exists(os.path.join(ROOT, path)), path
    size = re.search(r"one static program, (\d+) KB", text)
    try:
        assert abs(inspect(image())["Size"] / 1000 - int(size.group(1))) < 8, "README says %s KB, it is %d bytes" % (size.group(1), inspect(image())["Size"])
    except Skip as reason:
        print("skip the image's size: %s" % reason)


if __name__ == "__main__":
    sys.exit(main(limit=290))

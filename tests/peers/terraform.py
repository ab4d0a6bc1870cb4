#!/usr/bin/env python3
"""examples/deploy/terraform: formatted, valid, planned and applied against moto; then what it made is used. The Run Command scripts
are cut out of the documents and run as SSM would, with podman, a real chaos-proxy, iptables and real traffic through it, in network
and mount namespaces of this process's own, which end with it. The gate's script is cut out and run too.

Not run here: SendCommand, EventBridge and Automation themselves, IAM as AWS evaluates it.

usage: terraform.py [-v] [--filter NAME] [--build DIR]"""
import ctypes
import glob
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

if os.geteuid() != 0 and shutil.which("sudo") and subprocess.run(["sudo", "-n", "true"], capture_output=True).returncode == 0:
    os.execvp("sudo", ["sudo", "-n", "env", "PATH=" + os.environ["PATH"], "CHAOS_CI=" + os.environ.get("CHAOS_CI", ""), sys.executable, *sys.argv])

import aws
import common
from common import CI, ROOT, Skip, Upstream, folder, main, need, note, spawn, tool, until

HERE = os.path.join(ROOT, "examples", "deploy", "terraform")
PARAMETER = "/shop/test/chaos"
OFF = '{"enabled":false}'
NETNS, MOUNTNS = 0x40000000, 0x00020000
SERVICE, PROXY, ADMIN = 8080, 18080, 19090  # in a network of our own
LIBC = ctypes.CDLL(None, use_errno=True)


# ---- namespaces ------------------------------------------------------------------------------------------------

def syscall(code, what):
    if code != 0:
        raise OSError(ctypes.get_errno(), "%s: %s" % (what, os.strerror(ctypes.get_errno())))


class Network:
    """This process moves into a network of its own, the instance; the clients are in another one, a cable apart."""
    made = None

    def __init__(self):
        need("ip", "unshare")
        if os.geteuid() != 0:
            raise Skip("needs root: network namespaces")
        syscall(LIBC.unshare(NETNS | MOUNTNS), "unshare")
        self.run("mount", "--make-rprivate", "/")
        self.run("mount", "-t", "tmpfs", "tmpfs", "/run")
        self.client = spawn([tool("unshare"), "-n", "sleep", "1000"])
        common.KEEP.append(self.client)
        mine = os.readlink("/proc/self/ns/net")
        until(lambda: os.readlink("/proc/%d/ns/net" % self.client.pid) != mine, 5, "the clients have a network")
        self.run("ip", "link", "set", "lo", "up")
        self.run("ip", "link", "add", "cable0", "type", "veth", "peer", "name", "cable1", "netns", str(self.client.pid))
        self.run("ip", "addr", "add", "10.77.0.1/24", "dev", "cable0")
        self.run("ip", "link", "set", "cable0", "up")
        there = [tool("nsenter"), "-t", str(self.client.pid), "-n"]
        self.run(*there, "ip", "addr", "add", "10.77.0.2/24", "dev", "cable1")
        self.run(*there, "ip", "link", "set", "cable1", "up")
        self.address = "10.77.0.1"

    @staticmethod
    def run(*argv):
        subprocess.run(argv, check=True, capture_output=True, timeout=10)

    def enter(self):
        """The calling thread is a client from here on."""
        with open("/proc/%d/ns/net" % self.client.pid) as f:
            syscall(LIBC.setns(f.fileno(), NETNS), "setns")


def network():
    if not Network.made:
        Network.made = Network()
    return Network.made


def before_threads():
    """A mount namespace wants it early: nothing has started yet."""
    try:
        network()
    except (Skip, OSError, subprocess.CalledProcessError):
        pass  # the cases that need it say so


# ---- terraform ---------------------------------------------------------------------------------------------------

def plugins():
    """The folder with the AWS provider. Not in Debian and not on npm: without it a skip, loud, in CI too."""
    for where in filter(None, (os.environ.get("CHAOS_TF_PLUGINS"), "/opt/tf-plugins", "/usr/share/terraform/plugins")):
        if glob.glob(where + "/registry.terraform.io/hashicorp/aws/*/*/terraform-provider-aws*"):
            return where
    return None


class LoudSkip(Skip):
    """A skip in CI as well."""


def case(function):
    def run():
        common.CI = CI
        try:
            function()
        except LoudSkip as reason:
            common.CI = False
            note("NOT TESTED: %s: %s" % (function.__name__, reason))
            raise
    run.__name__ = function.__name__
    return common.case(run)


class Terraform:
    made = None

    def __init__(self):
        if not tool("terraform"):
            raise LoudSkip("no terraform on this machine")
        if not plugins():
            raise LoudSkip("no folder with the AWS provider; CHAOS_TF_PLUGINS names one")
        self.dir = tempfile.mkdtemp(prefix="terraform-", dir=folder()) + "/deploy"
        shutil.copytree(HERE, self.dir, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*", "terraform.tfvars"))
        self.moto = aws.moto()
        self.environment = self.moto.env(CHECKPOINT_DISABLE="1", TF_IN_AUTOMATION="1", TF_CLI_CONFIG_FILE=None, HOME=folder(), AWS_CONFIG_FILE=folder() + "/none", AWS_SHARED_CREDENTIALS_FILE=folder() + "/none",
                                         AWS_EC2_METADATA_DISABLED="true")
        with open(os.path.join(HERE, "terraform.tfvars.example")) as f:
            example = f.read()
        with open(self.dir + "/terraform.tfvars", "w") as f:
            f.write(re.sub(r'(parameter_name *=) "[^"]*"', r'\1 "%s"' % PARAMETER, example))
        self("init", "-plugin-dir=" + plugins())

    def __call__(self, *args, ok=(0,), seconds=60):
        done = subprocess.run([tool("terraform"), args[0], "-no-color", *([] if args[0] in ("fmt", "validate", "output", "show") else ["-input=false"]),
                               *args[1:]], cwd=self.dir, env=self.environment, capture_output=True, text=True, timeout=seconds)
        assert done.returncode in ok, "terraform %s: %d\n%s" % (" ".join(args), done.returncode, (done.stdout + done.stderr)[-2500:])
        return done

    def show(self, plan):
        """{address: what is planned for it}"""
        changes = json.loads(self("show", "-json", plan).stdout)["resource_changes"]
        return {c["address"]: c["change"] for c in changes if c["change"]["actions"] != ["no-op"] and c["mode"] == "managed"}


def terraform():
    if not Terraform.made:
        Terraform.made = Terraform()
    return Terraform.made


ALARM = "arn:aws:cloudwatch:us-east-1:123456789012:alarm:checkout-5xx"
GATE = ["-var", 'alarm_names=["checkout-5xx"]', "-var", "alb_arn_suffix=app/checkout/50dc6c495c0c9188"]
FULL = [*GATE, "-var", "operator_role_name=chaos-operator", "-var", "launch_template_name=chaos-base"]
APPLIED = {}


def applied():
    """What stands in moto after apply: {output: value}."""
    if APPLIED:
        return APPLIED
    t = terraform()
    trust = json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"},
                                                               "Action": "sts:AssumeRole"}]})
    iam = t.moto.client("iam")
    for role in ("LabRole", "chaos-operator"):
        iam.create_role(RoleName=role, AssumeRolePolicyDocument=trust)
    t("apply", "-auto-approve", *FULL)
    APPLIED.update({k: v["value"] for k, v in json.loads(t("output", "-json").stdout).items()})
    Later.made = Later(t)
    return APPLIED


class Later(threading.Thread):
    """Plans that nobody waits for, one after the other, beside the cases that mostly wait. results: what each said, or its failure."""
    made = None

    def __init__(self, t):
        super().__init__(daemon=True)
        self.t, self.results = t, {}
        self.start()

    def run(self):
        state = ["-state=" + self.t.dir + "/none.tfstate", "-refresh=false"]
        bad = {"image": "x; rm -rf /", "name": "a b", "parameter_name": "aws"}
        poor = [*state, *GATE, "-var", "attach_policies=false"]
        for name, job in (("bad", lambda: self.t("plan", *state, *[w for k, v in bad.items() for w in ("-var", "%s=%s" % (k, v))], ok=(1,)).stderr),
                          ("no role", lambda: self.t("plan", *poor, ok=(1,)).stderr),
                          ("role", lambda: self.t("plan", *poor, "-var", "gate_role_arn=arn:aws:iam::123456789012:role/LabRole", "-out=none.tfplan")),
                          ("planned", lambda: self.t.show("none.tfplan"))):
            try:
                self.results[name] = job()
            except Exception as error:  # told by the case that asks for it
                self.results[name] = error

    def get(self, name):
        self.join(120)
        result = self.results.get(name, AssertionError("not done in time"))
        if isinstance(result, Exception):
            raise result
        return result


@case
def formatted_and_valid():
    t = terraform()
    t("fmt", "-check", "-recursive", "-diff")
    said = json.loads(t("validate", "-json").stdout)
    assert said["valid"] and not said["diagnostics"], said["diagnostics"]


@case
def applied_against_moto():
    out, t = applied(), terraform()
    stored = t.moto.get(PARAMETER)
    assert (stored["Value"], stored["Type"]) == (OFF, "String"), stored
    assert out["config_source"] == "ssm:%s?region=us-east-1" % PARAMETER
    iam = t.moto.client("iam")
    attached = {role: sorted(p["PolicyName"] for p in iam.list_attached_role_policies(RoleName=role)["AttachedPolicies"])
                for role in ("LabRole", "chaos-operator")}
    assert attached == {"LabRole": ["chaos-agent", "chaos-logs", "chaos-pull"], "chaos-operator": ["chaos-operator"]}, attached
    data = t.moto.client("ec2").describe_launch_template_versions(LaunchTemplateName="chaos-base")["LaunchTemplateVersions"][0]
    options = data["LaunchTemplateData"]["MetadataOptions"]
    assert options["HttpPutResponseHopLimit"] == 2 and options["HttpTokens"] == "required", options
    alarm = t.moto.client("cloudwatch").describe_alarms(AlarmNames=["chaos-abort"])["MetricAlarms"][0]
    assert (alarm["DatapointsToAlarm"], alarm["EvaluationPeriods"], alarm["TreatMissingData"]) == (2, 3, "notBreaching"), alarm
    share, *parts = sorted(alarm["Metrics"], key=lambda m: "MetricStat" in m)
    assert {m["MetricStat"]["Metric"]["MetricName"]: m["Id"] for m in parts} == {
        "HTTPCode_Target_5XX_Count": "errors", "HTTPCode_ELB_5XX_Count": "elb", "RequestCount": "requests"}, parts
    assert set(re.findall(r"[a-z]+", share["Expression"])) == {m["Id"] for m in parts}, share


@case
def policies_are_least():
    """Each action of ours on each resource: no wildcard where AWS knows resources, nothing but what is listed here."""
    out = applied()
    arn = "arn:aws:ssm:us-east-1:123456789012:parameter" + PARAMETER
    document = "arn:aws:ssm:us-east-1:123456789012:document/chaos-proxy-"

    def statements(name):
        for s in json.loads(out["policy_" + name])["Statement"]:
            assert s["Effect"] == "Allow"
            listed = [[s[k]] if isinstance(s[k], str) else sorted(s[k]) for k in ("Action", "Resource")]
            yield s["Sid"], (*listed, s.get("Condition"))

    assert dict(statements("agent")) == {"ChaosRead": (["ssm:GetParameter"], [arn], None)}
    assert dict(statements("pull")) == {
        "EcrLogin": (["ecr:GetAuthorizationToken"], ["*"], None),
        "EcrPull": (["ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer"],
                    ["arn:aws:ecr:us-east-1:123456789012:repository/chaos-proxy"], None)}
    assert dict(statements("logs")) == {"ChaosLogs": (["logs:CreateLogStream", "logs:PutLogEvents"],
                                                      ["arn:aws:logs:us-east-1:123456789012:log-group:/chaos/proxy:*"], None)}
    assert dict(statements("operator")) == {
        "ChaosSteer": (["ssm:GetParameter", "ssm:PutParameter"], [arn], None),
        "ChaosStopAll": (["ssm:GetParametersByPath"], [os.path.dirname(arn) + "/*"], None),
        "ChaosDocuments": (["ssm:SendCommand"], [document + "start", document + "stop"], None),
        "ChaosInstances": (["ssm:SendCommand"], ["arn:aws:ec2:us-east-1:123456789012:instance/*"],
                           {"StringEquals": {"ssm:resourceTag/chaos": "canary"}}),
        "ChaosWatch": (["ssm:GetCommandInvocation", "ssm:ListCommandInvocations", "ssm:ListCommands"], ["*"], None),
        "ChaosCancel": (["ssm:CancelCommand"], ["*"], None)}


@case
def policies_do():
    """moto as the judge, of the actions (it knows no resources): the agent's policy reads and does not write; the operator does both,
    and may run the runbook's disable --path."""
    out, t = applied(), terraform()
    iam, keys = t.moto.client("iam"), {}
    for name in ("agent", "operator"):
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=re.sub(r'"Resource": ?("[^"]*"|\[[^]]*\])', '"Resource":"*"', out["policy_" + name]))
        key = iam.create_access_key(UserName=name)["AccessKey"]
        keys[name] = key["AccessKeyId"], key["SecretAccessKey"]

    def denied(name, **request):
        ssm = t.moto.client("ssm", keys=keys[name])
        try:
            (ssm.put_parameter if "Value" in request else ssm.get_parameters_by_path if "Path" in request else ssm.get_parameter)(**request)
        except aws.ClientError as error:
            assert error.response["ResponseMetadata"]["HTTPStatusCode"] == 403, error
            return True
        return False
    t.moto.check_signatures(True)
    try:
        got = {name: (denied(name, Name=PARAMETER), denied(name, Name=PARAMETER, Value=OFF, Overwrite=True, Type="String"),
                      denied(name, Path=os.path.dirname(PARAMETER) + "/")) for name in keys}
    finally:
        t.moto.check_signatures(False)
    assert got == {"agent": (False, True, True), "operator": (False, False, False)}, got


# ---- the gate ----------------------------------------------------------------------------------------------------

def fits(pattern, event):
    """As EventBridge matches, as far as our pattern goes."""
    if isinstance(pattern, dict):
        return isinstance(event, dict) and all(k in event and fits(v, event[k]) for k, v in pattern.items())
    return any(e in pattern for e in (event if isinstance(event, list) else [event]))


def alarm_event(state, arn=ALARM):
    return {"source": "aws.cloudwatch", "detail-type": "CloudWatch Alarm State Change", "region": "us-east-1", "resources": [arn],
            "detail": {"alarmName": arn.split(":")[-1], "state": {"value": state, "reason": "Threshold Crossed"}, "previousState": {"value": "OK"}}}


@case
def the_gate_turns_it_off():
    out, t = applied(), terraform()
    events = t.moto.client("events")
    rule = events.describe_rule(Name="chaos-gate-off")
    pattern = json.loads(rule["EventPattern"])
    assert rule["State"] == "ENABLED" and sorted(out["gate"]) == sorted(pattern["resources"]), pattern
    assert fits(pattern, alarm_event("ALARM")) and fits(pattern, alarm_event("ALARM", ALARM.replace("checkout-5xx", "chaos-abort")))
    assert not fits(pattern, alarm_event("OK")) and not fits(pattern, alarm_event("ALARM", ALARM + "-else"))

    target, = events.list_targets_by_rule(Rule="chaos-gate-off")["Targets"]
    assert target["Arn"] == "arn:aws:ssm:us-east-1:123456789012:automation-definition/chaos-gate-off:$DEFAULT", target
    assert target["Input"] == "{}", "the event would be taken for the document's parameters: %s" % target
    document = json.loads(t.moto.ssm.get_document(Name="chaos-gate-off")["Content"])
    assert document["assumeRole"] == target["RoleArn"], (document["assumeRole"], target)
    role = t.moto.client("iam").get_role_policy(RoleName="chaos-gate", PolicyName="off")["PolicyDocument"]
    wild = [s for s in role["Statement"] if "*" in ([s["Resource"]] if isinstance(s["Resource"], str) else s["Resource"])]
    assert not wild, wild

    step, = document["mainSteps"]
    inputs = step["inputs"]
    assert (step["action"], inputs["Runtime"], inputs["Handler"]) == ("aws:executeScript", "python3.11", "off"), step
    for stored in ('{"enabled":true,"latency":200,"owner":"ana"}', '{"enabled":true,', OFF):
        t.moto.put(PARAMETER, stored)
        code = inputs["Script"] + "\nimport json, sys\nprint(json.dumps(off(json.load(sys.stdin), None)))\n"
        done = subprocess.run([sys.executable, "-c", code], input=json.dumps(inputs["InputPayload"]), env=t.environment, capture_output=True,
                              text=True, timeout=20)
        if "No module named 'boto3'" in done.stderr:
            raise Skip("not installed: python's boto3")
        assert done.returncode == 0 and json.loads(done.stdout)["value"] == OFF, done.stderr[-500:]
        assert t.moto.get(PARAMETER)["Value"] == OFF


# ---- the documents -----------------------------------------------------------------------------------------------

class Document:
    """A Run Command document, as SSM has it; where there is no provider to make it, put together from its parts."""
    made = {}

    def __init__(self, name):
        self.name = name
        if name in Document.made:
            self.commands, self.parameters = Document.made[name]
            return
        try:
            applied()
            content = json.loads(terraform().moto.ssm.get_document(Name="chaos-proxy-" + name)["Content"])
            step, = content["mainSteps"]
            assert content["schemaVersion"] == "2.2" and step["action"] == "aws:runShellScript", step
            self.commands, self.parameters = step["inputs"]["runCommand"], content["parameters"]
        except LoudSkip:
            self.commands, self.parameters = [], None
            for part in ("route", name):
                with open(os.path.join(HERE, "scripts", part + ".sh")) as f:
                    self.commands += f.read().strip().split("\n")
        Document.made[name] = self.commands, self.parameters

    DEFAULTS = {"Engine": "podman", "AdminPort": str(ADMIN), "ServicePort": str(SERVICE), "ProxyPort": str(PROXY), "LogGroup": "/chaos/proxy",
                "Minutes": "60", "DrainSeconds": "5", "Image": "localhost/chaos-proxy:test", "Parameter": PARAMETER, "Region": aws.REGION}

    def script(self, **values):
        """A file with the values put in, as the agent makes it."""
        values = {**self.DEFAULTS, **values}
        text = "\n".join(self.commands) + "\n"
        for name in set(re.findall(r"{{ *(\w+) *}}", text)):
            if self.parameters is not None:
                self.accepts(name, values[name], True)
            text = re.sub(r"{{ *%s *}}" % name, lambda _: values[name], text)
        assert "{{" not in text
        return aws.written(text, 0o700, "_script.sh")

    def accepts(self, name, value, wanted):
        rule = self.parameters[name]
        ok = value in rule["allowedValues"] if "allowedValues" in rule else re.fullmatch(rule["allowedPattern"], value) is not None
        assert ok == wanted, "%s of %s %s %r" % (name, self.name, "takes" if ok else "refuses", value)


@case
def scripts_are_clean():
    """shellcheck, and dash as the strictest sh; each placeholder is a parameter, and nothing that could leave its quotes is taken."""
    need("shellcheck")
    for name in ("start", "stop"):
        document = Document(name)
        path = document.script()
        done = subprocess.run([tool("shellcheck"), "-s", "sh", "-e", "SC2119,SC2120", path], capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stdout
        if document.parameters is not None:
            text = "\n".join(document.commands)
            assert set(re.findall(r"{{ *(\w+) *}}", text)) == set(document.parameters), document.parameters.keys()
            assert len(re.findall("{{", text)) == len(re.findall(r"'[^'\n]*{{ \w+ }}[^'\n]*'", text)), "a placeholder without quotes"
            for parameter, rule in document.parameters.items():
                document.accepts(parameter, rule["default"], True)
                for evil in ("a'; reboot; '", "$(reboot)", "`reboot`", "a b", "a\nreboot", "x\n", "{{ ssm:/other }}"):
                    document.accepts(parameter, evil, False)


# ---- the scripts, for real -----------------------------------------------------------------------------------------

class Instance:
    """What is on the instance: a service, podman with the image of chaos-proxy, moto as SSM; and clients beyond the cable."""
    made = None

    def __init__(self):
        need("podman", "runc", "iptables", "flock", "setsid", "curl", "ldd")
        proxy = os.path.join(common.BUILD, "chaos-proxy")
        if "ssm:curl" not in subprocess.run([proxy, "--version"], capture_output=True, text=True, timeout=5).stdout:
            raise Skip("not installed: libcurl, or build/chaos-proxy is without")
        self.net = network()
        self.moto = aws.moto()
        self.dir = tempfile.mkdtemp(prefix="instance-", dir=folder())
        containers = {k: v for k, v in self.moto.env().items() if k.startswith("AWS_")}
        with open(self.dir + "/containers.conf", "w") as f:
            f.write('[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1024:1024"]\nlog_driver = "k8s-file"\nenv = %s\n'
                    '[engine]\ncgroup_manager = "cgroupfs"\nruntime = "runc"\nevents_logger = "file"\n'
                    % json.dumps(["%s=%s" % pair for pair in containers.items()]))
        with open(self.dir + "/storage.conf", "w") as f:
            f.write('[storage]\ndriver = "vfs"\ngraphroot = "%s/graph"\nrunroot = "/run/podman"\n' % self.dir)
        self.environment = self.moto.env(CONTAINERS_CONF=self.dir + "/containers.conf", CONTAINERS_STORAGE_CONF=self.dir + "/storage.conf",
                                         HOME=self.dir, AWS_SSM_INSTANCE_ID="i-0123456789abcdef0")
        self.image(proxy)
        self.service = self.serve()

    def image(self, proxy):
        """FROM scratch, with the program and what it is linked with: the shape of the image with libcurl."""
        root = self.dir + "/root"
        libraries = re.findall(r"(/\S+) \(0x", subprocess.run(["ldd", proxy], capture_output=True, text=True, check=True, timeout=10).stdout)
        for path in libraries:
            os.makedirs(root + os.path.dirname(path), exist_ok=True)
            shutil.copy(os.path.realpath(path), root + path)
        shutil.copy(proxy, root + "/chaos-proxy")
        subprocess.run(["tar", "-C", root, "-cf", self.dir + "/image.tar", "."], check=True, timeout=20)
        self.podman("import", "-q", "--change", 'ENTRYPOINT ["/chaos-proxy"]', "--change", "USER 65534:65534", self.dir + "/image.tar", "localhost/chaos-proxy:test")
        shutil.rmtree(root)
        os.unlink(self.dir + "/image.tar")

    def serve(self):
        return Upstream(lambda r: r.reply(b"proxied" if "via" in r.fields else b"direct"), host="0.0.0.0", port=SERVICE)

    def podman(self, *args, check=True):
        done = subprocess.run([tool("podman"), *args], env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, "podman %s: %s" % (" ".join(args), done.stderr[-500:])
        return done.stdout

    def command(self, name, wanted=0, environment=None, **values):
        """As the agent runs it; what it said."""
        script, began = Document(name).script(**values), time.monotonic()
        done = spawn(["/bin/sh", "-c", script], env={**self.environment, **(environment or {})}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                     text=True, cwd="/", process_group=0)
        try:
            said = done.communicate(timeout=40)[0]
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, signal.SIGKILL)
            raise
        assert done.returncode == wanted, "%s: %d\n%s\n%s" % (name, done.returncode, said, self.podman("logs", "chaos-proxy", check=False)[-800:])
        self.seconds = time.monotonic() - began
        return said

    def jumps(self):
        return [r for r in self.rules() if r.startswith("-A PREROUTING")]

    def rules(self):
        return [r for table in ("nat", "filter") for r in subprocess.run([tool("iptables"), "-t", table, "-S"], capture_output=True, text=True,
                                                                         timeout=5).stdout.split("\n") if "CHAOS" in r]

    def guards(self):
        found = []
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open("/proc/%s/cmdline" % pid, "rb") as f:
                    if b"/run/chaos-proxy/script\0guard\0" in f.read():
                        found.append(int(pid))
            except OSError:
                pass
        return found

    def ask(self, connection=None):
        return Client(self.net).one()

    def nothing_is_left(self):
        assert self.rules() == [] and self.podman("ps", "-aq") == "", (self.rules(), self.podman("ps", "-a"))
        assert not os.path.exists("/run/chaos-proxy/ticket")
        until(lambda: not self.guards(), 3, "the guard is gone")

    def clean(self):
        for words in (["-t", "nat", "-F"], ["-t", "nat", "-X"], ["-P", "INPUT", "ACCEPT"], ["-F"], ["-X"]):
            subprocess.run([tool("iptables"), *words], timeout=5, capture_output=True)
        if os.path.exists("/run/chaos-proxy/ticket"):
            os.unlink("/run/chaos-proxy/ticket")
        self.podman("rm", "-f", "-t", "0", "-a", check=False)

    def steer(self, value):
        """An operator writes; the proxy looks at once, as with SIGHUP."""
        self.moto.put(PARAMETER, value)
        self.podman("kill", "--signal", "HUP", "chaos-proxy")


def instance():
    if not Instance.made:
        Instance.made = Instance()
        import atexit
        atexit.register(Instance.made.clean)
    Instance.made.clean()
    Document("start")  # terraform makes the parameter, whichever case comes first
    Instance.made.moto.put(PARAMETER, OFF)
    return Instance.made


class Client(threading.Thread):
    """Clients beyond the cable: one request after the other, each on its own connection (keep False), or on one that is kept until the
    server says close, or for a life in seconds. results: (when, "direct" or "proxied" or the status, mark). No request is sent twice."""

    def __init__(self, net, keep=False, pause=0.005, life=1.5):
        super().__init__(daemon=True)
        self.life = life
        self.net, self.keep, self.pause, self.results, self.failures, self.over = net, keep, pause, [], [], threading.Event()

    def run(self):
        self.net.enter()
        connection = None
        while not self.over.wait(self.pause):
            when, fresh = time.monotonic(), connection is None
            try:
                if fresh:
                    connection, end = self.connect(), when + self.life
                self.results.append((when, *self.exchange(connection)))
                if not self.keep or self.closes or when > end:
                    connection.close()
                    connection = None
            except (OSError, EOFError) as error:
                connection = None
                self.failures.append((when, "%s on a %s connection" % (error or type(error).__name__, "new" if fresh else "kept")))

    def connect(self):
        return socket.create_connection((self.net.address, SERVICE), 5)

    def exchange(self, s):
        s.sendall(b"GET /orders/7 HTTP/1.1\r\nHost: shop\r\n%s\r\n" % (b"" if self.keep else b"Connection: close\r\n"))
        data = b""
        while b"\r\n\r\n" not in data:
            got = s.recv(65536)
            if not got:
                raise EOFError("closed before the reply")
            data += got
        head, body = data.split(b"\r\n\r\n", 1)
        length = int(re.search(rb"(?i)\ncontent-length: *(\d+)", head).group(1))
        while len(body) < length:
            got = s.recv(65536)
            if not got:
                raise EOFError("closed in the reply")
            body += got
        self.closes = re.search(rb"(?i)\nconnection: *close", head) is not None
        mark = re.search(rb"(?i)\nx-chaos-injected: *(\w+)", head)
        status = head.split(b" ")[1].decode()
        return (body.decode() if status == "200" else status), mark and mark.group(1).decode()

    def one(self):
        """One request, on a thread of its own."""
        def job():
            self.net.enter()
            with self.connect() as s:
                return self.exchange(s)
        return common.in_threads([job], 15)[0]

    def since(self, moment):
        return [r[1:] for r in self.results if r[0] > moment]

    def end(self):
        self.over.set()
        self.join(10)


def clients(net, fresh=2, kept=6, life=1.5):
    new = [Client(net, pause=0.02) for _ in range(fresh)] + [Client(net, True, 0.008 + 0.004 * i, life) for i in range(kept)]
    for c in new:
        c.start()
    return new


@case
def traffic_is_led_in_and_out():
    """start and stop under traffic, with an experiment in between; no request fails but by the experiment."""
    i = instance()
    running = clients(i.net, kept=4, life=60)
    fresh, kept = running[:2], running[2:]
    until(lambda: all(len(c.results) > 10 for c in running), 5, "traffic")
    assert {r[1] for c in running for r in c.results} == {"direct"}

    said = i.command("start")
    steps = re.findall(r"^chaos: (\w+):", said, re.M)
    assert steps == ["container", "proxy", "service", "route"] and '"state":"off"' in said, said
    started, began = i.seconds, time.monotonic()
    assert len(i.rules()) == 6, i.rules()
    time.sleep(0.3)
    got = {r for c in fresh for r in c.since(began)}
    assert got == {("proxied", None)}, (got, i.rules(), [c.failures[-3:] for c in fresh])
    assert {r for c in kept for r in c.since(began)} == {("direct", None)}, "a connection has moved"
    late = clients(i.net, 0, 4) + clients(i.net, 0, 4, life=60)  # kept in the proxy; some until it says close

    again = i.command("start")  # nothing changes
    assert "runs already" in again and len(i.rules()) == 6, again
    until(lambda: len(i.guards()) == 1, 3, "one guard")
    said = i.command("start", wanted=1, Parameter="/other/chaos")
    assert "other settings" in said and len(i.rules()) == 6, said

    began = time.monotonic()
    i.steer('{"enabled":true,"latency":{"min":5,"max":30},"errorRate":30}')
    until(lambda: {"503", "proxied"} <= {r[0] for c in fresh for r in c.since(began) if r[1]}, 5, "faults are seen")
    until(lambda: {r[1] for c in late for r in c.since(began)} >= {"error", "latency"}, 5, "on kept connections too")

    stopping = time.monotonic()
    said = i.command("stop")
    steps = re.findall(r"^chaos: (\w+):", said, re.M)
    assert steps == ["route", "drain", "container"], said
    stopped, began = i.seconds, time.monotonic()
    i.nothing_is_left()
    with open("/run/chaos-proxy/guard.log") as f:
        assert f.read() == "", "the guard took an orderly stop for a death"
    time.sleep(0.3)
    after = {r for c in running + late for r in c.since(began)}
    assert after == {("direct", None)}, after
    for c in running + late:
        c.end()
    plain = [r for c in running + late for r in c.results if r[1] not in ("direct", "proxied") and not r[2]]
    assert not plain, "a status that nobody ordered: %s" % plain[:3]
    failed = [f for c in running + late for f in c.failures]
    assert not failed, "%d failed: %s" % (len(failed), [(f[0] - stopping, f[1]) for f in failed[:5]])
    note("route: start %.1f s, stop %.1f s with 5 s of drain; %d requests, none failed but by order" %
         (started, stopped, sum(len(c.results) for c in running + late)))

    said = i.command("stop")  # a second time
    assert "none runs" in said, said
    i.nothing_is_left()


@case
def a_start_that_fails_changes_nothing():
    i = instance()
    for reason, values in (("does not start", {"Image": "localhost/none:test"}), ("cannot reach it", {"ServicePort": "8081"}),
                           ("not healthy", {"ProxyPort": str(SERVICE)})):
        began = time.monotonic()
        said = i.command("start", wanted=1, **values)
        assert reason in said and "nothing is changed" in said, said
        i.nothing_is_left()
        assert time.monotonic() - began < 20 and Client(i.net).one() == ("direct", None)
    # the very last step
    bad = aws.written('#!/bin/sh\ncase "$*" in *"-I PREROUTING"*) exit 4 ;; esac\nexec %s "$@"\n' % tool("iptables"), 0o755, "iptables")
    said = i.command("start", wanted=4, environment={"PATH": os.path.dirname(bad) + ":" + os.environ["PATH"]})
    assert "answers through the proxy" in said and "nothing is changed" in said, said
    i.nothing_is_left()
    assert Client(i.net).one() == ("direct", None)


@case
def a_host_that_filters_lets_in_what_was_redirected():
    """INPUT drops all but the service's port: the proxy's is closed to clients, and yet the redirected connections reach it. The agent
    has an http_proxy, too, which must not be asked for loopback."""
    i = instance()
    for words in (["-A", "INPUT", "-i", "lo", "-j", "ACCEPT"], ["-A", "INPUT", "-p", "tcp", "--dport", str(SERVICE), "-j", "ACCEPT"],
                  ["-P", "INPUT", "DROP"]):
        i.net.run(tool("iptables"), "-w", "10", *words)
    proxy = {"http_proxy": "http://127.0.0.1:9"}
    i.command("start", environment=proxy)
    assert i.ask() == ("proxied", None)

    def straight():
        i.net.enter()
        try:
            socket.create_connection((i.net.address, PROXY), 0.5).close()
        except OSError:
            return "closed"
        return "open"
    assert common.in_threads([straight], 5) == ["closed"], "the proxy's port is open to all"
    i.command("stop", environment=proxy)
    i.nothing_is_left()
    assert i.ask() == ("direct", None)


@case
def the_guard_opens_the_way():
    """A proxy that dies takes the service with it for 2 s at most; the time is over; a proxy that hangs."""
    i = instance()
    i.command("start")
    fresh = clients(i.net, 1, 0)[0]
    try:
        until(lambda: ("proxied", None) in fresh.since(0), 5, "traffic")
    except AssertionError:
        raise AssertionError("not led in: %s %s %s" % (i.rules(), fresh.since(0)[-2:], fresh.failures[-2:]))
    died = time.monotonic()
    i.podman("kill", "--signal", "KILL", "chaos-proxy")
    until(lambda: ("direct", None) in fresh.since(died), 4, "traffic is back")
    back = time.monotonic() - died
    fresh.end()
    last = max([when for when, _ in fresh.failures], default=died) - died
    until(lambda: not i.jumps(), 2, "the jump is gone")
    assert last < 2.5, last
    note("guard: the proxy killed, the service reached again after %.1f s" % back)

    i.command("start")
    with open("/run/chaos-proxy/ticket") as f:
        ticket = f.read().strip()
    with open("/proc/uptime") as f:
        now = int(float(f.read().split()[0]))
    over = subprocess.run(["sh", "/run/chaos-proxy/script", "guard", ticket, str(now + 1)], env=i.environment, capture_output=True, text=True, timeout=10)
    assert "its time is over" in over.stdout and not i.jumps(), over
    assert Client(i.net).one() == ("direct", None)

    said = i.command("start")  # in again, the container was there
    assert "runs already" in said
    i.podman("kill", "--signal", "STOP", "chaos-proxy")
    until(lambda: not i.jumps(), 15, "the guard sees that it hangs")
    assert Client(i.net).one() == ("direct", None)
    i.podman("kill", "--signal", "CONT", "chaos-proxy")
    i.command("stop")
    i.nothing_is_left()


@case
def a_stop_wins_over_a_start():
    """A start is at work and puts the route in after the stop has looked: the stop looks again. Without podman, too, the route goes."""
    i = instance()
    os.makedirs("/run/chaos-proxy", exist_ok=True)
    holder = spawn(["flock", "/run/chaos-proxy/lock", "sh", "-c", "sleep 1; iptables -t nat -N CHAOS_PROXY; "
                    "iptables -t nat -I PREROUTING -p tcp --dport %d -j CHAOS_PROXY" % SERVICE], env=dict(os.environ, PATH=os.environ["PATH"] + ":/usr/sbin"))
    until(lambda: subprocess.run(["flock", "-n", "/run/chaos-proxy/lock", "true"], timeout=5).returncode, 2, "the lock is held")
    i.command("stop")
    assert holder.wait(5) == 0
    i.nothing_is_left()

    subprocess.run(["sh", "-c", "iptables -t nat -N CHAOS_PROXY; iptables -t nat -I PREROUTING -p tcp --dport 1 -j CHAOS_PROXY"], check=True, timeout=5,
                   env=dict(os.environ, PATH=os.environ["PATH"] + ":/usr/sbin"))
    said = i.command("stop", wanted=1, Engine="no-such-engine") if Document("stop").parameters is None else without_engine(i)
    assert "not installed" in said and not i.jumps(), said


def without_engine(i):
    """stop where the engine is not on PATH."""
    bare = tempfile.mkdtemp(prefix="path-", dir=folder())
    for name in ("iptables", "grep", "id", "mkdir", "rm", "flock", "sh"):
        os.symlink(tool(name), bare + "/" + name)
    script = Document("stop").script()
    text = open(script).read().replace("PATH=$PATH:/usr/sbin:/sbin", "PATH=$PATH")
    done = subprocess.run([tool("sh"), aws.written(text)], env={"PATH": bare}, capture_output=True, text=True, timeout=20)
    assert done.returncode == 1, done
    return done.stdout + done.stderr


@case
def the_login_and_the_log_driver():
    """What podman cannot show: the login to ECR and docker's awslogs driver, as command lines of a docker that only writes them down."""
    i = instance()
    new, log = tempfile.mkdtemp(prefix="docker-", dir=folder()), folder() + "/docker.log"
    with open(new + "/docker", "w") as f:
        f.write('#!/bin/sh\necho "$*" >>%s\n[ "$1" != login ] || cat >>%s\n[ "$1" != run ]\n' % (log, log))
    os.chmod(new + "/docker", 0o755)
    environment = {**i.environment, "PATH": new + ":" + os.environ["PATH"]}
    image = "123456789012.dkr.ecr.us-east-1.amazonaws.com/chaos-proxy:1"
    script = Document("start").script(Engine="docker", Image=image, LogGroup="/chaos/proxy")
    done = subprocess.run(["/bin/sh", "-c", script], env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1 and "does not start" in done.stderr, done
    with open(log) as f:
        lines = f.read()
    assert "login --username AWS --password-stdin 123456789012.dkr.ecr.us-east-1.amazonaws.com\n" in lines, lines
    run = [line for line in lines.split("\n") if line.startswith("run ")][0]
    assert "--log-driver awslogs --log-opt awslogs-region=us-east-1 --log-opt awslogs-group=/chaos/proxy --log-opt awslogs-stream=i-0123456789abcdef0" in run
    assert ("%s --listen 0.0.0.0:18080 --upstream http://127.0.0.1:8080 --config ssm:%s?region=us-east-1 " % (image, PARAMETER)) in run, run


# ---- last, because it was planned beside the others ------------------------------------------------------------------

@case
def without_iam_writes():
    """AWS Academy: nothing of IAM is planned; a gate without a role is refused, with LabRole it is fine."""
    applied()
    assert "gate_role_arn" in Later.made.get("no role")
    planned = Later.made.get("planned")
    assert planned and not [a for a in planned if "aws_iam" in a], list(planned)
    assert "aws_cloudwatch_event_target.gate[0]" in planned, list(planned)


@case
def bad_settings_are_refused():
    applied()
    said = Later.made.get("bad")
    assert "The image is" in said and "The name is 3 to 40" in said and "The name is /LEVEL" in said, said


@case
def an_apply_does_not_touch_an_experiment():
    applied()
    t = terraform()
    running = '{"enabled":true,"latency":200,"expiresAt":"2099-01-01T00:00:00Z"}'
    t.moto.put(PARAMETER, running)
    t("plan", "-out=again.tfplan", *FULL)
    assert set(t.show("again.tfplan")) <= {"aws_launch_template.chaos[0]"}  # of which moto gives back more than it was given
    assert t.moto.get(PARAMETER)["Value"] == running


@case
def an_apply_does_not_undo_a_stop():
    """A parameter that was not made by terraform differs in more than its value. Between plan and apply somebody stops the experiment."""
    applied()
    t, name = terraform(), PARAMETER + "-imported"
    running = '{"enabled":true,"latency":200,"expiresAt":"2099-01-01T00:00:00Z"}'
    t.moto.ssm.put_parameter(Name=name, Value=running, Type="SecureString", Tier="Advanced")
    rest = ["-state=imported.tfstate", "-var", "parameter_name=" + name]
    t("import", *rest, "module.parameter.aws_ssm_parameter.this", name)
    t("plan", *rest, "-target=module.parameter", "-out=imported.tfplan", ok=(0, 2))
    t.moto.put(name, OFF)
    version = t.moto.get(name)["Version"]
    t("apply", "-state=imported.tfstate", "imported.tfplan")
    assert (t.moto.get(name)["Value"], t.moto.get(name)["Version"]) == (OFF, version), "the apply wrote what it saw before"


if __name__ == "__main__":
    before_threads()
    sys.exit(main(limit=240))

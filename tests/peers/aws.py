"""What ssm.py and agents.py share: moto, real SSM clients (botocore, the aws-cli), a clean environment, ssm_call, and fakes of what
stands beside a program on AWS. Not a test: the Makefile leaves it out.

Importing it takes everything of AWS, and every HTTP proxy, out of this process's own environment."""
import datetime
import json
import os
import re
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import uuid

import common
from common import KEEP, ROOT, Skip, Upstream, first_line, folder, spawn, stop, tool, until

REGION = "us-east-1"
KEYS = ("AKIDEXAMPLE", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY")
NOWHERE = "/nonexistent"
LEAKS = ("AWS_", "PARAMETERS_SECRETS_", "SSM_PARAMETER_", "SECRETS_MANAGER_", "ECS_", "MOTO_")

for name in list(os.environ):
    if name.startswith(LEAKS) or name.lower().endswith("_proxy"):
        del os.environ[name]
os.environ.update(HOME=NOWHERE, AWS_CONFIG_FILE=NOWHERE, AWS_SHARED_CREDENTIALS_FILE=NOWHERE, AWS_EC2_METADATA_DISABLED="true")

try:
    from botocore.auth import SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials
    from botocore.exceptions import ClientError
    from botocore.session import Session
except ImportError:
    SigV4Auth = Session = ClientError = None


def need_botocore():
    if not Session:
        raise Skip("not installed: python's botocore")


def need_aws(name="aws"):
    """A real aws-cli: the first on PATH, or the file named."""
    if not tool(name):
        raise Skip("not installed: the aws-cli" + ("" if name == "aws" else " as " + name))


# ---- environments ----------------------------------------------------------------------------------------------

def env(endpoint=None, keys=KEYS, token=None, region=REGION, **more):
    """The environment of a program that uses AWS, with nothing of this machine's own. endpoint: a port or a URL; keys None = no
    credentials; more: set last, None = taken out."""
    new = {k: v for k, v in os.environ.items() if not k.startswith("CHAOS_")}
    if endpoint:
        new["AWS_ENDPOINT_URL"] = endpoint if isinstance(endpoint, str) else "http://127.0.0.1:%d" % endpoint
    if region:
        new["AWS_REGION"] = new["AWS_DEFAULT_REGION"] = region
    if keys:
        new["AWS_ACCESS_KEY_ID"], new["AWS_SECRET_ACCESS_KEY"] = keys
    if token:
        new["AWS_SESSION_TOKEN"] = token
    for k, v in more.items():
        new.pop(k, None)
        if v is not None:
            new[k] = v
    return new


def written(text, mode=0o600, name="file"):
    """A new file with this text, in a folder of its own."""
    path = os.path.join(tempfile.mkdtemp(prefix="aws-", dir=folder()), name)
    with open(path, "w", newline="") as f:
        f.write(text)
    os.chmod(path, mode)
    return path


def profile(keys=KEYS, token=None):
    """A credentials file: the aws-cli reads it, chaos.h does not."""
    return written("[default]\naws_access_key_id = %s\naws_secret_access_key = %s\n%s" %
                   (*keys, "aws_session_token = %s\n" % token if token else ""))


def fake_cli(script):
    """A PATH in which `aws` is this shell script."""
    return os.path.dirname(written("#!/bin/sh\n" + script, 0o755, "aws")) + ":" + os.environ["PATH"]


def path_with(program):
    """A PATH in which `aws` is this program."""
    new = tempfile.mkdtemp(prefix="path-", dir=folder())
    os.symlink(program, new + "/aws")
    return new + ":" + os.environ["PATH"]


MARK = "PEER_MARK"  # a variable that all that a program starts inherits


def marked(mark):
    """The processes that have this mark."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open("/proc/%s/environ" % pid, "rb") as f:
                if ("%s=%s\0" % (MARK, mark)).encode() in f.read():
                    found.append(int(pid))
        except OSError:
            pass  # gone, or not ours
    return found


def new_mark():
    return uuid.uuid4().hex


# ---- real clients ----------------------------------------------------------------------------------------------

def client(service, endpoint, keys=KEYS, token=None, region=REGION, verify=None):
    """botocore in this process; it does not try again."""
    need_botocore()
    from botocore.config import Config
    return Session().create_client(service, region_name=region, endpoint_url=endpoint, aws_access_key_id=keys[0], aws_secret_access_key=keys[1],
                                   aws_session_token=token, verify=verify,
                                   config=Config(retries={"max_attempts": 0}, connect_timeout=5, read_timeout=10))


def cli(*args, environment, program="aws", check=True):
    """The aws-cli; what it printed, as JSON if it is some. The endpoint as a flag: older ones know no variable for it, and would ask
    AWS itself."""
    need_aws(program)
    done = subprocess.run([tool(program), *args, "--output", "json", "--endpoint-url", environment["AWS_ENDPOINT_URL"]], env=environment,
                          capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)
    assert not check or done.returncode == 0, "aws %s: %d %s" % (" ".join(args)[:100], done.returncode, done.stderr.strip()[-300:])
    return json.loads(done.stdout) if done.stdout.startswith("{") else done.stdout


# ---- moto --------------------------------------------------------------------------------------------------------

class Moto:
    """moto_server on a port of its own. tls: with a certificate made here, which is .bundle too."""

    def __init__(self, tls=False, port=0, keep=False):
        if not tool("moto_server"):
            raise Skip("not installed: moto_server")
        need_botocore()
        self.bundle, more = None, []
        if tls:
            common.need("openssl")
            self.bundle, key = self.certificate()
            more = ["-c", self.bundle, "-k", key]
        log = tempfile.mkdtemp(prefix="moto-", dir=folder()) + "/log"
        with open(log, "w") as f:
            self.process = spawn([tool("moto_server"), "-H", "127.0.0.1", "-p", str(port), *more], stdout=subprocess.DEVNULL, stderr=f)
        if keep:
            KEEP.append(self.process)

        def listening():
            assert self.process.poll() is None, "moto_server ends: " + open(log).read()[-300:]
            return re.search(r"Running on https?://127\.0\.0\.1:(\d+)", open(log).read())
        self.port = int(until(listening, 20, "moto_server listens").group(1))
        self.url = "%s://127.0.0.1:%d" % ("https" if tls else "http", self.port)
        self.ssm = self.client("ssm")

    @staticmethod
    def certificate():
        where = tempfile.mkdtemp(prefix="tls-", dir=folder())
        subprocess.run([tool("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                        "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", where + "/key", "-out", where + "/cert"],
                       check=True, capture_output=True, timeout=20)
        return where + "/cert", where + "/key"

    def client(self, service, **options):
        return client(service, self.url, verify=self.bundle, **options)

    def env(self, **options):
        return env(self.url, **options)

    def put(self, name, value, kind="String", tier="Standard"):
        """Returns the new version."""
        value = value if isinstance(value, str) else json.dumps(value)
        return self.ssm.put_parameter(Name=name, Value=value, Overwrite=True, Type=kind, Tier=tier)["Version"]

    def get(self, name):
        """The whole parameter, or None."""
        try:
            return self.ssm.get_parameter(Name=name, WithDecryption=True)["Parameter"]
        except ClientError as error:
            if error.response["Error"]["Code"] != "ParameterNotFound":
                raise
            return None

    def delete(self, name):
        self.ssm.delete_parameter(Name=name)

    def check_signatures(self, on):
        """Off, it takes any signature and allows everything."""
        urllib.request.urlopen(urllib.request.Request(self.url + "/moto-api/reset-auth", data=b"0" if on else b"inf",
                                                      headers={"Content-Type": "text/plain"}), timeout=5).close()

    def user(self, name, *actions):
        """Keys of a new user that may do these, as for env(keys=)."""
        iam = self.client("iam")
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName="p", PolicyDocument=policy(actions))
        key = iam.create_access_key(UserName=name)["AccessKey"]
        return key["AccessKeyId"], key["SecretAccessKey"]

    def session(self, name, *actions):
        """Keys and session token of a role that may do these."""
        iam = self.client("iam")
        arn = iam.create_role(RoleName=name, AssumeRolePolicyDocument=policy(["sts:AssumeRole"]))["Role"]["Arn"]
        iam.put_role_policy(RoleName=name, PolicyName="p", PolicyDocument=policy(actions))
        got = self.client("sts").assume_role(RoleArn=arn, RoleSessionName="session")["Credentials"]
        return (got["AccessKeyId"], got["SecretAccessKey"]), got["SessionToken"]

    def stop(self):
        stop(self.process)


def policy(actions):
    return json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": list(actions), "Resource": "*"}]})


MOTO = []


def moto():
    """One for a whole file."""
    if not MOTO:
        MOTO.append(Moto(keep=True))
    return MOTO[0]


# ---- ssm_call ------------------------------------------------------------------------------------------------------

def has_curl():
    """The libraries of libcurl, or None."""
    for command in (["pkg-config", "--libs", "libcurl"], ["curl-config", "--libs"]):
        if tool(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
            if done.returncode == 0:
                return done.stdout.split()
    return None


COMPILING = threading.Lock()


def program(way):
    """ssm_call.c, with libcurl ("curl") or without ("cli")."""
    with COMPILING:
        return compiled(way)


def compiled(way):
    where = os.path.join(common.BUILD, "tests", "peers")
    source, built = os.path.join(ROOT, "tests", "peers", "ssm_call.c"), os.path.join(where, "ssm_call-" + way)
    flags, libs = [], []
    if way == "curl":
        libs = has_curl()
        flags = ["-DCHAOS_WITH_CURL"]
        if libs is None:
            raise Skip("not installed: libcurl (libcurl4-openssl-dev)")
    newest = max(os.path.getmtime(part) for part in (source, os.path.join(ROOT, "chaos.h")))
    if not os.path.exists(built) or os.path.getmtime(built) < newest:
        os.makedirs(where, exist_ok=True)
        done = subprocess.run([*os.environ.get("CC", "cc").split(), "-std=c99", "-O1", "-g", "-Wall", "-Wextra", *flags, "-pthread", "-o",
                               built + ".new", source, *libs], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, "ssm_call.c: " + done.stderr[:500]
        os.rename(built + ".new", built)
    return built


class Result:
    """One line of ssm_call: its members as attributes."""

    def __init__(self, members):
        self.__dict__.update(members)

    def __repr__(self):
        return str({k: v[:200] if isinstance(v, str) else v for k, v in self.__dict__.items()})


def calls(way, action, name, environment, text=None, seconds=25, **options):
    """One process that does the same call times=N times; their results."""
    done = subprocess.run([program(way), action, name, *("%s=%s" % pair for pair in options.items())], env=environment, input=text or "",
                          capture_output=True, encoding="utf-8", errors="surrogateescape", timeout=seconds)
    assert done.returncode == 0, "ssm_call %s: %d %s" % (action, done.returncode, done.stderr[-500:])
    results = [Result(json.loads(line)) for line in done.stdout.split("\n") if line]
    for r in results:
        assert r.children == 0, "a child process is left: %r" % r
        assert r.code == "ok" or r.err, "no text for the failure: %r" % r
    return results


def call(way, action, name, environment, text=None, **options):
    return calls(way, action, name, environment, text, **options)[0]


class Watch:
    """ssm_call with a handle on a source and no refresher: each refresh() fetches once and tells how things stand. Its log lines go
    to .lines. Options: ttl=, stale= in ms."""

    def __init__(self, way, source, environment, **options):
        self.lines = []
        self.process = spawn([program(way), "watch", source, *("%s=%s" % pair for pair in options.items())], env=environment,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", errors="surrogateescape")
        self.opened = self.result(5)

    def result(self, seconds):
        while True:
            line = first_line(self.process, seconds)
            assert line, "ssm_call says nothing; it ended with %s" % self.process.poll()
            members = json.loads(line)
            if "source" not in members:
                return Result(members)
            self.lines.append(members)

    def tell(self, command, seconds=15):
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        return self.result(seconds)

    def refresh(self, shift=None):
        """shift: seconds by which its clock goes forward before."""
        if shift:
            self.tell("shift %d" % (shift * 1000))
        result = self.tell("refresh")
        assert result.children == 0, "a child process is left: %r" % result
        return result

    def log(self, action):
        return [line for line in self.lines if line["action"] == action]

    def stop(self):
        stop(self.process)


# ---- fakes ---------------------------------------------------------------------------------------------------------

SILENCE = object()


class Seen:
    """A request that a fake got; query: of single values."""

    def __init__(self, request, body):
        self.method, self.target, self.fields, self.body = request.method, request.path, request.fields, body
        self.path = self.target.split("?")[0]
        self.query = dict(urllib.parse.parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    def __repr__(self):
        return "%s %s %s %r" % (self.method, self.target, self.fields, self.body[:200])


class Fake:
    """A service in threads. It answers by .answer(seen), which gives (status, body[, fields]); say: what it does instead, such a
    tuple, bytes (sent as they are, then it hangs up), SILENCE, or a function like answer."""

    def __init__(self, host="127.0.0.1", port=0):
        self.seen, self.say, self.over = [], None, threading.Event()
        self.upstream = Upstream(self.serve, host, port)
        self.port = self.upstream.port
        self.url = "http://%s:%d" % ("[%s]" % host if ":" in host else host, self.port)

    def serve(self, request):
        seen = Seen(request, b"".join(request.body()))
        self.seen.append(seen)
        say = self.say
        if callable(say):
            say = say(seen)
        elif say is None:
            say = self.answer(seen)
        if say is SILENCE:
            self.over.wait(60)
            return False
        if isinstance(say, bytes):
            request.send(say)
            return False
        status, body, *fields = say
        if not isinstance(body, bytes):
            body = (body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)).encode()
        kind = "application/json" if body.startswith(b"{") else "text/plain"
        kept = request.reply(body, "%d Whatever" % status, "Content-Type: %s\r\n%s" % (kind, "".join("%s: %s\r\n" % f for f in fields)))
        return kept and seen.fields.get("connection") != "close"

    def count(self, **what):
        """Requests so far with such members."""
        return sum(all(getattr(s, k) == v for k, v in what.items()) for s in self.seen)

    def stop(self):
        self.over.set()
        self.upstream.close()


def go_time(seconds):
    """As Go writes a time: the extension does."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def parameter(name, value, version=1, modified=None, **more):
    """The Parameter object of a GetParameter answer. modified: Unix time, or as it is to be shown."""
    return {"Parameter": dict({"ARN": "arn:aws:ssm:%s:123456789012:parameter/%s" % (REGION, name.lstrip("/")), "DataType": "text",
                               "LastModifiedDate": time.time() if modified is None else modified, "Name": name, "Type": "String",
                               "Value": value if isinstance(value, str) else json.dumps(value), "Version": version}, **more)}


class Extension(Fake):
    """The Parameters and Secrets Lambda Extension. values: {name: (value, version, modified)}."""

    def __init__(self, token, **options):
        super().__init__(**options)
        self.token, self.values = token, {}

    def answer(self, seen):
        if seen.method != "GET" or seen.path.rstrip("/") != "/systemsmanager/parameters/get":
            return 404, "404 page not found"
        if seen.fields.get("x-aws-parameters-secrets-token") != self.token:
            return 401, {"error": "missing or wrong X-Aws-Parameters-Secrets-Token"}
        if seen.query.get("withDecryption") != "true":
            return 400, {"error": "the test wants withDecryption=true"}
        if seen.query.get("name") not in self.values:
            return self.failure("ParameterNotFound: ")
        value, version, modified = self.values[seen.query["name"]]
        return 200, {**parameter(seen.query["name"], value, version, go_time(modified), Selector=None, SourceResult=None), "ResultMetadata": {}}

    @staticmethod
    def failure(what):
        return 400, {"error": "operation error SSM: GetParameter, https response error StatusCode: 400, RequestID: 6e5b, %s" % what}


class AppConfigAgent(Fake):
    """values: {"app/env/profile": (content, version)}."""

    def __init__(self, **options):
        super().__init__(**options)
        self.values, self.framing = {}, "length"

    def answer(self, seen):
        found = re.fullmatch(r"/applications/([^/]+)/environments/([^/]+)/configurations/([^/]+)", seen.path)
        key = "/".join(map(urllib.parse.unquote, found.groups())) if found and seen.method == "GET" else None
        if key not in self.values:
            return 404, {"Message": "resource not found"}
        content, version = self.values[key]
        return 200, content, *([("Configuration-Version", version)] if version is not None else [])


class Imds(Fake):
    """The instance metadata service, both versions. life: of the credentials, in seconds."""
    ROLES = "/latest/meta-data/iam/security-credentials/"

    def __init__(self, keys=KEYS, token="IMDSTOKEN", life=6 * 3600, **options):
        super().__init__(**options)
        self.keys, self.token, self.life, self.role, self.refuse_v2, self.code = keys, token, life, "the-role", None, "Success"
        self.broken = False
        self.v2 = []  # the session tokens given out

    def answer(self, seen):
        if seen.path == "/latest/api/token":
            if self.refuse_v2:
                return self.refuse_v2, ""
            if seen.method != "PUT" or not seen.fields.get("x-aws-ec2-metadata-token-ttl-seconds", "").isdigit():
                return 400, "Bad Request"
            self.v2.append("session-%d==" % len(self.v2))
            return 200, self.v2[-1], ("X-Aws-Ec2-Metadata-Token-Ttl-Seconds", "21600")
        given = seen.fields.get("x-aws-ec2-metadata-token")
        if seen.method != "GET" or (given is not None and given not in self.v2):
            return 401, "Unauthorized"
        if self.broken:
            return 500, "Internal Server Error"
        if seen.path == self.ROLES:
            return (200, self.role) if self.role else (404, "Not Found")
        if seen.path != self.ROLES + str(self.role):
            return 404, "Not Found"
        if self.code != "Success":
            return 200, {"Code": self.code, "Message": "The role cannot be assumed."}
        return 200, dict(credentials(self.keys, self.token, self.life), Code="Success", Type="AWS-HMAC", LastUpdated=go_time(time.time()))

    def used_v1(self):
        return [s for s in self.seen if s.path.startswith("/latest/meta-data") and "x-aws-ec2-metadata-token" not in s.fields]


def credentials(keys, token, life):
    end = datetime.datetime.fromtimestamp(time.time() + life, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"AccessKeyId": keys[0], "SecretAccessKey": keys[1], "Token": token, "Expiration": end}


class ContainerCredentials(Fake):
    """The endpoint of ECS tasks and EKS pods, at any path. expect: the Authorization it wants, None = any."""

    def __init__(self, keys=KEYS, token="CONTAINERTOKEN", life=6 * 3600, **options):
        super().__init__(**options)
        self.keys, self.token, self.life, self.expect = keys, token, life, None

    def answer(self, seen):
        if self.expect is not None and seen.fields.get("authorization") != self.expect:
            return 401, {"code": "Unauthorized", "message": "wrong token"}
        return 200, dict(credentials(self.keys, self.token, self.life), RoleArn="arn:aws:iam::123456789012:role/r")

    def given(self):
        return [s.fields.get("authorization") for s in self.seen]


class Ssm(Fake):
    """Parameter Store itself, as far as one parameter goes, for what moto does not do: its dates, its failures, its ideas about types.
    values: {name: (value, version, modified)}. With keys, {id: (secret, token or None)}, it computes each signature again with
    botocore and is stricter than AWS: everything that may be signed must be."""

    def __init__(self, keys=None, **options):
        super().__init__(**options)
        self.keys, self.values, self.types, self.wrong = keys, {}, {}, []

    def answer(self, seen):
        if self.keys is not None:
            why = self.bad_signature(seen)
            if why:
                self.wrong.append(why)
                return self.failure("InvalidSignatureException", why)
        target = seen.fields.get("x-amz-target")
        if (seen.method, seen.target) != ("POST", "/") or target not in ("AmazonSSM.GetParameter", "AmazonSSM.PutParameter"):
            return self.failure("UnknownOperationException", "%s %s %s" % (seen.method, seen.target, target))
        if seen.fields.get("content-type") != "application/x-amz-json-1.1":
            return self.failure("SerializationException", "Content-Type: %s" % seen.fields.get("content-type"))
        return (self.get if target.endswith("GetParameter") else self.put)(json.loads(seen.body))

    def get(self, wanted):
        name = wanted["Name"]
        if name not in self.values:
            return self.failure("ParameterNotFound", None)
        return 200, parameter(name, *self.values[name], Type=self.types.get(name, "String"))

    def put(self, wanted):
        name = wanted["Name"]
        kind = wanted.get("Type", self.types.get(name))
        if name in self.values and not wanted.get("Overwrite"):
            return self.failure("ParameterAlreadyExists", "The parameter already exists. To overwrite this value, set the overwrite option in "
                                "the request to true.")
        if not kind:
            return self.failure("ValidationException", "A parameter type is required when you create a parameter.")
        self.types[name], self.values[name] = kind, (wanted["Value"], self.values.get(name, (0, 0))[1] + 1)
        return 200, {"Tier": "Standard", "Version": self.values[name][1]}

    @staticmethod
    def failure(kind, message, status=400, prefix="", member="message"):
        """message None: as with AWS's ParameterNotFound, which has none."""
        return status, {"__type": prefix + kind, **({} if message is None else {member: message})}, ("x-amzn-RequestId", "b5c3")

    def bad_signature(self, seen):
        """What is wrong with it, or None."""
        form = r"AWS4-HMAC-SHA256 Credential=([^/, ]+)/(\d{8})/([^/, ]+)/([^/, ]+)/aws4_request, ?SignedHeaders=([^, ]+), ?Signature=([0-9a-f]{64})"
        found = re.fullmatch(form, seen.fields.get("authorization", ""))
        if not found:
            return "Authorization: %s" % seen.fields.get("authorization")
        key, day, region, service, names, signature = found.groups()
        names, stamp = names.split(";"), seen.fields.get("x-amz-date", "")
        if key not in self.keys:
            return "unknown key " + key
        secret, token = self.keys[key]
        if (service, region) != ("ssm", REGION):
            return "signed for %s in %s" % (service, region)
        if not re.fullmatch(day + r"T\d{6}Z", stamp):
            return "X-Amz-Date: %r on %s" % (stamp, day)
        made = datetime.datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=datetime.timezone.utc).timestamp()
        if abs(time.time() - made) > 300:
            return "made %d s ago" % (time.time() - made)
        if seen.fields.get("x-amz-security-token") != token:
            return "X-Amz-Security-Token: %s" % seen.fields.get("x-amz-security-token")
        must = {"host", "content-type"} | {n for n in seen.fields if n.startswith("x-amz-")}
        absent = [n for n in names if n not in seen.fields]
        if names != sorted(names) or absent or must - set(names):
            return "signed are %s, not there is %s, unsigned is %s" % (names, absent, must - set(names))
        request = AWSRequest(seen.method, "http://%s%s" % (seen.fields["host"], seen.target), {n: seen.fields[n] for n in names}, seen.body)
        request.context["timestamp"] = stamp
        auth = SigV4Auth(Credentials(key, secret, token), service, region)
        good = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
        return None if good == signature else "the signature should be %s" % good


def SignatureChecker(keys=KEYS, token=None, **options):
    need_botocore()
    return Ssm({keys[0]: (keys[1], token)}, **options)


def Silent(**options):
    """Takes requests and never answers."""
    fake = Fake(**options)
    fake.say = SILENCE
    return fake


class Tunnels(Fake):
    """An HTTP proxy that only writes down where to; so that a real host's name need not be asked for."""

    def answer(self, seen):
        return 403, "no way"

    def hosts(self):
        return [s.target for s in self.seen if s.method == "CONNECT"]

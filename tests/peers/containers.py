"""What tests of images share: the images of examples/deploy/Dockerfile, built by buildah, and containers of podman and runc. Not a test:
the Makefile leaves it out.

Nothing is pulled: debian:bookworm-slim is a minbase made by debootstrap, once, and all images stay in build/deploy (make clean removes
them). Needs root, and apt's debootstrap buildah podman runc; what is missing is a Skip."""
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time

import common
from common import ROOT, Skip, first_line, need, spawn, stop, until

BASE = "docker.io/library/debian:bookworm-slim"
MIRROR = [m for m in [os.environ.get("CHAOS_DEBIAN_MIRROR")] if m]  # else debootstrap's own
# No CAP_SYS_RESOURCE where CI runs: the limits podman would set by itself are too high to be allowed.
LIMITS = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]


def where(*names):
    return os.path.join(common.BUILD, "deploy", *names)


def store():
    """The flags that keep images and containers in build/deploy, away from those of the machine."""
    return ["--root", where("storage"), "--runroot", where("run"), "--storage-driver", "overlay"]


def need_containers():
    need("debootstrap", "buildah", "podman", "runc")
    if os.geteuid() != 0:
        raise Skip("images are built as root only")


def podman(*args, check=True, seconds=60, **options):
    """Runs podman to its end; what it printed."""
    done = subprocess.run(["podman", *store(), "--runtime", "runc", "--cgroup-manager", "cgroupfs", *args], capture_output=True, text=True,
                          timeout=seconds, stdin=subprocess.DEVNULL, **options)
    assert not check or done.returncode == 0, "podman %s: %d %s" % (" ".join(args)[:100], done.returncode, done.stderr.strip()[-300:])
    return done


@contextlib.contextmanager
def alone():
    """One at a time: tests run beside each other, and an image is made once."""
    os.makedirs(where(), exist_ok=True)
    with open(where("lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def base():
    """Makes the image that a Dockerfile calls debian:bookworm-slim, where it is not there yet: half a minute."""
    if podman("image", "exists", BASE, check=False).returncode == 0:
        return
    began, tree = time.monotonic(), where("debian")
    shutil.rmtree(tree, ignore_errors=True)
    made = subprocess.run(["debootstrap", "--variant=minbase", "bookworm", tree, *MIRROR], capture_output=True, text=True, timeout=300,
                          stdin=subprocess.DEVNULL, env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"})
    assert made.returncode == 0, "debootstrap: " + (made.stdout + made.stderr).strip()[-300:]
    tar = subprocess.Popen(["tar", "-C", tree, "-c", "--exclude=./var/cache/apt/*", "--exclude=./var/lib/apt/lists/*", "."], stdout=subprocess.PIPE)
    done = subprocess.run(["podman", *store(), "import", "-", BASE], stdin=tar.stdout, capture_output=True, text=True, timeout=120)
    assert tar.wait() == 0 and done.returncode == 0, "podman import: " + done.stderr.strip()[-300:]
    shutil.rmtree(tree, ignore_errors=True)
    common.note("debian:bookworm-slim by debootstrap: %.0f s, once" % (time.monotonic() - began))


BUILT = []  # by this process


def image(target="proxy", dockerfile="examples/deploy/Dockerfile"):
    """The name of the image, built as the files are now, once for a process; a moment, when none of them changed. In docker's format: then a build by
    the docker CLI finds these layers, and the other way round."""
    name = "localhost/chaos-proxy:" + target
    if name in BUILT:
        return name
    need_containers()
    with alone():
        base()
        done = subprocess.run(["buildah", *store(), "bud", "--format", "docker", "--isolation", "chroot", "--pull-never", "--network", "host", "--layers",
                               "-f", dockerfile, "--target", target, "-t", name, "."], cwd=ROOT, capture_output=True, text=True, timeout=240,
                              stdin=subprocess.DEVNULL)
    assert done.returncode == 0, "buildah: " + (done.stdout + done.stderr).strip()[-500:]
    BUILT.append(name)
    return name


def inspect(name):
    return json.loads(podman("image", "inspect", name).stdout)[0]


COUNT = [0]


class Container:
    """A container in the network of the machine, so that loopback is all it needs; its log, stderr, goes to a file. args: for the
    program; flags: for podman run."""

    def __init__(self, name, *args, flags=(), environment=None, network="host"):
        COUNT[0] += 1
        self.name = "chaos-test-%d-%d" % (os.getpid(), COUNT[0])
        self.log_path = tempfile.mkdtemp(prefix="container-", dir=common.folder()) + "/log"
        variables = [word for pair in (environment or {}).items() for word in ("-e", "%s=%s" % pair)]
        self.began = time.monotonic()
        with open(self.log_path, "w") as log:
            self.process = spawn(["podman", *store(), "--runtime", "runc", "--cgroup-manager", "cgroupfs", "run", "--rm", "--pull", "never",
                                  "--name", self.name, "--network", network, "--read-only", "--cap-drop", "all", *LIMITS, *variables, *flags,
                                  name, *args], stdout=subprocess.PIPE, stderr=log, text=True)
        self.first = first_line(self.process, 15)

    @property
    def port(self):
        """Of "chaos-proxy listening on ADDR:PORT"."""
        assert self.first.startswith("chaos-proxy listening on "), "it says %r; log: %s" % (self.first, self.text()[-500:])
        return int(self.first.rsplit(":", 1)[1])

    def text(self):
        with open(self.log_path) as f:
            return f.read()

    def log(self, action=None):
        lines = [json.loads(line) for line in self.text().splitlines() if line.startswith("{")]
        return [line for line in lines if action in (None, line.get("action"))]

    def exec(self, *command):
        return podman("exec", self.name, *command, check=False)

    def signal(self, name):
        podman("kill", "--signal", name, self.name)

    def stop(self, seconds=15):
        """As an orchestrator does; the exit code of the program."""
        podman("stop", "--time", str(seconds), self.name, check=False, seconds=seconds + 20)
        code = self.process.wait(10)
        stop(self.process)
        return code

    def remove(self):
        """Whatever state it is in. podman passes SIGTERM on to the program."""
        stop(self.process, 5)
        if self.process.returncode != 0:
            podman("rm", "--force", "--ignore", "--time", "0", self.name, check=False)


if __name__ == "__main__":  # makes them ahead of the tests: CI does, so that no test's time runs out meanwhile
    for which in ("ssm", "proxy"):
        print("%s: %d bytes" % (image(which), inspect(image(which))["Size"]))

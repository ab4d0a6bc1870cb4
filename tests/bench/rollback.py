#!/usr/bin/env python3
"""How long each tier of the rollback in examples/experiments/RUNBOOK.md takes here, and how long chaos-proxy takes from its start to
the first request through it. Against a local moto; the TTLs are the defaults.

    tests/bench/rollback.py

Prints rows for report.py: NAME TAB MEASURED TAB GOAL TAB ok|over|-. Ten proxies follow one parameter; each is asked 50 times a second
by a client that notes when a request began and whether its reply was marked. "No fault after" is when the last such request began,
counted from the start of the command, of the signal, or from the end itself."""
import datetime
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "peers"))
import aws  # noqa: E402  moto and a clean environment
import common  # noqa: E402
import containers  # noqa: E402
import real  # noqa: E402  its nginx

COUNT = 10
NAME = "/bench/stage/chaos"
FAULT = {"enabled": True, "name": "bench", "owner": "bench", "errorRate": 100, "latency": 30}
SSM = os.path.join(common.BUILD, "chaos-ssm")


def row(name, seconds, goal=None, unit="s"):
    """Median and worst of them."""
    scale, digits = (1000, 1) if unit == "ms" else (1, 2)
    goal_text = "-" if goal is None else "<= %g %s" % (goal * scale, unit)
    ok = "-" if goal is None else "ok" if max(seconds) <= goal else "over"
    print("%s\t%.*f, worst of %d %.*f %s\t%s\t%s" % (name, digits, statistics.median(seconds) * scale, len(seconds), digits, max(seconds) * scale,
                                                  unit, goal_text, ok), flush=True)


class Client(threading.Thread):
    """Asks a port every 20 ms; began: of the requests, with the mark of their replies."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.port, self.began, self.over, self.failure = port, [], False, None
        self.start()

    def run(self):
        try:
            while not self.over:
                now = time.time()
                reply = common.once(self.port, "/")
                self.began.append((now, reply.mark))
                time.sleep(max(0, now + 0.02 - time.time()))
        except Exception as error:  # told at the end: no request may fail
            self.failure = error

    def last(self, since, kinds=("error", "latency")):
        """Seconds from since to the begin of the last marked request."""
        return max([began - since for began, mark in self.began if mark in kinds and began >= since], default=0.0)

    def now(self):
        return self.began[-1][1] if self.began else None

    def stop(self):
        self.over = True
        self.join(15)
        assert not self.failure, "a request failed: %r" % self.failure


class Proxy:
    def __init__(self, upstream, env, config="ssm:" + NAME, program=None, instance="bench"):
        self.process = common.spawn([program or os.path.join(common.BUILD, "chaos-proxy"), "--listen", "127.0.0.1:0", "--upstream",
                                     "http://127.0.0.1:%d" % upstream, "--config", config, "--quiet", "--instance", instance],
                                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env)
        self.port = int(common.first_line(self.process).rsplit(":", 1)[1])

    def signal(self, number):
        self.process.send_signal(number)

    def stop(self):
        common.stop(self.process)


def ssm(env, *args):
    began = time.time()
    subprocess.run([SSM, *args, "--name", NAME], env=env, check=True, capture_output=True, timeout=30)
    return began


def on(moto, proxies, clients, value=None):
    """The fault, taken at once by all of them."""
    moto.put(NAME, value or FAULT)
    for proxy in proxies:
        proxy.signal(signal.SIGHUP)
    common.until(lambda: all(client.now() for client in clients), 20, "all are on")
    time.sleep(0.2)


def spread(proxies, ttl):
    """Their fetches, evenly over the TTL."""
    for proxy in proxies:
        proxy.signal(signal.SIGHUP)
        time.sleep(ttl / COUNT)


def through(port):
    """Until a request is answered."""
    while True:
        try:
            return common.once(port, "/", timeout=2)
        except OSError:
            time.sleep(0.0005)


def starts(upstream, env, config):
    """From the start of the process, before exec, to the first answer through it."""
    times = []
    for _ in range(COUNT):
        began = time.time()
        proxy = Proxy(upstream, env, config)
        assert through(proxy.port).status == 200
        times.append(time.time() - began)
        proxy.stop()
    return times


def image(upstream):
    """The image's size, and from `podman run` to the first answer through it."""
    name, times = containers.image(), []
    print("image of chaos-proxy\t%.0f KB\t<= 250 KB\t%s" % ((size := containers.inspect(name)["Size"] / 1000), "ok" if size <= 250 else "over"), flush=True)
    for _ in range(COUNT):
        box = containers.Container(name, "--listen", "127.0.0.1:0", "--upstream", "http://127.0.0.1:%d" % upstream, "--admin", "127.0.0.1:0")
        assert through(box.port).status == 200
        times.append(time.monotonic() - box.began)
        box.remove()
    row("container of chaos-proxy, podman run to its first request through", times, None, "ms")


def follow(moto, env, upstream):
    """The tiers that a parameter, or a signal, brings."""
    proxies = [Proxy(upstream, env, instance="bench-%d" % i) for i in range(COUNT)]
    clients = [Client(proxy.port) for proxy in proxies]
    on(moto, proxies, clients)
    spread(proxies, 10)
    began = ssm(env, "set", "errorRate=0", "--expires", "20m")
    time.sleep(12)
    assert all(client.now() == "latency" for client in clients), "errorRate=0 leaves latency on"
    row("rollback: errorRate=0, no error after (latency stays), TTL 10 s", [c.last(began, ("error",)) for c in clients], 11)
    spread(proxies, 10)
    began = ssm(env, "disable")
    time.sleep(12)
    assert not any(client.now() for client in clients)
    row("rollback: chaos-ssm disable, no fault after, TTL 10 s", [c.last(began) for c in clients], 11)
    end = int(time.time()) + 4
    on(moto, proxies, clients, {**FAULT, "expiresAt": datetime.datetime.fromtimestamp(end, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")})
    time.sleep(max(0, end + 1 - time.time()))
    assert not any(client.now() for client in clients)
    row("rollback: the end, no fault after", [c.last(end) for c in clients], 0.1)
    on(moto, proxies, clients)
    times = []
    for proxy, client in zip(proxies, clients):
        began = time.time()
        proxy.signal(signal.SIGUSR1)
        time.sleep(0.4)
        times.append(client.last(began))
        assert not client.now()
    row("rollback: SIGUSR1, no fault after", times, 0.2)
    for client in clients:
        client.stop()
    for proxy in proxies:
        proxy.stop()


def delays(moto, env, upstream):
    """A delay of 30 s in progress, and SIGUSR1: when the reply comes."""
    times = []
    moto.put(NAME, {**FAULT, "errorRate": 0, "latency": 30000})
    for _ in range(COUNT):
        proxy = Proxy(upstream, env)
        ended = []
        thread = threading.Thread(target=lambda: ended.append((common.once(proxy.port, "/", timeout=20), time.time())), daemon=True)
        thread.start()
        time.sleep(0.3)
        began = time.time()
        proxy.signal(signal.SIGUSR1)
        thread.join(10)
        assert ended and ended[0][0].status == 200
        times.append(ended[0][1] - began)
        proxy.stop()
    row("rollback: a delay in progress ends after SIGUSR1", times, 0.1, "ms")


def routes(moto, env):
    """One nginx as in the sample: the route and the service behind."""
    folder = common.tempfile.mkdtemp(prefix="route-", dir=common.folder())
    service = common.free_port()

    def lead(port):
        with open(folder + "/route.conf", "w") as f:
            f.write("proxy_pass http://127.0.0.1:%d;\n" % port)
    lead(service)
    nginx = real.Nginx("server { listen 127.0.0.1:%d; location / { return 200 hello; } }"
                       "server { listen 127.0.0.1:PORT; location / { include %s/route.conf; } }" % (service, folder), "route")
    reload = [common.tool("nginx"), "-p", nginx.dir, "-e", nginx.dir + "/error.log", "-c", nginx.dir + "/nginx.conf", "-s", "reload"]
    client = Client(nginx.port)
    moto.put(NAME, FAULT)
    proxy = Proxy(service, env)
    out, beside = [], []
    for _ in range(COUNT):
        for times, disabled in ((out, False), (beside, True)):
            lead(proxy.port)
            subprocess.run(reload, check=True, timeout=10)
            common.until(client.now, 10, "the route leads through the proxy")
            began = time.time()
            new = Proxy(service, {**env, "CHAOS_DISABLE": "1"}) if disabled else None
            lead(new.port if new else service)
            subprocess.run(reload, check=True, timeout=10)
            time.sleep(0.6)
            times.append(client.last(began))
            assert not client.now()
            if new:
                lead(service)
                subprocess.run(reload, check=True, timeout=10)
                time.sleep(0.3)
                new.stop()
    client.stop()
    row("rollback: a process with CHAOS_DISABLE=1 beside, route moved (nginx), no fault after", beside, 1)
    row("rollback: route out (nginx), no fault after", out, 1)


def by_cli(moto, env, upstream):
    """chaos-proxy without libcurl: the aws-cli, TTL 15 s."""
    program = os.path.join(common.BUILD, "bench", "chaos-proxy-cli")
    os.makedirs(os.path.dirname(program), exist_ok=True)
    subprocess.run([*os.environ.get("CC", "cc").split(), "-std=c99", "-O2", "-pthread", os.path.join(common.ROOT, "examples", "proxy.c"), "-o", program],
                   check=True, timeout=120)
    proxies = [Proxy(upstream, env, program=program, instance="cli-%d" % i) for i in range(COUNT)]
    clients = [Client(proxy.port) for proxy in proxies]
    on(moto, proxies, clients)
    spread(proxies, 15)
    began = ssm(env, "disable")
    time.sleep(18)
    assert not any(client.now() for client in clients)
    row("rollback: chaos-ssm disable, no fault after, by the aws-cli, TTL 15 s", [c.last(began) for c in clients], 16)
    for client in clients:
        client.stop()


def main():
    needed = {"moto_server": common.tool("moto_server"), "nginx": common.tool("nginx"), "aws": common.tool("aws"), "botocore": aws.Session}
    missing = [name for name, found in needed.items() if not found]
    if missing:
        print("SKIP the rollback: not installed: %s" % " ".join(missing), file=sys.stderr)
        return 1 if common.CI else 0
    common.atexit.register(common.cleanup)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    moto = aws.Moto()
    env = moto.env()
    upstream = real.Nginx("server { listen 127.0.0.1:PORT; location / { return 200 hello; } }", "upstream").port
    config = common.folder() + "/off.json"
    with open(config, "w") as f:
        f.write('{"enabled":false}\n')
    moto.put(NAME, {"enabled": False})
    row("start of chaos-proxy to its first request through, config in a file", starts(upstream, env, "file:" + config), None, "ms")
    has_curl = re.search("ssm:curl", subprocess.run([SSM, "--version"], capture_output=True, text=True, timeout=10).stdout)
    if has_curl:
        row("start of chaos-proxy to its first request through, config from ssm: by libcurl", starts(upstream, env, "ssm:" + NAME), None, "ms")
        follow(moto, env, upstream)
        delays(moto, env, upstream)
        routes(moto, env)
    else:
        print("SKIP the tiers by libcurl: this chaos-proxy has none", file=sys.stderr)
    by_cli(moto, env, upstream)
    try:
        image(upstream)
    except common.Skip as missing:
        print("SKIP the image: %s" % missing, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""chaos-proxy (chaos off), nginx, HAProxy and Node's http-proxy side by side: same machine, same upstream, same load.

    tests/bench/proxy.py LATE_PROGRAM OUT.json

BENCH_SECONDS=3 a turn, BENCH_ROUNDS=5 rounds. Every peer has one turn in every round, the order rotates from round to
round. A ratio is taken within each round, against the better rival of that round; what is told is the median of them.
Figures are printed by report.py; this one writes them down, also those it got before something broke.
"""
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "peers"))
import common  # noqa: E402  the processes and their cleanup
import real  # noqa: E402  its nginx and wrk

SECONDS = float(os.environ.get("BENCH_SECONDS") or 3)
ROUNDS = int(os.environ.get("BENCH_ROUNDS") or 5)
ONLY = (os.environ.get("BENCH_ONLY") or "").split()
CORES = len(os.sched_getaffinity(0))
OUT = os.path.join(common.BUILD, "bench")
FILE_BYTES = 100 * 1000 * 1000
DELAY = 200
ME, NGINX, HAPROXY, NODE = "chaos-proxy", "nginx", "HAProxy", "http-proxy"
HTTP_PROXY = "1.18.1"

UPSTREAM_CONF = """
    keepalive_requests 1000000000; keepalive_timeout 600s; sendfile on;
    server { listen 127.0.0.1:PORT backlog=4096;
             location = / { return 200 "%s"; }
             location /file/ { root %s; } }
""" % ("0123456789" * 10, OUT)

# As many workers as cores. reuseport deals connections out evenly; without a limit for temporary files a download would
# measure the disk.
NGINX_CONF = """
%(user)s daemon off; worker_processes %(cores)d; worker_rlimit_nofile 10000;
pid %(dir)s/nginx.pid; error_log %(dir)s/error.log warn;
events { worker_connections 8192; }
http {
    access_log off; keepalive_requests 1000000000; keepalive_timeout 600s;
    client_body_temp_path %(dir)s/body; proxy_temp_path %(dir)s/proxy; fastcgi_temp_path %(dir)s/fcgi;
    uwsgi_temp_path %(dir)s/uwsgi; scgi_temp_path %(dir)s/scgi;
    upstream one { server 127.0.0.1:%(upstream)d; keepalive 1024; keepalive_requests 1000000000; keepalive_timeout 600s; }
    server {
        listen 127.0.0.1:%(port)d backlog=4096 reuseport;
        location / { proxy_pass http://one; proxy_http_version 1.1; proxy_set_header Connection "";
                     proxy_set_header Host $http_host; proxy_set_header X-Forwarded-For $remote_addr;
                     proxy_max_temp_file_size 0; }
    }
}
"""

HAPROXY_CONF = """
global
    nbthread %(cores)d
    maxconn 8000
defaults
    mode http
    timeout connect 5s
    timeout client 600s
    timeout server 600s
    option http-keep-alive
    option forwardfor
    http-reuse always
listen one
    bind 127.0.0.1:%(port)d backlog 4096
    server one 127.0.0.1:%(upstream)d
"""


# ---- peers -----------------------------------------------------------------------------------------------------------

class Peer:
    def __init__(self, name, port, process):
        self.name, self.port = name, port
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
        self.pids = [process.pid] + [int(p) for p in children.split()]

    def cpu(self):
        """Seconds of CPU of all its processes, all their threads, living and gone."""
        ticks = 0
        for pid in self.pids:
            with open("/proc/%d/stat" % pid) as f:
                fields = f.read().rsplit(")", 1)[1].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self):
        """MB: PSS, and 16 KiB of kernel stack a thread, of all its processes."""
        kib = 0
        for pid in self.pids:
            with open("/proc/%d/smaps_rollup" % pid) as f:
                kib += int(re.search(r"^Pss:\s+(\d+)", f.read(), re.M).group(1))
            kib += 16 * len(os.listdir("/proc/%d/task" % pid))
        return kib * 1024 / 1e6


def start_chaos(name, upstream_port, config=common.OFF, *args):
    proxy = common.Proxy(upstream_port, config, ttl=1000, args=("--max-conns", "2000", *args))
    peer = Peer(name, proxy.port, proxy.process)
    peer.proxy = proxy
    return peer


def start_server(name, argv, conf, path, **values):
    """nginx or HAProxy with a config of its own. The port is free now, and may be taken a moment later."""
    for _ in range(5):
        port = common.free_port()
        with open(path, "w") as f:
            f.write(conf % dict(values, cores=CORES, port=port))
        process = common.spawn(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 5
        while process.poll() is None and time.monotonic() < end:
            if common.answers(port):
                return Peer(name, port, process)
            time.sleep(0.01)
        common.stop(process)
    raise RuntimeError("%s does not start" % name)


def start_nginx(upstream_port):
    folder = os.path.join(common.folder(), "nginx-peer")
    os.makedirs(folder)
    path = folder + "/nginx.conf"
    argv = [common.tool("nginx"), "-p", folder, "-e", folder + "/error.log", "-c", path]
    return start_server(NGINX, argv, NGINX_CONF, path, dir=folder, user=real.user_line(), upstream=upstream_port)


def start_haproxy(upstream_port):
    path = os.path.join(common.folder(), "haproxy.cfg")
    return start_server(HAPROXY, [common.tool("haproxy"), "-db", "-f", path], HAPROXY_CONF, path, upstream=upstream_port)


def http_proxy_module():
    """The folder of the npm package; installed when it is not there. None and a reason = it cannot be had."""
    folder = os.path.join(OUT, "node")
    module = os.path.join(folder, "node_modules", "http-proxy")
    if os.path.exists(os.path.join(module, "package.json")):
        return module, ""
    if not common.tool("npm"):
        return None, "npm is not installed"
    os.makedirs(folder, exist_ok=True)
    argv = [common.tool("npm"), "install", "--prefix", folder, "--no-audit", "--no-fund", "--ignore-scripts",
            "--fetch-retries=1", "--fetch-retry-mintimeout=500", "--fetch-retry-maxtimeout=1000", "http-proxy@" + HTTP_PROXY]
    npm = common.spawn(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        said = [line for line in npm.communicate(timeout=60)[1].splitlines() if "error" in line.lower()]
    except subprocess.TimeoutExpired:
        said = ["no answer within 60 s"]
    common.stop(npm)
    if npm.returncode == 0:
        return module, ""
    shutil.rmtree(folder, ignore_errors=True)
    return None, "npm could not install it: " + (said[0] if said else "")


def start_http_proxy(upstream_port):
    module, reason = http_proxy_module() if common.tool("node") else (None, "node is not installed")
    if not module:
        return skip(NODE, reason)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "http-proxy.js")
    process = common.spawn([common.tool("node"), script, module, str(upstream_port)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    line = process.stdout.readline()
    if not line.strip().isdigit():
        raise RuntimeError("http-proxy.js does not start")
    return Peer(NODE, int(line), process)


SKIPPED, BROKEN = [], []


def skip(name, reason):
    SKIPPED.append("%s: not measured, %s" % (name, reason))
    sys.stderr.write("SKIP %s: %s\n" % (name, reason))


# ---- figures ---------------------------------------------------------------------------------------------------------

FIGURES = []
LESS, MORE = "less", "more"  # which is better


def spread(values):
    """None = a round without a figure: a rival that answered nothing has no latency."""
    known = [v for v in values if v is not None] or [None]
    return {"median": statistics.median(known) if known != [None] else None, "low": min(known), "high": max(known), "rounds": values}


def figure(key, group, title, unit, better, values):
    FIGURES.append({"key": key, "group": group, "title": title, "unit": unit, "better": better, "values": values,
                    "ratio": None, "against": "", "goal": None, "met": None})
    return FIGURES[-1]


def against(f, rivals, goal=None):
    """Adds the ratio to the better of the rivals, round by round, and says whether the median reaches the goal."""
    rounds = [f["values"][r]["rounds"] for r in rivals if r in f["values"]]
    if not rounds:
        return
    best = [(min if f["better"] == LESS else max)([v for v in turn if v is not None], default=None) for turn in zip(*rounds)]
    f["ratio"] = spread([mine / b if b else None for mine, b in zip(f["values"][ME]["rounds"], best)])
    f["against"] = "the better of %s and %s" % rivals if len(rounds) > 1 else "HAProxy" if HAPROXY in f["values"] else NGINX
    f["goal"] = goal
    if goal is not None and f["ratio"]["median"] is not None:
        f["met"] = f["ratio"]["median"] <= goal if f["better"] == LESS else f["ratio"]["median"] >= goal


def column(taken, name):
    return {peer: spread([turn[name] for turn in turns]) for peer, turns in taken.items()}


# ---- turns -----------------------------------------------------------------------------------------------------------

def rounds(peers, title, turn):
    """One turn for each peer in every round; a short one each, not counted, warms up (not in a run too short to tell)."""
    sys.stderr.write("%s " % title)
    for p in peers if SECONDS >= 1 else []:
        turn(p, 1.0)
    taken = {p.name: [] for p in peers}
    for i in range(ROUNDS):
        first = i % len(peers)
        for p in peers[first:] + peers[:first]:
            taken[p.name].append(turn(p, SECONDS))
            sys.stderr.write(".")
            sys.stderr.flush()
    sys.stderr.write("\n")
    return taken


def start_wrk(port, seconds, connections, *args):
    script = os.path.join(common.folder(), "bench.lua")
    if not os.path.exists(script):
        with open(script, "w") as f:
            f.write(real.WRK_FAST_SCRIPT)
    threads = max(1, min(connections, CORES // 2))
    return common.spawn([common.tool("wrk"), "-t%d" % threads, "-c%d" % connections, "-d%ds" % math.ceil(seconds), "-s", script, *args,
                       "http://127.0.0.1:%d/" % port], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish_wrk(process, seconds):
    """wrk counts whole seconds; a shorter run is ended by a SIGINT, after which it tells its figures as ever."""
    try:
        out = process.communicate(timeout=seconds if seconds % 1 else seconds + 20)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=20)[0]
    common.stop(process)
    found = re.search(r"^RESULT (.*)$", out, re.M)
    if not found:
        raise RuntimeError("wrk said: " + out[-500:])
    return json.loads(found.group(1))


def ask(peer, seconds, connections, *args):
    seconds = max(seconds, 1.0) if connections >= 1000 else seconds  # less is over before all of them are connected
    before = peer.cpu()
    got = finish_wrk(start_wrk(peer.port, seconds, connections, *args), seconds)
    used = peer.cpu() - before
    errors = {e: got[e] for e in ("connect", "read", "write", "timeout", "failed") if got[e]}
    if errors:
        sys.stderr.write("\n%s, %d connections: %s\n" % (peer.name, connections, errors))
    if peer.name.startswith(ME) and (errors or not got["requests"]):
        raise RuntimeError("%s: %s" % (peer.name, got))
    if not got["requests"]:
        return {"rate": 0.0, "p50": None, "p99": None, "cpu": None, "cores": used / got["seconds"]}
    return {"rate": got["requests"] / got["seconds"], "p50": got["p50"], "p99": got["p99"],
            "cpu": used / got["requests"] * 1e6, "cores": used / got["seconds"]}


def load(peers, group, taken, goal_rate, goal_p99, goal_cpu, rivals):
    both = (NGINX, HAPROXY)
    key = group.split()[0].replace(",", "")
    against(figure(key + ".rate", group, "requests/s", "/s", MORE, column(taken, "rate")), rivals, goal_rate)
    against(figure(key + ".p50", group, "p50", "ms", LESS, column(taken, "p50")), both)
    against(figure(key + ".p99", group, "p99", "ms", LESS, column(taken, "p99")), both, goal_p99)
    against(figure(key + ".cpu", group, "CPU per request", "us", LESS, column(taken, "cpu")), (HAPROXY,), goal_cpu)
    figure(key + ".cores", group, "CPU cores used", "", None, column(taken, "cores"))


def keep_alive(peers, connections):
    title = "{:,} keep-alive connection{}".format(connections, "s" if connections > 1 else "")
    taken = rounds(peers, title, lambda p, seconds: ask(p, seconds, connections))
    load(peers, title, taken, 0.95, 1.3, 1.1, (NGINX, HAPROXY))


def new_connections(peers):
    title = "new connection per request, 64 at once"
    taken = rounds(peers, title, lambda p, seconds: ask(p, seconds, 64, "-H", "Connection: close"))
    load(peers, title, taken, 0.95, None, None, (HAPROXY,))


# ---- memory ----------------------------------------------------------------------------------------------------------

def loaded_memory(peer, connections):
    """In the middle of a run that is not timed: reading it holds the process up."""
    process = start_wrk(peer.port, 1, connections)
    time.sleep(0.7)
    used = peer.memory()
    finish_wrk(process, 1)
    return used


def idle_memory(peer, connections):
    """While that many clients, each served once, stay connected."""
    clients = []
    try:
        for _ in range(connections):
            s = socket.create_connection(("127.0.0.1", peer.port), 5)
            clients.append(s)
            s.sendall(b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n")
            if b"200 OK" not in s.recv(4096):
                raise RuntimeError("%s does not serve %d connections" % (peer.name, connections))
        return peer.memory()
    finally:
        for s in clients:
            s.close()


def memory(peers):
    group = "memory (PSS and kernel stacks), 1,000 connections"
    sys.stderr.write(group + "\n")
    parts = (("memory.load", "under load", 0.5, loaded_memory), ("memory.idle", "idle, each served once", 0.5, idle_memory),
             ("memory.after", "after it, none connected", None, lambda p, _: time.sleep(0.3) or p.memory()))
    for key, title, goal, measure in parts:
        values = {p.name: spread([measure(p, 1000)]) for p in peers}
        against(figure(key, group, title, "MB", LESS, values), (NGINX, HAPROXY), goal)


# ---- the others ------------------------------------------------------------------------------------------------------

def make_file():
    path = os.path.join(OUT, "file", "100MB")
    if not os.path.exists(path) or os.path.getsize(path) != FILE_BYTES:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        piece = os.urandom(1000 * 1000)
        with open(path, "wb") as f:
            for _ in range(FILE_BYTES // len(piece)):
                f.write(piece)


def fetch(peer, seconds):
    before, end, done, spent = peer.cpu(), time.monotonic() + seconds, 0, 0.0
    url = ["http://127.0.0.1:%d/file/100MB" % peer.port, "-o", "/dev/null"]
    while not done or time.monotonic() < end:
        out = real.curl("-w", "%{http_code} %{size_download} %{time_total}\n", *url * (4 if seconds >= 1 else 1), seconds=60)
        for line in out.decode().splitlines():
            code, size, took = line.split()
            if (code, size) != ("200", str(FILE_BYTES)):
                raise RuntimeError("%s: a download of %s bytes, status %s" % (peer.name, size, code))
            done, spent = done + FILE_BYTES, spent + float(took)
    used = peer.cpu() - before
    return {"rate": done / 1e6 / spent, "cpu": used / (done / 1e9), "cores": used / spent}


def download(peers):
    make_file()
    both, group = (NGINX, HAPROXY), "100 MB download"
    taken = rounds(peers, group, fetch)
    against(figure("download.rate", group, "MB/s", "MB/s", MORE, column(taken, "rate")), both, 0.95)
    against(figure("download.cpu", group, "CPU per GB", "s", LESS, column(taken, "cpu")), both, 1.0)
    figure("download.cores", group, "CPU cores used", "", None, column(taken, "cores"))


def cost(upstream_port):
    """Chaos on that hits nothing, against off. The second proxy that is off shows what this machine can tell apart."""
    none = {"enabled": True, "latency": 0, "errorRate": 0}
    rule = {"enabled": True, "rules": [{"name": "none", "match": {"paths": ["/", "/**"]}, "errorRate": 0}]}
    configs = {"off": common.OFF, "again": common.OFF, "on": none, "rule": rule}
    peers = [start_chaos(ME + " " + key, upstream_port, config) for key, config in configs.items()]
    for p, config in zip(peers, configs.values()):
        state = common.until(lambda: p.proxy.log("open"), 5, "the first log line")[0]["state"]
        if state != ("on" if config["enabled"] else "off"):
            raise RuntimeError("%s: chaos is %s" % (p.name, state))
    group = "chaos on but not hitting, 64 keep-alive connections"
    taken = rounds(peers, group, lambda p, seconds: ask(p, seconds, 64))
    off = taken.pop(ME + " off")
    titles = {"again": "off, once more (what the machine varies)", "on": "on, 0 %, 0 ms", "rule": "on, a rule with 0 %"}
    for key, title in titles.items():
        turns = taken[ME + " " + key]
        f = figure("cost." + key, group, title + ": requests/s lost", "%", LESS,
                   {ME: spread([100 * (1 - a["rate"] / b["rate"]) for a, b in zip(turns, off)])})
        more_cpu = statistics.median(100 * (a["cpu"] / b["cpu"] - 1) for a, b in zip(turns, off))
        f["note"] = "CPU %+.1f %%" % more_cpu
        if key != "again":
            f["goal"], f["met"] = 2, f["values"][ME]["median"] <= 2
    for p in peers:
        p.proxy.stop()


def late(program, upstream_port):
    group = "injected delay of %d ms, arrivals that wait for nobody" % DELAY
    sys.stderr.write(group + " ")
    for connections, goal in ((1, 0.1), (50, 0.15), (1000, 1.0)):
        seen = {}
        for delay in (0, DELAY):
            argv = [program, str(upstream_port), str(connections), str(min(20.0, SECONDS * ROUNDS)), str(delay)]
            process = common.spawn(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            out, complaint = process.communicate(timeout=60)
            common.stop(process)
            if process.returncode:
                raise RuntimeError(complaint.strip() or "late: exit code %d" % process.returncode)
            for line in out.splitlines():
                name, count, *times = line.split()
                seen[name + ("" if delay else " alone")] = [int(count)] + [float(t) for t in times]
            sys.stderr.write(".")
        late_figures(group, connections, goal, seen)
    sys.stderr.write("\n")


def late_figures(group, connections, goal, seen):
    def add(key, title, of, base=0.0):
        count, median, p99, most = of
        f = figure("late.%d.%s" % (connections, key), group, "{:,} connection{}: {}".format(connections, "s" if connections > 1 else "", title),
                   "ms", LESS, {ME: {"median": median - base, "low": median - base, "high": p99 - base, "rounds": [median - base]}})
        f["note"] = "p99 %.2f, max %.1f of %d" % (p99 - base, most - base, count)
        return f
    if "wake" in seen:
        f = add("wake", "wake - deadline", seen["wake"])
        f["goal"], f["met"] = goal, seen["wake"][1] < goal
    add("reply", "at the client - %d - round trip" % DELAY, seen["reply"], seen["reply alone"][1])


# ---- the machine -----------------------------------------------------------------------------------------------------

class Machine:
    """What others took of it meanwhile: their CPU is in no figure, but they bend all of them."""

    def __init__(self):
        self.began = self.look()

    @staticmethod
    def look():
        with open("/proc/stat") as f:
            user, nice, system, _, _, irq, softirq, steal = (int(n) / os.sysconf("SC_CLK_TCK") for n in f.readline().split()[1:9])
        return time.monotonic(), user + nice + system + irq + softirq, steal

    def others(self):
        """Cores used by processes that are not ours, and cores stolen. Only what has ended counts as ours."""
        now, mine = self.look(), sum(os.times()[:4])
        seconds, busy, steal = (b - a for a, b in zip(self.began, now))
        return {"cores": max(0.0, busy - mine) / seconds, "stolen": steal / seconds}


# ---- all of it -------------------------------------------------------------------------------------------------------

def version(*argv):
    """The first version number in what a tool says of itself."""
    if not common.tool(argv[0]):
        return None
    said = subprocess.run([common.tool(argv[0]), *argv[1:]], capture_output=True, text=True)
    found = re.search(r"\d+\.\d+(\.\d+)?", said.stdout + said.stderr)
    return found.group() if found else None


def part(name, function, *args):
    """One broken part must not cost the figures of the others."""
    if ONLY and name not in ONLY:
        return
    try:
        function(*args)
    except (AssertionError, OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        BROKEN.append("%s: %s" % (name, error))
        sys.stderr.write("\nFAIL %s: %s\n" % (name, error))


def measure(program):
    upstream = real.Nginx(UPSTREAM_CONF, "upstream", "worker_connections 8192;")
    peers = [start_chaos(ME, upstream.port, common.OFF, "--quiet"), start_nginx(upstream.port)]
    peers.append(start_haproxy(upstream.port) if common.tool("haproxy") else skip(HAPROXY, "not installed"))
    peers.append(start_http_proxy(upstream.port))
    peers = [p for p in peers if p]
    for connections in (1, 64, 1000):
        part(str(connections), keep_alive, peers, connections)
    part("new", new_connections, peers)
    part("memory", memory, peers)
    part("download", download, peers)
    for process in list(common.RUNNING):
        if process is not upstream.process:
            common.stop(process)
    part("cost", cost, upstream.port)
    part("late", late, program, upstream.port)


def main():
    missing = [t for t in ("nginx", "wrk", "curl", "ps") if not common.tool(t)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20000) if hard > 0 else 20000, hard))
    machine = Machine()
    try:
        if missing:
            skip("proxy figures", "not installed: " + " ".join(missing))
        else:
            measure(sys.argv[1])
    finally:
        common.cleanup()
        versions = {"nginx": version("nginx", "-v"), "HAProxy": version("haproxy", "-v"), "node": version("node", "-v"),
                    "http-proxy": HTTP_PROXY, "wrk": version("wrk", "-v")}
        with open(sys.argv[2], "w") as f:
            json.dump({"seconds": SECONDS, "rounds": ROUNDS, "cores": CORES, "versions": versions, "others": machine.others(),
                       "skipped": SKIPPED, "broken": BROKEN, "figures": FIGURES}, f)
    return 1 if BROKEN or (SKIPPED and os.environ.get("CHAOS_CI") == "1") else 0


if __name__ == "__main__":
    real.atexit.register(common.cleanup)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(1))
    sys.exit(main())

#!/usr/bin/env python3
"""The HTTP vectors through chaos-proxy, nginx and HAProxy, side by side: how many each of them gets right.

    tests/peers/scores.py [-v]          -v lists what went wrong with the others

chaos-proxy must get all of them right, by the strict rules of tests/vectors/http; the others are measured by what the
RFCs demand, and their scores are only information. Each has a runner (build/tests/net/http_vectors --through) with an
upstream of its own; all three run at once. A missing nginx or haproxy is a loud skip, with CHAOS_CI=1 a failure.
"""
import atexit
import os
import re
import signal
import subprocess
import sys
import threading

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import common  # noqa: E402  the processes and their cleanup
import real  # noqa: E402  its nginx

KINDS = ("requests", "replies", "chunked")
LIMIT = 55  # seconds, for everything

# Both as one would put them in front of a service that also speaks WebSocket, with short time-outs.
NGINX = """
    map $http_upgrade $connection_upgrade { default upgrade; '' ''; }
    upstream behind { server 127.0.0.1:UPSTREAM max_fails=0; keepalive 16; }
    client_header_timeout 300ms; client_body_timeout 300ms; send_timeout 300ms; lingering_timeout 300ms;
    proxy_connect_timeout 300ms; proxy_read_timeout 300ms; proxy_send_timeout 300ms; proxy_next_upstream off;
    server {
        listen 127.0.0.1:PORT;
        location / {
            proxy_pass http://behind;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Host $http_host;
            proxy_set_header X-Forwarded-Proto $scheme;
        }
    }
"""
HAPROXY = """
    global
        maxconn 256
    defaults
        mode http
        http-reuse always
        timeout connect 300ms
        timeout client 300ms
        timeout server 300ms
        timeout tunnel 300ms
    listen front
        bind 127.0.0.1:PORT
        option forwardfor
        http-request set-header X-Forwarded-Host %[req.hdr(host)]
        http-request set-header X-Forwarded-Proto http
        server behind 127.0.0.1:UPSTREAM
"""


def runner_program():
    program = os.path.join(common.BUILD, "tests", "net", "http_vectors")
    if not os.path.exists(program):
        raise RuntimeError("make %s first" % os.path.relpath(program, common.ROOT))
    return program


class Runner:
    """The vectors, waiting for the port of a proxy before their upstream."""

    def __init__(self, name, verbose):
        self.process = subprocess.Popen([runner_program(), "--through", name, *(["-v"] if verbose else [])], text=True,
                                        errors="replace", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        common.RUNNING.append(self.process)
        found = re.match(r"upstream (\d+)\n", self.process.stdout.readline())
        assert found, "the runner does not start"
        self.upstream = int(found.group(1))
        self.scores, self.lines = {}, []

    def run(self, port):
        out, _ = self.process.communicate("%d\n" % port, timeout=LIMIT)
        common.stop(self.process)
        for line in out.splitlines():
            found = re.match(r"(\w+) (\d+) of (\d+)$", line)
            if found:
                self.scores[found.group(1)] = (int(found.group(2)), int(found.group(3)))
            else:
                self.lines.append(line)


def version(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    found = re.search(r"\d+\.\d+[.\d]*", done.stdout + done.stderr)
    return found.group(0) if found else "?"


def start_chaos(upstream):
    proxy = common.Proxy(upstream)
    return "chaos", proxy.port


def start_nginx(upstream):
    nginx = real.Nginx(NGINX.replace("UPSTREAM", str(upstream)))
    return "nginx " + version(common.tool("nginx"), "-v"), nginx.port


def start_haproxy(upstream):
    for _ in range(5):  # the port is free now, and may be taken a moment later
        port = common.free_port()
        path = os.path.join(common.folder(), "haproxy-%d.cfg" % port)
        with open(path, "w") as f:
            f.write(HAPROXY.replace("UPSTREAM", str(upstream)).replace("PORT", str(port)))
        process = common.spawn([common.tool("haproxy"), "-db", "-f", path], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            common.until(lambda: process.poll() is not None or common.answers(port), 5, "haproxy listens")
        except AssertionError:
            pass
        if process.poll() is None:
            return "HAProxy " + version(common.tool("haproxy"), "-v"), port
    raise RuntimeError("haproxy does not start")


def measure(what, start, verbose, results):
    try:
        runner = Runner(what, verbose)
        name, port = start(runner.upstream)
        runner.run(port)
        results[what] = (name, runner)
    except Exception as error:  # told with the result line
        results[what] = (what, error)


def main():
    verbose = "-v" in sys.argv[1:] or os.environ.get("CHECK_VERBOSE") == "1"
    signal.signal(signal.SIGALRM, lambda *_: (print("FAIL scores.py: not done in time", flush=True), sys.exit(1)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    signal.alarm(LIMIT)
    peers = [("chaos", start_chaos), ("nginx", start_nginx), ("haproxy", start_haproxy)]
    missing = [name for name, _ in peers[1:] if not common.tool(name)]
    results = {}
    threads = [threading.Thread(target=measure, args=(name, start, verbose, results), daemon=True)
               for name, start in peers if name not in missing]
    common.folder()  # before the threads, which share it
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    passed = failed = skipped = 0
    for name, _ in peers:
        title, runner = results.get(name, (name, None))
        if name in missing:
            ci = os.environ.get("CHAOS_CI") == "1"
            failed, skipped = failed + ci, skipped + (not ci)
            print("%s %s: not installed" % ("FAIL" if ci else "skip", name))
        elif isinstance(runner, Exception) or len(runner.scores) != len(KINDS):
            failed += 1
            print("FAIL %s: %s" % (name, runner if isinstance(runner, Exception) else "no scores: %s" % runner.lines[-3:]))
        elif name == "chaos" and any(right != all_of_them for right, all_of_them in runner.scores.values()):
            failed += 1
            print("FAIL chaos: not all of the vectors")
        else:
            passed += 1
        for line in getattr(runner, "lines", []):
            print("  %s%s" % ("" if name == "chaos" else name + " ", line.strip()))
    done = [results[name] for name, _ in peers if name in results and not isinstance(results[name][1], Exception)]
    for kind in KINDS:
        print("%s: %s" % (kind, ", ".join("%s %d/%d" % (title, *runner.scores.get(kind, (0, 0))) for title, runner in done)))
    print("%d passed, %d failed%s" % (passed, failed, ", %d skipped" % skipped if skipped else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    atexit.register(common.cleanup)
    sys.exit(main())

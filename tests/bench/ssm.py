#!/usr/bin/env python3
"""The control plane: what one fetch of a parameter takes, by libcurl and by the aws-cli, against a local moto; and what a fetch
each second by the aws-cli costs the requests in flight.

    tests/bench/ssm.py

Prints rows for report.py: NAME TAB MEASURED TAB GOAL TAB ok|over|-. What is missing is said, and not measured."""
import os
import re
import statistics
import subprocess
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "peers"))
import aws  # noqa: E402  moto and a clean environment
import common  # noqa: E402
import real  # noqa: E402  its nginx

ROUNDS = int(os.environ.get("BENCH_ROUNDS") or 5)
SECONDS = max(2.0, float(os.environ.get("BENCH_SECONDS") or 3))
OUT = os.path.join(common.BUILD, "bench")
NAME = "/bench/chaos"
DELAYED = {"enabled": True, "latency": 20, "expiresAt": "never"}


def row(name, measured, goal="-", ok=None):
    print("%s\t%s\t%s\t%s" % (name, measured, goal, "-" if ok is None else "ok" if ok else "over"), flush=True)


def build(program, source, *flags):
    path = os.path.join(OUT, program)
    subprocess.run([*os.environ.get("CC", "cc").split(), "-std=c99", "-O2", "-pthread", source, *flags, "-o", path], check=True,
                   cwd=common.ROOT)
    return path


def fetches(moto):
    """Median ms of one fetch by each way."""
    ways = [("cli", [], 7)]
    if subprocess.run(["pkg-config", "--exists", "libcurl >= 7.86"]).returncode == 0:
        ways.insert(0, ("curl", ["-DCHAOS_WITH_CURL", "-lcurl"], 300))
    for way, flags, count in ways:
        program = build("fetch-" + way, "tests/bench/fetch.c", *flags)
        said = subprocess.run([program, NAME, str(count)], env=moto.env(), capture_output=True, text=True, timeout=120, check=True).stdout
        used, ms = said.split()
        assert used == way, said
        if way == "curl":
            row("one fetch from moto, libcurl in the process", "%.2f ms" % float(ms), "<= 5 ms", float(ms) <= 5)
        else:
            row("one fetch from moto, aws-cli", "%.0f ms" % float(ms))


def p99(port):
    out = subprocess.run(["wrk", "-t1", "-c8", "-d%ds" % SECONDS, "--latency", "http://127.0.0.1:%d/" % port], capture_output=True,
                         text=True, check=True).stdout
    assert "Non-2xx" not in out and "Socket errors" not in out, out
    value, unit = re.search(r"99%\s+([\d.]+)(us|ms|s)", out).groups()
    return float(value) * {"us": 1e-3, "ms": 1, "s": 1e3}[unit]


def refreshing(moto):
    """8 connections whose requests are delayed 20 ms: p99 with a fetch each second by the aws-cli, to that with none."""
    upstream = real.Nginx("server { listen 127.0.0.1:PORT; location = / { return 200 hello; } }", "upstream", "")
    without = build("chaos-proxy-cli", "examples/proxy.c")
    still = common.Proxy(upstream.port, DELAYED, ttl=60000, args=["--quiet"])
    busy = common.Proxy(upstream.port, DELAYED, ttl=1000, args=["--quiet", "--config", "ssm:" + NAME], program=without, env=moto.env())
    pairs = [(p99(busy.port), p99(still.port)) for _ in range(ROUNDS)]
    ratio = statistics.median(a / b for a, b in pairs)
    row("p99 with a fetch each second by the aws-cli; with none",
        "%.2f; %.2f ms (ratio %.3f)" % (statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), ratio), "<= 1.05",
        ratio <= 1.05)


def main():
    missing = [t for t in ("moto_server", "aws", "wrk", "nginx") if not common.tool(t)]
    if missing:
        print("SKIP the ssm figures, not installed: " + " ".join(missing), file=sys.stderr)
        return 1 if common.CI else 0
    try:
        moto = aws.Moto()
        moto.put(NAME, DELAYED)
        fetches(moto)
        refreshing(moto)
    finally:
        common.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Lambda: what an invocation costs the function in C (chaos off) beside aws-lambda-ric on Node, on the same Runtime API server;
what the layer adds; how long it takes to the first `next`; sizes.

    tests/bench/lambda.py

Prints rows for report.py: NAME TAB MEASURED TAB GOAL TAB ok|over|-. What is missing is said, and not measured."""
import glob
import os
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir, "peers"))
import common  # noqa: E402
from runtime_api import RuntimeApi  # noqa: E402

COUNT = 300 if float(os.environ.get("BENCH_SECONDS") or 3) < 1 else 2000
OFF = '{"enabled":false}'
LAMBDA = common.BUILD + "/lambda/x86_64/bootstrap"
LAYER = common.BUILD + "/layer/x86_64/chaos-layer"


def row(name, measured, goal="-", ok=None):
    print("%s\t%s\t%s\t%s" % (name, measured, goal, "-" if ok is None else "ok" if ok else "over"), flush=True)


def nanoseconds(pid):
    """CPU of its threads so far."""
    total = 0
    for path in glob.glob("/proc/%d/task/*/schedstat" % pid):
        try:
            with open(path) as f:
                total += int(f.read().split()[0])
        except OSError:
            pass  # gone
    return total


def start(argv, api, cwd=None, **more):
    env = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "CHAOS_CONFIG": OFF, "AWS_LAMBDA_RUNTIME_API": api.address, **more}
    return common.spawn(argv, env=env, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run(argv, pids=lambda process: [process.pid], **more):
    """Median us of an invocation as the server sees it, and us of CPU of each process."""
    api = RuntimeApi()
    process = start(argv, api, **more)
    for _ in range(50):
        api.ask(b'{"warm":true}')
    watched = pids(process)
    before = [nanoseconds(pid) for pid in watched]
    took = []
    for _ in range(COUNT):
        began = time.perf_counter()
        api.ask(b'{"key":"value"}')
        took.append(time.perf_counter() - began)
    cpu = [(nanoseconds(pid) - was) / COUNT / 1e3 for pid, was in zip(watched, before)]
    rss = resident(watched[-1])
    common.stop(process)
    api.stop()
    return statistics.median(took) * 1e6, cpu, rss


def resident(pid):
    """MB of its memory, shared pages in their share."""
    return common.pss(pid) / 1024


def to_first_next(argv, **more):
    """Median ms from exec to the first `next`."""
    took = []
    for _ in range(21):
        api = RuntimeApi()
        began = time.perf_counter()
        process = start(argv, api, **more)
        while not api.count("next", whole=False) and not api.calls:
            time.sleep(0.0001)
        took.append((time.perf_counter() - began) * 1e3)
        common.stop(process)
        api.stop()
    return statistics.median(took)


def layered(process):
    """The runtime, then the layer's process, its child."""
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
    return [process.pid, int(children[0])]


def ric():
    """A command that runs aws-lambda-ric, None = it is not there."""
    for where in (common.BUILD + "/ric", common.BUILD + "/npm"):
        main = where + "/node_modules/aws-lambda-ric/bin/index.mjs"
        if os.path.exists(main):
            task = common.folder() + "/index.js"
            with open(task, "w") as f:
                f.write("exports.handler = async (event) => event;\n")
            return ["node", main, "index.handler"], {"cwd": common.folder()}
    return None, {}


def main():
    if not common.tool("musl-gcc") or not common.tool("ps"):
        print("SKIP the Lambda figures, not installed: musl-gcc or ps", file=sys.stderr)
        return 1 if common.CI else 0
    subprocess.run(["make", "-s", LAMBDA[len(common.ROOT) + 1:], LAYER[len(common.ROOT) + 1:]], cwd=common.ROOT, check=True)
    try:
        us, (cpu,), rss = run([LAMBDA])
        command, env = ric()
        if command:
            other_us, (other,), _ = run(command, **env)
            row("Lambda in C; aws-lambda-ric: CPU per invocation, chaos off", "%.0f; %.0f us (ratio %.2f)" % (cpu, other, cpu / other), "<= 0.2",
                cpu / other <= 0.2)
        else:
            row("Lambda in C: CPU per invocation, chaos off (aws-lambda-ric: not installed)", "%.0f us" % cpu)
        row("Lambda in C: exec to the first next", "%.2f ms" % (first := to_first_next([LAMBDA])), "<= 3 ms", first <= 3)
        row("Lambda in C: memory", "%.2f MB" % rss, "<= 2 MB", rss <= 2)
        size = os.path.getsize(LAMBDA) / 1000
        row("Lambda in C: static x86-64 program", "%.0f KB" % size, "<= 120 KB", size <= 120)
        with_us, (_, layer_cpu), layer_rss = run([LAYER, LAMBDA], layered)
        row("layer: time added to an invocation, median", "%.0f us" % (with_us - us), "<= 150 us", with_us - us <= 150)
        row("layer: CPU per invocation", "%.0f us" % layer_cpu, "<= 100 us", layer_cpu <= 100)
        added = to_first_next([LAYER, LAMBDA]) - first
        row("layer: added to the start, to the first next", "%.2f ms" % added, "<= 2 ms", added <= 2)
        row("layer: memory", "%.2f MB" % layer_rss, "<= 2 MB", layer_rss <= 2)
        size = os.path.getsize(LAYER) / 1000
        row("layer: static x86-64 program", "%.0f KB" % size, "<= 120 KB", size <= 120)
    finally:
        common.cleanup()
    return 0


if __name__ == "__main__":
    sys.exit(main())

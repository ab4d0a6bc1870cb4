"""What the tests beside this file share: processes and their end, chaos-proxy, an upstream that says what it is told,
requests, and the harness. Not a test: the Makefile leaves it out.

Everything listens on loopback, every wait has a deadline, every process is stopped by its id. A tool that is missing is a
loud skip, with CHAOS_CI=1 a failure."""
import atexit
import collections
import http.client
import json
import os
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.path.join(ROOT, "build")
CI = os.environ.get("CHAOS_CI") == "1"  # the sizes that take longer
OFF = {"enabled": False}
TTL_MS = 300
MARK = "X-Chaos-Injected"
VALIDATORS = ["ETag", "Last-Modified", "Age"]  # what a reply with a fault loses, so that no cache keeps it
DIGESTS = ["Content-MD5", "Digest", "Content-Digest", "Repr-Digest"]  # what a corrupted one loses besides


# ---- processes -------------------------------------------------------------------------------------------------

RUNNING = []
KEEP = []  # of them those that outlive a case
FOLDER = None


def folder():
    """One temporary folder for everything; readable, because nginx workers may run as another user."""
    global FOLDER
    if FOLDER is None:
        FOLDER = tempfile.mkdtemp(prefix="chaos-peers-")
        os.chmod(FOLDER, 0o755)
    return FOLDER


def cleanup():
    for process in list(RUNNING):
        stop(process)
    if FOLDER:
        shutil.rmtree(FOLDER, ignore_errors=True)


def stop(process, patience=3.0):
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()
    if process in RUNNING:
        RUNNING.remove(process)


def spawn(argv, **options):
    process = subprocess.Popen(argv, **{"stdin": subprocess.DEVNULL, **options})
    RUNNING.append(process)
    return process


def first_line(process, seconds=8):
    """The first line of its stdout; "" when it ends, or is silent until the deadline and killed."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    line = process.stdout.readline()
    timer.cancel()
    return line


def until(condition, seconds, what):
    """Polls for a condition; the value it gave, or an AssertionError at the deadline."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError("not within %.1f s: %s" % (seconds, what))
        time.sleep(0.01)


def tool(name):
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def answers(port):
    try:
        socket.create_connection(("127.0.0.1", port), 0.2).close()
        return True
    except OSError:
        return False


def compiled(name):
    """The program of tests/peers/NAME.c, compiled when it is older than its parts."""
    program = os.path.join(BUILD, "tests", "peers", name)
    source = os.path.join(ROOT, "tests", "peers", name + ".c")
    parts = [source, os.path.join(ROOT, "chaos.h"), os.path.join(ROOT, "examples", "proxy.c")]
    if not os.path.exists(program) or os.path.getmtime(program) < max(os.path.getmtime(part) for part in parts):
        os.makedirs(os.path.dirname(program), exist_ok=True)
        subprocess.run([*os.environ.get("CC", "cc").split(), "-std=c99", "-O2", "-Wall", "-Wextra", "-pthread", "-o", program, source],
                       check=True, timeout=60)
    return program


def counted():
    """The proxy that prints its counters when it ends."""
    return compiled("counted")


def descriptors(pid):
    return len(os.listdir("/proc/%d/fd" % pid))


def tasks(pid):
    return len(os.listdir("/proc/%d/task" % pid))


def pss(pid):
    """KiB of its memory, shared pages in their share."""
    with open("/proc/%d/smaps_rollup" % pid) as f:
        return int(re.search(r"^Pss:\s+(\d+)", f.read(), re.M).group(1))


def cpu(pid):
    """Seconds of CPU so far, all threads, living and gone."""
    with open("/proc/%d/stat" % pid) as f:
        fields = f.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Proxy:
    """chaos-proxy with a file: config in its own folder; its log goes to a file. upstream: a port or a URL. under: a
    command put in front."""

    def __init__(self, upstream, config=OFF, ttl=TTL_MS, args=(), program=None, env=None, under=(), listen="127.0.0.1:0", **options):
        self.dir = tempfile.mkdtemp(prefix="proxy-", dir=folder())
        self.config = self.dir + "/chaos.json"
        self.log_path = self.dir + "/log"
        self.ended = None
        if config is not None:
            self.put(config)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CHAOS_")}
        environment.update(env or {})
        url = upstream if isinstance(upstream, str) else "http://127.0.0.1:%d" % upstream
        with open(self.log_path, "w") as log:
            self.process = spawn([*under, program or os.path.join(BUILD, "chaos-proxy"), "--listen", listen, "--upstream", url,
                                  "--config", "file:" + self.config, "--ttl", str(ttl), "--instance", "peer-test", *args],
                                 stdout=subprocess.PIPE, stderr=log, text=True, env=environment, **options)
        line = first_line(self.process)
        found = re.match(r"chaos-proxy listening on \S+:(\d+)\n$", line)
        if not found:
            with open(self.log_path) as f:
                raise RuntimeError("first line is %r; log: %s" % (line, f.read()[-500:]))
        self.port = int(found.group(1))
        self.pid = self.process.pid

    def put(self, config):
        """As an operator should: write beside it, then rename."""
        text = config if isinstance(config, str) else json.dumps(config)
        with open(self.config + ".new", "w") as f:
            f.write(text)
        os.rename(self.config + ".new", self.config)
        return time.monotonic()

    def switch(self, config):
        """A config that differs from the one in force, and in force when this returns."""
        before = len(self.log("config"))
        self.put(config)
        self.signal(signal.SIGHUP)
        until(lambda: len(self.log("config")) > before, 3, "the new config is taken")
        assert self.state() != "invalid", "the config is refused: %s" % self.log("config")[-1]["reason"]

    def log(self, action=None):
        """The log so far; each line must be one JSON object."""
        with open(self.log_path) as f:
            text = f.read()
        lines = [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]
        assert all(line.get("source") == "chaos" for line in lines), "a log line of unknown source"
        return [line for line in lines if action in (None, line.get("action"))]

    def logged_faults(self):
        """Faults the log tells of: one line each, or counted in a summary line."""
        return len(self.log("inject")) + sum(line.get("suppressed", 0) for line in self.log("summary"))

    def state(self):
        states = self.log("state")
        return states[-1]["state"] if states else None

    def totals(self):
        """Ends a counted proxy and returns its counters."""
        self.signal(signal.SIGTERM)
        said = self.process.communicate(timeout=10)[0]
        assert self.wait_exit() == 0
        return json.loads(said)

    def alive(self):
        return self.process.poll() is None

    def signal(self, number):
        self.process.send_signal(number)

    def wait_exit(self, seconds=5):
        code = self.process.wait(seconds)
        stop(self.process)
        return code

    def stop(self):
        stop(self.process)


# ---- an upstream ---------------------------------------------------------------------------------------------------

class Request:
    """One request as an Upstream got it, and ways to answer."""

    def __init__(self, conn, head, rest):
        self.conn, self.head, self.rest = conn, head, rest
        self.method, self.path, self.version = head.split("\r\n")[0].split(" ")
        self.fields = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in head.split("\r\n")[1:] if line)}

    def recv(self):
        data, self.rest = self.rest or self.conn.recv(65536), b""
        return data

    def line(self):
        while b"\r\n" not in self.rest:
            data = self.conn.recv(65536)
            if not data:
                raise EOFError
            self.rest += data
        line, self.rest = self.rest.split(b"\r\n", 1)
        return line

    def body(self):
        """The request body, piece by piece."""
        if self.fields.get("expect") == "100-continue":
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        chunked = "chunked" in self.fields.get("transfer-encoding", "")
        while True:
            left = int(self.line().split(b";")[0], 16) if chunked else int(self.fields.get("content-length", 0))
            last = left == 0 or not chunked
            while left:
                data = self.recv()
                if not data:
                    raise EOFError
                self.rest = data[left:]
                data = data[:left]
                left -= len(data)
                yield data
            if chunked:
                self.line()
            if last:
                return

    def send(self, data):
        self.conn.sendall(data)

    def reply(self, body=b"ok", status="200 OK", fields="", framing="length"):
        """One reply: framing is length, chunked (7,001 bytes each), or closed. A body that HEAD or the status forbids is
        announced only."""
        text = {"length": "Content-Length: %d\r\n" % len(body), "chunked": "Transfer-Encoding: chunked\r\n", "closed": ""}[framing]
        self.send(("HTTP/1.1 %s\r\n%s%s\r\n" % (status, text if status[:3] != "204" else "", fields)).encode())
        if self.method == "HEAD" or status[:3] in ("204", "304"):
            return True
        if framing == "chunked":
            for i in range(0, len(body), 7001):
                piece = body[i:i + 7001]
                self.send(b"%x\r\n%s\r\n" % (len(piece), piece))
            body = b"0\r\n\r\n"
        self.send(body)
        return framing != "closed"


def reset(sock):
    """Closes with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Upstream:
    """A service in threads. answer(request) sends what it likes and returns True to keep the connection. It counts its
    calls by path, and by the query, when there is one, as name."""

    def __init__(self, answer=lambda r: r.reply(), host="127.0.0.1", port=0, backlog=1024):
        self.answer, self.calls, self.heads, self.lock = answer, collections.Counter(), [], threading.Lock()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.server = socket.socket(family, socket.SOCK_STREAM)
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.server.bind((host, port))
        self.server.listen(backlog)
        self.port = self.server.getsockname()[1]
        self.open = set()
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                conn, _ = self.server.accept()
            except OSError:
                return
            conn.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self.lock:
                self.open.add(conn)
            threading.Thread(target=self.serve, args=(conn,), daemon=True).start()

    def serve(self, conn):
        rest, keep = b"", True
        try:
            while keep:
                while b"\r\n\r\n" not in rest:
                    data = conn.recv(65536)
                    if not data:
                        raise EOFError
                    rest += data
                head, rest = rest.split(b"\r\n\r\n", 1)
                request = Request(conn, head.decode("latin-1"), rest)
                with self.lock:
                    self.calls[request.path.split("?")[-1]] += 1
                    self.heads.append(request.head)
                keep = self.answer(request)
                rest = request.rest
        except (OSError, EOFError, ValueError):
            pass  # the proxy hung up, or the test closed it: that is what such a test is about
        with self.lock:
            self.open.discard(conn)
        conn.close()

    def close(self):
        """Stops listening and hangs up on everybody."""
        try:
            self.server.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self.server.close()
        with self.lock:
            for conn in self.open:
                try:
                    conn.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass


# ---- requests --------------------------------------------------------------------------------------------------

class Reply:
    def __init__(self, response, body, seconds, began):
        self.status, self.body, self.seconds, self.began = response.status, body, seconds, began
        self.headers = {k.lower(): v for k, v in response.getheaders()}
        self.mark = self.headers.get(MARK.lower())


def connect(port, timeout=10):
    """A connection that never reopens itself: if the proxy closes it, the next request raises."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    connection.connect()
    connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.auto_open = 0
    return connection


def ask(connection, path="/text.txt", method="GET", body=None, headers=None, **more):
    began = time.monotonic()
    connection.request(method, path, body=body, headers=headers or {}, **more)
    response = connection.getresponse()
    data = response.read()
    return Reply(response, data, time.monotonic() - began, began)


def once(port, path="/text.txt", method="GET", body=None, headers=None, timeout=10, **more):
    connection = connect(port, timeout)
    try:
        return ask(connection, path, method, body, headers, **more)
    finally:
        connection.close()


def dial(port, timeout=10):
    """A bare connection."""
    s = socket.create_connection(("127.0.0.1", port), timeout)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return s


def read_to_end(s):
    """Everything until the peer closes or resets; and whether it was a reset."""
    data = b""
    try:
        while True:
            got = s.recv(65536)
            if not got:
                return data, False
            data += got
    except ConnectionResetError:
        return data, True


def read_all(s):
    return read_to_end(s)[0]


def in_threads(jobs, seconds=60):
    """Runs callables at once; their results in order, or the first failure."""
    results, errors = [None] * len(jobs), []

    def run(i, job):
        try:
            results[i] = job()
        except Exception as error:  # whatever a job raises fails the case
            errors.append(error)
    threads = [threading.Thread(target=run, args=(i, job), daemon=True) for i, job in enumerate(jobs)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
        assert not thread.is_alive(), "not done in %d s" % seconds
    if errors:
        raise errors[0]
    return results


# ---- load.c ----------------------------------------------------------------------------------------------------------

class Load:
    """The upstream and the client of load.c: many connections, every byte checked."""

    @staticmethod
    def serve(**options):
        process = spawn([compiled("load"), "serve"], stdout=subprocess.PIPE, text=True, **options)
        process.port = int(first_line(process).split(":")[1])
        return process

    def __init__(self, port, connections, requests, length=100, post=0, hold=False, seconds=60, stop_at_error=False):
        self.seconds = seconds
        self.process = spawn([compiled("load"), "ask", str(port), str(connections), str(requests), str(length), str(post), str(int(hold)),
                              str(seconds)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def result(self):
        """Counts of one round: requests answered ok, wrong, by other statuses; errors; milliseconds."""
        line = first_line(self.process, self.seconds + 15)
        assert line, "load ended with %s" % self.process.wait(5)
        return json.loads(line)

    def again(self, requests):
        """One more round on the connections that were held."""
        self.process.stdin.write("%d\n" % requests)
        self.process.stdin.flush()
        return self.result()

    def end(self):
        stop(self.process)


def more_descriptors(wanted):
    """Raises the soft limit, for the processes started from here on too; Skip when the hard one is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise Skip("needs %d descriptors, the hard limit is %d" % (wanted, hard))
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# ---- harness ---------------------------------------------------------------------------------------------------

CASES = []
NOTES = []


class Skip(Exception):
    pass


def case(function):
    CASES.append(function)
    return function


def need(*names):
    missing = [n for n in names if not tool(n)]
    if missing:
        raise Skip("not installed: " + " ".join(missing))


def note(text):
    NOTES.append("  " + text)


def where(error, function):
    """The line of the case's file that failed."""
    place, found = error.__traceback__, 0
    while place:
        if place.tb_frame.f_code.co_filename == function.__code__.co_filename:
            found = place.tb_lineno
        place = place.tb_next
    return "%s:%d" % (os.path.basename(function.__code__.co_filename), found)


def run_case(function, verbose):
    """ok, skip or FAIL."""
    start = time.monotonic()
    try:
        function()
        if verbose:
            print("ok   %s (%.1f s)" % (function.__name__, time.monotonic() - start), flush=True)
        return "ok"
    except Skip as reason:
        word = "FAIL" if CI else "skip"
        print("%s %s: %s" % (word, function.__name__, reason), flush=True)
        return word
    except Exception as error:  # any other is a failure of this case, and the next one runs
        print("FAIL %s %s: %s%s" % (function.__name__, where(error, function),
                                    "" if isinstance(error, AssertionError) else type(error).__name__ + ": ", error), flush=True)
        return "FAIL"


def main(limit=120):
    """Runs the cases of a file, within a limit in seconds."""
    global BUILD
    arguments, name = sys.argv[1:], os.path.basename(sys.argv[0])
    pick = arguments[arguments.index("--filter") + 1] if "--filter" in arguments else ""
    verbose = "-v" in arguments or os.environ.get("CHECK_VERBOSE") == "1"
    if "--build" in arguments:
        BUILD = os.path.abspath(arguments[arguments.index("--build") + 1])
    atexit.register(cleanup)
    signal.signal(signal.SIGALRM, lambda *_: (print("FAIL %s: not done in %d s" % (name, limit), flush=True), sys.exit(1)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    signal.alarm(limit)
    results = collections.Counter()
    began = time.monotonic()
    for function in CASES:
        if pick not in function.__name__:
            continue
        results[run_case(function, verbose)] += 1
        for process in list(RUNNING):  # what a failed case left
            if process not in KEEP:
                stop(process)
    for line in NOTES:
        print(line)
    print("  %.1f s" % (time.monotonic() - began))
    print("%d passed, %d failed%s" % (results["ok"], results["FAIL"], ", %d skipped" % results["skip"] if results["skip"] else ""))
    return 1 if results["FAIL"] else 0

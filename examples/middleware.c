/* chaos-middleware - faults inside a threaded C server: ask for a verdict, obey it, tell how it went.

   Build:  cc -std=c99 -O2 -pthread -o chaos-middleware middleware.c        (chaos.h is one folder up)
   Run:    CHAOS_CONFIG=file:chaos.json chaos-middleware [--listen [ADDR:]PORT]      (default 127.0.0.1:0, a free port)
   Prints: chaos-middleware listening on 127.0.0.1:40123

   Everything about chaos is in answer(); the rest is a small HTTP server so that the program can really be used. */
#define CHAOS_IMPLEMENTATION
#include "../chaos.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { WORKERS = 64, IDLE_SECONDS = 5 };

static chaos *faults;
static int listener;
static int stopping; /* atomic */

static unsigned long long now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (unsigned long long)t.tv_sec * 1000000 + (unsigned long long)t.tv_nsec / 1000;
}

/* The service itself, which knows nothing of chaos. */
static int handle(const char *path, char *body, size_t cap) {
    bool found = !strcmp(path, "/") || !strcmp(path, "/healthz");
    snprintf(body, cap, found ? "hello from the handler\n" : "no such path\n");
    return found ? 200 : 404;
}

/* chaos asks for headers by lower-case name only when a rule looks at them. */
static const char *find_header(void *user, const char *name, size_t *len) {
    const char *line = strstr((const char *)user, "\r\n");
    size_t n = strlen(name);
    for (; line; line = strstr(line + 2, "\r\n")) {
        const char *p = line + 2;
        if (strncasecmp(p, name, n) || p[n] != ':') continue;
        p += n + 1 + strspn(p + n + 1, " \t");
        *len = strcspn(p, "\r");
        return p;
    }
    return NULL;
}

/* The middleware: verdict, delay, handler, reply. Returns the status; extra gets the header lines of a fault. */
static int answer(char *head, const char *method, const char *path, char *body, size_t cap, char *extra, size_t extra_cap) {
    unsigned long long start;
    chaos_request request = {0};
    chaos_verdict verdict;
    int status = 0;
    request.method = method;
    request.path = path;
    request.header = find_header;
    request.user = head;

    verdict = chaos_decide(faults, &request); /* never sleeps: a load and a branch while chaos is off */
    chaos_wait(faults, &verdict);             /* sleeps a delay; ends early when chaos goes off */
    start = now_us();
    if (verdict.kind != CHAOS_STATUS || verdict.after) status = handle(path, body, cap);
    chaos_done(faults, &verdict, status, now_us() - start); /* what really happened */

    extra[0] = 0;
    if (verdict.kind == CHAOS_DELAY)
        snprintf(extra, extra_cap, "X-Chaos-Injected: latency\r\nX-Chaos-Delay-Ms: %u\r\n", verdict.delay_us / 1000);
    if (verdict.kind != CHAOS_STATUS) return status;
    chaos_verdict_body(faults, &verdict, body, cap);
    if (verdict.status == 204 || verdict.status == 205 || verdict.status == 304) body[0] = 0;
    snprintf(extra, extra_cap, "X-Chaos-Injected: error\r\nCache-Control: no-store\r\n");
    if (chaos_verdict_retry_after(faults, &verdict) >= 0)
        snprintf(extra + strlen(extra), extra_cap - strlen(extra), "Retry-After: %d\r\n", chaos_verdict_retry_after(faults, &verdict));
    return verdict.status;
}

/* Requests of one connection, one after the other; bodies are not read, so a request with one is the last. */
static void serve(int fd) {
    char head[8192], method[16], path[1024], body[2048], extra[256], reply[4096];
    size_t len = 0;
    bool keep = true;
    while (keep) {
        char *end;
        size_t unused;
        int n, status;
        head[len] = 0;
        while (!(end = strstr(head, "\r\n\r\n"))) {
            ssize_t got = recv(fd, head + len, sizeof head - 1 - len, 0);
            if (got <= 0) return;
            len += (size_t)got;
            head[len] = 0;
        }
        end[2] = 0;
        if (sscanf(head, "%15s %1023[^ ?]", method, path) != 2) return;
        keep = strstr(head, " HTTP/1.1\r\n") && !find_header(head, "connection", &unused) &&
               !find_header(head, "content-length", &unused) && !find_header(head, "transfer-encoding", &unused) &&
               !__atomic_load_n(&stopping, __ATOMIC_RELAXED);
        status = answer(head, method, path, body, sizeof body, extra, sizeof extra);
        n = snprintf(reply, sizeof reply, "HTTP/1.1 %d %s\r\nContent-Type: text/plain\r\nContent-Length: %zu\r\n%s%s\r\n%s", status,
                     status < 400 ? "OK" : "Error", strlen(body), extra, keep ? "" : "Connection: close\r\n",
                     strcmp(method, "HEAD") ? body : "");
        if (send(fd, reply, (size_t)n, 0) != n) return;
        len -= (size_t)(end + 4 - head);
        memmove(head, end + 4, len);
    }
}

static void *work(void *unused) {
    struct timeval idle = {IDLE_SECONDS, 0};
    while (!__atomic_load_n(&stopping, __ATOMIC_RELAXED)) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) continue;
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &idle, sizeof idle);
        serve(fd);
        close(fd);
    }
    return unused;
}

static int listen_on(const char *where, struct sockaddr_in *addr) {
    const char *colon = strrchr(where, ':');
    char host[64] = "127.0.0.1";
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    socklen_t len = sizeof *addr;
    if (colon && colon > where) snprintf(host, sizeof host, "%.*s", (int)(colon - where), where);
    addr->sin_family = AF_INET;
    addr->sin_port = htons((unsigned short)atoi(colon ? colon + 1 : where));
    if (fd < 0 || inet_pton(AF_INET, host, &addr->sin_addr) != 1) return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)addr, sizeof *addr) || listen(fd, 512)) return -1;
    return getsockname(fd, (struct sockaddr *)addr, &len) ? -1 : fd;
}

int main(int argc, char **argv) {
    const char *where = argc == 3 && !strcmp(argv[1], "--listen") ? argv[2] : "127.0.0.1:0";
    struct sockaddr_in addr = {0};
    pthread_t workers[WORKERS];
    char host[INET_ADDRSTRLEN];
    chaos_error err;
    sigset_t end;
    int i, sig;
    if (argc != 1 && where != argv[2]) return fprintf(stderr, "usage: chaos-middleware [--listen [ADDR:]PORT]\n"), 2;
    signal(SIGPIPE, SIG_IGN); /* a client that hangs up is no reason to end */
    sigemptyset(&end);
    sigaddset(&end, SIGINT);
    sigaddset(&end, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &end, NULL);

    faults = chaos_open(NULL, &err); /* $CHAOS_CONFIG; every call takes a NULL handle for "off" */
    if (!faults) fprintf(stderr, "chaos-middleware: no chaos: %s\n", err.text);
    listener = listen_on(where, &addr);
    if (listener < 0) return fprintf(stderr, "chaos-middleware: cannot listen on %s\n", where), 1;
    for (i = 0; i < WORKERS; i++)
        if (pthread_create(&workers[i], NULL, work, NULL)) return fprintf(stderr, "chaos-middleware: no thread\n"), 1;
    printf("chaos-middleware listening on %s:%d\n", inet_ntop(AF_INET, &addr.sin_addr, host, sizeof host), ntohs(addr.sin_port));
    fflush(stdout);

    sigwait(&end, &sig);
    __atomic_store_n(&stopping, 1, __ATOMIC_RELAXED);
    chaos_off(faults);             /* whoever waits goes on at once */
    shutdown(listener, SHUT_RDWR); /* whoever accepts wakes up */
    for (i = 0; i < WORKERS; i++) pthread_join(workers[i], NULL);
    chaos_close(faults); /* only now: no other thread may be in a chaos call */
    return 0;
}

/* late.c - how late an injected delay ends, under arrivals that wait for nobody (open loop).

   late UPSTREAM_PORT CONNECTIONS SECONDS DELAY_MS: runs the proxy in this process in front of that upstream, and one
   client thread with a timetable made beforehand: each connection asks once in 250 ms, at a random moment of its turn,
   whatever earlier replies did. Prints lines of NAME COUNT MEDIAN P99 MAX, in ms:

     wake    the proxy's thread is back from an injected delay, minus its deadline, as the proxy sees it (CHAOSI_LATE)
     reply   the client has the whole reply, minus when it asked, minus DELAY_MS

   DELAY_MS 0 leaves chaos off: `reply` is then the round trip. Linux. */
#define _POSIX_C_SOURCE 200809L
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

static void note_wake(unsigned long long late_ns);
#define CHAOSI_LATE(ns) note_wake(ns)
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

enum { MOST = 4000, WAITING = 16, PERIOD_MS = 250, JITTER_MS = 40 };

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* ---- what is measured ---- */
typedef struct series {
    const char *name;
    double *ms;
    long count, cap;
} series;

static series wake = {"wake", NULL, 0, 0}, reply = {"reply", NULL, 0, 0};

static void note(series *s, double ms) {
    long i = __atomic_fetch_add(&s->count, 1, __ATOMIC_RELAXED);
    if (i < s->cap) s->ms[i] = ms;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(series *s) {
    long n = s->count < s->cap ? s->count : s->cap;
    if (n == 0) return;
    qsort(s->ms, (size_t)n, sizeof *s->ms, ascending);
    printf("%s %ld %.4f %.4f %.4f\n", s->name, n, s->ms[n / 2], s->ms[n * 99 / 100], s->ms[n - 1]);
}

/* ---- the proxy's side ---- */
static void note_wake(unsigned long long late_ns) {
    static __thread int delays;
    if (delays++ > 0) note(&wake, (double)late_ns / 1e6); /* a thread's first request pays for its memory */
}

typedef struct proxy {
    chaos *c;
    chaos_proxy_desc desc;
    pthread_t thread;
    int port; /* atomic; 0 = not listening yet, -1 = failed */
} proxy;

static void on_listening(void *user, const char *address) {
    proxy *p = (proxy *)user;
    __atomic_store_n(&p->port, atoi(strrchr(address, ':') + 1), __ATOMIC_RELEASE);
}

static void *run_proxy(void *arg) {
    proxy *p = (proxy *)arg;
    chaos_error err;
    if (chaos_proxy_run(p->c, &p->desc, &err) == CHAOS_OK) return NULL;
    fprintf(stderr, "late: %s\n", err.text);
    __atomic_store_n(&p->port, -1, __ATOMIC_RELEASE);
    return NULL;
}

static int start_proxy(proxy *p, int upstream_port, int connections, int delay_ms) {
    static char config[64], upstream[64];
    struct timespec pause = {0, 1000000};
    chaos_desc desc;
    int port;
    memset(&desc, 0, sizeof desc);
    snprintf(config, sizeof config, "{\"enabled\":%s,\"latency\":%d}", delay_ms ? "true" : "false", delay_ms);
    snprintf(upstream, sizeof upstream, "http://127.0.0.1:%d", upstream_port);
    desc.config = config;
    desc.quiet = true;
    p->c = chaos_open(&desc, NULL);
    p->desc.upstream = upstream;
    p->desc.max_connections = connections + 16;
    p->desc.listening = on_listening;
    p->desc.user = p;
    if (!p->c || pthread_create(&p->thread, NULL, run_proxy, p)) return -1;
    while ((port = __atomic_load_n(&p->port, __ATOMIC_ACQUIRE)) == 0) nanosleep(&pause, NULL);
    return port;
}

/* ---- the client's side ---- */
typedef struct arrival {
    double at;
    int connection;
} arrival;

typedef struct connection {
    int fd, asked, answered;
    double at[WAITING]; /* when the requests without a reply were sent, by number */
    char buf[2048];
    size_t have;
} connection;

static int by_time(const void *a, const void *b) {
    double x = ((const arrival *)a)->at, y = ((const arrival *)b)->at;
    return (x > y) - (x < y);
}

/* Even turns, and a random moment within the first part of each. */
static void make_timetable(arrival *a, int connections, int turns) {
    unsigned long long x = 88172645463325252ull;
    double start = now_ms() + 50;
    int i, k;
    for (i = 0; i < connections; i++) {
        for (k = 0; k < turns; k++, a++) {
            x ^= x << 13, x ^= x >> 7, x ^= x << 17;
            a->at = start + PERIOD_MS * (k + (double)i / connections) + (double)(x >> 40) / 16777216.0 * JITTER_MS;
            a->connection = i;
        }
    }
}

static int dial(int port) {
    struct sockaddr_in to;
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(&to, 0, sizeof to);
    to.sin_family = AF_INET;
    to.sin_port = htons((unsigned short)port);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to) != 0) return -1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static int ask(connection *c) {
    static const char request[] = "GET / HTTP/1.1\r\nHost: bench\r\n\r\n";
    if (c->asked - c->answered == WAITING) return 0;
    c->at[c->asked++ % WAITING] = now_ms();
    return send(c->fd, request, sizeof request - 1, MSG_NOSIGNAL) == (ssize_t)sizeof request - 1;
}

/* The length of the whole reply that buf begins with, 0 = not all there, -1 = not a 200. */
static long whole_reply(connection *c) {
    char *end, *length;
    size_t total;
    c->buf[c->have] = 0;
    if (!(end = strstr(c->buf, "\r\n\r\n"))) return 0;
    length = strstr(c->buf, "ontent-Length: ");
    if (!length) length = strstr(c->buf, "ontent-length: ");
    if (!length || strncmp(c->buf, "HTTP/1.1 200", 12) != 0) return -1;
    total = (size_t)(end + 4 - c->buf) + strtoul(length + 15, NULL, 10);
    return total <= c->have ? (long)total : 0;
}

/* Takes what has come; the number of replies, or -1. The first of a connection is not measured. */
static int take(connection *c, double delay_ms) {
    ssize_t n = recv(c->fd, c->buf + c->have, sizeof c->buf - 1 - c->have, 0);
    double now = now_ms();
    int replies = 0;
    long len;
    if (n <= 0) return -1;
    c->have += (size_t)n;
    while ((len = whole_reply(c)) > 0) {
        if (c->answered > 0) note(&reply, now - c->at[c->answered % WAITING] - delay_ms);
        c->answered++, replies++;
        c->have -= (size_t)len;
        memmove(c->buf, c->buf + len, c->have);
    }
    return len < 0 ? -1 : replies;
}

static void ring_at(int timer, double ms) {
    struct itimerspec t;
    memset(&t, 0, sizeof t);
    t.it_value.tv_sec = (time_t)(ms / 1e3);
    t.it_value.tv_nsec = (long)((ms - (double)t.it_value.tv_sec * 1e3) * 1e6) + 1;
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &t, NULL);
}

/* False = something was refused, cut or overdue. */
static int run_client(connection *c, const arrival *a, int total, double delay_ms) {
    struct epoll_event events[64], e;
    int i, n, got, next = 0, left = total, poller = epoll_create1(0), timer = timerfd_create(CLOCK_MONOTONIC, 0);
    memset(&e, 0, sizeof e);
    e.events = EPOLLIN;
    for (i = 0; i < total; i++) {
        e.data.ptr = &c[a[i].connection];
        if (epoll_ctl(poller, EPOLL_CTL_ADD, c[a[i].connection].fd, &e) != 0 && errno != EEXIST) return 0;
    }
    e.data.ptr = NULL;
    if (epoll_ctl(poller, EPOLL_CTL_ADD, timer, &e) != 0) return 0;
    while (left > 0) {
        while (next < total && a[next].at <= now_ms())
            if (!ask(&c[a[next++].connection])) return 0;
        if (next < total) ring_at(timer, a[next].at);
        n = epoll_wait(poller, events, 64, 10000);
        if (n <= 0) return 0;
        for (i = 0; i < n; i++) {
            unsigned long long rang;
            connection *ready = (connection *)events[i].data.ptr;
            if (ready) got = take(ready, delay_ms);
            else got = read(timer, &rang, sizeof rang) < 0 ? -1 : 0;
            if (got < 0) return 0;
            left -= got;
        }
    }
    close(timer);
    close(poller);
    return 1;
}

int main(int argc, char **argv) {
    static connection connections[MOST];
    static proxy p;
    struct rlimit files;
    int i, port, turns, total, ok, count = argc == 5 ? atoi(argv[2]) : 0, delay_ms = argc == 5 ? atoi(argv[4]) : -1;
    double *all;
    arrival *timetable;
    if (count < 1 || count > MOST || delay_ms < 0 || delay_ms > PERIOD_MS || atof(argv[3]) <= 0) return 2;
    if (getrlimit(RLIMIT_NOFILE, &files) == 0) files.rlim_cur = files.rlim_max, setrlimit(RLIMIT_NOFILE, &files);
    turns = 2 + (int)(atof(argv[3]) * 1e3 / PERIOD_MS);
    total = count * turns;
    all = (double *)calloc((size_t)total * 2, sizeof *all);
    timetable = (arrival *)calloc((size_t)total, sizeof *timetable);
    if (!all || !timetable) return 1;
    wake.ms = all, reply.ms = all + total;
    wake.cap = reply.cap = total;
    port = start_proxy(&p, atoi(argv[1]), count, delay_ms);
    if (port < 0) return 1;
    for (i = 0; i < count; i++)
        if ((connections[i].fd = dial(port)) < 0) return 1;
    make_timetable(timetable, count, turns);
    qsort(timetable, (size_t)total, sizeof *timetable, by_time);
    ok = run_client(connections, timetable, total, delay_ms);
    if (!ok) fprintf(stderr, "late: a request was refused, cut, or got no reply\n");
    for (i = 0; i < count; i++) close(connections[i].fd);
    chaos_proxy_stop(p.c);
    pthread_join(p.thread, NULL);
    chaos_close(p.c);
    report(&wake);
    report(&reply);
    free(all);
    free(timetable);
    return !ok;
}

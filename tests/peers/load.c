/* load.c - one process, thousands of connections, every byte checked. common.py compiles it.

   load serve                                       an upstream: GET and POST /TOKEN/LENGTH
   load ask PORT CONNECTIONS REQUESTS LENGTH POST HOLD SECONDS
                                                    opens the connections, and when all are there sends the requests

   A body, in both directions, is TOKEN/ over and over, so that a byte of another request shows. POST: bytes of request
   body. ask prints one line of JSON a round; with HOLD it keeps its connections, and each number on stdin is another round. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD = 2048, BLOCK = 16384, EVENTS = 256 };

typedef struct conn {
    int fd;
    bool connected, busy, head_done, bad, hung_up;
    char token[40], head[HEAD], out[HEAD]; /* out: a head on its way */
    size_t out_len, out_at;
    long body, body_at, send, send_at; /* to receive; to send after out */
    long reply;                        /* length of the one that the request asks for */
    int status;
    double since;
} conn;

static int poller;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

/* The bytes of a body that begin at `at`. */
static void pattern(const char *token, long at, char *to, size_t len) {
    size_t period = strlen(token) + 1, i, from = (size_t)at % period;
    for (i = 0; i < len; i++, from = from + 1 == period ? 0 : from + 1) to[i] = from + 1 == period ? '/' : token[from];
}

static bool is_pattern(const char *token, long at, const char *data, size_t len) {
    char want[BLOCK];
    pattern(token, at, want, len);
    return memcmp(want, data, len) == 0;
}

static int new_socket(void) {
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    return fd;
}

static struct sockaddr_in loopback(int port) {
    struct sockaddr_in a;
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_port = htons((unsigned short)port);
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return a;
}

static void watch(conn *c) {
    struct epoll_event e;
    e.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
    e.data.ptr = c;
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &e)) die("epoll_ctl");
}

/* Sends what is due; false = the peer is gone. */
static bool flush_out(conn *c) {
    char block[BLOCK];
    while (c->out_at < c->out_len || c->send_at < c->send) {
        ssize_t n;
        if (c->out_at < c->out_len) {
            n = send(c->fd, c->out + c->out_at, c->out_len - c->out_at, MSG_NOSIGNAL);
            if (n > 0) c->out_at += (size_t)n;
        } else {
            size_t len = c->send - c->send_at < BLOCK ? (size_t)(c->send - c->send_at) : BLOCK;
            pattern(c->token, c->send_at, block, len);
            n = send(c->fd, block, len, MSG_NOSIGNAL);
            if (n > 0) c->send_at += n;
        }
        if (n < 0) return errno == EAGAIN;
    }
    return true;
}

/* Reads one message head and its body: 1 = whole, 0 = more is to come, -1 = gone. Takes the head apart by `parse`. */
static int read_message(conn *c, bool (*parse)(conn *c)) {
    char block[BLOCK];
    for (;;) {
        char *end;
        ssize_t n;
        if (c->head_done && c->body_at == c->body) return 1;
        if (c->head_done) {
            n = recv(c->fd, block, c->body - c->body_at < BLOCK ? (size_t)(c->body - c->body_at) : BLOCK, 0);
            if (n > 0 && c->status == 200 && !is_pattern(c->token, c->body_at, block, (size_t)n)) c->bad = true;
            if (n > 0) c->body_at += n;
        } else { /* peeked, so that the body's first bytes stay in the socket */
            n = recv(c->fd, c->head, HEAD - 1, MSG_PEEK);
            if (n > 0) {
                c->head[n] = 0;
                end = strstr(c->head, "\r\n\r\n");
                if (!end) return n == HEAD - 1 || c->hung_up ? -1 : 0;
                if (recv(c->fd, c->head, (size_t)(end - c->head) + 4, 0) < 0) return -1;
                end[2] = 0;
                c->head_done = true;
                c->body_at = 0;
                if (!parse(c)) return -1;
            }
        }
        if (n == 0) return -1;
        if (n < 0) return errno == EAGAIN ? 0 : -1;
    }
}

static void next_message(conn *c) {
    c->head_done = c->bad = false;
    c->body = c->body_at = 0;
}

static long length_field(const char *head, long none) {
    const char *at = strcasestr(head, "\r\nContent-Length:");
    return at ? atol(at + 17) : none;
}

/* ---- serve ---- */

static bool parse_request(conn *c) {
    char method[8];
    long length;
    if (sscanf(c->head, "%7s /%39[^/]/%ld", method, c->token, &length) != 3) return false;
    c->status = 200; /* the request body is checked */
    c->body = length_field(c->head, 0);
    c->reply = length;
    return true;
}

/* False = the connection ends. */
static bool serve_conn(conn *c) {
    for (;;) {
        int r;
        if (!flush_out(c)) return false;
        if (c->out_at < c->out_len || c->send_at < c->send) return true;
        c->send = c->send_at = 0;
        r = read_message(c, parse_request);
        if (r <= 0) return r == 0;
        c->out_len = (size_t)sprintf(c->out, "HTTP/1.1 %s\r\nContent-Length: %ld\r\n\r\n", c->bad ? "599 Wrong" : "200 OK", c->reply);
        c->send = c->reply;
        c->out_at = 0;
        c->send_at = 0;
        next_message(c);
    }
}

static void serve(void) {
    struct epoll_event events[EVENTS];
    struct sockaddr_in a = loopback(0);
    socklen_t len = sizeof a;
    int i, n, listener = new_socket();
    if (bind(listener, (struct sockaddr *)&a, sizeof a) || listen(listener, 4096) || getsockname(listener, (struct sockaddr *)&a, &len))
        die("listen");
    events[0].events = EPOLLIN;
    events[0].data.ptr = NULL;
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, events);
    printf("load listening on 127.0.0.1:%d\n", ntohs(a.sin_port));
    fflush(stdout);
    for (;;) {
        n = epoll_wait(poller, events, EVENTS, -1);
        for (i = 0; i < n; i++) {
            conn *c = (conn *)events[i].data.ptr;
            if (c) c->hung_up = events[i].events & (EPOLLRDHUP | EPOLLHUP);
            if (c && !serve_conn(c)) {
                close(c->fd);
                free(c);
            } else if (!c) {
                int fd, one = 1;
                while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
                    c = (conn *)calloc(1, sizeof *c);
                    if (!c) die("calloc");
                    c->fd = fd;
                    watch(c);
                }
            }
        }
    }
}

/* ---- ask ---- */

static struct {
    int port, connections;
    long requests, length, post, sent, done, ok, wrong, refused, status_5xx, other, errors;
    double *took, began, connected;
    int serial;
} job;

static conn *conns;

static bool parse_reply(conn *c) {
    c->status = atoi(c->head + 9);
    c->body = length_field(c->head, -1);
    return !strncmp(c->head, "HTTP/1.1 ", 9) && c->body >= 0;
}

static void dial(conn *c) {
    struct sockaddr_in a = loopback(job.port);
    memset(c, 0, sizeof *c);
    c->fd = new_socket();
    watch(c);
    if (connect(c->fd, (struct sockaddr *)&a, sizeof a) && errno != EINPROGRESS) die("connect");
}

static void send_next(conn *c) {
    if (c->busy || job.sent == job.requests) return;
    job.sent++;
    next_message(c);
    snprintf(c->token, sizeof c->token, "t%d.%d", (int)(c - conns), job.serial++);
    c->out_len = (size_t)sprintf(c->out, "%s /%s/%ld HTTP/1.1\r\nHost: test\r\n", job.post ? "POST" : "GET", c->token, job.length);
    if (job.post) c->out_len += (size_t)sprintf(c->out + c->out_len, "Content-Length: %ld\r\n", job.post);
    c->out_len += (size_t)sprintf(c->out + c->out_len, "\r\n");
    c->out_at = 0;
    c->send = job.post;
    c->send_at = 0;
    c->busy = true;
    c->since = now();
}

static void finish(conn *c) {
    if (c->status == 200 && !c->bad && c->body == job.length) job.ok++;
    else if (c->status == 200 || c->status == 599) job.wrong++;
    else if (c->status >= 500) job.status_5xx++;
    else job.other++;
    job.took[job.done++] = now() - c->since;
    c->busy = false;
}

/* The connection broke: one error when a request was on it; then a new one. */
static void broke(conn *c) {
    bool busy = c->busy, connected = c->connected;
    close(c->fd);
    if (busy) {
        job.errors++;
        job.took[job.done++] = now() - c->since;
    } else if (!connected) {
        job.refused++;
    }
    dial(c);
}

/* One event; true = the connection just opened. */
static bool step(conn *c, bool all_open) {
    bool opened = false;
    if (!c->connected) {
        int problem = 0;
        struct sockaddr_in a;
        socklen_t len = sizeof problem, size = sizeof a;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &problem, &len);
        if (problem) broke(c);
        if (problem || getpeername(c->fd, (struct sockaddr *)&a, &size)) return false;
        c->connected = opened = true;
    }
    for (;;) {
        int r;
        if (all_open) send_next(c);
        if (!flush_out(c) && !c->busy) r = -1;
        else
            r = c->busy                                  ? read_message(c, parse_reply)
                : recv(c->fd, c->head, 1, MSG_PEEK) == 0 ? -1
                                                         : 0; /* a reply may come before the body is out */
        if (r < 0) {
            broke(c);
            return false;
        }
        if (r == 0) return opened;
        finish(c);
        if (c->out_at < c->out_len || c->send_at < c->send || strcasestr(c->head, "\r\nConnection: close")) {
            broke(c);
            return false;
        }
    }
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void tell(void) {
    double total = now() - job.began;
    long n = job.done ? job.done : 1;
    qsort(job.took, (size_t)job.done, sizeof *job.took, by_value);
    printf("{\"ok\":%ld,\"wrong\":%ld,\"errors\":%ld,\"refused\":%ld,\"status_5xx\":%ld,\"other\":%ld,\"unanswered\":%ld,", job.ok,
           job.wrong, job.errors, job.refused, job.status_5xx, job.other, job.requests - job.done);
    printf("\"connected_ms\":%.1f,\"total_ms\":%.1f,\"least_ms\":%.2f,\"p50_ms\":%.2f,\"p99_ms\":%.2f,\"most_ms\":%.2f}\n", job.connected,
           total, job.done ? job.took[0] : 0, job.done ? job.took[n / 2] : 0, job.done ? job.took[n * 99 / 100] : 0,
           job.done ? job.took[n - 1] : 0);
    fflush(stdout);
}

static void round_of(double deadline) {
    struct epoll_event events[EVENTS];
    int i, n, open = 0;
    bool all_open = job.connected > 0;
    job.took = (double *)realloc(job.took, sizeof(double) * (size_t)(job.requests + 1));
    job.sent = job.done = job.ok = job.wrong = job.refused = job.status_5xx = job.other = job.errors = 0;
    job.began = now();
    for (i = 0; i < job.connections && all_open; i++) step(&conns[i], true);
    while (job.done < job.requests && now() < deadline) {
        n = epoll_wait(poller, events, EVENTS, 100);
        for (i = 0; i < n; i++) {
            conn *c = (conn *)events[i].data.ptr;
            c->hung_up = events[i].events & (EPOLLRDHUP | EPOLLHUP);
            open += step(c, all_open) && !all_open;
        }
        if (all_open || open < job.connections) continue;
        all_open = true;
        job.connected = now() - job.began + 0.1;
        for (i = 0; i < job.connections; i++) step(&conns[i], true);
    }
    tell();
}

static int ask(char **argv) {
    char line[32];
    double patience = atof(argv[6]) * 1e3;
    int i;
    job.port = atoi(argv[0]);
    job.connections = atoi(argv[1]);
    job.requests = atol(argv[2]);
    job.length = atol(argv[3]);
    job.post = atol(argv[4]);
    conns = (conn *)calloc((size_t)job.connections, sizeof *conns);
    if (!conns) die("calloc");
    for (i = 0; i < job.connections; i++) dial(&conns[i]);
    round_of(now() + patience);
    while (atoi(argv[5]) && fgets(line, sizeof line, stdin)) {
        job.requests = atol(line);
        round_of(now() + patience);
    }
    return 0;
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    poller = epoll_create1(EPOLL_CLOEXEC);
    if (argc == 2 && !strcmp(argv[1], "serve")) serve(); /* until it is ended */
    if (argc == 9 && !strcmp(argv[1], "ask")) return ask(argv + 2);
    return fprintf(stderr, "usage: see the head of load.c\n"), 2;
}

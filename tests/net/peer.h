/* peer.h - the other ends of a proxy under test: a scripted upstream, a raw client, a config source, the proxy in a thread.

   Real sockets on loopback, always port 0, every wait with a deadline. It reads HTTP with a few lines of its own, so that
   a mistake of chaos.h's parser cannot hide itself. Include after chaos.h (the implementation) and check.h. */
#ifndef PEER_H
#define PEER_H

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PEER_MS 5000 /* the deadline of every single wait */

/* ---- time ---- */
static inline long long peer_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (long long)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}
static inline long long peer_ms(void) { return peer_us() / 1000; }
static inline void peer_nap(int ms) { poll(NULL, 0, ms); }

/* Waits until cond holds; a failing check after ms. */
#define PEER_UNTIL(cond, ms)                                    \
    do {                                                        \
        long long peer_until_ = peer_ms() + (ms);               \
        while (!(cond) && peer_ms() < peer_until_) peer_nap(1); \
        CHECK(cond);                                            \
    } while (0)

/* Ends a program that hangs in spite of all deadlines. */
static inline void peer_watchdog(unsigned seconds) { alarm(seconds); }

#define PEER_LOAD(p)     __atomic_load_n(p, __ATOMIC_SEQ_CST)
#define PEER_STORE(p, v) __atomic_store_n(p, v, __ATOMIC_SEQ_CST)
#define PEER_ADD(p, v)   __atomic_add_fetch(p, v, __ATOMIC_SEQ_CST)

static inline long peer_resident_kib(void) {
    char line[256];
    long kib = -1;
    FILE *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f))
        if (sscanf(line, "VmRSS: %ld", &kib) == 1) break;
    if (f) fclose(f);
    return kib;
}

/* ---- what this process holds: to see leaks ---- */
static inline int peer_count_dir(const char *path) {
    DIR *d = opendir(path);
    int n = 0;
    if (!d) return -1;
    while (readdir(d)) n++;
    closedir(d);
    return n - 2;
}
static inline int peer_fds(void) { return peer_count_dir("/proc/self/fd") - 1; } /* less the one that lists them */
static inline int peer_threads(void) { return peer_count_dir("/proc/self/task"); }

/* ---- growing bytes, always NUL-terminated ---- */
typedef struct peer_bytes {
    char *data;
    size_t len, cap;
} peer_bytes;

static inline void peer_add(peer_bytes *b, const void *data, size_t len) {
    if (b->len + len + 1 > b->cap) {
        b->cap = (b->len + len + 1) * 2;
        b->data = (char *)realloc(b->data, b->cap);
        if (!b->data) abort();
    }
    if (len) memcpy(b->data + b->len, data, len);
    b->len += len;
    b->data[b->len] = 0;
}
static inline void peer_adds(peer_bytes *b, const char *text) { peer_add(b, text, strlen(text)); }
static inline void peer_drop(peer_bytes *b, size_t n) {
    memmove(b->data, b->data + n, b->len - n + 1);
    b->len -= n;
}
static inline void peer_free(peer_bytes *b) {
    free(b->data);
    memset(b, 0, sizeof *b);
}
static inline const char *peer_text(const peer_bytes *b) { return b->data ? b->data : ""; }

/* Byte i of every generated body: no period that a buffer size divides. */
static inline unsigned char peer_pattern(size_t i) { return (unsigned char)((i * 31 + i / 251 + i / 65521) & 255); }
static inline void peer_add_pattern(peer_bytes *b, size_t n) {
    size_t i;
    for (i = 0; i < n; i++) {
        unsigned char c = peer_pattern(i);
        peer_add(b, &c, 1);
    }
}
static inline bool peer_is_pattern(const peer_bytes *b, size_t n) {
    size_t i;
    if (b->len != n) return false;
    for (i = 0; i < n; i++)
        if ((unsigned char)b->data[i] != peer_pattern(i)) return false;
    return true;
}
static inline unsigned long long peer_hash(const char *data, size_t len) {
    unsigned long long h = 1469598103934665603ull;
    size_t i;
    for (i = 0; i < len; i++) h = (h ^ (unsigned char)data[i]) * 1099511628211ull;
    return h;
}

/* ---- sockets ---- */
static inline int peer_listen(int *port, int backlog) {
    struct sockaddr_in a;
    socklen_t len = sizeof a;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a) || listen(fd, backlog) || getsockname(fd, (struct sockaddr *)&a, &len)) abort();
    *port = ntohs(a.sin_port);
    return fd;
}

static inline int peer_connect(int port) {
    struct sockaddr_in a;
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons((unsigned short)port);
    if (fd < 0) abort();
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(fd, (struct sockaddr *)&a, sizeof a)) {
        close(fd);
        return -1;
    }
    return fd;
}

/* A port on which nobody listens. */
static inline int peer_dead_port(void) {
    int port, fd = peer_listen(&port, 1);
    close(fd);
    return port;
}

/* Sends all of it; false when the other side is gone or takes nothing for PEER_MS. */
static inline bool peer_send(int fd, const void *data, size_t len) {
    const char *p = (const char *)data;
    while (len) {
        struct pollfd w = {0, POLLOUT, 0};
        ssize_t n = send(fd, p, len, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n > 0) {
            p += n;
            len -= (size_t)n;
            continue;
        }
        if (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) return false;
        w.fd = fd;
        if (poll(&w, 1, PEER_MS) <= 0) return false;
    }
    return true;
}
static inline bool peer_sends(int fd, const char *text) { return peer_send(fd, text, strlen(text)); }

/* Closes with an RST. */
static inline void peer_reset(int fd) {
    struct linger l = {1, 0};
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &l, sizeof l);
    close(fd);
}

/* ---- one side of a connection, and the messages read from it ---- */
typedef enum peer_end {
    PEER_WHOLE, /* a complete message */
    PEER_NONE,  /* closed before its first byte */
    PEER_CUT,   /* closed in the middle: head or body incomplete */
    PEER_RESET, /* RST before the end */
    PEER_LATE,  /* the deadline passed */
    PEER_BAD    /* not HTTP */
} peer_end;

typedef struct peer_conn {
    int fd;
    peer_bytes in; /* read, not yet consumed */
    int ms;        /* deadline of one message; 0 = PEER_MS */
} peer_conn;

typedef struct peer_message {
    peer_end end;
    int status;             /* of a reply */
    bool chunked, to_close; /* how the body was framed */
    peer_bytes head;        /* start line and fields, to the empty line */
    peer_bytes body;        /* decoded */
    peer_bytes trailers;
} peer_message;

static inline void peer_message_free(peer_message *m) {
    peer_free(&m->head);
    peer_free(&m->body);
    peer_free(&m->trailers);
    memset(m, 0, sizeof *m);
}

static inline void peer_dial(peer_conn *c, int port) {
    memset(c, 0, sizeof *c);
    c->fd = peer_connect(port);
    CHECK(c->fd >= 0);
}
static inline void peer_hang_up(peer_conn *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    peer_free(&c->in);
}

/* Reads once into c->in. 1 = got some, 0 = end of stream, -1 = deadline, -2 = reset. */
static inline int peer_fill(peer_conn *c, long long deadline_ms) {
    char buf[65536];
    for (;;) {
        struct pollfd w = {0, POLLIN, 0};
        long long left = deadline_ms - peer_ms();
        ssize_t n = recv(c->fd, buf, sizeof buf, MSG_DONTWAIT);
        if (n > 0) {
            peer_add(&c->in, buf, (size_t)n);
            return 1;
        }
        if (n == 0) return 0;
        if (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR) return -2;
        if (left <= 0) return -1;
        w.fd = c->fd;
        poll(&w, 1, (int)left);
    }
}

/* True when the other side closes or resets within ms without sending anything more. */
static inline bool peer_closes(peer_conn *c, int ms) {
    int r = c->in.len ? 1 : peer_fill(c, peer_ms() + ms);
    return r == 0 || r == -2;
}
static inline bool peer_silent(peer_conn *c, int ms) { return c->in.len == 0 && peer_fill(c, peer_ms() + ms) == -1; }

/* The value of field number `nth` (from 0) with this name, copied; false = none. */
static inline bool peer_field_nth(const peer_bytes *head, const char *name, int nth, char *value, size_t cap) {
    const char *p = peer_text(head);
    size_t n = strlen(name);
    while ((p = strstr(p, "\r\n")) != NULL) {
        size_t len;
        p += 2;
        if (strncasecmp(p, name, n) || p[n] != ':') continue;
        if (nth--) continue;
        p += n + 1;
        while (*p == ' ' || *p == '\t') p++;
        len = strcspn(p, "\r\n");
        while (len && (p[len - 1] == ' ' || p[len - 1] == '\t')) len--;
        snprintf(value, cap, "%.*s", (int)len, p);
        return true;
    }
    return false;
}
static inline const char *peer_field(const peer_bytes *head, const char *name, char *value, size_t cap) {
    return peer_field_nth(head, name, 0, value, cap) ? value : "(none)";
}
static inline int peer_fields(const peer_bytes *head, const char *name) {
    char value[8];
    int n = 0;
    while (peer_field_nth(head, name, n, value, sizeof value)) n++;
    return n;
}

/* CHECKs one field of a head: its value, or with want NULL that there is none. */
#define PEER_FIELD(head, name, want) peer_check_field(head, name, want, __FILE__, __LINE__)
static inline void peer_check_field(const peer_bytes *head, const char *name, const char *want, const char *file, int line) {
    char value[2048];
    check_str(peer_field(head, name, value, sizeof value), want ? want : "(none)", file, line, name);
    if (want) check_int(peer_fields(head, name), 1, file, line, name);
}

/* Needs n bytes in c->in. */
static inline peer_end peer_need(peer_conn *c, size_t n, long long deadline) {
    while (c->in.len < n) {
        int r = peer_fill(c, deadline);
        if (r <= 0) return r == 0 ? PEER_CUT : r == -1 ? PEER_LATE : PEER_RESET;
    }
    return PEER_WHOLE;
}

/* Needs the text `mark` in c->in; *at = the bytes up to its end. */
static inline peer_end peer_need_mark(peer_conn *c, const char *mark, size_t *at, long long deadline) {
    for (;;) {
        size_t i, n = strlen(mark);
        peer_end end;
        for (i = 0; i + n <= c->in.len; i++)
            if (!memcmp(c->in.data + i, mark, n)) {
                *at = i + n;
                return PEER_WHOLE;
            }
        end = peer_need(c, c->in.len + 1, deadline);
        if (end != PEER_WHOLE) return end;
    }
}

static inline long long peer_deadline(const peer_conn *c) { return peer_ms() + (c->ms ? c->ms : PEER_MS); }

static inline peer_end peer_read_head(peer_conn *c, peer_message *m) {
    size_t at = 0;
    peer_message_free(m);
    m->end = peer_need_mark(c, "\r\n\r\n", &at, peer_deadline(c));
    if (m->end == PEER_CUT && !c->in.len) m->end = PEER_NONE;
    if (m->end != PEER_WHOLE) return m->end;
    peer_add(&m->head, c->in.data, at);
    peer_drop(&c->in, at);
    return PEER_WHOLE;
}

static inline peer_end peer_take(peer_conn *c, peer_bytes *to, size_t n, long long deadline) {
    peer_end end = peer_need(c, n, deadline);
    size_t got = c->in.len < n ? c->in.len : n; /* a cut body still shows what came */
    peer_add(to, c->in.data, got);
    if (got) peer_drop(&c->in, got);
    return end;
}

static inline peer_end peer_read_chunks(peer_conn *c, peer_message *m, long long deadline) {
    for (;;) {
        size_t at = 0, size;
        char *stop;
        peer_end end = peer_need_mark(c, "\r\n", &at, deadline);
        if (end != PEER_WHOLE) return end;
        size = (size_t)strtoul(c->in.data, &stop, 16);
        if (stop == c->in.data || (*stop != '\r' && *stop != ';')) return PEER_BAD;
        peer_drop(&c->in, at);
        if (size == 0) break;
        end = peer_take(c, &m->body, size, deadline);
        if (end == PEER_WHOLE) end = peer_need(c, 2, deadline);
        if (end != PEER_WHOLE) return end;
        if (memcmp(c->in.data, "\r\n", 2)) return PEER_BAD;
        peer_drop(&c->in, 2);
    }
    for (;;) {
        size_t at = 0;
        peer_end end = peer_need_mark(c, "\r\n", &at, deadline);
        if (end != PEER_WHOLE) return end;
        if (at > 2) peer_add(&m->trailers, c->in.data, at);
        peer_drop(&c->in, at);
        if (at == 2) return PEER_WHOLE;
    }
}

/* Reads the body that the head announces; to_close: without any framing it runs to the end of the stream. */
static inline peer_end peer_read_body(peer_conn *c, peer_message *m, bool to_close) {
    long long deadline = peer_deadline(c);
    char value[64];
    if (peer_fields(&m->head, "Transfer-Encoding")) {
        m->chunked = true;
        return m->end = peer_read_chunks(c, m, deadline);
    }
    if (peer_field_nth(&m->head, "Content-Length", 0, value, sizeof value))
        return m->end = peer_take(c, &m->body, (size_t)strtoul(value, NULL, 10), deadline);
    if (!to_close) return m->end;
    m->to_close = true;
    for (;;) {
        int r = peer_fill(c, deadline);
        if (r > 0) continue;
        peer_add(&m->body, c->in.data ? c->in.data : "", c->in.len);
        c->in.len = 0;
        return m->end = r == 0 ? PEER_WHOLE : r == -1 ? PEER_LATE : PEER_RESET;
    }
}

static inline peer_end peer_read_request(peer_conn *c, peer_message *m) {
    if (peer_read_head(c, m) != PEER_WHOLE) return m->end;
    return peer_read_body(c, m, false);
}

/* The next reply, interim ones too. method: that of the request (HEAD has no body). */
static inline peer_end peer_read_reply(peer_conn *c, peer_message *m, const char *method) {
    if (peer_read_head(c, m) != PEER_WHOLE) return m->end;
    if (m->head.len < 12 || strncmp(m->head.data, "HTTP/1.", 7)) return m->end = PEER_BAD;
    m->status = atoi(m->head.data + 9);
    if (!strcmp(method, "HEAD") || m->status < 200 || m->status == 204 || m->status == 304) return m->end;
    return peer_read_body(c, m, true);
}

/* Sends a request and reads its reply. The status, or 0 - peer_end when there was no whole reply. */
static inline int peer_ask(peer_conn *c, peer_message *m, const char *request) {
    char method[16];
    snprintf(method, sizeof method, "%.*s", (int)strcspn(request, " "), request);
    peer_message_free(m);
    if (c->fd < 0) return 0 - (int)PEER_NONE;
    (void)!peer_sends(c->fd, request); /* a refused head may be answered before it is all sent */
    peer_read_reply(c, m, method);
    return m->end == PEER_WHOLE ? m->status : 0 - (int)m->end;
}

/* One GET on a connection of its own. */
static inline int peer_get(int port, const char *path, peer_message *m) {
    char request[512];
    peer_conn c;
    int status;
    snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n", path);
    peer_dial(&c, port);
    status = peer_ask(&c, m, request);
    peer_closes(&c, PEER_MS); /* by then its upstream connection is back in the pool */
    peer_hang_up(&c);
    return status;
}

/* ---- the upstream: one thread per connection, the path of a request tells what to do ---- */
#define PEER_CONNS 4096
typedef struct peer_upstream peer_upstream;
typedef struct peer_served {
    peer_upstream *up;
    pthread_t thread;
    int fd, served; /* requests on this connection so far */
    bool reset;     /* end it with an RST */
} peer_served;

struct peer_upstream {
    int fd, port;
    pthread_t thread;
    pthread_mutex_t lock;
    int accepts, open;      /* connections; all these are read with PEER_LOAD */
    int requests, complete; /* heads; heads whose body came whole */
    int last_conn;          /* the connection, counted from 1, of the last request */
    size_t received;        /* bytes: 0 = nothing ever got here */
    bool stopping;
    peer_bytes last;      /* the last request's head */
    peer_bytes raw;       /* what /raw answers */
    bool raw_close;       /* /raw: and closes */
    const char *fallback; /* route of unknown paths, NULL = /echo */
    peer_served conns[PEER_CONNS];
};

static inline void peer_reply(peer_conn *c, const char *method, const char *status, const char *fields, const char *body, size_t len) {
    char head[1024];
    snprintf(head, sizeof head, "HTTP/1.1 %s\r\nServer: peer\r\nContent-Length: %zu\r\n%s\r\n", status, len, fields);
    peer_sends(c->fd, head);
    if (strcmp(method, "HEAD")) peer_send(c->fd, body, len);
}

/* N pattern bytes in chunks of every size from 1 up, with an extension and a trailer. */
static inline void peer_add_chunked(peer_bytes *out, const peer_bytes *body) {
    size_t at = 0, size = 1;
    char line[64];
    while (at < body->len) {
        size_t n = size < body->len - at ? size : body->len - at;
        snprintf(line, sizeof line, "%zx%s\r\n", n, size == 2 ? ";note=\"x\"" : "");
        peer_adds(out, line);
        peer_add(out, body->data + at, n);
        peer_adds(out, "\r\n");
        at += n;
        size = size < 20000 ? size * 2 + 1 : 3;
    }
    peer_adds(out, "0\r\nX-Sum: peer\r\n\r\n");
}

static inline void peer_serve_sized(peer_conn *c, const char *method, const char *how, size_t n) {
    peer_bytes body = {NULL, 0, 0}, out = {NULL, 0, 0};
    peer_add_pattern(&body, n);
    peer_add(&out, "", 0);
    if (!strcmp(how, "length")) {
        peer_reply(c, method, "200 OK", "Content-Type: application/octet-stream\r\n", body.data ? body.data : "", n);
    } else if (!strcmp(how, "chunked")) {
        peer_adds(&out, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
        if (strcmp(method, "HEAD")) peer_add_chunked(&out, &body);
        peer_send(c->fd, out.data, out.len);
    } else {
        peer_adds(&out, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n");
        if (strcmp(method, "HEAD")) peer_add(&out, body.data ? body.data : "", body.len);
        peer_send(c->fd, out.data, out.len);
    }
    peer_free(&body);
    peer_free(&out);
}

/* Sends a request body of known length back while it still comes. */
static inline void peer_serve_mirror(peer_conn *c, size_t n) {
    char head[128];
    snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\n\r\n", n);
    peer_sends(c->fd, head);
    while (n) {
        if (!c->in.len && peer_fill(c, peer_ms() + PEER_MS) <= 0) return;
        if (c->in.len > n) return;
        if (!peer_send(c->fd, c->in.data, c->in.len)) return;
        n -= c->in.len;
        c->in.len = 0;
    }
}

/* All of the request, for a test that looks at what came: the head, the decoded body, the trailers. */
static inline void peer_serve_whole(peer_conn *c, const char *method, const peer_message *m) {
    peer_bytes all = {NULL, 0, 0};
    char fields[64];
    snprintf(fields, sizeof fields, "X-Body-Length: %zu\r\n", m->body.len);
    peer_add(&all, m->head.data, m->head.len);
    peer_add(&all, peer_text(&m->body), m->body.len);
    peer_add(&all, peer_text(&m->trailers), m->trailers.len);
    peer_reply(c, method, "200 OK", fields, all.data, all.len);
    peer_free(&all);
}

static inline void peer_serve_hash(peer_served *s, peer_conn *c, peer_message *m) {
    char text[64];
    if (peer_read_body(c, m, false) != PEER_WHOLE) return;
    PEER_ADD(&s->up->complete, 1);
    snprintf(text, sizeof text, "%zu %016llx", m->body.len, peer_hash(peer_text(&m->body), m->body.len));
    peer_reply(c, "POST", "200 OK", "", text, strlen(text));
}

/* Answers one request; false = hang up. */
static inline bool peer_serve(peer_served *s, peer_conn *c, peer_message *m) {
    peer_upstream *up = s->up;
    char method[16], target[256], value[64];
    const char *path = target;
    sscanf(m->head.data, "%15s %255s", method, target);
    if (up->fallback && strncmp(path, "/raw", 4)) path = up->fallback;
#define PEER_ROUTE(name) (!strncmp(path, name, strlen(name)))
    if (PEER_ROUTE("/hash") || PEER_ROUTE("/continue")) {
        if (PEER_ROUTE("/continue")) peer_sends(c->fd, "HTTP/1.1 100 Continue\r\n\r\n");
        peer_serve_hash(s, c, m);
        return m->end == PEER_WHOLE;
    }
    if (PEER_ROUTE("/mirror")) {
        peer_serve_mirror(c, (size_t)strtoul(peer_field(&m->head, "Content-Length", value, sizeof value), NULL, 10));
        return true;
    }
    if (PEER_ROUTE("/refuse")) { /* answers without the body, as a server may */
        peer_reply(c, method, "417 Expectation Failed", "Connection: close\r\n", "no", 2);
        return false;
    }
    if (peer_read_body(c, m, false) != PEER_WHOLE) return false;
    PEER_ADD(&up->complete, 1);
    if (PEER_ROUTE("/length/")) peer_serve_sized(c, method, "length", (size_t)atoi(path + 8));
    else if (PEER_ROUTE("/chunked/")) peer_serve_sized(c, method, "chunked", (size_t)atoi(path + 9));
    else if (PEER_ROUTE("/close/")) {
        peer_serve_sized(c, method, "close", (size_t)atoi(path + 7));
        return false;
    } else if (PEER_ROUTE("/204")) peer_sends(c->fd, "HTTP/1.1 204 No Content\r\nX-Kind: none\r\n\r\n");
    else if (PEER_ROUTE("/304")) peer_sends(c->fd, "HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nETag: \"a\"\r\n\r\n");
    else if (PEER_ROUTE("/early")) {
        peer_sends(c->fd, "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n");
        peer_reply(c, method, "200 OK", "", "late", 4);
    } else if (PEER_ROUTE("/slow/")) {
        peer_nap(atoi(path + 6));
        peer_reply(c, method, "200 OK", "", "slow", 4);
    } else if (PEER_ROUTE("/silent")) {
        while (peer_fill(c, peer_ms() + PEER_MS) > 0 && !PEER_LOAD(&up->stopping)) c->in.len = 0;
        return false;
    } else if (PEER_ROUTE("/garbage")) {
        peer_sends(c->fd, "lorem ipsum dolor sit amet\r\n\r\n");
        return false;
    } else if (PEER_ROUTE("/half-head")) {
        peer_sends(c->fd, "HTTP/1.1 200 OK\r\nContent-Le");
        return false;
    } else if (PEER_ROUTE("/cut-length")) {
        peer_sends(c->fd, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this");
        return false;
    } else if (PEER_ROUTE("/cut-chunked")) {
        peer_sends(c->fd, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\n");
        return false;
    } else if (PEER_ROUTE("/bad-chunk")) {
        peer_sends(c->fd, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nonly this\r\nnonsense\r\n");
        return true;
    } else if (PEER_ROUTE("/reset-body")) { /* the pause lets the bytes through before the RST discards them */
        peer_sends(c->fd, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nonly this");
        peer_nap(50);
        s->reset = true;
        return false;
    } else if (PEER_ROUTE("/once")) { /* dies without a word at the second request of a connection */
        if (s->served > 1) return false;
        peer_reply(c, method, "200 OK", "", "once", 4);
    } else if (PEER_ROUTE("/die")) return false;
    else if (PEER_ROUTE("/bye")) { /* promises to stay, and leaves */ peer_reply(c, method, "200 OK", "", "bye", 3);
        return false;
    } else if (PEER_ROUTE("/stray"))
        peer_sends(c->fd, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nstray");
    else if (PEER_ROUTE("/whole")) peer_serve_whole(c, method, m);
    else if (PEER_ROUTE("/raw")) {
        bool stay;
        pthread_mutex_lock(&up->lock);
        stay = !up->raw_close;
        peer_send(c->fd, peer_text(&up->raw), up->raw.len);
        pthread_mutex_unlock(&up->lock);
        return stay;
    } else peer_reply(c, method, "200 OK", "Content-Type: text/plain\r\nX-Upstream: peer\r\n", m->head.data, m->head.len);
#undef PEER_ROUTE
    return true;
}

static inline void *peer_serve_conn(void *arg) {
    peer_served *s = (peer_served *)arg;
    peer_upstream *up = s->up;
    peer_conn c = {0, {NULL, 0, 0}, 60000};
    peer_message m;
    memset(&m, 0, sizeof m);
    c.fd = s->fd;
    for (;;) {
        struct pollfd w = {0, POLLIN, 0};
        char peek[65536];
        ssize_t n = 1;
        w.fd = c.fd;
        /* Count first, so that a single byte of a request that should have been refused is seen. */
        if (!c.in.len && (poll(&w, 1, 60000) <= 0 || (n = recv(c.fd, peek, sizeof peek, MSG_PEEK | MSG_DONTWAIT)) <= 0)) break;
        PEER_ADD(&up->received, (size_t)n);
        if (peer_read_head(&c, &m) != PEER_WHOLE) break;
        s->served++;
        pthread_mutex_lock(&up->lock);
        up->last.len = 0;
        peer_add(&up->last, m.head.data, m.head.len);
        pthread_mutex_unlock(&up->lock);
        PEER_STORE(&up->last_conn, (int)(s - up->conns) + 1);
        PEER_ADD(&up->requests, 1);
        if (!peer_serve(s, &c, &m) || strstr(m.head.data, "\r\nConnection: close\r\n")) break;
    }
    peer_message_free(&m);
    peer_free(&c.in);
    /* Lingering: closing over unread bytes would reset what was just sent. */
    if (!s->reset) shutdown(c.fd, SHUT_WR);
    while (!s->reset && peer_fill(&c, peer_ms() + 200) > 0) c.in.len = 0;
    peer_free(&c.in);
    pthread_mutex_lock(&up->lock);
    if (s->reset) peer_reset(s->fd);
    else close(s->fd);
    s->fd = -1;
    pthread_mutex_unlock(&up->lock);
    PEER_ADD(&up->open, -1);
    return NULL;
}

static inline void *peer_accept_loop(void *arg) {
    peer_upstream *up = (peer_upstream *)arg;
    for (;;) {
        int one = 1, fd = accept(up->fd, NULL, NULL), n = up->accepts;
        peer_served *s = &up->conns[n];
        if (fd < 0 && (errno == EINTR || errno == ECONNABORTED)) continue;
        if (fd < 0) return NULL;
        if (n == PEER_CONNS - 1) abort();
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        pthread_mutex_lock(&up->lock);
        s->up = up;
        s->fd = fd;
        PEER_ADD(&up->open, 1);
        if (pthread_create(&s->thread, NULL, peer_serve_conn, s)) abort();
        PEER_ADD(&up->accepts, 1);
        pthread_mutex_unlock(&up->lock);
    }
}

static inline peer_upstream *peer_upstream_start(void) {
    peer_upstream *up = (peer_upstream *)calloc(1, sizeof *up);
    if (!up) abort();
    pthread_mutex_init(&up->lock, NULL);
    up->fd = peer_listen(&up->port, 1024);
    if (pthread_create(&up->thread, NULL, peer_accept_loop, up)) abort();
    return up;
}

static inline void peer_upstream_stop(peer_upstream *up) {
    int i;
    PEER_STORE(&up->stopping, true);
    shutdown(up->fd, SHUT_RDWR);
    pthread_join(up->thread, NULL);
    close(up->fd);
    pthread_mutex_lock(&up->lock);
    for (i = 0; i < up->accepts; i++)
        if (up->conns[i].fd >= 0) shutdown(up->conns[i].fd, SHUT_RDWR);
    pthread_mutex_unlock(&up->lock);
    for (i = 0; i < up->accepts; i++) pthread_join(up->conns[i].thread, NULL);
    pthread_mutex_destroy(&up->lock);
    peer_free(&up->last);
    peer_free(&up->raw);
    free(up);
}

/* A copy of the last request head that came. */
static inline void peer_last(peer_upstream *up, peer_bytes *out) {
    out->len = 0;
    pthread_mutex_lock(&up->lock);
    peer_add(out, peer_text(&up->last), up->last.len);
    pthread_mutex_unlock(&up->lock);
}

static inline void peer_raw(peer_upstream *up, const peer_bytes *raw, bool and_close) {
    pthread_mutex_lock(&up->lock);
    up->raw.len = 0;
    peer_add(&up->raw, peer_text(raw), raw->len);
    up->raw_close = and_close;
    pthread_mutex_unlock(&up->lock);
}

/* ---- a config source that the test turns ---- */
typedef struct peer_source {
    pthread_mutex_t lock;
    char json[4096];
    chaos_result result; /* CHAOS_OK = json, else this error */
    int slow_ms;         /* time one fetch takes */
    int fetches, inside, overlaps;
} peer_source;

static inline chaos_result peer_fetch(void *user, char *buf, size_t cap, chaos_fetched *out, chaos_error *err) {
    peer_source *s = (peer_source *)user;
    chaos_result r;
    if (PEER_ADD(&s->inside, 1) > 1) PEER_ADD(&s->overlaps, 1);
    PEER_ADD(&s->fetches, 1);
    peer_nap(PEER_LOAD(&s->slow_ms));
    pthread_mutex_lock(&s->lock);
    r = s->result;
    out->len = strlen(s->json);
    if (out->len > cap) abort();
    memcpy(buf, s->json, out->len);
    pthread_mutex_unlock(&s->lock);
    if (r && err) snprintf(err->text, sizeof err->text, "the test says so");
    PEER_ADD(&s->inside, -1);
    return r;
}

static inline void peer_source_init(peer_source *s, const char *json) {
    memset(s, 0, sizeof *s);
    pthread_mutex_init(&s->lock, NULL);
    snprintf(s->json, sizeof s->json, "%s", json);
}
static inline void peer_source_set(peer_source *s, const char *json, chaos_result result) {
    pthread_mutex_lock(&s->lock);
    snprintf(s->json, sizeof s->json, "%s", json);
    s->result = result;
    pthread_mutex_unlock(&s->lock);
}

/* ---- the proxy in a thread ---- */
typedef struct peer_proxy {
    chaos *c;
    chaos_proxy_desc desc;
    pthread_t thread;
    char address[128];
    int port, told, done; /* read with PEER_LOAD */
    chaos_result result;
    chaos_error err;
} peer_proxy;

static inline void peer_proxy_listening(void *user, const char *address) {
    peer_proxy *p = (peer_proxy *)user;
    const char *colon = strrchr(address, ':');
    snprintf(p->address, sizeof p->address, "%s", address);
    PEER_ADD(&p->told, 1);
    PEER_STORE(&p->port, colon ? atoi(colon + 1) : -1);
}

static inline void *peer_proxy_main(void *arg) {
    peer_proxy *p = (peer_proxy *)arg;
    p->result = chaos_proxy_run(p->c, &p->desc, &p->err);
    PEER_STORE(&p->done, 1);
    return NULL;
}

/* Starts it; false when it ended before it listened (then it is joined already). */
static inline bool peer_proxy_start(peer_proxy *p, chaos *c, const chaos_proxy_desc *desc) {
    memset(p, 0, sizeof *p);
    p->c = c;
    p->desc = *desc;
    p->desc.listening = peer_proxy_listening;
    p->desc.user = p;
    if (pthread_create(&p->thread, NULL, peer_proxy_main, p)) abort();
    PEER_UNTIL(PEER_LOAD(&p->port) || PEER_LOAD(&p->done), PEER_MS);
    if (PEER_LOAD(&p->port)) return true;
    pthread_join(p->thread, NULL);
    return false;
}

/* Waits for the run to end. A proxy that does not is beyond a failing check: nothing after it could be trusted. */
static inline void peer_proxy_join(peer_proxy *p, int ms) {
    PEER_UNTIL(PEER_LOAD(&p->done), ms);
    if (!PEER_LOAD(&p->done)) {
        printf("FAIL %s: chaos_proxy_run does not return\n", check_state.name);
        fflush(stdout);
        _Exit(1);
    }
    pthread_join(p->thread, NULL);
}

/* ---- the log ---- */
typedef struct peer_log {
    pthread_mutex_t lock;
    peer_bytes text;
    int bad; /* lines that are not exactly one JSON object */
} peer_log;

static inline void peer_log_line(void *user, const char *line, size_t len) {
    peer_log *l = (peer_log *)user;
    bool good = len > 2 && line[0] == '{' && line[len - 2] == '}' && memchr(line, '\n', len) == line + len - 1 &&
                chaos_json_check(line, len - 1, NULL) == CHAOS_OK;
    pthread_mutex_lock(&l->lock);
    if (!good) l->bad++;
    peer_add(&l->text, line, len);
    pthread_mutex_unlock(&l->lock);
}

/* How many lines hold all of these texts; any may be "". */
static inline int peer_logged(peer_log *l, const char *a, const char *b, const char *c) {
    const char *at;
    int n = 0;
    pthread_mutex_lock(&l->lock);
    for (at = peer_text(&l->text); *at; at += strcspn(at, "\n") + 1) {
        char line[4096];
        snprintf(line, sizeof line, "%.*s", (int)strcspn(at, "\n"), at);
        n += strstr(line, a) && strstr(line, b) && strstr(line, c);
    }
    pthread_mutex_unlock(&l->lock);
    return n;
}

/* ---- all of it together ---- */
typedef struct peer_rig {
    peer_upstream *up;
    peer_source source;
    peer_log log;
    chaos *c;
    peer_proxy proxy;
    char upstream_url[64];
} peer_rig;

static inline void peer_rig_config(peer_rig *r, const char *json) {
    chaos_error err;
    memset(&err, 0, sizeof err);
    peer_source_set(&r->source, json, CHAOS_OK);
    if (!CHECK(chaos_refresh(r->c, &err) == CHAOS_OK)) printf("     %s\n", err.text);
}

/* more: an allocator and the like, or NULL. */
static inline void peer_rig_open_with(peer_rig *r, const char *json, const chaos_desc *more) {
    chaos_desc d;
    memset(r, 0, sizeof *r);
    memset(&d, 0, sizeof d);
    if (more) d = *more;
    peer_source_init(&r->source, json);
    pthread_mutex_init(&r->log.lock, NULL);
    d.log = peer_log_line;
    d.log_user = &r->log;
    d.fetch = peer_fetch;
    d.fetch_user = &r->source;
    d.instance = "rig";
    d.service = "test";
    d.quiet = true;
    r->c = chaos_open(&d, NULL);
    CHECK(r->c != NULL);
    peer_rig_config(r, json);
}
static inline void peer_rig_open(peer_rig *r, const char *json) { peer_rig_open_with(r, json, NULL); }

/* An upstream, a handle with this config, and the proxy between. desc may be NULL; its upstream may be set. */
static inline void peer_rig_start_with(peer_rig *r, const char *json, const chaos_proxy_desc *desc, const chaos_desc *more) {
    chaos_proxy_desc d;
    memset(&d, 0, sizeof d);
    if (desc) d = *desc;
    peer_rig_open_with(r, json, more);
    r->up = peer_upstream_start();
    snprintf(r->upstream_url, sizeof r->upstream_url, "http://127.0.0.1:%d", r->up->port);
    if (!d.upstream) d.upstream = r->upstream_url;
    CHECK(peer_proxy_start(&r->proxy, r->c, &d));
    if (!PEER_LOAD(&r->proxy.port)) {
        printf("FAIL %s: no proxy: %s\n", check_state.name, r->proxy.err.text);
        fflush(stdout);
        _Exit(1);
    }
}
static inline void peer_rig_start(peer_rig *r, const char *json, const chaos_proxy_desc *desc) { peer_rig_start_with(r, json, desc, NULL); }

static inline void peer_rig_stop(peer_rig *r) {
    if (PEER_LOAD(&r->proxy.port)) {
        chaos_proxy_stop(r->c);
        peer_proxy_join(&r->proxy, 15000);
        CHECK_INT(r->proxy.result, CHAOS_OK);
    }
    if (r->up) peer_upstream_stop(r->up);
    chaos_close(r->c);
    CHECK_INT(r->log.bad, 0);
    peer_free(&r->log.text);
    pthread_mutex_destroy(&r->log.lock);
    pthread_mutex_destroy(&r->source.lock);
}

static inline chaos_report peer_report(peer_rig *r) {
    chaos_report report;
    memset(&report, 0, sizeof report);
    chaos_stats(r->c, &report);
    return report;
}

/* ---- short names for cases ---- */
#define PORT(rig) PEER_LOAD(&(rig)->proxy.port)
#define GET(path) "GET " path " HTTP/1.1\r\nHost: test\r\n\r\n"

static inline chaos_proxy_desc no_desc(void) {
    chaos_proxy_desc d;
    memset(&d, 0, sizeof d);
    return d;
}
static inline peer_message no_message(void) {
    peer_message m;
    memset(&m, 0, sizeof m);
    return m;
}

/* The run ends by itself or by a stop already given: joins it, so that peer_rig_stop has only the rest to end. */
static inline void peer_rig_join(peer_rig *r, int ms) {
    peer_proxy_join(&r->proxy, ms);
    CHECK_INT(r->proxy.result, CHAOS_OK);
    r->proxy.port = 0;
}

#endif

/* chaos-upstream - the tiny HTTP/1.1 service that `make demo` and the tests put behind chaos-proxy.

   Build:  cc -std=c99 -O2 -pthread -o chaos-upstream upstream.c
   Run:    chaos-upstream [--listen [ADDR:]PORT]        (default 127.0.0.1:0, a free port)
   Prints: chaos-upstream listening on 127.0.0.1:40123

   GET /           a line of text                 GET /bytes/N     N bytes, Content-Length
   GET /healthz    "ok"                           GET /chunked/N   N bytes, chunked
   GET /slow/MS    a line of text after MS ms     POST /echo       the request body comes back

   One thread per connection, keep-alive, nothing else: a service to break, not one to copy. */
#define _POSIX_C_SOURCE 200809L

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_MAX = 16384, BODY_MAX = 1 << 30, BLOCK = 26 * 256, SLOW_MAX = 600000 };

typedef struct client {
    int fd;
    size_t len;      /* bytes in buf */
    size_t head_len; /* of them the head; it stands there as a string */
    bool keep;       /* the connection goes on after this reply */
    bool head_only;  /* the method is HEAD */
    char buf[HEAD_MAX + 1];
} client;

static bool send_all(client *c, const char *data, size_t len) {
    while (len) {
        ssize_t n = send(c->fd, data, len, 0);
        if (n <= 0) return false;
        data += n;
        len -= (size_t)n;
    }
    return true;
}

/* Reads until the blank line; false = the client is gone, or its head is too long for this service. */
static bool read_head(client *c) {
    char *end;
    c->buf[c->len] = 0;
    while (!(end = strstr(c->buf, "\r\n\r\n"))) {
        ssize_t n = recv(c->fd, c->buf + c->len, HEAD_MAX - c->len, 0); /* 0 too when the buffer is full */
        if (n <= 0) return false;
        c->len += (size_t)n;
        c->buf[c->len] = 0;
    }
    c->head_len = (size_t)(end - c->buf) + 4;
    end[2] = 0; /* as a string, the head ends after its last line */
    return true;
}

/* The value of a header as it stands in the head, up to its line's end; NULL = not there. */
static const char *header(const client *c, const char *name) {
    const char *line = strstr(c->buf, "\r\n");
    size_t len = strlen(name);
    for (; line; line = strstr(line + 2, "\r\n")) {
        const char *p = line + 2;
        if (strncasecmp(p, name, len) || p[len] != ':') continue;
        return p + len + 1 + strspn(p + len + 1, " ");
    }
    return NULL;
}

static long number(const char *text, long max) {
    long n = text ? strtol(text, NULL, 10) : 0;
    return n < 0 ? 0 : n > max ? max : n;
}

/* A reply head; length -1 = chunked. A text, if any, goes out in the same packet. */
static bool send_head(client *c, const char *status, long length, const char *text) {
    char out[512], framing[64] = "Transfer-Encoding: chunked";
    int n;
    if (length >= 0) snprintf(framing, sizeof framing, "Content-Length: %ld", length);
    n = snprintf(out, sizeof out, "HTTP/1.1 %s\r\nContent-Type: text/plain\r\n%s\r\n%s\r\n%s", status, framing,
                 c->keep ? "" : "Connection: close\r\n", c->head_only ? "" : text);
    return send_all(c, out, (size_t)n);
}

static bool send_text(client *c, const char *status, const char *text) { return send_head(c, status, (long)strlen(text), text); }

/* N bytes of a pattern that shows a byte lost or doubled: the letters a to z over and over. */
static bool send_bytes(client *c, long count, bool chunked) {
    char block[BLOCK], size[32];
    long done, n;
    if (!send_head(c, "200 OK", chunked ? -1 : count, "")) return false;
    if (c->head_only) return true;
    for (n = 0; n < BLOCK; n++) block[n] = (char)('a' + n % 26);
    for (done = 0; done < count; done += n) {
        n = count - done < BLOCK ? count - done : BLOCK;
        if (chunked && !send_all(c, size, (size_t)snprintf(size, sizeof size, "%lx\r\n", (unsigned long)n))) return false;
        if (!send_all(c, block, (size_t)n) || (chunked && !send_all(c, "\r\n", 2))) return false;
    }
    return !chunked || send_all(c, "0\r\n\r\n", 5);
}

/* Takes the request body off the connection; with echo it goes back as it comes. Keeps pipelined bytes in buf. */
static bool pass_body(client *c, long len, bool echo) {
    size_t at = c->head_len;
    const char *expect = header(c, "expect");
    if (expect && !strncasecmp(expect, "100-", 4) && !send_all(c, "HTTP/1.1 100 Continue\r\n\r\n", 25)) return false;
    if (echo && !send_head(c, "200 OK", len, "")) return false;
    while (len) {
        size_t have = c->len - at, n = have < (size_t)len ? have : (size_t)len;
        if (echo && !send_all(c, c->buf + at, n)) return false;
        len -= (long)n;
        at += n;
        if (len) {
            ssize_t got = recv(c->fd, c->buf, HEAD_MAX, 0);
            if (got <= 0) return false;
            c->len = (size_t)got;
            at = 0;
        }
    }
    memmove(c->buf, c->buf + at, c->len - at);
    c->len -= at;
    return true;
}

static bool answer(client *c, const char *path) {
    if (!strcmp(path, "/")) return send_text(c, "200 OK", "hello from chaos-upstream\n");
    if (!strcmp(path, "/healthz")) return send_text(c, "200 OK", "ok\n");
    if (!strncmp(path, "/bytes/", 7)) return send_bytes(c, number(path + 7, BODY_MAX), false);
    if (!strncmp(path, "/chunked/", 9)) return send_bytes(c, number(path + 9, BODY_MAX), true);
    if (!strncmp(path, "/slow/", 6)) {
        long ms = number(path + 6, SLOW_MAX);
        struct timespec pause = {ms / 1000, ms % 1000 * 1000000};
        nanosleep(&pause, NULL);
        return send_text(c, "200 OK", "that took a while\n");
    }
    return send_text(c, "404 Not Found", "no such path\n");
}

/* One request and its reply; false = the connection ends. */
static bool serve_one(client *c) {
    char method[16], path[256], minor;
    const char *connection;
    long length;
    bool echo;
    if (!read_head(c)) return false;
    if (sscanf(c->buf, "%15s %255s HTTP/1.%c", method, path, &minor) != 3) return false;
    path[strcspn(path, "?")] = 0;
    connection = header(c, "connection");
    c->keep = connection ? !strncasecmp(connection, "keep-alive", 10) : minor == '1';
    c->head_only = !strcmp(method, "HEAD");
    length = header(c, "transfer-encoding") ? -1 : number(header(c, "content-length"), BODY_MAX);
    if (length < 0) c->keep = false;
    if (length < 0) return send_text(c, "411 Length Required", "send a Content-Length\n") && c->keep;
    echo = !strcmp(path, "/echo") && !strcmp(method, "POST");
    if (!pass_body(c, length, echo)) return false;
    return (echo || answer(c, path)) && c->keep;
}

static void *serve(void *arg) {
    client *c = (client *)arg;
    while (serve_one(c)) continue;
    close(c->fd);
    free(c);
    return NULL;
}

static int listen_on(const char *where, struct sockaddr_in *addr) {
    char host[64] = "127.0.0.1";
    const char *colon = strrchr(where, ':');
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    socklen_t len = sizeof *addr;
    if (colon && colon > where) snprintf(host, sizeof host, "%.*s", (int)(colon - where), where);
    memset(addr, 0, sizeof *addr);
    addr->sin_family = AF_INET;
    addr->sin_port = htons((unsigned short)number(colon ? colon + 1 : where, 65535));
    if (fd < 0 || inet_pton(AF_INET, host, &addr->sin_addr) != 1) return -1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)addr, sizeof *addr) || listen(fd, 1024)) return -1;
    return getsockname(fd, (struct sockaddr *)addr, &len) ? -1 : fd;
}

int main(int argc, char **argv) {
    const char *where = argc == 3 && !strcmp(argv[1], "--listen") ? argv[2] : "127.0.0.1:0";
    struct sockaddr_in addr;
    char host[INET_ADDRSTRLEN];
    int fd, one = 1;
    if (argc != 1 && where != argv[2]) return fprintf(stderr, "usage: chaos-upstream [--listen [ADDR:]PORT]\n"), 2;
    signal(SIGPIPE, SIG_IGN); /* a client that hangs up is no reason to end */
    fd = listen_on(where, &addr);
    if (fd < 0) return fprintf(stderr, "chaos-upstream: cannot listen on %s\n", where), 1;
    printf("chaos-upstream listening on %s:%d\n", inet_ntop(AF_INET, &addr.sin_addr, host, sizeof host), ntohs(addr.sin_port));
    fflush(stdout);
    for (;;) {
        pthread_t thread;
        client *c = (client *)calloc(1, sizeof *c);
        if (!c) return fprintf(stderr, "chaos-upstream: out of memory\n"), 1;
        c->fd = accept(fd, NULL, NULL);
        setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (c->fd < 0 || pthread_create(&thread, NULL, serve, c)) {
            close(c->fd);
            free(c);
        } else {
            pthread_detach(thread);
        }
    }
}

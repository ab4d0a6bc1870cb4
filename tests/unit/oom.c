/* oom.c - the n-th allocation fails, for every n: a clear error, no crash, no leak, and the next try works. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"
#include "../check.h"

#include <arpa/inet.h>
#include <netinet/in.h>

#include <sys/resource.h>
#include <sys/socket.h>

/* An allocator whose n-th call fails; 0 = none does. */
typedef struct heap {
    int calls, fail_at, live;
} heap;

static void *heap_alloc(void *user, size_t size) {
    heap *h = (heap *)user;
    void *p = NULL;
    if (__atomic_add_fetch(&h->calls, 1, __ATOMIC_SEQ_CST) != h->fail_at) p = malloc(size);
    if (p) {
        __atomic_add_fetch(&h->live, 1, __ATOMIC_SEQ_CST);
        memset(p, 0xAA, size); /* nobody may count on zeroes */
    }
    return p;
}

static void heap_free(void *user, void *p) {
    if (p) __atomic_sub_fetch(&((heap *)user)->live, 1, __ATOMIC_SEQ_CST);
    free(p);
}

static void heap_desc(heap *h, chaos_desc *d, const char *config) {
    memset(h, 0, sizeof *h);
    memset(d, 0, sizeof *d);
    d->config = config;
    d->quiet = true;
    d->alloc = heap_alloc;
    d->free = heap_free;
    d->alloc_user = h;
}

static int count_fds(void) {
    int fd, count = 0;
    for (fd = 0; fd < 256; fd++) count += fcntl(fd, F_GETFD) >= 0;
    return count;
}

static void case_open(void) {
    static const char *const configs[] = {NULL, "{\"enabled\":true,\"errorRate\":100}", "file:/nonexistent/chaos.json",
                                          "env:CHAOS_TEST_UNSET"};
    size_t i;
    int n, fds = count_fds();
    for (i = 0; i < 4; i++)
        for (n = 1;; n++) {
            heap h;
            chaos_desc d;
            chaos_error err;
            chaos *c;
            memset(&err, 0xAA, sizeof err);
            heap_desc(&h, &d, configs[i]);
            h.fail_at = n;
            c = chaos_open(&d, &err);
            check_where("%s, allocation %d", configs[i] ? configs[i] : "none", n);
            if (h.calls < n) { /* there are no more than n - 1 */
                CHECK(c != NULL && n > 1);
                chaos_close(c);
                CHECK_INT(h.live, 0);
                break;
            }
            CHECK(c == NULL);
            CHECK_INT(err.code, CHAOS_ERR_MEMORY);
            CHECK(err.text[0] != 0);
            CHECK_INT(h.live, 0);
            CHECK_INT(count_fds(), fds);
        }
}

/* The handle that follows a failed open works. */
static void case_open_again(void) {
    heap h;
    chaos_desc d;
    chaos *c;
    chaos_request q;
    memset(&q, 0, sizeof q);
    heap_desc(&h, &d, "{\"enabled\":true,\"errorRate\":100}");
    h.fail_at = 1;
    CHECK(chaos_open(&d, NULL) == NULL); /* err may be NULL */
    c = chaos_open(&d, NULL);
    CHECK(c != NULL);
    CHECK_INT(chaos_decide(c, &q).kind, CHAOS_STATUS);
    chaos_close(c);
    CHECK_INT(h.live, 0);
}

/* No handle, no file descriptors left: a failing system call, not a crash. */
static void case_no_descriptors(void) {
    struct rlimit before, none;
    heap h;
    chaos_desc d;
    chaos_error err;
    chaos *c;
    heap_desc(&h, &d, "{\"enabled\":true}");
    getrlimit(RLIMIT_NOFILE, &before);
    none = before;
    for (none.rlim_cur = 3; none.rlim_cur < 9; none.rlim_cur++) { /* room for none to all of the pipes */
        setrlimit(RLIMIT_NOFILE, &none);
        c = chaos_open(&d, &err);
        setrlimit(RLIMIT_NOFILE, &before);
        check_where("%d descriptors", (int)none.rlim_cur);
        if (!c) CHECK_INT(err.code, CHAOS_ERR_SYSTEM);
        chaos_close(c);
        CHECK_INT(h.live, 0);
    }
}

#ifndef CHAOS_NO_PROXY
typedef struct run {
    chaos *c;
    char address[64];
    pthread_t client;
    bool has_client;
    char reply[256];
} run;

/* One request through the proxy, then stop. Whatever fails ends within the timeouts. */
static void *client(void *arg) {
    static const char request[] = "GET / HTTP/1.0\r\nHost: a\r\n\r\n";
    run *r = (run *)arg;
    struct sockaddr_in to;
    struct timeval limit = {5, 0};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(&to, 0, sizeof to);
    to.sin_family = AF_INET;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port = htons((unsigned short)atoi(strrchr(r->address, ':') + 1));
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    if (connect(fd, (struct sockaddr *)&to, sizeof to) == 0 && send(fd, request, sizeof request - 1, MSG_NOSIGNAL) > 0) {
        ssize_t n = recv(fd, r->reply, sizeof r->reply - 1, 0);
        if (n > 0) r->reply[n] = 0;
    }
    close(fd);
    chaos_proxy_stop(r->c);
    return NULL;
}

static void listening(void *user, const char *address) {
    run *r = (run *)user;
    snprintf(r->address, sizeof r->address, "%s", address);
    r->has_client = pthread_create(&r->client, NULL, client, r) == 0;
}

/* A port that nobody listens on. */
static int closed_port(void) {
    struct sockaddr_in at;
    socklen_t len = sizeof at;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(&at, 0, sizeof at);
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) != 0 || getsockname(fd, (struct sockaddr *)&at, &len) != 0) at.sin_port = 0;
    close(fd);
    return ntohs(at.sin_port);
}

/* The n-th allocation after chaos_open fails, while the proxy runs. False = there were fewer. */
static bool proxy_fails_at(int n) {
    heap h;
    run r;
    chaos_desc d;
    chaos_proxy_desc p;
    chaos_error err;
    chaos_result result;
    char upstream[64];
    bool reached;
    memset(&r, 0, sizeof r);
    memset(&p, 0, sizeof p);
    heap_desc(&h, &d, "{\"enabled\":false}");
    r.c = chaos_open(&d, NULL);
    CHECK(r.c != NULL);
    if (!r.c) return false;
    h.calls = 0;
    h.fail_at = n;
    snprintf(upstream, sizeof upstream, "http://127.0.0.1:%d", closed_port());
    p.upstream = upstream;
    p.drain_timeout = 1000;
    p.listening = listening;
    p.user = &r;
    result = chaos_proxy_run(r.c, &p, &err);
    if (r.has_client) pthread_join(r.client, NULL);
    reached = h.calls >= n;
    if (!reached) {
        CHECK_INT(result, CHAOS_OK);
        CHECK(!strncmp(r.reply, "HTTP/1.1 502", 12) || !strncmp(r.reply, "HTTP/1.0 502", 12));
    } else if (result) {
        CHECK_INT(result, CHAOS_ERR_MEMORY);
        CHECK_INT(err.code, CHAOS_ERR_MEMORY);
    }
    chaos_close(r.c);
    CHECK_INT(h.live, 0);
    return reached;
}

static void case_proxy_run(void) {
    int n = 1, fds = count_fds();
    for (;; n++) {
        check_where("allocation %d of the proxy", n);
        if (!proxy_fails_at(n) || n > 200) break;
        CHECK_INT(count_fds(), fds);
    }
    CHECK(n > 1 && n < 200);
}
#endif

int main(int argc, char **argv) {
    check_begin(argc, argv);
    unsetenv("CHAOS_CONFIG");
    CHECK_RUN(case_open);
    CHECK_RUN(case_open_again);
    CHECK_RUN(case_no_descriptors);
#ifndef CHAOS_NO_PROXY
    CHECK_RUN(case_proxy_run);
#endif
    return check_end();
}

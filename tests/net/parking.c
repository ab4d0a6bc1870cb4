/* The proxy with more connections than threads: the limit, parking, workers that come and go, and its end. */
#define _POSIX_C_SOURCE 200809L
#include <unistd.h>

/* As on a machine with two processors: the numbers below follow from that. */
static long two_processors(int name) { return name == _SC_NPROCESSORS_ONLN ? 2 : sysconf(name); }
#define sysconf two_processors
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

#include "../check.h"
#include "peer.h"

#include <sys/resource.h>

#define SPARE (8 * (int)sysconf(_SC_NPROCESSORS_ONLN)) /* idle workers that stay */
#ifdef CHAOSI_EPOLL
#define PARKS 1
#else
#define PARKS 0
#endif

static long long cpu_ms(void) {
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return ((long long)u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1000 + (u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1000;
}

/* The threads of this process less those of the scripted upstream's connections. */
static int threads_less(const peer_rig *rig) { return peer_threads() - PEER_LOAD(&rig->up->open); }

static void dial_and_ask(peer_rig *rig, peer_conn *c, int n) {
    peer_message m = no_message();
    int i;
    for (i = 0; i < n; i++) {
        peer_dial(&c[i], PORT(rig));
        CHECK_INT(peer_ask(&c[i], &m, GET("/length/1")), 200);
    }
    peer_message_free(&m);
}

static void hang_up_all(peer_conn *c, int n) {
    while (n--) peer_hang_up(&c[n]);
}

/* The next reply of a connection: a 200 with `n` bytes of the pattern. */
static void check_reply(peer_conn *c, size_t n) {
    peer_message m = no_message();
    CHECK_INT(peer_read_reply(c, &m, "GET"), PEER_WHOLE);
    CHECK_INT(m.status, 200);
    CHECK(peer_is_pattern(&m.body, n));
    peer_message_free(&m);
}

/* ---- the connection limit ---- */

#define HOUSE 4
static void case_full_house_waits_and_costs_nothing(void) {
    chaos_proxy_desc d = no_desc();
    long long cpu, since, waited;
    peer_conn in[HOUSE], out[2];
    peer_rig rig;
    int i;
    d.max_connections = HOUSE;
    peer_rig_start(&rig, "{}", &d);
    dial_and_ask(&rig, in, HOUSE);
    CHECK_INT(peer_report(&rig).connections_now, HOUSE);
    since = peer_ms();
    for (i = 0; i < 2; i++) {
        peer_dial(&out[i], PORT(&rig));
        CHECK(peer_sends(out[i].fd, GET("/length/7")));
    }
    cpu = cpu_ms();
    CHECK(peer_silent(&out[0], 250));
    CHECK(peer_silent(&out[1], 0));
    CHECK(cpu_ms() - cpu < 50);
    CHECK_INT(peer_report(&rig).connections, HOUSE);
    for (i = 0; i < 2; i++) { /* one leaves, the first in the queue comes in */
        check_where("%d left", i + 1);
        peer_hang_up(&in[i]);
        check_reply(&out[i], 7);
        if (PARKS) CHECK_INT(peer_logged(&rig.log, "\"action\":\"capped\"", "", ""), 1); /* however often */
    }
    waited = peer_ms() - since;
    check_where("waited %lld ms, counted %llu", waited, peer_report(&rig).capped_ms);
    CHECK(!PARKS || peer_report(&rig).capped_ms >= 170);
    CHECK((long long)peer_report(&rig).capped_ms <= waited + 50);
    CHECK_INT(peer_report(&rig).connections, HOUSE + 2);
    hang_up_all(in + 2, HOUSE - 2);
    hang_up_all(out, 2);
    peer_rig_stop(&rig);
}

/* The limit sets the pace only while somebody waits outside. */
static void case_full_house_without_a_queue_is_not_capped(void) {
    chaos_proxy_desc d = no_desc();
    peer_conn in[HOUSE];
    peer_rig rig;
    int i;
    d.max_connections = HOUSE;
    peer_rig_start(&rig, "{}", &d);
    for (i = 0; i < 5; i++) {
        dial_and_ask(&rig, in, HOUSE);
        peer_nap(20);
        hang_up_all(in, HOUSE);
        PEER_UNTIL(peer_report(&rig).connections_now == 0, PEER_MS);
    }
    CHECK_INT(peer_report(&rig).capped_ms, 0);
    CHECK_INT(peer_logged(&rig.log, "\"action\":\"capped\"", "", ""), 0);
    peer_rig_stop(&rig);
}

static void case_capped_time_begins_with_the_queue(void) {
    chaos_proxy_desc d = no_desc();
    long long since, waited;
    peer_conn in[2], out;
    peer_rig rig;
    d.max_connections = 2;
    peer_rig_start(&rig, "{}", &d);
    dial_and_ask(&rig, in, 2);
    peer_nap(250); /* full, but nobody is kept outside */
    since = peer_ms();
    peer_dial(&out, PORT(&rig));
    CHECK(peer_sends(out.fd, GET("/length/7")));
    CHECK(peer_silent(&out, 100));
    peer_hang_up(&in[0]);
    check_reply(&out, 7);
    waited = peer_ms() - since;
    check_where("waited %lld ms, counted %llu", waited, peer_report(&rig).capped_ms);
    CHECK(!PARKS || peer_report(&rig).capped_ms >= 60);
    CHECK((long long)peer_report(&rig).capped_ms <= waited + 50);
    peer_hang_up(&in[1]);
    peer_hang_up(&out);
    peer_rig_stop(&rig);
}

/* A limit above what the descriptors carry is lowered, and that is told. */
static void case_clamped_limit_is_told(void) {
    chaos_proxy_desc d = no_desc();
    struct rlimit files, few;
    peer_rig rig;
    if (getrlimit(RLIMIT_NOFILE, &files) || (files.rlim_max != RLIM_INFINITY && files.rlim_max < 232)) {
        check_skip("no descriptors to spare");
        return;
    }
    few = files;
    few.rlim_cur = 232;
    if (!CHECK(setrlimit(RLIMIT_NOFILE, &few) == 0)) return;
    d.max_connections = 5000;
    peer_rig_start(&rig, "{}", &d);
    CHECK_INT(peer_logged(&rig.log, "\"action\":\"clamped\"", "\"max_connections\":\"100\"", "\"reason\":\""), 1);
    peer_rig_stop(&rig);
    d.max_connections = 100;
    peer_rig_start(&rig, "{}", &d);
    CHECK_INT(peer_logged(&rig.log, "\"action\":\"clamped\"", "", ""), 0);
    peer_rig_stop(&rig);
    setrlimit(RLIMIT_NOFILE, &files);
}

/* ---- parked connections ---- */

#define MANY 200
static void shuffle(int *order, int n) {
    unsigned roll = 12345;
    int i;
    for (i = 0; i < n; i++) order[i] = i;
    for (i = n - 1; i > 0; i--) {
        int j, was = order[i];
        roll = roll * 1103515245u + 12345u;
        j = (int)((roll >> 8) % (unsigned)(i + 1));
        order[i] = order[j];
        order[j] = was;
    }
}

/* Every third says half a head at first, every third two requests at once. */
static void case_many_parked_connections_need_few_threads(void) {
    static peer_conn c[MANY];
    int before = peer_threads(), order[MANY], i;
    peer_rig rig;
    peer_rig_start(&rig, "{}", NULL);
    dial_and_ask(&rig, c, MANY);
    CHECK_INT(peer_report(&rig).connections_now, MANY);
    check_where("%d threads before, %d now", before, threads_less(&rig));
    CHECK(!PARKS || threads_less(&rig) - before <= SPARE + 6); /* and the run, the refresher, the upstream */
    shuffle(order, MANY);
    for (i = 0; i < MANY; i++)
        if (order[i] % 3 == 0) CHECK(peer_sends(c[order[i]].fd, "GET /length/9 HTTP/1.1\r\nHo"));
    for (i = 0; i < MANY; i++)
        if (order[i] % 3 == 1) CHECK(peer_sends(c[order[i]].fd, GET("/length/10") GET("/chunked/11")));
    for (i = 0; i < MANY; i++)
        if (order[i] % 3 == 2) CHECK(peer_sends(c[order[i]].fd, GET("/length/12")));
    for (i = 0; i < MANY; i++) { /* all but the half heads are served meanwhile */
        check_where("connection %d", order[i]);
        if (order[i] % 3 == 1) check_reply(&c[order[i]], 10), check_reply(&c[order[i]], 11);
        if (order[i] % 3 == 2) check_reply(&c[order[i]], 12);
    }
    for (i = 0; i < MANY; i++)
        if (order[i] % 3 == 0) CHECK(peer_sends(c[order[i]].fd, "st: test\r\n\r\n"));
    for (i = 0; i < MANY; i++)
        if (order[i] % 3 == 0) check_reply(&c[order[i]], 9);
    CHECK_INT(peer_report(&rig).connections, MANY);
    hang_up_all(c, MANY);
    PEER_UNTIL(peer_report(&rig).connections_now == 0, PEER_MS);
    peer_rig_stop(&rig);
}

static void case_parked_connections_end_with_their_clients(void) {
    peer_conn c[50];
    peer_rig rig;
    int i;
    peer_rig_start(&rig, "{}", NULL);
    dial_and_ask(&rig, c, 50);
    for (i = 0; i < 40; i++) {
        if (i % 3 == 0) shutdown(c[i].fd, SHUT_WR); /* it will ask no more, but is still there */
        else if (i % 3 == 1) peer_reset(c[i].fd), c[i].fd = -1;
        else peer_hang_up(&c[i]);
    }
    PEER_UNTIL(peer_report(&rig).connections_now == 10, PEER_MS);
    for (i = 0; i < 40; i += 3) CHECK(peer_closes(&c[i], PEER_MS));
    for (i = 40; i < 50; i++) {
        CHECK(peer_sends(c[i].fd, GET("/length/3")));
        check_reply(&c[i], 3);
    }
    hang_up_all(c, 50);
    peer_rig_stop(&rig);
}

/* Four requests in two pieces, cut at every byte: the second piece comes while the first one is read or served. */
static void case_pipelining_cut_at_every_byte(void) {
    static const char all[] =
        GET("/slow/2") "POST /length/2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello"
                       "POST /length/3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" GET("/length/4");
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    size_t cut;
    peer_rig_start(&rig, "{}", NULL);
    dial_and_ask(&rig, &c, 1);
    for (cut = 1; cut < sizeof all - 1 && !check_state.bad; cut++) {
        check_where("cut at %zu", cut);
        CHECK(peer_send(c.fd, all, cut));
        peer_nap(1);
        CHECK(peer_send(c.fd, all + cut, sizeof all - 1 - cut));
        CHECK_INT(peer_read_reply(&c, &m, "GET"), PEER_WHOLE);
        CHECK_STR(peer_text(&m.body), "slow");
        check_reply(&c, 2);
        check_reply(&c, 3);
        check_reply(&c, 4);
    }
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* A body of `n` bytes and a request behind it, all at once, on a connection that was parked before. */
static void check_behind_body(peer_conn *c, bool chunked, size_t n, int status) {
    peer_bytes out = {NULL, 0, 0}, body = {NULL, 0, 0};
    peer_message m = no_message();
    char head[128];
    check_where("%s %zu, %d", chunked ? "chunked" : "length", n, status);
    peer_add_pattern(&body, n);
    snprintf(head, sizeof head, "POST /hash HTTP/1.1\r\nHost: a\r\nContent-Length: %zu\r\n\r\n", n);
    peer_adds(&out, chunked ? "POST /hash HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" : head);
    if (chunked) peer_add_chunked(&out, &body);
    else peer_add(&out, body.data, n);
    peer_adds(&out, GET("/length/5"));
    CHECK(peer_send(c->fd, out.data, out.len));
    CHECK_INT(peer_read_reply(c, &m, "POST"), PEER_WHOLE);
    CHECK_INT(m.status, status);
    check_reply(c, 5);
    CHECK(peer_sends(c->fd, GET("/length/6"))); /* and in step afterwards */
    check_reply(c, 6);
    peer_free(&out);
    peer_free(&body);
    peer_message_free(&m);
}

/* More connections than a worker waits for in its own: then it looks no further than it must. */
typedef struct others {
    peer_conn *c;
    int n;
} others;
static others others_enter(peer_rig *rig, bool many) {
    others o;
    o.n = many ? SPARE + 2 : 0;
    o.c = (peer_conn *)calloc((size_t)SPARE + 2, sizeof *o.c);
    if (!o.c) abort();
    dial_and_ask(rig, o.c, o.n);
    return o;
}
static void others_leave(others o) {
    hang_up_all(o.c, o.n);
    free(o.c);
}

static void check_behind_bodies(bool many) {
    static const size_t sizes[] = {1, 5000, 16300, 17000, 20000, 40000, 60000, 65536, 65537, 100000};
    static const char *const configs[] = {
        "{}", "{\"enabled\":true,\"errorRate\":100,\"match\":{\"methods\":[\"POST\"]},\"expiresAt\":\"never\"}"};
    size_t i, mode, chunked;
    for (mode = 0; mode < 2; mode++) {
        others o;
        peer_rig rig;
        peer_rig_start(&rig, configs[mode], NULL);
        o = others_enter(&rig, many);
        for (i = 0; i < sizeof sizes / sizeof *sizes && !check_state.bad; i++)
            for (chunked = 0; chunked < 2 && !check_state.bad; chunked++) {
                peer_conn c;
                if (mode && sizes[i] > 60000) continue; /* such a body is not read, the connection closes */
                dial_and_ask(&rig, &c, 1);
                peer_nap(5); /* so that it parks: each way must do, this one is the harder */
                c.ms = 2000;
                check_behind_body(&c, chunked != 0, sizes[i], mode ? 503 : 200);
                peer_hang_up(&c);
            }
        others_leave(o);
        peer_rig_stop(&rig);
    }
}
static void case_requests_behind_a_body_are_not_forgotten(void) {
    check_behind_bodies(false);
    check_behind_bodies(true);
}

/* What one read takes ends exactly between two requests: the rest is still to be read. */
static void check_behind_full_buffer(bool many) {
    others o;
    chaos_proxy_desc d = no_desc();
    peer_bytes out = {NULL, 0, 0};
    peer_rig rig;
    peer_conn c;
    int i;
    d.head_limit = 1024;
    peer_rig_start(&rig, "{}", &d);
    o = others_enter(&rig, many);
    dial_and_ask(&rig, &c, 1);
    peer_nap(5);
    for (i = 1; i <= 8; i++) {
        char request[513];
        int n = snprintf(request, sizeof request, "GET /length/%d HTTP/1.1\r\nHost: a\r\nX-Fill: ", i);
        memset(request + n, 'x', sizeof request - 5 - (size_t)n);
        memcpy(request + sizeof request - 5, "\r\n\r\n", 5);
        peer_add(&out, request, 512);
    }
    CHECK(peer_send(c.fd, out.data, out.len));
    c.ms = 2000;
    for (i = 1; i <= 8 && !check_state.bad; i++) {
        check_where("request %d", i);
        check_reply(&c, (size_t)i);
    }
    peer_hang_up(&c);
    peer_free(&out);
    others_leave(o);
    peer_rig_stop(&rig);
}
static void case_requests_behind_a_full_buffer_are_not_forgotten(void) {
    check_behind_full_buffer(false);
    check_behind_full_buffer(true);
}

/* The end of a client's sending that came with its request: it gets its reply, and the connection ends at once. */
static void case_end_behind_a_request_is_not_forgotten(void) {
    int round;
    for (round = 0; round < 40 && !check_state.bad; round++) {
        peer_rig rig;
        peer_conn c;
        others o;
        peer_rig_start(&rig, "{}", NULL);
        o = others_enter(&rig, round % 2 != 0);
        dial_and_ask(&rig, &c, 1);
        peer_nap(5);
        CHECK(peer_sends(c.fd, GET("/length/9")));
        shutdown(c.fd, SHUT_WR);
        check_reply(&c, 9);
        CHECK(peer_closes(&c, 2000));
        peer_hang_up(&c);
        others_leave(o);
        peer_rig_stop(&rig);
    }
}

typedef struct eager {
    int port, rounds, good;
    unsigned roll;
} eager;

/* Each request follows at the first byte of the reply before it, or some microseconds later. */
static void *eager_client(void *arg) {
    eager *e = (eager *)arg;
    peer_message m = no_message();
    peer_conn c;
    int i;
    peer_dial(&c, e->port);
    CHECK(peer_sends(c.fd, GET("/length/40")));
    for (i = 0; i < e->rounds; i++) {
        long long until;
        if (!CHECK(c.in.len || peer_fill(&c, peer_ms() + PEER_MS) == 1)) break;
        e->roll = e->roll * 1103515245u + 12345u;
        for (until = peer_us() + (e->roll >> 16) % 40; e->roll & 0x8000 && peer_us() < until;) {}
        if (i + 1 < e->rounds) peer_sends(c.fd, GET("/length/40"));
        if (!CHECK_INT(peer_read_reply(&c, &m, "GET"), PEER_WHOLE)) break;
        e->good += m.status == 200 && peer_is_pattern(&m.body, 40);
    }
    peer_hang_up(&c);
    peer_message_free(&m);
    return NULL;
}

#define EAGER 4
static void case_next_request_while_the_reply_is_sent(void) {
    pthread_t threads[EAGER];
    eager e[EAGER];
    peer_rig rig;
    unsigned i;
    peer_rig_start(&rig, "{}", NULL);
    for (i = 0; i < EAGER; i++) {
        e[i].port = PORT(&rig);
        e[i].rounds = 2000;
        e[i].good = 0;
        e[i].roll = i + 1;
        if (pthread_create(&threads[i], NULL, eager_client, &e[i])) abort();
    }
    for (i = 0; i < EAGER; i++) {
        pthread_join(threads[i], NULL);
        CHECK_INT(e[i].good, 2000);
    }
    peer_rig_stop(&rig);
}

/* ---- workers ---- */

#define CROWD 300
/* That many requests at once, each of them held for 400 ms. */
static void check_crowd(peer_rig *rig, const char *request) {
    static peer_conn c[CROWD];
    peer_message m = no_message();
    long long start = peer_ms();
    int i;
    for (i = 0; i < CROWD; i++) {
        peer_dial(&c[i], PORT(rig));
        CHECK(peer_sends(c[i].fd, request));
    }
    for (i = 0; i < CROWD; i++) {
        CHECK_INT(peer_read_reply(&c[i], &m, "GET"), PEER_WHOLE);
        CHECK_INT(m.status, 200);
        peer_hang_up(&c[i]);
    }
    check_where("%lld ms", peer_ms() - start);
    CHECK(peer_ms() - start >= 330 && peer_ms() - start < 1500); /* in turns of 64: 2 s */
    peer_message_free(&m);
}

static void case_workers_come_when_needed_and_go(void) {
    int before = peer_threads();
    peer_rig rig;
    peer_rig_start(&rig, "{}", NULL);
    check_crowd(&rig, GET("/slow/400"));
    peer_rig_config(&rig, "{\"enabled\":true,\"latency\":400,\"expiresAt\":\"never\"}");
    check_crowd(&rig, GET("/length/1"));
    check_where("threads");
    PEER_UNTIL(threads_less(&rig) - before <= SPARE + 6, 5000);
    peer_rig_stop(&rig);
}

/* An allocator that gives so many blocks more, and no other. */
typedef struct rationed {
    int left, held;
} rationed;
static void *rationed_alloc(void *user, size_t size) {
    rationed *r = (rationed *)user;
    if (PEER_ADD(&r->left, -1) < 0) return NULL;
    PEER_ADD(&r->held, 1);
    return malloc(size);
}
static void rationed_free(void *user, void *block) {
    if (block) PEER_ADD(&((rationed *)user)->held, -1);
    free(block);
}

static void case_without_new_workers_requests_wait(void) {
    rationed ration = {1000, 0};
    chaos_desc more;
    peer_rig rig;
    peer_conn c[40];
    int workers, i;
    memset(&more, 0, sizeof more);
    more.alloc = rationed_alloc;
    more.free = rationed_free;
    more.alloc_user = &ration;
    peer_rig_open_with(&rig, "{}", &more);
    rig.up = peer_upstream_start();
    snprintf(rig.upstream_url, sizeof rig.upstream_url, "http://127.0.0.1:%d", rig.up->port);
    for (workers = -1; workers <= 3; workers++) {
        chaos_proxy_desc d = no_desc();
        d.upstream = rig.upstream_url;
        check_where("%d workers", workers);
        PEER_STORE(&ration.left, workers + 1);
        if (workers < 1) {
            CHECK_INT(chaos_proxy_run(rig.c, &d, NULL), CHAOS_ERR_MEMORY);
            continue;
        }
        CHECK(peer_proxy_start(&rig.proxy, rig.c, &d));
        for (i = 0; i < 40; i++) {
            peer_dial(&c[i], PORT(&rig));
            CHECK(peer_sends(c[i].fd, i % 2 ? GET("/chunked/3") : GET("/length/3")));
        }
        for (i = 0; i < 40; i++) {
            check_reply(&c[i], 3);
            if (!PARKS) peer_hang_up(&c[i]); /* its worker stays with it */
        }
        PEER_STORE(&ration.left, 1000); /* from now on they come */
        for (i = 0; PARKS && i < 40; i++) CHECK(peer_sends(c[i].fd, GET("/length/4")));
        for (i = 0; PARKS && i < 40; i++) check_reply(&c[i], 4);
        hang_up_all(c, 40);
        chaos_proxy_stop(rig.c);
        peer_rig_join(&rig, PEER_MS);
    }
    peer_rig_stop(&rig);
    CHECK_INT(PEER_LOAD(&ration.held), 0);
}

/* ---- the end ---- */

#define KINDS 8
static const char *const kinds[KINDS] = {
    "",                                                                         /* fresh */
    GET("/length/1"),                                                           /* parked */
    "GET /length/1 HTTP/1.1\r\nHo",                                             /* in its head */
    "POST /hash HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhell",          /* in its body */
    GET("/silent/delayed"),                                                     /* delayed, and then no reply comes */
    GET("/hanging"),                                                            /* in a hang */
    GET("/silent/asked"),                                                       /* waits for a reply */
    "GET /raw HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n" /* in a tunnel */
};
#define STOP_CONFIG                                                                                                                        \
    "{\"enabled\":true,\"expiresAt\":\"never\",\"rules\":[{\"name\":\"d\",\"match\":{\"paths\":[\"/silent/delayed\"]},\"latency\":40000}," \
    "{\"name\":\"h\",\"match\":{\"paths\":[\"/hanging\"]},\"errorRate\":100,\"errorMode\":\"hang\"}]}"

static void stop_in_the_middle(int drain, int each) {
    static peer_conn c[KINDS * 8];
    peer_bytes upgrade = {NULL, 0, 0};
    chaos_proxy_desc d = no_desc();
    long long start;
    peer_rig rig;
    int i;
    d.drain_timeout = drain;
    peer_rig_start(&rig, STOP_CONFIG, &d);
    peer_adds(&upgrade, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n");
    peer_raw(rig.up, &upgrade, false);
    for (i = 0; i < KINDS * each; i++) {
        peer_dial(&c[i], PORT(&rig));
        CHECK(peer_sends(c[i].fd, kinds[i % KINDS]));
    }
    for (i = 0; i < KINDS * each; i++)
        if (i % KINDS == 1 || i % KINDS == 7) CHECK(peer_need(&c[i], 40, peer_ms() + PEER_MS) == PEER_WHOLE);
    PEER_UNTIL((int)peer_report(&rig).waiting == 2 * each && PEER_LOAD(&rig.up->requests) == 4 * each, PEER_MS);
    CHECK_INT(peer_report(&rig).connections_now, KINDS * each);
    start = peer_ms();
    chaos_proxy_stop(rig.c);
    peer_rig_join(&rig, 15000);
    check_where("drain %d, it took %lld ms", drain, peer_ms() - start);
    CHECK(peer_ms() - start <= (drain > 0 ? drain : 0) + 300); /* promised: 200 */
    CHECK_INT(peer_report(&rig).connections_now, 0);
    hang_up_all(c, KINDS * each);
    peer_free(&upgrade);
    peer_rig_stop(&rig);
}

static void case_stop_in_the_middle_of_everything(void) {
    int fds = peer_fds(), threads = peer_threads();
    stop_in_the_middle(250, 8);
    stop_in_the_middle(20, 3);
    stop_in_the_middle(-1, 8);
    PEER_UNTIL(peer_threads() == threads, 1000); /* joined threads may linger in /proc for a moment */
    CHECK_INT(peer_fds(), fds);
}

/* Clients that connect, ask, half ask or leave just when the run begins or ends. */
static void case_twenty_quick_rounds(void) {
    int fds = peer_fds(), threads = peer_threads(), round, i;
    chaos_proxy_desc d = no_desc();
    peer_conn c[4];
    peer_rig rig;
    peer_rig_open(&rig, "{}");
    rig.up = peer_upstream_start();
    snprintf(rig.upstream_url, sizeof rig.upstream_url, "http://127.0.0.1:%d", rig.up->port);
    d.upstream = rig.upstream_url;
    d.drain_timeout = 100;
    for (round = 0; round < 20; round++) {
        peer_message m = no_message();
        check_where("round %d", round);
        if (round % 5 == 4) chaos_proxy_stop(rig.c); /* before the run, or while it begins */
        if (!CHECK(peer_proxy_start(&rig.proxy, rig.c, &d) || round % 5 == 4)) break;
        for (i = 0; i < 4; i++) c[i].fd = -1, memset(&c[i].in, 0, sizeof c[i].in), c[i].ms = 0;
        for (i = 0; i < round % 5; i++)
            if ((c[i].fd = peer_connect(PORT(&rig))) >= 0 && i < 2) (void)!peer_sends(c[i].fd, i ? "GET / HT" : GET("/length/1"));
        if (round % 5 == 3) CHECK(peer_read_reply(&c[0], &m, "GET") == PEER_WHOLE);
        chaos_proxy_stop(rig.c);
        peer_rig_join(&rig, PEER_MS);
        hang_up_all(c, 4);
        peer_message_free(&m);
    }
    peer_rig_stop(&rig);
    PEER_UNTIL(peer_threads() == threads, 1000);
    CHECK_INT(peer_fds(), fds);
}

int main(int argc, char **argv) {
    check_begin(argc, argv);
    peer_watchdog(180);
    CHECK_RUN(case_full_house_waits_and_costs_nothing);
    CHECK_RUN(case_full_house_without_a_queue_is_not_capped);
    CHECK_RUN(case_capped_time_begins_with_the_queue);
    CHECK_RUN(case_clamped_limit_is_told);
    CHECK_RUN(case_many_parked_connections_need_few_threads);
    CHECK_RUN(case_parked_connections_end_with_their_clients);
    CHECK_RUN(case_pipelining_cut_at_every_byte);
    CHECK_RUN(case_requests_behind_a_body_are_not_forgotten);
    CHECK_RUN(case_requests_behind_a_full_buffer_are_not_forgotten);
    CHECK_RUN(case_end_behind_a_request_is_not_forgotten);
    CHECK_RUN(case_next_request_while_the_reply_is_sent);
    CHECK_RUN(case_workers_come_when_needed_and_go);
    CHECK_RUN(case_without_new_workers_requests_wait);
    CHECK_RUN(case_stop_in_the_middle_of_everything);
    CHECK_RUN(case_twenty_quick_rounds);
    return check_end();
}

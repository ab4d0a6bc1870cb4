/* The proxy with a resolver and a clock that the test turns, and an epoll_ctl that takes its time: names that move, what is told
   once a minute, and what happens while a connection is parked. */
#define _POSIX_C_SOURCE 200809L
#include <netdb.h>
#include <time.h>
#ifdef __linux__
#include <sys/epoll.h>
static int slow_epoll_ctl(int set, int op, int fd, struct epoll_event *e);
#define epoll_ctl slow_epoll_ctl
#endif

static int fake_getaddrinfo(const char *host, const char *port, const struct addrinfo *hints, struct addrinfo **out);
static void fake_freeaddrinfo(struct addrinfo *list);
static int fake_clock_gettime(clockid_t id, struct timespec *t);
#define getaddrinfo   fake_getaddrinfo
#define freeaddrinfo  fake_freeaddrinfo
#define clock_gettime fake_clock_gettime
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"
#undef getaddrinfo
#undef freeaddrinfo
#undef clock_gettime
#undef epoll_ctl

#include "../check.h"
#include "peer.h"

/* ---- the fakes ---- */

#define MOVING "moving.example"
static struct {
    pthread_mutex_t lock;
    int ports[4], count; /* where MOVING is: 127.0.0.1 with these ports; 0 = it cannot be resolved */
    int slow_ms, inside, calls;
    int slow_watch_ms; /* after an epoll_ctl: what it asked for is told to others before the caller goes on */
    long long skew;    /* seconds by which every clock is ahead */
} fake = {PTHREAD_MUTEX_INITIALIZER, {0}, 0, 0, 0, 0, 0, 0};

typedef struct fake_entry {
    struct addrinfo info; /* first, so that the list is the block */
    struct sockaddr_in addr;
} fake_entry;

static int fake_getaddrinfo(const char *host, const char *port, const struct addrinfo *hints, struct addrinfo **out) {
    fake_entry *list;
    int i, count;
    if (strcmp(host, MOVING)) return getaddrinfo(host, port, hints, out);
    PEER_ADD(&fake.calls, 1);
    PEER_ADD(&fake.inside, 1);
    peer_nap(PEER_LOAD(&fake.slow_ms));
    PEER_ADD(&fake.inside, -1);
    list = (fake_entry *)calloc(4, sizeof *list);
    if (!list) abort();
    pthread_mutex_lock(&fake.lock);
    count = fake.count;
    for (i = 0; i < count; i++) {
        list[i].addr.sin_family = AF_INET;
        list[i].addr.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        list[i].addr.sin_port = htons((unsigned short)fake.ports[i]);
        list[i].info.ai_family = AF_INET;
        list[i].info.ai_socktype = SOCK_STREAM;
        list[i].info.ai_addrlen = sizeof list[i].addr;
        list[i].info.ai_addr = (struct sockaddr *)(void *)&list[i].addr;
        list[i].info.ai_flags = 0x5a5a; /* by which it is known again */
        if (i + 1 < count) list[i].info.ai_next = &list[i + 1].info;
    }
    pthread_mutex_unlock(&fake.lock);
    *out = &list->info;
    if (!count) free(list);
    return count ? 0 : EAI_AGAIN;
}

static void fake_freeaddrinfo(struct addrinfo *list) {
    if (list->ai_flags == 0x5a5a) free(list);
    else freeaddrinfo(list);
}

static int fake_clock_gettime(clockid_t id, struct timespec *t) {
    int r = clock_gettime(id, t);
    t->tv_sec += (time_t)PEER_LOAD(&fake.skew);
    return r;
}

#ifdef __linux__
static int slow_epoll_ctl(int set, int op, int fd, struct epoll_event *e) {
    int r = epoll_ctl(set, op, fd, e);
    if (PEER_LOAD(&fake.slow_watch_ms)) peer_nap(PEER_LOAD(&fake.slow_watch_ms));
    return r;
}
#endif

static void lives_at(int count, int a, int b, int c) {
    pthread_mutex_lock(&fake.lock);
    fake.ports[0] = a, fake.ports[1] = b, fake.ports[2] = c;
    fake.count = count;
    pthread_mutex_unlock(&fake.lock);
}

static void later(int seconds) { PEER_ADD(&fake.skew, seconds); }

/* ---- names ---- */

/* A rig whose upstream has a name; `first` = the port behind it at first, 0 = the rig's upstream. */
static void start_named(peer_rig *rig, int first) {
    chaos_proxy_desc d = no_desc();
    PEER_STORE(&fake.slow_ms, 0);
    peer_rig_open(rig, "{}");
    rig->up = peer_upstream_start();
    lives_at(1, first ? first : rig->up->port, 0, 0);
    d.upstream = "http://" MOVING ":1";
    CHECK(peer_proxy_start(&rig->proxy, rig->c, &d));
}

/* It looks every 30 s, from when its thread began: a first jump may have come before that. */
static void until_it_looks_up(void) {
    int calls = PEER_LOAD(&fake.calls), jump;
    for (jump = 0; jump < 4 && PEER_LOAD(&fake.calls) == calls; jump++) {
        long long until = peer_ms() + 1500; /* it looks at its clock once a second */
        later(31);
        while (PEER_LOAD(&fake.calls) == calls && peer_ms() < until) peer_nap(1);
    }
    CHECK(PEER_LOAD(&fake.calls) > calls);
}

static int resolver_lines(peer_rig *rig) {
    return peer_logged(&rig->log, "\"action\":\"resolver\"", "\"upstream\":\"" MOVING ":1\"", "\"reason\":\"resolve " MOVING);
}

static void case_name_that_moves_is_followed(void) {
    peer_upstream *second = peer_upstream_start();
    peer_message m = no_message();
    long long start;
    peer_rig rig;
    start_named(&rig, 0);
    CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200);
    CHECK_INT(PEER_LOAD(&rig.up->requests), 1);
    PEER_FIELD(&rig.up->last, "Host", "test");
    lives_at(1, second->port, 0, 0);
    peer_upstream_stop(rig.up);
    rig.up = NULL;
    start = peer_ms();
    CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 502); /* it learns by failing */
    PEER_UNTIL(peer_get(PORT(&rig), "/length/5", &m) == 200, 3000);
    check_where("%lld ms", peer_ms() - start);
    CHECK(peer_ms() - start < 2500);
    CHECK(PEER_LOAD(&second->requests) >= 1);
    CHECK_INT(resolver_lines(&rig), 0);
    peer_message_free(&m);
    peer_rig_stop(&rig);
    peer_upstream_stop(second);
}

static void case_last_address_is_kept_while_the_resolver_fails(void) {
    peer_message m = no_message();
    int round;
    peer_rig rig;
    start_named(&rig, 0);
    for (round = 1; round <= 2; round++) { /* it fails, and fails again */
        check_where("round %d", round);
        lives_at(0, 0, 0, 0);
        until_it_looks_up();
        PEER_UNTIL(resolver_lines(&rig) == 1, 1000);
        CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200);
        CHECK_INT(resolver_lines(&rig), 1);
    }
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_addresses_are_tried_in_order(void) {
    int dead = peer_dead_port(), calls = PEER_LOAD(&fake.calls);
    peer_upstream *second = peer_upstream_start();
    peer_message m = no_message();
    chaos_proxy_desc d = no_desc();
    peer_rig rig;
    peer_rig_open(&rig, "{}");
    rig.up = peer_upstream_start();
    lives_at(3, dead, rig.up->port, second->port);
    d.upstream = "http://" MOVING ":1";
    CHECK(peer_proxy_start(&rig.proxy, rig.c, &d));
    CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200);
    CHECK_INT(PEER_LOAD(&rig.up->requests), 1);
    peer_upstream_stop(rig.up);
    rig.up = NULL;
    CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200); /* and the third, without a look-up */
    CHECK_INT(PEER_LOAD(&second->requests), 1);
    CHECK_INT(PEER_LOAD(&fake.calls), calls + 1);
    CHECK_INT(peer_report(&rig).upstream_errors, 0);
    peer_message_free(&m);
    peer_rig_stop(&rig);
    peer_upstream_stop(second);
}

/* The one that answered stays the first, whatever order the resolver prefers. */
static void case_address_that_answers_is_kept_first(void) {
    int dead = peer_dead_port(), on = 1, other = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in a;
    peer_message m = no_message();
    peer_rig rig;
    start_named(&rig, 0);
    lives_at(2, dead, rig.up->port, 0);
    until_it_looks_up();
    CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200);
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons((unsigned short)dead);
    setsockopt(other, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    CHECK(bind(other, (struct sockaddr *)(void *)&a, sizeof a) == 0 && listen(other, 8) == 0);
    until_it_looks_up();
    peer_nap(20);
    CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200);
    CHECK(!chaosi_readable(other)); /* it would be dialled now */
    close(other);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_slow_resolver_delays_no_request(void) {
    peer_message m = no_message();
    long long start;
    peer_rig rig;
    int n = 0;
    start_named(&rig, 0);
    PEER_STORE(&fake.slow_ms, 500);
    until_it_looks_up();
    start = peer_ms();
    while (PEER_LOAD(&fake.inside) && n < 20) {
        CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200);
        n++;
    }
    CHECK_INT(n, 20); /* all of them while it was still inside */
    CHECK(peer_ms() - start < 500);
    PEER_STORE(&fake.slow_ms, 0);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_addresses_need_no_resolver(void) {
    int before = peer_threads(), threads;
    peer_message m = no_message();
    peer_rig rig;
    peer_rig_start(&rig, "{}", NULL);               /* 127.0.0.1 */
    PEER_UNTIL(peer_threads() == before + 4, 1000); /* the upstream, the refresher, the run, one worker */
    threads = peer_threads();
    CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200);
    peer_rig_stop(&rig);
    PEER_UNTIL(peer_threads() == before, 1000);
    start_named(&rig, 0);
    PEER_UNTIL(peer_threads() == threads + 1, 1000);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* ---- refusals ---- */

static const struct refusal {
    const char *head, *path; /* the one or the other */
    int status, times;
    const char *action, *reason;
} refusals[] = {
    {"GET / HTTP/1.1\r\nHost: a\r\nX : b\r\n\r\n", NULL, 400, 20, "rejected", "the request is not valid HTTP"},
    {"GET / HTTP/1.1\r\nHos", NULL, 408, 2, "rejected", "the request head took too long"},
    {"POST / HTTP/1.1\r\nHost: a\r\nExpect: tea\r\n\r\n", NULL, 417, 3, "rejected", "only 100-continue can be expected"},
    {"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", NULL, 501, 3, "rejected",
     "this method or transfer coding is not implemented"},
    {"GET / HTTP/3.0\r\nHost: a\r\n\r\n", NULL, 505, 3, "rejected", "only HTTP/1.0 and HTTP/1.1 are spoken here"},
    {"POST /hash HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n", NULL, 400, 3, "rejected",
     "the request body is not valid chunked coding"},
    {"POST /hash HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhalf", NULL, 408, 1, "rejected", "the request body took too long"},
    {NULL, "/silent", 504, 1, "upstream-error", "the upstream did not answer in time"},
    {NULL, "/garbage", 502, 20, "upstream-error", "the upstream's reply is not valid HTTP, or was cut"},
    {NULL, "/die", 502, 3, "upstream-error", "the upstream closed without a reply"},
};
#define REFUSALS (int)(sizeof refusals / sizeof *refusals)

static void refuse(peer_rig *rig, const struct refusal *r) {
    peer_message m = no_message();
    peer_conn c;
    if (r->path) {
        CHECK_INT(peer_get(PORT(rig), r->path, &m), r->status);
    } else {
        peer_dial(&c, PORT(rig));
        CHECK_INT(peer_ask(&c, &m, r->head), r->status);
        peer_hang_up(&c);
    }
    CHECK(strstr(peer_text(&m.body), r->reason) != NULL);
    peer_message_free(&m);
}

static void case_refusals_are_all_counted_and_logged_once_a_minute(void) {
    unsigned long long rejected = 0, errors = 0;
    chaos_proxy_desc d = no_desc();
    char reason[128], action[64];
    peer_rig rig;
    int i, n, minute;
    d.head_timeout = d.body_timeout = d.reply_timeout = 150;
    peer_rig_start(&rig, "{}", &d);
    for (minute = 1; minute <= 2; minute++) {
        for (i = 0; i < REFUSALS; i++) {
            const struct refusal *r = &refusals[i];
            check_where("minute %d: %s", minute, r->reason);
            for (n = 0; n < (minute == 1 ? r->times : 1); n++) {
                refuse(&rig, r);
                if (!strcmp(r->action, "rejected")) rejected++;
                else errors++;
            }
            snprintf(action, sizeof action, "\"level\":\"warn\",\"action\":\"%s\"", r->action);
            snprintf(reason, sizeof reason, "\"reason\":\"%s\"", r->reason);
            CHECK_INT(peer_logged(&rig.log, action, reason, "\"client\":\"127.0.0.1\""), minute);
        }
        PEER_UNTIL(peer_report(&rig).connections_now == 0, PEER_MS);
        later(61);
    }
    CHECK_INT(peer_report(&rig).rejected, rejected);
    CHECK_INT(peer_report(&rig).upstream_errors, errors);
    CHECK_INT(peer_logged(&rig.log, "\"action\":\"rejected\"", "", "") + peer_logged(&rig.log, "\"action\":\"upstream-error\"", "", ""),
              2 * REFUSALS);
    peer_rig_stop(&rig);
}

static void case_dead_upstream_is_logged_once(void) {
    peer_message m = no_message();
    peer_rig rig;
    int i;
    start_named(&rig, peer_dead_port());
    for (i = 0; i < 10; i++) CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 502);
    CHECK_INT(peer_report(&rig).upstream_errors, 10);
    CHECK_INT(peer_logged(&rig.log, "\"action\":\"upstream-error\"", "\"reason\":\"the upstream refused the connection\"",
                          "\"client\":\"127.0.0.1\""),
              1);
    CHECK_INT(PEER_LOAD(&rig.up->received), 0);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* ---- parking ---- */

#define QUEUE 600
/* More than there is room for, each with its request sent: whoever is told of a client that is just being parked finds it busy,
   and the one that parks it must not forget it. */
static void queue_up(void) {
    chaos_proxy_desc d = no_desc();
    peer_message m = no_message();
    peer_conn c[QUEUE];
    peer_rig rig;
    int i;
    d.max_connections = 16;
    peer_rig_start(&rig, "{}", &d);
    PEER_STORE(&fake.slow_watch_ms, 2);
    for (i = 0; i < QUEUE; i++) {
        peer_dial(&c[i], PORT(&rig));
        CHECK(peer_sends(c[i].fd, "GET /length/9 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"));
    }
    for (i = 0; i < QUEUE; i++) {
        check_where("client %d", i);
        CHECK_INT(peer_read_reply(&c[i], &m, "GET"), PEER_WHOLE);
        CHECK(peer_is_pattern(&m.body, 9));
        peer_hang_up(&c[i]);
    }
    PEER_UNTIL(peer_report(&rig).connections_now == 0, PEER_MS);
    PEER_STORE(&fake.slow_watch_ms, 0);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_client_that_speaks_while_it_is_parked(void) {
    int round;
    for (round = 0; round < 4 && !check_state.bad; round++) queue_up();
}

int main(int argc, char **argv) {
    check_begin(argc, argv);
    peer_watchdog(180);
    CHECK_RUN(case_name_that_moves_is_followed);
    CHECK_RUN(case_last_address_is_kept_while_the_resolver_fails);
    CHECK_RUN(case_addresses_are_tried_in_order);
    CHECK_RUN(case_address_that_answers_is_kept_first);
    CHECK_RUN(case_slow_resolver_delays_no_request);
    CHECK_RUN(case_addresses_need_no_resolver);
    CHECK_RUN(case_refusals_are_all_counted_and_logged_once_a_minute);
    CHECK_RUN(case_dead_upstream_is_logged_once);
    CHECK_RUN(case_client_that_speaks_while_it_is_parked);
    return check_end();
}

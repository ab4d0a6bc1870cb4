/* Upgrade to another protocol, interim replies without end: the test itself is the upstream, byte by byte. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

#include "../check.h"
#include "peer.h"

#define UPGRADE  "GET /chat HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: echo/1\r\n\r\n"
#define SWITCHED "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo/1\r\n\r\n"

/* The proxy in front of a listener of our own. */
typedef struct ends {
    peer_rig rig;
    int listener;
    peer_conn client, upstream;
} ends;

static void ends_open(ends *e, chaos_proxy_desc d) {
    char url[64];
    int port;
    memset(e, 0, sizeof *e);
    e->listener = peer_listen(&port, 16);
    snprintf(url, sizeof url, "http://127.0.0.1:%d", port);
    d.upstream = url;
    peer_rig_start(&e->rig, "{}", &d);
    peer_dial(&e->client, PORT(&e->rig));
    e->upstream.fd = -1;
}

static void ends_close(ends *e) {
    peer_hang_up(&e->client);
    peer_hang_up(&e->upstream);
    PEER_UNTIL(peer_report(&e->rig).connections_now == 0, PEER_MS);
    peer_rig_stop(&e->rig);
    close(e->listener);
}

/* The client says this; the proxy dials, unless it has, and the request head arrives. */
static void ends_ask(ends *e, const char *request, peer_message *head) {
    struct pollfd w = {0, POLLIN, 0};
    CHECK(peer_sends(e->client.fd, request));
    if (e->upstream.fd < 0) {
        w.fd = e->listener;
        if (CHECK(poll(&w, 1, PEER_MS) == 1)) e->upstream.fd = accept(e->listener, NULL, NULL);
    }
    CHECK_INT(peer_read_head(&e->upstream, head), PEER_WHOLE);
}

/* Both sides have switched. */
static void ends_switch(ends *e) {
    peer_message m = no_message();
    ends_ask(e, UPGRADE, &m);
    CHECK(peer_sends(e->upstream.fd, SWITCHED));
    CHECK_INT(peer_read_reply(&e->client, &m, "GET"), PEER_WHOLE);
    CHECK_INT(m.status, 101);
    peer_message_free(&m);
}

/* Exactly this text comes, and nothing behind it yet. */
static void check_comes(peer_conn *c, const char *text) {
    CHECK_INT(peer_need(c, strlen(text), peer_ms() + PEER_MS), PEER_WHOLE);
    CHECK_STR(peer_text(&c->in), text);
    if (c->in.len) peer_drop(&c->in, c->in.len);
}

static void check_passes(peer_conn *from, peer_conn *to, const char *text) {
    CHECK(peer_sends(from->fd, text));
    check_comes(to, text);
}

static void case_bytes_beside_the_heads_pass(void) {
    peer_message m = no_message();
    ends e;
    ends_open(&e, no_desc());
    ends_ask(&e, UPGRADE "early", &m); /* in one segment, before it knows of the 101 */
    PEER_FIELD(&m.head, "Upgrade", "echo/1");
    PEER_FIELD(&m.head, "Connection", "Upgrade");
    CHECK(peer_sends(e.upstream.fd, SWITCHED "welcome"));
    CHECK_INT(peer_read_reply(&e.client, &m, "GET"), PEER_WHOLE);
    CHECK_INT(m.status, 101);
    PEER_FIELD(&m.head, "Upgrade", "echo/1");
    PEER_FIELD(&m.head, "Connection", "Upgrade");
    check_comes(&e.client, "welcome");
    check_comes(&e.upstream, "early");
    check_passes(&e.client, &e.upstream, "GET / HTTP/1.1\r\n\r\n"); /* no longer a request */
    check_passes(&e.upstream, &e.client, "HTTP/1.1 500 No\r\n\r\n");
    peer_message_free(&m);
    ends_close(&e);
}

static void *reader(void *arg) {
    peer_conn *c = (peer_conn *)arg;
    peer_need(c, 3 << 20, peer_ms() + 2 * PEER_MS);
    return NULL;
}
static void *writer(void *arg) {
    peer_bytes b = {NULL, 0, 0};
    peer_add_pattern(&b, 3 << 20);
    CHECK(peer_send(((peer_conn *)arg)->fd, b.data, b.len));
    peer_free(&b);
    return NULL;
}
static void case_megabytes_pass_both_ways_at_once(void) {
    void *(*const jobs[])(void *) = {reader, writer, reader, writer};
    pthread_t threads[4];
    ends e;
    int i;
    ends_open(&e, no_desc());
    ends_switch(&e);
    for (i = 0; i < 4; i++)
        if (pthread_create(&threads[i], NULL, jobs[i], i < 2 ? &e.client : &e.upstream)) abort();
    for (i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    CHECK(peer_is_pattern(&e.client.in, 3 << 20));
    CHECK(peer_is_pattern(&e.upstream.in, 3 << 20));
    ends_close(&e);
}

static void case_each_side_may_close_first(void) {
    int way;
    for (way = 0; way < 2; way++) {
        peer_conn *first, *other;
        ends e;
        check_where("%s first", way ? "upstream" : "client");
        ends_open(&e, no_desc());
        ends_switch(&e);
        first = way ? &e.upstream : &e.client;
        other = way ? &e.client : &e.upstream;
        check_passes(first, other, "last words");
        shutdown(first->fd, SHUT_WR);
        CHECK(peer_closes(other, PEER_MS));
        check_passes(other, first, "still here");
        CHECK(peer_silent(first, 20)); /* not closed with the other half */
        CHECK_INT(peer_report(&e.rig).connections_now, 1);
        shutdown(other->fd, SHUT_WR);
        CHECK(peer_closes(first, PEER_MS));
        PEER_UNTIL(peer_report(&e.rig).connections_now == 0, PEER_MS);
        CHECK_INT(peer_report(&e.rig).proxied, 1);
        ends_close(&e);
    }
}

static void case_reset_ends_the_other_side(void) {
    int way;
    for (way = 0; way < 2; way++) {
        peer_conn *first, *other;
        ends e;
        check_where("%s resets", way ? "upstream" : "client");
        ends_open(&e, no_desc());
        ends_switch(&e);
        first = way ? &e.upstream : &e.client;
        other = way ? &e.client : &e.upstream;
        peer_reset(first->fd);
        first->fd = -1;
        CHECK(peer_closes(other, PEER_MS));
        PEER_UNTIL(peer_report(&e.rig).connections_now == 0, PEER_MS);
        ends_close(&e);
    }
}

static void case_idle_tunnel_ends(void) {
    chaos_proxy_desc d = no_desc();
    long long start;
    ends e;
    int i;
    d.idle_timeout = 200;
    ends_open(&e, d);
    ends_switch(&e);
    for (i = 0; i < 6; i++) { /* one direction is enough to keep it */
        check_passes(&e.upstream, &e.client, "tick");
        peer_nap(60);
    }
    check_passes(&e.client, &e.upstream, "tock");
    start = peer_ms();
    CHECK(peer_closes(&e.client, PEER_MS));
    CHECK(peer_closes(&e.upstream, PEER_MS));
    check_where("%lld ms", peer_ms() - start);
    CHECK(peer_ms() - start >= 130 && peer_ms() - start < 1500);
    ends_close(&e);
}

/* The server does not switch: what the client sent behind its head is its next request. */
static void case_upgrade_refused_goes_on_as_http(void) {
    peer_message m = no_message();
    ends e;
    int i;
    ends_open(&e, no_desc());
    ends_ask(&e, UPGRADE GET("/early"), &m);
    CHECK(peer_sends(e.upstream.fd, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno"));
    CHECK_INT(peer_read_reply(&e.client, &m, "GET"), PEER_WHOLE);
    CHECK_INT(m.status, 200);
    CHECK_STR(peer_text(&m.body), "no");
    PEER_FIELD(&m.head, "Upgrade", NULL);
    for (i = 0; i < 3; i++) { /* the early one, then others on the parked connection */
        check_where("request %d", i);
        ends_ask(&e, i ? GET("/later") : "", &m);
        CHECK(strncmp(peer_text(&m.head), i ? "GET /later " : "GET /early ", 11) == 0);
        CHECK(peer_sends(e.upstream.fd, "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nyes"));
        CHECK_INT(peer_read_reply(&e.client, &m, "GET"), PEER_WHOLE);
        CHECK_STR(peer_text(&m.body), "yes");
        peer_nap(5);
    }
    peer_message_free(&m);
    ends_close(&e);
}

/* A 101 that nobody asked for, or cannot have been: with a body, over HTTP/1.0, to h2c. */
static void case_101_not_asked_for_is_502(void) {
    static const char *const requests[] = {
        GET("/chat"),
        "GET /chat HTTP/1.1\r\nHost: a\r\nUpgrade: echo/1\r\n\r\n",
        "POST /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: echo/1\r\nContent-Length: 2\r\n\r\nhi",
        "GET /chat HTTP/1.0\r\nConnection: Upgrade\r\nUpgrade: echo/1\r\n\r\n",
        "GET /chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    };
    size_t i;
    for (i = 0; i < sizeof requests / sizeof *requests; i++) {
        peer_message m = no_message();
        ends e;
        check_where("%s", requests[i]);
        ends_open(&e, no_desc());
        ends_ask(&e, requests[i], &m);
        PEER_FIELD(&m.head, "Upgrade", NULL); /* so no honest server says it */
        CHECK(peer_sends(e.upstream.fd, SWITCHED "smuggled"));
        CHECK_INT(peer_read_reply(&e.client, &m, "GET"), PEER_WHOLE);
        CHECK_INT(m.status, 502);
        CHECK(!strstr(peer_text(&m.body), "smuggled"));
        CHECK(peer_closes(&e.client, PEER_MS));
        CHECK_INT(peer_report(&e.rig).upstream_errors, 1);
        peer_message_free(&m);
        ends_close(&e);
    }
}

static void case_stop_ends_a_tunnel(void) {
    chaos_proxy_desc d = no_desc();
    long long start;
    ends e;
    d.drain_timeout = 100;
    ends_open(&e, d);
    ends_switch(&e);
    start = peer_ms();
    chaos_proxy_stop(e.rig.c);
    check_passes(&e.client, &e.upstream, "in progress"); /* until the drain is over */
    check_passes(&e.upstream, &e.client, "so is this");
    peer_rig_join(&e.rig, PEER_MS);
    check_where("%lld ms", peer_ms() - start);
    CHECK(peer_ms() - start >= 70 && peer_ms() - start < 500);
    CHECK(peer_closes(&e.client, 0));
    CHECK(peer_closes(&e.upstream, 0));
    ends_close(&e);
}

/* Each of them in time, the last one never: the reply's time is up all the same. */
static void case_interim_replies_without_end_are_504(void) {
    peer_message m = no_message();
    chaos_proxy_desc d = no_desc();
    long long start;
    int status = 0, interim = 0;
    ends e;
    d.reply_timeout = 200;
    ends_open(&e, d);
    ends_ask(&e, GET("/never"), &m);
    start = peer_ms();
    while (status < 200 && peer_ms() - start < 3000) {
        (void)!peer_sends(e.upstream.fd, "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n");
        e.client.ms = 20;
        if (peer_read_reply(&e.client, &m, "GET") != PEER_WHOLE) continue;
        status = m.status;
        interim += status == 103;
    }
    check_where("%lld ms, %d interim", peer_ms() - start, interim);
    CHECK_INT(status, 504);
    CHECK(interim > 0);
    CHECK(peer_ms() - start >= 140 && peer_ms() - start < 1000);
    CHECK(peer_closes(&e.client, PEER_MS));
    peer_message_free(&m);
    ends_close(&e);
}

int main(int argc, char **argv) {
    check_begin(argc, argv);
    peer_watchdog(180);
    CHECK_RUN(case_bytes_beside_the_heads_pass);
    CHECK_RUN(case_megabytes_pass_both_ways_at_once);
    CHECK_RUN(case_each_side_may_close_first);
    CHECK_RUN(case_reset_ends_the_other_side);
    CHECK_RUN(case_idle_tunnel_ends);
    CHECK_RUN(case_upgrade_refused_goes_on_as_http);
    CHECK_RUN(case_101_not_asked_for_is_502);
    CHECK_RUN(case_stop_ends_a_tunnel);
    CHECK_RUN(case_interim_replies_without_end_are_504);
    return check_end();
}

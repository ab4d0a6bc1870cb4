/* The proxy over real sockets: what a client and an upstream see of it. Strict heads case by case: http_vectors.c. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

#include "../check.h"
#include "peer.h"

#define FAIL_ALL   "{\"enabled\":true,\"errorRate\":100,\"errorStatus\":503,\"expiresAt\":\"never\"}"
#define DELAY_200  "{\"enabled\":true,\"latency\":200,\"expiresAt\":\"never\"}"
#define DELAY_LONG "{\"enabled\":true,\"latency\":60000,\"expiresAt\":\"never\"}"

/* An error of the proxy's own: says so, never looks injected, and can be told from the upstream's. */
static void check_own_error(const peer_message *m, int status) {
    char value[256];
    CHECK_INT(m->status, status);
    CHECK_INT(m->end, PEER_WHOLE);
    CHECK_INT(peer_fields(&m->head, "Proxy-Status"), 1);
    CHECK_INT(peer_fields(&m->head, "X-Chaos-Injected"), 0);
    CHECK(strstr(peer_field(&m->head, "Proxy-Status", value, sizeof value), "chaos") != NULL);
}

/* ---- plain forwarding ---- */

static void case_keep_alive_on_both_sides(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    int i;
    peer_rig_start(&rig, "{}", NULL);
    peer_dial(&c, PORT(&rig));
    for (i = 0; i < 20; i++) {
        CHECK_INT(peer_ask(&c, &m, GET("/length/100")), 200);
        CHECK(peer_is_pattern(&m.body, 100));
    }
    CHECK_INT(PEER_LOAD(&rig.up->accepts), 1);
    CHECK_INT(PEER_LOAD(&rig.up->requests), 20);
    CHECK_INT(peer_report(&rig).connections, 1);
    PEER_UNTIL(peer_report(&rig).proxied == 20, PEER_MS); /* counted just after the last byte is sent */
    CHECK_INT(peer_report(&rig).requests, 0);             /* off: nothing is decided, nothing counted */
    shutdown(c.fd, SHUT_WR);
    CHECK(peer_closes(&c, PEER_MS)); /* by then its upstream connection is back in the pool */
    peer_hang_up(&c);
    /* Upstream connections belong to the pool, not to a client: another client gets the same one. */
    CHECK_INT(peer_get(PORT(&rig), "/length/1", &m), 200);
    CHECK_INT(PEER_LOAD(&rig.up->accepts), 1);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_pipelined_requests_keep_their_order(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    int n;
    peer_rig_start(&rig, "{}", NULL);
    peer_dial(&c, PORT(&rig));
    CHECK(peer_sends(c.fd, GET("/length/1") GET("/chunked/2") GET("/length/3")));
    CHECK(peer_sends(c.fd, "POST /length/4 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello" GET("/length/5")));
    CHECK(
        peer_sends(c.fd, "POST /length/6 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n" GET("/length/7")));
    for (n = 1; n <= 7; n++) {
        peer_read_reply(&c, &m, "GET");
        CHECK_INT(m.status, 200);
        CHECK(peer_is_pattern(&m.body, (size_t)n));
    }
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void check_reply_body(peer_rig *rig, peer_conn *c, const char *how, size_t n) {
    peer_message m = no_message();
    char request[128];
    check_where("%s %zu", how, n);
    snprintf(request, sizeof request, "GET /%s/%zu HTTP/1.1\r\nHost: a\r\n\r\n", how, n);
    CHECK_INT(peer_ask(c, &m, request), 200);
    CHECK(peer_is_pattern(&m.body, n));
    if (!strcmp(how, "length")) CHECK(!m.chunked && !m.to_close);
    if (!strcmp(how, "chunked")) CHECK(m.chunked);
    if (m.to_close || peer_closes(c, 0)) { /* close-delimited may stay so */
        peer_hang_up(c);
        peer_dial(c, PORT(rig));
    }
    peer_message_free(&m);
}

static void case_reply_bodies_arrive_byte_for_byte(void) {
    static const size_t sizes[] = {0, 1, 4095, 65536, 65537, 1 << 20};
    static const char *const ways[] = {"length", "chunked", "close"};
    peer_rig rig;
    peer_conn c;
    size_t i, w;
    peer_rig_start(&rig, "{}", NULL);
    peer_dial(&c, PORT(&rig));
    for (w = 0; w < 3; w++)
        for (i = 0; i < sizeof sizes / sizeof *sizes; i++) check_reply_body(&rig, &c, ways[w], sizes[i]);
    peer_hang_up(&c);
    peer_rig_stop(&rig);
}

static void check_request_body(peer_conn *c, const char *path, bool chunked, size_t n) {
    peer_bytes body = {NULL, 0, 0}, out = {NULL, 0, 0};
    peer_message m = no_message();
    char text[160];
    check_where("%s %s %zu", path, chunked ? "chunked" : "length", n);
    peer_add_pattern(&body, n);
    snprintf(text, sizeof text, "POST %s HTTP/1.1\r\nHost: a\r\n", path);
    peer_adds(&out, text);
    if (chunked) {
        peer_adds(&out, "Transfer-Encoding: chunked\r\n\r\n");
        peer_add_chunked(&out, &body);
    } else {
        snprintf(text, sizeof text, "Content-Length: %zu\r\n\r\n", n);
        peer_adds(&out, text);
        peer_add(&out, body.data ? body.data : "", n);
    }
    CHECK(peer_send(c->fd, out.data, out.len));
    CHECK_INT(peer_read_reply(c, &m, "POST"), PEER_WHOLE);
    snprintf(text, sizeof text, "%zu %016llx", n, peer_hash(peer_text(&body), n));
    CHECK_STR(peer_text(&m.body), text);
    peer_free(&body);
    peer_free(&out);
    peer_message_free(&m);
}

static void case_request_bodies_arrive_byte_for_byte(void) {
    static const size_t sizes[] = {0, 1, 65537, 1 << 20};
    peer_rig rig;
    peer_conn c;
    size_t i;
    peer_rig_start(&rig, "{}", NULL);
    peer_dial(&c, PORT(&rig));
    for (i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        check_request_body(&c, "/hash", false, sizes[i]);
        check_request_body(&c, "/hash", true, sizes[i]);
    }
    CHECK_INT(PEER_LOAD(&rig.up->accepts), 1);
    peer_hang_up(&c);
    peer_rig_stop(&rig);
}

typedef struct sending {
    int fd;
    peer_bytes bytes;
    bool sent;
} sending;
static void *send_in_thread(void *arg) {
    sending *s = (sending *)arg;
    s->sent = peer_send(s->fd, s->bytes.data, s->bytes.len);
    return NULL;
}

/* More than all socket buffers on the way hold: only a pump that moves both directions at once gets through. */
static void case_both_directions_stream_at_once(void) {
    size_t n = 24 << 20;
    peer_bytes body = {NULL, 0, 0};
    sending s = {0, {NULL, 0, 0}, false};
    peer_message m = no_message();
    pthread_t thread;
    peer_rig rig;
    peer_conn c;
    char head[128];
    size_t i;
    peer_rig_start(&rig, "{}", NULL);
    peer_dial(&c, PORT(&rig));
    c.ms = 15000;
    for (i = 0; i < 1 << 20; i++) {
        char byte = (char)peer_pattern(i);
        peer_add(&body, &byte, 1);
    }
    snprintf(head, sizeof head, "POST /mirror HTTP/1.1\r\nHost: a\r\nContent-Length: %zu\r\n\r\n", n);
    s.fd = c.fd;
    peer_adds(&s.bytes, head);
    for (i = 0; i < n >> 20; i++) peer_add(&s.bytes, body.data, body.len);
    if (pthread_create(&thread, NULL, send_in_thread, &s)) abort();
    CHECK_INT(peer_read_reply(&c, &m, "POST"), PEER_WHOLE);
    pthread_join(thread, NULL);
    CHECK(s.sent);
    CHECK_INT(m.body.len, n);
    CHECK(m.body.len == n && !memcmp(m.body.data, s.bytes.data + strlen(head), n));
    peer_free(&body);
    peer_free(&s.bytes);
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_replies_without_a_body_keep_their_fields(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, "{}", NULL);
    peer_dial(&c, PORT(&rig));
    CHECK_INT(peer_ask(&c, &m, "HEAD /length/1000 HTTP/1.1\r\nHost: a\r\n\r\n"), 200);
    PEER_FIELD(&m.head, "Content-Length", "1000");
    CHECK_INT(peer_ask(&c, &m, "HEAD /chunked/1000 HTTP/1.1\r\nHost: a\r\n\r\n"), 200);
    CHECK_INT(peer_ask(&c, &m, GET("/204")), 204);
    PEER_FIELD(&m.head, "X-Kind", "none");
    PEER_FIELD(&m.head, "Content-Length", NULL);
    CHECK_INT(peer_ask(&c, &m, GET("/304")), 304);
    PEER_FIELD(&m.head, "ETag", "\"a\"");
    CHECK_INT(peer_ask(&c, &m, GET("/length/9")), 200); /* still in step */
    CHECK(peer_is_pattern(&m.body, 9));
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_interim_replies_pass(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, "{}", NULL);
    peer_dial(&c, PORT(&rig));
    CHECK_INT(peer_ask(&c, &m, GET("/early")), 103);
    CHECK(strstr(m.head.data, "rel=preload") != NULL);
    CHECK_INT(peer_read_reply(&c, &m, "GET"), PEER_WHOLE);
    CHECK_INT(m.status, 200);
    CHECK_STR(peer_text(&m.body), "late");
    peer_hang_up(&c);
    peer_dial(&c, PORT(&rig)); /* HTTP/1.0 knows no interim replies */
    CHECK_INT(peer_ask(&c, &m, "GET /early HTTP/1.0\r\n\r\n"), 200);
    CHECK_STR(peer_text(&m.body), "late");
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_expect_100_continue(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, "{}", NULL);
    peer_dial(&c, PORT(&rig));
    /* The client waits: the 100 must come before a byte of the body is sent. */
    CHECK_INT(peer_ask(&c, &m, "POST /continue HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"), 100);
    CHECK(peer_sends(c.fd, "hello"));
    CHECK_INT(peer_read_reply(&c, &m, "POST"), PEER_WHOLE);
    CHECK_INT(m.status, 200);
    CHECK(!strncmp(peer_text(&m.body), "5 ", 2));
    /* Exactly one final reply, and the connection goes on. */
    CHECK_INT(peer_ask(&c, &m, GET("/length/2")), 200);
    /* The upstream refuses without reading: the client learns it, and its body never becomes a request. */
    CHECK_INT(peer_ask(&c, &m, "POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\nExpect: 100-continue\r\n\r\n"), 417);
    CHECK(peer_closes(&c, PEER_MS));
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_early_final_reply_reaches_the_client(void) {
    peer_message m = no_message();
    peer_bytes out = {NULL, 0, 0};
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, "{}", NULL);
    peer_dial(&c, PORT(&rig));
    peer_adds(&out, "POST /refuse HTTP/1.1\r\nHost: a\r\nContent-Length: 60000\r\n\r\n");
    peer_add_pattern(&out, 30000); /* half of it, then wait for what the server says */
    CHECK(peer_send(c.fd, out.data, out.len));
    CHECK_INT(peer_read_reply(&c, &m, "POST"), PEER_WHOLE);
    CHECK_INT(m.status, 417);
    CHECK_STR(peer_text(&m.body), "no");
    peer_free(&out);
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_trailers_do_not_disturb(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, "{}", NULL);
    peer_dial(&c, PORT(&rig));
    CHECK_INT(peer_ask(&c, &m, "POST /hash HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nX-T: 1\r\n\r\n"),
              200);
    CHECK(!strncmp(peer_text(&m.body), "5 ", 2));
    CHECK_INT(peer_ask(&c, &m, GET("/chunked/10")), 200);
    CHECK(peer_is_pattern(&m.body, 10));
    CHECK_INT(peer_ask(&c, &m, GET("/chunked/11")), 200);
    CHECK(peer_is_pattern(&m.body, 11));
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_off_means_the_same_bytes(void) {
    static const char *const paths[] = {"/length/5000", "/chunked/5000", "/304", "/204", "/hello?x=%20y&z"};
    static const char *const kept[] = {"Content-Type", "Server", "ETag", "X-Kind", "X-Upstream"};
    peer_message direct = no_message(), proxied = no_message();
    peer_rig rig;
    size_t i, k;
    peer_rig_start(&rig, "{}", NULL);
    for (i = 0; i < 5; i++) {
        char a[256], b[256];
        check_where("%s", paths[i]);
        CHECK_INT(peer_get(PORT(&rig), paths[i], &proxied), peer_get(rig.up->port, paths[i], &direct));
        if (i < 4)
            CHECK(direct.body.len == proxied.body.len && !memcmp(peer_text(&direct.body), peer_text(&proxied.body), direct.body.len));
        else
            CHECK(
                !strncmp(peer_text(&direct.body), peer_text(&proxied.body), strcspn(peer_text(&direct.body), "\r"))); /* its request line */
        for (k = 0; k < 5; k++) CHECK_STR(peer_field(&proxied.head, kept[k], a, sizeof a), peer_field(&direct.head, kept[k], b, sizeof b));
        PEER_FIELD(&proxied.head, "X-Chaos-Injected", NULL);
        PEER_FIELD(&proxied.head, "Proxy-Status", NULL);
    }
    peer_message_free(&direct);
    peer_message_free(&proxied);
    peer_rig_stop(&rig);
}

/* ---- what is added, dropped, rewritten ---- */

/* Sends a request to /echo-like paths; returns the head the upstream got as m->body. */
static void echo(peer_rig *rig, peer_message *m, const char *request) {
    peer_conn c;
    peer_dial(&c, PORT(rig));
    CHECK_INT(peer_ask(&c, m, request), 200);
    peer_hang_up(&c);
}

static void case_hop_by_hop_fields_end_here(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_rig_start(&rig, "{}", NULL);
    echo(&rig, &m,
         "GET /echo HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, X-Drop\r\nX-Drop: 1\r\nKeep-Alive: timeout=9\r\n"
         "Proxy-Connection: keep-alive\r\nTE: deflate\r\nX-Keep: 2\r\nCookie: a=b\r\nAuthorization: Basic eA==\r\n\r\n");
    PEER_FIELD(&m.body, "X-Drop", NULL);
    PEER_FIELD(&m.body, "Keep-Alive", NULL);
    PEER_FIELD(&m.body, "Proxy-Connection", NULL);
    PEER_FIELD(&m.body, "TE", NULL);
    PEER_FIELD(&m.body, "X-Keep", "2");
    PEER_FIELD(&m.body, "Cookie", "a=b");
    PEER_FIELD(&m.body, "Authorization", "Basic eA==");
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_via_and_forwarded_fields_are_added(void) {
    peer_message m = no_message();
    peer_rig rig;
    char via[256];
    peer_rig_start(&rig, "{}", NULL);
    echo(&rig, &m, "GET /echo HTTP/1.1\r\nHost: shop.example:81\r\n\r\n");
    CHECK(!strncmp(peer_field(&m.body, "Via", via, sizeof via), "1.1 ", 4));
    PEER_FIELD(&m.body, "X-Forwarded-For", "127.0.0.1");
    PEER_FIELD(&m.body, "X-Forwarded-Proto", "http");
    PEER_FIELD(&m.body, "X-Forwarded-Host", "shop.example:81");
    PEER_FIELD(&m.body, "Host", "shop.example:81");
    echo(&rig, &m, "GET /echo HTTP/1.0\r\nHost: a\r\n\r\n");
    CHECK(!strncmp(peer_field(&m.body, "Via", via, sizeof via), "1.0 ", 4)); /* the version received */
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void check_in_order(const char *text, const char *const *words, int count) {
    const char *at = text;
    int i;
    for (i = 0; i < count; i++) {
        at = at ? strstr(at, words[i]) : NULL;
        check_where("%s", words[i]);
        CHECK(at != NULL);
    }
}

/* A proxy in front of this one: its entries stay, in their order. One field or several are the same list. */
static void case_forwarded_chain_is_kept(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_rig_start(&rig, "{}", NULL);
    echo(&rig, &m,
         "GET /echo HTTP/1.1\r\nHost: a\r\nVia: 1.1 edge\r\nX-Forwarded-For: 192.0.2.7, 192.0.2.8\r\n"
         "Via: 1.0 inner\r\nX-Forwarded-For: 192.0.2.9\r\n\r\n");
    check_in_order(peer_text(&m.body), (const char *const[]){"192.0.2.7", "192.0.2.8", "192.0.2.9", "127.0.0.1"}, 4);
    check_in_order(peer_text(&m.body), (const char *const[]){"1.1 edge", "1.0 inner", "1.1 chaos"}, 3);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_host_rewritten_on_request(void) {
    chaos_proxy_desc d = no_desc();
    peer_message m = no_message();
    peer_rig rig;
    d.host_header = "internal.example";
    peer_rig_start(&rig, "{}", &d);
    echo(&rig, &m, "GET /echo HTTP/1.1\r\nHost: shop.example\r\n\r\n");
    PEER_FIELD(&m.body, "Host", "internal.example");
    PEER_FIELD(&m.body, "X-Forwarded-Host", "shop.example");
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_absolute_form_becomes_origin_form(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_rig_start(&rig, "{}", NULL);
    echo(&rig, &m, "GET http://b.example:8/echo?x=1 HTTP/1.1\r\nHost: other\r\n\r\n");
    CHECK(!strncmp(peer_text(&m.body), "GET /echo?x=1 HTTP/1.1\r\n", 24));
    PEER_FIELD(&m.body, "Host", "b.example:8");
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_upstream_prefix(void) {
    chaos_proxy_desc d = no_desc();
    peer_message m = no_message();
    char url[128];
    peer_proxy proxy;
    peer_rig rig;
    peer_conn c;
    peer_rig_open(&rig, "{}");
    rig.up = peer_upstream_start();
    snprintf(url, sizeof url, "http://127.0.0.1:%d/base", rig.up->port);
    d.upstream = url;
    CHECK(peer_proxy_start(&proxy, rig.c, &d));
    peer_dial(&c, PEER_LOAD(&proxy.port));
    CHECK_INT(peer_ask(&c, &m, GET("/a/b?c")), 200);
    CHECK(!strncmp(peer_text(&m.body), "GET /base/a/b?c HTTP/1.1\r\n", 26));
    CHECK_INT(peer_ask(&c, &m, GET("/")), 200);
    CHECK(!strncmp(peer_text(&m.body), "GET /base/ HTTP/1.1\r\n", 21));
    peer_hang_up(&c);
    chaos_proxy_stop(rig.c);
    peer_proxy_join(&proxy, PEER_MS);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_http10_client(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, "{}", NULL);
    peer_dial(&c, PORT(&rig));
    CHECK_INT(peer_ask(&c, &m, "GET /chunked/70000 HTTP/1.0\r\n\r\n"), 200);
    PEER_FIELD(&m.head, "Transfer-Encoding", NULL); /* de-chunked, its end is the close */
    CHECK(peer_is_pattern(&m.body, 70000));
    CHECK(peer_closes(&c, PEER_MS));
    peer_hang_up(&c);
    peer_dial(&c, PORT(&rig));
    CHECK_INT(peer_ask(&c, &m, "GET /length/70 HTTP/1.0\r\nHost: a\r\n\r\n"), 200);
    CHECK(peer_is_pattern(&m.body, 70));
    CHECK(peer_closes(&c, PEER_MS));
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_client_may_half_close(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, "{}", NULL);
    peer_dial(&c, PORT(&rig));
    CHECK(peer_sends(c.fd, GET("/slow/50")));
    shutdown(c.fd, SHUT_WR); /* not an abort: it still reads */
    CHECK_INT(peer_read_reply(&c, &m, "GET"), PEER_WHOLE);
    CHECK_INT(m.status, 200);
    CHECK(peer_closes(&c, PEER_MS));
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* ---- refusals and time-outs ---- */

static void check_refused(peer_rig *rig, const char *head, int status) {
    peer_message m = no_message();
    peer_conn c;
    check_where("%d", status);
    peer_dial(&c, PORT(rig));
    peer_ask(&c, &m, head);
    check_own_error(&m, status);
    CHECK(peer_closes(&c, PEER_MS));
    CHECK_INT(PEER_LOAD(&rig->up->received), 0);
    peer_hang_up(&c);
    peer_message_free(&m);
}

static void case_bad_heads_are_refused_and_closed(void) {
    chaos_proxy_desc d = no_desc();
    peer_bytes big = {NULL, 0, 0};
    peer_rig rig;
    d.head_limit = 2048;
    peer_rig_start(&rig, "{}", &d);
    check_refused(&rig, "GET / HTTP/1.1\r\nHost: a\r\nX : b\r\n\r\n", 400);
    check_refused(&rig, "GET / HTTP/3.0\r\nHost: a\r\n\r\n", 505);
    check_refused(&rig, "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501);
    peer_adds(&big, "GET / HTTP/1.1\r\nHost: a\r\nX-Fill: ");
    while (big.len < 4000) peer_adds(&big, "0123456789");
    peer_adds(&big, "\r\n\r\n");
    check_refused(&rig, big.data, 431);
    big.len = 0;
    peer_adds(&big, "GET /");
    while (big.len < 4000) peer_adds(&big, "0123456789");
    peer_adds(&big, " HTTP/1.1\r\nHost: a\r\n\r\n");
    check_refused(&rig, big.data, 414);
    CHECK_INT(peer_report(&rig).rejected, 5);
    peer_free(&big);
    peer_rig_stop(&rig);
}

static void case_refused_client_can_read_why(void) {
    chaos_proxy_desc d = no_desc();
    peer_message m = no_message();
    peer_bytes big = {NULL, 0, 0};
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, "{}", &d);
    peer_adds(&big, "POST / HTTP/1.1\r\nHost: a\r\nBad Name: b\r\nContent-Length: 400000\r\n\r\n");
    peer_add_pattern(&big, 400000);
    peer_dial(&c, PORT(&rig));
    (void)!peer_send(c.fd, big.data, big.len); /* keeps sending, as clients do; a careless close would be an RST over the reply */
    peer_read_reply(&c, &m, "POST");
    check_own_error(&m, 400);
    CHECK_INT(peer_fill(&c, peer_ms() + PEER_MS), 0); /* a FIN: an RST can overtake the reply on a real network */
    peer_hang_up(&c);
    peer_free(&big);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* One byte now and then must not renew the deadline: it belongs to the head. */
static void case_slow_head_is_408(void) {
    static const char head[] = "GET / HTTP/1.1\r\nHost: aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
    chaos_proxy_desc d = no_desc();
    peer_message m = no_message();
    long long start;
    peer_rig rig;
    peer_conn c;
    size_t i;
    d.head_timeout = 200;
    peer_rig_start(&rig, "{}", &d);
    peer_dial(&c, PORT(&rig));
    start = peer_ms();
    for (i = 0; i < sizeof head - 1 && !c.in.len; i++) {
        (void)!peer_send(c.fd, head + i, 1);
        if (peer_fill(&c, peer_ms() + 20) != -1) break;
    }
    CHECK(peer_ms() - start >= 190);
    CHECK(peer_ms() - start < 600);
    peer_read_reply(&c, &m, "GET");
    check_own_error(&m, 408);
    CHECK(peer_closes(&c, PEER_MS));
    CHECK_INT(PEER_LOAD(&rig.up->received), 0);
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_idle_connections_end_silently(void) {
    chaos_proxy_desc d = no_desc();
    peer_message m = no_message();
    long long start;
    peer_rig rig;
    peer_conn fresh, used;
    d.idle_timeout = 150;
    peer_rig_start(&rig, "{}", &d);
    peer_dial(&fresh, PORT(&rig));
    peer_dial(&used, PORT(&rig));
    CHECK_INT(peer_ask(&used, &m, GET("/length/1")), 200);
    start = peer_ms();
    CHECK(peer_closes(&used, PEER_MS)); /* no 408: the client may be sending at this moment */
    CHECK(peer_ms() - start >= 100 && peer_ms() - start < 600);
    CHECK(peer_closes(&fresh, PEER_MS));
    peer_hang_up(&fresh);
    peer_hang_up(&used);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_stalled_request_body_ends(void) {
    chaos_proxy_desc d = no_desc();
    peer_message m = no_message();
    long long start = peer_ms();
    peer_rig rig;
    peer_conn c;
    d.body_timeout = 200;
    peer_rig_start(&rig, "{}", &d);
    peer_dial(&c, PORT(&rig));
    peer_ask(&c, &m, "POST /hash HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nonly this");
    check_own_error(&m, 408);
    CHECK(peer_closes(&c, PEER_MS));
    CHECK(peer_ms() - start < 1500);
    PEER_UNTIL(PEER_LOAD(&rig.up->open) == 0, PEER_MS); /* the upstream sees a cut request, not a whole one */
    CHECK_INT(PEER_LOAD(&rig.up->complete), 0);
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_upstream_down_is_502(void) {
    chaos_proxy_desc d = no_desc();
    peer_message m = no_message();
    char url[64];
    peer_rig rig;
    peer_conn c;
    snprintf(url, sizeof url, "http://127.0.0.1:%d", peer_dead_port());
    d.upstream = url;
    peer_rig_start(&rig, "{}", &d);
    peer_dial(&c, PORT(&rig));
    CHECK_INT(peer_ask(&c, &m, GET("/")), 502);
    check_own_error(&m, 502);
    if (!peer_fields(&m.head, "Connection")) { /* kept: then it must be in step */
        CHECK_INT(peer_ask(&c, &m, GET("/")), 502);
        check_own_error(&m, 502);
    }
    CHECK(peer_report(&rig).upstream_errors >= 1);
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_upstream_that_answers_nonsense_is_502(void) {
    static const char *const paths[] = {"/garbage", "/half-head", "/die"};
    peer_message m = no_message();
    peer_rig rig;
    int i;
    peer_rig_start(&rig, "{}", NULL);
    for (i = 0; i < 3; i++) {
        check_where("%s", paths[i]);
        peer_get(PORT(&rig), paths[i], &m);
        check_own_error(&m, 502);
        CHECK(!strstr(peer_text(&m.body), "lorem"));
    }
    CHECK_INT(peer_report(&rig).upstream_errors, 3);
    CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_silent_upstream_is_504(void) {
    chaos_proxy_desc d = no_desc();
    peer_message m = no_message();
    long long start;
    peer_rig rig;
    d.reply_timeout = 200;
    peer_rig_start(&rig, "{}", &d);
    start = peer_ms();
    peer_get(PORT(&rig), "/silent", &m);
    check_own_error(&m, 504);
    CHECK(peer_ms() - start >= 190 && peer_ms() - start < 800);
    CHECK_INT(PEER_LOAD(&rig.up->requests), 1); /* not asked twice */
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* A listener whose queue is full answers no SYN, as a host that is gone. */
static void case_connect_timeout_is_504(void) {
    chaos_proxy_desc d = no_desc();
    peer_message m = no_message();
    int port, fill[8], i, fd = peer_listen(&port, 0);
    long long start;
    char url[64];
    peer_rig rig;
    struct sockaddr_in a;
    memset(&a, 0, sizeof a);
    a.sin_family = AF_INET;
    a.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    a.sin_port = htons((unsigned short)port);
    for (i = 0; i < 8; i++) {
        fill[i] = socket(AF_INET, SOCK_STREAM, 0);
        fcntl(fill[i], F_SETFL, O_NONBLOCK);
        (void)!connect(fill[i], (struct sockaddr *)&a, sizeof a);
    }
    snprintf(url, sizeof url, "http://127.0.0.1:%d", port);
    d.upstream = url;
    d.connect_timeout = 200;
    peer_rig_start(&rig, "{}", &d);
    start = peer_ms();
    peer_get(PORT(&rig), "/", &m);
    check_own_error(&m, 504);
    CHECK(peer_ms() - start >= 190 && peer_ms() - start < 800);
    peer_message_free(&m);
    peer_rig_stop(&rig);
    for (i = 0; i < 8; i++) close(fill[i]);
    close(fd);
}

/* ---- an upstream that dies in the middle: what is cut must look cut ---- */

static void check_cut(peer_rig *rig, const char *path, const char *version) {
    peer_message m = no_message();
    char request[128];
    peer_conn c;
    check_where("%s %s", path, version);
    snprintf(request, sizeof request, "GET %s HTTP/%s\r\nHost: a\r\n\r\n", path, version);
    peer_dial(&c, PORT(rig));
    peer_ask(&c, &m, request);
    if (!strcmp(path, "/bad-chunk") && m.status == 502) { /* the bad chunk came with the head: nothing has been sent on yet */
        check_own_error(&m, 502);
        peer_hang_up(&c);
        peer_message_free(&m);
        return;
    }
    CHECK_INT(m.status, 200);
    CHECK(m.end == PEER_CUT || m.end == PEER_RESET);
    CHECK(!strncmp("only this", peer_text(&m.body), m.body.len)); /* what came is genuine */
    peer_hang_up(&c);
    peer_message_free(&m);
}

static void case_cut_replies_look_cut(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_rig_start(&rig, "{}", NULL);
    check_cut(&rig, "/cut-length", "1.1");
    check_cut(&rig, "/cut-chunked", "1.1");
    check_cut(&rig, "/bad-chunk", "1.1");
    check_cut(&rig, "/reset-body", "1.1"); /* to the close: only an RST or chunked framing can tell */
    check_cut(&rig, "/reset-body", "1.0");
    check_cut(&rig, "/cut-chunked", "1.0");                      /* de-chunked: only an RST can tell */
    PEER_UNTIL(peer_report(&rig).upstream_errors == 6, PEER_MS); /* counted just after the connection is cut */
    CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* ---- stale pooled sockets ---- */

static void case_get_is_retried_once_on_a_stale_socket(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_rig_start(&rig, "{}", NULL);
    CHECK_INT(peer_get(PORT(&rig), "/once", &m), 200);
    CHECK_INT(peer_get(PORT(&rig), "/once", &m), 200); /* the pooled connection dies under it, a fresh one serves it */
    CHECK_INT(PEER_LOAD(&rig.up->requests), 3);
    CHECK_INT(PEER_LOAD(&rig.up->accepts), 2);
    CHECK_INT(peer_report(&rig).upstream_errors, 0);
    peer_get(PORT(&rig), "/die", &m); /* dies on the pooled and on the fresh one: not a third time */
    check_own_error(&m, 502);
    CHECK_INT(PEER_LOAD(&rig.up->requests), 5);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_post_is_never_retried(void) {
    static const char *const posts[] = {"POST /once HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi",
                                        "POST /once HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"};
    int i;
    for (i = 0; i < 2; i++) {
        peer_message m = no_message();
        peer_rig rig;
        peer_conn c;
        peer_rig_start(&rig, "{}", NULL);
        CHECK_INT(peer_get(PORT(&rig), "/once", &m), 200);
        peer_dial(&c, PORT(&rig));
        CHECK_INT(peer_ask(&c, &m, posts[i]), 502);
        check_own_error(&m, 502);
        CHECK_INT(PEER_LOAD(&rig.up->requests), 2); /* it was sent exactly once */
        peer_hang_up(&c);
        peer_message_free(&m);
        peer_rig_stop(&rig);
    }
}

static void case_closed_pooled_socket_is_not_used(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, "{}", NULL);
    CHECK_INT(peer_get(PORT(&rig), "/bye", &m), 200); /* promises keep-alive, closes */
    PEER_UNTIL(PEER_LOAD(&rig.up->accepts) == 1, PEER_MS);
    peer_nap(20); /* not to be sure of anything: the FIN is on its way, and either path below must give 200 */
    peer_dial(&c, PORT(&rig));
    CHECK_INT(peer_ask(&c, &m, "POST /hash HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"), 200);
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_post_gets_no_socket_that_idled_half_a_second(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    long long until;
    peer_rig_start(&rig, "{}", NULL);
    peer_dial(&c, PORT(&rig));
    CHECK_INT(peer_ask(&c, &m, "POST /length/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"), 200);
    CHECK_INT(peer_ask(&c, &m, "POST /length/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"), 200);
    CHECK_INT(PEER_LOAD(&rig.up->accepts), 1);                      /* fresh enough */
    for (until = peer_ms() + 600; peer_ms() < until;) peer_nap(20); /* the half second itself */
    CHECK_INT(peer_ask(&c, &m, "POST /length/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi"), 200);
    CHECK_INT(PEER_LOAD(&rig.up->accepts), 2);
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_stray_bytes_poison_nobody(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_rig_start(&rig, "{}", NULL);
    CHECK_INT(peer_get(PORT(&rig), "/stray", &m), 200);
    CHECK_STR(peer_text(&m.body), "ok");
    CHECK_INT(peer_get(PORT(&rig), "/length/4", &m), 200);
    CHECK(peer_is_pattern(&m.body, 4));
    CHECK_INT(PEER_LOAD(&rig.up->accepts), 2);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* ---- faults ---- */

static void case_injected_status(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    int i;
    peer_rig_start(&rig,
                   "{\"enabled\":true,\"errorRate\":100,\"errorStatus\":429,\"errorBody\":\"slow \\u00e4 down\",\"retryAfter\":7,"
                   "\"latency\":5000,\"expiresAt\":\"never\"}",
                   NULL);
    peer_dial(&c, PORT(&rig));
    for (i = 0; i < 3; i++) { /* the connection goes on */
        long long start = peer_ms();
        CHECK_INT(peer_ask(&c, &m, GET("/a")), 429);
        CHECK(peer_ms() - start < 1000); /* an error short-circuits: no delay */
        PEER_FIELD(&m.head, "X-Chaos-Injected", "error");
        PEER_FIELD(&m.head, "Cache-Control", "no-store");
        PEER_FIELD(&m.head, "Retry-After", "7");
        PEER_FIELD(&m.head, "Proxy-Status", NULL);
        PEER_FIELD(&m.head, "X-Chaos-Delay-Ms", NULL);
        CHECK_STR(peer_text(&m.body), "slow \xc3\xa4 down");
    }
    CHECK_INT(peer_ask(&c, &m, "HEAD /a HTTP/1.1\r\nHost: a\r\n\r\n"), 429);
    PEER_FIELD(&m.head, "X-Chaos-Injected", "error");
    CHECK(c.in.len == 0);
    CHECK_INT(peer_ask(&c, &m, GET("/a")), 429); /* a body after HEAD would be read as this reply */
    CHECK_INT(PEER_LOAD(&rig.up->received), 0);  /* the upstream was never asked */
    CHECK_INT(peer_report(&rig).injected[CHAOS_STATUS], 5);
    CHECK_INT(peer_report(&rig).requests, 5);
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_every_injected_status_is_framed(void) {
    static const int statuses[] = {200, 204, 205, 299, 301, 304, 400, 404, 418, 500, 503, 599};
    peer_rig rig;
    peer_conn c;
    size_t i;
    peer_rig_start(&rig, "{}", NULL);
    peer_dial(&c, PORT(&rig));
    for (i = 0; i < sizeof statuses / sizeof *statuses; i++) {
        peer_message m = no_message();
        char json[160];
        check_where("status %d", statuses[i]);
        snprintf(json, sizeof json, "{\"enabled\":true,\"errorRate\":100,\"errorStatus\":%d,\"expiresAt\":\"never\"}", statuses[i]);
        peer_rig_config(&rig, json);
        CHECK_INT(peer_ask(&c, &m, GET("/a")), statuses[i]);
        PEER_FIELD(&m.head, "X-Chaos-Injected", "error");
        if (statuses[i] == 204 || statuses[i] == 304)
            CHECK_INT(peer_fields(&m.head, "Content-Length") + peer_fields(&m.head, "Transfer-Encoding"), 0);
        if (statuses[i] == 205) CHECK_INT(m.body.len, 0);
        CHECK(c.in.len == 0 && !m.to_close);
        peer_message_free(&m);
    }
    peer_hang_up(&c);
    peer_rig_stop(&rig);
}

/* An injected answer reads the body: else the body would be the next request. */
static void case_injected_reply_reads_the_body(void) {
    static const char *const posts[] = {
        "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 40\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: evil\r\n\r\n..",
        "POST /a HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n28\r\nGET /smuggled HTTP/1.1\r\nHost: evil\r\n\r\n..\r\n0\r\nX: "
        "y\r\n\r\n",
    };
    peer_rig rig;
    int i;
    peer_rig_start(&rig, "{\"enabled\":true,\"errorRate\":100,\"match\":{\"methods\":[\"POST\"]},\"expiresAt\":\"never\"}", NULL);
    for (i = 0; i < 2; i++) {
        peer_message m = no_message();
        peer_conn c;
        check_where("%s", i ? "chunked" : "length");
        peer_dial(&c, PORT(&rig));
        CHECK(peer_sends(c.fd, posts[i]));
        CHECK(peer_sends(c.fd, GET("/length/6"))); /* pipelined behind it */
        peer_read_reply(&c, &m, "POST");
        CHECK_INT(m.status, 503);
        CHECK_INT(peer_read_reply(&c, &m, "GET"), PEER_WHOLE);
        CHECK_INT(m.status, 200);
        CHECK(peer_is_pattern(&m.body, 6));
        peer_hang_up(&c);
        peer_message_free(&m);
    }
    CHECK_INT(PEER_LOAD(&rig.up->requests), 2);
    peer_rig_stop(&rig);
}

static void case_injected_reply_to_a_large_body_closes_cleanly(void) {
    peer_message m = no_message();
    peer_bytes out = {NULL, 0, 0};
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, FAIL_ALL, NULL);
    peer_dial(&c, PORT(&rig));
    peer_adds(&out, "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\n");
    peer_add_pattern(&out, 300000);
    (void)!peer_send(c.fd, out.data, out.len); /* all of it first, as a simple client does; only then it reads */
    CHECK_INT(peer_read_reply(&c, &m, "POST"), PEER_WHOLE);
    CHECK_INT(m.status, 503);
    PEER_FIELD(&m.head, "X-Chaos-Injected", "error");
    PEER_FIELD(&m.head, "Connection", "close");
    CHECK_INT(peer_fill(&c, peer_ms() + PEER_MS), 0); /* a FIN, no RST that could overtake the reply */
    CHECK_INT(PEER_LOAD(&rig.up->received), 0);
    peer_hang_up(&c);
    peer_free(&out);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_injected_reply_to_a_stalled_body_comes_in_time(void) {
    peer_message m = no_message();
    long long start;
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, FAIL_ALL, NULL);
    peer_dial(&c, PORT(&rig));
    start = peer_ms();
    CHECK_INT(peer_ask(&c, &m, "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 50\r\n\r\nnever more"), 503);
    CHECK(peer_ms() - start < 2000); /* at most 1 s is waited for the rest */
    CHECK(peer_closes(&c, PEER_MS));
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_injected_reply_to_expect_is_final(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, FAIL_ALL, NULL);
    peer_dial(&c, PORT(&rig));
    CHECK_INT(peer_ask(&c, &m, "POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"), 503);
    PEER_FIELD(&m.head, "X-Chaos-Injected", "error");
    CHECK(peer_closes(&c, PEER_MS));
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_delay_is_exact_and_marked(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    int i;
    peer_rig_start(&rig, DELAY_200, NULL);
    peer_dial(&c, PORT(&rig));
    for (i = 0; i < 3; i++) {
        long long start = peer_us(), took;
        CHECK_INT(peer_ask(&c, &m, i == 1 ? GET("/chunked/50") : GET("/length/50")), 200);
        took = peer_us() - start;
        check_where("%lld us", took);
        CHECK(took >= 195000);
        CHECK(took <= 400000);
        PEER_FIELD(&m.head, "X-Chaos-Injected", "latency");
        PEER_FIELD(&m.head, "X-Chaos-Delay-Ms", "200");
        CHECK(peer_is_pattern(&m.body, 50));
    }
    CHECK_INT(peer_report(&rig).injected[CHAOS_DELAY], 3);
    CHECK(peer_report(&rig).delay_ms >= 597 && peer_report(&rig).delay_ms <= 1200); /* as waited, in whole ms each */
    CHECK_INT(PEER_LOAD(&rig.up->requests), 3);
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

#define WAITERS 8
static void case_rollback_releases_delayed_requests(void) {
    peer_message m = no_message();
    long long start;
    peer_conn c[WAITERS];
    peer_rig rig;
    int i;
    peer_rig_start(&rig, DELAY_LONG, NULL);
    for (i = 0; i < WAITERS; i++) {
        peer_dial(&c[i], PORT(&rig));
        CHECK(peer_sends(c[i].fd, GET("/length/5")));
    }
    PEER_UNTIL(peer_report(&rig).waiting == WAITERS, PEER_MS);
    CHECK_INT(PEER_LOAD(&rig.up->received), 0); /* the delay stands before the upstream */
    start = peer_ms();
    peer_rig_config(&rig, "{\"enabled\":false}");
    for (i = 0; i < WAITERS; i++) {
        CHECK_INT(peer_read_reply(&c[i], &m, "GET"), PEER_WHOLE);
        CHECK_INT(m.status, 200);
        CHECK(peer_is_pattern(&m.body, 5));
        peer_hang_up(&c[i]);
    }
    CHECK(peer_ms() - start < 300); /* 100 ms to be released, the rest for eight replies on a busy machine */
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* As with a really slow service: the call still happens. */
static void case_client_that_leaves_does_not_cancel_the_call(void) {
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, DELAY_200, NULL);
    peer_dial(&c, PORT(&rig));
    CHECK(peer_sends(c.fd, GET("/length/5")));
    PEER_UNTIL(peer_report(&rig).waiting == 1, PEER_MS);
    peer_hang_up(&c);
    PEER_UNTIL(PEER_LOAD(&rig.up->complete) == 1, PEER_MS);
    peer_rig_stop(&rig);
}

static void case_excluded_paths_stay_healthy(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, FAIL_ALL, NULL);
    CHECK_INT(peer_get(PORT(&rig), "/healthz", &m), 200);
    PEER_FIELD(&m.head, "X-Chaos-Injected", NULL);
    peer_dial(&c, PORT(&rig));
    CHECK_INT(peer_ask(&c, &m, "GET /anything HTTP/1.1\r\nHost: a\r\nUser-Agent: kube-probe/1.30\r\n\r\n"), 200);
    CHECK_INT(peer_ask(&c, &m, GET("/anything")), 503);
    CHECK_INT(peer_report(&rig).excluded, 2);
    CHECK_INT(peer_report(&rig).injected[CHAOS_STATUS], 1);
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_dry_run_touches_nothing(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_rig_start(&rig, "{\"enabled\":true,\"dryRun\":true,\"errorRate\":100,\"expiresAt\":\"never\"}", NULL);
    CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200);
    PEER_FIELD(&m.head, "X-Chaos-Injected", NULL);
    CHECK_INT(peer_report(&rig).would_inject, 1);
    CHECK_INT(peer_report(&rig).injected[CHAOS_STATUS], 0);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_rules_see_the_real_request(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig,
                   "{\"enabled\":true,\"expiresAt\":\"never\",\"rules\":["
                   "{\"name\":\"pay\",\"match\":{\"methods\":[\"POST\"],\"paths\":[\"/pay/**\"]},\"errorRate\":100,\"errorStatus\":500},"
                   "{\"name\":\"beta\",\"match\":{\"headers\":{\"X-Beta\":\"y*\"}},\"errorRate\":100,\"errorStatus\":418}]}",
                   NULL);
    peer_dial(&c, PORT(&rig));
    CHECK_INT(peer_ask(&c, &m, "POST /pay/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"), 500);
    CHECK_INT(peer_ask(&c, &m, "POST /p%61y/1?x=/other HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"), 500);
    CHECK_INT(peer_ask(&c, &m, "POST http://b.example/pay/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"), 500);
    CHECK_INT(peer_ask(&c, &m, GET("/pay/1")), 200);
    CHECK_INT(peer_ask(&c, &m, "GET /x HTTP/1.1\r\nHost: a\r\nx-beta: yes\r\n\r\n"), 418);
    CHECK_INT(peer_ask(&c, &m, "GET /x HTTP/1.1\r\nHost: a\r\nX-Beta: no\r\n\r\n"), 200);
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* The authority of an absolute-form is the host, whatever the field says (RFC 9112 section 3.2.2). */
static void case_rules_see_the_host_of_an_absolute_form(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, "{\"enabled\":true,\"errorRate\":100,\"match\":{\"headers\":{\"host\":\"b\"}},\"expiresAt\":\"never\"}", NULL);
    peer_dial(&c, PORT(&rig));
    CHECK_INT(peer_ask(&c, &m, "GET http://b/length/1 HTTP/1.1\r\nHost: a\r\n\r\n"), 503);
    CHECK_INT(peer_ask(&c, &m, "GET http://a/length/1 HTTP/1.1\r\nHost: b\r\n\r\n"), 200);
    CHECK_INT(peer_ask(&c, &m, "GET /length/1 HTTP/1.1\r\nHost: b\r\n\r\n"), 503);
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_key_header_repeats_the_verdict(void) {
    chaos_proxy_desc d = no_desc();
    peer_message m = no_message();
    int key, seen[2] = {0, 0};
    peer_rig rig;
    peer_conn c;
    d.key_header = "X-Request-Id";
    peer_rig_start(&rig, "{\"enabled\":true,\"errorRate\":50,\"seed\":1,\"expiresAt\":\"never\"}", &d);
    peer_dial(&c, PORT(&rig));
    for (key = 0; key < 20; key++) {
        char request[128];
        int first, i;
        snprintf(request, sizeof request, "GET /length/1 HTTP/1.1\r\nHost: a\r\nX-Request-Id: order-%d\r\n\r\n", key);
        first = peer_ask(&c, &m, request);
        for (i = 0; i < 4; i++) CHECK_INT(peer_ask(&c, &m, request), first);
        seen[first == 503]++;
    }
    CHECK(seen[0] > 2 && seen[1] > 2); /* both verdicts did occur: 2^-19 each of failing by chance, and the seed is fixed */
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* ---- the socket faults ---- */

static void fault_config(peer_rig *rig, const char *mode, const char *when) {
    char json[200];
    snprintf(json, sizeof json, "{\"enabled\":true,\"errorRate\":100,\"errorMode\":\"%s\",\"errorWhen\":\"%s\",\"expiresAt\":\"never\"}",
             mode, when);
    peer_rig_config(rig, json);
}

static void case_reset_and_close_break_the_connection(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    int after;
    peer_rig_start(&rig, "{}", NULL);
    for (after = 0; after < 2; after++) {
        check_where("%s", after ? "after" : "before");
        fault_config(&rig, "reset", after ? "after" : "before");
        peer_dial(&c, PORT(&rig));
        peer_ask(&c, &m, GET("/length/5"));
        CHECK_INT(m.end, PEER_RESET);
        CHECK_INT(c.in.len, 0); /* not a byte of a reply */
        peer_hang_up(&c);
        fault_config(&rig, "close", after ? "after" : "before");
        peer_dial(&c, PORT(&rig));
        peer_ask(&c, &m, "POST /length/5 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello");
        CHECK_INT(m.end, PEER_NONE); /* a FIN, also behind a request body */
        peer_hang_up(&c);
        CHECK_INT(PEER_LOAD(&rig.up->complete), 2 * after); /* before: never asked; after: once each */
    }
    CHECK_INT(peer_report(&rig).injected[CHAOS_RESET], 2);
    CHECK_INT(peer_report(&rig).injected[CHAOS_CLOSE], 2);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_hang_holds_until_chaos_goes_off(void) {
    peer_message m = no_message();
    peer_conn held, leaver;
    long long start;
    peer_rig rig;
    peer_rig_start(&rig, "{}", NULL);
    fault_config(&rig, "hang", "before");
    peer_dial(&held, PORT(&rig));
    peer_dial(&leaver, PORT(&rig));
    CHECK(peer_sends(held.fd, GET("/length/5")) && peer_sends(leaver.fd, GET("/length/6")));
    PEER_UNTIL(peer_report(&rig).injected[CHAOS_HANG] == 2, PEER_MS);
    CHECK(peer_silent(&held, 100));
    peer_hang_up(&leaver); /* who leaves frees its thread */
    PEER_UNTIL(peer_report(&rig).connections_now == 1, 1000);
    CHECK_INT(PEER_LOAD(&rig.up->received), 0);
    start = peer_ms();
    peer_rig_config(&rig, "{}");
    CHECK_INT(peer_read_reply(&held, &m, "GET"), PEER_WHOLE); /* the request goes on as if nothing had been */
    CHECK(peer_is_pattern(&m.body, 5));
    CHECK(peer_ms() - start < 300);
    peer_hang_up(&held);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_after_runs_the_upstream_once_and_replaces_its_reply(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    int i;
    peer_rig_start(&rig, "{}", NULL);
    fault_config(&rig, "status", "after");
    peer_dial(&c, PORT(&rig));
    for (i = 1; i <= 3; i++) {
        CHECK_INT(peer_ask(&c, &m, i == 2 ? GET("/chunked/70000") : GET("/length/70000")), 503);
        PEER_FIELD(&m.head, "X-Chaos-Injected", "error");
        PEER_FIELD(&m.head, "X-Upstream", NULL);
        CHECK_INT(PEER_LOAD(&rig.up->complete), i);
    }
    peer_rig_config(&rig, "{}");
    CHECK_INT(peer_ask(&c, &m, GET("/length/8")), 200); /* no rest of a thrown away reply in the way */
    CHECK(peer_is_pattern(&m.body, 8));
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_bandwidth_paces_the_body(void) {
    peer_message m = no_message();
    long long start;
    peer_rig rig;
    peer_conn c;
    peer_rig_start(&rig, "{\"enabled\":true,\"bandwidth\":200,\"expiresAt\":\"never\"}", NULL);
    peer_dial(&c, PORT(&rig));
    start = peer_ms();
    CHECK_INT(peer_ask(&c, &m, GET("/length/81920")), 200); /* 80 KiB at 200 KiB/s: 0.4 s */
    CHECK(peer_is_pattern(&m.body, 81920));
    CHECK(peer_fields(&m.head, "X-Chaos-Injected") == 1);
    check_where("%lld ms", peer_ms() - start);
    CHECK(peer_ms() - start >= 300 && peer_ms() - start < 800);
    CHECK(peer_sends(c.fd, GET("/length/2000000"))); /* 10 s; rolled back meanwhile: the rest comes at once */
    PEER_UNTIL(peer_report(&rig).waiting == 1, PEER_MS);
    start = peer_ms();
    peer_rig_config(&rig, "{}");
    CHECK_INT(peer_read_reply(&c, &m, "GET"), PEER_WHOLE);
    CHECK(peer_is_pattern(&m.body, 2000000));
    CHECK(peer_ms() - start < 1000);
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* ---- limits, hostile clients ---- */

#define LIMIT 4
static void case_connection_limit_holds_and_the_rest_waits(void) {
    chaos_proxy_desc d = no_desc();
    peer_message m = no_message();
    peer_conn in[LIMIT], extra;
    peer_rig rig;
    int i;
    d.max_connections = LIMIT;
    peer_rig_start(&rig, "{}", &d);
    for (i = 0; i < LIMIT; i++) { /* each with a request in progress */
        peer_dial(&in[i], PORT(&rig));
        CHECK(peer_sends(in[i].fd, "POST /hash HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n"));
    }
    PEER_UNTIL(peer_report(&rig).connections_now == LIMIT, PEER_MS);
    peer_dial(&extra, PORT(&rig)); /* into the backlog: accepted by the kernel, served by nobody yet */
    CHECK(peer_sends(extra.fd, GET("/length/8")));
    CHECK(peer_silent(&extra, 150));
    CHECK_INT(peer_report(&rig).connections_now, LIMIT);
    CHECK(peer_sends(in[0].fd, "hi")); /* one ends and leaves */
    CHECK_INT(peer_read_reply(&in[0], &m, "POST"), PEER_WHOLE);
    peer_hang_up(&in[0]);
    CHECK_INT(peer_read_reply(&extra, &m, "GET"), PEER_WHOLE);
    CHECK(peer_is_pattern(&m.body, 8));
    for (i = 1; i < LIMIT; i++) { /* nobody's request got lost meanwhile */
        CHECK(peer_sends(in[i].fd, "hi"));
        CHECK_INT(peer_read_reply(&in[i], &m, "POST"), PEER_WHOLE);
        peer_hang_up(&in[i]);
    }
    peer_hang_up(&extra);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

typedef struct crowd {
    int port, number, good;
} crowd;
static void *crowd_member(void *arg) {
    crowd *me = (crowd *)arg;
    peer_message m = no_message();
    peer_conn c;
    int i;
    peer_dial(&c, me->port);
    for (i = 0; i < 25; i++) { /* sizes that tell every reply of every client apart */
        size_t n = (size_t)(me->number * 100 + i);
        char request[128];
        snprintf(request, sizeof request, "GET /%s/%zu HTTP/1.1\r\nHost: a\r\n\r\n", i % 2 ? "chunked" : "length", n);
        if (peer_ask(&c, &m, request) == 200 && peer_is_pattern(&m.body, n)) me->good++;
    }
    peer_hang_up(&c);
    peer_message_free(&m);
    return NULL;
}

#define CROWD 32
static void case_many_clients_at_once_get_their_own_replies(void) {
    crowd members[CROWD];
    pthread_t threads[CROWD];
    peer_rig rig;
    int i;
    peer_rig_start(&rig, "{}", NULL);
    for (i = 0; i < CROWD; i++) {
        members[i].port = PORT(&rig);
        members[i].number = i;
        members[i].good = 0;
        if (pthread_create(&threads[i], NULL, crowd_member, &members[i])) abort();
    }
    for (i = 0; i < CROWD; i++) {
        pthread_join(threads[i], NULL);
        check_where("client %d", i);
        CHECK_INT(members[i].good, 25);
    }
    CHECK(PEER_LOAD(&rig.up->accepts) <= CROWD);
    PEER_UNTIL(peer_report(&rig).proxied == CROWD * 25, PEER_MS);
    peer_rig_stop(&rig);
}

static void case_garbage_and_half_heads_harm_nobody(void) {
    static const char *const halves[] = {"", "G", "GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nHost: a\r\n", "\r\n", "GET / HTTP/1.1\r\nHost"};
    peer_message m = no_message();
    unsigned long long roll = 88172645463325252ull;
    peer_rig rig;
    int i, j;
    peer_rig_start(&rig, "{}", NULL);
    for (i = 0; i < 150; i++) {
        char junk[200];
        peer_conn c;
        peer_dial(&c, PORT(&rig));
        for (j = 0; j < 200; j++) {
            roll ^= roll << 13;
            roll ^= roll >> 7;
            roll ^= roll << 17;
            junk[j] = (char)(roll >> 24);
        }
        if (i % 3 == 0) (void)!peer_send(c.fd, junk, sizeof junk);
        else (void)!peer_sends(c.fd, halves[i % 6]);
        if (i % 2) peer_reset(c.fd), c.fd = -1;
        peer_hang_up(&c);
    }
    PEER_UNTIL(peer_report(&rig).connections_now == 0, PEER_MS);
    CHECK_INT(PEER_LOAD(&rig.up->received), 0);
    CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* ---- start and stop ---- */

static void case_listening_tells_the_address_once(void) {
    char want[64];
    peer_rig rig;
    peer_rig_start(&rig, "{}", NULL);
    snprintf(want, sizeof want, "127.0.0.1:%d", PORT(&rig));
    CHECK_STR(rig.proxy.address, want);
    CHECK_INT(PEER_LOAD(&rig.proxy.told), 1);
    peer_rig_stop(&rig);
}

static void case_listens_on_ipv6(void) {
    chaos_proxy_desc d = no_desc();
    struct sockaddr_in6 a;
    peer_rig rig;
    int fd = socket(AF_INET6, SOCK_STREAM, 0);
    peer_message m = no_message();
    peer_conn c;
    memset(&a, 0, sizeof a);
    a.sin6_family = AF_INET6;
    a.sin6_addr = in6addr_loopback;
    if (fd < 0 || bind(fd, (struct sockaddr *)&a, sizeof a)) {
        if (fd >= 0) close(fd);
        check_skip("no IPv6 loopback on this machine");
        return;
    }
    close(fd);
    d.listen = "[::1]:0";
    peer_rig_start(&rig, "{}", &d);
    CHECK(!strncmp(rig.proxy.address, "[::1]:", 6));
    memset(&c, 0, sizeof c);
    c.fd = socket(AF_INET6, SOCK_STREAM, 0);
    a.sin6_port = htons((unsigned short)PORT(&rig));
    CHECK(connect(c.fd, (struct sockaddr *)&a, sizeof a) == 0);
    CHECK_INT(peer_ask(&c, &m, GET("/echo")), 200);
    CHECK(strstr(peer_text(&m.body), "::1") != NULL);
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void check_bad_desc(peer_rig *rig, chaos_proxy_desc d, chaos_result want, const char *word) {
    peer_proxy p;
    check_where("listen %s upstream %s", d.listen ? d.listen : "-", d.upstream ? d.upstream : "-");
    if (!CHECK(!peer_proxy_start(&p, rig->c, &d))) { /* it listens in spite of that: end it */
        chaos_proxy_stop(rig->c);
        peer_proxy_join(&p, PEER_MS);
        return;
    }
    CHECK_INT(p.result, want);
    CHECK_INT(p.err.code, want);
    CHECK(p.err.text[0] && strstr(p.err.text, word) != NULL);
}

static void case_bad_descs_are_named(void) {
    static const char *const bad_listen[] = {"127.0.0.1:70000", "127.0.0.1:x", "[::1", "127.0.0.1:-1", "127.0.0.1:"};
    static const char *const bad_upstream[] = {"",           "127.0.0.1:80",       "http://",
                                               "http://:80", "http://127.0.0.1:0", "http://127.0.0.1:99999",
                                               "http://a b/"};
    chaos_proxy_desc good = no_desc(), d;
    peer_rig rig;
    size_t i;
    int port, busy;
    char address[64];
    peer_rig_open(&rig, "{}");
    good.upstream = "http://127.0.0.1:9";
    for (i = 0; i < sizeof bad_listen / sizeof *bad_listen; i++) {
        d = good;
        d.listen = bad_listen[i];
        check_bad_desc(&rig, d, CHAOS_ERR_ADDRESS, "");
    }
    for (i = 0; i < sizeof bad_upstream / sizeof *bad_upstream; i++) {
        d = good;
        d.upstream = bad_upstream[i];
        check_bad_desc(&rig, d, CHAOS_ERR_ADDRESS, "");
    }
    d = good;
    d.upstream = NULL;
    check_bad_desc(&rig, d, CHAOS_ERR_ARGUMENT, "upstream");
    d.upstream = "https://127.0.0.1";
    check_bad_desc(&rig, d, CHAOS_ERR_UNSUPPORTED, "TLS");
    d = good;
    d.head_limit = 100;
    check_bad_desc(&rig, d, CHAOS_ERR_RANGE, "head_limit");
    d = good;
    d.max_connections = -1;
    check_bad_desc(&rig, d, CHAOS_ERR_RANGE, "max_connections");
    busy = peer_listen(&port, 1);
    snprintf(address, sizeof address, "127.0.0.1:%d", port);
    d = good;
    d.listen = address;
    check_bad_desc(&rig, d, CHAOS_ERR_SYSTEM, "listen on");
    close(busy);
    CHECK_INT(chaos_proxy_run(NULL, &good, NULL), CHAOS_ERR_ARGUMENT);
    CHECK_INT(chaos_proxy_run(rig.c, NULL, NULL), CHAOS_ERR_ARGUMENT);
    peer_rig_stop(&rig);
}

static void case_one_run_at_a_time(void) {
    chaos_proxy_desc d = no_desc();
    peer_message m = no_message();
    peer_proxy second;
    peer_rig rig;
    peer_rig_start(&rig, "{}", NULL);
    d.upstream = rig.upstream_url;
    if (CHECK(!peer_proxy_start(&second, rig.c, &d))) {
        CHECK_INT(second.result, CHAOS_ERR_ARGUMENT);
        CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200); /* the first one goes on */
    } else {                                                   /* both listen to the same stop: end both */
        chaos_proxy_stop(rig.c);
        peer_proxy_join(&second, PEER_MS);
    }
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_stop_drains_what_is_in_progress(void) {
    peer_message m = no_message();
    peer_conn delayed, slow, idle, fresh;
    long long start;
    peer_rig rig;
    int fd;
    peer_rig_start(&rig, "{\"enabled\":true,\"latency\":300,\"match\":{\"paths\":[\"/length/*\"]},\"expiresAt\":\"never\"}", NULL);
    peer_dial(&delayed, PORT(&rig));
    peer_dial(&slow, PORT(&rig));
    peer_dial(&idle, PORT(&rig));
    peer_dial(&fresh, PORT(&rig));
    CHECK_INT(peer_ask(&idle, &m, GET("/slow/0")), 200);
    CHECK(peer_sends(slow.fd, GET("/slow/400")));
    CHECK(peer_sends(delayed.fd, GET("/length/5")));
    PEER_UNTIL(peer_report(&rig).waiting == 1 && PEER_LOAD(&rig.up->requests) == 2, PEER_MS);
    PEER_UNTIL(peer_report(&rig).connections_now == 4, PEER_MS);
    start = peer_ms();
    chaos_proxy_stop(rig.c);
    CHECK(peer_silent(&idle, 100));
    CHECK_INT(peer_ask(&idle, &m, GET("/slow/0")), 200); /* it was on its way when the stop came */
    PEER_FIELD(&m.head, "Connection", "close");
    CHECK(peer_closes(&idle, PEER_MS));
    fd = peer_connect(PORT(&rig)); /* nobody listens any more */
    CHECK(fd < 0);
    if (fd >= 0) close(fd);
    CHECK_INT(peer_read_reply(&delayed, &m, "GET"), PEER_WHOLE);
    CHECK(peer_is_pattern(&m.body, 5));
    PEER_FIELD(&m.head, "Connection", "close");
    CHECK_INT(peer_read_reply(&slow, &m, "GET"), PEER_WHOLE);
    CHECK_STR(peer_text(&m.body), "slow");
    CHECK(peer_closes(&slow, PEER_MS));
    CHECK(peer_closes(&fresh, 1500)); /* it has asked for nothing in a second */
    peer_proxy_join(&rig.proxy, 2000);
    CHECK(peer_ms() - start < 2500); /* it does not sit out its drain time */
    CHECK_INT(rig.proxy.result, CHAOS_OK);
    rig.proxy.port = 0; /* joined */
    peer_hang_up(&delayed);
    peer_hang_up(&slow);
    peer_hang_up(&idle);
    peer_hang_up(&fresh);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* Far more than there are workers for, each with a slow request, in progress, parked or in the backlog when the stop comes. */
#define ASKED 100
static void case_stop_serves_all_who_have_asked(void) {
    peer_message m = no_message();
    peer_conn c[ASKED];
    peer_rig rig;
    int i;
    peer_rig_start(&rig, "{}", NULL);
    for (i = 0; i < ASKED; i++) {
        peer_dial(&c[i], PORT(&rig));
        CHECK(peer_sends(c[i].fd, GET("/slow/400")));
    }
    chaos_proxy_stop(rig.c);
    for (i = 0; i < ASKED; i++) {
        check_where("client %d", i);
        CHECK_INT(peer_read_reply(&c[i], &m, "GET"), PEER_WHOLE);
        CHECK_STR(peer_text(&m.body), "slow");
        peer_hang_up(&c[i]);
    }
    peer_proxy_join(&rig.proxy, PEER_MS);
    rig.proxy.port = 0; /* joined */
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* A close with unread input would be a reset, which destroys what the client has not read yet. */
static void case_input_behind_the_last_request_costs_no_reply(void) {
    static const char *const last[] = {
        "GET /length/400000 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        "POST /length/400000 HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 1\r\n\r\nx",
        "GET /length/400000 HTTP/1.0\r\nHost: a\r\n\r\n",
    };
    peer_message m = no_message();
    size_t i;
    peer_rig rig;
    peer_rig_start(&rig, "{\"enabled\":true,\"latency\":400,\"expiresAt\":\"never\"}", NULL); /* it comes before the reply does */
    for (i = 0; i < sizeof last / sizeof *last; i++) {
        const int small = 20000;
        peer_conn c;
        check_where("%s", last[i]);
        peer_dial(&c, PORT(&rig));
        setsockopt(c.fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
        CHECK(peer_sends(c.fd, last[i]));
        peer_nap(20);
        CHECK(peer_sends(c.fd, "\r\n" GET("/length/1"))); /* nobody will read that */
        peer_nap(600);
        CHECK_INT(peer_read_reply(&c, &m, "GET"), PEER_WHOLE);
        CHECK(peer_is_pattern(&m.body, 400000));
        peer_hang_up(&c);
    }
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void check_forced_end(int drain, int least, int most) {
    chaos_proxy_desc d = no_desc();
    peer_message m = no_message();
    peer_conn silent, half, delayed;
    long long start;
    peer_rig rig;
    check_where("drain_timeout %d", drain);
    d.drain_timeout = drain;
    peer_rig_start(&rig, "{\"enabled\":true,\"latency\":60000,\"match\":{\"paths\":[\"/length/*\"]},\"expiresAt\":\"never\"}", &d);
    peer_dial(&delayed, PORT(&rig));
    CHECK(peer_sends(delayed.fd, GET("/length/5")));
    PEER_UNTIL(peer_report(&rig).waiting == 1, PEER_MS);
    peer_dial(&silent, PORT(&rig));
    peer_dial(&half, PORT(&rig));
    CHECK(peer_sends(silent.fd, GET("/silent")));
    CHECK(peer_sends(half.fd, "POST /hash HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nx"));
    PEER_UNTIL(PEER_LOAD(&rig.up->requests) == 2, PEER_MS);
    start = peer_ms();
    chaos_proxy_stop(rig.c);
    peer_proxy_join(&rig.proxy, PEER_MS);
    CHECK(peer_ms() - start >= least);
    CHECK(peer_ms() - start <= most);
    CHECK_INT(rig.proxy.result, CHAOS_OK);
    rig.proxy.port = 0;
    peer_read_reply(&silent, &m, "GET"); /* cut off, or told: never a 200 */
    CHECK(m.end != PEER_LATE && m.status != 200);
    peer_hang_up(&silent);
    peer_hang_up(&delayed);
    peer_hang_up(&half);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_forced_end_after_the_drain_time(void) {
    check_forced_end(200, 190, 900);
    check_forced_end(-1, 0, 400);
}

static void case_stop_before_run_is_not_lost(void) {
    chaos_proxy_desc d = no_desc();
    long long start;
    peer_message m = no_message();
    peer_rig rig;
    peer_rig_open(&rig, "{}");
    rig.up = peer_upstream_start();
    snprintf(rig.upstream_url, sizeof rig.upstream_url, "http://127.0.0.1:%d", rig.up->port);
    d.upstream = rig.upstream_url;
    chaos_proxy_stop(rig.c);
    start = peer_ms();
    CHECK_INT(chaos_proxy_run(rig.c, &d, NULL), CHAOS_OK);
    CHECK(peer_ms() - start < 1000);
    CHECK(peer_proxy_start(&rig.proxy, rig.c, &d)); /* it ended that run only: the next one serves */
    CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200);
    chaos_proxy_stop(rig.c);
    peer_proxy_join(&rig.proxy, PEER_MS);
    CHECK(peer_proxy_start(&rig.proxy, rig.c, &d)); /* and again after a stop */
    CHECK_INT(peer_get(PORT(&rig), "/length/5", &m), 200);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* Everything a busy life can leave behind, then the books must balance. */
static void busy_life(void) {
    static const char *const paths[] = {"/length/100", "/chunked/100", "/close/100", "/204", "/garbage", "/half-head",
                                        "/cut-length", "/cut-chunked", "/die",       "/bye", "/stray"};
    peer_message m = no_message();
    peer_conn half, keep;
    peer_rig rig;
    size_t i;
    peer_rig_start(&rig, "{\"enabled\":true,\"errorRate\":20,\"latency\":2,\"expiresAt\":\"never\"}", NULL);
    for (i = 0; i < 5 * sizeof paths / sizeof *paths; i++) peer_get(PORT(&rig), paths[i % (sizeof paths / sizeof *paths)], &m);
    peer_dial(&half, PORT(&rig));
    peer_dial(&keep, PORT(&rig));
    CHECK(peer_sends(half.fd, "GET / HT"));
    peer_ask(&keep, &m, GET("/length/1"));
    CHECK(peer_report(&rig).injected[CHAOS_STATUS] > 0 && peer_report(&rig).injected[CHAOS_DELAY] > 0);
    chaos_proxy_stop(rig.c);
    peer_hang_up(&half);
    peer_hang_up(&keep);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_no_descriptor_or_thread_is_left(void) {
    int fds = peer_fds(), threads = peer_threads();
    busy_life();
    PEER_UNTIL(peer_threads() == threads, 1000); /* joined threads may linger in /proc for a moment */
    CHECK_INT(peer_fds(), fds);
    CHECK_INT(peer_threads(), threads);
}

int main(int argc, char **argv) {
    check_begin(argc, argv);
    peer_watchdog(180);
    CHECK_RUN(case_keep_alive_on_both_sides);
    CHECK_RUN(case_pipelined_requests_keep_their_order);
    CHECK_RUN(case_reply_bodies_arrive_byte_for_byte);
    CHECK_RUN(case_request_bodies_arrive_byte_for_byte);
    CHECK_RUN(case_both_directions_stream_at_once);
    CHECK_RUN(case_replies_without_a_body_keep_their_fields);
    CHECK_RUN(case_interim_replies_pass);
    CHECK_RUN(case_expect_100_continue);
    CHECK_RUN(case_early_final_reply_reaches_the_client);
    CHECK_RUN(case_trailers_do_not_disturb);
    CHECK_RUN(case_off_means_the_same_bytes);
    CHECK_RUN(case_hop_by_hop_fields_end_here);
    CHECK_RUN(case_via_and_forwarded_fields_are_added);
    CHECK_RUN(case_forwarded_chain_is_kept);
    CHECK_RUN(case_host_rewritten_on_request);
    CHECK_RUN(case_absolute_form_becomes_origin_form);
    CHECK_RUN(case_upstream_prefix);
    CHECK_RUN(case_http10_client);
    CHECK_RUN(case_client_may_half_close);
    CHECK_RUN(case_bad_heads_are_refused_and_closed);
    CHECK_RUN(case_refused_client_can_read_why);
    CHECK_RUN(case_slow_head_is_408);
    CHECK_RUN(case_idle_connections_end_silently);
    CHECK_RUN(case_stalled_request_body_ends);
    CHECK_RUN(case_upstream_down_is_502);
    CHECK_RUN(case_upstream_that_answers_nonsense_is_502);
    CHECK_RUN(case_silent_upstream_is_504);
    CHECK_RUN(case_connect_timeout_is_504);
    CHECK_RUN(case_cut_replies_look_cut);
    CHECK_RUN(case_get_is_retried_once_on_a_stale_socket);
    CHECK_RUN(case_post_is_never_retried);
    CHECK_RUN(case_closed_pooled_socket_is_not_used);
    CHECK_RUN(case_post_gets_no_socket_that_idled_half_a_second);
    CHECK_RUN(case_stray_bytes_poison_nobody);
    CHECK_RUN(case_injected_status);
    CHECK_RUN(case_every_injected_status_is_framed);
    CHECK_RUN(case_injected_reply_reads_the_body);
    CHECK_RUN(case_injected_reply_to_a_large_body_closes_cleanly);
    CHECK_RUN(case_injected_reply_to_a_stalled_body_comes_in_time);
    CHECK_RUN(case_injected_reply_to_expect_is_final);
    CHECK_RUN(case_delay_is_exact_and_marked);
    CHECK_RUN(case_rollback_releases_delayed_requests);
    CHECK_RUN(case_client_that_leaves_does_not_cancel_the_call);
    CHECK_RUN(case_excluded_paths_stay_healthy);
    CHECK_RUN(case_dry_run_touches_nothing);
    CHECK_RUN(case_rules_see_the_real_request);
    CHECK_RUN(case_rules_see_the_host_of_an_absolute_form);
    CHECK_RUN(case_key_header_repeats_the_verdict);
    CHECK_RUN(case_reset_and_close_break_the_connection);
    CHECK_RUN(case_hang_holds_until_chaos_goes_off);
    CHECK_RUN(case_after_runs_the_upstream_once_and_replaces_its_reply);
    CHECK_RUN(case_bandwidth_paces_the_body);
    CHECK_RUN(case_connection_limit_holds_and_the_rest_waits);
    CHECK_RUN(case_many_clients_at_once_get_their_own_replies);
    CHECK_RUN(case_garbage_and_half_heads_harm_nobody);
    CHECK_RUN(case_listening_tells_the_address_once);
    CHECK_RUN(case_listens_on_ipv6);
    CHECK_RUN(case_bad_descs_are_named);
    CHECK_RUN(case_one_run_at_a_time);
    CHECK_RUN(case_stop_drains_what_is_in_progress);
    CHECK_RUN(case_stop_serves_all_who_have_asked);
    CHECK_RUN(case_input_behind_the_last_request_costs_no_reply);
    CHECK_RUN(case_forced_end_after_the_drain_time);
    CHECK_RUN(case_stop_before_run_is_not_lost);
    CHECK_RUN(case_no_descriptor_or_thread_is_left);
    return check_end();
}

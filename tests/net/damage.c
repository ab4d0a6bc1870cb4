/* Truncated and corrupted replies, byte for byte: which bytes, how the end looks, and that the connection stays in step. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

#include "../check.h"
#include "peer.h"

#define DAMAGE(mode) "{\"enabled\":true,\"errorRate\":100,\"errorMode\":\"" mode "\",\"expiresAt\":\"never\"}"

static const size_t sizes[] = {0, 1, 2, 63, 64, 65, 70000};
static const char *const ways[] = {"length", "chunked", "close"};
#define SIZES (sizeof sizes / sizeof *sizes)

static void ask_for(peer_conn *c, peer_message *m, const char *way, size_t n, const char *version) {
    char request[128];
    snprintf(request, sizeof request, "GET /%s/%zu HTTP/%s\r\nHost: a\r\n\r\n", way, n, version);
    check_where("%s %zu to HTTP/%s", way, n, version);
    peer_ask(c, m, request);
    CHECK_INT(m->status, 200);
}

/* The first bytes of the pattern. */
static bool is_prefix(const peer_bytes *b) { return b->len == 0 || peer_is_pattern(b, b->len); }

/* One byte in 64 inverted, from the first on. */
static bool is_corrupted(const peer_bytes *b, size_t n) {
    size_t i;
    if (b->len != n) return false;
    for (i = 0; i < n; i++)
        if ((unsigned char)b->data[i] != (peer_pattern(i) ^ (i % 64 ? 0 : 255u))) return false;
    return true;
}

static void check_truncated(peer_rig *rig, const char *way, size_t n, const char *version) {
    bool has_end = strcmp(way, "close") && (!strcmp(way, "length") || !strcmp(version, "1.1")); /* framing that tells of the cut */
    unsigned long long skipped = peer_report(rig).skipped;
    bool spared = n == 0 && !strcmp(way, "length");
    peer_message m = no_message();
    peer_conn c;
    peer_dial(&c, PORT(rig));
    ask_for(&c, &m, way, n, version);
    CHECK_INT(peer_report(rig).skipped - skipped, spared);
    if (spared) {
        CHECK_INT(m.end, PEER_WHOLE);
        PEER_FIELD(&m.head, "X-Chaos-Injected", NULL);
    } else {
        PEER_FIELD(&m.head, "X-Chaos-Injected", "truncate");
        if (n) CHECK(has_end ? m.end == PEER_CUT : m.end == PEER_RESET);
        if (n) CHECK(is_prefix(&m.body) && m.body.len < n);
        if (n && !strcmp(way, "length")) CHECK_INT(m.body.len, n / 2);
        CHECK(n == 0 || m.end == PEER_RESET || peer_closes(&c, PEER_MS));
    }
    peer_hang_up(&c);
    peer_message_free(&m);
}

static void case_truncated_bodies_of_every_size(void) {
    peer_message m = no_message();
    peer_rig rig;
    size_t i, w;
    peer_rig_start(&rig, DAMAGE("truncate"), NULL);
    for (w = 0; w < 3; w++)
        for (i = 0; i < SIZES; i++) {
            check_truncated(&rig, ways[w], sizes[i], "1.1");
            check_truncated(&rig, ways[w], sizes[i], "1.0");
        }
    CHECK_INT(peer_report(&rig).injected[CHAOS_TRUNCATE], 6 * SIZES);
    peer_rig_config(&rig, "{\"enabled\":false}");
    check_where("off again");
    for (i = 0; i < 5; i++) { /* no upstream connection with half a reply in it is used again */
        CHECK_INT(peer_get(PORT(&rig), "/length/100", &m), 200);
        CHECK(peer_is_pattern(&m.body, 100));
    }
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* What was pipelined behind it is never answered: nobody could tell where its reply begins. */
static void case_truncate_ends_the_connection(void) {
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    int i;
    peer_rig_start(&rig, DAMAGE("truncate"), NULL);
    for (i = 0; i < 2; i++) {
        check_where("%s", i ? "chunked" : "length");
        peer_dial(&c, PORT(&rig));
        peer_ask(&c, &m, i ? GET("/chunked/1000") GET("/echo") : GET("/length/1000") GET("/echo"));
        CHECK(m.end == PEER_CUT || m.end == PEER_RESET);
        CHECK(!strstr(peer_text(&m.body), "HTTP/1.1"));
        peer_hang_up(&c);
    }
    CHECK_INT(PEER_LOAD(&rig.up->requests), 2);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

static void case_corrupted_bodies_of_every_size(void) {
    unsigned long long skipped = 0;
    peer_rig rig;
    size_t i, w, v;
    peer_rig_start(&rig, DAMAGE("corrupt"), NULL);
    for (v = 0; v < 2; v++)
        for (w = 0; w < 3; w++) {
            peer_message m = no_message();
            peer_conn c;
            c.fd = -1;
            for (i = 0; i < SIZES; i++) {
                if (c.fd < 0) peer_dial(&c, PORT(&rig));
                ask_for(&c, &m, ways[w], sizes[i], v ? "1.0" : "1.1");
                CHECK_INT(m.end, PEER_WHOLE);
                CHECK(is_corrupted(&m.body, sizes[i]));
                CHECK(w != 0 || !m.to_close); /* its framing is kept */
                CHECK(w != 1 || m.chunked == !v);
                skipped += w == 0 && sizes[i] == 0;
                if (v || w == 2) peer_hang_up(&c); /* else all on one connection */
            }
            peer_hang_up(&c);
            peer_message_free(&m);
        }
    CHECK_INT(peer_report(&rig).skipped, skipped);
    CHECK_INT(peer_report(&rig).injected[CHAOS_CORRUPT], 6 * SIZES);
    peer_rig_stop(&rig);
}

/* `n` bytes of the pattern in chunks of `each`; the count runs on from chunk to chunk. */
static void tiny_chunks(peer_rig *rig, size_t n, size_t each) {
    peer_bytes raw = {NULL, 0, 0};
    size_t at;
    peer_adds(&raw, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
    for (at = 0; at < n; at += each) {
        char line[32];
        size_t size = each < n - at ? each : n - at, i;
        snprintf(line, sizeof line, "%zx\r\n", size);
        peer_adds(&raw, line);
        for (i = at; i < at + size; i++) {
            unsigned char byte = peer_pattern(i);
            peer_add(&raw, &byte, 1);
        }
        peer_adds(&raw, "\r\n");
    }
    peer_adds(&raw, "0\r\nX-Sum: 1\r\n\r\n");
    peer_raw(rig->up, &raw, false);
    peer_free(&raw);
}

static void case_many_tiny_chunks(void) {
    static const size_t each[] = {1, 2, 7, 63, 64, 65};
    static const size_t totals[] = {1, 65, 5000, 40000};
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    size_t i, t;
    peer_rig_start(&rig, DAMAGE("corrupt"), NULL);
    peer_dial(&c, PORT(&rig));
    for (t = 0; t < 4; t++)
        for (i = 0; i < sizeof each / sizeof *each; i++) {
            check_where("%zu bytes in chunks of %zu", totals[t], each[i]);
            tiny_chunks(&rig, totals[t], each[i]);
            CHECK_INT(peer_ask(&c, &m, GET("/raw")), 200);
            CHECK(is_corrupted(&m.body, totals[t]));
        }
    peer_rig_config(&rig, DAMAGE("truncate"));
    for (t = 0; t < 4; t++)
        for (i = 0; i < sizeof each / sizeof *each; i++) {
            check_where("%zu bytes in chunks of %zu, truncated", totals[t], each[i]);
            peer_hang_up(&c);
            peer_dial(&c, PORT(&rig));
            tiny_chunks(&rig, totals[t], each[i]);
            peer_ask(&c, &m, GET("/raw"));
            CHECK_INT(m.end, PEER_CUT);
            CHECK(is_prefix(&m.body) && m.body.len < totals[t]);
        }
    peer_hang_up(&c);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

/* Replies with and without a body, all asked for at once. */
static void case_pipelined_requests_behind_corrupt_ones_stay_in_step(void) {
    static const struct {
        const char *method, *path;
        int status, n;
    } all[] = {{"GET", "/length/64", 200, 64},
               {"HEAD", "/length/64", 200, -1},
               {"GET", "/chunked/65", 200, 65},
               {"GET", "/204", 204, -1},
               {"GET", "/304", 304, -1},
               {"GET", "/length/0", 200, 0},
               {"POST", "/length/70000", 200, 70000},
               {"GET", "/chunked/1", 200, 1},
               {"GET", "/length/2", 200, 2}};
    peer_bytes out = {NULL, 0, 0};
    peer_message m = no_message();
    peer_rig rig;
    peer_conn c;
    size_t i, count = sizeof all / sizeof *all;
    peer_rig_start(&rig, DAMAGE("corrupt"), NULL);
    for (i = 0; i < count; i++) {
        char request[128];
        snprintf(request, sizeof request, "%s %s HTTP/1.1\r\nHost: a\r\n%s", all[i].method, all[i].path,
                 strcmp(all[i].method, "POST") ? "\r\n" : "Content-Length: 3\r\n\r\nabc");
        peer_adds(&out, request);
    }
    peer_dial(&c, PORT(&rig));
    CHECK(peer_send(c.fd, out.data, out.len));
    for (i = 0; i < count; i++) {
        check_where("%s %s", all[i].method, all[i].path);
        CHECK_INT(peer_read_reply(&c, &m, all[i].method), PEER_WHOLE);
        CHECK_INT(m.status, all[i].status);
        if (all[i].n >= 0) CHECK(is_corrupted(&m.body, (size_t)all[i].n));
        PEER_FIELD(&m.head, "X-Chaos-Injected", all[i].n > 0 ? "corrupt" : NULL);
    }
    CHECK_INT(peer_report(&rig).skipped, 4);
    peer_hang_up(&c);
    peer_free(&out);
    peer_message_free(&m);
    peer_rig_stop(&rig);
}

int main(int argc, char **argv) {
    check_begin(argc, argv);
    peer_watchdog(180);
    CHECK_RUN(case_truncated_bodies_of_every_size);
    CHECK_RUN(case_truncate_ends_the_connection);
    CHECK_RUN(case_corrupted_bodies_of_every_size);
    CHECK_RUN(case_many_tiny_chunks);
    CHECK_RUN(case_pipelined_requests_behind_corrupt_ones_stay_in_step);
    return check_end();
}

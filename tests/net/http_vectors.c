/* The HTTP cases of tests/vectors/http: first against the parsers alone, every input laid against an unreadable page and
   fed in pieces; then over real sockets through a proxy. The file format stands in tests/vectors/http/README.txt. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

#include "../check.h"
#include "peer.h"

#include <sys/mman.h>

#define MAX_LINES 12

typedef struct vector {
    char name[96], rfc[32], want[32], after[16], method[16], end[16], pool[16], direct[16], live[16];
    peer_bytes bytes, rest, body;
    peer_bytes onward[MAX_LINES], gone[MAX_LINES];
    int onwards, gones, status;
    bool eof;
} vector;

typedef struct vectors {
    vector *all;
    int count;
} vectors;

/* ---- reading the files ---- */

static int hex_digit(char c) {
    const char *digits = "0123456789abcdef", *p = strchr(digits, c | 32);
    return c && p ? (int)(p - digits) : -1;
}

static void add_unescaped(peer_bytes *out, const char *text) {
    for (; *text; text++) {
        char c = *text;
        if (c == '\\') {
            c = *++text;
            if (c == 'r') c = '\r';
            else if (c == 'n') c = '\n';
            else if (c == 't') c = '\t';
            else if (c == 'x' && hex_digit(text[1]) >= 0 && hex_digit(text[2]) >= 0) {
                c = (char)(hex_digit(text[1]) * 16 + hex_digit(text[2]));
                text += 2;
            } else if (c != '\\') {
                printf("bad escape in a vector: \\%s\n", text);
                exit(1);
            }
        }
        peer_add(out, &c, 1);
    }
}

static bool set_field(char *to, size_t cap, const char *text) {
    size_t n = strlen(text);
    if (n >= cap) return false;
    memcpy(to, text, n + 1);
    return true;
}

static bool set_vector(vector *v, const char *key, const char *text, peer_bytes **last) {
#define TEXT_KEY(name) \
    if (!strcmp(key, #name)) return set_field(v->name, sizeof v->name, text)
    TEXT_KEY(name);
    TEXT_KEY(rfc);
    TEXT_KEY(want);
    TEXT_KEY(after);
    TEXT_KEY(method);
    TEXT_KEY(end);
    TEXT_KEY(pool);
    TEXT_KEY(direct);
    TEXT_KEY(live);
#undef TEXT_KEY
    if (!strcmp(key, "bytes")) add_unescaped(*last = &v->bytes, text);
    else if (!strcmp(key, "rest")) add_unescaped(*last = &v->rest, text);
    else if (!strcmp(key, "body")) add_unescaped(&v->body, text);
    else if (!strcmp(key, "onward") && v->onwards < MAX_LINES) add_unescaped(&v->onward[v->onwards++], text);
    else if (!strcmp(key, "gone") && v->gones < MAX_LINES) add_unescaped(&v->gone[v->gones++], text);
    else if (!strcmp(key, "status")) v->status = atoi(text);
    else if (!strcmp(key, "eof")) v->eof = !strcmp(text, "yes");
    else if (!strcmp(key, "repeat")) {
        int n = atoi(text);
        while (n-- > 0) add_unescaped(*last, strchr(text, ' ') + 1);
    } else return false;
    return true;
}

/* Reads tests/vectors/http/NAME, from the repository's top or from anywhere, by this file's own path. */
static vectors load(const char *name) {
    char path[512], line[4096];
    const char *slash = strstr(__FILE__, "tests/net/");
    peer_bytes *last = NULL;
    vectors vs = {NULL, 0};
    vector *v = NULL;
    FILE *f;
    int number = 0;
    snprintf(path, sizeof path, "tests/vectors/http/%s", name);
    f = fopen(path, "rb");
    if (!f) {
        snprintf(path, sizeof path, "%.*stests/vectors/http/%s", slash ? (int)(slash - __FILE__) : 0, __FILE__, name);
        f = fopen(path, "rb");
    }
    CHECK(f != NULL);
    while (f && fgets(line, sizeof line, f)) {
        char *colon = strchr(line, ':'), *text = colon ? colon + 1 : line;
        number++;
        line[strcspn(line, "\n")] = 0;
        if (line[0] == '#') continue;
        if (!line[0]) {
            v = NULL;
            continue;
        }
        if (!v) {
            vs.all = (vector *)realloc(vs.all, (size_t)(vs.count + 1) * sizeof *vs.all);
            if (!vs.all) abort();
            v = memset(&vs.all[vs.count++], 0, sizeof *v);
            v->status = 200;
            snprintf(v->method, sizeof v->method, "GET");
            last = &v->bytes;
        }
        if (colon) *colon = 0;
        if (*text == ' ') text++;
        check_where("%s line %d", name, number);
        CHECK(colon && set_vector(v, line, text, &last)); /* a key of this format */
    }
    if (f) fclose(f);
    return vs;
}

static void unload(vectors *vs) {
    int i, j;
    for (i = 0; i < vs->count; i++) {
        vector *v = &vs->all[i];
        peer_free(&v->bytes);
        peer_free(&v->rest);
        peer_free(&v->body);
        for (j = 0; j < v->onwards; j++) peer_free(&v->onward[j]);
        for (j = 0; j < v->gones; j++) peer_free(&v->gone[j]);
    }
    free(vs->all);
}

/* Is `what` one of the alternatives of `want`? */
static bool wants(const char *want, const char *what) {
    size_t n = strlen(what);
    const char *p = want;
    for (; p; p = strchr(p, '|') ? strchr(p, '|') + 1 : NULL)
        if (!strncmp(p, what, n) && (p[n] == 0 || p[n] == '|')) return true;
    return false;
}
static bool wants_status(const char *want, int status) {
    char text[16];
    snprintf(text, sizeof text, "%d", status);
    return wants(want, text);
}

/* Every record is complete and named once: a typo must not turn a case into nothing. */
static void check_records(const char *file, int at_least) {
    vectors vs = load(file);
    int i, j;
    CHECK(vs.count >= at_least);
    for (i = 0; i < vs.count; i++) {
        vector *v = &vs.all[i];
        check_where("%s %s", file, v->name);
        CHECK(v->name[0] && v->rfc[0] && v->want[0]);
        CHECK(wants(v->want, "ok") || wants(v->want, "need") || wants(v->want, "bad") || atoi(v->want) >= 400);
        for (j = 0; j < i; j++) CHECK(strcmp(v->name, vs.all[j].name) != 0);
    }
    unload(&vs);
}

static void case_records_are_complete(void) {
    check_records("requests.txt", 120);
    check_records("replies.txt", 38);
    check_records("chunked.txt", 30);
}

/* ---- the parsers alone ---- */

/* Memory whose last byte is followed by a page that must not be touched. */
typedef struct fence {
    char *map, *end;
    size_t size;
} fence;

static fence fence_make(void) {
    fence f;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *map = NULL;
    f.size = 64 * page;
    if (posix_memalign(&map, page, f.size + page)) abort();
    f.map = (char *)map;
    f.end = f.map + f.size;
    if (mprotect(f.end, page, PROT_NONE)) abort();
    return f;
}
static char *fence_put(fence *f, const char *data, size_t len) {
    if (len > f->size) abort();
    if (len) memcpy(f->end - len, data, len);
    return f->end - len;
}
static void fence_free(fence *f) {
    mprotect(f->end, (size_t)sysconf(_SC_PAGESIZE), PROT_READ | PROT_WRITE);
    free(f->map);
}

typedef int (*head_parser)(chaosi_head *h, const char *buf, size_t len);

static int parse(head_parser parser, fence *f, const char *data, size_t len) {
    static chaosi_head h; /* may be large */
    memset(&h, 0, sizeof h);
    return parser(&h, fence_put(f, data, len), len);
}

static bool direct_ok(const vector *v, int got) {
    const char *want = v->direct[0] ? v->direct : v->want;
    if (got > 0) return wants(want, "ok") && got == (int)v->bytes.len;
    if (got == 0) return wants(want, "need");
    return wants_status(want, -got);
}

static void check_direct(const vector *v, head_parser parser, fence *f, bool reply) {
    peer_bytes all = {NULL, 0, 0};
    size_t i;
    int got;
    peer_add(&all, peer_text(&v->bytes), v->bytes.len);
    peer_add(&all, peer_text(&v->rest), v->rest.len);
    got = parse(parser, f, all.data, all.len);
    if (reply && got < 0) got = -502; /* whatever is wrong with a reply, the client gets a 502 */
    check_where("%s (RFC %s): got %d, head is %zu, want %s", v->name, v->rfc, got, v->bytes.len, v->want);
    CHECK(direct_ok(v, got));
    for (i = 0; i < v->bytes.len; i++) {
        int piece = parse(parser, f, all.data, i);
        check_where("%s (RFC %s) cut at %zu: got %d", v->name, v->rfc, i, piece);
        if (got > 0) CHECK_INT(piece, 0); /* of a good head, every shorter piece is merely incomplete */
        else CHECK(piece <= 0);           /* of a bad one, no piece is accepted */
    }
    peer_free(&all);
}

static void check_heads(const char *file, head_parser parser, bool reply) {
    vectors vs = load(file);
    fence f = fence_make();
    int i;
    for (i = 0; i < vs.count; i++)
        if (strcmp(vs.all[i].direct, "skip")) check_direct(&vs.all[i], parser, &f, reply);
    fence_free(&f);
    unload(&vs);
}

static void case_requests_direct(void) { check_heads("requests.txt", chaosi_http_request, false); }
static void case_replies_direct(void) { check_heads("replies.txt", chaosi_http_reply, true); }

/* A limit of the parser itself, whatever the buffer: no head is too strange to be answered. */
static void case_very_many_fields_direct(void) {
    fence f = fence_make();
    peer_bytes b = {NULL, 0, 0};
    int i, got;
    peer_adds(&b, "GET / HTTP/1.1\r\nHost: a\r\n");
    for (i = 0; i < 10000; i++) peer_adds(&b, "a:b\r\n");
    peer_adds(&b, "\r\n");
    got = parse(chaosi_http_request, &f, b.data, b.len);
    CHECK(got == (int)b.len || got == -431);
    peer_free(&b);
    fence_free(&f);
}

/* Feeds a chunked body in pieces of `step` bytes; decoded bytes go to out. Result: "ok", "need", "bad". */
static const char *feed_chunked(fence *f, const peer_bytes *in, size_t step, peer_bytes *out, size_t *used) {
    chaosi_chunked d;
    size_t at = 0;
    memset(&d, 0, sizeof d);
    out->len = 0;
    while (at < in->len) {
        size_t n = step < in->len - at ? step : in->len - at, took = 0, made = 0;
        char *buf = fence_put(f, in->data + at, n);
        int r = chaosi_chunked_feed(&d, buf, n, &took, &made);
        CHECK(took <= n && made <= took);
        peer_add(out, buf, made);
        at += took;
        *used = at;
        if (r < 0) return "bad";
        if (r > 0) return "ok";
        if (!CHECK(took > 0)) return "stuck";
    }
    return "need";
}

static void case_chunked_direct(void) {
    vectors vs = load("chunked.txt");
    fence f = fence_make();
    int i;
    for (i = 0; i < vs.count; i++) {
        const vector *v = &vs.all[i];
        peer_bytes in = {NULL, 0, 0}, out = {NULL, 0, 0};
        size_t step, used = 0;
        peer_add(&in, peer_text(&v->bytes), v->bytes.len);
        peer_add(&in, peer_text(&v->rest), v->rest.len);
        peer_add(&out, "", 0);
        for (step = 1; step <= 40; step++) { /* the last round takes it all at once */
            const char *got = feed_chunked(&f, &in, step < 40 ? step : in.len, &out, &used);
            check_where("%s (RFC %s) in pieces of %zu: got %s after %zu, want %s", v->name, v->rfc, step, got, used, v->want);
            CHECK(wants(v->want, got));
            if (strcmp(got, "bad")) CHECK(out.len == v->body.len && !memcmp(out.data, peer_text(&v->body), out.len));
            if (!strcmp(got, "ok")) CHECK(used == v->bytes.len); /* what follows belongs to the next message */
        }
        peer_free(&in);
        peer_free(&out);
    }
    fence_free(&f);
    unload(&vs);
}

/* ---- through a proxy ---- */

static bool has_line(const peer_bytes *head, const peer_bytes *line) {
    peer_bytes whole = {NULL, 0, 0};
    size_t i;
    bool found = false;
    peer_add(&whole, peer_text(line), line->len);
    peer_adds(&whole, "\r\n");
    for (i = 0; i + whole.len <= head->len && !found; i++)
        found = (i == 0 || head->data[i - 1] == '\n') && !memcmp(head->data + i, whole.data, whole.len);
    peer_free(&whole);
    return found;
}

static void check_onward(const vector *v, const peer_bytes *head) {
    int i;
    for (i = 0; i < v->onwards; i++)
        if (!CHECK(has_line(head, &v->onward[i]))) printf("     wanted: %s\n     in: %s", peer_text(&v->onward[i]), peer_text(head));
    for (i = 0; i < v->gones; i++) CHECK_INT(peer_fields(head, peer_text(&v->gone[i])), 0);
    CHECK(peer_fields(head, "Transfer-Encoding") + peer_fields(head, "Content-Length") <= 1);
    CHECK(peer_fields(head, "Host") <= 1);
}

static void check_own_error(const peer_message *m) {
    CHECK_INT(peer_fields(&m->head, "Proxy-Status"), 1);
    CHECK_INT(peer_fields(&m->head, "X-Chaos-Injected"), 0);
}

/* Waits for the end of a connection on which nothing may be forwarded. An own 4xx may come first. */
static void check_not_forwarded(peer_conn *c, peer_message *m) {
    if (peer_read_reply(c, m, "GET") == PEER_WHOLE) {
        CHECK(m->status >= 400 && m->status < 500);
        check_own_error(m);
        CHECK(peer_closes(c, PEER_MS));
    } else CHECK(m->end == PEER_NONE);
}

static void check_request(const vector *v, peer_rig *rig) {
    size_t received = PEER_LOAD(&rig->up->received);
    int complete = PEER_LOAD(&rig->up->complete), head_only = strcmp(v->direct, "ok") != 0;
    peer_message m;
    peer_conn c;
    memset(&m, 0, sizeof m);
    peer_dial(&c, PEER_LOAD(&rig->proxy.port));
    (void)!peer_send(c.fd, peer_text(&v->bytes), v->bytes.len); /* may be refused before it is all sent */
    (void)!peer_send(c.fd, peer_text(&v->rest), v->rest.len);
    if (!strcmp(v->want, "need")) {
        shutdown(c.fd, SHUT_WR);
        check_not_forwarded(&c, &m);
    } else if (peer_read_reply(&c, &m, "GET") != PEER_WHOLE) {
        CHECK_INT(m.end, PEER_WHOLE);
    } else if (m.status == 200) {
        CHECK(wants(v->want, "ok"));
        check_onward(v, &m.body); /* the upstream echoes the head it got */
        if (!strcmp(v->after, "close")) CHECK(peer_closes(&c, PEER_MS));
        else {
            CHECK_INT(peer_ask(&c, &m, "GET /length/3 HTTP/1.1\r\nHost: a\r\n\r\n"), 200);
            CHECK(m.body.len > 0);
        }
    } else {
        check_where("%s (RFC %s): got %d, want %s", v->name, v->rfc, m.status, v->want);
        CHECK(wants_status(v->want, m.status));
        check_own_error(&m);
        CHECK(peer_closes(&c, PEER_MS));
    }
    if (!wants(v->want, "ok")) {
        if (head_only) CHECK(PEER_LOAD(&rig->up->received) == received); /* not one byte */
        CHECK_INT(PEER_LOAD(&rig->up->complete), complete);              /* no whole request in any case */
    }
    peer_hang_up(&c);
    peer_message_free(&m);
}

static void case_requests_through_a_proxy(void) {
    vectors vs = load("requests.txt");
    peer_rig rig;
    int i;
    peer_rig_start(&rig, "{}", NULL);
    rig.up->fallback = "/echo";
    for (i = 0; i < vs.count; i++) {
        if (!strcmp(vs.all[i].live, "skip")) continue;
        check_where("%s (RFC %s)", vs.all[i].name, vs.all[i].rfc);
        check_request(&vs.all[i], &rig);
    }
    check_where("after all");
    CHECK_INT(peer_report(&rig).upstream_errors, 0);
    peer_rig_stop(&rig);
    unload(&vs);
}

/* What the client sees of the reply. */
static void check_seen(const vector *v, const peer_message *m) {
    bool cut = !strcmp(v->end, "cut");
    check_where("%s (RFC %s): end %d, status %d, want %s", v->name, v->rfc, (int)m->end, m->status, v->want);
    if (!wants(v->want, "ok") || (m->status == 502 && wants(v->want, "502"))) {
        CHECK_INT(m->end, PEER_WHOLE);
        CHECK_INT(m->status, 502);
        check_own_error(m);
        return;
    }
    CHECK_INT(m->status, v->status);
    if (cut) CHECK(m->end == PEER_CUT || m->end == PEER_RESET);
    else CHECK_INT(m->end, PEER_WHOLE);
    if (!cut) CHECK_INT(m->body.len, v->body.len);
    CHECK(m->body.len <= v->body.len && !memcmp(peer_text(&m->body), peer_text(&v->body), m->body.len));
    check_onward(v, &m->head);
}

static void check_reply(const vector *v, peer_rig *rig) {
    peer_bytes raw = {NULL, 0, 0};
    char request[128];
    peer_message m;
    peer_conn c;
    int conn;
    memset(&m, 0, sizeof m);
    peer_add(&raw, peer_text(&v->bytes), v->bytes.len);
    peer_add(&raw, peer_text(&v->rest), v->rest.len);
    peer_raw(rig->up, &raw, v->eof);
    peer_free(&raw);
    peer_dial(&c, PEER_LOAD(&rig->proxy.port));
    snprintf(request, sizeof request, "%s /raw HTTP/1.1\r\nHost: a\r\n\r\n", v->method);
    CHECK(peer_sends(c.fd, request));
    do peer_read_reply(&c, &m, v->method);
    while (m.end == PEER_WHOLE && m.status < 200);
    check_seen(v, &m);
    conn = PEER_LOAD(&rig->up->last_conn);
    shutdown(c.fd, SHUT_WR);
    CHECK(peer_closes(&c, PEER_MS)); /* nothing behind the reply; and by now the upstream's connection is in the pool, or gone */
    peer_hang_up(&c);
    check_where("%s (RFC %s): the request after it", v->name, v->rfc);
    CHECK_INT(peer_get(PEER_LOAD(&rig->proxy.port), "/length/7", &m), 200);
    CHECK(peer_is_pattern(&m.body, 7));
    if (!strcmp(v->pool, "keep")) CHECK_INT(PEER_LOAD(&rig->up->last_conn), conn);
    if (!strcmp(v->pool, "close")) CHECK(PEER_LOAD(&rig->up->last_conn) != conn);
    peer_message_free(&m);
}

static void case_replies_through_a_proxy(void) {
    vectors vs = load("replies.txt");
    peer_rig rig;
    int i;
    peer_rig_start(&rig, "{}", NULL);
    for (i = 0; i < vs.count; i++) {
        if (!strcmp(vs.all[i].live, "skip")) continue;
        check_where("%s (RFC %s)", vs.all[i].name, vs.all[i].rfc);
        check_reply(&vs.all[i], &rig);
    }
    peer_rig_stop(&rig);
    unload(&vs);
}

int main(int argc, char **argv) {
    check_begin(argc, argv);
    peer_watchdog(120);
    CHECK_RUN(case_records_are_complete);
    CHECK_RUN(case_requests_direct);
    CHECK_RUN(case_replies_direct);
    CHECK_RUN(case_very_many_fields_direct);
    CHECK_RUN(case_chunked_direct);
    CHECK_RUN(case_requests_through_a_proxy);
    CHECK_RUN(case_replies_through_a_proxy);
    return check_end();
}

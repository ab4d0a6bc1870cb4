/* The HTTP cases of tests/vectors/http: first against the parsers alone, every input laid against an unreadable page and
   fed in pieces; then over real sockets through a proxy. The file format stands in tests/vectors/http/README.txt.

   http_vectors --through NAME runs the cases through any proxy instead: it prints "upstream PORT", waits for that proxy's
   port on stdin, and prints how many cases went right. NAME is chaos, which must do all that is promised, or another one,
   which must do what the RFC demands. tests/peers/scores.py compares them. -v says what went wrong. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

#include "../check.h"
#include "peer.h"

#include <ctype.h>
#include <sys/mman.h>

#define MAX_LINES 12
#define HURRY_MS  400 /* what another proxy may take for anything */

/* What must be seen in a message that is passed on; each key may be given several times. */
typedef enum seen_key { ONWARD, GONE, STAYS, ABSENT, OPTION, TRAILER, NO_TRAILER, SEEN_KEYS } seen_key;
static const char *const seen_names[SEEN_KEYS] = {"onward", "gone", "stays", "absent", "option", "trailer", "notrailer"};

typedef struct vector {
    char name[96], rfc[32], want[32], may[16], after[16], then[16], method[16], client[16], interim[64], end[16], pool[16], direct[16],
        live[16];
    peer_bytes bytes, rest, body, ask;
    peer_bytes seen[SEEN_KEYS][MAX_LINES];
    int seens[SEEN_KEYS], status, count;
    bool eof, ours, has_body;
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
    int k;
    for (k = 0; k < SEEN_KEYS; k++)
        if (!strcmp(key, seen_names[k]) && v->seens[k] < MAX_LINES) {
            add_unescaped(&v->seen[k][v->seens[k]++], text);
            return true;
        }
#define TEXT_KEY(name) \
    if (!strcmp(key, #name)) return set_field(v->name, sizeof v->name, text)
    TEXT_KEY(name);
    TEXT_KEY(rfc);
    TEXT_KEY(want);
    TEXT_KEY(may);
    TEXT_KEY(after);
    TEXT_KEY(then);
    TEXT_KEY(method);
    TEXT_KEY(client);
    TEXT_KEY(interim);
    TEXT_KEY(end);
    TEXT_KEY(pool);
    TEXT_KEY(direct);
    TEXT_KEY(live);
#undef TEXT_KEY
    if (!strcmp(key, "bytes")) add_unescaped(*last = &v->bytes, text);
    else if (!strcmp(key, "rest")) add_unescaped(*last = &v->rest, text);
    else if (!strcmp(key, "body")) {
        add_unescaped(&v->body, text);
        v->has_body = true;
    } else if (!strcmp(key, "ask")) add_unescaped(&v->ask, text);
    else if (!strcmp(key, "status")) v->status = atoi(text);
    else if (!strcmp(key, "count")) v->count = atoi(text);
    else if (!strcmp(key, "eof")) v->eof = !strcmp(text, "yes");
    else if (!strcmp(key, "ours")) v->ours = !strcmp(text, "yes");
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
            v->count = 1;
            snprintf(v->method, sizeof v->method, "GET");
            snprintf(v->client, sizeof v->client, "1.1");
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
    int i, j, k;
    for (i = 0; i < vs->count; i++) {
        vector *v = &vs->all[i];
        peer_free(&v->bytes);
        peer_free(&v->rest);
        peer_free(&v->body);
        peer_free(&v->ask);
        for (k = 0; k < SEEN_KEYS; k++)
            for (j = 0; j < v->seens[k]; j++) peer_free(&v->seen[k][j]);
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
        CHECK(v->name[0] && v->want[0] && v->rfc[strspn(v->rfc, "0123456789")] == ' ' &&
              isdigit((unsigned char)v->rfc[strlen(v->rfc) - 1]));
        CHECK(wants(v->want, "ok") || wants(v->want, "need") || wants(v->want, "bad") || atoi(v->want) >= 400);
        for (j = 0; j < i; j++) CHECK(strcmp(v->name, vs.all[j].name) != 0);
    }
    unload(&vs);
}

static void case_records_are_complete(void) {
    check_records("requests.txt", 160);
    check_records("replies.txt", 55);
    check_records("chunked.txt", 60);
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

/* The proxy under test. A strict one must keep every promise of these files; another one must do what the RFC demands,
   in whatever way, and not take long. */
typedef struct target {
    peer_upstream *up;
    int port, ms;
    bool strict, rig; /* rig: it stands in this program */
} target;

/* What is wrong with the case at hand, the first thing only. */
static char wrong[400];

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static bool
see(bool ok, const char *format, ...) {
    va_list args;
    char *c;
    if (ok || wrong[0]) return ok;
    va_start(args, format);
    vsnprintf(wrong, sizeof wrong, format, args);
    va_end(args);
    for (c = wrong; *c; c++) /* of several lines of a message, one */
        if (iscntrl((unsigned char)*c)) *c = *c == '\n' ? '|' : ' ';
    return false;
}

static bool same_bytes(const peer_bytes *a, const peer_bytes *b) { return a->len == b->len && !memcmp(peer_text(a), peer_text(b), a->len); }

/* One line of a head against a wanted one: the name of a field in any case, its value exactly. */
static bool is_line(const char *line, size_t len, const peer_bytes *want) {
    const char *text = peer_text(want), *colon = strstr(text, ": ");
    size_t name = colon ? (size_t)(colon - text) : 0, skip = name, from = colon ? name + 2 : 0;
    if (strncasecmp(line, text, name) != 0) return false;
    if (colon && (skip >= len || line[skip++] != ':')) return false;
    while (colon && skip < len && (line[skip] == ' ' || line[skip] == '\t')) skip++;
    return len - skip == want->len - from && !memcmp(line + skip, text + from, len - skip);
}

static bool has_line(const peer_bytes *head, const peer_bytes *want) {
    const char *line = peer_text(head), *end;
    for (; (end = strstr(line, "\r\n")) != NULL; line = end + 2)
        if (is_line(line, (size_t)(end - line), want)) return true;
    return false;
}

/* Do the head's Connection fields name this option? */
static bool has_option(const peer_bytes *head, const char *option) {
    char value[512], *one, *rest;
    int n;
    for (n = 0; peer_field_nth(head, "Connection", n, value, sizeof value); n++)
        for (one = strtok_r(value, ", \t", &rest); one; one = strtok_r(NULL, ", \t", &rest))
            if (!strcasecmp(one, option)) return true;
    return false;
}

static bool has_text(const peer_bytes *head, const peer_bytes *text) {
    size_t i;
    for (i = 0; i + text->len <= head->len; i++)
        if (!strncasecmp(head->data + i, peer_text(text), text->len)) return true;
    return false;
}

static bool is_seen(seen_key key, const peer_bytes *head, const peer_bytes *trailers, const peer_bytes *want) {
    peer_bytes framed = {NULL, 0, 0};
    bool found;
    switch (key) {
    case ONWARD: return has_line(head, want);
    case GONE: return !peer_fields(head, peer_text(want));
    case STAYS: return peer_fields(head, peer_text(want)) > 0;
    case ABSENT: return !has_text(head, want) && !has_text(trailers, want);
    case OPTION: return has_option(head, peer_text(want));
    case TRAILER: return has_line(trailers, want);
    default:
        peer_adds(&framed, "\r\n"); /* peer_fields looks behind the first line */
        peer_add(&framed, peer_text(trailers), trailers->len);
        found = peer_fields(&framed, peer_text(want)) > 0;
        peer_free(&framed);
        return !found;
    }
}

/* What holds of every head that is passed on: clean lines, one framing, one Host, hop-by-hop fields only where named. */
static void see_sound(const peer_bytes *head) {
    size_t i;
    for (i = 0; i < head->len; i++) {
        char c = head->data[i];
        see(c != 0, "a NUL goes onward");
        see(c != '\n' || (i && head->data[i - 1] == '\r'), "a bare LF goes onward");
        see(c != '\r' || head->data[i + 1] == '\n', "a bare CR goes onward");
    }
    see(peer_fields(head, "Transfer-Encoding") + peer_fields(head, "Content-Length") <= 1, "more than one framing goes onward");
    see(peer_fields(head, "Host") <= 1, "more than one Host goes onward");
    see(!peer_fields(head, "TE") || has_option(head, "TE"), "TE goes onward, and Connection does not name it");
    see(!peer_fields(head, "Upgrade") || has_option(head, "Upgrade"), "Upgrade goes onward, and Connection does not name it");
}

/* Trailers may be dropped (RFC 9110 section 6.5.1): that they are passed on is our promise alone. */
static void see_onward(const vector *v, const target *t, const peer_bytes *head, const peer_bytes *trailers) {
    int k, i;
    see_sound(head);
    for (k = 0; k < SEEN_KEYS; k++)
        for (i = 0; i < v->seens[k] && (t->strict || (!v->ours && k != TRAILER)); i++)
            see(is_seen((seen_key)k, head, trailers, &v->seen[k][i]), "%s: %s, in %s%s", seen_names[k], peer_text(&v->seen[k][i]),
                peer_text(head), peer_text(trailers));
}

static bool is_allowed(const vector *v, const target *t) { return wants(v->want, "ok") || (!t->strict && wants(v->may, "ok")); }

static void see_own_error(const peer_message *m, const target *t) {
    if (!t->strict) return;
    see(peer_fields(&m->head, "Proxy-Status") == 1, "an error of its own without Proxy-Status");
    see(!peer_fields(&m->head, "X-Chaos-Injected"), "an error of its own is marked as injected");
}

static void see_close(peer_conn *c, const target *t) { see(peer_closes(c, t->ms), "the connection stays open, or more comes"); }

/* The next final reply; interim ones are noted in `interim`, which may be NULL. 101 is final: it ends HTTP here. */
static peer_end read_final(peer_conn *c, peer_message *m, const char *method, bool http10, char *interim, size_t cap) {
    do {
        peer_read_reply(c, m, method);
        if (m->end != PEER_WHOLE || m->status >= 200 || m->status == 101) break;
        see(!http10, "an interim reply to an HTTP/1.0 client");
        see_sound(&m->head);
        if (interim) snprintf(interim + strlen(interim), cap - strlen(interim), "%s%d", interim[0] ? " " : "", m->status);
    } while (true);
    return m->end;
}

/* A refusal: a status that is wanted, then the end. Of another proxy: any error, or the end without a word. */
static void see_refused(peer_conn *c, const peer_message *m, const target *t, const char *want) {
    if (!t->strict && (m->end == PEER_NONE || m->end == PEER_RESET)) return;
    if (!see(m->end == PEER_WHOLE, "no whole reply (%d), want %s", (int)m->end, want)) return;
    if (!see(t->strict ? wants_status(want, m->status) : m->status >= 400, "status %d, want %s", m->status, want)) return;
    see_own_error(m, t);
    see_close(c, t);
}

/* Nothing was decided: the connection ends with a 4xx, or without a word. */
static void see_not_answered(peer_conn *c, peer_message *m, const target *t) {
    if (peer_read_reply(c, m, "GET") != PEER_WHOLE) {
        see(m->end == PEER_NONE || m->end == PEER_RESET, "half a request is not given up (%d)", (int)m->end);
        return;
    }
    see(m->status >= 400 && (m->status < 500 || !t->strict), "half a request is answered with %d", m->status);
    see_own_error(m, t);
    see_close(c, t);
}

/* What the upstream's /whole tells of the request it got. */
static void see_arrived(const vector *v, const target *t, const peer_message *m) {
    peer_bytes head = {NULL, 0, 0}, body = head, trailers = head;
    const char *end = strstr(peer_text(&m->body), "\r\n\r\n");
    char value[32];
    size_t at = end ? (size_t)(end + 4 - m->body.data) : 0, len = 0;
    if (peer_field_nth(&m->head, "X-Body-Length", 0, value, sizeof value)) len = (size_t)strtoul(value, NULL, 10);
    if (!see(end && at + len <= m->body.len, "the reply is not the upstream's")) return;
    peer_add(&head, m->body.data, at);
    peer_add(&body, m->body.data + at, len);
    peer_add(&trailers, m->body.data + at + len, m->body.len - at - len);
    see_onward(v, t, &head, &trailers);
    see(!v->has_body || same_bytes(&body, &v->body), "the upstream got the body \"%s\"", peer_text(&body));
    peer_free(&head);
    peer_free(&body);
    peer_free(&trailers);
}

/* Behind a request that was passed on: the connection is in step, or refuses what follows, or ends. */
static int see_after(const vector *v, const target *t, peer_conn *c, peer_message *m) {
    static const char next[] = "GET /next HTTP/1.1\r\nHost: a\r\n\r\n";
    if (v->then[0]) {
        peer_read_reply(c, m, "GET");
        see_refused(c, m, t, v->then);
        return 0;
    }
    if (!strcmp(v->after, "close")) {
        see_close(c, t);
        return 0;
    }
    peer_ask(c, m, next);
    see(m->end == PEER_WHOLE && m->status == 200, "the next request gets %d (%d)", m->status, (int)m->end);
    see(!strncmp(peer_text(&m->body), next, 20), "the next request gets the reply to another one");
    return 1;
}

/* Ends every connection to the upstream, with all that is still on its way: what a case left behind is not the next one's.
   Result: the requests it made for that. */
static int hang_up_all(const target *t) {
    peer_upstream *up = t->up;
    long long deadline = peer_ms() + PEER_MS;
    peer_message m;
    int i;
    memset(&m, 0, sizeof m);
    peer_get(up->port, "/last", &m); /* whoever was in the backlog has been accepted now */
    peer_message_free(&m);
    do { /* until nothing comes after it, a retry for example */
        pthread_mutex_lock(&up->lock);
        for (i = 0; i < up->accepts; i++)
            if (up->conns[i].fd >= 0) shutdown(up->conns[i].fd, SHUT_RDWR);
        pthread_mutex_unlock(&up->lock);
        peer_nap(1);
    } while (PEER_LOAD(&up->open) && peer_ms() < deadline);
    CHECK_INT(PEER_LOAD(&up->open), 0);
    if (!t->strict) peer_nap(30); /* an event loop has to see it first */
    return 1;
}

/* The first reply is there, a 200: look at what the upstream got, and at the rest of the connection. Result: how many
   requests the upstream should have got. */
static int see_passed_on(const vector *v, const target *t, peer_conn *c, peer_message *m, const char *method) {
    int i;
    see(is_allowed(v, t), "passed on, want %s", v->want);
    if (strcmp(method, "HEAD") != 0) see_arrived(v, t, m);
    for (i = 1; i < v->count && !wrong[0]; i++) {
        read_final(c, m, "GET", false, NULL, 0);
        see(m->end == PEER_WHOLE && m->status == 200, "request %d gets %d (%d)", i + 1, m->status, (int)m->end);
    }
    return wrong[0] ? v->count : v->count + see_after(v, t, c, m);
}

static void check_request(const vector *v, const target *t) {
    const char *head = peer_text(&v->bytes) + strspn(peer_text(&v->bytes), "\r\n");
    size_t received = PEER_LOAD(&t->up->received);
    int complete = PEER_LOAD(&t->up->complete);
    bool forwarded = !strcmp(v->direct, "ok"); /* the head alone is good: it may be passed on before the body is seen */
    char method[16];
    peer_message m;
    peer_conn c;
    memset(&m, 0, sizeof m);
    snprintf(method, sizeof method, "%.*s", (int)strcspn(head, " "), head);
    peer_dial(&c, t->port);
    c.ms = t->ms;
    (void)!peer_send(c.fd, peer_text(&v->bytes), v->bytes.len); /* may be refused before it is all sent */
    (void)!peer_send(c.fd, peer_text(&v->rest), v->rest.len);
    if (!strcmp(v->want, "need")) {
        shutdown(c.fd, SHUT_WR);
        see_not_answered(&c, &m, t);
    } else if (read_final(&c, &m, method, strstr(head, " HTTP/1.0\r\n") != NULL, NULL, 0) == PEER_WHOLE && m.status == 200) {
        complete += see_passed_on(v, t, &c, &m, method);
        forwarded = true;
    } else if (see(t->strict || strpbrk(v->want, "45") || strpbrk(v->may, "45"), "status %d (%d), want ok", m.status, (int)m.end)) {
        see_refused(&c, &m, t, v->want);
    }
    if (!forwarded) see(PEER_LOAD(&t->up->received) == received, "the upstream got some of it");
    else if (m.status != 200) complete += hang_up_all(t);
    see(PEER_LOAD(&t->up->complete) == complete, "%d whole requests too many for the upstream", PEER_LOAD(&t->up->complete) - complete);
    peer_hang_up(&c);
    peer_message_free(&m);
}

/* What the client sees of a reply. Whoever buffers may turn a cut one into an error of its own. */
static void see_reply(const vector *v, const target *t, const peer_message *m) {
    bool cut = !strcmp(v->end, "cut"), refusable = strstr(v->want, "502") || (!t->strict && (cut || strstr(v->may, "502")));
    bool either = cut && !t->strict && wants(v->may, "ok"); /* what is malformed here may be let pass */
    if (refusable && (!is_allowed(v, t) || m->status != v->status)) {
        if (!t->strict && (m->end == PEER_NONE || m->end == PEER_RESET)) return;
        see(m->end == PEER_WHOLE && (t->strict ? m->status == 502 : m->status >= 500), "status %d (%d), want %s", m->status, (int)m->end,
            v->want);
        see_own_error(m, t);
        return;
    }
    see(m->status == v->status, "status %d (%d), want %d", m->status, (int)m->end, v->status);
    if (either) cut = m->end != PEER_WHOLE;
    if (cut) see(m->end == PEER_CUT || m->end == PEER_RESET, "a cut reply looks whole (%d)", (int)m->end);
    else see(m->end == PEER_WHOLE && m->body.len == v->body.len, "%zu bytes of body (%d), want %zu", m->body.len, (int)m->end, v->body.len);
    see((cut && !v->has_body) || (m->body.len <= v->body.len && !memcmp(peer_text(&m->body), peer_text(&v->body), m->body.len)),
        "the body is \"%s\"", peer_text(&m->body));
    see_onward(v, t, &m->head, &m->trailers);
}

/* Behind a 101 there is no HTTP: the stream to its end. */
static void read_tunnel(peer_conn *c, peer_message *m, int ms) {
    long long deadline = peer_ms() + ms;
    int r;
    do r = peer_fill(c, deadline);
    while (r > 0);
    m->end = r == 0 ? PEER_WHOLE : r == -1 ? PEER_LATE : PEER_RESET;
    peer_add(&m->body, peer_text(&c->in), c->in.len);
    c->in.len = 0;
}

/* A request of somebody else, on a connection of its own, gets its own reply. */
static void see_next_reply(const target *t) {
    static const char next[] = "GET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    peer_message m;
    peer_conn c;
    memset(&m, 0, sizeof m);
    peer_dial(&c, t->port);
    c.ms = t->ms;
    peer_ask(&c, &m, next);
    see(m.end == PEER_WHOLE && m.status == 200, "the request after it gets %d (%d)", m.status, (int)m.end);
    see(!strncmp(peer_text(&m.body), next, 20), "the request after it gets the reply to another one");
    see_close(&c, t); /* by now its connection to the upstream is in the pool: not later, above that of the next vector */
    peer_hang_up(&c);
    peer_message_free(&m);
}

static void check_reply(const vector *v, const target *t) {
    peer_bytes raw = {NULL, 0, 0};
    char request[512], interim[64] = "";
    peer_message m;
    peer_conn c;
    int conn;
    memset(&m, 0, sizeof m);
    peer_add(&raw, peer_text(&v->bytes), v->bytes.len);
    peer_add(&raw, peer_text(&v->rest), v->rest.len);
    peer_raw(t->up, &raw, v->eof);
    peer_free(&raw);
    peer_dial(&c, t->port);
    c.ms = t->ms;
    snprintf(request, sizeof request, "%s /raw HTTP/%s\r\nHost: a\r\n%s\r\n", v->method, v->client, peer_text(&v->ask));
    see(peer_sends(c.fd, request), "the request is not taken");
    read_final(&c, &m, v->method, !strcmp(v->client, "1.0"), interim, sizeof interim);
    if (m.end == PEER_WHOLE && m.status == 101) read_tunnel(&c, &m, t->ms);
    see_reply(v, t, &m);
    see(!v->interim[0] || !strcmp(interim, v->interim), "interim replies \"%s\", want \"%s\"", interim, v->interim);
    conn = PEER_LOAD(&t->up->last_conn);
    shutdown(c.fd, SHUT_WR);
    see_close(&c, t); /* nothing behind the reply; and by now the upstream's connection is in the pool, or gone */
    peer_hang_up(&c);
    if (!t->strict && v->eof) peer_nap(10); /* an event loop has to see it first */
    see_next_reply(t);
    if (!strcmp(v->pool, "keep") && t->strict) see(PEER_LOAD(&t->up->last_conn) == conn, "the upstream's connection is not used again");
    if (!strcmp(v->pool, "close") && (t->strict || !strstr(v->want, "502")))
        see(PEER_LOAD(&t->up->last_conn) != conn, "the upstream's connection is used again");
    peer_message_free(&m);
}

/* A chunked body as that of a request, then as that of a reply. */
static void check_chunked(const vector *v, const target *t) {
    bool ok = wants(v->want, "ok"), bad = wants(v->want, "bad"), need = wants(v->want, "need");
    vector one = *v;
    memset(&one.bytes, 0, sizeof one.bytes);
    one.rest = v->bytes;
    peer_adds(&one.bytes, "POST /chunked HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
    snprintf(one.want, sizeof one.want, "%s", need ? "need" : ok && bad ? "ok|400|413" : ok ? "ok" : "400|413");
    snprintf(one.direct, sizeof one.direct, "ok");
    one.has_body = true;
    check_request(&one, t);
    one.bytes.len = 0;
    peer_adds(&one.bytes, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n");
    snprintf(one.want, sizeof one.want, "%s", need || bad ? "ok|502" : "ok");
    snprintf(one.end, sizeof one.end, "%s", need || !ok ? "cut" : "");
    one.has_body = v->has_body;
    one.eof = true;
    if (!(ok && bad)) check_reply(&one, t);
    peer_free(&one.bytes);
}

/* ---- the runs ---- */

static const struct live_run {
    const char *what, *file;
    void (*check)(const vector *v, const target *t);
} live_runs[] = {{"requests", "requests.txt", check_request},
                 {"replies", "replies.txt", check_reply},
                 {"chunked", "chunked.txt", check_chunked}};

/* Runs the live cases of one file. Result: how many went right, of how many. */
static int run_live(const struct live_run *run, const target *t, int *cases) {
    vectors vs = load(run->file);
    int i, right = 0;
    *cases = 0;
    for (i = 0; i < vs.count; i++) {
        if (!strcmp(vs.all[i].live, "skip")) continue;
        wrong[0] = 0;
        check_where("%s (RFC %s)", vs.all[i].name, vs.all[i].rfc);
        run->check(&vs.all[i], t);
        ++*cases;
        right += !wrong[0];
        if (!wrong[0]) continue;
        hang_up_all(t);
        if (t->rig) check_that(0, run->file, 0, wrong);
        else if (t->strict || check_state.verbose) printf("  %s %s: %s\n", run->what, check_state.where, wrong);
    }
    check_where("after all");
    unload(&vs);
    return right;
}

static void run_in_rig(int which) {
    peer_rig rig;
    target t;
    int cases;
    peer_rig_start(&rig, "{}", NULL);
    rig.up->fallback = "/whole";
    t.up = rig.up;
    t.port = PEER_LOAD(&rig.proxy.port);
    t.ms = PEER_MS;
    t.strict = t.rig = true;
    run_live(&live_runs[which], &t, &cases);
    if (which == 0) CHECK_INT(peer_report(&rig).upstream_errors, 0);
    peer_rig_stop(&rig);
}

static void case_requests_through_a_proxy(void) { run_in_rig(0); }
static void case_replies_through_a_proxy(void) { run_in_rig(1); }
static void case_chunked_through_a_proxy(void) { run_in_rig(2); }

/* All live cases through a proxy that stands at a port we are told. */
static int run_through(const char *name) {
    target t;
    size_t k;
    int cases, right;
    t.up = peer_upstream_start();
    t.up->fallback = "/whole";
    t.strict = !strcmp(name, "chaos");
    t.rig = false;
    t.ms = t.strict ? PEER_MS : HURRY_MS;
    check_state.name = name;
    printf("upstream %d\n", t.up->port);
    fflush(stdout);
    if (scanf("%d", &t.port) != 1) return 2;
    for (k = 0; k < sizeof live_runs / sizeof live_runs[0]; k++) {
        right = run_live(&live_runs[k], &t, &cases);
        printf("%s %d of %d\n", live_runs[k].what, right, cases);
        fflush(stdout);
    }
    peer_upstream_stop(t.up);
    return 0;
}

int main(int argc, char **argv) {
    int i;
    check_begin(argc, argv);
    peer_watchdog(120);
    for (i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], "--through")) return run_through(argv[i + 1]);
    CHECK_RUN(case_records_are_complete);
    CHECK_RUN(case_requests_direct);
    CHECK_RUN(case_replies_direct);
    CHECK_RUN(case_very_many_fields_direct);
    CHECK_RUN(case_chunked_direct);
    CHECK_RUN(case_requests_through_a_proxy);
    CHECK_RUN(case_replies_through_a_proxy);
    CHECK_RUN(case_chunked_through_a_proxy);
    return check_end();
}

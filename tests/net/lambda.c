/* Lambda as a program sees it: what a handler gets and may call, chaos_lambda_decide, chaos_lambda_run and its ends, under a
   Runtime API server in threads here. The API's side, on the wire, is the work of tests/peers/lambda.py. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

#include "../check.h"
#include "peer.h"

#include <sys/syscall.h>

#define FAIL  "{\"enabled\":true,\"errorRate\":100,\"expiresAt\":\"never\"}"
#define OFF   "{\"enabled\":false}"
#define HTTP  "{\"version\":\"2.0\",\"rawPath\":\"/a\",\"requestContext\":{\"http\":{\"method\":\"GET\"}}}"
#define LIMIT 6291556
#define TTL   50

/* ---- a clock that jumps, for every thread but the server's ---- */
extern long syscall(long number, ...);
static __thread bool no_jump;
static long long jump_s, clock_calls;

int clock_gettime(clockid_t id, struct timespec *t) {
    int r = (int)syscall(SYS_clock_gettime, (long)id, t);
    if (no_jump) return r;
    PEER_ADD(&clock_calls, 1);
    t->tv_sec += (time_t)PEER_LOAD(&jump_s);
    return r;
}

/* ---- the Runtime API ---- */
typedef struct post {
    char path[320];
    peer_message m;
} post;

typedef struct api {
    const char *const *events; /* "" = as many as `count` of "{}" */
    const char *fields;        /* more lines of an event's head */
    int count, given, port, fd, nexts, accepts;
    int over;   /* events that are over; read with PEER_LOAD */
    int cut;    /* this many bytes of a POST are read, then the connection is reset; 0 = all */
    bool leap;  /* the clock jumps in the middle of an event's head */
    int refuse; /* 1 = a POST is answered with 500, and a call of next waits for as long as the client does */
    post *posts;
    int posted;
    pthread_mutex_t lock;
    pthread_t accepter, servers[80];
    int conns[80];
} api;

typedef struct served {
    api *a;
    int fd, conn;
} served;

static void api_give(api *a, int fd, int n) {
    char head[8192];
    const char *body = a->events ? a->events[n] : "{}";
    int len = snprintf(
        head, sizeof head,
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nLambda-Runtime-Aws-Request-Id: id-%d\r\n%sContent-Length: %zu\r\n\r\n", n,
        a->fields ? a->fields : "", strlen(body));
    if (a->leap) {
        long long calls = PEER_LOAD(&clock_calls), end = peer_ms() + 300;
        PEER_STORE(&jump_s, 36000);
        peer_send(fd, head, 40);
        while (PEER_LOAD(&clock_calls) == calls && peer_ms() < end) peer_nap(1); /* it looks at the clock before it waits again */
        peer_nap(5);
        peer_send(fd, head + 40, (size_t)len - 40);
    } else {
        peer_send(fd, head, (size_t)len);
    }
    peer_sends(fd, body);
}

static void *api_serve(void *arg) {
    served *s = (served *)arg;
    api *a = s->a;
    peer_conn c;
    peer_message m = no_message();
    int n, conn = s->conn;
    no_jump = true;
    memset(&c, 0, sizeof c);
    c.fd = s->fd;
    c.ms = 60000; /* a handler may take its time */
    free(s);
    while (peer_read_head(&c, &m) == PEER_WHOLE) {
        if (!strncmp(m.head.data, "POST", 4) && a->cut) {
            peer_need(&c, (size_t)a->cut, peer_ms() + PEER_MS);
            PEER_ADD(&a->over, 1);
            break;
        }
        peer_read_body(&c, &m, false);
        pthread_mutex_lock(&a->lock);
        if (!strncmp(m.head.data, "POST", 4)) {
            post *p = &a->posts[a->posted++];
            PEER_ADD(&a->over, 1);
            sscanf(m.head.data, "POST /2018-06-01/runtime/%300s", p->path);
            p->m = m;
            m = no_message();
            pthread_mutex_unlock(&a->lock);
            peer_sends(c.fd,
                       a->refuse
                           ? "HTTP/1.1 500 No\r\nContent-Length: 2\r\n\r\nno"
                           : "HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n{\"status\":\"OK\"}\n");
            continue;
        }
        a->nexts++;
        n = a->given < a->count ? a->given++ : -1;
        pthread_mutex_unlock(&a->lock);
        if (n < 0 && a->refuse) {
            CHECK(peer_closes(&c, 3000));
            break;
        }
        if (n < 0) PEER_UNTIL(PEER_LOAD(&a->over) >= a->count, PEER_MS); /* the end is for all loops */
        if (n < 0) peer_sends(c.fd, "HTTP/1.1 410 Gone\r\nContent-Length: 4\r\n\r\ndone");
        else api_give(a, c.fd, n);
    }
    pthread_mutex_lock(&a->lock);
    if (a->cut) peer_reset(c.fd);
    else close(c.fd);
    a->conns[conn] = -1;
    pthread_mutex_unlock(&a->lock);
    peer_message_free(&m);
    peer_free(&c.in);
    return NULL;
}

static void *api_accept(void *arg) {
    api *a = (api *)arg;
    int fd, one = 1;
    no_jump = true;
    while ((fd = accept(a->fd, NULL, NULL)) >= 0) {
        served *s = (served *)calloc(1, sizeof *s);
        if (!s || a->accepts == 80) abort();
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        s->a = a;
        s->fd = a->conns[a->accepts] = fd;
        s->conn = a->accepts;
        if (pthread_create(&a->servers[a->accepts++], NULL, api_serve, s)) abort();
    }
    return NULL;
}

static void api_start(api *a, const char *const *events, int count) {
    memset(a, 0, sizeof *a);
    a->events = events;
    a->count = count;
    a->posts = (post *)calloc((size_t)count + 8, sizeof *a->posts);
    a->fd = peer_listen(&a->port, 128);
    pthread_mutex_init(&a->lock, NULL);
    if (!a->posts || pthread_create(&a->accepter, NULL, api_accept, a)) abort();
}

static void api_stop(api *a) {
    int i;
    shutdown(a->fd, SHUT_RDWR);
    pthread_join(a->accepter, NULL);
    close(a->fd);
    pthread_mutex_lock(&a->lock);
    for (i = 0; i < a->accepts; i++)
        if (a->conns[i] >= 0) shutdown(a->conns[i], SHUT_RDWR); /* a client that forgot to hang up */
    pthread_mutex_unlock(&a->lock);
    for (i = 0; i < a->accepts; i++) pthread_join(a->servers[i], NULL);
    for (i = 0; i < a->posted; i++) peer_message_free(&a->posts[i].m);
    pthread_mutex_destroy(&a->lock);
    free(a->posts);
}

/* The one POST of an event; NULL, and a failed check, when there is another number of them. */
static const post *answer(const api *a, int n) {
    const post *found = NULL;
    char id[32];
    int i, count = 0;
    size_t len = (size_t)snprintf(id, sizeof id, "invocation/id-%d/", n);
    for (i = 0; i < a->posted; i++)
        if (!strncmp(a->posts[i].path, id, len)) {
            found = &a->posts[i];
            count++;
        }
    CHECK_INT(count, 1);
    return count == 1 ? found : NULL;
}

static bool is_error(const post *p) { return p && strlen(p->path) > 6 && !strcmp(p->path + strlen(p->path) - 6, "/error"); }

/* The error of an event: it must be whole, valid, and of this type. */
static void check_error(const post *p, const char *type) {
    char value[128], want[160];
    CHECK(is_error(p));
    if (!is_error(p)) return;
    CHECK_INT(p->m.end, PEER_WHOLE);
    CHECK(chaos_json_check(peer_text(&p->m.body), p->m.body.len, NULL) == CHAOS_OK);
    CHECK_STR(peer_field(&p->m.head, "Lambda-Runtime-Function-Error-Type", value, sizeof value), type);
    snprintf(want, sizeof want, "\"errorType\":\"%s\",\"stackTrace\":[]}", type);
    CHECK(strstr(peer_text(&p->m.body), want) != NULL);
    CHECK_INT(strlen(peer_text(&p->m.body)), p->m.body.len);
}

/* ---- handles and runs ---- */
static chaos *open_with(const char *config, const chaos_desc *more) {
    chaos_desc d;
    chaos_error err;
    chaos *c;
    memset(&d, 0, sizeof d);
    if (more) d = *more;
    d.config = config;
    d.instance = "lambda-test";
    d.quiet = true;
    d.no_thread = true;
    memset(&err, 0, sizeof err);
    c = chaos_open(&d, &err);
    if (!CHECK(c != NULL)) printf("     %s\n", err.text);
    return c;
}
static chaos *open_config(const char *config) { return open_with(config, NULL); }

static chaos_report report_of(chaos *c) {
    chaos_report r;
    chaos_stats(c, &r);
    return r;
}

/* Runs until the API has no more events: that must be how it ends. */
static void run(api *a, chaos *c, chaos_lambda_handler fn, void *user, int loops) {
    char address[32];
    chaos_lambda_desc d;
    chaos_error err;
    snprintf(address, sizeof address, "127.0.0.1:%d", a->port);
    memset(&d, 0, sizeof d);
    d.api = address;
    d.loops = loops;
    CHECK(chaos_lambda_run(c, fn, user, &d, &err) != CHAOS_OK);
    if (!CHECK(strstr(err.text, "410") != NULL)) printf("     %s\n", err.text);
}

/* One event "{}" through a handler, off or with a config. */
static void run_one(api *a, const char *config, chaos_lambda_handler fn, void *user) {
    chaos *c = open_config(config);
    api_start(a, NULL, 1);
    run(a, c, fn, user, 1);
    chaos_close(c);
}

static int count_handler(void *user, const chaos_lambda_event *e, chaos_lambda_reply *reply) {
    (void)e;
    PEER_ADD((int *)user, 1);
    return chaos_lambda_write(reply, "ran", 3) != CHAOS_OK;
}

/* ---- arguments ---- */

static void case_run_says_what_it_needs(void) {
    static const char *const bad[] = {"",         "host:1", "127.0.0.1:",    "127.0.0.1:70000", "http://127.0.0.1:1", "127.0.0.1:1/x",
                                      "1.2.3:80", "[::1]:", "127.0.0.1 :80", "[127.0.0.1]:x"};
    chaos *c = open_config(OFF), *threaded;
    chaos_lambda_desc d;
    chaos_desc with_thread;
    chaos_error err;
    char dead[32];
    int calls = 0;
    size_t i;
    memset(&d, 0, sizeof d);
    unsetenv("AWS_LAMBDA_RUNTIME_API");
    CHECK_INT(chaos_lambda_run(NULL, count_handler, &calls, &d, &err), CHAOS_ERR_ARGUMENT);
    CHECK_INT(chaos_lambda_run(c, NULL, &calls, &d, &err), CHAOS_ERR_ARGUMENT);
    CHECK_INT(chaos_lambda_run(c, count_handler, &calls, NULL, NULL), CHAOS_ERR_ARGUMENT);
    CHECK_INT(chaos_lambda_run(c, count_handler, &calls, &d, &err), CHAOS_ERR_ARGUMENT);
    CHECK(strstr(err.text, "AWS_LAMBDA_RUNTIME_API") != NULL);
    for (i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        check_where("%s", bad[i]);
        d.api = bad[i];
        CHECK_INT(chaos_lambda_run(c, count_handler, &calls, &d, &err), CHAOS_ERR_ADDRESS);
        CHECK(err.text[0] != 0);
    }
    check_where("nobody there");
    snprintf(dead, sizeof dead, "127.0.0.1:%d", peer_dead_port());
    d.api = dead;
    CHECK_INT(chaos_lambda_run(c, count_handler, &calls, &d, &err), CHAOS_ERR_UNREACHABLE);
    CHECK(strstr(err.text, dead) != NULL);
    CHECK_INT(chaos_lambda_run(c, count_handler, &calls, &d, NULL), CHAOS_ERR_UNREACHABLE);
    chaos_close(c);
    check_where("with a refresher");
    memset(&with_thread, 0, sizeof with_thread);
    with_thread.config = "file:/nonexistent";
    with_thread.quiet = true;
    threaded = chaos_open(&with_thread, NULL);
    CHECK_INT(chaos_lambda_run(threaded, count_handler, &calls, &d, &err), CHAOS_ERR_ARGUMENT);
    CHECK(strstr(err.text, "no_thread") != NULL);
    chaos_close(threaded);
    CHECK_INT(calls, 0);
}

/* ---- what a handler gets ---- */

static int look(void *user, const chaos_lambda_event *e, chaos_lambda_reply *reply) {
    int *seen = (int *)user;
    check_where("event %d", *seen);
    CHECK_STR(e->body, *seen == 0 ? "{\"a\":1}" : *seen == 1 ? "" : "text");
    CHECK_INT(e->len, strlen(e->body));
    CHECK_STR(e->request_id, *seen == 0 ? "id-0" : *seen == 1 ? "id-1" : "id-2");
    CHECK_STR(e->trace_id, "Root=1-a-b;Sampled=1");
    CHECK_STR(e->function_arn, "arn:aws:lambda:x");
    CHECK_STR(e->client_context, "{\"a\": \"b\"}");
    CHECK_STR(e->cognito_identity, "");
    CHECK_STR(e->content_type, "application/json");
    CHECK_INT(e->deadline_ms, 1900000000123ll);
    CHECK_STR(getenv("_X_AMZN_TRACE_ID"), "Root=1-a-b;Sampled=1");
    ++*seen;
    return chaos_lambda_write(reply, e->body, e->len) != CHAOS_OK;
}

static void case_an_event_as_the_handler_sees_it(void) {
    static const char *const events[] = {"{\"a\":1}", "", "text"};
    chaos *c = open_config(OFF);
    int seen = 0, i;
    api a;
    api_start(&a, events, 3);
    a.fields = "lambda-runtime-trace-id:  Root=1-a-b;Sampled=1 \r\nLAMBDA-RUNTIME-DEADLINE-MS: 1900000000123\r\n"
               "Lambda-Runtime-Invoked-Function-Arn: arn:aws:lambda:x\r\nLambda-Runtime-Client-Context: {\"a\": \"b\"}\r\n";
    run(&a, c, look, &seen, 1);
    check_where("%s", "");
    CHECK_INT(seen, 3);
    CHECK_INT(a.nexts, 4);
    CHECK_INT(a.accepts, 1);
    for (i = 0; i < 3; i++) CHECK_STR(answer(&a, i) ? peer_text(&answer(&a, i)->m.body) : NULL, events[i]);
    CHECK_INT(report_of(c).requests, 0);
    CHECK_INT(report_of(c).outcomes[2], 3);
    chaos_close(c);
    api_stop(&a);
}

/* ---- what a handler calls ---- */

typedef struct script {
    int step;
    chaos_result got[8];
    chaos *c;
} script;

static int write_pieces(void *user, const chaos_lambda_event *e, chaos_lambda_reply *reply) {
    script *s = (script *)user;
    (void)e;
    s->got[0] = chaos_lambda_write(reply, "a\0b", 3);
    s->got[1] = chaos_lambda_write(reply, "", 0);
    s->got[2] = chaos_lambda_write(reply, NULL, 0);
    s->got[3] = chaos_lambda_write(reply, "\xff\n", 2);
    return 0;
}

static void case_write_appends(void) {
    script s;
    const post *p;
    char value[64];
    api a;
    memset(&s, 0xff, sizeof s);
    run_one(&a, OFF, write_pieces, &s);
    CHECK(s.got[0] == CHAOS_OK && s.got[1] == CHAOS_OK && s.got[2] == CHAOS_OK && s.got[3] == CHAOS_OK);
    p = answer(&a, 0);
    CHECK(p && !is_error(p) && p->m.body.len == 5 && !memcmp(p->m.body.data, "a\0b\xff\n", 5));
    if (p) CHECK_STR(peer_field(&p->m.head, "Content-Length", value, sizeof value), "5");
    api_stop(&a);
}

static int write_too_much(void *user, const chaos_lambda_event *e, chaos_lambda_reply *reply) {
    script *s = (script *)user;
    char *half = (char *)calloc(1, LIMIT / 2);
    (void)e;
    if (!half) abort();
    s->got[0] = chaos_lambda_write(reply, half, LIMIT / 2);
    s->got[1] = chaos_lambda_write(reply, half, LIMIT / 2);
    if (s->step) s->got[2] = chaos_lambda_write(reply, "x", 1);
    if (s->step) s->got[3] = chaos_lambda_write(reply, "x", (size_t)-1); /* no sum may run over */
    free(half);
    return 0; /* it goes on as if nothing was: the invocation must fail all the same */
}

static void case_write_knows_the_limit(void) {
    int i;
    for (i = 0; i < 2; i++) {
        script s;
        const post *p;
        api a;
        memset(&s, 0, sizeof s);
        s.step = i;
        check_where("%d more", i);
        run_one(&a, OFF, write_too_much, &s);
        p = answer(&a, 0);
        CHECK(s.got[0] == CHAOS_OK && s.got[1] == CHAOS_OK);
        if (i) CHECK_INT(s.got[2], CHAOS_ERR_TOO_LARGE);
        if (i) check_error(p, "Function.ResponseSizeTooLarge");
        else CHECK(p && !is_error(p) && p->m.body.len == LIMIT);
        api_stop(&a);
    }
}

typedef struct failure {
    const char *type, *message, *want_type, *want; /* want: a part of the body */
    bool streams;
} failure;

static int fail_as_told(void *user, const chaos_lambda_event *e, chaos_lambda_reply *reply) {
    const failure *f = (const failure *)user;
    (void)e;
    if (f->streams) CHECK_INT(chaos_lambda_stream(reply, NULL, NULL), CHAOS_OK);
    CHECK_INT(chaos_lambda_write(reply, "part", 4), CHAOS_OK);
    chaos_lambda_fail(reply, f->type, f->message);
    return (int)(f->message == NULL); /* failed in either way */
}

static size_t unbase64(char *text) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    unsigned bits = 0;
    size_t i, n = 0, have = 0;
    for (i = 0; text[i] && text[i] != '='; i++) {
        const char *d = strchr(digits, text[i]);
        if (!d) return 0;
        bits = bits << 6 | (unsigned)(d - digits);
        have += 6;
        if (have >= 8) text[n++] = (char)(bits >> (have -= 8) & 255u);
    }
    if (strlen(text + i) > 2 || (i + strlen(text + i)) % 4) return 0;
    text[n] = 0;
    return n;
}

static void check_trailers(const post *p, const failure *f) {
    char value[4096];
    size_t n;
    CHECK(p && !is_error(p) && p->m.end == PEER_WHOLE && p->m.chunked);
    if (!p) return;
    CHECK_STR(peer_text(&p->m.body), "part");
    snprintf(value, sizeof value, "\r\n%s", peer_text(&p->m.trailers)); /* peer_field looks behind line ends */
    {
        peer_bytes lines = {NULL, 0, 0};
        peer_adds(&lines, value);
        CHECK_STR(peer_field(&lines, "Lambda-Runtime-Function-Error-Type", value, sizeof value), f->want_type);
        peer_field(&lines, "Lambda-Runtime-Function-Error-Body", value, sizeof value);
        peer_free(&lines);
    }
    n = unbase64(value);
    CHECK(n > 0 && chaos_json_check(value, n, NULL) == CHAOS_OK);
    CHECK(strstr(value, f->want) != NULL);
}

static void case_fail_in_every_way(void) {
    static char long_text[1001], controls[401], quotes[401], cut[1001], bytes[] = "caf\xc3\xa9 \xff\xfe", type[300];
    failure all[] = {{"Function.Word", "why", "Function.Word", "\"errorMessage\":\"why\"", false},
                     {"Runtime.Word", "a \"b\" \\ \n", "Runtime.Word", "a \\\"b\\\" \\\\ \\n", false},
                     {NULL, "x", "Function.Unknown", "\"x\"", false},
                     {"", NULL, "Function.Unknown", "\"errorMessage\":\"\"", false},
                     {"Function.", "x", "Function.Unknown", "\"x\"", false},
                     {"Function.W", "x", "Function.Unknown", "\"x\"", false},
                     {"Function.word", "x", "Function.Unknown", "\"x\"", false},
                     {"Function.Word2", "x", "Function.Unknown", "\"x\"", false},
                     {"Function.Word\r\nX: y", "x", "Function.Unknown", "\"x\"", false},
                     {"Own.Word", "x", "Function.Unknown", "\"x\"", false},
                     {type, "x", NULL, "\"x\"", false},
                     {"Function.Word", long_text, "Function.Word", "mmm", false},
                     {"Function.Word", controls, "Function.Word", "\\u0001", false},
                     {"Function.Word", quotes, "Function.Word", "\\\"", false},
                     {"Function.Word", cut, "Function.Word", "\xc3\xa9", false},
                     {"Function.Word", bytes, "Function.Word", "caf\xc3\xa9 ??", false}};
    size_t i, k;
    memset(long_text, 'm', 1000);
    memset(controls, 1, 400);
    memset(quotes, '"', 400);
    memset(type, 'w', sizeof type - 1);
    memcpy(type, "Function.W", 10);
    for (k = 0; k < 999; k += 2) memcpy(cut + k, "\xc3\xa9", 2);
    memmove(cut + 1, cut, 998);
    cut[0] = '.';
    for (i = 0; i < sizeof all / sizeof all[0]; i++) {
        for (k = 0; k < 2; k++) {
            failure f = all[i];
            const post *p;
            char value[300] = "";
            api a;
            check_where("failure %d%s", (int)i, k ? ", in a stream" : "");
            f.streams = k == 1;
            run_one(&a, OFF, fail_as_told, &f);
            p = answer(&a, 0);
            if (!f.want_type) { /* too long to keep: some type that the platform takes */
                f.want_type = "Function.Unknown";
                if (p && k == 0 && peer_field(&p->m.head, "Lambda-Runtime-Function-Error-Type", value, sizeof value) && value[9] == 'W')
                    f.want_type = value;
                if (k) f.want_type = NULL;
            }
            if (k && f.want_type) check_trailers(p, &f);
            if (!k) check_error(p, f.want_type);
            if (!k) CHECK(p && strstr(peer_text(&p->m.body), f.want) != NULL);
            api_stop(&a);
        }
    }
}

static int stream_oddly(void *user, const chaos_lambda_event *e, chaos_lambda_reply *reply) {
    script *s = (script *)user;
    (void)e;
    switch (s->step) {
    case 0: /* twice */
        s->got[0] = chaos_lambda_stream(reply, "text/plain", NULL);
        s->got[1] = chaos_lambda_stream(reply, "text/plain", NULL);
        s->got[2] = chaos_lambda_write(reply, "x", 1);
        break;
    case 1: /* too late */
        s->got[0] = chaos_lambda_write(reply, "x", 1);
        s->got[1] = chaos_lambda_stream(reply, NULL, NULL);
        s->got[2] = chaos_lambda_write(reply, "y", 1);
        break;
    case 2: /* nothing in it */
        s->got[0] = chaos_lambda_stream(reply, NULL, NULL);
        s->got[1] = chaos_lambda_write(reply, "", 0);
        break;
    case 3: /* a head of its own, but for the type */ s->got[0] = chaos_lambda_stream(reply, "text/plain", "{\"statusCode\":200}"); break;
    case 4: /* over the limit of a buffered reply */
        s->got[0] = chaos_lambda_stream(reply, NULL, NULL);
        for (s->step = 0; s->step < 70; s->step++) {
            static const char block[100000];
            s->got[1] = chaos_lambda_write(reply, block, sizeof block);
        }
        break;
    default: /* a type that would be a head of its own */ s->got[0] = chaos_lambda_stream(reply, "a\r\nX: y", NULL);
    }
    return 0;
}

static void case_streams(void) {
    int i;
    for (i = 0; i < 6; i++) {
        script s;
        const post *p;
        char value[128];
        api a;
        memset(&s, 0, sizeof s);
        s.step = i;
        check_where("stream %d", i);
        run_one(&a, OFF, stream_oddly, &s);
        p = answer(&a, 0);
        if (!p) {
            api_stop(&a);
            continue;
        }
        peer_field(&p->m.head, "Content-Type", value, sizeof value);
        CHECK_INT(p->m.end, PEER_WHOLE);
        CHECK_INT(p->m.chunked, i != 1 && i != 5);
        CHECK_INT(p->m.trailers.len, 0);
        CHECK_INT(peer_fields(&p->m.head, "X"), 0);
        switch (i) {
        case 0:
            CHECK(s.got[0] == CHAOS_OK && s.got[1] == CHAOS_ERR_ARGUMENT && s.got[2] == CHAOS_OK);
            CHECK_STR(peer_text(&p->m.body), "x");
            CHECK_STR(value, "text/plain");
            break;
        case 1:
            CHECK(s.got[0] == CHAOS_OK && s.got[1] == CHAOS_ERR_ARGUMENT && s.got[2] == CHAOS_OK);
            CHECK_STR(peer_text(&p->m.body), "xy");
            break;
        case 2:
            CHECK(s.got[0] == CHAOS_OK && s.got[1] == CHAOS_OK);
            CHECK_INT(p->m.body.len, 0);
            CHECK_STR(value, "application/octet-stream");
            break;
        case 3:
            CHECK(p->m.body.len == 26 && !memcmp(p->m.body.data, "{\"statusCode\":200}\0\0\0\0\0\0\0\0", 26));
            CHECK_STR(value, "application/vnd.awslambda.http-integration-response");
            break;
        case 4:
            CHECK_INT(s.got[1], CHAOS_OK);
            CHECK_INT(p->m.body.len, 7000000);
            break;
        default: CHECK_INT(s.got[0], CHAOS_ERR_ARGUMENT);
        }
        api_stop(&a);
    }
}

static int stream_for_long(void *user, const chaos_lambda_event *e, chaos_lambda_reply *reply) {
    script *s = (script *)user;
    static const char block[65536];
    int i;
    (void)e;
    s->step++;
    s->got[0] = chaos_lambda_stream(reply, NULL, NULL);
    for (i = 0; i < 2000 && s->got[0] == CHAOS_OK; i++) s->got[0] = chaos_lambda_write(reply, block, sizeof block);
    return 0;
}

static void case_a_stream_that_is_cut(void) {
    chaos *c = open_config(OFF);
    script s;
    api a;
    memset(&s, 0, sizeof s);
    api_start(&a, NULL, 2);
    a.cut = 100000;
    run(&a, c, stream_for_long, &s, 1);
    CHECK_INT(s.got[0], CHAOS_ERR_UNREACHABLE);
    CHECK_INT(s.step, 2); /* and on with the next event */
    CHECK_INT(a.posted, 0);
    chaos_close(c);
    api_stop(&a);
}

/* ---- faults around a handler ---- */

static int all_of_it(void *user, const chaos_lambda_event *e, chaos_lambda_reply *reply) {
    script *s = (script *)user;
    (void)e;
    s->step++;
    if (s->got[7]) s->got[0] = chaos_lambda_stream(reply, NULL, "{}");
    s->got[1] = chaos_lambda_write(reply, "x", 1);
    chaos_lambda_fail(reply, "Function.Own", "own");
    return 1;
}

/* Runs n events with a fault after each; the handler streams its reply or writes it. */
static chaos *run_after(script *s, api *a, chaos_lambda_handler handler, const char *const *events, int n, int streams) {
    chaos *c = open_config("{\"enabled\":true,\"errorRate\":100,\"errorWhen\":\"after\"}");
    memset(s, 0, sizeof *s);
    s->c = c;
    s->got[7] = streams ? CHAOS_ERR_ARGUMENT : CHAOS_OK;
    check_where("%s", streams ? "streamed" : "written");
    api_start(a, events, n);
    run(a, c, handler, s, 1);
    CHECK_INT(s->step, n);
    return c;
}

static void case_a_reply_that_is_replaced(void) {
    static const char *const events[] = {"{}", HTTP};
    int i;
    for (i = 0; i < 2; i++) {
        script s;
        const post *p;
        api a;
        chaos *c = run_after(&s, &a, all_of_it, events, 2, i);
        CHECK(s.got[0] == CHAOS_OK && s.got[1] == CHAOS_OK);
        check_error(answer(&a, 0), "Function.ChaosInjected");
        p = answer(&a, 1);
        CHECK(p && !is_error(p) && !p->m.chunked && strstr(peer_text(&p->m.body), "\"statusCode\":503") != NULL);
        CHECK_INT(report_of(c).injected[CHAOS_STATUS], 2);
        CHECK_INT(report_of(c).outcomes[5], 2); /* what it really did: it failed */
        chaos_close(c);
        api_stop(&a);
    }
}

static int off_then_answer(void *user, const chaos_lambda_event *e, chaos_lambda_reply *reply) {
    script *s = (script *)user;
    (void)e;
    s->step++;
    chaos_off(s->c);
    if (s->got[7]) CHECK_INT(chaos_lambda_stream(reply, "text/plain", NULL), CHAOS_OK);
    return chaos_lambda_write(reply, "real", 4) != CHAOS_OK;
}

/* A fault that waits for the handler is no longer wanted when chaos ends meanwhile: the real reply goes out. */
static void case_off_while_the_handler_runs(void) {
    int streamed;
    for (streamed = 0; streamed < 2; streamed++) {
        script s;
        const post *p;
        api a;
        chaos *c = run_after(&s, &a, off_then_answer, NULL, 1, streamed);
        p = answer(&a, 0);
        CHECK(p && !is_error(p) && p->m.chunked == (streamed != 0));
        if (p) CHECK_STR(peer_text(&p->m.body), "real");
        chaos_close(c);
        api_stop(&a);
    }
}

static chaos_lambda_event event_of(const char *body) {
    chaos_lambda_event e;
    memset(&e, 0, sizeof e);
    e.body = body;
    e.len = strlen(body);
    e.request_id = "the-id";
    e.trace_id = e.function_arn = e.client_context = e.cognito_identity = e.content_type = "";
    return e;
}

static void case_decide_tells_what_to_do(void) {
    chaos_lambda_event http = event_of(HTTP), direct = event_of("{}"), queue = event_of("{\"Records\":[{\"eventSource\":\"aws:sqs\"}]}");
    chaos_lambda_action act;
    char buf[8192];
    size_t cap;
    chaos *c = open_config(FAIL);
    act = chaos_lambda_decide(NULL, &http, buf, sizeof buf);
    CHECK(act.run && !act.replaced && !act.failed && !act.len && !act.verdict.kind);
    act = chaos_lambda_decide(c, &http, buf, sizeof buf);
    CHECK(!act.run && act.replaced && !act.failed && act.len == strlen(buf) && act.verdict.kind == CHAOS_STATUS);
    CHECK_INT(act.verdict.status, 503);
    CHECK(chaos_json_check(buf, act.len, NULL) == CHAOS_OK && strstr(buf, "\"statusCode\":503") != NULL);
    act = chaos_lambda_decide(c, &direct, buf, sizeof buf);
    CHECK(!act.run && act.replaced && act.failed && act.len == strlen(buf));
    CHECK(strstr(buf, "Function.ChaosInjected") != NULL);
    act = chaos_lambda_decide(c, &queue, buf, sizeof buf);
    CHECK(act.run && !act.replaced && !act.verdict.kind);
    CHECK_INT(report_of(c).excluded, 1);
    for (cap = 0; cap < 300; cap++) { /* too small: cut, counted, never over its end */
        char *small = (char *)malloc(cap + 1);
        if (!small) abort();
        small[cap] = '#';
        act = chaos_lambda_decide(c, cap % 2 ? &http : &direct, small, cap);
        CHECK(act.len > 100 && small[cap] == '#' && (cap == 0 || strlen(small) < cap));
        free(small);
    }
    chaos_off(c);
    act = chaos_lambda_decide(c, &http, buf, sizeof buf);
    CHECK(act.run && !act.replaced && !act.verdict.kind);
    chaos_close(c);
}

static void case_decide_gives_a_place_to_give_back(void) {
    chaos_lambda_event e = event_of("{}");
    chaos *c = open_config("{\"enabled\":true,\"errorRate\":100,\"maxConcurrent\":1}");
    chaos_lambda_action one, two;
    char buf[8192];
    one = chaos_lambda_decide(c, &e, buf, sizeof buf);
    two = chaos_lambda_decide(c, &e, buf, sizeof buf);
    CHECK(one.replaced && one.verdict.ticket != 0 && !two.replaced && two.run);
    chaos_done(c, &one.verdict, 0, 0);
    one = chaos_lambda_decide(c, &e, buf, sizeof buf);
    CHECK(one.replaced);
    CHECK_INT(report_of(c).over_budget, 1);
    chaos_close(c);
}

static void case_the_request_id_is_no_key(void) {
    chaos_lambda_event e = event_of("{}");
    chaos *c = open_config("{\"enabled\":true,\"errorRate\":50,\"seed\":1}");
    unsigned long long last = 0;
    int i, hits = 0, same = 0;
    char buf[8192];
    e.trace_id = "Root=1-a-b";
    for (i = 0; i < 200; i++) {
        chaos_lambda_action act = chaos_lambda_decide(c, &e, buf, sizeof buf);
        hits += act.replaced;
        same += act.verdict.key == last;
        last = act.verdict.key;
    }
    CHECK(hits > 60 && hits < 140);
    CHECK_INT(same, 0);
    chaos_close(c);
}

static void case_delays_stop_before_the_deadline(void) {
    static const struct { int left, want; /* ms */ } rows[] = {{900, 400}, {600, 100}, {500, 0}, {100, 0}, {1, 0}};
    chaos *c = open_config("{\"enabled\":true,\"latency\":60000}"), *short_one = open_config("{\"enabled\":true,\"latency\":30}");
    chaos_lambda_event e = event_of("{}");
    char buf[64];
    size_t i;
    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        struct timespec t;
        long long began = peer_ms(), took;
        chaos_lambda_action act;
        check_where("%d ms left", rows[i].left);
        clock_gettime(CLOCK_REALTIME, &t);
        e.deadline_ms = (long long)t.tv_sec * 1000 + t.tv_nsec / 1000000 + rows[i].left;
        act = chaos_lambda_decide(c, &e, buf, sizeof buf);
        took = peer_ms() - began;
        CHECK(act.run && !act.replaced && act.verdict.kind == CHAOS_DELAY);
        if (!CHECK(took >= rows[i].want - 2 && took < rows[i].want + 150)) printf("     %lld ms\n", took);
    }
    CHECK_INT(report_of(c).skipped, 5);
    for (i = 0; i < 4; i++) { /* not known: as long as it is */
        static const long long deadlines[] = {0, 5000, -1, 4102444800000ll};
        long long began = peer_ms(), took;
        check_where("deadline %lld", deadlines[i]);
        e.deadline_ms = deadlines[i];
        chaos_lambda_decide(short_one, &e, buf, sizeof buf);
        took = peer_ms() - began;
        if (!CHECK(took >= 29 && took < 200)) printf("     %lld ms\n", took);
    }
    CHECK_INT(report_of(short_one).skipped, 0);
    chaos_close(c);
    chaos_close(short_one);
}

/* ---- the config ---- */

static chaos *open_source(peer_source *s, const char *json) {
    chaos_desc d;
    memset(&d, 0, sizeof d);
    peer_source_init(s, json);
    d.fetch = peer_fetch;
    d.fetch_user = s;
    d.ttl_ms = TTL;
    return open_with(NULL, &d);
}

static bool injects(chaos *c) {
    chaos_lambda_event e = event_of("{}");
    char buf[8192];
    return chaos_lambda_decide(c, &e, buf, sizeof buf).replaced;
}

static void case_the_config_is_read_inside(void) {
    peer_source s;
    chaos *c = open_source(&s, FAIL);
    long long began = peer_ms();
    int i;
    CHECK_INT(s.fetches, 0);
    peer_nap(5);
    CHECK_INT(s.fetches, 0);
    CHECK(injects(c));
    CHECK_INT(s.fetches, 1);
    for (i = 0; i < 50; i++) injects(c);
    CHECK(s.fetches <= 1 + (peer_ms() - began) / (TTL * 4 / 5));
    peer_source_set(&s, OFF, CHAOS_OK);
    PEER_UNTIL(!injects(c), TTL + 100);
    peer_source_set(&s, FAIL, CHAOS_OK);
    PEER_UNTIL(injects(c), TTL + 100);
    peer_source_set(&s, "{\"enabled\":tru}", CHAOS_OK);
    PEER_UNTIL(!injects(c), TTL + 100);
    CHECK_INT(report_of(c).state, CHAOS_STATE_INVALID);
    peer_source_set(&s, "", CHAOS_ERR_NOT_FOUND);
    PEER_UNTIL(report_of(c).state == CHAOS_STATE_OFF || injects(c), TTL + 100);
    chaos_off(c); /* killed: nothing to ask for */
    peer_nap(2 * TTL);
    i = s.fetches;
    CHECK(!injects(c));
    CHECK_INT(s.fetches, i);
    chaos_close(c);
}

/* An agent that takes the connection and says nothing: no more than the 250 ms, and not for every invocation. */
static void case_a_silent_agent_costs_a_quarter_second(void) {
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at;
    socklen_t len = sizeof at;
    chaos_lambda_action action;
    chaos_lambda_event e = event_of("{}");
    long long start;
    char port[16], buf[8192];
    chaos_desc d;
    chaos *c;
    memset(&at, 0, sizeof at);
    at.sin_family = AF_INET;
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    CHECK(bind(fd, (struct sockaddr *)(void *)&at, sizeof at) == 0 && listen(fd, 8) == 0);
    CHECK(getsockname(fd, (struct sockaddr *)(void *)&at, &len) == 0);
    snprintf(port, sizeof port, "%d", ntohs(at.sin_port));
    setenv("AWS_APPCONFIG_EXTENSION_HTTP_PORT", port, 1);
    memset(&d, 0, sizeof d);
    c = open_with("appconfig:app/env/profile", &d);
    start = peer_ms();
    action = chaos_lambda_decide(c, &e, buf, sizeof buf);
    CHECK(action.run && !action.replaced);
    CHECK(peer_ms() - start >= 240 && peer_ms() - start < 1000);
    start = peer_ms();
    chaos_lambda_decide(c, &e, buf, sizeof buf);
    CHECK(peer_ms() - start < 200);
    CHECK_INT(report_of(c).fetch_errors, 1);
    chaos_close(c);
    unsetenv("AWS_APPCONFIG_EXTENSION_HTTP_PORT");
    close(fd);
}

static void case_a_long_delay_looks_at_the_config(void) {
    peer_source s;
    chaos *c = open_source(&s, "{\"enabled\":true,\"latency\":400,\"expiresAt\":\"never\"}");
    chaos_lambda_event e = event_of("{}");
    long long began = peer_ms();
    char buf[64];
    chaos_lambda_decide(c, &e, buf, sizeof buf);
    if (!CHECK(peer_ms() - began >= 399 && peer_ms() - began < 600)) printf("     %lld ms\n", peer_ms() - began);
    CHECK(s.fetches >= 3 && s.fetches <= 13); /* 400 ms of TTLs between 40 and 50 ms, and the first */
    CHECK_INT(s.overlaps, 0);
    chaos_close(c);
}

static void *turn_off_soon(void *arg) {
    peer_nap(150);
    peer_source_set((peer_source *)arg, OFF, CHAOS_OK);
    return NULL;
}

static void case_a_long_delay_ends_when_chaos_does(void) {
    peer_source s;
    chaos *c = open_source(&s, "{\"enabled\":true,\"latency\":20000,\"expiresAt\":\"never\"}");
    chaos_lambda_event e = event_of("{}");
    long long began = peer_ms(), took;
    chaos_lambda_action act;
    pthread_t t;
    char buf[64];
    if (pthread_create(&t, NULL, turn_off_soon, &s)) abort();
    act = chaos_lambda_decide(c, &e, buf, sizeof buf);
    took = peer_ms() - began;
    CHECK(act.run && !act.replaced);
    if (!CHECK(took >= 149 && took < 150 + TTL + 150)) printf("     %lld ms\n", took);
    CHECK(report_of(c).delay_ms < 400);
    pthread_join(t, NULL);
    chaos_close(c);
}

/* ---- runs ---- */

static void case_next_has_no_deadline(void) {
    chaos *c = open_config(OFF);
    int calls = 0;
    api a;
    api_start(&a, NULL, 2);
    a.leap = true; /* ten hours pass while an event is on its way */
    run(&a, c, count_handler, &calls, 1);
    PEER_STORE(&jump_s, 0);
    CHECK_INT(calls, 2);
    CHECK_INT(a.accepts, 1);
    CHECK_INT(a.nexts, 3);
    chaos_close(c);
    api_stop(&a);
}

static int short_work(void *user, const chaos_lambda_event *e, chaos_lambda_reply *reply) {
    PEER_ADD((int *)user, 1);
    if (strcmp(e->request_id, "id-3") == 0) chaos_lambda_fail(reply, "Function.Third", e->request_id);
    CHECK_STR(getenv("_X_AMZN_TRACE_ID"), "as it was");
    return chaos_lambda_write(reply, e->request_id, strlen(e->request_id)) != CHAOS_OK;
}

static int deep_handler(void *user, const chaos_lambda_event *e, chaos_lambda_reply *reply) {
    volatile char large[1 << 20]; /* as a handler may have that ran on the main thread before */
    size_t i;
    (void)e;
    for (i = 0; i < sizeof large; i += 1024) large[i] = 1;
    PEER_ADD((int *)user, large[0]);
    return chaos_lambda_write(reply, "{}", 2) != CHAOS_OK;
}

static void case_every_loop_has_a_large_stack(void) {
    chaos *c = open_config(OFF);
    int calls = 0;
    api a;
    api_start(&a, NULL, 40);
    run(&a, c, deep_handler, &calls, 4);
    CHECK_INT(calls, 40);
    chaos_close(c);
    api_stop(&a);
}

static void case_trace_ids_are_not_kept(void) {
    static chaosi_loop l;
    char id[64];
    long before = peer_resident_kib();
    int i;
    for (i = 0; i < 50000; i++) {
        snprintf(id, sizeof id, "Root=1-5759e988-bd862e3fe1be46a994272793;n=%d", i);
        chaosi_set_trace(&l, id);
    }
    CHECK_STR(getenv("_X_AMZN_TRACE_ID"), id);
    CHECK(peer_resident_kib() - before < 1000);
    unsetenv("_X_AMZN_TRACE_ID");
}

static void case_loops_in_parallel(void) {
    peer_source s;
    chaos *c = open_source(&s, "{\"enabled\":true,\"errorRate\":50,\"latency\":1,\"expiresAt\":\"never\"}");
    int calls = 0, i, injected = 0;
    chaos_report r;
    api a;
    setenv("_X_AMZN_TRACE_ID", "as it was", 1);
    api_start(&a, NULL, 400);
    a.fields = "Lambda-Runtime-Trace-Id: x\r\n";
    run(&a, c, short_work, &calls, 8);
    for (i = 0; i < 400; i++) {
        const post *p = answer(&a, i);
        char id[16];
        snprintf(id, sizeof id, "id-%d", i);
        injected += p && strstr(peer_text(&p->m.body), "ChaosInjected") != NULL;
        if (p && i != 3 && !is_error(p)) CHECK_STR(peer_text(&p->m.body), id);
    }
    r = report_of(c);
    CHECK_INT(injected, 400 - calls);
    CHECK_INT(r.injected[CHAOS_STATUS], injected);
    CHECK(injected > 100 && injected < 300);
    CHECK(r.requests <= 400 && r.requests >= 300); /* those beside the first fetch pass */
    CHECK_INT(s.overlaps, 0);
    CHECK_INT(a.accepts, 8);
    chaos_close(c);
    api_stop(&a);
    unsetenv("_X_AMZN_TRACE_ID");
}

static void case_a_loop_that_ends_ends_all(void) {
    chaos *c = open_config(OFF);
    chaos_lambda_desc d;
    chaos_error err;
    char address[32];
    long long began = peer_ms();
    int calls = 0, fds = peer_fds();
    api a;
    memset(&d, 0, sizeof d);
    api_start(&a, NULL, 1);
    a.refuse = 1;
    snprintf(address, sizeof address, "127.0.0.1:%d", a.port);
    d.api = address;
    d.loops = 4;
    CHECK(chaos_lambda_run(c, count_handler, &calls, &d, &err) != CHAOS_OK);
    CHECK(peer_ms() - began < 2000);
    CHECK(strstr(err.text, "500") != NULL);
    CHECK_INT(calls, 1);
    chaos_close(c);
    api_stop(&a);
    CHECK(peer_fds() < fds); /* the handle's */
}

static unsigned long long minutes_later(void *user, bool wall) {
    struct timespec t;
    clock_gettime(wall ? CLOCK_REALTIME : CLOCK_MONOTONIC, &t);
    return (unsigned long long)t.tv_sec * 1000000000u + (unsigned long long)t.tv_nsec + (unsigned long long)*(int *)user * 61000000000u;
}

/* No thread tells of what goes on: invocations do, whatever the source of the config. */
static void case_heartbeats_and_summaries(void) {
    static const char json[] = "{\"enabled\":true,\"errorRate\":100,\"name\":\"n\",\"expiresAt\":\"never\"}";
    int fetched;
    for (fetched = 0; fetched < 2; fetched++) {
        chaos_lambda_event e = event_of("{}");
        peer_source source;
        peer_log log;
        chaos_desc d;
        char buf[8192];
        int minutes = 0, i;
        chaos *c;
        check_where("%s", fetched ? "fetched" : "inline");
        peer_source_init(&source, json);
        memset(&d, 0, sizeof d);
        memset(&log, 0, sizeof log);
        pthread_mutex_init(&log.lock, NULL);
        d.config = json;
        if (fetched) d.fetch = peer_fetch;
        d.fetch_user = &source;
        d.log = peer_log_line;
        d.log_user = &log;
        d.clock = minutes_later;
        d.clock_user = &minutes;
        d.no_thread = true;
        c = chaos_open(&d, NULL);
        for (i = 0; i < 200; i++) chaos_lambda_decide(c, &e, buf, sizeof buf);
        CHECK(peer_logged(&log, "\"inject\"", "\"request_id\":\"the-id\"", "") >= 50 && peer_logged(&log, "\"inject\"", "", "") < 200);
        CHECK_INT(peer_logged(&log, "\"heartbeat\"", "", ""), 0);
        for (minutes = 1; minutes < 3; minutes++) {
            chaos_lambda_decide(c, &e, buf, sizeof buf);
            chaos_lambda_decide(c, &e, buf, sizeof buf);
            CHECK_INT(peer_logged(&log, "\"heartbeat\"", "\"name\":\"n\"", ""), minutes);
            CHECK(peer_logged(&log, "\"summary\"", "\"suppressed\"", "") >= 1);
        }
        chaos_close(c);
        CHECK_INT(log.bad, 0);
        peer_free(&log.text);
        pthread_mutex_destroy(&log.lock);
        pthread_mutex_destroy(&source.lock);
    }
}

/* ---- memory and descriptors ---- */

typedef struct memory {
    int given, back, left; /* left: allocations until one fails; -1 = none does */
} memory;

static void *take(void *user, size_t size) {
    memory *m = (memory *)user;
    if (m->left == 0) return NULL;
    if (m->left > 0) m->left--;
    m->given++;
    return malloc(size);
}
static void give(void *user, void *ptr) {
    ((memory *)user)->back++;
    free(ptr);
}

static void case_memory_and_descriptors(void) {
    static const int loops[] = {1, 4};
    int i, fds = peer_fds(), threads = peer_threads();
    for (i = 0; i < 2; i++) {
        memory m = {0, 0, -1};
        chaos_desc d;
        int calls = 0;
        chaos *c;
        api a;
        memset(&d, 0, sizeof d);
        d.alloc = take;
        d.free = give;
        d.alloc_user = &m;
        c = open_with(OFF, &d);
        CHECK_INT(m.given, 1);
        api_start(&a, NULL, 100);
        run(&a, c, count_handler, &calls, loops[i]);
        CHECK_INT(calls, 100);
        CHECK_INT(m.given, 1 + loops[i]);
        CHECK_INT(m.back, loops[i]);
        chaos_close(c);
        CHECK_INT(m.back, m.given);
        api_stop(&a);
        CHECK_INT(peer_fds(), fds);
        PEER_UNTIL(peer_threads() == threads, 1000);
    }
}

static void case_without_memory(void) {
    memory m = {0, 0, 1};
    chaos_lambda_desc ld;
    chaos_desc d;
    chaos_error err;
    char address[32];
    int calls = 0;
    chaos *c;
    api a;
    memset(&d, 0, sizeof d);
    memset(&ld, 0, sizeof ld);
    d.alloc = take;
    d.free = give;
    d.alloc_user = &m;
    c = open_with(OFF, &d);
    api_start(&a, NULL, 1);
    snprintf(address, sizeof address, "127.0.0.1:%d", a.port);
    ld.api = address;
    CHECK_INT(chaos_lambda_run(c, count_handler, &calls, &ld, &err), CHAOS_ERR_MEMORY);
    CHECK_INT(err.code, CHAOS_ERR_MEMORY);
    CHECK_INT(calls, 0);
    CHECK(a.posted == 1 && a.nexts == 0);
    if (a.posted) CHECK_STR(a.posts[0].path, "init/error");
    if (a.posted) CHECK(strstr(peer_text(&a.posts[0].m.body), "Runtime.OutOfMemory") != NULL);
    chaos_close(c);
    CHECK_INT(m.back, m.given);
    api_stop(&a);
}

static const char *init_as_told(void *user) { return (const char *)user; }

static void case_init_before_all(void) {
    static char long_why[2001];
    static const char *const whys[] = {NULL, "no \"database\"", long_why, "\x01\x02"};
    int fds = peer_fds();
    size_t i;
    memset(long_why, 'w', 2000);
    for (i = 0; i < 4; i++) {
        chaos *c = open_config(OFF);
        chaos_lambda_desc d;
        chaos_error err;
        char address[32];
        chaos_result r;
        api a;
        check_where("init %d", (int)i);
        memset(&d, 0, sizeof d);
        api_start(&a, NULL, 0);
        snprintf(address, sizeof address, "127.0.0.1:%d", a.port);
        d.api = address;
        d.init = init_as_told;
        r = chaos_lambda_run(c, count_handler, (void *)(size_t)whys[i], &d, &err);
        CHECK_INT(r, whys[i] ? CHAOS_ERR_VALUE : CHAOS_ERR_UNREACHABLE);
        CHECK_INT(a.nexts, whys[i] ? 0 : 1);
        CHECK_INT(a.posted, whys[i] ? 1 : 0);
        if (a.posted) {
            const peer_bytes *body = &a.posts[0].m.body;
            CHECK_STR(a.posts[0].path, "init/error");
            CHECK(chaos_json_check(peer_text(body), body->len, NULL) == CHAOS_OK);
            CHECK(strstr(peer_text(body), "\"errorType\":\"Function.") != NULL);
        }
        chaos_close(c);
        api_stop(&a);
        CHECK_INT(peer_fds(), fds);
    }
}

int main(int argc, char **argv) {
    check_begin(argc, argv);
    peer_watchdog(60);
    unsetenv("AWS_LAMBDA_MAX_CONCURRENCY");
    unsetenv("CHAOS_EMF");
    CHECK_RUN(case_run_says_what_it_needs);
    CHECK_RUN(case_an_event_as_the_handler_sees_it);
    CHECK_RUN(case_write_appends);
    CHECK_RUN(case_write_knows_the_limit);
    CHECK_RUN(case_fail_in_every_way);
    CHECK_RUN(case_streams);
    CHECK_RUN(case_a_stream_that_is_cut);
    CHECK_RUN(case_a_reply_that_is_replaced);
    CHECK_RUN(case_off_while_the_handler_runs);
    CHECK_RUN(case_decide_tells_what_to_do);
    CHECK_RUN(case_decide_gives_a_place_to_give_back);
    CHECK_RUN(case_the_request_id_is_no_key);
    CHECK_RUN(case_delays_stop_before_the_deadline);
    CHECK_RUN(case_the_config_is_read_inside);
    CHECK_RUN(case_a_silent_agent_costs_a_quarter_second);
    CHECK_RUN(case_a_long_delay_looks_at_the_config);
    CHECK_RUN(case_a_long_delay_ends_when_chaos_does);
    CHECK_RUN(case_next_has_no_deadline);
    CHECK_RUN(case_every_loop_has_a_large_stack);
    CHECK_RUN(case_trace_ids_are_not_kept);
    CHECK_RUN(case_loops_in_parallel);
    CHECK_RUN(case_a_loop_that_ends_ends_all);
    CHECK_RUN(case_heartbeats_and_summaries);
    CHECK_RUN(case_memory_and_descriptors);
    CHECK_RUN(case_without_memory);
    CHECK_RUN(case_init_before_all);
    return check_end();
}

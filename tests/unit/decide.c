/* decide.c - the handle: gates, budgets, sources, states, counters. Time is a clock of the test's own, except where a
   fork or the refresher thread needs the real one. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"
#include "../check.h"

#include <sys/wait.h>

#define S          1000000000ull /* ns */
#define WALL_START (1800000000ull * S)

/* A handle with everything around it that a test may turn or look at. */
typedef struct rig {
    chaos *c;
    chaos_desc d;
    chaos_error err;
    unsigned long long mono, wall; /* the fake clock */
    char text[4096];               /* what the callback source holds */
    chaos_result answer;           /* what it answers */
    unsigned long long version;
    long long modified_ms;
    int fetches, allocs, frees;
    pthread_mutex_t lock;
    char log[1 << 18];
    size_t log_len;
    int events[4], dry_events;
    bool off_in_event;
} rig;

/* ---- helpers ------------------------------------------------------------------------------------------------- */
static unsigned long long rig_clock(void *user, bool wall) {
    rig *r = (rig *)user;
    return wall ? __atomic_load_n(&r->wall, __ATOMIC_SEQ_CST) : __atomic_load_n(&r->mono, __ATOMIC_SEQ_CST);
}

static chaos_result rig_fetch(void *user, char *buf, size_t cap, chaos_fetched *out, chaos_error *err) {
    rig *r = (rig *)user;
    (void)err;
    r->fetches++;
    if (r->answer) return r->answer;
    out->len = strlen(r->text) < cap ? strlen(r->text) : cap;
    out->version = r->version;
    out->modified_ms = r->modified_ms;
    memcpy(buf, r->text, out->len);
    return CHAOS_OK;
}

static void rig_log(void *user, const char *line, size_t len) {
    rig *r = (rig *)user;
    pthread_mutex_lock(&r->lock);
    if (r->log_len + len < sizeof r->log) {
        memcpy(r->log + r->log_len, line, len);
        r->log_len += len;
        r->log[r->log_len] = 0;
    }
    pthread_mutex_unlock(&r->lock);
}

static void rig_event(void *user, const chaos_event *e) {
    rig *r = (rig *)user;
    CHECK(e->reason != NULL);
    CHECK((e->verdict != NULL) == (e->kind == CHAOS_EVENT_FAULT));
    __atomic_fetch_add(&r->events[e->kind], 1, __ATOMIC_SEQ_CST);
    if (e->kind == CHAOS_EVENT_FAULT && e->dry_run) r->dry_events++;
    if (e->kind == CHAOS_EVENT_FAULT && r->off_in_event) {
        chaos_report s;
        chaos_stats(r->c, &s); /* both allowed here */
        chaos_off(r->c);
    }
}

static void *rig_alloc(void *user, size_t size) {
    __atomic_fetch_add(&((rig *)user)->allocs, 1, __ATOMIC_SEQ_CST);
    return malloc(size);
}

static void rig_free(void *user, void *p) {
    if (p) __atomic_fetch_add(&((rig *)user)->frees, 1, __ATOMIC_SEQ_CST);
    free(p);
}

static rig the_rig, other_rig;

#ifdef __has_feature
#if __has_feature(thread_sanitizer)
#define UNDER_TSAN 1
#endif
#endif
#ifdef __SANITIZE_THREAD__
#define UNDER_TSAN 1
#endif

/* Fewer rounds where every access costs hundreds: the thread sanitizer, valgrind (CHAOS_SLOW=1), and an emulator, which is
   how the big-endian build runs. */
static int rounds(int many) {
#ifdef UNDER_TSAN
    many /= 20;
#endif
    const char *slow = getenv("CHAOS_SLOW");
    const int one = 1;
    return (slow && !strcmp(slow, "1")) || !*(const char *)&one ? many / 20 : many;
}

/* Replaces each ' by ", so that JSON in this file can be read. */
static void unquote(char *to, size_t cap, const char *from) {
    size_t i;
    for (i = 0; from[i] && i + 1 < cap; i++) to[i] = from[i] == '\'' ? '"' : from[i];
    to[i] = 0;
}

/* A rig with the fake clock, no thread, everything captured; not open yet. */
static rig *rig_new(rig *r) {
    memset(r, 0, sizeof *r);
    pthread_mutex_init(&r->lock, NULL);
    r->mono = 1000 * S;
    r->wall = WALL_START;
    r->d.instance = "i-1";
    r->d.service = "svc";
    r->d.no_thread = true;
    r->d.clock = rig_clock;
    r->d.log = rig_log;
    r->d.event = rig_event;
    r->d.alloc = rig_alloc;
    r->d.free = rig_free;
    r->d.clock_user = r->d.log_user = r->d.event_user = r->d.alloc_user = r;
    return r;
}

static chaos *rig_open(rig *r) {
    r->c = chaos_open(&r->d, &r->err);
    if (!r->c) CHECK_STR(r->err.text, "opened");
    return r->c;
}

/* Opens with an inline config. */
static rig *rig_inline(rig *r, const char *json) {
    rig_new(r);
    unquote(r->text, sizeof r->text, json);
    r->d.config = r->text;
    rig_open(r);
    return r;
}

static chaos_result rig_set(rig *r, const char *json) {
    unquote(r->text, sizeof r->text, json);
    return chaos_refresh(r->c, &r->err);
}

/* Opens with the callback source, and fetches once. */
static rig *rig_callback(rig *r, const char *json) {
    rig_new(r);
    r->d.fetch = rig_fetch;
    r->d.fetch_user = r;
    rig_open(r);
    CHECK_INT(r->fetches, 0); /* never from chaos_open */
    rig_set(r, json);
    return r;
}

static void rig_close(rig *r) {
    chaos_close(r->c);
    CHECK_INT(r->frees, r->allocs); /* nothing is leaked, whatever happened */
    pthread_mutex_destroy(&r->lock);
}

static void pass_time(rig *r, unsigned long long ns) {
    __atomic_fetch_add(&r->mono, ns, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&r->wall, ns, __ATOMIC_SEQ_CST);
}

static chaos_report stats(rig *r) {
    chaos_report s;
    memset(&s, 0xAA, sizeof s);
    chaos_stats(r->c, &s);
    return s;
}

static chaos_verdict decide(rig *r) {
    chaos_request q;
    memset(&q, 0, sizeof q);
    q.method = "GET";
    q.path = "/";
    return chaos_decide(r->c, &q);
}

static chaos_verdict decide_key(rig *r, const char *key) {
    chaos_request q;
    memset(&q, 0, sizeof q);
    q.method = "GET";
    q.path = "/";
    q.key = key;
    return chaos_decide(r->c, &q);
}

/* With a config that fails everything: is chaos on? Decision and state must agree. */
static bool on(rig *r) {
    bool hit = decide(r).kind != CHAOS_PASS;
    chaos_report s = stats(r);
    CHECK_INT(hit, s.state == CHAOS_STATE_ON);
    return hit;
}

static bool log_has(rig *r, const char *text) {
    bool found;
    pthread_mutex_lock(&r->lock);
    r->log[r->log_len] = 0;
    found = strstr(r->log, text) != NULL;
    pthread_mutex_unlock(&r->lock);
    return found;
}

static int log_count(rig *r, const char *text) {
    const char *at;
    int count = 0;
    pthread_mutex_lock(&r->lock);
    for (at = strstr(r->log, text); at; at = strstr(at + 1, text)) count++;
    pthread_mutex_unlock(&r->lock);
    return count;
}

static bool readable(int fd) {
    struct pollfd p;
    p.fd = fd;
    p.events = POLLIN;
    p.revents = 0;
    return poll(&p, 1, 0) == 1;
}

static unsigned long long real_ns(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t);
    return (unsigned long long)t.tv_sec * S + (unsigned long long)t.tv_nsec;
}

static void nap(void) {
    struct timespec t = {0, 2000000};
    nanosleep(&t, NULL);
}

/* Waits for a condition, at most 10 s. */
#define UNTIL(cond)                                                       \
    do {                                                                  \
        unsigned long long until_end = real_ns(CLOCK_MONOTONIC) + 10 * S; \
        while (!(cond) && real_ns(CLOCK_MONOTONIC) < until_end) nap();    \
        CHECK(cond);                                                      \
    } while (0)

#define FAIL_ALL "{'enabled':true,'errorRate':100}"

/* ---- no handle, no config ------------------------------------------------------------------------------------- */
static void case_null_handle(void) {
    static chaos_config cfg;
    chaos_request q;
    chaos_verdict v;
    chaos_report s;
    chaos_error err;
    char buf[8] = "x";
    memset(&q, 0, sizeof q);
    memset(&err, 0, sizeof err);
    v = chaos_decide(NULL, &q);
    CHECK(v.kind == CHAOS_PASS && v.delay_us == 0 && v.status == 0 && v.ticket == 0);
    v.delay_us = 60000000;
    chaos_wait(NULL, &v); /* returns at once */
    chaos_done(NULL, &v, 200, 5);
    CHECK_INT(chaos_verdict_body(NULL, &v, buf, sizeof buf), 0);
    CHECK_STR(buf, "");
    CHECK_INT(chaos_verdict_body(NULL, &v, NULL, 0), 0);
    CHECK_INT(chaos_verdict_retry_after(NULL, &v), -1);
    CHECK_INT(chaos_wake_fd(NULL), -1);
    chaos_refresh(NULL, &err);
    chaos_refresh(NULL, NULL);
    chaos_off(NULL);
    memset(&s, 0xAA, sizeof s);
    chaos_stats(NULL, &s);
    CHECK_INT(s.state, CHAOS_STATE_OFF);
    CHECK_INT(s.requests, 0);
    CHECK(!chaos_get_config(NULL, &cfg));
    CHECK(chaos_proxy_run(NULL, NULL, &err) != CHAOS_OK);
    chaos_proxy_stop(NULL);
    chaos_close(NULL);
}

static void case_no_config(void) {
    chaos_verdict v;
    chaos_report s;
    chaos *c;
    unsetenv("CHAOS_CONFIG");
    rig_new(&the_rig);
    rig_open(&the_rig);
    v = decide(&the_rig);
    CHECK(v.kind == CHAOS_PASS && v.rule == 0);
    s = stats(&the_rig);
    CHECK_INT(s.state, CHAOS_STATE_OFF);
    CHECK_INT(s.requests, 0); /* off: nothing is counted */
    CHECK_INT(s.version, 0);
    CHECK_INT(s.age_ms, -1);
    CHECK(readable(chaos_wake_fd(the_rig.c)));
    CHECK(log_has(&the_rig, "\"action\":\"open\""));
    rig_close(&the_rig);
    {
        chaos_desc quiet; /* desc NULL is the same, but logs to stderr: silence that for the test */
        memset(&quiet, 0, sizeof quiet);
        quiet.quiet = true;
        c = chaos_open(&quiet, NULL);
        CHECK(c != NULL);
        chaos_close(c);
    }
}

static void case_bad_desc(void) {
    static const struct {
        const char *config;
        chaos_result code;
    } sources[] = {
        {"chaos.json", CHAOS_ERR_ARGUMENT}, {"http://x/", CHAOS_ERR_ARGUMENT}, {"file:", CHAOS_ERR_ARGUMENT},
        {"env:", CHAOS_ERR_ARGUMENT},       {"ssm:/a?b", CHAOS_ERR_ARGUMENT},  {"appconfig:a/b", CHAOS_ERR_ARGUMENT},
        {"yes", CHAOS_ERR_ARGUMENT},
    };
    static const int ttls[] = {-1, 9, 86400001}, stales[] = {-2};
    size_t i;
    for (i = 0; i < sizeof sources / sizeof sources[0]; i++) {
        rig_new(&the_rig)->d.config = sources[i].config;
        check_where("%s", sources[i].config);
        CHECK(!chaos_open(&the_rig.d, &the_rig.err));
        CHECK_INT(the_rig.err.code, sources[i].code);
        CHECK(the_rig.err.text[0] != 0);
        CHECK(!chaos_open(&the_rig.d, NULL));
        CHECK_INT(the_rig.frees, the_rig.allocs);
    }
    for (i = 0; i < 3; i++) {
        rig_new(&the_rig)->d.ttl_ms = ttls[i];
        check_where("ttl %d", ttls[i]);
        CHECK(!chaos_open(&the_rig.d, &the_rig.err));
        CHECK_INT(the_rig.err.code, CHAOS_ERR_RANGE);
    }
    rig_new(&the_rig)->d.max_stale_ms = stales[0];
    CHECK(!chaos_open(&the_rig.d, &the_rig.err));
    rig_new(&the_rig)->d.alloc = NULL; /* both or neither */
    CHECK(!chaos_open(&the_rig.d, &the_rig.err));
    CHECK_INT(the_rig.err.code, CHAOS_ERR_ARGUMENT);
    check_where("%s", "");
}

/* ---- the eight states ------------------------------------------------------------------------------------------ */
static void state_is(rig *r, chaos_state want, const char *text) {
    chaos_report s = stats(r);
    bool active = want == CHAOS_STATE_ON || want == CHAOS_STATE_DRY_RUN;
    check_where("%s", text);
    CHECK_INT(s.state, want);
    CHECK_STR(chaos_state_text(s.state), text);
    CHECK(s.reason[0] != 0);
    if (want != CHAOS_STATE_ON) CHECK_INT(decide(r).kind, CHAOS_PASS);
    CHECK_INT(readable(chaos_wake_fd(r->c)), !active); /* readable exactly while not on */
    check_where("%s", "");
}

static void case_states(void) {
    rig *r = rig_callback(&the_rig, "{'enabled':false}");
    state_is(r, CHAOS_STATE_OFF, "off");
    rig_set(r, FAIL_ALL);
    state_is(r, CHAOS_STATE_ON, "on");
    CHECK_INT(decide(r).kind, CHAOS_STATUS);
    rig_set(r, "{'enabled':true,'errorRate':100,'dryRun':true}");
    state_is(r, CHAOS_STATE_DRY_RUN, "dry-run");
    rig_set(r, "{'enabled':true,'errorRate':100,'canary':0}");
    state_is(r, CHAOS_STATE_NOT_CANARY, "not-canary");
    rig_set(r, "{'enabled':true,'errorRate':100,'expiresAt':1700000000}");
    state_is(r, CHAOS_STATE_EXPIRED, "expired");
    rig_set(r, "{'enabled':true,'errorRate':100,'latncy':5}");
    state_is(r, CHAOS_STATE_INVALID, "invalid");
    CHECK(strstr(stats(r).reason, "latncy") && strstr(stats(r).reason, "line 1"));
    rig_set(r, FAIL_ALL);
    pass_time(r, 71 * S);
    state_is(r, CHAOS_STATE_STALE, "stale");
    rig_set(r, FAIL_ALL);
    state_is(r, CHAOS_STATE_ON, "on");
    chaos_off(r->c);
    state_is(r, CHAOS_STATE_KILLED, "killed");
    rig_close(r);
    CHECK(chaos_state_text((chaos_state)99) != NULL);
    CHECK(chaos_result_text((chaos_result)99) != NULL);
    CHECK_STR(chaos_result_text(CHAOS_OK), "ok");
    CHECK_STR(chaos_version(), CHAOS_VERSION);
}

/* kill > enabled > expiry and age > instance and canary: what comes first is what is told. */
static void case_gate_order(void) {
    rig *r = rig_callback(&the_rig, "{'enabled':false,'errorRate':100,'expiresAt':1700000000,'canary':0}");
    state_is(r, CHAOS_STATE_OFF, "off");
    rig_set(r, "{'enabled':true,'errorRate':100,'expiresAt':1700000000,'canary':0}");
    state_is(r, CHAOS_STATE_EXPIRED, "expired");
    rig_set(r, "{'enabled':true,'errorRate':100,'dryRun':true,'canary':0}");
    state_is(r, CHAOS_STATE_NOT_CANARY, "not-canary");
    pass_time(r, 71 * S);
    state_is(r, CHAOS_STATE_STALE, "stale");
    chaos_off(r->c);
    state_is(r, CHAOS_STATE_KILLED, "killed");
    rig_close(r);
}

/* ---- the end --------------------------------------------------------------------------------------------------- */
static void case_expires_by_both_clocks(void) {
    rig *r = rig_inline(&the_rig, "{'enabled':true,'errorRate':100,'expiresAt':1800000010}");
    CHECK(on(r));
    CHECK_INT(stats(r).end_ms, 1800000010000ll);
    pass_time(r, 10 * S - 1000000);
    CHECK(on(r));
    pass_time(r, 1000000);
    CHECK(!on(r)); /* exactly then, with no refresh in between */
    CHECK_INT(stats(r).state, CHAOS_STATE_EXPIRED);
    rig_close(r);
    r = rig_inline(r, "{'enabled':true,'errorRate':100,'expiresAt':1800000010}");
    r->mono += 10 * S; /* the wall clock stands still */
    CHECK(!on(r));
    rig_close(r);
    r = rig_inline(r, "{'enabled':true,'errorRate':100,'expiresAt':1800000010}");
    r->wall += 10 * S; /* the wall clock is set forward */
    CHECK(!on(r));
    rig_close(r);
    r = rig_inline(r, "{'enabled':true,'errorRate':100,'expiresAt':1800000010}");
    r->wall -= 7200 * S; /* set back by two hours, right after the start */
    r->mono += 5 * S;
    CHECK(on(r));
    r->mono += 5 * S;
    CHECK(!on(r));
    r->wall -= 7200 * S;
    CHECK(!on(r));
    rig_close(r);
}

static void case_expired_stays_off(void) {
    rig *r = rig_callback(&the_rig, "{'enabled':true,'errorRate':100,'expiresAt':1800000010}");
    CHECK(on(r));
    pass_time(r, 11 * S);
    CHECK(!on(r));
    chaos_refresh(r->c, NULL); /* the same text is no new order */
    CHECK(!on(r));
    r->wall -= 20 * S; /* nor is a clock set back, even when the text is fetched again */
    chaos_refresh(r->c, NULL);
    CHECK(!on(r));
    rig_set(r, "{'enabled':true,'errorRate':100,'expiresAt':1800000060}");
    CHECK(on(r));
    rig_close(r);
}

static void case_lease(void) {
    int i;
    rig *r = rig_callback(&the_rig, FAIL_ALL);
    CHECK_INT(stats(r).end_ms, 1800000000000ll + 3600000);
    for (i = 1; i < 360; i++) { /* fetched again and again: the lease runs from the change */
        pass_time(r, 10 * S);
        chaos_refresh(r->c, NULL);
        if (!on(r)) CHECK_INT(i, 360);
    }
    pass_time(r, 10 * S);
    chaos_refresh(r->c, NULL);
    CHECK(!on(r));
    CHECK_INT(stats(r).state, CHAOS_STATE_EXPIRED);
    CHECK(strstr(stats(r).reason, "lease") != NULL);
    rig_set(r, "{'enabled':true,'errorRate':100,'note':'again'}"); /* a change is a new order */
    CHECK(on(r));
    rig_close(r);
}

static void case_lease_from_modified(void) {
    rig *r = rig_new(&the_rig);
    r->d.fetch = rig_fetch;
    r->d.fetch_user = r;
    rig_open(r);
    r->modified_ms = 1800000000000ll - 50 * 60000; /* 50 minutes ago */
    rig_set(r, FAIL_ALL);
    CHECK(on(r));
    CHECK_INT(stats(r).end_ms, 1800000000000ll + 10 * 60000);
    r->modified_ms = 1800000000000ll - 61 * 60000;
    chaos_refresh(r->c, NULL);
    CHECK(!on(r));
    r->modified_ms = 1800000000000ll + 86400000; /* a source whose clock is ahead gives no more than an hour */
    chaos_refresh(r->c, NULL);
    CHECK(on(r));
    CHECK_INT(stats(r).end_ms, 1800000000000ll + 3600000);
    rig_close(r);
}

static void case_no_lease(void) {
    static const char *const never = "{'enabled':true,'errorRate':100,'expiresAt':'never'}";
    rig *r = rig_inline(&the_rig, FAIL_ALL);
    CHECK_INT(stats(r).end_ms, 0);
    pass_time(r, 86400 * S);
    CHECK(on(r)); /* ends with the process */
    rig_close(r);
    r = rig_inline(r, never);
    pass_time(r, 86400 * S);
    CHECK(on(r));
    rig_close(r);
    setenv("CHAOS_TEST_CONFIG", "{\"enabled\":true,\"errorRate\":100}", 1);
    rig_new(r)->d.config = "env:CHAOS_TEST_CONFIG";
    rig_open(r);
    CHECK_INT(stats(r).end_ms, 0);
    pass_time(r, 86400 * S);
    CHECK(on(r));
    rig_close(r);
    unsetenv("CHAOS_TEST_CONFIG");
    r = rig_callback(r, never); /* a remote one must say so, and is still bound by its age */
    CHECK_INT(stats(r).end_ms, 0);
    pass_time(r, 7200 * S);
    chaos_refresh(r->c, NULL);
    CHECK(on(r));
    pass_time(r, 71 * S);
    CHECK(!on(r));
    rig_close(r);
}

/* ---- age ------------------------------------------------------------------------------------------------------- */
static void case_stale(void) {
    rig *r = rig_callback(&the_rig, FAIL_ALL);
    r->answer = CHAOS_ERR_UNREACHABLE;
    pass_time(r, 10 * S);
    CHECK(chaos_refresh(r->c, &r->err) != CHAOS_OK);
    CHECK(on(r)); /* the last good one */
    CHECK_INT(stats(r).fetch_errors, 1);
    CHECK_INT(stats(r).age_ms, 10000);
    pass_time(r, 60 * S - 1000000);
    CHECK(on(r));
    pass_time(r, 1000000); /* TTL 10 s and max_stale 60 s are over */
    CHECK(!on(r));
    CHECK_INT(stats(r).state, CHAOS_STATE_STALE);
    r->answer = CHAOS_OK;
    chaos_refresh(r->c, &r->err);
    CHECK(on(r));
    r->mono += 70 * S; /* by the monotonic clock alone: a refresher that died, a wall clock that stands */
    CHECK(!on(r));
    chaos_refresh(r->c, &r->err);
    CHECK(on(r));
    r->wall += 70 * S;
    CHECK(!on(r));
    rig_close(r);
}

static void check_stale_after(int ttl_ms, int max_stale_ms, unsigned long long ms) {
    rig *r = rig_new(&the_rig);
    r->d.ttl_ms = ttl_ms;
    r->d.max_stale_ms = max_stale_ms;
    r->d.fetch = rig_fetch;
    r->d.fetch_user = r;
    rig_open(r);
    rig_set(r, FAIL_ALL);
    check_where("ttl %d, stale %d", ttl_ms, max_stale_ms);
    pass_time(r, ms * 1000000 - 1000000);
    CHECK(on(r));
    pass_time(r, 1000000);
    CHECK(!on(r));
    rig_close(r);
}

static void case_stale_settings(void) {
    check_stale_after(0, 0, 70000);
    check_stale_after(5000, 0, 65000);
    check_stale_after(5000, 100, 5100);
    check_stale_after(5000, -1, 5000);
    check_stale_after(60000, -1, 60000);
}

/* Healthy: within the TTL, shortened by a fifth at most. Failing: never sooner than a TTL, never later than 30 s or a TTL. */
static void case_fetch_schedule(void) {
    static const int ttls[] = {10, 1000, 10000, 60000};
    size_t t;
    for (t = 0; t < 4; t++) {
        unsigned long long ttl = (unsigned long long)ttls[t] * 1000000, low = ~0ull, high = 0, most = ttl > 30 * S ? ttl : 30 * S;
        int i;
        rig *r = rig_new(&the_rig);
        r->d.ttl_ms = ttls[t];
        r->d.fetch = rig_fetch;
        r->d.fetch_user = r;
        r->d.quiet = true;
        rig_open(r);
        rig_set(r, FAIL_ALL);
        check_where("ttl %d", ttls[t]);
        for (i = 0; i < 500; i++) {
            unsigned long long wait;
            chaos_refresh(r->c, NULL);
            wait = r->c->next_fetch - r->mono;
            if (wait < low) low = wait;
            if (wait > high) high = wait;
        }
        CHECK(low >= ttl / 5 * 4 && high <= ttl);
        if (ttls[t] >= 1000) CHECK(high - low > ttl / 10); /* there is jitter */
        r->answer = CHAOS_ERR_UNREACHABLE;
        for (low = ~0ull, high = 0, i = 0; i < 500; i++) {
            unsigned long long wait;
            chaos_refresh(r->c, NULL);
            wait = r->c->next_fetch - r->mono;
            if (wait < low) low = wait;
            if (wait > high) high = wait;
        }
        CHECK(low >= ttl && high <= most);
        if (ttls[t] <= 10000) CHECK(high > 15 * S); /* it backs off */
        rig_close(r);
    }
}

/* ---- what the source says -------------------------------------------------------------------------------------- */
static void case_not_found_is_quiet(void) {
    rig *r = rig_callback(&the_rig, FAIL_ALL);
    CHECK(on(r));
    r->answer = CHAOS_ERR_NOT_FOUND;
    chaos_refresh(r->c, &r->err);
    CHECK(!on(r)); /* at once: a delete is an order */
    CHECK_INT(stats(r).state, CHAOS_STATE_OFF);
    CHECK_INT(stats(r).config_errors, 0);
    CHECK_INT(stats(r).fetch_errors, 0);
    CHECK(!log_has(r, "\"level\":\"error\"") && !log_has(r, "\"level\":\"warn\""));
    r->answer = CHAOS_OK;
    chaos_refresh(r->c, &r->err);
    CHECK(on(r));
    rig_close(r);
}

static void case_invalid_is_loud(void) {
    rig *r = rig_callback(&the_rig, FAIL_ALL);
    CHECK(on(r));
    CHECK(rig_set(r, "{'enabled':true,'errorRate':100,\n'errorrate':5}") != CHAOS_OK);
    CHECK_INT(r->err.code, CHAOS_ERR_UNKNOWN_KEY);
    CHECK(!on(r)); /* not the last good one: nobody can say what was meant */
    CHECK_INT(stats(r).state, CHAOS_STATE_INVALID);
    CHECK_INT(stats(r).config_errors, 1);
    CHECK(strstr(stats(r).reason, "errorrate") != NULL);
    CHECK(log_has(r, "\"level\":\"error\"") && log_has(r, "line 2") && log_has(r, "errorrate"));
    chaos_refresh(r->c, NULL);
    CHECK_INT(stats(r).config_errors, 1); /* the same text is told once */
    CHECK(rig_set(r, "") != CHAOS_OK);    /* empty is not missing */
    CHECK_INT(stats(r).state, CHAOS_STATE_INVALID);
    CHECK_INT(rig_set(r, FAIL_ALL), CHAOS_OK);
    CHECK(on(r));
    rig_close(r);
}

/* What a failed fetch said is over with the next good one, and is no reason for a text that was refused before. */
static void case_problems_do_not_outlive_their_cause(void) {
    static const char *const texts[] = {FAIL_ALL, "{'enabled':true,'errorrate':5}"};
    char reason[256];
    int i;
    for (i = 0; i < 2; i++) {
        rig *r = rig_callback(&the_rig, texts[i]);
        snprintf(reason, sizeof reason, "%s", stats(r).reason);
        r->answer = CHAOS_ERR_UNREACHABLE;
        chaos_refresh(r->c, NULL);
        CHECK(stats(r).problem[0] != 0);
        r->answer = CHAOS_OK;
        CHECK_INT(chaos_refresh(r->c, &r->err) != CHAOS_OK, i);
        CHECK_STR(stats(r).reason, reason);
        CHECK_STR(stats(r).problem, i ? reason : "");
        if (i) CHECK(strstr(r->err.text, "errorrate") != NULL && r->err.line == 1);
        rig_close(r);
    }
}

/* A config that is off, or not for this instance, is in force before the state follows it: no fault in between. The fetch is
   taken in as chaos_refresh does it, up to that moment. */
static void case_off_from_the_first_moment(void) {
    static const char *const texts[] = {"{'enabled':false,'errorRate':100}", "{'enabled':true,'errorRate':100,'canary':0}",
                                        "{'enabled':true,'errorRate':100,'match':{'paths':['/**']},'canary':0}",
                                        "{'enabled':true,'errorRate':100,'match':{'paths':['/**']},'instances':['other']}"};
    static const char *const before[] = {FAIL_ALL, "{'enabled':true,'errorRate':100,'match':{'paths':['/**']}}"};
    chaos_fetched got;
    chaos_verdict v;
    unsigned first;
    size_t i;
    for (i = 0; i < 8; i++) {
        rig *r = rig_callback(&the_rig, before[i % 2]);
        check_where("%s after %s", texts[i / 2], before[i % 2]);
        CHECK(on(r));
        first = decide(r).version;
        memset(&got, 0, sizeof got);
        unquote(r->text, sizeof r->text, texts[i / 2]);
        CHECK_INT(rig_fetch(r, r->c->bytes, CHAOS_CONFIG_INPUT_MAX + 1, &got, &r->err), CHAOS_OK);
        chaosi_take(r->c, CHAOS_OK, &got, &r->err);
        v = decide(r); /* the new one is there, the old gates too: by the old one, or not at all */
        CHECK(v.kind == CHAOS_PASS || v.version == first);
        chaosi_publish(r->c);
        CHECK_INT(decide(r).kind, CHAOS_PASS);
        rig_close(r);
    }
}

static void case_invalid_does_not_fail_open(void) {
    rig *r = rig_inline(&the_rig, "{'enabled':true,'errorRate':500}");
    CHECK(r->c != NULL && !on(r));
    CHECK_INT(stats(r).state, CHAOS_STATE_INVALID);
    CHECK(log_has(r, "\"level\":\"error\""));
    rig_close(r);
}

static void case_unreachable_from_the_start(void) {
    rig *r = rig_new(&the_rig);
    r->d.fetch = rig_fetch;
    r->d.fetch_user = r;
    r->answer = CHAOS_ERR_UNREACHABLE;
    rig_open(r);
    CHECK(!on(r));
    CHECK_INT(chaos_refresh(r->c, &r->err), CHAOS_ERR_UNREACHABLE);
    CHECK(!on(r));
    CHECK_INT(stats(r).state, CHAOS_STATE_OFF);
    CHECK_INT(stats(r).age_ms, -1);
    CHECK(log_has(r, "\"level\":\"warn\""));
    CHECK(r->events[CHAOS_EVENT_NOTE] >= 1);
    r->answer = CHAOS_ERR_SYSTEM; /* anything else is unreachable, too */
    CHECK(chaos_refresh(r->c, &r->err) != CHAOS_OK);
    CHECK_INT(stats(r).fetch_errors, 2);
    rig_close(r);
}

/* A source that claims more than there was room for, or nothing, must not be believed. */
static chaos_result liar(void *user, char *buf, size_t cap, chaos_fetched *out, chaos_error *err) {
    (void)err;
    memset(buf, ' ', cap);
    memcpy(buf, "{\"enabled\":true}", 16);
    out->len = *(size_t *)user;
    return CHAOS_OK;
}

static void case_source_that_lies(void) {
    size_t len = (size_t)-1;
    rig *r = rig_new(&the_rig);
    r->d.fetch = liar;
    r->d.fetch_user = &len;
    rig_open(r);
    CHECK(chaos_refresh(r->c, &r->err) != CHAOS_OK);
    CHECK_INT(stats(r).state, CHAOS_STATE_INVALID);
    len = 0;
    CHECK(chaos_refresh(r->c, &r->err) != CHAOS_OK);
    CHECK_INT(stats(r).state, CHAOS_STATE_INVALID);
    len = 16;
    CHECK_INT(chaos_refresh(r->c, &r->err), CHAOS_OK);
    CHECK_INT(stats(r).state, CHAOS_STATE_ON);
    rig_close(r);
}

static void case_versions(void) {
    rig *r = rig_callback(&the_rig, FAIL_ALL);
    unsigned long long first = stats(r).version;
    CHECK(first > 0);
    CHECK_INT(decide(r).version, first);
    chaos_refresh(r->c, NULL);
    CHECK_INT(stats(r).version, first);
    CHECK_INT(stats(r).config_changes, 1);
    rig_set(r, "{'enabled':true,'errorRate':99}");
    CHECK_INT(stats(r).version, first + 1);
    r->version = 77; /* the source knows better */
    chaos_refresh(r->c, NULL);
    CHECK_INT(stats(r).version, 77);
    CHECK_INT(decide(r).version, 77);
    CHECK_INT(stats(r).fetches, 4);
    rig_close(r);
}

static void case_chaos_config_in_environment(void) {
    setenv("CHAOS_CONFIG", "{\"enabled\":true,\"errorRate\":100}", 1);
    rig_open(rig_new(&the_rig));
    CHECK(on(&the_rig));
    rig_close(&the_rig);
    setenv("CHAOS_CONFIG", "", 1); /* empty is unset */
    rig_open(rig_new(&the_rig));
    CHECK(!on(&the_rig));
    CHECK_INT(stats(&the_rig).state, CHAOS_STATE_OFF);
    rig_close(&the_rig);
    setenv("CHAOS_CONFIG", "{\"enabled\":true,\"errorRate\":100}", 1);
    rig_inline(&the_rig, "{'enabled':false}"); /* what the program says goes first */
    CHECK(!on(&the_rig));
    rig_close(&the_rig);
    unsetenv("CHAOS_CONFIG");
    rig_new(&the_rig)->d.config = "env:CHAOS_TEST_IS_NOT_SET";
    rig_open(&the_rig);
    CHECK(!on(&the_rig));
    CHECK_INT(stats(&the_rig).state, CHAOS_STATE_OFF);
    rig_close(&the_rig);
}

/* ---- file: ----------------------------------------------------------------------------------------------------- */
static char file_path[64], file_source[80];

static void file_name(void) {
    const char *dir = getenv("TMPDIR");
    int fd;
    snprintf(file_path, sizeof file_path, "%.40s/chaos-XXXXXX", dir && strlen(dir) < 40 ? dir : "/tmp");
    fd = mkstemp(file_path);
    CHECK(fd >= 0);
    close(fd);
    unlink(file_path);
    snprintf(file_source, sizeof file_source, "file:%s", file_path);
}

/* As an editor may do it: in place, not atomically. */
static void file_write(const char *json, size_t len) {
    char text[4096];
    FILE *f = fopen(file_path, "w");
    unquote(text, sizeof text, json);
    CHECK(f != NULL);
    if (!f) return;
    fwrite(text, 1, len < strlen(text) ? len : strlen(text), f);
    fclose(f);
}

static void case_file(void) {
    rig *r = rig_new(&the_rig);
    file_name();
    r->d.config = file_source;
    rig_open(r);
    CHECK_INT(stats(r).state, CHAOS_STATE_OFF); /* not there: off, quietly */
    CHECK(!log_has(r, "\"level\":\"error\"") && !log_has(r, "\"level\":\"warn\""));
    file_write(FAIL_ALL, 4096);
    CHECK_INT(chaos_refresh(r->c, &r->err), CHAOS_OK);
    CHECK(on(r));
    CHECK_INT(stats(r).end_ms, 1800000000000ll + 3600000); /* leased */
    file_write("{'enabled':true,'errorRate':101}", 4096);
    CHECK(chaos_refresh(r->c, &r->err) != CHAOS_OK);
    CHECK(!on(r));
    file_write(FAIL_ALL, 4096);
    chaos_refresh(r->c, NULL);
    CHECK(on(r));
    unlink(file_path);
    chaos_refresh(r->c, NULL);
    CHECK(!on(r));
    CHECK_INT(stats(r).state, CHAOS_STATE_OFF);
    rig_close(r);
    file_write(FAIL_ALL, 4096); /* there from the start: read before chaos_open returns */
    rig_new(r)->d.config = file_source;
    rig_open(r);
    CHECK(on(r));
    rig_close(r);
    unlink(file_path);
    CHECK_INT(mkdir(file_path, 0700), 0); /* something, but not a file: unreachable */
    rig_new(r)->d.config = file_source;
    rig_open(r);
    CHECK(!on(r));
    CHECK(chaos_refresh(r->c, &r->err) == CHAOS_ERR_UNREACHABLE);
    rig_close(r);
    rmdir(file_path);
}

/* However much of the file is there: never on before all of it is. */
static void case_file_half_written(void) {
    static const char *const text = "{'enabled':true,'errorRate':100,'expiresAt':'never','match':{'paths':['/**']}}";
    size_t len = strlen(text), cut;
    rig *r = rig_new(&the_rig);
    file_name();
    r->d.config = file_source;
    r->d.quiet = true;
    rig_open(r);
    for (cut = 0; cut <= len; cut++) {
        file_write(text, cut);
        chaos_refresh(r->c, NULL);
        check_where("%u of %u bytes", (unsigned)cut, (unsigned)len);
        CHECK_INT(on(r), cut == len);
    }
    rig_close(r);
    unlink(file_path);
}

static void case_file_too_large(void) {
    static char big[CHAOS_CONFIG_INPUT_MAX + 1];
    FILE *f;
    rig *r = rig_new(&the_rig);
    file_name();
    memset(big, ' ', sizeof big);
    unquote(big, 64, FAIL_ALL);
    big[strlen(big)] = ' ';
    f = fopen(file_path, "w");
    CHECK(f && fwrite(big, 1, sizeof big - 1, f) == sizeof big - 1);
    if (f) fclose(f);
    r->d.config = file_source;
    rig_open(r);
    CHECK(on(r)); /* 64 KiB to the byte */
    f = fopen(file_path, "a");
    if (f) {
        fputc(' ', f);
        fclose(f);
    }
    CHECK_INT(chaos_refresh(r->c, &r->err), CHAOS_ERR_TOO_LARGE);
    CHECK(!on(r));
    rig_close(r);
    unlink(file_path);
}

/* The refresher picks a change up by itself; on the real clock. */
static void case_file_is_followed(void) {
    rig *r = rig_new(&the_rig);
    file_name();
    r->d.config = file_source;
    r->d.no_thread = false;
    r->d.clock = NULL;
    r->d.ttl_ms = 20;
    rig_open(r);
    CHECK_INT(decide(r).kind, CHAOS_PASS);
    file_write(FAIL_ALL, 4096);
    UNTIL(decide(r).kind == CHAOS_STATUS);
    file_write("{'enabled':false}", 4096);
    UNTIL(decide(r).kind == CHAOS_PASS);
    file_write(FAIL_ALL, 4096);
    UNTIL(decide(r).kind == CHAOS_STATUS);
    unlink(file_path);
    UNTIL(decide(r).kind == CHAOS_PASS);
    UNTIL(__atomic_load_n(&r->events[CHAOS_EVENT_STATE], __ATOMIC_SEQ_CST) >= 4); /* told just after it is in force */
    rig_close(r);
}

/* ---- fork ------------------------------------------------------------------------------------------------------ */
/* In a child: on at first, off by itself within 10 s. 0 = so it was. */
static int child_ends_by_itself(rig *r) {
    unsigned long long end = real_ns(CLOCK_MONOTONIC) + 10 * S;
    if (decide(r).kind == CHAOS_PASS) return 1;
    while (decide(r).kind != CHAOS_PASS || stats(r).state == CHAOS_STATE_ON) { /* the decision may be some ms ahead */
        if (real_ns(CLOCK_MONOTONIC) > end) return 2;
        nap();
    }
    return stats(r).state == CHAOS_STATE_EXPIRED || stats(r).state == CHAOS_STATE_STALE ? 0 : 3;
}

static int in_child(int (*fn)(rig *), rig *r) {
    int status = -1;
    pid_t pid = fork();
    if (pid == 0) _exit(fn(r));
    CHECK(pid > 0);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {}
    return WIFEXITED(status) ? WEXITSTATUS(status) : 100 + WTERMSIG(status);
}

static void case_fork_expiry(void) {
    char json[128];
    unsigned long long end_ms = real_ns(CLOCK_REALTIME) / 1000000 + 400;
    time_t seconds = (time_t)(end_ms / 1000);
    struct tm tm;
    rig *r = rig_new(&the_rig);
    gmtime_r(&seconds, &tm);
    snprintf(json, sizeof json, "{\"enabled\":true,\"errorRate\":100,\"expiresAt\":\"%04d-%02d-%02dT%02d:%02d:%02d.%03uZ\"}",
             tm.tm_year + 1900, tm.tm_mon + 1, tm.tm_mday, tm.tm_hour, tm.tm_min, tm.tm_sec, (unsigned)(end_ms % 1000));
    r->d.config = json;
    r->d.clock = NULL;
    r->d.no_thread = false; /* the child has none of it */
    rig_open(r);
    CHECK_INT(stats(r).state, CHAOS_STATE_ON);
    CHECK_INT(in_child(child_ends_by_itself, r), 0);
    UNTIL(stats(r).state == CHAOS_STATE_EXPIRED);
    UNTIL(readable(chaos_wake_fd(r->c))); /* the refresher's work */
    rig_close(r);
}

static void case_fork_age(void) {
    rig *r = rig_new(&the_rig);
    r->d.fetch = rig_fetch;
    r->d.fetch_user = r;
    r->d.clock = NULL;
    r->d.no_thread = false;
    r->d.ttl_ms = 50;
    r->d.max_stale_ms = 200;
    unquote(r->text, sizeof r->text, FAIL_ALL);
    rig_open(r);
    UNTIL(stats(r).state == CHAOS_STATE_ON);
    CHECK_INT(in_child(child_ends_by_itself, r), 0); /* nobody refreshes there */
    CHECK_INT(stats(r).state, CHAOS_STATE_ON);       /* and the parent goes on */
    CHECK_INT(decide(r).kind, CHAOS_STATUS);
    rig_close(r);
}

static int child_off_and_close(rig *r) {
    chaos_off(r->c);
    if (decide(r).kind != CHAOS_PASS) return 1;
    chaos_close(r->c); /* must not join the parent's thread */
    return 0;
}

static void case_fork_off_is_local(void) {
    rig *r = rig_new(&the_rig);
    r->d.config = "{\"enabled\":true,\"errorRate\":100}";
    r->d.clock = NULL;
    r->d.no_thread = false;
    rig_open(r);
    CHECK_INT(in_child(child_off_and_close, r), 0);
    CHECK_INT(decide(r).kind, CHAOS_STATUS);
    CHECK(!readable(chaos_wake_fd(r->c))); /* the pipe is shared: the child must not have rung it */
    rig_close(r);
}

/* At the fork the refresher may have held the lock, which nobody unlocks in the child. */
static int child_closes(rig *r) {
    alarm(10);
    chaos_close(r->c);
    return 0;
}

static void case_fork_while_the_lock_is_held(void) {
    rig *r = rig_new(&the_rig);
    r->d.config = "{\"enabled\":true,\"errorRate\":100}";
    r->d.no_thread = false;
    rig_open(r);
    decide(r);
    CHAOSI_LOCK(&r->c->lock);
    CHECK_INT(in_child(child_closes, r), 0);
    CHAOSI_UNLOCK(&r->c->lock);
    rig_close(r);
}

/* ---- kill ------------------------------------------------------------------------------------------------------ */
static void case_off_is_latched(void) {
    rig *r = rig_callback(&the_rig, FAIL_ALL);
    CHECK(on(r) && !readable(chaos_wake_fd(r->c)));
    chaos_off(r->c);
    CHECK(!on(r) && readable(chaos_wake_fd(r->c)));
    rig_set(r, "{'enabled':true,'errorRate':100,'note':'new order'}");
    CHECK(!on(r) && readable(chaos_wake_fd(r->c)));
    CHECK_INT(stats(r).state, CHAOS_STATE_KILLED);
    chaos_off(r->c);
    rig_close(r);
    r = rig_callback(r, "{'enabled':false}"); /* before it was ever on */
    chaos_off(r->c);
    rig_set(r, FAIL_ALL);
    CHECK(!on(r) && readable(chaos_wake_fd(r->c)));
    rig_close(r);
}

static rig *signal_rig;

static void on_signal(int sig) {
    (void)sig;
    chaos_off(signal_rig->c);
}

static void case_off_in_signal_handler(void) {
    struct sigaction action, before;
    rig *r = signal_rig = rig_inline(&the_rig, FAIL_ALL);
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    sigaction(SIGUSR1, &action, &before);
    CHECK(on(r));
    raise(SIGUSR1);
    CHECK(!on(r));
    CHECK_INT(stats(r).state, CHAOS_STATE_KILLED);
    sigaction(SIGUSR1, &before, NULL);
    rig_close(r);
}

static void case_disable(void) {
    rig *r;
    setenv("CHAOS_DISABLE", "1", 1);
    r = rig_inline(&the_rig, FAIL_ALL);
    CHECK(!on(r));
    CHECK_INT(stats(r).state, CHAOS_STATE_KILLED);
    CHECK(strstr(stats(r).reason, "CHAOS_DISABLE") != NULL);
    rig_close(r);
    r = rig_callback(r, FAIL_ALL);
    CHECK(!on(r));
    rig_close(r);
    unsetenv("CHAOS_DISABLE");
    r = rig_inline(r, FAIL_ALL);
    CHECK(on(r));
    rig_close(r);
}

/* ---- who takes part --------------------------------------------------------------------------------------------- */
static void case_canary(void) {
    enum { INSTANCES = 300 };
    int i, percent, part_at_30 = 0;
    for (i = 0; i < INSTANCES; i++) {
        char name[32], json[64];
        bool before = false;
        rig *r = rig_new(&the_rig);
        snprintf(name, sizeof name, "i-%08x", (unsigned)i * 2654435761u);
        r->d.instance = name;
        r->d.quiet = true;
        r->d.fetch = rig_fetch;
        r->d.fetch_user = r;
        rig_open(r);
        for (percent = 0; percent <= 100; percent += 5) {
            bool now;
            snprintf(json, sizeof json, "{'enabled':true,'errorRate':100,'canary':%d}", percent);
            rig_set(r, json);
            now = on(r);
            CHECK(now || !before); /* nested: who took part still does */
            if (!percent) CHECK(!now);
            if (percent == 100) CHECK(now);
            part_at_30 += percent == 30 && now;
            before = now;
        }
        rig_close(r);
    }
    CHECK(part_at_30 > 300 * 30 / 100 - 27 && part_at_30 < 300 * 30 / 100 + 27); /* 99.9 % interval */
}

/* The slot is the instance's alone: another experiment picks the same ones. */
static void case_canary_is_sticky(void) {
    int i;
    for (i = 0; i < 50; i++) {
        char name[32];
        bool first;
        rig *r = rig_new(&the_rig);
        snprintf(name, sizeof name, "node-%d", i);
        r->d.instance = name;
        r->d.fetch = rig_fetch;
        r->d.fetch_user = r;
        rig_open(r);
        rig_set(r, "{'enabled':true,'errorRate':100,'canary':50,'seed':1,'name':'one'}");
        first = on(r);
        rig_set(r, "{'enabled':true,'errorRate':100,'canary':50,'seed':2,'name':'two'}");
        CHECK_INT(on(r), first);
        rig_close(r);
    }
}

static void case_instances(void) {
    static const struct {
        const char *json;
        bool part;
    } rows[] = {
        {"{'enabled':true,'errorRate':100,'instances':['i-1']}", true},
        {"{'enabled':true,'errorRate':100,'instances':['i-2','i-*']}", true},
        {"{'enabled':true,'errorRate':100,'instances':['*']}", true},
        {"{'enabled':true,'errorRate':100,'instances':['i-2','web-*']}", false},
        {"{'enabled':true,'errorRate':100,'instances':['I-1']}", false},
        {"{'enabled':true,'errorRate':100,'instances':['i-1'],'canary':0}", false},
    };
    size_t i;
    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        rig *r = rig_inline(&the_rig, rows[i].json);
        check_where("%s", rows[i].json);
        CHECK_INT(on(r), rows[i].part);
        if (!rows[i].part) CHECK_INT(stats(r).state, CHAOS_STATE_NOT_CANARY);
        rig_close(r);
    }
}

static void case_instance_from_environment(void) {
    rig *r = rig_new(&the_rig);
    setenv("CHAOS_INSTANCE", "from-env", 1);
    r->d.instance = NULL;
    r->d.config = "{\"enabled\":true,\"errorRate\":100,\"instances\":[\"from-env\"]}";
    rig_open(r);
    CHECK(on(r));
    CHECK(log_has(r, "\"instance\":\"from-env\"") && log_has(r, "\"service\":\"svc\""));
    rig_close(r);
    unsetenv("CHAOS_INSTANCE");
}

/* ---- budgets --------------------------------------------------------------------------------------------------- */
enum { THREADS = 4 };

static int on_threads(void *(*fn)(void *), void *arg) {
    pthread_t t[THREADS];
    int i, started = 0;
    for (i = 0; i < THREADS; i++) started += pthread_create(&t[i], NULL, fn, arg) == 0;
    for (i = 0; i < started; i++) pthread_join(t[i], NULL);
    return started;
}

static void *decide_1000(void *arg) {
    rig *r = (rig *)arg;
    int i;
    for (i = 0; i < 1000; i++) decide(r);
    return NULL;
}

static void case_max_faults(void) {
    rig *r = rig_callback(&the_rig, "{'enabled':true,'errorRate':100,'maxFaults':1500}");
    CHECK_INT(on_threads(decide_1000, r), THREADS);
    CHECK_INT(stats(r).injected[CHAOS_STATUS], 1500); /* exactly */
    CHECK_INT(stats(r).over_budget, 2500);
    CHECK_INT(stats(r).requests, 4000);
    chaos_refresh(r->c, NULL);
    decide(r);
    CHECK_INT(stats(r).injected[CHAOS_STATUS], 1500); /* the same config again: no new budget */
    rig_set(r, "{'enabled':true,'errorRate':100,'maxFaults':2}");
    decide(r);
    decide(r);
    CHECK_INT(decide(r).kind, CHAOS_PASS);
    CHECK_INT(stats(r).injected[CHAOS_STATUS], 1502);
    rig_set(r, "{'enabled':true,'latency':5,'maxFaults':1,'rules':[{'name':'a'}]}"); /* delays count, and rules */
    CHECK_INT(decide(r).kind, CHAOS_DELAY);
    CHECK_INT(decide(r).kind, CHAOS_PASS);
    rig_close(r);
}

static int in_flight, in_flight_most;

static void *hold_and_give_back(void *arg) {
    rig *r = (rig *)arg;
    int i;
    for (i = 0; i < 5000; i++) {
        chaos_verdict v = decide(r);
        if (v.kind != CHAOS_PASS) {
            int now = __atomic_add_fetch(&in_flight, 1, __ATOMIC_SEQ_CST), most = __atomic_load_n(&in_flight_most, __ATOMIC_SEQ_CST);
            while (now > most && !__atomic_compare_exchange_n(&in_flight_most, &most, now, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {}
            if (i % 64 == 0) sched_yield();
            __atomic_sub_fetch(&in_flight, 1, __ATOMIC_SEQ_CST);
        }
        chaos_done(r->c, &v, 200, 1);
    }
    return NULL;
}

static void case_max_concurrent(void) {
    rig *r = rig_inline(&the_rig, "{'enabled':true,'errorRate':100,'maxConcurrent':3}");
    chaos_verdict v[4];
    int i, held = 0;
    in_flight = in_flight_most = 0;
    r->d.quiet = true;
    CHECK_INT(on_threads(hold_and_give_back, r), THREADS);
    CHECK(in_flight_most >= 1 && in_flight_most <= 3);
    for (i = 0; i < 10; i++) held += decide(r).kind != CHAOS_PASS;
    CHECK_INT(held, 3); /* every place came back, none twice */
    CHECK(stats(r).over_budget >= 7);
    rig_close(r);
    r = rig_inline(r, "{'enabled':true,'errorRate':100,'maxConcurrent':3}");
    for (i = 0; i < 3; i++) CHECK((v[i] = decide(r)).kind == CHAOS_STATUS && v[i].ticket);
    v[3] = decide(r);
    CHECK(v[3].kind == CHAOS_PASS && !v[3].ticket);
    chaos_done(r->c, &v[3], 200, 1); /* a pass gives nothing back */
    CHECK_INT(decide(r).kind, CHAOS_PASS);
    chaos_done(r->c, &v[0], 0, 1);
    chaos_done(r->c, &v[0], 0, 1); /* twice: still one place */
    v[3] = decide(r);
    CHECK_INT(v[3].kind, CHAOS_STATUS);
    chaos_done(r->c, &v[0], 0, 1); /* again, when the place has a new owner */
    CHECK_INT(decide(r).kind, CHAOS_PASS);
    rig_close(r);
}

/* Whatever a program hands to chaos_done, it can not take more places than there are, nor write out of bounds. */
static void case_done_with_nonsense(void) {
    rig *r = rig_inline(&the_rig, "{'enabled':true,'errorRate':100,'maxConcurrent':4096}");
    chaos_verdict v;
    unsigned i;
    int held = 0;
    memset(&v, 0xFF, sizeof v);
    for (i = 0; i < (unsigned)rounds(100000); i++) {
        v.ticket = i * 2654435761u;
        chaos_done(r->c, &v, (int)i, ~0ull);
        chaos_done(r->c, &v, -(int)i, 0);
    }
    for (i = 0; i < 5000; i++) held += decide(r).kind != CHAOS_PASS;
    CHECK_INT(held, 4096);
    rig_close(r);
}

/* ---- dry run, unsupported, excluded ------------------------------------------------------------------------------ */
static void case_dry_run(void) {
    rig *r = rig_inline(&the_rig, "{'enabled':true,'errorRate':100,'dryRun':true,'maxFaults':5,'maxConcurrent':2}");
    int i;
    for (i = 0; i < 40; i++) {
        chaos_verdict v = decide(r);
        CHECK(v.kind == CHAOS_PASS && v.delay_us == 0 && v.ticket == 0);
    }
    CHECK_INT(stats(r).would_inject, 40);
    CHECK_INT(stats(r).requests, 40);
    CHECK_INT(stats(r).injected[CHAOS_STATUS], 0);
    CHECK_INT(r->events[CHAOS_EVENT_FAULT], 40);
    CHECK_INT(r->dry_events, 40);
    CHECK(log_has(r, "\"action\":\"dryrun\"") && !log_has(r, "\"action\":\"inject\""));
    rig_close(r);
}

/* A delay that is cut counts as skipped only where it happens. */
static void case_skipped_means_injected(void) {
    static const char *const texts[] = {"{'enabled':true,'latency':5000}", "{'enabled':true,'latency':5000,'dryRun':true}"};
    chaos_request q;
    int i;
    memset(&q, 0, sizeof q);
    q.delay_limit_us = 1000;
    for (i = 0; i < 2; i++) {
        rig *r = rig_inline(&the_rig, texts[i]);
        chaos_verdict v = chaos_decide(r->c, &q);
        CHECK_INT(v.delay_us, i ? 0 : 1000);
        CHECK_INT(stats(r).skipped, i ? 0 : 1);
        rig_close(r);
    }
}

static void case_unsupported_in_process(void) {
    static const char *const configs[] = {"{'enabled':true,'errorRate':100,'errorMode':'reset'}",
                                          "{'enabled':true,'errorRate':100,'errorMode':'hang'}",
                                          "{'enabled':true,'errorRate':100,'errorMode':'close'}", "{'enabled':true,'bandwidth':5}"};
    size_t i;
    for (i = 0; i < 4; i++) {
        rig *r = rig_inline(&the_rig, configs[i]);
        check_where("%s", configs[i]);
        if (stats(r).state == CHAOS_STATE_ON) {
            chaos_verdict v = decide(r);
            CHECK(v.kind == CHAOS_PASS && v.bandwidth == 0);
            CHECK_INT(stats(r).unsupported, 1);
            {
                chaos_report s = stats(r);
                int k;
                for (k = 0; k < CHAOS_KIND_COUNT; k++) CHECK_INT(s.injected[k], 0);
            }
            decide(r);
            CHECK_INT(stats(r).unsupported, 2);
            CHECK_INT(log_count(r, "\"action\":\"unsupported\""), 1); /* said once */
            CHECK_INT(r->events[CHAOS_EVENT_FAULT], 0);
        } else {
            CHECK_INT(stats(r).state, CHAOS_STATE_INVALID); /* or it does not parse; never silently ignored */
        }
        rig_close(r);
    }
}

static void case_excluded(void) {
    rig *r = rig_inline(&the_rig, FAIL_ALL);
    chaos_request q;
    memset(&q, 0, sizeof q);
    q.path = "/healthz";
    CHECK_INT(chaos_decide(r->c, &q).kind, CHAOS_PASS);
    CHECK_INT(stats(r).excluded, 1);
    CHECK_INT(stats(r).requests, 1);
    CHECK_INT(chaos_decide(r->c, NULL).kind, CHAOS_STATUS); /* a request may be all unknown */
    rig_close(r);
    r = rig_inline(r, "{'enabled':true,'errorRate':0}");
    CHECK_INT(chaos_decide(r->c, &q).kind, CHAOS_PASS);
    CHECK_INT(stats(r).excluded, 0); /* looked at only when a fault would happen */
    rig_close(r);
}

/* ---- rolls ------------------------------------------------------------------------------------------------------ */
#define HALF "{'enabled':true,'errorRate':50,'latency':{'min':1,'max':50},'latencyRate':50,'seed':7}"

static bool same_verdict(const chaos_verdict *a, const chaos_verdict *b) {
    return a->kind == b->kind && a->status == b->status && a->delay_us == b->delay_us && a->roll == b->roll && a->rule == b->rule &&
           a->key == b->key;
}

static void case_same_order_same_verdicts(void) {
    rig *a = rig_inline(&the_rig, HALF), *b = rig_inline(&other_rig, HALF);
    int i, differ = 0;
    for (i = 0; i < 5000; i++) {
        chaos_verdict va = decide(a), vb = decide(b);
        CHECK(same_verdict(&va, &vb));
    }
    rig_close(b);
    rig_new(b)->d.instance = "i-2"; /* another instance rolls on its own */
    unquote(b->text, sizeof b->text, HALF);
    b->d.config = b->text;
    rig_open(b);
    for (i = 0; i < 5000; i++) differ += decide(a).kind != decide(b).kind;
    CHECK(differ > 1000);
    rig_close(b);
    b = rig_inline(b, "{'enabled':true,'errorRate':50,'latency':{'min':1,'max':50},'latencyRate':50,'seed':8}");
    for (differ = i = 0; i < 5000; i++) differ += decide(a).kind != decide(b).kind;
    CHECK(differ > 1000); /* and so does another seed */
    rig_close(b);
    rig_close(a);
}

static void case_no_seed_is_random(void) {
    static const char *const json = "{'enabled':true,'errorRate':50}";
    rig *a = rig_inline(&the_rig, json), *b = rig_inline(&other_rig, json);
    int i, differ = 0;
    for (i = 0; i < 1000; i++) differ += decide(a).kind != decide(b).kind;
    CHECK(differ > 300); /* 12 sigma from 500 */
    CHECK(log_has(a, "\"seed\":"));
    rig_close(a);
    rig_close(b);
}

static void case_retries_roll_afresh(void) {
    rig *r = rig_inline(&the_rig, "{'enabled':true,'errorRate':50,'seed':7}");
    int i, hits = 0;
    unsigned long long last = 0;
    for (i = 0; i < 1000; i++) {
        chaos_verdict v = decide(r);
        hits += v.kind == CHAOS_STATUS;
        CHECK(v.key != last);
        last = v.key;
    }
    CHECK(hits > 400 && hits < 600);
    hits = 0;
    for (i = 0; i < 1000; i++) hits += decide_key(r, "user-7").kind == CHAOS_STATUS;
    CHECK(hits == 0 || hits == 1000); /* the same key fails again, or never */
    rig_close(r);
}

static chaos_verdict by_key[2000];

static void *decide_by_key(void *arg) {
    rig *r = (rig *)arg;
    int i;
    for (i = 0; i < 2000; i++) {
        char key[16];
        chaos_verdict v;
        snprintf(key, sizeof key, "k%d", i);
        v = decide_key(r, key);
        CHECK(same_verdict(&v, &by_key[i]));
    }
    return NULL;
}

static void case_same_keys_over_threads_and_instances(void) {
    static chaos_config cfg;
    rig *r = rig_inline(&the_rig, HALF);
    chaos_request q;
    int i;
    memset(&q, 0, sizeof q);
    q.method = "GET";
    q.path = "/";
    for (i = 0; i < 2000; i++) {
        char key[16];
        snprintf(key, sizeof key, "k%d", i);
        by_key[i] = decide_key(r, key);
    }
    on_threads(decide_by_key, r);
    CHECK(chaos_get_config(r->c, &cfg));
    for (i = 0; i < 2000; i++) { /* chaos_judge repeats any of them */
        chaos_verdict v = chaos_judge(&cfg, &q, by_key[i].key);
        CHECK(same_verdict(&v, &by_key[i]));
    }
    q.key = "k1xxxxx"; /* a length counts */
    q.key_len = 2;
    CHECK(chaos_decide(r->c, &q).key == by_key[1].key);
    rig_close(r);
    rig_new(r)->d.instance = "elsewhere"; /* a key means the same everywhere */
    unquote(r->text, sizeof r->text, HALF);
    r->d.config = r->text;
    rig_open(r);
    decide_by_key(r);
    rig_close(r);
}

/* With rules the other path is taken: its verdicts repeat, too. */
static void case_judge_repeats_rules(void) {
    static chaos_config cfg;
    rig *r = rig_inline(&the_rig, "{'enabled':true,'seed':3,'errorRate':30,'latency':9,'rules':[{'name':'a','match':{'methods':['PUT']}},"
                                  "{'name':'b','match':{'paths':['/**']},'errorStatus':429}]}");
    chaos_request q;
    int i;
    memset(&q, 0, sizeof q);
    q.method = "GET";
    q.path = "/";
    CHECK(chaos_get_config(r->c, &cfg));
    for (i = 0; i < 2000; i++) {
        chaos_verdict v = decide(r), w = chaos_judge(&cfg, &q, v.key);
        CHECK(same_verdict(&v, &w));
        CHECK_INT(v.rule, 2);
    }
    rig_close(r);
}

/* ---- what a verdict carries, counters, events, log ----------------------------------------------------------------- */
static void case_body_and_retry_after(void) {
    rig *r = rig_callback(&the_rig, "{'enabled':true,'errorRate':100,'retryAfter':7,'errorBody':'one\\u00e9','rules':["
                                    "{'name':'a','match':{'methods':['PUT']}},{'name':'b','errorBody':'two','retryAfter':9}]}");
    chaos_verdict v = decide(r);
    char buf[64];
    CHECK_INT(v.rule, 2);
    CHECK_INT(chaos_verdict_body(r->c, &v, buf, sizeof buf), 3);
    CHECK_STR(buf, "two");
    CHECK_INT(chaos_verdict_retry_after(r->c, &v), 9);
    CHECK_INT(chaos_verdict_body(r->c, &v, buf, 3), 3); /* cut */
    CHECK_STR(buf, "tw");
    CHECK_INT(chaos_verdict_body(r->c, &v, NULL, 0), 3);
    v.rule = 1; /* it inherits */
    CHECK_INT(chaos_verdict_body(r->c, &v, buf, sizeof buf), 5);
    CHECK_INT(chaos_verdict_retry_after(r->c, &v), 7);
    rig_set(r, FAIL_ALL);
    CHECK(chaos_verdict_body(r->c, &v, buf, sizeof buf) > 0); /* its config is gone: the default, not another one's */
    CHECK(strncmp(buf, "two", 3) != 0);
    CHECK_INT(chaos_verdict_retry_after(r->c, &v), -1);
    v = decide(r);
    CHECK(chaos_verdict_body(r->c, &v, buf, sizeof buf) > 0);
    CHECK_INT(chaos_verdict_retry_after(r->c, &v), -1);
    v.rule = 99; /* nonsense from the caller */
    chaos_verdict_body(r->c, &v, buf, sizeof buf);
    v.rule = 65535;
    chaos_verdict_body(r->c, &v, buf, sizeof buf);
    rig_close(r);
}

static void case_stats(void) {
    rig *r = rig_callback(&the_rig, "{'enabled':true,'errorRate':50,'latency':9,'seed':1}");
    chaos_report s;
    chaos_verdict v;
    int i, errors = 0;
    for (i = 0; i < 100; i++) errors += decide(r).kind == CHAOS_STATUS;
    s = stats(r);
    CHECK_INT(s.requests, 100);
    CHECK_INT(s.injected[CHAOS_STATUS], errors);
    CHECK_INT(s.injected[CHAOS_DELAY], 100 - errors);
    CHECK_INT(s.injected[CHAOS_PASS], 0);
    memset(&v, 0, sizeof v);
    chaos_done(r->c, &v, 200, 10);
    chaos_done(r->c, &v, 204, 10);
    chaos_done(r->c, &v, 503, 10);
    chaos_done(r->c, &v, 0, 10);
    chaos_done(r->c, &v, 101, 10);
    s = stats(r);
    CHECK_INT(s.outcomes[0], 1);
    CHECK_INT(s.outcomes[1], 1);
    CHECK_INT(s.outcomes[2], 2);
    CHECK_INT(s.outcomes[5], 1);
    CHECK_INT(s.outcome_us, 50);
    CHECK_INT(s.fetches, 1);
    CHECK_INT(s.config_changes, 1);
    rig_set(r, "{'enabled':false}");
    for (i = 0; i < 100; i++) decide(r);
    CHECK_INT(stats(r).requests, 100); /* off: nothing is counted */
    rig_close(r);
}

static void case_wait_counts(void) {
    rig *r = rig_new(&the_rig);
    chaos_verdict v;
    unsigned long long start;
    r->d.config = "{\"enabled\":true,\"latency\":30}";
    r->d.clock = NULL;
    rig_open(r);
    v = decide(r);
    start = real_ns(CLOCK_MONOTONIC);
    chaos_wait(r->c, &v);
    CHECK(real_ns(CLOCK_MONOTONIC) - start >= S * 30 / 1000);
    CHECK(stats(r).delay_ms >= 30);
    CHECK_INT(stats(r).waiting, 0);
    chaos_off(r->c);
    start = real_ns(CLOCK_MONOTONIC);
    v.delay_us = 60000000;
    chaos_wait(r->c, &v); /* off: not a moment */
    CHECK(real_ns(CLOCK_MONOTONIC) - start < 5 * S);
    rig_close(r);
}

static void case_events(void) {
    rig *r = rig_callback(&the_rig, FAIL_ALL);
    int i;
    CHECK_INT(r->events[CHAOS_EVENT_STATE], 1);
    CHECK_INT(r->events[CHAOS_EVENT_CONFIG], 1);
    for (i = 0; i < 25; i++) decide(r);
    CHECK_INT(r->events[CHAOS_EVENT_FAULT], 25);
    CHECK_INT(r->dry_events, 0);
    chaos_refresh(r->c, NULL);
    CHECK_INT(r->events[CHAOS_EVENT_STATE], 1); /* nothing new */
    CHECK_INT(r->events[CHAOS_EVENT_CONFIG], 1);
    rig_set(r, "{'enabled':false}");
    CHECK_INT(r->events[CHAOS_EVENT_STATE], 2);
    CHECK_INT(r->events[CHAOS_EVENT_CONFIG], 2);
    rig_set(r, FAIL_ALL);
    r->off_in_event = true;
    decide(r);
    CHECK_INT(stats(r).state, CHAOS_STATE_KILLED);
    CHECK_INT(decide(r).kind, CHAOS_PASS);
    CHECK_INT(r->events[CHAOS_EVENT_FAULT], 26);
    rig_close(r);
}

/* Every line is a JSON object on one line; counts lines with a text, and sums a number field over them. */
static int log_lines(rig *r, const char *having, const char *field, long long *sum) {
    char *line = r->log;
    int count = 0;
    *sum = 0;
    while (*line) {
        char *end = strchr(line, '\n');
        CHECK(end != NULL);
        if (!end) return -1;
        *end = 0;
        CHECK_INT(chaos_json_check(line, strlen(line), NULL), CHAOS_OK);
        CHECK(!strncmp(line, "{\"source\":\"chaos\",", 18));
        if (strstr(line, having)) {
            const char *at = strstr(line, field);
            count++;
            if (at) *sum += strtoll(at + strlen(field), NULL, 10);
        }
        *end = '\n';
        line = end + 1;
    }
    return count;
}

static void check_fault_log(chaos_fault_log mode, int lines_at_most, bool summaries) {
    rig *r = rig_new(&the_rig);
    long long sum, none;
    int i, lines;
    r->d.config = "{\"enabled\":true,\"errorRate\":60,\"latency\":5,\"seed\":1,\"rules\":[{\"name\":\"a \\\"b\\\"\"}]}";
    r->d.fault_log = mode;
    rig_open(r);
    for (i = 0; i < 3000; i++) {
        decide(r);
        if (i % 1000 == 999) pass_time(r, S);
    }
    chaos_close(r->c); /* the rest is summarised here at the latest */
    lines = log_lines(r, "\"action\":\"inject\"", "\"none\":", &none);
    CHECK(lines >= (mode != CHAOS_LOG_NONE) && lines <= lines_at_most);
    log_lines(r, "\"action\":\"summary\"", "\"suppressed\":", &sum);
    if (summaries) CHECK_INT(sum + lines, 3000);
    else CHECK_INT(sum, 0);
    CHECK_INT(r->frees, r->allocs);
}

static void case_fault_log(void) {
    rig *r;
    check_fault_log(CHAOS_LOG_ALL, 150, true);
    check_fault_log(CHAOS_LOG_SAMPLE, 3, true);
    check_fault_log(CHAOS_LOG_NONE, 0, false);
    r = rig_inline(&the_rig, "{'enabled':true,'errorRate':100,'errorStatus':418,'rules':[{'name':'tea'}]}");
    decide(r);
    CHECK(log_has(r, "\"fault\":\"error\"") && log_has(r, "\"status\":418") && log_has(r, "\"rule\":\"tea\"") && log_has(r, "\"roll\":"));
    rig_close(r);
    r = rig_new(r);
    r->d.config = "{\"enabled\":true,\"errorRate\":100}";
    r->d.quiet = true;
    rig_open(r);
    decide(r);
    CHECK_INT(r->log_len, 0);
    rig_close(r);
}

static void case_heartbeat(void) {
    rig *r = rig_new(&the_rig);
    r->d.config = "{\"enabled\":true,\"errorRate\":100}";
    r->d.no_thread = false; /* it is the refresher's */
    rig_open(r);
    CHECK(on(r));
    CHECK(!log_has(r, "\"action\":\"heartbeat\""));
    pass_time(r, 61 * S);
    UNTIL(log_has(r, "\"action\":\"heartbeat\""));
    CHECK(log_has(r, "\"requests\":1"));
    rig_close(r);
}

/* The state line comes from the refresher when an end comes by time alone. */
static void case_refresher_notices_the_end(void) {
    rig *r = rig_new(&the_rig);
    r->d.config = "{\"enabled\":true,\"errorRate\":100,\"expiresAt\":1800000010}";
    r->d.no_thread = false;
    rig_open(r);
    CHECK(!readable(chaos_wake_fd(r->c)));
    pass_time(r, 11 * S);
    UNTIL(log_has(r, "\"state\":\"expired\"")); /* nobody asked */
    UNTIL(readable(chaos_wake_fd(r->c)));
    rig_close(r);
}

/* ---- snapshots --------------------------------------------------------------------------------------------------- */
static int snapshots_done, bad_verdicts;
static long good_verdicts;

/* The config of version n answers with status 500 + n % 90; odd versions have a rule. */
static chaos_result snapshot_fetch(void *user, char *buf, size_t cap, chaos_fetched *out, chaos_error *err) {
    rig *r = (rig *)user;
    unsigned status = 500 + (unsigned)(r->version % 90);
    (void)err;
    out->version = r->version;
    out->len = (size_t)snprintf(buf, cap,
                                r->version % 2 ? "{\"enabled\":true,\"errorRate\":100,\"rules\":[{\"name\":\"a\",\"errorStatus\":%u,"
                                                 "\"match\":{\"paths\":[\"/**\"],\"methods\":[\"GET\"]}}]}"
                                               : "{\"enabled\":true,\"errorRate\":100,\"errorStatus\":%u}",
                                status);
    return CHAOS_OK;
}

static void *watch_snapshots(void *arg) {
    rig *r = (rig *)arg;
    long good = 0;
    while (!__atomic_load_n(&snapshots_done, __ATOMIC_SEQ_CST)) {
        chaos_verdict v = decide(r);
        bool fine = v.kind == CHAOS_STATUS && v.status == 500 + v.version % 90 && v.rule == v.version % 2;
        if (fine) good++;
        else __atomic_fetch_add(&bad_verdicts, 1, __ATOMIC_SEQ_CST);
    }
    __atomic_fetch_add(&good_verdicts, good, __ATOMIC_SEQ_CST);
    return NULL;
}

static void case_snapshots(void) {
    rig *r = rig_new(&the_rig);
    pthread_t t[2];
    int i, allocs, changes = rounds(100000);
    snapshots_done = bad_verdicts = 0;
    good_verdicts = 0;
    r->d.fetch = snapshot_fetch;
    r->d.fetch_user = r;
    r->d.quiet = true;
    r->d.event = NULL;
    r->version = 1;
    rig_open(r);
    allocs = r->allocs;
    CHECK_INT(chaos_refresh(r->c, NULL), CHAOS_OK);
    for (i = 0; i < 2; i++) pthread_create(&t[i], NULL, watch_snapshots, r);
    for (i = 0; i < changes; i++) {
        r->version++;
        chaos_refresh(r->c, NULL);
    }
    UNTIL(stats(r).requests > 1000);
    __atomic_store_n(&snapshots_done, 1, __ATOMIC_SEQ_CST);
    for (i = 0; i < 2; i++) pthread_join(t[i], NULL);
    CHECK_INT(bad_verdicts, 0); /* each is that of one config, whole */
    CHECK(good_verdicts > 1000);
    CHECK_INT(r->allocs, allocs); /* nothing was allocated, so nothing can leak */
    CHECK_INT(stats(r).config_changes, changes + 1);
    rig_close(r);
}

/* Two programs' worth of handles do not see each other. */
static void case_two_handles(void) {
    rig *a = rig_inline(&the_rig, FAIL_ALL), *b = rig_inline(&other_rig, FAIL_ALL);
    chaos_off(a->c);
    CHECK(!on(a) && on(b));
    CHECK_INT(stats(a).requests, 0);
    rig_close(a);
    CHECK(on(b));
    rig_close(b);
}

int main(int argc, char **argv) {
    check_begin(argc, argv);
    unsetenv("CHAOS_CONFIG");
    unsetenv("CHAOS_DISABLE");
    CHECK_RUN(case_null_handle);
    CHECK_RUN(case_no_config);
    CHECK_RUN(case_bad_desc);
    CHECK_RUN(case_states);
    CHECK_RUN(case_gate_order);
    CHECK_RUN(case_expires_by_both_clocks);
    CHECK_RUN(case_expired_stays_off);
    CHECK_RUN(case_lease);
    CHECK_RUN(case_lease_from_modified);
    CHECK_RUN(case_no_lease);
    CHECK_RUN(case_stale);
    CHECK_RUN(case_stale_settings);
    CHECK_RUN(case_fetch_schedule);
    CHECK_RUN(case_not_found_is_quiet);
    CHECK_RUN(case_invalid_is_loud);
    CHECK_RUN(case_problems_do_not_outlive_their_cause);
    CHECK_RUN(case_off_from_the_first_moment);
    CHECK_RUN(case_invalid_does_not_fail_open);
    CHECK_RUN(case_unreachable_from_the_start);
    CHECK_RUN(case_source_that_lies);
    CHECK_RUN(case_versions);
    CHECK_RUN(case_chaos_config_in_environment);
    CHECK_RUN(case_file);
    CHECK_RUN(case_file_half_written);
    CHECK_RUN(case_file_too_large);
    CHECK_RUN(case_file_is_followed);
    CHECK_RUN(case_fork_expiry);
    CHECK_RUN(case_fork_age);
    CHECK_RUN(case_fork_off_is_local);
    CHECK_RUN(case_fork_while_the_lock_is_held);
    CHECK_RUN(case_off_is_latched);
    CHECK_RUN(case_off_in_signal_handler);
    CHECK_RUN(case_disable);
    CHECK_RUN(case_canary);
    CHECK_RUN(case_canary_is_sticky);
    CHECK_RUN(case_instances);
    CHECK_RUN(case_instance_from_environment);
    CHECK_RUN(case_max_faults);
    CHECK_RUN(case_max_concurrent);
    CHECK_RUN(case_done_with_nonsense);
    CHECK_RUN(case_dry_run);
    CHECK_RUN(case_skipped_means_injected);
    CHECK_RUN(case_unsupported_in_process);
    CHECK_RUN(case_excluded);
    CHECK_RUN(case_same_order_same_verdicts);
    CHECK_RUN(case_no_seed_is_random);
    CHECK_RUN(case_retries_roll_afresh);
    CHECK_RUN(case_same_keys_over_threads_and_instances);
    CHECK_RUN(case_judge_repeats_rules);
    CHECK_RUN(case_body_and_retry_after);
    CHECK_RUN(case_stats);
    CHECK_RUN(case_wait_counts);
    CHECK_RUN(case_events);
    CHECK_RUN(case_fault_log);
    CHECK_RUN(case_heartbeat);
    CHECK_RUN(case_refresher_notices_the_end);
    CHECK_RUN(case_snapshots);
    CHECK_RUN(case_two_handles);
    return check_end();
}

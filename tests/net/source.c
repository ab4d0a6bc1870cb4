/* Where the config comes from and when: files, the environment, callbacks; TTL, jitter, backoff, age; never a leak. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

#include "../check.h"
#include "peer.h"

#include <sys/stat.h>

#define TTL  100
#define SOON (TTL + 1000) /* the promise: within TTL + 1 s */
#define ON   "{\"enabled\":true,\"errorRate\":100,\"expiresAt\":\"never\"}"
#define OFF  "{\"enabled\":false}"

static chaos_report report_of(chaos *c) {
    chaos_report r;
    chaos_stats(c, &r);
    return r;
}
static chaos_state state_of(chaos *c) { return report_of(c).state; }

static chaos_desc quiet_desc(void) {
    chaos_desc d;
    memset(&d, 0, sizeof d);
    d.quiet = true;
    d.ttl_ms = TTL;
    d.instance = "source-test";
    return d;
}

static chaos *open_config(const char *config) {
    chaos_desc d = quiet_desc();
    chaos_error err;
    chaos *c;
    memset(&err, 0, sizeof err);
    d.config = config;
    c = chaos_open(&d, &err);
    if (!CHECK(c != NULL)) printf("     %s\n", err.text);
    return c;
}

static chaos_verdict decide(chaos *c) {
    chaos_request req;
    memset(&req, 0, sizeof req);
    req.method = "GET";
    req.path = "/";
    return chaos_decide(c, &req);
}

/* ---- files ---- */

typedef struct file {
    char dir[32], path[64], source[80];
} file;

static void file_write(const file *f, const char *text) /* in place */
{
    FILE *out = fopen(f->path, "wb");
    if (!out || fputs(text, out) < 0 || fclose(out)) abort();
}
static void file_replace(const file *f, const char *text) /* by a rename, as careful tools do */
{
    char temp[80];
    FILE *out;
    snprintf(temp, sizeof temp, "%s.new", f->path);
    out = fopen(temp, "wb");
    if (!out || fputs(text, out) < 0 || fclose(out) || rename(temp, f->path)) abort();
}
static void file_make(file *f, const char *text) {
    snprintf(f->dir, sizeof f->dir, "/tmp/chaos-source-XXXXXX");
    if (!mkdtemp(f->dir)) abort();
    snprintf(f->path, sizeof f->path, "%s/chaos.json", f->dir);
    snprintf(f->source, sizeof f->source, "file:%s", f->path);
    if (text) file_write(f, text);
}
static void file_remove(const file *f) {
    remove(f->path);
    if (rmdir(f->dir)) CHECK(rmdir(f->dir) == 0);
}

static void case_file_is_read_before_open_returns(void) {
    file f;
    chaos *c;
    file_make(&f, ON);
    c = open_config(f.source);
    CHECK_INT(state_of(c), CHAOS_STATE_ON);
    CHECK_INT(decide(c).kind, CHAOS_STATUS);
    CHECK_INT(report_of(c).version, 1);
    chaos_close(c);
    file_remove(&f);
}

static void case_file_changes_are_followed(void) {
    chaos *c;
    file f;
    int i;
    file_make(&f, OFF);
    c = open_config(f.source);
    CHECK_INT(state_of(c), CHAOS_STATE_OFF);
    CHECK_INT(decide(c).kind, CHAOS_PASS);
    for (i = 0; i < 2; i++) { /* both ways of writing */
        void (*write_it)(const file *, const char *) = i ? file_write : file_replace;
        check_where("%s", i ? "in place" : "renamed");
        write_it(&f, ON);
        PEER_UNTIL(state_of(c) == CHAOS_STATE_ON, SOON);
        CHECK_INT(decide(c).kind, CHAOS_STATUS);
        write_it(&f, OFF);
        PEER_UNTIL(state_of(c) == CHAOS_STATE_OFF, SOON);
        CHECK_INT(decide(c).kind, CHAOS_PASS);
    }
    CHECK_INT(report_of(c).config_changes, 5);
    CHECK_INT(report_of(c).config_errors, 0);
    CHECK_INT(report_of(c).fetch_errors, 0);
    chaos_close(c);
    file_remove(&f);
}

static void case_missing_file_is_off_quietly(void) {
    chaos *c;
    file f;
    file_make(&f, NULL);
    c = open_config(f.source);
    CHECK_INT(state_of(c), CHAOS_STATE_OFF);
    file_replace(&f, ON); /* it appears */
    PEER_UNTIL(state_of(c) == CHAOS_STATE_ON, SOON);
    remove(f.path); /* it goes: off, not the last good one for a while */
    PEER_UNTIL(state_of(c) == CHAOS_STATE_OFF, SOON);
    CHECK(strstr(report_of(c).reason, f.path) != NULL);
    file_replace(&f, ON); /* the same content again */
    PEER_UNTIL(state_of(c) == CHAOS_STATE_ON, SOON);
    CHECK_INT(report_of(c).config_errors, 0);
    CHECK_INT(report_of(c).fetch_errors, 0);
    chaos_close(c);
    file_remove(&f);
}

static void case_invalid_file_is_off_and_says_where(void) {
    chaos *c;
    file f;
    file_make(&f, ON);
    c = open_config(f.source);
    file_replace(&f, "{\n  \"enabled\": true,\n  \"errorRat\": 5\n}");
    PEER_UNTIL(state_of(c) == CHAOS_STATE_INVALID, SOON);
    CHECK_INT(decide(c).kind, CHAOS_PASS);
    CHECK(strstr(report_of(c).reason, "line 3, column ") != NULL);
    CHECK(strstr(report_of(c).reason, "errorRat") != NULL);
    CHECK(report_of(c).config_errors == 1);
    file_replace(&f, ON);
    PEER_UNTIL(state_of(c) == CHAOS_STATE_ON, SOON);
    chaos_close(c);
    file_replace(&f, "");
    c = open_config(f.source); /* an empty file is no config, and does not fail the open */
    CHECK_INT(state_of(c), CHAOS_STATE_INVALID);
    chaos_close(c);
    file_remove(&f);
}

static void case_half_written_file_never_turns_chaos_on(void) {
    static const char text[] = "{\"enabled\":true,\"errorRate\":100,\"expiresAt\":\"never\"}                    ";
    long long until;
    FILE *out;
    chaos *c;
    file f;
    size_t cut;
    file_make(&f, OFF);
    c = open_config(f.source);
    for (cut = 5; cut < sizeof text - 1; cut += 22) { /* the last piece misses blanks only: that is whole */
        bool whole = strchr(text, '}') < text + cut;
        check_where("cut at %zu", cut);
        out = fopen(f.path, "wb");
        if (!out || fwrite(text, 1, cut, out) != cut || fflush(out)) abort();
        if (whole) PEER_UNTIL(state_of(c) == CHAOS_STATE_ON, SOON);
        else
            for (until = peer_ms() + TTL + 50; peer_ms() < until; peer_nap(5))
                CHECK(state_of(c) != CHAOS_STATE_ON && decide(c).kind == CHAOS_PASS);
        if (fputs(text + cut, out) < 0 || fclose(out)) abort();
        PEER_UNTIL(state_of(c) == CHAOS_STATE_ON, SOON);
        file_replace(&f, OFF);
        PEER_UNTIL(state_of(c) == CHAOS_STATE_OFF, SOON);
    }
    chaos_close(c);
    file_remove(&f);
}

/* Two configs written over each other without any care: a reader gets the one, the other, or nothing; never a mixture. */
static void case_careless_writer_gives_no_mixture(void) {
    static const char *const texts[2] = {
        "{\"enabled\":true,\"errorRate\":1,\"expiresAt\":\"never\",\"name\":\"aaaa\",\"owner\":\"aaaa\"}",
        "{\"enabled\":true,\"errorRate\":2,\"expiresAt\":\"never\",\"owner\":\"bbbbbbbbbbbbbbbbbbbbbbbb\",\"name\":\"bbbb\"}"};
    static chaos_config cfg;
    int i, seen[2] = {0, 0};
    chaos_desc d = quiet_desc();
    chaos *c;
    file f;
    file_make(&f, texts[0]);
    d.config = f.source;
    d.no_thread = true;
    c = chaos_open(&d, NULL);
    for (i = 0; i < 400; i++) {
        const char *text = texts[i % 2];
        size_t half = strlen(text) / 2;
        FILE *out = fopen(f.path, "wb");
        if (!out || fwrite(text, 1, half, out) != half || fflush(out)) abort();
        chaos_refresh(c, NULL);
        CHECK(!chaos_get_config(c, &cfg) && decide(c).kind == CHAOS_PASS);
        if (fputs(text + half, out) < 0 || fclose(out)) abort();
        CHECK_INT(chaos_refresh(c, NULL), CHAOS_OK);
        CHECK(chaos_get_config(c, &cfg));
        CHECK(cfg.fault.error_rate == 1 + i % 2 && cfg.text[cfg.name.at] == (i % 2 ? 'b' : 'a') &&
              cfg.text[cfg.owner.at] == (i % 2 ? 'b' : 'a'));
        seen[i % 2]++;
    }
    CHECK(seen[0] == 200 && seen[1] == 200);
    chaos_close(c);
    file_remove(&f);
}

static void case_unreachable_file_is_used_for_max_stale_only(void) {
    chaos_desc d = quiet_desc();
    long long start;
    chaos *c;
    file f;
    file_make(&f, ON);
    d.config = f.source;
    d.ttl_ms = 50;
    d.max_stale_ms = 250;
    c = chaos_open(&d, NULL);
    CHECK_INT(state_of(c), CHAOS_STATE_ON);
    remove(f.path);
    if (mkdir(f.path, 0700)) abort(); /* there, but not readable as a file */
    PEER_UNTIL(report_of(c).fetch_errors > 0, SOON);
    start = peer_ms();
    CHECK_INT(state_of(c), CHAOS_STATE_ON); /* the last good one, for now */
    PEER_UNTIL(state_of(c) == CHAOS_STATE_STALE, 50 + 250 + 1000);
    CHECK(peer_ms() - start >= 100); /* at least what is left of 300 ms after a failed fetch at most 2 TTL in */
    CHECK_INT(decide(c).kind, CHAOS_PASS);
    rmdir(f.path);
    file_replace(&f, ON);
    PEER_UNTIL(state_of(c) == CHAOS_STATE_ON, 2000); /* back by itself; the backoff is still short */
    chaos_close(c);
    file_remove(&f);
}

static void case_too_large_file_is_invalid(void) {
    char *text = (char *)malloc(CHAOS_CONFIG_INPUT_MAX + 2);
    chaos *c;
    file f;
    int extra;
    if (!text) abort();
    for (extra = 0; extra < 2; extra++) { /* the limit itself is good */
        memset(text, ' ', CHAOS_CONFIG_INPUT_MAX + 1);
        memcpy(text, ON, strlen(ON));
        text[CHAOS_CONFIG_INPUT_MAX + extra] = 0;
        file_make(&f, text);
        c = open_config(f.source);
        check_where("%d over", extra);
        CHECK_INT(state_of(c), extra ? CHAOS_STATE_INVALID : CHAOS_STATE_ON);
        chaos_close(c);
        file_remove(&f);
    }
    free(text);
}

/* ---- inline, environment, none ---- */

static void case_inline_and_env_are_read_at_open(void) {
    chaos *c = open_config("  " ON);
    CHECK_INT(state_of(c), CHAOS_STATE_ON);
    CHECK_INT(report_of(c).end_ms, 0);
    chaos_close(c);
    c = open_config("{\"enabled\":true,\"errorRate\":100}"); /* no lease: it ends with the process that was started with it */
    CHECK_INT(state_of(c), CHAOS_STATE_ON);
    CHECK_INT(report_of(c).end_ms, 0);
    chaos_close(c);
    setenv("CHAOS_TEST_CONFIG", ON, 1);
    c = open_config("env:CHAOS_TEST_CONFIG");
    CHECK_INT(state_of(c), CHAOS_STATE_ON);
    chaos_close(c);
    setenv("CHAOS_TEST_CONFIG", "{\"enabled\":yes}", 1);
    c = open_config("env:CHAOS_TEST_CONFIG");
    CHECK_INT(state_of(c), CHAOS_STATE_INVALID);
    CHECK(strstr(report_of(c).reason, "line 1, column 12") != NULL);
    chaos_close(c);
    unsetenv("CHAOS_TEST_CONFIG");
    c = open_config("env:CHAOS_TEST_CONFIG");
    CHECK_INT(state_of(c), CHAOS_STATE_OFF);
    CHECK(strstr(report_of(c).reason, "CHAOS_TEST_CONFIG") != NULL);
    chaos_close(c);
}

static void case_chaos_config_is_the_default(void) {
    chaos *c;
    file f;
    unsetenv("CHAOS_CONFIG");
    c = open_config(NULL);
    CHECK_INT(state_of(c), CHAOS_STATE_OFF);
    chaos_close(c);
    file_make(&f, ON);
    setenv("CHAOS_CONFIG", f.source, 1);
    c = open_config(NULL);
    CHECK_INT(state_of(c), CHAOS_STATE_ON);
    chaos_close(c);
    c = open_config(OFF); /* what the program says wins */
    CHECK_INT(state_of(c), CHAOS_STATE_OFF);
    chaos_close(c);
    setenv("CHAOS_CONFIG", "", 1);
    c = open_config(NULL);
    CHECK_INT(state_of(c), CHAOS_STATE_OFF);
    chaos_close(c);
    unsetenv("CHAOS_CONFIG");
    c = chaos_open(NULL, NULL);
    CHECK(c != NULL && state_of(c) == CHAOS_STATE_OFF);
    chaos_close(c);
    file_remove(&f);
}

static void case_chaos_disable_overrides_everything(void) {
    chaos *c;
    setenv("CHAOS_DISABLE", "1", 1);
    c = open_config(ON);
    CHECK_INT(state_of(c), CHAOS_STATE_KILLED);
    CHECK(strstr(report_of(c).reason, "CHAOS_DISABLE") != NULL);
    CHECK_INT(decide(c).kind, CHAOS_PASS);
    chaos_refresh(c, NULL);
    CHECK_INT(decide(c).kind, CHAOS_PASS);
    chaos_close(c);
    setenv("CHAOS_DISABLE", "0", 1);
    c = open_config(ON);
    CHECK_INT(state_of(c), CHAOS_STATE_ON);
    chaos_close(c);
    unsetenv("CHAOS_DISABLE");
}

static void check_refused(chaos_desc d, chaos_result want, const char *words) {
    chaos_error err;
    char word[32];
    memset(&err, 0, sizeof err);
    check_where("%s", d.config ? d.config : words);
    CHECK(chaos_open(&d, &err) == NULL);
    CHECK_INT(err.code, want);
    while (sscanf(words, "%31s", word) == 1) {
        check_where("%s: '%s' names %s", d.config ? d.config : "", err.text, word);
        CHECK(strstr(err.text, word) != NULL);
        words = strstr(words, word) + strlen(word);
    }
}

static void *some_alloc(void *user, size_t size) {
    (void)user;
    return malloc(size);
}

static void case_what_cannot_be_a_source_is_refused(void) {
    static const char *const unknown[] = {"http://a/b", "chaos.json", "File:a", "enabled", " ", "/etc/chaos.json"};
    static const char *const remote[] = {
        "ssm:",          "ssm:?region=us-east-1", "ssm:/a?zone=b",  "ssm:/a?region=", "ssm:/a?",          "appconfig:",
        "appconfig:a/b", "appconfig:/b/c",        "appconfig:a//c", "appconfig:a/b/", "appconfig:a/b/c/d"};
    chaos_desc d = quiet_desc();
    size_t i;
    for (i = 0; i < sizeof unknown / sizeof *unknown; i++) {
        d.config = unknown[i];
        check_refused(d, CHAOS_ERR_ARGUMENT, "file:PATH env:NAME JSON");
    }
    d.config = "file:";
    check_refused(d, CHAOS_ERR_ARGUMENT, "file:");
    d.config = "env:";
    check_refused(d, CHAOS_ERR_ARGUMENT, "env:");
    for (i = 0; i < sizeof remote / sizeof *remote; i++) {
        d.config = remote[i];
        check_refused(d, CHAOS_ERR_ARGUMENT, i < 5 ? "ssm:" : "appconfig:");
    }
    d = quiet_desc();
    d.ttl_ms = 9;
    check_refused(d, CHAOS_ERR_RANGE, "ttl_ms 10");
    d.ttl_ms = 86400001;
    check_refused(d, CHAOS_ERR_RANGE, "ttl_ms 86400000");
    d = quiet_desc();
    d.max_stale_ms = -2;
    check_refused(d, CHAOS_ERR_RANGE, "max_stale_ms");
    d = quiet_desc();
    d.alloc = some_alloc;
    check_refused(d, CHAOS_ERR_ARGUMENT, "alloc free");
}

/* ---- callbacks: when they are called ---- */

#define STAMPS 64
typedef struct stamped {
    long long at[STAMPS]; /* us, of the first fetches */
    int count;            /* read with PEER_LOAD */
    chaos_result result;  /* PEER_LOAD */
} stamped;

static chaos_result stamped_fetch(void *user, char *buf, size_t cap, chaos_fetched *out, chaos_error *err) {
    stamped *s = (stamped *)user;
    int n = PEER_LOAD(&s->count);
    (void)cap;
    if (n < STAMPS) s->at[n] = peer_us();
    PEER_STORE(&s->count, n + 1);
    memcpy(buf, OFF, strlen(OFF));
    out->len = strlen(OFF);
    if (PEER_LOAD(&s->result)) snprintf(err->text, sizeof err->text, "no route");
    return PEER_LOAD(&s->result);
}

static chaos *open_stamped(stamped *s, int ttl) {
    chaos_desc d = quiet_desc();
    chaos *c;
    d.ttl_ms = ttl;
    d.fetch = stamped_fetch;
    d.fetch_user = s;
    c = chaos_open(&d, NULL);
    CHECK(c != NULL);
    return c;
}

static void case_jitter_only_shortens_the_ttl(void) {
    stamped s;
    int i, late = 0, n = 20;
    long long least = 1000000, most = 0;
    chaos *c;
    memset(&s, 0, sizeof s);
    c = open_stamped(&s, 50);
    PEER_UNTIL(PEER_LOAD(&s.count) > n, 3000);
    chaos_close(c);
    for (i = 0; i < n && i + 1 < PEER_LOAD(&s.count); i++) {
        long long gap = s.at[i + 1] - s.at[i];
        if (gap < least) least = gap;
        if (gap > most) most = gap;
        late += gap > 60000; /* 50 ms, and some for the scheduler */
    }
    check_where("gaps %lld to %lld us", least, most);
    CHECK(least >= 39900); /* a fifth at most */
    CHECK(late <= 4);
    CHECK(least < 48000); /* there is jitter: 20 draws from 40..50 ms */
}

static void case_failing_source_is_asked_once_per_ttl_at_most(void) {
    stamped s;
    int i, before;
    chaos *c;
    memset(&s, 0, sizeof s);
    s.result = CHAOS_ERR_UNREACHABLE;
    c = open_stamped(&s, 20);
    PEER_UNTIL(PEER_LOAD(&s.count) >= 5, 5000); /* 20 ms to 20, 40, 80, 160, ... with full jitter */
    CHECK_INT(state_of(c), CHAOS_STATE_OFF);
    CHECK(strstr(report_of(c).reason, "no route") != NULL);
    CHECK(report_of(c).fetch_errors >= 5);
    before = PEER_LOAD(&s.count);
    PEER_STORE(&s.result, CHAOS_OK);
    PEER_UNTIL(PEER_LOAD(&s.count) >= before + 4, 5000); /* after a success the TTL again */
    chaos_close(c);
    for (i = 0; i + 1 < before; i++) {
        check_where("gap %d: %lld us", i, s.at[i + 1] - s.at[i]);
        CHECK(s.at[i + 1] - s.at[i] >= 19900);
    }
    check_where("after it went well: %lld us", s.at[before + 2] - s.at[before + 1]);
    CHECK(s.at[before + 2] - s.at[before + 1] >= 15900);
    CHECK(s.at[before + 2] - s.at[before + 1] < 200000);
}

static void case_refresh_ignores_ttl_and_backoff(void) {
    stamped s;
    int i;
    chaos *c;
    memset(&s, 0, sizeof s);
    s.result = CHAOS_ERR_UNREACHABLE;
    c = open_stamped(&s, 60000);
    PEER_UNTIL(PEER_LOAD(&s.count) == 1, 1000); /* the refresher's own, at once */
    for (i = 2; i < 10; i++) {
        CHECK_INT(chaos_refresh(c, NULL), CHAOS_ERR_UNREACHABLE);
        CHECK_INT(PEER_LOAD(&s.count), i);
    }
    chaos_close(c);
}

typedef struct fake_clock {
    unsigned long long mono, wall; /* ns, with PEER_LOAD, PEER_STORE */
} fake_clock;
static unsigned long long fake_now(void *user, bool wall) {
    fake_clock *f = (fake_clock *)user;
    return PEER_LOAD(wall ? &f->wall : &f->mono);
}
static void fake_forward(fake_clock *f, unsigned long long ms) {
    PEER_ADD(&f->mono, ms * 1000000);
    PEER_ADD(&f->wall, ms * 1000000);
}
#define FAKE_START \
    { 1000000000000ull, 1800000000000000000ull }

/* Stop fast, start slow: 30 s while off, 10 s while on. */
static void case_default_ttl_is_30_s_off_and_10_s_on(void) {
    fake_clock clock = FAKE_START;
    chaos_desc d = quiet_desc();
    peer_source s;
    chaos *c;
    peer_source_init(&s, OFF);
    d.ttl_ms = 0;
    d.fetch = peer_fetch;
    d.fetch_user = &s;
    d.clock = fake_now;
    d.clock_user = &clock;
    c = chaos_open(&d, NULL);
    PEER_UNTIL(PEER_LOAD(&s.fetches) == 1 && report_of(c).fetches == 1, 1000);
    fake_forward(&clock, 23900); /* jitter may shorten to 24 s, not below */
    peer_nap(30);                /* ten looks of the refresher: a test of nothing happening needs some time */
    CHECK_INT(PEER_LOAD(&s.fetches), 1);
    peer_source_set(&s, ON, CHAOS_OK);
    fake_forward(&clock, 6100);
    PEER_UNTIL(report_of(c).fetches == 2 && state_of(c) == CHAOS_STATE_ON, 1000);
    fake_forward(&clock, 7900);
    peer_nap(30);
    CHECK_INT(PEER_LOAD(&s.fetches), 2);
    fake_forward(&clock, 2100);
    PEER_UNTIL(report_of(c).fetches == 3, 1000);
    chaos_close(c);
}

static void case_lease_runs_from_the_last_change(void) {
    fake_clock clock = FAKE_START;
    chaos_desc d = quiet_desc();
    peer_source s;
    chaos *c;
    int i;
    peer_source_init(&s, "{\"enabled\":true,\"errorRate\":100}");
    d.fetch = peer_fetch;
    d.fetch_user = &s;
    d.clock = fake_now;
    d.clock_user = &clock;
    d.no_thread = true;
    c = chaos_open(&d, NULL);
    CHECK_INT(PEER_LOAD(&s.fetches), 0); /* never from chaos_open */
    for (i = 0; i < 60; i++) {           /* fetched every minute, the same all the time: that is no change */
        CHECK_INT(chaos_refresh(c, NULL), CHAOS_OK);
        check_where("minute %d", i);
        CHECK_INT(state_of(c), CHAOS_STATE_ON);
        fake_forward(&clock, 60000);
    }
    chaos_refresh(c, NULL);
    CHECK_INT(state_of(c), CHAOS_STATE_EXPIRED);
    CHECK(strstr(report_of(c).reason, "lease") != NULL);
    CHECK_INT(decide(c).kind, CHAOS_PASS);
    peer_source_set(&s, "{\"enabled\":true,\"errorRate\":99}", CHAOS_OK); /* a change is a new order */
    CHECK_INT(chaos_refresh(c, NULL), CHAOS_OK);
    CHECK_INT(state_of(c), CHAOS_STATE_ON);
    chaos_close(c);
}

static chaos_result told_fetch(void *user, char *buf, size_t cap, chaos_fetched *out, chaos_error *err) {
    (void)cap;
    (void)err;
    *out = *(chaos_fetched *)user;
    memcpy(buf, "{\"enabled\":true,\"errorRate\":100}", 32);
    out->len = 32;
    return CHAOS_OK;
}

static void case_source_may_tell_version_and_change(void) {
    fake_clock clock = FAKE_START;
    chaos_fetched told = {0, 42, 1800000000000ll - 59 * 60000}; /* changed 59 minutes ago */
    chaos_desc d = quiet_desc();
    chaos *c;
    d.fetch = told_fetch;
    d.fetch_user = &told;
    d.clock = fake_now;
    d.clock_user = &clock;
    d.no_thread = true;
    c = chaos_open(&d, NULL);
    CHECK_INT(chaos_refresh(c, NULL), CHAOS_OK);
    CHECK_INT(report_of(c).version, 42);
    CHECK_INT(decide(c).version, 42);
    CHECK_INT(report_of(c).end_ms, 1800000000000ll + 60000);
    fake_forward(&clock, 59000);
    chaos_refresh(c, NULL);
    CHECK_INT(state_of(c), CHAOS_STATE_ON);
    fake_forward(&clock, 1000);
    CHECK_INT(decide(c).kind, CHAOS_PASS); /* the reader's own look at the clock */
    CHECK_INT(state_of(c), CHAOS_STATE_EXPIRED);
    chaos_close(c);
}

static void case_open_does_not_wait_for_a_slow_source(void) {
    chaos_desc d = quiet_desc();
    long long start = peer_ms();
    peer_source s;
    chaos *c;
    peer_source_init(&s, ON);
    s.slow_ms = 300;
    d.fetch = peer_fetch;
    d.fetch_user = &s;
    c = chaos_open(&d, NULL);
    CHECK(peer_ms() - start < 150);
    CHECK_INT(state_of(c), CHAOS_STATE_OFF);
    CHECK(peer_ms() - start < 250); /* nor does a look at the state */
    CHECK_INT(decide(c).kind, CHAOS_PASS);
    PEER_UNTIL(state_of(c) == CHAOS_STATE_ON, 2000);
    PEER_UNTIL(PEER_LOAD(&s.inside) == 1, 2000); /* close in the middle of the next fetch */
    start = peer_ms();
    chaos_close(c);
    CHECK(peer_ms() - start < 600);
    CHECK_INT(PEER_LOAD(&s.inside), 0);
}

/* ---- many at once ---- */

static void *refresh_20_times(void *arg) {
    int i;
    for (i = 0; i < 20; i++) CHECK_INT(chaos_refresh((chaos *)arg, NULL), CHAOS_OK);
    return NULL;
}

static void case_one_fetch_at_a_time(void) {
    chaos_desc d = quiet_desc();
    pthread_t threads[8];
    peer_source s;
    chaos *c;
    int i;
    peer_source_init(&s, ON);
    s.slow_ms = 1;
    d.ttl_ms = 10;
    d.fetch = peer_fetch;
    d.fetch_user = &s;
    c = chaos_open(&d, NULL);
    for (i = 0; i < 8; i++)
        if (pthread_create(&threads[i], NULL, refresh_20_times, c)) abort();
    for (i = 0; i < 8; i++) pthread_join(threads[i], NULL);
    CHECK_INT(PEER_LOAD(&s.overlaps), 0);
    CHECK(PEER_LOAD(&s.fetches) >= 8 * 20); /* each refresh is a look of its own */
    CHECK_INT(report_of(c).config_changes, 1);
    chaos_close(c);
}

typedef struct flipping {
    chaos *c;
    int stop, wrong, looks; /* PEER_LOAD */
} flipping;

/* While configs change: every verdict and every copy is of one config, whole. Odd versions answer 503, even ones 404. */
static void *look_at_flips(void *arg) {
    flipping *f = (flipping *)arg;
    chaos_config *cfg = (chaos_config *)malloc(sizeof *cfg);
    if (!cfg) abort();
    while (!PEER_LOAD(&f->stop)) {
        chaos_verdict v = decide(f->c);
        char body[64];
        if (v.kind != CHAOS_STATUS || v.status != (v.version % 2 ? 503 : 404)) PEER_ADD(&f->wrong, 1);
        chaos_verdict_body(f->c, &v, body, sizeof body); /* of its own config, or the default text when that is gone */
        if (strcmp(body, v.version % 2 ? "odd" : "even") && strncmp(body, "fault injected", 14)) PEER_ADD(&f->wrong, 1);
        chaos_done(f->c, &v, 0, 0);
        if (chaos_get_config(f->c, cfg)) {
            const char *name = cfg->text + cfg->rules[0].name.at;
            if (strcmp(name, cfg->rules[0].fault.error_status == 503 ? "odd" : "even")) PEER_ADD(&f->wrong, 1);
        }
        PEER_ADD(&f->looks, 1);
    }
    free(cfg);
    return NULL;
}

static int allocations;
static void *counted_alloc(void *user, size_t size) {
    (void)user;
    PEER_ADD(&allocations, 1);
    return malloc(size);
}
static void counted_free(void *user, void *ptr) {
    (void)user;
    PEER_ADD(&allocations, -1);
    free(ptr);
}

/* One a second for 24 hours; under a thread sanitizer, which takes minutes for that, a part of them. */
#ifdef __SANITIZE_THREAD__
enum { DAY = 5000 };
#else
enum { DAY = 86400 };
#endif
static void case_a_day_of_changes_leaks_nothing(void) {
    static const char *const texts[2] = {"{\"enabled\":true,\"expiresAt\":\"never\",\"rules\":[{\"name\":\"even\",\"errorRate\":100,"
                                         "\"errorStatus\":404,\"errorBody\":\"even\"}]}",
                                         "{\"enabled\":true,\"expiresAt\":\"never\",\"rules\":[{\"name\":\"odd\",\"match\":{\"paths\":[\"/"
                                         "**\"]},\"errorRate\":100,\"errorStatus\":503,\"errorBody\":\"odd\"}]}"};
    int i, before, fds = peer_fds();
    chaos_desc d = quiet_desc();
    pthread_t reader;
    peer_source s;
    flipping f;
    long start = 0;
    memset(&f, 0, sizeof f);
    peer_source_init(&s, texts[1]);
    d.fetch = peer_fetch;
    d.fetch_user = &s;
    d.no_thread = true;
    d.alloc = counted_alloc;
    d.free = counted_free;
    f.c = chaos_open(&d, NULL);
    CHECK_INT(chaos_refresh(f.c, NULL), CHAOS_OK);
    before = PEER_LOAD(&allocations);
    if (pthread_create(&reader, NULL, look_at_flips, &f)) abort();
    for (i = 2; i <= DAY; i++) {
        peer_source_set(&s, texts[i % 2], CHAOS_OK);
        if (chaos_refresh(f.c, NULL) != CHAOS_OK) CHECK_INT(i, -1);
        if (i == 1000) start = peer_resident_kib();
    }
    CHECK_INT(report_of(f.c).config_changes, DAY);
    CHECK_INT(report_of(f.c).version, DAY);
    CHECK_INT(PEER_LOAD(&allocations), before);
    check_where("resident %ld KiB, then %ld KiB", start, peer_resident_kib());
    CHECK(start > 0 && peer_resident_kib() - start < 1024);
    PEER_UNTIL(PEER_LOAD(&f.looks) > 100, PEER_MS);
    PEER_STORE(&f.stop, 1);
    pthread_join(reader, NULL);
    CHECK_INT(PEER_LOAD(&f.wrong), 0);
    chaos_close(f.c);
    CHECK_INT(PEER_LOAD(&allocations), 0);
    CHECK_INT(peer_fds(), fds);
}

static void case_open_and_close_leave_nothing(void) {
    int i, fds, threads;
    file f;
    file_make(&f, ON);
    chaos_close(open_config(f.source));
    fds = peer_fds();
    threads = peer_threads();
    for (i = 0; i < 100; i++) chaos_close(open_config(f.source));
    PEER_UNTIL(peer_threads() <= threads, 1000);
    CHECK_INT(peer_fds(), fds);
    file_remove(&f);
}

int main(int argc, char **argv) {
    check_begin(argc, argv);
    peer_watchdog(120);
    unsetenv("CHAOS_CONFIG"); /* not the caller's */
    unsetenv("CHAOS_DISABLE");
    CHECK_RUN(case_file_is_read_before_open_returns);
    CHECK_RUN(case_file_changes_are_followed);
    CHECK_RUN(case_missing_file_is_off_quietly);
    CHECK_RUN(case_invalid_file_is_off_and_says_where);
    CHECK_RUN(case_half_written_file_never_turns_chaos_on);
    CHECK_RUN(case_careless_writer_gives_no_mixture);
    CHECK_RUN(case_unreachable_file_is_used_for_max_stale_only);
    CHECK_RUN(case_too_large_file_is_invalid);
    CHECK_RUN(case_inline_and_env_are_read_at_open);
    CHECK_RUN(case_chaos_config_is_the_default);
    CHECK_RUN(case_chaos_disable_overrides_everything);
    CHECK_RUN(case_what_cannot_be_a_source_is_refused);
    CHECK_RUN(case_jitter_only_shortens_the_ttl);
    CHECK_RUN(case_failing_source_is_asked_once_per_ttl_at_most);
    CHECK_RUN(case_refresh_ignores_ttl_and_backoff);
    CHECK_RUN(case_default_ttl_is_30_s_off_and_10_s_on);
    CHECK_RUN(case_lease_runs_from_the_last_change);
    CHECK_RUN(case_source_may_tell_version_and_change);
    CHECK_RUN(case_open_does_not_wait_for_a_slow_source);
    CHECK_RUN(case_one_fetch_at_a_time);
    CHECK_RUN(case_a_day_of_changes_leaks_nothing);
    CHECK_RUN(case_open_and_close_leave_nothing);
    return check_end();
}

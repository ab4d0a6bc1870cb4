/* The log: every line one JSON object, complete books, and never a request that waits for it. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

#include "../check.h"
#include "peer.h"

#include <signal.h>

#define FAIL_ALL "{\"enabled\":true,\"errorRate\":100,\"expiresAt\":\"never\"}"
#define OFF      "{\"enabled\":false}"

static chaos_report report_of(chaos *c) {
    chaos_report r;
    chaos_stats(c, &r);
    return r;
}

static chaos_verdict decide(chaos *c) {
    chaos_request req;
    memset(&req, 0, sizeof req);
    req.method = "GET";
    req.path = "/";
    return chaos_decide(c, &req);
}

/* ---- lines, as a callback or a pipe brought them ---- */

typedef struct lines {
    pthread_mutex_t lock;
    peer_bytes text;
    int count, bad;
} lines;

static void lines_init(lines *l) {
    memset(l, 0, sizeof *l);
    pthread_mutex_init(&l->lock, NULL);
    peer_add(&l->text, "", 0);
}
static void lines_free(lines *l) {
    pthread_mutex_destroy(&l->lock);
    peer_free(&l->text);
}

/* Exactly one line: JSON by itself, one newline, at the end. */
static bool is_line(const char *line, size_t len) {
    return len > 2 && line[len - 1] == '\n' && !memchr(line, '\n', len - 1) && line[0] == '{' && line[len - 2] == '}' &&
           chaos_json_check(line, len - 1, NULL) == CHAOS_OK;
}

static void take_line(void *user, const char *line, size_t len) {
    lines *l = (lines *)user;
    pthread_mutex_lock(&l->lock);
    if (!is_line(line, len)) l->bad++;
    peer_add(&l->text, line, len);
    l->count++;
    pthread_mutex_unlock(&l->lock);
}

/* The value of a key in one line as text, strings without their quotes; "" = not there. */
static const char *value_of(const char *line, const char *key, char *value, size_t cap) {
    char mark[64];
    const char *at, *end = strchr(line, '\n');
    size_t n;
    snprintf(mark, sizeof mark, "\"%s\":", key);
    at = strstr(line, mark);
    value[0] = 0;
    if (!at || (end && at > end)) return value;
    at += strlen(mark);
    if (*at == '"') {
        for (n = 1; at[n] && at[n] != '"'; n++) n += at[n] == '\\';
        at++;
        n--;
    } else n = strcspn(at, ",}");
    snprintf(value, cap, "%.*s", (int)n, at);
    return value;
}

static bool line_has(const char *line, const char *key, const char *want) {
    char value[512];
    return !strcmp(value_of(line, key, value, sizeof value), want);
}

/* Calls for every line; returns how many have this action. `sum_of`: adds up that number over them. */
static int count_lines(lines *l, const char *action, const char *sum_of, long long *sum) {
    char value[64];
    const char *p;
    int n = 0;
    if (sum) *sum = 0;
    pthread_mutex_lock(&l->lock);
    for (p = peer_text(&l->text); *p; p = strchr(p, '\n') + 1) {
        if (!line_has(p, "action", action)) continue;
        n++;
        if (sum) *sum += atoll(value_of(p, sum_of, value, sizeof value));
    }
    pthread_mutex_unlock(&l->lock);
    return n;
}
static int actions(lines *l, const char *action) { return count_lines(l, action, NULL, NULL); }

/* Line number `nth` (from 0) with this action, copied to `out`; "" = none. */
static const char *line_of(lines *l, const char *action, int nth, peer_bytes *out) {
    const char *p;
    out->len = 0;
    peer_add(out, "", 0);
    pthread_mutex_lock(&l->lock);
    for (p = peer_text(&l->text); *p; p = strchr(p, '\n') + 1)
        if (line_has(p, "action", action) && nth-- == 0) {
            peer_add(out, p, (size_t)(strchr(p, '\n') - p) + 1);
            break;
        }
    pthread_mutex_unlock(&l->lock);
    return out->data;
}

#define CHECK_VALUE(line, key, want) check_value(line, key, want, __LINE__)
static void check_value(const char *line, const char *key, const char *want, int at) {
    char value[512];
    check_str(value_of(line, key, value, sizeof value), want, __FILE__, at, key);
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

static chaos_desc log_desc(lines *l) {
    chaos_desc d;
    memset(&d, 0, sizeof d);
    d.instance = "host-7";
    d.service = "pay";
    d.log = take_line;
    d.log_user = l;
    return d;
}

/* ---- what the lines say ---- */

static void case_first_line_tells_everything(void) {
    peer_bytes line = {NULL, 0, 0};
    chaos_desc d;
    lines l;
    chaos *c;
    lines_init(&l);
    d = log_desc(&l);
    d.config = "{\"enabled\":true,\"errorRate\":5,\"expiresAt\":4000000000,\"seed\":77,\"name\":\"q\\\"1\\u00e4\",\"owner\":\"ops\","
               "\"note\":\"why\"}";
    d.ttl_ms = 12345;
    c = chaos_open(&d, NULL);
    line_of(&l, "open", 0, &line);
    CHECK(!strncmp(line.data, peer_text(&l.text), line.len)); /* it is the first one */
    CHECK_VALUE(line.data, "source", "chaos");
    CHECK_VALUE(line.data, "level", "info");
    CHECK_VALUE(line.data, "version", CHAOS_VERSION);
    CHECK_VALUE(line.data, "config", "inline");
    CHECK(strstr(line.data, "\"ways\":\"inline env file") != NULL);
    CHECK_VALUE(line.data, "state", "on");
    CHECK(!line_has(line.data, "reason", ""));
    CHECK_VALUE(line.data, "service", "pay");
    CHECK_VALUE(line.data, "instance", "host-7");
    CHECK(!line_has(line.data, "canary_slot", ""));
    CHECK(strstr(line.data, "12345") != NULL); /* TTL */
    CHECK_VALUE(line.data, "end", "2096-10-02T07:06:40Z");
    CHECK_VALUE(line.data, "seed", "77");
    CHECK_VALUE(line.data, "owner", "ops");
    CHECK_VALUE(line.data, "note", "why");
    CHECK(strstr(line.data, "\"name\":\"q\\\"1") != NULL); /* escaped */
    chaos_close(c);
    CHECK_INT(l.bad, 0);
    peer_free(&line);
    lines_free(&l);
}

static void case_time_is_the_clocks(void) {
    fake_clock clock = {1, 1800000000123456789ull};
    peer_bytes line = {NULL, 0, 0};
    chaos_desc d;
    lines l;
    lines_init(&l);
    d = log_desc(&l);
    d.clock = fake_now;
    d.clock_user = &clock;
    chaos_close(chaos_open(&d, NULL));
    CHECK_VALUE(line_of(&l, "open", 0, &line), "time", "2027-01-15T08:00:00.123Z");
    peer_free(&line);
    lines_free(&l);
}

/* The states, each told once, in their order. */
static void case_changes_are_always_told(void) {
    static const char *const want[] = {"on", "invalid", "on", "dry-run", "off", "on", "killed"};
    peer_bytes line = {NULL, 0, 0};
    peer_source s;
    chaos_desc d;
    lines l;
    chaos *c;
    int i, states;
    lines_init(&l);
    peer_source_init(&s, OFF);
    d = log_desc(&l);
    d.fetch = peer_fetch;
    d.fetch_user = &s;
    d.fault_log = CHAOS_LOG_NONE; /* faults only: changes are told all the same */
    c = chaos_open(&d, NULL);
    CHECK_INT(chaos_refresh(c, NULL), CHAOS_OK);
    peer_source_set(&s, FAIL_ALL, CHAOS_OK);
    chaos_refresh(c, NULL);
    peer_source_set(&s, "{\"enabled\":1}", CHAOS_OK);
    chaos_refresh(c, NULL);
    peer_source_set(&s, FAIL_ALL, CHAOS_OK);
    chaos_refresh(c, NULL);
    chaos_refresh(c, NULL); /* nothing new: nothing told */
    peer_source_set(&s, "{\"enabled\":true,\"dryRun\":true,\"expiresAt\":\"never\"}", CHAOS_OK);
    chaos_refresh(c, NULL);
    peer_source_set(&s, FAIL_ALL, CHAOS_ERR_NOT_FOUND);
    chaos_refresh(c, NULL);
    peer_source_set(&s, FAIL_ALL, CHAOS_OK);
    chaos_refresh(c, NULL);
    chaos_off(c);
    PEER_UNTIL(report_of(c).state == CHAOS_STATE_KILLED, 100);
    PEER_UNTIL(strstr(line_of(&l, "state", actions(&l, "state") - 1, &line), "killed"), 1500);
    states = actions(&l, "state");
    CHECK_INT(states, 7);
    for (i = 0; i < states && i < 7; i++) {
        check_where("state %d", i);
        CHECK_VALUE(line_of(&l, "state", i, &line), "state", want[i]);
        CHECK_VALUE(line.data, "service", "pay");
        if (i == 1) CHECK_VALUE(line.data, "level", "error");
        if (i == 1) CHECK(strstr(line.data, "line 1, column 12") != NULL);
    }
    check_where("%s", "");
    CHECK_INT(actions(&l, "config"), 6 + 1); /* six contents and one that went away */
    CHECK_INT(actions(&l, "inject"), 0);
    chaos_close(c);
    CHECK_INT(l.bad, 0);
    peer_free(&line);
    lines_free(&l);
}

static void case_failing_source_is_told_once(void) {
    peer_bytes line = {NULL, 0, 0};
    peer_source s;
    chaos_desc d;
    lines l;
    chaos *c;
    int i;
    lines_init(&l);
    peer_source_init(&s, OFF);
    s.result = CHAOS_ERR_UNREACHABLE;
    d = log_desc(&l);
    d.fetch = peer_fetch;
    d.fetch_user = &s;
    d.no_thread = true;
    c = chaos_open(&d, NULL);
    for (i = 0; i < 50; i++) CHECK_INT(chaos_refresh(c, NULL), CHAOS_ERR_UNREACHABLE);
    CHECK_INT(actions(&l, "fetch-failed"), 1); /* an outage is no flood */
    CHECK(strstr(line_of(&l, "fetch-failed", 0, &line), "\"level\":\"warn\"") != NULL);
    CHECK_INT(report_of(c).fetch_errors, 50);
    peer_source_set(&s, OFF, CHAOS_OK);
    chaos_refresh(c, NULL);
    peer_source_set(&s, OFF, CHAOS_ERR_UNREACHABLE);
    chaos_refresh(c, NULL);
    CHECK_INT(actions(&l, "fetch-failed"), 2); /* a new one is news */
    chaos_close(c);
    CHECK_INT(l.bad, 0);
    peer_free(&line);
    lines_free(&l);
}

static void case_fault_lines_agree_with_the_verdict(void) {
    peer_bytes line = {NULL, 0, 0};
    fake_clock clock = FAKE_START;
    chaos_verdict v;
    chaos_desc d;
    char want[32];
    lines l;
    chaos *c;
    lines_init(&l);
    d = log_desc(&l);
    d.clock = fake_now;
    d.clock_user = &clock;
    d.config = "{\"enabled\":true,\"rules\":[{\"name\":\"slow\",\"match\":{\"methods\":[\"PUT\"]},\"latency\":250},{\"name\":"
               "\"br\\\"oken\",\"errorRate\":100,\"errorStatus\":507}]}";
    c = chaos_open(&d, NULL);
    v = decide(c);
    CHECK_INT(v.kind, CHAOS_STATUS);
    line_of(&l, "inject", 0, &line);
    CHECK_VALUE(line.data, "source", "chaos");
    CHECK_VALUE(line.data, "level", "info");
    CHECK_VALUE(line.data, "fault", "error");
    CHECK_VALUE(line.data, "status", "507");
    CHECK_VALUE(line.data, "delay_ms", "0");
    CHECK_VALUE(line.data, "rule", "br\\\"oken");
    snprintf(want, sizeof want, "%u", (unsigned)v.roll);
    CHECK_VALUE(line.data, "roll", want);
    snprintf(want, sizeof want, "%u", v.version);
    CHECK_VALUE(line.data, "config_version", want);
    {
        chaos_request put;
        memset(&put, 0, sizeof put);
        put.method = "PUT";
        v = chaos_decide(c, &put);
    }
    CHECK_INT(v.kind, CHAOS_DELAY);
    CHECK_VALUE(line_of(&l, "inject", 1, &line), "fault", "latency");
    CHECK_VALUE(line.data, "delay_ms", "250");
    CHECK_VALUE(line.data, "rule", "slow");
    chaos_close(c);
    CHECK_INT(l.bad, 0);
    peer_free(&line);
    lines_free(&l);
}

/* ---- how many lines: all, sample, none ---- */

/* 200 faults in one second, then 30 in the next. The books must balance when the handle is closed. */
static void check_fault_mode(chaos_fault_log mode, int first_second, int both, bool dry) {
    fake_clock clock = FAKE_START;
    const char *action = dry ? "dryrun" : "inject";
    long long suppressed = 0;
    chaos_report r;
    chaos_desc d;
    lines l;
    chaos *c;
    int i;
    lines_init(&l);
    check_where("mode %d%s", (int)mode, dry ? ", dry" : "");
    d = log_desc(&l);
    d.clock = fake_now;
    d.clock_user = &clock;
    d.fault_log = mode;
    d.config = dry ? "{\"enabled\":true,\"dryRun\":true,\"errorRate\":100}" : "{\"enabled\":true,\"errorRate\":100}";
    c = chaos_open(&d, NULL);
    for (i = 0; i < 200; i++) decide(c);
    CHECK_INT(actions(&l, action), first_second);
    fake_forward(&clock, 1000);
    for (i = 0; i < 30; i++) decide(c);
    CHECK_INT(actions(&l, action), both);
    r = report_of(c);
    CHECK_INT(dry ? r.would_inject : r.injected[CHAOS_STATUS], 230);
    CHECK_INT(r.log_suppressed, 230 - both);
    if (mode != CHAOS_LOG_NONE) { /* the refresher tells while it goes on, not only at the end */
        PEER_UNTIL((count_lines(&l, "summary", "suppressed", &suppressed), suppressed) == 230 - both, 2500);
    }
    decide(c);
    chaos_close(c);
    count_lines(&l, "summary", "suppressed", &suppressed);
    if (mode == CHAOS_LOG_NONE) CHECK_INT(actions(&l, "summary"), 0);
    else CHECK_INT(actions(&l, action) + suppressed, 231);
    CHECK_INT(l.bad, 0);
    lines_free(&l);
}

static void case_fault_lines_all_sample_none(void) {
    check_fault_mode(CHAOS_LOG_ALL, 50, 80, false);
    check_fault_mode(CHAOS_LOG_SAMPLE, 1, 2, false);
    check_fault_mode(CHAOS_LOG_NONE, 0, 0, false);
    check_fault_mode(CHAOS_LOG_ALL, 50, 80, true);
}

static void *decide_500_times(void *arg) {
    int i;
    for (i = 0; i < 500; i++) decide((chaos *)arg);
    return NULL;
}

static void case_books_balance_over_threads(void) {
    pthread_t threads[8];
    long long suppressed;
    chaos_desc d;
    lines l;
    chaos *c;
    int i;
    lines_init(&l);
    d = log_desc(&l);
    d.config = "{\"enabled\":true,\"errorRate\":50}";
    c = chaos_open(&d, NULL);
    for (i = 0; i < 8; i++)
        if (pthread_create(&threads[i], NULL, decide_500_times, c)) abort();
    for (i = 0; i < 8; i++) pthread_join(threads[i], NULL);
    i = (int)report_of(c).injected[CHAOS_STATUS];
    CHECK(i > 1500 && i < 2500);
    chaos_close(c);
    count_lines(&l, "summary", "suppressed", &suppressed);
    CHECK_INT(actions(&l, "inject") + suppressed, i);
    CHECK(actions(&l, "inject") >= 50);
    CHECK_INT(l.bad, 0);
    lines_free(&l);
}

static void case_quiet_says_nothing(void) {
    chaos_desc d;
    lines l;
    chaos *c;
    lines_init(&l);
    d = log_desc(&l);
    d.quiet = true;
    d.config = FAIL_ALL;
    c = chaos_open(&d, NULL);
    CHECK_INT(decide(c).kind, CHAOS_STATUS);
    CHECK_INT(report_of(c).injected[CHAOS_STATUS], 1); /* counted all the same */
    CHECK_INT(report_of(c).log_lines, 0);
    chaos_close(c);
    CHECK_INT(l.count, 0);
    lines_free(&l);
}

static void case_heartbeat_once_a_minute_while_on(void) {
    peer_bytes line = {NULL, 0, 0};
    fake_clock clock = FAKE_START;
    peer_source s;
    chaos_desc d;
    lines l;
    chaos *c;
    int second;
    lines_init(&l);
    peer_source_init(&s, FAIL_ALL);
    d = log_desc(&l);
    d.clock = fake_now;
    d.clock_user = &clock;
    d.fetch = peer_fetch;
    d.fetch_user = &s;
    c = chaos_open(&d, NULL);
    PEER_UNTIL(report_of(c).state == CHAOS_STATE_ON, 1000);
    decide(c);
    decide(c);
    for (second = 1; second <= 130; second++) { /* two minutes and a bit; every second is seen by the refresher */
        unsigned long long fetched = report_of(c).fetches;
        fake_forward(&clock, 1000);
        if (second % 10 == 0) PEER_UNTIL(report_of(c).fetches > fetched || report_of(c).age_ms < 10000, 1000);
        if (second == 59) CHECK_INT(actions(&l, "heartbeat"), 0);
        if (second == 60) PEER_UNTIL(actions(&l, "heartbeat") == 1, 1000);
        if (second == 119) CHECK_INT(actions(&l, "heartbeat"), 1);
        if (second == 120) PEER_UNTIL(actions(&l, "heartbeat") == 2, 1000);
    }
    line_of(&l, "heartbeat", 0, &line);
    CHECK_VALUE(line.data, "state", "on");
    CHECK_VALUE(line.data, "config_version", "1");
    CHECK_VALUE(line.data, "requests", "2");
    CHECK_VALUE(line.data, "injected", "2");
    CHECK_VALUE(line.data, "service", "pay");
    CHECK_VALUE(line.data, "instance", "host-7");
    CHECK(!line_has(line.data, "age_ms", ""));
    peer_source_set(&s, OFF, CHAOS_OK);
    chaos_refresh(c, NULL);
    for (second = 0; second < 13; second++) fake_forward(&clock, 10000);
    PEER_UNTIL(report_of(c).fetches > 14, 1000); /* the refresher has seen the time pass */
    CHECK_INT(actions(&l, "heartbeat"), 2);      /* none while off */
    chaos_close(c);
    CHECK_INT(l.bad, 0);
    peer_free(&line);
    lines_free(&l);
}

/* ---- events ---- */

typedef struct events {
    int faults, states, configs, dry; /* PEER_LOAD */
    chaos_state last;
    chaos_verdict verdict;
} events;
static void take_event(void *user, const chaos_event *e) {
    events *ev = (events *)user;
    if (e->kind == CHAOS_EVENT_FAULT) {
        PEER_ADD(&ev->faults, 1);
        PEER_ADD(&ev->dry, e->dry_run ? 1 : 0);
        ev->verdict = *e->verdict;
    }
    if (e->kind == CHAOS_EVENT_STATE) {
        PEER_ADD(&ev->states, 1);
        ev->last = e->state;
        CHECK(e->verdict == NULL && e->reason && e->reason[0]);
    }
    if (e->kind == CHAOS_EVENT_CONFIG) PEER_ADD(&ev->configs, 1);
}

static void case_events_tell_the_same(void) {
    chaos_verdict v;
    peer_source s;
    chaos_desc d;
    events ev;
    chaos *c;
    int i;
    memset(&ev, 0, sizeof ev);
    peer_source_init(&s, FAIL_ALL);
    memset(&d, 0, sizeof d);
    d.quiet = true; /* events are not log lines */
    d.no_thread = true;
    d.fetch = peer_fetch;
    d.fetch_user = &s;
    d.event = take_event;
    d.event_user = &ev;
    c = chaos_open(&d, NULL);
    CHECK_INT(chaos_refresh(c, NULL), CHAOS_OK);
    CHECK_INT(ev.configs, 1);
    CHECK_INT(ev.states, 1);
    CHECK_INT(ev.last, CHAOS_STATE_ON);
    for (i = 0; i < 300; i++) v = decide(c);
    CHECK_INT(ev.faults, 300); /* all of them, whatever the log suppresses */
    CHECK(ev.verdict.key == v.key && ev.verdict.kind == v.kind && ev.verdict.roll == v.roll);
    peer_source_set(&s, "{\"enabled\":true,\"dryRun\":true,\"errorRate\":100,\"expiresAt\":\"never\"}", CHAOS_OK);
    chaos_refresh(c, NULL);
    v = decide(c);
    CHECK_INT(v.kind, CHAOS_PASS);
    CHECK_INT(ev.dry, 1);
    CHECK_INT(ev.verdict.kind, CHAOS_STATUS); /* what would have been */
    CHECK_INT(ev.last, CHAOS_STATE_DRY_RUN);
    chaos_close(c);
}

/* ---- stderr: full, dead, closed, shared ---- */

/* Puts fd in the place of stderr; the old one comes back by stderr_back. */
static int stderr_to(int fd) {
    int old = dup(2);
    fflush(stderr);
    if (dup2(fd, 2) != 2) abort();
    return old;
}
static void stderr_back(int old) {
    dup2(old, 2);
    close(old);
}

static void fill(int fd) {
    char zeros[4096];
    int flags = fcntl(fd, F_GETFL);
    memset(zeros, 'x', sizeof zeros);
    fcntl(fd, F_SETFL, flags | O_NONBLOCK);
    while (write(fd, zeros, sizeof zeros) > 0) {}
    while (write(fd, zeros, 1) > 0) {}
    fcntl(fd, F_SETFL, flags);
}

#define FAULTS 20000
typedef struct decider {
    chaos *c;
    long long longest, total; /* us */
    int slow;                 /* calls over 50 ms */
} decider;
static void *decide_and_measure(void *arg) {
    decider *me = (decider *)arg;
    long long start = peer_us();
    int i;
    for (i = 0; i < FAULTS / 2; i++) {
        long long before = peer_us(), took;
        if (decide(me->c).kind != CHAOS_STATUS) CHECK_INT(i, -1);
        took = peer_us() - before;
        if (took > me->longest) me->longest = took;
        me->slow += took > 50000;
    }
    me->total = peer_us() - start;
    return NULL;
}

static chaos *open_on_stderr(const char *config) {
    chaos_desc d;
    memset(&d, 0, sizeof d);
    d.config = config;
    d.instance = "host-7";
    return chaos_open(&d, NULL);
}

/* 20,000 faults by two threads over some seconds of the program's clock, so that lines are due all the time. */
static void check_nobody_waits(int write_end, const char *what) {
    fake_clock clock = FAKE_START;
    int i, old = stderr_to(write_end);
    decider who[2];
    pthread_t threads[2];
    chaos_report r;
    chaos_desc d;
    chaos *c;
    memset(&d, 0, sizeof d);
    memset(who, 0, sizeof who);
    d.config = FAIL_ALL;
    d.clock = fake_now;
    d.clock_user = &clock;
    c = chaos_open(&d, NULL);
    for (i = 0; i < 2; i++) {
        who[i].c = c;
        if (pthread_create(&threads[i], NULL, decide_and_measure, &who[i])) abort();
    }
    for (i = 0; i < 10; i++) { /* a second each: 50 lines more may be written */
        peer_nap(1);
        fake_forward(&clock, 1000);
    }
    for (i = 0; i < 2; i++) pthread_join(threads[i], NULL);
    for (i = 0; i < 500; i++) { /* and every line of these is due */
        fake_forward(&clock, 1000);
        decide(c);
    }
    r = report_of(c);
    chaos_close(c);
    stderr_back(old);
    for (i = 0; i < 2; i++) {
        check_where("%s: longest %lld us, total %lld us", what, who[i].longest, who[i].total);
        CHECK(who[i].slow <= 2); /* the scheduler's, on a busy machine; a log that blocks blocks for good */
        CHECK(who[i].total < 5000000);
    }
    CHECK_INT(r.injected[CHAOS_STATUS], FAULTS + 500);
    CHECK(r.log_dropped >= 500);
}

static void case_full_log_pipe_delays_nobody(void) {
    int fds[2];
    if (pipe(fds)) abort();
    fill(fds[1]);
    check_nobody_waits(fds[1], "pipe");
    CHECK(!(fcntl(fds[1], F_GETFL) & O_NONBLOCK)); /* the program's own stderr stays as blocking as it was */
    close(fds[0]);
    close(fds[1]);
}

/* As under systemd, where stderr is a stream socket. */
static void case_full_log_socket_delays_nobody(void) {
    int fds[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds)) abort();
    fill(fds[1]);
    check_nobody_waits(fds[1], "socket");
    close(fds[0]);
    close(fds[1]);
}

/* Metrics go to stdout. Between the look at a pipe and the write another thread may take the room: so the write itself must not
   block, and the program's own stdout stays as it was. */
static void case_full_metrics_pipe_delays_nobody(void) {
    int fds[2], old = dup(1), i;
    chaos_report r;
    chaos_desc d;
    chaos *c;
    if (old < 0 || pipe(fds)) abort();
    fflush(stdout);
    dup2(fds[1], 1);
    memset(&d, 0, sizeof d);
    d.config = FAIL_ALL;
    d.quiet = true;
    setenv("CHAOS_EMF", "1", 1);
    c = chaos_open(&d, NULL);
    unsetenv("CHAOS_EMF");
    for (i = 0; i < 1000; i++) decide(c);
    r = report_of(c);
    dup2(old, 1);
    close(old);
    CHECK(r.log_dropped > 0 && r.log_dropped < 1000);
    CHECK(c->emf_fd != 1 && fcntl(c->emf_fd, F_GETFL) & O_NONBLOCK);
    CHECK(!(fcntl(fds[1], F_GETFL) & O_NONBLOCK));
    chaos_close(c);
    close(fds[0]);
    close(fds[1]);
}

static void check_survives(int write_end, const char *what) {
    sigset_t before, after, pending;
    int i, old = stderr_to(write_end);
    chaos_report r;
    chaos *c;
    check_where("%s", what);
    signal(SIGPIPE, SIG_DFL); /* it would kill */
    pthread_sigmask(SIG_BLOCK, NULL, &before);
    c = open_on_stderr(FAIL_ALL);
    for (i = 0; i < 1000; i++) decide(c);
    r = report_of(c);
    chaos_close(c);
    stderr_back(old);
    pthread_sigmask(SIG_BLOCK, NULL, &after);
    sigpending(&pending);
    CHECK_INT(r.injected[CHAOS_STATUS], 1000);
    CHECK(r.log_dropped > 0);
    CHECK_INT(r.log_lines, 0);
    CHECK(!sigismember(&after, SIGPIPE) && !sigismember(&before, SIGPIPE));
    CHECK(!sigismember(&pending, SIGPIPE));
}

static void case_dead_log_pipe_kills_nobody(void) {
    int fds[2];
    if (pipe(fds)) abort();
    close(fds[0]);
    check_survives(fds[1], "pipe");
    close(fds[1]);
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds)) abort();
    close(fds[0]);
    check_survives(fds[1], "socket");
    close(fds[1]);
}

/* A SIGPIPE of the program's own, blocked and pending, is not eaten. */
static void case_pending_sigpipe_is_left_alone(void) {
    sigset_t set, old_set, pending;
    int fds[2], old, sig;
    chaos *c;
    if (pipe(fds)) abort();
    close(fds[0]);
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &set, &old_set);
    raise(SIGPIPE);
    old = stderr_to(fds[1]);
    c = open_on_stderr(FAIL_ALL);
    decide(c);
    chaos_close(c);
    stderr_back(old);
    sigpending(&pending);
    CHECK(sigismember(&pending, SIGPIPE));
    if (sigismember(&pending, SIGPIPE)) sigwait(&set, &sig);
    pthread_sigmask(SIG_SETMASK, &old_set, NULL);
    close(fds[1]);
}

static void case_closed_stderr_is_no_trouble(void) {
    int old = dup(2), fds = peer_fds();
    chaos_report r;
    chaos *c;
    close(2);
    c = open_on_stderr(FAIL_ALL);
    CHECK(c != NULL);
    decide(c);
    r = report_of(c);
    chaos_close(c);
    dup2(old, 2);
    CHECK_INT(r.injected[CHAOS_STATUS], 1);
    CHECK_INT(peer_fds(), fds);
    close(old);
}

/* ---- whole lines only ---- */

typedef struct reader {
    int fd;
    peer_bytes got;
} reader;
static void *read_all(void *arg) {
    reader *r = (reader *)arg;
    char buf[4096];
    ssize_t n;
    while ((n = read(r->fd, buf, sizeof buf)) > 0) peer_add(&r->got, buf, (size_t)n);
    return NULL;
}

typedef struct talker {
    chaos *c;
    peer_source s;
} talker;
static void *talk(void *arg) {
    talker *t = (talker *)arg;
    char json[1024];
    int i;
    for (i = 0; i < 300; i++) { /* long lines, each of another length */
        snprintf(json, sizeof json, "{\"enabled\":true,\"errorRate\":100,\"expiresAt\":\"never\",\"note\":\"%.*s\",\"name\":\"n%d\"}",
                 i % 250 + 1,
                 "yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy"
                 "yyyyyyy"
                 "yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy"
                 "yyyyyyy",
                 i);
        peer_source_set(&t->s, json, CHAOS_OK);
        chaos_refresh(t->c, NULL);
        decide(t->c);
    }
    return NULL;
}

/* Two handles, each with two threads that write, into one pipe that somebody reads: no line inside another. */
static void case_lines_never_interleave(void) {
    unsigned long long written = 0, dropped = 0;
    pthread_t threads[4], reading;
    talker talkers[2];
    const char *p, *end;
    reader r;
    int i, fds[2], old, count = 0, bad = 0;
    if (pipe(fds)) abort();
    memset(&r, 0, sizeof r);
    r.fd = fds[0];
    peer_add(&r.got, "", 0);
    old = stderr_to(fds[1]);
    close(fds[1]);
    if (pthread_create(&reading, NULL, read_all, &r)) abort();
    for (i = 0; i < 2; i++) {
        chaos_desc d;
        memset(&d, 0, sizeof d);
        peer_source_init(&talkers[i].s, FAIL_ALL);
        d.fetch = peer_fetch;
        d.fetch_user = &talkers[i].s;
        d.instance = i ? "second" : "first";
        talkers[i].c = chaos_open(&d, NULL);
    }
    for (i = 0; i < 4; i++)
        if (pthread_create(&threads[i], NULL, talk, &talkers[i % 2])) abort();
    for (i = 0; i < 4; i++) pthread_join(threads[i], NULL);
    for (i = 0; i < 2; i++) {
        chaos_report report = report_of(talkers[i].c);
        written += report.log_lines;
        dropped += report.log_dropped;
    }
    for (i = 0; i < 2; i++) chaos_close(talkers[i].c); /* meanwhile a few summaries more */
    stderr_back(old);                                  /* the last writer: the reader comes to its end */
    pthread_join(reading, NULL);
    close(fds[0]);
    for (p = r.got.data; *p; p = end + 1, count++) {
        end = strchr(p, '\n');
        if (!end) {
            bad++;
            break;
        }
        bad += !is_line(p, (size_t)(end - p) + 1);
    }
    CHECK_INT(bad, 0);
    check_where("%d lines read, %llu written, %llu dropped", count, written, dropped);
    CHECK(written > 100); /* the reader may be slower than the writers: those are the dropped ones */
    CHECK(count >= (int)written && count <= (int)written + 20);
    peer_free(&r.got);
}

int main(int argc, char **argv) {
    check_begin(argc, argv);
    peer_watchdog(120);
    unsetenv("CHAOS_CONFIG"); /* not the caller's */
    unsetenv("CHAOS_DISABLE");
    CHECK_RUN(case_first_line_tells_everything);
    CHECK_RUN(case_time_is_the_clocks);
    CHECK_RUN(case_changes_are_always_told);
    CHECK_RUN(case_failing_source_is_told_once);
    CHECK_RUN(case_fault_lines_agree_with_the_verdict);
    CHECK_RUN(case_fault_lines_all_sample_none);
    CHECK_RUN(case_books_balance_over_threads);
    CHECK_RUN(case_quiet_says_nothing);
    CHECK_RUN(case_heartbeat_once_a_minute_while_on);
    CHECK_RUN(case_events_tell_the_same);
    CHECK_RUN(case_full_log_pipe_delays_nobody);
    CHECK_RUN(case_full_log_socket_delays_nobody);
    CHECK_RUN(case_full_metrics_pipe_delays_nobody);
    CHECK_RUN(case_dead_log_pipe_kills_nobody);
    CHECK_RUN(case_pending_sigpipe_is_left_alone);
    CHECK_RUN(case_closed_stderr_is_no_trouble);
    CHECK_RUN(case_lines_never_interleave);
    return check_end();
}

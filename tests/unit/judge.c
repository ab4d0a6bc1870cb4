/* judge.c - chaos_judge: the pure decision. Counts over fixed seeds and keys, so every run sees the same numbers. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"
#include "../check.h"

enum { MANY = 200000 };

static chaos_config cfg;

/* ---- helpers ------------------------------------------------------------------------------------------------- */
/* Parses a config written with ' for ". */
static void config(const char *format, ...) {
    static char json[8192];
    chaos_error err;
    char *p;
    va_list args;
    va_start(args, format);
    vsnprintf(json, sizeof json, format, args);
    va_end(args);
    for (p = json; *p; p++)
        if (*p == '\'') *p = '"';
    if (chaos_config_parse(&cfg, json, strlen(json), &err)) CHECK_STR(err.text, json);
    check_where("%.200s", json);
}

/* Header lookup over a list "name\0value\0...\0", names in lower case as chaos_judge asks for them. */
static const char *find_header(void *user, const char *name, size_t *len) {
    const char *h = (const char *)user;
    for (; *h; h += strlen(h) + 1) {
        const char *value = h + strlen(h) + 1;
        if (!strcmp(h, name)) {
            *len = strlen(value);
            return value;
        }
        h = value;
    }
    return NULL;
}

static chaos_request request(const char *method, const char *path, const char *headers) {
    static char copy[512];
    chaos_request r;
    memset(&r, 0, sizeof r);
    r.method = method;
    r.path = path;
    if (headers) {
        size_t i;
        memset(copy, 0, sizeof copy);
        for (i = 0; headers[i] && i < sizeof copy - 2; i++) copy[i] = headers[i] == '|' ? '\0' : headers[i];
        r.header = find_header;
        r.user = copy;
    }
    return r;
}

static chaos_verdict judge(unsigned long long key) {
    chaos_request r = request("GET", "/", NULL);
    return chaos_judge(&cfg, &r, key);
}

/* True when the config (which must fail every request it touches) touches this one. */
static bool touches(const char *method, const char *path, const char *headers) {
    chaos_request r = request(method, path, headers);
    return chaos_judge(&cfg, &r, 1).kind != CHAOS_PASS;
}

/* Is `count` of `n` what a share of `percent` gives, by the 99.9 % binomial interval? In integers: (count - np)^2 <= 3.29^2 n p q. */
static bool plausible(long count, long n, double percent) {
    double p = percent / 100, d = (double)count - (double)n * p;
    return d * d <= 3.2905 * 3.2905 * (double)n * p * (1 - p);
}

static void check_share(long count, long n, double percent, int line) {
    char text[160];
    snprintf(text, sizeof text, "%ld of %ld is not %g %%", count, n, percent);
    check_that(plausible(count, n, percent), __FILE__, line, text);
}
#define CHECK_SHARE(count, n, percent) check_share(count, n, percent, __LINE__)

/* ---- rates --------------------------------------------------------------------------------------------------- */
static void case_zero_and_hundred(void) {
    long i, errors = 0, delays = 0;
    config("{'enabled':true,'errorRate':0,'latency':5,'latencyRate':0}");
    for (i = 0; i < MANY; i++) errors += judge((unsigned long long)i).kind != CHAOS_PASS;
    CHECK_INT(errors, 0);
    config("{'enabled':true,'errorRate':100}");
    for (i = 0; i < MANY; i++) errors += judge((unsigned long long)i).kind == CHAOS_STATUS;
    CHECK_INT(errors, MANY);
    config("{'enabled':true,'latency':5,'latencyRate':100}");
    for (i = 0; i < MANY; i++) delays += judge((unsigned long long)i).kind == CHAOS_DELAY;
    CHECK_INT(delays, MANY);
    /* Keys that are not small numbers, and other seeds. */
    config("{'enabled':true,'errorRate':100,'seed':987654321}");
    for (errors = i = 0; i < MANY; i++) errors += judge((unsigned long long)i * 0x9E3779B97F4A7C15ull).kind == CHAOS_STATUS;
    CHECK_INT(errors, MANY);
    config("{'enabled':true,'errorRate':0,'seed':987654321}");
    for (errors = i = 0; i < MANY; i++) errors += judge((unsigned long long)i * 0x9E3779B97F4A7C15ull).kind != CHAOS_PASS;
    CHECK_INT(errors, 0);
}

static void case_disabled_passes(void) {
    chaos_verdict v;
    config("{'enabled':false,'errorRate':100,'latency':500}");
    v = judge(1);
    CHECK_INT(v.kind, CHAOS_PASS);
    CHECK_INT(v.delay_us, 0);
    config("{'errorRate':100}");
    CHECK_INT(judge(1).kind, CHAOS_PASS);
}

static void case_shares(void) {
    static const int rates[] = {1, 5, 10, 20, 50, 80, 99}, seeds[] = {0, 1, 42, 1000003};
    size_t r, s;
    for (r = 0; r < 7; r++)
        for (s = 0; s < 4; s++) {
            long i, errors = 0, delays = 0;
            config("{'enabled':true,'errorRate':%d,'seed':%d}", rates[r], seeds[s]);
            for (i = 0; i < MANY / 4; i++) errors += judge((unsigned long long)i).kind == CHAOS_STATUS;
            CHECK_SHARE(errors, MANY / 4, rates[r]);
            config("{'enabled':true,'latency':7,'latencyRate':%d,'seed':%d}", rates[r], seeds[s]);
            for (i = 0; i < MANY / 4; i++) delays += judge((unsigned long long)i).kind == CHAOS_DELAY;
            CHECK_SHARE(delays, MANY / 4, rates[r]);
        }
}

/* Keys that differ in one bit only, high or low, still roll evenly. */
static void case_shares_of_structured_keys(void) {
    int shift;
    for (shift = 0; shift <= 48; shift += 8) {
        long i, errors = 0, both = 0;
        bool last = false;
        config("{'enabled':true,'errorRate':20,'seed':3}");
        for (i = 0; i < 50000; i++) {
            bool now = judge((unsigned long long)i << shift).kind == CHAOS_STATUS;
            errors += now;
            both += now && last;
            last = now;
        }
        check_where("keys << %d", shift);
        CHECK_SHARE(errors, 50000, 20);
        CHECK(both > 50000 * 4 / 100 - 250 && both < 50000 * 4 / 100 + 250); /* neighbours are independent: 4 % */
    }
}

/* The victims at rate r are victims at r + 1. */
static void case_nesting(void) {
    static unsigned char error_at[5000], delay_at[5000]; /* the first rate at which this key was a victim */
    int rate;
    long i;
    memset(error_at, 255, sizeof error_at);
    memset(delay_at, 255, sizeof delay_at);
    for (rate = 0; rate <= 100; rate++) {
        config("{'enabled':true,'errorRate':%d,'seed':5}", rate);
        for (i = 0; i < 5000; i++) {
            bool hit = judge((unsigned long long)i).kind == CHAOS_STATUS;
            if (hit && error_at[i] == 255) error_at[i] = (unsigned char)rate;
            CHECK_INT(hit, error_at[i] <= rate);
        }
        config("{'enabled':true,'latency':9,'latencyRate':%d,'seed':5}", rate);
        for (i = 0; i < 5000; i++) {
            bool hit = judge((unsigned long long)i).kind == CHAOS_DELAY;
            if (hit && delay_at[i] == 255) delay_at[i] = (unsigned char)rate;
            CHECK_INT(hit, delay_at[i] <= rate);
        }
    }
}

/* Raising errorRate never changes the delay of those that are still not failed. */
static void case_delay_does_not_move(void) {
    static unsigned before[5000];
    int rate;
    long i;
    for (rate = 0; rate <= 90; rate += 10) {
        config("{'enabled':true,'errorRate':%d,'latency':{'min':1,'max':900},'latencyRate':50,'seed':6}", rate);
        for (i = 0; i < 5000; i++) {
            chaos_verdict v = judge((unsigned long long)i);
            if (!rate) before[i] = v.delay_us;
            else if (v.kind != CHAOS_STATUS) CHECK_INT(v.delay_us, before[i]);
        }
    }
}

/* Error, latency, the drawn delay, and each rule roll on their own. */
static void case_independence(void) {
    long i, errors = 0, delays = 0, both = 0, a = 0, b = 0, high = 0, spread = 0;
    config("{'enabled':true,'errorRate':50,'latency':5,'latencyRate':50,'seed':11}");
    for (i = 0; i < MANY; i++) {
        int kind = judge((unsigned long long)i).kind;
        errors += kind == CHAOS_STATUS;
        delays += kind == CHAOS_DELAY;
    }
    CHECK_SHARE(errors, MANY, 50);
    CHECK_SHARE(delays, MANY - errors, 50); /* a shared roll would give 0 or all of them */
    /* Whether, and how long: among the delayed, half lie above the middle. */
    config("{'enabled':true,'latency':{'min':0,'max':1000},'latencyRate':20,'seed':11}");
    for (delays = i = 0; i < MANY; i++) {
        chaos_verdict v = judge((unsigned long long)i);
        delays += v.kind == CHAOS_DELAY;
        high += v.kind == CHAOS_DELAY && v.delay_us > 500000;
    }
    CHECK_SHARE(high, delays, 50);
    config(
        "{'enabled':true,'errorRate':50,'seed':11,'rules':[{'name':'a','match':{'paths':['/a']}},{'name':'b','match':{'paths':['/b']}}]}");
    for (i = 0; i < MANY; i++) {
        chaos_request ra = request("GET", "/a", NULL), rb = request("GET", "/b", NULL);
        bool hit_a = chaos_judge(&cfg, &ra, (unsigned long long)i).kind == CHAOS_STATUS;
        bool hit_b = chaos_judge(&cfg, &rb, (unsigned long long)i).kind == CHAOS_STATUS;
        a += hit_a;
        b += hit_b;
        both += hit_a && hit_b;
    }
    CHECK_SHARE(a, MANY, 50);
    CHECK_SHARE(b, MANY, 50);
    CHECK_SHARE(both, MANY, 25);
    /* Two seeds are two draws. */
    for (i = 0; i < 2000; i++) {
        config("{'enabled':true,'errorRate':50,'seed':1}");
        errors = judge((unsigned long long)i).kind;
        config("{'enabled':true,'errorRate':50,'seed':2}");
        spread += judge((unsigned long long)i).kind == errors;
    }
    CHECK_SHARE(spread, 2000, 50);
}

/* A rule rolls by its name: moving it, or adding one before it, changes no verdict. */
static void case_rule_rolls_by_name(void) {
    static unsigned char first[5000];
    int round;
    long i;
    for (round = 0; round < 2; round++) {
        config("{'enabled':true,'errorRate':30,'seed':4,'rules':[%s{'name':'b','match':{'paths':['/b']}}]}",
               round ? "{'name':'a','match':{'paths':['/a']}}," : "");
        for (i = 0; i < 5000; i++) {
            chaos_request r = request("GET", "/b", NULL);
            chaos_verdict v = chaos_judge(&cfg, &r, (unsigned long long)i);
            if (!round) first[i] = v.kind;
            CHECK_INT(v.kind, first[i]);
            CHECK_INT(v.rule, round + 1);
        }
    }
}

/* ---- the verdict --------------------------------------------------------------------------------------------- */
static void case_error_short_circuits(void) {
    long i;
    config("{'enabled':true,'errorRate':50,'latency':250,'errorStatus':429,'seed':1}");
    for (i = 0; i < 2000; i++) {
        chaos_verdict v = judge((unsigned long long)i);
        CHECK_INT(v.rule, 0);
        CHECK_INT(v.key, i);
        CHECK(v.roll < 10000);
        CHECK_INT(v.kind == CHAOS_STATUS, v.roll < 5000); /* the threshold rule */
        CHECK_INT(v.delay_us, v.kind == CHAOS_STATUS ? 0 : 250000);
        if (v.kind == CHAOS_STATUS) CHECK_INT(v.status, 429);
        else CHECK_INT(v.kind, CHAOS_DELAY);
        CHECK_INT(v.ticket, 0);
    }
    CHECK_INT(sizeof(chaos_verdict) <= 32, 1);
}

static void case_modes(void) {
    static const struct {
        const char *name;
        int kind;
    } modes[] = {{"status", CHAOS_STATUS}, {"reset", CHAOS_RESET},       {"close", CHAOS_CLOSE},
                 {"hang", CHAOS_HANG},     {"truncate", CHAOS_TRUNCATE}, {"corrupt", CHAOS_CORRUPT}};
    size_t i;
    for (i = 0; i < 6; i++) {
        char json[80];
        snprintf(json, sizeof json, "{\"enabled\":true,\"errorRate\":100,\"errorMode\":\"%s\"}", modes[i].name);
        if (chaos_config_parse(&cfg, json, strlen(json), NULL)) continue; /* not in this version: config.c says which */
        check_where("%s", json);
        CHECK_INT(judge(9).kind, modes[i].kind);
        CHECK_STR(chaos_kind_text(modes[i].kind), i ? modes[i].name : "error");
    }
    CHECK_STR(chaos_kind_text(CHAOS_PASS), "pass");
    CHECK_STR(chaos_kind_text(CHAOS_DELAY), "latency");
    CHECK(chaos_kind_text(-1) != NULL && chaos_kind_text(CHAOS_KIND_COUNT) != NULL && chaos_kind_text(1000) != NULL);
}

static void case_repeatable(void) {
    static chaos_config copy;
    long i;
    config("{'enabled':true,'errorRate':30,'latency':{'mean':100,'max':2000},'seed':8}");
    copy = cfg; /* plain data: a copy decides the same */
    for (i = 0; i < 20000; i++) {
        chaos_request r = request("GET", "/", NULL);
        chaos_verdict v = judge((unsigned long long)i), w = chaos_judge(&copy, &r, (unsigned long long)i);
        CHECK(v.kind == w.kind && v.delay_us == w.delay_us && v.roll == w.roll && v.status == w.status);
    }
}

/* What does not belong to the roll does not move it: the path, the method, the headers, names and owners. */
static void case_only_seed_rule_and_key_roll(void) {
    long i;
    static chaos_config other;
    config("{'enabled':true,'errorRate':40,'seed':8,'name':'x','owner':'y','canary':3,'maxFaults':1}");
    other = cfg;
    config("{'enabled':true,'errorRate':40,'seed':8}");
    for (i = 0; i < 2000; i++) {
        chaos_request r = request("POST", "/some/where?q=1", "a|b|");
        CHECK_INT(chaos_judge(&other, &r, (unsigned long long)i).roll, judge((unsigned long long)i).roll);
    }
}

static void case_null_arguments(void) {
    chaos_request r = request(NULL, NULL, NULL);
    config("{'enabled':true,'errorRate':100}");
    CHECK_INT(chaos_judge(&cfg, &r, 1).kind, CHAOS_STATUS); /* nothing known of the request: everything matches all */
    CHECK_INT(chaos_judge(&cfg, NULL, 1).kind, CHAOS_STATUS);
    config("{'enabled':true,'errorRate':100,'match':{'paths':['/**']}}");
    CHECK_INT(chaos_judge(&cfg, &r, 1).kind, CHAOS_PASS); /* not known is not a match */
    config("{'enabled':true,'errorRate':100,'match':{'methods':['GET']}}");
    CHECK_INT(chaos_judge(&cfg, &r, 1).kind, CHAOS_PASS);
    config("{'enabled':true,'errorRate':100,'match':{'headers':{'x':'*'}}}");
    CHECK_INT(chaos_judge(&cfg, &r, 1).kind, CHAOS_PASS);
}

/* Lengths count, where given: the bytes behind them are not the request's. */
static void case_lengths(void) {
    chaos_request r = request("GETxxx", "/a/xxxxx", NULL);
    r.method_len = 3;
    r.path_len = 2;
    config("{'enabled':true,'errorRate':100,'match':{'methods':['GET'],'paths':['/a']}}");
    CHECK_INT(chaos_judge(&cfg, &r, 1).kind, CHAOS_STATUS);
    r.path_len = 3;
    CHECK_INT(chaos_judge(&cfg, &r, 1).kind, CHAOS_PASS);
}

/* ---- rules and matches ---------------------------------------------------------------------------------------- */
static void case_first_rule_wins(void) {
    chaos_request r;
    chaos_verdict v;
    config("{'enabled':true,'errorRate':100,'errorStatus':500,'rules':["
           "{'name':'one','match':{'paths':['/a/*']},'errorStatus':501},"
           "{'name':'two','match':{'paths':['/a/**']},'errorStatus':502},"
           "{'name':'three','match':{'methods':['POST']},'latency':9,'errorRate':0}]}");
    r = request("GET", "/a/b", NULL);
    v = chaos_judge(&cfg, &r, 1);
    CHECK_INT(v.status, 501);
    CHECK_INT(v.rule, 1);
    r = request("POST", "/a/b/c", NULL);
    v = chaos_judge(&cfg, &r, 1);
    CHECK_INT(v.status, 502);
    CHECK_INT(v.rule, 2);
    r = request("POST", "/z", NULL);
    v = chaos_judge(&cfg, &r, 1);
    CHECK_INT(v.kind, CHAOS_DELAY);
    CHECK_INT(v.rule, 3);
    r = request("GET", "/z", NULL);
    CHECK_INT(chaos_judge(&cfg, &r, 1).kind, CHAOS_PASS); /* no rule: passes, whatever the top level says */
    /* A matching rule without a fault decides, too: it shields. */
    config("{'enabled':true,'rules':[{'name':'shield','match':{'paths':['/a']}},{'name':'all','errorRate':100}]}");
    CHECK(!touches("GET", "/a", NULL));
    CHECK(touches("GET", "/b", NULL));
}

static void case_top_match_and_rule_match(void) {
    config("{'enabled':true,'errorRate':100,'match':{'methods':['POST']},'rules':[{'name':'a','match':{'paths':['/a']}}]}");
    CHECK(touches("POST", "/a", NULL));
    CHECK(!touches("GET", "/a", NULL));
    CHECK(!touches("POST", "/b", NULL));
    config("{'enabled':true,'errorRate':100,'rules':[]}"); /* present, and none matches */
    CHECK(touches("GET", "/a", NULL) == (cfg.rule_count == 0 && touches("GET", "/b", NULL)));
}

static const struct {
    const char *glob, *path;
    bool match;
} paths[] = {
    {"/a", "/a", true},
    {"/a", "/ab", false},
    {"/a", "/a/", false},
    {"/a/", "/a", false},
    {"/*", "/", true},
    {"/*", "/a", true},
    {"/*", "/a/b", false},
    {"/**", "/", true},
    {"/**", "/a/b/c", true},
    {"/a/*", "/a/b", true},
    {"/a/*", "/a/", true},
    {"/a/*", "/a", false},
    {"/a/*", "/a/b/c", false},
    {"/a/**", "/a/b/c", true},
    {"/a/**", "/a/", true},
    {"/a/**", "/ab", false},
    {"/a/*/c", "/a/b/c", true},
    {"/a/*/c", "/a/b/b/c", false},
    {"/a/**/c", "/a/b/b/c", true},
    {"/a/**c", "/a/b/xc", true},
    {"/a*", "/abc", true},
    {"/a*c", "/abc", true},
    {"/a*c", "/ab/c", false},
    {"/a**c", "/ab/c", true},
    {"/*a*b*", "/xxaxxbxx", true},
    {"/*a*b*", "/xxbxxaxx", false},
    {"**", "/a/b", true},
    {"/A", "/a", false},
    {"/a", "/A", false}, /* paths are case-sensitive */
    {"/a", "/a?b", true},
    {"/a", "/a?b=/c", true},
    {"/a", "/?/a", false},
    {"/*", "/a?b/c", true},
    {"/*b", "/a?b", false}, /* the query is not matched */
    {"/abc", "/%61b%63", true},
    {"/a b", "/a%20b", true},
    {"/\xC3\xA9", "/%C3%A9", true},
    {"/\xC3\xA9", "/%c3%a9", true},
    {"/a%b", "/a%25b", true},
    {"/a?b", "/a%3Fb", true},
    {"/a%", "/a%", true},
    {"/a%zz", "/a%zz", true},
    {"/a%4", "/a%4", true},
    {"/health*", "/healthz", true},
    {"/health*", "/health/live", false},
    {"/**/", "/a/b/", true},
    {"/**/", "/a/b", false},
    {"", "/", false},
    {"/*.js", "/x.js", true},
    {"/*.js", "/d/x.js", false},
    {"/**.js", "/d/x.js", true},
    {"/***", "/a/b", true},
    {"/a", "", false},
    {"/[a]", "/a", false},
    {"/[a]", "/[a]", true},
    {"/a.c", "/abc", false},
    {"/\\a", "/a", false},
};

static void case_path_globs(void) {
    size_t i;
    for (i = 0; i < sizeof paths / sizeof paths[0]; i++) {
        char json[200], *s;
        snprintf(json, sizeof json, "{\"enabled\":true,\"errorRate\":100,\"exclude\":[],\"match\":{\"paths\":[\"");
        s = json + strlen(json);
        {
            const char *g;
            for (g = paths[i].glob; *g; g++) {
                if (*g == '\\') *s++ = '\\';
                *s++ = *g;
            }
        }
        strcpy(s, "\"]}}");
        if (!paths[i].glob[0] && chaos_config_parse(&cfg, json, strlen(json), NULL)) continue; /* an empty glob may be refused */
        CHECK_INT(chaos_config_parse(&cfg, json, strlen(json), NULL), CHAOS_OK);
        check_where("glob \"%s\", path \"%s\"", paths[i].glob, paths[i].path);
        CHECK_INT(touches("GET", paths[i].path, NULL), paths[i].match);
    }
    config("{'enabled':true,'errorRate':100,'match':{'paths':['/x','/y/*']}}"); /* a list: any of them */
    CHECK(touches("GET", "/x", NULL) && touches("GET", "/y/1", NULL) && !touches("GET", "/z", NULL));
}

/* A glob that backtracks badly must not hang the request: exponential backtracking over 40 stars would never end. */
static void case_glob_cost(void) {
    static char path[1000], json[400];
    size_t i;
    memset(path, 'a', sizeof path);
    path[0] = '/';
    path[sizeof path - 1] = 0;
    strcpy(json, "{\"enabled\":true,\"errorRate\":100,\"match\":{\"paths\":[\"/");
    for (i = 0; i < 40; i++) strcat(json, "*a");
    strcat(json, "b\",\"/");
    for (i = 0; i < 40; i++) strcat(json, "**a");
    strcat(json, "b\"]}}");
    CHECK_INT(chaos_config_parse(&cfg, json, strlen(json), NULL), CHAOS_OK);
    for (i = 0; i < 20; i++) CHECK(!touches("GET", path, NULL));
    path[sizeof path - 2] = 'b';
    CHECK(touches("GET", path, NULL));
}

/* Paths over 1,024 bytes (without the query) are never touched. */
static void case_long_paths(void) {
    static char path[3000];
    memset(path, 'a', sizeof path - 1);
    path[0] = '/';
    path[1024] = '?';
    config("{'enabled':true,'errorRate':100}");
    CHECK(touches("GET", path, NULL));
    path[1024] = 'a';
    path[1025] = '?';
    CHECK(!touches("GET", path, NULL));
    config("{'enabled':true,'errorRate':100,'exclude':[],'match':{'paths':['/**']}}");
    CHECK(!touches("GET", path, NULL));
    path[1024] = 0;
    path[1] = '%';
    CHECK(touches("GET", path, NULL)); /* a % that stands for itself, to the last byte */
    memset(path + 1, '%', 1023);
    CHECK(touches("GET", path, NULL));
}

static void case_methods(void) {
    config("{'enabled':true,'errorRate':100,'match':{'methods':['POST','PURGE']}}");
    CHECK(touches("POST", "/", NULL) && touches("PURGE", "/", NULL));
    CHECK(!touches("GET", "/", NULL) && !touches("POS", "/", NULL) && !touches("POSTS", "/", NULL) && !touches("post", "/", NULL));
}

static void case_headers(void) {
    config("{'enabled':true,'errorRate':100,'match':{'headers':{'X-Tenant':'acme-*','accept':'*/json'}}}");
    CHECK(touches("GET", "/", "x-tenant|acme-1|accept|application/json|"));
    CHECK(touches("GET", "/", "x-tenant|acme-a/b/c|accept|a/b/json|")); /* * crosses / here */
    CHECK(!touches("GET", "/", "x-tenant|acme-1|"));                    /* AND-ed */
    CHECK(!touches("GET", "/", "x-tenant|other|accept|application/json|"));
    CHECK(!touches("GET", "/", "x-tenant|ACME-1|accept|application/json|")); /* values are case-sensitive */
    CHECK(!touches("GET", "/", NULL));
    config("{'enabled':true,'errorRate':100,'match':{'headers':{'X-A':'*'}}}");
    CHECK(touches("GET", "/", "x-a||")); /* there, though empty */
    CHECK(!touches("GET", "/", "x-b|1|"));
    config("{'enabled':true,'errorRate':100,'match':{'methods':['GET'],'paths':['/a'],'headers':{'x':'1'}}}");
    CHECK(touches("GET", "/a", "x|1|"));
    CHECK(!touches("PUT", "/a", "x|1|") && !touches("GET", "/b", "x|1|") && !touches("GET", "/a", "x|2|"));
}

/* ---- exclude --------------------------------------------------------------------------------------------------- */
static const struct {
    const char *path, *agent;
} spared[] = {
    {"/health", NULL},
    {"/healthz", NULL},
    {"/health-check", NULL},
    {"/livez", NULL},
    {"/readyz", NULL},
    {"/ping", NULL},
    {"/healthz?full=1", NULL},
    {"/%68ealthz", NULL},
    {"/x", "user-agent|ELB-HealthChecker/2.0|"},
    {"/x", "user-agent|kube-probe/1.29|"},
    {"/x", "user-agent|Amazon-Route53-Health-Check-Service (ref 1; report http://amzn.to/1vsZADi)|"},
};
static const struct {
    const char *path, *agent;
} not_spared[] = {
    {"/", NULL},
    {"/health/live", NULL},
    {"/api/healthz", NULL},
    {"/pingu", NULL},
    {"/livezz", NULL},
    {"/x", "user-agent|curl/8.0|"},
    {"/x", "user-agent|my kube-probe/1|"},
    {"/x", "agent|kube-probe/1|"},
};

static void case_default_exclude(void) {
    static const char *const faults[] = {"'errorRate':100", "'latency':50", "'errorRate':50,'latency':50,'seed':3",
                                         "'rules':[{'name':'a','errorRate':100}]"};
    size_t f, i;
    for (f = 0; f < 4; f++) {
        config("{'enabled':true,%s}", faults[f]);
        for (i = 0; i < sizeof spared / sizeof spared[0]; i++) CHECK(!touches("GET", spared[i].path, spared[i].agent));
        for (i = 0; i < sizeof not_spared / sizeof not_spared[0]; i++) CHECK(touches("GET", not_spared[i].path, not_spared[i].agent));
        config("{'enabled':true,'exclude':[],%s}", faults[f]); /* switched off, User-Agents too */
        for (i = 0; i < sizeof spared / sizeof spared[0]; i++) CHECK(touches("GET", spared[i].path, spared[i].agent));
    }
}

static void case_own_exclude(void) {
    config("{'enabled':true,'errorRate':100,'exclude':['/admin/**','/x']}");
    CHECK(!touches("GET", "/admin/a/b", NULL) && !touches("GET", "/x", NULL) && !touches("GET", "/x?y", NULL));
    CHECK(touches("GET", "/healthz", NULL) && touches("GET", "/admin", NULL)); /* the list replaces the built-in one */
    CHECK(touches("GET", "/", "user-agent|kube-probe/1.29|"));
}

/* ---- delays ---------------------------------------------------------------------------------------------------- */
static void case_fixed(void) {
    long i;
    config("{'enabled':true,'latency':123}");
    for (i = 0; i < 1000; i++) CHECK_INT(judge((unsigned long long)i).delay_us, 123000);
    config("{'enabled':true,'latency':900000}");
    CHECK_INT(judge(1).delay_us, 900000000); /* 15 minutes fit */
    config("{'enabled':true,'latency':0}");
    CHECK_INT(judge(1).kind, CHAOS_PASS);
}

static void case_uniform(void) {
    long i, tenth[10] = {0};
    unsigned low = 0xFFFFFFFFu, high = 0;
    config("{'enabled':true,'latency':{'min':100,'max':200},'seed':3}");
    for (i = 0; i < MANY; i++) {
        unsigned us = judge((unsigned long long)i).delay_us;
        if (us < low) low = us;
        if (us > high) high = us;
        if (us >= 100000 && us <= 200000) tenth[us == 200000 ? 9 : (us - 100000) / 10000]++;
    }
    CHECK(low >= 100000 && low < 100100);
    CHECK(high <= 200000 && high > 199900);
    for (i = 0; i < 10; i++) CHECK_SHARE(tenth[i], MANY, 10);
    config("{'enabled':true,'latency':{'min':70,'max':70}}");
    for (i = 0; i < 1000; i++) CHECK_INT(judge((unsigned long long)i).delay_us, 70000);
    config("{'enabled':true,'latency':{'min':0,'max':900000}}"); /* no overflow at the widest */
    for (i = 0; i < 10000; i++) CHECK(judge((unsigned long long)i).delay_us <= 900000000u);
}

static void case_exponential(void) {
    static const unsigned means[] = {1, 20, 100, 3000};
    size_t m;
    for (m = 0; m < 4; m++) {
        unsigned long long sum = 0, mean_us = means[m] * 1000ull;
        long i, above = 0, above3 = 0;
        config("{'enabled':true,'latency':{'mean':%u,'max':%u},'seed':3}", means[m], means[m] * 100);
        for (i = 0; i < MANY; i++) {
            unsigned us = judge((unsigned long long)i).delay_us;
            sum += us;
            above += us > mean_us;
            above3 += us > 3 * mean_us;
            CHECK(us <= means[m] * 100000u);
        }
        CHECK(sum > MANY * mean_us * 98 / 100 && sum < MANY * mean_us * 102 / 100);
        CHECK_SHARE(above, MANY, 36.788);  /* e^-1 */
        CHECK_SHARE(above3, MANY, 4.9787); /* e^-3 */
    }
    config("{'enabled':true,'latency':{'mean':100,'max':150},'seed':3}"); /* a near cap holds */
    {
        long i;
        unsigned high = 0;
        for (i = 0; i < MANY; i++) {
            unsigned us = judge((unsigned long long)i).delay_us;
            if (us > high) high = us;
        }
        CHECK(high <= 150000 && high > 149000);
    }
    config("{'enabled':true,'latency':{'mean':900000,'max':900000}}");
    {
        long i;
        for (i = 0; i < 10000; i++) CHECK(judge((unsigned long long)i).delay_us <= 900000000u);
    }
}

static void case_quantiles(void) {
    long i, p50 = 0, p95 = 0, p99 = 0, middle = 0;
    unsigned high = 0;
    config("{'enabled':true,'latency':{'p50':100,'p95':500,'p99':1000,'max':2000},'seed':3}");
    for (i = 0; i < MANY; i++) {
        unsigned us = judge((unsigned long long)i).delay_us;
        p50 += us < 100000;
        p95 += us < 500000;
        p99 += us < 1000000;
        middle += us >= 100000 && us < 300000; /* half way between p50 and p95 */
        if (us > high) high = us;
    }
    CHECK_SHARE(p50, MANY, 50);
    CHECK_SHARE(p95, MANY, 95);
    CHECK_SHARE(p99, MANY, 99);
    CHECK_SHARE(middle, MANY, 22.5);
    CHECK(high <= 2000000 && high > 1980000);
    config("{'enabled':true,'latency':{'p50':40,'p95':40,'p99':40,'max':40}}");
    for (i = 0; i < 10000; i++) CHECK(judge((unsigned long long)i).delay_us <= 40000);
}

/* A delay of 0 is no fault: it is not marked, logged or counted as one. */
static void case_zero_delay(void) {
    long i;
    config("{'enabled':true,'latency':{'p50':0,'p95':0,'p99':10,'max':10},'seed':3}");
    for (i = 0; i < 10000; i++) {
        chaos_verdict v = judge((unsigned long long)i);
        CHECK_INT(v.kind == CHAOS_DELAY, v.delay_us > 0);
    }
}

int main(int argc, char **argv) {
    check_begin(argc, argv);
    CHECK_RUN(case_zero_and_hundred);
    CHECK_RUN(case_disabled_passes);
    CHECK_RUN(case_shares);
    CHECK_RUN(case_shares_of_structured_keys);
    CHECK_RUN(case_nesting);
    CHECK_RUN(case_delay_does_not_move);
    CHECK_RUN(case_independence);
    CHECK_RUN(case_rule_rolls_by_name);
    CHECK_RUN(case_error_short_circuits);
    CHECK_RUN(case_modes);
    CHECK_RUN(case_repeatable);
    CHECK_RUN(case_only_seed_rule_and_key_roll);
    CHECK_RUN(case_null_arguments);
    CHECK_RUN(case_lengths);
    CHECK_RUN(case_first_rule_wins);
    CHECK_RUN(case_top_match_and_rule_match);
    CHECK_RUN(case_path_globs);
    CHECK_RUN(case_glob_cost);
    CHECK_RUN(case_long_paths);
    CHECK_RUN(case_methods);
    CHECK_RUN(case_headers);
    CHECK_RUN(case_default_exclude);
    CHECK_RUN(case_own_exclude);
    CHECK_RUN(case_fixed);
    CHECK_RUN(case_uniform);
    CHECK_RUN(case_exponential);
    CHECK_RUN(case_quantiles);
    CHECK_RUN(case_zero_delay);
    return check_end();
}

/* config.c - chaos_config_parse and chaos_config_format: every row of the config table, and the way back. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"
#include "../check.h"

/* What is in the contract but may not be enforced by any mode yet: flip `parses` when a mode enforces it. */
static const struct {
    const char *json;
    bool parses;
} later[] = {
    {"{\"errorMode\":\"status\"}", true},
    {"{\"errorMode\":\"reset\"}", true},
    {"{\"errorMode\":\"close\"}", true},
    {"{\"errorMode\":\"hang\"}", true},
    {"{\"errorMode\":\"truncate\"}", true},
    {"{\"errorMode\":\"corrupt\"}", true},
    {"{\"errorWhen\":\"before\"}", true},
    {"{\"errorWhen\":\"after\"}", true},
    {"{\"bandwidth\":0}", true},
    {"{\"bandwidth\":64}", true},
    {"{\"events\":[\"http\",\"direct\"]}", true},
    {"{\"events\":[\"sqs\"]}", true},
    {"{\"events\":[]}", true},
    {"{\"guard\":{}}", false},
};
enum { LATER_FAULT_KEYS = 10 }; /* the first rows may stand in a rule, too */

static chaos_config cfg, cfg2;
static chaos_error error;

/* ---- helpers ------------------------------------------------------------------------------------------------- */
static bool same_text(const chaos_config *a, chaos_text x, const chaos_config *b, chaos_text y) {
    return x.len == y.len && !memcmp(a->text + x.at, b->text + y.at, x.len);
}

static bool same_list(const chaos_config *a, chaos_list x, const chaos_config *b, chaos_list y) {
    unsigned i;
    if (x.count != y.count) return false;
    for (i = 0; i < x.count; i++)
        if (!same_text(a, a->items[x.first + i], b, b->items[y.first + i])) return false;
    return true;
}

static bool same_match(const chaos_config *a, const chaos_match *x, const chaos_config *b, const chaos_match *y) {
    return same_list(a, x->methods, b, y->methods) && same_list(a, x->paths, b, y->paths) && same_list(a, x->headers, b, y->headers);
}

static bool same_fault(const chaos_config *a, const chaos_fault *x, const chaos_config *b, const chaos_fault *y) {
    return x->latency_kind == y->latency_kind && x->latency_rate == y->latency_rate && x->error_rate == y->error_rate &&
           x->error_mode == y->error_mode && x->error_after == y->error_after && x->error_status == y->error_status &&
           !memcmp(x->latency, y->latency, sizeof x->latency) && x->bandwidth == y->bandwidth && x->retry_after == y->retry_after &&
           same_text(a, x->error_body, b, y->error_body);
}

/* Equal in meaning: the text pools may be laid out differently. */
static bool same_config(const chaos_config *a, const chaos_config *b) {
    unsigned i;
    if (a->enabled != b->enabled || a->dry_run != b->dry_run || a->has_seed != b->has_seed) return false;
    if (a->default_exclude != b->default_exclude || a->canary != b->canary || a->rule_count != b->rule_count) return false;
    if (a->max_faults != b->max_faults || a->max_concurrent != b->max_concurrent) return false;
    if (a->expires_ms != b->expires_ms || (a->has_seed && a->seed != b->seed)) return false;
    if (!same_fault(a, &a->fault, b, &b->fault) || !same_match(a, &a->match, b, &b->match)) return false;
    if (!same_list(a, a->exclude, b, b->exclude) || !same_list(a, a->instances, b, b->instances)) return false;
    if (!same_text(a, a->name, b, b->name) || !same_text(a, a->owner, b, b->owner)) return false;
    if (!same_text(a, a->note, b, b->note)) return false;
    for (i = 0; i < a->rule_count; i++) {
        const chaos_rule *x = &a->rules[i], *y = &b->rules[i];
        if (!same_text(a, x->name, b, y->name) || !same_match(a, &x->match, b, &y->match)) return false;
        if (!same_fault(a, &x->fault, b, &y->fault)) return false;
    }
    return true;
}

static bool holds(const char *text, const char *word) {
    size_t len = strlen(word);
    for (; *text; text++)
        if (!strncmp(text, word, len)) return true;
    return false;
}

/* Parses into cfg; the text's end is checked by json.c, so a plain copy does here. */
static chaos_result parse_len(const char *json, size_t len) {
    memset(&cfg, 0xAA, sizeof cfg); /* what an error leaves must come from the parser */
    memset(&error, 0xAA, sizeof error);
    return chaos_config_parse(&cfg, json, len, &error);
}

static chaos_result parse(const char *json) { return parse_len(json, strlen(json)); }

/* Accepted, and what chaos_config_format writes means the same and is stable. */
static void good(const char *json) {
    static char once[CHAOS_CONFIG_INPUT_MAX * 2], twice[sizeof once];
    size_t len;
    check_where("%.200s", json);
    if (parse(json)) {
        CHECK_STR(error.text, "accepted");
        return;
    }
    len = chaos_config_format(&cfg, once, sizeof once);
    CHECK(len < sizeof once);
    CHECK_INT(strlen(once), len);
    CHECK_INT(chaos_json_check(once, len, NULL), CHAOS_OK);
    CHECK(!strncmp(once, "{\"enabled\":", 11) || !strncmp(once, "{ \"enabled\":", 12));
    if (chaos_config_parse(&cfg2, once, len, &error)) {
        CHECK_STR(error.text, once);
        return;
    }
    CHECK(same_config(&cfg, &cfg2));
    chaos_config_format(&cfg2, twice, sizeof twice);
    CHECK_STR(twice, once);
}

/* Refused with this code and these words; the place is inside the text and what is left is off. */
static void bad(const char *json, chaos_result code, const char *word, const char *word2) {
    check_where("%.200s", json);
    CHECK_INT(parse(json), code);
    CHECK_INT(error.code, code);
    CHECK(!cfg.enabled);
    CHECK_INT(cfg.rule_count, 0);
    if (!code) return;
    CHECK(error.offset <= strlen(json) && error.line >= 1 && error.column >= 1);
    CHECK(memchr(error.text, 0, sizeof error.text) != NULL);
    if (!holds(error.text, word)) CHECK_STR(error.text, word);
    if (!holds(error.text, word2)) CHECK_STR(error.text, word2);
    CHECK_INT(chaos_config_parse(&cfg2, json, strlen(json), NULL), code); /* err may be NULL */
    CHECK(!cfg2.enabled);
}

/* Replaces each ' by ", so that the JSON in this file can be read. Four results live at once. */
static const char *q(const char *format, ...) {
    static char buf[4][8192];
    static int turn;
    char *s = buf[turn = (turn + 1) & 3], *p;
    va_list args;
    va_start(args, format);
    vsnprintf(s, sizeof buf[0], format, args);
    va_end(args);
    for (p = s; *p; p++)
        if (*p == '\'') *p = '"';
    return s;
}

/* ---- the table ----------------------------------------------------------------------------------------------- */
static const struct row {
    const char *key;
    long long low, high;
    bool in_rule;
} numbers[] = {
    {"latency", 0, 900000, true},        {"latencyRate", 0, 100, true},
    {"errorRate", 0, 100, true},         {"errorStatus", 200, 599, true},
    {"retryAfter", 0, 86400, true},      {"canary", 0, 100, false},
    {"maxFaults", 0, 4294967295, false}, {"maxConcurrent", 0, CHAOS_MAX_CONCURRENT, false},
};
static const char *const booleans[] = {"enabled", "dryRun"};
static const struct {
    const char *key;
    int max;
    bool in_rule;
} strings[] = {{"errorBody", 1024, true}, {"name", 64, false}, {"owner", 64, false}, {"note", 256, false}};
static const char *const lists[] = {"exclude", "instances", "rules"};

static void case_defaults(void) {
    static const char *const texts[] = {"{}", " { } ", "{\"enabled\":false}"};
    size_t i;
    for (i = 0; i < 3; i++) {
        good(texts[i]);
        CHECK(!cfg.enabled && !cfg.dry_run && !cfg.has_seed && cfg.default_exclude);
        CHECK_INT(cfg.canary, 100);
        CHECK_INT(cfg.fault.latency_kind, CHAOS_LATENCY_FIXED);
        CHECK_INT(cfg.fault.latency[0], 0);
        CHECK_INT(cfg.fault.latency_rate, 100);
        CHECK_INT(cfg.fault.error_rate, 0);
        CHECK_INT(cfg.fault.error_status, 503);
        CHECK_INT(cfg.fault.error_mode, CHAOS_STATUS);
        CHECK_INT(cfg.fault.error_after, 0);
        CHECK_INT(cfg.fault.bandwidth, 0);
        CHECK_INT(cfg.fault.retry_after, -1);
        CHECK_INT(cfg.fault.error_body.len, 0);
        CHECK_INT(cfg.max_faults, 0);
        CHECK_INT(cfg.max_concurrent, 0);
        CHECK_INT(cfg.expires_ms, 0);
        CHECK_INT(cfg.rule_count, 0);
    }
    good("{ \"enabled\": true, \"latency\": 200, \"errorRate\": 5, \"errorStatus\": 503 }");
    CHECK(cfg.enabled);
    CHECK_INT(cfg.fault.latency[0], 200);
    CHECK_INT(cfg.fault.error_rate, 5);
}

/* One integer key at the top level or in a rule: both bounds, one beyond each, and every wrong type. */
static void check_number(const struct row *n, const char *before, const char *after) {
    static const char *const wrong[] = {"'5'", "true", "null", "[]", "[5]"};
    size_t i;
    good(q("%s'%s':%lld%s", before, n->key, n->low, after));
    good(q("%s'%s':%lld%s", before, n->key, n->high, after));
    good(q("%s'%s':%lld%s", before, n->key, n->low + 1, after));
    bad(q("%s'%s':%lld%s", before, n->key, n->low - 1, after), CHAOS_ERR_RANGE, n->key, "");
    bad(q("%s'%s':%lld%s", before, n->key, n->high + 1, after), CHAOS_ERR_RANGE, n->key, "");
    bad(q("%s'%s':99999999999999999999999999%s", before, n->key, after), CHAOS_ERR_RANGE, n->key, "");
    bad(q("%s'%s':-99999999999999999999999999%s", before, n->key, after), CHAOS_ERR_RANGE, n->key, "");
    bad(q("%s'%s':18446744073709551617%s", before, n->key, after), CHAOS_ERR_RANGE, n->key, ""); /* 2^64 + 1 */
    bad(q("%s'%s':4294967297%s", before, n->key, after), CHAOS_ERR_RANGE, n->key, "");           /* 2^32 + 1 */
    bad(q("%s'%s':5.0%s", before, n->key, after), CHAOS_ERR_TYPE, n->key, "write 5");
    bad(q("%s'%s':250.00%s", before, n->key, after), CHAOS_ERR_TYPE, n->key, "write 250");
    bad(q("%s'%s':5.5%s", before, n->key, after), CHAOS_ERR_TYPE, n->key, "");
    bad(q("%s'%s':5e1%s", before, n->key, after), CHAOS_ERR_TYPE, n->key, "");
    for (i = 0; i < sizeof wrong / sizeof wrong[0]; i++) bad(q("%s'%s':%s%s", before, n->key, wrong[i], after), CHAOS_ERR_TYPE, n->key, "");
    if (strcmp(n->key, "latency")) bad(q("%s'%s':{}%s", before, n->key, after), CHAOS_ERR_TYPE, n->key, "");
    bad(q("%s'%s':%lld,'%s':%lld%s", before, n->key, n->low, n->key, n->low, after), CHAOS_ERR_DUPLICATE_KEY, n->key, "");
}

static void case_numbers(void) {
    size_t i;
    for (i = 0; i < sizeof numbers / sizeof numbers[0]; i++) {
        check_number(&numbers[i], "{'enabled':true,", "}");
        if (numbers[i].in_rule) check_number(&numbers[i], "{'enabled':true,'rules':[{'name':'slow',", "}]}");
    }
}

/* The parsed values land in the right fields. */
static void case_values(void) {
    good(q("{'enabled':true,'latency':1,'latencyRate':2,'errorRate':3,'errorStatus':204,'retryAfter':5,'canary':6,"
           "'maxFaults':7,'maxConcurrent':8,'seed':9,'dryRun':true,'name':'n','owner':'o','note':'t','errorBody':'b',"
           "'exclude':['/x'],'instances':['i-*','j']}"));
    CHECK_INT(cfg.fault.latency[0], 1);
    CHECK_INT(cfg.fault.latency_rate, 2);
    CHECK_INT(cfg.fault.error_rate, 3);
    CHECK_INT(cfg.fault.error_status, 204);
    CHECK_INT(cfg.fault.retry_after, 5);
    CHECK_INT(cfg.canary, 6);
    CHECK_INT(cfg.max_faults, 7);
    CHECK_INT(cfg.max_concurrent, 8);
    CHECK(cfg.has_seed && cfg.seed == 9 && cfg.dry_run && cfg.enabled && !cfg.default_exclude);
    CHECK_STR(cfg.text + cfg.name.at, "n"); /* followed by a NUL */
    CHECK_STR(cfg.text + cfg.owner.at, "o");
    CHECK_STR(cfg.text + cfg.note.at, "t");
    CHECK_STR(cfg.text + cfg.fault.error_body.at, "b");
    CHECK_INT(cfg.exclude.count, 1);
    CHECK_STR(cfg.text + cfg.items[cfg.exclude.first].at, "/x");
    CHECK_INT(cfg.instances.count, 2);
    CHECK_STR(cfg.text + cfg.items[cfg.instances.first + 1].at, "j");
}

static void case_seed(void) {
    good("{\"seed\":0}");
    CHECK(cfg.has_seed && cfg.seed == 0);
    good("{\"seed\":9007199254740991}"); /* what every JSON writer can write: 2^53 - 1 */
    CHECK(cfg.has_seed && cfg.seed == 9007199254740991ull);
    bad("{\"seed\":-1}", CHAOS_ERR_RANGE, "seed", "");
    bad("{\"seed\":18446744073709551616}", CHAOS_ERR_RANGE, "seed", "");
    bad("{\"seed\":5.0}", CHAOS_ERR_TYPE, "seed", "write 5");
    bad("{\"seed\":\"5\"}", CHAOS_ERR_TYPE, "seed", "");
    bad("{\"seed\":null}", CHAOS_ERR_TYPE, "seed", "");
    bad("{\"seed\":1,\"seed\":1}", CHAOS_ERR_DUPLICATE_KEY, "seed", "");
}

static void case_booleans(void) {
    static const char *const wrong[] = {"1", "0", "'true'", "null", "[]", "{}"};
    size_t i, j;
    for (i = 0; i < 2; i++) {
        good(q("{'%s':true}", booleans[i]));
        good(q("{'%s':false}", booleans[i]));
        for (j = 0; j < 6; j++) bad(q("{'%s':%s}", booleans[i], wrong[j]), CHAOS_ERR_TYPE, booleans[i], "");
        bad(q("{'%s':true,'%s':true}", booleans[i], booleans[i]), CHAOS_ERR_DUPLICATE_KEY, booleans[i], "");
    }
    /* The last one does not win: two answers to "is it on" are no answer. */
    bad(q("{'enabled':true,'enabled':false}"), CHAOS_ERR_DUPLICATE_KEY, "enabled", "");
    bad(q("{'enabled':false,'\\u0065nabled':true}"), CHAOS_ERR_DUPLICATE_KEY, "enabled", ""); /* equal once decoded */
}

static void check_string(const char *key, int max, const char *before, const char *after) {
    static const char *const wrong[] = {"1", "true", "null", "[]", "{}"};
    char full[1100];
    size_t i;
    memset(full, 'x', sizeof full);
    full[max] = 0;
    good(q("%s'%s':'%s'%s", before, key, full, after));
    full[max] = 'x';
    full[max + 1] = 0;
    check_where("%s, %d bytes", key, max + 1);
    CHECK(parse(q("%s'%s':'%s'%s", before, key, full, after)) != CHAOS_OK);
    CHECK(holds(error.text, key));
    CHECK(!cfg.enabled);
    good(q("%s'%s':'\\u00e9\\ud83d\\ude00 \\\"\\\\\\n\\t\\u0001 ok'%s", before, key, after));
    for (i = 0; i < 5; i++) bad(q("%s'%s':%s%s", before, key, wrong[i], after), CHAOS_ERR_TYPE, key, "");
    bad(q("%s'%s':'x','%s':'x'%s", before, key, key, after), CHAOS_ERR_DUPLICATE_KEY, key, "");
}

static void case_strings(void) {
    size_t i;
    for (i = 0; i < sizeof strings / sizeof strings[0]; i++) {
        check_string(strings[i].key, strings[i].max, "{'enabled':true,", "}");
        if (strings[i].in_rule) check_string(strings[i].key, strings[i].max, "{'enabled':true,'rules':[{'name':'slow',", "}]}");
    }
    good(q("{'errorBody':'\\u00e9\\ud83d\\ude00\\\"\\\\\\/\\b\\f\\n\\r\\t'}"));
    CHECK_STR(cfg.text + cfg.fault.error_body.at, "\xC3\xA9\xF0\x9F\x98\x80\"\\/\b\f\n\r\t");
}

static void case_lists(void) {
    static const char *const wrong[] = {"1", "true", "null", "'/x'", "{}"}, *const one[] = {"['/x']", "['i']", "[]"};
    size_t i, j;
    for (i = 0; i < 3; i++) {
        if (strcmp(lists[i], "instances")) good(q("{'%s':[]}", lists[i]));
        for (j = 0; j < 5; j++) bad(q("{'enabled':true,'%s':%s}", lists[i], wrong[j]), CHAOS_ERR_TYPE, lists[i], "");
        for (j = 0; j < 3; j++) bad(q("{'enabled':true,'%s':[%s]}", lists[i], wrong[j]), CHAOS_ERR_TYPE, lists[i], "");
        bad(q("{'enabled':true,'%s':%s,'%s':%s}", lists[i], one[i], lists[i], one[i]), CHAOS_ERR_DUPLICATE_KEY, lists[i], "");
    }
}

static void case_exclude(void) {
    good("{}");
    CHECK(cfg.default_exclude);
    CHECK_INT(cfg.exclude.count, 0);
    good(q("{'exclude':[]}"));
    CHECK(!cfg.default_exclude);
    CHECK_INT(cfg.exclude.count, 0);
    good(q("{'exclude':['/admin/**','/x']}"));
    CHECK(!cfg.default_exclude);
    CHECK_INT(cfg.exclude.count, 2);
    /* The built-in list spelt out is not the built-in list: the User-Agents are not in it. */
    good(q("{'exclude':['/health*','/healthz','/livez','/readyz','/ping']}"));
    CHECK(!cfg.default_exclude);
    good(q("{'exclude':['**.css']}"));
    /* Each path begins with a slash, where * stops: these would protect nothing. */
    bad(q("{'exclude':['*.css']}"), CHAOS_ERR_VALUE, "exclude", "/ or **");
    bad(q("{'exclude':['/x','*']}"), CHAOS_ERR_VALUE, "exclude", "/ or **");
    bad(q("{'match':{'paths':['*/health']}}"), CHAOS_ERR_VALUE, "paths", "/ or **");
}

/* ---- keys ---------------------------------------------------------------------------------------------------- */
static void case_unknown_keys(void) {
    static const char *const typos[][2] = {
        {"errorrate", "errorRate"},     {"error_rate", "errorRate"},    {"errorRat", "errorRate"},
        {"Enabled", "enabled"},         {"enable", "enabled"},          {"latncy", "latency"},
        {"latencyrate", "latencyRate"}, {"errorstatus", "errorStatus"}, {"dryrun", "dryRun"},
        {"dry_run", "dryRun"},          {"expiresat", "expiresAt"},     {"expireAt", "expiresAt"},
        {"excludes", "exclude"},        {"instance", "instances"},      {"rule", "rules"},
        {"maxfaults", "maxFaults"},     {"canaryy", "canary"},          {"matches", "match"},
        {"retryafter", "retryAfter"},   {"errorbody", "errorBody"},     {"maxConcurent", "maxConcurrent"},
    };
    size_t i;
    for (i = 0; i < sizeof typos / sizeof typos[0]; i++) {
        bad(q("{'enabled':true,'%s':1}", typos[i][0]), CHAOS_ERR_UNKNOWN_KEY, typos[i][0], typos[i][1]);
        CHECK(holds(error.text, "did you mean"));
        CHECK_INT(error.offset, 17); /* the key's first character */
        CHECK_INT(error.line, 1);
        CHECK_INT(error.column, 18);
    }
    bad(q("{'enabled':true,'wibble':1}"), CHAOS_ERR_UNKNOWN_KEY, "wibble", "");
    CHECK(!holds(error.text, "did you mean")); /* nothing is near: no wild guess */
    bad(q("{'':1}"), CHAOS_ERR_UNKNOWN_KEY, "", "");
    bad(q("{'enabled':true,'$schema':'x'}"), CHAOS_ERR_UNKNOWN_KEY, "$schema", "");
    bad(q("{'enabled':true,\n 'latency':200,\n\t'errorrate':5}"), CHAOS_ERR_UNKNOWN_KEY, "errorrate", "errorRate");
    CHECK_INT(error.line, 3);
    CHECK_INT(error.column, 3);
    /* An unknown key of any length, or with any byte, must fit the error's text and keep it UTF-8. */
    {
        char key[700];
        memset(key, 'k', sizeof key);
        key[sizeof key - 1] = 0;
        bad(q("{'%s':1}", key), CHAOS_ERR_UNKNOWN_KEY, "unknown key", "");
        bad(q("{'\\u0001\\u007f\\n\\u001b[31m':1}"), CHAOS_ERR_UNKNOWN_KEY, "", "");
        /* No way to break a line or to paint a terminal. */
        CHECK(!holds(error.text, "\n") && !holds(error.text, "\x01") && !holds(error.text, "\x1b"));
    }
}

static void case_later(void) {
    char canonical[200];
    size_t i;
    for (i = 0; i < sizeof later / sizeof later[0]; i++) {
        chaos_result got = parse(later[i].json);
        check_where("%s: %s", later[i].json, got ? error.text : "accepted");
        CHECK_INT(got == CHAOS_OK, later[i].parses);
        if (got) CHECK_INT(got, CHAOS_ERR_UNSUPPORTED);
        if (got) CHECK(holds(error.text, "not in this version"));
        if (!got) good(later[i].json);
    }
    bad(q("{'enabled':true,'guard':{'errorRate':5}}"), CHAOS_ERR_UNSUPPORTED, "guard", "not in this version");
    bad(q("{'events':'http'}"), CHAOS_ERR_TYPE, "events", "list");
    bad(q("{'events':[1]}"), CHAOS_ERR_TYPE, "events", "list");
    bad(q("{'events':['kafka']}"), CHAOS_ERR_VALUE, "events", "sqs");
    bad(q("{'rules':[{'name':'a','events':['sqs']}]}"), CHAOS_ERR_UNKNOWN_KEY, "events", "");
    CHECK(parse(q("{'events':['stream','http','stream']}")) == CHAOS_OK && cfg.events == (1 | 1 << 4));
    CHECK(chaos_config_format(&cfg, canonical, sizeof canonical) > 0);
    CHECK_STR(canonical, "{\"enabled\":false,\"events\":[\"http\",\"stream\"]}");
    CHECK(parse("{}") == CHAOS_OK && cfg.events == 3); /* http and direct */
    bad(q("{'enabled':true,'errorMode':'explode'}"), CHAOS_ERR_VALUE, "errorMode", "");
    bad(q("{'enabled':true,'errorMode':'Status'}"), CHAOS_ERR_VALUE, "errorMode", "status");
    bad(q("{'enabled':true,'errorMode':1}"), CHAOS_ERR_TYPE, "errorMode", "");
    bad(q("{'enabled':true,'errorWhen':'never'}"), CHAOS_ERR_VALUE, "errorWhen", "");
    bad(q("{'enabled':true,'errorWhen':true}"), CHAOS_ERR_TYPE, "errorWhen", "");
}

/* ---- latency ------------------------------------------------------------------------------------------------- */
static void case_latency_objects(void) {
    static const char *const fine[] = {
        "{'min':0,'max':0}",
        "{'min':0,'max':900000}",
        "{'min':900000,'max':900000}",
        "{'max':20,'min':10}",
        "{'mean':100,'max':1000}",
        "{'max':1000,'mean':100}",
        "{'mean':1,'max':900000}",
        "{'p50':1,'p95':2,'p99':3,'max':4}",
        "{'p50':5,'p95':5,'p99':5,'max':5}",
        "{'max':900000,'p99':3,'p95':2,'p50':0}",
        "{'p50':0,'p95':0,'p99':0,'max':0}",
    };
    static const struct {
        const char *json;
        chaos_result code;
        const char *word;
    } wrong[] = {
        {"{'min':20,'max':10}", CHAOS_ERR_VALUE, "latency"},
        {"{'min':-1,'max':10}", CHAOS_ERR_RANGE, "min"},
        {"{'min':0,'max':900001}", CHAOS_ERR_RANGE, "max"},
        {"{'mean':0,'max':900001}", CHAOS_ERR_RANGE, "m"},
        {"{'mean':11,'max':10}", CHAOS_ERR_VALUE, "latency"},
        {"{'p50':2,'p95':1,'p99':3,'max':4}", CHAOS_ERR_VALUE, "latency"},
        {"{'p50':1,'p95':4,'p99':3,'max':4}", CHAOS_ERR_VALUE, "latency"},
        {"{'p50':1,'p95':2,'p99':5,'max':4}", CHAOS_ERR_VALUE, "latency"},
        {"{'p50':1,'p95':2,'p99':3,'max':900001}", CHAOS_ERR_RANGE, "max"},
        {"{'p50':-1,'p95':2,'p99':3,'max':4}", CHAOS_ERR_RANGE, "p50"},
        {"{'min':1}", CHAOS_ERR_MISSING_KEY, "max"},
        {"{'max':1}", CHAOS_ERR_MISSING_KEY, "latency"},
        {"{'mean':1}", CHAOS_ERR_MISSING_KEY, "max"},
        {"{'p50':1,'p95':2,'p99':3}", CHAOS_ERR_MISSING_KEY, "max"},
        {"{'p50':1,'p95':2,'max':3}", CHAOS_ERR_MISSING_KEY, "max"},
        {"{'p95':1,'p99':2,'max':3}", CHAOS_ERR_MISSING_KEY, "max"},
        {"{}", CHAOS_ERR_MISSING_KEY, "latency"},
        {"{'min':1,'max':2,'min':1}", CHAOS_ERR_DUPLICATE_KEY, "min"},
        {"{'min':1.0,'max':2}", CHAOS_ERR_TYPE, "write 1"},
        {"{'min':'1','max':2}", CHAOS_ERR_TYPE, "latency"},
        {"{'min':null,'max':2}", CHAOS_ERR_TYPE, "latency"},
        {"{'mn':1,'max':2}", CHAOS_ERR_UNKNOWN_KEY, "mn"},
        {"{'p90':1,'max':2}", CHAOS_ERR_UNKNOWN_KEY, "p90"},
        {"{'min':1,'max':2,'p999':3}", CHAOS_ERR_UNKNOWN_KEY, "p999"},
    };
    size_t i;
    for (i = 0; i < sizeof fine / sizeof fine[0]; i++) {
        good(q("{'enabled':true,'latency':%s}", fine[i]));
        good(q("{'enabled':true,'rules':[{'name':'a','latency':%s}]}", fine[i]));
    }
    for (i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        bad(q("{'enabled':true,'latency':%s}", wrong[i].json), wrong[i].code, wrong[i].word, "");
        bad(q("{'enabled':true,'rules':[{'name':'a','latency':%s}]}", wrong[i].json), wrong[i].code, wrong[i].word, "");
    }
    /* Two kinds at once. */
    check_where("two kinds");
    CHECK(parse(q("{'latency':{'min':1,'mean':2,'max':3}}")) != CHAOS_OK);
    CHECK(parse(q("{'latency':{'min':1,'p50':1,'p95':2,'p99':3,'max':3}}")) != CHAOS_OK);
    CHECK(parse(q("{'latency':{'mean':1,'p50':1,'p95':2,'p99':3,'max':3}}")) != CHAOS_OK);
    good(q("{'latency':{'max':40,'p99':30,'p95':20,'p50':10}}"));
    CHECK_INT(cfg.fault.latency_kind, CHAOS_LATENCY_QUANTILES);
    CHECK_INT(cfg.fault.latency[0], 10);
    CHECK_INT(cfg.fault.latency[1], 20);
    CHECK_INT(cfg.fault.latency[2], 30);
    CHECK_INT(cfg.fault.latency[3], 40);
    good(q("{'latency':{'max':20,'min':10}}"));
    CHECK_INT(cfg.fault.latency_kind, CHAOS_LATENCY_UNIFORM);
    CHECK_INT(cfg.fault.latency[0], 10);
    CHECK_INT(cfg.fault.latency[1], 20);
    good(q("{'latency':{'max':20,'mean':10}}"));
    CHECK_INT(cfg.fault.latency_kind, CHAOS_LATENCY_EXPONENTIAL);
    CHECK_INT(cfg.fault.latency[0], 10);
    CHECK_INT(cfg.fault.latency[1], 20);
}

/* ---- match --------------------------------------------------------------------------------------------------- */
static void case_match(void) {
    good(q("{'match':{}}"));
    /* An empty list could be read as "none" or as "all": it is an error that says so. */
    bad(q("{'enabled':true,'match':{'methods':[]}}"), CHAOS_ERR_VALUE, "methods", "leave it out");
    bad(q("{'enabled':true,'match':{'paths':[]}}"), CHAOS_ERR_VALUE, "paths", "leave it out");
    bad(q("{'enabled':true,'match':{'headers':{}}}"), CHAOS_ERR_VALUE, "headers", "leave it out");
    bad(q("{'enabled':true,'instances':[]}"), CHAOS_ERR_VALUE, "instances", "leave it out");
    /* So is what can never match. */
    bad(q("{'enabled':true,'match':{'methods':['get']}}"), CHAOS_ERR_VALUE, "methods", "capitals");
    bad(q("{'enabled':true,'match':{'methods':['']}}"), CHAOS_ERR_VALUE, "methods", "");
    bad(q("{'enabled':true,'match':{'methods':['G T']}}"), CHAOS_ERR_VALUE, "methods", "");
    bad(q("{'enabled':true,'match':{'paths':['a']}}"), CHAOS_ERR_VALUE, "paths", "");
    bad(q("{'enabled':true,'match':{'paths':['']}}"), CHAOS_ERR_VALUE, "paths", "");
    bad(q("{'enabled':true,'match':{'headers':{'':'x'}}}"), CHAOS_ERR_VALUE, "headers", "");
    bad(q("{'enabled':true,'match':{'headers':{'a b':'x'}}}"), CHAOS_ERR_VALUE, "headers", "");
    bad(q("{'enabled':true,'match':{'headers':{'a:':'x'}}}"), CHAOS_ERR_VALUE, "headers", "");
    bad(q("{'enabled':true,'exclude':['healthz']}"), CHAOS_ERR_VALUE, "exclude", "");
    good(q("{'match':{'headers':{'X-User':'a*','accept':'*'},'paths':['/a/*','/b/**'],'methods':['GET','PURGE']}}"));
    CHECK_INT(cfg.match.methods.count, 2);
    CHECK_INT(cfg.match.paths.count, 2);
    CHECK(cfg.match.headers.count == 4 || cfg.match.headers.count == 2); /* strings, or pairs */
    bad(q("{'enabled':true,'match':[]}"), CHAOS_ERR_TYPE, "match", "");
    bad(q("{'enabled':true,'match':'/x'}"), CHAOS_ERR_TYPE, "match", "");
    bad(q("{'enabled':true,'match':null}"), CHAOS_ERR_TYPE, "match", "");
    bad(q("{'enabled':true,'match':{'methods':'GET'}}"), CHAOS_ERR_TYPE, "methods", "");
    bad(q("{'enabled':true,'match':{'methods':[1]}}"), CHAOS_ERR_TYPE, "methods", "");
    bad(q("{'enabled':true,'match':{'paths':'/x'}}"), CHAOS_ERR_TYPE, "paths", "");
    bad(q("{'enabled':true,'match':{'paths':[null]}}"), CHAOS_ERR_TYPE, "paths", "");
    bad(q("{'enabled':true,'match':{'headers':[]}}"), CHAOS_ERR_TYPE, "headers", "");
    bad(q("{'enabled':true,'match':{'headers':{'a':1}}}"), CHAOS_ERR_TYPE, "headers", "");
    bad(q("{'enabled':true,'match':{'headers':{'a':['b']}}}"), CHAOS_ERR_TYPE, "a", "");
    bad(q("{'enabled':true,'match':{'headers':{'a':'1','a':'2'}}}"), CHAOS_ERR_DUPLICATE_KEY, "a", "");
    bad(q("{'enabled':true,'match':{'headers':{'X-A':'1','x-a':'2'}}}"), CHAOS_ERR_DUPLICATE_KEY, "", ""); /* one header */
    bad(q("{'enabled':true,'match':{'path':['/x']}}"), CHAOS_ERR_UNKNOWN_KEY, "path", "paths");
    bad(q("{'enabled':true,'match':{'method':['GET']}}"), CHAOS_ERR_UNKNOWN_KEY, "method", "methods");
    bad(q("{'enabled':true,'match':{'paths':['/x'],'paths':['/x']}}"), CHAOS_ERR_DUPLICATE_KEY, "paths", "");
    bad(q("{'enabled':true,'match':{},'match':{}}"), CHAOS_ERR_DUPLICATE_KEY, "match", "");
    /* Fault keys do not belong into match, nor match keys beside it. */
    bad(q("{'enabled':true,'match':{'errorRate':5}}"), CHAOS_ERR_UNKNOWN_KEY, "errorRate", "");
    bad(q("{'enabled':true,'paths':['/x']}"), CHAOS_ERR_UNKNOWN_KEY, "paths", "");
}

/* ---- rules --------------------------------------------------------------------------------------------------- */
static const char *rule_list(int count) {
    static char buf[4096];
    size_t at = 0;
    int i;
    at += (size_t)snprintf(buf + at, sizeof buf - at, "{\"enabled\":true,\"rules\":[");
    for (i = 0; i < count; i++) at += (size_t)snprintf(buf + at, sizeof buf - at, "%s{\"name\":\"r%d\"}", i ? "," : "", i);
    snprintf(buf + at, sizeof buf - at, "]}");
    return buf;
}

static void case_rule_count(void) {
    good(rule_list(16));
    CHECK_INT(cfg.rule_count, 16);
    check_where("17 rules");
    CHECK(parse(rule_list(17)) != CHAOS_OK);
    CHECK(holds(error.text, "rules") && holds(error.text, "16"));
    CHECK(!cfg.enabled);
}

static void case_rule_names(void) {
    char name[66];
    memset(name, 'n', sizeof name);
    name[64] = 0;
    good(q("{'rules':[{'name':'%s'}]}", name));
    name[64] = 'n';
    name[65] = 0;
    check_where("name of 65");
    CHECK(parse(q("{'enabled':true,'rules':[{'name':'%s'}]}", name)) != CHAOS_OK);
    bad(q("{'enabled':true,'rules':[{}]}"), CHAOS_ERR_MISSING_KEY, "name", "");
    bad(q("{'enabled':true,'rules':[{'name':'a'},{'errorRate':5}]}"), CHAOS_ERR_MISSING_KEY, "name", "");
    check_where("same name, empty name");
    CHECK(parse(q("{'enabled':true,'rules':[{'name':'a'},{'name':'a'}]}")) != CHAOS_OK);
    CHECK(holds(error.text, "a") && !cfg.enabled);
    CHECK(parse(q("{'enabled':true,'rules':[{'name':'a'},{'name':'b'},{'name':'\\u0061'}]}")) != CHAOS_OK);
    CHECK(parse(q("{'enabled':true,'rules':[{'name':''}]}")) != CHAOS_OK);
    bad(q("{'enabled':true,'rules':[{'name':1}]}"), CHAOS_ERR_TYPE, "name", "");
    bad(q("{'enabled':true,'rules':[{'name':'a','name':'b'}]}"), CHAOS_ERR_DUPLICATE_KEY, "name", "");
}

/* What belongs to the whole experiment does not stand in a rule. */
static void case_rule_keys(void) {
    static const char *const top[] = {"'enabled':true",    "'canary':5",   "'expiresAt':'never'", "'maxFaults':1",
                                      "'maxConcurrent':1", "'seed':1",     "'dryRun':false",      "'owner':'o'",
                                      "'note':'n'",        "'exclude':[]", "'instances':[]",      "'rules':[]"};
    size_t i;
    for (i = 0; i < sizeof top / sizeof top[0]; i++) {
        check_where("%s", top[i]);
        CHECK(parse(q("{'enabled':true,'rules':[{'name':'a',%s}]}", top[i])) != CHAOS_OK);
        CHECK(!cfg.enabled);
    }
    bad(q("{'enabled':true,'rules':[{'name':'a'},\n{'name':'b','errorrate':5}]}"), CHAOS_ERR_UNKNOWN_KEY, "errorrate", "errorRate");
    CHECK_INT(error.line, 2);
    CHECK_INT(error.column, 14);
    CHECK(holds(error.text, "rules[1]") || holds(error.text, "rule 2") || holds(error.text, "rule 1") || holds(error.text, "\"b\""));
    bad(q("{'enabled':true,'rules':[{'name':'a','match':{'pathes':['/x']}}]}"), CHAOS_ERR_UNKNOWN_KEY, "pathes", "paths");
}

/* Top-level fault keys are the defaults of the rules, wherever they stand. */
static void check_inherited(const char *json) {
    good(json);
    CHECK_INT(cfg.rule_count, 2);
    CHECK_INT(cfg.rules[0].fault.error_rate, 7);
    CHECK_INT(cfg.rules[0].fault.error_status, 429);
    CHECK_INT(cfg.rules[0].fault.retry_after, 3);
    CHECK_INT(cfg.rules[0].fault.latency_kind, CHAOS_LATENCY_UNIFORM);
    CHECK_INT(cfg.rules[0].fault.latency[1], 20);
    CHECK_STR(cfg.text + cfg.rules[0].fault.error_body.at, "busy");
    CHECK_INT(cfg.rules[1].fault.error_rate, 50);
    CHECK_INT(cfg.rules[1].fault.error_status, 429);
    CHECK_INT(cfg.rules[1].fault.latency_kind, CHAOS_LATENCY_FIXED);
    CHECK_INT(cfg.rules[1].fault.latency[0], 0);
    CHECK_STR(cfg.text + cfg.rules[1].fault.error_body.at, "no");
    CHECK_INT(cfg.match.paths.count, 1);            /* the top level's match stays the top level's */
    CHECK_INT(cfg.rules[0].match.paths.count, 0);   /* and is not copied into a rule without one */
    CHECK_INT(cfg.rules[1].match.methods.count, 1); /* nor mixed with a rule's own */
    CHECK_INT(cfg.rules[1].match.paths.count, 0);
}

static void case_rule_inheritance(void) {
    static const char top[] = "'errorRate':7,'errorStatus':429,'retryAfter':3,'latency':{'min':10,'max':20},'errorBody':'busy',"
                              "'match':{'paths':['/a']}";
    static const char rules[] =
        "'rules':[{'name':'a'},{'errorRate':50,'latency':0,'errorBody':'no','match':{'methods':['GET']},'name':'b'}]";
    check_inherited(q("{'enabled':true,%s,%s}", top, rules));
    check_inherited(q("{%s,%s,'enabled':true}", rules, top));
}

/* Every order of the keys gives the same canonical text. */
static void case_key_order(void) {
    static const char *const keys[] = {"'enabled':true",
                                       "'errorRate':7",
                                       "'rules':[{'latency':{'max':9,'min':1},'name':'a'}]",
                                       "'match':{'paths':['/x'],'methods':['GET']}",
                                       "'exclude':['/y']",
                                       "'seed':4"};
    static char want[4096], got[4096];
    int order[6], i, j, rounds = 0;
    for (i = 0; i < 6; i++) order[i] = i;
    for (;;) {
        char json[1024] = "{";
        for (i = 0; i < 6; i++) {
            strcat(json, keys[order[i]]);
            strcat(json, i < 5 ? "," : "}");
        }
        good(q("%s", json));
        chaos_config_format(&cfg, rounds++ ? got : want, sizeof got);
        if (rounds > 1) CHECK_STR(got, want);
        for (i = 4; i >= 0 && order[i] > order[i + 1]; i--) {}
        if (i < 0) break;
        for (j = 5; order[j] < order[i]; j--) {}
        {
            int t = order[i];
            order[i] = order[j];
            order[j] = t;
        }
        for (i++, j = 5; i < j; i++, j--) {
            int t = order[i];
            order[i] = order[j];
            order[j] = t;
        }
    }
    CHECK_INT(rounds, 720);
}

/* ---- expiresAt ----------------------------------------------------------------------------------------------- */
static void case_expires(void) {
    static const struct {
        const char *json;
        long long ms;
    } fine[] = {
        {"'never'", -1},
        {"1767225600", 1767225600000},
        {"4102444800", 4102444800000}, /* 2100-01-01, the last one */
        {"946684800", 946684800000},   /* 2000-01-01, the first one */
        {"'2000-01-01T00:00:00Z'", 946684800000},
        {"'2026-01-01T00:00:00+00:00'", 1767225600000},
        {"'2026-01-01t00:00:00z'", 1767225600000},
        {"'2026-01-01T00:00:00Z'", 1767225600000},
        {"'2026-02-28T23:59:59Z'", 1772323199000},
        {"'2026-03-01T00:00:00Z'", 1772323200000},
        {"'2028-02-29T00:00:00Z'", 1835395200000},
        {"'2024-02-29T12:34:56Z'", 1709210096000},
        {"'2000-02-29T00:00:00Z'", 951782400000},
        {"'2099-12-31T23:59:59Z'", 4102444799000},
        {"'2026-12-31T23:59:59Z'", 1798761599000},
        {"'2026-01-01T00:00:00.5Z'", 1767225600500},
        {"'2026-01-01T00:00:00.123Z'", 1767225600123},
        {"'2026-01-01T00:00:00.999999999Z'", 1767225600999},
    };
    static const struct {
        const char *json, *word;
    } wrong[] = {
        {"'2027-02-29T00:00:00Z'", ""},
        {"'2026-02-30T00:00:00Z'", ""},
        {"'2100-02-29T00:00:00Z'", ""},
        {"'2026-04-31T00:00:00Z'", ""},
        {"'2026-13-01T00:00:00Z'", ""},
        {"'2026-00-01T00:00:00Z'", ""},
        {"'2026-01-00T00:00:00Z'", ""},
        {"'2026-01-32T00:00:00Z'", ""},
        {"'2026-01-01T24:00:00Z'", ""},
        {"'2026-01-01T00:60:00Z'", ""},
        {"'2026-01-01T00:00:61Z'", ""},
        {"'2026-01-01T00:00:00'", "UTC"},
        {"'2026-01-01T00:00:00+02:00'", "UTC"},
        {"'2026-01-01T00:00:00-05:00'", "UTC"},
        {"'2026-01-01'", ""},
        {"'2026-01-01T00:00Z'", ""},
        {"'2026-1-1T00:00:00Z'", ""},
        {"'20260101T000000Z'", ""},
        {"'2026-01-01T00:00:00Z '", ""},
        {"' 2026-01-01T00:00:00Z'", ""},
        {"'2026-01-01T00:00:00.Z'", ""},
        {"'2026-01-01T00:00:00ZZ'", ""},
        {"'tomorrow'", ""},
        {"''", ""},
        {"'Never'", ""},
        {"'+026-01-01T00:00:00Z'", ""},
        {"'-026-01-01T00:00:00Z'", ""},
        {"'2026-01-01T00:00:-1Z'", ""},
        {"'2026/01/01T00:00:00Z'", ""},
        {"'1767225600'", ""},
        {"'2026-01-01T00:00:00\\u0000Z'", ""},
        {"'2026-01-01T00:00:00Z\\u0000'", ""},
        {"'never\\u0000'", ""},
        {"'1999-12-31T23:59:59Z'", "2000"},
        {"'1969-12-31T23:59:59Z'", ""},
        {"'2101-01-01T00:00:00Z'", "2100"},
        {"'9999-12-31T23:59:59Z'", "2100"},
    };
    size_t i;
    for (i = 0; i < sizeof fine / sizeof fine[0]; i++) {
        good(q("{'enabled':true,'expiresAt':%s}", fine[i].json));
        CHECK_INT(cfg.expires_ms, fine[i].ms);
    }
    for (i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        check_where("%s", wrong[i].json);
        CHECK(parse(q("{'enabled':true,'expiresAt':%s}", wrong[i].json)) != CHAOS_OK);
        CHECK(!cfg.enabled && holds(error.text, "expiresAt"));
        if (!holds(error.text, wrong[i].word)) CHECK_STR(error.text, wrong[i].word);
    }
    bad(q("{'expiresAt':1767225600000}"), CHAOS_ERR_RANGE, "expiresAt", "milliseconds");
    bad(q("{'expiresAt':4102444801}"), CHAOS_ERR_RANGE, "expiresAt", "milliseconds");
    bad(q("{'expiresAt':9223372036854775807}"), CHAOS_ERR_RANGE, "expiresAt", "");
    bad(q("{'expiresAt':99999999999999999999999}"), CHAOS_ERR_RANGE, "expiresAt", "");
    bad(q("{'expiresAt':946684799}"), CHAOS_ERR_RANGE, "expiresAt", "moment"); /* 3600 would be meant as "in an hour" */
    bad(q("{'expiresAt':3600}"), CHAOS_ERR_RANGE, "expiresAt", "moment");
    bad(q("{'expiresAt':0}"), CHAOS_ERR_RANGE, "expiresAt", "");
    bad(q("{'expiresAt':-1}"), CHAOS_ERR_RANGE, "expiresAt", "");
    bad(q("{'expiresAt':1767225600.0}"), CHAOS_ERR_TYPE, "expiresAt", "write 1767225600");
    bad(q("{'expiresAt':null}"), CHAOS_ERR_TYPE, "expiresAt", "");
    bad(q("{'expiresAt':true}"), CHAOS_ERR_TYPE, "expiresAt", "");
    bad(q("{'expiresAt':{}}"), CHAOS_ERR_TYPE, "expiresAt", "");
    bad(q("{'expiresAt':'never','expiresAt':'never'}"), CHAOS_ERR_DUPLICATE_KEY, "expiresAt", "");
}

/* Every day of the century, against the plain rule. */
static void case_every_day(void) {
    long day = 10957; /* 2000-01-01 */
    int y, m, d;
    for (y = 2000; y < 2100; y++)
        for (m = 1; m <= 12; m++) {
            bool leap = y % 4 == 0 && (y % 100 != 0 || y % 400 == 0);
            int days = m == 2 ? 28 + leap : m == 4 || m == 6 || m == 9 || m == 11 ? 30 : 31;
            for (d = 1; d <= 32; d++) {
                const char *json = q("{'expiresAt':'%04d-%02d-%02dT00:00:01Z'}", y, m, d);
                bool ok = parse(json) == CHAOS_OK;
                if (ok != (d <= days) || (ok && cfg.expires_ms != day * 86400000LL + 1000)) {
                    check_where("%s", json);
                    CHECK_INT(cfg.expires_ms, day * 86400000LL + 1000);
                }
                day += d <= days;
            }
        }
    CHECK_INT(day, 47482);
}

/* ---- bad input as a whole ------------------------------------------------------------------------------------- */
static void case_not_an_object(void) {
    static const char *const texts[] = {"[]", "null", "true", "5", "\"x\"", "[{\"enabled\":true}]"};
    size_t i;
    for (i = 0; i < 6; i++) bad(texts[i], CHAOS_ERR_TYPE, "object", "");
}

static void case_bad_json(void) {
    static const struct {
        const char *text, *word;
    } texts[] = {
        {"", "empty"},
        {"   \n", ""},
        {"{\"enabled\":true,}", "comma"},
        {"\xEF\xBB\xBF{\"enabled\":true}", "BOM"},
        {"{\"enabled\":true} // on", "comment"},
        {"/* on */ {\"enabled\":true}", "comment"},
        {"{\"enabled\":true /* on */}", "comment"},
        {"{\"enabled\":true} {}", ""},
        {"{\"enabled\":true,\"errorRate\":NaN}", "NaN"},
        {"{\"enabled\":true,\"errorRate\":Infinity}", "Infinity"},
        {"{\"enabled\":true,\"name\":\"\xFF\"}", "UTF-8"},
        {"{\"enabled\":true,\"name\":\"\xC0\xAF\"}", "UTF-8"},
        {"{\"enabled\":true,\"name\":\"\xED\xA0\x80\"}", "UTF-8"},
        {"{\"enabled\":true,\"name\":\"\\ud800\"}", "surrogate"},
        {"{\"enabled\":true,\"name\":\"a\nb\"}", ""},
        {"{\"enabled\":True}", ""},
        {"{enabled:true}", ""},
        {"{'enabled':true}", ""},
        {"{\"enabled\":true,\"errorRate\":05}", ""},
        {"{\"enabled\":true", ""},
    };
    static const char utf16le[] = "\xFF\xFE{\0}\0", utf16be[] = "\0{\0}";
    size_t i;
    for (i = 0; i < sizeof texts / sizeof texts[0]; i++) bad(texts[i].text, CHAOS_ERR_JSON, texts[i].word, "");
    check_where("UTF-16");
    CHECK_INT(parse_len(utf16le, 6), CHAOS_ERR_JSON);
    CHECK(holds(error.text, "UTF-16"));
    CHECK_INT(parse_len(utf16be, 4), CHAOS_ERR_JSON);
    CHECK(holds(error.text, "UTF-16"));
    CHECK_INT(parse_len("{\"enabled\":true}\0", 17), CHAOS_ERR_JSON); /* a NUL after the end */
    CHECK(parse_len(NULL, 0) != CHAOS_OK);
    CHECK(!cfg.enabled);
}

/* Invalid JSON behind an error of meaning is still reported, and invalid JSON behind `enabled` is still off. */
static void case_late_error(void) {
    bad(q("{'enabled':true,'errorRate':5,'latency':200,'rules':[{'name':'a'}]"), CHAOS_ERR_JSON, "", "");
    bad(q("{'enabled':true,'errorRate':5} x"), CHAOS_ERR_JSON, "", "");
    bad(q("{'rules':[{'name':'a'}],'enabled':true,'errorRate':101}"), CHAOS_ERR_RANGE, "errorRate", "100");
}

static void case_deep(void) {
    char json[400] = "{\"enabled\":true,\"x\":";
    size_t at = strlen(json);
    int depth;
    for (depth = 60; depth <= 70; depth++) {
        memset(json + at, '[', (size_t)depth);
        memset(json + at + depth, ']', (size_t)depth);
        strcpy(json + at + 2 * depth, "}");
        check_where("depth %d", depth);
        CHECK(parse(json) != CHAOS_OK);
        CHECK(!cfg.enabled);
        if (depth > 63) CHECK_INT(error.code == CHAOS_ERR_JSON || error.code == CHAOS_ERR_UNKNOWN_KEY, 1);
    }
}

static void case_input_size(void) {
    static char json[CHAOS_CONFIG_INPUT_MAX + 2];
    static const char text[] = "{\"enabled\":true,\"errorRate\":5}";
    memset(json, ' ', sizeof json);
    memcpy(json, text, sizeof text - 1);
    CHECK_INT(parse_len(json, CHAOS_CONFIG_INPUT_MAX), CHAOS_OK);
    CHECK(cfg.enabled);
    CHECK_INT(parse_len(json, CHAOS_CONFIG_INPUT_MAX + 1), CHAOS_ERR_TOO_LARGE);
    CHECK(!cfg.enabled);
    CHECK_INT(error.code, CHAOS_ERR_TOO_LARGE);
}

/* More strings, or longer ones, than a config holds: an error that says so, never a cut list. */
static void case_pool_size(void) {
    static char json[CHAOS_CONFIG_INPUT_MAX];
    size_t at;
    int items, i;
    for (items = CHAOS_MAX_ITEMS - 1; items <= CHAOS_MAX_ITEMS + 1; items++) {
        at = (size_t)sprintf(json, "{\"enabled\":true,\"exclude\":[");
        for (i = 0; i < items; i++) at += (size_t)sprintf(json + at, "%s\"/%d\"", i ? "," : "", i);
        sprintf(json + at, "]}");
        check_where("%d items", items);
        if (items <= CHAOS_MAX_ITEMS) {
            good(json);
            CHECK_INT(cfg.exclude.count, items);
        } else {
            CHECK_INT(parse(json), CHAOS_ERR_TOO_LARGE);
            CHECK(!cfg.enabled && holds(error.text, "512"));
        }
    }
    at = (size_t)sprintf(json, "{\"enabled\":true,\"exclude\":[");
    for (i = 0; i < 200; i++) at += (size_t)sprintf(json + at, "%s\"/%0200d\"", i ? "," : "", i);
    sprintf(json + at, "]}");
    check_where("too much text");
    CHECK_INT(parse(json), CHAOS_ERR_TOO_LARGE);
    CHECK(!cfg.enabled);
}

/* The pool filled to its last byte, then one string more. The config ends at the heap block's end: the address sanitizer sees. */
static void case_pool_exactly_full(void) {
    static char json[CHAOS_CONFIG_INPUT_MAX];
    size_t at = (size_t)sprintf(json, "{\"enabled\":true,\"exclude\":[");
    chaos_config *c = (chaos_config *)malloc(sizeof *c);
    unsigned i, count = CHAOS_MAX_TEXT / 256;
    CHECK_INT(CHAOS_MAX_TEXT % 256, 0);
    for (i = 0; i < count; i++) at += (size_t)sprintf(json + at, "%s\"/%0254u\"", i ? "," : "", i); /* 255 bytes and a NUL */
    strcpy(json + at, "]}");
    CHECK_INT(chaos_config_parse(c, json, strlen(json), &error), CHAOS_OK);
    CHECK_INT(c->text_len, CHAOS_MAX_TEXT);
    strcpy(json + at, ",\"/x\"]}");
    CHECK_INT(chaos_config_parse(c, json, strlen(json), &error), CHAOS_ERR_TOO_LARGE);
    strcpy(json + at, "],\"name\":\"\"}"); /* even an empty one has a NUL */
    CHECK_INT(chaos_config_parse(c, json, strlen(json), &error), CHAOS_ERR_TOO_LARGE);
    CHECK(!c->enabled);
    free(c);
}

/* No cut of a config turns chaos on. */
static void case_truncated(void) {
    const char *json =
        q("{'enabled':true,'latency':{'p50':1,'p95':2,'p99':3,'max':4},'errorRate':100,'errorStatus':503,'errorBody':'\\u00e9',"
          "'match':{'methods':['GET'],'paths':['/**'],'headers':{'x':'*'}},'exclude':[],'expiresAt':'2026-01-01T00:00:00Z',"
          "'seed':5,'rules':[{'name':'a','latency':5},{'name':'b','errorRate':1}],'canary':50}\n");
    size_t len = strlen(json), cut;
    CHECK_INT(parse(json), CHAOS_OK);
    CHECK(cfg.enabled);
    for (cut = 0; cut + 1 < len; cut++) {
        check_where("first %u bytes", (unsigned)cut);
        CHECK(parse_len(json, cut) != CHAOS_OK); /* mostly invalid JSON; `503` cut to `50` is out of range first */
        CHECK(!cfg.enabled);
        CHECK(error.offset <= cut);
    }
}

/* ---- format -------------------------------------------------------------------------------------------------- */
static void case_format_text(void) {
    char buf[256];
    good("{}");
    chaos_config_format(&cfg, buf, sizeof buf);
    CHECK(!holds(buf, "latency") && !holds(buf, "exclude") && !holds(buf, "rules")); /* only what differs */
    CHECK(holds(buf, "false"));
    good(q("{'errorStatus':503,'errorRate':5,'latency':200,'enabled':true,'canary':100}"));
    chaos_config_format(&cfg, buf, sizeof buf);
    CHECK(holds(buf, "latency") && holds(buf, "200") && holds(buf, "errorRate"));
    CHECK(!holds(buf, "canary") && !holds(buf, "errorStatus"));
    good(q("{'exclude':[]}"));
    chaos_config_format(&cfg, buf, sizeof buf);
    CHECK(holds(buf, "exclude")); /* [] is not the default */
}

/* Every capacity: the full length comes back, the text is NUL-terminated and a prefix, nothing beyond is written. */
static void case_format_cut(void) {
    char full[1024], buf[1024];
    size_t len, cap;
    good(q("{'enabled':true,'latency':{'min':1,'max':20},'errorRate':5,'note':'\\u00e9 \\\" "
           "\\n','rules':[{'name':'a','match':{'headers':{'x':'y'}}}]}"));
    len = chaos_config_format(&cfg, full, sizeof full);
    CHECK_INT(chaos_config_format(&cfg, NULL, 0), len);
    for (cap = 1; cap <= len + 1; cap++) {
        size_t keep = cap - 1 < len ? cap - 1 : len;
        memset(buf, 'Z', sizeof buf);
        check_where("cap %u", (unsigned)cap);
        CHECK_INT(chaos_config_format(&cfg, buf, cap), len);
        CHECK(buf[keep] == 0 && !memcmp(buf, full, keep));
        CHECK(buf[cap] == 'Z');
    }
}

static unsigned long long random_state = 1;
static unsigned pick(unsigned below) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return (unsigned)((random_state >> 33) % below);
}

static const char *random_string(void) {
    static const char *const parts[] = {"a",        "/x/*",           "**",  "\\u00e9", "\\n",     "\\\"", "\\\\",
                                        "\xC3\xA9", "\\ud83d\\ude00", "%41", " ",       "\\u0001", "-"};
    static char buf[4][128];
    static int turn;
    char *s = buf[turn = (turn + 1) & 3];
    unsigned n = 1 + pick(5);
    s[0] = 0;
    while (n--) strcat(s, parts[pick(sizeof parts / sizeof parts[0])]);
    return s;
}

static size_t random_strings(char *s, const char *key) {
    unsigned n = 1 + pick(3), i;
    size_t at = (size_t)sprintf(s, ",\"%s\":[", key);
    for (i = 0; i < n; i++) at += (size_t)sprintf(s + at, "%s\"/%s\"", i ? "," : "", random_string());
    return at + (size_t)sprintf(s + at, "]");
}

static size_t random_fault(char *s) {
    size_t at = 0;
    unsigned a = pick(1000), b = a + pick(1000);
    s[0] = 0;
    switch (pick(6)) {
    case 0: at += (size_t)sprintf(s + at, ",\"latency\":%u", a); break;
    case 1: at += (size_t)sprintf(s + at, ",\"latency\":{\"max\":%u,\"min\":%u}", b, a); break;
    case 2: at += (size_t)sprintf(s + at, ",\"latency\":{\"mean\":%u,\"max\":%u}", a + 1, b + 1); break;
    case 3: at += (size_t)sprintf(s + at, ",\"latency\":{\"p50\":%u,\"p95\":%u,\"p99\":%u,\"max\":%u}", a, b, b + 5, b + 500); break;
    default: break;
    }
    if (pick(3) == 0) at += (size_t)sprintf(s + at, ",\"latencyRate\":%u", pick(101));
    if (pick(3) == 0) at += (size_t)sprintf(s + at, ",\"errorRate\":%u", pick(101));
    if (pick(3) == 0) at += (size_t)sprintf(s + at, ",\"errorStatus\":%u", 200 + pick(400));
    if (pick(3) == 0) at += (size_t)sprintf(s + at, ",\"retryAfter\":%u", pick(100));
    if (pick(3) == 0) at += (size_t)sprintf(s + at, ",\"errorBody\":\"%s\"", random_string());
    if (pick(4) == 0) {
        size_t one = pick(LATER_FAULT_KEYS);
        const char *json = later[one].json;
        if (later[one].parses) at += (size_t)sprintf(s + at, ",%.*s", (int)strlen(json) - 2, json + 1);
    }
    return at;
}

static size_t random_match(char *s) {
    size_t at, start;
    if (pick(2)) return s[0] = 0, 0;
    at = (size_t)sprintf(s, ",\"match\":{");
    start = at;
    if (pick(2)) at += random_strings(s + at, "paths");
    if (pick(2)) at += (size_t)sprintf(s + at, ",\"methods\":[\"GET\",\"PUT\"]");
    if (pick(2)) at += (size_t)sprintf(s + at, ",\"headers\":{\"x-a\":\"%s\",\"X-B\":\"*\"}", random_string());
    if (at > start) memmove(s + start, s + start + 1, at-- - start); /* the first comma */
    return at + (size_t)sprintf(s + at, "}");
}

static void case_format_random(void) {
    static char s[CHAOS_CONFIG_INPUT_MAX];
    int round;
    for (round = 0; round < 20000; round++) {
        unsigned rules = pick(3) ? 0 : pick(6), i;
        size_t at = (size_t)sprintf(s, "{\"enabled\":%s", pick(2) ? "true" : "false");
        if (pick(3) == 0) at += (size_t)sprintf(s + at, ",\"rules\":[");
        else rules = 99; /* no key at all */
        for (i = 0; rules != 99 && i < rules; i++) {
            at += (size_t)sprintf(s + at, "%s{\"name\":\"r%u\"", i ? "," : "", i);
            at += random_fault(s + at);
            at += random_match(s + at);
            at += (size_t)sprintf(s + at, "}");
        }
        if (rules != 99) at += (size_t)sprintf(s + at, "]");
        at += random_fault(s + at);
        at += random_match(s + at);
        if (pick(4) == 0) at += random_strings(s + at, "exclude");
        if (pick(4) == 0) at += random_strings(s + at, "instances");
        if (pick(4) == 0) at += (size_t)sprintf(s + at, ",\"canary\":%u", pick(101));
        if (pick(4) == 0) at += (size_t)sprintf(s + at, ",\"maxFaults\":%u", pick(100));
        if (pick(4) == 0) at += (size_t)sprintf(s + at, ",\"maxConcurrent\":%u", pick(100));
        if (pick(4) == 0) at += (size_t)sprintf(s + at, ",\"seed\":%u", pick(1u << 30));
        if (pick(4) == 0) at += (size_t)sprintf(s + at, ",\"dryRun\":true");
        if (pick(4) == 0) at += (size_t)sprintf(s + at, ",\"name\":\"%s\",\"owner\":\"%s\"", random_string(), random_string());
        if (pick(4) == 0) at += (size_t)sprintf(s + at, ",\"note\":\"%s\"", random_string());
        if (pick(6) == 0) at += (size_t)sprintf(s + at, ",\"expiresAt\":\"never\"");
        else if (pick(6) == 0) at += (size_t)sprintf(s + at, ",\"expiresAt\":%u", 1700000000u + pick(1u << 30));
        sprintf(s + at, "}");
        good(s);
    }
}

int main(int argc, char **argv) {
    check_begin(argc, argv);
    CHECK_RUN(case_defaults);
    CHECK_RUN(case_numbers);
    CHECK_RUN(case_values);
    CHECK_RUN(case_seed);
    CHECK_RUN(case_booleans);
    CHECK_RUN(case_strings);
    CHECK_RUN(case_lists);
    CHECK_RUN(case_exclude);
    CHECK_RUN(case_unknown_keys);
    CHECK_RUN(case_later);
    CHECK_RUN(case_latency_objects);
    CHECK_RUN(case_match);
    CHECK_RUN(case_rule_count);
    CHECK_RUN(case_rule_names);
    CHECK_RUN(case_rule_keys);
    CHECK_RUN(case_rule_inheritance);
    CHECK_RUN(case_key_order);
    CHECK_RUN(case_expires);
    CHECK_RUN(case_every_day);
    CHECK_RUN(case_not_an_object);
    CHECK_RUN(case_bad_json);
    CHECK_RUN(case_late_error);
    CHECK_RUN(case_deep);
    CHECK_RUN(case_input_size);
    CHECK_RUN(case_pool_size);
    CHECK_RUN(case_pool_exactly_full);
    CHECK_RUN(case_truncated);
    CHECK_RUN(case_format_text);
    CHECK_RUN(case_format_cut);
    CHECK_RUN(case_format_random);
    return check_end();
}

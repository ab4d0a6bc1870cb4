/* chaos-ssm - the operator's tool: starts, watches and stops an experiment whose config is in AWS SSM Parameter Store.

   Build:  cc -std=c99 -O2 -pthread -o chaos-ssm ssm.c       (chaos.h is one folder up; -DCHAOS_WITH_CURL -lcurl: no aws-cli)
   Start:  chaos-ssm put --name /shop/prod/chaos --value '{"enabled":true,"errorRate":5}' --expires 10m
   Ramp:   chaos-ssm set errorRate=10 latency=200 --name /shop/prod/chaos
   Stop:   chaos-ssm disable --name /shop/prod/chaos          (asks no questions; --path /shop/ stops all below)

   stdout carries data, stderr explanations. Exit code: 0 done; 1 could not (unreachable, denied, throttled, no way to SSM, a
   file); 2 bad usage; 3 refused (invalid config, too large, end too far or past, held by another experiment, or SSM itself
   refuses it); 4 nothing is stored under that name; 5 written, but somebody else wrote in between.
   What is stored is shown only when it is a chaos config (and by `get`): a wrong name must not put a password into a log. */
#define CHAOS_NO_PROXY
#define CHAOS_IMPLEMENTATION
#include "../chaos.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/select.h>
#include <time.h>
#include <unistd.h>

enum { DONE, COULD_NOT, USAGE, REFUSED, NOT_FOUND, LOST_RACE };            /* the exit codes */
enum { MAX_ARGS = 32, VALUE_MAX = 4096, READ_MS = 10000, STOP_MS = 5000 }; /* STOP_MS: a stop waits no longer to read */
#define MINUTE     60000LL
#define DAY        (24 * 60 * MINUTE)
#define LETTERS    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
#define OFF_CONFIG "{\"enabled\":false}" /* the safe default */

typedef struct settings {
    const char *program, *name, *path, *region, *endpoint, *value, *type, *request, *key, *instance;
    const char *headers[MAX_ARGS], *args[MAX_ARGS];
    int header_count, arg_count, expires, interval;
    bool no_expiry, force, version, help;
} settings;

typedef enum setting_kind { TEXT, LIST, TIME, SWITCH } setting_kind;

typedef struct setting {
    const char *flag, *value;
    setting_kind kind;
    size_t at;           /* offset in settings: const char *, headers, int (ms), or bool */
    const char *letters; /* of the commands that take it, "" = it stands alone */
    const char *help;
} setting;

/* The one table of flags: help and parser are made from it. */
#define AT(field) offsetof(settings, field)
static const setting table[] = {
    {"--name", "NAME", TEXT, AT(name), "pgsedxw", "the parameter"},
    {"--path", "/PREFIX/", TEXT, AT(path), "d", "instead of --name: every parameter below"},
    {"--region", "REGION", TEXT, AT(region), "pgsedxw", "[$AWS_REGION, $AWS_DEFAULT_REGION, the aws-cli's profile]"},
    {"--endpoint-url", "URL", TEXT, AT(endpoint), "pgsedxw", "[$AWS_ENDPOINT_URL_SSM, $AWS_ENDPOINT_URL, AWS's own]"},
    {"--value", "JSON", TEXT, AT(value), "px", "the config; @FILE reads a file, - reads stdin"},
    {"--type", "TYPE", TEXT, AT(type), "pse", "String or SecureString [as it is; String for a new one]"},
    {"--expires", "TIME", TIME, AT(expires), "pse", "write an end: so long from now, at most 24h [30m when there is none]"},
    {"--no-expiry", "", SWITCH, AT(no_expiry), "ps", "write \"expiresAt\":\"never\""},
    {"--force", "", SWITCH, AT(force), "pse", "overwrite the experiment of somebody else"},
    {"--request", "'GET /PATH'", TEXT, AT(request), "x", "the request to explain"},
    {"--header", "'NAME: VALUE'", LIST, AT(headers), "x", "a header of it; may be repeated"},
    {"--key", "KEY", TEXT, AT(key), "x", "its key, as with --key-header of chaos-proxy [each request rolls afresh]"},
    {"--instance", "ID", TEXT, AT(instance), "x", "the instance that gets it [one that takes part]"},
    {"--interval", "TIME", TIME, AT(interval), "w", "between two looks [5s]"},
    {"--version", "", SWITCH, AT(version), "", "print the version and the ways to SSM of this build"},
    {"--help", "", SWITCH, AT(help), "", "print this"},
};
#define SETTINGS (sizeof table / sizeof table[0])

/* A text that is, or should become, a config. */
typedef struct document {
    size_t len;
    chaos_error bad; /* code 0 = valid */
    chaos_config config;
    char text[CHAOS_CONFIG_INPUT_MAX + 2];
} document;

typedef struct stored {
    chaos_result result; /* of the reading */
    chaos_error err;
    chaos_ssm_value is;
    document doc;
} stored;

/* ---- saying things ---- */
/* One line; what others wrote must not move the reader's cursor. */
static void print_line(FILE *to, const char *prefix, const char *format, va_list args) {
    static char line[8192];
    char *p;
    vsnprintf(line, sizeof line, format, args);
    for (p = line; *p; p++)
        if ((unsigned char)*p < 0x20 || *p == 0x7f) *p = '?';
    fflush(stdout);
    fprintf(to, "%s%s\n", prefix, line);
}

#if defined(__GNUC__)
#define PRINTF(n) __attribute__((format(printf, n, n + 1)))
#else
#define PRINTF(n)
#endif

/* Explains, on stderr; returns the code, so that `return say(REFUSED, ...)` ends a command. */
PRINTF(2) static int say(int code, const char *format, ...) {
    va_list args;
    va_start(args, format);
    print_line(stderr, "chaos-ssm: ", format, args);
    va_end(args);
    return code;
}
#define FAIL(...) exit(say(__VA_ARGS__))

PRINTF(1) static void print(const char *format, ...) {
    va_list args;
    va_start(args, format);
    print_line(stdout, "", format, args);
    va_end(args);
}

static long long now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (long long)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

/* RFC 3339 in whole seconds, rounded up. */
static const char *utc(long long ms, char out[24]) {
    time_t seconds = (time_t)((ms + 999) / 1000);
    struct tm tm;
    if (!gmtime_r(&seconds, &tm) || !strftime(out, 24, "%Y-%m-%dT%H:%M:%SZ", &tm)) snprintf(out, 24, "an unknown time");
    return out;
}

/* "NAME in REGION (URL)". */
static const char *place(const settings *s, const char *name) {
    static char out[4096];
    snprintf(out, sizeof out, s->endpoint ? "%s in %s (%s)" : "%s in %s%.0s", name,
             s->region ? s->region : "the region of the aws-cli's profile", s->endpoint ? s->endpoint : "");
    return out;
}

/* What SSM, or the way to it, answered instead of doing it; and what follows from that. */
static int failed(const settings *s, const char *what, const char *name, const chaos_error *err, const char *then) {
    static const struct answer {
        chaos_result result;
        int code;
        const char *hint;
    } answers[] = {
        {CHAOS_ERR_NOT_FOUND, NOT_FOUND, "check --name, --region and --endpoint-url; `put` creates it"},
        {CHAOS_ERR_DENIED, COULD_NOT,
         "check the credentials; the role needs ssm:GetParameter, ssm:PutParameter, for --path ssm:GetParametersByPath"},
        {CHAOS_ERR_THROTTLED, COULD_NOT, "SSM asks for patience: try again in a few seconds"},
        {CHAOS_ERR_VALUE, REFUSED, "check --name, --type and the value"},
        {CHAOS_ERR_TOO_LARGE, REFUSED, "check --name and the value"},
        {CHAOS_ERR_ARGUMENT, USAGE, "check --name, --region and --endpoint-url"},
        {CHAOS_ERR_UNSUPPORTED, COULD_NOT, "install the aws-cli, or build with -DCHAOS_WITH_CURL -lcurl"},
        {CHAOS_ERR_UNREACHABLE, COULD_NOT, "check the network, the region, the endpoint and the credentials"}, /* the last: all else */
    };
    const struct answer *a = answers;
    while (a->result != err->code && a->result != CHAOS_ERR_UNREACHABLE) a++;
    return say(a->code, "cannot %s %s: %s (%s)%s; %s", what, place(s, name), chaos_result_text(err->code), err->text, then, a->hint);
}

/* ---- configs: reading, state ---- */
static bool parse(document *d) { return chaos_config_parse(&d->config, d->text, d->len, &d->bad) == CHAOS_OK; }

static void take(document *d, const char *text) {
    d->len = (size_t)snprintf(d->text, sizeof d->text, "%s", text);
    if (d->len >= sizeof d->text) d->len = sizeof d->text - 1; /* the parser says "too large" */
    parse(d);
}

static int invalid(const char *what, const document *d) {
    return say(REFUSED, "refused: %s: line %u, column %u: %s", what, d->bad.line, d->bad.column, d->bad.text);
}

/* JSON, @FILE or - (stdin). White space at the end is dropped. */
static void read_value(document *d, const char *value) {
    FILE *file = !strcmp(value, "-") ? stdin : *value == '@' ? fopen(value + 1, "rb") : NULL;
    if (!file && *value == '@') FAIL(COULD_NOT, "%s: cannot open: %s", value + 1, strerror(errno));
    if (!file) take(d, value);
    else d->len = fread(d->text, 1, sizeof d->text - 1, file);
    if (file && ferror(file)) FAIL(COULD_NOT, "%s: cannot read: %s", value, strerror(errno));
    if (file && file != stdin) fclose(file);
    while (d->len && isspace((unsigned char)d->text[d->len - 1])) d->len--;
    d->text[d->len] = 0;
    parse(d);
}

static chaos_ssm_desc parameter(const settings *s, const char *name, int timeout) {
    chaos_ssm_desc d;
    memset(&d, 0, sizeof d);
    d.name = name;
    d.region = s->region;
    d.endpoint = s->endpoint;
    d.timeout_ms = timeout;
    return d;
}

static void fetch(const settings *s, const char *name, int timeout, stored *out) {
    const chaos_ssm_desc desc = parameter(s, name, timeout);
    memset(&out->is, 0, sizeof out->is);
    out->result = chaos_ssm_get(&desc, out->doc.text, CHAOS_SSM_BUFFER, &out->is, &out->err);
    out->doc.len = out->result == CHAOS_OK ? out->is.len : 0;
    out->doc.text[out->doc.len] = 0;
    parse(&out->doc);
}

static void nap(int ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000L};
    nanosleep(&t, NULL);
}

/* Writes; when throttled again and again, for about 6 s: a stop must not be lost in a crowd. */
static chaos_result store(const settings *s, const char *name, const char *type, const document *d, chaos_ssm_value *is, chaos_error *err) {
    chaos_ssm_desc desc = parameter(s, name, READ_MS);
    chaos_result result;
    int wait;
    desc.type = type;
    memset(is, 0, sizeof *is);
    for (wait = 200; (result = chaos_ssm_put(&desc, d->text, d->len, is, err)) == CHAOS_ERR_THROTTLED && wait <= 3200; wait *= 2) nap(wait);
    return result;
}

static const char *text_of(const chaos_config *c, chaos_text t) { return t.len ? c->text + t.at : ""; }

/* When it ends: 0 = never. Without expiresAt there is the lease. */
static long long end_of(const chaos_config *c, long long modified) {
    if (c->expires_ms) return c->expires_ms > 0 ? c->expires_ms : 0;
    return (modified ? modified : now_ms()) + 60 * MINUTE;
}

static chaos_state state_of(const document *d, long long modified) {
    long long end = end_of(&d->config, modified);
    if (d->bad.code) return CHAOS_STATE_INVALID;
    if (!d->config.enabled) return CHAOS_STATE_OFF;
    if (end && end <= now_ms()) return CHAOS_STATE_EXPIRED;
    return d->config.dry_run ? CHAOS_STATE_DRY_RUN : CHAOS_STATE_ON;
}

/* The state in words: "on until 2026-01-31T12:00:00Z (9 min)". */
static const char *describe(const document *d, long long modified) {
    static char out[400];
    char when[24];
    chaos_state state = state_of(d, modified);
    const char *word = chaos_state_text(state), *lease = d->config.expires_ms ? "" : ", its lease";
    long long end = end_of(&d->config, modified), left = end - now_ms();
    if (state == CHAOS_STATE_INVALID)
        snprintf(out, sizeof out, "invalid, so it is off: line %u, column %u: %s", d->bad.line, d->bad.column, d->bad.text);
    else if (state == CHAOS_STATE_OFF || !end) snprintf(out, sizeof out, "%s%s", word, state == CHAOS_STATE_OFF ? "" : " without an end");
    else if (left <= 0) snprintf(out, sizeof out, "%s since %s%s", word, utc(end, when), lease);
    else snprintf(out, sizeof out, "%s until %s (%lld min%s)", word, utc(end, when), (left + MINUTE / 2) / MINUTE, lease);
    return out;
}

/* ---- editing: the top-level members of an object that chaos_config_parse has accepted; all else stays as it was written ---- */
typedef struct member {
    const char *key, *value, *end;
} member;

static const char *skip_space(const char *p) { return p + strspn(p, " \t\r\n"); }

static const char *skip_value(const char *p) {
    int depth = 0;
    do {
        if (*p == '"')
            for (p++; *p != '"'; p++) p += *p == '\\';
        depth += (*p == '{' || *p == '[') - (*p == '}' || *p == ']');
        p++;
    } while (depth > 0 || !strchr(":,]} \t\r\n", *p));
    return p;
}

/* The member that follows *at, which stands behind the brace or a comma. */
static bool next_member(const char **at, member *m) {
    m->key = skip_space(*at);
    if (*m->key == '}') return false;
    m->value = skip_space(skip_space(skip_value(m->key)) + 1);
    m->end = skip_value(m->value);
    *at = skip_space(m->end);
    if (**at == ',') ++*at;
    return true;
}

static bool is_escaped(const member *m) { return memchr(m->key, '\\', (size_t)(skip_value(m->key) - m->key)) != NULL; }

/* A config with keys like "\u0065nabled" becomes its canonical form: `edit` compares letters. */
static void spell_keys(document *d) {
    static char text[CHAOS_CONFIG_INPUT_MAX * 2];
    const char *p = skip_space(d->text) + 1;
    bool escaped = false;
    member m;
    while (next_member(&p, &m)) escaped = escaped || is_escaped(&m);
    if (!escaped) return;
    chaos_config_format(&d->config, text, sizeof text);
    take(d, text);
}

static bool splice(document *d, const char *from, const char *to, const char *text) {
    size_t at = (size_t)(from - d->text), cut = (size_t)(to - from), n = strlen(text);
    if (d->len - cut + n >= sizeof d->text) return false;
    memmove(d->text + at + n, to, d->len - at - cut + 1);
    memcpy(d->text + at, text, n);
    d->len += n - cut;
    return true;
}

/* Sets a key to a JSON value, or removes it (NULL). A new one is laid out like the last one. False = no room. */
static bool edit(document *d, const char *key, const char *value) {
    static char text[CHAOS_CONFIG_INPUT_MAX];
    const char *p = skip_space(d->text) + 1, *start = p, *gap;
    member m, last = {NULL, NULL, NULL};
    size_t n = strlen(key);
    for (; next_member(&p, &m); last = m) {
        if (strncmp(m.key + 1, key, n) || m.key[n + 1] != '"') continue;
        if (value) return splice(d, m.value, m.end, value);
        if (p[-1] == ',') return splice(d, m.key, skip_space(p), "");
        return splice(d, last.end ? last.end : m.key, m.end, "");
    }
    if (!value) return true;
    if (last.end) start = last.end;
    for (gap = last.key; gap && isspace((unsigned char)gap[-1]); gap--) {}
    n = (size_t)snprintf(text, sizeof text, "%s%.*s\"%s\":%s%s", gap ? "," : "", gap ? (int)(last.key - gap) : 0, gap ? gap : "", key,
                         gap && isspace((unsigned char)last.value[-1]) ? " " : "", value);
    return n < sizeof text && splice(d, start, start, text);
}

/* A VALUE of `set` as JSON: bare text is a string. */
static const char *as_json(const char *key, const char *value) {
    static char out[VALUE_MAX];
    chaos_error err;
    if (chaos_json_check(value, strlen(value), &err) == CHAOS_OK) return value;
    if (!strchr("{[\"", *value) && (size_t)snprintf(out, sizeof out, "\"%s\"", value) < sizeof out &&
        chaos_json_check(out, strlen(out), NULL) == CHAOS_OK)
        return out;
    FAIL(USAGE, "%s: neither JSON (column %u: %s) nor bare text: write a string as '\"text\"'", key, err.column, err.text);
}

/* ---- writing ---- */
/* One more word of a command line, quoted for a shell. */
static void print_word(const char *text) {
    bool plain = *text && !text[strspn(text, LETTERS "0123456789_./:@%+,-")];
    printf(plain ? " %s" : " '", text);
    for (; !plain && *text; text++) printf(*text == '\'' ? "'\\''" : "%c", *text);
    if (!plain) putchar('\'');
}

static void print_rollback(const settings *s) {
    const char *words[] = {s->program, "disable", "--name", s->name, "--region", s->region, "--endpoint-url", s->endpoint};
    size_t i;
    printf("rollback:");
    for (i = 0; i < 8; i += 2) {
        if (words[i + 1]) print_word(words[i]);
        if (words[i + 1]) print_word(words[i + 1]);
    }
    putchar('\n');
}

static void print_change(const stored *old, const document *new) {
    if (old->result == CHAOS_OK && !old->doc.bad.code) printf("old: %s\n", old->doc.text);
    else if (old->result == CHAOS_OK) printf("old: %lu bytes that are no chaos config, not shown\n", (unsigned long)old->doc.len);
    else printf("old: %s\n", old->result == CHAOS_ERR_NOT_FOUND ? "none" : "not readable");
    printf("new: %s\n", new->text);
}

/* Sets "expiresAt" as the flags say; one that is on and has no end gets 30 minutes. */
static bool settle_end(const settings *s, document *d) {
    bool missing = d->config.enabled && !d->config.expires_ms && !s->expires && !s->no_expiry;
    char when[24], quoted[32] = "\"never\"";
    if (!missing && !s->expires && !s->no_expiry) return true;
    if (!s->no_expiry) snprintf(quoted, sizeof quoted, "\"%s\"", utc(now_ms() + (missing ? 30 * MINUTE : s->expires), when));
    if (missing) say(DONE, "no end was given: added \"expiresAt\":%s, 30 minutes from now (--expires sets it)", quoted);
    return edit(d, "expiresAt", quoted) && parse(d);
}

/* All that is asked of the new config itself. One that is off is not asked for its end; nor one that replaces what runs without
   (old: what `set` changes). */
static int settle(const settings *s, document *d, const document *old) {
    bool endless = old && old->config.enabled && old->config.expires_ms < 0;
    long long now = now_ms(), end;
    char when[24];
    if (d->bad.code || !settle_end(s, d)) return invalid("the config is invalid", d);
    end = d->config.enabled ? d->config.expires_ms : now + MINUTE;
    if (end < 0 && !s->no_expiry && !endless)
        return say(REFUSED, "refused: \"expiresAt\" is \"never\": give --expires 10m, or --no-expiry if it is meant to run until stopped");
    if (end > now + DAY + 1000)
        return say(REFUSED, "refused: the end, %s, is more than 24 h ahead: give --expires, at most 24h", utc(end, when));
    if (end >= 0 && end <= now)
        return say(REFUSED, "refused: the end, %s, is past, so nothing would happen: give --expires 10m", utc(end, when));
    if (d->len > VALUE_MAX && (d->config.enabled || !old))
        return say(REFUSED, "refused: it has %lu bytes, SSM takes %d: shorten it", (unsigned long)d->len, VALUE_MAX);
    if (strstr(d->text, "{{")) return say(REFUSED, "refused: \"{{\" stands in the value, SSM forbids that: write it otherwise");
    return DONE;
}

/* Is the parameter held by an experiment with another owner or name? */
static int held(const settings *s, const stored *old, const document *new) {
    const chaos_config *a = &old->doc.config, *b = &new->config;
    chaos_state state = state_of(&old->doc, old->is.modified_ms);
    const char *name = text_of(a, a->name), *owner = text_of(a, a->owner);
    if (old->result != CHAOS_OK || (state != CHAOS_STATE_ON && state != CHAOS_STATE_DRY_RUN)) return DONE;
    if (!strcmp(name, text_of(b, b->name)) && !strcmp(owner, text_of(b, b->owner))) return DONE;
    return say(REFUSED, "refused: %s is held by another experiment (name '%s', owner '%s'), %s: ask them, wait for the end, or --force",
               place(s, s->name), name, owner, describe(&old->doc, old->is.modified_ms));
}

/* The way of put, set and enable. old: what is stored. */
static int write_config(const settings *s, const stored *old, document *new) {
    chaos_ssm_value is;
    chaos_error err;
    bool none = old->result == CHAOS_ERR_NOT_FOUND, known = none || old->result == CHAOS_OK;
    if (new->config.enabled && !s->force && !known)
        return failed(s, "read", s->name, &old->err,
                      ", so nothing is written: another experiment may hold it (--force writes all the same)");
    if (new->config.enabled && !s->force && held(s, old, new)) return REFUSED;
    if (store(s, s->name, s->type ? s->type : none ? "String" : NULL, new, &is, &err) != CHAOS_OK)
        return failed(s, "write", s->name, &err, "");
    say(DONE, "wrote version %llu of %s: %s", is.version, place(s, s->name), describe(new, 0));
    print_change(old, new);
    print_rollback(s);
    if (!known || is.version == old->is.version + 1) return DONE;
    return say(LOST_RACE,
               "lost a race: %llu was the version before, yours is %llu and in force: somebody else wrote in between. Look at theirs "
               "(get --name %s:%llu), talk to them, then put it again or disable",
               old->is.version, is.version, s->name, old->is.version + 1);
}

/* ---- commands ---- */
static int run_put(const settings *s) {
    static stored old;
    static document d;
    int code;
    if (!s->value) return say(USAGE, "put needs --value JSON, --value @FILE or --value -");
    read_value(&d, s->value);
    if ((code = settle(s, &d, NULL)) != DONE) return code;
    fetch(s, s->name, d.config.enabled ? READ_MS : STOP_MS, &old);
    return write_config(s, &old, &d);
}

static int run_get(const settings *s) {
    static stored old;
    char when[24];
    fetch(s, s->name, READ_MS, &old);
    if (old.result != CHAOS_OK) return failed(s, "read", s->name, &old.err, "");
    printf("%s\n", old.doc.text);
    return say(DONE, "%s: version %llu, %s, by %s, changed %s, %s", place(s, s->name), old.is.version, old.is.type, old.is.way,
               old.is.modified_ms ? utc(old.is.modified_ms, when) : "at an unknown time", describe(&old.doc, old.is.modified_ms));
}

/* Edits what is stored. What turns it off works on anything that is stored, readable or not. */
static int run_set(const settings *s) {
    static stored old;
    static document d;
    bool off = false;
    int i, code;
    if (!s->arg_count) return say(USAGE, "set needs KEY=VALUE: chaos-ssm set errorRate=10 --name NAME");
    for (i = 0; i < s->arg_count; i++) {
        size_t n = strspn(s->args[i], LETTERS);
        if (!n || n > 32 || s->args[i][n] != '=') return say(USAGE, "'%s' is not KEY=VALUE, KEY a top-level key of the config", s->args[i]);
        off = off || !strcmp(s->args[i], "enabled=false");
    }
    fetch(s, s->name, off ? STOP_MS : READ_MS, &old);
    if (old.result == CHAOS_ERR_NOT_FOUND || (old.result != CHAOS_OK && !off)) return failed(s, "read", s->name, &old.err, "");
    d = old.doc;
    if (d.bad.code && !off) return invalid("what is stored is invalid; put a whole config", &d);
    if (d.bad.code) take(&d, OFF_CONFIG);
    spell_keys(&d);
    for (i = 0; i < s->arg_count; i++) {
        const char *value = strchr(s->args[i], '=') + 1;
        char key[40];
        snprintf(key, sizeof key, "%.*s", (int)(value - 1 - s->args[i]), s->args[i]);
        if (!edit(&d, key, *value ? as_json(key, value) : NULL)) return say(REFUSED, "refused: %s: the config grows too large", key);
    }
    parse(&d);
    if ((code = settle(s, &d, &old.doc)) != DONE) return code;
    return write_config(s, &old, &d);
}

static int run_enable(const settings *s) {
    settings change = *s;
    if (!s->expires) return say(USAGE, "enable needs a fresh end: --expires 10m");
    change.args[0] = "enabled=true";
    change.arg_count = 1;
    return run_set(&change);
}

/* Of a text that this version refuses: may another one take it for an order to be on? */
static bool could_be_on(const document *d) {
    const char *p = skip_space(d->text);
    member m;
    if (*p != '{') return false;
    if (chaos_json_check(d->text, d->len, NULL) != CHAOS_OK) return strstr(d->text, "enabled") || strchr(d->text, '\\');
    for (p++; next_member(&p, &m);)
        if (!strncmp(m.key, "\"enabled\"", 9) || is_escaped(&m)) return true;
    return false;
}

/* The rollback of one parameter: nothing but SSM itself can keep it from writing. found: below a path, where other things may
   be stored too; what no version of chaos.h can take for an order to be on stays as it is. */
static int disable(const settings *s, const char *name, bool found) {
    static int patience = 30; /* for all below a path, 6 s: no stop is late because others were */
    static stored old;
    static document d;
    chaos_ssm_value is;
    chaos_error err;
    chaos_result result;
    bool kept;
    fetch(s, name, STOP_MS, &old);
    for (; found && old.result == CHAOS_ERR_THROTTLED && patience > 0; patience--) { /* it may be somebody's password */
        nap(200);
        fetch(s, name, STOP_MS, &old);
    }
    if (old.result == CHAOS_ERR_NOT_FOUND)
        return say(NOT_FOUND, "nothing is stored under %s: processes that read it are off (check --name, --region, --endpoint-url)",
                   place(s, name));
    if (found && old.result == CHAOS_OK && old.doc.bad.code && !could_be_on(&old.doc))
        return say(DONE, "left as it is: %s is no chaos config; a process that reads it is off", place(s, name));
    d = old.doc;
    if (!d.bad.code) spell_keys(&d);
    kept = !d.bad.code && edit(&d, "enabled", "false") && parse(&d);
    if (old.result != CHAOS_OK) failed(s, "read", name, &old.err, ", so the safe default is written");
    else if (!kept) say(DONE, "%s is invalid (%s), so the safe default is written", place(s, name), old.doc.bad.text);
    if (!kept) take(&d, OFF_CONFIG);
    result = store(s, name, NULL, &d, &is, &err);
    if (kept && (result == CHAOS_ERR_VALUE || result == CHAOS_ERR_TOO_LARGE)) {
        failed(s, "write", name, &err, ", so the safe default is written");
        take(&d, OFF_CONFIG);
        result = store(s, name, NULL, &d, &is, &err);
    }
    if (result != CHAOS_OK) return failed(s, "write", name, &err, "");
    print_change(&old, &d);
    say(DONE, "wrote version %llu of %s: off; processes follow within their TTL, 10 s while on unless set", is.version, place(s, name));
    if (old.result != CHAOS_OK || is.version == old.is.version + 1) return DONE;
    return say(DONE, "somebody else wrote version %llu in between; off is in force", old.is.version + 1);
}

static int run_disable(const settings *s) {
    static char names[4 * CHAOS_SSM_BUFFER];
    const chaos_ssm_desc desc = parameter(s, s->path, READ_MS);
    chaos_ssm_value is;
    chaos_error err;
    char *name, *end;
    int total = 0, bad = 0, code;
    if (s->name) return disable(s, s->name, false);
    memset(&is, 0, sizeof is);
    if (chaos_ssm_list(&desc, names, sizeof names, &is, &err) != CHAOS_OK)
        bad = failed(s, "list all below", s->path, &err, " (--name NAME stops one without a list)") != DONE;
    names[is.len] = 0; /* those that were listed before it failed are stopped too */
    for (name = names; *name; name = end) {
        end = name + strcspn(name, "\n");
        if (*end) *end++ = 0;
        total++;
        code = disable(s, name, true);
        bad += code != DONE && code != NOT_FOUND; /* gone since it was listed: off */
    }
    if (!total && !bad) return say(NOT_FOUND, "nothing is stored below %s (check --path, --region, --endpoint-url)", place(s, s->path));
    return say(bad ? COULD_NOT : DONE, "%d found below %s: %s", total, place(s, s->path),
               bad ? "not all are off, see above: repeat this, or stop them one by one" : "all are off");
}

static int run_check(const settings *s) {
    static document d;
    static char text[CHAOS_CONFIG_INPUT_MAX * 2], file[4096];
    const char *arg = s->arg_count == 1 ? s->args[0] : "";
    bool json = *skip_space(arg) == '{', direct = json || *arg == '@' || !strcmp(arg, "-");
    if (!*arg) return say(USAGE, "check needs one FILE, JSON or - (stdin)");
    snprintf(file, sizeof file, "@%s", arg);
    read_value(&d, direct ? arg : file);
    if (d.bad.code) return invalid(json ? "the config" : arg, &d);
    chaos_config_format(&d.config, text, sizeof text);
    printf("%s\n", text);
    if (d.len > VALUE_MAX) say(DONE, "note: it has %lu bytes, SSM takes %d", (unsigned long)d.len, VALUE_MAX);
    if (strstr(d.text, "{{")) say(DONE, "note: \"{{\" stands in it, SSM forbids that");
    return DONE;
}

/* ---- explain: the rolls are those of the manual of chaos.h ---- */
static unsigned long long mix(unsigned long long x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static unsigned long long hash(const char *text) {
    unsigned long long h = 0xcbf29ce484222325ull;
    for (; *text; text++) h = (h ^ (unsigned char)*text) * 0x100000001b3ull;
    return h;
}

/* The upper half of a hash, scaled to 0..n-1. */
static unsigned scaled(unsigned long long x, unsigned n) { return (unsigned)((x >> 32) * n >> 32); }

static const char *find_header(void *user, const char *name, size_t *len) {
    const settings *s = *(const settings **)user;
    size_t n = strlen(name);
    int i;
    for (i = 0; i < s->header_count; i++) {
        if (strncasecmp(s->headers[i], name, n) || s->headers[i][n] != ':') continue;
        name = skip_space(s->headers[i] + n + 1);
        *len = strlen(name);
        return name;
    }
    return NULL;
}

/* Canary and instances, as an instance that opens this config sees them. */
static bool takes_part(const chaos_config *config, const char *instance) {
    static char text[CHAOS_CONFIG_INPUT_MAX * 2];
    static chaos_config open;
    chaos_desc desc;
    chaos_report report;
    chaos *c;
    open = *config;
    open.expires_ms = -1;
    chaos_config_format(&open, text, sizeof text);
    memset(&desc, 0, sizeof desc);
    desc.config = text;
    desc.instance = instance;
    desc.quiet = desc.no_thread = true;
    unsetenv("CHAOS_DISABLE"); /* the question is not what this shell would do */
    if (!(c = chaos_open(&desc, NULL))) FAIL(COULD_NOT, "cannot open the config: out of memory");
    chaos_stats(c, &report);
    chaos_close(c);
    return report.state != CHAOS_STATE_NOT_CANARY;
}

/* c with every request that matches failed: what then still passes was not matched, or is excluded. */
static chaos_verdict probe(const chaos_config *c, const chaos_request *req, bool rules, bool exclude) {
    static chaos_config all;
    int i;
    all = *c;
    all.fault.error_rate = 100;
    for (i = 0; i < all.rule_count; i++) all.rules[i].fault.error_rate = 100;
    if (!rules) all.rule_count = 0;
    if (!exclude) all.default_exclude = false, all.exclude.count = 0;
    return chaos_judge(&all, req, 0);
}

/* "error 503 after the handler". */
static const char *fault_text(int kind, unsigned status, bool after, char out[64]) {
    snprintf(out, 64, status ? "%s %u%s" : "%s%.0u%s", chaos_kind_text(kind), status, after ? " after the handler" : "");
    return out;
}

static void print_chances(const chaos_fault *f) {
    static const char *const forms[] = {"%u ms", "%u to %u ms", "mean %u, at most %u ms", "p50 %u, p95 %u, p99 %u, at most %u ms"};
    double delayed = f->latency_kind || f->latency[0] ? (100 - f->error_rate) * f->latency_rate / 100.0 : 0;
    char fault[64], latency[80];
    snprintf(latency, sizeof latency, forms[f->latency_kind], f->latency[0], f->latency[1], f->latency[2], f->latency[3]);
    print("chances: %u %% %s, %g %% delayed by %s, %g %% neither%s", f->error_rate,
          fault_text(f->error_mode, f->error_mode == CHAOS_STATUS ? f->error_status : 0, f->error_after, fault), delayed, latency,
          100 - f->error_rate - delayed, f->bandwidth ? "; replies that are not failed are paced" : "");
}

static void print_roll(const char *what, unsigned roll, const char *key, unsigned rate) {
    print("roll: %s %u of 0..9999, %sbelow the %u of %s %u", what, roll, roll < rate * 100 ? "" : "not ", rate * 100, key, rate);
}

static void print_rolls(const chaos_config *c, const chaos_fault *f, const chaos_verdict *v) {
    unsigned long long rule = v->rule ? hash(text_of(c, c->rules[v->rule - 1].name)) : 0;
    print_roll("error", v->roll, "errorRate", f->error_rate);
    if (v->roll >= f->error_rate * 100u && f->latency_rate < 100)
        print_roll("delay", scaled(mix((mix(c->seed ^ rule) ^ v->key) + 2 * 0xd1342543de82ef95ull), 10000), "latencyRate", f->latency_rate);
}

/* Which instances take part; false = this one does not. */
static bool explain_instance(const settings *s, const chaos_config *c) {
    bool in = !s->instance || takes_part(c, s->instance);
    if (s->instance)
        print("instance: %s; its canary slot is %u of 0..99, canary %u takes those below it%s", in ? "takes part" : "does not take part",
              scaled(mix(hash(s->instance)), 100), c->canary, c->instances.count ? "; `instances` must fit too" : "");
    else if (c->canary < 100 || c->instances.count) print("instance: not every one takes part (--instance ID tells)");
    return in;
}

/* The way of one request through c, as if it were on; gate: why it passes all the same, NULL = it does not. */
static void explain(const settings *s, chaos_config *c, const chaos_request *req, const char *gate) {
    chaos_verdict v = probe(c, req, true, false);
    const chaos_fault *f = v.rule ? &c->rules[v.rule - 1].fault : &c->fault;
    char fault[64];
    if (!explain_instance(s, c)) gate = "this instance does not take part";
    if (!v.kind) {
        print("match: none: %s", probe(c, req, false, false).kind ? "no rule fits" : "the top-level match does not fit");
        print("verdict: pass");
        return;
    }
    if (v.rule) print("match: rule %u, '%s'", v.rule, text_of(c, c->rules[v.rule - 1].name));
    else print("match: the top level, there are no rules");
    if (!probe(c, req, true, true).kind) print("exclude: %s", gate = "exclude spares this request");
    print_chances(f);
    c->default_exclude = false;
    c->exclude.count = 0;
    v = chaos_judge(c, req, s->key ? hash(s->key) : 0);
    fault_text(v.kind, v.status, v.after, fault);
    if (s->key && c->has_seed) print_rolls(c, f, &v);
    else if (s->key) print("roll: without a seed each process draws its own, so this key may fail in one and not in another");
    else print("roll: each request rolls afresh (--key KEY tells of one key)");
    if (!s->key || !c->has_seed) snprintf(fault, sizeof fault, "by these chances");
    if (gate) print("verdict: pass, because %s; else: %s", gate, fault);
    else if (v.delay_us && s->key && c->has_seed) print("verdict: %s, %g ms", fault, v.delay_us / 1e3);
    else print("verdict: %s", fault);
}

static int run_explain(const settings *s) {
    static stored from;
    static char method[32], path[4096];
    chaos_request req;
    const char *gate = NULL;
    chaos_state state;
    int i;
    if (!s->request || sscanf(s->request, "%31[A-Z] %4095[!-~]", method, path) != 2 || *path != '/')
        return say(USAGE, "explain needs --request 'GET /path'");
    for (i = 0; i < s->header_count; i++)
        if (!strchr(s->headers[i], ':')) return say(USAGE, "--header: '%s' is not 'Name: value'", s->headers[i]);
    if (!s->name == !s->value) return say(USAGE, "explain needs --name NAME or --value JSON, and not both");
    if (s->value) read_value(&from.doc, s->value);
    else fetch(s, s->name, READ_MS, &from);
    if (s->name && from.result != CHAOS_OK) return failed(s, "read", s->name, &from.err, "");
    if (from.doc.bad.code) return invalid("the config is invalid, so it is off", &from.doc);
    state = state_of(&from.doc, from.is.modified_ms);
    if (state != CHAOS_STATE_ON) gate = state == CHAOS_STATE_DRY_RUN ? "it is a dry run" : "the config is not on";
    print("state: %s", describe(&from.doc, from.is.modified_ms));
    from.doc.config.enabled = true;
    memset(&req, 0, sizeof req);
    req.method = method;
    req.path = path;
    req.header = find_header;
    req.user = &s;
    explain(s, &from.doc.config, &req, gate);
    return DONE;
}

/* ---- watch ---- */
static volatile sig_atomic_t stopping;

static void on_stop(int sig) {
    (void)sig;
    if (stopping) _exit(DONE); /* asked twice: not even the answer of SSM is waited for */
    stopping = 1;
}

static int run_watch(const settings *s) {
    static stored now;
    const int ms = s->interval ? s->interval : 5000;
    const struct timespec pause = {ms / 1000, ms % 1000 * 1000000L};
    char id[64], last[64] = "", when[24]; /* id: what distinguishes two looks */
    struct sigaction act;
    sigset_t open;
    sigemptyset(&act.sa_mask);
    act.sa_flags = 0;
    act.sa_handler = on_stop;
    sigaddset(&act.sa_mask, SIGINT);
    sigaddset(&act.sa_mask, SIGTERM);
    sigaction(SIGINT, &act, NULL);
    sigaction(SIGTERM, &act, NULL);
    while (!stopping) {
        fetch(s, s->name, STOP_MS, &now);
        if (now.result != CHAOS_OK) snprintf(id, sizeof id, "%s", chaos_result_text(now.result));
        else snprintf(id, sizeof id, "version %llu %d", now.is.version, (int)state_of(&now.doc, now.is.modified_ms));
        if (!stopping && strcmp(id, last)) {
            if (now.result != CHAOS_OK) print("%s %s: %s", utc(now_ms(), when), id, now.err.text);
            else print("%s version %llu, %s", utc(now_ms(), when), now.is.version, describe(&now.doc, now.is.modified_ms));
            fflush(stdout);
            strcpy(last, id);
        }
        pthread_sigmask(SIG_BLOCK, &act.sa_mask, &open); /* from here on a signal ends the pause, none is missed */
        if (!stopping) pselect(0, NULL, NULL, NULL, &pause, &open);
        pthread_sigmask(SIG_SETMASK, &open, NULL);
    }
    return DONE;
}

/* ---- the command line ---- */
typedef struct command {
    const char *name;
    char letter;
    int (*run)(const settings *s);
    const char *usage, *help;
} command;

static const command commands[] = {
    {"put", 'p', run_put, "--name NAME --value JSON", "validate and write a config"},
    {"get", 'g', run_get, "--name NAME", "print the value; version, date and state go to stderr"},
    {"set", 's', run_set, "KEY=VALUE.. --name NAME", "change these keys, keep the rest; KEY= removes one"},
    {"enable", 'e', run_enable, "--name NAME --expires TIME", "switch on what is stored, with a fresh end"},
    {"disable", 'd', run_disable, "--name NAME | --path /PREFIX/", "the rollback: off at once, whatever is stored"},
    {"check", 'c', run_check, "FILE | JSON | -", "validate a config, print its canonical form"},
    {"explain", 'x', run_explain, "--request .. (--name | --value)", "why a request fails, or does not"},
    {"watch", 'w', run_watch, "--name NAME", "print each change of version and state until stopped"},
};
#define COMMANDS (sizeof commands / sizeof commands[0])

static int print_help(void) {
    size_t i, c;
    printf("usage: chaos-ssm COMMAND ...\n\n");
    for (c = 0; c < COMMANDS; c++) printf("  %-8s%-33s%s\n", commands[c].name, commands[c].usage, commands[c].help);
    printf("\nTIME is 250ms, 10s, 5m, 2h or milliseconds. Before the colon: the commands that take the flag; in brackets: what holds "
           "without it.\n\n");
    for (i = 0; i < SETTINGS; i++) {
        int n = printf("  %s %s", table[i].flag, table[i].value);
        printf("%*s", 25 - n, "");
        for (c = 0; c < COMMANDS; c++)
            if (strchr(table[i].letters, commands[c].letter)) printf(" %s", commands[c].name);
        printf("%s %s\n", *table[i].letters ? ":" : "", table[i].help);
    }
    printf("\nExit code: 0 done; 1 could not (unreachable, denied, throttled, no way to SSM, a file); 2 bad usage; 3 refused (invalid,\n"
           "too large, `{{`, end past or over 24 h ahead, held by another experiment, or refused by SSM); 4 nothing stored under that\n"
           "name; 5 written, but somebody else wrote in between. What is off is never asked for its end or its holder.\n\n"
           "  chaos-ssm put --name /shop/prod/chaos --value '{\"enabled\":true,\"errorRate\":5,\"owner\":\"ana\"}' --expires 10m\n"
           "  chaos-ssm disable --name /shop/prod/chaos\n");
    return DONE;
}

/* 250ms, 10s, 5m, 2h or milliseconds; -1 = not a time, or more than an int holds. */
static int duration(const char *text) {
    static const char *const units[] = {"", "ms", "s", "m", "h"};
    static const int sizes[] = {1, 1, 1000, 60000, 3600000};
    long long n = 0;
    const char *p = text;
    int i = 0;
    while (isdigit((unsigned char)*p) && n <= INT_MAX) n = n * 10 + (*p++ - '0');
    while (i < 5 && strcmp(p, units[i])) i++;
    return p == text || i == 5 || n * sizes[i] > INT_MAX ? -1 : (int)(n * sizes[i]);
}

static void set(settings *out, const setting *f, const char *value) {
    void *at = (char *)out + f->at;
    int ms = f->kind == TIME ? duration(value) : 0;
    if (f->kind == TIME && ms < 100) FAIL(USAGE, "%s: '%s' is no time of 100 ms or more: write 10s, 5m, 2h", f->flag, value);
    if (f->kind == LIST && out->header_count == MAX_ARGS) FAIL(USAGE, "%s: at most %d", f->flag, MAX_ARGS);
    switch (f->kind) {
    case TEXT: *(const char **)at = value; break;
    case LIST: out->headers[out->header_count++] = value; break;
    case TIME: *(int *)at = ms; break;
    case SWITCH: *(bool *)at = true; break;
    }
}

/* Flags as --flag VALUE or --flag=VALUE, anywhere behind the command; all else is an argument of it. */
static void read_settings(settings *out, const command *c, int argc, char **argv) {
    int i;
    for (i = c ? 2 : 1; i < argc; i++) {
        const char *flag = argv[i], *value = strchr(flag, '=');
        size_t len = strcspn(flag, "=");
        const setting *f = table;
        if (strncmp(flag, "--", 2)) {
            if (!c) FAIL(USAGE, "'%s' is no command (see --help)", flag);
            if (!strchr("sc", c->letter) || out->arg_count == MAX_ARGS) FAIL(USAGE, "%s: unexpected argument '%s'", c->name, flag);
            out->args[out->arg_count++] = flag;
            continue;
        }
        while (f < table + SETTINGS && (strlen(f->flag) != len || strncmp(f->flag, flag, len))) f++;
        if (f == table + SETTINGS) FAIL(USAGE, "unknown flag '%.*s' (see --help)", (int)len, flag);
        if (*f->letters && !(c && strchr(f->letters, c->letter)))
            FAIL(USAGE, "%s does not go with %s (see --help)", f->flag, c ? c->name : "no command");
        if (!*f->value && value) FAIL(USAGE, "%s takes no value", f->flag);
        value = value ? value + 1 : *f->value && i + 1 < argc ? argv[++i] : "";
        if (*f->value && !*value) FAIL(USAGE, "%s needs a value: %s %s", f->flag, f->flag, f->value);
        set(out, f, value);
    }
}

static const char *variable(const char *a, const char *b) {
    const char *first = getenv(a), *second = getenv(b);
    return first && *first ? first : second && *second ? second : NULL;
}

/* What the flags of one command ask of each other; then what the environment says where they do not. */
static void complete(settings *s, const command *c) {
    const char *ignore = getenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS");
    if (strchr("pgsew", c->letter) && !s->name) FAIL(USAGE, "%s needs --name NAME", c->name);
    if (c->letter == 'd' && !s->name == !s->path) FAIL(USAGE, "disable needs --name NAME or --path /PREFIX/, and not both");
    if (s->path && *s->path != '/') FAIL(USAGE, "--path: '%s' does not begin with /", s->path);
    if (s->type && strcmp(s->type, "String") && strcmp(s->type, "SecureString"))
        FAIL(USAGE, "--type: '%s' is not String or SecureString", s->type);
    if (s->expires && s->no_expiry) FAIL(USAGE, "--expires and --no-expiry contradict each other");
    if (!s->region) s->region = variable("AWS_REGION", "AWS_DEFAULT_REGION");
    if (!s->endpoint && !(ignore && !strcasecmp(ignore, "true"))) s->endpoint = variable("AWS_ENDPOINT_URL_SSM", "AWS_ENDPOINT_URL");
}

int main(int argc, char **argv) {
    static settings s;
    const command *c = NULL;
    size_t i;
    for (i = 0; i < COMMANDS && argc > 1; i++)
        if (!strcmp(commands[i].name, argv[1])) c = &commands[i];
    s.program = argv[0];
    signal(SIGPIPE, SIG_IGN); /* nobody who stops reading may keep a stop from being written */
    read_settings(&s, c, argc, argv);
    if (s.help) return print_help();
    if (s.version) return printf("chaos-ssm %s\nconfig sources: %s\n", chaos_version(), chaos_sources()) < 0;
    if (!c) FAIL(USAGE, "a command is missing: put get set enable disable check explain watch (see --help)");
    complete(&s, c);
    return c->run(&s);
}

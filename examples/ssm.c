/* chaos-ssm - the operator's tool: starts, watches and stops an experiment whose config is in AWS SSM Parameter Store.

   Build:  cc -std=c99 -O2 -pthread -o chaos-ssm ssm.c            (chaos.h is one folder up; -DCHAOS_WITH_CURL -lcurl: no aws-cli)
   Start:  chaos-ssm put --name /shop/prod/chaos --value '{"enabled":true,"errorRate":5}' --expires 10m
   Ramp:   chaos-ssm set errorRate=10 latency=200 --name /shop/prod/chaos
   Stop:   chaos-ssm disable --name /shop/prod/chaos               (asks no questions; --path /shop/ stops all below)

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

enum { DONE, COULD_NOT, USAGE, REFUSED, NOT_FOUND, LOST_RACE }; /* the exit codes */
enum { MAX_ARGS = 32, READ_MS = 10000, STOP_READ_MS = 5000, VALUE_MAX = 4096 };
#define MINUTE 60000LL
#define DAY    (24 * 60 * MINUTE)

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
    {"--expires", "TIME", TIME, AT(expires), "pse", "write an end: this long from now, at most 24h [30m when there is none]"},
    {"--no-expiry", "", SWITCH, AT(no_expiry), "ps", "write \"expiresAt\":\"never\""},
    {"--force", "", SWITCH, AT(force), "pse", "overwrite the experiment of somebody else"},
    {"--request", "'GET /PATH'", TEXT, AT(request), "x", "the request to explain"},
    {"--header", "'NAME: VALUE'", LIST, AT(headers), "x", "a header of it; may be repeated"},
    {"--key", "KEY", TEXT, AT(key), "x", "its key, as with --key-header of chaos-proxy"},
    {"--instance", "ID", TEXT, AT(instance), "x", "the instance that gets it"},
    {"--interval", "TIME", TIME, AT(interval), "w", "between two looks [5s]"},
    {"--version", "", SWITCH, AT(version), "", "print the version and the ways to SSM of this build"},
    {"--help", "", SWITCH, AT(help), "", "print this"},
};
#define SETTINGS (sizeof table / sizeof table[0])

typedef struct command {
    const char *name;
    char letter;
    int (*run)(const settings *s);
    const char *usage, *help;
} command;

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

#if defined(__GNUC__)
#define PRINTF(n) __attribute__((format(printf, n, n + 1)))
#else
#define PRINTF(n)
#endif

/* ---- saying things ---- */
/* One line on stderr; returns the code, so that `return say(REFUSED, ...)` ends a command. */
PRINTF(2) static int say(int code, const char *format, ...) {
    va_list args;
    fflush(stdout);
    fprintf(stderr, "chaos-ssm: ");
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\n");
    return code;
}

#define FAIL(...) exit(say(__VA_ARGS__))

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

static const char *span(long long ms, char out[32]) {
    if (ms < 0) ms = -ms;
    if (ms < 2 * MINUTE) snprintf(out, 32, "%lld s", (ms + 500) / 1000);
    else if (ms < 120 * MINUTE) snprintf(out, 32, "%lld min", (ms + MINUTE / 2) / MINUTE);
    else snprintf(out, 32, "%lld h", (ms + 30 * MINUTE) / (60 * MINUTE));
    return out;
}

/* "NAME in REGION (URL)". */
static const char *place(const settings *s, const char *name) {
    static char out[2400];
    snprintf(out, sizeof out, "%.1200s in %.64s%s%.1024s%s", name, s->region ? s->region : "the region of the aws-cli's profile",
             s->endpoint ? " (" : "", s->endpoint ? s->endpoint : "", s->endpoint ? ")" : "");
    return out;
}

/* A text of a config for the terminal: control bytes are not let through. */
static const char *label(const chaos_config *c, chaos_text t, char out[72]) {
    size_t i;
    for (i = 0; i < t.len && i < 71; i++)
        out[i] = (char)((unsigned char)c->text[t.at + i] < 0x20 || c->text[t.at + i] == 0x7f ? '?' : c->text[t.at + i]);
    out[i] = 0;
    return out;
}

/* What SSM, or the way to it, answered instead of doing it. */
static int failed(const settings *s, const char *what, const char *name, chaos_result result, const chaos_error *err) {
    const char *hint = "check the network, the region, the endpoint and the credentials";
    int code = COULD_NOT;
    if (result == CHAOS_ERR_NOT_FOUND) hint = "check --name, --region and --endpoint-url; `put` creates it", code = NOT_FOUND;
    if (result == CHAOS_ERR_DENIED)
        hint =
            "check the credentials; the role needs ssm:GetParameter, ssm:PutParameter, ssm:GetParametersByPath (SecureString: kms:Decrypt)";
    if (result == CHAOS_ERR_THROTTLED) hint = "SSM asks for patience: try again in a few seconds";
    if (result == CHAOS_ERR_VALUE || result == CHAOS_ERR_TOO_LARGE) hint = "check --name, --type and the value", code = REFUSED;
    if (result == CHAOS_ERR_ARGUMENT) hint = "check --name, --region and --endpoint-url", code = USAGE;
    return say(code, "cannot %s %s: %s: %s; %s", what, place(s, name), chaos_result_text(result), err->text, hint);
}

/* ---- configs: reading, state ---- */
static bool parse(document *d) { return chaos_config_parse(&d->config, d->text, d->len, &d->bad) == CHAOS_OK; }

static void take(document *d, const char *text) {
    d->len = (size_t)snprintf(d->text, sizeof d->text, "%s", text);
    parse(d);
}

static int invalid(const char *what, const document *d) {
    return say(REFUSED, "refused: %s: line %u, column %u: %s", what, d->bad.line, d->bad.column, d->bad.text);
}

/* JSON, @FILE or - (stdin); white space behind it is dropped. More than fits makes the parser say "too large". */
static void read_value(document *d, const char *value) {
    FILE *file = !strcmp(value, "-") ? stdin : *value == '@' ? fopen(value + 1, "rb") : NULL;
    if (!file && *value == '@') FAIL(COULD_NOT, "%s: cannot open: %s", value + 1, strerror(errno));
    if (file) d->len = fread(d->text, 1, sizeof d->text - 1, file);
    else d->len = (size_t)snprintf(d->text, sizeof d->text, "%s", value);
    if (file && ferror(file)) FAIL(COULD_NOT, "%s: cannot read: %s", value, strerror(errno));
    if (file && file != stdin) fclose(file);
    if (d->len >= sizeof d->text) d->len = sizeof d->text - 1;
    while (d->len && strchr(" \t\r\n", d->text[d->len - 1])) d->len--;
    d->text[d->len] = 0;
    parse(d);
}

static chaos_ssm_desc parameter(const settings *s, const char *name, int timeout) {
    chaos_ssm_desc d = {name, s->region, s->endpoint, s->type, timeout};
    return d;
}

static void fetch(const settings *s, const char *name, int timeout, stored *out) {
    chaos_ssm_desc d = parameter(s, name, timeout);
    memset(&out->is, 0, sizeof out->is);
    out->result = chaos_ssm_get(&d, out->doc.text, CHAOS_SSM_BUFFER, &out->is, &out->err);
    out->doc.len = out->result == CHAOS_OK ? out->is.len : 0;
    out->doc.text[out->doc.len] = 0;
    parse(&out->doc);
}

/* Writes; one that is throttled is tried again for about 6 s, because a stop must not be lost in a crowd. */
static chaos_result store(const settings *s, const char *name, const document *d, chaos_ssm_value *is, chaos_error *err) {
    chaos_ssm_desc desc = parameter(s, name, READ_MS);
    chaos_result result;
    int wait;
    for (wait = 200; (result = chaos_ssm_put(&desc, d->text, d->len, is, err)) == CHAOS_ERR_THROTTLED && wait <= 3200; wait *= 2) {
        struct timespec t = {wait / 1000, wait % 1000 * 1000000L};
        nanosleep(&t, NULL);
    }
    return result;
}

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

/* The state in words: "on until 2026-01-31T12:00:00Z (in 9 min)". */
static const char *describe(const document *d, long long modified) {
    static char out[400];
    char when[24], how[32];
    chaos_state state = state_of(d, modified);
    long long end = end_of(&d->config, modified);
    const char *word = chaos_state_text(state), *lease = d->config.expires_ms ? "" : ", the lease of 60 minutes";
    if (state == CHAOS_STATE_INVALID)
        snprintf(out, sizeof out, "%s, so it is off: line %u, column %u: %s", word, d->bad.line, d->bad.column, d->bad.text);
    else if (state == CHAOS_STATE_OFF) snprintf(out, sizeof out, "%s", word);
    else if (!end) snprintf(out, sizeof out, "%s without an end", word);
    else if (state == CHAOS_STATE_EXPIRED) snprintf(out, sizeof out, "%s since %s%s", word, utc(end, when), lease);
    else snprintf(out, sizeof out, "%s until %s (in %s%s)", word, utc(end, when), span(end - now_ms(), how), lease);
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
    for (gap = last.key; gap && isspace((unsigned char)gap[-1]); gap--) {}
    n = (size_t)snprintf(text, sizeof text, "%s%.*s\"%s\":%s%s", gap ? "," : "", (int)(last.key - gap), gap ? gap : "", key,
                         gap && isspace((unsigned char)last.value[-1]) ? " " : "", value);
    return n < sizeof text && splice(d, gap ? last.end : start, gap ? last.end : start, text);
}

/* A VALUE of `set` as JSON: what is not JSON is a string, unless it looks like JSON gone wrong. */
static const char *as_json(const char *key, const char *value) {
    static char out[CHAOS_CONFIG_INPUT_MAX];
    chaos_error err;
    size_t n = 0;
    if (chaos_json_check(value, strlen(value), &err) == CHAOS_OK) return value;
    if (strchr("{[\"", *value)) FAIL(USAGE, "%s: column %u: %s", key, err.column, err.text);
    out[n++] = '"';
    for (; *value && n < sizeof out - 8; value++) {
        if (*value == '"' || *value == '\\') out[n++] = '\\';
        if ((unsigned char)*value < 0x20) n += (size_t)snprintf(out + n, 8, "\\u%04x", (unsigned)*value);
        else out[n++] = *value;
    }
    out[n++] = '"';
    out[n] = 0;
    return out;
}

/* Applies the KEY=VALUE arguments. */
static void edit_all(const settings *s, document *d) {
    char key[40];
    int i;
    for (i = 0; i < s->arg_count; i++) {
        const char *value = strchr(s->args[i], '=');
        snprintf(key, sizeof key, "%.*s", (int)(value - s->args[i]), s->args[i]);
        if (!edit(d, key, value[1] ? as_json(key, value + 1) : NULL)) FAIL(REFUSED, "refused: %s: the config grows over 64 KiB", key);
    }
    parse(d);
}

/* ---- writing ---- */
/* For a shell. */
static void print_quoted(const char *text) {
    if (*text && !text[strspn(text, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./:@%+,-")]) {
        printf("%s", text);
        return;
    }
    putchar('\'');
    for (; *text; text++) printf(*text == '\'' ? "'\\''" : "%c", *text);
    putchar('\'');
}

static void print_rollback(const settings *s) {
    const char *words[] = {s->program, "disable", "--name", s->name, "--region", s->region, "--endpoint-url", s->endpoint};
    size_t i;
    printf("rollback: ");
    for (i = 0; i < sizeof words / sizeof words[0]; i++) {
        if (!words[i] || (i % 2 == 0 && !words[i + 1])) continue;
        if (i) putchar(' ');
        print_quoted(words[i]);
    }
    putchar('\n');
}

static void print_change(const stored *old, const document *new) {
    if (old->result == CHAOS_ERR_NOT_FOUND) printf("old: none\n");
    else if (old->result != CHAOS_OK) printf("old: not readable\n");
    else if (old->doc.bad.code) printf("old: %lu bytes that are no chaos config, not shown\n", (unsigned long)old->doc.len);
    else printf("old: %s\n", old->doc.text);
    printf("new: %s\n", new->text);
}

/* Everything about the new config itself: is it valid, does it end, will SSM take it? A config that is off is asked nothing
   about its end. */
static int settle(const settings *s, document *d) {
    long long now = now_ms(), end;
    char when[24], quoted[32] = "";
    if (d->bad.code) return invalid("the config is invalid", d);
    if (s->expires) snprintf(quoted, sizeof quoted, "\"%s\"", utc(now + s->expires, when));
    else if (s->no_expiry) snprintf(quoted, sizeof quoted, "\"never\"");
    else if (d->config.enabled && !d->config.expires_ms) {
        snprintf(quoted, sizeof quoted, "\"%s\"", utc(now + 30 * MINUTE, when));
        say(DONE, "no end was given: added \"expiresAt\":%s, 30 minutes from now (--expires sets it)", quoted);
    }
    if (*quoted && !(edit(d, "expiresAt", quoted) && parse(d))) return invalid("with expiresAt the config is invalid", d);
    end = d->config.expires_ms;
    if (d->config.enabled && end < 0 && !s->no_expiry)
        return say(REFUSED, "refused: \"expiresAt\" is \"never\", so it would run until somebody stops it: give --expires 10m, or "
                            "--no-expiry if that is meant");
    if (d->config.enabled && end > now + DAY + 1000)
        return say(REFUSED, "refused: the end, %s, is more than 24 h ahead: give --expires 10m, up to 24h", utc(end, when));
    if (d->config.enabled && end >= 0 && end <= now)
        return say(REFUSED, "refused: the end, %s, is past, so nothing would happen: give --expires 10m", utc(end, when));
    if (d->len > VALUE_MAX)
        return say(REFUSED, "refused: the value has %lu bytes, SSM takes %d: shorten it", (unsigned long)d->len, VALUE_MAX);
    if (strstr(d->text, "{{")) return say(REFUSED, "refused: \"{{\" stands in the value, which SSM forbids: write it otherwise");
    return DONE;
}

static bool same_text(const chaos_config *a, chaos_text x, const chaos_config *b, chaos_text y) {
    return x.len == y.len && !memcmp(a->text + x.at, b->text + y.at, x.len);
}

/* Does another experiment hold the parameter? */
static int held(const settings *s, const stored *old, const document *new) {
    const chaos_config *a = &old->doc.config, *b = &new->config;
    chaos_state state = state_of(&old->doc, old->is.modified_ms);
    char name[72], owner[72];
    if (old->result != CHAOS_OK || (state != CHAOS_STATE_ON && state != CHAOS_STATE_DRY_RUN)) return DONE;
    if (same_text(a, a->owner, b, b->owner) && same_text(a, a->name, b, b->name)) return DONE;
    return say(REFUSED, "refused: %s is held by the experiment '%s' of '%s', %s: ask them, wait for the end, or use --force",
               place(s, s->name), label(a, a->name, name), label(a, a->owner, owner), describe(&old->doc, old->is.modified_ms));
}

static int lost_race(const settings *s, unsigned long long before, unsigned long long after) {
    return say(LOST_RACE,
               "lost a race: version %llu was there, version %llu is yours, so somebody else wrote in between, and yours is in force now; "
               "look at theirs (chaos-ssm get --name %s:%llu), talk to them, and put or disable again",
               before, after, s->name, before + 1);
}

/* The way of put, set and enable. old: what is stored; NULL = not read yet. */
static int write_config(const settings *s, stored *old, document *new) {
    static stored read;
    chaos_ssm_value is;
    chaos_error err;
    chaos_result result;
    bool known, on;
    int code = settle(s, new);
    if (code) return code;
    on = new->config.enabled;
    if (!old) fetch(s, s->name, on ? READ_MS : STOP_READ_MS, old = &read);
    known = old->result == CHAOS_OK || old->result == CHAOS_ERR_NOT_FOUND;
    if (on && !s->force && !known) {
        failed(s, "read", s->name, old->result, &old->err);
        return say(COULD_NOT, "nothing was written: another experiment may hold it (--force writes all the same)");
    }
    if (on && !s->force && (code = held(s, old, new)) != DONE) return code;
    result = store(s, s->name, new, &is, &err);
    if (result != CHAOS_OK) return failed(s, "write", s->name, result, &err);
    say(DONE, "wrote version %llu of %s: %s", is.version, place(s, s->name), describe(new, 0));
    if (known && is.version != old->is.version + 1) code = lost_race(s, old->is.version, is.version);
    print_change(old, new);
    print_rollback(s);
    return code;
}

/* ---- commands ---- */
static int run_put(const settings *s) {
    static document d;
    if (!s->value) return say(USAGE, "put needs --value JSON, --value @FILE or --value -");
    read_value(&d, s->value);
    return write_config(s, NULL, &d);
}

static int run_get(const settings *s) {
    static stored old;
    char when[24];
    fetch(s, s->name, READ_MS, &old);
    if (old.result != CHAOS_OK) return failed(s, "read", s->name, old.result, &old.err);
    printf("%s\n", old.doc.text);
    return say(DONE, "%s: version %llu (%s, by %s), changed %s, %s", place(s, s->name), old.is.version, old.is.type, old.is.way,
               old.is.modified_ms ? utc(old.is.modified_ms, when) : "at an unknown time", describe(&old.doc, old.is.modified_ms));
}

/* Edits what is stored. What turns it off works on any value, also one that cannot be read. */
static int run_set(const settings *s) {
    static stored old;
    static document d;
    bool off = false;
    int i;
    if (!s->arg_count) return say(USAGE, "set needs KEY=VALUE: chaos-ssm set errorRate=10 --name NAME");
    for (i = 0; i < s->arg_count; i++) {
        size_t n = strspn(s->args[i], "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz");
        if (!n || n > 32 || s->args[i][n] != '=') return say(USAGE, "'%s' is not KEY=VALUE, KEY a top-level key of the config", s->args[i]);
        off = off || !strcmp(s->args[i], "enabled=false");
    }
    fetch(s, s->name, off ? STOP_READ_MS : READ_MS, &old);
    d = old.doc;
    if (old.result == CHAOS_ERR_NOT_FOUND || (old.result != CHAOS_OK && !off)) return failed(s, "read", s->name, old.result, &old.err);
    if (d.bad.code && !off) return invalid("what is stored is invalid, put a new one", &d);
    if (d.bad.code) take(&d, "{\"enabled\":false}");
    edit_all(s, &d);
    return write_config(s, &old, &d);
}

static int run_enable(const settings *s) {
    settings change = *s;
    if (!s->expires) return say(USAGE, "enable needs a fresh end: --expires 10m");
    change.args[0] = "enabled=true";
    change.arg_count = 1;
    return run_set(&change);
}

/* The rollback of one parameter; nothing but SSM itself can keep it from writing. others: found below a path. */
static int disable(const settings *s, const char *name, bool others) {
    static stored old;
    static document d;
    chaos_ssm_value is;
    chaos_error err;
    chaos_result result;
    bool kept;
    fetch(s, name, STOP_READ_MS, &old);
    if (old.result == CHAOS_ERR_NOT_FOUND)
        return say(NOT_FOUND, "nothing is stored under %s: processes that read it are off; check --name, --region and --endpoint-url",
                   place(s, name));
    if (others && old.result == CHAOS_OK && old.doc.bad.code && !strstr(old.doc.text, "enabled") && !strchr(old.doc.text, '\\'))
        return say(DONE, "left alone %s: it is no chaos config and says nothing of \"enabled\", so processes that read it are off",
                   place(s, name));
    d = old.doc;
    kept = old.result == CHAOS_OK && !d.bad.code && edit(&d, "enabled", "false") && parse(&d) && !d.config.enabled;
    if (old.result != CHAOS_OK)
        say(DONE, "could not read %s (%s: %s): writing the safe default", place(s, name), chaos_result_text(old.result), old.err.text);
    else if (!kept) say(DONE, "what is stored under %s is invalid (%s): writing the safe default", place(s, name), old.doc.bad.text);
    if (!kept) take(&d, "{\"enabled\":false}");
    result = store(s, name, &d, &is, &err);
    if (kept && (result == CHAOS_ERR_VALUE || result == CHAOS_ERR_TOO_LARGE)) {
        say(DONE, "SSM does not take it with its other keys (%s): writing the safe default", err.text);
        take(&d, "{\"enabled\":false}");
        result = store(s, name, &d, &is, &err);
    }
    if (result != CHAOS_OK) return failed(s, "write", name, result, &err);
    print_change(&old, &d);
    if (old.result == CHAOS_OK && is.version != old.is.version + 1)
        say(DONE, "somebody else wrote version %llu of %s in between; off is in force", old.is.version + 1, name);
    return say(DONE, "wrote version %llu of %s: off; processes follow within their TTL, 10 s while on unless set otherwise", is.version,
               place(s, name));
}

static int run_disable(const settings *s) {
    static char names[4 * CHAOS_SSM_BUFFER];
    chaos_ssm_desc d = parameter(s, s->path, READ_MS);
    chaos_ssm_value is;
    chaos_error err;
    chaos_result result;
    char *name, *end;
    int total = 0, bad = 0;
    if (s->name) return disable(s, s->name, false);
    result = chaos_ssm_list(&d, names, sizeof names, &is, &err);
    if (result != CHAOS_OK) {
        failed(s, "list", s->path, result, &err);
        return say(result == CHAOS_ERR_NOT_FOUND ? NOT_FOUND : COULD_NOT,
                   "nothing was stopped: name each parameter with --name, that needs no listing");
    }
    for (name = names; *name; name = end) {
        end = name + strcspn(name, "\n");
        if (*end) *end++ = 0;
        if (!*name) continue;
        total++;
        if (disable(s, name, true) != DONE) bad++;
    }
    if (!total) return say(NOT_FOUND, "nothing is stored below %s; check --path, --region and --endpoint-url", place(s, s->path));
    return say(bad ? COULD_NOT : DONE, "%d of %d parameters below %s are off%s", total - bad, total, place(s, s->path),
               bad ? "; repeat this, or stop the others one by one" : "");
}

static int run_check(const settings *s) {
    static document d;
    static char text[CHAOS_CONFIG_INPUT_MAX * 2];
    static char source[4100];
    const char *arg = s->arg_count == 1 ? s->args[0] : "";
    bool direct = *skip_space(arg) == '{' || *arg == '@' || !strcmp(arg, "-");
    if (!*arg) return say(USAGE, "check needs one FILE, JSON or - (stdin)");
    if (!direct && (size_t)snprintf(source, sizeof source, "@%s", arg) >= sizeof source)
        return say(USAGE, "'%.40s...' is no file name", arg);
    read_value(&d, direct ? arg : source);
    if (d.bad.code) return invalid(*skip_space(arg) == '{' ? "the config" : arg, &d);
    chaos_config_format(&d.config, text, sizeof text);
    printf("%s\n", text);
    if (d.len > VALUE_MAX) say(DONE, "note: it has %lu bytes, SSM takes %d", (unsigned long)d.len, VALUE_MAX);
    if (strstr(d.text, "{{")) say(DONE, "note: \"{{\" stands in it, which SSM forbids");
    return DONE;
}

/* ---- explain: the rolls are those of the manual of chaos.h ---- */
static unsigned long long mix(unsigned long long x) {
    x = (x + 0x9e3779b97f4a7c15ull) & 0xffffffffffffffffull;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ x >> 27) * 0x94d049bb133111ebull;
    return x ^ x >> 31;
}

static unsigned long long hash(const char *text) {
    unsigned long long h = 0xcbf29ce484222325ull;
    for (; *text; text++) h = (h ^ (unsigned char)*text) * 0x100000001b3ull;
    return h;
}

static unsigned slot(const char *instance) { return (unsigned)((mix(hash(instance)) >> 32) * 100 >> 32); }

static const char *find_header(void *user, const char *name, size_t *len) {
    const settings *s = (const settings *)user;
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
    open.enabled = true;
    open.expires_ms = -1;
    chaos_config_format(&open, text, sizeof text);
    memset(&desc, 0, sizeof desc);
    desc.config = text;
    desc.instance = instance;
    desc.quiet = desc.no_thread = true;
    unsetenv("CHAOS_DISABLE"); /* the question is not what this shell would do */
    c = chaos_open(&desc, NULL);
    if (!c) FAIL(COULD_NOT, "cannot open the config: out of memory");
    chaos_stats(c, &report);
    chaos_close(c);
    return report.state != CHAOS_STATE_NOT_CANARY;
}

static void print_chances(const chaos_fault *f) {
    static const char *const latencies[] = {"%u ms", "%u to %u ms", "mean %u ms, at most %u", "p50 %u, p95 %u, p99 %u, at most %u ms"};
    double delayed = (100 - f->error_rate) * f->latency_rate / 100.0 * (f->latency_kind || f->latency[0]);
    printf("chances: %u %% %s", f->error_rate, chaos_kind_text(f->error_mode));
    if (f->error_mode == CHAOS_STATUS) printf(" %u", f->error_status);
    printf("%s, %g %% delayed", f->error_after ? " after the handler" : "", delayed);
    if (delayed > 0) {
        printf(" by ");
        printf(latencies[f->latency_kind], f->latency[0], f->latency[1], f->latency[2], f->latency[3]);
    }
    printf(", %g %% untouched", 100 - f->error_rate - delayed);
    printf(f->bandwidth ? " but for bandwidth %u KiB/s\n" : "\n", f->bandwidth);
}

static void print_roll(const char *what, const char *key, unsigned roll, unsigned rate) {
    printf("roll: %s %u of 0..9999: %s the %u of %s %u\n", what, roll, roll < rate * 100 ? "below" : "not below", rate * 100, key, rate);
}

static void print_rolls(const chaos_config *c, const chaos_fault *f, const char *rule, const chaos_verdict *v) {
    unsigned long long base = mix(c->seed ^ (*rule ? hash(rule) : 0));
    print_roll("error", "errorRate", v->roll, f->error_rate);
    if (v->roll >= f->error_rate * 100u && f->latency_rate < 100)
        print_roll("delay", "latencyRate", (unsigned)((mix((base ^ v->key) + 2 * 0xd1342543de82ef95ull) >> 32) * 10000 >> 32),
                   f->latency_rate);
}

static void print_verdict(const chaos_verdict *v) {
    printf("verdict: %s", chaos_kind_text(v->kind));
    if (v->status) printf(" %u", v->status);
    if (v->kind >= CHAOS_STATUS && v->after) printf(" after the handler");
    if (v->delay_us) printf(" %g ms", v->delay_us / 1e3);
    if (v->bandwidth) printf(", paced to %u KiB/s", v->bandwidth);
    putchar('\n');
}

/* The config with every request that matches failed: what then still passes was not matched, or is excluded. */
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

/* The whole way of one request through c, as if it were on; gate: why it passes all the same, NULL = it does not. */
static void explain(const settings *s, chaos_config *c, const chaos_request *req, const char *gate) {
    chaos_verdict v = probe(c, req, true, false);
    const chaos_fault *f = v.rule ? &c->rules[v.rule - 1].fault : &c->fault;
    const char *rule = v.rule ? c->text + c->rules[v.rule - 1].name.at : "";
    char name[72];
    if (s->instance && takes_part(c, s->instance)) {
        printf("instance: takes part: canary slot %u of 0..99 is below %u\n", slot(s->instance), c->canary);
    } else if (s->instance) {
        printf("instance: does not take part: canary slot %u of 0..99, canary %u%s\n", slot(s->instance), c->canary,
               c->instances.count ? ", and there is a list of instances" : "");
        gate = "this instance does not take part";
    } else if (c->canary < 100 || c->instances.count) {
        printf("instance: not every one takes part (--instance ID tells)\n");
    }
    if (!v.kind) {
        printf("match: none: %s\nverdict: pass\n", probe(c, req, false, false).kind ? "no rule fits" : "the top-level match does not fit");
        return;
    }
    if (v.rule) printf("match: rule %u, '%s'\n", v.rule, label(c, c->rules[v.rule - 1].name, name));
    else printf("match: the top level, there are no rules\n");
    if (!probe(c, req, true, true).kind) {
        printf("exclude: fits\n");
        gate = "exclude spares it";
    }
    print_chances(f);
    c->default_exclude = false;
    c->exclude.count = 0;
    v = chaos_judge(c, req, s->key ? hash(s->key) : 0);
    if (!s->key) printf("roll: each request rolls afresh (--key KEY tells of one key)\n");
    else if (!c->has_seed)
        printf("roll: the config has no seed, so each process draws its own, and the key fails in some and not in others\n");
    else print_rolls(c, f, rule, &v);
    printf("verdict: ");
    if (gate) printf("pass, because %s; else ", gate);
    if (s->key && c->has_seed) print_verdict(&v);
    else printf("by the chances above\n");
}

static int run_explain(const settings *s) {
    static stored from;
    static char method[32], path[4096];
    chaos_request req = {method, 0, path, 0, NULL, 0, find_header, NULL};
    chaos_state state;
    int i;
    if (!s->request || sscanf(s->request, "%31[A-Z] %4095[!-~]", method, path) != 2 || *path != '/')
        return say(USAGE, "explain needs --request 'GET /path'");
    for (i = 0; i < s->header_count; i++)
        if (!strchr(s->headers[i], ':')) return say(USAGE, "--header: '%s' is not 'Name: value'", s->headers[i]);
    if (!s->name == !s->value) return say(USAGE, "explain needs --name NAME or --value JSON, and not both");
    if (s->value) read_value(&from.doc, s->value);
    else fetch(s, s->name, READ_MS, &from);
    if (s->name && from.result != CHAOS_OK) return failed(s, "read", s->name, from.result, &from.err);
    if (from.doc.bad.code) return invalid("the config is invalid, so it is off", &from.doc);
    state = state_of(&from.doc, from.is.modified_ms);
    printf("request: %s %s\nstate: %s\n", method, path, describe(&from.doc, from.is.modified_ms));
    from.doc.config.enabled = true;
    req.user = (void *)(size_t)s;
    explain(s, &from.doc.config, &req,
            state == CHAOS_STATE_ON        ? NULL
            : state == CHAOS_STATE_DRY_RUN ? "it is a dry run"
                                           : "the config is not on");
    return DONE;
}

/* ---- watch ---- */
static volatile sig_atomic_t stopping;

static void on_stop(int sig) {
    (void)sig;
    if (stopping) _exit(DONE); /* asked twice: not even the answer of SSM is waited for */
    stopping = 1;
}

/* What distinguishes two looks, and what is said of the last one. */
static void look(const settings *s, stored *now, char id[64], char text[700]) {
    fetch(s, s->name, STOP_READ_MS, now);
    if (now->result == CHAOS_OK) {
        snprintf(id, 64, "%llu %d", now->is.version, (int)state_of(&now->doc, now->is.modified_ms));
        snprintf(text, 700, "version %llu, %s", now->is.version, describe(&now->doc, now->is.modified_ms));
    } else {
        snprintf(id, 64, "%s", chaos_result_text(now->result));
        snprintf(text, 700, "%s: %s", id, now->err.text);
    }
}

static int run_watch(const settings *s) {
    static stored now;
    char id[64], last[64] = "", text[700], when[24];
    int ms = s->interval ? s->interval : 5000;
    struct timespec pause = {ms / 1000, ms % 1000 * 1000000L};
    struct sigaction act;
    sigset_t stop, open;
    memset(&act, 0, sizeof act);
    act.sa_handler = on_stop;
    sigaction(SIGINT, &act, NULL);
    sigaction(SIGTERM, &act, NULL);
    sigemptyset(&stop);
    sigaddset(&stop, SIGINT);
    sigaddset(&stop, SIGTERM);
    while (!stopping) {
        look(s, &now, id, text);
        if (!stopping && strcmp(id, last)) {
            printf("%s %s\n", utc(now_ms(), when), text);
            fflush(stdout);
            strcpy(last, id);
        }
        pthread_sigmask(SIG_BLOCK, &stop, &open); /* from here on a signal ends the pause, and none is missed */
        if (!stopping) pselect(0, NULL, NULL, NULL, &pause, &open);
        pthread_sigmask(SIG_SETMASK, &open, NULL);
    }
    return DONE;
}

/* ---- the command line ---- */
static const command commands[] = {
    {"put", 'p', run_put, "--name NAME --value JSON", "validate and write a config"},
    {"get", 'g', run_get, "--name NAME", "print the value; version, change and state on stderr"},
    {"set", 's', run_set, "KEY=VALUE... --name NAME", "change these keys, keep the rest; KEY= removes one"},
    {"enable", 'e', run_enable, "--name NAME --expires TIME", "switch on what is stored, with a fresh end"},
    {"disable", 'd', run_disable, "--name NAME | --path /PREFIX/", "the rollback: off at once, whatever is stored"},
    {"check", 'c', run_check, "FILE | JSON | -", "validate a config, print its canonical form"},
    {"explain", 'x', run_explain, "--request 'GET /PATH' (--name NAME | --value JSON)", "why a request fails, or does not"},
    {"watch", 'w', run_watch, "--name NAME", "print each change of version and state"},
};
#define COMMANDS (sizeof commands / sizeof commands[0])

static int print_help(void) {
    size_t i, c;
    printf("usage: chaos-ssm COMMAND ...\n\n");
    for (c = 0; c < COMMANDS; c++) printf("  %s %s\n      %s\n", commands[c].name, commands[c].usage, commands[c].help);
    printf("\nTIME is 250ms, 10s, 5m, 2h or milliseconds. In brackets: what holds when the flag is not given.\n\n");
    for (i = 0; i < SETTINGS; i++) {
        const setting *f = &table[i];
        int n = printf("  %s %s", f->flag, f->value);
        printf("%*s%s", 26 - n, "", f->help);
        for (c = 0; c < COMMANDS; c++)
            if (strchr(f->letters, commands[c].letter))
                printf("%s%s", strchr(f->letters, commands[c].letter) == f->letters ? "; " : " ", commands[c].name);
        printf("\n");
    }
    printf("\nExit code: 0 done; 1 could not (unreachable, denied, throttled, no way to SSM, a file); 2 bad usage; 3 refused (invalid,\n"
           "too large, `{{`, end past or over 24 h ahead, held by another experiment, or refused by SSM); 4 nothing stored under that\n"
           "name; 5 written, but somebody else wrote in between. What is written as off is never refused for its end or its holder.\n\n"
           "  chaos-ssm put --name /shop/prod/chaos --value '{\"enabled\":true,\"errorRate\":5,\"owner\":\"ana\"}' --expires 10m\n"
           "  chaos-ssm disable --name /shop/prod/chaos\n");
    return DONE;
}

/* 250ms, 10s, 5m, 2h or milliseconds; -1 = not a time, or more than an int holds. */
static int duration(const char *text) {
    static const struct unit {
        const char *name;
        int ms;
    } units[] = {{"", 1}, {"ms", 1}, {"s", 1000}, {"m", 60000}, {"h", 3600000}};
    long long n = 0;
    const char *p = text;
    size_t i;
    while (isdigit((unsigned char)*p) && n <= INT_MAX) n = n * 10 + (*p++ - '0');
    for (i = 0; i < sizeof units / sizeof units[0] && p > text; i++)
        if (!strcmp(p, units[i].name)) return n * units[i].ms > INT_MAX ? -1 : (int)(n * units[i].ms);
    return -1;
}

static void set(settings *out, const setting *f, const char *value) {
    void *at = (char *)out + f->at;
    if (f->kind == TEXT) {
        memcpy(at, &value, sizeof value);
    } else if (f->kind == LIST) {
        if (out->header_count == MAX_ARGS) FAIL(USAGE, "%s: at most %d", f->flag, MAX_ARGS);
        out->headers[out->header_count++] = value;
    } else if (f->kind == SWITCH) {
        *(bool *)at = true;
    } else {
        int ms = duration(value);
        if (ms < 0) FAIL(USAGE, "%s: '%s' is not a time: write 10s, 5m, 2h", f->flag, value);
        if (ms < 100) FAIL(USAGE, "%s: %s is under 100 ms: write 10s, 5m, 2h", f->flag, value);
        *(int *)at = ms;
    }
}

static const setting *find(const char *flag, size_t len) {
    size_t i;
    for (i = 0; i < SETTINGS; i++)
        if (strlen(table[i].flag) == len && !strncmp(table[i].flag, flag, len)) return &table[i];
    FAIL(USAGE, "unknown flag '%.*s' (see --help)", (int)len, flag);
}

/* Flags as --flag VALUE or --flag=VALUE, anywhere; all else is an argument. */
static void read_settings(settings *out, const command *c, int argc, char **argv) {
    int i;
    for (i = c ? 2 : 1; i < argc; i++) {
        const char *flag = argv[i], *value;
        size_t len = strcspn(flag, "=");
        const setting *f;
        if (strncmp(flag, "--", 2)) {
            if (!c) FAIL(USAGE, "'%s' is no command (see --help)", flag);
            if (!strchr("sc", c->letter)) FAIL(USAGE, "%s: unexpected argument '%s' (see --help)", c->name, flag);
            if (out->arg_count == MAX_ARGS) FAIL(USAGE, "%s: at most %d arguments", c->name, MAX_ARGS);
            out->args[out->arg_count++] = flag;
            continue;
        }
        f = find(flag, len);
        if (*f->letters && !(c && strchr(f->letters, c->letter)))
            FAIL(USAGE, "%s does not go with %s (see --help)", f->flag, c ? c->name : "no command");
        value = flag[len] ? flag + len + 1 : NULL;
        if (!*f->value && value) FAIL(USAGE, "%s takes no value", f->flag);
        if (*f->value && !value && ++i < argc) value = argv[i];
        if (*f->value && (!value || !*value)) FAIL(USAGE, "%s needs a value: %s %s", f->flag, f->flag, f->value);
        set(out, f, value);
    }
}

static const char *first_of(const char *given, const char *a, const char *b) {
    const char *first = getenv(a), *second = getenv(b);
    return given ? given : first && *first ? first : second && *second ? second : NULL;
}

/* What the flags of one command ask of each other. */
static void check_settings(const settings *s, const command *c) {
    if (strchr("pgsew", c->letter) && !s->name) FAIL(USAGE, "%s needs --name NAME", c->name);
    if (c->letter == 'd' && !s->name == !s->path) FAIL(USAGE, "disable needs --name NAME or --path /PREFIX/, and not both");
    if (s->path && *s->path != '/') FAIL(USAGE, "--path: '%s' does not begin with /", s->path);
    if (s->type && strcmp(s->type, "String") && strcmp(s->type, "SecureString"))
        FAIL(USAGE, "--type: '%s' is not String or SecureString", s->type);
    if (s->expires && s->no_expiry) FAIL(USAGE, "--expires and --no-expiry contradict each other");
}

int main(int argc, char **argv) {
    static settings s;
    const command *c = NULL;
    const char *ignore = getenv("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS");
    size_t i;
    for (i = 0; i < COMMANDS && argc > 1; i++)
        if (!strcmp(commands[i].name, argv[1])) c = &commands[i];
    s.program = argv[0];
    read_settings(&s, c, argc, argv);
    if (s.help) return print_help();
    if (s.version) return printf("chaos-ssm %s\nconfig sources: %s\n", chaos_version(), chaos_sources()) < 0;
    if (!c) return say(USAGE, "a command is missing: put get set enable disable check explain watch (see --help)");
    check_settings(&s, c);
    s.region = first_of(s.region, "AWS_REGION", "AWS_DEFAULT_REGION");
    if (!ignore || strcasecmp(ignore, "true")) s.endpoint = first_of(s.endpoint, "AWS_ENDPOINT_URL_SSM", "AWS_ENDPOINT_URL");
    return c->run(&s);
}

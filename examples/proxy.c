/* chaos-proxy - an HTTP fault proxy: stands in front of any service and is steered by one JSON object.

   Build:  cc -std=c99 -O2 -pthread -o chaos-proxy proxy.c        (chaos.h is one folder up)
   Run:    chaos-proxy --listen 127.0.0.1:8080 --upstream http://127.0.0.1:3000 --config file:chaos.json
   Prints: chaos-proxy listening on 127.0.0.1:8080

   SIGUSR1 turns chaos off at once, for the life of the process; SIGHUP reads the config now; SIGTERM and SIGINT stop it
   after the requests in progress. Exit code: 0 stopped as told, 1 cannot run (or --check found a fault), 2 bad setting. */
#define CHAOS_IMPLEMENTATION
#include "../chaos.h"

#include <ctype.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct settings {
    chaos_desc chaos;
    chaos_proxy_desc proxy;
    bool check, version, help;
} settings;

/* TIME0: 0 is allowed and means "none", which the header writes as -1. COMMAND: a SWITCH without a variable. */
typedef enum setting_kind { TEXT, COUNT, TIME, TIME0, SWITCH, COMMAND } setting_kind;

typedef struct setting {
    const char *flag, *value;
    setting_kind kind;
    size_t at; /* offset in settings: const char *, int, or bool for SWITCH and COMMAND */
    int min, max;
    const char *help;
} setting;

/* The one table: flags, environment variables, help and parser are all made from it. */
#define DAY       86400000
#define AT(field) offsetof(settings, field)
static const setting table[] = {
    {"--listen", "ADDR:PORT", TEXT, AT(proxy.listen), 0, 0, "where to listen [127.0.0.1:0, a free port]"},
    {"--upstream", "URL", TEXT, AT(proxy.upstream), 0, 0, "the service: http://HOST[:PORT][/PREFIX]; required"},
    {"--config", "SOURCE", TEXT, AT(chaos.config), 0, 0, "file:PATH, env:NAME or the JSON itself [off]"},
    {"--ttl", "TIME", TIME, AT(chaos.ttl_ms), 10, DAY, "how old a config may get [30s while off, 10s while on]"},
    {"--max-stale", "TIME", TIME0, AT(chaos.max_stale_ms), 0, DAY, "how long beyond, when the source is lost [60s]"},
    {"--max-conns", "N", COUNT, AT(proxy.max_connections), 1, 1000000, "connections at once, more wait [1024]"},
    {"--head-limit", "BYTES", COUNT, AT(proxy.head_limit), 1024, 65536, "longest request or reply head [16384]"},
    {"--head-timeout", "TIME", TIME, AT(proxy.head_timeout), 1, DAY, "from a head's first byte to its last [10s]"},
    {"--body-timeout", "TIME", TIME, AT(proxy.body_timeout), 1, DAY, "a body without progress [30s]"},
    {"--idle-timeout", "TIME", TIME, AT(proxy.idle_timeout), 1, DAY, "a client between requests [60s]"},
    {"--connect-timeout", "TIME", TIME, AT(proxy.connect_timeout), 1, DAY, "connecting to the upstream [5s]"},
    {"--reply-timeout", "TIME", TIME, AT(proxy.reply_timeout), 1, DAY, "waiting for the upstream's reply [60s]"},
    {"--drain", "TIME", TIME0, AT(proxy.drain_timeout), 0, DAY, "for requests in progress after SIGTERM [10s]"},
    {"--host-header", "NAME", TEXT, AT(proxy.host_header), 0, 0, "send this Host upstream [the client's]"},
    {"--key-header", "NAME", TEXT, AT(proxy.key_header), 0, 0, "same value of this header, same verdict [none]"},
    {"--instance", "NAME", TEXT, AT(chaos.instance), 0, 0, "this instance's id, for canary and instances [host name]"},
    {"--quiet", "", SWITCH, AT(chaos.quiet), 0, 0, "no log lines on stderr"},
    {"--check", "", COMMAND, AT(check), 0, 0, "validate the config, print its canonical form, and end"},
    {"--version", "", COMMAND, AT(version), 0, 0, "print the version and the config sources of this build"},
    {"--help", "", COMMAND, AT(help), 0, 0, "print this"},
};
#define SETTINGS (sizeof table / sizeof table[0])

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3), noreturn))
#endif
static void
fail(int code, const char *format, ...) {
    va_list args;
    fprintf(stderr, "chaos-proxy: ");
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fprintf(stderr, "\n");
    exit(code);
}

/* CHAOS_HEAD_TIMEOUT for --head-timeout. */
static const char *variable(const setting *s, char out[32]) {
    size_t i;
    int n = snprintf(out, 32, "CHAOS_%s", s->flag + 2);
    for (i = 6; i < (size_t)n; i++) out[i] = (char)(out[i] == '-' ? '_' : toupper((unsigned char)out[i]));
    return out;
}

/* A whole number, with a unit when it is a time: 250ms, 2s, 5m. -1 = not one, or more than an int holds. */
static int number(const char *text, bool time) {
    long long n = 0;
    const char *p = text;
    while (isdigit((unsigned char)*p) && n <= INT_MAX) n = n * 10 + (*p++ - '0');
    if (p == text) return -1;
    if (time && !strcmp(p, "s")) n *= 1000;
    else if (time && !strcmp(p, "m")) n *= 60000;
    else if (*p && !(time && !strcmp(p, "ms"))) return -1;
    return n > INT_MAX ? -1 : (int)n;
}

/* Stores one value; origin is how the user wrote the setting, for the message. */
static void set(settings *out, const setting *s, const char *origin, const char *value) {
    void *at = (char *)out + s->at;
    bool time = s->kind == TIME || s->kind == TIME0;
    if (s->kind == TEXT) {
        memcpy(at, &value, sizeof value);
    } else if (s->kind == SWITCH || s->kind == COMMAND) {
        bool on = !strcmp(value, "1");
        if (!on && strcmp(value, "0")) fail(2, "%s: '%s' is not 0 or 1", origin, value);
        memcpy(at, &on, sizeof on);
    } else {
        int n = number(value, time);
        if (n < 0) fail(2, "%s: '%s' is not a %s", origin, value, time ? "time: write 250ms, 2s, 5m or milliseconds" : "number");
        if (n < s->min || n > s->max) fail(2, "%s: %s is not in %d..%d%s", origin, value, s->min, s->max, time ? " ms" : "");
        if (s->kind == TIME0 && n == 0) n = -1;
        memcpy(at, &n, sizeof n);
    }
}

static const setting *find(const char *flag, size_t len) {
    size_t i;
    for (i = 0; i < SETTINGS; i++)
        if (strlen(table[i].flag) == len && !strncmp(table[i].flag, flag, len)) return &table[i];
    fail(2, "unknown flag '%.*s' (see --help)", (int)len, flag);
}

/* Flags first, as --flag VALUE or --flag=VALUE; then the variables of those that were not given. */
static void read_settings(settings *out, int argc, char **argv) {
    bool given[SETTINGS] = {false};
    char name[32];
    size_t n;
    int i;
    for (i = 1; i < argc; i++) {
        const char *flag = argv[i], *value;
        size_t len = strcspn(flag, "=");
        const setting *s;
        if (strncmp(flag, "--", 2)) fail(2, "unexpected argument '%s': settings are written --flag VALUE (see --help)", flag);
        s = find(flag, len);
        value = flag[len] ? flag + len + 1 : NULL;
        if (!*s->value && value) fail(2, "%s takes no value", s->flag);
        if (!*s->value) value = "1";
        if (!value && ++i < argc) value = argv[i];
        if (!value || !*value) fail(2, "%s needs a value: %s %s", s->flag, s->flag, s->value);
        set(out, s, s->flag, value);
        given[s - table] = true;
    }
    for (n = 0; n < SETTINGS; n++) {
        const char *value = table[n].kind == COMMAND ? NULL : getenv(variable(&table[n], name));
        if (value && *value && !given[n] && !out->help && !out->version) set(out, &table[n], name, value);
    }
}

static int print_help(void) {
    char name[32];
    size_t i;
    printf("usage: chaos-proxy --upstream URL [--listen ADDR:PORT] [--config SOURCE] ...\n\n"
           "Each flag can also be given as the variable beside it; the flag wins. TIME is 250ms, 2s, 5m or milliseconds.\n\n");
    for (i = 0; i < SETTINGS; i++) {
        const setting *s = &table[i];
        int n = printf("  %s %s", s->flag, s->value);
        printf("%*s%-22s %s\n", 28 - n, "", s->kind == COMMAND ? "" : variable(s, name), s->help);
    }
    printf("\nSignals: SIGUSR1 chaos off now, until restart; SIGHUP read the config now; SIGTERM, SIGINT drain and stop.\n"
           "CHAOS_DISABLE=1 in the environment keeps chaos off whatever the config says.\n");
    return 0;
}

/* Reads what --config names, as the proxy would; more than fits makes the parser say "too large". */
static size_t read_config(const char *source, char *buf, size_t cap) {
    FILE *file;
    size_t len;
    if (strncmp(source, "file:", 5)) {
        bool env = !strncmp(source, "env:", 4);
        const char *text = env ? getenv(source + 4) : source;
        if (!text) fail(1, "%s: no such environment variable", source);
        len = strlen(text);
        memcpy(buf, text, len < cap ? len : cap);
        return len < cap ? len : cap;
    }
    file = fopen(source + 5, "rb");
    if (!file) fail(1, "%s: cannot open: %s", source, strerror(errno));
    len = fread(buf, 1, cap, file);
    if (ferror(file)) fail(1, "%s: cannot read: %s", source, strerror(errno));
    fclose(file);
    return len;
}

/* The name of the source for messages; an inline config is not repeated in them. */
static const char *source_name(const char *source) {
    return strncmp(source, "file:", 5) && strncmp(source, "env:", 4) ? "--config" : source;
}

static bool is_json(const char *source) { return source[strspn(source, " \t\r\n")] == '{'; }

static void parse_or_fail(chaos_config *config, const char *source, int code) {
    static char text[CHAOS_CONFIG_INPUT_MAX + 1];
    chaos_error err;
    size_t len = read_config(source, text, sizeof text);
    if (chaos_config_parse(config, text, len, &err) == CHAOS_OK) return;
    fail(code, "%s: line %u, column %u: %s", source_name(source), err.line, err.column, err.text);
}

static int check(const settings *s) {
    static chaos_config config;
    static char text[CHAOS_CONFIG_INPUT_MAX + 1];
    const char *source = s->chaos.config;
    if (!source) fail(2, "--check needs --config SOURCE (or CHAOS_CONFIG)");
    if (!is_json(source) && strncmp(source, "file:", 5) && strncmp(source, "env:", 4))
        fail(2, "--config: '%s' is not file:PATH, env:NAME or JSON", source);
    parse_or_fail(&config, source, 1);
    chaos_config_format(&config, text, sizeof text);
    printf("%s\n", text);
    return 0;
}

/* Signals are taken by threads of their own, so that none interrupts a request. SIGHUP has one to itself: a slow config
   source must not hold up the kill switch. */
typedef struct watcher {
    pthread_t thread;
    sigset_t signals;
    chaos *faults;
    int done; /* atomic: the proxy has ended */
} watcher;

static void *watch(void *arg) {
    watcher *w = (watcher *)arg;
    int sig;
    while (!sigwait(&w->signals, &sig) && !__atomic_load_n(&w->done, __ATOMIC_ACQUIRE)) {
        if (sig == SIGUSR1) chaos_off(w->faults);
        else if (sig == SIGHUP) chaos_refresh(w->faults, NULL); /* what came of it is in the log */
        else chaos_proxy_stop(w->faults);
    }
    return NULL;
}

static void watch_start(watcher *w, chaos *faults) {
    int error;
    w->faults = faults;
    error = pthread_create(&w->thread, NULL, watch, w);
    if (error) fail(1, "cannot start a thread: %s", strerror(error));
}

static void watch_end(watcher *w, int wake) {
    __atomic_store_n(&w->done, 1, __ATOMIC_RELEASE);
    pthread_kill(w->thread, wake);
    pthread_join(w->thread, NULL);
}

static void on_listening(void *user, const char *address) {
    (void)user;
    printf("chaos-proxy listening on %s\n", address);
    fflush(stdout);
}

/* A setting the header refused, or something it could not do? */
static int exit_code(chaos_result r) { return r == CHAOS_ERR_MEMORY || r == CHAOS_ERR_SYSTEM || r == CHAOS_ERR_UNREACHABLE ? 1 : 2; }

static int run(settings *s) {
    static chaos_config config;
    static watcher stop, reread;
    chaos_error err;
    chaos_result result;
    chaos *faults;
    if (!s->proxy.upstream) fail(2, "--upstream is missing: --upstream http://HOST:PORT (or CHAOS_UPSTREAM)");
    if (s->chaos.config && is_json(s->chaos.config)) parse_or_fail(&config, s->chaos.config, 2);

    signal(SIGPIPE, SIG_IGN); /* a log reader that goes away must not take the service along */
    sigemptyset(&stop.signals);
    sigaddset(&stop.signals, SIGUSR1);
    sigaddset(&stop.signals, SIGTERM);
    sigaddset(&stop.signals, SIGINT);
    sigemptyset(&reread.signals);
    sigaddset(&reread.signals, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &stop.signals, NULL);
    pthread_sigmask(SIG_BLOCK, &reread.signals, NULL);

    faults = chaos_open(&s->chaos, &err);
    if (!faults) fail(exit_code(err.code), "%s", err.text);
    watch_start(&stop, faults);
    watch_start(&reread, faults);
    s->proxy.listening = on_listening;
    result = chaos_proxy_run(faults, &s->proxy, &err);
    watch_end(&stop, SIGTERM);
    watch_end(&reread, SIGHUP);
    chaos_close(faults);
    if (result != CHAOS_OK) fail(exit_code(result), "%s", err.text);
    return 0;
}

int main(int argc, char **argv) {
    static settings s;
    read_settings(&s, argc, argv);
    if (s.help) return print_help();
    if (s.version)
        return printf("chaos-proxy %s\nconfig sources: inline env file (ssm, appconfig: not in this version)\n", chaos_version()) < 0;
    return s.check ? check(&s) : run(&s);
}

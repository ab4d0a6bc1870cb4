/* chaos-proxy - an HTTP fault proxy: stands in front of any service and is steered by one JSON object.

   Build:  cc -std=c99 -O2 -pthread -o chaos-proxy proxy.c        (chaos.h is one folder up)
   Run:    chaos-proxy --listen 127.0.0.1:8080 --upstream http://127.0.0.1:3000 --config file:chaos.json
   Prints: chaos-proxy listening on 127.0.0.1:8080
           chaos-proxy admin on 127.0.0.1:9090                    (with --admin: /healthz, /metrics, /config)

   SIGUSR1 turns chaos off at once, for the life of the process; SIGHUP reads the config now; SIGTERM and SIGINT stop it
   after the requests in progress. Exit code: 0 stopped as told, 1 cannot run (or --check found a fault, --health no proxy),
   2 bad setting. */
#define CHAOS_IMPLEMENTATION
#include "../chaos.h"

#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

typedef struct settings {
    chaos_desc chaos;
    chaos_proxy_desc proxy;
    const char *admin, *health;
    bool admin_any, check, version, help;
} settings;

/* TIME0: 0 is allowed and means "none", which the header writes as -1. COMMAND: a SWITCH, or with a value a TEXT, without a
   variable. */
typedef enum setting_kind { TEXT, COUNT, TIME, TIME0, SWITCH, COMMAND } setting_kind;

typedef struct setting {
    const char *flag, *value;
    setting_kind kind;
    size_t at; /* offset in settings: const char *, int, or bool when there is no value */
    int min, max;
    const char *help;
} setting;

/* The one table: flags, environment variables, help and parser are all made from it. */
#define DAY       86400000
#define AT(field) offsetof(settings, field)
static const setting table[] = {
    {"--listen", "ADDR:PORT", TEXT, AT(proxy.listen), 0, 0, "where to listen [127.0.0.1:0, a free port]"},
    {"--upstream", "URL", TEXT, AT(proxy.upstream), 0, 0, "the service: http://HOST[:PORT][/PREFIX]; required"},
    {"--config", "SOURCE", TEXT, AT(chaos.config), 0, 0, "ssm:NAME, appconfig:APP/ENV/PROFILE, file:PATH, env:NAME, JSON [off]"},
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
    {"--admin", "ADDR:PORT", TEXT, AT(admin), 0, 0, "serve /healthz, /metrics and /config there [nowhere]"},
    {"--admin-any", "", SWITCH, AT(admin_any), 0, 0, "let --admin be an address that is not loopback"},
    {"--instance", "NAME", TEXT, AT(chaos.instance), 0, 0, "this instance's id, for canary and instances [host name]"},
    {"--quiet", "", SWITCH, AT(chaos.quiet), 0, 0, "no log lines on stderr"},
    {"--health", "ADDR:PORT", COMMAND, AT(health), 0, 0, "ask the --admin of a running proxy; exit code 0 = it is well"},
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
    if (s->kind == TEXT || (s->kind == COMMAND && *s->value)) {
        memcpy(at, &value, sizeof value);
    } else if (!*s->value) {
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
        if (value && *value && !given[n] && !out->help && !out->version && !out->health) set(out, &table[n], name, value);
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

/* How long a request is delayed on average, in us; an injected error is not delayed. */
static double mean_delay(const chaos_fault *f) {
    const unsigned *ms = f->latency;
    double share = f->latency_rate / 100.0 * (100 - f->error_rate) / 100, mean = ms[0];
    if (f->latency_kind == CHAOS_LATENCY_UNIFORM) mean = (ms[0] + (double)ms[1]) / 2;
    if (f->latency_kind == CHAOS_LATENCY_QUANTILES) /* straight lines from 0 to p50, p95, p99, max */
        mean = (50.0 * ms[0] + 45 * ((double)ms[0] + ms[1]) + 4 * ((double)ms[1] + ms[2]) + ((double)ms[2] + ms[3])) / 200;
    return share * mean * 1000;
}

/* Each delayed request holds a connection: from some rate on that sets the pace, not the fault. The slowest rule tells. */
static void print_ceiling(const chaos_config *config, int connections) {
    double slowest = config->rule_count ? 0 : mean_delay(&config->fault), rate;
    int i;
    for (i = 0; i < config->rule_count; i++)
        if (mean_delay(&config->rules[i].fault) > slowest) slowest = mean_delay(&config->rules[i].fault);
    rate = slowest > 0 ? connections * 1e6 / slowest : 0;
    if (rate > 0)
        fprintf(stderr, "ceiling: %d connections / %g ms = %.*f requests/s\n", connections, slowest / 1e3, rate < 10 ? 3 : 0, rate);
}

static bool is_remote(const char *source) { return source && (!strncmp(source, "ssm:", 4) || !strncmp(source, "appconfig:", 10)); }

/* What a remote source holds now, fetched once. */
static void fetch_or_fail(const settings *s, chaos_config *config) {
    chaos_desc desc = s->chaos;
    chaos_error err;
    chaos *faults;
    desc.quiet = desc.no_thread = true;
    faults = chaos_open(&desc, &err);
    if (!faults) fail(2, "%s", err.text);
    chaos_refresh(faults, &err);
    if (err.line) fail(1, "%s: line %u, column %u: %s", desc.config, err.line, err.column, err.text);
    if (err.code) fail(1, "%s: %s", desc.config, err.text);
    chaos_get_config(faults, config);
    chaos_close(faults);
}

static int check(const settings *s) {
    static chaos_config config;
    static char text[CHAOS_CONFIG_INPUT_MAX + 1];
    const char *source = s->chaos.config;
    if (!source) fail(2, "--check needs --config SOURCE (or CHAOS_CONFIG)");
    if (!is_json(source) && !is_remote(source) && strncmp(source, "file:", 5) && strncmp(source, "env:", 4))
        fail(2, "--config: '%s' is none of ssm:NAME, appconfig:APP/ENV/PROFILE, file:PATH, env:NAME or JSON", source);
    if (is_remote(source)) fetch_or_fail(s, &config);
    else parse_or_fail(&config, source, 1);
    chaos_config_format(&config, text, sizeof text);
    printf("%s\n", text);
    fflush(stdout);
    print_ceiling(&config, s->proxy.max_connections ? s->proxy.max_connections : 1024);
    return 0;
}

/* ---- the admin listener: GET and HEAD of three pages; it reads, it never steers ---- */
enum { ADMIN_CLIENTS = 16, ADMIN_HEAD = 8192, ADMIN_MS = 2000, ADMIN_FULL_MS = 200, ADMIN_BODY = 262144 };

typedef struct admin_client {
    int fd;             /* -1 = free */
    long long deadline; /* ms; whatever it is doing, its time ends then */
    bool answered;      /* what still comes is thrown away, so that no reset overtakes the reply */
    size_t len;
    char head[ADMIN_HEAD + 1];
} admin_client;

typedef struct admin {
    chaos *faults;
    const char *service, *instance;
    char address[80]; /* as printed, "" = there is no such listener */
    int listener;
    int stop[2]; /* a pipe: the thread ends when its second end is closed */
    bool running;
    pthread_t thread;
    admin_client clients[ADMIN_CLIENTS];
    size_t len; /* of the body */
    char body[ADMIN_BODY];
} admin;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static void
put(admin *a, const char *format, ...) {
    size_t room = sizeof a->body - a->len;
    va_list args;
    int n;
    va_start(args, format);
    n = vsnprintf(a->body + a->len, room, format, args);
    va_end(args);
    a->len += n < 0 ? 0 : (size_t)n < room ? (size_t)n : room - 1;
}

/* "key":"text". Text that was cut within a character is not UTF-8 any more: then all beyond ASCII becomes '?'. */
static void put_text(admin *a, const char *key, const char *text) {
    size_t start, i;
    put(a, "\"%s\":", key);
    start = a->len;
    put(a, "\"");
    for (i = 0; text[i] && i < 255; i++)
        if ((unsigned char)text[i] < 0x20) put(a, "\\u%04x", (unsigned)text[i]);
        else put(a, text[i] == '"' || text[i] == '\\' ? "\\%c" : "%c", text[i]);
    put(a, "\"");
    if (chaos_json_check(a->body + start, a->len - start, NULL) != CHAOS_OK)
        for (i = start; i < a->len; i++)
            if ((unsigned char)a->body[i] >= 0x80) a->body[i] = '?';
    put(a, ",");
}

static void write_health(admin *a) { put(a, "ok\n"); }
static void write_metrics(admin *a) { a->len = chaos_metrics(a->faults, a->body, sizeof a->body); }

static void write_config(admin *a) {
    static chaos_config config;
    static char text[ADMIN_BODY - 8192];
    char end[32] = "null";
    chaos_report r;
    time_t seconds;
    struct tm utc;
    bool known;
    chaos_stats(a->faults, &r);
    seconds = (time_t)(r.end_ms / 1000);
    if (r.end_ms && gmtime_r(&seconds, &utc)) strftime(end, sizeof end, "\"%Y-%m-%dT%H:%M:%SZ\"", &utc);
    put(a, "{");
    put_text(a, "state", chaos_state_text(r.state));
    put_text(a, "reason", r.reason);
    put_text(a, "problem", r.problem);
    if (r.way[0]) put_text(a, "way", r.way);
    if (a->service) put_text(a, "service", a->service);
    if (a->instance) put_text(a, "instance", a->instance);
    put(a, "\"version\":%llu,\"age_ms\":%lld,\"end\":%s,\"config\":", r.version, r.age_ms, end);
    known = chaos_get_config(a->faults, &config) && chaos_config_format(&config, text, sizeof text) < sizeof text;
    put(a, "%s}\n", known ? text : "null");
}

static const struct page {
    const char *path, *type;
    void (*write)(admin *a);
} pages[] = {{"/healthz", "text/plain; charset=utf-8", write_health},
             {"/metrics", "text/plain; version=0.0.4; charset=utf-8", write_metrics},
             {"/config", "application/json", write_config}};

/* Answers once; error NULL = look at the request. Never waits: the socket's buffer takes a reply whole. */
static void admin_answer(admin *a, admin_client *c, const char *error) {
    char method[16] = "", path[256] = "", minor[2], cr[2], head[256];
    const char *status = error, *type = "text/plain; charset=utf-8";
    size_t i;
    a->len = 0;
    if (!status && sscanf(c->head, "%15[A-Z] %255[!-~] HTTP/1.%1[01]%1[\r]", method, path, minor, cr) != 4) status = "400 Bad Request";
    if (!status && strcmp(method, "GET") && strcmp(method, "HEAD")) status = "405 Method Not Allowed";
    path[strcspn(path, "?")] = 0;
    for (i = 0; i < sizeof pages / sizeof pages[0] && !status; i++) {
        if (strcmp(path, pages[i].path)) continue;
        status = "200 OK";
        type = pages[i].type;
        pages[i].write(a);
    }
    if (!status) status = "404 Not Found";
    if (!a->len) put(a, "%s\n", status);
    snprintf(head, sizeof head,
             "HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %lu\r\n%sCache-Control: no-store\r\nConnection: close\r\n\r\n", status,
             type, (unsigned long)a->len, strncmp(status, "405", 3) ? "" : "Allow: GET, HEAD\r\n");
    send(c->fd, head, strlen(head), MSG_DONTWAIT);
    if (strcmp(method, "HEAD")) send(c->fd, a->body, a->len, MSG_DONTWAIT);
    shutdown(c->fd, SHUT_WR);
    c->answered = true;
}

static void admin_close(admin_client *c) {
    close(c->fd);
    c->fd = -1;
}

static void admin_read(admin *a, admin_client *c) {
    size_t len = c->answered ? 0 : c->len;
    ssize_t n = recv(c->fd, c->head + len, ADMIN_HEAD - len, MSG_DONTWAIT);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) {
        admin_close(c);
    } else if (!c->answered) {
        c->len += (size_t)n;
        c->head[c->len] = 0;
        if (strstr(c->head, "\r\n\r\n")) admin_answer(a, c, NULL);
        else if (strlen(c->head) < c->len) admin_answer(a, c, "400 Bad Request");
        else if (c->len == ADMIN_HEAD) admin_answer(a, c, "431 Request Header Fields Too Large");
    }
}

static long long now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (long long)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

static void admin_accept(admin *a, admin_client *c) {
    int room = 2 * ADMIN_BODY;
    c->fd = accept(a->listener, NULL, NULL);
    if (c->fd < 0) {
        poll(NULL, 0, 20); /* no descriptor left, perhaps: not at full speed then */
        return;
    }
    fcntl(c->fd, F_SETFD, FD_CLOEXEC);
    setsockopt(c->fd, SOL_SOCKET, SO_SNDBUF, &room, sizeof room);
    c->deadline = now_ms() + ADMIN_MS;
    c->answered = false;
    c->len = 0;
}

/* All clients in one thread, none of which it waits for. When there is no room, more wait in the backlog. */
static void *admin_main(void *arg) {
    admin *a = (admin *)arg;
    struct pollfd fds[ADMIN_CLIENTS + 2];
    admin_client *c, *end = a->clients + ADMIN_CLIENTS, *spare, *oldest;
    for (;;) {
        long long now = now_ms(), next = now + 60000;
        int i = 0;
        for (spare = NULL, oldest = c = a->clients; c < end; c++, i++) {
            if (c->fd >= 0 && c->deadline <= now) {
                if (!c->answered) admin_answer(a, c, "408 Request Timeout");
                admin_close(c);
            }
            if (c->fd < 0) spare = c;
            else if (c->deadline < next) next = c->deadline, oldest = c;
            fds[i].fd = c->fd;
        }
        if (!spare && oldest->deadline - ADMIN_MS + ADMIN_FULL_MS <= now) { /* full: who has been here for a while makes room */
            admin_close(oldest);
            fds[oldest - a->clients].fd = -1;
            spare = oldest;
        } else if (!spare && oldest->deadline - ADMIN_MS + ADMIN_FULL_MS < next) next = oldest->deadline - ADMIN_MS + ADMIN_FULL_MS;
        fds[i].fd = spare ? a->listener : -1;
        fds[i + 1].fd = a->stop[0];
        for (i = 0; i < ADMIN_CLIENTS + 2; i++) fds[i].events = POLLIN;
        if (poll(fds, ADMIN_CLIENTS + 2, (int)(next - now)) < 0) continue;
        if (fds[ADMIN_CLIENTS + 1].revents) break;
        for (i = 0, c = a->clients; c < end; c++, i++)
            if (fds[i].revents) admin_read(a, c);
        if (fds[ADMIN_CLIENTS].revents) admin_accept(a, spare);
    }
    for (c = a->clients; c < end; c++)
        if (c->fd >= 0) admin_close(c);
    return NULL;
}

/* HOST:PORT, [V6]:PORT, :PORT or PORT; no host = 127.0.0.1. unknown: the exit code when there is no such host. */
static struct addrinfo *resolve(const char *flag, const char *text, int unknown) {
    const char *colon = strrchr(text, ':'), *port = colon ? colon + 1 : text, *at = text;
    size_t len = colon ? (size_t)(colon - text) : 0;
    char host[256] = "127.0.0.1";
    struct addrinfo hints, *list;
    int error;
    if (len >= 2 && at[0] == '[' && at[len - 1] == ']') at++, len -= 2;
    else if (memchr(at, ':', len)) len = sizeof host; /* IPv6 without its brackets */
    if (len >= sizeof host || number(port, false) < 0 || number(port, false) > 65535) fail(2, "%s: '%s' is not ADDR:PORT", flag, text);
    if (len) snprintf(host, sizeof host, "%.*s", (int)len, at);
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    error = getaddrinfo(host, port, &hints, &list);
    if (error) fail(unknown, "%s: %s: %s", flag, text, gai_strerror(error));
    return list;
}

/* Opens the listener, so that a bad address is told before anything runs. */
static void admin_open(admin *a, const settings *s) {
    struct addrinfo *list = resolve("--admin", s->admin, 2);
    struct sockaddr_storage bound;
    socklen_t size = sizeof bound;
    char host[64], port[8];
    int i, on = 1;
    getnameinfo(list->ai_addr, list->ai_addrlen, host, sizeof host, NULL, 0, NI_NUMERICHOST);
    if (!s->admin_any && strncmp(host, "127.", 4) && strcmp(host, "::1"))
        fail(2, "--admin: %s is not a loopback address: who reaches it can read the config; say --admin-any if that is meant", s->admin);
    a->listener = socket(list->ai_family, SOCK_STREAM, 0);
    setsockopt(a->listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (a->listener < 0 || bind(a->listener, list->ai_addr, list->ai_addrlen) || listen(a->listener, 64) || pipe(a->stop))
        fail(1, "--admin: %s: %s", s->admin, strerror(errno));
    fcntl(a->listener, F_SETFL, O_NONBLOCK);
    fcntl(a->listener, F_SETFD, FD_CLOEXEC);
    fcntl(a->stop[0], F_SETFD, FD_CLOEXEC);
    fcntl(a->stop[1], F_SETFD, FD_CLOEXEC);
    getsockname(a->listener, (struct sockaddr *)&bound, &size);
    getnameinfo((struct sockaddr *)&bound, size, host, sizeof host, port, sizeof port, NI_NUMERICHOST | NI_NUMERICSERV);
    snprintf(a->address, sizeof a->address, strchr(host, ':') ? "[%s]:%s" : "%s:%s", host, port);
    freeaddrinfo(list);
    a->service = s->chaos.service ? s->chaos.service : getenv("CHAOS_SERVICE");
    a->instance = s->chaos.instance;
    for (i = 0; i < ADMIN_CLIENTS; i++) a->clients[i].fd = -1;
}

static void admin_start(admin *a) {
    int error = pthread_create(&a->thread, NULL, admin_main, a);
    if (error) fail(1, "cannot start a thread: %s", strerror(error));
    a->running = true;
}

static void admin_end(admin *a) {
    close(a->stop[1]);
    if (a->running) pthread_join(a->thread, NULL);
    close(a->stop[0]);
    close(a->listener);
}

/* ---- --health: the client of that listener ---- */
static void too_late(int sig) {
    static const char text[] = "chaos-proxy: --health: no answer within 2 s\n";
    ssize_t n = write(2, text, sizeof text - 1);
    (void)sig, (void)n;
    _exit(1);
}

static int health(const char *address) {
    static const char request[] = "GET /healthz HTTP/1.1\r\nHost: chaos-proxy\r\nConnection: close\r\n\r\n";
    char reply[1024] = "";
    const char *body;
    struct addrinfo *list, *a;
    size_t len = 0;
    ssize_t n;
    int fd = -1;
    signal(SIGALRM, too_late); /* the one deadline of all that follows */
    alarm(2);
    list = resolve("--health", address, 1);
    for (a = list; a; a = a->ai_next) {
        fd = socket(a->ai_family, SOCK_STREAM, 0);
        if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen) == 0) break;
        if (!a->ai_next) fail(1, "--health: %s: %s", address, strerror(errno));
        close(fd);
    }
    freeaddrinfo(list);
    send(fd, request, sizeof request - 1, MSG_NOSIGNAL);
    while (len + 1 < sizeof reply && (n = recv(fd, reply + len, sizeof reply - 1 - len, 0)) > 0) len += (size_t)n;
    close(fd);
    body = strstr(reply, "\r\n\r\n");
    if (strncmp(reply, "HTTP/1.1 200 ", 13) || !body || strcmp(body, "\r\n\r\nok\n"))
        fail(1, "--health: %s: no chaos-proxy --admin answers there", address);
    return 0;
}

/* ---- running ---- */
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
    chaos_proxy_stop(w->faults); /* and with it a fetch that a late SIGHUP began */
    pthread_kill(w->thread, wake);
    pthread_join(w->thread, NULL);
}

static void on_listening(void *user, const char *address) {
    admin *a = (admin *)user;
    printf("chaos-proxy listening on %s\n", address);
    if (*a->address) admin_start(a);
    if (*a->address) printf("chaos-proxy admin on %s\n", a->address);
    fflush(stdout);
}

/* A setting the header refused, or something it could not do? */
static int exit_code(chaos_result r) { return r == CHAOS_ERR_MEMORY || r == CHAOS_ERR_SYSTEM || r == CHAOS_ERR_UNREACHABLE ? 1 : 2; }

/* A remote source gets 3 s to answer before anybody is served: the proxy works without it, off. */
static void wait_for_config(chaos *faults) {
    const struct timespec nap = {0, 10000000};
    chaos_report r;
    int i;
    for (i = 0; i < 300; i++) {
        chaos_stats(faults, &r);
        if (r.fetches || r.state == CHAOS_STATE_KILLED) return;
        nanosleep(&nap, NULL);
    }
}

static int run(settings *s) {
    static chaos_config config;
    static watcher stop, reread;
    static admin panel;
    chaos_error err;
    chaos_result result;
    chaos *faults;
    if (!s->proxy.upstream) fail(2, "--upstream is missing: --upstream http://HOST:PORT (or CHAOS_UPSTREAM)");
    if (s->chaos.config && is_json(s->chaos.config)) parse_or_fail(&config, s->chaos.config, 2);
    if (s->admin) admin_open(&panel, s);

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
    if (is_remote(s->chaos.config)) wait_for_config(faults);
    panel.faults = faults;
    s->proxy.listening = on_listening;
    s->proxy.user = &panel;
    result = chaos_proxy_run(faults, &s->proxy, &err);
    if (s->admin) admin_end(&panel);
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
    if (s.version) return printf("chaos-proxy %s\nconfig sources: %s\n", chaos_version(), chaos_sources()) < 0;
    if (s.health) return health(s.health);
    return s.check ? check(&s) : run(&s);
}

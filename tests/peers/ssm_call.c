/* The public calls of the SSM control plane, for tests/peers/ssm.py and agents.py: each result is one line of JSON.

   ssm_call get|put|list NAME [region=R] [endpoint=URL] [type=T] [timeout=MS] [cap=BYTES] [times=N]     put reads the text from stdin
   ssm_call watch SOURCE [ttl=MS] [stale=MS]     a handle without a refresher, steered by the lines of stdin: refresh, shift MS
   ssm_call wake SOURCE [ttl=MS] [stale=MS]      with one: a line when it is on, and one when chaos_wake_fd says that it is not */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

#include <dirent.h>
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>

static int count; /* of the command line */
static char **words;
static unsigned long long shift_ns;

/* The value of NAME=VALUE. */
static const char *option(const char *name) {
    size_t len = strlen(name);
    int i;
    for (i = 3; i < count; i++)
        if (!strncmp(words[i], name, len) && words[i][len] == '=') return words[i] + len + 1;
    return NULL;
}

static int option_number(const char *name, int other) { return option(name) ? atoi(option(name)) : other; }

static unsigned long long now(void *user, bool wall) {
    struct timespec t;
    (void)user;
    clock_gettime(wall ? CLOCK_REALTIME : CLOCK_MONOTONIC, &t);
    return (unsigned long long)t.tv_sec * 1000000000u + (unsigned long long)t.tv_nsec + shift_ns;
}

static void put_bytes(const char *key, const char *text, size_t len) {
    size_t i;
    printf("\"%s\":\"", key);
    for (i = 0; i < len; i++)
        if ((unsigned char)text[i] < 0x20) printf("\\u%04x", (unsigned)text[i]);
        else printf(text[i] == '"' || text[i] == '\\' ? "\\%c" : "%c", text[i]);
    printf("\",");
}

static void put_text(const char *key, const char *text) { put_bytes(key, text, strlen(text)); }

/* What may leak, then the end of the line. children: 1 = there is one, running or not yet waited for. */
static void put_rest(unsigned long long began) {
    DIR *dir = opendir("/proc/self/fd");
    int fds = -3; /* ".", ".." and the folder itself */
    while (dir && readdir(dir)) fds++;
    if (dir) closedir(dir);
    printf("\"fds\":%d,\"children\":%d,\"ms\":%llu}\n", fds, !(waitpid(-1, NULL, WNOHANG) == -1 && errno == ECHILD),
           (now(NULL, false) - began) / 1000000u);
    fflush(stdout);
}

static void put_error(chaos_result r, const chaos_error *err) {
    printf("{");
    put_text("code", chaos_result_text(r));
    put_text("err", err->text);
}

static int one_call(const char *action, const char *name) {
    static char buf[CHAOS_SSM_BUFFER], text[200000];
    size_t cap = (size_t)option_number("cap", (int)sizeof buf), len = 0;
    unsigned long long began;
    chaos_ssm_value value;
    chaos_ssm_desc d;
    chaos_result r;
    chaos_error err;
    memset(&d, 0, sizeof d);
    d.name = name;
    d.region = option("region");
    d.endpoint = option("endpoint");
    d.type = option("type");
    d.timeout_ms = option_number("timeout", 0);
    if (!strcmp(action, "put")) len = fread(text, 1, sizeof text, stdin);
    memset(buf, 'x', sizeof buf);
    memset(&value, 0, sizeof value);
    memset(&err, 0, sizeof err);
    began = now(NULL, false);
    if (!strcmp(action, "get")) r = chaos_ssm_get(&d, buf, cap, &value, &err);
    else if (!strcmp(action, "put")) r = chaos_ssm_put(&d, text, len, &value, &err);
    else r = chaos_ssm_list(&d, buf, cap, &value, &err);
    put_error(r, &err);
    if (r == CHAOS_OK && strcmp(action, "put")) {
        put_bytes("value", buf, value.len);
        printf("\"terminated\":%s,", value.len < cap && !buf[value.len] ? "true" : "false");
    }
    put_text("type", value.type);
    put_text("way", value.way);
    printf("\"version\":%llu,\"modified_ms\":%lld,", value.version, value.modified_ms);
    put_rest(began);
    return r == CHAOS_ERR_COMPILED_OUT;
}

static void log_line(void *user, const char *line, size_t len) {
    (void)user;
    fwrite(line, 1, len, stdout);
}

static int watch(const char *source) {
    unsigned long long began = now(NULL, false);
    char line[100] = "";
    chaos_result r = CHAOS_OK;
    chaos_report s;
    chaos_error err;
    chaos_desc d;
    chaos *c;
    memset(&d, 0, sizeof d);
    memset(&err, 0, sizeof err);
    d.config = source;
    d.ttl_ms = option_number("ttl", 0);
    d.max_stale_ms = option_number("stale", 0);
    d.no_thread = true;
    d.instance = "peer-test";
    d.log = log_line;
    d.clock = now;
    c = chaos_open(&d, &err);
    do {
        if (!c) r = err.code;
        else if (!strncmp(line, "shift ", 6)) shift_ns += (unsigned long long)atoll(line + 6) * 1000000u;
        else if (*line) r = chaos_refresh(c, &err);
        put_error(r, &err);
        chaos_stats(c, &s);
        put_text("state", chaos_state_text(s.state));
        put_text("reason", s.reason);
        put_text("problem", s.problem);
        put_text("way", s.way);
        printf("\"version\":%llu,\"age_ms\":%lld,\"end_ms\":%lld,\"fetches\":%llu,\"fetch_errors\":%llu,\"config_errors\":%llu,", s.version,
               s.age_ms, s.end_ms, s.fetches, s.fetch_errors, s.config_errors);
        put_rest(began);
    } while (c && fgets(line, sizeof line, stdin) && (began = now(NULL, false)));
    chaos_close(c);
    return 0;
}

static int wake(const char *source) {
    struct pollfd p = {-1, POLLIN, 0};
    unsigned long long began;
    chaos_report s;
    chaos_desc d;
    chaos *c;
    memset(&d, 0, sizeof d);
    d.config = source;
    d.ttl_ms = option_number("ttl", 0);
    d.max_stale_ms = option_number("stale", 0);
    d.quiet = true;
    c = chaos_open(&d, NULL);
    p.fd = chaos_wake_fd(c);
    while (poll(&p, 1, 0) > 0) poll(NULL, 0, 5); /* whoever started this one has a deadline */
    began = now(NULL, false);
    printf("{\"on\":true,");
    put_rest(began);
    poll(&p, 1, 60000);
    chaos_stats(c, &s);
    printf("{\"on\":false,");
    put_text("state", chaos_state_text(s.state));
    put_rest(began);
    chaos_close(c);
    return 0;
}

int main(int argc, char **argv) {
    int times, r = 0;
    if (argc < 3) return 2;
    count = argc;
    words = argv;
    if (!strcmp(argv[1], "watch")) return watch(argv[2]);
    if (!strcmp(argv[1], "wake")) return wake(argv[2]);
    for (times = option_number("times", 1); times > 0 && !r; times--) r = one_call(argv[1], argv[2]);
    return r;
}

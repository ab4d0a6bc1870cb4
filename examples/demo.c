/* demo.c - what a client sees while chaos is off, on, and rolled back, in about six seconds

   Starts chaos-upstream and, in front of it, chaos-proxy with its config in a file. Sixteen keep-alive clients send
   requests while the file is rewritten twice. Prints what they saw, checks it, stops everything.

   Build and run:  make demo        (exit 0 = as promised, 1 = not)                                                */

#define _POSIX_C_SOURCE 200809L
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { CLIENTS = 16, EACH = 25, TOTAL = CLIENTS * EACH, TTL = 200, LATENCY = 200, RATE = 20, PHASES = 3 };

#define OFF_CONFIG "{\"enabled\":false}"
#define ON_CONFIG  "{\"enabled\":true,\"latency\":200,\"errorRate\":20,\"errorStatus\":503,\"seed\":42}"

typedef struct sample {
    double ms;
    int status;
    bool injected;
} sample;

typedef struct phase {
    const char *name, *config;
    bool chaos;         /* what every answer must be once the config is in force */
    sample seen[TOTAL]; /* EACH per client, taken after that client saw the config in force */
    double settled_ms;  /* from the file's change to the last answer of the old kind */
    double p50, p95, p99;
    int ok, injected, other;
} phase;

typedef struct client {
    int fd, number;
    phase *now;
    bool failed;
} client;

static phase phases[PHASES] = {
    {.name = "off", .config = OFF_CONFIG, .chaos = false},
    {.name = "on", .config = ON_CONFIG, .chaos = true},
    {.name = "rolled back", .config = OFF_CONFIG, .chaos = false},
};

static pid_t children[2];
static char folder[64], config_path[96];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int asked;         /* requests sent in this phase */
static double changed_at; /* when its config was put in place, 0 = not yet */

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* Also a signal handler: only async-signal-safe calls. SIGTERM first, SIGKILL for a child that stays 2 s. */
static void stop_everything(int signal_number) {
    int i, tries;
    for (i = 0; i < 2; i++)
        if (children[i] > 0) kill(children[i], SIGTERM);
    for (i = 0; i < 2; i++) {
        for (tries = 0; children[i] > 0 && waitpid(children[i], NULL, WNOHANG) == 0; tries++) {
            if (tries == 200) kill(children[i], SIGKILL);
            poll(NULL, 0, 10);
        }
        children[i] = 0;
    }
    unlink(config_path);
    rmdir(folder);
    if (signal_number) _exit(1);
}

static void fail(const char *what, const char *why) {
    printf("\ndemo FAILED: %s: %s\n", what, why);
    fflush(stdout);
    stop_everything(0);
    exit(1);
}

/* A rename is atomic: the proxy sees the old config or the new one, never half of it. */
static void put_config(const char *text) {
    char temporary[112];
    FILE *f;
    snprintf(temporary, sizeof temporary, "%s.new", config_path);
    f = fopen(temporary, "w");
    if (!f || fputs(text, f) < 0 || fclose(f) != 0 || rename(temporary, config_path) != 0) fail(config_path, strerror(errno));
}

/* Starts a program of the build folder and returns the port of its "... listening on ADDR:PORT" line. */
static int start(int slot, char *const argv[]) {
    char line[256] = "", *colon;
    int out[2];
    size_t len = 0;
    double deadline = now_ms() + 5000;
    if (pipe(out) != 0) fail("pipe", strerror(errno));
    children[slot] = fork();
    if (children[slot] < 0) fail("fork", strerror(errno));
    if (children[slot] == 0) {
        dup2(out[1], STDOUT_FILENO);
        close(out[0]);
        close(out[1]);
        execv(argv[0], argv);
        fprintf(stderr, "%s: %s\n", argv[0], strerror(errno));
        _exit(127);
    }
    close(out[1]);
    while (!strchr(line, '\n')) {
        struct pollfd p = {out[0], POLLIN, 0};
        ssize_t n;
        if (now_ms() > deadline || len + 1 >= sizeof line) fail(argv[0], "did not say where it listens");
        if (poll(&p, 1, 100) < 1) continue;
        n = read(out[0], line + len, sizeof line - 1 - len);
        if (n <= 0) fail(argv[0], "did not start");
        len += (size_t)n;
        line[len] = 0;
    }
    colon = strrchr(line, ':'); /* out[0] stays open: the child may print on */
    if (!strstr(line, " listening on ") || !colon) fail(argv[0], line);
    return atoi(colon + 1);
}

static int dial(int port) {
    struct sockaddr_in to;
    struct timeval patience = {5, 0};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(&to, 0, sizeof to);
    to.sin_family = AF_INET;
    to.sin_port = htons((unsigned short)port);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to) != 0) fail("connect to the proxy", strerror(errno));
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    return fd;
}

/* One request and its whole reply on a connection that stays open. False = the connection broke. */
static bool ask(int fd, sample *s) {
    static const char request[] = "GET / HTTP/1.1\r\nHost: demo\r\n\r\n";
    char buf[8192], *end = NULL, *line;
    size_t have = 0, body = 0;
    double began = now_ms();
    if (send(fd, request, sizeof request - 1, MSG_NOSIGNAL) != (ssize_t)sizeof request - 1) return false;
    do {
        ssize_t n = recv(fd, buf + have, sizeof buf - 1 - have, 0);
        if (n <= 0) return false;
        have += (size_t)n;
        buf[have] = 0;
        if (!end && (end = strstr(buf, "\r\n\r\n")) != NULL) {
            s->status = strncmp(buf, "HTTP/1.1 ", 9) == 0 ? atoi(buf + 9) : 0;
            s->injected = false;
            for (line = strstr(buf, "\r\n"); line && line < end; line = strstr(line + 2, "\r\n")) {
                if (strncasecmp(line + 2, "X-Chaos-Injected:", 17) == 0) s->injected = true;
                if (strncasecmp(line + 2, "Content-Length:", 15) == 0) body = (size_t)strtoul(line + 17, NULL, 10);
            }
        }
        if (end && (size_t)(end + 4 - buf) + body >= sizeof buf) return false; /* not this demo's upstream */
    } while (!end || have < (size_t)(end + 4 - buf) + body);
    s->ms = now_ms() - began;
    return s->status != 0;
}

/* Asks until the new config shows, then takes its samples. */
static void *client_run(void *arg) {
    client *c = (client *)arg;
    phase *p = c->now;
    sample s;
    int i;
    do {
        pthread_mutex_lock(&lock);
        asked++;
        pthread_mutex_unlock(&lock);
        c->failed = !ask(c->fd, &s);
        pthread_mutex_lock(&lock);
        if (changed_at > 0 && s.injected != p->chaos) p->settled_ms = now_ms() - changed_at;
        pthread_mutex_unlock(&lock);
    } while (!c->failed && s.injected != p->chaos);
    for (i = 0; i < EACH && !c->failed; i++) c->failed = !ask(c->fd, &p->seen[c->number * EACH + i]);
    return NULL;
}

/* Runs one phase: the clients first, so that the config changes under requests that are in flight. */
static void run_phase(phase *p, client *clients) {
    pthread_t threads[CLIENTS];
    int i, sent = 0;
    asked = 0;
    changed_at = 0;
    for (i = 0; i < CLIENTS; i++) {
        clients[i].now = p;
        if (pthread_create(&threads[i], NULL, client_run, &clients[i]) != 0) fail("thread", "cannot be made");
    }
    while (sent < CLIENTS) {
        poll(NULL, 0, 1);
        pthread_mutex_lock(&lock);
        sent = asked;
        pthread_mutex_unlock(&lock);
    }
    pthread_mutex_lock(&lock);
    put_config(p->config);
    changed_at = now_ms();
    pthread_mutex_unlock(&lock);
    for (i = 0; i < CLIENTS; i++) pthread_join(threads[i], NULL);
    for (i = 0; i < CLIENTS; i++)
        if (clients[i].failed) fail(p->name, "a client's keep-alive connection broke");
}

static int by_ms(const void *a, const void *b) {
    double x = ((const sample *)a)->ms, y = ((const sample *)b)->ms;
    return (x > y) - (x < y);
}

static void sum_up(phase *p) {
    int i;
    qsort(p->seen, TOTAL, sizeof p->seen[0], by_ms);
    for (i = 0; i < TOTAL; i++) {
        if (p->seen[i].status == 200) p->ok++;
        else if (p->seen[i].status == 503 && p->seen[i].injected) p->injected++;
        else p->other++;
    }
    p->p50 = p->seen[TOTAL / 2].ms;
    p->p95 = p->seen[TOTAL * 95 / 100].ms;
    p->p99 = p->seen[TOTAL * 99 / 100].ms;
}

static void print_table(void) {
    int i;
    printf("\n  phase         requests      ok  injected 503      p50 ms    p95 ms    p99 ms\n");
    printf("  ---------------------------------------------------------------------------\n");
    for (i = 0; i < PHASES; i++) {
        const phase *p = &phases[i];
        printf("  %-12s  %8d  %6d  %4d  %4.1f %%  %12.2f  %8.2f  %8.2f\n", p->name, TOTAL, p->ok, p->injected, 100.0 * p->injected / TOTAL,
               p->p50, p->p95, p->p99);
    }
}

/* One row per range of times, one column per phase; a mark stands for TOTAL / 20 requests, begun ones counted. */
static void print_histogram(void) {
    static const struct {
        double below;
        const char *name;
    } rows[] = {{1, "  0 -   1 ms"},   {5, "  1 -   5 ms"},   {50, "  5 -  50 ms"}, {200, " 50 - 200 ms"},
                {205, "200 - 205 ms"}, {250, "205 - 250 ms"}, {1e9, "above 250 ms"}};
    size_t r;
    int i, k, column;
    printf("\n  what the clients saw: # 200 OK, x injected 503, one mark = %d requests\n\n", TOTAL / 20);
    printf("                  %-20s %-20s %s\n", phases[0].name, phases[1].name, phases[2].name);
    for (r = 0; r < sizeof rows / sizeof rows[0]; r++) {
        double above = r ? rows[r - 1].below : 0;
        printf("  %s  ", rows[r].name);
        for (i = 0; i < PHASES; i++) {
            int good = 0, bad = 0;
            for (k = 0; k < TOTAL; k++) {
                const sample *s = &phases[i].seen[k];
                if (s->ms < above || s->ms >= rows[r].below) continue;
                if (s->status == 200) good++;
                else bad++;
            }
            good = (good * 20 + TOTAL - 1) / TOTAL;
            bad = (bad * 20 + TOTAL - 1) / TOTAL;
            printf("|");
            for (column = 0; column < 20 && (column < good + bad || i < PHASES - 1); column++)
                putchar(column < good ? '#' : column < good + bad ? 'x' : ' ');
        }
        printf("\n");
    }
}

static int wrong(bool is_right, const char *promise) {
    printf("  [%s] %s\n", is_right ? " ok " : "FAIL", promise);
    return !is_right;
}

static int check(void) {
    const phase *on = &phases[1];
    char text[100];
    /* 99.9 % interval of a binomial count, squared: (k - np)^2 <= 3.29^2 npq */
    double off_by = on->injected - TOTAL * RATE / 100.0, limit = 10.83 * TOTAL * RATE * (100 - RATE) / 10000.0;
    int i, quick = 0, stray = 0, bad = 0;
    for (i = 0; i < TOTAL; i++) {
        if (on->seen[i].status == 200 && on->seen[i].ms < LATENCY) quick++;
        stray += !on->seen[i].injected || phases[0].seen[i].injected || phases[2].seen[i].injected;
    }
    printf("\n");
    bad += wrong(phases[0].ok == TOTAL && phases[2].ok == TOTAL, "off and rolled back: every answer is the service's own 200");
    snprintf(text, sizeof text, "on: %d of %d failed, within the 99.9 %% interval around %d %%", on->injected, TOTAL, RATE);
    bad += wrong(off_by * off_by <= limit && on->other == 0, text);
    snprintf(text, sizeof text, "on: every 200 came %d ms late or later", LATENCY);
    bad += wrong(quick == 0 && on->ok > 0, text);
    bad += wrong(stray == 0, "every injected answer says so (X-Chaos-Injected), and no other");
    for (i = 1; i < PHASES; i++) {
        snprintf(text, sizeof text, "%s: last answer of the old kind %.0f ms after the file changed (TTL %d)", phases[i].name,
                 phases[i].settled_ms, TTL);
        bad += wrong(phases[i].settled_ms < TTL + 1000, text);
    }
    bad += wrong(true, "no client's connection broke while the config changed under it");
    return bad;
}

int main(int argc, char **argv) {
    static client clients[CLIENTS];
    char upstream_program[512], proxy_program[512], upstream[64], config[112];
    char *slash = strrchr(argv[0], '/');
    int length = slash ? (int)(slash - argv[0]) : 1;
    int i, upstream_port, proxy_port, bad;
    double began = now_ms();
    (void)argc;

    snprintf(folder, sizeof folder, "/tmp/chaos-demo-XXXXXX");
    if (!mkdtemp(folder)) fail("/tmp", strerror(errno));
    snprintf(config_path, sizeof config_path, "%s/chaos.json", folder);
    snprintf(config, sizeof config, "file:%s", config_path);
    snprintf(upstream_program, sizeof upstream_program, "%.*s/chaos-upstream", length, slash ? argv[0] : ".");
    snprintf(proxy_program, sizeof proxy_program, "%.*s/chaos-proxy", length, slash ? argv[0] : ".");
    signal(SIGINT, stop_everything);
    signal(SIGTERM, stop_everything);
    signal(SIGALRM, stop_everything);
    alarm(15);

    put_config(OFF_CONFIG);
    upstream_port = start(0, (char *[]){upstream_program, (char *)"--listen", (char *)"127.0.0.1:0", NULL});
    snprintf(upstream, sizeof upstream, "http://127.0.0.1:%d", upstream_port);
    proxy_port = start(1, (char *[]){proxy_program, (char *)"--listen", (char *)"127.0.0.1:0", (char *)"--upstream", upstream,
                                     (char *)"--config", config, (char *)"--ttl", (char *)"200", (char *)"--instance", (char *)"demo",
                                     (char *)"--drain", (char *)"1000", (char *)"--quiet", NULL});

    printf("\n  %d clients -> chaos-proxy :%d -> chaos-upstream :%d\n", CLIENTS, proxy_port, upstream_port);
    printf("  %s\n", config);
    for (i = 0; i < CLIENTS; i++) {
        clients[i].number = i;
        clients[i].fd = dial(proxy_port);
    }
    for (i = 0; i < PHASES; i++) {
        printf("    %-12s %s\n", phases[i].name, phases[i].config);
        fflush(stdout);
        run_phase(&phases[i], clients);
        sum_up(&phases[i]);
    }
    for (i = 0; i < CLIENTS; i++) close(clients[i].fd);
    stop_everything(0);

    print_table();
    print_histogram();
    bad = check();
    printf("\n  %s, %.1f s\n\n", bad ? "NOT as promised" : "as promised", (now_ms() - began) / 1000);
    return bad ? 1 : 0;
}

/* micro.c - what the in-process calls cost. Prints one row per figure: name TAB measured TAB goal TAB ok|over|-

   Built twice by tests/bench/run: beside a separate object of chaos.h (a real call, as from any other file of a
   program) and with -DBENCH_ONE_FILE (the implementation in this file, the compiler may inline). With -DHAVE_FIU
   libfiu is timed in the same loop. Usage: micro [--quick] */
#ifdef BENCH_ONE_FILE
#define CHAOS_IMPLEMENTATION
#define HOW "same file"
#else
#define _POSIX_C_SOURCE 200809L
#define HOW             "separate object"
#endif
#include "../../chaos.h"

#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#ifdef HAVE_FIU
#define FIU_ENABLE 1
#include <fiu.h>
#include <fiu-control.h>
#endif

enum { ROUNDS = 9, SLEEPERS = 50 };
#define FOUR_KEYS "{\"enabled\":true,\"latency\":200,\"errorRate\":5,\"errorStatus\":503}"

static long scale = 1; /* --quick divides the loop counts */

/* ---- every allocation of the process is counted, so that "none" is a measurement ---- */
#if defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#define COUNTS_ALLOCATIONS 1
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *malloc(size_t n);
void *calloc(size_t n, size_t size);
void *realloc(void *p, size_t n);
static unsigned long allocations;
void *malloc(size_t n) {
    __atomic_add_fetch(&allocations, 1, __ATOMIC_RELAXED);
    return __libc_malloc(n);
}
void *calloc(size_t n, size_t size) {
    __atomic_add_fetch(&allocations, 1, __ATOMIC_RELAXED);
    return __libc_calloc(n, size);
}
void *realloc(void *p, size_t n) {
    __atomic_add_fetch(&allocations, 1, __ATOMIC_RELAXED);
    return __libc_realloc(p, n);
}
#else
#define COUNTS_ALLOCATIONS 0
static unsigned long allocations;
#endif

/* CPU time of this thread: a busy machine must not look like a slow function. */
static double cpu_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *v, size_t n) {
    qsort(v, n, sizeof *v, ascending);
    return n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

/* goal 0 = none stated */
static void row(const char *name, double value, const char *unit, double goal, const char *note) {
    char target[32] = "-";
    if (goal > 0) snprintf(target, sizeof target, "<= %g %s", goal, unit);
    printf("%s\t%.2f %s%s\t%s\t%s\n", name, value, unit, note, target, goal <= 0 ? "-" : value <= goal ? "ok" : "over");
    fflush(stdout);
}

/* The compiler must neither drop the loop nor the values in it. */
#define KEEP(p) __asm__ volatile("" : : "r"(p) : "memory")

static const chaos_request request = {"GET", 3, "/api/v1/orders/42", 17, NULL, 0, NULL, NULL};

static double loop_empty(long n) {
    chaos_verdict v;
    double t = cpu_ns();
    long i;
    memset(&v, 0, sizeof v);
    for (i = 0; i < n; i++) {
        KEEP(&request);
        KEEP(&v);
    }
    return (cpu_ns() - t) / (double)n;
}

static double loop_decide(chaos *c, long n) {
    double t = cpu_ns();
    long i;
    for (i = 0; i < n; i++) {
        KEEP(&request);
        {
            chaos_verdict v = chaos_decide(c, &request);
            KEEP(&v);
        }
    }
    return (cpu_ns() - t) / (double)n;
}

#ifndef BENCH_ONE_FILE
/* What any call across files costs, for scale: the compiler does not see where it goes. */
static int nothing(chaos *c, const chaos_request *r) { return c != NULL && r->method_len == 3; }

static double loop_call(long n) {
    int (*volatile call)(chaos *, const chaos_request *) = nothing;
    double t = cpu_ns();
    long i;
    for (i = 0; i < n; i++) {
        int r = call(NULL, &request);
        KEEP(&r);
    }
    return (cpu_ns() - t) / (double)n;
}

static void bench_call(long n) {
    double over[ROUNDS];
    int i;
    for (i = 0; i < ROUNDS; i++) {
        double empty = loop_empty(n);
        over[i] = loop_call(n) - empty;
    }
    row("an empty call across files, for scale", median(over, ROUNDS), "ns", 0, "");
}
#endif

/* Median of the paired differences to the empty loop, so that a change of clock rate hits both. */
static double cost(chaos *c, long n) {
    double over[ROUNDS];
    int i;
    loop_decide(c, n / 8);
    for (i = 0; i < ROUNDS; i++) {
        double empty = loop_empty(n);
        over[i] = loop_decide(c, n) - empty;
    }
    return median(over, ROUNDS);
}

typedef struct worker {
    chaos *c;
    long n;
    double ns;
    pthread_barrier_t *start;
} worker;

static void *decide_worker(void *arg) {
    worker *w = (worker *)arg;
    pthread_barrier_wait(w->start);
    w->ns = loop_decide(w->c, w->n);
    return NULL;
}

/* What one call costs a thread while a second thread does the same on the other core. */
static double cost_of_two(chaos *c, long n) {
    double over[ROUNDS];
    int i;
    for (i = 0; i < ROUNDS; i++) {
        pthread_barrier_t start;
        pthread_t a, b;
        double empty = loop_empty(n);
        worker w[2] = {{c, n, 0, &start}, {c, n, 0, &start}};
        pthread_barrier_init(&start, NULL, 2);
        if (pthread_create(&a, NULL, decide_worker, &w[0]) || pthread_create(&b, NULL, decide_worker, &w[1])) exit(1);
        pthread_join(a, NULL);
        pthread_join(b, NULL);
        pthread_barrier_destroy(&start);
        over[i] = (w[0].ns + w[1].ns) / 2 - empty;
    }
    return median(over, ROUNDS);
}

static chaos *open_or_die(const char *config) {
    chaos_desc desc;
    chaos_error err;
    chaos_report report;
    chaos *c;
    memset(&desc, 0, sizeof desc);
    desc.config = config;
    desc.instance = "bench";
    desc.quiet = true;
    c = chaos_open(&desc, &err);
    if (!c) {
        fprintf(stderr, "micro: %s\n", err.text);
        exit(1);
    }
    chaos_stats(c, &report);
    if (report.state == CHAOS_STATE_INVALID) {
        fprintf(stderr, "micro: the config is refused: %s\n", report.reason);
        exit(1);
    }
    return c;
}

/* A loop that decides nothing would be fast for the wrong reason. */
static void must_inject(chaos *c, bool yes) {
    chaos_report report;
    unsigned long long sum = 0;
    int i;
    chaos_stats(c, &report);
    for (i = 0; i < CHAOS_KIND_COUNT; i++) sum += report.injected[i];
    if ((sum > 0) != yes) {
        fprintf(stderr, "micro: %llu faults were decided, expected %s\n", sum, yes ? "some" : "none");
        exit(1);
    }
}

static void bench_decide(void) {
    static char rules[4096];
    char folder[] = "/tmp/chaos-bench-XXXXXX", path[64], source[72];
    size_t at;
    int i;
    FILE *f;
    chaos *c = open_or_die("{\"enabled\":false}");
    row("chaos_decide off, " HOW, cost(c, 20000000 / scale), "ns", 1, "");
    must_inject(c, false);
    chaos_close(c);

    c = open_or_die(FOUR_KEYS);
    row("chaos_decide on, four keys, 1 thread, " HOW, cost(c, 2000000 / scale), "ns", 40, "");
    row("chaos_decide on, four keys, 2 threads, " HOW, cost_of_two(c, 2000000 / scale), "ns", 40, "");
    must_inject(c, true);
    chaos_close(c);

    if (!mkdtemp(folder)) exit(1);
    snprintf(path, sizeof path, "%s/c.json", folder);
    snprintf(source, sizeof source, "file:%s", path);
    if (!(f = fopen(path, "w")) || fputs(FOUR_KEYS, f) < 0 || fclose(f)) exit(1);
    c = open_or_die(source);
    row("chaos_decide on, same from file: (lease, clocks)", cost(c, 2000000 / scale), "ns", 0, "");
    must_inject(c, true);
    chaos_close(c);
    unlink(path);
    rmdir(folder);

    at = (size_t)snprintf(rules, sizeof rules, "{\"enabled\":true,\"latency\":200,\"errorRate\":5,\"rules\":[");
    for (i = 0; i < 16; i++)
        at += (size_t)snprintf(rules + at, sizeof rules - at, "%s{\"name\":\"rule%d\",\"match\":{\"paths\":[\"%s\"]}}", i ? "," : "", i,
                               i < 15 ? "/api/*/users/**" : "/api/*/orders/**");
    snprintf(rules + at, sizeof rules - at, "]}");
    c = open_or_die(rules);
    row("chaos_decide on, 16 rules, the last matches, " HOW, cost(c, 500000 / scale), "ns", 400, "");
    must_inject(c, true);
    chaos_close(c);
}

#ifndef BENCH_ONE_FILE
static void bench_parse(void) {
    static chaos_config config;
    double us[ROUNDS], t;
    long n = 40000 / scale, k;
    unsigned long before;
    void *(*volatile get)(size_t) = malloc; /* plain malloc the compiler may leave out, and it knows what it changes */
    int i;
    for (i = 0; i < ROUNDS; i++) {
        t = cpu_ns();
        for (k = 0; k < n; k++) {
            if (chaos_config_parse(&config, FOUR_KEYS, sizeof FOUR_KEYS - 1, NULL) != CHAOS_OK) exit(1);
            KEEP(&config);
        }
        us[i] = (cpu_ns() - t) / (double)n / 1000;
    }
    row("config parse, four keys, " HOW, median(us, ROUNDS), "us", 2, "");
    if (!COUNTS_ALLOCATIONS) return;
    before = allocations;
    free(get(1));
    if (allocations == before) exit(1); /* the counter itself must work */
    before = allocations;
    if (chaos_config_parse(&config, FOUR_KEYS, sizeof FOUR_KEYS - 1, NULL) != CHAOS_OK) exit(1);
    printf("config parse, allocations\t%lu\t0\t%s\n", allocations - before, allocations == before ? "ok" : "over");
}

static void bench_allocations(void) {
    chaos *c = open_or_die(FOUR_KEYS);
    unsigned long before = allocations;
    if (!COUNTS_ALLOCATIONS) return;
    loop_decide(c, 10000);
    printf("chaos_decide on, allocations in 10,000 calls\t%lu\t0\t%s\n", allocations - before, allocations == before ? "ok" : "over");
    chaos_close(c);
}

static double now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

typedef struct sleeper {
    chaos *c;
    double late_ms[64];
    int naps, early;
} sleeper;

static void *sleep_worker(void *arg) {
    sleeper *s = (sleeper *)arg;
    chaos_verdict v;
    int i;
#ifdef SCHED_BATCH /* as the proxy's own threads */
    struct sched_param p;
    memset(&p, 0, sizeof p);
    pthread_setschedparam(pthread_self(), SCHED_BATCH, &p);
#endif
    memset(&v, 0, sizeof v);
    v.kind = CHAOS_DELAY;
    v.delay_us = 200000;
    v.rule = 0;
    for (i = 0; i < s->naps; i++) {
        double t = now_ns();
        chaos_wait(s->c, &v);
        s->late_ms[i] = (now_ns() - t) / 1e6 - 200;
        if (s->late_ms[i] < 0) s->early++;
    }
    return NULL;
}

/* The proxy's delays are chaos_wait too: this is its wake-up time minus the deadline, without any socket. */
static void bench_wait(void) {
    static sleeper s[SLEEPERS];
    static double all[SLEEPERS * 64];
    pthread_t threads[SLEEPERS];
    chaos *c = open_or_die("{\"enabled\":true,\"latency\":200}");
    struct timespec apart = {0, 3700000};
    size_t n = 0;
    int i, k, early = 0;
    for (i = 0; i < SLEEPERS; i++) {
        s[i].c = c;
        s[i].naps = scale > 1 ? 5 : 20;
        if (pthread_create(&threads[i], NULL, sleep_worker, &s[i])) exit(1);
        nanosleep(&apart, NULL); /* requests do not arrive all at once */
    }
    for (i = 0; i < SLEEPERS; i++) {
        pthread_join(threads[i], NULL);
        early += s[i].early;
        for (k = 0; k < s[i].naps; k++) all[n++] = s[i].late_ms[k];
    }
    chaos_close(c);
    row("chaos_wait 200 ms, 50 threads: wake - deadline, median", median(all, n), "ms", 0.15, "");
    row("chaos_wait 200 ms, 50 threads: wake - deadline, p99", all[n * 99 / 100], "ms", 0, "");
    if (early) {
        fprintf(stderr, "micro: chaos_wait came back early %d times\n", early);
        exit(1);
    }
}
#endif

#if defined(HAVE_FIU) && !defined(BENCH_ONE_FILE)
static double loop_fiu(long n) {
    double t = cpu_ns();
    long i;
    for (i = 0; i < n; i++) {
        int r = fiu_fail("posix/bench");
        KEEP(&r);
    }
    return (cpu_ns() - t) / (double)n;
}

static void fiu_row(const char *name, long n) {
    double over[ROUNDS];
    int i;
    for (i = 0; i < ROUNDS; i++) {
        double empty = loop_empty(n);
        over[i] = loop_fiu(n) - empty;
    }
    row(name, median(over, ROUNDS), "ns", 0, "");
}

static void bench_fiu(void) {
    if (fiu_init(0) != 0) exit(1);
    fiu_row("libfiu fiu_fail, point off", 2000000 / scale);
    fiu_enable_random("posix/bench", 1, NULL, 0, 0.05f);
    fiu_row("libfiu fiu_fail, point random 5 %", 2000000 / scale);
    fiu_disable("posix/bench");
}
#endif

int main(int argc, char **argv) {
    if (argc > 1 && strcmp(argv[1], "--quick") == 0) scale = 10;
#ifndef BENCH_ONE_FILE
    bench_call(20000000 / scale);
#endif
    bench_decide();
#ifndef BENCH_ONE_FILE
    bench_parse();
    bench_allocations();
    bench_wait();
#ifdef HAVE_FIU
    bench_fiu();
#endif
#endif
    return 0;
}

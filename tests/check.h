/* check.h - the test harness: named cases, goes on after a failure.

   static void case_sum(void) { CHECK(1 + 1 == 2); CHECK_INT(1 + 1, 2); CHECK_STR("a", "a"); }
   int main(int argc, char **argv) { check_begin(argc, argv); CHECK_RUN(case_sum); return check_end(); }

   Arguments: -v (also CHECK_VERBOSE=1) names the passed cases, --filter SUBSTRING runs only the cases so named.
   check_where(format, ...) says which row of a table is being checked; it is printed with each failure of that case.
   check_skip(why) skips; check_missing(what) skips too, but fails where CHAOS_CI=1 promises that everything is there.
   Checks may fail on any thread; cases start and end on one. A fork()ed child must tell its parent by itself. */
#ifndef CHECK_H
#define CHECK_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct {
    const char *filter, *name;
    char where[256], skip[256];
    int verbose, passed, failed, skipped;
    int bad; /* failing checks of this case */
} check_state;

#define CHECK(cond)          check_that((cond) ? 1 : 0, __FILE__, __LINE__, #cond)
#define CHECK_INT(got, want) check_int((long long)(got), (long long)(want), __FILE__, __LINE__, #got)
#define CHECK_STR(got, want) check_str(got, want, __FILE__, __LINE__, #got)
#define CHECK_RUN(fn)        check_run(fn, #fn)

static inline int check_that(int ok, const char *file, int line, const char *text) {
    if (ok) return 1;
    if (__atomic_fetch_add(&check_state.bad, 1, __ATOMIC_RELAXED) < 20) /* the first ones tell enough */
        printf("FAIL %s %s:%d: %s%s%s%s\n", check_state.name, file, line, text, check_state.where[0] ? "  [" : "", check_state.where,
               check_state.where[0] ? "]" : "");
    fflush(stdout);
    return 0;
}

static inline int check_int(long long got, long long want, const char *file, int line, const char *text) {
    char full[512];
    if (got == want) return 1;
    snprintf(full, sizeof full, "%s is %lld, not %lld", text, got, want);
    return check_that(0, file, line, full);
}

static inline int check_str(const char *got, const char *want, const char *file, int line, const char *text) {
    char full[1024];
    if (got && want && !strcmp(got, want)) return 1;
    snprintf(full, sizeof full, "%s is \"%.400s\", not \"%.400s\"", text, got ? got : "(null)", want ? want : "(null)");
    return check_that(0, file, line, full);
}

#if defined(__GNUC__)
__attribute__((format(printf, 1, 2)))
#endif
static inline void
check_where(const char *format, ...) {
    va_list args;
    va_start(args, format);
    vsnprintf(check_state.where, sizeof check_state.where, format, args);
    va_end(args);
}

static inline void check_skip(const char *why) { snprintf(check_state.skip, sizeof check_state.skip, "%s", why); }

static inline void check_missing(const char *what) {
    const char *ci = getenv("CHAOS_CI");
    if (ci && !strcmp(ci, "1")) check_that(0, "CHAOS_CI", 1, what);
    else check_skip(what);
}

static inline void check_begin(int argc, char **argv) {
    const char *env = getenv("CHECK_VERBOSE");
    int i;
    check_state.verbose = env && !strcmp(env, "1");
    for (i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "-v")) check_state.verbose = 1;
        if (!strcmp(argv[i], "--filter") && i + 1 < argc) check_state.filter = argv[++i];
    }
}

static inline void check_run(void (*fn)(void), const char *name) {
    if (check_state.filter && !strstr(name, check_state.filter)) return;
    check_state.name = name;
    check_state.bad = 0;
    check_state.where[0] = check_state.skip[0] = 0;
    fn();
    if (check_state.bad) check_state.failed++;
    else if (check_state.skip[0]) check_state.skipped++;
    else check_state.passed++;
    if (check_state.bad > 20) printf("FAIL %s: %d checks failed in all\n", name, check_state.bad);
    else if (!check_state.bad && check_state.skip[0]) printf("skip %s: %s\n", name, check_state.skip);
    else if (!check_state.bad && check_state.verbose) printf("ok   %s\n", name);
    fflush(stdout);
}

static inline int check_end(void) {
    printf("%d passed, %d failed", check_state.passed, check_state.failed);
    if (check_state.skipped) printf(", %d skipped", check_state.skipped);
    printf("\n");
    return check_state.failed ? 1 : 0;
}

#endif

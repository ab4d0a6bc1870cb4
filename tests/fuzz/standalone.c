/* standalone.c - a main for the fuzz targets where there is no libFuzzer.

   cc -std=c99 -pthread -o fuzz-json tests/fuzz/json.c tests/fuzz/standalone.c

   fuzz-json FILE-OR-DIRECTORY...               runs the target once over every file: repeats a crash, replays the seeds
   fuzz-json --seconds N FILE-OR-DIRECTORY...   then changes them at random for N seconds, always in the same way
   fuzz-json --seed N ...                       another way

   -max_total_time=N means --seconds N and -artifact_prefix=PREFIX names the file (PREFIXcrash) that the failing input is
   written to; other options in libFuzzer's form are ignored. With libFuzzer itself: clang -fsanitize=fuzzer,address. */
#if !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE)
#define _POSIX_C_SOURCE 200809L
#endif
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size);

enum { MOST = 70000, MOST_SEEDS = 4096 };

static struct {
    unsigned char *data;
    size_t len;
} seeds[MOST_SEEDS];
static size_t seed_count;
static unsigned char input[MOST];
static size_t input_len;
static const char *prefix = ""; /* of the file for the failing input */
static unsigned long long random_state = 1;

static const char *const words[] = {
    "\"enabled\":true",
    "\"rules\":[{\"name\":\"a\"",
    "\"match\":{",
    "\"paths\":[\"/**\"]",
    "\"headers\":{\"x\":\"*\"}",
    "\"latency\":{\"min\":0,\"max\":9}",
    "\"p50\":1,\"p95\":2,\"p99\":3",
    "\"errorRate\":100",
    "\"expiresAt\":\"never\"",
    "\"2026-02-29T00:00:00Z\"",
    "\"exclude\":[]",
    "\\u0000",
    "\\ud800",
    "\\udc00",
    "\xEF\xBB\xBF",
    "\xC3\xA9",
    "\xF0\x9F\x98\x80",
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "null",
    "-0",
    "1e999",
    "5.0",
    "NaN",
    "//",
    "\r\n",
    "\r\n\r\n",
    "\n",
    "\r",
    " ",
    "\t",
    "0\r\n\r\n",
    "5\r\nhello\r\n",
    ";a=b",
    "FFFFFFFFFFFFFFFF",
    "Content-Length: 5",
    "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip, chunked",
    "Host: a",
    "Connection: close",
    "HTTP/1.1",
    "HTTP/1.0",
    "GET ",
    "http://a/",
    "Expect: 100-continue",
    "%41",
    "%",
    "**",
};

static unsigned pick(size_t below) {
    random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
    return below ? (unsigned)((random_state >> 33) % below) : 0;
}

/* The input that was running is what matters: it is kept before the program ends. Only async-signal-safe calls. */
static void on_crash(int sig) {
    char path[1024];
    size_t len = strlen(prefix) < sizeof path - 8 ? strlen(prefix) : 0, done = 0;
    int fd;
    memcpy(path, prefix, len);
    memcpy(path + len, "crash", 6);
    fd = len ? open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644) : -1; /* no prefix, no file */
    while (fd >= 0 && done < input_len) {
        ssize_t n = write(fd, input + done, input_len - done);
        if (n <= 0) break;
        done += (size_t)n;
    }
    signal(sig, SIG_DFL);
    raise(sig);
}

static void add_file(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f || seed_count == MOST_SEEDS) {
        if (f) fclose(f);
        return;
    }
    input_len = fread(input, 1, sizeof input, f);
    fclose(f);
    seeds[seed_count].data = (unsigned char *)malloc(input_len ? input_len : 1);
    if (!seeds[seed_count].data) return;
    memcpy(seeds[seed_count].data, input, input_len);
    seeds[seed_count++].len = input_len;
}

static int by_name(const void *a, const void *b) { return strcmp(*(char *const *)a, *(char *const *)b); }

/* A file, or a directory's files in the order of their names (readdir's order differs between machines). */
static int add(const char *path) {
    static char *names[MOST_SEEDS];
    size_t count = 0, i;
    struct stat st;
    struct dirent *e;
    DIR *dir;
    if (stat(path, &st) != 0) return perror(path), 0;
    if (!S_ISDIR(st.st_mode)) return add_file(path), 1;
    dir = opendir(path);
    while (dir && count < MOST_SEEDS && (e = readdir(dir)) != NULL) {
        size_t room = strlen(path) + strlen(e->d_name) + 2;
        if (e->d_name[0] == '.' || !(names[count] = (char *)malloc(room))) continue;
        snprintf(names[count++], room, "%s/%s", path, e->d_name);
    }
    if (dir) closedir(dir);
    qsort(names, count, sizeof names[0], by_name);
    for (i = 0; i < count; i++) {
        add_file(names[i]);
        free(names[i]);
    }
    return 1;
}

static void insert(size_t at, const void *bytes, size_t len) {
    if (input_len + len > MOST) return;
    memmove(input + at + len, input + at, input_len - at);
    memcpy(input + at, bytes, len);
    input_len += len;
}

static void cut(size_t at, size_t len) {
    if (len > input_len - at) len = input_len - at;
    memmove(input + at, input + at + len, input_len - at - len);
    input_len -= len;
}

static void change(void) {
    size_t at = pick(input_len + 1), other = pick(seed_count), from;
    const char *word = words[pick(sizeof words / sizeof words[0])];
    unsigned char byte = (unsigned char)pick(256), piece[64];
    switch (pick(8)) {
    case 0:
        if (at < input_len) input[at] = byte;
        break;
    case 1:
        if (at < input_len) input[at] = (unsigned char)(input[at] ^ 1u << pick(8));
        break;
    case 2: insert(at, &byte, 1); break;
    case 3: cut(at, 1 + pick(16)); break;
    case 4: insert(at, word, strlen(word)); break;
    case 5: cut(at, input_len); break;
    case 6: /* a piece of itself again */
        from = pick(input_len);
        memcpy(piece, input + from, input_len - from < sizeof piece ? input_len - from : sizeof piece);
        insert(at, piece, input_len - from < sizeof piece ? pick(input_len - from + 1) : pick(sizeof piece));
        break;
    default: /* the end of another seed */
        from = pick(seeds[other].len);
        cut(at, input_len);
        insert(at, seeds[other].data + from, seeds[other].len - from);
    }
}

static void run_random(long seconds, unsigned long *runs) {
    struct timespec now, end;
    clock_gettime(CLOCK_MONOTONIC, &end);
    end.tv_sec += seconds;
    do {
        int i, changes;
        for (i = 0; i < 1000; i++, ++*runs) {
            size_t seed = pick(seed_count);
            input_len = seeds[seed].len;
            memcpy(input, seeds[seed].data, input_len);
            for (changes = 1 + (int)pick(6); changes > 0; changes--) change();
            LLVMFuzzerTestOneInput(input, input_len);
        }
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (now.tv_sec < end.tv_sec);
}

int main(int argc, char **argv) {
    static const int deadly[] = {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL};
    unsigned long runs = 0;
    long seconds = 0;
    size_t s;
    int i;
    for (i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--seconds") && i + 1 < argc) seconds = atol(argv[++i]);
        else if (!strcmp(argv[i], "--seed") && i + 1 < argc) random_state = strtoull(argv[++i], NULL, 10);
        else if (!strncmp(argv[i], "-max_total_time=", 16)) seconds = atol(argv[i] + 16);
        else if (!strncmp(argv[i], "-artifact_prefix=", 17)) prefix = argv[i] + 17;
        else if (argv[i][0] != '-' && !add(argv[i])) return 2;
    }
    for (s = 0; s < sizeof deadly / sizeof deadly[0]; s++) signal(deadly[s], on_crash);
    for (s = 0; s < seed_count; s++, runs++) {
        input_len = seeds[s].len;
        memcpy(input, seeds[s].data, input_len);
        LLVMFuzzerTestOneInput(input, input_len);
    }
    if (!seed_count) { /* nothing given: start from nothing */
        seeds[0].data = input;
        seeds[0].len = 0;
        seed_count = 1;
    }
    if (seconds > 0) run_random(seconds, &runs);
    printf("Done %lu inputs\n", runs);
    return 0;
}

/* json.c - chaos_json_check against RFC 8259. Every input, and every truncation of it, ends at an unreadable page. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"
#include "../check.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef CHECK_DIR
#define CHECK_DIR "tests" /* run from the top of the repository */
#endif

enum { ROOM = 1 << 18 };
static char *edge; /* the first unreadable byte; ROOM bytes before it are ours */

static void edge_make(void) {
    int zero = open("/dev/zero", O_RDWR);
    char *base = (char *)mmap(NULL, ROOM * 2, PROT_READ | PROT_WRITE, MAP_PRIVATE, zero, 0);
    close(zero);
    if (base == (char *)MAP_FAILED || mprotect(base + ROOM, ROOM, PROT_NONE)) {
        perror("mmap");
        exit(2);
    }
    edge = base + ROOM;
}

/* Checks a copy of text whose end is the page's edge. */
static chaos_result at_edge(const char *text, size_t len, chaos_error *err) {
    memmove(edge - len, text, len);
    return chaos_json_check(edge - len, len, err);
}

static size_t line_of(const char *text, size_t offset) {
    size_t i, line = 1;
    for (i = 0; i < offset; i++) line += text[i] == '\n';
    return line;
}

static size_t column_of(const char *text, size_t offset) {
    size_t i, column = 1;
    for (i = 0; i < offset; i++) {
        if (text[i] == '\n') column = 1;
        else if (((unsigned char)text[i] & 0xC0) != 0x80) column++; /* a character starts here */
    }
    return column;
}

/* What holds for an error on any text: a place inside it, and line and column agreeing with the offset. */
static void check_place(const char *text, size_t len, const chaos_error *err) {
    CHECK_INT(err->code, CHAOS_ERR_JSON);
    CHECK(err->offset <= len);
    if (err->offset > len) return;
    CHECK_INT(err->line, line_of(text, err->offset));
    CHECK_INT(err->column, column_of(text, err->offset));
    CHECK(err->text[0] != 0);
    CHECK(memchr(err->text, 0, sizeof err->text) != NULL);
}

/* Every shorter text: never read beyond it; and a container or string of a good text, once cut, is not valid. */
static void check_truncations(const char *text, size_t len, bool good) {
    char first;
    size_t cut, start = 0, end = len;
    while (start < len && strchr(" \t\n\r", text[start])) start++;
    while (end > start && strchr(" \t\n\r", text[end - 1])) end--;
    first = start < len ? text[start] : ' ';
    for (cut = 0; cut < len; cut++) {
        chaos_error err;
        chaos_result got = at_edge(text, cut, &err);
        if (got) check_place(text, cut, &err);
        if (good && cut < end && strchr("[{\"", first)) CHECK_INT(got, CHAOS_ERR_JSON);
        CHECK_INT(at_edge(text, cut, NULL), got); /* err may be NULL */
    }
}

static int hex(char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; }

/* Replaces %HH in place; returns the new length. */
static size_t unescape(char *s) {
    size_t in, out = 0;
    for (in = 0; s[in]; in++) {
        if (s[in] == '%' && hex(s[in + 1]) >= 0 && hex(s[in + 2]) >= 0) {
            s[out++] = (char)(hex(s[in + 1]) * 16 + hex(s[in + 2]));
            in += 2;
        } else {
            s[out++] = s[in];
        }
    }
    s[out] = 0;
    return out;
}

static bool holds(const char *text, const char *word) {
    size_t len = strlen(word);
    for (; *text; text++)
        if (!strncmp(text, word, len)) return true;
    return false;
}

/* Calls fn for each line that is not a comment; returns how many there were. */
static int each_line(const char *path, void (*fn)(char *line)) {
    char line[1024];
    int count = 0, number = 0;
    FILE *f = fopen(path, "r");
    CHECK(f != NULL);
    if (!f) return 0;
    while (fgets(line, sizeof line, f)) {
        number++;
        line[strcspn(line, "\n")] = 0;
        if (line[0] == '#' || !line[0]) continue;
        check_where("%s:%d", path, number);
        fn(line);
        count++;
    }
    fclose(f);
    check_where("%s", "");
    return count;
}

static void accept_line(char *line) {
    chaos_error err;
    size_t len = unescape(line);
    memset(&err, 0xAA, sizeof err);
    if (at_edge(line, len, &err)) CHECK_STR(err.text, "accepted");
    check_truncations(line, len, true);
}

static void reject_line(char *line) {
    chaos_error err;
    unsigned offset, line_no, column;
    char word[64];
    int at = 0;
    size_t len;
    if (sscanf(line, "%u ; %u ; %u ; %63s ;%n", &offset, &line_no, &column, word, &at) != 4 || !at) {
        CHECK_STR(line, "offset ; line ; column ; word ; text");
        return;
    }
    line += at;
    if (*line == ' ') line++;
    len = unescape(line);
    memset(&err, 0xAA, sizeof err);
    CHECK_INT(at_edge(line, len, &err), CHAOS_ERR_JSON);
    if (err.code != CHAOS_ERR_JSON) return;
    check_place(line, len, &err);
    CHECK_INT(err.offset, offset);
    CHECK_INT(err.line, line_no);
    CHECK_INT(err.column, column);
    if (strcmp(word, "-") && !holds(err.text, word)) CHECK_STR(err.text, word);
    check_truncations(line, len, false);
}

static void case_accept(void) { CHECK(each_line(CHECK_DIR "/vectors/json/accept.txt", accept_line) >= 50); }

static void case_reject(void) { CHECK(each_line(CHECK_DIR "/vectors/json/reject.txt", reject_line) >= 120); }

static void case_empty(void) {
    chaos_error err;
    CHECK_INT(chaos_json_check("", 0, &err), CHAOS_ERR_JSON);
    check_place("", 0, &err);
    CHECK(holds(err.text, "empty"));
    CHECK(chaos_json_check(NULL, 0, &err) != CHAOS_OK);
    CHECK(chaos_json_check(NULL, 0, NULL) != CHAOS_OK);
}

/* Builds depth opening brackets, inside, and as many closing ones. */
static size_t nest(char *buf, size_t depth, const char *open, const char *inside, const char *close) {
    size_t i;
    buf[0] = 0;
    for (i = 0; i < depth; i++) strcat(buf, open);
    strcat(buf, inside);
    for (i = 0; i < depth; i++) strcat(buf, close);
    return strlen(buf);
}

static void case_depth(void) {
    static const char *const open[] = {"[", "{\"a\":"}, *const close[] = {"]", "}"}, *const inside[] = {"", "0"};
    static char buf[4096];
    chaos_error err;
    size_t kind;
    for (kind = 0; kind < 2; kind++) {
        check_where("%s", open[kind]);
        CHECK_INT(at_edge(buf, nest(buf, 64, open[kind], inside[kind], close[kind]), &err), CHAOS_OK);
        CHECK_INT(at_edge(buf, nest(buf, 65, open[kind], inside[kind], close[kind]), &err), CHAOS_ERR_JSON);
        check_place(buf, strlen(buf), &err);
        CHECK_INT(err.offset, 64 * strlen(open[kind])); /* the 65th bracket */
        CHECK(holds(err.text, "64"));
        check_truncations(buf, strlen(buf), false);
    }
}

/* Far deeper than any stack: an error, not a crash. */
static void case_deep(void) {
    static char buf[ROOM];
    memset(buf, '[', sizeof buf);
    CHECK_INT(at_edge(buf, sizeof buf, NULL), CHAOS_ERR_JSON);
}

/* Each byte alone, and each byte inside a string, by the plain rule. */
static void case_every_byte(void) {
    int byte;
    for (byte = 0; byte < 256; byte++) {
        char alone[1], quoted[3] = {'"', 0, '"'};
        chaos_error err;
        bool plain = byte >= 0x20 && byte < 0x80 && byte != '"' && byte != '\\';
        check_where("byte %02X", (unsigned)byte);
        alone[0] = quoted[1] = (char)byte;
        CHECK_INT(at_edge(alone, 1, &err) == CHAOS_OK, byte >= '0' && byte <= '9');
        CHECK_INT(at_edge(quoted, 3, &err) == CHAOS_OK, plain);
        if (!plain && byte != '"' && byte != '\\') CHECK_INT(err.offset, 1);
    }
}

/* UTF-8 as RFC 3629 gives it, over every code point and every two-byte sequence. */
static void case_every_code_point(void) {
    unsigned long cp;
    unsigned a, b;
    for (cp = 0x80; cp < 0x120000; cp++) {
        unsigned char s[6] = {'"', 0, 0, 0, 0, 0};
        size_t n = 1;
        bool want = cp < 0x110000 && !(cp >= 0xD800 && cp < 0xE000);
        if (cp < 0x800) {
            s[n++] = (unsigned char)(0xC0 | cp >> 6);
        } else if (cp < 0x10000) {
            s[n++] = (unsigned char)(0xE0 | cp >> 12);
            s[n++] = (unsigned char)(0x80 | (cp >> 6 & 0x3F));
        } else {
            s[n++] = (unsigned char)(0xF0 | cp >> 18);
            s[n++] = (unsigned char)(0x80 | (cp >> 12 & 0x3F));
            s[n++] = (unsigned char)(0x80 | (cp >> 6 & 0x3F));
        }
        s[n++] = (unsigned char)(0x80 | (cp & 0x3F));
        s[n++] = '"';
        if ((at_edge((char *)s, n, NULL) == CHAOS_OK) != want) {
            check_where("U+%04lX", cp);
            CHECK_INT(!want, want);
        }
    }
    for (a = 0x80; a < 256; a++)
        for (b = 0; b < 256; b++) {
            char s[4] = {'"', (char)a, (char)b, '"'};
            bool want = a >= 0xC2 && a < 0xE0 && b >= 0x80 && b < 0xC0;
            if ((at_edge(s, 4, NULL) == CHAOS_OK) == want) continue;
            check_where("%02X %02X", a, b);
            CHECK_INT(!want, want);
        }
}

/* Every \uXXXX alone, and pairs around the surrogates. */
static void case_every_unicode_escape(void) {
    static const unsigned edges[] = {0, 0x41, 0xD7FF, 0xD800, 0xDBFF, 0xDC00, 0xDFFF, 0xE000, 0xFFFF};
    unsigned u;
    size_t i, j;
    char s[32];
    for (u = 0; u < 0x10000; u++) {
        bool want = u < 0xD800 || u > 0xDFFF;
        snprintf(s, sizeof s, u & 1 ? "\"\\u%04x\"" : "\"\\u%04X\"", u);
        if ((at_edge(s, 8, NULL) == CHAOS_OK) == want) continue;
        check_where("\\u%04X", u);
        CHECK_INT(!want, want);
    }
    for (i = 0; i < 9; i++)
        for (j = 0; j < 9; j++) {
            bool high = edges[i] >= 0xD800 && edges[i] < 0xDC00, low = edges[j] >= 0xDC00 && edges[j] < 0xE000;
            bool lone_i = edges[i] >= 0xDC00 && edges[i] < 0xE000, high_j = edges[j] >= 0xD800 && edges[j] < 0xDC00;
            bool want = (high && low) || (!high && !low && !lone_i && !high_j);
            snprintf(s, sizeof s, "\"\\u%04X\\u%04X\"", edges[i], edges[j]);
            check_where("%s", s);
            CHECK_INT(at_edge(s, 14, NULL) == CHAOS_OK, want);
        }
}

/* A place far into a long text. */
static void case_far_place(void) {
    static char buf[70000];
    chaos_error err;
    size_t len = 0;
    int i;
    buf[len++] = '[';
    for (i = 0; i < 5000; i++) len += (size_t)snprintf(buf + len, sizeof buf - len, "\"\xC3\xA9\",\n");
    len += (size_t)snprintf(buf + len, sizeof buf - len, "\"\xC3\xA9\" ?]");
    CHECK_INT(at_edge(buf, len, &err), CHAOS_ERR_JSON);
    CHECK_INT(err.offset, len - 2);
    CHECK_INT(err.line, 5001);
    CHECK_INT(err.column, 5);
}

/* Random bytes and random changes of a good text: never a crash, and always a place that agrees with itself. */
static void case_random(void) {
    static const char good[] = "{\"a\":[1,-2.5e+3,\"x\\u00e9\\n\",true,null],\"\xC3\xA9\":{\"b\":[[],{}]}}";
    static const char bytes[] = "{}[]:,\"\\u09aef+-.Etrfnl \n\t/*#\x80\xC3\xA9\xED\xF0\xFF";
    unsigned long long s = 12345;
    long i;
    for (i = 0; i < 200000; i++) {
        char text[sizeof good];
        chaos_error err;
        size_t len = sizeof good - 1, k, changes;
        memcpy(text, good, len);
        s = s * 6364136223846793005ull + 1442695040888963407ull;
        changes = i % 8 ? (size_t)(i % 8) : len;
        for (k = 0; k < changes; k++) {
            s = s * 6364136223846793005ull + 1442695040888963407ull;
            text[(s >> 33) % len] = bytes[(s >> 40) % (sizeof bytes)]; /* its NUL, too */
        }
        if (at_edge(text, len, &err)) check_place(text, len, &err);
    }
}

int main(int argc, char **argv) {
    check_begin(argc, argv);
    edge_make();
    CHECK_RUN(case_accept);
    CHECK_RUN(case_reject);
    CHECK_RUN(case_empty);
    CHECK_RUN(case_depth);
    CHECK_RUN(case_deep);
    CHECK_RUN(case_every_byte);
    CHECK_RUN(case_every_code_point);
    CHECK_RUN(case_every_unicode_escape);
    CHECK_RUN(case_far_place);
    CHECK_RUN(case_random);
    return check_end();
}

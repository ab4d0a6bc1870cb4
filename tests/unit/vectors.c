/* vectors.c - the checked-in verdicts: every machine, process and version that says it does the same must give these.

   vectors                  verifies tests/vectors/verdicts.txt
   vectors --file PATH      another file
   vectors --write          writes the file anew: only when a change of the rolls is meant, and said in the release notes */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"
#include "../check.h"

#ifndef CHECK_DIR
#define CHECK_DIR "tests" /* run from the top of the repository */
#endif

static const char *file_path = CHECK_DIR "/vectors/verdicts.txt";
static chaos_config cfg;

/* ---- what is recorded ------------------------------------------------------------------------------------------ */
#define RULES                                                                                                   \
    "\"rules\":[{\"name\":\"pay\",\"match\":{\"methods\":[\"POST\"],\"paths\":[\"/pay/**\"]},\"errorRate\":50," \
    "\"errorStatus\":402},{\"name\":\"search\",\"match\":{\"paths\":[\"/search*\",\"/s/*\"]},\"latency\":"      \
    "{\"p50\":20,\"p95\":200,\"p99\":900,\"max\":2000}},{\"name\":\"rest\",\"errorRate\":3}]"

static const char *const configs[] = {
    "{\"enabled\":false,\"errorRate\":100}",
    "{\"enabled\":true}",
    "{\"enabled\":true,\"latency\":200,\"errorRate\":5,\"errorStatus\":503,\"seed\":0}",
    "{\"enabled\":true,\"latency\":200,\"errorRate\":50,\"seed\":1}",
    "{\"enabled\":true,\"latency\":200,\"errorRate\":50,\"seed\":9007199254740991}",
    "{\"enabled\":true,\"errorRate\":100,\"errorStatus\":429,\"seed\":2}",
    "{\"enabled\":true,\"errorRate\":1,\"seed\":3}",
    "{\"enabled\":true,\"errorRate\":99,\"seed\":3}",
    "{\"enabled\":true,\"latency\":900000,\"latencyRate\":30,\"seed\":4}",
    "{\"enabled\":true,\"latency\":{\"min\":0,\"max\":900000},\"seed\":5}",
    "{\"enabled\":true,\"latency\":{\"min\":100,\"max\":101},\"latencyRate\":50,\"seed\":5}",
    "{\"enabled\":true,\"latency\":{\"mean\":100,\"max\":10000},\"seed\":6}",
    "{\"enabled\":true,\"latency\":{\"mean\":900000,\"max\":900000},\"seed\":6}",
    "{\"enabled\":true,\"latency\":{\"mean\":1,\"max\":2},\"errorRate\":20,\"seed\":6}",
    "{\"enabled\":true,\"latency\":{\"p50\":20,\"p95\":200,\"p99\":900,\"max\":2000},\"seed\":7}",
    "{\"enabled\":true,\"latency\":{\"p50\":0,\"p95\":0,\"p99\":0,\"max\":900000},\"seed\":7}",
    "{\"enabled\":true,\"errorRate\":40,\"errorMode\":\"reset\",\"seed\":8}",
    "{\"enabled\":true,\"errorRate\":40,\"errorMode\":\"close\",\"latency\":10,\"seed\":8}",
    "{\"enabled\":true,\"errorRate\":40,\"errorMode\":\"hang\",\"seed\":8}",
    "{\"enabled\":true,\"errorRate\":40,\"errorWhen\":\"after\",\"bandwidth\":64,\"seed\":9}",
    "{\"enabled\":true,\"seed\":10," RULES "}",
    "{\"enabled\":true,\"seed\":11,\"errorRate\":70,\"latency\":{\"min\":1,\"max\":9},\"match\":{\"methods\":[\"GET\"]}," RULES "}",
    "{\"enabled\":true,\"seed\":12,\"errorRate\":90,\"exclude\":[\"/pay/**\"]}",
    "{\"enabled\":true,\"seed\":12,\"errorRate\":90,\"match\":{\"paths\":[\"/s/\xC3\xA9\",\"/search\"]}}",
};

static const struct {
    const char *method, *path;
} requests[] = {
    {"GET", "/"},        {"POST", "/pay/42/now"}, {"GET", "/search?q=a/b"}, {"GET", "/s/%C3%A9"},
    {"GET", "/healthz"}, {"PUT", "/s/a/b"},       {"POST", "/pay/"},        {"DELETE", "/%73earch"},
};

static const unsigned long long keys[] = {0, 1, 2, 0xFFFFFFFFull, 0x100000000ull, 0xFFFFFFFFFFFFFFFFull, 0x8000000000000000ull};

static const char *const texts[] = {
    "", "a", "user-7", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "\xC3\xA9\xFF\x80", "i-0abc", "node-1", "node-2"};

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

/* ---- one line --------------------------------------------------------------------------------------------------- */
static void verdict_line(char *line, size_t cap, const char *method, const char *path, unsigned long long key) {
    chaos_request q;
    chaos_verdict v;
    memset(&q, 0, sizeof q);
    q.method = method;
    q.path = path;
    v = chaos_judge(&cfg, &q, key);
    snprintf(line, cap, "verdict %s %s %016llx = %s status %u after %u delay %u bandwidth %u rule %u roll %u", method, path, key,
             chaos_kind_text(v.kind), (unsigned)v.status, (unsigned)v.after, v.delay_us, v.bandwidth, (unsigned)v.rule, (unsigned)v.roll);
}

/* What a text key and an instance id become. The bytes stand in hex. */
static void text_line(char *line, size_t cap, const char *text) {
    char digits[256] = "-";
    size_t i;
    for (i = 0; text[i] && i < 100; i++) snprintf(digits + 2 * i, 3, "%02x", (unsigned)(unsigned char)text[i]);
    snprintf(line, cap, "text %s = key %016llx slot %u", digits, (unsigned long long)chaosi_hash(chaosi_str(text)),
             chaosi_canary_slot(chaosi_str(text)));
}

static bool read_config(const char *json) { return chaos_config_parse(&cfg, json, strlen(json), NULL) == CHAOS_OK; }

/* ---- write ------------------------------------------------------------------------------------------------------ */
static int write_file(void) {
    FILE *f = fopen(file_path, "w");
    char line[1024];
    unsigned long long random = 20260101;
    size_t c, i;
    if (!f) return perror(file_path), 1;
    fprintf(f, "# Verdicts of chaos_judge: `config JSON` sets the config for the lines below it,\n"
               "# `verdict METHOD PATH KEY = ...` is one decision, `text HEX = key K slot N` what a text key or an instance id becomes.\n"
               "# Written by tests/unit/vectors.c --write; the same on every machine.\n");
    for (i = 0; i < COUNT(texts); i++) {
        text_line(line, sizeof line, texts[i]);
        fprintf(f, "%s\n", line);
    }
    for (c = 0; c < COUNT(configs); c++) {
        if (!read_config(configs[c])) return fprintf(stderr, "refused: %s\n", configs[c]), 1;
        fprintf(f, "config %s\n", configs[c]);
        for (i = 0; i < 64; i++) {
            random = random * 6364136223846793005ull + 1442695040888963407ull;
            verdict_line(line, sizeof line, requests[i % COUNT(requests)].method, requests[i % COUNT(requests)].path,
                         i < COUNT(keys) ? keys[i] : random);
            fprintf(f, "%s\n", line);
        }
    }
    return fclose(f) ? 1 : 0;
}

/* ---- verify ----------------------------------------------------------------------------------------------------- */
static void from_hex(const char *hex, char *text) {
    unsigned byte;
    size_t n = 0;
    for (; hex[0] != '-' && hex[0] && hex[1] && sscanf(hex, "%2x", &byte) == 1; hex += 2) text[n++] = (char)byte;
    text[n] = 0;
}

static int verdicts, texts_seen, wanted_configs;

static void verify_line(const char *line) {
    char got[1024], first[512], second[512];
    unsigned long long key;
    if (!strncmp(line, "config ", 7)) {
        wanted_configs++;
        CHECK(read_config(line + 7));
    } else if (sscanf(line, "verdict %500s %500s %llx =", first, second, &key) == 3) {
        verdict_line(got, sizeof got, first, second, key);
        CHECK_STR(got, line);
        verdicts++;
    } else if (sscanf(line, "text %500s =", first) == 1) {
        from_hex(first, second);
        text_line(got, sizeof got, second);
        CHECK_STR(got, line);
        texts_seen++;
    } else {
        CHECK_STR(line, "a line this program knows");
    }
}

static void case_verdicts(void) {
    FILE *f = fopen(file_path, "r");
    char line[1024];
    int number = 0;
    CHECK(f != NULL);
    if (!f) return;
    while (fgets(line, sizeof line, f)) {
        check_where("%s:%d", file_path, ++number);
        line[strcspn(line, "\n")] = 0;
        if (line[0] && line[0] != '#') verify_line(line);
    }
    fclose(f);
    check_where("%s", "");
    CHECK(verdicts >= 1000);
    CHECK_INT(texts_seen, COUNT(texts));
    CHECK_INT(wanted_configs, COUNT(configs));
}

/* The file must not be able to agree by being all the same: every kind and every rule is in it. */
static void case_variety(void) {
    static const char *const words[] = {"= pass ",  "= latency ", "= bandwidth ", "= error ",     "= reset ",
                                        "= close ", "= hang ",    "after 1",      "bandwidth 64", "rule 0",
                                        "rule 1",   "rule 2",     "rule 3",       "status 402",   "status 429"};
    int seen[COUNT(words)] = {0};
    FILE *f = fopen(file_path, "r");
    char line[1024];
    size_t i;
    CHECK(f != NULL);
    if (!f) return;
    while (fgets(line, sizeof line, f))
        for (i = 0; i < COUNT(words); i++) seen[i] += strstr(line, words[i]) != NULL;
    fclose(f);
    for (i = 0; i < COUNT(words); i++) {
        check_where("%s", words[i]);
        CHECK(seen[i] >= 3);
    }
}

/* The same key through a handle rolls as chaos_judge does with the key the file names. */
static void case_text_keys_through_a_handle(void) {
    chaos_desc d;
    chaos *c;
    size_t i;
    memset(&d, 0, sizeof d);
    d.config = "{\"enabled\":true,\"errorRate\":50,\"seed\":1}";
    d.quiet = d.no_thread = true;
    c = chaos_open(&d, NULL);
    CHECK(c != NULL);
    for (i = 0; c && i < COUNT(texts); i++) {
        chaos_request q;
        memset(&q, 0, sizeof q);
        q.key = texts[i];
        CHECK(chaos_decide(c, &q).key == chaosi_hash(chaosi_str(texts[i])));
    }
    chaos_close(c);
}

int main(int argc, char **argv) {
    int i;
    bool write = false;
    for (i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--write")) write = true;
        if (!strcmp(argv[i], "--file") && i + 1 < argc) file_path = argv[++i];
    }
    if (write) return write_file();
    check_begin(argc, argv);
    CHECK_RUN(case_verdicts);
    CHECK_RUN(case_variety);
    CHECK_RUN(case_text_keys_through_a_handle);
    return check_end();
}

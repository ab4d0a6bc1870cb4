/* config.c - fuzz target: chaos_config_parse; what parses is written back, read again and judged with. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size);

#define MUST(cond) ((cond) ? (void)0 : abort())

static chaos_config cfg, again;
static char once[400000], twice[400000];

/* Any bytes may come as a path or a header; a decision must stay within its config. */
static const char *any_header(void *user, const char *name, size_t *len) {
    const chaos_request *q = (const chaos_request *)user;
    (void)name;
    *len = q->path_len;
    return q->path;
}

static void judge(const unsigned char *data, size_t size) {
    chaos_request q;
    unsigned long long key;
    memset(&q, 0, sizeof q);
    q.method = "GET";
    q.path = (const char *)data;
    q.path_len = size;
    q.header = any_header;
    q.user = &q;
    for (key = 0; key < 8; key++) {
        chaos_verdict v = chaos_judge(&cfg, size ? &q : NULL, key), w = chaos_judge(&cfg, size ? &q : NULL, key);
        MUST(memcmp(&v, &w, sizeof v) == 0);
        MUST(v.kind < CHAOS_KIND_COUNT && v.rule <= cfg.rule_count && v.delay_us <= 900000000u && v.roll < 10000 && !v.ticket);
        MUST(cfg.enabled || v.kind == CHAOS_PASS);
        MUST(v.kind == CHAOS_PASS || v.kind == CHAOS_DELAY || v.delay_us == 0);
    }
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size) {
    char *copy = (char *)malloc(size ? size : 1);
    chaos_error err;
    chaos_result r;
    size_t len;
    if (size) memcpy(copy, data, size);
    r = chaos_config_parse(&cfg, copy, size, &err);
    MUST(r == chaos_config_parse(&again, copy, size, NULL));
    free(copy);
    if (r) {
        MUST(!cfg.enabled && !again.enabled && cfg.rule_count == 0);
        MUST(err.code == r && err.text[0] && memchr(err.text, 0, sizeof err.text) && err.offset <= size);
        return 0;
    }
    MUST(chaos_json_check((const char *)data, size, NULL) == CHAOS_OK);
    len = chaos_config_format(&cfg, once, sizeof once);
    MUST(len < sizeof once && strlen(once) == len);
    MUST(len > CHAOS_CONFIG_INPUT_MAX || chaos_config_parse(&again, once, len, &err) == CHAOS_OK);
    if (len <= CHAOS_CONFIG_INPUT_MAX) {
        MUST(chaos_config_format(&again, twice, sizeof twice) == len && memcmp(once, twice, len) == 0);
        MUST(again.enabled == cfg.enabled && again.rule_count == cfg.rule_count && again.expires_ms == cfg.expires_ms);
        MUST(memcmp(&again.fault, &cfg.fault, offsetof(chaos_fault, error_body)) == 0);
    }
    judge(data, size < 2000 ? size : 2000);
    return 0;
}

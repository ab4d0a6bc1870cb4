/* json.c - fuzz target: chaos_json_check. The input ends at the end of its block, so that a read beyond it is seen. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size);

#define MUST(cond) ((cond) ? (void)0 : abort())

static chaos_result check_copy(const unsigned char *data, size_t size, chaos_error *err) {
    char *copy = (char *)malloc(size ? size : 1);
    chaos_result r;
    memcpy(copy, data, size);
    r = chaos_json_check(copy, size, err);
    free(copy);
    return r;
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size) {
    static unsigned char more[70001];
    chaos_error err;
    chaos_result r;
    if (size >= 70000) return 0;
    if (!size) data = more;
    r = check_copy(data, size, &err);
    MUST(r == check_copy(data, size, NULL));
    if (r) {
        MUST(r == CHAOS_ERR_JSON && err.code == r && err.offset <= size && err.line >= 1 && err.column >= 1 && err.text[0]);
        MUST(memchr(err.text, 0, sizeof err.text));
        return 0;
    }
    memcpy(more, data, size);
    more[size] = ' ';
    MUST(check_copy(more, size + 1, NULL) == CHAOS_OK); /* space behind it changes nothing */
    more[size] = 'x';
    MUST(check_copy(more, size + 1, NULL) == CHAOS_ERR_JSON); /* and anything else is one thing too many */
    return 0;
}

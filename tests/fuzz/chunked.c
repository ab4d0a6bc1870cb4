/* chunked.c - fuzz target: the chunked decoder gives the same for a whole body, for one byte at a time, and for pieces. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size);

#define MUST(cond) ((cond) ? (void)0 : abort())

typedef struct decoded {
    int result;
    size_t used, made;
} decoded;

/* Feeds pieces of at most `step` bytes, each in a block of its own; the body goes to out. */
static decoded feed(const unsigned char *data, size_t size, size_t step, char *out) {
    chaosi_chunked d;
    decoded all = {0, 0, 0};
    memset(&d, 0, sizeof d);
    while (all.used < size && all.result == 0) {
        size_t piece = size - all.used < step ? size - all.used : step, used, made;
        char *block = (char *)malloc(piece);
        memcpy(block, data + all.used, piece);
        all.result = chaosi_chunked_feed(&d, block, piece, &used, &made);
        MUST(all.result >= -1 && all.result <= 1 && used <= piece && made <= used);
        MUST(all.result != 0 || used == piece); /* "more" means that all of it was taken */
        memcpy(out + all.made, block, made);
        all.made += made;
        all.used += used;
        free(block);
    }
    return all;
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size) {
    static char whole[65536], pieces[65536];
    static const size_t steps[] = {1, 2, 3, 7, 64};
    decoded a, b;
    size_t i;
    if (size > sizeof whole) return 0;
    a = feed(data, size, size ? size : 1, whole);
    for (i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        b = feed(data, size, steps[i], pieces);
        MUST(a.result == b.result && a.made == b.made && memcmp(whole, pieces, a.made) == 0);
        MUST(a.result < 0 || a.used == b.used);
    }
    return 0;
}

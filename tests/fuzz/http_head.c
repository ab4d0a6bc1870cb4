/* http_head.c - fuzz target: the heads of requests and replies. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size);

#define MUST(cond) ((cond) ? (void)0 : abort())

typedef int (*parser)(chaosi_head *h, const char *buf, size_t len);

static chaosi_head head, shorter;

static bool inside(chaosi_span s, const char *buf, size_t len) { return s.len == 0 || (s.at >= buf && s.at + s.len <= buf + len); }

/* What an accepted head must be, whatever it says. */
static void check_accepted(const char *buf, size_t len, bool request) {
    int i, lengths = 0, chunked = 0;
    MUST(len >= 4 && memcmp(buf + len - 4, "\r\n\r\n", 4) == 0);
    MUST(head.count >= 0 && head.count <= CHAOSI_FIELDS_MAX && !(head.chunked && head.has_length));
    for (i = 0; i < head.count; i++) {
        chaosi_span name = head.fields[i].name, value = head.fields[i].value;
        MUST(name.len > 0 && inside(name, buf, len) && inside(value, buf, len));
        MUST(!memchr(name.at, ' ', name.len) && !memchr(name.at, '\t', name.len) && !memchr(name.at, ':', name.len));
        MUST(!value.len || (!memchr(value.at, '\r', value.len) && !memchr(value.at, '\n', value.len) && !memchr(value.at, 0, value.len)));
        lengths += chaosi_same_nocase(name, chaosi_str("Content-Length"));
        chunked += chaosi_same_nocase(name, chaosi_str("Transfer-Encoding"));
    }
    MUST(!(request && lengths && chunked)); /* the two framings at once are how requests are smuggled */
    MUST(inside(head.method, buf, len) && inside(head.target, buf, len) && inside(head.reason, buf, len));
    /* RFC 9112 section 3.2.4: OPTIONS of an absolute-form without a path means "*", which is no part of the input. */
    MUST(inside(head.path, buf, len) || (chaosi_same(head.path, chaosi_str("*")) && chaosi_same(head.method, chaosi_str("OPTIONS"))));
    if (request) MUST(head.method.len > 0 && head.target.len > 0 && !memchr(head.target.at, ' ', head.target.len));
    else MUST(head.status >= 100 && head.status <= 599);
}

static void check(parser parse, const unsigned char *data, size_t size, bool request) {
    char *copy = (char *)malloc(size ? size : 1);
    size_t used;
    int r;
    if (size) memcpy(copy, data, size);
    r = parse(&head, copy, size);
    MUST(r <= (int)size && r > -600 && (r >= 0 || r <= -400));
    if (r > 0) {
        used = (size_t)r;
        check_accepted(copy, used, request);
        MUST(parse(&shorter, copy, used) == r); /* what follows does not matter */
        MUST(parse(&shorter, copy, used - 1) == 0 && parse(&shorter, copy, used / 2) == 0 && parse(&shorter, copy, used / 3) == 0);
    } else if (r == 0) {
        MUST(parse(&shorter, copy, size / 2) == 0); /* what may still become a head was never refused */
    }
    free(copy);
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size) {
    if (size > 65536) return 0;
    check(chaosi_http_request, data, size, true);
    check(chaosi_http_reply, data, size, false);
    return 0;
}

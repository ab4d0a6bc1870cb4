/* answer.c - fuzz target: what SSM, an agent or the aws-cli may say: GetParameter's answer, a page of names, an error, and the
   same bytes as an HTTP reply on a socket. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size);

#define MUST(cond) ((cond) ? (void)0 : abort())

static void as_parameter(const unsigned char *data, size_t size) {
    char *copy = (char *)malloc(size + 1), small[8];
    chaosi_span text = chaosi_of(copy, size);
    chaosi_json value;
    memcpy(copy, data, size);
    copy[size] = 0;
    chaosi_aws_number(text, "Parameter.Version");
    MUST(chaosi_aws_moment(text, "Parameter.LastModifiedDate") >= 0 || size);
    chaosi_json_text(text, "Parameter.Type", small, sizeof small);
    MUST(strlen(small) < sizeof small);
    if (chaosi_json_find(&value, text, "Parameter.Value") == '"') {
        size_t n = chaosi_json_decode(&value, copy, size);
        MUST(n <= size);
    }
    free(copy);
}

static void as_names(const unsigned char *data, size_t size) {
    char *copy = (char *)malloc(size + 1), token[16];
    chaosi_ssm s;
    memset(&s, 0, sizeof s);
    memcpy(copy, data, size);
    copy[size] = 0;
    s.buf = copy;
    s.cap = size + 1;
    s.len = size;
    MUST(chaosi_ssm_names(&s, token, sizeof token) <= size);
    free(copy);
}

static void as_error(const unsigned char *data, size_t size) {
    char *copy = (char *)malloc(size + 1), *c;
    chaosi_ssm s;
    chaos_error err;
    memset(&s, 0, sizeof s);
    s.way = "curl";
    memcpy(copy, data, size);
    copy[size] = 0;
    MUST(chaosi_aws_fail(&s, 400, copy, &err) != CHAOS_OK);
    for (c = err.text; *c; c++) MUST((unsigned char)*c >= 0x20); /* nothing that breaks a log line or paints a terminal */
    free(copy);
}

static void as_reply(const unsigned char *data, size_t size) {
    char buf[2048];
    chaosi_got got;
    int fds[2];
    MUST(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    MUST(write(fds[1], data, size) == (ssize_t)size);
    close(fds[1]);
    got.buf = buf;
    got.cap = sizeof buf;
    if (!chaosi_read_answer(fds[0], &got, chaosi_clock(false) + CHAOSI_MS)) {
        MUST(got.body.at >= buf && got.body.at + got.body.len < buf + sizeof buf && got.body.at[got.body.len] == 0);
    }
    close(fds[0]);
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size) {
    static const unsigned char none[1];
    if (size > 65536) return 0;
    if (!size) data = none;
    as_parameter(data, size);
    as_names(data, size);
    as_error(data, size);
    as_reply(data, size);
    return 0;
}

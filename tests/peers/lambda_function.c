/* A Lambda function for tests/peers/lambda.py. What it does stands in the event behind "do:", else in $FUNCTION:

   fields        the event's fields, the environment and the count of calls so far, as JSON          echo    the event itself
   size N        N bytes            pieces N    N bytes in writes of 1,000         empty            nothing, and says it went well
   fail T M      chaos_lambda_fail(T, M)        say N    fails with a message of N quotes            return  returns 1
   nap MS        sleeps, then as fields         stream   two lines; waits for $GATE to be there between them
   nap-stream    sleeps 60 ms, then as stream
   stream-fail   one line, then fails           prelude  an HTTP reply, streamed                     exit    exits with 3

   $TTL, $STALE: ms, for the handle. $INIT: why the init fails. The last line on stdout is the handle's report. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int calls;

static int number_of(const char *name) { return getenv(name) ? atoi(getenv(name)) : 0; }

static void put_text(char *out, size_t cap, const char *key, const char *value) {
    size_t n = strlen(out);
    n += (size_t)snprintf(out + n, cap - n, "%s\"%s\":\"", n > 1 ? "," : "", key);
    for (; *value && n + 8 < cap; value++) n += (size_t)snprintf(out + n, cap - n, *value == '"' || *value == '\\' ? "\\%c" : "%c", *value);
    snprintf(out + n, cap - n, "\"");
}

static int put_fields(const chaos_lambda_event *e, chaos_lambda_reply *reply, int count) {
    static const char *const variable = "_X_AMZN_TRACE_ID";
    char out[16384] = "{";
    put_text(out, sizeof out, "request_id", e->request_id);
    put_text(out, sizeof out, "trace_id", e->trace_id);
    put_text(out, sizeof out, "function_arn", e->function_arn);
    put_text(out, sizeof out, "client_context", e->client_context);
    put_text(out, sizeof out, "cognito_identity", e->cognito_identity);
    put_text(out, sizeof out, "content_type", e->content_type);
    put_text(out, sizeof out, "variable", getenv(variable) ? getenv(variable) : "(none)");
    snprintf(out + strlen(out), sizeof out - strlen(out), ",\"deadline_ms\":%lld,\"len\":%zu,\"calls\":%d}", e->deadline_ms, e->len, count);
    return chaos_lambda_write(reply, out, strlen(out)) != CHAOS_OK;
}

static int put_bytes(chaos_lambda_reply *reply, size_t len, size_t step) {
    static char bytes[1 << 23];
    size_t at, n;
    memset(bytes, 'x', len < sizeof bytes ? len : sizeof bytes);
    for (at = 0; at < len; at += n) {
        n = len - at < step ? len - at : step;
        if (chaos_lambda_write(reply, bytes + at, n) != CHAOS_OK) return 1;
    }
    return 0;
}

static int stream(chaos_lambda_reply *reply, const char *prelude, bool fails) {
    int tries;
    if (chaos_lambda_stream(reply, prelude ? NULL : "text/plain", prelude) != CHAOS_OK) return 1;
    if (chaos_lambda_write(reply, "one\n", 4) != CHAOS_OK) return 1;
    for (tries = 0; getenv("GATE") && access(getenv("GATE"), F_OK) != 0 && tries < 4000; tries++) poll(NULL, 0, 1);
    if (fails) chaos_lambda_fail(reply, "Function.Torn", "in the \"middle\"");
    if (fails) return 1;
    return chaos_lambda_write(reply, "two\n", 4) != CHAOS_OK;
}

static int handle(void *user, const chaos_lambda_event *e, chaos_lambda_reply *reply) {
    int count = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    const char *mode = e->len > 3 && !memcmp(e->body, "do:", 3) ? e->body + 3 : getenv("FUNCTION") ? getenv("FUNCTION") : "fields";
    char word[16] = "", a[256] = "", b[256] = "";
    (void)user;
    sscanf(mode, "%15s %255s %255[^\n]", word, a, b);
    if (!strcmp(word, "echo")) return chaos_lambda_write(reply, e->body, e->len) != CHAOS_OK;
    if (!strcmp(word, "size")) return put_bytes(reply, (size_t)atol(a), (size_t)atol(a));
    if (!strcmp(word, "pieces")) return put_bytes(reply, (size_t)atol(a), 1000);
    if (!strcmp(word, "empty")) return 0;
    if (!strcmp(word, "return")) return 1;
    if (!strcmp(word, "exit")) exit(3);
    if (!strcmp(word, "nap")) poll(NULL, 0, atoi(a));
    if (!strcmp(word, "nap-stream")) poll(NULL, 0, 60);
    if (!strcmp(word, "stream") || !strcmp(word, "nap-stream")) return stream(reply, NULL, false);
    if (!strcmp(word, "stream-fail")) return stream(reply, NULL, true);
    if (!strcmp(word, "prelude")) return stream(reply, "{\"statusCode\":201,\"headers\":{\"X-A\":\"b\"},\"cookies\":[\"c=d\"]}", false);
    if (!strcmp(word, "fail")) chaos_lambda_fail(reply, a, b);
    if (!strcmp(word, "say")) {
        memset(b, '"', sizeof b - 1);
        b[atoi(a)] = 0;
        chaos_lambda_fail(reply, "Function.Quoted", b);
    }
    return put_fields(e, reply, count);
}

static const char *init(void *user) { return (void)user, getenv("INIT"); }

int main(void) {
    chaos_desc desc;
    chaos_lambda_desc lambda;
    chaos_report r;
    chaos_error err;
    chaos_result result;
    chaos *c;
    memset(&desc, 0, sizeof desc);
    memset(&lambda, 0, sizeof lambda);
    desc.no_thread = true;
    desc.ttl_ms = number_of("TTL");
    desc.max_stale_ms = number_of("STALE");
    lambda.init = init;
    c = chaos_open(&desc, &err);
    if (!c) return fprintf(stderr, "lambda_function: %s\n", err.text), 2;
    result = chaos_lambda_run(c, handle, NULL, &lambda, &err);
    chaos_stats(c, &r);
    printf("{\"requests\":%llu,\"latency\":%llu,\"error\":%llu,\"would_inject\":%llu,\"excluded\":%llu,\"over_budget\":%llu,"
           "\"unsupported\":%llu,\"skipped\":%llu,\"delay_ms\":%llu,\"ok\":%llu,\"failed\":%llu,\"fetches\":%llu,\"calls\":%d}\n",
           r.requests, r.injected[CHAOS_DELAY], r.injected[CHAOS_STATUS], r.would_inject, r.excluded, r.over_budget, r.unsupported,
           r.skipped, r.delay_ms, r.outcomes[2], r.outcomes[5], r.fetches, calls);
    fprintf(stderr, "lambda_function: %s: %s\n", chaos_result_text(result), err.text);
    chaos_close(c);
    return result != CHAOS_OK;
}

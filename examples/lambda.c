/* bootstrap - a Lambda function in C on provided.al2023, with faults injected around its handler.

   Build:  make lambda            (build/lambda/ARCH/bootstrap, one static file, and chaos-example-ARCH.zip)
   Setup:  CHAOS_CONFIG=ssm:/team/stage/chaos, with AWS's parameters extension as a layer; CHAOS_EMF=1 for metrics
   Try:    an HTTP event ({"requestContext":{"http":..},"version":"2.0",..}) is answered with a greeting; any other event
           comes back as it was; {"stream": true} streams, {"fail": true} fails.

   Exit code: 1 = the Runtime API is lost or is not there. */
#define CHAOS_IMPLEMENTATION
#include "../chaos.h"

#include <stdio.h>
#include <string.h>

static bool holds(const chaos_lambda_event *event, const char *word) {
    size_t len = strlen(word), i;
    for (i = 0; i + len <= event->len; i++)
        if (!memcmp(event->body + i, word, len)) return true;
    return false;
}

static int stream(chaos_lambda_reply *reply) {
    char line[32];
    int i;
    if (chaos_lambda_stream(reply, "text/plain", NULL) != CHAOS_OK) return 1;
    for (i = 1; i <= 3; i++) {
        snprintf(line, sizeof line, "line %d\n", i);
        if (chaos_lambda_write(reply, line, strlen(line)) != CHAOS_OK) return 1;
    }
    return 0;
}

static int handle(void *user, const chaos_lambda_event *event, chaos_lambda_reply *reply) {
    static const char hello[] = "{\"statusCode\":200,\"headers\":{\"Content-Type\":\"text/plain\"},\"body\":\"hello from Lambda\\n\"}";
    (void)user;
    if (holds(event, "\"stream\": true") || holds(event, "\"stream\":true")) return stream(reply);
    if (holds(event, "\"fail\": true") || holds(event, "\"fail\":true")) {
        chaos_lambda_fail(reply, "Function.Asked", "the event asked for a failure");
        return 1;
    }
    if (holds(event, "\"requestContext\"")) return chaos_lambda_write(reply, hello, sizeof hello - 1) != CHAOS_OK;
    return chaos_lambda_write(reply, event->body, event->len) != CHAOS_OK;
}

int main(void) {
    chaos_desc desc = {.no_thread = true}; /* the sandbox is frozen between events: the config is read inside them */
    chaos_lambda_desc lambda = {0};
    chaos_error err;
    chaos *faults = chaos_open(&desc, &err);
    if (!faults) fprintf(stderr, "chaos: %s; running without\n", err.text);
    if (!faults) faults = chaos_open(&(chaos_desc){.config = "{\"enabled\":false}", .no_thread = true}, &err);
    if (faults && chaos_lambda_run(faults, handle, NULL, &lambda, &err) == CHAOS_OK) return 0;
    fprintf(stderr, "bootstrap: %s\n", err.text);
    return 1;
}

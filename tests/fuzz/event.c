/* event.c - fuzz target: Lambda events (what they are, their method, path and headers) and the injected replies to them. The
   first byte chooses the config. A reply must be JSON, whatever the event was. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size);

#define MUST(cond) ((cond) ? (void)0 : abort())

static const char *const configs[] = {
    "{\"enabled\":true,\"errorRate\":100,\"errorBody\":\"a\\n\",\"events\":[\"http\",\"direct\",\"async\",\"sqs\",\"stream\"]}",
    "{\"enabled\":true,\"errorRate\":100,\"match\":{\"methods\":[\"GET\"],\"paths\":[\"/a/**\"],\"headers\":{\"x-test\":\"*\"}}}",
    "{\"enabled\":true,\"errorRate\":50,\"errorWhen\":\"after\"}"};
static chaos *handles[3];

static void open_handles(void) {
    chaos_desc desc;
    int i;
    memset(&desc, 0, sizeof desc);
    desc.quiet = desc.no_thread = true;
    for (i = 0; i < 3; i++) {
        desc.config = configs[i];
        handles[i] = chaos_open(&desc, NULL);
        MUST(handles[i]);
    }
}

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t size) {
    chaos_lambda_event event;
    chaos_lambda_action action;
    char reply[8192], *copy;
    if (!handles[0]) open_handles();
    if (!size) return 0;
    copy = (char *)malloc(size);
    memcpy(copy, data + 1, size - 1);
    memset(&event, 0, sizeof event);
    event.body = copy;
    event.len = size - 1;
    event.request_id = "id";
    action = chaos_lambda_decide(handles[data[0] % 3], &event, reply, sizeof reply);
    MUST(action.run || action.replaced);
    if (action.replaced) {
        MUST(action.len < sizeof reply && chaos_json_check(reply, action.len, NULL) == CHAOS_OK);
        MUST(action.failed == (strstr(reply, "\"errorType\":\"Function.ChaosInjected\"") != NULL));
    } else {
        MUST(action.run && !action.failed);
    }
    free(copy);
    return 0;
}

/* counted.c - chaos-proxy itself, which at its end also prints the header's counters as one line of JSON, so that
   real.py can compare them with what clients saw and with the log. real.py compiles it. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"
#include <stdio.h>

static void close_and_tell(chaos *c) {
    chaos_report r;
    chaos_stats(c, &r);
    chaos_close(c);
    printf("{\"requests\":%llu,\"latency\":%llu,\"error\":%llu,\"delay_ms\":%llu,\"waiting\":%llu,\"proxied\":%llu,"
           "\"log_suppressed\":%llu,\"log_dropped\":%llu,\"upstream_errors\":%llu,\"rejected\":%llu,\"connections_now\":%llu}\n",
           r.requests, r.injected[CHAOS_DELAY], r.injected[CHAOS_STATUS], r.delay_ms, r.waiting, r.proxied, r.log_suppressed, r.log_dropped,
           r.upstream_errors, r.rejected, r.connections_now);
    fflush(stdout);
}

#define chaos_close close_and_tell
#include "../../examples/proxy.c"

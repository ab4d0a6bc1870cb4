/* counted.c - chaos-proxy itself, which at its end also prints the header's counters as one line of JSON, so that the
   tests can compare them with what clients saw and with the log. common.py compiles it. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"
#include <stdio.h>

static void close_and_tell(chaos *c) {
    chaos_report r;
    int kind;
    chaos_stats(c, &r);
    chaos_close(c);
    printf("{");
    for (kind = CHAOS_DELAY; kind < CHAOS_KIND_COUNT; kind++) printf("\"%s\":%llu,", chaos_kind_text(kind), r.injected[kind]);
    printf("\"requests\":%llu,\"would_inject\":%llu,\"excluded\":%llu,\"over_budget\":%llu,\"unsupported\":%llu,\"skipped\":%llu,",
           r.requests, r.would_inject, r.excluded, r.over_budget, r.unsupported, r.skipped);
    printf("\"delay_ms\":%llu,\"waiting\":%llu,\"proxied\":%llu,\"connections\":%llu,\"connections_now\":%llu,", r.delay_ms, r.waiting,
           r.proxied, r.connections, r.connections_now);
    printf("\"log_suppressed\":%llu,\"log_dropped\":%llu,\"upstream_errors\":%llu,\"rejected\":%llu,\"capped_ms\":%llu}\n",
           r.log_suppressed, r.log_dropped, r.upstream_errors, r.rejected, r.capped_ms);
    fflush(stdout);
}

#define chaos_close close_and_tell
#include "../../examples/proxy.c"

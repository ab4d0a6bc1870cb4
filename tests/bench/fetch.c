/* fetch.c - how long one chaos_ssm_get takes in a process that goes on: fetch NAME COUNT prints the way and the median, in ms.
   Built with -DCHAOS_WITH_CURL -lcurl, and without for the aws-cli. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    static char buf[CHAOS_SSM_BUFFER];
    static double took[1000];
    int count = argc > 2 ? atoi(argv[2]) : 0, i;
    chaos_ssm_desc desc = {.name = argc > 1 ? argv[1] : ""};
    chaos_ssm_value value = {0};
    if (count < 1 || count > 1000) return 2;
    for (i = 0; i < count; i++) {
        struct timespec from, to;
        chaos_error err;
        clock_gettime(CLOCK_MONOTONIC, &from);
        if (chaos_ssm_get(&desc, buf, sizeof buf, &value, &err) != CHAOS_OK) {
            fprintf(stderr, "fetch: %s\n", err.text);
            return 1;
        }
        clock_gettime(CLOCK_MONOTONIC, &to);
        took[i] = (double)(to.tv_sec - from.tv_sec) * 1e3 + (double)(to.tv_nsec - from.tv_nsec) / 1e6;
    }
    qsort(took, (size_t)count, sizeof took[0], by_size);
    printf("%s %.3f\n", value.way, took[count / 2]);
    return 0;
}

/* delay.c - how exact an injected delay arrives at a client.

   delay PORT CONNECTIONS REQUESTS DELAY_MS: every connection has a thread of its own and asks on a timetable, one
   request each DELAY_MS + 40 ms, the threads evenly apart, whatever earlier replies did (one that is late is followed at
   once). Prints one line: number of replies, then reply time minus DELAY_MS in ms: min, median, p99, max. */
#define _POSIX_C_SOURCE 200809L
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 200 };

static struct plan {
    int port, connections, requests, delay_ms;
    double start;
} plan;

static double *late; /* connections * requests */
static int failures[MOST];

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

static void sleep_until(double ms) {
    struct timespec t;
    t.tv_sec = (time_t)(ms / 1e3);
    t.tv_nsec = (long)((ms - (double)t.tv_sec * 1e3) * 1e6);
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &t, NULL) != 0) continue;
}

static int dial(void) {
    struct sockaddr_in to;
    struct timeval patience = {5, 0};
    int one = 1, fd = socket(AF_INET, SOCK_STREAM, 0);
    memset(&to, 0, sizeof to);
    to.sin_family = AF_INET;
    to.sin_port = htons((unsigned short)plan.port);
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to) != 0) return -1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    return fd;
}

/* The whole reply: head, then as many bytes as Content-Length says. */
static int ask(int fd) {
    static const char request[] = "GET / HTTP/1.1\r\nHost: bench\r\n\r\n";
    char buf[4096], *end, *length;
    size_t have = 0;
    if (send(fd, request, sizeof request - 1, MSG_NOSIGNAL) != (ssize_t)sizeof request - 1) return 0;
    for (;;) {
        ssize_t n = recv(fd, buf + have, sizeof buf - 1 - have, 0);
        if (n <= 0) return 0;
        have += (size_t)n;
        buf[have] = 0;
        end = strstr(buf, "\r\n\r\n");
        if (!end) continue;
        length = strstr(buf, "ontent-Length: ");
        if (!length) length = strstr(buf, "ontent-length: ");
        if (!length || have >= (size_t)(end + 4 - buf) + strtoul(length + 15, NULL, 10)) break;
    }
    return strncmp(buf, "HTTP/1.1 200", 12) == 0;
}

static void *run(void *arg) {
    int me = (int)(size_t)arg, i, fd = dial();
    double period = plan.delay_ms + 40, first = plan.start + period * me / plan.connections;
    for (i = 0; i < plan.requests && fd >= 0; i++) {
        double began;
        sleep_until(first + period * i);
        began = now_ms();
        if (!ask(fd)) break;
        late[me * plan.requests + i] = now_ms() - began - plan.delay_ms;
    }
    failures[me] = plan.requests - i;
    if (fd >= 0) close(fd);
    return NULL;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    pthread_t threads[MOST];
    int i, n, bad = 0;
    if (argc != 5) return 2;
    plan.port = atoi(argv[1]);
    plan.connections = atoi(argv[2]);
    plan.requests = atoi(argv[3]);
    plan.delay_ms = atoi(argv[4]);
    if (plan.connections < 1 || plan.connections > MOST || plan.requests < 1) return 2;
    n = plan.connections * plan.requests;
    late = (double *)calloc((size_t)n, sizeof *late);
    plan.start = now_ms() + 50;
    for (i = 0; i < plan.connections; i++)
        if (!late || pthread_create(&threads[i], NULL, run, (void *)(size_t)i)) return 1;
    for (i = 0; i < plan.connections; i++) {
        pthread_join(threads[i], NULL);
        bad += failures[i];
    }
    if (bad) {
        fprintf(stderr, "delay: %d of %d requests failed\n", bad, n);
        return 1;
    }
    qsort(late, (size_t)n, sizeof *late, ascending);
    printf("%d %.3f %.3f %.3f %.3f\n", n, late[0], late[n / 2], late[n * 99 / 100], late[n - 1]);
    free(late);
    return 0;
}

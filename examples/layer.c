/* chaos-layer - faults for AWS Lambda functions in any language, without a change to their code: a layer.

   Build:  make layer             (build/layer/ARCH/chaos-layer, one static file, and chaos-layer-ARCH.zip)
   Setup:  the layer; AWS_LAMBDA_EXEC_WRAPPER=/opt/chaos-layer; CHAOS_CONFIG=ssm:/team/stage/chaos, with AWS's parameters
           extension as a second layer; CHAOS_EMF=1 for metrics. On provided.*, where wrappers are ignored: the same file as
           /opt/bootstrap, CHAOS_EXEC=/var/task/app, and no bootstrap in the function's own zip.
   Also:   CHAOS_LAYER_PORT=N           listen on this port instead of a free one
           CHAOS_LAYER_UPSTREAM=A:P     the Runtime API to forward to, instead of AWS_LAMBDA_RUNTIME_API: another proxy's

   Lambda runs this with the runtime's command line. It listens, forks, and becomes the runtime, whose AWS_LAMBDA_RUNTIME_API
   leads to the child. That one passes everything on, byte for byte; only the replies to invocation/next are looked at, and
   held, answered in the runtime's place, or passed. What goes wrong before the runtime starts is said on stderr, and the
   runtime starts as if there were no layer.

   Exit code: the runtime's; 127 = the runtime cannot be started.

   Functions chaosi_* are private to chaos.h. This file uses some, because the two ship together and a second HTTP parser
   would be worse. */
#define CHAOS_IMPLEMENTATION
#include "../chaos.h" /* it brings the system's headers */

#ifdef __linux__
#include <sys/prctl.h>
#endif

#define BUFFER   98304 /* of each direction; the longest head that is understood */
#define CALL_MAX 4096  /* bytes of a call to invocation/next */
#define FAULTS   1024  /* invocations that the runtime works on, with a fault each */

/* A fault of an invocation, from the decision to the result. */
typedef struct fault {
    chaos_lambda_action action;
    chaosi_u64 start;
    char id[129], body[8192];
} fault;

/* One direction of a connection: of buf, `cleared` bytes may go on, those behind them are not understood yet. */
typedef struct flow {
    size_t len, cleared;
    bool ended, shut; /* the sender has finished; the receiver was told */
    char buf[BUFFER];
} flow;

typedef struct connection {
    int client, api;    /* api: the upstream connection, -1 = none yet */
    int status;         /* of the result that the runtime posts */
    bool asked, stale;  /* a call to invocation/next waits for its reply; on a connection that may be a dead one */
    bool tunnel;        /* not to be understood: bytes both ways */
    bool lost, orderly; /* upstream takes no more; both sides have finished */
    bool chunked;       /* the request's body is not complete: chunks, */
    chaosi_u64 left;    /* or so many bytes */
    size_t head_len, call_len, event_len;
    char *event;    /* a whole reply as it came, and its body decoded; CHAOSI_EVENT_MAX each, NULL = not needed yet */
    fault *fault;   /* of the invocation that comes, or whose result is posted */
    chaosi_got got; /* the head looked at last */
    chaosi_chunked chunks;
    char call[CALL_MAX];
    flow up, down;
} connection;

static struct layer {
    chaos *chaos; /* NULL = could not be opened: everything passes */
    pthread_once_t opened;
    pthread_mutex_t lock;
    fault *faults[FAULTS];
    unsigned next_fault;
    const char *api; /* as it was given */
    chaosi_address upstream;
} layer = {.opened = PTHREAD_ONCE_INIT, .lock = PTHREAD_MUTEX_INITIALIZER};

/* Not before a runtime asks for its first event: a snapshot (SnapStart) is taken earlier, and all that wake from it would have
   one seed. They have no log stream either, and one host name: each gets an id of its own, for `canary`. */
static void open_chaos(void) {
    const char *type = chaosi_env("AWS_LAMBDA_INITIALIZATION_TYPE");
    chaos_desc desc = {.no_thread = true}; /* the sandbox is frozen between events: the config is read inside them */
    chaos_error err;
    char id[32];
    snprintf(id, sizeof id, "snap-%llx", (unsigned long long)chaosi_random(&err));
    if (type && !strcmp(type, "snap-start") && !chaosi_env("CHAOS_INSTANCE")) desc.instance = id;
    layer.chaos = chaos_open(&desc, &err);
    if (!layer.chaos) fprintf(stderr, "chaos-layer: %s; no faults\n", err.text);
}

/* -- faults -- */
static void settle(fault *f, int status) {
    if (f && f->action.verdict.kind) chaos_done(layer.chaos, &f->action.verdict, status, (chaosi_clock(false) - f->start) / 1000);
    free(f);
}

/* Keeps a fault until the runtime posts its result. Their number is bounded whatever it does: the oldest goes. */
static void keep(fault *f) {
    fault *old;
    pthread_mutex_lock(&layer.lock);
    old = layer.faults[layer.next_fault % FAULTS];
    layer.faults[layer.next_fault++ % FAULTS] = f;
    pthread_mutex_unlock(&layer.lock);
    settle(old, 0);
}

static fault *claim(chaosi_span id) {
    fault *f = NULL;
    size_t i;
    pthread_mutex_lock(&layer.lock);
    for (i = 0; !f && i < FAULTS && layer.next_fault; i++) {
        if (!layer.faults[i] || !chaosi_same(id, chaosi_str(layer.faults[i]->id))) continue;
        f = layer.faults[i];
        layer.faults[i] = NULL;
    }
    pthread_mutex_unlock(&layer.lock);
    return f;
}

/* -- bytes -- */
static bool has_room(const flow *f) { return !f->ended && f->len < sizeof f->buf; }

static void drop(flow *f, size_t n) {
    memmove(f->buf, f->buf + n, f->len - n);
    f->len -= n;
    f->cleared -= f->cleared < n ? f->cleared : n;
}

/* Takes what the sender has sent. False = it has reset the connection. */
static bool pull(flow *f, int from) {
    ssize_t n = recv(from, f->buf + f->len, sizeof f->buf - f->len, MSG_DONTWAIT);
    if (n < 0) return chaosi_would_block();
    f->len += (size_t)n;
    f->ended = n == 0;
    return true;
}

/* Gives the receiver what may go on, as much as it takes; behind the last of it the end. False = it is gone. */
static bool push(flow *f, int to) {
    ssize_t n = f->cleared ? send(to, f->buf, f->cleared, MSG_DONTWAIT | CHAOSI_NOSIGNAL) : 0;
    if (n < 0) return chaosi_would_block();
    if (n > 0) drop(f, (size_t)n);
    if (!f->ended || f->len || f->shut) return true;
    shutdown(to, SHUT_WR);
    f->shut = true;
    return true;
}

/* This connection is not understood from here on: bytes both ways. */
static void give_up(connection *k) {
    static const char why[] = "a request that is not HTTP/1 as it should be, or a head over 96 KiB: no faults on this connection";
    pthread_once(&layer.opened, open_chaos);
    if (layer.chaos) chaosi_note(layer.chaos, "unread", "from", "the runtime", why);
    k->tunnel = true;
}

static bool in_body(const connection *k) { return k->chunked || k->left; }

/* Clears what belongs to the body of the request that is on its way. */
static void follow(connection *k) {
    flow *f = &k->up;
    size_t fresh = f->len - f->cleared, used = fresh, unused;
    char copy[BUFFER]; /* the decoder works in place */
    int r;
    if (k->chunked) {
        memcpy(copy, f->buf + f->cleared, fresh);
        r = chaosi_chunked_feed(&k->chunks, copy, fresh, &used, &unused);
        k->chunked = r == 0;
        if (r < 0) give_up(k);
    } else {
        if (used > k->left) used = (size_t)k->left;
        k->left -= used;
    }
    f->cleared += used;
}

static void begin_body(connection *k) {
    k->chunked = k->got.head.chunked;
    k->left = k->got.head.length;
    memset(&k->chunks, 0, offsetof(chaosi_chunked, text));
    k->chunks.blind = true; /* an error's body in a trailer of a stream has the size it has */
}

/* -- upstream -- */
static void hang_up(connection *k) {
    if (k->api >= 0) close(k->api);
    k->api = -1;
}

/* False = nobody is there. */
static bool dial(connection *k) {
    if (k->api >= 0 && chaosi_is_quiet(k->api)) return true;
    hang_up(k);
    k->api = chaosi_socket(&layer.upstream);
    if (k->api >= 0 && chaosi_connect(k->api, &layer.upstream, chaosi_clock(false) + 2000 * CHAOSI_MS) == 0) return true;
    hang_up(k);
    return false;
}

/* Asks for the next event. A connection that was idle may be dead by now: then once more on a new one. */
static bool ask(connection *k) {
    bool used = k->api >= 0;
    if (used || dial(k)) k->asked = chaosi_send_all(k->api, k->call, k->call_len, CHAOSI_NEVER);
    k->stale = used;
    if (k->asked) return true;
    hang_up(k);
    return used && ask(k);
}

/* Posts the injected result, once: after a failure nobody knows whether it arrived. False = it did not leave. */
static bool post(connection *k, const fault *f, const char *fields) {
    char text[1024 + sizeof f->body];
    int n = snprintf(text, 1024,
                     "POST /2018-06-01/runtime/invocation/%s/%s HTTP/1.1\r\nHost: %.100s\r\nUser-Agent: chaos-h/%s\r\n"
                     "Content-Type: application/json\r\n%s%sContent-Length: %zu\r\n\r\n",
                     f->id, f->action.failed ? "error" : "response", layer.api, CHAOS_VERSION, fields,
                     f->action.failed ? "Lambda-Runtime-Function-Error-Type: " CHAOSI_INJECTED_TYPE "\r\n" : "", f->action.len);
    memcpy(text + n, f->body, f->action.len);
    return dial(k) && chaosi_send_all(k->api, text, (size_t)n + f->action.len, CHAOSI_NEVER);
}

/* What is in k->event goes to the client as it came. */
static bool pass(connection *k) {
    size_t len = k->event_len;
    k->event_len = 0;
    return chaosi_send_all(k->client, k->event, len, CHAOSI_NEVER);
}

/* The rest of the reply whose head was read: as it came to k->event, its body to *body. False = it cannot be had whole, what
   came of it is in k->event. */
static bool read_event(connection *k, chaosi_span *body) {
    const chaosi_head *h = &k->got.head;
    size_t fed = k->head_len, len = k->down.len, used, made = 0, piece;
    char *decoded;
    int r = 0;
    if (!k->event) k->event = (char *)malloc(2 * CHAOSI_EVENT_MAX); /* pages that are not used cost nothing */
    if (!k->event) return false;
    decoded = h->chunked ? k->event + CHAOSI_EVENT_MAX : k->event + k->head_len;
    memcpy(k->event, k->down.buf, len);
    k->down.len = 0;
    memset(&k->chunks, 0, offsetof(chaosi_chunked, text));
    for (;;) {
        ssize_t n;
        if (h->chunked) {
            memcpy(decoded + made, k->event + fed, len - fed);
            r = chaosi_chunked_feed(&k->chunks, decoded + made, len - fed, &used, &piece);
            made += piece;
            fed = len;
        } else {
            made = len - k->head_len;
            r = h->has_length && made >= h->length;
            if (r) made = (size_t)h->length;
        }
        k->event_len = len;
        *body = chaosi_of(decoded, made);
        if (r || len == CHAOSI_EVENT_MAX) return r > 0;
        n = recv(k->api, k->event + len, CHAOSI_EVENT_MAX - len, MSG_DONTWAIT);
        if (n == 0) return !h->chunked && !h->has_length; /* the end is the connection's */
        if (n < 0 && !chaosi_would_block()) return false;
        if (n < 0) chaosi_poll(k->api, POLLIN, CHAOSI_NEVER);
        else len += (size_t)n;
    }
}

/* The runtime never sees the event: we post its result, and ask for the next one. */
static bool answer(connection *k) {
    chaosi_got said;
    char text[4096];
    const char *problem = "not sent";
    bool lost;
    said.buf = text;
    said.cap = sizeof text;
    if (!k->got.head.keep_alive) hang_up(k);
    lost = !dial(k);
    if (!lost && post(k, k->fault, "")) problem = chaosi_read_answer(k->api, &said, chaosi_clock(false) + CHAOSI_POST_MS * CHAOSI_MS);
    if (!problem && said.head.status >= 300) chaosi_note(layer.chaos, "lambda", "call", k->fault->id, said.body.at);
    if (problem) chaosi_note(layer.chaos, "lambda", "call", k->fault->id, problem);
    if (problem || !said.head.keep_alive) hang_up(k);
    settle(k->fault, 0);
    k->fault = NULL;
    if (lost) return pass(k); /* no way to answer: let the runtime try */
    k->event_len = 0;
    return ask(k);
}

/* Is chaos on, after a look at the config when that is due? Nothing is read or kept while it is not. */
static bool is_on(void) {
    if (!layer.chaos) return false;
    chaosi_refresh_due(layer.chaos, CHAOSI_NEVER);
    return CHAOSI_LOAD(&layer.chaos->armed) != 0;
}

/* The head of the reply to invocation/next is there. False = the connection is over. */
static bool take_event(connection *k) {
    chaosi_span id = chaosi_field_value(&k->got.head, "lambda-runtime-aws-request-id"), body;
    chaos_lambda_event event;
    fault *f;
    k->asked = false;
    if (k->got.head.status != 200 || !chaosi_is_token(id) || id.len >= sizeof f->id) return true;
    settle(claim(id), 0); /* of an earlier attempt, whose result was not seen */
    if (!is_on()) return true;
    f = read_event(k, &body) ? (fault *)malloc(sizeof *f) : NULL;
    if (!f) return pass(k);
    chaosi_describe(&k->got, body, &event); /* nothing is read there before the event is dealt with */
    chaosi_copy(f->id, sizeof f->id, event.request_id);
    f->action = chaos_lambda_decide(layer.chaos, &event, f->body, sizeof f->body);
    f->start = chaosi_clock(false);
    k->fault = f;
    if (!f->action.run) return answer(k);
    k->fault = NULL;
    if (f->action.verdict.kind) keep(f);
    else free(f);
    return pass(k);
}

/* -- requests -- */
/* POST .../invocation/ID/response or error: its status, 200 or 500; 0 = something else. */
static int result_of(const chaosi_head *h, chaosi_span *id) {
    static const char front[] = "/2018-06-01/runtime/invocation/";
    size_t n = sizeof front - 1;
    const char *slash;
    chaosi_span rest;
    if (!chaosi_same(h->method, chaosi_str("POST")) || h->path.len < n || memcmp(h->path.at, front, n) != 0) return 0;
    rest = chaosi_of(h->path.at + n, h->path.len - n);
    slash = (const char *)memchr(rest.at, '/', rest.len);
    if (!slash) return 0;
    *id = chaosi_of(rest.at, (size_t)(slash - rest.at));
    rest = chaosi_of(slash, rest.len - id->len);
    return chaosi_same(rest, chaosi_str("/response")) ? 200 : chaosi_same(rest, chaosi_str("/error")) ? 500 : 0;
}

/* Reads the request's body and throws it away. False = the client is gone, or it is none. */
static bool swallow(connection *k) {
    static const char go_on[] = "HTTP/1.1 100 Continue\r\n\r\n";
    if (k->got.head.expects && !chaosi_send_all(k->client, go_on, sizeof go_on - 1, CHAOSI_NEVER)) return false;
    drop(&k->up, k->head_len);
    begin_body(k);
    for (;;) {
        if (in_body(k)) follow(k);
        drop(&k->up, k->up.cleared);
        if (!in_body(k)) return !k->tunnel;
        chaosi_poll(k->client, POLLIN, CHAOSI_NEVER);
        if (!pull(&k->up, k->client) || k->up.ended) return false;
    }
}

/* The runtime's result is thrown away, ours is posted; what upstream says to it goes to the runtime. */
static bool replace(connection *k) {
    const char *fields = k->got.head.keep_alive ? "" : "Connection: close\r\n";
    return swallow(k) && post(k, k->fault, fields);
}

/* A request's head is there. False = the connection is over. */
static bool take_request(connection *k) {
    const chaosi_head *h = &k->got.head;
    bool next = chaosi_same(h->method, chaosi_str("GET")) && chaosi_same(h->path, chaosi_str("/2018-06-01/runtime/invocation/next"));
    chaosi_span id;
    if (next && !h->chunked && !h->length && k->head_len <= CALL_MAX && !k->down.ended) { /* an event must not go to a dead end */
        k->call_len = k->head_len;
        memcpy(k->call, k->up.buf, k->call_len);
        drop(&k->up, k->call_len);
        if (!ask(k)) return false;
        pthread_once(&layer.opened, open_chaos);
        return true;
    }
    k->status = result_of(h, &id);
    if (k->status) k->fault = claim(id);
    if (k->fault && k->fault->action.replaced && chaosi_stays(layer.chaos)) return replace(k);
    begin_body(k);
    k->up.cleared = k->head_len;
    k->tunnel = h->tunnel;
    return true;
}

/* Is there a request's head to be looked at? Everything before it has gone on. */
static bool has_request(connection *k) {
    flow *up = &k->up;
    int r;
    if (in_body(k)) follow(k);
    if (k->fault && !in_body(k)) {
        settle(k->fault, k->status);
        k->fault = NULL;
    }
    if (k->tunnel || k->asked || in_body(k) || up->cleared || !up->len || k->down.len) return false;
    r = chaosi_http_request(&k->got.head, up->buf, up->len);
    if (r > 0) k->head_len = (size_t)r;
    if (r < 0 || (r == 0 && !has_room(up))) give_up(k);
    return r > 0;
}

/* Is there the head of a reply to invocation/next? What cannot be understood just passes. */
static bool has_event(connection *k) {
    int r;
    if (!k->asked) return false;
    r = k->down.len ? chaosi_http_reply(&k->got.head, k->down.buf, k->down.len) : 0;
    if (r > 0) k->head_len = (size_t)r;
    if (r < 0 || (r == 0 && (!has_room(&k->down) || k->up.ended))) k->asked = false;
    return r > 0;
}

/* Upstream has something. False = it has reset the connection. */
static bool hear_upstream(connection *k) {
    bool there = pull(&k->down, k->api);
    if ((there && !k->down.ended) || !k->asked || !k->stale || k->down.len) return there;
    hang_up(k); /* it was dead before we asked */
    k->down.ended = false;
    return ask(k);
}

static void watch(struct pollfd *p, int fd, const flow *from, const flow *to) {
    p->events = (short)((has_room(from) ? POLLIN : 0) | (to->cleared ? POLLOUT : 0));
    p->fd = p->events ? fd : -1; /* poll tells of a hang-up even if nobody wants to know */
    p->revents = 0;
}

/* One round of copying both ways. False = the connection is over. */
static bool turn(connection *k) {
    flow *up = &k->up, *down = &k->down;
    struct pollfd p[2];
    if (has_event(k)) return take_event(k);
    down->cleared = k->asked ? 0 : down->len;
    if (has_request(k)) return take_request(k);
    if (k->tunnel) up->cleared = up->len;
    if (up->cleared && k->api < 0 && !dial(k)) return false;
    if (!push(up, k->api)) { /* it takes no more; maybe it has said why */
        up->len = up->cleared = 0;
        up->ended = up->shut = k->lost = true;
    }
    if (!push(down, k->client)) return false;
    if (up->shut && (down->shut || k->api < 0)) {
        k->orderly = !k->lost;
        return false;
    }
    watch(&p[0], k->client, up, down);
    watch(&p[1], k->api, down, up);
    if (poll(p, 2, -1) < 0) return true;
    if (p[0].revents && has_room(up) && !pull(up, k->client)) return false;
    return !p[1].revents || !has_room(down) || hear_upstream(k);
}

static void *serve(void *arg) {
    connection *k = (connection *)arg;
    while (turn(k)) {}
    settle(k->fault, 0);
    if (!k->orderly) chaosi_make_reset(k->client);
    if (!k->orderly && k->api >= 0) chaosi_make_reset(k->api);
    close(k->client);
    hang_up(k);
    free(k->event);
    free(k);
    return NULL;
}

/* The child: a thread for each connection. Its end is the runtime's: the kernel sees to that. */
static void serve_all(int listener, pid_t runtime) {
#ifdef __linux__
    prctl(PR_SET_PDEATHSIG, SIGKILL);
#endif
    while (getppid() == runtime) { /* else it has ended before we could be told */
        int client = accept(listener, NULL, NULL), one = 1;
        connection *k = client < 0 ? NULL : (connection *)calloc(1, sizeof *k);
        pthread_t thread;
        if (!k) {
            if (client >= 0) close(client);
            chaosi_nap(10 * CHAOSI_MS); /* short of something: it may come */
            continue;
        }
        fcntl(client, F_SETFD, FD_CLOEXEC);
        setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        k->client = client;
        k->api = -1;
        while (!chaosi_thread(&thread, serve, k)) chaosi_nap(10 * CHAOSI_MS);
        pthread_detach(thread);
    }
    _exit(0);
}

/* -- before the runtime -- */
static bool address_of(const char *text, chaosi_address *out) {
    char host[64] = "", port[8] = "80";
    return chaosi_split_address(chaosi_str(text), true, host, sizeof host, port, sizeof port) && chaosi_numeric(host, port, out);
}

/* Afterwards the child serves, and the environment leads to it. Otherwise nothing has changed, and err says why. Connections
   are taken from listen() on, so nobody has to wait for the child. */
static chaos_result start(chaos_error *err) {
    const char *upstream = chaosi_env("CHAOS_LAYER_UPSTREAM"), *port = chaosi_env("CHAOS_LAYER_PORT");
    char here[64];
    chaosi_address own;
    struct sockaddr_in bound;
    socklen_t len = sizeof bound;
    pid_t runtime = getpid(), child;
    sigset_t all, old;
    int listener;
    layer.api = upstream ? upstream : chaosi_env("AWS_LAMBDA_RUNTIME_API");
    snprintf(here, sizeof here, "127.0.0.1:%.20s", port ? port : "0");
    if (!layer.api) return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "AWS_LAMBDA_RUNTIME_API is not set, this is not Lambda");
    if (!address_of(layer.api, &layer.upstream))
        return chaosi_fail(err, CHAOS_ERR_ADDRESS, "Runtime API %.60s: must be ADDR:PORT", layer.api);
    if (!address_of(here, &own)) return chaosi_fail(err, CHAOS_ERR_ADDRESS, "CHAOS_LAYER_PORT=%.20s: must be a port", port);
    listener = chaosi_listen(&own, 1024, here, err);
    if (listener < 0) return err->code;
    getsockname(listener, (struct sockaddr *)(void *)&bound, &len);
    snprintf(here, sizeof here, "127.0.0.1:%d", ntohs(bound.sin_port));
    if (memcmp(&bound, &layer.upstream.addr, sizeof bound) == 0) {
        close(listener);
        return chaosi_fail(err, CHAOS_ERR_ADDRESS, "Runtime API %.60s is the layer itself", layer.api);
    }
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old); /* Lambda's SIGTERM is for the runtime, which may still have to say something */
    child = fork();
    if (child == 0) serve_all(listener, runtime);
    if (child < 0) chaosi_fail(err, CHAOS_ERR_SYSTEM, "fork: %s", strerror(errno));
    else if (setenv("AWS_LAMBDA_RUNTIME_API", here, 1) != 0) chaosi_fail(err, CHAOS_ERR_MEMORY, "out of memory");
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    close(listener);
    return err->code;
}

int main(int argc, char **argv) {
    char *alone[] = {getenv("CHAOS_EXEC"), NULL}, **command = argc > 1 ? argv + 1 : alone;
    chaos_error err;
    chaosi_no_error(&err);
    if (!command[0] || !command[0][0]) {
        fprintf(stderr, "chaos-layer: nothing to start: no command, and CHAOS_EXEC is not set\n");
        return 127;
    }
    if (start(&err) != CHAOS_OK) fprintf(stderr, "chaos-layer: %s; %s starts without it\n", err.text, command[0]);
    execvp(command[0], command);
    fprintf(stderr, "chaos-layer: %s: %s\n", command[0], strerror(errno));
    return 127;
}

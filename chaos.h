/* chaos.h - v0.1.0 - fault injection in one C header - MIT-0 (the LICENSE file has the text; no attribution needed)

   In ONE C or C++ file, before any other include: #define CHAOS_IMPLEMENTATION, then #include "chaos.h"; a plain include
   everywhere else. Needs libc, POSIX sockets and threads (-pthread). Around each request of a threaded server:

       chaos_verdict v = chaos_decide(c, &request);              c = chaos_open(NULL, &err): reads $CHAOS_CONFIG, else off
       chaos_wait(c, &v);                                        the injected delay, if any; ends early when chaos goes off
       if (v.kind == CHAOS_STATUS) reply(v.status); else handle();

   >>manual. Chaos never outlives its order: off when the config is missing, invalid, expired or too old, and when told.

   Config: { "enabled": true, "latency": 200, "errorRate": 5, "errorStatus": 503 }   strict: an error is a config that is off
     enabled bool (false)               latency ms 0..900000 or {min,max} {mean,max} {p50,p95,p99,max}; below p50 linear from 0
     latencyRate, errorRate, canary     percent 0..100 (100, 0, 100)          errorStatus 200..599 (503)
     errorMode status reset close hang truncate corrupt                       errorWhen before|after     errorBody <= 1024 bytes
     retryAfter s 0..86400   bandwidth KiB/s   match {methods,paths,headers}  exclude [path globs] (health checks)
     instances [globs]   expiresAt RFC 3339 UTC, epoch s or "never"   maxFaults, maxConcurrent 0..4096 (0 = no limit)
     seed 0..2^53-1   dryRun bool   name, owner, note   rules [<= 16 of name, match, fault keys]   (guard: not yet)
     events [http direct async sqs stream] (http, direct): in Lambda, the sources whose invocations may be touched
     Rules inherit the top level's fault keys; the first whose match fits decides; with rules, no match passes. `*` in a path
     glob stops at '/', `**` does not; in header and instance globs both match anything. Paths over 1,024 bytes always pass.
     truncate cuts a body of known length at its half, another one in its first piece; corrupt inverts one byte in 64, from the
     first on. In-process only status and latency can be done; the rest is skipped, counted as `unsupported`, logged once.
   Decision: killed? enabled? expired, too old? instance, canary -> first matching rule -> error roll, else latency roll ->
     exclude -> (dry run) -> maxConcurrent, maxFaults. An error short-circuits the delay.
   Rolls: mix = the splitmix64 finaliser of x + 0x9e3779b97f4a7c15, hash = FNV-1a 64 over the bytes in order, all modulo 2^64:
     roll = mix((mix(seed ^ hash(rule name, none = 0)) ^ key) + purpose * 0xd1342543de82ef95) >> 32, purpose 1 error, 2 delay?,
     3 how long; it hits r percent when roll * 10000 >> 32 < r * 100. key = hash(request key), else mix(hash(instance) + n) for
     request n = 0, 1.. (threads count apart). Canary: mix(hash(instance)) >> 32, scaled to 0..99, below `canary` takes part.
   Sources: JSON text and env:NAME are read at open and have no lease; file:PATH, ssm:NAME[?region=R], appconfig:APP/ENV/PROFILE
     and the callback at each TTL (30 s off, 10 s on, 15 s by the aws-cli; jitter only shortens; failing: at most one fetch per
     TTL, backoff to 30 s), with a lease of 60 minutes from the last change. Not found = off, quietly. Invalid = off, loudly.
     Unreachable, denied or throttled = last good for max_stale (60 s), then off.
   ssm: GetParameter, decrypted, by the first way that is there: 1. in Lambda the Parameters and Secrets extension, plain HTTP to
     127.0.0.1:2773; 2. libcurl (CHAOS_WITH_CURL), with a region and with credentials from the environment, the container's
     endpoint or IMDSv2, as in AWS's SDKs (profiles and SSO are the aws-cli's); 3. the aws-cli, killed after 10 s. appconfig: its
     agent, plain HTTP to 127.0.0.1:2772. Variables: AWS_REGION, AWS_DEFAULT_REGION, AWS_ENDPOINT_URL_SSM, AWS_ENDPOINT_URL,
     AWS_IGNORE_CONFIGURED_ENDPOINT_URLS, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_CA_BUNDLE,
     AWS_CONTAINER_CREDENTIALS_RELATIVE_URI and _FULL_URI, AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE and _TOKEN,
     AWS_EC2_METADATA_DISABLED, AWS_EC2_METADATA_SERVICE_ENDPOINT, AWS_LAMBDA_RUNTIME_API (we are in Lambda),
     PARAMETERS_SECRETS_EXTENSION_HTTP_PORT, SSM_PARAMETER_STORE_TTL (its, for a warning), AWS_APPCONFIG_EXTENSION_HTTP_PORT.
   Lambda: http is API Gateway (REST, HTTP, WebSocket), Function URLs and ALB: an injected error is a reply of their shape. All
     others fail by /error, Function.ChaosInjected: direct = not recognised; async = SNS, S3, EventBridge, logs, other Records; sqs;
     stream = Kinesis, DynamoDB, Kafka, MQ, Firehose. Never touched: authorizers, CloudFormation's resources, macros and hooks,
     CodePipeline jobs, CodeDeploy hooks, Cognito triggers, AWS Config rules, rotations of secrets, events that are not JSON.
     CHAOS_EMF=1: a line of CloudWatch's Embedded Metric Format a fault, on stdout.
   Environment: CHAOS_CONFIG, CHAOS_DISABLE=1 (off, whatever else), CHAOS_INSTANCE or AWS_LAMBDA_LOG_STREAM_NAME or
     ECS_CONTAINER_METADATA_URI_V4 or the host name, CHAOS_SERVICE or AWS_LAMBDA_FUNCTION_NAME.
   Memory: one block in chaos_open (about 160 KB), one for each proxy run and worker; nothing on the way of a request.
   Threads: every call from any thread unless it says otherwise; ours run with all signals blocked. After fork, the child
     may call chaos_decide, chaos_wait, chaos_off and chaos_close; it has no refresher, and its chaos ends by time alone.
*/

/* ==== >>features ============================================================================================== */
/* Must stand before any system include: strict -std=c99 hides POSIX otherwise. Gnu modes are left as they are. */
#if defined(CHAOS_IMPLEMENTATION) && defined(__STRICT_ANSI__) && !defined(_POSIX_C_SOURCE) && !defined(_XOPEN_SOURCE) && \
    !defined(_GNU_SOURCE) && !defined(_WIN32) && !defined(__APPLE__)
#define _POSIX_C_SOURCE 200809L
#endif

#ifndef CHAOS_H
#define CHAOS_H

#include <stdbool.h>
#include <stddef.h>

/* ==== >>version =============================================================================================== */
#define CHAOS_VERSION_MAJOR  0
#define CHAOS_VERSION_MINOR  1
#define CHAOS_VERSION_PATCH  0
#define CHAOS_VERSION        "0.1.0"
#define CHAOS_VERSION_NUMBER (CHAOS_VERSION_MAJOR * 10000 + CHAOS_VERSION_MINOR * 100 + CHAOS_VERSION_PATCH)

/* ==== >>options =============================================================================================== */
/* Set these before the include, the same in every file (struct layouts never depend on them):
   CHAOS_STATIC       everything static to the including file          CHAOS_NO_PROXY    no chaos_proxy_run
   CHAOS_NO_LAMBDA    no chaos_lambda_run                               CHAOS_NO_SSM      no ssm: and appconfig: sources
   CHAOS_NO_NET       implies the three above, no sockets at all        CHAOS_NO_THREADS  no refresher thread, no proxy
   CHAOS_WITH_CURL    ssm: through libcurl, 7.86 or newer (-lcurl)      CHAOS_COMPILE_OUT typed no-ops for all calls on a handle */
#if (defined(CHAOS_NO_NET) || defined(CHAOS_NO_THREADS)) && !defined(CHAOS_NO_PROXY)
#define CHAOS_NO_PROXY
#endif
#if defined(CHAOS_NO_NET) && !defined(CHAOS_NO_SSM)
#define CHAOS_NO_SSM
#endif
#if defined(CHAOS_NO_NET) && !defined(CHAOS_NO_LAMBDA)
#define CHAOS_NO_LAMBDA
#endif

#ifdef CHAOS_STATIC
#define CHAOS_API static inline
#else
#define CHAOS_API extern
#endif

/* Declares one injection point: the real function, or with CHAOS_COMPILE_OUT a typed no-op from the same line. */
#ifdef CHAOS_COMPILE_OUT
#define CHAOS_POINT(type, name, params, ...) \
    static inline type name params { __VA_ARGS__; }
#else
#define CHAOS_POINT(type, name, params, ...) CHAOS_API type name params;
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* ==== >>result ================================================================================================ */
/* One list gives the codes and their texts. */
#define CHAOS_RESULTS(X)                                     \
    X(CHAOS_OK, "ok")                                        \
    X(CHAOS_ERR_ARGUMENT, "bad argument")                    \
    X(CHAOS_ERR_MEMORY, "out of memory")                     \
    X(CHAOS_ERR_SYSTEM, "a system call failed")              \
    X(CHAOS_ERR_JSON, "invalid JSON")                        \
    X(CHAOS_ERR_TOO_LARGE, "too large")                      \
    X(CHAOS_ERR_UNKNOWN_KEY, "unknown key")                  \
    X(CHAOS_ERR_DUPLICATE_KEY, "duplicate key")              \
    X(CHAOS_ERR_MISSING_KEY, "missing key")                  \
    X(CHAOS_ERR_TYPE, "wrong type")                          \
    X(CHAOS_ERR_RANGE, "value out of range")                 \
    X(CHAOS_ERR_VALUE, "bad value")                          \
    X(CHAOS_ERR_UNSUPPORTED, "not in this version or build") \
    X(CHAOS_ERR_NOT_FOUND, "config not found")               \
    X(CHAOS_ERR_UNREACHABLE, "unreachable")                  \
    X(CHAOS_ERR_DENIED, "access denied")                     \
    X(CHAOS_ERR_THROTTLED, "throttled")                      \
    X(CHAOS_ERR_ADDRESS, "bad address")                      \
    X(CHAOS_ERR_COMPILED_OUT, "compiled out")

#define CHAOS_CODE(code, text) code,
typedef enum chaos_result { CHAOS_RESULTS(CHAOS_CODE) CHAOS_RESULT_COUNT } chaos_result;

/* What went wrong, and where. line and column count from 1, columns in characters; line 0 = not about a text. */
typedef struct chaos_error {
    chaos_result code;
    size_t offset; /* byte offset in the text */
    unsigned line, column;
    char text[200]; /* names the key or the failing call; always NUL-terminated */
} chaos_error;

/* The library's version, to compare with CHAOS_VERSION. Any thread. */
CHAOS_API const char *chaos_version(void);
/* A short text for a code; never NULL. Any thread. */
CHAOS_API const char *chaos_result_text(chaos_result code);

/* ==== >>config ================================================================================================ */
#define CHAOS_CONFIG_INPUT_MAX 65536 /* bytes of JSON text */
#define CHAOS_MAX_RULES        16
#define CHAOS_MAX_ITEMS        512   /* strings in all lists of one config */
#define CHAOS_MAX_TEXT         11264 /* bytes of all strings of one config */
#define CHAOS_MAX_CONCURRENT   4096  /* upper bound of maxConcurrent */

typedef enum chaos_latency { CHAOS_LATENCY_FIXED, CHAOS_LATENCY_UNIFORM, CHAOS_LATENCY_EXPONENTIAL, CHAOS_LATENCY_QUANTILES } chaos_latency;

/* What happens to one request. The error kinds stand in the order of the errorMode names. */
typedef enum chaos_kind {
    CHAOS_PASS,
    CHAOS_DELAY,    /* wait, then go on; `bandwidth` may be set too */
    CHAOS_PACE,     /* no delay, but a paced reply body */
    CHAOS_STATUS,   /* answer with an HTTP status */
    CHAOS_RESET,    /* TCP RST */
    CHAOS_CLOSE,    /* close without a reply */
    CHAOS_HANG,     /* no reply until the client goes, chaos goes off, or a cap */
    CHAOS_TRUNCATE, /* the real reply, cut */
    CHAOS_CORRUPT,  /* the real reply, bytes changed */
    CHAOS_KIND_COUNT
} chaos_kind;

typedef struct chaos_text {
    unsigned short at, len; /* bytes in chaos_config.text, followed by a NUL */
} chaos_text;

typedef struct chaos_list {
    unsigned short first, count; /* strings in chaos_config.items */
} chaos_list;

typedef struct chaos_match {
    chaos_list methods, paths, headers; /* headers: pairs of name and glob */
} chaos_match;

/* The fault keys, as they stand at the top level and in each rule (rules inherit from the top level when parsed). */
typedef struct chaos_fault {
    unsigned char latency_kind;             /* chaos_latency */
    unsigned char latency_rate, error_rate; /* percent 0..100 */
    unsigned char error_mode;               /* chaos_kind, CHAOS_STATUS..CHAOS_CORRUPT */
    unsigned char error_after, unused;      /* 1 = errorWhen "after" */
    unsigned short error_status;            /* 200..599 */
    unsigned latency[4];                    /* ms: {fixed} {min,max} {mean,max} {p50,p95,p99,max} */
    unsigned bandwidth;                     /* KiB/s, 0 = off */
    int retry_after;                        /* s, -1 = no header */
    chaos_text error_body;                  /* len 0 = the short default text */
} chaos_fault;

typedef struct chaos_rule {
    chaos_text name;
    chaos_match match;
    chaos_fault fault;
} chaos_rule;

/* A parsed config: plain data, no pointers, freely copied. About 15 KiB: keep it off small stacks. */
typedef struct chaos_config {
    bool enabled, dry_run, has_seed;
    bool default_exclude; /* "exclude" not given: the built-in list applies */
    unsigned char canary; /* percent 0..100 */
    unsigned char rule_count;
    unsigned char events; /* Lambda: which sources may be failed; bits in the order http, direct, async, sqs, stream */
    unsigned short item_count, text_len;
    unsigned max_faults, max_concurrent; /* 0 = no limit */
    long long expires_ms;                /* Unix epoch; 0 = not given (lease), -1 = "never" */
    unsigned long long seed;
    chaos_fault fault;
    chaos_match match;
    chaos_list exclude, instances;
    chaos_text name, owner, note;
    chaos_rule rules[CHAOS_MAX_RULES];
    chaos_text items[CHAOS_MAX_ITEMS];
    char text[CHAOS_MAX_TEXT];
} chaos_config;

/* Validates text[0..len) against RFC 8259, at most 64 levels deep: CHAOS_OK or CHAOS_ERR_JSON. err may be NULL. Any thread. */
CHAOS_API chaos_result chaos_json_check(const char *text, size_t len, chaos_error *err);
/* Parses a config. On an error *out is one that is off, and err (may be NULL) names key and place. Any thread; no allocation. */
CHAOS_API chaos_result chaos_config_parse(chaos_config *out, const char *json, size_t len, chaos_error *err);
/* Writes the canonical JSON of cfg: `enabled` first, then what differs from the defaults; parsing it gives an equal
   config. Returns the length without the NUL; when it is >= cap the text was cut. Any thread; no allocation. */
CHAOS_API size_t chaos_config_format(const chaos_config *cfg, char *buf, size_t cap);

/* ==== >>verdict =============================================================================================== */
/* One request, as the caller knows it. Borrowed for the call. A length of 0 means NUL-terminated; NULL = not known. */
typedef struct chaos_request {
    const char *method;
    size_t method_len;
    const char *path; /* as on the wire: percent-encoded, with or without a query */
    size_t path_len;
    const char *key; /* same key, same verdict on every instance; NULL = each request rolls afresh */
    size_t key_len;
    const char *(*header)(void *user, const char *name, size_t *len); /* value of a header, or NULL; name is lower case */
    void *user;
    const char *id;          /* a request id for the log line of its fault, NULL = none */
    unsigned delay_limit_us; /* a longer delay is cut to this (and counted as skipped), 0 = no limit */
} chaos_request;

/* The decision on one request: plain data, 32 bytes. All zero = pass, untouched. */
typedef struct chaos_verdict {
    unsigned char kind;  /* chaos_kind */
    unsigned char after; /* 1 = run the handler first, then replace its reply */
    unsigned short status;
    unsigned delay_us;
    unsigned short rule, roll; /* 0 = top level, n = rules[n - 1]; 0..9999: the error roll, compared with errorRate * 100 */
    unsigned bandwidth;        /* KiB/s of the reply body, 0 = not paced */
    unsigned version, ticket;  /* of the config, cut to 32 bits; the library's own: the maxConcurrent place taken */
    unsigned long long key;    /* the key that was rolled: chaos_judge(cfg, req, key) repeats the decision */
} chaos_verdict;

/* The pure decision: match, rules, rolls, exclude. No gates (expiry, canary, kill) and no budgets: those belong to
   chaos_decide. Same cfg, req and key give the same verdict on every machine. cfg->enabled false = pass. Any thread. */
CHAOS_API chaos_verdict chaos_judge(const chaos_config *cfg, const chaos_request *req, unsigned long long key);
/* The name of a kind, as in logs and in X-Chaos-Injected: "pass", "latency", "bandwidth", "error", "reset", ... Any thread. */
CHAOS_API const char *chaos_kind_text(int kind);

/* ==== >>handle ================================================================================================ */
typedef struct chaos chaos; /* opaque; every call accepts NULL and then behaves as off */

#define CHAOS_STATES(X)                     \
    X(CHAOS_STATE_OFF, "off")               \
    X(CHAOS_STATE_ON, "on")                 \
    X(CHAOS_STATE_EXPIRED, "expired")       \
    X(CHAOS_STATE_INVALID, "invalid")       \
    X(CHAOS_STATE_STALE, "stale")           \
    X(CHAOS_STATE_KILLED, "killed")         \
    X(CHAOS_STATE_NOT_CANARY, "not-canary") \
    X(CHAOS_STATE_DRY_RUN, "dry-run")

typedef enum chaos_state { CHAOS_STATES(CHAOS_CODE) CHAOS_STATE_COUNT } chaos_state;
#undef CHAOS_CODE

/* A snapshot of the counters and the state. Counters run from chaos_open and only grow. */
typedef struct chaos_report {
    chaos_state state;
    char reason[200];           /* why this state, in words */
    char problem[200];          /* what the last fetch or parse said; "" = nothing */
    char way[12];               /* ssm: extension, curl or cli; appconfig: agent; "" = not asked yet, or a source with one way */
    unsigned long long version; /* of the config in use; 0 = none yet */
    long long age_ms;           /* since the last successful fetch; -1 = never or not fetched (inline, env) */
    long long end_ms;           /* Unix epoch at which chaos ends; 0 = no end */
    unsigned long long fetches, fetch_errors, config_errors, config_changes;
    unsigned long long waiting;         /* in chaos_wait at this moment */
    unsigned long long connections_now; /* proxy: open at this moment */
    unsigned long long log_suppressed;  /* faults without a log line of their own (over 50 a second) */
    /* Kept by each thread and summed here, in this order: */
    unsigned long long requests;                   /* decided while on (or dry-run); when off nothing is counted */
    unsigned long long injected[CHAOS_KIND_COUNT]; /* per kind; [CHAOS_PASS] stays 0 */
    unsigned long long would_inject, excluded;     /* spared by a dry run; by `exclude` */
    unsigned long long over_budget, unsupported;   /* spared by maxFaults or maxConcurrent; because this mode cannot do it */
    unsigned long long delay_ms;                   /* time spent in injected delays, as waited */
    unsigned long long outcomes[6], outcome_us;    /* real outcomes: other, 1xx .. 5xx; their summed durations */
    unsigned long long log_lines, log_dropped;     /* dropped: the pipe was full or dead */
    unsigned long long connections, proxied;       /* proxy: accepted; replies relayed from the upstream */
    unsigned long long rejected;                   /* proxy: own 4xx */
    unsigned long long skipped;                    /* proxy: of the injected, came to nothing: no body to damage, or off by then */
    unsigned long long capped_ms;                  /* proxy: time in which max_connections set the pace, not the fault */
    unsigned long long upstream_errors;            /* proxy: own 502, 504 and cut replies */
} chaos_report;

typedef enum chaos_event_kind { CHAOS_EVENT_STATE, CHAOS_EVENT_CONFIG, CHAOS_EVENT_FAULT, CHAOS_EVENT_NOTE } chaos_event_kind;

/* Told on the thread where it happens (FAULT: chaos_decide's); must not block, nor call more than chaos_off and chaos_stats. */
typedef struct chaos_event {
    chaos_event_kind kind;
    chaos_state state;
    const char *reason;           /* STATE, CONFIG, NOTE; else "" */
    const chaos_verdict *verdict; /* FAULT (also in a dry run), else NULL */
    bool dry_run;
} chaos_event;

typedef enum chaos_fault_log { CHAOS_LOG_ALL, CHAOS_LOG_SAMPLE, CHAOS_LOG_NONE } chaos_fault_log;

/* What a fetch callback tells besides the bytes. */
typedef struct chaos_fetched {
    size_t len;
    unsigned long long version; /* 0 = the library counts contents itself */
    long long modified_ms;      /* Unix epoch of the last change, 0 = when first seen; the lease runs from here */
} chaos_fetched;

/* All zero = sane defaults. Strings are copied. */
typedef struct chaos_desc {
    const char *config;        /* a source, as in the manual, or JSON text; NULL = $CHAOS_CONFIG, else off */
    const char *instance;      /* NULL = $CHAOS_INSTANCE, the Lambda log stream, the ECS task, the host name; cut to 127 bytes */
    const char *service;       /* NULL = $CHAOS_SERVICE, the function name, ""; cut to 127 bytes */
    int ttl_ms;                /* 0 = 30,000 while off, 10,000 while on; else both; 10..86,400,000 */
    int max_stale_ms;          /* 0 = 60,000; last good config is used this long beyond its TTL; -1 = not at all */
    chaos_fault_log fault_log; /* fault lines: all (50 a second, then summarised), sample (1 a second), none */
    bool quiet;                /* no log lines at all */
    bool no_thread;            /* no refresher: the program calls chaos_refresh itself */
    /* Callback source, used instead of `config`: put at most cap bytes into buf. CHAOS_OK, CHAOS_ERR_NOT_FOUND (off,
       quietly), anything else = unreachable. Called by one thread at a time, never from chaos_open. */
    chaos_result (*fetch)(void *user, char *buf, size_t cap, chaos_fetched *out, chaos_error *err);
    void *fetch_user;
    void (*log)(void *user, const char *line, size_t len); /* one JSON line with its newline; NULL = stderr, never blocking */
    void *log_user;
    void (*event)(void *user, const chaos_event *event);
    void *event_user;
    unsigned long long (*clock)(void *user, bool wall); /* ns, monotonic or Unix epoch; NULL = the system's; for tests */
    void *clock_user;
    void *(*alloc)(void *user, size_t size); /* both or neither; called in chaos_open, chaos_close, chaos_proxy_run */
    void (*free)(void *user, void *ptr);
    void *alloc_user;
} chaos_desc;

/* Opens a handle. inline, env: and file: are read before it returns; anything slower is left to the refresher thread,
   so it never waits for a network. A bad config TEXT does not fail: the handle is off, state `invalid`. NULL only for a
   source of unknown form, a desc out of range, no memory, or a failing system call (err says which). desc may be NULL. */
CHAOS_POINT(chaos *, chaos_open, (const chaos_desc *desc, chaos_error *err), (void)desc; (void)err; return (chaos *)(size_t) "off")
/* Off, wakes every waiter, waits until no chaos_wait is inside, stops the refresher, frees. No other call during or after it. */
CHAOS_POINT(void, chaos_close, (chaos * c), (void)c)
/* The verdict on one request. Never sleeps, never blocks, never allocates. Off: a load and a branch. Any thread. */
CHAOS_POINT(chaos_verdict, chaos_decide, (chaos * c, const chaos_request *req), chaos_verdict v = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0}; (void)c;
            (void)req; return v)
/* Sleeps v's delay, or until chaos goes off (within 100 ms). Event loops use their own timer and chaos_wake_fd. Any thread. */
CHAOS_POINT(void, chaos_wait, (chaos * c, const chaos_verdict *v), (void)c; (void)v)
/* Tells the real outcome of a request: status (0 = none) and duration. Gives back the maxConcurrent place of v; a missing
   or repeated call can only weaken chaos. Any thread. */
CHAOS_POINT(void, chaos_done, (chaos * c, const chaos_verdict *v, int status, unsigned long long us), (void)c; (void)v; (void)status;
            (void)us)
/* Copies the body of v's injected reply, NUL-terminated; returns its length (cut when >= cap). Any thread. */
CHAOS_POINT(size_t, chaos_verdict_body, (chaos * c, const chaos_verdict *v, char *buf, size_t cap), (void)c; (void)v; if (cap) buf[0] = 0;
            return 0)
/* Retry-After seconds of v's injected reply, -1 = none. Any thread. */
CHAOS_POINT(int, chaos_verdict_retry_after, (chaos * c, const chaos_verdict *v), (void)c; (void)v; return -1)
/* Readable exactly while the state is not on (nor dry-run), for event loops that hold delays; do not read it. -1 = none. Any thread. */
CHAOS_POINT(int, chaos_wake_fd, (chaos * c), (void)c; return -1)
/* Fetches the config now, even within its TTL, and applies it; may block as long as the source does. Any thread. */
CHAOS_POINT(chaos_result, chaos_refresh, (chaos * c, chaos_error *err), (void)c; (void)err; return CHAOS_ERR_COMPILED_OUT)
/* The local kill switch, latched until chaos_close. Async-signal-safe. Any thread. */
CHAOS_POINT(void, chaos_off, (chaos * c), (void)c)
/* Reads state and counters. Any thread. */
CHAOS_POINT(void, chaos_stats, (chaos * c, chaos_report *out), (void)c; unsigned char *p = (unsigned char *)out; size_t i;
            for (i = 0; i < sizeof *out; i++) p[i] = 0)
/* Writes state and counters as Prometheus text (version 0.0.4, UTF-8), about 5 KB. Returns the length without the NUL; when it
   is >= cap the text was cut. Any thread. */
CHAOS_POINT(size_t, chaos_metrics, (chaos * c, char *buf, size_t cap), (void)c; if (cap) buf[0] = 0; return 0)
/* Copies the config in use; false = none. Any thread. */
CHAOS_POINT(bool, chaos_get_config, (chaos * c, chaos_config *out), (void)c; (void)out; return false)
/* The name of a state, as in logs. Any thread. */
CHAOS_API const char *chaos_state_text(chaos_state state);
/* The sources this build can read, with the ways to ssm:, as in the log. Any thread. */
CHAOS_API const char *chaos_sources(void);

/* ==== >>proxy ================================================================================================= */
/* All zero = defaults; times in ms. Strings must outlive the run. */
typedef struct chaos_proxy_desc {
    const char *listen;      /* HOST:PORT, [V6]:PORT, :PORT or PORT; no host = 127.0.0.1; NULL = 127.0.0.1:0 */
    const char *upstream;    /* http://HOST[:PORT][/PREFIX]; required */
    const char *host_header; /* NULL = keep the client's Host; else send this one */
    const char *key_header;  /* NULL = roll afresh; else this header's value is the key */
    int max_connections;     /* 0 = 1,024; clamped to what the descriptor limit carries; more wait in the backlog */
    int head_limit;          /* bytes, 0 = 16,384; 1,024..65,536 */
    int head_timeout;        /* from a head's first byte to its last, 0 = 10,000 */
    int body_timeout;        /* without progress, 0 = 30,000 */
    int idle_timeout;        /* between requests, and of a tunnel (Upgrade), 0 = 60,000 */
    int connect_timeout;     /* 0 = 5,000 */
    int reply_timeout;       /* from the request's end to the reply's head, 0 = 60,000 */
    int drain_timeout;       /* after a stop, 0 = 10,000; -1 = at once */
    void (*listening)(void *user, const char *address); /* ADDR:PORT, once, before the first accept */
    void *user;
} chaos_proxy_desc;

/* Runs the proxy until chaos_proxy_stop; returns when its last thread is gone (a look-up of the upstream's name that is in
   progress then is waited for). One run per handle at a time. */
CHAOS_POINT(chaos_result, chaos_proxy_run, (chaos * c, const chaos_proxy_desc *desc, chaos_error *err), (void)c; (void)desc; (void)err;
            return CHAOS_ERR_COMPILED_OUT)
/* Stops accepting; kept connections end with their next reply, or within a second; requests in progress end within
   drain_timeout. Latched: a stop before the run ends that run at once. Async-signal-safe. Any thread. */
CHAOS_POINT(void, chaos_proxy_stop, (chaos * c), (void)c)

/* ==== >>lambda ================================================================================================ */
/* One invocation. Strings are NUL-terminated, "" = not there; all of it is valid until the handler returns. */
typedef struct chaos_lambda_event {
    const char *body; /* the event as it came, usually JSON */
    size_t len;
    long long deadline_ms; /* Unix epoch, 0 = not known */
    const char *request_id, *trace_id, *function_arn, *client_context, *cognito_identity, *content_type;
} chaos_lambda_event;

typedef struct chaos_lambda_reply chaos_lambda_reply;
/* Answers by chaos_lambda_write; not 0 = the invocation failed. */
typedef int (*chaos_lambda_handler)(void *user, const chaos_lambda_event *event, chaos_lambda_reply *reply);

/* All zero = defaults. */
typedef struct chaos_lambda_desc {
    const char *api;                 /* ADDR:PORT, numeric; NULL = $AWS_LAMBDA_RUNTIME_API */
    int loops;                       /* in parallel; 0 = $AWS_LAMBDA_MAX_CONCURRENCY, else 1; at most 64 */
    const char *(*init)(void *user); /* before the first event; says why it failed, NULL = it did not */
} chaos_lambda_desc;

/* Runs a function as a custom runtime (provided.al2023): takes events, injects, calls the handler 0 or 1 times for each, posts
   its reply. Returns when the Runtime API is lost, refuses, or answers 500. The handle is opened with no_thread: the config is
   read inside invocations, when its TTL is over, within 250 ms. With one loop _X_AMZN_TRACE_ID is set for each event. */
CHAOS_POINT(chaos_result, chaos_lambda_run,
            (chaos * c, chaos_lambda_handler fn, void *user, const chaos_lambda_desc *desc, chaos_error *err), (void)c;
            (void)fn; (void)user; (void)desc; (void)err; return CHAOS_ERR_COMPILED_OUT)
/* For the handler, on its thread. Appends to the reply, at most 6 MiB and 100 bytes; in a stream it is sent at once. */
CHAOS_POINT(chaos_result, chaos_lambda_write, (chaos_lambda_reply * reply, const void *data, size_t len), (void)reply; (void)data;
            (void)len; return CHAOS_ERR_COMPILED_OUT)
/* For the handler, before it writes: the reply is streamed. type NULL = application/octet-stream; prelude: {"statusCode":..,
   "headers":{..},"cookies":[..]} of an HTTP reply, NULL = none. */
CHAOS_POINT(chaos_result, chaos_lambda_stream, (chaos_lambda_reply * reply, const char *type, const char *prelude), (void)reply; (void)type;
            (void)prelude; return CHAOS_ERR_COMPILED_OUT)
/* For the handler: the invocation fails with this type ("Function.Word") and message; in a stream, in its trailers. */
CHAOS_POINT(void, chaos_lambda_fail, (chaos_lambda_reply * reply, const char *type, const char *message), (void)reply; (void)type;
            (void)message)

/* What happens to an invocation, for runtimes of one's own and for the layer. */
typedef struct chaos_lambda_action {
    chaos_verdict verdict; /* give it to chaos_done when the invocation is over */
    bool run;              /* the handler runs */
    bool replaced;         /* what is in buf is posted in the place of its reply: */
    bool failed;           /* to /error with type Function.ChaosInjected, else to /response */
    size_t len;
} chaos_lambda_action;

/* Refreshes the config when that is due, decides, waits the delay (at most to 500 ms before the deadline), writes an injected
   reply in the shape the event's source expects into buf (8,192 bytes are enough). Any thread. */
CHAOS_POINT(chaos_lambda_action, chaos_lambda_decide, (chaos * c, const chaos_lambda_event *event, char *buf, size_t cap),
            chaos_lambda_action a = {{0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, true, false, false, 0};
            (void)c; (void)event; (void)buf; (void)cap; return a)
/* ==== >>ssm =================================================================================================== */
/* A parameter of AWS SSM Parameter Store. All zero but for the name = what the environment says. */
typedef struct chaos_ssm_desc {
    const char *name;     /* get: or its ARN */
    const char *region;   /* NULL = $AWS_REGION, $AWS_DEFAULT_REGION, else what the profile of the aws-cli says */
    const char *endpoint; /* a URL; NULL = $AWS_ENDPOINT_URL_SSM, $AWS_ENDPOINT_URL, else AWS's own */
    const char *type;     /* put: "String" or "SecureString"; NULL = as it is stored, String for a new one */
    int timeout_ms;       /* for each way that is tried, 0 = 10,000; 100..600,000 */
} chaos_ssm_desc;

typedef struct chaos_ssm_value {
    size_t len;                 /* get, list: bytes in buf; there is a NUL behind them */
    unsigned long long version; /* get: of what was read; put: of what was written */
    long long modified_ms;      /* get: Unix epoch, 0 = not known */
    char type[16], way[12];     /* get: String, SecureString; extension, curl or cli */
} chaos_ssm_value;

/* Reads a parameter, decrypted: the text goes to buf, the rest to *out. buf serves for the whole answer, so cap should be
   CHAOS_SSM_BUFFER. CHAOS_OK, or CHAOS_ERR_NOT_FOUND, _DENIED, _THROTTLED, _TOO_LARGE, _VALUE (the request is refused as
   wrong), _UNREACHABLE (all else) with the reason in err (may be NULL). By AWS's extension where it is (get, in Lambda), by
   libcurl when built in and credentials and region are there, else by the aws-cli. Blocks for up to the time-out. Any thread. */
#define CHAOS_SSM_BUFFER 65536
CHAOS_POINT(chaos_result, chaos_ssm_get, (const chaos_ssm_desc *d, char *buf, size_t cap, chaos_ssm_value *out, chaos_error *err), (void)d;
            (void)buf; (void)cap; (void)out; (void)err; return CHAOS_ERR_COMPILED_OUT)
/* Writes a parameter, new or not; it is not validated here. Results and blocking as above. Any thread. */
CHAOS_POINT(chaos_result, chaos_ssm_put, (const chaos_ssm_desc *d, const char *text, size_t len, chaos_ssm_value *out, chaos_error *err),
            (void)d;
            (void)text; (void)len; (void)out; (void)err; return CHAOS_ERR_COMPILED_OUT)
/* Lists the names of all parameters below the path d->name ("/prefix/"), one a line, into buf. Results as above; TOO_LARGE:
   they do not fit. Any thread. */
CHAOS_POINT(chaos_result, chaos_ssm_list, (const chaos_ssm_desc *d, char *buf, size_t cap, chaos_ssm_value *out, chaos_error *err), (void)d;
            (void)buf; (void)cap; (void)out; (void)err; return CHAOS_ERR_COMPILED_OUT)

#ifdef __cplusplus
}
#endif
#endif /* CHAOS_H */

/* Stop here if you only want the API. */

#ifdef CHAOS_IMPLEMENTATION
#ifndef CHAOS_IMPLEMENTATION_ONCE
#define CHAOS_IMPLEMENTATION_ONCE

/* ==== >>platform ============================================================================================== */
#include <errno.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#if !defined(CHAOS_NO_NET)
#error "chaos.h: sockets need POSIX: add  #define CHAOS_NO_NET  before the include"
#endif
#else
#define CHAOSI_POSIX
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>
#ifndef CLOCK_MONOTONIC
#error "chaos.h: POSIX is hidden: include chaos.h before any other header, or compile with -D_POSIX_C_SOURCE=200809L"
#endif
#endif

#if defined(CHAOSI_POSIX) && !defined(CHAOS_NO_THREADS)
#define CHAOSI_THREADS
#endif

#ifndef CHAOS_NO_NET
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>
#if defined(__linux__) && !defined(CHAOSI_NO_EPOLL)
#define CHAOSI_EPOLL
#include <sys/epoll.h>
#endif
#ifdef __linux__
#include <sys/prctl.h>
#endif
#ifdef __GLIBC__
#include <malloc.h>
#endif
#endif

#ifndef CHAOS_NO_SSM
#include <dirent.h>
#include <spawn.h>
#include <sys/wait.h>
#ifdef CHAOS_WITH_CURL
#include <curl/curl.h>
#if LIBCURL_VERSION_NUM < 0x075600
#error "chaos.h: CHAOS_WITH_CURL needs libcurl 7.86 or newer: older ones leave the session token unsigned"
#endif
#endif
#endif

#if defined(__GNUC__) || defined(__clang__)
#define CHAOSI_FN                static __attribute__((unused))
#define CHAOSI_HOT               static inline __attribute__((unused, always_inline))
#define CHAOSI_COLD              static __attribute__((unused, noinline, cold))
#define CHAOSI_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#define CHAOSI_UNLIKELY(x)       __builtin_expect(!!(x), 0)
#else
#define CHAOSI_FN   static
#define CHAOSI_HOT  static
#define CHAOSI_COLD static
#define CHAOSI_PRINTF(fmt, args)
#define CHAOSI_UNLIKELY(x) (x)
#endif

typedef unsigned char chaosi_u8;
typedef uint16_t chaosi_u16;
typedef uint32_t chaosi_u32;
typedef uint64_t chaosi_u64;

/* ==== >>base ================================================================================================== */
#define CHAOSI_MS    ((chaosi_u64)1000000) /* ns */
#define CHAOSI_NEVER UINT64_MAX

/* GNU builtins where there are any (<stdatomic.h> is not C++); without them (tcc) only the single-threaded library builds. */
#if defined(__GNUC__) || defined(__clang__)
#define CHAOSI_LOAD(p)        __atomic_load_n((p), __ATOMIC_RELAXED)
#define CHAOSI_ACQUIRE(p)     __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define CHAOSI_STORE(p, v)    __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define CHAOSI_RELEASE(p, v)  __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define CHAOSI_ORDERED(p, v)  __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
#define CHAOSI_ADD(p, v)      __atomic_fetch_add((p), (v), __ATOMIC_RELAXED)
#define CHAOSI_ENTER(p, v)    __atomic_fetch_add((p), (v), __ATOMIC_SEQ_CST)
#define CHAOSI_SWAP(p, v)     __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
#define CHAOSI_CAS(p, old, v) __atomic_compare_exchange_n((p), (old), (v), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
#define CHAOSI_SEQ(p)         __atomic_load_n((p), __ATOMIC_SEQ_CST)
#elif defined(CHAOS_NO_THREADS)
#define CHAOSI_LOAD(p)        (*(p))
#define CHAOSI_ACQUIRE(p)     (*(p))
#define CHAOSI_STORE(p, v)    ((void)(*(p) = (v)))
#define CHAOSI_RELEASE(p, v)  ((void)(*(p) = (v)))
#define CHAOSI_ORDERED(p, v)  ((void)(*(p) = (v)))
#define CHAOSI_ADD(p, v)      ((*(p) += (v)) - (v))
#define CHAOSI_ENTER(p, v)    ((*(p) += (v)) - (v))
#define CHAOSI_SWAP(p, v)     chaosi_swap((p), (v))
#define CHAOSI_CAS(p, old, v) (*(p) == *(old) ? (*(p) = (v), true) : (*(old) = *(p), false))
#define CHAOSI_SEQ(p)         (*(p))
CHAOSI_FN chaosi_u32 chaosi_swap(chaosi_u32 *p, chaosi_u32 v) {
    chaosi_u32 old = *p;
    *p = v;
    return old;
}
#else
#error "chaos.h: this compiler has no __atomic builtins: add  #define CHAOS_NO_THREADS  before the include"
#endif

typedef struct chaosi_span {
    const char *at;
    size_t len;
} chaosi_span;

CHAOSI_FN chaosi_span chaosi_of(const char *at, size_t len) {
    chaosi_span s = {at, len};
    return s;
}

CHAOSI_FN chaosi_span chaosi_str(const char *text) { return chaosi_of(text, strlen(text)); }
CHAOSI_FN bool chaosi_same(chaosi_span a, chaosi_span b) { return a.len == b.len && (a.len == 0 || memcmp(a.at, b.at, a.len) == 0); }
CHAOSI_FN bool chaosi_is_digit(char c) { return c >= '0' && c <= '9'; }
CHAOSI_FN char chaosi_lower(char c) { return c >= 'A' && c <= 'Z' ? (char)(c + ('a' - 'A')) : c; }

CHAOSI_FN bool chaosi_same_nocase(chaosi_span a, chaosi_span b) {
    size_t i = 0;
    while (i < a.len && i < b.len && chaosi_lower(a.at[i]) == chaosi_lower(b.at[i])) i++;
    return i == a.len && i == b.len;
}

/* Value of a hex digit, -1 = none. */
CHAOSI_FN int chaosi_hex(char c) {
    if (chaosi_is_digit(c)) return c - '0';
    c = chaosi_lower(c);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

/* A bounded text buffer that keeps counting past its end, as snprintf does. */
typedef struct chaosi_out {
    char *buf;
    size_t cap, len;
    char last; /* the last byte put */
} chaosi_out;

CHAOSI_FN chaosi_out chaosi_into(char *buf, size_t cap) {
    chaosi_out o = {buf, cap, 0, 0};
    if (cap) buf[0] = 0;
    return o;
}

CHAOSI_FN void chaosi_put(chaosi_out *o, const char *at, size_t len) {
    size_t room = o->len + 1 < o->cap ? o->cap - o->len - 1 : 0, n = len < room ? len : room;
    if (len) o->last = at[len - 1];
    if (n) memcpy(o->buf + o->len, at, n);
    if (n) o->buf[o->len + n] = 0;
    o->len += len;
}

CHAOSI_FN void chaosi_puts(chaosi_out *o, const char *text) { chaosi_put(o, text, strlen(text)); }

CHAOSI_FN void chaosi_put_int(chaosi_out *o, long long v) {
    char digits[24];
    chaosi_put(o, digits, (size_t)snprintf(digits, sizeof digits, "%lld", v));
}

/* Copies a C string, cut to fit. */
CHAOSI_FN void chaosi_copy(char *to, size_t cap, const char *from) {
    chaosi_out o = chaosi_into(to, cap);
    chaosi_puts(&o, from ? from : "");
}

CHAOSI_FN void chaosi_no_error(chaos_error *err) {
    if (err) memset(err, 0, sizeof *err);
}

/* Fills *err (may be NULL) and returns the code, so that callers can `return chaosi_fail(...)`. */
CHAOSI_FN CHAOSI_PRINTF(3, 4) chaos_result chaosi_fail(chaos_error *err, chaos_result code, const char *fmt, ...) {
    va_list args;
    if (!err) return code;
    chaosi_no_error(err);
    err->code = code;
    va_start(args, fmt);
    vsnprintf(err->text, sizeof err->text, fmt, args);
    va_end(args);
    return code;
}

#define CHAOSI_TEXT(code, text) text,
static const char *const chaosi_result_texts[] = {CHAOS_RESULTS(CHAOSI_TEXT)};
static const char *const chaosi_state_texts[] = {CHAOS_STATES(CHAOSI_TEXT)};
static const char *const chaosi_kind_texts[] = {"pass", "latency", "bandwidth", "error", "reset", "close", "hang", "truncate", "corrupt"};

/* Names and keys: FNV-1a 64. Numbers: the splitmix64 finaliser. Plain arithmetic on 64 bits, so byte order never shows. */
CHAOSI_FN chaosi_u64 chaosi_mix(chaosi_u64 x) {
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
    return x ^ (x >> 31);
}

CHAOSI_FN chaosi_u64 chaosi_hash(chaosi_span s) {
    chaosi_u64 h = 0xcbf29ce484222325ull;
    size_t i;
    for (i = 0; i < s.len; i++) h = (h ^ (chaosi_u8)s.at[i]) * 0x100000001b3ull;
    return h;
}

/* Time in ns: monotonic, or since the Unix epoch. coarse = within some ms, at a quarter of the cost where there is such. */
CHAOSI_FN chaosi_u64 chaosi_time(bool wall, bool coarse) {
#ifdef _WIN32
    FILETIME t;
    (void)coarse;
    GetSystemTimeAsFileTime(&t);
    if (!wall) return (chaosi_u64)GetTickCount64() * CHAOSI_MS;
    return ((((chaosi_u64)t.dwHighDateTime << 32) | t.dwLowDateTime) - 116444736000000000ull) * 100u;
#else
    struct timespec t;
#ifdef CLOCK_MONOTONIC_COARSE
    if (coarse) clock_gettime(wall ? CLOCK_REALTIME_COARSE : CLOCK_MONOTONIC_COARSE, &t);
    else
#endif
        clock_gettime(wall ? CLOCK_REALTIME : CLOCK_MONOTONIC, &t);
    (void)coarse;
    return (chaosi_u64)t.tv_sec * 1000000000u + (chaosi_u64)t.tv_nsec;
#endif
}

CHAOSI_FN chaosi_u64 chaosi_clock(bool wall) { return chaosi_time(wall, false); }
CHAOSI_FN chaosi_u64 chaosi_clock_coarse(bool wall) { return chaosi_time(wall, true); }

/* Days since 1970-01-01 of a date in the Gregorian calendar; a year from March on has its leap day at the end. */
CHAOSI_FN long long chaosi_days(int year, int month, int day) {
    int y = year - (month < 3), m = month + (month < 3 ? 9 : -3);
    return 365ll * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 719469;
}

/* RFC 3339 in UTC, with milliseconds when there are any or when asked. buf holds 80 bytes. */
CHAOSI_FN const char *chaosi_rfc3339(char *buf, long long unix_ms, bool with_ms) {
    long long days = unix_ms / 86400000, ms = unix_ms % 86400000;
    int year = 1970, month = 1, n;
    while (year < 9999 && days >= chaosi_days(year + 1, 1, 1)) year++;
    while (month < 12 && days >= chaosi_days(year, month + 1, 1)) month++;
    n = snprintf(buf, 80, "%04d-%02d-%02dT%02d:%02d:%02d", year, month, (int)(days - chaosi_days(year, month, 1)) + 1, (int)(ms / 3600000),
                 (int)(ms / 60000 % 60), (int)(ms / 1000 % 60));
    if (with_ms || ms % 1000) n += snprintf(buf + n, 8, ".%03u", (unsigned)(ms % 1000) & 1023u);
    strcpy(buf + n, "Z");
    return buf;
}

/* ==== >>json ================================================================================================== */
/* A pull parser over the caller's bytes (RFC 8259). It validates everything it passes; nothing is copied. A token is one
   character: { } [ ] themselves, : a key, " a string, 0 a number, t f n the words, . the end; NUL an error. */
typedef struct chaosi_json {
    const char *text;
    size_t len, pos;
    chaos_error *err;   /* may be NULL */
    char want;          /* v a value, f the first thing of a list or object, m more of them, . nothing; NUL = failed */
    int depth;          /* at most 64 */
    chaosi_u64 objects; /* bit d: level d + 1 is an object */
    size_t start, end;  /* the last token; strings and keys without their quotes */
} chaosi_json;

/* Length of the UTF-8 sequence at s, 0 = not well-formed (RFC 3629: nothing overlong, no surrogates, at most U+10FFFF). */
CHAOSI_FN size_t chaosi_utf8(const char *s, size_t len) {
    chaosi_u8 a = (chaosi_u8)s[0], b;
    size_t n = a < 0x80 ? 1 : a >= 0xc2 && a < 0xe0 ? 2 : (a & 0xf0) == 0xe0 ? 3 : a >= 0xf0 && a < 0xf5 ? 4 : 0, i;
    if (n < 2 || n > len) return n == 1;
    b = (chaosi_u8)s[1];
    if ((a == 0xe0 && b < 0xa0) || (a == 0xed && b > 0x9f) || (a == 0xf0 && b < 0x90) || (a == 0xf4 && b > 0x8f)) return 0;
    for (i = 1; i < n; i++)
        if (((chaosi_u8)s[i] & 0xc0) != 0x80) return 0;
    return n;
}

/* Fills in where: line and column (in characters) of a byte offset. */
CHAOSI_FN void chaosi_locate(chaos_error *err, const char *text, size_t offset) {
    size_t i;
    if (!err) return;
    err->offset = offset;
    err->line = err->column = 1;
    for (i = 0; i < offset; i++) {
        err->line += text[i] == '\n';
        err->column = text[i] == '\n' ? 1 : err->column + (((chaosi_u8)text[i] & 0xc0) != 0x80);
    }
}

CHAOSI_COLD char chaosi_json_fail(chaosi_json *j, size_t at, const char *why) {
    chaosi_fail(j->err, CHAOS_ERR_JSON, "invalid JSON: %s", why);
    chaosi_locate(j->err, j->text, at);
    return j->want = '\0';
}

/* The character at pos; NUL at the end, too. */
CHAOSI_FN char chaosi_json_at(const chaosi_json *j) { return j->pos < j->len ? j->text[j->pos] : '\0'; }

/* The same behind any white space. */
CHAOSI_FN char chaosi_json_space(chaosi_json *j) {
    char c = chaosi_json_at(j);
    for (; c == ' ' || c == '\t' || c == '\n' || c == '\r'; c = chaosi_json_at(j)) j->pos++;
    return c;
}

CHAOSI_FN char chaosi_json_token(chaosi_json *j, char token, size_t len) {
    j->start = j->pos;
    j->end = j->pos += len;
    return token;
}

CHAOSI_FN bool chaosi_json_starts(const chaosi_json *j, const char *word) {
    size_t n = strlen(word);
    return j->len - j->pos >= n && memcmp(j->text + j->pos, word, n) == 0;
}

/* The value of \uXXXX at s, -1 = something else. */
CHAOSI_FN int chaosi_json_unit(const char *s, size_t len) {
    int value = 0, i;
    if (len < 6 || s[0] != '\\' || s[1] != 'u') return -1;
    for (i = 2; i < 6 && value >= 0; i++) value = chaosi_hex(s[i]) < 0 ? -1 : value * 16 + chaosi_hex(s[i]);
    return value;
}

/* The escape at s: its length, 0 = bad; *code is what it stands for. */
CHAOSI_FN size_t chaosi_json_escape(const char *s, size_t len, unsigned *code) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    const char *plain = len > 1 ? (const char *)memchr(from, s[1], 8) : NULL;
    int high = chaosi_json_unit(s, len), low = high >> 10 == 0xd800 >> 10 ? chaosi_json_unit(s + 6, len - 6) : -1;
    bool pair = low >> 10 == 0xdc00 >> 10;
    *code = plain  ? (unsigned)to[plain - from]
            : pair ? 0x10000u + (((unsigned)high & 0x3ff) << 10) + ((unsigned)low & 0x3ff)
                   : (unsigned)high;
    return plain ? 2 : pair ? 12 : high < 0 || high >> 11 == 0xd800 >> 11 ? 0 : 6;
}

/* A string or a key; pos is on its opening quote. */
CHAOSI_FN char chaosi_json_string(chaosi_json *j, char token) {
    size_t n, open = j->pos++;
    unsigned code;
    for (j->start = j->pos; j->pos < j->len; j->pos += n) {
        const char *s = j->text + j->pos;
        if (*s == '"') {
            j->end = j->pos++;
            return token;
        }
        if ((chaosi_u8)*s < 0x20) return chaosi_json_fail(j, j->pos, "control character in a string (escape it)");
        n = *s == '\\' ? chaosi_json_escape(s, j->len - j->pos, &code) : chaosi_utf8(s, j->len - j->pos);
        if (!n && *s == '\\') return chaosi_json_fail(j, j->pos, "bad escape in a string, or half of a surrogate pair");
        if (!n) return chaosi_json_fail(j, j->pos, "bytes that are not UTF-8");
    }
    return chaosi_json_fail(j, open, "string without its closing quote");
}

/* Passes over digits and says how many; there must be one. */
CHAOSI_FN size_t chaosi_json_digits(chaosi_json *j, const char *why) {
    size_t from = j->pos;
    while (chaosi_is_digit(chaosi_json_at(j))) j->pos++;
    if (j->pos == from) chaosi_json_fail(j, from, why);
    return j->pos - from;
}

CHAOSI_FN char chaosi_json_number(chaosi_json *j) {
    size_t start = j->pos, n;
    if (chaosi_json_at(j) == '-') j->pos++;
    n = chaosi_json_digits(j, "a number needs a digit here");
    if (n > 1 && j->text[j->pos - n] == '0') return chaosi_json_fail(j, j->pos - n, "a number may not start with 0");
    if (n && chaosi_json_at(j) == '.') {
        j->pos++;
        n = chaosi_json_digits(j, "a number needs a digit after the point");
    }
    if (n && chaosi_lower(chaosi_json_at(j)) == 'e') {
        j->pos++;
        if (chaosi_json_at(j) == '+' || chaosi_json_at(j) == '-') j->pos++;
        n = chaosi_json_digits(j, "an exponent needs a digit");
    }
    j->start = start;
    j->end = j->pos;
    return n ? '0' : '\0';
}

/* Names what people write by mistake; the text is invalid in any case. */
CHAOSI_COLD char chaosi_json_unexpected(chaosi_json *j, const char *why) {
    chaosi_u8 c = (chaosi_u8)chaosi_json_at(j);
    if (j->pos >= j->len) why = j->len ? "the text ends too early" : "the text is empty";
    else if (chaosi_json_starts(j, "\xef\xbb\xbf")) why = "a byte order mark (BOM); save as UTF-8 without it";
    else if (j->pos < 2 && (c == 0xff || c == 0xfe || c == 0)) why = "UTF-16 or UTF-32; save as UTF-8";
    else if (c == '/' || c == '#') why = "JSON has no comments";
    else if (c == '\'') why = "strings need double quotes";
    else if (chaosi_json_starts(j, "NaN") || chaosi_json_starts(j, "Infinity")) why = "NaN and Infinity are not JSON numbers";
    else if (c == '+' || c == '.') why = "a number may not start with + or a point";
    return chaosi_json_fail(j, j->pos, why);
}

CHAOSI_FN char chaosi_json_value(chaosi_json *j) {
    char c = chaosi_json_at(j);
    if (c == '{' || c == '[') {
        if (j->depth == 64) return chaosi_json_fail(j, j->pos, "more than 64 levels deep");
        j->objects = (j->objects & ~(1ull << j->depth)) | (chaosi_u64)(c == '{') << j->depth;
        j->depth++;
        j->want = 'f';
        return chaosi_json_token(j, c, 1);
    }
    j->want = j->depth ? 'm' : '.';
    if (c == '"') return chaosi_json_string(j, c);
    if (c == '-' || chaosi_is_digit(c)) return chaosi_json_number(j);
    if (chaosi_json_starts(j, "true") || chaosi_json_starts(j, "null")) return chaosi_json_token(j, c, 4);
    if (chaosi_json_starts(j, "false")) return chaosi_json_token(j, c, 5);
    return chaosi_json_unexpected(j, "expected a value");
}

/* The next token; a key's colon goes with it. After an error, or after the end, it stays there. */
CHAOSI_FN char chaosi_json_next(chaosi_json *j) {
    bool object = j->depth > 0 && (j->objects >> (j->depth - 1) & 1u);
    char c, closer = object ? '}' : ']';
    if (!j->want) return '\0';
    c = chaosi_json_space(j);
    if (j->want == 'v') return chaosi_json_value(j);
    if (j->want == '.') return j->pos < j->len ? chaosi_json_unexpected(j, "something stands after the end of the value") : '.';
    if (c == closer) {
        j->want = --j->depth ? 'm' : '.';
        return chaosi_json_token(j, c, 1);
    }
    if (j->want == 'm') {
        if (c != ',') return chaosi_json_unexpected(j, object ? "expected a comma or }" : "expected a comma or ]");
        j->pos++;
        if (chaosi_json_space(j) == closer) return chaosi_json_fail(j, j->pos, "a comma before the closing bracket");
    }
    if (!object) return chaosi_json_value(j);
    if (chaosi_json_at(j) != '"') return chaosi_json_unexpected(j, "expected a key in double quotes");
    if (!chaosi_json_string(j, ':')) return '\0';
    if (chaosi_json_space(j) != ':') return chaosi_json_unexpected(j, "expected a colon after the key");
    j->pos++;
    j->want = 'v';
    return ':';
}

/* Passes over the value that comes next, validating it. */
CHAOSI_FN char chaosi_json_skip(chaosi_json *j) {
    int depth = j->depth;
    char t;
    do t = chaosi_json_next(j);
    while (t && j->depth > depth);
    return t;
}

chaos_result chaos_json_check(const char *text, size_t len, chaos_error *err) {
    chaosi_json j = {text, len, 0, err, 'v', 0, 0, 0, 0};
    chaosi_no_error(err);
    return chaosi_json_skip(&j) && chaosi_json_next(&j) ? CHAOS_OK : CHAOS_ERR_JSON;
}

/* Decodes the string or key just read into to[0..cap). Returns its length, SIZE_MAX = does not fit. The decoded form is
   never longer than the raw one. */
CHAOSI_FN size_t chaosi_json_decode(const chaosi_json *j, char *to, size_t cap) {
    static const unsigned lead[5] = {0, 0, 0xc0, 0xe0, 0xf0};
    size_t p = j->start, n = 0, made, i;
    for (; p < j->end; n += made) {
        unsigned code = (chaosi_u8)j->text[p];
        bool raw = code != '\\'; /* a byte as it stands, perhaps a part of a longer sequence */
        p += raw ? 1 : chaosi_json_escape(j->text + p, j->end - p, &code);
        made = raw || code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
        if (made > cap - n) return SIZE_MAX;
        for (i = made - 1; i > 0; i--, code >>= 6) to[n + i] = (char)(0x80u | (code & 63u));
        to[n] = (char)(lead[made] | code);
    }
    return n;
}

/* Finds the value at a path of keys ("Parameter.Value", as they stand in the text): its token, with *j on it; NUL = none. */
CHAOSI_FN char chaosi_json_find(chaosi_json *j, chaosi_span text, const char *path) {
    chaosi_json start = {text.at, text.len, 0, NULL, 'v', 0, 0, 0, 0};
    for (*j = start;; path++) {
        size_t n = strcspn(path, ".");
        char t = chaosi_json_next(j);
        if (t != '{') return '\0';
        while ((t = chaosi_json_next(j)) == ':' && !chaosi_same(chaosi_of(j->text + j->start, j->end - j->start), chaosi_of(path, n)))
            if (!chaosi_json_skip(j)) return '\0';
        path += n;
        if (t != ':' || !*path) return t == ':' ? chaosi_json_next(j) : '\0';
    }
}

/* The string there, with a NUL. False = there is none, or it does not fit. */
CHAOSI_FN bool chaosi_json_text(chaosi_span text, const char *path, char *to, size_t cap) {
    chaosi_json j;
    size_t n = chaosi_json_find(&j, text, path) == '"' ? chaosi_json_decode(&j, to, cap - 1) : SIZE_MAX;
    to[n == SIZE_MAX ? 0 : n] = 0;
    return n != SIZE_MAX;
}

/* A JSON string: quotes, backslashes and control bytes escaped; bytes that are not UTF-8 become '?'. */
CHAOSI_FN void chaosi_put_json(chaosi_out *o, chaosi_span s) {
    static const char from[] = "\b\t\n\f\r", to[] = "btnfr";
    size_t i, n;
    char esc[8];
    chaosi_puts(o, "\"");
    for (i = 0; i < s.len; i += n ? n : 1) {
        char c = s.at[i];
        const char *known = (const char *)memchr(from, c, 5);
        n = chaosi_utf8(s.at + i, s.len - i);
        if (c == '"' || c == '\\') chaosi_puts(o, "\\");
        if (known) chaosi_put(o, esc, (size_t)snprintf(esc, sizeof esc, "\\%c", to[known - from]));
        else if ((chaosi_u8)c < 0x20) chaosi_put(o, esc, (size_t)snprintf(esc, sizeof esc, "\\u%04x", (unsigned)(chaosi_u8)c));
        else if (n) chaosi_put(o, s.at + i, n);
        else chaosi_puts(o, "?");
    }
    chaosi_puts(o, "\"");
}

/* ==== >>config ================================================================================================ */
/* Where a key may stand; objects are written in the order of these bits: at the top level (two of them), in a rule (its own
   two, and those it inherits), in match, in latency. */
enum { CHAOSI_HEAD = 1, CHAOSI_REST = 2, CHAOSI_TOP = 3, CHAOSI_NAME = 4, CHAOSI_OWN = 8, CHAOSI_FAULT = 16, CHAOSI_RULE = 28 };
enum { CHAOSI_MATCH = 32, CHAOSI_LATENCY = 64 };

/* One table gives the defaults, reads and writes. kind: b bool, n number, w word, W list of words (bits), s string, l list of strings or object of
   headers, e expiry, d latency, m match, r rules, - nothing enforces it yet. */
typedef struct chaosi_key {
    const char *name;
    char kind;
    const char *tokens, *what; /* what its value begins with, and what it must be, in words */
    const char *words;         /* w: the words; d, m: the keys of the object */
    long long lo, hi;          /* the bounds; s: bytes; l: Method, Path, Header or Glob, and bytes */
    long long def;             /* this is not written; -1 for a bool: always written */
    int where;
    size_t size, at, in_rule; /* the field: its offset in chaos_config (chaos_match, the six ms of a latency), in chaos_rule */
} chaosi_key;

#define CHAOSI_BOOL           'b', "tf", "true or false", NULL, 0, 1
#define CHAOSI_NUMBER         'n', "0", "a whole number", NULL
#define CHAOSI_CHOICE         'w', "\"", "a string"
#define CHAOSI_STRING(max)    's', "\"", "a string", NULL, 0, max, 0
#define CHAOSI_LIST(kind)     'l', "[", "a list of strings", NULL, kind, 256, 0
#define CHAOSI_AT(where, f)   where, sizeof(((chaos_config *)0)->f), offsetof(chaos_config, f), 0
#define CHAOSI_BOTH(where, f) where, sizeof(((chaos_rule *)0)->f), offsetof(chaos_config, f), offsetof(chaos_rule, f)
#define CHAOSI_OF_FAULT(f)    CHAOSI_BOTH(CHAOSI_REST | CHAOSI_FAULT, fault.f)
#define CHAOSI_OF_MATCH(f)    CHAOSI_MATCH, sizeof(chaos_list), offsetof(chaos_match, f), 0
#define CHAOSI_OF_LATENCY     "made of whole numbers of ms", NULL, 0, 900000, UINT_MAX, CHAOSI_LATENCY, sizeof(unsigned)
static const chaosi_key chaosi_keys[] = {
    {"enabled", CHAOSI_BOOL, -1, CHAOSI_AT(CHAOSI_HEAD, enabled)},
    {"latency", 'd', "0{", "a whole number of ms, or an object", "min, max, mean, p50, p95 and p99", 0, 900000, 0,
     CHAOSI_BOTH(CHAOSI_REST | CHAOSI_FAULT, fault)},
    {"latencyRate", CHAOSI_NUMBER, 0, 100, 100, CHAOSI_OF_FAULT(latency_rate)},
    {"errorRate", CHAOSI_NUMBER, 0, 100, 0, CHAOSI_OF_FAULT(error_rate)},
    {"errorStatus", CHAOSI_NUMBER, 200, 599, 503, CHAOSI_OF_FAULT(error_status)},
    {"errorMode", CHAOSI_CHOICE, "status, reset, close, hang, truncate or corrupt", CHAOS_STATUS, CHAOS_CORRUPT, CHAOS_STATUS,
     CHAOSI_OF_FAULT(error_mode)},
    {"errorWhen", CHAOSI_CHOICE, "before or after", 0, 1, 0, CHAOSI_OF_FAULT(error_after)},
    {"errorBody", CHAOSI_STRING(1024), CHAOSI_OF_FAULT(error_body)},
    {"retryAfter", CHAOSI_NUMBER, 0, 86400, -1, CHAOSI_OF_FAULT(retry_after)},
    {"bandwidth", CHAOSI_NUMBER, 0, 4194303, 0, CHAOSI_OF_FAULT(bandwidth)},
    {"match", 'm', "{", "an object with methods, paths or headers", "methods, paths and headers", 0, 0, 0,
     CHAOSI_BOTH(CHAOSI_REST | CHAOSI_OWN, match)},
    {"exclude", CHAOSI_LIST('P'), CHAOSI_AT(CHAOSI_REST, exclude)},
    {"events", 'W', "[", "a list of strings", "http, direct, async, sqs or stream", 0, 4, 3, CHAOSI_AT(CHAOSI_REST, events)},
    {"canary", CHAOSI_NUMBER, 0, 100, 100, CHAOSI_AT(CHAOSI_REST, canary)},
    {"instances", CHAOSI_LIST('G'), CHAOSI_AT(CHAOSI_REST, instances)},
    {"expiresAt", 'e', "0\"", "an RFC 3339 time, epoch seconds or \"never\"", NULL, LLONG_MIN / 2, LLONG_MAX / 2, 0,
     CHAOSI_AT(CHAOSI_REST, expires_ms)},
    {"maxFaults", CHAOSI_NUMBER, 0, UINT_MAX, 0, CHAOSI_AT(CHAOSI_REST, max_faults)},
    {"maxConcurrent", CHAOSI_NUMBER, 0, CHAOS_MAX_CONCURRENT, 0, CHAOSI_AT(CHAOSI_REST, max_concurrent)},
    {"seed", CHAOSI_NUMBER, 0, (1ll << 53) - 1, 0, CHAOSI_AT(CHAOSI_REST, seed)}, /* what every JSON tool keeps exact */
    {"dryRun", CHAOSI_BOOL, 0, CHAOSI_AT(CHAOSI_REST, dry_run)},
    {"name", CHAOSI_STRING(64), CHAOSI_BOTH(CHAOSI_HEAD | CHAOSI_NAME, name)},
    {"owner", CHAOSI_STRING(64), CHAOSI_AT(CHAOSI_HEAD, owner)},
    {"note", CHAOSI_STRING(256), CHAOSI_AT(CHAOSI_HEAD, note)},
    {"methods", CHAOSI_LIST('M'), CHAOSI_OF_MATCH(methods)},
    {"paths", CHAOSI_LIST('P'), CHAOSI_OF_MATCH(paths)},
    {"headers", 'l', "{", "an object of header names and globs", NULL, 'H', 256, 0, CHAOSI_OF_MATCH(headers)},
    {"min", 'n', "0", CHAOSI_OF_LATENCY, 0 * sizeof(unsigned), 0},
    {"mean", 'n', "0", CHAOSI_OF_LATENCY, 1 * sizeof(unsigned), 0},
    {"p50", 'n', "0", CHAOSI_OF_LATENCY, 2 * sizeof(unsigned), 0},
    {"p95", 'n', "0", CHAOSI_OF_LATENCY, 3 * sizeof(unsigned), 0},
    {"p99", 'n', "0", CHAOSI_OF_LATENCY, 4 * sizeof(unsigned), 0},
    {"max", 'n', "0", CHAOSI_OF_LATENCY, 5 * sizeof(unsigned), 0},
    {"rules", 'r', "[", "a list of objects", NULL, 0, 0, 0, CHAOSI_AT(CHAOSI_REST, rules)},
    {"guard", '-', "", "", NULL, 0, 0, 0, CHAOSI_REST, 0, 0, 0},
};
#define CHAOSI_KEYS_END (chaosi_keys + sizeof chaosi_keys / sizeof chaosi_keys[0])
#define CHAOSI_RULES    (CHAOSI_KEYS_END - 2)

/* The keys of each chaos_latency: bit i = the i-th of min mean p50 p95 p99 max. */
static const unsigned chaosi_latency_keys[] = {0, 0x21, 0x22, 0x3c};

typedef struct chaosi_parse {
    chaosi_json j, rules; /* rules: where they stand; read last, because they inherit what may stand behind them */
    chaos_config *out;
    const chaosi_key *key; /* whose value is being read */
    int rule;              /* index, -1 = top level */
} chaosi_parse;

/* An error at the last token, naming the rule it is in. Always false. */
CHAOSI_COLD CHAOSI_PRINTF(3, 4) bool chaosi_bad(chaosi_parse *p, chaos_result code, const char *fmt, ...) {
    char *s = p->j.err->text;
    va_list args;
    chaosi_no_error(p->j.err);
    p->j.err->code = code;
    if (p->rule >= 0) s += snprintf(s, 16, "rules[%d]: ", p->rule);
    va_start(args, fmt);
    vsnprintf(s, 160, fmt, args);
    va_end(args);
    for (; *s; s++) /* keys are the writer's: nothing of theirs may move the reader's cursor */
        if ((chaosi_u8)*s < 0x20 || *s == 0x7f) *s = '?';
    chaosi_locate(p->j.err, p->j.text, p->j.start);
    return false;
}

CHAOSI_FN chaosi_span chaosi_text_of(const chaos_config *c, chaos_text t) { return chaosi_of(c->text + t.at, t.len); }
CHAOSI_FN chaosi_span chaosi_item(const chaos_config *c, chaos_list l, int i) { return chaosi_text_of(c, c->items[l.first + i]); }

/* The i-th word of "a, b or c". */
CHAOSI_FN chaosi_span chaosi_word(const char *words, long long i) {
    size_t n = strcspn(words, ", ");
    for (; i > 0 && words[n]; i--, n = strcspn(words, ", ")) words += n + (words[n] == ',' ? 2 : 4);
    return chaosi_of(words, n);
}

/* A field that holds a number. */
CHAOSI_FN long long chaosi_get(const chaosi_key *k, const void *at) {
    if (k->size == 4) return k->def < 0 ? *(const int *)at : (long long)*(const unsigned *)at;
    return k->size == 1 ? *(const chaosi_u8 *)at : k->size == 2 ? *(const chaosi_u16 *)at : *(const long long *)at;
}

CHAOSI_FN void chaosi_set(const chaosi_key *k, void *at, long long v) {
    if (k->size == 1) *(chaosi_u8 *)at = (chaosi_u8)v;
    else if (k->size == 2) *(chaosi_u16 *)at = (chaosi_u16)v;
    else if (k->size == 4) *(unsigned *)at = (unsigned)v;
    else *(long long *)at = v;
}

CHAOSI_FN void chaosi_config_default(chaos_config *cfg) {
    const chaosi_key *k;
    memset(cfg, 0, sizeof *cfg);
    cfg->default_exclude = true;
    for (k = chaosi_keys; k < CHAOSI_KEYS_END; k++)
        if (k->where & CHAOSI_TOP && strchr("nwW", k->kind)) chaosi_set(k, (char *)cfg + k->at, k->def);
}

/* Edits (insert, delete, replace; case does not count) from a to b; exact up to `limit`. */
CHAOSI_COLD size_t chaosi_distance(chaosi_span a, chaosi_span b, size_t limit) {
    size_t best = limit, d, i;
    for (; a.len && b.len && chaosi_lower(*a.at) == chaosi_lower(*b.at); a.at++, a.len--, b.at++) b.len--;
    if (!limit || !a.len || !b.len) return a.len > b.len ? a.len : b.len;
    for (i = 1; i < 4; i++) { /* 1 delete, 2 insert, 3 replace */
        d = chaosi_distance(chaosi_of(a.at + (i & 1), a.len - (i & 1)), chaosi_of(b.at + i / 2, b.len - i / 2), limit - 1);
        if (d < best) best = d;
    }
    return best + 1;
}

CHAOSI_COLD bool chaosi_unknown_key(chaosi_parse *p, chaosi_span name, int where) {
    const chaosi_key *k, *best = NULL;
    size_t d, bound = name.len < 6 ? name.len / 2 + 1 : 4;
    for (k = chaosi_keys; k < CHAOSI_KEYS_END; k++) {
        if (!(k->where & where) || (d = chaosi_distance(name, chaosi_str(k->name), 3)) >= bound) continue;
        best = k;
        bound = d;
    }
    return chaosi_bad(p, CHAOS_ERR_UNKNOWN_KEY, "unknown key \"%.*s\"%s%s%s", (int)name.len, name.at, best ? " (did you mean \"" : "",
                      best ? best->name : "", best ? "\"?)" : "");
}

/* The row of the key just read, NULL = error. of: the key of its object, NULL = the config or a rule; seen: a bit for each
   row that was there. */
CHAOSI_FN const chaosi_key *chaosi_which_key(chaosi_parse *p, const chaosi_key *of, int where, chaosi_u64 *seen) {
    char name[40];
    size_t n = chaosi_json_decode(&p->j, name, sizeof name), raw = p->j.end - p->j.start;
    const chaosi_key *k = chaosi_keys;
    while (k < CHAOSI_KEYS_END && !(k->where & (of ? where : CHAOSI_TOP) && chaosi_same(chaosi_of(name, n), chaosi_str(k->name)))) k++;
    if (k == CHAOSI_KEYS_END && of)
        chaosi_bad(p, CHAOS_ERR_UNKNOWN_KEY, "unknown key \"%.*s\" in \"%s\": it takes %s", (int)(raw < 32 ? raw : 32),
                   p->j.text + p->j.start, of->name, of->words);
    else if (n == SIZE_MAX) chaosi_bad(p, CHAOS_ERR_UNKNOWN_KEY, "unknown key (over 40 bytes long)");
    else if (k == CHAOSI_KEYS_END) chaosi_unknown_key(p, chaosi_of(name, n), where);
    else if (k->kind == '-') chaosi_bad(p, CHAOS_ERR_UNSUPPORTED, "\"%s\" is not in this version", k->name);
    else if (!(k->where & where)) chaosi_bad(p, CHAOS_ERR_UNKNOWN_KEY, "\"%s\" may not stand in a rule", k->name);
    else if (*seen >> (k - chaosi_keys) & 1u)
        chaosi_bad(p, CHAOS_ERR_DUPLICATE_KEY, "duplicate key \"%s\"%s%s%s", k->name, of ? " in \"" : "", of ? of->name : "",
                   of ? "\"" : "");
    else {
        *seen |= 1ull << (k - chaosi_keys);
        return k;
    }
    return NULL;
}

/* The next token, which must be one of these; NUL = error. */
CHAOSI_FN char chaosi_expect(chaosi_parse *p, const char *tokens) {
    char t = chaosi_json_next(&p->j);
    if (!t || strchr(tokens, t)) return t;
    chaosi_bad(p, CHAOS_ERR_TYPE, "\"%s\" must be %s", p->key->where & CHAOSI_LATENCY ? "latency" : p->key->name, p->key->what);
    return '\0';
}

/* The last token as a whole number within the key's bounds. */
CHAOSI_FN bool chaosi_int(chaosi_parse *p, long long *out) {
    const chaosi_key *k = p->key;
    const char *s = p->j.text + p->j.start;
    size_t len = p->j.end - p->j.start, minus = *s == '-', digits = minus, i;
    long long value = 0;
    for (; digits < len && chaosi_is_digit(s[digits]); digits++)
        value = value < 100000000000000000ll ? value * 10 + (s[digits] - '0') : LLONG_MAX; /* beyond all bounds */
    for (i = digits + 1; i < len && s[i] == '0'; i++) {}
    if (digits < len && s[digits] == '.' && i == len)
        return chaosi_bad(p, CHAOS_ERR_TYPE, "\"%s\" must be a whole number: write %.*s", k->name, (int)(digits < 24 ? digits : 24), s);
    if (digits < len) return chaosi_bad(p, CHAOS_ERR_TYPE, "\"%s\" must be a whole number", k->name);
    *out = minus ? -value : value;
    if (*out >= k->lo && *out <= k->hi) return true;
    return chaosi_bad(p, CHAOS_ERR_RANGE, "\"%s\" is out of range: %lld..%lld", k->name, k->lo, k->hi);
}

/* The string or key just read, into the pool, with a NUL behind it. */
CHAOSI_FN bool chaosi_keep(chaosi_parse *p, chaos_text *out) {
    chaos_config *cfg = p->out;
    char *to = cfg->text + cfg->text_len;
    size_t max = (size_t)p->key->hi, room = sizeof cfg->text - cfg->text_len; /* the NUL included */
    size_t n = room ? chaosi_json_decode(&p->j, to, room - 1 < max + 1 ? room - 1 : max + 1) : SIZE_MAX;
    if (n > max && room <= max + 1)
        return chaosi_bad(p, CHAOS_ERR_TOO_LARGE, "the strings of this config are over %d bytes", CHAOS_MAX_TEXT);
    if (n > max) return chaosi_bad(p, CHAOS_ERR_RANGE, "\"%s\" holds a string over %u bytes", p->key->name, (unsigned)max);
    if (memchr(to, 0, n)) return chaosi_bad(p, CHAOS_ERR_VALUE, "\"%s\" holds a NUL character", p->key->name);
    to[n] = 0;
    out->at = cfg->text_len;
    out->len = (chaosi_u16)n;
    cfg->text_len = (chaosi_u16)(cfg->text_len + n + 1u);
    return true;
}

CHAOSI_FN bool chaosi_is_token_char(char c) {
    return chaosi_is_digit(c) || (chaosi_lower(c) >= 'a' && chaosi_lower(c) <= 'z') || (c && strchr("!#$%&'*+-.^_`|~", c));
}

/* A list of strings, or an object of header names and globs. What can never match would quietly widen or empty an experiment.
   Header names are kept in lower case and must not stand twice. */
CHAOSI_FN bool chaosi_list(chaosi_parse *p, chaos_list *list) {
    chaos_config *cfg = p->out;
    const char *key = p->key->name;
    char t, *s;
    int i;
    if (list == &cfg->exclude) cfg->default_exclude = false;
    list->first = cfg->item_count;
    list->count = 0;
    while ((t = chaosi_expect(p, p->key->lo == 'H' ? ":\"}" : "\"]")) == '"' || t == ':') {
        char kind = t == '"' && p->key->lo == 'H' ? 'G' : (char)p->key->lo;
        if (cfg->item_count == CHAOS_MAX_ITEMS) return chaosi_bad(p, CHAOS_ERR_TOO_LARGE, "over %d strings in lists", CHAOS_MAX_ITEMS);
        if (!chaosi_keep(p, &cfg->items[cfg->item_count])) return false;
        s = cfg->text + cfg->items[cfg->item_count++].at;
        if (!*s && kind != 'G') return chaosi_bad(p, CHAOS_ERR_VALUE, "\"%s\" holds an empty string", key);
        if (kind == 'P' && *s != '/' && strncmp(s, "**", 2) != 0)
            return chaosi_bad(p, CHAOS_ERR_VALUE, "\"%s\": a path glob starts with / or **", key);
        for (; *s && (kind == 'M' || kind == 'H'); s++) {
            if (!chaosi_is_token_char(*s)) return chaosi_bad(p, CHAOS_ERR_VALUE, "\"%s\" holds a name that HTTP does not allow", key);
            if (kind == 'M' && *s >= 'a' && *s <= 'z')
                return chaosi_bad(p, CHAOS_ERR_VALUE, "\"%s\": methods are written in capitals", key);
            if (kind == 'H') *s = chaosi_lower(*s);
        }
        for (i = 0; kind == 'H' && i < list->count; i += 2)
            if (chaosi_same(chaosi_item(cfg, *list, i), chaosi_item(cfg, *list, list->count)))
                return chaosi_bad(p, CHAOS_ERR_DUPLICATE_KEY, "duplicate header \"%s\"", chaosi_item(cfg, *list, i).at);
        list->count++;
    }
    if (!t || list->count || list == &cfg->exclude) return t != 0;
    return chaosi_bad(p, CHAOS_ERR_VALUE, "\"%s\" must not be empty; leave it out to match all", key);
}

/* n digits at s as a number, -1 = something else. */
CHAOSI_FN int chaosi_digits(const char *s, int n) {
    int value = 0;
    for (; n > 0 && value >= 0; n--, s++) value = chaosi_is_digit(*s) ? value * 10 + (*s - '0') : -1;
    return value;
}

/* RFC 3339 section 5.6, UTC only, from 1970; ms since the epoch, -1 = not such a moment. s is NUL-terminated. */
CHAOSI_FN long long chaosi_moment(const char *s) {
    int v[6], i, fraction = 0, scale = 100; /* v: year month day hour minute second */
    long long ms;
    char again[80];
    if (strlen(s) < 20 || chaosi_lower(s[10]) != 't') return -1;
    for (i = 0; i < 6; i++) v[i] = chaosi_digits(s + (i ? 3 * i + 2 : 0), i ? 2 : 4);
    ms = ((chaosi_days(v[0], v[1], v[2]) * 24 + v[3]) * 60 + v[4]) * 60000;
    if (v[2] > 31 || v[5] < 0 || v[5] > 60) return -1;
    chaosi_rfc3339(again, ms, false); /* what is no such day or time comes back as another: 31 April as 1 May */
    if (memcmp(again, s, 10) != 0 || memcmp(again + 11, s + 11, 6) != 0) return -1;
    s += 19;
    if (*s == '.' && chaosi_is_digit(s[1]))
        for (s++; chaosi_is_digit(*s); s++, scale /= 10) fraction += (*s - '0') * scale;
    if (!(chaosi_lower(s[0]) == 'z' && !s[1]) && strcmp(s, "+00:00") != 0) return -1;
    return ms + v[5] * 1000 + fraction;
}

CHAOSI_FN bool chaosi_expires(chaosi_parse *p, bool number, long long *out) {
    static const char form[] = "\"expiresAt\" must be RFC 3339 in UTC (2026-01-31T12:00:00Z), epoch seconds or \"never\"";
    char s[48];
    size_t n = number ? 0 : chaosi_json_decode(&p->j, s, sizeof s - 1);
    long long second = number ? 1 : 1000;
    s[n == SIZE_MAX || memchr(s, 0, n) ? 0 : n] = 0;
    *out = number ? 0 : chaosi_moment(s);
    if (*out < 0) return strcmp(s, "never") == 0 || chaosi_bad(p, CHAOS_ERR_VALUE, "%s", form);
    if (number && !chaosi_int(p, out)) return false;
    if (*out / second > 4102444800ll)
        return chaosi_bad(p, CHAOS_ERR_RANGE, "\"expiresAt\" is beyond 2100%s",
                          number ? ": it looks like milliseconds, write seconds" : "");
    if (*out / second < 946684800ll)
        return chaosi_bad(p, CHAOS_ERR_RANGE, "\"expiresAt\" is before 2000%s", number ? ": it is a moment, not a duration" : "");
    *out *= 1000 / second;
    return true;
}

CHAOSI_FN bool chaosi_object(chaosi_parse *p, const chaosi_key *of, int where, void *in);

/* A number, or an object of one of the three kinds. */
CHAOSI_FN bool chaosi_latency(chaosi_parse *p, bool number, chaos_fault *f) {
    unsigned ms[6], given = 0, kind = CHAOS_LATENCY_QUANTILES, n = 0, i;
    long long fixed = 0;
    memset(f->latency, 0, sizeof f->latency);
    memset(ms, 0xff, sizeof ms);
    f->latency_kind = CHAOS_LATENCY_FIXED;
    if (number && !chaosi_int(p, &fixed)) return false;
    f->latency[0] = (unsigned)fixed;
    if (number) return true;
    if (!chaosi_object(p, p->key, CHAOSI_LATENCY, ms)) return false;
    for (i = 0; i < 6; i++) given |= (unsigned)(ms[i] != UINT_MAX) << i;
    while (kind && chaosi_latency_keys[kind] != given) kind--;
    if (!kind) return chaosi_bad(p, CHAOS_ERR_MISSING_KEY, "\"latency\" takes min and max, or mean and max, or p50, p95, p99 and max");
    f->latency_kind = (chaosi_u8)kind;
    for (i = 0; i < 6; i++) {
        if (!(given >> i & 1u)) continue;
        if (n && ms[i] < f->latency[n - 1]) return chaosi_bad(p, CHAOS_ERR_VALUE, "\"latency\": the values must not fall towards max");
        f->latency[n++] = ms[i];
    }
    return true;
}

/* A rule's name is there, and no other's. */
CHAOSI_FN bool chaosi_rule_name(chaosi_parse *p, chaos_text name) {
    int i;
    if (!name.len) return chaosi_bad(p, CHAOS_ERR_RANGE, "\"name\" must not be empty");
    for (i = 0; i < p->rule; i++)
        if (chaosi_same(chaosi_text_of(p->out, p->out->rules[i].name), chaosi_text_of(p->out, name)))
            return chaosi_bad(p, CHAOS_ERR_DUPLICATE_KEY, "\"name\" is that of rules[%d] too", i);
    return true;
}

/* The last token as one of the key's words. */
CHAOSI_FN bool chaosi_which_word(chaosi_parse *p, long long *v) {
    const chaosi_key *k = p->key;
    char word[16];
    size_t n = chaosi_json_decode(&p->j, word, sizeof word);
    for (*v = k->lo; *v <= k->hi && !chaosi_same(chaosi_of(word, n), chaosi_word(k->words, *v - k->lo)); ++*v) {}
    return *v <= k->hi || chaosi_bad(p, CHAOS_ERR_VALUE, "\"%s\" must be %s", k->name, k->words);
}

CHAOSI_FN bool chaosi_value(chaosi_parse *p, const chaosi_key *k, void *at) {
    chaos_text *text = (chaos_text *)at;
    long long v = 0, bits;
    char t;
    p->key = k;
    if (k->kind == 'r') {
        p->rules = p->j;
        return chaosi_json_skip(&p->j) != 0;
    }
    t = chaosi_expect(p, k->tokens);
    if (!t) return false;
    switch (k->kind) {
    case 's': return chaosi_keep(p, text) && (p->rule < 0 || !(k->where & CHAOSI_NAME) || chaosi_rule_name(p, *text));
    case 'd': return chaosi_latency(p, t == '0', (chaos_fault *)at);
    case 'm': return chaosi_object(p, k, CHAOSI_MATCH, at);
    case 'e': return chaosi_expires(p, t == '0', (long long *)at);
    case 'l': return chaosi_list(p, (chaos_list *)at);
    case 'b': v = t == 't'; break;
    case 'w':
        if (!chaosi_which_word(p, &v)) return false;
        break;
    case 'W':
        for (bits = 0; (t = chaosi_expect(p, "\"]")) == '"'; bits |= 1ll << v)
            if (!chaosi_which_word(p, &v)) return false;
        if (!t) return false;
        v = bits;
        break;
    default:
        if (!chaosi_int(p, &v)) return false;
    }
    if (at == &p->out->seed) p->out->has_seed = true;
    chaosi_set(k, at, v);
    return true;
}

/* Reads an object with such keys into the struct `in`; of = the object's own key, NULL = the config or a rule. */
CHAOSI_FN bool chaosi_object(chaosi_parse *p, const chaosi_key *of, int where, void *in) {
    chaosi_u64 seen = 0;
    char t;
    while ((t = chaosi_json_next(&p->j)) != '}') {
        const chaosi_key *k = t ? chaosi_which_key(p, of, where, &seen) : NULL;
        if (!k || !chaosi_value(p, k, (char *)in + (where & CHAOSI_RULE ? k->in_rule : k->at))) return false;
    }
    return true;
}

CHAOSI_FN bool chaosi_rules(chaosi_parse *p) {
    chaos_config *cfg = p->out;
    chaos_rule *rule;
    size_t start;
    char t;
    p->j = p->rules;
    for (p->key = CHAOSI_RULES, t = chaosi_expect(p, "["); t && (t = chaosi_expect(p, "{]")) == '{'; p->key = CHAOSI_RULES) {
        if (cfg->rule_count == CHAOS_MAX_RULES) return chaosi_bad(p, CHAOS_ERR_TOO_LARGE, "over %d \"rules\"", CHAOS_MAX_RULES);
        start = p->j.start;
        p->rule = cfg->rule_count++;
        rule = &cfg->rules[p->rule];
        rule->fault = cfg->fault;
        if (!chaosi_object(p, NULL, CHAOSI_RULE, rule)) return false;
        p->j.start = start;
        if (!rule->name.len) return chaosi_bad(p, CHAOS_ERR_MISSING_KEY, "a rule needs a \"name\"");
        p->rule = -1;
    }
    return t != 0;
}

chaos_result chaos_config_parse(chaos_config *out, const char *json, size_t len, chaos_error *err) {
    chaos_error local, *e = err ? err : &local;
    chaosi_parse p = {{json, len, 0, e, 'v', 0, 0, 0, 0}, {NULL, 0, 0, NULL, '\0', 0, 0, 0, 0}, out, NULL, -1};
    char t;
    chaosi_no_error(e);
    chaosi_config_default(out);
    if (len > CHAOS_CONFIG_INPUT_MAX) return chaosi_fail(e, CHAOS_ERR_TOO_LARGE, "the config is over %d bytes", CHAOS_CONFIG_INPUT_MAX);
    t = chaosi_json_next(&p.j);
    if (t && t != '{') chaosi_bad(&p, CHAOS_ERR_TYPE, "a config is an object: {\"enabled\": ...}");
    else if (t && chaosi_object(&p, NULL, CHAOSI_TOP, out) && chaosi_json_next(&p.j) && p.rules.text) chaosi_rules(&p);
    if (e->code) chaosi_config_default(out); /* nothing half-applied */
    return e->code;
}

CHAOSI_FN void chaosi_put_key(chaosi_out *o, const char *key) {
    if (o->last != '{') chaosi_puts(o, ",");
    chaosi_puts(o, "\"");
    chaosi_puts(o, key);
    chaosi_puts(o, "\":");
}

CHAOSI_FN void chaosi_put_number(chaosi_out *o, const char *key, long long value) {
    chaosi_put_key(o, key);
    chaosi_put_int(o, value);
}

CHAOSI_FN void chaosi_put_text(chaosi_out *o, const chaos_config *cfg, const char *key, chaos_text text) {
    chaosi_put_key(o, key);
    chaosi_put_json(o, chaosi_text_of(cfg, text));
}

/* Is this what a reader takes when the key is not there: the default, or in a rule what the top level (base) says? */
CHAOSI_FN bool chaosi_is_default(const chaos_config *cfg, const chaosi_key *k, const void *at, const void *base) {
    static const chaos_fault none = {0, 0, 0, 0, 0, 0, 0, {0, 0, 0, 0}, 0, 0, {0, 0}}; /* and an empty text */
    const void *was = base ? base : &none;
    const chaos_fault *f = (const chaos_fault *)at, *g = (const chaos_fault *)was;
    const chaos_match *m = (const chaos_match *)at;
    switch (k->kind) {
    case 's': return chaosi_same(chaosi_text_of(cfg, *(const chaos_text *)at), chaosi_text_of(cfg, *(const chaos_text *)was));
    case 'd': return f->latency_kind == g->latency_kind && memcmp(f->latency, g->latency, sizeof f->latency) == 0;
    case 'm': return !m->methods.count && !m->paths.count && !m->headers.count;
    case 'l': return at == &cfg->exclude ? cfg->default_exclude : !((const chaos_list *)at)->count;
    case 'r': return !cfg->rule_count;
    case '-': return true;
    default: break;
    }
    if (at == &cfg->seed) return !cfg->has_seed;
    return chaosi_get(k, at) == (base ? chaosi_get(k, base) : k->def);
}

/* Writes an object: the keys that may stand there, but for defaults. */
CHAOSI_FN void chaosi_put_keys(chaosi_out *o, const chaos_config *cfg, int where, const void *in);

CHAOSI_FN void chaosi_put_value(chaosi_out *o, const chaos_config *cfg, const chaosi_key *k, const void *at) {
    long long v = strchr("bnwWe", k->kind) ? chaosi_get(k, at) : 0;
    const chaos_list *list = (const chaos_list *)at;
    const chaos_fault *f = (const chaos_fault *)at;
    unsigned ms[6], n = 0;
    char when[80];
    int i;
    chaosi_put_key(o, k->name);
    switch (k->kind) {
    case 'b': chaosi_puts(o, v ? "true" : "false"); return;
    case 'w': chaosi_put_json(o, chaosi_word(k->words, v - k->lo)); return;
    case 'W':
        chaosi_puts(o, "[");
        for (i = 0; i <= (int)k->hi; i++) {
            if (!(v >> i & 1)) continue;
            if (o->last != '[') chaosi_puts(o, ",");
            chaosi_put_json(o, chaosi_word(k->words, i));
        }
        chaosi_puts(o, "]");
        return;
    case 'e': chaosi_put_json(o, chaosi_str(v < 0 ? "never" : chaosi_rfc3339(when, v, false))); return;
    case 's': chaosi_put_json(o, chaosi_text_of(cfg, *(const chaos_text *)at)); return;
    case 'l':
        chaosi_puts(o, k->lo == 'H' ? "{" : "[");
        for (i = 0; i < list->count; i++) {
            if (k->lo == 'H') chaosi_put_key(o, cfg->text + cfg->items[list->first + i++].at);
            else if (i) chaosi_puts(o, ",");
            chaosi_put_json(o, chaosi_item(cfg, *list, i));
        }
        chaosi_puts(o, k->lo == 'H' ? "}" : "]");
        return;
    case 'd':
        for (i = 0; i < 6; i++) ms[i] = chaosi_latency_keys[f->latency_kind & 3] >> i & 1u ? f->latency[n++] : UINT_MAX;
        if (f->latency_kind) chaosi_put_keys(o, cfg, CHAOSI_LATENCY, ms);
        else chaosi_put_int(o, f->latency[0]);
        return;
    case 'm': chaosi_put_keys(o, cfg, CHAOSI_MATCH, at); return;
    case 'n': chaosi_put_int(o, v); return;
    default:
        for (i = 0; i < cfg->rule_count; i++) {
            chaosi_puts(o, i ? "," : "[");
            chaosi_put_keys(o, cfg, CHAOSI_RULE, &cfg->rules[i]);
        }
        chaosi_puts(o, "]");
    }
}

CHAOSI_FN void chaosi_put_keys(chaosi_out *o, const chaos_config *cfg, int where, const void *in) {
    const chaosi_key *k;
    int bit;
    chaosi_puts(o, "{");
    for (bit = 1; bit <= where; bit *= 2)
        for (k = chaosi_keys; k < CHAOSI_KEYS_END; k++) {
            const char *base = bit == CHAOSI_FAULT ? (const char *)cfg + k->at : NULL;
            size_t at = where & CHAOSI_RULE ? k->in_rule : k->at;
            if (!(k->where & where & bit) || chaosi_is_default(cfg, k, (const char *)in + at, base)) continue;
            chaosi_put_value(o, cfg, k, (const char *)in + at);
        }
    chaosi_puts(o, "}");
}

size_t chaos_config_format(const chaos_config *cfg, char *buf, size_t cap) {
    chaosi_out o = chaosi_into(buf, cap);
    chaosi_put_keys(&o, cfg, CHAOSI_TOP, cfg);
    return o.len;
}

/* ==== >>judge ================================================================================================= */
/* The manual says how a roll is made: never a hit at 0 %, always one at 100, and whoever is hit at r is hit at r + 1. */
#define CHAOSI_PATH_MAX 1024 /* longer paths are never touched */
enum { CHAOSI_ROLL_ERROR = 1, CHAOSI_ROLL_DELAY, CHAOSI_ROLL_AMOUNT };

CHAOSI_FN chaosi_u32 chaosi_roll(chaosi_u64 base, chaosi_u64 key, chaosi_u64 purpose) {
    return (chaosi_u32)(chaosi_mix((base ^ key) + purpose * 0xd1342543de82ef95ull) >> 32);
}

CHAOSI_FN chaosi_u32 chaosi_of_10000(chaosi_u32 roll) { return (chaosi_u32)((chaosi_u64)roll * 10000 >> 32); }
CHAOSI_FN bool chaosi_hits(chaosi_u32 roll, unsigned percent) { return chaosi_of_10000(roll) < percent * 100; }

/* -ln(u) in 1/65536 for u = (roll + 1) / 2^32: log2 by its leading bit and a table with linear interpolation, then
   times ln 2. Whole numbers only, so every machine agrees; the error is under 1/8000. */
CHAOSI_FN chaosi_u64 chaosi_minus_ln(chaosi_u32 roll) {
    static const chaosi_u16 log2_table[33] = {/* 65536 * log2(1 + i/32), the last one cut to 16 bits */
                                              0,     2909,  5732,  8473,  11136, 13727, 16248, 18704, 21098, 23433, 25711,
                                              27936, 30109, 32234, 34312, 36346, 38336, 40286, 42196, 44068, 45904, 47705,
                                              49472, 51207, 52911, 54584, 56229, 57845, 59434, 60997, 62534, 64047, 65535};
    chaosi_u64 u = (chaosi_u64)roll + 1, fraction, i;
    int top = 32;
    while (!(u >> top)) top--;
    fraction = (u << (32 - top)) & 0xffffffffull;
    i = fraction >> 27;
    u = ((chaosi_u64)top << 16) + log2_table[i] + ((chaosi_u64)(log2_table[i + 1] - log2_table[i]) * (fraction & 0x7ffffff) >> 27);
    return ((32ull << 16) - u) * 45426 >> 16; /* 65536 * ln 2 */
}

/* A point on the line through (0,0), (50 %,p50), (95 %,p95), (99 %,p99), (100 %,max); roll is the 32-bit share. */
CHAOSI_FN chaosi_u64 chaosi_quantile_us(const unsigned *ms, chaosi_u32 roll) {
    static const chaosi_u32 at[5] = {0, 0x80000000u, 0xf3333333u, 0xfd70a3d7u, 0xffffffffu};
    chaosi_u64 low;
    int i = 0;
    while (i < 3 && roll >= at[i + 1]) i++;
    low = i ? ms[i - 1] : 0;
    return low * 1000 + (ms[i] - low) * 1000 * (roll - at[i]) / (at[i + 1] - at[i]);
}

CHAOSI_FN unsigned chaosi_delay_us(const chaos_fault *f, chaosi_u32 roll) {
    chaosi_u64 a = (chaosi_u64)f->latency[0] * 1000, b = (chaosi_u64)f->latency[1] * 1000, us;
    switch (f->latency_kind) {
    case CHAOS_LATENCY_UNIFORM: return (unsigned)(a + ((b - a + 1) * roll >> 32));
    case CHAOS_LATENCY_EXPONENTIAL: us = a * chaosi_minus_ln(roll) >> 16; return (unsigned)(us < b ? us : b);
    case CHAOS_LATENCY_QUANTILES: return (unsigned)chaosi_quantile_us(f->latency, roll);
    default: return (unsigned)a;
    }
}

/* The rolls on one set of fault keys; base = mix(seed ^ hash of the rule's name). An error short-circuits the delay. */
CHAOSI_FN void chaosi_roll_faults(const chaos_fault *f, chaosi_u64 base, chaosi_u64 key, chaos_verdict *v) {
    chaosi_u32 roll = chaosi_roll(base, key, CHAOSI_ROLL_ERROR);
    v->key = key;
    v->roll = (chaosi_u16)chaosi_of_10000(roll);
    if (chaosi_hits(roll, f->error_rate)) {
        v->kind = f->error_mode;
        v->after = f->error_after;
        v->status = f->error_mode == CHAOS_STATUS ? f->error_status : 0;
        return;
    }
    v->bandwidth = f->bandwidth;
    if (v->bandwidth) v->kind = CHAOS_PACE;
    if (f->latency_rate < 100 && !chaosi_hits(chaosi_roll(base, key, CHAOSI_ROLL_DELAY), f->latency_rate)) return;
    v->delay_us = chaosi_delay_us(f, f->latency_kind ? chaosi_roll(base, key, CHAOSI_ROLL_AMOUNT) : 0);
    if (v->delay_us) v->kind = CHAOS_DELAY;
}

/* Glob: `*` matches any run without `stop`, `**` any run; all else stands for itself. stop 0 = both match any run. */
CHAOSI_FN bool chaosi_glob(chaosi_span pattern, chaosi_span text, char stop) {
    size_t p = 0, t = 0, star = SIZE_MAX, star_t = 0, wide = SIZE_MAX, wide_t = 0; /* where to go on after a mismatch */
    for (;;) {
        if (p < pattern.len && pattern.at[p] == '*') {
            bool is_wide = !stop || (p + 1 < pattern.len && pattern.at[p + 1] == '*');
            while (p < pattern.len && pattern.at[p] == '*') p++;
            star = is_wide ? SIZE_MAX : p;
            star_t = t;
            if (is_wide) wide = p;
            if (is_wide) wide_t = t;
        } else if (p == pattern.len && t == text.len) {
            return true;
        } else if (p < pattern.len && t < text.len && pattern.at[p] == text.at[t]) {
            p++;
            t++;
        } else if (star != SIZE_MAX && star_t < text.len && text.at[star_t] != stop) {
            p = star;
            t = ++star_t;
        } else if (wide != SIZE_MAX && wide_t < text.len && !(star != SIZE_MAX && star_t >= text.len)) { /* the rest is nowhere */
            p = wide;
            t = ++wide_t;
            star = SIZE_MAX;
        } else {
            return false;
        }
    }
}

/* A request made ready for matching: spans, the path decoded and without its query. */
typedef struct chaosi_subject {
    const chaos_request *req;
    chaosi_span path;
    char decoded[CHAOSI_PATH_MAX];
} chaosi_subject;

CHAOSI_FN chaosi_span chaosi_given(const char *at, size_t len) {
    if (!at) return chaosi_of("", 0);
    return len ? chaosi_of(at, len) : chaosi_str(at);
}

CHAOSI_FN chaosi_span chaosi_decode_path(chaosi_span raw, char *to) {
    size_t i, n = 0;
    for (i = 0; i < raw.len; i++) {
        int high = raw.at[i] == '%' && i + 2 < raw.len ? chaosi_hex(raw.at[i + 1]) : -1;
        int low = high >= 0 ? chaosi_hex(raw.at[i + 2]) : -1;
        if (low >= 0) i += 2;
        to[n++] = low >= 0 ? (char)(high * 16 + low) : raw.at[i];
    }
    return chaosi_of(to, n);
}

/* False = the path is too long to look at. */
CHAOSI_FN bool chaosi_ready(chaosi_subject *s, const chaos_request *req) {
    chaosi_span raw = chaosi_given(req ? req->path : NULL, req ? req->path_len : 0);
    const char *query = (const char *)memchr(raw.at, '?', raw.len);
    if (query) raw.len = (size_t)(query - raw.at);
    if (raw.len > CHAOSI_PATH_MAX) return false;
    s->req = req;
    s->path = memchr(raw.at, '%', raw.len) ? chaosi_decode_path(raw, s->decoded) : raw;
    return true;
}

/* The value of a request header, at NULL = none. */
CHAOSI_FN chaosi_span chaosi_header_of(const chaosi_subject *s, const char *name) {
    size_t len = 0;
    const char *value = s->req && s->req->header ? s->req->header(s->req->user, name, &len) : NULL;
    return chaosi_of(value, value ? len : 0);
}

/* Does any glob of the list match? */
CHAOSI_FN bool chaosi_any(const chaos_config *cfg, chaos_list globs, chaosi_span text, char stop) {
    int i = 0;
    while (i < globs.count && !chaosi_glob(chaosi_item(cfg, globs, i), text, stop)) i++;
    return i < globs.count;
}

CHAOSI_FN bool chaosi_matches(const chaos_config *cfg, const chaos_match *m, const chaosi_subject *s) {
    int i;
    if (m->methods.count) {
        chaosi_span method = chaosi_given(s->req ? s->req->method : NULL, s->req ? s->req->method_len : 0);
        for (i = 0; i < m->methods.count && !chaosi_same(chaosi_item(cfg, m->methods, i), method); i++) {}
        if (i == m->methods.count) return false;
    }
    if (m->paths.count && !chaosi_any(cfg, m->paths, s->path, '/')) return false;
    for (i = 0; i < m->headers.count; i += 2) {
        chaosi_span value = chaosi_header_of(s, cfg->text + cfg->items[m->headers.first + i].at);
        if (!value.at || !chaosi_glob(chaosi_item(cfg, m->headers, i + 1), value, 0)) return false;
    }
    return true;
}

/* The list that spares health checks when `exclude` is not given. "/healthz" is in "/health*". */
CHAOSI_FN bool chaosi_default_excluded(const chaosi_subject *s) {
    static const char *const paths[] = {"/health*", "/livez", "/readyz", "/ping"};
    static const char *const agents[] = {"ELB-HealthChecker/*", "kube-probe/*", "Amazon-Route53-Health-Check-Service*"};
    chaosi_span agent;
    int i;
    for (i = 0; s->path.len > 1 && i < 4; i++)
        if (paths[i][1] == s->path.at[1] && chaosi_glob(chaosi_str(paths[i]), s->path, '/')) return true;
    agent = chaosi_header_of(s, "user-agent");
    for (i = 0; agent.at && i < 3; i++)
        if (chaosi_glob(chaosi_str(agents[i]), agent, 0)) return true;
    return false;
}

/* Takes the fault out of a verdict; what was rolled stays. */
CHAOSI_FN void chaosi_spare(chaos_verdict *v) {
    v->kind = v->after = 0;
    v->status = 0;
    v->delay_us = v->bandwidth = v->ticket = 0;
}

/* Match and rolls. True = a fault would have happened but for `exclude`. */
CHAOSI_FN bool chaosi_judge(const chaos_config *cfg, const chaos_request *req, chaosi_u64 key, chaos_verdict *v) {
    chaosi_subject s;
    chaosi_u64 rule_hash = 0;
    const chaos_fault *fault = &cfg->fault;
    memset(v, 0, sizeof *v);
    if (!cfg->enabled || !chaosi_ready(&s, req) || !chaosi_matches(cfg, &cfg->match, &s)) return false;
    if (cfg->rule_count) {
        int rule = 0;
        while (rule < cfg->rule_count && !chaosi_matches(cfg, &cfg->rules[rule].match, &s)) rule++;
        if (rule == cfg->rule_count) return false;
        fault = &cfg->rules[rule].fault;
        rule_hash = chaosi_hash(chaosi_text_of(cfg, cfg->rules[rule].name));
        v->rule = (chaosi_u16)(rule + 1);
    }
    chaosi_roll_faults(fault, chaosi_mix(cfg->seed ^ rule_hash), key, v);
    if (!v->kind || !(cfg->default_exclude ? chaosi_default_excluded(&s) : chaosi_any(cfg, cfg->exclude, s.path, '/'))) return false;
    chaosi_spare(v);
    return true;
}

/* Share of instances: the hash of the id alone, so that it is sticky over experiments and nested as it grows. 0..99. */
CHAOSI_FN unsigned chaosi_canary_slot(chaosi_span instance) { return (unsigned)((chaosi_mix(chaosi_hash(instance)) >> 32) * 100 >> 32); }

CHAOSI_FN bool chaosi_takes_part(const chaos_config *cfg, chaosi_span instance) {
    return chaosi_canary_slot(instance) < cfg->canary && (!cfg->instances.count || chaosi_any(cfg, cfg->instances, instance, 0));
}

#ifndef CHAOS_COMPILE_OUT
/* ==== >>source ================================================================================================ */
/* Where the bytes come from. A source fills a buffer and says: here, not found, or unreachable. Those with a network behind
   them stand in >>ssm. */
typedef enum chaosi_scheme {
    CHAOSI_NONE,
    CHAOSI_INLINE,
    CHAOSI_ENV,
    CHAOSI_FILE,
    CHAOSI_CALLBACK,
    CHAOSI_SSM,
    CHAOSI_APPCONFIG
} chaosi_scheme;

typedef struct chaosi_source {
    chaosi_scheme scheme;
    bool fetched;     /* read again at every TTL, and leased: from file on */
    char name[256];   /* as shown: "file:chaos.json", "inline", ... */
    char path[4096];  /* or the variable's name, or what stands behind ssm: and appconfig: */
    const char *text; /* inline: the caller's, read in chaos_open only */
} chaosi_source;

CHAOSI_FN const char *chaosi_env(const char *name) {
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}

/* Size and time of a file, to see whether it changed while it was read. */
CHAOSI_FN bool chaosi_same_file(const struct stat *a, const struct stat *b) {
#if defined(st_mtime) && !defined(_WIN32)
    if (a->st_mtim.tv_nsec != b->st_mtim.tv_nsec) return false;
#endif
    return a->st_size == b->st_size && a->st_mtime == b->st_mtime && a->st_ino == b->st_ino;
}

/* A file that changes meanwhile is read again, up to five times. */
CHAOSI_FN chaos_result chaosi_read_file(const char *path, char *buf, size_t cap, size_t *len, chaos_error *err) {
    int tries;
    for (tries = 0; tries < 5; tries++) {
        const char *failed = NULL;
        struct stat before, after;
        FILE *f = NULL;
        if (stat(path, &before) != 0) failed = "stat";
        else if ((before.st_mode & S_IFMT) != S_IFREG) return chaosi_fail(err, CHAOS_ERR_UNREACHABLE, "%s is not a regular file", path);
        else if (!(f = fopen(path, "rb"))) failed = "open";
        else if (*len = fread(buf, 1, cap, f), ferror(f)) failed = "read";
        if (failed && (errno == ENOENT || errno == ENOTDIR)) chaosi_fail(err, CHAOS_ERR_NOT_FOUND, "no file %s", path);
        else if (failed) chaosi_fail(err, CHAOS_ERR_UNREACHABLE, "%s %s: %s", failed, path, strerror(errno));
        if (f) fclose(f);
        if (failed) return err->code;
        if (stat(path, &after) == 0 && chaosi_same_file(&before, &after)) return CHAOS_OK;
    }
    return chaosi_fail(err, CHAOS_ERR_UNREACHABLE, "%s changes while it is read", path);
}

/* cap is one more than a config may have, so that "too large" is seen by the parser. */
CHAOSI_FN chaos_result chaosi_fetch(const chaosi_source *s, const chaos_desc *d, char *buf, size_t cap, chaos_fetched *out,
                                    chaos_error *err) {
    const char *text = s->scheme == CHAOSI_ENV ? chaosi_env(s->path) : s->text;
    memset(out, 0, sizeof *out);
    chaosi_no_error(err);
    if (s->scheme == CHAOSI_CALLBACK) return d->fetch(d->fetch_user, buf, cap, out, err);
    if (s->scheme == CHAOSI_FILE) return chaosi_read_file(s->path, buf, cap, &out->len, err);
    if (!text) return chaosi_fail(err, CHAOS_ERR_NOT_FOUND, "%s is not in the environment", s->path);
    out->len = strlen(text) < cap ? strlen(text) : cap;
    memcpy(buf, text, out->len);
    return CHAOS_OK;
}

/* Reads the source's form; text NULL = none. */
CHAOSI_FN chaos_result chaosi_source_of(chaosi_source *s, const chaos_desc *desc, const char *text, chaos_error *err) {
    static const struct {
        const char *start;
        chaosi_scheme scheme;
    } forms[] = {{"{", CHAOSI_INLINE},   {"[", CHAOSI_INLINE}, {"env:", CHAOSI_ENV},
                 {"file:", CHAOSI_FILE}, {"ssm:", CHAOSI_SSM}, {"appconfig:", CHAOSI_APPCONFIG}};
    const char *query;
    size_t i;
    memset(s, 0, sizeof *s);
    s->scheme = desc->fetch ? CHAOSI_CALLBACK : CHAOSI_NONE;
    if (text) text += strspn(text, " \t\r\n");
    s->text = text;
    for (i = 0; text && !s->scheme && i < sizeof forms / sizeof forms[0]; i++)
        if (strncmp(text, forms[i].start, strlen(forms[i].start)) == 0) s->scheme = forms[i].scheme;
    if (text && !s->scheme)
        return chaosi_fail(err, CHAOS_ERR_ARGUMENT,
                           "config source \"%.60s\" is none of ssm:NAME, appconfig:APP/ENV/PROFILE, file:PATH, env:NAME or JSON text",
                           text);
#ifdef CHAOS_NO_SSM
    if (s->scheme >= CHAOSI_SSM)
        return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "config source \"%.80s\": not in this build (CHAOS_NO_SSM)", text);
#endif
    s->fetched = s->scheme >= CHAOSI_FILE;
    chaosi_copy(s->name, sizeof s->name, desc->fetch ? "callback" : !text ? "none" : s->scheme == CHAOSI_INLINE ? "inline" : text);
    if (s->scheme < CHAOSI_ENV || s->scheme == CHAOSI_CALLBACK) return CHAOS_OK;
    text = strchr(text, ':') + 1;
    if (!*text) return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "config source \"%s\" names nothing", s->name);
    if (strlen(text) >= sizeof s->path)
        return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "config source: the path is over %u bytes", (unsigned)sizeof s->path - 1);
    chaosi_copy(s->path, sizeof s->path, text);
    query = strchr(text, '?');
    if (s->scheme == CHAOSI_SSM && (query == text || (query && (strncmp(query, "?region=", 8) != 0 || !query[8]))))
        return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "config source \"%.80s\" must be ssm:NAME or ssm:NAME?region=REGION", s->name);
    for (i = 0, query = text; s->scheme == CHAOSI_APPCONFIG && *query; query++) i += *query == '/';
    if (s->scheme == CHAOSI_APPCONFIG && (i != 2 || *text == '/' || query[-1] == '/' || strstr(text, "//")))
        return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "config source \"%.80s\" must be appconfig:APP/ENV/PROFILE", s->name);
    return CHAOS_OK;
}

/* ==== >>cache ================================================================================================= */
/* The config in use, as readers see it, and what keeps it fresh.

   Readers: `armed` alone tells off from on. On, a small block (`hot`) is read under a sequence counter: enough for a config
   of rates and delays. Anything with lists or rules lives in one of CHAOSI_SLOTS slots; a reader counts itself in before it
   looks, a writer reuses a slot only when it is not current and nobody is inside. Nothing is freed before chaos_close.

   Writers: `fetch_lock` (one fetch at a time, may be held long) then `lock` (short; state and times). */
#define CHAOSI_SLOTS          4
#define CHAOSI_LEASE_MS       3600000ull
#define CHAOSI_BACKOFF_MAX_MS 30000ull
#define CHAOSI_TICK_MS        1000ull  /* while on: summaries */
#define CHAOSI_BEAT_MS        60000ull /* while on: the heartbeat */

typedef struct chaosi_hot {
    chaosi_u64 until_mono, until_wall; /* ns: the end or the age limit, whichever comes first; set when published */
    chaosi_u64 base;                   /* of the top-level rolls */
    chaos_fault fault;
    chaosi_u32 version, serial; /* serial: counts configs, for the budgets */
    chaosi_u32 max_faults, max_concurrent;
    chaosi_u8 simple; /* no match, rules or own exclude list: `fault` is all there is */
    chaosi_u8 dry_run, events;
    chaosi_u8 off; /* "enabled" is false, or this instance takes no part */
} chaosi_hot;

#define CHAOSI_HOT_WORDS (sizeof(chaosi_hot) / sizeof(chaosi_u64))
typedef char chaosi_hot_is_whole_words[sizeof(chaosi_hot) % sizeof(chaosi_u64) == 0 ? 1 : -1];

typedef struct chaosi_slot {
    chaosi_u32 readers;
    chaosi_hot hot;
    chaos_config cfg;
} chaosi_slot;

typedef enum chaosi_loaded { CHAOSI_LOADED_NOTHING, CHAOSI_LOADED_GOOD, CHAOSI_LOADED_NOT_FOUND, CHAOSI_LOADED_INVALID } chaosi_loaded;
typedef enum chaosi_news { CHAOSI_OPENED, CHAOSI_NEW_STATE, CHAOSI_NEW_CONFIG, CHAOSI_FETCH_FAILED, CHAOSI_BEAT, CHAOSI_TICK } chaosi_news;

/* Counters, the words of chaos_report from `requests` on. Each thread adds to one of a few stripes, so that two threads do
   not fight over a cache line; a reader sums the stripes. */
#define CHAOSI_STRIPES     16
#define CHAOSI_WORD(field) ((offsetof(chaos_report, field) - offsetof(chaos_report, requests)) / sizeof(chaosi_u64))
#define CHAOSI_WORDS       (CHAOSI_WORD(upstream_errors) + 1)

typedef struct chaosi_stripe {
    chaosi_u64 order; /* 1 for the stripe used first, and so on; 0 = not used */
    chaosi_u64 words[CHAOSI_WORDS];
    char gap[64];
} chaosi_stripe;

#define CHAOSI_WAKE(c) (&(c)->pipes[0])
#define CHAOSI_STOP(c) (&(c)->pipes[2])
#define CHAOSI_POKE(c) (&(c)->pipes[4])
#define CHAOSI_BELL(c) (&(c)->pipes[6])
#define CHAOSI_PIPES   8

struct chaos {
    chaosi_u32 armed;    /* 1 = on or dry run: all that the off path looks at */
    chaosi_u32 killed;   /* 1 = chaos_off, 2 = CHAOS_DISABLE */
    chaosi_u32 sequence; /* odd while hot is written */
    chaosi_u32 modes;    /* bit k: this mode of use can do chaos_kind k */
    chaosi_u64 hot[CHAOSI_HOT_WORDS];
    chaosi_u64 instance_hash;
    char gap[64]; /* what every request reads stands apart from what it writes */
    chaosi_stripe stripes[CHAOSI_STRIPES];
    chaosi_u64 stripe_order, log_faults, log_summed, log_second;
    chaosi_u32 log_in_second, waiting, connections_now, unsupported_told, closing;
    chaosi_u32 cancels;  /* counts calls that end a fetch in progress: stop, off, close */
    chaosi_u64 budget;   /* serial << 32 | faults done, for maxFaults */
    chaosi_u32 *tickets; /* CHAOS_MAX_CONCURRENT places; odd = taken */

    /* From here: under `lock`, or set once in chaos_open. */
    chaos_desc desc;
    chaosi_source source;
    chaos_result (*remote)(chaos *c, char *buf, size_t cap, chaos_fetched *out, chaos_error *err); /* ssm:, appconfig: */
    const char *way;           /* that it took, under fetch_lock; NULL = none yet */
    chaosi_u32 cancels_before; /* when this fetch was asked for, under fetch_lock */
    void *keys;                /* credentials that it keeps, NULL = it keeps none */
    bool emf;
    chaosi_u32 fetch_ms; /* how long a fetch may take, 0 = as it likes */
    char instance[128], service[128];
    chaosi_u64 seed;
    chaosi_loaded loaded;
    chaos_report told;            /* the state as last told, the problem, the version, the counts of fetches and configs */
    chaosi_u32 current;           /* slot */
    chaosi_u64 content, modified; /* of the current bytes */
    chaosi_u64 end_mono, end_wall, fresh_mono, fresh_wall, until, next_fetch, next_beat; /* ns; CHAOSI_NEVER = none */
    bool end_is_lease, has_refresher;
    unsigned failing; /* fetches failed in a row */
    void (*tell)(chaos *c, chaosi_news what);
    chaosi_slot *slots;
    char *bytes; /* CHAOS_CONFIG_INPUT_MAX + 1 */
    int log_fd, emf_fd;
    int pipes[CHAOSI_PIPES]; /* pairs: not on; chaos_proxy_stop; for the refresher; for the proxy's run; -1 = none */
    long pid;                /* a fork's child must not touch the pipes it shares */
#ifdef CHAOSI_THREADS
    pthread_mutex_t fetch_lock, lock;
    pthread_t refresher;
#endif
};

#ifdef CHAOSI_THREADS
#define CHAOSI_LOCK(m)    pthread_mutex_lock(m)
#define CHAOSI_UNLOCK(m)  pthread_mutex_unlock(m)
#define CHAOSI_TRYLOCK(m) (pthread_mutex_trylock(m) == 0)
#else
#define CHAOSI_LOCK(m)    ((void)0)
#define CHAOSI_UNLOCK(m)  ((void)0)
#define CHAOSI_TRYLOCK(m) true
#endif

CHAOSI_FN chaosi_u64 chaosi_now(const chaos *c, bool wall) {
    return c->desc.clock ? c->desc.clock(c->desc.clock_user, wall) : chaosi_clock(wall);
}

CHAOSI_FN chaosi_u64 chaosi_now_coarse(const chaos *c, bool wall) {
    return CHAOSI_UNLIKELY(c->desc.clock != NULL) ? c->desc.clock(c->desc.clock_user, wall) : chaosi_clock_coarse(wall);
}

/* How late the coarse clock may be: chaos ends that much early rather than late. */
CHAOSI_FN chaosi_u64 chaosi_coarse(const chaos *c) { return c->desc.clock ? 0 : 10 * CHAOSI_MS; }

/* The stripe of this thread. */
CHAOSI_HOT chaosi_stripe *chaosi_stripe_of(chaos *c) {
#ifdef CHAOSI_THREADS
    pthread_t self = pthread_self(); /* opaque: hashed by its first bytes */
    chaosi_u64 bits = 0;
    memcpy(&bits, &self, sizeof self < sizeof bits ? sizeof self : sizeof bits);
    return &c->stripes[bits * 0x9e3779b97f4a7c15ull >> 60];
#else
    return c->stripes;
#endif
}

CHAOSI_FN void chaosi_count(chaos *c, size_t word, chaosi_u64 n) { CHAOSI_ADD(&chaosi_stripe_of(c)->words[word], n); }

/* A number for each request: in one thread 0, 1, 2...; other threads count in ranges of their own. */
CHAOSI_HOT chaosi_u64 chaosi_next_number(chaos *c) {
    chaosi_stripe *s = chaosi_stripe_of(c);
    chaosi_u64 order = CHAOSI_LOAD(&s->order), none = 0;
    if (CHAOSI_UNLIKELY(!order)) {
        order = CHAOSI_ADD(&c->stripe_order, 1u) + 1;
        if (!CHAOSI_CAS(&s->order, &none, order)) order = none;
    }
    return ((order - 1) << 48) + CHAOSI_ADD(&s->words[CHAOSI_WORD(requests)], 1u);
}

/* Sums of times stop at CHAOSI_NEVER, differences at 0. */
CHAOSI_FN chaosi_u64 chaosi_later(chaosi_u64 a, chaosi_u64 b) { return a > CHAOSI_NEVER - b ? CHAOSI_NEVER : a + b; }
CHAOSI_FN chaosi_u64 chaosi_min(chaosi_u64 a, chaosi_u64 b) { return a < b ? a : b; }
CHAOSI_FN chaosi_u64 chaosi_less(chaosi_u64 a, chaosi_u64 b) { return a > b ? a - b : 0; }

CHAOSI_HOT void chaosi_read_hot(chaos *c, chaosi_hot *out) {
    chaosi_u32 before, after;
    chaosi_u64 word;
    size_t i;
    do {
        before = CHAOSI_ACQUIRE(&c->sequence);
        for (i = 0; i < CHAOSI_HOT_WORDS; i++) {
            word = CHAOSI_ACQUIRE(&c->hot[i]);
            memcpy((char *)out + i * sizeof word, &word, sizeof word);
        }
        after = CHAOSI_LOAD(&c->sequence);
    } while (CHAOSI_UNLIKELY(before != after || (before & 1u)));
}

/* Counts the caller into the slot that is current; it must leave. */
CHAOSI_FN chaosi_slot *chaosi_enter(chaos *c) {
    for (;;) {
        chaosi_u32 current = CHAOSI_SEQ(&c->current);
        CHAOSI_ENTER(&c->slots[current].readers, 1u);
        if (CHAOSI_SEQ(&c->current) == current) return &c->slots[current];
        CHAOSI_ENTER(&c->slots[current].readers, ~0u);
    }
}

CHAOSI_FN void chaosi_leave(chaosi_slot *slot) { CHAOSI_ENTER(&slot->readers, ~0u); }

/* -- the pipes, and waiting on them -- */
#ifdef CHAOSI_POSIX
CHAOSI_FN void chaosi_nap(chaosi_u64 ns) {
    struct timespec t;
    t.tv_sec = (time_t)(ns / 1000000000u);
    t.tv_nsec = (long)(ns % 1000000000u);
    if (ns) nanosleep(&t, NULL);
}

/* False in a fork's child. */
CHAOSI_FN bool chaosi_own(const chaos *c) { return (long)getpid() == c->pid; }

/* One byte; a full pipe is readable already. Async-signal-safe, keeps errno. */
CHAOSI_FN void chaosi_ring(chaos *c, int fd) {
    int saved = errno;
    ssize_t n = chaosi_own(c) ? write(fd, "", 1) : 0;
    (void)n;
    errno = saved;
}

CHAOSI_FN void chaosi_drain(chaos *c, int fd) {
    char bytes[64];
    while (chaosi_own(c) && read(fd, bytes, sizeof bytes) > 0) {}
}

/* As poll does, for one or two descriptors (-1 = none) to read. */
CHAOSI_FN int chaosi_ready_within(int fd, int fd2, int ms) {
    struct pollfd p[2] = {{fd, POLLIN, 0}, {fd2, POLLIN, 0}};
    return poll(p, 2, ms);
}

CHAOSI_FN bool chaosi_readable(int fd) { return chaosi_ready_within(fd, -1, 0) > 0; }

/* Sleeps until the deadline (monotonic ns) or until fd or fd2 (-1 = none) is readable: whole milliseconds in poll, the
   rest in nanosleep, because ppoll is not in POSIX.1-2008. */
CHAOSI_FN void chaosi_sleep_until(chaosi_u64 deadline, int fd, int fd2) {
    chaosi_u64 left = chaosi_less(deadline, chaosi_clock(false)), ms = left / CHAOSI_MS;
    if (!left || chaosi_ready_within(fd, fd2, (int)chaosi_min(ms, 60000)) != 0 || ms >= 60000) return;
    chaosi_nap(chaosi_min(chaosi_less(deadline, chaosi_clock(false)), CHAOSI_MS));
}

CHAOSI_FN bool chaosi_open_pipes(chaos *c) {
    int i;
    c->pid = (long)getpid();
    for (i = 0; i < CHAOSI_PIPES; i++) {
        if (i % 2 == 0 && pipe(&c->pipes[i]) != 0) return false;
        if (c->pipes[i] < 3) { /* the program was started without stderr: log lines must not come in here */
            int low = c->pipes[i];
            c->pipes[i] = fcntl(low, F_DUPFD, 3);
            close(low);
            if (c->pipes[i] < 0) return false;
        }
        fcntl(c->pipes[i], F_SETFD, FD_CLOEXEC);
        fcntl(c->pipes[i], F_SETFL, O_NONBLOCK);
    }
    return true;
}

CHAOSI_FN void chaosi_close_pipes(chaos *c) {
    int i;
    for (i = 0; i < CHAOSI_PIPES; i++)
        if (c->pipes[i] >= 0) close(c->pipes[i]);
    if (c->log_fd != 2) close(c->log_fd);
    if (c->emf_fd != 1) close(c->emf_fd);
}
#else
CHAOSI_FN void chaosi_nap(chaosi_u64 ns) { Sleep((DWORD)(ns / CHAOSI_MS)); }
CHAOSI_FN bool chaosi_own(const chaos *c) { return c != NULL; }
CHAOSI_FN void chaosi_ring(chaos *c, int fd) { (void)c, (void)fd; }
CHAOSI_FN void chaosi_drain(chaos *c, int fd) { (void)c, (void)fd; }
CHAOSI_FN bool chaosi_readable(int fd) { return (void)fd, false; }
CHAOSI_FN bool chaosi_open_pipes(chaos *c) { return c != NULL; }
CHAOSI_FN void chaosi_close_pipes(chaos *c) { (void)c; }
CHAOSI_FN void chaosi_sleep_until(chaosi_u64 deadline, int fd, int fd2) {
    (void)fd, (void)fd2;
    chaosi_nap(chaosi_min(chaosi_less(deadline, chaosi_clock(false)), 20 * CHAOSI_MS));
}
#endif

/* Not on: `armed`, then the pipe. Async-signal-safe. */
CHAOSI_FN void chaosi_disarm(chaos *c) {
    CHAOSI_ORDERED(&c->armed, 0u);
    chaosi_ring(c, CHAOSI_WAKE(c)[1]);
}

/* The pipe and `armed` follow the state. Under lock. A chaos_off in between is seen by the second look. */
CHAOSI_FN void chaosi_arm(chaos *c, bool on) {
    if (on) chaosi_drain(c, CHAOSI_WAKE(c)[0]);
    if (on) CHAOSI_ORDERED(&c->armed, 1u);
    if (!on || CHAOSI_SEQ(&c->killed) || CHAOSI_SEQ(&c->closing)) chaosi_disarm(c);
}

/* -- state -- */
/* The aws-cli takes half a second of a processor each time: asked less often. */
CHAOSI_FN chaosi_u64 chaosi_ttl_ms(const chaos *c, bool on) {
    if (c->desc.ttl_ms) return (chaosi_u64)c->desc.ttl_ms;
    return !on ? 30000u : strcmp(c->told.way, "cli") == 0 ? 15000u : 10000u;
}

/* How long after a good fetch the config may still be used: its TTL while on, and max_stale beyond. */
CHAOSI_FN chaosi_u64 chaosi_age_limit(const chaos *c) {
    chaosi_u64 stale = c->desc.max_stale_ms > 0 ? (chaosi_u64)c->desc.max_stale_ms : c->desc.max_stale_ms ? 0u : 60000u;
    return c->source.fetched ? (chaosi_ttl_ms(c, true) + stale) * CHAOSI_MS : CHAOSI_NEVER;
}

/* The state at this moment, with its reason: the first row that is so. Under lock; `killed` may come at any time. */
CHAOSI_FN chaos_state chaosi_state_now(chaos *c, char *reason, size_t cap) {
    const chaos_config *cfg = &c->slots[c->current].cfg;
    chaosi_u64 mono = chaosi_now(c, false), wall = chaosi_now(c, true), limit = chaosi_age_limit(c);
    chaosi_u32 killed = CHAOSI_SEQ(&c->killed);
    const struct {
        bool so;
        chaos_state state;
        const char *why;
    } rows[] = {
        {killed == 2, CHAOS_STATE_KILLED, "CHAOS_DISABLE=1 in the environment"},
        {killed != 0, CHAOS_STATE_KILLED, "chaos_off was called"},
        {!c->source.scheme, CHAOS_STATE_OFF, "no config source"},
        {c->loaded == CHAOSI_LOADED_NOTHING, CHAOS_STATE_OFF, c->told.problem[0] ? c->told.problem : "no config yet"},
        {c->loaded == CHAOSI_LOADED_NOT_FOUND, CHAOS_STATE_OFF, c->told.problem},
        {c->loaded == CHAOSI_LOADED_INVALID, CHAOS_STATE_INVALID, c->told.problem},
        {!cfg->enabled, CHAOS_STATE_OFF, "\"enabled\" is false"},
        {mono >= c->end_mono || wall >= c->end_wall, CHAOS_STATE_EXPIRED,
         c->end_is_lease ? "the lease of 60 minutes is over" : "\"expiresAt\" has passed"},
        {mono >= chaosi_later(c->fresh_mono, limit) || wall >= chaosi_later(c->fresh_wall, limit), CHAOS_STATE_STALE,
         "no successful fetch for too long"},
        {!chaosi_takes_part(cfg, chaosi_str(c->instance)), CHAOS_STATE_NOT_CANARY, "this instance does not take part (canary, instances)"},
        {cfg->dry_run, CHAOS_STATE_DRY_RUN, "\"dryRun\" is true"},
        {true, CHAOS_STATE_ON, "\"enabled\" is true"},
    };
    int i = 0;
    while (!rows[i].so) i++;
    chaosi_copy(reason, cap, rows[i].why);
    return rows[i].state;
}

CHAOSI_FN bool chaosi_is_active(chaos_state s) { return s == CHAOS_STATE_ON || s == CHAOS_STATE_DRY_RUN; }

/* Brings state, armed and pipe up to now. True = the state changed. Under lock. */
CHAOSI_FN bool chaosi_settle(chaos *c) {
    chaos_state state = chaosi_state_now(c, c->told.reason, sizeof c->told.reason);
    bool changed = state != c->told.state;
    if (chaosi_is_active(state) != (CHAOSI_LOAD(&c->armed) != 0) || changed) chaosi_arm(c, chaosi_is_active(state));
    if (changed) c->next_beat = chaosi_now(c, false) + CHAOSI_BEAT_MS * CHAOSI_MS;
    c->told.state = state;
    return changed;
}

/* -- taking in what was fetched; all under fetch_lock and lock -- */
/* Writes the hot block from the current config and times. The word stores are releases, so that no reader sees one of them
   without the odd sequence. */
CHAOSI_FN void chaosi_publish(chaos *c) {
    chaosi_hot hot = c->slots[c->current].hot;
    chaosi_u64 words[CHAOSI_HOT_WORDS], limit = chaosi_age_limit(c), coarse = chaosi_coarse(c);
    size_t i;
    c->until = chaosi_min(c->end_mono, chaosi_later(c->fresh_mono, limit));
    hot.until_mono = hot.off ? 0 : chaosi_less(c->until, coarse); /* `armed` falls later */
    hot.until_wall = chaosi_less(chaosi_min(c->end_wall, chaosi_later(c->fresh_wall, limit)), coarse);
    memcpy(words, &hot, sizeof hot);
    CHAOSI_ORDERED(&c->sequence, c->sequence + 1u);
    for (i = 0; i < CHAOSI_HOT_WORDS; i++) CHAOSI_RELEASE(&c->hot[i], words[i]);
    CHAOSI_RELEASE(&c->sequence, c->sequence + 1u);
}

CHAOSI_FN void chaosi_take_problem(chaos *c, const chaos_error *err) {
    char *to = c->told.problem;
    int n = err->line ? snprintf(to, 64, "line %u, column %u: ", err->line, err->column) : 0;
    chaosi_copy(to + n, sizeof c->told.problem - (size_t)n, err->text[0] ? err->text : chaos_result_text(err->code));
}

CHAOSI_FN void chaosi_set_end(chaos *c, const chaos_config *cfg, const chaos_fetched *got) {
    chaosi_u64 now = c->fresh_wall, from = got->modified_ms > 0 ? chaosi_min((chaosi_u64)got->modified_ms * CHAOSI_MS, now) : now;
    c->end_is_lease = cfg->expires_ms == 0 && c->source.fetched;
    if (cfg->expires_ms > 0) c->end_wall = (chaosi_u64)cfg->expires_ms * CHAOSI_MS;
    else c->end_wall = c->end_is_lease ? from + CHAOSI_LEASE_MS * CHAOSI_MS : CHAOSI_NEVER;
    c->end_mono = c->end_wall == CHAOSI_NEVER ? CHAOSI_NEVER : chaosi_later(c->fresh_mono, chaosi_less(c->end_wall, now));
}

/* A slot that is not current and that nobody reads. Readers stay for microseconds, so this ends. */
CHAOSI_FN chaosi_u32 chaosi_free_slot(chaos *c) {
    chaosi_u32 i;
    for (;; chaosi_nap(CHAOSI_MS))
        for (i = 0; i < CHAOSI_SLOTS; i++)
            if (i != c->current && CHAOSI_SEQ(&c->slots[i].readers) == 0) return i;
}

/* New bytes: parse into a free slot, then make that current. True = something to tell. */
CHAOSI_FN bool chaosi_take_bytes(chaos *c, const chaos_fetched *got, chaos_error *err) {
    chaosi_u64 content = chaosi_mix(chaosi_hash(chaosi_of(c->bytes, got->len)) ^ got->version);
    bool known = c->loaded == CHAOSI_LOADED_GOOD || c->loaded == CHAOSI_LOADED_INVALID;
    chaosi_u32 slot;
    chaos_config *cfg;
    chaosi_hot *hot;
    if (known && content == c->content && (chaosi_u64)got->modified_ms == c->modified) {
        c->told.problem[0] = 0; /* what a failed fetch said meanwhile */
        if (c->loaded == CHAOSI_LOADED_INVALID) {
            chaos_config_parse(&c->slots[chaosi_free_slot(c)].cfg, c->bytes, got->len, err);
            chaosi_take_problem(c, err);
        }
        return false;
    }
    c->content = content;
    c->modified = (chaosi_u64)got->modified_ms;
    c->told.version = got->version ? got->version : c->told.version + 1;
    slot = chaosi_free_slot(c);
    cfg = &c->slots[slot].cfg;
    hot = &c->slots[slot].hot;
    if (chaos_config_parse(cfg, c->bytes, got->len, err) != CHAOS_OK) {
        c->loaded = CHAOSI_LOADED_INVALID;
        c->told.config_errors++;
        chaosi_take_problem(c, err);
        return true;
    }
    c->loaded = CHAOSI_LOADED_GOOD;
    c->told.problem[0] = 0;
    if (!cfg->has_seed) cfg->seed = c->seed;
    hot->base = chaosi_mix(cfg->seed);
    hot->fault = cfg->fault;
    hot->version = (chaosi_u32)c->told.version;
    hot->serial = (chaosi_u32)++c->told.config_changes;
    hot->max_faults = cfg->max_faults;
    hot->max_concurrent = cfg->max_concurrent;
    hot->dry_run = cfg->dry_run;
    hot->events = cfg->events;
    hot->off = !cfg->enabled || !chaosi_takes_part(cfg, chaosi_str(c->instance));
    hot->simple =
        !cfg->rule_count && cfg->default_exclude && !(cfg->match.methods.count | cfg->match.paths.count | cfg->match.headers.count);
    chaosi_set_end(c, cfg, got);
    CHAOSI_ORDERED(&c->current, slot);
    return true;
}

/* True = something to tell. */
CHAOSI_FN bool chaosi_take(chaos *c, chaos_result r, const chaos_fetched *got, chaos_error *err) {
    bool news;
    c->told.fetches++;
    if (c->way) chaosi_copy(c->told.way, sizeof c->told.way, c->way);
    if (r == CHAOS_OK) {
        c->failing = 0;
        c->fresh_mono = chaosi_now(c, false);
        c->fresh_wall = chaosi_now(c, true);
        return chaosi_take_bytes(c, got, err);
    }
    if (r == CHAOS_ERR_NOT_FOUND) {
        c->failing = 0;
        news = c->loaded == CHAOSI_LOADED_GOOD || c->loaded == CHAOSI_LOADED_INVALID;
        c->loaded = CHAOSI_LOADED_NOT_FOUND;
    } else {
        c->told.fetch_errors++;
        news = c->failing++ == 0;
    }
    chaosi_take_problem(c, err);
    return news;
}

/* When to fetch next. Healthy: the TTL, shortened by up to a fifth. Failing: full jitter between one TTL and a window that
   doubles up to 30 s (or the TTL, if that is longer). */
CHAOSI_FN chaosi_u64 chaosi_next_fetch(chaos *c) {
    chaosi_u64 ttl = chaosi_ttl_ms(c, CHAOSI_LOAD(&c->armed) != 0), most = ttl > CHAOSI_BACKOFF_MAX_MS ? ttl : CHAOSI_BACKOFF_MAX_MS;
    chaosi_u64 dice = chaosi_mix(c->seed ^ c->told.fetches) >> 32, wait;
    if (!c->source.fetched || (c->source.scheme >= CHAOSI_SSM && CHAOSI_SEQ(&c->killed))) return CHAOSI_NEVER;
    if (c->failing) wait = ttl + ((chaosi_min(most, ttl << chaosi_min(c->failing, 16)) - ttl) * dice >> 32);
    else wait = ttl - (ttl / 5 * dice >> 32);
    return chaosi_now(c, false) + wait * CHAOSI_MS;
}

/* Fetches once, now, and applies it. */
CHAOSI_FN chaos_result chaosi_refresh(chaos *c, bool tell, chaos_error *err) {
    bool news, changed;
    chaos_fetched got;
    chaos_result r;
    chaosi_u32 cancels = CHAOSI_SEQ(&c->cancels); /* also of those that come while this one waits for its turn */
    CHAOSI_LOCK(&c->fetch_lock);
    c->cancels_before = cancels;
    if (c->source.scheme < CHAOSI_SSM) r = chaosi_fetch(&c->source, &c->desc, c->bytes, CHAOS_CONFIG_INPUT_MAX + 1, &got, err);
    else r = c->remote(c, c->bytes, CHAOS_CONFIG_INPUT_MAX + 1, &got, err);
    if (r != CHAOS_OK && !err->text[0]) chaosi_fail(err, r, "%s", chaos_result_text(r));
    err->code = r;
    if (got.len > CHAOS_CONFIG_INPUT_MAX + 1) got.len = CHAOS_CONFIG_INPUT_MAX + 1;
    CHAOSI_LOCK(&c->lock);
    news = chaosi_take(c, r, &got, err);
    chaosi_publish(c);
    changed = chaosi_settle(c);
    c->next_fetch = chaosi_next_fetch(c);
    CHAOSI_UNLOCK(&c->lock);
    if (tell && news) c->tell(c, c->failing ? CHAOSI_FETCH_FAILED : CHAOSI_NEW_CONFIG);
    if (tell && changed) c->tell(c, CHAOSI_NEW_STATE);
    CHAOSI_UNLOCK(&c->fetch_lock);
    return err->code;
}

/* Notices an end that came by time alone. Any thread; never waits: who holds the lock will notice. */
CHAOSI_COLD void chaosi_notice(chaos *c, bool wait) {
    bool changed;
    if (wait) CHAOSI_LOCK(&c->lock);
    else if (!CHAOSI_TRYLOCK(&c->lock)) return;
    changed = chaosi_settle(c);
    CHAOSI_UNLOCK(&c->lock);
    if (changed) c->tell(c, CHAOSI_NEW_STATE);
}

#ifdef CHAOSI_THREADS
/* Sleeps until there is something to do: a fetch, the end, a tick. A clock of the program's own is asked every few ms. */
CHAOSI_FN void *chaosi_refresher(void *arg) {
    chaos *c = (chaos *)arg;
    while (!CHAOSI_SEQ(&c->closing)) {
        bool on = CHAOSI_LOAD(&c->armed) != 0;
        chaosi_u64 now = chaosi_now(c, false), fetch, next;
        chaos_error err;
        CHAOSI_LOCK(&c->lock);
        fetch = c->next_fetch;
        next = on ? chaosi_min(chaosi_min(fetch, c->until), now + CHAOSI_TICK_MS * CHAOSI_MS) : fetch;
        CHAOSI_UNLOCK(&c->lock);
        if (now < next) {
            next = c->desc.clock ? chaosi_clock(false) + 2 * CHAOSI_MS : next;
            chaosi_sleep_until(next, CHAOSI_POKE(c)[0], on ? CHAOSI_WAKE(c)[0] : -1);
            chaosi_drain(c, CHAOSI_POKE(c)[0]);
        }
        if (now >= fetch) chaosi_refresh(c, true, &err);
        chaosi_notice(c, true);
        c->tell(c, CHAOSI_TICK);
    }
    return NULL;
}

/* Starts a thread with every signal blocked: handlers of the program must not run on our stacks. */
CHAOSI_FN bool chaosi_thread_of(pthread_t *t, size_t stack, void *(*fn)(void *), void *arg) {
    pthread_attr_t attr;
    sigset_t all, old;
    int r;
    if (pthread_attr_init(&attr) != 0) return false;
    pthread_attr_setstacksize(&attr, stack);
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, &old);
    r = pthread_create(t, &attr, fn, arg);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    return r == 0;
}

CHAOSI_FN bool chaosi_thread(pthread_t *t, void *(*fn)(void *), void *arg) { return chaosi_thread_of(t, 256 * 1024, fn, arg); }
#endif

#ifndef CHAOS_NO_NET
/* ==== >>http ================================================================================================== */
/* Message heads and chunked framing, bytes only. Strict where request smuggling lives (RFC 9112 sections 2.2, 3, 5, 6, 7):
   only CRLF ends a line, one Host, one framing, no folds, no bare CR, no NUL. */
#define CHAOSI_FIELDS_MAX      100
#define CHAOSI_CHUNK_EXTRA_MAX 8192 /* bytes of chunk extensions in one body */
#define CHAOSI_CHUNK_TEXT_MAX  4096 /* bytes of one size line, or of all trailers */

typedef struct chaosi_field {
    chaosi_span name, value;
} chaosi_field;

typedef struct chaosi_head {
    chaosi_span method, target, reason;
    chaosi_span path;      /* of the target: origin-form, or "*" */
    chaosi_span authority; /* of an absolute-form target */
    int status, minor;     /* HTTP/1.minor, 0 or 1 */
    int count;
    bool chunked, has_length, keep_alive, expects;
    bool closes;          /* Connection: close, which wins */
    bool tunnel;          /* asks to become another protocol, here: bytes both ways */
    bool trailers;        /* TE: trailers */
    chaosi_span protocol; /* of Upgrade */
    chaosi_u64 length;
    int hosts;
    chaosi_field fields[CHAOSI_FIELDS_MAX];
} chaosi_head;

CHAOSI_FN chaosi_span chaosi_trim(chaosi_span s) {
    while (s.len && (s.at[0] == ' ' || s.at[0] == '\t')) s = chaosi_of(s.at + 1, s.len - 1);
    while (s.len && (s.at[s.len - 1] == ' ' || s.at[s.len - 1] == '\t')) s.len--;
    return s;
}

/* Takes the next element off a comma-separated list; false = none left. Elements may be empty. */
CHAOSI_FN bool chaosi_next_element(chaosi_span *list, chaosi_span *element) {
    const char *comma;
    if (!list->at) return false;
    comma = list->len ? (const char *)memchr(list->at, ',', list->len) : NULL;
    *element = chaosi_trim(chaosi_of(list->at, comma ? (size_t)(comma - list->at) : list->len));
    if (comma) *list = chaosi_of(comma + 1, list->len - (size_t)(comma + 1 - list->at));
    else *list = chaosi_of(NULL, 0);
    return true;
}

CHAOSI_FN bool chaosi_is_token(chaosi_span s) {
    size_t i;
    for (i = 0; i < s.len; i++)
        if (!chaosi_is_token_char(s.at[i])) return false;
    return s.len > 0;
}

CHAOSI_FN bool chaosi_is(chaosi_span s, const char *word) { return chaosi_same_nocase(s, chaosi_str(word)); }

/* A line that ends in CRLF, from pos. 1 = there (without CRLF), 0 = not complete, -1 = a bare CR, a bare LF or a NUL. */
CHAOSI_FN int chaosi_line_at(const char *buf, size_t len, size_t pos, chaosi_span *line) {
    size_t i;
    for (i = pos; i < len; i++) {
        if (buf[i] == '\n' || buf[i] == 0) return -1;
        if (buf[i] != '\r') continue;
        if (i + 1 == len) return 0;
        *line = chaosi_of(buf + pos, i - pos);
        return buf[i + 1] == '\n' ? 1 : -1;
    }
    return 0;
}

CHAOSI_FN bool chaosi_is_value(chaosi_span s) {
    size_t i;
    for (i = 0; i < s.len; i++)
        if (((chaosi_u8)s.at[i] < 0x20 && s.at[i] != '\t') || s.at[i] == 0x7f) return false;
    return true;
}

/* uri-host [":" port], by its characters (RFC 3986 section 3.2.2). */
CHAOSI_FN bool chaosi_is_host(chaosi_span s) {
    bool v6 = s.len && s.at[0] == '[';
    size_t i = v6, start = i;
    for (; i < s.len; i++) {
        char c = s.at[i];
        bool name = chaosi_is_digit(c) || (chaosi_lower(c) >= 'a' && chaosi_lower(c) <= 'z') || (c && strchr("-._~%!$&'()*+,;=", c));
        if (v6 ? chaosi_hex(c) < 0 && c != ':' && c != '.' : !name) break;
    }
    if (i == start || (v6 && (i == s.len || s.at[i++] != ']'))) return false;
    if (i < s.len && s.at[i++] != ':') return false;
    while (i < s.len && chaosi_is_digit(s.at[i])) i++;
    return i == s.len;
}

/* 1*DIGIT, below 2^63. */
CHAOSI_FN bool chaosi_length_of(chaosi_span s, chaosi_u64 *out) {
    size_t i;
    *out = 0;
    for (i = 0; i < s.len; i++) {
        if (!chaosi_is_digit(s.at[i]) || *out > (chaosi_u64)INT64_MAX / 10 - 9) return false;
        *out = *out * 10 + (chaosi_u64)(s.at[i] - '0');
    }
    return s.len > 0;
}

/* Transfer-Encoding: 0 = chunked alone, else the status: 501 for a coding this proxy does not know, 400 for the rest. */
CHAOSI_FN int chaosi_transfer_coding(chaosi_span value) {
    static const char *const known[] = {"chunked", "gzip", "x-gzip", "compress", "x-compress", "deflate"};
    chaosi_span coding;
    int count = 0, chunked = 0;
    bool last_chunked = false, unknown = false;
    size_t i;
    while (chaosi_next_element(&value, &coding)) {
        if (!chaosi_is_token(coding)) return 400;
        for (i = 0; i < 6 && !chaosi_is(coding, known[i]); i++) {}
        unknown = unknown || i == 6;
        last_chunked = i == 0;
        chunked += i == 0;
        count++;
    }
    if (unknown) return 501;
    if (!last_chunked || chunked > 1) return 400;
    return count == 1 ? 0 : 501;
}

/* What a field means for framing and the connection. 0 = fine, else the status to answer. */
CHAOSI_FN int chaosi_field_meaning(chaosi_head *h, const chaosi_field *f) {
    chaosi_span list = f->value, element;
    int elements = 0;
    if (chaosi_is(f->name, "content-length")) {
        if (h->has_length || !chaosi_length_of(f->value, &h->length)) return 400;
        h->has_length = true;
    } else if (chaosi_is(f->name, "transfer-encoding")) {
        int status = h->chunked ? 400 : chaosi_transfer_coding(f->value);
        if (status) return status;
        h->chunked = true;
    } else if (chaosi_is(f->name, "connection")) {
        while (chaosi_next_element(&list, &element)) {
            if ((element.len && !chaosi_is_token(element)) || ++elements > 32) return 400;
            if (chaosi_is(element, "close")) h->closes = true;
            else if (chaosi_is(element, "upgrade")) h->tunnel = true;
            else if (h->minor == 0 && chaosi_is(element, "keep-alive")) h->keep_alive = true;
        }
    } else if (chaosi_is(f->name, "upgrade")) {
        if (!h->protocol.len) h->protocol = f->value;
    } else if (chaosi_is(f->name, "te")) {
        while (chaosi_next_element(&list, &element)) h->trailers = h->trailers || chaosi_is(element, "trailers");
    } else if (h->status) { /* the rest is for requests */
    } else if (chaosi_is(f->name, "host")) {
        h->hosts++;
        if (!chaosi_is_host(f->value)) return 400;
    } else if (chaosi_is(f->name, "expect")) {
        if (!chaosi_is(f->value, "100-continue")) return 417;
        h->expects = h->minor > 0;
    }
    return 0;
}

/* The fields and the empty line, from pos. >0 = bytes consumed, 0 = need more, <0 = minus the status. */
CHAOSI_FN int chaosi_fields(chaosi_head *h, const char *buf, size_t len, size_t pos, bool reply) {
    chaosi_span line, protocols;
    const char *colon;
    chaosi_field f;
    int r, status;
    for (;;) {
        r = chaosi_line_at(buf, len, pos, &line);
        if (r <= 0) return r ? -400 : 0;
        pos += line.len + 2;
        if (line.len == 0) break;
        colon = (const char *)memchr(line.at, ':', line.len);
        if (!colon) return -400;
        f.name = chaosi_of(line.at, (size_t)(colon - line.at));
        f.value = chaosi_trim(chaosi_of(colon + 1, line.len - f.name.len - 1));
        /* RFC 9112 section 5.1: space before the colon goes from a reply; a request with it is refused. */
        while (reply && f.name.len && (colon[-1] == ' ' || colon[-1] == '\t') &&
               (f.name.at[f.name.len - 1] == ' ' || f.name.at[f.name.len - 1] == '\t'))
            f.name.len--;
        if (!chaosi_is_token(f.name) || !chaosi_is_value(f.value)) return -400;
        if (h->count == CHAOSI_FIELDS_MAX) return -431;
        h->fields[h->count++] = f;
        status = chaosi_field_meaning(h, &f);
        if (status) return -status;
    }
    if (h->chunked && (h->has_length || h->minor == 0)) return -400;
    h->keep_alive = h->keep_alive && !h->closes;
    h->tunnel = h->tunnel && h->protocol.len && h->minor && !h->chunked && !h->length;
    protocols = h->protocol;
    while (h->tunnel && chaosi_next_element(&protocols, &line)) h->tunnel = !chaosi_is(line, "h2c"); /* a way around this parser */
    return (int)pos;
}

/* "HTTP/1.x": 0 = fine (minor set), else the status. */
CHAOSI_FN int chaosi_version_of(chaosi_span s, int *minor) {
    if (s.len != 8 || memcmp(s.at, "HTTP/", 5) != 0 || !chaosi_is_digit(s.at[5]) || s.at[6] != '.' || !chaosi_is_digit(s.at[7])) return 400;
    if (s.at[5] != '1') return 505;
    *minor = s.at[7] == '0' ? 0 : 1;
    return 0;
}

/* The path of a target in origin-, absolute- or asterisk-form (RFC 9112 section 3.2). 0 = fine, else the status. */
CHAOSI_FN int chaosi_target(chaosi_head *h) {
    chaosi_span t = h->target;
    size_t i;
    for (i = 0; i < t.len; i++)
        if ((chaosi_u8)t.at[i] <= 0x20 || (chaosi_u8)t.at[i] >= 0x7f || t.at[i] == '#') return 400;
    h->path = t;
    if (chaosi_same(h->method, chaosi_str("CONNECT"))) return 501;
    if (t.len && t.at[0] == '/') return 0;
    if (t.len == 1 && t.at[0] == '*') return chaosi_same(h->method, chaosi_str("OPTIONS")) ? 0 : 400;
    if (t.len <= 7 || !chaosi_is(chaosi_of(t.at, 7), "http://")) return 400;
    t = chaosi_of(t.at + 7, t.len - 7);
    for (i = 0; i < t.len && t.at[i] != '/' && t.at[i] != '?'; i++) {}
    h->authority = chaosi_of(t.at, i);
    h->path = chaosi_of(t.at + i, t.len - i);
    if (!h->path.len && chaosi_same(h->method, chaosi_str("OPTIONS"))) h->path = chaosi_str("*");
    return chaosi_is_host(h->authority) ? 0 : 400;
}

CHAOSI_FN int chaosi_request_line(chaosi_head *h, chaosi_span line) {
    const char *sp1 = (const char *)memchr(line.at, ' ', line.len), *sp2;
    int status;
    if (!sp1) return 400;
    h->method = chaosi_of(line.at, (size_t)(sp1 - line.at));
    sp2 = (const char *)memchr(sp1 + 1, ' ', line.len - h->method.len - 1);
    if (!sp2 || !chaosi_is_token(h->method)) return 400;
    h->target = chaosi_of(sp1 + 1, (size_t)(sp2 - sp1 - 1));
    status = chaosi_version_of(chaosi_of(sp2 + 1, line.len - (size_t)(sp2 + 1 - line.at)), &h->minor);
    if (status) return status;
    if (h->method.len > 32) return 501;
    return chaosi_target(h);
}

/* A request head. >0 = its length, 0 = need more, <0 = minus the status to answer before closing. */
CHAOSI_FN int chaosi_http_request(chaosi_head *h, const char *buf, size_t len) {
    chaosi_span line;
    size_t pos = len >= 2 && buf[0] == '\r' && buf[1] == '\n' ? 2 : 0; /* one empty line before it is let pass, section 2.2 */
    int r;
    memset(h, 0, offsetof(chaosi_head, fields));
    r = chaosi_line_at(buf, len, pos, &line);
    if (r <= 0) return r ? -400 : 0;
    r = chaosi_request_line(h, line);
    if (r) return -r;
    h->keep_alive = h->minor > 0;
    r = chaosi_fields(h, buf, len, pos + line.len + 2, false);
    if (r > 0 && (h->hosts > 1 || (h->hosts == 0 && h->minor > 0))) return -400;
    return r;
}

/* A reply head. >0 = its length, 0 = need more, <0 = not HTTP/1 as it should be. */
CHAOSI_FN int chaosi_http_reply(chaosi_head *h, const char *buf, size_t len) {
    chaosi_span line;
    int r;
    memset(h, 0, offsetof(chaosi_head, fields));
    r = chaosi_line_at(buf, len, 0, &line);
    if (r < 0 || memcmp(buf, "HTTP/", len < 5 ? len : 5) != 0) return -502;
    if (r == 0) return 0;
    if (line.len < 12 || chaosi_version_of(chaosi_of(line.at, 8), &h->minor) || line.at[8] != ' ' || (line.len > 12 && line.at[12] != ' '))
        return -502;
    h->status = chaosi_digits(line.at + 9, 3);
    if (h->status < 100 || h->status > 599) return -502;
    if (line.len > 13) h->reason = chaosi_of(line.at + 13, line.len - 13);
    if (!chaosi_is_value(h->reason)) return -502;
    h->keep_alive = h->minor > 0;
    r = chaosi_fields(h, buf, len, line.len + 2, true);
    return r < 0 ? -502 : r;
}

/* Chunked framing, decoded in place. All zero = at the start. */
typedef enum chaosi_chunk {
    CHAOSI_IN_SIZE,
    CHAOSI_IN_DATA,
    CHAOSI_AFTER_DATA,
    CHAOSI_IN_TRAILER,
    CHAOSI_CHUNKED,
    CHAOSI_UNCHUNKED
} chaosi_chunk;

typedef struct chaosi_chunked {
    chaosi_chunk state;               /* CHAOSI_CHUNKED: complete; CHAOSI_UNCHUNKED: malformed */
    chaosi_u64 left;                  /* of this chunk */
    size_t extra;                     /* bytes of extensions so far */
    size_t line, text_len;            /* the line being read starts at text[line] */
    bool blind;                       /* trailers are not kept, so they may be of any length */
    char text[CHAOSI_CHUNK_TEXT_MAX]; /* that line, or all trailers; last, so that a start need not clear it */
} chaosi_chunked;

/* A whole line that is not data: the next state. */
CHAOSI_FN chaosi_chunk chaosi_chunk_line(chaosi_chunked *d) {
    chaosi_span line;
    size_t n = 0;
    const char *colon;
    if (chaosi_line_at(d->text, d->text_len, d->line, &line) != 1 || !chaosi_is_value(line)) return CHAOSI_UNCHUNKED;
    if (d->state == CHAOSI_IN_TRAILER && line.len) {
        colon = (const char *)memchr(line.at, ':', line.len);
        if (d->blind) d->text_len = d->line;
        d->line = d->text_len;
        return colon && chaosi_is_token(chaosi_of(line.at, (size_t)(colon - line.at))) ? CHAOSI_IN_TRAILER : CHAOSI_UNCHUNKED;
    }
    d->text_len = d->line;
    if (d->state == CHAOSI_IN_TRAILER) return CHAOSI_CHUNKED;
    if (d->state == CHAOSI_AFTER_DATA) return line.len ? CHAOSI_UNCHUNKED : CHAOSI_IN_SIZE;
    for (d->left = 0; n < line.len && n < 16 && chaosi_hex(line.at[n]) >= 0; n++)
        d->left = d->left * 16 + (chaosi_u64)chaosi_hex(line.at[n]);
    d->extra += line.len - n;
    if (n == 0 || n == 16 || (n < line.len && line.at[n] != ';') || d->extra > CHAOSI_CHUNK_EXTRA_MAX) return CHAOSI_UNCHUNKED;
    d->extra -= d->extra < d->left ? d->extra : (size_t)d->left; /* extensions may grow with the data, no faster */
    return d->left ? CHAOSI_IN_DATA : CHAOSI_IN_TRAILER;
}

/* Decodes buf[0..len) in place: *made bytes of body now stand at buf, *used bytes were taken (what follows belongs to the
   next message). 1 = the body is complete, 0 = need more, -1 = malformed. Extensions are dropped, trailers kept. */
CHAOSI_FN int chaosi_chunked_feed(chaosi_chunked *d, char *buf, size_t len, size_t *used, size_t *made) {
    size_t i = 0, n = 0;
    while (i < len && d->state < CHAOSI_CHUNKED) {
        bool cr = d->text_len > d->line && d->text[d->text_len - 1] == '\r';
        if (d->state == CHAOSI_IN_DATA) {
            size_t piece = len - i < d->left ? len - i : (size_t)d->left;
            memmove(buf + n, buf + i, piece);
            n += piece;
            i += piece;
            d->left -= piece;
            if (!d->left) d->state = CHAOSI_AFTER_DATA;
        } else if (d->blind && d->state == CHAOSI_IN_TRAILER && !cr && d->text_len >= CHAOSI_CHUNK_TEXT_MAX - 2 && buf[i] != '\r' &&
                   buf[i] != '\n') {
            i++; /* of a long line its beginning tells */
        } else if (d->text_len == CHAOSI_CHUNK_TEXT_MAX || (cr && buf[i] != '\n') ||
                   (d->state == CHAOSI_AFTER_DATA && !cr && buf[i] != '\r')) {
            d->state = CHAOSI_UNCHUNKED;
        } else {
            d->text[d->text_len++] = buf[i];
            if (buf[i++] == '\n') d->state = chaosi_chunk_line(d);
        }
    }
    *used = i;
    *made = n;
    return d->state == CHAOSI_CHUNKED ? 1 : d->state == CHAOSI_UNCHUNKED ? -1 : 0;
}

/* A reason phrase; RFC 9112 section 4 lets it be anything. */
CHAOSI_FN const char *chaosi_status_text(int status) {
    static const char *const texts[] = {"400Bad Request",           "408Request Timeout",   "414URI Too Long",
                                        "417Expectation Failed",    "429Too Many Requests", "431Request Header Fields Too Large",
                                        "500Internal Server Error", "501Not Implemented",   "502Bad Gateway",
                                        "503Service Unavailable",   "504Gateway Timeout",   "505HTTP Version Not Supported"};
    static const char *const classes[] = {"OK", "Redirect", "Client Error", "Server Error"};
    size_t i;
    for (i = 0; i < sizeof texts / sizeof texts[0]; i++)
        if (atoi(texts[i]) == status) return texts[i] + 3;
    return classes[status < 300 ? 0 : status / 100 - 2];
}

/* The value of a field, at NULL = none. */
CHAOSI_FN chaosi_span chaosi_field_value(const chaosi_head *h, const char *name) {
    int i;
    for (i = 0; i < h->count; i++)
        if (chaosi_is(h->fields[i].name, name)) return h->fields[i].value;
    return chaosi_of(NULL, 0);
}

/* Is the name in a list of names, case aside? One that ends in a star stands for all that begin like it. */
CHAOSI_FN bool chaosi_listed(const char *names, chaosi_span name) {
    for (;;) {
        size_t n = 0, star;
        while (names[n] && names[n] != ',') n++;
        star = names[n - 1] == '*';
        if ((star ? name.len >= n : name.len == n) && chaosi_same_nocase(chaosi_of(names, n - star), chaosi_of(name.at, n - star)))
            return true;
        if (!names[n]) return false;
        names += n + 1;
    }
}

/* Fields that belong to one connection and are made afresh for the next (RFC 9110 section 7.6.1). */
CHAOSI_FN bool chaosi_is_hop_by_hop(const chaosi_head *h, chaosi_span name) {
    chaosi_span list, element;
    int i;
    if (chaosi_listed("connection,keep-alive,proxy-connection,te,transfer-encoding,upgrade,content-length", name)) return true;
    for (i = 0; i < h->count; i++) {
        list = h->fields[i].value;
        if (!chaosi_is(h->fields[i].name, "connection")) continue;
        while (chaosi_next_element(&list, &element))
            if (chaosi_same_nocase(element, name)) return true;
    }
    return false;
}

/* Drops from trailer lines, in place, what must not stand there: framing, routing, controls, credentials, and what describes the
   content (RFC 9110 section 6.5.1). Returns the new length. */
CHAOSI_FN size_t chaosi_clean_trailers(const chaosi_head *h, char *lines, size_t len) {
    static const char *const never = "host,content-encoding,content-type,content-range,authorization,cookie,set-cookie,cache-control,"
                                     "expect,trailer,via,forwarded,x-forwarded-*,x-real-ip,range,proxy-*,max-forwards,location,"
                                     "www-authenticate,x-chaos-*";
    size_t at = 0, kept = 0;
    chaosi_span line, name;
    while (chaosi_line_at(lines, len, at, &line) > 0) {
        at += line.len + 2;
        name = chaosi_of(line.at, (size_t)((const char *)memchr(line.at, ':', line.len) - line.at));
        if (chaosi_listed(never, name) || chaosi_is_hop_by_hop(h, name)) continue;
        memmove(lines + kept, line.at, line.len + 2);
        kept += line.len + 2;
    }
    return kept;
}

CHAOSI_FN void chaosi_put_span(chaosi_out *o, chaosi_span s) { chaosi_put(o, s.at, s.len); }

CHAOSI_FN void chaosi_put_field(chaosi_out *o, chaosi_span name, chaosi_span value) {
    chaosi_put_span(o, name);
    chaosi_puts(o, ": ");
    chaosi_put_span(o, value);
    chaosi_puts(o, "\r\n");
}

/* One framing, whatever the message came with. */
CHAOSI_FN void chaosi_put_framing(chaosi_out *o, bool chunked, bool has_length, chaosi_u64 length) {
    if (chunked) chaosi_puts(o, "Transfer-Encoding: chunked\r\n");
    else if (has_length) {
        chaosi_puts(o, "Content-Length: ");
        chaosi_put_int(o, (long long)length);
        chaosi_puts(o, "\r\n");
    }
}

/* The field with our own element appended, or alone. */
CHAOSI_FN void chaosi_put_appended(chaosi_out *o, const chaosi_head *h, const char *name, const char *element) {
    int i;
    chaosi_puts(o, name);
    chaosi_puts(o, ": ");
    for (i = 0; i < h->count; i++) {
        if (!h->fields[i].value.len || !chaosi_is(h->fields[i].name, name)) continue;
        chaosi_put_span(o, h->fields[i].value);
        chaosi_puts(o, ", ");
    }
    chaosi_puts(o, element);
    chaosi_puts(o, "\r\n");
}

/* The field, unless the client's own goes on. */
CHAOSI_FN void chaosi_put_unless_there(chaosi_out *o, const chaosi_head *h, const char *name, chaosi_span value) {
    if (!chaosi_field_value(h, name).at || chaosi_is_hop_by_hop(h, chaosi_str(name))) chaosi_put_field(o, chaosi_str(name), value);
}

/* The request as the upstream gets it. host: what Host says; peer: the client's address. */
CHAOSI_FN void chaosi_put_request(chaosi_out *o, const chaosi_head *h, const char *prefix, chaosi_span host, const char *peer) {
    int i;
    chaosi_put_span(o, h->method);
    chaosi_puts(o, " ");
    if (h->path.len != 1 || h->path.at[0] != '*') chaosi_puts(o, prefix);
    if (!h->path.len || (h->path.at[0] != '/' && h->path.at[0] != '*')) chaosi_puts(o, "/");
    chaosi_put_span(o, h->path);
    chaosi_puts(o, " HTTP/1.1\r\n");
    chaosi_put_field(o, chaosi_str("Host"), host);
    for (i = 0; i < h->count; i++) {
        chaosi_span name = h->fields[i].name;
        if (chaosi_is(name, "host") || chaosi_is(name, "via") || chaosi_is(name, "x-forwarded-for") || chaosi_is_hop_by_hop(h, name))
            continue;
        chaosi_put_field(o, h->fields[i].name, h->fields[i].value);
    }
    chaosi_put_appended(o, h, "Via", h->minor ? "1.1 chaos" : "1.0 chaos");
    chaosi_put_appended(o, h, "X-Forwarded-For", peer);
    chaosi_put_unless_there(o, h, "X-Forwarded-Proto", chaosi_str("http"));
    chaosi_put_unless_there(o, h, "X-Forwarded-Host", h->authority.len ? h->authority : chaosi_field_value(h, "host"));
    if (h->tunnel || h->trailers)
        chaosi_puts(o, !h->trailers ? "Connection: Upgrade\r\n" : h->tunnel ? "Connection: Upgrade, TE\r\n" : "Connection: TE\r\n");
    if (h->trailers) chaosi_puts(o, "TE: trailers\r\n");
    if (h->tunnel) chaosi_put_field(o, chaosi_str("Upgrade"), h->protocol);
    chaosi_put_framing(o, h->chunked, h->has_length, h->length);
    chaosi_puts(o, "\r\n");
}

/* ==== >>net =================================================================================================== */
/* Sockets and deadlines. Every read and write is MSG_DONTWAIT, then poll to an absolute deadline (monotonic ns); but for the
   first bytes of a message. */
#ifdef MSG_NOSIGNAL
#define CHAOSI_NOSIGNAL MSG_NOSIGNAL
#else
#define CHAOSI_NOSIGNAL 0 /* macOS: SO_NOSIGPIPE is set on every socket instead */
#endif
#define CHAOSI_ADDRESSES 8

typedef struct chaosi_address {
    struct sockaddr_storage addr;
    socklen_t len;
} chaosi_address;

/* revents of fd, 0 = timeout. POLLHUP and POLLERR count as ready. */
CHAOSI_FN int chaosi_poll(int fd, int events, chaosi_u64 deadline) {
    struct pollfd p;
    for (;;) {
        chaosi_u64 now = chaosi_clock(false);
        chaosi_u64 ms = deadline > now ? (deadline - now + CHAOSI_MS - 1) / CHAOSI_MS : 0;
        int r;
        p.fd = fd;
        p.events = (short)events;
        p.revents = 0;
        r = poll(&p, 1, (int)chaosi_min(ms, 60000));
        if (r > 0) return p.revents;
        if (ms == 0 || (r < 0 && errno != EINTR && errno != EAGAIN)) return 0;
    }
}

CHAOSI_FN bool chaosi_would_block(void) { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

/* The longest chaosi_recv_first waits on this socket. */
CHAOSI_FN void chaosi_set_patience(int fd, int ms) {
    struct timeval t;
    t.tv_sec = ms / 1000;
    t.tv_usec = ms % 1000 * 1000;
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
}

/* The first bytes of a message, waited for in recv itself: one call and one wake-up less than poll. Only for the first,
   because this time-out starts anew with each byte. As recv; EAGAIN = timeout. */
CHAOSI_FN ssize_t chaosi_recv_first(int fd, char *buf, size_t cap) {
    ssize_t n;
    do n = recv(fd, buf, cap, 0);
    while (n < 0 && errno == EINTR);
    return n;
}

/* Sends everything; false = timeout or the peer is gone. */
CHAOSI_FN bool chaosi_send_all(int fd, const char *buf, size_t len, chaosi_u64 deadline) {
    while (len) {
        ssize_t n = send(fd, buf, len, MSG_DONTWAIT | CHAOSI_NOSIGNAL);
        if (n > 0) {
            buf += n;
            len -= (size_t)n;
        } else if (n < 0 && !chaosi_would_block()) {
            return false;
        } else if (!chaosi_poll(fd, POLLOUT, deadline)) {
            return false;
        }
    }
    return true;
}

/* Host and port from HOST:PORT, [V6]:PORT, and a lone word: a host when host_alone, else a port. What is not there stays. */
CHAOSI_FN bool chaosi_split_address(chaosi_span s, bool host_alone, char *host, size_t host_cap, char *port, size_t port_cap) {
    size_t colon = s.len, skip = 0, host_len, port_len;
    while (colon > 0 && s.at[colon - 1] != ':' && s.at[colon - 1] != ']') colon--;
    if (colon && s.at[colon - 1] == ']') colon = 0;
    host_len = colon ? colon - 1 : host_alone || (s.len && s.at[0] == '[') ? s.len : 0;
    port_len = colon ? s.len - colon : s.len - host_len;
    if (host_len >= 2 && s.at[0] == '[' && s.at[host_len - 1] == ']') skip = 1;
    else if (host_len && memchr(s.at, ':', host_len)) return false;
    if (host_len >= host_cap || port_len >= port_cap || (colon && !port_len)) return false;
    if (host_len > 2 * skip) {
        memcpy(host, s.at + skip, host_len - 2 * skip);
        host[host_len - 2 * skip] = 0;
    }
    if (port_len) {
        memcpy(port, s.at + s.len - port_len, port_len);
        port[port_len] = 0;
    }
    return strspn(port, "0123456789") == strlen(port) && strlen(port) < 6 && atoi(port) <= 65535;
}

/* Resolves; blocks as long as the resolver does. Returns how many addresses, 0 = error filled in. */
CHAOSI_FN int chaosi_resolve(const char *host, const char *port, chaosi_address *out, int most, chaos_error *err) {
    struct addrinfo hints, *list = NULL, *a;
    int n = 0, r;
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICSERV;
    r = getaddrinfo(host, port, &hints, &list);
    if (r != 0) {
        chaosi_fail(err, CHAOS_ERR_UNREACHABLE, "resolve %.100s: %s", host, r == EAI_SYSTEM ? strerror(errno) : gai_strerror(r));
        return 0;
    }
    for (a = list; a && n < most; a = a->ai_next) {
        if (a->ai_addrlen > sizeof out[n].addr) continue;
        memcpy(&out[n].addr, a->ai_addr, a->ai_addrlen);
        out[n++].len = a->ai_addrlen;
    }
    freeaddrinfo(list);
    if (!n) chaosi_fail(err, CHAOS_ERR_UNREACHABLE, "resolve %.100s: no address", host);
    return n;
}

/* The same for an address in numbers, or localhost, without a resolver: static programs stay small. */
CHAOSI_FN bool chaosi_numeric(const char *host, const char *port, chaosi_address *out) {
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
    memset(&v4, 0, sizeof v4);
    memset(&v6, 0, sizeof v6);
    v4.sin_family = AF_INET;
    v6.sin6_family = AF_INET6;
    v4.sin_port = v6.sin6_port = htons((chaosi_u16)atoi(port));
    out->len = 0;
    if (inet_pton(AF_INET, strcmp(host, "localhost") == 0 ? "127.0.0.1" : host, &v4.sin_addr) == 1)
        memcpy(&out->addr, &v4, out->len = sizeof v4);
    else if (inet_pton(AF_INET6, host, &v6.sin6_addr) == 1) memcpy(&out->addr, &v6, out->len = sizeof v6);
    return out->len > 0;
}

/* "ADDR:PORT" or "[V6]:PORT"; without the port when bare. */
CHAOSI_FN void chaosi_name_address(const struct sockaddr_storage *addr, socklen_t len, bool bare, char *out, size_t cap) {
    char host[128], port[16];
    bool v6 = addr->ss_family == AF_INET6;
    if (getnameinfo((const struct sockaddr *)(const void *)addr, len, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
        chaosi_copy(out, cap, "unknown");
        return;
    }
    if (bare) chaosi_copy(out, cap, host);
    else snprintf(out, cap, v6 ? "[%s]:%s" : "%s:%s", host, port);
}

CHAOSI_FN int chaosi_socket(const chaosi_address *a) {
    int one = 1, fd = socket(a->addr.ss_family, SOCK_STREAM, 0);
    if (fd < 0) return -1;
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
#ifdef SO_NOSIGPIPE
    setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &one, sizeof one);
#endif
    return fd;
}

CHAOSI_FN int chaosi_listen(const chaosi_address *a, int backlog, const char *what, chaos_error *err) {
    int one = 1, fd = chaosi_socket(a);
    if (fd < 0) {
        chaosi_fail(err, CHAOS_ERR_SYSTEM, "socket: %s", strerror(errno));
        return -1;
    }
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (const struct sockaddr *)(const void *)&a->addr, a->len) != 0 || listen(fd, backlog) != 0) {
        chaosi_fail(err, CHAOS_ERR_SYSTEM, "listen on %.100s: %s", what, strerror(errno));
        close(fd);
        return -1;
    }
    return fd;
}

/* 0 = connected, else errno; ETIMEDOUT at the deadline. */
CHAOSI_FN int chaosi_connect(int fd, const chaosi_address *a, chaosi_u64 deadline) {
    int problem = 0;
    socklen_t len = sizeof problem;
    fcntl(fd, F_SETFL, O_NONBLOCK);
    if (connect(fd, (const struct sockaddr *)(const void *)&a->addr, a->len) != 0) {
        if (errno != EINPROGRESS && errno != EINTR) return errno;
        if (!chaosi_poll(fd, POLLOUT, deadline)) return ETIMEDOUT;
        if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &problem, &len) != 0) return errno;
    }
    fcntl(fd, F_SETFL, 0);
    return problem;
}

/* True = nothing waits to be read and the peer has not closed: fit for another request. */
CHAOSI_FN bool chaosi_is_quiet(int fd) {
    char byte;
    return recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && (errno == EAGAIN || errno == EWOULDBLOCK);
}

/* Closes so that the peer can still read what was sent: FIN, then read its rest for a while (RFC 9112 section 9.6). */
CHAOSI_FN void chaosi_linger(int fd, chaosi_u64 deadline) {
    char waste[4096];
    int rounds = 256;
    shutdown(fd, SHUT_WR);
    while (rounds-- > 0) {
        ssize_t n = recv(fd, waste, sizeof waste, MSG_DONTWAIT);
        if (n == 0 || (n < 0 && !chaosi_would_block())) return;
        if (n < 0 && !chaosi_poll(fd, POLLIN, deadline)) return;
    }
}

/* The close that follows sends RST instead of FIN. */
CHAOSI_FN void chaosi_make_reset(int fd) {
    struct linger now;
    now.l_onoff = 1;
    now.l_linger = 0;
    setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof now);
}
#endif /* CHAOS_NO_NET */

/* ==== >>telemetry ============================================================================================= */
/* Counters, log lines, events. A log line is one write that never blocks: a full or dead pipe costs the line, which is
   counted, and never a request. */
#define CHAOSI_LINE_MAX 4096 /* PIPE_BUF: written whole or not at all */

#ifdef CHAOSI_POSIX
/* stderr; of a pipe a description of our own, so that O_NONBLOCK is ours alone. */
CHAOSI_FN int chaosi_log_open(int std) {
    struct stat st;
    const char *path = std == 1 ? "/dev/stdout" : "/dev/stderr";
    int fd = fstat(std, &st) == 0 && S_ISFIFO(st.st_mode) ? open(path, O_WRONLY | O_NONBLOCK | O_CLOEXEC) : -1;
    return fd >= 0 ? fd : std;
}

/* SIGPIPE is kept from the program, whatever it does with that signal: blocked here, and one that came taken away. */
typedef struct chaosi_sigpipe {
    sigset_t old;
    bool pending;
} chaosi_sigpipe;

CHAOSI_FN void chaosi_hold_sigpipe(chaosi_sigpipe *s) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &set, &s->old);
    sigpending(&set);
    s->pending = sigismember(&set, SIGPIPE) == 1;
}

CHAOSI_FN void chaosi_drop_sigpipe(const chaosi_sigpipe *s) {
    sigset_t set;
    int sig;
    bool came = sigpending(&set) == 0 && sigismember(&set, SIGPIPE) == 1 && !s->pending;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    if (came) sigwait(&set, &sig);
    pthread_sigmask(SIG_SETMASK, &s->old, NULL);
}

CHAOSI_FN bool chaosi_write_quietly(int fd, const char *line, size_t len) {
    struct pollfd p = {fd, POLLOUT, 0};
    chaosi_sigpipe held;
    bool done;
    if (poll(&p, 1, 0) != 1 || p.revents != POLLOUT) return false;
    chaosi_hold_sigpipe(&held);
    done = write(fd, line, len) == (ssize_t)len;
    chaosi_drop_sigpipe(&held);
    return done;
}
#else
CHAOSI_FN int chaosi_log_open(int std) { return std; }
CHAOSI_FN bool chaosi_write_quietly(int fd, const char *line, size_t len) { return fd == 2 && fwrite(line, 1, len, stderr) == len; }
#endif

CHAOSI_FN void chaosi_emit(chaos *c, chaosi_out *o) {
    bool done = true;
    if (c->desc.quiet && !c->desc.log) return;
    chaosi_puts(o, "}\n");
    if (o->len >= o->cap) {
        *o = chaosi_into(o->buf, o->cap);
        chaosi_puts(o, "{\"source\":\"chaos\",\"level\":\"warn\",\"action\":\"note\",\"reason\":\"a log line was too long\"}\n");
    }
    if (c->desc.log) c->desc.log(c->desc.log_user, o->buf, o->len);
    else done = chaosi_write_quietly(c->log_fd, o->buf, o->len);
    chaosi_count(c, done ? CHAOSI_WORD(log_lines) : CHAOSI_WORD(log_dropped), 1);
}

CHAOSI_FN void chaosi_put_str(chaosi_out *o, const char *key, const char *value) {
    chaosi_put_key(o, key);
    chaosi_put_json(o, chaosi_str(value));
}

CHAOSI_FN chaosi_out chaosi_line(chaos *c, char *buf, const char *level, const char *action) {
    chaosi_out o = chaosi_into(buf, CHAOSI_LINE_MAX);
    char when[80];
    chaosi_puts(&o, "{");
    chaosi_put_str(&o, "source", "chaos");
    chaosi_put_str(&o, "time", chaosi_rfc3339(when, (long long)(chaosi_now(c, true) / CHAOSI_MS), true));
    chaosi_put_str(&o, "level", level);
    chaosi_put_str(&o, "action", action);
    return o;
}

CHAOSI_FN void chaosi_note(chaos *c, const char *action, const char *key, const char *value, const char *reason) {
    char buf[CHAOSI_LINE_MAX];
    chaosi_out o = chaosi_line(c, buf, "warn", action);
    chaosi_put_str(&o, key, value);
    chaosi_put_str(&o, "reason", reason);
    chaosi_emit(c, &o);
}

/* v NULL = no fault. */
CHAOSI_FN void chaosi_event(chaos *c, chaos_event_kind kind, chaos_state state, const char *reason, const chaos_verdict *v) {
    chaos_event e;
    memset(&e, 0, sizeof e);
    e.kind = kind;
    e.state = state;
    e.reason = reason;
    e.verdict = v;
    e.dry_run = v && state == CHAOS_STATE_DRY_RUN;
    c->desc.event(c->desc.event_user, &e);
}

/* May this fault have a line of its own? all: 50 a second, sample: 1 a second. */
CHAOSI_FN bool chaosi_may_log(chaos *c, chaosi_u64 mono) {
    chaosi_u64 second = mono / 1000000000u, old = CHAOSI_LOAD(&c->log_second);
    chaosi_u32 most = c->desc.fault_log == CHAOS_LOG_ALL ? 50 : 1;
    if (c->desc.fault_log == CHAOS_LOG_NONE || c->desc.quiet) return false;
    if (old != second && CHAOSI_CAS(&c->log_second, &old, second)) CHAOSI_STORE(&c->log_in_second, 0u);
    return CHAOSI_LOAD(&c->log_in_second) < most && CHAOSI_ADD(&c->log_in_second, 1u) < most;
}

CHAOSI_FN void chaosi_log_fault(chaos *c, const chaos_verdict *v, const char *rule, const char *action, const char *id) {
    char buf[CHAOSI_LINE_MAX];
    chaosi_out o = chaosi_line(c, buf, "info", action);
    chaosi_put_str(&o, "fault", chaos_kind_text(v->kind));
    chaosi_put_number(&o, "status", v->status);
    chaosi_put_number(&o, "delay_ms", v->delay_us / 1000);
    chaosi_put_str(&o, "rule", rule);
    chaosi_put_number(&o, "roll", v->roll);
    chaosi_put_number(&o, "config_version", v->version);
    if (id && *id) chaosi_put_str(&o, "request_id", id);
    chaosi_emit(c, &o);
}

/* CHAOS_EMF=1: one line a fault on stdout, which CloudWatch makes metrics of (its Embedded Metric Format). */
CHAOSI_FN void chaosi_put_emf(chaos *c, const chaos_verdict *v, const char *id) {
    char buf[CHAOSI_LINE_MAX];
    chaosi_out o = chaosi_into(buf, sizeof buf);
    chaosi_puts(&o, "{\"_aws\":{\"Timestamp\":");
    chaosi_put_int(&o, (long long)(chaosi_now(c, true) / CHAOSI_MS));
    chaosi_puts(&o, ",\"CloudWatchMetrics\":[{\"Namespace\":\"Chaos\",\"Dimensions\":[[\"Service\",\"Fault\"]],\"Metrics\":["
                    "{\"Name\":\"InjectedCount\",\"Unit\":\"Count\"},{\"Name\":\"InjectedDelay\",\"Unit\":\"Milliseconds\"}]}]}");
    chaosi_put_str(&o, "Service", c->service[0] ? c->service : "unknown");
    chaosi_put_str(&o, "Fault", chaos_kind_text(v->kind));
    chaosi_put_number(&o, "InjectedCount", 1);
    chaosi_put_number(&o, "InjectedDelay", v->delay_us / 1000);
    if (id && *id) chaosi_put_str(&o, "requestId", id);
    chaosi_puts(&o, "}\n");
    if (o.len >= o.cap || !chaosi_write_quietly(c->emf_fd, buf, o.len)) chaosi_count(c, CHAOSI_WORD(log_dropped), 1);
}

/* Faults injected or left out in a dry run. */
CHAOSI_FN chaosi_u64 chaosi_all_faults(const chaos_report *r) {
    chaosi_u64 sum = r->would_inject;
    int i;
    for (i = 0; i < CHAOS_KIND_COUNT; i++) sum += r->injected[i];
    return sum;
}

CHAOSI_FN void chaosi_report(chaos *c, chaos_report *out) {
    size_t i, stripe;
    CHAOSI_LOCK(&c->lock);
    *out = c->told;
    out->state = chaosi_state_now(c, out->reason, sizeof out->reason);
    out->age_ms = -1;
    if (c->source.fetched && out->fetches > out->fetch_errors)
        out->age_ms = (long long)(chaosi_less(chaosi_now(c, false), c->fresh_mono) / CHAOSI_MS);
    if (c->loaded == CHAOSI_LOADED_GOOD && c->end_wall != CHAOSI_NEVER) out->end_ms = (long long)(c->end_wall / CHAOSI_MS);
    CHAOSI_UNLOCK(&c->lock);
    for (stripe = 0; stripe < CHAOSI_STRIPES; stripe++)
        for (i = 0; i < CHAOSI_WORDS; i++) (&out->requests)[i] += CHAOSI_LOAD(&c->stripes[stripe].words[i]);
    out->waiting = CHAOSI_LOAD(&c->waiting);
    out->connections_now = CHAOSI_LOAD(&c->connections_now);
    out->log_suppressed = chaosi_less(chaosi_all_faults(out), CHAOSI_SEQ(&c->log_faults)); /* read last: never too many */
}

/* Faults that had no line of their own, since the last summary. */
CHAOSI_FN void chaosi_log_summary(chaos *c) {
    chaosi_u64 told = CHAOSI_LOAD(&c->log_summed);
    char buf[CHAOSI_LINE_MAX];
    chaos_report s;
    chaosi_out o;
    chaosi_report(c, &s);
    if (c->desc.fault_log == CHAOS_LOG_NONE || c->desc.quiet || s.log_suppressed <= told) return;
    if (!CHAOSI_CAS(&c->log_summed, &told, s.log_suppressed)) return;
    o = chaosi_line(c, buf, "info", "summary");
    chaosi_put_number(&o, "suppressed", (long long)(s.log_suppressed - told));
    chaosi_emit(c, &o);
}

/* -- Prometheus text -- */
CHAOSI_FN void chaosi_put_label(chaosi_out *o, const char *name, const char *value) {
    size_t len = strlen(value), i, n;
    chaosi_puts(o, o->last == '"' ? "," : "{");
    chaosi_puts(o, name);
    chaosi_puts(o, "=\"");
    for (i = 0; i < len; i += n ? n : 1) {
        n = chaosi_utf8(value + i, len - i);
        if (value[i] == '"' || value[i] == '\\') chaosi_puts(o, "\\");
        if (value[i] == '\n') chaosi_puts(o, "\\n");
        else chaosi_put(o, n ? value + i : "?", n ? n : 1);
    }
    chaosi_puts(o, "\"");
}

/* A family: a name in _total is a counter's, others are gauges; digits behind the point (3 = ms, told in s); the 64-bit
   values, of which a negative one is not known and gets no sample, with a label each (label NULL = there is but one). */
CHAOSI_FN void chaosi_put_family(chaosi_out *o, const char *name, int digits, const void *values, const char *help, const char *label,
                                 const char *const *labels, size_t count) {
    long long value, unit = digits == 6 ? 1000000 : digits ? 1000 : 1;
    char text[256];
    size_t i;
    snprintf(text, sizeof text, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, strstr(name, "_total") ? "counter" : "gauge");
    chaosi_puts(o, text);
    for (i = 0; i < count; i++) {
        memcpy(&value, (const char *)values + i * sizeof value, sizeof value);
        if (value < 0) continue;
        chaosi_puts(o, name);
        if (label) chaosi_put_label(o, label, labels[i]);
        snprintf(text, sizeof text, "%s%lld.%0*lld\n", label ? "} " : " ", value / unit, digits, value % unit);
        chaosi_puts(o, text);
    }
}

#define CHAOSI_ONE(name, digits, field, help) chaosi_put_family(&o, "chaos_" name, digits, &r.field, help, NULL, NULL, 1)
CHAOSI_FN size_t chaosi_metrics(const chaos_report *report, const char *service, const char *instance, char *buf, size_t cap) {
    static const char *const outcomes[] = {"other", "1xx", "2xx", "3xx", "4xx", "5xx"};
    static const char *const spared[] = {"exclude", "budget", "unsupported"};
    unsigned long long states[CHAOS_STATE_COUNT] = {0};
    chaos_report r = *report;
    chaosi_out o = chaosi_into(buf, cap);
    states[r.state] = 1;
    if (!r.end_ms) r.end_ms = -1;
    chaosi_puts(&o, "# HELP chaos_info Who this is\n# TYPE chaos_info gauge\nchaos_info");
    chaosi_put_label(&o, "version", CHAOS_VERSION);
    chaosi_put_label(&o, "service", service);
    chaosi_put_label(&o, "instance", instance);
    if (r.way[0]) chaosi_put_label(&o, "way", r.way);
    chaosi_puts(&o, "} 1\n");
    chaosi_put_family(&o, "chaos_state", 0, states, "1 for the state it is in", "state", chaosi_state_texts, CHAOS_STATE_COUNT);
    CHAOSI_ONE("config_version", 0, version, "Of the config in use, 0 = none yet");
    CHAOSI_ONE("config_age_seconds", 3, age_ms, "Since the last good fetch; no sample = none, or read at start only");
    CHAOSI_ONE("end_timestamp_seconds", 3, end_ms, "When chaos ends, Unix time; no sample = no end");
    CHAOSI_ONE("config_fetches_total", 0, fetches, "Fetches of the config");
    CHAOSI_ONE("config_fetch_errors_total", 0, fetch_errors, "Fetches that failed");
    CHAOSI_ONE("config_errors_total", 0, config_errors, "Configs that were invalid");
    CHAOSI_ONE("config_changes_total", 0, config_changes, "Valid configs taken in");
    CHAOSI_ONE("requests_total", 0, requests, "Decided while on or in a dry run; off, nothing is counted");
    chaosi_put_family(&o, "chaos_injected_total", 0, &r.injected[1], "Faults", "kind", chaosi_kind_texts + 1, CHAOS_KIND_COUNT - 1);
    CHAOSI_ONE("would_inject_total", 0, would_inject, "Faults of dry runs");
    chaosi_put_family(&o, "chaos_spared_total", 0, &r.excluded, "Faults rolled but left out", "reason", spared, 3);
    CHAOSI_ONE("skipped_total", 0, skipped, "Of the injected, truncate or corrupt that found no body to damage");
    CHAOSI_ONE("delay_seconds_total", 3, delay_ms, "Spent in injected delays, as waited");
    CHAOSI_ONE("waiting", 0, waiting, "Requests in an injected delay now");
    chaosi_put_family(&o, "chaos_outcomes_total", 0, r.outcomes, "Real outcomes", "status", outcomes, 6);
    CHAOSI_ONE("outcome_seconds_total", 6, outcome_us, "Summed durations of the real outcomes");
    CHAOSI_ONE("log_lines_total", 0, log_lines, "Written");
    CHAOSI_ONE("log_dropped_total", 0, log_dropped, "Lost: the pipe was full or dead");
    CHAOSI_ONE("log_suppressed", 0, log_suppressed, "Faults without a log line of their own");
    CHAOSI_ONE("connections_total", 0, connections, "Proxy: accepted");
    CHAOSI_ONE("connections_open", 0, connections_now, "Proxy: open now");
    CHAOSI_ONE("proxied_total", 0, proxied, "Proxy: replies relayed from the upstream");
    CHAOSI_ONE("rejected_total", 0, rejected, "Proxy: own 4xx");
    CHAOSI_ONE("upstream_errors_total", 0, upstream_errors, "Proxy: own 502, 504 and cut replies");
    CHAOSI_ONE("capped_seconds_total", 3, capped_ms, "Proxy: time in which the connection limit set the pace, not the fault");
    return o.len;
}

/* Who and why, from the config in use. */
CHAOSI_FN void chaosi_put_experiment(chaosi_out *o, chaos *c) {
    chaosi_slot *slot = chaosi_enter(c);
    const chaos_config *cfg = &slot->cfg;
    if (cfg->name.len) chaosi_put_text(o, cfg, "name", cfg->name);
    if (cfg->owner.len) chaosi_put_text(o, cfg, "owner", cfg->owner);
    if (cfg->note.len) chaosi_put_text(o, cfg, "note", cfg->note);
    chaosi_put_number(o, "seed", (long long)cfg->seed);
    chaosi_leave(slot);
}

/* By chaosi_news: its name in the log, its event (-1 = none). */
static const struct {
    const char *action;
    int event;
} chaosi_telling[] = {
    {"open", -1}, {"state", CHAOS_EVENT_STATE}, {"config", CHAOS_EVENT_CONFIG}, {"fetch-failed", CHAOS_EVENT_NOTE}, {"heartbeat", -1}};

/* One line about the handle, and its event. */
CHAOSI_FN void chaosi_say(chaos *c, chaosi_news what) {
    char buf[CHAOSI_LINE_MAX], when[80];
    bool failed = what == CHAOSI_FETCH_FAILED;
    chaos_report s;
    chaosi_out o;
    int event = chaosi_telling[what].event;
    chaosi_report(c, &s);
    if (event >= 0 && c->desc.event) chaosi_event(c, (chaos_event_kind)event, s.state, failed ? s.problem : s.reason, NULL);
    if (c->desc.quiet) return;
    o = chaosi_line(c, buf, s.state == CHAOS_STATE_INVALID ? "error" : failed ? "warn" : "info", chaosi_telling[what].action);
    if (what == CHAOSI_OPENED) {
        chaosi_put_str(&o, "version", CHAOS_VERSION);
        chaosi_put_str(&o, "config", c->source.name);
        chaosi_put_str(&o, "ways", chaos_sources());
        chaosi_put_number(&o, "canary_slot", chaosi_canary_slot(chaosi_str(c->instance)));
        chaosi_put_number(&o, "ttl_on_ms", (long long)chaosi_ttl_ms(c, true));
        chaosi_put_number(&o, "ttl_off_ms", (long long)chaosi_ttl_ms(c, false));
    }
    if (s.way[0]) chaosi_put_str(&o, "way", s.way);
    if (failed) chaosi_put_str(&o, "error", s.problem);
    chaosi_put_str(&o, "state", chaos_state_text(s.state));
    chaosi_put_str(&o, "reason", s.reason);
    chaosi_put_number(&o, "config_version", (long long)s.version);
    if (s.end_ms) chaosi_put_str(&o, "end", chaosi_rfc3339(when, s.end_ms, false));
    if (s.age_ms >= 0) chaosi_put_number(&o, "age_ms", s.age_ms);
    chaosi_put_str(&o, "service", c->service);
    chaosi_put_str(&o, "instance", c->instance);
    if (chaosi_is_active(s.state)) chaosi_put_experiment(&o, c);
    if (what == CHAOSI_BEAT) chaosi_put_number(&o, "requests", (long long)s.requests);
    if (what == CHAOSI_BEAT) chaosi_put_number(&o, "injected", (long long)chaosi_all_faults(&s));
    chaosi_emit(c, &o);
}

/* A tick tells what was suppressed, and while on once a minute the heartbeat. */
CHAOSI_FN void chaosi_tell(chaos *c, chaosi_news what) {
    if (what == CHAOSI_TICK) {
        chaosi_u64 now = chaosi_now(c, false);
        chaosi_log_summary(c);
        CHAOSI_LOCK(&c->lock);
        if (CHAOSI_LOAD(&c->armed) && now >= c->next_beat) what = CHAOSI_BEAT;
        if (what == CHAOSI_BEAT) c->next_beat = now + CHAOSI_BEAT_MS * CHAOSI_MS;
        CHAOSI_UNLOCK(&c->lock);
    }
    if (what != CHAOSI_TICK) chaosi_say(c, what);
}

/* ==== >>decide ================================================================================================ */
/* Gates, judge, budgets, counters: the decision as a program meets it, and the waiting. */
#define CHAOSI_MODES_IN_PROCESS (1u << CHAOS_PASS | 1u << CHAOS_DELAY | 1u << CHAOS_STATUS)

/* A place of maxConcurrent, 0 = none free. Places are counters, odd while taken, so a repeated chaos_done finds nothing. */
CHAOSI_FN chaosi_u32 chaosi_take_ticket(chaos *c, chaosi_u32 most, chaosi_u64 key) {
    chaosi_u32 i, at, old;
    for (i = 0; i < most; i++) {
        at = (chaosi_u32)((key + i) % most);
        old = CHAOSI_LOAD(&c->tickets[at]);
        if (!(old & 1u) && CHAOSI_CAS(&c->tickets[at], &old, old + 1u)) return (old + 1u) << 12 | at;
    }
    return 0;
}

CHAOSI_FN void chaosi_give_ticket(chaos *c, chaosi_u32 ticket) {
    chaosi_u32 *place = &c->tickets[ticket % CHAOS_MAX_CONCURRENT];
    chaosi_u32 now = CHAOSI_LOAD(place);
    if (ticket && (now & 1u) && now << 12 == (ticket & ~(chaosi_u32)(CHAOS_MAX_CONCURRENT - 1))) CHAOSI_CAS(place, &now, now + 1u);
}

/* One of maxFaults of this config. A reader of an older config gets none. */
CHAOSI_FN bool chaosi_take_fault(chaos *c, chaosi_u32 most, chaosi_u32 serial) {
    chaosi_u64 old = CHAOSI_LOAD(&c->budget), want;
    do {
        chaosi_u32 done = old >> 32 == serial ? (chaosi_u32)old : 0;
        if (old >> 32 > serial || done >= most) return false;
        want = (chaosi_u64)serial << 32 | (done + 1u);
    } while (!CHAOSI_CAS(&c->budget, &old, want));
    return true;
}

CHAOSI_FN bool chaosi_within_budget(chaos *c, const chaosi_hot *hot, chaos_verdict *v) {
    if (hot->max_concurrent && !(v->ticket = chaosi_take_ticket(c, hot->max_concurrent, v->key))) return false;
    if (!hot->max_faults || chaosi_take_fault(c, hot->max_faults, hot->serial)) return true;
    chaosi_give_ticket(c, v->ticket);
    return false;
}

/* A fault was rolled: may it happen, and who hears of it? Leaves v as it is to be carried out. */
CHAOSI_FN void chaosi_settle_fault(chaos *c, const chaosi_hot *hot, chaos_verdict *v, chaosi_u64 mono, const char *rule, const char *id) {
    chaosi_u32 needs = 1u << v->kind | (v->bandwidth ? 1u << CHAOS_PACE : 0u);
    size_t word = CHAOSI_WORD(injected) + v->kind;
    bool inject = false;
    if (CHAOSI_UNLIKELY((CHAOSI_LOAD(&c->modes) & needs) != needs)) {
        word = CHAOSI_WORD(unsupported);
        if (CHAOSI_SWAP(&c->unsupported_told, hot->serial + 1u) != hot->serial + 1u && !c->desc.quiet)
            chaosi_log_fault(c, v, rule, "unsupported", id);
    } else if (!hot->dry_run && !chaosi_within_budget(c, hot, v)) {
        word = CHAOSI_WORD(over_budget);
    } else {
        inject = !hot->dry_run;
        if (!inject) word = CHAOSI_WORD(would_inject);
        if (chaosi_may_log(c, mono)) {
            CHAOSI_ADD(&c->log_faults, 1u); /* before the fault is counted: the difference is what a summary tells */
            chaosi_log_fault(c, v, rule, inject ? "inject" : "dryrun", id);
        }
        if (CHAOSI_UNLIKELY(c->emf) && inject) chaosi_put_emf(c, v, id);
        if (CHAOSI_UNLIKELY(c->desc.event != NULL))
            chaosi_event(c, CHAOS_EVENT_FAULT, inject ? CHAOS_STATE_ON : CHAOS_STATE_DRY_RUN, "", v);
    }
    chaosi_count(c, word, 1);
    if (!inject) chaosi_spare(v);
}

/* The four-key config: nothing to match but the default exclude, and that only when a fault would happen. */
CHAOSI_FN bool chaosi_judge_simple(const chaosi_hot *hot, const chaos_request *req, chaosi_u64 key, chaos_verdict *v) {
    chaosi_subject s;
    memset(v, 0, sizeof *v);
    chaosi_roll_faults(&hot->fault, hot->base, key, v);
    if (!v->kind || (chaosi_ready(&s, req) && !chaosi_default_excluded(&s))) return false;
    chaosi_spare(v);
    return true;
}

/* The slot may be newer than the block read before, so that is read anew. */
CHAOSI_FN bool chaosi_judge_slot(chaos *c, chaosi_hot *hot, const chaos_request *req, chaosi_u64 key, chaos_verdict *v, char *rule) {
    chaosi_slot *slot = chaosi_enter(c);
    bool excluded = false;
    if (slot->hot.off) memset(v, 0, sizeof *v);
    else excluded = chaosi_judge(&slot->cfg, req, key, v);
    *hot = slot->hot;
    if (v->kind && v->rule) chaosi_copy(rule, 65, slot->cfg.text + slot->cfg.rules[v->rule - 1].name.at);
    chaosi_leave(slot);
    return excluded;
}

CHAOSI_FN void chaosi_decide(chaos *c, const chaos_request *req, chaos_verdict *v) {
    chaosi_hot hot;
    chaosi_u64 mono = chaosi_now_coarse(c, false), key;
    bool excluded, cut;
    char rule[65];
    chaosi_read_hot(c, &hot);
    if (CHAOSI_UNLIKELY(mono >= hot.until_mono || chaosi_now_coarse(c, true) >= hot.until_wall)) {
        chaosi_notice(c, false);
        memset(v, 0, sizeof *v);
        return;
    }
    rule[0] = 0;
    key = chaosi_next_number(c);
    key = req && req->key ? chaosi_hash(chaosi_given(req->key, req->key_len)) : chaosi_mix(c->instance_hash + key);
    excluded = hot.simple ? chaosi_judge_simple(&hot, req, key, v) : chaosi_judge_slot(c, &hot, req, key, v, rule);
    v->version = hot.version;
    cut = req && req->delay_limit_us && v->delay_us > req->delay_limit_us;
    if (cut) v->delay_us = req->delay_limit_us;
    if (excluded) chaosi_count(c, CHAOSI_WORD(excluded), 1);
    else if (v->kind) chaosi_settle_fault(c, &hot, v, mono, rule, req ? req->id : NULL);
    if (cut && v->kind) chaosi_count(c, CHAOSI_WORD(skipped), 1);
}

/* Sleeps until the deadline (monotonic ns) while chaos is on. fd2 (-1 = none): return early when it is readable, too. */
CHAOSI_FN void chaosi_wait(chaos *c, chaosi_u64 deadline, int fd2) {
    chaosi_u64 start = chaosi_clock(false);
    CHAOSI_ENTER(&c->waiting, 1u);
    while (CHAOSI_SEQ(&c->armed)) {
        chaosi_u64 now = chaosi_clock(false), own = chaosi_now(c, false), rest;
        chaosi_hot hot;
        chaosi_read_hot(c, &hot);
        hot.until_mono = chaosi_later(hot.until_mono, chaosi_coarse(c));
        if (own >= hot.until_mono) chaosi_notice(c, false);
        if (now >= deadline || own >= hot.until_mono || (fd2 >= 0 && chaosi_readable(fd2))) break;
        rest = chaosi_min(deadline - now, c->desc.clock ? 20 * CHAOSI_MS : hot.until_mono - own);
        if (chaosi_own(c)) chaosi_sleep_until(now + rest, CHAOSI_WAKE(c)[0], fd2);
        else chaosi_nap(chaosi_min(rest, 50 * CHAOSI_MS)); /* the pipe is the parent's */
    }
    chaosi_count(c, CHAOSI_WORD(delay_ms), (chaosi_clock(false) - start) / CHAOSI_MS);
    CHAOSI_ENTER(&c->waiting, ~0u);
}

/* Retry-After and body of v's injected reply, from the config it came from if that is still in use. */
CHAOSI_FN int chaosi_reply_of(chaos *c, const chaos_verdict *v, chaosi_out *body) {
    chaosi_slot *slot = chaosi_enter(c);
    const chaos_config *cfg = &slot->cfg;
    const chaos_fault *f = v->rule && v->rule <= cfg->rule_count ? &cfg->rules[v->rule - 1].fault : &cfg->fault;
    bool in_use = slot->hot.version == v->version && v->rule <= cfg->rule_count;
    int seconds = in_use ? f->retry_after : -1;
    if (in_use && f->error_body.len) chaosi_put(body, cfg->text + f->error_body.at, f->error_body.len);
    else chaosi_puts(body, "fault injected on purpose (chaos.h)\n");
    chaosi_leave(slot);
    return seconds;
}

CHAOSI_FN size_t chaosi_body_of(chaos *c, const chaos_verdict *v, char *buf, size_t cap) {
    chaosi_out o = chaosi_into(buf, cap);
    chaosi_reply_of(c, v, &o);
    return o.len;
}

CHAOSI_FN int chaosi_retry_after_of(chaos *c, const chaos_verdict *v) {
    chaosi_out none = chaosi_into(NULL, 0);
    return chaosi_reply_of(c, v, &none);
}

/* A real outcome, one that was not injected: status (0 = none) and duration. */
CHAOSI_FN void chaosi_count_outcome(chaos *c, int status, chaosi_u64 us) {
    chaosi_count(c, CHAOSI_WORD(outcomes) + (status >= 100 && status < 600 ? (size_t)status / 100 : 0), 1);
    chaosi_count(c, CHAOSI_WORD(outcome_us), us);
}

#ifndef CHAOS_NO_NET
/* ==== >>client ================================================================================================ */
/* One exchange in plain HTTP with somebody on this machine: agents and those who hand out credentials. */
typedef struct chaosi_got {
    char *buf; /* the caller's: the whole reply comes here */
    size_t cap;
    chaosi_span body; /* in buf, decoded, with a NUL behind it */
    chaosi_head head;
} chaosi_got;

/* Reads a reply to the end of its body. NULL = done, else what went wrong. */
CHAOSI_FN const char *chaosi_read_answer(int fd, chaosi_got *a, chaosi_u64 deadline) {
    chaosi_chunked chunk;
    size_t len = 0, head = 0; /* raw bytes until the head is whole; then the head and the body so far */
    int r = 0;
    memset(&chunk, 0, offsetof(chaosi_chunked, text));
    while (len + 1 < a->cap) {
        ssize_t n;
        size_t got, used;
        if (deadline != CHAOSI_NEVER && !chaosi_poll(fd, POLLIN, deadline)) return "no reply in time";
        n = recv(fd, a->buf + len, a->cap - 1 - len, deadline == CHAOSI_NEVER ? 0 : MSG_DONTWAIT);
        if (n < 0 && chaosi_would_block()) continue;
        if (n < 0) return strerror(errno);
        got = (size_t)n;
        if (n == 0 && (!head || a->head.chunked || a->head.has_length)) return "the connection ended before the reply did";
        if (!head) { /* 1xx is not asked for */
            r = chaosi_http_reply(&a->head, a->buf, len + got);
            if (r < 0 || (r && a->head.status < 200)) return "the reply is not valid HTTP";
            if (a->head.status == 204) a->head.has_length = true;
            got += len;
            len = head = (size_t)r;
            if (!head) len = got;
            if (!head) continue;
            got -= head;
            r = 0;
        }
        if (a->head.chunked) r = chaosi_chunked_feed(&chunk, a->buf + len, got, &used, &got);
        if (r < 0) return "the reply is not valid chunked coding";
        len += got;
        if (a->head.chunked ? r == 0 : a->head.has_length ? len - head < a->head.length : n > 0) continue;
        if (a->head.has_length && len - head > a->head.length) len = head + (size_t)a->head.length;
        a->body = chaosi_of(a->buf + head, len - head);
        a->buf[len] = 0;
        return NULL;
    }
    return "the reply is too large";
}

/* fields: lines of the head, each with its CRLF. UNSUPPORTED = nobody listens there. */
CHAOSI_FN chaos_result chaosi_http_call(chaosi_got *a, const char *method, const char *url, const char *fields, int ms, chaos_error *err) {
    char host[256] = "", port[8] = "80", request[8192];
    const char *at = strncmp(url, "http://", 7) == 0 ? url + 7 : "", *problem;
    chaosi_span authority = chaosi_of(at, strcspn(at, "/"));
    chaosi_u64 deadline = chaosi_clock(false) + (chaosi_u64)(unsigned)ms * CHAOSI_MS;
    chaosi_out o = chaosi_into(request, sizeof request);
    chaosi_address address;
    int fd, failed;
    if (!chaosi_is_host(authority) || !chaosi_split_address(authority, true, host, sizeof host, port, sizeof port))
        return chaosi_fail(err, CHAOS_ERR_ADDRESS, "%.100s is not http://HOST[:PORT]/...", url);
    chaosi_puts(&o, method);
    chaosi_puts(&o, " ");
    chaosi_puts(&o, at[authority.len] ? at + authority.len : "/");
    chaosi_puts(&o, " HTTP/1.1\r\n");
    chaosi_put_field(&o, chaosi_str("Host"), authority);
    chaosi_puts(&o, "User-Agent: chaos-h/" CHAOS_VERSION "\r\nConnection: close\r\n");
    chaosi_puts(&o, fields);
    chaosi_puts(&o, "\r\n");
    if (o.len >= o.cap) return chaosi_fail(err, CHAOS_ERR_TOO_LARGE, "the request to %.100s is too large", url);
    if (!chaosi_numeric(host, port, &address)) return chaosi_fail(err, CHAOS_ERR_ADDRESS, "%.100s: the host must be an address", url);
    fd = chaosi_socket(&address);
    if (fd < 0) return chaosi_fail(err, CHAOS_ERR_SYSTEM, "socket: %s", strerror(errno));
    failed = chaosi_connect(fd, &address, deadline);
    if (failed) problem = strerror(failed);
    else problem = chaosi_send_all(fd, request, o.len, deadline) ? chaosi_read_answer(fd, a, deadline) : "the request is not taken";
    close(fd);
    if (!problem) return CHAOS_OK;
    return chaosi_fail(err, failed == ECONNREFUSED ? CHAOS_ERR_UNSUPPORTED : CHAOS_ERR_UNREACHABLE, "%.100s: %s", url, problem);
}
#endif /* CHAOS_NO_NET */

#ifndef CHAOS_NO_PROXY
/* ==== >>proxy ================================================================================================= */
/* A blocking proxy. A connection without a request is parked in one epoll set; a worker that waits there takes the next that
   has something to say and serves it in straight-line code: read a head, decide, fault or forward, stream the reply, park.
   Upstream sockets live in a LIFO pool and are taken after the delay. Without epoll a worker stays with its connection. */
#define CHAOSI_BODY_BUFFER     65536u
#define CHAOSI_HEAD_ROOM       2048u /* what forwarding adds to a head */
#define CHAOSI_STAY_MS         20    /* while there are few clients, a worker waits this long for more from its own */
#define CHAOSI_LEAVE_MS        1000  /* after a stop, clients may come back to a kept connection for so long */
#define CHAOSI_GROW_MS         4     /* how often it is looked whether more workers are needed */
#define CHAOSI_SLOW_US         20000 /* a request that takes this long: more workers are needed */
#define CHAOSI_SLOWISH_US      500   /* this long: they are if a processor is free */
#define CHAOSI_RESOLVE_MS      30000 /* the upstream's name is looked up again */
#define CHAOSI_POOL_IDLE_NS    (30000 * CHAOSI_MS)
#define CHAOSI_POST_IDLE_NS    (500 * CHAOSI_MS)
#define CHAOSI_INJECT_BODY_MAX 65536u /* a request body this long is read before an injected answer, within 1 s */
#define CHAOSI_HANG_MAX_NS     (900000 * CHAOSI_MS)
#define CHAOSI_TOLD_NS         (60000 * CHAOSI_MS) /* one log line in this time for each kind of refusal */
#define CHAOSI_MODES_PROXY     ((1u << CHAOS_KIND_COUNT) - 1)
#ifndef CHAOSI_LATE
#define CHAOSI_LATE(ns) ((void)(ns)) /* for the benchmark: how long after its end an injected delay was noticed */
#endif

typedef struct chaosi_idle {
    int fd;
    chaosi_u64 since;
} chaosi_idle;

/* Where a client is: the two low bits of its `place`. NEWS: busy, and epoll told of bytes meanwhile. Whoever moves it from
   PARKED (the upper bits say since when, in ns) to BUSY owns it. */
#define CHAOSI_FREE   0u
#define CHAOSI_BUSY   1u
#define CHAOSI_NEWS   2u
#define CHAOSI_PARKED 3u

/* A client's connection: all that a parked one costs besides its socket. */
typedef struct chaosi_client {
    int fd, upstream; /* -1 = none; upstream: while its request is forwarded */
    chaosi_u64 place; /* to and from FREE under the lock */
    bool known;       /* to epoll */
    chaosi_u32 asked; /* it has sent a request */
    bool armed;       /* it tells of this client; not while a body or a tunnel is streamed */
    struct chaosi_client *next_free;
    char peer[48];
} chaosi_client;

typedef struct chaosi_proxy {
    chaos *c;
    chaos_proxy_desc d;                                    /* defaults filled in */
    int listener, ready;                                   /* ready: the epoll set of parked clients, the listener and the stop pipe */
    char host[256], port[8], host_port[300], prefix[1024]; /* of the upstream; host_port as Host would say it */
    chaosi_u32 workers, idle, served, starving, dial_failed;
    chaosi_u32 served_before;           /* a tick ago */
    chaosi_u32 most_workers;            /* since the allocator last gave back what those that went had */
    chaosi_u32 surplus;                 /* so many workers end when they have served */
    int looks;                          /* in a row that found a processor free */
    int processors, eager;              /* eager: so many workers are started at once and stay; more only while requests are slow */
    chaosi_u32 leaving, stopping, hard; /* replies say close; nobody takes a client any more; sockets are shut */
    chaosi_u64 drain_end;               /* CHAOSI_NEVER before the stop */
    chaosi_u64 told[32];                /* when each outcome was logged last */
    pthread_mutex_t lock;               /* guards what follows, and each client's `upstream` */
    int idle_upstreams, address_count, client_count;
    chaosi_u32 names;               /* counts changes of the addresses: pooled sockets do not outlive one */
    chaosi_u64 full_since, full_ns; /* since when clients wait at the limit, 0 = none does; what is not counted yet */
    bool full_told, preferred;      /* preferred: the first address is not the name's first, which did not answer */
    char limit[16];                 /* max_connections, for the log */
    chaosi_address addresses[CHAOSI_ADDRESSES];
    chaosi_client *clients, *free_clients; /* max_connections places; client_used of them were used */
    int client_used;
    chaosi_idle *pool; /* max_connections entries, the last one used on top */
    pthread_t gone;    /* the worker that left last, not joined yet */
    bool has_gone;
} chaosi_proxy;

typedef enum chaosi_body { CHAOSI_BODY_NONE, CHAOSI_BODY_LENGTH, CHAOSI_BODY_CHUNKED, CHAOSI_BODY_CLOSE } chaosi_body;

/* How a request ends; what the client is told, with a word of RFC 9209 section 2.3. The first ones are the client's fault. */
#define CHAOSI_OUTCOMES(X)                                                                                   \
    X(CHAOSI_BAD_HEAD, 400, "http_request_error", "the request is not valid HTTP")                           \
    X(CHAOSI_SLOW_HEAD, 408, "http_request_error", "the request head took too long")                         \
    X(CHAOSI_LONG_TARGET, 414, "http_request_error", "the request line is too long")                         \
    X(CHAOSI_BAD_EXPECT, 417, "http_request_error", "only 100-continue can be expected")                     \
    X(CHAOSI_BIG_HEAD, 431, "http_request_error", "the request head is too large")                           \
    X(CHAOSI_UNKNOWN_METHOD, 501, "http_request_error", "this method or transfer coding is not implemented") \
    X(CHAOSI_UNKNOWN_VERSION, 505, "http_request_error", "only HTTP/1.0 and HTTP/1.1 are spoken here")       \
    X(CHAOSI_BAD_BODY, 400, "http_request_error", "the request body is not valid chunked coding")            \
    X(CHAOSI_SLOW_BODY, 408, "http_request_error", "the request body took too long")                         \
    X(CHAOSI_DIAL_TIMEOUT, 504, "connection_timeout", "the upstream did not accept the connection in time")  \
    X(CHAOSI_DIAL_REFUSED, 502, "connection_refused", "the upstream refused the connection")                 \
    X(CHAOSI_DIAL_LIMIT, 503, "connection_limit_reached", "no descriptors or memory for another connection") \
    X(CHAOSI_DIAL_FAILED, 502, "destination_unavailable", "the upstream cannot be reached")                  \
    X(CHAOSI_TIMED_OUT, 504, "http_response_timeout", "the upstream did not answer in time")                 \
    X(CHAOSI_BAD_REPLY, 502, "http_protocol_error", "the upstream's reply is not valid HTTP, or was cut")    \
    X(CHAOSI_NO_REPLY, 502, "connection_terminated", "the upstream closed without a reply")                  \
    X(CHAOSI_CLIENT_GONE, 0, "", "")                                                                         \
    X(CHAOSI_STALE, 0, "", "")                                                                               \
    X(CHAOSI_REPLY, 0, "", "")

#define CHAOSI_OUTCOME_ID(id, status, error, text) id,
typedef enum chaosi_outcome { CHAOSI_OUTCOMES(CHAOSI_OUTCOME_ID) CHAOSI_OUTCOME_COUNT } chaosi_outcome;

#define CHAOSI_OUTCOME_ROW(id, status, error, text) {status, error, text},
static const struct chaosi_refusal {
    int status;
    const char *error, *text;
} chaosi_refusals[CHAOSI_OUTCOME_COUNT] = {CHAOSI_OUTCOMES(CHAOSI_OUTCOME_ROW)};

/* One direction of one message: raw bytes come into buf, are framed, and go out. */
typedef struct chaosi_flow {
    int from, to; /* to -1 = discard */
    char *buf;
    size_t cap, at, len; /* raw bytes at buf[at..at+len) */
    const chaosi_head *head;
    chaosi_body body;
    bool chunk_out;            /* frame as chunked for the receiver */
    chaosi_u64 left, position; /* body bytes to come (of a known length), and framed so far */
    chaosi_u8 damage;          /* CHAOS_TRUNCATE, CHAOS_CORRUPT or 0 */
    struct iovec out[7];       /* what is on its way to `to` */
    int out_count;
    size_t used;  /* raw bytes that `out` stands for */
    size_t slice; /* most body bytes a piece, 0 = no limit (bandwidth) */
    chaosi_u64 paced_until;
    char size_line[24];
    chaosi_u64 moved; /* bytes sent */
    bool ended;       /* the body's last byte has been framed */
    bool cut;         /* ended before its time, on purpose */
    bool done, eof, send_failed, bad;
    chaosi_chunked chunk;
} chaosi_flow;

typedef struct chaosi_worker {
    chaosi_proxy *p;
    chaosi_client *who;
    int client;
    bool reused;          /* the upstream socket has served before */
    chaosi_u32 names;     /* which addresses of the name it was dialled by */
    char *in, *rep, *out; /* client's bytes, upstream's bytes, the head being sent */
    size_t in_cap, rep_cap, out_cap;
    size_t in_len, rep_len;
    size_t head_len; /* of the request in `in` */
    chaosi_head req, reply;
    chaos_verdict verdict;
    bool replied; /* the client has got part of a final reply */
    bool close;   /* the client's connection ends after this reply */
    bool lingers; /* there may be unread input: a plain close would be an RST and could destroy the reply */
    bool ready;   /* the client has something to say */
    bool parks;   /* it has not: the connection waits without a worker */
    chaosi_flow up, down;
} chaosi_worker;

CHAOSI_FN chaosi_u64 chaosi_in(int ms) { return chaosi_clock(false) + (chaosi_u64)(unsigned)ms * CHAOSI_MS; }

/* Puts a descriptor into the epoll set, or says whether it still tells of it. A client is edge-triggered and stays in it, so
   that a request costs no epoll_ctl. */
CHAOSI_FN bool chaosi_watch(chaosi_proxy *p, bool add, int fd, void *what, bool on) {
#ifdef CHAOSI_EPOLL
    struct epoll_event e;
    memset(&e, 0, sizeof e);
    if (what == p) e.events = EPOLLIN;
    else if (what == &p->listener) e.events = on ? EPOLLIN : EPOLLIN | EPOLLONESHOT; /* at the limit: who comes is told of once */
    else e.events = on ? EPOLLIN | EPOLLET : EPOLLET;                                /* off, a hang-up is still told of, once */
    e.data.ptr = what;
    return epoll_ctl(p->ready, add ? EPOLL_CTL_ADD : EPOLL_CTL_MOD, fd, &e) == 0;
#else
    (void)p, (void)add, (void)fd, (void)what, (void)on;
    return false;
#endif
}

/* -- upstream -- */
/* Under the lock, so that a hard stop never shuts down a number that was closed meanwhile. */
CHAOSI_FN void chaosi_set_upstream(chaosi_worker *w, int fd) {
    pthread_mutex_lock(&w->p->lock);
    w->who->upstream = fd;
    if (fd >= 0 && CHAOSI_LOAD(&w->p->hard)) shutdown(fd, SHUT_RDWR);
    pthread_mutex_unlock(&w->p->lock);
}

CHAOSI_FN void chaosi_drop_upstream(chaosi_worker *w) {
    int fd = w->who->upstream;
    if (fd < 0) return;
    chaosi_set_upstream(w, -1);
    close(fd);
}

CHAOSI_FN bool chaosi_is_idempotent(const chaosi_head *h) { /* RFC 9110 section 9.2.2 */
    return chaosi_listed("GET,HEAD,OPTIONS,PUT,DELETE,TRACE", h->method);
}

CHAOSI_FN bool chaosi_has_body(const chaosi_head *h) { return h->chunked || h->length > 0; }

CHAOSI_FN chaosi_body chaosi_request_body(const chaosi_head *h) {
    return h->chunked ? CHAOSI_BODY_CHUNKED : h->has_length ? CHAOSI_BODY_LENGTH : CHAOSI_BODY_NONE;
}

/* A pooled socket that is still good, -1 = none. */
CHAOSI_FN int chaosi_pool_take(chaosi_worker *w, chaosi_u64 most_idle) {
    chaosi_proxy *p = w->p;
    chaosi_u64 now = chaosi_clock(false);
    for (;;) {
        int fd = -1;
        pthread_mutex_lock(&p->lock);
        w->names = p->names;
        if (!CHAOSI_LOAD(&p->hard) && p->idle_upstreams && now < p->pool[p->idle_upstreams - 1].since + most_idle)
            w->who->upstream = fd = p->pool[--p->idle_upstreams].fd;
        pthread_mutex_unlock(&p->lock);
        if (fd < 0 || chaosi_is_quiet(fd)) return fd;
        chaosi_drop_upstream(w);
    }
}

CHAOSI_FN void chaosi_pool_put(chaosi_worker *w) {
    chaosi_proxy *p = w->p;
    int fd = w->who->upstream;
    bool kept;
    pthread_mutex_lock(&p->lock);
    kept = !CHAOSI_LOAD(&p->stopping) && p->idle_upstreams < p->d.max_connections && w->names == p->names;
    if (kept) {
        p->pool[p->idle_upstreams].fd = fd;
        p->pool[p->idle_upstreams++].since = chaosi_clock(false);
    }
    w->who->upstream = -1;
    pthread_mutex_unlock(&p->lock);
    if (!kept) close(fd);
}

/* Closes pooled sockets that were idle for longer than `ns`; the oldest are at the bottom. */
CHAOSI_FN void chaosi_pool_trim(chaosi_proxy *p, chaosi_u64 ns) {
    chaosi_u64 now;
    int n = 0, i;
    pthread_mutex_lock(&p->lock);
    now = chaosi_clock(false); /* not before: no socket came later */
    while (n < p->idle_upstreams && now - p->pool[n].since >= ns) close(p->pool[n++].fd);
    p->idle_upstreams -= n;
    for (i = 0; i < p->idle_upstreams; i++) p->pool[i] = p->pool[i + n];
    pthread_mutex_unlock(&p->lock);
}

/* The address that answered is the first to be dialled from now on. */
CHAOSI_FN void chaosi_prefer(chaosi_proxy *p, const chaosi_address *good) {
    int i;
    pthread_mutex_lock(&p->lock);
    for (i = 0; i < p->address_count; i++)
        if (memcmp(&p->addresses[i], good, sizeof *good) == 0) {
            p->addresses[i] = p->addresses[0];
            p->addresses[0] = *good;
            p->preferred = true;
        }
    pthread_mutex_unlock(&p->lock);
}

/* Dials the addresses in turn until one answers. 0 = connected, else errno. */
CHAOSI_FN int chaosi_dial_upstream(chaosi_worker *w) {
    chaosi_proxy *p = w->p;
    chaosi_address addresses[CHAOSI_ADDRESSES];
    int i, count, problem = EHOSTUNREACH;
    pthread_mutex_lock(&p->lock);
    count = p->address_count;
    memcpy(addresses, p->addresses, sizeof addresses);
    pthread_mutex_unlock(&p->lock);
    w->reused = false;
    for (i = 0; i < count; i++) {
        int fd = chaosi_socket(&addresses[i]);
        if (fd < 0) chaosi_pool_trim(p, 0); /* perhaps the pool has the descriptors */
        if (fd < 0 && (fd = chaosi_socket(&addresses[i])) < 0) return errno;
        chaosi_set_upstream(w, fd);
        problem = chaosi_connect(fd, &addresses[i], chaosi_in(p->d.connect_timeout));
        if (!problem) chaosi_set_patience(fd, p->d.reply_timeout);
        if (!problem && i) chaosi_prefer(p, &addresses[i]);
        if (!problem) return 0;
        chaosi_drop_upstream(w);
    }
    CHAOSI_ORDERED(&p->dial_failed, 1u); /* the name may have moved: the resolver looks now */
    return problem;
}

/* -- flows -- */
CHAOSI_FN void chaosi_flow_start(chaosi_flow *f, const chaosi_head *head, chaosi_body body, int from, int to, char *buf, size_t cap,
                                 size_t len) {
    memset(f, 0, offsetof(chaosi_flow, chunk) + offsetof(chaosi_chunked, text));
    f->head = head, f->body = body;
    f->from = from, f->to = to;
    f->buf = buf, f->cap = cap, f->len = len;
    f->left = head->length;
    f->ended = body == CHAOSI_BODY_NONE || (body == CHAOSI_BODY_LENGTH && !f->left);
}

/* The request's side. */
CHAOSI_FN void chaosi_start_up(chaosi_worker *w, int to, chaosi_body body) {
    size_t at = w->head_len;
    chaosi_flow_start(&w->up, &w->req, body, w->client, to, w->in + at, w->in_cap - at, w->in_len - at);
}

CHAOSI_FN void chaosi_flow_out(chaosi_flow *f, const void *at, size_t len) {
    if (!len || f->to < 0) return;
    f->out[f->out_count].iov_base = (void *)(size_t)at;
    f->out[f->out_count++].iov_len = len;
}

/* Truncates (a body of known length at its half, another one within its first piece) or corrupts (one byte in 64, from the
   first on, is inverted). Returns how many of the bytes are still sent. */
CHAOSI_FN size_t chaosi_damage(chaosi_flow *f, char *data, size_t made) {
    chaosi_u64 end = f->body == CHAOSI_BODY_LENGTH ? f->head->length / 2 : made / 2;
    size_t i;
    if (f->damage == CHAOS_CORRUPT)
        for (i = (size_t)(0 - f->position % 64) & 63u; i < made; i += 64) data[i] = (char)~data[i];
    f->position += made;
    if (f->damage != CHAOS_TRUNCATE || !made || f->position <= end) return made;
    f->ended = f->cut = true;
    return (size_t)(end - (f->position - made));
}

/* Frames some of the raw bytes. */
CHAOSI_FN void chaosi_flow_frame(chaosi_flow *f) {
    char *data = f->buf + f->at;
    size_t most = f->slice && f->slice < f->len ? f->slice : f->len, made = most, sent;
    int r = 0;
    f->used = most;
    if (f->body == CHAOSI_BODY_LENGTH) {
        if (made > f->left) made = f->used = (size_t)f->left;
        f->left -= made;
        f->ended = f->left == 0;
    } else if (f->body == CHAOSI_BODY_CHUNKED) {
        r = chaosi_chunked_feed(&f->chunk, data, most, &f->used, &made);
        f->bad = r < 0;
        f->ended = r > 0;
        if (f->bad) return;
    }
    sent = f->damage ? chaosi_damage(f, data, made) : made;
    if (f->chunk_out && made) chaosi_flow_out(f, f->size_line, (size_t)snprintf(f->size_line, sizeof f->size_line, "%zx\r\n", made));
    chaosi_flow_out(f, data, sent);
    if (!f->chunk_out || f->cut) return;
    if (made) chaosi_flow_out(f, "\r\n", 2);
    if (!f->ended) return;
    chaosi_flow_out(f, "0\r\n", 3);
    chaosi_flow_out(f, f->chunk.text, chaosi_clean_trailers(f->head, f->chunk.text, f->chunk.text_len));
    chaosi_flow_out(f, "\r\n", 2);
}

/* Sends what is framed. False = would block, or failed. */
CHAOSI_FN bool chaosi_flow_send(chaosi_flow *f) {
    struct msghdr m;
    ssize_t n;
    int i, k;
    memset(&m, 0, sizeof m);
    m.msg_iov = f->out;
    m.msg_iovlen = (size_t)f->out_count; /* size_t on glibc, int elsewhere */
    n = sendmsg(f->to, &m, MSG_DONTWAIT | CHAOSI_NOSIGNAL);
    if (n < 0) {
        f->send_failed = !chaosi_would_block();
        return false;
    }
    f->moved += (chaosi_u64)n;
    for (i = 0; i < f->out_count && (size_t)n >= f->out[i].iov_len; i++) n -= (ssize_t)f->out[i].iov_len;
    for (k = 0; i + k < f->out_count; k++) f->out[k] = f->out[i + k];
    f->out_count = k;
    if (k) {
        f->out[0].iov_base = (char *)f->out[0].iov_base + n;
        f->out[0].iov_len -= (size_t)n;
    }
    return true;
}

/* Frames and sends until it has to wait for room, for bytes, or for the pace. A head goes out with the first of its body. */
CHAOSI_FN void chaosi_flow_push(chaosi_flow *f) {
    while (!f->done && !f->bad && !f->send_failed) {
        bool paced = f->paced_until && chaosi_clock(false) < f->paced_until;
        if (f->len && !f->used && !f->ended && !paced) {
            chaosi_flow_frame(f);
            if (f->slice && f->paced_until) f->paced_until += 50 * CHAOSI_MS;
        } else if (f->out_count) {
            if (!chaosi_flow_send(f)) return;
        } else {
            f->at += f->used;
            f->len -= f->used;
            if (!f->len) f->at = 0;
            f->done = f->ended;
            if (!f->used) return;
            f->used = 0;
        }
    }
}

CHAOSI_FN bool chaosi_flow_wants_bytes(const chaosi_flow *f) {
    return !f->done && !f->bad && !f->send_failed && !f->eof && !f->out_count && !f->ended && !f->len;
}

/* Reads once. False = nothing there now. */
CHAOSI_FN bool chaosi_flow_fill(chaosi_flow *f) {
    size_t most = f->cap;
    ssize_t n;
    if (f->body == CHAOSI_BODY_LENGTH && f->left < most) most = (size_t)f->left; /* never into the next message */
    n = recv(f->from, f->buf, most, MSG_DONTWAIT);
    if (n < 0 && chaosi_would_block()) return false;
    if (n > 0) {
        f->len = (size_t)n;
        return true;
    }
    f->eof = true;
    if (n == 0 && f->body == CHAOSI_BODY_CLOSE) f->done = true;
    return false;
}

/* Moves bytes until it would block; bounded, so that the other direction gets its turn. */
CHAOSI_FN void chaosi_flow_move(chaosi_flow *f) {
    int rounds = 16;
    chaosi_flow_push(f);
    while (rounds-- > 0 && chaosi_flow_wants_bytes(f) && chaosi_flow_fill(f)) chaosi_flow_push(f);
}

CHAOSI_FN bool chaosi_flow_over(const chaosi_flow *f) { return f->done || f->bad || f->send_failed || f->eof; }

/* Waits until one of the flows can move (or the upstream has something to say, when listening). 0 = timeout. */
CHAOSI_FN int chaosi_flows_wait(chaosi_worker *w, bool listening, chaosi_u64 deadline) {
    struct pollfd p[2];
    chaosi_u64 now = chaosi_clock(false), ms = deadline > now ? (deadline - now + CHAOSI_MS - 1) / CHAOSI_MS : 0;
    int r;
    memset(p, 0, sizeof p);
    p[0].fd = w->client;
    p[1].fd = w->who->upstream;
    if (chaosi_flow_wants_bytes(&w->up)) p[0].events = (short)(p[0].events | POLLIN);
    if (!chaosi_flow_over(&w->up) && w->up.out_count) p[1].events = (short)(p[1].events | POLLOUT);
    if (listening || chaosi_flow_wants_bytes(&w->down)) p[1].events = (short)(p[1].events | POLLIN);
    if (!listening && !chaosi_flow_over(&w->down) && w->down.out_count) p[0].events = (short)(p[0].events | POLLOUT);
    if (!p[0].events) p[0].fd = -1; /* a hang-up we do not wait for must not spin */
    if (!p[1].events) p[1].fd = -1;
    for (;;) {
        r = poll(p, 2, (int)chaosi_min(ms, 60000));
        now = chaosi_clock(false);
        ms = deadline > now ? (deadline - now + CHAOSI_MS - 1) / CHAOSI_MS : 0;
        if (r > 0) break;
        if (!ms || (r < 0 && errno != EINTR)) return 0;
    }
    return 2 | (p[1].revents & (POLLIN | POLLHUP | POLLERR) ? 4 : 0);
}

/* -- replies of our own -- */
CHAOSI_FN bool chaosi_bodiless(const chaosi_worker *w, int status) {
    return status < 200 || status == 204 || status == 304 || chaosi_same(w->req.method, chaosi_str("HEAD"));
}

CHAOSI_FN void chaosi_put_connection(chaosi_out *o, chaosi_worker *w) {
    w->close = w->close || CHAOSI_LOAD(&w->p->leaving);
    if (w->close) chaosi_puts(o, "Connection: close\r\n");
    else if (w->req.minor == 0) chaosi_puts(o, "Connection: keep-alive\r\n");
}

/* A whole small reply; fields = its own lines. */
CHAOSI_FN void chaosi_answer(chaosi_worker *w, int status, const char *fields, const char *body, size_t body_len) {
    chaosi_out o = chaosi_into(w->out, w->out_cap);
    char line[64];
    snprintf(line, sizeof line, "HTTP/1.1 %d %s\r\n", status, chaosi_status_text(status));
    chaosi_puts(&o, line);
    chaosi_puts(&o, fields);
    if (status != 204 && status != 304) chaosi_put_framing(&o, false, true, body_len);
    if (body_len) chaosi_puts(&o, "Content-Type: text/plain; charset=utf-8\r\n");
    chaosi_put_connection(&o, w);
    chaosi_puts(&o, "\r\n");
    if (!chaosi_bodiless(w, status)) chaosi_put(&o, body, body_len);
    w->replied = true;
    if (!chaosi_send_all(w->client, w->out, o.len, chaosi_in(w->p->d.body_timeout))) w->close = true;
}

/* An error of the proxy itself: it closes, so that no byte of a refused message is taken for the next one. Counted each
   time, logged once a minute for each kind. */
CHAOSI_FN void chaosi_refuse(chaosi_worker *w, chaosi_outcome why) {
    const struct chaosi_refusal *r = &chaosi_refusals[why];
    chaosi_proxy *p = w->p;
    chaosi_u64 now = chaosi_clock(false), told = CHAOSI_LOAD(&p->told[why]);
    char fields[160], body[200];
    int n = snprintf(body, sizeof body, "chaos-proxy: %s\n", r->text);
    snprintf(fields, sizeof fields, "Proxy-Status: chaos; error=%s\r\n", r->error);
    w->close = w->lingers = true;
    if (!r->status) return;
    chaosi_count(p->c, why <= CHAOSI_SLOW_BODY ? CHAOSI_WORD(rejected) : CHAOSI_WORD(upstream_errors), 1);
    if ((!told || now - told > CHAOSI_TOLD_NS) && CHAOSI_CAS(&p->told[why], &told, now))
        chaosi_note(p->c, why <= CHAOSI_SLOW_BODY ? "rejected" : "upstream-error", "client", w->who->peer, r->text);
    if (!w->replied) chaosi_answer(w, r->status, fields, body, (size_t)n);
}

CHAOSI_FN void chaosi_refuse_head(chaosi_worker *w, int status) {
    int why = CHAOSI_BAD_HEAD;
    while (why < CHAOSI_SLOW_BODY && chaosi_refusals[why].status != status) why++;
    memset(&w->req, 0, offsetof(chaosi_head, fields)); /* nothing of a refused head is to be trusted */
    w->req.method = chaosi_str("GET");
    w->req.minor = 1;
    chaosi_refuse(w, (chaosi_outcome)why);
}

CHAOSI_FN chaosi_outcome chaosi_dial_outcome(int problem) {
    if (problem == ETIMEDOUT) return CHAOSI_DIAL_TIMEOUT;
    if (problem == ECONNREFUSED) return CHAOSI_DIAL_REFUSED;
    return problem == EMFILE || problem == ENFILE || problem == ENOBUFS || problem == ENOMEM ? CHAOSI_DIAL_LIMIT : CHAOSI_DIAL_FAILED;
}

/* -- reading a request -- */
/* The first bytes of a request: when there are none now, the connection parks. */
CHAOSI_FN ssize_t chaosi_first_bytes(chaosi_worker *w) {
    size_t most = (size_t)w->p->d.head_limit;
    ssize_t n = -1;
#ifdef CHAOSI_EPOLL
    bool stay = CHAOSI_LOAD(&w->p->idle) && CHAOSI_LOAD(&w->p->c->connections_now) <= (chaosi_u32)w->p->eager;
    bool look = stay || w->ready || w->who->armed;
    if (look) n = stay ? chaosi_recv_first(w->client, w->in, most) : recv(w->client, w->in, most, MSG_DONTWAIT);
    w->parks = !look || (n < 0 && chaosi_would_block());
    w->ready = false;
#else
    chaosi_u64 deadline = chaosi_in(w->p->d.idle_timeout);
    while (!chaosi_readable(w->client) && !CHAOSI_SEQ(&w->p->stopping) && chaosi_clock(false) < deadline) {
        bool told = chaosi_readable(CHAOSI_STOP(w->p->c)[0]); /* from then on `stopping` is looked at */
        chaosi_sleep_until(told ? chaosi_min(deadline, chaosi_in(20)) : deadline, w->client, told ? -1 : CHAOSI_STOP(w->p->c)[0]);
    }
    n = recv(w->client, w->in, most, MSG_DONTWAIT);
#endif
    return n;
}

/* More bytes of a request head. */
CHAOSI_FN ssize_t chaosi_more_bytes(chaosi_worker *w, chaosi_u64 deadline) {
    ssize_t n;
    do {
        if (!chaosi_poll(w->client, POLLIN, deadline)) {
            chaosi_refuse_head(w, 408);
            return 0;
        }
        n = recv(w->client, w->in + w->in_len, (size_t)w->p->d.head_limit - w->in_len, MSG_DONTWAIT);
    } while (n < 0 && chaosi_would_block());
    return n;
}

/* A head in w->in: true = w->req and w->head_len are set, false = the connection parks, or is over (answered if need be). */
CHAOSI_FN bool chaosi_read_head(chaosi_worker *w) {
    chaosi_proxy *p = w->p;
    chaosi_u64 deadline = w->in_len ? chaosi_in(p->d.head_timeout) : 0;
    size_t seen = 0; /* bytes that brought no new line need no new parse */
    for (;;) {
        bool fresh = w->in_len && (!seen || memchr(w->in + seen, '\n', w->in_len - seen));
        int r = fresh ? chaosi_http_request(&w->req, w->in, w->in_len) : 0;
        ssize_t n;
        if (r > p->d.head_limit || (r == 0 && w->in_len >= (size_t)p->d.head_limit)) r = memchr(w->in, '\n', w->in_len) ? -431 : -414;
        if (r < 0) chaosi_refuse_head(w, -r);
        if (r) {
            w->head_len = r > 0 ? (size_t)r : 0;
            return r > 0;
        }
        seen = w->in_len;
        n = seen ? chaosi_more_bytes(w, deadline) : chaosi_first_bytes(w);
        if (n <= 0) return false;
        if (!seen) deadline = chaosi_in(p->d.head_timeout);
        w->in_len += (size_t)n;
    }
}

/* -- deciding -- */
CHAOSI_FN const char *chaosi_worker_header(void *user, const char *name, size_t *len) {
    const chaosi_head *h = &((chaosi_worker *)user)->req;
    chaosi_span value = h->authority.len && strcmp(name, "host") == 0 ? h->authority : chaosi_field_value(h, name);
    *len = value.len;
    return value.at;
}

CHAOSI_FN void chaosi_ask(chaosi_worker *w) {
    chaos_request r;
    chaosi_span key = w->p->d.key_header ? chaosi_field_value(&w->req, w->p->d.key_header) : chaosi_of(NULL, 0);
    memset(&w->verdict, 0, sizeof w->verdict);
    if (!CHAOSI_LOAD(&w->p->c->armed)) return;
    memset(&r, 0, sizeof r);
    r.method = w->req.method.at;
    r.method_len = w->req.method.len;
    r.path = w->req.path.len && w->req.path.at[0] != '?' ? w->req.path.at : "/"; /* as it goes upstream */
    r.path_len = r.path == w->req.path.at ? w->req.path.len : 1;
    r.key = key.len ? key.at : NULL;
    r.key_len = key.len;
    r.header = chaosi_worker_header;
    r.user = w;
    chaosi_decide(w->p->c, &r, &w->verdict);
}

CHAOSI_FN void chaosi_want_worker(chaosi_proxy *p);

/* Waits out an injected delay or hang; after a stop, no longer than half of the drain: the request needs the rest. */
CHAOSI_FN void chaosi_hold(chaosi_worker *w, chaosi_u64 ns) {
    chaosi_u64 deadline = chaosi_clock(false) + ns, now;
    if (!CHAOSI_LOAD(&w->p->idle)) chaosi_want_worker(w->p);
    chaosi_wait(w->p->c, deadline, CHAOSI_STOP(w->p->c)[0]);
    now = chaosi_clock(false);
    if (now >= deadline) CHAOSI_LATE(now - deadline);
    else if (CHAOSI_SEQ(&w->p->c->armed) && chaosi_readable(CHAOSI_STOP(w->p->c)[0]))
        chaosi_wait(w->p->c, chaosi_min(chaosi_min(deadline, chaosi_in(w->p->d.drain_timeout / 2)), CHAOSI_SEQ(&w->p->drain_end)), -1);
}

/* Reads and drops the request body, if it is short: true = the connection stays usable. */
CHAOSI_FN bool chaosi_swallow_body(chaosi_worker *w) {
    chaosi_u64 deadline = chaosi_in(1000);
    chaosi_flow *f = &w->up;
    size_t bytes = 0;
    chaosi_start_up(w, -1, chaosi_request_body(&w->req));
    if (chaosi_has_body(&w->req) && (w->req.expects || w->req.length > CHAOSI_INJECT_BODY_MAX)) return false;
    for (;;) {
        bytes += f->len;
        chaosi_flow_push(f);
        if (chaosi_flow_over(f) || bytes > CHAOSI_INJECT_BODY_MAX) return f->done;
        if (!chaosi_flow_fill(f) && !f->eof && !chaosi_poll(w->client, POLLIN, deadline)) return false;
    }
}

/* The injected answer. */
CHAOSI_FN void chaosi_inject_status(chaosi_worker *w) {
    char fields[160], body[1088];
    size_t len = chaosi_body_of(w->p->c, &w->verdict, body, sizeof body);
    int after = chaosi_retry_after_of(w->p->c, &w->verdict);
    int n = snprintf(fields, sizeof fields, "X-Chaos-Injected: %s\r\nCache-Control: no-store\r\n", chaos_kind_text(w->verdict.kind));
    if (after >= 0) snprintf(fields + n, sizeof fields - (size_t)n, "Retry-After: %d\r\n", after);
    if (w->verdict.status == 204 || w->verdict.status == 205 || w->verdict.status == 304) len = 0;
    chaosi_answer(w, w->verdict.status, fields, body, len);
}

#ifdef __linux__
#define CHAOSI_GONE 0x2000 /* POLLRDHUP, which only _GNU_SOURCE shows: seen behind a body that nobody reads */
#else
#define CHAOSI_GONE 0
#endif

/* No reply until the client goes, chaos goes off, or the cap. True = chaos went off: the request goes on. */
CHAOSI_FN bool chaosi_hang(chaosi_worker *w) {
    chaosi_u64 end = chaosi_clock(false) + CHAOSI_HANG_MAX_NS;
    while (chaosi_clock(false) < end) {
        struct pollfd client;
        client.fd = w->client;
        client.events = CHAOSI_GONE;
        client.revents = 0;
        chaosi_hold(w, 50 * CHAOSI_MS);
        if (!CHAOSI_SEQ(&w->p->c->armed)) return true;
        if (CHAOSI_LOAD(&w->p->leaving) || poll(&client, 1, 0) > 0) return false;
    }
    return false;
}

/* A fault in the place of a reply. With errorWhen "after" the upstream has done its work and its answer is thrown away. True
   = the client's connection may go on. */
CHAOSI_FN bool chaosi_inject(chaosi_worker *w) {
    bool read = w->verdict.after ? w->up.done : w->verdict.kind == CHAOS_RESET || chaosi_swallow_body(w);
    if (!read) w->close = w->lingers = true;
    if (w->verdict.kind == CHAOS_RESET) w->lingers = false, chaosi_make_reset(w->client);
    if (w->verdict.kind == CHAOS_STATUS) chaosi_inject_status(w);
    return w->verdict.kind == CHAOS_STATUS && !w->close;
}

/* -- forwarding -- */
CHAOSI_FN bool chaosi_put_upstream_head(chaosi_worker *w) {
    chaosi_out o = chaosi_into(w->out, w->out_cap);
    chaosi_span host = chaosi_field_value(&w->req, "host");
    if (w->req.authority.len) host = w->req.authority;
    if (w->p->d.host_header) host = chaosi_str(w->p->d.host_header);
    if (!host.len) host = chaosi_str(w->p->host_port);
    chaosi_put_request(&o, &w->req, w->p->prefix, host, w->who->peer);
    if (w->who->armed && (w->req.chunked || w->req.tunnel || w->req.length > CHAOSI_BODY_BUFFER))
        w->who->armed = !chaosi_watch(w->p, false, w->client, w->who, false); /* what is streamed wakes nobody else */
    chaosi_start_up(w, w->who->upstream, chaosi_request_body(&w->req));
    w->up.chunk_out = w->req.chunked;
    chaosi_flow_out(&w->up, w->out, o.len);
    return o.len < o.cap;
}

/* What a cache could keep a damaged or delayed reply by, past the experiment. */
CHAOSI_FN bool chaosi_is_validator(const chaosi_worker *w, chaosi_span name) {
    if (!w->verdict.kind) return false;
    if (chaosi_listed("cache-control,etag,last-modified,age", name)) return true;
    return w->verdict.kind == CHAOS_CORRUPT && chaosi_listed("content-md5,digest,content-digest,repr-digest", name);
}

/* Status line and fields of the upstream's reply, as they go on. */
CHAOSI_FN chaosi_out chaosi_put_reply(chaosi_worker *w) {
    chaosi_out o = chaosi_into(w->out, w->out_cap);
    char line[32];
    int i;
    snprintf(line, sizeof line, "HTTP/1.1 %d ", w->reply.status);
    chaosi_puts(&o, line);
    chaosi_put_span(&o, w->reply.reason);
    chaosi_puts(&o, "\r\n");
    for (i = 0; i < w->reply.count; i++) {
        chaosi_span name = w->reply.fields[i].name;
        if (!chaosi_is_hop_by_hop(&w->reply, name) && !chaosi_is_validator(w, name)) chaosi_put_field(&o, name, w->reply.fields[i].value);
    }
    return o;
}

/* An interim reply goes on to a client that can take it (not HTTP/1.0), and off the buffer. */
CHAOSI_FN void chaosi_forward_interim(chaosi_worker *w, int head_len) {
    chaosi_out o = chaosi_put_reply(w);
    chaosi_puts(&o, "\r\n");
    if (w->req.minor && o.len < o.cap) chaosi_send_all(w->client, w->out, o.len, chaosi_in(w->p->d.body_timeout));
    memmove(w->rep, w->rep + head_len, w->rep_len - (size_t)head_len);
    w->rep_len -= (size_t)head_len;
}

/* What is in w->rep: CHAOSI_REPLY = a final head (interim ones are passed on), CHAOSI_STALE = not yet. */
CHAOSI_FN chaosi_outcome chaosi_final_head(chaosi_worker *w, int *head_len) {
    for (;;) {
        *head_len = w->rep_len ? chaosi_http_reply(&w->reply, w->rep, w->rep_len) : 0;
        if (*head_len < 0 || (*head_len ? *head_len : (int)w->rep_len) > w->p->d.head_limit) return CHAOSI_BAD_REPLY;
        if (!*head_len) return CHAOSI_STALE;
        if (w->reply.status >= 200 || (w->reply.status == 101 && w->req.tunnel)) return CHAOSI_REPLY;
        if (w->reply.status == 101) return CHAOSI_BAD_REPLY;
        chaosi_forward_interim(w, *head_len);
        w->reused = false; /* it has answered: nothing is sent twice */
    }
}

/* Sends the request, its body as it comes, until the final reply head is there. When the request is out and nothing has come
   yet, it waits in recv. */
CHAOSI_FN chaosi_outcome chaosi_ask_upstream(chaosi_worker *w, int *head_len) {
    const chaos_proxy_desc *d = &w->p->d;
    chaosi_u64 deadline = chaosi_in(d->reply_timeout);
    w->rep_len = 0;
    for (;;) {
        chaosi_u64 moved = w->up.moved;
        chaosi_outcome outcome;
        bool wait;
        ssize_t n;
        if (!chaosi_flow_over(&w->up)) chaosi_flow_move(&w->up);
        if (w->up.bad) return CHAOSI_BAD_BODY;
        if (w->up.eof && !w->up.done) return CHAOSI_CLIENT_GONE;
        if (moved != w->up.moved) deadline = chaosi_in(chaosi_flow_over(&w->up) ? d->reply_timeout : d->body_timeout);
        if (chaosi_clock(false) >= deadline) return CHAOSI_TIMED_OUT;            /* interim replies without end */
        if (w->up.send_failed) deadline = chaosi_min(deadline, chaosi_in(1000)); /* it may have said why, nothing more */
        wait = chaosi_flow_over(&w->up) && !w->rep_len && !w->up.send_failed;
        if (!wait) {
            int r = chaosi_flows_wait(w, true, deadline);
            if (r == 0) return chaosi_flow_wants_bytes(&w->up) ? CHAOSI_SLOW_BODY : CHAOSI_TIMED_OUT;
            if (!(r & 4)) continue;
        }
        n = wait ? chaosi_recv_first(w->who->upstream, w->rep, w->rep_cap)
                 : recv(w->who->upstream, w->rep + w->rep_len, w->rep_cap - w->rep_len, MSG_DONTWAIT);
        if (n < 0 && chaosi_would_block() && wait) return CHAOSI_TIMED_OUT;
        if (n < 0 && chaosi_would_block()) continue;
        if (n <= 0) return w->rep_len ? CHAOSI_BAD_REPLY : w->reused ? CHAOSI_STALE : CHAOSI_NO_REPLY;
        w->rep_len += (size_t)n;
        outcome = chaosi_final_head(w, head_len);
        if (outcome != CHAOSI_STALE) return outcome;
    }
}

/* One exchange up to the reply head, with one retry on a stale pooled socket when that is safe. */
CHAOSI_FN chaosi_outcome chaosi_exchange(chaosi_worker *w, int *head_len) {
    bool safe = chaosi_is_idempotent(&w->req) && !chaosi_has_body(&w->req) && !w->req.tunnel;
    chaosi_outcome outcome = CHAOSI_STALE;
    int problem;
    w->reused = chaosi_pool_take(w, safe ? CHAOSI_POOL_IDLE_NS : CHAOSI_POST_IDLE_NS) >= 0;
    while (outcome == CHAOSI_STALE) {
        if (w->who->upstream < 0 && (problem = chaosi_dial_upstream(w)) != 0) return chaosi_dial_outcome(problem);
        if (!chaosi_put_upstream_head(w)) return CHAOSI_BIG_HEAD;
        outcome = chaosi_ask_upstream(w, head_len);
        if (outcome != CHAOSI_REPLY) chaosi_drop_upstream(w);
        if (outcome == CHAOSI_STALE && !safe) outcome = CHAOSI_NO_REPLY;
    }
    return outcome;
}

/* How the reply's body is framed (RFC 9112 section 6.3). */
CHAOSI_FN chaosi_body chaosi_reply_body(const chaosi_worker *w) {
    if (chaosi_bodiless(w, w->reply.status)) return CHAOSI_BODY_NONE;
    if (w->reply.chunked) return CHAOSI_BODY_CHUNKED;
    return w->reply.has_length ? CHAOSI_BODY_LENGTH : CHAOSI_BODY_CLOSE;
}

/* The reply head as the client gets it. False = too large. */
CHAOSI_FN bool chaosi_put_client_head(chaosi_worker *w, chaosi_body body, size_t *len) {
    chaosi_out o = chaosi_put_reply(w);
    char line[80];
    if (w->verdict.kind) {
        snprintf(line, sizeof line, "X-Chaos-Injected: %s\r\nCache-Control: no-store\r\n", chaos_kind_text(w->verdict.kind));
        chaosi_puts(&o, line);
        snprintf(line, sizeof line, "X-Chaos-Delay-Ms: %u\r\n", w->verdict.delay_us / 1000);
        if (w->verdict.delay_us) chaosi_puts(&o, line);
    }
    if (w->reply.status == 101) {
        chaosi_puts(&o, "Connection: Upgrade\r\n");
        chaosi_put_field(&o, chaosi_str("Upgrade"), w->reply.protocol);
    } else {
        chaosi_put_framing(&o, body == CHAOSI_BODY_CHUNKED && w->req.minor > 0, w->reply.has_length && w->reply.status != 204,
                           w->reply.length);
        chaosi_put_connection(&o, w);
    }
    chaosi_puts(&o, "\r\n");
    *len = o.len;
    return o.len < o.cap;
}

/* Streams the reply, and the rest of the request, until the reply is out. */
CHAOSI_FN bool chaosi_stream(chaosi_worker *w) {
    chaosi_flow *up = &w->up, *down = &w->down;
    for (;;) {
        if (!CHAOSI_LOAD(&w->p->c->armed)) down->damage = 0, down->paced_until = down->slice = 0;
        chaosi_flow_move(down);
        if (!chaosi_flow_over(up)) chaosi_flow_move(up);
        if (chaosi_flow_over(down)) return down->done && !down->cut;
        if (down->slice && down->paced_until > chaosi_clock(false)) {
            chaosi_hold(w, down->paced_until - chaosi_clock(false));
        } else if (!chaosi_flows_wait(w, false, chaosi_in(w->p->d.body_timeout))) {
            return false;
        }
    }
}

/* Another protocol: bytes both ways, until both sides have closed, one fails, or nothing moves for the idle time. */
CHAOSI_FN void chaosi_tunnel(chaosi_worker *w) {
    chaosi_flow *flows[2] = {&w->up, &w->down}, *f;
    int i, open = 2;
    chaosi_start_up(w, w->who->upstream, CHAOSI_BODY_CLOSE);
    do {
        for (i = 0; i < 2; i++) {
            f = flows[i];
            if (chaosi_flow_over(f)) continue;
            chaosi_flow_move(f);
            if (!chaosi_flow_over(f)) continue;
            if (!f->done) return;
            shutdown(f->to, SHUT_WR);
            open--;
        }
    } while (open && chaosi_flows_wait(w, false, chaosi_in(w->p->d.idle_timeout)));
}

/* A fault that came to nothing after it was decided. */
CHAOSI_FN void chaosi_spare_late(chaosi_worker *w) {
    chaosi_count(w->p->c, CHAOSI_WORD(skipped), 1);
    chaosi_spare(&w->verdict);
}

/* The reply head is in w->rep: send it on, with its body. True = the client's connection may go on. */
CHAOSI_FN bool chaosi_relay(chaosi_worker *w, int head_len) {
    chaosi_body body = w->reply.status == 101 ? CHAOSI_BODY_CLOSE : chaosi_reply_body(w);
    chaosi_flow *down = &w->down;
    size_t len, at = (size_t)head_len;
    bool whole;
    if (!w->up.done) w->close = w->lingers = true; /* an early reply: the rest of the body is not wanted */
    if (body == CHAOSI_BODY_CLOSE || (body == CHAOSI_BODY_CHUNKED && !w->req.minor)) w->close = true;
    if (w->verdict.kind >= CHAOS_TRUNCATE &&
        (w->reply.status == 101 || body == CHAOSI_BODY_NONE || (body == CHAOSI_BODY_LENGTH && !w->reply.length)))
        chaosi_spare_late(w); /* no body to damage */
    if (!chaosi_put_client_head(w, body, &len)) {
        chaosi_refuse(w, CHAOSI_BAD_REPLY);
        return false;
    }
    chaosi_flow_start(down, &w->reply, body, w->who->upstream, w->client, w->rep + at, w->rep_cap - at, w->rep_len - at);
    down->chunk_out = body == CHAOSI_BODY_CHUNKED && w->req.minor > 0;
    chaosi_flow_out(down, w->out, len);
    if (w->reply.status == 101) {
        chaosi_tunnel(w);
        chaosi_count(w->p->c, CHAOSI_WORD(proxied), 1);
        return false;
    }
    down->damage = w->verdict.kind >= CHAOS_TRUNCATE ? w->verdict.kind : 0;
    if (w->verdict.bandwidth) {
        down->slice = (size_t)w->verdict.bandwidth * 1024 / 20 + 1; /* a twentieth of a second each */
        down->paced_until = chaosi_clock(false);
    }
    whole = chaosi_stream(w);
    if (!whole && down->bad && !down->moved) {
        chaosi_refuse(w, CHAOSI_BAD_REPLY);
        return false;
    }
    w->replied = true;
    if (whole || down->cut) chaosi_count(w->p->c, CHAOSI_WORD(proxied), 1);
    else if (!down->send_failed && !down->out_count) chaosi_count(w->p->c, CHAOSI_WORD(upstream_errors), 1);
    if (whole && w->up.done && !down->len && body != CHAOSI_BODY_CLOSE && w->reply.keep_alive) chaosi_pool_put(w);
    if (!whole && body != CHAOSI_BODY_LENGTH && !down->chunk_out) { /* a cut message must look cut */
        chaosi_make_reset(w->client);
        w->lingers = false; /* its FIN would come first */
    }
    if (whole && w->close && chaosi_readable(w->client)) w->lingers = true; /* unread input: close would be an RST, and purge the reply */
    return whole && !w->close;
}

/* Forwards the request. True = the client's connection may go on. */
CHAOSI_FN bool chaosi_forward(chaosi_worker *w) {
    chaosi_u64 start = chaosi_clock(false);
    int head_len = 0;
    chaosi_outcome outcome = chaosi_exchange(w, &head_len);
    bool on = false;
    if (outcome == CHAOSI_REPLY && w->verdict.after && w->verdict.kind == CHAOS_HANG) chaosi_hang(w);
    if (w->verdict.kind > CHAOS_DELAY && !CHAOSI_SEQ(&w->p->c->armed)) chaosi_spare_late(w); /* off meanwhile: the real reply */
    if (outcome != CHAOSI_REPLY) chaosi_refuse(w, outcome);
    else on = w->verdict.after && w->verdict.kind < CHAOS_TRUNCATE ? chaosi_inject(w) : chaosi_relay(w, head_len);
    chaosi_drop_upstream(w);
    chaosi_count_outcome(w->p->c, outcome == CHAOSI_REPLY ? w->reply.status : 0, (chaosi_clock(false) - start) / 1000);
    return on;
}

/* One request. True = the connection may go on with the next. */
CHAOSI_FN bool chaosi_serve_one(chaosi_worker *w) {
    bool on;
    int kind;
    chaosi_u32 ticket;
    w->replied = w->close = w->lingers = w->parks = false;
    if (!chaosi_read_head(w)) return false;
    CHAOSI_ADD(&w->p->served, 1u);
    CHAOSI_STORE(&w->who->asked, 1u);
    w->close = !w->req.keep_alive || CHAOSI_LOAD(&w->p->leaving);
    chaosi_ask(w);
    ticket = w->verdict.ticket; /* also of a fault that is spared on the way */
    if (w->verdict.kind == CHAOS_DELAY) chaosi_hold(w, (chaosi_u64)w->verdict.delay_us * 1000);
    if (w->verdict.kind == CHAOS_HANG && !w->verdict.after && chaosi_hang(w)) chaosi_spare_late(w);
    kind = w->verdict.kind;
    if (kind < CHAOS_STATUS || kind >= CHAOS_TRUNCATE || w->verdict.after) on = chaosi_forward(w);
    else on = kind != CHAOS_HANG && chaosi_inject(w);
    if (ticket) chaosi_give_ticket(w->p->c, ticket);
    if (!on) return false;
    memmove(w->in, w->in + w->head_len + w->up.at, w->up.len); /* what came behind the request */
    w->in_len = w->up.len;
    return true;
}

/* -- clients -- */
/* At the connection limit new clients wait in the backlog; from the first one on, that time is counted. Under the lock. */
CHAOSI_FN void chaosi_at_limit(chaosi_proxy *p, bool full) {
    if (p->full_since) {
        p->full_ns += chaosi_clock(false) - p->full_since;
        chaosi_count(p->c, CHAOSI_WORD(capped_ms), p->full_ns / CHAOSI_MS);
        p->full_ns %= CHAOSI_MS;
    }
    p->full_since = 0;
    chaosi_watch(p, false, p->listener, &p->listener, !full);
}

/* A free place, NULL = none. The last one stops accepting. */
CHAOSI_FN chaosi_client *chaosi_admit(chaosi_proxy *p) {
    chaosi_client *who = NULL;
    pthread_mutex_lock(&p->lock);
    if (p->client_count < p->d.max_connections) {
        who = p->free_clients;
        if (who) p->free_clients = who->next_free;
        else who = &p->clients[p->client_used++];
        who->fd = who->upstream = -1;
        who->known = who->armed = false;
        CHAOSI_STORE(&who->asked, 0u);
        CHAOSI_ORDERED(&who->place, CHAOSI_BUSY);
        if (++p->client_count == p->d.max_connections) chaosi_at_limit(p, true);
    } else if (!p->full_since && chaosi_readable(p->listener)) {
        p->full_since = chaosi_clock(false);
        if (!p->full_told)
            chaosi_note(p->c, "capped", "max_connections", p->limit,
                        "new clients wait: the connection limit, not the fault, sets the pace");
        p->full_told = true;
    }
    pthread_mutex_unlock(&p->lock);
    return who;
}

/* Closes a connection that the caller owns, and frees its place. */
CHAOSI_FN void chaosi_dismiss(chaosi_proxy *p, chaosi_client *who) {
    int fd = who->fd;
    pthread_mutex_lock(&p->lock);
    CHAOSI_ORDERED(&who->place, CHAOSI_FREE);
    who->next_free = p->free_clients;
    p->free_clients = who;
    if (p->client_count-- == p->d.max_connections) chaosi_at_limit(p, false);
    pthread_mutex_unlock(&p->lock);
    if (fd < 0) return;
    close(fd);
    CHAOSI_ADD(&p->c->connections_now, ~0u);
}

/* A new connection, NULL = none after all. */
CHAOSI_FN chaosi_client *chaosi_accept(chaosi_proxy *p) {
    struct sockaddr_storage addr;
    socklen_t len = sizeof addr;
    chaosi_client *who = chaosi_admit(p);
    int fd = who ? accept(p->listener, (struct sockaddr *)(void *)&addr, &len) : -1;
    bool short_of = who && fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS);
    if (fd >= 0) {
        fcntl(fd, F_SETFD, FD_CLOEXEC);
#ifndef __linux__
        fcntl(fd, F_SETFL, 0); /* BSDs hand O_NONBLOCK on */
#endif
        chaosi_name_address(&addr, len, true, who->peer, sizeof who->peer);
        CHAOSI_ORDERED(&who->fd, fd);
        if (CHAOSI_SEQ(&p->hard)) shutdown(fd, SHUT_RDWR);
        chaosi_count(p->c, CHAOSI_WORD(connections), 1);
        CHAOSI_ADD(&p->c->connections_now, 1u);
        return who;
    }
    if (who) chaosi_dismiss(p, who);
    if (short_of) chaosi_pool_trim(p, 0); /* give back what we can; the connection waits in the backlog */
    if (short_of) chaosi_nap(20 * CHAOSI_MS);
    return NULL;
}

/* Takes a parked client. False = somebody has it; when it is busy, its owner will look again. */
CHAOSI_FN bool chaosi_claim(chaosi_client *who) {
    chaosi_u64 place = CHAOSI_SEQ(&who->place);
    while ((place & 3u) == CHAOSI_PARKED || place == CHAOSI_BUSY)
        if (CHAOSI_CAS(&who->place, &place, place == CHAOSI_BUSY ? CHAOSI_NEWS : CHAOSI_BUSY)) return place != CHAOSI_BUSY;
    return false;
}

/* The connection waits in the epoll set; from here on it is another's. False = it has something to say already. */
CHAOSI_FN bool chaosi_park(chaosi_proxy *p, chaosi_client *who) {
    chaosi_u64 busy = CHAOSI_BUSY, parked = chaosi_clock(false) | CHAOSI_PARKED;
    bool armed = who->armed || chaosi_watch(p, !who->known, who->fd, who, true); /* it tells at once of what came before */
    who->known = true;
    who->armed = armed;
    if (armed && !CHAOSI_CAS(&who->place, &busy, parked)) {
        CHAOSI_ORDERED(&who->place, CHAOSI_BUSY);
        return false;
    }
    if (!armed || (CHAOSI_SEQ(&p->stopping) && CHAOSI_CAS(&who->place, &parked, CHAOSI_BUSY))) chaosi_dismiss(p, who);
    return true;
}

/* Closes parked connections that were idle for longer than `ms`; those that never asked for anything have the head's time. */
CHAOSI_FN void chaosi_sweep(chaosi_proxy *p, int ms) {
    chaosi_u64 now = chaosi_clock(false), asked_ns = (chaosi_u64)(unsigned)ms * CHAOSI_MS;
    chaosi_u64 silent_ns = chaosi_min(asked_ns, (chaosi_u64)(unsigned)p->d.head_timeout * CHAOSI_MS);
    int i, used;
    pthread_mutex_lock(&p->lock);
    used = p->client_used;
    pthread_mutex_unlock(&p->lock);
    for (i = 0; i < used; i++) {
        chaosi_u64 place = CHAOSI_SEQ(&p->clients[i].place), ns = CHAOSI_LOAD(&p->clients[i].asked) ? asked_ns : silent_ns;
        if ((place & 3u) == CHAOSI_PARKED && now >= (place & ~(chaosi_u64)3) + ns && CHAOSI_CAS(&p->clients[i].place, &place, CHAOSI_BUSY))
            chaosi_dismiss(p, &p->clients[i]);
    }
}

/* False = enough others are idle: this worker may go. */
CHAOSI_FN bool chaosi_is_needed(chaosi_proxy *p) {
    chaosi_u32 idle = CHAOSI_LOAD(&p->idle);
    return (int)idle <= p->eager || !CHAOSI_CAS(&p->idle, &idle, idle - 1u);
}

/* A new client to serve. When nobody else is idle, the others that came with it are parked: each turn of a busy listener brings
   in many, or the ones already here would keep them out. */
CHAOSI_FN chaosi_client *chaosi_welcome(chaosi_proxy *p) {
    chaosi_client *who = chaosi_accept(p);
    int most = 64;
    while (who && CHAOSI_LOAD(&p->idle) <= 1 && most-- > 0 && chaosi_readable(p->listener)) {
        if (!chaosi_park(p, who)) break; /* it has spoken meanwhile */
        who = chaosi_accept(p);
    }
    return who;
}

/* Waits for a client with something to say: a new one, or a parked one. False = this worker ends. */
CHAOSI_FN bool chaosi_next_client(chaosi_worker *w) {
    chaosi_proxy *p = w->p;
    for (;;) {
#ifdef CHAOSI_EPOLL
        struct epoll_event e;
        int n = epoll_wait(p->ready, &e, 1, 1000);
        if (n > 0 && e.data.ptr == p) CHAOSI_ORDERED(&p->stopping, 1u);
        if (n > 0 && !CHAOSI_SEQ(&p->stopping)) {
            w->who = e.data.ptr == &p->listener ? chaosi_welcome(p) : (chaosi_client *)e.data.ptr;
            if (w->who && (e.data.ptr == &p->listener || chaosi_claim(w->who))) return true;
        }
#else
        int n;
        bool told = chaosi_readable(CHAOSI_STOP(p->c)[0]); /* from then on `stopping` is looked at */
        chaosi_sleep_until(chaosi_in(told ? 20 : 1000), p->listener, told ? -1 : CHAOSI_STOP(p->c)[0]);
        n = chaosi_readable(p->listener);
        if (n && !CHAOSI_SEQ(&p->stopping) && (w->who = chaosi_accept(p)) != NULL) return true;
        if (n) chaosi_nap(20 * CHAOSI_MS); /* the connection limit */
#endif
        if (CHAOSI_SEQ(&p->stopping) || (n == 0 && !chaosi_is_needed(p))) return false;
    }
}

CHAOSI_FN void chaosi_serve(chaosi_worker *w) {
    w->client = w->who->fd;
    w->in_len = 0;
    w->ready = true;
    for (;;) {
        while (chaosi_serve_one(w)) {}
        if (!w->parks) break;
        if (chaosi_park(w->p, w->who)) return;
        w->ready = true;
    }
    if (w->lingers && !CHAOSI_LOAD(&w->p->hard)) chaosi_linger(w->client, chaosi_in(1000));
    chaosi_dismiss(w->p, w->who);
}

/* -- workers -- */
static void *chaosi_worker_main(void *arg);

/* Starts a worker; it counts as idle from here on. False = the limit, the stop, or no memory or thread to be had. */
CHAOSI_FN bool chaosi_add_worker(chaosi_proxy *p) {
    size_t head = (size_t)p->d.head_limit, in_cap = head + CHAOSI_BODY_BUFFER, out_cap = head + CHAOSI_HEAD_ROOM;
    size_t self = (sizeof(chaosi_worker) + 63) / 64 * 64;
    bool room = CHAOSI_ENTER(&p->workers, 1u) < (chaosi_u32)p->d.max_connections && !CHAOSI_SEQ(&p->stopping);
    char *block = room ? (char *)p->c->desc.alloc(p->c->desc.alloc_user, self + 2 * in_cap + out_cap) : NULL;
    chaosi_worker *w = (chaosi_worker *)(void *)block;
    pthread_t thread;
    CHAOSI_ENTER(&p->idle, 1u);
    if (w) {
        memset(w, 0, offsetof(chaosi_worker, up));
        w->p = p;
        w->in = block + self;
        w->rep = w->in + in_cap;
        w->out = w->rep + in_cap;
        w->in_cap = w->rep_cap = in_cap;
        w->out_cap = out_cap;
        if (chaosi_thread(&thread, chaosi_worker_main, w)) return true;
        p->c->desc.free(p->c->desc.alloc_user, w);
    }
    CHAOSI_ENTER(&p->idle, ~0u);
    CHAOSI_ENTER(&p->workers, ~0u);
    return false;
}

/* Workers that are not held by an injected delay. */
CHAOSI_FN int chaosi_active(chaosi_proxy *p) { return (int)CHAOSI_LOAD(&p->workers) - (int)CHAOSI_LOAD(&p->c->waiting); }

/* Nobody waits for the next client: start one, up to the eager ones; beyond, the run looks whether that would help. */
CHAOSI_FN void chaosi_want_worker(chaosi_proxy *p) {
    if (p->ready < 0 || chaosi_active(p) < p->eager) chaosi_add_worker(p); /* without epoll each connection has its worker */
    else if (!CHAOSI_SWAP(&p->starving, 1u)) chaosi_ring(p->c, CHAOSI_BELL(p->c)[1]);
}

/* Other threads want to run on every processor. */
CHAOSI_FN bool chaosi_saturated(const chaosi_proxy *p) {
    FILE *f = fopen("/proc/loadavg", "r");
    int running = 0;
    if (f && fscanf(f, "%*s %*s %*s %d", &running) != 1) running = 0;
    if (f) fclose(f);
    return running > (p->processors > 1 ? p->processors - 1 : 1); /* this thread is one of them */
}

/* No worker is idle. While clients wait, it is looked how long a request takes (by Little's law: those in progress over those
   that end in this time), and the workers grow by half if that is long, or longish while a processor is free: few workers
   that never wait for clients serve them at a lower cost than many that do. */
CHAOSI_FN void chaosi_grow(chaosi_proxy *p) {
    chaosi_u64 start = chaosi_clock(false), busy_us;
    chaosi_u32 served = CHAOSI_LOAD(&p->served);
    int active, n;
    chaosi_nap(CHAOSI_GROW_MS * CHAOSI_MS);
    if (CHAOSI_LOAD(&p->idle) || !chaosi_readable(p->ready)) return;
    active = chaosi_active(p);
    served = CHAOSI_LOAD(&p->served) - served;
    busy_us = (chaosi_u64)(active > 0 ? active : 0) * (chaosi_clock(false) - start) / 1000;
    if (active > 0 && (chaosi_u64)served * CHAOSI_SLOW_US >= busy_us) {
        bool helps = (chaosi_u64)served * CHAOSI_SLOWISH_US < busy_us && !chaosi_saturated(p);
        p->looks = helps ? p->looks + 1 : 0;
        if (p->looks < 4) return; /* one look is but a moment */
    }
    p->looks = 0;
    for (n = active < p->eager ? p->eager : active / 2; n > 0 && chaosi_add_worker(p); n--) {}
}

/* Many workers, short requests, no processor free: back to few. glibc keeps what was freed below a block still in use. */
CHAOSI_FN void chaosi_shrink(chaosi_proxy *p) {
    chaosi_u32 workers = CHAOSI_LOAD(&p->workers);
    chaosi_u32 served = CHAOSI_LOAD(&p->served), active = (chaosi_u32)chaosi_active(p);
    bool fast = (chaosi_u64)(served - p->served_before) * CHAOSI_SLOW_US > (chaosi_u64)active * 1000000u;
    CHAOSI_STORE(&p->surplus, active > (chaosi_u32)p->eager && fast && chaosi_saturated(p) ? active - (chaosi_u32)p->eager : 0u);
    p->served_before = served;
    if (workers > p->most_workers) p->most_workers = workers;
    if (workers > p->most_workers / 2) return;
    p->most_workers = workers;
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

/* Leaves this thread for the next one that goes (or the run) to join. */
CHAOSI_FN void chaosi_retire(chaosi_proxy *p) {
    pthread_t before = pthread_self();
    bool has_before;
    pthread_mutex_lock(&p->lock);
    has_before = p->has_gone;
    if (has_before) before = p->gone;
    p->gone = pthread_self();
    p->has_gone = true;
    pthread_mutex_unlock(&p->lock);
    if (has_before) pthread_join(before, NULL);
    CHAOSI_ENTER(&p->workers, ~0u);
}

static void *chaosi_worker_main(void *arg) {
    chaosi_worker *w = (chaosi_worker *)arg;
    chaosi_proxy *p = w->p;
    chaosi_u32 surplus;
#ifdef __linux__ /* SCHED_BATCH: a woken worker does not preempt the one that woke it */
    struct sched_param none;
    memset(&none, 0, sizeof none);
    pthread_setschedparam(pthread_self(), 3, &none);
    prctl(PR_SET_TIMERSLACK, 1ul); /* delays end when they should: the default adds 50 us */
#endif
    while (chaosi_next_client(w)) {
        if (CHAOSI_ENTER(&p->idle, ~0u) == 1) chaosi_want_worker(p);
        chaosi_serve(w);
        CHAOSI_ENTER(&p->idle, 1u);
        surplus = CHAOSI_LOAD(&p->surplus);
        if (!surplus || !CHAOSI_CAS(&p->surplus, &surplus, surplus - 1u)) continue;
        if (CHAOSI_ENTER(&p->idle, ~0u) == 1) chaosi_want_worker(p);
        break;
    }
    p->c->desc.free(p->c->desc.alloc_user, w);
    chaosi_retire(p);
    return NULL;
}

/* -- the run -- */
CHAOSI_FN chaos_result chaosi_parse_upstream(chaosi_proxy *p, chaos_error *err) {
    const char *url = p->d.upstream, *rest, *slash;
    chaosi_span authority;
    size_t len;
    strcpy(p->port, "80");
    if (!url) return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "no upstream: http://HOST[:PORT][/PREFIX]");
    if (strncmp(url, "https://", 8) == 0)
        return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "upstream %.100s: TLS is not in this version", url);
    if (strncmp(url, "http://", 7) != 0)
        return chaosi_fail(err, CHAOS_ERR_ADDRESS, "upstream %.100s: must be http://HOST[:PORT][/PREFIX]", url);
    rest = url + 7;
    slash = strchr(rest, '/');
    authority = chaosi_of(rest, slash ? (size_t)(slash - rest) : strlen(rest));
    if (!chaosi_is_host(authority) || !chaosi_split_address(authority, true, p->host, sizeof p->host, p->port, sizeof p->port) ||
        !p->host[0] || atoi(p->port) == 0)
        return chaosi_fail(err, CHAOS_ERR_ADDRESS, "upstream %.100s: bad host or port", url);
    memcpy(p->host_port, authority.at, authority.len);
    len = slash ? strlen(slash) : 0;
    while (len && slash[len - 1] == '/') len--;
    if (len >= sizeof p->prefix || (len && strpbrk(slash, "?# \t\r\n")))
        return chaosi_fail(err, CHAOS_ERR_ADDRESS, "upstream %.100s: the prefix must be a plain path", url);
    if (len) memcpy(p->prefix, slash, len);
    p->address_count = chaosi_resolve(p->host, p->port, p->addresses, CHAOSI_ADDRESSES, err);
    return p->address_count ? CHAOS_OK : CHAOS_ERR_UNREACHABLE;
}

/* Looks the upstream's name up again: at times, and when it could not be dialled. What is known is kept while the resolver
   fails. A thread of its own, because getaddrinfo waits as long as it likes. */
static void *chaosi_resolver(void *arg) {
    chaosi_proxy *p = (chaosi_proxy *)arg;
    chaosi_address found[CHAOSI_ADDRESSES];
    chaosi_u64 next = chaosi_in(CHAOSI_RESOLVE_MS);
    bool failed = false, changed, kept;
    chaos_error err;
    int i;
    memset(found, 0, sizeof found);
    while (!chaosi_readable(CHAOSI_STOP(p->c)[0])) {
        int n;
        chaosi_sleep_until(chaosi_in(1000), CHAOSI_STOP(p->c)[0], -1);
        if (!CHAOSI_SWAP(&p->dial_failed, 0u) && chaosi_clock(false) < next) continue;
        next = chaosi_in(CHAOSI_RESOLVE_MS);
        n = chaosi_resolve(p->host, p->port, found, CHAOSI_ADDRESSES, &err);
        if (!n && !failed) chaosi_note(p->c, "resolver", "upstream", p->host_port, err.text);
        failed = !n;
        if (!n) continue;
        pthread_mutex_lock(&p->lock);
        for (kept = false, i = n - 1; i >= 0 && p->preferred; i--) /* which answered stays the first, as long as it is listed */
            if (memcmp(&found[i], &p->addresses[0], sizeof found[0]) == 0) {
                found[i] = found[0];
                found[0] = p->addresses[0];
                kept = true;
            }
        p->preferred = kept;
        changed = n != p->address_count || memcmp(p->addresses, found, sizeof found[0] * (size_t)n) != 0;
        p->names += changed;
        memcpy(p->addresses, found, sizeof found);
        p->address_count = n;
        while (changed && p->idle_upstreams) close(p->pool[--p->idle_upstreams].fd); /* here: nobody takes one as of the new name */
        pthread_mutex_unlock(&p->lock);
    }
    return NULL;
}

CHAOSI_FN chaos_result chaosi_open_listener(chaosi_proxy *p, chaos_error *err) {
    char host[256] = "127.0.0.1", port[8] = "0", name[160];
    chaosi_address a;
    if (!chaosi_split_address(chaosi_str(p->d.listen), false, host, sizeof host, port, sizeof port))
        return chaosi_fail(err, CHAOS_ERR_ADDRESS, "listen address %.100s: must be HOST:PORT, [V6]:PORT or PORT", p->d.listen);
    if (chaosi_resolve(host, port, &a, 1, err) == 0) return CHAOS_ERR_UNREACHABLE;
    p->listener = chaosi_listen(&a, 1024, p->d.listen, err);
    if (p->listener < 0) return CHAOS_ERR_SYSTEM;
    fcntl(p->listener, F_SETFL, O_NONBLOCK);
    chaosi_set_patience(p->listener, CHAOSI_STAY_MS); /* with TCP_NODELAY, handed on to what it accepts */
    a.len = sizeof a.addr;
    getsockname(p->listener, (struct sockaddr *)(void *)&a.addr, &a.len);
    chaosi_name_address(&a.addr, a.len, false, name, sizeof name);
    if (p->d.listening) p->d.listening(p->d.user, name);
    return CHAOS_OK;
}

/* The set that workers wait on. */
CHAOSI_FN chaos_result chaosi_open_ready(chaosi_proxy *p, chaos_error *err) {
#ifdef CHAOSI_EPOLL
    p->ready = epoll_create1(EPOLL_CLOEXEC);
    if (!chaosi_watch(p, true, p->listener, &p->listener, true)) return chaosi_fail(err, CHAOS_ERR_SYSTEM, "epoll: %s", strerror(errno));
#endif
    return (void)err, CHAOS_OK;
}

CHAOSI_FN chaos_result chaosi_proxy_limits(chaos_proxy_desc *d, chaos_error *err) {
    const int drain_now = d->drain_timeout == -1;
    const struct {
        const char *name;
        int *value, standard, lo, hi;
    } limits[] = {{"max_connections", &d->max_connections, 1024, 1, 1000000}, {"head_limit", &d->head_limit, 16384, 1024, 65536},
                  {"head_timeout", &d->head_timeout, 10000, 1, 86400000},     {"body_timeout", &d->body_timeout, 30000, 1, 86400000},
                  {"idle_timeout", &d->idle_timeout, 60000, 1, 86400000},     {"connect_timeout", &d->connect_timeout, 5000, 1, 86400000},
                  {"reply_timeout", &d->reply_timeout, 60000, 1, 86400000},   {"drain_timeout", &d->drain_timeout, 10000, 1, 86400000}};
    struct rlimit files;
    size_t i;
    if (!d->listen) d->listen = "127.0.0.1:0";
    if (d->host_header && !chaosi_is_host(chaosi_str(d->host_header)))
        return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "host_header must be HOST[:PORT]");
    for (i = 0; d->key_header && (d->key_header[i] || !i); i++)
        if (!chaosi_is_token_char(d->key_header[i])) return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "key_header must be a header's name");
    if (drain_now) d->drain_timeout = 1;
    for (i = 0; i < sizeof limits / sizeof limits[0]; i++) {
        if (!*limits[i].value) *limits[i].value = limits[i].standard;
        if (*limits[i].value < limits[i].lo || *limits[i].value > limits[i].hi)
            return chaosi_fail(err, CHAOS_ERR_RANGE, "%s is out of range: %d..%d", limits[i].name, limits[i].lo, limits[i].hi);
    }
    if (drain_now) d->drain_timeout = 0;
    /* Two descriptors a connection, and some for everything else. */
    if (getrlimit(RLIMIT_NOFILE, &files) == 0 && files.rlim_cur != RLIM_INFINITY && files.rlim_cur < (rlim_t)d->max_connections * 2 + 32)
        d->max_connections = files.rlim_cur > 34 ? (int)((files.rlim_cur - 32) / 2) : 1;
    return CHAOS_OK;
}

/* Stop: no new connections but those in the backlog. Kept ones have a moment in which the next reply says close: one that is
   closed with a request on its way fails that request. Then idle ones close, the rest has until the drain is over, then its
   sockets are shut. */
CHAOSI_FN void chaosi_drain_workers(chaosi_proxy *p) {
    chaosi_u64 deadline = chaosi_in(p->d.drain_timeout);
    chaosi_u64 moment = chaosi_min(chaosi_in(CHAOSI_LEAVE_MS), chaosi_in(p->d.drain_timeout / 4));
    int i;
    CHAOSI_ORDERED(&p->drain_end, deadline);
    CHAOSI_ORDERED(&p->leaving, 1u);
    while (chaosi_readable(p->listener) && !CHAOSI_SEQ(&p->stopping) && chaosi_clock(false) < moment) {
        if (!CHAOSI_SEQ(&p->idle)) chaosi_grow(p);
        else chaosi_nap(CHAOSI_MS);
    }
#ifdef CHAOSI_EPOLL
    epoll_ctl(p->ready, EPOLL_CTL_DEL, p->listener, NULL);
#endif
    shutdown(p->listener, SHUT_RDWR);
    for (;;) { /* whoever has asked already is served, for that workers still grow */
        bool asked = p->ready >= 0 && chaosi_readable(p->ready);
        if (!CHAOSI_LOAD(&p->c->connections_now) || chaosi_clock(false) >= (asked ? deadline : moment)) break;
        if (asked && !CHAOSI_SEQ(&p->idle)) chaosi_grow(p);
        else chaosi_nap(CHAOSI_MS);
    }
    chaosi_watch(p, true, CHAOSI_STOP(p->c)[0], p, true); /* wakes the workers, all of them */
    CHAOSI_ORDERED(&p->stopping, 1u);
    chaosi_sweep(p, 0);
    while (CHAOSI_SEQ(&p->workers) && chaosi_clock(false) < deadline) chaosi_nap(CHAOSI_MS);
    if (CHAOSI_SEQ(&p->workers)) {
        pthread_mutex_lock(&p->lock);
        CHAOSI_ORDERED(&p->hard, 1u);
        for (i = 0; i < p->client_used; i++)
            if (CHAOSI_SEQ(&p->clients[i].place) != CHAOSI_FREE) {
                shutdown(CHAOSI_SEQ(&p->clients[i].fd), SHUT_RDWR);
                if (p->clients[i].upstream >= 0) shutdown(p->clients[i].upstream, SHUT_RDWR);
            }
        pthread_mutex_unlock(&p->lock);
    }
    while (CHAOSI_SEQ(&p->workers)) chaosi_nap(CHAOSI_MS);
    if (p->has_gone) pthread_join(p->gone, NULL);
    chaosi_pool_trim(p, 0);
}

CHAOSI_FN chaos_result chaosi_serve_all(chaosi_proxy *p, chaos_error *err) {
    int least = p->d.idle_timeout < p->d.head_timeout ? p->d.idle_timeout : p->d.head_timeout, tick = least < 4000 ? least / 4 + 1 : 1000;
    chaosi_u64 next = 0;
    pthread_t resolver;
    bool resolves = !strchr(p->host, ':') && p->host[strspn(p->host, "0123456789.")]; /* a name, not an address */
    if (!chaosi_add_worker(p)) return chaosi_fail(err, CHAOS_ERR_MEMORY, "cannot start a worker thread");
    resolves = resolves && chaosi_thread(&resolver, chaosi_resolver, p);
    while (!chaosi_readable(CHAOSI_STOP(p->c)[0])) {
        bool none;
        CHAOSI_SWAP(&p->starving, 0u); /* then look: who takes the last idle worker from here on rings */
        none = !CHAOSI_SEQ(&p->idle);
        chaosi_sleep_until(chaosi_in(tick), CHAOSI_STOP(p->c)[0], none ? p->ready : CHAOSI_BELL(p->c)[0]);
        chaosi_drain(p->c, CHAOSI_BELL(p->c)[0]);
        if (none) chaosi_grow(p);
        if (chaosi_clock(false) < next) continue;
        next = chaosi_in(tick);
        chaosi_shrink(p);
        chaosi_pool_trim(p, CHAOSI_POOL_IDLE_NS);
        chaosi_sweep(p, p->d.idle_timeout);
    }
    chaosi_drain_workers(p);
    if (resolves) pthread_join(resolver, NULL);
    return CHAOS_OK;
}

CHAOSI_FN chaos_result chaosi_proxy_run(chaos *c, const chaos_proxy_desc *d, chaos_error *err) {
    chaos_proxy_desc full = *d;
    chaosi_proxy *p;
    chaos_result r = chaosi_proxy_limits(&full, err);
    chaosi_u32 idle_modes = CHAOSI_MODES_IN_PROCESS;
    size_t self = (sizeof *p + 63) / 64 * 64, most = (size_t)full.max_connections;
    if (r != CHAOS_OK) return r;
    if (!CHAOSI_CAS(&c->modes, &idle_modes, CHAOSI_MODES_PROXY))
        return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "a proxy runs on this handle already");
    p = (chaosi_proxy *)c->desc.alloc(c->desc.alloc_user, self + (sizeof(chaosi_idle) + sizeof(chaosi_client)) * most);
    if (!p) {
        CHAOSI_ORDERED(&c->modes, CHAOSI_MODES_IN_PROCESS);
        return chaosi_fail(err, CHAOS_ERR_MEMORY, "out of memory");
    }
    memset(p, 0, sizeof *p);
    p->c = c;
    p->d = full;
    p->listener = p->ready = -1;
    p->drain_end = CHAOSI_NEVER;
    p->clients = (chaosi_client *)(void *)((char *)p + self);
    p->pool = (chaosi_idle *)(void *)(p->clients + most);
    pthread_mutex_init(&p->lock, NULL);
    p->processors = (int)sysconf(_SC_NPROCESSORS_ONLN);
    p->eager = 8 * (p->processors > 0 ? p->processors : 1);
    snprintf(p->limit, sizeof p->limit, "%d", full.max_connections);
    if ((d->max_connections ? d->max_connections : 1024) > full.max_connections)
        chaosi_note(c, "clamped", "max_connections", p->limit, "two descriptors for each connection");
    r = chaosi_parse_upstream(p, err);
    if (r == CHAOS_OK) r = chaosi_open_listener(p, err);
    if (r == CHAOS_OK) r = chaosi_open_ready(p, err);
    if (r == CHAOS_OK) r = chaosi_serve_all(p, err);
    if (p->listener >= 0) close(p->listener);
    if (p->ready >= 0) close(p->ready);
    chaosi_drain(c, CHAOSI_STOP(c)[0]);
    CHAOSI_ORDERED(&c->modes, CHAOSI_MODES_IN_PROCESS);
    pthread_mutex_destroy(&p->lock);
    c->desc.free(c->desc.alloc_user, p);
    return r;
}
#endif /* CHAOS_NO_PROXY */

#ifndef CHAOS_NO_LAMBDA
/* ==== >>lambda ================================================================================================ */
/* Faults on Lambda invocations, and a custom runtime over the Runtime API (2018-06-01): straight-line loops, own sockets. */
#define CHAOSI_EVENT_MAX     (6291556 + 65536) /* 6 MiB and 100 bytes, and a head */
#define CHAOSI_REPLY_MAX     6291556
#define CHAOSI_REFRESH_MS    250   /* for a fetch inside an invocation */
#define CHAOSI_MARGIN_MS     500   /* left of the deadline after a delay */
#define CHAOSI_POST_MS       60000 /* for an answer of the Runtime API */
#define CHAOSI_INJECTED_TYPE "Function.ChaosInjected"
#define CHAOSI_LOOPS_MAX     64
#define CHAOSI_LOOP_STACK    (8u << 20) /* a handler runs there: as on the main thread; pages that are not used cost nothing */
#define CHAOSI_MESSAGE_MAX   400
#define CHAOSI_ERROR_MAX     (6 * CHAOSI_MESSAGE_MAX + 200)

/* What kind of event it is, and which bit of `events` lets it be failed. */
typedef enum chaosi_shape {
    CHAOSI_EV_DIRECT,
    CHAOSI_EV_REST,
    CHAOSI_EV_HTTP2,
    CHAOSI_EV_SOCKET,
    CHAOSI_EV_ALB,
    CHAOSI_EV_ALB_MULTI,
    CHAOSI_EV_SQS,
    CHAOSI_EV_ASYNC,
    CHAOSI_EV_STREAM,
    CHAOSI_EV_SPARED
} chaosi_shape;
static const unsigned chaosi_shape_bit[] = {1u << 1, 1, 1, 1, 1, 1, 1u << 3, 1u << 2, 1u << 4, 0};

/* The members of an event that tell, found in one pass. */
enum chaosi_member {
    CHAOSI_M_CONTEXT,
    CHAOSI_M_VERSION,
    CHAOSI_M_METHOD,
    CHAOSI_M_RAW_PATH,
    CHAOSI_M_PATH,
    CHAOSI_M_HEADERS,
    CHAOSI_M_MULTI_HEADERS,
    CHAOSI_M_RECORDS,
    CHAOSI_M_DETAIL_TYPE,
    CHAOSI_M_SOURCE,
    CHAOSI_M_DELIVERY,
    CHAOSI_M_LOGS,
    CHAOSI_M_ALARM,
    CHAOSI_M_DESTINATION,
    CHAOSI_M_SPARED, /* from here: somebody's control plane */
    CHAOSI_M_COUNT = CHAOSI_M_SPARED + 12
};
static const char chaosi_members[] = /* in this order */
    "requestContext,version,httpMethod,rawPath,path,headers,multiValueHeaders,Records,detail-type,eventSource,deliveryStreamArn,awslogs,"
    "alarmArn,requestPayload,"
    "methodArn,routeArn,ResponseURL,CodePipeline.job,LifecycleEventHookExecutionId,triggerSource,authorizationToken,protocolData,"
    "invokingEvent,ClientRequestToken,transformId,hookTypeName";

typedef struct chaosi_invocation {
    chaosi_span member[CHAOSI_M_COUNT]; /* JSON of the value; at NULL = not there */
    chaosi_shape shape;
    char method[32], path[CHAOSI_PATH_MAX + 64];
    char value[8192]; /* of the header asked for last */
} chaosi_invocation;

/* The string that a piece of JSON is, "" = another thing or too long. */
CHAOSI_FN void chaosi_plain(chaosi_span json, char *to, size_t cap) {
    chaosi_json j = {json.at, json.len, 0, NULL, 'v', 0, 0, 0, 0};
    size_t n = json.at && chaosi_json_next(&j) == '"' ? chaosi_json_decode(&j, to, cap - 1) : SIZE_MAX;
    to[n == SIZE_MAX ? 0 : n] = 0;
}

/* The JSON at a path of keys in a piece of JSON. */
CHAOSI_FN chaosi_span chaosi_within(chaosi_span json, const char *path) {
    chaosi_json j;
    char t = json.at ? chaosi_json_find(&j, json, path) : '\0';
    if (!t) return chaosi_of(NULL, 0);
    return chaosi_of(json.at + j.start - (t == '"'), json.len - j.start + (t == '"')); /* to the end: enough to look into it */
}

/* CHAOSI_M_COUNT = another name. */
CHAOSI_FN size_t chaosi_member_of(chaosi_span name) {
    const char *at = chaosi_members;
    size_t i = 0, n = strcspn(at, ",");
    for (; n && !chaosi_same(name, chaosi_of(at, n)); i++, n = strcspn(at, ",")) at += n + (at[n] == ',');
    return i;
}

/* False = the event is not JSON as it should be, so nobody knows what it is; one that is no object has no members. */
CHAOSI_FN bool chaosi_find_members(chaosi_invocation *e, const char *text, size_t len) {
    chaosi_json j = {text, len, 0, NULL, 'v', 0, 0, 0, 0};
    char t = chaosi_json_next(&j);
    if (t != '{') return chaos_json_check(text, len, NULL) == CHAOS_OK;
    while ((t = chaosi_json_next(&j)) == ':') {
        chaosi_span name = chaosi_of(text + j.start, j.end - j.start);
        size_t i = chaosi_member_of(name), from;
        chaosi_json_space(&j);
        from = j.pos;
        if (!chaosi_json_skip(&j)) return false;
        if (i < CHAOSI_M_COUNT) e->member[i] = chaosi_of(text + from, j.pos - from);
    }
    return t == '}' && chaosi_json_next(&j) == '.';
}

CHAOSI_FN chaosi_shape chaosi_record_shape(const chaosi_invocation *e) {
    chaosi_span list = e->member[CHAOSI_M_RECORDS], first;
    const char *brace = list.at ? (const char *)memchr(list.at, '{', list.len) : NULL;
    char source[64];
    if (!brace) chaosi_plain(e->member[CHAOSI_M_SOURCE], source, sizeof source); /* Kafka, MQ, DocumentDB */
    if (!brace) return source[0] || e->member[CHAOSI_M_DELIVERY].at ? CHAOSI_EV_STREAM : CHAOSI_EV_DIRECT;
    first = chaosi_of(brace, list.len - (size_t)(brace - list.at));
    if (!chaosi_json_text(first, "eventSource", source, sizeof source)) chaosi_json_text(first, "EventSource", source, sizeof source);
    if (strcmp(source, "aws:sqs") == 0) return CHAOSI_EV_SQS;
    return strcmp(source, "aws:kinesis") == 0 || strcmp(source, "aws:dynamodb") == 0 ? CHAOSI_EV_STREAM : CHAOSI_EV_ASYNC;
}

/* What the manual says is never touched is somebody's control plane. */
CHAOSI_FN chaosi_shape chaosi_shape_of(const chaosi_invocation *e) {
    const chaosi_span *m = e->member, context = m[CHAOSI_M_CONTEXT];
    char version[8];
    int i;
    for (i = CHAOSI_M_SPARED; i < CHAOSI_M_COUNT; i++)
        if (m[i].at) return CHAOSI_EV_SPARED;
    chaosi_plain(m[CHAOSI_M_VERSION], version, sizeof version);
    if (chaosi_within(context, "elb").at)
        return m[CHAOSI_M_MULTI_HEADERS].at && !m[CHAOSI_M_HEADERS].at ? CHAOSI_EV_ALB_MULTI : CHAOSI_EV_ALB;
    if (chaosi_within(context, "http").at && strcmp(version, "2.0") == 0) return CHAOSI_EV_HTTP2;
    if (chaosi_within(context, "connectionId").at && chaosi_within(context, "eventType").at) return CHAOSI_EV_SOCKET;
    if (context.at && m[CHAOSI_M_METHOD].at) return CHAOSI_EV_REST;
    if (m[CHAOSI_M_DETAIL_TYPE].at || m[CHAOSI_M_LOGS].at || m[CHAOSI_M_ALARM].at) return CHAOSI_EV_ASYNC;
    if (context.at && m[CHAOSI_M_DESTINATION].at) return CHAOSI_EV_ASYNC; /* of another function */
    return chaosi_record_shape(e);
}

/* The path of an HTTP API comes with its stage in front, unless that is $default. */
CHAOSI_FN void chaosi_drop_stage(chaosi_invocation *e) {
    char stage[128];
    size_t n;
    chaosi_plain(chaosi_within(e->member[CHAOSI_M_CONTEXT], "stage"), stage, sizeof stage);
    n = strlen(stage);
    if (!n || strncmp(e->path + 1, stage, n) != 0 || (e->path[n + 1] && e->path[n + 1] != '/')) return;
    memmove(e->path, e->path + n + 1, strlen(e->path + n + 1) + 1);
    if (!e->path[0]) strcpy(e->path, "/");
}

CHAOSI_FN void chaosi_read_event(chaosi_invocation *e, const char *text, size_t len) {
    chaosi_span path;
    memset(e, 0, offsetof(chaosi_invocation, value));
    e->shape = CHAOSI_EV_SPARED;
    if (!chaosi_find_members(e, text, len)) return;
    e->shape = chaosi_shape_of(e);
    if (e->shape == CHAOSI_EV_HTTP2) chaosi_plain(chaosi_within(e->member[CHAOSI_M_CONTEXT], "http.method"), e->method, sizeof e->method);
    else chaosi_plain(e->member[CHAOSI_M_METHOD], e->method, sizeof e->method);
    path = e->member[e->shape == CHAOSI_EV_HTTP2 ? CHAOSI_M_RAW_PATH : CHAOSI_M_PATH];
    chaosi_plain(path, e->path, sizeof e->path);
    if (!e->path[0] && path.len >= sizeof e->path) e->shape = CHAOSI_EV_SPARED; /* too long to look at */
    if (e->shape == CHAOSI_EV_HTTP2 && e->path[0] == '/') chaosi_drop_stage(e);
}

/* A header of an HTTP event, the first of several. */
CHAOSI_FN const char *chaosi_event_header(void *user, const char *name, size_t *len) {
    chaosi_invocation *e = (chaosi_invocation *)user;
    chaosi_span json = e->member[e->member[CHAOSI_M_HEADERS].at ? CHAOSI_M_HEADERS : CHAOSI_M_MULTI_HEADERS];
    chaosi_json j = {json.at, json.len, 0, NULL, 'v', 0, 0, 0, 0};
    if (!json.at || chaosi_json_next(&j) != '{') return NULL;
    while (chaosi_json_next(&j) == ':') {
        bool found = chaosi_is(chaosi_of(j.text + j.start, j.end - j.start), name);
        char t = found ? chaosi_json_next(&j) : chaosi_json_skip(&j);
        if (!found) continue;
        if (t == '[') t = chaosi_json_next(&j);
        *len = t == '"' ? chaosi_json_decode(&j, e->value, sizeof e->value) : SIZE_MAX;
        return *len == SIZE_MAX ? NULL : e->value;
    }
    return NULL;
}

/* -- the gate: what happens to one invocation -- */
/* Inside the invocation, because the sandbox is frozen between them: when the TTL is over, and by one loop at a time. */
CHAOSI_FN void chaosi_refresh_due(chaos *c, chaosi_u64 left) {
    chaos_error unused;
    bool due;
    if (c->has_refresher || CHAOSI_SEQ(&c->killed)) return;
    CHAOSI_LOCK(&c->lock);
    due = c->source.fetched && chaosi_now(c, false) >= c->next_fetch;
    if (due) c->next_fetch = chaosi_now(c, false) + CHAOSI_REFRESH_MS * CHAOSI_MS;
    CHAOSI_UNLOCK(&c->lock);
    if (due) CHAOSI_STORE(&c->fetch_ms, (chaosi_u32)chaosi_min(CHAOSI_REFRESH_MS, left / CHAOSI_MS + 1));
    if (due) chaosi_refresh(c, true, &unused);
    if (CHAOSI_LOAD(&c->armed)) c->tell(c, CHAOSI_TICK);
}

/* What the deadline leaves for a delay, in us; a deadline that is over already means that it is not known. */
CHAOSI_FN unsigned chaosi_delay_limit(const chaos_lambda_event *in) {
    long long left = in->deadline_ms - (long long)(chaosi_clock(true) / CHAOSI_MS);
    if (left <= 0 || left > 900000 + CHAOSI_MARGIN_MS) return 0;
    return left > CHAOSI_MARGIN_MS ? (unsigned)(left - CHAOSI_MARGIN_MS) * 1000 : 1;
}

/* The delay. Longer than a TTL, it looks at the config meanwhile, and ends when chaos goes off. */
CHAOSI_FN void chaosi_lambda_wait(chaos *c, unsigned us) {
    chaosi_u64 end = chaosi_clock(false) + (chaosi_u64)us * 1000, most;
    while (chaosi_clock(false) < end && CHAOSI_SEQ(&c->armed)) {
        CHAOSI_LOCK(&c->lock);
        most = chaosi_less(c->next_fetch, chaosi_now(c, false));
        CHAOSI_UNLOCK(&c->lock);
        /* A look that the end would cut short is left to the next invocation: it would count as a failed fetch. */
        if (!c->source.fetched || c->has_refresher ||
            chaosi_later(most, CHAOSI_REFRESH_MS * CHAOSI_MS) > chaosi_less(end, chaosi_clock(false)))
            most = CHAOSI_NEVER;
        chaosi_wait(c, chaosi_min(end, chaosi_later(chaosi_clock(false), most)), -1);
        if (most != CHAOSI_NEVER) chaosi_refresh_due(c, chaosi_less(end, chaosi_clock(false)));
    }
}

/* "headers" or, with lists of values, "multiValueHeaders". */
CHAOSI_FN void chaosi_put_event_header(chaosi_out *o, bool multi, const char *name, const char *value) {
    chaosi_put_key(o, name);
    if (multi) chaosi_puts(o, "[");
    chaosi_put_json(o, chaosi_str(value));
    if (multi) chaosi_puts(o, "]");
}

/* The injected answer in the shape that the event's source takes for one. */
CHAOSI_FN size_t chaosi_put_lambda_reply(chaos *c, const chaos_verdict *v, chaosi_shape shape, char *buf, size_t cap) {
    char text[1088], status[64];
    chaosi_out o = chaosi_into(buf, cap), body = chaosi_into(text, sizeof text);
    bool multi = shape == CHAOSI_EV_ALB_MULTI;
    int after = chaosi_reply_of(c, v, &body);
    chaosi_puts(&o, "{");
    if (shape == CHAOSI_EV_DIRECT || shape >= CHAOSI_EV_SQS) {
        chaosi_put_key(&o, "errorMessage");
        chaosi_put_json(&o, chaosi_str(text));
        chaosi_put_str(&o, "errorType", CHAOSI_INJECTED_TYPE);
        chaosi_puts(&o, ",\"stackTrace\":[]}");
        return o.len;
    }
    chaosi_put_number(&o, "statusCode", v->status);
    snprintf(status, sizeof status, "%d %s", v->status, chaosi_status_text(v->status));
    if (shape >= CHAOSI_EV_ALB) chaosi_put_str(&o, "statusDescription", status);
    chaosi_puts(&o, ",\"isBase64Encoded\":false");
    chaosi_put_key(&o, multi ? "multiValueHeaders" : "headers");
    chaosi_puts(&o, "{");
    chaosi_put_event_header(&o, multi, "Content-Type", "text/plain; charset=utf-8");
    chaosi_put_event_header(&o, multi, "X-Chaos-Injected", chaos_kind_text(v->kind));
    chaosi_put_event_header(&o, multi, "Cache-Control", "no-store");
    snprintf(status, sizeof status, "%d", after);
    if (after >= 0) chaosi_put_event_header(&o, multi, "Retry-After", status);
    chaosi_puts(&o, "}");
    chaosi_put_key(&o, "body");
    chaosi_put_json(&o, chaosi_str(text));
    chaosi_puts(&o, "}");
    return o.len;
}

CHAOSI_FN void chaosi_lambda_decide(chaos *c, const chaos_lambda_event *in, chaos_lambda_action *out, char *buf, size_t cap) {
    chaosi_invocation e;
    chaos_request r;
    chaosi_hot hot;
    memset(out, 0, sizeof *out);
    out->run = true;
    chaosi_refresh_due(c, CHAOSI_NEVER);
    if (!CHAOSI_LOAD(&c->armed)) return;
    chaosi_read_event(&e, in->body, in->len);
    chaosi_read_hot(c, &hot);
    if (!(hot.events & chaosi_shape_bit[e.shape])) {
        chaosi_count(c, CHAOSI_WORD(excluded), 1);
        return;
    }
    memset(&r, 0, sizeof r);
    r.method = e.method[0] ? e.method : NULL;
    r.path = e.path[0] ? e.path : NULL;
    r.header = chaosi_event_header;
    r.user = &e;
    r.id = in->request_id;
    r.delay_limit_us = chaosi_delay_limit(in);
    chaosi_decide(c, &r, &out->verdict);
    if (out->verdict.kind == CHAOS_DELAY) chaosi_lambda_wait(c, out->verdict.delay_us);
    if (out->verdict.kind != CHAOS_STATUS) return;
    out->run = out->verdict.after;
    out->replaced = true;
    out->failed = e.shape == CHAOSI_EV_DIRECT || e.shape >= CHAOSI_EV_SQS;
    out->len = chaosi_put_lambda_reply(c, &out->verdict, e.shape, buf, cap);
}

/* Is a fault that waits for the handler's reply still wanted? Not when chaos went off or came to its end meanwhile. */
CHAOSI_FN bool chaosi_stays(chaos *c) {
    chaosi_notice(c, true);
    if (!CHAOSI_SEQ(&c->armed)) chaosi_count(c, CHAOSI_WORD(skipped), 1);
    return CHAOSI_SEQ(&c->armed) != 0;
}

/* -- the runtime -- */
typedef struct chaosi_loop {
    chaos *c;
    chaos_lambda_handler handler;
    void *user;
    chaosi_address address;
    const char *api;
    struct chaosi_loop **all;
    int count, index; /* the only one may set the trace id in the environment */
    chaosi_u32 *over; /* 0, or 1 + the index of the loop that ended first: then all end */
    bool waiting;     /* for an event: who ends all loops may cut this; under c->lock */
    int fd;           /* -1 = not connected */
    char *in, *out;   /* CHAOSI_EVENT_MAX, CHAOSI_REPLY_MAX */
    char small[4096]; /* heads, and answers of the API */
    char trace[1024]; /* in the environment, with one loop */
    chaos_error err;
} chaosi_loop;

struct chaos_lambda_reply {
    chaosi_loop *loop;
    const char *id;
    size_t len;
    bool streams, discard, failed, broken; /* discard: the reply will be replaced; broken: the stream's connection is lost */
    char type[80], message[CHAOSI_MESSAGE_MAX];
};

/* Under the lock, so that who ends all loops never shuts down a number that was closed meanwhile. */
CHAOSI_FN void chaosi_set_api(chaosi_loop *l, int fd) {
    int old = l->fd;
    CHAOSI_LOCK(&l->c->lock);
    l->fd = fd;
    CHAOSI_UNLOCK(&l->c->lock);
    if (old >= 0) close(old);
}

CHAOSI_FN void chaosi_hang_up(chaosi_loop *l) { chaosi_set_api(l, -1); }

/* False = the run is over: no event any more. */
CHAOSI_FN bool chaosi_set_waiting(chaosi_loop *l, bool waiting) {
    bool over;
    CHAOSI_LOCK(&l->c->lock);
    over = CHAOSI_SEQ(l->over) != 0;
    l->waiting = waiting && !over;
    CHAOSI_UNLOCK(&l->c->lock);
    return !over;
}

/* A connection that is fit for another call. NULL = there is one. */
CHAOSI_FN const char *chaosi_dial_api(chaosi_loop *l) {
    int problem;
    if (l->fd >= 0 && chaosi_is_quiet(l->fd)) return NULL;
    chaosi_set_api(l, chaosi_socket(&l->address));
    problem = l->fd < 0 ? errno : chaosi_connect(l->fd, &l->address, chaosi_clock(false) + 2000 * CHAOSI_MS);
    if (!problem) return NULL;
    chaosi_hang_up(l);
    return strerror(problem);
}

/* The head of a call; what is how its path ends. */
CHAOSI_FN size_t chaosi_api_head(chaosi_loop *l, const char *method, const char *path, const char *fields) {
    int n = snprintf(l->small, sizeof l->small, "%s /2018-06-01/runtime/%s HTTP/1.1\r\nHost: %s\r\nUser-Agent: chaos-h/%s\r\n%s\r\n",
                     method, path, l->api, CHAOS_VERSION, fields);
    return n > 0 && (size_t)n < sizeof l->small ? (size_t)n : 0;
}

/* The answer of the API to a POST, and what to think of it: false = the runtime cannot go on. */
CHAOSI_FN bool chaosi_api_answer(chaosi_loop *l, const char *what) {
    chaosi_got a;
    const char *problem;
    char said[200];
    a.buf = l->small;
    a.cap = sizeof l->small;
    problem = chaosi_read_answer(l->fd, &a, chaosi_clock(false) + CHAOSI_POST_MS * CHAOSI_MS);
    if (problem || !a.head.keep_alive) chaosi_hang_up(l);
    if (problem) chaosi_note(l->c, "lambda", "call", what, problem);
    else if (a.head.status >= 300) {
        snprintf(said, sizeof said, "HTTP %d: %.150s", a.head.status, a.body.at);
        chaosi_note(l->c, "lambda", "call", what, said);
    }
    if (problem || a.head.status != 500) return true;
    chaosi_fail(&l->err, CHAOS_ERR_SYSTEM, "the Runtime API answers 500 to %s", what);
    return false;
}

/* Posts a whole message. Sent once: after a failure nobody knows whether it arrived. */
CHAOSI_FN bool chaosi_api_post(chaosi_loop *l, const char *path, const char *fields, const char *body, size_t len) {
    chaosi_u64 deadline = chaosi_clock(false) + CHAOSI_POST_MS * CHAOSI_MS;
    const char *problem = chaosi_dial_api(l);
    char all[512];
    size_t head;
    snprintf(all, sizeof all, "%sContent-Length: %zu\r\n", fields, len);
    head = chaosi_api_head(l, "POST", path, all);
    if (head && len < sizeof l->small - head) { /* one call for a short one */
        memcpy(l->small + head, body, len);
        head += len;
        len = 0;
    }
    if (!problem && !(head && chaosi_send_all(l->fd, l->small, head, deadline) && chaosi_send_all(l->fd, body, len, deadline)))
        problem = "not sent";
    if (!problem) return chaosi_api_answer(l, path);
    chaosi_hang_up(l);
    chaosi_note(l->c, "lambda", "call", path, problem);
    return true;
}

/* A type the platform takes: Function.Word or Runtime.Word. */
CHAOSI_FN const char *chaosi_error_type(const char *type) {
    const char *word = strncmp(type, "Function.", 9) == 0 ? type + 9 : strncmp(type, "Runtime.", 8) == 0 ? type + 8 : "";
    size_t i;
    for (i = 0; word[i]; i++)
        if (chaosi_lower(word[i]) < 'a' || chaosi_lower(word[i]) > 'z') return "Function.Unknown";
    return i > 1 && word[0] <= 'Z' ? type : "Function.Unknown";
}

/* buf holds CHAOSI_ERROR_MAX: whatever the message, it is whole JSON. */
CHAOSI_FN size_t chaosi_put_error(char *buf, const char *type, const char *message) {
    chaosi_out o = chaosi_into(buf, CHAOSI_ERROR_MAX);
    char cut[CHAOSI_MESSAGE_MAX];
    chaosi_copy(cut, sizeof cut, message);
    chaosi_puts(&o, "{");
    chaosi_put_str(&o, "errorMessage", cut);
    chaosi_put_str(&o, "errorType", type);
    chaosi_puts(&o, ",\"stackTrace\":[]}");
    return o.len;
}

CHAOSI_FN bool chaosi_api_error(chaosi_loop *l, const char *path, const char *type, const char *body, size_t len) {
    char fields[256];
    snprintf(fields, sizeof fields, "Content-Type: application/json\r\nLambda-Runtime-Function-Error-Type: %s\r\n", type);
    return chaosi_api_post(l, path, fields, body, len);
}

/* One piece of a stream, as a chunk. */
CHAOSI_FN void chaosi_stream_piece(chaos_lambda_reply *r, const char *data, size_t len) {
    chaosi_u64 deadline = chaosi_clock(false) + CHAOSI_POST_MS * CHAOSI_MS;
    char size[24];
    int n = snprintf(size, sizeof size, "%zx\r\n", len);
    if (r->broken || !len) return;
    r->broken = !chaosi_send_all(r->loop->fd, size, (size_t)n, deadline) || !chaosi_send_all(r->loop->fd, data, len, deadline) ||
                !chaosi_send_all(r->loop->fd, "\r\n", 2, deadline);
}

CHAOSI_FN void chaosi_base64(chaosi_out *o, const char *in, size_t len) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t i, k;
    for (i = 0; i < len; i += 3) {
        unsigned v = 0;
        char out[4];
        for (k = 0; k < 3; k++) v = v << 8 | (i + k < len ? (chaosi_u8)in[i + k] : 0u);
        for (k = 0; k < 4; k++) out[k] = i + k > len ? '=' : digits[v >> (18 - 6 * k) & 63u];
        chaosi_put(o, out, 4);
    }
}

/* The end of a stream: an error goes into trailers. */
CHAOSI_FN bool chaosi_stream_end(chaos_lambda_reply *r) {
    char body[CHAOSI_ERROR_MAX], text[2 * CHAOSI_ERROR_MAX];
    chaosi_out o = chaosi_into(text, sizeof text);
    chaosi_puts(&o, "0\r\n");
    if (r->failed) {
        size_t n = chaosi_put_error(body, r->type, r->message);
        chaosi_put_field(&o, chaosi_str("Lambda-Runtime-Function-Error-Type"), chaosi_str(r->type));
        chaosi_puts(&o, "Lambda-Runtime-Function-Error-Body: ");
        chaosi_base64(&o, body, n);
        chaosi_puts(&o, "\r\n");
    }
    chaosi_puts(&o, "\r\n");
    if (!r->broken && chaosi_send_all(r->loop->fd, text, o.len, chaosi_clock(false) + CHAOSI_POST_MS * CHAOSI_MS))
        return chaosi_api_answer(r->loop, "a streamed response");
    chaosi_hang_up(r->loop);
    chaosi_note(r->loop->c, "lambda", "call", "a streamed response", "the connection was lost");
    return true;
}

/* -- what a handler calls -- */
CHAOSI_FN void chaosi_lambda_fail(chaos_lambda_reply *r, const char *type, const char *message) {
    chaosi_copy(r->type, sizeof r->type, chaosi_error_type(type ? type : ""));
    chaosi_copy(r->message, sizeof r->message, message);
    r->failed = true;
}

CHAOSI_FN chaos_result chaosi_lambda_write(chaos_lambda_reply *r, const char *data, size_t len) {
    if ((r->discard && r->streams) || (r->failed && !r->streams)) return CHAOS_OK;
    if (r->streams) {
        chaosi_stream_piece(r, data, len);
        return r->broken ? CHAOS_ERR_UNREACHABLE : CHAOS_OK;
    }
    if (len > CHAOSI_REPLY_MAX - r->len) {
        chaosi_lambda_fail(r, "Function.ResponseSizeTooLarge", "the reply is over 6 MiB and 100 bytes");
        return CHAOS_ERR_TOO_LARGE;
    }
    if (len) memcpy(r->loop->out + r->len, data, len);
    r->len += len;
    return CHAOS_OK;
}

CHAOSI_FN chaos_result chaosi_lambda_stream(chaos_lambda_reply *r, const char *type, const char *prelude) {
    static const char gap[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    chaosi_loop *l = r->loop;
    char path[256], fields[512];
    size_t head;
    if (prelude) type = "application/vnd.awslambda.http-integration-response";
    if (!type) type = "application/octet-stream";
    if (r->streams || r->len || strlen(type) > 128 || !chaosi_is_value(chaosi_str(type))) return CHAOS_ERR_ARGUMENT;
    r->discard = r->discard && chaosi_stays(l->c);
    r->streams = r->discard || chaosi_dial_api(l) == NULL;
    if (r->discard || !r->streams) return r->discard ? CHAOS_OK : CHAOS_ERR_UNREACHABLE;
    snprintf(path, sizeof path, "invocation/%.128s/response", r->id);
    snprintf(fields, sizeof fields,
             "Lambda-Runtime-Function-Response-Mode: streaming\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n"
             "Trailer: Lambda-Runtime-Function-Error-Type, Lambda-Runtime-Function-Error-Body\r\n",
             type);
    head = chaosi_api_head(l, "POST", path, fields);
    r->broken = !chaosi_send_all(l->fd, l->small, head, chaosi_clock(false) + CHAOSI_POST_MS * CHAOSI_MS);
    if (prelude) chaosi_stream_piece(r, prelude, strlen(prelude));
    if (prelude) chaosi_stream_piece(r, gap, sizeof gap);
    return r->broken ? CHAOS_ERR_UNREACHABLE : CHAOS_OK;
}

/* Runs the handler and posts what came of it, once. False = the runtime cannot go on. */
CHAOSI_FN bool chaosi_invoke(chaosi_loop *l, const chaos_lambda_event *e) {
    chaos_lambda_action gate;
    chaos_lambda_reply r;
    chaosi_u64 start;
    char path[256], injected[8192], error[CHAOSI_ERROR_MAX];
    int problem = 0;
    memset(&r, 0, sizeof r);
    r.loop = l;
    r.id = e->request_id;
    chaosi_lambda_decide(l->c, e, &gate, injected, sizeof injected);
    start = chaosi_clock(false);
    r.discard = gate.replaced;
    if (gate.run) problem = l->handler(l->user, e, &r);
    if (gate.run && gate.replaced) gate.replaced = r.discard && (r.streams || chaosi_stays(l->c));
    if (problem && !r.failed) chaosi_lambda_fail(&r, "Function.HandlerFailed", "the handler failed");
    if (gate.run) chaosi_count_outcome(l->c, r.failed ? 500 : 200, (chaosi_clock(false) - start) / 1000);
    if (gate.verdict.ticket) chaosi_give_ticket(l->c, gate.verdict.ticket);
    if (r.streams && !gate.replaced) return chaosi_stream_end(&r);
    snprintf(path, sizeof path, "invocation/%.128s/%s", e->request_id, (gate.replaced ? gate.failed : r.failed) ? "error" : "response");
    if (gate.replaced && gate.failed) return chaosi_api_error(l, path, CHAOSI_INJECTED_TYPE, injected, gate.len);
    if (gate.replaced) return chaosi_api_post(l, path, "Content-Type: application/json\r\n", injected, gate.len);
    if (r.failed) return chaosi_api_error(l, path, r.type, error, chaosi_put_error(error, r.type, r.message));
    return chaosi_api_post(l, path, "Content-Type: application/json\r\n", l->out, r.len);
}

/* A header of the event as a C string: the field is made one in place. */
CHAOSI_FN const char *chaosi_event_field(const chaosi_got *a, const char *name) {
    chaosi_span v = chaosi_field_value(&a->head, name);
    if (!v.at) return "";
    ((char *)(size_t)v.at)[v.len] = 0;
    return v.at;
}

/* The strings stay where the head was read. */
CHAOSI_FN void chaosi_describe(const chaosi_got *a, chaosi_span body, chaos_lambda_event *e) {
    e->body = body.at;
    e->len = body.len;
    e->deadline_ms = strtoll(chaosi_event_field(a, "lambda-runtime-deadline-ms"), NULL, 10);
    e->request_id = chaosi_event_field(a, "lambda-runtime-aws-request-id");
    e->trace_id = chaosi_event_field(a, "lambda-runtime-trace-id");
    e->function_arn = chaosi_event_field(a, "lambda-runtime-invoked-function-arn");
    e->client_context = chaosi_event_field(a, "lambda-runtime-client-context");
    e->cognito_identity = chaosi_event_field(a, "lambda-runtime-cognito-identity");
    e->content_type = chaosi_event_field(a, "content-type");
}

/* Waits for the next event, without a deadline: the sandbox is frozen meanwhile. A lost connection is dialled anew, three times. */
CHAOSI_FN bool chaosi_next_event(chaosi_loop *l, chaosi_got *a, chaos_lambda_event *e) {
    const char *problem = "";
    int tries;
    for (tries = 0; tries < 4 && !CHAOSI_SEQ(l->over); tries++) {
        size_t head;
        if (tries > 1) chaosi_nap(50 * CHAOSI_MS);
        problem = chaosi_dial_api(l);
        if (problem) continue;
        head = chaosi_api_head(l, "GET", "invocation/next", "");
        a->buf = l->in;
        a->cap = CHAOSI_EVENT_MAX;
        a->head.count = 0;
        problem = "another loop has ended";
        if (!chaosi_set_waiting(l, true)) break;
        problem = "the call is not taken";
        if (chaosi_send_all(l->fd, l->small, head, chaosi_clock(false) + CHAOSI_POST_MS * CHAOSI_MS))
            problem = chaosi_read_answer(l->fd, a, CHAOSI_NEVER);
        chaosi_set_waiting(l, false);
        if (!problem) break;
        chaosi_hang_up(l);
    }
    if (problem || a->head.status != 200) {
        if (problem) chaosi_fail(&l->err, CHAOS_ERR_UNREACHABLE, "Runtime API %.60s, next: %s", l->api, problem);
        else chaosi_fail(&l->err, CHAOS_ERR_UNREACHABLE, "Runtime API %.60s, next: HTTP %d: %.80s", l->api, a->head.status, a->body.at);
        return false;
    }
    if (!a->head.keep_alive) chaosi_hang_up(l);
    chaosi_describe(a, a->body, e);
    if (chaosi_is_token(chaosi_str(e->request_id)) && strlen(e->request_id) <= 128) return true;
    chaosi_fail(&l->err, CHAOS_ERR_VALUE, "Runtime API %.60s: an event without a usable request id", l->api);
    return false;
}

/* The first loop to end ends them all: its reason is that of the run. */
CHAOSI_FN void chaosi_end_loops(chaosi_loop *l) {
    chaosi_u32 running = 0;
    int i;
    chaosi_hang_up(l);
    if (!CHAOSI_CAS(l->over, &running, (chaosi_u32)l->index + 1u)) return;
    CHAOSI_LOCK(&l->c->lock);
    for (i = 0; i < l->count; i++)
        if (l->all[i] && l->all[i]->waiting) shutdown(l->all[i]->fd, SHUT_RD); /* those at work may answer */
    CHAOSI_UNLOCK(&l->c->lock);
}

#ifndef __cplusplus
extern int putenv(char *string); /* which _POSIX_C_SOURCE hides */
#endif

/* glibc keeps every value that setenv was ever given; this one is ours, and written over. */
CHAOSI_FN void chaosi_set_trace(chaosi_loop *l, const char *id) {
    if ((size_t)snprintf(l->trace, sizeof l->trace, "_X_AMZN_TRACE_ID=%s", id) < sizeof l->trace) putenv(l->trace);
    else setenv("_X_AMZN_TRACE_ID", id, 1);
}

static void *chaosi_loop_main(void *arg) {
    chaosi_loop *l = (chaosi_loop *)arg;
    chaos_lambda_event e;
    chaosi_got a;
    while (chaosi_next_event(l, &a, &e)) {
        if (l->count == 1) chaosi_set_trace(l, e.trace_id); /* parallel loops cannot: the environment is everybody's */
        if (!chaosi_invoke(l, &e)) break;
    }
    chaosi_end_loops(l);
    return NULL;
}

/* One block for a loop. NULL = no memory, or the API's address is no address. */
CHAOSI_FN chaosi_loop *chaosi_make_loop(chaos *c, const chaosi_loop *model, int index, chaos_error *err) {
    size_t self = (sizeof(chaosi_loop) + 63) / 64 * 64;
    char *block = (char *)c->desc.alloc(c->desc.alloc_user, self + CHAOSI_EVENT_MAX + CHAOSI_REPLY_MAX);
    chaosi_loop *l = (chaosi_loop *)(void *)block;
    if (!l) chaosi_fail(err, CHAOS_ERR_MEMORY, "out of memory");
    if (!l) return NULL;
    memcpy(l, model, sizeof *l);
    l->index = index;
    l->in = block + self;
    l->out = l->in + CHAOSI_EVENT_MAX;
    return l;
}

CHAOSI_FN void chaosi_init_failed(chaosi_loop *l, const char *type, const char *why) {
    char body[CHAOSI_ERROR_MAX];
    chaosi_api_error(l, "init/error", type, body, chaosi_put_error(body, type, why));
    chaosi_hang_up(l);
}

/* One loop on this thread, each other one on its own, to the end of all. */
CHAOSI_FN void chaosi_run_loops(chaosi_loop **loops, int count) {
#ifdef CHAOSI_THREADS
    pthread_t threads[CHAOSI_LOOPS_MAX];
    int started = 1, i;
    while (started < count && chaosi_thread_of(&threads[started], CHAOSI_LOOP_STACK, chaosi_loop_main, loops[started])) started++;
    chaosi_loop_main(loops[0]);
    for (i = 1; i < started; i++) pthread_join(threads[i], NULL);
#else
    (void)count;
    chaosi_loop_main(loops[0]);
#endif
}

CHAOSI_FN chaos_result chaosi_lambda_run(chaos *c, chaos_lambda_handler fn, void *user, const chaos_lambda_desc *d, chaos_error *err) {
    const char *most = chaosi_env("AWS_LAMBDA_MAX_CONCURRENCY"), *why;
    char host[64] = "", port[8] = "80";
    chaosi_loop model, *loops[CHAOSI_LOOPS_MAX];
    chaosi_u32 over = 0;
    int made;
    memset(&model, 0, sizeof model);
    memset(loops, 0, sizeof loops);
    model.c = c;
    model.handler = fn;
    model.user = user;
    model.api = d->api ? d->api : chaosi_env("AWS_LAMBDA_RUNTIME_API");
    model.fd = -1;
    model.all = loops;
    model.over = &over;
    model.count = d->loops ? d->loops : most ? atoi(most) : 1;
    model.count = model.count < 1 ? 1 : model.count > CHAOSI_LOOPS_MAX ? CHAOSI_LOOPS_MAX : model.count;
#ifndef CHAOSI_THREADS
    model.count = 1;
#endif
    if (!model.api) return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "no Runtime API: AWS_LAMBDA_RUNTIME_API is not set; this is not Lambda");
    if (!chaosi_split_address(chaosi_str(model.api), true, host, sizeof host, port, sizeof port) ||
        !chaosi_numeric(host, port, &model.address))
        return chaosi_fail(err, CHAOS_ERR_ADDRESS, "Runtime API %.60s: must be ADDR:PORT", model.api);
    if (c->has_refresher) return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "chaos_lambda_run: open the handle with no_thread");
    why = d->init ? d->init(user) : NULL;
    if (why) chaosi_init_failed(&model, "Function.InitFailed", why);
    if (why) return chaosi_fail(err, CHAOS_ERR_VALUE, "the function's init failed: %.100s", why);
    for (made = 0; made < model.count; made++)
        if ((loops[made] = chaosi_make_loop(c, &model, made, err)) == NULL) break;
    if (!made) chaosi_init_failed(&model, "Runtime.OutOfMemory", "no memory for an event");
    if (!made) return CHAOS_ERR_MEMORY;
    chaosi_run_loops(loops, made);
    *err = loops[over - 1]->err;
    if (model.count == 1) unsetenv("_X_AMZN_TRACE_ID");
    while (made-- > 0) c->desc.free(c->desc.alloc_user, loops[made]);
    return err->code;
}
#endif /* CHAOS_NO_LAMBDA */

#ifndef CHAOS_NO_SSM
/* ==== >>ssm =================================================================================================== */
/* Parameters of AWS SSM, and configurations of AWS AppConfig. A parameter comes by one of three ways; UNSUPPORTED means that
   a way is not there, and the next is tried. All of them leave the JSON of the SSM API in buf. */
#define CHAOSI_AWS_MS   10000
#define CHAOSI_AGENT_MS 2000
#define CHAOSI_KEYS_MS  1000                 /* for each call to who hands out credentials */
#define CHAOSI_KEYS_NS  (600000 * CHAOSI_MS) /* so long before their end they are fetched anew */
#define CHAOSI_KEYS_MAX 4096                 /* bytes of a session token */

typedef struct chaosi_credentials {
    char id[256], secret[256], token[CHAOSI_KEYS_MAX];
    chaosi_u64 until; /* ns, Unix epoch; 0 = none kept */
} chaosi_credentials;

typedef struct chaosi_ssm {
    const chaos_ssm_desc *d;
    chaosi_credentials *keys;
    const chaosi_u32 *cancels; /* changes when nobody wants the answer any more; NULL = never */
    chaosi_u32 cancels_before;
    char *buf;
    size_t cap, len;
    int ms;
    const char *way;
    char passed[80]; /* why the way before could not */
} chaosi_ssm;

CHAOSI_FN bool chaosi_is_cancelled(const chaosi_ssm *s) { return s->cancels && CHAOSI_SEQ(s->cancels) != s->cancels_before; }

/* The name of an error in any of AWS's forms: JSON's __type without its namespace, XML's Code, what the aws-cli puts in brackets. */
CHAOSI_FN void chaosi_aws_name(const char *text, char *name, size_t cap) {
    static const char *const forms[] = {"\"__type\":", "<Code>", "An error occurred ("};
    const char *at = NULL, *hash;
    size_t i, len;
    for (i = 0; i < 3 && !at; i++)
        if ((at = strstr(text, forms[i])) != NULL) at += strlen(forms[i]);
    if (!at) at = "";
    at += strspn(at, " \"");
    len = strcspn(at, "\":<)");
    hash = (const char *)memchr(at, '#', len);
    if (hash) len -= (size_t)(hash + 1 - at), at = hash + 1;
    if (len >= cap) len = cap - 1;
    memcpy(name, at, len);
    name[len] = 0;
}

/* What AWS or the aws-cli said: the first of these words in the error's name, or in all of it without one, gives the code. */
CHAOSI_FN chaos_result chaosi_aws_fail(const chaosi_ssm *s, int status, const char *text, chaos_error *err) {
    static const struct {
        const char *word;
        chaos_result code;
    } words[] = {{"ParameterNotFound", CHAOS_ERR_NOT_FOUND},
                 {"ParameterVersionNotFound", CHAOS_ERR_NOT_FOUND},
                 {"Throttl", CHAOS_ERR_THROTTLED},
                 {"TooManyUpdates", CHAOS_ERR_THROTTLED},
                 {"AccessDenied", CHAOS_ERR_DENIED},
                 {"ExpiredToken", CHAOS_ERR_DENIED},
                 {"UnrecognizedClient", CHAOS_ERR_DENIED},
                 {"InvalidSignature", CHAOS_ERR_DENIED},
                 {"SignatureDoesNotMatch", CHAOS_ERR_DENIED},
                 {"InvalidClientTokenId", CHAOS_ERR_DENIED},
                 {"Unable to locate cred", CHAOS_ERR_DENIED},
                 {"IncompleteSignature", CHAOS_ERR_DENIED},
                 {"ValidationException", CHAOS_ERR_VALUE},
                 {"ParameterPatternMismatch", CHAOS_ERR_VALUE},
                 {"ParameterMaxVersionLimit", CHAOS_ERR_VALUE},
                 {"InvalidKeyId", CHAOS_ERR_VALUE},
                 {"HierarchyLevelLimit", CHAOS_ERR_VALUE},
                 {"", CHAOS_ERR_UNREACHABLE}};
    char message[1024], name[64], http[24] = "", *c;
    chaosi_span whole = chaosi_str(text);
    size_t i = 0;
    bool named;
    chaosi_aws_name(text, name, sizeof name);
    while (!strstr(name[0] ? name : text, words[i].word)) i++;
    if (status) snprintf(http, sizeof http, "HTTP %d: ", status);
    if (!chaosi_json_text(whole, "message", message, sizeof message) && !chaosi_json_text(whole, "Message", message, sizeof message))
        chaosi_copy(message, sizeof message, text + strspn(text, " \r\n"));
    for (c = message; *c; c++)
        if ((chaosi_u8)*c < 0x20 || *c == 0x7f) *c = ' ';
    while (c > message && c[-1] == ' ') *--c = 0;
    for (c = name; *c; c++)
        if (!chaosi_is_token_char(*c)) *c = '?';
    named = strstr(message, name) != NULL;
    return chaosi_fail(err, words[i].word[0] || (status != 401 && status != 403) ? words[i].code : CHAOS_ERR_DENIED, "%s: %s%s%s%s", s->way,
                       http, named ? "" : name, named ? "" : ": ", message);
}

CHAOSI_FN const char *chaosi_region(const chaosi_ssm *s) {
    const char *region = s->d->region ? s->d->region : chaosi_env("AWS_REGION");
    return region ? region : chaosi_env("AWS_DEFAULT_REGION");
}

CHAOSI_FN const char *chaosi_endpoint(const chaosi_ssm *s) {
    const char *ignore = chaosi_env("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS"), *url = chaosi_env("AWS_ENDPOINT_URL_SSM");
    if (s->d->endpoint) return s->d->endpoint;
    if (ignore && chaosi_is(chaosi_str(ignore), "true")) return NULL;
    return url ? url : chaosi_env("AWS_ENDPOINT_URL");
}

CHAOSI_FN void chaosi_put_encoded(chaosi_out *o, chaosi_span s) { /* RFC 3986 section 2.1 */
    char code[8];
    size_t i;
    for (i = 0; i < s.len; i++) {
        char c = s.at[i];
        bool plain = chaosi_is_digit(c) || (chaosi_lower(c) >= 'a' && chaosi_lower(c) <= 'z') || (c && strchr("-._~", c));
        if (plain) chaosi_put(o, &c, 1);
        else chaosi_put(o, code, (size_t)snprintf(code, sizeof code, "%%%02X", (unsigned)(chaosi_u8)c));
    }
}

/* A header line with a secret in it; false = that would break the head. */
CHAOSI_FN bool chaosi_put_secret(chaosi_out *o, const char *name, const char *secret) {
    chaosi_put_field(o, chaosi_str(name), chaosi_str(secret));
    return chaosi_is_value(chaosi_str(secret)) && o->len < o->cap;
}

/* Way 1: the AWS Parameters and Secrets Lambda Extension. It reads only, in its own region. */
CHAOSI_FN chaos_result chaosi_by_extension(chaosi_ssm *s, chaos_error *err) {
    const char *port = chaosi_env("PARAMETERS_SECRETS_EXTENSION_HTTP_PORT"), *token = chaosi_env("AWS_SESSION_TOKEN");
    const char *home = chaosi_env("AWS_REGION");
    char url[3072 + 128], fields[CHAOSI_KEYS_MAX + 64];
    chaosi_out u = chaosi_into(url, sizeof url), f = chaosi_into(fields, sizeof fields);
    chaosi_got a;
    chaos_result r;
    if (!token || (!port && !chaosi_env("AWS_LAMBDA_RUNTIME_API"))) return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "no extension");
    if (s->d->endpoint || (s->d->region && home && strcmp(s->d->region, home) != 0))
        return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "extension: another region");
    chaosi_puts(&u, "http://127.0.0.1:");
    chaosi_puts(&u, port ? port : "2773");
    chaosi_puts(&u, "/systemsmanager/parameters/get?withDecryption=true&name=");
    chaosi_put_encoded(&u, chaosi_str(s->d->name));
    if (u.len >= u.cap || !chaosi_put_secret(&f, "X-Aws-Parameters-Secrets-Token", token))
        return chaosi_fail(err, CHAOS_ERR_VALUE, "extension: the name is too long, or AWS_SESSION_TOKEN is no token");
    a.buf = s->buf;
    a.cap = s->cap;
    r = chaosi_http_call(&a, "GET", url, fields, s->ms < CHAOSI_AGENT_MS ? s->ms : CHAOSI_AGENT_MS, err);
    if (r == CHAOS_ERR_UNSUPPORTED) return r;
    s->way = "extension";
    if (r != CHAOS_OK) return r;
    if (a.head.status != 200) return chaosi_aws_fail(s, a.head.status, a.body.at, err);
    memmove(s->buf, a.body.at, (s->len = a.body.len) + 1);
    return CHAOS_OK;
}

#ifdef CHAOS_WITH_CURL
/* -- credentials, as the AWS SDKs find them: environment, container, IMDSv2 -- */
CHAOSI_FN chaos_result chaosi_take_keys(chaosi_credentials *k, const chaosi_got *a, const char *from, chaos_error *err) {
    char when[48], code[40];
    chaosi_credentials n;
    chaosi_json j;
    long long ms;
    bool coded = chaosi_json_text(a->body, "Code", code, sizeof code);
    if (a->head.status != 200) return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "%s: HTTP %d", from, a->head.status);
    if (coded && strcmp(code, "Success") != 0) return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "%s: %s", from, code);
    if (!chaosi_json_text(a->body, "AccessKeyId", n.id, sizeof n.id) ||
        !chaosi_json_text(a->body, "SecretAccessKey", n.secret, sizeof n.secret))
        return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "%s: no credentials in its answer", from);
    if (!chaosi_json_text(a->body, "Token", n.token, sizeof n.token) && chaosi_json_find(&j, a->body, "Token"))
        return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "%s: its Token is too long, or no text", from);
    chaosi_json_text(a->body, "Expiration", when, sizeof when);
    ms = chaosi_moment(when);
    n.until = ms > 0 ? (chaosi_u64)ms * CHAOSI_MS : chaosi_clock(true) + CHAOSI_KEYS_NS;
    *k = n;
    return CHAOS_OK;
}

/* ECS and EKS. The token in the file may change at any time; plain HTTP goes nowhere but to these hosts. */
CHAOSI_FN chaos_result chaosi_container_keys(chaosi_credentials *k, chaosi_got *a, chaos_error *err) {
    static const char *const hosts[] = {"127.0.0.1", "localhost", "[::1]", "169.254.170.2", "169.254.170.23", "[fd00:ec2::23]"};
    const char *relative = chaosi_env("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"), *full = chaosi_env("AWS_CONTAINER_CREDENTIALS_FULL_URI");
    const char *file = chaosi_env("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"), *token = chaosi_env("AWS_CONTAINER_AUTHORIZATION_TOKEN");
    char url[1024], fields[CHAOSI_KEYS_MAX + 64] = "", text[CHAOSI_KEYS_MAX];
    chaosi_out f = chaosi_into(fields, sizeof fields);
    size_t n = 0, i = 0;
    chaos_result r;
    if (!relative && !full) return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "no credentials in the environment");
    snprintf(url, sizeof url, "%s%s", relative ? "http://169.254.170.2" : "", relative ? relative : full);
    while (i < 6 && (strncmp(url, "http://", 7) != 0 || strncmp(url + 7, hosts[i], strlen(hosts[i])) != 0 ||
                     !strchr(":/", url[7 + strlen(hosts[i])])))
        i++;
    if (i == 6) return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "credentials from %.60s: not a host that plain HTTP may go to", url);
    if (file && (r = chaosi_read_file(file, text, sizeof text - 1, &n, err)) != CHAOS_OK) return r;
    if (n < sizeof text - 1) /* else it was cut: too long */
        while (n && strchr(" \r\n", text[n - 1])) n--;
    text[n] = 0;
    if (file) token = text;
    if (token && (n == sizeof text - 1 || !chaosi_put_secret(&f, "Authorization", token)))
        return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED,
                           "container credentials: the authorization token has a control character, or is too long");
    r = chaosi_http_call(a, "GET", url, fields, 2 * CHAOSI_KEYS_MS, err);
    return r == CHAOS_OK ? chaosi_take_keys(k, a, "container credentials", err) : r;
}

/* EC2. Without a version 2 token there is nothing: version 1 is not fallen back to. */
CHAOSI_FN chaos_result chaosi_instance_keys(chaosi_credentials *k, chaosi_got *a, chaos_error *err) {
    static const char path[] = "/latest/meta-data/iam/security-credentials/";
    const char *base = chaosi_env("AWS_EC2_METADATA_SERVICE_ENDPOINT"), *off = chaosi_env("AWS_EC2_METADATA_DISABLED");
    char url[1024], fields[512] = "";
    chaosi_out f = chaosi_into(fields, sizeof fields);
    size_t n;
    int len;
    if (off && chaosi_is(chaosi_str(off), "true")) return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "no credentials in the environment");
    if (!base) base = "http://169.254.169.254";
    n = strlen(base) < 512 ? strlen(base) : 512;
    while (n && base[n - 1] == '/') n--;
    snprintf(url, sizeof url, "%.*s/latest/api/token", (int)n, base);
    if (chaosi_http_call(a, "PUT", url, "X-aws-ec2-metadata-token-ttl-seconds: 21600\r\nContent-Length: 0\r\n", CHAOSI_KEYS_MS, err))
        return err->code;
    if (a->head.status != 200 || !chaosi_put_secret(&f, "X-aws-ec2-metadata-token", a->body.at))
        return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "instance metadata: no IMDSv2 token, HTTP %d", a->head.status);
    len = snprintf(url, sizeof url, "%.*s%s", (int)n, base, path);
    if (chaosi_http_call(a, "GET", url, fields, CHAOSI_KEYS_MS, err)) return err->code;
    n = strcspn(a->body.at, "\r\n");
    if (a->head.status != 200 || !n || n > 128) return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "instance metadata: no role");
    snprintf(url + len, sizeof url - (size_t)len, "%.*s", (int)n, a->body.at);
    if (chaosi_http_call(a, "GET", url, fields, CHAOSI_KEYS_MS, err)) return err->code;
    return chaosi_take_keys(k, a, "instance metadata", err);
}

/* Those of the environment are read each time; others are kept, and used to their end if newer ones cannot be had. */
CHAOSI_FN chaos_result chaosi_find_keys(chaosi_ssm *s, chaos_error *err) {
    const char *id = chaosi_env("AWS_ACCESS_KEY_ID"), *secret = chaosi_env("AWS_SECRET_ACCESS_KEY");
    chaosi_credentials *k = s->keys;
    chaosi_u64 now = chaosi_clock(true);
    chaosi_got a;
    if (id && secret) {
        chaosi_copy(k->id, sizeof k->id, id);
        chaosi_copy(k->secret, sizeof k->secret, secret);
        chaosi_copy(k->token, sizeof k->token, chaosi_env("AWS_SESSION_TOKEN"));
        k->until = 0;
        return CHAOS_OK;
    }
    if (k->until > now + CHAOSI_KEYS_NS) return CHAOS_OK;
    a.buf = s->buf;
    a.cap = s->cap;
    if (chaosi_env("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI") || chaosi_env("AWS_CONTAINER_CREDENTIALS_FULL_URI"))
        chaosi_container_keys(k, &a, err);
    else chaosi_instance_keys(k, &a, err);
    if (k->until > now) chaosi_no_error(err);
    return k->until > now ? CHAOS_OK : CHAOS_ERR_UNSUPPORTED;
}

/* -- way 2: libcurl, which signs (SigV4) -- */
CHAOSI_FN size_t chaosi_curl_take(char *at, size_t size, size_t n, void *user) {
    chaosi_out *o = (chaosi_out *)user;
    chaosi_put(o, at, size * n);
    return o->len < o->cap ? size * n : 0;
}

CHAOSI_FN int chaosi_curl_goes_on(void *user, curl_off_t a, curl_off_t b, curl_off_t c, curl_off_t d) {
    (void)a, (void)b, (void)c, (void)d;
    return chaosi_is_cancelled((const chaosi_ssm *)user);
}

CHAOSI_FN chaos_result chaosi_by_curl(chaosi_ssm *s, const char *operation, const char *json, chaos_error *err) {
    const char *region = chaosi_region(s), *endpoint = chaosi_endpoint(s), *authorities = chaosi_env("AWS_CA_BUNDLE");
    char url[300], target[64], sigv4[100], token[CHAOSI_KEYS_MAX + 32];
    struct curl_slist *fields = NULL;
    chaosi_out o;
    chaosi_sigpipe held;
    long status = 0;
    CURLcode r;
    CURL *h;
    if (!region) return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "no region");
    if (chaosi_find_keys(s, err) != CHAOS_OK) return err->code = CHAOS_ERR_UNSUPPORTED;
    o = chaosi_into(s->buf, s->cap); /* the credentials came here: an answer without a body must not leave them */
    h = curl_easy_init();
    if (!h) return chaosi_fail(err, CHAOS_ERR_MEMORY, "curl_easy_init failed");
    s->way = "curl";
    if (endpoint) chaosi_copy(url, sizeof url, endpoint);
    else snprintf(url, sizeof url, "https://ssm.%.60s.amazonaws.com%s/", region, strncmp(region, "cn-", 3) == 0 ? ".cn" : "");
    snprintf(target, sizeof target, "X-Amz-Target: AmazonSSM.%s", operation);
    snprintf(sigv4, sizeof sigv4, "aws:amz:%.60s:ssm", region);
    snprintf(token, sizeof token, "X-Amz-Security-Token: %s", s->keys->token);
    fields = curl_slist_append(fields, "Content-Type: application/x-amz-json-1.1");
    fields = curl_slist_append(fields, target);
    if (s->keys->token[0]) fields = curl_slist_append(fields, token);
    curl_easy_setopt(h, CURLOPT_URL, url);
    curl_easy_setopt(h, CURLOPT_HTTP_VERSION, (long)CURL_HTTP_VERSION_1_1);
    curl_easy_setopt(h, CURLOPT_PROTOCOLS_STR, "http,https");
    curl_easy_setopt(h, CURLOPT_HTTPHEADER, fields);
    curl_easy_setopt(h, CURLOPT_USERAGENT, "chaos-h/" CHAOS_VERSION);
    curl_easy_setopt(h, CURLOPT_COPYPOSTFIELDS, json);
    curl_easy_setopt(h, CURLOPT_AWS_SIGV4, sigv4);
    curl_easy_setopt(h, CURLOPT_USERNAME, s->keys->id);
    curl_easy_setopt(h, CURLOPT_PASSWORD, s->keys->secret);
    curl_easy_setopt(h, CURLOPT_NOSIGNAL, 1L);
#if LIBCURL_VERSION_NUM >= 0x075700
    curl_easy_setopt(h, CURLOPT_QUICK_EXIT, 1L); /* else a name server that is silent is waited for, whatever the time-out */
#endif
    curl_easy_setopt(h, CURLOPT_TIMEOUT_MS, (long)s->ms);
    curl_easy_setopt(h, CURLOPT_WRITEFUNCTION, chaosi_curl_take);
    curl_easy_setopt(h, CURLOPT_WRITEDATA, &o);
    curl_easy_setopt(h, CURLOPT_NOPROGRESS, 0L);
    curl_easy_setopt(h, CURLOPT_XFERINFOFUNCTION, chaosi_curl_goes_on);
    curl_easy_setopt(h, CURLOPT_XFERINFODATA, s);
    if (authorities) curl_easy_setopt(h, CURLOPT_CAINFO, authorities);
    chaosi_hold_sigpipe(&held); /* TLS writes without MSG_NOSIGNAL */
    r = curl_easy_perform(h);
    chaosi_drop_sigpipe(&held);
    curl_easy_getinfo(h, CURLINFO_RESPONSE_CODE, &status);
    curl_slist_free_all(fields);
    curl_easy_cleanup(h);
    s->len = o.len;
    if (o.len >= o.cap && status == 200)
        return chaosi_fail(err, CHAOS_ERR_TOO_LARGE, "curl: the answer is over %u bytes", (unsigned)s->cap);
    if (r != CURLE_OK && o.len < o.cap) return chaosi_fail(err, CHAOS_ERR_UNREACHABLE, "curl: %.60s: %s", url, curl_easy_strerror(r));
    return status == 200 ? CHAOS_OK : chaosi_aws_fail(s, (int)status, s->buf, err);
}
#endif

/* -- way 3: the aws-cli -- */
/* Closes everything but the three standard ones in a child to be: also what was opened without FD_CLOEXEC, or a moment ago. */
CHAOSI_FN void chaosi_close_others(posix_spawn_file_actions_t *actions, short *flags) {
#ifdef POSIX_SPAWN_CLOEXEC_DEFAULT
    *flags = (short)(*flags | POSIX_SPAWN_CLOEXEC_DEFAULT);
    (void)actions;
#else
    DIR *open_ones = opendir("/proc/self/fd");
    const struct dirent *e;
    int highest = 255, fd;
    (void)flags;
    while (open_ones && (e = readdir(open_ones)) != NULL)
        if (atoi(e->d_name) > highest) highest = atoi(e->d_name);
    if (open_ones) closedir(open_ones);
    for (fd = 3; fd < highest + 64; fd++) posix_spawn_file_actions_addclose(actions, fd);
#endif
}

/* Starts argv[0] from PATH in a process group of its own, with an empty signal mask and default dispositions; out[1] and out[3]
   are its stdout and stderr. 0 = started, else errno. */
CHAOSI_FN int chaosi_spawn(char *const *argv, const int *out, pid_t *pid) {
    extern char **environ;
    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attr;
    sigset_t set;
    short flags = POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF;
    int r;
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attr);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    posix_spawn_file_actions_adddup2(&actions, out[3], 2);
    posix_spawn_file_actions_addopen(&actions, 0, "/dev/null", O_RDONLY, 0);
    chaosi_close_others(&actions, &flags);
    sigemptyset(&set);
    posix_spawnattr_setsigmask(&attr, &set);
    sigfillset(&set);
    posix_spawnattr_setsigdefault(&attr, &set);
    posix_spawnattr_setpgroup(&attr, 0);
    posix_spawnattr_setflags(&attr, flags);
    r = posix_spawnp(pid, argv[0], &actions, &attr, argv, environ);
    posix_spawnattr_destroy(&attr);
    posix_spawn_file_actions_destroy(&actions);
    return r;
}

/* Reads both pipes to their end, bounded by what `to` holds. False = the deadline, or nobody wants it any more. */
CHAOSI_FN bool chaosi_read_both(int *fds, chaosi_out *const *to, chaosi_u64 deadline, const chaosi_ssm *s) {
    char piece[4096];
    int i;
    while (fds[0] >= 0 || fds[2] >= 0) {
        struct pollfd p[2] = {{fds[0], POLLIN, 0}, {fds[2], POLLIN, 0}};
        if (chaosi_clock(false) >= deadline || chaosi_is_cancelled(s)) return false;
        if (poll(p, 2, 50) <= 0) continue;
        for (i = 0; i < 2; i++) {
            ssize_t n = p[i].revents ? read(p[i].fd, piece, sizeof piece) : -1;
            if (n > 0) chaosi_put(to[i], piece, (size_t)n);
            if (!p[i].revents || n > 0 || (n < 0 && errno == EINTR)) continue;
            close(fds[2 * i]);
            fds[2 * i] = -1;
        }
    }
    return true;
}

/* Runs a program to its end or the deadline, when its process group is killed; it is always reaped. Returns its exit code, -1 =
   killed, or minus errno - 1 = not started. */
CHAOSI_FN int chaosi_run(char *const *argv, chaosi_out *out, chaosi_out *said, chaosi_u64 deadline, const chaosi_ssm *s) {
    chaosi_out *const to[2] = {out, said};
    int fds[4] = {-1, -1, -1, -1}, status = 0, i, problem;
    pid_t pid = 0, ended = 0;
    bool whole;
    problem = pipe(fds) == 0 && pipe(fds + 2) == 0 ? 0 : errno;
    for (i = 0; i < 4 && !problem; i++) fcntl(fds[i], F_SETFD, FD_CLOEXEC);
    if (!problem) problem = chaosi_spawn(argv, fds, &pid);
    for (i = 1; i < 4; i += 2)
        if (fds[i] >= 0) close(fds[i]);
    whole = !problem && chaosi_read_both(fds, to, deadline, s);
    for (i = 0; i < 4; i += 2)
        if (fds[i] >= 0) close(fds[i]);
    if (problem) return -problem - 1;
    while (whole && (ended = waitpid(pid, &status, WNOHANG)) == 0 && chaosi_clock(false) < deadline) chaosi_nap(CHAOSI_MS);
    if (ended == 0) {
        kill(-pid, SIGKILL);
        kill(pid, SIGKILL);
        while ((ended = waitpid(pid, &status, 0)) < 0 && errno == EINTR) {}
        whole = false;
    }
    if (!whole) return -1;
    if (ended < 0) return out->len ? 0 : 1; /* the program ignores SIGCHLD or reaps by itself: the output tells */
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
}

/* operation in the words of the aws-cli: "get-parameter". */
CHAOSI_FN chaos_result chaosi_by_cli(chaosi_ssm *s, const char *operation, const char *json, chaos_error *err) {
    const char *region = chaosi_region(s), *endpoint = chaosi_endpoint(s);
    const char *argv[16] = {"aws", "ssm", operation, "--cli-input-json", json, "--output", "json", "--no-paginate"};
    char text[1024];
    chaosi_out out = chaosi_into(s->buf, s->cap), said = chaosi_into(text, sizeof text);
    chaosi_u64 deadline = chaosi_clock(false) + (chaosi_u64)(unsigned)s->ms * CHAOSI_MS;
    int n = 8, code;
    if (region) argv[n++] = "--region";
    if (region) argv[n++] = region;
    if (endpoint) argv[n++] = "--endpoint-url";
    if (endpoint) argv[n++] = endpoint;
    code = chaosi_run((char *const *)(size_t)argv, &out, &said, deadline, s);
    if (code == -ENOENT - 1)
        return chaosi_fail(err, CHAOS_ERR_UNSUPPORTED, "no way to SSM: no aws-cli in PATH%s%s", s->passed[0] ? "; libcurl: " : "",
                           s->passed);
    s->way = "cli";
    s->len = out.len;
    if (code < -1) return chaosi_fail(err, CHAOS_ERR_SYSTEM, "cli: cannot start aws: %s", strerror(-code - 1));
    if (chaosi_is_cancelled(s)) return chaosi_fail(err, CHAOS_ERR_UNREACHABLE, "cli: given up: nobody waits for it any more");
    if (code > 0 && !said.len) snprintf(text, sizeof text, "aws ends with exit code %d and says nothing", code);
    if (code == -1) return chaosi_fail(err, CHAOS_ERR_UNREACHABLE, "cli: no answer within %d ms; aws was killed", s->ms);
    if (code != 0) return chaosi_aws_fail(s, 0, text, err);
    if (out.len >= out.cap) return chaosi_fail(err, CHAOS_ERR_TOO_LARGE, "cli: the answer is over %u bytes", (unsigned)s->cap);
    return CHAOS_OK;
}

/* One call to SSM by the first way that is there. */
CHAOSI_FN chaos_result chaosi_ssm_call(chaosi_ssm *s, const char *operation, const char *kebab, const char *json, chaos_error *err) {
    chaos_result r = strcmp(operation, "GetParameter") == 0 ? chaosi_by_extension(s, err) : CHAOS_ERR_UNSUPPORTED;
#ifdef CHAOS_WITH_CURL
    if (r == CHAOS_ERR_UNSUPPORTED && (r = chaosi_by_curl(s, operation, json, err)) == CHAOS_ERR_UNSUPPORTED)
        chaosi_copy(s->passed, sizeof s->passed, err->text);
#endif
    if (r == CHAOS_ERR_UNSUPPORTED) r = chaosi_by_cli(s, kebab, json, err);
    if (r == CHAOS_OK) chaosi_no_error(err); /* of ways that were not there */
    return r;
}

/* -- what is in the answers -- */
/* A JSON number times 1,000, cut to a whole one: 1530018761.888, 1.530018761888E9. */
CHAOSI_FN long long chaosi_thousandfold(const char *s) {
    long long v = 0;
    int shift = 3, behind = 0;
    for (; chaosi_is_digit(*s) || *s == '.'; s++) {
        if (*s == '.') behind = 1;
        else if (v < LLONG_MAX / 100) v = v * 10 + (*s - '0'), shift -= behind;
        else shift += !behind;
    }
    if (*s == 'e' || *s == 'E') shift += atoi(s + 1);
    for (; shift > 0 && v < LLONG_MAX / 10; shift--) v *= 10;
    for (; shift < 0; shift++) v /= 10;
    return v;
}

/* A moment as SSM tells it (epoch seconds) or as the aws-cli may (ISO 8601, with an offset). ms, 0 = not known. */
CHAOSI_FN long long chaosi_aws_moment(chaosi_span text, const char *path) {
    chaosi_json j;
    char when[48], *zone, t = chaosi_json_find(&j, text, path);
    long long ms, offset = 0;
    int hours, minutes;
    if (t == '0') return chaosi_thousandfold(j.text + j.start);
    if (t != '"' || !chaosi_json_text(text, path, when, sizeof when) || strlen(when) < 20) return 0;
    zone = when + strlen(when) - 6;
    hours = chaosi_digits(zone + 1, 2);
    minutes = chaosi_digits(zone + 4, 2);
    if ((*zone == '+' || *zone == '-') && hours >= 0 && minutes >= 0) {
        offset = (*zone == '+' ? 60000ll : -60000ll) * (hours * 60 + minutes);
        strcpy(zone, "Z");
    }
    ms = chaosi_moment(when);
    return ms > 0 ? ms - offset : 0;
}

CHAOSI_FN unsigned long long chaosi_aws_number(chaosi_span text, const char *path) {
    chaosi_json j;
    return chaosi_json_find(&j, text, path) == '0' ? strtoull(j.text + j.start, NULL, 10) : 0;
}

/* Prepares a call: defaults, bounds. */
CHAOSI_FN chaos_result chaosi_ssm_begin(chaosi_ssm *s, const chaos_ssm_desc *d, char *buf, size_t cap, chaosi_credentials *keys,
                                        chaos_error *err) {
    memset(s, 0, sizeof *s);
    s->d = d;
    s->buf = buf;
    s->cap = cap;
    s->keys = keys;
    s->ms = d && d->timeout_ms ? d->timeout_ms : CHAOSI_AWS_MS;
    if (!d || !d->name || !d->name[0] || !buf || !cap) return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "ssm: a name and a buffer are needed");
    if (strlen(d->name) > 2048) return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "ssm: the name is over 2,048 bytes");
    if (s->ms < 100 || s->ms > 600000) return chaosi_fail(err, CHAOS_ERR_RANGE, "timeout_ms is out of range: 100..600000");
    return CHAOS_OK;
}

CHAOSI_FN chaos_result chaosi_ssm_get(chaosi_ssm *s, chaos_ssm_value *out, chaos_error *err) {
    char json[2048 * 6 + 64];
    chaosi_out o = chaosi_into(json, sizeof json);
    chaosi_json value;
    chaosi_span text;
    chaos_result r;
    chaosi_puts(&o, "{\"WithDecryption\":true");
    chaosi_put_str(&o, "Name", s->d->name);
    chaosi_puts(&o, "}");
    r = chaosi_ssm_call(s, "GetParameter", "get-parameter", json, err);
    chaosi_copy(out->way, sizeof out->way, s->way);
    if (r != CHAOS_OK) return r;
    text = chaosi_of(s->buf, s->len);
    if (chaos_json_check(text.at, text.len, NULL) != CHAOS_OK || chaosi_json_find(&value, text, "Parameter.Value") != '"')
        return chaosi_fail(err, CHAOS_ERR_UNREACHABLE, "%s: the answer holds no Parameter.Value", s->way);
    out->version = chaosi_aws_number(text, "Parameter.Version");
    out->modified_ms = chaosi_aws_moment(text, "Parameter.LastModifiedDate");
    chaosi_json_text(text, "Parameter.Type", out->type, sizeof out->type);
    out->len = chaosi_json_decode(&value, s->buf, s->cap - 1); /* in place: it only gets shorter */
    s->buf[out->len] = 0;
    return CHAOS_OK;
}

CHAOSI_FN chaos_result chaosi_ssm_put(chaosi_ssm *s, const char *value, size_t len, chaos_ssm_value *out, chaos_error *err) {
    char json[24576];
    const char *type = s->d->type, *tier = len > 4096 ? "Intelligent-Tiering" : NULL;
    bool typed, tiered;
    chaosi_out o;
    chaos_result r;
    do { /* what is there and what is new want other things said: AWS's refusal tells */
        o = chaosi_into(json, sizeof json);
        chaosi_puts(&o, "{\"Overwrite\":true");
        chaosi_put_str(&o, "Name", s->d->name);
        chaosi_put_key(&o, "Value");
        chaosi_put_json(&o, chaosi_of(value, len));
        if (type) chaosi_put_str(&o, "Type", type);
        if (tier) chaosi_put_str(&o, "Tier", tier);
        chaosi_puts(&o, "}");
        if (o.len >= o.cap) return chaosi_fail(err, CHAOS_ERR_TOO_LARGE, "ssm: the value is too large");
        r = chaosi_ssm_call(s, "PutParameter", "put-parameter", json, err);
        tiered = r == CHAOS_ERR_VALUE && !tier && strstr(err->text, "advanced-parameter tier");
        typed = r == CHAOS_ERR_VALUE && !tiered && !type && strstr(err->text, "type");
        if (tiered) tier = "Advanced";
        if (typed) type = "String";
    } while (tiered || typed);
    chaosi_copy(out->way, sizeof out->way, s->way);
    if (r != CHAOS_OK) return r;
    out->version = chaosi_aws_number(chaosi_of(s->buf, s->len), "Version");
    return CHAOS_OK;
}

/* One page of names to s->buf, a line each; the token of the next page, "" = none. The names only move forward. */
CHAOSI_FN size_t chaosi_ssm_names(chaosi_ssm *s, char *token, size_t cap) {
    chaosi_span text = chaosi_of(s->buf, s->len);
    chaosi_json j;
    size_t made = 0;
    int depth;
    char t = chaosi_json_find(&j, text, "Parameters");
    if (!chaosi_json_text(text, "NextToken", token, cap)) token[0] = 0;
    for (depth = j.depth; t && j.depth >= depth; t = chaosi_json_next(&j)) {
        if (t != ':' || j.depth != depth + 1 || !chaosi_same(chaosi_of(j.text + j.start, j.end - j.start), chaosi_str("Name"))) continue;
        if (chaosi_json_next(&j) != '"') break;
        made += chaosi_json_decode(&j, s->buf + made, s->cap - made);
        s->buf[made++] = '\n';
    }
    return made;
}

CHAOSI_FN chaos_result chaosi_ssm_list(chaosi_ssm *s, chaos_ssm_value *out, chaos_error *err) {
    char json[2048 * 6 + 4096], token[3072] = "";
    chaos_result r;
    do {
        chaosi_out o = chaosi_into(json, sizeof json);
        chaosi_puts(&o, "{\"Recursive\":true");
        chaosi_put_str(&o, "Path", s->d->name);
        if (token[0]) chaosi_put_str(&o, "NextToken", token);
        chaosi_puts(&o, "}");
        r = chaosi_ssm_call(s, "GetParametersByPath", "get-parameters-by-path", json, err);
        if (r == CHAOS_OK) {
            size_t n = chaosi_ssm_names(s, token, sizeof token);
            s->buf += n;
            s->cap -= n;
            out->len += n;
            s->buf[0] = 0;
        }
    } while (r == CHAOS_OK && token[0]);
    chaosi_copy(out->way, sizeof out->way, s->way);
    return r;
}

/* AppConfig by its agent, which is on this machine or in this pod. */
CHAOSI_FN chaos_result chaosi_appconfig(chaos *c, char *buf, size_t cap, chaos_fetched *out, chaos_error *err) {
    static const char *const parts[] = {"/applications/", "/environments/", "/configurations/"};
    const char *port = chaosi_env("AWS_APPCONFIG_EXTENSION_HTTP_PORT"), *at = c->source.path;
    char url[4096 * 3 + 128];
    chaosi_out u = chaosi_into(url, sizeof url);
    chaosi_span version;
    chaosi_u64 number;
    chaosi_ssm s;
    chaosi_got a;
    chaos_result r;
    int i;
    chaosi_puts(&u, "http://127.0.0.1:");
    chaosi_puts(&u, port ? port : "2772");
    for (i = 0; i < 3; i++, at += strcspn(at, "/") + 1) {
        chaosi_puts(&u, parts[i]);
        chaosi_put_encoded(&u, chaosi_of(at, strcspn(at, "/")));
    }
    c->way = s.way = "agent";
    a.buf = buf;
    a.cap = cap;
    i = (int)CHAOSI_LOAD(&c->fetch_ms);
    r = chaosi_http_call(&a, "GET", url, "", i && i < CHAOSI_AGENT_MS ? i : CHAOSI_AGENT_MS, err);
    if (r == CHAOS_ERR_UNSUPPORTED) return err->code = CHAOS_ERR_UNREACHABLE;
    if (r != CHAOS_OK) return r;
    if (a.head.status == 404) return chaosi_fail(err, CHAOS_ERR_NOT_FOUND, "agent: HTTP 404: %.100s", a.body.at);
    if (a.head.status != 200) return chaosi_aws_fail(&s, a.head.status, a.body.at, err);
    version = chaosi_field_value(&a.head, "configuration-version");
    if (!version.at) version = chaosi_field_value(&a.head, "configurationversion");
    if (chaosi_length_of(version, &number)) out->version = number;
    memmove(buf, a.body.at, out->len = a.body.len);
    return CHAOS_OK;
}

/* When the way changes: that a better one was not there, or that the extension keeps what it read for longer than we do. */
CHAOSI_FN void chaosi_tell_way(chaos *c, const chaosi_ssm *s) {
    const char *ttl = chaosi_env("SSM_PARAMETER_STORE_TTL");
    if (!ttl) ttl = "300";
    if (s->passed[0]) chaosi_note(c, "fallback", "way", s->way, s->passed);
    if (strcmp(s->way, "extension") == 0 && (chaosi_u64)atoi(ttl) * 1000 > chaosi_ttl_ms(c, true))
        chaosi_note(c, "extension-ttl", "seconds", ttl,
                    "the extension keeps a config this long, so a rollback takes as long: set SSM_PARAMETER_STORE_TTL=5");
}

/* The source of a handle: ssm:NAME[?region=R], appconfig:APP/ENV/PROFILE. */
CHAOSI_FN chaos_result chaosi_remote(chaos *c, char *buf, size_t cap, chaos_fetched *out, chaos_error *err) {
    char name[sizeof c->source.path], *query;
    chaos_ssm_desc d;
    chaos_ssm_value value;
    chaosi_ssm s;
    chaos_result r;
    memset(out, 0, sizeof *out);
    memset(&d, 0, sizeof d);
    memset(&value, 0, sizeof value);
    chaosi_no_error(err);
    if (c->source.scheme == CHAOSI_APPCONFIG) return chaosi_appconfig(c, buf, cap, out, err);
    chaosi_copy(name, sizeof name, c->source.path);
    query = strchr(name, '?');
    if (query) *query = 0;
    d.name = name;
    d.region = query ? query + strlen("?region=") : NULL;
    r = chaosi_ssm_begin(&s, &d, buf, cap, (chaosi_credentials *)c->keys, err);
    s.cancels = &c->cancels;
    s.cancels_before = c->cancels_before;
    /* Who fetches is also who notices the end, and must be back by then. */
    if (CHAOSI_LOAD(&c->armed) && !c->desc.clock)
        s.ms = (int)chaosi_min(CHAOSI_AWS_MS, chaosi_less(c->until, chaosi_clock(false)) / CHAOSI_MS + 100);
    if (CHAOSI_LOAD(&c->fetch_ms)) s.ms = (int)CHAOSI_LOAD(&c->fetch_ms);
    if (r == CHAOS_OK) r = chaosi_ssm_get(&s, &value, err);
    if (s.way && (!c->way || strcmp(c->way, s.way) != 0)) chaosi_tell_way(c, &s);
    c->way = s.way ? s.way : c->way;
    out->len = value.len;
    out->version = value.version;
    out->modified_ms = value.modified_ms;
    return r;
}
#endif /* CHAOS_NO_SSM */

/* ==== >>public ================================================================================================ */
CHAOSI_FN void *chaosi_malloc(void *user, size_t size) { return (void)user, malloc(size); }
CHAOSI_FN void chaosi_free(void *user, void *ptr) { (void)user, free(ptr); }

CHAOSI_FN chaosi_u64 chaosi_random(const void *salt) {
    chaosi_u64 x = 0;
    FILE *f = fopen("/dev/urandom", "rb");
    if (f && fread(&x, sizeof x, 1, f) != 1) x = 0;
    if (f) fclose(f);
    return chaosi_mix(x ^ chaosi_clock(true) ^ (chaosi_u64)(size_t)salt) >> 11; /* 53 bits: what a config may say */
}

/* Who this process is: told, or found in the environment. The first that says something. */
CHAOSI_FN void chaosi_identify(chaos *c, const chaos_desc *d) {
    char host[sizeof c->instance] = "localhost";
    const char *task = chaosi_env("ECS_CONTAINER_METADATA_URI_V4");
    const char *ids[] = {d->instance, chaosi_env("CHAOS_INSTANCE"), chaosi_env("AWS_LAMBDA_LOG_STREAM_NAME"), NULL, host};
    const char *services[] = {d->service, chaosi_env("CHAOS_SERVICE"), chaosi_env("AWS_LAMBDA_FUNCTION_NAME")};
    int id = 0, service = 0;
    ids[3] = task && strrchr(task, '/') ? strrchr(task, '/') + 1 : task;
#ifdef CHAOSI_POSIX
    gethostname(host, sizeof host);
    host[sizeof host - 1] = 0;
#endif
    while (id < 4 && !(ids[id] && *ids[id])) id++;
    while (service < 2 && !(services[service] && *services[service])) service++;
    chaosi_copy(c->instance, sizeof c->instance, ids[id]);
    chaosi_copy(c->service, sizeof c->service, services[service]);
    c->instance_hash = chaosi_hash(chaosi_str(c->instance));
}

CHAOSI_FN chaos_result chaosi_desc_check(const chaos_desc *d, chaos_error *err) {
    if (!d->alloc != !d->free) return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "alloc and free: both or neither");
    if (d->ttl_ms && (d->ttl_ms < 10 || d->ttl_ms > 86400000))
        return chaosi_fail(err, CHAOS_ERR_RANGE, "ttl_ms is out of range: 10..86400000");
    if (d->max_stale_ms < -1 || d->max_stale_ms > 86400000)
        return chaosi_fail(err, CHAOS_ERR_RANGE, "max_stale_ms is out of range: -1..86400000");
    return CHAOS_OK;
}

/* One block: the handle, its slots, places and bytes. */
CHAOSI_FN chaos *chaosi_allocate(const chaos_desc *d) {
    size_t self = (sizeof(chaos) + 63) / 64 * 64, slots = (sizeof(chaosi_slot) * CHAOSI_SLOTS + 63) / 64 * 64;
    size_t tickets = sizeof(chaosi_u32) * CHAOS_MAX_CONCURRENT, keys = 0;
    void *(*alloc)(void *, size_t) = d->alloc ? d->alloc : chaosi_malloc;
    chaos *c;
    char *block;
#ifndef CHAOS_NO_SSM
    keys = sizeof(chaosi_credentials);
#endif
    block = (char *)alloc(d->alloc_user, self + slots + tickets + keys + CHAOS_CONFIG_INPUT_MAX + 1);
    c = (chaos *)(void *)block;
    if (!block) return NULL;
    memset(block, 0, self + slots + tickets + keys);
    memset(c->pipes, -1, sizeof c->pipes);
    c->desc = *d;
    c->desc.alloc = alloc;
    c->desc.free = d->free ? d->free : chaosi_free;
    c->slots = (chaosi_slot *)(void *)(block + self);
    c->tickets = (chaosi_u32 *)(void *)(block + self + slots);
    c->keys = block + self + slots + tickets;
    c->bytes = block + self + slots + tickets + keys;
#ifdef CHAOSI_THREADS
    pthread_mutex_init(&c->lock, NULL);
    pthread_mutex_init(&c->fetch_lock, NULL);
#endif
    return c;
}

CHAOSI_FN void chaosi_release(chaos *c) {
    chaosi_close_pipes(c);
#ifdef CHAOSI_THREADS
    pthread_mutex_destroy(&c->lock);
    pthread_mutex_destroy(&c->fetch_lock);
#endif
    c->desc.free(c->desc.alloc_user, c);
}

/* Pipes, the first config (local sources at once, others are the refresher's), the first log line, the refresher. */
CHAOSI_FN bool chaosi_start(chaos *c, chaos_error *err) {
    chaos_error unused;
    if (!chaosi_open_pipes(c)) return chaosi_fail(err, CHAOS_ERR_SYSTEM, "pipe: %s", strerror(errno)) == CHAOS_OK;
    chaosi_disarm(c);
    if (c->source.scheme && c->source.scheme < CHAOSI_CALLBACK) chaosi_refresh(c, false, &unused);
    else chaosi_settle(c);
    chaosi_say(c, CHAOSI_OPENED);
#ifdef CHAOSI_THREADS
    if (c->desc.no_thread || !c->source.scheme || c->killed == 2) return true;
    c->has_refresher = chaosi_thread(&c->refresher, chaosi_refresher, c);
    if (!c->has_refresher) chaosi_fail(err, CHAOS_ERR_SYSTEM, "cannot start the refresher thread");
    return c->has_refresher;
#else
    return true;
#endif
}

chaos *chaos_open(const chaos_desc *desc, chaos_error *err) {
    const char *text, *disable = chaosi_env("CHAOS_DISABLE");
    chaos_desc none;
    chaosi_source source;
    chaos *c;
    memset(&none, 0, sizeof none);
    if (!desc) desc = &none;
    text = desc->config ? desc->config : chaosi_env("CHAOS_CONFIG");
    chaosi_no_error(err);
    if (chaosi_desc_check(desc, err) != CHAOS_OK || chaosi_source_of(&source, desc, text, err) != CHAOS_OK) return NULL;
    c = chaosi_allocate(desc);
    if (!c) chaosi_fail(err, CHAOS_ERR_MEMORY, "out of memory");
    if (!c) return NULL;
    c->source = source;
    c->tell = chaosi_tell;
#ifndef CHAOS_NO_SSM
    c->remote = chaosi_remote;
#endif
    c->modes = CHAOSI_MODES_IN_PROCESS;
    c->seed = chaosi_random(c);
    c->emf = chaosi_env("CHAOS_EMF") && strcmp(chaosi_env("CHAOS_EMF"), "0") != 0;
    c->killed = disable && strcmp(disable, "0") != 0 ? 2 : 0;
    c->log_fd = chaosi_log_open(2);
    c->emf_fd = c->emf ? chaosi_log_open(1) : 1;
    chaosi_identify(c, desc);
    if (chaosi_start(c, err)) return c;
    chaosi_release(c);
    return NULL;
}

void chaos_close(chaos *c) {
    if (!c) return;
    CHAOSI_ORDERED(&c->closing, 1u);
    CHAOSI_ENTER(&c->cancels, 1u);
    chaosi_disarm(c); /* before the refresher is waited for: its fetch may last */
#ifdef CHAOSI_THREADS
    chaosi_ring(c, CHAOSI_POKE(c)[1]);
    if (c->has_refresher && chaosi_own(c)) pthread_join(c->refresher, NULL);
#endif
    while (chaosi_own(c) && CHAOSI_SEQ(&c->waiting)) chaosi_nap(CHAOSI_MS); /* a fork's child has no waiters */
    if (chaosi_own(c)) chaosi_log_summary(c); /* in a fork's child nobody may ever unlock what the refresher held */
    chaosi_release(c);
}

chaos_verdict chaos_decide(chaos *c, const chaos_request *req) {
    chaos_verdict v;
    if (CHAOSI_UNLIKELY(c && CHAOSI_LOAD(&c->armed))) chaosi_decide(c, req, &v);
    else memset(&v, 0, sizeof v);
    return v;
}

void chaos_wait(chaos *c, const chaos_verdict *v) {
    if (c && v->delay_us) chaosi_wait(c, chaosi_clock(false) + (chaosi_u64)v->delay_us * 1000, -1);
}

void chaos_done(chaos *c, const chaos_verdict *v, int status, unsigned long long us) {
    if (!c) return;
    if (v->ticket) chaosi_give_ticket(c, v->ticket);
    chaosi_count_outcome(c, status, us);
}

size_t chaos_verdict_body(chaos *c, const chaos_verdict *v, char *buf, size_t cap) {
    return c ? chaosi_body_of(c, v, buf, cap) : chaosi_into(buf, cap).len;
}

int chaos_verdict_retry_after(chaos *c, const chaos_verdict *v) { return c ? chaosi_retry_after_of(c, v) : -1; }
int chaos_wake_fd(chaos *c) { return c ? CHAOSI_WAKE(c)[0] : -1; }

chaos_result chaos_refresh(chaos *c, chaos_error *err) {
    chaos_error local;
    if (!err) err = &local;
    chaosi_no_error(err);
    if (!c) return CHAOS_OK;
    if (c->source.fetched) chaosi_refresh(c, true, err);
    else chaosi_notice(c, true);
    chaosi_ring(c, CHAOSI_POKE(c)[1]); /* the refresher plans anew */
    return err->code;
}

void chaos_off(chaos *c) {
    if (!c) return;
    if (!CHAOSI_SEQ(&c->killed)) CHAOSI_ORDERED(&c->killed, 1u);
    CHAOSI_ENTER(&c->cancels, 1u);
    chaosi_disarm(c);
    chaosi_ring(c, CHAOSI_POKE(c)[1]); /* the refresher tells of it */
}

void chaos_stats(chaos *c, chaos_report *out) {
    memset(out, 0, sizeof *out);
    out->age_ms = -1;
    if (c) chaosi_report(c, out);
    else chaosi_copy(out->reason, sizeof out->reason, "no handle");
}

size_t chaos_metrics(chaos *c, char *buf, size_t cap) {
    chaos_report r;
    chaos_stats(c, &r);
    return chaosi_metrics(&r, c ? c->service : "", c ? c->instance : "", buf, cap);
}

bool chaos_get_config(chaos *c, chaos_config *out) {
    bool good;
    if (!c) return false;
    CHAOSI_LOCK(&c->lock);
    good = c->loaded == CHAOSI_LOADED_GOOD;
    if (good) *out = c->slots[c->current].cfg;
    CHAOSI_UNLOCK(&c->lock);
    return good;
}

chaos_result chaos_proxy_run(chaos *c, const chaos_proxy_desc *desc, chaos_error *err) {
    chaosi_no_error(err);
    if (!c || !desc) return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "chaos_proxy_run needs a handle and a desc");
#ifdef CHAOS_NO_PROXY
    return chaosi_fail(err, CHAOS_ERR_COMPILED_OUT, "the proxy is compiled out (CHAOS_NO_PROXY)");
#else
    return chaosi_proxy_run(c, desc, err);
#endif
}

void chaos_proxy_stop(chaos *c) {
    if (c) CHAOSI_ENTER(&c->cancels, 1u);
    if (c) chaosi_ring(c, CHAOSI_STOP(c)[1]);
}
chaos_result chaos_lambda_run(chaos *c, chaos_lambda_handler fn, void *user, const chaos_lambda_desc *desc, chaos_error *err) {
    chaos_error local;
    if (!err) err = &local;
    chaosi_no_error(err);
    if (!c || !fn || !desc) return chaosi_fail(err, CHAOS_ERR_ARGUMENT, "chaos_lambda_run needs a handle, a handler and a desc");
#ifdef CHAOS_NO_LAMBDA
    return (void)user, chaosi_fail(err, CHAOS_ERR_COMPILED_OUT, "Lambda is compiled out (CHAOS_NO_LAMBDA)");
#else
    return chaosi_lambda_run(c, fn, user, desc, err);
#endif
}

#ifdef CHAOS_NO_LAMBDA
chaos_result chaos_lambda_write(chaos_lambda_reply *reply, const void *data, size_t len) {
    return (void)reply, (void)data, (void)len, CHAOS_ERR_COMPILED_OUT;
}

chaos_result chaos_lambda_stream(chaos_lambda_reply *reply, const char *type, const char *prelude) {
    return (void)reply, (void)type, (void)prelude, CHAOS_ERR_COMPILED_OUT;
}

void chaos_lambda_fail(chaos_lambda_reply *reply, const char *type, const char *message) { (void)reply, (void)type, (void)message; }
#else
chaos_result chaos_lambda_write(chaos_lambda_reply *reply, const void *data, size_t len) {
    return chaosi_lambda_write(reply, (const char *)data, len);
}

chaos_result chaos_lambda_stream(chaos_lambda_reply *reply, const char *type, const char *prelude) {
    return chaosi_lambda_stream(reply, type, prelude);
}

void chaos_lambda_fail(chaos_lambda_reply *reply, const char *type, const char *message) { chaosi_lambda_fail(reply, type, message); }
#endif

chaos_lambda_action chaos_lambda_decide(chaos *c, const chaos_lambda_event *event, char *buf, size_t cap) {
    chaos_lambda_action a;
    memset(&a, 0, sizeof a);
    a.run = true;
#ifndef CHAOS_NO_LAMBDA
    if (c) chaosi_lambda_decide(c, event, &a, buf, cap);
#else
    (void)c, (void)event, (void)buf, (void)cap;
#endif
    return a;
}

/* what: g get, p put, l list. */
CHAOSI_FN chaos_result chaosi_ssm_public(char what, const chaos_ssm_desc *d, char *buf, size_t cap, const char *text, size_t len,
                                         chaos_ssm_value *out, chaos_error *err) {
#ifdef CHAOS_NO_SSM
    (void)what, (void)d, (void)buf, (void)cap, (void)text, (void)len, (void)out;
    return chaosi_fail(err, CHAOS_ERR_COMPILED_OUT, "SSM is compiled out (CHAOS_NO_SSM)");
#else
    chaosi_ssm s;
    chaosi_credentials keys;
    chaos_error local, *e = err ? err : &local;
    chaosi_no_error(e);
    keys.until = 0;
    if (!out || (what == 'p' && !text)) return chaosi_fail(e, CHAOS_ERR_ARGUMENT, "ssm: nothing to write, or no place for the answer");
    memset(out, 0, sizeof *out);
    if (chaosi_ssm_begin(&s, d, buf, cap, &keys, e) != CHAOS_OK) return e->code;
    if (what == 'p') return chaosi_ssm_put(&s, text, len, out, e);
    return what == 'g' ? chaosi_ssm_get(&s, out, e) : chaosi_ssm_list(&s, out, e);
#endif
}

chaos_result chaos_ssm_get(const chaos_ssm_desc *d, char *buf, size_t cap, chaos_ssm_value *out, chaos_error *err) {
    return chaosi_ssm_public('g', d, buf, cap, NULL, 0, out, err);
}

chaos_result chaos_ssm_put(const chaos_ssm_desc *d, const char *text, size_t len, chaos_ssm_value *out, chaos_error *err) {
    char answer[8192];
    return chaosi_ssm_public('p', d, answer, sizeof answer, text, len, out, err);
}

chaos_result chaos_ssm_list(const chaos_ssm_desc *d, char *buf, size_t cap, chaos_ssm_value *out, chaos_error *err) {
    return chaosi_ssm_public('l', d, buf, cap, NULL, 0, out, err);
}
#endif /* CHAOS_COMPILE_OUT */

const char *chaos_sources(void) {
#ifdef CHAOS_NO_SSM
    return "inline env file callback";
#elif defined(CHAOS_WITH_CURL)
    return "inline env file callback ssm:extension ssm:curl ssm:cli appconfig:agent";
#else
    return "inline env file callback ssm:extension ssm:cli appconfig:agent";
#endif
}

const char *chaos_version(void) { return CHAOS_VERSION; }

const char *chaos_result_text(chaos_result code) {
    return (unsigned)code < CHAOS_RESULT_COUNT ? chaosi_result_texts[code] : "unknown result";
}

const char *chaos_kind_text(int kind) { return kind >= 0 && kind < CHAOS_KIND_COUNT ? chaosi_kind_texts[kind] : "unknown"; }

const char *chaos_state_text(chaos_state state) { return (unsigned)state < CHAOS_STATE_COUNT ? chaosi_state_texts[state] : "unknown"; }

chaos_verdict chaos_judge(const chaos_config *cfg, const chaos_request *req, unsigned long long key) {
    chaos_verdict v;
    chaosi_judge(cfg, req, key, &v);
    return v;
}

#endif /* CHAOS_IMPLEMENTATION_ONCE */
#endif /* CHAOS_IMPLEMENTATION */

#!/bin/sh
# layers.sh [HEADER] - the sections of chaos.h: their order, and what each may not touch. Prints one line per offence.
set -u
here=$(dirname "$0")
awk -f "$here/strip.awk" "${1:-$here/../../chaos.h}" | awk '
function say(text) { print "line " NR ", >>" section ": " text; bad = 1 }
function forbid(list, what) { deny[list] = deny[list] "" (deny[list] ? "|" : "") what }

BEGIN {
    order["public"] = " features version options result config verdict handle proxy lambda ssm"
    order["implementation"] = " platform base json config judge source cache http net telemetry decide client proxy lambda ssm public"

    alloc = "(malloc|calloc|realloc|free|alloc|chaosi_alloc[a-z_]*|chaosi_free[a-z_]*)[ ]*\\("
    files = "(fopen|fclose|fread|fwrite|fprintf|fputs|fflush|printf|puts|perror|open|openat|read|write|pread|pwrite|stat|fstat|unlink|pipe|pipe2|getenv|posix_spawn)[ ]*\\("
    sockets = "(socket|socketpair|bind|listen|accept|accept4|connect|shutdown|send|sendto|sendmsg|recv|recvfrom|recvmsg|setsockopt|getsockopt|getsockname|getpeername|getaddrinfo|splice|chaosi_net_[a-z_]+)[ ]*\\("
    waiting = "(poll|ppoll|select|nanosleep|clock_nanosleep|usleep|sleep|pthread_cond_[a-z]+|pthread_join)[ ]*\\("
    clock = "(clock_gettime|gettimeofday|time|chaosi_clock[a-z_]*|chaosi_now[a-z_]*)[ ]*\\("
    atomics = "(__atomic_[a-z_]+|__sync_[a-z_]+|chaosi_atomic_[a-z_]+|chaosi_load[a-z_0-9]*|chaosi_store[a-z_0-9]*)[ ]*\\("
    json = "chaosi_json_[a-z_]+"
    threads = "(pthread_[a-z_]+)[ ]*\\("

    forbid("base", files); forbid("base", sockets); forbid("base", waiting)
    forbid("json", alloc); forbid("json", files); forbid("json", sockets); forbid("json", waiting); forbid("json", clock); forbid("json", atomics); forbid("json", threads)
    forbid("config", files); forbid("config", sockets); forbid("config", waiting); forbid("config", atomics); forbid("config", threads)
    forbid("judge", alloc); forbid("judge", files); forbid("judge", sockets); forbid("judge", waiting); forbid("judge", clock); forbid("judge", threads)
    forbid("source", sockets); forbid("source", json); forbid("source", "chaos_config_parse|chaos_fault|chaos_rule|chaos_match")
    forbid("cache", sockets); forbid("cache", json)
    forbid("http", alloc); forbid("http", files); forbid("http", sockets); forbid("http", waiting)
    forbid("net", "chaosi_http_[a-z_]+|chaosi_head|chaos_config_[a-z_]+|chaosi_config_[a-z_]+|chaosi_judge[a-z_]*")
    forbid("telemetry", sockets)
    forbid("decide", sockets); forbid("decide", files); forbid("decide", json); forbid("decide", alloc)
    forbid("client", alloc); forbid("client", json); forbid("client", "chaos_config_[a-z_]+|chaosi_judge[a-z_]*")
    forbid("ssm", sockets); forbid("ssm", "chaos_config_[a-z_]+|chaosi_judge[a-z_]*|chaosi_proxy[a-z_]*|chaosi_worker[a-z_]*")
    forbid("public", sockets)
}

/^#ifdef CHAOS_IMPLEMENTATION$/ { half = "implementation"; section = ""; depth = 0 }
/^@mark / {
    if (!half) half = "public"
    section = $2; seen[half] = seen[half] " " section; statement = ""
    next
}

# Words must stand alone, but p->free( and desc.alloc( count as well.
section && half == "implementation" && (section in deny) {
    rest = $0
    while (match(rest, "(" deny[section] ")")) {
        before = RSTART > 1 ? substr(rest, RSTART - 1, 1) : ""
        word = substr(rest, RSTART, RLENGTH)
        if (before !~ /[A-Za-z0-9_]/) say("must not touch " word)
        rest = substr(rest, RSTART + (RLENGTH > 1 ? RLENGTH : 1))
    }
}

# A function may be declared ahead of its body only within its section (recursion, a printf attribute): else a section
# could use one below it.
half == "implementation" && !/^#/ && !continued {
    n = length($0)
    for (i = 1; i <= n; i++) {
        ch = substr($0, i, 1)
        if (ch == "{") {
            if (!depth && match(statement, /chaosi_[a-z0-9_]+[ ]*\(/)) {
                name = substr(statement, RSTART, RLENGTH - 1)
                if ((name in ahead) && ahead[name] != section) say(name " was declared in >>" ahead[name])
                delete ahead[name]
            }
            depth++; statement = ""
        }
        else if (ch == "}") { if (depth > 0) depth--; if (!depth) statement = "" }
        else if (!depth && ch == ";") {
            if (statement !~ /typedef|=|CHAOS_API/ && match(statement, /chaosi_[a-z0-9_]+[ ]*\(/)) {
                name = substr(statement, RSTART, RLENGTH - 1)
                if (!(name in ahead)) ahead[name] = section
            }
            statement = ""
        }
        else if (!depth) statement = statement ch
    }
    if (!depth) statement = statement " "
}
{ continued = /\\$/ && (/^#/ || continued) }

END {
    section = "marks"
    for (name in ahead) say(name " is declared but has no body")
    for (h in order) if (seen[h] != order[h]) say("sections of the " h " half are" seen[h] ", should be" order[h])
    exit bad
}'

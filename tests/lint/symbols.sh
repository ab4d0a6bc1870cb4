#!/bin/sh
# symbols.sh - what an object with the implementation shows to the linker, and what the header leaves in the preprocessor.
# Prints one line per offence. CC is the compiler (cc).
set -u
here=$(cd "$(dirname "$0")" && pwd) || exit 1
header=$here/../../chaos.h
cc=${CC:-cc}
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
cd "$dir" || exit 1
cp "$header" . || exit 1
printf '#define CHAOS_IMPLEMENTATION\n#include "chaos.h"\n' >one.c
bad=0
say() { echo "$*"; bad=1; }

# object NAME FLAGS...: one symbol a line, "TYPE NAME".
object() {
    out=$1; shift
    "$cc" -std=c99 -O0 -fno-pic "$@" -c -o "$out.o" one.c || { say "does not compile: $*"; return; }
    nm "$out.o" | awk '{ print $(NF - 1), $NF }' | sed 's/ \.L.*//' >"$out"
}

object all
grep -q '^T chaos_open$' all || say "chaos_open is not there"
awk '$1 ~ /^[ABCDGRSTVW]$/ && $2 !~ /^chaos_/ { print "exported without the prefix: " $2 }' all >offence
# (NAME.123 is a local of a function.)
awk '$1 ~ /^[abdgrst]$/ && $2 !~ /^(chaosi_|\.)|\.[0-9]+$/ { print "private without the prefix: " $2 }' all >>offence
awk '$1 ~ /^[bBCdDgG]$/ { print "a mutable global: " $2 }' all >>offence
object static -DCHAOS_STATIC
awk '$1 ~ /^[A-TV-Z]$/ { print "exported in static mode: " $2 }' static >>offence
object no_net -DCHAOS_NO_NET
awk '$1 == "U" && $2 ~ /^(socket|socketpair|bind|listen|accept4?|connect|send|sendmsg|recv|recvmsg|getaddrinfo|setsockopt)$/ { print "with CHAOS_NO_NET: " $2 }' no_net >>offence
object no_threads -DCHAOS_NO_THREADS
awk '$1 == "U" && $2 ~ /^pthread_(create|join|mutex|cond)/ { print "with CHAOS_NO_THREADS: " $2 }' no_threads >>offence
object compiled_out -DCHAOS_COMPILE_OUT
awk '$1 ~ /^[A-TV-Z]$/ && $2 ~ /^chaos_(open|decide|proxy_run)$/ { print "with CHAOS_COMPILE_OUT: " $2 }' compiled_out >>offence
# A library leaves signals, the environment and the process alone; but for the trace id, which a Lambda runtime must set.
awk '$1 == "U" && $2 ~ /^(signal|sigaction|exit|_exit|abort|system|popen|printf|puts)$/ { print "calls " $2 }' all >>offence

# The public half may leave CHAOS_ macros only.
printf '#include <stddef.h>\n#include <stdbool.h>\n' >empty.c
printf '#include "chaos.h"\n' >plain.c
for std in c99 gnu11; do
    "$cc" -std=$std -dM -E empty.c | sort >before
    "$cc" -std=$std -dM -E plain.c | sort >after
    comm -13 before after | awk -v std=$std '$2 !~ /^CHAOS_/ { print "macro left by the public half (" std "): " $2 }' >>offence
    grep -q '^#define CHAOS_VERSION ' after || say "the macro check sees nothing"
done
# All others it defines are CHAOSI_, or ask the system for something.
awk '/^[ \t]*#[ \t]*define[ \t]/ { sub(/^[ \t]*#[ \t]*define[ \t]+/, ""); match($0, /^[A-Za-z0-9_]+/); print substr($0, 1, RLENGTH) }' chaos.h |
    sort -u | grep -vE '^CHAOSI?_|^(_POSIX_C_SOURCE|_DARWIN_C_SOURCE|WIN32_LEAN_AND_MEAN|_WIN32_WINNT)$' | sed 's/^/macro without the prefix: /' >>offence

if [ -s offence ]; then cat offence; bad=1; fi
exit $bad

#!/bin/sh
# options.sh - every name a user can set is written down where it is promised, and the other way round: the switches of
# chaos.h, the environment variables it reads, the flags of chaos-proxy and their tables in README.md. One line per offence.
set -u
here=$(cd "$(dirname "$0")" && pwd) || exit 1
top=$here/../..
header=$top/chaos.h
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
bad=0

# same WHAT FILE WHAT FILE: two sorted lists must agree.
same() {
    if [ ! -s "$2" ]; then echo "no $1 found: this check sees nothing"; bad=1; fi
    comm -23 "$2" "$4" | sed "s/^/$1, but not $3: /" >"$dir/diff"
    comm -13 "$2" "$4" | sed "s/^/$3, but not $1: /" >>"$dir/diff"
    if [ -s "$dir/diff" ]; then cat "$dir/diff"; bad=1; fi
}

# Switches: what #if asks for, against the comment of the section >>options.
awk -f "$here/strip.awk" "$header" | grep -E '^[[:space:]]*#[[:space:]]*(el)?if' | grep -oE 'CHAOS_[A-Z_]+' |
    grep -vxE 'CHAOS_H|CHAOS_IMPLEMENTATION|CHAOS_IMPLEMENTATION_ONCE' | sort -u >"$dir/used"
awk '/>>options/ { on = 1 } on && /^\/\* Set these/ { text = 1 } text { print } text && /\*\// { exit }' "$header" >"$dir/text"
grep -oE 'CHAOS_(STATIC|NO_[A-Z]+|WITH_[A-Z]+|COMPILE_OUT|[A-Z]+_MAX)' "$dir/text" | sort -u >"$dir/documented"
# A switch for something that is not there yet is written down as such, and not asked for.
grep -oE 'CHAOS_[A-Z_]+ +[^(]*\(not in this version\)' "$dir/text" | grep -oE '^CHAOS_[A-Z_]+' | sort -u >"$dir/later"
sort -u "$dir/used" "$dir/later" >"$dir/known"
same "switch in the code" "$dir/known" "switch in the comment" "$dir/documented"

# Environment variables of the library: in the manual.
grep -oE '(getenv|chaosi_env)\("[A-Z_]+"' "$header" | grep -oE '[A-Z_]{4,}' | sort -u >"$dir/env"
awk '/^#ifdef CHAOS_IMPLEMENTATION$/ { exit } { print }' "$header" >"$dir/public"
while read -r name; do
    case $name in AWS_CONTAINER_*) name=_${name##*_} ;; esac # written there by their ends
    grep -q "$name" "$dir/public" || { echo "environment variable not in the manual: $name"; bad=1; }
done <"$dir/env"

# Flags: --help against README.md. (That the parser takes what --help says is tests/peers/cli.py's job: one table makes both.)
proxy=$top/build/chaos-proxy
if [ -x "$proxy" ]; then
    "$proxy" --help | grep -oE '^ +--[a-z-]+' | tr -d ' ' | sort -u >"$dir/help"
    "$proxy" --help | grep -oE '^ +--.*' | grep -oE 'CHAOS_[A-Z_]+' | sort -u >"$dir/vars"
    if [ -f "$top/README.md" ]; then
        grep -E '^\|' "$top/README.md" | grep -oE '^\| *`--[a-z-]+' | tr -d '|` ' | sort -u >"$dir/readme"
        same "flag in --help" "$dir/help" "flag in a table of README.md" "$dir/readme"
    fi
else
    echo "build/chaos-proxy is not there: run make first"
    bad=1
fi

# chaos-ssm: every command and flag of its --help stands somewhere in README.md.
ssm=$top/build/chaos-ssm
if [ -x "$ssm" ]; then
    "$ssm" --help | grep -oE '^ +(--)?[a-z-]+ ' | tr -d ' ' | sort -u >"$dir/help"
    grep -qx -e --endpoint-url "$dir/help" || { echo "chaos-ssm --help: this check sees nothing"; bad=1; }
    while read -r word; do
        case $word in chaos-ssm | --help | --version) continue ;; esac
        grep -qE -e "\`[^\`]*$word" "$top/README.md" || { echo "chaos-ssm: README.md does not show $word"; bad=1; }
    done <"$dir/help"
else
    echo "build/chaos-ssm is not there: run make first"
    bad=1
fi

# Config keys: those the manual names, against those of README.md's tables.
if [ -f "$top/README.md" ]; then
    for key in enabled latency latencyRate errorRate errorStatus errorMode errorWhen errorBody retryAfter bandwidth match exclude \
        events canary instances expiresAt maxFaults maxConcurrent seed dryRun name owner note rules; do
        grep -qE "^\\|.*\`$key\`" "$top/README.md" || { echo "config key not in a table of README.md: $key"; bad=1; }
        grep -qw "$key" "$dir/public" || { echo "config key not in the manual: $key"; bad=1; }
    done
fi
exit $bad

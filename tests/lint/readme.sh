#!/bin/sh
# readme.sh - README.md and the manual keep their word: C compiles, links lead somewhere, names and make targets exist. One
# line per offence. A ```c block with a main is compiled and linked, and run when the line above it is <!-- run -->; a block
# without one must compile behind #include "chaos.h", as it stands or inside a function.
set -u
here=$(cd "$(dirname "$0")" && pwd) || exit 1
top=$(cd "$here/../.." && pwd) || exit 1
[ -f "$top/README.md" ] || { echo "README.md is not there"; exit 1; }
cc=${CC:-cc}
warn='-std=c99 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wundef -Werror'
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
cp "$top/chaos.h" "$dir" && cd "$dir" || exit 1
bad=0
say() { echo "$*"; bad=1; }

# Blocks become N.c, those to be run N.run, and N.at says on which line they stand.
awk '
/^```c$/ { n++; on = 1; print NR > (n ".at"); if (before ~ /<!-- run -->/) print "" > (n ".run"); next }
/^```/ { on = 0 }
on { print > (n ".c") }
{ before = $0 }' "$top/README.md"

for at in *.at; do
    [ -f "$at" ] || { say "README.md has no \`\`\`c block"; break; }
    n=${at%.at} line=$(cat "$at")
    # shellcheck disable=SC2086  # a list of flags
    if grep -qE '(^|[^a-z_])main\(' "$n.c"; then
        "$cc" $warn -o "$n.bin" "$n.c" -pthread 2>err || { say "README.md:$line does not compile:"; cat err; continue; }
        [ ! -f "$n.run" ] || timeout 10 "./$n.bin" </dev/null >out 2>&1 || { say "README.md:$line does not run:"; cat out; }
    else
        { echo '#include "chaos.h"'; cat "$n.c"; } >file.c
        { echo '#include "chaos.h"'; echo 'void snippet(void);'; echo 'void snippet(void) {'; cat "$n.c"; echo '}'; } >body.c
        "$cc" $warn -fsyntax-only file.c 2>err || "$cc" $warn -Wno-unused -fsyntax-only body.c 2>>err || { say "README.md:$line does not compile:"; cat err; }
    fi
done

# The names in the manual (the first comment of chaos.h) are those of the declarations below it.
awk '{ print } /\*\// { exit }' chaos.h | grep -oE '\<(chaos|CHAOS)_[A-Za-z_]*[A-Za-z]' | sort -u >names
grep -q chaos_decide names || say "no names found in the manual: this check sees nothing"
awk 'on { print } /\*\// { on = 1 }' chaos.h >rest
while read -r name; do grep -qE "(^|[^A-Za-z_])$name" rest || say "the manual names $name, which is not there"; done <names

# Links to files of the repository; those to the web are not asked for: tests need no network.
grep -oE '\]\([^)]+\)' "$top/README.md" | sed 's/^](//; s/)$//; s/#.*//' | grep -vE '^(https?:|mailto:|$)' | sort -u >links
while read -r link; do [ -e "$top/$link" ] || say "README.md links to $link, which is not there"; done <links
grep -oE '\]\(#[^)]+\)' "$top/README.md" | sed 's/^](#//; s/)$//' | sort -u >anchors
grep -E '^#+ ' "$top/README.md" | sed 's/^#* //' | tr '[:upper:]' '[:lower:]' | sed 's/[^a-z0-9 _-]//g; s/ /-/g' >headings
while read -r anchor; do grep -qxF "$anchor" headings || say "README.md links to #$anchor, no such heading"; done <anchors

grep -oE '(^|[`$ ])make [a-z]+' "$top/README.md" | grep -oE '[a-z]+$' | sort -u >targets
while read -r target; do
    grep -qE "^\.PHONY:.* $target( |\$)" "$top/Makefile" || case $target in sure | it | the | a | them) ;; *) say "README.md says make $target, no such target" ;; esac
done <targets
exit $bad

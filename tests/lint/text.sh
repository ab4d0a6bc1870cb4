#!/bin/sh
# text.sh - plain habits of every file of the repository: no tabs, no trailing blanks, no machine's own paths, nothing left
# to do, the header's size. One line per offence.
set -u
top=$(cd "$(dirname "$0")/../.." && pwd) && cd "$top" || exit 1
bad=0
say() { echo "$*"; bad=1; }

dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
if git rev-parse --git-dir >/dev/null 2>&1; then git ls-files -co --exclude-standard; else find . -type f ! -path './build/*' ! -path './.git/*' | sed 's|^\./||'; fi |
    while read -r f; do if [ -f "$f" ]; then echo "$f"; fi; done >"$dir/all"

# Test inputs are bytes, not text: they may hold anything.
files=$dir/files
grep -vE '^tests/(vectors|fuzz/(seeds|corpus))/' "$dir/all" >"$files"
grep -q '^chaos.h$' "$files" || say "this check sees no files"

tab=$(printf '\t')
while read -r f; do
    [ "$f" = Makefile ] || grep -nH "$tab" "$f" | sed 's/:.*//' | uniq -c | awk '{ print $2 ": " $1 " lines with tabs" }'
    case $f in *.md) ;; *) grep -nHE '[[:blank:]]+$' "$f" | cut -d: -f1,2 | sed 's/$/: trailing blanks/' ;; esac
    grep -nHE '/(root|home/[a-z]+)/|(^|[^A-Za-z0-9_])(T[O]DO|F[I]XME|X[X]X)([^A-Za-z0-9_]|$)' "$f" | sed 's/^/look at: /'
    [ -z "$(tail -c 1 "$f")" ] || echo "$f: no newline at its end"
    if LC_ALL=C grep -q "$(printf '\r')\$" "$f"; then echo "$f: DOS line ends"; fi
done <"$files" >"$dir/found"
if [ -s "$dir/found" ]; then cat "$dir/found"; bad=1; fi

cut -d/ -f1 "$dir/all" | grep -v '^\.' | sort -u | grep -vxE 'chaos\.h|examples|tests|Makefile|README\.md|LICENSE' | sed 's/^/top level: /' | grep . && bad=1

lines=$(wc -l <chaos.h)
manual=$(awk '/^\*\// { print NR; exit } /\*\/$/ { print NR; exit }' chaos.h)
[ "$lines" -le 6750 ] || say "chaos.h has $lines lines, 6750 at most"
[ "$manual" -le 600 ] || say "the manual has $manual lines, 600 at most"
awk '/^[a-zA-Z].*\)[ \t]*(\{)?$/ { start = NR } /^}/ { if (start && NR - start > 80) print "chaos.h:" start ": a function of " NR - start " lines"; start = 0 }' chaos.h | grep . && bad=1
exit $bad

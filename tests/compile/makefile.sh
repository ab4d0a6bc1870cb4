#!/bin/sh
# makefile.sh - the Makefile's promises, in a copy of the repository: whose flags are whose, what is rebuilt, install. Run by
# .ci/run, not by make test.
# shellcheck disable=SC2016,SC2034  # the commands are expanded by eval, in check
set -u
top=$(cd "$(dirname "$0")/../.." && pwd) || exit 1
dir=$(mktemp -d) || exit 1
trap 'rm -rf "$dir"' EXIT
mkdir "$dir/copy" && cp -R "$top/chaos.h" "$top/Makefile" "$top/examples" "$dir/copy" && cd "$dir/copy" || exit 1
touch ../start
unset MAKEFLAGS MFLAGS MAKELEVEL
make=${MAKE:-make}
passed=0 failed=0 skipped=0

# check NAME COMMAND: passes when the shell command does.
check() {
    if (eval "$2") >"$dir/out" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $1"
        head -n 20 "$dir/out" | sed 's/^/     /'
    fi
}

check "all is the default, and builds with two jobs" '$make -j2 CFLAGS=-O0 && [ -x build/chaos-proxy ] && [ -x build/chaos-upstream ] && [ -x build/chaos-middleware ]'
check "nothing is built twice" '$make | grep -qi "nothing to be done"'
check "a changed header rebuilds" 'sleep 0.01; touch chaos.h; $make -n | grep -c "proxy.c" | grep -qx 1'
check "the user s flags come last, ours stay" \
    '$make -n -B CC=other CFLAGS=-O3 CPPFLAGS=-DX=1 LDFLAGS=-Lfoo LDLIBS=-lbar | grep -E "^other .*-std=c99 .*-Wconversion.*-pthread.* -DX=1 -O3 .*proxy\.c -Lfoo -lbar"'
check "CFLAGS may come from the environment" 'CFLAGS=-O1 $make -n -B | grep -q " -O1 "'
check "a command of two words is a compiler" '$make -n -B CC="ccache cc" static all | grep -q "^ccache cc -std=c99"'
check "install and uninstall" '
    $make install DESTDIR="$dir/dest" PREFIX=/opt/x &&
    cmp chaos.h "$dir/dest/opt/x/include/chaos.h" && "$dir/dest/opt/x/bin/chaos-proxy" --version &&
    grep -x "prefix=/opt/x" "$dir/dest/opt/x/lib/pkgconfig/chaos.pc" &&
    grep -x "Version: $(build/chaos-proxy --version | sed -n "1s/chaos-proxy //p")" "$dir/dest/opt/x/lib/pkgconfig/chaos.pc" &&
    $make uninstall DESTDIR="$dir/dest" PREFIX=/opt/x && [ -z "$(find "$dir/dest" -type f)" ]'
check "lambda and layer say what to install" '
    ! $make lambda cc_x86_64= && $make layer cc_x86_64= 2>&1 | grep -q "install musl-tools" &&
    $make layer build/layer/chaos-layer-arm64.zip cc_arm64= 2>&1 | grep -q "install gcc-aarch64-linux-gnu"'
if [ "${CHAOS_CI-}" = 1 ]; then
    check "lambda and layer: static programs, executable in their zips" '
        $make -j2 lambda layer && ! (ldd build/lambda/x86_64/bootstrap build/layer/x86_64/chaos-layer | grep "=>") &&
        for zip in build/lambda/*.zip build/layer/*.zip; do
            python3 -c "import sys, zipfile; i, = zipfile.ZipFile(sys.argv[1]).infolist(); assert i.external_attr >> 16 & 0o111, i" $zip || exit 1
        done'
fi
check "help names every target" '$make help >../help; for t in $(sed -n "s/^\.PHONY: all \(.*\) help$/\1/p" Makefile); do grep -w "$t" ../help || { echo "not: $t"; exit 1; }; done'
check "output stands in build/ only" '[ -z "$(find . -newer ../start -type f ! -path "./build/*" ! -name chaos.h)" ]'
check "clean" '$make clean && [ ! -e build ]'
if command -v clang >/dev/null; then
    check "clang -O3 -Werror" '$make -j2 CC=clang CFLAGS="-O3 -Werror"'
elif [ "${CHAOS_CI-}" = 1 ]; then
    failed=$((failed + 1)); echo "FAIL clang is not installed"
else
    skipped=$((skipped + 1)); echo "skip clang: not installed"
fi
check "static programs need no library" '$make -j2 static CFLAGS=-O0 && build/static/chaos-proxy --version && ! (ldd build/static/chaos-proxy | grep "=>")'

printf '%d passed, %d failed' $passed $failed
if [ $skipped -gt 0 ]; then printf ', %d skipped' $skipped; fi
echo
[ $failed -eq 0 ]

# chaos-proxy in front of a service on this instance: what start and stop share. SSM puts the parameters in.
set -eu
PATH=$PATH:/usr/sbin:/sbin HOME=${HOME:-/root}
export PATH HOME
engine='{{ Engine }}'
admin='127.0.0.1:{{ AdminPort }}'
container=chaos-proxy
chain=CHAOS_PROXY
state=/run/chaos-proxy

say() { echo "chaos: $*"; }
die() {
    echo "chaos: $*" >&2
    exit 1
}
nat() { iptables -w 10 -t nat "$@"; }
input() { iptables -w 10 "$@"; }
ask() { curl --noproxy 127.0.0.1 "$@"; } # over loopback, also where the SSM agent has an http_proxy
healthy() { ask -fs -m 1 -o /dev/null "http://$admin/healthz"; }
# shellcheck disable=SC2120
# running [FILTER..]: is there a running container, also with these settings?
running() { [ -n "$("$engine" ps -q --filter "name=^$container\$" "$@")" ]; }

# Out is out, whichever port it was for; may be said twice. Only the jump goes: the chain's rule keeps the kernel tracking
# connections, and those in the proxy live by that (where it is the last rule that needs tracking, they would be reset).
route_out() {
    while rule=$(nat -S PREROUTING | grep -m 1 -e "-j $chain\$"); do
        # shellcheck disable=SC2086 # the words of a rule
        nat -D ${rule#-A } || return 1
    done
    nat -S PREROUTING >/dev/null # or there is nothing found because nothing can be asked
}
# After the proxy has ended.
drop_chain() {
    while input -D INPUT -j "$chain" 2>/dev/null; do :; done
    if input -S "$chain" >/dev/null 2>&1; then input -F "$chain" && input -X "$chain" || return 1; fi
    if nat -S "$chain" >/dev/null 2>&1; then nat -F "$chain" && nat -X "$chain"; fi
}

needs() {
    for tool in "$@"; do command -v "$tool" >/dev/null || die "not installed: $tool"; done
}

[ "$(id -u)" = 0 ] || die "needs root"
needs iptables
mkdir -p "$state"

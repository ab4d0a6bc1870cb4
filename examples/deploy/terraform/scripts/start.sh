
# Start: 1 container, 2 healthy, 3 the service answers through it, 4 guard, 5 route in. A failure undoes all of it.
image='{{ Image }}'
parameter='{{ Parameter }}'
region='{{ Region }}'
port='{{ ServicePort }}'
proxy='{{ ProxyPort }}'
log_group='{{ LogGroup }}'
minutes='{{ Minutes }}'
instance=${AWS_SSM_INSTANCE_ID:-$(uname -n)}

uptime_seconds() { # a clock that nobody sets
    read -r up rest </proc/uptime
    echo "${up%.*}"
}
listening() { # on the proxy's port, IPv4
    grep -qiE "^ *[0-9]+: [0-9A-F]+:$(printf %04X "$proxy") 00000000:0000 0A " /proc/net/tcp
}

# Beside the route, as long as its ticket is the one in force: a proxy that is gone must not take the service with it.
guard() { # TICKET END
    fails=0
    while [ "$(cat "$state/ticket" 2>/dev/null)" = "$1" ]; do
        why=
        if healthy; then fails=0; else fails=$((fails + 1)); fi
        [ "$fails" -lt 2 ] || why="the proxy is not well"
        listening || why="the proxy is gone"
        [ "$(uptime_seconds)" -lt "$2" ] || why="its time is over"
        if [ -n "$why" ] && route_out; then
            rm -f "$state/ticket"
            say "$why: the route is out"
            logger -t chaos-proxy "$why: the route is out" 2>/dev/null || true
            return
        fi
        sleep 1
    done
}
if [ "${1-}" = guard ]; then
    guard "$2" "$3"
    exit
fi

needs "$engine" curl flock setsid
exec 9>"$state/lock"
flock -w 60 9 || die "another start or stop is at work"
started='' done=''
undo() {
    [ -z "$done" ] || return 0
    [ -n "$started" ] || return 0
    rm -f "$state/ticket"
    route_out && "$engine" rm -f "$container" >/dev/null && drop_chain
    echo "chaos: nothing is changed" >&2
}
trap undo EXIT
trap 'exit 1' TERM INT HUP

# 1. The container, on the host's network: loopback to the service, and to the credentials in one hop.
settings="$image $parameter $region $port $proxy $admin"
if running --filter "label=chaos.settings=$settings"; then
    say "container: runs already"
elif running; then
    die "container: runs with other settings; send the stop document first"
else
    case $image in
    *.dkr.ecr.*/*)
        registry=${image%%/*}
        aws ecr get-login-password --region "$region" | "$engine" login --username AWS --password-stdin "$registry" >/dev/null ||
            die "container: no login to $registry"
        ;;
    esac
    "$engine" rm -f "$container" >/dev/null 2>&1 || true # one that has ended
    set --
    [ -z "$log_group" ] || [ "$engine" != docker ] || # podman has no such driver
        set -- --log-driver awslogs --log-opt "awslogs-region=$region" --log-opt "awslogs-group=$log_group" \
            --log-opt "awslogs-stream=$instance"
    started=1
    "$engine" run -d --name "$container" --label "chaos.settings=$settings" --network host --read-only --cap-drop ALL \
        --security-opt no-new-privileges "$@" "$image" --listen "0.0.0.0:$proxy" --upstream "http://127.0.0.1:$port" \
        --config "ssm:$parameter?region=$region" --admin "$admin" --instance "$instance" --idle-timeout 75s >/dev/null 9>&- ||
        die "container: does not start"
    say "container: started"
fi

# 2. Healthy.
tries=0
until healthy && listening; do
    tries=$((tries + 1))
    if [ "$tries" -ge 30 ] || ! running; then
        "$engine" logs "$container" 2>&1 | tail -n 5 >&2
        die "proxy: not healthy"
    fi
    sleep 0.5
done
say "proxy: healthy"

# 3. The service answers through it. /health is spared by every default config.
head=$(ask -sS -m 10 -o /dev/null -D - "http://127.0.0.1:$proxy/health") || die "service: no answer through the proxy"
! echo "$head" | grep -qi '^proxy-status: chaos' || die "service: the proxy cannot reach it on port $port"
say "service: answers through the proxy"

# 4. The guard, before there is anything to guard.
ticket="$$ $(uptime_seconds)"
echo "$ticket" >"$state/ticket.new"
mv "$state/ticket.new" "$state/ticket"
cp "$0" "$state/script"
setsid sh "$state/script" guard "$ticket" $(($(uptime_seconds) + minutes * 60)) </dev/null >>"$state/guard.log" 2>&1 9>&- &

# 5. The route in. Behind it the port is the proxy's, which the host's own filter may not let in: what was redirected may pass, and
# nobody else.
input -N "$chain" 2>/dev/null || true
set -- "$chain" -p tcp --dport "$proxy" -m conntrack --ctstate DNAT -j ACCEPT
input -C "$@" 2>/dev/null || { input -F "$chain" && input -A "$@"; }
input -C INPUT -j "$chain" 2>/dev/null || input -I INPUT -j "$chain"
# Then in one step: the chain first, then the jump to it. Only for a connection's first packet: one that is older than
# the kernel's own tracking of connections would be torn otherwise.
nat -N "$chain" 2>/dev/null || true
set -- "$chain" -p tcp -j REDIRECT --to-ports "$proxy"
nat -C "$@" 2>/dev/null || { nat -F "$chain" && nat -A "$@"; }
set -- PREROUTING -p tcp --dport "$port" --syn -m addrtype --dst-type LOCAL -j "$chain"
nat -C "$@" 2>/dev/null || nat -I "$@"
done=1
say "route: in, port $port goes through the proxy for $minutes min"
ask -fs -m 2 "http://$admin/config" || true
echo

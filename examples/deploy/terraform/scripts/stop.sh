
# Stop: 1 route out, 2 faults off, 3 drain, 4 container. The first needs nothing but the kernel, and waits for nobody.
drain='{{ DrainSeconds }}'

connections() { # open in the proxy; nothing when it does not say
    ask -fs -m 2 "http://$admin/metrics" | sed -n 's/^chaos_connections_open \([0-9]*\).*/\1/p'
}

# 1. New connections go to the service itself again.
route_out || die "route: cannot be taken out; the proxy goes on. See iptables -t nat -S PREROUTING"
needs flock
exec 9>"$state/lock"
if ! flock -n 9; then # a start is at work, and may be about to put it in
    flock -w 120 9 || true
    route_out || die "route: cannot be taken out; the proxy goes on. See iptables -t nat -S PREROUTING"
fi
rm -f "$state/ticket" # the guard ends
say "route: out"

needs "$engine" curl
"$engine" ps -q >/dev/null || die "container: $engine does not answer; the route is out"
if ! running; then
    "$engine" rm -f "$container" >/dev/null 2>&1 || true
    drop_chain
    say "container: none runs"
    exit 0
fi

# 2. What is in the proxy is served without faults; injected delays end now.
"$engine" kill --signal USR1 "$container" >/dev/null || say "faults: the proxy takes no signal"

# 3. Connections end where they began.
left=$drain
while open=$(connections) && [ "${open:-0}" -gt 0 ] && [ "$left" -gt 0 ]; do
    sleep 1
    left=$((left - 1))
done
say "drain: ${open:-?} connections left"

# 4. SIGTERM: requests in progress are answered, with Connection: close; 10 s for that.
"$engine" stop -t 15 "$container" >/dev/null || die "container: does not stop; the route is out"
"$engine" rm -f "$container" >/dev/null
drop_chain
say "container: stopped"

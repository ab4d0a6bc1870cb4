# judge.jq - what an experiment has shown, from its logs
#
#   jq -R 'fromjson? | objects' client.log app.log canary.log | jq -s -r --slurpfile plan errors.json -f judge.jq
#
# (The first jq leaves out what is no JSON: a container's log also has what chaos-proxy says on stdout.)
# The logs, in any order, one JSON object a line: "source":"client" (time status ms, for each request as its sender saw it),
# "app" (time ms calls injected, for each request of the service under test: its calls to the dependency, and those whose
# replies were marked X-Chaos-Injected), "chaos" (the log of one canary instance of chaos-proxy: when which version of the
# parameter was in force). Where there are no such logs, as on AWS, lines with numbers from elsewhere do it:
#   {"source":"sum","step":"baseline","requests":6000,"ok_percent":99.9,"p95_ms":31,"calls":6000,"calls_per_s":10}
#   {"source":"sum","step":"judged","requests":6100,"ok_percent":99.8,"p95_ms":48,"calls":6420,"calls_per_s":10.7,"injected":322}
#   {"source":"sum","step":"after","requests":600,"ok_percent":99.9,"p95_ms":30,"calls":600,"calls_per_s":10,"injected":0}
#
# SETTLE and POINT in the environment stand for the plan's "settle" (left out at the start of each step) and "point".
# Exit code: 0 holds, 10 broken, 11 inconclusive, 12 stop now: the abort rule is hit; 5 the plan or a log is unusable.

def ms: (.[0:19] + "Z" | fromdateiso8601) * 1000 + (.[20:23] | tonumber);
def duration: capture("^(?<n>[0-9]+)(?<unit>ms|s|m|h)$") // error("'\(.)' is no time: write 90s or 2m")
  | (.n | tonumber) * {ms: 1, s: 1000, m: 60000, h: 3600000}[.unit];
def quantile($q): if length == 0 then null else sort | .[[(length * $q | ceil) - 1, 0] | max] end;
def percent($of): if $of > 0 then 100 * . / $of else null end;
def short: if type == "number" then . * 100 | round / 100 | tostring else . // "-" | tostring end;
def pad($n): short | . + " " * ([$n - length, 1] | max);
def met($check; $row): $row[$check[0]] as $seen | $check[2] as $want
  | if $seen == null then false
    elif $check[1] == "<" then $seen < $want elif $check[1] == ">" then $seen > $want
    elif $check[1] == ">=" then $seen >= $want elif $check[1] == "<=" then $seen <= $want
    else error("\($check[1]) is none of < > <= >=") end;
def told($check; $row): "\($check[0]) \($row[$check[0]] | short), wanted \($check[1]) \($check[2])";

# What was seen of these requests, in [$from, $to].
def row_of($from; $to): map(select(.source == "client")) as $client | map(select(.source == "app")) as $app
  | ($client | map(select(.status >= 200 and .status < 500)) | length) as $ok
  | ($app | map(.calls) | add // 0) as $calls | ($app | map(.injected) | add // 0) as $injected
  | {requests: ($client | length), ok_percent: ($ok | percent($client | length)),
     failed_percent: (($client | length) - $ok | percent($client | length)),
     p50_ms: ($client | map(.ms) | quantile(0.5)), p95_ms: ($client | map(.ms) | quantile(0.95)), p99_ms: ($client | map(.ms) | quantile(0.99)),
     calls: $calls, calls_per_s: (if $to > $from then 1000 * $calls / ($to - $from) else 0 end), injected: $injected};

# Of those that began and ended there.
def row($from; $to): map(select(.at >= $from and .at + .ms <= $to)) | row_of($from; $to);

# Of those that began there: one that takes longer than a point counts, too, once its step has its end.
def point($from; $length; $to): map(select(.at >= $from and .at < $from + $length and .at + .ms <= $to)) | row_of($from; $from + $length);

# Steps: from one change of version or state of the canary to the next.
def steps($settle; $point): map(select(.time) | .at = (.time | ms)) | map(select(.source != "chaos")) as $seen
  | ($seen | map(.at) | min) as $first | (map(.at + (.ms // 0)) | max) as $last
  | (map(select(.source == "chaos" and .state == "on"))[0].instance) as $canary
  | map(select(.source == "chaos" and (.action == "open" or .action == "config" or .action == "state") and ($canary == null or .instance == $canary)))
  | sort_by(.at)
  | reduce .[] as $l ([]; if length > 0 and .[-1].state == $l.state and ($l.state != "on" or .[-1].version == $l.config_version) then .
                          else . + [{version: $l.config_version, state: $l.state, from: $l.at}] end)
  | [range(length) as $i | .[$i] + {to: (.[$i + 1].from // $last)}]
  | map(([.from, $first] | max + $settle) as $from | .to as $to | . + ($seen | row($from; $to))
      + {points: (if .state == "on" then [range($from; $to - $point + 1; $point) as $p | $seen | point($p; $point; $to)] else [] end)});

def given: map(.state = if .step == "judged" then "on" else "off" end | .points = []
  | .failed_percent = if .ok_percent then 100 - .ok_percent else null end);

# The abort rule: in how many of how many points that follow each other.
def aborts($plan): . as $points | $plan.abort_points as [$hits, $of]
  | any($plan.abort[]; . as $check
      | any(range($points | length); ([$points[.:. + $of][] | select(met($check; .))] | length) >= $hits));

def band($plan; $calls): $plan.injected_percent as $p
  | ([300 * ($p / 100 * (1 - $p / 100) / $calls | sqrt), 1] | max) as $half | [([$p - $half, 0] | max), ([$p + $half, 100] | min)];

def verdict($plan; $steps):
  ($steps | map(.state == "on") | rindex(true)) as $i
  | if $i == null then {code: 11, why: ["nothing was on"]} else
    ($steps[:$i] | map(select(.state != "on" and .requests > 0))[-1]) as $base
    | ($steps[$i] | .injected_percent = (.injected | percent($steps[$i].calls))
        | .calls_fall_percent = (if ($base.calls_per_s // 0) > 0 then 100 * (1 - .calls_per_s / $base.calls_per_s) else null end)) as $on
    | ($steps[$i + 1:][-1] | if . then .calls_fall_percent = (if ($base.calls_per_s // 0) > 0 then 100 * (1 - .calls_per_s / $base.calls_per_s) else null end)
        else null end) as $after
    | band($plan; [$on.calls, 1] | max) as [$low, $high]
    | any($steps[]; .points | aborts($plan)) as $abort
    | [if $base == null then "no baseline" else $plan.after[] | select(.[0] != "calls_fall_percent" and (met(.; $base) | not)) | "before it began: " + told(.; $base) end,
       if ($abort | not) and $on.requests < $plan.sample.requests then "\($on.requests) requests, \($plan.sample.requests) are needed" else empty end,
       if ($abort | not) and $on.calls < $plan.sample.calls then "\($on.calls) calls, \($plan.sample.calls) are needed" else empty end,
       if $on.calls > 0 and ($on.injected_percent < $low or $on.injected_percent > $high)
         then "\($on.injected_percent | short) % of \($on.calls) calls were injected, not \($low | short) to \($high | short) %" else empty end] as $doubts
    | [if $abort then "the abort rule was hit" else empty end,
       ($plan.success[] | select(met(.; $on) | not) | told(.; $on)),
       if $after == null or $after.requests == 0 then empty else
         (if $after.injected > 0 then "\($after.injected) faults after the end" else empty end),
         ($plan.after[] | select(met(.; $after) | not) | "after the end: " + told(.; $after)) end] as $failures
    | if $abort and $after == null then {code: 12, why: ["abort rule: " + ($plan.abort | map(join(" ")) | join(", "))]}
      elif ($doubts | length) > 0 then {code: 11, why: $doubts}
      elif ($failures | length) > 0 then {code: 10, why: $failures}
      else {code: 0, why: [($plan.success[] | told(.; $on)),
        "\($on.injected_percent | short) % of \($on.calls) calls injected, band \($low | short) to \($high | short) %",
        if $after == null then "so far: it is still on" else "off again and as before" end]} end end;

$plan[0] as $plan
| if ($plan | type) == "object" and ($plan | has("success") and has("abort") and has("abort_points") and has("after") and has("sample") and has("injected_percent"))
  then . else error("the plan lacks one of: success abort abort_points after sample injected_percent") end
| (env.SETTLE // $plan.settle | duration) as $settle | (env.POINT // $plan.point | duration) as $point
| (if any(.[]; .source == "sum") then map(select(.source == "sum")) | given else steps($settle; $point) end) as $steps
| ["step", "state", "requests", "ok %", "p50 ms", "p95 ms", "p99 ms", "calls", "calls/s", "injected"] as $heads
| ($heads | map(pad(9)) | add),
  ($steps[] | [.step // "v\(.version)", .state, .requests, .ok_percent, .p50_ms, .p95_ms, .p99_ms, .calls, .calls_per_s, .injected] | map(pad(9)) | add),
  (verdict($plan; $steps) | ({"0": "holds", "10": "broken", "11": "inconclusive", "12": "STOP NOW"}["\(.code)"] + ": " + (.why | join("; "))),
    if .code == 0 then empty else .code as $code | "" | halt_error($code) end)

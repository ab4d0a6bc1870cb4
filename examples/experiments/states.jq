# states.jq - is it off everywhere? Each instance, its last state, since when, and its last heartbeat (there is one a minute while on)
#
#   jq -R 'fromjson? | objects' LOGS of every instance | jq -s -r -f states.jq
#
# Exit code: 0 off everywhere; 10 an instance is on, or nothing was logged.
map(select(.source == "chaos" and .state)) | group_by(.instance)
| map({instance: .[-1].instance, state: .[-1].state, version: .[-1].config_version, since: (map(select(.action != "heartbeat"))[-1].time),
    reason: .[-1].reason, beat: (map(select(.action == "heartbeat"))[-1].time // "none")})
| (.[] | "\(.instance): \(.state) since \(.since), version \(.version) (\(.reason)); last heartbeat \(.beat)"),
  if length > 0 and all(.[]; .state != "on" and .state != "dry-run") then "off everywhere" else "NOT OFF EVERYWHERE", ("" | halt_error(10)) end

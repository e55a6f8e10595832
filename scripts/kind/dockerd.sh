#!/usr/bin/env bash
# Starts or stops a dockerd of our own, for machines where none runs. It has its own socket, data and runtime folders,
# and no default bridge; "stop" also puts back what dockerd changed in the host's packet filter.
# Usage: scripts/kind/dockerd.sh start|stop   (as root)
# shellcheck source=scripts/kind/lib.sh
. "$(dirname "$0")/lib.sh"

pidfile=$run/docker.pid
data=$cache/docker
before=$run/host-before
cap_sys_resource=24
hook_chains='PREROUTING|INPUT|FORWARD|OUTPUT|POSTROUTING'

running() {
  [ -f "$pidfile" ] && [ "$(cat "/proc/$(cat "$pidfile")/comm" 2>/dev/null)" = dockerd ]
}

# has_capability tells whether root may have a capability here, by its number.
has_capability() {
  local bounding
  bounding=$(awk '$1 == "CapBnd:" { print $2 }' /proc/self/status)
  (((16#$bounding >> $1) & 1))
}

start() {
  [ "$(id -u)" -eq 0 ] || die "no docker answers; start one, or run this as root so that it is started here"
  scripts/deps.sh kind
  mkdir -p "$state" "$run" "$data"
  local options=()
  has_capability "$cap_sys_resource" || options+=(--add-runtime "capped=$root/scripts/kind/runc-capped" --default-runtime capped)
  if [ ! -f "$before" ]; then
    {
      iptables -w 10 -S FORWARD | head -n 1
      echo "ip_forward $(cat /proc/sys/net/ipv4/ip_forward)"
    } >"$before"
  fi
  say "starting dockerd (log: $state/dockerd.log)"
  rm -f "$pidfile"
  setsid dockerd --host "unix://$socket" --data-root "$data" --exec-root "$run/exec" \
    --pidfile "$pidfile" --bridge none "${options[@]}" >"$state/dockerd.log" 2>&1 </dev/null &
  docker_ready() { [ -S "$socket" ] && docker_is_up; }
  wait_until docker_ready || { tail -n 20 "$state/dockerd.log" >&2; die "dockerd does not answer"; }
}

# delete_rules removes from the built-in chains of a table what dockerd added, then its chains.
delete_rules() {
  local table=$1 rule chain
  while read -r rule; do
    # shellcheck disable=SC2086 # a rule is words
    iptables -w 10 -t "$table" -D ${rule#-A }
  done < <(iptables -w 10 -t "$table" -S | grep -E "^-A ($hook_chains) .*(-j DOCKER|-[io] br-[0-9a-f]{12}( |\$))" || true)
  for chain in $(iptables -w 10 -t "$table" -S | awk '$1 == "-N" && $2 ~ /^DOCKER/ { print $2 }'); do
    iptables -w 10 -t "$table" -F "$chain"
  done
  for chain in $(iptables -w 10 -t "$table" -S | awk '$1 == "-N" && $2 ~ /^DOCKER/ { print $2 }'); do
    iptables -w 10 -t "$table" -X "$chain"
  done
}

stop() {
  if running; then
    say "stopping dockerd"
    kill "$(cat "$pidfile")"
    gone() { ! running; }
    wait_until gone || die "dockerd (process $(cat "$pidfile")) does not stop"
  fi
  [ -f "$before" ] || return 0
  delete_rules nat
  delete_rules filter
  iptables -w 10 -P FORWARD "$(awk '$1 == "-P" { print $3 }' "$before")"
  awk '$1 == "ip_forward" { print $2 }' "$before" >/proc/sys/net/ipv4/ip_forward
  rm -rf "$run"
}

case "${1:-}" in
  start) running || start ;;
  stop)  stop ;;
  *)     sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac

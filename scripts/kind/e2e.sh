#!/usr/bin/env bash
# Runs the end-to-end tests: makes a two-node kind cluster without a network, runs pkg/internal/e2e on it, which install Warren
# and test it, and takes the cluster away. Options are environment variables:
#   KEEP=1    keeps the cluster; scripts/kind/down.sh takes it away
#   RUN=...   runs only the tests that match, for example TestWarren/tiers, on the cluster that was kept
#   CHURN=30  so many pods come and go at once, three times (100 takes some minutes more)
#   OLDER=... is the commit from which and to which nodes are upgraded and downgraded
# When a test fails, what the nodes say is in build/e2e-logs/.
export NAME=${NAME:-warren-e2e}
export IP_FAMILY=${IP_FAMILY:-dual}
export CHURN=${CHURN:-30}
OLDER=${OLDER:-373584ef2562868c7a47cc5979c2a3e6c8c05534} # the last one before this that was whole
# shellcheck source=scripts/kind/lib.sh
. "$(dirname "$0")/lib.sh"

logs=$root/build/e2e-logs
kubectl=$tools/kubectl

# collect_logs writes down what the cluster's parts say.
collect_logs() {
  local node pod
  {
    "$kubectl" get nodes,pods --all-namespaces --output wide
    "$kubectl" get events --all-namespaces --sort-by=.metadata.creationTimestamp
  } >"$logs/cluster.log" 2>&1 || true
  for pod in $("$kubectl" --namespace warren-system get pods --output name); do
    {
      "$kubectl" --namespace warren-system describe "$pod"
      "$kubectl" --namespace warren-system logs "$pod" --all-containers --prefix --tail=2000
      "$kubectl" --namespace warren-system logs "$pod" --all-containers --prefix --tail=200 --previous
      "$kubectl" --namespace warren-system exec "$pod" -- warrend status
    } >"$logs/${pod##*/}.log" 2>&1 || true
  done
  for node in "$name-control-plane" "$name-worker"; do
    docker exec "$node" journalctl --no-pager --unit kubelet --unit containerd --lines 500 >"$logs/node-$node-journal.log" 2>&1 || true
    docker exec "$node" sh -c 'ip addr; ip route show table all; ip -6 route; iptables-save -c; ip6tables-save -c; ipset save' \
      >"$logs/node-$node-network.log" 2>&1 || true
  done
}

# show_failure prints what matters most last: what the daemons complained of, and then the tests that failed.
show_failure() {
  local log
  for log in "$logs"/warren-*.log; do
    say "complaints in ${log##*/}"
    grep -E 'level=(WARN|ERROR)|"level":"(WARN|ERROR)"' "$log" | tail -n 10 >&2 || true
  done
  say "the failed tests; everything is in $logs"
  grep -vE '^(=== |ok|PASS|FAIL)|--- PASS' "$logs/test.log" >&2 || true
}

finish() {
  local result=$?
  if [ $result -ne 0 ]; then
    collect_logs || true
    show_failure || true
  fi
  if [ -n "${KEEP:-}${RUN:-}" ]; then
    say "the cluster $name stays: NAME=$name scripts/kind/down.sh takes it away"
  else
    scripts/kind/down.sh
  fi
  exit $result
}

scripts/tools/build.sh kind kubectl suite
scripts/image/older.sh "$OLDER"
rm -rf "$logs"
mkdir -p "$logs"
trap finish EXIT
if [ -z "${RUN:-}" ]; then
  scripts/kind/down.sh
  # Clusters older than 1.36 hold policies with blocks that Warren cannot enforce; such a one is among the tests.
  SKIP_WARREN=1 FEATURE_GATES='{"StrictIPCIDRValidation": false}' scripts/kind/up.sh >/dev/null
fi
docker_is_up || die "no docker answers"
AGNHOST=$(agnhost_image)
export AGNHOST
go test -tags e2e -count=1 -v -timeout 50m ./pkg/internal/e2e -run "${RUN:-TestWarren}" 2>&1 | tee "$logs/test.log"

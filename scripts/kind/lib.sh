# What the scripts of this folder share; to be sourced.
# shellcheck shell=bash disable=SC2034
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

root=$PWD
tools=$root/build/tools
cache=$root/build/cache/kind         # kept: the node image, and the data of our own dockerd
state=$root/build/kind               # of the clusters that run: kubeconfigs, rendered manifests
run=/run/warren-kind                 # of our own dockerd while it runs
socket=$run/docker.sock
image_archive=${IMAGE_ARCHIVE:-$root/build/warren-image.tar}
name=${NAME:-warren}
export KUBECONFIG=$state/$name.kubeconfig

say() { echo "kind: $*" >&2; }
die() { say "$*"; exit 1; }

# docker_is_up tells whether some dockerd answers, and points docker's clients to our own where that one runs.
docker_is_up() {
  if [ -S "$socket" ]; then
    export DOCKER_HOST=unix://$socket
  fi
  command -v docker >/dev/null && timeout 20 docker info >/dev/null 2>&1
}

# kind_cmd runs kind on docker, whatever other runtime it would find.
kind_cmd() { KIND_EXPERIMENTAL_PROVIDER=docker "$tools/kind" "$@"; }

# networks_of IP_FAMILY: the pods' network and the Services'.
networks_of() {
  case "$1" in
    ipv4) echo 10.244.0.0/16 10.96.0.0/16 ;;
    ipv6) echo fd00:10:244::/56 fd00:10:96::/112 ;;
    dual) echo 10.244.0.0/16,fd00:10:244::/56 10.96.0.0/16,fd00:10:96::/112 ;;
    *) die "IP_FAMILY=$1: want ipv4, ipv6 or dual" ;;
  esac
}

# check_encryption gives ENCRYPTION its default and refuses what is not known.
check_encryption() {
  case "${ENCRYPTION:=on}" in on | off) ;; *) die "ENCRYPTION=$ENCRYPTION: want on or off" ;; esac
}

# agnhost_image prints the image of the upstream suite's pods, as the suite names it.
agnhost_image() {
  local kubernetes registry
  kubernetes=$(cd scripts/tools/kubernetes && go list -m -f '{{.Dir}}' k8s.io/kubernetes)
  registry=$(sed -n 's/^.*PromoterE2eRegistry: *"\(.*\)",$/\1/p' "$kubernetes/test/utils/image/manifest.go")
  echo "${registry:?not found in the suite}/agnhost:$(cat "$kubernetes/test/images/agnhost/VERSION")"
}

# wait_until COMMAND... polls a command until it succeeds, half a minute at most.
wait_until() {
  local tries
  for ((tries = 0; tries < 300; tries++)); do
    "$@" >/dev/null 2>&1 && return 0
    sleep 0.1
  done
  return 1
}

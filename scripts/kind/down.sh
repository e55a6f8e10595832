#!/usr/bin/env bash
# Takes away what up.sh made: the cluster (NAME=warren), docker's network of kind where no other cluster uses it, and
# the dockerd that up.sh started, with what that changed on the host. The caches below build/ stay.
# shellcheck source=scripts/kind/lib.sh
. "$(dirname "$0")/lib.sh"

if docker_is_up; then
  scripts/tools/build.sh kind
  kind_cmd delete cluster --name "$name"
  if [ -z "$(docker ps --all --quiet --filter network=kind)" ]; then
    docker network rm kind >/dev/null 2>&1 || true
  fi
fi
rm -rf "${state:?}/$name" "$state/$name.yaml" "$KUBECONFIG"
if [ -d "$run" ]; then
  if [ -n "$(docker ps --all --quiet)" ]; then
    say "other containers run on our dockerd: it is left running"
  else
    scripts/kind/dockerd.sh stop
  fi
fi

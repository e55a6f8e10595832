#!/usr/bin/env bash
# Creates a kind cluster whose network is Warren. Options are environment variables:
#   NAME=warren                  the cluster's name
#   WORKERS=1                    nodes beside the control plane
#   IP_FAMILY=ipv4               ipv4, ipv6 or dual
#   KUBE_PROXY_MODE=iptables     iptables or nftables
#   ENCRYPTION=on                on or off
#   FEATURE_GATES={}             Kubernetes' own switches, for example {"StrictIPCIDRValidation": false}
#   NODE_IMAGE=                  kind's node image; "local" makes one here; unset: kind's own where a registry answers, else local
#   SKIP_WARREN=                 set: leave the cluster without a network
# Docker is started by the script (as root) where none answers; scripts/kind/down.sh takes all of it away again.
[ $# -eq 0 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
# shellcheck source=scripts/kind/lib.sh
. "$(dirname "$0")/lib.sh"

# check_options refuses what kind or Warren would refuse only after minutes.
check_options() {
  : "${IP_FAMILY:=ipv4}"
  networks=$(networks_of "$IP_FAMILY")
  read -r cluster_cidr service_cidr <<<"$networks"
  case "${KUBE_PROXY_MODE:=iptables}" in
    iptables | nftables) ;; *) die "KUBE_PROXY_MODE=$KUBE_PROXY_MODE: want iptables or nftables" ;;
  esac
  check_encryption
  : "${FEATURE_GATES:="{}"}"
  [[ "${WORKERS:=1}" =~ ^[0-9]+$ ]] || die "WORKERS=$WORKERS: want a number"
  [ -n "${SKIP_WARREN:-}" ] || [ -f "$image_archive" ] || die "$image_archive is missing: run make image"
}

# choose_image prints the node image: the one that was asked for, kind's own, or one that is made here.
choose_image() {
  local published
  published=$(published_image)
  if [ "${NODE_IMAGE:-}" = local ]; then
    scripts/kind/node-image.sh
  elif [ -n "${NODE_IMAGE:-}" ]; then
    echo "$NODE_IMAGE"
  elif docker image inspect "$published" >/dev/null 2>&1 || timeout 20 docker manifest inspect "$published" >/dev/null 2>&1; then
    echo "$published"
  else
    say "no registry answers: the node image is made here"
    scripts/kind/node-image.sh
  fi
}

# published_image prints the node image that this release of kind is tested with.
published_image() {
  local source
  source=$(cd scripts/tools/kind && go list -m -f '{{.Dir}}' sigs.k8s.io/kind)
  sed -n 's/^const Image = "\(.*\)"$/\1/p' "$source/pkg/apis/config/defaults/image.go"
}

# kind_config prints the cluster. The kubelet's patch admits hosts that still run cgroup v1.
kind_config() {
  local i
  cat <<END
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
featureGates: $FEATURE_GATES
networking:
  disableDefaultCNI: true
  ipFamily: $IP_FAMILY
  podSubnet: "$cluster_cidr"
  serviceSubnet: "$service_cidr"
  kubeProxyMode: $KUBE_PROXY_MODE
kubeadmConfigPatches:
  - |
    kind: KubeletConfiguration
    failCgroupV1: false
nodes:
  - role: control-plane
END
  for ((i = 0; i < WORKERS; i++)); do echo "  - role: worker"; done
}

check_options
docker_is_up || { scripts/kind/dockerd.sh start && docker_is_up; } || die "no docker answers"
scripts/tools/build.sh kind kubectl
mkdir -p "$state"
if kind_cmd get clusters 2>/dev/null | grep -qx "$name"; then
  die "a cluster named $name is there already: scripts/kind/down.sh takes it away"
fi
node_image=$(choose_image)
say "creating the cluster $name from $node_image"
kind_config >"$state/$name.yaml"
kind_cmd create cluster --name "$name" --image "$node_image" --config "$state/$name.yaml"
[ -n "${SKIP_WARREN:-}" ] || scripts/kind/install.sh

cat <<END

The cluster $name runs. To use it:
  export KUBECONFIG=$KUBECONFIG
  $tools/kubectl get nodes
${DOCKER_HOST:+Its nodes are containers of the dockerd at:
  export DOCKER_HOST=$DOCKER_HOST
}To take it away:
  make kind-down
END

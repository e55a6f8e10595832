#!/usr/bin/env bash
# Installs Warren on a kind cluster that up.sh made without a network (SKIP_WARREN=1), or again after a change. Options are
# the environment variables of up.sh: NAME, IP_FAMILY, ENCRYPTION; and for a version other than that of the checkout, IMAGE_ARCHIVE, the
# TAG of the image in it, and MANIFESTS. UPDATE=OnDelete: each daemon is replaced only when its pod is deleted.
# shellcheck source=scripts/kind/lib.sh
. "$(dirname "$0")/lib.sh"

overlay=$state/$name
: "${MANIFESTS:=$root/manifests}" "${TAG:=dev}" "${UPDATE:=RollingUpdate}"

# lacks_wireguard tells whether the nodes' kernel has no WireGuard of its own.
lacks_wireguard() {
  ! docker exec "$name-control-plane" unshare --net ip link add warren-probe type wireguard 2>/dev/null
}

# write_overlay FILE...: the manifests named, with the options of this cluster.
write_overlay() {
  local files=$*
  rm -rf "$overlay"
  mkdir -p "$overlay"
  cp "${@/#/$MANIFESTS/}" "$overlay/"
  cat >"$overlay/kustomization.yaml" <<END
resources: [${files// /, }]
images:
  - {name: warren, newTag: "$TAG"}
patches:
  - target: {kind: DaemonSet, name: warren, namespace: warren-system}
    patch: |
      apiVersion: apps/v1
      kind: DaemonSet
      metadata: {name: warren, namespace: warren-system}
      spec:
        updateStrategy: {type: $UPDATE$([ "$UPDATE" = RollingUpdate ] || echo ", rollingUpdate: null")}
        template:
          spec:
            initContainers:
              - name: install
                env:
                  - {name: WARREN_CLUSTER_CIDR, value: "$cluster_cidr"}
                  - {name: WARREN_SERVICE_CIDR, value: "$service_cidr"}
                  - {name: WARREN_ENCRYPTION, value: "$ENCRYPTION"}
            containers:
              - name: warrend
                env:
                  - {name: WARREN_CLUSTER_CIDR, value: "$cluster_cidr"}
                  - {name: WARREN_SERVICE_CIDR, value: "$service_cidr"}
                  - {name: WARREN_ENCRYPTION, value: "$ENCRYPTION"}
END
}

check_encryption
networks=$(networks_of "${IP_FAMILY:-ipv4}")
read -r cluster_cidr service_cidr <<<"$networks"
[ -f "$image_archive" ] || die "$image_archive is missing: run make image"
docker_is_up || die "no docker answers"
scripts/tools/build.sh kind kubectl

say "loading $image_archive"
kind_cmd load image-archive --name "$name" "$image_archive"
files=(warren.yaml)
if [ "$ENCRYPTION" = on ] && lacks_wireguard; then
  say "the kernel has no WireGuard: its user-space tunnel is installed too"
  files+=(userspace-tunnel.yaml)
fi
write_overlay "${files[@]}"
"$tools/kubectl" apply --kustomize "$overlay"
[ "$UPDATE" = RollingUpdate ] || exit 0 # nothing changes yet
say "waiting for the nodes"
"$tools/kubectl" wait --for=condition=Ready nodes --all --timeout=180s
"$tools/kubectl" --namespace kube-system rollout status deployment/coredns --timeout=120s

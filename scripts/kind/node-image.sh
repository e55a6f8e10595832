#!/usr/bin/env bash
# Makes kind's node image without a registry, from Debian's packages, the base files that kind's own module carries, and
# the Kubernetes that scripts/tools/build.sh built; loads it into docker and prints its tag. Needs root.
# What was made before is used again while nothing that it is made of changes.
# shellcheck source=scripts/kind/lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=scripts/kind/archive.sh
. scripts/kind/archive.sh

suite=bookworm # the last Debian whose systemd boots on cgroup v1
node_packages=systemd,dbus,containerd,runc,iptables,nftables,ipset,conntrack,iproute2,ethtool,socat,kmod,jq,procps
node_packages+=,util-linux,mount,ca-certificates,busybox,curl,netcat-openbsd,iputils-ping,tcpdump,hostname
# Programs that kube-proxy and the test suite run in their images.
proxy_programs=(/usr/sbin/{xtables-nft-multi,nft,conntrack} /usr/bin/kmod)
suite_programs=(/usr/bin/{bash,busybox,curl,ip,nc.openbsd,ss})
kubernetes=(kube-apiserver kube-controller-manager kube-scheduler kube-proxy)

[ "$(id -u)" -eq 0 ] || die "making a node image needs root; or name an image in NODE_IMAGE"
scripts/deps.sh kind
scripts/tools/build.sh cluster
version=$("$tools/kubeadm" version -o short)
base_files=$(cd scripts/tools/kind && go list -m -f '{{.Dir}}' sigs.k8s.io/kind)/images/base/files
mkdir -p "$cache"

# image_of prints the tag that kubeadm gives a component, as its registry has it.
image_of() { "$tools/kubeadm" config images list --kubernetes-version "$version" | grep "/$1:"; }

# make_base FILE: a Debian with the packages above, as a tar.
make_base() {
  say "debootstrap $suite (about a minute)"
  debootstrap --variant=minbase --include="$node_packages,netbase" "$suite" "$work/base" >"$cache/debootstrap.log" 2>&1 ||
    { tail -n 20 "$cache/debootstrap.log" >&2; die "debootstrap did not succeed (log: $cache/debootstrap.log)"; }
  tar --create --file "$work/base.tar" --directory "$work/base" --numeric-owner --xattrs --exclude='./dev/*' .
  mv "$work/base.tar" "$1"
}

# prepare_node FOLDER: what kind's Dockerfile does to the base, and what an older containerd and a root without
# CAP_SYS_RESOURCE need beyond it.
prepare_node() {
  local node=$1 units=$1/etc/systemd/system tool
  cp -r "$base_files/." "$node/"
  chmod -R u=rwX,go=rX "$node/kind" "$node/etc/containerd" "$units"
  chmod 0755 "$node/kind/bin/"* "$node/usr/local/bin/"*
  for tool in containerd ctr containerd-shim-runc-v2; do ln -s "/usr/bin/$tool" "$node/usr/local/bin/$tool"; done
  ln -s /usr/sbin/runc "$node/usr/local/sbin/runc"
  rm -f "$node/lib/systemd/system/sysinit.target.wants/systemd-tmpfiles-setup.service" \
    "$node/lib/systemd/system/"{multi-user,local-fs,basic}.target.wants/* "$units/"*.wants/* \
    "$node/lib/systemd/system/sockets.target.wants/"*{udev,initctl}*
  echo ReadKMsg=no >>"$node/etc/systemd/journald.conf"
  ln -sf /lib/systemd/systemd "$node/sbin/init"
  chroot "$node" systemctl enable kubelet.service containerd.service undo-mount-hacks.service 2>/dev/null
  chroot "$node" systemctl mask systemd-binfmt.service 2>/dev/null
  sed -i -e '/^OOMScoreAdjust=/d' -e '/^Limit/d' "$units/containerd.service"
  sed -i -e "s|sandbox_image = .*|sandbox_image = \"$(image_of pause)\"|" \
    -e 's/restrict_oom_score_adj = false/restrict_oom_score_adj = true/' "$node/etc/containerd/config.toml"
  chroot "$node" ctr oci spec | jq 'del(.process.rlimits)
    | .hooks.createContainer += [{path: "/kind/bin/mount-product-files.sh"}]' >"$node/etc/containerd/cri-base.json"
  mkdir -p "$node/etc/kubernetes/manifests" "$node/opt/cni/bin"
  install -m 0755 "$tools/"{kubelet,kubeadm,kubectl} "$node/usr/bin/"
  echo "$version" >"$node/kind/version"
}

# add_programs BASE FOLDER PROGRAM...: programs of the base, with the libraries that they load and the files that name
# hosts, protocols and services.
add_programs() {
  local base=$1 folder=$2 files
  shift 2
  files=$(chroot "$base" ldd "$@" | sed -n 's|^[^/]*/\([^ :]*\).*|\1|p' | sort -u)
  # shellcheck disable=SC2086 # a list of paths without spaces
  (cd "$base" && cp --dereference --parents $files etc/{nsswitch.conf,protocols,services} "$folder/")
}

# make_images BASE FOLDER: the images of the control plane, the sandbox and the test suite, each as an archive.
make_images() {
  local base=$1 out=$2 rootfs=$2/rootfs component program
  add() { # add TOOL PATH: a fresh root file system with one program
    rm -rf "$rootfs"
    install -D -m 0755 "$tools/$1" "$rootfs/$2"
  }
  for component in "${kubernetes[@]}"; do
    add "$component" "usr/local/bin/$component"
    if [ "$component" = kube-proxy ]; then
      # shellcheck disable=SC2046 # the matches and targets of iptables: a list of paths without spaces
      add_programs "$base" "$rootfs" "${proxy_programs[@]}" $(cd "$base" && printf '/%s ' usr/lib/*/xtables/*.so)
      for program in {iptables,ip6tables}{,-save,-restore}; do ln -s xtables-nft-multi "$rootfs/usr/sbin/$program"; done
      ln -s ../bin/kmod "$rootfs/usr/sbin/modprobe"
      mkdir -p "$rootfs/run" "$rootfs/tmp"
    fi
    archive "$rootfs" "$(image_of "$component")" "$out/$component.tar"
  done
  add etcd usr/local/bin/etcd
  archive "$rootfs" "$(image_of etcd)" "$out/etcd.tar"
  add coredns coredns
  archive "$rootfs" "$(image_of coredns/coredns)" "$out/coredns.tar" '{"Entrypoint": ["/coredns"]}'
  add pause pause
  archive "$rootfs" "$(image_of pause)" "$out/pause.tar" '{"Entrypoint": ["/pause"]}'
  add agnhost agnhost
  ln -s agnhost "$rootfs/agnhost-2"
  add_programs "$base" "$rootfs" "${suite_programs[@]}"
  ln -s nc.openbsd "$rootfs/usr/bin/nc"
  mkdir -p "$rootfs/"{bin,tmp,uploads}
  for program in $(chroot "$base" busybox --list); do
    [ -e "$rootfs/usr/bin/$program" ] || ln -s ../usr/bin/busybox "$rootfs/bin/$program"
  done
  # Under the suite's name, and under the short one of the examples.
  local agnhost
  agnhost=$(agnhost_image)
  archive "$rootfs" "$agnhost ${agnhost##*/}" "$out/agnhost.tar" '{"Entrypoint": ["/agnhost"], "Cmd": ["pause"]}'
  rm -rf "$rootfs"
}

# import_images NODE FOLDER: puts the archives into the content store of the node's containerd.
import_images() {
  # shellcheck disable=SC2016 # the inner shell expands it
  unshare --mount --pid --fork --kill-child bash -euc '
    node=$1 images=$2
    mount --bind "$node" "$node"
    mount -t proc proc "$node/proc"
    mount -t tmpfs tmpfs "$node/run"
    mount -t tmpfs tmpfs "$node/tmp"
    mount --bind /dev "$node/dev"
    mkdir "$node/tmp/images"
    mount --bind "$images" "$node/tmp/images"
    printf "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n" >"$node/tmp/config.toml"
    chroot "$node" containerd --config /tmp/config.toml >"$images/containerd.log" 2>&1 &
    for ((i = 0; i < 100; i++)); do
      chroot "$node" ctr version >/dev/null 2>&1 && break
      sleep 0.1
    done
    for image in "$images"/*.tar; do
      chroot "$node" ctr --namespace k8s.io images import --no-unpack "/tmp/images/${image##*/}" >/dev/null
    done
    chroot "$node" ctr --namespace k8s.io images ls -q >"$images/list"
    kill %1 && wait %1 || true
  ' - "$1" "$2"
}

base=$cache/base-$(sha256sum <<<"$suite $node_packages" | cut -c1-12).tar
made_of=$(scripts/tools/build.sh --stamps cluster | cat - scripts/kind/{node-image,archive}.sh | sha256sum | cut -c1-12)
tag=warren-kind-node:$made_of
file=$cache/node.tar

if [ "$(cat "$file.tag" 2>/dev/null)" != "$tag" ]; then
  work=$(mktemp -d "$cache/work.XXXXXX")
  trap 'rm -rf "$work"' EXIT
  [ -f "$base" ] || make_base "$base"
  say "making the node image (half a minute)"
  mkdir "$work/node" "$work/images"
  tar --extract --file "$base" --directory "$work/node" --numeric-owner --xattrs
  make_images "$work/node" "$work/images"
  prepare_node "$work/node"
  rm -rf "$work/node/var/cache/apt/archives/"*.deb "$work/node/var/lib/apt/lists/"* "$work/node/usr/share/"{doc,man,locale}
  import_images "$work/node" "$work/images"
  archive "$work/node" "$tag" "$file" \
    '{"Entrypoint": ["/usr/local/bin/entrypoint", "/sbin/init"], "Env": ["container=docker",
      "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"], "StopSignal": "SIGRTMIN+3"}'
  echo "$tag" >"$file.tag"
fi
if ! docker image inspect "$tag" >/dev/null 2>&1; then
  say "loading the node image into docker"
  docker load --quiet --input "$file" >&2
  for old in $(docker image ls --format '{{.Repository}}:{{.Tag}}' "${tag%:*}" | grep -vx "$tag"); do
    docker image rm "$old" >/dev/null 2>&1 || true # a cluster may still run on it
  done
fi
echo "$tag"

#!/usr/bin/env bash
# Writes build/warren-image.tar, the image warren:dev, without a registry: iptables and its libraries out of Debian's packages,
# Warren's programs from build/, and the plugins that are chained after it. It takes what `make build` made.
#
# The same inputs give the same bytes: sorted, no times, no owners. `ctr images import`, `docker load` and
# `kind load image-archive` take the archive.
set -euo pipefail
cd "$(dirname "$0")/../.."

image=warren:dev
archive=$PWD/build/warren-image.tar
cache=$PWD/build/cache/image

# iptables in both variants, and what it links. No shell: `kubectl exec` runs warrend and iptables-save directly.
packages=(iptables libip4tc2 libip6tc2 libxtables12 libmnl0 libnetfilter-conntrack3 libnfnetlink0 libnftnl11 libc6)
plugins=(meta/portmap meta/bandwidth main/loopback)

say() { echo "image: $*" >&2; }
die() { say "$*"; exit 1; }

# print_uris prints name, size and hash of the packages' current versions.
print_uris() { apt-get --print-uris download "${packages[@]}" 2>/dev/null; }

# fetch_packages leaves the packages in $cache; it downloads only when Debian has other versions than the cache.
fetch_packages() {
  local uris
  uris=$(print_uris) || { apt-get update -qq && uris=$(print_uris); } ||
    die "apt knows no package iptables: run as root once, so that apt-get update can run"
  [ "$(cat "$cache/uris" 2>/dev/null)" = "$uris" ] && return
  say "downloading Debian packages"
  rm -rf "$cache"
  mkdir -p "$cache"
  (cd "$cache" && apt-get -o APT::Sandbox::User=root -qq download "${packages[@]}")
  echo "$uris" >"$cache/uris"
}

# unpack_packages fills the rootfs, without what only people read, but with every package's licence.
unpack_packages() {
  # Newer Debians have everything below /usr; the loader's path is /lib64 all the same.
  mkdir -p "$rootfs"/usr/lib{,64}
  ln -s usr/lib usr/lib64 "$rootfs/"
  local package
  for package in "$cache"/*.deb; do
    dpkg -x "$package" "$rootfs"
  done
  find "$rootfs/usr/share/doc" ! -type d ! -name copyright -delete
  rm -rf "$rootfs"/usr/share/{man,locale,lintian,bug,iptables} "$rootfs"/usr/lib/*/gconv "$rootfs"/usr/sbin/*-apply "${rootfs:?}"/{etc,var}
  find "$rootfs" -depth -type d -empty -delete
}

# choose_iptables does what the package's installation would: iptables is iptables-nft.
choose_iptables() {
  local program
  for program in ip{,6}tables{,-save,-restore}; do
    ln -sfn xtables-nft-multi "$rootfs/usr/sbin/$program"
  done
}

# add_programs adds Warren's programs and builds the chained plugins from the module that go.mod names.
add_programs() {
  local bin=$rootfs/opt/warren/bin version plugin
  mkdir -p "$bin" "$rootfs/usr/bin"
  if ! [ -x build/warren ] || ! [ -x build/warrend ]; then die "build/warren or build/warrend is missing: run make build"; fi
  install -m 0755 build/warrend "$rootfs/usr/bin/warrend"
  install -m 0755 build/warren "$bin/warren"
  version=$(go list -m -f '{{.Version}}' github.com/containernetworking/plugins)
  for plugin in "${plugins[@]}"; do
    GOBIN=$bin CGO_ENABLED=0 go install -trimpath \
      -ldflags "-s -w -X github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion=$version" \
      "github.com/containernetworking/plugins/plugins/$plugin@$version"
  done
}

# pack OUT DIR NAME...: a tar file of what DIR holds under the names, without anything that differs from build to build.
pack() {
  local out=$1 dir=$2
  shift 2
  tar --create --file="$out" --directory="$dir" --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --format=gnu "$@"
}

# write_archive writes the image: its one layer, its configuration, and a manifest that names both.
write_archive() {
  local out=$work/archive layer config
  mkdir "$out"
  # Mount points of the manifests, so that the runtime need not make them in a read-only root.
  mkdir -p "$rootfs"/{dev,etc/cni/net.d,host/proc/sys/net,opt/cni/bin,proc,run/warren,sys,tmp,var/lib/warren,var/run/{netns,wireguard}}
  : >"$rootfs/run/xtables.lock"
  chmod -R go-w,a+rX "$rootfs"
  pack "$out/layer.tar" "$rootfs" .
  layer=$(sha256sum "$out/layer.tar" | cut -d' ' -f1)
  cat >"$out/config" <<END
{"architecture":"$(go env GOARCH)","os":"linux","created":"1970-01-01T00:00:00Z",
 "config":{"Entrypoint":["/usr/bin/warrend"],"Env":["PATH=/usr/sbin:/usr/bin"],
  "Labels":{"org.opencontainers.image.title":"Warren","org.opencontainers.image.licenses":"Apache-2.0"}},
 "rootfs":{"type":"layers","diff_ids":["sha256:$layer"]},
 "history":[{"created":"1970-01-01T00:00:00Z","created_by":"scripts/image/build.sh"}]}
END
  config=$(sha256sum "$out/config" | cut -d' ' -f1)
  mv "$out/config" "$out/$config.json"
  echo "[{\"Config\":\"$config.json\",\"RepoTags\":[\"$image\"],\"Layers\":[\"layer.tar\"]}]" >"$out/manifest.json"
  # Without "./" before the names: kind looks for "manifest.json".
  pack "$archive.new" "$out" "$config.json" layer.tar manifest.json
  mv "$archive.new" "$archive"
  say "$image sha256:$config"
}

megabytes() { awk -v bytes="$1" 'BEGIN { printf "%.1f MB", bytes / 1000000 }'; }

mkdir -p build
exec 9>build/.image.lock # one build at a time: they share the cache
flock 9
work=$(mktemp -d "$PWD/build/image.XXXXXX")
trap 'rm -rf "$work"' EXIT
rootfs=$work/rootfs
fetch_packages
unpack_packages
choose_iptables
add_programs
scripts/image/check.sh "$rootfs"
write_archive
say "$archive: $(megabytes "$(stat -c %s "$archive")"), $(megabytes "$(gzip -9 -c "$archive" | wc -c)") compressed"

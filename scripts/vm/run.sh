#!/usr/bin/env bash
# Runs tests on a stock Debian kernel under QEMU, because that kernel has WireGuard.
# Usage: scripts/vm/run.sh [proofs | [userspace=]PACKAGE[:PATTERN]...]     (PATTERN as of go test -run; no argument: all of the tests below)
# Nothing is installed and no KVM is needed: the kernel is unpacked into build/cache/vm, and stays there for the next run.
# Tests find WARREN_TEST_WIREGUARD=kernel there (userspace where that is said), WARREN_SOAK as it is here, and no API server.
set -euo pipefail
cd "$(dirname "$0")/../.."

proofs=('./daemon:^TestProof(ForeignInnerSource|NoRouterForStolenNode|KeyRotationOutlivesCrashes)$'
  './daemon:^TestProof(NoPlaintextWithoutPeer|ForgedSources|NoPlaintextInCrashLoops|RestartCostsNothing|PeerHeals|KeyRotation|MTU)$/IPv4'
  './daemon:^TestProof(NoPlaintextWithoutPeer|ForgedSources|NoPlaintextInCrashLoops|RestartCostsNothing|PeerHeals|KeyRotation|MTU)$/IPv6')
others=('./pkg/wgdevice' './pkg/firewall:^TestListBesideALargeSet$'
  './daemon:^Test(RestartIsNotSeen|DeleteWithoutDaemon|NodeLeaves|EncryptionOffAndOnAgain|Cleanup|TunnelGivesWay|TunnelEnds)$'
  './daemon:^Test(EncryptNodeTraffic|NodesOwnTraffic|VerifyProvesAMesh|NodeBehindNAT|GuardsBeforeTheCluster)$'
  './daemon:^Test(KeysStaySecret|OnlyWireGuardListens)$'
  './daemon:^TestDoctorOnRunningNode$/^as_root_on_the_node$'
  './daemon:^TestClockIsCorrected$/IPv4'
  'userspace=./daemon:^TestClockIsCorrected$/IPv6') # this machine's clock is not a test's to set
case "$*" in
  '')     tests=("${others[@]}" "${proofs[@]}") ;;
  proofs) tests=("${proofs[@]}" './daemon:^TestProofHostileNode$') ;; # the last takes minutes
  *)      tests=("$@") ;;
esac
# Kernel modules that the tests need. What they depend on is found, what is built in is left out.
modules=(wireguard veth bridge tun
  nf_tables nft_compat nft_chain_nat nft_ct nft_fib_ipv4 nft_fib_ipv6 nft_limit nft_log nft_masq nft_nat nft_reject_inet nf_conntrack_netlink nfnetlink_log
  xt_addrtype xt_comment xt_connmark xt_conntrack xt_limit xt_mark xt_MASQUERADE xt_multiport xt_nat xt_NFLOG xt_sctp xt_set xt_statistic xt_tcpudp xt_TCPMSS nft_numgen
  ipt_REJECT ip6t_REJECT ipt_rpfilter ip6t_rpfilter ip_set_hash_ip ip_set_hash_net ip_set_hash_ipport ip_set_hash_netiface
  ifb sch_ingress sch_tbf cls_u32 act_mirred)
# Programs that the tests need beside themselves, as names on this machine; busybox has the rest, but its shell would run its
# own ip rather than that one.
programs=(sh ip ipset conntrack pgrep tcpdump nft)
minutes=30 # for each run of a test's binary, and for all
[ -z "${WARREN_SOAK:-}" ] || minutes=150

cache=build/cache/vm
work=build/vm

if [ "$(uname -m)" != x86_64 ]; then
  echo "vm: only x86_64 is supported here, this is $(uname -m)" >&2
  exit 1
fi

# unpack_kernel leaves Debian's current cloud kernel in $cache/NAME and prints that directory.
unpack_kernel() {
  local name directory
  name=$(apt-cache depends linux-image-cloud-amd64 | awk '$1 == "Depends:" && $2 ~ /^linux-image-/ { print $2; exit }')
  if [ -z "$name" ]; then # no package lists: what an earlier run unpacked is as good
    directory=$(find "$cache" -mindepth 1 -maxdepth 1 -type d -name 'linux-image-*' ! -name '*.new' 2>/dev/null | sort -V | tail -n 1)
    [ -n "$directory" ] || { echo "vm: apt knows no kernel: run apt-get update" >&2; return 1; }
    echo "$directory"
    return
  fi
  directory=$cache/$name
  if [ ! -d "$directory" ]; then
    echo "vm: fetching $name" >&2
    rm -rf "$directory.new"
    mkdir -p "$directory.new"
    (cd "$directory.new" && apt-get -qq -o APT::Sandbox::User=root download "$name" && dpkg -x ./*.deb . && rm ./*.deb) >&2
    # depmod leaves the order in which modules are loaded; a merged /usr has them elsewhere.
    [ -d "$directory.new/lib/modules" ] || ln -s usr/lib "$directory.new/lib"
    depmod --basedir "$directory.new" "$(ls "$directory.new/lib/modules")"
    mv "$directory.new" "$directory"
  fi
  echo "$directory"
}

# add_modules copies modules and what they depend on, and writes the order in which to load them.
add_modules() {
  local kernel=$1 root=$2 version module file target
  version=$(ls "$kernel/lib/modules")
  mkdir -p "$root/modules"
  : >"$root/modules/order"
  for module in "${modules[@]}"; do
    while read -r _ file _; do
      target=$root/modules/$(basename "$file")
      case "$file" in
        *.xz) target=${target%.xz}; [ -e "$target" ] || xz -dc "$file" >"$target" ;;
        *) cp "$file" "$target" ;;
      esac
      grep -qx "${target#"$root"}" "$root/modules/order" || echo "${target#"$root"}" >>"$root/modules/order"
    done < <(modprobe --dirname "$kernel" --set-version "$version" --show-depends "$module" | grep '^insmod ')
  done
}

# add_file copies a program or library to a place, with the libraries that it is linked to.
add_file() {
  local root=$1 source=$2 target=$3 file
  install -D "$source" "$root$target"
  while read -r file; do
    [ -e "$root$file" ] || install -D "$file" "$root$file"
  done < <(ldd "$source" | grep -o '/[^ ]*' || true)
}

# add_programs copies the programs, and iptables with its extensions. Its legacy form stays away, as on new nodes.
add_programs() {
  local root=$1 program family file
  for program in "${programs[@]}"; do
    add_file "$root" "$(command -v "$program")" "/usr/sbin/$program"
  done
  add_file "$root" "$(command -v xtables-nft-multi)" /usr/sbin/xtables-nft-multi
  for family in iptables ip6tables; do
    for program in "" -save -restore; do
      ln -s xtables-nft-multi "$root/usr/sbin/$family$program"
      ln -s xtables-nft-multi "$root/usr/sbin/$family-nft$program"
    done
  done
  for file in /usr/lib/*/xtables/*.so; do
    add_file "$root" "$file" "$file"
  done
  install -D -m 644 /etc/protocols "$root/etc/protocols"
}

# add_tests builds the tests, and Warren's programs for those that need them.
add_tests() {
  local root=$1 each mode package binary
  mkdir -p "$root/tests" "$root/programs"
  for each in "${tests[@]}"; do
    mode=kernel
    case "$each" in
      userspace=*) mode=userspace each=${each#userspace=} ;;
    esac
    package=${each%%:*}
    binary=$(basename "$package")
    [ -e "$root/tests/$binary" ] || CGO_ENABLED=0 go test -c -ldflags '-s -w' -o "$root/tests/$binary" "$package"
    case "$each" in
      *:*) echo "$mode $binary ${each#*:}" ;;
      *) echo "$mode $binary ." ;;
    esac >>"$root/tests/order"
  done
  CGO_ENABLED=0 go build -ldflags '-s -w' -o "$root/programs/warren" ./plugin
  CGO_ENABLED=0 go build -ldflags '-s -w' -o "$root/programs/warrend" ./daemon
  for each in portmap bandwidth; do
    CGO_ENABLED=0 go build -ldflags '-s -w' -o "$root/programs/$each" "github.com/containernetworking/plugins/plugins/meta/$each"
  done
}

kernel=$(unpack_kernel)
rm -rf "$work"
mkdir -p "$work"/root/{bin,dev,etc,proc,root,run,sys,tmp,var,usr/sbin}
ln -s /run "$work/root/var/run"
install "$(command -v busybox)" "$work/root/bin/busybox"
install scripts/vm/init "$work/root/init"
install -D -m 644 -t "$work/root/manifests" manifests/*.yaml # where tests look for them, beside their working directory
add_modules "$kernel" "$work/root"
add_programs "$work/root"
add_tests "$work/root"
(cd "$work/root" && find . | cpio --quiet --create --format=newc) >"$work/initramfs"

told="console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable TEST_MINUTES=$minutes ${WARREN_SOAK:+WARREN_SOAK=$WARREN_SOAK}"
status=0
timeout "${minutes}m" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 3072 -nodefaults -no-reboot -display none -serial stdio \
  -kernel "$kernel"/boot/vmlinuz-* -initrd "$work/initramfs" -append "$told" </dev/null |
  sed -u 's/\r//' | tee "$work/log" || status=$?
if grep -q '^testing: warning: no tests to run' "$work/log"; then
  echo "vm: a pattern matches no test" >&2
  exit 1
fi
if ! grep -qx 'vm: exit status 0' "$work/log"; then
  echo "vm: the tests failed or did not end within $minutes minutes (status $status); the guest's output is in $work/log" >&2
  exit 1
fi

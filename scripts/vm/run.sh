#!/usr/bin/env bash
# Runs the tests of the mesh on a stock Debian kernel under QEMU, because that kernel has WireGuard.
# Usage: scripts/vm/run.sh [PACKAGE...]     (no argument: the packages below)
# Nothing is installed and no KVM is needed: the kernel is unpacked into build/cache/vm, and stays there for the next run.
set -euo pipefail
cd "$(dirname "$0")/../.."

packages=("${@:-./pkg/wgdevice}")
# Kernel modules that the tests need. What they depend on is found, what is built in is left out.
modules=(wireguard veth bridge tun)
# Programs that the tests need beside themselves, as paths on this machine; busybox is there already.
programs=()
seconds=420

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

# add_programs copies programs with the libraries that they are linked to.
add_programs() {
  local root=$1 program file
  for program in "${programs[@]}"; do
    while read -r file; do
      install -D "$file" "$root$file"
    done < <(echo "$program"; ldd "$program" | grep -o '/[^ ]*' || true)
  done
}

kernel=$(unpack_kernel)
rm -rf "$work"
mkdir -p "$work"/root/{bin,dev,proc,root,run,sys,tmp,tests,var}
ln -s /run "$work/root/var/run"
install "$(command -v busybox)" "$work/root/bin/busybox"
install scripts/vm/init "$work/root/init"
add_modules "$kernel" "$work/root"
add_programs "$work/root"
for package in "${packages[@]}"; do
  CGO_ENABLED=0 go test -c -o "$work/root/tests/$(basename "$package")" "$package"
done
(cd "$work/root" && find . | cpio --quiet --create --format=newc) >"$work/initramfs"

status=0
timeout "$seconds" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 1024 -nodefaults -no-reboot -display none -serial stdio \
  -kernel "$kernel"/boot/vmlinuz-* -initrd "$work/initramfs" -append 'console=ttyS0 quiet panic=-1' </dev/null |
  tr -d '\r' | tee "$work/log" || status=$?
if ! grep -qx 'vm: exit status 0' "$work/log"; then
  echo "vm: the tests failed or did not end within $seconds seconds (status $status); the guest's output is in $work/log" >&2
  exit 1
fi

#!/usr/bin/env bash
# Installs the Debian packages that a target needs, and only those that are missing.
# Usage: scripts/deps.sh build|lint|test|image|vm|kind [...]    (no argument: test)
set -euo pipefail

packages() {
  case "$1" in
    build) echo ca-certificates git make ;;
    test)  echo ca-certificates git make iptables ipset iproute2 conntrack tcpdump procps iputils-ping kmod strace nftables ;;
    lint)  echo ca-certificates git make shellcheck ;;
    image) echo ca-certificates ;;
    vm)    echo qemu-system-x86 busybox-static cpio kmod xz-utils ;;
    kind)  docker_packages; echo debootstrap iptables iproute2 jq tcpdump conntrack procps ;;
    *) echo "deps.sh: unknown target '$1' (build, lint, test, image, vm, kind)" >&2; return 2 ;;
  esac
}

# docker_packages prints Debian's docker, or nothing where any docker is installed: Debian's would conflict with it.
docker_packages() {
  command -v dockerd >/dev/null || echo docker.io runc
  # Since Debian 13 the client is a package of its own.
  command -v docker >/dev/null || grep -q '^VERSION_CODENAME=bookworm$' /etc/os-release || echo docker-cli
}

wanted=()
for target in "${@:-test}"; do
  list=$(packages "$target" | tr '\n' ' ')
  read -r -a more <<<"$list"
  wanted+=("${more[@]}")
done

missing=()
for package in "${wanted[@]}"; do
  status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
  [ "$status" = "install ok installed" ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" -ne 0 ]; then
  echo "deps.sh: run as root, or install these first: apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "installing Debian packages: ${missing[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
# Services of installed packages (docker) are started by the scripts that need them, not by the package.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod +x "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
# A machine that has just booted may be upgrading itself: wait for that.
apt-get install -y -qq --no-install-recommends --no-remove -o DPkg::Lock::Timeout=300 "${missing[@]}" >/dev/null

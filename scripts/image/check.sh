#!/usr/bin/env bash
# Runs a rootfs' programs in a network namespace of their own: that their libraries are all there, and that iptables takes the
# matches and targets that Warren's rules use.
# Usage: scripts/image/check.sh ROOTFS
set -euo pipefail
rootfs=$1

# inside runs a program of the rootfs in a network namespace of its own. Who is not root needs a user namespace for that.
own=(--net)
[ "$(id -u)" -eq 0 ] || own+=(--map-root-user)
inside() { unshare "${own[@]}" chroot "$rootfs" "$@"; }

for program in ip{,6}tables-{nft,legacy}{,-save,-restore} iptables ip6tables; do
  inside "/usr/sbin/$program" --version >/dev/null
done
inside /usr/sbin/iptables --version | grep -q nf_tables
inside /usr/sbin/iptables -m set --help | grep -q match-set
inside /usr/bin/warrend version >/dev/null
for plugin in warren portmap bandwidth loopback; do
  CNI_COMMAND=VERSION inside "/opt/warren/bin/$plugin" </dev/null | grep -q supportedVersions
done

for family in ip ip6; do
  inside "/usr/sbin/${family}tables-restore" <<'END'
*raw
:WARREN-RAW - [0:0]
-A PREROUTING -j WARREN-RAW
-A WARREN-RAW -i wrn+ -m rpfilter --invert -m comment --comment "0123 check" -j DROP
COMMIT
*mangle
:WARREN-FORWARD - [0:0]
-A FORWARD -j WARREN-FORWARD
-A WARREN-FORWARD -i wrn+ -m conntrack --ctstate INVALID,UNTRACKED -j DROP
-A WARREN-FORWARD -o warren0 -p tcp -m tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu
-A WARREN-FORWARD -p sctp -m sctp --dport 1:7 -j RETURN
-A WARREN-FORWARD -p udp -m udp --dport 53 -j RETURN
COMMIT
*nat
:WARREN-NAT - [0:0]
-A POSTROUTING -j WARREN-NAT
-A WARREN-NAT -o wrn+ -j RETURN
-A WARREN-NAT -j MASQUERADE --random-fully
COMMIT
END
done

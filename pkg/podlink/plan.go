// Package podlink makes, verifies and removes the link between a node and a pod: a pair of virtual Ethernet devices, with
// everything on both ends that IP needs.
//
// The pod's end has its addresses as /32 and /128 and one default route, by way of a gateway address that exists nowhere:
// both ends know each other's MAC address by permanent neighbour entries. So nothing is ever asked by ARP or neighbour
// discovery that another could answer, and nothing has to be waited for.
//
// Plan says what a pair looks like; Attach, Check and Detach are the boundary to the kernel. All of them work
// in the network namespace of the calling thread, and in the pod's.
package podlink

import (
	"crypto/sha256"
	"encoding/base32"
	"net/netip"
	"strings"
)

// Prefix begins the name of every host end, so that rules can match them all as "wrn+".
const Prefix = "wrn"

// hostMAC is the MAC address of every host end. They never share a segment, and a fixed one keeps others (udev) from
// having an opinion.
var hostMAC = MAC{0xee, 0xee, 0xee, 0xee, 0xee, 0xee} //nolint:gochecknoglobals // a constant

// MAC is an Ethernet address.
type MAC [6]byte

// Spec is what a pair is made for.
type Spec struct {
	ContainerID string
	Interface   string
	MTU         int
	// Addresses are the pod's, at most one of each family.
	Addresses []netip.Addr
}

// Pair is both ends of the link.
type Pair struct {
	MTU       int
	Host, Pod End
}

// End is one device and what stands on it.
type End struct {
	Name string
	MAC  MAC
	// Sysctls are set before the device goes up, in this order.
	Sysctls []Sysctl
	// NoAutoAddress keeps the kernel from giving the device a link-local address.
	NoAutoAddress bool
	Addresses     []netip.Prefix
	Neighbours    []Neighbour
	Routes        []Route
}

// Sysctl is a file below /proc/sys/net/ipv6/conf/<device>, and its value.
type Sysctl struct {
	Name, Value string
}

// Neighbour is a permanent neighbour entry.
type Neighbour struct {
	Address netip.Addr
	MAC     MAC
}

// Route leads to the destination, directly or by way of a gateway that no route leads to.
type Route struct {
	Destination netip.Prefix
	Via         netip.Addr
}

// Plan returns the pair for a spec.
func Plan(s Spec) Pair {
	p := Pair{
		MTU: s.MTU,
		Host: End{
			Name: HostName(s.ContainerID, s.Interface), MAC: hostMAC,
			// A pod's router advertisement must not become the node's default route.
			Sysctls: []Sysctl{{"accept_ra", "0"}}, NoAutoAddress: true,
		},
		Pod: End{
			Name: s.Interface, MAC: podMAC(s.ContainerID, s.Interface),
			Sysctls: []Sysctl{{"accept_ra", "0"}, {"accept_dad", "0"}},
		},
	}
	for _, a := range s.Addresses {
		if a.Is6() {
			// Some runtimes switch IPv6 off in every new namespace.
			p.Host.Sysctls = append(p.Host.Sysctls, Sysctl{"disable_ipv6", "0"})
			p.Pod.Sysctls = append(p.Pod.Sysctls, Sysctl{"disable_ipv6", "0"})
		}
		own, gateway := netip.PrefixFrom(a, a.BitLen()), gatewayOf(a)
		p.Host.Neighbours = append(p.Host.Neighbours, Neighbour{a, p.Pod.MAC})
		p.Host.Routes = append(p.Host.Routes, Route{Destination: own})
		p.Pod.Addresses = append(p.Pod.Addresses, own)
		p.Pod.Neighbours = append(p.Pod.Neighbours, Neighbour{gateway, p.Host.MAC})
		p.Pod.Routes = append(p.Pod.Routes, Route{Destination: defaultOf(a), Via: gateway})
	}
	return p
}

// wantsIPv6 says whether the end needs IPv6 to work.
func (e *End) wantsIPv6() bool {
	for _, n := range e.Neighbours {
		if n.Address.Is6() {
			return true
		}
	}
	return false
}

// HostName returns the name of the host end, which a device name's 15 characters hold.
func HostName(containerID, ifname string) string {
	sum := identify(containerID, ifname)
	return Prefix + strings.ToLower(base32.StdEncoding.EncodeToString(sum[:])[:12])
}

// podMAC returns the MAC address of the pod's end: a locally administered unicast address.
func podMAC(containerID, ifname string) MAC {
	sum := identify(containerID, ifname)
	mac := MAC(sum[len(sum)-6:])
	mac[0] = mac[0]&^0x01 | 0x02
	return mac
}

// identify hashes an attachment. No interface name holds the separator.
func identify(containerID, ifname string) [sha256.Size]byte {
	return sha256.Sum256([]byte(containerID + "/" + ifname))
}

// gatewayOf returns the link-local gateway in the family of an address.
func gatewayOf(a netip.Addr) netip.Addr {
	if a.Is4() {
		return netip.AddrFrom4([4]byte{169, 254, 1, 1})
	}
	return netip.AddrFrom16([16]byte{0: 0xfe, 1: 0x80, 15: 1})
}

// defaultOf returns the prefix of every address in the family of an address.
func defaultOf(a netip.Addr) netip.Prefix {
	if a.Is4() {
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
}

package wgdevice

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"

	"github.com/warren-cni/warren/pkg/mesh"
)

// UplinkMTU returns the smallest MTU of the links by which the node's packets leave for its peers' addresses, but no less than leastUplink
// for the sake of a peer, where the node's own link takes that. Where no route leads to
// any it is that of the link that has the node's address, or else, where that is no link of its own (an address on loopback), that
// of the link of the default route.
func UplinkMTU(node netip.Addr, peers []netip.Addr) (int, error) {
	k, err := openKernel()
	if err != nil {
		return 0, err
	}
	defer k.Close()
	list, err := k.LinkList()
	if err != nil {
		return 0, fmt.Errorf("listing links: %w", err)
	}
	links := make(uplinks, len(list))
	for _, l := range list {
		if a := l.Attrs(); a.Name != mesh.Link && a.Flags&net.FlagLoopback == 0 {
			links[a.Index] = a.MTU
		}
	}
	own, err := k.ownMTU(links, node)
	mtu := k.smallestTo(links, peers)
	if mtu == 0 {
		return own, err
	}
	return max(mtu, min(own, leastUplink)), nil
}

// leastUplink leaves IPv6 the packet that it needs, in a tunnel over IPv6. A node says itself where its peers reach it, and must not take
// IPv6 from all others by naming a place behind a link, of a VPN perhaps, that takes less: what is sent there goes in fragments.
const leastUplink = 1280 + 80

// uplinks are the MTUs of the links that can be one, by index.
type uplinks map[int]int

// smallestTo returns the smallest MTU of the links that lead to addresses, 0 where none does. One address of a neighbourhood is
// asked for: that a node has one link to some of the addresses of a /24 or /64, and another to the rest, is rarer than
// a cluster of thousands of nodes, each of which would be a question.
func (k *kernel) smallestTo(links uplinks, addresses []netip.Addr) int {
	smallest := 0
	asked := map[netip.Prefix]bool{}
	for _, a := range addresses {
		bits := 24
		if a.Is6() {
			bits = 64
		}
		neighbourhood, err := a.Prefix(bits)
		if err != nil || asked[neighbourhood] {
			continue
		}
		asked[neighbourhood] = true
		routes, err := k.RouteGet(a.AsSlice())
		if err != nil || len(routes) == 0 {
			continue // no way there
		}
		if mtu := links[routes[0].LinkIndex]; mtu > 0 && (smallest == 0 || mtu < smallest) {
			smallest = mtu
		}
	}
	return smallest
}

// ownMTU returns the MTU of the link that has the node's address, or of that of the default route.
func (k *kernel) ownMTU(links uplinks, node netip.Addr) (int, error) {
	family := netlink.FAMILY_V4
	if node.Is6() {
		family = netlink.FAMILY_V6
	}
	addresses, err := netlinksafe.AddrList(nil, family)
	if err != nil {
		return 0, fmt.Errorf("listing addresses: %w", err)
	}
	for _, a := range addresses {
		if mtu := links[a.LinkIndex]; mtu > 0 && prefixOf(a.IPNet).Addr() == node {
			return mtu, nil
		}
	}
	routes, err := k.RouteList(nil, family)
	if err != nil {
		return 0, fmt.Errorf("listing routes: %w", err)
	}
	for _, r := range routes {
		if mtu := links[r.LinkIndex]; mtu > 0 && prefixOf(r.Dst).Bits() <= 0 {
			return mtu, nil
		}
	}
	return 0, fmt.Errorf("looking for the uplink: no link has the address %s, and there is no default route", node)
}

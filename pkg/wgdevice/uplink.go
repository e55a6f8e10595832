package wgdevice

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"

	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/podlink"
)

// ReadUplink returns the MTU of the link that has the node's address, or, where that is no link of its own (an address on loopback), of the
// link of the default route, and which of the peers' addresses the node's packets reach by a link that carries less.
func ReadUplink(node netip.Addr, peers []netip.Addr) (mesh.Uplink, error) {
	k, err := openKernel()
	if err != nil {
		return mesh.Uplink{}, err
	}
	defer k.Close()
	list, err := k.LinkList()
	if err != nil {
		return mesh.Uplink{}, fmt.Errorf("listing links: %w", err)
	}
	links := make(uplinks, len(list))
	for _, l := range list {
		if a := l.Attrs(); a.Name != mesh.Link && a.Flags&net.FlagLoopback == 0 && !strings.HasPrefix(a.Name, podlink.Prefix) {
			links[a.Index] = a.MTU
		}
	}
	own, err := k.ownMTU(links, node)
	if err != nil {
		return mesh.Uplink{}, err
	}
	return mesh.Uplink{MTU: own, Less: k.lessTo(links, own, peers)}, nil
}

// uplinks are the MTUs of the links that can be one, by index.
type uplinks map[int]int

// lessTo returns the addresses to which a link with a smaller MTU leads, with that MTU. Each is asked for by itself, because a link may lead
// to a part of a network, and an address that a hostile node gives must not answer for its neighbours'. On most nodes no link is smaller, and
// there is nothing to ask.
func (k *kernel) lessTo(links uplinks, own int, addresses []netip.Addr) map[netip.Addr]int {
	less := map[netip.Addr]int{}
	if !slices.ContainsFunc(slices.Collect(maps.Values(links)), func(mtu int) bool { return mtu < own }) {
		return less
	}
	for _, a := range addresses {
		routes, err := k.RouteGet(a.AsSlice())
		if err != nil || len(routes) == 0 { // there is no way there
			continue
		}
		if mtu := links[routes[0].LinkIndex]; mtu > 0 && mtu < own {
			less[a] = mtu
		}
	}
	return less
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
		if prefixOf(r.Dst).Bits() > 0 {
			continue
		}
		ways := []int{r.LinkIndex}
		for _, way := range r.MultiPath {
			ways = append(ways, way.LinkIndex)
		}
		// Of several ways packets take any.
		least := 0
		for _, way := range ways {
			if mtu := links[way]; mtu > 0 && (least == 0 || mtu < least) {
				least = mtu
			}
		}
		if least > 0 {
			return least, nil
		}
	}
	return 0, fmt.Errorf("looking for the uplink: no link has the address %s, and there is no default route", node)
}

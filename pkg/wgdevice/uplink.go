package wgdevice

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
)

// UplinkMTU returns the MTU of the link that has the node's address, or else, where that is no link of its own (an address on
// loopback), of the link of the default route.
func UplinkMTU(node netip.Addr) (int, error) {
	family := netlink.FAMILY_V4
	if node.Is6() {
		family = netlink.FAMILY_V6
	}
	links, err := netlinksafe.LinkList()
	if err != nil {
		return 0, fmt.Errorf("listing links: %w", err)
	}
	byIndex := make(map[int]netlink.Link, len(links))
	for _, l := range links {
		byIndex[l.Attrs().Index] = l
	}

	addresses, err := netlinksafe.AddrList(nil, family)
	if err != nil {
		return 0, fmt.Errorf("listing addresses: %w", err)
	}
	for _, a := range addresses {
		l, known := byIndex[a.LinkIndex]
		if known && prefixOf(a.IPNet).Addr() == node && l.Attrs().Flags&net.FlagLoopback == 0 {
			return l.Attrs().MTU, nil
		}
	}

	routes, err := netlinksafe.RouteList(nil, family)
	if err != nil {
		return 0, fmt.Errorf("listing routes: %w", err)
	}
	for _, r := range routes {
		l, known := byIndex[r.LinkIndex]
		if known && prefixOf(r.Dst).Bits() <= 0 {
			return l.Attrs().MTU, nil
		}
	}
	return 0, fmt.Errorf("looking for the uplink: no link has the address %s, and there is no default route", node)
}

package wgdevice

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"

	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/podlink"
)

// ReadUplink returns the MTU of the link that has the node's address, or, where that is no link of its own (an address on loopback), of the
// default route, and to which of the peers' addresses the node's packets go by a route that carries less. The zero address stands for
// peers that come from anywhere, to which the default routes lead.
func ReadUplink(node netip.Addr, peers []netip.Addr) (mesh.Uplink, error) {
	k, err := openKernel()
	if err != nil {
		return mesh.Uplink{}, err
	}
	defer k.Close()
	links, err := k.uplinks()
	if err != nil {
		return mesh.Uplink{}, err
	}
	own, err := k.ownMTU(links, node)
	if err != nil {
		return mesh.Uplink{}, err
	}
	less, err := k.lessTo(links, own, peers)
	return mesh.Uplink{MTU: own, Less: less}, err
}

// uplinks are the MTUs of the links that can be one, by index.
type uplinks map[int]carried

// carried is what a link carries. A router's advertisement says what its network carries of IPv6, and the kernel takes that for the link.
type carried struct{ ipv4, ipv6 int }

// uplinks lists the links by which nodes can be reached.
func (k *kernel) uplinks() (uplinks, error) {
	list, err := k.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing links: %w", err)
	}
	links := make(uplinks, len(list))
	for _, l := range list {
		a := l.Attrs()
		if a.Name == mesh.Link || a.Flags&net.FlagLoopback != 0 || strings.HasPrefix(a.Name, podlink.Prefix) {
			continue
		}
		ipv6, err := readIPv6MTU(a.Name)
		if err != nil {
			return nil, err
		}
		links[a.Index] = carried{a.MTU, lesser(a.MTU, ipv6)}
	}
	return links, nil
}

// readIPv6MTU returns what a link carries of IPv6, 0 where it has none.
func readIPv6MTU(link string) (int, error) {
	text, err := os.ReadFile(filepath.Join("/proc/sys/net/ipv6/conf", link, "mtu"))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil // also a link that has gone since it was listed
	}
	if err != nil {
		return 0, fmt.Errorf("reading the IPv6 MTU of link %s: %w", link, err)
	}
	mtu, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, fmt.Errorf("reading the IPv6 MTU of link %s: %w", link, err)
	}
	return mtu, nil
}

// carries returns the MTU of a route: its own, which whoever made it knows of the way behind the link, or a router's advertisement said, but no
// more than its link's. Of several ways packets take any. It is 0 for a route that leads to no node.
func (links uplinks) carries(r *netlink.Route) int {
	indexes := []int{r.LinkIndex}
	for _, way := range r.MultiPath {
		indexes = append(indexes, way.LinkIndex)
	}
	least := 0
	for _, i := range indexes {
		mtu := links[i].ipv4
		if r.Family == netlink.FAMILY_V6 {
			mtu = links[i].ipv6
		}
		least = lesser(least, mtu)
	}
	if least == 0 {
		return 0
	}
	return lesser(least, r.MTU)
}

// lesser returns the lesser of two MTUs, of which 0 says nothing.
func lesser(a, b int) int {
	if a == 0 || (b != 0 && b < a) {
		return b
	}
	return a
}

// lessTo returns the addresses to which a route leads that carries less, with its MTU. Each is asked for by itself, because a route may lead
// to a part of a network, and an address that a hostile node gives must not answer for its neighbours'. To ask for a thousand takes the kernel
// a hundredth of a second.
func (k *kernel) lessTo(links uplinks, own int, addresses []netip.Addr) (map[netip.Addr]int, error) {
	less := map[netip.Addr]int{}
	for _, a := range slices.Compact(slices.SortedFunc(slices.Values(addresses), netip.Addr.Compare)) {
		mtu, err := k.mtuTo(links, a)
		if err != nil {
			return nil, err
		}
		if mtu > 0 && mtu < own {
			less[a] = mtu
		}
	}
	return less, nil
}

// mtuTo returns the MTU of the route to an address, of the default routes for the zero address, and 0 where there is no way.
//
// It asks for the route as it stands in the table. What the kernel has learnt of one destination by ICMP is not in there: that expires within
// minutes, and the MTU would go up and down with it.
func (k *kernel) mtuTo(links uplinks, a netip.Addr) (int, error) {
	if !a.IsValid() {
		four, err4 := k.defaultMTU(links, netlink.FAMILY_V4)
		six, err6 := k.defaultMTU(links, netlink.FAMILY_V6)
		return lesser(four, six), errors.Join(err4, err6)
	}
	routes, err := k.RouteGetWithOptions(a.AsSlice(), &netlink.RouteGetOptions{FIBMatch: true})
	if err != nil || len(routes) == 0 {
		return 0, nil //nolint:nilerr // there is no way there
	}
	return links.carries(&routes[0]), nil
}

// ownMTU returns the MTU of the link that has the node's address, or of the default route.
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
		on := &netlink.Route{LinkIndex: a.LinkIndex, Family: family}
		if mtu := links.carries(on); mtu > 0 && prefixOf(a.IPNet).Addr() == node {
			return mtu, nil
		}
	}
	mtu, err := k.defaultMTU(links, family)
	if err == nil && mtu == 0 {
		err = fmt.Errorf("looking for the uplink: no link has the address %s, and there is no default route", node)
	}
	return mtu, err
}

// defaultMTU returns the MTU of a family's default route, 0 where there is none.
func (k *kernel) defaultMTU(links uplinks, family int) (int, error) {
	routes, err := k.RouteList(nil, family)
	if err != nil {
		return 0, fmt.Errorf("listing routes: %w", err)
	}
	for i := range routes {
		if prefixOf(routes[i].Dst).Bits() > 0 {
			continue
		}
		if mtu := links.carries(&routes[i]); mtu > 0 {
			return mtu, nil
		}
	}
	return 0, nil
}

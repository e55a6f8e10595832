package podlink

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Routed says whether a route of the node leads to exactly this address, as it does to that of every pod.
func Routed(a netip.Addr) (bool, error) {
	h, err := netlinksafe.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return false, fmt.Errorf("opening netlink: %w", err)
	}
	defer h.Close()
	routes, err := dump(func() ([]netlink.Route, error) {
		exactly := &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
		return h.RouteListFiltered(family(a), &netlink.Route{Dst: exactly}, netlink.RT_FILTER_DST)
	})
	if err != nil {
		return false, fmt.Errorf("looking for a route to %s: %w", a, err)
	}
	return len(routes) > 0, nil
}

package wgdevice

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/podcidr"
)

// RouteDrift tells where the routes and rules are not as an encrypted mesh wants them, given the device's peers as they are, and which ways to
// pods another program's route or rule leads past the tunnel. It changes nothing. Of a node without the link it tells nothing.
func (d *Device) RouteDrift(want mesh.Config, peers []PeerStatus) ([]string, error) {
	k, err := openKernel()
	if err != nil {
		return nil, err
	}
	defer k.Close()
	link, err := k.link()
	if err != nil || link == nil {
		return nil, err
	}
	m := memory{encrypted: true, link: link.Attrs().Index}
	var hosts []route
	for _, p := range peers {
		for _, a := range p.NodeAddresses {
			hosts = append(hosts, m.hostRoute(netip.PrefixFrom(a, a.BitLen())))
		}
	}
	actual, err := k.routes()
	if err != nil {
		return nil, err
	}
	held, _ := heldRoutes(want.Hosts, append(hosts, actual...))
	wanted := slices.Concat(unreachableRoutes(want.Unreachable), m.meshRoutes(want.Routes), hosts, held)
	rules, err := k.rules()
	if err != nil {
		return nil, err
	}
	return slices.Concat(describeRoutes(wanted, actual), describeRules(nodeRules(want), rules), k.astray(want, m.link)), nil
}

// describeRoutes tells how our routes differ from those that are wanted.
func describeRoutes(wanted, actual []route) (drift []string) {
	add, replace, remove := routeDelta(wanted, actual)
	for _, r := range add {
		drift = append(drift, r.String()+" is missing")
	}
	for _, r := range replace {
		drift = append(drift, r.String()+" leads elsewhere, or has another source or MTU")
	}
	for _, r := range remove {
		drift = append(drift, r.String()+" is not planned")
	}
	return drift
}

// describeRules tells how our rules differ from those that are wanted.
func describeRules(wanted []netip.Prefix, actual []netlink.Rule) (drift []string) {
	add, remove := ruleDelta(wanted, actual)
	for _, source := range add {
		drift = append(drift, fmt.Sprintf("the rule from %s to table %d is missing", source, nodeTable))
	}
	for _, r := range remove {
		drift = append(drift, fmt.Sprintf("the rule from %s to table %d is not planned", prefixOf(r.Src), r.Table))
	}
	return drift
}

// astray tells which routes do not count for what the node and its pods send although they stand, because others go before them, or rules by
// destination or by the pods' addresses. One address stands for all of a range.
func (k *kernel) astray(want mesh.Config, link int) (drift []string) {
	for _, p := range want.Routes {
		address := podcidr.NodeAddress(p.Destination)
		options := &netlink.RouteGetOptions{FIBMatch: true}
		for _, own := range want.Addresses {
			if own.Addr().Is4() == address.Is4() {
				options.SrcAddr = own.Addr().AsSlice()
			}
		}
		routes, err := k.RouteGetWithOptions(address.AsSlice(), options)
		if errors.Is(err, unix.EHOSTUNREACH) || errors.Is(err, unix.ENETUNREACH) {
			continue // the way is missing, and no other one there
		}
		if err != nil || len(routes) == 0 || routes[0].LinkIndex != link {
			drift = append(drift, fmt.Sprintf("packets to %s do not go to %s: another route or rule goes before Warren's, see `ip route get %s`",
				p.Destination, mesh.Link, address))
		}
	}
	return drift
}

// String names the route for an operator.
func (r route) String() string {
	switch {
	case r.metric == metricUnreachable && r.table == nodeTable:
		return fmt.Sprintf("the unreachable route to %s in table %d", r.destination, nodeTable)
	case r.metric == metricUnreachable:
		return fmt.Sprintf("the unreachable route to %s", r.destination)
	case r.table == nodeTable:
		return fmt.Sprintf("the route to %s in table %d", r.destination, nodeTable)
	default:
		return fmt.Sprintf("the route to %s", r.destination)
	}
}

package wgdevice

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/mesh"
)

// RouteProtocol is the protocol number in every route of ours, by which it is known as ours.
const RouteProtocol = 87

// Metrics. The net below the other routes has a metric that no other program chooses by chance; the kernel's own default
// differs by family.
const (
	metricUnreachable = 4278198272
	metricIPv4        = 0
	metricIPv6        = 1024
)

// nodeTable is the table of the routes to nodes' own addresses, which are for pods alone.
const nodeTable = 87

// route is a route, as far as we set it.
type route struct {
	routeID
	// link is the index of the link, 0 where the kernel finds it from via or where there is none.
	link   int
	via    netip.Addr
	source netip.Addr
	// mtu is the greatest packet for the way, 0 where it is the link's.
	mtu int
}

// routeID is what the kernel tells our routes apart by.
type routeID struct {
	destination netip.Prefix
	metric      int
	table       int
}

// unreachableRoutes are the net below all other routes: what no other route takes is refused, not sent to the default.
func unreachableRoutes(prefixes []netip.Prefix) []route {
	var routes []route
	for _, p := range prefixes {
		routes = append(routes, unreachableRoute(p, unix.RT_TABLE_MAIN))
	}
	return routes
}

func unreachableRoute(destination netip.Prefix, table int) route {
	return route{routeID: routeID{destination.Masked(), metricUnreachable, table}}
}

// heldRoutes are the nets below the routes to nodes' own addresses: what pods send to such an address goes nowhere else once it went into the
// tunnel, whatever takes link, peer or key away, for as long as a Node claims it. The routes that stand tell which those are, so that it also
// holds where daemon and tunnel begin anew. loose are routes to addresses that no Node claims.
func heldRoutes(hosts []mesh.Host, stand []route) (held, loose []route) {
	claimed := make(map[netip.Addr]bool, len(hosts))
	for _, h := range hosts {
		claimed[h.Address] = true
	}
	nets := map[routeID]route{}
	for _, r := range stand {
		switch {
		case r.table != nodeTable:
		case claimed[r.destination.Addr()]:
			net := unreachableRoute(r.destination, nodeTable)
			nets[net.routeID] = net
		default:
			loose = append(loose, r)
		}
	}
	return slices.Collect(maps.Values(nets)), loose
}

// meshRoutes are the routes to other nodes' pods: through the link, or by the nodes' addresses where the mesh has none.
func (m *memory) meshRoutes(planned []mesh.Route) []route {
	routes := make([]route, 0, len(planned))
	for _, p := range planned {
		r := route{routeID: unicastID(p.Destination, unix.RT_TABLE_MAIN), mtu: p.MTU}
		if m.encrypted {
			r.link, r.source = m.link, p.Source
		} else {
			r.via = p.Via
		}
		routes = append(routes, r)
	}
	return routes
}

// hostRoutes are the routes to the nodes' own addresses that the peers carry.
func (m *memory) hostRoutes() []route {
	var routes []route
	for _, p := range m.peers {
		for _, host := range p.hosts() {
			routes = append(routes, m.hostRoute(host))
		}
	}
	slices.SortFunc(routes, func(a, b route) int { return comparePrefixes(a.destination, b.destination) })
	return routes
}

// hostRoute leads pods to a node's own address.
func (m *memory) hostRoute(host netip.Prefix) route {
	return route{routeID: unicastID(host, nodeTable), link: m.link}
}

func unicastID(destination netip.Prefix, table int) routeID {
	if destination.Addr().Is4() {
		return routeID{destination.Masked(), metricIPv4, table}
	}
	return routeID{destination.Masked(), metricIPv6, table}
}

func routesByID(routes []route) map[routeID]route {
	byID := make(map[routeID]route, len(routes))
	for _, r := range routes {
		byID[r.routeID] = r
	}
	return byID
}

// patchRoutes writes routes without a look at what stands, which is remembered.
func (m *memory) patchRoutes(k *kernel, want, gone []route, changes *Changes) error {
	var stand []route
	for _, r := range slices.Concat(want, gone) {
		if old, stands := m.routes[r.routeID]; stands {
			stand = append(stand, old)
		}
	}
	add, replace, remove := routeDelta(want, stand)
	for _, r := range want {
		m.routes[r.routeID] = r
	}
	for _, r := range remove {
		delete(m.routes, r.routeID)
	}
	return k.writeRoutes(add, replace, remove, changes)
}

// routeDelta compares wanted routes with those of ours that stand: which are to be added, which take the place of one
// that stands, and which are to go.
func routeDelta(wanted, actual []route) (add, replace, remove []route) {
	have := routesByID(actual)
	want := make(map[routeID]bool, len(wanted))
	for _, r := range wanted {
		want[r.routeID] = true
		old, stands := have[r.routeID]
		switch {
		case !stands:
			add = append(add, r)
		case old != r:
			replace = append(replace, r)
		}
	}
	for _, r := range actual {
		if !want[r.routeID] {
			remove = append(remove, r)
		}
	}
	return add, replace, remove
}

// putRoutes adds and replaces routes, and removes none.
func (k *kernel) putRoutes(wanted []route, changes *Changes) error {
	actual, err := k.routes()
	if err != nil {
		return err
	}
	add, replace, _ := routeDelta(wanted, actual)
	return k.writeRoutes(add, replace, nil, changes)
}

// syncRoutes makes our routes those that are wanted.
func (k *kernel) syncRoutes(wanted []route, changes *Changes) error {
	actual, err := k.routes()
	if err != nil {
		return err
	}
	add, replace, remove := routeDelta(wanted, actual)
	return k.writeRoutes(add, replace, remove, changes)
}

// writeRoutes writes what it can, adds before it removes, and reports each route that it could not write.
func (k *kernel) writeRoutes(add, replace, remove []route, changes *Changes) error {
	var errs []error
	try := func(what string, r route, write func(*netlink.Route) error) {
		switch err := write(r.netlink()); {
		case err == nil:
			changes.Routes++
		case errors.Is(err, unix.EEXIST):
			errs = append(errs, fmt.Errorf("%s route to %s: another program has a route there; delete it with: ip route del %s", what, r.destination, r.place()))
		default:
			errs = append(errs, fmt.Errorf("%s route to %s: %w", what, r.destination, err))
		}
	}
	for _, r := range add {
		try("adding", r, k.RouteAdd) // not replace: a route of another program there is not ours to take
	}
	for _, r := range replace {
		try("replacing", r, k.RouteReplace)
	}
	for _, r := range remove {
		try("deleting", r, func(n *netlink.Route) error {
			n.Scope = netlink.SCOPE_NOWHERE // of any scope
			if err := k.RouteDel(n); !errors.Is(err, unix.ESRCH) {
				return err
			}
			return nil // somebody else did it
		})
	}
	return errors.Join(errs...)
}

// place is the route as ip names what is in its place.
func (r route) place() string {
	place := r.destination.String()
	if r.metric == metricUnreachable {
		place = fmt.Sprintf("unreachable %s metric %d", r.destination, r.metric)
	}
	if r.table == nodeTable {
		place += fmt.Sprintf(" table %d", r.table)
	}
	return place
}

// routes lists our routes.
func (k *kernel) routes() ([]route, error) {
	var ours []route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		filter := &netlink.Route{Table: unix.RT_TABLE_UNSPEC, Protocol: RouteProtocol} // of all tables
		list, err := k.RouteListFiltered(family, filter, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			return nil, fmt.Errorf("listing routes: %w", err)
		}
		for i := range list {
			ours = append(ours, routeOf(&list[i]))
		}
	}
	return ours, nil
}

// routeOf converts from the kernel's view.
func routeOf(n *netlink.Route) route {
	r := route{routeID: routeID{prefixOf(n.Dst), n.Priority, n.Table}, mtu: n.MTU}
	r.via, _ = netip.AddrFromSlice(n.Gw)
	r.source, _ = netip.AddrFromSlice(n.Src)
	if n.Type == unix.RTN_UNICAST && !r.via.IsValid() {
		r.link = n.LinkIndex
	}
	return r
}

// netlink converts to the kernel's view.
func (r route) netlink() *netlink.Route {
	n := &netlink.Route{
		Dst:       ipNet(r.destination),
		Priority:  r.metric,
		Protocol:  RouteProtocol,
		Table:     r.table,
		Type:      unix.RTN_UNICAST,
		LinkIndex: r.link,
		Gw:        r.via.AsSlice(),
		Src:       r.source.AsSlice(),
		MTU:       r.mtu,
	}
	switch {
	case r.metric == metricUnreachable:
		n.Type = unix.RTN_UNREACHABLE
	case r.link != 0 && r.destination.Addr().Is4():
		n.Scope = netlink.SCOPE_LINK
	}
	return n
}

package mesh

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/podcidr"
)

// What WireGuard adds to a packet: the outer IP header, UDP, and its own 32 bytes.
const (
	overheadIPv4 = 60
	overheadIPv6 = 80
)

// ethernetMTU is assumed of an uplink that is not known.
const ethernetMTU = 1500

// minIPv6MTU is the least MTU on which the kernel speaks IPv6 (RFC 8200, section 5).
const minIPv6MTU = 1280

// Options are what the plan depends on besides the cluster's objects.
type Options struct {
	// ClusterCIDRs hold every podCIDR; empty where they are not known.
	ClusterCIDRs []netip.Prefix
	ListenPort   uint16
	// UplinkMTU is that of the link which carries the node's traffic to other nodes; 0 where it is not known yet, which counts
	// as 1500.
	UplinkMTU int
	// MTU overrides what follows from UplinkMTU; 0 for no override.
	MTU       int
	Encrypted bool
	// ServiceCIDRs hold no node's endpoint.
	ServiceCIDRs []netip.Prefix
	// NodeCIDRs hold the nodes' addresses that pods may reach through the tunnel; empty where they reach none so.
	NodeCIDRs []netip.Prefix
}

// Plan returns the mesh of the node s.Self. A claim of another node that cannot be right is a Problem and not in the
// Config: WireGuard moves a prefix to its last claimant without a word, so a refused claim must never reach the device.
// Where two nodes claim one thing the older node keeps it, so that every node comes to the same mesh.
func Plan(s cluster.Snapshot, o Options) (Config, []cluster.Problem) {
	r := judge(s, o)
	self, ok := r.claims[s.Self]
	if !ok {
		r.refuse(nodeUnknown(s.Self))
	} else if len(self.node.PodCIDRs) == 0 {
		r.refuse(nodeWithoutPodCIDR(s.Self))
	}

	c := Config{Encrypted: o.Encrypted, PodCIDRs: slices.Clone(self.podCIDRs), KnownPodCIDRs: r.known()}
	if o.Encrypted {
		c.ListenPort = o.ListenPort
		for _, p := range self.podCIDRs {
			a := podcidr.NodeAddress(p)
			c.Addresses = append(c.Addresses, netip.PrefixFrom(a, a.BitLen()))
		}
		// What must never fall to the default route.
		c.Unreachable = slices.Clone(o.ClusterCIDRs)
		if len(o.ClusterCIDRs) == 0 {
			c.Unreachable = slices.Clone(c.KnownPodCIDRs)
		}
	}
	for _, n := range s.Nodes {
		if n.Name == s.Self {
			continue
		}
		if o.Encrypted {
			r.addPeer(&c, r.claims[n.Name], self)
		} else {
			r.addPlain(&c, r.claims[n.Name])
		}
	}
	c.MTU = mtu(c.Peers, self, o)
	if c.MTU < minIPv6MTU && slices.ContainsFunc(self.podCIDRs, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		r.refuse(mtuTooSmall(s.Self, c.MTU))
	}
	sortConfig(&c)
	return c, cluster.SortProblems(r.problems)
}

// addPeer adds another node as a peer, with routes through the link.
func (r *registry) addPeer(c *Config, n, self claim) {
	endpoint, ok := r.reachable(n)
	if !ok || n.key == nil {
		return
	}
	if preferred := slices.IndexFunc(n.addresses, self.prefers); preferred >= 0 {
		endpoint = n.addresses[preferred]
	}
	c.Peers = append(c.Peers, Peer{
		Node:       n.node.Name,
		PublicKey:  n.key.PublicKey,
		Endpoint:   netip.AddrPortFrom(endpoint, n.key.Port),
		AllowedIPs: slices.SortedFunc(slices.Values(n.podCIDRs), comparePrefixes),
	})
	for _, own := range c.Addresses {
		for _, p := range n.podCIDRs {
			// A family in which this node has no address of its own gets no route: the peer would refuse what comes from
			// any other address, and without a route the sender learns it at once.
			if p.Addr().Is4() == own.Addr().Is4() {
				c.Routes = append(c.Routes, Route{Destination: p, Source: own.Addr()})
			}
		}
	}
}

// addPlain adds routes to another node's pods by the node's address, for a mesh without encryption.
func (r *registry) addPlain(c *Config, n claim) {
	if _, ok := r.reachable(n); !ok {
		return
	}
	for _, p := range n.podCIDRs {
		hop := slices.IndexFunc(n.addresses, func(a netip.Addr) bool { return a.Is4() == p.Addr().Is4() })
		if hop < 0 {
			r.refuse(nodeWithoutNextHop(n.node.Name, p))
			continue
		}
		c.Routes = append(c.Routes, Route{Destination: p, Via: n.addresses[hop]})
	}
}

// reachable returns the first address of a node that has both pods and an address.
func (r *registry) reachable(n claim) (netip.Addr, bool) {
	switch {
	case len(n.node.PodCIDRs) == 0:
		r.refuse(nodeWithoutPodCIDR(n.node.Name))
		return netip.Addr{}, false
	case len(n.node.Addresses) == 0:
		r.refuse(nodeWithoutAddress(n.node.Name))
		return netip.Addr{}, false
	case len(n.podCIDRs) == 0 || len(n.addresses) == 0: // each refused claim is a Problem already
		return netip.Addr{}, false
	}
	return n.addresses[0], true
}

// prefers says whether endpoints should have the family of an address: IPv4, except on a node that has only IPv6.
func (c claim) prefers(a netip.Addr) bool {
	only6 := len(c.addresses) > 0 && !slices.ContainsFunc(c.addresses, netip.Addr.Is4)
	return a.Is4() != only6
}

// known returns the accepted podCIDRs of all nodes.
func (r *registry) known() []netip.Prefix {
	var known []netip.Prefix
	for _, c := range r.claims {
		known = append(known, c.podCIDRs...)
	}
	return known
}

// mtu returns the MTU of the link and of the pods.
func mtu(peers []Peer, self claim, o Options) int {
	uplink := cmp.Or(o.UplinkMTU, ethernetMTU)
	switch {
	case o.MTU > 0:
		return o.MTU
	case !o.Encrypted:
		return uplink
	case slices.ContainsFunc(peers, func(p Peer) bool { return p.Endpoint.Addr().Is6() }),
		len(peers) == 0 && !self.prefers(netip.IPv4Unspecified()):
		return uplink - overheadIPv6
	default:
		return uplink - overheadIPv4
	}
}

// sortConfig brings a Config into its order.
func sortConfig(c *Config) {
	slices.SortFunc(c.Addresses, comparePrefixes)
	slices.SortFunc(c.PodCIDRs, comparePrefixes)
	slices.SortFunc(c.KnownPodCIDRs, comparePrefixes)
	slices.SortFunc(c.Unreachable, comparePrefixes)
	c.Unreachable = slices.Compact(c.Unreachable)
	slices.SortFunc(c.Peers, func(a, b Peer) int { return cmp.Compare(a.Node, b.Node) })
	slices.SortFunc(c.Routes, func(a, b Route) int { return comparePrefixes(a.Destination, b.Destination) })
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

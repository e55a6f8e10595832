// Package mesh plans the WireGuard mesh of a node from the cluster's Nodes: the link, its addresses, one peer for every
// other node, and the routes. It is pure and never sees a private key; pkg/wgdevice makes the kernel agree with the plan.
package mesh

import "net/netip"

// Link is the name of the WireGuard link.
const Link = "warren0"

// Config is everything that the mesh wants on a node. Slices are sorted.
type Config struct {
	// Encrypted is false with --encryption off: then there is no link, and Routes go by the nodes' addresses.
	Encrypted  bool
	ListenPort uint16
	// PodCIDRs are the own node's, KnownPodCIDRs those of all nodes: the claims that were accepted.
	PodCIDRs      []netip.Prefix
	KnownPodCIDRs []netip.Prefix
	// Strays are the addresses of the own node's pods that lie outside of PodCIDRs: a pod keeps what it got from those before.
	Strays []netip.Addr
	// MTU is that of the link and of the pods.
	MTU int
	// Addresses are the node's own: the first address of each of its podCIDRs, as /32 and /128 on the link.
	Addresses []netip.Prefix
	Peers     []Peer
	Routes    []Route
	// Hosts are other nodes' own addresses that may be in the tunnel, as their Nodes claim them, whatever becomes of the peers: what went into
	// the tunnel must not fall to the default route because a key or a podCIDR counts no more.
	Hosts []Host
	// Unreachable are the prefixes that must never fall to the default route: a route of type unreachable with a high metric.
	Unreachable []netip.Prefix
}

// Peer is another node.
type Peer struct {
	Node      string
	PublicKey [32]byte
	// Next is the key that the node is about to use, the zero key where it changes none: the device knows it as a second peer
	// without allowed IPs, and gives it those of the first with its first handshake.
	Next [32]byte
	// Endpoint is invalid for a node behind NAT: the device learns it from the node's handshakes.
	Endpoint netip.AddrPort
	// AllowedIPs are the node's podCIDRs that were accepted.
	AllowedIPs []netip.Prefix
	// NodeAddresses are the node's own addresses, as it says, that pods may reach through the tunnel once the peer was found to receive at
	// that very address. Another peer may have the same ones.
	NodeAddresses []netip.Addr
}

// Route leads to a remote node's podCIDR.
type Route struct {
	Destination netip.Prefix
	// Source is the node's own first address in that family, so that policies can name the node's own traffic. Where pods reach nodes'
	// InternalIPs through the tunnel, it is the node's own one.
	Source netip.Addr
	// Via is the next hop with encryption off; invalid where the route goes through the link.
	Via netip.Addr
	// MTU is the greatest packet that fits on the way where that is less than the link's; 0 elsewhere.
	MTU int
}

// Host is a node's own address, as its Node claims it.
type Host struct {
	Address netip.Addr
	Node    string
}

// Change is what differs between two Configs, but for the Hosts: those are for a Config that is applied as a whole.
type Change struct {
	// Link is true where anything but Peers, Routes, Hosts and KnownPodCIDRs differs: then the Config has to be applied as a whole.
	Link bool
	// Peers are new or differ, as they are now; RemovedPeers are as they were. No peer is in both. Both are sorted by node.
	Peers, RemovedPeers []Peer
	// Routes are new or differ; RemovedRoutes are gone. Both are sorted by destination.
	Routes, RemovedRoutes []Route
}

// Empty says whether nothing differs.
func (c Change) Empty() bool {
	return !c.Link && len(c.Peers)+len(c.RemovedPeers)+len(c.Routes)+len(c.RemovedRoutes) == 0
}

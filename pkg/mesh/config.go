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
	// MTU is that of the link and of the pods.
	MTU int
	// Addresses are the node's own: the first address of each of its podCIDRs, as /32 and /128 on the link.
	Addresses []netip.Prefix
	Peers     []Peer
	Routes    []Route
	// Unreachable are the prefixes that must never fall to the default route: a route of type unreachable with a high metric.
	Unreachable []netip.Prefix
}

// Peer is another node.
type Peer struct {
	Node      string
	PublicKey [32]byte
	Endpoint  netip.AddrPort
	// AllowedIPs are the node's podCIDRs that were accepted.
	AllowedIPs []netip.Prefix
}

// Route leads to a remote node's podCIDR.
type Route struct {
	Destination netip.Prefix
	// Source is the node's own first address in that family, so that policies can name the node's own traffic.
	Source netip.Addr
	// Via is the next hop with encryption off; invalid where the route goes through the link.
	Via netip.Addr
}

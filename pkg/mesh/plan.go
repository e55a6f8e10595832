package mesh

import (
	"net/netip"

	"github.com/warren-cni/warren/pkg/cluster"
)

// What WireGuard adds to a packet: the outer IP header, UDP, and its own 32 bytes.
const (
	overheadIPv4 = 60
	overheadIPv6 = 80
)

// padding: WireGuard fills a packet up to a multiple of so many bytes (whitepaper, section 5.4.6), as far as its link's MTU allows.
// What fits a way that takes less must fit when it is filled up.
const padding = 16

// ethernetMTU is assumed of an uplink that is not known.
const ethernetMTU = 1500

// minIPv6MTU is the least MTU on which the kernel speaks IPv6 (RFC 8200, section 5).
const minIPv6MTU = 1280

// minUplinkMTU leaves the packet that every IPv4 host has to take (RFC 791, section 3.1): 576 bytes. maxMTU is what IP can do.
const (
	minUplinkMTU = 576 + overheadIPv6
	maxMTU       = 65535
)

// Options are what the plan depends on besides the cluster's objects.
type Options struct {
	// ClusterCIDRs hold every podCIDR; empty where they are not known.
	ClusterCIDRs []netip.Prefix
	ListenPort   uint16
	// Uplink is for Plan.
	Uplink Uplink
	// MTU overrides what follows from the MTU of the uplink; 0 for no override.
	MTU       int
	Encrypted bool
	// ServiceCIDRs hold no node's endpoint.
	ServiceCIDRs []netip.Prefix
	// NodeCIDRs hold the nodes' addresses that pods may reach through the tunnel; empty where they reach none so.
	NodeCIDRs []netip.Prefix
}

// Uplink is what the node's own links carry on the way to other nodes.
type Uplink struct {
	// MTU is that of the link which has the node's address; 0 where it is not known yet, which counts as 1500.
	MTU int
	// Less are the endpoints that are reached by a route which carries less, with its MTU; the zero address stands for nodes whose endpoint
	// is not known because they come to us. A node says itself where others reach it, so this concerns the way to that node alone.
	Less map[netip.Addr]int
}

// Plan returns the mesh of the node s.Self. A claim of another node that cannot be right is a Problem and not in the
// Config: WireGuard moves a prefix to its last claimant without a word, so a refused claim must never reach the device.
// Where two nodes claim one prefix the older node keeps it, so that every node comes to the same mesh. A key belongs to the node
// that proves it.
func Plan(s cluster.Snapshot, o Options) (Config, []cluster.Problem) {
	p := NewPlanner(s.Self, o)
	p.Update(s.Delta().Nodes, o.Uplink)
	return p.Config(), p.Problems()
}

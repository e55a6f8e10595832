package mesh

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/podcidr"
)

// claim is what may be used of what a Node says of itself.
type claim struct {
	node      cluster.Node
	addresses []netip.Addr
	podCIDRs  []netip.Prefix
	// key is nil where there is none.
	key *cluster.WireGuard
}

// registry holds the accepted claims of all nodes.
type registry struct {
	self         cluster.Node
	clusterCIDRs []netip.Prefix
	claims       map[string]claim
	addresses    map[netip.Addr]string
	// underlay are the addresses that no podCIDR may hold.
	underlay []netip.Addr
	keys     map[[32]byte]string
	podCIDRs []owned
	problems []cluster.Problem
}

// owned is an accepted podCIDR.
type owned struct {
	prefix netip.Prefix
	node   string
}

// judge accepts and refuses the claims of all nodes, the oldest node first.
func judge(s cluster.Snapshot, o Options) *registry {
	r := &registry{
		clusterCIDRs: o.ClusterCIDRs,
		claims:       make(map[string]claim, len(s.Nodes)),
		addresses:    make(map[netip.Addr]string, len(s.Nodes)),
		keys:         make(map[[32]byte]string, len(s.Nodes)),
	}
	// What the own node is, it knows better than any other node, whatever their ages.
	r.self, _ = s.Node(s.Self)
	for _, a := range r.self.Addresses {
		r.addresses[a.Unmap()] = s.Self
		r.underlay = append(r.underlay, a.Unmap())
	}
	if r.self.WireGuard != nil {
		r.keys[r.self.WireGuard.PublicKey] = s.Self
	}

	byAge := slices.SortedFunc(slices.Values(s.Nodes), func(a, b cluster.Node) int {
		return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.Name, b.Name))
	})
	for _, n := range byAge {
		c := claim{node: n}
		for _, a := range n.Addresses {
			if a = a.Unmap(); r.acceptAddress(n.Name, a) {
				r.addresses[a] = n.Name
				c.addresses = append(c.addresses, a)
				if len(o.ClusterCIDRs) == 0 { // else no podCIDR can hold it: it is outside of the cluster CIDR, and they are inside
					r.underlay = append(r.underlay, a)
				}
			}
		}
		for i, p := range n.PodCIDRs {
			if r.acceptPodCIDR(n.Name, i, p) {
				r.podCIDRs = append(r.podCIDRs, owned{p, n.Name})
				c.podCIDRs = append(c.podCIDRs, p)
			}
		}
		if o.Encrypted && r.acceptKey(n) {
			r.keys[n.WireGuard.PublicKey] = n.Name
			c.key = n.WireGuard
		}
		r.claims[n.Name] = c
	}
	return r
}

// PodCIDRs returns the podCIDRs that each node may have, in the order of its Node: what Plan refuses is not among them, and must not
// give its pods the identity of another node's addresses either.
func PodCIDRs(s cluster.Snapshot, clusterCIDRs []netip.Prefix) map[string][]netip.Prefix {
	accepted := make(map[string][]netip.Prefix, len(s.Nodes))
	for name, c := range judge(s, Options{ClusterCIDRs: clusterCIDRs}).claims {
		accepted[name] = c.podCIDRs
	}
	return accepted
}

// acceptAddress says whether a node may have that address. An address among the pods' would make the tunnel carry its own
// packets, and one of another node would make this node send that one's packets elsewhere.
func (r *registry) acceptAddress(node string, a netip.Addr) bool {
	if !a.IsGlobalUnicast() {
		r.refuse(addressUnusable(node, a))
		return false
	}
	if owner, taken := r.addresses[a]; taken && owner != node {
		r.refuse(addressTaken(node, a, owner))
		return false
	}
	for _, p := range r.clusterCIDRs {
		if p.Contains(a) {
			r.refuse(addressAmongPods(node, a, p))
			return false
		}
	}
	for _, o := range r.podCIDRs {
		if o.prefix.Contains(a) {
			r.refuse(addressAmongPods(node, a, o.prefix))
			return false
		}
	}
	return true
}

// acceptPodCIDR says whether a node may have that podCIDR.
func (r *registry) acceptPodCIDR(node string, index int, p netip.Prefix) bool {
	inside := func(c netip.Prefix) bool { return c.Bits() <= p.Bits() && c.Contains(p.Addr()) }
	switch {
	case !podcidr.NodeAddress(p).IsValid() || overlapsReserved(p):
		r.refuse(podCIDRUnusable(node, index, p))
		return false
	case len(r.clusterCIDRs) > 0 && !slices.ContainsFunc(r.clusterCIDRs, inside):
		r.refuse(podCIDROutside(node, index, p, r.clusterCIDRs))
		return false
	}
	for _, o := range r.podCIDRs {
		if o.prefix.Overlaps(p) {
			r.refuse(podCIDROverlaps(node, index, p, o))
			return false
		}
	}
	for _, a := range r.underlay {
		if p.Contains(a) {
			r.refuse(podCIDRHoldsNode(node, index, p, a, r.addresses[a]))
			return false
		}
	}
	return true
}

// acceptKey says whether a node has a public key that is no other node's. The own node needs none: the device has it.
func (r *registry) acceptKey(n cluster.Node) bool {
	key := n.WireGuard
	if key == nil || key.PublicKey == [32]byte{} || key.Port == 0 {
		if n.Name != r.self.Name {
			r.refuse(nodeWithoutKey(n.Name))
		}
		return false
	}
	if owner, taken := r.keys[key.PublicKey]; taken && owner != n.Name {
		r.refuse(keyTaken(n.Name, owner))
		return false
	}
	return true
}

func (r *registry) refuse(p cluster.Problem) { r.problems = append(r.problems, p) }

// overlapsReserved says whether a prefix holds addresses that are never a pod's: loopback, link-local, multicast.
func overlapsReserved(p netip.Prefix) bool {
	return slices.ContainsFunc([]string{"127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/96", "fe80::/10", "ff00::/8"},
		func(s string) bool { return netip.MustParsePrefix(s).Overlaps(p) })
}

package mesh

import (
	"cmp"
	"iter"
	"net/netip"
	"slices"

	"github.com/gaissmai/bart"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/podcidr"
)

// claim is a range of addresses that a Node says is its own: a podCIDR, or one address.
type claim struct {
	of     *member
	prefix netip.Prefix
	// field is where the Node says so; index is the position there, for the order of a node's claims.
	field string
	index int
	// isAddress is true for an address of the node itself, which is none of a pod's.
	isAddress bool
	// unfit says what is wrong with the claim whatever the others are; the zero Problem where nothing is.
	unfit cluster.Problem
	// refusal says why the claim does not count, once it is judged; the zero Problem where it counts.
	refusal cluster.Problem
	judged  bool
}

// counts says whether what the Node says is used.
func (c *claim) counts() bool { return c.judged && c.refusal == cluster.Problem{} }

// holds says whether the claim keeps others out. What the own addresses are, the node knows better than anybody, fit or not.
func (c *claim) holds() bool { return c.counts() || c.isOwnAddress() }

func (c *claim) isOwnAddress() bool { return c.isAddress && c.of.own }

// isEndpoint says whether the claim is the endpoint that the operator gave.
func (c *claim) isEndpoint() bool { return c.field == fieldEndpoint }

// compareClaims orders claims by who keeps what two of them name: the older node, so that every node comes to the same mesh; but the own
// addresses come before everything.
func compareClaims(a, b *claim) int {
	return cmp.Or(
		falseFirst(!a.isOwnAddress(), !b.isOwnAddress()), compareAges(a.of, b.of),
		falseFirst(!a.isAddress, !b.isAddress), cmp.Compare(a.index, b.index),
	)
}

// claims are those of all nodes, each judged by what the others claim.
//
// A claim counts if no claim before it in the order that counts itself is in its way, so what one comes to depends on earlier ones
// alone. A change is therefore followed to where it ends: those in whose way a claim is no longer, or is now, are judged again.
type claims struct {
	clusterCIDRs, serviceCIDRs []netip.Prefix
	byPrefix                   bart.Table[[]*claim]
	// again are the claims to judge.
	again map[*claim]struct{}
}

// add takes in a claim, to be judged.
func (s *claims) add(c *claim) {
	s.again[c] = struct{}{}
	if s.concernsOthers(c) {
		s.byPrefix.Modify(c.prefix, func(list []*claim, _ bool) ([]*claim, bool) { return append(list, c), false })
	}
}

// remove forgets a claim.
func (s *claims) remove(c *claim) {
	delete(s.again, c)
	if !s.concernsOthers(c) {
		return
	}
	s.byPrefix.Modify(c.prefix, func(list []*claim, _ bool) ([]*claim, bool) {
		list = slices.DeleteFunc(slices.Clone(list), func(o *claim) bool { return o == c })
		return list, len(list) == 0
	})
	if c.holds() {
		s.doubt(c)
	}
}

// concernsOthers says whether a claim can be in the way of another. Where the cluster CIDR is known, podCIDRs are inside and
// addresses are not.
func (s *claims) concernsOthers(c *claim) bool {
	if c.isAddress && len(s.clusterCIDRs) > 0 {
		return c.of.own
	}
	return c.unfit == cluster.Problem{} || c.isOwnAddress()
}

// settle judges what has to be judged and tells of each claim that comes to something else than before.
func (s *claims) settle(changed func(*claim)) {
	for len(s.again) > 0 {
		batch := make([]*claim, 0, len(s.again))
		for c := range s.again {
			batch = append(batch, c)
		}
		s.again = map[*claim]struct{}{}
		slices.SortFunc(batch, compareClaims)
		for _, c := range batch {
			before, held := *c, c.judged && c.holds()
			c.refusal, c.judged = s.judge(c), true
			if c.holds() != held {
				s.doubt(c)
			}
			if before.refusal != c.refusal || !before.judged {
				changed(c)
			}
		}
	}
}

// doubt has those judged again in whose way a claim may be.
func (s *claims) doubt(c *claim) {
	for o := range s.inTheWay(c) {
		if compareClaims(c, o) < 0 {
			s.again[o] = struct{}{}
		}
	}
}

// judge says why a claim does not count.
func (s *claims) judge(c *claim) cluster.Problem {
	if c.unfit != (cluster.Problem{}) {
		return c.unfit
	}
	var keeper *claim
	for o := range s.inTheWay(c) {
		if o.holds() && compareClaims(o, c) < 0 && (keeper == nil || compareClaims(o, keeper) < 0) {
			keeper = o
		}
	}
	switch {
	case keeper == nil:
		return cluster.Problem{}
	case c.isAddress:
		return addressInPodCIDR(c, keeper)
	case keeper.isAddress:
		return podCIDRHoldsNode(c, keeper)
	default:
		return podCIDROverlaps(c, keeper)
	}
}

// inTheWay returns the claims that cannot count beside that one. An address is not in the way of another: it is to be the same
// for two nodes only by mistake or malice, but who is right does not show, and WireGuard asks for the key.
func (s *claims) inTheWay(c *claim) iter.Seq[*claim] {
	return func(yield func(*claim) bool) {
		each := func(list []*claim) bool {
			for _, o := range list {
				if o != c && (!o.isAddress || !c.isAddress) && !yield(o) {
					return false
				}
			}
			return true
		}
		for p, list := range s.byPrefix.Supernets(c.prefix) {
			if p != c.prefix && !each(list) { // it is among its subnets too
				return
			}
		}
		for _, list := range s.byPrefix.Subnets(c.prefix) {
			if !each(list) {
				return
			}
		}
	}
}

// unfitAddress says what is wrong with an address of a node whatever the others are. One among the pods' would make the tunnel
// carry its own packets, and one of a Service would send them to whatever is behind it.
func (s *claims) unfitAddress(c *claim) cluster.Problem {
	a := c.prefix.Addr()
	if !a.IsGlobalUnicast() || overlapsAny(c.prefix, "0.0.0.0/8", "240.0.0.0/4", "::/96") {
		return addressUnusable(c)
	}
	for _, p := range s.clusterCIDRs {
		if p.Contains(a) {
			return addressInside(c, p, "pods'")
		}
	}
	for _, p := range s.serviceCIDRs {
		if p.Contains(a) {
			return addressInside(c, p, "Services'")
		}
	}
	return cluster.Problem{}
}

// unfitPodCIDR says what is wrong with a podCIDR whatever the others are.
func (s *claims) unfitPodCIDR(c *claim) cluster.Problem {
	inside := func(p netip.Prefix) bool { return p.Bits() <= c.prefix.Bits() && p.Contains(c.prefix.Addr()) }
	switch {
	case !podcidr.NodeAddress(c.prefix).IsValid(),
		overlapsAny(c.prefix, "127.0.0.0/8", "169.254.0.0/16", "224.0.0.0/3", "::/96", "::ffff:0:0/96", "fe80::/10", "ff00::/8"):
		return podCIDRUnusable(c)
	case len(s.clusterCIDRs) > 0 && !slices.ContainsFunc(s.clusterCIDRs, inside):
		return podCIDROutside(c, s.clusterCIDRs)
	default:
		return cluster.Problem{}
	}
}

// overlapsAny says whether a prefix has an address in common with one of some others.
func overlapsAny(p netip.Prefix, others ...string) bool {
	return slices.ContainsFunc(others, func(s string) bool { return netip.MustParsePrefix(s).Overlaps(p) })
}

func falseFirst(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	default:
		return 1
	}
}

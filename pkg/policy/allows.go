package policy

import (
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
)

// Allows tells whether this node lets a new connection pass: by the egress policies of the source where that is a pod of the
// node, and by the ingress policies of the destination where that is one. closed names the group chains that the kernel refused, so
// that nothing passes there.
//
// Where two local pods have an address, which leases do not allow, both must allow.
func (c *Compiler) Allows(f Flow, closed map[string]bool) bool {
	if f.Src == f.Dst || c.isOwn(f.Src) || c.isOwn(f.Dst) {
		return true // a pod and itself, a pod and its own node
	}
	src, dst := c.owners.of(f.Src), c.owners.of(f.Dst)
	meetings := c.meetings(f, src, dst)
	blocked := func(pods []*pod, direction int) bool {
		return slices.ContainsFunc(pods, func(p *pod) bool {
			g := p.groups[direction]
			return g != nil && (closed[g.chain] || !slices.ContainsFunc(meetings, g.allows))
		})
	}
	return !blocked(dst, 0) && !blocked(src, 1)
}

// isOwn says whether an address is the node's. One that a pod of the node holds, by a lease of a podCIDR that it had before, is the
// pod's; what a pod of another node says of itself changes nothing here.
func (c *Compiler) isOwn(a netip.Addr) bool {
	return slices.Contains(c.own, a) && !c.owners.some(a, func(p *pod) bool { return c.local[p] })
}

// meetings are the ways to see a flow where several pods have one of its addresses: as one between each two of them. What a set
// holds of an address comes from one pod, not from two together.
func (c *Compiler) meetings(f Flow, src, dst []*pod) []meeting {
	var all []meeting
	for _, from := range apart(src) {
		for _, to := range apart(dst) {
			all = append(all, meeting{flow: f, src: from, dst: to, namespace: c.namespaceLabels})
		}
	}
	return all
}

// apart returns lists of one pod each, or an empty list where there is none.
func apart(pods []*pod) [][]*cluster.Pod {
	lists := make([][]*cluster.Pod, max(1, len(pods)))
	for i, p := range pods {
		lists[i] = []*cluster.Pod{p.Pod}
	}
	return lists
}

// allows tells whether one of the group's policies allows a flow.
func (g *group) allows(m meeting) bool {
	for _, p := range g.policies {
		for _, r := range g.direction.rules(p) {
			if m.allows(g.direction, p.Namespace, r) {
				return true
			}
		}
	}
	return false
}

// namespaceLabels returns the labels of a namespace, and whether it is known.
func (c *Compiler) namespaceLabels(name string) (labels.Set, bool) {
	if n := c.namespaces[name]; n != nil && n.object != nil {
		return n.object.Labels, true
	}
	return nil, false
}

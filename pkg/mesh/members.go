package mesh

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/keyproof"
)

// member is a Node with what it claims.
type member struct {
	node cluster.Node
	own  bool
	// addresses are the InternalIPs, endpoint is the address that the operator gave in their place, or nil.
	addresses []*claim
	endpoint  *claim
	podCIDRs  []*claim
	// tunnel is nil where the node has published no key, or where nothing is encrypted.
	tunnel *cluster.WireGuard
	// proven and nextProven say of the keys whether the node has proven that it holds them.
	proven, nextProven bool
}

// newMember takes in a Node. What was found out of its keys is taken over from what it was before, where they are the same: a proof is by
// far the dearest part of a Node to check.
func (p *Planner) newMember(n cluster.Node, before *member) *member {
	m := &member{node: n, own: n.Name == p.self}
	if w := n.WireGuard; p.options.Encrypted && w != nil && w.PublicKey != [32]byte{} && w.Port != 0 {
		m.tunnel = w
		m.proven = m.proves(w.NodeKey, before)
		m.nextProven = w.Next != nil && m.proves(*w.Next, before)
	}
	for i, a := range n.Addresses {
		m.addresses = append(m.addresses, p.newAddress(m, i, "status.addresses", a))
	}
	if m.tunnel != nil && m.tunnel.Endpoint.Addr().IsValid() {
		m.endpoint = p.newAddress(m, len(n.Addresses), fieldEndpoint, m.tunnel.Endpoint.Addr())
	}
	for i, prefix := range n.PodCIDRs {
		c := &claim{of: m, prefix: prefix.Masked(), field: podCIDRField(i), index: i}
		c.unfit = p.claims.unfitPodCIDR(c)
		m.podCIDRs = append(m.podCIDRs, c)
	}
	return m
}

func (p *Planner) newAddress(m *member, index int, field string, a netip.Addr) *claim {
	a = a.Unmap()
	c := &claim{of: m, prefix: netip.PrefixFrom(a, a.BitLen()), field: field, index: index, isAddress: true}
	c.unfit = p.claims.unfitAddress(c)
	return c
}

// proves says whether the node holds the private key that belongs to a public one.
func (m *member) proves(key cluster.NodeKey, before *member) bool {
	if before != nil && before.tunnel != nil && before.node.UID == m.node.UID {
		switch was := before.tunnel; {
		case was.NodeKey == key:
			return before.proven
		case was.Next != nil && *was.Next == key:
			return before.nextProven
		}
	}
	return keyproof.Verify(key.PublicKey, m.node.Name, m.node.UID, key.Proof)
}

// all returns the node's claims.
func (m *member) all() []*claim {
	all := slices.Concat(m.addresses, m.podCIDRs)
	if m.endpoint != nil {
		all = append(all, m.endpoint)
	}
	return all
}

// places are the claims of where others send to: the InternalIPs, or what the operator, or whoever can write the Node's annotations, has given
// in their place, so that nothing is sent to these where that is refused.
func (m *member) places() []*claim {
	switch {
	case m.tunnel != nil && m.tunnel.BehindNAT:
		return nil
	case m.endpoint != nil:
		return []*claim{m.endpoint}
	default:
		return m.addresses
	}
}

// isAt says whether a claim of another node is of where this one is. InternalIPs to which nobody sends may be another's at another place, and
// so are two endpoints at ports of their own, behind one address.
func (m *member) isAt(c *claim) bool {
	return m.own && m.hasAddress(c) || slices.ContainsFunc(m.places(), func(o *claim) bool {
		return o.prefix == c.prefix && o.counts() && (!o.isEndpoint() || !c.isEndpoint() || m.port() == c.of.port())
	})
}

// hasAddress says whether the address of a claim is an InternalIP of the node.
func (m *member) hasAddress(c *claim) bool {
	return slices.ContainsFunc(m.addresses, func(o *claim) bool { return o.prefix == c.prefix })
}

// port is that of the node's endpoint.
func (m *member) port() uint16 { return cmp.Or(m.tunnel.Endpoint.Port(), m.tunnel.Port) }

// keyClaim is a key that a node has published. Those that are proven come first, and the next one of a node after the present one of any.
type keyClaim struct {
	of           *member
	next, proven bool
}

func (k keyClaim) compare(o keyClaim) int {
	return cmp.Or(falseFirst(!k.proven, !o.proven), falseFirst(k.next, o.next), compareMembers(k.of, o.of))
}

// keyClaims returns the node's keys.
func (m *member) keyClaims() map[[32]byte]keyClaim {
	keys := map[[32]byte]keyClaim{}
	if m.tunnel == nil {
		return keys
	}
	if next := m.tunnel.Next; next != nil {
		keys[next.PublicKey] = keyClaim{m, true, m.nextProven}
	}
	keys[m.tunnel.PublicKey] = keyClaim{m, false, m.proven}
	return keys
}

// compareAges orders nodes by age.
func compareAges(a, b *member) int {
	return cmp.Or(a.node.Created.Compare(b.node.Created), cmp.Compare(a.node.Name, b.node.Name))
}

// compareMembers orders nodes by who keeps what two of them claim: the own node, which knows what it is, then the older one.
func compareMembers(a, b *member) int {
	return cmp.Or(falseFirst(!a.own, !b.own), compareAges(a, b))
}

// index finds the nodes that name a thing, in the order of who keeps it.
type index struct {
	// addresses are of InternalIPs, endpoints of addresses that operators gave.
	addresses, endpoints map[netip.Addr][]*member
	keys                 map[[32]byte][]keyClaim
}

func newIndex() index {
	return index{map[netip.Addr][]*member{}, map[netip.Addr][]*member{}, map[[32]byte][]keyClaim{}}
}

func (x *index) add(m *member) {
	for _, c := range m.addresses {
		addTo(x.addresses, c.prefix.Addr(), m, compareMembers)
	}
	if m.endpoint != nil {
		addTo(x.endpoints, m.endpoint.prefix.Addr(), m, compareMembers)
	}
	for key, k := range m.keyClaims() {
		addTo(x.keys, key, k, keyClaim.compare)
	}
}

func (x *index) remove(m *member) {
	for _, c := range m.addresses {
		removeFrom(x.addresses, c.prefix.Addr(), m)
	}
	if m.endpoint != nil {
		removeFrom(x.endpoints, m.endpoint.prefix.Addr(), m)
	}
	for key, k := range m.keyClaims() {
		removeFrom(x.keys, key, k)
	}
}

// rivals calls f with every node that names something which m names, and with m.
func (x *index) rivals(m *member, f func(*member)) {
	f(m)
	for _, c := range m.addresses {
		each(x.addresses[c.prefix.Addr()], f)
		each(x.endpoints[c.prefix.Addr()], f)
	}
	if m.endpoint != nil {
		each(x.addresses[m.endpoint.prefix.Addr()], f)
		for _, o := range x.endpoints[m.endpoint.prefix.Addr()] {
			if o.port() == m.port() {
				f(o)
			}
		}
	}
	for key := range m.keyClaims() {
		for _, k := range x.keys[key] {
			f(k.of)
		}
	}
}

func each(members []*member, f func(*member)) {
	for _, m := range members {
		f(m)
	}
}

// addTo adds an entry in its place, once.
func addTo[K, E comparable](m map[K][]E, key K, entry E, compare func(a, b E) int) {
	if at, found := slices.BinarySearchFunc(m[key], entry, compare); !found {
		m[key] = slices.Insert(m[key], at, entry)
	}
}

func removeFrom[K, E comparable](m map[K][]E, key K, entry E) {
	m[key] = slices.DeleteFunc(m[key], func(e E) bool { return e == entry })
	if len(m[key]) == 0 {
		delete(m, key)
	}
}

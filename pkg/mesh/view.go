package mesh

import (
	"cmp"
	"net/netip"
	"slices"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/podcidr"
)

// view is what follows from one member.
type view struct {
	// podCIDRs are those that count, in the order of the Node.
	podCIDRs []netip.Prefix
	// peer is nil for the own node, and for one that cannot be a peer.
	peer     *Peer
	routes   []Route
	hosts    []Host
	problems []cluster.Problem
}

// base is what a view depends on besides the members: facts of the own node.
type base struct {
	// uplink is the MTU of the own uplink, mtu that of the link.
	uplink, mtu int
	// source4 and source6 are the sources of the routes, has6 says whether the node itself has IPv6, and only6 whether it has
	// nothing else.
	source4, source6 netip.Addr
	has6, only6      bool
}

// newBase works out the facts of the own node.
func (p *Planner) newBase() base {
	b := base{uplink: cmp.Or(p.uplink.MTU, ethernetMTU)}
	if m := p.members[p.self]; m != nil {
		has4 := false
		for _, a := range countingAddresses(m.addresses) {
			has4, b.has6 = has4 || a.Is4(), b.has6 || a.Is6()
		}
		b.only6 = b.has6 && !has4
		for _, podCIDR := range counting(m.podCIDRs) {
			switch a := podcidr.NodeAddress(podCIDR); {
			case a.Is4() && !b.source4.IsValid():
				b.source4 = a
			case a.Is6() && !b.source6.IsValid():
				b.source6 = a
			}
		}
		p.answerAsAsked(&b, m)
	}
	b.mtu = p.options.MTU
	switch {
	case b.mtu > 0:
	case !p.options.Encrypted:
		b.mtu = b.uplink
	case b.only6:
		b.mtu = b.uplink - overheadIPv6
	default:
		b.mtu = b.uplink - overheadIPv4
	}
	return b
}

// answerAsAsked gives the routes to other nodes' pods the own InternalIP as source where pods reach it through the tunnel: what
// answers a datagram from no address of its own choice would otherwise come from one that was not asked. What the node itself begins
// gets its first address from the guard's translation.
func (p *Planner) answerAsAsked(b *base, own *member) {
	four, six := b.source4.IsValid(), b.source6.IsValid()
	for _, a := range p.nodeAddresses(own) {
		switch {
		case a.Is4() && four:
			b.source4, four = a, false
		case a.Is6() && six:
			b.source6, six = a, false
		}
	}
}

// newView works out what follows from a member.
func (p *Planner) newView(m *member) *view {
	v := &view{podCIDRs: counting(m.podCIDRs)}
	for _, c := range m.all() {
		if !c.counts() {
			v.problems = append(v.problems, c.refusal)
		}
	}
	if p.options.Encrypted && !m.own {
		v.hosts = p.hosts(m)
	}
	switch {
	case len(m.podCIDRs) == 0:
		v.refuse(nodeWithoutPodCIDR(m.node.Name))
	case m.own:
	case p.options.Encrypted:
		p.addPeer(v, m)
	default:
		p.addPlain(v, m)
	}
	return v
}

// addPeer makes a node a peer, with routes through the link.
func (p *Planner) addPeer(v *view, m *member) {
	if !p.keyCounts(v, m) || len(v.podCIDRs) == 0 {
		return
	}
	v.peer = &Peer{
		Node:          m.node.Name,
		PublicKey:     m.tunnel.PublicKey,
		Next:          p.nextKey(v, m),
		Endpoint:      p.endpoint(v, m),
		AllowedIPs:    slices.SortedFunc(slices.Values(v.podCIDRs), comparePrefixes),
		NodeAddresses: p.nodeAddresses(m),
	}
	uplink := p.peerMTU(v, m)
	for _, podCIDR := range v.podCIDRs {
		source := p.base.source4
		if isIPv6(podCIDR) {
			source = p.base.source6
		}
		// A family in which this node has no address of its own gets no route: the peer would refuse what comes from any other
		// address, and without a route the sender learns it at once.
		if source.IsValid() {
			v.routes = append(v.routes, Route{Destination: podCIDR, Source: source, MTU: p.routeMTU(v, podCIDR, uplink)})
		}
	}
}

// keyCounts says whether a node has a public key that it has proven, and that no other node keeps.
func (p *Planner) keyCounts(v *view, m *member) bool {
	if m.tunnel == nil {
		v.refuse(nodeWithoutKey(m.node.Name))
		return false
	}
	return p.isKeeper(v, m, m.tunnel.PublicKey, fieldKey)
}

// nextKey returns the key that a node is about to use, or the zero key.
func (p *Planner) nextKey(v *view, m *member) [32]byte {
	next := m.tunnel.Next
	if next == nil || next.PublicKey == m.tunnel.PublicKey || !p.isKeeper(v, m, next.PublicKey, fieldNextKey) {
		return [32]byte{}
	}
	return next.PublicKey
}

// isKeeper says whether a key that a node has published counts for that node.
func (p *Planner) isKeeper(v *view, m *member, key [32]byte, field string) bool {
	switch keeper := p.index.keys[key][0]; {
	case !keeper.proven:
		v.refuse(keyUnproven(m.node.Name, field))
	case keeper.of != m:
		v.refuse(keyTaken(m.node.Name, field, keeper.of.node.Name))
	default:
		return true
	}
	return false
}

// endpoint returns where a node is sent to first; it is invalid where the node has to come to us.
func (p *Planner) endpoint(v *view, m *member) netip.AddrPort {
	places := m.places()
	if len(places) == 0 && !m.tunnel.BehindNAT {
		v.refuse(nodeWithoutAddress(m.node.Name))
	}
	usable := p.usable(v, places)
	if len(usable) == 0 { // each refused claim is a Problem already
		return netip.AddrPort{}
	}
	address := usable[0]
	if i := slices.IndexFunc(usable, func(a netip.Addr) bool { return a.Is6() == p.base.only6 }); i >= 0 {
		address = usable[i]
	}
	return netip.AddrPortFrom(address, m.port())
}

// usable returns the addresses at which a node can be sent to, of its places and in their order.
//
// The own node's are not among them. One where a third node is too, by its Node, stays with both, and both are reported, whichever of the
// two is older, has it as InternalIP or by the annotation, and at whichever port. Who is right does not show from the Nodes: each says of
// itself what it likes at any time, so a liar can always take the part of the honest one in the same two Nodes, and a rule that refused
// either would let a stolen node cut off others from each other. By what stays a liar gains nothing. Who gets what is sent there by mistake
// cannot answer without the key, and the other one is sent to as before. And what all nodes send there, a handshake of 148 bytes every few
// seconds with nothing in it that the liar chose, he can have them send to any other host as well, by an address that is no node's.
func (p *Planner) usable(v *view, places []*claim) []netip.Addr {
	var usable []netip.Addr
	for _, c := range places {
		if !c.counts() {
			continue
		}
		if other := p.rival(c); other != nil {
			own := other.own && (c.isEndpoint() || other.hasAddress(c)) // else the operator says that the own node is behind that one
			v.refuse(placeShared(c, other.node.Name, own))
			if own {
				continue
			}
		}
		usable = append(usable, c.prefix.Addr())
	}
	return usable
}

// rival returns another node that is where a claim is, nil where there is none.
func (p *Planner) rival(c *claim) *member {
	a := c.prefix.Addr()
	for _, claimants := range [][]*member{p.index.addresses[a], p.index.endpoints[a]} {
		if i := slices.IndexFunc(claimants, func(o *member) bool { return o != c.of && o.isAt(c) }); i >= 0 {
			return claimants[i] // the own node comes first
		}
	}
	return nil
}

// nodeAddresses returns the InternalIPs that pods may reach through the tunnel: all but what the own node has. Of several nodes that claim
// one, that gets it which is found to receive there.
func (p *Planner) nodeAddresses(m *member) []netip.Addr {
	var addresses []netip.Addr
	for _, a := range countingAddresses(m.addresses) {
		if p.inNodeCIDRs(a) && (m.own || !p.isOwn(a)) {
			addresses = append(addresses, a)
		}
	}
	slices.SortFunc(addresses, netip.Addr.Compare)
	return slices.Compact(addresses)
}

// hosts returns what a node claims to be, also where that does not count.
func (p *Planner) hosts(m *member) []Host {
	var hosts []Host
	for _, c := range m.addresses {
		if a := c.prefix.Addr(); p.inNodeCIDRs(a) && !p.isOwn(a) {
			hosts = append(hosts, Host{a, m.node.Name})
		}
	}
	return hosts
}

func (p *Planner) inNodeCIDRs(a netip.Addr) bool {
	return slices.ContainsFunc(p.options.NodeCIDRs, func(c netip.Prefix) bool { return c.Contains(a) })
}

// isOwn says whether the own node has an address.
func (p *Planner) isOwn(a netip.Addr) bool {
	claimants := p.index.addresses[a]
	return len(claimants) > 0 && claimants[0].own // it comes first
}

// peerMTU returns the MTU of a node's uplink, 0 where it is not known.
func (p *Planner) peerMTU(v *view, m *member) int {
	uplink := m.tunnel.MTU
	if uplink != 0 && (uplink < minUplinkMTU || uplink > maxMTU) {
		v.refuse(uplinkMTUAbsurd(m.node.Name, uplink))
		return 0
	}
	return uplink
}

// routeMTU returns the greatest packet that gets to a podCIDR where that is less than the link's MTU, and 0 elsewhere. So a node
// with a small MTU or behind a link with one, or one that says so, slows down the traffic to itself and no other.
func (p *Planner) routeMTU(v *view, podCIDR netip.Prefix, peerUplink int) int {
	uplink, outer := peerUplink, v.peer.Endpoint.Addr()
	own := p.base.uplink
	if less := p.uplink.Less[outer]; less >= minUplinkMTU {
		own = less
	}
	ownLink := p.options.MTU == 0 && (uplink == 0 || own < uplink)
	if ownLink {
		uplink = own
	}
	if uplink == 0 {
		return 0
	}
	mtu := uplink - overheadIPv4
	if outer.Is6() || (!outer.IsValid() && p.base.has6) { // a node that comes to us may come by either
		mtu = uplink - overheadIPv6
	}
	if mtu < p.base.mtu {
		mtu -= mtu % padding
	}
	if isIPv6(podCIDR) && mtu < minIPv6MTU {
		switch {
		case mtu >= p.base.mtu: // so is the link, which is a problem of its own
		case ownLink:
			v.refuse(linkTooSmall(p.self, uplink, mtu))
		default:
			v.refuse(wayTooSmall(v.peer.Node, mtu))
		}
		mtu = minIPv6MTU
	}
	if mtu >= p.base.mtu {
		return 0
	}
	return mtu
}

// addPlain adds routes to a node's pods by the node's address, for a mesh without encryption.
func (p *Planner) addPlain(v *view, m *member) {
	if len(m.addresses) == 0 {
		v.refuse(nodeWithoutNextHop(m.node.Name))
		return
	}
	usable := p.usable(v, m.places())
	if len(usable) == 0 {
		return
	}
	for _, podCIDR := range v.podCIDRs {
		hop := slices.IndexFunc(usable, func(a netip.Addr) bool { return a.Is4() == podCIDR.Addr().Is4() })
		if hop < 0 {
			v.refuse(nodeWithoutNextHopOf(m.node.Name, podCIDR))
			continue
		}
		v.routes = append(v.routes, Route{Destination: podCIDR, Via: usable[hop]})
	}
}

func (v *view) refuse(problem cluster.Problem) { v.problems = append(v.problems, problem) }

// counting returns the prefixes of the claims that count.
func counting(claims []*claim) []netip.Prefix {
	prefixes := make([]netip.Prefix, 0, len(claims))
	for _, c := range claims {
		if c.counts() {
			prefixes = append(prefixes, c.prefix)
		}
	}
	return prefixes
}

// countingAddresses returns the addresses that count.
func countingAddresses(claims []*claim) []netip.Addr {
	var addresses []netip.Addr
	for _, prefix := range counting(claims) {
		addresses = append(addresses, prefix.Addr())
	}
	return addresses
}

func (p *Peer) equal(o *Peer) bool {
	return p.Node == o.Node && p.PublicKey == o.PublicKey && p.Next == o.Next && p.Endpoint == o.Endpoint &&
		slices.Equal(p.AllowedIPs, o.AllowedIPs) && slices.Equal(p.NodeAddresses, o.NodeAddresses)
}

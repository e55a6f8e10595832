package wgdevice

import (
	"cmp"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/mesh"
)

const (
	// keepalive lets a peer begin its handshake when it is made rather than with the first packet, and keeps the way open
	// through NAT.
	keepalive = 25 * time.Second
	// keepaliveNext is that of a key which its node does not use yet: the handshake is to come soon after it does.
	keepaliveNext = time.Second
	// silence is how long a peer that lives is never silent: it sends a keepalive every 25 s.
	silence = 30 * time.Second
)

// step is a change of one peer of the device.
type step struct {
	config wgtypes.PeerConfig
	// after is what the peer is then, nothing for one that is removed.
	after peerState
}

// delta returns the smallest change that makes the device's peers those that are wanted. Of those that are there already, all in
// had go that are not wanted. Peers that go, and peers that lose a prefix, come before the peer that gets it: at no moment has
// a prefix an owner who is not to have it. Only where a node has changed its key does the old one go last, because WireGuard
// moves the prefixes between the two without a gap.
func (m *memory) delta(want []mesh.Peer, had []wgtypes.Key, now time.Time) []step {
	wanted := make(map[wgtypes.Key]bool, len(want))
	successor := map[wgtypes.Key]bool{}
	var removed, losing, gaining, superseded []step
	for i := range want {
		p := &want[i]
		for _, s := range m.steps(p, now) {
			wanted[s.config.PublicKey] = true
			before, exists := m.peers[s.config.PublicKey]
			switch {
			case exists && s.isEmpty():
			case slices.ContainsFunc(before.allowed, func(had netip.Prefix) bool { return !slices.Contains(s.after.allowed, had) }):
				losing = append(losing, s)
			default:
				gaining = append(gaining, s)
			}
		}
		for _, key := range append(keysOf(m.planned[p.Node]), keysOf(*p)...) {
			successor[key] = true
		}
	}
	for _, key := range had {
		if _, exists := m.peers[key]; !exists || wanted[key] {
			continue
		}
		s := step{config: wgtypes.PeerConfig{PublicKey: key, Remove: true, UpdateOnly: true}}
		if successor[key] {
			superseded = append(superseded, s)
		} else {
			removed = append(removed, s)
		}
	}
	return slices.Concat(removed, losing, gaining, superseded)
}

// steps returns the device's peers of one node, as they have to be.
func (m *memory) steps(p *mesh.Peer, now time.Time) []step {
	none := wgtypes.Key{}
	owner, next := wgtypes.Key(p.PublicKey), wgtypes.Key(p.Next)
	if next == none {
		return []step{m.step(p, owner, keepalive, now)}
	}
	// Who has shaken hands with the next key has it, and uses no other from then on.
	if !m.peers[next].handshake.IsZero() {
		return []step{m.step(p, next, keepaliveNext, now)}
	}
	waiting := *p
	waiting.AllowedIPs, waiting.NodeAddresses = nil, nil
	return []step{m.step(p, owner, keepalive, now), m.step(&waiting, next, keepaliveNext, now)}
}

// wake returns what makes the device shake hands at once by the next keys of peers that it has: with its own key changed it starts anew
// with each, and a peer that has changed at the same moment answers by no other key. WireGuard sends something when a keepalive is
// turned on, so it has to be off before. These are two calls: of a long one that names a peer twice wgctrl leaves out the second part.
func (m *memory) wake(peers []mesh.Peer) (off, on []step) {
	none, next := time.Duration(0), keepaliveNext
	for _, p := range m.waiting(peers) {
		state, exists := m.peers[p.Next]
		if !exists {
			continue // it is made in this call, and begins so
		}
		with := func(interval *time.Duration) step {
			state.keepalive = *interval
			return step{config: wgtypes.PeerConfig{PublicKey: p.Next, UpdateOnly: true, PersistentKeepaliveInterval: interval}, after: state}
		}
		off, on = append(off, with(&none)), append(on, with(&next))
	}
	return off, on
}

// step returns one of the device's peers of a node, as it has to be.
func (m *memory) step(p *mesh.Peer, key wgtypes.Key, interval time.Duration, now time.Time) step {
	before, exists := m.peers[key]
	// One that somebody took away is left to the next Apply, which makes it whole.
	s := step{config: wgtypes.PeerConfig{PublicKey: key, UpdateOnly: exists}, after: before}
	if !exists {
		s.after.since = now
	}
	if m.moves(p, before, now) {
		s.config.Endpoint = net.UDPAddrFromAddrPort(p.Endpoint)
		s.after.endpoint, s.after.heard = p.Endpoint, now
	}
	if before.keepalive != interval {
		s.config.PersistentKeepaliveInterval, s.after.keepalive = &interval, interval
	}
	if before.preshared {
		s.config.PresharedKey, s.after.preshared = &wgtypes.Key{}, false
	}
	s.after.allowed = slices.Concat(p.AllowedIPs, m.usable(p))
	slices.SortFunc(s.after.allowed, comparePrefixes)
	if !slices.Equal(before.allowed, s.after.allowed) {
		s.config.ReplaceAllowedIPs = true
		for _, a := range s.after.allowed {
			s.config.AllowedIPs = append(s.config.AllowedIPs, *ipNet(a))
		}
	}
	return s
}

// isEmpty says whether nothing changes in a peer that is there.
func (s *step) isEmpty() bool {
	return s.config.Endpoint == nil && s.config.PersistentKeepaliveInterval == nil && s.config.PresharedKey == nil && !s.config.ReplaceAllowedIPs
}

// moves says whether a peer has to be given its planned endpoint. WireGuard answers to where a peer's last authentic packet came
// from, which may rightly be elsewhere: a node with several addresses, or behind a translation that nobody told of. So what
// it learnt stays while the peer is heard. Who carries a packet of the peer's in its place can turn the answers to himself
// (he reads none of them, and had them in hand anyway), but when he stops to carry them, the peer falls silent and is asked where
// the plan has it.
func (m *memory) moves(p *mesh.Peer, s peerState, now time.Time) bool {
	switch {
	case !p.Endpoint.IsValid(), s.endpoint == p.Endpoint:
		return false
	case !s.endpoint.IsValid(), m.planned[p.Node].Endpoint != p.Endpoint:
		return true
	default:
		return now.Sub(s.heard) >= silence
	}
}

// usable returns those of a node's own addresses that its pods' peers may reach through the tunnel: where the peer was found to receive what
// is sent there (see Challenge). The Node says itself what its address is, and before that packets for it go as they would without the
// tunnel. A peer that goes over to its next key is the same node.
func (m *memory) usable(p *mesh.Peer) []netip.Prefix {
	keys := keysOf(*p)
	if before := m.planned[p.Node]; before.Next == p.PublicKey {
		keys = append(keys, before.PublicKey)
	}
	var hosts []netip.Prefix
	for _, a := range p.NodeAddresses {
		if slices.ContainsFunc(keys, func(key wgtypes.Key) bool { return m.receives[key] == a }) {
			hosts = append(hosts, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return hosts
}

// keysOf returns the keys of a node.
func keysOf(p mesh.Peer) []wgtypes.Key {
	return []wgtypes.Key{p.PublicKey, p.Next}
}

// endpointOf returns a peer's endpoint, or the zero AddrPort.
func endpointOf(p *wgtypes.Peer) netip.AddrPort {
	if p.Endpoint == nil {
		return netip.AddrPort{}
	}
	e := p.Endpoint.AddrPort()
	return netip.AddrPortFrom(e.Addr().Unmap(), e.Port())
}

// allowedOf returns a peer's allowed IPs, sorted.
func allowedOf(p *wgtypes.Peer) []netip.Prefix {
	var allowed []netip.Prefix
	for i := range p.AllowedIPs {
		allowed = append(allowed, prefixOf(&p.AllowedIPs[i]))
	}
	slices.SortFunc(allowed, comparePrefixes)
	return allowed
}

// prefixOf converts from the type of netlink and wgctrl; the zero Prefix stands for nil.
func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, _ := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones)
}

// ipNet converts to the type of netlink and wgctrl.
func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

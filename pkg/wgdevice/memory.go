package wgdevice

import (
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/mesh"
)

// memory is what a Device knows of the kernel. The peers are those that were last read, with all that was written since.
type memory struct {
	// known is true while nothing was written that is not remembered here.
	known bool
	// encrypted and link are of the mesh that stands: whether it has a link, and the link's index.
	encrypted bool
	link      int
	key       Key
	planned   map[string]mesh.Peer
	peers     map[wgtypes.Key]peerState
	// receives is the address at which a peer was found to receive, of those where its Node says that it is. No two nodes' peers have one.
	receives map[wgtypes.Key]netip.Addr
	routes   map[routeID]route
}

// peerState is a peer of the device.
type peerState struct {
	endpoint  netip.AddrPort
	allowed   []netip.Prefix
	keepalive time.Duration
	// preshared is true where the peer has a preshared key, which none of ours has: no handshake succeeds by a foreign one.
	preshared bool
	handshake time.Time
	received  int64
	// heard is when something of the peer was last seen to have arrived, and since when it is known.
	heard, since time.Time
	// anew is how often the peer was made anew since then.
	anew int
	// doubtful is true where what the peer sends may be dropped here, although it has shaken hands.
	doubtful bool
}

// see takes in the peers of the device.
func (m *memory) see(device *wgtypes.Device, now time.Time) {
	peers := make(map[wgtypes.Key]peerState, len(device.Peers))
	for i := range device.Peers {
		p := &device.Peers[i]
		s := peerState{
			endpoint: endpointOf(p), allowed: allowedOf(p), keepalive: p.PersistentKeepaliveInterval,
			preshared: p.PresharedKey != wgtypes.Key{}, handshake: p.LastHandshakeTime, received: p.ReceiveBytes, heard: now, since: now,
		}
		s.doubtful = device.Type == wgtypes.Userspace && s.isDoubtful()
		if old, seen := m.peers[p.PublicKey]; seen {
			s.since, s.anew = old.since, old.anew
			if old.received == s.received {
				s.heard = old.heard
			}
		} else {
			m.locate(p.PublicKey, s)
		}
		peers[p.PublicKey] = s
	}
	m.peers = peers
}

// did takes in what was written to the device.
func (m *memory) did(steps []step) {
	for _, s := range steps {
		if s.config.Remove {
			delete(m.peers, s.config.PublicKey)
			delete(m.receives, s.config.PublicKey)
		} else {
			m.peers[s.config.PublicKey] = s.after
			m.locate(s.config.PublicKey, s.after)
		}
	}
}

// locate takes in what a peer carries that is new here. One that carries its node's address was found to receive there, by this daemon or the
// one before, and stays so wherever its packets come from later: somebody else may have sent them on, and what goes into the tunnel none but
// the node can read. What a tunnel forgets that starts anew stays known.
func (m *memory) locate(key wgtypes.Key, s peerState) {
	for _, host := range s.hosts() {
		m.found(key, host.Addr())
	}
}

// plan takes in what is wanted of a node. An address that is not the node's any more is found anew when it is again.
func (m *memory) plan(p mesh.Peer) {
	m.planned[p.Node] = p
	for _, key := range keysOf(p) {
		if !slices.Contains(p.NodeAddresses, m.receives[key]) {
			delete(m.receives, key)
		}
	}
}

// found takes in that a peer receives at an address.
func (m *memory) found(key wgtypes.Key, address netip.Addr) {
	if m.receives == nil {
		m.receives = map[wgtypes.Key]netip.Addr{}
	}
	m.receives[key] = address
}

// hosts returns the nodes' own addresses that a peer carries.
func (p peerState) hosts() []netip.Prefix {
	var hosts []netip.Prefix
	for _, a := range p.allowed {
		if a.IsSingleIP() { // no podCIDR has but one address
			hosts = append(hosts, a)
		}
	}
	return hosts
}

package wgdevice

import (
	"net/netip"
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
	routes    map[routeID]route
}

// peerState is a peer of the device.
type peerState struct {
	endpoint  netip.AddrPort
	allowed   []netip.Prefix
	keepalive time.Duration
	handshake time.Time
	received  int64
	// heard is when something of the peer was last seen to have arrived, at since when it has the address that it has, and since when it
	// is known.
	heard, at, since time.Time
	// anew is how often the peer was made anew since then.
	anew int
}

// see takes in the peers of the device.
func (m *memory) see(device *wgtypes.Device, now time.Time) {
	peers := make(map[wgtypes.Key]peerState, len(device.Peers))
	for i := range device.Peers {
		p := &device.Peers[i]
		s := peerState{
			endpoint: endpointOf(p), allowed: allowedOf(p), keepalive: p.PersistentKeepaliveInterval,
			handshake: p.LastHandshakeTime, received: p.ReceiveBytes, heard: now, at: now, since: now,
		}
		if old, seen := m.peers[p.PublicKey]; seen {
			s.since, s.anew = old.since, old.anew
			if old.received == s.received {
				s.heard = old.heard
			}
			if old.endpoint.Addr() == s.endpoint.Addr() {
				s.at = old.at
			}
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
		} else {
			m.peers[s.config.PublicKey] = s.after
		}
	}
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

package wgdevice

import (
	"bytes"
	"net"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/mesh"
)

// Handshakes that cross. WireGuard knows one handshake with a peer: who has begun one and receives the other side's begin answers that, and
// forgets its own. So where two nodes begin within the time that a packet takes between them, each drops the other's answer, and
// neither begins again for 5 s (REKEY_TIMEOUT), whatever there is to send. It shows as a peer that was heard and has not shaken hands.
// Making the peer anew begins at once, and the other side, which began a moment ago, can do no more than answer, as long as it does not
// make its peer anew, too: so one side comes first, and the other one only where that did not see it.
const (
	// crossPatience is for how long the node with the smaller key leaves such a peer alone: handshakes end within the time that a packet
	// takes there and back, also between continents, and to make it anew costs what waits for it. Each time that it was not enough, it
	// is twice as long.
	crossPatience = 400 * time.Millisecond
	// crossOther is how many times longer the other node's patience is, and crossMost how often it doubles.
	crossOther = 3
	crossMost  = 10
	// crossAtOnce is how many peers are made anew in one call: for more, wgctrl divides the call for the kernel, and then leaves out what it
	// is told of a peer for the second time.
	crossAtOnce = 16
	// youth is for how long a peer's first handshake is looked for after the peer was made: twice the time after which WireGuard itself
	// begins again, at which it may cross once more.
	youth = 10 * time.Second
)

// Awaited is what a Device has still to see of its peers.
type Awaited struct {
	// Keys counts the peers that are about to change their key, and do not use the next one yet.
	Keys int
	// Handshakes counts the peers that were made a moment ago, and have not shaken hands yet.
	Handshakes int
}

// awaited returns what is to be seen of the peers.
func (m *memory) awaited(peers []mesh.Peer, now time.Time) Awaited {
	a := Awaited{Keys: len(m.waiting(peers))}
	for _, s := range m.peers {
		if s.handshake.IsZero() && now.Sub(s.since) < youth {
			a.Handshakes++
		}
	}
	return a
}

// crossed returns what makes those peers anew whose handshakes crossed with the device's own.
func (m *memory) crossed(now time.Time) []step {
	var steps []step
	for key, s := range m.peers {
		if !s.handshake.IsZero() || s.received == 0 || !s.endpoint.IsValid() || now.Sub(s.heard) < m.crossPatience(key, s) {
			continue
		}
		again := step{
			config: wgtypes.PeerConfig{
				PublicKey: key, Endpoint: net.UDPAddrFromAddrPort(s.endpoint),
				PersistentKeepaliveInterval: &s.keepalive, ReplaceAllowedIPs: true,
			},
			after: s,
		}
		for _, a := range s.allowed {
			again.config.AllowedIPs = append(again.config.AllowedIPs, *ipNet(a))
		}
		again.after.received, again.after.heard, again.after.anew = 0, now, s.anew+1
		gone := step{config: wgtypes.PeerConfig{PublicKey: key, Remove: true, UpdateOnly: true}}
		steps = append(steps, gone, again)
	}
	slices.SortStableFunc(steps, func(a, b step) int { return bytes.Compare(a.config.PublicKey[:], b.config.PublicKey[:]) })
	return steps[:min(len(steps), 2*crossAtOnce)] // the others come at the next look
}

// crossPatience is for how long a peer may have been heard without a handshake.
func (m *memory) crossPatience(key wgtypes.Key, s peerState) time.Duration {
	patience := crossPatience << min(s.anew, crossMost)
	if own := m.key.Public(); bytes.Compare(own[:], key[:]) > 0 {
		patience *= crossOther
	}
	return patience
}

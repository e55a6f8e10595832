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
//
// wireguard-go can also take the answer in the same instant in which it answers the other side's begin, because it looks at the state of its
// handshake and changes it under two locks. Then it has shaken hands, but at an index that it has given up: it sends what the peer can
// read, and drops what the peer sends, for the 15 s after which it begins again because it hears nothing (KEEPALIVE_TIMEOUT and
// REKEY_TIMEOUT). It shows as a peer that is sent to and was not heard since its first handshake. So is one that rightly only
// receives: such a one is made anew as well, but once.
const (
	// crossPatience is for how long the node with the smaller key leaves such a peer alone: handshakes end within the time that a packet
	// takes there and back, also between continents, and to make it anew costs what waits for it. Each time that it was not enough, it
	// is twice as long.
	crossPatience = 400 * time.Millisecond
	// crossOther is how many times longer the other node's patience is, and crossMost how often it doubles.
	crossOther = 3
	crossMost  = 10
	// deafPatience is for how long a peer may be sent to after its first handshake without being heard.
	deafPatience = time.Second
	// crossAtOnce is how many peers are made anew in one call: for more, wgctrl divides the call for the kernel, and then leaves out what it
	// is told of a peer for the second time.
	crossAtOnce = 16
	// youth is for how long a peer's first handshake, and what follows it, is looked for after the peer was made: twice the time after which
	// WireGuard itself begins again, at which it may cross once more.
	youth = 10 * time.Second
)

// trial is whether a peer's first handshake holds, which is seen by what arrives after it.
type trial struct {
	// open is true from the handshake until something arrives.
	open bool
	// asked is when the peer was first sent something meanwhile.
	asked time.Time
	// failed is true where the peer was made anew because nothing came.
	failed bool
}

// try returns what the trial of a peer's first handshake has come to, by what the peer is now.
func (p peerState) try(now peerState, at time.Time) trial {
	t := p.trial
	switch {
	case p.handshake.IsZero() && !now.handshake.IsZero():
		t.open = !t.failed
	case now.received != p.received:
		t.open = false
	case t.open && t.asked.IsZero() && now.sent != p.sent:
		t.asked = at
	}
	return t
}

// Awaited is what a Device has still to see of its peers.
type Awaited struct {
	// Keys counts the peers that are about to change their key, and do not use the next one yet.
	Keys int
	// Handshakes counts the peers that were made a moment ago, and have not shaken hands yet, or were not heard since.
	Handshakes int
}

// awaited returns what is to be seen of the peers.
func (m *memory) awaited(peers []mesh.Peer, now time.Time) Awaited {
	a := Awaited{Keys: len(m.waiting(peers))}
	for _, s := range m.peers {
		if (s.handshake.IsZero() || s.trial.open) && now.Sub(s.since) < youth {
			a.Handshakes++
		}
	}
	return a
}

// crossed returns what makes those peers anew whose handshakes crossed with the device's own.
func (m *memory) crossed(now time.Time) []step {
	var steps []step
	for key, s := range m.peers {
		deaf := s.isDeaf(now)
		if !s.endpoint.IsValid() || !deaf && !m.waitsForNothing(key, s, now) {
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
		again.after.handshake, again.after.received, again.after.sent = time.Time{}, 0, 0
		again.after.heard, again.after.anew, again.after.trial = now, s.anew+1, trial{failed: s.trial.failed || deaf}
		gone := step{config: wgtypes.PeerConfig{PublicKey: key, Remove: true, UpdateOnly: true}}
		steps = append(steps, gone, again)
	}
	slices.SortStableFunc(steps, func(a, b step) int { return bytes.Compare(a.config.PublicKey[:], b.config.PublicKey[:]) })
	return steps[:min(len(steps), 2*crossAtOnce)] // the others come at the next look
}

// waitsForNothing says whether each side has dropped the other one's answer: the peer was heard, and has not shaken hands for longer than
// this side is patient.
func (m *memory) waitsForNothing(key wgtypes.Key, s peerState, now time.Time) bool {
	if !s.handshake.IsZero() || s.received == 0 {
		return false
	}
	patience := crossPatience << min(s.anew, crossMost)
	if own := m.key.Public(); bytes.Compare(own[:], key[:]) > 0 {
		patience *= crossOther
	}
	return now.Sub(s.heard) >= patience
}

// isDeaf says whether what the peer sends seems to be dropped here. That a next key is in use is known by its handshake alone, which stays.
func (p peerState) isDeaf(now time.Time) bool {
	return p.trial.open && !p.trial.asked.IsZero() && now.Sub(p.trial.asked) >= deafPatience && p.keepalive != keepaliveNext
}

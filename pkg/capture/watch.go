// Package capture watches the links by which packets leave and enter a node, and counts what none of them may carry when
// pod traffic is encrypted: packets from or to a pod's address, and packets with the marker of a probe. Beside them it counts
// WireGuard's own packets, without which the absence of the others would prove nothing.
//
// It watches by a packet socket, so it needs CAP_NET_RAW and no other program, and it sees both families, both
// directions, fragments, VLAN tags, and links that appear meanwhile. What happens inside the node is left out: loopback, the
// tunnel's link, the pods' links. Packets are seen as the kernel hands them to a link or takes them from it, so one that the
// link itself cuts into segments counts once.
package capture

import (
	"net/netip"
	"slices"
)

// Watch says what to look for.
type Watch struct {
	// Marker is what the probes carry: 16 random bytes or more, so that no ciphertext holds it by chance.
	Marker []byte
	// Pods are the prefixes of the pods' addresses.
	Pods []netip.Prefix
	// Direct are addresses beyond the pods that see a pod's own address, as the operator wants it: what passes between the two is no
	// finding.
	Direct []netip.Prefix
	// Port is the UDP port of the node's own WireGuard.
	Port uint16
}

// Traffic counts packets by their direction.
type Traffic struct {
	Sent     int `json:"sent"`
	Received int `json:"received"`
}

// Total is the number of packets both ways.
func (t Traffic) Total() int { return t.Sent + t.Received }

// Plus adds other packets.
func (t Traffic) Plus(o Traffic) Traffic {
	return Traffic{Sent: t.Sent + o.Sent, Received: t.Received + o.Received}
}

// count counts one packet.
func (t *Traffic) count(sent bool) {
	if sent {
		t.Sent++
	} else {
		t.Received++
	}
}

// Link is what one link carried.
type Link struct {
	Name string `json:"name"`
	// Clear are the packets that should not have been there, Marked those of them that carry the marker.
	Clear  Traffic `json:"clear"`
	Marked Traffic `json:"marked"`
	// WireGuard are the packets of the node's own tunnel.
	WireGuard Traffic `json:"wireguard"`
	// Examples are the first of Clear that differ.
	Examples []Example `json:"examples,omitempty"`
}

// Example is a packet in clear.
type Example struct {
	Sent        bool       `json:"sent"`
	Source      netip.Addr `json:"source,omitzero"`
	Destination netip.Addr `json:"destination,omitzero"`
	// Protocol is the number in the IP header.
	Protocol uint8 `json:"protocol"`
	Marked   bool  `json:"marked"`
	// Inside is true for addresses of a packet that another one carries or, an error of ICMP, quotes.
	Inside bool `json:"inside,omitempty"`
}

// Report is what a Capture saw.
type Report struct {
	// Links are all those that lead out of the node, also those that carried nothing of interest, sorted by name.
	Links []Link
	// Remotes are WireGuard's packets by the address and port at the other end. What exceeds maxRemotes is in Links only.
	Remotes map[netip.AddrPort]Traffic
	// Dropped packets found no room in the buffer. Unjudged are those of links that had gone before they could be asked for their
	// names, or that put a header before the packet which is not known here. Where there are any, a count of 0 proves nothing.
	Dropped  int
	Unjudged int
}

// maxExamples bounds Link.Examples, maxRemotes Report.Remotes.
const (
	maxExamples = 5
	maxRemotes  = 1 << 15
)

// judge counts packets by what is looked for.
type judge struct {
	watch        Watch
	pods, direct prefixes
	remotes      map[netip.AddrPort]Traffic
}

func newJudge(w Watch) *judge {
	return &judge{watch: w, pods: newPrefixes(w.Pods), direct: newPrefixes(w.Direct), remotes: map[netip.AddrPort]Traffic{}}
}

// prefixes find the prefix that holds an address at a cost that does not grow with their number: a cluster without a known CIDR
// has thousands, of few lengths.
type prefixes struct {
	lengths []int
	all     map[netip.Prefix]bool
}

func newPrefixes(list []netip.Prefix) prefixes {
	p := prefixes{all: make(map[netip.Prefix]bool, len(list))}
	for _, prefix := range list {
		p.all[prefix.Masked()] = true
		if !slices.Contains(p.lengths, prefix.Bits()) {
			p.lengths = append(p.lengths, prefix.Bits())
		}
	}
	return p
}

// holds tells whether one of the prefixes holds an address.
func (p prefixes) holds(a netip.Addr) bool {
	return slices.ContainsFunc(p.lengths, func(length int) bool {
		prefix, err := a.Prefix(length) // an error where the length is another family's
		return err == nil && p.all[prefix]
	})
}

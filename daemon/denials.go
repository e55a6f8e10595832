package main

import (
	"cmp"
	"strings"
	"sync"

	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// denials adds up what rules have dropped by what metrics tell of it. A group's counter ends with the group; the sums that it was a
// part of go on, because a sum that shrinks would look like one that began again.
type denials struct {
	mu sync.Mutex
	// last are the counters as they were read, without their numbers in the keys.
	last map[firewall.Denial]uint64
	sums map[denialLabels]uint64
}

// denialLabels are a policy and a direction, or else the reason that a rule gives which stands whatever the policies, or where a
// packet went in clear.
type denialLabels struct{ policy, direction, reason, clear string }

// destination is a rule's words for where packets go in clear, in one word; those that it does not know are told as they are.
func destination(words string) string {
	switch words {
	case "to a node":
		return "node"
	case "to a pod of another node":
		return "pod"
	case "out of the cluster":
		return "world"
	default:
		return words
	}
}

// add takes a reading and returns the sums of what stands; group knows the chains of groups.
func (d *denials) add(read []firewall.Denial, group func(chain string) (string, []string, bool)) map[denialLabels]uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	last, sums := make(map[firewall.Denial]uint64, len(read)), map[denialLabels]uint64{}
	for _, r := range read {
		packets := r.Packets
		r.Packets, r.Bytes = 0, 0
		last[r] = packets
		grown := packets
		if before := d.last[r]; before <= packets {
			grown -= before
		}
		for _, l := range labelsOf(r, group) {
			if _, ok := sums[l]; !ok {
				sums[l] = d.sums[l]
			}
			sums[l] += grown
		}
	}
	d.last, d.sums = last, sums
	return sums
}

// labelsOf returns what a counter is a part of. Each policy of a group counts, because none of them allows the packet.
func labelsOf(d firewall.Denial, group func(chain string) (string, []string, bool)) []denialLabels {
	direction, policies, ok := group(d.Chain)
	words, inClear := strings.CutPrefix(d.Comment, firewall.InClear)
	switch {
	case inClear:
		return []denialLabels{{clear: destination(words)}}
	case !ok && hashed(d.Chain):
		return nil // a group that came or went since the counters were read
	case !ok:
		return []denialLabels{{reason: cmp.Or(d.Comment, d.Chain)}}
	}
	labels := make([]denialLabels, len(policies))
	for i, p := range policies {
		labels[i] = denialLabels{policy: p, direction: direction}
	}
	return labels
}

// hashed tells whether a chain is one of those that are named by kind and hash (netfilter.Name).
func hashed(chain string) bool {
	return strings.Count(strings.TrimPrefix(chain, netfilter.Prefix), "-") > 1
}

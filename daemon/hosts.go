package main

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// hosts are the addresses of all nodes, with how many nodes say each. What changes costs what it changes.
type hosts struct {
	said map[netip.Addr]int
	// was tells of those that were touched since the last change whether they were there then; nil before the first one.
	was map[netip.Addr]bool
}

// learn takes in the addresses of a node.
func (h *hosts) learn(addresses []netip.Addr) { h.count(addresses, 1) }

// forget takes back what a node said.
func (h *hosts) forget(addresses []netip.Addr) { h.count(addresses, -1) }

func (h *hosts) count(addresses []netip.Addr, by int) {
	if h.said == nil {
		h.said = map[netip.Addr]int{}
	}
	for _, a := range addresses {
		n := h.said[a]
		if _, touched := h.was[a]; !touched && h.was != nil {
			h.was[a] = n > 0
		}
		if h.said[a] = n + by; n+by == 0 {
			delete(h.said, a)
		}
	}
}

// sets are the sets of the packet filter.
func (h *hosts) sets() netfilter.Ruleset { return guard.NodeSets(slices.Collect(maps.Keys(h.said))) }

// change returns what differs in the sets since it was called last.
func (h *hosts) change() netfilter.Change {
	if h.was == nil {
		h.was = map[netip.Addr]bool{}
		return netfilter.Diff(netfilter.Ruleset{}, h.sets())
	}
	var came, went []netip.Addr
	for a, was := range h.was {
		if is := h.said[a] > 0; is && !was {
			came = append(came, a)
		} else if was && !is {
			went = append(went, a)
		}
	}
	h.was = map[netip.Addr]bool{}
	return netfilter.Diff(guard.NodeSets(went), guard.NodeSets(came))
}

package conntrack

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// walk is one look through the kernel's table, which is one table for both families and all network namespaces. It finds the
// connections from an IPv4 address or, with reply, those to it; without an address those of a family, or of both where it is
// zero, from and to any of among, or all where among is empty, too.
type walk struct {
	family  uint8
	address netip.Addr
	reply   bool
	among   map[netip.Addr]bool
}

// wants says whether an entry that the kernel has chosen is for this walk. A connection between two of the addresses is found
// by each of them, and belongs to its source.
func (w walk) wants(f Flow) bool {
	switch {
	case w.address.IsValid() && w.reply:
		return !w.among[f.Src]
	case w.address.IsValid() || len(w.among) == 0:
		return true
	}
	return w.among[f.Src] || w.among[f.Dst]
}

// What a walk costs: a look at each bucket of the table, at each entry, and to have an entry copied and read. They were
// measured on one machine (see BenchmarkSweep); only their ratio counts.
const (
	costBuckets = 12 * time.Millisecond // 262144 of them
	costEntry   = 550 * time.Nanosecond
	costCopied  = 3 * time.Microsecond
	costDeleter = 500 * time.Microsecond // a look at each bucket where the kernel deletes what it finds by itself
)

// plan chooses how to find the connections of addresses in a table of so many entries: by targeted walks, or by one through
// everything where that is sooner done.
func plan(addresses []netip.Addr, entries int) []walk {
	walks := targeted(addresses)
	look := costBuckets + time.Duration(entries)*costEntry
	rounds := (len(walks) + walkers - 1) / walkers
	if look+time.Duration(entries)*costCopied <= time.Duration(rounds)*look {
		return []walk{{among: walks[0].among}}
	}
	return walks
}

// atOnce says whether one walk through everything is sooner done than deletions by the kernel's own choice, which the targeted walks for
// IPv4 would be, together with the walk for IPv6.
func atOnce(targeted []walk, entries int) bool {
	look := time.Duration(entries) * costEntry
	var apart time.Duration
	for _, w := range targeted {
		if w.address.IsValid() {
			apart += costDeleter + look
		} else {
			apart += costBuckets + look
		}
	}
	return costBuckets+look+time.Duration(entries)*costCopied <= apart
}

// targeted are two walks for each IPv4 address, and one for all of IPv6. There the kernel's own choice is of no use: it
// compares the other way round (seen in Linux 6.18), and finds every connection but those of the address.
func targeted(addresses []netip.Addr) []walk {
	among := make(map[netip.Addr]bool, len(addresses))
	for _, a := range addresses {
		among[a] = true
	}
	var walks []walk
	for _, a := range slices.SortedFunc(maps.Keys(among), netip.Addr.Compare) {
		if a.Is6() {
			return append(walks, walk{family: unix.AF_INET6, among: among}) // all that follow are of IPv6, too
		}
		w := walk{family: unix.AF_INET, address: a, among: among}
		reply := w
		reply.reply = true
		walks = append(walks, w, reply)
	}
	return walks
}

package ipam

import (
	"math"
	"net/netip"

	"github.com/warren-cni/warren/pkg/podcidr"
)

// span returns the first and the last address of a range that may be leased: not the network address, not the node's
// own, not IPv4's broadcast address. ok is false where nothing is left between them.
func span(r netip.Prefix) (first, last netip.Addr, ok bool) {
	node := podcidr.NodeAddress(r)
	if !node.IsValid() {
		return first, last, false
	}
	first, last = node.Next(), lastOf(r)
	if last.Is4() {
		last = last.Prev()
	}
	return first, last, r.Contains(first) && first.Compare(last) <= 0
}

// capacity returns how many addresses there are in the span of a range; math.MaxInt where they are more than anybody leases.
func capacity(r netip.Prefix) int {
	bits, others := r.Addr().BitLen()-r.Bits(), 2 // the network address and the node's own
	if r.Addr().Is4() {
		others = 3
	}
	if bits > 30 {
		return math.MaxInt
	}
	return max(1<<bits-others, 0)
}

// lastOf returns the last address of a prefix.
func lastOf(r netip.Prefix) netip.Addr {
	b := r.Addr().AsSlice()
	for bit := r.Bits(); bit < 8*len(b); bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}

package policy

import (
	"net/netip"
	"slices"
)

// subtract returns the prefixes that together hold exactly the addresses of a block without its exceptions, sorted and
// never a /0, which the kernel's sets refuse.
func subtract(block netip.Prefix, except []netip.Prefix) []netip.Prefix {
	var inside []netip.Prefix
	for _, e := range except {
		if e.Bits() <= block.Bits() && e.Overlaps(block) {
			return nil
		}
		if e.Overlaps(block) {
			inside = append(inside, e)
		}
	}
	if len(inside) == 0 && block.Bits() > 0 {
		return []netip.Prefix{block.Masked()}
	}
	low, high := halves(block)
	return append(subtract(low, inside), subtract(high, inside)...)
}

// halves divides a prefix of less than full length.
func halves(p netip.Prefix) (low, high netip.Prefix) {
	bits := p.Bits() + 1
	low = netip.PrefixFrom(p.Masked().Addr(), bits)
	bytes := low.Addr().AsSlice()
	bytes[(bits-1)/8] |= 0x80 >> ((bits - 1) % 8)
	second, _ := netip.AddrFromSlice(bytes) // as long as it was
	return low, netip.PrefixFrom(second, bits)
}

// union sorts prefixes and leaves out those that another one holds.
func union(prefixes []netip.Prefix) []netip.Prefix {
	slices.SortFunc(prefixes, netip.Prefix.Compare)
	var kept []netip.Prefix
	for _, p := range prefixes {
		// Sorted, a prefix that holds p stands before it, and all between the two are held by it as well.
		if len(kept) == 0 || !kept[len(kept)-1].Overlaps(p) {
			kept = append(kept, p)
		}
	}
	return kept
}

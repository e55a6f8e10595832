package policy

import (
	"net/netip"
	"slices"
)

// subtract returns the prefixes that together hold exactly the addresses of a block without its exceptions, sorted and
// never a /0, which the kernel's sets refuse. There may be as many for each exception as it has bits more than the block.
func subtract(block netip.Prefix, except []netip.Prefix) []netip.Prefix {
	outside := func(e netip.Prefix) bool { return !e.Overlaps(block) }
	return carve(nil, block.Masked(), union(slices.DeleteFunc(slices.Clone(except), outside)))
}

// carve appends what exceptions leave of a block; they are sorted, overlap with it, and none holds another.
func carve(left []netip.Prefix, block netip.Prefix, except []netip.Prefix) []netip.Prefix {
	if len(except) > 0 && except[0].Bits() <= block.Bits() {
		return left
	}
	if len(except) == 0 && block.Bits() > 0 {
		return append(left, block)
	}
	low, high := halves(block)
	i, _ := slices.BinarySearchFunc(except, high.Addr(), func(e netip.Prefix, a netip.Addr) int { return e.Addr().Compare(a) })
	return carve(carve(left, low, except[:i]), high, except[i:])
}

// halves divides a masked prefix of less than full length.
func halves(p netip.Prefix) (low, high netip.Prefix) {
	bits := p.Bits()
	low = netip.PrefixFrom(p.Addr(), bits+1)
	if p.Addr().Is4() {
		a := p.Addr().As4()
		a[bits/8] |= 0x80 >> (bits % 8)
		return low, netip.PrefixFrom(netip.AddrFrom4(a), bits+1)
	}
	a := p.Addr().As16()
	a[bits/8] |= 0x80 >> (bits % 8)
	return low, netip.PrefixFrom(netip.AddrFrom16(a), bits+1)
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

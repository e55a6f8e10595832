package policy

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
)

func TestSubtract(t *testing.T) {
	for _, c := range []struct {
		block  string
		except []string
		want   []string
	}{
		{"10.0.0.0/8", nil, []string{"10.0.0.0/8"}},
		{"0.0.0.0/0", nil, []string{"0.0.0.0/1", "128.0.0.0/1"}},
		{"::/0", nil, []string{"::/1", "8000::/1"}},
		{"0.0.0.0/0", []string{"0.0.0.0/0"}, nil},
		{"0.0.0.0/0", []string{"128.0.0.0/2"}, []string{"0.0.0.0/1", "192.0.0.0/2"}},
		{"10.0.0.0/30", []string{"10.0.0.1/32"}, []string{"10.0.0.0/32", "10.0.0.2/31"}},
		{"10.0.0.0/24", []string{"10.0.0.0/25", "10.0.0.128/25"}, nil},
		{"10.0.0.0/24", []string{"10.0.0.0/8"}, nil},
		{"10.0.0.0/24", []string{"10.1.0.0/24"}, []string{"10.0.0.0/24"}},
		{"10.0.0.7/32", []string{"10.0.0.7/32"}, nil},
		{"fd00::/126", []string{"fd00::1/128", "fd00::2/127"}, []string{"fd00::/128"}},
	} {
		var except []netip.Prefix
		for _, e := range c.except {
			except = append(except, netip.MustParsePrefix(e))
		}
		var got []string
		for _, p := range subtract(netip.MustParsePrefix(c.block), except) {
			got = append(got, p.String())
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s without %v is %v, want %v", c.block, c.except, got, c.want)
		}
	}
}

// For every address, being in what is left of a union of blocks is being in a block and in none of its exceptions.
func TestSubtractIsExact(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	random := func(shortest int) netip.Prefix {
		a := netip.AddrFrom4([4]byte{10, 0, 0, byte(r.IntN(256))})
		return netip.PrefixFrom(a, shortest+r.IntN(33-shortest)).Masked()
	}
	for range 2000 {
		var left []netip.Prefix
		var blocks, excepts [2][]netip.Prefix
		for i := range blocks {
			blocks[i] = []netip.Prefix{random(24)}
			for range r.IntN(5) {
				excepts[i] = append(excepts[i], random(25))
			}
			left = append(left, subtract(blocks[i][0], excepts[i])...)
		}
		left = union(left)
		for last := range 256 {
			a := netip.AddrFrom4([4]byte{10, 0, 0, byte(last)})
			holds := func(p netip.Prefix) bool { return p.Contains(a) }
			want := slices.ContainsFunc(blocks[0], holds) && !slices.ContainsFunc(excepts[0], holds) ||
				slices.ContainsFunc(blocks[1], holds) && !slices.ContainsFunc(excepts[1], holds)
			if got := slices.ContainsFunc(left, holds); got != want {
				t.Fatalf("seed %d: %v without %v leaves %v: %s is in it: %v, want %v", seed, blocks, excepts, left, a, got, want)
			}
		}
		for i := range left {
			if i > 0 && left[i].Overlaps(left[i-1]) {
				t.Fatalf("seed %d: %v overlap", seed, left)
			}
		}
	}
}

package world

import (
	"math/rand/v2"
	"net/netip"
	"strings"
)

// Steered returns a source of numbers that a fuzzer steers: a byte a number, and fixed pseudo-random ones after the last.
func Steered(data []byte) rand.Source {
	return &steered{data: data, rest: rand.NewPCG(1, 2)}
}

type steered struct {
	data []byte
	rest *rand.PCG
}

// Uint64 repeats the byte, because choices are taken from the high end of a number or from the low one.
func (s *steered) Uint64() uint64 {
	if len(s.data) == 0 {
		return s.rest.Uint64() // zeros for ever would never leave the rejection loop of rand.IntN
	}
	b := s.data[0]
	s.data = s.data[1:]
	return uint64(b) * 0x0101010101010101
}

func pick[T any](r *rand.Rand, choices ...T) T { return choices[r.IntN(len(choices))] }

func join(words []string) string { return strings.Join(words, ",") }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err) // the generator's own words are wrong
	}
	return v
}

func prefixes(list ...string) []netip.Prefix {
	parsed := make([]netip.Prefix, len(list))
	for i, s := range list {
		parsed[i] = netip.MustParsePrefix(s)
	}
	return parsed
}

func addresses(list ...string) []netip.Addr {
	parsed := make([]netip.Addr, len(list))
	for i, s := range list {
		parsed[i] = netip.MustParseAddr(s)
	}
	return parsed
}

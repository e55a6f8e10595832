package firewall

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// large is the sample with n chains of 20 rules more in one family.
func large(chains int) netfilter.Ruleset {
	r := sample()
	for i := range chains {
		c := netfilter.Chain{Table: "mangle", Name: netfilter.Name("T", fmt.Sprint(i))}
		for port := range 20 {
			c.Rules = append(c.Rules, rule("shop/api ingress", fmt.Sprintf("-p tcp --dport %d -j RETURN", port+1)))
		}
		r.V4.Chains = append(r.V4.Chains, c)
	}
	return r
}

// BenchmarkOneChain changes one of many chains.
func BenchmarkOneChain(b *testing.B) {
	for _, chains := range []int{50, 1000} {
		b.Run(fmt.Sprintf("rules=%d", chains*20), func(b *testing.B) {
			w := onBench(b)
			r := large(chains)
			mustApply(b, w, r)
			c := chainIn(&r.V4, "WARREN-POLICY")
			first := c.Rules[0]
			for i := 0; b.Loop(); i++ {
				c.Rules = []netfilter.Rule{first, rule(fmt.Sprint(i), "-j DROP")}
				mustApply(b, w, r)
			}
		})
	}
}

// BenchmarkMembers puts many members in and takes them out again.
func BenchmarkMembers(b *testing.B) {
	w := onBench(b)
	empty, full := sample(), sample()
	set := setIn(&full.V4, peers(netfilter.IPv4))
	for i := range 10_000 {
		set.Entries = append(set.Entries, netfilter.Address(netip.AddrFrom4([4]byte{11, 0, byte(i >> 8), byte(i)})))
	}
	for b.Loop() {
		mustApply(b, w, full)
		mustApply(b, w, empty)
	}
}

// BenchmarkAdopt is the first apply of a daemon that starts where everything stands.
func BenchmarkAdopt(b *testing.B) {
	w := onBench(b)
	r := large(1000)
	set := setIn(&r.V4, peers(netfilter.IPv4))
	for i := range 100_000 {
		set.Entries = append(set.Entries, netfilter.Address(netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)})))
	}
	mustApply(b, w, r)
	for b.Loop() {
		w.Forget()
		if changes := mustApply(b, w, r); changes != (Changes{}) {
			b.Fatalf("wrote %+v", changes)
		}
	}
}

func onBench(b *testing.B) *Firewall {
	b.Helper()
	w, err := New(b.Context(), newNode(b, "").options())
	if err != nil {
		b.Fatal(err)
	}
	return w
}

func mustApply(b *testing.B, w *Firewall, r netfilter.Ruleset) Changes {
	b.Helper()
	changes, err := w.Apply(b.Context(), r)
	if err != nil {
		b.Fatal(err)
	}
	return changes
}

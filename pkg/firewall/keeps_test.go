package firewall

import (
	"slices"
	"testing"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// What a set that keeps its members has held once stays there: through changes, through whole applies and for the next daemon,
// which knows nothing of it; and none of them takes it for a difference. It goes with the set.
func TestKeptMembers(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		named := func(keeps bool, members ...string) netfilter.Ruleset {
			r := sample()
			s := setIn(&r.V4, peers(netfilter.IPv4))
			s.Keeps, s.Entries = keeps, addresses(members...)
			return r
		}
		expect := func(when string, want ...string) {
			t.Helper()
			if got := n.members(peers(netfilter.IPv4)); !slices.Equal(got, want) {
				t.Errorf("%s: members are %q, want %q", when, got, want)
			}
		}
		w := n.firewall()
		n.apply(w, named(true, "10.2.0.0/16", "10.3.0.0/16"))
		if _, err := w.Patch(t.Context(), netfilter.Diff(named(true, "10.2.0.0/16", "10.3.0.0/16"), named(true, "10.4.0.0/16"))); err != nil {
			t.Fatal(err)
		}
		expect("changed", "10.2.0.0/16", "10.3.0.0/16", "10.4.0.0/16")
		if changes := n.apply(n.firewall(), named(true, "10.4.0.0/16")); changes != (Changes{}) {
			t.Errorf("the next daemon wrote %+v", changes)
		}
		if got := n.drift(w, named(true, "10.4.0.0/16")); len(got) > 0 {
			t.Errorf("kept members are a drift: %q", got)
		}
		n.run("ipset flush " + peers(netfilter.IPv4))
		n.apply(w, named(true, "10.4.0.0/16"))
		expect("flushed by others", "10.4.0.0/16")
		n.apply(w, named(true, "10.2.0.0/16", "10.4.0.0/16"))
		n.apply(w, named(false, "10.4.0.0/16"))
		expect("not kept any more", "10.4.0.0/16")
	})
}

package firewall

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// patch makes a change, which must succeed.
func (n *node) patch(w *Firewall, from, to netfilter.Ruleset) Changes {
	n.t.Helper()
	changes, err := w.Patch(n.t.Context(), netfilter.Diff(from, to))
	if err != nil {
		n.t.Fatal(err)
	}
	return changes
}

// TestPatch makes changes without reading, and counts what it takes.
func TestPatch(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		w := n.firewall()
		n.apply(w, sample())
		var x faults
		x.into(w)

		if changes := n.patch(w, sample(), sample()); changes != (Changes{}) || len(x.calls) > 0 {
			t.Errorf("no change wrote %+v by %q", changes, x.calls)
		}
		flipped := sample()
		setIn(&flipped.V4, peers(netfilter.IPv4)).Entries = addresses("10.2.0.0/16", "0.0.0.0/1", "10.9.9.8")
		if changes := n.patch(w, sample(), flipped); changes != (Changes{SetOps: 2}) || len(x.calls) != 2 {
			t.Errorf("a change of one set wrote %+v by %q", changes, x.calls)
		}
		x.calls = nil
		next := groups(nil)
		for _, f := range netfilter.Families {
			h := next.Of(f)
			h.Sets = append(h.Sets, netfilter.Set{Name: "WARREN-Z" + f.String(), Type: netfilter.HashIP})
			chainIn(h, group("a")).Rules[0] = rule("", "-m set --match-set WARREN-Z"+f.String()+" src -j RETURN")
		}
		for _, to := range []netfilter.Ruleset{next, groups(nil), sample(), next} { // chains and sets come, change and go
			x.calls = nil
			changes := n.patch(w, flipped, to)
			flipped = to
			for _, call := range x.calls {
				if strings.Contains(call, "-save") || strings.HasPrefix(call, "list") {
					t.Errorf("a patch reads: %s", call)
				}
			}
			if changes.Execs != 2 {
				t.Errorf("%d programs ran for the chains of one table in two families: %q", changes.Execs, x.calls)
			}
		}
		if again := n.apply(n.firewall(), next); again != (Changes{}) {
			t.Errorf("an apply of what is patched wrote %+v", again)
		}
		if changes := n.patch(w, next, next); changes != (Changes{}) {
			t.Errorf("a second patch wrote %+v", changes)
		}
	})
}

func TestPatchNeedsApply(t *testing.T) {
	n := newNode(t, "nft")
	w := n.firewall()
	change := netfilter.Diff(sample(), successor())
	unknown := func(when string) {
		t.Helper()
		before := n.state()
		if changes, err := w.Patch(t.Context(), change); !errors.Is(err, ErrUnknown) || changes != (Changes{}) {
			t.Errorf("%s: wrote %+v, error %v", when, changes, err)
		}
		if diff := cmp.Diff(before, n.state()); diff != "" {
			t.Errorf("%s: the kernel changed:\n%s", when, diff)
		}
	}
	unknown("at first")
	n.apply(w, sample())
	w.Forget()
	unknown("after Forget")
	n.apply(w, sample())
	x := faults{failAt: 1}
	x.into(w)
	if _, err := w.Patch(t.Context(), change); !errors.Is(err, errInjected) {
		t.Errorf("error is %v", err)
	}
	unknown("after an error")
	n.apply(w, sample())
	change = netfilter.Diff(netfilter.Ruleset{}, sample())
	unknown("with sets as new that stand")
}

// Chains that stand as wanted are not written, whatever the change says.
func TestPatchWritesNoEqualChain(t *testing.T) {
	n := newNode(t, "nft")
	w := n.firewall()
	n.apply(n.firewall(), sample())
	n.apply(w, sample())
	change := netfilter.Change{V4: netfilter.RulesChange{Write: sample().V4.Chains}}
	if changes, err := w.Patch(t.Context(), change); err != nil || changes != (Changes{}) {
		t.Errorf("wrote %+v, error %v", changes, err)
	}
}

// A set that outgrows its bound is made anew while rules refer to it.
func TestPatchEnlarges(t *testing.T) {
	n := newNode(t, "nft")
	n.run("ipset create " + peers(netfilter.IPv4) + " hash:net maxelem 3")
	w := n.firewall()
	n.apply(w, sample())
	to := sample()
	set := setIn(&to.V4, peers(netfilter.IPv4))
	set.Entries = netfilter.Entries(append(slices.Clone(set.Entries), addresses("10.10.0.0/16", "10.11.0.0/16")...))
	n.patch(w, sample(), to)
	if got := n.members(set.Name); len(got) != 5 {
		t.Errorf("members are %q", got)
	}
	if changes := n.apply(n.firewall(), to); changes != (Changes{}) {
		t.Errorf("an apply wrote %+v", changes)
	}
}

// TestPatchClosesWhatIsRefused lets a patch write a rule that the kernel refuses.
func TestPatchClosesWhatIsRefused(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		w := n.firewall()
		n.apply(w, groups(nil))
		wrong := groups(map[string]string{"c": bads()["kernel"]})
		closing := func(c netfilter.Change) {
			t.Helper()
			var closed *ClosedError
			if _, err := w.Patch(t.Context(), c); !errors.As(err, &closed) || len(closed.Chains) != 2 {
				t.Fatalf("error is %v", err)
			}
			for _, f := range netfilter.Families {
				for _, g := range []string{"a", "b", "c", "d", "e"} {
					n.checkGroup(f, g, g == "c")
				}
			}
		}
		closing(netfilter.Diff(groups(nil), wrong))
		closing(netfilter.Change{}) // it says so until it is mended
		n.patch(w, wrong, groups(nil))
		for _, f := range netfilter.Families {
			n.checkGroup(f, "c", false)
		}
	})
}

package firewall

import (
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// isolating is a world of local pods, which a policy isolates for ingress where they are "closed", and one for egress where they are
// "silent".
func isolating(app ...string) netfilter.Ruleset {
	s := cluster.Snapshot{Self: "here", Namespaces: []cluster.Namespace{{Name: "shop"}}, Policies: []cluster.Policy{
		{Namespace: "shop", Name: "closed", Pods: labels.SelectorFromSet(labels.Set{"app": "closed"}), Ingress: true},
		{Namespace: "shop", Name: "silent", Pods: labels.SelectorFromSet(labels.Set{"app": "silent"}), Egress: true},
	}}
	for i, value := range app {
		address := netip.AddrFrom4([4]byte{10, 0, 1, byte(2 + i)})
		s.Pods = append(s.Pods, cluster.Pod{
			Namespace: "shop", Name: address.String(), Node: "here", Labels: labels.Set{"app": value}, Addresses: []netip.Addr{address},
		})
	}
	return rulesOf(s)
}

// A set that isolates pods cannot be made, so the gate keeps them out. A pod that is to be isolated next is not let in because the
// set is not there; and whom the gate kept out comes in again with the next change once the set works, or is not wanted any more.
func TestPatchOfALackingSet(t *testing.T) {
	for name, end := range map[string]netfilter.Ruleset{"healed": isolating("open", "closed"), "gone": isolating("open", "open")} {
		t.Run(name, func(t *testing.T) {
			m := newModel()
			w := m.firewall(Options{Log: slog.New(slog.DiscardHandler)})
			steps := []netfilter.Ruleset{isolating("open"), isolating("closed"), isolating("closed", "closed"), end}
			if _, err := w.Apply(t.Context(), steps[0]); err != nil {
				t.Fatal(err)
			}
			x := faults{broken: "create set WARREN-INGRESS4"}
			x.into(w)
			var refused *ClosedError
			for i, to := range steps[1:] {
				if i == 2 {
					x.broken = ""
				}
				_, err := w.Patch(t.Context(), netfilter.Diff(steps[i], to))
				if errors.Is(err, ErrUnknown) {
					_, err = w.Apply(t.Context(), to)
				}
				ready := m.sets[netfilter.ReadySet(netfilter.IPv4)].members
				if i < 2 && (!errors.As(err, &refused) || len(ready) > 0) {
					t.Errorf("step %d: the gate lets %v pass, error %v; calls %s", i, ready, err, strings.Join(x.calls, "\n"))
				}
				if i == 2 && (err != nil || len(ready) != 2) {
					t.Errorf("in the end the gate lets %v pass, error %v", ready, err)
				}
			}
		})
	}
}

// A set that isolates pods cannot be made. A change that writes a chain which asks that set, and does not name the set, is made without
// the rule as the one before was.
func TestPatchBesideALackingSet(t *testing.T) {
	m := newModel()
	w := m.firewall(Options{Log: slog.New(slog.DiscardHandler)})
	before, after := isolating("closed", "open"), isolating("closed", "silent")
	if _, err := w.Apply(t.Context(), isolating("open", "open")); err != nil {
		t.Fatal(err)
	}
	x := faults{broken: "create set WARREN-INGRESS4"}
	x.into(w)
	for _, change := range []netfilter.Change{netfilter.Diff(isolating("open", "open"), before), netfilter.Diff(before, after)} {
		var refused *ClosedError
		if _, err := w.Patch(t.Context(), change); !errors.As(err, &refused) || len(refused.Sets) != 1 {
			t.Errorf("the patch says %v", err)
		}
		if ready := m.sets[netfilter.ReadySet(netfilter.IPv4)].members; len(ready) != 1 {
			t.Errorf("the gate lets %v pass", ready)
		}
	}
	x.broken = ""
	if _, err := w.Apply(t.Context(), after); err != nil {
		t.Error(err)
	}
	reached(t, m, w, after)
}

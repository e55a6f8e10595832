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

// isolating is a world of two local pods, which a policy isolates where they have its label.
func isolating(app ...string) netfilter.Ruleset {
	s := cluster.Snapshot{Self: "here", Namespaces: []cluster.Namespace{{Name: "shop"}}, Policies: []cluster.Policy{{
		Namespace: "shop", Name: "closed", Pods: labels.SelectorFromSet(labels.Set{"app": "closed"}), Ingress: true,
	}}}
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

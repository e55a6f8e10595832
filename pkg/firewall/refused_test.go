package firewall

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// TestAllRefused measures what it takes when nothing that may be closed is taken.
func TestAllRefused(t *testing.T) {
	onEach(t, func(n *node) {
		const chains = 200
		r := sample()
		for i := range chains {
			r.V4.Chains = append(r.V4.Chains, netfilter.Chain{
				Table: "mangle", Name: netfilter.Name("I", fmt.Sprint(i)), Closable: []string{"shop/x"},
				Rules: []netfilter.Rule{rule("", "-p tcp -m nosuchmatch -j RETURN"), rule("", "-j DROP")},
			})
		}
		w := n.firewall()
		var all Changes
		var closed *ClosedError
		for {
			changes, err := w.Apply(n.t.Context(), r)
			if !errors.As(err, &closed) || len(closed.Chains) != chains {
				n.t.Fatalf("error is %v", err)
			}
			if changes == (Changes{}) {
				break
			}
			if changes.Execs > maxAttempts+25 {
				n.t.Errorf("an apply ran %d programs", changes.Execs)
			}
			all.Execs += changes.Execs
		}
		if all.Execs > chains+50 {
			n.t.Errorf("%d runs until none of %d chains is left to try", all.Execs, chains)
		}
		for id, r := range w.refusals {
			if !w.rests(r) || errors.Is(r.err, errNotTried) {
				n.t.Errorf("chain %s was not tried: %v", id.name, r.err)
			}
		}
		w.Forget()
		if changes, _ := w.Apply(n.t.Context(), r); changes != (Changes{}) {
			n.t.Errorf("an audit tried again: %+v", changes)
		}
	})
}

// A set that cannot be made closes the chain that needs it, and nothing else, in an apply and in a patch.
func TestSetThatCannotBeMade(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		const name = "WARREN-P4-TAKEN"
		r := groups(nil)
		r.V4.Sets = append(r.V4.Sets, netfilter.Set{Name: name, Type: netfilter.HashIP, Comment: "pods x", Entries: addresses("10.9.9.9")})
		chainIn(&r.V4, group("b")).Rules[0] = rule("shop/b ingress 0", "-m set --match-set "+name+" src -j RETURN")
		// It has another type, and somebody's rule holds it.
		n.run("ipset create " + name + " hash:net,port")
		n.run("iptables-" + n.backend + " -A INPUT -m set --match-set " + name + " src,src -j ACCEPT")
		w := n.firewall()
		for range 2 {
			_, err := w.Apply(t.Context(), r)
			var closed *ClosedError
			if !errors.As(err, &closed) || len(closed.Chains) != 1 || len(closed.Sets) != 1 {
				t.Fatalf("error is %v", err)
			}
			want := ClosedSet{
				Family: netfilter.IPv4, Name: name, Comment: "pods x", Objects: []string{"shop/all", "shop/b"}, Err: closed.Sets[0].Err,
			}
			if diff := cmp.Diff(want, closed.Sets[0], cmpopts.EquateErrors()); diff != "" {
				t.Errorf("the set differs (-want +got):\n%s", diff)
			}
			for _, g := range []string{"a", "b", "c", "d", "e"} {
				n.checkGroup(netfilter.IPv4, g, g == "b")
				n.checkGroup(netfilter.IPv6, g, false)
			}
			if got := n.members(netfilter.ReadySet(netfilter.IPv4)); len(got) != 2 {
				t.Errorf("the gate is open for %q", got)
			}
		}
		// What changes in it meanwhile does not need an apply.
		change := netfilter.SetChange{Set: r.V4.Sets[len(r.V4.Sets)-1], Add: addresses("10.9.9.8")}
		var closed *ClosedError
		if _, err := w.Patch(t.Context(), netfilter.Change{V4: netfilter.RulesChange{Sets: []netfilter.SetChange{change}}}); !errors.As(err, &closed) {
			t.Errorf("error is %v", err)
		}
		n.run("iptables-" + n.backend + " -F INPUT")
		n.apply(w, r)
		n.checkClosedNowhere(r)
	})
}

// checkClosedNowhere looks for the closed form of chains.
func (n *node) checkClosedNowhere(r netfilter.Ruleset) {
	n.t.Helper()
	for _, f := range netfilter.Families {
		for _, c := range r.Of(f).Chains {
			if got := strings.Join(n.rules(f, c.Table, c.Name), "\n"); strings.Contains(got, "not applied") {
				n.t.Errorf("%s: chain %s has %s", f, c.Name, got)
			}
		}
	}
}

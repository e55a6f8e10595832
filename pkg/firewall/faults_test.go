package firewall

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// errInjected is the failure that a test asked for.
var errInjected = errors.New("injected fault")

// faults stands between a Firewall and the kernel: it notes every call, and makes one fail.
type faults struct {
	calls []string
	// failAt is the number of the call that fails, from 1; 0 is none.
	failAt int
	// afterwards lets the call take effect before it fails, as when an answer is lost.
	afterwards bool
	// broken is what always fails, as it is noted; empty is nothing.
	broken string
}

// call makes one call to the kernel.
func (x *faults) call(what string, do func() error) error {
	x.calls = append(x.calls, what)
	if what == x.broken {
		return fmt.Errorf("%s: %w", what, errInjected)
	}
	if len(x.calls) != x.failAt {
		return do()
	}
	if x.afterwards {
		if err := do(); err != nil {
			return err
		}
	}
	return fmt.Errorf("%s: %w", what, errInjected)
}

// into puts the faults between a Firewall and the kernel.
func (x *faults) into(w *Firewall) {
	w.sets = faultySets{w.sets, x}
	for _, t := range w.tools {
		t.exec = faultyExec{t.exec, x}
		t.jumps = faultyJumps{t.jumps, x}
	}
}

type faultyExec struct {
	execer
	*faults
}

func (x faultyExec) Run(ctx context.Context, stdin, path string, args ...string) (stdout, stderr string, err error) {
	what := path + " " + strings.Join(args, " ")
	err = x.call(what, func() error {
		stdout, stderr, err = x.execer.Run(ctx, stdin, path, args...)
		return err
	})
	return stdout, stderr, err
}

type faultyJumps struct {
	jumper
	*faults
}

func (x faultyJumps) Insert(table, chain string, pos int, spec ...string) error {
	return x.call("insert into "+table, func() error { return x.jumper.Insert(table, chain, pos, spec...) })
}

func (x faultyJumps) Append(table, chain string, spec ...string) error {
	return x.call("append to "+table, func() error { return x.jumper.Append(table, chain, spec...) })
}

func (x faultyJumps) Delete(table, chain string, spec ...string) error {
	return x.call("delete from "+table, func() error { return x.jumper.Delete(table, chain, spec...) })
}

type faultySets struct {
	ipsets
	*faults
}

func (x faultySets) List(name string) (sets map[string]*set, err error) {
	err = x.call("list sets "+name, func() error {
		sets, err = x.ipsets.List(name)
		return err
	})
	return sets, err
}

func (x faultySets) Create(name string, s set) error {
	return x.call("create set "+name, func() error { return x.ipsets.Create(name, s) })
}

func (x faultySets) Destroy(name string) error {
	return x.call("destroy set "+name, func() error { return x.ipsets.Destroy(name) })
}

func (x faultySets) Swap(a, b string) error {
	return x.call("swap sets "+a, func() error { return x.ipsets.Swap(a, b) })
}

func (x faultySets) Add(lists ...memberList) []error { return x.update("add to", x.ipsets.Add, lists) }

func (x faultySets) Remove(lists ...memberList) []error {
	return x.update("remove from", x.ipsets.Remove, lists)
}

// update takes each list as a call.
func (x faultySets) update(what string, do func(...memberList) []error, lists []memberList) []error {
	errs := make([]error, len(lists))
	for i, l := range lists {
		if len(l.members) > 0 {
			errs[i] = x.call(what+" set "+l.set, func() error { return errors.Join(do(l)...) })
		}
	}
	return errs
}

// successor is what the sample turns into in the tests of faults: every kind of change at once.
func successor() netfilter.Ruleset {
	r := without()
	for _, f := range netfilter.Families {
		h := r.Of(f)
		other := map[netfilter.Family]string{netfilter.IPv4: "10.1.0.4", netfilter.IPv6: "fd00::4"}[f]
		ready := setIn(h, netfilter.ReadySet(f))
		ready.Entries = netfilter.Entries(append(addresses(other), ready.Entries[1:]...))
		kept := addresses(other)
		if f == netfilter.IPv4 {
			kept = addresses(other, "10.77.0.0/16", "10.79.0.0/16")
		}
		h.Sets = append(h.Sets, netfilter.Set{Name: "WARREN-Z" + f.String(), Type: netfilter.HashNet, Entries: kept})
		policy := half(f).Chains[2]
		policy.Rules = append(policy.Rules[:1:1], rule("more", "-m set --match-set WARREN-Z"+f.String()+" src -j RETURN"), policy.Rules[1])
		policy.Rules[0] = rule("shop/api", "-p tcp -j RETURN")
		h.Chains = append(h.Chains, policy)
		chainIn(h, "WARREN-FORWARD").Rules = half(f).Chains[1].Rules
	}
	return r
}

// prepared returns a node on which the sample stands, damaged a little, and a Firewall that has just started there.
func prepared(t *testing.T) (*node, *Firewall) {
	t.Helper()
	n := newNode(t, "nft")
	n.apply(n.firewall(), sample())
	n.iptables("-t mangle -I FORWARD -i eth7 -j ACCEPT")
	// A set that is wanted in both has to be made larger on the way.
	n.run("ipset create WARREN-Zipv4 hash:net maxelem 2")
	n.run("ipset add WARREN-Zipv4 10.77.0.0/16")
	n.run("ipset add WARREN-Zipv4 10.78.0.0/16")
	return n, n.firewall()
}

// TestFaultAtEveryCall lets each call to the kernel fail once, before and after it took effect. Whatever stands then, the next
// applies come to the same end, and nothing opened too early.
func TestFaultAtEveryCall(t *testing.T) {
	var calls []string
	var want string
	t.Run("none", func(t *testing.T) {
		n, w := prepared(t)
		var x faults
		x.into(w)
		n.apply(w, successor())
		calls, want = x.calls, n.state()
	})
	if len(calls) < 30 {
		t.Fatalf("only %d calls: %q", len(calls), calls)
	}
	for i, what := range calls {
		for _, afterwards := range []bool{false, true} {
			if afterwards && (strings.Contains(what, "-save") || strings.HasPrefix(what, "list")) {
				continue // reading has no effect
			}
			t.Run(fmt.Sprintf("%d_%s_%t", i+1, what, afterwards), func(t *testing.T) {
				n, w := prepared(t)
				x := faults{failAt: i + 1, afterwards: afterwards}
				x.into(w)
				_, err := w.Apply(t.Context(), successor())
				if err != nil && !errors.Is(err, errInjected) {
					t.Errorf("error is %v", err)
				}
				var closed *ClosedError // of a set that rules need is only what they concern
				if err != nil && !errors.As(err, &closed) {
					checkShut(t, n, i+1, calls)
				}
				x.failAt = 0
				n.apply(w, successor())
				w.Forget() // what could not be removed waits for the next audit
				n.apply(w, successor())
				if diff := cmp.Diff(want, n.state()); diff != "" {
					t.Errorf("the end differs:\n%s", diff)
				}
			})
		}
	}
}

// checkShut looks at the kernel after a failed apply: the gate lets nobody new in unless adding to it was what failed, and no
// built-in chain has lost its hook.
func checkShut(t *testing.T, n *node, failed int, calls []string) {
	t.Helper()
	opening := strings.HasPrefix(calls[failed-1], "add to set WARREN-READY")
	for f, fresh := range map[netfilter.Family]string{netfilter.IPv4: "10.1.0.4", netfilter.IPv6: "fd00::4"} {
		if !opening && slices.Contains(n.members(netfilter.ReadySet(f)), fresh) {
			t.Errorf("the gate is open for %s", fresh)
		}
		for table, chain := range map[string]string{"raw": "PREROUTING", "mangle": "FORWARD", "filter": "FORWARD"} {
			if !slices.ContainsFunc(n.rules(f, table, chain), func(rule string) bool { return ours(jumpTarget(rule)) }) {
				t.Errorf("%s: no hook in %s %s", f, table, chain)
			}
		}
	}
}

// TestOrder checks the order of the calls of one apply that changes everything.
func TestOrder(t *testing.T) {
	n, w := prepared(t)
	var x faults
	x.into(w)
	n.apply(w, successor())
	// Where each kind of call stands first and last.
	first, last := map[string]int{}, map[string]int{}
	for i, call := range x.calls {
		for kind, is := range map[string]bool{
			"late remove": strings.HasPrefix(call, "remove from set WARREN-READY"),
			"late add":    strings.HasPrefix(call, "add to set WARREN-READY"),
			"add":         strings.HasPrefix(call, "add to set WARREN-Z"),
			"remove":      strings.HasPrefix(call, "remove from set WARREN-Z"),
			"rules":       strings.Contains(call, "-restore"),
			"hook":        strings.HasPrefix(call, "insert"),
			"destroy":     strings.HasPrefix(call, "destroy set WARREN-P") || strings.HasPrefix(call, "destroy set WARREN-N"),
		} {
			if !is {
				continue
			}
			if _, seen := first[kind]; !seen {
				first[kind] = i
			}
			last[kind] = i
		}
	}
	for _, pair := range [][2]string{
		{"late remove", "add"},
		{"late remove", "rules"},
		{"late remove", "hook"},
		{"hook", "late add"},
		{"remove", "late add"},
		{"add", "late add"},
		{"rules", "destroy"},
		{"late add", "destroy"},
	} {
		before, ok1 := last[pair[0]]
		after, ok2 := first[pair[1]]
		if !ok1 || !ok2 || before > after {
			t.Errorf("%s does not come before %s in:\n%s", pair[0], pair[1], strings.Join(x.calls, "\n"))
		}
	}
	if calls := strings.Join(x.calls, "\n"); !inOrder(calls, "remove from set WARREN-Zipv4", "-restore", "add to set WARREN-TMP", "swap sets WARREN-Zipv4") {
		t.Errorf("the set of IPv4 is not reduced, used and enlarged in this order:\n%s", calls)
	}
}

// inOrder says whether the words stand in the text in this order.
func inOrder(text string, words ...string) bool {
	for _, w := range words {
		_, after, ok := strings.Cut(text, w)
		if !ok {
			return false
		}
		text = after
	}
	return true
}

package firewall

import (
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/internal/trace"
	"github.com/warren-cni/warren/pkg/internal/world"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// flow is a connection that a test asks about.
type flow struct {
	src, dst netip.Addr
	protocol string
	port     uint16
}

// String returns the flow in words.
func (f flow) String() string {
	return fmt.Sprintf("%s %s -> %s port %d", f.protocol, f.src, f.dst, f.port)
}

// allowed tells whether the rules of one family let a flow begin.
func (f flow) allowed(t *testing.T, filter *trace.Filter, places map[netip.Addr]string) bool {
	t.Helper()
	v, err := filter.Forward(trace.Packet{
		In: places[f.src], Out: places[f.dst], Src: f.src, Dst: f.dst, Protocol: f.protocol, DstPort: f.port, State: "NEW", Flags: "S",
	})
	if err != nil {
		t.Fatal(err)
	}
	return v.Target == ""
}

// parse returns the filters of a text for each family.
func parse(t *testing.T, render func(netfilter.Family) string) map[netfilter.Family]*trace.Filter {
	t.Helper()
	filters := map[netfilter.Family]*trace.Filter{}
	for _, f := range netfilter.Families {
		filter, err := trace.Parse(render(f))
		if err != nil {
			t.Fatal(err)
		}
		filters[f] = filter
	}
	return filters
}

// transition is a change of one object of a world.
type transition struct {
	from, to   netfilter.Ruleset
	places     map[netip.Addr]string
	neverAllow []flow // what both deny
	neverDrop  []flow // what both allow
}

// newTransition makes a random one.
func newTransition(t *testing.T, r *rand.Rand) transition {
	t.Helper()
	before := world.New(r)
	return between(t, before, world.Step(r, before))
}

// between returns the transition from one snapshot to another.
func between(t *testing.T, before, after cluster.Snapshot) transition {
	t.Helper()
	tr := transition{from: rulesOf(before), to: rulesOf(after), places: map[netip.Addr]string{}}
	for _, s := range []cluster.Snapshot{before, after} {
		for i, pod := range s.Pods {
			for _, a := range pod.Addresses {
				if !pod.HostNetwork && !pod.Finished {
					tr.places[a] = map[bool]string{true: fmt.Sprintf("wrn%d", i), false: "warren0"}[pod.Node == s.Self]
				}
			}
		}
	}
	for _, a := range world.Outside() {
		tr.places[a] = "eth0"
	}
	from := parse(t, func(f netfilter.Family) string { return tr.from.Of(f).Render(f) })
	to := parse(t, func(f netfilter.Family) string { return tr.to.Of(f).Render(f) })
	for _, f := range tr.flows() {
		family := netfilter.FamilyOf(f.src)
		old, next := f.allowed(t, from[family], tr.places), f.allowed(t, to[family], tr.places)
		if !old && !next {
			tr.neverAllow = append(tr.neverAllow, f)
		}
		if old && next {
			tr.neverDrop = append(tr.neverDrop, f)
		}
	}
	return tr
}

// rulesOf compiles a world behind guards, with every local pod's address ready.
func rulesOf(s cluster.Snapshot) netfilter.Ruleset {
	var ready []netip.Addr
	for _, pod := range s.Pods {
		if pod.Node == s.Self && !pod.HostNetwork && !pod.Finished {
			ready = append(ready, pod.Addresses...)
		}
	}
	rules, _ := policy.Compile(s)
	return netfilter.Merge(guard.Compile(guard.Config{Encrypted: true, Ready: ready}), rules)
}

// flows are connections that begin or end at a pod of this node.
func (tr *transition) flows() []flow {
	var all []flow
	for src, in := range tr.places {
		for dst, out := range tr.places {
			if src.Is4() != dst.Is4() || !strings.HasPrefix(in, "wrn") && !strings.HasPrefix(out, "wrn") {
				continue
			}
			all = append(all, flow{src, dst, "icmp", 0}, flow{src, dst, "udp", 53})
			for _, port := range []uint16{80, 81} {
				all = append(all, flow{src, dst, "tcp", port})
			}
		}
	}
	return all
}

// stand returns a model on which the transition's beginning stands, and a Firewall that knows it.
func (tr *transition) stand(t *testing.T) (*model, *Firewall) {
	t.Helper()
	m := newModel()
	w := m.firewall(Options{Log: slog.New(slog.DiscardHandler), Now: func() time.Time { return time.Unix(0, 0) }})
	if _, err := w.Apply(t.Context(), tr.from); err != nil {
		t.Fatal(err)
	}
	return m, w
}

// watch lets every state between be judged: nothing passes that both deny. It returns where the number of states that drop what both
// allow is counted.
func (tr *transition) watch(t *testing.T, m *model, name string) *int {
	t.Helper()
	drops := 0
	m.watch = func(what string) {
		now := parse(t, m.render)
		for _, f := range tr.neverAllow {
			if f.allowed(t, now[netfilter.FamilyOf(f.src)], tr.places) {
				t.Errorf("%s: after %q %s passes, which the old and the new rules deny", name, what, f)
				return
			}
		}
		for _, f := range tr.neverDrop {
			if !f.allowed(t, now[netfilter.FamilyOf(f.src)], tr.places) {
				drops++
				return
			}
		}
	}
	return &drops
}

// reached fails the test unless the model holds exactly the ruleset.
func reached(t *testing.T, m *model, w *Firewall, want netfilter.Ruleset) {
	t.Helper()
	m.watch = func(what string) { t.Errorf("an apply of what should stand does %q", what) }
	if changes, err := w.Apply(t.Context(), want); err != nil || changes != (Changes{}) {
		t.Errorf("an apply of what should stand wrote %+v, error %v", changes, err)
	}
}

// TestNothingPassesBetween changes one object of a random world and judges every state that the kernel goes through, by a patch and by
// an apply, with and without an operation that fails, and until the retry has succeeded.
func TestNothingPassesBetween(t *testing.T) {
	const worlds = 60
	drops := 0
	for range worlds {
		seed := rand.Uint64()
		r := rand.New(rand.NewPCG(seed, 0))
		tr := newTransition(t, r)
		name := fmt.Sprintf("seed %d", seed)

		m, w := tr.stand(t)
		dropped := tr.watch(t, m, name)
		var x faults
		x.into(w)
		if _, err := w.Patch(t.Context(), netfilter.Diff(tr.from, tr.to)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		drops += min(*dropped, 1)
		operations := len(x.calls)
		reached(t, m, w, tr.to)
		for failAt := 1; failAt <= operations; failAt++ {
			tr.fault(t, fmt.Sprintf("%s, operation %d fails", name, failAt), failAt, r.IntN(2) == 0)
		}
		if t.Failed() {
			return
		}
	}
	// Some edits of policies and some pods that change their place on both sides have no order in which nothing is dropped.
	if drops > worlds/10 {
		t.Errorf("%d of %d changes dropped for a moment what was allowed before and after", drops, worlds)
	}
}

// TestOneAddressAtBothEnds replaces a pod by one of its name and address with other labels and ports: by the old labels its client may
// reach any of its ports, by the new ones none, and its own policy lets in where its named port is. So nothing may reach the new port.
func TestOneAddressAtBothEnds(t *testing.T) {
	client, server := netip.MustParseAddr("10.0.1.2"), netip.MustParseAddr("10.0.1.3")
	at := func(port uint16, l labels.Set) cluster.Snapshot {
		selector := labels.SelectorFromSet
		return cluster.Snapshot{
			Self: "here", Namespaces: []cluster.Namespace{{Name: "shop"}},
			Pods: []cluster.Pod{
				{Namespace: "shop", Name: "client", Node: "here", Labels: labels.Set{"app": "client"}, Addresses: []netip.Addr{client}},
				{
					Namespace: "shop", Name: "server", Node: "here", Labels: l, Addresses: []netip.Addr{server},
					Ports: []cluster.NamedPort{{Name: "web", Protocol: cluster.TCP, Port: port}},
				},
			},
			Policies: []cluster.Policy{
				{
					Namespace: "shop", Name: "client", Pods: selector(labels.Set{"app": "client"}), Egress: true,
					EgressRules: []cluster.Rule{{Peers: []cluster.Peer{{Pods: selector(labels.Set{"known": "yes"})}}, AnyPort: true}},
				},
				{
					Namespace: "shop", Name: "server", Pods: selector(labels.Set{"app": "server"}), Ingress: true,
					IngressRules: []cluster.Rule{{AnyPeer: true, Ports: []cluster.Port{{Name: "web", Protocol: cluster.TCP}}}},
				},
			},
		}
	}
	tr := between(t, at(81, labels.Set{"app": "server", "known": "yes"}), at(80, labels.Set{"app": "server"}))
	if !slices.Contains(tr.neverAllow, flow{client, server, "tcp", 80}) {
		t.Fatal("the new port may be reached before or afterwards")
	}
	m, w := tr.stand(t)
	tr.watch(t, m, "replaced")
	if _, err := w.Patch(t.Context(), netfilter.Diff(tr.from, tr.to)); err != nil {
		t.Error(err)
	}
	reached(t, m, w, tr.to)
}

// fault lets one operation of a patch fail, tries again until all stands, and judges each state.
func (tr *transition) fault(t *testing.T, name string, failAt int, afterwards bool) {
	t.Helper()
	m, w := tr.stand(t)
	tr.watch(t, m, name)
	x := faults{failAt: failAt, afterwards: afterwards}
	x.into(w)
	_, err := w.Patch(t.Context(), netfilter.Diff(tr.from, tr.to))
	if err != nil && !errors.Is(err, errInjected) {
		t.Errorf("%s: error is %v", name, err)
	}
	x.failAt = 0
	if _, err := w.Apply(t.Context(), tr.to); err != nil {
		t.Errorf("%s: the retry: %v", name, err)
	}
	w.Forget() // what could not be removed
	if _, err := w.Apply(t.Context(), tr.to); err != nil {
		t.Errorf("%s: the second retry: %v", name, err)
	}
	reached(t, m, w, tr.to)
}

// TestOneBrokenSet makes one operation with one set fail again and again while an object of a random world changes. Nothing else
// waits for it: only what the set concerns is closed, until it works again.
func TestOneBrokenSet(t *testing.T) {
	const worlds = 60
	lost, kept := 0, 0
	for i := range worlds {
		seed := rand.Uint64()
		if i == 0 {
			seed = 10466517323788012513 // an only address is no longer isolated, nor to be allowed
		}
		tr := newTransition(t, rand.New(rand.NewPCG(seed, 0)))
		_, w := tr.stand(t)
		var x faults
		x.into(w)
		if _, err := w.Patch(t.Context(), netfilter.Diff(tr.from, tr.to)); err != nil {
			t.Fatal(err)
		}
		for _, call := range x.calls {
			if strings.Contains(call, " set WARREN-") && !strings.Contains(call, "WARREN-READY") && !strings.HasPrefix(call, "destroy") {
				l, k := tr.broken(t, fmt.Sprintf("seed %d, %s fails", seed, call), call)
				lost, kept = lost+l, kept+k
			}
		}
		if t.Failed() {
			return
		}
	}
	if lost == 0 || kept < 4*lost {
		t.Errorf("%d allowed connections were closed, and %d were not", lost, kept)
	}
}

// broken goes through the transition while one call always fails, and then heals it. It returns how many of the allowed connections
// were closed meanwhile, and how many were not.
func (tr *transition) broken(t *testing.T, name, call string) (lost, kept int) {
	t.Helper()
	m, w := tr.stand(t)
	tr.watch(t, m, name)
	x := faults{broken: call}
	x.into(w)
	var closed *ClosedError
	if _, err := w.Patch(t.Context(), netfilter.Diff(tr.from, tr.to)); !errors.As(err, &closed) || len(closed.Sets) != 1 {
		t.Errorf("%s: the patch says %v", name, err)
	}
	for range 2 {
		now := parse(t, m.render)
		for family, filter := range parse(t, func(f netfilter.Family) string { return tr.to.Of(f).Render(f) }) {
			for _, f := range tr.flows() {
				if netfilter.FamilyOf(f.src) != family {
					continue
				}
				want, got := f.allowed(t, filter, tr.places), f.allowed(t, now[family], tr.places)
				switch {
				case got && !want:
					t.Errorf("%s: %s passes", name, f)
				case got:
					kept++
				case want:
					lost++
				}
			}
		}
		// The audit is in the same situation, unless the set is as wanted by now.
		if _, err := w.Apply(t.Context(), tr.to); err != nil && !errors.As(err, &closed) {
			t.Errorf("%s: the apply says %v", name, err)
		}
	}
	x.broken = ""
	if _, err := w.Apply(t.Context(), tr.to); err != nil {
		t.Errorf("%s: once it works: %v", name, err)
	}
	reached(t, m, w, tr.to)
	return lost, kept
}

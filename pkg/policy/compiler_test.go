package policy_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/internal/oracle"
	"github.com/warren-cni/warren/pkg/internal/world"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// walks is how many random clusters are followed, steps is for how long each.
const (
	walks = 40
	steps = 40
)

// TestUpdateFollowsCluster lets random things happen to random clusters. After each of them the compiler that followed has the
// rules of one that sees the cluster for the first time, and its change is what turns the rules before into them.
func TestUpdateFollowsCluster(t *testing.T) {
	seed := rand.Uint64()
	var sum followed
	for i := range walks {
		t.Run(fmt.Sprintf("walk %d of seed %d", i, seed), func(t *testing.T) {
			follow(t, rand.New(rand.NewPCG(seed, uint64(i))), &sum)
		})
		if t.Failed() {
			return
		}
	}
	t.Logf("seed %d: %+v", seed, sum)
	if min(sum.changed, sum.unchanged, sum.judged) < walks*steps/10 || sum.shared < walks/4 {
		t.Errorf("seed %d: %+v has too little of one kind to prove anything", seed, sum)
	}
}

func FuzzUpdateFollowsCluster(f *testing.F) {
	f.Add([]byte("a small world that changes"))
	f.Fuzz(func(t *testing.T, data []byte) {
		follow(t, rand.New(world.Steered(data)), &followed{})
	})
}

// followed counts the steps that changed rules, those that changed none, the connections that were judged otherwise after a
// step, and the steps after which two pods have one address.
type followed struct{ changed, unchanged, judged, shared int }

// follow lets a cluster change and compares the compiler that hears of it with a new one at every step.
func follow(t *testing.T, r *rand.Rand, sum *followed) {
	t.Helper()
	start := world.New(r)
	c := policy.NewCompiler(start.Self, policy.Options{})
	c.Update(start.Delta())
	s, events := start, []cluster.Delta{}
	for range steps {
		next := world.Step(r, s)
		if r.IntN(4) == 0 { // two things at once
			next = world.Step(r, next)
		}
		delta := world.Diff(s, next)
		events = append(events, delta)
		before, allowed := c.Ruleset(), verdicts(c, s, next)
		u := c.Update(delta)
		agrees(t, c, next)
		if diff := cmp.Diff(netfilter.Diff(before, c.Ruleset()), u.Change, cmp.Comparer(sameEntry)); diff != "" {
			t.Errorf("the change is not what changed (-is +says):\n%s", diff)
		}
		judged := affects(t, allowed, verdicts(c, s, next), u.Affected)
		if t.Failed() {
			t.Fatalf("from\n%s\nto\n%s\naffected %v", describe(s), describe(next), u.Affected)
		}
		sum.count(u, judged, next)
		s = next
	}
	agreesWithTracer(t, c, s)
	c.Update(world.Diff(s, start))
	agrees(t, c, start)
	otherwise(t, r, start, s, events)
}

func sameEntry(a, b netfilter.Entry) bool { return a == b }

// agrees compares a compiler with a new one, and what it allows with the oracle.
func agrees(t *testing.T, c *policy.Compiler, s cluster.Snapshot) {
	t.Helper()
	sameRules(t, c, s)
	shared := sharedAddresses(s)
	for _, f := range flows(interfaces(s)) {
		want := oracle.Allowed(s, f)
		if got := c.Allows(policy.Flow(f), nil); got != want && !shared[f.Src] && !shared[f.Dst] {
			t.Errorf("%+v: allowed is %v, the oracle says %v", f, got, want)
		}
	}
}

// agreesWithTracer compares what a compiler allows with what becomes of packets, also where several pods have one address.
func agreesWithTracer(t *testing.T, c *policy.Compiler, s cluster.Snapshot) {
	t.Helper()
	places := interfaces(s)
	filters := load(t, s, slices.Collect(maps.Keys(places)))
	for _, f := range flows(places) {
		verdict, err := filters[netfilter.FamilyOf(f.Src)].Forward(firstPacket(places, f))
		if err != nil {
			t.Fatal(err)
		}
		if got, want := c.Allows(policy.Flow(f), nil), verdict.Target == ""; got != want {
			t.Errorf("%+v: allowed is %v, and a packet passes: %v; by %q", f, got, want, verdict.Trail)
		}
	}
}

// sameRules compares a compiler with a new one.
func sameRules(t *testing.T, c *policy.Compiler, s cluster.Snapshot) {
	t.Helper()
	rules, problems := policy.Compile(s)
	if diff := cmp.Diff(rules, c.Ruleset(), cmp.Comparer(sameEntry), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("the rules differ from those of a new compiler (-new +this):\n%s", diff)
	}
	if got := c.Problems(); !slices.Equal(got, problems) {
		t.Errorf("the problems are %v, those of a new compiler %v", got, problems)
	}
}

// verdicts tells what a compiler allows of the connections of two snapshots.
func verdicts(c *policy.Compiler, before, after cluster.Snapshot) map[oracle.Flow]bool {
	places := interfaces(before)
	maps.Copy(places, interfaces(after))
	allowed := map[oracle.Flow]bool{}
	for _, f := range flows(places) {
		allowed[f] = c.Allows(policy.Flow(f), nil)
	}
	return allowed
}

// affects checks that one end at least of each connection that is judged otherwise is named, and counts them.
func affects(t *testing.T, before, after map[oracle.Flow]bool, affected []netip.Addr) int {
	t.Helper()
	judged := 0
	for f, allowed := range after {
		if allowed == before[f] {
			continue
		}
		judged++
		if !slices.Contains(affected, f.Src) && !slices.Contains(affected, f.Dst) {
			t.Errorf("%+v is judged otherwise, and neither end is affected", f)
		}
	}
	return judged
}

// sharedAddresses are those that more than one pod has: the oracle takes them together for one.
func sharedAddresses(s cluster.Snapshot) map[netip.Addr]bool {
	shared := map[netip.Addr]bool{}
	for _, pod := range s.Pods {
		for _, a := range pod.Addresses {
			if _, seen := shared[a]; !pod.Finished && !pod.HostNetwork {
				shared[a] = seen
			}
		}
	}
	return shared
}

func (sum *followed) count(u policy.Update, judged int, s cluster.Snapshot) {
	sum.judged += judged
	if u.Change.Empty() {
		sum.unchanged++
	} else {
		sum.changed++
	}
	for _, several := range sharedAddresses(s) {
		if several {
			sum.shared++
			return
		}
	}
}

// otherwise comes to the same cluster by other ways: in one step, with all objects in another order, and with every event twice.
func otherwise(t *testing.T, r *rand.Rand, start, end cluster.Snapshot, events []cluster.Delta) {
	t.Helper()
	squashed := policy.NewCompiler(start.Self, policy.Options{})
	squashed.Update(start.Delta())
	squashed.Update(world.Diff(start, end))
	agrees(t, squashed, end)

	twice := policy.NewCompiler(start.Self, policy.Options{})
	twice.Update(start.Delta())
	for _, e := range events {
		twice.Update(e)
		if again := twice.Update(e); !again.Change.Empty() || len(again.Affected) > 0 {
			t.Errorf("the same event again changes %+v", again)
		}
	}
	agrees(t, twice, end)

	shuffled := policy.NewCompiler(start.Self, policy.Options{})
	var single []cluster.Delta
	all := end.Delta()
	for key, p := range all.Pods {
		single = append(single, cluster.Delta{Pods: map[cluster.Key]*cluster.Pod{key: p}})
	}
	for key, p := range all.Policies {
		single = append(single, cluster.Delta{Policies: map[cluster.Key]*cluster.Policy{key: p}})
	}
	for name, n := range all.Namespaces {
		single = append(single, cluster.Delta{Namespaces: map[string]*cluster.Namespace{name: n}})
	}
	r.Shuffle(len(single), func(i, j int) { single[i], single[j] = single[j], single[i] })
	for _, d := range single {
		shuffled.Update(d)
	}
	agrees(t, shuffled, end)
}

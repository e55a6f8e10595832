package policy_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/internal/oracle"
	"github.com/warren-cni/warren/pkg/internal/trace"
	"github.com/warren-cni/warren/pkg/internal/world"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// worlds is how many random clusters a test run judges.
const worlds = 500

func TestAgreesWithOracle(t *testing.T) {
	seed := rand.Uint64()
	sum := newTally()
	for i := range worlds {
		judge(t, rand.New(rand.NewPCG(seed, uint64(i))), sum)
		if t.Failed() {
			t.Fatalf("in world %d of seed %d", i, seed)
		}
	}
	t.Logf("seed %d: %d connections allowed, %d denied; Cyclonus allows %d and denies %d, and was not asked about %v",
		seed, sum.allowed, sum.denied, sum.confirmed[true], sum.confirmed[false], sum.excluded)
	if sum.allowed < worlds || sum.denied < worlds {
		t.Errorf("seed %d: %d allowed and %d denied is too little of one kind to prove anything", seed, sum.allowed, sum.denied)
	}
	// Half of the connections have no fault of Cyclonus in their way.
	if sum.confirmed[true] < sum.allowed/4 || sum.confirmed[false] < sum.denied/8 {
		t.Errorf("seed %d: Cyclonus was asked about too few of them: %v", seed, sum.confirmed)
	}
}

// tally counts connections by verdict: the oracle's and, where it was asked, Cyclonus' (true: allowed), and those that it was
// not asked about, by the fault of it that is the reason.
type tally struct {
	allowed, denied int
	confirmed       map[bool]int
	excluded        map[string]int
}

func newTally() *tally { return &tally{confirmed: map[bool]int{}, excluded: map[string]int{}} }

func FuzzAgreesWithOracle(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte("policies in a small world"))
	f.Fuzz(func(t *testing.T, data []byte) {
		judge(t, rand.New(world.Steered(data)), newTally())
	})
}

// judge checks a random world.
func judge(t *testing.T, r *rand.Rand, sum *tally) {
	t.Helper()
	s := world.New(r)
	check(t, s, readyIn(s, r), sum)
}

// readyIn returns what the start gate lets pass: the addresses of all local pods, or of all but one.
func readyIn(s cluster.Snapshot, r *rand.Rand) []netip.Addr {
	var ready []netip.Addr
	for _, pod := range s.Pods {
		if pod.Node == s.Self && !pod.HostNetwork && !pod.Finished {
			ready = append(ready, pod.Addresses...)
		}
	}
	if len(ready) > 0 && r.IntN(4) == 0 {
		ready = ready[1:]
	}
	return ready
}

// check compares the tracer's verdict on a snapshot's rules, Explain's, the oracle's and Cyclonus', for every connection that
// this node enforces something on, and counts them.
func check(t *testing.T, s cluster.Snapshot, ready []netip.Addr, sum *tally) {
	t.Helper()
	places := interfaces(s)
	filters := load(t, s, ready)
	second := newCyclonus(s)
	for _, f := range flows(places) {
		verdict, err := filters[netfilter.FamilyOf(f.Src)].Forward(firstPacket(places, f))
		if err != nil {
			t.Fatal(err)
		}
		want := oracle.Allowed(s, f) && open(ready, places, f.Src) && open(ready, places, f.Dst)
		if got := verdict.Target == ""; got != want {
			t.Errorf("%s %s -> %s port %d: allowed is %v, the oracle says %v; by %q", f.Protocol, f.Src, f.Dst, f.Port, got, want, verdict.Trail)
		}
		explains(t, s, f)
		second.agree(t, f, sum)
		if want {
			sum.allowed++
		} else {
			sum.denied++
		}
	}
	if t.Failed() {
		rules, problems := policy.Compile(s)
		t.Logf("%s\n%v\n%s", describe(s), problems, rules.Render())
	}
}

// firstPacket is what begins a connection.
func firstPacket(places map[netip.Addr]string, f oracle.Flow) trace.Packet {
	return trace.Packet{
		In: places[f.Src], Out: places[f.Dst], Src: f.Src, Dst: f.Dst, DstPort: f.Port,
		Protocol: strings.ToLower(string(f.Protocol)), State: "NEW", Flags: "S",
	}
}

// explains compares Explain's verdict with the oracle's, on every node and together.
func explains(t *testing.T, s cluster.Snapshot, f oracle.Flow) {
	t.Helper()
	v := policy.Explain(s, policy.Flow{Src: f.Src, Dst: f.Dst, Protocol: f.Protocol, Port: f.Port})
	all := true
	for _, node := range []string{v.From.Node, v.To.Node} {
		s.Self = node
		want := oracle.Allowed(s, f)
		all = all && want
		on := func(side policy.Side) bool { return side.Node != node || side.Allowed }
		if got := on(v.Egress) && on(v.Ingress); got != want {
			t.Errorf("%+v: on node %s Explain says %v, the oracle %v: %+v", f, node, got, want, v)
		}
	}
	if v.Allowed != all {
		t.Errorf("%+v: Explain says %v, the oracle %v: %+v", f, v.Allowed, all, v)
	}
	for _, side := range []policy.Side{v.Egress, v.Ingress} {
		if !consistent(side) {
			t.Errorf("%+v: a verdict that does not follow from its reasons: %+v", f, side)
		}
	}
}

// consistent tells whether a verdict follows from its rules, theirs from their peers and ports, and whether everything that
// does not match says why.
func consistent(s policy.Side) bool {
	allows, ok := !s.Isolated, s.Because != "" && s.Isolated == (len(s.Policies) > 0) && (s.Allowed || s.Node != "")
	matching := func(matches []policy.Match) bool {
		some := false
		for _, m := range matches {
			some = some || m.Matches
			ok = ok && m.Text != "" && m.Matches == (m.Why == "")
		}
		return some
	}
	for _, p := range s.Policies {
		for _, r := range p.Rules {
			peers, ports := matching(r.Peers), matching(r.Ports)
			ok = ok && r.Allows == (peers && ports)
			allows = allows || r.Allows
		}
	}
	return ok && s.Allowed == allows
}

// interfaces tells behind which interface each address of a world is.
func interfaces(s cluster.Snapshot) map[netip.Addr]string {
	places := map[netip.Addr]string{}
	for i, pod := range s.Pods {
		if pod.HostNetwork || pod.Finished {
			continue
		}
		for _, a := range pod.Addresses {
			places[a] = "warren0"
			if pod.Node == s.Self {
				places[a] = fmt.Sprintf("wrn%d", i)
			}
		}
	}
	for _, a := range world.Outside() {
		places[a] = "eth0"
	}
	return places
}

// load renders the rules of a world and reads the text back.
func load(t *testing.T, s cluster.Snapshot, ready []netip.Addr) map[netfilter.Family]*trace.Filter {
	t.Helper()
	base := guard.Compile(guard.Config{Encrypted: true, Ready: ready})
	rules, _ := policy.Compile(s)
	all := netfilter.Merge(base, rules)
	filters := map[netfilter.Family]*trace.Filter{}
	for _, f := range netfilter.Families {
		filter, err := trace.Parse(all.Of(f).Render(f))
		if err != nil {
			t.Fatal(err)
		}
		err = filter.Lint()
		if err != nil {
			t.Errorf("lint of %s: %v", f, err)
		}
		filters[f] = filter
	}
	return filters
}

// open tells whether the start gate lets an address pass: it is no local pod's, or ready.
func open(ready []netip.Addr, places map[netip.Addr]string, a netip.Addr) bool {
	return places[a][:3] != "wrn" || slices.Contains(ready, a)
}

// flows are the connections between all addresses that begin or end at a local pod.
func flows(places map[netip.Addr]string) []oracle.Flow {
	var addresses []netip.Addr
	for a := range places {
		addresses = append(addresses, a)
	}
	slices.SortFunc(addresses, netip.Addr.Compare)
	var list []oracle.Flow
	for _, src := range addresses {
		for _, dst := range addresses {
			if src.Is4() != dst.Is4() || places[src][:3] != "wrn" && places[dst][:3] != "wrn" {
				continue
			}
			list = append(list, oracle.Flow{Src: src, Dst: dst, Protocol: oracle.ICMP})
			for _, protocol := range []cluster.Protocol{cluster.TCP, cluster.UDP, cluster.SCTP} {
				for _, port := range append(world.Ports(), 60) {
					list = append(list, oracle.Flow{Src: src, Dst: dst, Protocol: protocol, Port: port})
				}
			}
		}
	}
	return list
}

// describe writes what a failed world consists of.
func describe(s cluster.Snapshot) string {
	text := ""
	for _, ns := range s.Namespaces {
		text += fmt.Sprintf("namespace %s %v\n", ns.Name, ns.Labels)
	}
	for _, p := range s.Pods {
		text += fmt.Sprintf("pod %+v\n", p)
	}
	for _, p := range s.Policies {
		text += fmt.Sprintf("policy %+v\n", p)
	}
	return text
}

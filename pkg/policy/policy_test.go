package policy_test

import (
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/internal/trace"
	"github.com/warren-cni/warren/pkg/internal/world"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// one is a snapshot with a local pod and a remote one, and a policy for the local one.
func one(p cluster.Policy) cluster.Snapshot {
	p.Namespace, p.Name = "shop", "api"
	return cluster.Snapshot{
		Self:       "here",
		Namespaces: []cluster.Namespace{{Name: "shop"}},
		Pods: []cluster.Pod{
			{Namespace: "shop", Name: "local", Node: "here", Addresses: []netip.Addr{netip.MustParseAddr("10.0.1.2")}},
			{Namespace: "shop", Name: "remote", Node: "there", Addresses: []netip.Addr{netip.MustParseAddr("10.0.2.2")}},
		},
		Policies: []cluster.Policy{p},
	}
}

// What pkg/kube would never hand over is closed all the same, and reported.
func TestUnenforceable(t *testing.T) {
	port := func(p cluster.Port) []cluster.Rule {
		return []cluster.Rule{{Index: 3, AnyPeer: true, Ports: []cluster.Port{p}}}
	}
	for name, c := range map[string]struct {
		policy cluster.Policy
		field  string
	}{
		"no selector":     {cluster.Policy{Ingress: true}, "spec.podSelector"},
		"reversed range":  {cluster.Policy{Pods: labels.Everything(), Ingress: true, IngressRules: port(cluster.Port{Protocol: cluster.TCP, First: 9, Last: 8})}, "spec.ingress[3].ports"},
		"range from zero": {cluster.Policy{Pods: labels.Everything(), Ingress: true, IngressRules: port(cluster.Port{Protocol: cluster.TCP, Last: 8})}, "spec.ingress[3].ports"},
		"no protocol":     {cluster.Policy{Pods: labels.Everything(), Ingress: true, IngressRules: port(cluster.Port{First: 8, Last: 8})}, "spec.ingress[3].ports"},
		"no peer": {cluster.Policy{Pods: labels.Everything(), Ingress: true, IngressRules: []cluster.Rule{
			{Index: 3, Peers: []cluster.Peer{{}}, AnyPort: true},
		}}, "spec.ingress[3]"},
	} {
		rules, problems := policy.Compile(one(c.policy))
		if len(problems) != 1 || problems[0].Code != "PolicyUnenforceable" || problems[0].Field != c.field ||
			problems[0].Object != "NetworkPolicy shop/api" {
			t.Errorf("%s: the problems are %v, want one of field %s", name, problems, c.field)
		}
		if got := connect(t, rules, "S", "10.0.2.2", "10.0.1.2"); got != "DROP" {
			t.Errorf("%s: the pod can be reached (%q)", name, got)
		}
	}
}

// connect walks a TCP packet without a connection, and returns its end.
func connect(t *testing.T, rules netfilter.Ruleset, flags, src, dst string) string {
	t.Helper()
	local := netip.MustParseAddr("10.0.1.2")
	all := netfilter.Merge(guard.Compile(guard.Config{Ready: []netip.Addr{local}}), rules)
	filter, err := trace.Parse(all.V4.Render(netfilter.IPv4))
	if err != nil {
		t.Fatal(err)
	}
	p := trace.Packet{
		In: "eth0", Out: "eth0", Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr(dst),
		Protocol: "tcp", DstPort: 8, Flags: flags, State: "NEW",
	}
	if p.Src == local {
		p.In = "wrn1"
	}
	if p.Dst == local {
		p.Out = "wrn1"
	}
	verdict, err := filter.Forward(p)
	if err != nil {
		t.Fatal(err)
	}
	return verdict.Target
}

// A packet from the middle of a connection that conntrack does not know makes a reversed entry: as the pod's answer it
// would open what ingress closes. So it is dropped in both directions, also in the one that is not isolated.
func TestMiddleOfConnection(t *testing.T) {
	isolated, _ := policy.Compile(one(cluster.Policy{Pods: labels.Everything(), Ingress: true, IngressRules: []cluster.Rule{
		{AnyPeer: true, AnyPort: true},
	}}))
	free, _ := policy.Compile(one(cluster.Policy{Pods: labels.Nothing(), Ingress: true}))
	for _, c := range []struct {
		name            string
		rules           netfilter.Ruleset
		flags, src, dst string
		want            string
	}{
		{"first packet in", isolated, "S", "10.0.2.2", "10.0.1.2", ""},
		{"first packet out", isolated, "S", "10.0.1.2", "10.0.2.2", ""},
		{"middle in", isolated, "A", "10.0.2.2", "10.0.1.2", "DROP"},
		{"middle out", isolated, "SA", "10.0.1.2", "10.0.2.2", "DROP"},
		{"middle in of a free pod", free, "A", "10.0.2.2", "10.0.1.2", ""},
		{"middle out of a free pod", free, "A", "10.0.1.2", "10.0.2.2", ""},
	} {
		if got := connect(t, c.rules, c.flags, c.src, c.dst); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// The same state gives the same rules, whatever the order it is listed in and however often it is compiled.
func TestDependsOnStateOnly(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	for range 50 {
		s := world.New(r)
		want, wantProblems := policy.Compile(s)
		shuffled := s
		shuffled.Pods = slices.Clone(s.Pods)
		shuffled.Policies = slices.Clone(s.Policies)
		r.Shuffle(len(s.Pods), func(i, j int) { shuffled.Pods[i], shuffled.Pods[j] = shuffled.Pods[j], shuffled.Pods[i] })
		again, againProblems := policy.Compile(shuffled)
		if again.Render() != want.Render() || !reflect.DeepEqual(again, want) || !slices.Equal(againProblems, wantProblems) {
			t.Fatalf("seed %d: the rules depend on the order of pods", seed)
		}
	}
}

// The library writes both selectors as the empty text.
func TestEverythingAndNothingAreDifferentSets(t *testing.T) {
	rules, _ := policy.Compile(one(cluster.Policy{Pods: labels.Everything(), Ingress: true, IngressRules: []cluster.Rule{
		{AnyPort: true, Peers: []cluster.Peer{{Pods: labels.Nothing()}}},
		{Index: 1, Peers: []cluster.Peer{{Pods: labels.Everything()}}, Ports: []cluster.Port{{Protocol: cluster.TCP, First: 9, Last: 9}}},
	}}))
	if got := connect(t, rules, "S", "10.0.2.2", "10.0.1.2"); got != "DROP" {
		t.Errorf("a selector that chooses nobody allows: %q", got)
	}
}

// Names that people chose can be long and many; the kernel's limits hold.
func TestLongNames(t *testing.T) {
	s := one(cluster.Policy{})
	s.Policies = nil
	for _, letter := range []string{"a", "b", "c"} {
		s.Policies = append(s.Policies, cluster.Policy{
			Namespace: "shop", Name: strings.Repeat(letter, 253), Pods: labels.Everything(), Ingress: true, Egress: true,
		})
	}
	rules, _ := policy.Compile(s)
	all := netfilter.Merge(guard.Compile(guard.Config{}), rules)
	filter, err := trace.Parse(all.V4.Render(netfilter.IPv4))
	if err != nil {
		t.Fatal(err)
	}
	err = filter.Lint()
	if err != nil {
		t.Error(err)
	}
}

package policy_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// TestAffected says which addresses each kind of event affects: as few as possible, because the established connections of each
// are looked at.
func TestAffected(t *testing.T) {
	peers := labels.SelectorFromSet(labels.Set{"app": "peer"})
	s := one(cluster.Policy{Pods: labels.SelectorFromSet(labels.Set{"app": "api"}), Ingress: true, IngressRules: []cluster.Rule{
		{AnyPort: true, Peers: []cluster.Peer{{Pods: peers}}},
	}})
	local, remote := s.Pods[0], s.Pods[1]
	local.Labels, remote.Labels = labels.Set{"app": "api"}, labels.Set{"app": "peer"}
	second := local
	second.Name, second.Addresses = "second", []netip.Addr{netip.MustParseAddr("10.0.1.3")}
	s.Pods = []cluster.Pod{local, second, remote}

	pod := func(p cluster.Pod, change func(*cluster.Pod)) cluster.Delta {
		key := p.Key()
		change(&p)
		return cluster.Delta{Pods: map[cluster.Key]*cluster.Pod{key: &p}}
	}
	edited := s.Policies[0]
	edited.IngressRules = nil
	copied := s.Policies[0]
	for name, c := range map[string]struct {
		delta cluster.Delta
		want  []string
	}{
		"a peer is none any more":      {pod(remote, func(p *cluster.Pod) { p.Labels = nil }), []string{"10.0.2.2"}},
		"a peer has another address":   {pod(remote, func(p *cluster.Pod) { p.Addresses = addrs("10.0.2.9") }), []string{"10.0.2.2", "10.0.2.9"}},
		"a peer has a label more":      {pod(remote, func(p *cluster.Pod) { p.Labels = labels.Set{"app": "peer", "x": "y"} }), nil},
		"a peer has other ports":       {pod(remote, func(p *cluster.Pod) { p.Ports = []cluster.NamedPort{{Name: "http", Protocol: cluster.TCP, Port: 80}} }), nil},
		"a peer goes":                  {cluster.Delta{Pods: map[cluster.Key]*cluster.Pod{remote.Key(): nil}}, []string{"10.0.2.2"}},
		"a pod is not isolated":        {pod(second, func(p *cluster.Pod) { p.Labels = nil }), []string{"10.0.1.3"}},
		"a pod has another address":    {pod(second, func(p *cluster.Pod) { p.Addresses = addrs("10.0.1.4") }), []string{"10.0.1.3", "10.0.1.4"}},
		"a pod goes":                   {cluster.Delta{Pods: map[cluster.Key]*cluster.Pod{second.Key(): nil}}, []string{"10.0.1.3"}},
		"a pod is a peer, too":         {pod(second, func(p *cluster.Pod) { p.Labels = labels.Set{"app": "peer"} }), []string{"10.0.1.3"}},
		"the policy has other rules":   {cluster.Delta{Policies: map[cluster.Key]*cluster.Policy{edited.Key(): &edited}}, []string{"10.0.1.2", "10.0.1.3"}},
		"the policy goes":              {cluster.Delta{Policies: map[cluster.Key]*cluster.Policy{edited.Key(): nil}}, []string{"10.0.1.2", "10.0.1.3"}},
		"the policy is another object": {cluster.Delta{Policies: map[cluster.Key]*cluster.Policy{edited.Key(): &copied}}, nil},
		"the namespace has labels":     {cluster.Delta{Namespaces: map[string]*cluster.Namespace{"shop": {Name: "shop", Labels: labels.Set{"a": "b"}}}}, nil},
	} {
		compiler := policy.NewCompiler(s.Self, policy.Options{})
		compiler.Update(s.Delta())
		u := compiler.Update(c.delta)
		if !slices.Equal(u.Affected, addrs(c.want...)) {
			t.Errorf("%s: %s are affected, want %s", name, u.Affected, c.want)
		}
		if len(c.want) == 0 && !u.Change.Empty() {
			t.Errorf("%s: it changes %+v", name, u.Change)
		}
	}
}

func addrs(list ...string) []netip.Addr {
	var parsed []netip.Addr
	for _, s := range list {
		parsed = append(parsed, netip.MustParseAddr(s))
	}
	return parsed
}

// TestAllowsBesidesPolicies holds what no policy decides against a pod that is isolated for everything.
func TestAllowsBesidesPolicies(t *testing.T) {
	s := one(cluster.Policy{Pods: labels.Everything(), Ingress: true, Egress: true})
	s.Nodes = []cluster.Node{
		{Name: "here", Addresses: addrs("192.168.0.1"), PodCIDRs: prefixes("10.0.1.0/24")},
		{Name: "there", Addresses: addrs("192.168.0.2"), PodCIDRs: prefixes("10.0.2.0/24")},
	}
	c := policy.NewCompiler(s.Self, policy.Options{})
	c.Update(s.Delta())
	judge := func(src, dst string, closed map[string]bool) bool {
		return c.Allows(policy.Flow{Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr(dst), Protocol: cluster.TCP, Port: 80}, closed)
	}
	for _, f := range []struct {
		src, dst string
		want     bool
	}{
		{"10.0.1.2", "10.0.1.2", true},
		{"192.168.0.1", "10.0.1.2", true},
		{"10.0.1.2", "192.168.0.1", true},
		{"10.0.1.1", "10.0.1.2", true},
		{"192.168.0.2", "10.0.1.2", false},
		{"10.0.2.1", "10.0.1.2", false},
		{"10.0.1.2", "10.0.2.2", false},
		{"10.0.2.2", "192.0.2.1", true}, // it is for another node to say
	} {
		if got := judge(f.src, f.dst, nil); got != f.want {
			t.Errorf("%s -> %s: allowed is %v", f.src, f.dst, got)
		}
	}

	open := s.Policies[0]
	open.IngressRules = []cluster.Rule{{AnyPeer: true, AnyPort: true}}
	u := c.Update(cluster.Delta{Policies: map[cluster.Key]*cluster.Policy{open.Key(): &open}})
	if len(u.Change.V4.Write) != 1 {
		t.Fatalf("opening the policy writes %+v", u.Change.V4.Write)
	}
	chain := u.Change.V4.Write[0].Name
	if !judge("10.0.2.2", "10.0.1.2", nil) || judge("10.0.2.2", "10.0.1.2", map[string]bool{chain: true}) {
		t.Error("what the policy allows passes where its chain is closed, or nowhere")
	}
}

// TestManyMembers lets more members come and go than a set has, and compares it with a new one every now and then.
func TestManyMembers(t *testing.T) {
	seed := rand.Uint64()
	r := rand.New(rand.NewPCG(seed, 0))
	s := scale(size{namespaces: 2, pods: 600, policies: 20, local: 20})
	c := policy.NewCompiler(s.Self, policy.Options{})
	c.Update(s.Delta())
	s.Pods = slices.Clone(s.Pods) // the compiler has the others
	operations := 0
	for i := range 3000 {
		pod := &s.Pods[r.IntN(len(s.Pods))]
		pod.Labels = maps.Clone(pod.Labels)
		pod.Labels["app"] = fmt.Sprintf("app-%d", r.IntN(3))
		now := *pod
		u := c.Update(cluster.Delta{Pods: map[cluster.Key]*cluster.Pod{pod.Key(): &now}})
		for _, f := range netfilter.Families {
			for _, set := range u.Change.Of(f).Sets {
				operations += len(set.Add) + len(set.Remove)
			}
		}
		if i%500 == 0 {
			sameRules(t, c, s)
		}
		if t.Failed() {
			t.Fatalf("after %d steps of seed %d", i, seed)
		}
	}
	if operations < 3000 {
		t.Errorf("seed %d: %d operations on sets are too few to prove anything", seed, operations)
	}
}

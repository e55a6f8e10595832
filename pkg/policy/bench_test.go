package policy_test

import (
	"fmt"
	"maps"
	"net/netip"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/internal/measure"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// size is how large a cluster is.
type size struct{ namespaces, pods, policies, local int }

func (l size) String() string {
	return fmt.Sprintf("namespaces=%d/pods=%d/policies=%d/local=%d", l.namespaces, l.pods, l.policies, l.local)
}

// scale makes a cluster of 100 other nodes: a policy for each of 20 apps of a namespace in turn that lets in another app of the
// namespace and one of all namespaces of a team.
func scale(l size) cluster.Snapshot {
	s := cluster.Snapshot{Self: "node-0"}
	for i := range l.namespaces {
		s.Namespaces = append(s.Namespaces, cluster.Namespace{
			Name: fmt.Sprintf("ns-%04d", i), Labels: labels.Set{"team": fmt.Sprintf("team-%d", i%10)},
		})
	}
	for i := range l.pods {
		pod := cluster.Pod{
			Namespace: s.Namespaces[i%l.namespaces].Name, Name: fmt.Sprintf("pod-%06d", i), Node: fmt.Sprintf("node-%d", 1+i%100),
			Labels: labels.Set{"app": fmt.Sprintf("app-%d", i/l.namespaces%20), "tier": fmt.Sprintf("tier-%d", i%3), "pod-template-hash": fmt.Sprint(i / 3)},
			Addresses: []netip.Addr{
				netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}),
				netip.AddrFrom16([16]byte{0xfd, 0, 13: byte(i >> 16), 14: byte(i >> 8), 15: byte(i)}),
			},
			Ports: []cluster.NamedPort{{Name: "http", Protocol: cluster.TCP, Port: 8080}},
		}
		if i < l.local {
			pod.Node = s.Self
		}
		s.Pods = append(s.Pods, pod)
	}
	for i := range l.policies {
		app := func(n int) labels.Selector {
			return labels.SelectorFromSet(labels.Set{"app": fmt.Sprintf("app-%d", n%20)})
		}
		s.Policies = append(s.Policies, cluster.Policy{
			Namespace: s.Namespaces[i%l.namespaces].Name, Name: fmt.Sprintf("policy-%05d", i), Pods: app(i / l.namespaces), Ingress: true,
			IngressRules: []cluster.Rule{
				{Peers: []cluster.Peer{{Pods: app(i/l.namespaces + 1)}}, Ports: []cluster.Port{{Protocol: cluster.TCP, Name: "http"}}},
				{Index: 1, AnyPort: true, Peers: []cluster.Peer{{
					Namespaces: labels.SelectorFromSet(labels.Set{"team": fmt.Sprintf("team-%d", i%10)}), Pods: app(i + 2),
				}}},
			},
		})
	}
	return s
}

// BenchmarkCompile sees a cluster for the first time. peak-MB is what the heap grows by at most, garbage included, above the
// cluster's objects, which pkg/kube keeps anyway.
func BenchmarkCompile(b *testing.B) {
	for _, l := range []size{
		{namespaces: 100, pods: 5000, policies: 1000, local: 50},
		{namespaces: 100, pods: 5000, policies: 1000, local: 5000},
		{namespaces: 5000, pods: 250_000, policies: 10_000, local: 200},
		{namespaces: 25_000, pods: 100_000, policies: 75_000, local: 200},
	} {
		b.Run(l.String(), func(b *testing.B) {
			s := scale(l)
			b.ReportAllocs()
			report := measure.PerOperation(b)
			for b.Loop() {
				rules, problems := policy.Compile(s)
				if len(rules.V4.Chains) < 5 || len(problems) > 0 {
					b.Fatalf("%d chains, problems %v", len(rules.V4.Chains), problems)
				}
			}
			report()
			most := watchHeap()
			policy.Compile(s)
			b.ReportMetric(float64(most())/1e6, "peak-MB")
			runtime.KeepAlive(s) // so that it is not what is collected
		})
	}
}

// watchHeap follows the size of the heap until its result is called, which returns what it grew by at most. The collector runs
// as early as in a process that has little memory left.
func watchHeap() (most func() uint64) {
	percent := debug.SetGCPercent(10)
	runtime.GC()
	heap := func() uint64 {
		samples := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
		metrics.Read(samples)
		return samples[0].Value.Uint64()
	}
	start := heap()
	peak, done, ended := start, make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				peak = max(peak, heap())
			case <-done:
				return
			}
		}
	}()
	return func() uint64 {
		close(done)
		<-ended
		debug.SetGCPercent(percent)
		return max(peak, heap()) - start
	}
}

// flip returns two events: a pod gets another label, and the one that it had.
func flip(pod cluster.Pod, key, value string) [2]cluster.Delta {
	other := pod
	other.Labels = maps.Clone(pod.Labels)
	other.Labels[key] = value
	return [2]cluster.Delta{
		{Pods: map[cluster.Key]*cluster.Pod{pod.Key(): &other}}, {Pods: map[cluster.Key]*cluster.Pod{pod.Key(): &pod}},
	}
}

// BenchmarkLabelFlip gives one pod of another node another label, and the old one again, in a cluster whose compiler runs. What
// comes of it are the memberships that change, and nothing else.
func BenchmarkLabelFlip(b *testing.B) {
	for _, pods := range []int{10_000, 100_000} {
		b.Run(fmt.Sprintf("pods=%d", pods), func(b *testing.B) {
			s := scale(size{namespaces: 100, pods: pods, policies: 1000, local: 100})
			c := policy.NewCompiler(s.Self, policy.Options{})
			c.Update(s.Delta())
			events := flip(s.Pods[len(s.Pods)-1], "app", "app-1")
			members, rest, i := 0, 0, 0
			b.ReportAllocs()
			report := measure.PerOperation(b)
			for b.Loop() {
				u := c.Update(events[i%2])
				for _, f := range netfilter.Families {
					r := u.Change.Of(f)
					rest += len(r.Write) + len(r.Delete)
					for _, set := range r.Sets {
						members += len(set.Add) + len(set.Remove)
					}
				}
				i++
			}
			report()
			// It is in two sets of a family or in none: app-1 in its own namespace, and in those of its team.
			if members != 4*i || rest != 0 {
				b.Errorf("%d members and %d chains change in %d flips", members, rest, i)
			}
			b.ReportMetric(float64(members)/float64(i), "members/op")
		})
	}
}

// BenchmarkChurn lets a pod of another node come and go that no selection of this node chooses.
func BenchmarkChurn(b *testing.B) {
	s := scale(size{namespaces: 100, pods: 10_000, policies: 1000, local: 100})
	c := policy.NewCompiler(s.Self, policy.Options{})
	c.Update(s.Delta())
	pod := s.Pods[len(s.Pods)-1]
	pod.Name, pod.Labels = "job", labels.Set{"job": "nightly"}
	pod.Addresses = []netip.Addr{netip.MustParseAddr("10.200.0.1")}
	key := pod.Key()
	events := [2]cluster.Delta{
		{Pods: map[cluster.Key]*cluster.Pod{key: &pod}}, {Pods: map[cluster.Key]*cluster.Pod{key: nil}},
	}
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		if u := c.Update(events[i%2]); !u.Change.Empty() || len(u.Affected) > 0 {
			b.Fatalf("it changes %+v", u)
		}
		i++
	}
}

// BenchmarkPolicyEdit lets a policy of local pods allow another port, and the old one again.
func BenchmarkPolicyEdit(b *testing.B) {
	s := scale(size{namespaces: 100, pods: 10_000, policies: 1000, local: 100})
	c := policy.NewCompiler(s.Self, policy.Options{})
	c.Update(s.Delta())
	edited := s.Policies[0]
	edited.IngressRules = []cluster.Rule{{AnyPeer: true, Ports: []cluster.Port{{Protocol: cluster.TCP, First: 80, Last: 80}}}}
	events := [2]cluster.Delta{
		{Policies: map[cluster.Key]*cluster.Policy{edited.Key(): &edited}}, {Policies: map[cluster.Key]*cluster.Policy{edited.Key(): &s.Policies[0]}},
	}
	i := 0
	b.ReportAllocs()
	for b.Loop() {
		if u := c.Update(events[i%2]); len(u.Change.V4.Write) != 1 || len(u.Change.V6.Write) != 1 {
			b.Fatalf("it changes %+v", u.Change)
		}
		i++
	}
}

// BenchmarkAllows judges a connection to a local pod that no rule allows, as a sweep of established ones does.
func BenchmarkAllows(b *testing.B) {
	for _, policies := range []int{10, 1000} {
		b.Run(fmt.Sprintf("policies=%d", policies), func(b *testing.B) {
			s := scale(size{namespaces: 1, pods: 1000, policies: policies, local: 1})
			for i := range s.Policies {
				s.Policies[i].Pods = labels.Everything()
			}
			c := policy.NewCompiler(s.Self, policy.Options{})
			c.Update(s.Delta())
			f := policy.Flow{Src: netip.MustParseAddr("192.0.2.1"), Dst: s.Pods[0].Addresses[0], Protocol: cluster.TCP, Port: 22}
			b.ReportAllocs()
			for b.Loop() {
				if c.Allows(f, nil) {
					b.Fatal("it is allowed")
				}
			}
		})
	}
}

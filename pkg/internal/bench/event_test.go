package bench

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/policy"
	"github.com/warren-cni/warren/pkg/testnode"
)

// BenchmarkEvent takes one event from the cluster to the kernel, where a thousand policies concern a hundred pods of the node: a pod
// of another node gets a label, and a policy another port. It does so with a compiler and a firewall that stand, and by
// writing everything anew, in turns; the policies and pods, and so the work, are the same.
func BenchmarkEvent(b *testing.B) {
	before := crowd()
	after := before
	after.Pods, after.Policies = slices.Clone(before.Pods), slices.Clone(before.Policies)
	pod, edited := len(after.Pods)-1, &after.Policies[0]
	after.Pods[pod].Labels = labels.Set{"app": "app-1"}
	edited.IngressRules = []cluster.Rule{{AnyPeer: true, Ports: []cluster.Port{{Protocol: cluster.TCP, First: 80, Last: 80}}}}
	states := []cluster.Snapshot{after, before}
	b.Run("label", func(b *testing.B) {
		takeTurns(b, states, func(s cluster.Snapshot) cluster.Delta {
			return cluster.Delta{Pods: map[cluster.Key]*cluster.Pod{s.Pods[pod].Key(): &s.Pods[pod]}}
		})
	})
	b.Run("policy", func(b *testing.B) {
		takeTurns(b, states, func(s cluster.Snapshot) cluster.Delta {
			return cluster.Delta{Policies: map[cluster.Key]*cluster.Policy{edited.Key(): &s.Policies[0]}}
		})
	})
}

// takeTurns goes through the states again and again, each from the last by an event, both ways, and reports the medians.
func takeTurns(b *testing.B, states []cluster.Snapshot, event func(cluster.Snapshot) cluster.Delta) {
	b.Helper()
	ours, theirs := testnode.New(b), testnode.New(b)
	in := func(space ns.NetNS, do func() error) float64 {
		began := time.Now() //nolint:forbidigo // a measurement
		if err := space.Do(func(ns.NetNS) error { return do() }); err != nil {
			b.Fatal(err)
		}
		return milliseconds(time.Since(began))
	}
	start := states[len(states)-1]
	compiler := policy.NewCompiler(start.Self, policy.Options{})
	compiler.Update(start.Delta())
	var filter *firewall.Firewall
	in(ours, func() (err error) {
		if filter, err = firewall.New(b.Context(), firewall.Options{Log: slog.New(slog.DiscardHandler), Backend: "nft"}); err != nil {
			return err
		}
		b.Cleanup(filter.Close)
		_, err = filter.Apply(b.Context(), compiler.Ruleset())
		return err
	})
	in(theirs, func() error { return rewrite(b.Context(), start) })
	var incremental, anew, ratios []float64
	for b.Loop() {
		for _, s := range states {
			one := in(ours, func() error {
				_, err := filter.Patch(b.Context(), compiler.Update(event(s)).Change)
				return err
			})
			all := in(theirs, func() error { return rewrite(b.Context(), s) })
			incremental, anew, ratios = append(incremental, one), append(anew, all), append(ratios, all/one)
		}
	}
	b.ReportMetric(percentile(incremental, 0.5), "ms/event")
	b.ReportMetric(percentile(anew, 0.5), "ms/rewrite")
	b.ReportMetric(percentile(ratios, 0.5), "x-rewrite")
}

// crowd is a cluster of 10,000 pods, a hundred of them local, with a thousand policies, all of which concern local ones.
func crowd() cluster.Snapshot {
	const namespaces, apps, pods, local, policies = 10, 10, 10_000, 100, 1000
	s := cluster.Snapshot{Self: "node-0"}
	app := func(i int) labels.Set { return labels.Set{"app": fmt.Sprintf("app-%d", i/namespaces%apps)} }
	for i := range namespaces {
		s.Namespaces = append(s.Namespaces, cluster.Namespace{Name: fmt.Sprintf("ns-%d", i), Labels: labels.Set{"team": fmt.Sprintf("team-%d", i%3)}})
	}
	for i := range pods {
		p := cluster.Pod{
			Namespace: s.Namespaces[i%namespaces].Name, Name: fmt.Sprintf("pod-%d", i), Node: s.Self, Labels: app(i),
			Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)}), netip.AddrFrom16([16]byte{0xfd, 14: byte(i >> 8), 15: byte(i)})},
		}
		if i >= local {
			p.Node = fmt.Sprintf("node-%d", 1+i%100)
		}
		s.Pods = append(s.Pods, p)
	}
	for i := range policies {
		s.Policies = append(s.Policies, cluster.Policy{
			Namespace: s.Namespaces[i%namespaces].Name, Name: fmt.Sprintf("policy-%d", i), Pods: labels.SelectorFromSet(app(i)), Ingress: true,
			IngressRules: []cluster.Rule{{
				Peers: []cluster.Peer{{
					Namespaces: labels.SelectorFromSet(labels.Set{"team": fmt.Sprintf("team-%d", i%3)}), Pods: labels.SelectorFromSet(app(i + namespaces)),
				}},
				Ports: []cluster.Port{{Protocol: cluster.TCP, First: uint16(8000 + i), Last: uint16(8000 + i)}},
			}},
		})
	}
	return s
}

package policy_test

import (
	"fmt"
	"net/netip"
	"testing"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/policy"
)

// scale is a cluster of many nodes: namespaces of about 50 pods, 20 apps each, a policy for every app in turn that lets
// in another app of the namespace and one of any namespace of a team.
func scale(pods, policies, local int) cluster.Snapshot {
	s := cluster.Snapshot{Self: "node-0"}
	namespaces := max(1, pods/50)
	for i := range namespaces {
		s.Namespaces = append(s.Namespaces, cluster.Namespace{
			Name: fmt.Sprintf("ns-%04d", i), Labels: labels.Set{"team": fmt.Sprintf("team-%d", i%10)},
		})
	}
	for i := range pods {
		pod := cluster.Pod{
			Namespace: fmt.Sprintf("ns-%04d", i%namespaces), Name: fmt.Sprintf("pod-%06d", i), Node: fmt.Sprintf("node-%d", 1+i%100),
			Labels: labels.Set{"app": fmt.Sprintf("app-%d", i/namespaces%20), "tier": fmt.Sprintf("tier-%d", i%3), "pod-template-hash": fmt.Sprint(i / 3)},
			Addresses: []netip.Addr{
				netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}),
				netip.AddrFrom16([16]byte{0xfd, 0, 13: byte(i >> 16), 14: byte(i >> 8), 15: byte(i)}),
			},
			Ports: []cluster.NamedPort{{Name: "http", Protocol: cluster.TCP, Port: 8080}},
		}
		if i < local {
			pod.Node = s.Self
		}
		s.Pods = append(s.Pods, pod)
	}
	for i := range policies {
		app := func(n int) labels.Selector {
			return labels.SelectorFromSet(labels.Set{"app": fmt.Sprintf("app-%d", n%20)})
		}
		s.Policies = append(s.Policies, cluster.Policy{
			Namespace: fmt.Sprintf("ns-%04d", i%namespaces), Name: fmt.Sprintf("policy-%05d", i), Pods: app(i / namespaces), Ingress: true,
			IngressRules: []cluster.Rule{
				{Peers: []cluster.Peer{{Pods: app(i/namespaces + 1)}}, Ports: []cluster.Port{{Protocol: cluster.TCP, Name: "http"}}},
				{Index: 1, AnyPort: true, Peers: []cluster.Peer{{
					Namespaces: labels.SelectorFromSet(labels.Set{"team": fmt.Sprintf("team-%d", i%10)}), Pods: app(i + 2),
				}}},
			},
		})
	}
	return s
}

func BenchmarkCompile(b *testing.B) {
	for _, c := range []struct{ pods, policies, local int }{{5000, 1000, 50}, {5000, 1000, 5000}, {50_000, 10_000, 200}} {
		s := scale(c.pods, c.policies, c.local)
		b.Run(fmt.Sprintf("pods=%d/policies=%d/local=%d", c.pods, c.policies, c.local), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				rules, problems := policy.Compile(s)
				if len(rules.V4.Chains) < 5 || len(problems) > 0 {
					b.Fatalf("%d chains, problems %v", len(rules.V4.Chains), problems)
				}
			}
		})
	}
}

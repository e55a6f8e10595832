package main

import (
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/warren-cni/warren/pkg/cluster"
)

// A Node that claims what is another's gives its pods no identity of that Node's addresses, whenever the claim comes, and
// the other keeps its own. Once the other is gone the claim counts.
func TestRefusedClaimGivesNoIdentity(t *testing.T) {
	node := func(name string, created int64, podCIDR string) cluster.Node {
		return cluster.Node{Name: name, Created: time.Unix(created, 0), PodCIDRs: []netip.Prefix{netip.MustParsePrefix(podCIDR)}}
	}
	pod := func(name, on, address string) cluster.Pod {
		return cluster.Pod{Namespace: "shop", Name: name, Node: on, Addresses: []netip.Addr{netip.MustParseAddr(address)}}
	}
	p := newPlanner(planning{nodeName: "self", parsedCluster: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}})
	addresses := func(name string) []string {
		for _, pod := range p.snapshot().Pods {
			if pod.Name == name {
				return texts(pod.Addresses)
			}
		}
		return nil
	}
	check := func(when, name string, want ...string) {
		t.Helper()
		if got := addresses(name); !slices.Equal(got, want) {
			t.Errorf("%s: %s has %v, want %v", when, name, got, want)
		}
	}
	learn := func(s cluster.Snapshot) { p.plan(p.learn(s.Delta(), cluster.Attachments{}), 1500) }

	learn(cluster.Snapshot{
		Nodes: []cluster.Node{node("self", 1, "10.1.0.0/24"), node("stolen", 3, "10.2.0.0/16"), node("honest", 2, "10.2.7.0/24")},
		Pods:  []cluster.Pod{pod("liar", "stolen", "10.2.7.9"), pod("web", "honest", "10.2.7.9")},
	})
	check("at the start", "liar")
	check("at the start", "web", "10.2.7.9")

	gone := cluster.NewDelta()
	gone.Nodes["honest"] = nil
	p.plan(p.learn(gone, cluster.Attachments{}), 1500)
	check("without the older claim", "liar", "10.2.7.9")
	check("without its node", "web")

	learn(cluster.Snapshot{Nodes: []cluster.Node{node("honest", 2, "10.2.7.0/24")}})
	check("when the older claim is back", "liar")
	check("when the older claim is back", "web", "10.2.7.9")
}

// The addresses of all nodes are those of the Nodes as they are, however these have come, changed and gone.
func TestHostsFollowNodes(t *testing.T) {
	p := newPlanner(planning{nodeName: "self", encryptionMode: true})
	seen := func() []string {
		var all []string
		for _, s := range p.ruleset().V4.Sets {
			if s.Name == "WARREN-HOSTS4" {
				for _, e := range s.Entries {
					all = append(all, e.Prefix.Addr().String())
				}
			}
		}
		return all
	}
	for _, step := range []struct {
		node      string
		addresses []string
		want      []string
	}{
		{"a", []string{"192.0.2.7", "192.0.2.1"}, []string{"192.0.2.1", "192.0.2.7"}},
		{"b", []string{"192.0.2.7", "192.0.2.3"}, []string{"192.0.2.1", "192.0.2.3", "192.0.2.7"}},
		{"a", []string{"192.0.2.1"}, []string{"192.0.2.1", "192.0.2.3", "192.0.2.7"}},
		{"b", nil, []string{"192.0.2.1"}},
		{"a", []string{"192.0.2.9"}, []string{"192.0.2.9"}},
	} {
		d := cluster.NewDelta()
		d.Nodes[step.node] = nil
		if step.addresses != nil {
			node := &cluster.Node{Name: step.node}
			for _, a := range step.addresses {
				node.Addresses = append(node.Addresses, netip.MustParseAddr(a))
			}
			d.Nodes[step.node] = node
		}
		p.plan(p.learn(d, cluster.Attachments{}), 1500)
		if got := seen(); !slices.Equal(got, step.want) {
			t.Errorf("after %s has %v: %v, want %v", step.node, step.addresses, got, step.want)
		}
	}
}

package main

import (
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/netfilter"
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
	learn := func(s cluster.Snapshot) { p.plan(p.learn(s.Delta(), cluster.Attachments{}), mesh.Uplink{MTU: 1500}) }

	learn(cluster.Snapshot{
		Nodes: []cluster.Node{node("self", 1, "10.1.0.0/24"), node("stolen", 3, "10.2.0.0/16"), node("honest", 2, "10.2.7.0/24")},
		Pods:  []cluster.Pod{pod("liar", "stolen", "10.2.7.9"), pod("web", "honest", "10.2.7.9")},
	})
	check("at the start", "liar")
	check("at the start", "web", "10.2.7.9")

	gone := cluster.NewDelta()
	gone.Nodes["honest"] = nil
	p.plan(p.learn(gone, cluster.Attachments{}), mesh.Uplink{MTU: 1500})
	check("without the older claim", "liar", "10.2.7.9")
	check("without its node", "web")

	learn(cluster.Snapshot{Nodes: []cluster.Node{node("honest", 2, "10.2.7.0/24")}})
	check("when the older claim is back", "liar")
	check("when the older claim is back", "web", "10.2.7.9")
}

// followed is what a set of a planner has, by its rulesets and by its changes.
type followed struct {
	planner *planner
	name    string
	changes map[string]bool
}

// learn tells of one Node, nil for one that is gone, and returns the members by the ruleset and by the changes.
func (f *followed) learn(name string, node *cluster.Node) (whole, changed []string) {
	d := cluster.NewDelta()
	d.Nodes[name] = node
	change := f.planner.plan(f.planner.learn(d, cluster.Attachments{}), mesh.Uplink{MTU: 1500}).change
	ruleset := f.planner.ruleset()
	for _, family := range netfilter.Families {
		for _, s := range change.Of(family).Sets {
			if s.Name != f.name {
				continue
			}
			for _, e := range slices.Concat(s.Entries, s.Add) {
				f.changes[e.Prefix.String()] = true
			}
			for _, e := range s.Remove {
				delete(f.changes, e.Prefix.String())
			}
		}
		for _, s := range ruleset.Of(family).Sets {
			if s.Name == f.name {
				for _, e := range s.Entries {
					whole = append(whole, e.Prefix.String())
				}
			}
		}
	}
	return whole, slices.Sorted(maps.Keys(f.changes))
}

// The addresses of all nodes are those of the Nodes as they are, however these have come, changed and gone.
func TestHostsFollowNodes(t *testing.T) {
	f := followed{newPlanner(planning{nodeName: "self", encryptionMode: true}), "WARREN-HOSTS4", map[string]bool{}}
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
		{"b", []string{"192.0.2.3"}, []string{"192.0.2.3", "192.0.2.9"}},
		{"b", nil, []string{"192.0.2.9"}},
		{"b", []string{"192.0.2.4"}, []string{"192.0.2.4", "192.0.2.9"}},
		{"c", []string{"192.0.2.3"}, []string{"192.0.2.3", "192.0.2.4", "192.0.2.9"}},
	} {
		var node *cluster.Node
		if step.addresses != nil {
			node = &cluster.Node{Name: step.node, PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244." + strconv.Itoa(int(step.node[0])) + ".0/24")}}
			for _, a := range step.addresses {
				node.Addresses = append(node.Addresses, netip.MustParseAddr(a))
			}
		}
		whole, changed := f.learn(step.node, node)
		for i, a := range step.want {
			step.want[i] = a + "/32"
		}
		if !slices.Equal(whole, step.want) || !slices.Equal(changed, step.want) {
			t.Errorf("after %s has %v: %v, by the changes %v, want %v", step.node, step.addresses, whole, changed, step.want)
		}
		if _, known := f.planner.state.Node(step.node); known != (node != nil) {
			t.Errorf("after %s has %v it is known: %v", step.node, step.addresses, known)
		}
	}
}

// Without a cluster CIDR the guards hold back what is for the podCIDRs of all nodes, also of one that has no key and so is no
// peer. What was known stays in the kernel, which is why nothing is ever removed by a change.
func TestGuardsFollowPodCIDRs(t *testing.T) {
	for _, encrypted := range []bool{true, false} {
		f := followed{newPlanner(planning{nodeName: "self", encryptionMode: encrypted}), "WARREN-NODES6", map[string]bool{}}
		node := func(name, podCIDR string) *cluster.Node {
			return &cluster.Node{Name: name, PodCIDRs: []netip.Prefix{netip.MustParsePrefix(podCIDR)}}
		}
		f.learn("self", node("self", "fd00::/64"))
		whole, changed := f.learn("other", node("other", "fd00:0:0:1::/64"))
		if want := []string{"fd00:0:0:1::/64", "fd00::/64"}; len(whole) != len(want) || !slices.Equal(changed, want) {
			t.Errorf("encrypted %v: known are %v, by the changes %v, want %v", encrypted, whole, changed, want)
		}
		whole, changed = f.learn("other", nil)
		if !slices.Equal(whole, []string{"fd00::/64"}) || len(changed) != 2 {
			t.Errorf("encrypted %v, after it went: known are %v, by the changes %v", encrypted, whole, changed)
		}
	}
}

// The uplink is asked for the ways to all peers, also to those that come to us from an endpoint which is not known.
func TestEndpointsOfPeers(t *testing.T) {
	p := newPlanner(planning{nodeName: "self", encryptionMode: true, port: 51820})
	other, behindNAT := crowdNode(t, 1, 1), crowdNode(t, 2, 2)
	behindNAT.WireGuard.BehindNAT = true
	delta := cluster.NewDelta()
	for _, node := range []*cluster.Node{other, behindNAT, {Name: "self", PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.255.0.0/24")}}} {
		delta.Nodes[node.Name] = node
	}
	p.plan(p.learn(delta, cluster.Attachments{}), mesh.Uplink{MTU: 1500})
	if got, want := p.endpoints(), []netip.Addr{other.Addresses[0], {}}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

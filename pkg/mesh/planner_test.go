package mesh_test

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/mesh"
)

// TestPlannerWalks changes random clusters of nodes that lie, step by step. After each step the mesh is that of the Nodes as they are,
// however they came to be so, and the changes told add up to it. (planned.update checks it.)
func TestPlannerWalks(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range 60 {
		o := options(func(o *mesh.Options) { o.NodeCIDRs = prefixes("192.0.2.0/24") })
		switch random.IntN(5) {
		case 0:
			o.Encrypted = false
		case 1, 2:
			noClusterCIDR(&o)
		}
		p := newPlanned(t, o)
		for range 25 {
			changed := map[string]*cluster.Node{}
			for range 1 + random.IntN(3) {
				n := liar(random)
				changed[n.Name] = &n
				if random.IntN(4) == 0 {
					changed[n.Name] = nil
				}
			}
			if random.IntN(10) == 0 {
				p.uplink = mesh.Uplink{MTU: []int{0, 1300, 1500, 9000}[random.IntN(4)]}
				if random.IntN(2) == 0 {
					p.uplink.Less = map[netip.Addr]int{netip.MustParseAddr("192.0.2.2"): 1 + random.IntN(1400)}
				}
			}
			if p.update(changed); t.Failed() {
				t.Fatalf("with %v", p.nodes)
			}
		}
	}
}

// liar returns one of five nodes, with claims from so few that they meet.
func liar(random *rand.Rand) cluster.Node {
	pick := func(choices ...string) string { return choices[random.IntN(len(choices))] }
	n := node(byte(1+random.IntN(5)),
		podCIDRs(pick("10.244.1.0/24", "10.244.2.0/24", "10.244.0.0/16", "10.244.2.0/25", "192.0.2.0/24", "203.0.113.0/24"), pick("fd00:0:0:1::/64", "fd00::/60", "2001:db8::/64")),
		addresses(pick("192.0.2.1", "192.0.2.2", "10.244.2.3", "203.0.113.7", "127.0.0.1"), pick("2001:db8::1", "2001:db8::2", "fe80::1")))
	n.Created = time.Unix(int64(random.IntN(2)), 0)
	switch random.IntN(8) {
	case 0:
		n.WireGuard = nil
		return n
	case 1:
		copies(random.IntN(3), "node-"+pick("1", "2"))(&n)
	default:
		holds(random.IntN(4))(&n)
	}
	if random.IntN(3) == 0 {
		nextKey(keyOf(random.IntN(4), pick(n.Name, "node-2")))(&n)
	}
	switch random.IntN(6) {
	case 0:
		behindNAT(&n)
	case 1, 2:
		endpoint(pick("203.0.113.7", "192.0.2.1", "10.244.2.9", "::1", ""), uint16(random.IntN(2)))(&n)
	}
	n.WireGuard.MTU = []int{0, 68, 1300, 1400, 9000}[random.IntN(5)]
	return n
}

// TestPlannerTellsTheLeast shows what each change of a Node tells: one peer and its routes, and nothing of a change that concerns none.
func TestPlannerTellsTheLeast(t *testing.T) {
	p := newPlanned(t, options(), node(1), node(2), node(3))
	peersOf := func(peers []mesh.Peer) []string {
		var names []string
		for _, p := range peers {
			names = append(names, p.Node)
		}
		return names
	}
	expect := func(what string, u mesh.Update, peers, removed []string, routes, removedRoutes int) {
		t.Helper()
		if got := peersOf(u.Change.Peers); !slices.Equal(got, peers) {
			t.Errorf("%s: peers %v, want %v", what, got, peers)
		}
		if got := peersOf(u.Change.RemovedPeers); !slices.Equal(got, removed) {
			t.Errorf("%s: removed peers %v, want %v", what, got, removed)
		}
		if len(u.Change.Routes) != routes || len(u.Change.RemovedRoutes) != removedRoutes || u.Change.Link {
			t.Errorf("%s: %+v, want %d routes, %d removed, and the link as it was", what, u.Change, routes, removedRoutes)
		}
	}
	expect("the same again", p.set(node(2), node(1)), nil, nil, 0, 0)
	expect("join", p.set(node(4)), []string{"node-4"}, nil, 2, 0)
	expect("new key", p.set(node(4, holds(9))), []string{"node-4"}, nil, 0, 0)
	expect("new address", p.set(node(4, holds(9), addresses("192.0.2.44"))), []string{"node-4"}, nil, 0, 0)
	expect("smaller uplink", p.set(node(4, uplinkMTU(1400))), []string{"node-4"}, nil, 2, 0)
	expect("new podCIDR", p.set(node(4, podCIDRs("10.244.9.0/24"))), []string{"node-4"}, nil, 1, 2)
	expect("podCIDR of a node that leaves", func() mesh.Update {
		n := node(4, podCIDRs("10.244.3.0/24"))
		return p.update(map[string]*cluster.Node{"node-3": nil, "node-4": &n})
	}(), []string{"node-4"}, []string{"node-3"}, 0, 2)
	expect("no key", p.set(node(4, func(n *cluster.Node) { n.WireGuard = nil })), nil, []string{"node-4"}, 0, 1)
	expect("leave", p.remove("node-4", "node-2"), nil, []string{"node-2"}, 0, 2)
	if u := p.remove("node-4", "node-9"); !u.Change.Empty() || len(u.PodCIDRs) != 0 {
		t.Errorf("what was not there leaves: %+v", u)
	}
	if u := p.set(node(1, podCIDRs("10.244.1.0/24"))); !u.Change.Link {
		t.Error("the own podCIDRs change, and the link stays as it was")
	}
}

// TestPlannerJudgesAgain shows that a claim which was refused counts as soon as what it met with is gone, through a chain of them.
func TestPlannerJudgesAgain(t *testing.T) {
	wide := node(2, podCIDRs("10.244.2.0/23"))
	narrow := node(3, podCIDRs("10.244.3.0/24"))
	within := node(4, podCIDRs("10.244.3.0/25"))
	p := newPlanned(t, options(), node(1), narrow, within)
	wantProblems(t, p.Problems(), "PodCIDROverlap Node node-4 node-3")
	p.set(wide) // node-3's goes, so node-4's still overlaps, but another
	wantProblems(t, p.Problems(), "PodCIDROverlap Node node-3 node-2", "PodCIDROverlap Node node-4 node-2")
	u := p.remove("node-2")
	wantProblems(t, p.Problems(), "PodCIDROverlap Node node-4 node-3")
	want := map[string][]netip.Prefix{"node-2": nil, "node-3": prefixes("10.244.3.0/24")}
	if diff := cmp.Diff(want, u.PodCIDRs, byValue); diff != "" {
		t.Errorf("podCIDRs (-want +got):\n%s", diff)
	}
	p.remove("node-3")
	wantProblems(t, p.Problems())

	// A key copied counts for its holder from the first moment on, and two of one public address need ports of their own.
	p = newPlanned(t, options(), node(1), node(3, copies(2, "node-2"), older))
	wantProblems(t, p.Problems(), "NodeKeyUnproven Node node-3")
	if u := p.set(node(2)); len(u.Change.Peers) != 1 || u.Change.Peers[0].Node != "node-2" {
		t.Errorf("the holder of a key that was copied publishes it: %+v", u.Change)
	}
	wantProblems(t, p.Problems(), "NodeKeyDuplicate Node node-3 node-2")
	again := node(2)
	again.UID = "of the Node that was made again"
	p = newPlanned(t, options(), node(1), node(2))
	p.set(again)
	wantProblems(t, p.Problems(), "NodeKeyUnproven Node node-2")
	p = newPlanned(t, options(), node(1), node(2, endpoint("203.0.113.7", 4500)), node(3, endpoint("203.0.113.7", 4500)))
	wantProblems(t, p.Problems(), "NodeEndpointDuplicate Node node-2 node-3", "NodeEndpointDuplicate Node node-3 node-2")
	p.set(node(2, endpoint("203.0.113.7", 4501)))
	wantProblems(t, p.Problems())
	p.set(node(4, addresses("203.0.113.7")))
	wantProblems(t, p.Problems(), "NodeEndpointDuplicate Node node-2 node-4", "NodeEndpointDuplicate Node node-3 node-4",
		"NodeAddressDuplicate Node node-4 node-2")
	p.set(node(1, endpoint("203.0.113.7", 4500)))
	p.set(node(4))
	wantProblems(t, p.Problems(), "NodeEndpointRefused Node node-3 node-1")
}

// TestPlannerRotation follows a key from the moment at which it is announced.
func TestPlannerRotation(t *testing.T) {
	oldKey, newKey := keyOf(2, "node-2"), keyOf(7, "node-2")
	p := newPlanned(t, options(), node(1), node(2))
	check := func(what string, key, next [32]byte) {
		t.Helper()
		wantProblems(t, p.Problems())
		if peers := p.Config().Peers; len(peers) != 1 || peers[0].PublicKey != key || peers[0].Next != next {
			t.Errorf("%s: peers %+v, want the keys %x, %x", what, peers, key, next)
		}
	}
	check("before", oldKey.PublicKey, [32]byte{})
	p.set(node(2, nextKey(newKey)))
	check("announced", oldKey.PublicKey, newKey.PublicKey)
	p.set(node(2, holds(7), nextKey(newKey)))
	check("in use, and still announced", newKey.PublicKey, [32]byte{})
	p.set(node(2, holds(7)))
	check("after", newKey.PublicKey, [32]byte{})
	p.set(node(2, nextKey(newKey)))
	p.set(node(2))
	check("given up", oldKey.PublicKey, [32]byte{})
}

func TestPlannerNodeAddresses(t *testing.T) {
	for name, test := range map[string]struct {
		options mesh.Options
		other   cluster.Node
		want    []string // of node-2
	}{
		"not wanted":           {options(), node(3), nil},
		"inside":               {options(tunnelledNodes), node(3), []string{"192.0.2.2", "2001:db8::2"}},
		"one of two inside":    {options(func(o *mesh.Options) { o.NodeCIDRs = prefixes("2001:db8::/64") }), node(3), []string{"2001:db8::2"}},
		"a younger claims it":  {options(tunnelledNodes), node(3, addresses("192.0.2.2")), []string{"192.0.2.2", "2001:db8::2"}},
		"an older claims it":   {options(tunnelledNodes), node(3, addresses("192.0.2.2", "2001:db8::2"), older), []string{"192.0.2.2", "2001:db8::2"}},
		"the endpoint of else": {options(tunnelledNodes), node(3, endpoint("192.0.2.2", 1)), []string{"192.0.2.2", "2001:db8::2"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlanned(t, test.options, node(1), node(2), test.other)
			var got []string
			for _, a := range p.Config().Peers[0].NodeAddresses {
				got = append(got, a.String())
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("addresses of node-2: %v, want %v", got, test.want)
			}
		})
	}
	p := newPlanned(t, options(tunnelledNodes), node(1), node(2, addresses("192.0.2.1", "192.0.2.2")))
	if got := p.Config().Peers[0].NodeAddresses; len(got) != 1 || got[0] != netip.MustParseAddr("192.0.2.2") {
		t.Errorf("another node says that it has an own address: it gets %v", got)
	}
	keyless := func(n *cluster.Node) { n.WireGuard, n.PodCIDRs = nil, nil }
	p = newPlanned(t, options(tunnelledNodes), node(1), node(2, addresses("192.0.2.1", "192.0.2.2"), keyless))
	if got, want := p.Config(), []mesh.Host{{Address: netip.MustParseAddr("192.0.2.2"), Node: "node-2"}}; len(got.Peers) > 0 || !slices.Equal(got.Hosts, want) {
		t.Errorf("a node that is no peer: %v, and claims %v, want %v", got.Peers, got.Hosts, want)
	}
	if got := newPlanned(t, options(), node(1), node(2)).Config().Hosts; len(got) > 0 {
		t.Errorf("claims that nobody asks for: %v", got)
	}
}

// honestClusters are of three nodes each that are reached in different ways.
func honestClusters() map[string][]cluster.Node {
	return map[string][]cluster.Node{
		"InternalIPs": {node(1), node(2), node(3, uplinkMTU(1400))},
		"endpoints": {
			node(1, endpoint("203.0.113.1", 0)), node(2, endpoint("203.0.113.2", 0)), node(3, endpoint("2001:db8:f::3", 4500), uplinkMTU(1400)),
		},
		"ports": {node(1), node(2, endpoint("", 4500)), node(3, func(n *cluster.Node) { n.WireGuard.Port = 4501 })},
	}
}

// tunnelledNodes has pods reach all honest nodes through the tunnel.
func tunnelledNodes(o *mesh.Options) { o.NodeCIDRs = prefixes("192.0.2.0/24", "2001:db8::/64") }

// TestHostileNode gives a node that is stolen everything that it can say of itself, at any age: what the honest nodes have of each
// other stays, from either's view, and so do the link and their pods' addresses.
func TestHostileNode(t *testing.T) {
	for by, honest := range honestClusters() {
		t.Run(by, func(t *testing.T) { hostileNode(t, honest) })
	}
}

func hostileNode(t *testing.T, honest []cluster.Node) {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	lies := hostileLies()
	for _, self := range []string{"node-1", "node-2", "node-3"} {
		o := options(tunnelledNodes)
		alone := mesh.NewPlanner(self, o)
		beside := mesh.NewPlanner(self, o)
		alone.Update(cluster.Snapshot{Nodes: honest}.Delta().Nodes, mesh.Uplink{MTU: 1500})
		beside.Update(cluster.Snapshot{Nodes: honest}.Delta().Nodes, mesh.Uplink{MTU: 1500})
		for round := range 200 {
			some := []lie{lies[round%len(lies)]} // each alone at first
			for range min(round/len(lies), random.IntN(4)) {
				some = append(some, lies[random.IntN(len(lies))])
			}
			hostile := node(4)
			var told []string
			for _, lie := range some {
				told = append(told, lie.name)
				lie.tell(&hostile)
			}
			u := beside.Update(map[string]*cluster.Node{"node-4": &hostile}, mesh.Uplink{MTU: 1500})
			if u.Change.Link {
				t.Fatalf("%v: the link of %s changes", told, self)
			}
			if diff := cmp.Diff(without(alone.Config(), ""), without(beside.Config(), "node-4"), byValue); diff != "" {
				t.Fatalf("%v: the mesh of the honest nodes on %s changes (-alone +beside):\n%s", told, self, diff)
			}
			for name := range u.PodCIDRs {
				if name != "node-4" {
					t.Fatalf("%v: the podCIDRs of %s change", told, name)
				}
			}
		}
	}
}

type lie struct {
	name string
	tell func(*cluster.Node)
}

// hostileLies are the lies of a node that was made when the others had their podCIDRs.
func hostileLies() []lie {
	garbage := [64]byte{1, 2, 3}
	return []lie{
		{"copied key", copies(2, "node-2")},
		{"copied own key", copies(1, "node-1")},
		{"copied next key", nextKey(keyOf(3, "node-3"))},
		{"garbage proof", func(n *cluster.Node) { n.WireGuard.Proof = garbage }},
		{"key of small order", func(n *cluster.Node) { n.WireGuard.PublicKey = [32]byte{1} }},
		{"outside podCIDR", podCIDRs("8.8.8.8/32", "2001:4860::/32")},
		{"superset", podCIDRs("10.244.0.0/16", "fd00::/48")},
		{"wider than the cluster", podCIDRs("10.0.0.0/8", "::/0")},
		{"equal podCIDR", podCIDRs("10.244.2.0/24", "fd00:0:0:2::/64")},
		{"smaller podCIDR", podCIDRs("10.244.1.128/25", "fd00:0:0:3::/96")},
		{"podCIDR around nodes", podCIDRs("192.0.2.0/24", "2001:db8::/64")},
		{"loopback podCIDR", podCIDRs("127.0.0.0/8", "::1/128")},
		{"Service podCIDR", podCIDRs("10.96.0.0/16")},
		{"others' addresses", addresses("192.0.2.1", "192.0.2.2", "192.0.2.3", "2001:db8::1", "2001:db8::2", "2001:db8::3")},
		{"others' addresses, older", func(n *cluster.Node) { addresses("192.0.2.2", "2001:db8::3")(n); n.UID = "again" }},
		{"pods' addresses", addresses("10.244.1.1", "fd00:0:0:2::1")},
		{"Service address", addresses("10.96.0.1")},
		{"special addresses", addresses("0.0.0.0", "255.255.255.255", "::1", "ff02::1", "::ffff:192.0.2.1")},
		{"endpoint on loopback", endpoint("127.0.0.1", 0)},
		{"endpoint on another node", endpoint("192.0.2.3", 51820)},
		{"endpoint on another node's IPv6 address", endpoint("2001:db8::3", 0)},
		{"endpoint on another node, at a port of another server", endpoint("192.0.2.2", 53)},
		{"another's address, at a port of another server", func(n *cluster.Node) { addresses("192.0.2.2", "2001:db8::3")(n); endpoint("", 53)(n) }},
		{"another's endpoint", endpoint("203.0.113.2", 0)},
		{"another's IPv6 endpoint and port", endpoint("2001:db8:f::3", 4500)},
		{"another's endpoint, at a port of another server", endpoint("203.0.113.2", 53)},
		{"others' endpoints as addresses", addresses("203.0.113.1", "203.0.113.2", "2001:db8:f::3")},
		{"endpoint on multicast", endpoint("224.0.0.1", 1)},
		{"endpoint among pods", endpoint("10.244.2.7", 53)},
		{"behind NAT", behindNAT},
		{"small MTU", uplinkMTU(700)},
		{"absurd MTU", uplinkMTU(1)},
		{"endless MTU", uplinkMTU(1 << 40)},
		{"nothing", func(n *cluster.Node) { n.WireGuard = &cluster.WireGuard{} }},
	}
}

// TestHostileOldNode repeats what a Node's age gives no right to: its creation time is the server's, but its addresses and annotations
// change at any time.
func TestHostileOldNode(t *testing.T) {
	for by, honest := range honestClusters() {
		alone, _ := mesh.Plan(snapshot(honest...), options(tunnelledNodes))
		for _, lie := range hostileLies() {
			n := node(4, older)
			if lie.tell(&n); !slices.Equal(n.PodCIDRs, node(4).PodCIDRs) {
				continue // an old Node has its podCIDRs from the controller, for good
			}
			beside, _ := mesh.Plan(snapshot(append(slices.Clone(honest), n)...), options(tunnelledNodes))
			if diff := cmp.Diff(without(alone, ""), without(beside, "node-4"), byValue); diff != "" {
				t.Errorf("%s, from the oldest node: the mesh of the honest nodes, reached by %s, changes (-alone +beside):\n%s", lie.name, by, diff)
			}
		}
	}
}

// without returns a mesh without a node's share, by its name and by the prefixes that no honest node has.
func without(c mesh.Config, name string) mesh.Config {
	var lost []netip.Prefix
	c.Peers = slices.DeleteFunc(slices.Clone(c.Peers), func(p mesh.Peer) bool {
		if p.Node == name {
			lost = p.AllowedIPs
		}
		return p.Node == name
	})
	c.Routes = slices.DeleteFunc(slices.Clone(c.Routes), func(r mesh.Route) bool { return slices.Contains(lost, r.Destination) })
	c.Hosts = slices.DeleteFunc(slices.Clone(c.Hosts), func(h mesh.Host) bool { return h.Node == name })
	c.KnownPodCIDRs = nil // of which the honest nodes' are checked by the update
	return c
}

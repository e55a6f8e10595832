package mesh_test

import (
	"crypto/ecdh"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/keyproof"
	"github.com/warren-cni/warren/pkg/mesh"
)

// keyOf returns the key of that number as that node publishes it, with the proof that only the holder of the private key can make.
func keyOf(number int, node string) cluster.NodeKey {
	type holder struct {
		number int
		node   string
	}
	if k, ok := proofs.Load(holder{number, node}); ok {
		return k.(cluster.NodeKey)
	}
	private := [32]byte{31: 0x40, 1: byte(number >> 8), 2: byte(number)}
	key, err := ecdh.X25519().NewPrivateKey(private[:])
	if err != nil {
		panic(err)
	}
	proof, err := keyproof.Sign(private, node, uidOf(node))
	if err != nil {
		panic(err)
	}
	k := cluster.NodeKey{PublicKey: [32]byte(key.PublicKey().Bytes()), Proof: proof}
	proofs.Store(holder{number, node}, k)
	return k
}

// proofs remembers what keyOf made: proofs of one key differ.
var proofs sync.Map

func uidOf(node string) string { return "uid of " + node }

// holds gives a node the key of a number, which it holds and proves.
func holds(number int) func(*cluster.Node) {
	return func(n *cluster.Node) { n.WireGuard.NodeKey = keyOf(number, n.Name) }
}

// copies gives a node the key of a number, with the proof of the node that holds it.
func copies(number int, holder string) func(*cluster.Node) {
	return func(n *cluster.Node) { n.WireGuard.NodeKey = keyOf(number, holder) }
}

// nextKey is a key that a node is about to use.
func nextKey(k cluster.NodeKey) func(*cluster.Node) {
	return func(n *cluster.Node) { n.WireGuard.Next = &k }
}

// endpoint is what an operator says of the way to a node; port 0 stands for none.
func endpoint(address string, port uint16) func(*cluster.Node) {
	return func(n *cluster.Node) {
		var a netip.Addr
		if address != "" {
			a = netip.MustParseAddr(address)
		}
		n.WireGuard.Endpoint = netip.AddrPortFrom(a, port)
	}
}

func behindNAT(n *cluster.Node) { n.WireGuard.BehindNAT = true }

func uplinkMTU(mtu int) func(*cluster.Node) {
	return func(n *cluster.Node) { n.WireGuard.MTU = mtu }
}

func older(n *cluster.Node) { n.Created = time.Time{} }

// planned follows a Planner as a daemon does: by its changes alone.
type planned struct {
	*mesh.Planner
	t       *testing.T
	options mesh.Options
	nodes   map[string]*cluster.Node
	uplink  mesh.Uplink
	// What the changes came to.
	peers    map[string]mesh.Peer
	routes   map[netip.Prefix]mesh.Route
	podCIDRs map[string][]netip.Prefix
}

func newPlanned(t *testing.T, o mesh.Options, nodes ...cluster.Node) *planned {
	t.Helper()
	p := &planned{
		Planner: mesh.NewPlanner("node-1", o), t: t, options: o, nodes: map[string]*cluster.Node{}, uplink: o.Uplink,
		peers: map[string]mesh.Peer{}, routes: map[netip.Prefix]mesh.Route{}, podCIDRs: map[string][]netip.Prefix{},
	}
	if u := p.set(nodes...); !u.Change.Link {
		t.Error("the first update does not have the whole mesh applied")
	}
	return p
}

// set takes in Nodes that are new or changed.
func (p *planned) set(nodes ...cluster.Node) mesh.Update {
	p.t.Helper()
	changed := map[string]*cluster.Node{}
	for i := range nodes {
		changed[nodes[i].Name] = &nodes[i]
	}
	return p.update(changed)
}

// update takes in changes of Nodes, and checks that what they are said to change is what they do.
func (p *planned) update(changed map[string]*cluster.Node) mesh.Update {
	p.t.Helper()
	before := p.Config()
	for name, n := range changed {
		if n == nil {
			delete(p.nodes, name)
		} else {
			p.nodes[name] = n
		}
	}
	u := p.Update(changed, p.uplink)
	for _, peer := range u.Change.Peers {
		p.peers[peer.Node] = peer
	}
	for _, peer := range u.Change.RemovedPeers {
		if diff := cmp.Diff(p.peers[peer.Node], peer, byValue); diff != "" {
			p.t.Errorf("a peer goes that is not as it was (-was +goes):\n%s", diff)
		}
		delete(p.peers, peer.Node)
	}
	for _, r := range u.Change.Routes {
		p.routes[r.Destination] = r
	}
	for _, r := range u.Change.RemovedRoutes {
		delete(p.routes, r.Destination)
	}
	for name, accepted := range u.PodCIDRs {
		if accepted == nil {
			delete(p.podCIDRs, name)
		} else {
			p.podCIDRs[name] = accepted
		}
	}
	p.agrees(before, u)
	return u
}

// agrees checks that the changes come to the whole mesh, and that this is the one planned from nothing.
func (p *planned) agrees(before mesh.Config, u mesh.Update) {
	p.t.Helper()
	s := cluster.Snapshot{Self: "node-1"}
	for _, n := range p.nodes {
		s.Nodes = append(s.Nodes, *n)
	}
	got, o := p.Config(), p.options
	o.Uplink = p.uplink
	want, problems := mesh.Plan(s, o)
	atOnce := mesh.NewPlanner("node-1", o).Update(s.Delta().Nodes, p.uplink)
	if diff := cmp.Diff(want, got, byValue); diff != "" {
		p.t.Fatalf("the mesh is another than that planned at once (-at once +after changes):\n%s", diff)
	}
	if diff := cmp.Diff(problems, p.Problems()); diff != "" {
		p.t.Fatalf("the problems are others than those found at once (-at once +after changes):\n%s", diff)
	}
	peers, routes := map[string]mesh.Peer{}, map[netip.Prefix]mesh.Route{}
	for _, peer := range got.Peers {
		peers[peer.Node] = peer
	}
	for _, r := range got.Routes {
		routes[r.Destination] = r
	}
	if diff := cmp.Diff(peers, p.peers, byValue); diff != "" {
		p.t.Fatalf("the changes come to other peers (-mesh +changes):\n%s", diff)
	}
	if diff := cmp.Diff(routes, p.routes, byValue); diff != "" {
		p.t.Fatalf("the changes come to other routes (-mesh +changes):\n%s", diff)
	}
	if diff := cmp.Diff(atOnce.PodCIDRs, p.podCIDRs, byValue); diff != "" {
		p.t.Fatalf("the changes come to other podCIDRs (-mesh +changes):\n%s", diff)
	}
	rest := func(c mesh.Config) mesh.Config {
		c.Peers, c.Routes, c.Hosts, c.KnownPodCIDRs = nil, nil, nil, nil
		return c
	}
	if differs := cmp.Diff(rest(before), rest(got), byValue) != ""; differs && !u.Change.Link {
		p.t.Fatalf("the link changes, and the update does not say so")
	}
}

// remove takes Nodes away.
func (p *planned) remove(names ...string) mesh.Update {
	p.t.Helper()
	gone := map[string]*cluster.Node{}
	for _, name := range names {
		gone[name] = nil
	}
	return p.update(gone)
}

package main

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/keyproof"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// lostTunnel is a tunnel that may have lost what it had.
type lostTunnel struct {
	tunnel
	empty bool
	// got are the peers that each call gave it.
	got [][]string
}

func (l *lostTunnel) Empty(context.Context) (bool, error) { return l.empty, nil }

func (l *lostTunnel) Apply(_ context.Context, m mesh.Config, _ wgdevice.Key) (wgdevice.Changes, error) {
	names := []string{}
	for _, p := range m.Peers {
		names = append(names, p.Node)
	}
	l.got, l.empty = append(l.got, names), false
	return wgdevice.Changes{}, nil
}

func (l *lostTunnel) Patch(context.Context, mesh.Change, wgdevice.Key) (wgdevice.Changes, error) {
	return wgdevice.Changes{}, wgdevice.ErrUnknown
}

// newRecalling returns a node that has applied a mesh with one peer.
func newRecalling(t *testing.T) (*node, *told, *memory, *lostTunnel) {
	t.Helper()
	n, s, m, _ := newStepped(t, "192.168.0.9", netip.MustParsePrefix("10.0.0.0/8"))
	l := &lostTunnel{}
	n.tunnel, n.follower = l, newFollower(l, n.clock, func() {}, n.log)
	s.delta.Nodes["node-2"] = provenNode(t)
	if err := n.step(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([][]string{{"node-2"}}, l.got); diff != "" {
		t.Fatalf("the first step (-want +got):\n%s", diff)
	}
	return n, s, m, l
}

// provenNode is node-2, with a key that it proves to have.
func provenNode(t *testing.T) *cluster.Node {
	t.Helper()
	private, err := wgdevice.OpenKeys(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	key := private.Current()
	proof, err := key.Proof("node-2", "uid")
	if err != nil {
		t.Fatal(err)
	}
	if !keyproof.Verify(key.Public(), "node-2", "uid", proof) {
		t.Fatal("the proof of a test does not hold")
	}
	return &cluster.Node{
		Name: "node-2", UID: "uid", Created: time.Unix(1, 0), PodCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.2.0/24")},
		Addresses: []netip.Addr{netip.MustParseAddr("192.168.0.2")},
		WireGuard: &cluster.WireGuard{NodeKey: cluster.NodeKey{PublicKey: key.Public(), Proof: proof}, Port: 51820},
	}
}

// restored says whether the tunnel, which has lost what it had, gets it back from a daemon that knows nothing of the cluster.
func restored(t *testing.T, n *node, l *lostTunnel) bool {
	t.Helper()
	l.empty, l.got = true, nil
	m, err := n.restore(t.Context(), nil)
	if err != nil && !errors.Is(err, errUnguarded) {
		t.Errorf("restoring: %v", err)
	}
	if m == nil {
		return len(l.got) > 0
	}
	want, same := n.outcomeNow().mesh, []cmp.Option{cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}, netip.AddrPort{}), cmpopts.EquateEmpty()}
	if diff := cmp.Diff(want, *m, same...); diff != "" {
		t.Errorf("restored is another mesh (-applied +restored):\n%s", diff)
	}
	return len(l.got) == 1
}

// A tunnel that is empty gets the mesh that this node has applied, and only then: one that has peers, one without guards, one from before
// a boot and one of a cluster without encryption get nothing.
func TestEmptyTunnelGetsItsPeersBack(t *testing.T) {
	for name, test := range map[string]struct {
		change func(n *node, m *memory)
		want   bool
	}{
		"as it was":       {func(*node, *memory) {}, true},
		"not remembered":  {func(n *node, _ *memory) { _ = os.Remove(n.meshPath()) }, false},
		"no guards":       {func(_ *node, m *memory) { m.known = false }, false},
		"a chain less":    {func(_ *node, m *memory) { m.chains.Delete("WARREN-FORWARD") }, false},
		"after a boot":    {func(n *node, _ *memory) { edit(t, n.meshPath(), `"Boot":"`, `"Boot":"another `) }, false},
		"encryption off":  {func(n *node, _ *memory) { n.options.encryptionMode = false }, false},
		"only begun":      {func(n *node, _ *memory) { _ = os.Rename(n.meshPath(), n.meshPath()+".new") }, false},
		"written as text": {func(n *node, _ *memory) { edit(t, n.meshPath(), `"Node":"node-2"`, `"Node": "node-2"`) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			n, _, m, l := newRecalling(t)
			test.change(n, m)
			if got := restored(t, n, l); got != test.want {
				t.Errorf("the tunnel gets its peers back: %v, want %v", got, test.want)
			}
		})
	}
	n, _, _, l := newRecalling(t)
	l.got = nil
	if m, err := n.restore(t.Context(), nil); m != nil || err != nil || len(l.got) > 0 {
		t.Errorf("a tunnel with peers: error %v, got %v", err, l.got)
	}
	edit(t, n.meshPath(), `{`, `[`)
	if m, err := n.restore(t.Context(), nil); m != nil || err == nil || len(l.got) > 0 {
		t.Errorf("no JSON: error %v, got %v", err, l.got)
	}
}

// A peer that is taken away does not come back, at whatever moment daemon and tunnel end.
func TestPeerThatLeftDoesNotComeBack(t *testing.T) {
	n, s, m, l := newRecalling(t)
	s.delta.Nodes["node-2"] = nil
	m.busy.Store(true) // so that the guards are not applied, and then the tunnel keeps the peer
	if err := n.step(t.Context(), false); err == nil {
		t.Fatal("the rules cannot be written, and the step says nothing")
	}
	m.busy.Store(false)
	if err := n.step(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if restored(t, n, l) {
		t.Error("just after the change: the tunnel gets the peers that it had")
	}
	began := n.clock()
	n.clock = func() time.Time { return began.Add(rememberAfter) }
	if err := n.step(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if !restored(t, n, l) || len(l.got[0]) != 0 {
		t.Errorf("some time after the change the tunnel gets %v, want a mesh without peers", l.got)
	}
	if err := n.forgetMesh(); err != nil || os.Remove(n.meshPath()) != nil {
		t.Fatalf("the mesh that stands was not remembered, or is forgotten: %v", err)
	}
	n.remembered = false
	if err := n.step(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if !restored(t, n, l) || len(l.got[0]) != 0 {
		t.Errorf("after the audit the tunnel gets %v, want a mesh without peers", l.got)
	}

	// Where the file cannot be taken away, the peer is not taken away either, and the operator learns it.
	n, s, _, l = newRecalling(t)
	if err := os.Rename(n.meshPath(), n.meshPath()+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(n.meshPath()+"/full", 0o700); err != nil {
		t.Fatal(err)
	}
	s.delta.Nodes["node-2"], l.got = nil, nil
	if err := n.step(t.Context(), true); err == nil || len(l.got) > 0 || n.outcomeNow().problems[0].Code != "MeshApplyFailed" {
		t.Errorf("error %v, the tunnel gets %v, problems %v", err, l.got, n.outcomeNow().problems)
	}
}

// edit replaces what is in a file.
func edit(t *testing.T, path, was, is string) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err == nil && !strings.Contains(string(text), was) {
		t.Fatalf("%s has no %s:\n%s", path, was, text)
	}
	if err == nil {
		err = os.WriteFile(path, []byte(strings.Replace(string(text), was, is, 1)), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
}

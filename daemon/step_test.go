package main

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/reconcile"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// told is a source that says what a test tells it.
type told struct {
	services
	mu      sync.Mutex
	delta   cluster.Delta
	refresh func()
}

func (s *told) Run(context.Context) error                        { return nil }
func (s *told) Changed() <-chan struct{}                         { return nil }
func (s *told) WaitForSync(context.Context) error                { return nil }
func (s *told) Problems() []cluster.Problem                      { return nil }
func (s *told) Publish(context.Context, map[string]string) error { return nil }
func (s *told) Event(context.Context, kube.Event)                {}
func (s *told) Reporter(kube.Reference) string                   { return "" }

func (s *told) Refresh(context.Context, string, string, string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.refresh()
	return nil
}

func (s *told) Changes() cluster.Delta {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.delta
	s.delta = cluster.NewDelta()
	return d
}

// errBusy is what a memory fails with.
var errBusy = errors.New("another program holds the lock")

// memory is a packet filter that knows the chains of IPv4 that it would hold, unless it is busy.
type memory struct {
	comparer
	busy   atomic.Bool
	known  bool
	chains sync.Map
}

func (m *memory) Denied(context.Context) ([]firewall.Denial, error) { return nil, nil }
func (m *memory) Bare(context.Context) (bool, error)                { return !m.known, nil }
func (m *memory) Problems() []cluster.Problem                       { return nil }
func (m *memory) Forget()                                           { m.known = false }

func (m *memory) Apply(_ context.Context, r netfilter.Ruleset) (firewall.Changes, error) {
	if m.known = !m.busy.Load(); !m.known {
		return firewall.Changes{}, errBusy
	}
	m.chains.Clear()
	m.hold(r.V4.Chains)
	return firewall.Changes{}, nil
}

func (m *memory) Patch(_ context.Context, c netfilter.Change) (firewall.Changes, error) {
	if !m.known {
		return firewall.Changes{}, firewall.ErrUnknown
	}
	if m.known = !m.busy.Load(); !m.known {
		return firewall.Changes{}, errBusy
	}
	m.hold(c.V4.Write)
	return firewall.Changes{}, nil
}

func (m *memory) hold(chains []netfilter.Chain) {
	for _, c := range chains {
		m.chains.Store(c.Name, true)
	}
}

func (m *memory) holds(chain string) bool {
	_, ok := m.chains.Load(chain)
	return ok
}

// noTunnel is a tunnel that is always well.
type noTunnel struct{ tunnel }

func (noTunnel) Apply(context.Context, mesh.Config, wgdevice.Key) (wgdevice.Changes, error) {
	return wgdevice.Changes{}, nil
}

func (noTunnel) Patch(context.Context, mesh.Change, wgdevice.Key) (wgdevice.Changes, error) {
	return wgdevice.Changes{}, nil
}

// newStepped returns a node with one pod, which has a lease, above a source and a packet filter in memory.
func newStepped(t *testing.T, address string, clusterCIDRs ...netip.Prefix) (*node, *told, *memory, agentapi.Pod) {
	t.Helper()
	var o runOptions
	o.runDir, o.cniConfDir, o.sysctlDir = t.TempDir(), t.TempDir(), t.TempDir()
	o.nodeName, o.mtu, o.parsedCluster, o.encryptionMode = "node-1", 1400, clusterCIDRs, true
	for _, name := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		path := filepath.Join(o.sysctlDir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("1\n"), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	s, m, p := &told{delta: cluster.NewDelta()}, &memory{}, newPlanner(o.planning)
	clock := func() time.Time { return time.Unix(0, 0) }
	n := &node{
		options: o, log: slog.New(slog.DiscardHandler), clock: clock, source: s, filter: m, tunnel: noTunnel{}, planner: p,
		stepped: make(chan struct{}), cuts: newCutter(p.allows, slog.New(slog.DiscardHandler)),
		flows: newFlowLog(o.nodeName, p, s.Event, io.Discard, clock), news: newAnnouncer(o.nodeName, s, clock),
	}
	n.loop = reconcile.New(n.step, resync, n.clock)
	own := netip.MustParsePrefix("10.244.1.0/24")
	s.delta.Nodes["node-1"] = &cluster.Node{Name: "node-1", PodCIDRs: []netip.Prefix{own}, Addresses: []netip.Addr{netip.MustParseAddr(address)}}
	pod := cluster.Pod{Namespace: "shop", Name: "web", UID: "u", Node: "node-1"}
	s.delta.Pods[pod.Key()] = &pod
	owner := ipam.Owner{ContainerID: "c", Interface: "eth0", Namespace: "shop", Name: "web", UID: "u"}
	keys, err := wgdevice.OpenKeys(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	n.keys = &rotator{encrypted: true, node: "node-1", keys: keys, clock: clock, log: n.log, wake: n.loop.Trigger}
	n.follower = newFollower(n.tunnel, clock, n.log)
	if n.leases, err = ipam.Open(o.leases()); err != nil {
		t.Fatal(err)
	}
	addresses, err := n.leases.Allocate([]netip.Prefix{own}, owner)
	if err != nil {
		t.Fatal(err)
	}
	return n, s, m, agentapi.Pod{ContainerID: "c", Interface: "eth0", Namespace: "shop", Name: "web", UID: "u", Addresses: addresses}
}

// deny is a policy that isolates all pods of the shop, and its chain.
func deny() (policy *cluster.Policy, chain string) {
	return &cluster.Policy{Namespace: "shop", Name: "deny", Pods: labels.Everything(), Ingress: true}, netfilter.Name("I", "shop/deny")
}

// An audit may see a pod's lease before the pod asks, and open the gate by the policies that the watch has brought. That does not
// count once there are others that do not stand.
func TestAttachNeedsRulesThatStand(t *testing.T) {
	n, s, m, pod := newStepped(t, "192.168.0.1")
	audited := n.nextStep()
	go n.loop.Run(t.Context())
	<-audited
	if !n.isOpen(pod) {
		t.Fatalf("the audit left the gate closed: %+v", n.outcomeNow())
	}
	policy, chain := deny()
	s.refresh = func() {
		s.delta.Policies[policy.Key()] = policy
		m.busy.Store(true)
	}
	if answer := n.attach(t.Context(), pod); answer.Error == nil {
		t.Error("the pod was attached without its policies")
	}
	s.refresh = func() { m.busy.Store(false) }
	if answer := n.attach(t.Context(), pod); answer.Error != nil || !m.holds(chain) {
		t.Errorf("once the rules can be written: %+v, they stand: %v", answer.Error, m.holds(chain))
	}
}

// While the guards would cut the node off nothing is applied, and nothing of it is forgotten.
func TestWhatWasHeldBackIsApplied(t *testing.T) {
	n, s, m, _ := newStepped(t, "192.168.0.1", netip.MustParsePrefix("10.0.0.0/8"))
	good := s.delta.Nodes["node-1"]
	if err := n.step(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	policy, chain := deny()
	bad := *good
	bad.Addresses = []netip.Addr{netip.MustParseAddr("10.9.0.1")}
	s.delta.Nodes["node-1"], s.delta.Policies[policy.Key()] = &bad, policy
	if err := n.step(t.Context(), false); err == nil || m.holds(chain) {
		t.Fatalf("error %v, and the rules stand: %v, although the cluster CIDR holds the node", err, m.holds(chain))
	}
	if !n.tunnelChanged.Load() {
		t.Error("the tunnel gets only the next change")
	}
	s.delta.Nodes["node-1"] = good
	if err := n.step(t.Context(), false); err != nil || !m.holds(chain) {
		t.Errorf("error %v, and the rules stand: %v", err, m.holds(chain))
	}
}

// Leases that cannot be read close nobody who has one, and a pod whose lease comes into sight before it asked opens nothing.
func TestLeasesThatCannotBeRead(t *testing.T) {
	n, s, _, pod := newStepped(t, "192.168.0.1")
	if err := n.step(t.Context(), true); err != nil || !n.isOpen(pod) {
		t.Fatalf("error %v, and the pod that was there at the start is open: %v", err, n.isOpen(pod))
	}
	second := cluster.Pod{Namespace: "shop", Name: "second", UID: "u2", Node: "node-1"}
	s.delta.Pods[second.Key()] = &second
	owner := ipam.Owner{ContainerID: "c2", Interface: "eth0", Namespace: "shop", Name: "second", UID: "u2"}
	addresses, err := n.leases.Allocate([]netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}, owner)
	if err != nil {
		t.Fatal(err)
	}
	asks := agentapi.Pod{ContainerID: "c2", Interface: "eth0", Namespace: "shop", Name: "second", UID: "u2", Addresses: addresses}
	if err = n.step(t.Context(), true); err != nil || n.isOpen(asks) {
		t.Fatalf("error %v, and the pod that did not ask yet is open: %v", err, n.isOpen(asks))
	}
	n.ask(cluster.Holder{ContainerID: "c2", Interface: "eth0"})
	if err = n.step(t.Context(), false); err != nil || !n.isOpen(asks) {
		t.Fatalf("error %v, and the pod that asked is open: %v", err, n.isOpen(asks))
	}
	if err = os.Rename(n.options.leases(), n.options.leases()+".away"); err != nil {
		t.Fatal(err)
	}
	if err = n.step(t.Context(), true); err != nil || !n.isOpen(pod) || !n.isOpen(asks) {
		t.Errorf("error %v; the pods are open: %v and %v", err, n.isOpen(pod), n.isOpen(asks))
	}
	if problems := n.outcomeNow().problems; len(problems) == 0 || problems[0].Code != "LeaseUnreadable" {
		t.Errorf("problems %v", problems)
	}
}

package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/inflight"
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
	// servers and errServers are what it says of the API server.
	servers    []netip.Addr
	errServers error
}

func (s *told) Run(context.Context) error                        { return nil }
func (s *told) Changed() <-chan struct{}                         { return nil }
func (s *told) WaitForSync(context.Context) error                { return nil }
func (s *told) Problems() []cluster.Problem                      { return nil }
func (s *told) Publish(context.Context, map[string]string) error { return nil }
func (s *told) Event(context.Context, kube.Event)                {}
func (s *told) Reporters(kube.Reference, string) []string        { return nil }
func (s *told) Servers(context.Context) ([]netip.Addr, error)    { return s.servers, s.errServers }

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
	busy   atomic.Bool
	known  bool
	chains sync.Map
}

// Drift tells of the chains of IPv4 that are not held.
func (m *memory) Drift(_ context.Context, wanted netfilter.Ruleset) (all []firewall.Difference, err error) {
	for _, c := range wanted.V4.Chains {
		if !m.known || !m.holds(c.Name) {
			all = append(all, firewall.Difference{Table: c.Table, Chain: c.Name, What: "is missing"})
		}
	}
	return all, nil
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
func newStepped(tb testing.TB, address string, clusterCIDRs ...netip.Prefix) (*node, *told, *memory, agentapi.Pod) {
	tb.Helper()
	var o runOptions
	o.runDir, o.stateDir, o.cniConfDir, o.sysctlDir = tb.TempDir(), tb.TempDir(), tb.TempDir(), tb.TempDir()
	o.nodeName, o.mtu, o.parsedCluster, o.encryptionMode = "node-1", 1400, clusterCIDRs, true
	for _, name := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		path := filepath.Join(o.sysctlDir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, []byte("1\n"), 0o600)); err != nil {
			tb.Fatal(err)
		}
	}
	s, m, p := &told{delta: cluster.NewDelta()}, &memory{}, newPlanner(o.planning)
	clock := func() time.Time { return time.Unix(0, 0) }
	n := &node{
		options: o, log: slog.New(slog.DiscardHandler), clock: clock, source: s, filter: m, tunnel: noTunnel{}, planner: p,
		stepped: make(chan struct{}), cuts: newCutter(p.allows, slog.New(slog.DiscardHandler)),
		flows: newFlowLog(o.nodeName, p, s.Event, io.Discard, clock),
	}
	n.news = newAnnouncer(n)
	n.loop = reconcile.New(n.step, resync, n.clock, reconcile.ProcessorTime)
	own := netip.MustParsePrefix("10.244.1.0/24")
	s.delta.Nodes["node-1"] = &cluster.Node{Name: "node-1", PodCIDRs: []netip.Prefix{own}, Addresses: []netip.Addr{netip.MustParseAddr(address)}}
	pod := cluster.Pod{Namespace: "shop", Name: "web", UID: "u", Node: "node-1"}
	s.delta.Pods[pod.Key()] = &pod
	owner := ipam.Owner{ContainerID: "c", Interface: "eth0", Namespace: "shop", Name: "web", UID: "u"}
	keys, err := wgdevice.OpenKeys(tb.TempDir())
	if err != nil {
		tb.Fatal(err)
	}
	n.keys = &rotator{encrypted: true, node: "node-1", keys: keys, clock: clock, log: n.log, wake: n.loop.Trigger}
	n.follower = newFollower(n.tunnel, clock, func() {}, n.log)
	if n.leases, err = ipam.Open(o.leases()); err != nil {
		tb.Fatal(err)
	}
	n.trash = newSweeper(n.leases)
	addresses, err := n.leases.Allocate([]netip.Prefix{own}, owner)
	if err != nil {
		tb.Fatal(err)
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

// Whatever a daemon's first step comes from, it closes the gate for no pod that runs.
func TestFirstStepClosesNobody(t *testing.T) {
	n, _, _, pod := newStepped(t, "192.168.0.1")
	if err := n.step(t.Context(), false); err != nil || !n.isOpen(pod) {
		t.Errorf("error %v, the pod that runs is let pass: %v", err, n.isOpen(pod))
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

// Nothing is applied while the cluster CIDR may hold the API server, from which the guards would cut the node off.
func TestClusterCIDRHoldsServer(t *testing.T) {
	n, s, m, _ := newStepped(t, "192.168.0.1", netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/16"))
	refused := func(code, message string) {
		t.Helper()
		err := n.step(t.Context(), true)
		problems := n.outcomeNow().problems
		if err == nil || len(problems) != 1 || problems[0].Code != code || !strings.Contains(problems[0].Message, message) {
			t.Errorf("error %v, problems %v, want %s with %q", err, problems, code, message)
		}
		if m.known {
			t.Error("rules are applied")
		}
		if stood, err := n.guardsStood(); stood || err != nil {
			t.Errorf("after a boot the guards would be put up at once (%v)", err)
		}
	}
	s.errServers = errBusy
	refused("APIServerUnknown", errBusy.Error())
	s.errServers = nil
	for _, server := range []string{"10.96.0.1", "fd00:0:0:96::1"} {
		s.servers = []netip.Addr{netip.MustParseAddr("192.168.0.2"), netip.MustParseAddr(server)}
		refused("ClusterCIDRHoldsServer", "holds "+server+", where the API server is")
		n.serversKnown = false // as a daemon that starts
	}
	s.servers = s.servers[:1]
	if err := n.step(t.Context(), true); err != nil || !m.known {
		t.Errorf("error %v, and rules are applied: %v, where the server is elsewhere", err, m.known)
	}
	if stood, err := n.guardsStood(); !stood || err != nil {
		t.Errorf("after a boot the guards would wait for the API server (%v)", err)
	}
	// A daemon that starts where they stand, while the server does not answer.
	n.serversKnown, s.errServers = false, errBusy
	if err := n.step(t.Context(), true); err != nil || n.serversKnown {
		t.Errorf("error %v where the guards have stood; the server is known: %v", err, n.serversKnown)
	}
	s.errServers = nil
	if err := os.Remove(filepath.Join(n.options.stateDir, guardedFile)); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(n.options.stateDir, guardedFile), 0o700); err != nil { // which cannot be written
		t.Fatal(err)
	}
	err := n.step(t.Context(), true)
	if problems := n.outcomeNow().problems; err != nil || len(problems) != 1 || problems[0].Code != "GuardsNotRemembered" {
		t.Errorf("error %v, problems %v, where the state cannot be written", err, problems)
	}
}

// After a boot only those guards are put up at once that have stood.
func TestGuardsHaveStood(t *testing.T) {
	n, _, _, _ := newStepped(t, "192.168.0.1", netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/16"))
	if err := n.step(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if stood, err := n.guardsStood(); !stood || err != nil {
		t.Errorf("those that stand would wait for the API server (%v)", err)
	}
	n.options.parsedCluster = n.options.parsedCluster[1:]
	if stood, err := n.guardsStood(); stood || err != nil {
		t.Errorf("after a boot other guards would be put up at once (%v)", err)
	}
}

// Leases that cannot be read close nobody who has one, unless the daemon restarts, and a pod whose lease comes into sight before it asked opens nothing.
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
	says := func(remedy string) {
		t.Helper()
		if problems := n.outcomeNow().problems; len(problems) == 0 || problems[0].Code != "LeaseUnreadable" || !strings.Contains(problems[0].Remedy, remedy) {
			t.Errorf("problems %v", problems)
		}
	}
	says("a daemon that restarts applies nothing")
	restart := func() { n.attached, n.listed = nil, false }
	restart()
	if err = n.step(t.Context(), true); err == nil {
		t.Error("a daemon that starts has applied something")
	}

	if err = os.Rename(n.options.leases()+".away", n.options.leases()); err != nil {
		t.Fatal(err)
	}
	if err = n.step(t.Context(), true); err != nil || !n.isOpen(pod) || !n.isOpen(asks) {
		t.Fatalf("error %v; the pods are open: %v and %v", err, n.isOpen(pod), n.isOpen(asks))
	}
	if err = os.WriteFile(filepath.Join(n.options.leases(), addresses[0].String()), []byte("?"), 0o600); err != nil { // the same file as that of the attachment
		t.Fatal(err)
	}
	if err = n.step(t.Context(), true); err != nil || !n.isOpen(pod) || !n.isOpen(asks) {
		t.Errorf("error %v; the pods are open: %v and %v", err, n.isOpen(pod), n.isOpen(asks))
	}
	says("a daemon that restarts closes it")
	restart()
	if err = n.step(t.Context(), true); err != nil || !n.isOpen(pod) || n.isOpen(asks) {
		t.Errorf("after a restart: error %v; the pods are open: %v and %v", err, n.isOpen(pod), n.isOpen(asks))
	}
}

// What is no lease is set aside by an audit, and keeps no pod from its place. An audit also tells what the plugin has set aside, and each
// once.
func TestAuditSetsAsideWhatIsNoLease(t *testing.T) {
	n, _, _, pod := newStepped(t, "192.168.0.1")
	var log bytes.Buffer
	n.log = slog.New(slog.NewTextHandler(&log, nil))
	leases, locks := n.options.leases(), filepath.Join(n.options.runDir, inflight.FileName)
	for _, path := range []string{leases + "/notes", leases + "/10.244.1.9", leases + ".aside-1"} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("nowhere", locks); err != nil {
		t.Fatal(err)
	}
	end, _, err := inflight.In(n.options.runDir).Try("wrna")
	if err != nil {
		t.Fatal(err)
	}
	end()
	for range 2 {
		if err = n.step(t.Context(), true); err != nil || !n.isOpen(pod) {
			t.Errorf("error %v, and the pod is open: %v", err, n.isOpen(pod))
		}
	}
	for _, name := range []string{"notes", "10.244.1.9"} {
		if _, err = os.Stat(filepath.Join(leases, ".aside", name)); err != nil {
			t.Error(err)
		}
	}
	for _, path := range []string{leases + "/.aside/notes", leases + "/.aside/10.244.1.9", leases + ".aside-1", locks + ".aside/"} {
		if told := strings.Count(log.String(), path); told != 1 {
			t.Errorf("%s is told %d times in:\n%s", path, told, log.String())
		}
	}
	if problems := n.outcomeNow().problems; len(problems) > 0 {
		t.Errorf("problems %v", problems)
	}
}

package proof

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

const (
	// tagDenied is of packets that a policy denies, tagKept of those that it does not.
	tagDenied, tagKept uint32 = 11, 12
	// convergedWithin is how long the daemon may take, once the API server is back, to do what happened meanwhile.
	convergedWithin = 10 * time.Second
	// backWithin is how long what is allowed may take until it flows again, when something ends that carries it.
	backWithin = 2 * time.Second
	// maxLoad is the share of a processor that a daemon may take that waits for the API server.
	maxLoad = 0.05
	// tick is the unit in which the kernel counts processor time.
	tick = 10 * time.Millisecond
)

// away is how long the API server is away: 10 minutes in a soak.
func away() time.Duration {
	const full = 10
	return time.Duration(soak.Trials(full)) * time.Minute
}

// outage is a cluster of two nodes, of which the first has a pod that sends to two pods of the other: one that a policy closes, and
// one that it leaves open.
type outage struct {
	*cluster
	network          *lab.Lab
	members          [2]*member
	marker           [lab.MarkerSize]byte
	family           func(netip.Addr) bool
	atClosed, atOpen *tagged.Counter
	// gap is the longest time in which nothing of what is allowed arrived, and gapOfTunnel is that when the tunnel ends. load is what the
	// busier one of the daemons takes of a processor, and loadOfRestarted that when both were restarted.
	gap, gapOfTunnel      time.Duration
	load, loadOfRestarted float64
}

// newOutage starts the nodes, whose endpoints are of a family, and the traffic.
func newOutage(t *testing.T, name string, family func(netip.Addr) bool) *outage {
	t.Helper()
	o := &outage{cluster: newServer(t), marker: lab.NewMarker(), family: family}
	o.keepAddresses()
	o.network = o.newLab(name, 2)
	for i, node := range o.network.Nodes {
		o.members[i] = o.start(node, i)
	}
	if err := o.network.Nodes[0].Ready(t.Context(), o.members[0].daemon, 1); err != nil {
		t.Fatal(err)
	}
	o.createNamespace("a")
	o.isolate("isolate", "closed")
	client, closed, open := o.runPod(0, "client"), o.runPod(1, "closed"), o.runPod(1, "open")
	o.atClosed, o.atOpen = o.count(closed), o.count(open)
	o.fire(client, closed, tagDenied)
	o.fire(client, open, tagKept)
	o.arrives(o.atOpen)
	return o
}

// The API server is away, answers errors or nothing at all: what stands stays in force and what is allowed goes on, across nodes and
// never in clear, for a daemon that restarts meanwhile, too, which waits without wasting the processor. A tunnel that ends then comes
// back with its peers. When the server is back the nodes do within 10 s what happened meanwhile. The families of the endpoints take turns.
func TestProofServerAway(t *testing.T) {
	for name, test := range map[string]struct {
		lab    string
		begin  func(c *cluster, m *member) (end func())
		family func(netip.Addr) bool
	}{
		"refused, IPv4 endpoints":     {"wpaway", (*cluster).refuse, netip.Addr.Is4},
		"black-holed, IPv6 endpoints": {"wphole", (*cluster).blackHole, netip.Addr.Is6},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			o := newOutage(t, test.lab, test.family)
			capture, err := o.network.Capture(o.marker)
			if err != nil {
				t.Fatal(err)
			}
			end := o.holds(test.begin)
			o.tunnelReturns()
			o.reachedAt()
			o.tunnelStays()
			if denied := o.atClosed.Packets(tagged.Of(tagDenied)); denied > 0 {
				t.Errorf("%d packets arrived that the policy denies", denied)
			}
			counts, err := capture.Stop()
			if err != nil {
				t.Fatal(err)
			}
			if counts.Marked+counts.Pods > 0 || counts.WireGuard == 0 {
				t.Errorf("the wire shows %v: %q", counts, counts.Examples)
			}
			took := o.converges(end)
			t.Logf("proof: API server %s for %v, two nodes: 0 denied packets arrived, allowed ones had no gap above %v, and of %v when the tunnel ended, the daemons took %.1f %% of a processor and %.1f %% after a restart, converged %v after the return; %v",
				name, away(), o.gap, o.gapOfTunnel, 100*o.load, 100*o.loadOfRestarted, took, counts)
			o.unguarded()
		})
	}
}

// keepAddresses leaves the Nodes their addresses of the family alone.
func (o *outage) keepAddresses() {
	o.t.Helper()
	nodes, err := o.client.CoreV1().Nodes().List(o.t.Context(), metav1.ListOptions{})
	if err != nil {
		o.t.Fatal(err)
	}
	for _, node := range nodes.Items {
		node.Status.Addresses = slices.DeleteFunc(node.Status.Addresses, func(a corev1.NodeAddress) bool {
			return !o.family(netip.MustParseAddr(a.Address))
		})
		if _, err = o.client.CoreV1().Nodes().UpdateStatus(o.t.Context(), &node, metav1.UpdateOptions{}); err != nil {
			o.t.Fatal(err)
		}
	}
}

// reachedAt demands that the tunnel leads to an address of the family.
func (o *outage) reachedAt() {
	o.t.Helper()
	status, err := o.members[0].node.Status(o.t.Context())
	if err != nil {
		o.t.Fatal(err)
	}
	if len(status.Peers) == 0 {
		o.t.Error("the tunnel has no peer")
	}
	for _, peer := range status.Peers { // which have no names before the daemon has heard of the cluster
		if at, err := netip.ParseAddrPort(peer.Endpoint); err != nil || !o.family(at.Addr()) {
			o.t.Errorf("a peer is reached at %q (%v)", peer.Endpoint, err)
		}
	}
}

// holds begins the outage and restarts the daemons in the middle of it.
func (o *outage) holds(begin func(c *cluster, m *member) (end func())) (end []func()) {
	o.t.Helper()
	for _, m := range o.members {
		end = append(end, begin(o.cluster, m))
	}
	if err := o.client.NetworkingV1().NetworkPolicies("a").Delete(o.t.Context(), "isolate", metav1.DeleteOptions{}); err != nil {
		o.t.Fatal(err)
	}
	o.isolate("isolate-open", "open")
	half := away() / 2
	o.load = o.loadFor(half)
	for _, m := range o.members {
		if err := m.daemon.Kill(); err != nil {
			o.t.Fatal(err)
		}
		o.startDaemon(m)
	}
	o.loadOfRestarted = o.loadFor(half)
	o.arrives(o.atOpen)
	if o.gap = o.atOpen.Gap(nil); o.gap > backWithin {
		o.t.Errorf("nothing arrived for %v", o.gap)
	}
	if max(o.load, o.loadOfRestarted) > maxLoad {
		o.t.Errorf("a daemon takes %.1f %% of a processor, and %.1f %% after a restart", 100*o.load, 100*o.loadOfRestarted)
	}
	return end
}

// tunnelReturns ends the tunnel of the first node, whose daemon has never heard of the cluster.
func (o *outage) tunnelReturns() {
	o.t.Helper()
	o.endTunnel()
	const some = 500 // more than were under way
	before := o.atOpen.Packets(nil)
	o.eventually(func() error {
		if o.atOpen.Packets(nil) < before+some {
			return errors.New("the tunnel does not come back")
		}
		return nil
	})
	if o.gapOfTunnel = o.atOpen.Gap(nil); o.gapOfTunnel > soak.Beside(backWithin) {
		o.t.Errorf("nothing arrived for %v when the tunnel had ended", o.gapOfTunnel)
	}
}

// tunnelStays is the control: a tunnel that ends where its peers are not remembered stays closed while the API server is away.
func (o *outage) tunnelStays() {
	o.t.Helper()
	m := o.members[0]
	if err := m.daemon.Kill(); err != nil {
		o.t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(filepath.Dir(m.node.Leases()), "mesh.json")); err != nil {
		o.t.Fatal(err)
	}
	o.endTunnel()
	o.startDaemon(m)
	o.eventually(func() error { _, err := m.node.Status(o.t.Context()); return err })
	before := o.atOpen.Packets(nil)
	ctx, cancel := context.WithTimeout(o.t.Context(), 2*backWithin)
	defer cancel()
	<-ctx.Done()
	if after := o.atOpen.Packets(nil); after > before {
		o.t.Errorf("control: %d packets arrive through a tunnel without peers", after-before)
	}
}

// endTunnel ends the tunnel's process of the first node as a crash does; its supervisor starts another one.
func (o *outage) endTunnel() {
	o.t.Helper()
	child, err := o.members[0].tunnel.Child(o.t.Context())
	if err == nil {
		err = syscall.Kill(child, syscall.SIGKILL)
	}
	if err != nil {
		o.t.Fatal(err)
	}
}

// converges ends the outage and waits until what happened meanwhile is in force, and the tunnel has its peers.
func (o *outage) converges(end []func()) time.Duration {
	o.t.Helper()
	for _, back := range end {
		back()
	}
	back := time.Now() //nolint:forbidigo // how long it takes
	o.eventually(func() error {
		before := o.atOpen.Packets(nil)
		o.pause()
		if o.atClosed.Packets(tagged.Of(tagDenied)) == 0 || o.atOpen.Packets(nil) > before {
			return errors.New("what happened meanwhile is not in force")
		}
		return nil
	})
	took := time.Since(back)
	if took > convergedWithin {
		o.t.Errorf("what happened meanwhile was in force %v after the API server was back", took)
	}
	return took
}

// unguarded is the control: the same packets show on the wire once the first node has neither guards nor a tunnel.
func (o *outage) unguarded() {
	o.t.Helper()
	m := o.members[0]
	if err := errors.Join(m.daemon.Kill(), m.tunnel.Kill()); err != nil {
		o.t.Fatal(err)
	}
	capture, err := o.network.Capture(o.marker)
	if err != nil {
		o.t.Fatal(err)
	}
	_, err = m.node.Run(o.t.Context(), "sh", "-ec", `for tool in iptables ip6tables; do for table in raw mangle nat filter; do $tool -t $table -F; done; done
ip route flush proto 87; ip -6 route flush proto 87; ip link del warren0`)
	if err != nil {
		o.t.Fatal(err)
	}
	o.pause()
	counts, err := capture.Stop()
	if err != nil {
		o.t.Fatal(err)
	}
	if counts.Marked == 0 || counts.Pods == 0 {
		o.t.Errorf("control: without the guards the wire shows %v", counts)
	}
}

// refuse ends all watches of a node and has everything else answered with an error.
func (c *cluster) refuse(m *member) (end func()) {
	m.proxy.fail(http.StatusServiceUnavailable, isAny)
	m.proxy.cut()
	return m.proxy.recover
}

// blackHole drops what a node sends to the API server and what comes from it.
func (c *cluster) blackHole(m *member) (end func()) {
	c.t.Helper()
	change := func(how string) {
		rule := fmt.Sprintf("iptables -%[1]s INPUT -i lo -p tcp --dport %[2]d -j DROP; iptables -%[1]s INPUT -i lo -p tcp --sport %[2]d -j DROP", how, m.proxy.port)
		if _, err := m.node.Run(c.t.Context(), "sh", "-ec", rule); err != nil {
			c.t.Fatal(err)
		}
	}
	change("I")
	return func() { change("D") }
}

// runPod makes a pod of the namespace a on a node; its label app is its name.
func (o *outage) runPod(i int, name string) *lab.Pod {
	o.t.Helper()
	node := o.network.Nodes[i]
	object := o.createPod("a", name, node.Name, map[string]string{"app": name})
	pod, err := node.AddPod(o.t.Context(), lab.Pod{Namespace: "a", Name: name, UID: object.UID})
	if err != nil {
		o.t.Fatal(err)
	}
	return pod
}

// count counts what arrives at a pod.
func (c *cluster) count(pod *lab.Pod) *tagged.Counter {
	c.t.Helper()
	counter, err := tagged.Count(pod.Netns())
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		if err := counter.Stop(); err != nil {
			c.t.Error(err)
		}
	})
	return counter
}

// fire lets a pod send to another until the test ends.
func (o *outage) fire(from, to *lab.Pod, tag uint32) {
	o.t.Helper()
	gun, err := tagged.Start(o.t.Context(), from.Netns(), tagged.Fire{Tag: tag, Targets: to.Addresses, Port: port, Every: 2 * often, Payload: o.marker[:]})
	if err != nil {
		o.t.Fatal(err)
	}
	o.t.Cleanup(gun.Cease)
}

// arrives waits until more packets arrive.
func (c *cluster) arrives(counter *tagged.Counter) {
	c.t.Helper()
	before := counter.Packets(nil)
	c.eventually(func() error {
		if counter.Packets(nil) == before {
			return errors.New("nothing arrives")
		}
		return nil
	})
}

// loadFor returns the share of a processor that the busier one of the daemons takes for a while.
func (o *outage) loadFor(d time.Duration) float64 {
	o.t.Helper()
	var before [2]time.Duration
	for i, m := range o.members {
		before[i] = m.processorTime(o.t)
	}
	ctx, cancel := context.WithTimeout(o.t.Context(), d)
	defer cancel()
	<-ctx.Done()
	var load float64
	for i, m := range o.members {
		load = max(load, float64(m.processorTime(o.t)-before[i])/float64(d))
	}
	return load
}

// processorTime is what the daemon's process has used (proc(5), fields 14 and 15 of stat).
func (m *member) processorTime(t *testing.T) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", m.daemon.PID()))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ") // behind the name
	fields := strings.Fields(rest)
	var ticks int
	for _, field := range fields[11:13] {
		n, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * tick
}

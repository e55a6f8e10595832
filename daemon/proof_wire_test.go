package main

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

// often is the time between two packets of a kind where each of them counts: a hundred a second; spaced is that between those of which
// there are many kinds.
const (
	often  = 10 * time.Millisecond
	spaced = 3 * often
)

// A Service of the proofs, whose address each node translates to a pod of the last node.
const (
	service4 = "10.96.0.10"
	service6 = "fd00:10:96::a"
)

// guarded is a stage with a pod on each node. All of them, and the nodes themselves, send to the pods of the other nodes what carries
// the marker: the begin of TCP connections, UDP and ICMP, packets in fragments, packets to a Service, and packets to an address that
// no pod has. So there are answers, resets and errors of ICMP, too.
type guarded struct {
	*stage
	pods     []*lab.Pod
	counters []*tagged.Counter
}

// newGuarded completes a stage of running nodes, of which some may be left out, and lets traffic flow between them.
func newGuarded(s *stage, nodes int) *guarded {
	s.t.Helper()
	g := &guarded{stage: s}
	for i := range nodes {
		g.pods = append(g.pods, s.pod(i, fmt.Sprintf("pod-%d", i+1)))
		g.counters = append(g.counters, s.counter(g.pods[i].Netns()))
	}
	last := g.pods[nodes-1]
	for i := range nodes {
		translate := fmt.Sprintf(`for chain in PREROUTING OUTPUT; do
	iptables -t nat -I $chain -d %s -j DNAT --to-destination %s
	ip6tables -t nat -I $chain -d %s -j DNAT --to-destination %s
done`, service4, last.Addresses[0], service6, last.Addresses[1])
		g.run(i, translate)
		targets := []netip.Addr{netip.MustParseAddr(service4), netip.MustParseAddr(service6)}
		for j, pod := range g.pods {
			if j != i {
				nobody := netip.MustParseAddr(fmt.Sprintf("10.244.%d.250", j+1))
				targets = append(append(targets, pod.Addresses...), nobody)
			}
		}
		g.send(g.pods[i], targets)
		g.whisper(s.Nodes[i].Netns(), targets, marker[:])
		g.whisper(g.pods[i].Netns(), targets, bytes.Repeat(marker[:], 100))
	}
	g.flows()
	return g
}

// send lets a pod fire until the test ends.
func (g *guarded) send(from *lab.Pod, targets []netip.Addr) {
	g.t.Helper()
	gun := g.fire(from, tagged.Fire{Tag: tagAllowed, Targets: targets, Port: port, Every: spaced, Payload: marker[:]})
	g.t.Cleanup(gun.Cease)
}

// whisper sends datagrams from a namespace by the kernel's own means, whatever becomes of them, until the test ends.
func (g *guarded) whisper(from ns.NetNS, targets []netip.Addr, payload []byte) {
	g.t.Helper()
	var socket net.PacketConn
	err := from.Do(func(ns.NetNS) (err error) {
		socket, err = new(net.ListenConfig).ListenPacket(g.t.Context(), "udp", ":0")
		return err
	})
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = socket.Close() })
	go func() {
		ticker := time.NewTicker(soak.Spaced(spaced))
		defer ticker.Stop()
		for range ticker.C {
			for _, target := range targets {
				_, err := socket.WriteTo(payload, net.UDPAddrFromAddrPort(netip.AddrPortFrom(target, port)))
				if errors.Is(err, net.ErrClosed) {
					return
				}
			}
		}
	}()
}

// flows waits until packets arrive at every pod, in both families.
func (g *guarded) flows() {
	g.t.Helper()
	for _, counter := range g.counters {
		for _, family := range []func(tagged.Arrival) bool{family4, family6} {
			g.arrives(counter, 5, family)
		}
	}
}

// run runs a script on a node.
func (g *guarded) run(i int, script string) {
	g.t.Helper()
	if _, err := g.Nodes[i].Run(g.t.Context(), "sh", "-ec", script); err != nil {
		g.t.Fatal(err)
	}
}

// cipherOnly captures the wire while something happens, and demands that no packet in clear passes.
func (g *guarded) cipherOnly(what string, happens func()) lab.Counts {
	g.t.Helper()
	capture, err := g.Capture(marker)
	if err != nil {
		g.t.Fatal(err)
	}
	happens()
	counts, err := capture.Stop()
	if err != nil {
		g.t.Fatal(err)
	}
	if counts.Marked > 0 || counts.Pods > 0 {
		g.t.Errorf("%s: the wire shows %v: %q", what, counts, counts.Examples)
	}
	return counts
}

// unguarded is the control: the same traffic shows on the wire, in both families, once the node is cut off from the tunnel without any
// of the guards.
func (g *guarded) unguarded(i int) {
	g.t.Helper()
	g.endDaemon(i, (*lab.Process).Kill)
	g.endTunnel(i, (*lab.Process).Kill)
	capture, err := g.Capture(marker)
	if err != nil {
		g.t.Fatal(err)
	}
	g.run(i, `for tool in iptables ip6tables; do for table in raw mangle nat filter; do $tool -t $table -F; done; done
ip route flush proto 87; ip -6 route flush proto 87; ip link del warren0 || true`)
	g.pause(time.Second)
	counts, err := capture.Stop()
	if err != nil {
		g.t.Fatal(err)
	}
	if counts.Marked == 0 || counts.Pods == 0 || counts.InClear[0] == 0 || counts.InClear[1] == 0 {
		g.t.Errorf("without the guards the wire shows %v, by family %v", counts, counts.InClear)
	}
	g.t.Logf("control: without the guards the wire shows %v, by family %v", counts, counts.InClear)
}

// endDaemon ends a node's daemon.
func (s *stage) endDaemon(i int, end func(*lab.Process) error) {
	s.t.Helper()
	if err := end(s.daemons[i]); err != nil {
		s.t.Fatal(err)
	}
}

// endTunnel ends a node's tunnel.
func (s *stage) endTunnel(i int, end func(*lab.Process) error) {
	s.t.Helper()
	if err := end(s.tunnels[i]); err != nil {
		s.t.Fatal(err)
	}
}

// Daemon and tunnel are killed and stopped on all nodes, and the tunnel's link is deleted, again and again: nothing is in clear, and
// traffic comes back each time.
func TestProofNoPlaintextInCrashLoops(t *testing.T) {
	t.Parallel()
	for _, o := range []lab.Options{{Name: "wpcrash", Nodes: 3}, {Name: "wpcrash6", Nodes: 3, IPv6Nodes: true}} {
		t.Run(endpointsOf(o), func(t *testing.T) {
			t.Parallel()
			g := newGuarded(runningOf(t, o), 3)
			rounds, deletions := soak.Trials(20), soak.Trials(5)
			counts := g.cipherOnly("crash loops", func() {
				for range rounds {
					g.crash((*lab.Process).Kill)
				}
				for range rounds {
					g.crash((*lab.Process).Stop)
				}
				for range deletions {
					for i := range g.Nodes {
						g.run(i, "ip link del warren0")
					}
					g.pause(often)
					g.flows()
				}
			})
			if counts.WireGuard == 0 {
				t.Errorf("the wire shows no WireGuard: %v", counts)
			}
			summary(t, "%s: %d SIGKILL and %d SIGTERM of daemon and tunnel, warren0 deleted %d times, on 3 nodes each: %v", endpointsOf(o), rounds, rounds, deletions, counts)
			g.reachedAt()
			g.unguarded(0)
		})
	}
}

// endpointsOf says of which family the addresses are that the tunnels of such a lab lead to.
func endpointsOf(o lab.Options) string {
	if o.IPv6Nodes {
		return "IPv6 endpoints"
	}
	return "IPv4 endpoints"
}

// guards are labs of both ways in which a daemon knows what to guard, each with endpoints of either family.
func guards(name string, nodes int) []lab.Options {
	return []lab.Options{
		{Name: name + "c", Nodes: nodes},
		{Name: name + "c6", Nodes: nodes, IPv6Nodes: true},
		{Name: name + "k", Nodes: nodes, KnownNodesOnly: true},
		{Name: name + "k6", Nodes: nodes, KnownNodesOnly: true, IPv6Nodes: true},
	}
}

// guardOf says of which of those a lab is.
func guardOf(o lab.Options) string {
	if o.KnownNodesOnly {
		return "known nodes, " + endpointsOf(o)
	}
	return "cluster CIDR, " + endpointsOf(o)
}

// reachedAt demands that the tunnels of all nodes lead to addresses of the family that the Nodes have first.
func (s *stage) reachedAt() {
	s.t.Helper()
	for i, node := range s.Nodes {
		for _, peer := range s.status(i).Peers {
			if at, err := netip.ParseAddrPort(peer.Endpoint); err != nil || at.Addr().Is6() != node.Addresses[0].Is6() {
				s.t.Errorf("%s sends to %s at %s (%v)", node.Name, peer.Node, peer.Endpoint, err)
			}
		}
	}
}

// crash ends all tunnels and daemons, lets packets fly meanwhile, and waits until they arrive again.
func (g *guarded) crash(end func(*lab.Process) error) {
	g.t.Helper()
	const meanwhile = 20 * often
	for i := range g.Nodes {
		g.endTunnel(i, end)
	}
	g.pause(meanwhile)
	for i := range g.Nodes {
		g.endDaemon(i, end)
	}
	g.pause(meanwhile)
	for i := range g.Nodes {
		g.startTunnel(i)
	}
	g.startDaemons()
	g.flows()
}

// silent waits until nothing arrives any more at a pod from another one.
func (g *guarded) silent(at int, from *lab.Pod) {
	g.t.Helper()
	const silence = 200 * time.Millisecond
	of := func(a tagged.Arrival) bool { return a.Src == from.Addresses[0] || a.Src == from.Addresses[1] }
	g.eventually(func() error {
		before := g.counters[at].Packets(of)
		g.pause(silence)
		if more := g.counters[at].Packets(of) - before; more > 0 {
			return fmt.Errorf("%d packets arrive from %s", more, from.Name)
		}
		return nil
	})
}

// knownPeers waits until a node's device has that many peers.
func (s *stage) knownPeers(i, peers int) {
	s.t.Helper()
	s.eventually(func() error {
		status, err := s.Nodes[i].Status(s.t.Context())
		if err == nil && len(status.Peers) != peers {
			err = fmt.Errorf("%s has %d peers, %d are expected", s.Nodes[i].Name, len(status.Peers), peers)
		}
		return err
	})
}

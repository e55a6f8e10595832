package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// How long traffic between two nodes may be interrupted: by a restart of the tunnel with the same key, from the publication of a new
// key or address, and from a Node that is made again or has another podCIDR; an emulated processor takes longer.
var (
	healSameKey   = soak.Beside(2 * time.Second)
	healPublished = soak.Beside(3 * time.Second)
	healNode      = soak.Beside(5 * time.Second)
)

// peers is a stage on which the pods of the first two of three nodes send to each other.
type peers struct {
	*stage
	pods     [2]*lab.Pod
	counters [2]*tagged.Counter
	guns     []*tagged.Gun
}

// Whatever happens to a peer, traffic with it is back in time, and every node has every other one as a peer all the while.
func TestProofPeerHeals(t *testing.T) {
	t.Parallel()
	for _, o := range []lab.Options{{Name: "wppeer", Nodes: 3}, {Name: "wppeer6", Nodes: 3, IPv6Nodes: true}} {
		t.Run(endpointsOf(o), func(t *testing.T) {
			t.Parallel()
			newPeers(runningOf(t, o)).heal()
		})
	}
}

// newPeers lets the pods of a stage's first two nodes send to each other.
func newPeers(s *stage) *peers {
	s.t.Helper()
	p := &peers{stage: s}
	p.pods = [2]*lab.Pod{p.pod(0, "one"), p.pod(1, "two")}
	for i, pod := range p.pods {
		p.counters[i] = p.counter(pod.Netns())
	}
	p.open()
	p.awaitArrivals()
	return p
}

// heal lets everything happen, and measures how long it takes.
func (p *peers) heal() {
	p.t.Helper()
	longest := map[string]time.Duration{}
	note := func(what string, took, limit time.Duration) {
		longest[what] = max(longest[what], took)
		if took > limit {
			p.t.Errorf("%s: traffic was back after %v, want %v", what, took, limit)
		}
		for i := range p.Nodes {
			if n := len(p.status(i).Peers); n != len(p.Nodes)-1 {
				p.t.Errorf("%s: %s has %d peers", what, p.Nodes[i].Name, n)
			}
		}
	}
	rounds := soak.Trials(20)
	for range rounds {
		note("tunnel restarted", p.interrupted(func() (time.Time, fault) { return p.restartTunnels(1) }), healSameKey)
		note("both tunnels restarted", p.interrupted(func() (time.Time, fault) { return p.restartTunnels(0, 1) }), healSameKey)
		note("new key", p.interrupted(p.changeKey), healPublished)
		note("Node deleted and made again", p.interrupted(p.remakeNode), healNode)
		note("address changed", p.interrupted(p.changeAddress), healPublished)
	}
	note("podCIDR changed", p.changePodCIDR(), healNode)
	summary(p.t, "%d rounds on 3 nodes, traffic both ways in both families; longest until it was back: %v", rounds, longest)
}

// open lets the pods send to each other, every 5 ms or as often as the processor can.
func (p *peers) open() {
	for i, pod := range p.pods {
		p.guns = append(p.guns, p.fire(pod, tagged.Fire{Tag: tagAllowed, Targets: p.pods[1-i].Addresses, Port: port, Every: soak.Spaced(5 * time.Millisecond)}))
	}
}

// awaitArrivals waits until packets of both families arrive at both pods.
func (p *peers) awaitArrivals() {
	p.t.Helper()
	for _, counter := range p.counters {
		for _, family := range []func(tagged.Arrival) bool{family4, family6} {
			p.arrives(counter, 5, family)
		}
	}
}

// fault says by what the first node shows that it has come over what happened to the second one, so that what arrives then cannot be what
// went on as before.
type fault func(second agentapi.Peer) error

// interrupted returns how long it took from the moment that the event returns until the fault is over and traffic flows both ways in both
// families.
func (p *peers) interrupted(event func() (time.Time, fault)) time.Duration {
	p.t.Helper()
	since, over := event()
	p.eventually(func() error {
		status, err := p.Nodes[0].Status(p.t.Context())
		if err != nil {
			return err
		}
		for _, peer := range status.Peers {
			if peer.Node == p.Nodes[1].Name {
				return over(peer)
			}
		}
		return fmt.Errorf("no peer %s in %+v", p.Nodes[1].Name, status.Peers)
	})
	p.awaitArrivals()
	return time.Since(since)
}

// shakenSince is over once there was a handshake after a moment at which no session was left.
func shakenSince(moment time.Time) fault {
	return func(second agentapi.Peer) error {
		if !second.LastHandshake.After(moment) {
			return fmt.Errorf("the last handshake was at %v, before %v", second.LastHandshake, moment)
		}
		return nil
	}
}

// quiet waits until nothing arrives at either pod any more.
func (p *peers) quiet() {
	p.t.Helper()
	p.eventually(func() error {
		before := p.counters[0].Packets(nil) + p.counters[1].Packets(nil)
		p.pause(10 * often)
		if more := p.counters[0].Packets(nil) + p.counters[1].Packets(nil) - before; more > 0 {
			return fmt.Errorf("%d packets arrive", more)
		}
		return nil
	})
}

// restartTunnels kills the tunnels of nodes and starts others. Of two that know each other again at one moment, the handshakes cross. The
// kernel's WireGuard is none of theirs and goes on.
func (p *peers) restartTunnels(nodes ...int) (time.Time, fault) {
	p.t.Helper()
	since := now()
	for _, i := range nodes {
		if err := p.tunnels[i].Kill(); err != nil {
			p.t.Fatal(err)
		}
	}
	over := shakenSince(now())
	if lab.TestedWireGuard() == string(wgdevice.ModeKernel) {
		over = func(agentapi.Peer) error { return nil }
	}
	for _, i := range nodes {
		p.startTunnel(i)
	}
	return since, over
}

// changeKey gives the second node another key, as where its disk was lost, and returns when it was published.
func (p *peers) changeKey() (time.Time, fault) {
	p.t.Helper()
	node := p.Nodes[1]
	before := p.status(1).Encryption.PublicKey
	err := errors.Join(p.daemons[1].Stop(), os.Remove(filepath.Join(node.StateDir(), wgdevice.KeyFile)))
	if err != nil {
		p.t.Fatal(err)
	}
	p.startDaemon(1, nil)
	p.eventually(func() error {
		text, err := p.ReadText(node.Name)
		if err == nil && strings.Contains(string(text), before) {
			err = errors.New("the old key is still published")
		}
		return err
	})
	return now(), func(second agentapi.Peer) error {
		if second.PublicKey == before || second.LastHandshake.IsZero() {
			return fmt.Errorf("no handshake by another key than %s, but %+v", before, second)
		}
		return nil
	}
}

// remakeNode deletes the second Node and makes it again once it is gone everywhere.
func (p *peers) remakeNode() (time.Time, fault) {
	p.t.Helper()
	node, err := p.ReadText("node-2")
	if err == nil {
		err = p.Remove("node-2")
	}
	if err != nil {
		p.t.Fatal(err)
	}
	p.eventually(func() error {
		if peers := p.status(0).Peers; len(peers) != len(p.Nodes)-2 {
			return fmt.Errorf("%d peers", len(peers))
		}
		return nil
	})
	p.problem(1, "NodeUnknown", "node-2")
	p.quiet()
	since := now()
	p.writeText("node-2", string(node))
	p.ready(0)
	p.ready(1)
	return since, shakenSince(since)
}

// changeAddress gives the second node another InternalIP of each family, and returns when it was published.
func (p *peers) changeAddress() (time.Time, fault) {
	p.t.Helper()
	node := p.Nodes[1]
	text, err := p.ReadText(node.Name)
	if err != nil {
		p.t.Fatal(err)
	}
	changed, commands := string(text), []string{"default=$(ip route show default)"}
	for i, old := range node.Addresses {
		next := netip.AddrFrom4([4]byte{192, 0, 2, old.AsSlice()[len(old.AsSlice())-1] + 100})
		bits := 24
		if old.Is6() {
			raw := old.As16()
			raw[15] += 100
			next, bits = netip.AddrFrom16(raw), 64
		}
		changed = strings.ReplaceAll(changed, "address: "+old.String()+"\n", "address: "+next.String()+"\n")
		commands = append(commands, fmt.Sprintf("ip addr del %s/%d dev eth0", old, bits), fmt.Sprintf("ip addr add %s/%d dev eth0 nodad", next, bits))
		node.Addresses[i] = next
	}
	commands = append(commands, "ip route replace $default") // it went with the address
	if out, runErr := node.Run(p.t.Context(), "sh", "-ec", strings.Join(commands, "\n")); runErr != nil {
		p.t.Fatal(out, runErr)
	}
	since := now()
	p.writeText(node.Name, changed)
	return since, func(second agentapi.Peer) error {
		at, err := netip.ParseAddrPort(second.Endpoint)
		if err == nil && !slices.Contains(node.Addresses, at.Addr()) {
			err = fmt.Errorf("the peer is at %v, its node at %v", at, node.Addresses)
		}
		return err
	}
}

// changePodCIDR gives the second node other podCIDRs, and returns how long it takes until a pod with one of their addresses is reached.
func (p *peers) changePodCIDR() time.Duration {
	p.t.Helper()
	since := now()
	p.changePodCIDRs(1, "10.244.77.0/24", "fd00:10:244:77::/64")
	moved := p.pod(1, "moved")
	if !netip.MustParsePrefix("10.244.77.0/24").Contains(moved.Addresses[0]) {
		p.t.Fatalf("the pod has %v", moved.Addresses)
	}
	p.reaches(p.pods[0], moved)
	p.reaches(moved, p.pods[0])
	return time.Since(since)
}

// now is the clock of these measurements.
func now() time.Time { return time.Now() } //nolint:forbidigo // how long a heal takes

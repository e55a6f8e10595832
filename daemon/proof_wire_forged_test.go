package main

import (
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

// A host beside the nodes sends from the addresses of pods, of the node that it sends to and of others, and from those that nodes have
// in their podCIDRs: nothing of it reaches a pod or a process of the node, also in fragments.
func TestProofForgedSources(t *testing.T) {
	t.Parallel()
	for _, o := range guards("wpforge", 2) {
		t.Run(guardOf(o), func(t *testing.T) {
			t.Parallel()
			f := newForger(t, o)
			unknown := []netip.Addr{netip.MustParseAddr("10.244.77.9"), netip.MustParseAddr("fd00:10:244:77::9")}
			sources := slices.Concat(f.local.Addresses, f.remote.Addresses, f.firsts())
			if !o.KnownNodesOnly {
				sources = append(sources, unknown...)
			}
			rounds := soak.Trials(20)
			nobody := []netip.Addr{netip.MustParseAddr("203.0.113.9"), netip.MustParseAddr("2001:db8:77::9")}
			f.control("from addresses of nobody", f.send(rounds, nobody), nobody)
			sent := f.send(rounds, sources)
			delivered := f.take()
			for where, n := range delivered {
				if n > 0 {
					t.Errorf("%d of %d forged packets reached the %s", n, sent, where)
				}
			}
			summary(t, "%s: %d packets from %d forged sources, half of them in fragments: delivered %v", guardOf(o), sent, len(sources), delivered)
			f.reachedAt()

			f.endDaemon(0, (*lab.Process).Kill)
			if _, err := f.Nodes[0].Run(t.Context(), "sh", "-ec", "iptables -t raw -F; ip6tables -t raw -F"); err != nil {
				t.Fatal(err)
			}
			f.control("the same, without the guard", f.send(rounds, sources), f.remote.Addresses)
		})
	}
}

// forger is a host beside the first of two nodes, which have a pod each.
type forger struct {
	*stage
	local, remote *lab.Pod
	sender        *tagged.Sender
	toPod         *tagged.Counter
	toNode        *tagged.Delivery
	// podBefore and nodeBefore were counted already.
	podBefore, nodeBefore int64
}

func newForger(t *testing.T, o lab.Options) *forger {
	t.Helper()
	f := &forger{stage: newStageOf(t, o)}
	for i := range f.Nodes {
		f.startTunnel(i)
	}
	f.startDaemons()
	f.local, f.remote = f.pod(0, "local"), f.pod(1, "remote")
	f.reaches(f.local, f.remote)
	// Nothing but Warren's guard is to stand in the way, and a kernel that checks sources by itself would.
	_, err := f.Nodes[0].Run(t.Context(), "sh", "-ec", "for file in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$file; done")
	if err == nil {
		f.sender, err = tagged.NewSenderBy(f.Wire(), lab.WireLink, f.Nodes[0].MAC)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.sender.Close() })
	f.toPod = f.counter(f.local.Netns())
	if f.toNode, err = tagged.Deliver(f.Nodes[0].Netns(), tagForbidden); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.toNode.Stop() })
	return f
}

// firsts are the addresses that the nodes have in their podCIDRs.
func (f *forger) firsts() []netip.Addr {
	var all []netip.Addr
	for _, node := range f.Nodes {
		for _, prefix := range node.PodCIDRs {
			all = append(all, prefix.Addr().Next())
		}
	}
	return all
}

// send sends packets of all protocols from all sources to the pod and to the node, whole and in fragments, and returns how many.
func (f *forger) send(rounds int, sources []netip.Addr) (sent int) {
	f.t.Helper()
	var serial uint16
	for range rounds {
		for _, source := range sources {
			for _, target := range slices.Concat(f.local.Addresses, f.Nodes[0].Addresses, f.firsts()[:2]) {
				if source.Is4() != target.Is4() {
					continue
				}
				for _, protocol := range tagged.Protocols() {
					serial++
					shot := tagged.Shot{Tag: tagForbidden, Protocol: protocol, Src: source, Dst: target, Port: port}
					parts := shot.Fragments(serial + 1000)
					err := errors.Join(f.sender.Send(shot), f.sender.SendPacket(parts[0]), f.sender.SendPacket(parts[1]))
					if err != nil {
						f.t.Fatal(err)
					}
					sent += 2
				}
			}
		}
	}
	f.pause(10 * often)
	return sent
}

// take returns how many packets were delivered where since it was asked last.
func (f *forger) take() map[string]int64 {
	pod, node := int64(f.toPod.Packets(tagged.Of(tagForbidden))), f.toNode.Packets()
	delivered := map[string]int64{"pod": pod - f.podBefore, "node": node - f.nodeBefore}
	f.podBefore, f.nodeBefore = pod, node
	return delivered
}

// control demands that the node and, from all of some sources, the pod got something.
func (f *forger) control(what string, sent int, sources []netip.Addr) {
	f.t.Helper()
	delivered := f.take()
	if delivered["node"] == 0 {
		f.t.Errorf("control, %s: %d packets, delivered %v", what, sent, delivered)
	}
	for _, source := range sources {
		if f.toPod.Packets(func(a tagged.Arrival) bool { return a.Src == source }) == 0 {
			f.t.Errorf("control, %s: no packet from %v reached the pod", what, source)
		}
	}
	f.t.Logf("control, %s: %d packets, delivered %v", what, sent, delivered)
}

package main

import (
	"encoding/base64"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/keyproof"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
	"github.com/warren-cni/warren/pkg/mesh"
)

// Whatever a node lacks to send to another one by the tunnel, what is meant for that node's pods is dropped and not sent in clear:
// where the daemon is told the cluster CIDR, and where it has to know the nodes.
func TestProofNoPlaintextWithoutPeer(t *testing.T) {
	t.Parallel()
	for _, o := range guards("wppeer", 3) {
		t.Run(guardOf(o), func(t *testing.T) {
			t.Parallel()
			s := newStageOf(t, o)
			for i := range 2 {
				s.startTunnel(i)
				s.startDaemon(i, nil)
			}
			for i := range 2 {
				if err := s.Nodes[i].Ready(t.Context(), s.daemons[i], 1); err != nil {
					t.Fatal(err)
				}
			}
			g := newGuarded(s, 2)
			rounds := soak.Trials(20)
			var trials, inClear int
			for _, state := range []struct {
				name   string
				rounds int
				happen func()
			}{
				{"a node joins while its pods get traffic already", 1, g.join},
				{"the annotation is gone", rounds / 2, g.publishNothing},
				{"another key is published", rounds / 2, g.publishForeignKey},
				{"the Node is gone", rounds / 2, g.nodeGoes},
				{"allowed IPs and routes are removed by hand", rounds / 2, g.cutByHand},
				{"pods end under load", rounds, g.podsEnd},
				{"packets of no connection", rounds, func() { g.stray(marker) }},
			} {
				counts := g.cipherOnly(state.name, func() {
					for range state.rounds {
						state.happen()
					}
				})
				trials += state.rounds
				inClear += counts.InClear[0] + counts.InClear[1]
			}
			summary(t, "%s: %d trials of 7 states in which a peer lacks something: %d packets in clear", guardOf(o), trials, inClear)
			g.reachedAt()
			g.unguarded(0)
			g.strayControl()
		})
	}
}

// join starts a third node, whose pods get traffic before it has ever run.
func (g *guarded) join() {
	g.t.Helper()
	var targets []netip.Addr
	for number := range byte(5) {
		targets = append(targets, netip.AddrFrom4([4]byte{10, 244, 3, 2 + number}), netip.MustParseAddr(fmt.Sprintf("fd00:10:244:3::%d", 2+number)))
	}
	for i, pod := range g.pods {
		g.send(pod, targets)
		g.whisper(g.Nodes[i].Netns(), targets, marker[:])
	}
	g.pause(10 * often)
	g.startTunnel(2)
	g.startDaemon(2, nil)
	for i := range g.Nodes {
		g.ready(i)
	}
	late := g.pod(2, "late")
	if !slices.Contains(targets, late.Addresses[0]) || !slices.Contains(targets, late.Addresses[1]) {
		g.t.Fatalf("the pod has %v", late.Addresses)
	}
	counter := g.counter(late.Netns())
	g.eventually(func() error { return inFamilies(counter, tagAllowed) })
}

// publishNothing takes the key from the second Node.
func (g *guarded) publishNothing() {
	g.t.Helper()
	g.republish(map[string]string{kube.AnnotationPublicKey: "# taken away"}, func() error { return nil })
}

// publishForeignKey gives the second Node a key that its device has not. It is proven, so the first node takes it, and encrypts for it.
func (g *guarded) publishForeignKey() {
	g.t.Helper()
	private, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		g.t.Fatal(err)
	}
	proof, err := keyproof.Sign(private, "node-2", "")
	if err != nil {
		g.t.Fatal(err)
	}
	foreign := private.PublicKey().String()
	g.republish(map[string]string{
		kube.AnnotationPublicKey: kube.AnnotationPublicKey + ": " + foreign,
		kube.AnnotationKeyProof:  kube.AnnotationKeyProof + ": " + base64.StdEncoding.EncodeToString(proof[:]),
	}, func() error {
		for _, peer := range g.status(0).Peers {
			if peer.Node == "node-2" && peer.PublicKey == foreign && len(peer.AllowedIPs) > 0 {
				return nil
			}
		}
		return fmt.Errorf("the first node's device does not have the foreign key %s", foreign)
	})
}

// republish replaces annotations of the second Node while its daemon is away to heal it, until the first node has taken that in and
// nothing arrives any more.
func (g *guarded) republish(annotations map[string]string, taken func() error) {
	g.t.Helper()
	g.endDaemon(1, (*lab.Process).Kill)
	text, err := g.ReadText("node-2")
	if err != nil {
		g.t.Fatal(err)
	}
	for name, replacement := range annotations {
		published := regexp.MustCompile(regexp.QuoteMeta(name) + `: \S+`)
		if !published.Match(text) {
			g.t.Fatalf("the Node has no annotation %s:\n%s", name, text)
		}
		text = published.ReplaceAllLiteral(text, []byte(replacement))
	}
	g.writeText("node-2", string(text))
	g.eventually(taken)
	g.silent(1, g.pods[0])
	g.startDaemon(1, nil)
	g.ready(1)
	g.flows()
}

// nodeGoes deletes the second Node while everybody sends, restarts the daemon that has to remember it, and makes it again.
func (g *guarded) nodeGoes() {
	g.t.Helper()
	node, err := g.ReadText("node-2")
	if err == nil {
		err = g.Remove("node-2")
	}
	if err != nil {
		g.t.Fatal(err)
	}
	g.knownPeers(0, 1)
	g.problem(1, "NodeUnknown", "node-2")
	g.endDaemon(0, (*lab.Process).Kill)
	g.startDaemon(0, nil)
	if err = g.Nodes[0].Ready(g.t.Context(), g.daemons[0], 1); err != nil {
		g.t.Fatal(err)
	}
	g.pause(10 * often)
	g.writeText("node-2", string(node))
	g.ready(0)
	g.ready(1)
	g.flows()
}

// cutByHand takes from the first node's device what leads to the other nodes, then the routes, too, and lets a new daemon mend it.
func (g *guarded) cutByHand() {
	g.t.Helper()
	err := g.Nodes[0].WireGuard(func(client *wgctrl.Client) error {
		device, err := client.Device(mesh.Link)
		if err != nil {
			return err
		}
		var none wgtypes.Config
		for _, p := range device.Peers {
			none.Peers = append(none.Peers, wgtypes.PeerConfig{
				PublicKey: p.PublicKey, UpdateOnly: true, ReplaceAllowedIPs: true, AllowedIPs: []net.IPNet{},
			})
		}
		return client.ConfigureDevice(mesh.Link, none)
	})
	if err != nil {
		g.t.Fatal(err)
	}
	g.silent(1, g.pods[0])
	g.run(0, "ip route flush proto 87; ip -6 route flush proto 87")
	g.pause(10 * often)
	g.endDaemon(0, (*lab.Process).Kill)
	g.startDaemon(0, nil)
	g.ready(0)
	g.flows()
}

// podsEnd deletes a pod that gets packets and one that sends them.
func (g *guarded) podsEnd() {
	g.t.Helper()
	target, sender := g.pod(1, "target"), g.pod(0, "sender")
	counter := g.counter(target.Netns())
	fire := tagged.Fire{Tag: tagFar, Targets: slices.Concat(target.Addresses, g.pods[1].Addresses), Port: port, Every: often / 5, Payload: marker[:]}
	gun := g.fire(sender, fire)
	back := g.fire(target, tagged.Fire{Tag: tagFar, Targets: sender.Addresses, Port: port, Every: often / 5, Payload: marker[:]})
	g.eventually(func() error { return inFamilies(counter, tagFar) })
	for _, pod := range []*lab.Pod{target, sender} {
		if err := pod.Delete(g.t.Context()); err != nil {
			g.t.Fatal(err)
		}
		g.pause(often)
	}
	gun.Cease()
	back.Cease()
}

// stray lets a pod send what belongs to no connection, and so is translated by nobody, to a remote pod and out of the cluster.
func (g *guarded) stray(payload [lab.MarkerSize]byte) {
	g.t.Helper()
	sender, err := tagged.NewSender(g.pods[0].Netns())
	if err != nil {
		g.t.Fatal(err)
	}
	defer func() { _ = sender.Close() }()
	own := sender.Addresses()
	for _, target := range append(slices.Clone(g.pods[1].Addresses), beyond()...) {
		for _, protocol := range []tagged.Protocol{tagged.TCP, tagged.ICMP} {
			shot := tagged.Shot{Tag: tagForbidden, Protocol: protocol, Dst: target, Port: port, Stray: true, Payload: payload[:]}
			for _, shot.Src = range own {
				if shot.Src.Is4() != target.Is4() {
					continue
				}
				if err = sender.Send(shot); err != nil {
					g.t.Fatal(err)
				}
			}
		}
	}
	g.pause(often)
}

// beyond are the addresses of the host on the wire that is no node.
func beyond() []netip.Addr {
	return []netip.Addr{netip.MustParseAddr("192.0.2.254"), netip.MustParseAddr("2001:db8::fe")}
}

// strayControl shows that packets of no connection would have been seen.
func (g *guarded) strayControl() {
	g.t.Helper()
	own := lab.NewMarker()
	capture, err := g.Capture(own)
	if err != nil {
		g.t.Fatal(err)
	}
	g.stray(own)
	counts, err := capture.Stop()
	if err != nil {
		g.t.Fatal(err)
	}
	if counts.Marked == 0 {
		g.t.Errorf("without the guards, packets of no connection are not seen: %v", counts)
	}
}

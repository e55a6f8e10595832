package main

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

// What a stolen node sends through the tunnel from addresses that are not its own is delivered nowhere.
func TestProofForeignInnerSource(t *testing.T) {
	t.Parallel()
	v := newVillainy(t, "wphsource")
	sender := v.breaksLoose()
	counters := []*tagged.Counter{v.counter(v.pods[near].Netns()), v.counter(v.pods[far].Netns()), v.counter(v.Nodes[near].Netns()), v.counter(v.Nodes[far].Netns())}
	arrived := func(tag uint32) (packets int) {
		for _, c := range counters {
			packets += c.Packets(tagged.Of(tag))
		}
		return packets
	}
	targets := slices.Concat(addresses(v.pods[near], v.pods[far]), parsed("10.244.1.1", "10.244.3.1", "fd00:10:244:1::", "fd00:10:244:3::"))
	foreign := slices.Concat(addresses(v.pods[near], v.pods[far]), v.Nodes[near].Addresses, v.Nodes[villain].Addresses, outside(),
		parsed("10.244.1.1", "10.244.3.77", "10.244.9.9", "8.8.8.8", "127.0.0.1", "0.0.0.0", "fd00:10:244:3::77", "fd00:10:244:9::9", "2001:db8:1::1", "::1"))
	shots := 0
	shoot := func(tag uint32, sources []netip.Addr) {
		t.Helper()
		for _, source := range sources {
			for _, target := range targets {
				if source.Is4() != target.Is4() {
					continue
				}
				for _, protocol := range tagged.Protocols() {
					shots++
					if err := sender.Send(tagged.Shot{Tag: tag, Protocol: protocol, Src: source, Dst: target, Port: port}); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
	}
	for range 20 {
		shoot(tagForbidden, foreign)
		shoot(tagAllowed, v.pods[villain].Addresses)
	}
	v.eventually(func() error {
		shoot(tagAllowed, v.pods[villain].Addresses)
		return errors.Join(inFamilies(counters[0], tagAllowed), inFamilies(counters[1], tagAllowed))
	})
	if packets := arrived(tagForbidden); packets > 0 {
		t.Errorf("%d packets with a foreign source came through the tunnel", packets)
	}
	summary(t, "%d packets through the tunnel, those with a foreign source: %d delivered", shots, arrived(tagForbidden))

	// Where a peer may send from them the same packets arrive.
	v.eventually(func() error {
		v.allow(near, villain, "10.244.3.77/32", "fd00:10:244:3::77/128")
		shoot(tagForbidden, parsed("10.244.3.77", "fd00:10:244:3::77"))
		return inFamilies(counters[0], tagForbidden)
	})
}

// What a stolen node sends through the tunnel to a host on the wire, another node or a remote pod is sent on by nobody: neither with its
// own address nor with the one of the node that it came to.
func TestProofNoRouterForStolenNode(t *testing.T) {
	t.Parallel()
	v := newVillainy(t, "wphrouter")
	sender := v.breaksLoose()
	targets := slices.Concat(beyond(), v.Nodes[far].Addresses)
	var allowed []string
	for _, target := range targets {
		allowed = append(allowed, netip.PrefixFrom(target, target.BitLen()).String())
	}
	v.allow(villain, near, allowed...)
	shoot := func(tag uint32, payload []byte, targets []netip.Addr) {
		t.Helper()
		for _, source := range v.pods[villain].Addresses {
			for _, target := range targets {
				for _, protocol := range tagged.Protocols() {
					shot := tagged.Shot{Tag: tag, Protocol: protocol, Src: source, Dst: target, Port: port, Payload: payload}
					for _, shot.Stray = range []bool{false, true} {
						if source.Is4() != target.Is4() {
							continue
						}
						if err := sender.Send(shot); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
		}
	}
	// What is sent last is for a pod: when that has arrived all has.
	arrived := v.counter(v.pods[near].Netns())
	shots := func(payload [lab.MarkerSize]byte) lab.Counts {
		t.Helper()
		capture, err := v.Capture(payload)
		if err != nil {
			t.Fatal(err)
		}
		before := arrived.Packets(nil)
		for range 20 {
			shoot(tagForbidden, payload[:], targets)
		}
		v.eventually(func() error {
			shoot(tagAllowed, nil, v.pods[near].Addresses)
			if arrived.Packets(nil) == before {
				return errors.New("nothing comes through the tunnel to a pod")
			}
			return inFamilies(arrived, tagAllowed)
		})
		v.pause(often)
		counts, err := capture.Stop()
		if err != nil {
			t.Fatal(err)
		}
		return counts
	}
	if counts := shots(marker); counts.Marked+counts.Pods > 0 || counts.WireGuard == 0 {
		t.Errorf("%s sent on what came through the tunnel: %v, %q", v.Nodes[near].Name, counts, counts.Examples)
	}

	// Without the rules the same packets are sent on, translated, and those that begin nothing with the pod's own address.
	if err := v.daemons[near].Stop(); err != nil {
		t.Fatal(err)
	}
	remove := `for t in mangle filter; do for tool in iptables ip6tables; do
$tool -w -t $t -S | grep 'not routed for other nodes' | sed 's/^-A/-D/' | while read -r line; do eval $tool -w -t $t $line; done
done; done`
	if _, err := v.Nodes[near].Run(t.Context(), "sh", "-ec", remove); err != nil {
		t.Fatal(err)
	}
	if counts := shots(lab.NewMarker()); counts.Marked == 0 || counts.Pods == 0 || slices.Min(counts.InClear[:]) == 0 {
		t.Errorf("without the rules not all is sent on: %v, by family %v", counts, counts.InClear)
	} else {
		summary(t, "without the rules %d packets of a stolen node are sent on, %d of them with its pod's address", counts.Marked, counts.Pods)
	}
}

// breaksLoose lets the villain send what it likes, without a daemon or rules, and returns a sender into its tunnel.
func (v *villainy) breaksLoose() *tagged.Sender {
	v.t.Helper()
	if err := v.daemons[villain].Stop(); err != nil {
		v.t.Fatal(err)
	}
	flush := "for t in raw mangle nat filter; do iptables -t $t -F; ip6tables -t $t -F; done"
	if _, err := v.Nodes[villain].Run(v.t.Context(), "sh", "-ec", flush); err != nil {
		v.t.Fatal(err)
	}
	sender, err := tagged.NewSenderBy(v.Nodes[villain].Netns(), "warren0", net.HardwareAddr{})
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { _ = sender.Close() })
	return sender
}

// allow adds to what a node takes from a peer and sends to it.
func (v *villainy) allow(at, peer int, prefixes ...string) {
	v.t.Helper()
	v.allowKey(at, v.nodes[peer].Annotations[kube.AnnotationPublicKey], prefixes...)
}

// allowKey adds to what a node takes from a peer of its tunnel and sends to it.
func (s *stage) allowKey(at int, publicKey string, prefixes ...string) {
	s.t.Helper()
	key, err := wgtypes.ParseKey(publicKey)
	if err != nil {
		s.t.Fatal(err)
	}
	var allowed []net.IPNet
	for _, text := range prefixes {
		_, prefix, _ := net.ParseCIDR(text)
		allowed = append(allowed, *prefix)
	}
	err = s.Nodes[at].WireGuard(func(c *wgctrl.Client) error {
		return c.ConfigureDevice("warren0", wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: key, UpdateOnly: true, AllowedIPs: allowed}}})
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

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
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

// What a stolen node sends through the tunnel from addresses that are not its own is delivered nowhere.
func TestProofForeignInnerSource(t *testing.T) {
	t.Parallel()
	v := newVillainy(t, "wphsource")
	// It sends what it likes: no daemon, no rules.
	if err := v.daemons[villain].Stop(); err != nil {
		t.Fatal(err)
	}
	flush := "for t in raw mangle nat filter; do iptables -t $t -F; ip6tables -t $t -F; done"
	if _, err := v.Nodes[villain].Run(t.Context(), "sh", "-ec", flush); err != nil {
		t.Fatal(err)
	}
	sender, err := tagged.NewSenderBy(v.Nodes[villain].Netns(), "warren0", net.HardwareAddr{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sender.Close() })
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
	key, err := wgtypes.ParseKey(v.nodes[villain].Annotations[kube.AnnotationPublicKey])
	if err != nil {
		t.Fatal(err)
	}
	var allowed []net.IPNet
	for _, text := range []string{"10.244.3.77/32", "fd00:10:244:3::77/128"} {
		_, prefix, _ := net.ParseCIDR(text)
		allowed = append(allowed, *prefix)
	}
	v.eventually(func() error {
		err := v.Nodes[near].WireGuard(func(c *wgctrl.Client) error {
			return c.ConfigureDevice("warren0", wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: key, UpdateOnly: true, AllowedIPs: allowed}}})
		})
		if err != nil {
			return err
		}
		shoot(tagForbidden, parsed("10.244.3.77", "fd00:10:244:3::77"))
		return inFamilies(counters[0], tagForbidden)
	})
}

package wgdevice_test

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// newMarker returns text that no packet holds by chance.
func newMarker() string { return rand.Text() + rand.Text() }

func TestMeshEncrypts(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	l.joinAll(t, true)
	for _, n := range l.nodes {
		if again := n.apply(t, n.plan(t, l.nodes...)); again.Any() {
			t.Errorf("%s: the second apply wrote %+v", n.name(), again)
		}
		if mode := n.status(t).Mode; mode != testMode() {
			t.Fatalf("%s runs in mode %s, and this test is for %s", n.name(), mode, testMode())
		}
	}

	marker := newMarker()
	wire := l.listen(t, marker)
	a.reach(t, b, marker)
	b.reach(t, a, marker)
	payload := make([]byte, 1<<20)
	_, _ = rand.Read(payload) // never fails
	to4, to6 := b.addresses()
	a.transfer(t, to4, payload)
	a.transfer(t, to6, payload)
	if got := wire.count(t); inClear(got) || got.Fragments != 0 || got.WireGuardBytes < len(payload)*2 {
		t.Errorf("on the wire: %v, %d fragments, %d bytes by WireGuard; want nothing in clear, no fragments, and all bytes by WireGuard",
			got, got.Fragments, got.WireGuardBytes)
	}

	status := a.status(t)
	if len(status.Peers) != 1 {
		t.Fatalf("peers: %+v", status.Peers)
	}
	peer := status.Peers[0]
	if peer.PublicKey != b.key.Public() || peer.LastHandshake.IsZero() || peer.SentBytes < int64(len(payload)) || peer.ReceivedBytes == 0 ||
		peer.Endpoint.String() != "192.0.2.2:51820" || len(peer.AllowedIPs) != 2 {
		t.Errorf("status of the peer: %+v", peer)
	}

	// The positive control: the same probes without encryption are seen by the same capture.
	l.joinAll(t, false)
	if again := a.apply(t, a.planWith(t, false, l.nodes...)); again.Any() {
		t.Errorf("without encryption: the second apply wrote %+v", again)
	}
	wire.count(t)
	for _, to := range []netip.Addr{to4, to6} {
		b.do(t, func() error { // without a link nobody has the address: it stands for a pod here
			lo, err := netlinksafe.LinkByName("lo")
			address := &net.IPNet{IP: to.AsSlice(), Mask: net.CIDRMask(to.BitLen(), to.BitLen())}
			return errors.Join(err, netlink.AddrAdd(lo, &netlink.Addr{IPNet: address, Flags: unix.IFA_F_NODAD}))
		})
		a.transfer(t, to, []byte(marker))
	}
	if got := wire.count(t); !inClear(got) || got.WireGuard != 0 {
		t.Errorf("without encryption on the wire: %v, want packets in clear and none of WireGuard", got)
	}

	// The tunnels' processes have outlived that.
	l.joinAll(t, true)
	wire.count(t)
	a.reach(t, b, marker)
	b.reach(t, a, marker)
	if got := wire.count(t); inClear(got) || got.WireGuard == 0 {
		t.Errorf("with encryption on again, on the wire: %v, want nothing in clear", got)
	}
}

func TestPeersChangeByDifference(t *testing.T) {
	l := newLab(t, 3)
	a, b, c := l.nodes[0], l.nodes[1], l.nodes[2]
	l.joinAll(t, true)
	marker := newMarker()
	a.reach(t, b, marker)
	a.reach(t, c, marker)
	before := peerOf(t, a, b)

	if changes := a.apply(t, a.plan(t, a, b)); changes != (wgdevice.Changes{Peers: 1, Routes: 2}) {
		t.Errorf("removing a peer wrote %+v", changes)
	}
	a.miss(t, c, marker)
	if after := peerOf(t, a, b); after.LastHandshake != before.LastHandshake || after.ReceivedBytes < before.ReceivedBytes {
		t.Errorf("the session with the peer that stays was lost: %+v, then %+v", before, after)
	}

	// The podCIDRs of the node that left go to the one that stays: the prefixes move, no session ends.
	moved := a.plan(t, a, b, c)
	i := slices.IndexFunc(moved.Peers, func(p mesh.Peer) bool { return p.Node == c.name() })
	takes := slices.Clone(moved.Peers[i].AllowedIPs)
	moved.Peers = slices.Delete(moved.Peers, i, i+1)
	moved.Peers[0].AllowedIPs = append(moved.Peers[0].AllowedIPs, takes...)
	a.apply(t, a.plan(t, a, b, c))
	if changes := a.apply(t, moved); changes != (wgdevice.Changes{Peers: 2}) {
		t.Errorf("moving podCIDRs wrote %+v", changes)
	}
	if after := peerOf(t, a, b); len(after.AllowedIPs) != 4 || after.LastHandshake != before.LastHandshake {
		t.Errorf("after podCIDRs moved: %+v", after)
	}

	a.apply(t, a.plan(t, a, b, c))
	a.reach(t, c, marker)
	a.reach(t, b, marker)

	// Another port and another address of a peer are one change each.
	config := a.plan(t, a, b, c)
	config.Peers[0].Endpoint = netip.MustParseAddrPort("[2001:db8::2]:51820")
	if changes := a.apply(t, config); changes != (wgdevice.Changes{Peers: 1}) {
		t.Errorf("another endpoint wrote %+v", changes)
	}
	a.reach(t, b, marker)
	config.ListenPort, config.MTU = 51999, 1300
	if changes := a.apply(t, config); changes.Links != 2 || changes.Peers > 1 || changes.Routes != 0 {
		t.Errorf("another port and MTU wrote %+v", changes)
	}
	a.reach(t, b, marker)
}

// TestManyPeers is a node of a large cluster, which one message cannot hold.
func TestManyPeers(t *testing.T) {
	n := newLab(t, 1).nodes[0]
	config := n.plan(t, n)
	for i := range 600 {
		high, low := byte(i>>8), byte(i)
		p := mesh.Peer{
			PublicKey: [32]byte{1, high, low},
			Endpoint:  netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, high + 3, low}), wireGuardPort),
			AllowedIPs: []netip.Prefix{
				netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 200 + high, low, 0}), 24),
				netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 1, 6: high, 7: low}), 64),
			},
		}
		config.Peers = append(config.Peers, p)
		for j, source := range config.Addresses {
			config.Routes = append(config.Routes, mesh.Route{Destination: p.AllowedIPs[j], Source: source.Addr()})
		}
	}
	if changes := n.apply(t, config); changes.Peers != 600 || changes.Routes != 1202 {
		t.Errorf("the first apply wrote %+v", changes)
	}
	if again := n.apply(t, config); again.Any() {
		t.Errorf("the second apply wrote %+v", again)
	}
	config.Peers, config.Routes = config.Peers[:599], config.Routes[:1198]
	if changes := n.apply(t, config); changes != (wgdevice.Changes{Peers: 1, Routes: 2}) {
		t.Errorf("one peer less wrote %+v", changes)
	}
	if peers := len(n.status(t).Peers); peers != 599 {
		t.Errorf("%d peers, want 599", peers)
	}
}

func peerOf(t *testing.T, n, other *node) wgdevice.PeerStatus {
	t.Helper()
	for _, p := range n.status(t).Peers {
		if p.PublicKey == other.key.Public() {
			return p
		}
	}
	t.Fatalf("%s is no peer of %s", other.name(), n.name())
	return wgdevice.PeerStatus{}
}

func TestApplyWithoutTunnelClosesTheWay(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	l.joinAll(t, true)
	a.do(t, func() error { return a.device.Cleanup() })
	if testMode() == wgdevice.ModeUserspace {
		_ = a.tunnel.Wait() // it ends with an error, because its link was deleted
	}
	marker := newMarker()
	wire := l.listen(t, marker)
	absent := newDevice(t, wgdevice.ModeUserspace)
	_, err := try(a.host, func() (wgdevice.Changes, error) { return absent.Apply(t.Context(), a.plan(t, a, b), a.key) })
	if !errors.Is(err, wgdevice.ErrNoTunnel) || !strings.Contains(err.Error(), "manifests/userspace-tunnel.yaml") {
		t.Errorf("apply: %v", err)
	}
	to4, _ := b.addresses()
	if _, err = a.ask(to4, marker, 1); !errors.Is(err, unix.EHOSTUNREACH) {
		t.Errorf("asking a remote pod: %v, want no route to host at once", err)
	}
	a.miss(t, b, marker)
	if got := wire.count(t); inClear(got) {
		t.Errorf("on the wire: %v, want nothing in clear", got)
	}
}

func TestStraysGoAndForeignThingsStay(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	l.joinAll(t, true)
	before := describe(t, a)
	a.do(t, func() error {
		link, err := netlinksafe.LinkByName(mesh.Link)
		if err != nil {
			return err
		}
		return errors.Join(
			ipRoute("10.244.77.0/24", link.Attrs().Index, wgdevice.RouteProtocol), // ours by its protocol, and not wanted
			ipRoute("203.0.113.0/24", link.Attrs().Index, unix.RTPROT_STATIC),     // another program's, though on our link
			ipRoute("198.51.100.0/24", 0, unix.RTPROT_BOOT),
			netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 244, 77, 1), Mask: net.CIDRMask(32, 32)}}),
			netlink.LinkSetMTU(link, 1280))
	})
	if changes := a.apply(t, a.plan(t, a, b)); changes != (wgdevice.Changes{Links: 2, Routes: 1}) {
		t.Errorf("repair wrote %+v", changes)
	}
	got := describe(t, a)
	for _, foreign := range []string{"198.51.100.0/24 unreachable\n", "203.0.113.0/24 warren0\n"} {
		if !strings.Contains(got, foreign) {
			t.Errorf("repair took %q", foreign)
		}
		got = strings.Replace(got, foreign, "", 1)
	}
	if got != before {
		t.Errorf("after repair:\n%s\nwant:\n%s", got, before)
	}

	// A route of another program where ours should be is reported and left alone; the other family is not affected.
	taken, _ := b.podCIDRs()
	a.do(t, func() error { return a.device.Cleanup() })
	if got := describe(t, a); got != "198.51.100.0/24 unreachable\n" {
		t.Errorf("cleanup left:\n%s", got)
	}
	if testMode() == wgdevice.ModeUserspace {
		_ = a.tunnel.Wait() // it ends with an error, because its link was deleted
		a.startTunnel(t, wgdevice.ModeUserspace)
	}
	a.do(t, func() error { return ipRoute(taken.String(), 0, unix.RTPROT_STATIC) })
	_, err := try(a.host, func() (wgdevice.Changes, error) { return a.device.Apply(t.Context(), a.plan(t, a, b), a.key) })
	if err == nil || !strings.Contains(err.Error(), "ip route del "+taken.String()) {
		t.Errorf("apply beside another program's route: %v", err)
	}
	_, to6 := b.addresses()
	if _, err = a.ask(to6, newMarker(), 20); err != nil {
		t.Errorf("the family that is not affected: %v", err)
	}
	if got := describe(t, a); !strings.Contains(got, taken.String()+" unreachable") {
		t.Errorf("the other program's route is gone:\n%s", got)
	}
}

// TestOneFamilyTurnedOff is a node whose administrator turned IPv6 off: that is reported, and IPv4 works.
func TestOneFamilyTurnedOff(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	a.do(t, func() error {
		return errors.Join(
			os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0),
			os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0))
	})
	b.apply(t, b.plan(t, a, b))
	_, err := try(a.host, func() (wgdevice.Changes, error) { return a.device.Apply(t.Context(), a.plan(t, a, b), a.key) })
	if err == nil || !strings.Contains(err.Error(), "adding address fd00:0:0:1::1/128") {
		t.Errorf("apply: %v", err)
	}
	to4, _ := b.addresses()
	if _, err = a.ask(to4, newMarker(), 20); err != nil {
		t.Errorf("IPv4: %v", err)
	}
}

func TestForeignLinkOfOurName(t *testing.T) {
	n := newLab(t, 1).nodes[0]
	if testMode() == wgdevice.ModeUserspace {
		_ = n.signalTunnel(t, syscall.SIGTERM)
		n.do(t, func() error { return n.device.Cleanup() })
	}
	n.do(t, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = mesh.Link
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs})
	})
	_, err := try(n.host, func() (wgdevice.Changes, error) { return n.device.Apply(t.Context(), n.plan(t, n), n.key) })
	if err == nil || !strings.Contains(err.Error(), "rename or delete") {
		t.Errorf("apply: %v", err)
	}
	if _, err = try(n.host, func() (any, error) { return nil, n.device.Cleanup() }); err == nil {
		t.Error("cleanup says nothing of the foreign link")
	}
	n.do(t, func() error { _, err := netlinksafe.LinkByName(mesh.Link); return err })
}

func TestReadUplink(t *testing.T) {
	n := newLab(t, 1).nodes[0]
	v4, v6 := uplink(n.number)
	n.do(t, func() error {
		link, err := netlinksafe.LinkByName("eth0")
		if err != nil {
			return err
		}
		lo, err := netlinksafe.LinkByName("lo")
		return errors.Join(err, netlink.LinkSetMTU(link, 1400),
			netlink.AddrAdd(lo, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(198, 51, 100, 1), Mask: net.CIDRMask(32, 32)}}),
			addLink("second", 9000, "203.0.113.1/24"), addLink("third", 1300, "2001:db8:3::1/64"), addLink(mesh.Link, 1280, "192.0.3.1/24"))
	})
	for _, address := range []netip.Addr{v4, v6, netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("192.168.0.1")} {
		wantUplink(t, n.host, address, 1400)
	}
	wantUplink(t, n.host, v4, 1400, "203.0.113.9", "192.0.2.7")
	wantUplink(t, n.host, v4, 1400, "192.0.2.7", "2001:db8:3::7 1300", "203.0.113.9", "2001:db8:3::8 1300") // no matter to the other ways
	wantUplink(t, n.host, netip.MustParseAddr("2001:db8:3::1"), 1300, "192.0.2.7", "2001:db8:3::7")
	wantUplink(t, n.host, netip.MustParseAddr("203.0.113.1"), 9000, "192.0.2.7 1400", "198.18.0.1 1400", "203.0.113.9")
	wantUplink(t, n.host, v4, 1400, "192.0.3.9") // what leads into the tunnel leads to no node
	n.do(t, func() error {
		return errors.Join(addLink("half", 1300, "192.0.5.1/25"), addLink("other", 9000, "192.0.5.129/25"))
	})
	wantUplink(t, n.host, v4, 1400, "192.0.5.9 1300", "192.0.5.200") // neighbours, one of which may be hostile
	wantUplink(t, n.host, v4, 1400, "192.0.5.200", "192.0.5.9 1300")
	n.do(t, func() error { return ipRoute("198.18.0.0/15", 0, unix.RTPROT_STATIC) })
	wantUplink(t, n.host, netip.MustParseAddr("203.0.113.1"), 9000, "198.18.0.1") // nowhere

	// A default route of several ways, and the node's address on none of their links.
	n.do(t, func() error {
		if err := addLink("fourth", 1450, "192.0.4.1/24"); err != nil {
			return err
		}
		var ways []*netlink.NexthopInfo
		for name, via := range map[string]net.IP{"second": net.IPv4(203, 0, 113, 2), "fourth": net.IPv4(192, 0, 4, 2)} {
			link, err := netlinksafe.LinkByName(name)
			if err != nil {
				return err
			}
			ways = append(ways, &netlink.NexthopInfo{LinkIndex: link.Attrs().Index, Gw: via})
		}
		return netlink.RouteReplace(&netlink.Route{Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, MultiPath: ways})
	})
	wantUplink(t, n.host, netip.MustParseAddr("198.51.100.1"), 1450)

	alone := newHost(t)
	if _, err := try(alone, func() (mesh.Uplink, error) { return wgdevice.ReadUplink(v4, nil) }); err == nil || !strings.Contains(err.Error(), "no default route") {
		t.Errorf("without an uplink: %v", err)
	}
}

// addLink makes a link with an address. It replaces one of that name.
func addLink(name string, mtu int, address string) error {
	if old, err := netlinksafe.LinkByName(name); err == nil {
		if err = netlink.LinkDel(old); err != nil {
			return err
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, mtu
	link := &netlink.Veth{LinkAttrs: attrs, PeerName: name + "-peer"}
	if err := netlink.LinkAdd(link); err != nil {
		return err
	}
	peer, err := netlinksafe.LinkByName(name + "-peer")
	if err != nil {
		return err
	}
	return errors.Join(addAddress(name, address), netlink.LinkSetUp(link), netlink.LinkSetUp(peer))
}

// ipRoute adds a route to the link, or an unreachable one for link 0.
func ipRoute(destination string, link int, protocol netlink.RouteProtocol) error {
	_, dst, err := net.ParseCIDR(destination)
	if err != nil {
		return err
	}
	r := &netlink.Route{Dst: dst, LinkIndex: link, Protocol: protocol, Type: unix.RTN_UNICAST}
	if link == 0 {
		r.Type = unix.RTN_UNREACHABLE
	}
	return netlink.RouteAdd(r)
}

// describe renders a node's addresses on the mesh link, and its routes without those of the uplink and those that the kernel makes
// by itself.
func describe(t *testing.T, n *node) string {
	t.Helper()
	return in(t, n.host, func() (string, error) {
		var lines []string
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := netlinksafe.RouteList(nil, family)
			if err != nil {
				return "", err
			}
			for _, r := range routes {
				target := "unreachable"
				if r.Type == unix.RTN_UNICAST {
					link, err := netlink.LinkByIndex(r.LinkIndex)
					if err != nil {
						return "", err
					}
					target = link.Attrs().Name
				}
				if target != "eth0" && r.Protocol != unix.RTPROT_KERNEL {
					lines = append(lines, fmt.Sprintf("%s %s", r.Dst, target))
				}
			}
		}
		slices.Sort(lines)
		if link, err := netlinksafe.LinkByName(mesh.Link); err == nil {
			addresses, err := netlinksafe.AddrList(link, netlink.FAMILY_ALL)
			if err != nil {
				return "", err
			}
			for _, a := range addresses {
				lines = append(lines, fmt.Sprintf("address %s, link up: %t", a.IPNet, link.Attrs().Flags&net.FlagUp != 0))
			}
		}
		return strings.Join(lines, "\n") + "\n", nil
	})
}

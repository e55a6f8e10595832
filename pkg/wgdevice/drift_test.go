package wgdevice_test

import (
	"errors"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// TestDriftIsClosedAndRepaired undoes by hand what an Apply did: nothing leaves in clear meanwhile, and the next Apply does it again
// and no more. The link stays the same all the time.
func TestDriftIsClosedAndRepaired(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	l.joinAll(t, true)
	marker := newMarker()
	wire := l.listen(t, marker)
	a.reach(t, b, marker)
	index := a.linkIndex(t)
	to4, to6 := b.podCIDRs()
	peer := wgtypes.Key(b.key.Public())
	foreign, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	port, never := 51999, time.Duration(0)
	configure := func(c wgtypes.Config) func() error {
		return func() error {
			client, errNew := wgctrl.New()
			if errNew != nil {
				return errNew
			}
			return errors.Join(client.ConfigureDevice(mesh.Link, c), client.Close())
		}
	}
	peers := func(c wgtypes.PeerConfig) func() error {
		c.PublicKey = peer
		return configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{c}})
	}
	for _, drift := range []struct {
		what   string
		do     func() error
		closed bool
		repair wgdevice.Changes
	}{
		{"nothing", func() error { return nil }, false, wgdevice.Changes{}},
		{"the peer deleted", peers(wgtypes.PeerConfig{Remove: true}), true, wgdevice.Changes{Peers: 1}},
		{"its allowed IPs removed", peers(wgtypes.PeerConfig{ReplaceAllowedIPs: true}), true, wgdevice.Changes{Peers: 1}},
		{"more allowed to it", peers(wgtypes.PeerConfig{AllowedIPs: []net.IPNet{{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}}}), false, wgdevice.Changes{Peers: 1}},
		{"its keepalive turned off", peers(wgtypes.PeerConfig{PersistentKeepaliveInterval: &never}), false, wgdevice.Changes{Peers: 1}},
		{"a foreign peer", configure(wgtypes.Config{Peers: []wgtypes.PeerConfig{{PublicKey: foreign.PublicKey()}}}), false, wgdevice.Changes{Peers: 1}},
		{"all peers replaced", configure(wgtypes.Config{ReplacePeers: true}), true, wgdevice.Changes{Peers: 1}},
		{"another key and port", configure(wgtypes.Config{PrivateKey: &foreign, ListenPort: &port}), false, wgdevice.Changes{Links: 1}},
		{"the routes deleted", func() error { return errors.Join(deleteRoute(to4, index), deleteRoute(to6, index)) }, true, wgdevice.Changes{Routes: 2}},
		{"the link down", func() error {
			link, errFind := netlinksafe.LinkByName(mesh.Link)
			if errFind != nil {
				return errFind
			}
			return netlink.LinkSetDown(link) // the IPv6 address goes with it, and the routes
		}, true, wgdevice.Changes{Links: 2, Routes: 2}},
	} {
		a.do(t, drift.do)
		if drift.closed {
			a.miss(t, b, marker)
		}
		if changes := a.apply(t, a.plan(t, a, b)); changes != drift.repair {
			t.Errorf("%s: the apply wrote %+v, want %+v", drift.what, changes, drift.repair)
		}
		a.reach(t, b, marker)
		if again := a.apply(t, a.plan(t, a, b)); again.Any() {
			t.Errorf("%s: the second apply wrote %+v", drift.what, again)
		}
		a.device = newDevice(t, testMode()) // a restart of the daemon
		if again := a.apply(t, a.plan(t, a, b)); again.Any() {
			t.Errorf("%s: after a restart the apply wrote %+v", drift.what, again)
		}
	}
	if now := a.linkIndex(t); now != index {
		t.Errorf("the link was made anew: index %d, then %d", index, now)
	}
	if got := wire.count(t); inClear(got) || got.WireGuard == 0 {
		t.Errorf("on the wire: %v, want nothing in clear", got)
	}

	// The positive control: with the net below the routes gone, too, the same probe leaves in clear.
	a.do(t, func() error {
		return errors.Join(deleteRoute(to4, index), deleteRoute(to6, index), deleteRoute(pods4, 0), deleteRoute(pods6, 0))
	})
	a.miss(t, b, marker)
	if got := wire.count(t); !inClear(got) {
		t.Errorf("without any route on the wire: %v, want packets in clear", got)
	}
}

// TestReserve closes the way to pods before anything is known of the cluster, and is no trouble to what comes after.
func TestReserve(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	marker := newMarker()
	wire := l.listen(t, marker)
	to4, _ := b.addresses()
	a.miss(t, b, marker)
	if got := wire.count(t); !inClear(got) {
		t.Errorf("before: %v, want packets in clear", got)
	}
	reserve := func() error { return wgdevice.Reserve([]netip.Prefix{pods4, pods6}) }
	a.do(t, reserve)
	if _, err := a.ask(to4, marker, 1); !errors.Is(err, unix.EHOSTUNREACH) {
		t.Errorf("asking a remote pod: %v, want no route to host at once", err)
	}
	a.miss(t, b, marker)
	if got := wire.count(t); inClear(got) {
		t.Errorf("after: %v, want nothing in clear", got)
	}
	a.do(t, reserve)
	l.joinAll(t, true)
	a.do(t, reserve)
	if again := a.apply(t, a.plan(t, a, b)); again.Any() {
		t.Errorf("beside the mesh: the apply wrote %+v", again)
	}
	a.reach(t, b, marker)
	a.do(t, a.device.Cleanup)
	if got := describe(t, a); got != "\n" {
		t.Errorf("cleanup left:\n%s", got)
	}
}

// deleteRoute deletes a route to the link, or the unreachable one for link 0.
func deleteRoute(destination netip.Prefix, link int) error {
	r := &netlink.Route{
		Dst:       &net.IPNet{IP: destination.Addr().AsSlice(), Mask: net.CIDRMask(destination.Bits(), destination.Addr().BitLen())},
		LinkIndex: link, Protocol: wgdevice.RouteProtocol, Scope: netlink.SCOPE_NOWHERE,
	}
	if link == 0 {
		r.Type = unix.RTN_UNREACHABLE
	}
	return netlink.RouteDel(r)
}

func (n *node) linkIndex(t *testing.T) int {
	t.Helper()
	return in(t, n.host, func() (int, error) {
		link, err := netlinksafe.LinkByName(mesh.Link)
		if err != nil {
			return 0, err
		}
		return link.Attrs().Index, nil
	})
}

package wgdevice_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
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
		{"a preshared key of its own", peers(wgtypes.PeerConfig{PresharedKey: &foreign}), false, wgdevice.Changes{Peers: 1}},
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

// TestRouteDrift takes away, redirects and adds routes and rules by hand: each is told by its name, and what others have for their own is none.
func TestRouteDrift(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	v4, v6 := uplink(b.number)
	want := a.plan(t, a, b)
	claim(&want, 0, v4, v6)
	want.Peers[0].Endpoint = netip.AddrPortFrom(v4, wireGuardPort)
	b.apply(t, b.plan(t, a, b))
	a.apply(t, want)
	a.reach(t, b, newMarker())
	if !a.challenge(t, want) {
		t.Fatal("the other node is not found at its address")
	}
	a.apply(t, want)
	drift := func() []string {
		t.Helper()
		peers := a.status(t).Peers
		return in(t, a.host, func() ([]string, error) { return a.device.RouteDrift(want, peers) })
	}
	run := func(command string) {
		t.Helper()
		a.do(t, func() error {
			if out, err := exec.Command("sh", "-ec", command).CombinedOutput(); err != nil {
				return fmt.Errorf("%s: %w: %s", command, err, out)
			}
			return nil
		})
	}
	to4, to6 := b.podCIDRs()
	from4, _ := a.podCIDRs()
	all4 := want.Unreachable[0]
	names := strings.NewReplacer("TO4", to4.String(), "TO6", to6.String(), "FROM4", from4.String(), "ALL4", all4.String(), "HALF4", netip.PrefixFrom(to4.Addr(), to4.Bits()+1).String(), "NODE4", v4.String())
	if got := drift(); len(got) > 0 {
		t.Fatalf("as applied: %q", got)
	}
	for _, test := range []struct {
		do, undo string
		want     []string
	}{
		{"ip route del TO4", "", []string{"the route to TO4 is missing"}},
		{"ip -6 route del TO6", "", []string{"the route to TO6 is missing"}},
		{"ip route replace TO4 dev eth0", "ip route del TO4", []string{"the route to TO4 is missing", "packets to TO4 do not go to warren0"}},
		{"ip route replace TO4 dev eth0 proto 87", "", []string{"the route to TO4 leads elsewhere", "packets to TO4 do not go to warren0"}},
		{"ip -6 route add TO6 dev eth0 metric 1", "ip -6 route del TO6 dev eth0 metric 1", []string{"packets to TO6 do not go to warren0"}},
		{"ip rule add to TO4 lookup 99; ip route add TO4 dev eth0 table 99", "ip rule del to TO4 lookup 99; ip route flush table 99", []string{"packets to TO4 do not go to warren0"}},
		{"ip rule add from FROM4 lookup 99; ip route add TO4 dev eth0 table 99", "ip rule del from FROM4 lookup 99; ip route flush table 99", []string{"packets to TO4 do not go to warren0"}},
		{"ip route add blackhole HALF4", "ip route del HALF4", []string{"packets to TO4 do not go to warren0"}},
		{"ip route del unreachable ALL4", "", []string{"the unreachable route to ALL4 is missing"}},
		{"ip route add 198.51.100.0/24 dev eth0 proto 87", "", []string{"the route to 198.51.100.0/24 is not planned"}},
		{"ip route del NODE4 table 87", "", []string{"the route to NODE4/32 in table 87 is missing"}},
		{"ip route del unreachable NODE4 table 87", "", []string{"the unreachable route to NODE4/32 in table 87 is missing"}},
		{"ip route add unreachable 198.51.100.9 table 87 proto 87 metric 4278198272", "", []string{"the unreachable route to 198.51.100.9/32 in table 87 is not planned"}},
		{"ip rule del from FROM4 table 87", "", []string{"the rule from FROM4 to table 87 is missing"}},
		{"ip rule add from FROM4 lookup 98 priority 9 proto 87", "", []string{"the rule from FROM4 to table 98 is not planned"}},
		{"ip route add 198.51.100.0/24 dev eth0; ip rule add from 198.51.100.1 lookup 99", "", nil},
	} {
		what := names.Replace(test.do)
		run(what)
		got := drift()
		if len(got) != len(test.want) {
			t.Errorf("%s: %q", what, got)
		}
		for _, text := range test.want {
			if !slices.ContainsFunc(got, func(d string) bool { return strings.HasPrefix(d, names.Replace(text)) }) {
				t.Errorf("%s: no %q in %q", what, names.Replace(text), got)
			}
		}
		if test.undo != "" {
			run(names.Replace(test.undo))
		}
		a.apply(t, want)
		if got = drift(); len(got) > 0 {
			t.Fatalf("repaired after %s: %q", what, got)
		}
	}
}

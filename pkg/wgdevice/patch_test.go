package wgdevice_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// TestPatch makes changes alone. After each of them the kernel is as an Apply would have it.
func TestPatch(t *testing.T) {
	l := newLab(t, 3)
	a, b, c := l.nodes[0], l.nodes[1], l.nodes[2]
	l.joinAll(t, true)
	alone, all := a.plan(t, a, b), a.plan(t, a, b, c)
	a.apply(t, alone)
	marker := newMarker()
	a.reach(t, b, marker)
	before := peerOf(t, a, b)
	wire := l.listen(t, marker)
	patch := func(what string, from, to mesh.Config, want wgdevice.Changes) {
		t.Helper()
		if got := a.patch(t, changeOf(from, to)); got != want {
			t.Errorf("%s wrote %+v, want %+v", what, got, want)
		}
		if again := a.apply(t, to); again.Any() {
			t.Errorf("%s: the apply after it wrote %+v", what, again)
		}
	}
	patch("nothing", alone, alone, wgdevice.Changes{})
	patch("a join", alone, all, wgdevice.Changes{Peers: 1, Routes: 2})
	a.reach(t, c, marker)

	narrow := a.plan(t, a, b, c)
	narrow.Routes[0].MTU, narrow.Routes[2].MTU = 1300, 1290 // one of each family
	patch("smaller packets", all, narrow, wgdevice.Changes{Routes: 2})
	for i, mtu := range []int{1300, 1290} {
		if got := a.pathMTU(t, narrow.Routes[2*i].Destination.Addr().Next()); got != mtu {
			t.Errorf("the way to %s bears %d bytes, want %d", narrow.Routes[2*i].Destination, got, mtu)
		}
	}
	patch("packets of any size", narrow, all, wgdevice.Changes{Routes: 2})

	moved := a.plan(t, a, b, c)
	moved.Peers[1].Endpoint = netip.MustParseAddrPort("[2001:db8::3]:51820")
	patch("another endpoint", all, moved, wgdevice.Changes{Peers: 1})
	a.reach(t, c, marker)

	// What the one loses the other gets, and the other way round.
	swapped := a.plan(t, a, b, c)
	swapped.Peers[0].AllowedIPs, swapped.Peers[1].AllowedIPs = swapped.Peers[1].AllowedIPs, swapped.Peers[0].AllowedIPs
	patch("podCIDRs that swap", all, swapped, wgdevice.Changes{Peers: 2})
	patch("podCIDRs that swap back", swapped, all, wgdevice.Changes{Peers: 2})

	patch("a leave", all, alone, wgdevice.Changes{Peers: 1, Routes: 2})
	a.miss(t, c, marker)
	if after := peerOf(t, a, b); after.LastHandshake != before.LastHandshake || after.ReceivedBytes < before.ReceivedBytes {
		t.Errorf("the session with the peer that nothing touched was lost: %+v, then %+v", before, after)
	}
	if got := wire.count(t); inClear(got) || got.WireGuard == 0 {
		t.Errorf("on the wire: %v, want nothing in clear", got)
	}
}

// TestPatchNeedsAnApply is a change where it is not known what stands: nothing is written.
func TestPatchNeedsAnApply(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	alone, both := a.plan(t, a), a.plan(t, a, b)
	join := changeOf(alone, both)
	wantUnknown := func(what string, change mesh.Change, key wgdevice.Key) {
		t.Helper()
		before := len(a.status(t).Peers)
		changes, err := try(a.host, func() (wgdevice.Changes, error) { return a.device.Patch(t.Context(), change, key) })
		if !errors.Is(err, wgdevice.ErrUnknown) || changes.Any() || len(a.status(t).Peers) != before {
			t.Errorf("%s: %v, %+v, %d peers", what, err, changes, len(a.status(t).Peers))
		}
	}
	a.apply(t, alone)
	a.device = newDevice(t, testMode())
	wantUnknown("before the first apply", join, a.key)
	a.apply(t, alone)
	wantUnknown("another key", join, b.key)
	join.Link = true
	wantUnknown("another link", join, a.key)
	join.Link = false

	// Another program's route is an error, and from then on it is not known what stands.
	a.do(t, func() error { return ipRoute(both.Routes[0].Destination.String(), 0, unix.RTPROT_STATIC) })
	if _, err := try(a.host, func() (any, error) { return a.device.Patch(t.Context(), join, a.key) }); err == nil || errors.Is(err, wgdevice.ErrUnknown) {
		t.Errorf("beside another program's route: %v", err)
	}
	wantUnknown("after an error", changeOf(both, alone), a.key)
	a.do(t, func() error {
		return netlink.RouteDel(&netlink.Route{Dst: &net.IPNet{IP: both.Routes[0].Destination.Addr().AsSlice(), Mask: net.CIDRMask(24, 32)}, Protocol: unix.RTPROT_STATIC})
	})
	a.apply(t, both)
	if changes := a.patch(t, changeOf(both, alone)); changes != (wgdevice.Changes{Peers: 1, Routes: 2}) {
		t.Errorf("after the apply that mended it: %+v", changes)
	}
	if testMode() == wgdevice.ModeUserspace {
		_ = a.signalTunnel(t, syscall.SIGKILL) // it ends by the signal, which Wait calls an error
		if _, err := try(a.host, func() (any, error) { return a.device.Patch(t.Context(), join, a.key) }); !errors.Is(err, wgdevice.ErrNoTunnel) {
			t.Errorf("without the tunnel: %v", err)
		}
	}
}

// TestPatchWithoutEncryption changes routes by the nodes' addresses.
func TestPatchWithoutEncryption(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	alone, both := a.planWith(t, false, a), a.planWith(t, false, a, b)
	a.apply(t, alone)
	for _, change := range []mesh.Change{changeOf(alone, both), changeOf(both, alone)} {
		if changes := a.patch(t, change); changes != (wgdevice.Changes{Routes: 2}) {
			t.Errorf("a node that comes or goes wrote %+v", changes)
		}
	}
	if again := a.apply(t, alone); again.Any() {
		t.Errorf("the apply after it wrote %+v", again)
	}
}

// TestFollow changes a peer's key: what it sends by the new one passes as soon as a handshake has shown that it uses it.
func TestFollow(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	l.joinAll(t, true)
	marker := newMarker()
	a.reach(t, b, marker)
	next, err := keyIn(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	plain, announced := a.plan(t, a, b), a.plan(t, a, b)
	announced.Peers[0].Next = next.Public()
	follow := func() (wgdevice.Awaited, error) { return a.device.Follow(t.Context(), announced) }
	wire := l.listen(t, marker)
	if changes := a.patch(t, changeOf(plain, announced)); changes != (wgdevice.Changes{Peers: 1}) {
		t.Errorf("a next key wrote %+v", changes)
	}
	if again := a.apply(t, announced); again.Any() {
		t.Errorf("the apply after it wrote %+v", again)
	}
	a.reach(t, b, marker)
	if awaited := in(t, a.host, follow); awaited.Keys != 1 {
		t.Errorf("before the new key is used there is to be seen %+v, want 1 key", awaited)
	}

	b.key = next
	if changes := b.apply(t, b.plan(t, a, b)); changes != (wgdevice.Changes{Links: 1}) {
		t.Errorf("the change of the own key wrote %+v", changes)
	}
	asked := make(chan error, 1)
	to4, _ := a.addresses()
	sibling := &node{host: b.sibling(t)}
	go func() {
		_, errAsk := sibling.ask(to4, marker, 20)
		asked <- errAsk
	}()
	patience, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for in(t, a.host, follow).Keys > 0 {
		if patience.Err() != nil {
			t.Fatal("the new key was never seen in use")
		}
	}
	if err = <-asked; err != nil {
		t.Errorf("by the new key: %v", err)
	}
	a.reach(t, b, marker)
	b.reach(t, a, marker)
	if again := a.apply(t, announced); again.Any() {
		t.Errorf("after the first handshake the apply wrote %+v", again)
	}
	peers := a.status(t).Peers
	if len(peers) != 1 || peers[0].PublicKey != next.Public() || len(peers[0].AllowedIPs) != 2 {
		t.Errorf("after the first handshake: %+v", peers)
	}
	if changes := a.patch(t, changeOf(announced, a.plan(t, a, b))); changes != (wgdevice.Changes{Peers: 1}) {
		t.Errorf("the end of the change wrote %+v", changes)
	}
	if again := a.apply(t, a.plan(t, a, b)); again.Any() {
		t.Errorf("after the end the apply wrote %+v", again)
	}
	a.reach(t, b, marker)
	if got := wire.count(t); inClear(got) || got.WireGuard == 0 {
		t.Errorf("on the wire: %v, want nothing in clear", got)
	}
	if awaited := in(t, a.host, func() (wgdevice.Awaited, error) { return a.device.Follow(t.Context(), a.plan(t, a, b)) }); awaited != (wgdevice.Awaited{}) {
		t.Errorf("at the end there is to be seen %+v", awaited)
	}
}

// changeOf returns what differs between two meshes whose links are the same.
func changeOf(from, to mesh.Config) mesh.Change {
	var c mesh.Change
	for _, p := range to.Peers {
		if !slices.ContainsFunc(from.Peers, func(q mesh.Peer) bool { return samePeer(p, q) }) {
			c.Peers = append(c.Peers, p)
		}
	}
	for _, p := range from.Peers {
		if !slices.ContainsFunc(to.Peers, func(q mesh.Peer) bool { return p.Node == q.Node }) {
			c.RemovedPeers = append(c.RemovedPeers, p)
		}
	}
	for _, r := range to.Routes {
		if !slices.Contains(from.Routes, r) {
			c.Routes = append(c.Routes, r)
		}
	}
	for _, r := range from.Routes {
		if !slices.ContainsFunc(to.Routes, func(q mesh.Route) bool { return r.Destination == q.Destination }) {
			c.RemovedRoutes = append(c.RemovedRoutes, r)
		}
	}
	return c
}

func samePeer(p, q mesh.Peer) bool {
	return p.Node == q.Node && p.PublicKey == q.PublicKey && p.Next == q.Next && p.Endpoint == q.Endpoint &&
		slices.Equal(p.AllowedIPs, q.AllowedIPs) && slices.Equal(p.NodeAddresses, q.NodeAddresses)
}

// pathMTU returns the greatest packet that the kernel sends to an address.
func (n *node) pathMTU(t *testing.T, to netip.Addr) int {
	t.Helper()
	return in(t, n.host, func() (int, error) {
		routes, err := netlink.RouteGet(to.AsSlice())
		if err != nil {
			return 0, err
		}
		link, err := netlinksafe.LinkByName(mesh.Link)
		if err != nil || routes[0].LinkIndex != link.Attrs().Index {
			return 0, errors.Join(err, errors.New("it does not lead into the tunnel"))
		}
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return 0, err
		}
		defer func() { _ = unix.Close(fd) }()
		level, option := unix.IPPROTO_IP, unix.IP_MTU
		if to.Is6() {
			level, option = unix.IPPROTO_IPV6, unix.IPV6_MTU
		}
		err = unix.Connect(fd, &unix.SockaddrInet6{Port: 7, Addr: to.As16()})
		mtu, errGet := unix.GetsockoptInt(fd, level, option)
		return mtu, errors.Join(err, errGet)
	})
}

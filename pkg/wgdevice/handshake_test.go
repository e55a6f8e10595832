package wgdevice_test

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"

	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/mesh"
)

// distance is how long a packet takes between two nodes that are far from each other.
const distance = 30 * time.Millisecond

// tooLate is when they must have shaken hands on a busy machine, too. WireGuard begins again after 5 s.
const tooLate = 3 * time.Second

// TestCrossingHandshakes lets two nodes come to know each other at one moment, which is well before either hears of the other: they shake
// hands again and again before WireGuard would begin once more. The control, which nobody follows, has to wait for that.
func TestCrossingHandshakes(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	meshes := l.apart(t, a, b)
	var control, longest time.Duration
	for tries := 0; control < tooLate && tries < 5; tries++ { // a busy machine may let one begin too late
		control = max(control, meetAtOnce(t, meshes, false))
	}
	meetings := soak.Trials(100)
	for range meetings {
		longest = max(longest, meetAtOnce(t, meshes, true))
	}
	t.Logf("%d times at once: shaken hands after %v at most, and after %v where nobody follows", meetings, longest, control)
	if control < tooLate || longest > tooLate {
		t.Errorf("shaken hands after %v at most, want at most %v; where nobody follows after %v, want more", longest, tooLate, control)
	}
	a.reach(t, b, newMarker())
	for n, m := range meshes {
		if again := n.apply(t, m); again.Any() {
			t.Errorf("%s: after that an apply wrote %+v", n.name(), again)
		}
	}
}

// meetAtOnce takes the nodes' peers away, gives them back on both at once, and returns how long it took until both have shaken hands.
func meetAtOnce(t *testing.T, meshes map[*node]mesh.Config, follow bool) time.Duration {
	t.Helper()
	var group sync.WaitGroup
	for n := range meshes {
		n.apply(t, n.plan(t, n))
	}
	begin := make(chan time.Time)
	var both [2]time.Duration
	i := 0
	for n, m := range meshes {
		at := &both[i]
		i++
		group.Go(func() {
			began := <-begin
			if _, err := try(n.host, func() (any, error) { return nil, n.shake(t.Context(), m, follow) }); err != nil {
				t.Error(err)
			}
			*at = time.Since(began)
		})
	}
	now := time.Now() //nolint:forbidigo // how long a handshake takes
	for range meshes {
		begin <- now
	}
	group.Wait()
	return max(both[0], both[1])
}

// shake applies a mesh of one peer, and looks at the device until that has shaken hands.
func (n *node) shake(ctx context.Context, m mesh.Config, follow bool) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if _, err := n.device.Apply(ctx, m, n.key); err != nil {
		return err
	}
	looks := time.NewTicker(distance / 2)
	defer looks.Stop()
	for {
		if follow {
			if _, err := n.device.Follow(ctx, m); err != nil {
				return err
			}
		}
		status, err := n.device.Status(ctx)
		if err != nil || len(status.Peers) == 1 && !status.Peers[0].LastHandshake.IsZero() {
			return err
		}
		select {
		case <-looks.C:
		case <-ctx.Done():
			return errors.New("no handshake")
		}
	}
}

// apart returns the meshes of two nodes that are far from each other: each has the other at the address of a relay.
func (l *lab) apart(t *testing.T, a, b *node) map[*node]mesh.Config {
	t.Helper()
	relay := netip.AddrFrom4([4]byte{192, 0, 2, 254})
	meshes := map[*node]mesh.Config{a: a.plan(t, a, b), b: b.plan(t, a, b)}
	sockets := map[*node]*net.UDPConn{}
	l.wire.do(t, func() error {
		link, err := netlinksafe.LinkByName("wire")
		if err != nil {
			return err
		}
		return netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: relay.AsSlice(), Mask: net.CIDRMask(24, 32)}})
	})
	for n := range meshes {
		sockets[n] = in(t, l.wire, func() (*net.UDPConn, error) {
			return net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(relay, 0)))
		})
		t.Cleanup(func() { _ = sockets[n].Close() })
	}
	for from, to := range map[*node]*node{a: b, b: a} {
		meshes[from].Peers[0].Endpoint = sockets[from].LocalAddr().(*net.UDPAddr).AddrPort()
		v4, _ := uplink(to.number)
		go carry(sockets[from], sockets[to], netip.AddrPortFrom(v4, wireGuardPort))
	}
	return meshes
}

// carry takes what one socket receives to an address by the other one, as long as the distance asks.
func carry(from, by *net.UDPConn, to netip.AddrPort) {
	buffer := make([]byte, 2048)
	for {
		size, err := from.Read(buffer)
		if err != nil {
			return
		}
		packet := append([]byte{}, buffer[:size]...)
		time.AfterFunc(distance, func() { _, _ = by.WriteToUDPAddrPort(packet, to) })
	}
}

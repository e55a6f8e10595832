package wgdevice

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/podcidr"
)

func testPeer(number byte, allowed ...string) mesh.Peer {
	p := mesh.Peer{Node: string('a' + rune(number)), PublicKey: [32]byte{number}, Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, number}), 51820)}
	for _, a := range allowed {
		p.AllowedIPs = append(p.AllowedIPs, netip.MustParsePrefix(a))
	}
	return p
}

// steps returns what turns a device's peers into those that are wanted.
func steps(m *memory, device *wgtypes.Device, now time.Time, want ...mesh.Peer) []step {
	m.see(device, now)
	return m.delta(want, slices.SortedFunc(maps.Keys(m.peers), func(a, b wgtypes.Key) int { return slices.Compare(a[:], b[:]) }), now)
}

// change is steps, as WireGuard is told.
func change(m *memory, device *wgtypes.Device, now time.Time, want ...mesh.Peer) []wgtypes.PeerConfig {
	var configs []wgtypes.PeerConfig
	for _, s := range steps(m, device, now, want...) {
		configs = append(configs, s.config)
	}
	return configs
}

// settle does the change, and remembers it as an Apply does.
func settle(t *testing.T, m *memory, device *wgtypes.Device, now time.Time, want ...mesh.Peer) {
	t.Helper()
	done := steps(m, device, now, want...)
	for _, s := range done {
		pretend(t, device, s.config)
	}
	m.did(done)
	m.planned = map[string]mesh.Peer{}
	for _, p := range want {
		m.plan(p)
	}
	settled(t, m, device, now, want...)
}

// settled fails the test unless the device is as wanted, and as it is remembered.
func settled(t *testing.T, m *memory, device *wgtypes.Device, now time.Time, want ...mesh.Peer) {
	t.Helper()
	remembered := maps.Clone(m.peers)
	if again := change(m, device, now, want...); len(again) > 0 {
		t.Fatalf("not done after one step: %+v", again)
	}
	if diff := cmp.Diff(remembered, m.peers, cmp.AllowUnexported(peerState{}), cmpopts.EquateComparable(netip.AddrPort{}, netip.Prefix{}), cmpopts.EquateEmpty()); diff != "" {
		t.Fatalf("what is remembered is not what is there (-remembered +there):\n%s", diff)
	}
}

func plannedOf(peers []mesh.Peer) map[string]mesh.Peer {
	planned := map[string]mesh.Peer{}
	for _, p := range peers {
		planned[p.Node] = p
	}
	return planned
}

// start is when the tests begin.
func start() time.Time { return time.Unix(1_000_000, 0) }

func TestDelta(t *testing.T) {
	one, two := testPeer(1, "10.1.0.0/24"), testPeer(2, "10.2.0.0/24", "fd02::/64")
	m, device := &memory{}, &wgtypes.Device{}
	interval := keepalive
	fresh := change(m, device, start(), one, two)
	wantFresh := []wgtypes.PeerConfig{
		{
			PublicKey: wgtypes.Key{1}, Endpoint: net.UDPAddrFromAddrPort(one.Endpoint), PersistentKeepaliveInterval: &interval,
			ReplaceAllowedIPs: true, AllowedIPs: ipNets("10.1.0.0/24"),
		},
		{
			PublicKey: wgtypes.Key{2}, Endpoint: net.UDPAddrFromAddrPort(two.Endpoint), PersistentKeepaliveInterval: &interval,
			ReplaceAllowedIPs: true, AllowedIPs: ipNets("10.2.0.0/24", "fd02::/64"),
		},
	}
	if diff := cmp.Diff(wantFresh, fresh); diff != "" {
		t.Errorf("fresh device (-want +got):\n%s", diff)
	}
	settle(t, m, device, start(), one, two)

	// The kernel may give an IPv4 endpoint in the 16-byte form, and allowed IPs in any order.
	device.Peers[0].Endpoint.IP = device.Peers[0].Endpoint.IP.To16()
	slices.Reverse(device.Peers[1].AllowedIPs)
	if again := change(m, device, start(), one, two); len(again) > 0 {
		t.Errorf("the same in another form: %+v", again)
	}

	// A keepalive that somebody took away comes back, and nothing else is touched.
	device.Peers[0].PersistentKeepaliveInterval = 0
	wantPeers := []wgtypes.PeerConfig{{PublicKey: wgtypes.Key{1}, UpdateOnly: true, PersistentKeepaliveInterval: &interval}}
	if diff := cmp.Diff(wantPeers, change(m, device, start(), one, two)); diff != "" {
		t.Errorf("without a keepalive (-want +got):\n%s", diff)
	}
	device.Peers[0].PersistentKeepaliveInterval = keepalive

	// A preshared key that somebody gave goes.
	device.Peers[0].PresharedKey = wgtypes.Key{7}
	wantPeers = []wgtypes.PeerConfig{{PublicKey: wgtypes.Key{1}, UpdateOnly: true, PresharedKey: &wgtypes.Key{}}}
	if diff := cmp.Diff(wantPeers, change(m, device, start(), one, two)); diff != "" {
		t.Errorf("with a preshared key (-want +got):\n%s", diff)
	}
	settle(t, m, device, start(), one, two)

	// A changed endpoint leaves the allowed IPs alone, and the other way round.
	one.Endpoint, two.AllowedIPs = netip.MustParseAddrPort("[2001:db8::1]:1"), two.AllowedIPs[:1]
	wantPeers = []wgtypes.PeerConfig{
		{PublicKey: wgtypes.Key{2}, UpdateOnly: true, ReplaceAllowedIPs: true, AllowedIPs: ipNets("10.2.0.0/24")},
		{PublicKey: wgtypes.Key{1}, UpdateOnly: true, Endpoint: &net.UDPAddr{IP: net.ParseIP("2001:db8::1"), Port: 1}},
	}
	if diff := cmp.Diff(wantPeers, change(m, device, start(), one, two)); diff != "" {
		t.Errorf("endpoint and allowed IPs (-want +got):\n%s", diff)
	}
}

// TestDeltaEndpoint is a peer that WireGuard found elsewhere than the plan has it.
func TestDeltaEndpoint(t *testing.T) {
	planned, learnt := testPeer(1, "10.1.0.0/24"), &net.UDPAddr{IP: net.IPv4(198, 51, 100, 1).To4(), Port: 4711}
	moved := planned
	moved.Endpoint = netip.MustParseAddrPort("192.0.2.77:51820")
	nat := planned
	nat.Endpoint = netip.AddrPort{}
	for name, test := range map[string]struct {
		first, then mesh.Peer
		after       time.Duration
		received    int64
		want        netip.AddrPort // invalid: as learnt
	}{
		"stays while the peer is heard":              {planned, planned, time.Hour, 1, netip.AddrPort{}},
		"stays for a while":                          {planned, planned, silence - 1, 0, netip.AddrPort{}},
		"is given up when the peer is silent":        {planned, planned, silence, 0, planned.Endpoint},
		"is given up when the plan changes":          {planned, moved, 0, 1, moved.Endpoint},
		"stays behind NAT":                           {nat, nat, time.Hour, 0, netip.AddrPort{}},
		"stays when the peer turns out behind NAT":   {planned, nat, time.Hour, 0, netip.AddrPort{}},
		"is given up when the peer leaves its NAT":   {nat, planned, 0, 1, planned.Endpoint},
		"stays for a NAT that was seen a moment ago": {nat, nat, 0, 1, netip.AddrPort{}},
	} {
		t.Run(name, func(t *testing.T) {
			m, device := &memory{}, &wgtypes.Device{}
			settle(t, m, device, start(), test.first)
			device.Peers[0].Endpoint = learnt
			m.see(device, start())
			device.Peers[0].ReceiveBytes = test.received
			got := change(m, device, start().Add(test.after), test.then)
			switch {
			case !test.want.IsValid() && len(got) > 0:
				t.Errorf("changed: %+v", got)
			case test.want.IsValid() && (len(got) != 1 || got[0].Endpoint.AddrPort() != test.want):
				t.Errorf("changed: %+v, want the endpoint %s", got, test.want)
			}
		})
	}

	// A Device that knows no plan puts the endpoint right at once: nobody may have looked for long.
	device := &wgtypes.Device{}
	settle(t, &memory{}, device, start(), planned)
	device.Peers[0].Endpoint = learnt
	if got := change(&memory{}, device, start(), planned); len(got) != 1 || got[0].Endpoint.AddrPort() != planned.Endpoint {
		t.Errorf("after a restart: %+v", got)
	}
}

// TestDeltaNextKey changes the key of a node.
func TestDeltaNextKey(t *testing.T) {
	old, both := testPeer(1, "10.1.0.0/24", "fd01::/64"), testPeer(1, "10.1.0.0/24", "fd01::/64")
	both.Next = [32]byte{9}
	last := old
	last.PublicKey = both.Next
	m, device := &memory{}, &wgtypes.Device{}
	settle(t, m, device, start(), old)

	often, seldom := keepaliveNext, keepalive
	second := []wgtypes.PeerConfig{{
		PublicKey: both.Next, Endpoint: net.UDPAddrFromAddrPort(old.Endpoint), PersistentKeepaliveInterval: &often,
	}}
	if diff := cmp.Diff(second, change(m, device, start(), both)); diff != "" {
		t.Errorf("a next key (-want +got):\n%s", diff)
	}
	settle(t, m, device, start(), both)

	// The old key shakes hands as it always did.
	device.Peers[0].LastHandshakeTime = start()
	if got := change(m, device, start(), both); len(got) > 0 {
		t.Errorf("before the next key is used: %+v", got)
	}
	device.Peers[1].LastHandshakeTime = start()
	takesOver := []wgtypes.PeerConfig{
		{PublicKey: both.Next, UpdateOnly: true, ReplaceAllowedIPs: true, AllowedIPs: ipNets("10.1.0.0/24", "fd01::/64")},
		{PublicKey: old.PublicKey, Remove: true, UpdateOnly: true},
	}
	if diff := cmp.Diff(takesOver, change(m, device, start(), both)); diff != "" {
		t.Errorf("the first handshake of the next key (-want +got):\n%s", diff)
	}
	settle(t, m, device, start(), both)
	if diff := cmp.Diff([]wgtypes.PeerConfig{{PublicKey: both.Next, UpdateOnly: true, PersistentKeepaliveInterval: &seldom}}, change(m, device, start(), last)); diff != "" {
		t.Errorf("the next key is the key (-want +got):\n%s", diff)
	}

	// A node that missed the handshake comes to the same.
	m, device = &memory{}, &wgtypes.Device{}
	settle(t, m, device, start(), both)
	late := change(m, device, start(), last)
	if len(late) != 2 || late[0].PublicKey != wgtypes.Key(both.Next) || len(late[0].AllowedIPs) != 2 || !late[1].Remove {
		t.Errorf("the handshake was missed: %+v", late)
	}
	settle(t, m, device, start(), last)
}

// TestWake is a node that changes its key while others do, too.
func TestWake(t *testing.T) {
	steady, changing, changed, coming := testPeer(1, "10.1.0.0/24"), testPeer(2, "10.2.0.0/24"), testPeer(3, "10.3.0.0/24"), testPeer(4, "10.4.0.0/24")
	changing.Next, changed.Next = [32]byte{8}, [32]byte{9}
	m, device := &memory{}, &wgtypes.Device{}
	settle(t, m, device, start(), steady, changing, changed)
	for i := range device.Peers {
		if device.Peers[i].PublicKey == changed.Next {
			device.Peers[i].LastHandshakeTime = start()
		}
	}
	m.see(device, start())
	coming.Next = [32]byte{10}
	none, next := time.Duration(0), keepaliveNext
	want := []wgtypes.PeerConfig{
		{PublicKey: changing.Next, UpdateOnly: true, PersistentKeepaliveInterval: &none},
		{PublicKey: changing.Next, UpdateOnly: true, PersistentKeepaliveInterval: &next},
	}
	var got []wgtypes.PeerConfig
	before := m.peers[changing.Next]
	off, on := m.wake([]mesh.Peer{steady, changing, changed, coming})
	steps := slices.Concat(off, on)
	for _, s := range steps {
		got = append(got, s.config)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("only the next key that is not used yet shakes hands at once (-want +got):\n%s", diff)
	}
	if m.did(steps); !reflect.DeepEqual(m.peers[changing.Next], before) {
		t.Errorf("then the peer is %+v, and was %+v", m.peers[changing.Next], before)
	}
}

// TestCrossed is a peer that is heard and does not shake hands: with the greater key it is made anew soon, with the smaller one later.
func TestCrossed(t *testing.T) {
	own := newKey(wgtypes.Key{1})
	for number, patience := range map[byte]time.Duration{255: crossPatience, 1: crossOther * crossPatience} {
		peer := testPeer(number, "10.1.0.0/24", "fd01::/64")
		m, device := &memory{key: own}, &wgtypes.Device{}
		look := func(after time.Duration) []step {
			m.see(device, start().Add(after))
			return m.crossed(start().Add(after))
		}
		settle(t, m, device, start(), peer)
		if got := look(time.Hour); len(got) > 0 {
			t.Errorf("a peer that is not heard: %+v", got)
		}

		// What arrived came from elsewhere than the plan has it.
		arrives := func() {
			device.Peers[0].ReceiveBytes = 148
			device.Peers[0].Endpoint = &net.UDPAddr{IP: net.IPv4(198, 51, 100, 1).To4(), Port: 4711}
		}
		since := time.Duration(0)
		for range 3 {
			arrives()
			if got := append(look(since), look(since+patience-1)...); len(got) > 0 {
				t.Errorf("before %v: %+v", patience, got)
			}
			since += patience
			again := look(since)
			interval := keepalive
			want := []wgtypes.PeerConfig{
				{PublicKey: peer.PublicKey, Remove: true, UpdateOnly: true},
				{
					PublicKey: peer.PublicKey, Endpoint: device.Peers[0].Endpoint, PersistentKeepaliveInterval: &interval,
					ReplaceAllowedIPs: true, AllowedIPs: ipNets("10.1.0.0/24", "fd01::/64"),
				},
			}
			var got []wgtypes.PeerConfig
			for _, s := range again {
				got = append(got, s.config)
				pretend(t, device, s.config)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("after %v (-want +got):\n%s", patience, diff)
			}
			m.did(again)
			settled(t, m, device, start().Add(since), peer)
			patience *= 2
		}

		arrives()
		device.Peers[0].Endpoint = nil
		if got := append(look(since), look(time.Hour)...); len(got) > 0 {
			t.Errorf("a peer that is nowhere: %+v", got)
		}
		arrives()
		device.Peers[0].LastHandshakeTime = start()
		if got := look(time.Hour); len(got) > 0 {
			t.Errorf("a peer that shook hands: %+v", got)
		}
	}
}

// TestDoubtful is a peer in user space of which one begin and one answer have arrived by the first handshake: it is made anew where nothing
// else comes.
func TestDoubtful(t *testing.T) {
	const look = 100 * time.Millisecond
	const both = 148 + 92
	for name, c := range map[string]struct {
		kernel, next bool
		// received is what has arrived with the first handshake, again with that after the peer was made anew, and more at each look after either.
		received, again, more int64
		want                  []time.Duration
	}{
		"both":               {received: both, again: 92, want: []time.Duration{look + crossPatience}},
		"both, and again":    {received: both, again: both, want: []time.Duration{look + crossPatience, 2 * (look + crossPatience)}},
		"both, and is heard": {received: both, more: 32},
		"an answer":          {received: 92},
		"a begin and data":   {received: 148 + 32},
		"its next key":       {received: both, next: true},
		"the kernel's":       {received: both, kernel: true},
	} {
		t.Run(name, func(t *testing.T) {
			peer := testPeer(1, "10.1.0.0/24")
			key := wgtypes.Key(peer.PublicKey)
			if c.next {
				peer.Next = [32]byte{9}
				key = peer.Next
			}
			m, device := &memory{key: newKey(wgtypes.Key{1})}, &wgtypes.Device{Type: wgtypes.Userspace}
			if c.kernel {
				device.Type = wgtypes.LinuxKernel
			}
			settle(t, m, device, start(), peer)
			arrives := c.received
			var anew []time.Duration
			for i := range 11 {
				at := time.Duration(i+1) * look
				p := &device.Peers[slices.IndexFunc(device.Peers, func(p wgtypes.Peer) bool { return p.PublicKey == key })]
				if p.LastHandshakeTime.IsZero() {
					p.LastHandshakeTime, p.ReceiveBytes = start().Add(at), arrives
				} else {
					p.ReceiveBytes += c.more
				}
				m.see(device, start().Add(at))
				steps := m.crossed(start().Add(at))
				for _, s := range steps {
					pretend(t, device, s.config)
				}
				if m.did(steps); len(steps) > 0 {
					anew = append(anew, at)
					arrives = c.again
					settled(t, m, device, start().Add(at), peer)
				}
			}
			if !slices.Equal(anew, c.want) {
				t.Errorf("made anew after %v, want %v", anew, c.want)
			}
			if got := m.peers[key].anew; got > 0 {
				t.Errorf("handshakes that were not waited for in vain count: %d", got)
			}
		})
	}
}

// TestManyCross is a node with which more peers cross than one call makes anew: each is named by one call in whole.
func TestManyCross(t *testing.T) {
	var peers []mesh.Peer
	for i := range byte(crossAtOnce + 5) {
		peers = append(peers, testPeer(100+i, fmt.Sprintf("10.%d.0.0/24", i)))
	}
	m, device := &memory{key: newKey(wgtypes.Key{1})}, &wgtypes.Device{}
	settle(t, m, device, start(), peers...)
	for i := range device.Peers {
		device.Peers[i].ReceiveBytes = 148
	}
	m.see(device, start())
	now := start().Add(crossOther * crossPatience)
	for _, want := range []int{crossAtOnce, 5, 0} {
		again := m.crossed(now)
		if len(again) != 2*want {
			t.Fatalf("%d steps for %d peers", len(again), want)
		}
		for i := 0; i < len(again); i += 2 {
			gone, anew := again[i].config, again[i+1].config
			if gone.PublicKey != anew.PublicKey || !gone.Remove || anew.Remove || anew.Endpoint == nil {
				t.Errorf("%+v and then %+v", gone, anew)
			}
		}
		m.did(again)
	}
}

// TestAwaited is what a device looks for.
func TestAwaited(t *testing.T) {
	fresh, changing := testPeer(1, "10.1.0.0/24"), testPeer(2, "10.2.0.0/24")
	changing.Next = [32]byte{9}
	m, device := &memory{}, &wgtypes.Device{}
	settle(t, m, device, start(), fresh, changing)
	expect := func(after time.Duration, want Awaited) {
		t.Helper()
		m.see(device, start().Add(after))
		if got := m.awaited([]mesh.Peer{fresh, changing}, start().Add(after)); got != want {
			t.Errorf("after %v: %+v, want %+v", after, got, want)
		}
	}
	expect(0, Awaited{Keys: 1, Handshakes: 3})
	device.Peers[0].LastHandshakeTime = start()
	expect(youth-1, Awaited{Keys: 1, Handshakes: 2})
	expect(youth, Awaited{Keys: 1})
	device.Peers[2].LastHandshakeTime = start()
	expect(youth, Awaited{})
	device.Type = wgtypes.Userspace
	device.Peers[1].LastHandshakeTime, device.Peers[1].ReceiveBytes = start(), 148+92
	expect(youth-1, Awaited{Handshakes: 1})
	device.Peers[1].ReceiveBytes++
	expect(youth-1, Awaited{})
	if got := (&memory{}).awaited(nil, start()); got != (Awaited{}) {
		t.Errorf("a device that nothing is known of: %+v", got)
	}
}

// TestDeltaNodeAddresses is a peer whose own address pods may reach through the tunnel.
func TestDeltaNodeAddresses(t *testing.T) {
	address := netip.MustParseAddr("192.0.2.1")
	peer := testPeer(1, "10.1.0.0/24")
	peer.NodeAddresses = []netip.Addr{address, netip.MustParseAddr("2001:db8::1")}
	key, next := wgtypes.Key{1}, wgtypes.Key{9}
	elsewhere := &net.UDPAddr{IP: net.IPv4(198, 51, 100, 1).To4(), Port: 51820}
	later := start().Add(time.Minute)
	// begin has a peer that is not known to receive anywhere, and has shaken hands.
	begin := func(t *testing.T) (*memory, *wgtypes.Device) {
		t.Helper()
		m, device := &memory{}, &wgtypes.Device{}
		settle(t, m, device, start(), peer)
		device.Peers[0].LastHandshakeTime = later
		settle(t, m, device, later, peer)
		if got := m.peers[key].hosts(); len(got) > 0 {
			t.Fatalf("after a handshake alone: %v", got)
		}
		return m, device
	}
	uses := func(t *testing.T, m *memory, key wgtypes.Key, want bool, what string) {
		t.Helper()
		if got := m.peers[key].hosts(); (len(got) == 1 && got[0].Addr() == address) != want {
			t.Errorf("%s: in use: %v, want %t", what, got, want)
		}
	}
	t.Run("found there", func(t *testing.T) {
		m, device := begin(t)
		m.found(key, address)
		settle(t, m, device, later, peer)
		uses(t, m, key, true, "found to receive there")
		device.Peers[0].Endpoint.Port, device.Peers[0].ReceiveBytes = 4711, 9
		settle(t, m, device, later, peer)
		uses(t, m, key, true, "from another port of the address")
		settle(t, m, device, later.Add(time.Hour), peer)
		uses(t, m, key, true, "an hour later")
		without := peer
		without.NodeAddresses = nil
		if got := change(m, device, later, without); len(got) != 1 || len(got[0].AllowedIPs) != 1 {
			t.Errorf("without it in the plan: %+v", got)
		}
	})
	t.Run("sent on from elsewhere", func(t *testing.T) {
		m, device := begin(t)
		m.found(key, address)
		settle(t, m, device, later, peer)
		device.Peers[0].Endpoint, device.Peers[0].ReceiveBytes = elsewhere, 9
		settle(t, m, device, later, peer)
		uses(t, m, key, true, "seen elsewhere")
		m = &memory{}
		settle(t, m, device, later, peer)
		uses(t, m, key, true, "seen elsewhere by another daemon")
	})
	t.Run("not the node's for a while", func(t *testing.T) {
		m, device := begin(t)
		m.found(key, address)
		settle(t, m, device, later, peer)
		without := peer
		without.NodeAddresses = peer.NodeAddresses[1:]
		settle(t, m, device, later, without)
		settle(t, m, device, later, peer)
		uses(t, m, key, false, "claimed again, and not asked again")
	})
	t.Run("claimed by two", func(t *testing.T) {
		for _, v6 := range []bool{false, true} {
			one, two, claimed := testPeer(1, "10.1.0.0/24"), testPeer(2, "10.2.0.0/24"), address
			if v6 {
				claimed = peer.NodeAddresses[1]
			}
			there := netip.AddrPortFrom(claimed, 51820)
			one.NodeAddresses, two.NodeAddresses = []netip.Addr{claimed}, []netip.Addr{claimed}
			one.Endpoint, two.Endpoint = there, there
			m, device := &memory{encrypted: true}, &wgtypes.Device{}
			settle(t, m, device, start(), one, two)
			has := func(want byte, what string) {
				t.Helper()
				settle(t, m, device, start(), one, two)
				for _, number := range []byte{1, 2} {
					hosts := m.peers[wgtypes.Key{number}].hosts()
					if used := len(hosts) == 1 && hosts[0].Addr() == claimed; used != (number == want) {
						t.Errorf("%s: peer %d has %v", what, number, hosts)
					}
				}
			}
			clock := start()
			asked := func(p mesh.Peer) *suspect {
				return &suspect{node: p.Node, key: p.PublicKey, at: claimed, asked: podcidr.NodeAddress(p.AllowedIPs[0])}
			}
			var unread error
			answered := func(p mesh.Peer) bool {
				return m.judge(asked(p), clock, func() (*wgtypes.Device, error) { return device, unread })
			}
			has(0, "none found")
			if !answered(two) {
				t.Error("the first that is found is not believed")
			}
			has(2, "one found")
			if answered(one) {
				t.Error("another is believed while the one that was found is there")
			}
			has(2, "both answer")
			device.Peers[1].Endpoint = elsewhere
			has(2, "the one that was found is seen elsewhere")
			if !answered(one) {
				t.Error("the one that answers is not believed while the other is elsewhere")
			}
			has(1, "the other one is there")
			device.Peers[1].Endpoint = net.UDPAddrFromAddrPort(there)
			has(1, "the first one is back")
			clock = clock.Add(silence - 1)
			if answered(two) {
				t.Error("another is believed while the one that was found is heard")
			}
			clock = clock.Add(1)
			if unread = errors.New("the device does not answer"); answered(two) {
				t.Error("another is believed while nobody knows whether the one that was found is heard")
			}
			unread = nil
			device.Peers[0].ReceiveBytes++
			if answered(two) {
				t.Error("another is believed although the one that was found was heard since the last look")
			}
			clock = clock.Add(silence)
			if !answered(two) {
				t.Error("the one that answers is not believed although the other is silent")
			}
			has(2, "the first one is silent")
			clock = start()
			s := asked(one)
			s.holders, s.away = map[netip.Addr]wgtypes.Key{claimed: {9}}, true
			if m.believe(s, clock) {
				t.Error("another is believed because a third one was seen elsewhere")
			}
			s.holders[claimed] = wgtypes.Key{2}
			if !m.believe(s, clock) {
				t.Error("the one that answers is not believed although the other was seen elsewhere")
			}
			has(1, "the other one was seen elsewhere")
		}
	})
	t.Run("another daemon and another tunnel", func(t *testing.T) {
		m, device := begin(t)
		m.found(key, address)
		settle(t, m, device, later, peer)
		m = &memory{}
		settle(t, m, device, later, peer)
		uses(t, m, key, true, "after a restart of the daemon")
		*device = wgtypes.Device{}
		settle(t, m, device, later, peer)
		uses(t, m, key, true, "after a restart of the tunnel")
		settle(t, m, device, later)
		settle(t, m, device, later, peer)
		uses(t, m, key, false, "after the node was gone")
	})
	t.Run("the next key", func(t *testing.T) {
		m, device := begin(t)
		m.found(key, address)
		rotating := peer
		rotating.Next = next
		settle(t, m, device, later, rotating)
		uses(t, m, key, true, "before the next key is used")
		uses(t, m, next, false, "before the next key is used, by that")
		for i := range device.Peers {
			if p := &device.Peers[i]; p.PublicKey == next {
				p.LastHandshakeTime = later
			}
		}
		settle(t, m, device, later, rotating)
		uses(t, m, next, true, "with the next key in use")
		changed := peer
		changed.PublicKey = next
		settle(t, m, device, later, changed)
		uses(t, m, next, true, "with the next key as the only one")
	})
	t.Run("the next key, of which no handshake was seen", func(t *testing.T) {
		m, device := begin(t)
		m.found(key, address)
		rotating, changed := peer, peer
		rotating.Next, changed.PublicKey = next, next
		settle(t, m, device, later, rotating)
		settle(t, m, device, later, changed)
		uses(t, m, next, true, "with the next key as the only one")
		other := changed
		other.PublicKey = wgtypes.Key{10}
		settle(t, m, device, later, other)
		uses(t, m, other.PublicKey, false, "with a key that was not announced")
	})
}

// TestDeltaWalk goes from one random mesh to the next on a device that, as WireGuard does, moves a prefix to its last claimant, by
// what the device is or by what alone changes in the mesh: after each step the device is as wanted, and at no point within a
// step has a prefix an owner that neither the old nor the new mesh gives it.
func TestDeltaWalk(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	m, device := &memory{peers: map[wgtypes.Key]peerState{}}, &wgtypes.Device{}
	var old []mesh.Peer
	for range 1000 {
		want := randomPeers(random)
		var todo []step
		if random.IntN(2) == 0 {
			for i := range device.Peers {
				if random.IntN(2) == 0 {
					device.Peers[i].LastHandshakeTime = start()
				}
			}
			todo = steps(m, device, start(), want...)
		} else {
			changed, had := differing(m.planned, want)
			todo = m.delta(changed, had, start())
		}
		for _, s := range todo {
			pretend(t, device, s.config)
			for i := range device.Peers {
				p := &device.Peers[i]
				for _, prefix := range allowedOf(p) {
					if !owns(old, p, prefix) && !owns(want, p, prefix) {
						t.Fatalf("on the way from %+v to %+v peer %d has %s", old, want, p.PublicKey[0], prefix)
					}
				}
			}
		}
		m.did(todo)
		m.planned = plannedOf(want)
		settled(t, m, device, start(), want...)
		for _, p := range want {
			for _, prefix := range p.AllowedIPs {
				if !slices.ContainsFunc(device.Peers, func(d wgtypes.Peer) bool { return owns(want, &d, prefix) && slices.Contains(allowedOf(&d), prefix) }) {
					t.Fatalf("from %+v to %+v: nobody has %s", old, want, prefix)
				}
			}
		}
		old = want
	}
}

// randomPeers returns up to four peers that share four prefixes. Each has one of two keys, and may be about to change to the other.
func randomPeers(random *rand.Rand) []mesh.Peer {
	var peers []mesh.Peer
	owners := map[byte][]string{}
	for _, p := range []string{"10.1.0.0/24", "10.2.0.0/24", "fd01::/64", "fd02::/64"} {
		owner := byte(random.IntN(4))
		owners[owner] = append(owners[owner], p)
	}
	for number := range byte(4) {
		if random.IntN(4) == 0 {
			continue
		}
		p := testPeer(number+1, owners[number]...)
		p.PublicKey[1] = byte(random.IntN(2))
		if random.IntN(2) == 0 {
			p.Next = p.PublicKey
			p.Next[1] = 1 - p.Next[1]
		}
		peers = append(peers, p)
	}
	return peers
}

// differing returns the peers that are not as they were planned, and the keys of those and of the ones that are gone.
func differing(planned map[string]mesh.Peer, want []mesh.Peer) (changed []mesh.Peer, had []wgtypes.Key) {
	gone := maps.Clone(planned)
	for _, p := range want {
		delete(gone, p.Node)
		if !reflect.DeepEqual(planned[p.Node], p) {
			changed = append(changed, p)
			had = append(had, keysOf(planned[p.Node])...)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(gone)) {
		had = append(had, keysOf(gone[name])...)
	}
	return changed, had
}

func owns(peers []mesh.Peer, p *wgtypes.Peer, prefix netip.Prefix) bool {
	return slices.ContainsFunc(peers, func(m mesh.Peer) bool {
		return (m.PublicKey == p.PublicKey || m.Next == p.PublicKey) && slices.Contains(m.AllowedIPs, prefix)
	})
}

// pretend does to a device what WireGuard does with a configuration of a peer.
func pretend(t *testing.T, device *wgtypes.Device, c wgtypes.PeerConfig) {
	t.Helper()
	i := slices.IndexFunc(device.Peers, func(p wgtypes.Peer) bool { return p.PublicKey == c.PublicKey })
	if exists := i >= 0; exists != c.UpdateOnly {
		t.Errorf("of a peer that exists (%t): %+v", exists, c)
	}
	if c.Remove {
		device.Peers = slices.Delete(device.Peers, i, i+1)
		return
	}
	if i < 0 {
		device.Peers = append(device.Peers, wgtypes.Peer{PublicKey: c.PublicKey})
		i = len(device.Peers) - 1
	}
	if c.Endpoint != nil {
		device.Peers[i].Endpoint = c.Endpoint
	}
	if c.PersistentKeepaliveInterval != nil {
		device.Peers[i].PersistentKeepaliveInterval = *c.PersistentKeepaliveInterval
	}
	if c.PresharedKey != nil {
		device.Peers[i].PresharedKey = *c.PresharedKey
	}
	if c.ReplaceAllowedIPs {
		device.Peers[i].AllowedIPs = nil
	}
	for _, allowed := range c.AllowedIPs {
		for j := range device.Peers {
			device.Peers[j].AllowedIPs = slices.DeleteFunc(device.Peers[j].AllowedIPs, func(n net.IPNet) bool { return n.String() == allowed.String() })
		}
		device.Peers[i].AllowedIPs = append(device.Peers[i].AllowedIPs, allowed)
	}
}

func ipNets(prefixes ...string) []net.IPNet {
	var nets []net.IPNet
	for _, p := range prefixes {
		nets = append(nets, *ipNet(netip.MustParsePrefix(p)))
	}
	return nets
}

func TestRouteDelta(t *testing.T) {
	p := netip.MustParsePrefix
	stays := route{routeID: routeID{p("10.1.0.0/24"), metricIPv4, unix.RT_TABLE_MAIN}, link: 7}
	net4 := route{routeID: routeID{p("10.1.0.0/24"), metricUnreachable, unix.RT_TABLE_MAIN}}
	changes := route{routeID: routeID{p("fd01::/64"), metricIPv6, nodeTable}, link: 7, source: netip.MustParseAddr("fd00::1"), mtu: 1300}
	comes := route{routeID: routeID{p("10.2.0.0/24"), metricIPv4, unix.RT_TABLE_MAIN}, link: 7}
	goes := route{routeID: routeID{p("10.3.0.0/24"), metricIPv4, unix.RT_TABLE_MAIN}, link: 7}
	old := changes
	old.mtu = 0
	add, replace, remove := routeDelta([]route{stays, net4, changes, comes}, []route{goes, old, net4, stays})
	if !slices.Equal(add, []route{comes}) || !slices.Equal(replace, []route{changes}) || !slices.Equal(remove, []route{goes}) {
		t.Errorf("add %v, replace %v, remove %v", add, replace, remove)
	}
	for _, r := range []route{stays, net4, changes, {routeID: routeID{p("10.4.0.0/24"), metricIPv4, unix.RT_TABLE_MAIN}, via: netip.MustParseAddr("192.0.2.1")}} {
		if back := routeOf(r.netlink()); back != r {
			t.Errorf("%+v comes back as %+v", r, back)
		}
	}
}

package wgdevice

import (
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/mesh"
)

func testPeer(number byte, allowed ...string) mesh.Peer {
	p := mesh.Peer{PublicKey: [32]byte{number}, Endpoint: netip.AddrPortFrom(netip.AddrFrom4([4]byte{192, 0, 2, number}), 51820)}
	for _, a := range allowed {
		p.AllowedIPs = append(p.AllowedIPs, netip.MustParsePrefix(a))
	}
	return p
}

func TestDeviceDelta(t *testing.T) {
	key := newKey(wgtypes.Key{1})
	want := mesh.Config{ListenPort: 51820, Peers: []mesh.Peer{testPeer(1, "10.1.0.0/24"), testPeer(2, "10.2.0.0/24", "fd02::/64")}}
	fresh := deviceDelta(want, key, &wgtypes.Device{})
	if fresh.PrivateKey == nil || *fresh.ListenPort != 51820 || len(fresh.Peers) != 2 || fresh.ReplacePeers {
		t.Errorf("fresh device: %+v", fresh)
	}
	device := &wgtypes.Device{}
	pretend(t, device, fresh)
	if again := deviceDelta(want, key, device); again.PrivateKey != nil || again.ListenPort != nil || len(again.Peers) > 0 {
		t.Errorf("second delta: %+v", again)
	}

	// The kernel may give an IPv4 endpoint in the 16-byte form, and allowed IPs in any order.
	device.Peers[0].Endpoint.IP = device.Peers[0].Endpoint.IP.To16()
	slices.Reverse(device.Peers[1].AllowedIPs)
	if again := deviceDelta(want, key, device); len(again.Peers) > 0 {
		t.Errorf("the same in another form: %+v", again)
	}

	// A changed endpoint leaves the allowed IPs alone, and the other way round.
	other := want
	other.Peers = []mesh.Peer{testPeer(1, "10.1.0.0/24"), testPeer(2, "10.2.0.0/24")}
	other.Peers[0].Endpoint = netip.MustParseAddrPort("[2001:db8::1]:1")
	delta := deviceDelta(other, key, device)
	wantPeers := []wgtypes.PeerConfig{
		{PublicKey: wgtypes.Key{2}, ReplaceAllowedIPs: true, AllowedIPs: []net.IPNet{*ipNet(netip.MustParsePrefix("10.2.0.0/24"))}},
		{PublicKey: wgtypes.Key{1}, Endpoint: &net.UDPAddr{IP: net.ParseIP("2001:db8::1"), Port: 1}},
	}
	if diff := cmp.Diff(wantPeers, delta.Peers, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("peers (-want +got):\n%s", diff)
	}
}

// TestDeviceDeltaWalk goes from one random mesh to the next on a device that, as WireGuard does, moves a prefix to its last
// claimant: after each step the device is as wanted, and at no point within a step has a prefix an owner that neither the old nor
// the new mesh gives it.
func TestDeviceDeltaWalk(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	prefixes := []string{"10.1.0.0/24", "10.2.0.0/24", "fd01::/64", "fd02::/64"}
	key := newKey(wgtypes.Key{1})
	device := &wgtypes.Device{}
	old := mesh.Config{}
	for range 3000 {
		want := mesh.Config{ListenPort: 51820}
		owners := map[byte][]string{}
		for _, p := range prefixes {
			owner := byte(random.IntN(4))
			owners[owner] = append(owners[owner], p)
		}
		for number := range byte(4) {
			if random.IntN(4) > 0 {
				want.Peers = append(want.Peers, testPeer(number+1, owners[number]...))
			}
		}
		delta := deviceDelta(want, key, device)
		for i := range delta.Peers {
			pretend(t, device, wgtypes.Config{PrivateKey: delta.PrivateKey, ListenPort: delta.ListenPort, Peers: delta.Peers[i : i+1]})
			for _, p := range device.Peers {
				for _, prefix := range allowedOf(p) {
					if !owns(old, p, prefix) && !owns(want, p, prefix) {
						t.Fatalf("on the way from %+v to %+v peer %d has %s", old, want, p.PublicKey[0], prefix)
					}
				}
			}
		}
		if again := deviceDelta(want, key, device); len(again.Peers) > 0 {
			t.Fatalf("from %+v to %+v: not done after one step: %+v", old, want, again)
		}
		old = want
	}
}

func owns(c mesh.Config, p wgtypes.Peer, prefix netip.Prefix) bool {
	return slices.ContainsFunc(c.Peers, func(m mesh.Peer) bool { return m.PublicKey == p.PublicKey && slices.Contains(m.AllowedIPs, prefix) })
}

// pretend does to a device what WireGuard does with a configuration.
func pretend(t *testing.T, device *wgtypes.Device, c wgtypes.Config) {
	t.Helper()
	if c.PrivateKey != nil {
		device.PrivateKey = *c.PrivateKey
	}
	if c.ListenPort != nil {
		device.ListenPort = *c.ListenPort
	}
	for _, change := range c.Peers {
		i := slices.IndexFunc(device.Peers, func(p wgtypes.Peer) bool { return p.PublicKey == change.PublicKey })
		if change.Remove {
			device.Peers = slices.Delete(device.Peers, i, i+1)
			continue
		}
		if i < 0 {
			device.Peers = append(device.Peers, wgtypes.Peer{PublicKey: change.PublicKey})
			i = len(device.Peers) - 1
		}
		if change.Endpoint != nil {
			device.Peers[i].Endpoint = change.Endpoint
		}
		if change.ReplaceAllowedIPs {
			device.Peers[i].AllowedIPs = nil
		}
		for _, allowed := range change.AllowedIPs {
			for j := range device.Peers {
				device.Peers[j].AllowedIPs = slices.DeleteFunc(device.Peers[j].AllowedIPs, func(n net.IPNet) bool { return n.String() == allowed.String() })
			}
			device.Peers[i].AllowedIPs = append(device.Peers[i].AllowedIPs, allowed)
		}
	}
}

func TestRouteDelta(t *testing.T) {
	p := netip.MustParsePrefix
	stays := route{routeID: routeID{p("10.1.0.0/24"), metricIPv4}, link: 7}
	net4 := route{routeID: routeID{p("10.1.0.0/24"), metricUnreachable}}
	changes := route{routeID: routeID{p("fd01::/64"), metricIPv6}, link: 7, source: netip.MustParseAddr("fd00::1")}
	comes := route{routeID: routeID{p("10.2.0.0/24"), metricIPv4}, link: 7}
	goes := route{routeID: routeID{p("10.3.0.0/24"), metricIPv4}, link: 7}
	old := changes
	old.source = netip.MustParseAddr("fd00::2")
	add, replace, remove := routeDelta([]route{stays, net4, changes, comes}, []route{goes, old, net4, stays})
	if !slices.Equal(add, []route{comes}) || !slices.Equal(replace, []route{changes}) || !slices.Equal(remove, []route{goes}) {
		t.Errorf("add %v, replace %v, remove %v", add, replace, remove)
	}
	for _, r := range []route{stays, net4, changes, {routeID: routeID{p("10.4.0.0/24"), metricIPv4}, via: netip.MustParseAddr("192.0.2.1")}} {
		if back := routeOf(r.netlink()); back != r {
			t.Errorf("%+v comes back as %+v", r, back)
		}
	}
}

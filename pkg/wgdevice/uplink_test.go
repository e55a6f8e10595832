package wgdevice_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// A route's own MTU counts for what it leads to, in both families, also where it is less than that of every link.
func TestReadUplinkOfRoutes(t *testing.T) {
	h := newHost(t)
	h.do(t, func() error {
		return errors.Join(addLink("eth0", 1500, "192.0.2.1/24"), addAddress("eth0", "2001:db8::1/64"),
			addLink("small", 1300, "192.0.3.1/24"), addAddress("small", "2001:db8:3::1/64"))
	})
	v4, v6 := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")
	wantUplink(t, h, v4, 1500, "192.0.2.9", "2001:db8::9", "198.51.100.1", "2001:db8:5::1", "anywhere")
	for destination, mtu := range map[string]int{"198.51.100.0/24": 1400, "2001:db8:5::/64": 1410, "198.51.102.0/24": 9000, "2001:db8:7::/64": 9000} {
		h.do(t, func() error { return addRoute(destination, netlink.Route{MTU: mtu}, "eth0") })
	}
	for destination, mtu := range map[string]int{"198.51.101.0/24": 1350, "2001:db8:6::/64": 1360} {
		h.do(t, func() error { return addRoute(destination, netlink.Route{MTU: mtu, MTULock: true}, "eth0") })
	}
	learnt := []string{
		"192.0.2.9", "198.51.100.1 1400", "198.51.101.1 1350", "198.51.102.1", "2001:db8::9", "2001:db8:5::1 1410", "2001:db8:6::1 1360", "2001:db8:7::1",
	}
	wantUplink(t, h, v4, 1500, append(learnt, "anywhere")...)
	wantUplink(t, h, v6, 1500, append(learnt, "anywhere")...)

	// The lesser of route and link, and of several ways packets take any.
	for _, destination := range []string{"203.0.113.0/24", "2001:db8:8::/64"} {
		h.do(t, func() error { return addRoute(destination, netlink.Route{MTU: 1400}, "small") })
	}
	for _, destination := range []string{"203.0.114.0/24", "2001:db8:9::/64"} {
		h.do(t, func() error { return addRoute(destination, netlink.Route{MTU: 1450}, "eth0", "small") })
	}
	wantUplink(t, h, v4, 1500, "203.0.113.1 1300", "2001:db8:8::1 1300", "203.0.114.1 1300", "2001:db8:9::1 1300", "anywhere")

	// The default routes, of a node that has its address there and of one that has it elsewhere.
	h.do(t, func() error { return addRoute("::/0", netlink.Route{MTU: 1430}, "eth0") })
	wantUplink(t, h, v4, 1500, "192.0.2.9", "100.64.0.1", "2001:db9::1 1430", "anywhere 1430")
	h.do(t, func() error { return addRoute("0.0.0.0/0", netlink.Route{MTU: 1420}, "eth0") })
	wantUplink(t, h, v4, 1500, "192.0.2.9", "100.64.0.1 1420", "2001:db9::1 1430", "anywhere 1420")
	wantUplink(t, h, netip.MustParseAddr("198.51.100.200"), 1420, "192.0.2.9", "2001:db9::1", "198.51.100.1 1400", "anywhere")
	wantUplink(t, h, netip.MustParseAddr("2001:db9::2"), 1430, "192.0.2.9", "2001:db9::1", "198.51.100.1 1400", "anywhere 1420")

	// What a router says its network carries of IPv6 the kernel keeps here.
	h.do(t, func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/eth0/mtu", []byte("1440"), 0) })
	wantUplink(t, h, v4, 1500, "192.0.2.9", "2001:db8::9 1440", "2001:db8:7::1 1440")
	wantUplink(t, h, v6, 1440, "192.0.2.9", "2001:db8::9", "2001:db8:5::1 1410")
}

// What the kernel has learnt of one destination by ICMP is forgotten again after minutes, and must not change the mesh twice.
func TestReadUplinkOfLearntPath(t *testing.T) {
	h, router := newHost(t), newHost(t)
	h.do(t, func() error {
		return errors.Join(addLink("eth0", 1500, "192.0.2.1/24"), addAddress("eth0", "2001:db8::1/64"), moveLink("eth0-peer", router.netns),
			addRoute("198.51.100.0/24", netlink.Route{Gw: net.IPv4(192, 0, 2, 2)}, "eth0"),
			addRoute("2001:db8:5::/64", netlink.Route{Gw: net.ParseIP("2001:db8::2")}, "eth0"))
	})
	router.do(t, func() error {
		link, err := netlinksafe.LinkByName("eth0-peer")
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetUp(link), addAddress("eth0-peer", "192.0.2.2/24"), addAddress("eth0-peer", "2001:db8::2/64"),
			os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0), os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0),
			addLink("beyond", 1300, "198.51.100.1/24"), addAddress("beyond", "2001:db8:5::1/64"))
	})
	node := netip.MustParseAddr("192.0.2.1")
	for _, peer := range []string{"198.51.100.7", "2001:db8:5::7"} {
		h.do(t, func() error { return learn(netip.MustParseAddr(peer)) })
		wantUplink(t, h, node, 1500, peer)
	}
	wantUplink(t, h, node, 1500, "198.51.100.7", "2001:db8:5::7", "anywhere")
}

// learn sends a packet that does not fit the way to an address, and sees that the kernel has learnt what does.
func learn(to netip.Addr) error {
	conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 9)))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	if err = conn.SetReadDeadline(time.Now().Add(time.Minute)); err != nil { //nolint:forbidigo // a socket's deadline
		return err
	}
	if _, err = conn.Write(make([]byte, 1400)); err != nil {
		return err
	}
	if _, err = conn.Read(make([]byte, 1)); !errors.Is(err, syscall.EMSGSIZE) {
		return fmt.Errorf("asked for what fits the way to %s: %w", to, err)
	}
	routes, err := netlink.RouteGet(to.AsSlice())
	if err == nil && routes[0].MTU != 1300 {
		err = fmt.Errorf("the route to %s has MTU %d after that", to, routes[0].MTU)
	}
	return err
}

// wantUplink reads the uplink of a node. Addresses to which less leads have that after them.
func wantUplink(t *testing.T, h *host, node netip.Addr, mtu int, peers ...string) {
	t.Helper()
	var addresses []netip.Addr
	want := mesh.Uplink{MTU: mtu, Less: map[netip.Addr]int{}}
	for _, p := range peers {
		text, less, smaller := strings.Cut(p, " ")
		address := netip.Addr{}
		if text != "anywhere" {
			address = netip.MustParseAddr(text)
		}
		addresses = append(addresses, address)
		if smaller {
			want.Less[address], _ = strconv.Atoi(less)
		}
	}
	got := in(t, h, func() (mesh.Uplink, error) { return wgdevice.ReadUplink(node, addresses) })
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("ReadUplink(%s, %s) (-want +got):\n%s", node, peers, diff)
	}
}

// addAddress gives a link another address.
func addAddress(name, address string) error {
	link, err := netlinksafe.LinkByName(name)
	if err != nil {
		return err
	}
	a, err := netlink.ParseAddr(address)
	if err != nil {
		return err
	}
	if a.IP.To4() == nil {
		a.Flags = unix.IFA_F_NODAD
	}
	return netlink.AddrAdd(link, a)
}

// addRoute adds a route by one link or by several.
func addRoute(destination string, r netlink.Route, links ...string) error {
	_, dst, err := net.ParseCIDR(destination)
	if err != nil {
		return err
	}
	for _, name := range links {
		link, err := netlinksafe.LinkByName(name)
		if err != nil {
			return err
		}
		way := &netlink.NexthopInfo{LinkIndex: link.Attrs().Index}
		if dst.IP.To4() == nil {
			way.Gw = net.ParseIP("fe80::9") // the kernel wants one
		}
		r.MultiPath = append(r.MultiPath, way)
	}
	if len(links) == 1 {
		r.LinkIndex, r.MultiPath = r.MultiPath[0].LinkIndex, nil
	}
	r.Dst = dst
	if err = netlink.RouteAdd(&r); err != nil {
		return fmt.Errorf("adding a route to %s: %w", destination, err)
	}
	return nil
}

// moveLink puts a link into another namespace.
func moveLink(name string, netns int) error {
	link, err := netlinksafe.LinkByName(name)
	if err != nil {
		return err
	}
	return netlink.LinkSetNsFd(link, netns)
}

package nodenet_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/nodenet"
	"github.com/warren-cni/warren/pkg/preflight"
)

// TestApart makes a link that is neither there for others nor left.
func TestApart(t *testing.T) {
	inNamespace(t, func() error {
		want := errors.New("of the function")
		err := nodenet.Apart(func() error {
			links, err := nodenet.Links()
			if err != nil || len(links) != 1 {
				t.Errorf("the links apart are %+v, %v", links, err)
			}
			return errors.Join(want, addUplink("1"))
		})
		if !errors.Is(err, want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("the error is %v, want %v", err, want)
		}
		if links, err := nodenet.Links(); err != nil || len(links) != 1 {
			t.Errorf("afterwards the links are %+v, %v", links, err)
		}
		return nil
	})
}

func TestLinksAndRoutes(t *testing.T) {
	inNamespace(t, func() error {
		if err := addUplink("1"); err != nil {
			return err
		}
		link, err := net.InterfaceByName("uplink")
		if err != nil {
			return err
		}
		to := func(network string) *net.IPNet {
			_, n, _ := net.ParseCIDR(network)
			return n
		}
		err = errors.Join(
			netlink.AddrAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Index: link.Index}}, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(192, 0, 2, 1), Mask: net.CIDRMask(24, 32)}}),
			netlink.RouteAdd(&netlink.Route{Dst: to("0.0.0.0/0"), LinkIndex: link.Index}),
			netlink.RouteAdd(&netlink.Route{Dst: to("198.51.100.0/25"), LinkIndex: link.Index}),
			netlink.RouteAdd(&netlink.Route{Dst: to("203.0.113.0/24"), Type: unix.RTN_UNREACHABLE}),
			netlink.RouteAdd(&netlink.Route{Dst: to("2001:db8:1::/48"), Type: unix.RTN_UNREACHABLE}))
		if err != nil {
			return err
		}
		links, err := nodenet.Links()
		if err != nil {
			return err
		}
		i := slices.IndexFunc(links, func(l preflight.Link) bool { return l.Name == "uplink" })
		want := preflight.Link{Name: "uplink", Type: "veth", Up: true, MTU: 1500, Addresses: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}}
		if i < 0 {
			t.Fatalf("no uplink in %+v", links)
		}
		links[i].Addresses = slices.DeleteFunc(links[i].Addresses, func(p netip.Prefix) bool { return p.Addr().IsLinkLocalUnicast() })
		if diff := cmp.Diff(want, links[i], cmpopts.EquateComparable(netip.Prefix{})); diff != "" {
			t.Errorf("the link differs (-want +got):\n%s", diff)
		}
		routes, err := nodenet.Routes()
		if err != nil {
			return err
		}
		var texts []string
		for _, r := range routes {
			if !strings.HasPrefix(r.Destination.String(), "fe80:") {
				texts = append(texts, fmt.Sprint(r.Destination, " ", r.Link))
			}
		}
		if diff := cmp.Diff([]string{"0.0.0.0/0 uplink", "192.0.2.0/24 uplink", "198.51.100.0/25 uplink", "::/0 uplink"}, texts); diff != "" {
			t.Errorf("the routes differ (-want +got):\n%s", diff)
		}
		return nil
	})
}

func TestForwardingIsRead(t *testing.T) {
	inNamespace(t, func() error {
		for _, c := range []struct {
			v4, v6 string
			want   preflight.Forwarding
		}{{"0", "0", preflight.Forwarding{}}, {"1", "0", preflight.Forwarding{IPv4: true}}, {"0", "1", preflight.Forwarding{IPv6: true}}} {
			if err := errors.Join(os.WriteFile(forward4, []byte(c.v4), 0), os.WriteFile(forward6, []byte(c.v6), 0)); err != nil {
				return err
			}
			if got, err := nodenet.Forwarding("/proc/sys"); err != nil || got != c.want {
				t.Errorf("with %s and %s: %+v, %v", c.v4, c.v6, got, err)
			}
		}
		if _, err := nodenet.Forwarding(t.TempDir()); err == nil || !strings.Contains(err.Error(), "ip_forward") {
			t.Errorf("without settings: %v", err)
		}
		return nil
	})
}

func TestAdvertised(t *testing.T) {
	inNamespace(t, func() error {
		if links, err := nodenet.Advertised("/proc/sys"); err != nil || len(links) > 0 {
			t.Errorf("without a route: %v, %v", links, err)
		}
		if err := addUplink("1"); err != nil {
			return err
		}
		links, err := nodenet.Advertised("/proc/sys")
		if want := []preflight.Advertised{{Link: "uplink", AcceptRA: "1"}}; err != nil || !slices.Equal(links, want) {
			t.Errorf("got %v, %v, want %v", links, err, want)
		}
		return nil
	})
}

// TestSockets finds sockets of both families on the port, with the process that has them, and none on another.
func TestSockets(t *testing.T) {
	inNamespace(t, func() error {
		lo, err := netlink.LinkByName("lo") //nolint:forbidigo // an answer about one link is no dump
		if err == nil {
			err = netlink.LinkSetUp(lo)
		}
		if err != nil {
			return err
		}
		for _, address := range []string{"127.0.0.1:51820", "[::1]:51820", "127.0.0.1:51821"} {
			socket, err := (&net.ListenConfig{}).ListenPacket(t.Context(), "udp", address)
			if err != nil {
				return err
			}
			defer func() { _ = socket.Close() }()
		}
		found, err := nodenet.Sockets(51820, "/proc")
		if err != nil {
			return err
		}
		var addresses []string
		for _, s := range found {
			addresses = append(addresses, s.Address.String())
			if !strings.Contains(s.Holder, fmt.Sprintf("nodenet.test (process %d)", os.Getpid())) {
				t.Errorf("%s is held by %q, want this process", s.Address, s.Holder)
			}
		}
		if want := []string{"127.0.0.1:51820", "[::1]:51820"}; !slices.Equal(addresses, want) {
			t.Errorf("found %q, want %q", addresses, want)
		}
		if found, err = nodenet.Sockets(9, "/proc"); err != nil || len(found) > 0 {
			t.Errorf("on another port: %v, %v", found, err)
		}
		return nil
	})
}

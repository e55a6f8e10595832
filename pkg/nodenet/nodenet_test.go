package nodenet_test

import (
	"errors"
	"net"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/nodenet"
)

const (
	forward4 = "/proc/sys/net/ipv4/ip_forward"
	forward6 = "/proc/sys/net/ipv6/conf/all/forwarding"
	accept   = "/proc/sys/net/ipv6/conf/uplink/accept_ra"
)

// inNamespace runs f in a network namespace that ends with it.
func inNamespace(t *testing.T, f func() error) {
	t.Helper()
	if err := nodenet.Apart(f); err != nil {
		t.Fatal(err)
	}
}

// addUplink makes a link whose default route came by router advertisement.
func addUplink(acceptRA string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "uplink"
	link := &netlink.Veth{LinkAttrs: attrs, PeerName: "other"}
	if err := errors.Join(netlink.LinkAdd(link), netlink.LinkSetUp(link)); err != nil {
		return err
	}
	all := &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	return errors.Join(
		os.WriteFile(accept, []byte(acceptRA), 0),
		netlink.RouteAdd(&netlink.Route{Dst: all, LinkIndex: link.Index, Protocol: unix.RTPROT_RA}))
}

func read(paths ...string) string {
	var values []string
	for _, p := range paths {
		value, err := os.ReadFile(p)
		values = append(values, strings.TrimSpace(string(value)))
		if err != nil {
			values = append(values, err.Error())
		}
	}
	return strings.Join(values, " ")
}

func TestEnableForwarding(t *testing.T) {
	for acceptRA, want := range map[string]string{"1": "1 1 2", "0": "1 1 0", "2": "1 1 2"} {
		inNamespace(t, func() error {
			err := errors.Join(os.WriteFile(forward4, []byte("0"), 0), os.WriteFile(forward6, []byte("0"), 0), addUplink(acceptRA))
			if err != nil {
				return err
			}
			for range 2 {
				if err = nodenet.EnableForwarding("/proc/sys"); err != nil {
					return err
				}
				if got := read(forward4, forward6, accept); got != want {
					t.Errorf("with accept_ra %s: %s, want %s", acceptRA, got, want)
				}
			}
			return nil
		})
	}
}

func TestCheckServices(t *testing.T) {
	inNamespace(t, func() error {
		if err := nodenet.CheckServices(); err != nil {
			t.Errorf("a node without IPVS: %v", err)
		}
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "kube-ipvs0"
		link := &netlink.Bridge{LinkAttrs: attrs}
		if err := netlink.LinkAdd(link); err != nil {
			return err
		}
		if err := nodenet.CheckServices(); !errors.Is(err, nodenet.ErrIPVS) {
			t.Errorf("a node with IPVS: %v", err)
		}
		if err := netlink.LinkDel(link); err != nil {
			return err
		}
		if err := nodenet.CheckServices(); err != nil {
			t.Errorf("after IPVS: %v", err)
		}
		return nil
	})
}

func TestEnableForwardingWithoutSettings(t *testing.T) {
	inNamespace(t, func() error {
		err := nodenet.EnableForwarding(t.TempDir())
		if err == nil || !strings.Contains(err.Error(), "ip_forward") {
			t.Errorf("error: %v, want one that names the setting", err)
		}
		return nil
	})
}

// TestEnableForwardingReadOnly is a container whose /proc/sys cannot be written: that matters only where a value is wrong.
func TestEnableForwardingReadOnly(t *testing.T) {
	inNamespace(t, func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return err
		}
		if err := nodenet.EnableForwarding("/proc/sys"); err != nil {
			return err
		}
		sysctls := t.TempDir()
		err := errors.Join(
			unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
			unix.Mount("/proc/sys", sysctls, "", unix.MS_BIND, ""),
			unix.Mount("", sysctls, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		if err != nil {
			return err
		}
		defer func() { _ = unix.Unmount(sysctls, 0) }()
		if err = nodenet.EnableForwarding(sysctls); err != nil {
			t.Errorf("on a node that is set up: %v", err)
		}
		if err = os.WriteFile(forward4, []byte("0"), 0); err != nil {
			return err
		}
		if err = nodenet.EnableForwarding(sysctls); !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), "ip_forward") {
			t.Errorf("error: %v, want one that names the setting", err)
		}
		return nil
	})
}

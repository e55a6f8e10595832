package gate_test

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/gate"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/testnode"
)

func addresses(texts ...string) []netip.Addr {
	var as []netip.Addr
	for _, a := range texts {
		as = append(as, netip.MustParseAddr(a))
	}
	return as
}

// stand makes the set of a family with these members.
func stand(t *testing.T, f netfilter.Family, members ...string) {
	t.Helper()
	families := map[netfilter.Family]uint8{netfilter.IPv4: unix.AF_INET, netfilter.IPv6: unix.AF_INET6}
	if err := netlink.IpsetCreate(netfilter.ReadySet(f), string(netfilter.HashIP), netlink.IpsetCreateOptions{Family: families[f]}); err != nil {
		t.Fatal(err)
	}
	for _, a := range addresses(members...) {
		if err := netlink.IpsetAdd(netfilter.ReadySet(f), &netlink.IPSetEntry{IP: a.AsSlice()}); err != nil {
			t.Fatal(err)
		}
	}
}

// members returns what is in the set of a family.
func members(t *testing.T, f netfilter.Family) []netip.Addr {
	t.Helper()
	set, err := netlink.IpsetList(netfilter.ReadySet(f))
	if err != nil {
		t.Fatal(err)
	}
	var as []netip.Addr
	for _, e := range set.Entries {
		a, _ := netip.AddrFromSlice(e.IP)
		as = append(as, a)
	}
	return as
}

func TestClose(t *testing.T) {
	testnode.Enter(t)
	stand(t, netfilter.IPv4, "10.0.0.2", "10.0.0.3")
	stand(t, netfilter.IPv6, "fd00::2", "fd00::3")
	for _, state := range []string{"open", "closed"} {
		if err := gate.Close(addresses("10.0.0.2", "fd00::2")); err != nil {
			t.Errorf("with the gate %s: %v", state, err)
		}
		for f, want := range map[netfilter.Family][]netip.Addr{
			netfilter.IPv4: addresses("10.0.0.3"), netfilter.IPv6: addresses("fd00::3"),
		} {
			if diff := cmp.Diff(want, members(t, f), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("with the gate %s: members of %s (-want +got):\n%s", state, f, diff)
			}
		}
	}
}

func TestCloseWithoutGate(t *testing.T) {
	testnode.Enter(t)
	stand(t, netfilter.IPv6, "fd00::2")
	if err := gate.Close(addresses("10.0.0.2", "fd00::2")); !errors.Is(err, gate.ErrMissing) {
		t.Errorf("got %v, want %v", err, gate.ErrMissing)
	}
	if left := members(t, netfilter.IPv6); len(left) > 0 {
		t.Errorf("the address of the other family was left in its set: %v", left)
	}
}

// Behind a pod that goes, a set that is missing is no error, and what the kernel refuses is one all the same.
func TestCloseBehind(t *testing.T) {
	testnode.Enter(t)
	stand(t, netfilter.IPv6, "fd00::2")
	both := addresses("10.0.0.2", "fd00::2")
	if err := gate.CloseBehind(both); err != nil {
		t.Error(err)
	}
	if left := members(t, netfilter.IPv6); len(left) > 0 {
		t.Errorf("the address of the other family was left in its set: %v", left)
	}
	if err := netlink.IpsetDestroy(netfilter.ReadySet(netfilter.IPv6)); err != nil {
		t.Fatal(err)
	}
	if err := netlink.IpsetCreate(netfilter.ReadySet(netfilter.IPv6), string(netfilter.HashIPPort), netlink.IpsetCreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := gate.CloseBehind(both); err == nil || errors.Is(err, unix.ENOENT) {
		t.Errorf("got %v, want an error of the kernel about the other family", err)
	}
}

func TestCloseReportsOtherErrors(t *testing.T) {
	testnode.Enter(t)
	// A set of the right name and the wrong type: nothing of Warren's makes one.
	if err := netlink.IpsetCreate(netfilter.ReadySet(netfilter.IPv4), string(netfilter.HashIPPort), netlink.IpsetCreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := gate.Close(addresses("10.0.0.2")); err == nil || errors.Is(err, gate.ErrMissing) {
		t.Errorf("got %v, want an error of the kernel", err)
	}
}

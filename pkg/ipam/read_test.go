package ipam_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/ipam"
)

func TestListSeesEveryChange(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "ipam") //nolint:usetesting // a tmpfs, as in production
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	reader, writer := open(t, dir), open(t, dir)
	list := func() []ipam.Lease {
		leases, listErr := reader.List()
		if listErr != nil {
			t.Fatal(listErr)
		}
		return leases
	}
	for round := range 5 {
		// The same name again with another address: what was parsed before must not be returned.
		want := allocate(t, writer, prefixes("10.0.0.0/24"), owner(1))
		for range 2 {
			if got := list(); len(got) != 1 || got[0].Addresses[0] != want[0] {
				t.Fatalf("round %d: leases %v, want address %v", round, got, want)
			}
		}
		release(t, writer, owner(1))
		if got := list(); len(got) != 0 {
			t.Fatalf("round %d: leases %v after the release", round, got)
		}
	}
}

func TestListWithoutDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ipam")
	s := open(t, dir)
	owner := ipam.Owner{ContainerID: "c", Interface: "eth0", Namespace: "n", Name: "p", UID: "u"}
	allocate(t, s, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24")}, owner)
	if leases, err := s.List(); err != nil || len(leases) != 1 {
		t.Fatalf("leases %v, error %v", leases, err)
	}
	if err := os.Rename(dir, dir+".away"); err != nil {
		t.Fatal(err)
	}
	if leases, err := s.List(); leases != nil || err == nil {
		t.Errorf("leases %v, error %v, want none and an error without a directory", leases, err)
	}
}

func TestFilesThatAreNoLease(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	allocate(t, s, prefixes("10.0.0.0/24"), owner(1))
	allocate(t, s, prefixes("10.0.0.0/24"), owner(2))
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("c2@eth0", "") // cut off, which also cuts off 10.0.0.3: it is one file
	write("c3@eth0", `{"containerID":"c9","interface":"eth0","addresses":["10.0.0.9"]}`)
	write("c4@eth0", `{"containerID":"c4","interface":"eth0"}`)
	write("notes", "hello")

	leases, err := s.List()
	if diff := cmp.Diff([]ipam.Lease{{Owner: owner(1), Addresses: addresses("10.0.0.2")}}, leases, equal); diff != "" {
		t.Errorf("leases (-want +got):\n%s", diff)
	}
	for _, name := range []string{"c2@eth0", "c3@eth0", "c4@eth0"} {
		if err == nil || !strings.Contains(err.Error(), filepath.Join(dir, name)) {
			t.Errorf("error %q does not name %s", err, name)
		}
	}
	if as := allocate(t, s, prefixes("10.0.0.0/24"), owner(5)); as[0] != netip.MustParseAddr("10.0.0.4") {
		t.Errorf("leased %v, want 10.0.0.4", as)
	}
	// A lease that cannot be read is released with its address.
	if diff := cmp.Diff(addresses("10.0.0.3"), release(t, s, owner(2)), equal); diff != "" {
		t.Errorf("released (-want +got):\n%s", diff)
	}
	if slices.Contains(names(t, dir), "10.0.0.3") {
		t.Error("the address is left")
	}
}

// TestListGoesByTheNames: what a lease's text says of its addresses counts no more than what CHECK and DEL make of it, also where it is
// written anew, or names come and go, after it was read.
func TestListGoesByTheNames(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	ranges := prefixes("10.0.0.0/24", "fd00::/64")
	for i := range 3 {
		allocate(t, s, ranges, owner(i))
	}
	lists := func(want ...[]netip.Addr) {
		t.Helper()
		leases, err := s.List()
		if err != nil {
			t.Error(err)
		}
		var got [][]netip.Addr
		for _, l := range leases {
			got = append(got, l.Addresses)
			held, err := s.Held(l.ContainerID, l.Interface)
			if diff := cmp.Diff(held, l.Addresses, equal); diff != "" || err != nil {
				t.Errorf("%s (-Held +List):\n%s%v", l.ContainerID, diff, err)
			}
		}
		if diff := cmp.Diff(want, got, equal); diff != "" {
			t.Errorf("addresses (-want +got):\n%s", diff)
		}
	}
	first, second, third := addresses("10.0.0.2", "fd00::2"), addresses("10.0.0.3", "fd00::3"), addresses("10.0.0.4", "fd00::4")
	lists(first, second, third)
	text, err := os.ReadFile(filepath.Join(dir, "c0@eth0"))
	if err != nil {
		t.Fatal(err)
	}
	// In place, so that all names have it: another's address instead of one of its own.
	write(t, dir, "c0@eth0", strings.Replace(string(text), "10.0.0.2", "10.0.0.3", 1))
	lists(first, second, third)
	if err = os.Remove(filepath.Join(dir, "10.0.0.2")); err != nil {
		t.Fatal(err)
	}
	lists(addresses("fd00::2"), second, third)
	if err = os.Link(filepath.Join(dir, "c0@eth0"), filepath.Join(dir, "10.0.0.9")); err != nil {
		t.Fatal(err)
	}
	lists(addresses("10.0.0.9", "fd00::2"), second, third)
	// Nothing of its own: it is no lease, and says so.
	for _, name := range []string{"10.0.0.9", "fd00::2"} {
		if err = os.Remove(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir, "c0@eth0", strings.NewReplacer("10.0.0.2", "10.0.0.3", "fd00::2", "fd00::3").Replace(string(text)))
	if leases, err := s.List(); len(leases) != 2 || err == nil || !strings.Contains(err.Error(), "c0@eth0: it is no lease: no address that it names is its own") {
		t.Errorf("leases %v, %v", leases, err)
	}
}

// TestListOfLeasesThatAreNotWhole: however many leases are not whole, List looks once whose the addresses are, and anew each time.
func TestListOfLeasesThatAreNotWhole(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	const n = 1000
	var want []ipam.Lease
	for i := range n {
		o := ipam.Owner{ContainerID: fmt.Sprintf("c%03d", i), Interface: "eth0"}
		want = append(want, ipam.Lease{Owner: o, Addresses: allocate(t, s, prefixes("10.0.0.0/16"), o)})
		if err := os.Link(filepath.Join(dir, o.ContainerID+"@eth0"), filepath.Join(dir, fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	lists := func() {
		t.Helper()
		leases, err := s.List()
		if diff := cmp.Diff(want, leases, equal); diff != "" || err != nil {
			t.Errorf("leases (-want +got):\n%s%v", diff, err)
		}
	}
	lists()
	if each := testing.AllocsPerRun(1, func() { _, _ = s.List() }) / n; each > 200 { // a look allocates more than n times
		t.Errorf("List allocated %.0f times for each lease: it looks for each", each)
	}
	// The address of a lease that keeps its file comes to have another, of which the lease's own file says nothing.
	gone := filepath.Join(dir, want[0].Addresses[0].String())
	other := netip.MustParseAddr("10.0.255.9")
	text, err := os.ReadFile(gone)
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir, other.String(), strings.Replace(string(text), want[0].Addresses[0].String(), other.String(), 1))
	want[0].Addresses = append(want[0].Addresses, other)
	lists()
}

package ipam_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/ipam"
)

// coolDown is what is promised.
const coolDown = 30 * time.Second

// at sets the clock of a store, and returns what lets time pass.
func at(s *ipam.Store, now time.Duration) (passed func(time.Duration)) {
	s.SetClock(func() (time.Duration, error) { return now, nil })
	return func(d time.Duration) { now += d }
}

// forget has the connections of everything ended that was released so far, and says of what.
func forget(t *testing.T, s *ipam.Store) []netip.Addr {
	t.Helper()
	var all []netip.Addr
	err := s.Forget(func(as []netip.Addr) error {
		all = as
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// cooling returns the files of addresses that cool down, or have.
func cooling(t *testing.T, dir string) []string {
	t.Helper()
	return names(t, filepath.Join(dir, ".cooling"))
}

func TestAddressCoolsDown(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	passed := at(s, time.Hour)
	ranges := prefixes("10.0.0.0/30", "fd00::/64")
	allocate(t, s, ranges, owner(1))
	allocate(t, s, prefixes("10.0.0.0/28"), owner(8)) // 10.0.0.3, the next
	release(t, s, owner(1))
	if owners, err := s.Owners(); err != nil || !slices.Equal(owners, []ipam.Owner{owner(8)}) {
		t.Errorf("owners %v, %v; nobody holds what cools down", owners, err)
	}
	err := s.Freeze(func(holder func(netip.Addr) (ipam.Owner, bool)) error {
		if o, held := holder(netip.MustParseAddr("10.0.0.2")); held {
			return fmt.Errorf("held by %v", o)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}

	refused := func(wait time.Duration) {
		t.Helper()
		// Whoever asks: who had it, another pod, another process, by a larger range that begins with it.
		another := open(t, dir)
		at(another, time.Hour+coolDown-wait)
		for i, asked := range []*ipam.Store{s, s, another} {
			_, err := asked.Allocate(ranges, owner(i+1))
			var exhausted *ipam.ExhaustedError
			if !errors.As(err, &exhausted) {
				t.Fatalf("%v before the end: %v", wait, err)
			}
			want := ipam.ExhaustedError{Range: ranges[0], Leased: 1, Most: "shop", MostLeased: 1, Cooling: 1, Wait: wait}
			if *exhausted != want {
				t.Errorf("got %+v, want %+v", *exhausted, want)
			}
		}
		if got := allocate(t, another, prefixes("10.0.0.0/28"), owner(9)); got[0].Compare(netip.MustParseAddr("10.0.0.4")) < 0 {
			t.Errorf("leased %v before the end", got)
		}
		release(t, another, owner(9))
		if freed := release(t, s, owner(1)); len(freed) > 0 {
			t.Errorf("a second release freed %v", freed)
		}
	}
	refused(coolDown)
	passed(coolDown - time.Nanosecond)
	forget(t, s)
	refused(time.Nanosecond)
	passed(time.Nanosecond)
	if diff := cmp.Diff(addresses("10.0.0.2", "fd00::3"), allocate(t, s, ranges, owner(2)), equal); diff != "" {
		t.Errorf("after the cool-down (-want +got):\n%s", diff)
	}
	if slices.Contains(cooling(t, dir), "10.0.0.2") {
		t.Error("the address is held and cooling")
	}
}

func TestExhaustedSaysWhatBecameOfTheAddresses(t *testing.T) {
	s := open(t, t.TempDir())
	passed := at(s, time.Hour)
	ranges := prefixes("10.0.0.8/29")
	for i := range 5 {
		o := owner(i)
		if i == 2 {
			o.Namespace = "bank"
		}
		allocate(t, s, ranges, o)
	}
	full := "leasing for c9@eth0: range 10.0.0.8/29 is exhausted: all 5 addresses are leased (4 of them to namespace shop); " +
		"delete pods or give the node a larger podCIDR"
	if _, err := s.Allocate(ranges, owner(9)); err == nil || err.Error() != full {
		t.Errorf("got  %v\nwant %s", err, full)
	}
	for i := range 2 {
		release(t, s, owner(i))
		passed(4500 * time.Millisecond)
		forget(t, s)
	}
	_, err := s.Allocate(ranges, owner(9))
	want := "leasing for c9@eth0: range 10.0.0.8/29 is exhausted: 3 addresses are leased (2 of them to namespace shop) and 2 cool down after their release, " +
		"the first of them for another 21s; try again then, or give the node a larger podCIDR"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

// TestAllAreLeased: that all addresses are leased is said where they are as many as there can be leases.
func TestAllAreLeased(t *testing.T) {
	for name, tt := range map[string]struct {
		e    ipam.ExhaustedError
		want string
	}{
		"all":               {ipam.ExhaustedError{Range: prefixes("10.0.0.8/29")[0], Leased: 5}, "all 5 addresses are leased"},
		"all but one":       {ipam.ExhaustedError{Range: prefixes("10.0.0.8/29")[0], Leased: 4}, "4 addresses are leased"},
		"with the node's":   {ipam.ExhaustedError{Range: prefixes("10.0.0.8/29")[0], Leased: 6}, "6 addresses are leased"},
		"IPv6":              {ipam.ExhaustedError{Range: prefixes("fd00::8/126")[0], Leased: 2}, "all 2 addresses are leased"},
		"IPv6, all but one": {ipam.ExhaustedError{Range: prefixes("fd00::8/126")[0], Leased: 1}, "1 addresses are leased"},
		"a large range":     {ipam.ExhaustedError{Range: prefixes("fd00::/64")[0], Leased: 5}, "5 addresses are leased"},
		"a host":            {ipam.ExhaustedError{Range: prefixes("10.0.0.8/32")[0]}, "all 0 addresses are leased"},
	} {
		want := "range " + tt.e.Range.String() + " is exhausted: " + tt.want + "; delete pods or give the node a larger podCIDR"
		if got := tt.e.Error(); got != want {
			t.Errorf("%s:\ngot  %s\nwant %s", name, got, want)
		}
	}
}

// TestRoomWhileNothingIsSwept: what cools down is room; what has cooled down is none while its connections cannot be ended, and both Room and
// Allocate say that this is why.
func TestRoomWhileNothingIsSwept(t *testing.T) {
	s := open(t, t.TempDir())
	passed := at(s, time.Hour)
	ranges := prefixes("10.0.0.8/29")
	for i := range 5 {
		allocate(t, s, ranges, owner(i))
	}
	fails := func() {
		t.Helper()
		if err := s.Forget(func([]netip.Addr) error { return unix.EPERM }); !errors.Is(err, unix.EPERM) {
			t.Errorf("got %v", err)
		}
	}
	const unswept = "range 10.0.0.8/29 is exhausted: 3 addresses are leased (3 of them to namespace shop)%s and %d stay taken until the connections of the pods " +
		"that had them are ended; try again, and where that does not help mend what \"warrend status\" names as PodsNotSwept"
	allocates := func(want string) {
		t.Helper()
		if as, err := s.Allocate(ranges, owner(9)); err == nil || err.Error() != "leasing for c9@eth0: "+want {
			t.Errorf("leased %v:\ngot  %v\nwant %s", as, err, want)
		}
	}
	release(t, s, owner(0))
	passed(coolDown - time.Second)
	release(t, s, owner(1))
	fails()
	if err := s.Room(ranges); err != nil {
		t.Errorf("while two cool down: %v", err)
	}
	passed(time.Second)
	if err := s.Room(ranges); err != nil {
		t.Errorf("while one cools down: %v", err)
	}
	allocates(fmt.Sprintf(unswept, " and 1 cool down after their release, the first of them for another 29s", 1))
	passed(coolDown)
	fails()
	if err := s.Room(ranges); err == nil || err.Error() != fmt.Sprintf(unswept, "", 2) {
		t.Errorf("when both have cooled down: %v", err)
	}
	allocates(fmt.Sprintf(unswept, "", 2))
	forget(t, s)
	if err := s.Room(ranges); err != nil {
		t.Errorf("once their connections are ended: %v", err)
	}
	allocate(t, s, ranges, owner(9))
}

// TestCoolDownIsByTheTimeSinceTheBoot: /proc/uptime is that time, which nobody can set.
func TestCoolDownIsByTheTimeSinceTheBoot(t *testing.T) {
	uptime := func() time.Duration {
		text, err := os.ReadFile("/proc/uptime")
		if err != nil {
			t.Fatal(err)
		}
		seconds, err := strconv.ParseFloat(strings.Fields(string(text))[0], 64)
		if err != nil {
			t.Fatal(err)
		}
		return time.Duration(seconds * float64(time.Second))
	}
	dir := t.TempDir()
	s := open(t, dir)
	ranges := prefixes("10.0.0.0/30")
	allocate(t, s, ranges, owner(1))
	before := uptime()
	release(t, s, owner(1))
	after := uptime()
	file, err := os.Stat(filepath.Join(dir, ".cooling", "10.0.0.2"))
	if err != nil {
		t.Fatal(err)
	}
	// The kernel rounds what it says down to hundredths of a second.
	if since := time.Duration(file.ModTime().UnixNano()); since < before || since >= after+10*time.Millisecond {
		t.Errorf("cooling since %v after the boot, not between %v and %v", since, before, after)
	}
	if as, err := s.Allocate(ranges, owner(2)); err == nil {
		t.Errorf("leased %v", as)
	}
	// What no process of this boot can have written is left by another one, whose pods are gone.
	if err = os.Chtimes(filepath.Join(dir, ".cooling", "10.0.0.2"), time.Time{}, time.Unix(0, int64(after+time.Hour))); err != nil {
		t.Fatal(err)
	}
	allocate(t, s, ranges, owner(2))
}

// TestCooledAreSwept: in a range that is never used up nobody comes back to an address.
func TestCooledAreSwept(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	passed := at(s, time.Hour)
	if err := os.MkdirAll(filepath.Join(dir, ".cooling", "foreign", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, ".cooling"), "notes", "hello")
	most := 0
	for range 300 {
		allocate(t, s, prefixes("fd00::/64"), owner(1))
		release(t, s, owner(1))
		most = max(most, len(cooling(t, dir)))
		passed(time.Second)
		forget(t, s)
	}
	if most < 30 || most > 62 {
		t.Errorf("up to %d files of addresses that were released in the last 30 s, want between 30 and 62", most)
	}
	if _, err := os.Stat(filepath.Join(dir, ".cooling", "notes")); err != nil {
		t.Errorf("what is no address's was swept, too: %v", err)
	}
}

// TestAddressWaitsForItsConnections: however long ago its release is, an address is leased to nobody before its connections were
// ended, by whomever.
func TestAddressWaitsForItsConnections(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	passed := at(s, time.Hour)
	ranges := prefixes("10.0.0.0/30", "fd00::/64")
	held := allocate(t, s, ranges, owner(1))
	if got := forget(t, s); got != nil {
		t.Errorf("nothing was released, but the connections of %v are to be ended", got)
	}
	release(t, s, owner(1))
	refused := func() {
		t.Helper()
		var exhausted *ipam.ExhaustedError
		if as, err := s.Allocate(ranges, owner(2)); !errors.As(err, &exhausted) || *exhausted != (ipam.ExhaustedError{Range: ranges[0], Unswept: 1}) {
			t.Errorf("leased %v, %+v; want it to wait for its connections alone", as, err)
		}
		release(t, s, owner(9))
	}
	passed(2 * coolDown)
	refused()
	if err := s.Forget(func([]netip.Addr) error { return unix.EPERM }); !errors.Is(err, unix.EPERM) {
		t.Errorf("got %v", err)
	}
	refused()
	// What is released while connections end is not among those that were ended.
	other := allocate(t, s, prefixes("10.0.1.0/30"), owner(3))
	err := s.Forget(func(as []netip.Addr) error {
		if diff := cmp.Diff(held, as, equal); diff != "" {
			t.Errorf("ended (-want +got):\n%s", diff)
		}
		release(t, s, owner(3))
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if again := allocate(t, s, ranges, owner(2)); again[0] != held[0] {
		t.Errorf("leased %v, want %v again", again, held[0])
	}
	passed(2 * coolDown)
	var exhausted *ipam.ExhaustedError
	if as, err := s.Allocate(prefixes("10.0.1.0/30"), owner(4)); !errors.As(err, &exhausted) {
		t.Errorf("leased %v, %v", as, err)
	}
	if diff := cmp.Diff(other, forget(t, s), equal); diff != "" {
		t.Errorf("ended (-want +got):\n%s", diff)
	}
	passed(time.Nanosecond)
	allocate(t, s, prefixes("10.0.1.0/30"), owner(4))
	if got := forget(t, s); got != nil {
		t.Errorf("the connections of %v are to be ended again", got)
	}
}

// TestReleaseNeedsNoSpace: on a disk that holds no more files and no more bytes addresses become free.
func TestReleaseNeedsNoSpace(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("ipam", dir, "tmpfs", 0, "size=64k,nr_inodes=16"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	s := open(t, dir)
	passed := at(s, time.Hour)
	ranges := prefixes("10.0.0.8/29")
	allocate(t, s, ranges, owner(1))
	var full error
	for i := 0; full == nil; i++ {
		full = os.WriteFile(filepath.Join(dir, fmt.Sprintf(".full%d", i)), make([]byte, 8<<10), 0o600)
	}
	if !errors.Is(full, unix.ENOSPC) {
		t.Fatal(full)
	}
	for i, err := 0, error(nil); err == nil; i++ {
		err = os.WriteFile(filepath.Join(dir, fmt.Sprintf(".full-empty%d", i)), nil, 0o600)
	}
	if as, err := s.Allocate(ranges, owner(2)); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("leased %v, %v; the disk is not full", as, err)
	}
	if diff := cmp.Diff(addresses("10.0.0.10"), release(t, s, owner(1)), equal); diff != "" {
		t.Errorf("released (-want +got):\n%s", diff)
	}
	passed(coolDown)
	release(t, s, owner(1))
	if left := names(t, dir); slices.ContainsFunc(left, func(n string) bool { return !strings.HasPrefix(n, ".full") }) {
		t.Errorf("left: %v", left)
	}
}

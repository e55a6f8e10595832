package ipam_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/warren-cni/warren/pkg/ipam"
)

var equal = cmp.Options{cmpopts.EquateComparable(netip.Addr{}), cmpopts.EquateEmpty()}

func open(t *testing.T, dir string) *ipam.Store {
	t.Helper()
	s, err := ipam.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func prefixes(texts ...string) []netip.Prefix {
	var ps []netip.Prefix
	for _, p := range texts {
		ps = append(ps, netip.MustParsePrefix(p))
	}
	return ps
}

func addresses(texts ...string) []netip.Addr {
	var as []netip.Addr
	for _, a := range texts {
		as = append(as, netip.MustParseAddr(a))
	}
	return as
}

func owner(n int) ipam.Owner {
	return ipam.Owner{ContainerID: fmt.Sprintf("c%d", n), Interface: "eth0", Namespace: "shop", Name: fmt.Sprintf("web-%d", n), UID: fmt.Sprintf("u%d", n)}
}

func allocate(t *testing.T, s *ipam.Store, ranges []netip.Prefix, o ipam.Owner) []netip.Addr {
	t.Helper()
	as, err := s.Allocate(ranges, o)
	if err != nil {
		t.Fatal(err)
	}
	return as
}

func release(t *testing.T, s *ipam.Store, o ipam.Owner) []netip.Addr {
	t.Helper()
	as, err := s.Release(o.ContainerID, o.Interface)
	if err != nil {
		t.Fatal(err)
	}
	return as
}

// names returns the files of a directory that hold something.
func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var ns []string
	for _, e := range entries {
		if e.Name() != ".lock" && e.Name() != ".cooling" && e.Name() != ".forgotten" {
			ns = append(ns, e.Name())
		}
	}
	return ns
}

func TestLeaseAndRelease(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "run", "ipam")
	s := open(t, dir)
	ranges := prefixes("10.244.1.0/24", "fd00:10:244:1::/64")
	got := allocate(t, s, ranges, owner(1))
	want := addresses("10.244.1.2", "fd00:10:244:1::2")
	if diff := cmp.Diff(want, got, equal); diff != "" {
		t.Errorf("addresses (-want +got):\n%s", diff)
	}
	leases, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]ipam.Lease{{Owner: owner(1), Addresses: want}}, leases, equal); diff != "" {
		t.Errorf("leases (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"10.244.1.2", "c1@eth0", "fd00:10:244:1::2"}, names(t, dir)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	if _, err = s.Allocate(ranges, owner(1)); err == nil || !strings.Contains(err.Error(), "c1@eth0: the interface already has a lease") {
		t.Errorf("second lease of one attachment: %v, want a refusal", err)
	}
	if diff := cmp.Diff(want, release(t, s, owner(1)), equal); diff != "" {
		t.Errorf("released (-want +got):\n%s", diff)
	}
	if freed := release(t, s, owner(1)); len(freed) > 0 {
		t.Errorf("second release freed %v", freed)
	}
	if left := names(t, dir); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	// Round robin: what was just released is not leased next.
	if diff := cmp.Diff(addresses("10.244.1.3", "fd00:10:244:1::3"), allocate(t, s, ranges, owner(2)), equal); diff != "" {
		t.Errorf("next addresses (-want +got):\n%s", diff)
	}
}

func TestSmallRanges(t *testing.T) {
	tests := []struct {
		prefix string
		leases []string
	}{
		{"10.0.0.0/32", nil},
		{"10.0.0.0/31", nil},
		{"10.0.0.0/30", []string{"10.0.0.2"}},
		{"10.0.0.8/29", []string{"10.0.0.10", "10.0.0.11", "10.0.0.12", "10.0.0.13", "10.0.0.14"}},
		{"255.255.255.252/30", []string{"255.255.255.254"}},
		{"fd00::/128", nil},
		{"fd00::/127", nil},
		{"fd00::/126", []string{"fd00::2", "fd00::3"}},
		{"ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffc/126", []string{"ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffe", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"}},
	}
	for _, tt := range tests {
		t.Run(tt.prefix, func(t *testing.T) {
			s := open(t, t.TempDir())
			passed := at(s, 0)
			var got []netip.Addr
			for i := range tt.leases {
				got = append(got, allocate(t, s, prefixes(tt.prefix), owner(i))...)
			}
			if diff := cmp.Diff(addresses(tt.leases...), got, equal); diff != "" {
				t.Errorf("leases (-want +got):\n%s", diff)
			}
			_, err := s.Allocate(prefixes(tt.prefix), owner(99))
			if len(tt.leases) == 0 {
				if err == nil || !strings.Contains(err.Error(), tt.prefix+" has no address to lease") {
					t.Errorf("got %v, want an error that says the range is too small", err)
				}
				return
			}
			var exhausted *ipam.ExhaustedError
			if !errors.As(err, &exhausted) || exhausted.Leased != len(tt.leases) || exhausted.Range != netip.MustParsePrefix(tt.prefix) {
				t.Errorf("got %v, want exhaustion with %d leased", err, len(tt.leases))
			}
			// The one that becomes free is found, wherever it is.
			release(t, s, owner(0))
			passed(coolDown)
			forget(t, s)
			if again := allocate(t, s, prefixes(tt.prefix), owner(100)); again[0] != netip.MustParseAddr(tt.leases[0]) {
				t.Errorf("leased %v, want %s", again, tt.leases[0])
			}
		})
	}
}

func TestAllRangesOrNone(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	ranges := prefixes("10.0.0.0/24", "fd00::/126")
	for i := range 2 {
		allocate(t, s, ranges, owner(i))
	}
	before := names(t, dir)
	if _, err := s.Allocate(ranges, owner(9)); err == nil {
		t.Fatal("leased from an exhausted range")
	}
	if diff := cmp.Diff(before, names(t, dir)); diff != "" {
		t.Errorf("files (-before +after):\n%s", diff)
	}
}

func TestConcurrentLeasesAreDistinct(t *testing.T) {
	dir := t.TempDir()
	const writers, each = 8, 30
	var mu sync.Mutex
	seen := map[netip.Addr]int{}
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			s, err := ipam.Open(dir) // as another process: the lock is of the open file
			if err != nil {
				t.Error(err)
				return
			}
			for i := range each {
				as, allocErr := s.Allocate(prefixes("10.0.0.0/24", "fd00::/64"), owner(w*each+i))
				if allocErr != nil {
					t.Error(allocErr)
					return
				}
				mu.Lock()
				for _, a := range as {
					seen[a]++
				}
				mu.Unlock()
				if _, listErr := s.List(); listErr != nil {
					t.Errorf("a reader saw an unfinished file: %v", listErr)
				}
			}
		})
	}
	wg.Wait()
	if len(seen) != 2*writers*each {
		t.Errorf("%d distinct addresses, want %d", len(seen), 2*writers*each)
	}
}

// TestKilledWriter puts the directory into each state that a killed process can leave behind.
func TestKilledWriter(t *testing.T) {
	ranges := prefixes("10.0.0.0/24", "fd00::/64")
	tests := map[string]struct {
		left []string // names that are there of a lease
		held []netip.Addr
	}{
		"before the first name":                 {[]string{".new"}, nil},
		"after one address":                     {[]string{".new", "10.0.0.2"}, addresses("10.0.0.2")},
		"after both addresses, or in a release": {[]string{".new", "10.0.0.2", "fd00::2"}, addresses("10.0.0.2", "fd00::2")},
		"in a release after one address":        {[]string{"fd00::2"}, addresses("fd00::2")},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			allocate(t, s, ranges, owner(1))
			if err := os.Link(filepath.Join(dir, "c1@eth0"), filepath.Join(dir, ".new")); err != nil {
				t.Fatal(err)
			}
			for _, n := range names(t, dir) {
				if !slices.Contains(tt.left, n) {
					if err := os.Remove(filepath.Join(dir, n)); err != nil {
						t.Fatal(err)
					}
				}
			}
			leases, err := s.List()
			if err != nil || len(leases) > 0 {
				t.Errorf("List: %v, %v; an unfinished lease is no lease", leases, err)
			}
			owners, err := s.Owners()
			if err != nil || slices.Contains(owners, owner(1)) != (len(tt.held) > 0) {
				t.Errorf("Owners: %v, %v", owners, err)
			}
			// Another lease neither takes what is held nor writes into its file.
			for _, a := range allocate(t, s, ranges, owner(2)) {
				if slices.Contains(tt.held, a) {
					t.Errorf("%s was leased twice", a)
				}
			}
			held, err := s.Held("c1", "eth0")
			if err != nil {
				t.Error(err)
			}
			if diff := cmp.Diff(tt.held, held, equal); diff != "" {
				t.Errorf("held (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(tt.held, release(t, s, owner(1)), equal); diff != "" {
				t.Errorf("released (-want +got):\n%s", diff)
			}
			release(t, s, owner(2))
			if left := names(t, dir); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func TestDirectoryGone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ipam")
	s := open(t, dir)
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if leases, err := s.List(); err == nil || leases != nil {
		t.Errorf("List: %v, %v; want an error and no leases", leases, err)
	}
	if _, err := s.Allocate(prefixes("10.0.0.0/24"), owner(1)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Allocate: %v, want %v", err, os.ErrNotExist)
	}
}

// A node that gets other podCIDRs, or one of another family beside: what is leased stays leased until it is released, and nobody else gets
// it, also where the new range holds it.
func TestRangesChange(t *testing.T) {
	tests := map[string]struct{ before, after []netip.Prefix }{
		"others":   {prefixes("10.0.0.0/24", "fd00::/64"), prefixes("10.0.1.0/24", "fd00:1::/64")},
		"smaller":  {prefixes("10.0.0.0/24", "fd00::/64"), prefixes("10.0.0.0/29", "fd00::/125")},
		"larger":   {prefixes("10.0.0.0/29", "fd00::/125"), prefixes("10.0.0.0/16", "fd00::/48")},
		"one more": {prefixes("10.0.0.0/24"), prefixes("10.0.0.0/24", "fd00::/64")},
		"one less": {prefixes("10.0.0.0/24", "fd00::/64"), prefixes("fd00::/64")},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			old := allocate(t, open(t, dir), tt.before, owner(1))
			s := open(t, dir)
			for i := range 3 {
				fresh := allocate(t, s, tt.after, owner(2+i))
				if len(fresh) != len(tt.after) {
					t.Errorf("leased %v of %v", fresh, tt.after)
				}
				for j, a := range fresh {
					if !tt.after[j].Contains(a) || slices.Contains(old, a) {
						t.Errorf("leased %v, of %v beside %v", a, tt.after[j], old)
					}
				}
			}
			if diff := cmp.Diff(old, release(t, s, owner(1)), equal); diff != "" {
				t.Errorf("released (-want +got):\n%s", diff)
			}
			if leases, err := s.List(); err != nil || len(leases) != 3 {
				t.Errorf("leases %v, %v", leases, err)
			}
		})
	}
}

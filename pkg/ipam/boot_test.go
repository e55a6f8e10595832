package ipam_test

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/ipam"
)

// boots opens a directory as in the boot of that name.
func boots(t *testing.T, dir, id string) *ipam.Store {
	t.Helper()
	s := open(t, dir)
	at(s, 0)
	s.SetBoot(func() (string, error) { return id, nil })
	return s
}

// startBoot starts a boot that has to free so many leases.
func startBoot(t *testing.T, s *ipam.Store, want int) {
	t.Helper()
	if freed, err := s.StartBoot(); err != nil || freed != want {
		t.Errorf("freed %d leases, %v; want %d", freed, err, want)
	}
}

func TestLeasesEndWithTheBoot(t *testing.T) {
	dir := t.TempDir()
	ranges := prefixes("10.0.0.0/29", "fd00::/64")
	s := boots(t, dir, "boot-1")
	startBoot(t, s, 0)
	for i := range 3 {
		allocate(t, s, ranges, owner(i))
	}
	release(t, s, owner(0)) // cools down
	if err := os.Remove(filepath.Join(dir, "c1@eth0")); err != nil {
		t.Fatal(err) // what a killed process leaves
	}
	startBoot(t, s, 0) // a restart of the daemon
	if leases, err := s.List(); err != nil || len(leases) != 1 {
		t.Errorf("a restart left %v, %v", leases, err)
	}
	s = boots(t, dir, "boot-2")
	startBoot(t, s, 1)
	startBoot(t, s, 0)
	if diff := cmp.Diff([]string{".boot"}, names(t, dir)); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
	for i := range 5 { // the whole range is there at once
		allocate(t, s, ranges, owner(i))
	}
}

// Where nothing says that the leases are of another boot they are left: those of a version that did not say it, and those whose
// file was cut off.
func TestLeasesOfAnUnknownBootStay(t *testing.T) {
	dir := t.TempDir()
	s := boots(t, dir, "boot-1")
	allocate(t, s, prefixes("10.0.0.0/24"), owner(1))
	startBoot(t, s, 0)
	for _, text := range []string{"", "boot", "boot-1\nboot-0\n"} {
		write(t, dir, ".boot", text)
		startBoot(t, s, 0)
	}
	if leases, err := s.List(); err != nil || len(leases) != 1 {
		t.Errorf("left %v, %v", leases, err)
	}
	startBoot(t, boots(t, dir, "boot-2"), 1)
}

// What cannot be read now may name another boot, whose leases the next try frees.
func TestUnreadableBootIsAnError(t *testing.T) {
	dir := t.TempDir()
	s := boots(t, dir, "boot-1")
	startBoot(t, s, 0)
	allocate(t, s, prefixes("10.0.0.0/24"), owner(1))
	s = boots(t, dir, "boot-2")
	unreadable(t, filepath.Join(dir, ".boot"), func() {
		if freed, err := s.StartBoot(); !errors.Is(err, unix.EIO) || freed != 0 {
			t.Errorf("freed %d, %v; want none, and %v", freed, err, unix.EIO)
		}
	})
	startBoot(t, s, 1)
}

// unreadable has reads of a file fail meanwhile: nothing is mapped at the start of a process's memory.
func unreadable(t *testing.T, path string, do func()) {
	t.Helper()
	if err := unix.Mount("/proc/self/mem", path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(path, 0); err != nil {
			t.Error(err)
		}
	}()
	do()
}

// TestBootIsTheKernels: the name of the boot is what the kernel says.
func TestBootIsTheKernels(t *testing.T) {
	dir := t.TempDir()
	startBoot(t, open(t, dir), 0)
	want, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(filepath.Join(dir, ".boot"))
	if err != nil || string(got) != string(want) {
		t.Errorf("boot %q, %v; want %q", got, err, want)
	}
}

// What was forgotten in another boot says nothing of what is released in this one, also once this one is as old.
func TestForgettingEndsWithTheBoot(t *testing.T) {
	dir := t.TempDir()
	begin := func(id string, released, now time.Duration) *ipam.Store {
		t.Helper()
		s := boots(t, dir, id)
		startBoot(t, s, 0)
		at(s, released)
		allocate(t, s, prefixes("10.0.0.0/29"), owner(1))
		release(t, s, owner(1))
		at(s, now)
		return s
	}
	if asked := forget(t, begin("boot-1", 60*time.Second, 101*time.Second)); len(asked) != 1 {
		t.Errorf("asked to forget %v", asked)
	}
	if asked := forget(t, begin("boot-2", 60*time.Second, 200*time.Second)); len(asked) != 1 {
		t.Errorf("after another boot: asked to forget %v", asked)
	}
}

// Something foreign in the place of what says how far was forgotten keeps no address from being leased again.
func TestForeignForgottenIsSetAside(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"link":      func(path string) error { return os.Symlink("/dev/zero", path) },
		"dangling":  func(path string) error { return os.Symlink("/nowhere", path) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		dir := t.TempDir()
		s := open(t, dir)
		at(s, time.Second)
		leased := allocate(t, s, prefixes("10.0.0.0/30"), owner(1)) // the only address
		release(t, s, owner(1))
		if err := put(filepath.Join(dir, ".forgotten")); err != nil {
			t.Fatal(err)
		}
		at(s, time.Minute)
		if got := forget(t, s); len(got) != 1 {
			t.Errorf("%s: forgotten is %v", name, got)
		}
		at(s, 2*time.Minute)
		if diff := cmp.Diff(leased, allocate(t, s, prefixes("10.0.0.0/30"), owner(2)), equal); diff != "" {
			t.Errorf("%s: leased (-want +got):\n%s", name, diff)
		}
	}
}

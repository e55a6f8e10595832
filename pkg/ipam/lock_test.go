package ipam_test

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/ipam"
)

// hold holds the lock of the leases by the file of that name, as another process does, and returns what ends that.
func hold(t *testing.T, path string) (end func()) {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err = unix.Flock(int(file.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	return func() { _ = file.Close() }
}

// Who holds the lock and does not give it back keeps nobody waiting for good; and when it is free all goes on.
func TestLockIsNotWaitedForForever(t *testing.T) {
	ranges := prefixes("10.0.0.0/24")
	for _, name := range []string{".lock", "."} { // the directory's is taken where something else is in the place of the file
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				s := open(t, dir)
				allocate(t, s, ranges, owner(1))
				if name == "." {
					if err := errors.Join(os.Remove(filepath.Join(dir, ".lock")), os.Mkdir(filepath.Join(dir, ".lock"), 0o700)); err != nil {
						t.Fatal(err)
					}
				}
				end := hold(t, filepath.Join(dir, name))
				calls := map[string]func() error{
					"Allocate": func() error { _, err := s.Allocate(ranges, owner(2)); return err },
					"Release":  func() error { _, err := s.Release("c1", "eth0"); return err },
					"Forget":   func() error { return s.Forget(func([]netip.Addr) error { return nil }) },
					"Freeze":   func() error { return s.Freeze(func(func(netip.Addr) (ipam.Owner, bool)) error { return nil }) },
				}
				for call, do := range calls {
					began := time.Now() //nolint:forbidigo // how long it takes
					err := do()
					if !errors.Is(err, ipam.ErrBusy) || !strings.Contains(err.Error(), filepath.Join(dir, name)) {
						t.Errorf("%s: %v", call, err)
					}
					if took := time.Since(began); took < 10*time.Second || took > 11*time.Second {
						t.Errorf("%s gave up after %s", call, took)
					}
				}
				time.AfterFunc(5*time.Second, end)
				for _, call := range []string{"Allocate", "Release", "Forget", "Freeze"} {
					if err := calls[call](); err != nil {
						t.Errorf("%s, with the lock free soon: %v", call, err)
					}
				}
			})
		})
	}
}

package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/ipam"
)

// mountMemory mounts a tmpfs on a directory for the time of the test.
func mountMemory(t *testing.T, dir string, flags uintptr, data string) {
	t.Helper()
	if err := unix.Mount("tmpfs", dir, "tmpfs", flags, data); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// filled writes files until a file system has room for neither bytes nor files, and returns what makes room.
func filled(t *testing.T, dir string) (mend func() error) {
	t.Helper()
	full := filepath.Join(dir, "full")
	err := os.Mkdir(full, 0o700)
	for _, size := range []int{4 << 10, 0} {
		for i := 0; err == nil; i++ {
			err = os.WriteFile(filepath.Join(full, fmt.Sprint(size, "-", i)), make([]byte, size), 0o600)
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		err = nil
	}
	return func() error { return os.RemoveAll(full) }
}

// frozen makes a file system read-only, and returns what makes it writable.
func frozen(t *testing.T, dir string) (mend func() error) {
	t.Helper()
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	return func() error { return unix.Mount("", dir, "", unix.MS_REMOUNT, "") }
}

// With its directories full or read-only the daemon says so, and does what it could not once they take changes again. Without a conflist it is not
// ready; what it cannot write down of a node that is changes nothing for the pods.
func TestDirectoriesTakeNothing(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(*testing.T, string) (mend func() error)
		// audit are the problems of an audit with the run directory so. What is written down of the mesh must be gone before another one is
		// applied, and where nothing can be deleted that is not known.
		audit []string
	}{
		"full":      {filled, []string{"LeasesNotRepaired", "MeshNotRemembered"}},
		"read-only": {frozen, []string{"LeasesNotRepaired", "MeshApplyFailed"}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDisks(t)
			mend := c.spoil(t, d.options.cniConfDir)
			if err := d.wants(true, "ConflistFailed"); err == nil {
				t.Error("without a conflist the loop would not try again")
			}
			if d.outcomeNow().ready || !d.isOpen(d.pod) {
				t.Errorf("without a conflist the node is ready: %v; the pod that runs is open: %v", d.outcomeNow().ready, d.isOpen(d.pod))
			}
			d.mended(mend)

			d.told.delta.Nodes["node-2"] = provenNode(t)
			if err := os.WriteFile(filepath.Join(d.options.leases(), "notes"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := d.wants(false); err != nil {
				t.Fatal(err)
			}
			mend = c.spoil(t, d.options.runDir)
			d.clock = func() time.Time { return time.Unix(0, 0).Add(rememberAfter) }
			if err := d.wants(false, "MeshNotRemembered"); err != nil {
				t.Error(err)
			}
			if err := d.wants(true, c.audit...); (err != nil) != slices.Contains(c.audit, "MeshApplyFailed") {
				t.Error(err)
			}
			if was, err := d.recallMesh(); was != nil || err != nil || !d.outcomeNow().ready || !d.isOpen(d.pod) {
				t.Errorf("remembered is %v (%v), the node is ready: %v, the pod open: %v", was, err, d.outcomeNow().ready, d.isOpen(d.pod))
			}
			d.mended(mend)
			if was, err := d.recallMesh(); err != nil || was == nil || len(was.Peers) != 1 {
				t.Errorf("remembered is %v (%v), want one peer", was, err)
			}
			if _, err := os.Stat(filepath.Join(d.options.leases(), ".aside", "notes")); err != nil {
				t.Error(err)
			}
		})
	}
}

// disks is a node whose run directory and whose directory of conflists are small file systems of their own.
type disks struct {
	*node
	t    *testing.T
	told *told
	pod  agentapi.Pod
}

// newDisks returns a node that has not stepped yet, with a pod that runs.
func newDisks(t *testing.T) disks {
	t.Helper()
	n, s, _, pod := newStepped(t, "192.168.0.1")
	for _, dir := range []string{n.options.runDir, n.options.cniConfDir} {
		mountMemory(t, dir, 0, "size=128k,nr_inodes=48")
	}
	var err error
	if n.leases, err = ipam.Open(n.options.leases()); err == nil {
		owner := ipam.Owner{ContainerID: pod.ContainerID, Interface: pod.Interface, Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID}
		pod.Addresses, err = n.leases.Allocate([]netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}, owner)
	}
	if err != nil {
		t.Fatal(err)
	}
	return disks{n, t, s, pod}
}

// wants makes a step, demands problems with these codes and no others, and returns the step's error.
func (d disks) wants(full bool, codes ...string) error {
	d.t.Helper()
	err := d.step(d.t.Context(), full)
	var got []string
	for _, p := range d.outcomeNow().problems {
		got = append(got, p.Code)
	}
	if !slices.Equal(got, codes) {
		d.t.Errorf("problems %v, want %q", d.outcomeNow().problems, codes)
	}
	return err
}

// mended demands that nothing is left of a problem that is mended.
func (d disks) mended(mend func() error) {
	d.t.Helper()
	if err := mend(); err != nil {
		d.t.Fatal(err)
	}
	if err := d.wants(true); err != nil || !d.outcomeNow().ready {
		d.t.Errorf("error %v, the node is ready: %v", err, d.outcomeNow().ready)
	}
}

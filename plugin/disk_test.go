package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// disk mounts a small file system for the node's leases.
func (n *node) disk(t *testing.T) (dir string) {
	t.Helper()
	dir = filepath.Join(n.runDir, "ipam")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("ipam", dir, "tmpfs", 0, "size=128k,nr_inodes=32"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// pin makes a mount point of a file or directory, which nobody can move then, until unpin or the end of the test.
func pin(t *testing.T, path string) (unpin func()) {
	t.Helper()
	if err := unix.Mount(path, path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	unpin = sync.OnceFunc(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(unpin)
	return unpin
}

// readOnly makes it so, or not any more.
func readOnly(t *testing.T, dir string, flag uintptr) {
	t.Helper()
	if err := unix.Mount("ipam", dir, "tmpfs", unix.MS_REMOUNT|flag, ""); err != nil {
		t.Fatal(err)
	}
}

// TestReadOnlyLeases: with leases that take no changes ADD leaves nothing, and DEL takes the pod out of service; its lease alone stays,
// and keeps its address, until a GC or another DEL finds them writable.
func TestReadOnlyLeases(t *testing.T) {
	for _, command := range []string{"DEL", "GC"} {
		for _, daemon := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, daemon %v", command, daemon), func(t *testing.T) {
				n := newNode(t)
				dir := n.disk(t)
				p, other := n.newPod("web"), n.newPod("other")
				n.mustAdd(other)
				before := n.state(p, other)
				n.mustAdd(p)
				readOnly(t, dir, unix.MS_RDONLY)
				third := n.newPod("third")
				full := n.state(p, other, third)
				_, err := n.add(n.conflist(), third)
				wantCode(t, err, 999, "read-only file system")
				n.unchanged(full, p, other, third)
				if !daemon {
					n.stop()
				}
				for range 2 {
					if out, stderr, delErr := n.exec(p, "DEL"); delErr != nil || !strings.Contains(stderr, "read-only file system") {
						t.Errorf("DEL: %v: %s%s", delErr, out, stderr)
					}
				}
				if links := strings.Count(run(t, n, "ip -br link show type veth up"), "wrn"); links != 1 || len(n.open()) != 2 {
					t.Errorf("%d links are up, and %v may pass; want those of one pod", links, n.open())
				}
				readOnly(t, dir, 0)
				valid := func(c map[string]any) {
					c["cni.dev/valid-attachments"] = []any{map[string]any{"containerID": other.rt.ContainerID, "ifname": other.rt.IfName}}
				}
				if command == "GC" && !daemon {
					if out, _, execErr := n.exec(p, command, valid); execErr == nil || !strings.Contains(out, "whose lease stays until then") {
						t.Errorf("GC without a daemon: %v: %s", execErr, out)
					}
					n.startDaemon()
				}
				if out, stderr, execErr := n.exec(p, command, valid); execErr != nil || stderr != "" {
					t.Errorf("%s: %v: %s%s", command, execErr, out, stderr)
				}
				n.unchanged(before, p, other)
			})
		}
	}
}

// TestFullLeases: with no space for leases ADD leaves nothing, and DEL ends a lease all the same.
func TestFullLeases(t *testing.T) {
	for _, daemon := range []bool{true, false} {
		t.Run(fmt.Sprintf("daemon %v", daemon), func(t *testing.T) {
			n := newNode(t)
			dir := n.disk(t)
			p, other := n.newPod("web"), n.newPod("other")
			before := n.state(p, other)
			n.mustAdd(p)
			var err error
			for i := 0; err == nil; i++ {
				err = os.WriteFile(filepath.Join(dir, fmt.Sprintf(".l%d", i)), make([]byte, 16<<10), 0o600)
			}
			full := n.state(p, other)
			_, err = n.add(n.conflist(), other)
			wantCode(t, err, 999, "no space left on device")
			n.unchanged(full, p, other)
			if !daemon {
				n.stop()
			}
			for range 2 {
				if out, _, delErr := n.exec(p, "DEL"); delErr != nil {
					t.Errorf("DEL: %v: %s", delErr, out)
				}
			}
			n.unchanged(before, p, other)
		})
	}
}

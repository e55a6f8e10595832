package wgdevice_test

import (
	"errors"
	"runtime"
	"testing"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// host is a thread with a network and a mount namespace of its own.
type host struct {
	calls chan func()
	netns int
}

func newHost(t *testing.T) *host {
	t.Helper()
	return startHost(t, isolate)
}

// sibling returns another thread in the namespaces of a host.
func (h *host) sibling(t *testing.T) *host {
	t.Helper()
	mounts := in(t, h, func() (int, error) { return unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0) })
	defer func() { _ = unix.Close(mounts) }()
	return startHost(t, func() (int, error) {
		netns, err := unix.Dup(h.netns)
		return netns, errors.Join(err, unix.Unshare(unix.CLONE_FS), unix.Setns(mounts, unix.CLONE_NEWNS), unix.Setns(h.netns, unix.CLONE_NEWNET))
	})
}

// startHost starts a thread that enters its namespaces by a function, which returns its network namespace.
func startHost(t *testing.T, enter func() (int, error)) *host {
	t.Helper()
	h := &host{calls: make(chan func())}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, and the namespaces with the thread
		var err error
		h.netns, err = enter()
		ready <- err
		for f := range h.calls {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatalf("making namespaces (this test needs root): %v", err)
	}
	t.Cleanup(func() {
		close(h.calls)
		_ = unix.Close(h.netns)
	})
	return h
}

func isolate() (netns int, err error) {
	if err = unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		return 0, err
	}
	if err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return 0, err
	}
	if err = unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil {
		return 0, err
	}
	lo, err := netlinksafe.LinkByName("lo")
	if err != nil {
		return 0, err
	}
	if err = netlink.LinkSetUp(lo); err != nil {
		return 0, err
	}
	return unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
}

// in runs f on the host's thread. f must not end the test: it returns an error instead.
func in[T any](t *testing.T, h *host, f func() (T, error)) T {
	t.Helper()
	result, err := try(h, f)
	if err != nil {
		t.Fatal(err)
	}
	return result
}

// try is in for what may fail.
func try[T any](h *host, f func() (T, error)) (T, error) {
	var result T
	var err error
	done := make(chan struct{})
	h.calls <- func() {
		defer close(done)
		result, err = f()
	}
	<-done
	return result, err
}

// do is in for functions without a result.
func (h *host) do(t *testing.T, f func() error) {
	t.Helper()
	in(t, h, func() (struct{}, error) { return struct{}{}, f() })
}

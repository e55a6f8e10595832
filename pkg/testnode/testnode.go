// Package testnode gives a test a network namespace that stands for a node, and others that stand for its pods. Nothing of
// the machine's own network is touched.
package testnode

import (
	"os"
	"runtime"
	"testing"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/containernetworking/plugins/pkg/testutils"
	"github.com/vishvananda/netlink"
)

// Enter moves the calling goroutine, and the processes that it starts, into a new node for good: its thread ends with the
// test. A subtest is another goroutine and has to enter a node of its own.
func Enter(tb testing.TB) ns.NetNS {
	tb.Helper()
	runtime.LockOSThread()
	node := New(tb)
	if err := node.Set(); err != nil {
		tb.Fatalf("entering the node's namespace: %v", err)
	}
	// Forwarding, as the daemon switches it on.
	for _, name := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/net/"+name, []byte("1"), 0); err != nil {
			tb.Fatal(err)
		}
	}
	return node
}

// New returns a network namespace that has a path and a loopback device that is up, and ends with the test.
func New(tb testing.TB) ns.NetNS {
	tb.Helper()
	space, err := testutils.NewNS()
	if err != nil {
		tb.Fatalf("making a network namespace: %v", err)
	}
	tb.Cleanup(func() {
		_ = space.Close()
		if unmountErr := testutils.UnmountNS(space); unmountErr != nil {
			tb.Errorf("removing a network namespace: %v", unmountErr)
		}
	})
	err = space.Do(func(ns.NetNS) error {
		lo, loErr := netlinksafe.LinkByName("lo")
		if loErr != nil {
			return loErr
		}
		return netlink.LinkSetUp(lo)
	})
	if err != nil {
		tb.Fatalf("setting up the loopback device: %v", err)
	}
	return space
}

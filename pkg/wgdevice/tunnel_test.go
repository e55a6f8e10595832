package wgdevice_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/wgdevice"
)

// TestTunnelProcess ends the process of the user-space tunnel and starts it again: the way stays closed in between. Where the
// kernel has WireGuard the process has nothing to do, and makes way when the kernel takes over.
func TestTunnelProcess(t *testing.T) {
	if testMode() == wgdevice.ModeKernel {
		idleTunnel(t)
		kernelTakesOver(t)
		return
	}
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	l.joinAll(t, true)
	marker := newMarker()
	wire := l.listen(t, marker)
	a.reach(t, b, marker)
	before := describe(t, a)
	for _, end := range []os.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		err := a.signalTunnel(t, end)
		if end == syscall.SIGTERM && err != nil {
			t.Errorf("tunnel after SIGTERM: %v", err)
		}
		if _, err = try(a.host, func() (wgdevice.Changes, error) { return a.device.Apply(t.Context(), a.plan(t, a, b), a.key) }); !errors.Is(err, wgdevice.ErrNoTunnel) {
			t.Errorf("apply without the tunnel: %v", err)
		}
		a.miss(t, b, marker)
		if after := describe(t, a); after != before {
			t.Errorf("after %v of the tunnel:\n%s\nbefore:\n%s", end, after, before)
		}
		a.startTunnel(t, wgdevice.ModeUserspace)
		if changes := a.apply(t, a.plan(t, a, b)); changes.Peers != 1 || changes.Links != 1 || changes.Routes != 0 {
			t.Errorf("after the tunnel's restart the apply wrote %+v", changes)
		}
		a.reach(t, b, marker)
		if again := a.apply(t, a.plan(t, a, b)); again.Any() {
			t.Errorf("after the tunnel's restart the second apply wrote %+v", again)
		}
	}
	if got := wire.count(t); inClear(got) || got.WireGuard == 0 {
		t.Errorf("on the wire: %v, want nothing in clear", got)
	}

	// The positive control: with the routes and the link gone the same probe leaves in clear.
	_ = a.signalTunnel(t, syscall.SIGKILL) // it ends by the signal, which Wait calls an error
	a.do(t, func() error { return a.device.Cleanup() })
	a.miss(t, b, marker)
	if got := wire.count(t); !inClear(got) {
		t.Errorf("without the mesh on the wire: %v, want packets in clear", got)
	}
}

// idleTunnel runs the tunnel where the kernel has WireGuard.
func idleTunnel(t *testing.T) {
	t.Helper()
	n := newLab(t, 1).nodes[0]
	output := n.start(t, wgdevice.ModeAuto)
	for _, want := range []string{"mode=kernel", "nothing to do"} {
		if !output.Scan() || !strings.Contains(output.Text(), want) {
			t.Errorf("the tunnel says %q, want %q", output.Text(), want)
		}
	}
	if n.socketExists(t) {
		t.Error("the tunnel opened a socket beside the kernel's WireGuard")
	}
	if err := n.signalTunnel(t, syscall.SIGTERM); err != nil {
		t.Errorf("idle tunnel: %v", err)
	}
}

// kernelTakesOver goes from user space to the kernel and back, as a node does whose setting is changed.
func kernelTakesOver(t *testing.T) {
	t.Helper()
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	l.joinAll(t, true)
	marker := newMarker()
	wire := l.listen(t, marker)
	a.do(t, func() error { return a.device.Cleanup() })

	a.device = newDevice(t, wgdevice.ModeUserspace)
	a.startTunnel(t, wgdevice.ModeUserspace)
	a.apply(t, a.plan(t, a, b))
	a.reach(t, b, marker)
	a.device = newDevice(t, wgdevice.ModeAuto)
	a.apply(t, a.plan(t, a, b))
	if mode := a.status(t).Mode; mode != wgdevice.ModeKernel {
		t.Errorf("mode %s, want the kernel", mode)
	}
	a.reach(t, b, marker)
	if err := a.tunnel.Wait(); err == nil {
		t.Error("the tunnel ended without an error although its link was taken away")
	}

	a.device = newDevice(t, wgdevice.ModeUserspace)
	apply := func() (wgdevice.Changes, error) { return a.device.Apply(t.Context(), a.plan(t, a, b), a.key) }
	if _, err := try(a.host, apply); !errors.Is(err, wgdevice.ErrNoTunnel) {
		t.Errorf("back to user space, before its tunnel runs: %v", err)
	}
	a.miss(t, b, marker)
	a.startTunnel(t, wgdevice.ModeUserspace)
	a.apply(t, a.plan(t, a, b))
	a.reach(t, b, marker)
	if got := wire.count(t); inClear(got) || got.WireGuard == 0 {
		t.Errorf("on the wire: %v, want nothing in clear", got)
	}
}

// TestSecondTunnelWaits starts a tunnel beside one that runs, which takes over when the first ends: by itself, and by a kill
// that it does not see coming.
func TestSecondTunnelWaits(t *testing.T) {
	n := newLab(t, 1).nodes[0]
	if testMode() == wgdevice.ModeKernel {
		n.startTunnel(t, wgdevice.ModeUserspace)
	}
	for _, end := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		first := n.tunnel
		output := n.start(t, wgdevice.ModeUserspace)
		if !output.Scan() || !strings.Contains(output.Text(), "waiting until it ends") {
			t.Fatalf("the second tunnel says %q", output.Text())
		}
		second := n.tunnel
		n.tunnel = first
		if err := n.signalTunnel(t, end); err != nil && end == syscall.SIGTERM {
			t.Errorf("the first tunnel: %v", err)
		}
		if !output.Scan() || !strings.Contains(output.Text(), "tunnel ready") {
			t.Fatalf("after the first tunnel's end (%v) the second says %q", end, output.Text())
		}
		n.tunnel = second
	}
	// One that still waits can be ended.
	first := n.tunnel
	if output := n.start(t, wgdevice.ModeUserspace); !output.Scan() {
		t.Fatal("the third tunnel says nothing")
	}
	if err := n.signalTunnel(t, syscall.SIGTERM); err != nil {
		t.Errorf("the third tunnel: %v", err)
	}
	n.tunnel = first
}

func TestWatchTunnel(t *testing.T) {
	n := newLab(t, 1).nodes[0]
	ctx, stop := context.WithCancel(t.Context())
	started := make(chan struct{}, 9)
	ended := make(chan error)
	watcher := n.sibling(t)
	go func() {
		_, err := try(watcher, func() (any, error) { return nil, wgdevice.WatchTunnel(ctx, func() { started <- struct{}{} }) })
		ended <- err
	}()
	// The watch has begun at some moment after this; a tunnel that starts again and again is seen at last.
	for seen := false; !seen; {
		if n.tunnel != nil {
			_ = n.signalTunnel(t, syscall.SIGKILL) // it ends by the signal, which Wait calls an error
		}
		n.startTunnel(t, wgdevice.ModeUserspace)
		select {
		case <-started:
			seen = true
		case err := <-ended:
			t.Fatalf("the watch ended: %v", err)
		default:
		}
	}
	stop()
	if err := <-ended; err != nil {
		t.Errorf("watching: %v", err)
	}
}

// TestTunnelHangs stops the process without ending it: an Apply reports that, and does not wait for ever.
func TestTunnelHangs(t *testing.T) {
	n := newLab(t, 1).nodes[0]
	if testMode() == wgdevice.ModeKernel {
		// The kernel has no process to hang; what remains is that user space is not silently taken for it.
		n.device = newDevice(t, wgdevice.ModeUserspace)
	} else if err := n.tunnel.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	_, err := try(n.host, func() (wgdevice.Changes, error) { return n.device.Apply(t.Context(), n.plan(t, n), n.key) })
	if !errors.Is(err, wgdevice.ErrNoTunnel) {
		t.Errorf("apply: %v, want ErrNoTunnel", err)
	}
}

// The tunnel's process starts with the timers of its threads as late as they may be, whatever those of this process are.
func TestTunnelsTimersMayBeLate(t *testing.T) {
	pipe := filepath.Join(t.TempDir(), "slack")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended, said := make(chan error, 1), make(chan string, 1)
	o := wgdevice.Options{Log: slog.New(slog.DiscardHandler), Mode: wgdevice.ModeUserspace}
	script := "cat /proc/$$/timerslack_ns > " + pipe + " && exec sleep 100"
	go func() { ended <- wgdevice.SuperviseTunnel(ctx, o, []string{"/bin/sh", "-c", script}) }()
	go func() {
		text, err := os.ReadFile(pipe)
		said <- strings.TrimSpace(fmt.Sprint(string(text), err))
	}()
	select {
	case err := <-ended:
		t.Fatal(err)
	case got := <-said:
		if !strings.HasPrefix(got, "1000000\n") {
			t.Errorf("the slack is %q ns", got)
		}
	}
	cancel()
	if err := <-ended; err != nil && !strings.Contains(err.Error(), "signal: terminated") {
		t.Error(err)
	}
}

// TestTunnelOverSmallerPath sends much over a path of which the kernel has learnt that it carries less than the tunnel's packets have: as
// a router's ICMP error leaves it for ten minutes, a route of that MTU stands on the sender.
func TestTunnelOverSmallerPath(t *testing.T) {
	for i, family := range []string{"IPv4", "IPv6"} {
		t.Run(family, func(t *testing.T) {
			l := newLab(t, 2)
			a, b := l.nodes[0], l.nodes[1]
			v4, v6 := uplink(b.number)
			endpoint := []netip.Addr{v4, v6}[i]
			want := a.plan(t, a, b)
			want.Peers[0].Endpoint = netip.AddrPortFrom(endpoint, wireGuardPort)
			a.apply(t, want)
			b.apply(t, b.plan(t, a, b))
			a.reach(t, b, newMarker())
			a.do(t, func() error {
				link, err := netlinksafe.LinkByName("eth0")
				if err != nil {
					return err
				}
				to := &net.IPNet{IP: endpoint.AsSlice(), Mask: net.CIDRMask(endpoint.BitLen(), endpoint.BitLen())}
				return netlink.RouteAdd(&netlink.Route{Dst: to, LinkIndex: link.Attrs().Index, MTU: 1400})
			})
			to, _ := b.addresses()
			a.transfer(t, to, make([]byte, 8<<20))
		})
	}
}

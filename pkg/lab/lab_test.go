package lab

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// newLab makes a lab without daemons.
func newLab(t *testing.T, name string, nodes int) *Lab {
	t.Helper()
	l, err := New(t.Context(), Options{Name: name, Dir: t.TempDir(), Nodes: nodes})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
	return l
}

// within returns a context that ends soon.
func within(t *testing.T, limit time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

func TestNodesReachEachOtherAndTheCaptureSeesIt(t *testing.T) {
	l := newLab(t, "labwire", 2)
	marker := NewMarker()
	capture, err := l.Capture(marker)
	if err != nil {
		t.Fatal(err)
	}
	server, err := NewEcho(t.Context(), l.Nodes[1].Netns(), 8080)
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range l.Nodes[1].Addresses {
		if err = Probe(within(t, 5*time.Second), l.Nodes[0].Netns(), netip.AddrPortFrom(address, 8080), marker); err != nil {
			t.Errorf("probing %v: %v", address, err)
		}
	}
	if err = server.Close(); err != nil {
		t.Error(err)
	}
	if err = Probe(within(t, 5*time.Second), l.Nodes[0].Netns(), netip.AddrPortFrom(l.Nodes[1].Addresses[0], 8080), marker); err == nil {
		t.Error("a probe of a stopped server succeeded")
	}
	counts, err := capture.Stop()
	if err != nil {
		t.Fatal(err)
	}
	// There and back, in both families.
	if counts.Marked != 4 || counts.Pods != 0 {
		t.Errorf("capture: %v", counts)
	}
}

func TestNewClearsWhatAKilledRunLeft(t *testing.T) {
	first := newLab(t, "labsweep", 1)
	process, err := first.Nodes[0].Start(t.Context(), "sleep", nil, []string{"sh", "-c", "echo runs; exec sleep 1000"})
	if err != nil {
		t.Fatal(err)
	}
	err = Until(within(t, patience), func() error {
		if process.Log(1) != "runs" {
			return errors.New("it does not run yet")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	second, err := New(t.Context(), Options{Name: "labsweep", Dir: t.TempDir(), Nodes: 1})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-process.done:
	case <-time.After(patience):
		t.Error("a process of the first run lives")
	}
	if err = second.Close(t.Context()); err != nil {
		t.Error(err)
	}
	left, err := filepath.Glob(filepath.Join(namespaces, "labsweep-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left after Close: %v, %v", left, err)
	}
}

func TestProcesses(t *testing.T) {
	node := newLab(t, "labproc", 1).Nodes[0]
	_, err := node.Run(t.Context(), "sh", "-c", "echo why >&2; exit 3")
	if err == nil || !strings.Contains(err.Error(), "why") {
		t.Errorf("a failed command's error does not say why: %v", err)
	}

	// Each node has its own directory where WireGuard's sockets are looked for.
	if _, err = node.Run(t.Context(), "touch", filepath.Join(wireguardSockets, "mark")); err != nil {
		t.Error(err)
	}
	if _, err = os.Stat(filepath.Join(node.dir, "wireguard", "mark")); err != nil {
		t.Error(err)
	}

	process, err := node.Start(t.Context(), "fails", nil, []string{"sh", "-c", "echo for a reason; exit 1"})
	if err != nil {
		t.Fatal(err)
	}
	if err = node.Ready(t.Context(), process, 0); err == nil || !strings.Contains(err.Error(), "for a reason") {
		t.Errorf("waiting for a process that has ended: %v", err)
	}
}

func TestUntilReturnsTheLastError(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	reason := errors.New("not yet")
	if err := Until(ctx, func() error { return reason }); !errors.Is(err, reason) || !errors.Is(err, context.Canceled) {
		t.Errorf("Until returned %v", err)
	}
}

func TestObjectsAppearWhole(t *testing.T) {
	l := newLab(t, "labobj", 1)
	text, err := l.ReadText("node-1")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"kind: Node", "10.244.1.0/24", "fd00:10:244:1::/64", "192.0.2.1", "2001:db8::1"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("the Node object lacks %q:\n%s", want, text)
		}
	}
	if err = l.Remove("node-1"); err != nil {
		t.Error(err)
	}
	if err = l.Remove("node-1"); err == nil {
		t.Error("removing a file that is not there is no error")
	}
}

package wgdevice

import (
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/testnode"
)

// enterKernel enters a namespace of the test's own.
func enterKernel(t *testing.T) *kernel {
	t.Helper()
	testnode.Enter(t)
	k, err := openKernel()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(k.Close)
	return k
}

// TestKernelHas asks without a link what the tunnel learns by making one.
func TestKernelHas(t *testing.T) {
	k := enterKernel(t)
	want, err := k.hasWireGuard()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := KernelHas(); err != nil || got != want {
		t.Errorf("the kernel has WireGuard: %v, %v, want %v", got, err, want)
	}
	if listens, err := Listens(t.Context(), 51820); err != nil || listens {
		t.Errorf("without a link the tunnel listens: %v, %v", listens, err)
	}
}

// TestChoosesAgain: where there is no tunnel, what was chosen once is chosen again, because somebody may have loaded the kernel's module.
func TestChoosesAgain(t *testing.T) {
	k := enterKernel(t)
	d := New(Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Mode: ModeAuto})
	d.mode = ModeUserspace
	_, err := d.ensureLink(k, d.mode, 1420, &Changes{})
	if !errors.Is(err, ErrNoTunnel) || !strings.Contains(err.Error(), "load the kernel module wireguard, or apply manifests/userspace-tunnel.yaml") {
		t.Errorf("without a link: %v", err)
	}
	if d.mode != ModeAuto {
		t.Errorf("the next time takes %s, want a choice", d.mode)
	}
}

// TestNoTunnelSaysWhatToDo: what an operator can do goes by what was asked for.
func TestNoTunnelSaysWhatToDo(t *testing.T) {
	t.Parallel()
	for mode, want := range map[Mode][2]bool{ModeAuto: {true, true}, ModeKernel: {true, true}, ModeUserspace: {false, true}} {
		err := noTunnel(mode).Error()
		if got := [2]bool{strings.Contains(err, "kernel module"), strings.Contains(err, "userspace-tunnel.yaml")}; got != want {
			t.Errorf("%s: %s", mode, err)
		}
	}
}

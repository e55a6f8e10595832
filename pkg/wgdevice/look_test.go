package wgdevice

import (
	"testing"

	"github.com/warren-cni/warren/pkg/testnode"
)

// TestKernelHas asks without a link what the tunnel learns by making one.
func TestKernelHas(t *testing.T) {
	testnode.Enter(t)
	k, err := openKernel()
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
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

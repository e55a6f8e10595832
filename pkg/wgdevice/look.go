package wgdevice

import (
	"context"
	"errors"
	"fmt"
	"net"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// KernelHas tells whether the kernel has WireGuard, which it loads where it is a module. Unlike the tunnel it makes no link to learn
// that, and it needs no capability.
func KernelHas() (bool, error) {
	_, err := netlink.GenlFamilyGet(unix.WG_GENL_NAME)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("asking the kernel for WireGuard: %w", err)
	}
	return true, nil
}

// Listens tells whether the tunnel's link is there and has that UDP port.
func Listens(ctx context.Context, port uint16) (bool, error) {
	k, err := openKernel()
	if err != nil {
		return false, err
	}
	defer k.Close()
	link, err := k.link()
	if err != nil || link == nil || link.Attrs().Flags&net.FlagUp == 0 {
		return false, err
	}
	mode := ModeKernel
	if link.Type() == typeTUN {
		mode = ModeUserspace
	}
	client, err := openWireGuard(ctx, mode)
	if err != nil {
		return false, err
	}
	defer closeQuietly(client)
	device, err := readDevice(client)
	return err == nil && device.ListenPort == int(port), err
}

package wgdevice

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// allowFragments lets the kernel and routers divide what this process sends by UDP over IPv4, as they may what the kernel's WireGuard sends.
// Else the kernel refuses several packets at once, which is how WireGuard sends most, for the ten minutes in which it remembers that
// a path carries less than the uplink, and WireGuard takes that for lost packets: connections hang. Its sockets are nowhere to be had but
// among the open files, and it makes new ones when its port changes.
func allowFragments() error {
	const open = "/proc/self/fd"
	entries, err := os.ReadDir(open)
	if err != nil {
		return fmt.Errorf("looking for the tunnel's sockets: %w", err)
	}
	var errs []error
	for _, entry := range entries {
		fd, errName := strconv.Atoi(entry.Name())
		protocol, errProtocol := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
		family, errFamily := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		if errors.Join(errName, errProtocol, errFamily) != nil || protocol != unix.IPPROTO_UDP || family != unix.AF_INET {
			continue // another file, or one that was closed since
		}
		errs = append(errs, unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_OMIT))
	}
	if err = errors.Join(errs...); err != nil {
		return fmt.Errorf("allowing fragments of what the tunnel sends: %w", err)
	}
	return nil
}

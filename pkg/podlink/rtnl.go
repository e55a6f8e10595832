package podlink

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/nlbatch"
)

// rtnl is a socket to the kernel's network configuration, in the network namespace in which it was opened.
type rtnl struct{ *nlbatch.Socket }

// openRtnl opens a socket in the network namespace of the calling thread.
func openRtnl() (rtnl, error) {
	socket, err := nlbatch.Open(unix.NETLINK_ROUTE)
	return rtnl{socket}, err
}

// unlessGone is a step that has nothing to do where there is no such device any more.
func unlessGone(what string, request *nl.NetlinkRequest) nlbatch.Step {
	return nlbatch.Step{What: what, Request: request, MayBe: unix.ENODEV}
}

// index returns the index of the device of that name, 0 where there is none. It costs no look at the device, waits for no other
// change, and starts no modprobe where there is none, as SIOCGIFINDEX does: the socket is told to belong to the device, which means
// nothing to what it sends.
func (r rtnl) index(name string) (int32, error) {
	if name == "" || len(name) >= unix.IFNAMSIZ { // the kernel would cut it short
		return 0, fmt.Errorf("finding the device %q: %w", name, unix.EINVAL)
	}
	err := unix.SetsockoptString(r.FD(), unix.SOL_SOCKET, unix.SO_BINDTODEVICE, name)
	if errors.Is(err, unix.ENODEV) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("finding the device %s: %w", name, err)
	}
	index, err := unix.GetsockoptInt(r.FD(), unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
	if err != nil {
		return 0, fmt.Errorf("finding the device %s: %w", name, err)
	}
	return int32(index), nil //nolint:gosec // an index is an int
}

// link makes a message about a device.
func link(command int, index int32, attributes ...nl.NetlinkRequestData) *nl.NetlinkRequest {
	message := nl.NewIfInfomsg(unix.AF_UNSPEC)
	message.Index = index
	return about(command, 0, message, attributes)
}

// about makes a message of a fixed part and attributes.
func about(command, flags int, fixed nl.NetlinkRequestData, attributes []nl.NetlinkRequestData) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(command, flags)
	r.AddData(fixed)
	for _, a := range attributes {
		r.AddData(a)
	}
	return r
}

// setUp makes a message that sets a device up or down, beside what the attributes say.
func setUp(index int32, up bool, attributes ...nl.NetlinkRequestData) *nl.NetlinkRequest {
	message := nl.NewIfInfomsg(unix.AF_UNSPEC)
	message.Index, message.Change = index, unix.IFF_UP
	if up {
		message.Flags = unix.IFF_UP
	}
	return about(unix.RTM_SETLINK, 0, message, attributes)
}

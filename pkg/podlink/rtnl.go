package podlink

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// answerSize holds the acknowledgements of a batch: each is a header, an error number and the header of its request, with the whole
// request behind it where the kernel refuses that.
const answerSize = 16 << 10

// rtnl is a socket to the kernel's network configuration, in the network namespace in which it was opened. It sends many changes as
// one datagram, which the kernel works off in one system call.
type rtnl struct{ fd int }

// openRtnl opens a socket in the network namespace of the calling thread.
func openRtnl() (rtnl, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return rtnl{}, fmt.Errorf("opening netlink: %w", err)
	}
	return rtnl{fd}, nil
}

func (r rtnl) close() { _ = unix.Close(r.fd) }

// step is one change of a batch, and what to call it where it fails.
type step struct {
	what    string
	request *nl.NetlinkRequest
	// mayBeGone is set where it is no error that there is no such device any more.
	mayBeGone bool
}

// batchSize bounds a batch: the answers to all of it must have room in the socket.
const batchSize = 64

// do makes the changes in their order, and returns the errors of all that failed. One that fails keeps the kernel from none
// that follow.
func (r rtnl) do(steps []step) error {
	var errs []error
	for batch := range slices.Chunk(steps, batchSize) {
		errs = append(errs, r.doAtOnce(batch))
	}
	return errors.Join(errs...)
}

// doAtOnce is do with one datagram.
func (r rtnl) doAtOnce(steps []step) error {
	var batch []byte
	waiting := make(map[uint32]step, len(steps))
	for _, s := range steps {
		s.request.Flags |= unix.NLM_F_ACK
		batch = append(batch, s.request.Serialize()...)
		batch = append(batch, make([]byte, (4-len(batch)%4)%4)...)
		waiting[s.request.Seq] = s
	}
	kernel := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
	if err := retry(func() error { return unix.Sendto(r.fd, batch, 0, kernel) }); err != nil {
		return fmt.Errorf("writing to netlink: %w", err)
	}
	var errs []error
	answers := make([]byte, answerSize)
	for len(waiting) > 0 {
		var n int
		err := retry(func() (err error) {
			n, _, err = unix.Recvfrom(r.fd, answers, 0)
			return err
		})
		if err != nil {
			return errors.Join(append(errs, fmt.Errorf("reading from netlink: %w", err))...)
		}
		for seq, number := range acknowledgements(answers[:n]) {
			s, ours := waiting[seq]
			if ours && number != 0 && (number != unix.ENODEV || !s.mayBeGone) {
				errs = append(errs, fmt.Errorf("%s: %w", s.what, number))
			}
			delete(waiting, seq)
		}
	}
	return errors.Join(errs...)
}

// retry does a system call again that a signal interrupted.
func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// acknowledgements yields the sequence numbers and error numbers (0 is success) of the acknowledgements in what was received
// (struct nlmsghdr and struct nlmsgerr of linux/netlink.h).
func acknowledgements(b []byte) func(yield func(uint32, unix.Errno) bool) {
	return func(yield func(uint32, unix.Errno) bool) {
		for len(b) >= unix.SizeofNlMsghdr {
			length := binary.NativeEndian.Uint32(b)
			if length < unix.SizeofNlMsghdr || int(length) > len(b) {
				return
			}
			kind, seq := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:])
			if kind == unix.NLMSG_ERROR && length >= unix.SizeofNlMsghdr+4 {
				number := -int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:])) //nolint:gosec // a negative error number
				if !yield(seq, unix.Errno(number)) {                                  //nolint:gosec // positive
					return
				}
			}
			b = b[min(int(length+3)&^3, len(b)):]
		}
	}
}

// index returns the index of the device of that name, 0 where there is none. It costs no look at the device, waits for no other
// change, and starts no modprobe where there is none, as SIOCGIFINDEX does: the socket is told to belong to the device, which means
// nothing to what it sends.
func (r rtnl) index(name string) (int32, error) {
	if name == "" || len(name) >= unix.IFNAMSIZ { // the kernel would cut it short
		return 0, fmt.Errorf("finding the device %q: %w", name, unix.EINVAL)
	}
	err := unix.SetsockoptString(r.fd, unix.SOL_SOCKET, unix.SO_BINDTODEVICE, name)
	if errors.Is(err, unix.ENODEV) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("finding the device %s: %w", name, err)
	}
	index, err := unix.GetsockoptInt(r.fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
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

// Package nlbatch makes changes of the kernel's by netlink, many with one datagram, which the kernel works off in one system call.
//
// It needs less time and memory than netlink.NetlinkRequest.Execute does, which counts where a program is started for each pod.
package nlbatch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// batchSize bounds a batch: all that may be answered to it must have room in the socket.
const batchSize = 64

// answerSize holds an acknowledgement: a header, an error number and the header of its request, with the whole request behind it where the
// kernel refuses that. What is cut off of anything longer is not looked at.
const answerSize = 4 << 10

// answerWait is for how many seconds an answer is awaited, which the kernel gives before it returns from the request. It gives none where a
// change was interrupted.
const answerWait = 10

// Socket is a netlink socket, in the network namespace in which it was opened.
type Socket struct {
	fd      int
	answers []byte
}

// Open opens a socket of a protocol (unix.NETLINK_...) in the network namespace of the calling thread.
func Open(protocol int) (*Socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	s := &Socket{fd: fd, answers: make([]byte, answerSize)}
	if err = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: answerWait}); err != nil {
		s.Close()
		return nil, fmt.Errorf("setting up netlink: %w", err)
	}
	return s, nil
}

// Close closes the socket.
func (s *Socket) Close() { _ = unix.Close(s.fd) }

// FD is the socket's descriptor.
func (s *Socket) FD() int { return s.fd }

// Step is one change of a batch, and what to call it where it fails.
type Step struct {
	What    string
	Request *nl.NetlinkRequest
	// MayBe is an error number that is no error, or zero.
	MayBe unix.Errno
}

// Do makes the changes in their order, and returns the errors of all that failed. One that fails keeps the kernel from none
// that follow.
func (s *Socket) Do(steps ...Step) error {
	var errs []error
	for batch := range slices.Chunk(steps, batchSize) {
		errs = append(errs, s.doAtOnce(batch))
	}
	return errors.Join(errs...)
}

// doAtOnce is Do with one datagram. The kernel answers what it refuses, and the last step, when all is done.
func (s *Socket) doAtOnce(steps []Step) error {
	last := steps[len(steps)-1].Request
	last.Flags |= unix.NLM_F_ACK
	var batch []byte
	for _, step := range steps {
		batch = append(batch, step.Request.Serialize()...)
		batch = append(batch, make([]byte, (4-len(batch)%4)%4)...)
	}
	kernel := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
	if err := retry(func() error { return unix.Sendto(s.fd, batch, 0, kernel) }); err != nil {
		return fmt.Errorf("writing to netlink: %w", err)
	}
	var errs []error
	for done := false; !done; {
		var n int
		var from unix.Sockaddr
		err := retry(func() (err error) {
			n, from, err = unix.Recvfrom(s.fd, s.answers, 0)
			return err
		})
		if err != nil {
			return errors.Join(append(errs, fmt.Errorf("reading from netlink: %w", err))...)
		}
		if sender, ok := from.(*unix.SockaddrNetlink); !ok || sender.Pid != 0 {
			continue // not from the kernel
		}
		for seq, number := range acknowledgements(s.answers[:n]) {
			at := slices.IndexFunc(steps, func(step Step) bool { return step.Request.Seq == seq })
			if at >= 0 && number != 0 && number != steps[at].MayBe {
				errs = append(errs, fmt.Errorf("%s: %w", steps[at].What, number))
			}
			done = done || seq == last.Seq
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
			if length < unix.SizeofNlMsghdr {
				return
			}
			kind, seq := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint32(b[8:])
			if kind == unix.NLMSG_ERROR && min(int(length), len(b)) >= unix.SizeofNlMsghdr+4 {
				number := -int32(binary.NativeEndian.Uint32(b[unix.SizeofNlMsghdr:])) //nolint:gosec // a negative error number
				if !yield(seq, unix.Errno(number)) {                                  //nolint:gosec // positive
					return
				}
			}
			b = b[min((int(length)+3)&^3, len(b)):]
		}
	}
}

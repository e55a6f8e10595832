// Package nlbatch talks with the kernel by netlink: many changes with one datagram, which the kernel works off in one system call.
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

// room is what is received at once at most: more than the kernel hands out of a listing, or sends back with a refusal. Only what is used of
// it takes memory.
const room = 64 << 10

// answerWait is for how many seconds an answer is awaited, which the kernel gives before it returns from the request, or from the call that
// asks for more of a listing. It gives none where a change was interrupted.
const answerWait = 10

// Socket is a netlink socket, in the network namespace in which it was opened.
type Socket struct {
	fd      int
	answers []byte
	seq     uint32
}

// Open opens a socket of a protocol (unix.NETLINK_...) in the network namespace of the calling thread. It is connected to the kernel, so
// that nobody else can answer.
func Open(protocol int) (*Socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
	if err != nil {
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	s := &Socket{fd: fd, answers: make([]byte, room)}
	err = errors.Join(
		unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: answerWait}))
	if err != nil {
		s.Close()
		return nil, fmt.Errorf("setting up netlink: %w", err)
	}
	return s, nil
}

// Close closes the socket.
func (s *Socket) Close() { _ = unix.Close(s.fd) }

// FD is the socket's descriptor.
func (s *Socket) FD() int { return s.fd }

// Answer is one answer of the kernel's.
type Answer struct {
	// Seq is the sequence number of what it answers.
	Seq uint32
	// Errno is that of what was refused, or broken off; else zero.
	Errno unix.Errno
	// Data is what was asked for, or a part of a listing, valid until the next answer comes. It is nil in what only says how something
	// ended.
	Data []byte
}

// Converse sends messages with the sequence numbers from first to last, of which the last is to be acknowledged or asks for a listing, and
// hands over what the kernel answers to them until that is answered. What answers an earlier request that was given up is passed over.
func (s *Socket) Converse(messages []byte, first, last uint32, handle func(Answer)) error {
	if err := retry(func() error { return unix.Send(s.fd, messages, 0) }); err != nil {
		return fmt.Errorf("writing to netlink: %w", err)
	}
	for {
		var n int
		err := retry(func() (err error) {
			n, err = unix.Read(s.fd, s.answers)
			return err
		})
		if err != nil {
			return fmt.Errorf("reading from netlink: %w", err)
		}
		if done, err := parse(s.answers[:n], first, last, handle); done || err != nil {
			return err
		}
	}
}

// parse goes through the messages of one datagram (struct nlmsghdr and struct nlmsgerr of linux/netlink.h), and says whether the answer to
// the last request was among them. Of an answer with an error number no more is needed, so that it may be cut off.
func parse(datagram []byte, first, last uint32, handle func(Answer)) (done bool, err error) {
	for len(datagram) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(datagram))
		typ, seq := binary.NativeEndian.Uint16(datagram[4:]), binary.NativeEndian.Uint32(datagram[8:])
		data := datagram[unix.SizeofNlMsghdr:max(min(size, len(datagram)), unix.SizeofNlMsghdr)]
		numbered := (typ == unix.NLMSG_ERROR || typ == unix.NLMSG_DONE) && len(data) >= 4
		if size < unix.SizeofNlMsghdr || size > len(datagram) && !numbered {
			return false, fmt.Errorf("reading from netlink: a message of %d bytes in %d", size, len(datagram))
		}
		datagram = datagram[min((size+3)&^3, len(datagram)):]
		if seq-first > last-first {
			continue
		}
		answer := Answer{Seq: seq}
		switch {
		case numbered:
			answer.Errno = unix.Errno(-int32(binary.NativeEndian.Uint32(data))) //nolint:gosec // a negative error number
		case typ == unix.NLMSG_DONE:
		default:
			answer.Data = data
		}
		handle(answer)
		done = done || seq == last && answer.Data == nil
	}
	return done, nil
}

// retry does a system call again that a signal interrupted.
func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// Step is one change of a batch, and what to call it where it fails.
type Step struct {
	What    string
	Request *nl.NetlinkRequest
	// MayBe is an error number that is no error, or zero.
	MayBe unix.Errno
}

// batchSize bounds a batch: all that may be answered to it must have room in the socket.
const batchSize = 64

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
	steps[len(steps)-1].Request.Flags |= unix.NLM_F_ACK
	first := s.seq + 1
	var batch []byte
	for _, step := range steps {
		s.seq++
		step.Request.Seq = s.seq
		batch = append(batch, step.Request.Serialize()...)
		batch = append(batch, make([]byte, (4-len(batch)%4)%4)...)
	}
	var errs []error
	err := s.Converse(batch, first, s.seq, func(a Answer) {
		if step := steps[a.Seq-first]; a.Errno != 0 && a.Errno != step.MayBe {
			errs = append(errs, fmt.Errorf("%s: %w", step.What, a.Errno))
		}
	})
	return errors.Join(append(errs, err)...)
}

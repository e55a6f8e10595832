package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// socket is a netlink socket to netfilter that is kept open: to make one takes longer than most changes. It belongs to the network
// namespace that it was made in, and is closed when nobody can use it any more.
type socket struct {
	mu  sync.Mutex
	fd  int
	seq uint32
	// messages are those that wait to be sent, from the one with the number first; the last one begins at last. buffer is for what is
	// received. Both are used again.
	messages, buffer []byte
	first            uint32
	last             int
}

// answerWait is how long the kernel may take to answer; a listing comes in parts, each in this time.
const answerWait = 60

// openSocket makes a socket in the network namespace of the calling thread.
func openSocket() (*socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("opening a netlink socket: %w", err)
	}
	s := &socket{fd: fd, buffer: make([]byte, 1<<16)}
	runtime.AddCleanup(s, func(fd int) { _ = unix.Close(fd) }, fd)
	err = errors.Join(
		unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}),
		unix.Connect(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}), // to the kernel: nobody else can answer
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: answerWait}))
	if err != nil {
		return nil, fmt.Errorf("setting up a netlink socket: %w", err)
	}
	return s, nil
}

// begin starts a message behind those that wait to be sent. What is appended to s.messages then belongs to it.
func (s *socket) begin(typ, flags int) {
	s.end()
	s.seq++
	if s.last = len(s.messages); s.last == 0 {
		s.first = s.seq
	}
	b := binary.NativeEndian.AppendUint32(s.messages, 0)   // the length, which end fills in
	b = binary.NativeEndian.AppendUint16(b, uint16(typ))   //nolint:gosec // a constant
	b = binary.NativeEndian.AppendUint16(b, uint16(flags)) //nolint:gosec // constants
	b = binary.NativeEndian.AppendUint32(b, s.seq)
	s.messages = binary.NativeEndian.AppendUint32(b, 0) // the kernel knows whose socket it is
}

// end completes the last message.
func (s *socket) end() {
	if m := s.messages[s.last:]; len(m) > 0 {
		binary.NativeEndian.PutUint32(m, uint32(len(m))) //nolint:gosec // bounded by maxMembers
	}
}

// discard drops the messages that wait to be sent.
func (s *socket) discard() { s.messages, s.last = s.messages[:0], 0 }

// exchange sends all messages together and hands over the answers; a slice is valid only until handle returns. The kernel takes the
// messages one after the other, so that only the last has to be acknowledged: it answers the others where it refuses them. The
// error is the first refusal's, a syscall.Errno, or that of the socket.
func (s *socket) exchange(handle func([]byte)) error {
	defer s.discard()
	if len(s.messages) == 0 {
		return nil
	}
	s.acknowledge()
	return s.converse(handle)
}

// acknowledge completes the last message and has it acknowledged.
func (s *socket) acknowledge() {
	s.end()
	flags := s.messages[s.last+6:]
	binary.NativeEndian.PutUint16(flags, binary.NativeEndian.Uint16(flags)|unix.NLM_F_ACK)
}

// converse sends the messages and goes through the answers until that to the last one.
func (s *socket) converse(handle func([]byte)) error {
	if _, err := unix.Write(s.fd, s.messages); err != nil {
		return fmt.Errorf("asking the kernel: %w", err)
	}
	var refusal error
	for {
		n, err := unix.Read(s.fd, s.buffer)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("waiting for the kernel's answer: %w", err)
		}
		done, err := s.answers(s.buffer[:n], handle)
		if refusal == nil {
			refusal = err
		}
		if done {
			return refusal
		}
	}
}

// answers goes through the messages of one datagram, and says whether the last answer was among them and what was refused first.
// What answers an earlier request that was given up is passed over.
func (s *socket) answers(datagram []byte, handle func([]byte)) (done bool, err error) {
	for len(datagram) >= unix.SizeofNlMsghdr {
		size := int(binary.NativeEndian.Uint32(datagram))
		if size < unix.SizeofNlMsghdr || size > len(datagram) {
			return true, fmt.Errorf("reading the kernel's answer: a message of %d bytes in %d", size, len(datagram))
		}
		typ, seq := binary.NativeEndian.Uint16(datagram[4:]), binary.NativeEndian.Uint32(datagram[8:])
		data := datagram[unix.SizeofNlMsghdr:size]
		datagram = datagram[min((size+3)&^3, len(datagram)):]
		switch {
		case seq-s.first > s.seq-s.first:
		case typ == unix.NLMSG_DONE:
			done = true
		case typ == unix.NLMSG_ERROR && len(data) >= 4:
			done = done || seq == s.seq
			if errno := -int32(binary.NativeEndian.Uint32(data)); errno != 0 && err == nil { //nolint:gosec // an errno is negative there
				err = syscall.Errno(errno) //nolint:gosec // and positive here
			}
		default:
			handle(data)
		}
	}
	return done, err
}

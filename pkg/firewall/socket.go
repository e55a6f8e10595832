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
	// message and buffer are what is sent and received; both are used again.
	message, buffer []byte
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
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: answerWait}))
	if err != nil {
		return nil, fmt.Errorf("setting up a netlink socket: %w", err)
	}
	return s, nil
}

// request sends a message and hands over the answers; a slice is valid only until handle returns. The error is a syscall.Errno
// where the kernel answers with one.
func (s *socket) request(cmd, flags int, payload []byte, handle func([]byte)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.seq++
	b := binary.NativeEndian.AppendUint32(s.message[:0], uint32(unix.SizeofNlMsghdr+len(payload))) //nolint:gosec // bounded by maxBatch
	b = binary.NativeEndian.AppendUint16(b, uint16(cmd))                                           //nolint:gosec // a constant
	b = binary.NativeEndian.AppendUint16(b, uint16(flags))                                         //nolint:gosec // constants
	b = binary.NativeEndian.AppendUint32(b, s.seq)
	b = binary.NativeEndian.AppendUint32(b, 0) // the kernel knows whose socket it is
	b = append(b, payload...)
	s.message = b
	if err := unix.Sendto(s.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("asking the kernel: %w", err)
	}
	for {
		n, _, err := unix.Recvfrom(s.fd, s.buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("waiting for the kernel's answer: %w", err)
		}
		done, err := s.answers(s.buffer[:n], handle)
		if done || err != nil {
			return err
		}
	}
}

// answers goes through the messages of one datagram and says whether the last answer was among them. What answers an earlier
// request that was given up is passed over.
func (s *socket) answers(datagram []byte, handle func([]byte)) (done bool, err error) {
	messages, err := syscall.ParseNetlinkMessage(datagram)
	if err != nil {
		return false, fmt.Errorf("reading the kernel's answer: %w", err)
	}
	for _, m := range messages {
		switch {
		case m.Header.Seq != s.seq:
		case m.Header.Type == unix.NLMSG_DONE:
			return true, nil
		case m.Header.Type == unix.NLMSG_ERROR && len(m.Data) >= 4:
			if errno := -int32(binary.NativeEndian.Uint32(m.Data)); errno != 0 { //nolint:gosec // an errno is negative there
				return true, syscall.Errno(errno) //nolint:gosec // and positive here
			}
			return true, nil
		default:
			handle(m.Data)
		}
	}
	return false, nil
}

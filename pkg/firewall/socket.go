package firewall

import (
	"encoding/binary"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/nlbatch"
)

// socket is a netlink socket to netfilter that is kept open: to make one takes longer than most changes. It belongs to the network
// namespace that it was made in, and is closed when nobody can use it any more.
type socket struct {
	mu     sync.Mutex
	kernel *nlbatch.Socket
	seq    uint32
	// messages are those that wait to be sent, from the one with the number first; the last one begins at last. It is used again.
	messages []byte
	first    uint32
	last     int
}

// openSocket makes a socket in the network namespace of the calling thread.
func openSocket() (*socket, error) {
	kernel, err := nlbatch.Open(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, err
	}
	s := &socket{kernel: kernel}
	runtime.AddCleanup(s, (*nlbatch.Socket).Close, kernel)
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
// error is the first refusal's, a unix.Errno, or that of the socket.
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
	var refusal unix.Errno
	err := s.kernel.Converse(s.messages, s.first, s.seq, func(a nlbatch.Answer) {
		switch {
		case a.Data != nil:
			handle(a.Data)
		case refusal == 0:
			refusal = a.Errno
		}
	})
	if err == nil && refusal != 0 {
		return refusal
	}
	return err
}

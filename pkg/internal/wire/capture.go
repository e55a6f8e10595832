package wire

import (
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// receiveBuffer is large enough for everything that arrives while the reader waits for a processor.
const receiveBuffer = 64 << 20

// frameSize is the largest frame: a packet of 64 KiB that a link took from one machine's kernel in one piece.
const frameSize = 64<<10 + ethernetHeader

// Capture counts what passes a link until it is stopped.
type Capture struct {
	watch  Watch
	socket *os.File
	counts Counts
	err    error
	done   chan struct{}
}

// Start begins to count on a link of the calling thread's network namespace. On a bridge it sees what passes from port
// to port, too. It needs CAP_NET_RAW and CAP_NET_ADMIN.
func Start(link string, watch Watch) (*Capture, error) {
	if len(watch.Marker) < 16 {
		return nil, errors.New("starting a capture: the marker is shorter than 16 bytes")
	}
	socket, err := listen(link)
	if err != nil {
		return nil, fmt.Errorf("capturing on %s: %w", link, err)
	}
	c := &Capture{watch: watch, socket: socket, done: make(chan struct{})}
	go c.read()
	return c, nil
}

// listen opens a packet socket on a link.
func listen(link string) (*os.File, error) {
	found, err := net.InterfaceByName(link)
	if err != nil {
		return nil, err
	}
	// Protocol 0 receives nothing: no packet of another link comes in before the socket is bound to this one.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	err = errors.Join(
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer),
		// A bridge hands its own device what it forwards between ports only while that device is promiscuous.
		unix.SetsockoptPacketMreq(fd, unix.SOL_PACKET, unix.PACKET_ADD_MEMBERSHIP,
			&unix.PacketMreq{Ifindex: int32(found.Index), Type: unix.PACKET_MR_PROMISC}), //nolint:gosec // the kernel's own number, 32 bits there
		unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL), Ifindex: found.Index}),
	)
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "capture on "+link), nil
}

// networkOrder swaps the bytes of a number; all machines that Warren supports are little-endian.
func networkOrder(n uint16) uint16 { return n<<8 | n>>8 }

// read counts until Stop sets a deadline.
func (c *Capture) read() {
	defer close(c.done)
	frame := make([]byte, frameSize)
	for {
		n, err := c.socket.Read(frame)
		if err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				c.err = err
			}
			return
		}
		c.counts.add(frame[:n], c.watch)
	}
}

// Stop ends the capture and returns the counts of everything that had passed before. Where the kernel dropped packets the
// counts prove nothing: that is an error.
func (c *Capture) Stop() (Counts, error) {
	err := c.socket.SetReadDeadline(time.Unix(1, 0)) // long past: ends the reader, whatever is still queued
	<-c.done
	err = errors.Join(err, c.err, c.finish(), c.socket.Close())
	if err != nil {
		return c.counts, fmt.Errorf("stopping a capture: %w", err)
	}
	return c.counts, nil
}

// finish counts what is still queued, and asks the kernel whether it had to drop packets.
func (c *Capture) finish() error {
	raw, err := c.socket.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = errors.Join(c.drain(int(fd)), dropped(int(fd))) })
	return errors.Join(err, inner)
}

// drain counts frames until none is left.
func (c *Capture) drain(fd int) error {
	frame := make([]byte, frameSize)
	for {
		n, err := unix.Read(fd, frame)
		if errors.Is(err, unix.EAGAIN) {
			return nil
		}
		if err != nil {
			return err
		}
		c.counts.add(frame[:n], c.watch)
	}
}

// dropped returns an error when packets found no room in the socket's buffer.
func dropped(fd int) error {
	statistics, err := unix.GetsockoptTpacketStats(fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return err
	}
	if statistics.Drops > 0 {
		return fmt.Errorf("the kernel dropped %d packets that were not counted", statistics.Drops)
	}
	return nil
}

package capture

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// receiveBuffer is room for what arrives while the reader waits for a processor: a third of a second at 1 Gbit/s in packets of 1500
// bytes, because the kernel charges a packet as a whole however little of it is read.
const receiveBuffer = 64 << 20

// Capture counts what passes the node's uplinks until it is stopped.
type Capture struct {
	socket *os.File
	links  *links
	judge  *judge
	report Report
	frame  []byte
	err    error
	done   chan struct{}
}

// Start begins to count, in the network namespace of the calling thread.
func Start(w Watch) (*Capture, error) {
	if len(w.Marker) < 16 {
		return nil, errors.New("capturing: the marker is shorter than 16 bytes")
	}
	handle, err := netlinksafe.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("capturing: opening a socket to the kernel: %w", err)
	}
	c := &Capture{links: newLinks(handle), judge: newJudge(w), frame: make([]byte, snap), done: make(chan struct{})}
	if err := c.open(w); err != nil {
		handle.Close()
		return nil, fmt.Errorf("capturing on the node's links: %w", err)
	}
	go c.read()
	return c, nil
}

// open opens the packet socket.
func (c *Capture) open(w Watch) error {
	excluded, err := c.links.inside()
	if err != nil {
		return err
	}
	// With protocol 0 nothing comes in before the filter stands.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: it takes the capability NET_RAW, as root and the daemon's container have it", err)
	}
	if err != nil {
		return err
	}
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
		// Without NET_ADMIN it gets what there is, and is told of every packet that is dropped.
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
	err = attach(fd, filter(w, excluded))
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: networkOrder(unix.ETH_P_ALL)})
	}
	if err != nil {
		return errors.Join(err, unix.Close(fd))
	}
	c.socket = os.NewFile(uintptr(fd), "capture")
	return nil
}

// attach makes a program the filter of a socket.
func attach(fd int, program []bpf.Instruction) error {
	raw, err := bpf.Assemble(program)
	if err != nil {
		return fmt.Errorf("assembling the filter: %w", err)
	}
	code := make([]unix.SockFilter, len(raw))
	for i, r := range raw {
		code[i] = unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K}
	}
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]}) //nolint:gosec // bounded by the kernel's 4096
	if err != nil {
		return fmt.Errorf("attaching the filter: %w", err)
	}
	return nil
}

// networkOrder swaps the bytes of a number; all machines that Warren supports are little-endian.
func networkOrder(n uint16) uint16 { return n<<8 | n>>8 }

// read counts until Stop sets a deadline.
func (c *Capture) read() {
	defer close(c.done)
	raw, err := c.socket.SyscallConn()
	if err == nil {
		err = raw.Read(func(fd uintptr) bool {
			c.err = c.drain(int(fd))
			return c.err != nil
		})
	}
	if c.err == nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.err = err
	}
}

// drain counts what is queued until nothing is left.
func (c *Capture) drain(fd int) error {
	for {
		n, from, err := unix.Recvfrom(fd, c.frame, 0)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENETDOWN): // a link went down
			continue
		case err != nil:
			return err
		}
		if sender, ok := from.(*unix.SockaddrLinklayer); ok {
			c.count(c.frame[:n], sender)
		}
	}
}

// count counts a frame on the link that it comes from, unless that is one inside the node.
func (c *Capture) count(frame []byte, from *unix.SockaddrLinklayer) {
	link, known := c.links.find(from.Ifindex)
	switch {
	case !known:
		c.report.Unjudged++
	case link != nil && !c.judge.add(link, frame, from.Hatype == unix.ARPHRD_ETHER, from.Pkttype == unix.PACKET_OUTGOING):
		c.report.Unjudged++
	}
}

// Stop ends the capture and returns what had passed before.
func (c *Capture) Stop() (Report, error) {
	err := c.socket.SetReadDeadline(time.Unix(1, 0)) // long past: it ends the reader
	<-c.done
	err = errors.Join(err, c.err, c.finish(), c.socket.Close())
	c.links.handle.Close()
	if err != nil {
		return Report{}, fmt.Errorf("capturing on the node's links: %w", err)
	}
	c.report.Remotes = c.judge.remotes
	for _, link := range c.links.seen {
		if link != nil {
			c.report.Links = append(c.report.Links, *link)
		}
	}
	slices.SortFunc(c.report.Links, func(a, b Link) int { return cmp.Compare(a.Name, b.Name) })
	return c.report, nil
}

// finish counts what is still queued while nothing more comes in, and asks the kernel how much it had to drop.
func (c *Capture) finish() error {
	raw, err := c.socket.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) {
		if inner = attach(int(fd), []bpf.Instruction{bpf.RetConstant{}}); inner != nil {
			return
		}
		if inner = c.drain(int(fd)); inner != nil {
			return
		}
		var statistics *unix.TpacketStats
		if statistics, inner = unix.GetsockoptTpacketStats(int(fd), unix.SOL_PACKET, unix.PACKET_STATISTICS); inner == nil {
			c.report.Dropped = int(statistics.Drops)
		}
	})
	return errors.Join(err, inner)
}

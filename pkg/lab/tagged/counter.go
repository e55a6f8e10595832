package tagged

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"
)

// receiveBuffer is large enough for everything that arrives while the reader waits for a processor.
const receiveBuffer = 32 << 20

// Counter counts the tagged packets that reach a network namespace by any of its links, also by those that come later.
type Counter struct {
	socket *os.File
	done   chan struct{}

	mu    sync.Mutex
	err   error
	count map[Arrival]*tally
}

// tally is what is known of one kind of arrival.
type tally struct {
	packets int
	last    time.Time
	gap     time.Duration
}

// Count begins to count in a network namespace.
func Count(netns ns.NetNS) (*Counter, error) {
	c := &Counter{done: make(chan struct{}), count: map[Arrival]*tally{}}
	err := netns.Do(func(ns.NetNS) error {
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, int(networkOrder(unix.ETH_P_ALL)))
		if err != nil {
			return err
		}
		c.socket = os.NewFile(uintptr(fd), "counter")
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer),
			unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
		)
	})
	if err != nil {
		return nil, fmt.Errorf("counting packets: %w", err)
	}
	go c.read()
	return c, nil
}

// read counts until Stop.
func (c *Counter) read() {
	defer close(c.done)
	buffer := make([]byte, 64<<10)
	for {
		n, err := c.socket.Read(buffer)
		if err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				c.mu.Lock()
				c.err = err
				c.mu.Unlock()
			}
			return
		}
		if arrival, ok := parse(buffer[:n]); ok {
			c.add(arrival, time.Now()) //nolint:forbidigo // gaps are of real time
		}
	}
}

// add counts one packet.
func (c *Counter) add(a Arrival, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.count[a]
	if t == nil {
		t = &tally{last: now}
		c.count[a] = t
	}
	t.packets++
	t.gap = max(t.gap, now.Sub(t.last))
	t.last = now
}

// Packets is how many packets have arrived of which the condition holds; nil counts all.
func (c *Counter) Packets(condition func(Arrival) bool) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	var packets int
	for a, t := range c.count {
		if condition == nil || condition(a) {
			packets += t.packets
		}
	}
	return packets
}

// Gap is the longest time between two packets of a kind, of all kinds of which the condition holds.
func (c *Counter) Gap(condition func(Arrival) bool) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	var gap time.Duration
	for a, t := range c.count {
		if condition == nil || condition(a) {
			gap = max(gap, t.gap)
		}
	}
	return gap
}

// Kinds is how many different arrivals there were of which the condition holds.
func (c *Counter) Kinds(condition func(Arrival) bool) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	var kinds int
	for a := range c.count {
		if condition == nil || condition(a) {
			kinds++
		}
	}
	return kinds
}

// Of holds for the arrivals with one of the tags.
func Of(tags ...uint32) func(Arrival) bool {
	return func(a Arrival) bool { return slices.Contains(tags, a.Tag) }
}

// Stop ends the count once everything that has arrived is counted. Where the kernel dropped packets the counts prove nothing:
// that is an error.
func (c *Counter) Stop() error {
	err := c.drain()
	err = errors.Join(err, c.socket.SetReadDeadline(time.Unix(1, 0))) // long past: ends the reader
	<-c.done
	c.mu.Lock()
	defer c.mu.Unlock()
	if err = errors.Join(err, c.err, c.socket.Close()); err != nil {
		return fmt.Errorf("ending a count: %w", err)
	}
	return nil
}

// drain counts what is still queued, and asks the kernel whether it had to drop packets.
func (c *Counter) drain() error {
	raw, err := c.socket.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	err = raw.Control(func(fd uintptr) { inner = errors.Join(c.readQueued(int(fd)), dropped(int(fd))) })
	return errors.Join(err, inner)
}

// readQueued counts until no packet is left.
func (c *Counter) readQueued(fd int) error {
	for buffer := make([]byte, 64<<10); ; {
		n, err := unix.Read(fd, buffer)
		if errors.Is(err, unix.EAGAIN) {
			return nil
		}
		if err != nil {
			return err
		}
		if arrival, ok := parse(buffer[:n]); ok {
			c.add(arrival, time.Now()) //nolint:forbidigo // gaps are of real time
		}
	}
}

// dropped returns an error when packets found no room in the socket's buffer.
func dropped(fd int) error {
	statistics, err := unix.GetsockoptTpacketStats(fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err == nil && statistics.Drops > 0 {
		err = fmt.Errorf("the kernel dropped %d packets that were not counted", statistics.Drops)
	}
	return err
}

// networkOrder swaps the bytes of a number; all machines that Warren supports are little-endian.
func networkOrder(n uint16) uint16 { return n<<8 | n>>8 }

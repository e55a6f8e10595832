package conntrack_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"
)

// tick is how often each end of a flow sends.
const tick = 20 * time.Millisecond

// flow is a connection on which both ends send all the time, or an echo whose request is repeated.
type flow struct {
	id   uint32
	kind string
	// peer is the pod at the other end from the isolated one.
	peer string

	mu sync.Mutex
	// client and server are what arrives at the two ends; an echo's server is the kernel.
	client, server arrivals
	echo           bool
	resets         []error
}

// arrivals is what arrives at one end.
type arrivals struct {
	count int
	last  time.Time
	// gap is the longest time between two since it was asked for last.
	gap time.Duration
}

// arrive notes an arrival.
func (f *flow) arrive(a *arrivals) {
	now := time.Now() //nolint:forbidigo // the time of real packets
	f.mu.Lock()
	defer f.mu.Unlock()
	if a.count > 0 {
		a.gap = max(a.gap, now.Sub(a.last))
	}
	a.count++
	a.last = now
}

// ends returns what arrived at both ends.
func (f *flow) ends() []arrivals {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.echo {
		return []arrivals{f.client}
	}
	return []arrivals{f.client, f.server}
}

// longest returns the longest gap at one of the ends, and forgets it.
func (f *flow) longest() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	gap := max(f.client.gap, f.server.gap)
	f.client.gap, f.server.gap = 0, 0
	return gap
}

// traffic are all flows, by their id.
type traffic struct {
	t       testing.TB
	flows   []*flow
	running sync.WaitGroup
	mu      sync.Mutex
	opened  []io.Closer
	over    bool
}

// newTraffic returns traffic that ends with the test.
func newTraffic(tb testing.TB) *traffic {
	tb.Helper()
	tr := &traffic{t: tb}
	tb.Cleanup(func() {
		tr.mu.Lock()
		tr.over = true
		for _, c := range tr.opened {
			_ = c.Close()
		}
		tr.mu.Unlock()
		tr.running.Wait()
	})
	return tr
}

// keep closes what was opened at the end of the test.
func (tr *traffic) keep(c io.Closer) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.opened = append(tr.opened, c)
	if tr.over {
		_ = c.Close()
	}
}

// add makes a flow.
func (tr *traffic) add(kind, peer string) *flow {
	f := &flow{id: uint32(len(tr.flows)), kind: kind, peer: peer}
	tr.flows = append(tr.flows, f)
	return f
}

// send writes a message again and again until the socket is closed.
func (tr *traffic) send(write func() error) {
	tr.running.Go(func() {
		ticker := time.NewTicker(tick)
		defer ticker.Stop()
		for ; ; <-ticker.C {
			if errors.Is(write(), net.ErrClosed) {
				return
			}
		}
	})
}

// exchange sends and reads at one end of a TCP connection.
func (tr *traffic) exchange(c net.Conn, f *flow, end *arrivals) {
	tr.send(func() error {
		_, err := c.Write(binary.BigEndian.AppendUint32(nil, f.id))
		return err
	})
	tr.running.Go(func() {
		for buffer := make([]byte, 4); ; f.arrive(end) {
			if _, err := io.ReadFull(c, buffer); err != nil {
				f.reset(err)
				return
			}
		}
	})
}

// reset notes an end that was not the test's doing.
func (f *flow) reset(err error) {
	if !errors.Is(err, net.ErrClosed) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.resets = append(f.resets, err)
	}
}

// serve answers in a pod's namespace. The first message of a connection says which flow it is.
func (tr *traffic) serve(space ns.NetNS, port uint16) error {
	var listener net.Listener
	var packets net.PacketConn
	err := space.Do(func(ns.NetNS) (err error) {
		address, config := fmt.Sprintf(":%d", port), new(net.ListenConfig)
		if listener, err = config.Listen(tr.t.Context(), "tcp", address); err == nil {
			packets, err = config.ListenPacket(tr.t.Context(), "udp", address)
		}
		return err
	})
	if err != nil {
		return err
	}
	tr.keep(listener)
	tr.keep(packets)
	tr.running.Go(func() { tr.accept(listener) })
	tr.running.Go(func() { tr.answer(packets) })
	return nil
}

func (tr *traffic) accept(listener net.Listener) {
	for {
		c, err := listener.Accept()
		if err != nil {
			return
		}
		tr.keep(c)
		first := make([]byte, 4)
		if _, err = io.ReadFull(c, first); err == nil {
			f := tr.flows[binary.BigEndian.Uint32(first)]
			tr.exchange(c, f, &f.server)
		}
	}
}

func (tr *traffic) answer(packets net.PacketConn) {
	known := map[string]bool{}
	for buffer := make([]byte, 100); ; {
		n, from, err := packets.ReadFrom(buffer)
		if err != nil || n != 4 {
			return
		}
		message := bytes.Clone(buffer[:n])
		f := tr.flows[binary.BigEndian.Uint32(message)]
		f.arrive(&f.server)
		if !known[from.String()] {
			known[from.String()] = true
			tr.send(func() error {
				_, err := packets.WriteTo(message, from)
				return err
			})
		}
	}
}

// connect opens a flow's client in a pod's namespace.
func (tr *traffic) connect(ctx context.Context, space ns.NetNS, f *flow, network string, to netip.AddrPort) error {
	var c net.Conn
	err := space.Do(func(ns.NetNS) (err error) {
		c, err = new(net.Dialer).DialContext(ctx, network, to.String())
		return err
	})
	if err != nil {
		return fmt.Errorf("opening %s to %s: %w", f.kind, to, err)
	}
	tr.keep(c)
	if network == "tcp" {
		tr.exchange(c, f, &f.client)
		return nil
	}
	tr.send(func() error {
		_, err := c.Write(binary.BigEndian.AppendUint32(nil, f.id))
		return err
	})
	tr.running.Go(func() {
		for buffer := make([]byte, 100); ; {
			_, err := c.Read(buffer)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				f.arrive(&f.client)
			}
		}
	})
	return nil
}

// ping sends echo requests of one identifier from a pod's namespace.
func (tr *traffic) ping(space ns.NetNS, f *flow, to netip.Addr) error {
	f.echo = true
	family, protocol, request := unix.AF_INET, unix.IPPROTO_ICMP, byte(8)
	if to.Is6() {
		family, protocol, request = unix.AF_INET6, unix.IPPROTO_ICMPV6, 128
	}
	var c net.PacketConn
	err := space.Do(func(ns.NetNS) error {
		if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 0"), 0); err != nil {
			return err
		}
		fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
		if err != nil {
			return err
		}
		file := os.NewFile(uintptr(fd), "ping")
		c, err = net.FilePacketConn(file)
		return errors.Join(err, file.Close())
	})
	if err != nil {
		return err
	}
	tr.keep(c)
	tr.send(func() error {
		_, err := c.WriteTo([]byte{request, 0, 0, 0, 0, 0, 0, 1}, &net.UDPAddr{IP: to.AsSlice()})
		return err
	})
	tr.running.Go(func() {
		for buffer := make([]byte, 100); ; {
			_, _, err := c.ReadFrom(buffer)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				f.arrive(&f.client)
			}
		}
	})
	return nil
}

package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
)

// heldPort is where the servers of held connections listen.
const heldPort = 8090

// heldPause is the longest that nothing may come back on a held connection, on a busy machine.
var heldPause = soak.Patience(2 * time.Second)

// held is a connection that a client keeps asking on, over TCP or UDP.
type held struct {
	name   string
	socket net.Conn
	// answers is how many came back, and pause the longest time between two.
	answers, pause atomic.Int64
	// last is when the last one came.
	last atomic.Pointer[time.Time]
	// broken is why the connection ended; read it once ended is closed.
	broken error
	ended  chan struct{}
}

// hold opens connections between two pods, each way, over TCP and UDP of both families, and keeps them busy until the test ends.
func (s *stage) hold(a, b *lab.Pod) (all []*held) {
	s.t.Helper()
	for _, ends := range [][2]*lab.Pod{{a, b}, {b, a}} {
		if err := heldServer(s.t, ends[1].Netns()); err != nil {
			s.t.Fatal(err)
		}
		for _, address := range ends[1].Addresses {
			for _, network := range []string{"tcp", "udp"} {
				h := &held{name: fmt.Sprintf("%s from %s to %s", network, ends[0].Name, address), ended: make(chan struct{})}
				err := ends[0].Netns().Do(func(ns.NetNS) (err error) {
					h.socket, err = new(net.Dialer).DialContext(s.t.Context(), network, netip.AddrPortFrom(address, heldPort).String())
					return err
				})
				if err != nil {
					s.t.Fatal(err)
				}
				go h.run()
				s.t.Cleanup(func() {
					_ = h.socket.Close()
					<-h.ended
				})
				all = append(all, h)
			}
		}
	}
	for _, h := range all {
		s.eventually(func() error {
			if h.answers.Load() == 0 {
				return errNothing
			}
			return nil
		})
	}
	return all
}

// heldServer returns what it gets, over TCP and UDP, until the test ends.
func heldServer(t *testing.T, netns ns.NetNS) error {
	return netns.Do(func(ns.NetNS) error {
		listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", fmt.Sprintf(":%d", heldPort))
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = listener.Close() })
		socket, err := new(net.ListenConfig).ListenPacket(t.Context(), "udp", fmt.Sprintf(":%d", heldPort))
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = socket.Close() })
		go func() {
			for {
				connection, err := listener.Accept()
				if err != nil {
					return
				}
				go func() { _, _ = io.Copy(connection, connection) }() // until the client leaves
			}
		}()
		go func() {
			for buffer := make([]byte, lab.MarkerSize); ; {
				n, from, err := socket.ReadFrom(buffer)
				if err != nil {
					return
				}
				_, _ = socket.WriteTo(buffer[:n], from)
			}
		}()
		return nil
	})
}

// run asks every 20 ms until the socket is closed or broken. A datagram that gets lost breaks nothing.
func (h *held) run() {
	defer close(h.ended)
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	buffer := make([]byte, lab.MarkerSize)
	for h.answered(); ; <-ticker.C {
		patience := 30 * time.Second // longer than anybody waits: a connection of TCP repeats what gets lost
		if h.socket.LocalAddr().Network() == "udp" {
			patience = 200 * time.Millisecond
		}
		_ = h.socket.SetDeadline(now().Add(patience))
		_, err := h.socket.Write(marker[:])
		if err == nil {
			_, err = io.ReadFull(h.socket, buffer)
		}
		switch {
		case err == nil:
			h.pause.Store(max(h.pause.Load(), int64(time.Since(*h.last.Load()))))
			h.answered()
			h.answers.Add(1)
		case errors.Is(err, net.ErrClosed):
			return
		case !errors.Is(err, os.ErrDeadlineExceeded) || patience > time.Second:
			h.broken = err
			return
		}
	}
}

// answered notes the time.
func (h *held) answered() {
	last := now()
	h.last.Store(&last)
}

// lost is an error where the connection broke, or nothing came back on it for too long.
func (h *held) lost() error {
	select {
	case <-h.ended:
		return fmt.Errorf("%s: %w", h.name, h.broken)
	default:
	}
	if pause := max(time.Duration(h.pause.Load()), time.Since(*h.last.Load())); pause > heldPause {
		return fmt.Errorf("%s: nothing came back for %v", h.name, pause)
	}
	return nil
}

// lost joins the errors of connections that were lost.
func lost(all []*held) (errs []error) {
	for _, h := range all {
		if err := h.lost(); err != nil {
			errs = append(errs, err)
		}
	}
	return errs
}

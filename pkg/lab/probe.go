package lab

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"

	"github.com/containernetworking/plugins/pkg/ns"
)

// MarkerSize is the length of the payload of a probe.
const MarkerSize = 32

// NewMarker returns a random payload: what carries it on the wire is a probe in clear, and nothing else can be.
func NewMarker() [MarkerSize]byte {
	var marker [MarkerSize]byte
	_, _ = rand.Read(marker[:]) // never fails, as documented
	return marker
}

// Echo is a TCP server in a network namespace that returns each marker it gets, on all addresses of both families.
type Echo struct {
	listener net.Listener
}

// NewEcho starts a server in a network namespace.
func NewEcho(ctx context.Context, netns ns.NetNS, port uint16) (*Echo, error) {
	e := &Echo{}
	err := netns.Do(func(ns.NetNS) error {
		var err error
		// The connections that a listener accepts are in its own network namespace, whoever accepts them.
		e.listener, err = new(net.ListenConfig).Listen(ctx, "tcp", fmt.Sprintf(":%d", port))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("starting a server: %w", err)
	}
	go e.serve()
	return e, nil
}

// Close stops the server.
func (e *Echo) Close() error { return e.listener.Close() }

// serve answers until the listener is closed.
func (e *Echo) serve() {
	for {
		connection, err := e.listener.Accept()
		if err != nil {
			return
		}
		go func() {
			_, _ = io.Copy(connection, connection) // a client that leaves is its own affair
			_ = connection.Close()
		}()
	}
}

// Probe sends a marker over a new TCP connection from a network namespace and waits until it comes back. An error means
// that it did not before ctx ended.
func Probe(ctx context.Context, from ns.NetNS, to netip.AddrPort, marker [MarkerSize]byte) error {
	return from.Do(func(ns.NetNS) error {
		connection, err := new(net.Dialer).DialContext(ctx, "tcp", to.String())
		if err != nil {
			return fmt.Errorf("connecting: %w", err)
		}
		return errors.Join(exchange(ctx, connection, marker), connection.Close())
	})
}

// exchange sends the marker and checks what comes back.
func exchange(ctx context.Context, connection net.Conn, marker [MarkerSize]byte) error {
	if deadline, ok := ctx.Deadline(); ok {
		if err := connection.SetDeadline(deadline); err != nil {
			return fmt.Errorf("setting the deadline of a probe: %w", err)
		}
	}
	if _, err := connection.Write(marker[:]); err != nil {
		return fmt.Errorf("sending the marker: %w", err)
	}
	var answer [MarkerSize]byte
	if _, err := io.ReadFull(connection, answer[:]); err != nil {
		return fmt.Errorf("waiting for the marker: %w", err)
	}
	if answer != marker {
		return errors.New("another answer than the marker came back")
	}
	return nil
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// packetSockets share the UDP port, so that a busy machine does not overflow the buffer of one and lose what the network
// has delivered.
const packetSockets = 16

// serve echoes what arrives at an address, over TCP and UDP, until the context ends.
func serve(ctx context.Context, address string) error {
	var plain net.ListenConfig
	listener, err := plain.Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("listening for TCP: %w", err)
	}
	sockets := []io.Closer{listener}
	shared := net.ListenConfig{Control: sharePort}
	for range packetSockets {
		packets, err := shared.ListenPacket(ctx, "udp", address)
		if err != nil {
			return errors.Join(fmt.Errorf("listening for UDP: %w", err), closeAll(sockets))
		}
		sockets = append(sockets, packets)
		go echoPackets(packets)
	}
	return serveOn(ctx, listener, sockets)
}

// sharePort lets several sockets listen on one port; the kernel keeps each flow on one of them.
func sharePort(_, _ string, raw syscall.RawConn) error {
	var inner error
	err := raw.Control(func(fd uintptr) { inner = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1) })
	return errors.Join(err, inner)
}

// serveOn echoes what comes over TCP, and closes all sockets when the context ends.
func serveOn(ctx context.Context, listener net.Listener, sockets []io.Closer) error {
	stop := context.AfterFunc(ctx, func() { _ = closeAll(sockets) })
	defer stop()
	for {
		conn, err := listener.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accepting: %w", err)
		}
		go func() {
			defer conn.Close()         //nolint:errcheck // nobody is left to tell
			_, _ = io.Copy(conn, conn) // the client sees what went wrong
		}()
	}
}

// closeAll closes sockets.
func closeAll(sockets []io.Closer) error {
	var errs []error
	for _, s := range sockets {
		errs = append(errs, s.Close())
	}
	return errors.Join(errs...)
}

// echoPackets sends each packet back until the socket is closed.
func echoPackets(packets net.PacketConn) {
	buffer := make([]byte, 64<<10)
	for {
		n, from, err := packets.ReadFrom(buffer)
		if err != nil {
			return
		}
		_, _ = packets.WriteTo(buffer[:n], from) // like the network, a datagram may be lost
	}
}

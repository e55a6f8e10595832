package main

import (
	"context"
	"fmt"
	"io"
	"net"
)

// serve echoes what arrives at an address, over TCP and UDP, until the context ends.
func serve(ctx context.Context, address string) error {
	var config net.ListenConfig
	listener, err := config.Listen(ctx, "tcp", address)
	if err != nil {
		return fmt.Errorf("listening for TCP: %w", err)
	}
	packets, err := config.ListenPacket(ctx, "udp", address)
	if err != nil {
		_ = listener.Close()
		return fmt.Errorf("listening for UDP: %w", err)
	}
	return serveOn(ctx, listener, packets)
}

// serveOn echoes on two sockets, and closes them when the context ends.
func serveOn(ctx context.Context, listener net.Listener, packets net.PacketConn) error {
	stop := context.AfterFunc(ctx, func() {
		_ = listener.Close()
		_ = packets.Close()
	})
	defer stop()
	go echoPackets(packets)
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

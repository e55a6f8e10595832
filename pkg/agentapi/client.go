package agentapi

import (
	"context"
	"fmt"
	"net"
)

// Call sends one request to the daemon that listens on socket and returns its answer. It fills in the request's version.
//
// A refusal by the daemon is returned as an *Error; every other error means that the daemon is away, too slow for ctx, or
// of another version.
func Call(ctx context.Context, socket string, req Request) (*Response, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, fmt.Errorf("reaching the daemon: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	resp, err := exchange(conn, req)
	if stop() {
		_ = conn.Close()
	} else if err != nil {
		// The connection was closed under the exchange: the reason is the context's.
		err = context.Cause(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("asking the daemon at %s to %s: %w", socket, req.Op, err)
	}
	if resp.Error != nil {
		return nil, resp.Error
	}
	if resp.Version != Version {
		return nil, fmt.Errorf("the daemon at %s speaks version %d of the protocol, this program version %d: update the older of both",
			socket, resp.Version, Version)
	}
	return resp, nil
}

// exchange sends the request and reads the response.
func exchange(conn net.Conn, req Request) (*Response, error) {
	req.Version = Version
	if err := writeMessage(conn, req); err != nil {
		return nil, fmt.Errorf("writing the request: %w", err)
	}
	resp := &Response{}
	if err := readMessage(conn, maxResponse, resp); err != nil {
		return nil, fmt.Errorf("reading the response: %w", err)
	}
	return resp, nil
}

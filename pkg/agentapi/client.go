package agentapi

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
)

// Call sends one request to the daemon that listens on socket and returns its answer. It fills in the request's version.
//
// A refusal by the daemon is returned as an *Error, and that it speaks no version of the protocol that this program does as a
// *VersionError; every other error means that the daemon is away, or too slow for ctx.
func Call(ctx context.Context, socket string, req Request) (*Response, error) {
	return spoken().call(ctx, socket, req)
}

// AskStatus asks the daemon for its status.
func AskStatus(ctx context.Context, socket string) (Status, error) {
	response, err := Call(ctx, socket, Request{Op: OpStatus})
	if err != nil {
		return Status{}, err
	}
	var status Status
	if err = json.Unmarshal(response.Status, &status); err != nil {
		return Status{}, fmt.Errorf("reading the daemon's status: %w", err)
	}
	return status, nil
}

// call is Call by a program that speaks these versions.
func (v versions) call(ctx context.Context, socket string, req Request) (*Response, error) {
	req.Version = v.newest
	resp, err := ask(ctx, socket, req)
	if err == nil && resp.Version != v.newest && v.speaks(resp.Version) {
		req.Version = resp.Version
		resp, err = ask(ctx, socket, req)
	}
	switch {
	case err != nil:
		return nil, err
	case !v.speaks(resp.Version):
		return nil, &VersionError{Client: v.newest, Daemon: resp.Version}
	case resp.Error != nil:
		return nil, resp.Error
	default:
		return resp, nil
	}
}

// ask sends the request and returns the answer, whatever it is.
func ask(ctx context.Context, socket string, req Request) (*Response, error) {
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
	return resp, nil
}

// exchange sends the request and reads the response.
func exchange(conn net.Conn, req Request) (*Response, error) {
	if err := writeMessage(conn, req); err != nil {
		return nil, fmt.Errorf("writing the request: %w", err)
	}
	resp := &Response{}
	if err := readMessage(conn, maxResponse, resp); err != nil {
		return nil, fmt.Errorf("reading the response: %w", err)
	}
	return resp, nil
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"
)

// poured is how much went through a connection in a time.
type poured struct {
	Bytes   int64         `json:"bytes"`
	Elapsed time.Duration `json:"elapsedNanoseconds"`
}

// pour sends to an echo server for a time as fast as it takes it, after a head start that does not count, and tells how much came back
// in that time.
func pour(ctx context.Context, address string, head int64, during time.Duration) (poured, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return poured{}, err
	}
	defer conn.Close() //nolint:errcheck // what came back has been counted
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	go func() {
		_, _ = io.Copy(conn, endless{}) // it ends with the connection
	}()
	if _, err = io.CopyN(io.Discard, conn, head); err != nil {
		return poured{}, fmt.Errorf("reading the first %d bytes: %w", head, err)
	}
	started := now()
	if err = conn.SetReadDeadline(started.Add(during)); err != nil {
		return poured{}, err
	}
	n, err := io.Copy(io.Discard, conn)
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		return poured{}, errors.Join(errors.New("what comes back ended early"), err)
	}
	return poured{Bytes: n, Elapsed: now().Sub(started)}, nil
}

// endless is a source of as much as one wants.
type endless struct{}

// Read fills the buffer.
func (endless) Read(p []byte) (int, error) { return len(p), nil }

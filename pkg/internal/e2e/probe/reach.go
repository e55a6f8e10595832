package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"
)

// result is what a probe of one target saw.
type result struct {
	Target  string `json:"target"`
	Reached bool   `json:"reached"`
	// Error says why it was not reached.
	Error string `json:"error,omitempty"`
	// Silent is set when nothing at all came back in time, as when packets are dropped.
	Silent bool `json:"silent,omitempty"`
}

// reachAll probes all targets at the same time.
func reachAll(ctx context.Context, marker string, timeout time.Duration, targets []string) []result {
	results := make([]result, len(targets))
	var group sync.WaitGroup
	for i, target := range targets {
		group.Go(func() {
			results[i] = result{Target: target, Reached: true}
			if err := reach(ctx, marker, timeout, target); err != nil {
				var network net.Error
				results[i] = result{
					Target: target, Error: err.Error(),
					Silent: errors.As(err, &network) && network.Timeout(),
				}
			}
		})
	}
	group.Wait()
	return results
}

// reach sends the marker to one target and waits for its echo.
func reach(ctx context.Context, marker string, timeout time.Duration, target string) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	network, address, found := strings.Cut(target, "/")
	if !found {
		return fmt.Errorf("reading target %q: say tcp/HOST:PORT or udp/HOST:PORT", target)
	}
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // the echo has been read, or has not
	deadline, _ := ctx.Deadline()
	if err = conn.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err = io.WriteString(conn, marker); err != nil {
		return err
	}
	echo := make([]byte, len(marker))
	if _, err = io.ReadFull(conn, echo); err != nil {
		return err
	}
	if string(echo) != marker {
		return fmt.Errorf("reading the echo of %s: it differs from the marker", target)
	}
	return nil
}

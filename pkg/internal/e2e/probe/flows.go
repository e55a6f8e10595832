package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// messageSize is the size of a flow's messages in bytes.
const messageSize = 64

// load is how many flows there are, and how busy each is.
type load struct {
	tcp, udp, rate int
}

// report is what the flows of one protocol saw.
type report struct {
	Flows    int `json:"flows"`
	Sent     int `json:"sent"`
	Received int `json:"received"`
	// Errors are flows that ended before they were told to, and UDP messages that the network refused.
	Errors     int    `json:"errors"`
	FirstError string `json:"firstError,omitempty"`
	// LongestGap is the longest time that any flow waited for its next message.
	LongestGap time.Duration `json:"longestGapNanoseconds"`
}

// add counts another flow in.
func (r *report) add(other report) {
	r.Flows += other.Flows
	r.Sent += other.Sent
	r.Received += other.Received
	r.Errors += other.Errors
	if r.FirstError == "" {
		r.FirstError = other.FirstError
	}
	r.LongestGap = max(r.LongestGap, other.LongestGap)
}

// keepFlows opens flows to an echo server and says "established" when each has had an echo. It keeps them busy until in
// ends, then writes a report for each protocol.
func keepFlows(ctx context.Context, load load, address string, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	flows, err := openFlows(ctx, load, address)
	if err != nil {
		return err
	}
	if _, err = fmt.Fprintln(out, "established"); err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, in) // the end is all that matters, however it comes
		cancel()
	}()
	var group sync.WaitGroup
	for _, f := range flows {
		group.Go(func() { f.keep(ctx, time.Second/time.Duration(load.rate)) })
	}
	group.Wait()
	reports := map[string]*report{"tcp": {}, "udp": {}}
	for _, f := range flows {
		reports[f.network].add(f.report)
	}
	return json.NewEncoder(out).Encode(reports)
}

// openFlows connects all flows and waits for an echo on each, so that all are established.
func openFlows(ctx context.Context, load load, address string) ([]*flow, error) {
	var flows []*flow
	var dialer net.Dialer
	for i := range load.tcp + load.udp {
		f := &flow{network: "tcp", report: report{Flows: 1}}
		if i >= load.tcp {
			f.network = "udp"
		}
		var err error
		if f.conn, err = dialer.DialContext(ctx, f.network, address); err != nil {
			return nil, fmt.Errorf("opening %s flow %d: %w", f.network, i, err)
		}
		if err = f.greet(); err != nil {
			return nil, fmt.Errorf("waiting for the first echo of %s flow %d: %w", f.network, i, err)
		}
		flows = append(flows, f)
	}
	return flows, nil
}

// flow is one connection to the echo server. The writer owns Sent, the reader everything else of the report.
type flow struct {
	network string
	conn    net.Conn
	report  report
}

// greet sends one message and waits for its echo.
func (f *flow) greet() error {
	message := make([]byte, messageSize)
	if err := f.conn.SetDeadline(now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := f.conn.Write(message); err != nil {
		return err
	}
	if _, err := io.ReadFull(f.conn, message); err != nil {
		return err
	}
	return f.conn.SetDeadline(time.Time{})
}

// keep sends at an interval and reads the echoes until the context ends.
func (f *flow) keep(ctx context.Context, interval time.Duration) {
	stop := context.AfterFunc(ctx, func() { _ = f.conn.Close() })
	defer stop()
	var writer sync.WaitGroup
	writer.Go(func() { f.write(ctx, interval) })
	f.read(ctx)
	writer.Wait()
}

// write sends a message at each tick. What goes wrong shows in read: no echo, or an error there.
func (f *flow) write(ctx context.Context, interval time.Duration) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	message := make([]byte, messageSize)
	for {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if _, err := f.conn.Write(message); err == nil {
			f.report.Sent++
		}
	}
}

// read counts echoes and measures the silences between them, the last one up to the end included.
func (f *flow) read(ctx context.Context) {
	message := make([]byte, messageSize)
	last := now()
	for {
		_, err := io.ReadFull(f.conn, message)
		arrived := now()
		f.report.LongestGap = max(f.report.LongestGap, arrived.Sub(last))
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			f.report.Received++
			last = arrived
		default:
			f.report.Errors++
			f.report.FirstError = err.Error()
			if f.network == "tcp" || errors.Is(err, net.ErrClosed) {
				_ = f.conn.Close()
				return
			}
		}
	}
}

// now is the clock.
func now() time.Time {
	return time.Now() //nolint:forbidigo // the one place where this program reads the clock
}

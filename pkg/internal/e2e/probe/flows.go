package main

import (
	"bufio"
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

// load is how many flows there are to each address, and how busy each is.
type load struct {
	tcp, udp, rate int
	addresses      []string
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
	// Silent and Heard are when a message last came on the flow that has been silent for longest, and on any flow.
	Silent time.Time `json:"silent"`
	Heard  time.Time `json:"heard"`
}

// add counts another flow in.
func (r *report) add(other report) {
	if r.Flows == 0 || other.Silent.Before(r.Silent) {
		r.Silent = other.Silent
	}
	if other.Heard.After(r.Heard) {
		r.Heard = other.Heard
	}
	r.Flows += other.Flows
	r.Sent += other.Sent
	r.Received += other.Received
	r.Errors += other.Errors
	if r.FirstError == "" {
		r.FirstError = other.FirstError
	}
	r.LongestGap = max(r.LongestGap, other.LongestGap)
}

// keepFlows opens flows to echo servers and says "established" when each has had an echo. It keeps them busy until in
// ends, and writes a report for each protocol at each line of in and at its end.
func keepFlows(ctx context.Context, load load, in io.Reader, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	flows, err := openFlows(ctx, load)
	if err != nil {
		return err
	}
	if _, err = fmt.Fprintln(out, "established"); err != nil {
		return err
	}
	var group sync.WaitGroup
	for _, f := range flows {
		group.Go(func() { f.keep(ctx, time.Second/time.Duration(load.rate)) })
	}
	for lines := bufio.NewScanner(in); lines.Scan(); { // the end is all that matters, however it comes
		if err = writeReports(out, flows); err != nil {
			return err
		}
	}
	cancel()
	group.Wait()
	return writeReports(out, flows)
}

// writeReports writes what the flows have seen so far.
func writeReports(out io.Writer, flows []*flow) error {
	reports := map[string]*report{"tcp": {}, "udp": {}}
	for _, f := range flows {
		reports[f.network].add(f.soFar())
	}
	return json.NewEncoder(out).Encode(reports)
}

// openFlows connects all flows and waits for an echo on each, so that all are established.
func openFlows(ctx context.Context, load load) ([]*flow, error) {
	var flows []*flow
	var dialer net.Dialer
	for _, address := range load.addresses {
		for i := range load.tcp + load.udp {
			f := &flow{network: "tcp", report: report{Flows: 1}}
			if i >= load.tcp {
				f.network = "udp"
			}
			var err error
			if f.conn, err = dialer.DialContext(ctx, f.network, address); err != nil {
				return nil, fmt.Errorf("opening %s flow %d to %s: %w", f.network, i, address, err)
			}
			if err = f.greet(); err != nil {
				return nil, fmt.Errorf("waiting for the first echo of %s flow %d to %s: %w", f.network, i, address, err)
			}
			flows = append(flows, f)
		}
	}
	return flows, nil
}

// flow is one connection to the echo server.
type flow struct {
	network string
	conn    net.Conn

	mu     sync.Mutex
	report report
}

// note changes the report.
func (f *flow) note(change func(r *report)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.report)
}

// soFar returns the report, with the present silence in it.
func (f *flow) soFar() report {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.report
	r.LongestGap = max(r.LongestGap, now().Sub(r.Heard))
	return r
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
	f.heard(false)
	return f.conn.SetDeadline(time.Time{})
}

// heard notes that a message came; the first one is not counted, because it is not part of the load.
func (f *flow) heard(counted bool) {
	arrived := now()
	f.note(func(r *report) {
		if counted {
			r.Received++
			r.LongestGap = max(r.LongestGap, arrived.Sub(r.Heard))
		}
		r.Silent, r.Heard = arrived, arrived
	})
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
			f.note(func(r *report) { r.Sent++ })
		}
	}
}

// read counts echoes and measures the silences between them.
func (f *flow) read(ctx context.Context) {
	message := make([]byte, messageSize)
	for {
		_, err := io.ReadFull(f.conn, message)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			f.heard(true)
		default:
			f.note(func(r *report) { r.Errors, r.FirstError = r.Errors+1, err.Error() })
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

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// knocker sends a marker to targets from its first instant on, and listens for the same marker itself.
type knocker struct {
	marker string
	// interval is between two knocks at a target.
	interval time.Duration
	// listen is where it listens; nowhere if empty.
	listen string
	// during is how long it knocks; until it is ended if zero.
	during time.Duration
	// more are targets that come later, one a line; none if nil.
	more io.Reader
}

// heard is what a listener prints about the first marker that came from an address over a network.
type heard struct {
	Network string `json:"network"`
	From    string `json:"from"`
}

// run knocks and listens until the context ends or, where targets come later, until no more can come.
func (k knocker) run(ctx context.Context, targets []string, out io.Writer) error {
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer cancel()
	if k.listen != "" {
		visitors := &visitors{marker: k.marker, out: json.NewEncoder(out), seen: map[heard]bool{}}
		if err := visitors.listen(ctx, k.listen); err != nil {
			return err
		}
	}
	knocking := ctx
	if k.during > 0 {
		var stop context.CancelFunc
		knocking, stop = context.WithTimeout(ctx, k.during)
		defer stop()
	}
	for _, target := range targets {
		if err := k.start(knocking, &group, target); err != nil {
			return err
		}
	}
	if k.more == nil {
		<-ctx.Done()
		return nil
	}
	lines := bufio.NewScanner(k.more)
	for lines.Scan() {
		if err := k.start(knocking, &group, lines.Text()); err != nil {
			return err
		}
	}
	return lines.Err()
}

// start begins to knock at a target.
func (k knocker) start(ctx context.Context, group *sync.WaitGroup, target string) error {
	network, address, found := strings.Cut(target, "/")
	if !found || network != "tcp" && network != "udp" {
		return fmt.Errorf("reading target %q: say tcp/HOST:PORT or udp/HOST:PORT", target)
	}
	group.Go(func() {
		ticker := time.NewTicker(k.interval)
		defer ticker.Stop()
		for ctx.Err() == nil {
			k.knock(ctx, network, address)
			select {
			case <-ctx.Done():
			case <-ticker.C:
			}
		}
	})
	return nil
}

// knock sends the marker once. A connection that is not there after an interval or two is begun anew, so that the first
// packets of connections come at the same pace as datagrams and not at that of TCP's retransmissions.
func (k knocker) knock(ctx context.Context, network, address string) {
	dialer := net.Dialer{Timeout: max(2*k.interval, 100*time.Millisecond)}
	conn, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return // the next knock may be heard
	}
	_, _ = io.WriteString(conn, k.marker)
	_ = conn.Close()
}

// visitors prints who has knocked.
type visitors struct {
	marker string

	mu   sync.Mutex
	out  *json.Encoder
	seen map[heard]bool
}

// listen hears knocks over TCP and UDP until the context ends.
func (v *visitors) listen(ctx context.Context, address string) error {
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
	context.AfterFunc(ctx, func() { _ = closeAll([]io.Closer{listener, packets}) })
	go v.hearConnections(listener)
	go v.hearPackets(packets)
	return nil
}

// hearConnections reads what comes over TCP.
func (v *visitors) hearConnections(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer conn.Close() //nolint:errcheck // what was to be heard has been heard
			text, _ := io.ReadAll(io.LimitReader(conn, int64(len(v.marker))))
			v.hear("tcp", conn.RemoteAddr(), string(text))
		}()
	}
}

// hearPackets reads what comes over UDP.
func (v *visitors) hearPackets(packets net.PacketConn) {
	buffer := make([]byte, 1<<10)
	for {
		n, from, err := packets.ReadFrom(buffer)
		if err != nil {
			return
		}
		v.hear("udp", from, string(buffer[:n]))
	}
}

// hear prints the first marker of each visitor.
func (v *visitors) hear(network string, from net.Addr, text string) {
	address, err := netip.ParseAddrPort(from.String())
	if err != nil || text != v.marker {
		return
	}
	visitor := heard{Network: network, From: address.Addr().Unmap().String()}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.seen[visitor] {
		return
	}
	v.seen[visitor] = true
	_ = v.out.Encode(visitor) // a listener whose output is gone is of no use, and the test misses what it heard
}

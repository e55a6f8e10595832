package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/warren-cni/warren/pkg/echo"
)

// The pace of the probes: this often to each address, unless that were more than maxProbeRate in a second. Each address gets one at
// least.
const (
	probeEvery   = 200 * time.Millisecond
	maxProbeRate = 2000
)

// lateAnswers is how long the last probes' answers are waited for.
const lateAnswers = time.Second

// markerSize is the length of the random text in a probe, by which it is told from everything else; a target's number and a
// sequence number follow it.
const (
	markerSize = 16
	probeSize  = markerSize + 8
)

// probed is an address with what became of its probes.
type probed struct {
	node    string
	address netip.Addr

	waiting map[uint32]time.Time // sent and not answered, by their numbers
	sent    int
	times   []time.Duration // of those that were answered
	err     error           // the last of sending
}

// prober sends ICMP echo requests with a marker from the node's own addresses, and measures the answers.
type prober struct {
	marker  []byte
	clock   func() time.Time
	sockets map[bool]*echo.Socket // by whether it is IPv4's

	mu      sync.Mutex
	targets []*probed
}

// newProber opens a socket on each of the own addresses. A target whose family has none, because the address is not on the node,
// is lost.
func newProber(own []netip.Addr, peers []peerFacts, clock func() time.Time) (*prober, error) {
	marker := make([]byte, markerSize)
	_, _ = rand.Read(marker) // never fails, as documented
	p := &prober{marker: marker, clock: clock, sockets: map[bool]*echo.Socket{}}
	for _, peer := range peers {
		for _, address := range peer.Addresses {
			p.targets = append(p.targets, &probed{node: peer.Node, address: address, waiting: map[uint32]time.Time{}})
		}
	}
	var failed error
	for _, address := range own {
		socket, err := echo.Listen(address)
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		p.sockets[address.Is4()] = socket
	}
	return p, failed
}

// least is the shortest time in which each target gets a probe.
func (p *prober) least() time.Duration {
	return time.Duration(len(p.targets)) * time.Second / maxProbeRate
}

// run sends for a time, waits for the last answers, and reports once a second. It ends early when ctx does.
func (p *prober) run(ctx context.Context, duration time.Duration, report func(sent, answered int)) {
	var readers sync.WaitGroup
	for _, socket := range p.sockets {
		readers.Go(func() { p.read(socket) })
	}
	p.send(ctx, duration, report)
	p.awaitAnswers(ctx)
	for _, socket := range p.sockets {
		_ = socket.Close() // ends its reader
	}
	readers.Wait()
}

// send sends to one target after the other, in even steps.
func (p *prober) send(ctx context.Context, duration time.Duration, report func(sent, answered int)) {
	end, second := time.NewTimer(duration), time.NewTicker(time.Second)
	defer end.Stop()
	defer second.Stop()
	step := time.NewTicker(max(probeEvery/time.Duration(max(1, len(p.targets))), time.Second/maxProbeRate))
	defer step.Stop()
	for i := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-end.C:
			return
		case <-second.C:
			report(p.counts())
		case <-step.C:
			if len(p.targets) > 0 {
				p.probe(i % len(p.targets))
				i++
			}
		}
	}
}

// awaitAnswers waits until every probe is answered, but not for long.
func (p *prober) awaitAnswers(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lateAnswers)
	defer cancel()
	again := time.NewTicker(lateAnswers / 20)
	defer again.Stop()
	for sent, answered := p.counts(); sent > answered; sent, answered = p.counts() {
		select {
		case <-ctx.Done():
			return
		case <-again.C:
		}
	}
}

// counts are those of all targets.
func (p *prober) counts() (sent, answered int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, t := range p.targets {
		sent, answered = sent+t.sent, answered+len(t.times)
	}
	return sent, answered
}

// probe sends one probe.
func (p *prober) probe(index int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	t := p.targets[index]
	number := uint32(t.sent) //nolint:gosec // a few a second
	t.sent++
	socket := p.sockets[t.address.Is4()]
	if socket == nil {
		return
	}
	t.waiting[number] = p.clock()
	if err := socket.Send(t.address, uint16(number), p.payload(index, number)); err != nil { //nolint:gosec // the payload has all of it
		delete(t.waiting, number)
		t.err = err
	}
}

// payload is what a probe carries.
func (p *prober) payload(index int, number uint32) []byte {
	b := binary.BigEndian.AppendUint32(slices.Clone(p.marker), uint32(index)) //nolint:gosec // so many as there are nodes
	return binary.BigEndian.AppendUint32(b, number)
}

// read takes answers until the socket is closed.
func (p *prober) read(socket *echo.Socket) {
	for {
		reply, err := socket.Receive()
		if err != nil {
			return
		}
		p.take(reply)
	}
}

// take counts an answer that has what was sent, from the address that it was sent to.
func (p *prober) take(reply echo.Reply) {
	now := p.clock()
	if len(reply.Payload) != probeSize || !bytes.HasPrefix(reply.Payload, p.marker) {
		return
	}
	index, number := binary.BigEndian.Uint32(reply.Payload[markerSize:]), binary.BigEndian.Uint32(reply.Payload[markerSize+4:])
	p.mu.Lock()
	defer p.mu.Unlock()
	if int(index) >= len(p.targets) || p.targets[index].address != reply.From {
		return
	}
	t := p.targets[index]
	if at, waits := t.waiting[number]; waits {
		delete(t.waiting, number)
		t.times = append(t.times, now.Sub(at))
	}
}

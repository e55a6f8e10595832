package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

// lasting is a TCP connection over which a client sends a message and gets it back, again and again.
type lasting struct {
	exchanges atomic.Int64
	broken    atomic.Value
}

// lasts opens a connection and uses it until the test ends.
func (s *stage) lasts(from ns.NetNS, address netip.Addr) *lasting {
	s.t.Helper()
	var socket net.Conn
	err := from.Do(func(ns.NetNS) (err error) {
		socket, err = new(net.Dialer).DialContext(s.t.Context(), "tcp", netip.AddrPortFrom(address, port).String())
		return err
	})
	if err != nil {
		s.t.Fatalf("opening a connection to %v: %v", address, err)
	}
	var ended atomic.Bool
	s.t.Cleanup(func() {
		ended.Store(true)
		_ = socket.Close()
	})
	f := &lasting{}
	go func() {
		ticker := time.NewTicker(soak.Spaced(5 * often))
		defer ticker.Stop()
		for buffer := make([]byte, len(marker)); ; f.exchanges.Add(1) {
			<-ticker.C
			_, err := socket.Write(marker[:])
			if err == nil {
				_, err = io.ReadFull(socket, buffer)
			}
			if err != nil {
				if !ended.Load() {
					f.broken.Store(err)
				}
				return
			}
		}
	}()
	return f
}

// A restart of the daemon and its rollout cost nothing while the tunnel goes on: no connection is reset, on the node or across nodes, and no
// packet that pods send meanwhile is lost. The families of the endpoints share the restarts.
func TestProofRestartCostsNothing(t *testing.T) {
	t.Parallel()
	for _, o := range []lab.Options{{Name: "wpfree", Nodes: 2}, {Name: "wpfree6", Nodes: 2, IPv6Nodes: true}} {
		t.Run(endpointsOf(o), func(t *testing.T) {
			t.Parallel()
			runningOf(t, o).restartsCostNothing()
		})
	}
}

// restartsCostNothing kills both daemons and replaces them by others, again and again.
func (s *stage) restartsCostNothing() {
	s.t.Helper()
	client, near, far := s.pod(0, "client"), s.pod(0, "near"), s.pod(1, "far")
	s.reaches(client, near)
	s.reaches(client, far)
	var flows []*lasting
	for i := range max(100, soak.Trials(200)) { // half of them across nodes
		to := []*lab.Pod{near, far}[i%2]
		flows = append(flows, s.lasts(client.Netns(), to.Addresses[i/2%2]))
	}
	targets := []*lab.Pod{near, far}
	var counters [2]*tagged.Counter
	var guns [2]*tagged.Gun
	for i, pod := range targets {
		counters[i] = s.counter(pod.Netns())
		guns[i] = s.fire(client, tagged.Fire{Tag: tagAllowed, Targets: pod.Addresses, Port: port, Every: often})
	}
	s.arrives(counters[1], 100, nil)

	anew := func(end func(*lab.Process) error) {
		s.t.Helper()
		for i := range s.Nodes {
			s.endDaemon(i, end)
		}
		s.pause(5 * often)
		s.startDaemons()
		s.pause(5 * often)
	}
	rounds := soak.Shared(20, 2)
	for range rounds {
		anew((*lab.Process).Kill)
		replaceWarrend(s.t)
		anew((*lab.Process).Stop)
	}
	var sent, lost int64
	for i, gun := range guns {
		gun.Cease()
		sent += gun.Sent()
		lost += missing(s.t, counters[i], gun.Sent())
	}
	broken := brokenOf(s.t, flows)
	if lost != 0 || broken > 0 {
		s.t.Errorf("%d of %d packets were lost, %d connections broken", lost, sent, broken)
	}
	summary(s.t, "%[1]d kills and %[1]d upgrades of both daemons: %[2]d of %[3]d connections broken, %[4]d of %[5]d pings, datagrams and SYNs lost", rounds, broken, len(flows), lost, sent)
	s.reachedAt()
	s.restartControl(flows[1], far, client) // over IPv4, across nodes
}

// missing waits until all packets that were sent have arrived, and returns how many have not in a while.
func missing(t *testing.T, counter *tagged.Counter, sent int64) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 100*often)
	defer cancel()
	_ = lab.Until(ctx, func() error {
		if int64(counter.Packets(nil)) < sent {
			return errNothing
		}
		return nil
	})
	return sent - int64(counter.Packets(nil))
}

// restartControl shows that losses and resets across nodes would be seen: where the tunnel is away for a moment, and where somebody
// resets connections.
func (s *stage) restartControl(across *lasting, far, client *lab.Pod) {
	s.t.Helper()
	counter := s.counter(far.Netns())
	gun := s.fire(client, tagged.Fire{Tag: tagAllowed, Targets: far.Addresses, Port: port, Every: often})
	s.arrives(counter, 10, nil)
	onServer := func(command string) {
		s.t.Helper()
		if _, err := s.Nodes[1].Run(s.t.Context(), "sh", "-c", command); err != nil {
			s.t.Fatal(err)
		}
	}
	const resets = "iptables -%s FORWARD -p tcp -j REJECT --reject-with tcp-reset"
	onServer(fmt.Sprintf(resets, "I"))
	s.eventually(func() error {
		if across.broken.Load() == nil {
			return errors.New("control: a connection that is reset does not break")
		}
		return nil
	})
	onServer(fmt.Sprintf(resets, "D"))
	s.endDaemon(1, (*lab.Process).Kill) // which would put the tunnel up again sooner than the next packet comes
	onServer("ip link set warren0 down")
	s.pause(20 * often)
	gun.Cease()
	if missing(s.t, counter, gun.Sent()) == 0 {
		s.t.Error("control: no packet is lost without a tunnel")
	}
}

// brokenOf returns how many connections broke, or bring nothing back any more.
func brokenOf(t *testing.T, flows []*lasting) (broken int) {
	t.Helper()
	before := make([]int64, len(flows))
	for i, f := range flows {
		before[i] = f.exchanges.Load()
	}
	ctx, cancel := context.WithTimeout(t.Context(), changePatience)
	defer cancel()
	for i, f := range flows {
		if err := f.works(ctx, before[i]); err != nil {
			broken++
			t.Logf("a connection broke: %v", err)
		}
	}
	return broken
}

// works waits until more messages than before came back, or the connection broke, which is an error.
func (f *lasting) works(ctx context.Context, before int64) error {
	err := lab.Until(ctx, func() error {
		if f.exchanges.Load() == before && f.broken.Load() == nil {
			return errNothing
		}
		return nil
	})
	if reason, isBroken := f.broken.Load().(error); isBroken {
		return reason
	}
	return err
}

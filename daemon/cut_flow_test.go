package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/lab"
)

// talk sends datagrams from a pod to a server that answers each, and counts the answers.
type talk struct {
	answers atomic.Int64
}

// answering is a lab.Pod's Listen: a server that answers datagrams.
func answering(t *testing.T) func(ns.NetNS) error {
	return listening(t, func(socket net.PacketConn, from net.Addr, datagram []byte) { _, _ = socket.WriteTo(datagram, from) })
}

// start opens the connection.
func (k *talk) start(t *testing.T, from *lab.Pod, to netip.Addr) {
	t.Helper()
	var socket net.Conn
	err := from.Netns().Do(func(ns.NetNS) (err error) {
		socket, err = new(net.Dialer).DialContext(t.Context(), "udp", netip.AddrPortFrom(to, port).String())
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = socket.Close() })
	go func() {
		for buffer := make([]byte, lab.MarkerSize); ; {
			_, err := socket.Read(buffer)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				k.answers.Add(1)
			}
		}
	}()
	go func() {
		ticker := time.NewTicker(10 * time.Millisecond)
		defer ticker.Stop()
		for range ticker.C {
			if _, err := socket.Write(marker[:]); errors.Is(err, net.ErrClosed) {
				return
			}
		}
	}()
}

// goes is an error where no answer comes in a while, stops where one does.
func (k *talk) goes() error {
	if k.passes(closedPatience) == 0 {
		return fmt.Errorf("no answer comes")
	}
	return nil
}

func (k *talk) stops() error {
	if n := k.passes(closedPatience); n > 0 {
		return fmt.Errorf("%d answers come", n)
	}
	return nil
}

// passes counts the answers of a time.
func (k *talk) passes(d time.Duration) int64 {
	before := k.answers.Load()
	<-time.After(d)
	return k.answers.Load() - before
}

// An established connection ends with the policy that forbids it, also where the policy came while no daemon ran, and goes on
// when it is allowed again; the one beside it is not touched.
func TestEstablishedConnectionsFollowPolicy(t *testing.T) {
	s := running(t, "wdcut", 2)
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	near := s.pod(0, "near")
	var pods [2]*lab.Pod
	for i, name := range []string{"closed", "open"} {
		var err error
		pods[i], err = s.Nodes[1].AddPod(t.Context(), lab.Pod{
			Namespace: "shop", Name: name, Labels: map[string]string{"app": name}, Listen: answering(t),
		})
		check(err)
	}
	for family := range 2 {
		var cut, other talk
		cut.start(t, near, pods[0].Addresses[family])
		other.start(t, near, pods[1].Addresses[family])
		s.eventually(cut.goes)
		s.eventually(other.goes)

		s.write("policy", isolateClosed())
		s.eventually(cut.stops)
		check(s.Remove("policy"))
		s.eventually(cut.goes)

		check(s.daemons[1].Stop())
		s.write("policy", isolateClosed())
		if err := cut.goes(); err != nil {
			t.Errorf("without a daemon: %v", err) // else what follows proves nothing
		}
		s.startDaemon(1, nil)
		s.ready(1)
		s.eventually(cut.stops)
		check(s.Remove("policy"))
		s.eventually(cut.goes)
		if err := other.goes(); err != nil {
			t.Errorf("the connection beside it: %v", err)
		}
	}
}

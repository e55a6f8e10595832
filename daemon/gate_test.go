package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/lab"
)

// newPods is how many pods are made under fire.
const newPods = 5

// sink counts the datagrams that reach a pod.
type sink struct {
	received atomic.Int64
}

// listen starts to count; it is a lab.Pod's Listen.
func (s *sink) listen(t *testing.T) func(ns.NetNS) error {
	return listening(t, func(net.PacketConn, net.Addr, []byte) { s.received.Add(1) })
}

// listening is a lab.Pod's Listen: a server that hands each datagram over.
func listening(t *testing.T, take func(socket net.PacketConn, from net.Addr, datagram []byte)) func(ns.NetNS) error {
	return func(netns ns.NetNS) error {
		return netns.Do(func(ns.NetNS) error {
			socket, err := new(net.ListenConfig).ListenPacket(t.Context(), "udp", fmt.Sprintf(":%d", port))
			if err != nil {
				return err
			}
			t.Cleanup(func() { _ = socket.Close() })
			go func() {
				for buffer := make([]byte, lab.MarkerSize); ; {
					n, from, err := socket.ReadFrom(buffer)
					if err != nil {
						return
					}
					take(socket, from, buffer[:n])
				}
			}()
			return nil
		})
	}
}

// fire sends datagrams from a pod to the first addresses of a node without a pause, until the function that it returns is
// called.
func fire(t *testing.T, from *lab.Pod, node *lab.Node) (cease func()) {
	t.Helper()
	var socket net.PacketConn
	err := from.Netns().Do(func(ns.NetNS) error {
		var err error
		socket, err = new(net.ListenConfig).ListenPacket(t.Context(), "udp", ":0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var targets []*net.UDPAddr
	for _, prefix := range node.PodCIDRs {
		address := prefix.Addr()
		for range 3 * newPods { // addresses are leased round robin
			address = address.Next()
			targets = append(targets, net.UDPAddrFromAddrPort(netip.AddrPortFrom(address, port)))
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	var group sync.WaitGroup
	group.Go(func() {
		for ctx.Err() == nil {
			for _, target := range targets {
				_, _ = socket.WriteTo(marker[:], target) // most addresses have no pod yet
			}
		}
	})
	return func() {
		stop()
		group.Wait()
		_ = socket.Close()
	}
}

// A new pod's first packet meets its policies: an isolated pod that is made under fire gets not one datagram, from its own
// node's pods or from another's; and one that is not isolated gets them.
func TestNewPodIsNeverOpen(t *testing.T) {
	s := running(t, "wdgate", 2)
	s.write("policy", isolateClosed())
	near, far := s.pod(0, "near"), s.pod(1, "far")
	node := s.Nodes[0]
	for _, from := range []*lab.Pod{near, far} {
		cease := fire(t, from, node)
		var closed, open sink
		for i := range newPods {
			pod, err := node.AddPod(t.Context(), lab.Pod{
				Namespace: "shop", Name: fmt.Sprintf("%s-%d", from.Name, i), Labels: map[string]string{"app": "closed"}, Listen: closed.listen(t),
			})
			if err != nil {
				t.Fatal(err)
			}
			if err = pod.Delete(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if count := closed.received.Load(); count > 0 {
			t.Errorf("isolated pods got %d datagrams from %s", count, from.Name)
		}
		_, err := node.AddPod(t.Context(), lab.Pod{
			Namespace: "shop", Name: from.Name + "-open", Labels: map[string]string{"app": "open"}, Listen: open.listen(t),
		})
		if err != nil {
			t.Fatal(err)
		}
		s.eventually(func() error {
			if open.received.Load() == 0 {
				return fmt.Errorf("a pod that is not isolated gets nothing from %s", from.Name)
			}
			return nil
		})
		cease()
	}
}

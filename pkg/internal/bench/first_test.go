package bench

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/lab"
)

// BenchmarkFirstPackets makes pods that send from their first instant and are sent to before they exist: one that policies isolate
// both ways, and one that they do not, in turns. Not one packet of the first kind may arrive.
func BenchmarkFirstPackets(b *testing.B) {
	s := newStage(b, "first", 1)
	s.start(noFlags)
	s.write("closed", networkingv1.NetworkPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "closed"},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: *app("closed"), PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress},
		},
	})
	neighbour := s.pod(0, "neighbour", "neighbour")
	var reached [2]atomic.Int64 // by how many packets from or to closed pods, and open ones
	for kind := range reached {
		s.within(neighbour, func() error { return s.count(port(kind), &reached[kind]) })
	}
	s.fire(neighbour.Netns(), s.soon())
	made := 0
	for b.Loop() {
		for kind, app := range []string{"closed", "open"} {
			s.add(0, lab.Pod{
				Name: fmt.Sprintf("%s-%d", app, made), Labels: map[string]string{"app": app},
				Listen: func(pod ns.NetNS) error {
					s.fire(pod, []netip.AddrPort{netip.AddrPortFrom(neighbour.Addresses[0], port(kind))})
					return pod.Do(func(ns.NetNS) error { return s.count(inPort, &reached[kind]) })
				},
			})
		}
		made++
	}
	s.eventually(func() error {
		if reached[1].Load() < int64(made) {
			return fmt.Errorf("%d packets of %d open pods arrived", reached[1].Load(), made)
		}
		return nil
	})
	b.ReportMetric(float64(reached[0].Load()), "forbidden-packets")
	b.ReportMetric(float64(reached[1].Load()), "control-packets")
}

// Where the packets to new pods go, and from them.
const inPort, outPort = 9000, 9001

// port is where pods of a kind send to.
func port(kind int) uint16 { return outPort + uint16(kind) }

// soon are the addresses that pods get in turn.
func (s *stage) soon() []netip.AddrPort {
	var targets []netip.AddrPort
	address := s.Nodes[0].PodCIDRs[0].Addr()
	for range 100 {
		address = address.Next()
		targets = append(targets, netip.AddrPortFrom(address, inPort))
	}
	return targets
}

// count counts the datagrams that arrive at a port in the network namespace of the calling thread.
func (s *stage) count(at uint16, arrived *atomic.Int64) error {
	socket, err := net.ListenUDP("udp4", &net.UDPAddr{Port: int(at)})
	if err != nil {
		return err
	}
	s.b.Cleanup(func() { _ = socket.Close() })
	go func() {
		for buffer := make([]byte, 1); ; arrived.Add(1) {
			if _, _, err := socket.ReadFrom(buffer); err != nil {
				return
			}
		}
	}()
	return nil
}

// fire sends datagrams from a network namespace to one target after the other, until the benchmark ends. That they cannot be
// sent yet is no error.
func (s *stage) fire(from ns.NetNS, targets []netip.AddrPort) {
	s.b.Helper()
	var socket *net.UDPConn
	err := from.Do(func(ns.NetNS) (err error) {
		socket, err = net.ListenUDP("udp4", nil)
		return err
	})
	if err != nil {
		s.b.Fatal(err)
	}
	done := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() {
		tick := time.NewTicker(200 * time.Microsecond)
		defer tick.Stop()
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			_, _ = socket.WriteToUDPAddrPort([]byte{0}, targets[i%len(targets)])
		}
	})
	s.b.Cleanup(func() {
		close(done)
		running.Wait()
		_ = socket.Close()
	})
}

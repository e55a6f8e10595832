package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
)

const (
	// tunnelOverhead is what WireGuard adds over IPv4: the headers of IP and UDP, and 32 bytes of its own.
	tunnelOverhead = 60
	// manyBytes is a message that no packet of these networks carries.
	manyBytes = 10_000
	// unanswered is how long a datagram may take before it is sent again: the first that is too big is lost, and tells the sender.
	unanswered = 200 * time.Millisecond
)

// Messages of every size near the limit pass between nodes whose uplinks differ, over TCP and UDP and both families, under policies that
// allow nothing but their port: no connection hangs, nothing is fragmented on the wire, and who sends too much is told what fits.
func TestProofMTU(t *testing.T) {
	t.Parallel()
	uplinks := []int{1500, 1400, 9000}
	s := newStageOf(t, lab.Options{Name: "wpmtu", Nodes: len(uplinks), UplinkMTUs: uplinks})
	for i := range s.Nodes {
		s.startTunnel(i)
	}
	s.startDaemons()
	s.write("policy", onlyPort())
	pods := make([]*lab.Pod, len(uplinks))
	for i := range pods {
		pods[i] = s.pod(i, fmt.Sprintf("pod-%d", i+1))
		s.answerAll(pods[i])
	}
	for i := range pods {
		s.reaches(pods[i], pods[(i+1)%len(pods)])
		s.mtuKnown(i, pods[i], uplinks[i]-tunnelOverhead)
	}
	capture, err := s.Capture(marker)
	if err != nil {
		t.Fatal(err)
	}
	step := 11 - soak.Trials(10)
	exchanges, hangs := 0, 0
	for i, from := range pods {
		for j, to := range pods {
			if i == j {
				continue
			}
			fits := fitting(uplinks[i], uplinks[j])
			for _, address := range to.Addresses {
				for _, size := range sizes(step, fits, uplinks[i]-tunnelOverhead) {
					for network, exchange := range map[string]func(*lab.Pod, netip.Addr, int) error{"TCP": s.stream, "UDP": s.datagram} {
						exchanges++
						if err := exchange(from, address, size); err != nil {
							hangs++
							t.Errorf("%s, %d bytes from %s to %v: %v", network, size, from.Name, address, err)
						}
					}
				}
				if got := s.believed(from, address); got != fits {
					t.Errorf("%s believes that packets of %d bytes reach %v, %d do", from.Name, got, address, fits)
				}
			}
		}
	}
	counts, err := capture.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if counts.Fragments > 0 || counts.Marked+counts.Pods > 0 || counts.WireGuard == 0 {
		t.Errorf("the wire shows %v, and %d fragments: %q", counts, counts.Fragments, counts.Examples)
	}
	summary(t, "uplinks of %v: %d of %d exchanges of %d to %d bytes hang, %d fragments on the wire", uplinks, hangs, exchanges, 1260, manyBytes, counts.Fragments)
	s.untold(pods[2], pods[1])
}

// fitting is the greatest packet that gets from a node to another: what the link of the one carries, or where the other's carries less,
// as much as does not outgrow that when WireGuard fills it up to a multiple of 16 bytes.
func fitting(here, there int) int {
	if there < here {
		return (there - tunnelOverhead) / 16 * 16
	}
	return here - tunnelOverhead
}

// sizes are those of messages around the limits, and one of many packets.
func sizes(step int, limits ...int) []int {
	all := []int{manyBytes}
	for _, limit := range limits {
		for size := limit - 80; size <= limit+30; size += step {
			all = append(all, size)
		}
	}
	return all
}

// onlyPort is a policy that isolates all pods, both ways, but for the port of the tests.
func onlyPort() networkingv1.NetworkPolicy {
	var ports []networkingv1.NetworkPolicyPort
	for _, protocol := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
		ports = append(ports, networkingv1.NetworkPolicyPort{Protocol: &protocol, Port: new(intstr.FromInt32(port))})
	}
	return networkingv1.NetworkPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "only-port"},
		Spec: networkingv1.NetworkPolicySpec{
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress},
			Ingress:     []networkingv1.NetworkPolicyIngressRule{{Ports: ports}},
			Egress:      []networkingv1.NetworkPolicyEgressRule{{Ports: ports}},
		},
	}
}

// answerAll returns each datagram that the pod gets, whatever its size.
func (s *stage) answerAll(pod *lab.Pod) {
	s.t.Helper()
	err := pod.Netns().Do(func(ns.NetNS) error {
		socket, err := new(net.ListenConfig).ListenPacket(s.t.Context(), "udp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		s.t.Cleanup(func() { _ = socket.Close() })
		go func() {
			for buffer := make([]byte, 64<<10); ; {
				n, from, err := socket.ReadFrom(buffer)
				if errors.Is(err, net.ErrClosed) {
					return
				}
				if err == nil {
					_, _ = socket.WriteTo(buffer[:n], from)
				}
			}
		}()
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// mtuKnown demands that the pod's link has an MTU.
func (s *stage) mtuKnown(i int, pod *lab.Pod, want int) {
	s.t.Helper()
	err := pod.Netns().Do(func(ns.NetNS) error {
		link, err := net.InterfaceByName("eth0")
		if err == nil && link.MTU != want {
			err = fmt.Errorf("it has %d, want %d", link.MTU, want)
		}
		return err
	})
	if err != nil {
		s.t.Fatalf("the MTU of a pod on %s: %v", s.Nodes[i].Name, err)
	}
}

// connect opens a socket from a pod.
func (s *stage) connect(from *lab.Pod, network string, to netip.Addr) (socket net.Conn, err error) {
	err = from.Netns().Do(func(ns.NetNS) (err error) {
		dialer := net.Dialer{Timeout: changePatience}
		socket, err = dialer.DialContext(s.t.Context(), network, netip.AddrPortFrom(to, port).String())
		return err
	})
	return socket, err
}

// stream sends a message over TCP and waits until all of it comes back.
func (s *stage) stream(from *lab.Pod, to netip.Addr, size int) error {
	socket, err := s.connect(from, "tcp", to)
	if err != nil {
		return err
	}
	defer func() { _ = socket.Close() }()
	message, answer := bytes.Repeat(marker[:], size/len(marker)+1)[:size], make([]byte, size)
	if err = socket.SetDeadline(time.Now().Add(closedPatience * 10)); err != nil { //nolint:forbidigo // sockets know no contexts
		return err
	}
	if _, err = socket.Write(message); err == nil {
		_, err = io.ReadFull(socket, answer)
	}
	return err
}

// datagram sends a message by UDP, again where it is not answered at once, and waits until it comes back.
func (s *stage) datagram(from *lab.Pod, to netip.Addr, size int) error {
	const attempts = 15
	return s.ask(from, to, size, attempts)
}

// ask sends a datagram some times.
func (s *stage) ask(from *lab.Pod, to netip.Addr, size, attempts int) error {
	socket, err := s.connect(from, "udp", to)
	if err != nil {
		return err
	}
	defer func() { _ = socket.Close() }()
	message, answer := bytes.Repeat(marker[:], size/len(marker)+1)[:size], make([]byte, size+1)
	for range attempts {
		if _, err = socket.Write(message); err != nil && !errors.Is(err, syscall.EMSGSIZE) {
			return err
		}
		if err = socket.SetReadDeadline(time.Now().Add(unanswered)); err != nil { //nolint:forbidigo // sockets know no contexts
			return err
		}
		n, err := socket.Read(answer)
		if err == nil && n == size {
			return nil
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, syscall.EMSGSIZE) {
			return err
		}
	}
	return errNothing
}

// believed returns the size of packets that a pod's kernel believes to reach an address: what its link carries, or what it was told.
func (s *stage) believed(from *lab.Pod, to netip.Addr) int {
	s.t.Helper()
	socket, err := s.connect(from, "udp", to)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = socket.Close() }()
	raw, err := socket.(*net.UDPConn).SyscallConn()
	if err != nil {
		s.t.Fatal(err)
	}
	var mtu int
	var inner error
	err = raw.Control(func(fd uintptr) {
		if to.Is4() {
			mtu, inner = unix.GetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU)
		} else {
			mtu, inner = unix.GetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU)
		}
	})
	if err = errors.Join(err, inner); err != nil {
		s.t.Fatal(err)
	}
	return mtu
}

// untold is the control: where the node does not know what the other one's uplink carries, and the pod has forgotten it, messages hang.
func (s *stage) untold(from, to *lab.Pod) {
	s.t.Helper()
	s.endDaemon(2, (*lab.Process).Kill)
	_, err := s.Nodes[2].Run(s.t.Context(), "sh", "-ec", `ip route show proto 87 dev warren0 | sed 's/ mtu [0-9]*//' | while read route; do ip route replace $route dev warren0 proto 87; done`)
	if err == nil {
		err = from.Netns().Do(func(ns.NetNS) error { return os.WriteFile("/proc/sys/net/ipv4/route/flush", []byte("1"), 0) })
	}
	if err != nil {
		s.t.Fatal(err)
	}
	const few = 3
	if s.ask(from, to.Addresses[0], manyBytes, few) == nil {
		s.t.Error("control: a message passes that does not fit")
	}
	if err = s.ask(from, to.Addresses[0], len(marker), few); err != nil {
		s.t.Errorf("control: a short message: %v", err)
	}
}

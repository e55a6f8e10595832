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
	// overhead4 and overhead6 are what WireGuard adds over IPv4 and over IPv6: the headers of IP and UDP, and 32 bytes of its own.
	overhead4, overhead6 = 60, 80
	// manyBytes is a message that no packet of these networks carries.
	manyBytes = 10_000
	// unanswered is how long a datagram may take before it is sent again: the first that is too big is lost, and tells the sender.
	unanswered = 200 * time.Millisecond
)

// mixed is a stage of nodes whose uplinks carry packets of different sizes.
type mixed struct {
	*stage
	uplinks  []int
	overhead int
	pods     []*lab.Pod
}

// Messages of every size near the limit pass between nodes whose uplinks differ, over TCP and UDP and both families, under policies that
// allow nothing but their port: no connection hangs, nothing is fragmented on the wire, and who sends too much is told what fits.
func TestProofMTU(t *testing.T) {
	t.Parallel()
	for _, o := range []lab.Options{
		{Name: "wpmtu", UplinkMTUs: []int{1500, 1400, 9000}},
		{Name: "wpmtu6", UplinkMTUs: []int{1400, 9000}, IPv6Nodes: true},
	} {
		t.Run(endpointsOf(o), func(t *testing.T) {
			t.Parallel()
			newMixed(t, o).exchangeAll()
		})
	}
}

// newMixed starts nodes with a pod on each.
func newMixed(t *testing.T, o lab.Options) *mixed {
	t.Helper()
	o.Nodes = len(o.UplinkMTUs)
	m := &mixed{stage: runningOf(t, o), uplinks: o.UplinkMTUs, overhead: overhead4}
	if o.IPv6Nodes {
		m.overhead = overhead6
	}
	m.write("policy", onlyPort())
	for i := range m.uplinks {
		m.pods = append(m.pods, m.pod(i, fmt.Sprintf("pod-%d", i+1)))
		m.answerAll(m.pods[i])
	}
	for i := range m.pods {
		m.reaches(m.pods[i], m.pods[(i+1)%len(m.pods)])
		m.mtuKnown(i, m.pods[i], m.uplinks[i]-m.overhead)
	}
	return m
}

// exchangeAll sends messages from each pod to each other one.
func (m *mixed) exchangeAll() {
	m.t.Helper()
	capture, err := m.Capture(marker)
	if err != nil {
		m.t.Fatal(err)
	}
	exchanges, hangs := 0, 0
	for i := range m.pods {
		for j := range m.pods {
			if i != j {
				n, hung := m.exchange(i, j)
				exchanges, hangs = exchanges+n, hangs+hung
			}
		}
	}
	counts, err := capture.Stop()
	if err != nil {
		m.t.Fatal(err)
	}
	if counts.Fragments > 0 || counts.Marked+counts.Pods > 0 || counts.WireGuard == 0 {
		m.t.Errorf("the wire shows %v, and %d fragments: %q", counts, counts.Fragments, counts.Examples)
	}
	summary(m.t, "uplinks of %v, %d bytes around each packet: %d of %d exchanges of up to %d bytes hang, %d fragments on the wire",
		m.uplinks, m.overhead, hangs, exchanges, manyBytes, counts.Fragments)
	m.reachedAt()
	m.untold()
}

// exchange sends messages of all sizes from a pod to another, and returns how many, and how many of them were not answered.
func (m *mixed) exchange(i, j int) (exchanges, hangs int) {
	m.t.Helper()
	from, fits := m.pods[i], m.fitting(i, j)
	for _, address := range m.pods[j].Addresses {
		for _, size := range sizes(11-soak.Trials(10), fits, m.uplinks[i]-m.overhead) {
			for network, exchange := range map[string]func(*lab.Pod, netip.Addr, int) error{"TCP": m.stream, "UDP": m.datagram} {
				exchanges++
				if err := exchange(from, address, size); err != nil {
					hangs++
					m.t.Errorf("%s, %d bytes from %s to %v: %v", network, size, from.Name, address, err)
				}
			}
		}
		if got := m.believed(from, address); got != fits {
			m.t.Errorf("%s believes that packets of %d bytes reach %v, %d do", from.Name, got, address, fits)
		}
	}
	return exchanges, hangs
}

// fitting is the greatest packet that gets from a node to another: what the link of the one carries, or where the other's carries less,
// as much as does not outgrow that when WireGuard fills it up to a multiple of 16 bytes.
func (m *mixed) fitting(i, j int) int {
	here, there := m.uplinks[i], m.uplinks[j]
	if there < here {
		return (there - m.overhead) / 16 * 16
	}
	return here - m.overhead
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

// untold is the control: where the last node does not know what the uplink of the one before it carries, and the pod has forgotten it,
// messages hang.
func (m *mixed) untold() {
	m.t.Helper()
	last := len(m.pods) - 1
	from, to := m.pods[last], m.pods[last-1]
	m.endDaemon(last, (*lab.Process).Kill)
	_, err := m.Nodes[last].Run(m.t.Context(), "sh", "-ec", `ip route show proto 87 dev warren0 | sed 's/ mtu [0-9]*//' | while read route; do ip route replace $route dev warren0 proto 87; done`)
	if err == nil {
		err = from.Netns().Do(func(ns.NetNS) error { return os.WriteFile("/proc/sys/net/ipv4/route/flush", []byte("1"), 0) })
	}
	if err != nil {
		m.t.Fatal(err)
	}
	const few = 3
	if err = m.ask(from, to.Addresses[0], manyBytes, few); err == nil {
		m.t.Error("control: a message that does not fit passes")
	}
	if err = m.ask(from, to.Addresses[0], len(marker), few); err != nil {
		m.t.Errorf("control: a short message: %v", err)
	}
}

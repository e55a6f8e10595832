package policy_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/internal/oracle"
	"github.com/warren-cni/warren/pkg/podlink"
	"github.com/warren-cni/warren/pkg/testnode"
)

const (
	// burst is how many packets are under way at once: with their answers fewer than the kernel queues on a CPU
	// (net.core.netdev_max_backlog is 1000).
	burst = 250
	// maxPods is how many pods a random cluster has at most.
	maxPods = 8
	// etherControl is the EtherType of control frames (IEEE 802 local experimental), which the kernel takes no interest in.
	etherControl = 0x88b5
	// patience is how many seconds a control frame may take on a busy machine.
	patience = 30
)

// node is a node in namespaces: a LAN behind eth0, the other nodes behind warren0, and as many pods as a world may have, whose
// links stay while the worlds change.
type node struct {
	t     *testing.T
	links map[string]*wire
	// marker is the last one given to a packet. It is odd, so that no checksum ahead of a zero field looks like one.
	marker uint32
}

// wire is a link of the node. Packets are sent and seen at the far end; what near sends goes to the far end past all rules.
type wire struct{ near, far socket }

// socket sends to the other end of a link.
type socket struct {
	fd      int
	peer    podlink.MAC
	ifindex int
}

// newNode makes the node, and stays on one CPU, which then handles the packets in the order in which they are sent.
func newNode(t *testing.T) *node {
	t.Helper()
	testnode.Enter(t)
	var cpus, one unix.CPUSet
	err := unix.SchedGetaffinity(0, &cpus)
	for i := 0; err == nil && one.Count() == 0; i++ {
		if cpus.IsSet(i) {
			one.Set(i)
			err = unix.SchedSetaffinity(0, &one)
		}
	}
	if err != nil {
		t.Fatalf("choosing a CPU: %v", err)
	}
	n := &node{t: t, links: map[string]*wire{}, marker: 1}
	n.uplink("eth0", []string{"192.168.0.1/24", "fc00::1/64"}, []string{"0.0.0.0/0", "::/0"})
	n.uplink("warren0", []string{"10.0.1.1/32", "fd00:1::1/128"}, []string{"10.0.2.0/24", "fd00:2::/64"})
	for i := range maxPods {
		space := testnode.New(t)
		pair := podlink.Plan(podlink.Spec{
			ContainerID: fmt.Sprintf("pod%d", i), Interface: "eth0", MTU: 1440, Addresses: podAddresses(1, i),
		})
		err = podlink.Attach(space.Path(), pair)
		if err != nil {
			t.Fatal(err)
		}
		n.connect(fmt.Sprintf("wrn%d", i), space, pair)
	}
	return n
}

// podAddresses are those of the i-th pod of a world, on a node.
func podAddresses(node, i int) []netip.Addr {
	return []netip.Addr{
		netip.MustParseAddr(fmt.Sprintf("10.0.%d.%d", node, i+2)), netip.MustParseAddr(fmt.Sprintf("fd00:%d::%d", node, i+2)),
	}
}

// uplink makes a link on which nobody is asked for: all packets go to the other end.
func (n *node) uplink(name string, addresses, routes []string) {
	n.t.Helper()
	space := testnode.New(n.t)
	pair := podlink.Pair{
		Host: podlink.End{Name: name, MAC: podlink.MAC{2, 0, 0, 0, 0, 1}}, Pod: podlink.End{Name: "eth0", MAC: podlink.MAC{2, 0, 0, 0, 0, 2}},
	}
	far := filepath.Base(space.Path())
	commands := []string{
		fmt.Sprintf("ip link add %s address %s type veth peer name %s address %s netns %s", name,
			net.HardwareAddr(pair.Host.MAC[:]), pair.Pod.Name, net.HardwareAddr(pair.Pod.MAC[:]), far),
		fmt.Sprintf("ip link set %s arp off up; ip -n %s link set %s up", name, far, pair.Pod.Name),
	}
	for _, a := range addresses {
		commands = append(commands, fmt.Sprintf("ip addr add %s dev %s nodad", a, name))
	}
	for _, r := range routes {
		commands = append(commands, fmt.Sprintf("ip route add %s dev %s", r, name))
	}
	n.script(strings.Join(commands, "\n"))
	n.connect(name, space, pair)
}

func (n *node) script(commands string) {
	n.t.Helper()
	out, err := exec.CommandContext(n.t.Context(), "sh", "-ec", commands).CombinedOutput()
	if err != nil {
		n.t.Fatalf("running %s: %v\n%s", commands, err, out)
	}
}

// connect opens the sockets at both ends of a link.
func (n *node) connect(name string, space ns.NetNS, pair podlink.Pair) {
	n.t.Helper()
	w := &wire{near: socket{fd: -1}, far: socket{fd: -1}}
	n.links[name] = w
	n.t.Cleanup(func() {
		for _, s := range []socket{w.near, w.far} {
			if err := unix.Close(s.fd); err != nil {
				n.t.Errorf("closing a socket of %s: %v", name, err)
			}
		}
	})
	err := w.near.open(pair.Host.Name, pair.Pod.MAC, 0)
	if err == nil {
		err = space.Do(func(ns.NetNS) error { return w.far.open(pair.Pod.Name, pair.Host.MAC, unix.ETH_P_ALL) })
	}
	if err != nil {
		n.t.Fatalf("opening the sockets of %s: %v", name, err)
	}
}

// open opens the socket on a device of the calling thread's namespace, for packets of a type.
func (s *socket) open(device string, peer podlink.MAC, etherType uint16) error {
	link, err := net.InterfaceByName(device)
	if err != nil {
		return err
	}
	s.peer, s.ifindex = peer, link.Index
	s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(
		unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
		unix.SetsockoptTimeval(s.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: patience}),
		unix.Bind(s.fd, &unix.SockaddrLinklayer{Protocol: networkOrder(etherType), Ifindex: link.Index}))
}

func networkOrder(n uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, n))
}

// write sends a packet to the other end.
func (s *socket) write(packet []byte, etherType uint16) error {
	to := &unix.SockaddrLinklayer{Protocol: networkOrder(etherType), Ifindex: s.ifindex, Halen: uint8(len(s.peer))}
	copy(to.Addr[:], s.peer[:])
	return unix.Sendto(s.fd, packet, 0, to)
}

// read returns the next packet that came in, and its type.
func (s *socket) read(buffer []byte) ([]byte, uint16, error) {
	for {
		count, from, err := unix.Recvfrom(s.fd, buffer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, 0, err
		}
		link, ok := from.(*unix.SockaddrLinklayer)
		if ok && link.Pkttype != unix.PACKET_OUTGOING {
			return buffer[:count], networkOrder(link.Protocol), nil
		}
	}
}

// send sends what begins each connection, and returns those that arrived where they should.
func (n *node) send(list []oracle.Flow) map[oracle.Flow]bool {
	n.t.Helper()
	arrived := map[oracle.Flow]bool{}
	id := uint16(20000) // no port that a connection goes to
	for part := range slices.Chunk(list, burst) {
		sent := map[uint32]oracle.Flow{}
		for _, f := range part {
			id++
			n.marker += 2
			sent[n.marker] = f
			etherType := uint16(unix.ETH_P_IP)
			if f.Src.Is6() {
				etherType = unix.ETH_P_IPV6
			}
			if err := n.at(f.Src).far.write(segment(f, id, n.marker), etherType); err != nil {
				n.t.Fatalf("sending %+v: %v", f, err)
			}
		}
		// A packet is queued twice on its way, for the node and for its destination, and each queue is first in, first out. So
		// when a control frame that was sent after them has come, all have left the first queue, and after the next the second.
		for range 2 {
			n.collect(sent, arrived)
		}
	}
	return arrived
}

// collect sends a control frame to the far end of every link, and notes what arrives there before it.
func (n *node) collect(sent map[uint32]oracle.Flow, arrived map[oracle.Flow]bool) {
	n.t.Helper()
	n.marker += 2
	control := binary.BigEndian.AppendUint32(nil, n.marker)
	buffer := make([]byte, 2048)
	for name, w := range n.links {
		if err := w.near.write(control, etherControl); err != nil {
			n.t.Fatalf("sending a control frame by %s: %v", name, err)
		}
	}
	for name, w := range n.links {
		for {
			packet, etherType, err := w.far.read(buffer)
			if err != nil {
				n.t.Fatalf("waiting for a control frame by %s: %v", name, err)
			}
			if etherType == etherControl && slices.Equal(packet, control) {
				break
			}
			dst, marker, ok := destination(packet)
			if f := sent[marker]; ok && f.Dst == dst && n.at(dst) == w {
				arrived[f] = true
			}
		}
	}
}

// at returns the link that an address of a world is behind.
func (n *node) at(a netip.Addr) *wire {
	for _, p := range prefixes("10.0.1.0/24", "fd00:1::/64") {
		if p.Contains(a) {
			return n.links[fmt.Sprintf("wrn%d", a.AsSlice()[a.BitLen()/8-1]-2)]
		}
	}
	for _, p := range prefixes("10.0.2.0/24", "fd00:2::/64") {
		if p.Contains(a) {
			return n.links["warren0"]
		}
	}
	return n.links["eth0"]
}

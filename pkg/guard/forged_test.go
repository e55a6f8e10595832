package guard_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// A host on the LAN that sends from the node's address is not the node to remote pods, also where FORWARD accepts.
func TestForgedNodeAddress(t *testing.T) {
	n := newNetwork(t)
	n.load(dual())
	for _, f := range netfilter.Families {
		t.Log(f)
		tool := map[netfilter.Family]string{netfilter.IPv4: "iptables", netfilter.IPv6: "ip6tables"}[f]
		n.run(n.node, "", tool, "-P", "FORWARD", "ACCEPT")
		length := map[netfilter.Family]string{netfilter.IPv4: "/32", netfilter.IPv6: "/128"}[f]
		n.expect("another host, from its own address", n.probe(n.lan, lanHost[f], remotePod[f], port, n.remote), lanHost[f])
		n.ip(n.lan, "addr add "+nodeUplink[f]+length+" dev p"+nodad(f))
		n.expect("another host, from the node's address", n.probe(n.lan, nodeUplink[f], remotePod[f], port, n.remote), "")
	}
}

// A pod that sends from no address at all reaches nobody, not even its node, which would take such a packet.
func TestNoSourceAddress(t *testing.T) {
	n := newNetwork(t)
	for _, guarded := range []bool{false, true} {
		if guarded {
			n.load(dual())
		}
		for _, c := range []struct{ source, destination string }{
			{"0.0.0.0", "255.255.255.255"}, {"::", nodeUplink[netfilter.IPv6]}, {"::", "ff02::1"},
		} {
			if got := n.nodeTakes(netip.MustParseAddr(c.source), netip.MustParseAddr(c.destination)); got == guarded {
				t.Errorf("guarded %v, from %s to %s: the node takes it: %v", guarded, c.source, c.destination, got)
			}
		}
	}
}

// nodeTakes sends a handmade UDP packet from the pod and says whether a server on the node gets it.
func (n *network) nodeTakes(source, destination netip.Addr) bool {
	n.t.Helper()
	listener, err := (&net.ListenConfig{}).ListenPacket(n.t.Context(), "udp", ":"+port)
	n.check(err)
	defer func() { n.check(listener.Close()) }()
	n.check(n.pod.Do(func(ns.NetNS) error {
		link, err := net.InterfaceByName("p")
		if err != nil {
			return err
		}
		socket, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		packet, protocol := udp(source, destination)
		to := &unix.SockaddrLinklayer{
			Ifindex: link.Index, Halen: 6, Addr: [8]byte{2, 0, 0, 0, 0, 1},
			Protocol: binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, protocol)),
		}
		return errors.Join(unix.Sendto(socket, packet, 0, to), unix.Close(socket))
	}))
	n.check(listener.SetReadDeadline(time.Now().Add(lost))) //nolint:forbidigo // sockets know no contexts
	buffer := make([]byte, 100)
	count, _, err := listener.ReadFrom(buffer)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return false
	}
	n.check(err)
	return bytes.Equal(buffer[:count], []byte("probe"))
}

// udp makes a UDP packet to the usual port, and returns its EtherType.
func udp(source, destination netip.Addr) (packet []byte, protocol uint16) {
	const payload = "probe"
	const length = 8 + len(payload)
	ends := append(source.AsSlice(), destination.AsSlice()...)
	body := []byte{0x15, 0xb3, 0x1e, 0x61, 0, byte(length), 0, 0} // from 5555 to 7777
	body = append(body, payload...)
	binary.BigEndian.PutUint16(body[6:], checksum(append(append(bytes.Clone(ends), 0, unix.IPPROTO_UDP, 0, byte(length)), body...)))
	if source.Is4() {
		header := append([]byte{0x45, 0, 0, byte(20 + length), 0, 1, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, ends...)
		binary.BigEndian.PutUint16(header[10:], checksum(header))
		return append(header, body...), unix.ETH_P_IP
	}
	return append(append([]byte{0x60, 0, 0, 0, 0, byte(length), unix.IPPROTO_UDP, 64}, ends...), body...), unix.ETH_P_IPV6
}

// checksum is the Internet checksum.
func checksum(data []byte) uint16 {
	if len(data)%2 == 1 {
		data = append(data, 0)
	}
	var sum uint32
	for i := 0; i < len(data); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

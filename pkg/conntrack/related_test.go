package conntrack_test

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
)

// An error of ICMP about a connection that was cut does not arrive, though it is related to one that began well.
func TestErrorsAboutCutConnectionsAreDropped(t *testing.T) {
	n := newNode(t)
	var client net.Conn
	n.check(n.spaces["b"].Do(func(ns.NetNS) (err error) {
		client, err = new(net.Dialer).DialContext(t.Context(), "udp4", netip.AddrPortFrom(podAddresses("server")[0], port).String())
		return err
	}))
	n.keep(client)
	f := n.add("udp", "b")
	f.echo = true
	policies := cluster.NewDelta()
	policies.Policies[cluster.Key{Namespace: "shop", Name: "only"}] = only(labels.SelectorFromSet(labels.Set{"app": "a"}))
	for _, cut := range []bool{false, true} {
		if cut {
			if counts, _ := n.change(policies); counts.Cut != 1 {
				t.Fatalf("%+v, want the connection cut", counts)
			}
		} else {
			_, err := client.Write(binary.BigEndian.AppendUint32(nil, f.id))
			n.check(err)
			_, err = client.Read(make([]byte, 4)) // it is answered, so it is established
			n.check(err)
		}
		n.unreachable(client)
		n.check(client.SetReadDeadline(time.Now().Add(stop / 2))) //nolint:forbidigo // sockets know no contexts
		var err error
		for err == nil { // the server still sends
			_, err = client.Read(make([]byte, 4))
		}
		if refused := errors.Is(err, syscall.ECONNREFUSED); refused == cut || !refused && !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("cut %v: the client hears %v", cut, err)
		}
	}
}

// unreachable sends from the server that the client's packet reached no port.
func (n *node) unreachable(client net.Conn) {
	n.t.Helper()
	from, to := netip.MustParseAddrPort(client.LocalAddr().String()), netip.MustParseAddrPort(client.RemoteAddr().String())
	packet := slices.Concat([]byte{3, 3, 0, 0, 0, 0, 0, 0}, // destination and port unreachable, about:
		[]byte{0x45, 0, 0, 32, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}, from.Addr().AsSlice(), to.Addr().AsSlice(),
		binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, from.Port()), to.Port()), []byte{0, 12, 0, 0})
	header := packet[8:28]
	binary.BigEndian.PutUint16(header[10:], checksum(header))
	binary.BigEndian.PutUint16(packet[2:], checksum(packet))
	n.check(n.spaces["server"].Do(func(ns.NetNS) error {
		socket, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			return err
		}
		return errors.Join(unix.Sendto(socket, packet, 0, &unix.SockaddrInet4{Addr: from.Addr().As4()}), unix.Close(socket))
	}))
}

// checksum is the Internet checksum of an even number of bytes.
func checksum(data []byte) uint16 {
	var sum uint32
	for i := 0; i < len(data); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

package wgdevice_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net/netip"
	"testing"

	"golang.org/x/sys/unix"
)

// What pods have in the lab.
var (
	pods4 = netip.MustParsePrefix("10.244.0.0/16")
	pods6 = netip.MustParsePrefix("fd00::/48")
)

// capture sees every frame on every port of the wire.
type capture struct {
	socket int
	marker []byte
}

// seen counts frames of the wire.
type seen struct {
	// Clear frames hold the marker or are from or to a pod address.
	clear int
	// WireGuard frames are UDP of WireGuard's port with a WireGuard header. A frame may be many packets that the kernel did not
	// cut yet, so their bytes are counted too.
	wireGuard      int
	wireGuardBytes int
	// Fragments are pieces of IP packets, which a right MTU never makes.
	fragments int
}

// listen starts a capture on the wire. Packets with the marker count as sent in clear.
func (l *lab) listen(t *testing.T, marker string) *capture {
	t.Helper()
	socket := in(t, l.wire, func() (int, error) {
		const everything = unix.ETH_P_ALL<<8 | unix.ETH_P_ALL>>8
		s, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, everything&0xffff)
		if err != nil {
			return 0, err
		}
		return s, unix.SetsockoptInt(s, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20)
	})
	t.Cleanup(func() { _ = unix.Close(socket) })
	return &capture{socket: socket, marker: []byte(marker)}
}

// count returns what was on the wire since the last count. Frames wait in the socket, so none that was sent before is missed;
// one that the kernel had no room for fails the test.
func (c *capture) count(t *testing.T) seen {
	t.Helper()
	var total seen
	frame := make([]byte, 1<<17)
	for {
		size, _, err := unix.Recvfrom(c.socket, frame, unix.MSG_DONTWAIT)
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err != nil {
			t.Fatalf("reading the wire: %v", err)
		}
		total.add(frame[:size], c.marker)
	}
	statistics, err := unix.GetsockoptTpacketStats(c.socket, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil || statistics.Drops > 0 {
		t.Fatalf("the capture lost %d frames (%v)", statistics.Drops, err)
	}
	return total
}

// add classifies an Ethernet frame.
func (s *seen) add(frame, marker []byte) {
	const ethernet = 14
	if len(frame) < ethernet+20 {
		return
	}
	packet := frame[ethernet:]
	var source, destination netip.Addr
	var protocol byte
	var payload []byte
	switch binary.BigEndian.Uint16(frame[12:]) {
	case unix.ETH_P_IP:
		source, _ = netip.AddrFromSlice(packet[12:16])
		destination, _ = netip.AddrFromSlice(packet[16:20])
		protocol, payload = packet[9], packet[int(packet[0]&15)*4:]
		if binary.BigEndian.Uint16(packet[6:])&0x3fff != 0 {
			s.fragments++
		}
	case unix.ETH_P_IPV6:
		source, _ = netip.AddrFromSlice(packet[8:24])
		destination, _ = netip.AddrFromSlice(packet[24:40])
		protocol, payload = packet[6], packet[40:]
		if protocol == unix.IPPROTO_FRAGMENT {
			s.fragments++
		}
	}
	among := func(a netip.Addr) bool { return pods4.Contains(a) || pods6.Contains(a) }
	switch {
	case among(source), among(destination), bytes.Contains(frame, marker):
		s.clear++
	case protocol == unix.IPPROTO_UDP && len(payload) > 12 && binary.BigEndian.Uint16(payload[2:]) == wireGuardPort &&
		payload[8] >= 1 && payload[8] <= 4 && bytes.Equal(payload[9:12], []byte{0, 0, 0}):
		s.wireGuard++
		s.wireGuardBytes += len(frame)
	}
}

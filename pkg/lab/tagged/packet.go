// Package tagged sends handmade packets that carry a tag, and counts by tag which of them arrive where: so a test knows who
// sent a packet, whatever address it came from.
//
// Packets go out by packet sockets, past routing and filters of the namespace that sends them, and are counted before those
// of the namespace that receives them. Only what begins a connection counts: a TCP SYN, a UDP datagram, an echo request.
// Each has another source port or identifier, so that connection tracking takes none for a repetition.
package tagged

import (
	"bytes"
	"encoding/binary"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Protocol is what a packet begins.
type Protocol string

// The protocols that can be sent.
const (
	TCP  Protocol = "TCP"
	UDP  Protocol = "UDP"
	ICMP Protocol = "ICMP"
)

// Protocols returns all of them.
func Protocols() []Protocol { return []Protocol{TCP, UDP, ICMP} }

// Shot is a packet to be sent.
type Shot struct {
	// Tag is found again in the Arrival.
	Tag      uint32
	Protocol Protocol
	Src, Dst netip.Addr
	// Port is the destination's, of TCP and UDP.
	Port uint16
	// Payload follows the tag; an even number of bytes, of which a SYN, too, may have some.
	Payload []byte
	// Stray makes it a packet that belongs to nothing and begins nothing, of TCP (a lone RST) and ICMP (an echo reply).
	Stray bool
}

const (
	magic      = 0x57a99ed1 // before each tag
	tagSize    = 8
	protoICMP6 = unix.IPPROTO_ICMPV6
	hopLimit   = 64
)

// Packet is the IP packet of a shot; the serial number becomes its source port or identifier.
func (s Shot) Packet(serial uint16) []byte {
	number, segment := s.segment(serial)
	if s.Src.Is4() {
		header := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, hopLimit, number, 0, 0}
		binary.BigEndian.PutUint16(header[2:], uint16(20+len(segment))) //nolint:gosec // a few bytes
		binary.BigEndian.PutUint16(header[4:], serial)
		header = append(append(header, s.Src.AsSlice()...), s.Dst.AsSlice()...)
		binary.BigEndian.PutUint16(header[10:], checksum(header))
		return append(header, segment...)
	}
	header := []byte{0x60, 0, 0, 0, 0, 0, number, hopLimit}
	binary.BigEndian.PutUint16(header[4:], uint16(len(segment))) //nolint:gosec // a few bytes
	header = append(append(header, s.Src.AsSlice()...), s.Dst.AsSlice()...)
	return append(header, segment...)
}

// Fragments are the IP packets of a shot that is sent in two parts, of which the first ends with what policies look at.
func (s Shot) Fragments(serial uint16) [2][]byte {
	const first = 8 // bytes, the least that a fragment can have
	packet := s.Packet(serial)
	if s.Src.Is4() {
		part := func(flags byte, offset uint16, data []byte) []byte {
			header := bytes.Clone(packet[:20])
			binary.BigEndian.PutUint16(header[2:], uint16(20+len(data))) //nolint:gosec // a few bytes
			binary.BigEndian.PutUint16(header[6:], offset)
			header[6] |= flags
			header[10], header[11] = 0, 0
			binary.BigEndian.PutUint16(header[10:], checksum(header))
			return append(header, data...)
		}
		return [2][]byte{part(0x20, 0, packet[20:20+first]), part(0, first/8, packet[20+first:])}
	}
	part := func(offsetAndMore uint16, data []byte) []byte {
		header := bytes.Clone(packet[:40])
		header[6] = unix.IPPROTO_FRAGMENT
		binary.BigEndian.PutUint16(header[4:], uint16(8+len(data))) //nolint:gosec // a few bytes
		header = binary.BigEndian.AppendUint16(append(header, packet[6], 0), offsetAndMore)
		return append(binary.BigEndian.AppendUint16(append(header, 0, 0), serial), data...)
	}
	return [2][]byte{part(1, packet[40:40+first]), part(first, packet[40+first:])}
}

// Control is an ICMPv6 packet of neighbour discovery, which counts nowhere: a hop limit of 255, and the checksum filled in.
func Control(src, dst netip.Addr, message []byte) []byte {
	message = bytes.Clone(message)
	covered := append(Shot{Src: src, Dst: dst}.pseudo(protoICMP6, len(message)), message...)
	binary.BigEndian.PutUint16(message[2:], checksum(covered))
	header := []byte{0x60, 0, 0, 0, 0, byte(len(message)), protoICMP6, 255} //nolint:gosec // a few bytes
	return append(append(append(header, src.AsSlice()...), dst.AsSlice()...), message...)
}

// segment is what the IP header is put before, and its protocol number.
func (s Shot) segment(serial uint16) (number byte, segment []byte) {
	source := 20000 + serial%20000
	var sum int // where the checksum is
	switch s.Protocol {
	case TCP:
		number, sum, segment = unix.IPPROTO_TCP, 16, make([]byte, 20, 20+tagSize)
		segment[12], segment[13], segment[14] = 5<<4, 2, 0x20 // five words, SYN, a window
		if s.Stray {
			segment[13] = 4 // RST
		}
		binary.BigEndian.PutUint16(segment, source)
		binary.BigEndian.PutUint16(segment[2:], s.Port)
		binary.BigEndian.PutUint32(segment[4:], uint32(serial)<<16)
	case UDP:
		number, sum, segment = unix.IPPROTO_UDP, 6, make([]byte, 8, 8+tagSize)
		binary.BigEndian.PutUint16(segment, source)
		binary.BigEndian.PutUint16(segment[2:], s.Port)
		binary.BigEndian.PutUint16(segment[4:], uint16(8+tagSize+len(s.Payload))) //nolint:gosec // a datagram
	case ICMP:
		number, sum, segment = unix.IPPROTO_ICMP, 2, make([]byte, 8, 8+tagSize)
		segment[0] = 8
		if s.Src.Is6() {
			number, segment[0] = protoICMP6, 128
		}
		if s.Stray && s.Src.Is6() {
			segment[0] = 129
		} else if s.Stray {
			segment[0] = 0
		}
		binary.BigEndian.PutUint16(segment[4:], serial)
	}
	segment = append(binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(segment, magic), s.Tag), s.Payload...)
	covered := segment
	if number != unix.IPPROTO_ICMP {
		covered = append(s.pseudo(number, len(segment)), segment...)
	}
	binary.BigEndian.PutUint16(segment[sum:], checksum(covered))
	return number, segment
}

// pseudo is the header that the checksums of all but ICMP over IPv4 cover; one for IPv6 sums up as one for IPv4 does.
func (s Shot) pseudo(number byte, length int) []byte {
	ends := append(s.Src.AsSlice(), s.Dst.AsSlice()...)
	return append(ends, 0, number, byte(length>>8), byte(length)) //nolint:gosec // the bytes of a length
}

// checksum is the Internet checksum (RFC 1071) of an even number of bytes.
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

// Arrival is how packets are counted.
type Arrival struct {
	Tag      uint32
	Protocol Protocol
	Src, Dst netip.Addr
}

// parse returns what a packet counts as, and false where it is none of ours or begins nothing.
func parse(packet []byte) (Arrival, bool) {
	var a Arrival
	var number byte
	var segment []byte
	switch {
	case len(packet) >= 20 && packet[0] == 0x45:
		a.Src, a.Dst = netip.AddrFrom4([4]byte(packet[12:])), netip.AddrFrom4([4]byte(packet[16:]))
		number, segment = packet[9], packet[20:]
	case len(packet) >= 40 && packet[0]>>4 == 6:
		a.Src, a.Dst = netip.AddrFrom16([16]byte(packet[8:])), netip.AddrFrom16([16]byte(packet[24:]))
		number, segment = packet[6], packet[40:]
	default:
		return a, false
	}
	header := 8
	switch {
	case number == unix.IPPROTO_TCP:
		a.Protocol, header = TCP, 20
	case number == unix.IPPROTO_UDP:
		a.Protocol = UDP
	case len(segment) > 0 && (number == unix.IPPROTO_ICMP && segment[0] == 8 || number == protoICMP6 && segment[0] == 128):
		a.Protocol = ICMP
	default:
		return a, false
	}
	if len(segment) < header+tagSize || binary.BigEndian.Uint32(segment[header:]) != magic {
		return a, false
	}
	a.Tag = binary.BigEndian.Uint32(segment[header+4:])
	return a, true
}

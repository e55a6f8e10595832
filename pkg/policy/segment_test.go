package policy_test

import (
	"encoding/binary"
	"hash/crc32"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/internal/oracle"
)

// segment makes an IP packet that begins a connection. Its last four bytes are the marker, which no translation changes; id is
// the source port, or the identifier of the echo.
func segment(f oracle.Flow, id uint16, marker uint32) []byte {
	protocol, body := byte(unix.IPPROTO_ICMP), []byte{8, 0, 0, 0}
	switch f.Protocol {
	case cluster.TCP:
		protocol, body = unix.IPPROTO_TCP, ports(id, f.Port)
		body = append(body, 0, 0, 0, 1, 0, 0, 0, 0, 5<<4, 2 /* SYN */, 0xff, 0xff, 0, 0, 0, 0)
	case cluster.UDP:
		protocol, body = unix.IPPROTO_UDP, append(ports(id, f.Port), 0, 12, 0, 0)
	case cluster.SCTP:
		protocol, body = unix.IPPROTO_SCTP, append(ports(id, f.Port), 0, 0, 0, 0, 0, 0, 0, 0)
		body = append(body, 1 /* INIT */, 0, 0, 20, 0, 0, 0, 1, 0, 0, 0xff, 0xff, 0, 1, 0, 1)
	default: // an echo request
		if f.Src.Is6() {
			protocol, body = unix.IPPROTO_ICMPV6, []byte{128, 0, 0, 0}
		}
		body = append(binary.BigEndian.AppendUint16(body, id), 0, 1)
	}
	body = binary.BigEndian.AppendUint32(body, marker)
	seal(f, protocol, body)
	return append(header(f.Src, f.Dst, protocol, len(body)), body...)
}

func ports(src, dst uint16) []byte {
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, src), dst)
}

// seal writes the checksum, without which conntrack takes no packet.
func seal(f oracle.Flow, protocol byte, body []byte) {
	summed := slices.Concat(f.Src.AsSlice(), f.Dst.AsSlice(), []byte{0, protocol, 0, byte(len(body))}, body)
	switch protocol {
	case unix.IPPROTO_SCTP:
		binary.LittleEndian.PutUint32(body[8:], crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
	case unix.IPPROTO_ICMP:
		binary.BigEndian.PutUint16(body[2:], checksum(body))
	case unix.IPPROTO_ICMPV6:
		binary.BigEndian.PutUint16(body[2:], checksum(summed))
	case unix.IPPROTO_UDP:
		binary.BigEndian.PutUint16(body[6:], checksum(summed))
	default:
		binary.BigEndian.PutUint16(body[16:], checksum(summed))
	}
}

// header makes the IP header of a packet.
func header(src, dst netip.Addr, protocol byte, length int) []byte {
	if src.Is6() {
		return slices.Concat([]byte{0x60, 0, 0, 0, 0, byte(length), protocol, 64}, src.AsSlice(), dst.AsSlice())
	}
	h := slices.Concat([]byte{0x45, 0, 0, byte(20 + length), 0, 1, 0, 0, 64, protocol, 0, 0}, src.AsSlice(), dst.AsSlice())
	binary.BigEndian.PutUint16(h[10:], checksum(h))
	return h
}

// destination returns where a packet goes, and its marker.
func destination(packet []byte) (dst netip.Addr, marker uint32, ok bool) {
	switch {
	case len(packet) > 20 && packet[0]>>4 == 4:
		dst, ok = netip.AddrFromSlice(packet[16:20])
	case len(packet) > 40 && packet[0]>>4 == 6:
		dst, ok = netip.AddrFromSlice(packet[24:40])
	default:
		return netip.Addr{}, 0, false
	}
	return dst, binary.BigEndian.Uint32(packet[len(packet)-4:]), ok
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

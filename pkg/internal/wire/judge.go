// Package wire watches a link on which only ciphertext may pass between nodes, and counts what passes in clear: packets
// that carry a marker, packets from or to a pod's address, and WireGuard's own.
package wire

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
)

// Watch says what to count.
type Watch struct {
	// Marker is what probes carry; 16 bytes or more, so that no ciphertext holds it by chance.
	Marker []byte
	// Pods are the prefixes that hold the pods' addresses.
	Pods []netip.Prefix
	// Port is WireGuard's UDP port.
	Port uint16
}

// Counts is what passed the link.
type Counts struct {
	// Packets are all IP packets.
	Packets int
	// Marked are packets that carry the marker.
	Marked int
	// Pods are packets whose IP header names a pod's address.
	Pods int
	// InClear are those of both kinds, IPv4 and IPv6.
	InClear [2]int
	// WireGuard are UDP packets from or to WireGuard's port that have the form of its messages.
	WireGuard int
	// WireGuardBytes are the bytes of their frames: a frame may be many packets that the kernel has not cut yet.
	WireGuardBytes int
	// Fragments are pieces of IP packets, which a right MTU never makes.
	Fragments int
	// Examples are the first packets in clear, one line each.
	Examples []string
}

// String prints the counts on one line.
func (c Counts) String() string {
	return fmt.Sprintf("%d packets: %d with the marker, %d with a pod's address in clear, %d of WireGuard", c.Packets, c.Marked, c.Pods, c.WireGuard)
}

// maxExamples bounds Counts.Examples.
const maxExamples = 5

// Sizes and numbers of the protocols (IEEE 802.3, RFC 791, RFC 8200, RFC 768).
const (
	ethernetHeader = 14
	etherIPv4      = 0x0800
	etherIPv6      = 0x86dd
	ipv4Header     = 20
	ipv6Header     = 40
	protocolUDP    = 17
	udpHeader      = 8
	// fragmentMask is "more fragments" and the offset in an IPv4 header, protocolFragment an extension header of IPv6.
	fragmentMask     = 0x3fff
	protocolFragment = 44
)

// header is what counting needs of an IP packet.
type header struct {
	source, destination netip.Addr
	protocol            byte
	fragment            bool
	payload             []byte
}

// parse reads an Ethernet frame; ok is false for frames that are not IP.
func parse(frame []byte) (h header, ok bool) {
	if len(frame) < ethernetHeader {
		return header{}, false
	}
	packet := frame[ethernetHeader:]
	switch etherType := binary.BigEndian.Uint16(frame[12:]); {
	case etherType == etherIPv4 && len(packet) >= ipv4Header:
		size := min(int(packet[0]&0x0f)*4, len(packet))
		return header{
			source: netip.AddrFrom4([4]byte(packet[12:16])), destination: netip.AddrFrom4([4]byte(packet[16:20])),
			protocol: packet[9], fragment: binary.BigEndian.Uint16(packet[6:])&fragmentMask != 0, payload: packet[size:],
		}, true
	case etherType == etherIPv6 && len(packet) >= ipv6Header:
		return header{
			source: netip.AddrFrom16([16]byte(packet[8:24])), destination: netip.AddrFrom16([16]byte(packet[24:40])),
			protocol: packet[6], fragment: packet[6] == protocolFragment, payload: packet[ipv6Header:],
		}, true
	default:
		return header{}, false
	}
}

// add counts one frame. The marker is looked for in the whole frame, so that no encapsulation hides it.
func (c *Counts) add(frame []byte, w Watch) {
	marked := bytes.Contains(frame, w.Marker)
	if marked {
		c.Marked++
	}
	h, ok := parse(frame)
	if !ok {
		if marked {
			c.example("a frame that is not IP carries the marker")
		}
		return
	}
	c.Packets++
	if isWireGuard(h, w.Port) {
		c.WireGuard++
		c.WireGuardBytes += len(frame)
	}
	if h.fragment {
		c.Fragments++
	}
	pod := holds(w.Pods, h.source) || holds(w.Pods, h.destination)
	if pod {
		c.Pods++
	}
	if pod || marked {
		family := 0
		if h.source.Is6() {
			family = 1
		}
		c.InClear[family]++
		c.example(fmt.Sprintf("%s -> %s, protocol %d, %d bytes, marker %v", h.source, h.destination, h.protocol, len(frame), marked))
	}
}

// example keeps the first packets in clear.
func (c *Counts) example(text string) {
	if len(c.Examples) < maxExamples {
		c.Examples = append(c.Examples, text)
	}
}

// isWireGuard recognises WireGuard's four messages: a type and three zero bytes come first (whitepaper, section 5.4).
func isWireGuard(h header, port uint16) bool {
	if h.protocol != protocolUDP || len(h.payload) < udpHeader+4 {
		return false
	}
	from, to := binary.BigEndian.Uint16(h.payload), binary.BigEndian.Uint16(h.payload[2:])
	message := binary.LittleEndian.Uint32(h.payload[udpHeader:])
	return (from == port || to == port) && message >= 1 && message <= 4
}

// holds tells whether one of the prefixes holds the address.
func holds(prefixes []netip.Prefix, address netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(address) {
			return true
		}
	}
	return false
}

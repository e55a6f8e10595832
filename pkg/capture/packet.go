package capture

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// Sizes and numbers of the protocols (IEEE 802.3 and 802.1Q, RFC 791, RFC 8200, RFC 768, RFC 792, RFC 4443).
const (
	ethernetHeader = 14
	typeOffset     = 12 // of the EtherType in a frame
	tag            = 4  // the length of a VLAN tag
	ipv4Header     = 20
	ipv6Header     = 40
	udpHeader      = 8
	icmpHeader     = 8
	offsetMask     = 0x1fff // the fragment offset in an IPv4 header
)

// packet is what counting needs of an IP packet.
type packet struct {
	source, destination netip.Addr
	protocol            uint8
	// payload is what follows the header; empty for fragments but the first.
	payload []byte
}

// network returns the IP packet of a frame, nil where there is none. A link without Ethernet's header has the packet at once.
func network(frame []byte, ethernet bool) []byte {
	if !ethernet {
		return frame
	}
	for at := typeOffset; at+2 <= len(frame); at += tag {
		switch binary.BigEndian.Uint16(frame[at:]) {
		case unix.ETH_P_IP, unix.ETH_P_IPV6:
			return frame[at+2:]
		case unix.ETH_P_8021Q, unix.ETH_P_8021AD:
		default:
			return nil
		}
	}
	return nil
}

// parse reads an IP packet; ok is false for anything else. Extension headers of IPv6 are not followed: the addresses stand before
// them.
func parse(b []byte) (p packet, ok bool) {
	switch {
	case len(b) >= ipv4Header && b[0]>>4 == 4:
		p = packet{
			source: netip.AddrFrom4([4]byte(b[12:16])), destination: netip.AddrFrom4([4]byte(b[16:20])), protocol: b[9],
		}
		if binary.BigEndian.Uint16(b[6:])&offsetMask == 0 {
			p.payload = b[min(int(b[0]&0x0f)*4, len(b)):]
		}
		return p, true
	case len(b) >= ipv6Header && b[0]>>4 == 6:
		return packet{
			source: netip.AddrFrom16([16]byte(b[8:24])), destination: netip.AddrFrom16([16]byte(b[24:40])),
			protocol: b[6], payload: b[ipv6Header:],
		}, true
	default:
		return packet{}, false
	}
}

// inside returns the packet that another one carries (IP in IP) or quotes (an error of ICMP).
func (p packet) inside() (packet, bool) {
	switch p.protocol {
	case unix.IPPROTO_IPIP, unix.IPPROTO_IPV6:
		return parse(p.payload)
	case unix.IPPROTO_ICMP:
		if len(p.payload) > icmpHeader && isError4(p.payload[0]) {
			return parse(p.payload[icmpHeader:])
		}
	case unix.IPPROTO_ICMPV6:
		if len(p.payload) > icmpHeader && p.payload[0] < 128 {
			return parse(p.payload[icmpHeader:])
		}
	}
	return packet{}, false
}

// isError4 tells the types of ICMP over IPv4 that quote a packet: unreachable, quench, redirect, time exceeded, bad parameter.
func isError4(icmpType uint8) bool {
	switch icmpType {
	case 3, 4, 5, 11, 12:
		return true
	default:
		return false
	}
}

// add counts a frame on a link. The marker is looked for in all of it, so that no encapsulation hides it. It returns false for a
// frame of which it cannot tell whether it is of a pod: one of a link that has another header than Ethernet's.
func (j *judge) add(l *Link, frame []byte, ethernet, sent bool) bool {
	marked := bytes.Contains(frame, j.watch.Marker)
	p, ok := parse(network(frame, ethernet))
	if ok && j.countWireGuard(l, p, sent) && !marked {
		return true
	}
	found := Example{Sent: sent, Source: p.source, Destination: p.destination, Protocol: p.protocol, Marked: marked}
	pod := j.ofPod(p)
	if inner, has := p.inside(); has && !pod && j.ofPod(inner) {
		pod, found.Inside, found.Source, found.Destination = true, true, inner.source, inner.destination
	}
	if !pod && !marked {
		return ok || ethernet
	}
	l.Clear.count(sent)
	if marked {
		l.Marked.count(sent)
	}
	if len(l.Examples) < maxExamples && !slices.Contains(l.Examples, found) {
		l.Examples = append(l.Examples, found)
	}
	return true
}

// ofPod tells whether a packet is from or to a pod and not one that may leave so.
func (j *judge) ofPod(p packet) bool {
	from, to := j.pods.holds(p.source), j.pods.holds(p.destination)
	switch {
	case from && !to:
		return !j.direct.holds(p.destination)
	case to && !from:
		return !j.direct.holds(p.source)
	default:
		return from
	}
}

// countWireGuard counts a packet if it is one of the node's own tunnel: of its port, and in the form of WireGuard's four messages,
// which begin with a type and three zero bytes (whitepaper, section 5.4). A packet from or to a pod is none, whatever it holds.
func (j *judge) countWireGuard(l *Link, p packet, sent bool) bool {
	if p.protocol != unix.IPPROTO_UDP || len(p.payload) < udpHeader+4 || j.pods.holds(p.source) || j.pods.holds(p.destination) {
		return false
	}
	from, to := binary.BigEndian.Uint16(p.payload), binary.BigEndian.Uint16(p.payload[2:])
	own, remote := to, netip.AddrPortFrom(p.source, from)
	if sent {
		own, remote = from, netip.AddrPortFrom(p.destination, to)
	}
	if message := binary.LittleEndian.Uint32(p.payload[udpHeader:]); own != j.watch.Port || message < 1 || message > 4 {
		return false
	}
	l.WireGuard.count(sent)
	if traffic, known := j.remotes[remote]; known || len(j.remotes) < maxRemotes {
		traffic.count(sent)
		j.remotes[remote] = traffic
	}
	return true
}

// String describes the packet, for people.
func (e Example) String() string {
	text := "received: "
	if e.Sent {
		text = "sent: "
	}
	if e.Source.IsValid() {
		text += fmt.Sprintf("%s -> %s, protocol %d", e.Source, e.Destination, e.Protocol)
	} else {
		text += "a frame that is not IP"
	}
	if e.Inside {
		text += ", inside another packet"
	}
	if e.Marked {
		text += ", with the marker"
	}
	return text
}

package nflog

import (
	"encoding/binary"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/nlattr"
)

// The attributes of a packet that are read (linux/netfilter/nfnetlink_log.h).
const (
	attrPayload = 9  // NFULA_PAYLOAD
	attrPrefix  = 10 // NFULA_PREFIX
	attrNumber  = 12 // NFULA_SEQ
)

// Packet is a packet that a rule has logged.
type Packet struct {
	// Prefix is what the rule says of itself (--nflog-prefix).
	Prefix string
	// Source and Destination have port 0 where the packet shows none: in other protocols, and in all fragments but the first. They
	// are not valid where what was read is no IP packet.
	Source, Destination netip.AddrPort
	// Protocol is the number of the transport protocol.
	Protocol uint8
}

// parseMessage reads a message of the kernel, and the number that it gives to the packet.
func parseMessage(b []byte) (p Packet, number uint32, numbered bool) {
	b = b[min(nl.SizeofNfgenmsg, len(b)):]
	for typ, value := range nlattr.All(b) {
		switch typ {
		case attrPayload:
			p.read(value)
		case attrPrefix:
			p.Prefix = unix.ByteSliceToString(value)
		case attrNumber:
			if len(value) == 4 {
				number, numbered = binary.BigEndian.Uint32(value), true
			}
		}
	}
	return p, number, numbered
}

// The lengths of the fixed parts of headers.
const (
	shortest4 = 20
	length6   = 40
	length6x  = 8 // of an extension header that is as short as can be
)

// read takes from the beginning of an IP packet what it shows.
func (p *Packet) read(b []byte) {
	switch {
	case len(b) >= shortest4 && b[0]>>4 == 4 && b[0]&0xf >= shortest4/4:
		p.Protocol = b[9]
		transport := b[min(int(b[0]&0xf)*4, len(b)):]
		if binary.BigEndian.Uint16(b[6:])&0x1fff != 0 { // fragment offset
			transport = nil
		}
		p.between(netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:])), transport)
	case len(b) >= length6 && b[0]>>4 == 6:
		var transport []byte
		p.Protocol, transport = skipExtensions(b[6], b[length6:])
		p.between(netip.AddrFrom16([16]byte(b[8:])), netip.AddrFrom16([16]byte(b[24:])), transport)
	}
}

// skipExtensions returns the protocol behind the extension headers of IPv6 (RFC 8200) and its header, nil where that is not in b.
func skipExtensions(protocol uint8, b []byte) (uint8, []byte) {
	for {
		var length int
		switch protocol {
		case unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS:
			if len(b) >= length6x {
				length = length6x + int(b[1])*8
			}
		case unix.IPPROTO_AH:
			if len(b) >= length6x {
				length = length6x + int(b[1])*4
			}
		case unix.IPPROTO_FRAGMENT:
			if len(b) >= length6x && binary.BigEndian.Uint16(b[2:])&^7 != 0 { // fragment offset
				return b[0], nil
			}
			length = length6x
		default:
			return protocol, b
		}
		if length == 0 || len(b) < length {
			return protocol, nil
		}
		protocol, b = b[0], b[length:]
	}
}

// between sets who sends to whom.
func (p *Packet) between(source, destination netip.Addr, transport []byte) {
	var from, to uint16
	switch p.Protocol {
	case unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_UDPLITE, unix.IPPROTO_SCTP, unix.IPPROTO_DCCP:
		if len(transport) >= 4 {
			from, to = binary.BigEndian.Uint16(transport), binary.BigEndian.Uint16(transport[2:])
		}
	}
	p.Source, p.Destination = netip.AddrPortFrom(source, from), netip.AddrPortFrom(destination, to)
}

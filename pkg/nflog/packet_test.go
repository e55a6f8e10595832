package nflog

import (
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// ports is the beginning of a header from port 4660 to port 8080.
var ports = []byte{0x12, 0x34, 0x1f, 0x90}

// ipv4 is a packet from 10.0.0.1 to 10.0.0.2.
func ipv4(protocol byte, fragment uint16, options, transport []byte) []byte {
	b := make([]byte, 20, 64)
	b[0], b[9] = 4<<4|byte(5+len(options)/4), protocol
	binary.BigEndian.PutUint16(b[6:], fragment)
	copy(b[12:], []byte{10, 0, 0, 1, 10, 0, 0, 2})
	return append(append(b, options...), transport...)
}

// ipv6 is a packet from fd00::1 to fd00::2.
func ipv6(next byte, rest ...byte) []byte {
	b := make([]byte, 40, 64)
	b[0], b[6] = 6<<4, next
	b[8], b[23], b[24], b[39] = 0xfd, 1, 0xfd, 2
	return append(b, rest...)
}

// extension is an extension header of IPv6 with a length in its own unit, in bytes so many.
func extension(next, length byte, bytes int, transport ...byte) []byte {
	b := make([]byte, bytes)
	b[0], b[1] = next, length
	return append(b, transport...)
}

func TestPacket(t *testing.T) {
	const none4, ports4, none6, ports6 = "10.0.0.1:0 10.0.0.2:0", "10.0.0.1:4660 10.0.0.2:8080", "[fd00::1]:0 [fd00::2]:0", "[fd00::1]:4660 [fd00::2]:8080"
	const invalid = "invalid AddrPort invalid AddrPort"
	fragment := func(offset byte) []byte { return append([]byte{unix.IPPROTO_UDP, 0, 0, offset, 1, 2, 3, 4}, ports...) }
	for name, c := range map[string]struct {
		packet   []byte
		protocol uint8
		want     string
	}{
		"tcp":                      {ipv4(unix.IPPROTO_TCP, 0x4000, nil, ports), unix.IPPROTO_TCP, ports4},
		"sctp behind options":      {ipv4(unix.IPPROTO_SCTP, 0, make([]byte, 8), ports), unix.IPPROTO_SCTP, ports4},
		"first fragment":           {ipv4(unix.IPPROTO_UDP, 0x2000, nil, ports), unix.IPPROTO_UDP, ports4},
		"later fragment":           {ipv4(unix.IPPROTO_UDP, 0x2001, nil, ports), unix.IPPROTO_UDP, none4},
		"icmp has no ports":        {ipv4(unix.IPPROTO_ICMP, 0, nil, ports), unix.IPPROTO_ICMP, none4},
		"ports cut off":            {ipv4(unix.IPPROTO_TCP, 0, nil, ports[:3]), unix.IPPROTO_TCP, none4},
		"options cut off":          {ipv4(unix.IPPROTO_TCP, 0, make([]byte, 8), ports)[:24], unix.IPPROTO_TCP, none4},
		"header cut off":           {ipv4(unix.IPPROTO_TCP, 0, nil, ports)[:19], 0, invalid},
		"header that is too short": {append([]byte{4<<4 | 4}, ipv4(unix.IPPROTO_TCP, 0, nil, ports)[1:]...), 0, invalid},
		"nothing":                  {nil, 0, invalid},
		"neither 4 nor 6":          {append([]byte{5 << 4}, make([]byte, 60)...), 0, invalid},

		"udp6":                       {ipv6(unix.IPPROTO_UDP, ports...), unix.IPPROTO_UDP, ports6},
		"header of six cut off":      {ipv6(unix.IPPROTO_UDP)[:39], 0, invalid},
		"behind two extensions":      {ipv6(unix.IPPROTO_HOPOPTS, extension(unix.IPPROTO_DSTOPTS, 0, 8, extension(unix.IPPROTO_TCP, 1, 16, ports...)...)...), unix.IPPROTO_TCP, ports6},
		"behind authentication":      {ipv6(unix.IPPROTO_AH, extension(unix.IPPROTO_TCP, 4, 24, ports...)...), unix.IPPROTO_TCP, ports6},
		"extension cut off":          {ipv6(unix.IPPROTO_DSTOPTS, extension(unix.IPPROTO_TCP, 1, 15)...), unix.IPPROTO_DSTOPTS, none6},
		"first fragment of six":      {ipv6(unix.IPPROTO_FRAGMENT, fragment(1)...), unix.IPPROTO_UDP, ports6},
		"later fragment of six":      {ipv6(unix.IPPROTO_FRAGMENT, fragment(8)...), unix.IPPROTO_UDP, none6},
		"fragment's header is short": {ipv6(unix.IPPROTO_FRAGMENT, fragment(0)[:7]...), unix.IPPROTO_FRAGMENT, none6},
		"encrypted":                  {ipv6(unix.IPPROTO_ESP, ports...), unix.IPPROTO_ESP, none6},
	} {
		var p Packet
		p.read(c.packet)
		if got := p.Source.String() + " " + p.Destination.String(); got != c.want || p.Protocol != c.protocol {
			t.Errorf("%s: %s, protocol %d, want %s, protocol %d", name, got, p.Protocol, c.want, c.protocol)
		}
	}
}

// message makes a message of the kernel.
func message(attributes ...[]byte) []byte {
	b := []byte{unix.AF_INET, 0, 0, 87}
	for i := 0; i < len(attributes); i += 2 {
		value := attributes[i+1]
		b = binary.NativeEndian.AppendUint16(b, uint16(4+len(value)))
		b = append(append(b, attributes[i]...), value...)
		for len(b)%4 != 0 {
			b = append(b, 0)
		}
	}
	return b
}

// typ is the type of an attribute.
func typ(n uint16) []byte { return binary.NativeEndian.AppendUint16(nil, n) }

func TestMessage(t *testing.T) {
	p, number, numbered := parseMessage(message(
		typ(1), make([]byte, 4), typ(attrPrefix), []byte("D:CHAIN\x00"), typ(attrNumber), []byte{0, 0, 1, 2},
		typ(attrPayload), ipv4(unix.IPPROTO_TCP, 0, nil, ports)))
	want := Packet{
		Prefix: "D:CHAIN", Protocol: unix.IPPROTO_TCP,
		Source: netip.MustParseAddrPort("10.0.0.1:4660"), Destination: netip.MustParseAddrPort("10.0.0.2:8080"),
	}
	if diff := cmp.Diff(want, p, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Error(diff)
	}
	if number != 0x102 || !numbered {
		t.Errorf("the number is %d, %v", number, numbered)
	}
	if _, _, numbered = parseMessage(message(typ(attrNumber), []byte{1, 2})); numbered {
		t.Error("two bytes are a number")
	}
}

// FuzzMessage demands that nothing that a message holds is a fault, and that what it shows is consistent.
func FuzzMessage(f *testing.F) {
	for _, packet := range [][]byte{
		ipv4(unix.IPPROTO_TCP, 0, make([]byte, 8), ports),
		ipv6(unix.IPPROTO_HOPOPTS, extension(unix.IPPROTO_AH, 0, 8, extension(unix.IPPROTO_FRAGMENT, 1, 12, ports...)...)...),
	} {
		f.Add(message(typ(attrPrefix), []byte("D:CHAIN\x00"), typ(attrNumber), []byte{0, 0, 1, 2}, typ(attrPayload), packet))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, _, _ := parseMessage(b)
		if p.Source.IsValid() != p.Destination.IsValid() || p.Source.Addr().BitLen() != p.Destination.Addr().BitLen() {
			t.Errorf("from %v to %v", p.Source, p.Destination)
		}
		if !p.Source.IsValid() && p.Protocol != 0 {
			t.Errorf("no packet, and protocol %d", p.Protocol)
		}
	})
}

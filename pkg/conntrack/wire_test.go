package conntrack

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// tuple makes one direction of a connection. For a protocol of ICMP's the ports are identifier and type.
func tuple(typ int, from, to netip.AddrPort, protocol uint8) *nl.RtAttr {
	src, dst := nl.CTA_IP_V4_SRC, nl.CTA_IP_V4_DST
	if from.Addr().Is6() {
		src, dst = nl.CTA_IP_V6_SRC, nl.CTA_IP_V6_DST
	}
	proto := attribute(nl.CTA_TUPLE_PROTO|nested, nil, attribute(nl.CTA_PROTO_NUM, []byte{protocol}))
	switch protocol {
	case unix.IPPROTO_ICMP: // CTA_PROTO_ICMP_ID, _TYPE, _CODE
		proto.AddRtAttr(4, nl.BEUint16Attr(from.Port()))
		proto.AddRtAttr(5, []byte{byte(to.Port())})
		proto.AddRtAttr(6, []byte{0})
	case unix.IPPROTO_ICMPV6: // CTA_PROTO_ICMPV6_ID, _TYPE, _CODE
		proto.AddRtAttr(7, nl.BEUint16Attr(from.Port()))
		proto.AddRtAttr(8, []byte{byte(to.Port())})
		proto.AddRtAttr(9, []byte{0})
	default:
		proto.AddRtAttr(nl.CTA_PROTO_SRC_PORT, nl.BEUint16Attr(from.Port()))
		proto.AddRtAttr(nl.CTA_PROTO_DST_PORT, nl.BEUint16Attr(to.Port()))
	}
	return attribute(typ|nested, nil,
		attribute(nl.CTA_TUPLE_IP|nested, nil, attribute(src, from.Addr().AsSlice()), attribute(dst, to.Addr().AsSlice())), proto)
}

// message makes what the kernel's dump has for an entry.
func message(parts ...*nl.RtAttr) []byte {
	return request(0, 0, unix.AF_INET, parts).Serialize()[unix.NLMSG_HDRLEN:]
}

func addr(a []byte, port uint16) netip.AddrPort {
	parsed, _ := netip.AddrFromSlice(a)
	return netip.AddrPortFrom(parsed, port)
}

// FuzzEntry reads back what it writes, and the bytes that name the entry come back as they came.
func FuzzEntry(f *testing.F) {
	f.Add([]byte("aaaabbbbccccdddd"), uint16(1000), uint16(80), uint8(6), uint32(1<<24|7), uint16(0))
	f.Add([]byte("aaaabbbbccccdddd"), uint16(1000), uint16(80), uint8(1), uint32(0), uint16(3))
	f.Fuzz(func(t *testing.T, a []byte, sport, dport uint16, protocol uint8, mark uint32, zone uint16) {
		if len(a) < 16 || protocol == unix.IPPROTO_ICMPV6 || protocol == 0 {
			return
		}
		client, server, backend := addr(a[:4], sport), addr(a[4:8], dport), addr(a[8:12], dport+1)
		orig := tuple(nl.CTA_TUPLE_ORIG, client, server, protocol)
		parts := []*nl.RtAttr{orig, tuple(nl.CTA_TUPLE_REPLY, backend, client, protocol), attribute(nl.CTA_MARK, nl.BEUint32Attr(mark))}
		if zone != 0 {
			parts = append(parts, attribute(nl.CTA_ZONE, nl.BEUint16Attr(zone)))
		}
		e, err := parse(message(parts...))
		if err != nil {
			t.Fatal(err)
		}
		want := Flow{Src: client.Addr(), Dst: backend.Addr(), Protocol: protocol}
		if protocol != unix.IPPROTO_ICMP {
			want.Port = backend.Port()
		}
		if e.flow != want || e.mark != mark {
			t.Errorf("read %v with mark %#x, want %v with %#x", e.flow, e.mark, want, mark)
		}
		naming := []*nl.RtAttr{orig}
		if zone != 0 {
			naming = append(naming, attribute(nl.CTA_ZONE, nl.BEUint16Attr(zone)))
		}
		if got, want := message(e.naming()...), message(naming...); !bytes.Equal(got, want) {
			t.Errorf("the entry is named\n% x, want\n% x", got, want)
		}
	})
}

// FuzzParse reads whatever comes without a panic.
func FuzzParse(f *testing.F) {
	f.Add(message(tuple(nl.CTA_TUPLE_ORIG, netip.MustParseAddrPort("[fd00::1]:5"), netip.MustParseAddrPort("[fd00::2]:128"), unix.IPPROTO_ICMPV6)))
	f.Add([]byte{0, 0, 0, 0, 3, 0, 1, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		e, err := parse(b)
		if err == nil && (!e.flow.Src.IsValid() || !e.flow.Dst.IsValid()) {
			t.Errorf("read %v out of % x", e.flow, b)
		}
	})
}

func TestFilter(t *testing.T) {
	a := netip.MustParseAddr("10.0.0.2")
	flags := binary.NativeEndian.AppendUint32(nil, 1)
	source := attribute(nl.CTA_TUPLE_IP|nested, nil, attribute(nl.CTA_IP_V4_SRC, []byte{10, 0, 0, 2}))
	for name, c := range map[string]struct {
		walk walk
		want []*nl.RtAttr
	}{
		"everything": {walk{}, nil},
		"from":       {walk{address: a}, []*nl.RtAttr{attribute(nl.CTA_TUPLE_ORIG|nested, nil, source), attribute(25|nested, nil, attribute(1, flags))}},
		"to": {
			walk{address: a, reply: true},
			[]*nl.RtAttr{attribute(nl.CTA_TUPLE_REPLY|nested, nil, source), attribute(25|nested, nil, attribute(2, flags))},
		},
	} {
		if got, want := message(c.walk.filter()...), message(c.want...); !bytes.Equal(got, want) {
			t.Errorf("%s: filter\n% x, want\n% x", name, got, want)
		}
	}
}

func TestPlan(t *testing.T) {
	list := func(n int) []netip.Addr {
		addresses := []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, 0})} // twice
		for i := range n {
			addresses = append(addresses, netip.AddrFrom4([4]byte{10, 0, 0, byte(i)}))
		}
		return addresses
	}
	six := netip.MustParseAddr("fd00::2")
	for _, c := range []struct {
		addresses []netip.Addr
		entries   int
		walks     int
	}{
		{list(1), 0, 1}, // two at a time would take as long, and twice the work
		{list(1), 100_000, 2},
		{list(2), 0, 1},
		{list(2), 100_000, 4},
		{append(list(1), six, six.Next()), 100_000, 3},
		{list(4), 10_000, 1},
		{list(4), 100_000, 8},
		{list(20), 100_000, 1},
	} {
		if walks := plan(c.addresses, c.entries); len(walks) != c.walks {
			t.Errorf("%v, %d entries: %d walks, want %d", c.addresses, c.entries, len(walks), c.walks)
		}
	}
}

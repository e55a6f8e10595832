package capture

import (
	"encoding/binary"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"
)

const marker = "0123456789abcdef"

func watch() Watch {
	return Watch{
		Marker: []byte(marker),
		Pods:   []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/56")},
		Direct: []netip.Prefix{netip.MustParsePrefix("198.51.100.0/24")},
		Port:   51820,
	}
}

// ip is an IP packet of a protocol, of the family of its addresses.
func ip(source, destination string, protocol byte, payload string) []byte {
	src, dst := netip.MustParseAddr(source), netip.MustParseAddr(destination)
	var header []byte
	if src.Is4() {
		header = make([]byte, 12, ipv4Header)
		header[0], header[8], header[9] = 0x45, 64, protocol
		binary.BigEndian.PutUint16(header[2:], uint16(ipv4Header+len(payload)))
	} else {
		header = make([]byte, 8, ipv6Header)
		header[0], header[6], header[7] = 0x60, protocol, 64
		binary.BigEndian.PutUint16(header[4:], uint16(len(payload)))
	}
	return append(append(append(header, src.AsSlice()...), dst.AsSlice()...), payload...)
}

// udp is a datagram.
func udp(source, destination uint16, payload string) string {
	header := binary.BigEndian.AppendUint16(nil, source)
	header = binary.BigEndian.AppendUint16(header, destination)
	header = binary.BigEndian.AppendUint16(header, uint16(udpHeader+len(payload)))
	return string(append(header, 0, 0)) + payload
}

// ethernet puts a packet into a frame, behind the tags that are given.
func ethernet(packet []byte, tags ...uint16) []byte {
	frame := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1}
	for _, t := range tags {
		frame = binary.BigEndian.AppendUint16(frame, t)
		frame = append(frame, 0, 7)
	}
	etherType := uint16(unix.ETH_P_IP)
	if packet[0]>>4 == 6 {
		etherType = unix.ETH_P_IPV6
	}
	return append(binary.BigEndian.AppendUint16(frame, etherType), packet...)
}

// later makes a packet of IPv4 a fragment that is not the first.
func later(packet []byte) []byte {
	packet[7] = 100
	return packet
}

// of makes a frame of another protocol than IP.
func of(etherType uint16, payload string) []byte {
	return append(binary.BigEndian.AppendUint16(ethernet([]byte{0})[:typeOffset], etherType), payload...)
}

// The addresses of the tests, and what a packet of WireGuard begins with.
const (
	pod4, far4, host4, world4 = "10.244.1.5", "10.244.2.5", "192.0.2.1", "203.0.113.9"
	pod6, far6, host6         = "fd00:10:244:1::5", "fd00:10:244:2::5", "2001:db8::1"
	data                      = "\x04\x00\x00\x00ciphertext"
	icmpError                 = "\x03\x04\x00\x00\x00\x00\x05\x78"
	icmpError6                = "\x02\x00\x00\x00\x00\x00\x05\x78"
)

// frames are what a link may carry, as sent, and what it counts as.
func frames() map[string]struct {
	frame []byte
	want  Link
} {
	one := Traffic{Sent: 1}
	wireGuard, inClear, marked := Link{WireGuard: one}, Link{Clear: one}, Link{Clear: one, Marked: one}
	return map[string]struct {
		frame []byte
		want  Link
	}{
		"WireGuard":                       {ethernet(ip(host4, world4, unix.IPPROTO_UDP, udp(51820, 40000, data))), wireGuard},
		"WireGuard over IPv6":             {ethernet(ip(host6, "2001:db8::2", unix.IPPROTO_UDP, udp(51820, 40000, data))), wireGuard},
		"WireGuard in a VLAN":             {ethernet(ip(host4, world4, unix.IPPROTO_UDP, udp(51820, 40000, data)), unix.ETH_P_8021Q), wireGuard},
		"WireGuard of another program":    {ethernet(ip(host4, world4, unix.IPPROTO_UDP, udp(40000, 51820, data))), Link{}},
		"not WireGuard: type":             {ethernet(ip(host4, world4, unix.IPPROTO_UDP, udp(51820, 40000, "\x05\x00\x00\x00"))), Link{}},
		"not WireGuard: short":            {ethernet(ip(host4, world4, unix.IPPROTO_UDP, udp(51820, 40000, "\x04"))), Link{}},
		"not WireGuard: a fragment":       {ethernet(later(ip(host4, world4, unix.IPPROTO_UDP, udp(51820, 40000, data)))), Link{}},
		"not WireGuard: of a pod":         {ethernet(ip(pod4, far4, unix.IPPROTO_UDP, udp(51820, 51820, data))), inClear},
		"the marker hides in no datagram": {ethernet(ip(host4, world4, unix.IPPROTO_UDP, udp(51820, 40000, data+marker))), Link{WireGuard: one, Clear: one, Marked: one}},
		"strangers":                       {ethernet(ip(host4, world4, unix.IPPROTO_TCP, marker[1:])), Link{}},
		"strangers' TCP over IPv6":        {ethernet(ip(host6, "2001:db8::2", unix.IPPROTO_TCP, "x")), Link{}},
		"from a pod":                      {ethernet(ip(pod4, world4, unix.IPPROTO_TCP, "x")), inClear},
		"to a pod":                        {ethernet(ip(host4, far4, unix.IPPROTO_TCP, "x")), inClear},
		"between pods":                    {ethernet(ip(pod4, far4, unix.IPPROTO_UDP, udp(1, 2, "x"))), inClear},
		"from a pod over IPv6":            {ethernet(ip(pod6, host6, unix.IPPROTO_TCP, "x")), inClear},
		"to a pod over IPv6":              {ethernet(ip(host6, far6, unix.IPPROTO_TCP, "x")), inClear},
		"beside the pods over IPv6":       {ethernet(ip(host6, "fd00:10:244:100::5", unix.IPPROTO_TCP, "x")), Link{}},
		"from a pod in a VLAN":            {ethernet(ip(pod4, world4, unix.IPPROTO_TCP, "x"), unix.ETH_P_8021Q), inClear},
		"from a pod in two VLANs":         {ethernet(ip(pod6, host6, unix.IPPROTO_TCP, "x"), unix.ETH_P_8021AD, unix.ETH_P_8021Q), inClear},
		"a later fragment":                {ethernet(later(ip(pod4, far4, unix.IPPROTO_UDP, "anything"))), inClear},
		"a fragment over IPv6":            {ethernet(ip(pod6, far6, unix.IPPROTO_FRAGMENT, "\x11\x00\x00\x08\x00\x00\x00\x01rest")), inClear},
		"as the operator wants it":        {ethernet(ip(pod4, "198.51.100.9", unix.IPPROTO_TCP, "x")), Link{}},
		"and its answer":                  {ethernet(ip("198.51.100.9", pod4, unix.IPPROTO_TCP, "x")), Link{}},
		"an error about strangers":        {ethernet(ip(world4, host4, unix.IPPROTO_ICMP, icmpError+string(ip(host4, world4, 17, udp(1, 2, ""))))), Link{}},
		"an error about a pod":            {ethernet(ip(world4, host4, unix.IPPROTO_ICMP, icmpError+string(ip(pod4, far4, 17, udp(1, 2, ""))))), inClear},
		"an error about a pod over IPv6":  {ethernet(ip("2001:db8::2", host6, unix.IPPROTO_ICMPV6, icmpError6+string(ip(pod6, far6, 17, udp(1, 2, ""))))), inClear},
		"an echo quotes nothing":          {ethernet(ip(world4, host4, unix.IPPROTO_ICMP, "\x08\x00\x00\x00\x00\x00\x00\x00"+string(ip(pod4, far4, 17, "")))), Link{}},
		"a pod's packet in IP":            {ethernet(ip(host4, world4, unix.IPPROTO_IPIP, string(ip(pod4, far4, 17, udp(1, 2, ""))))), inClear},
		"the marker":                      {ethernet(ip(host4, world4, unix.IPPROTO_ICMP, "\x08\x00\x00\x00\x00\x00\x00\x00"+marker)), marked},
		"the marker from a pod":           {ethernet(ip(pod4, far4, unix.IPPROTO_ICMP, "\x08\x00\x00\x00\x00\x00\x00\x00"+marker)), marked},
		"the marker without IP":           {of(0x8847, marker), marked},
		"LLDP":                            {of(0x88cc, "neighbour"), Link{}},
		"ARP for a pod":                   {of(unix.ETH_P_ARP, string(netip.MustParseAddr(pod4).AsSlice())), Link{}},
		"IPv4 cut off":                    {ethernet(ip(pod4, far4, 17, ""))[:30], Link{}},
		"tags without end":                {of(unix.ETH_P_8021Q, "\x00\x07\x81"), Link{}},
	}
}

func TestFramesCount(t *testing.T) {
	for name, test := range frames() {
		t.Run(name, func(t *testing.T) {
			for _, sent := range []bool{true, false} {
				got, want := Link{}, test.want
				if !sent {
					want = Link{Clear: turned(want.Clear), Marked: turned(want.Marked)}
					if strings.HasPrefix(name, "WireGuard") {
						continue // of which the ports are the other way round
					}
				}
				newJudge(watch()).add(&got, test.frame, true, sent)
				if len(got.Examples) != got.Clear.Total() {
					t.Errorf("%d examples", len(got.Examples))
				}
				if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(Link{}, "Examples")); diff != "" && (sent || !strings.Contains(name, "datagram")) {
					t.Errorf("sent %v (-want +got):\n%s", sent, diff)
				}
			}
		})
	}
}

// turned is what was sent as received.
func turned(t Traffic) Traffic { return Traffic{Sent: t.Received, Received: t.Sent} }

func TestWireGuardByRemote(t *testing.T) {
	j := newJudge(watch())
	var l Link
	j.add(&l, ethernet(ip(host4, world4, unix.IPPROTO_UDP, udp(51820, 40000, data))), true, true)
	j.add(&l, ethernet(ip(world4, host4, unix.IPPROTO_UDP, udp(40000, 51820, data))), true, false)
	j.add(&l, ethernet(ip(world4, host4, unix.IPPROTO_UDP, udp(40001, 51820, data))), true, false)
	want := map[netip.AddrPort]Traffic{
		netip.MustParseAddrPort("203.0.113.9:40000"): {Sent: 1, Received: 1}, netip.MustParseAddrPort("203.0.113.9:40001"): {Received: 1},
	}
	if diff := cmp.Diff(want, j.remotes, cmpopts.EquateComparable(netip.AddrPort{})); diff != "" || l.WireGuard != (Traffic{Sent: 1, Received: 2}) {
		t.Errorf("%+v, remotes (-want +got):\n%s", l.WireGuard, diff)
	}
}

// A link without Ethernet's header has its packets at once; what is none of them cannot be judged.
func TestFramesWithoutEthernet(t *testing.T) {
	j := newJudge(watch())
	var l Link
	if !j.add(&l, ip(pod4, world4, unix.IPPROTO_TCP, "x"), false, true) || l.Clear.Sent != 1 {
		t.Errorf("counted %+v", l)
	}
	if j.add(&l, []byte("\x00\x00something of InfiniBand's"), false, true) {
		t.Error("an unknown header was judged")
	}
}

func TestExamplesTell(t *testing.T) {
	j := newJudge(watch())
	var l Link
	j.add(&l, ethernet(ip(pod4, far4, unix.IPPROTO_UDP, udp(1, 2, marker))), true, true)
	j.add(&l, ethernet(ip(world4, host4, unix.IPPROTO_ICMP, icmpError+string(ip(pod4, far4, 17, "")))), true, false)
	j.add(&l, of(0x8847, marker), true, true)
	j.add(&l, of(0x8847, marker), true, true)
	var got []string
	for _, e := range l.Examples {
		got = append(got, e.String())
	}
	want := []string{
		"sent: 10.244.1.5 -> 10.244.2.5, protocol 17, with the marker",
		"received: 10.244.1.5 -> 10.244.2.5, protocol 1, inside another packet",
		"sent: a frame that is not IP, with the marker",
	}
	if diff := cmp.Diff(want, got); diff != "" || l.Clear.Total() != 4 {
		t.Errorf("%d in clear, examples (-want +got):\n%s", l.Clear.Total(), diff)
	}
}

package firewall

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/nlattr"
)

// The flags of an attribute's type (linux/netlink.h).
const (
	nested     = uint16(unix.NLA_F_NESTED)
	bigEndian  = uint16(unix.NLA_F_NET_BYTEORDER)
	attrHeader = 4
)

// maxMembers is how many members one message carries: the largest, an IPv6 address with a port, takes 44 bytes, and all of them
// stand in one attribute of at most 65535 bytes.
const maxMembers = 1000

// appendAttr appends a netlink attribute, padded to 4 bytes.
func appendAttr(b []byte, typ uint16, value []byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(attrHeader+len(value))) //nolint:gosec // bounded by maxMembers
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, value...)
	for len(b)%4 != 0 {
		b = append(b, 0)
	}
	return b
}

// openAttr appends the header of an attribute. Its value is what is appended until closeAttr, which is told where it begins, and must
// have a multiple of 4 bytes.
func openAttr(b []byte, typ uint16) (opened []byte, begins int) {
	return appendAttr(b, typ, nil), len(b)
}

// closeAttr completes an attribute.
func closeAttr(b []byte, begins int) []byte {
	binary.NativeEndian.PutUint16(b[begins:], uint16(len(b)-begins)) //nolint:gosec // bounded by maxMembers
	return b
}

// appendString appends an attribute that is a string as C knows it.
func appendString(b []byte, typ uint16, s string) []byte {
	var c [32]byte // every name is shorter
	return appendAttr(b, typ, append(append(c[:0], s...), 0))
}

// appendUint32 appends an attribute that is a number in network byte order.
func appendUint32(b []byte, typ uint16, v uint32) []byte {
	var value [4]byte
	binary.BigEndian.PutUint32(value[:], v)
	return appendAttr(b, typ|bigEndian, value[:])
}

// appendMember appends a member as the kernel's attributes (IPSET_ATTR_DATA without its header). The prefix lengths always
// go along: the kernel reads a missing one as a single address.
func appendMember(b []byte, typ netfilter.SetType, e netfilter.Entry) ([]byte, error) {
	if e.Prefix != e.Prefix.Masked() {
		return nil, fmt.Errorf("member %s has bits after its prefix", e)
	}
	b = appendAddr(b, nl.IPSET_ATTR_IP, e.Prefix.Addr())
	if typ == netfilter.HashNet {
		return appendAttr(b, nl.IPSET_ATTR_CIDR, []byte{byte(e.Prefix.Bits())}), nil //nolint:gosec // 0 to 128
	}
	if !e.Prefix.IsSingleIP() {
		return nil, fmt.Errorf("member %s of a %s is not a single address", e, typ)
	}
	if typ == netfilter.HashIP {
		return b, nil
	}
	proto, err := protocolNumber(e.Protocol)
	if err != nil {
		return nil, err
	}
	var port [2]byte
	binary.BigEndian.PutUint16(port[:], e.Port)
	b = appendAttr(b, nl.IPSET_ATTR_PORT|bigEndian, port[:])
	return appendAttr(b, nl.IPSET_ATTR_PROTO, []byte{proto}), nil
}

// appendAddr appends an address, which ipset wants in an attribute of its own within typ.
func appendAddr(b []byte, typ uint16, a netip.Addr) []byte {
	b, begins := openAttr(b, typ|nested)
	if a.Is4() {
		v4 := a.As4()
		b = appendAttr(b, nl.IPSET_ATTR_IPADDR_IPV4|bigEndian, v4[:])
	} else {
		v6 := a.As16()
		b = appendAttr(b, nl.IPSET_ATTR_IPADDR_IPV6|bigEndian, v6[:])
	}
	return closeAttr(b, begins)
}

// decodeMember is the reverse of appendMember, for members of any type.
func decodeMember(b []byte) (netfilter.Entry, error) {
	var e netfilter.Entry
	var addr netip.Addr
	bits := -1
	for typ, v := range nlattr.All(b) {
		switch typ {
		case nl.IPSET_ATTR_IP:
			addr = decodeAddr(v)
		case nl.IPSET_ATTR_CIDR:
			bits = int(v[0])
		case nl.IPSET_ATTR_PORT:
			if len(v) == 2 {
				e.Port = binary.BigEndian.Uint16(v)
			}
		case nl.IPSET_ATTR_PROTO:
			e.Protocol = protocolName(v[0])
		}
	}
	if !addr.IsValid() {
		return e, fmt.Errorf("decoding a set's member % x: no address", b)
	}
	if bits < 0 {
		bits = addr.BitLen()
	}
	e.Prefix = netip.PrefixFrom(addr, bits)
	return e, nil
}

// decodeAddr returns the address in an IPSET_ATTR_IP.
func decodeAddr(b []byte) netip.Addr {
	for _, v := range nlattr.All(b) {
		if a, ok := netip.AddrFromSlice(v); ok {
			return a
		}
	}
	return netip.Addr{}
}

// protocolNumber returns the number of a protocol, also of one that protocolName has no name for.
func protocolNumber(name string) (byte, error) {
	switch name {
	case "tcp":
		return unix.IPPROTO_TCP, nil
	case "udp":
		return unix.IPPROTO_UDP, nil
	case "sctp":
		return unix.IPPROTO_SCTP, nil
	}
	n, err := strconv.ParseUint(name, 10, 8)
	if err != nil {
		return 0, fmt.Errorf("protocol %q is not tcp, udp or sctp", name)
	}
	return byte(n), nil
}

// protocolName is the reverse of protocolNumber.
func protocolName(n byte) string {
	switch n {
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_SCTP:
		return "sctp"
	}
	return strconv.Itoa(int(n))
}

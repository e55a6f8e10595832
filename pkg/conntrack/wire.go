package conntrack

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/nlattr"
)

// The numbers of linux/netfilter/nfnetlink_conntrack.h that nl does not name.
const (
	ctaMarkMask    = 21
	ctaFilter      = 25
	filterOrig     = 1 // CTA_FILTER_ORIG_FLAGS
	filterReply    = 2 // CTA_FILTER_REPLY_FLAGS
	filterBySource = 1 // CTA_FILTER_FLAG(CTA_IP_SRC)
	getStats       = 5 // IPCTNL_MSG_CT_GET_STATS
	statsEntries   = 1 // CTA_STATS_GLOBAL_ENTRIES
)

const nested = int(unix.NLA_F_NESTED)

// entry is a connection in the kernel's table.
type entry struct {
	flow Flow
	mark uint32
	// tuple and zone are the kernel's own attributes that name the entry, to be sent back as they came: whatever the protocol
	// has in the place of ports is in them. zone is empty where the entry is in none.
	tuple, zone []byte
}

// parse reads a message of a dump.
func parse(message []byte) (entry, error) {
	if len(message) < nl.SizeofNfgenmsg {
		return entry{}, fmt.Errorf("reading a connection: message of %d bytes", len(message))
	}
	var e entry
	for typ, v := range nlattr.All(message[nl.SizeofNfgenmsg:]) {
		switch typ {
		case nl.CTA_TUPLE_ORIG:
			e.tuple = v
			e.flow.Src, e.flow.Protocol, _ = parseTuple(v)
		case nl.CTA_TUPLE_REPLY:
			e.flow.Dst, _, e.flow.Port = parseTuple(v)
		case nl.CTA_ZONE:
			e.zone = v
		case nl.CTA_MARK:
			if len(v) == 4 {
				e.mark = binary.BigEndian.Uint32(v)
			}
		}
	}
	if !e.flow.Src.IsValid() || !e.flow.Dst.IsValid() {
		return entry{}, fmt.Errorf("reading a connection % x: no addresses", message)
	}
	return e, nil
}

// parseTuple returns who sends in one direction: address, protocol, and the port where the protocol has ports.
func parseTuple(tuple []byte) (src netip.Addr, protocol uint8, port uint16) {
	for outer, part := range nlattr.All(tuple) {
		for inner, v := range nlattr.All(part) {
			switch {
			case outer == nl.CTA_TUPLE_IP && (inner == nl.CTA_IP_V4_SRC || inner == nl.CTA_IP_V6_SRC):
				src, _ = netip.AddrFromSlice(v)
			case outer == nl.CTA_TUPLE_PROTO && inner == nl.CTA_PROTO_NUM:
				protocol = v[0]
			case outer == nl.CTA_TUPLE_PROTO && inner == nl.CTA_PROTO_SRC_PORT && len(v) == 2:
				port = binary.BigEndian.Uint16(v)
			}
		}
	}
	return src, protocol, port
}

// attribute makes an attribute of a value, or of others.
func attribute(typ int, value []byte, inner ...*nl.RtAttr) *nl.RtAttr {
	a := nl.NewRtAttr(typ, value)
	for _, i := range inner {
		a.AddChild(i)
	}
	return a
}

// naming are the attributes that name an entry.
func (e entry) naming() []*nl.RtAttr {
	list := []*nl.RtAttr{attribute(nl.CTA_TUPLE_ORIG|nested, e.tuple)}
	if len(e.zone) > 0 {
		list = append(list, attribute(nl.CTA_ZONE, e.zone))
	}
	return list
}

// marking are the attributes that set or clear netfilter.CutMark in the mark of an entry.
func (e entry) marking(cut bool) []*nl.RtAttr {
	var mark uint32
	if cut {
		mark = netfilter.CutMark
	}
	return append(e.naming(), attribute(nl.CTA_MARK, nl.BEUint32Attr(mark)), attribute(ctaMarkMask, nl.BEUint32Attr(netfilter.CutMark)))
}

// filter are the attributes that make the kernel look only at what a walk is for.
func (w walk) filter() []*nl.RtAttr {
	if !w.address.IsValid() {
		return nil
	}
	tuple, flags := nl.CTA_TUPLE_ORIG, filterOrig
	if w.reply {
		tuple, flags = nl.CTA_TUPLE_REPLY, filterReply
	}
	return []*nl.RtAttr{
		attribute(tuple|nested, nil, attribute(nl.CTA_TUPLE_IP|nested, nil, attribute(nl.CTA_IP_V4_SRC, w.address.AsSlice()))),
		attribute(ctaFilter|nested, nil, attribute(flags, binary.NativeEndian.AppendUint32(nil, filterBySource))),
	}
}

// request makes a message. The version is what makes the kernel heed the family when it deletes; elsewhere it means nothing.
func request(command, flags int, family uint8, attributes []*nl.RtAttr) *nl.NetlinkRequest {
	r := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_CTNETLINK<<8|command, flags)
	r.AddData(&nl.Nfgenmsg{NfgenFamily: family, Version: 1})
	for _, a := range attributes {
		r.AddData(a)
	}
	return r
}

// family is the kernel's number of the family that an entry is in.
func (e entry) family() uint8 {
	if e.flow.Src.Is6() {
		return unix.AF_INET6
	}
	return unix.AF_INET
}

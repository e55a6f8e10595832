package capture

import (
	"encoding/binary"
	"net/netip"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// snap is how much of a packet is read: the headers, whatever they are wrapped in, and the marker of a probe.
const snap = 320

// Bounds of the program, which the kernel limits to 4096 instructions. What exceeds them is judged here, not there.
const (
	maxExcluded = 1000
	maxPrefixes = 32
)

// netOffset is where offsets from the network header begin (SKF_NET_OFF of linux/filter.h), whatever header the link has.
const netOffset = 0xfff00000

// filter is the program that the kernel runs for every packet of every link. It keeps what has to be looked at, and leaves out at
// once what a busy node has most of and what is certain: packets of links inside the node, ARP, and TCP that is not of
// pods, since no probe is TCP.
func filter(w Watch, excluded []uint32) []bpf.Instruction {
	program := []bpf.Instruction{bpf.LoadExtension{Num: bpf.ExtInterfaceIndex}}
	for _, index := range excluded[:min(len(excluded), maxExcluded)] {
		program = append(program, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: index, SkipTrue: 1}, bpf.RetConstant{})
	}
	program = append(program, bpf.LoadExtension{Num: bpf.ExtProto},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.ETH_P_ARP, SkipTrue: 1}, bpf.RetConstant{})
	if len(w.Pods) <= maxPrefixes {
		program = append(program, family(unix.ETH_P_IP, strangersTCP(w.Pods, layout4))...)
		program = append(program, family(unix.ETH_P_IPV6, strangersTCP(w.Pods, layout6))...)
	}
	return append(program, bpf.RetConstant{Val: snap})
}

// family runs a part for packets of one family. The accumulator holds the EtherType before, and after where it was another.
func family(etherType uint32, part []bpf.Instruction) []bpf.Instruction {
	return append([]bpf.Instruction{
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: etherType, SkipTrue: 1},
		bpf.Jump{Skip: uint32(len(part))}, //nolint:gosec // some hundred
	}, part...)
}

// layout is where an IP header has what the filter reads.
type layout struct {
	is4                           bool
	protocol, source, destination uint32
}

// The layouts of both families (RFC 791, section 3.1; RFC 8200, section 3).
//
//nolint:gochecknoglobals // constants
var (
	layout4 = layout{is4: true, protocol: 9, source: 12, destination: 16}
	layout6 = layout{protocol: 6, source: 8, destination: 24}
)

// strangersTCP leaves out TCP without a pod's address, and keeps all else.
func strangersTCP(pods []netip.Prefix, l layout) []bpf.Instruction {
	part := []bpf.Instruction{
		bpf.LoadAbsolute{Off: netOffset + l.protocol, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_TCP, SkipTrue: 1},
		bpf.RetConstant{Val: snap},
	}
	for _, prefix := range pods {
		if prefix.Addr().Is4() == l.is4 {
			part = append(part, keep(prefix, l.source)...)
			part = append(part, keep(prefix, l.destination)...)
		}
	}
	return append(part, bpf.RetConstant{})
}

// keep keeps a packet that has an address of a prefix at an offset.
func keep(prefix netip.Prefix, offset uint32) []bpf.Instruction {
	address := prefix.Masked().Addr().AsSlice()
	words := (prefix.Bits() + 31) / 32
	const perWord = 3
	var part []bpf.Instruction
	for i := range words {
		part = append(part,
			bpf.LoadAbsolute{Off: netOffset + offset + uint32(4*i), Size: 4},
			bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: mask(prefix.Bits() - 32*i)},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(address[4*i:]), SkipTrue: uint8(perWord*(words-i-1) + 1)}, //nolint:gosec // the same
		)
	}
	return append(part, bpf.RetConstant{Val: snap})
}

// mask returns a word whose first bits are set.
func mask(bits int) uint32 {
	if bits >= 32 {
		return 0xffffffff
	}
	return ^(uint32(0xffffffff) >> bits)
}

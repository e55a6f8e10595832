// Package trace walks packets through a rendered packet filter, for tests: it reads what netfilter.Rules.Render wrote and
// tells what would become of a packet. It knows the text only, and none of the code that made it.
//
// It is strict: a word that it does not know fails the parse, because a match that is skipped would make every test that
// follows worthless.
package trace

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Packet is a packet at one hook.
type Packet struct {
	// In and Out are interfaces; empty where the hook has none.
	In, Out  string
	Src, Dst netip.Addr
	// Protocol is "tcp", "udp", "sctp" or "icmp".
	Protocol string
	DstPort  uint16
	// Flags are those of a TCP packet: "S", "SA", "A", "R".
	Flags string
	// State is conntrack's: "NEW", "ESTABLISHED", "RELATED", "INVALID" or "UNTRACKED".
	State string
	// ConnMark is the mark of the packet's connection, Mark its own, with which a packet goes on to its next hook.
	ConnMark, Mark uint32
	// DNAT and SNAT say that the connection's destination and source were translated, Reply that the packet goes to who began it.
	DNAT, SNAT, Reply bool
	// Spoofed says that the route back to the source does not go out of In.
	Spoofed bool
	// FromNode says that the source is an address of the node.
	FromNode bool
}

// Verdict is what became of a packet.
type Verdict struct {
	// Target is "DROP", "ACCEPT", "SNAT 10.0.0.1" or "MASQUERADE"; empty where every chain returned.
	Target string
	// Trail holds the comments of the rules that matched, in their order.
	Trail []string
	// Logged holds the prefixes that the packet was logged with.
	Logged []string
	// Mark is the packet's mark afterwards.
	Mark uint32
}

// Filter is one family of a parsed packet filter.
type Filter struct {
	sets   map[string]*set
	chains map[chainKey][]rule
	hooks  []hook
}

type chainKey struct{ table, name string }

type hook struct {
	table, builtIn, chain string
	last                  bool
}

// rule is a parsed rule: all matches must hold. text is for messages.
type rule struct {
	text    string
	comment string
	matches []match
	target  string // a chain, or a target with its argument
	jump    bool
	gotos   bool
	logs    string // the prefix of NFLOG
	marks   func(mark uint32) uint32
	sets    []string
	options []string
}

type match func(*Filter, Packet) bool

// Walk sends a packet through our part of a built-in chain.
func (f *Filter) Walk(table, builtIn string, p Packet) (Verdict, error) {
	v := Verdict{Mark: p.Mark}
	found := false
	for _, h := range f.hooks {
		if h.table != table || h.builtIn != builtIn {
			continue
		}
		found = true
		target, err := f.chain(table, h.chain, p, &v)
		if err != nil {
			return v, fmt.Errorf("walking %s %s: %w", table, builtIn, err)
		}
		if target != "" {
			v.Target = target
			return v, nil
		}
	}
	if !found {
		return v, fmt.Errorf("walking %s %s: no hook there", table, builtIn)
	}
	return v, nil
}

// Forward sends a packet all the way of one that is forwarded, through our part of each hook that may drop it. Target is "DROP", or
// empty for a packet that leaves.
func (f *Filter) Forward(p Packet) (Verdict, error) {
	var way Verdict
	for _, hook := range [...][2]string{{"mangle", "FORWARD"}, {"filter", "FORWARD"}, {"mangle", "POSTROUTING"}} {
		v, err := f.Walk(hook[0], hook[1], p)
		way.Trail, way.Logged = append(way.Trail, v.Trail...), append(way.Logged, v.Logged...)
		if err != nil || v.Target == "DROP" {
			way.Target = v.Target
			return way, err
		}
		p.Mark, way.Mark = v.Mark, v.Mark
	}
	return way, nil
}

// chain walks one chain and returns the final target, or "" where it returned to its caller.
func (f *Filter) chain(table, name string, p Packet, v *Verdict) (string, error) {
	rules, ok := f.chains[chainKey{table, name}]
	if !ok {
		return "", fmt.Errorf("there is no chain %s in %s", name, table)
	}
	if len(v.Trail) > 10_000 {
		return "", fmt.Errorf("chain %s runs in a loop", name)
	}
	for _, r := range rules {
		p.Mark = v.Mark // also where a chain that was left again has changed it
		if slices.ContainsFunc(r.matches, func(m match) bool { return !m(f, p) }) {
			continue
		}
		v.Trail = append(v.Trail, r.comment)
		switch {
		case r.target == "RETURN":
			return "", nil
		case r.target == "TCPMSS":
			continue
		case r.marks != nil:
			v.Mark = r.marks(v.Mark)
			continue
		case r.logs != "":
			v.Logged = append(v.Logged, r.logs)
			continue
		case !r.jump:
			return r.target, nil
		}
		target, err := f.chain(table, r.target, p, v)
		if err != nil || target != "" || r.gotos {
			return target, err // what a goto's chain returns, returns from this one
		}
	}
	return "", nil
}

// set is an ipset with its members in their text.
type set struct {
	kind    string
	members []setMember
}

type setMember struct {
	prefix   netip.Prefix
	protocol string
	port     uint16
}

// holds tells whether a packet matches the set by its sides, as xt_set does.
func (s *set) holds(sides []string, p Packet) bool {
	address := p.Src
	if sides[0] == "dst" {
		address = p.Dst
	}
	return slices.ContainsFunc(s.members, func(m setMember) bool {
		if s.kind == "hash:ip,port" && (m.protocol != p.Protocol || m.port != p.DstPort) {
			return false
		}
		return m.prefix.Contains(address)
	})
}

// onInterface matches iptables' interface patterns.
func onInterface(pattern, name string) bool {
	if prefix, ok := strings.CutSuffix(pattern, "+"); ok {
		return strings.HasPrefix(name, prefix)
	}
	return pattern == name
}

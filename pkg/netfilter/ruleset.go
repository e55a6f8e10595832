// Package netfilter is the plan for the kernel's packet filter as a plain value: the sets, chains and hooks that Warren
// wants to stand, and their rendering.
//
// Pure packages (pkg/policy, pkg/guard) make a Ruleset; pkg/firewall makes the kernel agree with it. A Ruleset holds
// everything of Warren's in both families, sorted by table and name: what is not in it, and carries our prefix, is removed. The
// same snapshot always gives the same Ruleset, and equal names with equal content mean that nothing has to be written.
package netfilter

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"
)

// CutMark is the bit in the mark of a conntrack entry that stops an established connection which policies no longer allow:
// pkg/guard drops what carries it, pkg/conntrack sets and clears it. No other bit of the mark is read or changed.
const CutMark = 1 << 24

// JudgedMark is the bit in the mark of a packet by which a connection begins that the policies allow: pkg/policy sets it where they do,
// and pkg/guard drops what lacks it behind FORWARD, and clears it. No other bit of the mark is read or changed.
const JudgedMark = 1 << 25

// LogGroup is the NFLOG group of the packets that policies ask to log.
const LogGroup = 87

// Prefix begins the name of every chain and set of Warren's.
const Prefix = "WARREN"

// Family is an IP family.
type Family uint8

// The families.
const (
	IPv4 Family = 4
	IPv6 Family = 6
)

// Families are both families, in the order in which they are written.
var Families = [...]Family{IPv4, IPv6} //nolint:gochecknoglobals // an array of constants

// FamilyOf returns the family of an address.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() || a.Is4In6() {
		return IPv4
	}
	return IPv6
}

// String returns "ipv4" or "ipv6".
func (f Family) String() string {
	if f == IPv6 {
		return "ipv6"
	}
	return "ipv4"
}

// inet returns the family's name in ipset's words.
func (f Family) inet() string {
	if f == IPv6 {
		return "inet6"
	}
	return "inet"
}

// Ruleset is everything that Warren wants in the kernel's packet filter.
type Ruleset struct {
	V4, V6 Rules
}

// Of returns the rules of one family.
func (r *Ruleset) Of(f Family) *Rules {
	if f == IPv6 {
		return &r.V6
	}
	return &r.V4
}

// Rules is one family's half of a Ruleset.
type Rules struct {
	Sets   []Set
	Chains []Chain
	Hooks  []Hook
}

// SetType is the ipset type of a set; its members are Entries with the fields that the type asks for.
type SetType string

// The set types in use.
const (
	// HashIP holds addresses: Entry.Prefix is a single address.
	HashIP SetType = "hash:ip"
	// HashNet holds prefixes; never /0, which the kernel refuses: it is split into two /1.
	HashNet SetType = "hash:net"
	// HashIPPort holds address, protocol and port.
	HashIPPort SetType = "hash:ip,port"
)

// Role is what a set's members decide. It gives the order in which an apply changes the sets, so that no state in between
// lets pass what both the old and the new rules deny.
type Role uint8

// The roles.
const (
	// Allows is the role of the peers and ports in rules: who enters it may do more. Members leave before the rules change
	// and enter after them. A set that is new is filled before, because nothing refers to it yet.
	Allows Role = iota
	// Selects is the role of sets that lead an address to its rules, and of those that fence addresses in. What goes on (-g) by
	// such a set must have a DROP behind it, for those that no set leads anywhere: members leave and enter one by one.
	Selects
	// Isolates is the role of the sets of isolated addresses: who enters it may do less. pkg/firewall says when they change. An
	// address that could not enter is taken out of the gate.
	Isolates
	// Frees is the role of the sets of addresses that are not isolated. Rules ask them that drop whom no other set knows, so that nothing
	// opens where another program empties one that isolates. Members enter before anything else changes, and leave behind it.
	// While such a set cannot be filled, the rules that ask it are left out: the others decide without them.
	Frees
	// Gate is the role of the start gate's set: what leaves it leaves before anything else of an apply, and what enters it
	// enters last, when every rule and every other set stands. Other programs take members out, too.
	Gate
)

// Set is an ipset. Its name tells its family, because names are shared between families.
type Set struct {
	Name    string
	Type    SetType
	Comment string
	Role    Role
	// Keeps says that members stay for as long as the set stands, also those that Entries do not name any more. So the kernel
	// remembers them, whatever becomes of who made the plan.
	Keeps bool
	// Entries are sorted, without duplicates.
	Entries []Entry
}

// Entry is a member of a set.
type Entry struct {
	Prefix   netip.Prefix
	Protocol string // HashIPPort only: "tcp", "udp" or "sctp"
	Port     uint16 // HashIPPort only
}

// Address returns the entry of a single address.
func Address(a netip.Addr) Entry {
	return Entry{Prefix: netip.PrefixFrom(a, a.BitLen())}
}

// Entries returns the entries sorted and without duplicates, as a Set wants them. It sorts in place.
func Entries(entries []Entry) []Entry {
	slices.SortFunc(entries, Entry.Compare)
	return slices.Compact(entries)
}

// Chain is a chain of ours in one table.
type Chain struct {
	Table string
	Name  string
	Rules []Rule
	// Closable names the objects that the rules come from, for example "shop/api", where the kernel may hold Closed in the
	// chain's place: when it refuses one of the rules, the rest of the table must not wait for it. Such a chain leads only to
	// chains without names that lead nowhere. A chain without names is never closed: that it cannot be written is a failure of the whole.
	Closable []string
}

// Compare orders chains by table and name.
func (c Chain) Compare(o Chain) int {
	return cmp.Or(cmp.Compare(c.Table, o.Table), cmp.Compare(c.Name, o.Name))
}

// Closed returns the chain with a DROP in the place of its rules.
func (c Chain) Closed() Chain {
	c.Rules = []Rule{{Args: []string{"-j", "DROP"}, Comment: "not applied, so closed: " + strings.Join(c.Closable, " ")}}
	return c
}

// Rule is one rule: its matches and target in the words of iptables, one argument an element, without the comment.
type Rule struct {
	Args []string
	// Comment is for people who read the rules, for example "shop/api ingress 0"; may be empty.
	Comment string
}

// Equal is true for rules with the same matches, target and comment.
func (r Rule) Equal(o Rule) bool { return r.Comment == o.Comment && slices.Equal(r.Args, o.Args) }

// Hook is a jump from a built-in chain to a chain of ours.
type Hook struct {
	Table   string
	BuiltIn string
	Chain   string
	// Append puts the jump last; otherwise it stands first.
	Append bool
}

package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// builder collects the sets and chains of one family. Sets are made where a rule first needs them, so none stands unused.
type builder struct {
	*compiler
	family netfilter.Family
	sets   map[string]netfilter.Set
	chains []netfilter.Chain
}

// member is an address of a pod; pod is its namespace and name, for people.
type member struct {
	address netip.Addr
	pod     string
}

// words makes a rule; each part may be several words.
func words(comment string, parts ...string) netfilter.Rule {
	return netfilter.Rule{Args: strings.Fields(strings.Join(parts, " ")), Comment: comment}
}

// matchSet matches a set by one or more sides of a packet ("src", "dst,dst").
func matchSet(set, sides string) string {
	return "-m set --match-set " + set + " " + sides
}

// digit ends the names of sets that are not hashed.
func (b *builder) digit() string { return strconv.Itoa(int(b.family)) }

func (b *builder) chain(name string, rules []netfilter.Rule) {
	b.chains = append(b.chains, netfilter.Chain{Table: "mangle", Name: name, Rules: rules})
}

func (b *builder) has(set string) bool {
	_, ok := b.sets[set]
	return ok
}

// members are the addresses of pods in the builder's family.
func (b *builder) members(pods []*cluster.Pod) []member {
	var members []member
	for _, pod := range pods {
		for _, a := range pod.Addresses {
			if netfilter.FamilyOf(a) == b.family {
				members = append(members, member{address: a, pod: pod.Namespace + "/" + pod.Name})
			}
		}
	}
	return members
}

// addressSet makes a set of members and returns its name.
func (b *builder) addressSet(name, comment string, members []member) string {
	entries := make([]netfilter.Entry, len(members))
	for i, m := range members {
		entries[i] = netfilter.Address(m.address)
	}
	b.sets[name] = netfilter.Set{Name: name, Type: netfilter.HashIP, Comment: comment, Entries: netfilter.Entries(entries)}
	return name
}

// podSet returns the set of the pods that a selection holds.
func (b *builder) podSet(s *selection) string {
	name := netfilter.SetName(b.family, "P", s.key...)
	if !b.has(name) {
		b.addressSet(name, s.text, b.members(s.pods))
	}
	return name
}

// blockSet returns the set of prefixes; its name is its content.
func (b *builder) blockSet(prefixes []netip.Prefix) string {
	parts := make([]string, len(prefixes))
	entries := make([]netfilter.Entry, len(prefixes))
	for i, p := range prefixes {
		parts[i] = p.String()
		entries[i] = netfilter.Entry{Prefix: p}
	}
	name := netfilter.SetName(b.family, "B", parts...)
	b.sets[name] = netfilter.Set{Name: name, Type: netfilter.HashNet, Comment: "ipBlocks", Entries: netfilter.Entries(entries)}
	return name
}

// portSet returns the set of the addresses and numbers that the pods of a selection give to a named port.
func (b *builder) portSet(s *selection, port cluster.Port) string {
	name := netfilter.SetName(b.family, "N", slices.Concat(s.key, []string{port.Name, string(port.Protocol)})...)
	if b.has(name) {
		return name
	}
	var entries []netfilter.Entry
	for _, pod := range s.pods {
		for _, named := range pod.Ports {
			if named.Name != port.Name || named.Protocol != port.Protocol {
				continue
			}
			for _, m := range b.members([]*cluster.Pod{pod}) {
				e := netfilter.Address(m.address)
				e.Protocol, e.Port = strings.ToLower(string(named.Protocol)), named.Port
				entries = append(entries, e)
			}
		}
	}
	b.sets[name] = netfilter.Set{
		Name: name, Type: netfilter.HashIPPort, Comment: "port " + port.Name + " of " + s.text, Entries: netfilter.Entries(entries),
	}
	return name
}

// result returns what was collected, sorted.
func (b *builder) result() netfilter.Rules {
	sets := make([]netfilter.Set, 0, len(b.sets))
	for _, s := range b.sets {
		sets = append(sets, s)
	}
	slices.SortFunc(sets, func(x, y netfilter.Set) int { return cmp.Compare(x.Name, y.Name) })
	slices.SortFunc(b.chains, func(x, y netfilter.Chain) int { return cmp.Compare(x.Name, y.Name) })
	return netfilter.Rules{Sets: sets, Chains: b.chains}
}

package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// frame is what leads to the chains of the groups in one family: the sets of isolated and of free pods and of the groups' members, and
// the chains from the entry to the dispatch. It is as large as the pods of the node are many, and is made anew when one of them comes
// or goes, or changes its group.
type frame struct {
	family netfilter.Family
	rules  netfilter.Rules
}

// member is an address of a pod; pod is its namespace and name, for people.
type member struct {
	address netip.Addr
	pod     string
}

// newFrame makes the frame of one family.
func (c *Compiler) newFrame(f netfilter.Family) netfilter.Rules {
	sorted := make([]*group, 0, len(c.groups))
	for _, g := range c.groups {
		sorted = append(sorted, g)
	}
	slices.SortFunc(sorted, func(a, b *group) int { return slices.Compare(a.names, b.names) })
	made := &frame{family: f}
	var isolated []member
	var directions []direction
	for _, d := range []direction{egress(), ingress()} {
		if members := made.dispatch(d, sorted); len(members) > 0 {
			made.free(d, c.local, members)
			isolated, directions = append(isolated, members...), append(directions, d)
		}
	}
	made.entry(isolated, directions)
	slices.SortFunc(made.rules.Sets, func(x, y netfilter.Set) int { return strings.Compare(x.Name, y.Name) })
	slices.SortFunc(made.rules.Chains, netfilter.Chain.Compare)
	return made.rules
}

// dispatch makes the chain that finds the groups of one direction, and returns the isolated pods.
func (m *frame) dispatch(d direction, groups []*group) []member {
	var isolated []member
	var rules []netfilter.Rule
	for _, g := range groups {
		if g.direction.name != d.name {
			continue
		}
		members := g.members(m.family)
		if len(members) == 0 {
			continue
		}
		isolated = append(isolated, members...)
		comment := strings.Join(g.names, " ")
		name := netfilter.SetName(m.family, "G"+d.group, g.names...)
		m.set(name, d.name+" by "+comment, netfilter.Selects, members)
		rules = append(rules, words(comment, matchSet(name, d.subject), "-g", g.chain))
	}
	if len(rules) == 0 {
		return nil
	}
	m.set(d.chain+m.digit(), "pods isolated for "+d.name, netfilter.Isolates, isolated)
	m.chain(d.chain, append(rules, words("isolated, by policies that do not stand yet", "-j", "DROP")))
	return isolated
}

// free makes the set of the local pods that are not isolated in a direction.
func (m *frame) free(d direction, local map[*pod]bool, isolated []member) {
	known := map[netip.Addr]bool{}
	for _, one := range isolated {
		known[one.address] = true
	}
	var free []member
	for p := range local {
		for _, a := range p.Addresses {
			if netfilter.FamilyOf(a) == m.family && !known[a] {
				free = append(free, member{address: a})
			}
		}
	}
	m.set(d.free+m.digit(), "pods not isolated for "+d.name, netfilter.Frees, free)
}

// entry makes the chains that lead to the dispatch in some directions; isolated are the pods that it finds there.
func (m *frame) entry(isolated []member, directions []direction) {
	m.chain(allowedChain, []netfilter.Rule{words("allowed", "-j MARK --set-xmark", markIs(netfilter.JudgedMark))})
	passes := words("no policy is against it", "-g", allowedChain)
	if len(isolated) == 0 {
		m.chain(netfilter.PolicyChain, []netfilter.Rule{passes})
		return
	}
	slices.SortFunc(isolated, func(x, y member) int {
		return cmp.Or(x.address.Compare(y.address), strings.Compare(x.pod, y.pod))
	})
	isolated = slices.Compact(isolated)
	all := netfilter.Prefix + "-ISOLATED" + m.digit()
	m.set(all, "pods that a policy selects", netfilter.Isolates, isolated)
	src, dst := matchSet(all, "src"), matchSet(all, "dst")
	rules := []netfilter.Rule{
		words("may be the same pod", src, dst, "-g", selfChain),
		words("", src, "-g", isolatedChain),
		words("", dst, "-g", isolatedChain),
	}
	for _, d := range directions {
		rules = append(rules,
			words("neither isolated nor free", "-i wrn+", m.notFree(d, "src"), "-j DROP"),
			words("neither isolated nor free", "-o wrn+", m.notFree(d, "dst"), "-j DROP"))
	}
	m.chain(netfilter.PolicyChain, append(rules, passes))

	var self []netfilter.Rule
	for _, one := range isolated {
		a := one.address.String()
		self = append(self, words(one.pod+" to itself", "-s", a, "-d", a, "-g", allowedChain))
	}
	m.chain(selfChain, append(self, words("", "-g", isolatedChain)))
	m.chain(isolatedChain, append(m.judge(directions), passes))
}

// judge makes the rules that send a connection of an isolated pod to the dispatch of each direction, and drop it where it comes back
// from there without the mark.
func (m *frame) judge(directions []direction) []netfilter.Rule {
	// A pod whose answers conntrack no longer knows would open, as the first packet of a new connection, what its
	// policies closed; both directions, because the entry that such a packet makes is a reversed one.
	rules := []netfilter.Rule{words("a connection begins with SYN", "-p tcp ! --syn -j DROP")}
	for _, d := range directions {
		rules = append(rules,
			words("not allowed yet for "+d.name, "-j MARK --set-xmark", markIs(0)),
			words("isolated for "+d.name, matchSet(d.chain+m.digit(), d.subject), "-j", d.chain),
			words("neither allowed nor free", d.link, m.notFree(d, d.subject), "-m mark ! --mark", markIs(netfilter.JudgedMark), "-j DROP"))
	}
	return rules
}

// notFree matches a packet whose end on a side is not free in a direction.
func (m *frame) notFree(d direction, side string) string {
	return "-m set ! --match-set " + d.free + m.digit() + " " + side
}

// markIs is a value of the bit netfilter.JudgedMark in the words of iptables.
func markIs(value uint32) string { return fmt.Sprintf("%#x/%#x", value, netfilter.JudgedMark) }

// digit ends the names of sets that are not hashed.
func (m *frame) digit() string { return strconv.Itoa(int(m.family)) }

func (m *frame) chain(name string, rules []netfilter.Rule) {
	m.rules.Chains = append(m.rules.Chains, netfilter.Chain{Table: table, Name: name, Rules: rules})
}

// set makes a set of members.
func (m *frame) set(name, comment string, role netfilter.Role, members []member) {
	entries := make([]netfilter.Entry, len(members))
	for i, one := range members {
		entries[i] = netfilter.Address(one.address)
	}
	m.rules.Sets = append(m.rules.Sets, netfilter.Set{
		Name: name, Type: netfilter.HashIP, Comment: comment, Role: role, Entries: netfilter.Entries(entries),
	})
}

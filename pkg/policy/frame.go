package policy

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// frame is what leads to the chains of the groups in one family: the sets of isolated pods and of the groups' members, and the
// chains from the entry to the dispatch. It is as large as what is isolated on the node, so it is made anew when a pod comes
// to a group or leaves it.
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
	in, out := made.dispatch(ingress(), sorted), made.dispatch(egress(), sorted)
	made.entry(in, out)
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

// entry makes the chains that lead to the dispatch; in and out are the pods isolated for ingress and egress.
func (m *frame) entry(in, out []member) {
	isolated := slices.Concat(in, out)
	if len(isolated) == 0 {
		m.chain(netfilter.PolicyChain, nil)
		return
	}
	slices.SortFunc(isolated, func(x, y member) int {
		return cmp.Or(x.address.Compare(y.address), strings.Compare(x.pod, y.pod))
	})
	isolated = slices.Compact(isolated)
	all := netfilter.Prefix + "-ISOLATED" + m.digit()
	m.set(all, "pods that a policy selects", netfilter.Isolates, isolated)
	src, dst := matchSet(all, "src"), matchSet(all, "dst")
	m.chain(netfilter.PolicyChain, []netfilter.Rule{
		words("may be the same pod", src, dst, "-g", selfChain),
		words("", src, "-g", isolatedChain),
		words("", dst, "-g", isolatedChain),
	})

	var self []netfilter.Rule
	for _, one := range isolated {
		a := one.address.String()
		self = append(self, words(one.pod+" to itself", "-s", a, "-d", a, "-j", "RETURN"))
	}
	m.chain(selfChain, append(self, words("", "-g", isolatedChain)))

	// A pod whose answers conntrack no longer knows would open, as the first packet of a new connection, what its
	// policies closed; both directions, because the entry that such a packet makes is a reversed one.
	rules := []netfilter.Rule{words("a connection begins with SYN", "-p tcp ! --syn -j DROP")}
	if d := egress(); len(out) > 0 {
		rules = append(rules, words("isolated for "+d.name, matchSet(d.chain+m.digit(), d.subject), "-j", d.chain))
	}
	if d := ingress(); len(in) > 0 {
		rules = append(rules, words("isolated for "+d.name, matchSet(d.chain+m.digit(), d.subject), "-j", d.chain))
	}
	m.chain(isolatedChain, rules)
}

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

// Package policy compiles the NetworkPolicies that concern one node into a netfilter.Ruleset, as a pure function of the
// cluster's state, and explains what they come to for one connection (see Explain).
//
// The result of Compile is one entry chain in mangle, netfilter.PolicyChain, which sees the new connections of pods that passed the
// start gate, and what hangs below it:
//
//	WARREN-POLICY     source or destination isolated? no: RETURN, which means allowed
//	WARREN-SELF       a pod that reaches itself (through its own Service): RETURN
//	WARREN-ISOLATED   a TCP packet that starts in the middle: DROP; source isolated: egress; destination isolated: ingress
//	WARREN-EGRESS     finds the group of the source, WARREN-INGRESS that of the destination; none: DROP
//	WARREN-E-hash     a group: the rules of its policies, each a RETURN, and a DROP behind them
//
// Local pods with the same list of policies in a direction form a group, so that a pod costs a set member and not a
// chain. Peers are sets that all rules with the same selector share. Group chains are entered by goto: their RETURN
// leaves the dispatch chain too, and its closing DROP catches only a pod whose group does not stand (yet). They may be
// closed one by one (netfilter.Chain.Closable), so a rule that the kernel refuses stops no other policies.
//
// What Kubernetes leaves open is decided like this. A named port is what the destination pod calls so, number by number:
// on ingress on the selected pods, on egress on the peers; an egress rule whose peer is an ipBlock, or everybody, allows
// it towards pods that have such a port, and towards nothing else, because beyond pods nothing has names. A pod with two
// container ports of one name and protocol opens both. A rule with ports never matches ICMP; a rule without matches every
// protocol. Addresses are judged after DNAT, so an ipBlock that names a Service never matches.
package policy

import (
	"cmp"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// The chains that are always there or hold the dispatch; groups have hashed names.
const (
	selfChain     = netfilter.Prefix + "-SELF"
	isolatedChain = netfilter.Prefix + "-ISOLATED"
)

// direction is what differs between ingress and egress.
type direction struct {
	name string
	// chain is the dispatch chain and the prefix of the set of all pods isolated in this direction.
	chain string
	// group is the kind of the names of group chains.
	group string
	// subject and peer are the sides of a packet that the selected pod and its peer stand on.
	subject, peer string
	// isolates and rules read a policy.
	isolates func(*cluster.Policy) bool
	rules    func(*cluster.Policy) []cluster.Rule
}

func ingress() direction {
	return direction{
		name: "ingress", chain: netfilter.Prefix + "-INGRESS", group: "I", subject: "dst", peer: "src",
		isolates: func(p *cluster.Policy) bool { return p.Ingress },
		rules:    func(p *cluster.Policy) []cluster.Rule { return p.IngressRules },
	}
}

func egress() direction {
	return direction{
		name: "egress", chain: netfilter.Prefix + "-EGRESS", group: "E", subject: "src", peer: "dst",
		isolates: func(p *cluster.Policy) bool { return p.Egress },
		rules:    func(p *cluster.Policy) []cluster.Rule { return p.EgressRules },
	}
}

// Compile plans the packet filter for the policies that select a pod of the snapshot's own node. The snapshot must be
// bound (see cluster.Snapshot.Bind): a local pod without an address is in no group, and the start gate keeps it closed.
//
// What cannot be compiled allows nothing and is a Problem; the pods stay isolated and everything else is enforced.
func Compile(s cluster.Snapshot) (netfilter.Ruleset, []cluster.Problem) {
	c := newCompiler(s)
	in, out := c.groups(ingress()), c.groups(egress())
	return netfilter.Ruleset{
		V4: c.compile(netfilter.IPv4, in, out),
		V6: c.compile(netfilter.IPv6, in, out),
	}, cluster.SortProblems(c.problems)
}

// group are local pods that the same policies isolate in one direction.
type group struct {
	policies []*cluster.Policy
	pods     []*cluster.Pod
}

// names lists the group's policies.
func (g group) names() []string {
	names := make([]string, len(g.policies))
	for i, p := range g.policies {
		names[i] = p.Namespace + "/" + p.Name
	}
	return names
}

// groups divides the local pods that are isolated in a direction, in the order of their policies.
func (c *compiler) groups(d direction) []group {
	byPolicies := map[string]*group{}
	for _, pod := range c.local {
		selecting := c.selecting(d, pod)
		if len(selecting) == 0 {
			continue
		}
		g := &group{policies: selecting}
		key := strings.Join(g.names(), " ")
		if known, ok := byPolicies[key]; ok {
			g = known
		}
		g.pods = append(g.pods, pod)
		byPolicies[key] = g
	}
	groups := make([]group, 0, len(byPolicies))
	for _, g := range byPolicies {
		groups = append(groups, *g)
	}
	slices.SortFunc(groups, func(a, b group) int { return slices.Compare(a.names(), b.names()) })
	return groups
}

// compile plans one family.
func (c *compiler) compile(f netfilter.Family, in, out []group) netfilter.Rules {
	b := &builder{compiler: c, family: f, sets: map[string]netfilter.Set{}}
	isolated := b.dispatch(ingress(), in)
	isolated = append(isolated, b.dispatch(egress(), out)...)
	b.entry(isolated)
	return b.result()
}

// entry makes the chains that lead to the dispatch.
func (b *builder) entry(isolated []member) {
	if len(isolated) == 0 {
		b.chain(netfilter.PolicyChain, nil)
		return
	}
	slices.SortFunc(isolated, func(x, y member) int {
		return cmp.Or(x.address.Compare(y.address), strings.Compare(x.pod, y.pod))
	})
	isolated = slices.Compact(isolated)
	set := b.addressSet(netfilter.Prefix+"-ISOLATED"+b.digit(), "pods that a policy selects", isolated)
	src, dst := matchSet(set, "src"), matchSet(set, "dst")
	b.chain(netfilter.PolicyChain, []netfilter.Rule{
		words("may be the same pod", src, dst, "-g", selfChain),
		words("", src, "-g", isolatedChain),
		words("", dst, "-g", isolatedChain),
	})

	var self []netfilter.Rule
	for _, m := range isolated {
		a := m.address.String()
		self = append(self, words(m.pod+" to itself", "-s", a, "-d", a, "-j", "RETURN"))
	}
	b.chain(selfChain, append(self, words("", "-g", isolatedChain)))

	// A pod whose answers conntrack no longer knows would open, as the first packet of a new connection, what its
	// policies closed; both directions, because the entry that such a packet makes is a reversed one.
	rules := []netfilter.Rule{words("a connection begins with SYN", "-p tcp ! --syn -j DROP")}
	for _, d := range []direction{egress(), ingress()} {
		if all := d.chain + b.digit(); b.has(all) {
			rules = append(rules, words("isolated for "+d.name, matchSet(all, d.subject), "-j", d.chain))
		}
	}
	b.chain(isolatedChain, rules)
}

// dispatch makes the chains of one direction, and returns the isolated pods.
func (b *builder) dispatch(d direction, groups []group) []member {
	var isolated []member
	var rules []netfilter.Rule
	for _, g := range groups {
		members := b.members(g.pods)
		if len(members) == 0 {
			continue
		}
		isolated = append(isolated, members...)
		names := g.names()
		comment := strings.Join(names, " ")
		set := b.addressSet(netfilter.SetName(b.family, "G"+d.group, names...), d.name+" by "+comment, members)
		chain := d.groupChain(names)
		rules = append(rules, words(comment, matchSet(set, d.subject), "-g", chain))
		b.chains = append(b.chains, netfilter.Chain{Table: "mangle", Name: chain, Rules: b.groupRules(d, g), Closable: names})
	}
	if len(rules) == 0 {
		return nil
	}
	b.addressSet(d.chain+b.digit(), "pods isolated for "+d.name, isolated)
	b.chain(d.chain, append(rules, words("isolated, by policies that do not stand yet", "-j", "DROP")))
	return isolated
}

// groupChain is the chain of the group of pods that these policies isolate.
func (d direction) groupChain(policies []string) string {
	return netfilter.Name(d.group, policies...)
}

// groupRules are the rules of a group: what its policies allow, and a DROP.
func (b *builder) groupRules(d direction, g group) []netfilter.Rule {
	var rules []netfilter.Rule
	for _, p := range g.policies {
		for _, r := range d.rules(p) {
			lines := b.allow(d, p, r)
			if r.AnyPeer && r.AnyPort {
				return append(rules, lines...) // nothing comes past it
			}
			rules = append(rules, lines...)
		}
	}
	return append(rules, words("isolated by "+strings.Join(g.names(), " "), "-j", "DROP"))
}

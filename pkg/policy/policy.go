// Package policy compiles the NetworkPolicies that concern one node into a netfilter.Ruleset, as a pure function of the
// cluster's state, keeps it in step with the cluster at the cost of what changes (see Compiler), and explains what policies come
// to for one connection (see Explain).
//
// The result is one entry chain in mangle, netfilter.PolicyChain, which sees the new connections of pods that passed the
// start gate, and what hangs below it:
//
//	WARREN-POLICY     source or destination isolated? a local one neither isolated nor free: DROP; else allowed
//	WARREN-SELF       a pod that reaches itself (through its own Service): allowed
//	WARREN-ISOLATED   a TCP packet that starts in the middle: DROP; source isolated: egress; destination isolated: ingress
//	WARREN-EGRESS     finds the group of the source, WARREN-INGRESS that of the destination; none: DROP
//	WARREN-E-hash     a group: the rules of its policies, and a DROP behind them
//	WARREN-ALLOWED    what a rule that allows goes to: sets netfilter.JudgedMark
//
// Local pods with the same list of policies in a direction form a group, so that a pod costs a set member and not a
// chain. Peers are sets that all rules with the same selector share. Group chains are entered by goto: what they allow
// leaves the dispatch chain too, and its closing DROP catches only a pod whose group does not stand (yet). They may be
// closed one by one (netfilter.Chain.Closable), so a rule that the kernel refuses stops no other policies.
//
// Nothing is allowed by what is missing, so that no chain and no set opens anything when another program empties it: a
// connection needs the mark, which WARREN-ISOLATED asks for behind each of the two dispatches, or ends that are in the sets of
// those that are free.
//
// Where a policy of a group asks for it, or the namespace or the operator, rules of NFLOG stand before the group's DROP ("D:" and the
// chain's name) and before each rule that allows ("A:"). They meet first packets only, and decide nothing.
//
// What Kubernetes leaves open is decided like this. A named port is what the destination pod calls so, number by number:
// on ingress on the selected pods, on egress on the peers; an egress rule whose peer is an ipBlock, or everybody, allows
// it towards pods that have such a port, and towards nothing else, because beyond pods nothing has names. A pod with two
// container ports of one name and protocol opens both. A rule with ports never matches ICMP; a rule without matches every
// protocol. Addresses are judged after DNAT, so an ipBlock that names a Service never matches.
package policy

import (
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// The chains that are always there or hold the dispatch; groups have hashed names.
const (
	selfChain     = netfilter.Prefix + "-SELF"
	isolatedChain = netfilter.Prefix + "-ISOLATED"
	allowedChain  = netfilter.Prefix + "-ALLOWED"
	table         = "mangle"
)

// direction is what differs between ingress and egress.
type direction struct {
	name string
	// chain is the dispatch chain and the prefix of the set of all pods isolated in this direction.
	chain string
	// free is the prefix of the set of the local pods that are not isolated in this direction.
	free string
	// group is the kind of the names of group chains.
	group string
	// subject and peer are the sides of a packet that the selected pod and its peer stand on, link matches the subject's interface.
	subject, peer, link string
	// isolates and rules read a policy.
	isolates func(*cluster.Policy) bool
	rules    func(*cluster.Policy) []cluster.Rule
}

func ingress() direction {
	return direction{
		name: "ingress", chain: netfilter.Prefix + "-INGRESS", free: netfilter.Prefix + "-FREE-INGRESS", group: "I",
		subject: "dst", peer: "src", link: "-o wrn+",
		isolates: func(p *cluster.Policy) bool { return p.Ingress },
		rules:    func(p *cluster.Policy) []cluster.Rule { return p.IngressRules },
	}
}

func egress() direction {
	return direction{
		name: "egress", chain: netfilter.Prefix + "-EGRESS", free: netfilter.Prefix + "-FREE-EGRESS", group: "E",
		subject: "src", peer: "dst", link: "-i wrn+",
		isolates: func(p *cluster.Policy) bool { return p.Egress },
		rules:    func(p *cluster.Policy) []cluster.Rule { return p.EgressRules },
	}
}

// Compile plans the packet filter for the policies that select a pod of the snapshot's own node, once. The snapshot must be
// bound (see cluster.Snapshot.Bind). The problems are what cannot be enforced: it allows nothing, the pods stay isolated and everything else
// is enforced.
func Compile(s cluster.Snapshot) (netfilter.Ruleset, []cluster.Problem) {
	c := NewCompiler(s.Self, Options{})
	for i := range s.Namespaces {
		c.setNamespace(s.Namespaces[i].Name, &s.Namespaces[i])
	}
	for i := range s.Policies {
		c.setPolicy(s.Policies[i].Key(), &s.Policies[i])
	}
	for i := range s.Pods {
		c.setPod(s.Pods[i].Key(), &s.Pods[i])
	}
	c.plan()
	return c.Ruleset(), c.Problems()
}

// groupChain is the chain of the group of pods that these policies isolate.
func (d direction) groupChain(policies []string) string {
	return netfilter.Name(d.group, policies...)
}

package policy

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// group are local pods that the same policies isolate in one direction.
type group struct {
	id        groupID
	direction direction
	// names are those of the policies, chain is made of them.
	names     []string
	chain     string
	namespace *namespace
	policies  []*cluster.Policy
	pods      map[*pod]bool
	v4, v6    rendered
	problems  []cluster.Problem
}

// groupID identifies a group by its direction and the names of its policies.
type groupID struct{ direction, policies string }

// rendered is a group's chain in one family.
type rendered struct {
	// stands is true where a pod of the group has an address of the family.
	stands bool
	rules  []netfilter.Rule
	// uses are the sets that the rules refer to, as often as they do; policies and log are what the rules were made of.
	uses     []*set
	policies []*cluster.Policy
	log      cluster.LogMode
}

func (g *group) of(f netfilter.Family) *rendered {
	if f == netfilter.IPv6 {
		return &g.v6
	}
	return &g.v4
}

// members are the addresses of the group's pods in a family.
func (g *group) members(f netfilter.Family) []member {
	var members []member
	for p := range g.pods {
		for _, a := range p.Addresses {
			if netfilter.FamilyOf(a) == f {
				members = append(members, member{address: a, pod: p.Key().String()})
			}
		}
	}
	return members
}

// logs returns what is logged of the connections of the group's pods.
func (g *group) logs(least cluster.LogMode) cluster.LogMode {
	if g.namespace.object != nil {
		least = max(least, g.namespace.object.Log)
	}
	for _, p := range g.policies {
		least = max(least, p.Log)
	}
	return least
}

// regroup puts a local pod into the groups of the policies that isolate it now.
func (c *Compiler) regroup(n *namespace, p *pod) {
	var selecting []*cluster.Policy
	for _, policy := range n.policies {
		if selectsPod(policy, p.Pod) {
			selecting = append(selecting, policy)
		}
	}
	for i, d := range [...]direction{ingress(), egress()} {
		var isolating []*cluster.Policy
		for _, policy := range selecting {
			if d.isolates(policy) {
				isolating = append(isolating, policy)
			}
		}
		g := c.group(n, d, isolating)
		if g != nil {
			c.stale[g] = true // its policies may be others by the same names
		}
		if g != p.groups[i] {
			c.part(p, i)
			c.join(p, i, g)
		}
	}
}

// group returns the group of the pods that these policies of a namespace isolate; nil where there are none.
func (c *Compiler) group(n *namespace, d direction, policies []*cluster.Policy) *group {
	if len(policies) == 0 {
		return nil
	}
	names := namesOf(policies)
	id := groupID{d.name, strings.Join(names, " ")}
	g, ok := c.groups[id]
	if !ok {
		g = &group{id: id, direction: d, names: names, chain: d.groupChain(names), namespace: n, pods: map[*pod]bool{}}
		c.groups[id], c.chains[g.chain] = g, g
	}
	g.policies = policies
	return g
}

// namesOf are the namespaces and names of policies.
func namesOf(policies []*cluster.Policy) []string {
	names := make([]string, len(policies))
	for i, p := range policies {
		names[i] = p.Key().String()
	}
	return names
}

// leave takes a pod out of its groups; addresses are those that it had there.
func (c *Compiler) leave(p *pod, addresses []netip.Addr) {
	if c.local[p] {
		c.affectOwn(addresses)
	}
	for i, g := range p.groups {
		if g != nil {
			c.affect(addresses...)
			c.part(p, i)
		}
	}
}

// part takes a pod out of its group in a direction.
func (c *Compiler) part(p *pod, direction int) {
	g := p.groups[direction]
	if g == nil {
		return
	}
	p.groups[direction] = nil
	delete(g.pods, p)
	c.stale[g], c.reframe = true, true
	c.affect(p.Addresses...)
}

// join puts a pod into a group in a direction.
func (c *Compiler) join(p *pod, direction int, g *group) {
	if g == nil {
		return
	}
	p.groups[direction] = g
	g.pods[p] = true
	c.stale[g], c.reframe = true, true
	c.affect(p.Addresses...)
}

// refresh renders the chain of a group again where what it is made of changed, in the families that its pods have.
func (c *Compiler) refresh(g *group) {
	if len(g.pods) == 0 {
		delete(c.groups, g.id)
		delete(c.chains, g.chain)
	}
	for _, f := range netfilter.Families {
		members := g.members(f)
		is, log := g.of(f), g.logs(c.log)
		switch {
		case len(members) == 0 && is.stands:
			c.changes(f).Delete = append(c.changes(f).Delete, netfilter.Chain{Table: table, Name: g.chain})
			c.release(is.uses)
			*is = rendered{}
			continue
		case len(members) == 0, is.stands && is.log == log && slices.Equal(is.policies, g.policies):
			continue
		}
		b := builder{Compiler: c, family: f}
		rules := b.groupRules(g, log)
		if !is.stands || !slices.EqualFunc(rules, is.rules, netfilter.Rule.Equal) {
			c.changes(f).Write = append(c.changes(f).Write, g.chainOf(rules))
			for _, m := range members {
				c.affect(m.address)
			}
		}
		c.release(is.uses)
		*is = rendered{stands: true, rules: rules, uses: b.uses, policies: g.policies, log: log}
	}
	g.problems = problemsOf(g.direction, g.policies)
}

// chainOf returns the group's chain with its rules.
func (g *group) chainOf(rules []netfilter.Rule) netfilter.Chain {
	return netfilter.Chain{Table: table, Name: g.chain, Rules: rules, Closable: g.names}
}

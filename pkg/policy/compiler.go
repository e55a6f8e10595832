package policy

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/podcidr"
)

// Options are what a node's operator decides about all policies.
type Options struct {
	// Log is what is logged of the connections of isolated pods where neither a policy nor the namespace asks for more.
	Log cluster.LogMode
}

// Compiler plans the packet filter for the policies that select a pod of one node, and keeps the plan in step with the
// cluster. What an Update costs follows what changed: a pod meets only the selectors that ask for one of its labels, a local
// pod that comes or goes renders its groups anew, and an edited policy the groups that it is in.
//
// What it holds and returns depends on the cluster's state alone, not on the order in which it came about. It keeps the objects
// that it is given, and no copies of them. It is not safe for concurrent use.
type Compiler struct {
	self string
	log  cluster.LogMode
	// own are the addresses of the node itself.
	own        []netip.Addr
	namespaces map[string]*namespace
	owners     owners
	selections map[selector]*selection
	scopes     map[selector]*scope
	byLabels   index[*scope]
	sets       map[string]*set
	groups     map[groupID]*group
	chains     map[string]*group
	// local are the pods of the own node.
	local map[*pod]bool
	frame netfilter.Ruleset
	news
}

// news is what an Update that is under way has come across.
type news struct {
	// dirty are local pods that may be in other groups than they were, with their namespaces; stale are groups whose rules may be
	// others. The frame is made anew where reframe is true.
	dirty   map[*pod]*namespace
	stale   map[*group]bool
	reframe bool
	// touches are entries that may have come to a set or gone; unused are sets that a rule does not refer to any more, fresh those
	// that were not there before.
	touches []touched
	unused  []*set
	fresh   []*set
	// stirred are scopes with new or dead selections. Namespaces find their scopes anew where rescoped is true.
	stirred  []*scope
	rescoped bool
	round    uint64
	change   netfilter.Change
	affected []netip.Addr
	// found and entries are space for lists.
	found   []*selection
	entries []netfilter.Entry
}

// Update is what a change of the cluster comes to.
type Update struct {
	// Change turns the rules before into the rules now.
	Change netfilter.Change
	// Affected are the addresses whose established connections may be judged otherwise than before, sorted.
	Affected []netip.Addr
}

// NewCompiler returns the compiler of the node self, for a cluster in which there is nothing.
func NewCompiler(self string, o Options) *Compiler {
	c := &Compiler{
		self: self, log: o.Log, namespaces: map[string]*namespace{},
		owners:     owners{first: map[netip.Addr]*pod{}, more: map[netip.Addr][]*pod{}},
		selections: map[selector]*selection{}, scopes: map[selector]*scope{}, sets: map[string]*set{},
		groups: map[groupID]*group{}, chains: map[string]*group{}, local: map[*pod]bool{},
		news: news{dirty: map[*pod]*namespace{}, stale: map[*group]bool{}},
	}
	for _, f := range netfilter.Families {
		*c.frame.Of(f) = c.newFrame(f)
	}
	return c
}

// Update takes in what changed in the cluster. The pods must be bound (see cluster.State): one without an address is in no
// set and no group, and where it is local the start gate keeps it closed.
func (c *Compiler) Update(d cluster.Delta) Update {
	if node, ok := d.Nodes[c.self]; ok {
		c.setSelf(node)
	}
	for name, object := range d.Namespaces {
		c.setNamespace(name, object)
	}
	for key, object := range d.Policies {
		c.setPolicy(key, object)
	}
	for key, object := range d.Pods {
		c.setPod(key, object)
	}
	return c.plan()
}

// setSelf takes the addresses of the node itself, whose traffic with its pods no policy stops.
func (c *Compiler) setSelf(node *cluster.Node) {
	c.own = nil
	if node == nil {
		return
	}
	c.own = slices.Clone(node.Addresses)
	for _, p := range node.PodCIDRs {
		c.own = append(c.own, podcidr.NodeAddress(p))
	}
}

// plan finds out what the changed objects come to. The groups come first, because their rules say which selections and sets
// there are; then the members of sets.
func (c *Compiler) plan() Update {
	for p, n := range c.dirty {
		c.regroup(n, p)
	}
	for g := range c.stale {
		c.refresh(g)
	}
	c.drop()
	c.settle()
	c.retouch()
	if c.reframe {
		before := c.frame
		for _, f := range netfilter.Families {
			*c.frame.Of(f) = c.newFrame(f)
		}
		c.add(netfilter.Diff(before, c.frame))
	}
	for _, f := range netfilter.Families {
		r := c.changes(f)
		slices.SortFunc(r.Sets, func(a, b netfilter.SetChange) int { return strings.Compare(a.Name, b.Name) })
		slices.SortFunc(r.Write, netfilter.Chain.Compare)
		slices.SortFunc(r.Delete, netfilter.Chain.Compare)
	}
	slices.SortFunc(c.affected, netip.Addr.Compare)
	u := Update{Change: c.change, Affected: slices.Compact(c.affected)}
	clear(c.dirty)
	clear(c.stale)
	c.reframe, c.change, c.affected = false, netfilter.Change{}, nil
	return u
}

// Ruleset returns the rules that the cluster comes to, all of them.
func (c *Compiler) Ruleset() netfilter.Ruleset {
	var all netfilter.Ruleset
	for _, f := range netfilter.Families {
		frame, r := c.frame.Of(f), all.Of(f)
		r.Sets, r.Chains = slices.Clone(frame.Sets), slices.Clone(frame.Chains)
		for _, g := range c.groups {
			if is := g.of(f); is.stands {
				r.Chains = append(r.Chains, g.chainOf(is.rules))
			}
		}
	}
	for _, s := range c.sets {
		r := all.Of(s.family)
		r.Sets = append(r.Sets, s.whole())
	}
	for _, f := range netfilter.Families {
		r := all.Of(f)
		slices.SortFunc(r.Sets, func(a, b netfilter.Set) int { return strings.Compare(a.Name, b.Name) })
		slices.SortFunc(r.Chains, netfilter.Chain.Compare)
	}
	return all
}

// Problems returns what of the policies in force here cannot be enforced, sorted. It allows nothing; the pods stay isolated and
// everything else is enforced.
func (c *Compiler) Problems() []cluster.Problem {
	var problems []cluster.Problem
	for _, g := range c.groups {
		problems = append(problems, g.problems...)
	}
	return cluster.SortProblems(problems)
}

// Group returns what a chain of a group is there for: the direction that its policies isolate in, "ingress" or "egress", and
// the namespaces and names of the policies. It returns false for a chain that is not there.
func (c *Compiler) Group(chain string) (direction string, policies []string, ok bool) {
	g, ok := c.chains[chain]
	if !ok {
		return "", nil, false
	}
	return g.direction.name, g.names, true
}

// Pod returns a pod that has an address: the first by namespace and name, where the status of another one still names it, too.
func (c *Compiler) Pod(a netip.Addr) (*cluster.Pod, bool) {
	owners := c.owners.of(a)
	if len(owners) == 0 {
		return nil, false
	}
	return owners[0].Pod, true
}

// Chains returns the chains of the policies that isolate the local pod of an address.
func (c *Compiler) Chains(a netip.Addr) []string {
	var chains []string
	for _, p := range c.owners.of(a) {
		for _, g := range p.groups {
			if g != nil {
				chains = append(chains, g.chain)
			}
		}
	}
	return chains
}

// affect notes addresses whose connections may be judged otherwise.
func (c *Compiler) affect(addresses ...netip.Addr) {
	c.affected = append(c.affected, addresses...)
}

// affectOwn notes those of a local pod's addresses that are the node's where no pod of the node holds them.
func (c *Compiler) affectOwn(addresses []netip.Addr) {
	for _, a := range addresses {
		if slices.Contains(c.own, a) {
			c.affect(a)
		}
	}
}

// changes returns the change of a family.
func (c *Compiler) changes(f netfilter.Family) *netfilter.RulesChange { return c.change.Of(f) }

// changed adds the change of a set.
func (c *Compiler) changed(s *set, change netfilter.SetChange) {
	r := c.changes(s.family)
	if r.Sets == nil {
		r.Sets = make([]netfilter.SetChange, 0, 2) // few updates change more
	}
	r.Sets = append(r.Sets, change)
}

// add adds a change of other sets and chains.
func (c *Compiler) add(more netfilter.Change) {
	for _, f := range netfilter.Families {
		r, m := c.changes(f), more.Of(f)
		r.Sets, r.Write, r.Delete = append(r.Sets, m.Sets...), append(r.Write, m.Write...), append(r.Delete, m.Delete...)
	}
}

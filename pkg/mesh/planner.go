package mesh

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/podcidr"
)

// Planner is the mesh of one node, kept up to date as Nodes change. What a change costs does not grow with the number of the Nodes that
// it does not concern, and what a Planner holds depends on the Nodes as they are, not on the order in which they came.
type Planner struct {
	self    string
	options Options
	members map[string]*member
	index   index
	claims  claims
	// views are what follows from each member.
	views map[string]*view
	// stale are the names of members whose view has to be made again, troubled of those with problems.
	stale, troubled map[string]struct{}
	// uplink and base are what the views depend on besides the members; link is the Config without peers and routes.
	uplink Uplink
	base   base
	link   Config
	// config is the whole Config as somebody asked for it the last time, nil where nobody has; since are the views as they were
	// then, of those that are others now.
	config *Config
	since  map[string]*view
}

// Update is what a change of Nodes comes to.
type Update struct {
	Change Change
	// PodCIDRs are, of each node for which they differ, the podCIDRs that it may have, in the order of its Node; nil for a node
	// that is gone. What is refused is not among them, and must not give the node's pods the identity of another's addresses.
	PodCIDRs map[string][]netip.Prefix
}

// NewPlanner returns the Planner of the node self, without any Nodes. It takes the uplink with each Update, not from
// the options.
func NewPlanner(self string, o Options) *Planner {
	return &Planner{
		self: self, options: o, members: map[string]*member{}, index: newIndex(),
		claims: claims{clusterCIDRs: o.ClusterCIDRs, serviceCIDRs: o.ServiceCIDRs, again: map[*claim]struct{}{}},
		views:  map[string]*view{}, stale: map[string]struct{}{}, troubled: map[string]struct{}{}, since: map[string]*view{},
	}
}

// Update takes in Nodes that changed, nil for one that is gone, and the uplink. It returns what that changes; the first one changes the link
// in any case.
func (p *Planner) Update(nodes map[string]*cluster.Node, uplink Uplink) Update {
	for name, n := range nodes {
		p.take(name, n)
	}
	p.claims.settle(func(c *claim) { p.touch(c.of) })
	otherWays := !maps.Equal(uplink.Less, p.uplink.Less)
	p.uplink = uplink
	if b := p.newBase(); b != p.base || otherWays {
		p.base = b
		for name := range p.members {
			p.stale[name] = struct{}{}
		}
	}
	u := p.refresh()
	if link := p.newLink(len(u.PodCIDRs) > 0); !equalLinks(link, p.link) {
		p.link, u.Change.Link = link, true
	}
	return u
}

// take replaces a member.
func (p *Planner) take(name string, n *cluster.Node) {
	before := p.members[name]
	if before != nil {
		p.touch(before)
		p.index.remove(before)
		for _, c := range before.all() {
			p.claims.remove(c)
		}
		delete(p.members, name)
	}
	p.stale[name] = struct{}{}
	if n == nil {
		return
	}
	m := p.newMember(*n, before)
	p.members[name] = m
	p.index.add(m)
	for _, c := range m.all() {
		p.claims.add(c)
	}
	p.touch(m)
}

// touch has the views made again that depend on a member.
func (p *Planner) touch(m *member) {
	p.index.rivals(m, func(o *member) { p.stale[o.node.Name] = struct{}{} })
}

// refresh makes the stale views again and returns how they differ.
func (p *Planner) refresh() Update {
	u := Update{PodCIDRs: map[string][]netip.Prefix{}}
	came, went := map[netip.Prefix]Route{}, map[netip.Prefix]Route{}
	for name := range p.stale {
		before, after := p.views[name], &view{}
		m := p.members[name]
		switch {
		case m != nil:
			after = p.newView(m)
			if before == nil || !slices.Equal(before.podCIDRs, after.podCIDRs) {
				u.PodCIDRs[name] = after.podCIDRs
			}
			p.views[name] = after
		case before == nil: // came and went
		default:
			u.PodCIDRs[name] = nil
			delete(p.views, name)
		}
		if before == nil {
			before = &view{}
		}
		p.note(name, before, after)
		switch {
		case after.peer == nil && before.peer != nil:
			u.Change.RemovedPeers = append(u.Change.RemovedPeers, *before.peer)
		case after.peer != nil && (before.peer == nil || !before.peer.equal(after.peer)):
			u.Change.Peers = append(u.Change.Peers, *after.peer)
		}
		for _, r := range before.routes {
			went[r.Destination] = r
		}
		for _, r := range after.routes {
			came[r.Destination] = r
		}
	}
	p.stale = map[string]struct{}{} // to walk one that was large once costs as much as then
	u.Change.setRoutes(came, went)
	slices.SortFunc(u.Change.Peers, comparePeers)
	slices.SortFunc(u.Change.RemovedPeers, comparePeers)
	return u
}

// setRoutes takes the routes of some nodes, by destination: a prefix that goes from one to another changes its route.
func (c *Change) setRoutes(came, went map[netip.Prefix]Route) {
	for destination, r := range came {
		if before, ok := went[destination]; !ok || before != r {
			c.Routes = append(c.Routes, r)
		}
	}
	for destination, r := range went {
		if _, stays := came[destination]; !stays {
			c.RemovedRoutes = append(c.RemovedRoutes, r)
		}
	}
	slices.SortFunc(c.Routes, compareRoutes)
	slices.SortFunc(c.RemovedRoutes, compareRoutes)
}

// note remembers what refresh changes, for those who ask for everything.
func (p *Planner) note(name string, before, after *view) {
	if _, known := p.since[name]; !known {
		p.since[name] = before
	}
	delete(p.troubled, name)
	if len(after.problems) > 0 {
		p.troubled[name] = struct{}{}
	}
}

// fewViews is how many views are exchanged in a Config one by one: each costs a move of what comes after it.
const fewViews = 16

// Config returns the whole mesh as it is now. It is not changed later.
func (p *Planner) Config() Config {
	c := p.link
	switch {
	case p.config != nil && len(p.since) <= fewViews:
		c.Peers, c.Routes, c.Hosts, c.KnownPodCIDRs = p.config.Peers, p.config.Routes, p.config.Hosts, p.config.KnownPodCIDRs
		if len(p.since) > 0 {
			c.Peers, c.Routes, c.Hosts, c.KnownPodCIDRs = slices.Clone(c.Peers), slices.Clone(c.Routes), slices.Clone(c.Hosts), slices.Clone(c.KnownPodCIDRs)
		}
		for _, was := range p.since {
			c.drop(was)
		}
		for name := range p.since {
			c.add(p.views[name])
		}
	default:
		for _, v := range p.views {
			c.append(v)
		}
		slices.SortFunc(c.Peers, comparePeers)
		slices.SortFunc(c.Routes, compareRoutes)
		slices.SortFunc(c.Hosts, compareHosts)
		slices.SortFunc(c.KnownPodCIDRs, comparePrefixes)
	}
	p.config = &c
	p.since = map[string]*view{}
	return c
}

// append adds a view at the end, unsorted.
func (c *Config) append(v *view) {
	c.KnownPodCIDRs = append(c.KnownPodCIDRs, v.podCIDRs...)
	c.Routes = append(c.Routes, v.routes...)
	c.Hosts = append(c.Hosts, v.hosts...)
	if v.peer != nil {
		c.Peers = append(c.Peers, *v.peer)
	}
}

// add adds a view in its places; nil adds nothing.
func (c *Config) add(v *view) {
	if v == nil {
		return
	}
	for _, podCIDR := range v.podCIDRs {
		c.KnownPodCIDRs = insert(c.KnownPodCIDRs, podCIDR, comparePrefixes)
	}
	for _, r := range v.routes {
		c.Routes = insert(c.Routes, r, compareRoutes)
	}
	for _, h := range v.hosts {
		c.Hosts = insert(c.Hosts, h, compareHosts)
	}
	if v.peer != nil {
		c.Peers = insert(c.Peers, *v.peer, comparePeers)
	}
}

// drop takes a view away.
func (c *Config) drop(v *view) {
	for _, podCIDR := range v.podCIDRs {
		c.KnownPodCIDRs = remove(c.KnownPodCIDRs, podCIDR, comparePrefixes)
	}
	for _, r := range v.routes {
		c.Routes = remove(c.Routes, r, compareRoutes)
	}
	for _, h := range v.hosts {
		c.Hosts = remove(c.Hosts, h, compareHosts)
	}
	if v.peer != nil {
		c.Peers = remove(c.Peers, *v.peer, comparePeers)
	}
}

func insert[T any](sorted []T, x T, compare func(a, b T) int) []T {
	at, _ := slices.BinarySearchFunc(sorted, x, compare)
	return slices.Insert(sorted, at, x)
}

func remove[T any](sorted []T, x T, compare func(a, b T) int) []T {
	at, found := slices.BinarySearchFunc(sorted, x, compare)
	if !found {
		return sorted
	}
	return slices.Delete(sorted, at, at+1)
}

// Problems returns what is refused or missing.
func (p *Planner) Problems() []cluster.Problem {
	var problems []cluster.Problem
	for name := range p.troubled {
		problems = append(problems, p.views[name].problems...)
	}
	self, ok := p.views[p.self]
	if !ok {
		problems = append(problems, nodeUnknown(p.self))
	} else if slices.ContainsFunc(self.podCIDRs, isIPv6) && p.link.MTU < minIPv6MTU {
		problems = append(problems, mtuTooSmall(p.self, p.link.MTU))
	}
	return cluster.SortProblems(problems)
}

// newLink returns the Config without peers, routes and hosts. It looks at all podCIDRs only where they changed and have to be kept from
// the default route one by one.
func (p *Planner) newLink(podCIDRsChanged bool) Config {
	c := Config{Encrypted: p.options.Encrypted, MTU: p.base.mtu}
	if self := p.views[p.self]; self != nil {
		c.PodCIDRs = slices.SortedFunc(slices.Values(self.podCIDRs), comparePrefixes)
	}
	if !c.Encrypted {
		return c
	}
	c.ListenPort = p.options.ListenPort
	for _, podCIDR := range c.PodCIDRs {
		a := podcidr.NodeAddress(podCIDR)
		c.Addresses = append(c.Addresses, netip.PrefixFrom(a, a.BitLen()))
	}
	switch {
	case len(p.options.ClusterCIDRs) > 0:
		c.Unreachable = slices.Clone(p.options.ClusterCIDRs)
	case !podCIDRsChanged:
		c.Unreachable = p.link.Unreachable
		return c
	default:
		for _, v := range p.views {
			c.Unreachable = append(c.Unreachable, v.podCIDRs...)
		}
	}
	slices.SortFunc(c.Unreachable, comparePrefixes)
	c.Unreachable = slices.Compact(c.Unreachable)
	return c
}

func equalLinks(a, b Config) bool {
	return a.Encrypted == b.Encrypted && a.ListenPort == b.ListenPort && a.MTU == b.MTU && slices.Equal(a.PodCIDRs, b.PodCIDRs) &&
		slices.Equal(a.Addresses, b.Addresses) && slices.Equal(a.Unreachable, b.Unreachable)
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

func comparePeers(a, b Peer) int { return cmp.Compare(a.Node, b.Node) }

func compareHosts(a, b Host) int {
	return cmp.Or(a.Address.Compare(b.Address), cmp.Compare(a.Node, b.Node))
}

func compareRoutes(a, b Route) int { return comparePrefixes(a.Destination, b.Destination) }

func isIPv6(p netip.Prefix) bool { return p.Addr().Is6() }

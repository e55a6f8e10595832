package mesh

import (
	"maps"
	"net/netip"
	"reflect"
	"slices"

	"github.com/warren-cni/warren/pkg/cluster"
)

// Planner keeps the mesh of a node up to date with the cluster's Nodes.
type Planner struct {
	self     string
	options  Options
	nodes    map[string]*cluster.Node
	accepted map[string][]netip.Prefix
	config   Config
	problems []cluster.Problem
}

// Update is what a change of Nodes comes to.
type Update struct {
	// Change is how the Config differs.
	Change Change
	// PodCIDRs are the podCIDRs of nodes whose accepted ones differ, nil for those that are gone.
	PodCIDRs map[string][]netip.Prefix
}

// NewPlanner returns the planner of the node self, which knows no Node.
func NewPlanner(self string, o Options) *Planner {
	return &Planner{self: self, options: o, nodes: map[string]*cluster.Node{}, accepted: map[string][]netip.Prefix{}}
}

// Config returns the mesh that is wanted.
func (p *Planner) Config() Config { return p.config }

// Problems returns the claims that were refused, and what the own node lacks.
func (p *Planner) Problems() []cluster.Problem { return p.problems }

// Update takes in Nodes that changed, nil for those that are gone, and the MTU of the uplink.
func (p *Planner) Update(nodes map[string]*cluster.Node, uplinkMTU int) Update {
	for name, node := range nodes {
		if node == nil {
			delete(p.nodes, name)
		} else {
			p.nodes[name] = node
		}
	}
	p.options.UplinkMTU = uplinkMTU
	s := cluster.Snapshot{Self: p.self}
	for _, name := range slices.Sorted(maps.Keys(p.nodes)) {
		s.Nodes = append(s.Nodes, *p.nodes[name])
	}
	before, had := p.config, p.accepted
	p.config, p.problems = Plan(s, p.options)
	p.accepted = PodCIDRs(s, p.options.ClusterCIDRs)
	update := Update{Change: diff(before, p.config), PodCIDRs: map[string][]netip.Prefix{}}
	for name, accepted := range p.accepted {
		if old, known := had[name]; !known || !slices.Equal(old, accepted) {
			update.PodCIDRs[name] = accepted
		}
	}
	for name := range had {
		if _, there := p.accepted[name]; !there {
			update.PodCIDRs[name] = nil
		}
	}
	return update
}

// diff returns how a Config differs from another.
func diff(before, now Config) Change {
	var c Change
	rest := func(c Config) Config { c.Peers, c.Routes = nil, nil; return c }
	c.Link = !reflect.DeepEqual(rest(before), rest(now))
	c.Peers, c.RemovedPeers = changed(before.Peers, now.Peers, func(p Peer) string { return p.Node })
	c.Routes, c.RemovedRoutes = changed(before.Routes, now.Routes, func(r Route) netip.Prefix { return r.Destination })
	return c
}

// changed returns what is new or differs, and what is gone.
func changed[T any, K comparable](before, now []T, key func(T) K) (set, gone []T) {
	old := make(map[K]T, len(before))
	for _, t := range before {
		old[key(t)] = t
	}
	for _, t := range now {
		if was, there := old[key(t)]; !there || !reflect.DeepEqual(was, t) {
			set = append(set, t)
		}
		delete(old, key(t))
	}
	for _, t := range before {
		if _, left := old[key(t)]; left {
			gone = append(gone, t)
		}
	}
	return set, gone
}

package main

import (
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// planner works out what the node wants from everything that it is told of the cluster, and what that changes. It does no I/O,
// and its lock is held only to compute: questions are answered from it while a step waits for the kernel.
type planner struct {
	options planning

	mu sync.Mutex
	// nodes are the Nodes as they are; those of the state have only the podCIDRs that they may have.
	nodes    map[string]*cluster.Node
	state    *cluster.State
	compiler *policy.Compiler
	// guards are the rules that stand whatever the policies, with the start gate's set.
	guards       netfilter.Ruleset
	mesh         mesh.Config
	meshProblems []cluster.Problem
	uplinkMTU    int
	// closed are the chains of groups that stand closed in the kernel.
	closed map[netfilter.Family]map[string]bool
}

// plan is what a change comes to.
type plan struct {
	// change is what differs from the ruleset that was wanted before.
	change netfilter.Change
	// affected are the addresses whose established connections may now be judged otherwise.
	affected []netip.Addr
	// mesh is what is wanted now; meshChanged says whether it was computed anew.
	mesh        mesh.Config
	meshChanged bool
	// open are the addresses that the start gate lets pass once the change stands; openChanged says whether they differ.
	open        map[netip.Addr]cluster.Holder
	openChanged bool
	problems    []cluster.Problem
}

func newPlanner(o planning) *planner {
	return &planner{
		options: o, nodes: map[string]*cluster.Node{}, state: cluster.NewState(o.nodeName), compiler: policy.NewCompiler(o.nodeName, policy.Options{Log: o.logMode}),
	}
}

// learn takes in what is new. What follows from it is for plan.
func (p *planner) learn(objects cluster.Delta, attachments cluster.Attachments) cluster.Bound {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(objects.Nodes) > 0 {
		objects.Nodes = p.claimants(objects.Nodes)
	}
	return p.state.Update(objects, attachments)
}

// claimants takes in Nodes that changed and returns these, and those that others' claims concern, with the podCIDRs that they may have:
// a pod's address counts only in those.
func (p *planner) claimants(changed map[string]*cluster.Node) map[string]*cluster.Node {
	for name, node := range changed {
		if node == nil {
			delete(p.nodes, name)
		} else {
			p.nodes[name] = node
		}
	}
	all := maps.Clone(changed)
	for name, accepted := range mesh.PodCIDRs(p.meshSnapshot(), p.options.parsedCluster) {
		node := *p.nodes[name]
		node.PodCIDRs = accepted
		if before, ok := p.state.Node(name); !ok || changed[name] != nil || !slices.Equal(before.PodCIDRs, accepted) {
			all[name] = &node
		}
	}
	return all
}

// meshSnapshot returns the Nodes as they are.
func (p *planner) meshSnapshot() cluster.Snapshot {
	s := cluster.Snapshot{Self: p.options.nodeName, Nodes: make([]cluster.Node, 0, len(p.nodes))}
	for _, name := range slices.Sorted(maps.Keys(p.nodes)) {
		s.Nodes = append(s.Nodes, *p.nodes[name])
	}
	return s
}

// plan works out what follows from what was learnt.
func (p *planner) plan(news cluster.Bound, uplinkMTU int) plan {
	p.mu.Lock()
	defer p.mu.Unlock()
	update := p.compiler.Update(news.Delta)
	result := plan{change: update.Change, affected: update.Affected}
	if len(news.Nodes) > 0 || uplinkMTU != p.uplinkMTU || len(p.guards.V4.Hooks) == 0 {
		p.uplinkMTU = uplinkMTU
		result.meshChanged = true
		p.mesh, p.meshProblems = mesh.Plan(p.meshSnapshot(), mesh.Options{
			ClusterCIDRs: p.options.parsedCluster,
			ListenPort:   p.options.port,
			UplinkMTU:    uplinkMTU,
			MTU:          p.options.mtu,
			Encrypted:    p.options.encryptionMode,
		})
	}
	if result.meshChanged || len(news.Opened)+len(news.Closed) > 0 {
		result.open, result.openChanged = p.state.Open(), true
		// An address that has another holder was taken out of the gate's set by the plugin, so it has to be put in again.
		before := without(p.guards, news.Opened)
		p.guards = guard.Compile(guard.Config{
			PodCIDRs:      p.mesh.PodCIDRs,
			KnownPodCIDRs: p.mesh.KnownPodCIDRs,
			ClusterCIDRs:  p.options.parsedCluster,
			NonMasquerade: p.options.parsedNonMasq,
			Encrypted:     p.options.encryptionMode,
			Ready:         slices.SortedFunc(maps.Keys(result.open), netip.Addr.Compare),
		})
		result.change = netfilter.MergeChanges(result.change, netfilter.Diff(before, p.guards))
	}
	result.mesh = p.mesh
	result.problems = slices.Concat(p.meshProblems, p.compiler.Problems())
	return result
}

// without returns the rules with a start gate that lacks some addresses.
func without(r netfilter.Ruleset, addresses []netip.Addr) netfilter.Ruleset {
	for _, f := range netfilter.Families {
		rules := r.Of(f)
		rules.Sets = slices.Clone(rules.Sets)
		for i, s := range rules.Sets {
			if s.Role == netfilter.Gate {
				rules.Sets[i].Entries = slices.DeleteFunc(slices.Clone(s.Entries), func(e netfilter.Entry) bool {
					return slices.Contains(addresses, e.Prefix.Addr())
				})
			}
		}
	}
	return r
}

// ruleset returns all that is wanted in the packet filter.
func (p *planner) ruleset() netfilter.Ruleset {
	p.mu.Lock()
	defer p.mu.Unlock()
	return netfilter.Merge(p.guards, p.compiler.Ruleset())
}

// setClosed takes the chains of groups that stand closed in the kernel.
func (p *planner) setClosed(chains []firewall.ClosedChain) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = map[netfilter.Family]map[string]bool{netfilter.IPv4: {}, netfilter.IPv6: {}}
	for _, c := range chains {
		p.closed[c.Family][c.Name] = true
	}
}

// allows says whether the policies that this node enforces allow a connection.
func (p *planner) allows(f policy.Flow) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.compiler.Allows(f, p.closed[netfilter.FamilyOf(f.Dst)])
}

// snapshot returns what is known of the cluster, its pods with the addresses that they can have.
func (p *planner) snapshot() cluster.Snapshot {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state.Snapshot()
}

// pod returns the pod that has an address.
func (p *planner) pod(a netip.Addr) (*cluster.Pod, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.compiler.Pod(a)
}

// group returns the direction and the policies of a group's chain.
func (p *planner) group(chain string) (direction string, policies []string, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.compiler.Group(chain)
}

// self returns the own Node, as far as it is known.
func (p *planner) self() cluster.Node {
	p.mu.Lock()
	defer p.mu.Unlock()
	if node := p.nodes[p.options.nodeName]; node != nil {
		return *node
	}
	return cluster.Node{}
}

// counts are for the status.
type counts struct {
	policies, pods, isolated int
}

// count counts the policies, the pods of this node, and those of them that a policy isolates in a direction.
func count(snapshot cluster.Snapshot) counts {
	c := counts{policies: len(snapshot.Policies)}
	byNamespace := map[string][]cluster.Policy{}
	for _, p := range snapshot.Policies {
		byNamespace[p.Namespace] = append(byNamespace[p.Namespace], p)
	}
	for _, pod := range snapshot.Pods {
		if pod.Node != snapshot.Self || pod.HostNetwork || len(pod.Addresses) == 0 {
			continue
		}
		c.pods++
		if slices.ContainsFunc(byNamespace[pod.Namespace], func(p cluster.Policy) bool { return p.Pods == nil || p.Pods.Matches(pod.Labels) }) {
			c.isolated++
		}
	}
	return c
}

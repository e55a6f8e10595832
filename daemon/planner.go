package main

import (
	"fmt"
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

	mu       sync.Mutex
	mesh     *mesh.Planner
	state    *cluster.State
	compiler *policy.Compiler
	// own is the own Node as it is; the nodes of the state have only the podCIDRs that they may have.
	own *cluster.Node
	// config is the mesh that is wanted, and news how it differs from the one that plan handed on last.
	config       mesh.Config
	news         mesh.Change
	meshProblems []cluster.Problem
	// held are the pods that have an address which is the node's own by its podCIDRs.
	held map[netip.Addr]cluster.Key
	// strays are the addresses of pods that got them from podCIDRs which the node had before.
	strays []netip.Addr
	hosts  hosts
	// fenced says that both families have a cluster CIDR, so that the guards do not depend on the podCIDRs of other nodes; otherwise
	// refence says that these are others than when the guards were planned.
	fenced, refence bool
	// guards are the rules that stand whatever the policies, with the start gate's set and without those of the hosts.
	guards netfilter.Ruleset
	uplink mesh.Uplink
	// closed are the chains of groups that stand closed in the kernel.
	closed map[netfilter.Family]map[string]bool
}

// plan is what a change comes to.
type plan struct {
	// change is what differs from the ruleset that was wanted before.
	change netfilter.Change
	// affected are the addresses whose established connections may now be judged otherwise.
	affected []netip.Addr
	// mesh is what is wanted now, meshChange how it differs from what was wanted before.
	mesh       mesh.Config
	meshChange mesh.Change
	// open are the addresses that the start gate lets pass once the change stands; openChanged says whether they differ.
	open        map[netip.Addr]cluster.Holder
	openChanged bool
	problems    []cluster.Problem
}

func newPlanner(o planning) *planner {
	has := func(f netfilter.Family) bool {
		return slices.ContainsFunc(o.parsedCluster, func(p netip.Prefix) bool { return netfilter.FamilyOf(p.Addr()) == f })
	}
	return &planner{
		options: o, fenced: has(netfilter.IPv4) && has(netfilter.IPv6), state: cluster.NewState(o.nodeName), compiler: policy.NewCompiler(o.nodeName, policy.Options{Log: o.logMode}),
		mesh: mesh.NewPlanner(o.nodeName, mesh.Options{
			ClusterCIDRs: o.parsedCluster,
			ListenPort:   o.port,
			MTU:          o.mtu,
			Encrypted:    o.encryptionMode,
			ServiceCIDRs: o.parsedService,
			NodeCIDRs:    o.tunnelledNodes(),
		}),
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
	if own, told := changed[p.options.nodeName]; told {
		p.own = own
	}
	for name, node := range changed {
		before, _ := p.state.Node(name)
		p.hosts.forget(before.Addresses)
		if node != nil {
			p.hosts.learn(node.Addresses)
		}
	}
	update := p.mesh.Update(changed, p.uplink)
	p.note(update.Change)
	p.refence = p.refence || !p.fenced && len(update.PodCIDRs) > 0
	p.meshProblems = p.mesh.Problems()
	all := maps.Clone(changed)
	for name := range update.PodCIDRs {
		_, told := changed[name]
		if before, known := p.state.Node(name); known && !told {
			all[name] = &before
		}
	}
	for name, node := range all {
		if _, gone := changed[name]; gone && node == nil {
			continue
		}
		claimant := *node
		if accepted, differs := update.PodCIDRs[name]; differs {
			claimant.PodCIDRs = accepted
		} else {
			before, _ := p.state.Node(name)
			claimant.PodCIDRs = before.PodCIDRs
		}
		all[name] = &claimant
	}
	return all
}

// note adds to what plan has to hand on. Where it is more than one change, or not only peers and routes, the mesh is to be applied as
// a whole.
func (p *planner) note(c mesh.Change) {
	if !p.news.Empty() && !c.Empty() {
		p.news = mesh.Change{Link: true}
		return
	}
	if p.news.Empty() {
		p.news = c
	}
}

// plan works out what follows from what was learnt.
func (p *planner) plan(news cluster.Bound, uplink mesh.Uplink) plan {
	p.mu.Lock()
	defer p.mu.Unlock()
	update := p.compiler.Update(news.Delta)
	first := len(p.guards.V4.Hooks) == 0
	if uplink.MTU != p.uplink.MTU || !maps.Equal(uplink.Less, p.uplink.Less) || first {
		p.uplink = uplink
		p.note(p.mesh.Update(nil, uplink).Change)
		p.meshProblems = p.mesh.Problems()
	}
	meshChange, refence := p.news, p.refence
	p.news, p.refence = mesh.Change{}, false
	if !meshChange.Empty() || refence {
		p.config = p.mesh.Config()
	}
	if held := p.heldByPods(); !maps.Equal(held, p.held) || len(held) > 0 && !meshChange.Empty() {
		p.held, meshChange = held, mesh.Change{Link: true}
	}
	if strays := p.state.Strays(); !slices.Equal(strays, p.strays) {
		p.strays = strays
		if len(p.config.Hosts) > 0 { // else nothing of the mesh depends on them
			meshChange = mesh.Change{Link: true}
		}
	}
	result := plan{change: update.Change, affected: update.Affected, mesh: p.adapted(), meshChange: meshChange}
	if len(news.Opened)+len(news.Closed) > 0 || meshChange.Link || refence || first {
		result.open, result.openChanged = p.state.Open(), true
		result.change = netfilter.MergeChanges(result.change, p.guard(result.open, news.Opened))
	}
	result.change = netfilter.MergeChanges(result.change, p.hosts.change())
	result.problems = slices.Concat(p.meshProblems, p.compiler.Problems(), p.heldProblems())
	return result
}

// heldByPods returns the pods that have an address which is the node's own by its podCIDRs: they got it from a podCIDR that the node had
// before, and keep it until DEL.
func (p *planner) heldByPods() map[netip.Addr]cluster.Key {
	held := map[netip.Addr]cluster.Key{}
	for _, own := range p.config.Addresses {
		if pod, ok := p.state.Attached(own.Addr()); ok {
			held[own.Addr()] = pod
		}
	}
	return held
}

// adapted returns the mesh with the strays, and without the addresses that pods hold: on the link they would take the pods' packets.
func (p *planner) adapted() mesh.Config {
	c := p.config
	c.Strays = p.strays
	if len(p.held) == 0 {
		return c
	}
	isHeld := func(a netip.Addr) bool { _, held := p.held[a]; return held }
	c.Addresses = slices.DeleteFunc(slices.Clone(c.Addresses), func(own netip.Prefix) bool { return isHeld(own.Addr()) })
	c.Routes = slices.Clone(c.Routes)
	for i, r := range c.Routes {
		if isHeld(r.Source) {
			c.Routes[i].Source = netip.Addr{} // the kernel takes another of the node's: as the pod's a packet would pass the policies of others
		}
	}
	return c
}

// heldProblems tells of those addresses.
func (p *planner) heldProblems() (problems []cluster.Problem) {
	for a, pod := range p.held {
		problems = append(problems, cluster.Problem{
			Code: "NodeAddressHeld", Object: "Node " + p.options.nodeName, Field: "spec.podCIDRs",
			Message: fmt.Sprintf("pod %s has %s, the first address of the podCIDR, from one that the node had before; until the pod ends the node does without it, and nothing of its own or of its NodePorts' clients is translated to it: other nodes' pods drop that, but for what --encrypt-node-traffic carries with the node's InternalIP", pod, a),
			Remedy:  "delete the pod, so that it gets another address",
		})
	}
	return problems
}

// guard plans the guards anew, with a start gate that is open for some addresses, and returns how they differ. An address that has another
// holder was taken out of the gate's set by the plugin, so it has to be put in again.
func (p *planner) guard(open map[netip.Addr]cluster.Holder, opened []netip.Addr) netfilter.Change {
	before := without(p.guards, opened)
	config := p.options.guards(p.adapted())
	config.Ready = slices.SortedFunc(maps.Keys(open), netip.Addr.Compare)
	p.guards = guard.Rules(config)
	return netfilter.Diff(before, p.guards)
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
	return netfilter.Merge(netfilter.Merge(p.guards, p.hosts.sets()), p.compiler.Ruleset())
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

// hasPod says whether the pod of an attachment exists and has not finished.
func (p *planner) hasPod(a cluster.Attachment) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.state.Has(a)
}

// chainsOf returns the chains of the groups that the pods of these addresses are in.
func (p *planner) chainsOf(addresses []netip.Addr) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var chains []string
	for _, a := range addresses {
		chains = append(chains, p.compiler.Chains(a)...)
	}
	return chains
}

// endpoints returns the addresses at which the peers are reached, the zero address for those that come to us.
func (p *planner) endpoints() []netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all []netip.Addr
	for _, peer := range p.config.Peers {
		all = append(all, peer.Endpoint.Addr())
	}
	return all
}

// self returns the own Node, as far as it is known.
func (p *planner) self() cluster.Node {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.own != nil {
		return *p.own
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

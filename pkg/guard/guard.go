// Package guard plans the rules that stand on every node whatever the policies are, as a pure function: anti-spoofing,
// the start gate, the guards against plaintext, masquerade, and the jumps from the kernel's built-in chains.
//
// Both families always get the same layout, so that a family which the cluster does not use is closed and not forgotten:
// with no address of that family in the ready set, no pod forwards a packet in it.
//
// No rule accepts in a table that another program decides in: RETURN hands the packet on to kube-proxy's chains, and the
// only ACCEPTs are appended to filter FORWARD, behind everybody else's rules. INPUT and OUTPUT are not hooked, which is
// what keeps traffic between a node and its own pods allowed, as Kubernetes asks.
package guard

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// The chains of this package, each behind one hook, but for sourcesChain, which hangs below rawChain, judgedChain below guardChain, and
// segmentsChain below forwardChain.
const (
	rawChain      = netfilter.Prefix + "-RAW"
	sourcesChain  = netfilter.Prefix + "-SOURCES"
	forwardChain  = netfilter.Prefix + "-FORWARD"
	guardChain    = netfilter.Prefix + "-GUARD"
	judgedChain   = netfilter.Prefix + "-JUDGED"
	segmentsChain = netfilter.Prefix + "-SEGMENTS"
	natChain      = netfilter.Prefix + "-NAT"
	acceptChain   = netfilter.Prefix + "-ACCEPT"
	beltChain     = netfilter.Prefix + "-BELT"
)

// Config is what the rules depend on. Prefixes are masked.
type Config struct {
	// PodCIDRs are the own node's.
	PodCIDRs []netip.Prefix
	// Addresses are those that the node keeps for itself in them, but for what a pod holds: the tunnel carries the node's own packets from there.
	Addresses []netip.Prefix
	// KnownPodCIDRs are those of all nodes. They stand in for the cluster CIDR in a family that has none, so they should
	// be those that the mesh accepts: what is in them leaves this node only through the tunnel. What was known once stays so in
	// the kernel, because pods may still send to a node that is gone.
	KnownPodCIDRs []netip.Prefix
	// ClusterCIDRs hold every pod address there will ever be, also of nodes that are not known yet.
	ClusterCIDRs []netip.Prefix
	// NonMasquerade are destinations beyond the pods that see a pod's own address.
	NonMasquerade []netip.Prefix
	// Services are the Services' networks: what kube-proxy has not translated may be for a remote pod, and nobody else has such an address.
	Services []netip.Prefix
	// Encrypted says that pod traffic between nodes belongs into the tunnel. Without it there is no inbound guard either:
	// the packets of remote pods then come in by the uplink, where nothing tells them from forged ones.
	Encrypted bool
	// NodeAddresses are those of all nodes, this one too: what pods send there by an uplink is counted apart.
	NodeAddresses []netip.Addr
	// Ready are the addresses that the start gate lets pass.
	Ready []netip.Addr
}

// Compile plans the rules of both families.
func Compile(c Config) netfilter.Ruleset { return netfilter.Merge(Rules(c), NodeSets(c.NodeAddresses)) }

// Rules is Compile without what NodeSets returns: a node that comes or goes changes nothing of it, but where its podCIDRs stand in for
// the cluster CIDR.
func Rules(c Config) netfilter.Ruleset {
	return netfilter.Ruleset{V4: c.compile(netfilter.IPv4), V6: c.compile(netfilter.IPv6)}
}

// NodeSets are the sets of the nodes' addresses. The rules that Rules plans only count by them. The kernel takes no address of zeros,
// which a hostile Node may say.
func NodeSets(nodes []netip.Addr) netfilter.Ruleset {
	nodes = slices.DeleteFunc(slices.Clone(nodes), netip.Addr.IsUnspecified)
	set := func(f netfilter.Family) netfilter.Rules {
		return netfilter.Rules{Sets: []netfilter.Set{{
			Name: nodeSetName(f), Type: netfilter.HashIP, Role: netfilter.Allows, Comment: "addresses of all nodes", Entries: entries(f, nodes),
		}}}
	}
	return netfilter.Ruleset{V4: set(netfilter.IPv4), V6: set(netfilter.IPv6)}
}

func (c Config) compile(f netfilter.Family) netfilter.Rules {
	p := plan{
		family:    f,
		own:       of(f, c.PodCIDRs),
		addresses: of(f, c.Addresses),
		outside:   of(f, c.NonMasquerade),
		services:  of(f, c.Services),
		encrypted: c.Encrypted,
	}
	sets := []netfilter.Set{readySet(f, c.Ready)}
	cluster := of(f, c.ClusterCIDRs)
	p.fence = literal(cluster, p.own)
	if len(cluster) == 0 {
		sets = append(sets, netfilter.Set{
			Name: knownSet(f), Type: netfilter.HashNet, Role: netfilter.Selects, Comment: "podCIDRs of all nodes", Keeps: true,
			Entries: claimed(of(f, c.KnownPodCIDRs)),
		})
		p.fence = append(p.fence, fence{set: knownSet(f)})
	}
	slices.SortFunc(sets, func(a, b netfilter.Set) int { return strings.Compare(a.Name, b.Name) })
	chains := []netfilter.Chain{
		{Table: "filter", Name: acceptChain, Rules: p.accept()},
		{Table: "filter", Name: beltChain, Rules: p.belt()},
		{Table: "mangle", Name: forwardChain, Rules: p.forward()},
		{Table: "mangle", Name: guardChain, Rules: p.guard()},
		{Table: "mangle", Name: judgedChain, Rules: judged()},
		{Table: "nat", Name: natChain, Rules: p.nat()},
		{Table: "raw", Name: rawChain, Rules: p.raw()},
		{Table: "raw", Name: sourcesChain, Rules: p.sources()},
	}
	if p.encrypted {
		chains = append(chains, netfilter.Chain{Table: "mangle", Name: segmentsChain, Rules: segments()})
		slices.SortFunc(chains, netfilter.Chain.Compare)
	}
	return netfilter.Rules{
		Sets:   sets,
		Chains: chains,
		Hooks: []netfilter.Hook{
			{Table: "filter", BuiltIn: "FORWARD", Chain: acceptChain, Append: true},
			{Table: "filter", BuiltIn: "FORWARD", Chain: beltChain},
			{Table: "mangle", BuiltIn: "FORWARD", Chain: forwardChain},
			{Table: "mangle", BuiltIn: "POSTROUTING", Chain: guardChain},
			{Table: "nat", BuiltIn: "POSTROUTING", Chain: natChain},
			{Table: "raw", BuiltIn: "PREROUTING", Chain: rawChain},
		},
	}
}

// readySet is the set of the start gate.
func readySet(f netfilter.Family, ready []netip.Addr) netfilter.Set {
	return netfilter.Set{
		Name: netfilter.ReadySet(f), Type: netfilter.HashIP, Role: netfilter.Gate,
		Comment: "pods whose policies stand", Entries: entries(f, ready),
	}
}

// entries returns the addresses of one family as entries of a set.
func entries(f netfilter.Family, addresses []netip.Addr) []netfilter.Entry {
	var list []netfilter.Entry
	for _, a := range addresses {
		if netfilter.FamilyOf(a) == f {
			list = append(list, netfilter.Address(a))
		}
	}
	return netfilter.Entries(list)
}

// knownSet is the name of the set of podCIDRs that stands in for a missing cluster CIDR.
func knownSet(f netfilter.Family) string {
	return netfilter.Prefix + "-NODES" + strings.TrimPrefix(f.String(), "ipv")
}

// nodeSetName is the name of the set of the nodes' addresses.
func nodeSetName(f netfilter.Family) string {
	return netfilter.Prefix + "-HOSTS" + strings.TrimPrefix(f.String(), "ipv")
}

// claimed returns prefixes as entries of a set. The whole address space is nobody's podCIDR: a Node that claims it would
// cut every other node off.
func claimed(prefixes []netip.Prefix) []netfilter.Entry {
	var entries []netfilter.Entry
	for _, p := range prefixes {
		if p.Bits() > 0 {
			entries = append(entries, netfilter.Entry{Prefix: p})
		}
	}
	return netfilter.Entries(entries)
}

// fence is a part of the addresses that belong to pods: a prefix written into the rules, or a set. The prefixes that are
// known for good are written into the rules, because nobody can flush those.
type fence struct {
	prefix netip.Prefix
	set    string
}

// match returns the words that match a packet whose source (or destination) is behind the fence.
func (f fence) match(side string) []string {
	if f.set != "" {
		return []string{"-m", "set", "--match-set", f.set, side}
	}
	if side == "src" {
		return []string{"-s", f.prefix.String()}
	}
	return []string{"-d", f.prefix.String()}
}

// literal returns the union of the prefixes as fences, without those that another one holds already.
func literal(lists ...[]netip.Prefix) []fence {
	all := slices.Concat(lists...)
	slices.SortFunc(all, netip.Prefix.Compare)
	var fences []fence
	for _, p := range slices.Compact(all) {
		held := slices.ContainsFunc(fences, func(f fence) bool { return f.prefix.Bits() <= p.Bits() && f.prefix.Overlaps(p) })
		if !held {
			fences = append(fences, fence{prefix: p})
		}
	}
	return fences
}

// of returns the prefixes of one family, sorted.
func of(f netfilter.Family, prefixes []netip.Prefix) []netip.Prefix {
	var own []netip.Prefix
	for _, p := range prefixes {
		if netfilter.FamilyOf(p.Addr()) == f {
			own = append(own, p)
		}
	}
	slices.SortFunc(own, netip.Prefix.Compare)
	return slices.Compact(own)
}

// link is the name of the tunnel's link.
const link = mesh.Link

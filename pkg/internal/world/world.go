// Package world makes random small clusters for tests, from alphabets so tiny that everything meets everything: shared
// labels, ports behind one name, blocks that overlap, addresses that a finished pod left to another.
package world

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
)

// Self and Other are the names of the nodes.
const (
	Self  = "n1"
	Other = "n2"
)

// New makes a snapshot as node Self sees it. Its local pods have their addresses, as after Snapshot.Bind.
func New(r *rand.Rand) cluster.Snapshot {
	s := cluster.Snapshot{Self: Self, Nodes: nodes()}
	for _, name := range []string{"a", "b", "c"} {
		s.Namespaces = append(s.Namespaces, cluster.Namespace{Name: name, Labels: someLabels(r)})
	}
	for i := range 3 + r.IntN(6) {
		s.Pods = append(s.Pods, newPod(r, i, s.Pods))
	}
	for i := range r.IntN(7) {
		s.Policies = append(s.Policies, newPolicy(r, i))
	}
	return s
}

func nodes() []cluster.Node {
	return []cluster.Node{
		{
			Name: Self, PodCIDRs: prefixes("10.0.1.0/24", "fd00:1::/64"),
			Addresses: addresses("192.168.0.1", "fc00::1"),
		},
		{
			Name: Other, PodCIDRs: prefixes("10.0.2.0/24", "fd00:2::/64"),
			Addresses: addresses("192.168.0.2", "fc00::2"),
		},
	}
}

// Outside are addresses that no pod has, and that some blocks hold.
func Outside() []netip.Addr {
	return addresses("192.0.2.1", "10.0.2.200", "192.168.0.2", "2001:db8::1", "fd00:2::200", "fc00::2")
}

// newPod makes the i-th pod; before are those made already.
func newPod(r *rand.Rand, i int, before []cluster.Pod) cluster.Pod {
	pod := cluster.Pod{
		Namespace: pick(r, "a", "b", "c"), Name: fmt.Sprintf("p%d", i), UID: fmt.Sprintf("uid-%d", i),
		Node: pick(r, Self, Self, Other), Labels: someLabels(r), Ports: somePorts(r),
	}
	node, n := 1, i+2
	if pod.Node == Other {
		node = 2
	}
	v4, v6 := fmt.Sprintf("10.0.%d.%d", node, n), fmt.Sprintf("fd00:%d::%d", node, n)
	switch r.IntN(12) {
	case 0:
		pod.HostNetwork = true
		pod.Addresses = addresses(fmt.Sprintf("192.168.0.%d", node), fmt.Sprintf("fc00::%d", node))
	case 1:
		pod.Finished = true
		if len(before) > 0 {
			if other := before[r.IntN(len(before))]; !other.HostNetwork {
				pod.Addresses = slices.Clone(other.Addresses)
			}
		}
	case 2: // none yet
	case 3:
		pod.Addresses = addresses(v4)
	case 4:
		pod.Addresses = addresses(v6)
	default:
		pod.Addresses = addresses(v4, v6)
	}
	return pod
}

func newPolicy(r *rand.Rand, i int) cluster.Policy {
	p := cluster.Policy{
		Namespace: pick(r, "a", "b", "c"), Name: fmt.Sprintf("policy%d", i), Pods: someSelector(r),
		Ingress: r.IntN(3) > 0, Egress: r.IntN(2) > 0, Log: someLog(r),
	}
	if r.IntN(30) == 0 {
		p.Pods = nil
	}
	for j := range r.IntN(4) {
		p.IngressRules = append(p.IngressRules, newRule(r, j))
	}
	for j := range r.IntN(4) {
		p.EgressRules = append(p.EgressRules, newRule(r, j))
	}
	return p
}

func newRule(r *rand.Rand, index int) cluster.Rule {
	rule := cluster.Rule{Index: index, AnyPeer: r.IntN(5) == 0, AnyPort: r.IntN(3) == 0}
	if !rule.AnyPeer {
		for range r.IntN(4) {
			rule.Peers = append(rule.Peers, newPeer(r))
		}
	}
	if !rule.AnyPort {
		for range r.IntN(4) {
			rule.Ports = append(rule.Ports, newPort(r))
		}
	}
	return rule
}

func newPeer(r *rand.Rand) cluster.Peer {
	switch r.IntN(9) {
	case 0, 1, 2:
		return cluster.Peer{Block: newBlock(r)}
	case 3:
		return cluster.Peer{} // not understood
	case 4, 5:
		return cluster.Peer{Pods: someSelector(r)}
	default:
		return cluster.Peer{Namespaces: someSelector(r), Pods: someSelector(r)}
	}
}

func newBlock(r *rand.Rand) *cluster.Block {
	all := prefixes("0.0.0.0/0", "10.0.0.0/8", "10.0.1.0/24", "10.0.1.2/31", "10.0.2.0/24", "192.0.2.1/32", "128.0.0.0/1",
		"::/0", "fd00::/16", "fd00:1::/64", "fd00:1::2/127", "fd00:2::/64", "2001:db8::1/128", "8000::/1")
	b := &cluster.Block{CIDR: all[r.IntN(len(all))]}
	for range r.IntN(3) {
		e := all[r.IntN(len(all))]
		if e.Bits() > b.CIDR.Bits() && b.CIDR.Overlaps(e) {
			b.Except = append(b.Except, e)
		}
	}
	return b
}

func newPort(r *rand.Rand) cluster.Port {
	p := cluster.Port{Protocol: pick(r, cluster.TCP, cluster.TCP, cluster.UDP, cluster.SCTP)}
	switch r.IntN(8) {
	case 0:
	case 1, 2, 3:
		p.Name = pick(r, "http", "dns")
	case 4, 5:
		p.First = pick(r, Ports()...)
		p.Last = p.First
	case 6:
		p.First, p.Last = 53, 81
	default:
		p.First, p.Last = pick(r, Ports()...), pick(r, Ports()...) // may be no range at all
	}
	if r.IntN(40) == 0 {
		p.Protocol = "DCCP"
	}
	return p
}

// Ports are the port numbers in use.
func Ports() []uint16 { return []uint16{53, 80, 81, 65535} }

func somePorts(r *rand.Rand) []cluster.NamedPort {
	var ports []cluster.NamedPort
	for range r.IntN(4) {
		ports = append(ports, cluster.NamedPort{
			Name: pick(r, "http", "dns"), Protocol: pick(r, cluster.TCP, cluster.UDP, cluster.SCTP), Port: pick(r, Ports()...),
		})
	}
	return ports
}

func someLabels(r *rand.Rand) labels.Set {
	set := labels.Set{}
	for _, key := range []string{"app", "tier"} {
		if r.IntN(3) > 0 {
			set[key] = pick(r, "x", "y")
		}
	}
	return set
}

func someSelector(r *rand.Rand) labels.Selector {
	switch r.IntN(12) {
	case 0, 1, 2:
		return labels.Everything()
	case 3:
		return labels.Nothing()
	}
	ops := labels.NewSelector()
	for range 1 + r.IntN(2) {
		ops = ops.Add(someRequirement(r))
	}
	return ops
}

func someRequirement(r *rand.Rand) labels.Requirement {
	key := pick(r, "app", "tier")
	values := [][]string{{"x"}, {"y"}, {"x", "y"}}[r.IntN(3)]
	switch r.IntN(5) {
	case 0:
		return must(labels.ParseToRequirements(key))[0]
	case 1:
		return must(labels.ParseToRequirements("!" + key))[0]
	case 2:
		return must(labels.ParseToRequirements(fmt.Sprintf("%s notin (%s)", key, join(values))))[0]
	default:
		return must(labels.ParseToRequirements(fmt.Sprintf("%s in (%s)", key, join(values))))[0]
	}
}

package policy

import (
	"net/netip"
	"slices"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
)

// meeting is a flow with the pods that have its addresses: one each, but for moments in which the status of a pod that goes
// still names an address that another one has got.
type meeting struct {
	flow     Flow
	src, dst []*cluster.Pod
	// namespace returns the labels of a namespace; false for one that is not known, which no selector chooses.
	namespace func(name string) (labels.Set, bool)
}

// hasIdentity tells whether a pod's addresses are its own: that of a host-network pod is its node's, that of a finished one
// may be another pod's.
func hasIdentity(pod *cluster.Pod) bool { return !pod.HostNetwork && !pod.Finished }

// selectsPod tells whether a policy applies to a pod. Without a selector it applies to all of its namespace: what was not
// understood isolates.
func selectsPod(p *cluster.Policy, pod *cluster.Pod) bool {
	return p.Namespace == pod.Namespace && (p.Pods == nil || p.Pods.Matches(pod.Labels))
}

// at returns the address and the pods on a side of the flow, which is named as in a direction.
func (m *meeting) at(side string) (netip.Addr, []*cluster.Pod) {
	if side == "src" {
		return m.flow.Src, m.src
	}
	return m.flow.Dst, m.dst
}

// allows tells whether a rule of a policy in a namespace allows the flow.
func (m *meeting) allows(d direction, namespace string, r cluster.Rule) bool {
	peer := func(p cluster.Peer) bool { return m.peerMatches(d, namespace, p) }
	return (r.AnyPeer || slices.ContainsFunc(r.Peers, peer)) && (r.AnyPort || slices.ContainsFunc(r.Ports, m.portMatches))
}

// peerMatches tells whether a peer of a policy in a namespace is the other end of the flow.
func (m *meeting) peerMatches(d direction, namespace string, peer cluster.Peer) bool {
	address, pods := m.at(d.peer)
	if peer.Block != nil {
		return blockHolds(*peer.Block, address)
	}
	return slices.ContainsFunc(pods, func(pod *cluster.Pod) bool {
		return peer.Pods != nil && m.namespaceMatches(namespace, peer.Namespaces, pod.Namespace) && peer.Pods.Matches(pod.Labels)
	})
}

// namespaceMatches tells whether a selector of a policy in the namespace own chooses a namespace; without a selector it is
// the own one.
func (m *meeting) namespaceMatches(own string, selector labels.Selector, name string) bool {
	if selector == nil {
		return name == own
	}
	set, known := m.namespace(name)
	return known && selector.Matches(set)
}

// blockHolds tells whether an ipBlock holds an address.
func blockHolds(b cluster.Block, a netip.Addr) bool {
	holds := func(p netip.Prefix) bool { return p.Contains(a) }
	return holds(b.CIDR) && !slices.ContainsFunc(b.Except, holds)
}

// portMatches tells whether a port of a rule is the flow's. ICMP has none.
func (m *meeting) portMatches(port cluster.Port) bool {
	switch {
	case port.Protocol != m.flow.Protocol || faultOf(port) != "":
		return false
	case port.Name != "":
		return slices.ContainsFunc(m.dst, func(pod *cluster.Pod) bool {
			return slices.Contains(pod.Ports, cluster.NamedPort{Name: port.Name, Protocol: port.Protocol, Port: m.flow.Port})
		})
	default:
		return port.First == 0 || port.First <= m.flow.Port && m.flow.Port <= port.Last
	}
}

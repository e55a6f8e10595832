// Package oracle decides by the words of the Kubernetes API whether NetworkPolicies allow a connection, for tests. It is
// slow, plain, and shares no code with pkg/policy or pkg/netfilter, which it is there to contradict.
package oracle

import (
	"net/netip"

	"github.com/warren-cni/warren/pkg/cluster"
)

// ICMP is the protocol of a Flow that no policy port can name.
const ICMP cluster.Protocol = "ICMP"

// Flow is a new connection, after the destination was translated.
type Flow struct {
	Src, Dst netip.Addr
	Protocol cluster.Protocol
	Port     uint16
}

// Allowed tells whether the policies that the snapshot's own node enforces allow a connection: the egress policies of a
// source that is a pod of this node, and the ingress policies of a destination that is.
func Allowed(s cluster.Snapshot, f Flow) bool {
	if f.Src == f.Dst {
		return true // a pod always reaches itself
	}
	return egressAllowed(s, f) && ingressAllowed(s, f)
}

func egressAllowed(s cluster.Snapshot, f Flow) bool {
	for _, pod := range at(s, f.Src) {
		if pod.Node != s.Self {
			continue
		}
		isolated, allowed := false, false
		for _, p := range s.Policies {
			if !applies(p, pod) || !p.Egress {
				continue
			}
			isolated = true
			for _, r := range p.EgressRules {
				allowed = allowed || peerMatches(s, p, r, f.Dst) && portMatches(s, r, f)
			}
		}
		if isolated && !allowed {
			return false
		}
	}
	return true
}

func ingressAllowed(s cluster.Snapshot, f Flow) bool {
	for _, pod := range at(s, f.Dst) {
		if pod.Node != s.Self {
			continue
		}
		isolated, allowed := false, false
		for _, p := range s.Policies {
			if !applies(p, pod) || !p.Ingress {
				continue
			}
			isolated = true
			for _, r := range p.IngressRules {
				allowed = allowed || peerMatches(s, p, r, f.Src) && portMatches(s, r, f)
			}
		}
		if isolated && !allowed {
			return false
		}
	}
	return true
}

// at returns the pods whose address it is. A host-network pod has none of its own, and a finished one has none any more.
func at(s cluster.Snapshot, a netip.Addr) []cluster.Pod {
	var pods []cluster.Pod
	for _, pod := range s.Pods {
		for _, own := range pod.Addresses {
			if own == a && !pod.HostNetwork && !pod.Finished {
				pods = append(pods, pod)
			}
		}
	}
	return pods
}

func applies(p cluster.Policy, pod cluster.Pod) bool {
	return p.Namespace == pod.Namespace && (p.Pods == nil || p.Pods.Matches(pod.Labels))
}

func peerMatches(s cluster.Snapshot, p cluster.Policy, r cluster.Rule, a netip.Addr) bool {
	if r.AnyPeer {
		return true
	}
	for _, peer := range r.Peers {
		if peer.Block != nil {
			if inBlock(*peer.Block, a) {
				return true
			}
			continue
		}
		for _, pod := range at(s, a) {
			if peer.Pods != nil && inNamespace(s, p, peer, pod) && peer.Pods.Matches(pod.Labels) {
				return true
			}
		}
	}
	return false
}

func inBlock(b cluster.Block, a netip.Addr) bool {
	for _, e := range b.Except {
		if e.Contains(a) {
			return false
		}
	}
	return b.CIDR.Contains(a)
}

func inNamespace(s cluster.Snapshot, p cluster.Policy, peer cluster.Peer, pod cluster.Pod) bool {
	if peer.Namespaces == nil {
		return pod.Namespace == p.Namespace
	}
	for _, ns := range s.Namespaces {
		if ns.Name == pod.Namespace {
			return peer.Namespaces.Matches(ns.Labels)
		}
	}
	return false
}

// portMatches compares with the destination, in both directions.
func portMatches(s cluster.Snapshot, r cluster.Rule, f Flow) bool {
	if r.AnyPort {
		return true
	}
	for _, port := range r.Ports {
		if port.Protocol != f.Protocol || f.Protocol == ICMP {
			continue
		}
		if port.Name == "" {
			whole := port.First == 0 && port.Last == 0
			if whole || port.First > 0 && port.First <= f.Port && f.Port <= port.Last {
				return true
			}
			continue
		}
		for _, pod := range at(s, f.Dst) {
			for _, named := range pod.Ports {
				if named.Name == port.Name && named.Protocol == f.Protocol && named.Port == f.Port {
					return true
				}
			}
		}
	}
	return false
}

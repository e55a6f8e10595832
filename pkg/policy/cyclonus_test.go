package policy_test

import (
	"maps"
	"net/netip"
	"slices"
	"testing"

	"github.com/mattfenwick/cyclonus/pkg/matcher"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/internal/oracle"
)

// cyclonus is somebody else's reading of the API: the matcher of the Cyclonus conformance suite. It judges by API objects,
// and only the peers that it is told of.
type cyclonus struct {
	snapshot cluster.Snapshot
	policies *matcher.Policy
	peers    map[netip.Addr]*peer
}

// peer is a pod with an address of its own.
type peer struct {
	cluster.Pod
	namespace labels.Set
}

// newCyclonus gives the policies to Cyclonus. What the API cannot say, or Cyclonus panics at, and what allows nothing, is left
// out in such a way that it goes on allowing nothing: an entry without its rule's other entries, a rule of which no entry is
// left, a policy for neither direction. A block cannot be a bad CIDR, because cluster.Block has been parsed.
func newCyclonus(s cluster.Snapshot) *cyclonus {
	c := &cyclonus{snapshot: s, peers: map[netip.Addr]*peer{}}
	namespaces := map[string]labels.Set{}
	for _, n := range s.Namespaces {
		namespaces[n.Name] = n.Labels
	}
	for _, pod := range s.Pods {
		for _, a := range pod.Addresses {
			if !pod.HostNetwork && !pod.Finished {
				c.peers[a] = &peer{Pod: pod, namespace: namespaces[pod.Namespace]}
			}
		}
	}
	var objects []*networkingv1.NetworkPolicy
	for _, p := range s.Policies {
		if p.Ingress || p.Egress {
			objects = append(objects, object(p))
		}
	}
	c.policies = matcher.BuildNetworkPolicies(false, objects)
	return c
}

// agree compares Cyclonus with the oracle about a connection, on the ends that are on this node.
func (c *cyclonus) agree(t *testing.T, f oracle.Flow, sum *tally) {
	t.Helper()
	if fault := c.fault(f); fault != "" {
		sum.excluded[fault]++
		return
	}
	traffic := &matcher.Traffic{
		Source: c.end(f.Src), Destination: c.end(f.Dst), ResolvedPort: int(f.Port), Protocol: corev1.Protocol(f.Protocol),
	}
	if names := c.names(f); len(names) == 1 {
		traffic.ResolvedPortName = names[0]
	}
	result := c.policies.IsTrafficAllowed(traffic)
	got := (!c.local(f.Src) || result.Egress.IsAllowed()) && (!c.local(f.Dst) || result.Ingress.IsAllowed())
	sum.confirmed[got]++
	if want := oracle.Allowed(c.snapshot, f); got != want {
		t.Errorf("%+v: Cyclonus says %v, the oracle %v:\n%s", f, got, want, result.Table())
	}
}

// fault names what keeps Cyclonus from judging a connection rightly. It knows nothing of the host network either, so that it is
// told of such a pod's address as nobody's; nor of the own node, but no connection here is one of the node's.
func (c *cyclonus) fault(f oracle.Flow) string {
	switch {
	case f.Src == f.Dst:
		return "loopback: it isolates a pod from itself"
	case len(c.names(f)) > 1:
		return "names: it takes one name for a port"
	case c.notIn(f.Src) || c.notIn(f.Dst):
		return "NotIn: it does not match where the key is absent"
	}
	return ""
}

// notIn tells whether a selector of any policy asks a pod or its namespace for a key that is absent to be not in a list.
func (c *cyclonus) notIn(a netip.Addr) bool {
	at := c.peers[a]
	if at == nil {
		return false
	}
	wrong := func(s labels.Selector, sets ...labels.Set) bool {
		if s == nil {
			return false
		}
		requirements, _ := s.Requirements()
		return slices.ContainsFunc(requirements, func(r labels.Requirement) bool {
			absent := func(set labels.Set) bool { return !set.Has(r.Key()) }
			return r.Operator() == selection.NotIn && slices.ContainsFunc(sets, absent)
		})
	}
	return slices.ContainsFunc(c.snapshot.Policies, func(p cluster.Policy) bool {
		inRule := func(r cluster.Rule) bool {
			return slices.ContainsFunc(r.Peers, func(other cluster.Peer) bool {
				return wrong(other.Pods, at.Labels) || wrong(other.Namespaces, at.namespace)
			})
		}
		return p.Namespace == at.Namespace && wrong(p.Pods, at.Labels) ||
			slices.ContainsFunc(p.IngressRules, inRule) || slices.ContainsFunc(p.EgressRules, inRule)
	})
}

// names are what the destination calls the port.
func (c *cyclonus) names(f oracle.Flow) []string {
	names := map[string]bool{}
	if to := c.peers[f.Dst]; to != nil {
		for _, p := range to.Ports {
			if p.Protocol == f.Protocol && p.Port == f.Port {
				names[p.Name] = true
			}
		}
	}
	return slices.Sorted(maps.Keys(names))
}

// local tells whether a pod of this node has the address.
func (c *cyclonus) local(a netip.Addr) bool {
	return c.peers[a] != nil && c.peers[a].Node == c.snapshot.Self
}

func (c *cyclonus) end(a netip.Addr) *matcher.TrafficPeer {
	end := &matcher.TrafficPeer{IP: a.String()}
	if pod := c.peers[a]; pod != nil {
		end.Internal = &matcher.InternalPeer{Namespace: pod.Namespace, NamespaceLabels: pod.namespace, PodLabels: pod.Labels}
	}
	return end
}

// object returns a policy as the API has it.
func object(p cluster.Policy) *networkingv1.NetworkPolicy {
	o := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name}}
	if p.Pods != nil {
		o.Spec.PodSelector = *selector(p.Pods) // a selector that could not be read selects every pod
	}
	if p.Ingress {
		o.Spec.PolicyTypes = append(o.Spec.PolicyTypes, networkingv1.PolicyTypeIngress)
	}
	if p.Egress {
		o.Spec.PolicyTypes = append(o.Spec.PolicyTypes, networkingv1.PolicyTypeEgress)
	}
	for _, r := range p.IngressRules {
		if peers, ports, ok := lists(r); ok {
			o.Spec.Ingress = append(o.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: peers, Ports: ports})
		}
	}
	for _, r := range p.EgressRules {
		if peers, ports, ok := lists(r); ok {
			o.Spec.Egress = append(o.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: peers, Ports: ports})
		}
	}
	return o
}

// lists returns the peers and ports of a rule, and whether there is anything that it could allow: an empty list in the API
// means everything.
func lists(r cluster.Rule) (peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort, ok bool) {
	for _, p := range r.Peers {
		switch {
		case p.Block != nil:
			block := &networkingv1.IPBlock{CIDR: p.Block.CIDR.String()}
			for _, e := range p.Block.Except {
				block.Except = append(block.Except, e.String())
			}
			peers = append(peers, networkingv1.NetworkPolicyPeer{IPBlock: block})
		case p.Pods != nil:
			peers = append(peers, networkingv1.NetworkPolicyPeer{PodSelector: selector(p.Pods), NamespaceSelector: selector(p.Namespaces)})
		}
	}
	for _, p := range r.Ports {
		if p.First > p.Last {
			continue // Cyclonus panics at a range that ends before it begins
		}
		protocol := corev1.Protocol(p.Protocol)
		port := networkingv1.NetworkPolicyPort{Protocol: &protocol}
		if p.Name != "" {
			port.Port = new(intstr.FromString(p.Name))
		} else if p.First > 0 {
			port.Port = new(intstr.FromInt32(int32(p.First)))
			if p.Last > p.First {
				port.EndPort = new(int32(p.Last))
			}
		}
		ports = append(ports, port)
	}
	return peers, ports, (r.AnyPeer || len(peers) > 0) && (r.AnyPort || len(ports) > 0)
}

// selector returns a selector as the API has it; nil stays nil.
func selector(s labels.Selector) *metav1.LabelSelector {
	if s == nil {
		return nil
	}
	requirements, selectable := s.Requirements()
	o := &metav1.LabelSelector{}
	if !selectable {
		o.MatchExpressions = []metav1.LabelSelectorRequirement{ // nothing has a key and has it not
			{Key: "app", Operator: metav1.LabelSelectorOpExists}, {Key: "app", Operator: metav1.LabelSelectorOpDoesNotExist},
		}
	}
	operators := map[selection.Operator]metav1.LabelSelectorOperator{
		selection.In: metav1.LabelSelectorOpIn, selection.Equals: metav1.LabelSelectorOpIn, selection.NotIn: metav1.LabelSelectorOpNotIn,
		selection.Exists: metav1.LabelSelectorOpExists, selection.DoesNotExist: metav1.LabelSelectorOpDoesNotExist,
	}
	for _, r := range requirements {
		o.MatchExpressions = append(o.MatchExpressions, metav1.LabelSelectorRequirement{
			Key: r.Key(), Operator: operators[r.Operator()], Values: slices.Sorted(maps.Keys(r.Values())),
		})
	}
	return o
}

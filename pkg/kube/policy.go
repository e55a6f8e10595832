package kube

import (
	"math"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/warren-cni/warren/pkg/cluster"
)

// convertPolicy applies the API's defaults and drops what it does not understand, so that it allows nothing: a bad peer
// or port is absent, a rule without any good peer or port matches nothing, and a policy whose podSelector is bad isolates
// every pod of its namespace, by rules that match nothing.
func convertPolicy(p *networkingv1.NetworkPolicy) (cluster.Policy, []cluster.Problem) {
	found := &findings{
		code: codePolicy, object: "NetworkPolicy " + p.Namespace + "/" + p.Name, remedy: "correct the NetworkPolicy",
	}
	policy := cluster.Policy{Namespace: p.Namespace, Name: p.Name, UID: string(p.UID)}
	policy.Log = logMode(p.Annotations, found)
	policy.Ingress, policy.Egress = directions(&p.Spec, found)

	path := field.NewPath("spec")
	pods, err := metav1.LabelSelectorAsSelector(&p.Spec.PodSelector)
	if err != nil {
		found.add(path.Child("podSelector"), "%v: the policy isolates every pod of the namespace and allows nothing", err)
		policy.Pods = labels.Everything()
		policy.IngressRules, policy.EgressRules = refused(policy.Ingress, len(p.Spec.Ingress)), refused(policy.Egress, len(p.Spec.Egress))
		return policy, found.list
	}
	policy.Pods = pods
	prefixes := maxPrefixes
	if policy.Ingress {
		for i, r := range p.Spec.Ingress {
			rule := ruleReader{path: path.Child("ingress").Index(i), peersField: "from", found: found, prefixes: &prefixes}
			policy.IngressRules = append(policy.IngressRules, rule.read(i, r.From, r.Ports))
		}
	}
	if policy.Egress {
		for i, r := range p.Spec.Egress {
			rule := ruleReader{path: path.Child("egress").Index(i), peersField: "to", found: found, prefixes: &prefixes}
			policy.EgressRules = append(policy.EgressRules, rule.read(i, r.To, r.Ports))
		}
	}
	return policy, found.list
}

// refused are rules that match nothing, in the place of those of a direction that were not read.
func refused(isolates bool, n int) []cluster.Rule {
	var rules []cluster.Rule
	for i := range n {
		if isolates {
			rules = append(rules, cluster.Rule{Index: i})
		}
	}
	return rules
}

// directions applies the default of policyTypes: always Ingress, and Egress where there are egress rules. A type that
// does not exist could have meant either, so that it isolates both.
func directions(spec *networkingv1.NetworkPolicySpec, found *findings) (ingress, egress bool) {
	if len(spec.PolicyTypes) == 0 {
		return true, len(spec.Egress) > 0
	}
	for i, t := range spec.PolicyTypes {
		switch t {
		case networkingv1.PolicyTypeIngress:
			ingress = true
		case networkingv1.PolicyTypeEgress:
			egress = true
		default:
			found.add(field.NewPath("spec", "policyTypes").Index(i), "%q is not a policy type: the policy isolates both directions", t)
			ingress, egress = true, true
		}
	}
	return ingress, egress
}

// maxPrefixes bounds what the ipBlocks of one policy come to when their exceptions are cut out of them: a block without one address
// is as many prefixes as that address has more bits, so that an object of a megabyte could come to millions.
const maxPrefixes = 1 << 17

// ruleReader converts one rule of either direction.
type ruleReader struct {
	path       *field.Path
	peersField string
	found      *findings
	// prefixes is how many the policy's blocks may still come to.
	prefixes *int
}

func (r ruleReader) read(index int, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) cluster.Rule {
	rule := cluster.Rule{Index: index, AnyPeer: len(peers) == 0, AnyPort: len(ports) == 0}
	for i := range peers {
		peer, ok := r.peer(r.path.Child(r.peersField).Index(i), &peers[i])
		if ok {
			rule.Peers = append(rule.Peers, peer)
		}
	}
	for i := range ports {
		port, ok := r.port(r.path.Child("ports").Index(i), &ports[i])
		if ok {
			rule.Ports = append(rule.Ports, port)
		}
	}
	return rule
}

func (r ruleReader) peer(path *field.Path, p *networkingv1.NetworkPolicyPeer) (cluster.Peer, bool) {
	hasSelector := p.PodSelector != nil || p.NamespaceSelector != nil
	switch {
	case p.IPBlock != nil && hasSelector:
		r.found.add(path, "an ipBlock cannot stand beside a selector: this peer is not allowed")
		return cluster.Peer{}, false
	case p.IPBlock != nil:
		block, ok := r.block(path.Child("ipBlock"), p.IPBlock)
		return cluster.Peer{Block: block}, ok
	case !hasSelector:
		r.found.add(path, "the peer names neither pods, namespaces nor an ipBlock: it allows nothing")
		return cluster.Peer{}, false
	}

	peer := cluster.Peer{Pods: labels.Everything()}
	if p.NamespaceSelector != nil {
		selector, err := metav1.LabelSelectorAsSelector(p.NamespaceSelector)
		if err != nil {
			r.found.add(path.Child("namespaceSelector"), "%v: this peer is not allowed", err)
			return cluster.Peer{}, false
		}
		peer.Namespaces = selector
	}
	if p.PodSelector != nil {
		selector, err := metav1.LabelSelectorAsSelector(p.PodSelector)
		if err != nil {
			r.found.add(path.Child("podSelector"), "%v: this peer is not allowed", err)
			return cluster.Peer{}, false
		}
		peer.Pods = selector
	}
	return peer, true
}

// block refuses the whole peer when one exception is bad: without the exception it would allow too much.
func (r ruleReader) block(path *field.Path, b *networkingv1.IPBlock) (*cluster.Block, bool) {
	cidr, err := parsePrefix(b.CIDR)
	if err != nil {
		r.found.add(path.Child("cidr"), "%q is not a prefix (%v): this peer is not allowed", b.CIDR, err)
		return nil, false
	}
	block, comesTo := &cluster.Block{CIDR: cidr}, 1
	for i, text := range b.Except {
		except, err := parsePrefix(text)
		if err != nil {
			r.found.add(path.Child("except").Index(i), "%q is not a prefix (%v): this peer is not allowed", text, err)
			return nil, false
		}
		if except.Bits() <= cidr.Bits() || !cidr.Contains(except.Addr()) {
			r.found.add(path.Child("except").Index(i), "%s does not lie inside %s: this peer is not allowed", except, cidr)
			return nil, false
		}
		block.Except = append(block.Except, except)
		comesTo += except.Bits() - cidr.Bits()
	}
	if comesTo > *r.prefixes {
		r.found.add(path, "with its exceptions the block may come to %d prefixes, and those of one policy to %d at most: this peer is not allowed", comesTo, maxPrefixes)
		return nil, false
	}
	*r.prefixes -= comesTo
	return block, true
}

func (r ruleReader) port(path *field.Path, p *networkingv1.NetworkPolicyPort) (cluster.Port, bool) {
	var protocolField corev1.Protocol
	if p.Protocol != nil {
		protocolField = *p.Protocol
	}
	protocol, ok := protocolOf(protocolField)
	if !ok {
		r.found.add(path.Child("protocol"), "%q is not TCP, UDP or SCTP: this port is not allowed", protocolField)
		return cluster.Port{}, false
	}
	port := cluster.Port{Protocol: protocol}
	switch {
	case p.Port == nil && p.EndPort != nil:
		r.found.add(path.Child("endPort"), "there is no port that the range begins with: this port is not allowed")
		return cluster.Port{}, false
	case p.Port == nil:
		return port, true
	case p.Port.Type == intstr.String:
		port.Name, ok = r.portName(path, p)
	default:
		port.First, port.Last, ok = r.portRange(path, p)
	}
	return port, ok
}

func (r ruleReader) portName(path *field.Path, p *networkingv1.NetworkPolicyPort) (string, bool) {
	if faults := validation.IsValidPortName(p.Port.StrVal); len(faults) > 0 {
		r.found.add(path.Child("port"), "%q is not the name of a port (%s): this port is not allowed", p.Port.StrVal, faults[0])
		return "", false
	}
	if p.EndPort != nil {
		r.found.add(path.Child("endPort"), "a named port cannot begin a range: this port is not allowed")
		return "", false
	}
	return p.Port.StrVal, true
}

func (r ruleReader) portRange(path *field.Path, p *networkingv1.NetworkPolicyPort) (first, last uint16, ok bool) {
	first, ok = portNumber(p.Port.IntVal)
	if !ok {
		r.found.add(path.Child("port"), "%d is not a port: this port is not allowed", p.Port.IntVal)
		return 0, 0, false
	}
	if p.EndPort == nil {
		return first, first, true
	}
	last, ok = portNumber(*p.EndPort)
	if !ok || last < first {
		r.found.add(path.Child("endPort"), "%d does not end a range that begins at %d: this port is not allowed", *p.EndPort, first)
		return 0, 0, false
	}
	return first, last, true
}

// portNumber reports whether the number is a port.
func portNumber(n int32) (uint16, bool) {
	if n < 1 || n > math.MaxUint16 {
		return 0, false
	}
	return uint16(n), true
}

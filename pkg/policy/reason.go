package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
)

// rule holds a rule of a policy against the flow.
func (e *explainer) rule(d direction, p *cluster.Policy, r cluster.Rule) Rule {
	judged := Rule{Field: fmt.Sprintf("%s[%d]", d.name, r.Index), Allows: e.allows(d, p.Namespace, r)}
	for _, peer := range r.Peers {
		judged.Peers = append(judged.Peers, e.peer(d, p, peer))
	}
	for _, port := range r.Ports {
		judged.Ports = append(judged.Ports, e.port(port))
	}
	judged.Peers = orAny(judged.Peers, r.AnyPeer, "every peer")
	judged.Ports = orAny(judged.Ports, r.AnyPort, "every port and protocol")
	return judged
}

// orAny stands in for peers or ports of which there are none: either the policy names none and means all, or none of what
// it names was understood.
func orAny(matches []Match, matchAny bool, text string) []Match {
	switch {
	case matchAny:
		return []Match{{Matches: true, Text: text}}
	case len(matches) == 0:
		return []Match{{Text: "none", Why: "nothing that the rule names was understood"}}
	default:
		return matches
	}
}

// peer holds a peer of a rule against the other end of the flow.
func (e *explainer) peer(d direction, p *cluster.Policy, peer cluster.Peer) Match {
	m := Match{Matches: e.peerMatches(d, p.Namespace, peer)}
	why := e.unchosen
	switch {
	case peer.Block != nil:
		m.Text, why = blockText(*peer.Block), e.outside
	case peer.Pods == nil:
		return Match{Text: "none", Why: noPeer}
	case peer.Namespaces == nil:
		m.Text = "pods " + text(peer.Pods) + " in " + p.Namespace
	default:
		m.Text = "pods " + text(peer.Pods) + " in namespaces " + text(peer.Namespaces)
	}
	if !m.Matches {
		m.Why = why(d, p, peer)
	}
	return m
}

// unchosen says why selectors do not choose the other end of the flow.
func (e *explainer) unchosen(d direction, p *cluster.Policy, peer cluster.Peer) string {
	_, pods := e.at(d.peer)
	if len(pods) == 0 {
		return sideText(d.peer) + " has no pod's address"
	}
	pod := pods[0]
	switch {
	case e.namespaceMatches(p.Namespace, peer.Namespaces, pod.Namespace):
		return fmt.Sprintf("%s has %s", pod.Key(), labelText(pod.Labels))
	case peer.Namespaces == nil:
		return pod.Key().String() + " is in another namespace"
	default:
		return fmt.Sprintf("namespace %s has %s", pod.Namespace, e.namespaceText(pod.Namespace))
	}
}

// namespaceText says which labels a namespace has.
func (e *explainer) namespaceText(name string) string {
	if set, known := e.namespace(name); known {
		return labelText(set)
	}
	return "labels that are not known"
}

// labelText says labels.
func labelText(l fmt.Stringer) string {
	if text := l.String(); text != "" {
		return "labels " + text
	}
	return "no labels"
}

// blockText says an ipBlock.
func blockText(b cluster.Block) string {
	if len(b.Except) == 0 {
		return b.CIDR.String()
	}
	except := make([]string, len(b.Except))
	for i, p := range b.Except {
		except[i] = p.String()
	}
	return b.CIDR.String() + " except " + strings.Join(except, ", ")
}

// outside says why an ipBlock does not hold the other end of the flow.
func (e *explainer) outside(d direction, _ *cluster.Policy, peer cluster.Peer) string {
	address, _ := e.at(d.peer)
	holds := func(p netip.Prefix) bool { return p.Contains(address) }
	if at := slices.IndexFunc(peer.Block.Except, holds); at >= 0 && holds(peer.Block.CIDR) {
		return fmt.Sprintf("%s is in %s", sideText(d.peer), peer.Block.Except[at])
	}
	return "does not hold " + sideText(d.peer)
}

// port holds a port of a rule against the destination of the flow.
func (e *explainer) port(port cluster.Port) Match {
	if e.portMatches(port) {
		return Match{Matches: true, Text: portText(port)}
	}
	m := Match{Text: portText(port), Why: faultOf(port)}
	switch {
	case m.Why != "":
	case e.flow.Protocol == ICMP:
		m.Why = "ICMP has no ports"
	case port.Protocol != e.flow.Protocol:
		m.Why = fmt.Sprintf("the protocol is %s", e.flow.Protocol)
	case port.Name != "":
		m.Why = e.unnamed(port)
	default:
		m.Why = fmt.Sprintf("the port is %d", e.flow.Port)
	}
	return m
}

// unnamed says why the destination port is not what the destination calls by a name. Beyond pods nothing has names.
func (e *explainer) unnamed(port cluster.Port) string {
	if len(e.dst) == 0 {
		return "only pods name ports"
	}
	var numbers []string
	for _, pod := range e.dst {
		for _, named := range pod.Ports {
			if named.Name == port.Name && named.Protocol == port.Protocol {
				numbers = append(numbers, fmt.Sprint(named.Port))
			}
		}
	}
	if len(numbers) == 0 {
		return e.dst[0].Key().String() + " has no such port"
	}
	return fmt.Sprintf("it is %s on %s, and the port is %d", strings.Join(numbers, " and "), e.dst[0].Key(), e.flow.Port)
}

// portText says a port as people write it.
func portText(p cluster.Port) string {
	switch {
	case p.Name != "":
		return fmt.Sprintf("%s/%s", p.Name, p.Protocol)
	case p.First == 0 && p.Last == 0:
		return fmt.Sprintf("every %s port", p.Protocol)
	case p.First == p.Last:
		return fmt.Sprintf("%d/%s", p.First, p.Protocol)
	default:
		return fmt.Sprintf("%d-%d/%s", p.First, p.Last, p.Protocol)
	}
}

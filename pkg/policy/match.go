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
	judged := Rule{Field: fmt.Sprintf("%s[%d]", d.name, r.Index)}
	for _, peer := range r.Peers {
		judged.Peers = append(judged.Peers, e.peer(d, p, peer))
	}
	for _, port := range r.Ports {
		judged.Ports = append(judged.Ports, e.port(port))
	}
	judged.Peers = orAny(judged.Peers, r.AnyPeer, "every peer")
	judged.Ports = orAny(judged.Ports, r.AnyPort, "every port and protocol")
	matches := func(m Match) bool { return m.Matches }
	judged.Allows = slices.ContainsFunc(judged.Peers, matches) && slices.ContainsFunc(judged.Ports, matches)
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
	switch {
	case peer.Block != nil:
		return e.block(d, *peer.Block)
	case peer.Pods == nil:
		return Match{Text: "none", Why: noPeer}
	}
	selection := e.peers(p.Namespace, peer)
	chosen := func(pod *cluster.Pod) bool { return slices.Contains(selection.pods, pod) }
	if slices.ContainsFunc(e.pods(d.peer), chosen) {
		return Match{Matches: true, Text: selection.text}
	}
	return Match{Text: selection.text, Why: e.unchosen(d, p, peer)}
}

// unchosen says why selectors do not choose the other end of the flow.
func (e *explainer) unchosen(d direction, p *cluster.Policy, peer cluster.Peer) string {
	pods := e.pods(d.peer)
	if len(pods) == 0 {
		return sideText(d.peer) + " has no pod's address"
	}
	pod := pods[0]
	switch {
	case slices.Contains(e.namespaces(p.Namespace, peer.Namespaces), pod.Namespace):
		return fmt.Sprintf("%s has %s", nameOf(pod), labelText(pod.Labels))
	case peer.Namespaces == nil:
		return nameOf(pod) + " is in another namespace"
	default:
		return fmt.Sprintf("namespace %s has %s", pod.Namespace, e.namespaceLabels(pod.Namespace))
	}
}

// namespaceLabels says which labels a namespace has.
func (e *explainer) namespaceLabels(name string) string {
	for _, ns := range e.snapshot.Namespaces {
		if ns.Name == name {
			return labelText(ns.Labels)
		}
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

// block holds an ipBlock against the other end of the flow.
func (e *explainer) block(d direction, b cluster.Block) Match {
	m := Match{Text: b.CIDR.String()}
	if len(b.Except) > 0 {
		except := make([]string, len(b.Except))
		for i, p := range b.Except {
			except[i] = p.String()
		}
		m.Text += " except " + strings.Join(except, ", ")
	}
	holds := func(p netip.Prefix) bool { return p.Contains(e.address(d.peer)) }
	switch {
	case slices.ContainsFunc(subtract(b.CIDR, b.Except), holds):
		m.Matches = true
	case holds(b.CIDR):
		m.Why = fmt.Sprintf("%s is in %s", sideText(d.peer), b.Except[slices.IndexFunc(b.Except, holds)])
	default:
		m.Why = "does not hold " + sideText(d.peer)
	}
	return m
}

// port holds a port of a rule against the destination of the flow.
func (e *explainer) port(port cluster.Port) Match {
	m := Match{Text: portText(port), Why: faultOf(port)}
	if m.Why != "" {
		return m
	}
	switch {
	case e.flow.Protocol == ICMP:
		m.Why = "ICMP has no ports"
	case port.Protocol != e.flow.Protocol:
		m.Why = fmt.Sprintf("the protocol is %s", e.flow.Protocol)
	case port.Name != "":
		m.Why = e.unnamed(port)
	case port.First > 0 && (e.flow.Port < port.First || e.flow.Port > port.Last):
		m.Why = fmt.Sprintf("the port is %d", e.flow.Port)
	}
	m.Matches = m.Why == ""
	return m
}

// unnamed says why the destination port is not what the destination calls by a name; it is empty where it is. Beyond pods
// nothing has names.
func (e *explainer) unnamed(port cluster.Port) string {
	if len(e.dst) == 0 {
		return "only pods name ports"
	}
	var numbers []string
	for _, pod := range e.dst {
		for _, named := range pod.Ports {
			if named.Name != port.Name || named.Protocol != port.Protocol {
				continue
			}
			if named.Port == e.flow.Port {
				return ""
			}
			numbers = append(numbers, fmt.Sprint(named.Port))
		}
	}
	if len(numbers) == 0 {
		return nameOf(e.dst[0]) + " has no such port"
	}
	return fmt.Sprintf("it is %s on %s, and the port is %d", strings.Join(numbers, " and "), nameOf(e.dst[0]), e.flow.Port)
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

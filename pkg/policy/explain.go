package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/podcidr"
)

// Explain decides about a flow and says why: by the egress policies of its source, enforced on the source's node, and the
// ingress policies of its destination, enforced on the destination's. Unlike Compile it judges for all nodes alike; the
// snapshot's own node makes no difference.
//
// It holds the policies against the flow directly. For each node its verdict is that of the rules that Compile plans there,
// as far as one pod has the address.
func Explain(s cluster.Snapshot, f Flow) Verdict {
	e := explainer{snapshot: s, meeting: meeting{flow: f, src: podsAt(s, f.Src), dst: podsAt(s, f.Dst)}}
	e.namespace = e.namespaceLabels
	v := Verdict{Flow: f, From: e.end(f.Src, e.src), To: e.end(f.Dst, e.dst)}
	if why := e.exempt(v.From, v.To); why != "" {
		v.Egress = Side{Allowed: true, Because: why}
		v.Ingress = v.Egress
	} else {
		v.Egress, v.Ingress = e.side(egress(), v.From), e.side(ingress(), v.To)
		v.Notes = e.notes(v)
	}
	v.Allowed = v.Egress.Allowed && v.Ingress.Allowed
	return v
}

// explainer judges one flow.
type explainer struct {
	meeting

	snapshot cluster.Snapshot
}

// podsAt returns the pods that have an address.
func podsAt(s cluster.Snapshot, a netip.Addr) []*cluster.Pod {
	var pods []*cluster.Pod
	for i := range s.Pods {
		if pod := &s.Pods[i]; hasIdentity(pod) && slices.Contains(pod.Addresses, a) {
			pods = append(pods, pod)
		}
	}
	return pods
}

// namespaceLabels returns the labels of a namespace, and whether it is known.
func (e *explainer) namespaceLabels(name string) (labels.Set, bool) {
	for _, ns := range e.snapshot.Namespaces {
		if ns.Name == name {
			return ns.Labels, true
		}
	}
	return nil, false
}

// selecting returns the policies that isolate a pod in a direction, in the snapshot's order.
func (e *explainer) selecting(d direction, pod *cluster.Pod) []*cluster.Policy {
	var selecting []*cluster.Policy
	for i := range e.snapshot.Policies {
		if p := &e.snapshot.Policies[i]; d.isolates(p) && selectsPod(p, pod) {
			selecting = append(selecting, p)
		}
	}
	return selecting
}

// end describes who has an address.
func (e *explainer) end(a netip.Addr, pods []*cluster.Pod) End {
	if len(pods) > 0 {
		return End{Pod: pods[0].Key().String(), Node: pods[0].Node}
	}
	for _, n := range e.snapshot.Nodes {
		isOwn := func(p netip.Prefix) bool { return podcidr.NodeAddress(p) == a }
		if slices.Contains(n.Addresses, a) || slices.ContainsFunc(n.PodCIDRs, isOwn) {
			return End{Node: n.Name}
		}
	}
	return End{}
}

// exempt says why no policy applies to the flow at all; it is empty where policies decide.
func (e *explainer) exempt(from, to End) string {
	switch {
	case from.Pod == "" && to.Pod == "":
		return "neither end is a pod with an address of its own, and policies isolate no others"
	case e.flow.Src == e.flow.Dst:
		return "a pod always reaches itself, also through its own Service"
	case (from.Pod == "" || to.Pod == "") && from.Node != "" && from.Node == to.Node:
		return "traffic between a pod and its own node " + from.Node + " is always allowed"
	default:
		return ""
	}
}

// side judges one direction; subject is whose policies count.
func (e *explainer) side(d direction, subject End) Side {
	if subject.Pod == "" {
		return Side{Allowed: true, Because: sideText(d.subject) + " has no pod's address, and policies isolate only pods"}
	}
	_, pods := e.at(d.subject)
	policies := e.selecting(d, pods[0])
	if len(policies) == 0 {
		return Side{Allowed: true, Node: subject.Node, Because: "no policy isolates " + sideText(d.subject) + " for " + d.name}
	}
	s := Side{Isolated: true, Node: subject.Node}
	var names, allowing []string
	for _, p := range policies {
		judged := Policy{Name: p.Key().String(), Rules: []Rule{}}
		names = append(names, judged.Name)
		for _, r := range d.rules(p) {
			rule := e.rule(d, p, r)
			judged.Rules = append(judged.Rules, rule)
			if rule.Allows {
				allowing = append(allowing, judged.Name+" "+rule.Field)
			}
		}
		s.Policies = append(s.Policies, judged)
	}
	s.Chain = d.groupChain(names)
	s.Allowed = len(allowing) > 0
	s.Because = "allowed by " + strings.Join(allowing, ", ")
	if !s.Allowed {
		s.Because = "isolated by " + strings.Join(names, ", ") + "; no rule matches"
	}
	return s
}

// notes say what a verdict does not show by itself.
func (e *explainer) notes(v Verdict) []string {
	var notes []string
	add := func(format string, args ...any) { notes = append(notes, fmt.Sprintf(format, args...)) }
	for _, side := range []string{"src", "dst"} {
		a, pods := e.at(side)
		if len(pods) > 1 {
			add("%s is claimed by %s and %s; judged as the first", a, pods[0].Key(), pods[1].Key())
		}
		if node := e.vacant(a); node != "" {
			add("%s is in a podCIDR of node %s, but no pod has it%s: nothing answers there", a, node, e.left(a))
		}
	}
	if own := e.tunnelAddress(v.From); own.IsValid() && own != v.Flow.Src {
		add("with encryption on, what node %s sends to pods of other nodes comes from %s, so that is what an ipBlock has to hold", v.From.Node, own)
	}
	return notes
}

// vacant returns the node in whose podCIDRs an address lies that nobody has; empty for every other address.
func (e *explainer) vacant(a netip.Addr) string {
	if e.end(a, podsAt(e.snapshot, a)) != (End{}) {
		return ""
	}
	for _, n := range e.snapshot.Nodes {
		if slices.ContainsFunc(n.PodCIDRs, func(p netip.Prefix) bool { return p.Contains(a) }) {
			return n.Name
		}
	}
	return ""
}

// left names the finished pod that an address belonged to.
func (e *explainer) left(a netip.Addr) string {
	for i := range e.snapshot.Pods {
		pod := &e.snapshot.Pods[i]
		if pod.Finished && slices.Contains(pod.Addresses, a) {
			return " any more (" + pod.Key().String() + " has finished)"
		}
	}
	return ""
}

// tunnelAddress is the address that a node's own traffic has towards pods of other nodes, in the flow's family. It is invalid
// for an end that is no node.
func (e *explainer) tunnelAddress(end End) netip.Addr {
	node, ok := e.snapshot.Node(end.Node)
	if !ok || end.Pod != "" {
		return netip.Addr{}
	}
	for _, p := range node.PodCIDRs {
		if p.Addr().Is4() == e.flow.Src.Is4() {
			return podcidr.NodeAddress(p)
		}
	}
	return netip.Addr{}
}

// sideText says a side of the flow, without its address, so that verdicts of both families read alike.
func sideText(side string) string {
	if side == "src" {
		return "the source"
	}
	return "the destination"
}

package policy

import (
	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
)

// compiler holds a snapshot with its indexes. Every distinct selection is evaluated once, however many rules name it.
type compiler struct {
	snapshot cluster.Snapshot
	// local are the pods that policies isolate here.
	local []*cluster.Pod
	// all are the pods that may be peers, pods are the same by namespace.
	all  []*cluster.Pod
	pods map[string][]*cluster.Pod
	// policies are by namespace, in the snapshot's order.
	policies   map[string][]*cluster.Policy
	selections map[selector]*selection
	problems   []cluster.Problem
}

// selector identifies a selection: the canonical text of both selectors. own is the policy's namespace where there is no
// namespace selector.
type selector struct{ own, namespaces, pods string }

// selection are the pods that selectors choose.
type selection struct {
	// key identifies the selection in the names of sets, text says it to people.
	key  []string
	text string
	pods []*cluster.Pod
}

func newCompiler(s cluster.Snapshot) *compiler {
	c := &compiler{
		snapshot:   s,
		pods:       map[string][]*cluster.Pod{},
		policies:   map[string][]*cluster.Policy{},
		selections: map[selector]*selection{},
	}
	for i := range s.Policies {
		p := &s.Policies[i]
		c.policies[p.Namespace] = append(c.policies[p.Namespace], p)
	}
	for i := range s.Pods {
		pod := &s.Pods[i]
		// The address of a host-network pod is its node's, that of a finished one may be another pod's.
		if pod.HostNetwork || pod.Finished || len(pod.Addresses) == 0 {
			continue
		}
		c.all = append(c.all, pod)
		c.pods[pod.Namespace] = append(c.pods[pod.Namespace], pod)
		if pod.Node == s.Self {
			c.local = append(c.local, pod)
		}
	}
	return c
}

// selects tells whether a policy applies to a pod of its namespace. Without a selector it applies to all of them: what
// was not understood isolates.
func (c *compiler) selects(p *cluster.Policy, pod *cluster.Pod) bool {
	if p.Pods == nil {
		c.problem(p, "spec.podSelector", "the selector was not understood, so the policy isolates every pod of the namespace")
		return true
	}
	return p.Pods.Matches(pod.Labels)
}

// selecting returns the policies that isolate a pod in a direction, in the snapshot's order.
func (c *compiler) selecting(d direction, pod *cluster.Pod) []*cluster.Policy {
	var selecting []*cluster.Policy
	for _, p := range c.policies[pod.Namespace] {
		if d.isolates(p) && c.selects(p, pod) {
			selecting = append(selecting, p)
		}
	}
	return selecting
}

// peers returns the pods that a peer of a policy in a namespace chooses.
func (c *compiler) peers(namespace string, peer cluster.Peer) *selection {
	id := selector{own: namespace, pods: text(peer.Pods)}
	says := "pods " + id.pods + " in " + namespace
	if peer.Namespaces != nil {
		id = selector{namespaces: text(peer.Namespaces), pods: id.pods}
		says = "pods " + id.pods + " in namespaces " + id.namespaces
	}
	if s, ok := c.selections[id]; ok {
		return s
	}
	s := &selection{key: []string{id.own, id.namespaces, id.pods}, text: says}
	for _, ns := range c.namespaces(namespace, peer.Namespaces) {
		for _, pod := range c.pods[ns] {
			if peer.Pods.Matches(pod.Labels) {
				s.pods = append(s.pods, pod)
			}
		}
	}
	c.selections[id] = s
	return s
}

// namespaces are those that a selector chooses, or the own one where there is no selector. A namespace that is not in the
// snapshot has unknown labels, so no selector chooses it.
func (c *compiler) namespaces(own string, selector labels.Selector) []string {
	if selector == nil {
		return []string{own}
	}
	var names []string
	for _, ns := range c.snapshot.Namespaces {
		if selector.Matches(ns.Labels) {
			names = append(names, ns.Name)
		}
	}
	return names
}

// everywhere returns all pods, for named ports towards everybody.
func (c *compiler) everywhere() *selection {
	return &selection{key: []string{"everywhere"}, text: "all pods", pods: c.all}
}

// here returns the pods of the own node, for named ports of selected pods: the chain of a group is reached by its pods
// only, so one set of a name does for all groups.
func (c *compiler) here() *selection {
	return &selection{key: []string{"here"}, text: "the pods of this node", pods: c.local}
}

// text is the canonical text of a selector. The library writes the one that matches everything and the one that matches
// nothing alike; here they must not be the same set.
func text(s labels.Selector) string {
	if s.Empty() {
		return "*"
	}
	if t := s.String(); t != "" {
		return t
	}
	return "none"
}

// problem reports a part of a policy that allows nothing because it cannot be enforced.
func (c *compiler) problem(p *cluster.Policy, field, message string) {
	c.problems = append(c.problems, cluster.Problem{
		Code:    "PolicyUnenforceable",
		Object:  "NetworkPolicy " + p.Namespace + "/" + p.Name,
		Field:   field,
		Message: message,
		Remedy:  "correct the field, or report it if the API server accepted it",
	})
}

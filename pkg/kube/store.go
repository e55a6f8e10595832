package kube

import (
	"maps"
	"reflect"
	"slices"

	"github.com/warren-cni/warren/pkg/cluster"
)

// store holds the converted objects of all kinds.
type store struct {
	nodes      table[cluster.Node]
	namespaces table[cluster.Namespace]
	pods       table[cluster.Pod]
	policies   table[cluster.Policy]
}

func newStore() store {
	return store{
		nodes:      newTable(func(n *cluster.Node) cluster.Key { return cluster.Key{Name: n.Name} }, equalDeeply),
		namespaces: newTable(func(n *cluster.Namespace) cluster.Key { return cluster.Key{Name: n.Name} }, equalDeeply),
		pods:       newTable((*cluster.Pod).Key, equalPods),
		policies:   newTable((*cluster.Policy).Key, equalDeeply),
	}
}

// become makes the store hold what another one holds, and reports whether that changed anything.
func (s *store) become(other *store) bool {
	nodes, namespaces := s.nodes.become(&other.nodes), s.namespaces.become(&other.namespaces)
	pods, policies := s.pods.become(&other.pods), s.policies.become(&other.policies)
	return nodes || namespaces || pods || policies
}

// changes returns what changed since the last call.
func (s *store) changes() cluster.Delta {
	return cluster.Delta{
		Nodes: byName(s.nodes.drain()), Namespaces: byName(s.namespaces.drain()), Pods: s.pods.drain(), Policies: s.policies.drain(),
	}
}

// byName drops the namespace of names that have none.
func byName[T any](changes map[cluster.Key]*T) map[string]*T {
	named := make(map[string]*T, len(changes))
	for k, value := range changes {
		named[k.Name] = value
	}
	return named
}

func (s *store) snapshot(self string) cluster.Snapshot {
	return cluster.Snapshot{
		Self: self, Nodes: s.nodes.list(), Namespaces: s.namespaces.list(), Pods: s.pods.list(), Policies: s.policies.list(),
	}
}

// equalDeeply is for the kinds whose objects change seldom.
func equalDeeply[T any](a, b *T) bool { return reflect.DeepEqual(a, b) }

// equalPods does without reflection: most events of a cluster are changes of a pod's status that nobody here reads.
func equalPods(a, b *cluster.Pod) bool {
	return a.Namespace == b.Namespace && a.Name == b.Name && a.UID == b.UID && a.StaticUID == b.StaticUID && a.Node == b.Node &&
		a.HostNetwork == b.HostNetwork && a.Finished == b.Finished &&
		maps.Equal(a.Labels, b.Labels) && slices.Equal(a.Addresses, b.Addresses) && slices.Equal(a.Ports, b.Ports)
}

// Kinds of the objects that Events are about. A policy is not of the core API.
const (
	kindPolicy    = "NetworkPolicy"
	kindNamespace = "Namespace"
	kindPod       = "Pod"
	kindNode      = "Node"
)

// uid returns the uid of an object, if it is there and has one.
func (s *store) uid(r Reference) string {
	k := cluster.Key{Namespace: r.Namespace, Name: r.Name}
	if policy, ok := s.policies.objects[k]; ok && r.Kind == kindPolicy {
		return policy.UID
	}
	if pod, ok := s.pods.objects[k]; ok && r.Kind == kindPod {
		return pod.UID
	}
	if node, ok := s.nodes.objects[k]; ok && r.Kind == kindNode {
		return node.UID
	}
	return ""
}

// reporters returns the nodes that write an Event about an object: two about a Node that is refused for an owner's sake, where there is one,
// and of another object the first by name among those with a pod that it concerns, or else among all.
func (s *store) reporters(of Reference, owner string) []string {
	concerns, ok := s.concerned(of)
	if !ok {
		return nil
	}
	if of.Kind == kindNode {
		return s.witnesses(of.Name, owner)
	}
	var with, all []string
	for _, pod := range s.pods.objects {
		if concerns(pod) && !pod.HostNetwork && !pod.Finished && pod.Node != "" {
			with = append(with, pod.Node)
		}
	}
	for _, node := range s.nodes.objects {
		all = append(all, node.Name)
	}
	for _, nodes := range [][]string{with, all} {
		if len(nodes) > 0 {
			return []string{slices.Min(nodes)}
		}
	}
	return nil
}

// witnesses returns the owner of what a Node claims and the next one by name, in a circle that begins at the first where there is no owner.
// One of them may be a liar, or have no daemon that runs. The Node itself, which may be hostile, is one only where there are not two others.
// No witness has more than two owners to speak for, so that who claims what is everybody's does not keep him from speaking for one.
func (s *store) witnesses(refused, owner string) []string {
	var others []string
	for _, node := range s.nodes.objects {
		if node.Name != refused {
			others = append(others, node.Name)
		}
	}
	slices.Sort(others)
	at, _ := slices.BinarySearch(others, owner)
	circle := slices.Concat(others[at:], others[:at], []string{refused})
	return circle[:min(2, len(circle))]
}

// concerned returns what tells the pods that an object concerns, nil for a Node; it is false where there is no such object.
func (s *store) concerned(of Reference) (concerns func(*cluster.Pod) bool, ok bool) {
	k := cluster.Key{Namespace: of.Namespace, Name: of.Name}
	switch of.Kind {
	case kindPolicy:
		policy, found := s.policies.objects[k]
		return func(p *cluster.Pod) bool { return p.Namespace == of.Namespace && policy.Pods.Matches(p.Labels) }, found
	case kindNamespace:
		_, ok = s.namespaces.objects[k]
		return func(p *cluster.Pod) bool { return p.Namespace == of.Name }, ok
	case kindNode:
		_, ok = s.nodes.objects[k]
		return nil, ok
	default:
		return nil, false
	}
}

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

// kindPolicy is the kind of object that has a reporter, and is not of the core API.
const kindPolicy = "NetworkPolicy"

// uid returns the uid of an object, if it is there and has one.
func (s *store) uid(r Reference) string {
	k := cluster.Key{Namespace: r.Namespace, Name: r.Name}
	if policy, ok := s.policies.objects[k]; ok && r.Kind == kindPolicy {
		return policy.UID
	}
	if pod, ok := s.pods.objects[k]; ok && r.Kind == "Pod" {
		return pod.UID
	}
	if node, ok := s.nodes.objects[k]; ok && r.Kind == "Node" {
		return node.UID
	}
	return ""
}

// reporter returns the first node by name with a pod that the policy selects, or the first node of all.
func (s *store) reporter(k cluster.Key) string {
	policy, ok := s.policies.objects[k]
	if !ok {
		return ""
	}
	first := ""
	consider := func(node string) {
		if first == "" || (node != "" && node < first) {
			first = node
		}
	}
	for _, pod := range s.pods.objects {
		if pod.Namespace == k.Namespace && !pod.HostNetwork && !pod.Finished && policy.Pods.Matches(pod.Labels) {
			consider(pod.Node)
		}
	}
	if first != "" {
		return first
	}
	for _, node := range s.nodes.objects {
		consider(node.Name)
	}
	return first
}

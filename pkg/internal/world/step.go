package world

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"reflect"
	"slices"

	"github.com/warren-cni/warren/pkg/cluster"
)

// Step returns the snapshot after something happened in it: to a pod, a policy or a namespace. The snapshot that it was stays
// as it is.
func Step(r *rand.Rand, s cluster.Snapshot) cluster.Snapshot {
	s.Namespaces, s.Pods, s.Policies = slices.Clone(s.Namespaces), slices.Clone(s.Pods), slices.Clone(s.Policies)
	switch r.IntN(8) {
	case 0:
		stepNamespace(r, &s)
	case 1, 2, 3:
		stepPolicy(r, &s)
	default:
		stepPod(r, &s)
	}
	return s
}

// stepNamespace lets a namespace go, come back, or have other labels.
func stepNamespace(r *rand.Rand, s *cluster.Snapshot) {
	name := pick(r, "a", "b", "c")
	i := slices.IndexFunc(s.Namespaces, func(n cluster.Namespace) bool { return n.Name == name })
	if i < 0 {
		s.Namespaces = append(s.Namespaces, cluster.Namespace{Name: name, Labels: someLabels(r)})
		return
	}
	switch r.IntN(4) {
	case 0:
		s.Namespaces = slices.Delete(s.Namespaces, i, i+1)
	case 1:
		s.Namespaces[i].Log = someLog(r)
	default:
		s.Namespaces[i].Labels = someLabels(r)
	}
}

// stepPolicy lets a policy come, go, or become another.
func stepPolicy(r *rand.Rand, s *cluster.Snapshot) {
	i := r.IntN(8)
	name := fmt.Sprintf("policy%d", i)
	at := slices.IndexFunc(s.Policies, func(p cluster.Policy) bool { return p.Name == name })
	if at < 0 {
		s.Policies = append(s.Policies, newPolicy(r, i))
		return
	}
	switch r.IntN(6) {
	case 0:
		s.Policies = slices.Delete(s.Policies, at, at+1)
	case 1:
		s.Policies[at].Log = someLog(r)
	case 2:
		s.Policies[at].Pods = someSelector(r)
	default:
		s.Policies[at] = newPolicy(r, i)
	}
}

// stepPod lets a pod come or go, move to another node or address, finish, or have other labels or ports.
func stepPod(r *rand.Rand, s *cluster.Snapshot) {
	i := r.IntN(10)
	name := fmt.Sprintf("p%d", i)
	at := slices.IndexFunc(s.Pods, func(p cluster.Pod) bool { return p.Name == name })
	if at < 0 {
		s.Pods = append(s.Pods, newPod(r, i, s.Pods))
		return
	}
	p := &s.Pods[at]
	switch r.IntN(11) {
	case 0:
		s.Pods = slices.Delete(s.Pods, at, at+1)
	case 1: // another pod by this name, maybe on another node
		*p = newPod(r, i, s.Pods)
	case 2:
		p.Finished = true
	case 3:
		p.Ports = somePorts(r)
	case 4: // a status that is late names the address that another pod has now
		elsewhere := slices.DeleteFunc(slices.Clone(s.Pods), func(o cluster.Pod) bool { return o.Node != Other || o.HostNetwork })
		if p.Node == Other && len(elsewhere) > 0 {
			p.Addresses = slices.Clone(elsewhere[r.IntN(len(elsewhere))].Addresses)
		}
	case 5:
		p.Addresses = slices.DeleteFunc(slices.Clone(p.Addresses), func(netip.Addr) bool { return r.IntN(2) == 0 })
	case 6: // it holds what is the node's own address in a podCIDR that came later
		own := addresses("10.0.1.1", "fd00:1::1")
		held := func(o cluster.Pod) bool {
			return slices.ContainsFunc(own, func(a netip.Addr) bool { return slices.Contains(o.Addresses, a) })
		}
		if p.Node == Self && !p.HostNetwork && !slices.ContainsFunc(s.Pods, held) {
			p.Addresses = own
		}
	default:
		p.Labels = someLabels(r)
	}
}

func someLog(r *rand.Rand) cluster.LogMode {
	return pick(r, cluster.LogNone, cluster.LogDenied, cluster.LogAll)
}

// Diff returns what changed from one snapshot to another.
func Diff(from, to cluster.Snapshot) cluster.Delta {
	had, has := from.Delta(), to.Delta()
	return cluster.Delta{
		Nodes: diff(had.Nodes, has.Nodes), Namespaces: diff(had.Namespaces, has.Namespaces),
		Pods: diff(had.Pods, has.Pods), Policies: diff(had.Policies, has.Policies),
	}
}

func diff[K comparable, T any](had, has map[K]*T) map[K]*T {
	changed := map[K]*T{}
	for key, now := range has {
		if !reflect.DeepEqual(had[key], now) {
			changed[key] = now
		}
	}
	for key := range had {
		if has[key] == nil {
			changed[key] = nil
		}
	}
	return changed
}

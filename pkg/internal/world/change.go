package world

import (
	"math/rand/v2"
	"slices"

	"github.com/warren-cni/warren/pkg/cluster"
)

// Change returns a copy of a world in which one object came, went or is another, and says which, as "kind: name".
func Change(r *rand.Rand, s cluster.Snapshot) (cluster.Snapshot, string) {
	s.Namespaces, s.Pods, s.Policies = slices.Clone(s.Namespaces), slices.Clone(s.Pods), slices.Clone(s.Policies)
	for {
		switch r.IntN(8) {
		case 0:
			ns := &s.Namespaces[r.IntN(len(s.Namespaces))]
			ns.Labels = someLabels(r)
			return s, "namespace is relabelled: " + ns.Name
		case 1, 2:
			pod := &s.Pods[r.IntN(len(s.Pods))]
			pod.Labels, pod.Ports = someLabels(r), somePorts(r)
			return s, "pod is relabelled: " + pod.Name
		case 3:
			i := r.IntN(len(s.Pods))
			name := s.Pods[i].Name
			s.Pods = slices.Delete(s.Pods, i, i+1)
			return s, "pod goes: " + name
		case 4:
			pod := newPod(r, len(s.Pods), nil)
			s.Pods = append(s.Pods, pod)
			return s, "pod comes: " + pod.Name
		case 5:
			p := newPolicy(r, len(s.Policies))
			s.Policies = append(s.Policies, p)
			return s, "policy comes: " + p.Name
		case 6:
			if i := len(s.Policies); i > 0 {
				i = r.IntN(i)
				name := s.Policies[i].Name
				s.Policies = slices.Delete(s.Policies, i, i+1)
				return s, "policy goes: " + name
			}
		default:
			if i := len(s.Policies); i > 0 {
				i = r.IntN(i)
				p := newPolicy(r, i)
				p.Namespace = s.Policies[i].Namespace
				s.Policies[i] = p
				return s, "policy is edited: " + p.Name
			}
		}
	}
}

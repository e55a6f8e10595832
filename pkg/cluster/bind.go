package cluster

import (
	"net/netip"
	"slices"
)

// Bind returns a snapshot in which the pods of the own node have the addresses of their attachments and no others, and
// the addresses of the attachments whose pod is known.
//
// An attachment counts for a pod only when namespace, name and uid agree: a pod that was deleted and made again under
// the same name is another pod. The second result is what the start gate may let pass once the snapshot's policies are
// in the kernel: an address whose pod is unknown has no identity, and stays closed.
func (s Snapshot) Bind(attachments []Attachment) (Snapshot, []netip.Addr) {
	type key struct{ namespace, name string }
	byPod := make(map[key][]Attachment, len(attachments))
	for _, a := range attachments {
		k := key{a.Namespace, a.Name}
		byPod[k] = append(byPod[k], a)
	}

	var known []netip.Addr
	pods := make([]Pod, len(s.Pods))
	for i, pod := range s.Pods {
		if pod.Node == s.Self && !pod.HostNetwork {
			pod.Addresses = nil
			for _, a := range byPod[key{pod.Namespace, pod.Name}] {
				if a.UID == pod.UID || (pod.StaticUID != "" && a.UID == pod.StaticUID) {
					pod.Addresses = append(pod.Addresses, a.Addresses...)
				}
			}
			slices.SortFunc(pod.Addresses, netip.Addr.Compare)
			known = append(known, pod.Addresses...)
		}
		pods[i] = pod
	}
	s.Pods = pods
	slices.SortFunc(known, netip.Addr.Compare)
	return s, slices.Compact(known)
}

// Node returns the node with that name.
func (s Snapshot) Node(name string) (Node, bool) {
	for _, n := range s.Nodes {
		if n.Name == name {
			return n, true
		}
	}
	return Node{}, false
}

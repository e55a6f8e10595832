package cluster

import (
	"net/netip"
	"slices"
)

// Bind returns a snapshot in which every pod has the addresses that it can really have, and the addresses of the
// attachments whose pod is known and not finished.
//
// The pods of the own node have the addresses of their attachments and no others. Those of another node have what their
// status says, as far as it lies in that node's podCIDRs: a status is written by the pod's kubelet, and one that is stale
// or not honest must not give its pod's identity to who has the address. A finished pod has no addresses: its labels
// choose it for no policy any more, so what still runs of it must not pass.
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

	podCIDRs := make(map[string][]netip.Prefix, len(s.Nodes))
	for _, n := range s.Nodes {
		podCIDRs[n.Name] = n.PodCIDRs
	}

	var known []netip.Addr
	pods := make([]Pod, len(s.Pods))
	for i, pod := range s.Pods {
		switch {
		case pod.Finished:
			pod.Addresses = nil
		case pod.HostNetwork: // in no policy, and at its node's addresses
		case pod.Node != s.Self:
			pod.Addresses = inside(pod.Addresses, podCIDRs[pod.Node], podCIDRs[s.Self])
		default:
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

package preflight

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
)

// marks are the names by which another CNI is known: patterns of path.Match for links, prefixes for chains.
type marks struct {
	cni    string
	links  []string
	chains []string
}

// others are the CNIs that leave something behind when they are taken away.
func others() []marks {
	return []marks{
		{"Antrea", []string{"antrea-*"}, []string{"ANTREA-"}},
		{"Calico", []string{"cali*", "vxlan.calico", "vxlan-v6.calico", "wireguard.cali", "wg-v6.cali"}, []string{"cali-"}},
		{"Cilium", []string{"cilium_*"}, []string{"CILIUM_"}},
		{"flannel", []string{"flannel*"}, []string{"FLANNEL-"}},
		{"kube-router", []string{"kube-bridge", "kube-dummy-if"}, []string{"KUBE-ROUTER-", "KUBE-NWPLCY-", "KUBE-POD-FW-"}},
		{"OVN-Kubernetes", []string{"ovn-k8s-*", "genev_sys_*"}, []string{"OVN-KUBE-"}},
		{"Weave Net", []string{"weave", "vethwe-*"}, []string{"WEAVE"}},
		{"a bridge CNI", []string{"cni0"}, nil}, // flannel, kubenet and the bridge plugin call it so
	}
}

// leftoverOf names the CNI that a link is of; it is empty for others.
func leftoverOf(l Link) string {
	for _, m := range others() {
		if slices.ContainsFunc(m.links, func(pattern string) bool {
			ok, err := path.Match(pattern, l.Name)
			return ok && err == nil
		}) {
			return m.cni
		}
	}
	return ""
}

// otherCNIs looks for what the runtime would prefer to Warren, and for what another CNI left.
func otherCNIs(f Facts, w Wanted) ([]Finding, error) {
	var findings []Finding
	for _, a := range f.Ahead.Value {
		findings = append(findings, ofAhead(a, w))
	}
	for _, m := range others() {
		var links, chains []string
		for _, l := range f.Links.Value {
			if leftoverOf(l) == m.cni {
				links = append(links, l.Name)
			}
		}
		for _, name := range f.Filter.Value.Chains {
			if slices.ContainsFunc(m.chains, func(prefix string) bool { return strings.HasPrefix(name, prefix) }) {
				chains = append(chains, name)
			}
		}
		if len(links) > 0 {
			findings = append(findings, Finding{
				Severity: Warning, Code: "OtherCNILinks", Object: some("link", links),
				Message: fmt.Sprintf("made by %s: its routes lead packets past Warren, and pods that it wired are outside of all policies", m.cni),
				Remedy:  "remove it from the cluster, drain the node and reboot it (or ip link delete each, and restart the pods)",
			})
		}
		if len(chains) > 0 {
			findings = append(findings, Finding{
				Severity: Warning, Code: "OtherCNIRules", Object: some("chain", chains),
				Message: fmt.Sprintf("made by %s: its rules may drop what Warren's policies allow, or translate what must not be", m.cni),
				Remedy:  "remove it from the cluster, drain the node and reboot it",
			})
		}
	}
	return findings, errors.Join(f.Ahead.Err, f.Links.Err, f.Filter.Err)
}

// ofAhead is the finding of a configuration that the runtime reads first.
func ofAhead(a Ahead, w Wanted) Finding {
	found := Finding{Code: "NetworkAhead", Object: a.Path}
	switch {
	case a.Err != nil:
		found.Severity = Error
		found.Message = fmt.Sprintf("the runtime reads it before %s and may load neither: %v", path.Base(w.Conflist), a.Err)
		found.Remedy = "repair it or move it out of the directory"
	case a.Delegates:
		found.Severity = Note
		found.Message = fmt.Sprintf("the runtime uses it instead of %s; it calls Warren, so pods get Warren's network all the same", path.Base(w.Conflist))
		found.Remedy = "nothing, if it is meant to be there"
	default:
		found.Severity = Error
		found.Message = fmt.Sprintf("the runtime uses it instead of %s: pods get another network, without policies and encryption", path.Base(w.Conflist))
		found.Remedy = "remove the CNI that it is of, or move the file out of the directory, and restart the pods that it wired"
	}
	return found
}

// some names a few of many.
func some(what string, names []string) string {
	const most = 3
	names = slices.Compact(slices.Sorted(slices.Values(names)))
	if len(names) > 1 {
		what += "s"
	}
	if len(names) > most {
		return fmt.Sprintf("%s %s and %d more", what, strings.Join(names[:most], ", "), len(names)-most)
	}
	return what + " " + strings.Join(names, ", ")
}

// kubeProxy looks at the mode of kube-proxy.
func kubeProxy(f Facts, _ Wanted) ([]Finding, error) {
	if f.IPVS.Err != nil || !f.IPVS.Value {
		return nil, f.IPVS.Err
	}
	return []Finding{{
		Severity: Error, Code: "KubeProxyIPVS", Object: "link kube-ipvs0",
		Message: "kube-proxy runs in ipvs mode, which delivers what pods send to Services past all policies: no pod starts here",
		Remedy:  "set kube-proxy's mode to nftables or iptables, then run `kube-proxy --cleanup` on the node or reboot it",
	}}, nil
}

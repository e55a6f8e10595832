package policy

import (
	"fmt"

	"github.com/warren-cni/warren/pkg/cluster"
)

// problemsOf returns what of policies cannot be enforced in a direction. It allows nothing, and what selects pods by something that
// was not understood isolates all of its namespace.
func problemsOf(d direction, policies []*cluster.Policy) []cluster.Problem {
	var problems []cluster.Problem
	for _, p := range policies {
		report := func(field, message string) {
			problems = append(problems, cluster.Problem{
				Code: "PolicyUnenforceable", Object: "NetworkPolicy " + p.Key().String(), Field: field, Message: message,
				Remedy: "correct the field, or report it if the API server accepted it",
			})
		}
		if p.Pods == nil {
			report("spec.podSelector", "the selector was not understood, so the policy isolates every pod of the namespace")
		}
		for _, r := range d.rules(p) {
			field := fmt.Sprintf("spec.%s[%d]", d.name, r.Index)
			for _, peer := range r.Peers {
				if peer.Block == nil && peer.Pods == nil {
					report(field, noPeer)
				}
			}
			for _, port := range r.Ports {
				if fault := faultOf(port); fault != "" {
					report(field+".ports", fault)
				}
			}
		}
	}
	return problems
}

// faultOf says why a port cannot be enforced; it is empty for one that can.
func faultOf(port cluster.Port) string {
	known := port.Protocol == cluster.TCP || port.Protocol == cluster.UDP || port.Protocol == cluster.SCTP
	switch {
	case !known:
		return fmt.Sprintf("the protocol %q is unknown, so the port allows nothing", port.Protocol)
	case port.Name == "" && (port.First > port.Last || port.First == 0 && port.Last > 0):
		return fmt.Sprintf("%d to %d is no range of ports, so it allows nothing", port.First, port.Last)
	default:
		return ""
	}
}

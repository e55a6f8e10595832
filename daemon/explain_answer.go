package main

import (
	"fmt"
	"slices"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// status is the error whose exit status tells the answer.
func (a answer) status() error {
	switch a {
	case allowed:
		return nil
	case unknown:
		return errUnknown
	default:
		return errDenied
	}
}

// settle makes the answers, when everything else of the explanation is known.
func (e *explanation) settle() {
	var counted []answer
	for i := range e.Verdicts {
		v := &e.Verdicts[i]
		v.Answer = e.judge(*v)
		if !v.NotReady {
			counted = append(counted, v.Answer)
		}
	}
	e.Answer = sum(counted)
	if e.Service != nil {
		e.Service.Ports = portAnswers(e.Verdicts)
	}
}

// judge is a verdict in a word. It is unknown where the kernel of the daemon's node is not as planned, unless another node
// denies.
func (e *explanation) judge(v judged) answer {
	drifted, elsewhere := false, true
	for _, side := range []policy.Side{v.Egress, v.Ingress} {
		if side.Node == e.Node && e.Node != "" {
			drifted = drifted || slices.ContainsFunc(e.Drift, func(d firewall.Difference) bool {
				return d.Family == netfilter.FamilyOf(v.Flow.Dst)
			})
		} else {
			elsewhere = elsewhere && side.Allowed
		}
	}
	switch {
	case drifted && elsewhere:
		return unknown
	case v.Allowed:
		return allowed
	default:
		return denied
	}
}

// sum is the answer for several connections.
func sum(answers []answer) answer {
	switch {
	case len(answers) == 0 || slices.Contains(answers, unknown):
		return unknown
	case !slices.Contains(answers, denied):
		return allowed
	case !slices.Contains(answers, allowed):
		return denied
	default:
		return partly
	}
}

// portAnswers counts the endpoints behind each port of a Service. The addresses of one pod are one endpoint.
func portAnswers(verdicts []judged) []portAnswer {
	var ports []portAnswer
	endpoints := map[string]map[string][]answer{}
	for _, v := range verdicts {
		if endpoints[v.ServicePort] == nil {
			endpoints[v.ServicePort] = map[string][]answer{}
			ports = append(ports, portAnswer{Port: v.ServicePort})
		}
		if v.NotReady {
			continue
		}
		name := v.To.Pod
		if name == "" {
			name = v.Flow.Dst.String()
		}
		endpoints[v.ServicePort][name] = append(endpoints[v.ServicePort][name], v.Answer)
	}
	for i := range ports {
		for _, answers := range endpoints[ports[i].Port] {
			ports[i].Endpoints++
			switch sum(answers) {
			case allowed:
				ports[i].Allowed++
			case unknown:
				ports[i].Unknown++
			default:
			}
		}
	}
	return ports
}

// close takes back what rules allow that the kernel of the daemon's own node has refused: it drops in their place.
func (e *explanation) close(closed []firewall.ClosedChain) {
	for i := range e.Verdicts {
		v := &e.Verdicts[i]
		for _, side := range []*policy.Side{&v.Egress, &v.Ingress} {
			isSide := func(c firewall.ClosedChain) bool {
				return c.Name == side.Chain && c.Family == netfilter.FamilyOf(v.Flow.Dst)
			}
			if side.Node != e.Node || !side.Allowed || !slices.ContainsFunc(closed, isSide) {
				continue
			}
			side.Allowed, v.Allowed = false, false
			side.Because = "the kernel has chain " + side.Chain + " closed, because it refused these rules"
		}
	}
}

// unasked is a node that enforces a part of the verdicts and was not asked for what its kernel has.
type unasked struct {
	Node string `json:"node"`
	// Ask is the command that asks it.
	Ask string `json:"ask"`
}

// askOthers names the nodes that enforce a part of the verdicts, besides that of the daemon.
func (e *explanation) askOthers(s cluster.Snapshot) {
	for _, v := range e.Verdicts {
		for _, side := range []policy.Side{v.Egress, v.Ingress} {
			known := func(u unasked) bool { return u.Node == side.Node }
			if side.Isolated && side.Node != e.Node && !slices.ContainsFunc(e.Unasked, known) {
				e.Unasked = append(e.Unasked, unasked{Node: side.Node, Ask: askCommand(s, side.Node, e.Explain)})
			}
		}
	}
}

// askCommand is how to ask another node's daemon the same question: in its pod, where the cluster shows it.
func askCommand(s cluster.Snapshot, node string, q agentapi.Explain) string {
	command := fmt.Sprintf("warrend explain --from %s --to %s", q.From, q.To)
	if q.Port != "" {
		command += " --port " + q.Port
	}
	for i := range s.Pods {
		pod := &s.Pods[i]
		if pod.Node == node && pod.HostNetwork && pod.Labels["app.kubernetes.io/name"] == "warren" && pod.Labels["app.kubernetes.io/component"] == "daemon" {
			return fmt.Sprintf("kubectl --namespace %s exec %s -- %s", pod.Namespace, pod.Name, command)
		}
	}
	return command
}

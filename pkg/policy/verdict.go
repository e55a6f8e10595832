package policy

import (
	"net/netip"

	"github.com/warren-cni/warren/pkg/cluster"
)

// ICMP is the protocol of a Flow that has no ports, so that only rules without ports allow it.
const ICMP cluster.Protocol = "ICMP"

// Flow is a new connection as policies see it: after a Service's address was translated to that of a pod.
type Flow struct {
	Src      netip.Addr       `json:"source"`
	Dst      netip.Addr       `json:"destination"`
	Protocol cluster.Protocol `json:"protocol"`
	// Port is the destination port; zero for ICMP.
	Port uint16 `json:"port,omitempty"`
}

// Verdict is what the policies of the whole cluster decide about a flow.
type Verdict struct {
	Flow Flow `json:"flow"`
	// Allowed is true when both directions are.
	Allowed bool `json:"allowed"`
	From    End  `json:"from"`
	To      End  `json:"to"`
	// Egress are the policies of the source, Ingress those of the destination.
	Egress  Side `json:"egress"`
	Ingress Side `json:"ingress"`
	// Notes say what one has to know to read the verdict rightly.
	Notes []string `json:"notes,omitempty"`
}

// End is who has an address, as far as policies tell: a pod, a node (its host-network pods included), or somebody outside.
type End struct {
	// Pod is the namespace and name of the pod; empty where no pod has the address.
	Pod string `json:"pod,omitempty"`
	// Node is the pod's node, or the node whose own address it is; empty outside.
	Node string `json:"node,omitempty"`
}

// Side is the verdict in one direction.
type Side struct {
	Allowed bool `json:"allowed"`
	// Isolated is true when a policy selects the pod in this direction.
	Isolated bool `json:"isolated"`
	// Node enforces it; empty where there is nothing to enforce.
	Node string `json:"node,omitempty"`
	// Chain is the chain of the mangle table that holds the rules on Node; empty where the pod is not isolated.
	Chain string `json:"chain,omitempty"`
	// Because says it in one sentence.
	Because string `json:"because"`
	// Policies are all that isolate the pod, in the order of their names.
	Policies []Policy `json:"policies,omitempty"`
}

// Policy is one of the policies that isolate a pod, with all its rules of the direction.
type Policy struct {
	// Name is namespace and name.
	Name  string `json:"name"`
	Rules []Rule `json:"rules"`
}

// Rule is a rule held against the flow. It allows what one of its peers and one of its ports match.
type Rule struct {
	// Field is the rule's place in the policy's spec, for example "ingress[0]".
	Field  string `json:"field"`
	Allows bool   `json:"allows"`
	// Peers and Ports are in the order of the policy. A rule without peers (ports) has one that says so and matches.
	Peers []Match `json:"peers"`
	Ports []Match `json:"ports"`
}

// Match is a peer or a port of a rule held against the flow.
type Match struct {
	Matches bool `json:"matches"`
	// Text is what the policy says, for example "pods app=web in shop".
	Text string `json:"text"`
	// Why says why it does not match; empty where it does.
	Why string `json:"why,omitempty"`
}

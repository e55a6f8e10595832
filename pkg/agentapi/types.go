// Package agentapi is the protocol between the CNI plugin (and the operator's command) and the daemon: one request and
// one response, each a line of JSON, over a unix socket that only root may open.
package agentapi

import (
	"encoding/json"
	"net/netip"
	"time"
)

// Version is the protocol's version. Both sides refuse a version that they do not know.
const Version = 1

// Operations of a Request.
const (
	// OpAttach asks the daemon to put the pod's policies into the kernel and then to open the start gate for its addresses.
	OpAttach = "attach"
	// OpCheck asks whether the gate is open for the pod's addresses and its policies stand.
	OpCheck = "check"
	// OpReady asks whether the daemon can serve OpAttach; the plugin's STATUS is made of it.
	OpReady = "ready"
	// OpStatus asks for a Status.
	OpStatus = "status"
	// OpExplain asks what the policies decide about a connection, and why.
	OpExplain = "explain"
)

// Request is what a client sends.
type Request struct {
	Version int    `json:"version"`
	Op      string `json:"op"`
	// Pod is set for OpAttach and OpCheck.
	Pod *Pod `json:"pod,omitempty"`
	// Explain is set for OpExplain.
	Explain *Explain `json:"explain,omitempty"`
}

// Explain is a question about a connection, in the words of the operator.
type Explain struct {
	// From and To are each a pod's namespace/name, or an address; To may be a Service's svc/namespace/name too.
	From string `json:"from"`
	To   string `json:"to"`
	// Port is a number or the name of a port of the destination, either with /protocol or without. Empty it stands for ICMP, or
	// for all ports of a Service.
	Port string `json:"port,omitempty"`
}

// Pod identifies a pod's interface.
type Pod struct {
	ContainerID string       `json:"containerID"`
	Interface   string       `json:"interface"`
	Namespace   string       `json:"namespace"`
	Name        string       `json:"name"`
	UID         string       `json:"uid,omitempty"`
	Addresses   []netip.Addr `json:"addresses"`
}

// Response is what the daemon answers.
type Response struct {
	Version int     `json:"version"`
	Error   *Error  `json:"error,omitempty"`
	Status  *Status `json:"status,omitempty"`
	// Explanation is as `warrend explain -o json` prints it. Daemon and command are one program; the plugin, which links this
	// package too, stays free of what it is made of.
	Explanation json.RawMessage `json:"explanation,omitempty"`
}

// Error is a refusal. Code is a CNI error code (spec section "Error"), 11 for "try again later".
type Error struct {
	Code    uint   `json:"code"`
	Message string `json:"message"`
}

// Error returns the message.
func (e *Error) Error() string { return e.Message }

// Status is what `warrend status` shows.
type Status struct {
	Node       string     `json:"node"`
	Version    string     `json:"version"`
	PodCIDRs   []string   `json:"podCIDRs"`
	Ready      bool       `json:"ready"`
	Encryption Encryption `json:"encryption"`
	Peers      []Peer     `json:"peers"`
	Policies   Policies   `json:"policies"`
	// Problems are sorted; empty on a healthy node.
	Problems []Problem `json:"problems"`
}

// Encryption says what is encrypted and what is not.
type Encryption struct {
	// Mode is "kernel", "userspace", "off", or "unknown" while the tunnel does not answer.
	Mode      string `json:"mode"`
	PublicKey string `json:"publicKey,omitempty"`
	Port      uint16 `json:"port,omitempty"`
	MTU       int    `json:"mtu"`
	// Guard says what the guards against plaintext cover: "cluster-cidr", "known nodes only", or "none" where Mode is "off".
	Guard string `json:"guard"`
	// NotCovered are the kinds of traffic that leave in clear in this mode.
	NotCovered []string `json:"notCovered"`
}

// Peer is a peer of the mesh as the device has it.
type Peer struct {
	Node          string    `json:"node"`
	PublicKey     string    `json:"publicKey"`
	Endpoint      string    `json:"endpoint"`
	AllowedIPs    []string  `json:"allowedIPs"`
	LastHandshake time.Time `json:"lastHandshake,omitzero"`
	ReceivedBytes int64     `json:"receivedBytes"`
	SentBytes     int64     `json:"sentBytes"`
}

// Policies counts what is programmed on the node.
type Policies struct {
	Policies  int       `json:"policies"`
	Pods      int       `json:"pods"`
	Isolated  int       `json:"isolatedPods"`
	Sets      int       `json:"sets"`
	Rules     int       `json:"rules"`
	LastApply time.Time `json:"lastApply,omitzero"`
}

// Problem is a cluster.Problem on the wire.
type Problem struct {
	Code    string `json:"code"`
	Object  string `json:"object"`
	Field   string `json:"field,omitempty"`
	Message string `json:"message"`
	Remedy  string `json:"remedy"`
	Owner   string `json:"owner,omitempty"`
}

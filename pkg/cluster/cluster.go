// Package cluster is Warren's picture of a Kubernetes cluster: plain values with parsed addresses and selectors, free of
// Kubernetes API types.
//
// pkg/kube makes a Snapshot; pkg/policy and pkg/mesh plan from it. A Snapshot is never changed once it is made, every
// slice in it is sorted (nodes and namespaces by name, pods and policies by namespace and name), and what could not be
// parsed is not in it: it is a Problem instead, and what depends on it is closed rather than open.
package cluster

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"k8s.io/apimachinery/pkg/labels"
)

// Snapshot is the state of the cluster at one moment, as one node sees it.
type Snapshot struct {
	// Self is the name of the node that plans.
	Self       string
	Nodes      []Node
	Namespaces []Namespace
	Pods       []Pod
	Policies   []Policy
}

// Node is a Kubernetes Node, as far as the mesh needs it.
type Node struct {
	Name    string
	UID     string
	Created time.Time
	// PodCIDRs is spec.podCIDRs: at most one prefix per family, masked.
	PodCIDRs []netip.Prefix
	// Addresses are the InternalIPs, in the order of the Node's status.
	Addresses []netip.Addr
	// WireGuard is nil until the node has published a valid key.
	WireGuard *WireGuard
}

// WireGuard is what a node publishes of its tunnel in its annotations, with what its operator says there of the way to it.
type WireGuard struct {
	NodeKey
	// Next is the key that the node is about to use; nil where it changes none.
	Next *NodeKey
	Port uint16
	// MTU is that of the node's uplink; 0 where it has published none.
	MTU int
	// Endpoint is where other nodes reach this one, in place of its InternalIP and Port: either part may be missing.
	Endpoint netip.AddrPort
	// BehindNAT is true for a node that others cannot send to first: its endpoint is learnt from its handshakes.
	BehindNAT bool
}

// NodeKey is a public key with the proof that the holder of its private key made it for one Node (see pkg/keyproof).
type NodeKey struct {
	PublicKey [32]byte
	// Proof is zero where the node has published none.
	Proof [64]byte
}

// Namespace is a Kubernetes Namespace.
type Namespace struct {
	Name   string
	Labels labels.Set
	// Log is what is logged of the connections of its pods that a policy isolates.
	Log LogMode
}

// LogMode says which connections are logged. Each mode logs what those before it do.
type LogMode uint8

// The modes.
const (
	LogNone LogMode = iota
	LogDenied
	LogAll
)

// ParseLogMode reads "none", "denied" or "all".
func ParseLogMode(text string) (LogMode, error) {
	switch text {
	case "none":
		return LogNone, nil
	case "denied":
		return LogDenied, nil
	case "all":
		return LogAll, nil
	default:
		return LogNone, fmt.Errorf("%q: say none, denied or all", text)
	}
}

// Pod is a Kubernetes Pod.
type Pod struct {
	Namespace string
	Name      string
	// UID is metadata.uid; StaticUID is the other uid that the kubelet gives a static pod towards the runtime
	// (annotation kubernetes.io/config.hash of its mirror pod), empty for every other pod.
	UID       string
	StaticUID string
	Node      string
	Labels    labels.Set
	// Addresses are the pod's addresses: status.podIPs for pods of other nodes, the addresses of its leases for pods of
	// the own node (see State).
	Addresses   []netip.Addr
	HostNetwork bool
	// Finished is true for the phases Succeeded and Failed: such a pod has no identity any more, its address may belong to
	// another.
	Finished bool
	// Ports are the named container ports.
	Ports []NamedPort
}

// Key returns the pod's name.
func (p *Pod) Key() Key { return Key{p.Namespace, p.Name} }

// NamedPort is a named container port of a pod.
type NamedPort struct {
	Name     string
	Protocol Protocol
	Port     uint16
}

// Protocol is a transport protocol that a NetworkPolicy can name.
type Protocol string

// The protocols of a NetworkPolicyPort.
const (
	TCP  Protocol = "TCP"
	UDP  Protocol = "UDP"
	SCTP Protocol = "SCTP"
)

// Policy is a networking.k8s.io/v1 NetworkPolicy with its defaults applied.
//
// A selected pod is isolated in a direction when Ingress (Egress) is true, and then only what a rule allows may pass. A
// rule that could not be understood is absent, so that it allows nothing.
type Policy struct {
	Namespace string
	Name      string
	UID       string
	// Pods selects the pods of the policy's own namespace that the policy applies to.
	Pods         labels.Selector
	Ingress      bool
	Egress       bool
	IngressRules []Rule
	EgressRules  []Rule
	// Log is what is logged of the connections of the pods that the policy isolates.
	Log LogMode
}

// Key returns the policy's name.
func (p *Policy) Key() Key { return Key{p.Namespace, p.Name} }

// Rule allows traffic that matches one of the peers and one of the ports.
type Rule struct {
	// Index is the rule's position in the object, for messages.
	Index int
	// AnyPeer is true where `from` or `to` is empty or missing. It is explicit, so that a rule whose peers were all refused
	// can never be read as one that allows every peer.
	AnyPeer bool
	Peers   []Peer
	// AnyPort is true where `ports` is empty or missing.
	AnyPort bool
	Ports   []Port
}

// Peer is one entry of `from` or `to`: either a Block, or pods chosen by selectors.
type Peer struct {
	Block *Block
	// Namespaces is nil for the policy's own namespace.
	Namespaces labels.Selector
	// Pods is never nil where Block is nil; a missing podSelector is labels.Everything().
	Pods labels.Selector
}

// Block is an ipBlock. Prefixes are masked.
type Block struct {
	CIDR   netip.Prefix
	Except []netip.Prefix
}

// Port is one entry of `ports`.
type Port struct {
	Protocol Protocol
	// Name is a named port, resolved per destination pod; First and Last are then zero.
	Name string
	// First and Last are the allowed range, inclusive; both zero where the entry has no port: the whole protocol.
	First, Last uint16
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

// Attachment is a pod's interface on the own node with its leased addresses. It is the truth about the addresses of
// local pods: the daemon reads it from the leases, not from the pod's status, which comes later and from elsewhere.
type Attachment struct {
	ContainerID string
	Interface   string
	Namespace   string
	Name        string
	UID         string
	Addresses   []netip.Addr
}

// Holder is the attachment that holds an address.
type Holder struct{ ContainerID, Interface string }

// Holder returns what identifies the attachment.
func (a Attachment) Holder() Holder { return Holder{a.ContainerID, a.Interface} }

// Compare orders attachments by what identifies them.
func (a Attachment) Compare(b Attachment) int {
	return cmp.Or(cmp.Compare(a.ContainerID, b.ContainerID), cmp.Compare(a.Interface, b.Interface))
}

// Equal is true for attachments that do not differ.
func (a Attachment) Equal(b Attachment) bool {
	return a.Holder() == b.Holder() && a.Namespace == b.Namespace && a.Name == b.Name && a.UID == b.UID && slices.Equal(a.Addresses, b.Addresses)
}

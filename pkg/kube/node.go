package kube

import (
	"encoding/base64"
	"errors"
	"net/netip"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/warren-cni/warren/pkg/cluster"
)

// annotationPrefix is that of all annotations of Warren's.
const annotationPrefix = "warren.cni/"

// Annotations of a Node with which it publishes its tunnel.
const (
	// AnnotationPublicKey holds the public key, 32 bytes in base64.
	AnnotationPublicKey = annotationPrefix + "wireguard-public-key"
	// AnnotationPort holds the UDP port, in decimal.
	AnnotationPort = annotationPrefix + "wireguard-port"
	// AnnotationKeyProof holds the proof that the holder of the private key made it for this Node, 64 bytes in base64.
	AnnotationKeyProof = annotationPrefix + "wireguard-key-proof"
	// AnnotationNextPublicKey and AnnotationNextKeyProof are there while the node changes its key.
	AnnotationNextPublicKey = annotationPrefix + "wireguard-next-public-key"
	AnnotationNextKeyProof  = annotationPrefix + "wireguard-next-key-proof"
	// AnnotationMTU holds the MTU of the node's uplink, in decimal.
	AnnotationMTU = annotationPrefix + "mtu"
)

// Annotations of a Node by which its operator says how others reach it.
const (
	// AnnotationEndpoint holds ADDRESS, ADDRESS:PORT or :PORT.
	AnnotationEndpoint = annotationPrefix + "endpoint"
	// AnnotationBehindNAT is "true" for a node that others cannot send to first.
	AnnotationBehindNAT = annotationPrefix + "behind-nat"
)

func convertNode(n *corev1.Node) (cluster.Node, []cluster.Problem) {
	found := &findings{code: codeNode, object: "Node " + n.Name, remedy: "correct the Node object"}
	node := cluster.Node{
		Name: n.Name, UID: string(n.UID), Created: n.CreationTimestamp.Time,
		PodCIDRs: podCIDRs(n.Spec, found), Addresses: internalIPs(n.Status, found),
	}
	found.remedy = "restart warren on that node, so that it publishes its key and port again"
	node.WireGuard = wireGuard(n.Annotations, found)
	return node, found.list
}

// podCIDRs keeps the first valid prefix of each family: a second one has no meaning in Kubernetes.
func podCIDRs(spec corev1.NodeSpec, found *findings) []netip.Prefix {
	path := field.NewPath("spec", "podCIDRs")
	texts := spec.PodCIDRs
	if len(texts) == 0 && spec.PodCIDR != "" {
		texts = []string{spec.PodCIDR}
	}
	var prefixes []netip.Prefix
	var seen4, seen6 bool
	for i, text := range texts {
		prefix, err := parsePrefix(text)
		if err != nil {
			found.add(path.Index(i), "%q is not a prefix (%v): it is ignored", text, err)
			continue
		}
		seen := &seen6
		if prefix.Addr().Is4() {
			seen = &seen4
		}
		if *seen {
			found.add(path.Index(i), "%s is a second prefix of its family: it is ignored", prefix)
			continue
		}
		*seen = true
		prefixes = append(prefixes, prefix)
	}
	return prefixes
}

func internalIPs(status corev1.NodeStatus, found *findings) []netip.Addr {
	path := field.NewPath("status", "addresses")
	var addrs []netip.Addr
	for i, a := range status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		addr, err := parseAddr(a.Address)
		if err != nil {
			found.add(path.Index(i).Child("address"), "%q is not an address (%v): it is ignored", a.Address, err)
			continue
		}
		addrs = append(addrs, addr)
	}
	return addrs
}

// wireGuard returns nil for a node that has published nothing, and for one whose key or port is not valid: without both
// there is no peer, and traffic to that node is dropped rather than sent in clear.
func wireGuard(annotations map[string]string, found *findings) *cluster.WireGuard {
	path := field.NewPath("metadata", "annotations")
	keyText, hasKey := annotations[AnnotationPublicKey]
	portText, hasPort := annotations[AnnotationPort]
	if !hasKey && !hasPort {
		return nil
	}
	key, err := parseKey(keyText)
	if err != nil {
		found.add(path.Key(AnnotationPublicKey), "%v: there is no tunnel to this node", err)
		return nil
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil || port == 0 {
		found.add(path.Key(AnnotationPort), "%q is not a port: there is no tunnel to this node", portText)
		return nil
	}
	return &cluster.WireGuard{NodeKey: cluster.NodeKey{PublicKey: key}, Port: uint16(port)}
}

// parseKey refuses the key of zeros: WireGuard reads it as "no key".
func parseKey(text string) ([32]byte, error) {
	raw, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(raw) != 32 {
		return [32]byte{}, errors.New("the value is not a WireGuard key (32 bytes in base64)")
	}
	key := [32]byte(raw)
	if key == ([32]byte{}) {
		return [32]byte{}, errors.New("the key is all zeros")
	}
	return key, nil
}

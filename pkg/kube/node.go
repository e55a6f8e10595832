package kube

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

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

// maxInternalIPs is more than a node has. Its kubelet may write tens of thousands, each of which every other node would have to hold against
// all claims, and to report.
const maxInternalIPs = 64

func internalIPs(status corev1.NodeStatus, found *findings) []netip.Addr {
	path := field.NewPath("status", "addresses")
	var addrs []netip.Addr
	said := 0
	for i, a := range status.Addresses {
		if a.Type != corev1.NodeInternalIP {
			continue
		}
		if said++; said > maxInternalIPs {
			found.add(path.Index(i), "the Node has more than %d InternalIPs: this one and those behind it are ignored", maxInternalIPs)
			break
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
// there is no peer, and traffic to that node is dropped rather than sent in clear. What else is wrong costs what depends on it.
func wireGuard(annotations map[string]string, found *findings) *cluster.WireGuard {
	_, hasKey := annotations[AnnotationPublicKey]
	portText, hasPort := annotations[AnnotationPort]
	if !hasKey && !hasPort {
		return nil
	}
	key, err := parseKey(annotations[AnnotationPublicKey])
	if err != nil {
		found.add(annotation(AnnotationPublicKey), "%v: there is no tunnel to this node", err)
		return nil
	}
	port, ok := parsePort(portText)
	if !ok {
		found.add(annotation(AnnotationPort), "%q is not a port: there is no tunnel to this node", portText)
		return nil
	}
	w := &cluster.WireGuard{
		NodeKey: cluster.NodeKey{PublicKey: key, Proof: proof(annotations, AnnotationKeyProof, found)},
		Next:    nextKey(annotations, found), Port: port, MTU: uplinkMTU(annotations, found),
	}
	found.remedy = "correct the annotation"
	setEndpoint(w, annotations, found)
	return w
}

// proof returns the zero proof, which proves nothing, where there is none or none that can be read.
func proof(annotations map[string]string, name string, found *findings) [64]byte {
	text, ok := annotations[name]
	if !ok {
		return [64]byte{}
	}
	raw, err := decodeBase64(text, 64)
	if err != nil {
		found.add(annotation(name), "the value is no proof of a key (%v): the key does not count", err)
		return [64]byte{}
	}
	return [64]byte(raw)
}

// nextKey returns nil for a node that changes no key.
func nextKey(annotations map[string]string, found *findings) *cluster.NodeKey {
	text, ok := annotations[AnnotationNextPublicKey]
	if !ok {
		return nil
	}
	key, err := parseKey(text)
	if err != nil {
		found.add(annotation(AnnotationNextPublicKey), "%v: the node's tunnel breaks for a moment when the node changes its key", err)
		return nil
	}
	return &cluster.NodeKey{PublicKey: key, Proof: proof(annotations, AnnotationNextKeyProof, found)}
}

// uplinkMTU returns 0 where the node has published none.
func uplinkMTU(annotations map[string]string, found *findings) int {
	text, ok := annotations[AnnotationMTU]
	if !ok {
		return 0
	}
	mtu, err := strconv.Atoi(text)
	if err != nil || mtu <= 0 || strconv.Itoa(mtu) != text {
		found.add(annotation(AnnotationMTU), "%q is not an MTU: it is ignored", text)
		return 0
	}
	return mtu
}

// setEndpoint reads what the operator says of the way to the node. An endpoint that cannot be read is not replaced by the
// InternalIP, from which the operator wanted to turn the others away: these wait until the node comes to them.
func setEndpoint(w *cluster.WireGuard, annotations map[string]string, found *findings) {
	switch text := annotations[AnnotationBehindNAT]; text {
	case "true":
		w.BehindNAT = true
	case "", "false":
	default:
		found.add(annotation(AnnotationBehindNAT), "%q is neither true nor false: it is ignored", text)
	}
	text, ok := annotations[AnnotationEndpoint]
	if !ok {
		return
	}
	endpoint, ok := parseEndpoint(text)
	if !ok {
		found.add(annotation(AnnotationEndpoint), "%q is not ADDRESS, ADDRESS:PORT or :PORT: the tunnel waits until this node sends first", text)
		w.BehindNAT = true
		return
	}
	w.Endpoint = endpoint
}

// parseEndpoint reads ADDRESS, ADDRESS:PORT or :PORT; IPv6 with a port stands in brackets.
func parseEndpoint(text string) (netip.AddrPort, bool) {
	if address, err := parseAddr(text); err == nil {
		return netip.AddrPortFrom(address, 0), true
	}
	if portText, ok := strings.CutPrefix(text, ":"); ok {
		port, ok := parsePort(portText)
		return netip.AddrPortFrom(netip.Addr{}, port), ok
	}
	both, err := netip.ParseAddrPort(text)
	if err != nil || both.Addr().Zone() != "" || both.Port() == 0 {
		return netip.AddrPort{}, false
	}
	return netip.AddrPortFrom(both.Addr().Unmap(), both.Port()), true
}

// annotation is the path of an annotation, for messages.
func annotation(name string) *field.Path { return field.NewPath("metadata", "annotations").Key(name) }

// What a node publishes has one spelling here, so that no change of its text goes unseen: the node then puts it right.

func parsePort(text string) (uint16, bool) {
	port, err := strconv.ParseUint(text, 10, 16)
	return uint16(port), err == nil && port != 0 && strconv.FormatUint(port, 10) == text
}

// parseKey reads a public key. It refuses the key of zeros: WireGuard reads it as "no key".
func parseKey(text string) ([32]byte, error) {
	raw, err := decodeBase64(text, 32)
	if err != nil {
		return [32]byte{}, fmt.Errorf("the value is not a WireGuard key (%w)", err)
	}
	key := [32]byte(raw)
	if key == ([32]byte{}) {
		return [32]byte{}, errors.New("the key is all zeros")
	}
	return key, nil
}

func decodeBase64(text string, size int) ([]byte, error) {
	raw, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil || len(raw) != size || base64.StdEncoding.EncodeToString(raw) != text { // line breaks are decoded too
		return nil, fmt.Errorf("%d bytes in base64", size)
	}
	return raw, nil
}

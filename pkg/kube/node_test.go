package kube

import (
	"encoding/base64"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/cluster"
)

func TestConvertNodePodCIDRs(t *testing.T) {
	for name, test := range map[string]struct {
		spec   corev1.NodeSpec
		want   []netip.Prefix
		fields []string
	}{
		"none":                      {},
		"both families":             {spec: corev1.NodeSpec{PodCIDRs: []string{"10.1.0.0/24", "fd00:1::/64"}}, want: []netip.Prefix{prefix("10.1.0.0/24"), prefix("fd00:1::/64")}},
		"only the old field":        {spec: corev1.NodeSpec{PodCIDR: "10.1.0.0/24"}, want: []netip.Prefix{prefix("10.1.0.0/24")}},
		"host bits":                 {spec: corev1.NodeSpec{PodCIDRs: []string{"10.1.0.7/24"}}, want: []netip.Prefix{prefix("10.1.0.0/24")}},
		"garbage beside a good one": {spec: corev1.NodeSpec{PodCIDRs: []string{"10.1.0/24", "fd00:1::/64"}}, want: []netip.Prefix{prefix("fd00:1::/64")}, fields: []string{"spec.podCIDRs[0]"}},
		"two of a family":           {spec: corev1.NodeSpec{PodCIDRs: []string{"10.1.0.0/24", "10.2.0.0/24"}}, want: []netip.Prefix{prefix("10.1.0.0/24")}, fields: []string{"spec.podCIDRs[1]"}},
		"IPv4 in IPv6":              {spec: corev1.NodeSpec{PodCIDRs: []string{"::ffff:10.1.0.0/120"}}, fields: []string{"spec.podCIDRs[0]"}},
	} {
		t.Run(name, func(t *testing.T) {
			node, problems := convertNode(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Spec: test.spec})
			checkEqual(t, "podCIDRs", test.want, node.PodCIDRs)
			checkEqual(t, "fields of the problems", test.fields, fieldsOf(problems))
		})
	}
}

func TestConvertNodeAddresses(t *testing.T) {
	node, problems := convertNode(&corev1.Node{Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{
		{Type: corev1.NodeHostName, Address: "n1"},
		{Type: corev1.NodeExternalIP, Address: "192.0.2.1"},
		{Type: corev1.NodeInternalIP, Address: "::ffff:172.18.0.2"},
		{Type: corev1.NodeInternalIP, Address: "fe80::1%eth0"},
		{Type: corev1.NodeInternalIP, Address: "172.18.0"},
		{Type: corev1.NodeInternalIP, Address: "fc00::2"},
	}}})
	checkEqual(t, "addresses", []netip.Addr{addr("172.18.0.2"), addr("fc00::2")}, node.Addresses)
	checkEqual(t, "fields of the problems", []string{"status.addresses[3].address", "status.addresses[4].address"}, fieldsOf(problems))
}

func TestConvertNodeWireGuard(t *testing.T) {
	key := [32]byte{1, 2, 3}
	keyText := base64.StdEncoding.EncodeToString(key[:])
	zeros := base64.StdEncoding.EncodeToString(make([]byte, 32))
	badKey, badPort := "metadata.annotations["+AnnotationPublicKey+"]", "metadata.annotations["+AnnotationPort+"]"
	for name, test := range map[string]struct {
		annotations map[string]string
		want        *cluster.WireGuard
		fields      []string
	}{
		"not published":   {annotations: map[string]string{"other": "x"}},
		"valid":           {annotations: map[string]string{AnnotationPublicKey: keyText, AnnotationPort: "51820"}, want: &cluster.WireGuard{NodeKey: cluster.NodeKey{PublicKey: key}, Port: 51820}},
		"no base64":       {annotations: map[string]string{AnnotationPublicKey: "garbage!", AnnotationPort: "51820"}, fields: []string{badKey}},
		"31 bytes":        {annotations: map[string]string{AnnotationPublicKey: base64.StdEncoding.EncodeToString(key[1:]), AnnotationPort: "51820"}, fields: []string{badKey}},
		"a line break":    {annotations: map[string]string{AnnotationPublicKey: keyText[:20] + "\n" + keyText[20:], AnnotationPort: "1"}, want: &cluster.WireGuard{NodeKey: cluster.NodeKey{PublicKey: key}, Port: 1}},
		"all zeros":       {annotations: map[string]string{AnnotationPublicKey: zeros, AnnotationPort: "51820"}, fields: []string{badKey}},
		"no key":          {annotations: map[string]string{AnnotationPort: "51820"}, fields: []string{badKey}},
		"no port":         {annotations: map[string]string{AnnotationPublicKey: keyText}, fields: []string{badPort}},
		"port 0":          {annotations: map[string]string{AnnotationPublicKey: keyText, AnnotationPort: "0"}, fields: []string{badPort}},
		"port 65536":      {annotations: map[string]string{AnnotationPublicKey: keyText, AnnotationPort: "65536"}, fields: []string{badPort}},
		"huge port":       {annotations: map[string]string{AnnotationPublicKey: keyText, AnnotationPort: strings.Repeat("9", 200_000)}, fields: []string{badPort}},
		"port with space": {annotations: map[string]string{AnnotationPublicKey: keyText, AnnotationPort: " 1"}, fields: []string{badPort}},
	} {
		t.Run(name, func(t *testing.T) {
			node, problems := convertNode(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Annotations: test.annotations}})
			checkEqual(t, "WireGuard", test.want, node.WireGuard)
			checkEqual(t, "fields of the problems", test.fields, fieldsOf(problems))
			for _, p := range problems {
				if len(p.Message) > 500 {
					t.Errorf("the message has %d bytes", len(p.Message))
				}
				if p.Object != "Node n1" || p.Code != "NodeInvalid" || !strings.Contains(p.Message, "no tunnel") {
					t.Errorf("problem %v: want one that names Node n1 and says that there is no tunnel", p)
				}
			}
		})
	}
}

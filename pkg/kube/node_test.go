package kube

import (
	"encoding/base64"
	"maps"
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

// A hostile kubelet gives the other nodes only so much to judge and to report, in good addresses and in bad ones.
func TestConvertNodeWithTooManyAddresses(t *testing.T) {
	for text, want := range map[string]int{"172.18.0.2": maxInternalIPs, "garbage": 0} {
		var status corev1.NodeStatus
		for range 10 * maxInternalIPs {
			status.Addresses = append(status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: text})
		}
		node, problems := convertNode(&corev1.Node{Status: status})
		if last := fieldsOf(problems); len(node.Addresses) != want || len(last) != 1+maxInternalIPs-want || last[len(last)-1] != "status.addresses[64]" {
			t.Errorf("%q: %d addresses, problems with %q", text, len(node.Addresses), last)
		}
	}
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
		"a line break":    {annotations: map[string]string{AnnotationPublicKey: keyText[:20] + "\n" + keyText[20:], AnnotationPort: "1"}, fields: []string{badKey}},
		"all zeros":       {annotations: map[string]string{AnnotationPublicKey: zeros, AnnotationPort: "51820"}, fields: []string{badKey}},
		"no key":          {annotations: map[string]string{AnnotationPort: "51820"}, fields: []string{badKey}},
		"no port":         {annotations: map[string]string{AnnotationPublicKey: keyText}, fields: []string{badPort}},
		"port 0":          {annotations: map[string]string{AnnotationPublicKey: keyText, AnnotationPort: "0"}, fields: []string{badPort}},
		"port 65536":      {annotations: map[string]string{AnnotationPublicKey: keyText, AnnotationPort: "65536"}, fields: []string{badPort}},
		"huge port":       {annotations: map[string]string{AnnotationPublicKey: keyText, AnnotationPort: strings.Repeat("9", 200_000)}, fields: []string{badPort}},
		"port with zeros": {annotations: map[string]string{AnnotationPublicKey: keyText, AnnotationPort: "051820"}, fields: []string{badPort}},
		"operator only":   {annotations: map[string]string{AnnotationEndpoint: "garbage", AnnotationBehindNAT: "true"}},
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

// TestConvertNodeTunnel shows what each annotation beside key and port gives, and that a bad one costs what depends on it and no more.
func TestConvertNodeTunnel(t *testing.T) {
	key := [32]byte{1, 2, 3}
	next, proofOf, nextProof := [32]byte{4}, [64]byte{5}, [64]byte{6}
	text := func(b []byte) string { return base64.StdEncoding.EncodeToString(b) }
	for name, test := range map[string]struct {
		annotations map[string]string
		want        func(*cluster.WireGuard)
		field       string
	}{
		"proof": {
			annotations: map[string]string{AnnotationKeyProof: text(proofOf[:])},
			want:        func(w *cluster.WireGuard) { w.Proof = proofOf },
		},
		"short proof": {annotations: map[string]string{AnnotationKeyProof: text(proofOf[:63])}, field: AnnotationKeyProof},
		"no base64":   {annotations: map[string]string{AnnotationKeyProof: "garbage"}, field: AnnotationKeyProof},
		"next key": {
			annotations: map[string]string{AnnotationNextPublicKey: text(next[:]), AnnotationNextKeyProof: text(nextProof[:])},
			want:        func(w *cluster.WireGuard) { w.Next = &cluster.NodeKey{PublicKey: next, Proof: nextProof} },
		},
		"next key without proof": {
			annotations: map[string]string{AnnotationNextPublicKey: text(next[:])},
			want:        func(w *cluster.WireGuard) { w.Next = &cluster.NodeKey{PublicKey: next} },
		},
		"bad next proof": {
			annotations: map[string]string{AnnotationNextPublicKey: text(next[:]), AnnotationNextKeyProof: "x"},
			want:        func(w *cluster.WireGuard) { w.Next = &cluster.NodeKey{PublicKey: next} },
			field:       AnnotationNextKeyProof,
		},
		"bad next key": {
			annotations: map[string]string{AnnotationNextPublicKey: text(next[:9]), AnnotationNextKeyProof: text(nextProof[:])},
			field:       AnnotationNextPublicKey,
		},
		"MTU":           {annotations: map[string]string{AnnotationMTU: "9001"}, want: func(w *cluster.WireGuard) { w.MTU = 9001 }},
		"MTU of 0":      {annotations: map[string]string{AnnotationMTU: "0"}, field: AnnotationMTU},
		"negative MTU":  {annotations: map[string]string{AnnotationMTU: "-1"}, field: AnnotationMTU},
		"endless MTU":   {annotations: map[string]string{AnnotationMTU: strings.Repeat("9", 200_000)}, field: AnnotationMTU},
		"MTU with plus": {annotations: map[string]string{AnnotationMTU: "+1500"}, field: AnnotationMTU},
		"address": {
			annotations: map[string]string{AnnotationEndpoint: "203.0.113.7"},
			want:        func(w *cluster.WireGuard) { w.Endpoint = netip.AddrPortFrom(addr("203.0.113.7"), 0) },
		},
		"address and port": {
			annotations: map[string]string{AnnotationEndpoint: "203.0.113.7:4500"},
			want:        func(w *cluster.WireGuard) { w.Endpoint = netip.MustParseAddrPort("203.0.113.7:4500") },
		},
		"port alone": {
			annotations: map[string]string{AnnotationEndpoint: ":4500"},
			want:        func(w *cluster.WireGuard) { w.Endpoint = netip.AddrPortFrom(netip.Addr{}, 4500) },
		},
		"IPv6": {
			annotations: map[string]string{AnnotationEndpoint: "2001:db8::7"},
			want:        func(w *cluster.WireGuard) { w.Endpoint = netip.AddrPortFrom(addr("2001:db8::7"), 0) },
		},
		"IPv6 and port": {
			annotations: map[string]string{AnnotationEndpoint: "[2001:db8::7]:4500"},
			want:        func(w *cluster.WireGuard) { w.Endpoint = netip.MustParseAddrPort("[2001:db8::7]:4500") },
		},
		"IPv4 in IPv6": {
			annotations: map[string]string{AnnotationEndpoint: "[::ffff:203.0.113.7]:4500"},
			want:        func(w *cluster.WireGuard) { w.Endpoint = netip.MustParseAddrPort("203.0.113.7:4500") },
		},
		"endpoint by name":    {annotations: map[string]string{AnnotationEndpoint: "vpn.example.org:4500"}, want: wait, field: AnnotationEndpoint},
		"empty endpoint":      {annotations: map[string]string{AnnotationEndpoint: ""}, want: wait, field: AnnotationEndpoint},
		"endpoint on port 0":  {annotations: map[string]string{AnnotationEndpoint: "203.0.113.7:0"}, want: wait, field: AnnotationEndpoint},
		"port 0":              {annotations: map[string]string{AnnotationEndpoint: ":0"}, want: wait, field: AnnotationEndpoint},
		"endpoint with zone":  {annotations: map[string]string{AnnotationEndpoint: "[fe80::1%eth0]:4500"}, want: wait, field: AnnotationEndpoint},
		"endless endpoint":    {annotations: map[string]string{AnnotationEndpoint: strings.Repeat("x", 200_000)}, want: wait, field: AnnotationEndpoint},
		"behind NAT":          {annotations: map[string]string{AnnotationBehindNAT: "true"}, want: wait},
		"not behind NAT":      {annotations: map[string]string{AnnotationBehindNAT: "false"}},
		"behind NAT or so":    {annotations: map[string]string{AnnotationBehindNAT: "yes"}, field: AnnotationBehindNAT},
		"others' annotations": {annotations: map[string]string{"example.org/endpoint": "203.0.113.7", annotationPrefix + "unknown": "x"}},
	} {
		t.Run(name, func(t *testing.T) {
			test.annotations[AnnotationPublicKey], test.annotations[AnnotationPort] = text(key[:]), "51820"
			node, problems := convertNode(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Annotations: test.annotations}})
			want := &cluster.WireGuard{NodeKey: cluster.NodeKey{PublicKey: key}, Port: 51820}
			if test.want != nil {
				test.want(want)
			}
			checkEqual(t, "WireGuard", want, node.WireGuard)
			var fields []string
			if test.field != "" {
				fields = []string{"metadata.annotations[" + test.field + "]"}
			}
			checkEqual(t, "fields of the problems", fields, fieldsOf(problems))
			for _, p := range problems {
				if len(p.Message) > 500 || p.Object != "Node n1" || p.Code != codeNode || p.Remedy == "" {
					t.Errorf("problem %v: want a short one that names Node n1 and says what to do", p)
				}
			}
		})
	}
}

// wait is what follows from an endpoint that is not known: the node has to send first.
func wait(w *cluster.WireGuard) { w.BehindNAT = true }

// TestAnnotationsHaveOneSpelling shows that the daemon sees each change of what its own Node publishes, so that it can put it right:
// any change of a byte and any deletion is a change of the Node.
func TestAnnotationsHaveOneSpelling(t *testing.T) {
	bytesOf := func(n, first int) string {
		raw := make([]byte, n)
		for i := range raw {
			raw[i] = byte(first + i)
		}
		return base64.StdEncoding.EncodeToString(raw)
	}
	published := map[string]string{
		AnnotationPublicKey: bytesOf(32, 1), AnnotationPort: "51820", AnnotationKeyProof: bytesOf(64, 2), AnnotationMTU: "1500",
		AnnotationNextPublicKey: bytesOf(32, 3), AnnotationNextKeyProof: bytesOf(64, 4),
	}
	convert := func(annotations map[string]string) cluster.Node {
		node, _ := convertNode(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", Annotations: annotations}})
		return node
	}
	before, again := convert(published), convert(maps.Clone(published))
	if !equalDeeply(&before, &again) {
		t.Fatal("the same annotations give another Node: this test shows nothing")
	}
	for name, value := range published {
		changes := []string{"", value + "\n", " " + value, value + "=", "0" + value}
		for i := range value {
			for _, c := range "\nAB/+01 =" {
				changes = append(changes, value[:i]+string(c)+value[i+1:], value[:i]+string(c)+value[i:])
			}
		}
		for _, changed := range changes {
			annotations := maps.Clone(published)
			if annotations[name] = changed; changed == value {
				continue
			}
			if after := convert(annotations); equalDeeply(&before, &after) {
				t.Errorf("%s changed from %q to %q is not seen", name, value, changed)
			}
		}
		annotations := maps.Clone(published)
		delete(annotations, name)
		if after := convert(annotations); equalDeeply(&before, &after) {
			t.Errorf("%s deleted is not seen", name)
		}
	}
}

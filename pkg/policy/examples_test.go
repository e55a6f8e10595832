package policy_test

import (
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/policy"
)

// examplesCluster has two pods to protect, the cluster's DNS, and a control plane.
const examplesCluster = `
apiVersion: v1
kind: Node
metadata: {name: here}
spec: {podCIDRs: [10.244.1.0/24]}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}]}
---
apiVersion: v1
kind: Node
metadata: {name: control-plane}
spec: {podCIDRs: [10.244.0.0/24]}
status: {addresses: [{type: InternalIP, address: 192.0.2.10}]}
---
apiVersion: v1
kind: Namespace
metadata: {name: default, labels: {kubernetes.io/metadata.name: default}}
---
apiVersion: v1
kind: Namespace
metadata: {name: kube-system, labels: {kubernetes.io/metadata.name: kube-system}}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: default}
spec: {nodeName: here, containers: [{name: main, image: none}]}
status: {podIPs: [{ip: 10.244.1.2}]}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: default}
spec: {nodeName: here, containers: [{name: main, image: none}]}
status: {podIPs: [{ip: 10.244.1.3}]}
---
apiVersion: v1
kind: Pod
metadata: {name: dns, namespace: kube-system, labels: {k8s-app: kube-dns}}
spec: {nodeName: control-plane, containers: [{name: main, image: none}]}
status: {podIPs: [{ip: 10.244.0.2}]}
`

// TestExamples checks that the policies that clusters start from do what their comments promise.
func TestExamples(t *testing.T) {
	flows := []struct {
		name     string
		to       string
		protocol cluster.Protocol
		port     uint16
	}{
		{"server", "10.244.1.3", cluster.TCP, 80},
		{"DNS over UDP", "10.244.0.2", cluster.UDP, 53},
		{"DNS over TCP", "10.244.0.2", cluster.TCP, 53},
		{"metrics of the DNS", "10.244.0.2", cluster.TCP, 9153},
		{"API server", "192.0.2.10", cluster.TCP, 6443},
		{"ssh of the control plane", "192.0.2.10", cluster.TCP, 22},
		{"world", "203.0.113.1", cluster.TCP, 443},
	}
	for name, tc := range map[string]struct {
		files []string
		want  string // a letter a flow
	}{
		"no policy":        {nil, "yyyyyyy"},
		"deny all":         {[]string{"deny-all"}, "nnnnnnn"},
		"deny all, lists":  {[]string{"deny-all-empty-lists"}, "nnnnnnn"},
		"DNS alone":        {[]string{"allow-dns"}, "nyynnnn"},
		"DNS":              {[]string{"deny-all", "allow-dns"}, "nyynnnn"},
		"API server":       {[]string{"deny-all", "allow-apiserver"}, "nnnnynn"},
		"DNS, API server":  {[]string{"deny-all", "allow-dns", "allow-apiserver"}, "nyynynn"},
		"API server alone": {[]string{"allow-apiserver"}, "nnnnynn"},
	} {
		t.Run(name, func(t *testing.T) {
			s := loadExamples(t, tc.files)
			for i, f := range flows {
				v := policy.Explain(s, policy.Flow{
					Src: netip.MustParseAddr("10.244.1.2"), Dst: netip.MustParseAddr(f.to), Protocol: f.protocol, Port: f.port,
				})
				if want := tc.want[i] == 'y'; v.Allowed != want {
					t.Errorf("%s: allowed %v, want %v: %s; %s", f.name, v.Allowed, want, v.Egress.Because, v.Ingress.Because)
				}
			}
		})
	}
}

// loadExamples reads the cluster and some of the examples, which are for any namespace and so land in default.
func loadExamples(t *testing.T, names []string) cluster.Snapshot {
	t.Helper()
	dir := t.TempDir()
	err := os.WriteFile(filepath.Join(dir, "cluster.yaml"), []byte(examplesCluster), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		data, err := os.ReadFile(filepath.Join("..", "..", "manifests", "examples", name+".yaml"))
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name+".yaml"), data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	s, problems, err := kube.Load(dir, "here")
	if err != nil || len(problems) > 0 || len(s.Policies) != len(names) {
		t.Fatalf("%d policies, problems %v, error %v", len(s.Policies), problems, err)
	}
	return s
}

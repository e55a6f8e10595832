package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/agentapi"
)

// sample is a status with something in every part.
func sample(now time.Time) agentapi.Status {
	return agentapi.Status{
		Node: "worker-1", Version: "v1", Ready: true, PodCIDRs: []string{"10.244.1.0/24", "fd00:10:244:1::/64"},
		Encryption: agentapi.Encryption{
			Mode: "kernel", PublicKey: "cHVibGlj", Port: 51820, MTU: 1440, Guard: "cluster-cidr", NotCovered: []string{"nodes to nodes"},
		},
		Peers: []agentapi.Peer{{
			Node: "worker-2", PublicKey: "b3RoZXI=", Endpoint: "192.0.2.2:51820", AllowedIPs: []string{"10.244.2.0/24"},
			LastHandshake: now.Add(-70 * time.Second), ReceivedBytes: 10, SentBytes: 20,
		}},
		Policies: agentapi.Policies{Policies: 3, Pods: 2, Isolated: 1, Sets: 4, Rules: 30, LastApply: now.Add(-2 * time.Second)},
		Problems: []agentapi.Problem{{
			Code: "PolicyInvalid", Object: "NetworkPolicy shop/api", Field: "spec.ingress[0]", Message: "no such thing", Remedy: "correct it",
		}},
	}
}

func TestPrintStatusTable(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var out bytes.Buffer
	if err := printStatus(&out, sample(now), "table", now); err != nil {
		t.Fatal(err)
	}
	want := strings.TrimLeft(`
NODE        worker-1
READY       true
POD CIDRS   10.244.1.0/24, fd00:10:244:1::/64
ENCRYPTION  WireGuard (kernel), UDP port 51820, MTU 1440, public key cHVibGlj
  in clear  nodes to nodes
GUARD       cluster-cidr
POLICIES    3 in the cluster; 2 pods here, 1 isolated; 30 rules, 4 sets
LAST APPLY  2s ago

PEER       ENDPOINT          LAST HANDSHAKE   RECEIVED   SENT   ALLOWED IPS
worker-2   192.0.2.2:51820   1m10s ago        10 B       20 B   10.244.2.0/24

1 PROBLEM(S)
PolicyInvalid: NetworkPolicy shop/api, spec.ingress[0]
    no such thing
    -> correct it
`, "\n")
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("table (-want +got):\n%s", diff)
	}
}

func TestPrintStatusJSONComesBack(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var out bytes.Buffer
	if err := printStatus(&out, sample(now), "json", now); err != nil {
		t.Fatal(err)
	}
	var back agentapi.Status
	if err := json.Unmarshal(out.Bytes(), &back); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sample(now), back); diff != "" {
		t.Errorf("status (-want +got):\n%s", diff)
	}
}

func TestVerdictIsTheExitStatus(t *testing.T) {
	s := sample(time.Time{})
	if err := verdict(s); err == nil || !strings.Contains(err.Error(), "1 problem") {
		t.Errorf("a node with a problem: %v", err)
	}
	s.Problems = nil
	if err := verdict(s); err != nil {
		t.Errorf("a healthy node: %v", err)
	}
	s.Ready = false
	if err := verdict(s); err == nil || !strings.Contains(err.Error(), "not ready") {
		t.Errorf("a node that is not ready: %v", err)
	}
}

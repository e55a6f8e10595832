package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/mesh"
)

// sample is a status with something in every part.
func sample(now time.Time) agentapi.Status {
	return agentapi.Status{
		Node: "worker-1", Version: "v1", Ready: true, PodCIDRs: []string{"10.244.1.0/24", "fd00:10:244:1::/64"},
		Encryption: agentapi.Encryption{
			Mode: "kernel", PublicKey: "cHVibGlj", Port: 51820, MTU: 1440, Guard: "cluster-cidr", GuardStands: true, NotCovered: []string{"nodes to nodes"},
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

// What the guards are to cover is not told as if they stood.
func TestPrintStatusGuard(t *testing.T) {
	for want, e := range map[string]agentapi.Encryption{
		"GUARD cluster-cidr":     {Mode: "kernel", Guard: "cluster-cidr", GuardStands: true},
		"GUARD known nodes only": {Mode: "unknown", Guard: "known nodes only", GuardStands: true},
		"GUARD none":             {Mode: "off", Guard: "none"},
		"GUARD NOT KNOWN TO STAND, see the problems (is to cover: cluster-cidr)": {Mode: "kernel", Guard: "cluster-cidr"},
	} {
		var out bytes.Buffer
		if err := printStatus(&out, agentapi.Status{Encryption: e}, "table", time.Time{}); err != nil {
			t.Fatal(err)
		}
		lines := slices.Collect(strings.Lines(out.String()))
		if !slices.ContainsFunc(lines, func(line string) bool { return strings.Join(strings.Fields(line), " ") == want }) {
			t.Errorf("no line %q in\n%s", want, out.String())
		}
	}
}

// They stand for the status once the packet filter was applied, and until that fails.
func TestStatusOfGuards(t *testing.T) {
	n, s, m, _ := newStepped(t, "192.168.0.1", netip.MustParsePrefix("10.244.0.0/16"))
	stand := func(when string, want bool) {
		t.Helper()
		if e := n.encryptionStatus(n.outcomeNow()); e.GuardStands != want || e.Guard != "cluster-cidr" {
			t.Errorf("%s: they stand: %v, covering %q; want %v", when, e.GuardStands, e.Guard, want)
		}
	}
	stand("before the first step", false)
	s.errServers = errBusy
	if err := n.step(t.Context(), true); err == nil {
		t.Fatal("no error where the API server may be in the cluster CIDR")
	}
	stand("nothing was applied", false)
	s.errServers = nil
	if err := n.step(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	stand("applied", true)
	if err := n.step(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	stand("applied with nothing to change", true)
	m.busy.Store(true)
	if err := n.step(t.Context(), true); err == nil {
		t.Fatal("no error where the packet filter takes nothing")
	}
	stand("the packet filter takes nothing", false)
	m.busy.Store(false)
	if err := n.step(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	stand("mended", true)
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

// holding is a tunnel that leads to none of some nodes' addresses any more.
type holding struct {
	noTunnel
	held []netip.Addr
}

func (h holding) Held() ([]netip.Addr, error) { return h.held, nil }

// Addresses that pods do not reach are named with their nodes, and those of a large cluster counted.
func TestHeldAddresses(t *testing.T) {
	var held []netip.Addr
	var hosts []mesh.Host
	for i := range 8 {
		a := netip.AddrFrom4([4]byte{192, 0, 2, byte(i)})
		held, hosts = append(held, a), append(hosts, mesh.Host{Address: a, Node: fmt.Sprintf("worker-%d", i)})
	}
	for count, want := range map[int]string{
		0: "",
		1: ": 192.0.2.0 of node worker-0",
		5: ": 192.0.2.0 of node worker-0, 192.0.2.1 of node worker-1, 192.0.2.2 of node worker-2, 192.0.2.3 of node worker-3, 192.0.2.4 of node worker-4",
		8: "192.0.2.4 of node worker-4, 3 more",
	} {
		n := &node{tunnel: holding{held: held[:count]}}
		got := n.heldAddresses(outcome{mesh: mesh.Config{Hosts: hosts}})
		if count == 0 && len(got) > 0 || count > 0 && (len(got) != 1 || !strings.HasSuffix(got[0].Message, want)) {
			t.Errorf("%d: %v, want %q", count, got, want)
		}
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/lab"
)

// badPolicy selects all pods of the namespace and allows an impossible network.
const badPolicy = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: impossible}
spec:
  podSelector: {matchLabels: {app: half}}
  policyTypes: [Ingress]
  ingress:
  - from:
    - ipBlock: {cidr: 10.0.0.300/8}
`

// lostIndentation is a policy of which the lines were pasted without their indentation.
const lostIndentation = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
namespace: shop
name: isolate-closed
spec:
podSelector: {}
`

// garbageNode is a node whose annotation is no key.
const garbageNode = `apiVersion: v1
kind: Node
metadata:
  name: node-9
  annotations: {warren.cni/wireguard-public-key: garbage}
spec: {podCIDRs: [10.244.9.0/24]}
status: {addresses: [{type: InternalIP, address: 192.0.2.9}]}
`

// bareNode is a node that no controller has given a podCIDR.
const bareNode = `apiVersion: v1
kind: Node
metadata: {name: node-1}
status: {addresses: [{type: InternalIP, address: 192.0.2.1}, {type: InternalIP, address: "2001:db8::1"}]}
`

// Objects that are broken are reported with their name and field, close what they concern, and leave the rest alone.
func TestBrokenObjects(t *testing.T) {
	s := running(t, "wdbroken", 2)
	s.write("policy", isolateClosed())
	client := s.pod(0, "client")
	open, closed, half := s.pod(1, "open"), s.pod(1, "closed"), s.pod(1, "half")
	unaffected := func(t *testing.T) {
		t.Helper()
		s.reaches(client, open)
		s.blocked(client, closed)
	}
	expect := func(t *testing.T, p agentapi.Problem, words ...string) {
		t.Helper()
		for _, word := range words {
			if text := fmt.Sprintf("%+v", p); !strings.Contains(text, word) {
				t.Errorf("the problem does not say %q: %s", word, text)
			}
		}
	}
	unaffected(t)

	t.Run("impossible policy", func(t *testing.T) {
		s.reaches(client, half)
		s.writeText("bad", badPolicy)
		expect(t, s.problem(1, "PolicyInvalid", "shop/impossible"), "spec.ingress[0].from[0].ipBlock.cidr", "10.0.0.300/8")
		s.blocked(client, half)
		unaffected(t)
	})
	t.Run("lost indentation", func(t *testing.T) {
		s.writeText("policy", lostIndentation)
		expect(t, s.problem(1, "FileInvalid", "policy.yaml"), "policy.yaml")
		unaffected(t) // the policy that the file held before is still enforced
		s.write("policy", isolateClosed())
	})
	t.Run("garbage key", func(t *testing.T) {
		s.writeText("node-9", garbageNode)
		expect(t, s.problem(0, "NodeInvalid", "node-9"), "warren.cni/wireguard-public-key")
		for i, other := range []string{"node-2", "node-1"} {
			if peers := s.status(i).Peers; len(peers) != 1 || peers[0].Node != other {
				t.Errorf("peers of %s: %+v", s.Nodes[i].Name, peers)
			}
		}
		unaffected(t)
	})
	t.Run("status tells by its exit status", func(t *testing.T) {
		out, err := s.Nodes[0].Command(t.Context(), "status")
		if err == nil || !strings.Contains(out, "NodeInvalid: Node node-9") {
			t.Errorf("status: %v\n%s", err, out)
		}
	})
	for _, name := range []string{"bad", "node-9"} {
		if err := s.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	s.healthy(0)
	s.healthy(1)
	unaffected(t)
}

// A node without podCIDR gets no conflist, and all of it follows once it has one.
func TestNodeWithoutPodCIDR(t *testing.T) {
	s := newStage(t, "wdbare", 1)
	whole, err := s.ReadText("node-1")
	if err != nil {
		t.Fatal(err)
	}
	s.writeText("node-1", bareNode)
	s.startTunnel(0)
	s.startDaemon(0, nil)
	s.problem(0, "NodeWithoutPodCIDR", "node-1")
	if s.status(0).Ready {
		t.Error("the node is ready")
	}
	if _, err = os.Stat(s.Nodes[0].Conflist()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("there is a conflist (%v)", err)
	}
	s.writeText("node-1", string(whole))
	s.ready(0)
	s.healthy(0)
	works := s.pod(0, "works")

	// Where the Node loses its podCIDRs no pod gets an address of them, and those that have one keep it.
	s.writeText("node-1", bareNode)
	s.problem(0, "NodeWithoutPodCIDR", "node-1")
	if err = s.Nodes[0].Readiness(t.Context()); err == nil || !strings.Contains(err.Error(), "podCIDR") {
		t.Errorf("STATUS without podCIDRs: %v", err)
	}
	if pod, err := s.Nodes[0].AddPod(t.Context(), lab.Pod{Namespace: "shop", Name: "late"}); err == nil {
		t.Errorf("a pod got %v", pod.Addresses)
	}
	s.writeText("node-1", string(whole))
	s.healthy(0)
	s.reaches(works, s.pod(0, "again"))
}

// A cluster CIDR that holds the node's own address would have the guards cut the node off: nothing is applied, nothing opens.
func TestClusterCIDRHoldsNode(t *testing.T) {
	s := newStage(t, "wdcidr", 1)
	s.startTunnel(0)
	daemon, err := s.Nodes[0].StartDaemon(t.Context(), nil, "--cluster-cidr", "192.0.0.0/8")
	if err != nil {
		t.Fatal(err)
	}
	if p := s.problem(0, "ClusterCIDRHoldsNode", "node-1"); !strings.Contains(p.Message, "192.0.0.0/8 holds 192.0.2.1") {
		t.Errorf("the problem does not name CIDR and address: %+v", p)
	}
	if s.status(0).Ready {
		t.Error("the node is ready")
	}
	if rules, err := s.Nodes[0].Run(t.Context(), "iptables-save"); err != nil || strings.Contains(rules, "WARREN") {
		t.Errorf("there are rules (%v):\n%s", err, rules)
	}
	if _, err = os.Stat(s.Nodes[0].Conflist()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("there is a conflist (%v)", err)
	}
	if err = daemon.Stop(); err != nil {
		t.Error(err)
	}
	s.startDaemon(0, nil)
	s.ready(0)
	s.healthy(0)
}

// A second daemon on a node refuses to run, and the first one answers as before.
func TestSecondDaemon(t *testing.T) {
	s := running(t, "wdtwice", 1)
	ctx, cancel := context.WithTimeout(t.Context(), changePatience)
	defer cancel()
	second, err := s.Nodes[0].Command(ctx, "run", "--node-name", "node-1", "--objects", s.Objects, "--metrics-address", "")
	if err == nil || !strings.Contains(err.Error(), "another warrend runs on this node") {
		t.Errorf("the second daemon: %v, %s", err, second)
	}
	s.healthy(0)
	s.pod(0, "works")
}

// leavesNothing demands that adding a pod fails as "try again later" and leaves nothing.
func leavesNothing(t *testing.T, node *lab.Node) {
	t.Helper()
	before, err := node.Leftovers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, err = node.AddPod(t.Context(), lab.Pod{Namespace: "shop", Name: "refused", Labels: map[string]string{"app": "refused"}})
	var refusal *types.Error
	if !errors.As(err, &refusal) || refusal.Code != types.ErrTryAgainLater {
		t.Errorf("adding a pod gave %v, not code %d", err, types.ErrTryAgainLater)
	}
	after, err := node.Leftovers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("a refused pod left something (-before +after):\n%s", diff)
	}
}

// With the daemon away no pod starts.
func TestAddWithoutDaemon(t *testing.T) {
	s := running(t, "wdaway", 1)
	s.healthy(0)
	if err := s.daemons[0].Stop(); err != nil {
		t.Fatal(err)
	}
	leavesNothing(t, s.Nodes[0])
	s.startDaemon(0, nil)
	s.ready(0)
	s.pod(0, "later")
}

// withoutSCTP is an iptables-restore of a system that lacks the match: it warns, leaves the rules out, and succeeds. The match
// is there again as soon as the file %[2]s is.
const withoutSCTP = `#!/bin/sh
input=$(cat)
[ -e %[2]s ] || case "$input" in
*"-p sctp"*) echo "Warning: Extension sctp revision 0 not supported, missing kernel module?" >&2; exit 0 ;;
esac
printf '%%s\n' "$input" | exec %[1]s "$@"
`

// A policy that the node's iptables cannot express is a problem and isolates the pods that it selects. Everybody else's policies
// are enforced, pods start, and it is applied as soon as the node can.
func TestUnsupportedExtension(t *testing.T) {
	s := newStage(t, "wdext", 1)
	match := filepath.Join(t.TempDir(), "sctp")
	s.startWithRestore(withoutSCTP, match)
	client, open := s.pod(0, "client"), s.pod(0, "open")
	s.reaches(client, open)
	s.reaches(open, client)

	s.writeText("sctp", `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: signalling}
spec:
  podSelector: {matchExpressions: [{key: app, operator: In, values: [client, phone]}]}
  policyTypes: [Ingress]
  ingress:
  - ports: [{protocol: SCTP, port: 2905}, {protocol: TCP, port: 8080}]
`)
	problem := s.problem(0, "PolicyNotApplied", "shop/signalling")
	if !strings.Contains(problem.Message, "Extension sctp") {
		t.Errorf("the problem does not say what is missing: %+v", problem)
	}
	s.write("policy", isolateClosed())
	closed, phone := s.pod(0, "closed"), s.pod(0, "phone")
	s.blocked(client, closed)
	s.reaches(client, open)
	s.reaches(phone, open)
	s.blocked(open, client)
	s.blocked(open, phone)
	s.problem(0, "PolicyNotApplied", "shop/signalling")
	explain := []string{"--from", "shop/open", "--to", "shop/client", "--port", "8080"}
	if out, err := s.Nodes[0].Command(t.Context(), "explain", explain...); err == nil || !strings.HasPrefix(out, "DENIED") {
		t.Errorf("explain does not say that the kernel has it closed (%v):\n%s", err, out)
	}

	if err := os.WriteFile(match, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.healthy(0) // after the next audit
	s.reaches(open, client)
	s.reaches(open, phone)
	s.blocked(client, closed)
	if out, err := s.Nodes[0].Command(t.Context(), "explain", explain...); err != nil || !strings.HasPrefix(out, "ALLOWED") {
		t.Errorf("explain does not say that it is open again (%v):\n%s", err, out)
	}
}

// Where kube-proxy delivers Services past the policies, no pod starts; the node says so in words and with the code that CNI
// has for it.
func TestKubeProxyIPVS(t *testing.T) {
	s := running(t, "wdipvs", 1)
	before := s.pod(0, "before")
	if _, err := s.Nodes[0].Run(t.Context(), "ip", "link", "add", "kube-ipvs0", "type", "bridge"); err != nil {
		t.Fatal(err)
	}
	problem := s.problem(0, "KubeProxyIPVS", "node-1") // after the next audit
	if !strings.Contains(problem.Remedy, "nftables or iptables") {
		t.Errorf("the remedy does not name kube-proxy's modes: %+v", problem)
	}
	socket := filepath.Join(filepath.Dir(s.Nodes[0].Leases()), "warrend.sock")
	_, err := agentapi.Call(t.Context(), socket, agentapi.Request{Op: agentapi.OpReady})
	if refused, ok := errors.AsType[*agentapi.Error](err); !ok || refused.Code != types.ErrLimitedConnectivity {
		t.Errorf("what STATUS is made of: %v", err)
	}
	_, err = s.Nodes[0].AddPod(t.Context(), lab.Pod{Namespace: "shop", Name: "refused"})
	if err == nil || !strings.Contains(err.Error(), "ipvs mode") {
		t.Errorf("a pod is attached: %v", err)
	}
	if _, err = s.Nodes[0].Run(t.Context(), "ip", "link", "del", "kube-ipvs0"); err != nil {
		t.Fatal(err)
	}
	s.healthy(0)
	s.reaches(before, s.pod(0, "after"))
}

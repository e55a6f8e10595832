package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/golden"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// explainObjects are asked in most tests.
const explainObjects = "testdata/explain"

// exit runs warrend in this process as main does, and returns all that an operator sees.
func exit(t *testing.T, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(&out)
	root.SetErr(&out)
	status := execute(t.Context(), root)
	return fmt.Sprintf("%sexit status %d\n", out.String(), status)
}

// Each case is what an operator types and sees.
func TestExplainText(t *testing.T) {
	for name, args := range map[string]string{
		"allowed":             "--from shop/web --to shop/api --port http",
		"denied-by-both":      "--from shop/web --to shop/api --port 9090",
		"denied-by-namespace": "--from monitoring/prober --to shop/api --port metrics",
		"no-port":             "--from shop/web --to monitoring/prober,--from shop/web --to shop/api",
		"not-isolated":        "--from monitoring/prober --to 2001:db8::1,--from monitoring/prober --to 198.51.100.1 --port 53/udp",
		"outside-excepted":    "--from shop/web --to 198.51.100.200 --port 443",
		"service":             "--from shop/web --to svc/shop/api --port 80,--from monitoring/prober --to svc/shop/api --port metrics",
		"service-partly":      "--from shop/web --to svc/shop/api",
		"service-address":     "--from shop/web --to 10.96.0.20 --port http,--from shop/web --to 10.96.0.10 --port 53/udp",
		"service-block":       "--from shop/web --to svc/kube-system/dns --port 53/udp",
		"service-itself":      "--from shop/api-2 --to svc/shop/api --port http",
		"service-json":        "--from monitoring/prober --to svc/shop/api --port metrics -o json",
		"service-outside":     "--from 203.0.113.9 --to svc/shop/api --port http",
		"service-not-ready":   "--from shop/web --to svc/shop/starting",
		"service-refused": "--from svc/shop/web --to shop/api --port 80,--from shop/web --to svc/shop/api --port 8080," +
			"--from shop/web --to svc/shop/api --port http/udp,--from shop/web --to svc/shop/gone,--from shop/web --to svc/shop/nobody," +
			"--from shop/web --to svc/shop/elsewhere,--from fd00:10:244:1::2 --to svc/kube-system/dns,--from shop/web --to svc/api",
		"own-node":     "--from monitoring/agent --to shop/web --port 80,--from shop/web --to 10.244.1.1 --port 80,--from 192.0.2.1 --to fd00:10:244:1::2",
		"host-network": "--from monitoring/agent --to shop/api --port metrics,--from 192.0.2.1 --to shop/api --port metrics,--from shop/web --to 192.0.2.2 --port 443",
		"itself":       "--from shop/web --to shop/web --port 80,--from 192.0.2.1 --to 192.0.2.1",
		"finished":     "--from 10.244.2.9 --to shop/web --port 80,--from shop/migration --to shop/web",
		"refused": "--from shop/pending --to shop/web,--from shop/web --to shop/gone,--from shop/web --to shop/api/http," +
			"--from shop/web --to shop/api --port sql,--from shop/web --to shop/api --port 70000,--from shop/web --to shop/api --port 80/icmp," +
			"--from shop/web --to 192.0.2.2 --port http,--from monitoring/prober --to fd00::1,--from shop/web,--form shop/web",
	} {
		t.Run(name, func(t *testing.T) {
			var b strings.Builder
			for question := range strings.SplitSeq(args, ",") {
				fmt.Fprintf(&b, "$ warrend explain %s\n", question)
				b.WriteString(exit(t, append([]string{"explain", "--objects", explainObjects}, strings.Fields(question)...)...))
			}
			golden.Compare(t, filepath.Join(explainObjects, name+".txt"), b.String())
		})
	}
}

// A rule whose parts were all refused is told from one that is not there.
func TestExplainTellsRefusedRules(t *testing.T) {
	objects := t.TempDir()
	text := `
{apiVersion: v1, kind: Node, metadata: {name: here}, spec: {podCIDRs: [10.244.1.0/24]}}
---
{apiVersion: v1, kind: Pod, metadata: {namespace: shop, name: web, uid: "1"}, spec: {nodeName: here}, status: {podIPs: [{ip: 10.244.1.2}]}}
---
{apiVersion: v1, kind: Pod, metadata: {namespace: shop, name: api, uid: "2"}, spec: {nodeName: here}, status: {podIPs: [{ip: 10.244.1.3}]}}
---
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {namespace: shop, name: bad-peer}, spec: {podSelector: {}, ingress: [{from: [{}]}]}}
---
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {namespace: shop, name: bad-pods}, spec: {podSelector: {matchLabels: {"a b": c}}, ingress: [{}]}}
---
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {namespace: shop, name: none}, spec: {podSelector: {}}}
`
	if err := os.WriteFile(filepath.Join(objects, "objects.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got := exit(t, "explain", "--objects", objects, "--from", "shop/web", "--to", "shop/api")
	const none = "none: nothing that the rule names was understood\n"
	const want = "  shop/bad-peer:\n    ingress[0] does not match\n      from  " + none +
		"  shop/bad-pods:\n    ingress[0] does not match\n      from  " + none + "      port  " + none + "  shop/none: has no ingress rules\n"
	if !strings.Contains(got, want) {
		t.Errorf("explain says\n%s\nwithout\n%s", got, want)
	}
}

// What a program reads is what people read.
func TestExplainJSON(t *testing.T) {
	question := agentapi.Explain{From: "shop/web", To: "shop/api", Port: "http"}
	want, err := askObjects(t.Context(), explainObjects, question)
	if err != nil {
		t.Fatal(err)
	}
	out, _, err := warrend(t, "explain", "--objects", explainObjects, "--from", question.From, "--to", question.To, "--port", question.Port, "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var got explanation
	if err = json.Unmarshal([]byte(out), &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("explanation (-want +got):\n%s", diff)
	}
	if got.Answer != allowed || len(got.Verdicts) != 2 || got.Problems == nil {
		t.Errorf("not the verdicts of both families: %s", out)
	}
}

// With encryption off, a host-network pod reaches pods of other nodes from its node's InternalIP.
func TestExplainWithoutEncryption(t *testing.T) {
	snapshot, _, err := kube.Load(explainObjects, "")
	if err != nil {
		t.Fatal(err)
	}
	for encrypted, want := range map[bool]string{true: "10.244.1.1", false: "192.0.2.1"} {
		e, err := explain(facts{snapshot: snapshot, encrypted: encrypted}, agentapi.Explain{From: "monitoring/agent", To: "shop/api", Port: "metrics"})
		if err != nil {
			t.Fatal(err)
		}
		if got := e.Verdicts[0].Flow.Src; got != netip.MustParseAddr(want) || e.Verdicts[0].Allowed == encrypted {
			t.Errorf("encryption %v: from %s, allowed %v", encrypted, got, e.Verdicts[0].Allowed)
		}
	}
}

// Problems of what a verdict rests on are shown with it, and no others.
func TestExplainTellsProblems(t *testing.T) {
	snapshot, _, err := kube.Load(explainObjects, "")
	if err != nil {
		t.Fatal(err)
	}
	problem := func(object string) cluster.Problem {
		return cluster.Problem{Code: "Wrong", Object: object, Message: "it is wrong", Remedy: "mend it"}
	}
	concerned := []string{"NetworkPolicy shop/other, shop/api", "NetworkPolicy shop/web", "Pod shop/api", "Node worker-2", "Namespace shop", "policies.yaml"}
	var problems []cluster.Problem
	for _, object := range append(slices.Clone(concerned), "NetworkPolicy shop/other", "Pod shop/web2", "Node worker-3", "Namespace monitoring") {
		problems = append(problems, problem(object))
	}
	e, err := explain(facts{snapshot: snapshot, problems: problems, encrypted: true}, agentapi.Explain{From: "shop/web", To: "shop/api", Port: "http"})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, p := range e.Problems {
		got = append(got, p.Object)
	}
	if diff := cmp.Diff(concerned, got); diff != "" {
		t.Errorf("problems (-want +got):\n%s", diff)
	}
	var out bytes.Buffer
	if err = printExplanation(&out, e, "text"); err != nil {
		t.Fatal(err)
	}
	if want := "What this verdict rests on has problems:\n6 PROBLEM(S)\n"; !strings.Contains(out.String(), want) {
		t.Errorf("no %q in:\n%s", want, out.String())
	}
}

// What the node's kernel has closed is not allowed, whatever the rules say: in that family, and on that node.
func TestExplainTellsWhatIsClosed(t *testing.T) {
	snapshot, _, err := kube.Load(explainObjects, "")
	if err != nil {
		t.Fatal(err)
	}
	ask := func(node string, closed func(policy.Verdict) firewall.ClosedChain) explanation {
		e, err := explain(facts{snapshot: snapshot, encrypted: true}, agentapi.Explain{From: "shop/web", To: "shop/api", Port: "http"})
		if e.settle(); err != nil || e.Answer != allowed || len(e.Verdicts) != 2 {
			t.Fatalf("not allowed before: %+v, %v", e, err)
		}
		e.Node = node
		e.close([]firewall.ClosedChain{closed(e.Verdicts[1].Verdict)})
		e.settle()
		return e
	}
	ingress := func(v policy.Verdict) firewall.ClosedChain {
		return firewall.ClosedChain{Family: netfilter.FamilyOf(v.Flow.Dst), Name: v.Ingress.Chain}
	}
	e := ask("worker-2", ingress)
	first, second := e.Verdicts[0], e.Verdicts[1]
	if e.Answer != partly || !first.Allowed || second.Allowed || !second.Egress.Allowed || second.Ingress.Allowed {
		t.Errorf("closed in one family: %+v", e)
	}
	var out bytes.Buffer
	if err = printExplanation(&out, e, "text"); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"DENIED  shop/web (" + second.Flow.Src.String() + ")",
		"ingress  DENIED on node worker-2: the kernel has chain " + second.Ingress.Chain + " closed, because it refused these rules\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in:\n%s", want, out.String())
		}
	}
	if e = ask("worker-1", ingress); e.Answer != allowed {
		t.Errorf("closed on another node: %+v", e)
	}
	other := func(v policy.Verdict) firewall.ClosedChain {
		return firewall.ClosedChain{Family: netfilter.FamilyOf(v.Flow.Dst), Name: netfilter.Name("I", "shop/other")}
	}
	if e = ask("worker-2", other); e.Answer != allowed {
		t.Errorf("another chain is closed: %+v", e)
	}
}

// What cannot be told is neither an allowed connection nor a denied one.
func TestExplainWithoutAnswer(t *testing.T) {
	for want, args := range map[string][]string{
		"does it run on this node?": {"--from", "a/b", "--to", "c/d", "--run-dir", t.TempDir()},
		"no such file or directory": {"--from", "a/b", "--to", "c/d", "--objects", filepath.Join(t.TempDir(), "none")},
		"unknown flag":              {"--form", "a/b"},
		"say text or json":          {"--from", "a/b", "--to", "c/d", "-o", "yaml"},
	} {
		if got := exit(t, append([]string{"explain"}, args...)...); !strings.Contains(got, want) || !strings.HasSuffix(got, "\nexit status 2\n") {
			t.Errorf("%v: %s", args, got)
		}
	}
	if got := exit(t, "render"); !strings.HasSuffix(got, "\nexit status 1\n") {
		t.Errorf("another command: %s", got)
	}
	n := &node{}
	if response := n.explain(t.Context(), agentapi.Explain{}); response.Error == nil || !strings.Contains(response.Error.Message, "has not read the cluster") {
		t.Errorf("a daemon that knows nothing yet: %+v", response)
	}
	if response := n.handle(t.Context(), agentapi.Request{Op: agentapi.OpExplain}); response.Error == nil {
		t.Error("a request without a question is answered")
	}
}

// The running daemon says what packets meet.
func TestExplainAgreesWithPackets(t *testing.T) {
	s := running(t, "wdexplain", 2)
	s.write("policy", isolateClosed())
	client, open, closed := s.pod(0, "client"), s.pod(1, "open"), s.pod(1, "closed")
	s.reaches(client, open)
	s.blocked(client, closed)
	for i := range s.Nodes {
		s.eventually(func() error { // until both daemons know all pods
			for _, name := range []string{"open", "closed"} {
				if out, status := s.explain(i, "shop/"+name); status == 2 {
					return fmt.Errorf("no answer: %s", out)
				}
			}
			return nil
		})
		if out, status := s.explain(i, "shop/open"); status != 0 || !strings.HasPrefix(out, "ALLOWED  shop/client (") {
			t.Errorf("open: %d\n%s", status, out)
		}
		out, status := s.explain(i, "shop/closed")
		for _, want := range []string{
			"DENIED  shop/client (" + client.Addresses[0].String() + ") -> shop/closed (" + closed.Addresses[0].String() + ")  8080/TCP\n",
			"ingress  DENIED on node node-2: isolated by shop/isolate-closed; no rule matches\n",
			"As warrend on node " + s.Nodes[i].Name + " sees the cluster.\n",
		} {
			if status != 1 || !strings.Contains(out, want) {
				t.Errorf("closed: %d, no %q in\n%s", status, want, out)
			}
		}
	}
}

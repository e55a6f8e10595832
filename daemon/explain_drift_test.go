package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// drifted is a kernel with these differences; each time that it is asked there is one list less.
type drifted struct {
	differences [][]firewall.Difference
	asked       []netfilter.Ruleset
}

func (d *drifted) Drift(_ context.Context, wanted netfilter.Ruleset) ([]firewall.Difference, error) {
	d.asked = append(d.asked, wanted)
	if len(d.differences) == 0 {
		return nil, errors.New("the kernel does not answer")
	}
	now := slices.Clone(d.differences[0])
	d.differences = d.differences[1:]
	return now, nil
}

// lacks is a set of IPv4 that lacks members.
func lacks(addresses ...string) firewall.Difference {
	d := firewall.Difference{Family: netfilter.IPv4, Set: "WARREN-P4", What: "lacks members", Detail: strings.Join(addresses, ", ")}
	for _, a := range addresses {
		d.Members = append(d.Members, netfilter.Address(netip.MustParseAddr(a)))
	}
	return d
}

// driftOf asks how shop/web reaches shop/api, as a node with that kernel answers.
func driftOf(t *testing.T, node string, d *drifted, closed ...firewall.ClosedChain) explanation {
	t.Helper()
	snapshot, _, err := kube.Load(explainObjects, node)
	if err != nil {
		t.Fatal(err)
	}
	e, err := explain(facts{snapshot: snapshot, encrypted: true}, agentapi.Explain{From: "shop/web", To: "shop/api", Port: "http"})
	if err != nil {
		t.Fatal(err)
	}
	e.Node = node
	rules, _ := policy.Compile(snapshot)
	base := guard.Compile(guard.Config{Ready: snapshot.Pods[0].Addresses})
	e.compare(t.Context(), kernel{
		comparer: d, closed: closed,
		wanted: func() netfilter.Ruleset { return netfilter.Merge(base, rules) },
	})
	e.settle()
	return e
}

// What the kernel has otherwise than planned takes the certainty from a verdict, where it decides about the connection.
func TestExplainTellsDrift(t *testing.T) {
	flushed := lacks("10.244.1.2", "10.244.1.77")
	both := func(d firewall.Difference) [][]firewall.Difference {
		return [][]firewall.Difference{{d}, {lacks("10.244.1.2"), d}}
	}
	for name, c := range map[string]struct {
		node        string
		differences [][]firewall.Difference
		want        answer
	}{
		"a member that takes part":    {"worker-1", both(flushed), partly},
		"a chain":                     {"worker-1", both(firewall.Difference{Family: netfilter.IPv6, Table: "mangle", Chain: "WARREN-EGRESS", What: "is missing"}), partly},
		"members that take no part":   {"worker-1", [][]firewall.Difference{{lacks("10.244.1.77")}}, allowed},
		"a step that ran":             {"worker-1", [][]firewall.Difference{{flushed}, {}}, allowed},
		"nothing":                     {"worker-1", [][]firewall.Difference{{}}, allowed},
		"a node that takes no part":   {"worker-3", nil, allowed},
		"the other node of the pods'": {"worker-2", both(flushed), partly},
	} {
		d := &drifted{differences: c.differences}
		e := driftOf(t, c.node, d)
		var got []answer
		for _, v := range e.Verdicts {
			got = append(got, v.Answer)
		}
		unsure := slices.Contains(got, unknown)
		if unsure != (c.want == partly) || unsure != (e.Answer == unknown) || unsure != (len(e.Drift) == 1) || len(e.Notes) > 0 {
			t.Errorf("%s: %v of %v, because of %v %v", name, e.Answer, got, e.Drift, e.Notes)
		}
		if unsure && !slices.Contains(got, allowed) {
			t.Errorf("%s: the other family is in doubt, too", name)
		}
		if len(d.differences) > 0 {
			t.Errorf("%s: the kernel was not asked again", name)
		}
	}
}

// What else was closed because it was refused is denied for certain, and a kernel that does not answer is no silence.
func TestExplainDriftKnown(t *testing.T) {
	chain := driftOf(t, "worker-1", &drifted{differences: [][]firewall.Difference{{}}}).Verdicts[0].Egress.Chain
	difference := firewall.Difference{Family: netfilter.IPv4, Table: "mangle", Chain: chain, What: "is closed"}
	twice := func() *drifted {
		return &drifted{differences: [][]firewall.Difference{{difference}, {difference}}}
	}
	if e := driftOf(t, "worker-1", twice()); len(e.Drift) != 1 {
		t.Errorf("closed by somebody: %+v", e.Drift)
	}
	if e := driftOf(t, "worker-1", twice(), firewall.ClosedChain{Family: netfilter.IPv4, Name: chain}); len(e.Drift) != 0 {
		t.Errorf("known as closed: %+v", e.Drift)
	}
	if e := driftOf(t, "worker-1", &drifted{}); e.Answer != allowed || len(e.Notes) != 1 || !strings.Contains(e.Notes[0], "the kernel does not answer") {
		t.Errorf("a kernel that does not answer: %+v", e)
	}
}

// The kernel is compared in what decides about the connection: the groups of other pods are not read.
func TestExplainDriftAsksForWhatDecides(t *testing.T) {
	d := &drifted{differences: [][]firewall.Difference{{}}}
	e := driftOf(t, "worker-2", d)
	var groups []string
	for _, c := range d.asked[0].V4.Chains {
		if len(c.Closable) > 0 {
			groups = append(groups, c.Name)
		}
	}
	if want := []string{e.Verdicts[0].Ingress.Chain}; !slices.Equal(groups, want) {
		t.Errorf("compared are the groups %v, want %v", groups, want)
	}
	named := ""
	for _, c := range d.asked[0].V4.Chains {
		for _, r := range c.Rules {
			named += strings.Join(r.Args, " ") + "\n"
		}
	}
	for _, set := range d.asked[0].V4.Sets {
		if !strings.Contains(named, " "+set.Name+" ") {
			t.Errorf("set %s is compared and decides nothing", set.Name)
		}
	}
	if len(d.asked[0].V4.Sets) < 4 || len(d.asked[0].V4.Hooks) == 0 {
		t.Errorf("too little is compared: %+v", d.asked[0].V4)
	}
}

// An operator sees at a glance that the kernel does not do what the verdict says.
func TestExplainDriftText(t *testing.T) {
	flushed := lacks("10.244.1.2")
	e := driftOf(t, "worker-1", &drifted{differences: [][]firewall.Difference{{flushed}, {flushed}}})
	daemons := map[string]string{"app.kubernetes.io/name": "warren", "app.kubernetes.io/component": "daemon"}
	e.askOthers(cluster.Snapshot{Pods: []cluster.Pod{
		{Namespace: "warren-system", Name: "warren-1", Node: "worker-1", HostNetwork: true, Labels: daemons},
		{Namespace: "kube-system", Name: "proxy-2", Node: "worker-2", HostNetwork: true},
		{Namespace: "warren-system", Name: "warren-2", Node: "worker-2", HostNetwork: true, Labels: daemons},
	}})
	var out bytes.Buffer
	if err := printExplanation(&out, e, "text"); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"The kernel of node worker-1 disagrees with the plan. The next audit repairs it; until then the verdict is only the plan's:\n  set WARREN-P4 lacks members: 10.244.1.2\n",
		"UNKNOWN  shop/web (10.244.1.2) -> shop/api (10.244.2.2)  8080/TCP  (allowed by the plan)\n",
		"ALLOWED  shop/web (fd00:10:244:1::2) -> shop/api (fd00:10:244:2::2)  8080/TCP\n",
		"Node worker-2 enforces a part of it; whether its kernel does as planned, its own warrend tells:\n  kubectl --namespace warren-system exec warren-2 -- warrend explain --from shop/web --to shop/api --port http\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in:\n%s", want, out.String())
		}
	}
}

// The running daemon sees what somebody did to its sets.
func TestExplainSeesDriftInKernel(t *testing.T) {
	s := running(t, "wddrift", 1)
	s.write("policy", isolateClosed())
	client, closed := s.pod(0, "client"), s.pod(0, "closed")
	s.blocked(client, closed)
	ask := func() (string, int) { return s.explain(0, "shop/closed") }
	if out, status := ask(); status != 1 || strings.Contains(out, "disagrees") {
		t.Fatalf("before: %d\n%s", status, out)
	}
	s.eventually(func() error { // an audit may come first
		if _, err := s.Nodes[0].Run(t.Context(), "ipset", "flush", "WARREN-ISOLATED4"); err != nil {
			t.Fatal(err)
		}
		out, status := ask()
		if status != 2 || !strings.Contains(out, "set WARREN-ISOLATED4 lacks members: "+closed.Addresses[0].String()) {
			return fmt.Errorf("%d\n%s", status, out)
		}
		return nil
	})
	s.eventually(func() error {
		if out, status := ask(); status != 1 {
			return fmt.Errorf("not repaired: %d\n%s", status, out)
		}
		return nil
	})
}

// waiting is an iptables-restore that does nothing as long as the file %[2]s is there.
const waiting = `#!/bin/sh
input=$(cat)
while [ -e %[2]s ]; do sleep 0.05; done
printf '%%s\n' "$input" | exec %[1]s "$@"
`

// A step that waits, here for iptables-restore, holds up no answer: the operator is told that the kernel is behind.
func TestExplainAnswersWhileAStepWaits(t *testing.T) {
	s := newStage(t, "wdwaits", 1)
	hold := filepath.Join(t.TempDir(), "hold")
	s.startWithRestore(waiting, hold)
	client, closed := s.pod(0, "client"), s.pod(0, "closed")
	s.reaches(client, closed)
	if out, status := s.explain(0, "shop/closed"); status != 0 {
		t.Fatalf("before: %d\n%s", status, out)
	}

	if err := os.WriteFile(hold, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.write("policy", isolateClosed())
	s.eventually(func() error {
		out, status := s.explain(0, "shop/closed")
		if status != 2 || !strings.Contains(out, "(denied by the plan)") || !strings.Contains(out, "disagrees with the plan") {
			return fmt.Errorf("%d\n%s", status, out)
		}
		return nil
	})
	s.reaches(client, closed) // so it was true

	if err := os.Remove(hold); err != nil {
		t.Fatal(err)
	}
	s.eventually(func() error {
		if out, status := s.explain(0, "shop/closed"); status != 1 {
			return fmt.Errorf("not applied: %d\n%s", status, out)
		}
		return nil
	})
	s.blocked(client, closed)
}

// explain asks a node's daemon whether shop/client reaches the server of a pod, and returns the output and the exit status. It wants
// an answer soon.
func (s *stage) explain(i int, to string) (string, int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), explainPatience)
	defer cancel()
	out, err := s.Nodes[i].Command(ctx, "explain", "--from", "shop/client", "--to", to, "--port", fmt.Sprint(port))
	if failed, ok := errors.AsType[*exec.ExitError](err); ok && ctx.Err() == nil {
		return out, failed.ExitCode()
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return out, 0
}

//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// testTold checks what users are told on the cluster itself: why a policy cannot be enforced, which packets it has denied,
// and how a Service is reached.
func (c *cluster) testTold(t *testing.T) {
	const namespace = "e2e-told"
	c.namespace(t, namespace)
	label := map[string]string{"app": "closed"}
	near := &probePod{name: "near", node: c.worker}
	closed := &probePod{name: "closed", node: c.worker, labels: label}
	far := &probePod{name: "far", node: c.controlPlane, labels: label}
	c.start(t, namespace, near, closed, far)
	c.startService(t, namespace, "closed", label, near.name)

	t.Run("a policy that cannot be enforced", func(t *testing.T) { c.testUnenforceable(t, namespace) })
	t.Run("denied packets", func(t *testing.T) { c.testDeniedPackets(t, namespace, near, closed) })
	t.Run("a Service explained", func(t *testing.T) { c.testServiceExplained(t, namespace) })
}

// testUnenforceable makes a policy whose block Warren does not guess at (10 or 8?). Kubernetes took such blocks until 1.36.
// One node says so in an Event, once.
func (c *cluster) testUnenforceable(t *testing.T, namespace string) {
	c.apply(t, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: odd}
spec:
  podSelector: {matchLabels: {app: closed}}
  ingress: [{from: [{ipBlock: {cidr: 010.0.0.0/8}}]}]
`, "--namespace", namespace)
	c.awaitEvent(t, namespace, "NetworkPolicy", "odd", "spec.ingress[0].from[0].ipBlock.cidr")
	// Both nodes have a pod that the policy selects, and both have the problem; only one of them writes.
	eventually(t, 30*time.Second, "both daemons have the problem", func(ctx context.Context) error {
		for _, node := range c.nodes() {
			status, err := c.status(ctx, node)
			if err != nil {
				return err
			}
			if len(status.Problems) != 1 || status.Problems[0].Object != "NetworkPolicy "+namespace+"/odd" {
				return fmt.Errorf("node %s has the problems %+v", node, status.Problems)
			}
		}
		return nil
	})
	<-time.After(15 * time.Second) // longer than the daemons' regular look at everything
	events, err := c.events(t.Context(), namespace, "NetworkPolicy", "odd")
	if err != nil {
		t.Fatal(err)
	}
	if len(events) != 1 || events[0].Count > 1 || events[0].Series != nil {
		t.Errorf("want one Event that came once; there are %+v", events)
	}
}

// testDeniedPackets asks for a policy's denied packets and finds one in the daemon's log, and in an Event on the pod.
func (c *cluster) testDeniedPackets(t *testing.T, namespace string, from, to *probePod) {
	table := reachTable{}
	table.set(namespace+"/"+from.name, to, false)
	const policy = `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: quiet}
spec: {podSelector: {matchLabels: {app: closed}}, policyTypes: [Ingress]}
`
	c.apply(t, policy, "--namespace", namespace)
	eventually(t, time.Minute, "the policy denies", func(ctx context.Context) error { return c.compare(ctx, table, newMarker(t)) })
	lines, err := c.packetLines(t.Context(), from, to)
	if err != nil || len(lines) > 0 {
		t.Fatalf("packets are logged before anybody has asked for it: %+v %v", lines, err)
	}

	c.apply(t, strings.Replace(policy, "{name: quiet}", "{name: loud, annotations: {warren.cni/log: denied}}", 1), "--namespace", namespace)
	eventually(t, 30*time.Second, "a denied packet is in the log", func(ctx context.Context) error {
		if err = c.compare(ctx, table, newMarker(t)); err != nil {
			return err
		}
		if lines, err = c.packetLines(ctx, from, to); len(lines) == 0 {
			return errors.Join(err, fmt.Errorf("no line names %s/%s and %s/%s", from.namespace, from.name, to.namespace, to.name))
		}
		return nil
	})
	t.Logf("%+v", lines[0])
	want := packetLine{
		Verdict: "denied", Direction: "ingress", Policies: []string{namespace + "/loud", namespace + "/quiet"},
		Node: to.node, Protocol: lines[0].Protocol, Source: lines[0].Source, Destination: lines[0].Destination,
	}
	if diff := cmp.Diff(want, lines[0]); diff != "" {
		t.Errorf("the line (-want +got):\n%s", diff)
	}
	c.awaitEvent(t, namespace, "Pod", to.name, from.name)
}

// packetLine is a line of JSON in a daemon's log about a packet.
type packetLine struct {
	Verdict, Direction, Protocol, Node string
	Source, Destination                struct{ Pod string }
	Policies                           []string
}

// packetLines returns what the log of a pod's daemon says of packets from one pod to another.
func (c *cluster) packetLines(ctx context.Context, from, to *probePod) ([]packetLine, error) {
	pods, err := c.daemonPods(ctx, system, daemonSet)
	if err != nil {
		return nil, err
	}
	log, err := try(ctx, command{name: c.tool("kubectl"), args: []string{
		"logs", "--namespace", system, pods[to.node].Name, "--container", daemon, "--since", "5m",
	}})
	if err != nil {
		return nil, err
	}
	var lines []packetLine
	for text := range strings.Lines(log) {
		var line packetLine
		// What is no JSON is what the daemon says of itself.
		if json.Unmarshal([]byte(text), &line) == nil && line.Source.Pod == from.namespace+"/"+from.name &&
			line.Destination.Pod == to.namespace+"/"+to.name {
			lines = append(lines, line)
		}
	}
	return lines, nil
}

// testServiceExplained asks a daemon why a pod does not reach a Service, before and after a policy is in its way.
func (c *cluster) testServiceExplained(t *testing.T, namespace string) {
	explain := func(ctx context.Context) (string, error) {
		pods, err := c.daemonPods(ctx, system, daemonSet)
		if err != nil {
			return "", err
		}
		return try(ctx, command{name: c.tool("kubectl"), args: []string{
			"exec", "--namespace", system, pods[c.worker].Name, "--container", daemon, "--",
			"warrend", "explain", "--from", namespace + "/near", "--to", "svc/" + namespace + "/closed", "--port", "tcp",
		}})
	}
	open, err := explain(t.Context())
	if err != nil {
		t.Fatalf("%v\n%s", err, open)
	}
	c.closeToAll(t, namespace)
	var said string
	eventually(t, 30*time.Second, "the Service is explained as closed", func(ctx context.Context) error {
		said, err = explain(ctx)
		if err == nil || !strings.Contains(err.Error(), "exit code 1") {
			return fmt.Errorf("want exit status 1: %w\n%s", err, said)
		}
		return nil
	})
	t.Logf("open:\n%s\nclosed:\n%s", open, said)
	for _, words := range [][2]string{{open, "ALLOWED"}, {said, "DENIED"}, {said, namespace + "/far"}, {said, namespace + "/closed"}} {
		if !strings.Contains(words[0], words[1]) {
			t.Errorf("the answer does not say %q", words[1])
		}
	}
}

// awaitEvent waits until an Event on an object says something.
func (c *cluster) awaitEvent(t *testing.T, namespace, kind, name, words string) {
	t.Helper()
	eventually(t, 30*time.Second, fmt.Sprintf("an Event on %s %s says %q", kind, name, words), func(ctx context.Context) error {
		events, err := c.events(ctx, namespace, kind, name)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(events, func(e corev1.Event) bool { return strings.Contains(e.Message, words) }) {
			return fmt.Errorf("there are %d Events of Warren's: %+v", len(events), events)
		}
		return nil
	})
}

// events returns what Warren has written about an object.
func (c *cluster) events(ctx context.Context, namespace, kind, name string) ([]corev1.Event, error) {
	list, err := c.client.CoreV1().Events(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(list.Items, func(e corev1.Event) bool {
		ours := strings.HasPrefix(e.Source.Component, "warren") || strings.HasPrefix(e.ReportingController, "warren")
		return !ours || e.InvolvedObject.Kind != kind || e.InvolvedObject.Name != name
	}), nil
}

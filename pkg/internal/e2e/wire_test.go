//go:build e2e

package e2e

import (
	"context"
	"net/netip"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/internal/wire"
)

// wireGuardPort is the default of the manifests.
const wireGuardPort = 51820

// capture counts what passes between the nodes while probe runs, which must send the marker between them.
func (c *cluster) capture(t *testing.T, probe func(marker string)) wire.Counts {
	t.Helper()
	marker := newMarker(t)
	capture, err := wire.Start(c.bridge, wire.Watch{Marker: []byte(marker), Pods: c.podCIDRs(t), Port: wireGuardPort})
	if err != nil {
		t.Fatal(err)
	}
	probe(marker)
	counts, err := capture.Stop()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("between the nodes: %v", counts)
	return counts
}

// watch checks that nothing of what probe sends passes between the nodes in clear.
func (c *cluster) watch(t *testing.T, probe func(marker string)) {
	t.Helper()
	counts := c.capture(t, probe)
	if counts.Marked > 0 || counts.Pods > 0 || counts.WireGuard == 0 {
		t.Errorf("want only WireGuard between the nodes; in clear: %q", counts.Examples)
	}
}

// podCIDRs returns the prefixes of all nodes' pods.
func (c *cluster) podCIDRs(t *testing.T) []netip.Prefix {
	t.Helper()
	nodes, err := c.client.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var prefixes []netip.Prefix
	for _, node := range nodes.Items {
		for _, text := range node.Spec.PodCIDRs {
			prefix, err := netip.ParsePrefix(text)
			if err != nil {
				t.Fatalf("node %s: %v", node.Name, err)
			}
			prefixes = append(prefixes, prefix)
		}
	}
	if len(prefixes) < len(c.nodes()) {
		t.Fatalf("the nodes have only the podCIDRs %v", prefixes)
	}
	return prefixes
}

// testPlaintext is the positive control of every capture: with encryption off the same probes are seen in clear; with
// encryption on again they are not.
func (c *cluster) testPlaintext(t *testing.T) {
	const namespace = "e2e-plaintext"
	c.namespace(t, namespace)
	near, far := &probePod{name: "near", node: c.worker}, &probePod{name: "far", node: c.controlPlane}
	c.start(t, namespace, near, far)
	both := reachTable{}
	both.set(namespace+"/near", far, true)
	both.set(namespace+"/far", near, true)
	c.awaitTable(t, both)

	t.Run("encryption off", func(t *testing.T) {
		c.setEncryption(t, "off")
		counts := c.capture(t, func(marker string) {
			if err := c.compare(t.Context(), both, marker); err != nil {
				t.Error(err)
			}
		})
		if counts.Marked == 0 || counts.Pods == 0 {
			t.Error("the capture does not see what is in clear")
		}
	})
	c.setEncryption(t, "on")
	c.awaitTable(t, both)
}

// setEncryption switches encryption and waits until the daemons have done so.
func (c *cluster) setEncryption(t *testing.T, mode string) {
	t.Helper()
	c.kubectl(t, "set", "env", "--namespace", system, "daemonset/"+daemonSet, "--containers", daemon, "WARREN_ENCRYPTION="+mode)
	c.rolledOut(t)
}

// testKilled kills the daemons and the tunnels of both nodes under load: not one packet takes another way meanwhile, and the
// same flows go on when Warren is back.
func (c *cluster) testKilled(t *testing.T) {
	const namespace = "e2e-killed"
	c.namespace(t, namespace)
	near, far := &probePod{name: "near", node: c.worker}, &probePod{name: "far", node: c.controlPlane}
	c.start(t, namespace, near, far)
	both := reachTable{}
	both.set(namespace+"/near", far, true)
	both.set(namespace+"/far", near, true)

	load := c.startFlows(t, namespace, near.name, flowsEach, hostPort(far.addresses[0], port))
	c.watch(t, func(marker string) {
		c.kubectl(t, "delete", "pods", "--namespace", system, "--all", "--force", "--grace-period=0")
		c.rolledOut(t)
		eventually(t, time.Minute, "the pods reach one another", func(ctx context.Context) error {
			return c.compare(ctx, both, marker)
		})
	})
	report := load.stop(t)["tcp"]
	t.Logf("tcp: %d flows, %d errors, longest gap %v", report.Flows, report.Errors, report.LongestGapNanoseconds.Round(time.Millisecond))
	if report.Errors != 0 {
		t.Errorf("flows were cut; first error: %q", report.FirstError)
	}
}

//go:build e2e

package e2e

import (
	"testing"
	"time"
)

// flowsEach is how many flows there are over TCP and over UDP.
const flowsEach = 50

// testRollout replaces both daemons under load: 50 TCP and 50 UDP flows between the nodes, 50 messages a second each way.
// The same load without a rollout comes first, because on a busy machine flows have gaps anyway.
func (c *cluster) testRollout(t *testing.T) {
	const namespace = "e2e-rollout"
	c.namespace(t, namespace)
	client, server := &probePod{name: "client", node: c.worker}, &probePod{name: "server", node: c.controlPlane}
	c.start(t, namespace, client, server)
	underLoad := func(t *testing.T, during func()) {
		t.Helper()
		load := c.startFlows(t, namespace, client.name, flowsEach, hostPort(server.addresses[0], port))
		during()
		checkFlows(t, load.stop(t))
	}
	t.Run("nothing happens", func(t *testing.T) {
		underLoad(t, func() { <-time.After(5 * time.Second) })
	})
	t.Run("rollout", func(t *testing.T) {
		underLoad(t, func() { c.replaceDaemons(t) })
	})
}

// replaceDaemons restarts the daemons by a rollout.
func (c *cluster) replaceDaemons(t *testing.T) {
	t.Helper()
	before, err := c.daemonPods(t.Context(), system, daemonSet)
	if err != nil {
		t.Fatal(err)
	}
	c.kubectl(t, "rollout", "restart", "--namespace", system, "daemonset/"+daemonSet)
	c.rolledOut(t)
	after, err := c.daemonPods(t.Context(), system, daemonSet)
	if err != nil {
		t.Fatal(err)
	}
	for _, node := range c.nodes() {
		if before[node].UID == after[node].UID {
			t.Errorf("node %s still has the daemon from before", node)
		}
	}
}

// checkFlows checks that no flow was cut, and reports the gaps.
func checkFlows(t *testing.T, reports map[string]flowReport) {
	t.Helper()
	for _, protocol := range []string{"tcp", "udp"} {
		r := reports[protocol]
		t.Logf("%s: %d flows, %d sent, %d received, %d errors, longest gap %v",
			protocol, r.Flows, r.Sent, r.Received, r.Errors, r.LongestGapNanoseconds.Round(time.Millisecond))
		if r.Flows != flowsEach || r.Errors != 0 || r.Received == 0 {
			t.Errorf("%s: want %d flows and no error; first error: %q", protocol, flowsEach, r.FirstError)
		}
	}
}

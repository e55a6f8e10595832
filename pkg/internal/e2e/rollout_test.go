//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"os/exec"
	"strconv"
	"testing"
	"time"
)

// flowReport is what the probe prints about the flows of a protocol.
type flowReport struct {
	Flows, Sent, Received, Errors int
	FirstError                    string
	LongestGapNanoseconds         time.Duration
}

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
		load := c.startFlows(t, namespace, client.name, net.JoinHostPort(server.addresses[0], strconv.Itoa(port)))
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

// flows are probe flows that run in a pod.
type flows struct {
	process *exec.Cmd
	in      io.Closer
	out     *bufio.Reader
	errors  *bytes.Buffer
}

// startFlows starts flows from a pod to an address and returns when all are established.
func (c *cluster) startFlows(t *testing.T, namespace, pod, address string) *flows {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	args := []string{
		"exec", "--stdin", "--namespace", namespace, pod, "--", probeFolder + "/probe", "flows",
		"-tcp", strconv.Itoa(flowsEach), "-udp", strconv.Itoa(flowsEach), "-rate", "50", address,
	}
	f := &flows{process: exec.CommandContext(ctx, c.tool("kubectl"), args...), errors: &bytes.Buffer{}}
	f.process.Stderr = f.errors
	in, err := f.process.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := f.process.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	f.in, f.out = in, bufio.NewReader(out)
	if err = f.process.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := f.out.ReadString('\n'); err != nil || line != "established\n" {
		t.Fatalf("the flows are not established: %q, %v\n%s", line, err, f.errors)
	}
	return f
}

// stop ends the flows and returns a report for each protocol.
func (f *flows) stop(t *testing.T) map[string]flowReport {
	t.Helper()
	if err := f.in.Close(); err != nil {
		t.Fatal(err)
	}
	var reports map[string]flowReport
	if err := json.NewDecoder(f.out).Decode(&reports); err != nil {
		t.Fatalf("reading the flows' report: %v\n%s", err, f.errors)
	}
	if err := f.process.Wait(); err != nil {
		t.Fatalf("running the flows: %v\n%s", err, f.errors)
	}
	return reports
}

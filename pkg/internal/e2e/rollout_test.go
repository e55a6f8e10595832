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

// testRollout replaces both daemons under load: 50 TCP and 50 UDP flows between the nodes, 50 messages a second each way.
func (c *cluster) testRollout(t *testing.T) {
	const namespace = "e2e-rollout"
	const flows = 50
	c.namespace(t, namespace)
	client, server := &probePod{name: "client", node: c.worker}, &probePod{name: "server", node: c.controlPlane}
	c.start(t, namespace, client, server)
	before, err := c.daemonPods(t.Context(), daemonSet)
	if err != nil {
		t.Fatal(err)
	}

	load := c.startFlows(t, namespace, client.name, "-tcp", "50", "-udp", "50", "-rate", "50", net.JoinHostPort(server.address, strconv.Itoa(port)))
	c.kubectl(t, "rollout", "restart", "--namespace", system, "daemonset/"+daemonSet)
	c.rolledOut(t)
	reports := load.stop(t)

	after, err := c.daemonPods(t.Context(), daemonSet)
	if err != nil {
		t.Fatal(err)
	}
	for _, node := range c.nodes() {
		if before[node].UID == after[node].UID {
			t.Errorf("node %s still has the daemon from before", node)
		}
	}
	for _, protocol := range []string{"tcp", "udp"} {
		r := reports[protocol]
		t.Logf("%s: %d flows, %d sent, %d received, %d errors, longest gap %v",
			protocol, r.Flows, r.Sent, r.Received, r.Errors, r.LongestGapNanoseconds.Round(time.Millisecond))
		if r.Flows != flows || r.Errors != 0 || r.Received == 0 {
			t.Errorf("%s: want %d flows and no error; first error: %q", protocol, flows, r.FirstError)
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

// startFlows starts flows in a pod and returns when all are established.
func (c *cluster) startFlows(t *testing.T, namespace, pod string, args ...string) *flows {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	args = append([]string{"exec", "--stdin", "--namespace", namespace, pod, "--", probeFolder + "/probe", "flows"}, args...)
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

//go:build e2e

package e2e

import (
	"encoding/json"
	"io"
	"slices"
	"strconv"
	"testing"
	"time"
)

// flowReport is what the probe prints about the flows of a protocol.
type flowReport struct {
	Flows, Sent, Received, Errors int
	FirstError                    string
	LongestGapNanoseconds         time.Duration
	// Silent and Heard are when the last message came on the flow that has been silent for longest, and on any flow.
	Silent, Heard time.Time
}

// flows are probe flows that run in a pod.
type flows struct {
	pod     *podProcess
	reports *json.Decoder
}

// startFlows starts so many TCP flows and as many UDP flows from a pod to each address, 50 messages a second each way, and
// returns when all are established.
func (c *cluster) startFlows(t *testing.T, namespace, pod string, each int, addresses ...string) *flows {
	t.Helper()
	number := strconv.Itoa(each)
	process := c.startInPod(t, namespace, pod, slices.Concat(
		[]string{probeFolder + "/probe", "flows", "-tcp", number, "-udp", number, "-rate", "50"}, addresses)...)
	if line, err := process.out.ReadString('\n'); err != nil || line != "established\n" {
		t.Fatalf("the flows are not established: %q, %v\n%s", line, err, process.errors)
	}
	return &flows{pod: process, reports: json.NewDecoder(process.out)}
}

// report returns what the flows of each protocol have seen so far.
func (f *flows) report(t *testing.T) map[string]flowReport {
	t.Helper()
	if _, err := io.WriteString(f.pod.in, "report\n"); err != nil {
		t.Fatal(err)
	}
	return f.read(t)
}

// stop ends the flows and returns a report for each protocol.
func (f *flows) stop(t *testing.T) map[string]flowReport {
	t.Helper()
	if err := f.pod.in.Close(); err != nil {
		t.Fatal(err)
	}
	reports := f.read(t)
	if err := f.pod.process.Wait(); err != nil {
		t.Fatalf("running the flows: %v\n%s", err, f.pod.errors)
	}
	return reports
}

// read reads the next report.
func (f *flows) read(t *testing.T) map[string]flowReport {
	t.Helper()
	var reports map[string]flowReport
	if err := f.reports.Decode(&reports); err != nil {
		t.Fatalf("reading the flows' report: %v\n%s", err, f.pod.errors)
	}
	return reports
}

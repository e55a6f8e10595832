//go:build e2e

package e2e

import (
	"encoding/xml"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// leastSpecs is how many specs about NetworkPolicy the upstream suite has, those that need SCTP sockets not counted. A later
// suite may have more.
const leastSpecs = 45

// testUpstream runs all specs about NetworkPolicy of Kubernetes' own suite but those that need SCTP sockets, which not every
// kernel has.
func (c *cluster) testUpstream(t *testing.T) {
	if passed := c.upstream(t, `\] Netpol`); passed < leastSpecs {
		t.Errorf("%d upstream specs passed, want %d", passed, leastSpecs)
	}
}

// someSpecs are specs of each kind, for a second run of the suite where only what is below the policies differs.
func someSpecs() []string {
	return []string{
		"should support a 'default-deny-all' policy",
		"should enforce policy based on PodSelector and NamespaceSelector",
		"should allow ingress access on one named port",
		"should enforce except clause while egress access to server in CIDR block",
		"should stop enforcing policies after they are deleted",
	}
}

// testSomeUpstream runs a few specs of the upstream suite.
func (c *cluster) testSomeUpstream(t *testing.T) {
	var quoted []string
	for _, spec := range someSpecs() {
		quoted = append(quoted, regexp.QuoteMeta(spec))
	}
	// The name of the context ends the prefix, so that the same names over UDP are not meant.
	focus := `\] Netpol NetworkPolicy between server and client (` + strings.Join(quoted, "|") + ")"
	if passed := c.upstream(t, focus); passed != len(someSpecs()) {
		t.Errorf("%d upstream specs passed, want %d", passed, len(someSpecs()))
	}
}

// upstream runs the specs of the upstream suite that match, three at a time because they mostly wait, and returns how many
// have passed.
func (c *cluster) upstream(t *testing.T, focus string) int {
	t.Helper()
	folder := filepath.Join(c.root, "build", "e2e-logs", filepath.Base(t.Name()))
	if err := os.MkdirAll(folder, 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := try(t.Context(), command{
		name: c.tool("ginkgo"),
		args: []string{
			"--procs=3", "--no-color", "--succinct", "--timeout=24m", "--focus=" + focus, "--skip=SCTPConnectivity",
			c.tool("e2e.test"), "--", "--provider=local", "--disable-log-dump", "--report-dir=" + folder,
		},
		timeout: 25 * time.Minute,
	})
	log := filepath.Join(folder, "output.log")
	if writeErr := os.WriteFile(log, []byte(out), 0o600); writeErr != nil {
		t.Error(writeErr)
	}
	if err != nil {
		t.Errorf("%s has what the upstream suite says: %v", log, err)
	}
	passed := 0
	for _, spec := range readReport(t, folder) {
		switch {
		case spec.Status == "passed":
			passed++
		case spec.Status != "skipped":
			t.Errorf("%s: %s: %s", spec.Name, spec.Status, lastLines(spec.Failure.Message, 20))
		}
	}
	t.Logf("%d upstream specs passed", passed)
	return passed
}

// upstreamSpec is a spec in the upstream suite's report.
type upstreamSpec struct {
	Name    string `xml:"name,attr"`
	Status  string `xml:"status,attr"`
	Failure struct {
		Message string `xml:"message,attr"`
	} `xml:"failure"`
}

// readReport returns the specs about NetworkPolicy that the upstream suite has reported. What else is in its report are the
// suite's own steps.
func readReport(t *testing.T, folder string) []upstreamSpec {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(folder, "junit_01.xml"))
	if err != nil {
		t.Fatalf("the upstream suite left no report: %v", err)
	}
	var report struct {
		Specs []upstreamSpec `xml:"testsuite>testcase"`
	}
	if err = xml.Unmarshal(text, &report); err != nil {
		t.Fatalf("reading the upstream suite's report: %v", err)
	}
	var specs []upstreamSpec
	for _, spec := range report.Specs {
		if strings.HasPrefix(spec.Name, "[It] ") {
			specs = append(specs, spec)
		}
	}
	return specs
}

// lastLines returns the end of a text.
func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

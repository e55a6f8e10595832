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

// upstreamContext is where the specs stand in Kubernetes' own suite.
const upstreamContext = "Netpol NetworkPolicy between server and client "

// upstreamSpecs are the specs that must pass, by their full names there.
func upstreamSpecs() []string {
	return []string{
		"should support a 'default-deny-ingress' policy",
		"should support a 'default-deny-all' policy",
		"should enforce policy based on PodSelector and NamespaceSelector",
		"should allow ingress access on one named port",
		"should enforce except clause while egress access to server in CIDR block",
		"should enforce updated policy",
		"should stop enforcing policies after they are deleted",
	}
}

// testUpstream runs specs of Kubernetes' own suite and checks that each has run and passed.
func (c *cluster) testUpstream(t *testing.T) {
	folder := filepath.Join(c.root, "build", "e2e-logs", "upstream")
	if err := os.RemoveAll(folder); err != nil {
		t.Fatal(err)
	}
	var quoted []string
	for _, spec := range upstreamSpecs() {
		quoted = append(quoted, regexp.QuoteMeta(spec))
	}
	out, err := try(t.Context(), command{
		name: c.tool("e2e.test"),
		args: []string{
			"--provider=local", "--kubeconfig=" + os.Getenv("KUBECONFIG"), "--report-dir=" + folder, "--disable-log-dump",
			"--ginkgo.no-color", "--ginkgo.focus=" + upstreamContext + "(" + strings.Join(quoted, "|") + ")",
		},
		timeout: 8 * time.Minute,
	})
	if err != nil {
		t.Errorf("%v\n%s", err, lastLines(out, 60))
	}
	states := readReport(t, folder)
	for _, spec := range upstreamSpecs() {
		if state := states[spec]; state != "passed" {
			t.Errorf("%q: %s", spec, orNotRun(state))
		}
	}
	t.Logf("%d upstream specs passed", len(states))
}

// readReport returns the state of each spec that was run.
func readReport(t *testing.T, folder string) map[string]string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(folder, "junit_01.xml"))
	if err != nil {
		t.Fatalf("the upstream suite left no report: %v", err)
	}
	var report struct {
		Cases []struct {
			Name   string `xml:"name,attr"`
			Status string `xml:"status,attr"`
		} `xml:"testsuite>testcase"`
	}
	if err = xml.Unmarshal(text, &report); err != nil {
		t.Fatalf("reading the upstream suite's report: %v", err)
	}
	states := map[string]string{}
	for _, test := range report.Cases {
		_, spec, found := strings.Cut(test.Name, upstreamContext)
		if found && test.Status != "skipped" {
			spec, _, _ = strings.Cut(spec, " [")
			states[spec] = test.Status
		}
	}
	return states
}

// orNotRun names the state of a spec that the report does not have.
func orNotRun(state string) string {
	if state == "" {
		return "it did not run"
	}
	return state
}

// lastLines returns the end of a text.
func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

// Package measure helps tests and benchmarks to measure what other work on the machine does not change. It is for tests alone.
package measure

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/warren-cni/warren/pkg/reconcile"
)

// CPU returns the processor time that this process, and the programs that it ran and that have ended, have used.
func CPU() time.Duration { return reconcile.ProcessorTime() }

// Resident returns the resident memory of a process, in bytes.
func Resident(pid int) (int, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err //nolint:wrapcheck // it names the file
	}
	_, text, _ := strings.Cut(string(status), "\nVmRSS:")
	text, _, _ = strings.Cut(text, "kB")
	kilobytes, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		return 0, fmt.Errorf("reading the resident memory of process %d: %w", pid, err)
	}
	return kilobytes * 1024, nil
}

// PerOperation begins to count, and returns what reports the processor time of one operation as "cpu-ns/op".
func PerOperation(b *testing.B) (report func()) {
	b.Helper()
	before := CPU()
	return func() {
		b.Helper()
		b.ReportMetric(float64(CPU()-before)/float64(b.N), "cpu-ns/op")
	}
}

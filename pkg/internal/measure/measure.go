// Package measure helps benchmarks to measure what other work on the machine does not change. It is for tests alone.
package measure

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// CPU returns the processor time that this process, and the programs that it ran and that have ended, have used. The kernel's work for
// them is in it.
func CPU(tb testing.TB) time.Duration {
	tb.Helper()
	var sum int64
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if err := unix.Getrusage(who, &u); err != nil {
			tb.Fatal(err)
		}
		sum += u.Utime.Nano() + u.Stime.Nano()
	}
	return time.Duration(sum)
}

// PerOperation begins to count, and returns what reports the processor time of one operation as "cpu-ns/op".
func PerOperation(b *testing.B) (report func()) {
	b.Helper()
	before := CPU(b)
	return func() {
		b.Helper()
		b.ReportMetric(float64(CPU(b)-before)/float64(b.N), "cpu-ns/op")
	}
}

package reconcile

import (
	"time"

	"golang.org/x/sys/unix"
)

// ProcessorTime returns how long processors have worked for this process, and for the programs that it ran and that have ended. The kernel's
// work for them is in it.
func ProcessorTime() time.Duration {
	var sum int64
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		_ = unix.Getrusage(who, &u) // it fails for nobody else than these two
		sum += u.Utime.Nano() + u.Stime.Nano()
	}
	return time.Duration(sum)
}

package reconcile_test

import (
	"os/exec"
	"testing"
	"time"

	"github.com/warren-cni/warren/pkg/reconcile"
)

// What the process works counts, and what a program that it ran has worked; what it waits does not.
func TestProcessorTime(t *testing.T) {
	const enough, idle = 20 * time.Millisecond, 10 * time.Millisecond
	worked := func(do func()) time.Duration {
		before := reconcile.ProcessorTime()
		do()
		return reconcile.ProcessorTime() - before
	}
	if got := worked(func() {
		for end := time.Now().Add(10 * enough); time.Now().Before(end); { //nolint:forbidigo // what is measured is how it differs from the clock
		}
	}); got < enough {
		t.Errorf("work counts for %v", got)
	}
	if got := worked(func() {
		if err := exec.Command("sh", "-c", "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done").Run(); err != nil {
			t.Fatal(err)
		}
	}); got < enough {
		t.Errorf("a program that ran counts for %v", got)
	}
	if got := worked(func() { <-time.After(10 * idle) }); got > idle {
		t.Errorf("a wait counts for %v", got)
	}
}

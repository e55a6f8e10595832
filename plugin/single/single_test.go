package single

import (
	"runtime"
	"testing"
)

func TestSingle(t *testing.T) {
	if got := runtime.GOMAXPROCS(0); got != 1 {
		t.Errorf("%d processors", got)
	}
}

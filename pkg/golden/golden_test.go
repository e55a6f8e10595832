package golden_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/warren-cni/warren/pkg/golden"
)

// recorder is a test that goes on after it has failed.
type recorder struct {
	testing.TB
	failures int
}

func (r *recorder) Helper()               {}
func (r *recorder) Errorf(string, ...any) { r.failures++ }

func TestCompare(t *testing.T) {
	path := filepath.Join(t.TempDir(), "want.txt")
	if err := os.WriteFile(path, []byte("same\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]int{"same\n": 0, "same": 1, "": 1} {
		r := &recorder{TB: t}
		golden.Compare(r, path, text)
		if r.failures != want {
			t.Errorf("%q: %d failures", text, r.failures)
		}
	}
}

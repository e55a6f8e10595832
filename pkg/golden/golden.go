// Package golden compares what a test got with a file that holds what it wants. It is for tests of all folders.
package golden

import (
	"flag"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// update is the flag of every test binary that has golden files.
var update = flag.Bool("update", false, "write the golden files anew") //nolint:gochecknoglobals // a flag of go test

// Compare fails the test where the file does not hold exactly the text, or writes it with go test -update.
func Compare(tb testing.TB, path, got string) {
	tb.Helper()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil { //nolint:gosec // a file of the repository
			tb.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		tb.Errorf("%s differs (-want +got), go test -update writes it anew:\n%s", path, diff)
	}
}

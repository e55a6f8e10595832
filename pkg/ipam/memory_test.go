package ipam_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/ipam"
)

// What of the lock's file cannot be read is not written over.
func TestUnreadMemoryIsKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), ".lock")
	want := strings.Repeat("x", 64<<10)
	for _, mode := range []int{os.O_WRONLY, os.O_RDWR} {
		if err := os.WriteFile(path, []byte(want), 0o600); err != nil {
			t.Fatal(err)
		}
		file, err := os.OpenFile(path, mode, 0)
		if err != nil {
			t.Fatal(err)
		}
		ipam.Resave(int(file.Fd()))
		if err = file.Close(); err != nil {
			t.Error(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != want {
			t.Errorf("mode %d: the file is another, %v", mode, err)
		}
	}
}

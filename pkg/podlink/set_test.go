package podlink

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// What stands is not written again: a file that refuses every write keeps its value, and takes no other.
func TestSetWritesWhatDiffers(t *testing.T) {
	for _, c := range []struct {
		stands, value string
		sealed        bool
		want          error
	}{
		{"0\n", "0", true, nil},
		{"1\n", "0", true, unix.EPERM},
		{"10\n", "1", true, unix.EPERM},
		{"1\n", "0", false, nil},
	} {
		fd, err := unix.MemfdCreate("setting", unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = unix.Close(fd) }()
		path := fmt.Sprintf("/proc/self/fd/%d", fd)
		if err = os.WriteFile(path, []byte(c.stands), 0o600); err != nil {
			t.Fatal(err)
		}
		if c.sealed {
			if _, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_WRITE); err != nil {
				t.Fatal(err)
			}
		}
		if err = set(path, c.value); !errors.Is(err, c.want) {
			t.Errorf("set %q where %q stands (writes refused: %v): %v, want %v", c.value, c.stands, c.sealed, err, c.want)
		}
		if text, err := os.ReadFile(path); !c.sealed && (err != nil || string(text) != c.value+"\n") {
			t.Errorf("%q stands after set %q, error %v", text, c.value, err)
		}
	}
}

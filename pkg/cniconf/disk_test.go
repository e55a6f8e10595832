package cniconf_test

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/cniconf"
)

// disk is a place on a small file system of its own.
func disk(t *testing.T) place {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("node", dir, "tmpfs", 0, "size=128k,nr_inodes=48"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return place(dir)
}

// writable makes the file system take changes, or not.
func (p place) writable(t *testing.T, is bool) {
	t.Helper()
	var flag uintptr = unix.MS_RDONLY
	if is {
		flag = 0
	}
	if err := unix.Mount("node", string(p), "tmpfs", unix.MS_REMOUNT|flag, ""); err != nil {
		t.Fatal(err)
	}
}

// fill writes files of a size until the file system is full.
func (p place) fill(t *testing.T, size int) {
	t.Helper()
	err := os.Mkdir(p.folder("full"), 0o700)
	for i := 0; err == nil; i++ {
		err = os.WriteFile(filepath.Join(p.folder("full"), fmt.Sprint(i)), make([]byte, size), 0o600)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
}

// On a file system that is full, or read-only, every file stays as it was, nothing else is left, and the error says what to do. Once that is
// done all becomes what it shall be; and then nothing needs to be written any more.
func TestDiskTakesNothing(t *testing.T) {
	for name, c := range map[string]struct {
		spoil, mend func(*testing.T, place)
		advice      string
	}{
		"no bytes":  {func(t *testing.T, p place) { p.fill(t, 4<<10) }, emptied, "make room for bytes and files (df, df -i) on the file system of "},
		"no files":  {func(t *testing.T, p place) { p.fill(t, 0) }, emptied, "make room for bytes and files (df, df -i) on the file system of "},
		"read-only": {func(t *testing.T, p place) { p.writable(t, false) }, func(t *testing.T, p place) { p.writable(t, true) }, "make the file system of "},
	} {
		t.Run(name, func(t *testing.T) {
			p := disk(t)
			removed := p.prepare(t)
			bin, conf := read(t, p.folder("bin")), read(t, p.folder("conf"))
			c.spoil(t, p)
			for range 2 {
				err := victim(p)
				if err == nil {
					t.Fatal("it has installed: the control fails")
				}
				for _, folder := range []string{"bin", "conf"} {
					if !strings.Contains(err.Error(), c.advice+p.folder(folder)) {
						t.Errorf("it does not say what to do about %s: %v", folder, err)
					}
				}
				if now := read(t, p.folder("bin")); !maps.Equal(now, bin) {
					t.Errorf("the binaries are %q, not %q", now, bin)
				}
				if now := read(t, p.folder("conf")); len(now) != len(conf) || now["87-bridge.conflist"] != another || now["10-warren.conflist"]+now[".10-warren.conflist.earlier"] != mesh {
					t.Errorf("the configuration is %q, not %q, with ours aside or not", now, conf)
				}
			}
			c.mend(t, p)
			p.survives(t, removed)
		})
	}
}

// emptied makes room.
func emptied(t *testing.T, p place) {
	t.Helper()
	if err := os.RemoveAll(p.folder("full")); err != nil {
		t.Fatal(err)
	}
}

// Where all is as it shall be, nothing is written: also a read-only file system is good enough.
func TestNothingToWriteOnAReadOnlyDisk(t *testing.T) {
	p := disk(t)
	p.prepare(t)
	if err := victim(p); err != nil {
		t.Fatal(err)
	}
	p.writable(t, false)
	if err := victim(p); err != nil {
		t.Error(err)
	}
}

// What to do about a read-only file system is said once, also where writers that were killed have left files.
func TestAdviceIsGivenOnce(t *testing.T) {
	for name, install := range map[string]func(place) error{
		"conf": func(p place) error {
			_, err := cniconf.Install(p.folder("conf"), params(p.folder("run")))
			return err
		},
		"bin": func(p place) error {
			_, err := cniconf.InstallBinaries(p.folder("source"), p.folder("bin"))
			return err
		},
	} {
		p := disk(t)
		p.prepare(t)
		for _, file := range []string{"conf/." + cniconf.FileName + ".tmp1", "conf/." + cniconf.FileName + ".tmp2", "bin/.warren.tmp1", "bin/.warren.tmp2"} {
			if err := os.WriteFile(p.folder(file), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		p.writable(t, false)
		if err := install(p); err == nil || strings.Count(err.Error(), "make the file system of ") != 1 {
			t.Errorf("%s: got %v, want the advice once", name, err)
		}
	}
}

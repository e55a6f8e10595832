package cniconf_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/cniconf"
)

// victimDir is the variable that makes the test's program the one that is killed. Its value is the directory with the folders of a
// place.
const victimDir = "CNICONF_VICTIM_DIR"

// replacerDir is the like for the one that replaces a program again and again.
const replacerDir = "CNICONF_REPLACER_DIR"

func TestMain(m *testing.M) {
	run := func(p string, part func(place) error) {
		if p == "" {
			return
		}
		if err := part(place(p)); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	run(os.Getenv(victimDir), victim)
	run(os.Getenv(replacerDir), replacer)
	os.Exit(m.Run())
}

// replacer replaces a program by two versions in turn.
func replacer(p place) error {
	for i := range 100 {
		source := []string{"source", "older"}[i%2]
		if changed, err := cniconf.InstallBinaries(p.folder(source), p.folder("bin")); err != nil || len(changed) != 1 {
			return fmt.Errorf("changed %v: %w", changed, err)
		}
	}
	fmt.Println("replaced") //nolint:forbidigo // tells the test
	return nil
}

// place is a directory that holds a node's.
type place string

func (p place) folder(name string) string { return filepath.Join(string(p), name) }

// victim does what the daemon and its init container do. All its system calls are of one thread, so that they can be counted.
func victim(p place) error {
	runtime.LockOSThread()
	_, staleErr := cniconf.RemoveStale(p.folder("conf"), p.folder("run"))
	_, binErr := cniconf.InstallBinaries(p.folder("source"), p.folder("bin"))
	_, err := cniconf.Install(p.folder("conf"), params(p.folder("run")))
	return errors.Join(staleErr, binErr, err)
}

// Whoever is killed at any call while it installs leaves every file as it was or as it shall be, what comes next makes it what it
// shall be, and a removal, with or without that, what it was.
func TestKilledAtEveryCall(t *testing.T) {
	for kind, calls := range map[string]int{"write": 6, "fsync": 12, "renameat": 8, "fchmod": 6, "unlinkat": 1} {
		for what, survives := range map[string]func(place, *testing.T, map[string]map[string]string){
			"installed again": place.survives, "removed": place.isRemoved,
		} {
			t.Run(kind+"/"+what, func(t *testing.T) {
				killed := 0
				for hitAt(t, kind, "signal=KILL", killed+1, survives) {
					killed++
				}
				if killed < calls {
					t.Errorf("killed %d times, want at least %d", killed, calls)
				}
			})
		}
	}
}

// Whoever is refused any call while it installs, because a file system is full or read-only, says what to do, leaves nothing half-written, and
// every file as it was or as it shall be. What comes next makes it what it shall be.
func TestRefusedAtEveryCall(t *testing.T) {
	for kind, calls := range map[string]int{"write": 6, "fsync": 12, "renameat": 8, "fchmod": 6, "unlinkat": 1} {
		for fault, advice := range map[string]string{"ENOSPC": "make room", "EROFS": "writable"} {
			t.Run(kind+"/"+fault, func(t *testing.T) {
				refused := 0
				whole := func(p place, t *testing.T, before map[string]map[string]string) { p.isWhole(t, advice, before) } //nolint:thelper // like place.survives
				for hitAt(t, kind, "error="+fault, refused+1, whole) {
					refused++
				}
				if refused < calls {
					t.Errorf("refused %d times, want at least %d", refused, calls)
				}
			})
		}
	}
}

// isWhole checks what a victim left that was refused something, and what it said.
func (p place) isWhole(t *testing.T, advice string, before map[string]map[string]string) {
	t.Helper()
	if said := p.said(t); !strings.Contains(said, advice) {
		t.Errorf("it did not say what to do: %q", said)
	}
	for _, folder := range []string{"bin", "conf"} {
		for name := range read(t, p.folder(folder)) {
			if strings.Contains(name, ".tmp") {
				t.Errorf("it left %s", name)
			}
		}
	}
	p.survives(t, before)
}

// said returns what the victim has said.
func (p place) said(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile(p.folder("said"))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// hitAt has the n-th call of a kind that a victim makes hit by a fault, and says whether there was one.
func hitAt(t *testing.T, kind, fault string, n int, survives func(place, *testing.T, map[string]map[string]string)) bool {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	p := place(t.TempDir())
	before := p.prepare(t)
	cmd := exec.Command("strace", "-f", "-qq", "-o", p.folder("calls"), "-e", "trace="+kind, "-e", fmt.Sprintf("inject=%s:%s:when=%d", kind, fault, n), self)
	cmd.Env = append(os.Environ(), victimDir+"="+string(p))
	said, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	killed := errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
	if err != nil && exit == nil {
		t.Fatal(err)
	}
	calls, err := os.ReadFile(p.folder("calls"))
	if err = errors.Join(err, os.WriteFile(p.folder("said"), said, 0o600)); err != nil {
		t.Fatal(err)
	}
	hit := killed || strings.Contains(string(calls), "(INJECTED)")
	if !hit && len(said) > 0 {
		t.Fatalf("without a fault: %s", said)
	}
	t.Run(fmt.Sprint(n), func(t *testing.T) {
		if hit {
			survives(p, t, before)
		}
	})
	return hit
}

// Entries of another program in a conflist of ours, and of one that an earlier boot left.
const (
	mesh    = `{"plugins":[{"type":"warren"},{"type":"portmap"},{"type":"bandwidth"},{"type":"mesh"}]}`
	another = `{"plugins":[{"type":"bridge"}]}`
)

// prepare makes a node on which there is an older version, from before the last boot, beside another CNI. It returns what the
// directories shall hold once Warren is removed.
func (p place) prepare(t *testing.T) map[string]map[string]string {
	t.Helper()
	for folder, files := range map[string]map[string]string{
		"source": {"warren": "new", "portmap": "our portmap, newer", "loopback": "our loopback", "tuning": "our tuning"},
		"bin":    {"portmap": "another's portmap", "bridge": "another's", "tuning": "another's tuning"},
		"conf":   {"87-bridge.conflist": another, cniconf.FileName: mesh},
		"run":    {},
		"older":  {"warren": "old", "portmap": "our portmap"},
	} {
		if err := os.Mkdir(p.folder(folder), 0o700); err != nil {
			t.Fatal(err)
		}
		for name, text := range files {
			if err := os.WriteFile(filepath.Join(p.folder(folder), name), []byte(text), 0o700); err != nil {
				t.Fatal(err)
			}
		}
	}
	before := map[string]map[string]string{"bin": read(t, p.folder("bin")), "conf": read(t, p.folder("conf")), "run": {}}
	delete(before["conf"], cniconf.FileName)
	if _, err := cniconf.InstallBinaries(p.folder("older"), p.folder("bin")); err != nil {
		t.Fatal(err)
	}
	return before
}

// survives checks what the victim left, what the next one makes of it, and what a removal leaves.
func (p place) survives(t *testing.T, before map[string]map[string]string) {
	t.Helper()
	bin, conf := read(t, p.folder("bin")), read(t, p.folder("conf"))
	for name, ok := range map[string]bool{
		"warren":   bin["warren"] == "old" || bin["warren"] == "new",
		"portmap":  bin["portmap"] == "our portmap" || bin["portmap"] == "our portmap, newer",
		"loopback": bin["loopback"] == "our loopback" || bin["loopback"] == "" && !holds(bin, "loopback"),
		"tuning":   bin["tuning"] == "our tuning" || bin["tuning"] == "another's tuning",
		"bridge":   bin["bridge"] == "another's",
		"conflist": conf[cniconf.FileName] == mesh || strings.HasSuffix(conf[cniconf.FileName], "}\n") || !holds(conf, cniconf.FileName),
		"another":  conf["87-bridge.conflist"] == another,
	} {
		if !ok {
			t.Errorf("%s is neither old nor new: %q, %q", name, bin, conf)
		}
	}
	if err := victim(p); err != nil {
		t.Fatal(err)
	}
	bin, conf = read(t, p.folder("bin")), read(t, p.folder("conf"))
	if bin["warren"] != "new" || bin["portmap"] != "our portmap, newer" || bin["loopback"] != "our loopback" || bin["tuning"] != "our tuning" || len(bin) != 8 || len(conf) != 2 {
		t.Errorf("after another installation: %q, %q", bin, conf)
	}
	if diff := cmp.Diff([]string{"warren", "portmap", "bandwidth", "mesh"}, types(t, []byte(conf[cniconf.FileName]))); diff != "" {
		t.Errorf("the conflist (-want +got):\n%s", diff)
	}
	p.isRemoved(t, before)
}

// isRemoved removes everything and checks what is left.
func (p place) isRemoved(t *testing.T, before map[string]map[string]string) {
	t.Helper()
	if err := errors.Join(cniconf.Remove(p.folder("conf"), p.folder("run")), cniconf.RemoveBinaries(p.folder("bin"))); err != nil {
		t.Error(err)
	}
	for name, want := range before {
		if diff := cmp.Diff(want, read(t, p.folder(name))); diff != "" {
			t.Errorf("after the removal %s holds (-want +got):\n%s", name, diff)
		}
	}
}

// holds tells whether there is a file.
func holds(files map[string]string, name string) bool {
	_, ok := files[name]
	return ok
}

package cniconf_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/cniconf"
)

// folder writes files into a new directory.
func folder(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// read returns the files of a directory.
func read(t *testing.T, dir string) map[string]string {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, file := range list {
		text, err := os.ReadFile(filepath.Join(dir, file.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[file.Name()] = string(text)
	}
	return files
}

// install installs binaries and checks which of them changed.
func install(t *testing.T, source, target string, want ...string) {
	t.Helper()
	changed, err := cniconf.InstallBinaries(source, target)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, changed); diff != "" {
		t.Errorf("changed (-want +got):\n%s", diff)
	}
}

// remove removes the binaries, and checks that removing them again does nothing.
func remove(t *testing.T, target string) {
	t.Helper()
	for range 2 {
		if err := cniconf.RemoveBinaries(target); err != nil {
			t.Fatal(err)
		}
	}
}

// What stood in the directory before is there again after any number of versions, and other files are never touched.
func TestRemoveBinariesUndoesInstall(t *testing.T) {
	others := map[string]string{"flannel": "other", "portmap": "another's portmap", ".hidden": "x"}
	target := folder(t, others)
	version := func(text string) string {
		return folder(t, map[string]string{"warren": text, "portmap": "our portmap " + text, "loopback": "our loopback"})
	}
	first, second := version("1"), version("2")
	install(t, first, target, "loopback", "portmap", "warren")
	install(t, first, target)
	if got := read(t, target); got["portmap"] != "our portmap 1" || got["flannel"] != "other" {
		t.Errorf("installed: %v", got)
	}
	install(t, second, target, "portmap", "warren")
	install(t, first, target, "portmap", "warren") // a downgrade
	info, err := os.Stat(filepath.Join(target, "warren"))
	if err != nil || info.Mode().Perm() != 0o755 {
		t.Errorf("mode %v err %v", info.Mode(), err)
	}
	remove(t, target)
	if diff := cmp.Diff(others, read(t, target)); diff != "" {
		t.Errorf("after the removal (-want +got):\n%s", diff)
	}
}

// What others do to the directory meanwhile is theirs.
func TestRemoveBinariesLeavesWhatOthersPut(t *testing.T) {
	source := folder(t, map[string]string{"warren": "1", "portmap": "ours", "loopback": "ours", "bandwidth": "ours"})
	target := folder(t, map[string]string{"portmap": "old"})
	install(t, source, target, "bandwidth", "loopback", "portmap", "warren")
	for name, text := range map[string]string{"portmap": "a newer package's", "loopback": "a newer package's"} {
		if err := os.WriteFile(filepath.Join(target, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(target, "bandwidth")); err != nil {
		t.Fatal(err)
	}
	remove(t, target)
	want := map[string]string{"portmap": "a newer package's", "loopback": "a newer package's"}
	if diff := cmp.Diff(want, read(t, target)); diff != "" {
		t.Errorf("after the removal (-want +got):\n%s", diff)
	}

	install(t, source, target, "bandwidth", "loopback", "portmap", "warren") // over the newer package's, which it keeps
	remove(t, target)
	if diff := cmp.Diff(want, read(t, target)); diff != "" {
		t.Errorf("after the second removal (-want +got):\n%s", diff)
	}
}

// A record that is broken, or names what is not in the directory, deletes nothing but our own plugin.
func TestRemoveBinariesBelievesNoBrokenRecord(t *testing.T) {
	for _, record := range []string{"", "null", "{", `{"../outside": ["x"], "..": ["y"], ".": ["z"]}`, `{"portmap": "x"}`, `["portmap"]`} {
		target := folder(t, map[string]string{"warren": "1", "portmap": "another's", ".warren-installed": record})
		remove(t, target)
		if diff := cmp.Diff(map[string]string{"portmap": "another's"}, read(t, target)); diff != "" {
			t.Errorf("record %q (-want +got):\n%s", record, diff)
		}
		install(t, folder(t, map[string]string{"warren": "1"}), target, "warren")
	}
	if err := cniconf.RemoveBinaries(filepath.Join(t.TempDir(), "none")); err != nil {
		t.Errorf("a directory that is not there: %v", err)
	}
}

// What an older version without a record has installed is known by its content.
func TestInstallBinariesAdoptsTheSame(t *testing.T) {
	source := folder(t, map[string]string{"warren": "1", "portmap": "ours"})
	target := folder(t, map[string]string{"warren": "0", "portmap": "ours"})
	install(t, source, target, "portmap", "warren")
	remove(t, target)
	if got := read(t, target); len(got) != 0 {
		t.Errorf("left: %v", got)
	}
}

// A program that runs is replaced, and whoever starts it meanwhile starts the old or the new one, whole. It is replaced by another
// process: one that forks would lend its children the file that it writes.
func TestInstallBinariesReplacesARunningOne(t *testing.T) {
	p := place(t.TempDir())
	for folder, program := range map[string]string{"source": "true", "older": "sleep"} { // each says nothing, and succeeds
		path, err := exec.LookPath(program)
		if err == nil {
			err = os.Mkdir(p.folder(folder), 0o700)
		}
		data, readErr := os.ReadFile(path)
		if err = errors.Join(err, readErr, os.WriteFile(filepath.Join(p.folder(folder), "warren"), data, 0o700)); err != nil {
			t.Fatal(err)
		}
	}
	install(t, p.folder("older"), p.folder("bin"), "warren")
	path := filepath.Join(p.folder("bin"), "warren")
	running := exec.CommandContext(t.Context(), path, "600")
	if err := running.Start(); err != nil {
		t.Fatal(err)
	}
	if file, err := os.OpenFile(path, os.O_WRONLY, 0); !errors.Is(err, syscall.ETXTBSY) {
		t.Fatalf("the program does not run: it can be written (%v, %v)", file, err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	installer := exec.CommandContext(t.Context(), self)
	installer.Env = append(os.Environ(), replacerDir+"="+string(p))
	replaced := make(chan error, 1)
	go func() {
		out, err := installer.CombinedOutput()
		replaced <- errors.Join(err, errors.New(strings.TrimSpace(string(out))))
	}()
	for started := 0; ; started++ {
		select {
		case err := <-replaced:
			if err.Error() != "replaced" || started < 10 {
				t.Errorf("started %d times while it was replaced: %v", started, err)
			}
			if err := errors.Join(running.Process.Kill(), wantKilled(running.Wait())); err != nil {
				t.Error(err)
			}
			return
		default:
			if out, err := exec.CommandContext(t.Context(), path, "0").CombinedOutput(); err != nil {
				t.Fatalf("starting the program while it is replaced: %v: %s", err, out)
			}
		}
	}
}

// wantKilled is an error unless a process ended because it was killed.
func wantKilled(err error) error {
	if ended := new(exec.ExitError); errors.As(err, &ended) && ended.String() == "signal: killed" {
		return nil
	}
	return errors.Join(errors.New("the process did not run until it was killed"), err)
}

// What writers that were killed have left goes with the next write, and with the removal.
func TestUnfinishedFilesGo(t *testing.T) {
	litter := func(t *testing.T, dir string, names ...string) {
		t.Helper()
		for _, name := range names {
			if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	unfinished := func(t *testing.T, dir string) string {
		t.Helper()
		var found []string
		for name := range read(t, dir) {
			if strings.Contains(name, ".tmp") {
				found = append(found, name)
			}
		}
		return strings.Join(found, " ")
	}
	conf, run, bin := t.TempDir(), t.TempDir(), t.TempDir()
	for _, do := range []func() error{
		func() error {
			_, err := cniconf.Install(conf, params(run))
			_, binErr := cniconf.InstallBinaries(folder(t, map[string]string{"warren": "1", "portmap": "ours"}), bin)
			return errors.Join(err, binErr)
		},
		func() error { return errors.Join(cniconf.Remove(conf, run), cniconf.RemoveBinaries(bin)) },
	} {
		litter(t, conf, ".10-warren.conflist.tmp1", ".10-warren.conflist.tmp22")
		litter(t, bin, ".warren.tmp1", ".portmap.tmp5", "..warren-installed.tmp7")
		if err := do(); err != nil {
			t.Error(err)
		}
		if found := unfinished(t, conf) + unfinished(t, bin); found != "" {
			t.Errorf("left %s", found)
		}
	}
}

// What an installer has kept of another's plugin that was killed before it noted it goes as long as it is a copy. Where it may be the last
// one it stays, and is named; a program whose name only looks like it is another's.
func TestRemoveBinariesKeepsTheLastCopy(t *testing.T) {
	target := folder(t, map[string]string{
		"portmap": "another's", ".portmap.before-warren": "another's", "..portmap.before-warren.tmp7": "anoth",
		"tuning.before-warren": "x", "bridge.before-warren.tmp": "x",
	})
	remove(t, target)
	want := map[string]string{"portmap": "another's", "tuning.before-warren": "x", "bridge.before-warren.tmp": "x"}
	if diff := cmp.Diff(want, read(t, target)); diff != "" {
		t.Errorf("copies (-want +got):\n%s", diff)
	}
	for _, stands := range []map[string]string{{"portmap": "a newer one"}, {}} {
		stands[".portmap.before-warren"] = "another's"
		target = folder(t, stands)
		if err := cniconf.RemoveBinaries(target); err == nil || !strings.Contains(err.Error(), ".portmap.before-warren is left") {
			t.Errorf("%v: error %v", stands, err)
		}
		if diff := cmp.Diff(stands, read(t, target)); diff != "" {
			t.Errorf("the last one (-want +got):\n%s", diff)
		}
	}
}

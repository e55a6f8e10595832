package wgdevice_test

import (
	"bufio"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/keyproof"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// openKeys opens the keys of a directory.
func openKeys(t *testing.T, dir string) *wgdevice.Keys {
	t.Helper()
	keys, err := wgdevice.OpenKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// keyIn returns the key in use of a directory.
func keyIn(dir string) (wgdevice.Key, error) {
	keys, err := wgdevice.OpenKeys(dir)
	if err != nil {
		return wgdevice.Key{}, err
	}
	return keys.Current(), nil
}

// files returns the names and modes of what is in a directory.
func files(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, fmt.Sprintf("%s %04o", e.Name(), info.Mode().Perm()))
	}
	return found
}

func TestKeysChangeInTwoSteps(t *testing.T) {
	dir := t.TempDir()
	keys := openKeys(t, dir)
	first := keys.Current().Public()
	if _, ok := keys.Next(); ok {
		t.Error("a node that changes nothing has a next key")
	}
	if err := keys.Commit(); err == nil || keys.Current().Public() != first {
		t.Errorf("a commit without a next key: %v", err)
	}
	if err := keys.Prepare(); err != nil {
		t.Fatal(err)
	}
	next, ok := keys.Next()
	if !ok || next.Public() == first || keys.Current().Public() != first {
		t.Fatalf("prepared: %v", ok)
	}
	if got, want := files(t, dir), []string{"wireguard.key 0600", "wireguard.key.next 0600"}; !slices.Equal(got, want) {
		t.Errorf("files: %q, want %q", got, want)
	}
	if err := keys.Prepare(); err != nil {
		t.Fatal(err)
	}
	if again, _ := keys.Next(); again.Public() != next.Public() {
		t.Error("the second Prepare made another key")
	}
	again := openKeys(t, dir)
	if found, _ := again.Next(); found.Public() != next.Public() || again.Current().Public() != first {
		t.Error("a restart does not go on with the change")
	}
	if err := keys.Commit(); err != nil {
		t.Fatal(err)
	}
	if _, ok := keys.Next(); ok || keys.Current().Public() != next.Public() {
		t.Errorf("committed: next key %v", ok)
	}
	if age := time.Since(keys.Made()); age < -time.Second || age > time.Minute {
		t.Errorf("a key that was just made is %v old", age)
	}
	if got, want := files(t, dir), []string{"wireguard.key 0600"}; !slices.Equal(got, want) {
		t.Errorf("files: %q, want %q", got, want)
	}
	if found := openKeys(t, dir).Current().Public(); found != next.Public() {
		t.Error("a restart does not find the committed key")
	}
}

// TestKeysOutliveAttempts has a file under the hands of a commit: it succeeds where an attempt got half-way, and never puts in use what a
// restart would not find.
func TestKeysOutliveAttempts(t *testing.T) {
	dir := t.TempDir()
	keys := openKeys(t, dir)
	if err := keys.Prepare(); err != nil {
		t.Fatal(err)
	}
	next, _ := keys.Next()
	current, following := filepath.Join(dir, "wireguard.key"), filepath.Join(dir, "wireguard.key.next")
	if err := os.Rename(following, current); err != nil {
		t.Fatal(err)
	}
	if err := keys.Commit(); err != nil || keys.Current().Public() != next.Public() {
		t.Errorf("committing what was renamed: %v", err)
	}

	if err := keys.Prepare(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(following); err != nil {
		t.Fatal(err)
	}
	if err := keys.Commit(); err == nil || !strings.Contains(err.Error(), "somebody else changed") || keys.Current().Public() != next.Public() {
		t.Errorf("committing a key that is gone: %v", err)
	}
	if got := openKeys(t, dir); got.Current().Public() != next.Public() {
		t.Error("a restart finds another key than the one in use")
	}

	// A next key that cannot be read is no reason to make another one: it may be published already.
	if err := os.WriteFile(following, []byte("?"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := wgdevice.OpenKeys(dir); err == nil || !strings.Contains(err.Error(), following) || !strings.Contains(err.Error(), "restore it") {
		t.Errorf("opening a broken next key: %v", err)
	}
}

// TestKeysOnAFullDisk tries each write where there is no room, and where nothing may be written: the key in use stays.
func TestKeysOnAFullDisk(t *testing.T) {
	h := newHost(t)
	dir := t.TempDir()
	h.do(t, func() error { return unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16k") })
	room := filepath.Join(dir, "filler")
	fill := func() error {
		f, err := os.Create(room)
		if err != nil {
			return err
		}
		for err == nil {
			_, err = f.Write(make([]byte, 512))
		}
		return f.Close()
	}
	h.do(t, fill)
	if _, err := try(h, func() (*wgdevice.Keys, error) { return wgdevice.OpenKeys(dir) }); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("the first key on a full disk: %v", err)
	}
	h.do(t, func() error { return os.Remove(room) })
	keys := in(t, h, func() (*wgdevice.Keys, error) { return wgdevice.OpenKeys(dir) })
	first := keys.Current().Public()
	h.do(t, fill)
	if _, err := try(h, func() (any, error) { return nil, keys.Prepare() }); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "saving the WireGuard key") {
		t.Errorf("the next key on a full disk: %v", err)
	}
	if _, ok := keys.Next(); ok {
		t.Error("there is a next key that was not written")
	}
	h.do(t, func() error { return errors.Join(os.Remove(room), keys.Prepare()) })
	h.do(t, func() error { return unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, "") })
	if _, err := try(h, func() (any, error) { return nil, keys.Commit() }); !errors.Is(err, unix.EROFS) || keys.Current().Public() != first {
		t.Errorf("a commit where nothing may be written: %v", err)
	}
	found := in(t, h, func() (*wgdevice.Keys, error) { return wgdevice.OpenKeys(dir) })
	if found.Current().Public() != first {
		t.Error("a restart where nothing may be written finds another key")
	}
	h.do(t, func() error { return errors.Join(unix.Mount("", dir, "", unix.MS_REMOUNT, ""), keys.Commit()) })
	if keys.Current().Public() == first {
		t.Error("the commit did nothing")
	}
	h.do(t, func() error {
		left, err := filepath.Glob(filepath.Join(dir, ".wireguard*"))
		if len(left) > 0 {
			err = fmt.Errorf("left: %q", left)
		}
		return err
	})
}

// keysVariable names the directory in which this test's own program changes keys until it is killed.
const keysVariable = "WARREN_TEST_KEYS"

// TestKeysOutliveKills kills a process that does nothing but change keys: a restart finds the key that was in use, or the next one.
func TestKeysOutliveKills(t *testing.T) {
	if dir := os.Getenv(keysVariable); dir != "" {
		changeKeys(dir)
	}
	random, dir := soak.Random(t), t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, ".wireguard.key.123"), []byte("half a k"), 0o600); err != nil {
		t.Fatal(err)
	}
	const kills = 50
	changes, half := 0, 0
	var known [2]string // the key that was in use, and the next one
	for range kills {
		known = killed(t, dir, random, known, &changes)
		keys := openKeys(t, dir)
		found := hexOf(keys.Current())
		if !slices.Contains(known[:], found) {
			t.Fatalf("a restart finds %s, and neither %s, which was in use, nor %s, which was to follow", found, known[0], known[1])
		}
		known = [2]string{found, ""}
		if next, ok := keys.Next(); ok {
			half++
			known[1] = hexOf(next)
		}
		for _, name := range files(t, dir) {
			if name != "wireguard.key 0600" && name != "wireguard.key.next 0600" {
				t.Fatalf("after a kill and a restart there is %s", name)
			}
		}
	}
	t.Logf("%d kills during %d changes, %d of them between Prepare and Commit", kills, changes, half)
	if changes < kills {
		t.Errorf("only %d keys were changed before %d kills", changes, kills)
	}
}

// killed runs changeKeys for a while and returns the keys that it told last. It adds the changes that it told.
func killed(t *testing.T, dir string, random *rand.Rand, known [2]string, changes *int) [2]string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", "-test.run=^TestKeysOutliveKills$")
	cmd.Env = append(os.Environ(), keysVariable+"="+dir)
	output, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err = cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var kill *time.Timer
	for lines := bufio.NewScanner(output); lines.Scan(); {
		if kill == nil {
			kill = time.AfterFunc(time.Duration(random.IntN(30_000))*time.Microsecond, func() { _ = cmd.Process.Kill() })
		}
		what, key, _ := strings.Cut(lines.Text(), " ")
		switch what {
		case "current":
			*changes++
			known = [2]string{key, ""}
		case "next":
			known[1] = key
		default:
			t.Errorf("the process says %q", lines.Text())
		}
	}
	_ = cmd.Wait() // it was killed
	if kill == nil {
		t.Fatal("the process said nothing")
	}
	return known
}

// changeKeys changes keys for ever, and tells each before the step that could bring it into use.
func changeKeys(dir string) {
	keys, err := wgdevice.OpenKeys(dir)
	for err == nil {
		fmt.Printf("current %s\n", hexOf(keys.Current())) //nolint:forbidigo // this process was started to say so
		if err = keys.Prepare(); err != nil {
			break
		}
		next, _ := keys.Next()
		fmt.Printf("next %s\n", hexOf(next)) //nolint:forbidigo // the same
		err = keys.Commit()
	}
	fmt.Println(err) //nolint:forbidigo // the same
	os.Exit(1)
}

// hexOf is a key's public one as text.
func hexOf(k wgdevice.Key) string {
	public := k.Public()
	return hex.EncodeToString(public[:])
}

func TestKeyProvesItself(t *testing.T) {
	dir := t.TempDir()
	key := openKeys(t, dir).Current()
	proof, err := key.Proof("node-1", "uid-1")
	if err != nil {
		t.Fatal(err)
	}
	if !keyproof.Verify(key.Public(), "node-1", "uid-1", proof) {
		t.Error("the proof does not hold")
	}
	if keyproof.Verify(key.Public(), "node-2", "uid-1", proof) || keyproof.Verify(key.Public(), "node-1", "uid-2", proof) {
		t.Error("the proof holds for another node")
	}
}

func TestKeyFilesNamesEveryFile(t *testing.T) {
	for _, name := range []string{"wireguard.key", "wireguard.key.next", ".wireguard.key.123"} {
		matches := func(pattern string) bool { ok, err := filepath.Match(pattern, name); return ok && err == nil }
		if !slices.ContainsFunc(wgdevice.KeyFiles(), matches) {
			t.Errorf("%s is not among %q", name, wgdevice.KeyFiles())
		}
	}
}

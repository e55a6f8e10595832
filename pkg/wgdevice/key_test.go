package wgdevice_test

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/wgdevice"
)

func TestKeyIsMadeOnce(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	first, err := keyIn(dir)
	if err != nil {
		t.Fatal(err)
	}
	again, err := keyIn(dir)
	if err != nil || again.Public() != first.Public() {
		t.Errorf("the second load gave another key, or %v", err)
	}
	path := filepath.Join(dir, wgdevice.KeyFile)
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("the key's file: %v, %v", info.Mode(), err)
	}
	if entries, errRead := os.ReadDir(dir); errRead != nil || len(entries) != 1 {
		t.Errorf("the state directory holds %v, %v", entries, errRead)
	}
	other, err := keyIn(t.TempDir())
	if err != nil || other.Public() == first.Public() {
		t.Errorf("two nodes got one key, or %v", err)
	}
}

// TestKeyIsNeverReplaced gives files that are no good: each is an error that says what to do, and stays as it is.
func TestKeyIsNeverReplaced(t *testing.T) {
	good := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{7}, 32))
	for name, test := range map[string]struct {
		content string
		mode    os.FileMode
		message string
	}{
		"empty":              {"", 0o600, "restore it"},
		"short":              {"AAAA\n", 0o600, "restore it"},
		"not base64":         {strings.Repeat("?", 44), 0o600, "restore it"},
		"zeros":              {base64.StdEncoding.EncodeToString(make([]byte, 32)), 0o600, "restore it"},
		"more after the key": {good + "\n" + good, 0o600, "restore it"},
		"group may read it":  {good, 0o640, "chmod 0600"},
		"all may read it":    {good, 0o604, "chmod 0600"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, wgdevice.KeyFile)
			if err := os.WriteFile(path, []byte(test.content), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, test.mode); err != nil {
				t.Fatal(err)
			}
			_, err := keyIn(dir)
			if err == nil || !strings.Contains(err.Error(), test.message) || !strings.Contains(err.Error(), path) {
				t.Errorf("error %v, want one with %q and the path", err, test.message)
			}
			if err != nil && test.content != "" && strings.Contains(err.Error(), strings.TrimSpace(test.content)) {
				t.Errorf("the error shows the file: %v", err)
			}
			if content, err := os.ReadFile(path); err != nil || string(content) != test.content {
				t.Errorf("the file was changed to %q, %v", content, err)
			}
		})
	}

	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, wgdevice.KeyFile), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := keyIn(dir); err == nil {
		t.Error("a file that cannot be read gave a key")
	}
	// A state directory that cannot be written leaves nothing half-made.
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := keyIn(filepath.Join(file, "state")); err == nil {
		t.Error("a state directory that cannot be made gave a key")
	}
}

// A link to a key that is not there, as while its volume is not mounted, is not taken for no key: it stays, and later the key is found by it.
func TestKeyBehindALink(t *testing.T) {
	elsewhere := t.TempDir()
	want, err := keyIn(elsewhere)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{wgdevice.KeyFile, wgdevice.KeyFile + ".next"} {
		dir, away := t.TempDir(), filepath.Join(t.TempDir(), "volume")
		path := filepath.Join(dir, name)
		if err = os.Symlink(filepath.Join(away, wgdevice.KeyFile), path); err != nil {
			t.Fatal(err)
		}
		_, err = keyIn(dir)
		if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "mount the volume") {
			t.Errorf("%s leads to no file: error %v, want one that says to mount the volume", name, err)
		}
		if files, errRead := os.ReadDir(dir); errRead != nil || len(files) != 1 || files[0].Type() != os.ModeSymlink {
			t.Errorf("%s leads to no file: the state directory holds %v, %v", name, files, errRead)
		}
		if err = os.Symlink(elsewhere, away); err != nil {
			t.Fatal(err)
		}
		keys, err := wgdevice.OpenKeys(dir)
		if err != nil {
			t.Fatal(err)
		}
		key := keys.Current()
		if name != wgdevice.KeyFile {
			key, _ = keys.Next()
		}
		if key.Public() != want.Public() {
			t.Errorf("%s leads to a key again, and another one is used", name)
		}
	}
}

func TestKeyShowsNothing(t *testing.T) {
	dir := t.TempDir()
	key, err := keyIn(dir)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, wgdevice.KeyFile))
	if err != nil {
		t.Fatal(err)
	}
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}

	var shown bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%c", "%t", "%p"} {
		for _, value := range []any{key, &key, []wgdevice.Key{key}, struct{ K wgdevice.Key }{key}, struct{ k wgdevice.Key }{key}} {
			fmt.Fprintf(&shown, verb+"\n", value)
		}
	}
	shown.WriteString(key.String())
	object, err := json.Marshal(map[string]any{"key": key, "pointer": &key})
	if err != nil {
		t.Fatal(err)
	}
	shown.Write(object)
	slog.New(slog.NewTextHandler(&shown, nil)).Info("test", "key", key, "in", struct{ K wgdevice.Key }{key})
	slog.New(slog.NewJSONHandler(&shown, nil)).Info("test", "key", key, "in", struct{ K wgdevice.Key }{key})

	decimal := strings.Trim(fmt.Sprintf("%d", raw[:8]), "[]")
	for _, secret := range []string{strings.TrimSpace(string(text)), hex.EncodeToString(raw[:8]), decimal, string(raw[:8])} {
		if strings.Contains(strings.ToLower(shown.String()), strings.ToLower(secret)) {
			t.Errorf("%q is shown in:\n%s", secret, shown.String())
		}
	}
	if got := strings.Count(shown.String(), "(redacted)"); got < 40 {
		t.Errorf("the key is hidden %d times in:\n%s", got, shown.String())
	}
}

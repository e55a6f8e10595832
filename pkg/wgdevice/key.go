package wgdevice

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/keyproof"
)

const redacted = "(redacted)"

// Key is the node's private key. However it is printed, logged or marshalled, it shows nothing of itself.
type Key struct {
	// private returns the key. It is a function because package fmt reaches past all methods into unexported fields, and of a
	// function it shows no more than an address.
	private func() wgtypes.Key
	public  func() [32]byte
}

func newKey(private wgtypes.Key) Key {
	return Key{
		private: func() wgtypes.Key { return private },
		public:  sync.OnceValue(func() [32]byte { return private.PublicKey() }), // which costs a multiplication on the curve
	}
}

// Public returns the public key.
func (k Key) Public() [32]byte { return k.public() }

// Proof returns what shows other nodes that the holder of this key made it for the Node of that name and uid (see pkg/keyproof). Two
// proofs of the same differ.
func (k Key) Proof(node, uid string) ([64]byte, error) {
	proof, err := keyproof.Sign(k.private(), node, uid)
	if err != nil {
		return [64]byte{}, fmt.Errorf("proving the WireGuard key: %w", err)
	}
	return proof, nil
}

// String returns a word that says nothing of the key.
func (Key) String() string { return redacted }

// Format writes the same word for every verb, so that no %x or %d reaches the bytes.
func (Key) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, redacted) }

// LogValue keeps the key out of structured logs.
func (Key) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText keeps the key out of JSON and YAML.
func (Key) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// loadKey reads a key and when it was made. A file that cannot be read or understood is an error, and fs.ErrNotExist only where there is
// none, nor a symbolic link that leads to none: the key is there once the link leads to it again.
func loadKey(path string) (Key, time.Time, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		if _, errLink := os.Lstat(path); !errors.Is(errLink, fs.ErrNotExist) {
			return Key{}, time.Time{}, fmt.Errorf("reading the WireGuard key %s: it is a symbolic link that leads to no file: "+
				"mount the volume that it leads to, or delete the link for a new key", path)
		}
	}
	if err != nil {
		return Key{}, time.Time{}, fmt.Errorf("reading the WireGuard key: %w", err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return Key{}, time.Time{}, fmt.Errorf("reading the WireGuard key: %w", err)
	}
	if open := info.Mode().Perm() &^ 0o600; open != 0 {
		return Key{}, time.Time{}, fmt.Errorf("reading the WireGuard key %s: others may read it (mode %04o): chmod 0600 it, or delete it for a new key if others did",
			path, info.Mode().Perm())
	}
	text, err := io.ReadAll(io.LimitReader(f, 128))
	if err != nil {
		return Key{}, time.Time{}, fmt.Errorf("reading the WireGuard key: %w", err)
	}
	private, err := wgtypes.ParseKey(strings.TrimSpace(string(text)))
	if err != nil || private == (wgtypes.Key{}) {
		// The cause is left out: it may quote the file.
		return Key{}, time.Time{}, fmt.Errorf("reading the WireGuard key %s: it is not one line of base64 with 32 bytes: restore it, or delete it for a new key", path)
	}
	return newKey(private), info.ModTime(), nil
}

// loadOrMakeKey reads a key, and makes it where there is no file of it.
func loadOrMakeKey(path string) (Key, time.Time, error) {
	key, made, err := loadKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, made, err
	}
	private, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return Key{}, time.Time{}, fmt.Errorf("making a WireGuard key: %w", err)
	}
	if err = saveKey(path, private.String()+"\n"); err != nil {
		return Key{}, time.Time{}, fmt.Errorf("saving the WireGuard key %s: %w", path, err)
	}
	return loadKey(path)
}

// saveKey writes the file so that it is there whole or not at all, and readable for root alone from its first moment.
func saveKey(path, text string) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, draftFiles) // CreateTemp makes files with mode 0600
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return syncDirectory(dir)
}

// syncDirectory makes the names of a directory's files last.
func syncDirectory(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

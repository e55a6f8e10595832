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

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// KeyFile is the name of the private key's file in the state directory.
const KeyFile = "wireguard.key"

const redacted = "(redacted)"

// Key is the node's private key. However it is printed, logged or marshalled, it shows nothing of itself.
type Key struct {
	// private returns the key. It is a function because package fmt reaches past all methods into unexported fields, and of a
	// function it shows no more than an address.
	private func() wgtypes.Key
}

func newKey(private wgtypes.Key) Key {
	return Key{func() wgtypes.Key { return private }}
}

// Public returns the public key.
func (k Key) Public() [32]byte { return k.private().PublicKey() }

// String returns a word that says nothing of the key.
func (Key) String() string { return redacted }

// Format writes the same word for every verb, so that no %x or %d reaches the bytes.
func (Key) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, redacted) }

// LogValue keeps the key out of structured logs.
func (Key) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalText keeps the key out of JSON and YAML.
func (Key) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// LoadOrCreateKey returns the key in the directory's wireguard.key, the same for the life of the node. It makes a key only
// where there is no such file: a file that cannot be read or understood is an error, because a new key would cut the
// node off from every peer that knows the old one.
func LoadOrCreateKey(dir string) (Key, error) {
	path := filepath.Join(dir, KeyFile)
	key, err := loadKey(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if err = os.MkdirAll(dir, 0o700); err != nil {
		return Key{}, fmt.Errorf("making the state directory: %w", err)
	}
	private, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		return Key{}, fmt.Errorf("making a WireGuard key: %w", err)
	}
	if err = saveKey(dir, path, private.String()+"\n"); err != nil {
		return Key{}, fmt.Errorf("saving the WireGuard key %s: %w", path, err)
	}
	return newKey(private), nil
}

func loadKey(path string) (Key, error) {
	f, err := os.Open(path)
	if err != nil {
		return Key{}, fmt.Errorf("reading the WireGuard key: %w", err)
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return Key{}, fmt.Errorf("reading the WireGuard key: %w", err)
	}
	if open := info.Mode().Perm() &^ 0o600; open != 0 {
		return Key{}, fmt.Errorf("reading the WireGuard key %s: others may read it (mode %04o): chmod 0600 it, or delete it for a new key if others did",
			path, info.Mode().Perm())
	}
	text, err := io.ReadAll(io.LimitReader(f, 128))
	if err != nil {
		return Key{}, fmt.Errorf("reading the WireGuard key: %w", err)
	}
	private, err := wgtypes.ParseKey(strings.TrimSpace(string(text)))
	if err != nil || private == (wgtypes.Key{}) {
		// The cause is left out: it may quote the file.
		return Key{}, fmt.Errorf("reading the WireGuard key %s: it is not one line of base64 with 32 bytes: restore it, or delete it for a new key", path)
	}
	return newKey(private), nil
}

// saveKey writes the file so that it is there whole or not at all, and readable for root alone from its first moment.
func saveKey(dir, path, text string) error {
	f, err := os.CreateTemp(dir, "."+KeyFile+".*") // CreateTemp makes files with mode 0600
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
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

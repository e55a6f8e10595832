package wgdevice

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// The names of the keys' files in the state directory; a draft is what a crash leaves of a file that was being written.
const (
	KeyFile     = "wireguard.key"
	nextKeyFile = KeyFile + ".next"
	draftFiles  = "." + KeyFile + ".*"
)

// KeyFiles returns the names of all files that Keys writes, as patterns of path.Match.
func KeyFiles() []string { return []string{KeyFile, nextKeyFile, draftFiles} }

// Keys are the node's private key and, while it changes, the next one, as they are in the state directory.
//
// A change is Prepare, which writes the next key beside the one in use, and later Commit, which renames it into its place. So each file
// is at any moment a whole key or not there, and who opens the directory after a crash at any step finds the key that was in use, or the
// next one once it was committed. Its methods may be called by several goroutines.
type Keys struct {
	dir string

	mu      sync.Mutex
	current Key
	made    time.Time
	next    *Key
}

// OpenKeys returns the keys in the directory, and makes the first one where there is no file of it. A file that cannot be read or
// understood is an error, because a new key would cut the node off from every peer that knows the old one.
func OpenKeys(dir string) (*Keys, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	k := &Keys{dir: dir}
	k.removeDrafts()
	next, _, err := loadKey(k.path(nextKeyFile))
	switch {
	case err == nil:
		k.next = &next
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	if k.current, k.made, err = loadOrMakeKey(k.path(KeyFile)); err != nil {
		return nil, err
	}
	return k, nil
}

// removeDrafts deletes what a crash left of files that were being written. Nobody ever used those keys, so where it fails no harm is
// done.
func (k *Keys) removeDrafts() {
	drafts, _ := filepath.Glob(k.path(draftFiles)) // the pattern is a good one
	for _, draft := range drafts {
		_ = os.Remove(draft)
	}
}

// Current returns the key in use, the same for the life of the node unless it is changed.
func (k *Keys) Current() Key {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.current
}

// Made returns when the key in use was made.
func (k *Keys) Made() time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.made
}

// Next returns the key that the node is about to use, and whether there is one.
func (k *Keys) Next() (Key, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.next == nil {
		return Key{}, false
	}
	return *k.next, true
}

// Prepare makes the next key, unless there is one already. After an error there is none, and the key in use is as it was.
func (k *Keys) Prepare() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.next != nil {
		return nil
	}
	next, _, err := loadOrMakeKey(k.path(nextKeyFile)) // it is there where an earlier attempt could not make it last
	if err != nil {
		return err
	}
	k.next = &next
	return nil
}

// Commit puts the next key in the place of the one in use, for good. After an error it may be called again; until it succeeds the key in
// use is the old one.
func (k *Keys) Commit() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.next == nil {
		return errors.New("changing the WireGuard key: no next key is prepared")
	}
	err := os.Rename(k.path(nextKeyFile), k.path(KeyFile))
	if err == nil || errors.Is(err, fs.ErrNotExist) { // gone: an earlier attempt renamed it and could not make that last
		err = syncDirectory(k.dir)
	}
	if err != nil {
		return fmt.Errorf("changing the WireGuard key: %w", err)
	}
	// Read and not remembered: what is in use from here on is what a restart will find.
	current, made, err := loadKey(k.path(KeyFile))
	if err != nil {
		return err
	}
	if current.Public() != k.next.Public() {
		return fmt.Errorf("changing the WireGuard key: somebody else changed %s: restart the daemon", k.path(KeyFile))
	}
	k.current, k.made, k.next = current, made, nil
	return nil
}

// path is the path of one of the files.
func (k *Keys) path(name string) string { return filepath.Join(k.dir, name) }

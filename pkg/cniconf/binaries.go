package cniconf

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// recordName is the file beside the binaries that says which of them are ours.
const recordName = ".warren-installed"

// record has the hashes of what was installed under each name: of the newest, and of the one that it replaces, which is still there
// where the installer was killed.
type record map[string][]string

// beforeSuffix ends the names of the files that before names.
const beforeSuffix = ".before-warren"

// before is where a file of another program stays whose place a binary of ours has taken.
func before(path string) string {
	return filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+beforeSuffix)
}

// InstallBinaries copies every file of source to target, each atomically, so that a binary that runs is replaced and not
// written into. It returns the names of those that changed. What another program had put there under such a name is kept for
// RemoveBinaries to put back; the other files of target are not touched.
func InstallBinaries(source, target string) ([]string, error) {
	files, err := os.ReadDir(source)
	if err != nil {
		return nil, fmt.Errorf("reading the plugin binaries: %w", err)
	}
	if err = advised(target, os.MkdirAll(target, 0o755)); err != nil { //nolint:gosec // the directory is shared with other CNIs and runtimes
		return nil, fmt.Errorf("making the plugin directory: %w", err)
	}
	ours, err := readRecord(target)
	if err != nil {
		return nil, err
	}
	var changed []string
	for _, file := range files {
		data, err := os.ReadFile(filepath.Join(source, file.Name()))
		if err != nil {
			return changed, fmt.Errorf("reading plugin %s: %w", file.Name(), err)
		}
		did, err := installBinary(filepath.Join(target, file.Name()), data, ours)
		if err != nil {
			return changed, fmt.Errorf("installing plugin %s: %w", file.Name(), err)
		}
		if did {
			changed = append(changed, file.Name())
		}
	}
	return changed, nil
}

// installBinary makes one binary what it shall be, and reports whether it was something else. It is on record before it is in place,
// and what it replaces is kept before that: whoever is killed between leaves nothing that would be taken for what it is not.
func installBinary(path string, data []byte, ours record) (bool, error) {
	name, installed := filepath.Base(path), []string{hash(data)}
	if err := removeUnfinished(before(path)); err != nil {
		return false, err
	}
	current, err := os.ReadFile(path)
	known := slices.Contains(ours[name], hash(current))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	case err == nil && known && bytes.Equal(current, data):
		return false, removeUnfinished(path)
	case err == nil && known:
		installed = append(installed, hash(current))
	case err == nil && name != pluginType && !bytes.Equal(current, data): // the same is ours, of a version that kept no record
		err = writeFile(before(path), current, 0o755)
	}
	if err != nil {
		return false, err
	}
	ours[name] = installed
	if err := writeRecord(filepath.Dir(path), ours); err != nil {
		return false, err
	}
	return true, writeFile(path, data, 0o755)
}

// RemoveBinaries undoes InstallBinaries: our plugin goes, and so do the others that we installed, unless somebody has replaced them
// since; what stood in their place before comes back.
func RemoveBinaries(target string) error {
	ours, err := readRecord(target)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(ours)) {
		if err := removeBinary(filepath.Join(target, name), ours[name]); err != nil {
			errs = append(errs, fmt.Errorf("removing plugin %s: %w", name, err))
		}
	}
	errs = append(errs, removeFile(filepath.Join(target, pluginType)), removeKept(target, ours)) // whoever wrote it
	if errors.Join(errs...) == nil {
		errs = append(errs, removeFile(filepath.Join(target, recordName)))
	}
	for _, name := range []string{pluginType, recordName} {
		if err := removeUnfinished(filepath.Join(target, name)); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// removeBinary undoes one installation.
func removeBinary(path string, installed []string) error {
	errs := []error{removeUnfinished(path), removeUnfinished(before(path))}
	current, err := os.ReadFile(path)
	switch {
	case err == nil && !slices.Contains(installed, hash(current)): // another's now
		err = removeFile(before(path))
	case err == nil || errors.Is(err, fs.ErrNotExist):
		if err = os.Rename(before(path), path); errors.Is(err, fs.ErrNotExist) {
			err = removeFile(path)
		}
	}
	return errors.Join(append(errs, err)...)
}

// removeKept deletes what an installer kept of others' files that was killed before it had noted it, and so before it took their place:
// copies of files that stand. Where such a file is not what stands, it may be the last one of another's, and stays.
func removeKept(target string, ours record) error {
	files, err := os.ReadDir(target)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, file := range files {
		kept, isKept := strings.CutSuffix(strings.TrimPrefix(file.Name(), "."), beforeSuffix)
		path := filepath.Join(target, file.Name())
		switch name, _, unfinished := strings.Cut(file.Name(), beforeSuffix+".tmp"); {
		case unfinished && strings.HasPrefix(name, ".."):
			errs = append(errs, removeFile(path))
		case isKept && path == before(filepath.Join(target, kept)) && ours[kept] == nil:
			errs = append(errs, removeCopy(path, filepath.Join(target, kept)))
		}
	}
	return errors.Join(errs...)
}

// removeCopy deletes a file whose content another one has.
func removeCopy(path, of string) error {
	data, err := os.ReadFile(path)
	original, originalErr := os.ReadFile(of)
	if err != nil {
		return err
	}
	if originalErr != nil || !bytes.Equal(data, original) {
		return fmt.Errorf("%s is left: another program's plugin, which is not %s as it is now, and no record says where it belongs: move it to its place or delete it", path, of)
	}
	return removeFile(path)
}

// hash is how a record knows a file's content.
func hash(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// readRecord returns which binaries are ours. One that cannot be understood says of none that it is: it stays.
func readRecord(target string) (record, error) {
	data, err := os.ReadFile(filepath.Join(target, recordName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("reading which plugins are ours: %w", err)
	}
	var ours record
	if broken := json.Unmarshal(data, &ours); broken != nil || ours == nil {
		return record{}, nil //nolint:nilerr // it says so
	}
	maps.DeleteFunc(ours, func(name string, _ []string) bool { // nothing outside of the directory
		return name != filepath.Base(name) || name == "." || name == ".."
	})
	return ours, nil
}

// writeRecord notes which binaries are ours.
func writeRecord(target string, ours record) error {
	data, err := json.Marshal(ours)
	if err == nil {
		err = writeFile(filepath.Join(target, recordName), append(data, '\n'), 0o644)
	}
	if err != nil {
		return fmt.Errorf("noting which plugins are ours: %w", err)
	}
	return nil
}

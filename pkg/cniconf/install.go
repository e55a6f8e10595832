package cniconf

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// aside is where RemoveStale keeps a conflist of an earlier boot: its name ends in nothing that a runtime loads.
const aside = "." + FileName + ".earlier"

// markerName is the file in the run directory that says that the conflist was written in this boot.
const markerName = "conflist-written"

// Install writes the conflist to dir, keeping what other programs added to it, and reports whether it changed.
//
// A conflist that cannot be parsed is set aside under a name that says so, because the node would otherwise stay without
// a network; the error that comes with changed == true names it.
func Install(dir string, p Params) (changed bool, err error) {
	path := filepath.Join(dir, FileName)
	existing, err := readEither(path, filepath.Join(dir, aside))
	if err != nil {
		return false, err
	}
	data, renderErr := Render(existing, p)
	if renderErr != nil {
		broken := path + ".broken"
		if err = writeFile(broken, existing, 0o600); err != nil {
			return false, errors.Join(renderErr, err)
		}
		renderErr = fmt.Errorf("%w (the old file is kept as %s)", renderErr, broken)
		if data, err = Render(nil, p); err != nil {
			return false, errors.Join(renderErr, err)
		}
	}
	current, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("reading the conflist: %w", err)
	}
	if !bytes.Equal(current, data) {
		changed = true
		if err := writeFile(path, data, 0o644); err != nil {
			return false, fmt.Errorf("writing the conflist: %w", err)
		}
	}
	if err := removeFile(filepath.Join(dir, aside)); err != nil {
		return changed, fmt.Errorf("removing the conflist of an earlier boot: %w", err)
	}
	if err := mark(p.RunDir); err != nil {
		return changed, err
	}
	return changed, renderErr
}

// mark notes in the run directory, which does not outlive a boot, that the conflist is of this boot.
func mark(runDir string) error {
	path := filepath.Join(runDir, markerName)
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if err := advised(path, os.WriteFile(path, nil, 0o600)); err != nil {
		return fmt.Errorf("noting that the conflist is of this boot: %w", err)
	}
	return nil
}

// RemoveStale takes away a conflist that an earlier boot left, and reports whether it did. Until the daemon has written a
// new one the runtime starts no pod: nothing enforces policy yet, and nothing encrypts. What other programs had added is
// kept for the next Install.
func RemoveStale(dir, runDir string) (bool, error) {
	_, err := os.Stat(filepath.Join(runDir, markerName))
	if err == nil {
		return false, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("looking whether the conflist is of this boot: %w", err)
	}
	err = advised(filepath.Join(dir, aside), os.Rename(filepath.Join(dir, FileName), filepath.Join(dir, aside)))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("setting the conflist of an earlier boot aside: %w", err)
	}
	return true, nil
}

// Remove deletes the conflist and what is kept beside it. A conflist that others have added to goes too: without our
// entry it could not give a pod an address.
func Remove(dir, runDir string) error {
	var errs []error
	for _, path := range []string{
		filepath.Join(dir, FileName), filepath.Join(dir, aside), filepath.Join(dir, FileName+".broken"),
		filepath.Join(runDir, markerName),
	} {
		errs = append(errs, removeFile(path))
	}
	for _, path := range []string{FileName, FileName + ".broken"} {
		if err := removeUnfinished(filepath.Join(dir, path)); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("removing the conflist: %w", err)
	}
	return nil
}

// readEither returns the content of the first file that exists, nil where none does.
func readEither(paths ...string) ([]byte, error) {
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err == nil {
			return data, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("reading the conflist: %w", err)
		}
	}
	return nil, nil
}

// writeFile replaces path atomically: whoever reads it sees the old content or the whole new one, also after a crash. What a
// writer that was killed has left goes.
func writeFile(path string, data []byte, mode fs.FileMode) error {
	if err := removeUnfinished(path); err != nil {
		return err
	}
	return advised(path, replace(path, data, mode))
}

// advised says what to do where an error is that a file system takes no changes.
func advised(path string, err error) error {
	dir := filepath.Dir(path)
	switch {
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: make room for bytes and files (df, df -i) on the file system of %s", err, dir)
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w: make the file system of %s writable", err, dir)
	default:
		return err
	}
}

// replace is writeFile without its advice, and leaves what others have left.
func replace(path string, data []byte, mode fs.FileMode) error {
	file, err := os.CreateTemp(filepath.Dir(path), unfinished(path)+"*")
	if err != nil {
		return err
	}
	if err = fill(file, data, mode); err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	if err = os.Rename(file.Name(), path); err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	return syncFolder(filepath.Dir(path))
}

// syncFolder makes what was renamed in a folder outlive a crash of the machine.
func syncFolder(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// unfinished is how the names begin of what is being written for path.
func unfinished(path string) string { return "." + filepath.Base(path) + ".tmp" }

// removeUnfinished deletes what writers of path have left that did not come to their end.
func removeUnfinished(path string) error {
	files, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	var errs []error
	for _, file := range files {
		if strings.HasPrefix(file.Name(), unfinished(path)) {
			errs = append(errs, remove(filepath.Join(filepath.Dir(path), file.Name())))
		}
	}
	return advised(path, errors.Join(errs...)) // once for all
}

// removeFile deletes a file that may be gone already.
func removeFile(path string) error { return advised(path, remove(path)) }

// remove is removeFile without its advice.
func remove(path string) error {
	err := os.Remove(path)
	if err == nil {
		return nil
	}
	if _, statErr := os.Lstat(path); errors.Is(statErr, fs.ErrNotExist) { // a read-only file system refuses that, too
		return nil
	}
	return err
}

// fill writes a temporary file to the disk and closes it.
func fill(file *os.File, data []byte, mode fs.FileMode) error {
	_, err := file.Write(data)
	if err == nil {
		err = file.Chmod(mode)
	}
	if err == nil {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

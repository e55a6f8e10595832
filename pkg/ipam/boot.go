package ipam

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// bootFile says in which boot the leases were made.
const bootFile = ".boot"

// bootID returns what tells this boot from all others.
func bootID() (string, error) {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("reading the boot's id: %w", err)
	}
	return strings.TrimSpace(string(id)), nil
}

// StartBoot frees all that was leased before the machine was booted, and returns how many leases that were: their pods are gone. It
// matters where the directory is no tmpfs, and has to be called before anything is leased in a boot. Leases that nothing says to
// be of another boot stay.
func (s *Store) StartBoot() (freed int, err error) {
	l, err := s.lock()
	if err != nil {
		return 0, err
	}
	defer l.unlock()
	if freed, err = s.startBoot(); err != nil {
		return freed, fmt.Errorf("freeing the leases of another boot: %w", err)
	}
	return freed, nil
}

// startBoot does the work of StartBoot under the lock. The boot's name is written last, so that what a killed process left of
// the work is done the next time.
func (s *Store) startBoot() (freed int, err error) {
	now, err := s.bootID()
	if err != nil {
		return 0, err
	}
	data, err := readFile(unix.AT_FDCWD, s.path(bootFile), make([]byte, 64), nil)
	switch {
	case errors.Is(err, unix.EISDIR):
		if err = s.setAside(bootFile); err != nil {
			return 0, err
		}
	case err != nil && !errors.Is(err, unix.ENOENT) && !isForeign(err): // to name this boot would keep another's leases for good
		return 0, fmt.Errorf("reading %s: %w", s.path(bootFile), err)
	}
	before := strings.TrimSpace(string(data))
	if err == nil && before == now {
		return 0, nil
	}
	// What another boot forgot says nothing of what this one releases. Without it the next Forget comes first.
	if goneErr := os.RemoveAll(s.path(forgotten)); goneErr != nil {
		return 0, goneErr
	}
	if err == nil && len(before) == len(now) { // else it was cut off
		if freed, err = s.freeAll(); err != nil {
			return freed, err
		}
	}
	unnamed, err := s.draft([]byte(now))
	if err == nil {
		err = rename(unnamed, s.path(bootFile))
	}
	return freed, err
}

// freeAll removes every lease, and what cools down.
func (s *Store) freeAll() (freed int, err error) {
	names, err := s.names()
	if err != nil {
		return 0, err
	}
	for _, name := range names {
		_, isAddress := addressNamed(name)
		if isAttachment(name) {
			freed++
		}
		if isAttachment(name) || isAddress {
			if err = os.RemoveAll(s.path(name)); err != nil {
				return freed, err
			}
		}
	}
	cooled, err := s.cooled()
	for _, file := range cooled {
		err = errors.Join(err, os.RemoveAll(s.coolingPath(file.name)))
	}
	return freed, err
}

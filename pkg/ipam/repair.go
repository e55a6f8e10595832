package ipam

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// aside is the directory of what was found in the way, kept for the operator.
const aside = ".aside"

// Repair gives an address its file again that a lease names and that has none, and sets aside what is in the directory and belongs to no
// lease:
//   - a file whose name is that of no lease;
//   - the file of an attachment that has no address, neither by what it says nor by being its file: it says none, or those of others;
//   - the file of an address that nobody can be told to hold. The address stays taken while stands says that something in the kernel still
//     leads to it, and cools down then.
//
// A lease whose content is lost but whose names are there is left: its addresses end with its attachment.
//
// It returns the addresses that have a file again; Aside says what is set aside.
func (s *Store) Repair(stands func(netip.Addr) (bool, error)) (restored []netip.Addr, err error) {
	leases, _ := s.List() // what is no lease is what is looked for
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	short := incomplete(leases, addressesNamed(names))
	if names = unexplained(names, leases); len(names)+len(short) == 0 {
		return nil, nil
	}
	l, err := s.lock()
	if err != nil {
		return nil, err
	}
	defer l.unlock()
	var errs []error
	for _, lease := range short {
		completed, completeErr := s.complete(attachment(lease.ContainerID, lease.Interface))
		restored = append(restored, completed...)
		errs = append(errs, completeErr)
	}
	if err = s.repair(l, names, stands); err != nil {
		errs = append(errs, fmt.Errorf("setting aside what is no lease: %w", err))
	}
	return restored, errors.Join(errs...)
}

// Aside returns the paths of what was set aside, and is kept for the operator: of what was in the directory, and what was in its place.
func (s *Store) Aside() ([]string, error) {
	paths, err := filepath.Glob(s.dir + aside + "-*")
	names, listErr := s.list(aside)
	for _, name := range names {
		paths = append(paths, s.path(aside)+"/"+name)
	}
	return paths, errors.Join(err, listErr)
}

// repair sets aside under the lock, of files that may be gone by now or be those of a lease, what is none. It goes on after an error.
func (s *Store) repair(l lock, names []string, stands func(netip.Addr) (bool, error)) error {
	now, err := s.now()
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range names {
		if a, ok := addressNamed(name); ok {
			err = s.repairAddress(l, a, stands, now)
		} else {
			err = s.repairName(name)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// repairName sets a file aside that is no attachment's, or no longer.
func (s *Store) repairName(name string) error {
	if isAttachment(name) {
		lease, err := s.read(name)
		if err != nil && !errors.Is(err, errNoLease) {
			return nil // that cannot be told now
		}
		held, err := s.addressesOf(name, lease.Addresses)
		if err != nil || len(held) > 0 {
			return err
		}
	}
	return s.setAside(name)
}

// repairAddress frees an address that is nobody's, and sets its file aside.
func (s *Store) repairAddress(l lock, a netip.Addr, stands func(netip.Addr) (bool, error), now time.Duration) error {
	name := a.String()
	if _, err := s.read(name); !errors.Is(err, errNoLease) {
		return nil // somebody can be told to hold it, or that cannot be told now
	}
	claimed, err := s.claimed(name)
	if err != nil || claimed {
		return err
	}
	standing, err := stands(a)
	if err != nil || standing {
		return err
	}
	info, err := os.Lstat(s.path(name))
	if err != nil {
		return err
	}
	if info.IsDir() {
		return s.setAside(name)
	}
	if err = s.newPlace(name, os.Link); err != nil {
		return err
	}
	return s.cool(l, []netip.Addr{a}, now)
}

// claimed says whether the file of that name is also that of an attachment.
func (s *Store) claimed(name string) (bool, error) {
	file, err := os.Lstat(s.path(name))
	if err != nil {
		return false, err
	}
	names, err := s.names()
	if err != nil {
		return false, err
	}
	for _, other := range names {
		if !isAttachment(other) {
			continue
		}
		if info, statErr := os.Lstat(s.path(other)); statErr == nil && os.SameFile(file, info) {
			return true, nil
		}
	}
	return false, nil
}

// setAside moves a file away that is in the way.
func (s *Store) setAside(name string) error { return s.newPlace(name, rename) }

// makeDirectory makes a directory in the place of anything else, also of a link, which away moves.
func makeDirectory(path string, away func(path string) error) error {
	file, err := lstat(path)
	switch {
	case err == nil && file.Mode&unix.S_IFMT == unix.S_IFDIR:
		return nil
	case err == nil:
		err = away(path)
	case errors.Is(err, fs.ErrNotExist):
		err = nil
	}
	if err != nil {
		return err
	}
	if err = unix.Mkdir(path, 0o700); err != nil && !errors.Is(err, unix.EEXIST) { // another may have been faster
		return &fs.PathError{Op: "mkdir", Path: path, Err: err}
	}
	return nil
}

// moveBeside gives what is at a path and is no directory a name beside it that nothing has. It needs no lock: it takes the place of a new
// file, which a directory cannot, and so not the one that another has made there meanwhile.
func moveBeside(path string) error {
	file, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+aside+"-*")
	if err != nil {
		return err
	}
	_ = file.Close()
	if err = rename(path, file.Name()); err == nil {
		return nil
	}
	if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENOENT) { // another was faster
		err = nil
	}
	return errors.Join(err, unlink(file.Name()))
}

// newPlace gives a file a path that nothing has where it is aside, by rename or link.
func (s *Store) newPlace(name string, move func(from, to string) error) error {
	err := makeDirectory(s.path(aside), moveBeside)
	if err != nil {
		return fmt.Errorf("making the directory of what is set aside: %w", err)
	}
	first := s.path(aside) + "/" + filepath.Base(name) // also of what cools down
	path := first
	for i := 1; ; i++ {
		if _, err = os.Lstat(path); err != nil {
			break
		}
		path = fmt.Sprintf("%s.%d", first, i)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return move(s.path(name), path)
}

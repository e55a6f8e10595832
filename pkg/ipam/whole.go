package ipam

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// Check returns the addresses of an attachment, and an error that names everything of its lease that is not as Allocate made it.
func (s *Store) Check(containerID, ifname string) ([]netip.Addr, error) {
	name := attachment(containerID, ifname)
	var file unix.Stat_t
	lease, err := s.readStat(name, &file)
	if err == nil && s.isWhole(lease, &file) {
		return lease.Addresses, nil
	}
	held, heldErr := s.addressesOf(name, lease.Addresses)
	wrong := []error{err, heldErr}
	for _, a := range lease.Addresses {
		switch named, statErr := lstat(s.path(a.String())); {
		case errors.Is(statErr, fs.ErrNotExist):
			wrong = append(wrong, fmt.Errorf("lease %s: its address %s has no file %s", name, a, s.path(a.String())))
		case statErr != nil:
			wrong = append(wrong, statErr)
		case !isSame(&named, &file):
			wrong = append(wrong, fmt.Errorf("lease %s: the file %s of its address is another's", name, s.path(a.String())))
		}
	}
	for _, a := range held {
		if err == nil && !slices.Contains(lease.Addresses, a) {
			wrong = append(wrong, fmt.Errorf("lease %s: it does not name its address %s", name, a))
		}
	}
	return held, errors.Join(wrong...)
}

// isWhole says whether the file of a lease has the names that the lease says, and no other.
func (s *Store) isWhole(lease Lease, file *unix.Stat_t) bool {
	for i, a := range lease.Addresses {
		named, err := lstat(s.path(a.String()))
		if err != nil || !isSame(&named, file) || slices.Contains(lease.Addresses[:i], a) {
			return false
		}
	}
	return int(file.Nlink) == 1+len(lease.Addresses) //nolint:gosec // as many as a file has names
}

// isSame says whether two names are one file's.
func isSame(a, b *unix.Stat_t) bool { return a.Dev == b.Dev && a.Ino == b.Ino }

// incomplete returns the leases of which an address has no file among the names of all that have.
func incomplete(leases []Lease, names []netip.Addr) []Lease {
	there := make(map[netip.Addr]bool, len(names))
	for _, a := range names {
		there[a] = true
	}
	return slices.DeleteFunc(slices.Clone(leases), func(l Lease) bool {
		return !slices.ContainsFunc(l.Addresses, func(a netip.Addr) bool { return !there[a] })
	})
}

// nameless returns the addresses of the leases that are incomplete.
func (s *Store) nameless(names []netip.Addr) (addresses []netip.Addr, err error) {
	leases, _ := s.List() // what cannot be read names nothing
	for _, l := range incomplete(leases, names) {
		addresses = append(addresses, l.Addresses...)
	}
	return addresses, nil
}

// completed is nameless, and completes the leases. It needs the lock.
func (s *Store) completed(names []netip.Addr) (addresses []netip.Addr, err error) {
	leases, _ := s.List() // what cannot be read names nothing
	for _, l := range incomplete(leases, names) {
		restored, err := s.complete(attachment(l.ContainerID, l.Interface))
		if err != nil {
			return nil, err
		}
		addresses = append(addresses, restored...)
	}
	return addresses, nil
}

// complete gives the file of an attachment the names of those of its addresses that have no file, and returns these. It needs the lock: a
// lease that is made or ends has all of them while it has the attachment's.
func (s *Store) complete(name string) (restored []netip.Addr, err error) {
	lease, err := s.read(name)
	if err != nil {
		return nil, nil //nolint:nilerr // it names nothing
	}
	for _, a := range lease.Addresses {
		err = os.Link(s.path(name), s.path(a.String()))
		if err == nil {
			restored = append(restored, a)
		} else if !errors.Is(err, fs.ErrExist) {
			return restored, fmt.Errorf("completing the lease %s: %w", name, err)
		}
	}
	return restored, nil
}

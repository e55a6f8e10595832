// Package ipam leases the addresses of a node's podCIDRs to the interfaces of its pods. The leases are files in one
// directory, which the plugin writes and the daemon reads.
//
// A lease is one file with several names: one for each of its addresses ("10.244.1.7") and one for its attachment
// ("<container>@<interface>"). Each name is made exclusively, so that no address is ever leased twice, whatever runs at the
// same time. The attachment's name is made last and removed first: a lease exists while it has that name, with
// all its addresses, and what a killed process leaves behind can only be names of addresses, which Release and Owners find.
// A file is complete before it has any name and its content never changes, so that readers need no lock.
//
// An address that is released cools down before it is leased again: its name moves into the directory ".cooling", and the
// modification time of its file says since when, as the time since the boot, which no set clock shortens or prolongs. One rename takes
// it from held to cooling, so that a process that is killed at any moment leaves it as the one or as the other. What cools
// down is held by nobody; when the time is over it is free without anybody's doing.
//
// The directory must not outlive a boot (it is a tmpfs in production), because pods do not. That is also why nothing is
// synced to a disk: the memory that would lose a lease loses the pods with it.
package ipam

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// errLeased says that the attachment has a lease already.
var errLeased = errors.New("the interface already has a lease")

// Owner is who holds a lease: an interface of a container, and the pod that it belongs to.
type Owner struct {
	ContainerID string `json:"containerID"`
	Interface   string `json:"interface"`
	Namespace   string `json:"namespace"`
	Name        string `json:"name"`
	UID         string `json:"uid,omitempty"`
}

// Lease is what an owner holds.
type Lease struct {
	Owner
	Addresses []netip.Addr `json:"addresses"`
}

// attachment is the name of the lease's file for its attachment. Neither half can hold an "@" before the first one, and no
// address holds any.
func attachment(containerID, ifname string) string {
	return containerID + "@" + ifname
}

// Store is the directory of the leases.
type Store struct {
	dir string
	// now is the time since the boot.
	now func() (time.Duration, error)

	mu     sync.Mutex
	parsed map[string]parsed // by attachment name; List's memory
}

// Open returns the store in dir, which is made where it is missing.
func Open(dir string) (*Store, error) {
	if err := os.MkdirAll(filepath.Join(dir, cooling), 0o700); err != nil {
		return nil, fmt.Errorf("making the lease directory: %w", err)
	}
	return &Store{dir: dir, now: boottime}, nil
}

// Allocate leases one address of each range to the owner: of all ranges or of none. It refuses an attachment that
// has a lease. An address that was released is leased to nobody for 30 s. The error is an *ExhaustedError where a range has
// no free address.
func (s *Store) Allocate(ranges []netip.Prefix, owner Owner) ([]netip.Addr, error) {
	unlock, err := s.lock()
	if err != nil {
		return nil, err
	}
	lease, err := s.allocate(ranges, owner)
	return lease.Addresses, errors.Join(err, unlock())
}

// allocate does the work of Allocate under the lock.
func (s *Store) allocate(ranges []netip.Prefix, owner Owner) (Lease, error) {
	lease := Lease{Owner: owner}
	name := attachment(owner.ContainerID, owner.Interface)
	switch _, err := os.Lstat(s.path(name)); {
	case err == nil:
		return Lease{}, fmt.Errorf("leasing for %s: %w", name, errLeased)
	case !errors.Is(err, fs.ErrNotExist):
		return Lease{}, fmt.Errorf("leasing for %s: %w", name, err)
	}
	now, err := s.now()
	if err != nil {
		return Lease{}, fmt.Errorf("leasing for %s: %w", name, err)
	}
	for _, r := range ranges {
		address, err := s.free(r, now)
		if err != nil {
			return Lease{}, fmt.Errorf("leasing for %s: %w", name, err)
		}
		lease.Addresses = append(lease.Addresses, address)
	}
	if err := s.write(lease, name); err != nil {
		return Lease{}, fmt.Errorf("writing the lease of %s: %w", name, err)
	}
	for i, r := range ranges {
		if err := os.WriteFile(s.cursor(r), []byte(lease.Addresses[i].String()), 0o600); err != nil {
			return Lease{}, errors.Join(fmt.Errorf("remembering the last address of %s: %w", r, err), s.remove(name, lease.Addresses))
		}
	}
	return lease, nil
}

// free returns the next free address of a range.
func (s *Store) free(r netip.Prefix, now time.Duration) (netip.Addr, error) {
	first, last, ok := span(r)
	if !ok {
		return netip.Addr{}, fmt.Errorf("range %s has no address to lease beside the node's own", r)
	}
	// The cursor is a hint: without it, or where it was cut off, the search begins at the start.
	text, _ := os.ReadFile(s.cursor(r))
	cursor, _ := netip.ParseAddr(string(text))
	address, ok := pick(first, last, cursor, func(a netip.Addr) bool { return s.taken(a, now) })
	if !ok {
		return netip.Addr{}, s.exhausted(r, now)
	}
	// It may have cooled down: an address is held or cooling, never both.
	return address, s.remove(filepath.Join(cooling, address.String()), nil)
}

// write makes the lease's file under all its names or under none.
func (s *Store) write(lease Lease, name string) error {
	data, err := json.Marshal(lease)
	if err != nil {
		return err
	}
	unnamed := s.path(".new")
	// Removed, not truncated: a killed process may have left it as an address's file.
	if err = os.Remove(unnamed); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err = os.WriteFile(unnamed, append(data, '\n'), 0o600); err != nil {
		return errors.Join(err, s.remove(".new", nil))
	}
	for i, a := range lease.Addresses {
		if err = os.Link(unnamed, s.path(a.String())); err != nil {
			return errors.Join(err, s.remove(".new", lease.Addresses[:i]))
		}
	}
	if err = os.Rename(unnamed, s.path(name)); err != nil {
		return errors.Join(err, s.remove(".new", lease.Addresses))
	}
	return nil
}

// Release ends the lease of an attachment and returns the addresses that it held, which cool down from now on. Without a
// lease it does nothing.
func (s *Store) Release(containerID, ifname string) ([]netip.Addr, error) {
	unlock, err := s.lock()
	if err != nil {
		return nil, err
	}
	addresses, err := s.release(containerID, ifname)
	if err = errors.Join(err, unlock()); err != nil {
		return addresses, fmt.Errorf("releasing the lease of %s: %w", attachment(containerID, ifname), err)
	}
	return addresses, nil
}

// release does the work of Release under the lock.
func (s *Store) release(containerID, ifname string) ([]netip.Addr, error) {
	addresses, err := s.Held(containerID, ifname)
	if err != nil {
		return nil, err
	}
	now, err := s.now()
	if err != nil {
		return addresses, err
	}
	if err = s.remove(attachment(containerID, ifname), nil); err != nil {
		return addresses, err
	}
	if err = s.cool(addresses, now); err != nil {
		return addresses, err
	}
	return addresses, s.sweep(now)
}

// Freeze calls do while no lease is made and none ends. The function that do gets says who holds an address.
func (s *Store) Freeze(do func(holder func(netip.Addr) (Owner, bool)) error) error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	err = do(func(a netip.Addr) (Owner, bool) {
		lease, readErr := s.read(a.String())
		return lease.Owner, readErr == nil
	})
	return errors.Join(err, unlock())
}

// Get returns the lease of an attachment. The error is fs.ErrNotExist where it has none.
func (s *Store) Get(containerID, ifname string) (Lease, error) {
	return s.read(attachment(containerID, ifname))
}

// Held returns the addresses of an attachment: those of its lease, or what a killed process left of one.
func (s *Store) Held(containerID, ifname string) ([]netip.Addr, error) {
	lease, err := s.read(attachment(containerID, ifname))
	if err != nil {
		// There is no lease, or none that can be read: look for the addresses.
		return s.addressesOf(containerID, ifname)
	}
	return lease.Addresses, nil
}

// addressesOf returns the addresses whose files belong to the attachment, by what they say or by being its file.
func (s *Store) addressesOf(containerID, ifname string) ([]netip.Addr, error) {
	all, err := s.addressNames()
	if err != nil {
		return nil, err
	}
	name := attachment(containerID, ifname)
	file, statErr := os.Lstat(s.path(name))
	var found []netip.Addr
	for _, a := range all {
		if statErr == nil {
			if other, otherErr := os.Lstat(s.path(a.String())); otherErr == nil && os.SameFile(file, other) {
				found = append(found, a)
			}
			continue
		}
		if lease, readErr := s.read(a.String()); readErr == nil && attachment(lease.ContainerID, lease.Interface) == name {
			found = append(found, a)
		}
	}
	return found, nil
}

// remove takes away a name and then those of the addresses. What is not there is no error.
func (s *Store) remove(name string, addresses []netip.Addr) error {
	names := []string{name}
	for _, a := range addresses {
		names = append(names, a.String())
	}
	for _, n := range names {
		if err := os.Remove(s.path(n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// path returns the path of a name in the directory.
func (s *Store) path(name string) string { return filepath.Join(s.dir, name) }

// cursor is the file with the address of a range that was leased last.
func (s *Store) cursor(r netip.Prefix) string {
	return s.path(".last-" + strings.ReplaceAll(r.String(), "/", "_"))
}

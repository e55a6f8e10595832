package ipam

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// parsed is a lease's file that List has read before.
type parsed struct {
	info  fs.FileInfo
	lease Lease
}

// List returns all leases, ordered by attachment, as they are at this moment. Only files that it has not seen before are
// read.
//
// A file that is no lease is named in the error, and does not keep the others from being returned. The leases are nil where
// the directory itself cannot be read.
func (s *Store) List() ([]Lease, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("listing leases: %w", err)
	}
	leases := make([]Lease, 0, len(s.parsed))
	seen := make(map[string]parsed, len(s.parsed))
	var bad []error
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, ".") || isAddress(name) {
			continue
		}
		p, parseErr := s.parse(e)
		switch {
		case errors.Is(parseErr, fs.ErrNotExist): // released meanwhile
		case parseErr != nil:
			bad = append(bad, parseErr)
		default:
			seen[name] = p
			leases = append(leases, p.lease)
		}
	}
	s.parsed = seen
	return leases, errors.Join(bad...)
}

// parse returns the lease of an attachment's file, from memory where the file is the one read before. A tmpfs never gives an
// inode number twice, so that another file is never taken for it.
func (s *Store) parse(e fs.DirEntry) (parsed, error) {
	info, err := e.Info()
	if err != nil {
		return parsed{}, err
	}
	before, ok := s.parsed[e.Name()]
	if ok && os.SameFile(before.info, info) && before.info.ModTime().Equal(info.ModTime()) {
		return before, nil
	}
	lease, err := s.read(e.Name())
	if err != nil {
		return parsed{}, err
	}
	if attachment(lease.ContainerID, lease.Interface) != e.Name() {
		return parsed{}, fmt.Errorf("reading lease %s: it says that it is the lease of %s", s.path(e.Name()), attachment(lease.ContainerID, lease.Interface))
	}
	return parsed{info: info, lease: lease}, nil
}

// Owners returns everybody who holds something here, also what a killed process left: all that a garbage collection has to
// look at. A file that is no lease is named in the error, and does not hide the others.
func (s *Store) Owners() ([]Owner, error) {
	leases, err := s.List()
	owners := make([]Owner, 0, len(leases))
	for _, l := range leases {
		owners = append(owners, l.Owner)
	}
	addresses, addressErr := s.addressNames()
	for _, a := range addresses {
		lease, readErr := s.read(a.String())
		switch {
		case errors.Is(readErr, fs.ErrNotExist):
		case readErr != nil:
			err = errors.Join(err, readErr)
		case !slices.Contains(owners, lease.Owner):
			owners = append(owners, lease.Owner)
		}
	}
	return owners, errors.Join(err, addressErr)
}

// read returns the lease in the file of that name.
func (s *Store) read(name string) (Lease, error) {
	data, err := os.ReadFile(s.path(name))
	if err != nil {
		return Lease{}, fmt.Errorf("reading lease: %w", err)
	}
	var lease Lease
	if err = json.Unmarshal(data, &lease); err != nil {
		return Lease{}, fmt.Errorf("reading lease %s: %w", s.path(name), err)
	}
	if lease.ContainerID == "" || lease.Interface == "" || len(lease.Addresses) == 0 {
		return Lease{}, fmt.Errorf("reading lease %s: container, interface or addresses are missing", s.path(name))
	}
	return lease, nil
}

// addressNames returns the addresses that have a file.
func (s *Store) addressNames() ([]netip.Addr, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("listing leases: %w", err)
	}
	var addresses []netip.Addr
	for _, e := range entries {
		if a, parseErr := netip.ParseAddr(e.Name()); parseErr == nil {
			addresses = append(addresses, a)
		}
	}
	return addresses, nil
}

// isAddress says whether a file's name is an address.
func isAddress(name string) bool {
	_, err := netip.ParseAddr(name)
	return err == nil
}

// lock takes the directory's lock, which the kernel gives back when the process dies, and returns what unlocks it.
func (s *Store) lock() (unlock func() error, err error) {
	f, err := os.OpenFile(s.path(".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking leases: %w", err)
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if !errors.Is(err, unix.EINTR) {
			break
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("locking leases: %w", err), f.Close())
	}
	return f.Close, nil
}

// Package ipam leases the addresses of a node's podCIDRs to the interfaces of its pods. The leases are files in one
// directory, which the plugin writes and the daemon reads.
//
// A lease is one file with several names: one for each of its addresses ("10.244.1.7") and one for its attachment
// ("<container>@<interface>"). Each name is made exclusively, so that no address is ever leased twice, whatever runs at the
// same time. The attachment's name is made last and removed first: a lease exists while it has that name, with
// all its addresses, and what a killed process leaves behind can only be names of addresses, which Release and Owners find.
// A file is complete before it has any name and its content never changes, so that readers need no lock.
//
// The names alone say what is taken and by whom: whatever becomes of a file's content, its addresses are leased to nobody
// else, and end with their attachment. What the names do not explain is set aside, and a name that is lost is made again from the content;
// see Repair.
//
// An address that is released cools down before it is leased again: its name moves into the directory ".cooling", and the
// modification time of its file says since when, as the time since the boot, which no set clock shortens or prolongs. One rename takes
// it from held to cooling, so that a process that is killed at any moment leaves it as the one or as the other. What cools
// down is held by nobody. It is free when the time is over and Forget has been told since its release that no connection of its last
// pod is left: the modification time of the file ".forgotten" says when that began.
//
// Leases end with the boot, because pods do. The directory is a tmpfs in production; where it is not, StartBoot frees what an
// earlier boot left. That is also why nothing is synced to a disk: the memory that would lose a lease loses the pods with it.
package ipam

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
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
	// Netns is the path of the container's network namespace, as the runtime named it.
	Netns string `json:"netns,omitempty"`
}

// Lease is what an owner holds.
type Lease struct {
	Owner
	Addresses []netip.Addr `json:"addresses"`
}

// draft is the name of a file that has no other yet.
const draft = ".new"

// attachment is the name of the lease's file for its attachment. Neither half can hold an "@" before the first one, and no
// address holds any.
func attachment(containerID, ifname string) string {
	return containerID + "@" + ifname
}

// Store is the directory of the leases.
type Store struct {
	dir string
	// now is the time since the boot, and bootID which boot it is.
	now    func() (time.Duration, error)
	bootID func() (string, error)

	mu     sync.Mutex
	parsed map[string]*parsed // by attachment name; List's memory
}

// Open returns the store in dir, which is made where it is missing. What is no directory in its place is kept beside it; but whoever has
// made a link there wants the leases elsewhere, and with its target missing nobody knows them.
func Open(dir string) (*Store, error) {
	dir = filepath.Clean(dir)
	err := os.MkdirAll(dir, 0o700)
	if errors.Is(err, unix.ENOTDIR) {
		if err = moveBeside(dir); err == nil {
			err = os.MkdirAll(dir, 0o700)
		}
	}
	if errors.Is(err, unix.EEXIST) {
		err = fmt.Errorf("%w, as a link to what does not exist: make that, or remove the link", err)
	}
	if err != nil {
		return nil, fmt.Errorf("making the lease directory: %w", err)
	}
	s := &Store{dir: dir, now: boottime, bootID: bootID}
	_ = unix.Mkdir(s.path(cooling), 0o700) // not only with the first release, for which there may be no space
	return s, nil
}

// Allocate leases one address of each range to the owner: of all ranges or of none. It refuses an attachment that
// has a lease. An address that was released is leased to nobody for 30 s, nor before Forget was there. The error is an
// *ExhaustedError where a range has no free address.
func (s *Store) Allocate(ranges []netip.Prefix, owner Owner) ([]netip.Addr, error) {
	l, err := s.lock()
	if err != nil {
		return nil, err
	}
	lease, err := s.allocate(l, ranges, owner)
	l.unlock()
	if err != nil {
		err = s.explain(err) // without the lock, for which others wait
		return nil, fmt.Errorf("leasing for %s: %w", attachment(owner.ContainerID, owner.Interface), err)
	}
	return lease.Addresses, nil
}

// allocate does the work of Allocate under the lock.
func (s *Store) allocate(l lock, ranges []netip.Prefix, owner Owner) (Lease, error) {
	lease := Lease{Owner: owner}
	name := attachment(owner.ContainerID, owner.Interface)
	switch _, err := lstat(s.path(name)); {
	case err == nil:
		return Lease{}, errLeased
	case !errors.Is(err, fs.ErrNotExist):
		return Lease{}, err
	}
	m, save := l.recall()
	now := sync.OnceValues(s.moment) // asked only where something cools down
	for _, r := range ranges {
		address, err := s.free(m, r, now)
		if err != nil {
			save() // the names were looked at, perhaps
			return Lease{}, err
		}
		lease.Addresses = append(lease.Addresses, address)
	}
	if err := s.write(lease, name); err != nil {
		return Lease{}, fmt.Errorf("writing the lease: %w", err)
	}
	for _, a := range lease.Addresses {
		m.leased(a)
	}
	save()
	return lease, nil
}

// free returns the next free address of a range.
func (s *Store) free(m memory, r netip.Prefix, now func() (moment, error)) (netip.Addr, error) {
	var cooled bool
	taken := func(a netip.Addr) (taken bool, err error) {
		taken, cooled, err = s.taken(a, now)
		return taken, err
	}
	address, err := s.search(m, r, taken, s.completed)
	if err != nil || !cooled {
		return address, err
	}
	// An address is held or cooling, never both.
	return address, s.warm(address)
}

// search picks an address of a range. Where nothing is remembered, and before it says that there is none, it looks at the names: what is
// remembered may lie. The names may, too; so that what nobody remembers and a lease names without a file is leased to nobody else, nameless
// returns it.
func (s *Store) search(m memory, r netip.Prefix, taken func(netip.Addr) (bool, error), nameless func([]netip.Addr) ([]netip.Addr, error)) (
	netip.Addr, error,
) {
	if m.remembers(r.Addr()) {
		address, err := m.pick(r, taken)
		if err != nil || address.IsValid() {
			return address, err
		}
	}
	names, err := s.addressNames()
	if err != nil {
		return netip.Addr{}, err
	}
	m.mark(r, names)
	address, err := m.pick(r, taken)
	if err == nil && address.IsValid() {
		var more []netip.Addr
		if more, err = nameless(names); err == nil && len(more) > 0 {
			m.mark(r, append(names, more...))
			address, err = m.pick(r, taken)
		}
	}
	if err == nil && !address.IsValid() {
		err = &ExhaustedError{Range: r}
	}
	return address, err
}

// write makes the lease's file under all its names or under none.
func (s *Store) write(lease Lease, name string) error {
	data, err := json.Marshal(lease)
	if err != nil {
		return err
	}
	unnamed, err := s.draft(data)
	if err != nil {
		return err
	}
	for i, a := range lease.Addresses {
		if err = os.Link(unnamed, s.path(a.String())); err != nil {
			return errors.Join(err, s.remove(draft, lease.Addresses[:i]))
		}
	}
	if err = rename(unnamed, s.path(name)); err != nil {
		return errors.Join(err, s.remove(draft, lease.Addresses))
	}
	return nil
}

// draft makes a file that has no name yet but its path.
func (s *Store) draft(data []byte) (path string, err error) {
	path = s.path(draft)
	const flags = unix.O_WRONLY | unix.O_CREAT | unix.O_EXCL
	fd, err := open(path, flags)
	if errors.Is(err, unix.EEXIST) {
		// Removed, not truncated: a killed process may have left it as an address's file.
		if err = unlink(path); errors.Is(err, unix.EISDIR) {
			err = s.setAside(draft)
		}
		if err == nil {
			fd, err = open(path, flags)
		}
	}
	if err != nil {
		return "", err
	}
	if err = errors.Join(writeAll(fd, append(data, '\n')), unix.Close(fd)); err != nil {
		return "", errors.Join(fmt.Errorf("writing %s: %w", path, err), unlink(path))
	}
	return path, nil
}

// writeAll writes all of the data.
func writeAll(fd int, data []byte) error {
	for len(data) > 0 {
		n, err := unix.Write(fd, data)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return err
		}
		data = data[max(n, 0):]
	}
	return nil
}

// Release ends the lease of an attachment and returns the addresses that it held, which cool down from now on. Without a
// lease it does nothing.
func (s *Store) Release(containerID, ifname string) ([]netip.Addr, error) {
	l, err := s.lock()
	if err != nil {
		return nil, err
	}
	defer l.unlock()
	addresses, err := s.release(l, containerID, ifname)
	if err != nil {
		return addresses, fmt.Errorf("releasing the lease of %s: %w", attachment(containerID, ifname), err)
	}
	return addresses, nil
}

// release does the work of Release under the lock.
func (s *Store) release(l lock, containerID, ifname string) ([]netip.Addr, error) {
	name := attachment(containerID, ifname)
	addresses, whole, err := s.held(name)
	if err != nil {
		return nil, err
	}
	now, err := s.now()
	if err != nil {
		return addresses, err
	}
	if !whole { // what has no file cannot cool down
		if _, err = s.complete(name); err != nil {
			return addresses, err
		}
	}
	if err = s.remove(name, nil); err != nil {
		return addresses, err
	}
	return addresses, s.cool(l, addresses, now)
}

// Freeze calls do while no lease is made and none ends. The function that do gets says who holds an address.
func (s *Store) Freeze(do func(holder func(netip.Addr) (Owner, bool)) error) error {
	l, err := s.lock()
	if err != nil {
		return err
	}
	defer l.unlock()
	return do(func(a netip.Addr) (Owner, bool) {
		lease, readErr := s.read(a.String())
		return lease.Owner, readErr == nil
	})
}

// Get returns the lease of an attachment. The error is fs.ErrNotExist where it has none.
func (s *Store) Get(containerID, ifname string) (Lease, error) {
	return s.read(attachment(containerID, ifname))
}

// Held returns the addresses of an attachment: those whose names are its file's, what a killed process left of a lease, and what its lease
// names and nobody else holds. The lease's text alone gives no address: it may be another's.
func (s *Store) Held(containerID, ifname string) ([]netip.Addr, error) {
	addresses, _, err := s.held(attachment(containerID, ifname))
	return addresses, err
}

// held does the work of Held, and says whether the lease is as it was made.
func (s *Store) held(name string) (addresses []netip.Addr, whole bool, err error) {
	var file unix.Stat_t
	lease, err := s.readStat(name, &file)
	if err == nil && s.isWhole(lease, &file) {
		return lease.Addresses, true, nil
	}
	addresses, err = s.addressesOf(name, lease.Addresses)
	return addresses, false, err
}

// remove takes away a name and then those of the addresses. What is not there is no error.
func (s *Store) remove(name string, addresses []netip.Addr) error {
	names := []string{name}
	for _, a := range addresses {
		names = append(names, a.String())
	}
	for _, n := range names {
		if err := unlink(s.path(n)); err != nil {
			return err
		}
	}
	return nil
}

// unlink removes a file. That it is not there is no error. (os.Remove tries a directory, too.)
func unlink(path string) error {
	if err := unix.Unlink(path); err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "unlink", Path: path, Err: err}
	}
	return nil
}

// rename gives a file another path. (os.Rename looks first what is there.)
func rename(from, to string) error {
	if err := again(func() error { return unix.Rename(from, to) }); err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// lstat returns what the kernel says of a file. (os.Lstat makes more of it.)
func lstat(path string) (st unix.Stat_t, err error) {
	err = again(func() error { return unix.Lstat(path, &st) })
	if err != nil {
		return st, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	return st, nil
}

// path returns the path of a name in the directory.
func (s *Store) path(name string) string { return s.dir + "/" + name }

package ipam

import (
	"errors"
	"io/fs"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// view is whose the addresses are that have a file, at one moment.
type view struct {
	// own are the addresses whose file is an attachment's, by file, and claimed the same addresses.
	own     map[inode][]netip.Addr
	claimed map[netip.Addr]bool
	// strays are the others, and says those of them that name an attachment, by its name.
	strays map[netip.Addr]stray
	says   map[string][]netip.Addr
}

// stray is what the file of an address says that is no attachment's: whose it is, or why that cannot be told.
type stray struct {
	says string
	err  error
}

// inode tells a file from others.
type inode struct{ device, number uint64 }

func inodeOf(file *unix.Stat_t) inode { return inode{file.Dev, file.Ino} }

// look returns the view of now.
func (s *Store) look() (*view, error) {
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	attachments := make(map[inode]bool, len(names))
	for _, name := range names {
		if !isAttachment(name) {
			continue
		}
		if file, statErr := lstat(s.path(name)); statErr == nil {
			attachments[inodeOf(&file)] = true
		}
	}
	v := &view{map[inode][]netip.Addr{}, map[netip.Addr]bool{}, map[netip.Addr]stray{}, map[string][]netip.Addr{}}
	for _, a := range addressesNamed(names) {
		file, err := lstat(s.path(a.String()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // released meanwhile
		}
		if err != nil {
			return nil, err
		}
		if id := inodeOf(&file); attachments[id] {
			v.own[id], v.claimed[a] = append(v.own[id], a), true
			continue
		}
		switch lease, err := s.read(a.String()); {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			v.strays[a] = stray{err: err}
		default:
			name := attachment(lease.ContainerID, lease.Interface)
			v.strays[a], v.says[name] = stray{says: name}, append(v.says[name], a)
		}
	}
	return v, nil
}

// addressesOf returns the addresses that belong to the attachment of a name, whose lease names some of them, if it can be read: those whose
// file is the attachment's own; those whose file is no attachment's, and says so, or says nothing and the lease names the address; and those
// that have no file, and the lease names them.
func (v *view) addressesOf(name string, own inode, named []netip.Addr) ([]netip.Addr, error) {
	found := slices.Concat(v.own[own], v.says[name])
	for _, a := range named {
		is, isStray := v.strays[a]
		switch {
		case v.claimed[a], is.says != "":
		case isStray && !errors.Is(is.err, errNoLease):
			return nil, is.err
		default:
			found = append(found, a)
		}
	}
	slices.SortFunc(found, netip.Addr.Compare)
	return slices.Compact(found), nil
}

// addressesOf is that of the view of now.
func (s *Store) addressesOf(name string, named []netip.Addr) ([]netip.Addr, error) {
	v, err := s.look()
	if err != nil {
		return nil, err
	}
	own, err := lstat(s.path(name))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return v.addressesOf(name, inodeOf(&own), named)
}

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
	"sync"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

// errNoLease says that a file was read and holds no lease.
var errNoLease = errors.New("it is no lease")

// largest is how many bytes a lease's file has at most.
const largest = 64 << 10

// parsed is a lease's file that List has read, and remembers where it is whole: what others' addresses are depends on other files, too.
type parsed struct {
	file  identity
	lease Lease
	whole bool
}

// identity tells a file, its content and its names from others. A tmpfs never gives an inode number twice, so that another file is never
// taken for it, and a file that gets or loses a name is changed.
type identity struct {
	device, inode, names uint64
	modified, changed    unix.Timespec
}

func identityOf(file *unix.Stat_t) identity {
	names := uint64(file.Nlink) //nolint:unconvert // not as large on every processor
	return identity{file.Dev, file.Ino, names, file.Mtim, file.Ctim}
}

// List returns all leases, ordered by attachment, as they are at this moment. Only files that it has not seen before are
// read. The addresses are those that Held returns: a text that differs from the names of its file gives nobody another's address.
//
// A lease that cannot be read is named in the error, and does not keep the others from being returned. The leases are nil where
// the directory itself cannot be read.
func (s *Store) List() ([]Lease, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	dir, err := os.Open(s.dir)
	if err != nil {
		return nil, fmt.Errorf("listing leases: %w", err)
	}
	defer func() { _ = dir.Close() }()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("listing leases: %w", err)
	}
	names = slices.DeleteFunc(names, func(name string) bool { return !isAttachment(name) })
	slices.Sort(names)
	found, errs := make([]parsed, len(names)), make([]error, len(names))
	fd, look := int(dir.Fd()), sync.OnceValues(s.look) // once for all, and only where a lease is not whole
	inParallel(len(names), func(i int) { found[i], errs[i] = s.parse(fd, names[i], look) })

	leases := make([]Lease, 0, len(names))
	seen := make(map[string]*parsed, len(names))
	var bad []error
	for i, name := range names {
		switch {
		case errors.Is(errs[i], fs.ErrNotExist): // released meanwhile
		case errs[i] != nil:
			bad = append(bad, errs[i])
		default:
			if found[i].whole {
				seen[name] = &found[i]
			}
			leases = append(leases, found[i].lease)
		}
	}
	s.parsed = seen
	return leases, errors.Join(bad...)
}

// inParallel calls do with all numbers below n, on all processors where they are many.
func inParallel(n int, do func(int)) {
	const each = 1000
	var group sync.WaitGroup
	for from := 0; from < n; from += each {
		part := func() {
			for i := from; i < min(from+each, n); i++ {
				do(i)
			}
		}
		if n <= each {
			part()
			return
		}
		group.Go(part)
	}
	group.Wait()
}

// parse returns the lease of an attachment's file in the directory that is open, from memory where the file is the one read before.
func (s *Store) parse(dir int, name string, look func() (*view, error)) (parsed, error) {
	var file unix.Stat_t
	before, ok := s.parsed[name]
	if ok && unix.Fstatat(dir, name, &file, unix.AT_SYMLINK_NOFOLLOW) == nil && identityOf(&file) == before.file {
		return *before, nil
	}
	var buffer [1024]byte
	text, err := readFile(dir, name, buffer[:], &file)
	lease, err := s.decode(name, string(text), err)
	if err != nil || s.isWhole(lease, &file) {
		return parsed{identityOf(&file), lease, true}, err
	}
	v, err := look()
	if err != nil {
		return parsed{}, err
	}
	lease.Addresses, err = v.addressesOf(name, inodeOf(&file), lease.Addresses)
	if err == nil && len(lease.Addresses) == 0 {
		err = fmt.Errorf("reading lease %s: %w: no address that it names is its own", s.path(name), errNoLease)
	}
	return parsed{lease: lease}, err
}

// Owners returns everybody who holds something here, also what a killed process left, or what cannot be read any more and is
// known by its name alone: all that a garbage collection has to look at.
func (s *Store) Owners() ([]Owner, error) {
	leases, _ := s.List() // who holds what cannot be read is known by its name
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	owners := make([]Owner, 0, len(leases))
	known := make(map[string]bool, len(leases))
	for _, l := range leases {
		owners = append(owners, l.Owner)
		known[attachment(l.ContainerID, l.Interface)] = true
	}
	for _, name := range unexplained(names, leases) {
		var owner Owner
		if isAttachment(name) {
			owner.ContainerID, owner.Interface, _ = strings.Cut(name, "@")
		} else if lease, readErr := s.read(name); readErr == nil {
			owner = lease.Owner
		} else {
			continue // nobody can be told to hold it; see Repair
		}
		if id := attachment(owner.ContainerID, owner.Interface); !known[id] {
			known[id] = true
			owners = append(owners, owner)
		}
	}
	return owners, nil
}

// unexplained returns the names that are neither the store's own nor those of the leases.
func unexplained(names []string, leases []Lease) []string {
	explained := make(map[string]bool, 2*len(leases))
	for _, l := range leases {
		explained[attachment(l.ContainerID, l.Interface)] = true
		for _, a := range l.Addresses {
			explained[a.String()] = true
		}
	}
	return slices.DeleteFunc(names, func(name string) bool { return explained[name] || isOwn(name) })
}

// isOwn says whether a name is one that the store makes for itself, this one or that of an earlier version.
func isOwn(name string) bool {
	switch name {
	case lockFile, draft, cooling, forgotten, aside, bootFile:
		return true
	default:
		return strings.HasPrefix(name, ".last-")
	}
}

// read returns the lease in the file of that name. The error is errNoLease where the file can be read and holds none, or another's.
func (s *Store) read(name string) (Lease, error) { return s.readStat(name, nil) }

// readStat is read, and says which file that is where that is asked.
func (s *Store) readStat(name string, file *unix.Stat_t) (Lease, error) {
	var buffer [1024]byte
	text, err := readFile(unix.AT_FDCWD, s.path(name), buffer[:], file)
	return s.decode(name, string(text), err)
}

// decode returns the lease in the text of a file of that name, which could be read but for the error.
func (s *Store) decode(name, text string, err error) (Lease, error) {
	if isForeign(err) {
		err = errNoLease
	}
	if err != nil {
		return Lease{}, fmt.Errorf("reading lease %s: %w", s.path(name), err)
	}
	lease, ok := plain(text)
	if !ok {
		if err = json.Unmarshal([]byte(text), &lease); err != nil {
			return Lease{}, fmt.Errorf("reading lease %s: %w: %w", s.path(name), errNoLease, err)
		}
	}
	if lease.ContainerID == "" || lease.Interface == "" || len(lease.Addresses) == 0 {
		return Lease{}, fmt.Errorf("reading lease %s: %w: container, interface or addresses are missing", s.path(name), errNoLease)
	}
	if slices.ContainsFunc(lease.Addresses, func(a netip.Addr) bool { return !a.IsValid() || a.Zone() != "" }) { // which may lead to any path
		return Lease{}, fmt.Errorf("reading lease %s: %w: its addresses are not those of a range", s.path(name), errNoLease)
	}
	if id, ifname, _ := strings.Cut(name, "@"); id == lease.ContainerID && ifname == lease.Interface {
		return lease, nil
	}
	if !slices.ContainsFunc(lease.Addresses, func(a netip.Addr) bool { return a.String() == name }) {
		says := attachment(lease.ContainerID, lease.Interface)
		return Lease{}, fmt.Errorf("reading lease %s: %w: it says that it is that of %s", s.path(name), errNoLease, says)
	}
	return lease, nil
}

// plain reads what json.Marshal makes of a lease whose texts it does not escape, many times as fast as json.Unmarshal. ok is false where the
// text is anything else.
func plain(text string) (l Lease, ok bool) {
	text, ok = strings.CutSuffix(text, "]}\n")
	if !ok || !utf8.ValidString(text) || strings.ContainsFunc(text, isEscape) {
		return Lease{}, false
	}
	next := func(before string, to *string) bool {
		rest, found := strings.CutPrefix(text, before)
		end := strings.IndexByte(rest, '"')
		if !found || end < 0 {
			return false
		}
		*to, text = rest[:end], rest[end+1:]
		return true
	}
	if !next(`{"containerID":"`, &l.ContainerID) || !next(`,"interface":"`, &l.Interface) ||
		!next(`,"namespace":"`, &l.Namespace) || !next(`,"name":"`, &l.Name) {
		return Lease{}, false
	}
	next(`,"uid":"`, &l.UID)
	next(`,"netns":"`, &l.Netns)
	var address string
	for before := `,"addresses":["`; next(before, &address); before = `,"` {
		a, err := netip.ParseAddr(address)
		if err != nil {
			return Lease{}, false
		}
		l.Addresses = append(l.Addresses, a)
	}
	if text != "" || len(l.Addresses) == 0 {
		return Lease{}, false
	}
	return l, true
}

// isEscape says whether a character stands for something else in the texts of JSON, or must not be there.
func isEscape(r rune) bool { return r < ' ' || r == '\\' }

// readFile returns what is in a file of a directory that is open, and which file that is where that is asked. The buffer is used as far as it
// goes.
func readFile(dir int, path string, buffer []byte, file *unix.Stat_t) ([]byte, error) {
	fd, err := openAt(dir, path, unix.O_RDONLY|unix.O_NONBLOCK) // also where it is a pipe
	if err != nil {
		return nil, err
	}
	if file != nil {
		err = unix.Fstat(fd, file)
	}
	n := 0
	for err == nil && n < largest {
		var more int
		err = again(func() (err error) { more, err = unix.Read(fd, buffer[n:]); return err })
		if n += max(more, 0); n < len(buffer) { // a file gives all that there is
			break
		}
		buffer = append(buffer, make([]byte, n)...)
	}
	return buffer[:n], errors.Join(err, unix.Close(fd))
}

// names returns the names of all that is in the directory, in no order.
func (s *Store) names() ([]string, error) {
	dir, err := os.Open(s.dir)
	if err != nil {
		return nil, fmt.Errorf("listing leases: %w", err)
	}
	names, err := dir.Readdirnames(-1)
	if err = errors.Join(err, dir.Close()); err != nil {
		return nil, fmt.Errorf("listing leases: %w", err)
	}
	return names, nil
}

// addressNames returns the addresses that have a file.
func (s *Store) addressNames() ([]netip.Addr, error) {
	names, err := s.names()
	if err != nil {
		return nil, err
	}
	return addressesNamed(names), nil
}

// addressesNamed returns the addresses among names.
func addressesNamed(names []string) (addresses []netip.Addr) {
	for _, name := range names {
		if a, ok := addressNamed(name); ok {
			addresses = append(addresses, a)
		}
	}
	return addresses
}

// addressNamed returns the address whose file has the name. ok is false where it is that of no address.
func addressNamed(name string) (a netip.Addr, ok bool) {
	a, err := netip.ParseAddr(name)
	return a, err == nil && a.String() == name
}

// isAttachment says whether a file's name is that of an attachment.
func isAttachment(name string) bool {
	containerID, ifname, ok := strings.Cut(name, "@")
	return ok && containerID != "" && ifname != "" && name[0] != '.'
}

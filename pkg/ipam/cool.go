package ipam

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// coolDown is how long nobody gets an address that was released. Until then other nodes may still take it for the pod that
// had it, and clients may still send to it.
const coolDown = 30 * time.Second

// cooling is the directory of the names of addresses that cool down.
const cooling = ".cooling"

// forgotten is the file whose modification time says that what was released before has no connections any more.
const forgotten = ".forgotten"

// ExhaustedError says that no address of a range can be leased now.
type ExhaustedError struct {
	Range netip.Prefix
	// Leased is how many addresses of the range are leased.
	Leased int
	// Most is the namespace whose pods hold the most of these, MostLeased of them.
	Most       string
	MostLeased int
	// Cooling is how many addresses of the range were released too recently to be leased again.
	Cooling int
	// Wait is how long the first of those still cools down, zero where there is none.
	Wait time.Duration
	// Unswept is how many addresses of the range have cooled down and wait for Forget.
	Unswept int
}

// Error names the range, what became of its addresses and what to do.
func (e *ExhaustedError) Error() string {
	leased, remedy := fmt.Sprintf("%d addresses are leased", e.Leased), "delete pods or give the node a larger podCIDR"
	if e.Leased == capacity(e.Range) {
		leased = "all " + leased
	}
	if e.MostLeased > 0 {
		leased += fmt.Sprintf(" (%d of them to namespace %s)", e.MostLeased, e.Most)
	}
	parts := []string{leased}
	if e.Cooling > 0 {
		seconds := (e.Wait + time.Second - 1).Truncate(time.Second) // no sooner than is true
		parts = append(parts, fmt.Sprintf("%d cool down after their release, the first of them for another %s", e.Cooling, seconds))
		remedy = "try again then, or give the node a larger podCIDR"
	}
	if e.Unswept > 0 {
		parts = append(parts, fmt.Sprintf("%d stay taken until the connections of the pods that had them are ended", e.Unswept))
		remedy = "try again, and where that does not help mend what \"warrend status\" names as PodsNotSwept"
	}
	return fmt.Sprintf("range %s is exhausted: %s; %s", e.Range, strings.Join(parts, " and "), remedy)
}

// boottime returns the time since the boot. It is the same for every process, counts on while the machine is suspended, and
// nobody can set it.
func boottime() (time.Duration, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0, fmt.Errorf("reading the time since the boot: %w", err)
	}
	return time.Duration(t.Nano()), nil
}

// setTime says in a file that something began at a time since the boot: in itself, not in what a link leads to.
func setTime(path string, since time.Duration) error {
	times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, unix.NsecToTimespec(int64(since))}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "utimensat", Path: path, Err: err}
	}
	return nil
}

// moment is a time since the boot, and what has been forgotten by then: what was released before forgotten.
type moment struct{ now, forgotten time.Duration }

// moment returns what is now.
func (s *Store) moment() (moment, error) {
	now, err := s.now()
	if err != nil {
		return moment{}, err
	}
	file, err := lstat(s.path(forgotten))
	if errors.Is(err, fs.ErrNotExist) {
		return moment{now: now}, nil
	}
	if err != nil {
		return moment{}, fmt.Errorf("reading what was forgotten: %w", err)
	}
	m := moment{now, modified(&file)}
	if m.forgotten > now { // of another boot
		m.forgotten = 0
	}
	return m, nil
}

// modified returns the time since the boot that a file says as that of its modification.
func modified(file *unix.Stat_t) time.Duration { return time.Duration(file.Mtim.Nano()) }

// unforgotten says whether what was released then may have connections: it was in this boot, in which a time to come was not.
func (m moment) unforgotten(released time.Duration) bool {
	return m.forgotten <= released && released <= m.now
}

// wait returns how long an address still cools down that was released then, zero where it has.
func (m moment) wait(released time.Duration) time.Duration {
	if released > m.now { // of another boot
		return 0
	}
	return max(released+coolDown-m.now, 0)
}

// unswept says whether an address that was released then has cooled down and only waits for Forget.
func (m moment) unswept(released time.Duration) bool {
	return m.wait(released) == 0 && m.unforgotten(released)
}

// free says whether an address that was released then can be leased.
func (m moment) free(released time.Duration) bool {
	return m.wait(released) == 0 && !m.unforgotten(released)
}

// Forget calls end with the addresses whose connections were not ended since their release, if there are any. Where that succeeds they
// may be leased again when they have cooled down. No lock is held meanwhile. The names of those that have cooled down already are removed:
// in a large range nobody comes back to them.
func (s *Store) Forget(end func([]netip.Addr) error) error {
	began, addresses, err := s.remembered()
	if err != nil || len(addresses) == 0 {
		return err
	}
	if err = end(addresses); err != nil {
		return err
	}
	l, err := s.lock()
	if err != nil {
		return err
	}
	defer l.unlock()
	return s.setForgotten(began)
}

// remembered returns the addresses that Forget is for, and as of when, and removes the names of those that have cooled down. Who releases
// later has a later time.
func (s *Store) remembered() (time.Duration, []netip.Addr, error) {
	l, err := s.lock()
	if err != nil {
		return 0, nil, err
	}
	defer l.unlock()
	now, err := s.moment()
	files, listErr := s.cooled()
	if err = errors.Join(err, listErr); err != nil {
		return 0, nil, err
	}
	var addresses []netip.Addr
	for _, file := range files {
		a, isAddress := addressNamed(file.name)
		switch {
		case !isAddress: // foreign, and does no harm
		case now.free(file.released):
			_ = s.vacate(a) // it is leased as well with that name
		case now.unforgotten(file.released):
			addresses = append(addresses, a)
		}
	}
	return now.now, addresses, nil
}

// setForgotten notes that what was released before began is forgotten. Another may have come further meanwhile.
func (s *Store) setForgotten(began time.Duration) error {
	now, err := s.moment()
	if err != nil || began <= now.forgotten {
		return err
	}
	if file, statErr := lstat(s.path(forgotten)); statErr == nil && file.Mode&unix.S_IFMT != unix.S_IFREG {
		err = s.setAside(forgotten)
	}
	if err != nil {
		return fmt.Errorf("noting what was forgotten: %w", err)
	}
	fd, err := open(s.path(forgotten), unix.O_WRONLY|unix.O_CREAT)
	if err != nil {
		return fmt.Errorf("noting what was forgotten: %w", err)
	}
	if err = errors.Join(unix.Close(fd), setTime(s.path(forgotten), began)); err != nil {
		return fmt.Errorf("noting what was forgotten: %w", err)
	}
	return nil
}

// coolingPath returns the path that a name has among those of the addresses that cool down.
func (s *Store) coolingPath(name string) string { return s.path(cooling) + "/" + name }

// makeCooling makes the directory of what cools down, in the place of anything else.
func (s *Store) makeCooling() error {
	err := makeDirectory(s.path(cooling), func(string) error { return s.setAside(cooling) })
	if err != nil {
		return fmt.Errorf("making the directory of what cools down: %w", err)
	}
	return nil
}

// cool ends what holds the addresses, and has them cool down from now on. Each is renamed after the time is in its file: at no
// moment is it neither held nor cooling. No step needs space on the disk, unless something foreign is in the way.
func (s *Store) cool(l lock, addresses []netip.Addr, now time.Duration) error {
	if len(addresses) == 0 {
		return nil
	}
	if err := s.makeCooling(); err != nil {
		return err
	}
	m, save := l.recall()
	defer save()
	for _, a := range addresses {
		held := s.path(a.String())
		err := setTime(held, now)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = s.vacate(a)
		}
		if err == nil {
			err = rename(held, s.coolingPath(a.String()))
		}
		if err != nil {
			return err
		}
		m.released(a)
	}
	return nil
}

// warm removes the name that an address has among those that cool down.
func (s *Store) warm(a netip.Addr) error {
	if err := s.makeCooling(); err != nil { // nothing is removed by way of a link
		return err
	}
	return s.vacate(a)
}

// vacate makes the place free that an address has among those that cool down: of its name, and of anything else, which is set aside.
func (s *Store) vacate(a netip.Addr) error {
	file, err := lstat(s.coolingPath(a.String()))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case file.Mode&unix.S_IFMT != unix.S_IFREG:
		return s.setAside(cooling + "/" + a.String())
	default:
		return unlink(s.coolingPath(a.String()))
	}
}

// taken says whether an address is held or cools down, and whether it has cooled down but still has the name.
func (s *Store) taken(a netip.Addr, now func() (moment, error)) (taken, cooled bool, err error) {
	if taken, err = s.leased(a); err != nil || taken {
		return taken, false, err
	}
	released, is, err := s.released(a)
	if err != nil || !is {
		return false, false, err
	}
	m, err := now()
	taken = !m.free(released)
	return taken, !taken, err
}

// released returns when an address was released that has the name of one that cools down. is says whether it has.
func (s *Store) released(a netip.Addr) (since time.Duration, is bool, err error) {
	file, err := lstat(s.coolingPath(a.String()))
	if isNowhere(err) {
		return 0, false, nil
	}
	return modified(&file), err == nil, err
}

// isNowhere says whether an error is one because nothing is there, or because there is no directory of ours yet.
func isNowhere(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

// explain completes an *ExhaustedError by what became of the addresses of its range, and leaves any other error. It needs no lock.
func (s *Store) explain(err error) error {
	e, ok := errors.AsType[*ExhaustedError](err)
	if !ok {
		return err
	}
	now, err := s.moment()
	if err != nil {
		return err
	}
	if err = errors.Join(s.countLeased(e), s.countCooling(e, now)); err != nil {
		return err
	}
	return e
}

// countLeased counts the addresses of the range that are leased, and to whom the most are.
func (s *Store) countLeased(e *ExhaustedError) error {
	names, err := s.addressNames()
	if err != nil {
		return err
	}
	namespaces := make(map[string]int)
	for _, a := range names {
		if !e.Range.Contains(a) {
			continue
		}
		e.Leased++
		if lease, readErr := s.read(a.String()); readErr == nil { // what cannot be read is of no namespace
			namespaces[lease.Namespace]++
		}
	}
	for _, name := range slices.Sorted(maps.Keys(namespaces)) {
		if namespaces[name] > e.MostLeased {
			e.Most, e.MostLeased = name, namespaces[name]
		}
	}
	return nil
}

// countCooling counts the addresses of the range that cool down, finds out when the first of them has, and counts those that wait for Forget.
func (s *Store) countCooling(e *ExhaustedError, now moment) error {
	files, err := s.cooled()
	if err != nil {
		return err
	}
	for _, file := range files {
		a, parseErr := netip.ParseAddr(file.name)
		if parseErr != nil || !e.Range.Contains(a) {
			continue
		}
		left := now.wait(file.released)
		switch {
		case left > 0:
			if e.Cooling == 0 || left < e.Wait {
				e.Wait = left
			}
			e.Cooling++
		case now.unswept(file.released):
			e.Unswept++
		}
	}
	return nil
}

// released is an address's file since its release.
type released struct {
	name     string
	released time.Duration // the time since the boot
}

// cooled returns the files of all addresses that cool down, and of those that have cooled down and still have the name.
func (s *Store) cooled() ([]released, error) {
	names, err := s.list(cooling)
	if err != nil {
		return nil, fmt.Errorf("listing what cools down: %w", err)
	}
	files := make([]released, 0, len(names))
	for _, name := range names {
		file, err := lstat(s.coolingPath(name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // leased meanwhile, or swept
		}
		if err != nil {
			return nil, fmt.Errorf("listing what cools down: %w", err)
		}
		files = append(files, released{name, modified(&file)})
	}
	return files, nil
}

// list returns the names in a directory of the store's own, in no order: none where there is none, or something else in its place.
func (s *Store) list(directory string) ([]string, error) {
	path := s.path(directory)
	fd, err := open(path, unix.O_RDONLY|unix.O_DIRECTORY) // no link
	if isNowhere(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	dir := os.NewFile(uintptr(fd), path)
	defer func() { _ = dir.Close() }()
	return dir.Readdirnames(-1)
}

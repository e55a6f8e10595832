package ipam

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// coolDown is how long nobody gets an address that was released. Until then other nodes may still take it for the pod that
// had it, and clients may still send to it.
const coolDown = 30 * time.Second

// cooling is the directory of the names of addresses that cool down.
const cooling = ".cooling"

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
}

// Error names the range, what became of its addresses and what to do.
func (e *ExhaustedError) Error() string {
	var most string
	if e.MostLeased > 0 {
		most = fmt.Sprintf(" (%d of them to namespace %s)", e.MostLeased, e.Most)
	}
	if e.Cooling == 0 {
		return fmt.Sprintf("range %s is exhausted: all %d addresses are leased%s; delete pods or give the node a larger podCIDR", e.Range, e.Leased, most)
	}
	seconds := (e.Wait + time.Second - 1).Truncate(time.Second) // no sooner than is true
	return fmt.Sprintf("range %s is exhausted: %d addresses are leased%s and %d cool down after their release, the first of them for another %s; "+
		"try again then, or give the node a larger podCIDR", e.Range, e.Leased, most, e.Cooling, seconds)
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

// stamp is a time since the boot as the modification time of a file.
func stamp(now time.Duration) time.Time { return time.Unix(0, int64(now)) }

// wait returns how long the cool-down still lasts that began when the file says, zero or less where it is over. A time
// to come is none of this boot.
func wait(file fs.FileInfo, now time.Duration) time.Duration {
	since := time.Duration(file.ModTime().UnixNano())
	if since > now {
		return 0
	}
	return since + coolDown - now
}

// coolingPath returns the path that an address has while it cools down.
func (s *Store) coolingPath(a netip.Addr) string {
	return filepath.Join(s.path(cooling), a.String())
}

// cool ends what holds the addresses, and has them cool down from now on. Each is renamed after the time is in its file: at no
// moment is it neither held nor cooling. No step needs space on the disk.
func (s *Store) cool(addresses []netip.Addr, now time.Duration) error {
	for _, a := range addresses {
		held := s.path(a.String())
		err := os.Chtimes(held, time.Time{}, stamp(now))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = os.Rename(held, s.coolingPath(a))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// taken says whether an address is held or cools down. Where that cannot be read, it is taken.
func (s *Store) taken(a netip.Addr, now time.Duration) bool {
	if _, err := os.Lstat(s.path(a.String())); !errors.Is(err, fs.ErrNotExist) {
		return true
	}
	file, err := os.Lstat(s.coolingPath(a))
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	return wait(file, now) > 0
}

// exhausted is the error that says what became of the addresses of a range.
func (s *Store) exhausted(r netip.Prefix, now time.Duration) error {
	e := &ExhaustedError{Range: r}
	if err := errors.Join(s.countLeased(e), s.countCooling(e, now)); err != nil {
		return err
	}
	return e
}

// countLeased counts the addresses of the range that are leased, and to whom the most are.
func (s *Store) countLeased(e *ExhaustedError) error {
	leased, err := s.addressNames()
	if err != nil {
		return err
	}
	namespaces := make(map[string]int)
	for _, a := range leased {
		if !e.Range.Contains(a) {
			continue
		}
		e.Leased++
		if lease, readErr := s.read(a.String()); readErr == nil {
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

// countCooling counts the addresses of the range that cool down, and finds out when the first of them is free.
func (s *Store) countCooling(e *ExhaustedError, now time.Duration) error {
	files, err := s.cooled()
	if err != nil {
		return err
	}
	for _, file := range files {
		a, parseErr := netip.ParseAddr(file.Name())
		left := wait(file, now)
		if parseErr != nil || !e.Range.Contains(a) || left <= 0 {
			continue
		}
		if e.Cooling == 0 || left < e.Wait {
			e.Wait = left
		}
		e.Cooling++
	}
	return nil
}

// sweep removes the names of addresses that have cooled down: in a large range nobody comes back to them. It looks at them
// only once in the time of a cool-down, which the modification time of the lock tells, so that a release costs
// the same however many cool down.
func (s *Store) sweep(now time.Duration) error {
	lock, err := os.Lstat(s.path(".lock"))
	if err != nil {
		return err
	}
	if wait(lock, now) > 0 {
		return nil
	}
	files, err := s.cooled()
	if err != nil {
		return err
	}
	for _, file := range files {
		if wait(file, now) <= 0 {
			_ = os.Remove(filepath.Join(s.path(cooling), file.Name())) // what is foreign and stays does no harm
		}
	}
	return os.Chtimes(s.path(".lock"), time.Time{}, stamp(now))
}

// cooled returns the files of all addresses that cool down, and of those that have cooled down and were not swept yet.
func (s *Store) cooled() ([]fs.FileInfo, error) {
	entries, err := os.ReadDir(s.path(cooling))
	if err != nil {
		return nil, fmt.Errorf("listing what cools down: %w", err)
	}
	files := make([]fs.FileInfo, 0, len(entries))
	for _, e := range entries {
		file, err := e.Info()
		if err != nil {
			return nil, fmt.Errorf("listing what cools down: %w", err)
		}
		files = append(files, file)
	}
	return files, nil
}

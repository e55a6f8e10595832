package ipam

import (
	"errors"
	"io/fs"
	"net/netip"
	"sync"
)

// Room returns an *ExhaustedError where each address of a range is leased, or has cooled down without Forget getting through, so that time
// alone makes no room. An address that cools down is room: it will be there without anybody's doing. It takes no lock and changes nothing.
func (s *Store) Room(ranges []netip.Prefix) error {
	m, err := s.peek()
	if err != nil {
		return err
	}
	now := sync.OnceValues(s.moment) // asked only where something cools down
	taken := func(a netip.Addr) (bool, error) { return s.stays(a, now) }
	for _, r := range ranges {
		if _, err = s.search(m, r, taken, s.nameless); err != nil {
			return s.explain(err)
		}
	}
	return nil
}

// stays says whether an address is taken, and stays so however long one waits.
func (s *Store) stays(a netip.Addr, now func() (moment, error)) (bool, error) {
	if held, err := s.leased(a); err != nil || held {
		return held, err
	}
	released, is, err := s.released(a)
	if err != nil || !is {
		return false, err
	}
	m, err := now()
	return m.unswept(released), err
}

// leased says whether an address is held.
func (s *Store) leased(a netip.Addr) (bool, error) {
	_, err := lstat(s.path(a.String()))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

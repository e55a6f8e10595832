package ipam

import (
	"errors"
	"io/fs"
	"net/netip"
)

// Room returns an *ExhaustedError where all addresses of a range are leased, so that nothing but a release makes room. An address that
// cools down is room: it will be there without anybody's doing. It takes no lock and changes nothing.
func (s *Store) Room(ranges []netip.Prefix) error {
	m, err := s.peek()
	if err != nil {
		return err
	}
	for _, r := range ranges {
		if _, err = s.search(m, r, s.leased, s.nameless); err != nil {
			return s.explain(err)
		}
	}
	return nil
}

// leased says whether an address is held.
func (s *Store) leased(a netip.Addr) (bool, error) {
	_, err := lstat(s.path(a.String()))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

package conntrack

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Forget deletes the connections from and to the addresses. It is for addresses that end, once the gate is closed and the link
// is down, so that no packet begins one anew: what began with the pod before would pass as established to the pod that has the
// address next, whatever its policies say. An entry stays for as long as somebody goes on sending, also to nobody.
//
// For many addresses it costs hardly more than for one.
func Forget(addresses []netip.Addr) error {
	if len(addresses) == 0 {
		return nil
	}
	entries, err := size()
	if err != nil {
		return err
	}
	walks := targeted(addresses)
	if atOnce(walks, entries) {
		return forgetFound([]walk{{among: walks[0].among}})
	}
	return forgetChosen(walks)
}

// forgetChosen deletes by the kernel's own choice what walks for IPv4 would find, and then what the others do. An older kernel, which
// does not delete by a filter, takes it for the name of one entry that lacks its ports.
func forgetChosen(walks []walk) error {
	s, err := open()
	if err != nil {
		return err
	}
	defer s.close()
	for len(walks) > 0 && walks[0].address.IsValid() {
		w := walks[0]
		err = s.do(request(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, w.family, w.filter()), ignore)
		if errors.Is(err, unix.EINVAL) {
			break
		}
		if err != nil {
			return fmt.Errorf("deleting the connections of %s: %w", w.address, err)
		}
		walks = walks[1:]
	}
	if len(walks) == 0 {
		return nil
	}
	return forgetFound(walks)
}

// forgetFound deletes what walks find, one by one.
func forgetFound(walks []walk) error {
	s, err := open()
	if err != nil {
		return err
	}
	defer s.close()
	var errs []error
	err = each(walks, func(e entry) bool {
		deleteErr := s.do(request(nl.IPCTNL_MSG_CT_DELETE, unix.NLM_F_ACK, e.family(), e.naming()), ignore)
		if deleteErr != nil && !errors.Is(deleteErr, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("deleting the connection %s: %w", e.flow, deleteErr))
		}
		return true
	})
	return errors.Join(append(errs, err)...)
}

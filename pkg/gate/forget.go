package gate

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Forget deletes the connections of the addresses from the kernel's table, in the network namespace of the calling thread. It
// is for addresses that end, once the gate is closed and the link is gone, so that no packet begins one anew: what began
// with the pod before would pass as established to the pod that has the address next, whatever its policies say. An
// entry stays for as long as somebody goes on sending, also to nobody.
func Forget(addresses []netip.Addr) error {
	if len(addresses) == 0 {
		return nil
	}
	// One look for both families: the table is large, also when it is empty.
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_UNSPEC) //nolint:forbidigo // an interrupted one is an error, and DEL comes again
	if err != nil {
		return fmt.Errorf("reading the table of connections: %w", err)
	}
	families := map[uint8]bool{}
	for _, flow := range flows {
		if involved(addresses).MatchConntrackFlow(flow) {
			families[flow.FamilyType] = true
		}
	}
	var errs []error
	for family := range families {
		if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.InetFamily(family), involved(addresses)); err != nil {
			errs = append(errs, fmt.Errorf("deleting the connections of %v: %w", addresses, err))
		}
	}
	return errors.Join(errs...)
}

// involved are addresses at either end of a connection, before or after translation.
type involved []netip.Addr

// MatchConntrackFlow implements netlink.CustomConntrackFilter.
func (i involved) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	return slices.ContainsFunc([]net.IP{flow.Forward.SrcIP, flow.Forward.DstIP, flow.Reverse.SrcIP, flow.Reverse.DstIP}, func(ip net.IP) bool {
		a, _ := netip.AddrFromSlice(ip)
		return slices.Contains(i, a.Unmap())
	})
}

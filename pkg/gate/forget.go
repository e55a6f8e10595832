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
// is for addresses that change hands, while the gate is closed for them: what began with the pod before would pass as
// established to the pod that has the address now, whatever its policies say. The table lives for as long as somebody
// goes on sending, also to nobody.
func Forget(addresses []netip.Addr) error {
	var errs []error
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		of := slices.DeleteFunc(slices.Clone(addresses), func(a netip.Addr) bool { return a.Is6() != (family == unix.AF_INET6) })
		if len(of) == 0 {
			continue
		}
		if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, involved(of)); err != nil {
			errs = append(errs, fmt.Errorf("deleting the connections of %v: %w", of, err))
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

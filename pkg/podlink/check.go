package podlink

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// dumpAttempts is how often a dump is repeated that a change in the kernel interrupted.
const dumpAttempts = 5

// Check returns an error that names everything of the pair that is missing or otherwise than planned. What others put on
// the devices beside it does not matter.
func Check(netns string, p Pair) error {
	pod, err := ns.GetNS(netns)
	if err != nil {
		return fmt.Errorf("opening the pod's network namespace: %w", err)
	}
	defer func() { _ = pod.Close() }()
	return errors.Join(
		p.Host.check(p.MTU),
		pod.Do(func(ns.NetNS) error { return p.Pod.check(p.MTU) }),
	)
}

// check compares the end with the calling thread's network namespace.
func (e *End) check(mtu int) error {
	h, err := netlinksafe.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening netlink: %w", err)
	}
	defer h.Close()
	link, err := h.LinkByName(e.Name)
	if err != nil {
		return fmt.Errorf("device %s: %w", e.Name, err)
	}
	attrs := link.Attrs()
	var wrong []error
	differs := func(format string, args ...any) {
		wrong = append(wrong, fmt.Errorf("device %s: "+format, append([]any{e.Name}, args...)...))
	}
	if attrs.Flags&net.FlagUp == 0 {
		differs("it is down")
	}
	if attrs.MTU != mtu {
		differs("its MTU is %d, not %d", attrs.MTU, mtu)
	}
	if !bytes.Equal(attrs.HardwareAddr, e.MAC[:]) {
		differs("its MAC address is %s, not %s", attrs.HardwareAddr, net.HardwareAddr(e.MAC[:]))
	}
	for _, part := range []func(netlinksafe.Handle, netlink.Link) error{e.checkAddresses, e.checkNeighbours, e.checkRoutes} {
		if err = part(h, link); err != nil {
			differs("%w", err)
		}
	}
	return errors.Join(wrong...)
}

// checkAddresses looks for the end's addresses.
func (e *End) checkAddresses(h netlinksafe.Handle, link netlink.Link) error {
	list, err := dump(func() ([]netlink.Addr, error) {
		return h.AddrList(link, netlink.FAMILY_ALL)
	})
	if err != nil {
		return fmt.Errorf("listing addresses: %w", err)
	}
	there := map[netip.Prefix]bool{}
	for _, a := range list {
		there[prefix(a.IPNet)] = true
	}
	var missing []error
	for _, a := range e.Addresses {
		if !there[a] {
			missing = append(missing, fmt.Errorf("address %s is missing", a))
		}
	}
	return errors.Join(missing...)
}

// checkNeighbours looks for the end's permanent neighbours.
func (e *End) checkNeighbours(h netlinksafe.Handle, link netlink.Link) error {
	list, err := dump(func() ([]netlink.Neigh, error) {
		return h.NeighList(link.Attrs().Index, netlink.FAMILY_ALL)
	})
	if err != nil {
		return fmt.Errorf("listing neighbours: %w", err)
	}
	there := map[Neighbour]bool{}
	for _, n := range list {
		if a, ok := netip.AddrFromSlice(n.IP); ok && n.State == netlink.NUD_PERMANENT && len(n.HardwareAddr) == len(MAC{}) {
			there[Neighbour{a.Unmap(), MAC(n.HardwareAddr)}] = true
		}
	}
	var missing []error
	for _, n := range e.Neighbours {
		if !there[n] {
			missing = append(missing, fmt.Errorf("permanent neighbour %s (%s) is missing", n.Address, net.HardwareAddr(n.MAC[:])))
		}
	}
	return errors.Join(missing...)
}

// checkRoutes looks for the end's routes, and whether what they lead to is reached by them.
func (e *End) checkRoutes(h netlinksafe.Handle, link netlink.Link) error {
	list, err := h.RouteList(link, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("listing routes: %w", err)
	}
	there := map[Route]bool{}
	for _, r := range list {
		via, _ := netip.AddrFromSlice(r.Gw)
		there[Route{Destination: prefix(r.Dst), Via: via.Unmap()}] = true
	}
	var missing []error
	for _, r := range e.Routes {
		if !there[r] {
			missing = append(missing, fmt.Errorf("route %s is missing", r.Destination))
		} else if r.Destination.IsSingleIP() {
			missing = append(missing, checkEffect(h, link, r.Destination.Addr()))
		}
	}
	return errors.Join(missing...)
}

// checkEffect asks the kernel whether packets to an address take the link. A better route beside ours, a rule or an address of the node may
// lead them elsewhere.
func checkEffect(h netlinksafe.Handle, link netlink.Link, to netip.Addr) error {
	taken, err := h.RouteGet(to.AsSlice())
	if err != nil {
		return fmt.Errorf("packets to %s take no route: %w", to, err)
	}
	for _, r := range taken {
		if r.LinkIndex == link.Attrs().Index {
			continue
		}
		other := fmt.Sprintf("link %d", r.LinkIndex)
		if l, err := h.LinkByIndex(r.LinkIndex); err == nil {
			other = l.Attrs().Name
		}
		return fmt.Errorf("packets to %s take another route, by %s", to, other)
	}
	return nil
}

// dump lists something, again where the kernel's state changed meanwhile and the list may be short.
func dump[T any](list func() ([]T, error)) (all []T, err error) {
	for range dumpAttempts {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// prefix converts what netlink returned; the result is invalid where there was none.
func prefix(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), bits)
}

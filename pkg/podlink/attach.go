package podlink

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// inet6 is the directory of IPv6's settings of each device; a kernel without IPv6 has none.
const inet6 = "/proc/sys/net/ipv6/conf"

// addrGenModeNone is IN6_ADDR_GEN_MODE_NONE of linux/if_link.h.
const addrGenModeNone = 1

// Attach makes the pair, one end in the calling thread's network namespace and one in that at the path. On an error nothing
// of it is left. The error is fs.ErrExist where a device of one of the names is there already.
func Attach(netns string, p Pair) error {
	pod, err := ns.GetNS(netns)
	if err != nil {
		return fmt.Errorf("opening the pod's network namespace: %w", err)
	}
	defer func() { _ = pod.Close() }()
	h, err := netlinksafe.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening netlink: %w", err)
	}
	defer h.Close()

	// One message makes the pair complete: both names, both MAC addresses (one that is set later may be set by
	// udev as well, and then the neighbour entries are wrong), the MTU, and the pod's end in its namespace.
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr, attrs.MTU = p.Host.Name, p.Host.MAC[:], p.MTU
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerHardwareAddr, veth.PeerNamespace = p.Pod.Name, p.Pod.MAC[:], netlink.NsFd(pod.Fd())
	if err = h.LinkAdd(veth); err != nil {
		return fmt.Errorf("making the devices %s and, in the pod, %s: %w", p.Host.Name, p.Pod.Name, err)
	}
	err = p.Host.configure()
	if err == nil {
		err = pod.Do(func(ns.NetNS) error { return p.Pod.configure() })
	}
	if err == nil {
		// The host end went up without a carrier, and sends only once the kernel's link watch has seen that it has one now. That
		// happens when somebody looks (rtnl_getlink), and otherwise a little later: too late for the pod's first packet.
		_, err = h.LinkByName(p.Host.Name)
	}
	if err != nil {
		return errors.Join(err, h.LinkDel(veth))
	}
	return nil
}

// Detach deletes the pair with a host end of that name, wherever its other end is. It is no error if there is none.
func Detach(hostName string) error {
	h, err := netlinksafe.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening netlink: %w", err)
	}
	defer h.Close()
	link, err := h.LinkByName(hostName)
	if err == nil {
		err = h.LinkDel(link)
	}
	if err != nil && !errors.As(err, &netlink.LinkNotFoundError{}) && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("deleting the device %s: %w", hostName, err)
	}
	return nil
}

// Links returns the names of all host ends.
func Links() ([]string, error) {
	h, err := netlinksafe.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing devices: %w", err)
	}
	var names []string
	for _, l := range links {
		if l.Type() == "veth" && strings.HasPrefix(l.Attrs().Name, prefixOfNames) {
			names = append(names, l.Attrs().Name)
		}
	}
	return names, nil
}

// RemoveAll deletes the pairs of all pods, and goes on after an error.
func RemoveAll() error {
	names, err := Links()
	errs := []error{err}
	for _, name := range names {
		errs = append(errs, Detach(name))
	}
	return errors.Join(errs...)
}

// configure puts everything on the end's device, in the calling thread's network namespace.
func (e *End) configure() error {
	h, err := netlinksafe.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening netlink: %w", err)
	}
	defer h.Close()
	link, err := h.LinkByName(e.Name)
	if err != nil {
		return fmt.Errorf("finding the device %s: %w", e.Name, err)
	}
	if err = e.configureIPv6(h, link); err != nil {
		return fmt.Errorf("configuring IPv6 on %s: %w", e.Name, err)
	}
	if err = h.LinkSetUp(link); err != nil {
		return fmt.Errorf("setting %s up: %w", e.Name, err)
	}
	if err = e.addAddresses(h, link); err != nil {
		return err
	}
	index := link.Attrs().Index
	for _, n := range e.Neighbours {
		if err = h.NeighSet(n.netlink(index)); err != nil {
			return fmt.Errorf("adding neighbour %s to %s: %w", n.Address, e.Name, err)
		}
	}
	for _, r := range e.Routes {
		add := h.RouteAdd
		if !r.Via.IsValid() {
			// The node's route to a pod: the newest pod with an address has it, and a left-over must not keep it away.
			add = h.RouteReplace
		}
		if err = add(r.netlink(index)); err != nil {
			return fmt.Errorf("adding route %s to %s: %w", r.Destination, e.Name, err)
		}
	}
	return nil
}

// addAddresses gives the device its addresses, and returns when they are in use.
func (e *End) addAddresses(h netlinksafe.Handle, link netlink.Link) error {
	settled, err := watchSettling()
	if err != nil {
		return err
	}
	defer settled.close()
	for _, a := range e.Addresses {
		if err = h.AddrAdd(link, address(a)); err != nil {
			return fmt.Errorf("adding address %s to %s: %w", a, e.Name, err)
		}
	}
	return settled.wait(e.Addresses)
}

// configureIPv6 sets what must stand before the device goes up. Without IPv6 in the kernel there is nothing to set.
func (e *End) configureIPv6(h netlinksafe.Handle, link netlink.Link) error {
	if _, err := os.Stat(inet6); errors.Is(err, fs.ErrNotExist) {
		if e.wantsIPv6() {
			return errors.New("this kernel has no IPv6, but the pod has an IPv6 address")
		}
		return nil
	}
	for _, s := range e.Sysctls {
		if err := os.WriteFile(filepath.Join(inet6, e.Name, s.Name), []byte(s.Value), 0); err != nil {
			return fmt.Errorf("setting %s: %w", s.Name, err)
		}
	}
	if !e.NoAutoAddress {
		return nil
	}
	if err := h.LinkSetIP6AddrGenMode(link, addrGenModeNone); err != nil {
		return fmt.Errorf("switching link-local addresses off: %w", err)
	}
	return nil
}

// address returns the address as netlink takes it. There is nobody on the link whose duplicate could be detected.
func address(p netip.Prefix) *netlink.Addr {
	a := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		a.Flags = unix.IFA_F_NODAD
	}
	return a
}

// netlink returns the neighbour as netlink takes it.
func (n Neighbour) netlink(index int) *netlink.Neigh {
	return &netlink.Neigh{
		LinkIndex: index, Family: family(n.Address), State: netlink.NUD_PERMANENT,
		IP: n.Address.AsSlice(), HardwareAddr: n.MAC[:],
	}
}

// netlink returns the route as netlink takes it.
func (r Route) netlink(index int) *netlink.Route {
	route := &netlink.Route{LinkIndex: index, Dst: ipNet(r.Destination), Scope: netlink.SCOPE_LINK}
	if r.Via.IsValid() {
		route.Gw, route.Flags, route.Scope = r.Via.AsSlice(), int(netlink.FLAG_ONLINK), netlink.SCOPE_UNIVERSE
	}
	return route
}

// family returns the address family of an address.
func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// ipNet converts a prefix.
func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

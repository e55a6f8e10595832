package podlink

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/nlbatch"
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
	r, err := openRtnl()
	if err != nil {
		return err
	}
	defer r.Close()
	err = r.create(pod, p)
	if errors.Is(err, fs.ErrExist) {
		reclaimed, reclaimErr := reclaim(pod, p.Pod.Name)
		err = errors.Join(err, reclaimErr)
		if reclaimed && reclaimErr == nil {
			err = r.create(pod, p)
		}
	}
	if err != nil {
		return err
	}
	err = r.configure(&p.Host)
	if err == nil {
		err = pod.Do(func(ns.NetNS) error { return p.Pod.configure() })
	}
	byName := nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(p.Host.Name))
	if err == nil {
		// The host end went up without a carrier, and sends only once the kernel's link watch has seen that it has one now. That
		// happens when somebody looks (rtnl_getlink), and otherwise a little later: too late for the pod's first packet.
		err = r.Do(nlbatch.Step{What: "looking at " + p.Host.Name, Request: link(unix.RTM_GETLINK, 0, byName)})
	}
	if err != nil {
		return errors.Join(err, r.Do(unlessGone("deleting "+p.Host.Name, link(unix.RTM_DELLINK, 0, byName))))
	}
	return nil
}

// create makes both devices, by one message that makes them complete: both names, both MAC addresses (one that is set later may be
// set by udev as well, and then the neighbour entries are wrong), the MTU, and the pod's end in its namespace.
func (r rtnl) create(pod ns.NetNS, p Pair) error {
	mtu := func() *nl.RtAttr { return nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(p.MTU))) } //nolint:gosec // the kernel refuses what is no MTU
	peer := nl.NewRtAttr(nl.VETH_INFO_PEER, nil)
	for _, part := range []nl.NetlinkRequestData{
		nl.NewIfInfomsg(unix.AF_UNSPEC), nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(p.Pod.Name)), mtu(),
		nl.NewRtAttr(unix.IFLA_ADDRESS, p.Pod.MAC[:]), nl.NewRtAttr(unix.IFLA_NET_NS_FD, nl.Uint32Attr(uint32(pod.Fd()))), //nolint:gosec // a descriptor
	} {
		peer.AddChild(part)
	}
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, nl.NonZeroTerminated("veth"))
	info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddChild(peer)
	request := about(unix.RTM_NEWLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL, nl.NewIfInfomsg(unix.AF_UNSPEC), []nl.NetlinkRequestData{
		nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(p.Host.Name)), mtu(), nl.NewRtAttr(unix.IFLA_ADDRESS, p.Host.MAC[:]), info,
	})
	return r.Do(nlbatch.Step{What: "making the devices " + p.Host.Name + " and, in the pod, " + p.Pod.Name, Request: request})
}

// configure puts everything on the end's device, in the calling thread's network namespace, and returns when it is in use.
func (e *End) configure() error {
	r, err := openRtnl()
	if err != nil {
		return err
	}
	defer r.Close()
	settled, err := watchSettling(e.Addresses)
	if err != nil {
		return err
	}
	defer settled.close()
	if err = r.configure(e); err != nil {
		return err
	}
	return settled.wait(e.Addresses)
}

// configure puts everything on the end's device, in the socket's and the calling thread's network namespace.
func (r rtnl) configure(e *End) error {
	index, err := r.index(e.Name)
	if err == nil && index == 0 {
		err = fmt.Errorf("finding the device %s: %w", e.Name, unix.ENODEV)
	}
	if err != nil {
		return err
	}
	ipv6, err := e.setSysctls()
	if err != nil {
		return fmt.Errorf("configuring IPv6 on %s: %w", e.Name, err)
	}
	return r.Do(e.steps(index, ipv6)...)
}

// steps are the messages that put everything on the device of that index.
func (e *End) steps(index int32, ipv6 bool) []nlbatch.Step {
	var steps []nlbatch.Step
	add := func(request *nl.NetlinkRequest, what string, args ...any) {
		steps = append(steps, nlbatch.Step{What: fmt.Sprintf(what, args...), Request: request})
	}
	if e.NoAutoAddress && ipv6 {
		// Before it goes up, which is when it gets one.
		mode := nl.NewRtAttr(unix.AF_INET6, nil)
		mode.AddRtAttr(unix.IFLA_INET6_ADDR_GEN_MODE, []byte{addrGenModeNone})
		spec := nl.NewRtAttr(unix.IFLA_AF_SPEC, nil)
		spec.AddChild(mode)
		add(link(unix.RTM_SETLINK, index, spec), "switching link-local addresses of %s off", e.Name)
	}
	add(setUp(index, true), "setting %s up", e.Name)
	for _, a := range e.Addresses {
		add(addressMessage(a, index), "adding address %s to %s", a, e.Name)
	}
	for _, n := range e.Neighbours {
		add(n.message(index), "adding neighbour %s to %s", n.Address, e.Name)
	}
	for _, r := range e.Routes {
		add(r.message(index), "adding route %s to %s", r.Destination, e.Name)
	}
	return steps
}

// setSysctls sets what must stand before the device goes up. Without IPv6 in the kernel, or on the device, whose MTU may be too small for it
// (RFC 8200, section 5), there is nothing to set, and it says so.
func (e *End) setSysctls() (ipv6 bool, err error) {
	for _, s := range e.Sysctls {
		if err = set(inet6+"/"+e.Name+"/"+s.Name, s.Value); err == nil {
			continue
		}
		if _, statErr := os.Stat(inet6 + "/" + e.Name); !errors.Is(statErr, fs.ErrNotExist) {
			return false, fmt.Errorf("setting %s: %w", s.Name, err)
		}
		if e.wantsIPv6() {
			return false, errors.New("the kernel has no IPv6 there, but the pod has an IPv6 address")
		}
		return false, nil
	}
	return true, nil
}

// set gives a setting of the kernel a value that it does not have yet. To write what stands is not for nothing: for some settings the kernel
// takes the lock of all links first, and a writer turns round and round until nobody else has it.
func set(path, value string) error {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	stands := make([]byte, 16)
	n, err := unix.Read(fd, stands)
	if err == nil && string(stands[:n]) != value+"\n" {
		_, err = unix.Pwrite(fd, []byte(value), 0)
	}
	return errors.Join(err, unix.Close(fd))
}

// addressMessage adds an address. There is nobody on the link whose duplicate could be detected.
func addressMessage(p netip.Prefix, index int32) *nl.NetlinkRequest {
	message := nl.NewIfAddrmsg(family(p.Addr()))
	message.Index, message.Prefixlen = uint32(index), uint8(p.Bits()) //nolint:gosec // an index, and up to 128
	if p.Addr().Is6() {
		message.Flags = unix.IFA_F_NODAD
	}
	bytes := p.Addr().AsSlice()
	return about(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, message,
		[]nl.NetlinkRequestData{nl.NewRtAttr(unix.IFA_LOCAL, bytes), nl.NewRtAttr(unix.IFA_ADDRESS, bytes)})
}

// message adds the neighbour, or replaces it.
func (n Neighbour) message(index int32) *nl.NetlinkRequest {
	message := &netlink.Ndmsg{Family: uint8(family(n.Address)), Index: uint32(index), State: netlink.NUD_PERMANENT} //nolint:gosec // constants
	return about(unix.RTM_NEWNEIGH, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, message,
		[]nl.NetlinkRequestData{nl.NewRtAttr(unix.NDA_DST, n.Address.AsSlice()), nl.NewRtAttr(unix.NDA_LLADDR, n.MAC[:])})
}

// message adds the route. The node's to a pod is replaced: the newest pod with an address has it, and a left-over must not keep it away.
func (r Route) message(index int32) *nl.NetlinkRequest {
	message := nl.NewRtMsg()
	message.Family, message.Dst_len, message.Scope = uint8(family(r.Destination.Addr())), uint8(r.Destination.Bits()), unix.RT_SCOPE_LINK //nolint:gosec // up to 128
	flags := unix.NLM_F_CREATE | unix.NLM_F_REPLACE
	attributes := []nl.NetlinkRequestData{
		nl.NewRtAttr(unix.RTA_DST, r.Destination.Addr().AsSlice()), nl.NewRtAttr(unix.RTA_OIF, nl.Uint32Attr(uint32(index))), //nolint:gosec // an index
	}
	if r.Via.IsValid() {
		message.Scope, message.Flags, flags = unix.RT_SCOPE_UNIVERSE, unix.RTNH_F_ONLINK, unix.NLM_F_CREATE|unix.NLM_F_EXCL
		attributes = append(attributes, nl.NewRtAttr(unix.RTA_GATEWAY, r.Via.AsSlice()))
	}
	return about(unix.RTM_NEWROUTE, flags, message, attributes)
}

// family returns the address family of an address.
func family(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

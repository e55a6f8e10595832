// Package gate closes the start gate for addresses. The gate is a pair of sets in the kernel (netfilter.ReadySet) and a
// rule that drops every forwarded packet of a pod whose address is not in them. The daemon puts addresses in once
// their pod's policies stand; the plugin only ever takes them out, which is what this package does.
package gate

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/nlbatch"
)

// ErrMissing says that a set of the gate does not exist. The rule of the gate refers to the sets, so that there is no gate
// either.
var ErrMissing = errors.New("the start gate does not stand")

// Close takes the addresses out of the sets, in the network namespace of the calling thread. An address that is not in them
// is closed already. All addresses are tried, whatever happens to one. The error is ErrMissing where a set is.
func Close(addresses []netip.Addr) error {
	err := remove(addresses, 0)
	if errors.Is(err, unix.ENOENT) {
		err = fmt.Errorf("%w: %w", ErrMissing, err)
	}
	return err
}

// CloseBehind is Close for a pod that goes. Where a set is missing nothing has to be taken out of it: the daemon is gone for good, or the
// node was booted.
func CloseBehind(addresses []netip.Addr) error { return remove(addresses, unix.ENOENT) }

// remove takes the addresses out of the sets, and takes one error number for success.
func remove(addresses []netip.Addr, mayBe unix.Errno) error {
	if len(addresses) == 0 {
		return nil
	}
	kernel, err := nlbatch.Open(unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer kernel.Close()
	steps := make([]nlbatch.Step, len(addresses))
	for i, a := range addresses {
		set := netfilter.ReadySet(netfilter.FamilyOf(a))
		steps[i] = nlbatch.Step{What: fmt.Sprintf("closing the start gate for %s: set %s", a, set), Request: removal(set, a), MayBe: mayBe}
	}
	return kernel.Do(steps...)
}

// removal makes a message that deletes an address from a set. Without NLM_F_EXCL the kernel answers success where the address is not in
// it. (netlink.IpsetDel cannot be used: it panics on errors that are not error numbers.)
func removal(set string, a netip.Addr) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(nl.IPSET_CMD_DEL|unix.NFNL_SUBSYS_IPSET<<8, 0)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.AF_UNSPEC, Version: nl.NFNETLINK_V0})
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_PROTOCOL, nl.Uint8Attr(nl.IPSET_PROTOCOL)))
	req.AddData(nl.NewRtAttr(nl.IPSET_ATTR_SETNAME, nl.ZeroTerminated(set)))
	kind := nl.IPSET_ATTR_IPADDR_IPV4
	if a.Is6() {
		kind = nl.IPSET_ATTR_IPADDR_IPV6
	}
	data := nl.NewRtAttr(nl.IPSET_ATTR_DATA|unix.NLA_F_NESTED, nil)
	ip := nl.NewRtAttr(nl.IPSET_ATTR_IP|unix.NLA_F_NESTED, nil)
	ip.AddRtAttr(kind|unix.NLA_F_NET_BYTEORDER, a.AsSlice())
	data.AddChild(ip)
	req.AddData(data)
	return req
}

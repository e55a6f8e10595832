package podlink

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// settleTimeout is how long the kernel may take to finish what it does by itself after an address was added. It takes
// less than a millisecond on an idle machine.
const settleTimeout = 10 * time.Second

// settling waits until IPv6 addresses are in use. The kernel acknowledges an IPv6 address before its local route is made,
// which a work queue does later; a packet to the address would be dropped until then.
type settling struct {
	routes *nl.NetlinkSocket // nil where there is nothing to wait for
}

// watchSettling begins to watch the calling thread's network namespace. It has to begin before the addresses are added.
func watchSettling(addresses []netip.Prefix) (*settling, error) {
	if !slices.ContainsFunc(addresses, func(p netip.Prefix) bool { return p.Addr().Is6() }) {
		return &settling{}, nil
	}
	routes, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("watching routes: %w", err)
	}
	timeout := unix.NsecToTimeval(settleTimeout.Nanoseconds())
	if err = routes.SetReceiveTimeout(&timeout); err != nil {
		routes.Close()
		return nil, fmt.Errorf("watching routes: %w", err)
	}
	return &settling{routes}, nil
}

// wait returns when all the IPv6 addresses have had their local route.
func (s *settling) wait(addresses []netip.Prefix) error {
	missing := map[netip.Addr]bool{}
	for _, a := range addresses {
		if a.Addr().Is6() {
			missing[a.Addr()] = true
		}
	}
	for len(missing) > 0 {
		messages, _, err := s.routes.Receive()
		if err != nil {
			return fmt.Errorf("waiting until the kernel uses the addresses: %w", err)
		}
		for _, m := range messages {
			if m.Header.Type == unix.RTM_NEWROUTE {
				delete(missing, localAddress(m.Data))
			}
		}
	}
	return nil
}

// close ends the watching.
func (s *settling) close() {
	if s.routes != nil {
		s.routes.Close()
	}
}

// localAddress returns the address whose local route a message brings, or the zero Addr.
func localAddress(message []byte) netip.Addr {
	route := nl.DeserializeRtMsg(message)
	if route.Type != unix.RTN_LOCAL {
		return netip.Addr{}
	}
	attributes, err := nl.ParseRouteAttr(message[route.Len():])
	if err != nil {
		return netip.Addr{}
	}
	for _, a := range attributes {
		if a.Attr.Type == unix.RTA_DST {
			address, _ := netip.AddrFromSlice(a.Value)
			return address
		}
	}
	return netip.Addr{}
}

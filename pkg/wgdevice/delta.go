package wgdevice

import (
	"cmp"
	"net"
	"net/netip"
	"slices"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/mesh"
)

// deviceDelta returns the smallest configuration that turns the actual device into the wanted one. It never replaces the
// whole list of peers, so that the sessions of peers that stay are not touched. Peers that go, and peers that lose a prefix,
// come before the peer that gets it: at no moment has a prefix an owner who is not to have it.
func deviceDelta(want mesh.Config, key Key, actual *wgtypes.Device) wgtypes.Config {
	var delta wgtypes.Config
	if private := key.private(); actual.PrivateKey != private {
		delta.PrivateKey = &private
	}
	if port := int(want.ListenPort); actual.ListenPort != port {
		delta.ListenPort = &port
	}

	have := make(map[wgtypes.Key]wgtypes.Peer, len(actual.Peers))
	for _, p := range actual.Peers {
		have[p.PublicKey] = p
	}
	var losing, gaining, removed []wgtypes.PeerConfig
	for _, p := range want.Peers {
		old, known := have[p.PublicKey]
		delete(have, p.PublicKey)
		change, differs := peerDelta(p, old)
		switch {
		case known && !differs:
		case slices.ContainsFunc(allowedOf(old), func(had netip.Prefix) bool { return !slices.Contains(p.AllowedIPs, had) }):
			losing = append(losing, change)
		default:
			gaining = append(gaining, change)
		}
	}
	for publicKey := range have {
		removed = append(removed, wgtypes.PeerConfig{PublicKey: publicKey, Remove: true, UpdateOnly: true})
	}
	slices.SortFunc(removed, func(a, b wgtypes.PeerConfig) int { return slices.Compare(a.PublicKey[:], b.PublicKey[:]) })
	delta.Peers = slices.Concat(removed, losing, gaining)
	return delta
}

// peerDelta returns what changes in a peer, and whether anything does.
func peerDelta(want mesh.Peer, actual wgtypes.Peer) (wgtypes.PeerConfig, bool) {
	change := wgtypes.PeerConfig{PublicKey: want.PublicKey}
	differs := false
	if endpointOf(actual) != want.Endpoint {
		change.Endpoint = net.UDPAddrFromAddrPort(want.Endpoint)
		differs = true
	}
	wanted := slices.SortedFunc(slices.Values(want.AllowedIPs), comparePrefixes)
	if !slices.Equal(allowedOf(actual), wanted) {
		change.ReplaceAllowedIPs = true
		for _, p := range wanted {
			change.AllowedIPs = append(change.AllowedIPs, *ipNet(p))
		}
		differs = true
	}
	return change, differs
}

// endpointOf returns a peer's endpoint, or the zero AddrPort.
func endpointOf(p wgtypes.Peer) netip.AddrPort {
	if p.Endpoint == nil {
		return netip.AddrPort{}
	}
	e := p.Endpoint.AddrPort()
	return netip.AddrPortFrom(e.Addr().Unmap(), e.Port())
}

// allowedOf returns a peer's allowed IPs, sorted.
func allowedOf(p wgtypes.Peer) []netip.Prefix {
	var allowed []netip.Prefix
	for i := range p.AllowedIPs {
		allowed = append(allowed, prefixOf(&p.AllowedIPs[i]))
	}
	slices.SortFunc(allowed, comparePrefixes)
	return allowed
}

// prefixOf converts from the type of netlink and wgctrl; the zero Prefix stands for nil.
func prefixOf(n *net.IPNet) netip.Prefix {
	if n == nil {
		return netip.Prefix{}
	}
	a, _ := netip.AddrFromSlice(n.IP)
	ones, _ := n.Mask.Size()
	return netip.PrefixFrom(a.Unmap(), ones)
}

// ipNet converts to the type of netlink and wgctrl.
func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func comparePrefixes(a, b netip.Prefix) int {
	return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()))
}

// Package podcidr holds the one fact about a node's podCIDR that address management, mesh and guard must agree on. It is
// pure and imports nothing of Kubernetes, so that the CNI plugin can use it.
package podcidr

import "net/netip"

// NodeAddress returns the address that a node keeps for itself in its podCIDR and never leases: the one after the network
// address (10.244.1.1 of 10.244.1.0/24, fd00::1 of fd00::/64). It is the zero Addr where the prefix has no such address.
func NodeAddress(podCIDR netip.Prefix) netip.Addr {
	address := podCIDR.Masked().Addr().Next()
	if !podCIDR.Contains(address) {
		return netip.Addr{}
	}
	return address
}

package wgdevice

import (
	"context"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Status is the state of the link as WireGuard reports it.
type Status struct {
	// Mode is ModeKernel or ModeUserspace.
	Mode  Mode
	Peers []PeerStatus
}

// PeerStatus is the state of a peer. LastHandshake is zero where there was none.
type PeerStatus struct {
	PublicKey  [32]byte
	Endpoint   netip.AddrPort
	AllowedIPs []netip.Prefix
	// NodeAddresses are the node's own addresses that pods reach through the tunnel now.
	NodeAddresses []netip.Addr
	// Preshared says that the peer has a preshared key, which none of ours has.
	Preshared     bool
	LastHandshake time.Time
	ReceivedBytes int64
	SentBytes     int64
}

// Status reads the state of the peers.
func (d *Device) Status(ctx context.Context) (Status, error) {
	k, err := openKernel()
	if err != nil {
		return Status{}, err
	}
	defer k.Close()
	mode, err := d.resolve(k)
	if err != nil {
		return Status{}, err
	}
	client, err := openWireGuard(ctx, mode)
	if err != nil {
		return Status{}, err
	}
	defer closeQuietly(client)
	actual, err := readDevice(client)
	if err != nil {
		return Status{}, err
	}
	status := Status{Mode: mode}
	for i := range actual.Peers {
		p := &actual.Peers[i]
		s := PeerStatus{
			PublicKey:     p.PublicKey,
			Endpoint:      endpointOf(p),
			AllowedIPs:    allowedOf(p),
			Preshared:     p.PresharedKey != wgtypes.Key{},
			LastHandshake: p.LastHandshakeTime,
			ReceivedBytes: p.ReceiveBytes,
			SentBytes:     p.TransmitBytes,
		}
		for _, host := range (peerState{allowed: s.AllowedIPs}).hosts() {
			s.NodeAddresses = append(s.NodeAddresses, host.Addr())
		}
		status.Peers = append(status.Peers, s)
	}
	slices.SortFunc(status.Peers, func(a, b PeerStatus) int { return slices.Compare(a.PublicKey[:], b.PublicKey[:]) })
	return status, nil
}

// Held returns the nodes' own addresses that pods do not reach: they were in the tunnel, and it does not lead there now.
func (d *Device) Held() ([]netip.Addr, error) {
	k, err := openKernel()
	if err != nil {
		return nil, err
	}
	defer k.Close()
	stand, err := k.routes()
	if err != nil {
		return nil, err
	}
	byID := routesByID(stand)
	var held []netip.Addr
	for _, r := range stand {
		if _, leads := byID[unicastID(r.destination, nodeTable)]; !leads && r.table == nodeTable {
			held = append(held, r.destination.Addr())
		}
	}
	slices.SortFunc(held, netip.Addr.Compare)
	return held, nil
}

// GiveUp is the command by which an operator has what pods send to an address that is held go in clear.
func GiveUp(held netip.Addr) string {
	return "ip route del " + unreachableRoute(netip.PrefixFrom(held, held.BitLen()), nodeTable).place()
}

// Empty says whether the tunnel is as it begins: without a key and peers, or, where the kernel runs WireGuard, not there.
func (d *Device) Empty(ctx context.Context) (bool, error) {
	k, err := openKernel()
	if err != nil {
		return false, err
	}
	defer k.Close()
	mode, err := d.resolve(k)
	if err != nil {
		return false, err
	}
	if link, errLink := k.link(); errLink != nil || link == nil {
		return mode == ModeKernel && errLink == nil, errLink
	}
	client, err := openWireGuard(ctx, mode)
	if err != nil {
		return false, err
	}
	defer closeQuietly(client)
	actual, err := readDevice(client)
	if err != nil {
		return false, err
	}
	return actual.PrivateKey == wgtypes.Key{} && len(actual.Peers) == 0, nil
}

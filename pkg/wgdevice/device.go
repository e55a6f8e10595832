// Package wgdevice makes the kernel agree with a mesh.Config: the link warren0, its WireGuard peers, its addresses, and
// the routes to other nodes' pods.
//
// It changes by difference and reads the kernel each time, so that a second Apply writes nothing, a restarted daemon takes
// over what stands, and what somebody else undid is done again. Everything of ours is recognised without a memory: by
// the name of the link and by the protocol number of the routes. Nothing else is touched.
//
// The link is the kernel's WireGuard, or, where the kernel has none, a persistent TUN device behind which RunTunnel runs
// WireGuard in a process of its own. Both are configured by the same calls.
package wgdevice

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"

	"github.com/warren-cni/warren/pkg/mesh"
)

// Mode says where WireGuard runs.
type Mode string

// The modes.
const (
	// ModeAuto stands for ModeKernel where the kernel has WireGuard and for ModeUserspace elsewhere.
	ModeAuto      Mode = "auto"
	ModeKernel    Mode = "kernel"
	ModeUserspace Mode = "userspace"
)

// ErrNoTunnel says that there is no WireGuard on this node, so that nothing reaches the pods of other nodes.
var ErrNoTunnel = errors.New("no WireGuard on this node: load the kernel module wireguard, or apply manifests/userspace-tunnel.yaml")

// Options are the settings of a Device.
type Options struct {
	Log *slog.Logger
	// Mode is ModeAuto, ModeKernel or ModeUserspace.
	Mode Mode
}

// Device is the node's end of the mesh. Its methods work in the network namespace of the thread that calls them.
type Device struct {
	log *slog.Logger

	mu   sync.Mutex
	mode Mode
}

// Changes counts what an Apply wrote.
type Changes struct {
	// Links counts changes of the link itself: made, deleted, MTU, addresses, key, port.
	Links  int
	Peers  int
	Routes int
}

// Any says whether anything was written.
func (c Changes) Any() bool { return c != Changes{} }

// Status is the state of the link as WireGuard reports it.
type Status struct {
	// Mode is ModeKernel or ModeUserspace.
	Mode  Mode
	Peers []PeerStatus
}

// PeerStatus is the state of a peer. LastHandshake is zero where there was none.
type PeerStatus struct {
	PublicKey     [32]byte
	Endpoint      netip.AddrPort
	AllowedIPs    []netip.Prefix
	LastHandshake time.Time
	ReceivedBytes int64
	SentBytes     int64
}

// New returns a Device. It touches nothing yet.
func New(o Options) *Device {
	return &Device{log: o.Log, mode: o.Mode}
}

// Apply makes the kernel agree with the wanted mesh and returns how many changes that took. What it cannot do it reports,
// and goes on with the rest as far as nothing opens by that. It returns ErrNoTunnel where there is no WireGuard;
// then, too, the wanted prefixes are unreachable rather than sent to the default route.
func (d *Device) Apply(ctx context.Context, want mesh.Config, key Key) (Changes, error) {
	k, err := openKernel()
	if err != nil {
		return Changes{}, err
	}
	defer k.Close()
	if !want.Encrypted {
		return d.applyPlain(k, want)
	}

	var changes Changes
	// The net below comes first, so that no step after it can send anything in clear.
	errNet := k.putRoutes(unreachableRoutes(want), &changes)
	mode, err := d.resolve(k)
	if err != nil {
		return changes, errors.Join(errNet, err)
	}
	link, err := d.ensureLink(k, mode, want.MTU, &changes)
	if err != nil {
		return changes, errors.Join(errNet, err)
	}
	if err = configure(ctx, mode, want, key, &changes); err != nil {
		return changes, errors.Join(errNet, err)
	}
	stale, errAdd := k.addAddresses(link, want.Addresses, &changes)
	errUp := k.raise(link, &changes)
	wanted := append(unreachableRoutes(want), linkRoutes(want, link.Attrs().Index)...)
	errRoutes := k.syncRoutes(wanted, &changes)
	// Last, because a route whose source address goes away goes with it.
	errDelete := k.deleteAddresses(link, stale, &changes)
	return changes, errors.Join(errNet, errAdd, errUp, errRoutes, errDelete)
}

// applyPlain makes the mesh of a cluster without encryption: routes by the nodes' addresses. A link of the kernel's goes. The
// link of a user-space tunnel is that process's own, and losing it would end the process: it stays, without addresses.
func (d *Device) applyPlain(k *kernel, want mesh.Config) (Changes, error) {
	var changes Changes
	errRoutes := k.syncRoutes(plainRoutes(want), &changes)
	link, err := k.link()
	if err != nil || link == nil {
		return changes, errors.Join(errRoutes, err)
	}
	if link.Type() != typeTUN {
		return changes, errors.Join(errRoutes, k.deleteLink(&changes))
	}
	stale, err := k.addAddresses(link, nil, &changes)
	return changes, errors.Join(errRoutes, err, k.deleteAddresses(link, stale, &changes))
}

// Cleanup removes the link and every route of ours. It is for a node that Warren leaves.
func (d *Device) Cleanup() error {
	k, err := openKernel()
	if err != nil {
		return err
	}
	defer k.Close()
	var changes Changes
	return errors.Join(k.syncRoutes(nil, &changes), k.deleteLink(&changes))
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
	client, actual, err := openWireGuard(ctx, mode)
	if err != nil {
		return Status{}, err
	}
	defer closeQuietly(client)
	status := Status{Mode: mode}
	for _, p := range actual.Peers {
		status.Peers = append(status.Peers, PeerStatus{
			PublicKey:     p.PublicKey,
			Endpoint:      endpointOf(p),
			AllowedIPs:    allowedOf(p),
			LastHandshake: p.LastHandshakeTime,
			ReceivedBytes: p.ReceiveBytes,
			SentBytes:     p.TransmitBytes,
		})
	}
	slices.SortFunc(status.Peers, func(a, b PeerStatus) int { return slices.Compare(a.PublicKey[:], b.PublicKey[:]) })
	return status, nil
}

// resolve returns ModeKernel or ModeUserspace. The answer to ModeAuto stays for the life of the Device.
func (d *Device) resolve(k *kernel) (Mode, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.mode == ModeAuto {
		has, err := k.hasWireGuard()
		if err != nil {
			return "", err
		}
		d.mode = ModeUserspace
		if has {
			d.mode = ModeKernel
		}
		d.log.Info("chose WireGuard", "mode", string(d.mode))
	}
	return d.mode, nil
}

// configure gives the device its key, port and peers.
func configure(ctx context.Context, mode Mode, want mesh.Config, key Key, changes *Changes) error {
	client, actual, err := openWireGuard(ctx, mode)
	if err != nil {
		return err
	}
	defer closeQuietly(client)
	delta := deviceDelta(want, key, actual)
	if delta.PrivateKey == nil && delta.ListenPort == nil && len(delta.Peers) == 0 {
		return nil
	}
	if err := client.ConfigureDevice(mesh.Link, delta); err != nil {
		return fmt.Errorf("configuring WireGuard on %s (port %d, %d peers): %w", mesh.Link, want.ListenPort, len(delta.Peers), err)
	}
	changes.Peers += len(delta.Peers)
	if delta.PrivateKey != nil || delta.ListenPort != nil {
		changes.Links++
	}
	return nil
}

// closeQuietly closes a client whose answers are already in hand.
func closeQuietly(client *wgctrl.Client) {
	_ = client.Close()
}

// Package wgdevice makes the kernel agree with a mesh.Config: the link warren0, its WireGuard peers, its addresses, and
// the routes to other nodes' pods.
//
// Apply reads the kernel and changes by difference, so that a second one writes nothing, a restarted daemon takes over what
// stands, and what somebody else undid is done again. Patch writes one change and reads nothing, so that what a node costs that
// comes, goes or changes does not grow with the number of the others. Everything of ours is recognised without a memory: by
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
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

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

// ErrNoTunnel says that no WireGuard answers on this node, so that nothing reaches the pods of other nodes.
var ErrNoTunnel = errors.New("no WireGuard on this node")

// noTunnel is ErrNoTunnel with what makes one for a node that was asked for a mode.
func noTunnel(asked Mode) error {
	const load, apply = "load the kernel module wireguard", "apply manifests/userspace-tunnel.yaml"
	switch asked {
	case ModeKernel:
		return fmt.Errorf("%w: %s, or run with --wireguard=auto and %s", ErrNoTunnel, load, apply)
	case ModeUserspace:
		return fmt.Errorf("%w: %s", ErrNoTunnel, apply)
	default:
		return fmt.Errorf("%w: %s, or %s", ErrNoTunnel, load, apply)
	}
}

// Options are the settings of a Device.
type Options struct {
	Log *slog.Logger
	// Mode is ModeAuto, ModeKernel or ModeUserspace.
	Mode Mode
	// Clock tells the time; nil for the system's, by which WireGuard tells when it shook hands.
	Clock func() time.Time
}

// Device is the node's end of the mesh. Its methods work in the network namespace of the thread that calls them, and one of those
// that write waits for the other.
type Device struct {
	log   *slog.Logger
	clock func() time.Time

	asked Mode

	mu sync.Mutex
	// mode is what was asked for, or what was chosen for ModeAuto; chosen is the last choice that was told.
	mode, chosen Mode

	writing sync.Mutex
	memory  memory
}

// Changes counts what was written.
type Changes struct {
	// Links counts changes of the link itself: made, deleted, MTU, addresses, key, port.
	Links int
	Peers int
	// Routes counts routes, and the rules that lead to a table of them.
	Routes int
}

// Any says whether anything was written.
func (c Changes) Any() bool { return c != Changes{} }

// New returns a Device. It touches nothing yet.
func New(o Options) *Device {
	if o.Clock == nil {
		o.Clock = time.Now //nolint:forbidigo // WireGuard's own clock
	}
	return &Device{log: o.Log, asked: o.Mode, mode: o.Mode, clock: o.Clock}
}

// Apply makes the kernel agree with the wanted mesh and returns how many changes that took. What it cannot do it reports,
// and goes on with the rest as far as nothing opens by that. It returns ErrNoTunnel where there is no WireGuard;
// then, too, the wanted prefixes are unreachable rather than sent to the default route.
func (d *Device) Apply(ctx context.Context, want mesh.Config, key Key) (Changes, error) {
	d.writing.Lock()
	defer d.writing.Unlock()
	d.memory.known = false
	k, err := openKernel()
	if err != nil {
		return Changes{}, err
	}
	defer k.Close()
	var changes Changes
	if want.Encrypted {
		err = d.applyEncrypted(ctx, k, request{want, key}, &changes)
	} else {
		err = d.applyPlain(k, want, &changes)
	}
	d.memory.known = err == nil
	return changes, err
}

// request is what an Apply is asked for.
type request struct {
	mesh.Config
	key Key
}

// applyEncrypted makes the mesh through the link.
func (d *Device) applyEncrypted(ctx context.Context, k *kernel, want request, changes *Changes) error {
	// The net below comes first, so that no step after it can send anything in clear.
	stand, err := k.routes()
	if err != nil {
		return err
	}
	held, loose := heldRoutes(want.Hosts, stand)
	nets := slices.Concat(unreachableRoutes(want.Unreachable), held)
	add, replace, _ := routeDelta(nets, stand)
	// And what pods send to nodes goes as it is to go also where there is no tunnel.
	errNet := errors.Join(k.writeRoutes(add, replace, loose, changes), k.syncRules(nodeRules(want.Config), changes))
	mode, err := d.resolve(k)
	if err != nil {
		return errors.Join(errNet, err)
	}
	link, err := d.ensureLink(k, mode, want.MTU, changes)
	if err != nil {
		return errors.Join(errNet, err)
	}
	if err = d.configure(ctx, mode, want, changes); err != nil {
		return errors.Join(errNet, err)
	}
	stale, errAdd := k.addAddresses(link, want.Addresses, changes)
	errUp := k.raise(link, changes)
	m := &d.memory
	m.encrypted, m.link = true, link.Attrs().Index
	hosts := m.hostRoutes()
	held, _ = heldRoutes(want.Hosts, append(hosts, nets...))
	wanted := slices.Concat(unreachableRoutes(want.Unreachable), m.meshRoutes(want.Routes), hosts, held)
	m.routes = routesByID(wanted)
	errRoutes := k.syncRoutes(wanted, changes)
	// Last, because a route whose source address goes away goes with it.
	errDelete := k.deleteAddresses(link, stale, changes)
	return errors.Join(errNet, errAdd, errUp, errRoutes, errDelete)
}

// applyPlain makes the mesh of a cluster without encryption: routes by the nodes' addresses. A link of the kernel's goes. The
// link of a user-space tunnel is that process's own, and losing it would end the process: it stays, without addresses.
func (d *Device) applyPlain(k *kernel, want mesh.Config, changes *Changes) error {
	d.memory = memory{}
	wanted := d.memory.meshRoutes(want.Routes)
	d.memory.routes = routesByID(wanted)
	errRoutes := errors.Join(k.syncRules(nil, changes), k.syncRoutes(wanted, changes))
	link, err := k.link()
	if err != nil || link == nil {
		return errors.Join(errRoutes, err)
	}
	if link.Type() != typeTUN {
		return errors.Join(errRoutes, k.deleteLink(changes))
	}
	stale, err := k.addAddresses(link, nil, changes)
	return errors.Join(errRoutes, err, k.deleteAddresses(link, stale, changes))
}

// Cleanup removes the link and every route and rule of ours. It is for a node that Warren leaves.
func (d *Device) Cleanup() error {
	d.writing.Lock()
	defer d.writing.Unlock()
	d.memory = memory{}
	k, err := openKernel()
	if err != nil {
		return err
	}
	defer k.Close()
	var changes Changes
	return errors.Join(k.syncRules(nil, &changes), k.syncRoutes(nil, &changes), k.deleteLink(&changes))
}

// Reserve makes the pods' networks unreachable, so that nothing for them falls to the default route before anything is known of
// the cluster. What stands there already stays, and the first Apply takes over.
func Reserve(clusterCIDRs []netip.Prefix) error {
	k, err := openKernel()
	if err != nil {
		return err
	}
	defer k.Close()
	return k.putRoutes(unreachableRoutes(clusterCIDRs), &Changes{})
}

// resolve returns ModeKernel or ModeUserspace. The answer to ModeAuto stays while there is a tunnel.
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
		if d.chosen != d.mode {
			d.chosen = d.mode
			d.log.Info("chose WireGuard", "mode", string(d.mode))
		}
	}
	return d.mode, nil
}

// chooseAgain lets the next resolve choose: somebody may have loaded the kernel's module by then.
func (d *Device) chooseAgain() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mode = d.asked
}

// configure gives the device its key, port and peers.
func (d *Device) configure(ctx context.Context, mode Mode, want request, changes *Changes) error {
	client, err := openWireGuard(ctx, mode)
	if err != nil {
		return err
	}
	defer closeQuietly(client)
	actual, err := readDevice(client)
	if err != nil {
		return err
	}
	m, now := &d.memory, d.clock()
	m.see(actual, now)
	var c wgtypes.Config
	if private := want.key.private(); actual.PrivateKey != private {
		c.PrivateKey = &private
	}
	if port := int(want.ListenPort); actual.ListenPort != port {
		c.ListenPort = &port
	}
	had := slices.SortedFunc(maps.Keys(m.peers), func(a, b wgtypes.Key) int { return slices.Compare(a[:], b[:]) })
	steps := m.delta(want.Peers, had, now)
	var on []step
	if c.PrivateKey != nil {
		var off []step
		off, on = m.wake(want.Peers)
		steps = append(steps, off...)
	}
	if err = m.write(client, c, steps, changes); err != nil {
		return err
	}
	if err = m.write(client, wgtypes.Config{}, on, changes); err != nil {
		return err
	}
	m.key, m.planned = want.key, make(map[string]mesh.Peer, len(want.Peers))
	for _, p := range want.Peers {
		m.plan(p)
	}
	maps.DeleteFunc(m.receives, func(key wgtypes.Key, _ netip.Addr) bool { _, exists := m.peers[key]; return !exists })
	return nil
}

// write changes the device, in one call.
func (m *memory) write(client *wgctrl.Client, c wgtypes.Config, steps []step, changes *Changes) error {
	for _, s := range steps {
		c.Peers = append(c.Peers, s.config)
	}
	if c.PrivateKey == nil && c.ListenPort == nil && len(steps) == 0 {
		return nil
	}
	if err := client.ConfigureDevice(mesh.Link, c); err != nil {
		return fmt.Errorf("configuring WireGuard on %s (%d peers): %w", mesh.Link, len(steps), err)
	}
	m.did(steps)
	changes.Peers += len(steps)
	if c.PrivateKey != nil || c.ListenPort != nil {
		changes.Links++
	}
	return nil
}

// closeQuietly closes a client whose answers are already in hand.
func closeQuietly(client *wgctrl.Client) {
	_ = client.Close()
}

package wgdevice

import (
	"context"
	"errors"
	"net/netip"
	"slices"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/mesh"
)

// ErrUnknown says that a change alone would not do, because it is not known what the kernel has: an Apply has to come first.
var ErrUnknown = errors.New("the kernel's state is not known")

// Patch makes one change to the mesh that stands, without a look at what does not change. It is what an Apply of the mesh as it is
// then would write, but for the nets below nodes' own addresses that no Node claims any more: they go with the next Apply. It returns
// ErrUnknown, having written nothing, before the first Apply, after an error, with another key, and where the link itself changes.
func (d *Device) Patch(ctx context.Context, change mesh.Change, key Key) (Changes, error) {
	d.writing.Lock()
	defer d.writing.Unlock()
	m := &d.memory
	if !m.known || change.Link || m.encrypted && m.key.private() != key.private() {
		return Changes{}, ErrUnknown
	}
	if change.Empty() {
		return Changes{}, nil
	}
	m.known = false
	k, err := openKernel()
	if err != nil {
		return Changes{}, err
	}
	defer k.Close()
	var changes Changes
	err = d.patch(ctx, k, change, &changes)
	m.known = err == nil
	return changes, err
}

// patch writes the peers, then the routes to them.
func (d *Device) patch(ctx context.Context, k *kernel, change mesh.Change, changes *Changes) error {
	m := &d.memory
	add, remove := m.meshRoutes(change.Routes), m.meshRoutes(change.RemovedRoutes)
	if m.encrypted && len(change.Peers)+len(change.RemovedPeers) > 0 {
		mode, err := d.resolve(k)
		if err != nil {
			return err
		}
		client, err := openWireGuard(ctx, mode)
		if err != nil {
			return err
		}
		defer closeQuietly(client)
		var had []wgtypes.Key
		for _, p := range slices.Concat(change.Peers, change.RemovedPeers) {
			had = append(had, keysOf(m.planned[p.Node])...)
		}
		steps := m.delta(change.Peers, had, d.clock())
		come, leave := m.hostChange(steps)
		add, remove = append(add, come...), append(remove, leave...)
		if err = m.write(client, wgtypes.Config{}, steps, changes); err != nil {
			return err
		}
		for _, p := range change.RemovedPeers {
			delete(m.planned, p.Node)
		}
		for _, p := range change.Peers {
			m.plan(p)
		}
	}
	return m.patchRoutes(k, add, remove, changes)
}

// Follow gives the allowed IPs of each peer that is about to change its key to the new one, once a handshake has shown that the
// peer uses it, and begins the handshakes with new peers again that crossed with the peers' own. It returns what is to be seen
// still. The caller asks again every few milliseconds while keys are awaited, because what such a peer sends by its new key is dropped
// until that has the allowed IPs, and a few times in a tenth of a second while handshakes are.
func (d *Device) Follow(ctx context.Context, want mesh.Config) (Awaited, error) {
	d.writing.Lock()
	defer d.writing.Unlock()
	m := &d.memory
	awaited := m.awaited(want.Peers, d.clock())
	if awaited == (Awaited{}) || !m.known || !m.encrypted {
		return awaited, nil
	}
	m.known = false
	k, err := openKernel()
	if err != nil {
		return awaited, err
	}
	defer k.Close()
	if err = d.follow(ctx, k, want.Peers); err != nil {
		return awaited, err
	}
	m.known = true
	return m.awaited(want.Peers, d.clock()), nil
}

// follow writes what an Apply would for peers that use their next key now; where there are none it makes those anew whose handshakes
// crossed.
func (d *Device) follow(ctx context.Context, k *kernel, peers []mesh.Peer) error {
	mode, err := d.resolve(k)
	if err != nil {
		return err
	}
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
	waiting := m.waiting(peers)
	m.see(actual, now)
	var shaken []mesh.Peer
	var had []wgtypes.Key
	for _, p := range waiting {
		if m.planned[p.Node].Next == p.Next && !m.peers[p.Next].handshake.IsZero() {
			shaken = append(shaken, p)
			had = append(had, p.PublicKey)
		}
	}
	var changes Changes
	steps := m.delta(shaken, had, now)
	if len(steps) == 0 {
		steps = m.crossed(now)
	}
	come, leave := m.hostChange(steps)
	if err = m.write(client, wgtypes.Config{}, steps, &changes); err != nil {
		return err
	}
	return m.patchRoutes(k, come, leave, &changes)
}

// waiting returns the peers whose next key is not known to be in use.
func (m *memory) waiting(peers []mesh.Peer) []mesh.Peer {
	var waiting []mesh.Peer
	for _, p := range peers {
		if p.Next != [32]byte{} && m.peers[p.Next].handshake.IsZero() {
			waiting = append(waiting, p)
		}
	}
	return waiting
}

// hostChange returns the routes to nodes' own addresses that come and go with a change of peers that is not written yet, and the nets that come.
func (m *memory) hostChange(steps []step) (come, leave []route) {
	stays := map[netip.Prefix]bool{}
	for _, s := range steps {
		for _, host := range s.after.hosts() {
			stays[host] = true
			come = append(come, m.hostRoute(host), unreachableRoute(host, nodeTable))
		}
	}
	for _, s := range steps {
		for _, host := range m.peers[s.config.PublicKey].hosts() {
			if !stays[host] {
				leave = append(leave, m.hostRoute(host))
			}
		}
	}
	return come, leave
}

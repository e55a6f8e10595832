package main

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// The pauses of a follower. Those of a node that changes its key wait for no longer than the first; a node that has announced a key and
// gone away is looked for less often after a minute.
const (
	followPause     = 10 * time.Millisecond
	followPatience  = time.Minute
	followLatePause = 100 * time.Millisecond
	followRetry     = time.Second
	// followPeer is what the pause is for each peer of the tunnel, all of which a look reads: so looking takes about a tenth of a core. It
	// does not follow the time that a look took, which is long on a busy node, where nothing of the gap is to spare.
	followPeer = 130 * time.Microsecond
)

// device is a tunnel whose peers may change their keys.
type device interface {
	Apply(ctx context.Context, config mesh.Config, key wgdevice.Key) (wgdevice.Changes, error)
	Patch(ctx context.Context, change mesh.Change, key wgdevice.Key) (wgdevice.Changes, error)
	Follow(ctx context.Context, config mesh.Config) (pending int, err error)
}

// follower applies the mesh to the tunnel, and while peers change their keys, looks at the tunnel in between: with the first handshake by
// its next key a peer's prefixes have to move to that at once, because what it sends by the new key is dropped until they have.
type follower struct {
	device device
	clock  func() time.Time
	log    *slog.Logger
	// applied says that there is another mesh than before.
	applied chan struct{}

	// mu is held while the tunnel is written, so that nobody writes what follows from an older mesh.
	mu   sync.Mutex
	mesh mesh.Config
	// since is when the next keys of the mesh were others the last time. An audit, which applies the same again, changes nothing of that.
	since time.Time
}

func newFollower(d device, clock func() time.Time, log *slog.Logger) *follower {
	return &follower{device: d, clock: clock, log: log, applied: make(chan struct{}, 1)}
}

// apply makes the tunnel agree with a mesh: by the change alone where that is known and so is what stands, else as a whole.
func (f *follower) apply(ctx context.Context, want mesh.Config, change *mesh.Change, key wgdevice.Key) (wgdevice.Changes, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Equal(nextKeys(f.mesh), nextKeys(want)) {
		f.since = f.clock()
	}
	f.mesh = want
	select {
	case f.applied <- struct{}{}:
	default: // it will look at this one
	}
	if change != nil {
		changes, err := f.device.Patch(ctx, *change, key)
		if !errors.Is(err, wgdevice.ErrUnknown) {
			return changes, err
		}
	}
	return f.device.Apply(ctx, want, key)
}

// run follows the keys of the peers until the context ends.
func (f *follower) run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	failed := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.applied:
		case <-timer.C:
		}
		pending, pause, err := f.look(ctx)
		if err != nil && !failed && ctx.Err() == nil {
			f.log.Warn("following the keys of peers", "error", err) // the next audit reports what lasts
		}
		failed = err != nil
		switch {
		case failed:
			pause = followRetry
		case pending == 0:
			timer.Stop()
			continue
		}
		timer.Reset(pause)
	}
}

// look moves the prefixes of those peers that use their next key now, and returns how many do not yet, and the pause until the next look.
func (f *follower) look(ctx context.Context) (pending int, pause time.Duration, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(nextKeys(f.mesh)) == 0 {
		return 0, 0, nil
	}
	pause = max(followPause, time.Duration(len(f.mesh.Peers))*followPeer)
	if f.clock().Sub(f.since) > followPatience {
		pause = max(pause, followLatePause)
	}
	pending, err = f.device.Follow(ctx, f.mesh)
	return pending, pause, err
}

// nextKeys returns the keys that peers are about to use.
func nextKeys(m mesh.Config) [][32]byte {
	var keys [][32]byte
	for i := range m.Peers {
		if next := m.Peers[i].Next; next != [32]byte{} {
			keys = append(keys, next)
		}
	}
	return keys
}

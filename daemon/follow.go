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
// gone away is looked for less often after a minute. The second is for peers that are new: most have shaken hands at the first look.
const (
	followPause     = 10 * time.Millisecond
	followNewPause  = 50 * time.Millisecond
	followPatience  = time.Minute
	followLatePause = 100 * time.Millisecond
	followRetry     = time.Second
	// followPeer is what the pause is for each peer of the tunnel, all of which a look reads: so looking takes about a tenth of a core. It
	// does not follow the time that a look took, which is long on a busy node, where nothing of the gap is to spare.
	followPeer = 130 * time.Microsecond
)

// device is a tunnel whose peers come, and may change their keys.
type device interface {
	Apply(ctx context.Context, config mesh.Config, key wgdevice.Key) (wgdevice.Changes, error)
	Patch(ctx context.Context, change mesh.Change, key wgdevice.Key) (wgdevice.Changes, error)
	Follow(ctx context.Context, config mesh.Config) (wgdevice.Awaited, error)
	Challenge(ctx context.Context, config mesh.Config, later <-chan mesh.Config, found func()) error
}

// follower applies the mesh to the tunnel, and while peers change their keys or are new, looks at the tunnel in between: with the first
// handshake by its next key a peer's prefixes have to move to that at once, because what it sends by the new key is dropped until they
// have; and handshakes of two nodes with each other may have crossed, and have to begin again. Beside that it finds out which peers receive
// at their nodes' addresses, and then has the mesh applied once more.
type follower struct {
	device device
	clock  func() time.Time
	log    *slog.Logger
	// again has the mesh applied as a whole.
	again func()
	// applied says that a mesh was applied, and claimed which one, the last.
	applied chan struct{}
	claimed chan mesh.Config

	// mu is held while the tunnel is written, so that nobody writes what follows from an older mesh.
	mu   sync.Mutex
	mesh mesh.Config
	// since is when the next keys of the mesh were others the last time. An audit, which applies the same again, changes nothing of that.
	since time.Time
}

func newFollower(d device, clock func() time.Time, again func(), log *slog.Logger) *follower {
	return &follower{device: d, clock: clock, again: again, log: log, applied: make(chan struct{}, 1), claimed: make(chan mesh.Config, 1)}
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
	defer func() { // what is asked follows from what stands
		select {
		case <-f.claimed: // nobody came to that one
		default:
		}
		f.claimed <- want
	}()
	if change != nil {
		changes, err := f.device.Patch(ctx, *change, key)
		if !errors.Is(err, wgdevice.ErrUnknown) {
			return changes, err
		}
	}
	return f.device.Apply(ctx, want, key)
}

// run follows the keys and the handshakes of the peers until the context ends.
func (f *follower) run(ctx context.Context) {
	timer := time.NewTimer(followPause)
	defer timer.Stop()
	soon, failed := true, false // soon: the timer runs, and not because of an error
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.applied:
			if !soon {
				timer.Reset(followPause)
			}
			soon = true
			continue
		case <-timer.C:
		}
		pause, err := f.look(ctx)
		if err != nil && !failed && ctx.Err() == nil {
			f.log.Warn("following the peers of the tunnel", "error", err) // the next audit reports what lasts
		}
		failed = err != nil
		soon = pause > 0 && !failed
		if pause > 0 {
			timer.Reset(pause)
		}
	}
}

// look does what is to be done for the peers by now, and returns the pause until the next look, or 0 where nothing is awaited.
func (f *follower) look(ctx context.Context) (time.Duration, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	awaited, err := f.device.Follow(ctx, f.mesh)
	var pause time.Duration
	switch {
	case err != nil:
		return followRetry, err
	case awaited.Keys > 0 && f.clock().Sub(f.since) <= followPatience:
		pause = followPause
	case awaited.Handshakes > 0:
		pause = followNewPause
	case awaited.Keys > 0:
		pause = followLatePause
	default:
		return 0, nil
	}
	return max(pause, time.Duration(len(f.mesh.Peers))*followPeer), nil
}

// challenge asks the peers where they receive whenever a mesh was applied, an audit's too, until the context ends.
func (f *follower) challenge(ctx context.Context) {
	failed := false
	for {
		var want mesh.Config
		select {
		case <-ctx.Done():
			return
		case want = <-f.claimed:
		}
		err := f.device.Challenge(ctx, want, f.claimed, f.again)
		if err != nil && !failed && ctx.Err() == nil {
			f.log.Warn("asking nodes whether they receive at their InternalIPs; what pods send there stays in clear, or unreachable where one was found before", "error", err)
		}
		failed = err != nil
	}
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

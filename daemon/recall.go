package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/mesh"
)

// meshFile holds, in the run directory, the mesh as this node has it: peers, their public keys and prefixes, routes. It goes before another one
// is applied, and comes once that stands and some time has passed, so what it says is what stands, or what stood until the tunnel ended.
const meshFile = "mesh.json"

// rememberAfter is how long after a change meshFile comes back: thousands of peers are written down no more often than that.
const rememberAfter = 2 * time.Second

// bootFile has another text after each boot.
const bootFile = "/proc/sys/kernel/random/boot_id"

// applied is what meshFile holds.
type applied struct {
	// Boot says since when the mesh stands: after a boot nothing of it does.
	Boot string
	Mesh mesh.Config
}

func (n *node) meshPath() string { return filepath.Join(n.options.runDir, meshFile) }

// remember writes the mesh down that stands, unless it is written down: in an audit at once, after a change in a later step, because in a
// burst of changes each would cost as much as all of them.
func (n *node) remember(o *outcome, full bool) {
	if n.remembered || !n.options.encryptionMode {
		return
	}
	now := n.clock()
	switch {
	case full:
	case n.rememberAt.IsZero():
		n.rememberAt = now.Add(rememberAfter)
		time.AfterFunc(rememberAfter, n.loop.Trigger)
		return
	case now.Before(n.rememberAt):
		return
	}
	n.rememberAt = time.Time{}
	if err := n.rememberMesh(o.mesh); err != nil {
		o.problems = append(o.problems, applyProblem("MeshNotRemembered", n.options.runDir, err,
			"make room there, and the file system writable; until then a tunnel that ends while the API server is away waits for it"))
	}
}

// rememberMesh writes a mesh down.
func (n *node) rememberMesh(m mesh.Config) error {
	boot, err := os.ReadFile(bootFile)
	if err != nil {
		return fmt.Errorf("remembering the mesh: %w", err)
	}
	text, err := json.Marshal(applied{string(boot), m})
	if err != nil {
		return fmt.Errorf("remembering the mesh: %w", err)
	}
	draft := n.meshPath() + ".new"
	if err = os.WriteFile(draft, text, 0o600); err == nil {
		err = os.Rename(draft, n.meshPath())
	}
	if err != nil {
		return fmt.Errorf("remembering the mesh: %w", err)
	}
	n.remembered = true
	return nil
}

// forgetMesh comes before another mesh is applied than the one that is written down. Where it fails nothing may be applied: a peer that is
// taken away must not come back.
func (n *node) forgetMesh() error {
	if n.remembered {
		return nil
	}
	if err := removeFile(n.meshPath()); err != nil {
		return fmt.Errorf("forgetting the mesh as it was: %w", err)
	}
	return nil
}

// recallMesh returns the mesh that this node had applied last, nil where that is not known.
func (n *node) recallMesh() (*mesh.Config, error) {
	text, err := os.ReadFile(n.meshPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil //nolint:nilnil // no mesh is an answer, not a failure
	}
	var was applied
	if err == nil {
		err = json.Unmarshal(text, &was)
	}
	boot, errBoot := os.ReadFile(bootFile)
	if err = errors.Join(err, errBoot); err != nil {
		return nil, fmt.Errorf("recalling the mesh: %w", err)
	}
	if was.Boot != string(boot) {
		return nil, nil //nolint:nilnil // as above
	}
	return &was.Mesh, nil
}

// awaitSource waits until the source is complete. A tunnel that has ended meanwhile, or before this daemon started, gets back what this node had
// applied: what pods send to each other does not have to wait for the API server. The first step overrules it.
func (n *node) awaitSource(ctx context.Context) error {
	synced := make(chan error, 1)
	go func() { synced <- n.source.WaitForSync(ctx) }()
	again := time.NewTicker(resync)
	defer again.Stop()
	var recalled *mesh.Config
	for {
		var err error
		if recalled, err = n.restore(ctx, recalled); err != nil && ctx.Err() == nil {
			n.log.Warn("the tunnel waits for the cluster", "error", err)
		}
		select {
		case err = <-synced:
			return err
		case <-n.tunnelNews:
		case <-again.C:
		}
	}
}

// restore gives an empty tunnel the mesh that this node had applied, and returns it; after that, as an audit does, it gives it again. While a
// tunnel has peers they are newer than what is remembered, or the same. Without the guards as they were there is to be no tunnel.
func (n *node) restore(ctx context.Context, recalled *mesh.Config) (*mesh.Config, error) {
	if recalled == nil {
		if !n.options.encryptionMode {
			return nil, nil //nolint:nilnil // no mesh is an answer, not a failure
		}
		was, err := n.recallMesh()
		if err != nil || was == nil {
			return nil, err
		}
		empty, err := n.tunnel.Empty(ctx)
		if err != nil || !empty {
			return nil, err
		}
		recalled = was
	}
	if err := n.guardsStand(ctx, *recalled); err != nil {
		return nil, err
	}
	changes, err := n.follower.apply(ctx, *recalled, nil, n.keys.keys.Current())
	if err == nil && changes.Any() {
		n.log.Info("the tunnel has its peers again, as they were when the cluster was heard last", "peers", len(recalled.Peers))
	}
	return recalled, err
}

// errUnguarded says that something took the guards away.
var errUnguarded = errors.New("the guards do not stand as they did")

// guardsStand returns an error where the kernel lacks a part of the guards that go with a mesh. Whom the sets hold does not matter: they know
// more than the mesh.
func (n *node) guardsStand(ctx context.Context, m mesh.Config) error {
	differences, err := n.filter.Drift(ctx, guard.Rules(n.options.guards(m)))
	if err != nil {
		return fmt.Errorf("looking whether the guards stand: %w", err)
	}
	for _, d := range differences {
		if d.Chain != "" || len(d.Members) == 0 {
			return fmt.Errorf("%w: %s", errUnguarded, d)
		}
	}
	return nil
}

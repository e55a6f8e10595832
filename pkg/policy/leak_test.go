package policy

import (
	"math/rand/v2"
	"testing"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/internal/world"
)

// TestNothingStays follows clusters that change until nothing is left of them. On the way no selection is kept that no rule needs,
// and in the end nothing at all.
func TestNothingStays(t *testing.T) {
	seed := rand.Uint64()
	selections := 0
	for i := range 100 {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		s := world.New(r)
		c := NewCompiler(s.Self, Options{})
		c.Update(s.Delta())
		for range 20 {
			next := world.Step(r, s)
			c.Update(world.Diff(s, next))
			s = next
			selections += len(c.selections)
			needed(t, c)
		}
		c.Update(world.Diff(s, cluster.Snapshot{Self: s.Self}))
		for what, left := range map[string]int{
			"namespaces": len(c.namespaces), "addresses": len(c.owners.first) + len(c.owners.more), "selections": len(c.selections),
			"scopes": len(c.scopes), "selectors": len(c.byLabels.asking) + len(c.byLabels.rest), "sets": len(c.sets),
			"groups": len(c.groups), "chains": len(c.chains), "news": len(c.dirty) + len(c.stale) + len(c.stirred) + len(c.touches),
		} {
			if left > 0 {
				t.Errorf("%d %s are left of an empty cluster", left, what)
			}
		}
		if t.Failed() {
			t.Fatalf("in world %d of seed %d", i, seed)
		}
	}
	if selections < 1000 {
		t.Errorf("seed %d: %d selections are too few to prove anything", seed, selections)
	}
}

// needed checks that every selection, and every one that a pod is in, is one of a set in use.
func needed(t *testing.T, c *Compiler) {
	t.Helper()
	for id, s := range c.selections {
		for _, x := range s.sets {
			if x.refs < 1 || c.sets[x.Name] != x {
				t.Errorf("set %s of selection %v has %d references", x.Name, id, x.refs)
			}
		}
		if s.dead || len(s.sets) == 0 {
			t.Errorf("selection %v has no sets", id)
		}
	}
	for name, n := range c.namespaces {
		for _, p := range n.pods {
			for _, s := range p.in {
				if c.selections[s.id] != s {
					t.Errorf("pod %s/%s is in selection %v, which nobody needs", name, p.Name, s.id)
				}
			}
		}
	}
}

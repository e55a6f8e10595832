package firewall

import (
	"context"
	"fmt"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// Bare says whether no set, chain or hook of ours stands, as after a boot. Only then may rules be applied by who does not know the
// cluster yet: an Apply takes away what it is not told of. Any goroutine may call it.
func (w *Firewall) Bare(ctx context.Context) (bool, error) {
	sets, err := w.sets.List("")
	if err != nil || len(sets) > 0 {
		return false, err
	}
	for _, f := range netfilter.Families {
		saved, err := w.tools[f].readAll(ctx)
		if err != nil {
			return false, fmt.Errorf("reading the rules (%s): %w", f, err)
		}
		for _, p := range places(f) {
			if len(parseTable(saved[p.table]).chains) > 0 {
				return false, nil
			}
		}
	}
	return true, nil
}

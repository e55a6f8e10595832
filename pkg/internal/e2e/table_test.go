//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"
)

// reachTable says for each source, a pod by "namespace/name", a node or outside, which targets it reaches.
type reachTable map[string]map[string]bool

// set says whether a pod reaches another over TCP and UDP.
func (r reachTable) set(from string, to *probePod, reached bool) {
	r.setEach(from, to, reached, reached)
}

// setEach says whether a pod reaches another over TCP, and over UDP.
func (r reachTable) setEach(from string, to *probePod, tcp, udp bool) {
	if r[from] == nil {
		r[from] = map[string]bool{}
	}
	for _, target := range to.targets("tcp") {
		r[from][target] = tcp
	}
	for _, target := range to.targets("udp") {
		r[from][target] = udp
	}
}

// awaitTable waits until the cluster is as the table says, which takes the daemons a moment after a policy changes, and
// then checks the table once more under the capture of the wire.
func (c *cluster) awaitTable(t *testing.T, table reachTable) {
	t.Helper()
	eventually(t, time.Minute, "the pods reach one another as expected", func(ctx context.Context) error {
		return c.compare(ctx, table, newMarker(t))
	})
	c.watch(t, func(marker string) {
		if err := c.compare(t.Context(), table, marker); err != nil {
			t.Error(err)
		}
	})
}

// compare probes everything in a table, all sources at once, and returns an error that lists what differs.
func (c *cluster) compare(ctx context.Context, table reachTable, marker string) error {
	sources := slices.Sorted(maps.Keys(table))
	errs := make([]error, len(sources))
	var group sync.WaitGroup
	for i, from := range sources {
		group.Go(func() { errs[i] = c.compareFrom(ctx, from, table[from], marker) })
	}
	group.Wait()
	return errors.Join(errs...)
}

// compareFrom probes the targets of one source. A target that is not to be reached must be silent: an error of any other
// kind is not what a policy does.
func (c *cluster) compareFrom(ctx context.Context, from string, targets map[string]bool, marker string) error {
	results, err := c.probeFrom(ctx, from, marker, slices.Sorted(maps.Keys(targets))...)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range results {
		want := targets[r.Target]
		if r.Reached != want || !want && !r.Silent {
			errs = append(errs, fmt.Errorf("%s -> %s: reached %v, want %v %s", from, r.Target, r.Reached, want, r.Error))
		}
	}
	return errors.Join(errs...)
}

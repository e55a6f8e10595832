package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/warren-cni/warren/pkg/lab"
)

// aliveAfter is how many probes must get through after a fault until it counts as survived.
const aliveAfter = 50

// traffic are probes between nodes that come again and again.
type traffic struct {
	cancel  context.CancelFunc
	senders sync.WaitGroup
	through atomic.Int64
	lost    atomic.Int64
}

// startTraffic sends along every connection that is allowed between the node and others, until stop.
func (d *demo) startTraffic(ctx context.Context, marker [lab.MarkerSize]byte, node *lab.Node) *traffic {
	t := &traffic{}
	ctx, t.cancel = context.WithCancel(ctx)
	attempts := slices.DeleteFunc(d.attempts(marker, tiers()), func(a attempt) bool {
		return !a.expected || a.nodes[0] == a.nodes[1] || !slices.Contains(a.nodes[:], node)
	})
	for _, a := range attempts {
		t.senders.Go(func() {
			for ctx.Err() == nil {
				within, cancel := context.WithTimeout(ctx, patienceChange)
				err := a.probe(within, a.address)
				cancel()
				switch {
				case err == nil:
					t.through.Add(1)
				case ctx.Err() == nil:
					t.lost.Add(1)
				}
			}
		})
	}
	return t
}

// await waits until so many more probes got through.
func (t *traffic) await(ctx context.Context, count int64) error {
	ctx, cancel := context.WithTimeout(ctx, changePatience)
	defer cancel()
	wanted := t.through.Load() + count
	return lab.Until(ctx, func() error {
		if through := t.through.Load(); through < wanted {
			return fmt.Errorf("%d of %d probes got through", count-(wanted-through), count)
		}
		return nil
	})
}

// stop ends the traffic.
func (t *traffic) stop() {
	t.cancel()
	t.senders.Wait()
}

// showFaults kills the daemon and the tunnel of a node under traffic.
func (d *demo) showFaults(ctx context.Context) error {
	node := d.lab.Nodes[0]
	err := d.title("Processes die", "On "+node.Name+` the daemon is killed (SIGKILL), and then the tunnel, while its pods and those of the other nodes send
to each other all the time. The wire is captured throughout.`)
	if err != nil {
		return err
	}
	marker := lab.NewMarker()
	capture, err := d.lab.Capture(marker)
	if err != nil {
		return err
	}
	t := d.startTraffic(ctx, marker, node)
	err = t.await(ctx, aliveAfter)
	if err == nil {
		err = errors.Join(d.killDaemon(ctx, t), d.killTunnel(ctx, t))
	}
	t.stop()
	counts, stopErr := capture.Stop()
	if err = errors.Join(err, stopErr); err != nil {
		return err
	}
	return errors.Join(
		d.check(counts.Marked == 0 && counts.Pods == 0, "packets in clear: %d with the marker, %d with a pod's address; WireGuard packets: %d",
			counts.Marked, counts.Pods, counts.WireGuard),
		d.check(counts.WireGuard > 0, "the capture saw %d connections through the tunnel", t.through.Load()))
}

// killDaemon kills the first node's daemon: nothing is lost.
func (d *demo) killDaemon(ctx context.Context, t *traffic) error {
	node := d.lab.Nodes[0]
	lost := t.lost.Load()
	if err := d.daemons[0].Kill(); err != nil {
		return err
	}
	err := t.await(ctx, aliveAfter)
	if err == nil {
		d.daemons[0], err = node.StartDaemon(ctx, nil)
	}
	if err == nil {
		err = node.Ready(ctx, d.daemons[0], len(d.lab.Nodes)-1)
	}
	if err == nil {
		err = t.await(ctx, aliveAfter)
	}
	lost = t.lost.Load() - lost
	return errors.Join(err, d.check(err == nil && lost == 0, "the daemon was killed and came back: %d connections lost", lost))
}

// killTunnel kills the first node's tunnel: nothing gets through until it is back, and nothing in clear.
func (d *demo) killTunnel(ctx context.Context, t *traffic) error {
	if err := d.tunnels[0].Kill(); err != nil {
		return err
	}
	begin := d.clock()
	var err error
	if d.tunnels[0], err = d.lab.Nodes[0].StartTunnel(ctx); err == nil {
		err = t.await(ctx, 1)
	}
	took := d.clock().Sub(begin)
	if err == nil {
		err = t.await(ctx, aliveAfter)
	}
	return errors.Join(err, d.check(err == nil, "the tunnel was killed and started again: connections after %.1f seconds", took.Seconds()))
}

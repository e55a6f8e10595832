package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/conntrack"
	"github.com/warren-cni/warren/pkg/policy"
)

// The least time between two sweeps, and between a failed one and the next: a sweep looks at the whole table of connections.
const (
	sweepPace  = 250 * time.Millisecond
	sweepRetry = time.Second
)

// cutter cuts the established connections that policies do not allow any more. It works beside the loop, which has to write
// the rules first and never waits for it.
type cutter struct {
	log  *slog.Logger
	wake chan struct{}
	// sweep judges the connections in a scope.
	sweep func(context.Context, scope) (conntrack.Counts, error)

	mu sync.Mutex
	// fresh is what changed since the last sweep; settled is what was swept once. It is swept again after the next audit: a packet
	// that was on its way while the rules changed may have begun a connection behind the first sweep. second is what has come to
	// that.
	fresh, settled, second scope
	audits                 int
	problem                []cluster.Problem
}

// scope are the connections of some addresses, or all.
type scope struct {
	all       bool
	addresses map[netip.Addr]bool
}

func (s *scope) add(o scope) {
	s.all = s.all || o.all
	if s.addresses == nil {
		s.addresses = map[netip.Addr]bool{}
	}
	maps.Copy(s.addresses, o.addresses)
}

func (s *scope) empty() bool { return !s.all && len(s.addresses) == 0 }

// newCutter returns a cutter that judges by allows, which other goroutines may call.
func newCutter(allows func(policy.Flow) bool, log *slog.Logger) *cutter {
	return &cutter{log: log, wake: make(chan struct{}, 1), sweep: func(ctx context.Context, s scope) (conntrack.Counts, error) {
		own, err := ownAddresses()
		if err != nil {
			return conntrack.Counts{}, err
		}
		judge := func(f conntrack.Flow) bool { return own[f.Src] || own[f.Dst] || allows(policyFlow(f)) }
		if s.all {
			return conntrack.SweepAll(ctx, judge)
		}
		return conntrack.Sweep(ctx, slices.Collect(maps.Keys(s.addresses)), judge)
	}}
}

// changed says that the rules have changed for connections of the addresses, and stand.
func (c *cutter) changed(addresses []netip.Addr) {
	if len(addresses) == 0 {
		return
	}
	changed := scope{addresses: make(map[netip.Addr]bool, len(addresses))}
	for _, a := range addresses {
		changed.addresses[a] = true
	}
	c.mu.Lock()
	c.fresh.add(changed)
	c.mu.Unlock()
	c.signal()
}

// audited says that all rules stand, and whether some did not before: nobody knows then what began meanwhile, nor while the
// daemon was away.
func (c *cutter) audited(repaired bool) {
	c.mu.Lock()
	if repaired || c.audits == 0 {
		c.fresh.all = true
	}
	c.audits++
	c.second.add(c.settled)
	c.settled = scope{}
	c.mu.Unlock()
	c.signal()
}

// problems are those of the last sweep.
func (c *cutter) problems() []cluster.Problem {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.problem
}

func (c *cutter) signal() {
	select {
	case c.wake <- struct{}{}:
	default: // it is awake
	}
}

// run sweeps at once when something changes, and together what changes in the time after that, until the context ends.
func (c *cutter) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.wake:
		}
		wait := sweepPace
		if !c.sweepOnce(ctx) {
			wait = sweepRetry
			c.signal()
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

// sweepOnce sweeps what is due; where that fails it stays due.
func (c *cutter) sweepOnce(ctx context.Context) bool {
	c.mu.Lock()
	fresh, second := c.fresh, c.second
	c.fresh, c.second = scope{}, scope{}
	c.mu.Unlock()
	var due scope
	due.add(fresh)
	due.add(second)
	if due.empty() {
		return true
	}
	counts, err := c.sweep(ctx, due)
	if ctx.Err() != nil {
		return true // the daemon stops: that says nothing
	}
	if counts.Cut+counts.Lifted > 0 {
		c.log.Info("established connections judged anew", "judged", counts.Judged, "cut", counts.Cut, "lifted", counts.Lifted)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.problem = nil
	if err != nil {
		c.fresh.add(fresh)
		c.second.add(second)
		c.problem = []cluster.Problem{applyProblem("ConnectionsNotCut", "connections of this node", err,
			"connections that policies no longer allow may go on; the daemon retries")}
		return false
	}
	c.settled.add(fresh)
	return true
}

// policyFlow is a connection as policies see it.
func policyFlow(f conntrack.Flow) policy.Flow {
	flow := policy.Flow{Src: f.Src, Dst: f.Dst, Protocol: policy.ICMP} // like it, every other protocol has no ports to name
	switch f.Protocol {
	case unix.IPPROTO_TCP:
		flow.Protocol = cluster.TCP
	case unix.IPPROTO_UDP:
		flow.Protocol = cluster.UDP
	case unix.IPPROTO_SCTP:
		flow.Protocol = cluster.SCTP
	default:
		return flow
	}
	flow.Port = f.Port
	return flow
}

// ownAddresses are those of the node's links. What comes from them or goes to them is never judged: traffic between a pod and its own
// node is always allowed.
func ownAddresses() (map[netip.Addr]bool, error) {
	list, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("reading the node's addresses: %w", err)
	}
	own := make(map[netip.Addr]bool, len(list))
	for _, a := range list {
		if prefix, parseErr := netip.ParsePrefix(a.String()); parseErr == nil {
			own[prefix.Addr()] = true
		}
	}
	return own, nil
}

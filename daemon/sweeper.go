package main

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/conntrack"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/podlink"
)

// tidyPace is how long the sweeper waits for more once attachments were released: to end many costs hardly more than one.
const tidyPace = 300 * time.Millisecond

// sweeper finishes what the plugin's DEL begins: it deletes the links of pods that have ended, and their connections, so that their
// addresses can be leased again. It works beside the loop. What an earlier daemon left is done when it starts.
type sweeper struct {
	wake chan struct{}
	// sweep does the work.
	sweep func() error

	mu      sync.Mutex
	problem []cluster.Problem
}

// newSweeper returns the sweeper of the leases' node.
func newSweeper(leases *ipam.Store) *sweeper {
	return &sweeper{wake: make(chan struct{}, 1), sweep: func() error {
		return errors.Join(podlink.Sweep(), leases.Forget(conntrack.Forget))
	}}
}

// released says that there may be something to do.
func (s *sweeper) released() {
	select {
	case s.wake <- struct{}{}:
	default: // it will look
	}
}

// problems are those of the last sweep.
func (s *sweeper) problems() []cluster.Problem {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.problem
}

// run sweeps a little after something was released, and from time to time, until the context ends.
func (s *sweeper) run(ctx context.Context) {
	for {
		next := resync
		if err := s.sweepOnce(); err != nil {
			next = sweepRetry
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(next):
		case <-s.wake:
			select {
			case <-ctx.Done():
				return
			case <-time.After(tidyPace):
			}
		}
	}
}

// sweepOnce sweeps and notes how that went.
func (s *sweeper) sweepOnce() error {
	err := s.sweep()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.problem = nil
	if err != nil {
		s.problem = []cluster.Problem{applyProblem("PodsNotSwept", "pods that have ended", err,
			"let the daemon do what the message says failed: delete links and connections (CAP_NET_ADMIN, the module nf_conntrack_netlink), write the leases "+
				"(room, a writable file system); or reboot the node. Until then the links stay, out of service, and nobody gets the addresses; the daemon retries")}
	}
	return err
}

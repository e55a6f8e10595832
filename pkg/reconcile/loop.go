// Package reconcile is the one loop of the daemon: it runs a step whenever something changed, again from time to time,
// and again with growing pauses after an error.
//
// One goroutine owns all state: the step runs nowhere else and never twice at a time. Signals that arrive while it
// runs are coalesced into one further run. An idle loop starts the step at once; under load it pauses after each as long as that
// took, within bounds, so that what comes in a burst is done together.
package reconcile

import (
	"context"
	"time"
)

// The pause after the first failed step, and the longest.
const (
	minBackoff = 200 * time.Millisecond
	maxBackoff = 10 * time.Second
)

// The shortest and the longest pause after a step.
const (
	minPause = 5 * time.Millisecond
	maxPause = 20 * time.Millisecond
)

// auditShare is how many times what a full step worked the time to the next one is: on a node where reading the kernel is much
// work, that work stays a small part of a core. But no audit begins later than maxAudit after the last one, and the step that runs by then.
const (
	auditShare = 20
	maxAudit   = 30 * time.Second
)

// Loop runs a step. Make it with New.
type Loop struct {
	step    func(ctx context.Context, full bool) error
	resync  time.Duration
	clock   func() time.Time
	worked  func() time.Duration
	trigger chan struct{}
	waiters chan chan<- error
}

// New returns a loop around step, which runs with full == true at the first time, after an error, and every resync (or less
// often, where full steps are much work): then it trusts nothing that it remembers. What was worked so far is processor time, not the
// clock's: on a busy node a step waits long for its turn, and drift must not wait for that as well. Beside the step's it may hold what the rest
// of the process works.
func New(step func(ctx context.Context, full bool) error, resync time.Duration, clock func() time.Time, worked func() time.Duration) *Loop {
	return &Loop{step: step, resync: resync, clock: clock, worked: worked, trigger: make(chan struct{}, 1), waiters: make(chan chan<- error)}
}

// Trigger asks for a run of the step and returns at once.
func (l *Loop) Trigger() {
	select {
	case l.trigger <- struct{}{}:
	default: // a run is asked for already
	}
}

// Sync waits for a run of the step that starts after the call, and returns that run's error.
func (l *Loop) Sync(ctx context.Context) error {
	done := make(chan error, 1)
	select {
	case l.waiters <- done:
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Run runs the loop until the context ends.
func (l *Loop) Run(ctx context.Context) {
	audit := time.NewTimer(l.resync)
	defer audit.Stop()
	retry := time.NewTimer(minBackoff)
	defer retry.Stop()
	retry.Stop()
	backoff := minBackoff
	full := true // the first run, which waits for no signal, and is no other than this where there is one already
	var waiting []chan<- error
	for ctx.Err() == nil {
		waiting = l.collect(waiting)
		began, before := l.clock(), l.worked()
		err := l.step(ctx, full)
		took, work := l.clock().Sub(began), l.worked()-before
		for _, w := range waiting {
			w <- err
		}
		if full {
			audit.Reset(max(l.resync, min(auditShare*work, maxAudit)))
		}
		if err != nil {
			retry.Reset(backoff)
			backoff = min(2*backoff, maxBackoff)
		} else {
			backoff = minBackoff
		}
		pause(ctx, min(max(took, minPause), maxPause))

		full, waiting = false, nil
		select { // before all signals, which may come without an end
		case <-audit.C:
			full = true
			continue
		case <-retry.C:
			full = true
			continue
		default:
		}
		select {
		case <-ctx.Done():
		case <-audit.C:
			full = true
		case <-retry.C:
			full = true
		case <-l.trigger:
		case w := <-l.waiters:
			waiting = append(waiting, w)
		}
	}
}

// pause waits, unless the context ends.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// collect takes every signal that has arrived by now: the run that starts next serves them all.
func (l *Loop) collect(waiting []chan<- error) []chan<- error {
	for {
		select {
		case w := <-l.waiters:
			waiting = append(waiting, w)
		case <-l.trigger:
		default:
			return waiting
		}
	}
}

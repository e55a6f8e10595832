package kube

import (
	"context"
	"sync"
)

// flights lets callers that ask for the same thing at a time share one read. A read that had begun when a caller asked is
// not shared with it, because it may not show what had happened by then: the caller waits for the next one, with all who
// ask meanwhile.
type flights struct {
	mu      sync.Mutex
	running map[string]*flight // by what is read
}

// flight is one read.
type flight struct {
	read func() error
	done chan struct{}
	err  error // read it only once done is closed
	next *flight
}

func newFlight(read func() error) *flight {
	return &flight{read: read, done: make(chan struct{})}
}

// do returns the error of a read that began after the call, or the context's.
func (f *flights) do(ctx context.Context, name string, read func() error) error {
	mine := f.join(name, read)
	select {
	case <-mine.done:
		return mine.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// join returns the next flight, and begins it where none is under way.
func (f *flights) join(name string, read func() error) *flight {
	f.mu.Lock()
	defer f.mu.Unlock()
	running, ok := f.running[name]
	if !ok {
		first := newFlight(read)
		f.running[name] = first
		go f.fly(name, first)
		return first
	}
	if running.next == nil {
		running.next = newFlight(read)
	}
	return running.next
}

// fly carries out a flight and those that follow it.
func (f *flights) fly(name string, current *flight) {
	for current != nil {
		current.err = current.read()
		close(current.done)
		current = f.land(name, current)
	}
}

// land puts the next flight in a flight's place.
func (f *flights) land(name string, current *flight) *flight {
	f.mu.Lock()
	defer f.mu.Unlock()
	if current.next == nil {
		delete(f.running, name)
	} else {
		f.running[name] = current.next
	}
	return current.next
}

package kube

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
)

func TestFlightsShareReadsThatBeginLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := flights{running: make(map[string]*flight)}
		failing := errors.New("the second read fails")
		var clock, begun, reads atomic.Int64
		land := make(chan error)
		read := func() error {
			reads.Add(1)
			begun.Store(clock.Add(1))
			return <-land
		}
		var callers sync.WaitGroup
		call := func(want error) {
			callers.Go(func() {
				asked := clock.Add(1)
				if err := f.do(t.Context(), "shop", read); !errors.Is(err, want) {
					t.Errorf("got %v, want %v", err, want)
				}
				if begun.Load() < asked {
					t.Error("a caller got a read that had begun before")
				}
			})
		}
		call(nil)
		synctest.Wait()
		for range 20 {
			call(failing)
		}
		synctest.Wait()
		land <- nil
		land <- failing
		callers.Wait()
		if got := reads.Load(); got != 2 {
			t.Errorf("%d reads for 1 + 20 callers, want 2", got)
		}
		call(nil)
		land <- nil
		callers.Wait()
		synctest.Wait()
		if reads.Load() != 3 || len(f.running) > 0 {
			t.Errorf("%d reads and %d running at the end, want 3 and none", reads.Load(), len(f.running))
		}
	})
}

func TestFlightsLetCallersGo(t *testing.T) {
	f := flights{running: make(map[string]*flight)}
	land := make(chan error)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := f.do(ctx, "shop", func() error { return <-land }); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context's error while the read goes on", err)
	}
	if err := f.do(t.Context(), "other", func() error { return nil }); err != nil {
		t.Errorf("another name: got %v, want nil at once", err)
	}
	land <- nil
}

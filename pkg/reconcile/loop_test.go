package reconcile_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/warren-cni/warren/pkg/reconcile"
)

var errBroken = errors.New("broken")

// recorder counts runs and answers what it is told to.
type recorder struct {
	mu    sync.Mutex
	fulls []bool
	err   error
	delay time.Duration
	// work is what a run works, and sum what all did.
	work, sum time.Duration
}

func (r *recorder) step(ctx context.Context, full bool) error {
	r.mu.Lock()
	r.fulls = append(r.fulls, full)
	r.sum += r.work
	err, delay := r.err, r.delay
	r.mu.Unlock()
	select {
	case <-time.After(delay):
	case <-ctx.Done():
	}
	return err
}

func (r *recorder) worked() time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.sum
}

func (r *recorder) set(err error, delay time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err, r.delay = err, delay
}

func (r *recorder) runs() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.fulls)
}

func (r *recorder) lastFull() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.fulls[len(r.fulls)-1]
}

// bubble runs the loop with fake time.
func bubble(t *testing.T, r *recorder, test func(t *testing.T, ctx context.Context, l *reconcile.Loop)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		l := reconcile.New(r.step, time.Minute, time.Now, r.worked)
		go l.Run(ctx)
		time.Sleep(time.Second) // from here on it is idle
		synctest.Wait()
		test(t, ctx, l)
	})
}

// What is known before the loop runs is no reason for it to trust what it has not read.
func TestFirstRunIsFull(t *testing.T) {
	for range 100 {
		r := &recorder{}
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			l := reconcile.New(r.step, time.Minute, time.Now, r.worked)
			l.Trigger()
			go l.Run(ctx)
			go l.Sync(ctx) //nolint:errcheck // it asks for a run
			time.Sleep(time.Second)
			synctest.Wait()
			if len(r.fulls) == 0 || !r.fulls[0] {
				t.Fatalf("runs %v, the first must be full", r.fulls)
			}
		})
	}
}

func TestCoalescesABurst(t *testing.T) {
	r := &recorder{}
	bubble(t, r, func(t *testing.T, _ context.Context, l *reconcile.Loop) {
		before := r.runs()
		l.Trigger()
		synctest.Wait()
		if r.runs() != before+1 {
			t.Fatalf("an idle loop made %d runs at once, want 1", r.runs()-before)
		}
		for range 100 {
			l.Trigger()
			time.Sleep(time.Millisecond)
		}
		synctest.Wait()
		if n := r.runs() - before; n < 100/20 || n > 100/5+2 {
			t.Fatalf("%d runs for 100 triggers in 100 ms, want one for every 5 to 20 ms", n)
		}
	})
}

func TestLongAuditsAreRare(t *testing.T) {
	r := &recorder{}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go reconcile.New(r.step, 10*time.Second, time.Now, r.worked).Run(ctx)
		for _, c := range []struct {
			took, worked time.Duration
			want         int
		}{
			{100 * time.Millisecond, 100 * time.Millisecond, 12}, // every 10 s
			{time.Second, 100 * time.Millisecond, 11},            // the same: it waited for most of the time
			{time.Second, time.Second, 6},                        // every 20 s
			{100 * time.Millisecond, time.Second, 6},             // the same: several processors worked for it
			{5 * time.Second, 5 * time.Second, 4},                // every 30 s, and not every 100
		} {
			r.set(nil, c.took)
			r.mu.Lock()
			r.work = c.worked
			r.mu.Unlock()
			time.Sleep(time.Minute) // until the last that was shorter is over
			synctest.Wait()
			before := r.runs()
			time.Sleep(2 * time.Minute)
			synctest.Wait()
			if n := r.runs() - before; n < c.want-1 || n > c.want+1 {
				t.Errorf("%d audits of %v in two minutes, want about %d", n, c, c.want)
			}
		}
	})
}

func TestCoalescesWhileTheStepRuns(t *testing.T) {
	r := &recorder{}
	bubble(t, r, func(t *testing.T, _ context.Context, l *reconcile.Loop) {
		r.set(nil, time.Second)
		for range 100 {
			l.Trigger()
			time.Sleep(time.Millisecond)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if r.runs() != 3 { // the first, the one that the first trigger started, one for all the others
			t.Fatalf("%d runs, want 3", r.runs())
		}
	})
}

func TestSyncWaitsForARunThatStartsAfterIt(t *testing.T) {
	r := &recorder{}
	bubble(t, r, func(t *testing.T, ctx context.Context, l *reconcile.Loop) {
		r.set(nil, time.Second)
		l.Trigger()
		synctest.Wait() // a run is under way, and must not count
		start, before := time.Now(), r.runs()
		if err := l.Sync(ctx); err != nil {
			t.Fatal(err)
		}
		if r.runs() != before+1 || time.Since(start) < 2*time.Second {
			t.Fatalf("%d runs in %v, want one whole run after the one under way", r.runs()-before, time.Since(start))
		}
		r.set(errBroken, 0)
		if err := l.Sync(ctx); !errors.Is(err, errBroken) {
			t.Fatalf("got %v, want the step's error", err)
		}
	})
}

func TestBacksOffAndRecovers(t *testing.T) {
	r := &recorder{err: errBroken}
	bubble(t, r, func(t *testing.T, _ context.Context, _ *reconcile.Loop) {
		time.Sleep(30 * time.Second)
		synctest.Wait()
		if n := r.runs(); n < 6 || n > 10 { // 0.2 + 0.4 + ... + 6.4, then 10 s each
			t.Fatalf("%d runs in 30 s, want about 8", n)
		}
		if !r.lastFull() {
			t.Fatal("a retry must not trust what it remembers")
		}
		r.set(nil, 0)
		time.Sleep(11 * time.Second)
		synctest.Wait()
		n := r.runs()
		time.Sleep(15 * time.Second)
		synctest.Wait()
		if r.runs() > n+1 { // at most the audit
			t.Fatalf("still retrying after success: %d more runs", r.runs()-n)
		}
	})
}

func TestSyncEndsWithItsContext(t *testing.T) {
	r := &recorder{}
	bubble(t, r, func(t *testing.T, ctx context.Context, l *reconcile.Loop) {
		r.set(nil, time.Hour)
		l.Trigger()
		synctest.Wait()
		short, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if err := l.Sync(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v", err)
		}
	})
}

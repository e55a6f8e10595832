package main

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// watched is a device that tells how it was called.
type watched struct {
	mu sync.Mutex
	calls
	answers
}

// calls is how often the methods of a watched were called, and the mesh was wanted again.
type calls struct{ applies, patches, looks, challenges, renewals int }

// answers is what they answer.
type answers struct {
	awaited wgdevice.Awaited
	unknown bool
	found   bool
	err     error
}

func (w *watched) Apply(context.Context, mesh.Config, wgdevice.Key) (wgdevice.Changes, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.applies++
	return wgdevice.Changes{}, nil
}

func (w *watched) Patch(context.Context, mesh.Change, wgdevice.Key) (wgdevice.Changes, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.patches++
	if w.unknown {
		return wgdevice.Changes{}, wgdevice.ErrUnknown
	}
	return wgdevice.Changes{}, nil
}

func (w *watched) Follow(context.Context, mesh.Config) (wgdevice.Awaited, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.looks++
	return w.awaited, w.err
}

func (w *watched) Challenge(_ context.Context, _ mesh.Config, _ <-chan mesh.Config, found func()) error {
	w.mu.Lock()
	w.challenges++
	is, err := w.found, w.err
	w.mu.Unlock()
	if is {
		found()
	}
	return err
}

// again takes in that the mesh is to be applied again.
func (w *watched) again() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.renewals++
}

// during sets the answers and returns how often the methods were called in that time.
func (w *watched) during(d time.Duration, a answers) calls {
	w.mu.Lock()
	before := w.calls
	w.answers = a
	w.mu.Unlock()
	time.Sleep(d)
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	return calls{w.applies - before.applies, w.patches - before.patches, w.looks - before.looks, w.challenges - before.challenges, w.renewals - before.renewals}
}

func TestFollower(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &watched{}
		f := newFollower(w, time.Now, w.again, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go f.run(ctx)
		apply := func(change *mesh.Change, peers ...mesh.Peer) {
			t.Helper()
			if _, err := f.apply(ctx, mesh.Config{Peers: peers}, change, wgdevice.Key{}); err != nil {
				t.Fatal(err)
			}
		}
		steady := mesh.Peer{Node: "a", PublicKey: [32]byte{1}}
		changing := mesh.Peer{Node: "b", PublicKey: [32]byte{2}, Next: [32]byte{3}}

		apply(nil, steady)
		if n := w.during(time.Minute, answers{}); n.looks > 1 || w.applies != 1 {
			t.Errorf("%+v while nothing is awaited", n)
		}
		comes := answers{awaited: wgdevice.Awaited{Handshakes: 1}}
		apply(&mesh.Change{}, steady)
		if n := w.during(time.Second, comes); n.looks < 18 || n.looks > 22 {
			t.Errorf("%d looks in a second at a new peer", n.looks)
		}
		w.during(time.Second, answers{})
		changes := answers{awaited: wgdevice.Awaited{Keys: 1, Handshakes: 1}}
		apply(&mesh.Change{}, steady, changing)
		if n := w.during(time.Second, changes); n.looks < 90 || n.looks > 110 || w.applies != 1 || w.patches != 2 {
			t.Errorf("%+v in a second while a key changes", n)
		}
		apply(&mesh.Change{}, append(slices.Repeat([]mesh.Peer{steady}, 500), changing)...)
		if n := w.during(time.Second, changes); n.looks < 10 || n.looks > 20 {
			t.Errorf("%d looks in a second at a tunnel with 500 peers", n.looks)
		}
		apply(&mesh.Change{}, steady, changing)
		for range followPatience / resync {
			w.during(resync, changes)
			apply(nil, steady, changing) // an audit
		}
		changes.awaited.Handshakes = 0
		w.during(resync, changes)
		if n := w.during(time.Second, changes); n.looks > 11 || n.looks < 9 {
			t.Errorf("%d looks in a second when a node that announced a key has not used it for long", n.looks)
		}
		w.during(0, answers{awaited: changes.awaited, unknown: true})
		before := w.applies
		changing.Next = [32]byte{4}
		apply(&mesh.Change{}, changing)
		if n := w.during(time.Second, changes); n.looks < 90 || w.applies != before+1 || w.patches != 5 {
			t.Errorf("%+v in a second after a change of what is not known", n)
		}
		silent := answers{err: errors.New("the tunnel does not answer")}
		w.during(time.Second, silent)
		if n := w.during(10*time.Second, silent); n.looks > 11 || n.looks < 9 {
			t.Errorf("%d looks in ten seconds at a tunnel that does not answer", n.looks)
		}
		w.during(2*followRetry, answers{})
		if n := w.during(time.Minute, answers{}); n.looks > 0 {
			t.Errorf("%d looks after all have changed", n.looks)
		}
	})
}

// Whenever a mesh was applied the peers are asked, and the mesh is wanted again only where one was found.
func TestFollowerChallenges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &watched{}
		f := newFollower(w, time.Now, w.again, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go f.challenge(ctx)
		if n := w.during(time.Minute, answers{}); n != (calls{}) {
			t.Errorf("%+v before a mesh was applied", n)
		}
		for _, test := range []struct {
			answers
			want calls
		}{
			{answers{}, calls{challenges: 1}},
			{answers{found: true}, calls{challenges: 1, renewals: 1}},
			{answers{err: errors.New("no socket")}, calls{challenges: 1}},
			{answers{found: true}, calls{challenges: 1, renewals: 1}},
		} {
			w.during(0, test.answers)
			if _, err := f.apply(ctx, mesh.Config{}, nil, wgdevice.Key{}); err != nil {
				t.Fatal(err)
			}
			if got := w.during(time.Minute, test.answers); got != test.want {
				t.Errorf("with %+v: %+v, want %+v", test.answers, got, test.want)
			}
		}
	})
}

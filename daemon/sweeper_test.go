package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/conntrack"
	"github.com/warren-cni/warren/pkg/lab"
)

// TestSweeperWaitsForMore: one sweep at the start, one for all that ends at about the same time, one from time to time; and again soon
// where it failed, which is a problem meanwhile.
func TestSweeperWaitsForMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSweeper(nil)
		began := time.Now() //nolint:forbidigo // fake time
		var swept []string
		var failure error
		s.sweep = func() error {
			swept = append(swept, time.Since(began).String())
			return failure
		}
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { s.run(ctx) })
		at := func(d time.Duration) {
			time.Sleep(time.Until(began.Add(d))) //nolint:forbidigo // fake time
			synctest.Wait()
		}
		at(2 * time.Second)
		for i := range 10 {
			at(2*time.Second + time.Duration(i)*20*time.Millisecond)
			s.released()
		}
		at(4 * time.Second)
		failure = errors.New("no memory")
		s.released()
		at(5 * time.Second)
		if p := s.problems(); len(p) != 1 || !strings.Contains(p[0].String(), "no memory") {
			t.Errorf("problems %v", p)
		}
		failure = nil
		at(6 * time.Second)
		if p := s.problems(); len(p) != 0 {
			t.Errorf("problems %v", p)
		}
		at(15 * time.Second)
		cancel()
		running.Wait()
		if diff := cmp.Diff([]string{"0s", "2.3s", "2.6s", "4.3s", "5.3s", "14.3s"}, swept); diff != "" {
			t.Errorf("swept (-want +got):\n%s", diff)
		}
	})
}

// TestEndedPodsAreSwept: by the daemon, by one that starts, and by the plugin where there is none.
func TestEndedPodsAreSwept(t *testing.T) {
	s := newStage(t, "wdswept", 1)
	s.startTunnel(0)
	node := s.Nodes[0]
	links := func() error {
		left, err := node.Run(t.Context(), "ip", "-br", "link", "show", "type", "veth")
		if err == nil && strings.Contains(left, "wrn") {
			err = fmt.Errorf("links are left:\n%s", left)
		}
		return err
	}
	trash := func() {
		t.Helper()
		if _, err := node.Run(t.Context(), "ip", "link", "add", "wrn-99", "type", "veth", "peer", "name", "other"); err != nil || links() == nil {
			t.Fatal(err)
		}
	}
	end := func(before, after func() error) {
		t.Helper()
		a, b := s.pod(0, "a"), s.pod(0, "b")
		s.reaches(a, b)
		s.reaches(b, a)
		if err := before(); err != nil || s.connections(a, b) == 0 {
			t.Fatalf("the pods have %d connections, %v", s.connections(a, b), err)
		}
		if err := errors.Join(a.Delete(t.Context()), b.Delete(t.Context()), after()); err != nil {
			t.Fatal(err)
		}
		s.eventually(links)
		if err := node.EndCoolDown(t.Context()); err != nil { // which waits
			t.Error(err)
		}
		if left := s.connections(a, b); left != 0 {
			t.Errorf("%d connections are left", left)
		}
	}
	nothing := func() error { return nil }

	trash()
	s.startDaemons()
	s.eventually(links)
	end(nothing, nothing)
	end(func() error { return s.daemons[0].Kill() }, nothing)
	s.startDaemons()
	// It is killed before it has done what it promised, and its successor does it.
	end(nothing, func() error {
		err := s.daemons[0].Kill()
		trash()
		s.startDaemons()
		return err
	})
}

// connections returns how many connections the first node's kernel has of the pods.
func (s *stage) connections(pods ...*lab.Pod) (found int) {
	s.t.Helper()
	var own []netip.Addr
	for _, p := range pods {
		own = append(own, p.Addresses...)
	}
	err := s.Nodes[0].Do(func() error {
		_, err := conntrack.SweepAll(s.t.Context(), func(f conntrack.Flow) bool {
			if slices.Contains(own, f.Src) || slices.Contains(own, f.Dst) {
				found++
			}
			return true
		})
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return found
}

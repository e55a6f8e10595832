package main

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/conntrack"
	"github.com/warren-cni/warren/pkg/policy"
	"github.com/warren-cni/warren/pkg/testnode"
)

// sweeps runs a cutter in fake time and notes when it sweeps what.
type sweeps struct {
	*cutter
	began time.Time

	lock sync.Mutex
	list []string
	err  error
}

func startCutter(t *testing.T) *sweeps {
	t.Helper()
	s := &sweeps{cutter: newCutter(nil, slog.New(slog.DiscardHandler)), began: time.Now()} //nolint:forbidigo // fake time
	s.sweep = func(_ context.Context, what scope) (conntrack.Counts, error) {
		words := []string{time.Since(s.began).String()}
		if what.all {
			words = append(words, "all")
		}
		for _, a := range slices.SortedFunc(maps.Keys(what.addresses), netip.Addr.Compare) {
			words = append(words, a.String())
		}
		s.lock.Lock()
		defer s.lock.Unlock()
		s.list = append(s.list, strings.Join(words, " "))
		return conntrack.Counts{Cut: 1}, s.err
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { s.run(ctx) })
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return s
}

// expect compares what was swept since the last time, once nothing more happens in that time.
func (s *sweeps) expect(t *testing.T, within time.Duration, want ...string) {
	t.Helper()
	<-time.After(within)
	synctest.Wait()
	s.lock.Lock()
	defer s.lock.Unlock()
	if diff := cmp.Diff(want, s.list); diff != "" {
		t.Errorf("sweeps (-want +got):\n%s", diff)
	}
	s.list = nil
}

// fail lets sweeps end with an error from now on.
func (s *sweeps) fail(err error) {
	s.lock.Lock()
	defer s.lock.Unlock()
	s.err = err
}

func one(text string) []netip.Addr { return []netip.Addr{netip.MustParseAddr(text)} }

func TestCutterCoalesces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := startCutter(t)
		s.changed(nil)
		s.expect(t, time.Second)
		s.changed(one("10.0.0.1"))
		synctest.Wait()
		s.changed(one("10.0.0.2"))
		s.changed(one("10.0.0.3"))
		s.expect(t, time.Second, "1s 10.0.0.1", "1.25s 10.0.0.2 10.0.0.3")
	})
}

func TestCutterSweepsAgainAfterAudit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := startCutter(t)
		s.audited(false)
		s.expect(t, time.Second, "0s all") // at the start nobody knows what began while the daemon was away
		s.changed(one("10.0.0.1"))
		s.expect(t, time.Second, "1s 10.0.0.1")
		s.audited(false)
		s.expect(t, time.Second, "2s all 10.0.0.1")
		s.audited(false)
		s.expect(t, time.Second) // twice is enough
		s.audited(true)
		s.expect(t, time.Second, "4s all")
	})
}

func TestCutterRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := startCutter(t)
		s.fail(errors.New("no memory"))
		s.changed(one("10.0.0.1"))
		s.expect(t, 1500*time.Millisecond, "0s 10.0.0.1", "1s 10.0.0.1")
		if p := s.problems(); len(p) != 1 || p[0].Code != "ConnectionsNotCut" || !strings.Contains(p[0].Message, "no memory") {
			t.Errorf("problems: %v", p)
		}
		s.fail(nil)
		s.expect(t, time.Second, "2s 10.0.0.1")
		if p := s.problems(); len(p) != 0 {
			t.Errorf("problems that are over: %v", p)
		}
	})
}

func TestPolicyFlow(t *testing.T) {
	src, dst := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
	for protocol, want := range map[uint8]policy.Flow{
		unix.IPPROTO_TCP:  {Src: src, Dst: dst, Protocol: cluster.TCP, Port: 80},
		unix.IPPROTO_UDP:  {Src: src, Dst: dst, Protocol: cluster.UDP, Port: 80},
		unix.IPPROTO_SCTP: {Src: src, Dst: dst, Protocol: cluster.SCTP, Port: 80},
		unix.IPPROTO_ICMP: {Src: src, Dst: dst, Protocol: policy.ICMP},
		unix.IPPROTO_GRE:  {Src: src, Dst: dst, Protocol: policy.ICMP},
	} {
		if got := policyFlow(conntrack.Flow{Src: src, Dst: dst, Protocol: protocol, Port: 80}); got != want {
			t.Errorf("protocol %d: %+v, want %+v", protocol, got, want)
		}
	}
}

func TestOwnAddresses(t *testing.T) {
	testnode.Enter(t)
	own, err := ownAddresses()
	if err != nil || !own[netip.MustParseAddr("127.0.0.1")] || !own[netip.IPv6Loopback()] || own[netip.MustParseAddr("10.0.0.1")] {
		t.Errorf("own addresses: %v, %v", own, err)
	}
}

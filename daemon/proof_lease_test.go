package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
)

const (
	// coolDown is how long nobody gets an address that was released.
	coolDown = 30 * time.Second
	// killsWithin is when a plugin is killed at the latest, where no ADD has taken longer yet.
	killsWithin = 60 * time.Millisecond
)

// tenants know who has which address, by what the ADDs said and until the DELs begin.
type tenants struct {
	mu    sync.Mutex
	held  map[netip.Addr]string
	ended map[netip.Addr]time.Time
}

// moveIn notes the addresses of a pod. That one is another pod's, or was so just now, is an error.
func (h *tenants) moveIn(pod *lab.Pod) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, a := range pod.Addresses {
		if other, taken := h.held[a]; taken {
			return fmt.Errorf("%s has %v, which %s has", pod.Name, a, other)
		}
		if free := time.Since(h.ended[a]); !h.ended[a].IsZero() && free < coolDown {
			return fmt.Errorf("%s has %v, which was released %v before", pod.Name, a, free)
		}
		h.held[a] = pod.Name
	}
	return nil
}

// moveOut notes that the pod is about to lose its addresses.
func (h *tenants) moveOut(pod *lab.Pod) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, a := range pod.Addresses {
		delete(h.held, a)
		h.ended[a] = now()
	}
}

// lettings are pods that come and go on the first node while what serves them is killed.
type lettings struct {
	*stage
	tenants
	leases *ipam.Store
	// These count: ADDs that succeeded, those that were killed, those of which something was left then, and DELs that were killed.
	added, addsKilled, leftovers, delsKilled atomic.Int64
	// took is how long the last ADD took that was not killed: on a busy machine much longer than on an idle one.
	took atomic.Int64
}

// newLettings begins with nobody.
func newLettings(s *stage) *lettings {
	s.t.Helper()
	leases, err := ipam.Open(s.Nodes[0].Leases())
	if err != nil {
		s.t.Fatal(err)
	}
	return &lettings{stage: s, leases: leases, tenants: tenants{held: map[netip.Addr]string{}, ended: map[netip.Addr]time.Time{}}}
}

// mortal is a context that ends soon, half the times, and with it the plugin that is run.
func (l *lettings) mortal(ctx context.Context, random *rand.Rand) (context.Context, context.CancelFunc) {
	if random.IntN(2) == 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, time.Duration(random.Int64N(max(int64(killsWithin), l.took.Load()))))
}

// live adds a pod and deletes it, as often as it takes.
func (l *lettings) live(name string, random *rand.Rand) error {
	ctx := l.t.Context()
	pod, err := l.Nodes[0].NewPod(ctx, lab.Pod{Namespace: "shop", Name: name, Labels: app("churn")})
	if err != nil {
		return err
	}
	if err = l.add(ctx, pod, random); err != nil {
		return err
	}
	l.moveOut(pod)
	for {
		short, cancel := l.mortal(ctx, random)
		err = pod.Unwire(short)
		killed := short.Err() != nil
		cancel()
		if err == nil {
			return pod.Delete(ctx) // once more: a runtime does that
		}
		if !killed || ctx.Err() != nil {
			return fmt.Errorf("DEL of %s: %w", name, err)
		}
		l.delsKilled.Add(1)
	}
}

// add runs ADD until it succeeds or is killed.
func (l *lettings) add(ctx context.Context, pod *lab.Pod, random *rand.Rand) error {
	for {
		short, cancel := l.mortal(ctx, random)
		began := now()
		err := pod.Wire(short)
		killed := short.Err() != nil
		cancel()
		switch {
		case err == nil:
			l.added.Add(1)
			l.took.Store(int64(now().Sub(began)))
			return l.moveIn(pod)
		case killed && ctx.Err() == nil:
			l.addsKilled.Add(1)
			if held, heldErr := l.leases.Held(string(pod.UID), "eth0"); heldErr != nil || len(held) > 0 {
				l.leftovers.Add(1)
			}
			return nil
		case !again(err):
			return fmt.Errorf("ADD of %s: %w", pod.Name, err)
		}
		l.pause(200 * time.Millisecond)
	}
}

// again says whether the plugin asks to try again later.
func again(err error) bool {
	refusal, ok := errors.AsType[*types.Error](err)
	return ok && refusal.Code == types.ErrTryAgainLater
}

// empty waits until nothing is leased, no pod has a link, and none may pass the gate.
func (s *stage) empty() {
	s.t.Helper()
	s.eventually(func() error {
		entries, err := os.ReadDir(s.Nodes[0].Leases())
		if err != nil {
			return err
		}
		for _, e := range entries {
			if !strings.HasPrefix(e.Name(), ".") {
				return fmt.Errorf("%s is left", e.Name())
			}
		}
		out, err := s.Nodes[0].Run(s.t.Context(), "sh", "-c", "ip -o link show type veth | grep -v eth0 || true; "+listReady)
		if err == nil && out != "" {
			err = fmt.Errorf("left: %s", out)
		}
		return err
	})
}

// withPool makes a node with these ranges and starts it. The /64 that nodes have in the lab cannot be leased to its end.
func withPool(t *testing.T, name, v4, v6 string) *stage {
	t.Helper()
	s := newStage(t, name, 1)
	text, err := s.ReadText("node-1")
	if err != nil {
		t.Fatal(err)
	}
	words := string(text)
	for i, small := range []string{v4, v6} {
		pool := &s.Nodes[0].PodCIDRs[i]
		words = strings.ReplaceAll(words, pool.String(), small)
		*pool = netip.MustParsePrefix(small)
	}
	s.writeText("node-1", words)
	s.startTunnel(0)
	s.startDaemons()
	return s
}

// wholePool demands that each address of the node can be leased, of both families, once the cool-down is over. It returns how many these are.
func (s *stage) wholePool() (all int) {
	s.t.Helper()
	node := s.Nodes[0]
	if err := node.EndCoolDown(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	leases, err := ipam.Open(node.Leases())
	if err != nil {
		s.t.Fatal(err)
	}
	for _, pool := range node.PodCIDRs {
		owner := func(i int) ipam.Owner { return ipam.Owner{ContainerID: fmt.Sprintf("whole-%d", i), Interface: "eth0"} }
		leased := 0
		for err = nil; err == nil; leased++ {
			_, err = leases.Allocate([]netip.Prefix{pool}, owner(leased))
		}
		leased--
		want := 1<<(pool.Addr().BitLen()-pool.Bits()) - 2 // without the network's and the node's
		if pool.Addr().Is4() {
			want-- // and that of broadcasts
		}
		if !errors.As(err, new(*ipam.ExhaustedError)) || leased != want {
			s.t.Errorf("%d addresses of %d of %s could be leased (%v)", leased, want, pool, err)
		}
		for i := range leased {
			if _, err = leases.Release(owner(i).ContainerID, owner(i).Interface); err != nil {
				s.t.Error(err)
			}
		}
		all += leased
	}
	return all
}

// Pods come and go, twenty at a time, while plugin and daemon are killed at any instant. No address is ever a second pod's, and in the
// end none is lost.
func TestProofNoAddressTwiceNorLost(t *testing.T) {
	t.Parallel()
	s := withPool(t, "wplease", "10.244.1.0/24", "fd00:10:244:1::/120")
	l := newLettings(s)
	random := soak.Random(t)
	cycles, kills := soak.Trials(5000), 0
	var next atomic.Int64
	var workers sync.WaitGroup
	for range batch {
		own := rand.New(rand.NewPCG(random.Uint64(), 0))
		workers.Go(func() {
			for i := next.Add(1); i <= int64(cycles) && !t.Failed(); i = next.Add(1) {
				if err := l.live(fmt.Sprintf("churn-%d", i), own); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for next.Load() <= int64(cycles) && !t.Failed() {
		s.pause(time.Second + time.Duration(random.Int64N(int64(3*time.Second))))
		if err := s.daemons[0].Kill(); err != nil {
			t.Error(err)
		}
		s.startDaemon(0, nil)
		s.ready(0)
		kills++
	}
	workers.Wait()
	s.empty()
	pool := s.wholePool()
	summary(t, "%d ADDs and DELs, %d at a time: %d ADDs succeeded, %d were killed (%d of them held addresses then), %d DELs and %d daemons were killed; "+
		"0 addresses twice, 0 leases left, all %d addresses usable",
		cycles, batch, l.added.Load(), l.addsKilled.Load(), l.leftovers.Load(), l.delsKilled.Load(), kills, pool)
	if l.added.Load() == 0 || l.leftovers.Load() == 0 || l.delsKilled.Load() == 0 || kills == 0 {
		t.Error("something was never killed where it matters")
	}
}

// inBatches does something for each pod, twenty at a time.
func inBatches[T any](s *stage, all []T, do func(int, T) error) {
	s.t.Helper()
	var group sync.WaitGroup
	slots := make(chan struct{}, batch)
	for i, one := range all {
		slots <- struct{}{}
		group.Go(func() {
			defer func() { <-slots }()
			if err := do(i, one); err != nil {
				s.t.Error(err)
			}
		})
	}
	group.Wait()
	if s.t.Failed() {
		s.t.FailNow()
	}
}

// Reboots free everything, whether the leases were on a tmpfs or, against all advice, on a disk, and whether the runtime's DELs for
// what it had come before the daemon, after it, or never.
func TestProofRebootLeaksNothing(t *testing.T) {
	t.Parallel()
	s := withPool(t, "wpboot", "10.244.1.0/24", "fd00:10:244:1::/120")
	const pods = 100
	node, reboots := s.Nodes[0], soak.Trials(20)
	for round := range reboots {
		all := make([]*lab.Pod, pods)
		inBatches(s, all, func(i int, _ *lab.Pod) (err error) {
			all[i], err = node.AddPod(t.Context(), lab.Pod{Namespace: "shop", Name: fmt.Sprintf("pod-%d", i), Labels: app("pod")})
			return err
		})
		if entries, err := filepath.Glob(filepath.Join(node.Leases(), "*@eth0")); err != nil || len(entries) != pods {
			t.Fatalf("%d leases, %v; want %d", len(entries), err, pods)
		}
		s.reboot(all, round%2 == 1)
		inBatches(s, all[:pods/3], func(_ int, p *lab.Pod) error { return p.Delete(t.Context()) })
		s.startTunnel(0)
		s.startDaemon(0, nil)
		s.ready(0)
		s.empty()
		if pool := s.wholePool(); pool == 0 {
			t.Error("nothing can be leased")
		}
		inBatches(s, all[pods/3:2*pods/3], func(_ int, p *lab.Pod) error { return p.Delete(t.Context()) })
		s.empty()
		if err := node.EndCoolDown(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	summary(t, "%d reboots with %d pods each: 0 leases left, the whole pool usable after each", reboots, pods)
}

// reboot reboots the first node. On a disk its leases are there again, with the name of the boot in which they were made.
func (s *stage) reboot(pods []*lab.Pod, disk bool) {
	s.t.Helper()
	leases, kept := s.Nodes[0].Leases(), filepath.Join(s.t.TempDir(), "kept")
	if disk {
		if err := os.Rename(leases, kept); err != nil {
			s.t.Fatal(err)
		}
	}
	if err := s.Nodes[0].Reboot(s.t.Context(), pods...); err != nil {
		s.t.Fatal(err)
	}
	if !disk {
		return
	}
	const other = "00000000-0000-4000-8000-000000000000\n"
	err := errors.Join(os.WriteFile(filepath.Join(kept, ".boot"), []byte(other), 0o600), os.MkdirAll(filepath.Dir(leases), 0o700), os.Rename(kept, leases))
	if err != nil {
		s.t.Fatal(err)
	}
}

// A node that is nearly full replaces all its pods, a quarter at a time as a Deployment does, or (in a short run) all at once: nothing fails but for an address that
// has to cool down, which the kubelet tries again.
func TestProofRollingOverAFullNode(t *testing.T) {
	t.Parallel()
	pods, v4, v6 := soak.Trials(250), "10.244.1.0/24", "fd00:10:244:1::/64"
	if pods < 250 {
		v4, v6 = "10.244.1.0/27", "fd00:10:244:1::/123"
	}
	s := withPool(t, "wproll", v4, v6)
	var refused atomic.Int64
	all := make([]*lab.Pod, pods)
	start := func(name string, i int) error {
		for {
			pod, err := s.Nodes[0].AddPod(t.Context(), lab.Pod{Namespace: "shop", Name: fmt.Sprintf("%s-%d", name, i), Labels: app("rolled")})
			if err == nil {
				all[i] = pod
				return nil
			}
			if !again(err) {
				return err
			}
			refused.Add(1)
			s.pause(time.Second)
		}
	}
	inBatches(s, all, func(i int, _ *lab.Pod) error { return start("old", i) })
	if refused.Load() > 0 {
		t.Errorf("%d ADDs were refused on an empty node", refused.Load())
	}
	began := now()
	parts := soak.Trials(4)
	for part := range parts {
		from, to := part*pods/parts, (part+1)*pods/parts
		inBatches(s, all[from:to], func(_ int, pod *lab.Pod) error { return pod.Delete(t.Context()) })
		inBatches(s, all[from:to], func(i int, _ *lab.Pod) error { return start("new", from+i) })
	}
	took := time.Since(began)
	inBatches(s, all, func(_ int, pod *lab.Pod) error { return pod.Delete(t.Context()) })
	if refused.Load() == 0 {
		t.Error("no address had to cool down")
	}
	summary(t, "%d pods of a node with room for few more replaced, %d at a time, in %v: %d ADDs were refused with code 11, 0 failed otherwise",
		pods, pods/parts, took.Round(time.Second), refused.Load())
}

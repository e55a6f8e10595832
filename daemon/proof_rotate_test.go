package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

const (
	// rotationLoss is how many packets of a kind one change of a key may cost, of a hundred in a second: those of 50 ms. On a busy machine
	// come those of the time for which it lets packets wait by itself, and between two that arrive the handshake waits busyHops times. A
	// handshake that is lost would cost 500 packets: WireGuard tries again after 5 s.
	rotationLoss = 5
	busyHops     = 4
	// busyLoss is how many times as many it may cost in a short run, beside other tests, and busyGap how long the gap may seem there.
	busyLoss = 4
	busyGap  = time.Second
	// crossingGap is what the keys of two nodes that change at one moment may cost on a busy machine, too: where their handshakes cross,
	// each drops the other's answer, and WireGuard itself would try again after 5 s.
	crossingGap = 3 * time.Second
	// shortNotice is how long the next key is published before it is used, where news takes some milliseconds.
	shortNotice = time.Second
)

// rotating is a stage of two nodes with a pod on each. The pods send to each other a hundred packets of each kind in a second, and use
// connections.
type rotating struct {
	*guarded
	flows []*lasting
}

// newRotating starts two nodes and the traffic.
func newRotating(t *testing.T, o lab.Options) *rotating {
	t.Helper()
	o.Nodes = 2
	s := newStageOf(t, o)
	r := &rotating{guarded: &guarded{stage: s}}
	for i := range s.Nodes {
		s.startTunnel(i)
		r.startDaemon(i)
	}
	for i := range s.Nodes {
		s.ready(i)
	}
	for i := range s.Nodes {
		r.pods = append(r.pods, s.pod(i, fmt.Sprintf("pod-%d", i+1)))
	}
	for i, pod := range r.pods {
		s.reaches(pod, r.pods[1-i])
		for _, address := range r.pods[1-i].Addresses {
			r.flows = append(r.flows, s.lasts(pod.Netns(), address))
		}
	}
	return r
}

// startDaemon starts a node's daemon with a short notice.
func (r *rotating) startDaemon(i int) {
	r.t.Helper()
	r.stage.startDaemon(i, []string{"WARREN_ROTATE_NOTICE=" + shortNotice.String()})
}

// rotate changes the key of a node and waits until the other one uses it.
func (r *rotating) rotate(i int) {
	r.t.Helper()
	before := r.status(i).Encryption.PublicKey
	out, err := r.Nodes[i].Command(r.t.Context(), "rotate-key", "--wait")
	if err != nil {
		r.t.Fatal(err)
	}
	if !strings.Contains(out, "\ndone ") || !strings.Contains(out, "key in use  "+before) {
		r.t.Errorf("rotate-key says:\n%s", out)
	}
	if after := r.status(i).Encryption.PublicKey; after == before || !strings.Contains(out, "next key    "+after) {
		r.t.Errorf("%s has key %s and had %s; rotate-key says:\n%s", r.Nodes[i].Name, after, before, out)
	}
	r.settles(i)
}

// settles waits until a node has one key, and the other node no other of it.
func (r *rotating) settles(i int) {
	r.t.Helper()
	r.eventually(func() error {
		next := filepath.Join(r.Nodes[i].StateDir(), wgdevice.KeyFile+".next")
		if _, err := os.Stat(next); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("%s is still there: %w", next, err)
		}
		status, err := r.Nodes[i].Status(r.t.Context())
		if err != nil {
			return err
		}
		other, err := r.Nodes[1-i].Status(r.t.Context())
		if err != nil {
			return err
		}
		if len(other.Peers) != 1 || other.Peers[0].PublicKey != status.Encryption.PublicKey || len(other.Peers[0].AllowedIPs) != 2 {
			return fmt.Errorf("%s has key %s, and its peer knows %+v", r.Nodes[i].Name, status.Encryption.PublicKey, other.Peers)
		}
		return nil
	})
}

// traffic is what arrived while something happened.
type traffic struct {
	// lost is how many packets of a kind did not arrive, and gap the longest time without one, each of the kind that it hit worst.
	lost int
	gap  time.Duration
}

// worse is the worst of both.
func (a traffic) worse(b traffic) traffic {
	return traffic{lost: max(a.lost, b.lost), gap: max(a.gap, b.gap)}
}

// during lets both pods send while something happens.
func (r *rotating) during(happens func()) traffic {
	r.t.Helper()
	var counters [2]*tagged.Counter
	var guns [2]*tagged.Gun
	for i, pod := range r.pods {
		counters[i] = r.counter(pod.Netns())
		guns[1-i] = r.fire(r.pods[1-i], tagged.Fire{Tag: tagAllowed, Targets: pod.Addresses, Port: port, Every: often})
	}
	for _, c := range counters {
		r.arrives(c, 50, nil)
	}
	happens()
	for _, c := range counters {
		r.arrives(c, 50, nil)
	}
	var seen traffic
	for i, c := range counters {
		guns[1-i].Cease()
		missing(r.t, c, guns[1-i].Sent()) // waits until what was sent has arrived
		for _, family := range []func(tagged.Arrival) bool{family4, family6} {
			for _, protocol := range tagged.Protocols() {
				kind := func(a tagged.Arrival) bool { return family(a) && a.Protocol == protocol }
				sent := int(guns[1-i].Sent()) / (2 * len(tagged.Protocols()))
				seen = seen.worse(traffic{lost: sent - c.Packets(kind), gap: c.Gap(kind)})
			}
		}
	}
	return seen
}

// unbroken demands that all connections go on.
func (r *rotating) unbroken(what string) {
	r.t.Helper()
	for _, f := range r.flows {
		before := f.exchanges.Load()
		r.eventually(func() error {
			if err, broken := f.broken.Load().(error); broken {
				r.t.Fatalf("%s: a connection broke: %v", what, err)
			}
			if f.exchanges.Load() < before+2 {
				return errNothing
			}
			return nil
		})
	}
}

// The keys of two nodes change, one by one and at once, while their pods send to each other: no connection breaks, nothing is in clear,
// and nobody misses more than some packets. The families of the endpoints share the rounds, and come one after the other, so that
// neither makes the other's gaps.
func TestProofKeyRotation(t *testing.T) {
	t.Parallel()
	for first, o := range []lab.Options{{Name: "wprotate"}, {Name: "wprotate6", IPv6Nodes: true}} {
		t.Run(endpointsOf(o), func(t *testing.T) { newRotating(t, o).rotateAll(first) })
	}
}

// rotateAll changes the keys, first that of a node.
func (r *rotating) rotateAll(first int) {
	r.t.Helper()
	rounds, both := soak.Shared(20, 2), soak.Shared(5, 2)
	var quiet, one, two traffic
	counts := r.cipherOnly("rotations", func() {
		for i := range rounds {
			quiet = quiet.worse(r.during(func() { r.pause(2 * shortNotice) }))
			one = one.worse(r.during(func() { r.rotate((first + i) % 2) }))
			r.unbroken("one by one")
		}
		two = r.during(func() {
			for range both {
				var group sync.WaitGroup
				for i := range r.Nodes {
					group.Go(func() { r.rotate(i) })
				}
				group.Wait()
			}
		})
		r.unbroken("both at once")
	})
	summary(r.t, "%d rotations: at most %d packets of a kind lost by one, longest gap %v (%v without rotations); %d of both nodes at once: %d lost, longest gap %v; %v",
		rounds, one.lost, one.gap, quiet.gap, both, two.lost, two.gap, counts)
	every := soak.Spaced(often)
	own := max(0, quiet.gap-every)
	most, limit := rotationLoss+int(own/every), rotationLoss*every+busyHops*own
	if soak.Short() {
		most, limit = busyLoss*most, max(limit, soak.Patience(busyGap))
	}
	if one.lost > most || one.gap > limit {
		r.t.Errorf("a rotation costs %d packets of a kind and a gap of %v, want at most %d and %v, for without one there is a gap of %v", one.lost, one.gap, most, limit, quiet.gap)
	}
	if two.gap > soak.Patience(crossingGap) {
		r.t.Errorf("rotations of both nodes at once cost a gap of %v", two.gap)
	}
	if counts.WireGuard == 0 {
		r.t.Errorf("the wire shows no WireGuard: %v", counts)
	}
	r.reachedAt()
	// What a connection sends again comes too seldom for the control.
	gun := r.fire(r.pods[0], tagged.Fire{Tag: tagAllowed, Targets: r.pods[1].Addresses, Port: port, Every: often, Payload: marker[:]})
	r.unguarded(0)
	gun.Cease()
}

// A daemon is killed at any step of a change of its key, and a node is away during one: the change ends by the key that was to come, all
// connections go on, and nothing is in clear. The families of the endpoints share the rounds.
func TestProofKeyRotationOutlivesCrashes(t *testing.T) {
	t.Parallel()
	for _, o := range []lab.Options{{Name: "wprokill"}, {Name: "wprokill6", IPv6Nodes: true}} {
		t.Run(endpointsOf(o), func(t *testing.T) {
			t.Parallel()
			newRotating(t, o).crashAll(soak.Random(t))
		})
	}
}

// crashAll kills daemons during rotations.
func (r *rotating) crashAll(random *rand.Rand) {
	r.t.Helper()
	kills, away := soak.Shared(20, 2), soak.Shared(5, 2)
	counts := r.cipherOnly("crashes during rotations", func() {
		for range kills {
			out, err := r.Nodes[0].Command(r.t.Context(), "rotate-key")
			if err != nil {
				r.t.Fatal(err)
			}
			r.pause(time.Duration(random.Int64N(int64(shortNotice + 20*often))))
			r.endDaemon(0, (*lab.Process).Kill)
			r.startDaemon(0)
			r.settles(0)
			if key := r.status(0).Encryption.PublicKey; !strings.Contains(out, "next key    "+key) {
				r.t.Errorf("in the end the key is %s; rotate-key said:\n%s", key, out)
			}
			r.unbroken("killed")
		}
		for range away {
			r.endDaemon(1, (*lab.Process).Kill)
			if _, err := r.Nodes[0].Command(r.t.Context(), "rotate-key", "--wait"); err != nil {
				r.t.Fatal(err)
			}
			r.startDaemon(1)
			r.settles(0)
			r.unbroken("away")
		}
	})
	summary(r.t, "%d rotations with a SIGKILL of the daemon, %d with the other node away: no connection broke; %v", kills, away, counts)
	if counts.WireGuard == 0 {
		r.t.Errorf("the wire shows no WireGuard: %v", counts)
	}
	r.reachedAt()
}

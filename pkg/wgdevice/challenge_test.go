package wgdevice

import (
	"context"
	"errors"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/mesh"
)

// Where a peer that lies claims to be, and where it is.
var (
	claimed = netip.MustParseAddr("192.0.2.1")
	truly   = netip.MustParseAddr("192.0.2.9")
)

// bubble tells the time in a test's bubble.
func bubble() time.Time { return time.Now() } //nolint:forbidigo // it is none of the system's there

// peerAt is the way to one peer.
type peerAt struct {
	// shows says whether the peer lets itself be seen at the claimed address, that long after it last had something to answer.
	shows func(since time.Duration) bool
	// honest says whether it receives there.
	honest bool
	last   time.Time

	asked, answered int
	err             error
}

func (p *peerAt) look() (map[wgtypes.Key]netip.Addr, error) {
	where := truly
	if p.shows(time.Since(p.last)) {
		where = claimed
	}
	return map[wgtypes.Key]netip.Addr{{1}: where}, p.err
}

func (p *peerAt) ask(_ context.Context, addresses []netip.Addr) map[netip.Addr]bool {
	receives := p.shows(time.Since(p.last)) == p.honest
	p.asked++
	if receives {
		p.answered++
	}
	p.last = bubble()
	return map[netip.Addr]bool{addresses[0]: receives}
}

func (p *peerAt) interrogate(t *testing.T) []suspect {
	t.Helper()
	p.last = bubble()
	asked := suspect{key: wgtypes.Key{1}, claimed: []netip.Addr{claimed}, asked: netip.MustParseAddr("10.1.0.1")}
	found, err := interrogate(t.Context(), p, []suspect{asked}, bubble)
	if !errors.Is(err, p.err) {
		t.Errorf("error %v, want %v", err, p.err)
	}
	return found
}

// TestInterrogateLiars has peers play for time: none is believed, and none does better than to get every second answer.
func TestInterrogateLiars(t *testing.T) {
	for name, test := range map[string]struct {
		shows func(time.Duration) bool
		// least is the share of questions that the strategy gets, which shows that the peer plays it.
		least float64
	}{
		"always there":         {func(time.Duration) bool { return true }, 0},
		"never there":          {func(time.Duration) bool { return false }, 0},
		"in turn, fast":        {func(d time.Duration) bool { return d.Microseconds()%20 < 10 }, 0.2},
		"in turn, slow":        {func(d time.Duration) bool { return d.Milliseconds()%4 < 2 }, 0.2},
		"as is best, in turn":  {func(d time.Duration) bool { return d < shortWait }, 0.42},
		"there for a half":     {func(d time.Duration) bool { return d < shortWait/2 }, 0.3},
		"there for much":       {func(d time.Duration) bool { return d < 3*shortWait/2 }, 0.05},
		"there a little later": {func(d time.Duration) bool { return d > shortWait/2 && d < shortWait }, 0.3},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				p := &peerAt{shows: test.shows}
				tries := 0
				for ; tries < 3000; tries++ {
					if found := p.interrogate(t); len(found) > 0 {
						t.Fatalf("believed at try %d", tries)
					}
				}
				// Of those questions that follow a look at the claimed address, and all the same of the looks that are too late for one.
				if share := float64(p.answered) / float64(tries+p.answered); share > 0.58 || share < test.least {
					t.Errorf("%.2f of the questions answered (%d asked in %d tries), want %.2f to 0.58", share, p.asked, tries, test.least)
				}
			})
		})
	}
}

// TestInterrogateHonest believes who receives where it is, and nobody who is elsewhere, goes away, or falls silent.
func TestInterrogateHonest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		there := func(time.Duration) bool { return true }
		p := &peerAt{shows: there, honest: true}
		found := p.interrogate(t)
		if len(found) != 1 || found[0].at != claimed || p.asked != questions {
			t.Errorf("found %+v after %d questions", found, p.asked)
		}
		for _, until := range []int{0, 1, questions - 1} {
			p = &peerAt{honest: true}
			p.shows = func(time.Duration) bool { return p.asked < until }
			if found = p.interrogate(t); len(found) > 0 || p.asked != until {
				t.Errorf("found %+v, which goes away after %d questions", found, until)
			}
			p = &peerAt{honest: true, shows: there}
			silent := &silentAfter{peerAt: p, questions: until}
			if liars, err := interrogate(t.Context(), silent, []suspect{{key: wgtypes.Key{1}, claimed: []netip.Addr{claimed}}}, bubble); len(liars) > 0 || err != nil || p.asked != until {
				t.Errorf("found %+v (error %v), which falls silent after %d questions", liars, err, until)
			}
		}
		p = &peerAt{shows: there, honest: true, err: errors.New("the tunnel does not answer")}
		if found = p.interrogate(t); len(found) > 0 {
			t.Errorf("found %+v at a tunnel that does not answer", found)
		}
	})
}

// silentAfter is a peer that falls silent.
type silentAfter struct {
	*peerAt
	questions int
}

func (s *silentAfter) ask(ctx context.Context, addresses []netip.Addr) map[netip.Addr]bool {
	if s.asked == s.questions {
		return nil
	}
	return s.peerAt.ask(ctx, addresses)
}

// TestSuspects asks those alone whose answer would change something.
func TestSuspects(t *testing.T) {
	prefix := netip.MustParsePrefix
	six, both, known, plain := testPeer(1, "fd00:1::/64"), testPeer(2, "10.2.0.0/24"), testPeer(3, "10.3.0.0/24"), testPeer(4, "10.4.0.0/24")
	both.AllowedIPs = append(both.AllowedIPs, prefix("fd00:2::/64"))
	for _, p := range []*mesh.Peer{&six, &both, &known} {
		p.NodeAddresses = []netip.Addr{claimed}
	}
	want := mesh.Config{Addresses: []netip.Prefix{prefix("fd00:9::1/128")}, Peers: []mesh.Peer{six, both, known, plain}}
	asked := func(m memory) []netip.Addr {
		var asked []netip.Addr
		for _, s := range m.suspects(want) {
			asked = append(asked, s.asked)
		}
		return asked
	}
	m := memory{encrypted: true, receives: map[wgtypes.Key]netip.Addr{{3}: claimed}}
	if got := asked(m); len(got) != 2 || got[0] != netip.MustParseAddr("fd00:1::1") || got[1] != netip.MustParseAddr("fd00:2::1") {
		t.Errorf("asked %v", got)
	}
	if got := asked(memory{}); len(got) > 0 {
		t.Errorf("without a tunnel: asked %v", got)
	}
}

package wgdevice

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/echo"
	"github.com/warren-cni/warren/pkg/mesh"
)

// Where a peer claims to be, and where one that lies is.
var (
	claimed = netip.MustParseAddr("192.0.2.1")
	truly   = netip.MustParseAddr("192.0.2.9")
	inside  = netip.MustParseAddr("10.1.0.1")
)

// bubble tells the time in a test's bubble.
func bubble() time.Time { return time.Now() } //nolint:forbidigo // it is none of the system's there

// peerAt is the way to one peer.
type peerAt struct {
	// shows says whether the peer lets itself be seen at the claimed address, that long after it last had something to answer.
	shows func(since time.Duration) bool
	// honest says whether it receives there.
	honest bool
	// queue is how long a question waits in the tunnel, and trip how long question and answer are on their way then.
	queue, trip time.Duration
	// loses says which questions get lost.
	loses func(number int) bool

	last            time.Time
	replies         chan echo.Reply
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

func (p *peerAt) ask(to netip.Addr, text []byte) {
	p.asked++
	if p.loses != nil && p.loses(p.asked) {
		return
	}
	replies := p.replies
	time.AfterFunc(p.queue, func() {
		if p.shows(time.Since(p.last)) != p.honest || replies != p.replies { // those of an interrogation that has ended count for nothing
			return
		}
		p.answered++
		p.last = bubble()
		time.AfterFunc(p.trip, func() { replies <- echo.Reply{From: to, Payload: text} })
	})
}

func (p *peerAt) answers() <-chan echo.Reply { return p.replies }

// interrogate says whether the peer was believed.
func (p *peerAt) interrogate(t *testing.T) bool {
	t.Helper()
	p.last, p.replies = bubble(), make(chan echo.Reply, 2*(answers+misses))
	believed := 0
	asked := &suspect{key: wgtypes.Key{1}, claimed: []netip.Addr{claimed}, asked: inside}
	r := round{way: p, clock: bubble, found: func(s *suspect) {
		believed++
		if s.at != claimed {
			t.Errorf("believed at %v", s.at)
		}
	}}
	_, err := r.interrogate(t.Context(), []*suspect{asked})
	if !errors.Is(err, p.err) || believed > 1 {
		t.Errorf("error %v, want %v; believed %d times", err, p.err, believed)
	}
	p.replies = nil
	return believed == 1
}

// TestInterrogateLiars has peers play for time, also such as make the tunnel's queue long: none is believed, and none gets more than a few
// of the questions.
func TestInterrogateLiars(t *testing.T) {
	const span = spread * lookEvery
	away := func(from, long time.Duration) func(time.Duration) bool {
		return func(d time.Duration) bool { return d < from || d >= from+long }
	}
	for name, test := range map[string]struct {
		shows func(time.Duration) bool
		// plays says whether the strategy has to get a question now and then, which shows that it is played.
		plays bool
	}{
		"always there":       {func(time.Duration) bool { return true }, false},
		"never there":        {func(time.Duration) bool { return false }, false},
		"in turn, fast":      {func(d time.Duration) bool { return d.Microseconds()%20 < 10 }, true},
		"in turn, slow":      {func(d time.Duration) bool { return d.Milliseconds()%4 < 2 }, true},
		"away until asked":   {func(d time.Duration) bool { return d < 2*lookEvery }, true},
		"away early":         {away(span/8, lookEvery), true},
		"away for a moment":  {away(span/2, lookEvery/2), true},
		"away for a look":    {away(span/2, lookEvery), true},
		"away for long":      {away(span/2, 2*lookEvery), true},
		"there for one span": {func(d time.Duration) bool { return d < span }, false},
		"away at times":      {func(d time.Duration) bool { return d%span < span-lookEvery/4 }, false},
	} {
		for _, queue := range []time.Duration{0, 4 * lookEvery, 2 * span} {
			t.Run(name+", queue "+queue.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					tries := 500
					if queue > 0 {
						tries = 100
					}
					p := &peerAt{shows: test.shows, queue: queue, trip: lookEvery / 10}
					for i := range tries {
						if p.interrogate(t) {
							t.Fatalf("believed at try %d", i)
						}
					}
					// A try ends with a look, or with the last question that may not be answered; the best gets one in spread of the questions.
					share := float64(p.answered) / float64(tries+p.answered)
					if share > 3./spread || test.plays && queue == 0 && share == 0 {
						t.Errorf("%.3f of the questions answered (%d in %d tries)", share, p.answered, tries)
					}
				})
			})
		}
	}
}

// TestInterrogateHonest believes who receives where it is, however far and with some loss, and nobody who goes away or falls silent.
func TestInterrogateHonest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		there := func(time.Duration) bool { return true }
		for _, trip := range []time.Duration{0, lookEvery, 100 * time.Millisecond, answerPatience - time.Millisecond} {
			p := &peerAt{shows: there, honest: true, trip: trip}
			if began := bubble(); !p.interrogate(t) || p.asked != answers {
				t.Errorf("an honest peer is not believed after %d questions", p.asked)
			} else if took := time.Since(began); took > (answers+1)*(spread*lookEvery+2*lookEvery+trip) {
				t.Errorf("it took %v to believe a peer that is %v away", took, trip)
			}
		}
		for lost, want := range map[int]bool{1: true, misses: true, misses + 1: false} {
			p := &peerAt{shows: there, honest: true, loses: func(number int) bool { return number%3 == 0 && number <= 3*lost }}
			if p.interrogate(t) != want {
				t.Errorf("with %d questions lost it is not %t that it is believed", lost, want)
			}
		}
		for _, until := range []int{0, 1, answers - 1} {
			p := &peerAt{honest: true}
			p.shows = func(time.Duration) bool { return p.asked < until }
			if p.interrogate(t) {
				t.Errorf("believed, though it goes away with question %d", until)
			}
			p = &peerAt{shows: there, honest: true, loses: func(number int) bool { return number > until }}
			if p.interrogate(t) || p.asked != until+misses+1 {
				t.Errorf("it falls silent after %d questions: asked %d", until, p.asked)
			}
		}
		p := &peerAt{shows: there, honest: true, err: errors.New("the tunnel does not answer")}
		if p.interrogate(t) {
			t.Error("believed at a tunnel that does not answer")
		}
	})
}

// TestInterrogateTogether believes those that are honest at once, whatever others do meanwhile.
func TestInterrogateTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &peerAt{shows: func(time.Duration) bool { return true }, honest: true, replies: make(chan echo.Reply, answers+misses)}
		slow := netip.MustParseAddr("10.2.0.1")
		both := &twoAt{peerAt: p, silent: slow, second: func(int) netip.Addr { return claimed }}
		began := bubble()
		var took []time.Duration
		list := func() []*suspect {
			return []*suspect{
				{key: wgtypes.Key{2}, claimed: []netip.Addr{claimed}, asked: slow}, {key: wgtypes.Key{1}, claimed: []netip.Addr{claimed}, asked: inside},
			}
		}
		r := round{way: both, clock: bubble, found: func(s *suspect) {
			if s.asked != inside {
				t.Error("the silent one is believed")
			}
			took = append(took, time.Since(began))
		}}
		_, err := r.interrogate(t.Context(), list())
		if err != nil || len(took) != 1 || took[0] > answers*(spread+2)*lookEvery {
			t.Errorf("believed after %v, error %v", took, err)
		}
		ended, cancel := context.WithCancel(t.Context())
		cancel()
		r.found = func(*suspect) { t.Error("believed after the end") }
		if _, err = r.interrogate(ended, list()); err != nil {
			t.Error(err)
		}
	})
}

// TestInterrogateNewcomer believes a node that comes while another is asked as soon as it would alone, and asks nobody twice.
func TestInterrogateNewcomer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &peerAt{shows: func(time.Duration) bool { return true }, honest: true, replies: make(chan echo.Reply, answers+misses)}
		slow := netip.MustParseAddr("10.2.0.1")
		both := &twoAt{peerAt: p, silent: slow, second: func(int) netip.Addr { return claimed }}
		suspects := func(mesh.Config) []*suspect {
			return []*suspect{
				{key: wgtypes.Key{2}, claimed: []netip.Addr{claimed}, asked: slow}, {key: wgtypes.Key{1}, claimed: []netip.Addr{claimed}, asked: inside},
			}
		}
		began, later, found := bubble(), make(chan mesh.Config), time.Duration(0)
		time.AfterFunc(time.Second, func() { later <- mesh.Config{} })
		r := round{way: both, clock: bubble, later: later, suspects: suspects, found: func(*suspect) { found = time.Since(began) }}
		if _, err := r.interrogate(t.Context(), suspects(mesh.Config{})[:1]); err != nil {
			t.Fatal(err)
		}
		if found < time.Second || found > time.Second+answers*(spread+2)*lookEvery {
			t.Errorf("the newcomer is believed after %v", found)
		}
		if took := time.Since(began); took > (misses+1)*(answerPatience+2*spread*lookEvery) {
			t.Errorf("it took %v: the silent one is asked anew", took)
		}

		// With other addresses of the node in the tunnel nobody is asked from the old ones any more.
		began, moved := bubble(), mesh.Config{Addresses: []netip.Prefix{netip.MustParsePrefix("10.9.0.1/32")}}
		time.AfterFunc(time.Second, func() { later <- moved })
		next, err := r.interrogate(t.Context(), suspects(mesh.Config{})[:1])
		if took := time.Since(began); err != nil || next == nil || !slices.Equal(next.Addresses, moved.Addresses) || took != time.Second {
			t.Errorf("after %v the next mesh is %+v, error %v", took, next, err)
		}
	})
}

// twoAt is the way to two peers, of which one says nothing.
type twoAt struct {
	*peerAt
	silent netip.Addr
	// second is where the silent one is, after so many questions.
	second func(asked int) netip.Addr
}

func (p *twoAt) look() (map[wgtypes.Key]netip.Addr, error) {
	return map[wgtypes.Key]netip.Addr{{1}: claimed, {2}: p.second(p.asked)}, nil
}

func (p *twoAt) ask(to netip.Addr, text []byte) {
	if to != p.silent {
		p.peerAt.ask(to, text)
	}
}

// TestInterrogateSeesTheHolder: where the one is that was found at an address before shows by the looks of the interrogation, which it cannot
// foretell.
func TestInterrogateSeesTheHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, test := range map[string]struct {
			second func(asked int) netip.Addr
			away   bool
		}{
			"there":     {func(int) netip.Addr { return claimed }, false},
			"elsewhere": {func(int) netip.Addr { return truly }, true},
			"elsewhere at once": {func(asked int) netip.Addr {
				return map[bool]netip.Addr{true: truly, false: claimed}[asked == answers/2]
			}, true},
		} {
			p := &peerAt{shows: func(time.Duration) bool { return true }, honest: true, replies: make(chan echo.Reply, answers+misses)}
			s := &suspect{key: wgtypes.Key{1}, claimed: []netip.Addr{claimed}, asked: inside, holders: map[netip.Addr]wgtypes.Key{claimed: {2}}}
			found := false
			r := round{way: &twoAt{peerAt: p, second: test.second}, clock: bubble, found: func(*suspect) { found = true }}
			if _, err := r.interrogate(t.Context(), []*suspect{s}); err != nil {
				t.Fatal(err)
			}
			if !found || s.away != test.away {
				t.Errorf("%s: found %t, the holder was away %t, want %t", name, found, s.away, test.away)
			}
		}
	})
}

// TestSuspects asks those alone whose answer would change something, and believes them as long as the plan says the same.
func TestSuspects(t *testing.T) {
	prefix := netip.MustParsePrefix
	six, both, known, plain := testPeer(1, "fd00:1::/64"), testPeer(2, "10.2.0.0/24"), testPeer(3, "10.3.0.0/24"), testPeer(4, "10.4.0.0/24")
	both.AllowedIPs = append(both.AllowedIPs, prefix("fd00:2::/64"))
	for _, p := range []*mesh.Peer{&six, &both, &known} {
		p.NodeAddresses = []netip.Addr{claimed}
	}
	want := mesh.Config{Addresses: []netip.Prefix{prefix("fd00:9::1/128")}, Peers: []mesh.Peer{six, both, known, plain}}
	m := memory{encrypted: true, receives: map[wgtypes.Key]netip.Addr{{3}: claimed}, planned: plannedOf(want.Peers)}
	list := m.suspects(want)
	if len(list) != 2 || list[0].asked != netip.MustParseAddr("fd00:1::1") || list[1].asked != netip.MustParseAddr("fd00:2::1") {
		t.Fatalf("asked %+v", list)
	}
	if got := (&memory{}).suspects(want); len(got) > 0 {
		t.Errorf("without a tunnel: asked %+v", got)
	}
	s := list[1]
	s.at = claimed
	for what, change := range map[string]func(*mesh.Peer){
		"gone":               func(p *mesh.Peer) { *p = mesh.Peer{} },
		"another key":        func(p *mesh.Peer) { p.PublicKey = [32]byte{9} },
		"another address":    func(p *mesh.Peer) { p.NodeAddresses = []netip.Addr{truly} },
		"another's podCIDRs": func(p *mesh.Peer) { p.AllowedIPs = []netip.Prefix{prefix("fd00:3::/64")} },
	} {
		changed := both
		change(&changed)
		m.planned[both.Node] = changed
		if m.believe(s, start()) || m.receives[both.PublicKey].IsValid() {
			t.Errorf("%s: it is believed", what)
		}
	}
	m.planned[both.Node] = both
	if !m.believe(s, start()) || m.receives[both.PublicKey] != claimed {
		t.Error("it is not believed")
	}
}

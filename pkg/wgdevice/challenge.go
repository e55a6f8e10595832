package wgdevice

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"math/big"
	"net/netip"
	"slices"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/echo"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/podcidr"
)

// Does a node receive where it says that it is? WireGuard tells where a peer's last packet came from, and when it shook hands, but a packet
// can be sent with any source, and a handshake answered at one address and confirmed with the source of another. Only what is sent to an
// address and comes back shows who receives there. So the peer is asked, with a text that nobody can guess, through the tunnel: while the
// peer is at the address, the tunnel sends the question there, and none but the peer can read it.
//
// A peer that lies, by packets of both kinds, is to be seen at the other address whenever this node looks, and has to be at its true one when a
// question leaves. It must not know when either is: the looks follow each other in random times, of lookEvery at average, also while an
// answer is awaited, and a question is sent at a time that is evenly spread over a span of so many looks. (It leaves later, by as much as the
// peer may make the tunnel's queue long, but that is no less random, and the looks go on meanwhile.) Let x(t) be 1 while the peer is at its true
// address: it gets the question with the integral of x(u)*exp(-integral of x from 0 to u/lookEvery)/span, which is 1/spread at most, whatever
// it does. One look that sees it elsewhere ends the matter. So 16 of 20 questions are answered with a probability below 2^-51.
const (
	// answers is how many questions have to be answered, and misses how many may not be: packets get lost.
	answers = 16
	misses  = 4
	// spread is the span of a question, in looks.
	spread = 16
	// lookEvery is the shortest time between two looks, and lookShare how many times longer than a look it is.
	lookEvery = 5 * time.Millisecond
	lookShare = 10
	// answerPatience is how long an answer is waited for.
	answerPatience = time.Second
	// textSize is the length of the text in a question.
	textSize = 16
)

// suspect is a peer that says that its node has some addresses.
type suspect struct {
	node    string
	key     wgtypes.Key
	claimed []netip.Addr
	// at is that of them where the peer was seen first.
	at netip.Addr
	// asked is its address in the tunnel.
	asked netip.Addr
	// holders are the peers that were found to receive somewhere before. away says that the one at which this one is was elsewhere
	// at one of the looks.
	holders map[netip.Addr]wgtypes.Key
	away    bool

	answered, missed int
	// text is that of the question that is not answered, and replied says that it is since the last look. next is when the next one is asked, or this one
	// given up.
	text    []byte
	replied bool
	next    time.Time
}

// Challenge asks those peers that may carry their node's address and do not whether they receive there, and calls found whenever one was
// found to. What follows is the next Apply's. It writes nothing. While it asks it takes in the peers of later meshes, so that none waits for
// another that is slow.
func (d *Device) Challenge(ctx context.Context, want mesh.Config, later <-chan mesh.Config, found func()) error {
	suspects := func(want mesh.Config) []*suspect {
		d.writing.Lock()
		defer d.writing.Unlock()
		return d.memory.suspects(want)
	}
	next := &want
	var halfway error
	for next != nil {
		if len(suspects(*next)) == 0 {
			break
		}
		way, err := d.openTunnel(ctx, next.Addresses)
		if way == nil {
			return err
		}
		halfway = err
		reached := func(want mesh.Config) []*suspect {
			want.Addresses = slices.DeleteFunc(slices.Clone(want.Addresses), func(own netip.Prefix) bool { return way.sockets[own.Addr().Is4()] == nil })
			return suspects(want)
		}
		r := round{way: way, clock: d.clock, own: next.Addresses, later: later, suspects: reached, found: func(s *suspect) {
			d.writing.Lock()
			defer d.writing.Unlock()
			if d.memory.judge(s, d.clock(), func() (*wgtypes.Device, error) { return readDevice(way.client) }) {
				found()
			}
		}}
		next, err = r.interrogate(ctx, reached(*next))
		way.close()
		if err != nil {
			return err
		}
	}
	return halfway
}

// suspects returns the peers that are to be asked.
func (m *memory) suspects(want mesh.Config) []*suspect {
	var list []*suspect
	holders := make(map[netip.Addr]wgtypes.Key, len(m.receives))
	for key, at := range m.receives {
		holders[at] = key
	}
	for i := range want.Peers {
		p := &want.Peers[i]
		s := &suspect{node: p.Node, key: p.PublicKey, claimed: p.NodeAddresses, holders: holders}
		for _, prefix := range p.AllowedIPs {
			address := podcidr.NodeAddress(prefix)
			if slices.ContainsFunc(want.Addresses, func(own netip.Prefix) bool { return own.Addr().Is4() == address.Is4() }) {
				s.asked = address
				break
			}
		}
		if m.encrypted && len(s.claimed) > 0 && s.asked.IsValid() && !m.receives[s.key].IsValid() {
			list = append(list, s)
		}
	}
	return list
}

// judge is believe where another peer may have to give way: that it is silent, or elsewhere, has to be so now, and what is known of it may be as
// old as the last audit. Where that cannot be read nobody gives way, and the other is asked again later.
func (m *memory) judge(s *suspect, now time.Time, read func() (*wgtypes.Device, error)) bool {
	for _, at := range m.receives {
		if at == s.at {
			device, err := read()
			if err != nil {
				return false
			}
			m.see(device, now)
			break
		}
	}
	return m.believe(s, now)
}

// believe takes in that a peer receives where it is, unless the plan is another by now, or another peer that was found there is there still: it is
// heard, and was seen nowhere else meanwhile.
func (m *memory) believe(s *suspect, now time.Time) bool {
	p := m.planned[s.node]
	still := p.PublicKey == s.key && slices.Contains(p.NodeAddresses, s.at) &&
		slices.ContainsFunc(p.AllowedIPs, func(a netip.Prefix) bool { return a.Contains(s.asked) })
	for key, at := range m.receives {
		if at == s.at {
			left := m.peers[key].endpoint.Addr() != at || s.away && s.holders[at] == key
			still = still && (left || now.Sub(m.peers[key].heard) >= silence)
		}
	}
	if still {
		maps.DeleteFunc(m.receives, func(_ wgtypes.Key, at netip.Addr) bool { return at == s.at })
		m.found(s.key, s.at)
	}
	return still
}

// way is how peers are looked at and asked.
type way interface {
	// look returns where the peers are.
	look() (map[wgtypes.Key]netip.Addr, error)
	// ask sends a question. Whether it arrives shows by the answer.
	ask(to netip.Addr, text []byte)
	// answers are what comes back.
	answers() <-chan echo.Reply
}

// round is a number of peers that are asked together.
type round struct {
	way
	clock func() time.Time
	// own are the node's addresses in the tunnel, from which it asks.
	own []netip.Prefix
	// later are meshes that were applied meanwhile, and suspects returns those of one that are to be asked.
	later    <-chan mesh.Config
	suspects func(mesh.Config) []*suspect
	// found is called with each that receives where it is, as soon as that is known.
	found func(*suspect)
}

// interrogate asks the suspects, and those that come while it asks. It returns a mesh for which all begins anew: the node has other addresses
// there.
func (r round) interrogate(ctx context.Context, suspects []*suspect) (next *mesh.Config, err error) {
	every := lookEvery
	looks := r.clock()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for len(suspects) > 0 {
		select {
		case <-ctx.Done():
			return nil, nil
		case want := <-r.later:
			if !slices.Equal(want.Addresses, r.own) {
				return &want, nil
			}
			for _, s := range r.suspects(want) {
				if !slices.ContainsFunc(suspects, func(asked *suspect) bool { return asked.key == s.key }) {
					suspects = append(suspects, s)
				}
			}
			continue
		case reply := <-r.answers():
			for _, s := range suspects {
				s.replied = s.replied || s.asked == reply.From && s.text != nil && bytes.Equal(s.text, reply.Payload)
			}
			continue
		case <-timer.C:
		}
		if now := r.clock(); !now.Before(looks) {
			where, err := r.look()
			if err != nil {
				return nil, err
			}
			every = max(lookEvery, lookShare*r.clock().Sub(now))
			looks = r.clock().Add(random(2 * every))
			suspects = slices.DeleteFunc(suspects, func(s *suspect) bool { return s.seen(where, r.clock(), spread*every) })
		}
		suspects = slices.DeleteFunc(suspects, func(s *suspect) bool {
			if s.answered == answers {
				r.found(s)
			}
			return s.answered == answers
		})
		now, next := r.clock(), looks
		for _, s := range suspects {
			if s.text == nil && !now.Before(s.next) {
				s.text, s.next = newText(), now.Add(answerPatience)
				r.ask(s.asked, s.text)
			}
			if s.text == nil && s.next.Before(next) {
				next = s.next
			}
		}
		timer.Reset(next.Sub(r.clock()))
	}
	return nil, nil
}

// seen takes in where a suspect is, and says whether it is convicted by that. The next question follows within the span.
func (s *suspect) seen(where map[wgtypes.Key]netip.Addr, now time.Time, span time.Duration) bool {
	at := where[s.key]
	if !slices.Contains(s.claimed, at) || s.at.IsValid() && s.at != at {
		return true
	}
	first := !s.at.IsValid()
	s.at = at
	if holder, held := s.holders[at]; held && where[holder] != at {
		s.away = true
	}
	switch {
	case first:
	case s.replied:
		s.answered++
	case s.text != nil && !now.Before(s.next):
		s.missed++
	default:
		return false
	}
	s.text, s.replied, s.next = nil, false, now.Add(random(span))
	return s.missed > misses
}

// random returns a time that nobody can foretell, up to the longest.
func random(longest time.Duration) time.Duration {
	n, _ := rand.Int(rand.Reader, big.NewInt(int64(longest))) // never fails, as documented
	return time.Duration(n.Int64())
}

// newText returns what nobody can guess.
func newText() []byte {
	text := make([]byte, textSize)
	_, _ = rand.Read(text) // never fails, as documented
	return text
}

// tunnel is the way through the link.
type tunnel struct {
	client  *wgctrl.Client
	sockets map[bool]*echo.Socket // by whether it is IPv4's
	replies chan echo.Reply
	closed  chan struct{}
}

// openTunnel opens the link, and in each family a socket at one of the node's own addresses on it. With an error it still is open where one of
// the two could be made.
func (d *Device) openTunnel(ctx context.Context, own []netip.Prefix) (*tunnel, error) {
	k, err := openKernel()
	if err != nil {
		return nil, err
	}
	defer k.Close()
	mode, err := d.resolve(k)
	if err != nil {
		return nil, err
	}
	t := &tunnel{sockets: map[bool]*echo.Socket{}, replies: make(chan echo.Reply), closed: make(chan struct{})}
	if t.client, err = openWireGuard(ctx, mode); err != nil {
		return nil, err
	}
	var errs []error
	for _, a := range own {
		if t.sockets[a.Addr().Is4()] != nil {
			continue
		}
		socket, errListen := echo.Listen(a.Addr())
		if errListen != nil {
			errs = append(errs, errListen)
			continue
		}
		t.sockets[a.Addr().Is4()] = socket
		go t.receive(socket)
	}
	if len(t.sockets) == 0 {
		t.close()
		return nil, errors.Join(append(errs, errors.New("the node has no address of its own on "+mesh.Link))...)
	}
	return t, errors.Join(errs...)
}

// receive hands on what arrives, until the socket is closed.
func (t *tunnel) receive(socket *echo.Socket) {
	for {
		reply, err := socket.Receive()
		if err != nil {
			return
		}
		select {
		case t.replies <- reply:
		case <-t.closed:
			return
		}
	}
}

func (t *tunnel) close() {
	close(t.closed)
	for _, socket := range t.sockets {
		_ = socket.Close()
	}
	closeQuietly(t.client)
}

func (t *tunnel) look() (map[wgtypes.Key]netip.Addr, error) {
	device, err := readDevice(t.client)
	if err != nil {
		return nil, err
	}
	where := make(map[wgtypes.Key]netip.Addr, len(device.Peers))
	for i := range device.Peers {
		where[device.Peers[i].PublicKey] = endpointOf(&device.Peers[i]).Addr()
	}
	return where, nil
}

func (t *tunnel) ask(to netip.Addr, text []byte) {
	_ = t.sockets[to.Is4()].Send(to, 0, text) // what cannot be sent is not answered
}

func (t *tunnel) answers() <-chan echo.Reply { return t.replies }

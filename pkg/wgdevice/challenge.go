package wgdevice

import (
	"bytes"
	"context"
	"crypto/rand"
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
// A peer that lies could be at its true address in the moment in which the question is sent and at the other one whenever this
// node looks, by sending packets of both kinds in turn. So before the look, and between the look and the question, passes a random
// time that is evenly spread over the same length. Let g(t) be 1 while the peer lets itself be seen at the other address: it passes with
// probability A - A^2/2, where A is the average of g over the times of the look, which is a half at most, whatever it does. After
// 64 questions in a row that is 2^-64. (What the look itself takes belongs to the time between; with an eighth of the longest wait
// the half becomes 0.62, and all of it 2^-44.)
const (
	questions = 64
	// answerPatience is how long an answer is waited for: the first may need a handshake before.
	answerPatience = 2 * time.Second
	// shortWait is the shortest of the longest waits, and lookShare how many times longer than a look one is.
	shortWait = 5 * time.Millisecond
	lookShare = 8
	// textSize is the length of the text in a question.
	textSize = 16
)

// suspect is a peer that says that its node has some addresses.
type suspect struct {
	key     wgtypes.Key
	claimed []netip.Addr
	// at is that of them where the peer was seen first.
	at netip.Addr
	// asked is its address in the tunnel.
	asked netip.Addr
}

// Challenge asks those peers that may carry their node's address and do not whether they receive there, and says whether any was found
// to. What follows is the next Apply's. It takes as long as 64 packets there and back, and writes nothing.
func (d *Device) Challenge(ctx context.Context, want mesh.Config) (bool, error) {
	d.writing.Lock()
	suspects := d.memory.suspects(want)
	d.writing.Unlock()
	if len(suspects) == 0 {
		return false, nil
	}
	way, err := d.openTunnel(ctx, want.Addresses)
	if err != nil {
		return false, err
	}
	defer way.close()
	honest, err := interrogate(ctx, way, suspects, d.clock)
	if err != nil || len(honest) == 0 {
		return false, err
	}
	d.writing.Lock()
	defer d.writing.Unlock()
	for _, s := range honest {
		d.memory.found(s.key, s.at)
	}
	return true, nil
}

// suspects returns the peers that are to be asked.
func (m *memory) suspects(want mesh.Config) []suspect {
	var list []suspect
	for i := range want.Peers {
		p := &want.Peers[i]
		s := suspect{key: p.PublicKey, claimed: p.NodeAddresses}
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

// way is how peers are looked at and asked.
type way interface {
	// look returns where the peers are.
	look() (map[wgtypes.Key]netip.Addr, error)
	// ask returns who of those that are asked answers.
	ask(ctx context.Context, addresses []netip.Addr) map[netip.Addr]bool
}

// interrogate returns the suspects that receive where they are.
func interrogate(ctx context.Context, w way, suspects []suspect, clock func() time.Time) ([]suspect, error) {
	longest := shortWait
	for range questions {
		pause(ctx, random(longest))
		began := clock()
		where, err := w.look()
		if err != nil {
			return nil, err
		}
		longest = max(shortWait, lookShare*clock().Sub(began))
		suspects = slices.DeleteFunc(suspects, func(s suspect) bool {
			at := where[s.key]
			return !slices.Contains(s.claimed, at) || s.at.IsValid() && s.at != at
		})
		if len(suspects) == 0 {
			return nil, nil
		}
		asked := make([]netip.Addr, len(suspects))
		for i := range suspects {
			s := &suspects[i]
			s.at, asked[i] = where[s.key], s.asked
		}
		pause(ctx, random(longest))
		answered := w.ask(ctx, asked)
		suspects = slices.DeleteFunc(suspects, func(s suspect) bool { return !answered[s.asked] })
	}
	return suspects, nil
}

// pause waits, unless the context ends.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// random returns a time that nobody can foretell, up to the longest.
func random(longest time.Duration) time.Duration {
	n, _ := rand.Int(rand.Reader, big.NewInt(int64(longest))) // never fails, as documented
	return time.Duration(n.Int64())
}

// tunnel is the way through the link.
type tunnel struct {
	client  *wgctrl.Client
	sockets map[bool]*echo.Socket // by whether it is IPv4's
	replies chan echo.Reply
	closed  chan struct{}
}

// openTunnel opens the link, and a socket at each of the node's own addresses on it.
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
	for _, a := range own {
		socket, errListen := echo.Listen(a.Addr())
		if errListen != nil {
			t.close()
			return nil, errListen
		}
		t.sockets[a.Addr().Is4()] = socket
		go t.receive(socket)
	}
	return t, nil
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

func (t *tunnel) ask(ctx context.Context, addresses []netip.Addr) map[netip.Addr]bool {
	texts := make(map[netip.Addr][]byte, len(addresses))
	answered := map[netip.Addr]bool{}
	for _, a := range addresses {
		text := make([]byte, textSize)
		_, _ = rand.Read(text) // never fails, as documented
		// One that cannot be sent to does not answer.
		if err := t.sockets[a.Is4()].Send(a, 0, text); err == nil {
			texts[a] = text
		}
	}
	ctx, cancel := context.WithTimeout(ctx, answerPatience)
	defer cancel()
	for len(answered) < len(texts) {
		select {
		case reply := <-t.replies:
			if text, asked := texts[reply.From]; asked && bytes.Equal(text, reply.Payload) {
				answered[reply.From] = true
			}
		case <-ctx.Done():
			return answered
		}
	}
	return answered
}

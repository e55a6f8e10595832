package tagged

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync/atomic"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/lab/soak"
)

// podLink is a pod's link.
const podLink = "eth0"

// Sender sends packets by the link of a pod, past the pod's own routing and filters. Use it from one goroutine.
type Sender struct {
	link   string
	fd     int
	handle netlinksafe.Handle
	serial uint16
	to     unix.SockaddrLinklayer
}

// NewSender makes a sender for the network namespace of a pod, which need not have its link yet. Every packet goes to the
// host's end of the link.
func NewSender(space ns.NetNS) (*Sender, error) {
	return NewSenderBy(space, podLink, net.HardwareAddr{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}) // as of all pods' links
}

// NewSenderBy makes a sender for any namespace, whose packets go by a link of it to a MAC address.
func NewSenderBy(space ns.NetNS, link string, to net.HardwareAddr) (*Sender, error) {
	s := &Sender{link: link}
	s.to.Halen = uint8(copy(s.to.Addr[:], to)) //nolint:gosec // at most 8
	err := space.Do(func(ns.NetNS) (err error) {
		if s.handle, err = netlinksafe.NewHandle(unix.NETLINK_ROUTE); err != nil {
			return err
		}
		s.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("making a sender: %w", err)
	}
	return s, nil
}

// Close frees what the sender holds.
func (s *Sender) Close() error {
	s.handle.Close()
	return unix.Close(s.fd)
}

// Addresses returns the addresses that the pod's link has now, none while there is no link.
func (s *Sender) Addresses() []netip.Addr {
	link, err := s.handle.LinkByName(s.link)
	if err != nil {
		return nil
	}
	s.to.Ifindex = link.Attrs().Index
	list, err := s.handle.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil
	}
	var found []netip.Addr
	for _, a := range list {
		if address, ok := netip.AddrFromSlice(a.IP); ok && address.IsGlobalUnicast() {
			found = append(found, address.Unmap())
		}
	}
	return found
}

// Send sends a shot.
func (s *Sender) Send(shot Shot) error {
	s.serial++
	return s.SendPacket(shot.Packet(s.serial))
}

// SendPacket sends an IP packet.
func (s *Sender) SendPacket(packet []byte) error {
	protocol := uint16(unix.ETH_P_IP)
	if packet[0]>>4 == 6 {
		protocol = unix.ETH_P_IPV6
	}
	return s.SendFrame(protocol, packet)
}

// SendFrame sends what an EtherType says that it is.
func (s *Sender) SendFrame(etherType uint16, packet []byte) error {
	s.to.Protocol = networkOrder(etherType)
	if s.to.Ifindex == 0 {
		s.Addresses()
	}
	err := unix.Sendto(s.fd, packet, 0, &s.to)
	for errors.Is(err, unix.EAGAIN) { // what was sent before is still on its way through the tunnel
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(s.fd), Events: unix.POLLOUT}}, -1) //nolint:gosec // a descriptor; the next attempt tells of errors
		err = unix.Sendto(s.fd, packet, 0, &s.to)
	}
	if err != nil {
		return fmt.Errorf("sending %d bytes: %w", len(packet), err)
	}
	return nil
}

// Fire is what a Gun goes on sending: all protocols, to all targets in turn, from the pod's own addresses of the same family.
type Fire struct {
	Tag     uint32
	Targets []netip.Addr
	Port    uint16
	// Every is the time between two salvos, and Salvo how many packets one has; zero means one packet to each target by
	// each protocol.
	Every time.Duration
	Salvo int
	// Steady sends each packet a second time, from a port or with an identifier that is always the same: as part of a connection.
	Steady bool
	// Payload is that of each packet.
	Payload []byte
}

// Gun is a sender that fires until it is told to cease.
type Gun struct {
	stop context.CancelFunc
	done chan struct{}
	sent atomic.Int64
}

// Start begins to fire from the network namespace of a pod, from the first moment at which its link has an address.
func Start(ctx context.Context, space ns.NetNS, f Fire) (*Gun, error) {
	sender, err := NewSender(space)
	if err != nil {
		return nil, err
	}
	f.Every = soak.Spaced(f.Every)
	ctx, stop := context.WithCancel(ctx)
	g := &Gun{stop: stop, done: make(chan struct{})}
	go func() {
		defer close(g.done)
		sender.run(ctx, f, &g.sent)
		_ = sender.Close() // nothing was left to be sent
	}()
	return g, nil
}

// Cease ends the fire.
func (g *Gun) Cease() {
	g.stop()
	<-g.done
}

// Sent is how many packets have left the pod.
func (g *Gun) Sent() int64 { return g.sent.Load() }

// run sends from the first moment at which the pod's link has an address until the context ends, first one packet of each kind,
// and counts in sent what was sent.
func (s *Sender) run(ctx context.Context, f Fire, sent *atomic.Int64) {
	var shots []Shot
	for _, target := range f.Targets {
		for _, protocol := range Protocols() {
			shots = append(shots, Shot{Tag: f.Tag, Protocol: protocol, Dst: target, Port: f.Port, Payload: f.Payload})
		}
	}
	if f.Salvo == 0 {
		f.Salvo = len(shots)
	}
	ticker := time.NewTicker(f.Every)
	defer ticker.Stop()
	var own []netip.Addr
	for next := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		if len(own) < 2 {
			own = s.Addresses()
		}
		salvo := f.Salvo
		if sent.Load() == 0 {
			salvo = len(shots)
		}
		for range salvo {
			shot := shots[next%len(shots)]
			next++
			for _, shot.Src = range own {
				if shot.Src.Is4() != shot.Dst.Is4() {
					continue
				}
				err := s.Send(shot)
				if f.Steady {
					err = errors.Join(err, s.SendPacket(shot.Packet(0)))
				}
				if err == nil { // the link may be down still, or gone
					sent.Add(1)
				}
			}
		}
	}
}

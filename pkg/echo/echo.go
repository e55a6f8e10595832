// Package echo sends ICMP echo requests from an address of this host and takes the answers (RFC 792; RFC 4443, section 4). What a
// request carries comes back as it was: whoever sends it knows by that which request an answer is to, and that nobody made it up.
package echo

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/net/icmp"
	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// headerSize is the length of the header in front of what a message carries.
const headerSize = 8

// maxSize is the longest answer that is taken.
const maxSize = 2048

// Socket sends requests and takes answers in one family.
type Socket struct {
	conn    *icmp.PacketConn
	request icmp.Type
	// response is the type of answers as it is on the wire.
	response byte
	// id tells the answers to this socket from those to another program's requests (ping, for example).
	id uint16
}

// Reply is an answer. The payload is not known to be what was sent.
type Reply struct {
	From    netip.Addr
	Payload []byte
}

// Listen opens a socket at one of the host's addresses, in the network namespace of the calling thread. It takes CAP_NET_RAW.
func Listen(own netip.Addr) (*Socket, error) {
	id := make([]byte, 2)
	_, _ = rand.Read(id) // never fails, as documented
	s := &Socket{request: ipv6.ICMPTypeEchoRequest, response: byte(ipv6.ICMPTypeEchoReply), id: binary.BigEndian.Uint16(id)}
	network := "ip6:ipv6-icmp"
	if own.Is4() {
		network, s.request, s.response = "ip4:icmp", ipv4.ICMPTypeEcho, byte(ipv4.ICMPTypeEchoReply)
	}
	var err error
	if s.conn, err = icmp.ListenPacket(network, own.String()); err != nil {
		return nil, fmt.Errorf("opening a socket for ICMP at %s: %w", own, err)
	}
	return s, nil
}

// Send sends a request.
func (s *Socket) Send(to netip.Addr, number uint16, payload []byte) error {
	message := icmp.Message{Type: s.request, Body: &icmp.Echo{ID: int(s.id), Seq: int(number), Data: payload}}
	packet, err := message.Marshal(nil) // the kernel fills in the checksum of ICMPv6
	if err != nil {
		return fmt.Errorf("writing a request: %w", err)
	}
	_, err = s.conn.WriteTo(packet, &net.IPAddr{IP: to.AsSlice()})
	return err //nolint:wrapcheck // it names both addresses
}

// Receive returns the next answer, and an error once the socket is closed.
func (s *Socket) Receive() (Reply, error) {
	packet := make([]byte, maxSize)
	for {
		n, from, err := s.conn.ReadFrom(packet)
		if err != nil {
			return Reply{}, fmt.Errorf("waiting for an answer: %w", err)
		}
		payload, isOurs := s.payload(packet[:n])
		if address, isIP := from.(*net.IPAddr); isOurs && isIP {
			if source, valid := netip.AddrFromSlice(address.IP); valid {
				return Reply{From: source.Unmap(), Payload: payload}, nil
			}
		}
	}
}

// payload returns what a message carries, if that is an answer to this socket.
func (s *Socket) payload(message []byte) ([]byte, bool) {
	if len(message) < headerSize || message[0] != s.response || binary.BigEndian.Uint16(message[4:]) != s.id {
		return nil, false
	}
	return message[headerSize:], true
}

// Close ends a Receive that waits.
func (s *Socket) Close() error { return s.conn.Close() } //nolint:wrapcheck // there is nothing to add

package echo

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
)

// TestEcho has the host answer itself, while another socket asks it other things.
func TestEcho(t *testing.T) {
	for _, address := range []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()} {
		t.Run(address.String(), func(t *testing.T) {
			var sockets [2]*Socket
			for i := range sockets {
				var err error
				if sockets[i], err = Listen(address); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = sockets[i].Close() })
			}
			sockets[1].id = sockets[0].id + 1
			payloads := [][]byte{[]byte("one"), []byte("another"), {}}
			for i, payload := range payloads {
				if err := sockets[1].Send(address, uint16(i), []byte("no answer of the first's")); err != nil {
					t.Fatal(err)
				}
				if err := sockets[0].Send(address, uint16(i), payload); err != nil {
					t.Fatal(err)
				}
				if err := sockets[0].conn.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil { //nolint:forbidigo // a socket's deadline
					t.Fatal(err)
				}
				reply, err := sockets[0].Receive()
				if err != nil || reply.From != address || !bytes.Equal(reply.Payload, payload) {
					t.Errorf("got %+v, error %v; want %q", reply, err, payload)
				}
			}
			if err := sockets[0].Close(); err != nil {
				t.Fatal(err)
			}
			if reply, err := sockets[0].Receive(); err == nil {
				t.Errorf("a closed socket received %+v", reply)
			}
		})
	}
}

// TestPayload tells answers from all else that arrives at such a socket.
func TestPayload(t *testing.T) {
	for _, s := range []*Socket{
		{request: ipv4.ICMPTypeEcho, response: byte(ipv4.ICMPTypeEchoReply), id: 0x1234},
		{request: ipv6.ICMPTypeEchoRequest, response: byte(ipv6.ICMPTypeEchoReply), id: 0x1234},
	} {
		answer := []byte{s.response, 0, 0, 0, 0x12, 0x34, 0, 1, 'x'}
		if got, ok := s.payload(answer); !ok || string(got) != "x" {
			t.Errorf("%v: an answer is %q, %t", s.request, got, ok)
		}
		request4, request6, other := bytes.Clone(answer), bytes.Clone(answer), bytes.Clone(answer)
		request4[0], request6[0], other[5] = byte(ipv4.ICMPTypeEcho), byte(ipv6.ICMPTypeEchoRequest), 0x35
		for _, message := range [][]byte{request4, request6, other, answer[:7], nil} {
			if got, ok := s.payload(message); ok {
				t.Errorf("%v: %x is taken as an answer with %q", s.request, message, got)
			}
		}
	}
}

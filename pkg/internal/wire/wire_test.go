package wire

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/containernetworking/plugins/pkg/testutils"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
)

const marker = "0123456789abcdef0123456789abcdef"

func watch() Watch {
	return Watch{Marker: []byte(marker), Pods: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/56")}, Port: 51820}
}

// frame4 builds an Ethernet frame with an IPv4 UDP packet.
func frame4(source, destination string, port uint16, payload string) []byte {
	frame := binary.BigEndian.AppendUint16(make([]byte, 12), etherIPv4)
	header := make([]byte, ipv4Header)
	header[0], header[9] = 0x45, protocolUDP
	copy(header[12:], netip.MustParseAddr(source).AsSlice())
	copy(header[16:], netip.MustParseAddr(destination).AsSlice())
	frame = append(frame, header...)
	return append(appendUDP(frame, port), payload...)
}

// frame6 builds an Ethernet frame with an IPv6 UDP packet.
func frame6(source, destination string, port uint16, payload string) []byte {
	frame := binary.BigEndian.AppendUint16(make([]byte, 12), etherIPv6)
	header := make([]byte, ipv6Header)
	header[0], header[6] = 0x60, protocolUDP
	copy(header[8:], netip.MustParseAddr(source).AsSlice())
	copy(header[24:], netip.MustParseAddr(destination).AsSlice())
	frame = append(frame, header...)
	return append(appendUDP(frame, port), payload...)
}

func appendUDP(frame []byte, port uint16) []byte {
	frame = binary.BigEndian.AppendUint16(frame, 40000)
	frame = binary.BigEndian.AppendUint16(frame, port)
	return append(frame, 0, 0, 0, 0)
}

// with sets a byte of a frame.
func with(frame []byte, at int, value byte) []byte {
	frame[at] = value
	return frame
}

func TestCountsByFrame(t *testing.T) {
	data := "\x04\x00\x00\x00ciphertext"
	arp := append(binary.BigEndian.AppendUint16(make([]byte, 12), 0x0806), marker...)
	for name, test := range map[string]struct {
		frame []byte
		want  Counts
	}{
		"WireGuard":                   {frame4("192.0.2.1", "192.0.2.2", 51820, data), Counts{Packets: 1, WireGuard: 1, WireGuardBytes: 56}},
		"WireGuard over IPv6":         {frame6("2001:db8::1", "2001:db8::2", 51820, data), Counts{Packets: 1, WireGuard: 1, WireGuardBytes: 76}},
		"not WireGuard: message type": {frame4("192.0.2.1", "192.0.2.2", 51820, "\x05\x00\x00\x00"), Counts{Packets: 1}},
		"not WireGuard: port":         {frame4("192.0.2.1", "192.0.2.2", 51821, data), Counts{Packets: 1}},
		"not WireGuard: too short":    {frame4("192.0.2.1", "192.0.2.2", 51820, "\x04"), Counts{Packets: 1}},
		"marker in a foreign packet":  {frame4("192.0.2.1", "192.0.2.2", 80, "head "+marker), Counts{Packets: 1, Marked: 1, InClear: [2]int{1, 0}}},
		"marker cut off":              {frame4("192.0.2.1", "192.0.2.2", 80, marker[1:]), Counts{Packets: 1}},
		"pod is the source":           {frame4("10.244.1.5", "192.0.2.2", 80, ""), Counts{Packets: 1, Pods: 1, InClear: [2]int{1, 0}}},
		"pod is the destination":      {frame4("192.0.2.2", "10.244.1.5", 80, ""), Counts{Packets: 1, Pods: 1, InClear: [2]int{1, 0}}},
		"pods over IPv6":              {frame6("fd00:10:244:1::5", "fd00:10:244:2::5", 80, marker), Counts{Packets: 1, Pods: 1, Marked: 1, InClear: [2]int{0, 1}}},
		"marker without IP":           {arp, Counts{Marked: 1}},
		"first fragment":              {with(frame4("192.0.2.1", "192.0.2.2", 80, ""), 20, 0x20), Counts{Packets: 1, Fragments: 1}},
		"last fragment":               {with(frame4("192.0.2.1", "192.0.2.2", 80, ""), 21, 0xb9), Counts{Packets: 1, Fragments: 1}},
		"not to be fragmented":        {with(frame4("192.0.2.1", "192.0.2.2", 80, ""), 20, 0x40), Counts{Packets: 1}},
		"fragment over IPv6":          {with(frame6("2001:db8::1", "2001:db8::2", 80, ""), 20, 44), Counts{Packets: 1, Fragments: 1}},
		"runt":                        {[]byte("short"), Counts{}},
		"IPv4 cut off":                {frame4("10.244.1.5", "192.0.2.2", 80, "")[:30], Counts{}},
	} {
		t.Run(name, func(t *testing.T) {
			var got Counts
			got.add(test.frame, watch())
			if exposed := test.want.Marked+test.want.Pods > 0; exposed != (len(got.Examples) == 1) {
				t.Errorf("examples %q", got.Examples)
			}
			got.Examples = nil
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("counts (-want +got):\n%s", diff)
			}
		})
	}
}

func TestExamplesAreBounded(t *testing.T) {
	var got Counts
	for range 2 * maxExamples {
		got.add(frame4("10.244.1.5", "192.0.2.2", 80, ""), watch())
	}
	if got.Pods != 2*maxExamples || len(got.Examples) != maxExamples {
		t.Errorf("%d packets, %d examples", got.Pods, len(got.Examples))
	}
	if !strings.Contains(got.String(), "10 with a pod's address") {
		t.Errorf("String() = %q", got)
	}
}

// newNamespace makes a network namespace for the test.
func newNamespace(t *testing.T) ns.NetNS {
	t.Helper()
	namespace, err := testutils.NewNS()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(namespace.Close(), testutils.UnmountNS(namespace)); err != nil {
			t.Error(err)
		}
	})
	return namespace
}

// TestCaptureOnALink sends two datagrams over the loopback link of a namespace of its own; there each passes twice, out
// and in.
func TestCaptureOnALink(t *testing.T) {
	namespace := newNamespace(t)
	inside := func(ns.NetNS) error {
		lo, err := netlinksafe.LinkByName("lo")
		if err != nil {
			return err
		}
		address, err := netlink.ParseAddr("10.244.1.5/32")
		if err != nil {
			return err
		}
		if err = netlink.LinkSetUp(lo); err != nil {
			return err
		}
		if err = netlink.AddrAdd(lo, address); err != nil {
			return err
		}
		capture, err := Start("lo", watch())
		if err != nil {
			return err
		}
		exchange(t, "127.0.0.1", marker)
		exchange(t, "10.244.1.5", "nothing")
		counts, err := capture.Stop()
		if err != nil {
			return err
		}
		if counts.Packets != 4 || counts.Marked != 2 || counts.Pods != 2 {
			t.Errorf("counted %v", counts)
		}
		return nil
	}
	if err := namespace.Do(inside); err != nil {
		t.Fatal(err)
	}
}

// exchange sends a datagram to an address of this namespace and waits until it has arrived.
func exchange(t *testing.T, address, payload string) {
	t.Helper()
	server, err := net.ListenPacket("udp", net.JoinHostPort(address, "0"))
	if err != nil {
		t.Fatal(err)
	}
	client, err := net.Dial("udp", server.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err = io.WriteString(client, payload); err != nil {
		t.Fatal(err)
	}
	if err = server.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil { //nolint:forbidigo // a deadline of the kernel's
		t.Fatal(err)
	}
	if _, _, err = server.ReadFrom(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	if err = client.Close(); err != nil {
		t.Error(err)
	}
	if err = server.Close(); err != nil {
		t.Error(err)
	}
}

func TestStartSaysWhatIsWrong(t *testing.T) {
	if _, err := Start("no-such-link", watch()); err == nil || !strings.Contains(err.Error(), "no-such-link") {
		t.Errorf("a link that does not exist: %v", err)
	}
	if _, err := Start("lo", Watch{Marker: []byte("short")}); err == nil {
		t.Error("a short marker was taken")
	}
}

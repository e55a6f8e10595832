package main

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/tagged"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// A node that changes its key is two peers of the device and one of the metrics; one that the device lacks is not left out.
func TestPeersByNode(t *testing.T) {
	now := time.Unix(1000, 0)
	planned := []mesh.Peer{{Node: "changing", PublicKey: [32]byte{1}, Next: [32]byte{2}}, {Node: "lacking", PublicKey: [32]byte{3}}, {Node: "steady", PublicKey: [32]byte{4}}}
	device := []wgdevice.PeerStatus{
		{PublicKey: [32]byte{1}, LastHandshake: now, ReceivedBytes: 10, SentBytes: 20},
		{PublicKey: [32]byte{2}, LastHandshake: now.Add(time.Second), ReceivedBytes: 1, SentBytes: 2},
		{PublicKey: [32]byte{4}, LastHandshake: now, ReceivedBytes: 5, SentBytes: 6, Endpoint: netip.MustParseAddrPort("192.0.2.1:51820")},
		{PublicKey: [32]byte{9}, ReceivedBytes: 99},
	}
	want := map[string]wgdevice.PeerStatus{
		"changing": {LastHandshake: now.Add(time.Second), ReceivedBytes: 11, SentBytes: 22},
		"lacking":  {},
		"steady":   {LastHandshake: now, ReceivedBytes: 5, SentBytes: 6},
	}
	if diff := cmp.Diff(want, byNode(planned, device), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A node's metrics tell of its peers, of each guard that stops something, and of what its pods send in clear.
func TestMetricsOfTheMesh(t *testing.T) {
	t.Parallel()
	s := newStage(t, "wdmetrics", 2)
	for i, node := range s.Nodes {
		s.startTunnel(i)
		var err error
		s.daemons[i], err = node.StartDaemon(t.Context(), nil, "--wireguard", "userspace", "--metrics-address", "127.0.0.1:9476", "--service-cidr", "10.96.0.0/12,fd00:10:96::/112")
		if err != nil {
			t.Fatal(err)
		}
	}
	for i := range s.Nodes {
		s.ready(i)
	}
	client, server := s.pod(0, "client"), s.pod(1, "server")
	s.reaches(client, server)
	s.grows("warren_encryption_enabled", 0, 1)
	s.grows(`warren_peer_received_bytes_total{node="node-2"}`, 0, 200)
	s.grows(`warren_peer_sent_bytes_total{node="node-2"}`, 0, 200)
	if age := s.metric(`warren_peer_handshake_age_seconds{node="node-2"}`); age < 0 || age > 60 {
		t.Errorf("the handshake's age is %v", age)
	}
	for where, to := range map[string][]netip.Addr{"node": s.Nodes[1].Addresses, "world": outside()} {
		s.counts(`warren_clear_packets_total{destination="`+where+`"}`, 2, func() { each(t, client.Netns(), to) })
	}

	fromPod := newLiar(t, client).sender
	fromWire, fromPeer := s.senderBy(s.Wire(), lab.WireLink, s.Nodes[0].MAC), s.senderBy(s.Nodes[1].Netns(), "warren0", net.HardwareAddr{})
	send := func(by *tagged.Sender, stray bool, from, to []netip.Addr) {
		t.Helper()
		for family := range from {
			shot := tagged.Shot{Tag: tagForbidden, Protocol: tagged.ICMP, Src: from[family], Dst: to[family], Port: port, Stray: stray}
			if err := by.Send(shot); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Ways past the tunnel to addresses of the other node's pods.
	past := parsed("10.244.2.200", "fd00:10:244:2::c8")
	for family, command := range []string{"ip -4", "ip -6"} {
		way := fmt.Sprintf("%s route add %s via %s dev eth0", command, past[family], s.Nodes[1].Addresses[family])
		if _, err := s.Nodes[0].Run(t.Context(), strings.Fields(way)...); err != nil {
			t.Fatal(err)
		}
	}
	hosts := []string{outside()[0].String() + "/32", outside()[1].String() + "/128"}
	for reason, stopped := range map[string]func(){
		"never in clear":                           func() { each(t, client.Netns(), past) },
		"a Service's, not translated":              func() { each(t, client.Netns(), parsed("10.96.0.10", "fd00:10:96::a")) },
		"no connection to judge by":                func() { send(fromPod, true, client.Addresses, outside()) },
		"a pod sends from its own address only":    func() { send(fromPod, false, outside(), server.Addresses) },
		"a pod's address comes by the tunnel only": func() { send(fromWire, false, server.Addresses, client.Addresses) },
		"not routed for other nodes": func() {
			s.allowKey(1, s.status(1).Peers[0].PublicKey, hosts...) // until its own daemon takes it back
			send(fromPeer, false, server.Addresses, outside())
		},
	} {
		s.counts(`warren_dropped_packets_total{reason="`+reason+`"}`, 2, stopped)
	}
}

// Without encryption what goes to a pod of another node counts as clear, whether a pod or the node itself sends it.
func TestMetricsWithoutEncryption(t *testing.T) {
	t.Parallel()
	s := newStage(t, "wdmetoff", 2)
	for i, node := range s.Nodes {
		var err error
		s.daemons[i], err = node.StartDaemon(t.Context(), nil, "--encryption", "off", "--metrics-address", "127.0.0.1:9476")
		if err != nil {
			t.Fatal(err)
		}
	}
	for i, node := range s.Nodes {
		if err := node.Ready(t.Context(), s.daemons[i], 0); err != nil {
			t.Fatal(err)
		}
	}
	client, server := s.pod(0, "client"), s.pod(1, "server")
	s.reaches(client, server)
	for _, from := range []ns.NetNS{client.Netns(), s.Nodes[0].Netns()} {
		s.counts(`warren_clear_packets_total{destination="pod"}`, 2, func() { each(t, from, server.Addresses) })
	}
}

// each sends a datagram to each address, by a socket of its own, which meets no error for another.
func each(t *testing.T, from ns.NetNS, to []netip.Addr) {
	t.Helper()
	for _, address := range to {
		datagrams(t, from, netip.AddrPortFrom(address, 9), 1)
	}
}

// senderBy sends by a link of a namespace.
func (s *stage) senderBy(space ns.NetNS, link string, to net.HardwareAddr) *tagged.Sender {
	s.t.Helper()
	sender, err := tagged.NewSenderBy(space, link, to)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = sender.Close() })
	return sender
}

// counts demands that a series of the first node's counts what is sent, in both families, several times.
func (s *stage) counts(series string, atLeast float64, send func()) {
	s.t.Helper()
	before := s.metric(series)
	if before < 0 {
		s.t.Errorf("there is no %s", series)
	}
	for range 7 {
		send()
	}
	s.grows(series, before, 7*atLeast)
}

// grows waits until a series of the first node's is by so much more than before.
func (s *stage) grows(series string, before, by float64) {
	s.t.Helper()
	s.eventually(func() error {
		if value := s.metric(series); value < before+by {
			return fmt.Errorf("%s is %v, want %v", series, value, before+by)
		}
		return nil
	})
}

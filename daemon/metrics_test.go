package main

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

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

// A node's metrics tell of its peers, of each guard, and of what its pods send in clear.
func TestMetricsOfTheMesh(t *testing.T) {
	t.Parallel()
	s := newStage(t, "wdmetrics", 2)
	for i, node := range s.Nodes {
		s.startTunnel(i)
		var err error
		s.daemons[i], err = node.StartDaemon(t.Context(), nil, "--wireguard", "userspace", "--metrics-address", "127.0.0.1:9476")
		if err != nil {
			t.Fatal(err)
		}
	}
	for i := range s.Nodes {
		s.ready(i)
	}
	client := s.pod(0, "client")
	s.reaches(client, s.pod(1, "server"))
	above := func(series string, least float64) {
		t.Helper()
		s.eventually(func() error {
			if value := s.metric(series); value < least {
				return fmt.Errorf("%s is %v, want %v", series, value, least)
			}
			return nil
		})
	}
	above("warren_encryption_enabled", 1)
	above(`warren_peer_received_bytes_total{node="node-2"}`, 200)
	above(`warren_peer_sent_bytes_total{node="node-2"}`, 200)
	if age := s.metric(`warren_peer_handshake_age_seconds{node="node-2"}`); age < 0 || age > 60 {
		t.Errorf("the handshake's age is %v", age)
	}
	for _, reason := range []string{"never in clear", "no connection to judge by", "a pod's address comes by the tunnel only", "not routed for other nodes"} {
		above(`warren_dropped_packets_total{reason="`+reason+`"}`, 0)
	}
	for _, where := range []string{"node", "world"} {
		above(`warren_clear_packets_total{destination="`+where+`"}`, 0)
	}
	const each = 7
	for _, to := range [][]netip.Addr{s.Nodes[1].Addresses, outside()} {
		for _, address := range to {
			for range each { // each by its own socket, which meets no error for another
				datagrams(t, client, netip.AddrPortFrom(address, 9), 1)
			}
		}
	}
	for _, where := range []string{"node", "world"} {
		above(`warren_clear_packets_total{destination="`+where+`"}`, 2*each)
	}
}

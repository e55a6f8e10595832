package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/lab"
)

// TestEncryptNodeTraffic sends a pod's packets to another node's InternalIP and to a NodePort there: in clear by default, and through
// the tunnel with --encrypt-node-traffic, which leaves what the nodes send to each other alone.
func TestEncryptNodeTraffic(t *testing.T) {
	s := running(t, "wdnode", 3)
	client, server := s.pod(0, "client"), s.pod(2, "server")
	node := s.Nodes[1]
	host := netip.AddrPortFrom(node.Addresses[0], port)
	nodePort := netip.AddrPortFrom(node.Addresses[0], 30080)
	listener, err := lab.NewEcho(t.Context(), node.Netns(), port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	echoDatagrams(t, node.Netns())
	// As kube-proxy does for a Service whose endpoint is on another node.
	if _, err = node.Run(t.Context(), "iptables", "-w", "-t", "nat", "-A", "PREROUTING", "-p", "tcp", "-d", host.Addr().String(), "--dport", "30080",
		"-j", "DNAT", "--to-destination", netip.AddrPortFrom(server.Addresses[0], port).String()); err != nil {
		t.Fatal(err)
	}
	probes := map[string]func() error{
		"TCP":      func() error { return lab.Probe(t.Context(), client.Netns(), host, marker) },
		"UDP":      func() error { return askDatagram(t, client.Netns(), host) },
		"NodePort": func() error { return lab.Probe(t.Context(), client.Netns(), nodePort, marker) },
	}
	wantClear := func(what string, probe func() error, want bool) {
		t.Helper()
		capture, errCapture := s.Capture(marker)
		if errCapture != nil {
			t.Fatal(errCapture)
		}
		errProbe := probe()
		counts, errStop := capture.Stop()
		if err = errors.Join(errProbe, errStop); err != nil || counts.Marked > 0 != want || !want && counts.WireGuard == 0 {
			t.Errorf("%s: %v, error %v; want packets in clear: %t", what, counts, err, want)
		}
	}
	for name, probe := range probes {
		wantClear("by default, "+name, probe, true)
	}

	for i := range s.Nodes {
		if err = s.daemons[i].Stop(); err != nil {
			t.Fatal(err)
		}
		s.startDaemon(i, []string{"WARREN_ENCRYPT_NODE_TRAFFIC=true", "WARREN_NODE_CIDR=192.0.2.0/24,2001:db8::/64"})
	}
	for i := range s.Nodes {
		s.ready(i)
	}
	s.encryptsNodes(0, 2)
	for name, probe := range probes {
		wantClear("encrypted, "+name, probe, false)
	}
	wantClear("from node to node", func() error { return lab.Probe(t.Context(), s.Nodes[0].Netns(), host, marker) }, true)
	// The node's own traffic to pods goes on, too, and a server sees the node's first address.
	wantClear("from a node to a pod", func() error {
		return lab.Probe(t.Context(), node.Netns(), netip.AddrPortFrom(client.Addresses[0], port), marker)
	}, false)

	s.eventually(func() error {
		if _, errDown := s.Nodes[0].Run(t.Context(), "ip", "link", "set", "warren0", "down"); errDown != nil {
			return errDown
		}
		report, _ := s.Nodes[0].Command(t.Context(), "status") // its exit status is that of a node with problems
		if !strings.Contains(report, "NodeAddressesHeld") || !strings.Contains(report, fmt.Sprintf("%s of node %s", host.Addr(), node.Name)) {
			return fmt.Errorf("status says, with the link down: %s", report)
		}
		return nil
	})
	s.encryptsNodes(0, 2) // the audit has repaired it
	if report, _ := s.Nodes[0].Command(t.Context(), "status"); strings.Contains(report, "NodeAddressesHeld") {
		t.Errorf("status says after the repair: %s", report)
	}

	// What a pod sends stays in the tunnel, with the node's address, where the node gets other podCIDRs and the pod keeps what it has.
	s.changePodCIDRs(0, "10.244.91.0/24", "fd00:10:244:91::/64")
	s.eventually(func() error {
		if table := s.nodeTable(0); !strings.Contains(table, "from 10.244.91.0/24 ") || !strings.Contains(table, "from "+client.Addresses[0].String()+" ") {
			return fmt.Errorf("the table of the nodes' addresses has %q", table)
		}
		return nil
	})
	wantClear("from an address of the podCIDR before", probes["TCP"], false)
	s.changePodCIDRs(0, "10.244.1.0/24", "fd00:10:244:1::/64")
	s.encryptsNodes(0, 2)
	s.eventually(probes["TCP"])

	// What stands when the daemon is gone stays, and cleanup takes it away.
	if err = s.daemons[0].Stop(); err != nil {
		t.Fatal(err)
	}
	wantClear("without a daemon", probes["TCP"], false)
	if _, err = s.Nodes[0].Run(t.Context(), "ip", "link", "set", "warren0", "down"); err != nil {
		t.Fatal(err)
	}
	capture, err := s.Capture(marker)
	if err != nil {
		t.Fatal(err)
	}
	errProbe := probes["TCP"]()
	if counts, errStop := capture.Stop(); errStop != nil || errProbe == nil || counts.Marked > 0 {
		t.Errorf("without a daemon and with the link down: %v, probe %v, error %v; want nothing in clear", counts, errProbe, errStop)
	}
	if _, err = s.Nodes[0].Command(t.Context(), "cleanup"); err != nil {
		t.Fatal(err)
	}
	if left := s.nodeTable(0); left != "" {
		t.Errorf("cleanup left:\n%s", left)
	}
}

// encryptsNodes waits until a node sends what its pods send to that many others through the tunnel.
func (s *stage) encryptsNodes(i, nodes int) {
	s.t.Helper()
	s.eventually(func() error {
		if table := s.nodeTable(i); strings.Count(table, "dev warren0") != nodes {
			return fmt.Errorf("the table of the nodes' addresses has %q", table)
		}
		return nil
	})
}

// nodeTable renders a node's routes to others' own addresses, and the rules that lead there.
func (s *stage) nodeTable(i int) string {
	s.t.Helper()
	table, err := s.Nodes[i].Run(s.t.Context(), "sh", "-c", `ip route show table all | grep 'table 87' || true; ip -6 route show table all | grep 'table 87' || true
ip rule show | grep 'lookup 87' || true; ip -6 rule show | grep 'lookup 87' || true`)
	if err != nil {
		s.t.Fatal(err)
	}
	return table
}

// echoDatagrams answers datagrams on all of a node's addresses, from whichever the kernel chooses.
func echoDatagrams(t *testing.T, netns ns.NetNS) {
	t.Helper()
	err := netns.Do(func(ns.NetNS) error {
		socket, err := net.ListenUDP("udp", &net.UDPAddr{Port: port})
		if err != nil {
			return err
		}
		t.Cleanup(func() { _ = socket.Close() })
		go func() {
			buffer := make([]byte, lab.MarkerSize)
			for {
				n, from, errRead := socket.ReadFromUDPAddrPort(buffer)
				if errRead != nil {
					return
				}
				_, _ = socket.WriteToUDPAddrPort(buffer[:n], from)
			}
		}()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// askDatagram sends the marker and waits for it to come back from where it went.
func askDatagram(t *testing.T, netns ns.NetNS, to netip.AddrPort) error {
	t.Helper()
	return netns.Do(func(ns.NetNS) error {
		socket, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(to))
		if err != nil {
			return err
		}
		defer func() { _ = socket.Close() }()
		if err = socket.SetDeadline(time.Now().Add(2 * time.Second)); err != nil { //nolint:forbidigo // a socket's deadline
			return err
		}
		if _, err = socket.Write(marker[:]); err != nil {
			return err
		}
		_, err = socket.Read(make([]byte, lab.MarkerSize))
		return err
	})
}

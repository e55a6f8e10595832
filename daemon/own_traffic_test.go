package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/warren-cni/warren/pkg/lab"
)

// nodePort is a port of each node that leads to a pod, as kube-proxy has it.
const nodePort = 30080

// What a node sends to a remote pod has the node's first address, whatever address the socket has, and also where it comes from a client
// of a NodePort: a policy that names this address lets in that node and no other, and nothing of it is in clear between the nodes.
func TestNodesOwnTraffic(t *testing.T) {
	t.Parallel()
	s := running(t, "wdown", 3)
	server := s.pod(0, "server")
	s.write("policy", onlyFrom("server", "10.244.2.1/32", "fd00:10:244:2::1/128"))
	s.closes(s.pod(2, "pod"), server)
	for i := range s.Nodes {
		for family, tool := range []string{"iptables", "ip6tables"} {
			to := netip.AddrPortFrom(server.Addresses[family], port)
			_, err := s.Nodes[i].Run(t.Context(), tool, "-w", "-t", "nat", "-A", "PREROUTING", "-i", "eth0", "-p", "tcp", "--dport", fmt.Sprint(nodePort),
				"-j", "DNAT", "--to-destination", to.String())
			if err != nil {
				t.Fatal(err)
			}
		}
	}

	capture, err := s.Capture(marker)
	if err != nil {
		t.Fatal(err)
	}
	client := lab.NewMarker() // of the host beside the nodes, whose way to the first of them is in clear
	for i, named := range map[int]bool{1: true, 2: false} {
		node := s.Nodes[i]
		for family, address := range server.Addresses {
			to := netip.AddrPortFrom(address, port)
			s.expects(named, node.Name+" from any address", tryFrom(t, node.Netns(), netip.Addr{}, to, marker))
			s.expects(named, node.Name+" from its InternalIP", tryFrom(t, node.Netns(), node.Addresses[family], to, marker))
			s.expects(named, "a client of the NodePort of "+node.Name,
				tryFrom(t, s.Wire(), netip.Addr{}, netip.AddrPortFrom(node.Addresses[family], nodePort), client))
		}
	}
	counts, err := capture.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if counts.Marked+counts.Pods > 0 || counts.WireGuard == 0 {
		t.Errorf("the wire shows %v: %q", counts, counts.Examples)
	}
}

// expects demands that a probe gets through, or that it does not.
func (s *stage) expects(through bool, what string, err error) {
	s.t.Helper()
	if (err == nil) != through {
		s.t.Errorf("%s: %v, want it to get through: %t", what, err, through)
	}
}

// tryFrom sends a message from an address of a namespace, or from any, and waits until it comes back.
func tryFrom(t *testing.T, netns ns.NetNS, from netip.Addr, to netip.AddrPort, message [lab.MarkerSize]byte) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), closedPatience)
	defer cancel()
	return netns.Do(func(ns.NetNS) error {
		dialer := net.Dialer{}
		if from.IsValid() {
			dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
		}
		socket, err := dialer.DialContext(ctx, "tcp", to.String())
		if err != nil {
			return err
		}
		_, err = socket.Write(message[:])
		if err == nil {
			err = socket.SetReadDeadline(now().Add(changePatience))
		}
		if err == nil {
			_, err = io.ReadFull(socket, make([]byte, lab.MarkerSize))
		}
		return errors.Join(err, socket.Close())
	})
}

// onlyFrom is a policy that lets in from some addresses alone.
func onlyFrom(name string, blocks ...string) networkingv1.NetworkPolicy {
	policy := rules{name: "only-from", selector: app(name), from: app("nobody")}.object()
	policy.Spec.Ingress[0].From = nil
	for _, block := range blocks {
		policy.Spec.Ingress[0].From = append(policy.Spec.Ingress[0].From, networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: block}})
	}
	return policy
}

// A node whose own addresses mean nothing to the others joins from behind NAT, where nobody can send first: they learn its endpoint from its
// handshakes. Another one is reached at a public address and port that are not its own. Pods reach each other, policies hold, and nothing
// is in clear.
func TestNodeBehindNAT(t *testing.T) {
	t.Parallel()
	s := newStage(t, "wdnat", 3)
	const public, hidden = "192.0.2.102:40001", "192.0.2.103:40002"
	for i, at := range map[int]string{1: public, 2: hidden} {
		node, outside := s.readNode(s.Nodes[i].Name), netip.MustParseAddrPort(at)
		node.Status.Addresses = node.Status.Addresses[:1]
		node.Status.Addresses[0].Address = fmt.Sprintf("198.18.0.%d", i+1)
		node.Annotations = map[string]string{"warren.cni/endpoint": public}
		translate := fmt.Sprintf(`ip addr add 198.18.0.%d/32 dev eth0
ip addr add %s/24 dev eth0
iptables -t nat -A POSTROUTING -o eth0 -p udp --sport 51820 -j SNAT --to-source %s`, i+1, outside.Addr(), outside)
		if at == public {
			translate += fmt.Sprintf("\niptables -t nat -A PREROUTING -p udp -d %s --dport %d -j DNAT --to-destination %s:51820",
				outside.Addr(), outside.Port(), s.Nodes[i].Addresses[0])
		} else {
			node.Annotations = map[string]string{"warren.cni/behind-nat": "true"}
			translate += "\niptables -A INPUT -i eth0 -m conntrack --ctstate NEW -j DROP"
		}
		if _, err := s.Nodes[i].Run(t.Context(), "sh", "-ec", translate); err != nil {
			t.Fatal(err)
		}
		s.write(node.Name, node)
	}
	capture, err := s.Capture(marker)
	if err != nil {
		t.Fatal(err)
	}
	for i := range s.Nodes {
		s.startTunnel(i)
	}
	s.startDaemons()
	var pods []*lab.Pod
	for i := range s.Nodes {
		pods = append(pods, s.pod(i, fmt.Sprintf("pod-%d", i+1)))
	}
	for _, from := range pods {
		for _, to := range pods {
			if from != to {
				s.reaches(from, to)
			}
		}
	}
	for i := range s.Nodes {
		s.healthy(i)
	}
	for _, peer := range s.status(0).Peers {
		if want := map[string]string{"node-2": public, "node-3": hidden}[peer.Node]; peer.Endpoint != want {
			t.Errorf("%s is sent to at %s, want %s", peer.Node, peer.Endpoint, want)
		}
	}

	s.write("policy", rules{name: "friends", selector: app("pod-3"), from: app("pod-2")}.object(),
		rules{name: "closed", selector: app("pod-1"), from: app("nobody")}.object())
	s.closes(pods[0], pods[2])
	s.closes(pods[2], pods[0])
	s.reaches(pods[1], pods[2])
	counts, err := capture.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if counts.Marked+counts.Pods > 0 || counts.WireGuard == 0 {
		t.Errorf("the wire shows %v: %q", counts, counts.Examples)
	}
}

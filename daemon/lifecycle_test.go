package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/lab"
)

// kernelState is everything that the daemon writes in a node's kernel, as text.
func kernelState(t *testing.T, node *lab.Node) string {
	t.Helper()
	state, err := node.Run(t.Context(), "sh", "-c", `
for save in iptables-save ip6tables-save; do $save | grep -v '^#' | sed 's/ \[.*//'; done
ipset save | sort
ip -oneline -details link show
ip -oneline address show
ip route show table all | sort
ip -6 route show table all | sort
ip neigh show nud permanent | sort`)
	if err != nil {
		t.Fatal(err)
	}
	return state
}

// generation is the number of the last transaction of a node's nftables: it grows with each, whatever it wrote.
func generation(t *testing.T, node *lab.Node) uint32 {
	t.Helper()
	var number uint32
	err := node.Do(func() error {
		request := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN, 0)
		request.AddData(&nl.Nfgenmsg{})
		answers, err := request.Execute(unix.NETLINK_NETFILTER, 0)
		if err != nil {
			return err
		}
		for _, answer := range answers {
			attributes, err := nl.ParseRouteAttr(answer[nl.SizeofNfgenmsg:])
			if err != nil {
				return err
			}
			for _, attribute := range attributes {
				if attribute.Attr.Type == unix.NFTA_GEN_ID {
					number = binary.BigEndian.Uint32(attribute.Value)
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return number
}

// SIGTERM leaves rules, tunnel and traffic working, and the daemon that comes next takes over without a write.
func TestRestartIsNotSeen(t *testing.T) {
	s := running(t, "wdrestart", 2)
	s.write("policy", isolateClosed())
	client, open, closed := s.pod(0, "client"), s.pod(1, "open"), s.pod(1, "closed")
	s.reaches(client, open)
	s.blocked(client, closed)
	for i := range s.Nodes {
		s.healthy(i)
	}

	before := []string{kernelState(t, s.Nodes[0]), kernelState(t, s.Nodes[1])}
	generations := []uint32{generation(t, s.Nodes[0]), generation(t, s.Nodes[1])}
	for _, daemon := range s.daemons {
		if err := daemon.Stop(); err != nil {
			t.Errorf("the daemon did not end well: %v", err)
		}
	}
	s.reaches(client, open)
	s.blocked(client, closed)
	for i, node := range s.Nodes {
		if diff := cmp.Diff(before[i], kernelState(t, node)); diff != "" {
			t.Errorf("SIGTERM changed the kernel of %s (-before +after):\n%s", node.Name, diff)
		}
	}

	s.startDaemons()
	s.reaches(client, open)
	s.blocked(client, closed)
	for i, node := range s.Nodes {
		s.healthy(i)
		if diff := cmp.Diff(before[i], kernelState(t, node)); diff != "" {
			t.Errorf("a restart changed the kernel of %s (-before +after):\n%s", node.Name, diff)
		}
		if now := generation(t, node); now != generations[i] {
			t.Errorf("a restart made %d transactions of the packet filter on %s", now-generations[i], node.Name)
		}
	}
}

// A pod that is deleted while the daemon is away leaves nothing that the next daemon would let pass.
func TestDeleteWithoutDaemon(t *testing.T) {
	s := running(t, "wddelete", 1)
	s.healthy(0)
	before := kernelState(t, s.Nodes[0])
	pod := s.pod(0, "short")
	if err := s.daemons[0].Stop(); err != nil {
		t.Fatal(err)
	}
	if err := pod.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.startDaemon(0, nil)
	s.ready(0)
	s.healthy(0)
	if diff := cmp.Diff(before, kernelState(t, s.Nodes[0])); diff != "" {
		t.Errorf("the pod left (-before +after):\n%s", diff)
	}
}

// The tunnel's process dies: nothing passes, nothing is in clear, STATUS says so, and its successor is configured without help.
func TestTunnelDies(t *testing.T) {
	s := running(t, "wdtunnel", 2)
	client, server := s.pod(0, "client"), s.pod(1, "server")
	s.reaches(client, server)

	if err := s.tunnels[0].Kill(); err != nil {
		t.Fatal(err)
	}
	watched := lab.NewMarker()
	capture, err := s.Capture(watched)
	if err != nil {
		t.Fatal(err)
	}
	s.blocked(client, server)
	s.blocked(server, client)
	counts, err := capture.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if counts.Marked > 0 || counts.Pods > 0 {
		t.Errorf("with the tunnel dead the wire shows %v: %q", counts, counts.Examples)
	}
	s.notReady(types.ErrLimitedConnectivity, "NoTunnel")

	s.startTunnel(0)
	s.reaches(client, server)
	s.healthy(0)
	if err = s.Nodes[0].Readiness(t.Context()); err != nil {
		t.Errorf("STATUS with the tunnel back: %v", err)
	}
}

// A Node is deleted: its peer goes, and what is still sent to its pods does not show on the wire; it comes back, and works.
func TestNodeLeaves(t *testing.T) {
	s := running(t, "wdleave", 2)
	client, server := s.pod(0, "client"), s.pod(1, "server")
	s.reaches(client, server)
	node, err := s.ReadText("node-2")
	if err != nil {
		t.Fatal(err)
	}
	if err = s.Remove("node-2"); err != nil {
		t.Fatal(err)
	}
	s.eventually(func() error {
		if peers := s.status(0).Peers; len(peers) > 0 {
			return fmt.Errorf("peers: %+v", peers)
		}
		return nil
	})
	s.problem(1, "NodeUnknown", "node-2")
	capture, err := s.Capture(marker)
	if err != nil {
		t.Fatal(err)
	}
	s.blocked(client, server)
	counts, err := capture.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if counts.Marked > 0 || counts.Pods > 0 {
		t.Errorf("after the node left the wire shows %v: %q", counts, counts.Examples)
	}
	s.writeText("node-2", string(node))
	s.ready(0)
	s.ready(1)
	s.reaches(client, server)
	s.healthy(0)
	s.healthy(1)
}

// Encryption is switched off and on again under a tunnel that keeps running: pods reach each other in each state, and what
// the wire shows follows the flag.
func TestEncryptionOffAndOnAgain(t *testing.T) {
	s := running(t, "wdflip", 2)
	client, server := s.pod(0, "client"), s.pod(1, "server")
	s.reaches(client, server)
	for _, mode := range []string{"off", "on"} {
		for i, daemon := range s.daemons {
			if err := daemon.Stop(); err != nil {
				t.Fatal(err)
			}
			s.startDaemon(i, []string{"WARREN_ENCRYPTION=" + mode})
		}
		peers := map[string]int{"off": 0, "on": 1}[mode]
		for i, node := range s.Nodes {
			if err := node.Ready(t.Context(), s.daemons[i], peers); err != nil {
				t.Fatal(err)
			}
			s.healthy(i)
		}
		capture, err := s.Capture(marker)
		if err != nil {
			t.Fatal(err)
		}
		s.reaches(client, server)
		s.reaches(server, client)
		counts, err := capture.Stop()
		if err != nil {
			t.Fatal(err)
		}
		inClear := counts.Marked > 0 && counts.Pods > 0
		encrypted := counts.Marked == 0 && counts.Pods == 0 && counts.WireGuard > 0
		if mode == "off" && !inClear || mode == "on" && !encrypted {
			t.Errorf("with --encryption %s the wire shows %v: %q", mode, counts, counts.Examples)
		}
	}
}

// On a node with neither kernel WireGuard nor a tunnel process no pod can start, and the problem says what to do.
func TestNoTunnel(t *testing.T) {
	s := newStage(t, "wdnotunnel", 1)
	s.startDaemon(0, nil)
	problem := s.problem(0, "NoTunnel", "node-1")
	if !strings.Contains(problem.Message+problem.Remedy, "userspace-tunnel.yaml") {
		t.Errorf("the problem does not name the file to apply: %+v", problem)
	}
	if s.status(0).Ready {
		t.Error("the node is ready")
	}
	if _, err := os.Stat(s.Nodes[0].Conflist()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("there is a conflist (%v)", err)
	}
	s.startTunnel(0)
	s.ready(0)
	s.healthy(0)
}

// Somebody empties the run directory under the daemon: it answers again, and a pod starts.
func TestRunDirEmptied(t *testing.T) {
	s := running(t, "wdempty", 1)
	s.healthy(0)
	run := filepath.Dir(s.Nodes[0].Leases())
	entries, err := os.ReadDir(run)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if err = os.RemoveAll(filepath.Join(run, entry.Name())); err != nil {
			t.Fatal(err)
		}
	}
	if _, err = s.Nodes[0].Status(t.Context()); err == nil {
		t.Fatal("the socket was not in the run directory")
	}
	s.eventually(func() error {
		_, err := s.Nodes[0].Status(t.Context())
		return err
	})
	client, server := s.pod(0, "client"), s.pod(0, "server")
	s.reaches(client, server)
	s.healthy(0)
}

// cleanup does not take the ground from under a running daemon, and leaves nothing when it is gone.
func TestCleanup(t *testing.T) {
	s := running(t, "wdcleanup", 1)
	node := s.Nodes[0]
	shaped(t, node, "left", 8000)
	wantChained(t, node, 1)
	if _, err := node.Command(t.Context(), "cleanup"); err == nil || !strings.Contains(err.Error(), "stop it first") {
		t.Errorf("cleanup beside a running daemon: %v", err)
	}
	s.healthy(0)
	for _, process := range []*lab.Process{s.daemons[0], s.tunnels[0]} {
		if err := process.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	foreign := "iptables -t mangle -A FORWARD -s 203.0.113.1 -j DROP && ipset create other hash:ip && ip route add 203.0.113.0/24 via 192.0.2.254"
	if _, err := node.Run(t.Context(), "sh", "-c", foreign); err != nil {
		t.Fatal(err)
	}
	neighbour := filepath.Join(node.StateDir(), "of-another-program")
	if err := os.WriteFile(neighbour, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := node.Command(t.Context(), "cleanup"); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(neighbour); err != nil {
		t.Errorf("cleanup removed a file that is not Warren's: %v", err)
	}
	left, err := node.Leftovers(t.Context())
	if err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
	wantChained(t, node, 0)
	state := kernelState(t, node)
	for _, want := range []string{"-A FORWARD -s 203.0.113.1/32 -j DROP", "create other hash:ip", "203.0.113.0/24 via 192.0.2.254"} {
		if !strings.Contains(state, want) {
			t.Errorf("cleanup removed %q, which is not Warren's", want)
		}
	}
	if err = errors.Join(os.MkdirAll(filepath.Dir(node.Leases()), 0o700), os.WriteFile(node.Leases(), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err = node.Command(t.Context(), "cleanup"); err != nil {
		t.Errorf("a second cleanup, with a file in the place of the leases: %v", err)
	}
	if kept, err := filepath.Glob(node.Leases() + "*"); err != nil || len(kept) > 0 {
		t.Errorf("left: %q, %v", kept, err)
	}
}

// A clean-up that cannot see whose ports of the node there are says so, does the rest, and keeps the leases, by which the next one knows
// them.
func TestCleanupThatFails(t *testing.T) {
	s := running(t, "wdcleanfail", 1)
	node := s.Nodes[0]
	pod := s.pod(0, "left")
	for _, process := range []*lab.Process{s.daemons[0], s.tunnels[0]} {
		if err := process.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	tools := t.TempDir()
	if err := os.WriteFile(filepath.Join(tools, "iptables-nft-save"), []byte("#!/bin/sh\necho no luck >&2\nexit 1\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", tools+":"+os.Getenv("PATH"))
	_, err := node.Command(t.Context(), "cleanup")
	for _, want := range []string{"ports of the node that led to pods", "no luck"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("cleanup: got %v, want %q", err, want)
		}
	}
	left, err := node.Leftovers(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	lease := slices.ContainsFunc(left, func(what string) bool { return strings.Contains(what, pod.Addresses[0].String()) })
	link := slices.ContainsFunc(left, func(what string) bool { return strings.HasPrefix(what, "link ") })
	if !lease || link {
		t.Errorf("after it there is the lease of %s: %v, and a link: %v, of %q", pod.Addresses[0], lease, link, left)
	}

	if err = os.RemoveAll(tools); err != nil {
		t.Fatal(err)
	}
	if _, err = node.Command(t.Context(), "cleanup"); err != nil {
		t.Fatal(err)
	}
	if left, err = node.Leftovers(t.Context()); err != nil || len(left) > 0 {
		t.Errorf("after the next one there is %q, %v", left, err)
	}
}

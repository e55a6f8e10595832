package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/lab"
)

// A node goes from the tunnel in user space to the kernel's WireGuard and back, as each start of its daemon says: the tunnel
// gives way and comes back by itself, and nothing is in clear meanwhile. A kernel that has no WireGuard is no way out.
func TestTunnelGivesWay(t *testing.T) {
	kernel := lab.TestedWireGuard() == "kernel"
	s := newStageOf(t, lab.Options{Name: "wdmode", Nodes: 2, WireGuard: "userspace"})
	for i := range s.Nodes {
		s.startTunnel(i)
	}
	s.startDaemons()
	client, server := s.pod(0, "client"), s.pod(1, "server")
	s.reaches(client, server)
	capture, err := s.Capture(marker)
	if err != nil {
		t.Fatal(err)
	}

	s.restartIn(0, "kernel")
	if !kernel {
		s.problem(0, "NoTunnel", "node-1")
		s.blocked(client, server)
	} else {
		s.ready(0)
		s.mode(0, "kernel")
		s.reaches(client, server)
		s.eventually(func() error {
			if said := s.tunnels[0].Log(3); !strings.Contains(said, "nothing to do here") {
				return fmt.Errorf("the tunnel says: %s", said)
			}
			return nil
		})
		if _, err := s.tunnels[0].Child(t.Context()); err == nil {
			t.Error("the tunnel's process runs beside the kernel's WireGuard")
		}
	}
	s.restartIn(0, "userspace")
	s.ready(0)
	s.mode(0, "userspace")
	s.reaches(client, server)
	s.reaches(server, client)
	counts, err := capture.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if counts.Marked > 0 || counts.Pods > 0 || counts.WireGuard == 0 {
		t.Errorf("the wire shows %v: %q", counts, counts.Examples)
	}
	s.withoutEncryption(client, server)
}

// SIGTERM ends a tunnel with its process, and leaves the device as it is; a second tunnel waits for its turn.
func TestTunnelEnds(t *testing.T) {
	s := newStageOf(t, lab.Options{Name: "wdend", Nodes: 1, WireGuard: "userspace"})
	s.startTunnel(0)
	s.startDaemons()
	first, process := s.tunnels[0], s.childOf(s.tunnels[0])
	s.startTunnel(0)
	s.eventually(func() error {
		if said := s.tunnels[0].Log(1); !strings.Contains(said, "waiting until it ends") {
			return fmt.Errorf("the second tunnel says: %s", said)
		}
		return nil
	})
	if err := first.Stop(); err != nil {
		t.Errorf("the tunnel's end: %v", err)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", process)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the tunnel's process outlives it (%v)", err)
	}
	s.healthy(0)

	process = s.childOf(s.tunnels[0])
	if err := s.tunnels[0].Kill(); err != nil {
		t.Fatal(err)
	}
	s.eventually(func() error {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", process)); !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("the tunnel's process outlives a kill of its supervisor (%w)", err)
		}
		return nil
	})
	if links, err := s.Nodes[0].Run(t.Context(), "ip", "link", "show", "warren0"); err != nil {
		t.Errorf("the device is gone: %s, %v", links, err)
	}
}

// restartIn starts a node's daemon again with WireGuard there.
func (s *stage) restartIn(i int, mode string) {
	s.t.Helper()
	if err := s.daemons[i].Stop(); err != nil {
		s.t.Fatal(err)
	}
	var err error
	if s.daemons[i], err = s.Nodes[i].StartDaemon(s.t.Context(), nil, "--wireguard", mode, "--log-level", "debug"); err != nil {
		s.t.Fatal(err)
	}
}

// mode waits until a node says that WireGuard runs there.
func (s *stage) mode(i int, mode string) {
	s.t.Helper()
	s.eventually(func() error {
		status, err := s.Nodes[i].Status(s.t.Context())
		if err == nil && status.Encryption.Mode != mode {
			err = fmt.Errorf("WireGuard runs in mode %s", status.Encryption.Mode)
		}
		return err
	})
}

package main

import (
	"fmt"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

// The process of the tunnel is killed on one node and then on the other, while one pod sends and the other one never does: the
// tunnel is back within 2 s whichever end had it, although nothing but the supervisor and the daemon does anything about it, and
// nothing is in clear meanwhile. The families of the endpoints share the kills.
func TestProofTunnelSurvivesItself(t *testing.T) {
	t.Parallel()
	for _, o := range []lab.Options{{Name: "wptun", Nodes: 2, WireGuard: "userspace"}, {Name: "wptun6", Nodes: 2, WireGuard: "userspace", IPv6Nodes: true}} {
		t.Run(endpointsOf(o), func(t *testing.T) { runningOf(t, o).tunnelSurvivesItself() }) // one after the other: it is about time
	}
}

// tunnelSurvivesItself kills the tunnels' processes in turn.
func (s *stage) tunnelSurvivesItself() {
	s.t.Helper()
	from, to := s.pod(0, "from"), s.pod(1, "to")
	s.reaches(from, to)
	arrived := s.counter(to.Netns())
	gun := s.fire(from, tagged.Fire{Tag: tagFar, Targets: to.Addresses, Port: port, Every: time.Millisecond, Salvo: 1})
	s.arrives(arrived, 100, nil)
	capture, err := s.Capture(marker)
	if err != nil {
		s.t.Fatal(err)
	}

	kills := max(2, soak.Shared(20, 2))
	for kill := range kills {
		s.killChild(s.tunnels[kill%2])
		s.arrives(arrived, 100, nil)
	}
	gap := arrived.Gap(nil)
	if gap > backWithin {
		s.t.Errorf("a kill of the tunnel's process interrupted the way for %v", gap)
	}
	if err := inFamilies(arrived, tagFar); err != nil {
		s.t.Error(err)
	}
	counts, err := capture.Stop()
	if err != nil {
		s.t.Fatal(err)
	}
	if counts.Pods > 0 || counts.WireGuard == 0 {
		s.t.Errorf("the wire shows %v: %q", counts, counts.Examples)
	}
	summary(s.t, "%d kills of the tunnel's process: no gap above %v in %d packets sent, %d in clear", kills, gap, gun.Sent(), counts.Pods)
	s.reachedAt()

	s.withoutSupervisor(arrived)
	s.withoutEncryption(from, to)
	gun.Cease()
}

// killChild kills the process that a process of the lab runs, and waits until there is another.
func (s *stage) killChild(p *lab.Process) {
	s.t.Helper()
	process := s.childOf(p)
	if err := syscall.Kill(process, syscall.SIGKILL); err != nil {
		s.t.Fatal(err)
	}
	s.eventually(func() error {
		if now, err := p.Child(s.t.Context()); err != nil || now == process {
			return fmt.Errorf("process %d of the tunnel is not replaced: %w", process, err)
		}
		return nil
	})
}

// childOf returns the process that a process of the lab runs.
func (s *stage) childOf(p *lab.Process) int {
	s.t.Helper()
	child, err := p.Child(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return child
}

// withoutSupervisor is the control of the gap: where nobody starts the process again, nothing arrives.
func (s *stage) withoutSupervisor(arrived *tagged.Counter) {
	s.t.Helper()
	process := s.childOf(s.tunnels[0])
	for _, signal := range []struct {
		pid  int
		what syscall.Signal
	}{{s.tunnels[0].PID(), syscall.SIGSTOP}, {process, syscall.SIGKILL}} {
		if err := syscall.Kill(signal.pid, signal.what); err != nil {
			s.t.Fatal(err)
		}
	}
	s.pause(backWithin + time.Second)
	if err := syscall.Kill(s.tunnels[0].PID(), syscall.SIGCONT); err != nil {
		s.t.Fatal(err)
	}
	s.arrives(arrived, 100, nil)
	if gap := arrived.Gap(nil); gap <= backWithin {
		s.t.Errorf("with nobody to start the tunnel again the longest gap is %v", gap)
	}
}

// withoutEncryption is the control of a capture: what one pod sends to another is in clear then, in the families that the nodes have.
func (s *stage) withoutEncryption(from, to *lab.Pod) {
	s.t.Helper()
	for i, daemon := range s.daemons {
		if err := daemon.Stop(); err != nil {
			s.t.Fatal(err)
		}
		s.startDaemon(i, []string{"WARREN_ENCRYPTION=off"})
	}
	for i, node := range s.Nodes {
		if err := node.Ready(s.t.Context(), s.daemons[i], 0); err != nil {
			s.t.Fatal(err)
		}
	}
	capture, err := s.Capture(marker)
	if err != nil {
		s.t.Fatal(err)
	}
	direct := *to
	direct.Addresses = slices.DeleteFunc(slices.Clone(to.Addresses), func(address netip.Addr) bool {
		return !slices.ContainsFunc(s.Nodes[1].Addresses, func(node netip.Addr) bool { return node.Is4() == address.Is4() })
	})
	s.reaches(from, &direct)
	counts, err := capture.Stop()
	if err != nil {
		s.t.Fatal(err)
	}
	if counts.Marked == 0 || counts.Pods == 0 {
		s.t.Errorf("without encryption the wire shows %v", counts)
	}
}

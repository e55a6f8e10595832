package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// A node boots and its daemon does not reach the API server: what the node's own programs send to pods does not leave in clear,
// as it does before the daemon has started. On a node that never had guards there are none yet: they might cut it off.
func TestGuardsBeforeTheCluster(t *testing.T) {
	s := newStage(t, "wdearly", 1)
	node := s.Nodes[0]
	remote := []netip.Addr{netip.MustParseAddr("10.244.9.9"), netip.MustParseAddr("fd00:10:244:9::9")}
	seen := func() lab.Counts {
		capture, err := s.Capture(marker)
		if err != nil {
			t.Fatal(err)
		}
		for _, address := range remote {
			ctx, cancel := context.WithTimeout(t.Context(), closedPatience)
			if lab.Probe(ctx, node.Netns(), netip.AddrPortFrom(address, port), marker) == nil {
				t.Errorf("something answers at %v", address)
			}
			cancel()
		}
		counts, err := capture.Stop()
		if err != nil {
			t.Fatal(err)
		}
		return counts
	}
	if counts := seen(); counts.Pods == 0 {
		t.Fatalf("without a daemon the wire shows %v: the test sees nothing", counts)
	}

	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(kubeconfig, []byte(absent), 0o600); err != nil {
		t.Fatal(err)
	}
	startAlone := func() {
		s.startDaemonOn(0, "", kubeconfig)
		s.eventually(func() error {
			status, err := node.Status(t.Context())
			if err == nil && status.Ready {
				err = errors.New("the node is ready without an API server")
			}
			return err
		})
	}
	startAlone()
	if state := kernelState(t, node); strings.Contains(state, "WARREN") {
		t.Errorf("there are guards on a node that never had any: %s", state)
	}
	if err := s.daemons[0].Kill(); err != nil {
		t.Fatal(err)
	}
	s.startTunnel(0)
	s.startDaemons()
	s.endDaemon(0, (*lab.Process).Kill)
	s.endTunnel(0, (*lab.Process).Kill)
	s.boot(0)
	if counts := seen(); counts.Pods == 0 {
		t.Fatalf("after the boot the wire shows %v: the test sees nothing", counts)
	}
	startAlone()
	if counts := seen(); counts.Pods > 0 {
		t.Errorf("while the cluster is not known the wire shows %v: %q", counts, counts.Examples)
	}
	state := kernelState(t, node)
	if err := s.daemons[0].Kill(); err != nil {
		t.Fatal(err)
	}
	s.startDaemonOn(0, "", kubeconfig)
	s.eventually(func() error { _, err := node.Status(t.Context()); return err })
	if now := kernelState(t, node); now != state {
		t.Errorf("a second start changed what stood: %s\nbefore: %s", now, state)
	}
	if err := s.daemons[0].Kill(); err != nil {
		t.Fatal(err)
	}
	s.startTunnel(0)
	s.startDaemons()
	s.healthy(0)

	// Nor while the daemon cannot start at all.
	s.endDaemon(0, (*lab.Process).Kill)
	s.endTunnel(0, (*lab.Process).Kill)
	s.boot(0)
	private := filepath.Join(node.StateDir(), wgdevice.KeyFile)
	kept, err := os.ReadFile(private)
	if err == nil {
		err = os.Truncate(private, 5)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.startDaemonOn(0, "", kubeconfig)
	s.eventually(func() error {
		if log := s.daemons[0].Log(5); !strings.Contains(log, private) {
			return fmt.Errorf("the daemon does not tell of its broken key: %s", log)
		}
		return nil
	})
	if counts := seen(); counts.Pods > 0 {
		t.Errorf("after a boot with a broken key the wire shows %v: %q", counts, counts.Examples)
	}
	if err = os.WriteFile(private, kept, 0o600); err != nil {
		t.Fatal(err)
	}
	s.startTunnel(0)
	s.startDaemons()
	s.healthy(0)
}

// boot takes away what a node loses when it boots: what is in the kernel, and the runtime state.
func (s *stage) boot(i int) {
	s.t.Helper()
	script := `for tool in iptables ip6tables; do for table in raw mangle nat filter; do $tool -t $table -F; $tool -t $table -X; done; done
ipset destroy
ip route flush proto 87; ip -6 route flush proto 87; ip link del warren0
rm -r ` + filepath.Dir(s.Nodes[i].Leases())
	if _, err := s.Nodes[i].Run(s.t.Context(), "sh", "-ec", script); err != nil {
		s.t.Fatal(err)
	}
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/tagged"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// verify verifies on a node for two seconds, and returns what it printed and the exit status.
func (s *stage) verify(i int, output string) (string, int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	out, err := s.Nodes[i].Command(ctx, "verify", "--duration", "2s", "-o", output)
	if failed, ok := errors.AsType[*exec.ExitError](err); ok && ctx.Err() == nil {
		return out, failed.ExitCode()
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return out, 0
}

// verified is what verify prints for programs on the first node.
func (s *stage) verified() (verification, int) {
	s.t.Helper()
	out, status := s.verify(0, "json")
	var v verification
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		s.t.Fatalf("%v:\n%s", err, out)
	}
	return v, status
}

// A healthy mesh is proven, over both families and from both ends at once; without its other end it is not.
func TestVerifyProvesAMesh(t *testing.T) {
	t.Parallel()
	s := running(t, "wdverify", 2)
	s.reaches(s.pod(0, "client"), s.pod(1, "server"))
	for i := range s.Nodes {
		s.healthy(i)
	}
	var both sync.WaitGroup
	both.Go(func() {
		if out, status := s.verify(1, "table"); status != 0 || !strings.Contains(out, "\nPROVEN: ") {
			t.Errorf("status %d:\n%s", status, out)
		}
	})
	v, status := s.verified()
	both.Wait()
	if status != 0 || v.Conclusion != proven || v.InClear.Total() > 0 || v.WireGuard.Sent == 0 || v.WireGuard.Received == 0 {
		t.Errorf("status %d: %+v", status, v)
	}
	if len(v.Peers) != 1 || v.Peers[0].Node != "node-2" || v.Peers[0].WireGuard.Total() == 0 || v.Peers[0].LastHandshake.IsZero() {
		t.Fatalf("peers: %+v", v.Peers)
	}
	var answered []netip.Addr
	for _, p := range v.Peers[0].Probes {
		if p.Sent > 5 && 2*p.Lost < p.Sent && p.MinMS > 0 && p.MinMS <= p.MedianMS && p.MedianMS <= p.MaxMS {
			answered = append(answered, p.Address)
		}
	}
	if !slices.Equal(answered, parsed("10.244.2.1", "fd00:10:244:2::1")) {
		t.Errorf("probes: %+v", v.Peers[0].Probes)
	}

	s.endDaemon(1, (*lab.Process).Kill) // which would mend it
	if _, err := s.Nodes[1].Run(t.Context(), "ip", "link", "del", "warren0"); err != nil {
		t.Fatal(err)
	}
	v, status = s.verified()
	if status != 2 || v.Conclusion != notProven || v.InClear.Total() > 0 || !doubted(v, "node node-2 answered none of") {
		t.Errorf("without the other end: status %d: %+v", status, v)
	}
	if lab.TestedWireGuard() == string(wgdevice.ModeKernel) {
		return // there is no process that could end
	}
	if err := s.tunnels[0].Stop(); err != nil {
		t.Fatal(err)
	}
	v, status = s.verified()
	if status != 2 || v.WireGuard.Total() > 0 || !doubted(v, "no WireGuard packet was seen") || !doubted(v, "the tunnel does not answer") {
		t.Errorf("without a tunnel: status %d: %+v", status, v)
	}
}

// doubted tells whether a verification has a doubt.
func doubted(v verification, text string) bool {
	return slices.ContainsFunc(v.Doubts, func(d string) bool { return strings.Contains(d, text) })
}

// Where somebody has taken away the guard and the routes, what leaves in clear is found and named: the probes, and a pod's packets.
func TestVerifyFindsClearPackets(t *testing.T) {
	t.Parallel()
	s := running(t, "wdclear", 2)
	client, server := s.pod(0, "client"), s.pod(1, "server")
	s.reaches(client, server)
	s.healthy(0)
	const damage = `for tool in iptables ip6tables; do $tool -t mangle -F WARREN-GUARD; done
for family in -4 -6; do ip $family route flush proto 87; done`
	s.eventually(func() error { // an audit may mend it before anything has left
		if _, err := s.Nodes[0].Run(t.Context(), "sh", "-ec", damage); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var talk sync.WaitGroup
		talk.Go(func() {
			for ctx.Err() == nil {
				once, end := context.WithTimeout(ctx, time.Second)
				_ = lab.Probe(once, client.Netns(), netip.AddrPortFrom(server.Addresses[0], port), marker) // it need not arrive
				end()
			}
		})
		out, status := s.verify(0, "table")
		cancel()
		talk.Wait()
		for _, want := range []string{
			"\nVIOLATED:\n", "link eth0 carried packets of pods in clear", "10.244.1.1 -> 10.244.2.1, protocol 1, with the marker",
			"fd00:10:244:1::1 -> fd00:10:244:2::1, protocol 58, with the marker",
			fmt.Sprintf("%s -> %s, protocol 6", client.Addresses[0], server.Addresses[0]),
			"a guard does not stand as planned: chain WARREN-GUARD in mangle table (ipv4)",
			"the kernel is not as planned: the route to 10.244.2.0/24 is missing", "the kernel is not as planned: the unreachable route to fd00:10:244::/48 is missing",
		} {
			if status != 1 || !strings.Contains(out, want) {
				return fmt.Errorf("status %d, no %q:\n%s", status, want, out)
			}
		}
		return nil
	})
	s.eventually(func() error {
		if v, status := s.verified(); status != 0 {
			return fmt.Errorf("not repaired: %d %+v", status, v)
		}
		return nil
	})
}

// Routes that lead pods' packets past the tunnel are found although the guard stands, which drops them: those of Warren that somebody
// redirects, until the audit, and those of others that go before them.
func TestVerifyFindsRedirectedRoutes(t *testing.T) {
	t.Parallel()
	s := running(t, "wdvroute", 2)
	s.reaches(s.pod(0, "client"), s.pod(1, "server"))
	s.healthy(0)
	if v, status := s.verified(); status != 0 {
		t.Fatalf("at first: status %d: %+v", status, v)
	}
	s.eventually(func() error { // an audit may mend it before it is looked at
		if _, err := s.Nodes[0].Run(t.Context(), "ip", "route", "replace", "10.244.2.0/24", "dev", "eth0", "proto", "87"); err != nil {
			t.Fatal(err)
		}
		v, status := s.verified()
		if told := strings.Join(v.Violations, "\n"); status != 1 || !strings.Contains(told, "the route to 10.244.2.0/24 leads elsewhere") {
			return fmt.Errorf("status %d: %+v", status, v)
		}
		return nil
	})
	foreign := []string{"fd00:10:244:2::/64", "dev", "eth0", "metric", "1"}
	if _, err := s.Nodes[0].Run(t.Context(), append([]string{"ip", "-6", "route", "add"}, foreign...)...); err != nil {
		t.Fatal(err)
	}
	v, status := s.verified()
	if told := strings.Join(v.Violations, "\n"); status != 1 || !strings.Contains(told, "packets to fd00:10:244:2::/64 do not go to warren0") {
		t.Errorf("another's route: status %d: %+v", status, v)
	}
	if _, err := s.Nodes[0].Run(t.Context(), append([]string{"ip", "-6", "route", "del"}, foreign...)...); err != nil {
		t.Fatal(err)
	}
	s.eventually(func() error {
		if v, status := s.verified(); status != 0 {
			return fmt.Errorf("not repaired: %d %+v", status, v)
		}
		return nil
	})
}

// Without a cluster CIDR the podCIDRs that are known are watched for, and said to be all. What a stranger on the wire forges in a
// pod's name is found, too, although the guard drops it.
func TestVerifyWatchesKnownPodCIDRs(t *testing.T) {
	t.Parallel()
	s := newStageOf(t, lab.Options{Name: "wdvknown", Nodes: 2, KnownNodesOnly: true})
	for i := range s.Nodes {
		s.startTunnel(i)
	}
	s.startDaemons()
	if guard := s.status(0).Encryption.Guard; guard != "known nodes only" {
		t.Errorf("the guard covers: %s", guard)
	}
	pod := s.pod(0, "pod")
	v, status := s.verified()
	if status != 0 || !slices.ContainsFunc(v.Notes, func(n string) bool { return strings.HasPrefix(n, "the cluster CIDR is not known") }) {
		t.Errorf("status %d: %+v", status, v)
	}

	stranger, err := tagged.NewSenderBy(s.Wire(), lab.WireLink, s.Nodes[0].MAC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = stranger.Close() })
	ctx, cancel := context.WithCancel(t.Context())
	var forging sync.WaitGroup
	forging.Go(func() {
		for again := time.NewTicker(50 * time.Millisecond); ctx.Err() == nil; <-again.C {
			for i, source := range parsed("10.244.2.77", "fd00:10:244:2::77") {
				if err := stranger.Send(tagged.Shot{Tag: tagForbidden, Protocol: tagged.UDP, Src: source, Dst: pod.Addresses[i], Port: port}); err != nil {
					t.Error(err)
				}
			}
		}
	})
	v, status = s.verified()
	cancel()
	forging.Wait()
	if status != 1 || v.InClear.Received < 10 || v.InClear.Sent > 0 {
		t.Errorf("status %d, in clear %+v", status, v.InClear)
	}
	for i, source := range []string{"10.244.2.77", "fd00:10:244:2::77"} {
		want := fmt.Sprintf("received: %s -> %s, protocol 17", source, pod.Addresses[i])
		if !strings.Contains(strings.Join(v.Violations, "\n"), want) {
			t.Errorf("no %q in %q", want, v.Violations)
		}
	}
}

// A node that does not encrypt says so: to who verifies, in its status and by a metric.
func TestVerifyTellsThatEncryptionIsOff(t *testing.T) {
	t.Parallel()
	s := newStage(t, "wdvoff", 1)
	daemon, err := s.Nodes[0].StartDaemon(t.Context(), nil, "--encryption", "off", "--metrics-address", "127.0.0.1:9476")
	if err != nil {
		t.Fatal(err)
	}
	s.daemons[0] = daemon
	s.ready(0)
	if out, status := s.verify(0, "table"); status != 1 || !strings.Contains(out, "VIOLATED:\n  encryption is off") {
		t.Errorf("status %d:\n%s", status, out)
	}
	if now := s.status(0).Encryption; now.Mode != "off" || now.Guard != "none" || s.metric("warren_encryption_enabled") != 0 {
		t.Errorf("the status says %+v, the metric is %v", now, s.metric("warren_encryption_enabled"))
	}
}

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/capture"
	"github.com/warren-cni/warren/pkg/echo"
	"github.com/warren-cni/warren/pkg/golden"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// verifiedAt is when the verifications of the tests are made.
var verifiedAt = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// wellProven is the evidence of a healthy mesh of two other nodes.
func wellProven() evidence {
	peer := func(node, endpoint string) agentapi.Peer {
		return agentapi.Peer{Node: node, Endpoint: endpoint, LastHandshake: verifiedAt.Add(-70 * time.Second)}
	}
	facts := meshFacts{
		Status: agentapi.Status{
			Node: "worker-1", Encryption: agentapi.Encryption{Mode: "kernel", Port: 51820, PublicKey: "a2V5", MTU: 1440, Guard: "cluster-cidr"},
			Peers: []agentapi.Peer{peer("worker-2", "192.0.2.2:51820"), peer("worker-3", "[2001:db8::3]:51820")},
		},
		Peers: []peerFacts{
			{Node: "worker-2", Addresses: parsed("10.244.2.1", "fd00:10:244:2::1"), Endpoint: "192.0.2.2:51820"},
			{Node: "worker-3", Addresses: parsed("10.244.3.1"), Endpoint: "[2001:db8::3]:51820"},
		},
	}
	answers := []time.Duration{3 * time.Millisecond, 400 * time.Microsecond, 1250 * time.Microsecond}
	return evidence{
		before: facts, after: facts, duration: 10 * time.Second,
		report: capture.Report{
			Links: []capture.Link{{Name: "docker0"}, {Name: "eth0", WireGuard: capture.Traffic{Sent: 12, Received: 11}}},
			Remotes: map[netip.AddrPort]capture.Traffic{
				netip.MustParseAddrPort("192.0.2.2:51820"): {Sent: 8, Received: 7}, netip.MustParseAddrPort("[2001:db8::3]:51820"): {Sent: 4, Received: 4},
			},
		},
		probes: []*probed{
			{node: "worker-2", address: netip.MustParseAddr("10.244.2.1"), sent: 4, times: answers},
			{node: "worker-2", address: netip.MustParseAddr("fd00:10:244:2::1"), sent: 3, times: answers},
			{node: "worker-3", address: netip.MustParseAddr("10.244.3.1"), sent: 3, times: answers},
		},
	}
}

// leak is what a link carried in clear.
func leak() capture.Link {
	return capture.Link{
		Name: "eth0", Clear: capture.Traffic{Sent: 2, Received: 1}, Marked: capture.Traffic{Sent: 1},
		Examples: []capture.Example{
			{Sent: true, Source: netip.MustParseAddr("10.244.1.1"), Destination: netip.MustParseAddr("10.244.2.1"), Protocol: 1, Marked: true},
			{Source: netip.MustParseAddr("10.244.2.9"), Destination: netip.MustParseAddr("10.244.1.9"), Protocol: 6},
		},
	}
}

// Each thing that contradicts encryption or keeps it from being proven is told, and decides.
func TestConclude(t *testing.T) {
	for name, test := range map[string]struct {
		change func(e *evidence)
		want   conclusion
		says   string
	}{
		"a healthy mesh": {func(*evidence) {}, proven, ""},
		"a loss":         {func(e *evidence) { e.probes[0].sent += 20 }, proven, ""},
		"in clear": {
			func(e *evidence) { e.report.Links[1] = leak() }, violated,
			"link eth0 carried packets of pods in clear: 2 sent, 1 received, 1 of them with the marker of these probes; " +
				"sent: 10.244.1.1 -> 10.244.2.1, protocol 1, with the marker; received: 10.244.2.9 -> 10.244.1.9, protocol 6",
		},
		"a guard before":          {func(e *evidence) { e.before.GuardDrift = []string{"chain X is missing"} }, violated, "a guard does not stand as planned: chain X is missing"},
		"a guard after":           {func(e *evidence) { e.after.GuardDrift = []string{"chain X is missing"} }, violated, "a guard does not stand as planned: chain X is missing"},
		"drift":                   {func(e *evidence) { e.before.Drift, e.after.Drift = []string{"set X"}, []string{"set X"} }, violated, "the kernel is not as planned: set X"},
		"nothing of WireGuard":    {func(e *evidence) { e.report.Links, e.report.Remotes = nil, nil }, notProven, "no WireGuard packet was seen"},
		"a peer without a packet": {func(e *evidence) { e.report.Remotes = nil }, notProven, "node worker-2 answered, but no WireGuard packet to or from its endpoint 192.0.2.2:51820"},
		"a peer that is silent":   {func(e *evidence) { e.probes[1].times = nil }, notProven, "node worker-2 answered none of 3 probes to fd00:10:244:2::1"},
		"a peer out of reach": {
			func(e *evidence) { e.probes[2].times, e.probes[2].err = nil, errors.New("no route to host") }, notProven,
			"node worker-3 answered none of 3 probes to 10.244.3.1: no route to host",
		},
		"a peer that was not probed":    {func(e *evidence) { e.probes[2].sent, e.probes[2].times = 0, nil }, notProven, "no probe was sent to node worker-3 at 10.244.3.1"},
		"a peer without an address":     {func(e *evidence) { e.before.Peers[1].Addresses, e.probes = nil, e.probes[:2] }, notProven, "no probe could be sent to node worker-3"},
		"peers without addresses":       {func(e *evidence) { e.probes = nil }, notProven, "compare spec.podCIDRs of both Nodes"},
		"packets dropped":               {func(e *evidence) { e.report.Dropped = 7 }, notProven, "the kernel dropped 7 packets"},
		"packets not judged":            {func(e *evidence) { e.report.Unjudged = 7 }, notProven, "7 packets could not be judged"},
		"a tunnel that does not answer": {func(e *evidence) { e.after.Status.Encryption.Mode = "unknown" }, notProven, "the tunnel does not answer"},
		"both":                          {func(e *evidence) { e.report.Dropped, e.report.Links[1] = 7, leak() }, violated, "in clear"},
		"no other node":                 {func(e *evidence) { e.before.Peers, e.report, e.probes = nil, capture.Report{}, nil }, proven, ""},
		"no peer but a node": {
			func(e *evidence) {
				e.before.Peers, e.report, e.probes, e.after.NoPeers = nil, capture.Report{}, nil, []string{"worker-2"}
			},
			notProven, "no tunnel leads to 1 node(s), see `warrend status`: worker-2",
		},
		"a peer that moved": {func(e *evidence) {
			e.after.Status.Peers = slices.Clone(e.after.Status.Peers)
			e.after.Status.Peers[0].Endpoint = "198.51.100.2:40000"
			e.report.Remotes = map[netip.AddrPort]capture.Traffic{netip.MustParseAddrPort("198.51.100.2:40000"): {Sent: 1}, netip.MustParseAddrPort("[2001:db8::3]:51820"): {Sent: 1}}
		}, proven, ""},
	} {
		e := wellProven()
		test.change(&e)
		v := conclude(e)
		reasons := strings.Join(slices.Concat(v.Violations, v.Doubts), "\n")
		if v.Conclusion != test.want || (test.says == "") != (reasons == "") || !strings.Contains(reasons, test.says) {
			t.Errorf("%s: %v because of %q", name, v.Conclusion, reasons)
		}
	}
}

// What limits a proof that holds is noted beside it.
func TestConcludeNotes(t *testing.T) {
	e := wellProven()
	e.after.Status.Encryption.Guard = "known nodes only"
	e.after.Status.Problems = make([]agentapi.Problem, 2)
	v := conclude(e)
	notes := strings.Join(v.Notes, "\n")
	if v.Conclusion != proven || !strings.Contains(notes, "addresses count as pods' only in podCIDRs that are known") || !strings.Contains(notes, "2 problem(s)") {
		t.Errorf("%v, notes %q", v.Conclusion, notes)
	}
}

// The forms for people and for programs, of a proof and of its contrary.
func TestPrintVerification(t *testing.T) {
	bad := wellProven()
	bad.report.Links[1], bad.probes[2].times, bad.after.GuardDrift = leak(), nil, []string{"chain WARREN-GUARD in mangle (ipv4) is missing"}
	for name, e := range map[string]evidence{"proven": wellProven(), "violated": bad} {
		for _, output := range []string{"table", "json"} {
			var out bytes.Buffer
			if err := printVerification(&out, conclude(e), output, verifiedAt); err != nil {
				t.Fatal(err)
			}
			golden.Compare(t, "testdata/verify/"+name+"."+output, out.String())
		}
	}
}

// The exit status is the conclusion's; an error of the command proves nothing.
func TestVerifyExitStatus(t *testing.T) {
	for _, args := range [][]string{{"--duration", "1ms"}, {"-o", "yaml"}, {"--run-dir", t.TempDir()}} {
		root := rootCommand()
		var stderr bytes.Buffer
		root.SetErr(&stderr)
		root.SetArgs(append([]string{verifyName}, args...))
		if status := execute(t.Context(), root); status != 2 || !strings.HasPrefix(stderr.String(), "error: ") {
			t.Errorf("%v: status %d: %s", args, status, &stderr)
		}
	}
	if proven.status() != nil || !errors.Is(violated.status(), errViolated) || !errors.Is(notProven.status(), errNotProven) {
		t.Error("a conclusion has another status")
	}
}

// The peers of the device are compared with those of the plan, also while one changes its key.
func TestPeerDrift(t *testing.T) {
	prefix, host := netip.MustParsePrefix("10.244.2.0/24"), netip.MustParsePrefix("192.0.2.2/32")
	plan := []mesh.Peer{{Node: "worker-2", PublicKey: [32]byte{2}, AllowedIPs: []netip.Prefix{prefix}, NodeAddresses: []netip.Addr{host.Addr()}}}
	changing := slices.Clone(plan)
	changing[0].Next = [32]byte{3}
	with := func(key byte, allowed ...netip.Prefix) wgdevice.PeerStatus {
		return wgdevice.PeerStatus{PublicKey: [32]byte{key}, AllowedIPs: allowed}
	}
	foreign := netip.MustParsePrefix("10.244.9.0/24")
	for name, test := range map[string]struct {
		plan   []mesh.Peer
		device []wgdevice.PeerStatus
		want   []string
	}{
		"as planned":           {plan, []wgdevice.PeerStatus{with(2, prefix)}, nil},
		"with its own address": {plan, []wgdevice.PeerStatus{with(2, prefix, host)}, nil},
		"before the new key":   {changing, []wgdevice.PeerStatus{with(2, prefix), with(3)}, nil},
		"after the new key":    {changing, []wgdevice.PeerStatus{with(3, prefix)}, nil},
		"missing":              {plan, nil, []string{"the tunnel lacks node worker-2 as a peer"}},
		"with another prefix":  {plan, []wgdevice.PeerStatus{with(2, foreign)}, []string{"the tunnel's peer worker-2 lacks 10.244.2.0/24 and has 10.244.9.0/24 besides"}},
		"with a preshared key": {
			plan,
			[]wgdevice.PeerStatus{{PublicKey: [32]byte{2}, AllowedIPs: []netip.Prefix{prefix}, Preshared: true}},
			[]string{"the tunnel's peer worker-2 has a preshared key, which its node has not"},
		},
		"a stranger": {
			plan,
			[]wgdevice.PeerStatus{with(2, prefix), with(4, foreign)},
			[]string{"the tunnel has a peer that is no node's: BAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA= with 10.244.9.0/24"},
		},
	} {
		if diff := cmp.Diff(test.want, peerDrift(test.plan, test.device)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// An answer counts once, from the address that was asked, with the marker.
func TestProbesCountTheirAnswers(t *testing.T) {
	now := verifiedAt
	p, err := newProber(nil, []peerFacts{{Node: "worker-2", Addresses: parsed("10.244.2.1", "fd00:10:244:2::1")}}, func() time.Time { return now })
	if err != nil {
		t.Fatal(err)
	}
	for i, target := range p.targets {
		target.sent, target.waiting[0] = 1, now
		now = now.Add(time.Millisecond)
		p.take(echo.Reply{From: target.address, Payload: p.payload(i, 7)})                   // to one that was not sent
		p.take(echo.Reply{From: netip.MustParseAddr("192.0.2.9"), Payload: p.payload(i, 0)}) // from elsewhere
		p.take(echo.Reply{From: target.address, Payload: make([]byte, probeSize)})           // another program's
		p.take(echo.Reply{From: target.address, Payload: p.marker})                          // cut off
		if len(target.times) > 0 {
			t.Errorf("%v: counted what is no answer", target.address)
		}
		p.take(echo.Reply{From: target.address, Payload: p.payload(i, 0)})
		p.take(echo.Reply{From: target.address, Payload: p.payload(i, 0)})
		if got := target.proof(); got != (probeProof{Address: target.address, Sent: 1, MinMS: 1, MedianMS: 1, MaxMS: 1}) {
			t.Errorf("proof %+v", got)
		}
	}
	if sent, answered := p.counts(); sent != 2 || answered != 2 {
		t.Errorf("%d sent, %d answered", sent, answered)
	}
}

// Facts survive the way between daemon and command.
func TestFactsRoundTrip(t *testing.T) {
	want := wellProven().before
	want.Own, want.Pods, want.GuardDrift = parsed("10.244.1.1"), []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}, []string{"x"}
	text, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	var got meshFacts
	if err = json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b }), cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

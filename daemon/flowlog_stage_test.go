package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/nflog"
)

// friendsOf is a policy that lets pods with the label app=friend in to those of one app, and says what to log.
func friendsOf(app, log string) networkingv1.NetworkPolicy {
	return networkingv1.NetworkPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "friends-of-" + app, Annotations: map[string]string{"warren.cni/log": log}},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": app}},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
			Ingress: []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{
				PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "friend"}},
			}}}},
		},
	}
}

// flows are the lines of JSON that a node's daemon has written.
func (s *stage) flows(i int) []flow {
	s.t.Helper()
	var all []flow
	for line := range strings.Lines(s.daemons[i].Log(1 << 20)) {
		if !strings.HasPrefix(line, "{") {
			continue
		}
		var one flow
		if err := json.Unmarshal([]byte(line), &one); err != nil {
			s.t.Fatalf("line %q: %v", line, err)
		}
		if one.Verdict != "" {
			all = append(all, one)
		}
	}
	return all
}

// told waits until the lines hold one with a verdict for each address of the destination, and returns those lines.
func (s *stage) told(i int, verdict string, from, to *lab.Pod) []flow {
	s.t.Helper()
	var found []flow
	s.eventually(func() error {
		found = slices.DeleteFunc(s.flows(i), func(f flow) bool {
			return f.Verdict != verdict || f.Source.Pod != "shop/"+from.Name || f.Destination.Pod != "shop/"+to.Name
		})
		for _, a := range to.Addresses {
			if !slices.ContainsFunc(found, func(f flow) bool { return f.Destination.Address == a }) {
				return fmt.Errorf("no line says that %s is %s to reach %s at %v", from.Name, verdict, to.Name, a)
			}
		}
		return nil
	})
	return found
}

// What a policy asks for is logged with its pods, and nothing else; of what is allowed each connection once.
func TestFlowsAreLoggedAsAsked(t *testing.T) {
	s := running(t, "wdflow", 2)
	s.write("policies", friendsOf("quiet", "none"), friendsOf("asked", "denied"))
	friend, stranger := s.pod(0, "friend"), s.pod(0, "stranger")
	quiet, asked := s.pod(1, "quiet"), s.pod(1, "asked")
	for _, to := range []*lab.Pod{quiet, asked} {
		s.blocked(stranger, to)
		s.reaches(friend, to)
	}
	denied := s.told(1, flowDenied, stranger, asked)
	for _, f := range denied {
		want := flow{
			Time: f.Time, Verdict: flowDenied, Direction: "ingress", Protocol: "TCP", Node: "node-2", Chain: f.Chain,
			Source:      flowEnd{Address: f.Source.Address, Port: f.Source.Port, Pod: "shop/stranger", Node: "node-1"},
			Destination: flowEnd{Address: f.Destination.Address, Port: port, Pod: "shop/asked", Node: "node-2"},
			Policies:    []string{"shop/friends-of-asked"},
		}
		if fmt.Sprint(f) != fmt.Sprint(want) || time.Since(f.Time) > time.Minute || !slices.Contains(stranger.Addresses, f.Source.Address) {
			t.Errorf("the line is %+v, want %+v", f, want)
		}
	}
	if all := s.flows(1); len(all) != len(denied) {
		t.Errorf("not only what was denied is logged: %+v", all)
	}
	s.eventually(func() error {
		log := s.daemons[1].Log(1 << 20)
		want := `reason=PolicyDenied message="ingress from shop/stranger (8080/TCP) denied by shop/friends-of-asked" kind=Pod namespace=shop name=asked`
		if strings.Count(log, want) != 1 || strings.Count(log, "reason=PolicyDenied") != 1 {
			return fmt.Errorf("there is not one Event %s", want)
		}
		return nil
	})

	s.write("policies", friendsOf("quiet", "none"), friendsOf("asked", "all"))
	s.eventually(func() error {
		s.reaches(friend, asked)
		if !slices.ContainsFunc(s.flows(1), func(f flow) bool { return f.Verdict == flowAllowed }) {
			return fmt.Errorf("nothing that is allowed is logged")
		}
		return nil
	})
	s.reaches(friend, asked)
	seen := map[flowEnd]int{}
	for _, f := range s.told(1, flowAllowed, friend, asked) {
		if seen[f.Source]++; seen[f.Source] > 1 || f.Direction != "ingress" || f.Destination.Port != port {
			t.Errorf("line %+v comes %d times", f, seen[f.Source])
		}
	}
	if lines := s.flows(0); len(lines) > 0 {
		t.Errorf("node-1 enforces nothing, and logs %+v", lines)
	}
}

// A flood of denied packets costs few lines, one Event and little time of the daemon, and all of it is in the metrics.
func TestFloodOfDeniedPackets(t *testing.T) {
	const flood = 10_000
	s := newStage(t, "wdflood", 1)
	s.startTunnel(0)
	var err error
	s.daemons[0], err = s.Nodes[0].StartDaemon(t.Context(), nil, "--metrics-address", "127.0.0.1:9476")
	if err != nil {
		t.Fatal(err)
	}
	s.ready(0)
	s.write("policy", friendsOf("asked", "denied"))
	stranger, asked := s.pod(0, "stranger"), s.pod(0, "asked")
	s.blocked(stranger, asked)
	lines := len(s.told(0, flowDenied, stranger, asked))
	denied := `warren_denied_packets_total{direction="ingress",policy="shop/friends-of-asked"}`
	before := s.metric(denied)

	began, spent := time.Now(), cpuTime(t, s.daemons[0].PID())
	for _, address := range asked.Addresses {
		datagrams(t, stranger.Netns(), netip.AddrPortFrom(address, port), flood/2)
	}
	s.eventually(func() error {
		if got := s.metric(denied) - before; got < flood {
			return fmt.Errorf("%v packets are counted, %d were sent", got, flood)
		}
		return nil
	})
	spent, took := cpuTime(t, s.daemons[0].PID())-spent, time.Since(began)
	more := len(s.flows(0)) - lines
	// Each rule's own limit is 50 at once and 10 a second; there is one for each family.
	if most := 2 * (50 + 10*int(took.Seconds()+1)); more == 0 || more > most {
		t.Errorf("%d lines in %v, want at most %d", more, took, most)
	}
	if spent > took/2 {
		t.Errorf("the daemon was busy for %v of %v", spent, took)
	}
	if events := strings.Count(s.daemons[0].Log(1<<20), "reason=PolicyDenied"); events != 1 {
		t.Errorf("%d events", events)
	}
	if got := s.metric("warren_flow_log_lines_total"); got != float64(lines+more) {
		t.Errorf("the metric counts %v lines, and %d were written", got, lines+more)
	}
	if s.metric(`warren_dropped_packets_total{reason="a connection begins with SYN"}`) < 0 {
		t.Error("what all isolated pods have in common has no counter")
	}
	t.Logf("%d packets: %d lines, %v of the daemon's time in %v", flood, more, spent, took)
}

// metric reads a figure of the first node's daemon; it is -1 where there is none.
func (s *stage) metric(name string) float64 {
	s.t.Helper()
	var text []byte
	err := s.Nodes[0].Do(func() error {
		connection, err := new(net.Dialer).DialContext(s.t.Context(), "tcp", "127.0.0.1:9476")
		if err != nil {
			return err
		}
		defer func() { _ = connection.Close() }()
		if _, err = io.WriteString(connection, "GET /metrics HTTP/1.0\r\n\r\n"); err != nil {
			return err
		}
		text, err = io.ReadAll(connection)
		return err
	})
	if err != nil || !strings.Contains(string(text), http.StatusText(http.StatusOK)) {
		s.t.Fatalf("reading metrics: %v: %s", err, text)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), name+" "); ok {
			number, err := strconv.ParseFloat(value, 64)
			if err != nil {
				s.t.Fatal(err)
			}
			return number
		}
	}
	return -1
}

// datagrams sends datagrams from a pod or a node.
func datagrams(t *testing.T, from ns.NetNS, to netip.AddrPort, count int) {
	t.Helper()
	err := from.Do(func(ns.NetNS) error {
		socket, err := new(net.Dialer).DialContext(t.Context(), "udp", to.String())
		if err != nil {
			return err
		}
		defer func() { _ = socket.Close() }()
		for range count {
			if _, err = socket.Write(marker[:]); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// cpuTime is how long a process has run, in user and kernel.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	var ticks int
	for _, i := range []int{11, 12} { // utime and stime
		n, err := strconv.Atoi(fields[i])
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// Another reader of the kernel's log is a problem and stops nothing else; the log is read once that one ends.
func TestPacketLogIsTaken(t *testing.T) {
	s := newStage(t, "wdtaken", 1)
	s.startTunnel(0)
	var other *nflog.Reader
	err := s.Nodes[0].Do(func() (err error) {
		other, err = nflog.Open(netfilter.LogGroup)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	s.startDaemon(0, nil)
	s.ready(0)
	s.write("policy", friendsOf("asked", "denied"))
	stranger, asked := s.pod(0, "stranger"), s.pod(0, "asked")
	s.problem(0, "PacketLogUnreadable", "node-1")
	s.blocked(stranger, asked)
	if lines := s.flows(0); len(lines) > 0 {
		t.Errorf("with another reader there are lines: %+v", lines)
	}
	other.Close()
	s.eventually(func() error {
		s.blocked(stranger, asked)
		if len(s.flows(0)) == 0 {
			return fmt.Errorf("nothing is logged")
		}
		return nil
	})
	s.healthy(0)
}

// A policy that is not understood has an Event, by the node that has a pod that it selects; another node knows of it, too.
func TestInvalidPolicyHasEvent(t *testing.T) {
	s := running(t, "wdevent", 2)
	s.pod(1, "asked")
	s.write("policy", friendsOf("asked", "everything"))
	for i := range s.Nodes {
		s.problem(i, "PolicyInvalid", "shop/friends-of-asked")
	}
	events := func(i int) int {
		return strings.Count(s.daemons[i].Log(1<<20), "reason=PolicyInvalid")
	}
	s.eventually(func() error {
		if events(1) != 1 {
			return fmt.Errorf("node-2 has written %d events", events(1))
		}
		return nil
	})
	if n := events(0); n > 0 {
		t.Errorf("node-1 has written %d events", n)
	}
}

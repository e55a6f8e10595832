package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/nflog"
)

// two is a flowPlanner that knows shop/web at 10.0.0.1, shop/api at 10.0.0.2 and the chains of a group each way.
type two struct{}

func (two) pod(a netip.Addr) (*cluster.Pod, bool) {
	switch a.String() {
	case "10.0.0.1":
		return &cluster.Pod{Namespace: "shop", Name: "web", UID: "w", Node: "n1"}, true
	case "10.0.0.2":
		return &cluster.Pod{Namespace: "shop", Name: "api", UID: "a", Node: "n2"}, true
	}
	return nil, false
}

func (two) group(chain string) (string, []string, bool) {
	switch chain {
	case "IN":
		return "ingress", []string{"shop/api", "shop/deny-all"}, true
	case "OUT":
		return "egress", []string{"shop/web"}, true
	}
	return "", nil, false
}

// script is what a flowLog has written.
type script struct {
	mu     sync.Mutex
	text   bytes.Buffer
	events []kube.Event
}

func (s *script) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(b)
}

func (s *script) event(_ context.Context, e kube.Event) { s.events = append(s.events, e) }

// lines are the lines that hold a text.
func (s *script) lines(text string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(strings.Split(s.text.String(), "\n"), func(l string) bool { return l == "" || !strings.Contains(l, text) })
}

func packet(prefix string, protocol uint8, from, to string) nflog.Packet {
	return nflog.Packet{Prefix: prefix, Protocol: protocol, Source: netip.MustParseAddrPort(from), Destination: netip.MustParseAddrPort(to)}
}

func TestFlowLines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var wrote script
		f := newFlowLog("n2", two{}, wrote.event, &wrote, time.Now)
		ctx, cancel := context.WithCancel(t.Context())
		go f.write(ctx)
		for _, p := range []nflog.Packet{
			packet("D:IN", unix.IPPROTO_TCP, "10.0.0.1:4000", "10.0.0.2:8080"),
			packet("A:OUT", unix.IPPROTO_UDP, "10.0.0.1:4000", "[2001:db8::1]:53"),
			packet("D:OUT", unix.IPPROTO_ICMP, "10.0.0.1:0", "192.0.2.1:0"),
			packet("D:GONE", 47, "10.0.0.9:0", "10.0.0.2:0"),
			packet("X:IN", unix.IPPROTO_TCP, "10.0.0.1:4000", "10.0.0.2:8080"), // not ours
			packet("D", unix.IPPROTO_TCP, "10.0.0.1:4000", "10.0.0.2:8080"),    // not ours
			{Prefix: "D:IN"}, // no IP packet
		} {
			f.packets <- p
		}
		synctest.Wait()
		cancel()
		const now = `{"time":"2000-01-01T00:00:00Z",`
		want := []string{
			now + `"verdict":"denied","direction":"ingress","protocol":"TCP","source":{"address":"10.0.0.1","port":4000,"pod":"shop/web","node":"n1"},` +
				`"destination":{"address":"10.0.0.2","port":8080,"pod":"shop/api","node":"n2"},"policies":["shop/api","shop/deny-all"],"node":"n2","chain":"IN"}`,
			now + `"verdict":"allowed","direction":"egress","protocol":"UDP","source":{"address":"10.0.0.1","port":4000,"pod":"shop/web","node":"n1"},` +
				`"destination":{"address":"2001:db8::1","port":53},"policies":["shop/web"],"node":"n2","chain":"OUT"}`,
			now + `"verdict":"denied","direction":"egress","protocol":"ICMP","source":{"address":"10.0.0.1","pod":"shop/web","node":"n1"},` +
				`"destination":{"address":"192.0.2.1"},"policies":["shop/web"],"node":"n2","chain":"OUT"}`,
			now + `"verdict":"denied","protocol":"47","source":{"address":"10.0.0.9"},` +
				`"destination":{"address":"10.0.0.2","pod":"shop/api","node":"n2"},"node":"n2","chain":"GONE"}`,
		}
		if diff := cmp.Diff(want, wrote.lines("")); diff != "" {
			t.Errorf("lines (-want +got):\n%s", diff)
		}
		about := func(name, uid, message string) kube.Event {
			return kube.Event{
				Object: kube.Reference{Kind: "Pod", Namespace: "shop", Name: name, UID: uid}, Type: kube.Warning, Reason: "PolicyDenied", Message: message,
			}
		}
		wantEvents := []kube.Event{
			about("api", "a", "ingress from shop/web (8080/TCP) denied by shop/api, shop/deny-all"),
			about("web", "w", "egress to 192.0.2.1 (ICMP) denied by shop/web"),
		}
		if diff := cmp.Diff(wantEvents, wrote.events); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
	})
}

// However many packets there are, lines are few, what has none is told, and there is one Event for a pod and its peer in a while.
func TestFlowLinesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var wrote script
		f := newFlowLog("n2", two{}, wrote.event, &wrote, time.Now)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go f.write(ctx)
		flood := func(packets int) {
			for i := range packets {
				f.packets <- packet("D:IN", unix.IPPROTO_TCP, fmt.Sprintf("10.0.0.1:%d", i), "10.0.0.2:8080")
			}
			time.Sleep(2 * flowTellAfter)
			synctest.Wait()
		}
		flood(10_000)
		if lines := wrote.lines("verdict"); len(lines) != flowBurst {
			t.Errorf("%d lines, want %d", len(lines), flowBurst)
		}
		gaps := wrote.lines("suppressed")
		var gap flowGap
		if len(gaps) != 1 || json.Unmarshal([]byte(gaps[0]), &gap) != nil || gap.Suppressed != 10_000-flowBurst || gap.Node != "n2" {
			t.Errorf("the gap is %q", gaps)
		}
		flood(1)
		if lines := wrote.lines("verdict"); len(lines) != flowBurst+1 || len(wrote.lines("suppressed")) != 1 {
			t.Errorf("after the flood there are %d lines, and %q", len(lines), wrote.lines("suppressed"))
		}
		if f.lines.Load() != flowBurst+1 || f.suppressed.Load() != 10_000-flowBurst {
			t.Errorf("counted %d lines, %d suppressed", f.lines.Load(), f.suppressed.Load())
		}
		if len(wrote.events) != 1 {
			t.Errorf("%d events", len(wrote.events))
		}
		time.Sleep(deniedEvery)
		flood(1)
		if len(wrote.events) != 2 {
			t.Errorf("after a while there are %d events", len(wrote.events))
		}
	})
}

// What is remembered is bounded, and is forgotten.
func TestSeldom(t *testing.T) {
	s := seldom{every: time.Minute}
	now := time.Unix(0, 0)
	for i := range 2 * seldomKeys {
		if due := s.due(fmt.Sprint(i), now); due != (i < seldomKeys) {
			t.Fatalf("key %d is due: %v", i, due)
		}
	}
	if s.due("0", now.Add(s.every-1)) || !s.due("0", now.Add(s.every)) || len(s.done) != 1 {
		t.Errorf("it remembers %d keys", len(s.done))
	}
}

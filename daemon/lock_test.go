package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
)

const (
	// answerPatience is how long a question may take while the daemon waits for a lock.
	answerPatience = 2 * time.Second
	// lockPatience is for waiting in vain in both families, and for the next try after that.
	lockPatience = 40 * time.Second
)

// On a node whose other programs use legacy iptables, one of them holds the lock until the daemon gives up to wait. It answers
// meanwhile, changes of sets are made, and the rules are there soon after the lock is free.
func TestLockHeldByAnother(t *testing.T) {
	s, lock := newLegacyStage(t, "wdlock")
	closed, open, client := s.lockedPods()
	release := hold(t, lock)
	s.relabel("team: a", "team: b") // only a member of a set
	s.cutOff(client, closed)
	s.write("policy-open", allowTeam("open")) // rules
	s.says("FirewallApplyFailed", true)
	release()
	s.says("FirewallApplyFailed", false)
	s.blocked(client, open)
	s.relabel("team: b", "team: a")
	s.reaches(client, open)
	rules, err := s.Nodes[0].Run(t.Context(), "iptables-nft-save")
	if err != nil || strings.Contains(rules, "WARREN") {
		t.Errorf("in nft stand %v\n%s", err, rules)
	}
}

// While another program holds the lock, in a soak for 30 s, a policy and a label change every second. None of it is lost.
func TestProofNoChangeIsLostToTheLock(t *testing.T) {
	s, lock := newLegacyStage(t, "wdlost")
	closed, open, client := s.lockedPods()
	release := hold(t, lock)
	team, app := "a", "closed"
	for range soak.Trials(30) {
		before := team
		team, app = map[string]string{"a": "b", "b": "a"}[team], map[string]string{"closed": "open", "open": "closed"}[app]
		s.relabel("team: "+before, "team: "+team)
		s.write("policy", allowTeam(app))
		s.pause(time.Second)
	}
	release()
	s.write("policy", allowTeam("open"))
	s.relabel("team: "+team, "team: b")
	s.cutOff(client, open)
	s.reaches(client, closed)
	s.healthy(0)
}

// newLegacyStage is a node whose other programs use legacy iptables, with a daemon; lock is the file that all of them lock.
func newLegacyStage(t *testing.T, name string) (s *stage, lock string) {
	t.Helper()
	s = newStage(t, name, 1)
	s.startTunnel(0)
	if _, err := s.Nodes[0].Run(t.Context(), "iptables-legacy", "-A", "INPUT", "-p", "icmp", "-j", "ACCEPT"); err != nil {
		t.Fatal(err)
	}
	lock = filepath.Join(t.TempDir(), "xtables.lock")
	s.startDaemon(0, []string{"XTABLES_LOCKFILE=" + lock})
	s.ready(0)
	return s, lock
}

// lockedPods adds two servers and a client of team a, which reaches both. A policy lets only team a in to the first.
func (s *stage) lockedPods() (closed, open, client *lab.Pod) {
	s.t.Helper()
	s.write("policy", allowTeam("closed"))
	closed, open = s.pod(0, "closed"), s.pod(0, "open")
	client, err := s.Nodes[0].AddPod(s.t.Context(), lab.Pod{Namespace: "shop", Name: "client", Labels: map[string]string{"team": "a"}})
	if err != nil {
		s.t.Fatal(err)
	}
	s.reaches(client, closed)
	s.reaches(client, open)
	return closed, open, client
}

// hold takes the lock that iptables uses and returns what releases it.
func hold(t *testing.T, lock string) (release func()) {
	t.Helper()
	file, err := os.OpenFile(lock, os.O_RDWR, 0)
	if err == nil {
		err = unix.Flock(int(file.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// allowTeam is a policy that lets only team a in to the pods with a label app.
func allowTeam(app string) networkingv1.NetworkPolicy {
	policy := isolateClosed()
	policy.Name = "only-team-a-to-" + app
	policy.Spec.PodSelector.MatchLabels = map[string]string{"app": app}
	policy.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{
		PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"team": "a"}},
	}}}}
	return policy
}

// relabel changes the text of the client's object.
func (s *stage) relabel(from, to string) {
	s.t.Helper()
	const name = "pod-shop-client"
	text, err := s.ReadText(name)
	if err != nil || !strings.Contains(string(text), from) {
		s.t.Fatalf("the pod is %v\n%s", err, text)
	}
	s.writeText(name, strings.ReplaceAll(string(text), from, to))
}

// cutOff waits until a pod does not reach another any more.
func (s *stage) cutOff(from, to *lab.Pod) {
	s.t.Helper()
	for _, address := range to.Addresses {
		s.eventually(func() error {
			ctx, cancel := context.WithTimeout(s.t.Context(), closedPatience)
			defer cancel()
			if lab.Probe(ctx, from.Netns(), netip.AddrPortFrom(address, port), marker) == nil {
				return errors.New(from.Name + " still reaches " + address.String())
			}
			return nil
		})
	}
}

// says waits until the status has or has not a problem with that code. Each time it demands other answers, too.
func (s *stage) says(code string, want bool) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), lockPatience)
	defer cancel()
	err := lab.Until(ctx, func() error {
		if s.answers(code) != want {
			return fmt.Errorf("whether there is a problem %s: want %v", code, want)
		}
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// answers demands an answer to each kind of question at once, and says whether the status has a problem with that code.
func (s *stage) answers(code string) bool {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), answerPatience)
	defer cancel()
	status, err := s.Nodes[0].Status(ctx)
	if err != nil {
		s.t.Errorf("while the lock is held: %v", err)
	}
	// The verdict may be that it is not known, because the kernel is not as planned.
	if out, err := s.Nodes[0].Command(ctx, "explain", "--from", "shop/open", "--to", "shop/client", "--port", "80/tcp"); ctx.Err() != nil {
		s.t.Errorf("while the lock is held: %v\n%s", err, out)
	}
	return slices.ContainsFunc(status.Problems, func(p agentapi.Problem) bool { return p.Code == code })
}

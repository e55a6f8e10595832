package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

// backWithin is how long allowed traffic may be interrupted by a restart of the daemon.
const backWithin = 2 * time.Second

// absent is a kubeconfig of an API server that is not there.
const absent = `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: "http://127.0.0.1:9"}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
users: [{name: u, user: {}}]
current-context: c
`

// Whatever ends the daemon, and whatever it finds when it comes back: nothing that a policy denies arrives meanwhile, and what is
// allowed goes on. The denied and the allowed packets are sent at the same time, by pods of the same and of another node.
func TestProofPolicyHoldsThroughRestarts(t *testing.T) {
	t.Parallel()
	s := running(t, "wprest", 2)
	s.write("policy", rules{name: "isolate-closed", selector: app("closed"), from: app("friend")}.object())
	near, far := s.pod(1, "near"), s.pod(0, "far")
	friend, closed, open := s.pod(0, "friend"), s.pod(1, "closed"), s.pod(1, "open")
	s.blocked(near, closed)
	s.blocked(far, closed)
	s.reaches(friend, closed)

	denied, allowed := s.counter(closed.Netns()), s.counter(open.Netns())
	const hundredASecond = 10 * time.Millisecond
	forbidden := tagged.Fire{Tag: tagForbidden, Targets: closed.Addresses, Port: port, Every: hundredASecond}
	guns := []*tagged.Gun{
		s.fire(near, forbidden), s.fire(far, forbidden),
		s.fire(friend, tagged.Fire{Tag: tagAllowed, Targets: closed.Addresses, Port: port, Every: hundredASecond}),
		s.fire(far, tagged.Fire{Tag: tagAllowed, Targets: open.Addresses, Port: port, Every: hundredASecond}),
	}
	s.arrives(denied, 100, tagged.Of(tagAllowed))
	s.arrives(allowed, 100, tagged.Of(tagAllowed))

	rounds := soak.Trials(20)
	for range rounds {
		s.restart(t, func(i int) error { return s.daemons[i].Kill() })
	}
	for range rounds {
		replaceWarrend(t)
		s.restart(t, func(i int) error { return s.daemons[i].Stop() })
	}
	sources := soak.Trials(10)
	for range sources {
		s.restartWithoutObjects(t)
		s.restartWithoutServer(t)
	}

	// The same packets arrive as soon as the policy is gone: what did not arrive was sent.
	var sent int64
	for _, g := range guns[:2] {
		sent += g.Sent()
	}
	arrived := denied.Packets(tagged.Of(tagForbidden))
	if arrived > 0 {
		t.Errorf("%d denied packets of %d arrived", arrived, sent)
	}
	gap := max(denied.Gap(tagged.Of(tagAllowed)), allowed.Gap(tagged.Of(tagAllowed)))
	if gap > backWithin {
		t.Errorf("allowed traffic was interrupted for %v", gap)
	}
	if err := errors.Join(inFamilies(denied, tagAllowed), inFamilies(allowed, tagAllowed)); err != nil {
		t.Error(err)
	}
	summary(t, "%d kills, %d upgrades, %d restarts without objects and %d without an API server, on 2 nodes each: %d of %d denied packets arrived; allowed ones had no gap above %v",
		rounds, rounds, sources, sources, arrived, sent, gap)
	if err := s.Remove("policy"); err != nil {
		t.Fatal(err)
	}
	s.eventually(func() error { return inFamilies(denied, tagForbidden) })
	for _, g := range guns {
		g.Cease()
	}
}

// restart ends all daemons and starts them again.
func (s *stage) restart(t *testing.T, end func(i int) error) {
	t.Helper()
	for i := range s.Nodes {
		if err := end(i); err != nil {
			t.Fatal(err)
		}
	}
	s.startDaemons()
}

// restartWithoutObjects starts the daemons while the directory of objects is not there, which ends them, and then again.
func (s *stage) restartWithoutObjects(t *testing.T) {
	t.Helper()
	for _, daemon := range s.daemons {
		if err := daemon.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	elsewhere := s.Objects + ".away"
	if err := os.Rename(s.Objects, elsewhere); err != nil {
		t.Fatal(err)
	}
	for i := range s.Nodes {
		s.startDaemon(i, nil)
	}
	s.pause(backWithin)
	for _, node := range s.Nodes {
		if status, err := node.Status(t.Context()); err == nil && status.Ready {
			t.Errorf("%s is ready without objects", node.Name)
		}
	}
	if err := os.Rename(elsewhere, s.Objects); err != nil {
		t.Fatal(err)
	}
	s.startDaemons()
}

// restartWithoutServer starts the daemons while the API server does not answer, lets them try for a while, and starts them again.
func (s *stage) restartWithoutServer(t *testing.T) {
	t.Helper()
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(kubeconfig, []byte(absent), 0o600); err != nil {
		t.Fatal(err)
	}
	for i, daemon := range s.daemons {
		if err := daemon.Kill(); err != nil {
			t.Fatal(err)
		}
		s.startDaemonOn(i, "", kubeconfig)
	}
	s.pause(backWithin)
	for i, daemon := range s.daemons {
		if status := s.status(i); status.Ready {
			t.Errorf("%s is ready without an API server", s.Nodes[i].Name)
		}
		if err := daemon.Kill(); err != nil {
			t.Fatal(err)
		}
	}
	s.startDaemons()
}

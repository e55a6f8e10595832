package firewall

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// newLock puts a lock of the test's own in the place of the xtables lock, and returns what takes it and then releases it. Only programs
// that start afterwards take that one.
func newLock(tb testing.TB) (hold func() (release func())) {
	tb.Helper()
	name := filepath.Join(tb.TempDir(), "xtables.lock")
	tb.Setenv("XTABLES_LOCKFILE", name)
	file, err := os.Create(name)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = file.Close() })
	lock := func(how int) {
		if err := unix.Flock(int(file.Fd()), how); err != nil {
			tb.Error(err)
		}
	}
	return func() (release func()) {
		lock(unix.LOCK_EX)
		return func() { lock(unix.LOCK_UN) }
	}
}

// An apply waits for the holder of the lock and then does everything. The programs of nft need no lock.
func TestApplyWaitsForTheLock(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		hold := newLock(t)
		w := n.firewall()
		n.apply(w, netfilter.Ruleset{})
		released := make(chan struct{})
		release := hold()
		time.AfterFunc(time.Second, func() { release(); close(released) })
		n.apply(w, sample())
		select {
		case <-released:
		default:
			if n.backend == legacy {
				t.Error("the apply was done while somebody else held the lock")
			}
		}
		if got := n.drift(w, sample()); len(got) > 0 {
			t.Errorf("after the lock is free there is %q", got)
		}
		<-released
	})
}

// TestLockHeldForLong holds the lock for longer than a change waits. Sets are changed meanwhile and questions are answered; that the
// rules are not written closes nothing for good, and they stand once the lock is free.
func TestLockHeldForLong(t *testing.T) {
	n := newNode(t, legacy)
	hold := newLock(t)
	w := n.firewall()
	n.apply(w, sample())
	release := hold()
	members := func() netfilter.Ruleset {
		r := sample()
		setIn(&r.V4, peers(netfilter.IPv4)).Entries = addresses("10.3.0.0/16")
		return r
	}
	if changes := n.patch(w, sample(), members()); changes.Execs > 0 || changes.SetOps == 0 {
		t.Errorf("a change of members cost %+v", changes)
	}
	if got, want := n.members(peers(netfilter.IPv4)), []string{"10.3.0.0/16"}; !cmp.Equal(got, want) {
		t.Errorf("while the lock is held the set holds %q, want %q", got, want)
	}
	if got := n.drift(w, members()); len(got) > 0 {
		t.Errorf("while the lock is held there is %q", got)
	}
	// A change of both: who may do less does so at once.
	changed := members()
	setIn(&changed.V4, peers(netfilter.IPv4)).Entries = addresses("10.4.0.0/16")
	policy := chainIn(&changed.V4, "WARREN-POLICY")
	policy.Closable, policy.Rules[0] = []string{"shop/api"}, rule("shop/api", "-p udp -j RETURN")
	before := oursIn(n.state())
	changes, err := w.Patch(t.Context(), netfilter.Diff(members(), changed))
	if changes.Execs != 1 {
		t.Errorf("%d programs ran: not to get the lock says nothing against a rule", changes.Execs)
	}
	var closed *ClosedError
	if err == nil || errors.As(err, &closed) || !strings.Contains(err.Error(), "holding the xtables lock") {
		t.Errorf("the error is %v", err)
	}
	if got := n.members(peers(netfilter.IPv4)); len(got) > 0 {
		t.Errorf("without the new rules the set holds %q", got)
	}
	if diff := cmp.Diff(before, oursIn(n.state())); diff != "" {
		t.Errorf("without the lock the rules changed:\n%s", diff)
	}
	if _, err := w.Patch(t.Context(), netfilter.Change{}); !errors.Is(err, ErrUnknown) {
		t.Errorf("after the error a patch says %v", err)
	}
	release()
	n.apply(w, changed)
	if got := n.drift(w, changed); len(got) > 0 {
		t.Errorf("after the lock is free there is %q", got)
	}
}

// TestRivalRestores lets another program restore 5,000 rules of its own again and again, while rulesets are applied. Each
// apply succeeds, and none of the other's rules is touched.
func TestRivalRestores(t *testing.T) {
	var text strings.Builder
	text.WriteString("*mangle\n:RIVAL - [0:0]\n")
	for i := range 5000 {
		fmt.Fprintf(&text, "-A RIVAL -s 10.%d.%d.0/24 -p tcp -m tcp --dport 80 -j RETURN\n", i/250, i%250)
	}
	text.WriteString("COMMIT\n")
	onEach(t, func(n *node) {
		t := n.t
		newLock(t)
		w := n.firewall()
		n.apply(w, sample())
		ctx, stop := context.WithCancel(t.Context())
		started, done := make(chan struct{}), make(chan error)
		namespace := n.path()
		go func() {
			var err error
			for rounds := 0; err == nil && ctx.Err() == nil; rounds++ {
				cmd := exec.CommandContext(ctx, "nsenter", "--net="+namespace, "iptables-"+n.backend+"-restore", "--noflush", "-w")
				cmd.Stdin = strings.NewReader(text.String())
				if err = cmd.Run(); ctx.Err() != nil {
					err = nil // it was stopped
				}
				if rounds == 0 {
					close(started)
				}
			}
			done <- err
		}()
		<-started
		for range 4 {
			n.apply(w, without())
			n.apply(w, sample())
		}
		stop()
		if err := <-done; err != nil {
			t.Errorf("the rival: %v", err)
		}
		if got := n.drift(w, sample()); len(got) > 0 {
			t.Errorf("in the end there is %q", got)
		}
		if got := n.rules(netfilter.IPv4, "mangle", "RIVAL"); len(got) != 5000 {
			t.Errorf("the rival has %d rules, want 5000", len(got))
		}
	})
}

// path returns the node's namespace as other goroutines and their programs can enter it.
func (n *node) path() string {
	return fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
}

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/agentapi"
)

// TestDelWithLess: DEL succeeds, and leaves nothing, whatever is not there any more or is not what it was; and so does a second one.
func TestDelWithLess(t *testing.T) {
	tests := map[string]struct {
		prepare func(*node, *pod)
		config  func(map[string]any)
	}{
		"nothing missing":           {},
		"no netns":                  {prepare: func(_ *node, p *pod) { p.rt.NetNS = "" }},
		"netns of another":          {prepare: func(_ *node, p *pod) { p.rt.NetNS = "/proc/self/ns/net" }},
		"no CNI_ARGS":               {prepare: func(_ *node, p *pod) { p.rt.Args = nil }},
		"CNI_ARGS that are none":    {prepare: func(_ *node, p *pod) { p.rt.Args = [][2]string{{"IgnoreUnknown", "perhaps"}} }},
		"no daemon":                 {prepare: func(n *node, _ *pod) { n.stop() }},
		"daemon that refuses all":   {prepare: func(n *node, _ *pod) { n.daemon.answers(refuseAll) }},
		"no previous result":        {config: func(c map[string]any) { delete(c, "prevResult") }},
		"previous result is null":   {config: func(c map[string]any) { c["prevResult"] = nil }},
		"previous result is text":   {config: func(c map[string]any) { c["prevResult"] = "garbage" }},
		"previous result of others": {config: func(c map[string]any) { c["prevResult"] = map[string]any{"cniVersion": "9.9.9", "ips": 7} }},
		"no ranges, no MTU":         {config: func(c map[string]any) { delete(c, "ranges"); delete(c, "mtu") }},
		"other ranges":              {config: func(c map[string]any) { c["ranges"] = []string{"10.99.0.0/24"} }},
		"link gone": {prepare: func(n *node, _ *pod) {
			run(n.t, n, "ip -o link show type veth | grep -o 'wrn[^@]*' | xargs -n 1 ip link del")
		}},
		"lease gone":          {prepare: func(n *node, _ *pod) { run(n.t, n, "rm -r "+n.runDir+"/ipam; "+closeAll) }},
		"run directory gone":  {prepare: func(n *node, _ *pod) { n.stop(); run(n.t, n, "rm -r "+n.runDir+"; "+closeAll) }},
		"gate emptied":        {prepare: func(n *node, _ *pod) { run(n.t, n, closeAll) }},
		"lock is a directory": {prepare: func(n *node, _ *pod) { run(n.t, n, "cd "+n.runDir+"; rm attachments.lock; mkdir attachments.lock") }},
		"older specification": {config: func(c map[string]any) { c["cniVersion"] = "0.4.0" }},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			p := n.newPod("web")
			before := n.state(p)
			result := n.mustExec(p, "ADD")
			if tt.prepare != nil {
				tt.prepare(n, p)
			}
			change := func(c map[string]any) {
				c["prevResult"] = json.RawMessage(result)
				if tt.config != nil {
					tt.config(c)
				}
			}
			for range 2 {
				if out := n.mustExec(p, "DEL", change); out != "" {
					t.Errorf("DEL wrote %s", out)
				}
			}
			n.unchanged(before, p)
		})
	}
}

// refuseAll is a daemon that refuses everything.
func refuseAll(agentapi.Request) *agentapi.Error { return &agentapi.Error{Code: 999, Message: "no"} }

// closeAll empties the start gate, of which a test wants to see nothing left that is not the plugin's to remove.
const closeAll = "ipset flush WARREN-READY4; ipset flush WARREN-READY6"

// TestDelsOfOneContainer at once: one does it, the others have nothing to do, and none fails.
func TestDelsOfOneContainer(t *testing.T) {
	n := newNode(t)
	p, other := n.newPod("web"), n.newPod("other")
	n.mustAdd(other)
	before := n.state(p, other)
	n.mustAdd(p)
	same := make([]*pod, 20)
	for i := range same {
		same[i] = p
	}
	n.atOnce(same, n.del)
	n.unchanged(before, p, other)
}

// TestLockOfLeasesIsHeld by somebody who does not give it back: ADD, DEL and GC say so and end, DEL and GC have done all else, and what is
// tried again when the lock is free succeeds.
func TestLockOfLeasesIsHeld(t *testing.T) {
	n := newNode(t)
	pods := []*pod{n.newPod("new"), n.newPod("deleted"), n.newPod("collected"), n.newPod("collected2")}
	before := n.state(pods...)
	for _, p := range pods[1:] {
		n.mustAdd(p)
	}
	lock, err := os.Open(filepath.Join(n.runDir, "ipam", ".lock"))
	if err != nil {
		t.Fatal(err)
	}
	if err = unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	began := time.Now() //nolint:forbidigo // how long it takes
	commands := map[*pod]string{pods[0]: "ADD", pods[1]: "DEL", pods[2]: "GC"}
	n.atOnce(pods[:3], func(p *pod) error {
		out, stderr, err := n.exec(p, commands[p], nothingValid)
		refusal := &types.Error{}
		if jsonErr := json.Unmarshal([]byte(out), refusal); err == nil || jsonErr != nil || stderr != "" {
			return fmt.Errorf("%s: %w: not one CNI error on stdout: %q, %q", commands[p], err, out, stderr)
		}
		wantCode(t, refusal, types.ErrTryAgainLater, "another process holds the lock on "+lock.Name())
		return nil
	})
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("they took %s", took)
	}
	if open, up := n.open(), run(t, n, "ip -br link show type veth up"); len(open) > 0 || up != "" {
		t.Errorf("%v may pass, and there stand %s", open, up)
	}
	if err = lock.Close(); err != nil {
		t.Fatal(err)
	}
	n.mustExec(pods[1], "DEL")
	n.mustExec(pods[2], "GC", nothingValid)
	n.unchanged(before, pods...)
	n.mustExec(pods[0], "ADD")
}

// TestKilledAddAtEveryStep kills ADD at each of its system calls that change something, in turn. What it leaves goes with a DEL, or
// with a GC, and then the pod can be attached.
func TestKilledAddAtEveryStep(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	before := n.state(p)
	for kind, least := range map[string]int{"sendto": 2, "write": 2, "linkat": 2, "renameat": 1, "connect": 1, "setns": 1, "fcntl": 3} {
		untilAsMany(t, kind, least, func() (calls int) {
			for n.killedAt(p, "ADD", kind, calls+1) {
				calls++
				command := []string{"DEL", "GC"}[calls%2]
				if out := n.mustExec(p, command, nothingValid); out != "" {
					t.Errorf("%s wrote %s", command, out)
				}
				n.unchanged(before, p)
				if t.Failed() {
					t.Fatalf("after ADD was killed at call %d of %s", calls, kind)
				}
			}
			n.mustExec(p, "DEL") // the last one was not killed
			n.unchanged(before, p)
			return calls
		})
	}
	n.mustAdd(p)
}

// TestFailedAddAtEveryStep has the kernel refuse each of ADD's system calls that change something, in turn: ADD fails and has undone
// all, or does without.
func TestFailedAddAtEveryStep(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	before := n.state(p)
	for kind, fault := range map[string]struct {
		err   unix.Errno
		least int
	}{
		"sendto": {unix.ENOBUFS, 2}, "write": {unix.ENOSPC, 2}, "linkat": {unix.ENOSPC, 2}, "renameat": {unix.EROFS, 1},
		"connect": {unix.ECONNREFUSED, 1}, "setns": {unix.EPERM, 1},
	} {
		untilAsMany(t, kind, fault.least, func() (failed int) {
			passed := 0
			for at := 1; passed < 3; at++ { // a call after the last one, or some that ADD does without, in a row
				n.under = strace(fmt.Sprintf("%s:error=%s:when=%d", kind, unix.ErrnoName(fault.err), at))
				out, stderr, err := n.exec(p, "ADD")
				n.under = nil
				if err == nil {
					passed++
					n.mustExec(p, "DEL")
				} else {
					failed++
					passed = 0
					if strings.Count(out, fault.err.Error()) > 1 {
						// The calls of each thread count by themselves, so that the undoing was refused one, too.
						n.mustExec(p, "DEL")
					}
					if json.Unmarshal([]byte(out), &types.Error{}) != nil { // Go's runtime did not bear it, which is as if it was killed
						t.Logf("%s %d: %v: %s", kind, at, err, strings.SplitN(stderr, "\n", 2)[0])
						n.mustExec(p, "DEL")
					}
				}
				n.unchanged(before, p)
				if t.Failed() {
					t.Fatalf("after call %d of %s failed: %v\n%s", at, kind, err, out)
				}
			}
			return failed
		})
	}
	n.mustAdd(p)
}

// untilAsMany does something that meets the system calls of a kind in turn, until it has met as many as it should at least, which is the
// control that it meets any. strace counts the calls of each thread by themselves, and which thread makes one differs from one time to the
// next.
func untilAsMany(t *testing.T, kind string, least int, do func() int) {
	t.Helper()
	const tries = 20
	most := 0
	for range tries {
		if most = max(most, do()); most >= least || t.Failed() {
			return
		}
	}
	t.Errorf("in %d tries at most %d calls of %s were met, want %d", tries, most, kind, least)
}

// TestRefusedDelKeepsItsLease: a DEL that could not see what its attachment holds ends no lease, by which the next one closes the gate.
func TestRefusedDelKeepsItsLease(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	before := n.state(p)
	// Which of a thread's calls it is differs from one time to the next, so it is tried until both refusals met what DEL looks for.
	const tries = 200
	for try := 0; ; try++ {
		if try == tries {
			t.Fatalf("in %d tries no DEL failed to look", tries)
		}
		n.mustAdd(p)
		n.under = strace(fmt.Sprintf("openat:error=ENFILE:when=%d..%d", 5+try%5, 6+try%5))
		out, _, err := n.exec(p, "DEL")
		n.under = nil
		n.mustExec(p, "DEL")
		n.unchanged(before, p)
		if t.Failed() {
			t.Fatalf("after a DEL that failed: %v\n%s", err, out)
		}
		if err != nil && strings.Contains(out, "listing leases") {
			return
		}
	}
}

// strace is a command under which a system call of a program does not do what it should.
func strace(inject string) []string {
	return []string{"strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=" + inject}
}

// killedAt runs a command of the plugin, kills it at its n-th system call of a kind, and says whether there was one.
func (n *node) killedAt(p *pod, command, kind string, at int, change ...func(map[string]any)) bool {
	n.t.Helper()
	n.under = strace(fmt.Sprintf("%s:signal=KILL:when=%d", kind, at))
	out, stderr, err := n.exec(p, command, change...)
	n.under = nil
	var exit *exec.ExitError
	if killed := errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL; err == nil || killed {
		return killed
	}
	n.t.Fatalf("%s: %v\n%s%s", command, err, out, stderr)
	return false
}

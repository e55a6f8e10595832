package main

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

// ending is a command that ends attachments, on a node with one that has to stay.
type ending struct {
	*node

	command string
	kept    *pod
	result  string // of the ADD of what has to stay
	gone    []*pod
	without string // the state without what is gone
}

// newEnding makes a node on which GC or DEL has something to do each time that something was added.
func newEnding(t *testing.T, command string) *ending {
	t.Helper()
	n := newNode(t)
	e := &ending{node: n, command: command, kept: n.newPod("kept"), gone: []*pod{n.newPod("gone")}}
	if command == "GC" {
		e.gone = append(e.gone, n.newPod("lost"))
	}
	e.result = n.mustExec(e.kept, "ADD")
	e.without = n.state(append(e.gone, e.kept)...)
	return e
}

// add adds what is to end.
func (e *ending) add() {
	e.t.Helper()
	for _, p := range e.gone {
		e.mustExec(p, "ADD")
	}
}

// valid names what has to stay.
func (e *ending) valid(c map[string]any) {
	c["cni.dev/valid-attachments"] = []any{map[string]any{"containerID": e.kept.rt.ContainerID, "ifname": e.kept.rt.IfName}}
}

// over demands that what has to stay is whole, and that nothing is left of the rest once the command was there again.
func (e *ending) over(kind string, at int) {
	e.t.Helper()
	if err := e.check(e.kept, e.result); err != nil {
		e.t.Errorf("what is valid: %v", err)
	}
	if out := e.mustExec(e.gone[0], e.command, e.valid); out != "" {
		e.t.Errorf("the second %s wrote %s", e.command, out)
	}
	e.unchanged(e.without, append(e.gone, e.kept)...)
	if e.t.Failed() {
		e.t.Fatalf("after call %d of %s", at, kind)
	}
}

// TestKilledGC kills GC at each of its system calls that change something, in turn. What is valid stays, and the next GC takes the rest.
func TestKilledGC(t *testing.T) {
	// Three calls of fcntl are those of Go's runtime.
	for kind, least := range map[string]int{"sendto": 3, "fcntl": 4, "flock": 2, "unlinkat": 2, "utimensat": 2, "renameat": 4, "connect": 2} {
		t.Run(kind, func(t *testing.T) {
			untilAsMany(t, kind, least, func() (killed int) {
				e := newEnding(t, "GC")
				for {
					e.add()
					is := e.killedAt(e.gone[0], "GC", kind, killed+1, e.valid)
					e.over(kind, killed+1)
					if !is {
						return killed
					}
					killed++
				}
			})
		})
	}
}

// TestFailedEndAtEveryStep has the kernel refuse each of GC's and DEL's system calls that change something, in turn: what is valid stays, and
// the rest is gone when the command says that it has succeeded, or with the next one.
func TestFailedEndAtEveryStep(t *testing.T) {
	for _, command := range []string{"GC", "DEL"} {
		for kind, fault := range map[string]struct {
			err   unix.Errno
			least int
		}{
			"sendto": {unix.ENOBUFS, 2}, "fcntl": {unix.ENOLCK, 4}, "flock": {unix.ENOLCK, 1}, "unlinkat": {unix.EROFS, 1}, "utimensat": {unix.EROFS, 1},
			"renameat": {unix.ENOSPC, 1}, "connect": {unix.ECONNREFUSED, 1},
		} {
			if command == "DEL" && kind == "fcntl" {
				continue // its lock, which DEL does without
			}
			t.Run(command+"/"+kind, func(t *testing.T) {
				untilAsMany(t, kind, fault.least, func() (met int) {
					e := newEnding(t, command)
					passed := 0
					for at := 1; passed < 3; at++ { // a call after the last one, or some that the command does without, in a row
						e.add()
						e.under = strace(fmt.Sprintf("%s:error=%s:when=%d", kind, unix.ErrnoName(fault.err), at))
						out, stderr, err := e.exec(e.gone[0], command, e.valid)
						e.under = nil
						if err != nil || stderr != "" {
							met++
							passed = 0
						} else {
							passed++
							e.unchanged(e.without, append(e.gone, e.kept)...)
						}
						e.over(kind, at)
						if t.Failed() {
							t.Fatalf("%v: %s%s", err, out, stderr)
						}
					}
					return met
				})
			})
		}
	}
}

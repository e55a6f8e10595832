package firewall

import (
	"context"
	"errors"
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

// script makes a program.
func script(t *testing.T, text string) (program string) {
	t.Helper()
	program = filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(program, []byte("#!/bin/sh\nread -r line\n"+text+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return program
}

// only returns the one program that waits.
func (s *spares) only(t *testing.T) *spare {
	t.Helper()
	if len(s.waiting) != 1 {
		t.Fatalf("%d programs wait", len(s.waiting))
	}
	for _, p := range s.waiting {
		return p
	}
	return nil
}

// A program that takes input was started before; one that died meanwhile is replaced; other arguments are another program.
func TestSpareProgramTakesTheNextInput(t *testing.T) {
	s := newSpares()
	defer s.close()
	program := script(t, `echo "$1 $line"`)
	run := func(input, argument string) {
		t.Helper()
		out, words, err := s.Run(t.Context(), input+"\n", program, argument)
		if want := argument + " " + input + "\n"; err != nil || words != "" || out != want {
			t.Errorf("%q, %q, %v, want %q", out, words, err, want)
		}
	}
	run("first", "a")
	waits := s.only(t)
	run("second", "a")
	if !waits.gone() {
		t.Error("the program that waited still does")
	}
	waits = s.only(t)
	if err := waits.process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-waits.done
	run("after a death", "a")
	run("other", "b")
	if len(s.waiting) != 2 {
		t.Errorf("%d programs wait, want one for each argument", len(s.waiting))
	}
}

// A program is killed when the context ends, and that is no refusal of its input. Afterwards programs run as before.
func TestSpareProgramIsKilled(t *testing.T) {
	s := newSpares()
	defer s.close()
	program := script(t, `[ "$line" != wait ] || exec sleep 1000`)
	if _, _, err := s.Run(t.Context(), "go\n", program); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, _, err := s.Run(ctx, "wait\n", program); !errors.Is(err, context.DeadlineExceeded) || refused(err) {
		t.Errorf("the error is %v", err)
	}
	if _, _, err := s.Run(t.Context(), "go\n", program); err != nil {
		t.Error(err)
	}
}

// What a program says of its input is returned, also where it does not read all of it; and one that is not there is an error.
func TestSpareProgramFails(t *testing.T) {
	s := newSpares()
	defer s.close()
	program := script(t, "echo line 1 failed >&2; exit 3")
	long := strings.Repeat("a line\n", 100_000)
	for range 2 {
		_, words, err := s.Run(t.Context(), long, program)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 3 || !refused(err) || words != "line 1 failed\n" {
			t.Errorf("%q, %v", words, err)
		}
	}
	if _, _, err := s.Run(t.Context(), long, program+"-not"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the error is %v", err)
	}
}

// A program that ends without input changes nothing, and one that waited while others changed the rules makes its change to what stands.
func TestSpareProgramSeesWhatStands(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		newLock(t)
		w := n.firewall()
		n.apply(w, sample())
		programs := 0
		for _, p := range w.programs.waiting {
			programs++
			if p.gone() {
				t.Error("a program does not wait for its input")
			}
		}
		if programs != len(netfilter.Families) {
			t.Errorf("%d programs wait", programs)
		}
		n.run("iptables-" + n.backend + " -t mangle -N OTHER")
		n.run("iptables-" + n.backend + " -t mangle -A OTHER -j RETURN")
		changed := sample()
		policy := chainIn(&changed.V4, "WARREN-POLICY")
		policy.Rules[0] = rule("shop/api", "-p udp -j RETURN")
		n.patch(w, sample(), changed)
		if got := n.drift(w, changed); len(got) > 0 {
			t.Errorf("there is %q", got)
		}
		if got := n.rules(netfilter.IPv4, "mangle", "OTHER"); len(got) != 1 {
			t.Errorf("the other's chain has %q", got)
		}
		before := n.state()
		w.Close()
		if diff := cmp.Diff(before, n.state()); diff != "" {
			t.Errorf("the programs that ended changed:\n%s", diff)
		}
	})
}

// TestSpareProgramHoldsNoLock takes the xtables lock while a program waits.
func TestSpareProgramHoldsNoLock(t *testing.T) {
	n := newNode(t, legacy)
	newLock(t)
	n.apply(n.firewall(), sample())
	file, err := os.Open(os.Getenv("XTABLES_LOCKFILE"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = file.Close() }()
	if err = unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		t.Errorf("somebody holds the lock: %v", err)
	}
}

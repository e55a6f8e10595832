package firewall

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// groups is the sample with chains of groups in mangle that may be closed. The rules of some are given, the others have good ones.
func groups(bad map[string]string) netfilter.Ruleset {
	r := sample()
	for _, f := range netfilter.Families {
		h := r.Of(f)
		h.Chains = append(h.Chains, netfilter.Chain{
			Table: "mangle", Name: "WARREN-ALLOWED", Rules: []netfilter.Rule{rule("", "-j MARK --set-xmark 0x1/0x1")},
		})
		for _, name := range []string{"a", "b", "c", "d", "e"} {
			rules := []netfilter.Rule{rule("shop/"+name+" ingress 0", "-p tcp -g WARREN-ALLOWED"), rule("", "-j DROP")}
			if args, ok := bad[name]; ok {
				rules[0].Args = strings.Fields(args)
			}
			h.Chains = append(h.Chains, netfilter.Chain{
				Table: "mangle", Name: group(name), Rules: rules, Closable: []string{"shop/" + name, "shop/all"},
			})
			dispatch := chainIn(h, "WARREN-POLICY")
			dispatch.Rules = append(dispatch.Rules, rule("", "-i wrn"+name+" -g "+group(name)))
		}
	}
	return r
}

func group(name string) string { return netfilter.Name("I", name) }

// applyClosing applies a ruleset of which these groups must end closed, in both families, and everything else must stand. It
// returns the error's words too.
func (n *node) applyClosing(w *Firewall, r netfilter.Ruleset, names ...string) (Changes, string) {
	n.t.Helper()
	changes, err := w.Apply(n.t.Context(), r)
	var closed *ClosedError
	if !errors.As(err, &closed) {
		n.t.Fatalf("error is %v", err)
	}
	var got, want []string
	for _, c := range closed.Chains {
		got = append(got, c.Name+strings.Join(c.Objects, " "))
	}
	for range netfilter.Families {
		for _, name := range names {
			want = append(want, group(name)+"shop/"+name+" shop/all")
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		n.t.Errorf("the closed chains differ (-want +got):\n%s", diff)
	}
	for _, f := range netfilter.Families {
		for _, name := range []string{"a", "b", "c", "d", "e"} {
			n.checkGroup(f, name, slices.Contains(names, name))
		}
		for _, place := range [][2]string{{"raw", "PREROUTING"}, {"mangle", "FORWARD"}, {"nat", "POSTROUTING"}, {"filter", "FORWARD"}} {
			if len(n.rules(f, place[0], place[1])) == 0 {
				n.t.Errorf("%s: no hook in %v", f, place)
			}
		}
		if got, want := n.rules(f, "mangle", "WARREN-POLICY"), chainIn(r.Of(f), "WARREN-POLICY").Rules; len(got) != len(want) {
			n.t.Errorf("%s: the dispatch has %q", f, got)
		}
		if got := n.members(netfilter.ReadySet(f)); len(got) != 2 {
			n.t.Errorf("%s: the gate is open for %q", f, got)
		}
	}
	return changes, closed.Error()
}

// checkGroup looks at the chain of a group in the kernel.
func (n *node) checkGroup(f netfilter.Family, name string, closed bool) {
	n.t.Helper()
	got := n.rules(f, "mangle", group(name))
	switch {
	case !closed && len(got) == 2 && strings.HasSuffix(got[0], "-g WARREN-ALLOWED") && strings.HasSuffix(got[1], "-j DROP"):
	case closed && len(got) == 1 && strings.HasSuffix(got[0], `not applied, so closed: shop/`+name+` shop/all" -j DROP`):
	default:
		n.t.Errorf("%s: group %s (closed: %t) has %q", f, name, closed, got)
	}
}

// bads are rules that are refused in different places: by the program, which names the line, and by the kernel, after
// which the legacy program names only the COMMIT.
func bads() map[string]string {
	return map[string]string{
		"match":  "-m nosuchmatch -g WARREN-ALLOWED",
		"option": "-p sctp --bogus 3 -g WARREN-ALLOWED",
		"set":    "-m set --match-set others src -g WARREN-ALLOWED",
		"kernel": "-j REJECT",
	}
}

func TestRefusedChainsAreClosed(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		for name, args := range bads() {
			for _, bad := range [][]string{{"c"}, {"a", "d", "e"}, {"a", "b", "c", "d", "e"}} {
				wrong := map[string]string{}
				for _, b := range bad {
					wrong[b] = args
				}
				w := n.firewall()
				_, text := n.applyClosing(w, groups(wrong), bad...)
				if !strings.Contains(text, "mangle table (ipv6)") || !strings.Contains(text, group(bad[0])) {
					t.Errorf("%s: the error is %s", name, text)
				}
				before := n.state()
				if changes, _ := n.applyClosing(w, groups(wrong), bad...); changes != (Changes{}) {
					t.Errorf("%s: the second apply wrote %+v", name, changes)
				}
				w.Forget()
				n.applyClosing(w, groups(wrong), bad...)
				n.applyClosing(n.firewall(), groups(wrong), bad...)
				if diff := cmp.Diff(before, n.state()); diff != "" {
					t.Errorf("%s: trying again changed the kernel:\n%s", name, diff)
				}
				// Another rule is a new chance.
				n.apply(w, groups(nil))
				n.applyClosing(w, groups(wrong), bad...)
				if err := Cleanup(t.Context(), n.options().Log); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

// What changes beside a closed chain is written without trying it again.
func TestClosedChainIsLeftAlone(t *testing.T) {
	onEach(t, func(n *node) {
		wrong := map[string]string{"b": bads()["kernel"]}
		w := n.firewall()
		n.applyClosing(w, groups(wrong), "b")
		r := groups(wrong)
		changed := chainIn(&r.V4, group("a"))
		changed.Rules[0] = rule("shop/a ingress 0", "-p udp -g WARREN-ALLOWED")
		delta := netfilter.Delta{Table: "mangle", Write: []netfilter.Chain{*changed}}
		if changes, _ := n.applyClosing(w, r, "b"); changes != (Changes{RuleBytes: len(delta.Render()), Execs: 1}) {
			n.t.Errorf("wrote %+v, want %d bytes in one run", changes, len(delta.Render()))
		}
	})
}

func TestClosedChainHeals(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		wrong := map[string]string{"b": "-m set --match-set others src -g WARREN-ALLOWED", "e": "-m set --match-set others6 src -g WARREN-ALLOWED"}
		r := groups(wrong)
		chainIn(&r.V4, group("e")).Rules[0].Args = []string{"-g", "WARREN-ALLOWED"}
		chainIn(&r.V6, group("b")).Rules[0].Args = []string{"-g", "WARREN-ALLOWED"}
		w := n.firewall()
		_, err := w.Apply(t.Context(), r)
		var closed *ClosedError
		if !errors.As(err, &closed) || len(closed.Chains) != 2 || closed.Chains[0].Name != group("b") || closed.Chains[1].Name != group("e") {
			t.Fatalf("error is %v", err)
		}
		n.run("ipset create others hash:net")
		n.run("ipset create others6 hash:net family inet6")
		_, err = w.Apply(t.Context(), r)
		if !errors.As(err, &closed) {
			t.Errorf("tried again at once: %v", err)
		}
		later(w)
		n.apply(w, r)
		for _, f := range netfilter.Families {
			n.checkGroup(f, "b", false)
			n.checkGroup(f, "e", false)
		}
		if changes := n.apply(n.firewall(), r); changes != (Changes{}) {
			t.Errorf("a new Firewall wrote %+v", changes)
		}
	})
}

// A chain that must not be closed keeps the gate shut, whatever else is refused.
func TestOthersAreNotClosed(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		r := groups(map[string]string{"b": bads()["kernel"]})
		guards := chainIn(&r.V4, "WARREN-FORWARD")
		guards.Rules = append(guards.Rules, rule("bad guard", bads()["kernel"]))
		w := n.firewall()
		for range 2 {
			_, err := w.Apply(t.Context(), r)
			var closed *ClosedError
			if err == nil || errors.As(err, &closed) || !strings.Contains(err.Error(), "mangle table (ipv4)") {
				t.Fatalf("error is %v", err)
			}
			if got := n.members(netfilter.ReadySet(netfilter.IPv6)); len(got) > 0 {
				t.Errorf("the gate is open for %q", got)
			}
			if got := n.rules(netfilter.IPv4, "filter", "FORWARD"); len(got) > 0 {
				t.Errorf("the filter table accepts: %q", got)
			}
		}
	})
}

// later lets the time pass after which refused rules are tried again.
func later(w *Firewall) {
	now := w.now()
	w.now = func() time.Time { return now.Add(retryAfter) }
}

// fakeRestore puts a program in the place of iptables-restore of IPv4 that does this in the end with input in $input, and to
// which the actual program is $actual. It returns a function that brings the actual one back.
func (n *node) fakeRestore(script string) (restore func(w *Firewall)) {
	n.t.Helper()
	actual, err := programs{}.LookPath("iptables-" + n.backend + "-restore")
	if err != nil {
		n.t.Fatal(err)
	}
	dir := n.t.TempDir()
	text := fmt.Sprintf("#!/bin/sh\nactual=%s\ninput=$(cat)\n%s\n", actual, script)
	if err := os.WriteFile(filepath.Join(dir, filepath.Base(actual)), []byte(text), 0o700); err != nil {
		n.t.Fatal(err)
	}
	path := os.Getenv("PATH")
	n.t.Setenv("PATH", dir+":"+path)
	return func(w *Firewall) {
		n.t.Setenv("PATH", path)
		w.tools[netfilter.IPv4].restore = actual
	}
}

// Programs on a node without the SCTP match: one refuses, the other leaves the match out with a warning.
func TestNodeWithoutExtension(t *testing.T) {
	scripts := map[string]string{
		"refuses": `case "$input" in *"-p sctp"*) echo 'Error: Extension sctp is not here' >&2; exit 1;; esac
echo "$input" | $actual "$@"`,
		"warns": `echo "$input" | sed 's/-p sctp//' | $actual "$@" || exit
case "$input" in *"-p sctp"*) echo 'Warning: Extension sctp revision 0 not supported, missing kernel module?' >&2;; esac`,
	}
	onEach(t, func(n *node) {
		for name, script := range scripts {
			n.apply(n.firewall(), netfilter.Ruleset{})
			restore := n.fakeRestore(script)
			r := groups(map[string]string{"b": "-p sctp -g WARREN-ALLOWED", "d": "-p sctp -g WARREN-ALLOWED"})
			w := n.firewall()
			for range 2 {
				_, err := w.Apply(n.t.Context(), r)
				var closed *ClosedError
				if !errors.As(err, &closed) || len(closed.Chains) != 2 || !strings.Contains(err.Error(), "Extension sctp") {
					n.t.Fatalf("%s: error is %v", name, err)
				}
				for _, g := range []string{"a", "b", "c", "d", "e"} {
					n.checkGroup(netfilter.IPv4, g, g == "b" || g == "d")
					n.checkGroup(netfilter.IPv6, g, false)
				}
				w.Forget()
			}
			restore(w)
			later(w)
			n.apply(w, r)
			n.checkGroup(netfilter.IPv4, "b", false)
			if changes := n.apply(n.firewall(), r); changes != (Changes{}) {
				n.t.Errorf("%s: a new Firewall wrote %+v", name, changes)
			}
		}
	})
}

// TestFaultWhileClosing lets each write of an apply that closes chains fail once; the warning makes what stands in the
// kernel look right when it is not. The next apply must not believe it.
func TestFaultWhileClosing(t *testing.T) {
	warns := `echo "$input" | sed 's/-p sctp//' | $actual "$@" || exit
case "$input" in *"-p sctp"*) echo 'Warning: Extension sctp revision 0 not supported' >&2;; esac`
	r := groups(map[string]string{"b": "-p sctp -g WARREN-ALLOWED", "e": "-p sctp -g WARREN-ALLOWED"})
	// closing returns a node on which the groups stand, and a Firewall whose program warns, with faults.
	closing := func(t *testing.T, x *faults) (*node, *Firewall, func(*Firewall)) {
		t.Helper()
		n := newNode(t, "nft")
		n.apply(n.firewall(), groups(nil))
		restore := n.fakeRestore(warns)
		w := n.firewall()
		x.into(w)
		return n, w, restore
	}
	var writes []int
	var want string
	t.Run("none", func(t *testing.T) {
		var x faults
		n, w, _ := closing(t, &x)
		if _, err := w.Apply(t.Context(), r); err == nil {
			t.Fatal("no chain was closed")
		}
		for i, call := range x.calls {
			if strings.Contains(call, "-restore") {
				writes = append(writes, i+1)
			}
		}
		want = n.state()
	})
	if len(writes) < 6 {
		t.Fatalf("only %d writes", len(writes))
	}
	for _, failAt := range writes {
		for _, afterwards := range []bool{false, true} {
			for _, gone := range []bool{false, true} {
				t.Run(fmt.Sprintf("%d_%t_%t", failAt, afterwards, gone), func(t *testing.T) {
					x := faults{failAt: failAt, afterwards: afterwards}
					n, w, restore := closing(t, &x)
					if _, err := w.Apply(t.Context(), r); err == nil {
						t.Error("no error")
					}
					x.failAt = 0
					if gone {
						restore(w)
						later(w)
						n.apply(w, r)
						for _, g := range []string{"b", "e"} {
							if got := n.rules(netfilter.IPv4, "mangle", group(g)); len(got) != 2 || !strings.Contains(got[0], "-p sctp") {
								t.Errorf("group %s has %q", g, got)
							}
						}
						return
					}
					_, err := w.Apply(t.Context(), r)
					var closed *ClosedError
					if !errors.As(err, &closed) || len(closed.Chains) != 2 {
						t.Errorf("error is %v", err)
					}
					w.Forget() // what could not be removed waits for the next audit
					if _, err := w.Apply(t.Context(), r); !errors.As(err, &closed) {
						t.Errorf("error is %v", err)
					}
					if diff := cmp.Diff(want, n.state()); diff != "" {
						t.Errorf("the end differs:\n%s", diff)
					}
				})
			}
		}
	}
}

// One bad chain among many costs few attempts.
func TestAttemptsToClose(t *testing.T) {
	n := newNode(t, "nft")
	r := sample()
	for i := range 64 {
		rules := []netfilter.Rule{rule("", "-j DROP")}
		if i == 41 {
			rules[0].Args = []string{"-j", "REJECT"}
		}
		r.V4.Chains = append(r.V4.Chains, netfilter.Chain{
			Table: "mangle", Name: netfilter.Name("I", fmt.Sprint(i)), Rules: rules, Closable: []string{"shop/x"},
		})
	}
	changes, err := n.firewall().Apply(t.Context(), r)
	var closed *ClosedError
	if !errors.As(err, &closed) || len(closed.Chains) != 1 {
		t.Fatalf("error is %v", err)
	}
	// 16 runs without any refusal: 4 tables and 4 hooks a family. 15 more: the chains in two parts, six times halved, and closed.
	if changes.Execs > 16+15 {
		t.Errorf("%d runs", changes.Execs)
	}
}

func TestRefused(t *testing.T) {
	exit := exec.CommandContext(t.Context(), "false").Run()
	killed := exec.CommandContext(t.Context(), "sh", "-c", "kill -9 $$").Run()
	for text, c := range map[string]struct {
		err  error
		want bool
	}{
		"nothing": {nil, false},
		"input":   {fmt.Errorf("rule: %w: words", exit), true},
		"warning": {fmt.Errorf("rule: %w: words", errWarned), true},
		"killed":  {fmt.Errorf("rule: %w", killed), false},
		"missing": {fmt.Errorf("running: %w", exec.ErrNotFound), false},
		"lock":    {fmt.Errorf("%w: Another app is currently holding the xtables lock. Stopped waiting after 10s.", exit), false},
	} {
		if got := refused(c.err); got != c.want {
			t.Errorf("%s: refused is %t", text, got)
		}
	}
}

package firewall

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

	"github.com/warren-cni/warren/pkg/netfilter"
)

func TestBadRuleIsNamed(t *testing.T) {
	bad := map[string]struct{ args, want string }{
		"option":  {"-p tcp --bogus 3 -j DROP", "--bogus"},
		"match":   {"-m nosuch -j DROP", "nosuch"},
		"set":     {"-m set --match-set WARREN-NOPE src -j DROP", "WARREN-NOPE"},
		"address": {"-s 1.2.3.400 -j DROP", "1.2.3.400"},
	}
	onEach(t, func(n *node) {
		t := n.t
		for name, c := range bad {
			r := sample()
			chainIn(&r.V4, "WARREN-MASQ").Rules = []netfilter.Rule{
				rule("", "-o eth+ -j MASQUERADE"), rule("shop/bad egress 1", c.args),
			}
			_, err := n.firewall().Apply(t.Context(), r)
			if err == nil {
				t.Errorf("%s: no error", name)
				continue
			}
			for _, want := range []string{c.want, "nat table (ipv4)", `"shop/bad egress 1"`, "WARREN-MASQ"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%s: the error does not name %s: %v", name, want, err)
				}
			}
			// The other tables, and the other family, stand; the gate is shut.
			for _, place := range [][2]string{{"mangle", "FORWARD"}, {"raw", "PREROUTING"}, {"filter", "FORWARD"}} {
				if len(n.rules(netfilter.IPv4, place[0], place[1])) == 0 {
					t.Errorf("%s: no hook in %v", name, place)
				}
			}
			if len(n.rules(netfilter.IPv6, "nat", "POSTROUTING")) == 0 {
				t.Errorf("%s: no hook in the other family", name)
			}
			if got := n.members(netfilter.ReadySet(netfilter.IPv6)); len(got) > 0 {
				t.Errorf("%s: the gate is open for %q", name, got)
			}
		}
		n.apply(n.firewall(), sample())
	})
}

// What opens is left alone when what closes could not be made.
func TestNothingOpensWithoutGuards(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		r := sample()
		chainIn(&r.V4, "WARREN-POLICY").Rules = []netfilter.Rule{rule("shop/bad", "-j REJECT")} // the kernel refuses it in mangle
		_, err := n.firewall().Apply(t.Context(), r)
		if err == nil || !strings.Contains(err.Error(), "mangle table (ipv4)") {
			t.Fatalf("error is %v", err)
		}
		if got := n.rules(netfilter.IPv4, "filter", "FORWARD"); len(got) > 0 {
			t.Errorf("the filter table accepts: %q", got)
		}
		if got := n.rules(netfilter.IPv6, "filter", "FORWARD"); len(got) == 0 {
			t.Error("the other family has not been written")
		}
	})
}

// A program that leaves out a match writes a warning and succeeds; the chain is then not what was asked for.
func TestWarningIsAnError(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		n.apply(n.firewall(), netfilter.Ruleset{})
		actual, err := programs{}.LookPath("iptables-" + n.backend + "-restore")
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
		script := filepath.Join(dir, "iptables-"+n.backend+"-restore")
		warn := fmt.Sprintf("#!/bin/sh\n%s \"$@\"\necho 'Warning: Extension set revision 0 not supported, missing kernel module?' >&2\n", actual)
		if err := os.WriteFile(script, []byte(warn), 0o700); err != nil {
			t.Fatal(err)
		}
		w := n.firewall()
		for range 2 { // the hashes in the kernel say that all is well, but the second apply must not believe it
			_, err := w.Apply(t.Context(), sample())
			if err == nil || !strings.Contains(err.Error(), "Extension set revision 0 not supported") {
				t.Fatalf("error is %v", err)
			}
			if got := n.members(netfilter.ReadySet(netfilter.IPv4)); len(got) > 0 {
				t.Errorf("the gate is open for %q", got)
			}
		}
		if err := os.Remove(script); err != nil {
			t.Fatal(err)
		}
		w.tools[netfilter.IPv4].restore = actual
		if changes := n.apply(w, sample()); changes.RuleBytes == 0 {
			t.Error("the chains written with a warning were not written again")
		}
		if changes := n.apply(w, sample()); changes != (Changes{}) {
			t.Errorf("wrote %+v once all was well", changes)
		}
	})
}

// The next daemon does not believe rules that were written with a warning either, although their hashes are right.
func TestSuspicionOutlivesTheDaemon(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		restore := n.fakeRestore(`echo "$input" | sed 's/-p sctp//' | $actual "$@" || exit
case "$input" in *"-p sctp"*) echo 'Warning: Extension sctp revision 0 not supported' >&2;; esac`)
		r := sample()
		chainIn(&r.V4, "WARREN-POLICY").Rules[0] = rule("shop/api ingress 0", "-p sctp -j RETURN")
		w := n.firewall()
		if _, err := w.Apply(t.Context(), r); !errors.Is(err, errWarned) {
			t.Fatalf("error is %v", err)
		}
		restore(w)
		for _, want := range []bool{true, false} { // the first writes the chains, and the second believes them
			if changes := n.apply(n.firewall(), r); (changes.RuleBytes > 0) != want {
				t.Errorf("a new Firewall wrote %+v", changes)
			}
		}
		if got := n.rules(netfilter.IPv4, "mangle", "WARREN-POLICY"); len(got) != 2 || !strings.Contains(got[0], "-p sctp") {
			t.Errorf("the chain has %q", got)
		}
		if strings.Contains(n.state(), suspectChain) {
			t.Error("the table is still marked")
		}
	})
}

func TestMissingProgramIsNamed(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := New(t.Context(), newNode(t, "").options())
	if err == nil || !strings.Contains(err.Error(), "install the package iptables") {
		t.Errorf("error is %v", err)
	}
}

func TestCancelledApplyCanBeRepeated(t *testing.T) {
	n := newNode(t, "nft")
	w := n.firewall()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.Apply(ctx, sample()); err == nil {
		t.Error("a cancelled apply succeeded")
	}
	n.apply(w, sample())
	if changes := n.apply(n.firewall(), sample()); changes != (Changes{}) {
		t.Errorf("wrote %+v", changes)
	}
}

func TestSetOfAnotherType(t *testing.T) {
	n := newNode(t, "nft")
	name := peers(netfilter.IPv4)
	n.run("ipset create " + name + " hash:net,port")
	w := n.firewall()
	n.apply(w, sample())
	if got := n.run("ipset list -t " + name); !strings.Contains(got, "Type: hash:net\n") {
		t.Errorf("the set is %s", got)
	}
	r := sample()
	setIn(&r.V4, name).Type = netfilter.HashIP
	setIn(&r.V4, name).Entries = addresses("10.9.9.9")
	if _, err := w.Apply(t.Context(), r); err == nil || !strings.Contains(err.Error(), "replacing set "+name+" by a hash:ip") {
		t.Errorf("with rules that refer to it the error is %v", err)
	}
}

func TestBadMembers(t *testing.T) {
	bad := map[string]struct {
		set   string
		entry netfilter.Entry
		want  string
	}{
		"zero length":   {peers(netfilter.IPv4), netfilter.Entry{Prefix: netip.MustParsePrefix("0.0.0.0/0")}, "0.0.0.0/0"},
		"unmasked":      {peers(netfilter.IPv4), netfilter.Entry{Prefix: netip.MustParsePrefix("10.0.0.1/8")}, "bits after its prefix"},
		"not single":    {netfilter.ReadySet(netfilter.IPv4), addresses("10.0.0.0/8")[0], "not a single address"},
		"other family":  {peers(netfilter.IPv4), addresses("fd00::1")[0], "fd00::1"},
		"bad protocol":  {ports(netfilter.IPv4), netfilter.Entry{Prefix: addresses("10.0.0.1")[0].Prefix, Protocol: "tpc"}, `"tpc"`},
		"zero protocol": {ports(netfilter.IPv4), netfilter.Entry{Prefix: addresses("10.0.0.1")[0].Prefix}, `""`},
	}
	n := newNode(t, "nft")
	for name, c := range bad {
		w, r := n.firewall(), sample()
		set := setIn(&r.V4, c.set)
		set.Entries = netfilter.Entries(append(slices.Clone(set.Entries), c.entry))
		_, err := w.Apply(t.Context(), r)
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), c.set) {
			t.Errorf("%s: error is %v", name, err)
		}
		if got, want := len(n.members(c.set)), len(set.Entries)-1; c.set != netfilter.ReadySet(netfilter.IPv4) && got != want {
			t.Errorf("%s: %d of the good members are in, want %d", name, got, want)
		}
		n.apply(w, netfilter.Ruleset{})
	}
}

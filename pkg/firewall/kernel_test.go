package firewall

import (
	"bytes"
	"context"
	"log/slog"
	"net/netip"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// backends are the iptables variants that everything is tried with.
var backends = []string{"nft", "legacy"}

// onEach runs a test with each backend, each in a network namespace of its own.
func onEach(t *testing.T, test func(n *node)) {
	t.Helper()
	for _, backend := range backends {
		t.Run(backend, func(t *testing.T) { test(newNode(t, backend)) })
	}
}

// node is a network namespace with an iptables variant.
type node struct {
	t       testing.TB
	backend string
	log     bytes.Buffer
}

// newNode moves the test's goroutine into a new network namespace. Its thread is never unlocked, so it and the namespace
// end with the goroutine.
func newNode(tb testing.TB, backend string) *node {
	tb.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		tb.Fatalf("making a network namespace (needs root): %v", err)
	}
	return &node{t: tb, backend: backend}
}

func (n *node) options() Options {
	return Options{Log: slog.New(slog.NewTextHandler(&n.log, nil)), Backend: n.backend, Now: func() time.Time { return time.Unix(0, 0) }}
}

// firewall returns a Firewall that knows nothing yet, as that of a daemon that has just started.
func (n *node) firewall() *Firewall {
	n.t.Helper()
	w, err := New(n.t.Context(), n.options())
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(w.Close)
	return w
}

// apply applies a ruleset, which must succeed.
func (n *node) apply(w *Firewall, r netfilter.Ruleset) Changes {
	n.t.Helper()
	changes, err := w.Apply(n.t.Context(), r)
	if err != nil {
		n.t.Fatal(err)
	}
	return changes
}

// run runs a command in the namespace and returns its output.
func (n *node) run(line string) string {
	n.t.Helper()
	args := words(line)
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err != nil {
		n.t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

// iptables runs a command of both families.
func (n *node) iptables(args string) {
	n.t.Helper()
	n.run("iptables-" + n.backend + " " + args)
	n.run("ip6tables-" + n.backend + " " + args)
}

// rules returns the rules of a chain, in the words of iptables -S.
func (n *node) rules(family netfilter.Family, table, chain string) []string {
	n.t.Helper()
	program := "iptables-"
	if family == netfilter.IPv6 {
		program = "ip6tables-"
	}
	var rules []string
	for line := range strings.Lines(n.run(program + n.backend + " -t " + table + " -S " + chain)) {
		if rule, ok := strings.CutPrefix(strings.TrimSpace(line), "-A "+chain+" "); ok {
			rules = append(rules, rule)
		}
	}
	return rules
}

// members returns the members of a set, sorted.
func (n *node) members(set string) []string {
	n.t.Helper()
	var members []string
	for line := range strings.Lines(n.run("ipset save " + set)) {
		if member, ok := strings.CutPrefix(strings.TrimSpace(line), "add "+set+" "); ok {
			members = append(members, member)
		}
	}
	slices.Sort(members)
	return members
}

// state returns everything in the packet filter, in an order that does not depend on how it came about.
func (n *node) state() string {
	n.t.Helper()
	var lines []string
	for _, program := range []string{"iptables-", "ip6tables-"} {
		for _, table := range []string{"raw", "mangle", "nat", "filter"} {
			for line := range strings.Lines(n.run(program + n.backend + "-save -t " + table)) {
				if line[0] == ':' || line[0] == '-' {
					line, _, _ = strings.Cut(strings.TrimSpace(line), " [") // counters
					lines = append(lines, program+table+" "+line)
				}
			}
		}
	}
	// Chains are listed in the order of their making. The order of the rules of one chain counts.
	chain := func(line string) string { return strings.Join(strings.Fields(line + " -")[:3], " ") }
	slices.SortStableFunc(lines, func(a, b string) int { return strings.Compare(chain(a), chain(b)) })
	sets := strings.Split(n.run("ipset save"), "\n")
	for i, line := range sets {
		sets[i], _, _ = strings.Cut(line, " initval ") // random
	}
	slices.Sort(sets)
	return strings.Join(lines, "\n") + strings.Join(sets, "\n")
}

// addresses returns entries of addresses or prefixes in the words of ipset.
func addresses(list ...string) []netfilter.Entry {
	var entries []netfilter.Entry
	for _, s := range list {
		if a, err := netip.ParseAddr(s); err == nil {
			entries = append(entries, netfilter.Address(a))
			continue
		}
		entries = append(entries, netfilter.Entry{Prefix: netip.MustParsePrefix(s)})
	}
	return netfilter.Entries(entries)
}

// rule returns a rule from words.
func rule(comment, args string) netfilter.Rule {
	return netfilter.Rule{Args: strings.Fields(args), Comment: comment}
}

// names of the sample's sets.
func peers(f netfilter.Family) string { return netfilter.SetName(f, "P", "peers") }
func ports(f netfilter.Family) string { return netfilter.SetName(f, "N", "ports") }

// sample returns a ruleset with every kind of thing in every table. Both families are alike.
func sample() netfilter.Ruleset {
	return netfilter.Ruleset{V4: half(netfilter.IPv4), V6: half(netfilter.IPv6)}
}

func half(f netfilter.Family) netfilter.Rules {
	ready, gate := netfilter.ReadySet(f), "-i wrn+ -m set ! --match-set "+netfilter.ReadySet(f)+" src -j DROP"
	members := map[netfilter.Family][2][]netfilter.Entry{
		netfilter.IPv4: {addresses("10.1.0.2", "10.1.0.3"), addresses("10.2.0.0/16", "0.0.0.0/1", "10.9.9.9")},
		netfilter.IPv6: {addresses("fd00::2", "fd00::3"), addresses("fd00:2::/64", "8000::/1", "fd00::9")},
	}[f]
	port := members[0][0]
	port.Protocol, port.Port = "sctp", 8080
	return netfilter.Rules{
		Sets: []netfilter.Set{
			{Name: ports(f), Type: netfilter.HashIPPort, Entries: []netfilter.Entry{port}},
			{Name: peers(f), Type: netfilter.HashNet, Entries: members[1]},
			{Name: ready, Type: netfilter.HashIP, Role: netfilter.Gate, Entries: members[0]},
		},
		Chains: []netfilter.Chain{
			{Table: "filter", Name: "WARREN-ACCEPT", Rules: []netfilter.Rule{rule("", "-i wrn+ -j ACCEPT"), rule("", "-o wrn+ -j ACCEPT")}},
			{Table: "mangle", Name: "WARREN-FORWARD", Rules: []netfilter.Rule{
				rule("start gate", gate),
				rule("", "-m conntrack --ctstate ESTABLISHED,RELATED -j RETURN"),
				rule("", "-j WARREN-POLICY"),
			}},
			{Table: "mangle", Name: "WARREN-POLICY", Rules: []netfilter.Rule{
				rule("shop/api ingress 0", "-m set --match-set "+peers(f)+" src -m set --match-set "+ports(f)+" dst,dst -j RETURN"),
				rule("shop/api", "-j DROP"),
			}},
			{Table: "nat", Name: "WARREN-MASQ", Rules: []netfilter.Rule{rule("", "-o eth+ -j MASQUERADE")}},
			{Table: "raw", Name: "WARREN-SOURCE", Rules: []netfilter.Rule{rule("", "-i wrn+ -m rpfilter --invert -j DROP")}},
		},
		Hooks: []netfilter.Hook{
			{Table: "filter", BuiltIn: "FORWARD", Chain: "WARREN-ACCEPT", Append: true},
			{Table: "mangle", BuiltIn: "FORWARD", Chain: "WARREN-FORWARD"},
			{Table: "nat", BuiltIn: "POSTROUTING", Chain: "WARREN-MASQ"},
			{Table: "raw", BuiltIn: "PREROUTING", Chain: "WARREN-SOURCE"},
		},
	}
}

// chainIn returns a chain of a half, to be changed.
func chainIn(r *netfilter.Rules, name string) *netfilter.Chain {
	i := slices.IndexFunc(r.Chains, func(c netfilter.Chain) bool { return c.Name == name })
	return &r.Chains[i]
}

// setIn returns a set of a half, to be changed.
func setIn(r *netfilter.Rules, name string) *netfilter.Set {
	i := slices.IndexFunc(r.Sets, func(s netfilter.Set) bool { return s.Name == name })
	return &r.Sets[i]
}

package policy_test

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/internal/trace"
	"github.com/warren-cni/warren/pkg/internal/world"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// TestFlushedOpensNothing empties every set and every chain of random clusters, one after the other, and every table and all sets
// together: what was denied stays so. Only where two tables are emptied nothing is left to deny it.
func TestFlushedOpensNothing(t *testing.T) {
	const clusters = 40
	seed := rand.Uint64()
	emptied, denied, opened := 0, 0, 0
	for i := range clusters {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		s := world.New(r)
		rules, _ := policy.Compile(s)
		all := netfilter.Merge(guard.Compile(guard.Config{Encrypted: true, Ready: readyIn(s, r)}), rules)
		for _, f := range netfilter.Families {
			text := all.Of(f).Render(f)
			closed := deniedBy(t, s, f, text)
			denied += len(closed)
			for _, names := range flushes(all.Of(f)) {
				emptied++
				for _, p := range passing(t, closed, flushed(text, names)) {
					t.Errorf("with %s emptied, %+v passes", names, p)
				}
			}
			opened += len(passing(t, closed, flushed(text, slices.Concat(chainsOf(all.Of(f), "mangle"), chainsOf(all.Of(f), "filter")))))
		}
		if t.Failed() {
			t.Fatalf("in world %d of seed %d\n%s\n%s", i, seed, describe(s), all.Render())
		}
	}
	if emptied < 20*clusters || denied < 100*clusters || opened < denied {
		t.Errorf("seed %d: %d flushes, %d packets denied of which %d pass without any rules are too few to prove anything", seed, emptied, denied, opened)
	}
}

// flushes are the names that another program may empty at once: one set, one chain, all sets, or the chains of a table.
func flushes(r *netfilter.Rules) [][]string {
	var all [][]string
	var sets []string
	for _, s := range r.Sets {
		all, sets = append(all, []string{s.Name}), append(sets, s.Name)
	}
	for _, c := range r.Chains {
		all = append(all, []string{c.Name})
	}
	return append(all, sets, chainsOf(r, "mangle"), chainsOf(r, "filter"))
}

// chainsOf are the names of the chains of a table.
func chainsOf(r *netfilter.Rules, table string) []string {
	var names []string
	for _, c := range r.Chains {
		if c.Table == table {
			names = append(names, c.Name)
		}
	}
	return names
}

// flushed is the text without what is in some sets and chains.
func flushed(text string, names []string) string {
	lines := slices.DeleteFunc(strings.Split(text, "\n"), func(line string) bool {
		words := strings.Fields(line)
		return len(words) > 1 && (words[0] == "add" || words[0] == "-A") && slices.Contains(names, words[1])
	})
	return strings.Join(lines, "\n")
}

// deniedBy are the packets of one family that a text denies: what begins a connection, and what looks like its answer.
func deniedBy(t *testing.T, s cluster.Snapshot, f netfilter.Family, text string) []trace.Packet {
	t.Helper()
	places := interfaces(s)
	var all []trace.Packet
	for _, flow := range flows(places) {
		if netfilter.FamilyOf(flow.Src) != f {
			continue
		}
		p := firstPacket(places, flow)
		all = append(all, p)
		if flow.Protocol == cluster.TCP {
			p.Flags = "SA"
			all = append(all, p)
		}
	}
	pass := passing(t, all, text)
	return slices.DeleteFunc(all, func(p trace.Packet) bool { return slices.Contains(pass, p) })
}

// passing are the packets that a text lets pass.
func passing(t *testing.T, packets []trace.Packet, text string) []trace.Packet {
	t.Helper()
	filter, err := trace.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	var pass []trace.Packet
	for _, p := range packets {
		verdict, err := filter.Forward(p)
		if err != nil {
			t.Fatal(err)
		}
		if verdict.Target == "" {
			pass = append(pass, p)
		}
	}
	return pass
}

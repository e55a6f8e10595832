package firewall

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// TestPlanHooks tries random built-in chains: in the end every hook stands once and where it should, others' rules stand as
// they did, and at no moment does a hook that stood stand neither itself nor by its stand-in.
func TestPlanHooks(t *testing.T) {
	wanted := []netfilter.Hook{
		{BuiltIn: "FORWARD", Chain: "WARREN-A"},
		{BuiltIn: "FORWARD", Chain: "WARREN-B"},
		{BuiltIn: "FORWARD", Chain: "WARREN-C", Append: true},
	}
	a, b, c := hookRule(wanted[0]), hookRule(wanted[1]), hookRule(wanted[2])
	stale := hookRule(netfilter.Hook{Chain: "WARREN-OLD"})
	alphabet := []string{a, b, c, stale, movingRule(a), "-j ACCEPT", "-i eth7 -j WARREN-A", `-m comment --comment "say -j WARREN-A" -j DROP`}
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	for range 5000 {
		start := make([]string, random.IntN(7))
		for i := range start {
			start[i] = alphabet[random.IntN(len(alphabet))]
		}
		rules := start
		for _, op := range planHooks(map[string][]string{"FORWARD": start}, wanted) {
			before := rules
			rules = op.apply(rules)
			for _, hook := range []string{a, b} {
				if standsIn(before, hook) && !standsIn(rules, hook) {
					t.Fatalf("seed %d: %q passes through %q without %s", seed, start, rules, hook)
				}
			}
			if slices.Contains(before, c) && !slices.Contains(rules, c) {
				t.Fatalf("seed %d: %q passes through %q without %s", seed, start, rules, c)
			}
		}
		others := func(rules []string) []string {
			return slices.DeleteFunc(slices.Clone(rules), isHook)
		}
		if len(rules) < 3 || rules[0] != a || rules[1] != b || !slices.Contains(rules, c) || len(others(rules)) != len(rules)-3 {
			t.Fatalf("seed %d: %q ends as %q", seed, start, rules)
		}
		if !slices.Equal(others(rules), others(start)) {
			t.Fatalf("seed %d: other rules %q became %q", seed, others(start), others(rules))
		}
		if again := planHooks(map[string][]string{"FORWARD": rules}, wanted); len(again) > 0 {
			t.Fatalf("seed %d: %q needs %v", seed, rules, again)
		}
	}
}

// standsIn says whether the hook or its stand-in is among the rules.
func standsIn(rules []string, hook string) bool {
	return slices.Contains(rules, hook) || slices.Contains(rules, movingRule(hook))
}

func TestWords(t *testing.T) {
	for rule, want := range map[string]string{
		`-i wrn+ -j WARREN-A`:                         "-i|wrn+|-j|WARREN-A",
		`-m comment --comment "a b" -g WARREN-A`:      "-m|comment|--comment|a b|-g|WARREN-A",
		`--comment "say \"-j X\" c:\\ " -j ACCEPT -x`: `--comment|say "-j X" c:\ |-j|ACCEPT|-x`,
		``: "",
	} {
		if got := strings.Join(words(rule), "|"); got != want {
			t.Errorf("%s splits into %s, want %s", rule, got, want)
		}
	}
	for rule, want := range map[string]string{
		`--comment "-j X" -j Y`: "Y", `-p tcp -g Z`: "Z", `-p tcp`: "", `-j`: "", ``: "",
	} {
		if got := jumpTarget(rule); got != want {
			t.Errorf("%s jumps to %q, want %q", rule, got, want)
		}
	}
}

package policy_test

import (
	"maps"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/internal/trace"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// Who asks for the most decides what is logged: the policy, its namespace, or the operator. What is logged passes as it would
// anyway, and no other rule differs.
func TestLogged(t *testing.T) {
	const none, denied, all = cluster.LogNone, cluster.LogDenied, cluster.LogAll
	plain := rulesOf(logging(none, none, none).Ruleset())
	for name, c := range map[string]struct {
		policy, namespace, operator cluster.LogMode
		denied, allowed             bool
	}{
		"nobody":               {none, none, none, false, false},
		"policy, denied":       {denied, none, none, true, false},
		"policy, all":          {all, none, none, true, true},
		"namespace, denied":    {none, denied, none, true, false},
		"namespace, all":       {none, all, none, true, true},
		"operator, denied":     {none, none, denied, true, false},
		"operator, all":        {none, none, all, true, true},
		"policy more than all": {all, denied, none, true, true},
		"operator least":       {none, all, denied, true, true},
	} {
		compiler := logging(c.policy, c.namespace, c.operator)
		rules := compiler.Ruleset()
		for src, pass := range map[string]bool{"10.0.2.2": true, "10.0.9.9": false} {
			verdict := walk(t, rules, src, "10.0.1.2")
			if passes := verdict.Target == ""; passes != pass {
				t.Errorf("%s: %s passes: %v", name, src, passes)
			}
			prefix, want := "D:", c.denied
			if pass {
				prefix, want = "A:", c.allowed
			}
			if logged := len(verdict.Logged) > 0; logged != want {
				t.Errorf("%s: %s is logged as %q, want something is %v", name, src, verdict.Logged, want)
			}
			for _, text := range verdict.Logged {
				chain, ok := strings.CutPrefix(text, prefix)
				direction, policies, known := compiler.Group(chain)
				if !ok || !known || direction != "ingress" || !slices.Equal(policies, []string{"shop/api"}) {
					t.Errorf("%s: %s is logged as %q, which tells of %s by %s", name, src, text, direction, policies)
				}
			}
		}
		without := slices.DeleteFunc(rulesOf(rules), func(r string) bool { return strings.Contains(r, "NFLOG") })
		if !slices.Equal(without, plain) {
			t.Errorf("%s: the other rules are\n%s\nand not\n%s", name, strings.Join(without, "\n"), strings.Join(plain, "\n"))
		}
	}
	if _, _, ok := logging(none, none, none).Group("WARREN-I-AAAAAAAAAAAAAAAA"); ok {
		t.Error("a chain that is not there has a group")
	}
}

// A namespace that asks for it later, and not any more, has the rules of all its groups written, and those of no other namespace.
func TestNamespaceLogsLater(t *testing.T) {
	c := logging(cluster.LogNone, cluster.LogNone, cluster.LogNone)
	before := rulesOf(c.Ruleset())
	say := func(mode cluster.LogMode) netfilter.Change {
		return c.Update(cluster.Delta{Namespaces: map[string]*cluster.Namespace{
			"shop": {Name: "shop", Log: mode}, "other": {Name: "other", Log: mode},
		}}).Change
	}
	if change := say(cluster.LogDenied); len(change.V4.Write) != 1 || len(change.V4.Sets)+len(change.V4.Delete) > 0 {
		t.Errorf("to log changes %+v", change)
	}
	if change := say(cluster.LogDenied); !change.Empty() {
		t.Errorf("to log again changes %+v", change)
	}
	say(cluster.LogNone)
	if after := rulesOf(c.Ruleset()); !slices.Equal(after, before) {
		t.Errorf("what is not logged any more leaves\n%s", strings.Join(after, "\n"))
	}
}

// logging returns a compiler of a local pod that one remote pod may reach.
func logging(of, namespace, operator cluster.LogMode) *policy.Compiler {
	s := one(cluster.Policy{Log: of, Pods: labels.Everything(), Ingress: true, IngressRules: []cluster.Rule{
		{AnyPort: true, Peers: []cluster.Peer{{Pods: labels.Everything()}}},
	}})
	s.Namespaces[0].Log = namespace
	c := policy.NewCompiler(s.Self, policy.Options{Log: operator})
	c.Update(s.Delta())
	return c
}

// rulesOf lists rules with their chains, without their hashes.
func rulesOf(r netfilter.Ruleset) []string {
	list := map[string]bool{}
	for _, c := range r.V4.Chains {
		for _, rule := range c.Rules {
			list[c.Name+" "+strings.Join(rule.Args, " ")+" "+rule.Comment] = true
		}
	}
	return slices.Sorted(maps.Keys(list))
}

// walk sends the first packet of a TCP connection to a local pod.
func walk(t *testing.T, rules netfilter.Ruleset, src, dst string) trace.Verdict {
	t.Helper()
	to := netip.MustParseAddr(dst)
	all := netfilter.Merge(guard.Compile(guard.Config{Ready: []netip.Addr{to}}), rules)
	filter, err := trace.Parse(all.V4.Render(netfilter.IPv4))
	if err == nil {
		err = filter.Lint()
	}
	if err != nil {
		t.Fatal(err)
	}
	verdict, err := filter.Forward(trace.Packet{
		In: "eth0", Out: "wrn1", Src: netip.MustParseAddr(src), Dst: to, Protocol: "tcp", DstPort: 8, Flags: "S", State: "NEW",
	})
	if err != nil {
		t.Fatal(err)
	}
	return verdict
}

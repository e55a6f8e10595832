package policy_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// The chains of groups, and no others, may be closed: they lead nowhere but to the one chain that allows, so a DROP in their place lets
// through nothing that they would not, and they name the policies that are then not applied.
func TestGroupsAreClosable(t *testing.T) {
	closable := 0
	for _, in := range goldenCases(t) {
		snapshot, _ := loadCase(t, in)
		rules, _ := policy.Compile(snapshot)
		for _, f := range netfilter.Families {
			for _, c := range rules.Of(f).Chains {
				group := strings.HasPrefix(c.Name, "WARREN-I-") || strings.HasPrefix(c.Name, "WARREN-E-")
				if group != (len(c.Closable) > 0) {
					t.Errorf("%s: chain %s may be closed: %q", in, c.Name, c.Closable)
				}
				if !group {
					continue
				}
				closable++
				for _, r := range c.Rules {
					jump := strings.Join(r.Args[slices.IndexFunc(r.Args, func(a string) bool { return a == "-j" || a == "-g" }):][:2], " ")
					if !slices.Contains([]string{"-g WARREN-ALLOWED", "-j DROP", "-j NFLOG"}, jump) {
						t.Errorf("%s: %s in chain %s", in, r.Args, c.Name)
					}
				}
				for _, name := range c.Closable {
					if namespace, _, ok := strings.Cut(name, "/"); !ok || namespace == "" {
						t.Errorf("%s: chain %s comes from %q", in, c.Name, name)
					}
				}
			}
		}
	}
	if closable < 20 {
		t.Errorf("only %d chains of groups", closable)
	}
}

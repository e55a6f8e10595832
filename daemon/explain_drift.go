package main

import (
	"context"
	"fmt"
	"slices"

	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// comparer compares the kernel with a plan. Any goroutine may ask it.
type comparer interface {
	Drift(ctx context.Context, wanted netfilter.Ruleset) ([]firewall.Difference, error)
}

// kernel is what the daemon's node has, and what it wants to have.
type kernel struct {
	comparer

	// wanted returns the ruleset as it is when it is called.
	wanted func() netfilter.Ruleset
	// closed are the chains whose rules were refused.
	closed []firewall.ClosedChain
	// settle returns when what was wanted at its call is in the kernel, or cannot be; nil where nobody waits for that.
	settle func()
}

// compare finds where the kernel of the daemon's node is not as planned, in what decides about the verdicts.
func (e *explanation) compare(ctx context.Context, k kernel) {
	chains := e.ownChains()
	if len(chains) == 0 {
		return
	}
	lasting, err := k.lasting(ctx, func() netfilter.Ruleset { return deciding(k.wanted(), chains) }, e.touches)
	if err != nil {
		e.Notes = append(e.Notes, fmt.Sprintf("whether the kernel of node %s does as planned is not known: %v", e.Node, err))
		return
	}
	e.Drift = lasting
}

// lasting returns the differences that count and are still there when the kernel is asked again: what a step or a pod that just
// goes makes differ is not. That a chain is closed whose rules were refused is no difference.
func (k kernel) lasting(ctx context.Context, wanted func() netfilter.Ruleset, counts func(firewall.Difference) bool) ([]firewall.Difference, error) {
	var lasting []firewall.Difference
	for i := range 2 {
		if i > 0 && k.settle != nil {
			k.settle()
		}
		found, err := k.Drift(ctx, wanted())
		if err != nil {
			return nil, err
		}
		lasting = slices.DeleteFunc(found, func(d firewall.Difference) bool {
			known := func(c firewall.ClosedChain) bool { return c.Family == d.Family && c.Name == d.Chain }
			again := func(before firewall.Difference) bool { return before.String() == d.String() }
			return !counts(d) || slices.ContainsFunc(k.closed, known) || i > 0 && !slices.ContainsFunc(lasting, again)
		})
		if len(lasting) == 0 {
			break
		}
	}
	return lasting, nil
}

// ownChains are the groups of the pods that the daemon's node decides about; the empty name stands for a pod that is in none.
func (e *explanation) ownChains() []string {
	var chains []string
	for _, v := range e.Verdicts {
		for _, side := range []policy.Side{v.Egress, v.Ingress} {
			if side.Node == e.Node {
				chains = append(chains, side.Chain)
			}
		}
	}
	return chains
}

// deciding returns what of a ruleset may decide about the pods of some groups: all but the other groups.
func deciding(rules netfilter.Ruleset, groups []string) netfilter.Ruleset {
	return netfilter.Ruleset{V4: decidingRules(rules.V4, groups), V6: decidingRules(rules.V6, groups)}
}

func decidingRules(rules netfilter.Rules, groups []string) netfilter.Rules {
	isOther := func(c netfilter.Chain) bool { return len(c.Closable) > 0 && !slices.Contains(groups, c.Name) }
	others := map[string]bool{}
	for _, c := range rules.Chains {
		others[c.Name] = isOther(c)
	}
	named := map[string]bool{}
	for _, c := range rules.Chains {
		for _, r := range c.Rules {
			if others[c.Name] || slices.ContainsFunc(r.Args, func(arg string) bool { return others[arg] }) {
				continue
			}
			for _, arg := range r.Args {
				named[arg] = true
			}
		}
	}
	return netfilter.Rules{
		Sets:   slices.DeleteFunc(slices.Clone(rules.Sets), func(s netfilter.Set) bool { return !named[s.Name] }),
		Chains: slices.DeleteFunc(slices.Clone(rules.Chains), isOther),
		Hooks:  rules.Hooks,
	}
}

// touches tells whether a difference may matter for a verdict: one of its family, and of its addresses where it is about the
// members of a set.
func (e *explanation) touches(d firewall.Difference) bool {
	return slices.ContainsFunc(e.Verdicts, func(v judged) bool {
		holds := func(m netfilter.Entry) bool { return m.Prefix.Contains(v.Flow.Src) || m.Prefix.Contains(v.Flow.Dst) }
		return d.Family == netfilter.FamilyOf(v.Flow.Dst) && (len(d.Members) == 0 || slices.ContainsFunc(d.Members, holds))
	})
}

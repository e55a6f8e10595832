package firewall

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// ClosedError says that the kernel agrees with the ruleset but for some chains whose rules it refused: netfilter.Chain.Closed
// stands in their place, and the start gate is open. They are tried again when they change, and after Forget.
type ClosedError struct {
	Chains []ClosedChain
}

// ClosedChain is a chain that stands closed.
type ClosedChain struct {
	// Family is where it is closed: the other family's chain of this name may well stand.
	Family netfilter.Family
	Name   string
	// Objects are those that are not applied, as in netfilter.Chain.Closable.
	Objects []string
	// Err is what the kernel or iptables-restore says against the chain's rules.
	Err error
}

// Error implements error.
func (e *ClosedError) Error() string {
	lines := make([]string, len(e.Chains))
	for i, c := range e.Chains {
		lines[i] = fmt.Sprintf("chain %s (%s) is closed, without %s: %v", c.Name, c.Family, strings.Join(c.Objects, ", "), c.Err)
	}
	return strings.Join(lines, "\n")
}

// write replaces chains of a table, and closes those that are refused if they may be. It finds them by trying fewer at
// a time, because not every refusal names a rule. Closable chains lead to no others and the others lead to them, so they
// come first.
func (a *apply) write(ctx context.Context, p place, t *table, chains []netfilter.Chain) error {
	err := a.restore(ctx, p, netfilter.Delta{Table: p.table, Write: chains})
	closable, rest := part(chains)
	if !refused(err) || len(closable) == 0 {
		return err
	}
	single := len(chains) == 1
	// After a warning the chains stand, without what was left out of them: nothing may pass that way meanwhile.
	if errors.Is(err, errWarned) || single && !t.closed(chains[0]) {
		if closeErr := a.restore(ctx, p, netfilter.Delta{Table: p.table, Write: closed(closable)}); closeErr != nil {
			return errors.Join(err, closeErr)
		}
	}
	if single {
		t.chains[chains[0].Name] = chain{rules: chains[0].Rules, refused: err}
		return nil
	}
	if len(rest) == 0 {
		closable, rest = closable[:len(closable)/2], closable[len(closable)/2:]
	}
	err = a.write(ctx, p, t, closable)
	if err != nil {
		return err
	}
	return a.write(ctx, p, t, rest)
}

// part divides chains into those that may be closed and the others.
func part(chains []netfilter.Chain) (closable, rest []netfilter.Chain) {
	for _, c := range chains {
		if len(c.Closable) > 0 {
			closable = append(closable, c)
		} else {
			rest = append(rest, c)
		}
	}
	return closable, rest
}

// closed returns the closed form of the chains.
func closed(chains []netfilter.Chain) []netfilter.Chain {
	forms := make([]netfilter.Chain, len(chains))
	for i, c := range chains {
		forms[i] = c.Closed()
	}
	return forms
}

// closed says whether the closed form of a chain stands.
func (t *table) closed(c netfilter.Chain) bool {
	have := t.chains[c.Name]
	return have.refused != nil || have.holds(c.Closed().Rules)
}

// refusals returns those of the wanted chains of a family that stand closed.
func (t *table) refusals(f netfilter.Family, wanted []netfilter.Chain) []ClosedChain {
	var all []ClosedChain
	for _, w := range wanted {
		if err := t.chains[w.Name].refused; err != nil {
			all = append(all, ClosedChain{Family: f, Name: w.Name, Objects: w.Closable, Err: err})
		}
	}
	return all
}

package firewall

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// suspectChain is an empty chain that marks a table in which rules may stand that are not what their hashes say.
const suspectChain = netfilter.Prefix + "-SUSPECT"

// maxAttempts is how many refused writings of one table an apply makes to find the chains that are at fault. Those that
// are not tried then are closed until the next apply.
const maxAttempts = 100

// errNotTried is why a chain is closed whose rules were not tried.
var errNotTried = errors.New("not tried yet, because too many other chains were refused")

// stage writes the chains and hooks of some tables.
func (a *apply) stage(ctx context.Context, p *familyPlan, n int) error {
	if !a.whole && len(p.chains)+len(p.deleted)+len(a.broken) == 0 {
		return nil // only sets change
	}
	tables := stages()[n]
	return each(tables[:], func(table string) error {
		at := place{p.family, table}
		if err := a.write(ctx, at, a.ready(p, at), p.deleted[table]); err != nil {
			return err
		}
		if !a.whole {
			return nil
		}
		delete(a.suspect, at) // whatever was written with a warning was written again
		return a.hook(at, p.hooks)
	})
}

// ready returns the chains of a table that have to be written, as they may be written now, and notes which of them are closed.
func (a *apply) ready(p *familyPlan, at place) []netfilter.Chain {
	chains := p.chains[at.table]
	if len(a.broken) > 0 {
		chains = a.wanted(p, at.table)
	}
	var forms []netfilter.Chain
	for _, c := range chains {
		id := chainID{at, c.Name}
		r, known := a.refusals[id]
		if known && a.rests(r) && slices.EqualFunc(r.chain.Rules, c.Rules, netfilter.Rule.Equal) {
			forms = append(forms, c.Closed())
			continue
		}
		delete(a.refusals, id)
		form, err := a.mended(c)
		if err != nil {
			a.refusals[id] = refusal{chain: c, err: err}
		}
		forms = append(forms, form)
	}
	if len(forms) == 0 {
		return nil
	}
	return a.known.tables[at].differing(forms)
}

// write replaces and deletes chains of a table by one run of a program. Where that is refused, it finds the chains that are at
// fault and closes them, if they may be closed. The others lead to closable chains, so these come first, and before them what they may
// lead to: new chains that lead nowhere.
func (a *apply) write(ctx context.Context, at place, chains []netfilter.Chain, deleted []string) error {
	if len(chains)+len(deleted) == 0 {
		return nil
	}
	err := a.replace(ctx, at, chains, deleted)
	closable, rest := part(chains)
	if !refused(err) || len(closable) == 0 {
		return err
	}
	t := a.known.tables[at]
	// While it is unknown what may stand, nothing passes by what is to go. After a warning the chains stand, without what was
	// left out of them.
	standing := slices.DeleteFunc(slices.Clone(closable), func(c netfilter.Chain) bool {
		have, stands := t.chains[c.Name]
		return !errors.Is(err, errWarned) && (!stands || have.holds(c.Closed().Rules))
	})
	if err := a.close(ctx, at, standing); err != nil {
		return err
	}
	ends, rest := t.newEnds(rest)
	if len(ends) > 0 {
		if err := a.replace(ctx, at, ends, nil); err != nil {
			return err
		}
	}
	a.attempts = 0
	if err := a.try(ctx, at, closable); err != nil {
		return err
	}
	for _, c := range closable {
		if have, stands := t.chains[c.Name]; !stands || !have.holds(c.Rules) && !have.holds(c.Closed().Rules) {
			rest = append(rest, c.Closed())
		}
	}
	if len(rest)+len(deleted) == 0 {
		return nil
	}
	return a.replace(ctx, at, rest, deleted)
}

// try writes chains that may be closed, and notes which of them are refused. The program may name a rule; then the chains with
// such a rule come last, because they are likely to be refused, too. Otherwise it is found by trying fewer at a time.
func (a *apply) try(ctx context.Context, at place, chains []netfilter.Chain) error {
	if len(chains) == 0 {
		return nil
	}
	if a.attempts >= maxAttempts {
		a.refuse(at, chains, errNotTried, false)
		return nil
	}
	err := a.replace(ctx, at, chains, nil)
	if !refused(err) {
		return err
	}
	a.attempts++
	if errors.Is(err, errWarned) {
		if closeErr := a.close(ctx, at, chains); closeErr != nil {
			return errors.Join(err, closeErr)
		}
	}
	if len(chains) == 1 {
		a.refuse(at, chains, err, true)
		return nil
	}
	first, last := chains[:len(chains)/2], chains[len(chains)/2:]
	if named, ok := errors.AsType[*ruleError](err); ok {
		var guilty []netfilter.Chain
		guilty, first, last = suspects(chains, named)
		a.refuse(at, guilty, err, true)
	}
	if err := a.try(ctx, at, first); err != nil {
		return err
	}
	return a.try(ctx, at, last)
}

// suspects divides chains into the one that an error names, those that have no rule like the named one, and those that do.
func suspects(chains []netfilter.Chain, named *ruleError) (guilty, unlike, alike []netfilter.Chain) {
	kind := kindOf(strings.Fields(named.rule))
	for _, c := range chains {
		switch {
		case c.Name == named.chain:
			guilty = append(guilty, c)
		case slices.ContainsFunc(c.Rules, func(r netfilter.Rule) bool { return kindOf(r.Args) == kind }):
			alike = append(alike, c)
		default:
			unlike = append(unlike, c)
		}
	}
	return guilty, unlike, alike
}

// kindOf returns what a rule asks of iptables: its options, matches and target, without addresses, ports and names of sets.
func kindOf(args []string) string {
	var kind []string
	for i, word := range args {
		if strings.HasPrefix(word, "-") || i > 0 && slices.Contains([]string{"-m", "-p", "-j"}, args[i-1]) {
			kind = append(kind, word)
		}
	}
	return strings.Join(kind, " ")
}

// replace makes one change of a table and notes what stands then.
func (a *apply) replace(ctx context.Context, at place, chains []netfilter.Chain, deleted []string) error {
	err := a.restore(ctx, at, netfilter.Delta{Table: at.table, Write: chains, Delete: deleted})
	if err != nil {
		return err
	}
	t := a.known.tables[at]
	for _, c := range chains {
		t.hold(c)
	}
	for _, name := range deleted {
		delete(t.chains, name)
		delete(a.refusals, chainID{at, name})
	}
	return nil
}

// close writes the closed form of chains.
func (a *apply) close(ctx context.Context, at place, chains []netfilter.Chain) error {
	if len(chains) == 0 {
		return nil
	}
	forms := make([]netfilter.Chain, len(chains))
	for i, c := range chains {
		forms[i] = c.Closed()
	}
	return a.replace(ctx, at, forms, nil)
}

// refuse notes that chains stay closed, with rest for a while.
func (a *apply) refuse(at place, chains []netfilter.Chain, err error, rest bool) {
	var until time.Time
	if rest && a.now != nil {
		until = a.now().Add(min(retryEach*time.Duration(len(a.refusals)+len(chains)), retryAfter))
	}
	for _, c := range chains {
		a.refusals[chainID{at, c.Name}] = refusal{chain: c, err: err, until: until}
	}
}

// rests says whether it is too early to try refused rules again.
func (w *Firewall) rests(r refusal) bool { return w.now != nil && r.until.After(w.now()) }

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

// restore makes one change of one table.
func (a *apply) restore(ctx context.Context, at place, d netfilter.Delta) error {
	text := d.Render()
	a.changes.RuleBytes += len(text)
	a.changes.Execs++
	err := a.tools[at.family].write(ctx, text)
	if err == nil {
		return nil
	}
	// What was refused has changed nothing. After any other end of the program nobody knows.
	if errors.Is(err, errWarned) || !refused(err) && !locked(err) {
		a.mark(ctx, at)
	}
	return fmt.Errorf("restoring %s: %w", at, err)
}

// mark notes that a table may not be what its hashes say, here and in the kernel, where the daemon that comes next finds it, also when
// this one ends right now.
func (a *apply) mark(ctx context.Context, at place) {
	if a.suspect[at] {
		return
	}
	a.suspect[at] = true
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*lockWait*time.Second)
	defer cancel()
	d := netfilter.Delta{Table: at.table, Write: []netfilter.Chain{{Table: at.table, Name: suspectChain}}}
	a.changes.Execs++
	if err := a.tools[at.family].write(ctx, d.Render()); err != nil && !errors.Is(err, errWarned) {
		a.log.Warn("marking a table as not to be believed", "where", at.String(), "error", err)
	}
	a.known.tables[at].chains[suspectChain] = chain{}
}

// hook puts the hooks of a table right.
func (a *apply) hook(at place, wanted []netfilter.Hook) error {
	t := a.known.tables[at]
	wanted = slices.DeleteFunc(slices.Clone(wanted), func(h netfilter.Hook) bool { return h.Table != at.table })
	for _, op := range planHooks(t.others, wanted) {
		a.log.Info("changing a hook", "table", at.table, "family", at.family.String(), "chain", op.chain, "change", op.String())
		a.changes.Execs++
		if err := op.do(a.tools[at.family].jumps, at.table); err != nil {
			return fmt.Errorf("hooking into %s of %s: %w", op.chain, at, err)
		}
		t.others[op.chain] = op.apply(t.others[op.chain])
	}
	return nil
}

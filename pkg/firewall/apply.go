package firewall

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// apply is one run of Firewall.Apply.
type apply struct {
	*Firewall
	plans   map[netfilter.Family][]setPlan
	changes Changes
	closed  []ClosedChain
}

// run goes through the phases. Their order is the package's promise.
func (a *apply) run(ctx context.Context, r *netfilter.Ruleset) error {
	if err := a.readSets(r); err != nil {
		return err
	}
	for _, f := range netfilter.Families {
		a.plans[f] = planSets(a.known.sets, f, r.Of(f).Sets)
	}
	err := a.late(a.close)
	done := map[netfilter.Family]bool{}
	for _, f := range netfilter.Families {
		familyErr := a.family(ctx, f, r.Of(f))
		done[f] = familyErr == nil
		err = errors.Join(err, familyErr)
	}
	// The gate opens only when everything stands, in both families: a pod has addresses in both.
	if err == nil {
		err = a.late(a.open)
	}
	a.collect(ctx, r, done)
	return err
}

// late does a step with every set of the gate.
func (a *apply) late(step func(*setPlan) error) error {
	var errs []error
	for _, f := range netfilter.Families {
		for i := range a.plans[f] {
			if p := &a.plans[f][i]; p.Role == netfilter.Gate {
				errs = append(errs, step(p))
			}
		}
	}
	return errors.Join(errs...)
}

// family brings one family's sets, chains and hooks in order. A phase goes through all its parts even if one fails, but the next
// phase needs all of it: with a set that lacks members the new rules may not see that a pod is isolated, and without the new
// rules the old ones still need the members that are to go.
func (a *apply) family(ctx context.Context, f netfilter.Family, r *netfilter.Rules) error {
	plans := a.plans[f]
	var errs []error
	for i := range plans {
		errs = append(errs, a.grow(&plans[i]))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, stage := range stages() {
		err := each(stage[:], func(table string) error { return a.table(ctx, place{f, table}, r) })
		if err != nil {
			return err
		}
	}
	for i := range plans {
		errs = append(errs, a.close(&plans[i]))
	}
	return errors.Join(errs...)
}

// grow makes the set and puts in what it lacks, except for a set of the gate, which is only made.
func (a *apply) grow(p *setPlan) error {
	if p.replace {
		// Works only where no rule refers to it, and there is no other way: sets of different types cannot be swapped.
		a.changes.SetOps++
		if err := a.sets.Destroy(p.Name); err != nil {
			return fmt.Errorf("replacing set %s by a %s: %w", p.Name, p.Type, err)
		}
	}
	if p.have == nil || p.replace {
		a.changes.SetOps++
		if err := a.sets.Create(p.Name, *p.whole()); err != nil {
			return err
		}
	}
	switch {
	case p.enlarge:
		return a.enlarge(p)
	case p.Role == netfilter.Gate:
		return nil
	default:
		return a.fill(p)
	}
}

// fill adds the members that the set lacks.
func (a *apply) fill(p *setPlan) error {
	a.changes.SetOps += len(p.add)
	return a.sets.Add(p.Name, p.Type, p.add)
}

// open adds to a set of the gate what it lacks, as far as that may still enter: since the plan was made, others went on.
func (a *apply) open(p *setPlan) error {
	if len(p.add) == 0 || a.admit == nil {
		return a.fill(p)
	}
	return a.admit(p.add, func(members []netfilter.Entry) error {
		a.changes.SetOps += len(members)
		return a.sets.Add(p.Name, p.Type, members)
	})
}

// close removes the members that the set must not have. Doing it a second time is no change.
func (a *apply) close(p *setPlan) error {
	if len(p.remove) == 0 {
		return nil
	}
	a.changes.SetOps += len(p.remove)
	if err := a.sets.Remove(p.Name, p.Type, p.remove); err != nil {
		return err
	}
	p.remove = nil
	return nil
}

// enlarge puts a larger set with the old and the new members in the place of the old one.
func (a *apply) enlarge(p *setPlan) error {
	temporary := netfilter.Name("TMP", p.Name)
	members := slices.Concat(p.have.members, p.add)
	a.changes.SetOps += len(members) + 3
	// One may be left from an apply that was cut short.
	if err := a.sets.Destroy(temporary); err != nil {
		return err
	}
	err := a.sets.Create(temporary, set{typ: p.Type, family: p.family, max: capacity(len(members))})
	if err != nil {
		return err
	}
	if err := a.sets.Add(temporary, p.Type, members); err != nil {
		return err
	}
	if err := a.sets.Swap(p.Name, temporary); err != nil {
		return err
	}
	return a.sets.Destroy(temporary)
}

// table writes the chains that differ, and then the hooks, so that none ever leads to a chain that is neither complete nor closed.
func (a *apply) table(ctx context.Context, p place, r *netfilter.Rules) error {
	t, err := a.readTable(ctx, p)
	if err != nil {
		return err
	}
	wanted := chainsOf(r, p.table)
	if chains := t.rewrite(wanted); len(chains) > 0 {
		if err := a.write(ctx, p, t, chains); err != nil {
			return err
		}
		delete(a.suspect, p) // whatever was written with a warning was written again
	}
	t.hold(wanted)
	a.closed = append(a.closed, t.refusals(p.family, wanted)...)
	return a.hook(t, p, hooksOf(r, p.table))
}

// restore makes one change of one table.
func (a *apply) restore(ctx context.Context, p place, d netfilter.Delta) error {
	text := d.Render()
	a.changes.RuleBytes += len(text)
	a.changes.Execs++
	err := a.tools[p.family].write(ctx, text)
	if err != nil {
		// What was refused has changed nothing. After any other end of the program nobody knows.
		if errors.Is(err, errWarned) || !refused(err) {
			a.suspect[p] = true
		}
		return fmt.Errorf("restoring %s: %w", p, err)
	}
	return nil
}

// hook puts the hooks of a table right.
func (a *apply) hook(t *table, p place, wanted []netfilter.Hook) error {
	for _, op := range planHooks(t.others, wanted) {
		a.log.Info("changing a hook", "table", p.table, "family", p.family.String(), "chain", op.chain, "change", op.String())
		a.changes.Execs++
		if err := op.do(a.tools[p.family].jumps, p.table); err != nil {
			return fmt.Errorf("hooking into %s of %s: %w", op.chain, p, err)
		}
		t.others[op.chain] = op.apply(t.others[op.chain])
	}
	return nil
}

// collect removes the chains and sets that nothing needs any more, of the families that are done, and notes what stands. What
// cannot be removed (somebody's own rule may refer to it) is logged and tried again after the next Forget: it is out of
// every packet's way, so it must not keep the gate shut.
func (a *apply) collect(ctx context.Context, r *netfilter.Ruleset, done map[netfilter.Family]bool) {
	for _, f := range netfilter.Families {
		if !done[f] {
			continue
		}
		for _, p := range places(f) {
			a.dispose(p.String(), func() error { return a.collectChains(ctx, p, r.Of(f)) })
		}
		for i := range a.plans[f] {
			a.known.sets[a.plans[f][i].Name] = a.plans[f][i].whole()
		}
	}
	if !done[netfilter.IPv4] || !done[netfilter.IPv6] {
		return // old rules of the family that is not done may still refer to old sets
	}
	for _, name := range leftOverSets(a.known.sets, r) {
		a.dispose(name, func() error {
			a.changes.SetOps++
			if err := a.sets.Destroy(name); err != nil {
				return err
			}
			delete(a.known.sets, name)
			return nil
		})
	}
}

// dispose removes something unless that was in vain since the last Forget.
func (a *apply) dispose(what string, remove func() error) {
	if a.known.stuck[what] {
		return
	}
	if err := remove(); err != nil {
		a.known.stuck[what] = true
		a.log.Warn("leaving behind what is no longer used", "where", what, "error", err)
	}
}

// collectChains deletes the chains of a table that are not wanted.
func (a *apply) collectChains(ctx context.Context, p place, r *netfilter.Rules) error {
	t, err := a.readTable(ctx, p)
	if err != nil {
		return err
	}
	names := t.leftOver(chainsOf(r, p.table))
	if len(names) == 0 {
		return nil
	}
	if err := a.restore(ctx, p, netfilter.Delta{Table: p.table, Delete: names}); err != nil {
		return err
	}
	for _, name := range names {
		delete(t.chains, name)
	}
	return nil
}

// places returns every table of a family.
func places(f netfilter.Family) []place {
	var all []place
	for _, stage := range stages() {
		for _, table := range stage {
			all = append(all, place{f, table})
		}
	}
	return all
}

// chainsOf returns the chains of one table.
func chainsOf(r *netfilter.Rules, table string) []netfilter.Chain {
	return slices.DeleteFunc(slices.Clone(r.Chains), func(c netfilter.Chain) bool { return c.Table != table })
}

// hooksOf returns the hooks of one table.
func hooksOf(r *netfilter.Rules, table string) []netfilter.Hook {
	return slices.DeleteFunc(slices.Clone(r.Hooks), func(h netfilter.Hook) bool { return h.Table != table })
}

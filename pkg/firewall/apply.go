package firewall

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// apply is one run of Firewall.Apply, which is about the whole, or of Firewall.Patch.
type apply struct {
	*Firewall
	whole   bool
	changes Changes
	// attempts is how often chains were tried that turned out to be refused.
	attempts int
}

// run goes through the phases. Their order is the package's promise.
func (a *apply) run(ctx context.Context, plans []*familyPlan) error {
	// Who has left the cluster's rules must not pass because the gate still lets him.
	err := a.gates(plans, a.leave)
	if err != nil {
		return err
	}
	for _, p := range plans {
		familyErr := a.family(ctx, p)
		p.done = familyErr == nil
		err = errors.Join(err, familyErr)
	}
	// The gate opens only when everything stands, in both families: a pod has addresses in both.
	if err == nil {
		err = a.gates(plans, a.open)
	}
	a.collect(ctx, plans)
	return err
}

// gates does a step with every set of the gate.
func (a *apply) gates(plans []*familyPlan, step func(*setPlan) error) error {
	var errs []error
	for _, p := range plans {
		if p.has(netfilter.Gate) {
			errs = append(errs, each(p.ofRole(netfilter.Gate), step))
		}
	}
	return errors.Join(errs...)
}

// ofRole returns the plans for the sets of one role.
func (p *familyPlan) ofRole(r netfilter.Role) []*setPlan {
	var plans []*setPlan
	for i := range p.sets {
		if p.sets[i].Role == r {
			plans = append(plans, &p.sets[i])
		}
	}
	return plans
}

// family brings one family's sets, chains and hooks in order. A phase goes through all its parts even if one fails, but the next
// phase needs all of it, except that who is to be isolated is isolated without the chains, too.
func (a *apply) family(ctx context.Context, p *familyPlan) error {
	// The gate's first: who cannot be isolated is taken out of it.
	if p.creates {
		err := errors.Join(each(p.ofRole(netfilter.Gate), a.create), a.createAll(p))
		if err != nil {
			return err
		}
	}
	steps := p.order()
	if err := a.moves(p, steps.first); err != nil {
		return err
	}
	if len(a.broken) > 0 {
		steps = steps.cautious()
	}
	if err := a.moves(p, steps.before); err != nil {
		return err
	}
	if err := a.stage(ctx, p, 0); err != nil {
		isolate := move{netfilter.Isolates, true}
		if slices.Contains(steps.after, isolate) {
			err = errors.Join(err, a.moves(p, []move{isolate}))
		}
		return err
	}
	if err := a.moves(p, steps.after); err != nil {
		return err
	}
	return a.stage(ctx, p, 1)
}

// createAll makes the sets that there are not and fills them: nothing refers to them yet.
func (a *apply) createAll(p *familyPlan) error {
	var errs []error
	for _, r := range [...]netfilter.Role{netfilter.Allows, netfilter.Selects, netfilter.Isolates, netfilter.Frees} {
		for i := range p.sets {
			if s := &p.sets[i]; s.Role == r && s.create {
				errs = append(errs, a.createFull(p, s))
			}
		}
	}
	return errors.Join(errs...)
}

// createFull makes a set with its members.
func (a *apply) createFull(p *familyPlan, s *setPlan) error {
	err := a.create(s)
	if err != nil {
		return a.fault(p, s, missing, err)
	}
	if err = a.enter(s); err != nil {
		err = a.fault(p, s, unfilled, err)
	}
	s.add = nil
	return err
}

// moves goes through steps with sets.
func (a *apply) moves(p *familyPlan, list []move) error {
	var errs []error
	for _, m := range list {
		if !p.has(m.role) {
			continue
		}
		if err := a.move(p, m); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// move lets the members of all sets of a role enter or leave.
func (a *apply) move(p *familyPlan, m move) error {
	is := overfull
	if m.enter {
		is = unfilled
	}
	var sets []*setPlan
	var errs []error
	for i := range p.sets {
		s := &p.sets[i]
		if s.Role != m.role || len(s.moving(m.enter)) == 0 {
			continue
		}
		if s.stands == nil {
			continue // it could not be made
		}
		if m.enter {
			if err := a.makeRoom(s); err != nil {
				errs = append(errs, a.fault(p, s, is, err))
				continue
			}
		}
		sets = append(sets, s)
	}
	if len(sets) == 0 {
		return errors.Join(errs...)
	}
	for i, err := range a.update(m.enter, sets...) {
		if err != nil {
			errs = append(errs, a.fault(p, sets[i], is, err))
		}
	}
	return errors.Join(errs...)
}

// create makes a set that there is not, empty.
func (a *apply) create(s *setPlan) error {
	if !s.create {
		return nil
	}
	if s.replace {
		// Works only where no rule refers to it, and there is no other way: sets of different types cannot be swapped.
		a.changes.SetOps++
		delete(a.known.sets, s.Name)
		if err := a.sets.Destroy(s.Name); err != nil {
			return fmt.Errorf("replacing set %s by a %s: %w", s.Name, s.Type, err)
		}
	}
	a.changes.SetOps++
	made := set{typ: s.Type, family: s.family, max: capacity(len(s.add))}
	if err := a.sets.Create(s.Name, made); err != nil {
		return err
	}
	a.note(s, &made)
	a.retry(s.Name)
	return nil
}

// enter adds the members that the set lacks.
func (a *apply) enter(s *setPlan) error {
	if len(s.add) == 0 {
		return nil
	}
	if err := a.makeRoom(s); err != nil {
		return err
	}
	return errors.Join(a.update(true, s)...)
}

// leave removes the members that the set must not have.
func (a *apply) leave(s *setPlan) error {
	if len(s.remove) == 0 {
		return nil
	}
	return errors.Join(a.update(false, s)...)
}

// update lets the members of sets enter or leave, those of all sets together. It returns an error for each set, or nil where there is
// none.
func (a *apply) update(enter bool, sets ...*setPlan) []error {
	a.lists = a.lists[:0]
	for _, s := range sets {
		members := s.moving(enter)
		a.lists = append(a.lists, memberList{s.Name, s.Type, members})
		a.changes.SetOps += len(members)
	}
	do := a.sets.Remove
	if enter {
		do = a.sets.Add
	}
	errs := do(a.lists...)
	for i, s := range sets {
		if errs == nil || errs[i] == nil {
			s.stands.move(enter, a.lists[i].members)
		}
	}
	clear(a.lists)
	return errs
}

// open adds to a set of the gate what it lacks, as far as that may enter: not who should be isolated and is not, and since the
// plan was made, others went on.
func (a *apply) open(s *setPlan) error {
	if kept := a.keptOut(); len(kept) > 0 {
		s.add = slices.DeleteFunc(slices.Clone(s.add), func(e netfilter.Entry) bool { return kept[e.Prefix.Addr()] })
	}
	if len(s.add) == 0 || a.admit == nil {
		return a.enter(s)
	}
	return a.admit(s.add, func(members []netfilter.Entry) error {
		admitted := *s
		admitted.add = members
		return a.enter(&admitted)
	})
}

// makeRoom puts a larger set with the same members in the place of one that those who enter would outgrow. A set that other programs
// change cannot be made anew: what they take out meanwhile would come back.
func (a *apply) makeRoom(s *setPlan) error {
	if s.Role == netfilter.Gate || s.stands.n+len(s.add) <= s.stands.max {
		return nil
	}
	temporary := netfilter.Name("TMP", s.Name)
	found, err := a.sets.List(s.Name)
	if err != nil {
		return err
	}
	larger := set{typ: s.Type, family: s.family}
	if found[s.Name] != nil {
		larger.members = found[s.Name].members
	}
	larger.max = capacity(len(larger.members) + len(s.add))
	a.changes.SetOps += len(larger.members) + 3
	// One may be left from an apply that was cut short.
	if err := a.sets.Destroy(temporary); err != nil {
		return err
	}
	if err := a.sets.Create(temporary, larger); err != nil {
		return err
	}
	if err := errors.Join(a.sets.Add(memberList{temporary, s.Type, larger.members})...); err != nil {
		return err
	}
	if err := a.sets.Swap(s.Name, temporary); err != nil {
		return err
	}
	a.note(s, &larger)
	return a.sets.Destroy(temporary)
}

// keptOut are the addresses that the gate keeps out because the sets that isolate them could not be changed.
func (w *Firewall) keptOut() map[netip.Addr]bool {
	kept := map[netip.Addr]bool{}
	for _, l := range w.lacking {
		for _, a := range l.KeptOut {
			kept[a] = true
		}
	}
	return kept
}

// collect removes the chains and sets that nothing needs any more, of the families that are done. What cannot be removed
// (somebody's own rule may refer to it) is logged and tried again after the next Forget: it is out of every packet's way, so
// it must not keep the gate shut.
func (a *apply) collect(ctx context.Context, plans []*familyPlan) {
	for _, p := range plans {
		if a.whole && p.done {
			for _, at := range places(p.family) {
				a.dispose(at.String(), func() error { return a.collectChains(ctx, at, p.chains[at.table]) })
			}
		}
	}
	if slices.ContainsFunc(plans, func(p *familyPlan) bool { return !p.done }) {
		return // old rules of the family that is not done may still refer to old sets
	}
	for _, p := range plans {
		for _, g := range p.gone {
			if a.known.sets[g.name] != nil {
				a.dispose(g.name, func() error { return a.destroy(g.name) })
			}
		}
	}
}

// destroy removes a set.
func (a *apply) destroy(name string) error {
	a.changes.SetOps++
	if err := a.sets.Destroy(name); err != nil {
		return err
	}
	delete(a.known.sets, name)
	delete(a.lacking, name)
	delete(a.broken, name)
	return nil
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
func (a *apply) collectChains(ctx context.Context, p place, wanted []netfilter.Chain) error {
	t := a.known.tables[p]
	names := t.leftOver(wanted)
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

package firewall

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// planWhole reads the kernel and plans what turns it into the ruleset.
func (a *apply) planWhole(ctx context.Context, r *netfilter.Ruleset) ([]*familyPlan, error) {
	before, stuck := a.known.sets, a.known.stuck
	a.Forget()
	a.known.stuck = stuck
	a.lacking, a.broken = map[string]ClosedSet{}, map[string]brokenSet{}
	have, err := a.sets.List("")
	if err != nil {
		return nil, err
	}
	for name, s := range have {
		a.known.sets[name] = stand(netfilter.Allows, s)
	}
	gone := leftOverSets(have, before, r)
	var plans []*familyPlan
	for _, f := range netfilter.Families {
		if err := a.readTables(ctx, f); err != nil {
			return nil, err
		}
		half := r.Of(f)
		// Whose family a set is that nobody wants any more does not matter: both must be done before it goes.
		p := &familyPlan{
			family: f, sets: planSets(have, f, half.Sets), gone: gone, chains: byTable(half.Chains), hooks: half.Hooks,
		}
		for i := range p.sets {
			if s := &p.sets[i]; !s.create {
				a.note(s, have[s.Name])
			}
		}
		a.forgetRefusals(p)
		a.compare(p)
		plans = append(plans, p)
	}
	return plans, nil
}

// planPatch plans a change of one family in p, which is empty.
func (w *Firewall) planPatch(p *familyPlan, f netfilter.Family, c *netfilter.RulesChange) error {
	p.family, p.chains = f, byTable(c.Write)
	if err := w.patchSets(p, c.Sets); err != nil {
		return err
	}
	for _, chain := range c.Delete {
		if p.deleted == nil {
			p.deleted = map[string][]string{}
		}
		if _, stands := w.known.tables[place{f, chain.Table}].chains[chain.Name]; stands {
			p.deleted[chain.Table] = append(p.deleted[chain.Table], chain.Name)
		}
	}
	w.compare(p)
	return nil
}

// compare sets what the plan says about its sets as a whole, and about the writing of chains.
func (w *Firewall) compare(p *familyPlan) {
	for i := range p.sets {
		s := &p.sets[i]
		p.roles |= 1 << s.Role
		p.creates = p.creates || s.create
	}
	p.writes = len(p.deleted) > 0
	for table, chains := range p.chains {
		t := w.known.tables[place{p.family, table}]
		for _, c := range t.differing(chains) {
			_, stands := t.chains[c.Name]
			p.writes = true
			p.edits = p.edits || stands && len(c.Closable) > 0
			p.comes = p.comes || !stands && t.unheard(c.Closable)
		}
	}
}

// readTables reads the tables of a family that are ours to write.
func (w *Firewall) readTables(ctx context.Context, f netfilter.Family) error {
	saved, err := w.tools[f].readAll(ctx)
	if err != nil {
		return fmt.Errorf("reading the rules (%s): %w", f, err)
	}
	for _, p := range places(f) {
		t := parseTable(saved[p.table])
		if _, marked := t.chains[suspectChain]; marked {
			w.suspect[p] = true
		}
		if w.suspect[p] {
			for name := range t.chains {
				t.chains[name] = chain{hashes: []string{"suspect"}}
			}
		}
		w.known.tables[p] = t
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

// byTable divides chains by their tables.
func byTable(chains []netfilter.Chain) map[string][]netfilter.Chain {
	if len(chains) == 0 {
		return nil // as often in a patch
	}
	tables := map[string][]netfilter.Chain{}
	for _, c := range chains {
		tables[c.Table] = append(tables[c.Table], c)
	}
	return tables
}

// chainsOf returns the chains of one table.
func chainsOf(r *netfilter.Rules, table string) []netfilter.Chain {
	return byTable(r.Chains)[table]
}

// hooksOf returns the hooks of one table.
func hooksOf(r *netfilter.Rules, table string) []netfilter.Hook {
	return slices.DeleteFunc(slices.Clone(r.Hooks), func(h netfilter.Hook) bool { return h.Table != table })
}

// forgetRefusals drops what is remembered of chains that are no longer wanted.
func (w *Firewall) forgetRefusals(p *familyPlan) {
	wanted := map[chainID]bool{}
	for table, chains := range p.chains {
		for _, c := range chains {
			wanted[chainID{place{p.family, table}, c.Name}] = true
		}
	}
	maps.DeleteFunc(w.refusals, func(id chainID, _ refusal) bool { return id.family == p.family && !wanted[id] })
}

package netfilter

import (
	"slices"
	"strings"
)

// Change turns one Ruleset into another that has the same hooks. It names only what differs, so that its size, and the cost
// of carrying it out, is that of the difference.
type Change struct {
	V4, V6 RulesChange
}

// RulesChange is one family's half of a Change, sorted by table and name.
type RulesChange struct {
	Sets []SetChange
	// Write are the chains that are new or have other rules, whole; Delete are those that are gone, with their names and tables.
	Write, Delete []Chain
}

// SetChange is the change of one set.
type SetChange struct {
	// Set is what the set is: all of it, Entries included, where it is New, and without Entries where it is not.
	Set

	// New and Gone are true for a set that is not in the one Ruleset or in the other.
	New, Gone bool
	// Add and Remove are the members that differ, sorted; both are empty where the set is New or Gone.
	Add, Remove []Entry
}

// Of returns the change of one family.
func (c *Change) Of(f Family) *RulesChange {
	if f == IPv6 {
		return &c.V6
	}
	return &c.V4
}

// Empty is true where nothing differs.
func (c *Change) Empty() bool { return c.V4.empty() && c.V6.empty() }

func (c *RulesChange) empty() bool { return len(c.Sets)+len(c.Write)+len(c.Delete) == 0 }

// Diff returns the change that turns one ruleset into another. Hooks are not part of it.
func Diff(from, to Ruleset) Change {
	return Change{V4: diffRules(&from.V4, &to.V4), V6: diffRules(&from.V6, &to.V6)}
}

func diffRules(from, to *Rules) RulesChange {
	var c RulesChange
	had, has := map[string]Set{}, map[string]Set{}
	for _, s := range from.Sets {
		had[s.Name] = s
	}
	for _, s := range to.Sets {
		has[s.Name] = s
		old, ok := had[s.Name]
		if !ok {
			c.Sets = append(c.Sets, SetChange{Set: s, New: true})
			continue
		}
		change := SetChange{Set: s}
		change.Entries = nil
		change.Add, change.Remove = DiffEntries(old.Entries, s.Entries)
		if s.Keeps {
			change.Remove = nil
		}
		if len(change.Add)+len(change.Remove) > 0 {
			c.Sets = append(c.Sets, change)
		}
	}
	for _, s := range from.Sets {
		if _, ok := has[s.Name]; !ok {
			s.Entries = nil
			c.Sets = append(c.Sets, SetChange{Set: s, Gone: true})
		}
	}
	slices.SortFunc(c.Sets, func(a, b SetChange) int { return strings.Compare(a.Name, b.Name) })
	c.Write, c.Delete = diffChains(from.Chains, to.Chains)
	return c
}

// DiffEntries returns what has to be added to and removed from a set; both lists are sorted.
func DiffEntries(have, want []Entry) (add, remove []Entry) {
	for len(have) > 0 && len(want) > 0 {
		switch c := have[0].Compare(want[0]); {
		case c < 0:
			remove, have = append(remove, have[0]), have[1:]
		case c > 0:
			add, want = append(add, want[0]), want[1:]
		default:
			have, want = have[1:], want[1:]
		}
	}
	return append(add, want...), append(remove, have...)
}

func diffChains(from, to []Chain) (write, gone []Chain) {
	type place struct{ table, name string }
	had := map[place]Chain{}
	for _, c := range from {
		had[place{c.Table, c.Name}] = c
	}
	for _, c := range to {
		old, ok := had[place{c.Table, c.Name}]
		if !ok || !slices.EqualFunc(old.Rules, c.Rules, Rule.Equal) {
			write = append(write, c)
		}
		delete(had, place{c.Table, c.Name})
	}
	for _, c := range had {
		gone = append(gone, Chain{Table: c.Table, Name: c.Name})
	}
	slices.SortFunc(write, Chain.Compare)
	slices.SortFunc(gone, Chain.Compare)
	return write, gone
}

// MergeChanges returns both changes, which concern different sets and chains, as one.
func MergeChanges(a, b Change) Change {
	return Change{V4: mergeRulesChanges(&a.V4, &b.V4), V6: mergeRulesChanges(&a.V6, &b.V6)}
}

func mergeRulesChanges(a, b *RulesChange) RulesChange {
	c := RulesChange{
		Sets: slices.Concat(a.Sets, b.Sets), Write: slices.Concat(a.Write, b.Write), Delete: slices.Concat(a.Delete, b.Delete),
	}
	slices.SortFunc(c.Sets, func(x, y SetChange) int { return strings.Compare(x.Name, y.Name) })
	slices.SortFunc(c.Write, Chain.Compare)
	slices.SortFunc(c.Delete, Chain.Compare)
	return c
}

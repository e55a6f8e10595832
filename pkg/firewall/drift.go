package firewall

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// Difference is one thing in which the kernel is not as planned.
type Difference struct {
	Family netfilter.Family `json:"family"`
	// Set is the set that differs, and Role what it is planned for; Table and Chain are the chain, one of ours or a built-in one that
	// leads to ours.
	Set   string         `json:"set,omitempty"`
	Role  netfilter.Role `json:"-"`
	Table string         `json:"table,omitempty"`
	Chain string         `json:"chain,omitempty"`
	// What is wrong, for example "lacks members" or "is closed".
	What string `json:"what"`
	// Detail is the rule or some of the members that it is about, for people; Members are all of them.
	Detail  string            `json:"detail,omitempty"`
	Members []netfilter.Entry `json:"-"`
}

// String returns the difference as a sentence.
func (d Difference) String() string {
	subject := "set " + d.Set
	if d.Chain != "" {
		subject = fmt.Sprintf("chain %s in %s", d.Chain, place{d.Family, d.Table})
	}
	if d.Detail == "" {
		return subject + " " + d.What
	}
	return subject + " " + d.What + ": " + d.Detail
}

// fewSets is how many sets are read one by one, rather than all that there are.
const fewSets = 64

// Drift compares the kernel with a ruleset and changes neither. It reads of the sets what the ruleset names. An Apply that runs meanwhile, or a pod that just goes, shows
// as a difference too, so one that counts is still there when asked again. Any goroutine may call it.
func (w *Firewall) Drift(ctx context.Context, r netfilter.Ruleset) ([]Difference, error) {
	sets, err := w.listed(r)
	if err != nil {
		return nil, err
	}
	var all []Difference
	for _, f := range netfilter.Families {
		all = append(all, driftOfSets(f, sets, r.Of(f).Sets)...)
		saved, err := w.tools[f].readAll(ctx)
		if err != nil {
			return nil, fmt.Errorf("reading the rules (%s): %w", f, err)
		}
		for _, p := range places(f) {
			t := parseTable(saved[p.table])
			all = append(all, driftOfChains(p, t, chainsOf(r.Of(f), p.table))...)
			all = append(all, driftOfHooks(p, t, hooksOf(r.Of(f), p.table))...)
		}
	}
	return all, nil
}

// listed reads the sets of a ruleset, or where these are many all of ours.
func (w *Firewall) listed(r netfilter.Ruleset) (map[string]*set, error) {
	wanted := slices.Concat(r.V4.Sets, r.V6.Sets)
	if len(wanted) > fewSets {
		return w.sets.List("")
	}
	all := make(map[string]*set, len(wanted))
	for _, s := range wanted {
		one, err := w.sets.List(s.Name)
		if err != nil {
			return nil, err
		}
		maps.Copy(all, one)
	}
	return all, nil
}

// driftOfSets compares the sets of one family. A set that is not wanted is in no packet's way.
func driftOfSets(f netfilter.Family, have map[string]*set, wanted []netfilter.Set) []Difference {
	var all []Difference
	for _, w := range wanted {
		d := Difference{Family: f, Set: w.Name, Role: w.Role}
		s := have[w.Name]
		switch {
		case s == nil:
			d.What = "is missing"
			all = append(all, d)
			continue
		case s.typ != w.Type || s.family != f:
			d.What, d.Detail = "has another type", fmt.Sprintf("%s (%s)", s.typ, s.family)
			all = append(all, d)
			continue
		}
		missing, extra := netfilter.DiffEntries(s.members, sorted(w.Entries))
		if len(missing) > 0 {
			d.What, d.Detail, d.Members = "lacks members", some(missing), missing
			all = append(all, d)
		}
		if len(extra) > 0 && !w.Keeps {
			d.What, d.Detail, d.Members = "has members that it should not have", some(extra), extra
			all = append(all, d)
		}
	}
	return all
}

// some names a few members.
func some(members []netfilter.Entry) string {
	const few = 5
	var names []string
	for _, e := range members[:min(few, len(members))] {
		names = append(names, e.String())
	}
	if more := len(members) - few; more > 0 {
		names = append(names, fmt.Sprintf("and %d more", more))
	}
	return strings.Join(names, ", ")
}

// driftOfChains compares the chains of one table. A chain that is not wanted has a hook or a jump that is not wanted, or is in
// no packet's way.
func driftOfChains(p place, t *table, wanted []netfilter.Chain) []Difference {
	var all []Difference
	for _, w := range wanted {
		d := Difference{Family: p.family, Table: p.table, Chain: w.Name}
		have, stands := t.chains[w.Name]
		switch {
		case !stands:
			d.What = "is missing"
		case have.holds(w.Rules):
			continue
		case len(w.Closable) > 0 && have.holds(w.Closed().Rules):
			d.What, d.Detail = "is closed, because its rules were refused", strings.Join(w.Closable, ", ")
		default:
			d.What = "has other rules"
		}
		all = append(all, d)
	}
	return all
}

// driftOfHooks compares the hooks of one table.
func driftOfHooks(p place, t *table, wanted []netfilter.Hook) []Difference {
	var all []Difference
	add := func(chain, what, detail string) {
		all = append(all, Difference{Family: p.family, Table: p.table, Chain: chain, What: what, Detail: detail})
	}
	hooks := map[string][]string{}
	for _, h := range wanted {
		rule, rules := hookRule(h), t.others[h.BuiltIn]
		hooks[h.BuiltIn] = append(hooks[h.BuiltIn], rule)
		i := slices.Index(rules, rule)
		if i < 0 {
			add(h.BuiltIn, "does not lead to", h.Chain)
			continue
		}
		if h.Append {
			continue
		}
		if ahead := slices.IndexFunc(rules[:i], func(other string) bool { return !isHook(other) }); ahead >= 0 {
			add(h.BuiltIn, "has a rule ahead of "+h.Chain, rules[ahead])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.others)) {
		for _, rule := range t.others[name] {
			if isHook(rule) && !slices.Contains(hooks[name], rule) {
				add(name, "leads to a chain that it should not lead to", jumpTarget(rule))
			}
		}
	}
	return all
}

package firewall

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// ClosedError says that the kernel agrees with the ruleset but for some chains and sets that it refused. What they concern is closed:
// netfilter.Chain.Closed stands in the place of a chain, the gate keeps out whom a set should isolate, and who is not in the sets that
// lead to rules is dropped. All else is enforced, and the start gate is open for it. Every Apply tries the sets again, and the
// chains after a while, or when they change.
type ClosedError struct {
	Chains []ClosedChain
	Sets   []ClosedSet
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

// ClosedSet is a set that is not as wanted.
type ClosedSet struct {
	Family netfilter.Family
	Name   string
	// Comment says what the set is, as in netfilter.Set.
	Comment string
	// Objects are those of the chains that refer to the set.
	Objects []string
	// KeptOut are the addresses that the gate keeps out, because the set would have to isolate them.
	KeptOut []netip.Addr
	// Err is what the kernel says.
	Err error
}

// Error implements error.
func (e *ClosedError) Error() string {
	var lines []string
	for _, c := range e.Chains {
		lines = append(lines, fmt.Sprintf("chain %s (%s) is closed, without %s: %v", c.Name, c.Family, strings.Join(c.Objects, ", "), c.Err))
	}
	for _, s := range e.Sets {
		lines = append(lines, fmt.Sprintf("set %s (%s; %s) of %s is not as wanted: %v",
			s.Name, s.Family, s.Comment, strings.Join(s.Objects, ", "), s.Err))
	}
	return strings.Join(lines, "\n")
}

// Unwrap returns what is said against the chains and sets.
func (e *ClosedError) Unwrap() []error {
	var errs []error
	for _, c := range e.Chains {
		errs = append(errs, c.Err)
	}
	for _, s := range e.Sets {
		errs = append(errs, s.Err)
	}
	return errs
}

// closedError returns what stands closed now, or nil.
func (w *Firewall) closedError() error {
	if len(w.refusals)+len(w.lacking) == 0 {
		return nil
	}
	e := &ClosedError{}
	for id, r := range w.refusals {
		e.Chains = append(e.Chains, ClosedChain{Family: id.family, Name: id.name, Objects: r.chain.Closable, Err: r.err})
	}
	slices.SortFunc(e.Chains, func(a, b ClosedChain) int {
		return cmp.Or(cmp.Compare(a.Family, b.Family), cmp.Compare(a.Name, b.Name))
	})
	for _, name := range slices.Sorted(maps.Keys(w.lacking)) {
		e.Sets = append(e.Sets, w.lacking[name])
	}
	return e
}

// Trying refused rules again takes some time for each chain, so the more stand closed, the longer they stay so before the next
// audit tries them: retryEach for each of them, retryAfter at most.
const (
	retryEach  = 3 * time.Second
	retryAfter = 3 * time.Minute
)

// chainID is a chain of a table and family.
type chainID struct {
	place
	name string
}

// refusal is why a chain stands closed.
type refusal struct {
	chain netfilter.Chain
	err   error
	// until is when the rules are tried again; zero where an Apply does that at once.
	until time.Time
}

// retry lets the next writing try the chains that refer to a set.
func (w *Firewall) retry(set string) {
	maps.DeleteFunc(w.refusals, func(_ chainID, r refusal) bool { return mentions(r.chain.Rules, set) })
}

// mentions says whether one of the rules has this word.
func mentions(rules []netfilter.Rule, word string) bool {
	return slices.ContainsFunc(rules, func(r netfilter.Rule) bool { return slices.Contains(r.Args, word) })
}

// shortcoming is what went wrong with a set.
type shortcoming uint8

const (
	missing  shortcoming = iota // it could not be made
	unfilled                    // members could not be added
	overfull                    // members could not be removed
)

// brokenSet is what a set is for that rules must not rely on, and what the kernel says.
type brokenSet struct {
	role netfilter.Role
	err  error
}

// fault closes what depends on a set that is not as it should be. Only where that is not possible it is an error.
func (a *apply) fault(p *familyPlan, s *setPlan, is shortcoming, err error) error {
	l := ClosedSet{Family: p.family, Name: s.Name, Comment: s.Comment, KeptOut: a.lacking[s.Name].KeptOut}
	l.Err = errors.Join(a.lacking[s.Name].Err, err)
	users := a.users(p, s.Name)
	for _, c := range users {
		l.Objects = append(l.Objects, c.Closable...)
	}
	slices.Sort(l.Objects)
	l.Objects = slices.Compact(l.Objects)
	if s.Role == netfilter.Selects && !leads(users, s.Name) {
		return err // a fence: it closes by itself
	}
	if is == missing || is == overfull && s.Role == netfilter.Allows || is == unfilled && s.Role == netfilter.Frees {
		a.broken[s.Name] = brokenSet{s.Role, err}
	}
	var out []netfilter.Entry
	switch {
	case s.Role == netfilter.Isolates && is != overfull:
		out = s.add
	case s.Role == netfilter.Selects && is == overfull:
		out = s.remove // the rules that it leads to are no longer theirs
	}
	for _, e := range out {
		l.KeptOut = append(l.KeptOut, e.Prefix.Addr())
	}
	a.lacking[s.Name] = l
	if shutErr := a.shut(p.family, out); shutErr != nil {
		return errors.Join(err, shutErr)
	}
	return nil
}

// shut takes addresses out of the gate.
func (a *apply) shut(f netfilter.Family, out []netfilter.Entry) error {
	if len(out) == 0 {
		return nil
	}
	for name, st := range a.known.sets {
		if st.role == netfilter.Gate && st.family == f {
			a.changes.SetOps += len(out)
			return errors.Join(a.sets.Remove(memberList{name, st.typ, out})...)
		}
	}
	return errors.New("there is no gate to keep them out")
}

// users returns the wanted chains that refer to a set.
func (a *apply) users(p *familyPlan, set string) []netfilter.Chain {
	var users []netfilter.Chain
	for _, at := range places(p.family) {
		for _, c := range a.wanted(p, at.table) {
			if mentions(c.Rules, set) {
				users = append(users, c)
			}
		}
	}
	return users
}

// wanted returns the chains of a table that are to stand after the plan: in a patch also those that stay.
func (a *apply) wanted(p *familyPlan, table string) []netfilter.Chain {
	chains := slices.Clone(p.chains[table])
	if a.whole {
		return chains
	}
	named := map[string]bool{}
	for _, c := range chains {
		named[c.Name] = true
	}
	for _, name := range p.deleted[table] {
		named[name] = true
	}
	t := a.known.tables[place{p.family, table}]
	for _, name := range slices.Sorted(maps.Keys(t.chains)) {
		r, refused := a.refusals[chainID{place{p.family, table}, name}]
		switch {
		case named[name]:
		case refused:
			chains = append(chains, r.chain)
		default:
			chains = append(chains, netfilter.Chain{
				Table: table, Name: name, Rules: t.chains[name].rules, Closable: t.chains[name].closable,
			})
		}
	}
	return chains
}

// leads says whether the chains use a set only to go on to a chain behind it. Whoever no rule leads anywhere is dropped.
func leads(users []netfilter.Chain, set string) bool {
	return !slices.ContainsFunc(users, func(c netfilter.Chain) bool {
		return slices.ContainsFunc(c.Rules, func(r netfilter.Rule) bool {
			return slices.Contains(r.Args, set) && !slices.Contains(r.Args, "-g")
		})
	})
}

// mended returns the chain as it may stand while sets are broken: closed where it may be, else without the rules that refer to a set
// that leads, isolates or frees, because whom these concern is dropped, kept out or judged by other rules. With another set in it, it
// comes back as it is and is refused.
func (a *apply) mended(c netfilter.Chain) (netfilter.Chain, error) {
	var errs []error
	rules := slices.DeleteFunc(slices.Clone(c.Rules), func(r netfilter.Rule) bool {
		for name, set := range a.broken {
			if slices.Contains(r.Args, name) {
				errs = append(errs, set.err)
				return set.role != netfilter.Allows
			}
		}
		return false
	})
	if len(errs) == 0 {
		return c, nil
	}
	if len(c.Closable) > 0 {
		return c.Closed(), errs[0]
	}
	c.Rules = rules
	return c, nil
}

package firewall

import (
	"maps"
	"slices"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// minCapacity is how many members a set may hold at least: a bound, not memory, so it is large enough that only an unusual
// set has to be made anew because it outgrew it.
const minCapacity = 1 << 20

// capacity returns the bound for a set that is to hold n members.
func capacity(n int) int {
	c := minCapacity
	for c < 2*n {
		c *= 2
	}
	return c
}

// setPlan is what has to happen to one wanted set.
type setPlan struct {
	netfilter.Set
	family netfilter.Family
	// have is the set that stands, nil when there is none.
	have *set
	// replace: a set of another type or family has the name.
	replace bool
	// enlarge: what it must hold until the rules have changed does not fit.
	enlarge     bool
	add, remove []netfilter.Entry
}

// planSets compares the sets that stand with those of one family that are wanted.
func planSets(have map[string]*set, f netfilter.Family, wanted []netfilter.Set) []setPlan {
	plans := make([]setPlan, 0, len(wanted))
	for _, w := range wanted {
		w.Entries = sorted(w.Entries)
		p := setPlan{Set: w, family: f, have: have[w.Name], add: w.Entries}
		if p.have != nil && (p.have.typ != w.Type || p.have.family != f) {
			p.replace = true
		} else if p.have != nil {
			p.add, p.remove = netfilter.DiffEntries(p.have.members, w.Entries)
			// A set that other programs change cannot be made anew: what they take out meanwhile would come back.
			p.enlarge = w.Role != netfilter.Gate && len(p.add) > 0 && len(p.have.members)+len(p.add) > p.have.max
		}
		plans = append(plans, p)
	}
	return plans
}

// whole returns what the set holds when the plan has been carried out.
func (p *setPlan) whole() *set {
	s := &set{typ: p.Type, family: p.family, max: capacity(len(p.Entries)), members: p.Entries}
	if p.have != nil && !p.replace && !p.enlarge {
		s.max = p.have.max
	}
	return s
}

// leftOverSets returns the names of the sets that stand and are not wanted, sorted.
func leftOverSets(have map[string]*set, r *netfilter.Ruleset) []string {
	left := maps.Clone(have)
	for _, f := range netfilter.Families {
		for _, w := range r.Of(f).Sets {
			delete(left, w.Name)
		}
	}
	return slices.Sorted(maps.Keys(left))
}

// sorted returns the members in order, each once. Plans are sorted already; a wrong order would take out members that
// are wanted, so it is not left to trust.
func sorted(members []netfilter.Entry) []netfilter.Entry {
	for i := 1; i < len(members); i++ {
		if members[i-1].Compare(members[i]) >= 0 {
			return netfilter.Entries(slices.Clone(members))
		}
	}
	return members
}

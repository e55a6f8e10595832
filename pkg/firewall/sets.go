package firewall

import (
	"fmt"
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

// standing is what is remembered of a set in the kernel: not its members, because a change names those that differ, and a whole
// apply reads them back.
type standing struct {
	typ    netfilter.SetType
	family netfilter.Family
	role   netfilter.Role
	// max is how many members fit, n is how many there are at most.
	max, n int
	// members are known of the sets that lead to rules or isolate, which hold pods of this node.
	members map[netfilter.Entry]struct{}
}

// stand notes a set with its members.
func stand(role netfilter.Role, s *set) *standing {
	st := &standing{typ: s.typ, family: s.family, role: role, max: s.max}
	if role == netfilter.Selects || role == netfilter.Isolates {
		st.members = map[netfilter.Entry]struct{}{}
	}
	st.move(true, s.members)
	return st
}

// move notes that members entered or left.
func (s *standing) move(enter bool, members []netfilter.Entry) {
	if enter {
		s.n += len(members)
	} else {
		s.n -= len(members)
	}
	if s.members == nil {
		return
	}
	for _, e := range members {
		if enter {
			s.members[e] = struct{}{}
		} else {
			delete(s.members, e)
		}
	}
}

// setPlan is what has to happen to one wanted set.
type setPlan struct {
	*netfilter.Set
	family netfilter.Family
	// stands is what is known of the set in the kernel, nil where there is none.
	stands *standing
	// create: there is none. replace: there is one of another type or family, which goes first.
	create, replace bool
	add, remove     []netfilter.Entry
}

// note remembers that a set of a plan is in the kernel with these members.
func (w *Firewall) note(s *setPlan, as *set) {
	s.stands = stand(s.Role, as)
	w.known.sets[s.Name] = s.stands
}

// moving are the members that are to enter or leave.
func (s *setPlan) moving(enter bool) []netfilter.Entry {
	if enter {
		return s.add
	}
	return s.remove
}

// planSets compares the sets that stand with those of one family that are wanted.
func planSets(have map[string]*set, f netfilter.Family, wanted []netfilter.Set) []setPlan {
	plans := make([]setPlan, 0, len(wanted))
	for i := range wanted {
		w := &wanted[i]
		entries := sorted(w.Entries)
		p := setPlan{Set: w, family: f}
		stands := have[w.Name]
		switch {
		case stands == nil:
			p.create, p.add = true, entries
		case stands.typ != w.Type || stands.family != f:
			p.create, p.replace, p.add = true, true, entries
		default:
			p.add, p.remove = netfilter.DiffEntries(stands.members, entries)
			if w.Keeps {
				p.remove = nil
			}
		}
		plans = append(plans, p)
	}
	return plans
}

// patchSets plans for the sets that a change names. It is an error where the change does not fit what stands.
func (w *Firewall) patchSets(p *familyPlan, changes []netfilter.SetChange) error {
	p.sets = slices.Grow(p.sets, len(changes))
	for i := range changes {
		c := &changes[i]
		st := w.known.sets[c.Name]
		_, lacking := w.lacking[c.Name]
		switch {
		case lacking && c.Role != netfilter.Allows:
			// Whom the gate keeps out because of it depends on all of its members.
			return fmt.Errorf("%w: set %s is not as it was wanted", ErrUnknown, c.Name)
		case st == nil && lacking && !c.New:
			// What needs it is closed until an apply can make it.
		case c.Gone && st != nil:
			p.gone = append(p.gone, goneSet{name: c.Name, known: true, role: st.role, members: st.members})
		case c.New && st == nil:
			p.sets = append(p.sets, setPlan{Set: &c.Set, family: p.family, create: true, add: sorted(c.Entries)})
		case !c.New && st != nil && st.typ == c.Type && st.family == p.family:
			p.sets = append(p.sets, setPlan{Set: &c.Set, family: p.family, stands: st, add: c.Add, remove: c.Remove})
		default:
			return fmt.Errorf("%w: set %s is not what the change takes it for", ErrUnknown, c.Name)
		}
	}
	return nil
}

// leftOverSets returns the sets that stand and are not wanted, sorted. before is what was known of them.
func leftOverSets(have map[string]*set, before map[string]*standing, r *netfilter.Ruleset) []goneSet {
	left := maps.Clone(have)
	for _, f := range netfilter.Families {
		for _, w := range r.Of(f).Sets {
			delete(left, w.Name)
		}
	}
	var gone []goneSet
	for _, name := range slices.Sorted(maps.Keys(left)) {
		g := goneSet{name: name}
		if st := before[name]; st != nil {
			g.known, g.role, g.members = true, st.role, st.members
		}
		gone = append(gone, g)
	}
	return gone
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

package firewall

import (
	"net/netip"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// move is a step through the sets of one role: their new members enter, or their old ones leave.
type move struct {
	role  netfilter.Role
	enter bool
}

// familyPlan is what has to happen in one family.
type familyPlan struct {
	family netfilter.Family
	sets   []setPlan
	// roles are those of the sets, a bit each; creates says that sets are made.
	roles   uint8
	creates bool
	// gone are sets that go at the end, with those of their members that are known.
	gone []goneSet
	// chains are those that are to stand, by table: all of them (Apply) or the ones that change (Patch); deleted are those that
	// go together with the change, by table.
	chains  map[string][]netfilter.Chain
	deleted map[string][]string
	// writes says that chains will be written; edits, that one that may be closed, so one with the rules of policies, gets others.
	// comes says that one of those has objects that no chain had before.
	writes, edits, comes bool
	hooks                []netfilter.Hook
	// done says that all of it has happened, except that gates opened and that what is gone was removed.
	done bool
}

// has says whether there are sets of a role.
func (p *familyPlan) has(r netfilter.Role) bool { return p.roles&(1<<r) != 0 }

// goneSet is a set that is no longer wanted. role and members are known only where this Firewall wrote it.
type goneSet struct {
	name    string
	known   bool
	role    netfilter.Role
	members map[netfilter.Entry]struct{}
}

// turn is the moves with which a change begins, those of the rest that come before the chains are written, and those after.
type turn struct{ first, before, after []move }

// The turns that there are, as familyPlan.order chooses them. Who is free is asked of those whom no other set knows, so nobody misses it
// who enters these sets first and leaves them last.
//
//nolint:gochecknoglobals // constants
var (
	passing = turn{
		first: []move{{netfilter.Frees, true}, {netfilter.Allows, true}, {netfilter.Allows, false}},
		after: []move{{netfilter.Frees, false}},
	}
	crossing = turn{
		first:  []move{{netfilter.Frees, true}, {netfilter.Allows, false}},
		before: []move{{netfilter.Isolates, true}, {netfilter.Selects, false}},
		after:  []move{{netfilter.Selects, true}, {netfilter.Isolates, false}, {netfilter.Allows, true}, {netfilter.Frees, false}},
	}
	parting = turn{
		first:  []move{{netfilter.Frees, true}, {netfilter.Allows, false}},
		before: []move{{netfilter.Selects, true}, {netfilter.Isolates, true}},
		after:  []move{{netfilter.Isolates, false}, {netfilter.Selects, false}, {netfilter.Allows, true}, {netfilter.Frees, false}},
	}
	joining = turn{
		first:  []move{{netfilter.Frees, true}, {netfilter.Allows, false}},
		before: []move{{netfilter.Selects, true}, {netfilter.Isolates, false}},
		after:  []move{{netfilter.Isolates, true}, {netfilter.Selects, false}, {netfilter.Allows, true}, {netfilter.Frees, false}},
	}
)

// order returns in which turn the sets change.
//
// Each pod has a verdict in each direction, and a packet passes when those of both its ends agree. So it must not happen that one
// end is judged by the new rules already, the other one still by the old ones, and both allow what each whole state denies at the
// other end. Members of the sets that allow are only those of both states until all else has changed. The rest turns with the one
// atomic step there is, the writing of the chains: before it everything is at most what the old state allows, afterwards at most what
// the new one does. That has a price: an address is isolated before the chains are there that judge it, or taken from one group
// before the other can have it, and in between its new connections are dropped. So where less will do, less is done:
//
//   - Where only one address changes its place, or all that change only lose rights, or only gain them, nothing can be mixed. Nobody
//     is isolated before his rules stand, nor keeps being so after they went.
//   - Where a policy comes that no chain had before, who is isolated already can only gain by it, and may be judged by the rules of
//     his old group a little longer.
//   - Where one address changes its place among those that are allowed, and nothing else, it enters before it leaves; but not where its
//     ports do: by these it is judged at its own end, too, and by its other places at the other one.
func (p *familyPlan) order() turn {
	c := p.census()
	one := c.judged.n <= 1 && !c.unknown && !p.edits
	parted := !one && (c.opens || p.edits) && (c.closes || p.edits)
	switch {
	case c.allowed.n <= 1 && !c.ports && c.judged.n == 0 && !c.opens && !c.closes && !p.writes:
		return passing
	case parted && (p.edits || c.grouped || c.ungrouped && !p.comes):
		return crossing
	case parted:
		return parting
	}
	return joining
}

// cautious returns the turn that goes on where somebody could not leave a set that allows: until the chains that ask that set are closed,
// nobody may come under them, nor be less isolated. Where one address passes from one such set to another, nobody does.
func (t turn) cautious() turn {
	if len(t.before) == 0 {
		return t
	}
	return crossing
}

// census is who changes place in a plan.
type census struct {
	// allowed are the addresses that enter or leave sets that allow, judged those whose own way to the rules changes.
	allowed, judged few
	// ports: some of the allowed change with their ports.
	ports bool
	// unknown: there may be more of the judged than are counted.
	unknown bool
	// opens: somebody is less isolated or leaves a group; closes: the reverse.
	opens, closes bool
	// grouped and ungrouped: somebody enters or leaves a group that stays.
	grouped, ungrouped bool
}

func (p *familyPlan) census() census {
	var c census
	for i := range p.sets {
		c.count(&p.sets[i])
	}
	for _, g := range p.gone {
		if g.known && g.role != netfilter.Selects && g.role != netfilter.Isolates {
			continue
		}
		c.opens = true
		c.unknown = c.unknown || !g.known
		for e := range g.members {
			c.judged.noteOne(e.Prefix)
		}
	}
	return c
}

// count takes the changes of one set.
func (c *census) count(s *setPlan) {
	switch s.Role {
	case netfilter.Gate, netfilter.Frees:
	case netfilter.Allows:
		if !s.create { // otherwise nothing refers to it
			c.allowed.note(s.add)
			c.allowed.note(s.remove)
			c.ports = c.ports || s.Type == netfilter.HashIPPort && len(s.add)+len(s.remove) > 0
		}
	case netfilter.Selects, netfilter.Isolates:
		c.closes = c.closes || s.create || len(s.add) > 0
		c.opens = c.opens || len(s.remove) > 0
		if s.Role == netfilter.Selects && !s.create {
			c.grouped = c.grouped || len(s.add) > 0
			c.ungrouped = c.ungrouped || len(s.remove) > 0
		}
		c.judged.note(s.add)
		c.judged.note(s.remove)
	}
}

// few counts addresses, as far as it matters: whether there is more than one.
type few struct {
	first netip.Prefix
	n     int
}

// note counts the addresses of members.
func (f *few) note(members []netfilter.Entry) {
	for _, e := range members {
		if f.n > 1 {
			return
		}
		f.noteOne(e.Prefix)
	}
}

// noteOne counts an address.
func (f *few) noteOne(p netip.Prefix) {
	switch {
	case f.n == 0:
		f.first, f.n = p, 1
	case f.first != p:
		f.n = 2
	}
}

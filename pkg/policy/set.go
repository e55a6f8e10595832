package policy

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// set is a set that rules refer to, shared by all that mean the same: the pods of a selection, the numbers that they give to a
// port, or the prefixes of blocks. It is made where a rule first needs it and goes with the last one, so none stands unused.
type set struct {
	// Set has in Entries what was there when they were last in use as a whole; later tells what came (true) and went since. Entries
	// are never changed, because others have them.
	netfilter.Set

	later  map[netfilter.Entry]bool
	family netfilter.Family
	// of is the selection whose pods are in the set; nil for blocks.
	of *selection
	// port is what a set of ports looks for on the pods; empty for other sets.
	port portName
	// refs counts the rules that refer to the set.
	refs int
	// fresh is true until the set has been handed over as new.
	fresh bool
}

// portName is what a policy calls a port.
type portName struct {
	name     string
	protocol cluster.Protocol
}

// numbers tells whether the port has that number on a pod.
func (p portName) numbers(pod *cluster.Pod, number uint16) bool {
	return slices.Contains(pod.Ports, cluster.NamedPort{Name: p.name, Protocol: p.protocol, Port: number})
}

// entriesOf appends the entries that a pod of the selection gives to the set.
func (s *set) entriesOf(pod *cluster.Pod, entries []netfilter.Entry) []netfilter.Entry {
	for _, a := range pod.Addresses {
		if netfilter.FamilyOf(a) != s.family {
			continue
		}
		e := netfilter.Address(a)
		if s.port == (portName{}) {
			entries = append(entries, e)
			continue
		}
		for _, named := range pod.Ports {
			if named.Name == s.port.name && named.Protocol == s.port.protocol {
				e.Protocol, e.Port = strings.ToLower(string(named.Protocol)), named.Port
				entries = append(entries, e)
			}
		}
	}
	return entries
}

// has tells whether an entry is in the set.
func (s *set) has(e netfilter.Entry) bool {
	if in, ok := s.later[e]; ok {
		return in
	}
	_, in := slices.BinarySearchFunc(s.Entries, e, netfilter.Entry.Compare)
	return in
}

// put adds an entry to the set, or removes it.
func (s *set) put(e netfilter.Entry, in bool) {
	if s.later == nil {
		s.later = map[netfilter.Entry]bool{}
	}
	s.later[e] = in
	if len(s.later) > 64+len(s.Entries)/4 { // so that what it costs is small for each of them
		s.whole()
	}
}

// whole brings Entries up to date, and returns the set.
func (s *set) whole() netfilter.Set {
	if len(s.later) == 0 {
		return s.Set
	}
	kept := make([]netfilter.Entry, 0, len(s.Entries)+len(s.later))
	for _, e := range s.Entries {
		if _, ok := s.later[e]; !ok {
			kept = append(kept, e)
		}
	}
	for e, in := range s.later {
		if in {
			kept = append(kept, e)
		}
	}
	s.Entries, s.later = netfilter.Entries(kept), nil
	return s.Set
}

// podSet returns the set of the pods of a selection.
func (c *Compiler) podSet(f netfilter.Family, s *selection) *set {
	return c.setOf(f, s, portName{})
}

// portSet returns the set of the addresses and numbers that the pods of a selection give to a named port.
func (c *Compiler) portSet(f netfilter.Family, s *selection, port cluster.Port) *set {
	return c.setOf(f, s, portName{port.Name, port.Protocol})
}

func (c *Compiler) setOf(f netfilter.Family, s *selection, port portName) *set {
	for _, x := range s.sets {
		if x.family == f && x.port == port {
			return x
		}
	}
	made := &set{family: f, of: s, port: port}
	made.Type, made.Comment = netfilter.HashIP, s.text
	made.Name = netfilter.SetName(f, "P", s.name...)
	if port != (portName{}) {
		made.Type, made.Comment = netfilter.HashIPPort, "port "+port.name+" of "+s.text
		made.Name = netfilter.SetName(f, "N", slices.Concat(s.name, []string{port.name, string(port.protocol)})...)
	}
	s.sets = append(s.sets, made)
	c.stir(s.scope)
	return c.introduce(made)
}

// blockSet returns the set of prefixes; its name is its content.
func (c *Compiler) blockSet(f netfilter.Family, prefixes []netip.Prefix) *set {
	parts := make([]string, len(prefixes))
	for i, p := range prefixes {
		parts[i] = p.String()
	}
	name := netfilter.SetName(f, "B", parts...)
	if s, ok := c.sets[name]; ok {
		return s
	}
	made := &set{family: f, Set: netfilter.Set{Name: name, Type: netfilter.HashNet, Comment: "ipBlocks"}}
	for _, p := range prefixes {
		made.Entries = append(made.Entries, netfilter.Entry{Prefix: p})
	}
	return c.introduce(made)
}

func (c *Compiler) introduce(s *set) *set {
	s.Role, s.fresh = netfilter.Allows, true
	c.sets[s.Name] = s
	c.fresh = append(c.fresh, s)
	return s
}

// release gives back what rules referred to. What nobody refers to in the end goes.
func (c *Compiler) release(uses []*set) {
	for _, s := range uses {
		s.refs--
		if s.refs == 0 {
			c.unused = append(c.unused, s)
		}
	}
}

// drop removes the sets that no rule refers to any more, and the selections that nobody asks for.
func (c *Compiler) drop() {
	for _, s := range c.unused {
		if s.refs > 0 || c.sets[s.Name] != s {
			continue
		}
		delete(c.sets, s.Name)
		if !s.fresh {
			gone := s.Set
			gone.Entries = nil
			c.changed(s, netfilter.SetChange{Set: gone, Gone: true})
		}
		if s.of == nil {
			continue
		}
		s.of.sets = slices.DeleteFunc(s.of.sets, func(x *set) bool { return x == s })
		if len(s.of.sets) == 0 {
			c.discard(s.of)
		}
	}
	c.unused = c.unused[:0]
}

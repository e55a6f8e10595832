package firewall

import (
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// table is what one table of one family holds that concerns us.
type table struct {
	// chains are ours, by name.
	chains map[string]chain
	// others are, by chain, the rules of the built-in chains, and of other programs' chains those that jump to ours, in
	// the words of iptables-save.
	others map[string][]string
}

// chain is what is known of a chain of ours.
type chain struct {
	// hashes are of the rules as read from the kernel: "" is a rule that is not ours.
	hashes []string
	// rules are the rules as written or found equal, nil when only the hashes are known; closable are then its objects, as in
	// netfilter.Chain.
	rules    []netfilter.Rule
	closable []string
}

// holds says whether the chain has exactly these rules.
func (c chain) holds(rules []netfilter.Rule) bool {
	if c.rules != nil {
		return slices.EqualFunc(c.rules, rules, netfilter.Rule.Equal)
	}
	return slices.EqualFunc(c.hashes, rules, func(hash string, r netfilter.Rule) bool { return hash == r.Hash() })
}

// parseTable reads the output of iptables-save for one table. Its strings do not keep the whole output in memory.
func parseTable(saved string) *table {
	t := &table{chains: map[string]chain{}, others: map[string][]string{}}
	for line := range strings.Lines(saved) {
		line = strings.TrimSpace(line)
		if declared, ok := strings.CutPrefix(line, ":"); ok {
			t.declare(strings.Fields(declared))
			continue
		}
		rest, ok := strings.CutPrefix(line, "-A ")
		if !ok {
			continue
		}
		name, rule, _ := strings.Cut(rest, " ")
		if c, ours := t.chains[name]; ours {
			c.hashes = append(c.hashes, strings.Clone(netfilter.HashOf(rule)))
			t.chains[name] = c
			continue
		}
		// Most rules of other programs do not even hold the prefix.
		if _, builtIn := t.others[name]; builtIn || strings.Contains(rule, netfilter.Prefix) && ours(jumpTarget(rule)) {
			name = strings.Clone(name)
			t.others[name] = append(t.others[name], strings.Clone(rule))
		}
	}
	return t
}

// declare takes the line of a chain: its name and its policy, which only a built-in chain has.
func (t *table) declare(fields []string) {
	if len(fields) < 2 {
		return
	}
	name := strings.Clone(fields[0])
	switch {
	case ours(name):
		t.chains[name] = chain{}
	case fields[1] != "-":
		t.others[name] = nil
	}
}

// ours says whether a chain or set is Warren's by its name.
func ours(name string) bool { return strings.HasPrefix(name, netfilter.Prefix) }

// jumpTarget returns the chain or target that a listed rule ends in, or "".
func jumpTarget(rule string) string {
	fields := words(rule)
	for i, f := range fields[:max(0, len(fields)-1)] {
		if f == "-j" || f == "-g" {
			return fields[i+1]
		}
	}
	return ""
}

// words splits a rule of iptables-save at its blanks, except those within quotes, and takes the quotes off.
func words(rule string) []string {
	var all []string
	var word strings.Builder
	quoted, escaped := false, false
	for _, c := range rule + " " {
		switch {
		case escaped:
			word.WriteRune(c)
			escaped = false
		case quoted && c == '\\':
			escaped = true
		case c == '"':
			quoted = !quoted
		case c == ' ' && !quoted:
			if word.Len() > 0 {
				all = append(all, word.String())
			}
			word.Reset()
		default:
			word.WriteRune(c)
		}
	}
	return all
}

// differing returns the chains that the table does not hold as wanted, and notes the others.
func (t *table) differing(wanted []netfilter.Chain) []netfilter.Chain {
	var chains []netfilter.Chain
	for _, w := range wanted {
		if have, ok := t.chains[w.Name]; !ok || !have.holds(w.Rules) {
			chains = append(chains, w)
		} else {
			t.hold(w)
		}
	}
	return chains
}

// unheard says whether one of the objects is surely not among those that the standing chains come from.
func (t *table) unheard(objects []string) bool {
	heard := map[string]bool{}
	for _, c := range t.chains {
		if c.rules == nil {
			return false // it is not known where this one comes from
		}
		for _, o := range c.closable {
			heard[o] = true
		}
	}
	return slices.ContainsFunc(objects, func(o string) bool { return !heard[o] })
}

// newEnds divides chains into those that do not stand yet and refer to no chain or set of ours, and the others.
func (t *table) newEnds(chains []netfilter.Chain) (ends, rest []netfilter.Chain) {
	for _, c := range chains {
		_, stands := t.chains[c.Name]
		if stands || slices.ContainsFunc(c.Rules, func(r netfilter.Rule) bool { return slices.ContainsFunc(r.Args, ours) }) {
			rest = append(rest, c)
		} else {
			ends = append(ends, c)
		}
	}
	return ends, rest
}

// leftOver returns the names of the table's chains of ours that are not wanted, sorted.
func (t *table) leftOver(wanted []netfilter.Chain) []string {
	keep := map[string]bool{}
	for _, w := range wanted {
		keep[w.Name] = true
	}
	var names []string
	for name := range t.chains {
		if !keep[name] {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// hold notes that a chain stands.
func (t *table) hold(c netfilter.Chain) {
	if c.Rules == nil {
		c.Rules = []netfilter.Rule{}
	}
	t.chains[c.Name] = chain{rules: c.Rules, closable: c.Closable}
}

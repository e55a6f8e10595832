package netfilter

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// ruleHash is how many characters of a rule's comment are its hash.
const ruleHash = 10

// maxComment is what a rule's comment may hold, hash and blank included (xt_comment takes 255 bytes).
const maxComment = 240

// Hash identifies the rule's content. It stands at the head of the rule's comment in the kernel, because the text of a
// rule does not come back from iptables as it went in, and a comment does.
func (r Rule) Hash() string {
	return digest(ruleHash, append(slices.Clone(r.Args), r.Comment)...)
}

// line returns the rule as a line of iptables-restore input. The comment stands behind the other matches, because to the kernel it is one,
// too, and costs more than most of them: so only a packet that the rule is for comes to it.
func (r Rule) line(chain string) string {
	comment := strings.TrimSpace(r.Hash() + " " + r.Comment)
	if len(comment) > maxComment {
		comment = comment[:maxComment]
	}
	target := slices.IndexFunc(r.Args, func(word string) bool { return word == "-j" || word == "-g" })
	words := slices.Insert(slices.Clone(r.Args), max(target, 0), "-m", "comment", "--comment", quote(comment))
	return "-A " + chain + " " + strings.Join(words, " ")
}

// quote makes a comment one word of iptables-restore input. Names of Kubernetes objects need no escaping; what else could
// break the line is replaced.
func quote(s string) string {
	return `"` + strings.Map(func(c rune) rune {
		if c == '"' || c == '\\' || c < ' ' || c > '~' {
			return '?'
		}
		return c
	}, s) + `"`
}

// HashOf returns the hash in a rule as iptables lists it ("-A CHAIN ... --comment "HASH text" ..."), or "" where the rule has
// none and so is not ours.
func HashOf(listed string) string {
	_, rest, ok := strings.Cut(listed, `--comment `)
	if !ok {
		return ""
	}
	word := strings.TrimPrefix(rest, `"`)
	if i := strings.IndexAny(word, `" `); i >= 0 {
		word = word[:i]
	}
	if len(word) != ruleHash || strings.Trim(word, base32Alphabet) != "" {
		return ""
	}
	return word
}

// Delta is a change of one table: what one run of iptables-restore --noflush does, all of it or nothing.
type Delta struct {
	Table string
	// Write are chains to create or to replace, with all their rules.
	Write []Chain
	// Delete are the names of chains that nothing refers to after the change.
	Delete []string
}

// Render returns the delta as iptables-restore input. Every chain is declared (which flushes it) before any rule, so that
// rules may refer to chains that come later.
func (d Delta) Render() string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%s\n", d.Table)
	for _, c := range d.Write {
		fmt.Fprintf(&b, ":%s - [0:0]\n", c.Name)
	}
	for _, name := range d.Delete {
		fmt.Fprintf(&b, ":%s - [0:0]\n", name)
	}
	for _, c := range d.Write {
		for _, r := range c.Rules {
			b.WriteString(r.line(c.Name))
			b.WriteByte('\n')
		}
	}
	for _, name := range d.Delete {
		fmt.Fprintf(&b, "-X %s\n", name)
	}
	b.WriteString("COMMIT\n")
	return b.String()
}

// Render returns both families as text, each under a heading.
func (r Ruleset) Render() string {
	var b strings.Builder
	for _, f := range Families {
		fmt.Fprintf(&b, "# %s\n%s", f, r.Of(f).Render(f))
	}
	return b.String()
}

// Render returns one family as text for people and for golden files: the sets as input of "ipset restore", the tables as
// input of "iptables-restore --noflush", and a line for each hook.
func (r *Rules) Render(f Family) string {
	var b strings.Builder
	for _, s := range r.Sets {
		if s.Comment != "" {
			fmt.Fprintf(&b, "# %s\n", s.Comment)
		}
		fmt.Fprintf(&b, "create %s %s family %s\n", s.Name, s.Type, f.inet())
		for _, e := range s.Entries {
			fmt.Fprintf(&b, "add %s %s\n", s.Name, e)
		}
	}
	for _, table := range r.tables() {
		b.WriteString(Delta{Table: table, Write: r.chainsOf(table)}.Render())
	}
	for _, h := range r.Hooks {
		fmt.Fprintf(&b, "hook %s\n", h)
	}
	return b.String()
}

// String returns the hook as an iptables command.
func (h Hook) String() string {
	op := "-I"
	if h.Append {
		op = "-A"
	}
	return fmt.Sprintf("-t %s %s %s %s", h.Table, op, h.BuiltIn, strings.Join(h.Args(), " "))
}

// Args are the words of the hook's rule, without its chain.
func (h Hook) Args() []string {
	return []string{"-m", "comment", "--comment", "warren", "-j", h.Chain}
}

// String returns the entry in ipset's words.
func (e Entry) String() string {
	first := e.Prefix.String()
	if e.Prefix.IsSingleIP() {
		first = e.Prefix.Addr().String()
	}
	if e.Protocol != "" {
		return fmt.Sprintf("%s,%s:%d", first, e.Protocol, e.Port)
	}
	return first
}

// Compare orders entries.
func (e Entry) Compare(o Entry) int {
	return cmp.Or(
		e.Prefix.Addr().Compare(o.Prefix.Addr()), cmp.Compare(e.Prefix.Bits(), o.Prefix.Bits()),
		cmp.Compare(e.Protocol, o.Protocol), cmp.Compare(e.Port, o.Port))
}

// Merge returns both rulesets as one, sorted. Names of sets and chains must not be in both.
func Merge(a, b Ruleset) Ruleset {
	return Ruleset{V4: merge(a.V4, b.V4), V6: merge(a.V6, b.V6)}
}

func merge(a, b Rules) Rules {
	m := Rules{
		Sets:   slices.Concat(a.Sets, b.Sets),
		Chains: slices.Concat(a.Chains, b.Chains),
		Hooks:  slices.Concat(a.Hooks, b.Hooks),
	}
	slices.SortFunc(m.Sets, func(x, y Set) int { return cmp.Compare(x.Name, y.Name) })
	slices.SortFunc(m.Chains, func(x, y Chain) int {
		return cmp.Or(cmp.Compare(x.Table, y.Table), cmp.Compare(x.Name, y.Name))
	})
	slices.SortFunc(m.Hooks, func(x, y Hook) int {
		return cmp.Or(cmp.Compare(x.Table, y.Table), cmp.Compare(x.BuiltIn, y.BuiltIn), cmp.Compare(x.Chain, y.Chain))
	})
	return m
}

// tables returns the tables that chains stand in, sorted.
func (r *Rules) tables() []string {
	var names []string
	for _, c := range r.Chains {
		names = append(names, c.Table)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// chainsOf returns the chains of one table.
func (r *Rules) chainsOf(table string) []Chain {
	var chains []Chain
	for _, c := range r.Chains {
		if c.Table == table {
			chains = append(chains, c)
		}
	}
	return chains
}

package firewall

import (
	"maps"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// hookOp is one change of a built-in chain, by the rule's words and never by its number: other programs change the chain
// at the same time.
type hookOp struct {
	kind  opKind
	chain string
	rule  string
}

// opKind is what a hookOp does.
type opKind uint8

const (
	insertFirst opKind = iota
	appendLast
	deleteOne // the first rule with these words, as iptables -D does
)

// String returns the change in the words of iptables, without the chain.
func (op hookOp) String() string { return [...]string{"-I", "-A", "-D"}[op.kind] + " " + op.rule }

// apply makes the change on a list of rules.
func (op hookOp) apply(rules []string) []string {
	switch op.kind {
	case insertFirst:
		return slices.Insert(slices.Clone(rules), 0, op.rule)
	case appendLast:
		return append(slices.Clone(rules), op.rule)
	default:
		i := slices.Index(rules, op.rule)
		if i < 0 {
			return rules
		}
		return slices.Delete(slices.Clone(rules), i, i+1)
	}
}

// do makes the change in the kernel.
func (op hookOp) do(j jumper, table string) error {
	switch op.kind {
	case insertFirst:
		return j.Insert(table, op.chain, 1, words(op.rule)...)
	case appendLast:
		return j.Append(table, op.chain, words(op.rule)...)
	default:
		return j.Delete(table, op.chain, words(op.rule)...)
	}
}

// hookRule is the hook as iptables-save lists it.
func hookRule(h netfilter.Hook) string { return strings.Join(h.Args(), " ") }

// movingRule is the hook with a comment of its own: it stands for the hook while that is moved.
func movingRule(rule string) string {
	return strings.Replace(rule, "--comment warren ", "--comment warren-moving ", 1)
}

// isHook says whether a listed rule is a hook of ours, wanted or not. A rule that a person wrote and that jumps to a chain
// of ours is not.
func isHook(rule string) bool {
	target := jumpTarget(rule)
	hook := hookRule(netfilter.Hook{Chain: target})
	return ours(target) && (rule == hook || rule == movingRule(hook))
}

// planHooks returns the changes after which every wanted hook of a table stands exactly once, first or anywhere, and no
// other hook of ours stands.
func planHooks(others map[string][]string, wanted []netfilter.Hook) []hookOp {
	byChain := map[string][]netfilter.Hook{}
	for name := range others {
		byChain[name] = nil
	}
	for _, h := range wanted {
		byChain[h.BuiltIn] = append(byChain[h.BuiltIn], h)
	}
	var ops []hookOp
	for _, name := range slices.Sorted(maps.Keys(byChain)) {
		p := hookPlan{chain: name, rules: others[name]}
		p.plan(byChain[name])
		ops = append(ops, p.ops...)
	}
	return ops
}

// hookPlan collects the changes of one built-in chain.
type hookPlan struct {
	chain string
	rules []string // as they stand after ops
	ops   []hookOp
}

func (p *hookPlan) plan(wanted []netfilter.Hook) {
	var first, anywhere []string
	for _, h := range wanted {
		if h.Append {
			anywhere = append(anywhere, hookRule(h))
		} else {
			first = append(first, hookRule(h))
		}
	}
	if !p.leads(first) {
		p.lead(first)
	}
	for _, rule := range anywhere {
		if !slices.Contains(p.rules, rule) {
			p.do(appendLast, rule)
		}
		for p.count(rule) > 1 {
			p.do(deleteOne, rule)
		}
	}
	for _, rule := range p.rules {
		if isHook(rule) && !slices.Contains(first, rule) && !slices.Contains(anywhere, rule) {
			p.do(deleteOne, rule)
		}
	}
}

// leads says whether the rules begin with these, and none of them stands again.
func (p *hookPlan) leads(first []string) bool {
	return len(p.rules) >= len(first) && slices.Equal(p.rules[:len(first)], first) &&
		!slices.ContainsFunc(first, func(rule string) bool { return p.count(rule) > 1 })
}

// lead puts these rules first. iptables deletes the first rule that has the given words, so a hook cannot simply be inserted
// again and the old one deleted: a stand-in holds its place meanwhile, and packets never pass without it.
func (p *hookPlan) lead(first []string) {
	for _, rule := range slices.Backward(first) {
		if p.count(rule) > 0 {
			p.do(insertFirst, movingRule(rule))
		}
	}
	for _, rule := range first {
		for p.count(rule) > 0 {
			p.do(deleteOne, rule)
		}
	}
	for _, rule := range slices.Backward(first) {
		p.do(insertFirst, rule)
	}
}

func (p *hookPlan) count(rule string) int {
	n := 0
	for _, r := range p.rules {
		if r == rule {
			n++
		}
	}
	return n
}

func (p *hookPlan) do(kind opKind, rule string) {
	op := hookOp{kind: kind, chain: p.chain, rule: rule}
	p.ops = append(p.ops, op)
	p.rules = op.apply(p.rules)
}

package trace

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// The kernel's limits on names: 28 characters for a chain (XT_EXTENSION_MAXNAMELEN and iptables' own check), 31 for a set.
const (
	maxChain = 28
	maxSet   = 31
)

// Lint returns everything that is wrong with a filter as a whole: names that are too long or not ours, jumps and set
// references that lead nowhere, chains and sets that nothing uses, loops, rules that no packet reaches, targets and
// matches in tables and hooks that refuse them.
func (f *Filter) Lint() error {
	var errs []error
	report := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	usedSets := map[string]bool{}
	for key, rules := range f.chains {
		lintName(key.name, maxChain, report)
		for i, r := range rules {
			f.lintRule(key, r, usedSets, report)
			if len(r.matches) == 0 && r.target != "TCPMSS" && r.marks == nil && r.logs == "" && (!r.jump || r.gotos) && i < len(rules)-1 {
				report("%s: no packet comes past rule %d", key.name, i+1)
			}
		}
	}
	for name := range f.sets {
		lintName(name, maxSet, report)
		if !usedSets[name] {
			report("set %s is used by no rule", name)
		}
	}
	f.lintReach(report)
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

func lintName(name string, limit int, report func(string, ...any)) {
	if len(name) > limit {
		report("the name %s is longer than %d", name, limit)
	}
	if !strings.HasPrefix(name, "WARREN-") {
		report("the name %s is not ours", name)
	}
}

func (f *Filter) lintRule(key chainKey, r rule, used map[string]bool, report func(string, ...any)) {
	if _, ok := f.chains[chainKey{key.table, r.target}]; r.jump && !ok {
		report("%s jumps to %s, which is not in %s", key.name, r.target, key.table)
	}
	for _, reference := range r.sets {
		name, sides, _ := strings.Cut(reference, " ")
		used[name] = true
		switch s := f.sets[name]; {
		case s == nil:
			report("%s matches set %s, which is not there", key.name, name)
		case (s.kind == "hash:ip,port") != (sides == "2"):
			report("%s matches the %s %s by %s sides", key.name, s.kind, name, sides)
		}
	}
	translates := r.target == "MASQUERADE" || strings.HasPrefix(r.target, "SNAT ")
	if translates != (key.table == "nat") && (translates || r.target == "DROP" || r.target == "ACCEPT") {
		report("%s: %s does not belong into %s", key.name, r.target, key.table)
	}
	if r.marks != nil && key.table != "mangle" {
		report("%s: MARK does not belong into %s", key.name, key.table)
	}
	if r.target == "ACCEPT" && key.table != "filter" {
		report("%s: ACCEPT in %s goes round everybody else's rules", key.name, key.table)
	}
}

// lintReach checks what hangs below each hook.
func (f *Filter) lintReach(report func(string, ...any)) {
	builtIns := map[string][]string{
		"raw": {"PREROUTING"}, "mangle": {"FORWARD", "POSTROUTING"}, "nat": {"POSTROUTING"}, "filter": {"FORWARD"},
	}
	reached := map[chainKey]string{}
	for _, h := range f.hooks {
		key := chainKey{h.table, h.chain}
		if !slices.Contains(builtIns[h.table], h.builtIn) {
			report("nothing of ours belongs into %s %s", h.table, h.builtIn)
		}
		// Who accepts comes last, who drops first.
		if h.last != slices.ContainsFunc(f.chains[key], func(r rule) bool { return r.target == "ACCEPT" }) {
			report("%s stands at the wrong end of %s %s", h.chain, h.table, h.builtIn)
		}
		if _, ok := f.chains[key]; !ok {
			report("hook %s %s leads to %s, which is not there", h.table, h.builtIn, h.chain)
		}
		if reached[key] != "" {
			report("%s has more than one hook", h.chain)
		}
		f.reach(key, h.builtIn, nil, reached, report)
	}
	for key := range f.chains {
		if reached[key] == "" {
			report("chain %s in %s is an orphan", key.name, key.table)
		}
	}
}

// reach marks what a chain leads to; path are the chains that lead to it.
func (f *Filter) reach(key chainKey, builtIn string, path []chainKey, reached map[chainKey]string, report func(string, ...any)) {
	if slices.Contains(path, key) {
		report("chain %s runs in a loop", key.name)
		return
	}
	if reached[key] != "" {
		return
	}
	reached[key] = builtIn
	for _, r := range f.chains[key] {
		// In POSTROUTING -i works since Linux 5.7, for what is forwarded.
		for option, refused := range map[string]string{"-o": "PREROUTING", "--invert": "FORWARD"} {
			if refused == builtIn && slices.Contains(r.options, option) {
				report("%s: %s has no meaning in %s", key.name, option, builtIn)
			}
		}
		if r.jump {
			f.reach(chainKey{key.table, r.target}, builtIn, append(slices.Clone(path), key), reached, report)
		}
	}
}

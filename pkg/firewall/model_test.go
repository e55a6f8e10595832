package firewall

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// model is a kernel in memory below a Firewall: sets, and tables of one line a rule. It refuses what the real one refuses of what a
// Firewall may get wrong: rules that refer to what there is not, and the removal of what is referred to. It tells a watcher of every
// change.
type model struct {
	sets   map[string]*set
	tables map[place]map[string][]string
	hooks  map[netfilter.Family][]netfilter.Hook
	watch  func(what string)
}

func newModel() *model {
	m := &model{
		sets: map[string]*set{}, tables: map[place]map[string][]string{}, hooks: map[netfilter.Family][]netfilter.Hook{},
		watch: func(string) {},
	}
	for _, f := range netfilter.Families {
		for _, p := range places(f) {
			m.tables[p] = map[string][]string{}
		}
	}
	return m
}

// firewall returns a Firewall above the model.
func (m *model) firewall(o Options) *Firewall {
	w := &Firewall{
		log: o.Log, now: o.Now, sets: modelSets{m}, tools: suite{}, suspect: map[place]bool{},
		refusals: map[chainID]refusal{}, lacking: map[string]ClosedSet{}, broken: map[string]brokenSet{},
	}
	for _, f := range netfilter.Families {
		w.tools[f] = &tools{exec: modelExec{m, f}, restore: "restore", save: "save", jumps: modelJumps{m, f}}
	}
	w.Forget()
	return w
}

// render returns one family as netfilter.Rules.Render would.
func (m *model) render(f netfilter.Family) string {
	var r netfilter.Rules
	for _, name := range slices.Sorted(maps.Keys(m.sets)) {
		if s := m.sets[name]; s.family == f {
			r.Sets = append(r.Sets, netfilter.Set{Name: name, Type: s.typ, Entries: s.members})
		}
	}
	var b strings.Builder
	b.WriteString(r.Render(f))
	for _, p := range places(f) {
		b.WriteString("*" + p.table + "\n" + m.lines(p) + "COMMIT\n")
	}
	for _, h := range m.hooks[f] {
		fmt.Fprintf(&b, "hook %s\n", h)
	}
	return b.String()
}

// lines returns the chains of a table, declared and with their rules.
func (m *model) lines(p place) string {
	var declared, rules strings.Builder
	for _, name := range slices.Sorted(maps.Keys(m.tables[p])) {
		fmt.Fprintf(&declared, ":%s - [0:0]\n", name)
		for _, line := range m.tables[p][name] {
			rules.WriteString(line + "\n")
		}
	}
	return declared.String() + rules.String()
}

// save is the output of iptables-save.
func (m *model) save(f netfilter.Family) string {
	var b strings.Builder
	for _, p := range places(f) {
		fmt.Fprintf(&b, "*%s\n:PREROUTING ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:POSTROUTING ACCEPT [0:0]\n%s", p.table, m.lines(p))
		for _, h := range m.hooks[f] {
			if h.Table == p.table {
				fmt.Fprintf(&b, "-A %s %s\n", h.BuiltIn, hookRule(h))
			}
		}
		b.WriteString("COMMIT\n")
	}
	return b.String()
}

// restore makes the change that the text says.
func (m *model) restore(f netfilter.Family, text string) error {
	table, _, _ := strings.Cut(strings.TrimPrefix(text, "*"), "\n")
	p := place{f, table}
	chains := maps.Clone(m.tables[p])
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		fields := strings.Fields(line)
		switch {
		case strings.HasPrefix(line, ":"):
			chains[fields[0][1:]] = nil
		case fields[0] == "-A":
			chains[fields[1]] = append(slices.Clone(chains[fields[1]]), line)
		case fields[0] == "-X":
			delete(chains, fields[1])
		}
	}
	for _, lines := range chains {
		for _, line := range lines {
			if err := m.check(p, chains, words(line)); err != nil {
				return fmt.Errorf("%s: %w", line, err)
			}
		}
	}
	m.tables[p] = chains
	m.watch("restore " + p.String())
	return nil
}

// check looks whether a rule refers to what there is.
func (m *model) check(p place, chains map[string][]string, rule []string) error {
	for i, word := range rule {
		if word == "--match-set" && (m.sets[rule[i+1]] == nil || m.sets[rule[i+1]].family != p.family) {
			return fmt.Errorf("there is no set %s", rule[i+1])
		}
		if (word == "-j" || word == "-g") && ours(rule[i+1]) {
			if _, ok := chains[rule[i+1]]; !ok {
				return fmt.Errorf("there is no chain %s", rule[i+1])
			}
		}
	}
	return nil
}

// modelExec is iptables-save and iptables-restore.
type modelExec struct {
	*model
	family netfilter.Family
}

func (x modelExec) LookPath(file string) (string, error) { return file, nil }

func (x modelExec) Run(_ context.Context, stdin, path string, _ ...string) (stdout, stderr string, err error) {
	if path == "save" {
		return x.save(x.family), "", nil
	}
	return "", "", x.restore(x.family, stdin)
}

// modelJumps changes built-in chains.
type modelJumps struct {
	*model
	family netfilter.Family
}

func (x modelJumps) Insert(table, chain string, _ int, spec ...string) error {
	h := netfilter.Hook{Table: table, BuiltIn: chain, Chain: spec[len(spec)-1]}
	x.hooks[x.family] = slices.Insert(slices.Clone(x.hooks[x.family]), 0, h)
	return nil
}

func (x modelJumps) Append(table, chain string, spec ...string) error {
	h := netfilter.Hook{Table: table, BuiltIn: chain, Chain: spec[len(spec)-1], Append: true}
	x.hooks[x.family] = append(slices.Clone(x.hooks[x.family]), h)
	return nil
}

func (x modelJumps) Delete(table, chain string, _ ...string) error {
	return fmt.Errorf("no test deletes a hook, but one of %s in %s was to go", chain, table)
}

// modelSets are the sets. A listing hands out copies, as netlink does.
type modelSets struct{ *model }

func (x modelSets) List(name string) (map[string]*set, error) {
	found := map[string]*set{}
	for n, s := range x.sets {
		if name == "" || n == name {
			s := *s
			s.members = slices.Clone(s.members)
			found[n] = &s
		}
	}
	return found, nil
}

func (x modelSets) Create(name string, s set) error {
	if x.sets[name] != nil {
		return fmt.Errorf("creating set %s: it exists", name)
	}
	x.sets[name] = &set{typ: s.typ, family: s.family, max: s.max}
	x.watch("create " + name)
	return nil
}

func (x modelSets) Destroy(name string) error {
	for _, chains := range x.tables {
		for _, lines := range chains {
			for _, line := range lines {
				if slices.Contains(words(line), name) {
					return fmt.Errorf("destroying set %s: %s refers to it", name, line)
				}
			}
		}
	}
	delete(x.sets, name)
	x.watch("destroy " + name)
	return nil
}

func (x modelSets) Swap(a, b string) error {
	x.sets[a], x.sets[b] = x.sets[b], x.sets[a]
	x.watch("swap " + a)
	return nil
}

// Add puts the members in one by one: packets pass in between.
func (x modelSets) Add(lists ...memberList) []error {
	return x.update("add", lists, func(s *set, e netfilter.Entry) {
		s.members = netfilter.Entries(append(slices.Clone(s.members), e))
	})
}

func (x modelSets) Remove(lists ...memberList) []error {
	return x.update("remove", lists, func(s *set, e netfilter.Entry) {
		s.members = slices.DeleteFunc(slices.Clone(s.members), func(o netfilter.Entry) bool { return o == e })
	})
}

func (x modelSets) update(what string, lists []memberList, change func(*set, netfilter.Entry)) []error {
	errs := make([]error, len(lists))
	for i, l := range lists {
		s := x.sets[l.set]
		if s == nil {
			errs[i] = fmt.Errorf("%s %s: there is no such set", what, l.set)
			continue
		}
		for _, e := range l.members {
			if change(s, e); len(s.members) > s.max {
				errs[i] = fmt.Errorf("%s %s: it is full", what, l.set)
				break
			}
			x.watch(what + " " + l.set + " " + e.String())
		}
	}
	return errs
}

// Package firewall makes the kernel's packet filter agree with a netfilter.Ruleset: sets over netlink, chains with one
// iptables-restore a family and table, jumps from built-in chains with go-iptables.
//
// The order within an apply keeps things closed. What opens the start gate leaves its set first and enters it last; other sets
// gain members before the rules change and lose them after; chains are complete before a hook leads to them; the tables that
// close (raw, mangle) are in order before those that open (nat, filter) are touched; where a step fails, what builds on it is
// not done. Every state in between is one that the cluster could have asked for, had its changes come one by one. After an error
// the next Apply reads the kernel and goes on from whatever stands.
//
// One kind of failure stops nothing else: a chain that may be closed (netfilter.Chain.Closable) and whose rules are refused is
// replaced by a DROP, which counts as standing, because it lets less pass than the rules would. See ClosedError.
//
// What carries the prefix netfilter.Prefix is ours, whoever made it; nothing else is ever changed.
package firewall

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// Options says how to reach the kernel.
type Options struct {
	Log *slog.Logger
	// Backend chooses the iptables programs: "nft", "legacy", or "" for those whose rules other programs use.
	Backend string
	// Admit is asked before members enter a set of the gate. It calls add with those that still may, and keeps that true until add
	// returns. Without it all may.
	Admit func(members []netfilter.Entry, add func([]netfilter.Entry) error) error
}

// Changes counts what an Apply wrote; all zero when the kernel agreed already.
type Changes struct {
	// SetOps are sets created, swapped and destroyed, and members added and removed.
	SetOps int
	// RuleBytes are the bytes of input to iptables-restore.
	RuleBytes int
	// Execs are the programs that were run to write; those that only read do not count.
	Execs int
}

// Firewall writes rulesets into the network namespace of the calling thread. One goroutine uses it.
type Firewall struct {
	log   *slog.Logger
	sets  ipsets
	admit func(members []netfilter.Entry, add func([]netfilter.Entry) error) error
	tools suite
	// backend is that of the tools, and problems are what was found when it was chosen.
	backend  string
	problems []cluster.Problem
	// abandoned is the other backend's programs, until nothing of ours is left there; nil where they are not installed.
	abandoned suite
	// denials are the packets that were counted so far.
	denials denials
	// known is what the kernel holds, as far as it has been read or written since the last error or Forget.
	known known
	// suspect are tables that were written with a warning, or may have been: their rules are not believed, whatever their
	// hashes say.
	suspect map[place]bool
}

// known is a memory of the kernel's state.
type known struct {
	sets   map[string]*set // nil: not read
	tables map[place]*table
	stuck  map[string]bool // what could not be removed
}

// place is a table of a family.
type place struct {
	family netfilter.Family
	table  string
}

// String returns the place in words.
func (p place) String() string { return fmt.Sprintf("%s table (%s)", p.table, p.family) }

// stages are the tables in the order in which they are written: those of a stage that fails keep the later ones untouched.
// What closes comes first; translation and the ACCEPTs of the filter table are of no use without it.
func stages() [2][2]string { return [2][2]string{{"raw", "mangle"}, {"nat", "filter"}} }

// New finds the programs that it needs, and chooses the backend. An error says which program is missing.
func New(ctx context.Context, o Options) (*Firewall, error) {
	suites, err := findSuites(programs{}, o.Backend)
	if err != nil {
		return nil, err
	}
	w := &Firewall{
		log:     o.Log,
		sets:    kernelSets{},
		admit:   o.Admit,
		backend: o.Backend,
		suspect: map[place]bool{},
	}
	if w.backend == "" {
		w.backend, w.problems, err = choose(ctx, o.Log, suites)
		if err != nil {
			return nil, err
		}
	}
	w.tools = suites[w.backend]
	w.abandoned = suites[map[string]string{nft: legacy, legacy: nft}[w.backend]]
	w.Forget()
	return w, nil
}

// Backend returns the backend of iptables that the rules are in, "nft" or "legacy".
func (w *Firewall) Backend() string { return w.backend }

// Problems returns what an operator should put right, as found by New.
func (w *Firewall) Problems() []cluster.Problem { return w.problems }

// Forget makes the next Apply read the kernel again, and so repair what others changed.
func (w *Firewall) Forget() {
	w.known = known{tables: map[place]*table{}, stuck: map[string]bool{}}
}

// Apply makes the kernel agree with the ruleset and returns what it wrote. It does as much as is safe when something
// fails, and then returns all errors joined; calling it again goes on from whatever stands. After an error nothing has been
// added to a set of the gate, unless adding is what failed. Only a *ClosedError, which never comes joined to another, means that
// everything has been done but for the chains that it names.
func (w *Firewall) Apply(ctx context.Context, r netfilter.Ruleset) (Changes, error) {
	a := &apply{Firewall: w, plans: map[netfilter.Family][]setPlan{}}
	if err := a.run(ctx, &r); err != nil {
		w.Forget()
		return a.changes, err
	}
	w.retire(ctx)
	if len(a.closed) > 0 {
		return a.changes, &ClosedError{Chains: a.closed}
	}
	return a.changes, nil
}

// readSets returns the sets of ours that stand: those with a gate among the wanted are always read anew, because other
// programs change it.
func (w *Firewall) readSets(r *netfilter.Ruleset) error {
	if w.known.sets == nil {
		all, err := w.sets.List("")
		if err != nil {
			return err
		}
		w.known.sets = all
		return nil
	}
	for _, f := range netfilter.Families {
		for _, s := range r.Of(f).Sets {
			if s.Role != netfilter.Gate {
				continue
			}
			found, err := w.sets.List(s.Name)
			if err != nil {
				return err
			}
			delete(w.known.sets, s.Name)
			if found[s.Name] != nil {
				w.known.sets[s.Name] = found[s.Name]
			}
		}
	}
	return nil
}

// readTable returns what is known of a table, from memory or from the kernel.
func (w *Firewall) readTable(ctx context.Context, p place) (*table, error) {
	if t := w.known.tables[p]; t != nil {
		return t, nil
	}
	saved, err := w.tools[p.family].read(ctx, p.table)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", p, err)
	}
	t := parseTable(saved)
	if w.suspect[p] {
		for name := range t.chains {
			t.chains[name] = chain{hashes: []string{"suspect"}}
		}
	}
	w.known.tables[p] = t
	return t, nil
}

// each calls do with every element and joins the errors.
func each[T any](elements []T, do func(T) error) error {
	var errs []error
	for _, e := range elements {
		errs = append(errs, do(e))
	}
	return errors.Join(errs...)
}

// Package firewall makes the kernel's packet filter agree with a netfilter.Ruleset: sets over netlink, chains with one
// iptables-restore a family and table, jumps from built-in chains with go-iptables.
//
// Apply takes the whole ruleset, reads the kernel and puts right what differs. Patch takes what changed since and does only that:
// no reading, no program where only sets change.
//
// The order within both keeps things closed: at no step, also when one fails, does a packet pass that the old and the new ruleset
// both deny. What opens the start gate leaves its set first and enters it last, the sets that rules refer to change before or after
// the chains as familyPlan.order says, chains are complete before a hook leads to them, and the tables that close (raw, mangle) are in
// order before those that open (nat, filter) are touched. After an error the next Apply goes on from whatever stands.
//
// What the kernel refuses of one policy stops nothing else, but closes what it concerns; see ClosedError.
//
// What carries the prefix netfilter.Prefix is ours, whoever made it; nothing else is ever changed.
package firewall

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

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
	// Now tells the time. Without it, rules that were refused are tried again by each Apply, which takes its time where there are
	// many.
	Now func() time.Time
}

// Changes counts what an Apply or a Patch wrote; all zero when the kernel agreed already.
type Changes struct {
	// SetOps are sets created, swapped and destroyed, and members added and removed.
	SetOps int
	// RuleBytes are the bytes of input to iptables-restore.
	RuleBytes int
	// Execs are the programs that were run to write; those that only read do not count.
	Execs int
}

// Firewall writes rulesets into the network namespace of the thread that called New, in which its methods must be called, too. One
// goroutine uses it, but for methods that say otherwise.
type Firewall struct {
	log *slog.Logger
	// programs run the tools.
	programs *spares
	sets     ipsets
	admit    func(members []netfilter.Entry, add func([]netfilter.Entry) error) error
	tools    suite
	// backend is that of the tools, and problems are what was found when it was chosen.
	backend  string
	problems []cluster.Problem
	// abandoned is the other backend's programs, until nothing of ours is left there; nil where they are not installed.
	abandoned suite
	// denials are the packets that were counted so far.
	denials denials
	now     func() time.Time
	// known is what the kernel holds, as far as it has been read or written since the last error or Forget.
	known known
	// patch and lists are memory of the last Patch and of the last update that the next one uses again.
	patch patch
	lists []memberList
	// suspect are tables that were written with a warning, or may have been: their rules are not believed, whatever their
	// hashes say. A chain in the kernel says the same to the next daemon.
	suspect map[place]bool
	// refusals are the chains that stand closed, lacking the sets that are not as wanted, by name.
	refusals map[chainID]refusal
	lacking  map[string]ClosedSet
	// broken are those of the lacking that rules must not rely on.
	broken map[string]brokenSet
}

// known is a memory of the kernel's state.
type known struct {
	// whole: all of it is known, since an Apply.
	whole  bool
	sets   map[string]*standing
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
	programs := newSpares()
	suites, err := findSuites(programs, o.Backend)
	if err != nil {
		return nil, err
	}
	s, err := openSocket()
	if err != nil {
		return nil, err
	}
	w := &Firewall{
		log:      o.Log,
		programs: programs,
		sets:     kernelSets{s},
		admit:    o.Admit,
		backend:  o.Backend,
		now:      o.Now,
		suspect:  map[place]bool{},
		refusals: map[chainID]refusal{},
		lacking:  map[string]ClosedSet{},
		broken:   map[string]brokenSet{},
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

// Close ends the programs that wait for the next change. It is not to be called beside an Apply or Patch.
func (w *Firewall) Close() { w.programs.close() }

// Backend returns the backend of iptables that the rules are in, "nft" or "legacy".
func (w *Firewall) Backend() string { return w.backend }

// Problems returns what an operator should put right, as found by New.
func (w *Firewall) Problems() []cluster.Problem { return w.problems }

// ErrUnknown is the error of Patch where the kernel's state is not known: before the first Apply, after an error or Forget, or when
// the change does not fit what stands. An Apply must come first.
var ErrUnknown = errors.New("the kernel's state is not known")

// Forget makes Patch fail until the next Apply, and lets that try again to remove what could not be removed.
func (w *Firewall) Forget() {
	w.known = known{sets: map[string]*standing{}, tables: map[place]*table{}, stuck: map[string]bool{}}
}

// Apply reads the kernel, makes it agree with the ruleset and returns what it wrote. It does as much as is safe when something
// fails, and then returns all errors joined; calling it again goes on from whatever stands. After an error nothing has been
// added to a set of the gate, unless adding is what failed. Only a *ClosedError, which never comes joined to another, means that
// everything has been done but for the chains and sets that it names.
func (w *Firewall) Apply(ctx context.Context, r netfilter.Ruleset) (Changes, error) {
	a := &apply{Firewall: w, whole: true}
	plans, err := a.planWhole(ctx, &r)
	if err == nil {
		err = a.run(ctx, plans)
	}
	if err != nil {
		return a.changes, w.fail(err)
	}
	w.known.whole = true
	w.retire(ctx)
	return a.changes, w.closedError()
}

// Patch makes a change to what stands and returns what it wrote. It reads nothing, so it does not see what others did, and its cost
// is that of the change. The errors are those of Apply, and ErrUnknown, with which it has done nothing.
func (w *Firewall) Patch(ctx context.Context, c netfilter.Change) (Changes, error) {
	if !w.known.whole {
		return Changes{}, ErrUnknown
	}
	plans := make([]*familyPlan, 0, len(w.patch.plans))
	defer w.patch.forget()
	for i, f := range netfilter.Families {
		half := c.Of(f)
		if len(half.Sets)+len(half.Write)+len(half.Delete) == 0 {
			continue
		}
		p := &w.patch.plans[i]
		if err := w.planPatch(p, f, half); err != nil {
			return Changes{}, err
		}
		plans = append(plans, p)
	}
	a := &w.patch.apply
	a.Firewall = w
	if err := a.run(ctx, plans); err != nil {
		return a.changes, w.fail(err)
	}
	return a.changes, w.closedError()
}

// patch is what a Patch needs while it lasts.
type patch struct {
	apply apply
	plans [len(netfilter.Families)]familyPlan
}

// forget drops all but the memory for sets, of which there are some in most changes.
func (p *patch) forget() {
	p.apply = apply{}
	for i := range p.plans {
		if sets := p.plans[i].sets; p.plans[i].family != 0 { // it was in use
			clear(sets)
			p.plans[i] = familyPlan{sets: sets[:0]}
		}
	}
}

// fail forgets the kernel's state, and adds to an error what may have led to it.
func (w *Firewall) fail(err error) error {
	for _, name := range slices.Sorted(maps.Keys(w.lacking)) {
		err = errors.Join(err, w.lacking[name].Err)
	}
	w.Forget()
	return err
}

// each calls do with every element and joins the errors.
func each[T any](elements []T, do func(T) error) error {
	var errs []error
	for _, e := range elements {
		if err := do(e); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

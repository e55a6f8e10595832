package firewall

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// Cleanup removes every hook, chain and set of ours, in both backends and families and all tables, and every rule that jumps to a
// chain of ours, which could not stand without it. It goes on after an error and returns all of them joined.
func Cleanup(ctx context.Context, log *slog.Logger) error {
	suites, err := findSuites(programs{}, "")
	errs := []error{err}
	for _, backend := range []string{nft, legacy} {
		if cleanErr := suites[backend].clean(ctx, log); cleanErr != nil {
			errs = append(errs, fmt.Errorf("removing rules by iptables-%s: %w", backend, cleanErr))
		}
	}
	s, err := openSocket()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	sets := kernelSets{s}
	all, err := sets.List("")
	errs = append(errs, err, each(slices.Sorted(maps.Keys(all)), sets.Destroy))
	return errors.Join(errs...)
}

// retire removes what is left of ours in the backend that is not used, where it stands since another was chosen. That is done
// once all stands in this one: until then the old rules hold. What fails is tried again by the next Apply.
func (w *Firewall) retire(ctx context.Context) {
	if w.abandoned == nil {
		return
	}
	if err := w.abandoned.clean(ctx, w.log); err != nil {
		w.log.Warn("leaving rules behind in the backend of iptables that is not used", "used", w.backend, "error", err)
		return
	}
	w.abandoned = nil
}

// clean removes all chains of ours, and what jumps to them, from the tables of a backend.
func (s suite) clean(ctx context.Context, log *slog.Logger) error {
	var errs []error
	for _, f := range netfilter.Families {
		t := s[f]
		if t == nil {
			continue
		}
		saved, err := t.readAll(ctx)
		errs = append(errs, err)
		// What opens goes before what closes.
		for _, p := range slices.Backward(places(f)) {
			if err := t.clean(ctx, p, parseTable(saved[p.table]), log); err != nil {
				errs = append(errs, fmt.Errorf("cleaning %s: %w", p, err))
			}
		}
	}
	return errors.Join(errs...)
}

// clean removes everything of ours from one table.
func (t *tools) clean(ctx context.Context, p place, have *table, log *slog.Logger) error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(have.others)) {
		jumps := slices.DeleteFunc(slices.Clone(have.others[name]), func(rule string) bool { return !ours(jumpTarget(rule)) })
		errs = append(errs, each(jumps, func(rule string) error {
			log.Info("removing a jump", "table", p.table, "family", p.family.String(), "chain", name, "rule", rule)
			return hookOp{kind: deleteOne, chain: name, rule: rule}.do(t.jumps, p.table)
		}))
	}
	if names := have.leftOver(nil); len(names) > 0 {
		errs = append(errs, t.write(ctx, netfilter.Delta{Table: p.table, Delete: names}.Render()))
	}
	return errors.Join(errs...)
}

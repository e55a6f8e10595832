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

// Cleanup removes every hook, chain and set of ours, in both families and all tables, and every rule that jumps to a chain
// of ours, which could not stand without it. It goes on after an error and returns all of them joined.
func Cleanup(ctx context.Context, log *slog.Logger) error {
	return cleanup(ctx, Options{Log: log})
}

func cleanup(ctx context.Context, o Options) error {
	w, err := New(o)
	if err != nil {
		return err
	}
	a := &apply{Firewall: w}
	var errs []error
	for _, f := range netfilter.Families {
		// What opens goes before what closes.
		for _, p := range slices.Backward(places(f)) {
			errs = append(errs, a.clean(ctx, p))
		}
	}
	all, err := w.sets.List("")
	errs = append(errs, err, each(slices.Sorted(maps.Keys(all)), w.sets.Destroy))
	return errors.Join(errs...)
}

// clean removes everything of ours from one table.
func (a *apply) clean(ctx context.Context, p place) error {
	t, err := a.readTable(ctx, p)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(t.others)) {
		errs = append(errs, a.unhook(p, name, t.others[name]))
	}
	return errors.Join(append(errs, a.collectChains(ctx, p, &netfilter.Rules{}))...)
}

// unhook removes the rules of a chain that jump to a chain of ours.
func (a *apply) unhook(p place, chain string, rules []string) error {
	jumps := slices.DeleteFunc(slices.Clone(rules), func(rule string) bool { return !ours(jumpTarget(rule)) })
	return each(jumps, func(rule string) error {
		if err := (hookOp{kind: deleteOne, chain: chain, rule: rule}).do(a.tools[p.family].jumps, p.table); err != nil {
			return fmt.Errorf("removing rule %q from %s of %s: %w", rule, chain, p, err)
		}
		a.log.Info("removed a jump", "table", p.table, "family", p.family.String(), "chain", chain, "rule", rule)
		return nil
	})
}

// Command bench measures Warren against its peers in one run: the same work, taking turns, on the same machine. It prints a
// table, and writes one line of JSON for each line of it. What counts are ratios; absolute times are those of this machine.
//
// Most of it are Go benchmarks of the packages, which it runs several times and holds against targets.
//
// `make bench` builds what it needs and runs it. It needs root, and it takes away everything that it made.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// limit is far more than a run needs on a slow machine.
const limit = time.Hour

func main() {
	binaries := flag.String("binaries", "build", "directory of the binaries warren and warrend")
	results := flag.String("results", "build/bench.jsonl", "file for the lines of JSON")
	rounds := flag.Int("rounds", 5, "rounds of each benchmark, of which the median counts")
	only := flag.String("only", "", "measure these alone, by their names with commas between (see --list)")
	list := flag.Bool("list", false, "say what is measured, and measure nothing")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("it took more than %v", limit))
	err := func() error {
		chosen, err := choose(groups(), *only)
		if err != nil {
			return err
		}
		if *list {
			return writeList(os.Stdout, chosen)
		}
		return run(ctx, os.Stdout, *results, chosen, settings{binaries: *binaries, rounds: *rounds, progress: os.Stderr})
	}()
	cancel()
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

// choose returns the groups with these names, or all of them where there is no name.
func choose(all []group, names string) ([]group, error) {
	if names == "" {
		return all, nil
	}
	var chosen []group
	for name := range strings.SplitSeq(names, ",") {
		i := slices.IndexFunc(all, func(g group) bool { return g.name == name })
		if i < 0 {
			return nil, fmt.Errorf("--only=%s: there is no %q; --list says what there is", names, name)
		}
		chosen = append(chosen, all[i])
	}
	return chosen, nil
}

// writeList writes what the groups measure.
func writeList(out io.Writer, listed []group) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	for _, g := range listed {
		fmt.Fprintf(w, "%s\t%s\n", g.name, g.about)
	}
	return w.Flush()
}

// run measures and reports. What fails keeps the others from nothing; a target that is missed is no failure.
func run(ctx context.Context, out io.Writer, results string, chosen []group, s settings) error {
	if s.rounds < 1 {
		return fmt.Errorf("%d rounds: at least one is needed", s.rounds)
	}
	var err error
	if s.binaries, err = filepath.Abs(s.binaries); err != nil {
		return fmt.Errorf("finding the binaries: %w", err)
	}
	var lines []line
	var errs []error
	for _, g := range chosen {
		fmt.Fprintf(s.progress, "measuring %s: %s\n", g.name, g.about)
		measured, groupErr := g.run(ctx, s)
		if groupErr != nil {
			errs = append(errs, fmt.Errorf("%s: %w", g.name, groupErr))
		}
		for _, l := range measured {
			l.Benchmark = g.name
			lines = append(lines, l)
		}
	}
	file, err := os.Create(results)
	if err != nil {
		return errors.Join(append(errs, fmt.Errorf("creating the file of results: %w", err))...)
	}
	return errors.Join(append(errs, writeTable(out, lines), writeLines(file, lines), file.Close())...)
}

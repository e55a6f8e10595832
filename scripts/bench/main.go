// Command bench measures Warren against its peers in one run: the same work, taking turns, on the same machine. It prints a
// table, and writes one line of JSON for each benchmark. What counts is the ratio of medians; absolute times are
// those of this machine.
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
	"syscall"
	"time"
)

// limit is far more than a run needs on a slow machine.
const limit = 10 * time.Minute

func main() {
	binaries := flag.String("binaries", "build", "directory of the binaries warren and warrend")
	results := flag.String("results", "build/bench.jsonl", "file for the lines of JSON")
	rounds := flag.Int("rounds", 7, "rounds of each benchmark, of which the median counts")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("it took more than %v", limit))
	err := run(ctx, os.Stdout, *binaries, *results, *rounds)
	cancel()
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "bench: %v\n", err)
		os.Exit(1)
	}
}

// run measures everything and reports it.
func run(ctx context.Context, out io.Writer, binaries, results string, rounds int) error {
	if rounds < 1 {
		return fmt.Errorf("%d rounds: at least one is needed", rounds)
	}
	binaries, err := filepath.Abs(binaries)
	if err != nil {
		return fmt.Errorf("finding the binaries: %w", err)
	}
	measured, err := measureLinks(ctx, binaries, rounds)
	if err != nil {
		return err
	}
	file, err := os.Create(results)
	if err != nil {
		return fmt.Errorf("creating the file of results: %w", err)
	}
	return errors.Join(writeTable(out, measured), writeLines(file, measured), file.Close())
}

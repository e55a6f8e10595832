// Command demo shows Warren at work on this machine, without a cluster: three nodes in network namespaces, the real daemon
// on each, pods of three tiers made by the real plugin, who reaches whom, and what anybody on the wire between the nodes
// can see. It checks everything that it shows, and its exit status is 0 only when all of it was as expected.
//
// `make demo` builds what it needs and runs it. It needs root, and it takes away everything that it made.
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

	"github.com/warren-cni/warren/pkg/lab"
)

// limit is far more than the demo needs on a slow machine.
const limit = 4 * time.Minute

func main() {
	binaries := flag.String("binaries", "build", "directory of the binaries warren and warrend")
	examples := flag.String("examples", "manifests/examples/tiers.yaml", "the Namespaces and NetworkPolicies of the three tiers")
	keep := flag.Bool("keep-files", false, "keep the daemons' logs and the objects, and say where they are")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("it took more than %v", limit))
	err := run(ctx, os.Stdout, *binaries, *examples, *keep)
	cancel()
	stop()
	if err != nil {
		fmt.Fprintf(os.Stderr, "\nThe demo FAILED: %v\n", err)
		os.Exit(1)
	}
}

// run prepares the demo, plays it, and cleans up whatever came of it.
func run(ctx context.Context, out io.Writer, binaries, examples string, keep bool) (err error) {
	objects, err := loadTiers(examples)
	if err != nil {
		return err
	}
	if binaries, err = filepath.Abs(binaries); err != nil {
		return fmt.Errorf("finding the binaries: %w", err)
	}
	chained := filepath.Join(binaries, "cni-bin")
	if err = lab.BuildChained(ctx, chained); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "warren-demo-")
	if err != nil {
		return fmt.Errorf("making a directory for the demo: %w", err)
	}
	network, err := lab.New(ctx, lab.Options{
		Name: "warren-demo", Dir: dir, Nodes: 3,
		Warrend: filepath.Join(binaries, "warrend"), Plugins: []string{binaries, chained},
	})
	if err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	d := &demo{out: out, clock: time.Now, lab: network, objects: objects} //nolint:forbidigo // the process's edge: here the clock comes from
	playErr := d.play(ctx)
	if playErr != nil && ctx.Err() == nil {
		d.printLogs()
	}
	err = errors.Join(playErr, network.Close(ctx))
	if keep {
		return errors.Join(err, d.printf("\nFiles and logs are kept in %s\n", dir))
	}
	return errors.Join(err, os.RemoveAll(dir))
}

// Command probe runs inside the pods of the end-to-end tests: an echo server, short probes that carry a marker, and
// long flows that tell how many were cut and how long the longest silence was. It is one static file and needs nothing
// else in its image. Results are JSON on stdout.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

const usage = `usage:
  probe serve -address :8080                         echo, over TCP and UDP
  probe reach -marker TEXT [-timeout 2s] TARGET...   send the marker to each target at once and wait for its echo
  probe flows [-tcp N] [-udp N] [-rate N] ADDRESS    keep flows to an echo server until stdin ends
A target is tcp/HOST:PORT or udp/HOST:PORT.`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintf(os.Stderr, "probe: %v\n", err)
		os.Exit(1) //nolint:gocritic // the process ends, and with it what stop would undo
	}
}

// run does what the arguments ask for.
func run(ctx context.Context, args []string, in io.Reader, out io.Writer) error {
	if len(args) == 0 {
		return fmt.Errorf("no command\n%s", usage)
	}
	flags := flag.NewFlagSet(args[0], flag.ContinueOnError)
	switch args[0] {
	case "serve":
		address := flags.String("address", ":8080", "address to listen on")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		return serve(ctx, *address)
	case "reach":
		marker := flags.String("marker", "", "what the probes carry")
		timeout := flags.Duration("timeout", 2*time.Second, "how long an echo may take")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		return json.NewEncoder(out).Encode(reachAll(ctx, *marker, *timeout, flags.Args()))
	case "flows":
		var l load
		flags.IntVar(&l.tcp, "tcp", 0, "TCP flows")
		flags.IntVar(&l.udp, "udp", 0, "UDP flows")
		flags.IntVar(&l.rate, "rate", 50, "messages a second, each way, of each flow")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		if l.rate < 1 {
			return fmt.Errorf("-rate %d: say 1 or more", l.rate)
		}
		return keepFlows(ctx, l, flags.Arg(0), in, out)
	default:
		return fmt.Errorf("unknown command %q\n%s", args[0], usage)
	}
}

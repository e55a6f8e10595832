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
  probe flows [-tcp N] [-udp N] [-rate N] ADDRESS... keep flows to echo servers until stdin ends; each line of stdin asks for
                                                     a report
  probe knock -marker TEXT [-listen ADDRESS] [-stdin] [-interval 20ms] [-for 5s] TARGET...
                                                     send the marker again and again, to targets on stdin too, and print who
                                                     has sent it here
  probe pour [-head BYTES] [-for 5s] ADDRESS         send to an echo server as fast as it takes it, and print how much came
                                                     back in that time, after a head start
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
		l, err := readLoad(flags, args[1:])
		if err != nil {
			return err
		}
		return keepFlows(ctx, l, in, out)
	case "knock":
		k, err := readKnocker(flags, args[1:], in)
		if err != nil {
			return err
		}
		return k.run(ctx, flags.Args(), out)
	case "pour":
		head := flags.Int64("head", 0, "bytes that do not count")
		during := flags.Duration("for", 5*time.Second, "how long to count")
		if err := flags.Parse(args[1:]); err != nil {
			return err
		}
		result, err := pour(ctx, flags.Arg(0), *head, *during)
		if err != nil {
			return err
		}
		return json.NewEncoder(out).Encode(result)
	default:
		return fmt.Errorf("unknown command %q\n%s", args[0], usage)
	}
}

// readLoad reads the arguments of flows.
func readLoad(flags *flag.FlagSet, args []string) (load, error) {
	var l load
	flags.IntVar(&l.tcp, "tcp", 0, "TCP flows to each address")
	flags.IntVar(&l.udp, "udp", 0, "UDP flows to each address")
	flags.IntVar(&l.rate, "rate", 50, "messages a second, each way, of each flow")
	if err := flags.Parse(args); err != nil {
		return load{}, err
	}
	if l.rate < 1 {
		return load{}, fmt.Errorf("-rate %d: say 1 or more", l.rate)
	}
	l.addresses = flags.Args()
	return l, nil
}

// readKnocker reads the arguments of knock.
func readKnocker(flags *flag.FlagSet, args []string, in io.Reader) (knocker, error) {
	var k knocker
	flags.StringVar(&k.marker, "marker", "", "what is sent, and listened for")
	flags.StringVar(&k.listen, "listen", "", "address to listen on")
	flags.DurationVar(&k.interval, "interval", 20*time.Millisecond, "time between two messages to a target")
	flags.DurationVar(&k.during, "for", 0, "how long to send")
	more := flags.Bool("stdin", false, "read more targets from stdin")
	if err := flags.Parse(args); err != nil {
		return knocker{}, err
	}
	if k.interval <= 0 {
		return knocker{}, fmt.Errorf("-interval %v: say more than zero", k.interval)
	}
	if *more {
		k.more = in
	}
	return k, nil
}

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/capture"
)

// verifyName is the name of the command, whose exit status main makes.
const verifyName = "verify"

// The errors that the output has told already.
var (
	// errViolated says that something is not encrypted that should be, or not as planned.
	errViolated = errors.New("violated")
	// errNotProven says that nothing was found against it, and too little for it.
	errNotProven = errors.New("not proven")
)

// maxDuration bounds what a verification keeps in memory.
const maxDuration = 10 * time.Minute

// The help of the command.
const (
	verifyLong = `Prove on a live node that pod traffic between nodes is encrypted.

It sends probes of its own, which carry a random marker, to every other node through the tunnel: from the first address of this
node's podCIDRs to the first address of the other's, which its kernel answers. Meanwhile it captures all links that lead out of the
node, in both directions and both families, and counts packets that carry the marker or a pod's address in clear (there must be
none) and WireGuard's own. Before and after it asks the daemon whether guards, rules, sets, peers and routes stand as planned.

A packet in clear that was received was let out by another node, or forged by somebody on the way; the guards drop it.

It needs neither tcpdump nor pods, harms no traffic, and sends at most 2000 small packets in a second. What is in clear by design
(a pod's traffic to the world and to nodes' own addresses, which is translated to the node's address) is not its subject;
"warrend status" lists it. A host beside the cluster that talks to a pod's address does so in clear and is counted, unless
--non-masquerade-cidr names its network.

The exit status is 0 when encryption is proven, 1 when something contradicts it, and 2 when it is not proven: no WireGuard packet
was seen although there are peers, a peer did not answer, no tunnel leads to a node, packets escaped the capture, or the command could not
do its work.`

	verifyExamples = `  # On the node, or in the daemon's container there:
  kubectl -n warren-system exec ds/warren -- warrend verify

  # A whole minute, for programs:
  warrend verify --duration 1m -o json | jq .conclusion`
)

// verifyCommand proves that traffic is encrypted.
func verifyCommand() *cobra.Command {
	var p paths
	var duration time.Duration
	var output string
	cmd := &cobra.Command{
		Use:     verifyName,
		Short:   "Prove on this node's links that pod traffic is encrypted",
		Long:    verifyLong,
		Example: verifyExamples,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return fmt.Errorf("-o %s: say table or json", output)
			}
			if duration < time.Second || duration > maxDuration {
				return fmt.Errorf("--duration=%s: say 1s to %s", duration, maxDuration)
			}
			clock := time.Now //nolint:forbidigo // the command's clock
			v, err := verify(cmd.Context(), verifier{socket: p.socket(), duration: duration, clock: clock, progress: cmd.ErrOrStderr()})
			if err != nil {
				return err
			}
			if err = printVerification(cmd.OutOrStdout(), v, output, clock()); err != nil {
				return err
			}
			return v.Conclusion.status()
		},
	}
	p.add(cmd.Flags())
	cmd.Flags().DurationVar(&duration, "duration", 10*time.Second, "how long to send probes and to capture")
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	return cmd
}

// status is the error whose exit status tells the conclusion.
func (c conclusion) status() error {
	switch c {
	case proven:
		return nil
	case violated:
		return errViolated
	default:
		return errNotProven
	}
}

// verifier is how a verification is made.
type verifier struct {
	socket   string
	duration time.Duration
	clock    func() time.Time
	progress io.Writer
}

// verify asks, probes, captures, asks again and concludes.
func verify(ctx context.Context, o verifier) (verification, error) {
	before, err := o.ask(ctx)
	if err != nil {
		return verification{}, err
	}
	if before.Status.Encryption.Mode == "off" {
		return unencrypted(before), nil
	}
	probes, sendErr := newProber(before.Own, before.Peers, o.clock)
	if least := probes.least(); o.duration < least {
		return verification{}, fmt.Errorf("--duration=%s: the probes to %d addresses take %s", o.duration, len(probes.targets), least)
	}
	links, err := capture.Start(capture.Watch{
		Marker: probes.marker, Pods: before.Pods, Direct: before.Direct, Port: before.Status.Encryption.Port,
	})
	if err != nil {
		return verification{}, err
	}
	fmt.Fprintf(o.progress, "capturing for %s, with probes to %d addresses of %d nodes\n", o.duration, len(probes.targets), len(before.Peers))
	probes.run(ctx, o.duration, func(sent, answered int) {
		fmt.Fprintf(o.progress, "%d probes sent, %d answered\n", sent, answered)
	})
	report, err := links.Stop()
	if err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		return verification{}, err
	}
	after, err := o.ask(ctx)
	if err != nil {
		return verification{}, err
	}
	v := conclude(evidence{before: before, after: after, report: report, probes: probes.targets, duration: o.duration})
	if sendErr != nil {
		v.Doubts = append(v.Doubts, sendErr.Error())
		v.settle()
	}
	return v, nil
}

// ask asks the daemon of this node for what is planned and what stands.
func (o verifier) ask(ctx context.Context) (meshFacts, error) {
	ctx, cancel := context.WithTimeout(ctx, verifyPatience+5*time.Second)
	defer cancel()
	response, err := agentapi.Call(ctx, o.socket, agentapi.Request{Op: agentapi.OpVerify})
	if refusal, ok := errors.AsType[*agentapi.Error](err); ok {
		return meshFacts{}, refusal
	}
	if err != nil {
		return meshFacts{}, fmt.Errorf("asking warrend at %s (does it run on this node?): %w", o.socket, err)
	}
	var f meshFacts
	if err = json.Unmarshal(response.Verification, &f); err != nil {
		return meshFacts{}, fmt.Errorf("reading the answer of warrend at %s: %w", o.socket, err)
	}
	return f, nil
}

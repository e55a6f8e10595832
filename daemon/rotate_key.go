package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/spf13/cobra"

	"github.com/warren-cni/warren/pkg/agentapi"
)

// handle answers a question about the change of the node's key.
func (r *rotator) handle(question agentapi.Rotate) agentapi.Response {
	if !r.encrypted {
		return refuse(types.ErrInternal, errors.New("the daemon runs with --encryption off: no key is in use"))
	}
	if question.Start {
		if err := r.begin("the operator asked for it"); err != nil {
			return refuse(types.ErrInternal, fmt.Errorf("%w: the old key stays in use", err))
		}
	}
	answer := r.answer()
	return agentapi.Response{Rotation: &answer}
}

// rotateKeyCommand changes the key of this node.
func rotateKeyCommand() *cobra.Command {
	var p paths
	var wait bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "rotate-key",
		Short: "Change this node's WireGuard key without breaking a connection",
		Long: `Change this node's WireGuard key without breaking a connection.

The next key is published first, and put in use when the other nodes have had the time to learn it (--rotate-notice of
"warrend run", 5s). A daemon that is restarted meanwhile goes on with the change. --rotate-every of "warrend run" does this by itself.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
			defer cancel()
			ask := func(start bool) (agentapi.Rotation, error) {
				response, err := agentapi.Call(ctx, p.socket(), agentapi.Request{Op: agentapi.OpRotate, Rotate: &agentapi.Rotate{Start: start}})
				if err != nil {
					return agentapi.Rotation{}, fmt.Errorf("asking warrend at %s (does it run on this node?): %w", p.socket(), err)
				}
				return *response.Rotation, nil
			}
			return changeKey(ctx, cmd.OutOrStdout(), wait, ask)
		},
	}
	p.add(cmd.Flags())
	cmd.Flags().BoolVar(&wait, "wait", false, "show how the change goes on, until the new key is in use and published")
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to wait at most; the change itself goes on")
	return cmd
}

// changeKey begins a change of the key and follows it.
func changeKey(ctx context.Context, w io.Writer, wait bool, ask func(start bool) (agentapi.Rotation, error)) error {
	now, err := ask(true)
	if err != nil {
		return err
	}
	if _, err = fmt.Fprintf(w, "key in use  %s\nnext key    %s\n", now.PublicKey, now.NextPublicKey); err != nil || !wait {
		return err
	}
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for stage := ""; ; {
		if now.Stage != stage {
			stage = now.Stage
			if _, err = fmt.Fprintln(w, stageLine(stage)); err != nil || stage == agentapi.StageDone {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("waiting for the new key: %w; the change goes on: %s", context.Cause(ctx), reason(now))
		case <-again.C:
		}
		// A daemon that restarts goes on with the change.
		if answer, errAsk := ask(false); errAsk == nil {
			now = answer
		}
	}
}

// stageLine says what a stage is.
func stageLine(stage string) string {
	switch stage {
	case agentapi.StagePrepared:
		return "prepared    the next key is written; it is being published"
	case agentapi.StageAnnounced:
		return "announced   the next key is published; the other nodes learn it"
	case agentapi.StageSwitched:
		return "switched    the next key is in use; it is being published as such"
	default:
		return "done        the next key is in use and published, the old one is gone"
	}
}

// reason is why a change takes long.
func reason(now agentapi.Rotation) string {
	if now.Problem != "" {
		return now.Problem
	}
	return stageLine(now.Stage)
}

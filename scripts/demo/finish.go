package main

import (
	"context"
	"errors"
	"strings"

	"github.com/warren-cni/warren/pkg/lab"
)

// showStatus shows what an operator sees.
func (d *demo) showStatus(ctx context.Context) error {
	node := d.lab.Nodes[1]
	err := d.title("What an operator sees", "$ warrend status    (on "+node.Name+")")
	if err != nil {
		return err
	}
	status, err := node.Command(ctx, "status")
	return errors.Join(d.printf("%s", indent(status)), err)
}

// indent moves lines to the right.
func indent(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		b.WriteString("   | " + line)
	}
	return b.String()
}

// showControl shows that the capture would have seen what it did not see.
func (d *demo) showControl(ctx context.Context) error {
	err := d.title("The counter-check", `Would the capture have seen packets in clear? The daemons are started again with --encryption off, and the same
connections are tried: now the markers and the pods' addresses must be seen. The policies hold as before.`)
	if err != nil {
		return err
	}
	if err = d.stop(d.daemons); err != nil {
		return err
	}
	if err = d.stop(d.tunnels); err != nil {
		return err
	}
	d.tunnels = nil
	if err = d.startDaemons(ctx, 0, "--encryption", "off"); err != nil {
		return err
	}
	marker := lab.NewMarker()
	capture, err := d.lab.Capture(marker)
	if err != nil {
		return err
	}
	reachErr := d.reach(ctx, marker, tiers())
	counts, err := capture.Stop()
	if err = errors.Join(reachErr, err); err != nil {
		return err
	}
	return errors.Join(
		d.check(counts.Marked > 0, "packets with the marker in clear: %d", counts.Marked),
		d.check(counts.Pods > 0, "packets with a pod's address in clear: %d", counts.Pods),
		d.check(counts.WireGuard == 0, "WireGuard packets: %d", counts.WireGuard))
}

// cleanUp shows that nothing of Warren's stays on a node.
func (d *demo) cleanUp(ctx context.Context) error {
	err := d.title("Clean-up", "$ warrend cleanup    (on each node, with the pods still there)")
	if err != nil {
		return err
	}
	if err = d.stop(d.daemons); err != nil {
		return err
	}
	d.daemons = nil
	for _, node := range d.lab.Nodes {
		before, err := node.Leftovers(ctx)
		if err != nil {
			return err
		}
		if _, err = node.Command(ctx, "cleanup"); err != nil {
			return err
		}
		after, err := node.Leftovers(ctx)
		if err != nil {
			return err
		}
		err = d.check(len(before) > 0 && len(after) == 0, "%s: of %d rules, sets, links, routes and files of Warren's, %d are left %s",
			node.Name, len(before), len(after), strings.Join(after, "; "))
		if err != nil {
			return err
		}
	}
	return nil
}

// stop stops processes, and tells which did not end well.
func (d *demo) stop(processes []*lab.Process) error {
	var errs []error
	for _, process := range processes {
		errs = append(errs, process.Stop())
	}
	return errors.Join(errs...)
}

// printLogs prints the end of the daemons' logs for a person who looks for what went wrong.
func (d *demo) printLogs() {
	for i, daemon := range d.daemons {
		_ = d.printf("\nThe log of %s ends in:\n%s", d.lab.Nodes[i].Name, indent(daemon.Log(15)+"\n")) // the demo has failed already
	}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/lab"
)

// changePatience is how long a changed policy may take until it is seen.
const changePatience = 10 * time.Second

// demo is the play and everything on the stage.
type demo struct {
	out     io.Writer
	clock   func() time.Time
	lab     *lab.Lab
	objects objects

	pods    []*lab.Pod
	tunnels []*lab.Process
	daemons []*lab.Process
	number  int // of the last act
}

// play plays all acts. The first thing that is not as expected ends it.
func (d *demo) play(ctx context.Context) error {
	begin := d.clock()
	err := d.printf("Warren on this machine: three nodes, nine pods, policies and an encrypted wire. Nothing of the machine's own network\nis touched.\n")
	if err != nil {
		return err
	}
	for _, act := range []func(context.Context) error{
		d.startNodes, d.startPods, d.showPolicies, d.showFaults, d.showStatus, d.showControl, d.cleanUp,
	} {
		err = act(ctx)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return err
		}
	}
	return d.printf("\nEverything was as expected, in %.0f seconds.\n", d.clock().Sub(begin).Seconds())
}

// printf prints.
func (d *demo) printf(format string, values ...any) error {
	_, err := fmt.Fprintf(d.out, format, values...)
	return err
}

// title begins an act.
func (d *demo) title(title, explanation string) error {
	d.number++
	return d.printf("\n%d. %s\n   %s\n", d.number, title, strings.ReplaceAll(explanation, "\n", "\n   "))
}

// check prints a line that was checked, and makes an error of one that is wrong.
func (d *demo) check(good bool, format string, values ...any) error {
	text := fmt.Sprintf(format, values...)
	if !good {
		return errors.Join(d.printf("   WRONG  %s\n", text), errors.New(text))
	}
	return d.printf("   ok     %s\n", text)
}

// startNodes starts the daemons.
func (d *demo) startNodes(ctx context.Context) error {
	err := d.title("Three nodes", `Each node is a network namespace of this machine; one bridge, "the wire", connects them. On each runs the real
daemon, warrend. It reads Kubernetes objects from a directory, where a cluster would have an API server.`)
	if err != nil {
		return err
	}
	for _, namespace := range d.objects.namespaces {
		if err = d.lab.Write("namespace-"+namespace.Name, namespace); err != nil {
			return err
		}
	}
	for _, policy := range d.objects.policies {
		if err = d.lab.Write(policyFile(policy), policy); err != nil {
			return err
		}
	}
	begin := d.clock()
	for _, node := range d.lab.Nodes {
		tunnel, tunnelErr := node.StartTunnel(ctx)
		if tunnelErr != nil {
			return tunnelErr
		}
		d.tunnels = append(d.tunnels, tunnel)
	}
	if err = d.startDaemons(ctx, len(d.lab.Nodes)-1); err != nil {
		return err
	}
	for _, node := range d.lab.Nodes {
		status, err := node.Status(ctx)
		if err != nil {
			return err
		}
		err = d.check(status.Encryption.Mode != "off", "%s is ready: pods get addresses of %s; WireGuard (%s) to %d other nodes",
			node.Name, strings.Join(status.PodCIDRs, " and "), status.Encryption.Mode, len(status.Peers))
		if err != nil {
			return err
		}
	}
	return d.printf("   (%.1f seconds)\n", d.clock().Sub(begin).Seconds())
}

// startDaemons starts a daemon on every node and waits until each is ready and has that many peers.
func (d *demo) startDaemons(ctx context.Context, peers int, flags ...string) error {
	d.daemons = nil
	for _, node := range d.lab.Nodes {
		daemon, err := node.StartDaemon(ctx, nil, flags...)
		if err != nil {
			return err
		}
		d.daemons = append(d.daemons, daemon)
	}
	for i, node := range d.lab.Nodes {
		if err := node.Ready(ctx, d.daemons[i], peers); err != nil {
			return err
		}
	}
	return nil
}

// startPods makes a pod of every tier on every node, and starts a server in each.
func (d *demo) startPods(ctx context.Context) error {
	err := d.title("Nine pods", `A pod of each tier on each node. The plugin, warren, is called through libcni, as a container runtime does. It returns
when the pod's policies are in the kernel: there is no moment in which a new pod is open.`)
	if err != nil {
		return err
	}
	begin := d.clock()
	for _, tier := range tiers() {
		var places []string
		for _, node := range d.lab.Nodes {
			pod, err := node.AddPod(ctx, lab.Pod{Namespace: tier.name, Name: fmt.Sprintf("%s-on-%s", tier.name, node.Name), Labels: tier.labels})
			if err != nil {
				return err
			}
			d.pods = append(d.pods, pod)
			if _, err = lab.NewEcho(ctx, pod.Netns(), tier.port); err != nil { // it ends with the demo
				return err
			}
			places = append(places, fmt.Sprintf("%s on %s", pod.Addresses[0], node.Name))
		}
		if err := d.check(true, "%-8s  %s", tier.name, strings.Join(places, ", ")); err != nil {
			return err
		}
	}
	return d.printf("   (%.1f seconds)\n", d.clock().Sub(begin).Seconds())
}

// showPolicies shows what the policies do, and what the wire shows meanwhile.
func (d *demo) showPolicies(ctx context.Context) error {
	err := d.title("Who reaches whom", `The policies let web reach api, and api reach database; nothing else. Every pod tries every other pod, over IPv4 and
IPv6, with a random marker as the message. "yes" and "no" are what the policies say; the figures are what got through.`)
	if err != nil {
		return err
	}
	marker := lab.NewMarker()
	capture, err := d.lab.Capture(marker)
	if err != nil {
		return err
	}
	reachErr := d.reach(ctx, marker, tiers())
	if reachErr == nil {
		reachErr = d.change(ctx, marker)
	}
	counts, err := capture.Stop()
	if err = errors.Join(reachErr, err); err != nil {
		return err
	}
	return d.showWire(counts)
}

// change changes a policy while everything runs, and back.
func (d *demo) change(ctx context.Context, marker [lab.MarkerSize]byte) error {
	err := d.title("A policy changes", `A file of the directory changes: api no longer lets anybody in. Then it changes back.`)
	if err != nil {
		return err
	}
	closed := tiers()
	closed[0].reaches = ""
	for _, policy := range d.objects.withoutIngress("api") {
		if err = d.lab.Write(policyFile(policy), policy); err != nil {
			return err
		}
	}
	if err = d.await(ctx, marker, false); err != nil {
		return err
	}
	if err = d.reach(ctx, marker, closed); err != nil {
		return err
	}
	for _, policy := range d.objects.policies {
		if err = d.lab.Write(policyFile(policy), policy); err != nil {
			return err
		}
	}
	return d.await(ctx, marker, true)
}

// await waits until every connection from web to api gets through, or none.
func (d *demo) await(ctx context.Context, marker [lab.MarkerSize]byte, open bool) error {
	begin := d.clock()
	ctx, cancel := context.WithTimeout(ctx, changePatience)
	defer cancel()
	attempts := slices.DeleteFunc(d.attempts(marker, tiers()), func(a attempt) bool { return a.from != "web" || a.to != "api" })
	err := lab.Until(ctx, func() error {
		try(ctx, attempts, func(attempt) time.Duration { return patienceChange })
		if i := slices.IndexFunc(attempts, func(a attempt) bool { return a.seen != open }); i >= 0 {
			return fmt.Errorf("%s: still as before", attempts[i].what)
		}
		return nil
	})
	word := map[bool]string{false: "closed", true: "open again"}[open]
	return errors.Join(err, d.check(err == nil, "web to api is %s on all nodes, %.1f seconds after the change", word, d.clock().Sub(begin).Seconds()))
}

// reach tries every connection, prints the table, and returns an error where it is not as the tiers say.
func (d *demo) reach(ctx context.Context, marker [lab.MarkerSize]byte, wanted []tier) error {
	attempts := d.attempts(marker, wanted)
	try(ctx, attempts, attempt.patience)
	if ctx.Err() != nil {
		return context.Cause(ctx) // what did not get through proves nothing
	}
	var columns []string
	for _, tier := range wanted {
		columns = append(columns, tier.name)
	}
	wrong, err := table(d.out, append(slices.Clone(columns), ownNode, otherNode), columns, attempts)
	if err != nil {
		return err
	}
	var examples []string
	for _, a := range wrong[:min(len(wrong), 5)] {
		examples = append(examples, fmt.Sprintf("%s: expected %v, seen %v", a.what, a.expected, a.seen))
	}
	if len(wrong) > 0 {
		return d.check(false, "%d of %d connections are not as expected:\n          %s", len(wrong), len(attempts), strings.Join(examples, "\n          "))
	}
	return d.check(true, "all %d connections are as expected (a node always reaches its own pods: the kubelet has to)", len(attempts))
}

// attempts are all connections between pods, and from nodes to pods.
func (d *demo) attempts(marker [lab.MarkerSize]byte, wanted []tier) []attempt {
	var attempts []attempt
	add := func(row, what string, from *lab.Node, netns ns.NetNS, to *lab.Pod, expected bool) {
		port := wanted[slices.IndexFunc(wanted, func(t tier) bool { return t.name == to.Namespace })].port
		for _, address := range to.Addresses {
			attempts = append(attempts, attempt{
				from: row, to: to.Namespace, expected: expected, nodes: [2]*lab.Node{from, to.Node}, address: netip.AddrPortFrom(address, port),
				what: fmt.Sprintf("%s to %s (%s)", what, to.Name, address),
				probe: func(ctx context.Context, to netip.AddrPort) error {
					return lab.Probe(ctx, netns, to, marker)
				},
			})
		}
	}
	for _, to := range d.pods {
		for _, from := range d.pods {
			if from != to {
				reaches := wanted[slices.IndexFunc(wanted, func(t tier) bool { return t.name == from.Namespace })].reaches
				add(from.Namespace, from.Name, from.Node, from.Netns(), to, reaches == to.Namespace)
			}
		}
		for _, node := range d.lab.Nodes {
			row := map[bool]string{true: ownNode, false: otherNode}[node == to.Node]
			add(row, node.Name, node, node.Netns(), to, node == to.Node)
		}
	}
	return attempts
}

// showWire prints what the capture saw while the mesh was encrypted.
func (d *demo) showWire(counts lab.Counts) error {
	err := d.title("What the wire shows", `Meanwhile every packet between the nodes was captured, as anybody in that network could.`)
	if err != nil {
		return err
	}
	for _, example := range counts.Examples {
		if err = d.printf("   in clear: %s\n", example); err != nil {
			return err
		}
	}
	return errors.Join(
		d.check(counts.Marked == 0, "packets with the marker in clear: %d", counts.Marked),
		d.check(counts.Pods == 0, "packets with a pod's address in clear: %d", counts.Pods),
		d.check(counts.WireGuard > 0, "WireGuard packets: %d", counts.WireGuard))
}

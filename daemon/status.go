package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// notCovered is what leaves in clear although encryption is on.
var notCovered = []string{ //nolint:gochecknoglobals // a constant list
	"pods to addresses outside the cluster CIDR, other nodes' InternalIPs among them (host-network servers, NodePorts)",
	"nodes to nodes (the API server, the kubelet), and to Services while kube-proxy has no rules for them",
	"hosts beside the cluster that route to a pod's address by a node, and the answers",
	"traffic that stays on one node",
}

// status makes the answer of `warrend status`.
func (n *node) status(ctx context.Context) agentapi.Status {
	o := n.outcomeNow()
	s := agentapi.Status{
		Node:       n.options.nodeName,
		Version:    version,
		Ready:      o.ready,
		PodCIDRs:   texts(o.mesh.PodCIDRs),
		Encryption: n.encryptionStatus(o),
		Policies:   n.policyStatus(o),
		Notes:      o.host.notes,
		Peers:      []agentapi.Peer{},
		Problems:   []agentapi.Problem{},
	}
	problems := o.problems
	if !o.synced {
		problems = n.source.Problems()
		problems = append(problems, cluster.Problem{
			Code: "NotSynced", Object: "Node " + n.options.nodeName, Message: "the cluster's objects have not been read yet",
			Remedy: "wait; if it lasts, check that the daemon reaches the API server",
		})
	}
	if n.options.encryptionMode {
		var meshProblems []cluster.Problem
		s.Peers, meshProblems = n.peers(ctx, o, &s.Encryption)
		problems = slices.Concat(problems, meshProblems, n.heldAddresses(o))
	}
	for _, p := range cluster.SortProblems(problems) {
		s.Problems = append(s.Problems, agentapi.Problem(p))
	}
	return s
}

// encryptionStatus says what is encrypted.
func (n *node) encryptionStatus(o outcome) agentapi.Encryption {
	if !n.options.encryptionMode {
		return agentapi.Encryption{
			Mode: "off", MTU: o.mesh.MTU, Guard: "none",
			NotCovered: []string{"everything: pod traffic between nodes is in clear (--encryption off)"},
		}
	}
	e := agentapi.Encryption{
		PublicKey: publicKey(n.keys.keys.Current()), Port: n.options.port, MTU: o.mesh.MTU,
		Guard: "cluster-cidr", GuardStands: o.standing, NotCovered: notCovered,
	}
	if len(n.options.parsedCluster) == 0 {
		e.Guard = "known nodes only"
	}
	if n.options.nodeTraffic {
		e.NotCovered = slices.Concat([]string{"pods to addresses outside the cluster CIDR; to another node's InternalIP until the node has answered 16 of 20 questions there, which are asked where the peer's endpoint is"}, notCovered[1:])
	}
	return e
}

// peers reads the peers from the device and names them.
func (n *node) peers(ctx context.Context, o outcome, e *agentapi.Encryption) ([]agentapi.Peer, []cluster.Problem) {
	peers := []agentapi.Peer{}
	device, err := n.tunnel.Status(ctx)
	if err != nil {
		e.Mode = "unknown"
		return peers, []cluster.Problem{applyProblem(meshCode(err), "Node "+n.options.nodeName, fmt.Errorf("reading the tunnel: %w", err),
			"pods of other nodes are unreachable until the tunnel answers; look at its log")}
	}
	e.Mode = string(device.Mode)
	names := make(map[string]string, len(o.mesh.Peers))
	for _, p := range o.mesh.Peers {
		names[base64.StdEncoding.EncodeToString(p.PublicKey[:])] = p.Node
		names[base64.StdEncoding.EncodeToString(p.Next[:])] = p.Node + " (next key)"
	}
	for _, p := range device.Peers {
		key := base64.StdEncoding.EncodeToString(p.PublicKey[:])
		peers = append(peers, agentapi.Peer{
			Node: names[key], PublicKey: key, Endpoint: p.Endpoint.String(), AllowedIPs: texts(p.AllowedIPs),
			LastHandshake: p.LastHandshake, ReceivedBytes: p.ReceivedBytes, SentBytes: p.SentBytes,
		})
	}
	return peers, nil
}

// heldAddresses reports InternalIPs of other nodes that pods do not reach because the tunnel does not lead there any more.
func (n *node) heldAddresses(o outcome) []cluster.Problem {
	if len(o.mesh.Hosts) == 0 {
		return nil
	}
	held, err := n.tunnel.Held()
	if err != nil || len(held) == 0 {
		return nil // what cannot be read is reported with the mesh
	}
	owner := map[netip.Addr]string{}
	for _, h := range o.mesh.Hosts {
		owner[h.Address] = h.Node
	}
	names := make([]string, 0, len(held))
	for _, a := range held {
		names = append(names, fmt.Sprintf("%s of node %s", a, owner[a]))
	}
	const most = 5
	if more := len(names) - most; more > 0 {
		names = append(names[:most], fmt.Sprintf("%d more", more))
	}
	return []cluster.Problem{{
		Code: "NodeAddressesHeld", Object: "Node " + n.options.nodeName,
		Message: "pods do not reach InternalIPs that were in the tunnel, because it does not lead there now and nothing for them goes in clear: " + strings.Join(names, ", "),
		Remedy: fmt.Sprintf("see whether the tunnel runs here and there, and whether that node is reached at the address; to have what pods send to %s in clear: %s",
			held[0], wgdevice.GiveUp(held[0])),
	}}
}

// policyStatus counts what is programmed.
func (n *node) policyStatus(o outcome) agentapi.Policies {
	c, ruleset := count(n.planner.snapshot()), n.planner.ruleset()
	p := agentapi.Policies{Policies: c.policies, Pods: c.pods, Isolated: c.isolated, LastApply: o.applied}
	for _, family := range netfilter.Families {
		rules := ruleset.Of(family)
		p.Sets += len(rules.Sets)
		for _, c := range rules.Chains {
			p.Rules += len(c.Rules)
		}
	}
	return p
}

// texts prints values.
func texts[T fmt.Stringer](values []T) []string {
	out := make([]string, 0, len(values))
	for _, v := range values {
		out = append(out, v.String())
	}
	return out
}

// statusCommand asks the daemon of this node.
func statusCommand() *cobra.Command {
	var p paths
	var output string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what this node enforces, its peers and its problems",
		Long: `Show what this node enforces, its peers and its problems, as the running daemon sees them.

The exit status is 0 when the node is ready and has no problem, 1 otherwise.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return fmt.Errorf("-o %s: say table or json", output)
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), 10*time.Second)
			defer cancel()
			status, err := agentapi.AskStatus(ctx, p.socket())
			if err != nil {
				return fmt.Errorf("asking warrend at %s (does it run on this node?): %w", p.socket(), err)
			}
			if err := printStatus(cmd.OutOrStdout(), status, output, time.Now()); err != nil {
				return err
			}
			return verdict(status)
		},
	}
	p.add(cmd.Flags())
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	return cmd
}

// verdict is the exit status of a status.
func verdict(s agentapi.Status) error {
	switch {
	case !s.Ready:
		return fmt.Errorf("node %s is not ready", s.Node)
	case len(s.Problems) > 0:
		return fmt.Errorf("node %s has %d problem(s)", s.Node, len(s.Problems))
	default:
		return nil
	}
}

// printStatus prints a status for people or for programs.
func printStatus(w io.Writer, s agentapi.Status, output string, now time.Time) error {
	if output == "json" {
		encoder := json.NewEncoder(w)
		encoder.SetIndent("", "  ")
		return encoder.Encode(s)
	}
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 4, 2, ' ', 0)
	fmt.Fprintf(t, "NODE\t%s\n", s.Node)
	fmt.Fprintf(t, "READY\t%v\n", s.Ready)
	fmt.Fprintf(t, "POD CIDRS\t%s\n", orNone(s.PodCIDRs))
	fmt.Fprintf(t, "ENCRYPTION\t%s\n", encryptionLine(s.Encryption))
	for _, text := range s.Encryption.NotCovered {
		fmt.Fprintf(t, "  in clear\t%s\n", text)
	}
	fmt.Fprintf(t, "GUARD\t%s\n", guardLine(s.Encryption))
	fmt.Fprintf(t, "POLICIES\t%d in the cluster; %d pods here, %d isolated; %d rules, %d sets\n",
		s.Policies.Policies, s.Policies.Pods, s.Policies.Isolated, s.Policies.Rules, s.Policies.Sets)
	fmt.Fprintf(t, "LAST APPLY\t%s\n", ago(now, s.Policies.LastApply))
	_ = t.Flush() // a strings.Builder takes everything
	printPeers(&b, s, now)
	for _, note := range s.Notes {
		fmt.Fprintf(&b, "\nNote: %s.\n", note)
	}
	printProblems(&b, s.Problems)
	_, err := io.WriteString(w, b.String())
	return err
}

// encryptionLine is the mode at a glance.
func encryptionLine(e agentapi.Encryption) string {
	if e.Mode == "off" {
		return fmt.Sprintf("OFF: pod traffic between nodes is in clear (MTU %d)", e.MTU)
	}
	return fmt.Sprintf("WireGuard (%s), UDP port %d, MTU %d, public key %s", e.Mode, e.Port, e.MTU, e.PublicKey)
}

// guardLine says what the guards cover, and no more than is known.
func guardLine(e agentapi.Encryption) string {
	if e.Mode == "off" || e.GuardStands {
		return e.Guard
	}
	return fmt.Sprintf("NOT KNOWN TO STAND, see the problems (is to cover: %s)", e.Guard)
}

// printPeers prints the table of peers.
func printPeers(b *strings.Builder, s agentapi.Status, now time.Time) {
	if s.Encryption.Mode == "off" {
		return
	}
	b.WriteString("\n")
	if len(s.Peers) == 0 {
		b.WriteString("No peers.\n")
		return
	}
	t := tabwriter.NewWriter(b, 0, 4, 3, ' ', 0)
	fmt.Fprintln(t, "PEER\tENDPOINT\tLAST HANDSHAKE\tRECEIVED\tSENT\tALLOWED IPS")
	for _, p := range s.Peers {
		fmt.Fprintf(t, "%s\t%s\t%s\t%d B\t%d B\t%s\n", p.Node, p.Endpoint, ago(now, p.LastHandshake), p.ReceivedBytes, p.SentBytes, orNone(p.AllowedIPs))
	}
	_ = t.Flush() // a strings.Builder takes everything
}

// printProblems prints each problem with what to do.
func printProblems(b *strings.Builder, problems []agentapi.Problem) {
	b.WriteString("\n")
	if len(problems) == 0 {
		b.WriteString("No problems.\n")
		return
	}
	fmt.Fprintf(b, "%d PROBLEM(S)\n", len(problems))
	for _, p := range problems {
		subject := p.Object
		if p.Field != "" {
			subject += ", " + p.Field
		}
		fmt.Fprintf(b, "%s: %s\n    %s\n    -> %s\n", p.Code, subject, p.Message, p.Remedy)
	}
}

// ago prints how long ago a moment was.
func ago(now, then time.Time) string {
	if then.IsZero() {
		return "never"
	}
	return now.Sub(then).Round(time.Second).String() + " ago"
}

// orNone joins texts.
func orNone(values []string) string {
	if len(values) == 0 {
		return "<none>"
	}
	return strings.Join(values, ", ")
}

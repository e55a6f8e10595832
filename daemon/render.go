package main

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// renderCommand shows a plan without applying it.
func renderCommand() *cobra.Command {
	var p planning
	var uplink mesh.Uplink
	cmd := &cobra.Command{
		Use:   "render",
		Short: "Print the rules, sets and mesh that a node would apply, touching nothing",
		Long: `Print the rules, sets and mesh that a node would apply, touching nothing.

Addresses of pods come from their status. The exit status is 1 when an object has a problem; what does not
depend on it is printed all the same. An ipBlock that names the address of a Service in the directory is warned of: it never
matches.`,
		Example: "  warrend render --objects ./objects --node worker-1",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if p.objects == "" || p.nodeName == "" {
				return errors.New("render needs --objects DIR and --node NAME")
			}
			if err := p.validate(); err != nil {
				return err
			}
			objects, err := kube.ReadDirectory(p.objects, p.nodeName)
			if err != nil {
				return err
			}
			snapshot, problems := objects.Snapshot()
			if _, ok := snapshot.Node(p.nodeName); !ok {
				return fmt.Errorf("no Node %s in %s", p.nodeName, p.objects)
			}
			planner := newPlanner(p)
			wanted := planner.plan(planner.learn(snapshot.Delta(), attachmentsIn(snapshot)), uplink)
			if err := printPlan(cmd.OutOrStdout(), planner.ruleset(), wanted.mesh); err != nil {
				return err
			}
			for _, advice := range policy.BlindBlocks(snapshot.Policies, objects.Services()) {
				fmt.Fprintln(cmd.ErrOrStderr(), "warning:", advice)
			}
			problems = cluster.SortProblems(append(problems, wanted.problems...))
			for _, problem := range problems {
				fmt.Fprintln(cmd.ErrOrStderr(), problem)
			}
			if len(problems) > 0 {
				return fmt.Errorf("%d problem(s)", len(problems))
			}
			return nil
		},
	}
	p.add(cmd.Flags())
	cmd.Flags().StringVar(&p.nodeName, "node", "", "name of the node to render for (required)")
	cmd.Flags().IntVar(&uplink.MTU, "uplink-mtu", 1500, "MTU of the node's uplink, from which that of the tunnel follows")
	return cmd
}

// attachmentsIn makes attachments of the pods of the own node, with the addresses that their status says.
func attachmentsIn(s cluster.Snapshot) cluster.Attachments {
	a := cluster.Attachments{All: true}
	for _, pod := range s.Pods {
		if pod.Node == s.Self && !pod.HostNetwork {
			a.List = append(a.List, cluster.Attachment{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, Addresses: pod.Addresses})
		}
	}
	return a
}

// printPlan prints a plan for people.
func printPlan(w io.Writer, rules netfilter.Ruleset, wanted mesh.Config) error {
	var b strings.Builder
	for _, family := range netfilter.Families {
		fmt.Fprintf(&b, "# %s\n%s\n", family, rules.Of(family).Render(family))
	}
	printMesh(&b, wanted)
	_, err := io.WriteString(w, b.String())
	return err
}

// printMesh prints the mesh in the words of ip and wg.
func printMesh(b *strings.Builder, c mesh.Config) {
	b.WriteString("# mesh\n")
	if c.Encrypted {
		fmt.Fprintf(b, "link %s mtu %d port %d\n", mesh.Link, c.MTU, c.ListenPort)
	}
	for _, a := range c.Addresses {
		fmt.Fprintf(b, "address %s\n", a)
	}
	for _, p := range c.Peers {
		fmt.Fprintf(b, "peer %s endpoint %s allowed-ips %s # %s\n",
			base64.StdEncoding.EncodeToString(p.PublicKey[:]), p.Endpoint, strings.Join(texts(p.AllowedIPs), ","), p.Node)
	}
	for _, r := range c.Routes {
		if r.Via.IsValid() {
			fmt.Fprintf(b, "route %s via %s\n", r.Destination, r.Via)
			continue
		}
		fmt.Fprintf(b, "route %s dev %s src %s\n", r.Destination, mesh.Link, r.Source)
	}
	for _, u := range c.Unreachable {
		fmt.Fprintf(b, "route unreachable %s\n", u)
	}
}

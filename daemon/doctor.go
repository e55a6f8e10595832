package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/warren-cni/warren/pkg/cniconf"
	"github.com/warren-cni/warren/pkg/preflight"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// doctorName is the name of the command, whose exit status main makes.
const doctorName = "doctor"

// errUnfit says that the node has something on which Warren cannot work; the output has told it.
var errUnfit = errors.New("the node is not fit for Warren")

// The help of the command.
const (
	doctorLong = `Look for what on this node keeps Warren from working, or will disturb it, before it is installed or at any time.

It looks at the kernel and its modules, the backend of iptables, forwarding, the tunnel's UDP port, MTU, networks that overlap,
leftovers of other CNIs, firewalld and ufw, systemd-networkd and NetworkManager, kube-proxy's mode, the directories, and the admission
policies of the manifests. Each finding is an error (Warren cannot work), a warning (it works until that disturbs it) or a note, and
says what to do. What cannot be read is listed as not checked.

Give it those of the flags below that "warrend run" gets, because what is wrong depends on them.

It changes nothing on the node. Rules and sets are tried in a network namespace that is thrown away; that may load kernel
modules, as the daemon does. Run it as root on the node; in a container it sees less: without CAP_SYS_ADMIN it cannot try rules, without
CAP_NET_ADMIN it cannot read them, and without the node's PID namespace it sees no other programs.

The exit status is 0 when there is no error (warnings and notes do not count), 1 when there is one, and 2 when the command could not do
its work.`

	doctorExamples = `  # On a node, before Warren is installed:
  warrend doctor --cluster-cidr 10.244.0.0/16 --service-cidr 10.96.0.0/12

  # In a running cluster:
  kubectl -n warren-system exec ds/warren -- warrend doctor

  # For programs:
  warrend doctor -o json | jq '.[].findings[] | select(.severity == "error")'`
)

// doctorOptions are the flags of the command.
type doctorOptions struct {
	paths
	planning
	tunnelChoice

	kubeconfig string
	sysctlDir  string
}

// add declares the flags that `run` has, too. Those that nothing here depends on are taken, so that the same can be given, and not shown.
func (o *doctorOptions) add(f *pflag.FlagSet) {
	o.paths.add(f)
	o.planning.add(f)
	o.tunnelChoice.add(f)
	for _, name := range []string{"objects", "non-masquerade-cidr", "log-connections", "encrypt-node-traffic"} {
		f.Lookup(name).Hidden = true
	}
}

// validate checks the flags.
func (o *doctorOptions) validate() error {
	_, err := o.mode()
	return errors.Join(o.planning.validate(), err)
}

// doctorCommand looks at the node.
func doctorCommand() *cobra.Command {
	var o doctorOptions
	var output string
	cmd := &cobra.Command{
		Use:     doctorName,
		Short:   "Look for what on this node keeps Warren from working",
		Long:    doctorLong,
		Example: doctorExamples,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "table" && output != "json" {
				return fmt.Errorf("-o %s: say table or json", output)
			}
			if err := o.validate(); err != nil {
				return err
			}
			results := preflight.Check(newReader(o).read(cmd.Context()), o.wanted())
			if err := printResults(cmd.OutOrStdout(), results, output); err != nil {
				return err
			}
			if preflight.Count(results, preflight.Error) > 0 {
				return errUnfit
			}
			return nil
		},
	}
	o.add(cmd.Flags())
	cmd.Flags().StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig file to ask for the admission policies with (default: the pod's ServiceAccount)")
	cmd.Flags().StringVar(&o.sysctlDir, "sysctl-dir", "/proc/sys", "where the kernel's settings can be read")
	cmd.Flags().StringVarP(&output, "output", "o", "table", "table or json")
	return cmd
}

// wanted is how Warren is to be run.
func (o *doctorOptions) wanted() preflight.Wanted {
	return preflight.Wanted{
		ClusterCIDRs: o.parsedCluster, ServiceCIDRs: o.parsedService, NodeCIDRs: o.parsedNode,
		KernelOnly: o.wireguard == string(wgdevice.ModeKernel), UserSpaceOnly: o.wireguard == string(wgdevice.ModeUserspace),
		Encrypted: o.encryptionMode, Port: o.port, MTU: o.mtu, Conflist: filepath.Join(o.cniConfDir, cniconf.FileName),
	}
}

// printResults prints results for people or for programs.
func printResults(w io.Writer, results []preflight.Result, output string) error {
	if output == "json" {
		encoder := json.NewEncoder(w)
		encoder.SetIndent("", "  ")
		encoder.SetEscapeHTML(false)
		return encoder.Encode(results)
	}
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 4, 3, ' ', 0)
	fmt.Fprintln(t, "CHECK\tRESULT")
	for _, r := range results {
		fmt.Fprintf(t, "%s\t%s\n", r.Check, inAWord(r))
	}
	_ = t.Flush() // a strings.Builder takes everything
	b.WriteString("\n")
	for _, r := range results {
		for _, f := range r.Findings {
			fmt.Fprintf(&b, "%s %s: %s\n    %s\n    -> %s\n", strings.ToUpper(string(f.Severity)), f.Code, f.Object, f.Message, f.Remedy)
		}
	}
	for _, r := range results {
		for _, reason := range r.NotChecked {
			fmt.Fprintf(&b, "NOT CHECKED: %s: %s\n", r.Check, reason)
		}
	}
	fmt.Fprintf(&b, "%d error(s), %d warning(s), %d note(s)\n",
		preflight.Count(results, preflight.Error), preflight.Count(results, preflight.Warning), preflight.Count(results, preflight.Note))
	_, err := io.WriteString(w, b.String())
	return err
}

// inAWord says in a word what came of a check.
func inAWord(r preflight.Result) string {
	switch {
	case len(r.Findings) > 0: // sorted, the worst first
		return string(r.Findings[0].Severity)
	case len(r.NotChecked) > 0:
		return "not checked"
	default:
		return "ok"
	}
}

// logResults logs what was found, for who installs, and in one line what was not looked at.
func logResults(log *slog.Logger, results []preflight.Result) {
	var not []string
	for _, r := range results {
		for _, f := range r.Findings {
			if f.Severity == preflight.Note {
				log.Info("preflight note", "code", f.Code, "object", f.Object, "message", f.Message, "remedy", f.Remedy)
				continue
			}
			log.Warn("preflight finding", "severity", string(f.Severity), "code", f.Code, "object", f.Object, "message", f.Message, "remedy", f.Remedy)
		}
		for _, reason := range r.NotChecked {
			not = append(not, r.Check+": "+reason)
		}
	}
	if len(not) > 0 {
		log.Info("preflight could not check everything", "not_checked", strings.Join(not, "; "), "remedy", "run warrend doctor as root on the node itself")
	}
}

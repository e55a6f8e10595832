package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/warren-cni/warren/pkg/cniconf"
	"github.com/warren-cni/warren/pkg/preflight"
)

// aheadCode is the code of the problem that the runtime reads another network's configuration before ours.
const aheadCode = "NetworkAhead"

// installCommand prepares a node for the daemon; it is the DaemonSet's init container.
func installCommand() *cobra.Command {
	var o doctorOptions
	var logging logOptions
	var source string
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install the CNI plugin binaries on this node",
		Long: `Install the CNI plugin binaries on this node, each atomically, and take away a conflist that an earlier boot left:
until the daemon has written a new one, the node must not start pods.

It also looks at the node as "warrend doctor" does and logs what it finds, which never makes it fail. Give it those of the
flags below that the daemon gets (--encryption, --wireguard-port and so on).`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logging.logger(os.Stderr)
			if err != nil {
				return err
			}
			removed, err := cniconf.RemoveStale(o.cniConfDir, o.runDir)
			if err != nil {
				return err
			}
			changed, err := cniconf.InstallBinaries(source, o.cniBinDir)
			if err != nil {
				return err
			}
			log.Info("installed", "binaries_changed", changed, "directory", o.cniBinDir, "stale_conflist_removed", removed)
			advise(cmd.Context(), o, log)
			return nil
		},
	}
	o.add(cmd.Flags())
	logging.add(cmd.Flags())
	cmd.Flags().StringVar(&source, "source", "/opt/warren/bin", "directory of the plugin binaries to install")
	return cmd
}

// advicePatience bounds how long the look at the node may hold up its start.
const advicePatience = 30 * time.Second

// advise logs what the doctor finds. Nothing that happens to it may keep the node from starting.
func advise(ctx context.Context, o doctorOptions, log *slog.Logger) {
	if err := o.validate(); err != nil {
		log.Warn("not looking at the node", "error", err)
		return
	}
	o.sysctlDir = "/proc/sys"
	ctx, cancel := context.WithTimeout(ctx, advicePatience)
	defer cancel()
	seen := make(chan []preflight.Result, 1)
	go func() {
		defer func() {
			if fault := recover(); fault != nil {
				log.Error("looking at the node", "panic", fault)
			}
		}()
		seen <- preflight.Check(newReader(o).read(ctx), o.wanted())
	}()
	select {
	case results := <-seen:
		logResults(log, results)
	case <-ctx.Done():
		log.Warn("gave up looking at the node", "error", context.Cause(ctx))
	}
}

// look tells of the network configurations that the runtime reads before ours: a note of those that call our plugin, a problem of any
// other, with which pods would get another network, without policies and in clear, or none.
func (h *host) look(cniConfDir string) {
	ahead, err := cniconf.AheadOf(cniConfDir)
	if err != nil {
		h.problems = append(h.problems, applyProblem("ConflistFailed", cniConfDir, err, "make the directory readable; the daemon looks again"))
	}
	for _, file := range ahead {
		switch {
		case file.Err != nil:
			h.problems = append(h.problems, applyProblem(aheadCode, file.Path, fmt.Errorf("the runtime reads this file before Warren's and cannot understand it: %w", file.Err),
				"mend or remove it: until then the runtime may load no network at all, or another one"))
		case file.Delegates:
			h.notes = append(h.notes, file.Path+" comes before Warren's conflist and calls Warren")
		default:
			h.problems = append(h.problems, applyProblem(aheadCode, file.Path,
				errors.New("the runtime takes this network and not Warren's: pods that start now get no policies and no encryption"),
				"remove it, or give it a name that sorts behind "+cniconf.FileName+"; then make the pods again that have started meanwhile"))
		}
	}
}

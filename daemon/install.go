package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/warren-cni/warren/pkg/cniconf"
)

// installCommand prepares a node for the daemon; it is the DaemonSet's init container.
func installCommand() *cobra.Command {
	var p paths
	var logging logOptions
	var source string
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install the CNI plugin binaries on this node",
		Long: `Install the CNI plugin binaries on this node, each atomically, and take away a conflist that an earlier boot left:
until the daemon has written a new one, the node must not start pods.`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			log, err := logging.logger(os.Stderr)
			if err != nil {
				return err
			}
			removed, err := cniconf.RemoveStale(p.cniConfDir, p.runDir)
			if err != nil {
				return err
			}
			changed, err := cniconf.InstallBinaries(source, p.cniBinDir)
			if err != nil {
				return err
			}
			log.Info("installed", "binaries_changed", changed, "directory", p.cniBinDir, "stale_conflist_removed", removed)
			return nil
		},
	}
	p.add(cmd.Flags())
	logging.add(cmd.Flags())
	cmd.Flags().StringVar(&source, "source", "/opt/warren/bin", "directory of the plugin binaries to install")
	return cmd
}

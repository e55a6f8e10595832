package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/warren-cni/warren/pkg/wgdevice"
)

// tunnelCommand is WireGuard in user space, for kernels without it.
func tunnelCommand() *cobra.Command {
	var logging logOptions
	var mode string
	cmd := &cobra.Command{
		Use:   "tunnel",
		Short: "Run WireGuard in user space where the kernel has none",
		Long: `Run WireGuard in user space where the kernel has none; idle where the kernel has it.

It is a process of its own, so that a restart of the daemon costs no packet. The daemon configures it.
When it ends, device, addresses and routes stay, and nothing leaves in clear.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if m := wgdevice.Mode(mode); m != wgdevice.ModeAuto && m != wgdevice.ModeUserspace {
				return fmt.Errorf("--wireguard=%s: say auto or userspace", mode)
			}
			log, err := logging.logger(os.Stderr)
			if err != nil {
				return err
			}
			return wgdevice.RunTunnel(cmd.Context(), wgdevice.Options{Log: log, Mode: wgdevice.Mode(mode)})
		},
	}
	logging.add(cmd.Flags())
	cmd.Flags().StringVar(&mode, "wireguard", "auto", "auto: idle where the kernel has WireGuard; userspace: run in any case")
	return cmd
}

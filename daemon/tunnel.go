package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/warren-cni/warren/pkg/wgdevice"
)

// tunnelName and tunnelProcessName are the names of the command and of what it runs.
const (
	tunnelName        = "tunnel"
	tunnelProcessName = "process"
)

// tunnelCommand is WireGuard in user space, for kernels without it.
func tunnelCommand() *cobra.Command {
	var logging logOptions
	var mode string
	cmd := &cobra.Command{
		Use:   tunnelName,
		Short: "Run WireGuard in user space where the kernel has none",
		Long: `Run WireGuard in user space where the kernel has none; idle where the kernel runs it.

It is a program of its own, so that a restart of the daemon costs no packet, and it runs the tunnel itself in a
process that it starts again whenever that ends. The daemon configures it.
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
			// This very program, also where an upgrade has put another one in its place.
			process := []string{
				"/proc/self/exe", tunnelName, tunnelProcessName, "--log-level", logging.level, "--log-format", logging.format,
			}
			return wgdevice.SuperviseTunnel(cmd.Context(), wgdevice.Options{Log: log, Mode: wgdevice.Mode(mode)}, process)
		},
	}
	logging.add(cmd.Flags())
	cmd.Flags().StringVar(&mode, "wireguard", "auto", "auto: idle where the kernel has WireGuard; userspace: idle while the kernel runs it")
	cmd.AddCommand(tunnelProcessCommand())
	return cmd
}

// tunnelProcessCommand is the tunnel itself.
func tunnelProcessCommand() *cobra.Command {
	var logging logOptions
	cmd := &cobra.Command{
		Use:    tunnelProcessName,
		Short:  "Run WireGuard in user space until it fails",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := logging.logger(os.Stderr)
			if err != nil {
				return err
			}
			return wgdevice.RunTunnel(cmd.Context(), log)
		},
	}
	logging.add(cmd.Flags())
	return cmd
}

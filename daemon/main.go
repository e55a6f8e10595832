// Command warrend is Warren's daemon and its operator's command.
//
// `warrend run` is the daemon: it reads the cluster (pkg/kube), plans policy (pkg/policy), base rules (pkg/guard) and mesh
// (pkg/mesh), and makes the kernel agree (pkg/firewall, pkg/wgdevice). The other commands ask a running daemon, or
// work on the node without one.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// version is set by the build.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	status := execute(ctx, rootCommand())
	stop()
	os.Exit(status)
}

// execute runs the command that was asked for, tells its error, and returns the exit status.
func execute(ctx context.Context, root *cobra.Command) int {
	cmd, err := root.ExecuteContextC(ctx)
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errDenied), errors.Is(err, errViolated), errors.Is(err, errUnfit):
		return 1 // the output has told it
	case errors.Is(err, errUnknown), errors.Is(err, errNotProven):
		return 2 // the same
	}
	fmt.Fprintln(root.ErrOrStderr(), "error:", err)
	if slices.Contains([]string{explainName, verifyName, doctorName}, cmd.Name()) {
		return 2 // 1 would say that the connection is denied, that traffic is in clear, or that the node is not fit
	}
	return 1
}

// rootCommand returns warrend with all its commands.
func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:           "warrend",
		Short:         "Warren's node daemon: NetworkPolicy and an encrypted mesh for pods",
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			return fromEnvironment(cmd.Flags(), os.LookupEnv)
		},
	}
	root.AddCommand(doctorCommand(), runCommand(), tunnelCommand(), installCommand(), statusCommand(), explainCommand(), rotateKeyCommand(), verifyCommand(),
		renderCommand(), cleanupCommand(), versionCommand())
	return root
}

// fromEnvironment gives every flag that was not set on the command line the value of WARREN_<NAME>, where that exists.
func fromEnvironment(flags *pflag.FlagSet, lookup func(string) (string, bool)) error {
	var err error
	flags.VisitAll(func(f *pflag.Flag) {
		name := "WARREN_" + strings.ToUpper(strings.ReplaceAll(f.Name, "-", "_"))
		value, ok := lookup(name)
		if !ok || f.Changed || err != nil {
			return
		}
		if setErr := flags.Set(f.Name, value); setErr != nil {
			err = fmt.Errorf("reading %s from the environment: %w", name, setErr)
		}
	})
	return err
}

// versionCommand prints what was built.
func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			goVersion := "unknown"
			if info, ok := debug.ReadBuildInfo(); ok {
				goVersion = info.GoVersion
			}
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "warrend %s (%s)\n", version, goVersion)
			return err
		},
	}
}

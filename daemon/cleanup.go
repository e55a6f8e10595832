package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"

	"github.com/spf13/cobra"

	"github.com/warren-cni/warren/pkg/cniconf"
	"github.com/warren-cni/warren/pkg/conntrack"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/inflight"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/podlink"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// cleanupCommand removes Warren from the node.
func cleanupCommand() *cobra.Command {
	var p paths
	var logging logOptions
	var keepKey, wait bool
	cmd := &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything of Warren's from this node",
		Long: `Remove everything of Warren's from this node: the conflist, the links of pods, the tunnel, routes, rules, sets, leases
and the node's key. Pods of this node lose their network; nothing that is not Warren's is touched.

It goes on after an error, and says at the end what is left. Stop the daemon and the tunnel first. The reference plugins
that Warren installed (portmap, bandwidth, loopback) go too, unless somebody has replaced them since, and those whose place
they took come back.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if wait {
				<-cmd.Context().Done()
				return nil
			}
			log, err := logging.logger(os.Stderr)
			if err != nil {
				return err
			}
			return cleanup(cmd.Context(), p, keepKey, log)
		},
	}
	p.add(cmd.Flags())
	logging.add(cmd.Flags())
	cmd.Flags().BoolVar(&wait, "wait", false, "remove nothing, only wait to be stopped: for the container that keeps a DaemonSet's pod after another has cleaned up")
	cmd.Flags().BoolVar(&keepKey, "keep-key", false, "keep the node's WireGuard key")
	return cmd
}

// cleanup removes the conflist first, so that no pod starts meanwhile, and the guards last.
func cleanup(ctx context.Context, p paths, keepKey bool, log *slog.Logger) error {
	unlock, err := p.lock()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		unlock = func() error { return nil } // no daemon has run since the last boot
	case errors.Is(err, errTaken):
		return fmt.Errorf("%w and would undo the cleanup: stop it first (kubectl delete -f manifests/warren.yaml)", err)
	case err != nil:
		return err
	}
	var errs []error
	do := func(what string, err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", what, err))
			return
		}
		log.Info("removed", "what", what)
	}
	do("conflist", cniconf.Remove(p.cniConfDir, p.runDir))
	do("links of pods", podlink.RemoveAll())
	do("tunnel and routes", wgdevice.New(wgdevice.Options{Log: log, Mode: wgdevice.ModeAuto}).Cleanup())
	chained := p.removeChained(ctx)
	do("ports of the node that led to pods, and what limited their bandwidth", chained)
	do("rules and sets", firewall.Cleanup(ctx, log))
	_, err = conntrack.SweepAll(ctx, func(conntrack.Flow) bool { return true })
	do("marks of cut connections", err)
	do("plugins", cniconf.RemoveBinaries(p.cniBinDir))
	do("runtime state", removeFrom(p.runDir, "warrend.sock", ".s[0-9]*", inflight.FileName+"*", "wireguard", meshFile+"*"))
	if chained == nil { // else the next cleanup needs them, to know whose the rest is
		do("leases", removeFrom(p.runDir, "ipam", "ipam.aside-*"))
	}
	do("memory of the guards", removeFrom(p.stateDir, guardedFile))
	if !keepKey {
		do("key", removeFrom(p.stateDir, wgdevice.KeyFiles()...))
	}
	return errors.Join(append(errs, unlock())...)
}

// removeChained removes what other plugins have made for the pods, which are those that hold leases.
func (p *paths) removeChained(ctx context.Context) error {
	containers, err := p.containers()
	return errors.Join(err, firewall.RemovePorts(ctx, cniconf.NetworkName, containers), cniconf.RemoveShapers(cniconf.NetworkName, containers...))
}

// containers returns those that hold leases.
func (p *paths) containers() (ids []string, err error) {
	if _, err = os.Stat(p.leases()); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	leases, err := ipam.Open(p.leases())
	if err != nil {
		return nil, err
	}
	owners, err := leases.Owners()
	for _, o := range owners {
		ids = append(ids, o.ContainerID)
	}
	return ids, err
}

// removeFile deletes a file that may be gone already.
func removeFile(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// removeFrom deletes what has one of the names (patterns of path.Match) from a directory of the daemon's, and the directory where
// nothing is left in it. A flag may name a directory that others use too.
func removeFrom(dir string, names ...string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, entry := range entries {
		if slices.ContainsFunc(names, func(pattern string) bool {
			ours, matchErr := path.Match(pattern, entry.Name())
			return ours && matchErr == nil
		}) {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, entry.Name())))
		}
	}
	_ = os.Remove(dir) // neither a mount point nor what holds files of others can be removed, and an empty directory does no harm
	return errors.Join(errs...)
}

package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/warren-cni/warren/pkg/cniconf"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/inflight"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/podlink"
	"github.com/warren-cni/warren/pkg/reconcile"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// resync is how often the daemon reads the kernel again and repairs what others changed: within 10 s, the repair included, where that is not
// much work (see package reconcile).
const resync = 9 * time.Second

// run makes the node's parts, connects them and serves until the context ends.
func run(ctx context.Context, o runOptions, mode wgdevice.Mode, log *slog.Logger) error {
	if err := wgdevice.HideMemory(); err != nil {
		return err
	}
	for _, dir := range []string{o.runDir, o.stateDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("making a directory of the daemon: %w", err)
		}
	}
	unlock, err := o.lock()
	if errors.Is(err, errTaken) {
		return fmt.Errorf("%w: stop it first, or give this one directories of its own", err)
	}
	if err != nil {
		return err
	}
	defer func() { _ = unlock() }() // the process ends, and with it the lock
	n := &node{
		options: o, log: log, clock: time.Now, uplinkOf: wgdevice.ReadUplink,
		stepped: make(chan struct{}), tunnelNews: make(chan struct{}, 1), planner: newPlanner(o.planning),
	}
	rules, err := firewall.New(ctx, firewall.Options{Log: log, Admit: n.admit, Now: n.clock})
	if err != nil {
		return err
	}
	defer rules.Close()
	n.filter = rules
	if err = n.early(ctx); err != nil { // before all that may refuse to start
		log.Warn("the guards wait for the cluster", "error", err) // the first step tries again, and makes it a problem
	}
	keys, err := wgdevice.OpenKeys(o.stateDir)
	if err != nil {
		return err
	}
	if n.leases, err = openLeases(o, log); err != nil {
		return err
	}
	if n.source, err = newSource(o, log); err != nil {
		return err
	}
	n.tunnel = wgdevice.New(wgdevice.Options{Log: log, Mode: mode})
	n.cuts = newCutter(n.planner.allows, log)
	n.trash = newSweeper(n.leases)
	n.flows = newFlowLog(o.nodeName, n.planner, n.source.Event, os.Stdout, n.clock)
	n.news = newAnnouncer(n)
	n.collector = &collector{
		leases: n.leases, locks: inflight.In(o.runDir), log: log, clock: n.clock, links: podlink.Links, exists: n.exists,
		removeChained: func(ctx context.Context, containers ...string) error {
			return errors.Join(firewall.RemovePortsOf(ctx, cniconf.NetworkName, containers...), cniconf.RemoveShapers(cniconf.NetworkName, containers...))
		},
	}
	n.loop = reconcile.New(n.step, resync, n.clock, reconcile.ProcessorTime)
	n.keys = &rotator{
		options: o.rotation, encrypted: o.encryptionMode, node: o.nodeName, keys: keys, clock: n.clock, log: log, wake: n.loop.Trigger,
	}
	n.follower = newFollower(n.tunnel, n.clock, n.renewMesh, log)
	log.Info("starting", "version", version, "node", o.nodeName, "encryption", o.encryption, "public_key", publicKey(keys.Current()))
	return n.serve(ctx)
}

// openLeases opens the leases of this boot. No pod gets any before, because the plugin asks the daemon first.
func openLeases(o runOptions, log *slog.Logger) (*ipam.Store, error) {
	leases, err := ipam.Open(o.leases())
	if err != nil {
		return nil, err
	}
	freed, err := leases.StartBoot()
	if freed > 0 {
		log.Info("ended the leases of an earlier boot", "leases", freed)
	}
	return leases, err
}

// newSource connects to the API server, or opens the directory.
func newSource(o runOptions, log *slog.Logger) (source, error) {
	if o.objects != "" {
		return kube.NewDirectory(o.objects, o.nodeName, log)
	}
	config, err := restConfig(o.kubeconfig)
	if err != nil {
		return nil, err
	}
	return kube.NewAPI(config, o.nodeName, log)
}

// restConfig finds the API server.
func restConfig(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		config, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("finding the API server (outside a cluster, say --kubeconfig FILE or --objects DIR): %w", err)
		}
		return config, nil
	}
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("reading --kubeconfig=%s: %w", kubeconfig, err)
	}
	return config, nil
}

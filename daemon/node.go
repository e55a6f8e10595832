package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/reconcile"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// source is where the cluster's objects come from: an API server or a directory.
type source interface {
	services
	Run(ctx context.Context) error
	Changed() <-chan struct{}
	WaitForSync(ctx context.Context) error
	Changes() cluster.Delta
	Problems() []cluster.Problem
	Refresh(ctx context.Context, namespace, name, uid string) error
	Publish(ctx context.Context, annotations map[string]string) error
	Event(ctx context.Context, event kube.Event)
	Reporters(of kube.Reference, owner string) []string
	Servers(ctx context.Context) ([]netip.Addr, error)
}

// filter is the packet filter of the kernel.
type filter interface {
	comparer
	Apply(ctx context.Context, rules netfilter.Ruleset) (firewall.Changes, error)
	Patch(ctx context.Context, change netfilter.Change) (firewall.Changes, error)
	Bare(ctx context.Context) (bool, error)
	Denied(ctx context.Context) ([]firewall.Denial, error)
	Forget()
	Problems() []cluster.Problem
}

// tunnel is the WireGuard link, its peers and the routes.
type tunnel interface {
	device
	Status(ctx context.Context) (wgdevice.Status, error)
	Empty(ctx context.Context) (bool, error)
	RouteDrift(want mesh.Config, peers []wgdevice.PeerStatus) ([]string, error)
	Held() ([]netip.Addr, error)
}

// node is the daemon: what it reads from, what it applies to, and what the last step came to.
type node struct {
	options   runOptions
	log       *slog.Logger
	clock     func() time.Time
	source    source
	filter    filter
	tunnel    tunnel
	leases    *ipam.Store
	keys      *rotator
	follower  *follower
	uplinkOf  func(node netip.Addr, peers []netip.Addr) (mesh.Uplink, error)
	loop      *reconcile.Loop
	planner   *planner
	cuts      *cutter
	trash     *sweeper
	flows     *flowLog
	news      *announcer
	collector *collector
	// planned are the addresses that the step which runs wants to let pass; only the loop touches it.
	planned map[netip.Addr]cluster.Holder
	// attached are the attachments whose pods asked, or were there when the daemon started; nil before. Only the loop touches it.
	attached map[cluster.Holder]bool
	// listed says that the leases were read as a whole. Only the loop touches it.
	listed bool
	// aside are the paths of what is set aside, as of the last audit. Only the loop touches it.
	aside map[string]bool
	// tunnelNews gets a value when a tunnel has begun to answer, or the kernel's was deleted.
	tunnelNews chan struct{}
	// remembered says that the mesh which is wanted stands, and is written down. Only the loop touches it.
	remembered bool
	// rememberAt is when it is to be written down, zero where that is not waited for. Only the loop touches it.
	rememberAt time.Time
	// servers are the API server's addresses, once they are known. Only the loop touches them.
	servers      []netip.Addr
	serversKnown bool
	// tunnelChanged says that something happened to the tunnel since it was applied last, or that it lacks a change.
	tunnelChanged atomic.Bool

	// checking is held by the check that reads the kernel.
	checking sync.Mutex

	mu      sync.Mutex
	last    outcome
	stepped chan struct{}    // closed at the end of the next step
	asked   []cluster.Holder // the attachments that asked since the last step
}

// outcome is what a step came to. It is replaced as a whole and never changed.
type outcome struct {
	// synced is true once there was a first step, that is once the source was complete.
	synced bool
	// ready is true once policy and mesh were applied and the conflist stands. It stays: later errors are problems.
	ready    bool
	mesh     mesh.Config
	problems []cluster.Problem
	// open are the addresses that the start gate lets pass, each for one attachment, by rules that stand: none where the packet
	// filter could not be applied.
	open map[netip.Addr]cluster.Holder
	// closed are the chains whose rules the kernel refused when the packet filter was applied last.
	closed  []firewall.ClosedChain
	applied time.Time
	// guarded is true once the packet filter was applied as a whole in this run: only then may there be a tunnel.
	guarded bool
	// standing is true where that was so, too, when it was applied last.
	standing bool
	host     host
	// leaseProblems are those of the last full step.
	leaseProblems []cluster.Problem
}

// host is what full steps read and set on the node itself.
type host struct {
	uplink   mesh.Uplink
	problems []cluster.Problem
	notes    []string
}

// outcomeNow returns the last step's outcome.
func (n *node) outcomeNow() outcome {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.last
}

// exists says whether a pod of this node exists and has not finished; true as long as that is not known.
func (n *node) exists(o ipam.Owner) bool {
	return !n.outcomeNow().synced || n.planner.hasPod(attachmentOf(ipam.Lease{Owner: o}))
}

// nextStep returns a channel that is closed when the step after now has ended.
func (n *node) nextStep() <-chan struct{} {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.stepped
}

// ask makes the next step take in an attachment.
func (n *node) ask(holder cluster.Holder) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, holder)
}

// takeAsked returns the attachments that asked since the last time.
func (n *node) takeAsked() []cluster.Holder {
	n.mu.Lock()
	defer n.mu.Unlock()
	asked := n.asked
	n.asked = nil
	return asked
}

// record makes a step's outcome the last one and wakes those who wait for it.
func (n *node) record(o outcome) {
	n.mu.Lock()
	before := n.last.problems
	n.last = o
	close(n.stepped)
	n.stepped = make(chan struct{})
	n.mu.Unlock()
	n.logProblems(before, o.problems)
}

// logProblems logs the problems that came and those that went, once each, and has those that came announced.
func (n *node) logProblems(before, now []cluster.Problem) {
	if slices.Equal(before, now) {
		return
	}
	had := make(map[cluster.Problem]bool, len(before))
	for _, p := range before {
		had[p] = true
	}
	for _, p := range now {
		if !had[p] {
			n.log.Warn("problem", "code", p.Code, "object", p.Object, "field", p.Field, "message", p.Message, "remedy", p.Remedy)
			n.news.add(p)
		}
		delete(had, p)
	}
	for _, p := range before {
		if had[p] {
			n.log.Info("problem resolved", "code", p.Code, "object", p.Object, "field", p.Field)
		}
	}
}

// serve runs the node until the context ends. What is in the kernel stays as it is.
func (n *node) serve(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var running sync.WaitGroup
	start := func(what string, run func(context.Context) error) {
		running.Go(func() {
			if err := run(ctx); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("%s: %w", what, err))
			}
		})
	}
	start("reading the cluster", n.source.Run)
	start("answering on the socket", n.answer)
	start("serving metrics", n.serveMetrics)
	start("reconciling", n.reconcile)
	for _, run := range []func(context.Context){n.cuts.run, n.trash.run, n.flows.run, n.news.run, n.collector.run} {
		running.Go(func() { run(ctx) })
	}
	if n.options.encryptionMode {
		running.Go(func() { n.follower.run(ctx) })
		running.Go(func() { n.follower.challenge(ctx) })
		running.Go(func() { n.keys.run(ctx, n.latestHandshake) })
		start("following the tunnel", func(ctx context.Context) error {
			return wgdevice.WatchTunnel(ctx, func() {
				n.renewMesh()
				select {
				case n.tunnelNews <- struct{}{}:
				default: // it will look at this one
				}
			})
		})
	}
	<-ctx.Done()
	running.Wait()
	if err := context.Cause(ctx); !errors.Is(err, context.Canceled) {
		return err
	}
	n.log.Info("stopping; the kernel keeps enforcing what was applied")
	return nil
}

// renewMesh has the next step, which follows at once, apply the mesh as a whole.
func (n *node) renewMesh() {
	n.tunnelChanged.Store(true)
	n.loop.Trigger()
}

// latestHandshake returns the time of the latest handshake with any peer.
func (n *node) latestHandshake(ctx context.Context) (time.Time, error) {
	var latest time.Time
	device, err := n.tunnel.Status(ctx)
	for _, p := range device.Peers {
		if p.LastHandshake.After(latest) {
			latest = p.LastHandshake
		}
	}
	return latest, err
}

// answer serves the plugin and the operator's commands. A socket file that was removed is made again: without it no pod
// starts here, while all else looks well.
func (n *node) answer(ctx context.Context) error {
	for {
		err := agentapi.Serve(ctx, n.options.socket(), n.handle)
		if !errors.Is(err, agentapi.ErrSocketGone) {
			return err
		}
		n.log.Warn("the socket file was removed; making it again", "socket", n.options.socket())
	}
}

// reconcile runs the loop once the source is complete: a partial view would take away what others still need.
func (n *node) reconcile(ctx context.Context) error {
	if err := n.awaitSource(ctx); err != nil {
		return err
	}
	changed := n.source.Changed()
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-changed:
				n.loop.Trigger()
			}
		}
	}()
	n.loop.Run(ctx)
	return nil
}

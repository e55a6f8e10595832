package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/cniconf"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/inflight"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/nodenet"
	"github.com/warren-cni/warren/pkg/podlink"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// codeNotApplied is the code of the problem that this node's kernel refused a policy.
const codeNotApplied = "PolicyNotApplied"

// ipvsCode is the code of the problem with which no pod can be attached, ready or not.
const ipvsCode = "KubeProxyIPVS"

// step reads what is new, plans and applies. With full it trusts nothing that it remembers of the kernel and of the leases.
func (n *node) step(ctx context.Context, full bool) error {
	before := n.outcomeNow()
	now := outcome{
		synced: true, ready: before.ready, applied: before.applied, guarded: before.guarded,
		host: before.host, leaseProblems: before.leaseProblems, mesh: before.mesh,
	}
	attachments, err := n.readAttachments(full, &now)
	if err != nil { // to plan without them would close every pod that runs
		before.problems, before.open = now.leaseProblems, nil
		n.record(before)
		return err
	}
	news := n.planner.learn(n.source.Changes(), attachments)
	self := n.planner.self()
	if full || now.host.uplink.MTU == 0 {
		now.host = n.setUpHost(self, before.host.uplink)
	}
	wanted := n.planner.plan(news, now.host.uplink)
	now.mesh = wanted.mesh
	if wanted.openChanged {
		n.planned = wanted.open
	}
	n.remembered = n.remembered && wanted.meshChange.Empty()
	if problem, errCut := n.cutOff(ctx, self); errCut != nil {
		err = errCut
		now.problems = append(now.problems, problem)
		n.filter.Forget() // it does not get this change, so the next one alone would not do
		n.tunnelChanged.Store(true)
	} else {
		err = n.apply(ctx, &now, wanted, full)
	}
	if ctx.Err() != nil {
		return err // the daemon stops: what was cut short says nothing of the node
	}
	now.problems = cluster.SortProblems(slices.Concat(n.source.Problems(), n.filter.Problems(), n.cuts.problems(), n.trash.problems(), n.flows.problems(), n.keys.problems(), now.leaseProblems, now.host.problems, wanted.problems, now.problems))
	n.record(now)
	return err
}

// apply makes the kernel agree with what is wanted: packet filter first, so that the guards stand before anything can be sent,
// then the mesh, then the annotations that other nodes need, and the conflist when all of it was well.
func (n *node) apply(ctx context.Context, o *outcome, plan plan, full bool) error {
	filterErr := n.applyFilter(ctx, o, plan.change, full)
	n.cuts.changed(plan.affected) // also where the filter failed: the audit that mends it sweeps again
	if !o.guarded {               // without the guards there must be no tunnel and no route
		n.tunnelChanged.Store(true)
		return filterErr
	}
	bare := len(o.mesh.PodCIDRs) == 0
	o.ready = o.ready && !bare          // the ranges of the conflist may be another node's by now
	if bare || o.host.uplink.MTU == 0 { // it is among the problems; the Node's next event starts the next step
		n.tunnelChanged.Store(true)
		return filterErr
	}
	meshErr := n.applyMesh(ctx, o, plan.meshChange, full)
	publishErr := n.publish(ctx, o.host.uplink.MTU)
	if publishErr != nil {
		o.problems = append(o.problems, applyProblem("PublishFailed", "Node "+n.options.nodeName, publishErr,
			"other nodes cannot reach this one until it succeeds; check the daemon's access to the API server"))
	}
	if err := errors.Join(filterErr, meshErr, publishErr); err != nil {
		return err
	}
	if full || !plan.meshChange.Empty() || !o.ready {
		if err := n.installConflist(o); err != nil {
			return err
		}
		if err := n.rememberGuards(); err != nil {
			o.problems = append(o.problems, applyProblem("GuardsNotRemembered", n.options.stateDir, err,
				"let the daemon write there; until then the guards wait for the API server after a boot"))
		}
	}
	o.applied = n.clock()
	return nil
}

// applyMesh makes the tunnel agree: by the change alone where it is known what stands, else as a whole.
func (n *node) applyMesh(ctx context.Context, o *outcome, change mesh.Change, full bool) error {
	keysChanged := n.keys.advance()
	whole := n.tunnelChanged.Swap(false) || full || keysChanged
	if !whole && change.Empty() {
		n.remember(o, full)
		return nil
	}
	delta := &change
	if whole {
		delta = nil
	}
	var changes wgdevice.Changes
	err := n.forgetMesh()
	if err == nil {
		changes, err = n.follower.apply(ctx, o.mesh, delta, n.keys.keys.Current())
	}
	if err != nil {
		err = fmt.Errorf("applying the mesh: %w", err)
		o.problems = append(o.problems, applyProblem(meshCode(err), "Node "+n.options.nodeName, err,
			"pods of other nodes stay unreachable, nothing leaves in clear; mend what the message names, the daemon retries"))
		return err
	}
	if changes.Any() {
		n.log.Debug("applied the mesh", "links", changes.Links, "peers", changes.Peers, "routes", changes.Routes)
	}
	n.remember(o, full)
	return nil
}

// applyFilter makes the packet filter agree: by the change alone where it is known what stands, else as a whole.
func (n *node) applyFilter(ctx context.Context, o *outcome, change netfilter.Change, full bool) error {
	var changes firewall.Changes
	err := firewall.ErrUnknown
	if !full {
		changes, err = n.filter.Patch(ctx, change)
	}
	whole := errors.Is(err, firewall.ErrUnknown)
	if whole {
		n.filter.Forget()
		changes, err = n.filter.Apply(ctx, n.planner.ruleset())
	}
	var refused *firewall.ClosedError
	if errors.As(err, &refused) {
		o.closed = refused.Chains
		o.problems = append(o.problems, closedProblems(refused)...)
		err = nil // all else stands, and what this concerns is closed
	}
	if err != nil {
		err = fmt.Errorf("applying the packet filter: %w", err)
		o.problems = append(o.problems, applyProblem("FirewallApplyFailed", "Node "+n.options.nodeName, err,
			"end what holds the lock, or give the node what the message says is missing (`warrend doctor` there tries all of it); "+
				"pods that this concerns stay closed until the daemon succeeds, which retries"))
		return err
	}
	n.planner.setClosed(o.closed)
	if whole {
		n.cuts.audited(changes != (firewall.Changes{}))
	}
	o.guarded, o.standing = true, true
	o.open = admitted(n.planned, refused)
	if changes != (firewall.Changes{}) {
		n.log.Debug("applied the packet filter", "set_operations", changes.SetOps, "rule_bytes", changes.RuleBytes, "programs", changes.Execs)
	}
	return nil
}

// installConflist tells the container runtime that the node has a network.
func (n *node) installConflist(o *outcome) error {
	changed, err := cniconf.Install(n.options.cniConfDir, cniconf.Params{
		RunDir: n.options.runDir, Ranges: o.mesh.PodCIDRs, MTU: o.mesh.MTU,
	})
	if changed {
		n.log.Info("conflist written", "directory", n.options.cniConfDir, "pod_cidrs", o.mesh.PodCIDRs, "mtu", o.mesh.MTU)
	}
	if err != nil {
		o.problems = append(o.problems, applyProblem("ConflistFailed", n.options.cniConfDir, err,
			"mend what it names; the daemon tries again until the conflist is written"))
		if !changed {
			return err
		}
	}
	o.ready = true
	return nil
}

// publish puts on the own Node what other nodes need to reach it, where that is not there already. With encryption off there
// is nothing to publish.
func (n *node) publish(ctx context.Context, uplinkMTU int) error {
	if !n.options.encryptionMode {
		return nil
	}
	annotations, err := n.keys.annotations(n.planner.self())
	if err != nil {
		return err
	}
	annotations[kube.AnnotationPort] = strconv.Itoa(int(n.options.port))
	annotations[kube.AnnotationMTU] = ""
	if n.options.mtu == 0 { // else it is not the uplink's
		annotations[kube.AnnotationMTU] = strconv.Itoa(uplinkMTU)
	}
	if err = n.source.Publish(ctx, annotations); err != nil {
		return err
	}
	n.keys.published(annotations)
	return nil
}

// readAttachments returns the attachments of the node's pods: all of them, or those that asked since the last time. The error
// says that nothing is known of them. A lease whose pod has not asked yet counts only for a daemon that starts: another's pod is
// being attached just now, and what is known of it may be behind.
func (n *node) readAttachments(full bool, o *outcome) (cluster.Attachments, error) {
	asked := n.takeAsked()
	if n.attached != nil {
		for _, holder := range asked {
			n.attached[holder] = true
		}
	}
	if !full && n.listed { // else a plan would close the pods that run
		return n.attachmentsOf(asked), nil
	}
	o.leaseProblems = n.repairLeases()
	leases, err := n.leases.List()
	if err != nil {
		o.leaseProblems = append(o.leaseProblems, applyProblem("LeaseUnreadable", n.options.leases(), err, unreadableRemedy(leases)))
		switch {
		case n.attached != nil: // what is known of the others stays as it is
			return n.attachmentsOf(asked), nil
		case leases == nil:
			return cluster.Attachments{}, err
		}
	}
	n.listed = true
	all := cluster.Attachments{All: true}
	attached := map[cluster.Holder]bool{}
	for _, lease := range leases {
		a := attachmentOf(lease)
		if n.attached == nil || n.attached[a.Holder()] {
			all.List = append(all.List, a)
			attached[a.Holder()] = true
		}
	}
	if n.attached != nil || err == nil { // else a lease that could not be read may be one of a pod that runs
		n.attached = attached
	}
	return all, nil
}

// unreadableRemedy says what to do about leases of which only some could be read, or none.
func unreadableRemedy(leases []ipam.Lease) string {
	if leases == nil {
		return "make it a directory that root can read; until then pods that run stay as they are, but a daemon that restarts applies nothing"
	}
	return "delete the pod that has the address, or the file where none has; until then that pod stays as it is, but a daemon that restarts closes it, " +
		"and addresses that pods give up meanwhile stay theirs in the rules"
}

// repairLeases moves away what is no lease, and completes those that are. An address that nobody can be told to hold stays taken while a
// route leads to it.
func (n *node) repairLeases() []cluster.Problem {
	restored, err := n.leases.Repair(podlink.Routed)
	for _, a := range restored {
		n.log.Warn("made the file of a leased address again, which was gone", "address", a)
	}
	if err = errors.Join(err, n.tellAside()); err == nil {
		return nil
	}
	return []cluster.Problem{applyProblem("LeasesNotRepaired", n.options.leases(), err,
		"make the file system writable, with room for bytes and files, or remove the file named; what holds an address keeps it meanwhile")}
}

// tellAside logs what was set aside since it was called last, whoever did it: the plugin has no log. A daemon that starts names all that is
// kept.
func (n *node) tellAside() error {
	leases, err := n.leases.Aside()
	locks, locksErr := inflight.In(n.options.runDir).Aside()
	aside := make(map[string]bool, len(leases)+len(locks))
	for _, path := range slices.Sorted(slices.Values(slices.Concat(leases, locks))) {
		if !n.aside[path] {
			n.log.Warn("set aside what was in the way and is none of ours; delete it when nobody needs it", "path", path)
		}
		aside[path] = true
	}
	n.aside = aside
	return errors.Join(err, locksErr)
}

// attachmentsOf returns what is leased to those that asked. A lease that cannot be read is a problem of the next full step; its pod
// stays closed.
func (n *node) attachmentsOf(asked []cluster.Holder) cluster.Attachments {
	var news cluster.Attachments
	for _, holder := range asked {
		if lease, err := n.leases.Get(holder.ContainerID, holder.Interface); err == nil {
			news.List = append(news.List, attachmentOf(lease))
		}
	}
	return news
}

// attachmentOf is a lease as what it is to the cluster.
func attachmentOf(l ipam.Lease) cluster.Attachment {
	return cluster.Attachment{
		ContainerID: l.ContainerID, Interface: l.Interface,
		Namespace: l.Namespace, Name: l.Name, UID: l.UID, Addresses: l.Addresses,
	}
}

// admit lets the addresses through the start gate that still belong to the attachments whose policies were applied. An
// address that another pod has got meanwhile would let that one pass before its own policies stand; no address changes
// hands while they are added, and who gets one later closes the gate for it first.
func (n *node) admit(members []netfilter.Entry, add func([]netfilter.Entry) error) error {
	return n.leases.Freeze(func(owner func(netip.Addr) (ipam.Owner, bool)) error {
		return add(slices.DeleteFunc(slices.Clone(members), func(e netfilter.Entry) bool {
			now, held := owner(e.Prefix.Addr())
			return !held || n.planned[e.Prefix.Addr()] != cluster.Holder{ContainerID: now.ContainerID, Interface: now.Interface}
		}))
	})
}

// setUpHost lets the node forward packets, looks for what leads them round the policies, and reads the uplink unless a flag gives its MTU;
// it stays what it was where it cannot be read.
func (n *node) setUpHost(self cluster.Node, uplink mesh.Uplink) host {
	h := host{uplink: uplink}
	if err := nodenet.EnableForwarding(n.options.sysctlDir); err != nil {
		h.problems = append(h.problems, applyProblem("ForwardingOff", "Node "+n.options.nodeName, err,
			"pods reach nothing beyond their node; set net.ipv4.ip_forward=1 and net.ipv6.conf.all.forwarding=1, or make --sysctl-dir writable"))
	}
	if err := nodenet.CheckServices(); err != nil {
		h.problems = append(h.problems, applyProblem(ipvsCode, "Node "+n.options.nodeName, err,
			"set kube-proxy's mode to nftables or iptables, then run `kube-proxy --cleanup` on the node or reboot it; no pod starts here until then"))
	}
	h.look(n.options.cniConfDir)
	if n.options.mtu != 0 {
		h.uplink = mesh.Uplink{MTU: n.options.mtu} // all that the uplink is asked for
		return h
	}
	var err error
	if h.uplink, err = n.readUplink(self); err != nil {
		h.uplink = uplink
		h.problems = append(h.problems, applyProblem("UplinkUnknown", "Node "+n.options.nodeName, err,
			"set the kubelet's --node-ip to an address of the node's uplink, or set --mtu"))
	}
	return h
}

// readUplink reads the uplink of the node, which is the link that has its first InternalIP.
func (n *node) readUplink(self cluster.Node) (mesh.Uplink, error) {
	if len(self.Addresses) == 0 {
		return mesh.Uplink{}, errors.New("the Node has no InternalIP")
	}
	return n.uplinkOf(self.Addresses[0], n.planner.endpoints())
}

// meshCode tells a node that has no WireGuard at all from one where something failed.
func meshCode(err error) string {
	if errors.Is(err, wgdevice.ErrNoTunnel) {
		return "NoTunnel"
	}
	return "MeshApplyFailed"
}

// publicKey is the node's public key in the form that wg prints.
func publicKey(key wgdevice.Key) string {
	public := key.Public()
	return base64.StdEncoding.EncodeToString(public[:])
}

// admitted returns the addresses that the gate lets pass, without those that it keeps out because a set cannot isolate them.
func admitted(open map[netip.Addr]cluster.Holder, refused *firewall.ClosedError) map[netip.Addr]cluster.Holder {
	if refused == nil {
		return open
	}
	open = maps.Clone(open)
	for _, s := range refused.Sets {
		for _, address := range s.KeptOut {
			delete(open, address)
		}
	}
	return open
}

// closedProblems describes the policies that the packet filter refused.
func closedProblems(refused *firewall.ClosedError) []cluster.Problem {
	const remedy = "give the node the iptables extension or kernel module that is missing, or do without it in the policy; the daemon retries"
	var problems []cluster.Problem
	for _, c := range refused.Chains {
		problems = append(problems, applyProblem(codeNotApplied, "NetworkPolicy "+strings.Join(c.Objects, ", "),
			fmt.Errorf("the pods selected are isolated: chain %s is closed: %w", c.Name, c.Err), remedy))
	}
	for _, s := range refused.Sets {
		object := "NetworkPolicy " + strings.Join(s.Objects, ", ")
		if len(s.Objects) == 0 {
			object = "Set " + s.Name
		}
		problems = append(problems, applyProblem(codeNotApplied, object,
			fmt.Errorf("what set %s (%s) lacks stays closed: %w", s.Name, s.Comment, s.Err), remedy))
	}
	return problems
}

// applyProblem describes an error of applying.
func applyProblem(code, object string, err error, remedy string) cluster.Problem {
	return cluster.Problem{Code: code, Object: object, Message: err.Error(), Remedy: remedy}
}

package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/cniconf"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/nodenet"
	"github.com/warren-cni/warren/pkg/policy"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// plan is everything that a node wants, computed from one snapshot.
type plan struct {
	// snapshot is what the plan was made from.
	snapshot cluster.Snapshot
	podCIDRs []netip.Prefix
	rules    netfilter.Ruleset
	mesh     mesh.Config
	// open are the addresses whose policies are in rules.
	open     []netip.Addr
	counts   counts
	problems []cluster.Problem
}

// ipvsCode is the code of the problem with which no pod can be attached, ready or not.
const ipvsCode = "KubeProxyIPVS"

// counts are for the status.
type counts struct {
	policies, pods, isolated int
}

// makePlan plans from a snapshot whose local pods have their leased addresses. It is pure.
func makePlan(snapshot cluster.Snapshot, open []netip.Addr, p planning, uplinkMTU int) plan {
	config, meshProblems := mesh.Plan(snapshot, mesh.Options{
		ClusterCIDRs: p.parsedCluster,
		ListenPort:   p.port,
		UplinkMTU:    uplinkMTU,
		MTU:          p.mtu,
		Encrypted:    p.encryptionMode,
	})
	policyRules, policyProblems := policy.Compile(snapshot)
	base := guard.Compile(guard.Config{
		PodCIDRs:      config.PodCIDRs,
		KnownPodCIDRs: config.KnownPodCIDRs,
		ClusterCIDRs:  p.parsedCluster,
		NonMasquerade: p.parsedNonMasq,
		Encrypted:     p.encryptionMode,
		Ready:         open,
	})
	return plan{
		snapshot: snapshot,
		podCIDRs: config.PodCIDRs,
		rules:    netfilter.Merge(base, policyRules),
		mesh:     config,
		open:     open,
		counts:   count(snapshot),
		problems: slices.Concat(meshProblems, policyProblems),
	}
}

// count counts the policies, the pods of this node, and those of them that a policy isolates in a direction.
func count(snapshot cluster.Snapshot) counts {
	c := counts{policies: len(snapshot.Policies)}
	for _, pod := range snapshot.Pods {
		if pod.Node != snapshot.Self || pod.HostNetwork || len(pod.Addresses) == 0 {
			continue
		}
		c.pods++
		if slices.ContainsFunc(snapshot.Policies, func(p cluster.Policy) bool {
			return p.Namespace == pod.Namespace && p.Pods.Matches(pod.Labels)
		}) {
			c.isolated++
		}
	}
	return c
}

// step reads, plans and applies. With full it trusts nothing that it remembers of the kernel.
func (n *node) step(ctx context.Context, full bool) error {
	before := n.outcomeNow()
	snapshot, problems := n.source.Snapshot()
	leases, leaseProblems, err := n.readLeases()
	if err != nil { // to plan without them would close every pod that runs
		before.problems = leaseProblems
		n.record(before)
		return err
	}
	bound, open := snapshot.Bind(leases)

	now := outcome{synced: true, ready: before.ready, applied: before.applied, guarded: before.guarded, closed: before.closed, host: before.host}
	if full {
		n.filter.Forget()
	}
	if full || now.host.uplinkMTU == 0 {
		now.host = n.setUpHost(snapshot, before.host.uplinkMTU)
	}
	now.plan = makePlan(bound, open, n.options.planning, now.host.uplinkMTU)
	n.planned = holders(leases, open)
	if err = n.cutOff(snapshot); err != nil {
		now.problems = append(now.problems, applyProblem("ClusterCIDRHoldsNode", "Node "+n.options.nodeName, err,
			"set --cluster-cidr to the pods' network, which holds no node"))
	} else {
		err = n.apply(ctx, &now)
	}
	if ctx.Err() != nil {
		return err // the daemon stops: what was cut short says nothing of the node
	}
	now.problems = cluster.SortProblems(slices.Concat(problems, leaseProblems, now.host.problems, now.plan.problems, now.problems))
	n.record(now)
	return err
}

// cutOff is an error where the guards would cut the node off from all others, the API server included, because the cluster CIDR
// holds the node's own address. Nothing is applied then, and so nothing opens.
func (n *node) cutOff(snapshot cluster.Snapshot) error {
	self, _ := snapshot.Node(snapshot.Self)
	for _, prefix := range n.options.parsedCluster {
		if at := slices.IndexFunc(self.Addresses, prefix.Contains); at >= 0 && n.options.encryptionMode {
			return fmt.Errorf("the cluster CIDR %s holds %s, the node's own InternalIP: the guards would cut the node off, so nothing is applied",
				prefix, self.Addresses[at])
		}
	}
	return nil
}

// apply makes the kernel agree with the plan: packet filter first, so that the guards stand before anything can be sent,
// then the mesh, then the annotations that other nodes need, and the conflist when all of it was well.
func (n *node) apply(ctx context.Context, o *outcome) error {
	changes, filterErr := n.filter.Apply(ctx, o.plan.rules)
	var closed []firewall.ClosedChain
	if refused, ok := errors.AsType[*firewall.ClosedError](filterErr); ok {
		closed = refused.Chains
		filterErr = nil // all else stands, and the pods of these chains are isolated
	}
	if filterErr != nil {
		filterErr = fmt.Errorf("applying the packet filter: %w", filterErr)
		o.problems = append(o.problems, applyProblem("FirewallApplyFailed", "Node "+n.options.nodeName, filterErr,
			"pods that this concerns stay closed; the daemon retries"))
	} else {
		o.guarded = true
		o.open = n.planned
		o.closed = closed
		o.problems = append(o.problems, closedProblems(closed)...)
	}
	if !o.guarded {
		return filterErr // without the guards there must be no tunnel and no route
	}
	if len(o.plan.podCIDRs) == 0 || o.host.uplinkMTU == 0 {
		return filterErr // it is among the problems; the Node's next event starts the next step
	}

	meshChanges, meshErr := n.tunnel.Apply(ctx, o.plan.mesh, n.key)
	if meshErr != nil {
		meshErr = fmt.Errorf("applying the mesh: %w", meshErr)
		o.problems = append(o.problems, applyProblem(meshCode(meshErr), "Node "+n.options.nodeName, meshErr,
			"pods of other nodes stay unreachable, nothing leaves in clear; mend what the message names, the daemon retries"))
	}
	publishErr := n.publish(ctx)
	if publishErr != nil {
		o.problems = append(o.problems, applyProblem("PublishFailed", "Node "+n.options.nodeName, publishErr,
			"other nodes cannot reach this one until it succeeds; check the daemon's access to the API server"))
	}
	n.log.Debug("applied", "set_operations", changes.SetOps, "rule_bytes", changes.RuleBytes, "mesh", meshChanges)
	if err := errors.Join(filterErr, meshErr, publishErr); err != nil {
		return err
	}
	if err := n.installConflist(o); err != nil {
		return err
	}
	o.applied = n.clock()
	return nil
}

// installConflist tells the container runtime that the node has a network.
func (n *node) installConflist(o *outcome) error {
	changed, err := cniconf.Install(n.options.cniConfDir, cniconf.Params{
		RunDir: n.options.runDir, Ranges: o.plan.podCIDRs, MTU: o.plan.mesh.MTU,
	})
	if changed {
		n.log.Info("conflist written", "directory", n.options.cniConfDir, "pod_cidrs", o.plan.podCIDRs, "mtu", o.plan.mesh.MTU)
	}
	if err != nil {
		o.problems = append(o.problems, applyProblem("ConflistFailed", n.options.cniConfDir, err,
			"mend or remove the file named, then the daemon writes the conflist"))
		if !changed {
			return err
		}
	}
	o.ready = true
	return nil
}

// publish puts the public key and port on the own Node. With encryption off there is nothing to publish.
func (n *node) publish(ctx context.Context) error {
	if !n.options.encryptionMode {
		return nil
	}
	return n.source.Publish(ctx, map[string]string{
		kube.AnnotationPublicKey: publicKey(n.key),
		kube.AnnotationPort:      strconv.Itoa(int(n.options.port)),
	})
}

// readLeases returns the addresses that pods of this node hold; the error says that nothing is known of them.
func (n *node) readLeases() ([]cluster.Attachment, []cluster.Problem, error) {
	leases, err := n.leases.List()
	var problems []cluster.Problem
	if err != nil {
		problems = append(problems, applyProblem("LeaseUnreadable", n.options.leases(), err,
			"the pod that holds the address stays closed; delete it, or the file if no pod holds the address"))
		if leases == nil {
			return nil, problems, err
		}
	}
	attachments := make([]cluster.Attachment, 0, len(leases))
	for _, l := range leases {
		attachments = append(attachments, cluster.Attachment{
			ContainerID: l.ContainerID, Interface: l.Interface,
			Namespace: l.Namespace, Name: l.Name, UID: l.UID, Addresses: l.Addresses,
		})
	}
	return attachments, problems, nil
}

// holders says which attachments hold the addresses that the start gate may let pass.
func holders(attachments []cluster.Attachment, open []netip.Addr) map[netip.Addr]holder {
	all := make(map[netip.Addr]holder, len(open))
	for _, a := range attachments {
		for _, address := range a.Addresses {
			if _, found := slices.BinarySearchFunc(open, address, netip.Addr.Compare); found {
				all[address] = holder{a.ContainerID, a.Interface}
			}
		}
	}
	return all
}

// admit lets the addresses through the start gate that still belong to the attachments whose policies were applied. An
// address that another pod has got meanwhile would let that one pass before its own policies stand; no address changes
// hands while they are added, and who gets one later closes the gate for it first.
func (n *node) admit(members []netfilter.Entry, add func([]netfilter.Entry) error) error {
	return n.leases.Freeze(func(owner func(netip.Addr) (ipam.Owner, bool)) error {
		return add(slices.DeleteFunc(slices.Clone(members), func(e netfilter.Entry) bool {
			now, held := owner(e.Prefix.Addr())
			return !held || n.planned[e.Prefix.Addr()] != holder{now.ContainerID, now.Interface}
		}))
	})
}

// setUpHost lets the node forward packets, looks for what leads them round the policies, and reads the MTU of the link that holds the node's own address unless a flag
// gives one; it stays what it was where it cannot be read.
func (n *node) setUpHost(snapshot cluster.Snapshot, mtu int) host {
	h := host{uplinkMTU: mtu}
	if err := nodenet.EnableForwarding(n.options.sysctlDir); err != nil {
		h.problems = append(h.problems, applyProblem("ForwardingOff", "Node "+n.options.nodeName, err,
			"pods reach nothing beyond their node; set net.ipv4.ip_forward=1 and net.ipv6.conf.all.forwarding=1, or make --sysctl-dir writable"))
	}
	if err := nodenet.CheckServices(); err != nil {
		h.problems = append(h.problems, applyProblem(ipvsCode, "Node "+n.options.nodeName, err,
			"set kube-proxy's mode to nftables or iptables, then run `kube-proxy --cleanup` on the node or reboot it; no pod starts here until then"))
	}
	if n.options.mtu != 0 {
		h.uplinkMTU = n.options.mtu // all that the uplink is asked for
		return h
	}
	read, err := n.readMTU(snapshot)
	if err != nil {
		h.problems = append(h.problems, applyProblem("UplinkUnknown", "Node "+n.options.nodeName, err,
			"set the kubelet's --node-ip to an address of the node's uplink, or set --mtu"))
		return h
	}
	h.uplinkMTU = read
	return h
}

// readMTU returns the MTU of the link that holds the node's first InternalIP.
func (n *node) readMTU(snapshot cluster.Snapshot) (int, error) {
	self, ok := snapshot.Node(snapshot.Self)
	if !ok || len(self.Addresses) == 0 {
		return 0, errors.New("the Node has no InternalIP")
	}
	return n.uplinkMTU(self.Addresses[0])
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

// closedProblems describes the policies that the packet filter refused.
func closedProblems(closed []firewall.ClosedChain) []cluster.Problem {
	var problems []cluster.Problem
	for _, c := range closed {
		problems = append(problems, applyProblem("PolicyNotApplied", "NetworkPolicy "+strings.Join(c.Objects, ", "),
			fmt.Errorf("the pods selected are isolated: chain %s is closed: %w", c.Name, c.Err),
			"give the node the iptables extension or kernel module that is missing, or do without it in the policy; the daemon retries"))
	}
	return problems
}

// applyProblem describes an error of applying.
func applyProblem(code, object string, err error, remedy string) cluster.Problem {
	return cluster.Problem{Code: code, Object: object, Message: err.Error(), Remedy: remedy}
}

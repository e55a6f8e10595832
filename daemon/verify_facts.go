package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/podcidr"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// meshFacts are what the daemon tells `warrend verify`.
type meshFacts struct {
	Status agentapi.Status `json:"status"`
	// Pods hold the pods' addresses, as far as they are known: the cluster CIDRs and all podCIDRs. Direct are destinations beyond them
	// that see a pod's own address.
	Pods   []netip.Prefix `json:"pods"`
	Direct []netip.Prefix `json:"direct,omitempty"`
	// Own are the first addresses of the node's podCIDRs.
	Own   []netip.Addr `json:"own"`
	Peers []peerFacts  `json:"peers"`
	// NoPeers are the other nodes, to which no tunnel leads.
	NoPeers []string `json:"noPeers,omitempty"`
	// GuardDrift is where the guards do not stand as planned, Drift where something else does not.
	GuardDrift []string `json:"guardDrift,omitempty"`
	Drift      []string `json:"drift,omitempty"`
}

// peerFacts are a node that the mesh leads to.
type peerFacts struct {
	Node string `json:"node"`
	// Addresses are the node's own in its podCIDRs, of the families that this node has, too.
	Addresses []netip.Addr `json:"addresses"`
	Endpoint  string       `json:"endpoint"`
}

// verifyPatience is how long the daemon takes to read the kernel, settleFor how long it waits before it believes that the tunnel
// differs: a step that just changes it has ended then.
const (
	verifyPatience = 20 * time.Second
	settleFor      = 500 * time.Millisecond
)

// verify answers with what is planned and with where the kernel differs from it.
func (n *node) verify(ctx context.Context) agentapi.Response {
	ctx, cancel := context.WithTimeout(ctx, verifyPatience)
	defer cancel()
	o := n.outcomeNow()
	if !o.synced {
		return refuse(types.ErrTryAgainLater, errNotReady(o))
	}
	f := meshFacts{
		Status: n.status(ctx),
		Pods:   slices.Concat(n.options.parsedCluster, o.mesh.PodCIDRs, o.mesh.KnownPodCIDRs),
		Direct: n.options.parsedNonMasq,
	}
	for _, own := range o.mesh.Addresses {
		f.Own = append(f.Own, own.Addr())
	}
	reached := map[string]bool{n.options.nodeName: true}
	for _, p := range o.mesh.Peers {
		f.Peers = append(f.Peers, peerFactsOf(p, f.Own))
		reached[p.Node] = true
	}
	for _, node := range n.planner.snapshot().Nodes {
		if !reached[node.Name] {
			f.NoPeers = append(f.NoPeers, node.Name)
		}
	}
	var err error
	f.GuardDrift, f.Drift, err = n.kernelDrift(ctx, o.closed)
	if err != nil {
		return refuse(types.ErrTryAgainLater, fmt.Errorf("comparing the kernel with the plan: %w", err))
	}
	tunnel, err := n.tunnelDrift(ctx)
	if err != nil {
		return refuse(types.ErrTryAgainLater, fmt.Errorf("comparing the routes with the plan: %w", err))
	}
	f.Drift = append(f.Drift, tunnel...)
	text, err := json.Marshal(f)
	if err != nil {
		return refuse(types.ErrInternal, fmt.Errorf("writing the facts: %w", err))
	}
	return agentapi.Response{Verification: text}
}

// peerFactsOf are a peer's with the addresses that answer probes from this node's.
func peerFactsOf(p mesh.Peer, own []netip.Addr) peerFacts {
	f := peerFacts{Node: p.Node}
	if p.Endpoint.IsValid() {
		f.Endpoint = p.Endpoint.String()
	}
	for _, prefix := range p.AllowedIPs {
		address := podcidr.NodeAddress(prefix)
		if slices.ContainsFunc(own, func(a netip.Addr) bool { return a.Is4() == address.Is4() }) {
			f.Addresses = append(f.Addresses, address)
		}
	}
	return f
}

// kernelDrift compares rules and sets with the plan; what concerns the guards is told apart.
func (n *node) kernelDrift(ctx context.Context, closed []firewall.ClosedChain) (guards, others []string, err error) {
	k := kernel{comparer: n.filter, closed: closed}
	lasting, err := k.lasting(ctx, n.planner.ruleset, func(firewall.Difference) bool { return true })
	rules := n.planner.guardRules()
	for _, d := range lasting {
		if ofRules(d, rules.Of(d.Family)) {
			guards = append(guards, d.String())
		} else {
			others = append(others, d.String())
		}
	}
	return guards, others, err
}

// guardRules returns the rules that stand whatever the policies.
func (p *planner) guardRules() netfilter.Ruleset {
	p.mu.Lock()
	defer p.mu.Unlock()
	return netfilter.Merge(p.guards, p.hosts.sets())
}

// ofRules tells whether a difference is in one of these chains and sets, or on the way to them.
func ofRules(d firewall.Difference, rules *netfilter.Rules) bool {
	return slices.ContainsFunc(rules.Chains, func(c netfilter.Chain) bool { return c.Table == d.Table && c.Name == d.Chain }) ||
		slices.ContainsFunc(rules.Hooks, func(h netfilter.Hook) bool { return h.Table == d.Table && h.BuiltIn == d.Chain }) ||
		slices.ContainsFunc(rules.Sets, func(s netfilter.Set) bool { return s.Name == d.Set })
}

// tunnelDrift compares the device and the routes with the plan. What a step changes meanwhile is no difference.
func (n *node) tunnelDrift(ctx context.Context) ([]string, error) {
	if !n.options.encryptionMode {
		return nil, nil
	}
	look := func() ([]string, error) {
		device, err := n.tunnel.Status(ctx)
		if err != nil {
			return nil, nil //nolint:nilerr // it is a problem of the status already, and nothing is proven
		}
		planned := n.outcomeNow().mesh
		routes, err := n.tunnel.RouteDrift(planned, device.Peers)
		return slices.Concat(peerDrift(planned.Peers, device.Peers), routes), err
	}
	before, err := look()
	if err != nil || len(before) == 0 {
		return nil, err
	}
	select {
	case <-ctx.Done():
	case <-time.After(settleFor):
	}
	after, err := look()
	return slices.DeleteFunc(after, func(text string) bool { return !slices.Contains(before, text) }), err
}

// peerDrift tells where the peers of a device are not as planned. A node that changes its key is two peers, of which either may hold
// the allowed IPs; addresses of its own are there once they were found.
func peerDrift(planned []mesh.Peer, device []wgdevice.PeerStatus) []string {
	byKey := make(map[[32]byte]wgdevice.PeerStatus, len(device))
	for _, d := range device {
		byKey[d.PublicKey] = d
	}
	var drift []string
	for _, p := range planned {
		if _, known := byKey[p.PublicKey]; !known && p.Next == ([32]byte{}) {
			drift = append(drift, fmt.Sprintf("the tunnel lacks node %s as a peer", p.Node))
			continue
		}
		if byKey[p.PublicKey].Preshared || byKey[p.Next].Preshared {
			drift = append(drift, fmt.Sprintf("the tunnel's peer %s has a preshared key, which its node has not", p.Node))
		}
		allowed := slices.Concat(byKey[p.PublicKey].AllowedIPs, byKey[p.Next].AllowedIPs)
		delete(byKey, p.PublicKey)
		delete(byKey, p.Next)
		extra := slices.DeleteFunc(slices.Clone(allowed), func(a netip.Prefix) bool {
			return slices.Contains(p.AllowedIPs, a) || a.IsSingleIP() && slices.Contains(p.NodeAddresses, a.Addr())
		})
		missing := slices.DeleteFunc(slices.Clone(p.AllowedIPs), func(a netip.Prefix) bool { return slices.Contains(allowed, a) })
		if len(extra)+len(missing) > 0 {
			drift = append(drift, fmt.Sprintf("the tunnel's peer %s lacks %s and has %s besides", p.Node, orNone(texts(missing)), orNone(texts(extra))))
		}
	}
	for _, d := range device {
		if _, unplanned := byKey[d.PublicKey]; unplanned {
			drift = append(drift, fmt.Sprintf("the tunnel has a peer that is no node's: %s with %s",
				base64.StdEncoding.EncodeToString(d.PublicKey[:]), orNone(texts(d.AllowedIPs))))
		}
	}
	return drift
}

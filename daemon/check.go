package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// checkPatience is how long a check waits for what a step is about to write.
const checkPatience = 5 * time.Second

// check says whether the start gate is open for the pod, and whether all that decides about its packets stands in the kernel:
// hooks, guards, the chains of its policies with their sets, and its place in the sets of this node's pods.
func (n *node) check(ctx context.Context, pod agentapi.Pod) agentapi.Response {
	if !n.isOpen(pod) {
		return refuse(types.ErrInternal, fmt.Errorf("the start gate is closed for pod %s/%s with addresses %v: its policies are not programmed on this node",
			pod.Namespace, pod.Name, pod.Addresses))
	}
	n.checking.Lock() // reading rules takes a program for each family: not one for each pod at once
	defer n.checking.Unlock()
	ctx, cancel := context.WithTimeout(ctx, checkPatience)
	defer cancel()
	k := kernel{comparer: n.filter, closed: n.outcomeNow().closed, settle: func() { _ = n.loop.Sync(ctx) }} // its errors are problems already
	wanted := func() netfilter.Ruleset {
		chains := n.planner.chainsOf(pod.Addresses)
		return deciding(n.planner.ruleset(), chains)
	}
	lasting, err := k.lasting(ctx, wanted, func(d firewall.Difference) bool { return matters(d, pod.Addresses) })
	if err != nil {
		return refuse(types.ErrInternal, fmt.Errorf("comparing the kernel with what is planned for pod %s/%s: %w", pod.Namespace, pod.Name, err))
	}
	var errs []error
	for _, d := range lasting {
		errs = append(errs, fmt.Errorf("the kernel is not as planned: %s", d))
	}
	if len(errs) > 0 {
		return refuse(types.ErrInternal, errors.Join(errs...))
	}
	return agentapi.Response{}
}

// matters says whether a difference may matter to the packets of these addresses. What another pod lacks in the sets of this node's
// pods is that one's concern.
func matters(d firewall.Difference, addresses []netip.Addr) bool {
	if len(d.Members) == 0 || d.Role == netfilter.Allows {
		return true
	}
	return slices.ContainsFunc(d.Members, func(m netfilter.Entry) bool {
		return !m.Prefix.IsSingleIP() || slices.Contains(addresses, m.Prefix.Addr())
	})
}

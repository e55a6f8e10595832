package policy

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/warren-cni/warren/pkg/cluster"
)

// BlindBlocks finds the ipBlocks that hold the address of a Service and none of its endpoints. They look as if they were about
// the Service, and do nothing for it: policies judge a connection after it was translated to an endpoint. It is advice, because
// such a policy is enforced as it is written.
func BlindBlocks(policies []cluster.Policy, services []cluster.Service) []cluster.Problem {
	var advice []cluster.Problem
	for i := range policies {
		p := &policies[i]
		for _, d := range []direction{ingress(), egress()} {
			for _, r := range d.rules(p) {
				for _, peer := range r.Peers {
					if named := blindTo(peer, services); len(named) > 0 {
						advice = append(advice, blindAdvice(p, fmt.Sprintf("spec.%s[%d]", d.name, r.Index), *peer.Block, named))
					}
				}
			}
		}
	}
	return cluster.SortProblems(advice)
}

// blindTo returns the Services whose addresses a peer's block holds without their endpoints.
func blindTo(peer cluster.Peer, services []cluster.Service) []cluster.Service {
	var named []cluster.Service
	for i := range services {
		s := &services[i]
		holds := func(a netip.Addr) bool { return blockHolds(*peer.Block, a) }
		if peer.Block != nil && len(s.Endpoints) > 0 && slices.ContainsFunc(s.ClusterIPs, holds) &&
			!slices.ContainsFunc(s.Endpoints, func(e cluster.Endpoint) bool { return holds(e.Address) }) {
			named = append(named, *s)
		}
	}
	return named
}

func blindAdvice(p *cluster.Policy, field string, b cluster.Block, named []cluster.Service) cluster.Problem {
	others := ""
	if more := len(named) - 1; more > 0 {
		others = fmt.Sprintf(" and of %d more", more)
	}
	return cluster.Problem{
		Code: "BlockNamesService", Object: "NetworkPolicy " + p.Key().String(), Field: field,
		Message: fmt.Sprintf("%s holds the address of Service %s%s and none of the endpoints: policies judge after the translation, so it never matches there",
			blockText(b), named[0].Key(), others),
		Remedy: "name the pods behind the Service by their labels, with the ports of the pods",
	}
}

package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/policy"
)

// services tells what Services there are.
type services interface {
	// Service returns the Service of that name, with its endpoints.
	Service(ctx context.Context, namespace, name string) (cluster.Service, error)
	// ServiceAt returns the Service that has an address; false where none has.
	ServiceAt(ctx context.Context, address netip.Addr) (cluster.Service, bool, error)
}

// serviceName parses svc/NAMESPACE/NAME.
func serviceName(text string) (cluster.Key, bool) {
	parts := strings.Split(text, "/")
	if len(parts) != 3 || !slices.Contains([]string{"svc", "service", "services"}, parts[0]) {
		return cluster.Key{}, false
	}
	return cluster.Key{Namespace: parts[1], Name: parts[2]}, true
}

// lookUp finds the Service that --to names or whose address it is. What it is told of an address is no reason to refuse an
// answer: it says so in a note then.
func (f *facts) lookUp(ctx context.Context, known services, to string) error {
	if name, ok := serviceName(to); ok {
		service, err := known.Service(ctx, name.Namespace, name.Name)
		if err != nil {
			return fmt.Errorf("--to %s: %w", to, err)
		}
		f.service = &service
		return nil
	}
	address, ok := strangerAt(f.snapshot, to)
	if !ok {
		return nil
	}
	service, found, err := known.ServiceAt(ctx, address)
	switch {
	case err != nil:
		f.notes = append(f.notes, fmt.Sprintf("whether %s is the address of a Service is not known (%v); %s", address, err, translated))
	case found:
		f.service = &service
		f.notes = append(f.notes, fmt.Sprintf("%s is the address of Service %s; %s", address, service.Key(), translated))
	}
	return nil
}

// translated is what one has to know of Services.
const translated = "policies judge after its translation to an endpoint, so an ipBlock that names a Service's address never matches"

// strangerAt parses an address that neither a pod nor a node has, or can have.
func strangerAt(s cluster.Snapshot, text string) (netip.Addr, bool) {
	address, err := netip.ParseAddr(text)
	if err != nil {
		return netip.Addr{}, false
	}
	address = address.Unmap().WithZone("")
	holds := func(p netip.Prefix) bool { return p.Contains(address) }
	return address, !slices.ContainsFunc(s.Nodes, func(n cluster.Node) bool {
		return slices.Contains(n.Addresses, address) || slices.ContainsFunc(n.PodCIDRs, holds)
	})
}

// serviceConnections returns the connections that one to a Service's address and port may become: to every endpoint of the
// source's families.
func serviceConnections(f facts, from place, q agentapi.Explain, asked askedPort) ([]connection, error) {
	ports, err := portsOf(f.service, asked)
	if err != nil {
		return nil, fmt.Errorf("--port %s: %w", q.Port, err)
	}
	var served []netip.Addr
	var connections []connection
	for i := range ports {
		for _, e := range f.service.Endpoints {
			number, serves := e.Ports[ports[i].Name]
			if !serves || !sameFamily(q.To, e.Address) {
				continue
			}
			served = append(served, e.Address)
			for _, flow := range flowsBetween(f, from, placeAt(f.snapshot, e.Address), target{ports[i].Protocol, number}) {
				connections = append(connections, connection{Flow: flow, port: &ports[i], notReady: !e.Ready})
			}
		}
	}
	switch {
	case len(served) == 0:
		return nil, fmt.Errorf("--to %s: no endpoint of Service %s is behind that, so nothing answers whatever policies say "+
			"(kubectl get endpointslices --namespace %s --selector kubernetes.io/service-name=%s)",
			q.To, f.service.Key(), f.service.Namespace, f.service.Name)
	case len(connections) == 0:
		return nil, fmt.Errorf("%s has %s and Service %s leads to %s: there is no connection between IPv4 and IPv6",
			q.From, orNone(texts(from.addresses)), f.service.Key(), orNone(unique(texts(served))))
	default:
		return connections, nil
	}
}

// sameFamily tells whether an endpoint can be behind what was asked for: a Service's address is translated to those of its
// own family, and its name to all.
func sameFamily(to string, endpoint netip.Addr) bool {
	address, err := netip.ParseAddr(to)
	return err != nil || address.Unmap().Is4() == endpoint.Is4()
}

// portsOf returns the ports of a Service that were asked for: all without --port.
func portsOf(service *cluster.Service, asked askedPort) ([]cluster.ServicePort, error) {
	var ports []cluster.ServicePort
	var has []string
	for _, p := range service.Ports {
		has = append(has, servicePortText(p))
		if asked == (askedPort{}) || asked.is(p.Name, p.Port, p.Protocol) {
			ports = append(ports, p)
		}
	}
	if len(ports) == 0 && asked == (askedPort{}) {
		return nil, fmt.Errorf("%s has no ports", service.Key())
	}
	if len(ports) == 0 {
		return nil, fmt.Errorf("%s has no such port; it has %s", service.Key(), orNone(has))
	}
	return ports, nil
}

// servicePortText says a port of a Service as people write it.
func servicePortText(p cluster.ServicePort) string {
	text := fmt.Sprintf("%d/%s", p.Port, p.Protocol)
	if p.Name == "" {
		return text
	}
	return text + " (" + p.Name + ")"
}

// blindBlocks says which ipBlocks of the source's policies name the Service's address and not that of the endpoint: they
// look as if they allowed the connection, and do nothing for it.
func blindBlocks(f facts, c connection, v policy.Verdict) []string {
	var notes []string
	for _, address := range f.service.ClusterIPs {
		if v.Egress.Allowed || address.Is4() != c.Dst.Is4() {
			continue
		}
		before := policy.Explain(f.snapshot, policy.Flow{Src: c.Src, Dst: address, Protocol: c.Protocol, Port: c.port.Port})
		for _, block := range onlyBefore(before.Egress.Policies, v.Egress.Policies) {
			notes = append(notes, fmt.Sprintf("%s, which holds the Service's address %s: that never matches, because policies judge "+
				"after the translation, so name the pods behind it", block, address))
		}
	}
	return notes
}

// onlyBefore names the peers that match before a Service's translation and not after it. Both lists are those of one source,
// or one is empty because no policy decides there.
func onlyBefore(before, after []policy.Policy) []string {
	var peers []string
	for i := range min(len(before), len(after)) {
		for j, rule := range before[i].Rules {
			for k, peer := range rule.Peers {
				if peer.Matches && !after[i].Rules[j].Peers[k].Matches {
					peers = append(peers, before[i].Name+" "+rule.Field+" names "+peer.Text)
				}
			}
		}
	}
	return peers
}

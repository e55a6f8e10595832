package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/podcidr"
	"github.com/warren-cni/warren/pkg/policy"
)

// place is what --from or --to names.
type place struct {
	addresses []netip.Addr
	// pod is nil where an address was given that is no pod's own.
	pod *cluster.Pod
}

// service is a protocol with a port; ICMP has none.
type service struct {
	protocol cluster.Protocol
	port     uint16
}

// flowsOf returns the connections that a question is about: between all addresses of one family, to every number that the
// destination gives to a port's name.
func flowsOf(s cluster.Snapshot, q agentapi.Explain, encrypted bool) ([]policy.Flow, error) {
	from, err := placeOf(s, q.From)
	if err != nil {
		return nil, fmt.Errorf("--from %s: %w", q.From, err)
	}
	to, err := placeOf(s, q.To)
	if err != nil {
		return nil, fmt.Errorf("--to %s: %w", q.To, err)
	}
	services, err := servicesOf(q.Port, to.pod)
	if err != nil {
		return nil, fmt.Errorf("--port %s: %w", q.Port, err)
	}
	if encrypted {
		from.addresses = sources(s, from, to)
	}
	var flows []policy.Flow
	for _, service := range services {
		for _, src := range from.addresses {
			for _, dst := range to.addresses {
				if src.Is4() == dst.Is4() {
					flows = append(flows, policy.Flow{Src: src, Dst: dst, Protocol: service.protocol, Port: service.port})
				}
			}
		}
	}
	if len(flows) == 0 {
		return nil, fmt.Errorf("%s has %v and %s has %v: there is no connection between IPv4 and IPv6", q.From, from.addresses, q.To, to.addresses)
	}
	return flows, nil
}

// placeOf finds the pod or parses the address.
func placeOf(s cluster.Snapshot, text string) (place, error) {
	if address, err := netip.ParseAddr(text); err == nil {
		address = address.Unmap().WithZone("")
		at := slices.IndexFunc(s.Pods, func(p cluster.Pod) bool {
			return !p.HostNetwork && !p.Finished && slices.Contains(p.Addresses, address)
		})
		if at < 0 {
			return place{addresses: []netip.Addr{address}}, nil
		}
		return place{addresses: []netip.Addr{address}, pod: &s.Pods[at]}, nil
	}
	namespace, name, ok := strings.Cut(text, "/")
	if !ok || strings.Contains(name, "/") {
		return place{}, errors.New("say NAMESPACE/POD or an address")
	}
	at := slices.IndexFunc(s.Pods, func(p cluster.Pod) bool { return p.Namespace == namespace && p.Name == name })
	if at < 0 {
		return place{}, fmt.Errorf("there is no such pod (kubectl get pods --namespace %s)", namespace)
	}
	pod := &s.Pods[at]
	switch {
	case pod.Finished:
		return place{}, errors.New("the pod has finished: it has no address any more, and no policy applies to it")
	case len(pod.Addresses) == 0:
		return place{}, errors.New("the pod has no address yet, or none that its node may give: nothing reaches it, and nothing of it passes")
	default:
		return place{addresses: pod.Addresses, pod: pod}, nil
	}
}

// sources returns the addresses that a connection comes from. A host-network pod is its node, and what a node sends to pods
// of others has the node's address in the tunnel.
func sources(s cluster.Snapshot, from, to place) []netip.Addr {
	if from.pod == nil || !from.pod.HostNetwork || to.pod == nil || to.pod.Node == from.pod.Node {
		return from.addresses
	}
	node, _ := s.Node(from.pod.Node)
	var addresses []netip.Addr
	for _, podCIDR := range node.PodCIDRs {
		addresses = append(addresses, podcidr.NodeAddress(podCIDR))
	}
	if len(addresses) == 0 {
		return from.addresses // the mesh does not have the node
	}
	return addresses
}

// servicesOf parses a port. A name is resolved on the destination, which may give it to several numbers.
func servicesOf(text string, to *cluster.Pod) ([]service, error) {
	if text == "" {
		return []service{{protocol: policy.ICMP}}, nil
	}
	port, protocol, hasProtocol := strings.Cut(text, "/")
	p := cluster.Protocol(strings.ToUpper(protocol))
	if hasProtocol && p != cluster.TCP && p != cluster.UDP && p != cluster.SCTP {
		return nil, errors.New("the protocol is tcp, udp or sctp")
	}
	number, err := strconv.ParseUint(port, 10, 16)
	switch {
	case err == nil && number > 0 && hasProtocol:
		return []service{{p, uint16(number)}}, nil
	case err == nil && number > 0:
		return []service{{cluster.TCP, uint16(number)}}, nil
	case strings.Trim(port, "0123456789") == "":
		return nil, errors.New("a port is 1 to 65535")
	case to == nil:
		return nil, errors.New("only pods name ports, and the destination is none: say a number")
	}
	var services []service
	var has []string
	for _, named := range to.Ports {
		has = append(has, fmt.Sprintf("%s (%d/%s)", named.Name, named.Port, named.Protocol))
		if named.Name == port && (!hasProtocol || named.Protocol == p) {
			services = append(services, service{named.Protocol, named.Port})
		}
	}
	if len(services) == 0 {
		return nil, fmt.Errorf("pod %s/%s has no such port; it names %s", to.Namespace, to.Name, orNone(has))
	}
	return services, nil
}

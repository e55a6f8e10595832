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

// facts are what a question is answered from.
type facts struct {
	snapshot cluster.Snapshot
	problems []cluster.Problem
	// encrypted is true where what nodes send to pods of others goes through the tunnel.
	encrypted bool
	// service is what the question asks to reach; nil where that is no Service.
	service *cluster.Service
	// notes are what was found out on the way.
	notes []string
}

// connection is one that a question is about.
type connection struct {
	policy.Flow
	// port leads to it, and notReady tells that nothing is sent there at the moment, where a Service was asked for.
	port     *cluster.ServicePort
	notReady bool
}

// place is what --from or --to names.
type place struct {
	addresses []netip.Addr
	// pod is nil where an address was given that is no pod's own.
	pod *cluster.Pod
}

// connectionsOf returns the connections that a question is about.
func connectionsOf(f facts, q agentapi.Explain) ([]connection, error) {
	from, err := sourceOf(f.snapshot, q.From)
	if err != nil {
		return nil, fmt.Errorf("--from %s: %w", q.From, err)
	}
	port, err := parsePort(q.Port)
	if err != nil {
		return nil, fmt.Errorf("--port %s: %w", q.Port, err)
	}
	if f.service != nil {
		return serviceConnections(f, from, q, port)
	}
	to, err := placeOf(f.snapshot, q.To)
	if err != nil {
		return nil, fmt.Errorf("--to %s: %w", q.To, err)
	}
	targets, err := targetsOf(port, to.pod)
	if err != nil {
		return nil, fmt.Errorf("--port %s: %w", q.Port, err)
	}
	var connections []connection
	for _, t := range targets {
		for _, flow := range flowsBetween(f, from, to, t) {
			connections = append(connections, connection{Flow: flow})
		}
	}
	if len(connections) == 0 {
		return nil, fmt.Errorf("%s has %s and %s has %s: there is no connection between IPv4 and IPv6",
			q.From, orNone(texts(from.addresses)), q.To, orNone(texts(to.addresses)))
	}
	return connections, nil
}

// target is a protocol and a port of a destination; ICMP has no port.
type target struct {
	protocol cluster.Protocol
	port     uint16
}

// flowsBetween returns the flows between all addresses of one family.
func flowsBetween(f facts, from, to place, t target) []policy.Flow {
	addresses := from.addresses
	if f.encrypted {
		addresses = sources(f.snapshot, from, to)
	}
	var flows []policy.Flow
	for _, src := range addresses {
		for _, dst := range to.addresses {
			if src.Is4() == dst.Is4() {
				flows = append(flows, policy.Flow{Src: src, Dst: dst, Protocol: t.protocol, Port: t.port})
			}
		}
	}
	return flows
}

// sourceOf is placeOf for what opens a connection.
func sourceOf(s cluster.Snapshot, text string) (place, error) {
	if _, isService := serviceName(text); isService {
		return place{}, errors.New("a Service opens no connections: name the pod that does, NAMESPACE/POD, or its address")
	}
	return placeOf(s, text)
}

// placeOf finds the pod or parses the address.
func placeOf(s cluster.Snapshot, text string) (place, error) {
	if address, err := netip.ParseAddr(text); err == nil {
		return placeAt(s, address.Unmap().WithZone("")), nil
	}
	namespace, name, ok := strings.Cut(text, "/")
	if !ok || strings.Contains(name, "/") {
		return place{}, errors.New("say NAMESPACE/POD or an address, or svc/NAMESPACE/NAME as --to")
	}
	at := slices.IndexFunc(s.Pods, func(p cluster.Pod) bool { return p.Namespace == namespace && p.Name == name })
	if at < 0 {
		return place{}, fmt.Errorf("there is no such pod (kubectl get pods --namespace %s); a Service is svc/NAMESPACE/NAME", namespace)
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

// placeAt finds the pod that has an address of its own.
func placeAt(s cluster.Snapshot, address netip.Addr) place {
	p := place{addresses: []netip.Addr{address}}
	at := slices.IndexFunc(s.Pods, func(p cluster.Pod) bool {
		return !p.HostNetwork && !p.Finished && slices.Contains(p.Addresses, address)
	})
	if at >= 0 {
		p.pod = &s.Pods[at]
	}
	return p
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

// askedPort is what --port says: a number or a name, and a protocol where one was given. It is zero where nothing was said.
type askedPort struct {
	name     string
	number   uint16
	protocol cluster.Protocol
}

// parsePort parses --port.
func parsePort(text string) (askedPort, error) {
	if text == "" {
		return askedPort{}, nil
	}
	port, protocol, hasProtocol := strings.Cut(text, "/")
	asked := askedPort{protocol: cluster.Protocol(strings.ToUpper(protocol))}
	if hasProtocol && !slices.Contains([]cluster.Protocol{cluster.TCP, cluster.UDP, cluster.SCTP}, asked.protocol) {
		return askedPort{}, errors.New("the protocol is tcp, udp or sctp")
	}
	number, err := strconv.ParseUint(port, 10, 16)
	switch {
	case err == nil && number > 0:
		asked.number = uint16(number)
	case strings.Trim(port, "0123456789") == "":
		return askedPort{}, errors.New("a port is 1 to 65535")
	default:
		asked.name = port
	}
	return asked, nil
}

// is tells whether a port of that name, number and protocol was asked for.
func (a askedPort) is(name string, number uint16, protocol cluster.Protocol) bool {
	if a.protocol != "" && a.protocol != protocol {
		return false
	}
	return a.name == name && a.name != "" || a.number == number && a.number > 0
}

// targetsOf returns what a port means at a destination, which may give a name to several numbers. A number without a protocol
// is TCP, and no port at all is ICMP.
func targetsOf(a askedPort, to *cluster.Pod) ([]target, error) {
	switch {
	case a == askedPort{}:
		return []target{{protocol: policy.ICMP}}, nil
	case a.number > 0 && a.protocol == "":
		return []target{{cluster.TCP, a.number}}, nil
	case a.number > 0:
		return []target{{a.protocol, a.number}}, nil
	case to == nil:
		return nil, errors.New("only pods name ports, and the destination is none: say a number")
	}
	var targets []target
	var has []string
	for _, named := range to.Ports {
		has = append(has, fmt.Sprintf("%s (%d/%s)", named.Name, named.Port, named.Protocol))
		if a.is(named.Name, named.Port, named.Protocol) {
			targets = append(targets, target{named.Protocol, named.Port})
		}
	}
	if len(targets) == 0 {
		return nil, fmt.Errorf("pod %s has no such port; it names %s", to.Key(), orNone(has))
	}
	return targets, nil
}

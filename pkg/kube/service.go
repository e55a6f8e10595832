package kube

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/warren-cni/warren/pkg/cluster"
)

// errServiceUnknown says that a Service does not exist.
var errServiceUnknown = errors.New("there is no such Service")

// errNoSelector says that the endpoints of a Service are nowhere to be found.
var errNoSelector = errors.New("it has no selector and no EndpointSlices: where it leads to is not known")

// convertService refuses a Service that stands for a name.
func convertService(s *corev1.Service) (cluster.Service, error) {
	service := cluster.Service{Namespace: s.Namespace, Name: s.Name}
	if s.Spec.Type == corev1.ServiceTypeExternalName {
		return service, fmt.Errorf("it stands for the DNS name %s: ask for the addresses of that name", s.Spec.ExternalName)
	}
	service.ClusterIPs = clusterIPs(s)
	for _, p := range s.Spec.Ports {
		protocol, known := protocolOf(p.Protocol)
		number, valid := portNumber(p.Port)
		if !known || !valid {
			return service, fmt.Errorf("its port %d/%s is not a port", p.Port, p.Protocol)
		}
		service.Ports = append(service.Ports, cluster.ServicePort{Name: p.Name, Protocol: protocol, Port: number})
	}
	return service, nil
}

// clusterIPs are none for a headless Service.
func clusterIPs(s *corev1.Service) []netip.Addr {
	texts := s.Spec.ClusterIPs
	if len(texts) == 0 {
		texts = []string{s.Spec.ClusterIP}
	}
	return validAddrs(texts)
}

// validAddrs leaves out what is no address: an empty text, or the word None.
func validAddrs(texts []string) []netip.Addr {
	var addrs []netip.Addr
	for _, text := range texts {
		if address, err := parseAddr(text); err == nil {
			addrs = append(addrs, address)
		}
	}
	return addrs
}

// hasAddress is true for an address that kube-proxy translates to the Service's endpoints.
func hasAddress(s *corev1.Service, address netip.Addr) bool {
	texts := slices.Concat(s.Spec.ClusterIPs, []string{s.Spec.ClusterIP}, s.Spec.ExternalIPs)
	for _, ingress := range s.Status.LoadBalancer.Ingress {
		texts = append(texts, ingress.IP)
	}
	return s.Spec.Type != corev1.ServiceTypeExternalName && slices.Contains(validAddrs(texts), address)
}

// endpointsOf reads the endpoints out of a Service's slices. An endpoint may be in several, each with some of its ports.
func endpointsOf(slicesOf []discoveryv1.EndpointSlice) []cluster.Endpoint {
	byAddress := make(map[netip.Addr]cluster.Endpoint)
	for i := range slicesOf {
		ports := slicePorts(slicesOf[i].Ports)
		for _, e := range slicesOf[i].Endpoints {
			for _, address := range validAddrs(e.Addresses) {
				known := byAddress[address]
				now := cluster.Endpoint{
					Address: address, Ports: maps.Clone(ports), Pod: known.Pod, Node: known.Node,
					Ready: known.Ready || e.Conditions.Ready == nil || *e.Conditions.Ready,
				}
				maps.Copy(now.Ports, known.Ports)
				if e.TargetRef != nil && e.TargetRef.Kind == "Pod" {
					now.Pod = cluster.Key{Namespace: e.TargetRef.Namespace, Name: e.TargetRef.Name}
				}
				if e.NodeName != nil {
					now.Node = *e.NodeName
				}
				byAddress[address] = now
			}
		}
	}
	return sortedEndpoints(byAddress)
}

func slicePorts(ports []discoveryv1.EndpointPort) map[string]uint16 {
	numbers := make(map[string]uint16)
	for _, p := range ports {
		if p.Port == nil {
			continue
		}
		if number, ok := portNumber(*p.Port); ok {
			name := ""
			if p.Name != nil {
				name = *p.Name
			}
			numbers[name] = number
		}
	}
	return numbers
}

func sortedEndpoints(byAddress map[netip.Addr]cluster.Endpoint) []cluster.Endpoint {
	var endpoints []cluster.Endpoint
	for _, address := range slices.SortedFunc(maps.Keys(byAddress), netip.Addr.Compare) {
		endpoints = append(endpoints, byAddress[address])
	}
	return endpoints
}

// selectEndpoints finds the endpoints that a cluster would make of a Service's selector. Whether a pod is ready is not in a
// cluster.Pod: every one that is not finished counts.
func selectEndpoints(s *corev1.Service, pods []cluster.Pod) ([]cluster.Endpoint, error) {
	if len(s.Spec.Selector) == 0 {
		return nil, errNoSelector
	}
	selector := labels.SelectorFromSet(s.Spec.Selector)
	byAddress := make(map[netip.Addr]cluster.Endpoint)
	for i := range pods {
		pod := &pods[i]
		if pod.Namespace != s.Namespace || pod.Finished || !selector.Matches(pod.Labels) {
			continue
		}
		for _, address := range pod.Addresses {
			if hasFamily(s, address) {
				byAddress[address] = cluster.Endpoint{Address: address, Ports: targetPorts(s, pod), Pod: pod.Key(), Node: pod.Node, Ready: true}
			}
		}
	}
	return sortedEndpoints(byAddress), nil
}

// hasFamily is true where the Service does not say which families it has.
func hasFamily(s *corev1.Service, address netip.Addr) bool {
	family := corev1.IPv6Protocol
	if address.Is4() {
		family = corev1.IPv4Protocol
	}
	return len(s.Spec.IPFamilies) == 0 || slices.Contains(s.Spec.IPFamilies, family)
}

// targetPorts are the pod's port numbers by the names of the Service's ports.
func targetPorts(s *corev1.Service, pod *cluster.Pod) map[string]uint16 {
	ports := make(map[string]uint16)
	for _, p := range s.Spec.Ports {
		number, ok := portNumber(p.Port)
		protocol, _ := protocolOf(p.Protocol)
		switch {
		case p.TargetPort.Type == intstr.String:
			is := func(n cluster.NamedPort) bool { return n.Name == p.TargetPort.StrVal && n.Protocol == protocol }
			i := slices.IndexFunc(pod.Ports, is)
			if ok = i >= 0; ok {
				number = pod.Ports[i].Port
			}
		case p.TargetPort.IntVal != 0:
			number, ok = portNumber(p.TargetPort.IntVal)
		}
		if ok {
			ports[p.Name] = number
		}
	}
	return ports
}

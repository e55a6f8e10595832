package cluster

import "net/netip"

// Service is a Kubernetes Service with its endpoints. Policies know no Services: they judge connections after kube-proxy has
// translated the Service's address to that of an endpoint.
type Service struct {
	Namespace string
	Name      string
	// ClusterIPs are the addresses that kube-proxy translates; there are none for a headless Service.
	ClusterIPs []netip.Addr
	// Ports are in the order of the Service.
	Ports []ServicePort
	// Endpoints are sorted by address.
	Endpoints []Endpoint
}

// Key returns the service's name.
func (s *Service) Key() Key { return Key{s.Namespace, s.Name} }

// ServicePort is a port of a Service.
type ServicePort struct {
	// Name is empty only where the Service has one port.
	Name     string
	Protocol Protocol
	Port     uint16
}

// Endpoint is one address that a Service leads to.
type Endpoint struct {
	Address netip.Addr
	// Ports are the endpoint's own port numbers by the name of the Service's port. A name is missing where the endpoint does
	// not serve that port.
	Ports map[string]uint16
	// Pod is empty where the endpoint is no pod.
	Pod  Key
	Node string
	// Ready is false for an endpoint that gets no new connections, for example of a pod that is not ready or that terminates.
	Ready bool
}

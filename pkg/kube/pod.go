package kube

import (
	"net/netip"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/warren-cni/warren/pkg/cluster"
)

// annotationConfigHash marks the mirror pod of a static pod. Its value is the uid that the kubelet knows the pod by.
const annotationConfigHash = "kubernetes.io/config.hash"

func convertPod(p *corev1.Pod) (cluster.Pod, []cluster.Problem) {
	found := &findings{code: codePod, object: "Pod " + p.Namespace + "/" + p.Name, remedy: "delete the pod, so that it is made again"}
	return cluster.Pod{
		Namespace:   p.Namespace,
		Name:        p.Name,
		UID:         string(p.UID),
		StaticUID:   p.Annotations[annotationConfigHash],
		Node:        p.Spec.NodeName,
		Labels:      labelSet(p.Labels),
		Addresses:   podIPs(p.Status, found),
		HostNetwork: p.Spec.HostNetwork,
		Finished:    p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed,
		Ports:       namedPorts(p.Spec, found),
	}, found.list
}

func podIPs(status corev1.PodStatus, found *findings) []netip.Addr {
	ips := status.PodIPs
	if len(ips) == 0 && status.PodIP != "" {
		ips = []corev1.PodIP{{IP: status.PodIP}}
	}
	path := field.NewPath("status", "podIPs")
	var addrs []netip.Addr
	for i, ip := range ips {
		addr, err := parseAddr(ip.IP)
		if err != nil {
			found.add(path.Index(i).Child("ip"), "%q is not an address (%v): no rule matches it", ip.IP, err)
			continue
		}
		addrs = append(addrs, addr)
	}
	return addrs
}

// namedPorts lists the named ports of the containers and of the sidecars (init containers that keep running), as Services
// resolve them. Other init containers are over when the pod serves.
func namedPorts(spec corev1.PodSpec, found *findings) []cluster.NamedPort {
	ports := containerPorts(field.NewPath("spec", "containers"), spec.Containers, found)
	for i := range spec.InitContainers {
		if isSidecar(&spec.InitContainers[i]) {
			ports = append(ports, containerPorts(field.NewPath("spec", "initContainers"), spec.InitContainers[i:i+1], found)...)
		}
	}
	return ports
}

func isSidecar(c *corev1.Container) bool {
	return c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways
}

func containerPorts(path *field.Path, containers []corev1.Container, found *findings) []cluster.NamedPort {
	var ports []cluster.NamedPort
	for _, c := range containers {
		for i, p := range c.Ports {
			if p.Name == "" {
				continue
			}
			where := path.Key(c.Name).Child("ports").Index(i)
			protocol, ok := protocolOf(p.Protocol)
			if !ok {
				found.add(where.Child("protocol"), "%q is not a protocol: no rule matches this port by its name", p.Protocol)
				continue
			}
			number, ok := portNumber(p.ContainerPort)
			if !ok {
				found.add(where.Child("containerPort"), "%d is not a port: no rule matches it by its name", p.ContainerPort)
				continue
			}
			ports = append(ports, cluster.NamedPort{Name: p.Name, Protocol: protocol, Port: number})
		}
	}
	return ports
}

// protocolOf applies the default, which is TCP.
func protocolOf(p corev1.Protocol) (cluster.Protocol, bool) {
	switch p {
	case "", corev1.ProtocolTCP:
		return cluster.TCP, true
	case corev1.ProtocolUDP:
		return cluster.UDP, true
	case corev1.ProtocolSCTP:
		return cluster.SCTP, true
	default:
		return "", false
	}
}

// labelSet makes "no labels" one value, so that snapshots can be compared.
func labelSet(m map[string]string) labels.Set {
	if len(m) == 0 {
		return nil
	}
	return m
}

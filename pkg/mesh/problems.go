package mesh

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
)

func nodeProblem(code, node, field, message, remedy string) cluster.Problem {
	return cluster.Problem{Code: code, Object: "Node " + node, Field: field, Message: message, Remedy: remedy}
}

func podCIDRField(index int) string { return fmt.Sprintf("spec.podCIDRs[%d]", index) }

func nodeUnknown(node string) cluster.Problem {
	return nodeProblem("NodeUnknown", node, "", "the cluster has no Node of this name, so this node has no addresses for pods",
		"set --node-name to the name under which the kubelet registered this node")
}

func nodeWithoutPodCIDR(node string) cluster.Problem {
	return nodeProblem("NodeWithoutPodCIDR", node, "spec.podCIDRs", "the node has no podCIDR, so its pods get no addresses",
		"give the cluster a pod network: kubeadm init --pod-network-cidr, or kube-controller-manager --allocate-node-cidrs --cluster-cidr")
}

func nodeWithoutAddress(node string) cluster.Problem {
	return nodeProblem("NodeWithoutAddress", node, "status.addresses", "the node has no InternalIP, so its pods are not reachable from here",
		"set the kubelet's --node-ip, or see why the cloud provider gives none")
}

func nodeWithoutNextHop(node string, p netip.Prefix) cluster.Problem {
	return nodeProblem("NodeWithoutAddress", node, "status.addresses",
		fmt.Sprintf("the node has no InternalIP of the family of its podCIDR %s, which without encryption is the next hop", p),
		"give the kubelet one --node-ip of each family, or use --encryption on")
}

func nodeWithoutKey(node string) cluster.Problem {
	return nodeProblem("NodeWithoutKey", node, "metadata.annotations", "the node has published no WireGuard key, so its pods are not reachable from here",
		"see whether warrend runs on that node, and what it logs")
}

func keyTaken(node, owner string) cluster.Problem {
	return nodeProblem("NodeKeyDuplicate", node, "metadata.annotations",
		fmt.Sprintf("the node has published the WireGuard key of Node %s, so its pods are not reachable from here", owner),
		"delete wireguard.key in the state directory of a node that was copied from another, and restart warrend there; where none was copied, treat the node as stolen")
}

func addressUnusable(node string, a netip.Addr) cluster.Problem {
	return nodeProblem("NodeAddressRefused", node, "status.addresses", fmt.Sprintf("InternalIP %s is not an address that other nodes can send to", a),
		"set the kubelet's --node-ip")
}

func addressTaken(node string, a netip.Addr, owner string) cluster.Problem {
	return nodeProblem("NodeAddressRefused", node, "status.addresses", fmt.Sprintf("InternalIP %s is that of Node %s", a, owner),
		"give each node an address of its own, or delete the Node that no longer exists")
}

func addressAmongPods(node string, a netip.Addr, p netip.Prefix) cluster.Problem {
	return nodeProblem("NodeAddressRefused", node, "status.addresses", fmt.Sprintf("InternalIP %s is inside the pods' range %s", a, p),
		"choose a pod network (--cluster-cidr, podCIDRs) that holds no node")
}

func podCIDRUnusable(node string, index int, p netip.Prefix) cluster.Problem {
	return nodeProblem("PodCIDRRefused", node, podCIDRField(index),
		fmt.Sprintf("%s is no range for pods: too small, or it holds loopback, link-local or multicast addresses", p),
		"delete the Node and let it register again with a podCIDR from the cluster's controller")
}

func podCIDROutside(node string, index int, p netip.Prefix, clusterCIDRs []netip.Prefix) cluster.Problem {
	ranges := make([]string, len(clusterCIDRs))
	for i, c := range clusterCIDRs {
		ranges[i] = c.String()
	}
	return nodeProblem("PodCIDROutsideClusterCIDR", node, podCIDRField(index),
		fmt.Sprintf("%s is outside the cluster CIDR %s, so nothing is sent there", p, strings.Join(ranges, ", ")),
		"set --cluster-cidr to the ranges that kube-controller-manager allocates from")
}

func podCIDROverlaps(node string, index int, p netip.Prefix, o owned) cluster.Problem {
	return nodeProblem("PodCIDROverlap", node, podCIDRField(index),
		fmt.Sprintf("%s overlaps %s of Node %s, which is older and keeps it", p, o.prefix, o.node),
		"delete the Node that is not in use, or let it register again with a podCIDR of its own")
}

func podCIDRHoldsNode(node string, index int, p netip.Prefix, a netip.Addr, owner string) cluster.Problem {
	return nodeProblem("PodCIDRContainsNode", node, podCIDRField(index), fmt.Sprintf("%s holds %s, the address of Node %s", p, a, owner),
		"choose a pod network that holds no node")
}

func mtuTooSmall(node string, mtu int) cluster.Problem {
	return nodeProblem("MTUTooSmall", node, "", fmt.Sprintf("the MTU of pods is %d, and IPv6 needs %d", mtu, minIPv6MTU),
		"raise the uplink's MTU or --mtu")
}

package mesh

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
)

// The annotations that problems name.
const (
	fieldKey      = "metadata.annotations[warren.cni/wireguard-public-key]"
	fieldNextKey  = "metadata.annotations[warren.cni/wireguard-next-public-key]"
	fieldEndpoint = "metadata.annotations[warren.cni/endpoint]"
	fieldMTU      = "metadata.annotations[warren.cni/mtu]"
)

func nodeProblem(code, node, field, message, remedy string) cluster.Problem {
	return cluster.Problem{Code: code, Object: "Node " + node, Field: field, Message: message, Remedy: remedy}
}

// ownedProblem names the node that keeps what another one claims.
func ownedProblem(owner string, p cluster.Problem) cluster.Problem {
	p.Owner = owner
	return p
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
	return nodeProblem("NodeWithoutAddress", node, "status.addresses", "the node has no InternalIP, so the tunnel waits until the node sends first",
		"set the kubelet's --node-ip, or see why the cloud provider gives none")
}

func nodeWithoutNextHop(node string) cluster.Problem {
	return nodeProblem("NodeWithoutAddress", node, "status.addresses",
		"the node has no InternalIP, which without encryption is the next hop, so its pods are not reachable from here",
		"set the kubelet's --node-ip, or see why the cloud provider gives none")
}

func nodeWithoutNextHopOf(node string, p netip.Prefix) cluster.Problem {
	return nodeProblem("NodeWithoutAddress", node, "status.addresses",
		fmt.Sprintf("the node has no InternalIP of the family of its podCIDR %s, which without encryption is the next hop", p),
		"give the kubelet one --node-ip of each family, or use --encryption on")
}

func nodeWithoutKey(node string) cluster.Problem {
	return nodeProblem("NodeWithoutKey", node, "metadata.annotations", "the node has published no WireGuard key, so its pods are not reachable from here",
		"see whether warrend runs on that node, and what it logs")
}

func keyUnproven(node, field string) cluster.Problem {
	return nodeProblem("NodeKeyUnproven", node, field,
		"the node has not proven that it holds the private key that belongs to the WireGuard key which it has published, so the key does not count",
		"see whether warrend runs on that node, and what it logs; where it runs well, treat the node as stolen")
}

func keyTaken(node, field, owner string) cluster.Problem {
	return ownedProblem(owner, nodeProblem("NodeKeyDuplicate", node, field,
		fmt.Sprintf("the node has the WireGuard key of Node %s, so the key does not count for it", owner),
		"delete wireguard.key in the state directory of a node that was copied from another, and restart warrend there; where none was copied, treat the node as stolen"))
}

// addressProblem is about an address of a node: an InternalIP, or the endpoint that the operator gave.
func addressProblem(c *claim, message string) cluster.Problem {
	if c.isEndpoint() {
		return nodeProblem("NodeEndpointRefused", c.of.node.Name, c.field,
			fmt.Sprintf("the endpoint %s %s: the tunnel waits until this node sends first", c.prefix.Addr(), message),
			"correct the annotation; where the operator has not written it, treat the node as stolen")
	}
	return nodeProblem("NodeAddressRefused", c.of.node.Name, c.field, fmt.Sprintf("InternalIP %s %s", c.prefix.Addr(), message),
		"set the kubelet's --node-ip, and choose a pod network (--cluster-cidr, podCIDRs) that holds no node")
}

func addressUnusable(c *claim) cluster.Problem {
	return addressProblem(c, "is not an address that other nodes can send to")
}

func addressInside(c *claim, p netip.Prefix, whose string) cluster.Problem {
	return addressProblem(c, fmt.Sprintf("is inside the %s range %s", whose, p))
}

func addressInPodCIDR(c, keeper *claim) cluster.Problem {
	owner := keeper.of.node.Name
	return ownedProblem(owner, addressProblem(c, fmt.Sprintf("is inside the podCIDR %s of Node %s", keeper.prefix, owner)))
}

// placeShared is about where two nodes are by their Nodes. What the own node has is refused to the other.
func placeShared(c *claim, other string, own bool) cluster.Problem {
	const where = "is where Node %s is too: the one of the two that is not there is not reachable from here unless it sends first"
	p := nodeProblem("NodeAddressDuplicate", c.of.node.Name, c.field, fmt.Sprintf("InternalIP %s "+where, c.prefix.Addr(), other),
		"delete the Node that no longer exists, or give each node an address of its own; where neither helps, treat the node that has not this address as stolen")
	if c.isEndpoint() {
		p.Code = "NodeEndpointDuplicate"
		if own {
			p.Code = "NodeEndpointRefused"
		}
		p.Message = fmt.Sprintf("the endpoint %s "+where, netip.AddrPortFrom(c.prefix.Addr(), c.of.port()), other)
		p.Remedy = "correct annotation or InternalIP: nodes behind one address need ports of their own; where the operator has not written it, treat the node that has not this address as stolen"
	}
	return ownedProblem(other, p)
}

func podCIDRUnusable(c *claim) cluster.Problem {
	return nodeProblem("PodCIDRRefused", c.of.node.Name, c.field,
		fmt.Sprintf("%s is no range for pods: too small, or it holds loopback, link-local or multicast addresses", c.prefix),
		"delete the Node and let it register again with a podCIDR from the cluster's controller")
}

func podCIDROutside(c *claim, clusterCIDRs []netip.Prefix) cluster.Problem {
	ranges := make([]string, len(clusterCIDRs))
	for i, r := range clusterCIDRs {
		ranges[i] = r.String()
	}
	return nodeProblem("PodCIDROutsideClusterCIDR", c.of.node.Name, c.field,
		fmt.Sprintf("%s is outside the cluster CIDR %s, so nothing is sent there", c.prefix, strings.Join(ranges, ", ")),
		"set --cluster-cidr to the ranges that kube-controller-manager allocates from")
}

func podCIDROverlaps(c, keeper *claim) cluster.Problem {
	owner := keeper.of.node.Name
	return ownedProblem(owner, nodeProblem("PodCIDROverlap", c.of.node.Name, c.field,
		fmt.Sprintf("%s overlaps %s of Node %s, which is older and keeps it", c.prefix, keeper.prefix, owner),
		"delete the Node that is not in use, or let it register again with a podCIDR of its own"))
}

func podCIDRHoldsNode(c, keeper *claim) cluster.Problem {
	owner := keeper.of.node.Name
	return ownedProblem(owner, nodeProblem("PodCIDRContainsNode", c.of.node.Name, c.field,
		fmt.Sprintf("%s holds %s, the address of Node %s", c.prefix, keeper.prefix.Addr(), owner), "choose a pod network that holds no node"))
}

func mtuTooSmall(node string, mtu int) cluster.Problem {
	return nodeProblem("MTUTooSmall", node, "", fmt.Sprintf("the MTU of pods is %d, and IPv6 needs %d", mtu, minIPv6MTU),
		"raise the uplink's MTU or --mtu")
}

func wayTooSmall(node string, mtu int) cluster.Problem {
	return nodeProblem("MTUTooSmall", node, fieldMTU,
		fmt.Sprintf("the MTU of the way to this node's pods is %d, and IPv6 needs %d: larger packets are cut in pieces or lost", mtu, minIPv6MTU),
		"raise the MTU of that node's uplink")
}

// linkTooSmall says the same of all peers that a link leads to.
func linkTooSmall(self string, uplink, mtu int) cluster.Problem {
	return nodeProblem("MTUTooSmall", self, "",
		fmt.Sprintf("a link of this node that leads to others carries %d, which leaves their pods an MTU of %d, and IPv6 needs %d: larger packets are cut in pieces or lost",
			uplink, mtu, minIPv6MTU),
		"raise the MTU of that link, which `ip link` lists")
}

func uplinkMTUAbsurd(node string, mtu int) cluster.Problem {
	return nodeProblem("NodeMTURefused", node, fieldMTU,
		fmt.Sprintf("the MTU %d is none of a link that carries the tunnel (%d to %d): it is ignored", mtu, minUplinkMTU, maxMTU),
		"see what the uplink of that node is, and whether warrend runs there")
}

package policy

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// noPeer is what is wrong with a peer that pkg/kube would never hand over.
const noPeer = "a peer has neither a block nor a selector, so it allows nothing"

// target is who a rule allows, in the terms of one family: everybody, the pods of a selection, or prefixes.
type target struct {
	pods   *selection
	blocks []netip.Prefix
}

// allow returns the lines of a rule: each of its peers with each of its ports.
func (b *builder) allow(d direction, p *cluster.Policy, r cluster.Rule) []netfilter.Rule {
	field := fmt.Sprintf("spec.%s[%d]", d.name, r.Index)
	comment := fmt.Sprintf("%s/%s %s %d", p.Namespace, p.Name, d.name, r.Index)
	ports := b.ports(p, field, r)
	var lines []netfilter.Rule
	for _, t := range b.targets(p, field, r) {
		if r.AnyPort {
			lines = append(lines, words(comment, b.matchTarget(d, t), "-j RETURN"))
		}
		for _, port := range ports {
			lines = append(lines, words(comment, b.matchPort(d, t, port), "-j RETURN"))
		}
	}
	return lines
}

// targets returns whom a rule allows. All blocks of a rule are one target.
func (b *builder) targets(p *cluster.Policy, field string, r cluster.Rule) []target {
	if r.AnyPeer {
		return []target{{}}
	}
	var targets []target
	var blocks []netip.Prefix
	for _, peer := range r.Peers {
		switch {
		case peer.Block != nil && netfilter.FamilyOf(peer.Block.CIDR.Addr()) == b.family:
			blocks = append(blocks, subtract(peer.Block.CIDR, peer.Block.Except)...)
		case peer.Block != nil: // of the other family
		case peer.Pods == nil:
			b.problem(p, field, noPeer)
		default:
			targets = append(targets, target{pods: b.peers(p.Namespace, peer)})
		}
	}
	if len(blocks) > 0 {
		targets = append(targets, target{blocks: union(blocks)})
	}
	return targets
}

// ports returns the ports of a rule that can be enforced.
func (b *builder) ports(p *cluster.Policy, field string, r cluster.Rule) []cluster.Port {
	var ports []cluster.Port
	for _, port := range r.Ports {
		if fault := faultOf(port); fault != "" {
			b.problem(p, field+".ports", fault)
			continue
		}
		ports = append(ports, port)
	}
	return ports
}

// faultOf says why a port cannot be enforced; it is empty for one that can.
func faultOf(port cluster.Port) string {
	known := port.Protocol == cluster.TCP || port.Protocol == cluster.UDP || port.Protocol == cluster.SCTP
	switch {
	case !known:
		return fmt.Sprintf("the protocol %q is unknown, so the port allows nothing", port.Protocol)
	case port.Name == "" && (port.First > port.Last || port.First == 0 && port.Last > 0):
		return fmt.Sprintf("%d to %d is no range of ports, so it allows nothing", port.First, port.Last)
	default:
		return ""
	}
}

// matchTarget matches a packet to or from a target.
func (b *builder) matchTarget(d direction, t target) string {
	switch {
	case t.pods != nil:
		return matchSet(b.podSet(t.pods), d.peer)
	case len(t.blocks) > 0:
		return matchSet(b.blockSet(t.blocks), d.peer)
	default:
		return ""
	}
}

// matchPort matches a packet to or from a target with the port.
func (b *builder) matchPort(d direction, t target, port cluster.Port) string {
	protocol := "-p " + strings.ToLower(string(port.Protocol))
	switch {
	case port.Name != "" && d.name == "ingress":
		return strings.Join([]string{protocol, b.matchTarget(d, t), matchSet(b.portSet(b.here(), port), "dst,dst")}, " ")
	case port.Name != "" && t.pods != nil:
		return protocol + " " + matchSet(b.portSet(t.pods, port), "dst,dst") // its members are those of the peer
	case port.Name != "":
		return strings.Join([]string{protocol, b.matchTarget(d, t), matchSet(b.portSet(b.everywhere(), port), "dst,dst")}, " ")
	case port.First == 0:
		return protocol + " " + b.matchTarget(d, t)
	case port.First == port.Last:
		return protocol + " --dport " + strconv.Itoa(int(port.First)) + " " + b.matchTarget(d, t)
	default:
		return fmt.Sprintf("%s --dport %d:%d %s", protocol, port.First, port.Last, b.matchTarget(d, t))
	}
}

package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// allow is the target of rules that allow.
const allow = "-g " + allowedChain

// noPeer is what is wrong with a peer that pkg/kube would never hand over.
const noPeer = "a peer has neither a block nor a selector, so it allows nothing"

// builder renders the chain of one group in one family, and keeps the sets that it refers to.
type builder struct {
	*Compiler

	family netfilter.Family
	uses   []*set
}

// target is who a rule allows, in the terms of one family: everybody, the pods of a selection, or prefixes.
type target struct {
	pods   *selection
	blocks []netip.Prefix
}

// groupRules are the rules of a group: what its policies allow, and a DROP.
func (b *builder) groupRules(g *group, log cluster.LogMode) []netfilter.Rule {
	var rules []netfilter.Rule
	for _, p := range g.policies {
		for _, r := range g.direction.rules(p) {
			for _, line := range b.allow(g.direction, p, r) {
				if log >= cluster.LogAll {
					rules = append(rules, logging(line, "A:"+g.chain))
				}
				rules = append(rules, line)
			}
			if r.AnyPeer && r.AnyPort {
				return rules // nothing comes past it
			}
		}
	}
	drop := words("isolated by "+strings.Join(g.names, " "), "-j", "DROP")
	if log >= cluster.LogDenied {
		rules = append(rules, logging(drop, "D:"+g.chain))
	}
	return append(rules, drop)
}

// logging returns the rule that logs what a rule with a target without arguments is about to decide. It lets go on. The limit
// is each rule's own, so that a flood that one of them meets does not hide what others do.
func logging(r netfilter.Rule, prefix string) netfilter.Rule {
	log := words(r.Comment, "-m limit --limit 10/second --limit-burst 50 -j NFLOG --nflog-group", strconv.Itoa(netfilter.LogGroup),
		"--nflog-size 96 --nflog-prefix", prefix)
	log.Args = slices.Concat(r.Args[:len(r.Args)-2], log.Args)
	return log
}

// allow returns the lines of a rule: each of its peers with each of its ports.
func (b *builder) allow(d direction, p *cluster.Policy, r cluster.Rule) []netfilter.Rule {
	comment := fmt.Sprintf("%s %s %d", p.Key(), d.name, r.Index)
	ports := slices.DeleteFunc(slices.Clone(r.Ports), func(p cluster.Port) bool { return faultOf(p) != "" })
	if len(ports) == 0 && !r.AnyPort {
		return nil
	}
	var lines []netfilter.Rule
	for _, t := range b.targets(p, r) {
		if r.AnyPort {
			lines = append(lines, words(comment, b.matchTarget(d, t), allow))
		}
		for _, port := range ports {
			lines = append(lines, words(comment, b.matchPort(d, t, port), allow))
		}
	}
	return lines
}

// targets returns whom a rule allows. All blocks of a rule are one target.
func (b *builder) targets(p *cluster.Policy, r cluster.Rule) []target {
	if r.AnyPeer {
		return []target{{}}
	}
	var targets []target
	var blocks []netip.Prefix
	for _, peer := range r.Peers {
		switch {
		case peer.Block != nil && netfilter.FamilyOf(peer.Block.CIDR.Addr()) == b.family:
			blocks = append(blocks, subtract(peer.Block.CIDR, peer.Block.Except)...)
		case peer.Block == nil && peer.Pods != nil:
			targets = append(targets, target{pods: b.chosen(p.Namespace, peer)})
		}
	}
	if len(blocks) > 0 {
		targets = append(targets, target{blocks: union(blocks)})
	}
	return targets
}

// match matches a set by one or more sides of a packet ("src", "dst,dst"), and keeps the set.
func (b *builder) match(s *set, sides string) string {
	s.refs++
	b.uses = append(b.uses, s)
	return matchSet(s.Name, sides)
}

// matchTarget matches a packet to or from a target.
func (b *builder) matchTarget(d direction, t target) string {
	switch {
	case t.pods != nil:
		return b.match(b.podSet(b.family, t.pods), d.peer)
	case len(t.blocks) > 0:
		return b.match(b.blockSet(b.family, t.blocks), d.peer)
	default:
		return ""
	}
}

// matchPort matches a packet to or from a target with the port.
func (b *builder) matchPort(d direction, t target, port cluster.Port) string {
	protocol := "-p " + strings.ToLower(string(port.Protocol))
	numbers := func(s *selection) string { return b.match(b.portSet(b.family, s, port), "dst,dst") }
	switch {
	case port.Name != "" && d.name == "ingress":
		return strings.Join([]string{protocol, b.matchTarget(d, t), numbers(b.here())}, " ")
	case port.Name != "" && t.pods != nil:
		return protocol + " " + numbers(t.pods) // its members are those of the peer
	case port.Name != "":
		return strings.Join([]string{protocol, b.matchTarget(d, t), numbers(b.everywhere())}, " ")
	case port.First == 0:
		return protocol + " " + b.matchTarget(d, t)
	case port.First == port.Last:
		return protocol + " --dport " + strconv.Itoa(int(port.First)) + " " + b.matchTarget(d, t)
	default:
		return fmt.Sprintf("%s --dport %d:%d %s", protocol, port.First, port.Last, b.matchTarget(d, t))
	}
}

// words makes a rule; each part may be several words.
func words(comment string, parts ...string) netfilter.Rule {
	return netfilter.Rule{Args: strings.Fields(strings.Join(parts, " ")), Comment: comment}
}

// matchSet matches a set by one or more sides of a packet.
func matchSet(set, sides string) string {
	return "-m set --match-set " + set + " " + sides
}

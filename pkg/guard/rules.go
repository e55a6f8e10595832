package guard

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// plan is the input of the rules in one family.
type plan struct {
	family    netfilter.Family
	own       []netip.Prefix
	addresses []netip.Prefix
	outside   []netip.Prefix
	services  []netip.Prefix
	fence     []fence
	encrypted bool
}

// rule makes a rule of words separated by blanks.
func rule(comment, words string) netfilter.Rule {
	return netfilter.Rule{Args: strings.Fields(words), Comment: comment}
}

// matching makes a rule of a match and a target.
func matching(comment string, match []string, target string) netfilter.Rule {
	return netfilter.Rule{Args: append(match, strings.Fields(target)...), Comment: comment}
}

// raw judges packets as they come in, before conntrack: a source address must be where it can only be.
func (p plan) raw() []netfilter.Rule {
	var rules []netfilter.Rule
	if p.encrypted {
		rules = append(rules, rule("checked by the peer's allowed addresses", "-i "+link+" -j RETURN"))
	}
	rules = append(rules, rule("from pods", "-i wrn+ -g "+sourcesChain))
	if !p.encrypted {
		return rules
	}
	rules = append(rules, rule("the node to itself", "-i lo -j RETURN"))
	for _, f := range p.fence {
		rules = append(rules, matching("a pod's address comes by the tunnel only", f.match("src"), "-j DROP"))
	}
	return rules
}

// sources judges what comes from the node's own pods.
func (p plan) sources() []netfilter.Rule {
	loopback, nobody := "127.0.0.0/8", "0.0.0.0/8"
	if p.family == netfilter.IPv6 {
		loopback, nobody = "::1/128", "::/128"
	}
	return []netfilter.Rule{
		rule("a pod sends from its own address only", "-m rpfilter --invert -j DROP"),
		// rpfilter lets it pass: routing never forwards it, but the node itself takes it.
		rule("and not from none", "-s "+nobody+" -j DROP"),
		// kube-proxy and portmap may set route_localnet, and then a pod reaches servers on the node's loopback.
		rule("the node's loopback is not for pods", "-d "+loopback+" -j DROP"),
	}
}

// forward judges what is routed from or to pods. It stands in mangle, after DNAT and before SNAT, where no other
// program's ACCEPT goes round it.
func (p plan) forward() []netfilter.Rule {
	var rules []netfilter.Rule
	if p.encrypted {
		rules = append(rules,
			// IPv6 lets another host send from this node's address (IPv4 has a check of its own), and the translation for
			// the tunnel would give it the node's identity towards remote pods.
			rule("the node's own packets are not forwarded", "! -i wrn+ -o "+link+" -m addrtype --src-type LOCAL -j DROP"),
			// Ahead of ESTABLISHED, because the answer to a SYN is.
			rule("how large segments may be", "-p tcp --tcp-flags SYN,RST SYN -j "+segmentsChain))
	}
	ready := netfilter.ReadySet(p.family)
	rules = append(rules,
		rule("start gate", "-i wrn+ -m set ! --match-set "+ready+" src -j DROP"),
		rule("start gate", "-o wrn+ -m set ! --match-set "+ready+" dst -j DROP"),
		rule("allowed when it began", goesOn()+" -j RETURN"))
	if p.encrypted {
		rules = append(rules, ends())
	}
	return append(rules,
		rule("not a pod's traffic", "! -i wrn+ ! -o wrn+ -j RETURN"),
		// Both ways, and the errors of ICMP that belong to it: they carry the mark of the connection that they are about.
		cut(),
		// They would not be translated, and leave with the pod's address.
		rule("no connection to judge by", "-i wrn+ -m conntrack --ctstate INVALID,UNTRACKED -j DROP"),
		rule("new connections", "-j "+netfilter.PolicyChain))
}

// segments keeps what the ends of a TCP connection offer each other within what fits the tunnel.
func segments() []netfilter.Rule {
	const clamp = " -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu"
	return []netfilter.Rule{
		rule("segments that fit the tunnel", "-o "+link+clamp),
		rule("segments that fit the tunnel", "-i "+link+clamp),
	}
}

// goesOn matches what belongs to a connection that is established and not cut, as most packets do. It stands first in a chain that asks no
// more of them: each rule that a packet passes costs time, and pushes out of the processor's caches what the tunnel has there.
func goesOn() string {
	return fmt.Sprintf("-m conntrack --ctstate ESTABLISHED,RELATED -m connmark ! --mark %#x/%#x", netfilter.CutMark, netfilter.CutMark)
}

// cut stops the connections that policies no longer allow.
func cut() netfilter.Rule {
	return rule("not allowed any more", fmt.Sprintf("-m connmark --mark %#x/%#x -j DROP", netfilter.CutMark, netfilter.CutMark))
}

// ends drops what comes by the tunnel and goes on to anything but a pod, because WireGuard checks a packet's source alone: a stolen node
// would have this one for its router, with this one's address. It stands behind goesOn, which lets pass the answers of a Service's remote
// pod. What a Service has translated goes on, too: with --encrypt-node-traffic pods reach NodePorts through the tunnel.
func ends() netfilter.Rule {
	return rule("not routed for other nodes", "-i "+link+" ! -o wrn+ -m conntrack ! --ctstate DNAT -j DROP")
}

// guard is the last look at a packet: forwarded, made by the node or translated, what is for a pod leaves by the tunnel
// or by the pod's link, or not at all. It judges by destination, because after SNAT no hook sees a pod's source. And it
// holds back what forward should have judged and did not see, because another program took its jump away or accepts
// ahead of it: connections that were cut, and new ones. Those that are established go on meanwhile.
func (p plan) guard() []netfilter.Rule {
	var rules []netfilter.Rule
	if p.encrypted {
		rules = append(rules, rule("encrypted", "-o "+link+" "+goesOn()+" -j RETURN"))
	}
	rules = append(rules, rule("to a pod of this node", "-o wrn+ "+goesOn()+" -j RETURN"))
	if len(p.fence) == 1 && p.fence[0].prefix.Bits() > 0 { // one rule cannot name more, and iptables-nft not the opposite of everything
		// By UDP alone, as the tunnel: an error of ICMP may be about a connection that was cut.
		rules = append(rules, rule("no pod's, as what the tunnel sends", "! -i wrn+ ! -o wrn+ -p udp ! -d "+p.fence[0].prefix.String()+" -j RETURN"))
	}
	rules = append(rules, cut(), rule("new connections", "-m conntrack ! --ctstate ESTABLISHED,RELATED -j "+judgedChain))
	if p.encrypted {
		rules = append(rules, rule("encrypted", "-o "+link+" -j RETURN"))
	}
	rules = append(rules,
		rule("to a pod of this node", "-o wrn+ -j RETURN"),
		rule("to the node itself", "-o lo -j RETURN"))
	fences := p.fence
	if !p.encrypted {
		fences = literal(p.own) // remote pods are behind the uplink then, addresses that no local pod has are not
	}
	for _, f := range fences {
		rules = append(rules, matching("never in clear", f.match("dst"), "-j DROP"))
	}
	return append(rules, p.count()...)
}

// count counts what a pod sends that no tunnel carries, and without encryption what the node itself and others send to a remote pod, which
// the tunnel would carry. What is meant to leave with the pod's own address, and what is translated, no rule
// here decides about. Anything else would show the pod's address on the wire: a connection that the tunnel carried until its way there
// went, to a node that pods reach through it, or one that began while another program had taken our translation away. Conntrack
// translates no connection but with its first packet. And what is for a Service, and kube-proxy has not translated it (it starts, or its
// rules were flushed), would leave by the default route, whoever the pod behind it is.
func (p plan) count() []netfilter.Rule {
	var rules []netfilter.Rule
	if !p.encrypted {
		for _, f := range p.fence {
			rules = append(rules, matching("in clear: to a pod of another node", f.match("dst"), "-j RETURN"))
		}
		return append(rules, p.countTo("")...)
	}
	for _, prefix := range p.services {
		rules = append(rules, rule("a Service's, not translated", "-i wrn+ -d "+prefix.String()+" -j DROP"))
	}
	for _, prefix := range p.outside {
		rules = append(rules, p.countTo(" -d "+prefix.String())...)
	}
	rules = append(rules, rule("not translated", "-i wrn+ -m conntrack --ctdir ORIGINAL --ctstatus CONFIRMED ! --ctstate SNAT -j DROP"))
	return append(rules, p.countTo("")...)
}

// countTo counts what goes to some destinations.
func (p plan) countTo(match string) []netfilter.Rule {
	return []netfilter.Rule{
		rule("in clear: to a node", "-i wrn+"+match+" -m set --match-set "+nodeSetName(p.family)+" dst -j RETURN"),
		rule("in clear: out of the cluster", "-i wrn+"+match+" -j RETURN"),
	}
}

// judged drops what begins a connection from or to a pod and was not judged. What is the node's own never is: it comes
// through no FORWARD, and has one of the node's addresses, also where it carries a pod's packet (IPsec). A connection whose
// first packet is dropped here is none to conntrack, so that nothing is established past the policies.
func judged() []netfilter.Rule {
	foreign := unjudged() + " -m addrtype ! --src-type LOCAL -j DROP"
	return []netfilter.Rule{
		rule("not judged", "-i wrn+"+foreign), // here -i is there for what is forwarded, since Linux 5.7
		rule("not judged", "-o wrn+"+foreign),
		rule("nobody else sees the mark", fmt.Sprintf("-j MARK --set-xmark 0x0/%#x", netfilter.JudgedMark)),
	}
}

// unjudged matches what lacks netfilter.JudgedMark.
func unjudged() string {
	return fmt.Sprintf(" -m mark ! --mark %#x/%#x", netfilter.JudgedMark, netfilter.JudgedMark)
}

// belt holds back the same in another table, because a flush of mangle takes all rules there that judge, and those that drop what
// was not judged. It stands first, ahead of what other programs accept, and accepts nothing itself.
func (p plan) belt() []netfilter.Rule {
	begins := unjudged() + " -j DROP"
	rules := []netfilter.Rule{
		rule("goes on", goesOn()+" -j RETURN"), cut(),
		rule("not judged", "-i wrn+"+begins), rule("not judged", "-o wrn+"+begins),
	}
	if p.encrypted {
		rules = append(rules, ends())
	}
	return rules
}

// nat gives packets that leave the pods' world the node's address, and the node's packets to remote pods an address that
// the tunnel carries. It never accepts, so that kube-proxy's masquerade by mark still sees what is returned.
func (p plan) nat() []netfilter.Rule {
	rules := []netfilter.Rule{rule("to a pod of this node", "-o wrn+ -j RETURN")}
	if p.encrypted {
		for _, own := range p.own {
			rules = append(rules, rule("between pods", "-o "+link+" -s "+own.String()+" -j RETURN"))
		}
		for _, own := range p.addresses {
			// SNAT, because entries of MASQUERADE are flushed when the link goes down. Only the node's own packets and
			// those of a Service: another host that routes through this node must not look like the node.
			source := " -j SNAT --to-source " + own.Addr().String()
			rules = append(rules,
				rule("the node to a remote pod", "-o "+link+" -m addrtype --src-type LOCAL"+source),
				rule("a Service's remote pod", "-o "+link+" -m conntrack --ctstate DNAT"+source))
		}
	}
	for _, f := range p.fence {
		rules = append(rules, matching("between pods", f.match("dst"), "-j RETURN"))
	}
	for _, prefix := range p.outside {
		rules = append(rules, rule("keeps the pod's address", "-d "+prefix.String()+" -j RETURN"))
	}
	// By all pods' addresses: a pod keeps its own when the node's podCIDR changes or its Node goes away.
	for _, f := range p.fence {
		rules = append(rules, matching("out of the cluster", f.match("src"), "-j MASQUERADE --random-fully"))
	}
	return rules
}

// accept lets what mangle has judged pass on nodes whose FORWARD policy is DROP. Appended, it comes after kube-proxy's
// own rejects.
func (p plan) accept() []netfilter.Rule {
	rules := []netfilter.Rule{
		rule("judged in mangle", "-i wrn+ -j ACCEPT"),
		rule("judged in mangle", "-o wrn+ -j ACCEPT"),
	}
	if p.encrypted {
		rules = append(rules,
			rule("a Service's remote pod", "-o "+link+" -m conntrack --ctstate DNAT -j ACCEPT"),
			rule("a Service's remote pod", "-i "+link+" -m conntrack --ctstate DNAT -j ACCEPT"))
	}
	return rules
}

package guard_test

import (
	"net/netip"
	"testing"

	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/internal/trace"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// step is a packet at one hook, and what must become of it.
type step struct {
	name   string
	table  string
	hook   string
	packet trace.Packet
	want   string
}

func from(in, src string) trace.Packet {
	return trace.Packet{In: in, Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr("10.244.1.7"), Protocol: "tcp", Flags: "S", State: "NEW"}
}

func route(in, out, src, dst string) trace.Packet {
	return trace.Packet{
		In: in, Out: out, Src: netip.MustParseAddr(src), Dst: netip.MustParseAddr(dst), Protocol: "udp", DstPort: 53, State: "NEW",
	}
}

func with(p trace.Packet, change func(*trace.Packet)) trace.Packet {
	change(&p)
	return p
}

func state(s string) func(*trace.Packet) { return func(p *trace.Packet) { p.State = s } }

// cut marks a packet's connection as not allowed any more; others is a mark with every bit but that.
func cut(p *trace.Packet) { p.ConnMark = netfilter.CutMark }

func others(p *trace.Packet) { p.ConnMark = ^uint32(netfilter.CutMark) }

func icmp(p *trace.Packet) { p.Protocol = "icmp" }

// translated gives a packet's connection another source, and reply turns its direction round.
func translated(p *trace.Packet) { p.SNAT = true }

func reply(p *trace.Packet) { p.Reply = true }

// dnat gives a packet's connection another destination.
func dnat(p *trace.Packet) { p.DNAT = true }

// fromNode gives a packet one of the node's addresses as its source.
func fromNode(p *trace.Packet) { p.FromNode = true }

func run(t *testing.T, config guard.Config, steps []step) {
	t.Helper()
	filters := load(t, guard.Compile(config))
	for _, s := range steps {
		verdict, err := filters[netfilter.FamilyOf(s.packet.Src)].Walk(s.table, s.hook, s.packet)
		if err != nil {
			t.Fatal(err)
		}
		if verdict.Target != s.want {
			t.Errorf("%s: %q, want %q; by %q", s.name, verdict.Target, s.want, verdict.Trail)
		}
	}
}

func TestInbound(t *testing.T) {
	hook := func(name string, p trace.Packet, want string) step { return step{name, "raw", "PREROUTING", p, want} }
	toLoopback := func(p *trace.Packet) { p.Dst = netip.MustParseAddr("127.0.0.1") }
	steps := []step{
		hook("pod from its own address", from("wrn1", "10.244.1.7"), ""),
		hook("pod from its own address of an earlier podCIDR", from("wrn1", "10.9.9.9"), ""),
		hook("pod from a foreign address", with(from("wrn1", "10.244.1.8"), func(p *trace.Packet) { p.Spoofed = true }), "DROP"),
		hook("pod from no address", from("wrn1", "0.0.0.0"), "DROP"),
		hook("pod from no address, IPv6", from("wrn1", "::"), "DROP"),
		hook("pod to the node's loopback", with(from("wrn1", "10.244.1.7"), toLoopback), "DROP"),
		hook("remote pod by the tunnel", from("warren0", "10.244.2.9"), ""),
		hook("another node's own answer by the tunnel", from("warren0", "192.168.0.2"), ""),
		hook("the node to itself", from("lo", "10.244.1.1"), ""),
		hook("another host", from("eth0", "192.0.2.1"), ""),
		hook("another host, IPv6", from("eth0", "2001:db8::1"), ""),
	}
	run(t, dual(), append(steps,
		hook("another host as a remote pod", from("eth0", "10.244.2.9"), "DROP"),
		hook("another host as a pod of a node not known yet", from("eth0", "10.244.77.9"), "DROP"),
		hook("another host as a local pod", from("eth0", "10.244.1.7"), "DROP"),
		hook("another host as the node", from("eth0", "10.244.1.1"), "DROP"),
		hook("another host as a remote pod, IPv6", from("eth0", "fd00:10:244:2::9"), "DROP"),
	))
	run(t, changed(func(c *guard.Config) { c.ClusterCIDRs = nil }), append(steps,
		hook("another host as a pod of a known node", from("eth0", "10.244.2.9"), "DROP"),
		hook("another host as a local pod", from("eth0", "10.244.1.7"), "DROP"),
	))
	run(t, changed(func(c *guard.Config) { c.Encrypted = false }), append(steps,
		hook("remote pod by the uplink", from("eth0", "10.244.2.9"), ""),
	))
}

func TestForward(t *testing.T) {
	hook := func(name string, p trace.Packet, want string) step { return step{name, "mangle", "FORWARD", p, want} }
	peer := func(out, dst string) trace.Packet { return route("warren0", out, "10.244.2.9", dst) }
	run(t, dual(), []step{
		hook("ready pod to a remote pod", route("wrn1", "warren0", "10.244.1.7", "10.244.2.9"), ""),
		hook("ready pod to the world", route("wrn1", "eth0", "10.244.1.7", "192.0.2.1"), ""),
		hook("remote pod to a ready pod", route("warren0", "wrn1", "10.244.2.9", "10.244.1.7"), ""),
		hook("between ready pods", route("wrn1", "wrn2", "10.244.1.7", "10.244.1.3"), ""),
		hook("pod that is not ready", route("wrn3", "eth0", "10.244.1.8", "192.0.2.1"), "DROP"),
		hook("to a pod that is not ready", route("warren0", "wrn3", "10.244.2.9", "10.244.1.8"), "DROP"),
		hook("ready pod to one that is not", route("wrn1", "wrn3", "10.244.1.7", "10.244.1.8"), "DROP"),
		hook("established, but not ready", with(route("wrn3", "eth0", "10.244.1.8", "192.0.2.1"), state("ESTABLISHED")), "DROP"),
		hook("invalid from a pod", with(route("wrn1", "eth0", "10.244.1.7", "192.0.2.1"), state("INVALID")), "DROP"),
		hook("untracked from a pod", with(route("wrn1", "eth0", "10.244.1.7", "192.0.2.1"), state("UNTRACKED")), "DROP"),
		hook("established", with(route("wrn1", "eth0", "10.244.1.7", "192.0.2.1"), state("ESTABLISHED")), ""),
		hook("established, but cut", with(with(route("wrn1", "eth0", "10.244.1.7", "192.0.2.1"), state("ESTABLISHED")), cut), "DROP"),
		hook("its other direction", with(with(route("eth0", "wrn1", "192.0.2.1", "10.244.1.7"), state("ESTABLISHED")), cut), "DROP"),
		hook("an error about it", with(with(route("eth0", "wrn1", "192.0.2.1", "10.244.1.7"), state("RELATED")), cut), "DROP"),
		hook("another program's mark", with(with(route("wrn1", "eth0", "10.244.1.7", "192.0.2.1"), state("ESTABLISHED")), others), ""),
		hook("another program's", with(route("docker0", "eth0", "172.17.0.2", "192.0.2.1"), state("INVALID")), ""),
		hook("another host that routes through the node", route("eth0", "warren0", "2001:db8::1", "fd00:10:244:2::9"), ""),
		hook("another host with the node's address", with(route("eth0", "warren0", "2001:db8::1", "fd00:10:244:2::9"), fromNode), "DROP"),
		hook("remote pod to a host on the wire", peer("eth0", "192.0.2.1"), "DROP"),
		hook("remote pod to a host on the wire, IPv6", route("warren0", "eth0", "fd00:10:244:2::9", "2001:db8::1"), "DROP"),
		hook("invalid", with(peer("eth0", "192.0.2.1"), state("INVALID")), "DROP"),
		hook("untracked", with(peer("eth0", "192.0.2.1"), state("UNTRACKED")), "DROP"),
		hook("back into the tunnel", peer("warren0", "10.244.3.9"), "DROP"),
		hook("remote pod to another program's link", peer("docker0", "172.17.0.2"), "DROP"),
		hook("remote pod's answer to a Service's client", with(peer("eth0", "192.0.2.1"), state("ESTABLISHED")), ""),
		hook("an error about that", with(peer("eth0", "192.0.2.1"), state("RELATED")), ""),
		hook("remote pod to a NodePort of this node", with(peer("warren0", "10.244.3.9"), dnat), ""),
		hook("remote pod to a NodePort of this node, beside the pods", with(peer("eth0", "192.0.2.1"), dnat), ""),
		hook("IPv6 of a ready pod", route("wrn1", "warren0", "fd00:10:244:1::7", "fd00:10:244:2::9"), ""),
		hook("IPv6 of a pod that is not ready", route("wrn1", "warren0", "fd00:10:244:1::3", "fd00:10:244:2::9"), "DROP"),
	})
	run(t, guard.Config{PodCIDRs: prefixes("10.244.1.0/24"), Encrypted: true, Ready: addresses("10.244.1.7")}, []step{
		hook("IPv6 on a node without it", route("wrn1", "eth0", "fd00::7", "2001:db8::1"), "DROP"),
	})
}

func TestPlaintextGuard(t *testing.T) {
	hook := func(name string, p trace.Packet, want string) step {
		return step{name, "mangle", "POSTROUTING", p, want}
	}
	steps := []step{
		hook("the node to a local pod", with(route("", "wrn1", "10.244.1.1", "10.244.1.7"), fromNode), ""),
		hook("to the node itself", route("", "lo", "10.244.1.1", "10.244.1.1"), ""),
		hook("to the world", route("", "eth0", "10.244.1.7", "192.0.2.1"), ""),
		hook("to a node", route("", "eth0", "192.168.0.1", "192.168.0.2"), ""),
		hook("to an address of the own podCIDR that no pod has", route("", "eth0", "192.168.0.1", "10.244.1.99"), "DROP"),
	}
	begun := with(route("wrn1", "eth0", "10.244.1.7", "192.168.0.2"), state("ESTABLISHED"))
	direct := with(route("wrn1", "eth0", "10.244.1.7", "10.64.0.9"), state("ESTABLISHED"))
	run(t, dual(), append(steps,
		hook("to a node, begun in the tunnel", begun, "DROP"),
		hook("to a node, begun translated", with(begun, translated), ""),
		hook("an answer to a node", with(begun, reply), ""),
		hook("begun as it is meant to leave", direct, ""),
		hook("to a Service that nothing has translated", with(route("wrn1", "eth0", "10.244.1.7", "10.96.0.10"), state("ESTABLISHED")), "DROP"),
		hook("to a Service that nothing has translated, IPv6", with(route("wrn1", "eth0", "fd00:10:244:1::7", "fd00:10:96::a"), state("ESTABLISHED")), "DROP"),
		hook("the node's own to a Service", route("", "eth0", "192.168.0.1", "10.96.0.10"), ""),
		hook("encrypted", route("", "warren0", "10.244.1.7", "10.244.2.9"), ""),
		hook("to a node, encrypted", route("", "warren0", "10.244.1.7", "192.168.0.2"), ""),
		hook("without a tunnel", route("", "eth0", "10.244.1.7", "10.244.2.9"), "DROP"),
		hook("without a tunnel, translated", route("", "eth0", "192.168.0.1", "10.244.2.9"), "DROP"),
		hook("to a node not known yet", route("", "eth0", "10.244.1.7", "10.244.77.9"), "DROP"),
		hook("without a tunnel, IPv6", route("", "eth0", "fd00:10:244:1::7", "fd00:10:244:2::9"), "DROP"),
	))
	run(t, changed(func(c *guard.Config) { c.ClusterCIDRs = nil }), append(steps,
		hook("to a known node without a tunnel", route("", "eth0", "10.244.1.7", "10.244.2.9"), "DROP"),
	))
	run(t, changed(func(c *guard.Config) { c.Encrypted = false }), append(steps,
		hook("to a remote pod by the uplink", route("", "eth0", "10.244.1.7", "10.244.2.9"), ""),
		hook("to a node, begun in the tunnel", begun, ""),
		hook("to a Service that nothing has translated", with(route("wrn1", "eth0", "10.244.1.7", "10.96.0.10"), state("ESTABLISHED")), ""),
	))
}

func TestTranslation(t *testing.T) {
	hook := func(name string, p trace.Packet, want string) step { return step{name, "nat", "POSTROUTING", p, want} }
	steps := []step{
		hook("to a local pod", route("", "wrn1", "192.0.2.1", "10.244.1.7"), ""),
		hook("pod to the world", route("", "eth0", "10.244.1.7", "192.0.2.1"), "MASQUERADE"),
		hook("pod to another node", route("", "eth0", "10.244.1.7", "192.168.0.2"), "MASQUERADE"),
		hook("pod to where its address is known", route("", "eth0", "10.244.1.7", "10.64.0.9"), ""),
		hook("the node to the world", with(route("", "eth0", "192.168.0.1", "192.0.2.1"), fromNode), ""),
		hook("pod to the world, IPv6", route("", "eth0", "fd00:10:244:1::7", "2001:db8::1"), "MASQUERADE"),
	}
	run(t, dual(), append(steps,
		hook("pod to a remote pod", route("", "warren0", "10.244.1.7", "10.244.2.9"), ""),
		hook("pod to a node by the tunnel", route("", "warren0", "10.244.1.7", "192.168.0.2"), ""),
		hook("pod to a remote pod of a Service", with(route("", "warren0", "10.244.1.7", "10.244.2.9"), dnat), ""),
		hook("the node to a remote pod", with(route("", "warren0", "10.244.1.1", "10.244.2.9"), fromNode), ""),
		hook("the node's other address to a remote pod", with(route("", "warren0", "192.168.0.1", "10.244.2.9"), fromNode), "SNAT 10.244.1.1"),
		hook("a client of a Service", with(route("", "warren0", "192.0.2.1", "10.244.2.9"), dnat), "SNAT 10.244.1.1"),
		hook("another host that routes through the node", route("", "warren0", "192.0.2.1", "10.244.2.9"), ""),
		hook("a client of a Service, IPv6", with(route("", "warren0", "2001:db8::1", "fd00:10:244:2::9"), dnat), "SNAT fd00:10:244:1::1"),
	))
	run(t, changed(func(c *guard.Config) { c.Encrypted = false }), append(steps,
		hook("pod to a remote pod by the uplink", route("", "eth0", "10.244.1.7", "10.244.2.9"), ""),
	))
}

func TestAccept(t *testing.T) {
	hook := func(name string, p trace.Packet, want string) step { return step{name, "filter", "FORWARD", p, want} }
	judged := func(p *trace.Packet) { p.Mark = netfilter.JudgedMark }
	fromPod, toPod := route("wrn1", "eth0", "10.244.1.7", "192.0.2.1"), route("eth0", "wrn1", "192.0.2.1", "10.244.1.7")
	run(t, dual(), []step{
		hook("from a pod", with(fromPod, judged), "ACCEPT"),
		hook("to a pod", with(toPod, judged), "ACCEPT"),
		hook("from a pod, established", with(fromPod, state("ESTABLISHED")), "ACCEPT"),
		hook("to a pod, established", with(toPod, state("ESTABLISHED")), "ACCEPT"),
		hook("to a pod, established, but cut", with(with(toPod, state("ESTABLISHED")), cut), "DROP"),
		hook("from a pod, not judged", fromPod, "DROP"),
		hook("to a pod, not judged", toPod, "DROP"),
		hook("no connection to judge by", with(fromPod, state("INVALID")), "DROP"),
		hook("a client of a Service", with(route("eth0", "warren0", "192.0.2.1", "10.244.2.9"), dnat), "ACCEPT"),
		hook("its answer", with(route("warren0", "eth0", "10.244.2.9", "192.0.2.1"), dnat), "ACCEPT"),
		hook("another host that routes through the node", route("eth0", "warren0", "192.0.2.1", "10.244.2.9"), ""),
		hook("another node that routes through the node", route("warren0", "eth0", "10.244.2.9", "192.0.2.1"), "DROP"),
		hook("another program's", route("docker0", "eth0", "172.17.0.2", "192.0.2.1"), ""),
	})
}

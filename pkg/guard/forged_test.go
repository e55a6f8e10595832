package guard_test

import (
	"testing"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// A host on the LAN that sends from the node's address is not the node to remote pods, also where FORWARD accepts.
func TestForgedNodeAddress(t *testing.T) {
	n := newNetwork(t)
	n.load(dual())
	for _, f := range netfilter.Families {
		t.Log(f)
		tool := map[netfilter.Family]string{netfilter.IPv4: "iptables", netfilter.IPv6: "ip6tables"}[f]
		n.run(n.node, "", tool, "-P", "FORWARD", "ACCEPT")
		length := map[netfilter.Family]string{netfilter.IPv4: "/32", netfilter.IPv6: "/128"}[f]
		n.expect("another host, from its own address", n.probe(n.lan, lanHost[f], remotePod[f], port, n.remote), lanHost[f])
		n.ip(n.lan, "addr add "+nodeUplink[f]+length+" dev p"+nodad(f))
		n.expect("another host, from the node's address", n.probe(n.lan, nodeUplink[f], remotePod[f], port, n.remote), "")
	}
}

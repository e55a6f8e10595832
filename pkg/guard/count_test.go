package guard_test

import (
	"slices"
	"testing"

	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/internal/trace"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// What a pod sends that no tunnel carries counts once, as what it is, and so does without encryption what others send to a remote pod; what is
// encrypted, stays on the node, is dropped or is neither from nor to a pod does not count.
func TestInClear(t *testing.T) {
	const toPod, toNode, outside = "in clear: to a pod of another node", "in clear: to a node", "in clear: out of the cluster"
	on, off := dual(), changed(func(c *guard.Config) { c.Encrypted = false })
	for _, c := range []struct {
		name   string
		config guard.Config
		packet trace.Packet
		want   string
	}{
		{"to another node", on, route("wrn1", "eth0", "10.244.1.7", "192.168.0.2"), toNode},
		{"to another node, IPv6", on, route("wrn1", "eth0", "fd00:10:244:1::7", "fc00::2"), toNode},
		{"to the world", on, route("wrn1", "eth0", "10.244.1.7", "192.0.2.1"), outside},
		{"to the world, IPv6", on, route("wrn1", "eth0", "fd00:10:244:1::7", "2001:db8::1"), outside},
		{"to another node by the tunnel", on, route("wrn1", "warren0", "10.244.1.7", "192.168.0.2"), ""},
		{"to a remote pod", on, route("wrn1", "warren0", "10.244.1.7", "10.244.2.9"), ""},
		{"to a remote pod without a tunnel", on, route("wrn1", "eth0", "10.244.1.7", "10.244.2.9"), ""},
		{"to a local pod", on, route("wrn1", "wrn2", "10.244.1.7", "10.244.1.3"), ""},
		{"the node's own", on, route("", "eth0", "192.168.0.1", "192.168.0.2"), ""},
		{"to a remote pod, encryption off", off, route("wrn1", "eth0", "10.244.1.7", "10.244.2.9"), toPod},
		{"the node's own to a remote pod, encryption off", off, route("", "eth0", "192.168.0.1", "10.244.2.9"), toPod},
		{"the node's own to a remote pod, encryption off, IPv6", off, route("", "eth0", "fc00::1", "fd00:10:244:2::9"), toPod},
		{"a NodePort's remote pod, encryption off", off, route("eth0", "eth0", "192.0.2.7", "10.244.2.9"), toPod},
		{"the node's own to another node, encryption off", off, route("", "eth0", "192.168.0.1", "192.168.0.2"), ""},
		{"to another node, encryption off", off, route("wrn1", "eth0", "10.244.1.7", "192.168.0.2"), toNode},
	} {
		filter := load(t, guard.Compile(c.config))[netfilter.FamilyOf(c.packet.Src)]
		verdict, err := filter.Walk("mangle", "POSTROUTING", with(with(c.packet, state("ESTABLISHED")), translated))
		if err != nil {
			t.Fatal(err)
		}
		for _, counter := range []string{toPod, toNode, outside} {
			if counted := slices.Contains(verdict.Trail, counter); counted != (counter == c.want) {
				t.Errorf("%s: %q is %v; by %q", c.name, counter, counted, verdict.Trail)
			}
		}
	}
}

// A node that is not known any more takes its podCIDR out of no rule: the set keeps it.
func TestForgottenNodesAreFenced(t *testing.T) {
	without := func(known ...string) netfilter.Ruleset {
		return guard.Compile(changed(func(c *guard.Config) { c.ClusterCIDRs, c.KnownPodCIDRs = nil, prefixes(known...) }))
	}
	two, one, none := without("10.244.1.0/24", "10.244.2.0/24"), without("10.244.1.0/24"), without()
	for _, gone := range []netfilter.Ruleset{one, none} {
		if change := netfilter.Diff(two, gone); !change.Empty() {
			t.Errorf("a node that goes changes %+v", change)
		}
	}
	added := netfilter.Diff(one, two)
	if len(added.V4.Sets) != 1 || len(added.V4.Sets[0].Add) != 1 || len(added.V4.Write) > 0 {
		t.Errorf("a node that comes changes %+v", added)
	}
}

// The address of zeros, which no set of the kernel's takes, is no node's.
func TestNoAddressOfZeros(t *testing.T) {
	hostile := guard.Compile(changed(func(c *guard.Config) { c.NodeAddresses = append(c.NodeAddresses, addresses("0.0.0.0", "::")...) }))
	if change := netfilter.Diff(guard.Compile(dual()), hostile); !change.Empty() {
		t.Errorf("it changes %+v", change)
	}
}

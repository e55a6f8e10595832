package mesh_test

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/mesh"
)

var byValue = cmp.Options{cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}, netip.Prefix{}), cmpopts.EquateEmpty()}

// node returns a dual-stack node whose age, addresses and key follow from its number.
func node(number byte, change ...func(*cluster.Node)) cluster.Node {
	name := "node-" + string('0'+rune(number))
	n := cluster.Node{
		Name:      name,
		UID:       uidOf(name),
		Created:   time.Unix(int64(number), 0),
		PodCIDRs:  []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, number, 0}), 24), prefix6(number)},
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, number}), address6(number)},
		WireGuard: &cluster.WireGuard{NodeKey: keyOf(int(number), name), Port: 51820},
	}
	for _, f := range change {
		f(&n)
	}
	return n
}

func address6(number byte) netip.Addr {
	return netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: number})
}

func prefix6(number byte) netip.Prefix {
	return netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0, 0, 0, 0, 0, 0, number}), 64)
}

func podCIDRs(text ...string) func(*cluster.Node) {
	return func(n *cluster.Node) { n.PodCIDRs = prefixes(text...) }
}

func addresses(text ...string) func(*cluster.Node) {
	return func(n *cluster.Node) {
		n.Addresses = nil
		for _, t := range text {
			n.Addresses = append(n.Addresses, netip.MustParseAddr(t))
		}
	}
}

func prefixes(text ...string) []netip.Prefix {
	var list []netip.Prefix
	for _, t := range text {
		list = append(list, netip.MustParsePrefix(t))
	}
	return list
}

func snapshot(nodes ...cluster.Node) cluster.Snapshot {
	return cluster.Snapshot{Self: "node-1", Nodes: nodes}
}

func options(change ...func(*mesh.Options)) mesh.Options {
	o := mesh.Options{
		ClusterCIDRs: prefixes("10.244.0.0/16", "fd00::/48"),
		ListenPort:   51820,
		Uplink:       mesh.Uplink{MTU: 1500},
		Encrypted:    true,
		ServiceCIDRs: prefixes("10.96.0.0/12"),
	}
	for _, f := range change {
		f(&o)
	}
	return o
}

// less has a route that carries less lead to an address, or, without one, to those who come from anywhere.
func less(address string, mtu int) func(*mesh.Options) {
	to, _ := netip.ParseAddr(address)
	return func(o *mesh.Options) { o.Uplink.Less = map[netip.Addr]int{to: mtu} }
}

func noClusterCIDR(o *mesh.Options) { o.ClusterCIDRs = nil }

func TestPlanDualStack(t *testing.T) {
	got, problems := mesh.Plan(snapshot(node(1), node(2)), options())
	if len(problems) > 0 {
		t.Errorf("problems: %v", problems)
	}
	want := mesh.Config{
		Encrypted:  true,
		ListenPort: 51820,
		PodCIDRs:   prefixes("10.244.1.0/24", "fd00:0:0:1::/64"),
		KnownPodCIDRs: prefixes("10.244.1.0/24", "10.244.2.0/24",
			"fd00:0:0:1::/64", "fd00:0:0:2::/64"),
		MTU:       1440,
		Addresses: prefixes("10.244.1.1/32", "fd00:0:0:1::1/128"),
		Peers: []mesh.Peer{{
			Node:       "node-2",
			PublicKey:  keyOf(2, "node-2").PublicKey,
			Endpoint:   netip.MustParseAddrPort("192.0.2.2:51820"),
			AllowedIPs: prefixes("10.244.2.0/24", "fd00:0:0:2::/64"),
		}},
		Routes: []mesh.Route{
			{Destination: netip.MustParsePrefix("10.244.2.0/24"), Source: netip.MustParseAddr("10.244.1.1")},
			{Destination: netip.MustParsePrefix("fd00:0:0:2::/64"), Source: netip.MustParseAddr("fd00:0:0:1::1")},
		},
		Unreachable: prefixes("10.244.0.0/16", "fd00::/48"),
	}
	if diff := cmp.Diff(want, got, byValue); diff != "" {
		t.Errorf("config (-want +got):\n%s", diff)
	}
}

func TestPlanWithoutEncryption(t *testing.T) {
	nodes := snapshot(node(1), node(2, func(n *cluster.Node) { n.WireGuard = nil }), node(3, addresses("192.0.2.3")))
	got, problems := mesh.Plan(nodes, options(func(o *mesh.Options) { o.Encrypted = false }))
	want := mesh.Config{
		PodCIDRs: prefixes("10.244.1.0/24", "fd00:0:0:1::/64"),
		KnownPodCIDRs: prefixes("10.244.1.0/24", "10.244.2.0/24", "10.244.3.0/24",
			"fd00:0:0:1::/64", "fd00:0:0:2::/64", "fd00:0:0:3::/64"),
		MTU: 1500,
		Routes: []mesh.Route{
			{Destination: netip.MustParsePrefix("10.244.2.0/24"), Via: netip.MustParseAddr("192.0.2.2")},
			{Destination: netip.MustParsePrefix("10.244.3.0/24"), Via: netip.MustParseAddr("192.0.2.3")},
			{Destination: netip.MustParsePrefix("fd00:0:0:2::/64"), Via: address6(2)},
		},
	}
	if diff := cmp.Diff(want, got, byValue); diff != "" {
		t.Errorf("config (-want +got):\n%s", diff)
	}
	wantProblems(t, problems, "NodeWithoutAddress Node node-3 fd00:0:0:3::/64")
}

// refusal is a node-3 that says what cannot be, beside node-1, which plans, and node-2.
type refusal struct {
	bad      cluster.Node
	options  mesh.Options
	peers    []string // beside node-2
	endpoint string   // of node-3; empty where it has to send first
	problems []string
}

// refusedEndpoint is a node-3 whose operator's endpoint is refused; its InternalIP does not take its place.
func refusedEndpoint(address, because string) refusal {
	return refusal{
		bad: node(3, endpoint(address, 4500)), options: options(), peers: []string{"node-3"},
		problems: []string{"NodeEndpointRefused Node node-3 " + because},
	}
}

// TestPlanRefuses shows for each wrong claim what is reported, and that node-2, which is right, keeps all of its own.
func TestPlanRefuses(t *testing.T) {
	for name, test := range map[string]refusal{
		"no podCIDR": {
			bad: node(3, podCIDRs()), options: options(), problems: []string{"NodeWithoutPodCIDR Node node-3"},
		},
		"no address": {
			bad: node(3, addresses()), options: options(), peers: []string{"node-3"}, problems: []string{"NodeWithoutAddress Node node-3"},
		},
		"no key": {
			bad: node(3, func(n *cluster.Node) { n.WireGuard = nil }), options: options(), problems: []string{"NodeWithoutKey Node node-3"},
		},
		"key of zeros": {
			bad: node(3, func(n *cluster.Node) { n.WireGuard = &cluster.WireGuard{Port: 51820} }), options: options(),
			problems: []string{"NodeWithoutKey Node node-3"},
		},
		"key without proof": {
			bad: node(3, func(n *cluster.Node) { n.WireGuard.Proof = [64]byte{} }), options: options(),
			problems: []string{"NodeKeyUnproven Node node-3"},
		},
		"key proven for a Node that was deleted": {
			bad: node(3, func(n *cluster.Node) { n.UID = "another" }), options: options(), problems: []string{"NodeKeyUnproven Node node-3"},
		},
		"key that no other node has published yet, copied": {
			bad: node(3, copies(4, "node-4")), options: options(), problems: []string{"NodeKeyUnproven Node node-3"},
		},
		"key of another node, copied": {
			bad: node(3, copies(2, "node-2")), options: options(), problems: []string{"NodeKeyDuplicate Node node-3 node-2"},
		},
		"key of another node, copied, from an older node": {
			bad: node(3, copies(2, "node-2"), older), options: options(), problems: []string{"NodeKeyDuplicate Node node-3 node-2"},
		},
		"own key, copied, from an older node": {
			bad: node(3, copies(1, "node-1"), older), options: options(), problems: []string{"NodeKeyDuplicate Node node-3 node-1"},
		},
		"key of another node, held: a copy of its disk": {
			bad: node(3, holds(2)), options: options(), problems: []string{"NodeKeyDuplicate Node node-3 node-2"},
		},
		"own key, held by an older node": {
			bad: node(3, holds(1), older), options: options(), problems: []string{"NodeKeyDuplicate Node node-3 node-1"},
		},
		"next key of another node, copied": {
			bad: node(3, nextKey(keyOf(2, "node-2"))), options: options(), peers: []string{"node-3"}, endpoint: "192.0.2.3:51820",
			problems: []string{"NodeKeyDuplicate Node node-3 node-2"},
		},
		"next key without proof": {
			bad: node(3, nextKey(cluster.NodeKey{PublicKey: keyOf(5, "node-3").PublicKey})), options: options(),
			peers: []string{"node-3"}, endpoint: "192.0.2.3:51820",
			problems: []string{"NodeKeyUnproven Node node-3"},
		},
		"own address, from an older node": {
			bad: node(3, addresses("192.0.2.1"), older), options: options(), peers: []string{"node-3"},
			problems: []string{"NodeAddressDuplicate Node node-3 node-1"},
		},
		"address of another node": {
			bad: node(3, addresses("192.0.2.2")), options: options(), peers: []string{"node-3"}, endpoint: "192.0.2.2:51820",
			problems: []string{"NodeAddressDuplicate Node node-3 node-2", "NodeAddressDuplicate Node node-2 node-3"},
		},
		"address of another node, from an older node": {
			bad: node(3, addresses("192.0.2.2"), older), options: options(), peers: []string{"node-3"}, endpoint: "192.0.2.2:51820",
			problems: []string{"NodeAddressDuplicate Node node-2 node-3", "NodeAddressDuplicate Node node-3 node-2"},
		},
		"address of another node, as IPv4 in IPv6": {
			bad: node(3, addresses("::ffff:192.0.2.2")), options: options(), peers: []string{"node-3"}, endpoint: "192.0.2.2:51820",
			problems: []string{"NodeAddressDuplicate Node node-3 192.0.2.2", "NodeAddressDuplicate Node node-2 192.0.2.2"},
		},
		"address of another node, at a port of another server": {
			bad: node(3, addresses("192.0.2.2"), endpoint("", 53)), options: options(), peers: []string{"node-3"}, endpoint: "192.0.2.2:53",
			problems: []string{"NodeAddressDuplicate Node node-3 node-2", "NodeAddressDuplicate Node node-2 node-3"},
		},
		"address of another node, at a port of another server, from an older node": {
			bad: node(3, addresses("192.0.2.2"), endpoint("", 53), older), options: options(), peers: []string{"node-3"}, endpoint: "192.0.2.2:53",
			problems: []string{"NodeAddressDuplicate Node node-3 node-2", "NodeAddressDuplicate Node node-2 node-3"},
		},
		"address of another node, at another published port": {
			bad: node(3, addresses("192.0.2.2"), func(n *cluster.Node) { n.WireGuard.Port = 53 }), options: options(), peers: []string{"node-3"}, endpoint: "192.0.2.2:53",
			problems: []string{"NodeAddressDuplicate Node node-3 node-2", "NodeAddressDuplicate Node node-2 node-3"},
		},
		"one address of another node of two, at a port of another server": {
			bad: node(3, addresses("192.0.2.2", "192.0.2.3"), endpoint("", 4500)), options: options(), peers: []string{"node-3"}, endpoint: "192.0.2.2:4500",
			problems: []string{"NodeAddressDuplicate Node node-3 node-2", "NodeAddressDuplicate Node node-2 node-3"},
		},
		"own address, at a port of another server": {
			bad: node(3, addresses("192.0.2.1"), endpoint("", 53)), options: options(), peers: []string{"node-3"},
			problems: []string{"NodeAddressDuplicate Node node-3 node-1"},
		},
		"address among the pods": {
			bad: node(3, addresses("10.244.2.9")), options: options(), peers: []string{"node-3"},
			problems: []string{"NodeAddressRefused Node node-3 10.244.0.0/16"},
		},
		"address in another's podCIDR, cluster CIDR unknown": {
			bad: node(3, addresses("10.244.2.9")), options: options(noClusterCIDR), peers: []string{"node-3"},
			problems: []string{"NodeAddressRefused Node node-3 10.244.2.0/24"},
		},
		"loopback address": {
			bad: node(3, addresses("127.0.0.1")), options: options(), peers: []string{"node-3"},
			problems: []string{"NodeAddressRefused Node node-3 127.0.0.1"},
		},
		"one bad address of two": {
			bad: node(3, addresses("127.0.0.1", "192.0.2.3")), options: options(), peers: []string{"node-3"}, endpoint: "192.0.2.3:51820",
			problems: []string{"NodeAddressRefused Node node-3 127.0.0.1"},
		},
		"endpoint on loopback":       refusedEndpoint("127.0.0.1", ""),
		"endpoint on IPv6 loopback":  refusedEndpoint("::1", ""),
		"endpoint on multicast":      refusedEndpoint("224.0.0.251", ""),
		"endpoint on IPv6 multicast": refusedEndpoint("ff02::1", ""),
		"unspecified endpoint":       refusedEndpoint("0.0.0.0", ""),
		"unspecified IPv6 endpoint":  refusedEndpoint("::", ""),
		"endpoint in this network":   refusedEndpoint("0.1.2.3", ""),
		"broadcast endpoint":         refusedEndpoint("255.255.255.255", ""),
		"link-local endpoint":        refusedEndpoint("169.254.169.254", ""),
		"link-local IPv6 endpoint":   refusedEndpoint("fe80::1", ""),
		"endpoint on this node":      refusedEndpoint("192.0.2.1", "node-1"),
		"endpoint among the pods":    refusedEndpoint("10.244.9.9", "10.244.0.0/16"),
		"endpoint on a Service":      refusedEndpoint("10.96.0.1", "10.96.0.0/12"),
		"endpoint on another node": {
			bad: node(3, endpoint("2001:db8::2", 0)), options: options(), peers: []string{"node-3"}, endpoint: "[2001:db8::2]:51820",
			problems: []string{"NodeEndpointDuplicate Node node-3 node-2", "NodeAddressDuplicate Node node-2 node-3"},
		},
		"endpoint on another node, at a port of another server, from an older node": {
			bad: node(3, endpoint("192.0.2.2", 53), older), options: options(), peers: []string{"node-3"}, endpoint: "192.0.2.2:53",
			problems: []string{"NodeEndpointDuplicate Node node-3 node-2", "NodeAddressDuplicate Node node-2 node-3"},
		},
		"endpoint in a podCIDR, cluster CIDR unknown": {
			bad: node(3, endpoint("10.244.2.9", 0)), options: options(noClusterCIDR), peers: []string{"node-3"},
			problems: []string{"NodeEndpointRefused Node node-3 node-2"},
		},
		"InternalIP on a Service": {
			bad: node(3, addresses("10.96.0.1")), options: options(), peers: []string{"node-3"},
			problems: []string{"NodeAddressRefused Node node-3 10.96.0.0/12"},
		},
		"podCIDR around a node, cluster CIDR unknown": {
			bad: node(3, addresses("198.51.100.3"), podCIDRs("192.0.2.2/31")), options: options(noClusterCIDR),
			problems: []string{"PodCIDRContainsNode Node node-3 node-2"},
		},
		"podCIDR around its own node": {
			bad: node(3, podCIDRs("192.0.2.2/31")), options: options(noClusterCIDR), problems: []string{"PodCIDRContainsNode Node node-3 node-2"},
		},
		"absurd MTU": {
			bad: node(3, uplinkMTU(68)), options: options(), peers: []string{"node-3"}, endpoint: "192.0.2.3:51820",
			problems: []string{"NodeMTURefused Node node-3 68"},
		},
		"endless MTU": {
			bad: node(3, uplinkMTU(1<<30)), options: options(), peers: []string{"node-3"}, endpoint: "192.0.2.3:51820",
			problems: []string{"NodeMTURefused Node node-3 1073741824"},
		},
		"podCIDR of another node": {
			bad: node(3, podCIDRs("10.244.2.0/24")), options: options(), problems: []string{"PodCIDROverlap Node node-3 node-2"},
		},
		"podCIDR around another's": {
			bad: node(3, podCIDRs("10.244.0.0/16")), options: options(), problems: []string{"PodCIDROverlap Node node-3 node-1"},
		},
		"podCIDR inside the own": {
			bad: node(3, podCIDRs("10.244.1.64/26")), options: options(), problems: []string{"PodCIDROverlap Node node-3 node-1"},
		},
		"one podCIDR of two": {
			bad: node(3, podCIDRs("10.244.2.128/25", "fd00:0:0:3::/64")), options: options(), peers: []string{"node-3"}, endpoint: "192.0.2.3:51820",
			problems: []string{"PodCIDROverlap Node node-3 node-2"},
		},
		"podCIDR outside": {
			bad: node(3, podCIDRs("10.96.0.0/24")), options: options(), problems: []string{"PodCIDROutsideClusterCIDR Node node-3 10.96.0.0/24"},
		},
		"podCIDR wider than the cluster's": {
			bad: node(3, podCIDRs("10.0.0.0/8")), options: options(), problems: []string{"PodCIDROutsideClusterCIDR Node node-3 10.0.0.0/8"},
		},
		"podCIDR that holds a node": {
			bad: node(3, podCIDRs("192.0.2.0/28")), options: options(noClusterCIDR),
			problems: []string{"PodCIDRContainsNode Node node-3 192.0.2.1"},
		},
		"podCIDR that holds everything": {
			bad: node(3, podCIDRs("::/0", "0.0.0.0/0")), options: options(noClusterCIDR),
			problems: []string{"PodCIDRRefused Node node-3 ::/0", "PodCIDRRefused Node node-3 0.0.0.0/0"},
		},
		"podCIDR of one address": {
			bad: node(3, podCIDRs("10.244.3.1/32")), options: options(), problems: []string{"PodCIDRRefused Node node-3 10.244.3.1/32"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			alone, _ := mesh.Plan(snapshot(node(1), node(2)), test.options)
			got, problems := mesh.Plan(snapshot(node(1), node(2), test.bad), test.options)
			wantProblems(t, problems, test.problems...)
			var names []string
			for _, p := range got.Peers {
				if p.Node != "node-2" {
					names = append(names, p.Node)
					if got := p.Endpoint; got.IsValid() != (test.endpoint != "") || (got.IsValid() && got.String() != test.endpoint) {
						t.Errorf("%s is sent to at %s, want %q", p.Node, got, test.endpoint)
					}
					if p.Next != [32]byte{} {
						t.Errorf("%s changes its key to one that is not its own", p.Node)
					}
				} else if diff := cmp.Diff(alone.Peers[0], p, byValue); diff != "" {
					t.Errorf("node-2 changed (-alone +got):\n%s", diff)
				}
			}
			if !slices.Equal(names, test.peers) || len(got.Peers) != len(test.peers)+1 {
				t.Errorf("peers beside node-2: %v, want %v (%d in all)", names, test.peers, len(got.Peers))
			}
			for _, r := range alone.Routes {
				if !slices.Contains(got.Routes, r) {
					t.Errorf("the route %v to node-2 changed: %v", r, got.Routes)
				}
			}
			if diff := cmp.Diff(alone.Addresses, got.Addresses, byValue); diff != "" || alone.MTU != got.MTU {
				t.Errorf("own addresses or MTU (%d, was %d) changed:\n%s", got.MTU, alone.MTU, diff)
			}
		})
	}
}

func TestPlanOwnNode(t *testing.T) {
	got, problems := mesh.Plan(snapshot(node(1, podCIDRs()), node(2)), options())
	wantProblems(t, problems, "NodeWithoutPodCIDR Node node-1")
	if len(got.Addresses) > 0 || len(got.Routes) > 0 || len(got.Peers) != 1 || len(got.Unreachable) != 2 {
		t.Errorf("without own podCIDR: %+v", got)
	}

	got, problems = mesh.Plan(snapshot(node(2)), options())
	wantProblems(t, problems, "NodeUnknown Node node-1")
	if len(got.Peers) != 1 {
		t.Errorf("without own Node: peers %+v", got.Peers)
	}

	// An own key that is not published yet keeps nothing from starting.
	unpublished := node(1, func(n *cluster.Node) { n.WireGuard = nil })
	if _, problems = mesh.Plan(snapshot(unpublished, node(2)), options()); len(problems) > 0 {
		t.Errorf("without a published key: %v", problems)
	}

	// A family in which the node has no address has no route, and what is sent there is unreachable.
	got, _ = mesh.Plan(snapshot(node(1, podCIDRs("10.244.1.0/24")), node(2)), options())
	if len(got.Routes) != 1 || !got.Routes[0].Destination.Addr().Is4() {
		t.Errorf("IPv4 only: routes %v", got.Routes)
	}
}

func TestPlanEndpointsAndMTU(t *testing.T) {
	for name, test := range map[string]struct {
		own, peer cluster.Node
		change    func(*mesh.Options)
		endpoint  string
		mtu       int
		way       int // the MTU of the IPv4 route
	}{
		"both dual":             {node(1), node(2), nil, "192.0.2.2:51820", 1440, 0},
		"peer lists IPv6 first": {node(1), node(2, addresses("2001:db8::2", "192.0.2.2")), nil, "192.0.2.2:51820", 1440, 0},
		"own IPv6 only":         {node(1, addresses("2001:db8::1")), node(2), nil, "[2001:db8::2]:51820", 1420, 0},
		"peer IPv6 only":        {node(1), node(2, addresses("2001:db8::2")), nil, "[2001:db8::2]:51820", 1440, 1408},
		"published port": {
			node(1), node(2, func(n *cluster.Node) { n.WireGuard.Port = 4500 }), func(o *mesh.Options) { o.Uplink.MTU = 9001 }, "192.0.2.2:4500", 8941, 0,
		},
		"unknown uplink":         {node(1), node(2), func(o *mesh.Options) { o.Uplink.MTU = 0 }, "192.0.2.2:51820", 1440, 0},
		"override":               {node(1), node(2), func(o *mesh.Options) { o.MTU = 1300 }, "192.0.2.2:51820", 1300, 0},
		"small uplink there":     {node(1), node(2, uplinkMTU(1400)), nil, "192.0.2.2:51820", 1440, 1328},
		"small uplink, IPv6":     {node(1), node(2, uplinkMTU(1400), addresses("2001:db8::2")), nil, "[2001:db8::2]:51820", 1440, 1312},
		"larger uplink there":    {node(1), node(2, uplinkMTU(9000)), nil, "192.0.2.2:51820", 1440, 0},
		"small uplink, override": {node(1), node(2, uplinkMTU(1400)), func(o *mesh.Options) { o.MTU = 1400 }, "192.0.2.2:51820", 1400, 1328},
		"smaller link to it":     {node(1), node(2), less("192.0.2.2", 1400), "192.0.2.2:51820", 1440, 1328},
		"smaller link, override": {node(1), node(2), func(o *mesh.Options) { less("192.0.2.2", 1400)(o); o.MTU = 1440 }, "192.0.2.2:51820", 1440, 0},
		"both smaller":           {node(1), node(2, uplinkMTU(1380)), less("192.0.2.2", 1400), "192.0.2.2:51820", 1440, 1312},
		"absurd link to it":      {node(1), node(2), less("192.0.2.2", 100), "192.0.2.2:51820", 1440, 0},
		"smaller link to others": {node(1), node(2), less("192.0.2.3", 1400), "192.0.2.2:51820", 1440, 0},
		"behind NAT":             {node(1), node(2, behindNAT), nil, "", 1440, 1408},
		"behind NAT, IPv4 here":  {node(1, addresses("192.0.2.1")), node(2, behindNAT), nil, "", 1440, 0},
		"behind NAT, less there": {node(1, addresses("192.0.2.1")), node(2, behindNAT), less("", 1400), "", 1440, 1328},
		"behind NAT, endpoint":   {node(1), node(2, behindNAT, endpoint("203.0.113.7", 0)), nil, "", 1440, 1408},
		"public address":         {node(1), node(2, endpoint("203.0.113.7", 0)), nil, "203.0.113.7:51820", 1440, 0},
		"public address, port":   {node(1), node(2, endpoint("203.0.113.7", 4500)), nil, "203.0.113.7:4500", 1440, 0},
		"port alone":             {node(1), node(2, endpoint("", 4500)), nil, "192.0.2.2:4500", 1440, 0},
		"address seen by others": {node(1), node(2, endpoint("192.0.2.2", 4500)), nil, "192.0.2.2:4500", 1440, 0},
		"same public address":    {node(1, endpoint("203.0.113.7", 4500)), node(2, endpoint("203.0.113.7", 4501)), nil, "203.0.113.7:4501", 1440, 0},
		"same InternalIP as here, at another place": {
			node(1), node(2, addresses("192.0.2.1"), endpoint("203.0.113.7", 0)), nil, "203.0.113.7:51820", 1440, 0,
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := options()
			if test.change != nil {
				test.change(&o)
			}
			got, problems := mesh.Plan(snapshot(test.own, test.peer), o)
			wantProblems(t, problems)
			at := ""
			if e := got.Peers[0].Endpoint; e.IsValid() {
				at = e.String()
			}
			if at != test.endpoint || got.MTU != test.mtu || got.Routes[0].MTU != test.way {
				t.Errorf("endpoint %q, MTU %d, %d on the way, want %q, %d, %d", at, got.MTU, got.Routes[0].MTU, test.endpoint, test.mtu, test.way)
			}
		})
	}
	_, problems := mesh.Plan(snapshot(node(1)), options(func(o *mesh.Options) { o.Uplink.MTU = 1300 }))
	wantProblems(t, problems, "MTUTooSmall Node node-1 1240")
	_, problems = mesh.Plan(snapshot(node(1), node(2, uplinkMTU(1300))), options())
	wantProblems(t, problems, "MTUTooSmall Node node-2 1232")
	small := options(func(o *mesh.Options) {
		o.Uplink.Less = map[netip.Addr]int{netip.MustParseAddr("192.0.2.2"): 1290, netip.MustParseAddr("192.0.2.3"): 1290}
	})
	_, problems = mesh.Plan(snapshot(node(1), node(2, uplinkMTU(1300)), node(3), node(4)), small)
	wantProblems(t, problems, "MTUTooSmall Node node-1 leads")
	if got, _ := mesh.Plan(snapshot(node(1, addresses("2001:db8::1"))), options()); got.MTU != 1420 {
		t.Errorf("IPv6 node alone: MTU %d, want 1420", got.MTU)
	}
}

func TestPlanUnreachableWithoutClusterCIDR(t *testing.T) {
	keyless := node(3, func(n *cluster.Node) { n.WireGuard = nil })
	got, _ := mesh.Plan(snapshot(node(1), node(2), keyless), options(noClusterCIDR))
	want := prefixes("10.244.1.0/24", "10.244.2.0/24", "10.244.3.0/24", "fd00:0:0:1::/64", "fd00:0:0:2::/64", "fd00:0:0:3::/64")
	if diff := cmp.Diff(want, got.Unreachable, byValue); diff != "" {
		t.Errorf("unreachable (-want +got):\n%s", diff)
	}
}

// TestPlanNeverShares plans for random clusters of nodes that lie: whatever they claim, no prefix or key is in the
// Config twice, nothing is sent to the own node, the order of the nodes does not matter, and every node agrees about who owns a podCIDR.
func TestPlanNeverShares(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	pick := func(choices ...string) string { return choices[random.IntN(len(choices))] }
	for range 2000 {
		s := snapshot()
		for number := range byte(4) {
			s.Nodes = append(s.Nodes, node(number+1,
				podCIDRs(pick("10.244.1.0/24", "10.244.2.0/24", "10.244.0.0/16", "10.244.2.0/25", "192.0.2.0/24"), pick("fd00:0:0:1::/64", "fd00::/60", "2001:db8::/64")),
				addresses(pick("192.0.2.1", "192.0.2.2", "10.244.2.3"), pick("2001:db8::1", "2001:db8::2", "fe80::1")),
				func(n *cluster.Node) {
					n.Created = time.Unix(int64(random.IntN(2)), 0)
					holds(random.IntN(3))(n)
				}))
		}
		o := options()
		if random.IntN(2) == 0 {
			noClusterCIDR(&o)
		}
		got, problems := mesh.Plan(s, o)
		shared(t, s, got)
		slices.Reverse(s.Nodes)
		again, problemsAgain := mesh.Plan(s, o)
		if diff := cmp.Diff(got, again, byValue); diff != "" {
			t.Fatalf("another order of the nodes gives another mesh:\n%s", diff)
		}
		if diff := cmp.Diff(problems, problemsAgain); diff != "" {
			t.Fatalf("another order of the nodes gives other problems:\n%s", diff)
		}
	}
}

// shared fails the test where two peers, or a peer and the node itself, have something in common.
func shared(t *testing.T, s cluster.Snapshot, c mesh.Config) {
	t.Helper()
	self, _ := s.Node(s.Self)
	taken := slices.Clone(c.Addresses)
	own := map[netip.Addr]bool{}
	keys := map[[32]byte]bool{self.WireGuard.PublicKey: true}
	for _, a := range self.Addresses {
		own[a] = true
		taken = append(taken, netip.PrefixFrom(a, a.BitLen()))
	}
	for _, p := range c.Peers {
		if keys[p.PublicKey] || own[p.Endpoint.Addr()] {
			t.Fatalf("shared key, or an own address as endpoint: %+v\nof %+v", p, s.Nodes)
		}
		keys[p.PublicKey] = true
		for _, allowed := range p.AllowedIPs {
			for _, other := range taken {
				if allowed.Overlaps(other) {
					t.Fatalf("%s of %s overlaps %s\nof %+v", allowed, p.Node, other, s.Nodes)
				}
			}
			taken = append(taken, allowed)
		}
	}
}

// wantProblems compares problems with lines of code, object, and a text that the message must hold.
func wantProblems(t *testing.T, got []cluster.Problem, want ...string) {
	t.Helper()
	missing := slices.Clone(want)
	for _, p := range got {
		matches := func(line string) bool {
			words := append(strings.Fields(line), "")
			return words[0] == p.Code && strings.Join(words[1:3], " ") == p.Object && strings.Contains(p.Message, words[3])
		}
		i := slices.IndexFunc(missing, matches)
		if i < 0 {
			t.Errorf("problem not wanted: %s", p)
			continue
		}
		missing = slices.Delete(missing, i, i+1)
		if p.Remedy == "" || p.Message == "" {
			t.Errorf("problem without remedy or message: %s", p)
		}
	}
	for _, line := range missing {
		t.Errorf("no problem %q", line)
	}
}

package policy_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/policy"
)

// A block is blind where it holds a Service's address and none of its endpoints, and nowhere else.
func TestBlindBlocks(t *testing.T) {
	service := func(name, address string, endpoints ...string) cluster.Service {
		s := cluster.Service{Namespace: "shop", Name: name, ClusterIPs: []netip.Addr{netip.MustParseAddr(address)}}
		for _, e := range endpoints {
			s.Endpoints = append(s.Endpoints, cluster.Endpoint{Address: netip.MustParseAddr(e)})
		}
		return s
	}
	services := []cluster.Service{
		service("api", "10.96.0.1", "10.244.1.2", "10.244.2.2"),
		service("db", "10.96.0.2", "10.244.2.3"),
		service("node", "10.96.1.1", "10.96.1.2"), // its endpoint is in the same block
		service("empty", "10.97.0.1"),
		service("six", "fd00:96::1", "fd00:244::1"),
	}
	for cidrs, want := range map[string]string{
		"10.96.0.1/32":                "10.96.0.1/32 holds the address of Service shop/api and none",
		"10.96.0.0/24":                "10.96.0.0/24 holds the address of Service shop/api and of 1 more and none",
		"10.96.0.0/24 10.96.0.1/32":   "10.96.0.0/24 except 10.96.0.1/32 holds the address of Service shop/db and none",
		"fd00:96::/64":                "fd00:96::/64 holds the address of Service shop/six and none",
		"10.96.1.0/24":                "",
		"10.97.0.0/16":                "",
		"10.0.0.0/8":                  "",
		"0.0.0.0/0":                   "",
		"10.244.0.0/16 10.244.2.2/32": "",
	} {
		var block cluster.Block
		for i, cidr := range strings.Fields(cidrs) {
			if prefix := netip.MustParsePrefix(cidr); i == 0 {
				block.CIDR = prefix
			} else {
				block.Except = append(block.Except, prefix)
			}
		}
		rules := []cluster.Rule{{AnyPeer: true}, {Index: 1, Peers: []cluster.Peer{{}, {Block: &block}}}}
		for field, p := range map[string]cluster.Policy{
			"spec.egress[1]":  {Namespace: "shop", Name: "web", EgressRules: rules},
			"spec.ingress[1]": {Namespace: "shop", Name: "web", IngressRules: rules},
		} {
			var got []cluster.Problem
			for _, problem := range policy.BlindBlocks([]cluster.Policy{p}, services) {
				problem.Remedy = ""
				problem.Message, _, _ = strings.Cut(problem.Message, " of the endpoints: ")
				got = append(got, problem)
			}
			var wanted []cluster.Problem
			if want != "" {
				wanted = []cluster.Problem{{Code: "BlockNamesService", Object: "NetworkPolicy shop/web", Field: field, Message: want}}
			}
			if diff := cmp.Diff(wanted, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", cidrs, diff)
			}
		}
	}
}

package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// Sums grow by what their counters grow, whatever comes and goes beside them.
func TestDenialsAddUp(t *testing.T) {
	count := func(f netfilter.Family, chain, comment string, packets uint64) firewall.Denial {
		return firewall.Denial{Family: f, Table: "mangle", Chain: chain, Comment: comment, Packets: packets, Bytes: 99 * packets}
	}
	a := func(packets uint64) firewall.Denial { return count(netfilter.IPv4, "WARREN-I-A", "isolated", packets) }
	a6 := func(packets uint64) firewall.Denial { return count(netfilter.IPv6, "WARREN-I-A", "isolated", packets) }
	ab := func(packets uint64) firewall.Denial { return count(netfilter.IPv4, "WARREN-I-AB", "isolated", packets) }
	gate := func(packets uint64) firewall.Denial {
		return count(netfilter.IPv4, "WARREN-FORWARD", "start gate", packets)
	}
	gone := func(packets uint64) firewall.Denial {
		return count(netfilter.IPv4, "WARREN-I-GONE", "isolated", packets)
	}
	nameless := func(packets uint64) firewall.Denial { return count(netfilter.IPv4, "WARREN-GUARD", "", packets) }
	group := func(chain string) (string, []string, bool) {
		policies, ok := map[string][]string{"WARREN-I-A": {"shop/a"}, "WARREN-I-AB": {"shop/a", "shop/b"}}[chain]
		return "ingress", policies, ok
	}
	policyA, policyB := denialLabels{policy: "shop/a", direction: "ingress"}, denialLabels{policy: "shop/b", direction: "ingress"}
	out := func(where string, packets uint64) firewall.Denial {
		return count(netfilter.IPv4, "WARREN-GUARD", firewall.InClear+where, packets)
	}
	var d denials
	for i, step := range []struct {
		read []firewall.Denial
		want map[denialLabels]uint64
	}{
		{[]firewall.Denial{a(5), a6(2), ab(1000)}, map[denialLabels]uint64{policyA: 1007, policyB: 1000}},
		{[]firewall.Denial{a(6), a6(2)}, map[denialLabels]uint64{policyA: 1008}},                    // a group went
		{[]firewall.Denial{a(6), a6(5), ab(1)}, map[denialLabels]uint64{policyA: 1012, policyB: 1}}, // and came again
		{[]firewall.Denial{a(1), a6(5), ab(1)}, map[denialLabels]uint64{policyA: 1013, policyB: 1}}, // began again
		{[]firewall.Denial{gate(3), gone(9)}, map[denialLabels]uint64{{reason: "start gate"}: 3}},   // whose group nobody knows
		{[]firewall.Denial{nameless(3), gate(4)}, map[denialLabels]uint64{{reason: "start gate"}: 4, {reason: "WARREN-GUARD"}: 3}},
		{
			[]firewall.Denial{out("to a node", 1), out("out of the cluster", 2), out("to a pod of another node", 3), out("to the moon", 4)},
			map[denialLabels]uint64{{clear: "node"}: 1, {clear: "world"}: 2, {clear: "pod"}: 3, {clear: "to the moon"}: 4},
		},
	} {
		if diff := cmp.Diff(step.want, d.add(step.read, group), cmp.AllowUnexported(denialLabels{})); diff != "" {
			t.Errorf("reading %d (-want +got):\n%s", i, diff)
		}
	}
}

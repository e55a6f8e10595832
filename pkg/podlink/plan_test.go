package podlink_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/warren-cni/warren/pkg/podlink"
)

var equal = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

func TestPlan(t *testing.T) {
	host := podlink.MAC{0xee, 0xee, 0xee, 0xee, 0xee, 0xee}
	got := podlink.Plan(podlink.Spec{
		ContainerID: "c1", Interface: "eth0", MTU: 1420,
		Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.7"), netip.MustParseAddr("fd00::7")},
	})
	pod := got.Pod.MAC
	want := podlink.Pair{
		MTU: 1420,
		Host: podlink.End{
			Name: podlink.HostName("c1", "eth0"), MAC: host,
			Sysctls: []podlink.Sysctl{{Name: "accept_ra", Value: "0"}, {Name: "disable_ipv6", Value: "0"}}, NoAutoAddress: true,
			Neighbours: []podlink.Neighbour{{netip.MustParseAddr("10.244.1.7"), pod}, {netip.MustParseAddr("fd00::7"), pod}},
			Routes:     []podlink.Route{{Destination: netip.MustParsePrefix("10.244.1.7/32")}, {Destination: netip.MustParsePrefix("fd00::7/128")}},
		},
		Pod: podlink.End{
			Name: "eth0", MAC: pod,
			Sysctls: []podlink.Sysctl{
				{Name: "accept_ra", Value: "0"}, {Name: "accept_dad", Value: "0"}, {Name: "disable_ipv6", Value: "0"},
			},
			Addresses:  []netip.Prefix{netip.MustParsePrefix("10.244.1.7/32"), netip.MustParsePrefix("fd00::7/128")},
			Neighbours: []podlink.Neighbour{{netip.MustParseAddr("169.254.1.1"), host}, {netip.MustParseAddr("fe80::1"), host}},
			Routes: []podlink.Route{
				{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr("169.254.1.1")},
				{netip.MustParsePrefix("::/0"), netip.MustParseAddr("fe80::1")},
			},
		},
	}
	if diff := cmp.Diff(want, got, equal); diff != "" {
		t.Errorf("pair (-want +got):\n%s", diff)
	}
}

func TestPlanOfIPv4LeavesIPv6Alone(t *testing.T) {
	got := podlink.Plan(podlink.Spec{ContainerID: "c1", Interface: "eth0", MTU: 1420, Addresses: []netip.Addr{netip.MustParseAddr("10.244.1.7")}})
	for _, end := range []podlink.End{got.Host, got.Pod} {
		for _, s := range end.Sysctls {
			if s.Name == "disable_ipv6" {
				t.Errorf("%s: IPv6 is switched on for a pod without an IPv6 address", end.Name)
			}
		}
	}
}

func TestNamesIdentifyAttachments(t *testing.T) {
	names, macs := map[string]bool{}, map[podlink.MAC]bool{}
	attachments := [][2]string{{"c1", "eth0"}, {"c1", "eth1"}, {"c2", "eth0"}, {"c1e", "th0"}}
	for _, a := range attachments {
		p := podlink.Plan(podlink.Spec{ContainerID: a[0], Interface: a[1]})
		if len(p.Host.Name) > 15 {
			t.Errorf("%s has more than 15 characters", p.Host.Name)
		}
		if p.Pod.MAC[0]&0x03 != 0x02 {
			t.Errorf("%x is not a locally administered unicast address", p.Pod.MAC)
		}
		names[p.Host.Name], macs[p.Pod.MAC] = true, true
	}
	if len(names) != len(attachments) || len(macs) != len(attachments) {
		t.Errorf("%d names and %d MAC addresses for %d attachments", len(names), len(macs), len(attachments))
	}
}

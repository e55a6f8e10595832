package gate_test

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/gate"
	"github.com/warren-cni/warren/pkg/testnode"
)

// connect makes an entry of a connection: from a client to a server that answers, which differ where it is translated.
func connect(t *testing.T, client, server, answers string) {
	t.Helper()
	from, to, back := netip.MustParseAddr(client), netip.MustParseAddr(server), netip.MustParseAddr(answers)
	flow := &netlink.ConntrackFlow{
		FamilyType: unix.AF_INET, TimeOut: 100,
		Forward: netlink.IPTuple{SrcIP: from.AsSlice(), DstIP: to.AsSlice(), SrcPort: 1000, DstPort: 53, Protocol: unix.IPPROTO_UDP},
		Reverse: netlink.IPTuple{SrcIP: back.AsSlice(), DstIP: from.AsSlice(), SrcPort: 53, DstPort: 1000, Protocol: unix.IPPROTO_UDP},
	}
	if from.Is6() {
		flow.FamilyType = unix.AF_INET6
	}
	if err := netlink.ConntrackCreate(netlink.ConntrackTable, netlink.InetFamily(flow.FamilyType), flow); err != nil {
		t.Fatal(err)
	}
}

func TestForget(t *testing.T) {
	testnode.Enter(t)
	connect(t, "10.0.0.2", "10.0.0.9", "10.0.0.9")
	connect(t, "10.0.0.8", "10.0.0.2", "10.0.0.2")
	connect(t, "10.0.0.7", "10.96.0.1", "10.0.0.2")
	connect(t, "10.0.0.20", "10.0.0.9", "10.0.0.9")
	connect(t, "fd00::8", "fd00::2", "fd00::2")
	connect(t, "fd00::20", "fd00::9", "fd00::9")
	for range 2 { // the second time there is nothing to do
		if err := gate.Forget(addresses("10.0.0.2", "fd00::2")); err != nil {
			t.Fatal(err)
		}
	}
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_UNSPEC) //nolint:forbidigo // an interrupted one fails the test
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, flow := range flows {
		left = append(left, flow.Forward.SrcIP.String())
	}
	sorted := cmpopts.SortSlices(func(a, b string) bool { return a < b })
	if diff := cmp.Diff([]string{"10.0.0.20", "fd00::20"}, left, sorted); diff != "" {
		t.Errorf("connections of these are left (-want +got):\n%s", diff)
	}
}

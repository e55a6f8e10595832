package podcidr_test

import (
	"net/netip"
	"testing"

	"github.com/warren-cni/warren/pkg/podcidr"
)

func TestNodeAddress(t *testing.T) {
	for in, want := range map[string]string{
		"10.244.1.0/24":          "10.244.1.1",
		"10.244.1.77/24":         "10.244.1.1",
		"10.244.1.0/31":          "10.244.1.1",
		"fd00:10:244:1::/64":     "fd00:10:244:1::1",
		"fd00:10:244:1::abc/120": "fd00:10:244:1::a01",
	} {
		if got := podcidr.NodeAddress(netip.MustParsePrefix(in)); got != netip.MustParseAddr(want) {
			t.Errorf("NodeAddress(%s) = %s, want %s", in, got, want)
		}
	}
	for _, in := range []string{"10.244.1.0/32", "fd00::/128", "255.255.255.255/32"} {
		if got := podcidr.NodeAddress(netip.MustParsePrefix(in)); got.IsValid() {
			t.Errorf("NodeAddress(%s) = %s, want none", in, got)
		}
	}
	if got := podcidr.NodeAddress(netip.Prefix{}); got.IsValid() {
		t.Errorf("NodeAddress of no prefix = %s, want none", got)
	}
}

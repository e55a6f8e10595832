package podlink_test

import (
	"net/netip"
	"os/exec"
	"testing"

	"github.com/warren-cni/warren/pkg/podlink"
	"github.com/warren-cni/warren/pkg/testnode"
)

// Only a route to the address itself counts, not one that holds it.
func TestRouted(t *testing.T) {
	testnode.Enter(t)
	for _, route := range []string{"10.9.0.2/32", "10.9.0.0/24", "default", "fd00:9::2/128", "fd00:9::/64"} {
		if out, err := exec.CommandContext(t.Context(), "ip", "route", "add", route, "dev", "lo").CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", route, err, out)
		}
	}
	for address, want := range map[string]bool{"10.9.0.2": true, "10.9.0.3": false, "fd00:9::2": true, "fd00:9::3": false, "10.8.0.1": false} {
		if routed, err := podlink.Routed(netip.MustParseAddr(address)); err != nil || routed != want {
			t.Errorf("%s: %v, %v; want %v", address, routed, err, want)
		}
	}
}

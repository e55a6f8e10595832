package policy_test

import (
	"net/netip"
	"testing"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/policy"
)

// An address is its pod's, the first one's by name where two have it, and nobody's when they are gone.
func TestPod(t *testing.T) {
	address := netip.MustParseAddr("10.0.1.1")
	c := policy.NewCompiler("n1", policy.Options{})
	set := func(name string, addresses ...netip.Addr) {
		c.Update(cluster.Delta{Pods: map[cluster.Key]*cluster.Pod{
			{Namespace: "shop", Name: name}: {Namespace: "shop", Name: name, Node: "n1", Addresses: addresses},
		}})
	}
	expect := func(want string) {
		t.Helper()
		name := ""
		if p, ok := c.Pod(address); ok {
			name = p.Name
		}
		if name != want {
			t.Errorf("the pod is %q, want %q", name, want)
		}
	}
	expect("")
	set("b", address)
	expect("b")
	set("a", address)
	expect("a")
	set("a", address.Next())
	expect("b")
	set("b")
	expect("")
}

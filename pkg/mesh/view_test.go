package mesh_test

import (
	"slices"
	"testing"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/mesh"
)

// TestPlannerSources tells from which address a node answers the pods of another one.
func TestPlannerSources(t *testing.T) {
	first := []string{"10.244.1.1", "fd00:0:0:1::1"}
	for name, test := range map[string]struct {
		options mesh.Options
		own     cluster.Node
		want    []string
	}{
		"pods reach no node by the tunnel":  {options(), node(1), first},
		"pods reach nodes by the tunnel":    {options(tunnelledNodes), node(1), []string{"192.0.2.1", "2001:db8::1"}},
		"one family":                        {options(func(o *mesh.Options) { o.NodeCIDRs = prefixes("192.0.2.0/24") }), node(1), []string{"192.0.2.1", "fd00:0:0:1::1"}},
		"the own address is elsewhere":      {options(tunnelledNodes), node(1, addresses("198.51.100.1")), first},
		"no pods of a family, so no route":  {options(tunnelledNodes), node(1, podCIDRs("10.244.1.0/24")), []string{"192.0.2.1"}},
		"two of a family: the first counts": {options(tunnelledNodes), node(1, addresses("192.0.2.9", "192.0.2.1")), []string{"192.0.2.1", "fd00:0:0:1::1"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlanned(t, test.options, test.own, node(2))
			var got []string
			for _, r := range p.Config().Routes {
				got = append(got, r.Source.String())
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("sources: %v, want %v", got, test.want)
			}
		})
	}
}

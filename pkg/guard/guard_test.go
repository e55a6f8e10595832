package guard_test

import (
	"net/netip"
	"path/filepath"
	"testing"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/golden"
	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/internal/trace"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

func prefixes(list ...string) []netip.Prefix {
	var parsed []netip.Prefix
	for _, s := range list {
		parsed = append(parsed, netip.MustParsePrefix(s))
	}
	return parsed
}

func addresses(list ...string) []netip.Addr {
	var parsed []netip.Addr
	for _, s := range list {
		parsed = append(parsed, netip.MustParseAddr(s))
	}
	return parsed
}

// dual is the usual node.
func dual() guard.Config {
	return guard.Config{
		PodCIDRs:      prefixes("10.244.1.0/24", "fd00:10:244:1::/64"),
		Addresses:     prefixes("10.244.1.1/32", "fd00:10:244:1::1/128"),
		KnownPodCIDRs: prefixes("10.244.2.0/24", "10.244.1.0/24", "fd00:10:244:1::/64", "fd00:10:244:2::/64"),
		ClusterCIDRs:  prefixes("10.244.0.0/16", "fd00:10:244::/48"),
		NonMasquerade: prefixes("10.64.0.0/10", "fd00:10::/40"),
		Services:      prefixes("10.96.0.0/12", "fd00:10:96::/112"),
		NodeAddresses: addresses("192.168.0.1", "192.168.0.2", "fc00::1", "fc00::2"),
		Encrypted:     true,
		Ready:         addresses("10.244.1.7", "fd00:10:244:1::7", "10.244.1.3"),
	}
}

// changed is the usual node with a change.
func changed(change func(*guard.Config)) guard.Config {
	c := dual()
	change(&c)
	return c
}

func TestGolden(t *testing.T) {
	for name, config := range map[string]guard.Config{
		"dual": dual(),
		"ipv4": {
			PodCIDRs: prefixes("10.244.1.0/24"), Addresses: prefixes("10.244.1.1/32"), ClusterCIDRs: prefixes("10.244.0.0/16"), Encrypted: true,
			Ready: addresses("10.244.1.7"),
		},
		"known-nodes-only": changed(func(c *guard.Config) { c.ClusterCIDRs = nil }),
		"whole-address-space-claimed": changed(func(c *guard.Config) {
			c.ClusterCIDRs, c.KnownPodCIDRs = nil, prefixes("0.0.0.0/0", "::/0", "10.244.2.0/24")
		}),
		"encryption-off": changed(func(c *guard.Config) { c.Encrypted = false }),
		"own-outside-cluster": changed(func(c *guard.Config) {
			c.PodCIDRs, c.Addresses = prefixes("172.20.0.0/24"), prefixes("172.20.0.1/32")
		}),
		"first-address-held":   changed(func(c *guard.Config) { c.Addresses = prefixes("fd00:10:244:1::1/128") }),
		"node-without-podcidr": {ClusterCIDRs: prefixes("10.244.0.0/16"), Encrypted: true},
	} {
		t.Run(name, func(t *testing.T) {
			rules := guard.Compile(config)
			golden.Compare(t, filepath.Join("testdata", name+".rules"), rules.Render())
			for f, filter := range load(t, rules) {
				err := filter.Lint()
				if err != nil {
					t.Errorf("%s: %v", f, err)
				}
			}
		})
	}
}

// load reads the rendered rules back, with the entry chain of a node without policies.
func load(t *testing.T, rules netfilter.Ruleset) map[netfilter.Family]*trace.Filter {
	t.Helper()
	none, _ := policy.Compile(cluster.Snapshot{})
	all := netfilter.Merge(rules, none)
	filters := map[netfilter.Family]*trace.Filter{}
	for _, f := range netfilter.Families {
		filter, err := trace.Parse(all.Of(f).Render(f))
		if err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		filters[f] = filter
	}
	return filters
}

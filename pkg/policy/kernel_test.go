package policy_test

import (
	"bytes"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// The kernel takes every construct of every golden case, in both families and through both of iptables' backends, and
// lists each rule with the hash that it was written with.
func TestKernelTakesRules(t *testing.T) {
	for _, in := range goldenCases(t) {
		t.Run(filepath.Base(filepath.Dir(in)), func(t *testing.T) {
			snapshot, _ := loadCase(t, in)
			rules, _ := policy.Compile(snapshot)
			all := netfilter.Merge(guard.Compile(guard.Config{
				PodCIDRs: prefixes("10.0.1.0/24", "fd00:1::/64"), Addresses: prefixes("10.0.1.1/32", "fd00:1::1/128"), KnownPodCIDRs: prefixes("10.0.2.0/24", "fd00:2::/64"),
				NonMasquerade: prefixes("10.96.0.0/12", "fd00:96::/112"), Encrypted: true,
			}), rules)
			for _, f := range netfilter.Families {
				for _, backend := range []string{"nft", "legacy"} {
					listed := loadIntoKernel(t, all.Of(f), f, backend)
					if diff := cmp.Diff(hashes(all.Of(f)), listed); diff != "" {
						t.Errorf("%s by %s lists other rules than were written (-wrote +listed):\n%s", f, backend, diff)
					}
				}
			}
		})
	}
}

// loadIntoKernel restores rules in a network namespace that ends with the command, and returns the hashes in the rules
// that are listed there, by chain.
func loadIntoKernel(t *testing.T, rules *netfilter.Rules, f netfilter.Family, backend string) map[string][]string {
	t.Helper()
	command := map[netfilter.Family]string{netfilter.IPv4: "iptables-", netfilter.IPv6: "ip6tables-"}[f] + backend
	var sets, tables []string
	for line := range strings.Lines(rules.Render(f)) {
		switch word, _, _ := strings.Cut(line, " "); word {
		case "#", "create", "add":
			sets = append(sets, line)
		case "hook":
		default:
			tables = append(tables, line)
		}
	}
	dir := t.TempDir()
	write(t, filepath.Join(dir, "sets"), strings.Join(sets, ""))
	write(t, filepath.Join(dir, "tables"), strings.Join(tables, ""))
	cmd := exec.CommandContext(t.Context(), "unshare", "--net", "sh", "-ec",
		`ipset restore <sets; "$0-restore" --noflush <tables; for t in filter mangle nat raw; do "$0" -t $t -S; done`, command)
	cmd.Dir = dir
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.Output()
	if err != nil || complaints.Len() > 0 {
		t.Fatalf("restoring %s by %s: %v\n%s\n%s", f, command, err, complaints.String(), rules.Render(f))
	}
	listed := map[string][]string{}
	for line := range strings.Lines(string(out)) {
		if rest, ok := strings.CutPrefix(line, "-A "); ok {
			chain, _, _ := strings.Cut(rest, " ")
			listed[chain] = append(listed[chain], netfilter.HashOf(line))
		}
	}
	return listed
}

// hashes returns the hashes of the rules by chain.
func hashes(rules *netfilter.Rules) map[string][]string {
	byChain := map[string][]string{}
	for _, c := range rules.Chains {
		for _, r := range c.Rules {
			byChain[c.Name] = append(byChain[c.Name], r.Hash())
		}
	}
	return byChain
}

func write(t *testing.T, path, content string) {
	t.Helper()
	err := os.WriteFile(path, []byte(content), 0o600)
	if err != nil {
		t.Fatal(err)
	}
}

func prefixes(list ...string) []netip.Prefix {
	var parsed []netip.Prefix
	for _, s := range list {
		parsed = append(parsed, netip.MustParsePrefix(s))
	}
	return parsed
}

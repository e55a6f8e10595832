package firewall

import (
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// TestWalk goes through a dozen real plans, of pkg/policy's golden cases on top of the guards, in a random order. Whatever stood
// before, each gives the state that it gives on an empty kernel; applied again, also by a new daemon, it writes nothing.
func TestWalk(t *testing.T) {
	plans := realPlans(t)
	seed := rand.Uint64()
	onEach(t, func(n *node) {
		t := n.t
		w := n.firewall()
		for _, i := range rand.New(rand.NewPCG(seed, 0)).Perm(len(plans))[:12] {
			n.apply(w, plans[i])
			if again := n.apply(w, plans[i]); again != (Changes{}) {
				t.Errorf("seed %d: plan %d: a second apply wrote %+v", seed, i, again)
			}
			if again := n.apply(n.firewall(), plans[i]); again != (Changes{}) {
				t.Errorf("seed %d: plan %d: a new Firewall wrote %+v", seed, i, again)
			}
			walked := n.state()
			if err := Cleanup(t.Context(), n.options().Log); err != nil {
				t.Fatal(err)
			}
			w.Forget()
			n.apply(w, plans[i])
			if diff := cmp.Diff(n.state(), walked); diff != "" {
				t.Errorf("seed %d: plan %d: the walk comes to another state than a fresh apply:\n%s", seed, i, diff)
			}
		}
	})
}

// realPlans returns the plans of the golden cases.
func realPlans(t *testing.T) []netfilter.Ruleset {
	t.Helper()
	cases, err := filepath.Glob("../policy/testdata/*/in.yaml")
	if err != nil || len(cases) < 20 {
		t.Fatalf("%d cases, error %v", len(cases), err)
	}
	var plans []netfilter.Ruleset
	for _, in := range cases {
		dir := t.TempDir()
		for name, from := range map[string]string{"0.yaml": "../policy/testdata/cluster.yaml", "1.yaml": in} {
			data, err := os.ReadFile(from)
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, name), data, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		snapshot, _, err := kube.Load(dir, "here")
		if err != nil {
			t.Fatal(err)
		}
		guards := guard.Config{Encrypted: len(plans)%2 == 0, ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}
		for _, node := range snapshot.Nodes {
			guards.KnownPodCIDRs = append(guards.KnownPodCIDRs, node.PodCIDRs...)
		}
		for _, pod := range snapshot.Pods {
			guards.Ready = append(guards.Ready, pod.Addresses...)
		}
		rules, _ := policy.Compile(snapshot)
		plans = append(plans, netfilter.Merge(guard.Compile(guards), rules))
	}
	return plans
}

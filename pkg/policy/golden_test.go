package policy_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/golden"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/policy"
)

// Each case is judged twice: by its golden file, and by the oracle. A case is a directory with in.yaml, objects that are
// added to those of testdata/cluster.yaml, and want.rules, the problems and
// the whole text of both families.
func TestGolden(t *testing.T) {
	cases := goldenCases(t)
	if len(cases) < 20 {
		t.Fatalf("there are only %d cases", len(cases))
	}
	for _, in := range cases {
		dir := filepath.Dir(in)
		t.Run(filepath.Base(dir), func(t *testing.T) {
			snapshot, problems := loadCase(t, in)
			rules, more := policy.Compile(snapshot)
			var b strings.Builder
			for _, p := range append(problems, more...) {
				fmt.Fprintf(&b, "# problem: %s\n", p)
			}
			b.WriteString(rules.Render())
			golden.Compare(t, filepath.Join(dir, "want.rules"), b.String())
			var ready []netip.Addr
			for _, pod := range snapshot.Pods {
				ready = append(ready, pod.Addresses...)
			}
			check(t, snapshot, ready, newTally())
		})
	}
}

func goldenCases(t *testing.T) []string {
	t.Helper()
	cases, err := filepath.Glob("testdata/*/in.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return cases
}

// loadCase reads the objects of a case, as the node "here" sees them.
func loadCase(t *testing.T, in string) (cluster.Snapshot, []cluster.Problem) {
	t.Helper()
	dir := t.TempDir()
	for i, path := range []string{"testdata/cluster.yaml", in} {
		data, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, fmt.Sprintf("%d.yaml", i)), data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	snapshot, problems, err := kube.Load(dir, "here")
	if err != nil {
		t.Fatal(err)
	}
	if len(snapshot.Pods) == 0 {
		t.Fatalf("no pods were read: %v", problems)
	}
	return snapshot, problems
}

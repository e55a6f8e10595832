package bench

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/warren-cni/warren/pkg/ipam"
)

// leased is how many leases a full node has.
const leased = 250

// BenchmarkStatus runs the plugin's STATUS, as containerd does every 5 s, on a node with 250 leases: for a pool with room, and for one
// without, in which every address is looked at.
func BenchmarkStatus(b *testing.B) {
	s := newStage(b, "status", 1)
	s.start(noFlags)
	node := s.Nodes[0]
	room := entry(b, node.Conflist())
	var ranges []netip.Prefix
	for _, text := range room["ranges"].([]any) {
		ranges = append(ranges, netip.MustParsePrefix(text.(string)))
	}
	store, err := ipam.Open(node.Leases())
	if err != nil {
		b.Fatal(err)
	}
	lease := func(ranges []netip.Prefix, n int) {
		for i := range n {
			owner := ipam.Owner{ContainerID: fmt.Sprintf("%s-%d", ranges[0].Addr(), i), Interface: "eth0", Namespace: namespace, Name: fmt.Sprintf("pod-%d", i)}
			if _, err := store.Allocate(ranges, owner); err != nil {
				b.Fatal(err)
			}
		}
	}
	lease(ranges, leased)
	full := entry(b, node.Conflist())
	full["ranges"] = []string{"10.250.0.0/24"}
	lease([]netip.Prefix{netip.MustParsePrefix("10.250.0.0/24")}, 253)

	var took [2][]time.Duration
	var processor time.Duration
	for b.Loop() {
		for i, config := range []map[string]any{room, full} {
			err = node.Do(func() error {
				began := time.Now() //nolint:forbidigo // what a benchmark is for
				out, used, err := status(filepath.Join(s.plugins, "warren"), config)
				processor += used
				took[i] = append(took[i], time.Since(began))
				if (i == 0) != (err == nil) || i == 1 && !bytes.Contains(out, []byte(`"code": 50`)) {
					return fmt.Errorf("STATUS %d: %w: %s", i, err, out)
				}
				return nil
			})
			if err != nil {
				b.Fatal(err)
			}
		}
	}
	b.ReportMetric(milliseconds(percentile(took[0], 0.5)), "p50-ms")
	b.ReportMetric(milliseconds(percentile(took[0], 0.99)), "p99-ms")
	b.ReportMetric(milliseconds(processor)/float64(2*len(took[0])), "cpu-ms")
	b.ReportMetric(milliseconds(percentile(took[1], 0.99)), "full-p99-ms")
}

// entry returns the plugin's entry of a conflist, completed as a runtime does.
func entry(b *testing.B, conflist string) map[string]any {
	b.Helper()
	data, err := os.ReadFile(conflist)
	if err != nil {
		b.Fatal(err)
	}
	var list struct {
		Name    string
		Plugins []map[string]any
	}
	if err = json.Unmarshal(data, &list); err != nil {
		b.Fatal(err)
	}
	list.Plugins[0]["cniVersion"], list.Plugins[0]["name"] = "1.1.0", list.Name
	return list.Plugins[0]
}

// status runs STATUS and returns what it writes, and the processor time that it takes.
func status(plugin string, config map[string]any) ([]byte, time.Duration, error) {
	stdin, err := json.Marshal(config)
	if err != nil {
		return nil, 0, err
	}
	cmd := exec.Command(plugin)
	cmd.Env, cmd.Stdin = []string{"CNI_COMMAND=STATUS", "CNI_PATH=" + filepath.Dir(plugin)}, bytes.NewReader(stdin)
	out, err := cmd.Output()
	return out, cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), err
}

//go:build e2e

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// meeting is a pod that has heard another one, which it knows by its address.
type meeting struct {
	pod, network, from string
}

// testRace starts pods that send from their first instant, over TCP and UDP and both families, to neighbours on both nodes,
// which send to them from the moment in which a node gives them their addresses. Nothing of it passes where a policy denies
// everything. The same without a policy is the positive control: everybody hears everybody. It goes on for longer, because on a busy
// machine connections between nodes are not there within the tenth of a second that they are given.
func (c *cluster) testRace(t *testing.T) {
	t.Run("deny all", func(t *testing.T) {
		c.namespace(t, "e2e-race")
		c.applyExample(t, "e2e-race", "deny-all.yaml")
		const during = 5 * time.Second
		pods, neighbours := c.race(t, "e2e-race", 30, during)
		<-time.After(during) // the last one has then sent all that it will
		met := c.meetings(t.Context(), t, pods, neighbours)
		for m := range met {
			t.Errorf("%s has heard %s over %s", m.pod, m.from, m.network)
		}
		t.Logf("%d meetings of %d pods with %d neighbours", len(met), len(pods), len(neighbours))
	})
	t.Run("no policy", func(t *testing.T) {
		c.namespace(t, "e2e-race-open")
		const during = time.Minute
		pods, neighbours := c.race(t, "e2e-race-open", 6, during)
		met := map[meeting]bool{}
		eventually(t, during, "everybody has heard everybody", func(ctx context.Context) error {
			met = c.meetings(ctx, t, pods, neighbours)
			var errs []error
			for _, pod := range pods {
				for _, neighbour := range neighbours {
					for want := range everyMeeting(pod, neighbour) {
						if !met[want] {
							errs = append(errs, fmt.Errorf("%s has not heard %s over %s", want.pod, want.from, want.network))
						}
					}
				}
			}
			return errors.Join(errs...)
		})
		t.Logf("%d meetings of %d pods with %d neighbours", len(met), len(pods), len(neighbours))
	})
}

// everyMeeting returns all meetings of two pods that nothing keeps apart.
func everyMeeting(one, other *probePod) map[meeting]bool {
	all := map[meeting]bool{}
	for _, network := range []string{"tcp", "udp"} {
		for _, pair := range [][2]*probePod{{one, other}, {other, one}} {
			for _, address := range pair[1].addresses {
				all[meeting{pair[0].name, network, address}] = true
			}
		}
	}
	return all
}

// race starts n pods at once on both nodes, each of which sends for some time, and neighbours in a namespace beside theirs. It returns when
// all of them serve.
func (c *cluster) race(t *testing.T, namespace string, n int, during time.Duration) (pods, neighbours []*probePod) {
	t.Helper()
	outside := namespace + "-outside"
	c.namespace(t, outside)
	knock := []string{"knock", "-marker", newMarker(t)}
	listen := append(slices.Clone(knock), "-listen", hostPort("", port))
	var targets []string
	for _, node := range c.nodes() {
		neighbour := &probePod{name: "neighbour-" + node, node: node, arguments: listen}
		c.start(t, outside, neighbour)
		neighbours = append(neighbours, neighbour)
		targets = slices.Concat(targets, neighbour.targets("tcp"), neighbour.targets("udp"))
	}
	c.knockAtNewcomers(t, neighbours, append(knock, "-stdin", "-interval", "50ms"))
	for i := range n {
		pods = append(pods, &probePod{
			name: fmt.Sprintf("racer-%d", i), node: c.nodes()[i%2],
			arguments: slices.Concat(listen, []string{"-for", during.String()}, targets),
		})
	}
	c.start(t, namespace, pods...)
	return pods, neighbours
}

// knockAtNewcomers lets each neighbour send to every address that a node leases from now on, until the test ends.
func (c *cluster) knockAtNewcomers(t *testing.T, neighbours []*probePod, knock []string) {
	t.Helper()
	folders := c.leaseFolders(t)
	known := map[string]bool{}
	news := func() []string {
		var found []string
		for _, folder := range folders {
			for _, address := range leased(t, folder) {
				if !known[address] {
					known[address] = true
					found = append(found, target("tcp", address, port), target("udp", address, port))
				}
			}
		}
		return found
	}
	news()
	var knockers []io.Writer
	for _, neighbour := range neighbours {
		process := c.startInPod(t, neighbour.namespace, neighbour.name, append([]string{probeFolder + "/probe"}, knock...)...)
		knockers = append(knockers, process.in)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	go func() { done <- tellEach(ctx, knockers, news) }()
}

// tellEach writes news to all writers until the context ends.
func tellEach(ctx context.Context, writers []io.Writer, news func() []string) error {
	ticker := time.NewTicker(10 * time.Millisecond)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		for _, line := range news() {
			for _, w := range writers {
				if _, err := fmt.Fprintln(w, line); err != nil {
					return fmt.Errorf("telling a neighbour of a new pod: %w", err)
				}
			}
		}
	}
}

// leaseFolders are where the nodes keep their pods' addresses, as this machine sees them.
func (c *cluster) leaseFolders(t *testing.T) []string {
	t.Helper()
	var folders []string
	for _, node := range c.nodes() {
		process := strings.TrimSpace(run(t, command{name: "docker", args: []string{"inspect", "--format", "{{.State.Pid}}", node}}))
		folders = append(folders, filepath.Join("/proc", process, "root/run/warren/ipam"))
	}
	return folders
}

// leased returns the addresses that a folder has leases of: the names of its files.
func leased(t *testing.T, folder string) []string {
	files, err := os.ReadDir(folder)
	if err != nil {
		t.Error(err)
	}
	var addresses []string
	for _, file := range files {
		if _, err = netip.ParseAddr(file.Name()); err == nil {
			addresses = append(addresses, file.Name())
		}
	}
	return addresses
}

// meetings returns who has heard whom.
func (c *cluster) meetings(ctx context.Context, t *testing.T, groups ...[]*probePod) map[meeting]bool {
	t.Helper()
	met := map[meeting]bool{}
	for _, pod := range slices.Concat(groups...) {
		maps.Copy(met, c.heardBy(ctx, t, pod))
	}
	return met
}

// heardBy reads what a pod that listens for knocks has printed.
func (c *cluster) heardBy(ctx context.Context, t *testing.T, pod *probePod) map[meeting]bool {
	t.Helper()
	log, err := c.client.CoreV1().Pods(pod.namespace).GetLogs(pod.name, &corev1.PodLogOptions{}).Stream(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() //nolint:errcheck // it was read to its end
	met := map[meeting]bool{}
	for decoder := json.NewDecoder(bufio.NewReader(log)); ; {
		var heard struct{ Network, From string }
		if err = decoder.Decode(&heard); errors.Is(err, io.EOF) {
			return met
		}
		if err != nil {
			t.Fatalf("reading what %s has heard: %v", pod.name, err)
		}
		met[meeting{pod.name, heard.Network, heard.From}] = true
	}
}

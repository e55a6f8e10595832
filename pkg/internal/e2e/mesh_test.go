//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The longest gap of traffic between nodes: across a change of a node's key, in which some packets may be lost that TCP sends again after
// 200 ms, then after 400 ms more, and across the end of the tunnel's process. That is back within 2 s, and a connection that waits for it
// has sent again until then after 0.2, 0.6 and 1.4 s, and does next after 3 s.
const (
	rotationGap = 2 * time.Second
	tunnelGap   = 4 * time.Second
)

// testMesh asks the mesh to prove itself, and does to it what operators and faults do.
func (c *cluster) testMesh(t *testing.T) {
	const namespace = "e2e-mesh"
	c.namespace(t, namespace)
	near, far := &probePod{name: "near", node: c.worker}, &probePod{name: "far", node: c.controlPlane}
	c.start(t, namespace, near, far)
	target := hostPort(far.addresses[0], port)

	t.Run("verify", func(t *testing.T) {
		for _, node := range c.nodes() {
			c.verify(t, node)
		}
	})
	t.Run("rotate key", func(t *testing.T) {
		before, err := c.status(t.Context(), c.worker)
		if err != nil {
			t.Fatal(err)
		}
		c.interrupted(t, c.startFlows(t, namespace, near.name, flowsEach, target), rotationGap, func() {
			t.Log(c.warrend(t, c.worker, "rotate-key", "--wait"))
		})
		after, err := c.status(t.Context(), c.worker)
		if err != nil || after.Encryption.PublicKey == before.Encryption.PublicKey {
			t.Errorf("the key is still %s (%v)", after.Encryption.PublicKey, err)
		}
	})
	t.Run("tunnel killed", func(t *testing.T) {
		c.interrupted(t, c.startFlows(t, namespace, near.name, flowsEach, target), tunnelGap, func() {
			// The newest process is the one that carries the packets; the older one starts it again.
			const newest = "pgrep --newest --full '[w]arrend tunnel'"
			before := onNode(t, c.worker, "pid=$("+newest+"); kill -9 $pid; echo $pid")
			eventually(t, time.Minute, "there is another tunnel", func(ctx context.Context) error {
				now, err := try(ctx, command{name: "docker", args: []string{"exec", c.worker, "sh", "-c", newest}})
				if err == nil && now == before {
					err = fmt.Errorf("the tunnel's process is still %q", now)
				}
				return err
			})
		})
	})
	t.Run("annotation", c.testAnnotation)
	eventually(t, time.Minute, "the nodes are well", c.healthy)
}

// interrupted lets flows run across an event and holds that none breaks, that nothing passes in clear and that none is silent for longer.
func (c *cluster) interrupted(t *testing.T, load *flows, longest time.Duration, event func()) {
	t.Helper()
	c.watch(t, func(string) {
		event()
		since := time.Now() //nolint:forbidigo // the flows' clock is the same
		eventually(t, time.Minute, "messages come on every flow", func(context.Context) error {
			for protocol, r := range load.report(t) {
				if !r.Silent.After(since) {
					return fmt.Errorf("a flow of %s is silent", protocol)
				}
			}
			return nil
		})
	})
	for protocol, r := range load.stop(t) {
		gap := r.LongestGapNanoseconds.Round(time.Millisecond)
		t.Logf("%s: %d of %d messages, %d errors, longest gap %v", protocol, r.Received, r.Sent, r.Errors, gap)
		if gap > longest || protocol == "tcp" && r.Errors > 0 {
			t.Errorf("%s: want no errors and no gap above %v; first error: %q", protocol, longest, r.FirstError)
		}
	}
}

// verify has a node prove that its traffic is encrypted.
func (c *cluster) verify(t *testing.T, node string) {
	t.Helper()
	var proof struct {
		Conclusion string `json:"conclusion"`
	}
	out := c.warrend(t, node, "verify", "--duration", "5s", "-o", "json")
	if err := json.Unmarshal([]byte(out), &proof); err != nil || proof.Conclusion != "proven" {
		t.Errorf("node %s: %v: %s", node, err, out)
	}
}

// warrend runs a command of the operator's in the daemon's container of a node.
func (c *cluster) warrend(t *testing.T, node string, args ...string) string {
	t.Helper()
	pods, err := c.daemonPods(t.Context(), system, daemonSet)
	if err != nil {
		t.Fatal(err)
	}
	exec := []string{"exec", "--namespace", system, pods[node].Name, "--container", daemon, "--", "warrend"}
	return run(t, command{name: c.tool("kubectl"), args: append(exec, args...)})
}

// testAnnotation has a node mend what somebody did to its own annotations.
func (c *cluster) testAnnotation(t *testing.T) {
	const key = "warren.cni/wireguard-public-key"
	before, err := c.annotation(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range []string{key + "-", key + "=" + strings.Repeat("A", 43) + "="} {
		c.kubectl(t, "annotate", "node", c.worker, "--overwrite", change)
		eventually(t, 5*time.Second, "the annotation is as it was", func(ctx context.Context) error {
			now, err := c.annotation(ctx, key)
			if err == nil && now != before {
				err = fmt.Errorf("it is %q", now)
			}
			return err
		})
	}
}

// annotation returns an annotation of the worker's Node.
func (c *cluster) annotation(ctx context.Context, name string) (string, error) {
	node, err := c.client.CoreV1().Nodes().Get(ctx, c.worker, metav1.GetOptions{})
	if err != nil {
		return "", err
	}
	return node.Annotations[name], nil
}

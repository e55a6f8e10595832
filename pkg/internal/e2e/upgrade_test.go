//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// upgradeFlows is how many flows there are over TCP and over UDP to each address: few, so that none of the probes beside them is lost.
const upgradeFlows = 5

// edition is a version of Warren that can be installed: the environment of scripts/kind/install.sh for it, and its image.
type edition struct {
	name, image string
	env         []string
}

// testUpgrade downgrades one node after the other to an older version and upgrades them again, so that both versions run beside one
// another twice. After each change every pod works, those that the other version has made among them, under their policies and encrypted,
// and pods can be made and deleted. Connections last through all of it.
func (c *cluster) testUpgrade(t *testing.T) {
	const namespace = "e2e-upgrade"
	c.namespace(t, namespace)
	older := edition{"the older version", "warren:older", []string{
		"TAG=older", "MANIFESTS=" + c.root + "/build/older/manifests", "IMAGE_ARCHIVE=" + c.root + "/build/older/warren-image.tar",
	}}
	newer := edition{"this version", "warren:dev", nil}

	friend, label := map[string]string{"friend": "yes"}, map[string]string{"app": "closed"}
	near, far := &probePod{name: "near", node: c.worker}, &probePod{name: "far", node: c.controlPlane}
	pods := []*probePod{
		near,
		far,
		{name: "friend", node: c.worker, labels: friend},
		{name: "closed-far", node: c.controlPlane, labels: label},
		{name: "closed-near", node: c.worker, labels: label},
	}
	c.start(t, namespace, pods...)
	c.apply(t, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed}
spec:
  podSelector: {matchLabels: {app: closed}}
  ingress: [{from: [{podSelector: {matchLabels: {friend: 'yes'}}}]}]
`, "--namespace", namespace)
	load := c.startFlows(t, namespace, near.name, upgradeFlows, hostPort(far.addresses[0], port), hostPort(far.addresses[1], port))
	defer c.install(t) // with the usual way to replace pods
	for i, change := range []struct {
		node string
		to   edition
	}{{c.worker, older}, {c.controlPlane, older}, {c.worker, newer}, {c.controlPlane, newer}} {
		t.Run(change.node+" to "+change.to.name, func(t *testing.T) {
			c.change(t, change.node, change.to)
			made := &probePod{name: fmt.Sprintf("made-%d", i), node: change.node, labels: friend}
			c.start(t, namespace, made)
			pods = append(pods, made)
			table := upgradeTable(pods)
			c.watch(t, func(marker string) {
				eventually(t, time.Minute, "the pods reach one another as before", func(ctx context.Context) error {
					return c.compare(ctx, table, marker)
				})
			})
			if i > 0 { // made by the other version, or before a change of the other node
				c.deleteNow(t, namespace, fmt.Sprintf("made-%d", i-1))
				pods = append(pods[:len(pods)-2:len(pods)-2], made)
			}
		})
	}
	c.balances(t)
	for network, r := range load.stop(t) {
		t.Logf("%s: %d flows, %d of %d messages, %d errors, longest gap %v",
			network, r.Flows, r.Received, r.Sent, r.Errors, r.LongestGapNanoseconds.Round(time.Millisecond))
		if r.Flows != families*upgradeFlows || network == "tcp" && r.Errors != 0 || now().Sub(r.Silent) > 10*time.Second {
			t.Errorf("%s: want every flow to last; first error: %q", network, r.FirstError)
		}
	}
}

// change gives a node another version, the daemon's and the tunnel's, and waits until it is well.
func (c *cluster) change(t *testing.T, node string, to edition) {
	t.Helper()
	run(t, command{name: c.root + "/scripts/kind/install.sh", env: append(to.env, "UPDATE=OnDelete"), timeout: 5 * time.Minute})
	for _, set := range []string{daemonSet, tunnelSet} {
		before, err := c.daemonPods(t.Context(), system, set)
		if err != nil {
			t.Fatal(err)
		}
		c.deleteNow(t, system, before[node].Name)
		eventually(t, 2*time.Minute, node+" has "+set+" of "+to.name, func(ctx context.Context) error {
			pods, err := c.daemonPods(ctx, system, set)
			if err != nil {
				return err
			}
			pod, found := pods[node]
			if !found || !podReady(&pod) || !strings.HasSuffix(pod.Spec.Containers[0].Image, to.image) {
				return fmt.Errorf("there is %s with image %q, ready is %v", pod.Name, images(pod), podReady(&pod))
			}
			return nil
		})
	}
	eventually(t, time.Minute, "both daemons are well", c.healthy)
	status, err := c.status(t.Context(), node)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s runs %s", node, status.Version)
	if isOlder := strings.HasPrefix(status.Version, "older-"); isOlder != (to.env != nil) {
		t.Errorf("node %s runs version %s", node, status.Version)
	}
}

// images are those of a pod's containers.
func images(pod corev1.Pod) (all []string) {
	for _, container := range pod.Spec.Containers {
		all = append(all, container.Image)
	}
	return all
}

// deleteNow deletes a pod and waits until it is gone.
func (c *cluster) deleteNow(t *testing.T, namespace, name string) {
	t.Helper()
	c.kubectl(t, "delete", "pod", "--namespace", namespace, name)
}

// upgradeTable says who reaches whom: everybody all but the closed pods, which are open to friends alone.
func upgradeTable(pods []*probePod) reachTable {
	table := reachTable{}
	for _, from := range pods {
		for _, to := range pods {
			if from != to {
				table.set(from.namespace+"/"+from.name, to, to.labels["app"] != "closed" || from.labels["friend"] == "yes")
			}
		}
	}
	return table
}

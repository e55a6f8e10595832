//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// testInstall shows that a node is Ready only once Warren is up on it, and installs Warren.
func (c *cluster) testInstall(t *testing.T) {
	if err := c.nodesReady(t.Context(), corev1.ConditionFalse); err != nil {
		t.Fatalf("before Warren: %v", err)
	}
	if err := c.dnsReady(t.Context()); err == nil {
		t.Fatal("CoreDNS runs before there is a network")
	}
	for _, node := range c.nodes() {
		run(t, command{name: "docker", stdin: bare(t, node), args: []string{"exec", "--interactive", node, "sh", "-c", "cat >" + bareFile}})
	}
	c.install(t)

	// Pods may now run on the control plane too, so that the upstream suite crosses nodes.
	c.kubectl(t, "taint", "nodes", c.controlPlane, "node-role.kubernetes.io/control-plane-")
	for _, node := range c.nodes() {
		c.checkConflist(t, node)
		c.checkMesh(t, node)
	}
}

// install installs Warren and waits until the cluster works.
func (c *cluster) install(t *testing.T) {
	t.Helper()
	run(t, command{name: c.root + "/scripts/kind/install.sh", timeout: 5 * time.Minute})
	c.rolledOut(t)
	eventually(t, time.Minute, "the nodes are Ready", func(ctx context.Context) error { return c.nodesReady(ctx, corev1.ConditionTrue) })
	eventually(t, time.Minute, "CoreDNS runs", c.dnsReady)
}

// dnsReady returns an error unless CoreDNS has a ready pod.
func (c *cluster) dnsReady(ctx context.Context) error {
	deployment, err := c.client.AppsV1().Deployments("kube-system").Get(ctx, "coredns", metav1.GetOptions{})
	if err != nil {
		return err
	}
	if deployment.Status.ReadyReplicas == 0 {
		return fmt.Errorf("deployment coredns has no ready pod of %d", deployment.Status.Replicas)
	}
	return nil
}

// checkConflist checks that the reference plugins follow ours in the chain.
func (c *cluster) checkConflist(t *testing.T, node string) {
	t.Helper()
	text := run(t, command{name: "docker", args: []string{"exec", node, "cat", "/etc/cni/net.d/10-warren.conflist"}})
	var list struct{ Plugins []struct{ Type string } }
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		t.Fatalf("node %s: reading the conflist: %v", node, err)
	}
	var types []string
	for _, plugin := range list.Plugins {
		types = append(types, plugin.Type)
	}
	if want := []string{"warren", "portmap", "bandwidth"}; !slices.Equal(types, want) {
		t.Errorf("node %s: the conflist chains %v, want %v", node, types, want)
	}
}

// checkMesh checks that the daemon of a node has the other node as its peer, and has encryption on.
func (c *cluster) checkMesh(t *testing.T, node string) {
	t.Helper()
	status, err := c.status(t.Context(), node)
	if err != nil {
		t.Fatal(err)
	}
	if len(status.Peers) != len(c.nodes())-1 || status.Peers[0].Node == node || len(status.Peers[0].AllowedIPs) == 0 {
		t.Errorf("node %s: peers %+v", node, status.Peers)
	}
	if mode := status.Encryption.Mode; mode != "kernel" && mode != "userspace" {
		t.Errorf("node %s: encryption is %q", node, mode)
	}
	t.Logf("node %s: encryption by the %s device, MTU %d", node, status.Encryption.Mode, status.Encryption.MTU)
}

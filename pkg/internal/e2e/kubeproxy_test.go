//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// testKubeProxyNFTables lets kube-proxy use nftables, which all parts before had in iptables mode, and runs again what passes
// by its rules.
func (c *cluster) testKubeProxyNFTables(t *testing.T) {
	defer c.setKubeProxyMode(t, "iptables")
	c.setKubeProxyMode(t, "nftables")
	t.Run("pods", c.testPods)
	t.Run("own service", c.testOwnService)
	t.Run("tiers", c.testTiers)
	t.Run("forward", c.testForward)
	t.Run("cut", c.testCut)
	t.Run("upstream", c.testSomeUpstream)
}

// proxyMode is the line of kube-proxy's configuration that says its mode.
var proxyMode = regexp.MustCompile(`(?m)^mode: .*$`)

// setKubeProxyMode restarts kube-proxy in a mode and waits until its rules are of that kind only, on both nodes.
func (c *cluster) setKubeProxyMode(t *testing.T, mode string) {
	t.Helper()
	maps := c.client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	config, err := maps.Get(t.Context(), "kube-proxy", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	const file = "config.conf"
	if !proxyMode.MatchString(config.Data[file]) {
		t.Fatalf("kube-proxy's configuration names no mode:\n%s", config.Data[file])
	}
	config.Data[file] = proxyMode.ReplaceAllString(config.Data[file], "mode: "+mode)
	if _, err = maps.Update(t.Context(), config, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.kubectl(t, "rollout", "restart", "--namespace", metav1.NamespaceSystem, "daemonset/kube-proxy")
	c.kubectl(t, "rollout", "status", "--namespace", metav1.NamespaceSystem, "daemonset/kube-proxy", "--timeout=120s")
	for _, node := range c.nodes() {
		eventually(t, time.Minute, node+" has kube-proxy's rules in mode "+mode, func(ctx context.Context) error {
			modes, err := proxyModes(ctx, node)
			if err == nil && modes != mode {
				err = fmt.Errorf("it has rules of %q", modes)
			}
			return err
		})
	}
}

// proxyModes names the modes of kube-proxy's rules on a node.
func proxyModes(ctx context.Context, node string) (string, error) {
	const script = `
		iptables-save | grep -q -- "-j KUBE-SVC" && echo iptables
		nft list tables | grep -q kube-proxy && echo nftables
		true`
	modes, err := try(ctx, command{name: "docker", args: []string{"exec", node, "sh", "-c", script}})
	return strings.TrimSpace(modes), err
}

// testOwnService lets a pod that may reach nothing reach itself through its own Service.
func (c *cluster) testOwnService(t *testing.T) {
	const namespace = "e2e-own"
	c.namespace(t, namespace)
	label := map[string]string{"app": "own"}
	own, other := &probePod{name: "own", node: c.worker, labels: label}, &probePod{name: "other", node: c.worker}
	c.start(t, namespace, own, other)
	addresses := c.startService(t, namespace, "own", label, own.name, other.name)
	table := reachTable{}
	table.set(namespace+"/own", other, false)
	table.set(namespace+"/other", own, false)
	for _, address := range addresses {
		for _, network := range []string{"tcp", "udp"} {
			table[namespace+"/own"][target(network, address, port)] = true
			table[namespace+"/other"][target(network, address, port)] = false
		}
	}
	c.applyExample(t, namespace, "deny-all.yaml")
	eventually(t, time.Minute, "the pod reaches only itself", func(ctx context.Context) error {
		return c.compare(ctx, table, newMarker(t))
	})
}

// testForward shows that what other programs do to the chain FORWARD of the filter table changes nothing: neither an ACCEPT
// ahead of everything opens what a policy denies, nor does the policy DROP stop what nothing denies.
func (c *cluster) testForward(t *testing.T) {
	const namespace = "e2e-forward"
	c.namespace(t, namespace)
	near, far := &probePod{name: "near", node: c.worker}, &probePod{name: "far", node: c.controlPlane}
	label := map[string]string{"app": "closed"}
	closed := &probePod{name: "closed", node: c.worker, labels: label}
	c.start(t, namespace, near, far, closed)
	services := c.startService(t, namespace, "closed", label, near.name, far.name)
	c.closeToAll(t, namespace)
	table := reachTable{}
	for _, from := range []*probePod{near, far} {
		name := namespace + "/" + from.name
		table.set(name, near, true)
		table.set(name, far, true)
		table.set(name, closed, false)
		for _, address := range services {
			table[name][target("tcp", address, port)], table[name][target("udp", address, port)] = false, false
		}
	}
	for _, other := range []struct{ what, do, undo, met string }{
		{"an ACCEPT ahead of everything", "-I FORWARD -j ACCEPT", "-D FORWARD -j ACCEPT", `^\[[1-9].*-A FORWARD -j ACCEPT$`},
		{"the policy DROP", "-P FORWARD DROP", "-P FORWARD ACCEPT", "^:FORWARD DROP "},
	} {
		t.Run(other.what, func(t *testing.T) {
			for _, node := range c.nodes() {
				t.Cleanup(func() { iptables(context.WithoutCancel(t.Context()), t, node, other.undo) })
				iptables(t.Context(), t, node, other.do)
			}
			c.awaitTable(t, table)
			// It has stood there, and packets have met it.
			onNode(t, c.worker, fmt.Sprintf("iptables-save -c -t filter | grep -E '%[1]s' && ip6tables-save -c -t filter | grep -E '%[1]s'", other.met))
		})
	}
}

// iptables runs iptables and ip6tables on a node.
func iptables(ctx context.Context, t *testing.T, node, arguments string) {
	t.Helper()
	_, err := try(ctx, command{name: "docker", args: []string{
		"exec", node, "sh", "-ec", "iptables -w 10 " + arguments + "; ip6tables -w 10 " + arguments,
	}})
	if err != nil {
		t.Error(err)
	}
}

//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"

	"github.com/warren-cni/warren/pkg/wgdevice"
)

// testUninstall takes Warren away as the README says, checks that nothing of it is left, and installs it again.
func (c *cluster) testUninstall(t *testing.T) {
	for _, node := range c.nodes() {
		if c.leftovers(t, node) == "" {
			t.Fatalf("node %s: nothing of Warren's is found while it runs, so that finding nothing afterwards means nothing", node)
		}
	}
	c.kubectl(t, "delete", "--ignore-not-found", "-f", c.root+"/manifests/warren.yaml", "-f", c.root+"/manifests/userspace-tunnel.yaml")
	c.cleanUp(t)
	for _, node := range c.nodes() {
		if left := c.leftovers(t, node); left != "" {
			t.Errorf("node %s: Warren has left:\n%s", node, left)
		}
		before := onNode(t, node, "cat "+bareFile)
		if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(bare(t, node), "\n")); diff != "" {
			t.Errorf("node %s is not as it was before Warren (-before +after):\n%s", node, diff)
		}
	}
	eventually(t, time.Minute, "no node is Ready", func(ctx context.Context) error { return c.nodesReady(ctx, corev1.ConditionFalse) })

	// Pods that have lost their network must be made again.
	c.kubectl(t, "delete", "pods", "--namespace", "kube-system", "--selector", "k8s-app=kube-dns", "--wait=false")
	c.install(t)
}

// bareFile is where each node keeps what it was like before Warren, for a test that runs alone on a cluster that was kept.
const bareFile = "/opt/warren-e2e-bare"

// bare lists the rules, sets, links, addresses, routes, queues and files of a node, all but those of Kubernetes and of docker, which
// come and go by themselves.
func bare(t *testing.T, node string) string {
	t.Helper()
	return onNode(t, node, `
		for save in iptables-save ip6tables-save; do $save | sed -n "s/ \[[0-9:]*\]$//; s/^\(:[^ ]* -\|-A .*\)$/$save \1/p"; done | grep -vE "KUBE-|DOCKER_"
		ipset list -name | sed "s/^/set /"
		ip -oneline link | sed "s/^[0-9]*: \([^:@]*\).*/link \1/"
		ip -oneline address | awk "{print \$2, \$3, \$4}" | grep -v fe80: | sed "s/^/address /"
		{ ip -4 route show table all; ip -6 route show table all; } | grep -v fe80: | sed "s/^/route /; s/ expires [^ ]*//; s/ *$//"
		{ ip rule; ip -6 rule; } | sed "s/^/policy /"
		ip neigh show nud permanent
		tc qdisc show | sed "s/ *$//"
		find /etc/cni /opt/cni /run/warren /var/lib/warren -mindepth 1 2>/dev/null | sort | sed "s/^/file /"
		true`)
}

// cleanUp runs the clean-up on all nodes, first without each of its capabilities in turn.
func (c *cluster) cleanUp(t *testing.T) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(c.root, "manifests", "cleanup.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	const needed = "add: [NET_ADMIN, NET_RAW]"
	manifest := string(text)
	if strings.Count(manifest, "add:") != 1 || !strings.Contains(manifest, needed) {
		t.Fatalf("manifests/cleanup.yaml: want exactly %q; a check for each capability stands here", needed)
	}
	for _, check := range []capabilityCheck{
		{cleanupNamespace, cleanupSet, "cleanup", "NET_RAW", "rules that match sets", regexp.MustCompile(`rules and sets: .*Can't open socket to ipset`), false},
		{cleanupNamespace, cleanupSet, "cleanup", "NET_ADMIN", "sets, rules and links", regexp.MustCompile(`listing sets: operation not permitted`), false},
	} {
		rest := "add: [NET_RAW]"
		if check.capability == "NET_RAW" {
			rest = "add: [NET_ADMIN]"
		}
		c.apply(t, strings.Replace(manifest, needed, rest, 1))
		c.awaitSymptom(t, check)
	}
	c.apply(t, manifest)
	c.kubectl(t, "rollout", "status", "--namespace", cleanupNamespace, "daemonset/"+cleanupSet, "--timeout=60s")
	c.kubectl(t, "delete", "-f", c.root+"/manifests/cleanup.yaml")
}

// leftovers lists everything of Warren's on a node.
func (c *cluster) leftovers(t *testing.T, node string) string {
	t.Helper()
	script := fmt.Sprintf(`
		iptables-save | grep -i warren
		ip6tables-save | grep -i warren
		ipset list -name | grep -i warren
		ip -oneline link | grep -E "warren|wrn"
		ip route show table all proto %[1]d
		ip -6 route show table all proto %[1]d
		find /etc/cni/net.d /run/warren /var/lib/warren -mindepth 1
		find /opt/cni/bin -name warren
		true`, wgdevice.RouteProtocol)
	return onNode(t, node, script)
}

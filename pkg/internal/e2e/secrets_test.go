//go:build e2e

package e2e

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"net"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/wgdevice"
)

// stateFolder is where the nodes keep their keys.
const stateFolder = "/var/lib/warren"

// testSecrets looks for the nodes' private keys wherever they have no business, and for what listens.
func (c *cluster) testSecrets(t *testing.T) {
	said := c.everythingSaid(t)
	for _, node := range c.nodes() {
		secrets := c.privateKey(t, node)
		for where, text := range said {
			if mentions(text, secrets) {
				t.Errorf("%s tells the private key of %s", where, node)
			}
		}
		// Files, command lines and environments: the file of the key is the only one, which shows that the search finds it.
		pattern := strings.Join(secrets, "\n")
		found := strings.Fields(run(t, command{name: "docker", stdin: pattern, args: []string{"exec", "--interactive", node, "sh", "-c", `
			grep --recursive --files-with-matches --fixed-strings --file=- --devices=skip ` + stateFolder + ` /run/warren /etc/cni /opt/cni /var/lib/cni /var/log /etc/kubernetes`}}))
		if want := []string{path.Join(stateFolder, wgdevice.KeyFile)}; !slices.Equal(found, want) {
			t.Errorf("node %s has the private key in %q, want %q", node, found, want)
		}
		c.checkListeners(t, node)
	}
}

// privateKey returns the ways in which a node's private key could be written, and checks who may read it.
func (c *cluster) privateKey(t *testing.T, node string) []string {
	t.Helper()
	for line := range strings.Lines(onNode(t, node, "stat -c '%a %u %g %n' "+stateFolder+"/*")) {
		if !strings.HasPrefix(line, "600 0 0 ") {
			t.Errorf("node %s: others may read the key: %s", node, line)
		}
	}
	text := strings.TrimSpace(onNode(t, node, "cat "+path.Join(stateFolder, wgdevice.KeyFile)))
	key, err := base64.StdEncoding.DecodeString(text)
	if err != nil || len(key) != 32 {
		t.Fatalf("node %s has no key: %v", node, err)
	}
	return []string{
		strings.TrimRight(text, "="), strings.TrimRight(base64.URLEncoding.EncodeToString(key), "="),
		hex.EncodeToString(key), strings.ToUpper(hex.EncodeToString(key)),
	}
}

// mentions tells whether a text holds one of the secrets.
func mentions(text string, secrets []string) bool {
	return slices.ContainsFunc(secrets, func(secret string) bool { return strings.Contains(text, secret) })
}

// everythingSaid collects what others than root can read: logs, metrics, and the API's objects.
func (c *cluster) everythingSaid(t *testing.T) map[string]string {
	t.Helper()
	said := map[string]string{}
	kubectl := func(args ...string) string {
		t.Helper()
		return run(t, command{name: c.tool("kubectl"), args: args})
	}
	said["the API"] = kubectl("get", "--all-namespaces", "--output", "json",
		"nodes,pods,daemonsets,controllerrevisions,configmaps,secrets,events,networkpolicies,leases.coordination.k8s.io")
	for _, set := range []string{daemonSet, tunnelSet} {
		pods, err := c.daemonPods(t.Context(), system, set)
		if err != nil {
			t.Fatal(err)
		}
		for node, pod := range pods {
			said["the log of "+set+" on "+node] = kubectl("logs", "--namespace", system, pod.Name, "--all-containers")
		}
	}
	for _, node := range c.nodes() {
		said["metrics of "+node] = onNode(t, node, "curl --silent --show-error --fail http://127.0.0.1:9476/metrics")
		said["the status of "+node] = c.warrend(t, node, "status", "-o", "json")
	}
	for where, text := range said {
		if len(text) < 100 {
			t.Errorf("%s says only %q", where, text)
		}
	}
	return said
}

// process matches the number of a socket's process as ss prints it.
var process = regexp.MustCompile(`,pid=([0-9]+),`)

// checkListeners checks that of Warren's only WireGuard's port listens beyond loopback. A socket without a process is the kernel's.
func (c *cluster) checkListeners(t *testing.T, node string) {
	t.Helper()
	ours := strings.Fields(onNode(t, node, `
		for process in /proc/[0-9]*; do
			case $(readlink $process/exe) in */warrend) echo ${process#/proc/} ;; esac
		done`))
	open, loopback := map[string]bool{}, 0
	for line := range strings.Lines(onNode(t, node, "ss --no-header --listening --numeric --processes --tcp --udp --sctp")) {
		fields := strings.Fields(line)
		if of := process.FindStringSubmatch(line); of != nil && !slices.Contains(ours, of[1]) {
			continue
		}
		host, number, err := net.SplitHostPort(fields[4])
		if err != nil {
			t.Fatalf("node %s: %v in %q", node, err, line)
		}
		host, _, _ = strings.Cut(host, "%")
		if ip := net.ParseIP(host); ip != nil && ip.IsLoopback() {
			loopback++
			continue
		}
		open[fields[0]+" "+number] = true
	}
	if want := "udp " + strconv.Itoa(wireGuardPort); len(open) != 1 || !open[want] || loopback == 0 {
		t.Errorf("node %s: beyond loopback there listen %v, want %q alone (and %d on loopback)", node, open, want, loopback)
	}
	for _, address := range c.nodeAddresses(t, node) {
		results, err := c.probeFrom(context.WithoutCancel(t.Context()), outside, newMarker(t), target("tcp", address, 9476))
		if err != nil || len(results) != 1 || results[0].Reached || !strings.Contains(results[0].Error, "refused") {
			t.Errorf("the metrics of %s are asked for from outside: %+v, %v", node, results, err)
		}
	}
}

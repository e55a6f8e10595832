//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// nodePort is a port of the nodes that a pod and a Service can both have.
const nodePort = 30081

// testChained holds what the plugins behind ours do, hostPort and bandwidth, against policies.
func (c *cluster) testChained(t *testing.T) {
	t.Run("hostPort", c.testHostPort)
	t.Run("bandwidth", c.testBandwidth)
}

// hostPortStage is a pod with a port of its node, and everybody who may try it.
type hostPortStage struct {
	*cluster
	namespace            string
	served               *probePod
	near, friend, far    string
	ownNode, otherNode   string
	worker, controlPlane []string
}

// testHostPort shows that a pod's port of the node does not go round its ingress policy, in both families, over TCP and UDP: neither
// from pods of the own node and of another, nor from another node, nor from outside of the cluster.
func (c *cluster) testHostPort(t *testing.T) {
	const namespace = "e2e-hostport"
	c.namespace(t, namespace)
	s := &hostPortStage{
		cluster: c, namespace: namespace, ownNode: c.worker, otherNode: c.controlPlane,
		near: namespace + "/near", friend: namespace + "/friend", far: namespace + "/far",
		worker: c.nodeAddresses(t, c.worker), controlPlane: c.nodeAddresses(t, c.controlPlane),
		served: &probePod{name: "served", node: c.worker, labels: map[string]string{"app": "served"}, hostPort: nodePort},
	}
	if len(s.worker) != families {
		t.Fatalf("%s has the addresses %q", c.worker, s.worker)
	}
	friend := map[string]string{"friend": "yes"}
	c.start(t, namespace, s.served, &probePod{name: "near", node: c.worker},
		&probePod{name: "friend", node: c.worker, labels: friend}, &probePod{name: "far", node: c.controlPlane, labels: friend})
	all := []string{s.near, s.friend, s.far, s.otherNode, outside}
	t.Run("no policy", func(t *testing.T) { s.reached(t, all...) })
	t.Run("deny all", func(t *testing.T) {
		s.policy(t, "[]")
		s.reached(t)
		t.Run("a pod that starts", func(t *testing.T) {
			c.kubectl(t, "delete", "pod", "--namespace", namespace, s.served.name)
			s.served.addresses = nil
			c.start(t, namespace, s.served)
			if err := c.compare(t.Context(), s.table(), newMarker(t)); err != nil {
				t.Error(err)
			}
		})
		t.Run("a Service comes first", s.testServiceFirst)
	})
	t.Run("pods", func(t *testing.T) {
		// What comes from another node has that node's address: its friends are not known by their labels.
		s.policy(t, "[{from: [{podSelector: {matchLabels: {friend: 'yes'}}}]}]")
		s.reached(t, s.friend)
	})
	t.Run("addresses", func(t *testing.T) {
		s.policy(t, "[{from: ["+blocks(t, s.controlPlane)+"]}]")
		s.reached(t, s.far, s.otherNode)
		s.policy(t, "[{from: ["+blocks(t, s.bridgeAddresses(t))+"]}]")
		s.reached(t, outside)
	})
	t.Run("no policy any more", func(t *testing.T) { s.reached(t, all...) })
}

// testServiceFirst has a Service on the same port of the node as a pod: the pod does not take over what is the Service's
// (CVE-2019-9946).
func (s *hostPortStage) testServiceFirst(t *testing.T) {
	c := s.cluster
	label := map[string]string{"app": "behind-service"}
	c.start(t, s.namespace, &probePod{name: "behind-service", node: c.worker, labels: label})
	dual := corev1.IPFamilyPolicyPreferDualStack
	services := c.client.CoreV1().Services(s.namespace)
	_, err := services.Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "same-port"},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeNodePort, Selector: label, IPFamilyPolicy: &dual,
			Ports: []corev1.ServicePort{{Protocol: corev1.ProtocolTCP, Port: port, NodePort: nodePort}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	table := s.table()
	for _, targets := range table {
		for name := range targets {
			targets[name] = targets[name] || strings.HasPrefix(name, "tcp/")
		}
	}
	eventually(t, time.Minute, "the Service has the port", func(ctx context.Context) error { return c.compare(ctx, table, newMarker(t)) })
	if err = services.Delete(t.Context(), "same-port", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	s.reached(t)
}

// policy lets in to the pod what the rules say, until the test ends.
func (s *hostPortStage) policy(t *testing.T, ingress string) {
	t.Helper()
	s.apply(t, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: served}
spec: {podSelector: {matchLabels: {app: served}}, policyTypes: [Ingress], ingress: `+ingress+`}
`, "--namespace", s.namespace)
}

// reached waits until the sources named, the pod's own node and the pod itself reach it by its port of the node, and no other.
func (s *hostPortStage) reached(t *testing.T, by ...string) {
	t.Helper()
	table := s.table(by...)
	eventually(t, time.Minute, "the port of the node is open to who may use it", func(ctx context.Context) error {
		return s.compare(ctx, table, newMarker(t))
	})
}

// table says who reaches the port of the node: those named, and its own node.
func (s *hostPortStage) table(by ...string) reachTable {
	table := reachTable{}
	for _, from := range []string{s.near, s.friend, s.far, s.otherNode, outside, s.ownNode} {
		table[from] = map[string]bool{}
		for _, address := range s.worker {
			for _, network := range []string{"tcp", "udp"} {
				table[from][target(network, address, nodePort)] = from == s.ownNode
			}
		}
	}
	for _, from := range by {
		for name := range table[from] {
			table[from][name] = true
		}
	}
	return table
}

// nodeAddresses returns a node's InternalIPs.
func (c *cluster) nodeAddresses(t *testing.T, name string) []string {
	t.Helper()
	node, err := c.client.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var addresses []string
	for _, address := range node.Status.Addresses {
		if address.Type == corev1.NodeInternalIP {
			addresses = append(addresses, address.Address)
		}
	}
	return addresses
}

// bridgeAddresses are this machine's on the nodes' network.
func (c *cluster) bridgeAddresses(t *testing.T) []string {
	t.Helper()
	bridge, err := net.InterfaceByName(c.bridge)
	if err != nil {
		t.Fatal(err)
	}
	list, err := bridge.Addrs()
	if err != nil {
		t.Fatal(err)
	}
	var addresses []string
	for _, one := range list {
		if prefix, err := netip.ParsePrefix(one.String()); err == nil && !prefix.Addr().IsLinkLocalUnicast() {
			addresses = append(addresses, prefix.Addr().String())
		}
	}
	return addresses
}

// blocks are peers of a policy, one for each address.
func blocks(t *testing.T, addresses []string) string {
	t.Helper()
	var list []string
	for _, text := range addresses {
		address, err := netip.ParseAddr(text)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, fmt.Sprintf("{ipBlock: {cidr: %q}}", netip.PrefixFrom(address, address.BitLen())))
	}
	return strings.Join(list, ", ")
}

// The limit of the test of bandwidth in megabits and bytes a second; how many bytes pass before it holds, because containerd asks for
// a burst of 2^31 bits, which the queue holds twice; and more than pass at once after a pause.
const (
	limitMegabits = 40
	limitBytes    = limitMegabits * 1_000_000 / 8
	burstBytes    = 2 * (1 << 31 / 8)
	pauseBytes    = 4 * limitBytes
)

// testBandwidth shows that a pod's limits hold, both ways, for who may reach it, on its own node and from another, and that a policy
// keeps out all others.
func (c *cluster) testBandwidth(t *testing.T) {
	const namespace = "e2e-bandwidth"
	c.namespace(t, namespace)
	friend := map[string]string{"friend": "yes"}
	near, far := &probePod{name: "near", node: c.worker, labels: friend}, &probePod{name: "far", node: c.controlPlane, labels: friend}
	stranger := &probePod{name: "stranger", node: c.worker}
	limited := &probePod{name: "limited", node: c.worker, bandwidth: strconv.Itoa(limitMegabits) + "M"}
	free := &probePod{name: "free", node: c.worker}
	c.start(t, namespace, near, far, stranger, limited, free)
	c.apply(t, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends}
spec:
  podSelector: {matchExpressions: [{key: friend, operator: DoesNotExist}]}
  ingress: [{from: [{podSelector: {matchLabels: {friend: 'yes'}}}]}]
`, "--namespace", namespace)
	table := reachTable{}
	for _, from := range []*probePod{near, far, stranger} {
		table.set(namespace+"/"+from.name, limited, from != stranger)
		table.set(namespace+"/"+from.name, free, from != stranger)
	}
	c.awaitTable(t, table)
	if rules := onNode(t, c.worker, "tc qdisc show"); strings.Count(rules, fmt.Sprintf("rate %dMbit", limitMegabits)) < 2 {
		t.Errorf("there are no two limits, one each way:\n%s", rules)
	}
	unlimited := c.pour(t, namespace, far.name, hostPort(free.addresses[0], port), 0)
	c.pour(t, namespace, near.name, hostPort(limited.addresses[0], port), burstBytes)
	for _, address := range limited.addresses {
		for _, from := range []*probePod{near, far} {
			rate := c.pour(t, namespace, from.name, hostPort(address, port), pauseBytes)
			t.Logf("%s to %s: %.1f MB/s; the limit is %.1f MB/s, and without one there were %.1f MB/s", from.name, address, rate/1e6, limitBytes/1e6, unlimited/1e6)
			if rate > 1.5*limitBytes || rate < 0.3*limitBytes || unlimited < 2*limitBytes {
				t.Error("want the limit to hold, and nothing else to be in the way")
			}
		}
	}
	if err := c.compare(t.Context(), table, newMarker(t)); err != nil {
		t.Error(err)
	}
}

// pour lets a pod send to another as fast as it can after a head start, and returns how many bytes a second came back.
func (c *cluster) pour(t *testing.T, namespace, pod, address string, head int64) float64 {
	t.Helper()
	out := run(t, command{name: c.tool("kubectl"), args: []string{
		"exec", "--namespace", namespace, pod, "--", probeFolder + "/probe", "pour", "-head", strconv.FormatInt(head, 10), "-for", "4s", address,
	}, timeout: 3 * time.Minute})
	var result struct{ Bytes, ElapsedNanoseconds int64 }
	if err := json.Unmarshal([]byte(out), &result); err != nil || result.ElapsedNanoseconds == 0 {
		t.Fatalf("reading what the probe printed: %q, %v", out, err)
	}
	return float64(result.Bytes) / time.Duration(result.ElapsedNanoseconds).Seconds()
}

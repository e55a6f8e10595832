//go:build e2e

package e2e

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// port is where most probes serve.
const port = 8080

// probePod is a pod that serves and sends probes.
type probePod struct {
	name, node string
	// namespace is known once the pod was made.
	namespace string
	labels    map[string]string
	// bandwidth is the most that the pod may receive, and the most that it may send; no limit if empty.
	bandwidth string
	// port is where it serves; 8080 if zero.
	port int32
	// hostPort is a port of the node that leads to the pod; none if zero.
	hostPort int32
	// arguments are the probe's; it serves if there are none.
	arguments []string
	// addresses, one a family, are known once the pod runs.
	addresses []string
}

// targets are the pod as targets of probes over a network, tcp or udp.
func (p *probePod) targets(network string) []string {
	var targets []string
	for _, address := range p.addresses {
		targets = append(targets, target(network, address, cmp.Or(p.port, port)))
	}
	return targets
}

// target names what a probe is sent to.
func target(network, host string, port int32) string {
	return network + "/" + hostPort(host, port)
}

// hostPort joins an address and a port.
func hostPort(host string, port int32) string { return net.JoinHostPort(host, strconv.Itoa(int(port))) }

// namespace makes a namespace that goes away with the test.
func (c *cluster) namespace(t *testing.T, name string) {
	t.Helper()
	object := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	// A run before this one on the same cluster may have left a namespace that is still going away.
	eventually(t, 2*time.Minute, "namespace "+name+" exists", func(ctx context.Context) error {
		_, err := c.client.CoreV1().Namespaces().Create(ctx, object, metav1.CreateOptions{})
		return err
	})
	t.Cleanup(func() {
		err := c.client.CoreV1().Namespaces().Delete(context.WithoutCancel(t.Context()), name, metav1.DeleteOptions{})
		if err != nil {
			t.Error(err)
		}
	})
}

// start starts probe pods in a namespace and waits until all serve.
func (c *cluster) start(t *testing.T, namespace string, pods ...*probePod) {
	t.Helper()
	c.create(t, namespace, pods...)
	for _, p := range pods {
		for _, ip := range c.awaitPod(t, namespace, p.name).Status.PodIPs {
			p.addresses = append(p.addresses, ip.IP)
		}
	}
}

// create makes probe pods in a namespace.
func (c *cluster) create(t *testing.T, namespace string, pods ...*probePod) {
	t.Helper()
	for _, p := range pods {
		p.namespace = namespace
		object := c.podObject(p)
		// Pods are refused until the namespace has its ServiceAccount.
		eventually(t, time.Minute, "pod "+p.name+" exists", func(ctx context.Context) error {
			_, err := c.client.CoreV1().Pods(namespace).Create(ctx, object, metav1.CreateOptions{})
			if apierrors.IsAlreadyExists(err) {
				return nil
			}
			return err
		})
	}
}

// awaitPod waits until a pod is Ready.
func (c *cluster) awaitPod(t *testing.T, namespace, name string) *corev1.Pod {
	t.Helper()
	var pod *corev1.Pod
	eventually(t, 2*time.Minute, "pod "+namespace+"/"+name+" is Ready", func(ctx context.Context) error {
		var err error
		pod, err = c.client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if !podReady(pod) {
			return fmt.Errorf("phase %s, containers %+v", pod.Status.Phase, pod.Status.ContainerStatuses)
		}
		return nil
	})
	return pod
}

// podReady tells whether the pod's condition Ready is true.
func podReady(pod *corev1.Pod) bool {
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodReady {
			return condition.Status == corev1.ConditionTrue
		}
	}
	return false
}

// podObject is a pod that serves the probes, on a node of its own choice.
func (c *cluster) podObject(p *probePod) *corev1.Pod {
	grace := int64(0)
	serves := cmp.Or(p.port, port)
	arguments := p.arguments
	if arguments == nil {
		arguments = []string{"serve", "-address", fmt.Sprintf(":%d", serves)}
	}
	var annotations map[string]string
	if p.bandwidth != "" {
		annotations = map[string]string{"kubernetes.io/ingress-bandwidth": p.bandwidth, "kubernetes.io/egress-bandwidth": p.bandwidth}
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: p.name, Labels: p.labels, Annotations: annotations},
		Spec: corev1.PodSpec{
			NodeName:                      p.node,
			TerminationGracePeriodSeconds: &grace,
			Containers: []corev1.Container{{
				Name: "probe", Image: c.agnhost, ImagePullPolicy: corev1.PullIfNotPresent,
				Command: append([]string{probeFolder + "/probe"}, arguments...),
				Ports: []corev1.ContainerPort{
					{ContainerPort: serves, HostPort: p.hostPort, Protocol: corev1.ProtocolTCP},
					{ContainerPort: serves, HostPort: p.hostPort, Protocol: corev1.ProtocolUDP},
				},
				VolumeMounts: []corev1.VolumeMount{{Name: "probe", MountPath: probeFolder, ReadOnly: true}},
				ReadinessProbe: &corev1.Probe{
					ProbeHandler:  corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(serves)}},
					PeriodSeconds: 1, FailureThreshold: 30,
				},
			}},
			Volumes: []corev1.Volume{{
				Name: "probe", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: probeFolder}},
			}},
		},
	}
}

// probeResult is what the probe prints for a target.
type probeResult struct {
	Target  string
	Reached bool
	Error   string
	Silent  bool
}

// newMarker returns 32 random bytes as text that can be an argument.
func newMarker(t *testing.T) string {
	t.Helper()
	random := make([]byte, 16)
	if _, err := rand.Read(random); err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(random)
}

// outside is the source of probes that this machine sends, which is on the nodes' network and no node.
const outside = "outside"

// probe sends the marker from a pod to targets, all at once.
func (c *cluster) probe(ctx context.Context, namespace, pod, marker string, targets ...string) ([]probeResult, error) {
	return c.probeFrom(ctx, namespace+"/"+pod, marker, targets...)
}

// probeFrom sends the marker to targets, all at once, from a pod ("namespace/name"), a node by its name, or outside.
func (c *cluster) probeFrom(ctx context.Context, from, marker string, targets ...string) ([]probeResult, error) {
	program := command{name: "docker", args: []string{"exec", from, probeFolder + "/probe"}}
	if namespace, pod, isPod := strings.Cut(from, "/"); isPod {
		program = command{name: c.tool("kubectl"), args: []string{"exec", "--namespace", namespace, pod, "--", probeFolder + "/probe"}}
	} else if from == outside {
		program = command{name: c.probePath}
	}
	program.args = slices.Concat(program.args, []string{"reach", "-timeout", "3s", "-marker", marker}, targets)
	out, err := try(ctx, program)
	if err != nil {
		return nil, err
	}
	var results []probeResult
	if err = json.Unmarshal([]byte(out), &results); err != nil {
		return nil, fmt.Errorf("reading what the probe in %s printed: %w", from, err)
	}
	return results, nil
}

// reaches checks that a pod reaches all targets.
func (c *cluster) reaches(t *testing.T, namespace, pod, marker string, targets ...string) {
	t.Helper()
	results, err := c.probe(t.Context(), namespace, pod, marker, targets...)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range results {
		if !r.Reached {
			t.Errorf("pod %s/%s does not reach %s: %s", namespace, pod, r.Target, r.Error)
		}
	}
}

// testPods lets pods on both nodes reach each other and a Service, by address and by the name that CoreDNS resolves.
func (c *cluster) testPods(t *testing.T) {
	const namespace = "e2e-pods"
	c.namespace(t, namespace)
	label := map[string]string{"app": "echo"}
	pods := []*probePod{
		{name: "one", node: c.controlPlane, labels: label},
		{name: "two", node: c.controlPlane, labels: label},
		{name: "three", node: c.worker, labels: label},
		{name: "four", node: c.worker, labels: label},
	}
	c.start(t, namespace, pods...)
	for _, node := range c.nodes() {
		c.checkNamespaces(t, node)
	}
	services := c.startService(t, namespace, "echo", label, "one", "three")
	c.watch(t, func(marker string) {
		for _, from := range pods {
			var targets []string
			for _, to := range pods {
				targets = append(targets, slices.Concat(to.targets("tcp"), to.targets("udp"))...)
			}
			for _, host := range append(services, "echo."+namespace, "echo."+namespace+".svc.cluster.local") {
				targets = append(targets, target("tcp", host, port), target("udp", host, port))
			}
			c.reaches(t, namespace, from.name, marker, targets...)
		}
	})
}

// checkNamespaces checks that the daemon of a node sees the names of its pods' network namespaces; else it would take none for gone.
func (c *cluster) checkNamespaces(t *testing.T, node string) {
	t.Helper()
	const (
		onTheNode = ""
		inDaemon  = "/proc/$(pgrep --newest --full '[w]arrend run')/root"
	)
	eventually(t, time.Minute, node+"'s daemon sees the namespaces of the pods", func(ctx context.Context) error {
		var seen [2]string
		for i, root := range []string{onTheNode, inDaemon} {
			script := "ls " + root + "/var/run/netns"
			var err error
			if seen[i], err = try(ctx, command{name: "docker", args: []string{"exec", node, "sh", "-c", script}}); err != nil {
				return err
			}
		}
		if seen[0] != seen[1] || strings.TrimSpace(seen[0]) == "" {
			return fmt.Errorf("on the node:\n%sin the daemon's container:\n%s", seen[0], seen[1])
		}
		return nil
	})
}

// startService makes a Service for the pods with a label, waits until the pods named in from reach it, and returns its
// addresses, one a family.
func (c *cluster) startService(t *testing.T, namespace, name string, selector map[string]string, from ...string) []string {
	t.Helper()
	families := corev1.IPFamilyPolicyPreferDualStack
	service, err := c.client.CoreV1().Services(namespace).Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: corev1.ServiceSpec{Selector: selector, IPFamilyPolicy: &families, Ports: []corev1.ServicePort{
			{Name: "tcp", Protocol: corev1.ProtocolTCP, Port: port}, {Name: "udp", Protocol: corev1.ProtocolUDP, Port: port},
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	served, table := map[string]bool{}, reachTable{}
	for _, address := range service.Spec.ClusterIPs {
		served[target("tcp", address, port)], served[target("udp", address, port)] = true, true
	}
	for _, pod := range from {
		table[namespace+"/"+pod] = served
	}
	eventually(t, 30*time.Second, "kube-proxy serves the Service "+name, func(ctx context.Context) error {
		return c.compare(ctx, table, newMarker(t))
	})
	return service.Spec.ClusterIPs
}

// closeToAll lets nobody in to the pods of a namespace with the label app=closed, until the test ends.
func (c *cluster) closeToAll(t *testing.T, namespace string) {
	t.Helper()
	c.apply(t, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: closed}
spec: {podSelector: {matchLabels: {app: closed}}, policyTypes: [Ingress]}
`, "--namespace", namespace)
}

// testDenied shows that a policy closes a pod to others on both nodes, and only that pod, and that it opens again when
// the policy goes.
func (c *cluster) testDenied(t *testing.T) {
	const namespace = "e2e-denied"
	c.namespace(t, namespace)
	near := &probePod{name: "near", node: c.worker}
	far := &probePod{name: "far", node: c.controlPlane}
	closed := &probePod{name: "closed", node: c.worker, labels: map[string]string{"app": "closed"}}
	c.start(t, namespace, near, far, closed)
	everywhere := reachTable{}
	for _, from := range []*probePod{near, far} {
		for _, to := range []*probePod{near, far, closed} {
			everywhere.set(namespace+"/"+from.name, to, true)
		}
	}
	c.awaitTable(t, everywhere)

	t.Run("with the policy", func(t *testing.T) {
		c.closeToAll(t, namespace)
		denied := reachTable{}
		for _, from := range []*probePod{near, far} {
			denied.set(namespace+"/"+from.name, near, true)
			denied.set(namespace+"/"+from.name, far, true)
			denied.set(namespace+"/"+from.name, closed, false)
		}
		c.awaitTable(t, denied)
	})
	c.awaitTable(t, everywhere)
}

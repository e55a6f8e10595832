//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"strconv"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	// churnRounds is how often the pods come and go.
	churnRounds = 3
	// settle is how long a node may take to clear away what pods have left, an address's time to cool down included.
	settle = 2 * time.Minute
	// families is how many addresses a pod has.
	families = 2
)

// churnPods is how many pods come and go at once on both nodes together.
func churnPods(t *testing.T) int {
	t.Helper()
	pods, err := strconv.Atoi(os.Getenv("CHURN"))
	if err != nil || pods < 2 || pods > 180 {
		t.Fatalf("CHURN=%q: say how many pods come and go, 2 to 180", os.Getenv("CHURN"))
	}
	return pods
}

// testChurn lets pods come and go on both nodes, isolated ones and ones with a limit among them. Each time the nodes hold what the pods
// need, and afterwards as much as before.
func (c *cluster) testChurn(t *testing.T) {
	const namespace = "e2e-churn"
	c.namespace(t, namespace)
	c.apply(t, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: each-other}
spec: {podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: churn}}}]}]}
`, "--namespace", namespace)
	c.startIdle(t, namespace, 0)
	c.awaitOthersGone(t)
	before := c.balances(t)
	pods, busy := churnPods(t), before
	for round := range churnRounds {
		started := now()
		c.scaleIdle(t, namespace, pods/2)
		up := now()
		busy = c.balances(t)
		for _, node := range c.nodes() {
			if got := busy[node]["lease"] - before[node]["lease"]; got != pods/2*families {
				t.Errorf("node %s has %d leases more than before, want two for each of %d pods", node, got, pods/2)
			}
		}
		if busy[c.worker]["tbf"]-before[c.worker]["tbf"] < pods/2 {
			t.Errorf("the pods on %s have no limits: %v", c.worker, busy[c.worker])
		}
		down := now()
		c.scaleIdle(t, namespace, 0)
		c.checkBalances(t, before)
		t.Logf("round %d: %d pods were up after %v, and gone without a trace after %v",
			round+1, pods, up.Sub(started).Round(time.Second), now().Sub(down).Round(time.Second))
	}
	t.Logf("0 leaks in %v", kinds(busy))
}

// testReboot reboots each node in turn, the worker first: namespaces, links and what is on a tmpfs go, the disk stays. The pods come
// back, under the policies that they had, and each node holds what they need and nothing from before.
func (c *cluster) testReboot(t *testing.T) {
	const namespace = "e2e-reboot"
	c.namespace(t, namespace)
	near, far := &probePod{name: "near", node: c.worker}, &probePod{name: "far", node: c.controlPlane}
	label := map[string]string{"app": "closed"}
	closed := &probePod{name: "closed", node: c.worker, labels: label}
	c.start(t, namespace, near, far, closed)
	c.closeToAll(t, namespace)
	const idle = 10
	c.startIdle(t, namespace, idle)
	c.awaitOthersGone(t)
	before := c.balances(t)
	for _, node := range []string{c.worker, c.controlPlane} {
		t.Run(node, func(t *testing.T) {
			boot := onNode(t, node, "stat -c %Y /proc/1")
			started := now()
			run(t, command{name: "docker", args: []string{"restart", "--time", "1", node}, timeout: 2 * time.Minute})
			if onNode(t, node, "stat -c %Y /proc/1") == boot {
				t.Fatal("the node was not rebooted")
			}
			eventually(t, 3*time.Minute, "the API server answers", func(ctx context.Context) error {
				return c.nodesReady(ctx, corev1.ConditionTrue)
			})
			eventually(t, 3*time.Minute, "the daemons are well", c.healthy)
			c.awaitIdle(t, namespace, idle)
			c.checkBalances(t, before)
			t.Logf("all pods are back after %v", now().Sub(started).Round(time.Second))

			table := reachTable{}
			for _, from := range []*probePod{near, far} {
				for _, to := range []*probePod{near, far, closed} { // their addresses are others now
					to.addresses = nil
					for _, ip := range c.awaitPod(t, namespace, to.name).Status.PodIPs {
						to.addresses = append(to.addresses, ip.IP)
					}
					table.set(namespace+"/"+from.name, to, to != closed)
				}
			}
			c.awaitTable(t, table)
		})
	}
	t.Logf("0 leaks in %v", kinds(before))
}

// awaitOthersGone waits until the namespaces of the tests before are gone, with their pods.
func (c *cluster) awaitOthersGone(t *testing.T) {
	t.Helper()
	eventually(t, 3*time.Minute, "no namespace is going away", func(ctx context.Context) error {
		list, err := c.client.CoreV1().Namespaces().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, namespace := range list.Items {
			if namespace.DeletionTimestamp != nil {
				return fmt.Errorf("namespace %s is still there", namespace.Name)
			}
		}
		return nil
	})
}

// startIdle makes a deployment of idle pods for each node, so many each, and waits until they are up.
func (c *cluster) startIdle(t *testing.T, namespace string, each int) {
	t.Helper()
	image := regexp.MustCompile(`\S+/pause:\S+`).FindString(onNode(t, c.worker, "ctr --namespace k8s.io images ls -q"))
	if image == "" {
		t.Fatal("the nodes have no image of a pod that does nothing")
	}
	for _, node := range c.nodes() {
		labels := map[string]string{"app": "churn", "on": node}
		deployment := &appsv1.Deployment{
			ObjectMeta: metav1.ObjectMeta{Name: node},
			Spec: appsv1.DeploymentSpec{
				Replicas: new(int32(each)),
				Selector: &metav1.LabelSelector{MatchLabels: labels},
				Template: corev1.PodTemplateSpec{
					ObjectMeta: metav1.ObjectMeta{Labels: labels, Annotations: map[string]string{"kubernetes.io/ingress-bandwidth": "20M"}},
					Spec: corev1.PodSpec{
						NodeSelector:                  map[string]string{corev1.LabelHostname: node},
						TerminationGracePeriodSeconds: new(int64(0)),
						AutomountServiceAccountToken:  new(false),
						Containers:                    []corev1.Container{{Name: "pause", Image: image, ImagePullPolicy: corev1.PullIfNotPresent}},
					},
				},
			},
		}
		if _, err := c.client.AppsV1().Deployments(namespace).Create(t.Context(), deployment, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	c.awaitIdle(t, namespace, each)
}

// scaleIdle changes how many idle pods there are on each node, and waits until it is so.
func (c *cluster) scaleIdle(t *testing.T, namespace string, each int) {
	t.Helper()
	c.kubectl(t, "scale", "--namespace", namespace, "deployment", "--all", "--replicas="+strconv.Itoa(each))
	c.awaitIdle(t, namespace, each)
}

// awaitIdle waits until there are so many idle pods on each node, all of them ready, and no other.
func (c *cluster) awaitIdle(t *testing.T, namespace string, each int) {
	t.Helper()
	eventually(t, 10*time.Minute, fmt.Sprintf("%d idle pods run on each node", each), func(ctx context.Context) error {
		pods, err := c.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app=churn"})
		if err != nil {
			return err
		}
		ready := map[string]int{}
		for _, pod := range pods.Items {
			if podReady(&pod) && pod.DeletionTimestamp == nil {
				ready[pod.Spec.NodeName]++
			}
		}
		for _, node := range c.nodes() {
			if ready[node] != each || len(pods.Items) != each*len(c.nodes()) {
				return fmt.Errorf("of %d pods are ready: %v", len(pods.Items), ready)
			}
		}
		return nil
	})
}

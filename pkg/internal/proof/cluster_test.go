// Package proof holds the daemon to what it promises of a real API server whose watches lag, break and are answered with
// errors. What needs no API server is proved beside the daemon.
package proof

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/warren-cni/warren/pkg/internal/apiserver"
	"github.com/warren-cni/warren/pkg/lab"
)

// patience is how long a change may take until it is seen on a busy machine.
const patience = 30 * time.Second

// programs are those under test.
var programs lab.Programs

func TestMain(m *testing.M) { os.Exit(programs.Main(m.Run)) }

// cluster is a real API server, and a node that reaches it.
type cluster struct {
	t      *testing.T
	config *rest.Config
	client kubernetes.Interface
	// flags are the daemons', beside those that all have.
	flags []string
	*member
}

// member is a node with a real daemon, which reaches the API server through a proxy.
type member struct {
	node           *lab.Node
	proxy          *proxy
	tunnel, daemon *lab.Process
}

// newCluster starts all of it, the daemon with further flags. There are three Nodes, of which one is there.
func newCluster(t *testing.T, name string, flags ...string) *cluster {
	t.Helper()
	c := newServer(t)
	c.flags = flags
	c.member = c.start(c.newLab(name, 1).Nodes[0], 0)
	return c
}

// newServer starts the API server, which has three Nodes.
func newServer(t *testing.T) *cluster {
	t.Helper()
	config := apiserver.Start(t).Admin()
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, config: config, client: client}
	for _, number := range []int{1, 2, 3} {
		c.createNode(number)
	}
	return c
}

// newLab makes nodes on which nothing runs yet.
func (c *cluster) newLab(name string, nodes int) *lab.Lab {
	c.t.Helper()
	binaries, err := programs.Dir(context.WithoutCancel(c.t.Context()))
	if err != nil {
		c.t.Fatal(err)
	}
	network, err := lab.New(c.t.Context(), lab.Options{
		Name: name, Dir: c.t.TempDir(), Nodes: nodes, Warrend: filepath.Join(binaries, "warrend"), Plugins: []string{binaries}, WireGuard: lab.TestedWireGuard(),
	})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		if err := network.Close(c.t.Context()); err != nil {
			c.t.Error(err)
		}
	})
	return network
}

// start starts tunnel and daemon of a node and waits until pods can be attached, and until it knows that many others.
func (c *cluster) start(node *lab.Node, peers int) *member {
	c.t.Helper()
	m := &member{node: node, proxy: newProxy(c.t, c.config, node.Do)}
	var err error
	if m.tunnel, err = node.StartTunnel(c.t.Context()); err != nil {
		c.t.Fatal(err)
	}
	c.startDaemon(m)
	c.t.Cleanup(func() {
		if c.t.Failed() {
			c.t.Logf("the log of the daemon ends in:\n%s", m.daemon.Log(40))
		}
	})
	if err = node.Ready(c.t.Context(), m.daemon, peers); err != nil {
		c.t.Fatal(err)
	}
	return m
}

// startDaemon starts a node's daemon and does not wait for it.
func (c *cluster) startDaemon(m *member) {
	c.t.Helper()
	flags := append([]string{"--log-level", "debug", "--objects", "", "--kubeconfig", m.proxy.kubeconfig}, c.flags...)
	var err error
	m.daemon, err = m.node.StartDaemon(c.t.Context(), nil, flags...)
	if err != nil {
		c.t.Fatal(err)
	}
}

// createNode creates the object of a node of the lab's numbering.
func (c *cluster) createNode(number int) {
	c.t.Helper()
	node, err := c.client.CoreV1().Nodes().Create(c.t.Context(), &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("node-%d", number)},
		Spec: corev1.NodeSpec{
			PodCIDR:  fmt.Sprintf("10.244.%d.0/24", number),
			PodCIDRs: []string{fmt.Sprintf("10.244.%d.0/24", number), fmt.Sprintf("fd00:10:244:%d::/64", number)},
		},
	}, metav1.CreateOptions{})
	if err == nil {
		node.Status.Addresses = []corev1.NodeAddress{
			{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("192.0.2.%d", number)},
			{Type: corev1.NodeInternalIP, Address: fmt.Sprintf("2001:db8::%d", number)},
		}
		_, err = c.client.CoreV1().Nodes().UpdateStatus(c.t.Context(), node, metav1.UpdateOptions{})
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// createNamespace creates a namespace.
func (c *cluster) createNamespace(name string) {
	c.t.Helper()
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if _, err := c.client.CoreV1().Namespaces().Create(c.t.Context(), namespace, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}
	if _, err := c.client.CoreV1().ServiceAccounts(name).Create(c.t.Context(), account, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

// createPod creates the object of a pod on a node.
func (c *cluster) createPod(namespace, name, node string, labels map[string]string) *corev1.Pod {
	c.t.Helper()
	pod, err := c.client.CoreV1().Pods(namespace).Create(c.t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels},
		Spec: corev1.PodSpec{
			NodeName: node, AutomountServiceAccountToken: new(false),
			Containers: []corev1.Container{{Name: "main", Image: "none", Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 8080}}}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return pod
}

// setStatus writes the addresses and the phase of a pod.
func (c *cluster) setStatus(pod *corev1.Pod, phase corev1.PodPhase, addresses ...string) {
	c.t.Helper()
	pod.Status.Phase, pod.Status.PodIPs = phase, nil
	for _, address := range addresses {
		pod.Status.PodIP = addresses[0]
		pod.Status.PodIPs = append(pod.Status.PodIPs, corev1.PodIP{IP: address})
	}
	if _, err := c.client.CoreV1().Pods(pod.Namespace).UpdateStatus(c.t.Context(), pod, metav1.UpdateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

// relabel gives a pod other labels.
func (c *cluster) relabel(pod *corev1.Pod, labels map[string]string) *corev1.Pod {
	c.t.Helper()
	pod = pod.DeepCopy()
	pod.Labels, pod.ResourceVersion = labels, ""
	now, err := c.client.CoreV1().Pods(pod.Namespace).Update(c.t.Context(), pod, metav1.UpdateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return now
}

// deletePod deletes a pod's object at once.
func (c *cluster) deletePod(pod *corev1.Pod) {
	c.t.Helper()
	if err := c.client.CoreV1().Pods(pod.Namespace).Delete(c.t.Context(), pod.Name, *metav1.NewDeleteOptions(0)); err != nil {
		c.t.Fatal(err)
	}
}

// eventually waits for a condition.
func (c *cluster) eventually(condition func() error) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), patience)
	defer cancel()
	if err := lab.Until(ctx, condition); err != nil {
		c.t.Fatal(err)
	}
}

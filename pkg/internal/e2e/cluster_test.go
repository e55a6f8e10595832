//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/warren-cni/warren/pkg/agentapi"
)

// Names of the manifests.
const (
	system    = "warren-system"
	daemonSet = "warren"
	daemon    = "warrend"
	tunnelSet = "warren-tunnel"

	cleanupNamespace = "warren-cleanup"
	cleanupSet       = "warren-cleanup"
)

// cluster is the kind cluster under test.
type cluster struct {
	client kubernetes.Interface
	// root is the project's folder.
	root string
	// controlPlane and worker are the nodes; they are also the names of kind's containers.
	controlPlane, worker string
	// agnhost is the image that the upstream suite uses.
	agnhost string
	// probePath is the probe on this machine.
	probePath string
	// bridge is the link that all traffic between the nodes passes.
	bridge string
}

// connect finds the cluster that scripts/kind/e2e.sh made.
func connect(t *testing.T) *cluster {
	t.Helper()
	name, agnhost := os.Getenv("NAME"), os.Getenv("AGNHOST")
	if name == "" || agnhost == "" || os.Getenv("KUBECONFIG") == "" {
		t.Fatal("NAME, AGNHOST and KUBECONFIG are not set: run scripts/kind/e2e.sh, or export what it exports")
	}
	config, err := clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	if err != nil {
		t.Fatal(err)
	}
	config.QPS = -1 // polling is paced here, not by the client
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	root, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{client: client, root: root, controlPlane: name + "-control-plane", worker: name + "-worker", agnhost: agnhost}
	network := run(t, command{name: "docker", args: []string{"network", "inspect", "--format", "{{.Id}}", "kind"}})
	c.bridge = "br-" + strings.TrimSpace(network)[:12] // the name that docker gives a network's bridge
	c.installProbe(t)
	return c
}

// probeFolder is where the nodes hold the probe.
const probeFolder = "/opt/warren-e2e"

// installProbe builds the probe and puts it on the nodes, from where the pods mount it.
func (c *cluster) installProbe(t *testing.T) {
	t.Helper()
	folder := filepath.Join(t.TempDir(), filepath.Base(probeFolder))
	run(t, command{
		name: "go", args: []string{"build", "-trimpath", "-o", folder + "/probe", "./probe"},
		env: []string{"CGO_ENABLED=0"}, timeout: 5 * time.Minute,
	})
	c.probePath = folder + "/probe"
	for _, node := range c.nodes() {
		run(t, command{name: "docker", args: []string{"cp", folder, node + ":" + filepath.Dir(probeFolder)}})
	}
}

// nodes are the names of both nodes.
func (c *cluster) nodes() []string { return []string{c.controlPlane, c.worker} }

// tool returns the path of a program that scripts/tools/build.sh built.
func (c *cluster) tool(name string) string { return filepath.Join(c.root, "build", "tools", name) }

// command is a program to run.
type command struct {
	name  string
	args  []string
	env   []string
	stdin string
	// timeout is a minute if zero.
	timeout time.Duration
}

// run runs a program and returns its standard output; the test ends when the program does not succeed.
func run(t *testing.T, cmd command) string {
	t.Helper()
	out, err := try(t.Context(), cmd)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// try runs a program and returns its standard output; the error holds its standard error.
func try(ctx context.Context, cmd command) (string, error) {
	if cmd.timeout == 0 {
		cmd.timeout = time.Minute
	}
	ctx, cancel := context.WithTimeout(ctx, cmd.timeout)
	defer cancel()
	process := exec.CommandContext(ctx, cmd.name, cmd.args...)
	process.Env = append(os.Environ(), cmd.env...)
	process.Stdin = strings.NewReader(cmd.stdin)
	var out, complaints bytes.Buffer
	process.Stdout, process.Stderr = &out, &complaints
	if err := process.Run(); err != nil {
		return out.String(), fmt.Errorf("running %s %s: %w\n%s", filepath.Base(cmd.name), strings.Join(cmd.args, " "), err, complaints.String())
	}
	return out.String(), nil
}

// kubectl runs kubectl on the cluster.
func (c *cluster) kubectl(t *testing.T, args ...string) {
	t.Helper()
	run(t, command{name: c.tool("kubectl"), args: args, timeout: 5 * time.Minute})
}

// podProcess is a program that runs in a pod.
type podProcess struct {
	process *exec.Cmd
	in      io.WriteCloser
	out     *bufio.Reader
	errors  *bytes.Buffer
}

// startInPod starts a program in a pod; it ends with the test at the latest.
func (c *cluster) startInPod(t *testing.T, namespace, pod string, program ...string) *podProcess {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	args := append([]string{"exec", "--stdin", "--namespace", namespace, pod, "--"}, program...)
	p := &podProcess{process: exec.CommandContext(ctx, c.tool("kubectl"), args...), errors: &bytes.Buffer{}}
	p.process.Stderr = p.errors
	var err error
	if p.in, err = p.process.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.process.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.out = bufio.NewReader(out)
	if err = p.process.Start(); err != nil {
		t.Fatal(err)
	}
	return p
}

// apply applies YAML until the test ends, with flags of kubectl's.
func (c *cluster) apply(t *testing.T, yaml string, flags ...string) {
	t.Helper()
	kubectl := func(ctx context.Context, args ...string) error {
		args = slices.Concat(args, []string{"-f", "-"}, flags)
		_, err := try(ctx, command{name: c.tool("kubectl"), args: args, stdin: yaml, timeout: 2 * time.Minute})
		return err
	}
	t.Cleanup(func() {
		if err := kubectl(context.WithoutCancel(t.Context()), "delete", "--ignore-not-found", "--wait=false"); err != nil {
			t.Error(err)
		}
	})
	if err := kubectl(t.Context(), "apply"); err != nil {
		t.Fatal(err)
	}
}

// eventually polls until check returns nil; the test ends with check's last error when that takes too long.
func eventually(t *testing.T, within time.Duration, what string, check func(context.Context) error) {
	t.Helper()
	last := errors.New("it was never checked")
	err := wait.PollUntilContextTimeout(t.Context(), 200*time.Millisecond, within, true, func(ctx context.Context) (bool, error) {
		if err := check(ctx); err != nil {
			if ctx.Err() == nil { // otherwise it only says that time is up
				last = err
			}
			return false, nil
		}
		return true, nil
	})
	if err != nil {
		t.Fatalf("waiting %v until %s: %v", within, what, last)
	}
}

// nodesReady returns an error unless the condition Ready of all nodes is as wanted.
func (c *cluster) nodesReady(ctx context.Context, want corev1.ConditionStatus) error {
	list, err := c.client.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	if len(list.Items) != len(c.nodes()) {
		return fmt.Errorf("%d nodes", len(list.Items))
	}
	for _, node := range list.Items {
		ready := corev1.NodeCondition{}
		for _, condition := range node.Status.Conditions {
			if condition.Type == corev1.NodeReady {
				ready = condition
			}
		}
		if ready.Status != want {
			return fmt.Errorf("node %s has Ready %q: %s", node.Name, ready.Status, ready.Message)
		}
	}
	return nil
}

// daemonPods returns the pods of a DaemonSet by node.
func (c *cluster) daemonPods(ctx context.Context, namespace, set string) (map[string]corev1.Pod, error) {
	list, err := c.client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, err
	}
	pods := map[string]corev1.Pod{}
	for _, pod := range list.Items {
		owner := metav1.GetControllerOf(&pod)
		if owner != nil && owner.Kind == "DaemonSet" && owner.Name == set && pod.DeletionTimestamp == nil {
			pods[pod.Spec.NodeName] = pod
		}
	}
	return pods, nil
}

// status asks the daemon of a node for its status.
func (c *cluster) status(ctx context.Context, node string) (agentapi.Status, error) {
	var status agentapi.Status
	pods, err := c.daemonPods(ctx, system, daemonSet)
	if err != nil {
		return status, err
	}
	out, err := try(ctx, command{
		name: c.tool("kubectl"),
		args: []string{"exec", "--namespace", system, pods[node].Name, "--container", daemon, "--", "warrend", "status", "-o", "json"},
	})
	// A status with problems has exit status 1, and is a status all the same.
	if decodeErr := json.Unmarshal([]byte(out), &status); decodeErr != nil {
		return status, errors.Join(err, fmt.Errorf("reading the status of %s: %w", node, decodeErr))
	}
	return status, nil
}

// healthy returns an error unless the daemon of each node is ready and has no problem.
func (c *cluster) healthy(ctx context.Context) error {
	for _, node := range c.nodes() {
		status, err := c.status(ctx, node)
		if err != nil {
			return err
		}
		if !status.Ready || len(status.Problems) > 0 {
			return fmt.Errorf("node %s: ready is %v, problems %+v", node, status.Ready, status.Problems)
		}
	}
	return nil
}

// rolledOut waits until the newest version of the daemon runs on both nodes and is well there.
func (c *cluster) rolledOut(t *testing.T) {
	t.Helper()
	c.kubectl(t, "rollout", "status", "--namespace", system, "daemonset/"+daemonSet, "--timeout=120s")
	eventually(t, time.Minute, "the daemons are well", c.healthy)
}

// applyFile applies a file of the project until the test ends, with flags of kubectl's.
func (c *cluster) applyFile(t *testing.T, file string, flags ...string) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(c.root, file))
	if err != nil {
		t.Fatal(err)
	}
	c.apply(t, string(text), flags...)
}

// onNode runs a shell script on a node and returns what it prints.
func onNode(t *testing.T, node, script string) string {
	t.Helper()
	return run(t, command{name: "docker", args: []string{"exec", node, "sh", "-c", script}})
}

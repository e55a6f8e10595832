//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// capabilityCheck says what fails on a node when a container of the manifests lacks a capability.
type capabilityCheck struct {
	namespace, set, container string

	capability corev1.Capability
	// fails names what needs the capability.
	fails string
	// symptom matches what the container's log or the daemon's status then says.
	symptom *regexp.Regexp
	// advice says that the container only gives advice, without which the pod becomes ready all the same.
	advice bool
}

// capabilityChecks has a check for each capability of the manifests.
func capabilityChecks() []capabilityCheck {
	return []capabilityCheck{
		{system, daemonSet, "install", "NET_ADMIN", "the look at rules", regexp.MustCompile(`not_checked=.*looking at the rules of iptables-nft: .*Permission denied`), true},
		{system, daemonSet, "install", "NET_RAW", "the look at rules that match sets", regexp.MustCompile(`not_checked=.*Can't open socket to ipset`), true},
		{system, daemonSet, daemon, "NET_ADMIN", "sets, rules and links", regexp.MustCompile(`looking at the rules of iptables-nft: .*Permission denied`), false},
		{system, daemonSet, daemon, "NET_RAW", "rules that match sets", regexp.MustCompile(`Can't open socket to ipset`), false},
		{system, tunnelSet, "tunnel", "NET_ADMIN", "the tunnel's link", regexp.MustCompile(`asking the kernel for WireGuard: operation not permitted`), false},
	}
}

// testCapabilities takes each capability of the manifests away in turn and checks that what needs it fails. No capability
// is there without a check.
func (c *cluster) testCapabilities(t *testing.T) {
	checks := capabilityChecks()
	for _, set := range c.daemonSets(t) {
		for _, container := range slices.Concat(set.Spec.Template.Spec.InitContainers, set.Spec.Template.Spec.Containers) {
			for _, capability := range capabilities(container) {
				i := slices.IndexFunc(checks, func(check capabilityCheck) bool {
					return check.set == set.Name && check.container == container.Name && check.capability == capability
				})
				if i < 0 {
					t.Errorf("DaemonSet %s, container %s: no check says what %s is for", set.Name, container.Name, capability)
					continue
				}
				t.Run(fmt.Sprintf("%s without %s: %s", container.Name, capability, checks[i].fails), func(t *testing.T) {
					c.checkCapability(t, set, checks[i])
				})
			}
		}
	}
	c.rolledOut(t)
}

// daemonSets returns all DaemonSets of Warren's.
func (c *cluster) daemonSets(t *testing.T) []appsv1.DaemonSet {
	t.Helper()
	list, err := c.client.AppsV1().DaemonSets(system).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if len(list.Items) == 0 {
		t.Fatal("Warren is not installed")
	}
	return list.Items
}

// capabilities returns what a container adds.
func capabilities(container corev1.Container) []corev1.Capability {
	if container.SecurityContext == nil || container.SecurityContext.Capabilities == nil {
		return nil
	}
	return container.SecurityContext.Capabilities.Add
}

// checkCapability replaces a pod by one without a capability and waits for the symptom.
func (c *cluster) checkCapability(t *testing.T, set appsv1.DaemonSet, check capabilityCheck) {
	t.Helper()
	t.Cleanup(func() { c.setTemplate(t, set) })
	crippled := set.DeepCopy()
	without(&crippled.Spec.Template.Spec, check)
	c.setTemplate(t, *crippled)

	c.awaitSymptom(t, check)
}

// awaitSymptom waits until a pod that lacks a capability says so.
func (c *cluster) awaitSymptom(t *testing.T, check capabilityCheck) {
	t.Helper()
	eventually(t, time.Minute, fmt.Sprintf("a log or status matches %q", check.symptom), func(ctx context.Context) error {
		node, pod, err := c.crippledPod(ctx, check)
		if err != nil {
			return err
		}
		said := c.whatIsSaid(ctx, node, pod, check.container)
		found := check.symptom.FindString(said)
		if found == "" || podReady(&pod) && !check.advice {
			return fmt.Errorf("pod %s is ready: %v, and says:\n%s", pod.Name, podReady(&pod), lastLines(said, 20))
		}
		t.Logf("without %s: %q", check.capability, found)
		return nil
	})
}

// without takes the capability of a check away from its container.
func without(spec *corev1.PodSpec, check capabilityCheck) {
	for _, containers := range [][]corev1.Container{spec.InitContainers, spec.Containers} {
		for i := range containers {
			if containers[i].Name == check.container {
				add := containers[i].SecurityContext.Capabilities.Add
				containers[i].SecurityContext.Capabilities.Add = slices.DeleteFunc(slices.Clone(add), func(c corev1.Capability) bool { return c == check.capability })
			}
		}
	}
}

// setTemplate gives a DaemonSet the pod template of set. The pods of a set that is replaced only on deletion are deleted.
func (c *cluster) setTemplate(t *testing.T, set appsv1.DaemonSet) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	patch, err := json.Marshal([]map[string]any{{"op": "replace", "path": "/spec/template", "value": set.Spec.Template}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = c.client.AppsV1().DaemonSets(system).Patch(ctx, set.Name, types.JSONPatchType, patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	if set.Spec.UpdateStrategy.Type != appsv1.OnDeleteDaemonSetStrategyType {
		return
	}
	pods, err := c.daemonPods(ctx, system, set.Name)
	if err != nil {
		t.Fatal(err)
	}
	if err = c.client.CoreV1().Pods(system).Delete(ctx, pods[c.worker].Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
}

// crippledPod returns the pod that has lost its capability, and its node.
func (c *cluster) crippledPod(ctx context.Context, check capabilityCheck) (string, corev1.Pod, error) {
	pods, err := c.daemonPods(ctx, check.namespace, check.set)
	if err != nil {
		return "", corev1.Pod{}, err
	}
	for node, pod := range pods {
		for _, container := range slices.Concat(pod.Spec.InitContainers, pod.Spec.Containers) {
			if container.Name == check.container && !slices.Contains(capabilities(container), check.capability) {
				return node, pod, nil
			}
		}
	}
	return "", corev1.Pod{}, errors.New("no pod has been replaced yet")
}

// whatIsSaid collects the logs and the states of a pod's container, and the status of the node's daemon.
func (c *cluster) whatIsSaid(ctx context.Context, node string, pod corev1.Pod, container string) string {
	var said strings.Builder
	for _, state := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
		if state.Name == container {
			fmt.Fprintln(&said, state.State.String())
		}
	}
	for _, previous := range []bool{true, false} {
		options := &corev1.PodLogOptions{Container: container, Previous: previous}
		if log, err := c.client.CoreV1().Pods(pod.Namespace).GetLogs(pod.Name, options).Stream(ctx); err == nil {
			_, _ = io.Copy(&said, log)
			_ = log.Close()
		}
	}
	if status, err := c.status(ctx, node); err == nil {
		fmt.Fprintf(&said, "ready %v\n", status.Ready)
		for _, problem := range status.Problems {
			fmt.Fprintf(&said, "%s: %s: %s\n", problem.Code, problem.Object, problem.Message)
		}
	}
	return said.String()
}

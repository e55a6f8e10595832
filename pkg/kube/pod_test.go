package kube

import (
	"net/netip"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
)

func TestConvertPod(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	pod, problems := convertPod(&corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "api-1", UID: "u1", Labels: map[string]string{"app": "api"},
			Annotations: map[string]string{"kubernetes.io/config.hash": "h1", "other": "x"},
		},
		Spec: corev1.PodSpec{
			NodeName: "n1",
			InitContainers: []corev1.Container{
				{Name: "setup", Ports: []corev1.ContainerPort{{Name: "never", ContainerPort: 1}}},
				{Name: "mesh", RestartPolicy: &always, Ports: []corev1.ContainerPort{{Name: "mesh", ContainerPort: 15090}}},
			},
			Containers: []corev1.Container{
				{Name: "a", Ports: []corev1.ContainerPort{{ContainerPort: 9}, {Name: "http", ContainerPort: 8080}, {Name: "dns", Protocol: "UDP", ContainerPort: 53}}},
				{Name: "b", Ports: []corev1.ContainerPort{{Name: "odd", Protocol: "ICMP", ContainerPort: 1}, {Name: "high", ContainerPort: 65536}, {Name: "zero"}}},
			},
		},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.1.0.9", PodIPs: []corev1.PodIP{{IP: "10.1.0.9"}, {IP: "::ffff:10.1.0.10"}, {IP: "bad"}, {IP: "fd00:1::9"}}},
	})
	checkEqual(t, "pod", cluster.Pod{
		Namespace: "shop", Name: "api-1", UID: "u1", StaticUID: "h1", Node: "n1", Labels: labels.Set{"app": "api"},
		Addresses: []netip.Addr{addr("10.1.0.9"), addr("10.1.0.10"), addr("fd00:1::9")},
		Ports: []cluster.NamedPort{
			{Name: "http", Protocol: cluster.TCP, Port: 8080},
			{Name: "dns", Protocol: cluster.UDP, Port: 53},
			{Name: "mesh", Protocol: cluster.TCP, Port: 15090},
		},
	}, pod)
	checkEqual(t, "fields of the problems", []string{
		"status.podIPs[2].ip",
		"spec.containers[b].ports[0].protocol", "spec.containers[b].ports[1].containerPort", "spec.containers[b].ports[2].containerPort",
	}, fieldsOf(problems))
}

func TestConvertPodPhases(t *testing.T) {
	for phase, finished := range map[corev1.PodPhase]bool{
		corev1.PodPending: false, corev1.PodRunning: false, corev1.PodUnknown: false, "": false,
		corev1.PodSucceeded: true, corev1.PodFailed: true,
	} {
		pod, _ := convertPod(&corev1.Pod{Status: corev1.PodStatus{Phase: phase}})
		if pod.Finished != finished {
			t.Errorf("phase %q: got Finished = %v, want %v", phase, pod.Finished, finished)
		}
	}
}

func TestConvertPodOnTheHostNetwork(t *testing.T) {
	pod, _ := convertPod(&corev1.Pod{Spec: corev1.PodSpec{HostNetwork: true}, Status: corev1.PodStatus{PodIP: "172.18.0.2"}})
	if !pod.HostNetwork {
		t.Error("HostNetwork is false")
	}
	checkEqual(t, "addresses from the old field", []netip.Addr{addr("172.18.0.2")}, pod.Addresses)
}

// TestTrimLosesNothing checks that the informer keeps what the conversion reads.
func TestTrimLosesNothing(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "p", UID: "u", ResourceVersion: "7", Labels: map[string]string{"a": "b"},
			Annotations: map[string]string{annotationConfigHash: "h"}, ManagedFields: []metav1.ManagedFieldsEntry{{Manager: "m"}},
		},
		Spec: corev1.PodSpec{
			NodeName: "n1", HostNetwork: true,
			InitContainers: []corev1.Container{{Name: "i", RestartPolicy: &always, Ports: []corev1.ContainerPort{{Name: "x", ContainerPort: 1}}}},
			Containers:     []corev1.Container{{Name: "no-ports", Image: "big"}, {Name: "c", Image: "big", Ports: []corev1.ContainerPort{{Name: "y", ContainerPort: 2}, {Name: "bad"}}}},
		},
		Status: corev1.PodStatus{Phase: corev1.PodFailed, PodIP: "10.1.0.1", PodIPs: []corev1.PodIP{{IP: "10.1.0.1"}}},
	}
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "n1", UID: "u", CreationTimestamp: metav1.Unix(100, 0), Annotations: map[string]string{
			AnnotationPublicKey: "AQIDAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", AnnotationPort: "1", "big": "annotation",
		}},
		Spec:   corev1.NodeSpec{PodCIDR: "10.1.0.0/24", PodCIDRs: []string{"10.1.0.0/24"}, ProviderID: "x"},
		Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "172.18.0.2"}}, Images: []corev1.ContainerImage{{SizeBytes: 1}}},
	}

	trimmedPod, trimmedNode := trimPod(pod), trimNode(node)
	wantPod, wantPodProblems := convertPod(pod)
	gotPod, gotPodProblems := convertPod(trimmedPod)
	checkEqual(t, "pod", wantPod, gotPod)
	checkEqual(t, "problems of the pod", wantPodProblems, gotPodProblems)
	wantNode, _ := convertNode(node)
	gotNode, _ := convertNode(trimmedNode)
	checkEqual(t, "node", wantNode, gotNode)
	if gotNode.WireGuard == nil || trimmedNode.Annotations["big"] != "" || trimmedNode.Status.Images != nil {
		t.Errorf("the trimmed node is %+v: want the annotations of warren and nothing big", trimmedNode)
	}
	if len(trimmedPod.Spec.Containers) != 1 || trimmedPod.Spec.Containers[0].Image != "" || trimmedPod.ManagedFields != nil {
		t.Errorf("the trimmed pod is %+v: want nothing but ports", trimmedPod)
	}
	if trimmedPod.ResourceVersion != "7" {
		t.Errorf("the trimmed pod has resource version %q, want 7", trimmedPod.ResourceVersion)
	}
}

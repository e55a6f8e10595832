package kube

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/warren-cni/warren/pkg/cluster"
)

// refreshPatience is how long a pod that starts waits for the server's answer. After that it starts with what the watch
// has brought: a server that is away must not stop the pods of the node.
const refreshPatience = time.Second

// Refresh reads beside the watch, which may lag, what decides over a pod that starts: the pod, its Namespace and the policies
// there. What the watch says later of an older state does not undo it. A policy that the server does not have any more goes, because
// it may allow what those that stay deny; nothing else is removed by it.
//
// While the server cannot be reached it returns nil for a pod that is known already, and is otherwise an error. A pod
// that does not exist with that uid is an error too.
func (a *API) Refresh(ctx context.Context, namespace, name, uid string) error {
	limited, cancel := context.WithTimeout(ctx, refreshPatience)
	defer cancel()
	surroundings := make(chan error, 1)
	go func() {
		surroundings <- a.flights.do(limited, namespace, func() error { return a.readNamespace(ctx, namespace) })
	}()
	podErr, namespaceErr := a.readPod(limited, namespace, name), <-surroundings
	err := errors.Join(podErr, namespaceErr)
	if ctx.Err() != nil {
		return fmt.Errorf("reading what decides over pod %s/%s: %w", namespace, name, context.Cause(ctx))
	}
	if isRefusal(podErr) || isRefusal(namespaceErr) {
		return err
	}
	if !a.knows(namespace, name, uid) {
		return errors.Join(fmt.Errorf("looking for pod %s/%s with uid %q: %w", namespace, name, uid, errPodUnknown), err)
	}
	if err != nil {
		a.log.Warn("a pod starts with what was known before, since the API server cannot be reached", "pod", namespace+"/"+name, "error", err)
	}
	return nil
}

// readPod reads one pod. The answer shows the server's state at least at the pod's own version.
func (a *API) readPod(ctx context.Context, namespace, name string) error {
	var pod corev1.Pod
	err := a.clients.core.Get().Namespace(namespace).Resource(resourcePods).Name(name).Do(ctx).Into(&pod)
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("reading pod %s/%s: %w (%w)", namespace, name, errPodUnknown, err)
	}
	if err != nil {
		return fmt.Errorf("reading pod %s/%s: %w", namespace, name, err)
	}
	a.pods.take([]*corev1.Pod{&pod}, pod.ResourceVersion, nil)
	return nil
}

// readNamespace reads a Namespace and its policies. It outlives the caller that began it, because others share it.
func (a *API) readNamespace(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), refreshPatience)
	defer cancel()
	policies := make(chan error, 1)
	go func() { policies <- a.readPolicies(ctx, name) }()
	var namespace corev1.Namespace
	err := a.clients.core.Get().Resource(resourceNamespaces).Name(name).Do(ctx).Into(&namespace)
	if err != nil {
		err = fmt.Errorf("reading namespace %s: %w", name, err)
	} else {
		a.namespaces.take([]*corev1.Namespace{&namespace}, namespace.ResourceVersion, nil)
	}
	return errors.Join(err, <-policies)
}

func (a *API) readPolicies(ctx context.Context, namespace string) error {
	// Without a resource version the answer is the newest state.
	var list networkingv1.NetworkPolicyList
	if err := a.clients.networking.Get().Namespace(namespace).Resource(resourcePolicies).Do(ctx).Into(&list); err != nil {
		return fmt.Errorf("reading the policies of namespace %s: %w", namespace, err)
	}
	policies := make([]*networkingv1.NetworkPolicy, len(list.Items))
	for i := range list.Items {
		policies[i] = &list.Items[i]
	}
	a.policies.take(policies, list.ResourceVersion, func(k cluster.Key) bool { return k.Namespace == namespace })
	return nil
}

// isRefusal is true for an error with which the server answers the question: it can be reached, and asking again or
// going on without it would be wrong.
func isRefusal(err error) bool {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return false
	}
	code := status.Status().Code
	return code < http.StatusInternalServerError && code != http.StatusTooManyRequests
}

// knows is true where the table holds the pod with that uid.
func (a *API) knows(namespace, name, uid string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	pod, ok := a.store.pods.objects[cluster.Key{Namespace: namespace, Name: name}]
	return ok && isPod(pod, uid)
}

// isPod is true where the kubelet's uid means this pod.
func isPod(pod *cluster.Pod, uid string) bool {
	return uid == pod.UID || (pod.StaticUID != "" && uid == pod.StaticUID)
}

package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"github.com/warren-cni/warren/pkg/cluster"
)

// Resources that are followed.
const (
	resourceNodes      = "nodes"
	resourceNamespaces = "namespaces"
	resourcePods       = "pods"
	resourcePolicies   = "networkpolicies"
)

// API follows the objects of an API server with informers.
//
// While the server cannot be reached it keeps what it has, and says so in a problem.
type API struct {
	signals
	self  string
	log   *slog.Logger
	core  rest.Interface
	reach *reach

	informers map[string]cache.SharedIndexInformer // by resource
	handlers  []cache.DoneChecker

	mu       sync.Mutex
	store    store
	problems map[object][]cluster.Problem
	// fetched holds the resource version of objects that were read beside the informers, which have not reached it yet.
	fetched map[object]string
}

// object names a converted object of any kind.
type object struct {
	resource string
	cluster.Key
}

// String renders the name for messages.
func (o object) String() string {
	if o.Namespace == "" {
		return o.resource + "/" + o.Name
	}
	return o.resource + "/" + o.Namespace + "/" + o.Name
}

// NewAPI returns the source of the node called self. Nothing is read before Run.
func NewAPI(config *rest.Config, self string, log *slog.Logger) (*API, error) {
	a := &API{
		signals: newSignals(), self: self, log: log, informers: make(map[string]cache.SharedIndexInformer),
		store: newStore(), problems: make(map[object][]cluster.Problem), fetched: make(map[object]string),
	}
	a.reach = newReach(a.notify)
	clients, err := newClients(config, a.reach.wrap)
	if err != nil {
		return nil, err
	}
	a.core = clients.core
	err = errors.Join(
		follow(a, kind[*corev1.Node, cluster.Node]{clients.core, resourceNodes, &corev1.Node{}, &a.store.nodes, convertNode}),
		follow(a, kind[*corev1.Namespace, cluster.Namespace]{clients.core, resourceNamespaces, &corev1.Namespace{}, &a.store.namespaces, convertNamespace}),
		follow(a, kind[*corev1.Pod, cluster.Pod]{clients.core, resourcePods, &corev1.Pod{}, &a.store.pods, convertPod}),
		follow(a, kind[*networkingv1.NetworkPolicy, cluster.Policy]{
			clients.networking, resourcePolicies, &networkingv1.NetworkPolicy{}, &a.store.policies, convertPolicy,
		}),
	)
	if err != nil {
		return nil, err
	}
	return a, nil
}

// Run follows the objects until the context ends.
func (a *API) Run(ctx context.Context) error {
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(a.log.Handler()))
	var running sync.WaitGroup
	for _, informer := range a.informers {
		running.Go(func() { informer.RunWithContext(ctx) })
	}
	if cache.WaitFor(ctx, "", a.handlers...) {
		close(a.synced)
		a.notify()
	}
	running.Wait()
	return nil
}

// Changes returns what changed since the last call; the first one returns everything.
func (a *API) Changes() cluster.Delta {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.store.changes()
}

// Problems returns what could not be understood or read.
func (a *API) Problems() []cluster.Problem {
	problems := a.reach.problems()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, found := range a.problems {
		problems = append(problems, found...)
	}
	return cluster.SortProblems(problems)
}

// Snapshot returns the state of the cluster and what could not be understood in it. It costs a copy of everything.
func (a *API) Snapshot() (cluster.Snapshot, []cluster.Problem) {
	problems := a.Problems()
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.store.snapshot(a.self), problems
}

// setProblems reports whether the object's problems differ from what they were.
func (a *API) setProblems(name object, problems []cluster.Problem) bool {
	changed := !slices.Equal(a.problems[name], problems)
	if len(problems) == 0 {
		delete(a.problems, name)
	} else {
		a.problems[name] = problems
	}
	return changed
}

// FetchPod reads the pod once from the server when the informer has not brought it yet.
func (a *API) FetchPod(ctx context.Context, namespace, name, uid string) error {
	id := object{resourcePods, cluster.Key{Namespace: namespace, Name: name}}
	a.mu.Lock()
	known, ok := a.store.pods.objects[id.Key]
	a.mu.Unlock()
	if ok && isPod(known, uid) {
		return nil
	}
	var read corev1.Pod
	err := a.core.Get().Namespace(namespace).Resource(resourcePods).Name(name).Do(ctx).Into(&read)
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("reading pod %s/%s: %w", namespace, name, errPodUnknown)
	}
	if err != nil {
		return fmt.Errorf("reading pod %s/%s: %w", namespace, name, err)
	}
	pod, problems := convertPod(trimPod(&read))
	if !isPod(&pod, uid) {
		return fmt.Errorf("reading pod %s/%s: it has uid %s and not %s: %w", namespace, name, pod.UID, uid, errPodUnknown)
	}

	a.mu.Lock()
	defer a.mu.Unlock()
	if a.informerPassed(id.Key, read.ResourceVersion) {
		return nil
	}
	a.fetched[id] = read.ResourceVersion
	a.store.pods.set(&pod)
	a.setProblems(id, problems)
	a.notify()
	return nil
}

// informerPassed is true where the informer holds that state of the pod, or a later one.
func (a *API) informerPassed(pod cluster.Key, version string) bool {
	cached, exists, err := a.informers[resourcePods].GetStore().GetByKey(pod.String())
	if err != nil || !exists {
		return false
	}
	accessor, ok := cached.(*corev1.Pod)
	return ok && !isOlder(accessor.ResourceVersion, version)
}

// isPod is true where the kubelet's uid means this pod.
func isPod(pod *cluster.Pod, uid string) bool {
	return uid == pod.UID || (pod.StaticUID != "" && uid == pod.StaticUID)
}

// Publish sets annotations on the own Node where they differ.
func (a *API) Publish(ctx context.Context, annotations map[string]string) error {
	if node, exists, err := a.informers[resourceNodes].GetStore().GetByKey(a.self); err == nil && exists {
		if own, ok := node.(*corev1.Node); ok && containsAll(own.Annotations, annotations) {
			return nil
		}
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": annotations}})
	if err != nil {
		return fmt.Errorf("encoding the annotations of node %s: %w", a.self, err)
	}
	err = a.core.Patch(types.MergePatchType).Resource(resourceNodes).Name(a.self).Body(patch).Do(ctx).Error()
	if err != nil {
		return fmt.Errorf("writing the annotations of node %s: %w", a.self, err)
	}
	return nil
}

// containsAll is true where every wanted annotation is there.
func containsAll(have, want map[string]string) bool {
	for name, value := range want {
		if current, ok := have[name]; !ok || current != value {
			return false
		}
	}
	return true
}

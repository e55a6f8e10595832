package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
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

// API follows the objects of an API server.
//
// While the server cannot be reached it keeps what it has, and says so in a problem.
type API struct {
	signals
	self    string
	log     *slog.Logger
	clients clients
	reach   *reach
	// protection is what the API server does for the nodes of this cluster against each other.
	protection *protection
	flights    flights
	events     events

	nodes      *follower[*corev1.Node, cluster.Node]
	namespaces *follower[*corev1.Namespace, cluster.Namespace]
	pods       *follower[*corev1.Pod, cluster.Pod]
	policies   *follower[*networkingv1.NetworkPolicy, cluster.Policy]

	// mu guards what the followers write.
	mu       sync.Mutex
	store    store
	problems map[object][]cluster.Problem
	// lists is how many followers have read their first list.
	lists int
	// published are the annotations of the own Node.
	published map[string]string
}

// NewAPI returns the source of the node called self. Nothing is read before Run.
func NewAPI(config *rest.Config, self string, log *slog.Logger) (*API, error) {
	a := &API{
		signals: newSignals(), self: self, log: log, store: newStore(), problems: make(map[object][]cluster.Problem),
		flights: flights{running: make(map[string]*flight)},
	}
	a.reach = newReach(a.notify)
	var err error
	if a.clients, err = newClients(config, a.reach.wrap); err != nil {
		return nil, err
	}
	a.protection = &protection{client: a.clients.admission}
	core, networking := a.clients.core, a.clients.networking
	a.nodes = newFollower(a, kind[*corev1.Node, cluster.Node]{core, resourceNodes, &corev1.Node{}, &a.store.nodes, convertNode})
	a.nodes.kept = func(n *corev1.Node) {
		if n.Name == self {
			a.published = n.Annotations
		}
	}
	a.namespaces = newFollower(a, kind[*corev1.Namespace, cluster.Namespace]{
		core, resourceNamespaces, &corev1.Namespace{}, &a.store.namespaces, convertNamespace,
	})
	a.pods = newFollower(a, kind[*corev1.Pod, cluster.Pod]{core, resourcePods, &corev1.Pod{}, &a.store.pods, convertPod})
	a.policies = newFollower(a, kind[*networkingv1.NetworkPolicy, cluster.Policy]{
		networking, resourcePolicies, &networkingv1.NetworkPolicy{}, &a.store.policies, convertPolicy,
	})
	return a, nil
}

// Run follows the objects until the context ends.
func (a *API) Run(ctx context.Context) error {
	ctx = klog.NewContext(ctx, logr.FromSlogHandler(a.log.Handler()))
	a.events.run(ctx, a.self, serverSink{func() context.Context { return ctx }, a.clients.events})
	var running sync.WaitGroup
	running.Go(func() { a.protection.run(ctx, a.notify) })
	for _, follow := range []func(context.Context){a.nodes.run, a.namespaces.run, a.pods.run, a.policies.run} {
		running.Go(func() { follow(ctx) })
	}
	running.Wait()
	return nil
}

// listed counts the kinds whose first list was read; the lock is held.
func (a *API) listed() {
	const kinds = 4
	if a.lists++; a.lists == kinds {
		close(a.synced)
		a.notify()
	}
}

// Changes returns what changed since the last call; the first one returns everything.
func (a *API) Changes() cluster.Delta {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.store.changes()
}

// Problems returns what could not be understood or read.
func (a *API) Problems() []cluster.Problem {
	problems := append(a.reach.problems(), a.protection.problems()...)
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

// setProblems reports whether the object's problems differ from what they were; the lock is held.
func (a *API) setProblems(name object, problems []cluster.Problem) bool {
	changed := !slices.Equal(a.problems[name], problems)
	if len(problems) == 0 {
		delete(a.problems, name)
	} else {
		a.problems[name] = problems
	}
	return changed
}

// Publish sets annotations on the own Node where they differ; an empty value removes one.
func (a *API) Publish(ctx context.Context, annotations map[string]string) error {
	a.mu.Lock()
	_, known := a.store.nodes.objects[cluster.Key{Name: a.self}]
	done := known && carries(a.published, annotations)
	a.mu.Unlock()
	if done {
		return nil
	}
	values := make(map[string]any, len(annotations))
	for name, value := range annotations {
		values[name] = value
		if value == "" {
			values[name] = nil // which removes it (RFC 7396)
		}
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": values}})
	if err != nil {
		return fmt.Errorf("encoding the annotations of node %s: %w", a.self, err)
	}
	err = a.clients.core.Patch(types.MergePatchType).Resource(resourceNodes).Name(a.self).Body(patch).Do(ctx).Error()
	if err != nil {
		return fmt.Errorf("writing the annotations of node %s: %w", a.self, err)
	}
	return nil
}

// carries is true where every wanted annotation is there, and none that is unwanted.
func carries(have, want map[string]string) bool {
	for name, value := range want {
		if current, ok := have[name]; current != value || ok != (value != "") {
			return false
		}
	}
	return true
}

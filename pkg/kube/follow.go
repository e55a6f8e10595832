package kube

import (
	"fmt"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/warren-cni/warren/pkg/cluster"
)

// apiObject is a pointer to one of the API types.
type apiObject interface {
	metav1.Object
	runtime.Object
}

// keyOf returns the object's name.
func keyOf(o metav1.Object) cluster.Key {
	return cluster.Key{Namespace: o.GetNamespace(), Name: o.GetName()}
}

// kind is how the objects of one kind come in: where they are read, and what they become.
type kind[O apiObject, T any] struct {
	client   rest.Interface
	resource string
	sample   O
	table    *table[T]
	convert  func(O) (T, []cluster.Problem)
}

// follow adds an informer that keeps the kind's table.
func follow[O apiObject, T any](a *API, k kind[O, T]) error {
	list := cache.NewListWatchFromClient(k.client, k.resource, metav1.NamespaceAll, fields.Everything())
	informer := cache.NewSharedIndexInformer(list, k.sample, 0, nil)
	if err := informer.SetTransform(trim); err != nil {
		return fmt.Errorf("following %s: %w", k.resource, err)
	}
	handler, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { put(a, k, o) },
		UpdateFunc: func(_, o any) { put(a, k, o) },
		DeleteFunc: func(o any) { drop(a, k, o) },
	})
	if err != nil {
		return fmt.Errorf("following %s: %w", k.resource, err)
	}
	a.informers[k.resource] = informer
	a.handlers = append(a.handlers, handler.HasSyncedChecker())
	return nil
}

func put[O apiObject, T any](a *API, k kind[O, T], raw any) {
	o, ok := raw.(O)
	if !ok {
		return
	}
	value, problems := k.convert(o)
	name := object{k.resource, keyOf(o)}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.outdated(name, o) {
		return
	}
	delete(a.fetched, name)
	valueChanged := k.table.set(&value)
	if a.setProblems(name, problems) || valueChanged {
		a.notify()
	}
}

func drop[O apiObject, T any](a *API, k kind[O, T], raw any) {
	if last, ok := raw.(cache.DeletedFinalStateUnknown); ok {
		raw = last.Obj
	}
	o, ok := raw.(O)
	if !ok {
		return
	}
	name := object{k.resource, keyOf(o)}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.outdated(name, o) {
		return
	}
	delete(a.fetched, name)
	valueChanged := k.table.remove(name.Key)
	if a.setProblems(name, nil) || valueChanged {
		a.notify()
	}
}

// outdated is true for an event that is older than what was read beside the informer: it speaks of an earlier state, or of
// an earlier object with that name.
func (a *API) outdated(name object, o metav1.Object) bool {
	version, ok := a.fetched[name]
	return ok && isOlder(o.GetResourceVersion(), version)
}

// isOlder compares resource versions. What cannot be compared is taken for new.
func isOlder(version, than string) bool {
	order, err := resourceversion.CompareResourceVersion(version, than)
	return err == nil && order < 0
}

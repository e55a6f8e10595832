package kube

import (
	"context"

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

// follower keeps a kind's table as the API server has it: by its watch, and by what is read beside the watch, which may
// be ahead of it.
//
// It is the store that client-go's Reflector writes to. An informer would keep a second copy of every object, and could
// not tell up to which state of the server its handlers have come.
type follower[O apiObject, T any] struct {
	kind[O, T]
	api *API
	// kept is called with each object that is taken over, under the lock.
	kept func(O)
	// seen is the resource version up to which the watch has brought everything; empty before the first list.
	seen string
	// ahead are the objects that were read beside the watch, with the version of the server's state that the read shows. What
	// the watch says of them up to that version is history.
	ahead map[cluster.Key]string
}

func newFollower[O apiObject, T any](a *API, k kind[O, T]) *follower[O, T] {
	return &follower[O, T]{kind: k, api: a, kept: func(O) {}, ahead: make(map[cluster.Key]string)}
}

// run follows the kind until the context ends.
func (f *follower[O, T]) run(ctx context.Context) {
	list := cache.NewListWatchFromClient(f.client, f.resource, metav1.NamespaceAll, fields.Everything())
	cache.NewReflectorWithOptions(list, f.sample, f, cache.ReflectorOptions{Name: f.resource, Backoff: retries()}).RunWithContext(ctx)
}

// Add takes over an object that is new.
func (f *follower[O, T]) Add(raw any) error { return f.Update(raw) }

// Update takes over an object that changed.
func (f *follower[O, T]) Update(raw any) error {
	o, ok := raw.(O)
	if !ok {
		return errKind
	}
	now := f.converted(o)
	f.api.mu.Lock()
	defer f.api.mu.Unlock()
	version := o.GetResourceVersion()
	if !f.isHistory(now.key, version) && f.set(now) {
		f.api.notify()
	}
	f.reached(version)
	return nil
}

// Delete drops an object.
func (f *follower[O, T]) Delete(raw any) error {
	o, ok := raw.(O)
	if !ok {
		return errKind
	}
	f.api.mu.Lock()
	defer f.api.mu.Unlock()
	version := o.GetResourceVersion()
	if !f.isHistory(keyOf(o), version) && f.remove(keyOf(o)) {
		f.api.notify()
	}
	f.reached(version)
	return nil
}

// Replace takes over a list of everything.
func (f *follower[O, T]) Replace(list []any, version string) error {
	objects := make(map[cluster.Key]converted[O, T], len(list))
	for _, raw := range list {
		o, ok := raw.(O)
		if !ok {
			return errKind
		}
		now := f.converted(o)
		objects[now.key] = now
	}
	f.api.mu.Lock()
	defer f.api.mu.Unlock()
	changed := false
	for k := range f.table.objects {
		if _, stays := objects[k]; !stays && !f.isHistory(k, version) {
			changed = f.remove(k) || changed
		}
	}
	for k, now := range objects {
		if !f.isHistory(k, version) {
			changed = f.set(now) || changed
		}
	}
	if f.seen == "" {
		f.api.listed()
	}
	f.reached(version)
	if changed {
		f.api.notify()
	}
	return nil
}

// Bookmark notes how far the watch has come without an event.
func (f *follower[O, T]) Bookmark(version string) error {
	f.api.mu.Lock()
	defer f.api.mu.Unlock()
	f.reached(version)
	return nil
}

// Resync does nothing: the table is never out of step with itself.
func (*follower[O, T]) Resync() error { return nil }

// Transformer makes objects small while the first list comes in.
func (*follower[O, T]) Transformer() cache.TransformFunc { return trim }

// take takes over objects that were read beside the watch, where the watch is not as far as the read. Where all is not nil, they
// are all that there are of the names that it chooses.
func (f *follower[O, T]) take(objects []O, version string, all func(cluster.Key) bool) {
	f.api.mu.Lock()
	defer f.api.mu.Unlock()
	if !isOlder(f.seen, version) {
		return
	}
	if all != nil {
		f.dropOthers(objects, version, all)
	}
	for _, o := range objects {
		now := f.converted(o)
		if f.isHistory(now.key, version) {
			continue
		}
		f.ahead[now.key] = version
		if f.set(now) {
			f.api.notify()
		}
	}
}

// dropOthers removes what all chooses and was not read.
func (f *follower[O, T]) dropOthers(objects []O, version string, all func(cluster.Key) bool) {
	read := make(map[cluster.Key]bool, len(objects))
	for _, o := range objects {
		read[keyOf(o)] = true
	}
	for k := range f.table.objects {
		if all(k) && !read[k] && !f.isHistory(k, version) {
			f.ahead[k] = version
			f.remove(k)
			f.api.notify()
		}
	}
}

// converted is an object and what became of it.
type converted[O apiObject, T any] struct {
	key      cluster.Key
	object   O
	value    *T
	problems []cluster.Problem
}

func (f *follower[O, T]) converted(o O) converted[O, T] {
	value, problems := f.convert(o)
	return converted[O, T]{keyOf(o), o, &value, problems}
}

// isHistory is true for a state of the object that is not newer than the one that was read beside the watch.
func (f *follower[O, T]) isHistory(k cluster.Key, version string) bool {
	read, ok := f.ahead[k]
	return ok && !isOlder(read, version)
}

// reached notes how far the watch has come, and forgets the reads that it has caught up with.
func (f *follower[O, T]) reached(version string) {
	f.seen = version
	for k, read := range f.ahead {
		if !isOlder(version, read) {
			delete(f.ahead, k)
		}
	}
}

// set reports whether the object or its problems changed.
func (f *follower[O, T]) set(now converted[O, T]) bool {
	f.kept(now.object)
	valueChanged := f.table.set(now.value)
	return f.api.setProblems(object{f.resource, now.key}, now.problems) || valueChanged
}

// remove reports whether there was such an object.
func (f *follower[O, T]) remove(k cluster.Key) bool {
	f.api.setProblems(object{f.resource, k}, nil)
	return f.table.remove(k)
}

// isOlder compares resource versions; the empty one is the oldest. Versions that cannot be compared are taken for equal.
func isOlder(version, than string) bool {
	if version == "" || than == "" {
		return version == "" && than != ""
	}
	order, err := resourceversion.CompareResourceVersion(version, than)
	return err == nil && order < 0
}

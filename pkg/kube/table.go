package kube

import (
	"cmp"
	"slices"

	"github.com/warren-cni/warren/pkg/cluster"
)

func compareKeys(a, b cluster.Key) int {
	return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
}

// table holds the converted objects of one kind, and the names that changed since somebody asked. What is in it is never
// changed, only replaced, so that it can be handed out.
type table[T any] struct {
	keyOf   func(*T) cluster.Key
	equal   func(a, b *T) bool
	objects map[cluster.Key]*T
	changed map[cluster.Key]struct{}
}

func newTable[T any](keyOf func(*T) cluster.Key, equal func(a, b *T) bool) table[T] {
	return table[T]{keyOf: keyOf, equal: equal, objects: make(map[cluster.Key]*T), changed: make(map[cluster.Key]struct{})}
}

// set reports whether the value differs from the one that was there.
func (t *table[T]) set(value *T) bool {
	k := t.keyOf(value)
	if old, ok := t.objects[k]; ok && t.equal(old, value) {
		return false
	}
	t.objects[k] = value
	t.changed[k] = struct{}{}
	return true
}

// remove reports whether there was such an object.
func (t *table[T]) remove(k cluster.Key) bool {
	if _, ok := t.objects[k]; !ok {
		return false
	}
	delete(t.objects, k)
	t.changed[k] = struct{}{}
	return true
}

// become makes the table hold what another one holds, and reports whether that changed anything.
func (t *table[T]) become(other *table[T]) bool {
	changed := false
	for k := range t.objects {
		if _, stays := other.objects[k]; !stays {
			changed = t.remove(k) || changed
		}
	}
	for _, value := range other.objects {
		changed = t.set(value) || changed
	}
	return changed
}

// drain returns what changed since the last call: the objects as they are now, nil for those that are gone.
func (t *table[T]) drain() map[cluster.Key]*T {
	changes := make(map[cluster.Key]*T, len(t.changed))
	for k := range t.changed {
		changes[k] = t.objects[k]
	}
	t.changed = make(map[cluster.Key]struct{})
	return changes
}

// list returns all objects, sorted.
func (t *table[T]) list() []T {
	list := make([]T, 0, len(t.objects))
	for _, value := range t.objects {
		list = append(list, *value)
	}
	slices.SortFunc(list, func(a, b T) int { return compareKeys(t.keyOf(&a), t.keyOf(&b)) })
	return list
}

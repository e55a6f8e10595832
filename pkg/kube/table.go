package kube

import (
	"cmp"
	"maps"
	"reflect"
	"slices"

	"github.com/warren-cni/warren/pkg/cluster"
)

// key names an object of one kind; the namespace is empty for kinds without one.
type key struct{ namespace, name string }

func compareKeys(a, b key) int {
	return cmp.Or(cmp.Compare(a.namespace, b.namespace), cmp.Compare(a.name, b.name))
}

func nodeKey(n cluster.Node) key           { return key{name: n.Name} }
func namespaceKey(n cluster.Namespace) key { return key{name: n.Name} }
func podKey(p cluster.Pod) key             { return key{p.Namespace, p.Name} }
func policyKey(p cluster.Policy) key       { return key{p.Namespace, p.Name} }

// table holds the converted objects of one kind as a sorted list that snapshots share, and the changes since that list was
// made. A change costs a map entry; the next list merges all changes in one pass.
type table[T any] struct {
	keyOf   func(T) key
	sorted  []T
	pending map[key]*T // nil: removed
}

func newTable[T any](keyOf func(T) key) table[T] {
	return table[T]{keyOf: keyOf, pending: make(map[key]*T)}
}

func (t *table[T]) get(k key) (T, bool) {
	if value, ok := t.pending[k]; ok {
		if value == nil {
			var none T
			return none, false
		}
		return *value, true
	}
	i, ok := slices.BinarySearchFunc(t.sorted, k, func(v T, k key) int { return compareKeys(t.keyOf(v), k) })
	if !ok {
		var none T
		return none, false
	}
	return t.sorted[i], true
}

// set reports whether the value differs from the one that was there.
func (t *table[T]) set(value T) bool {
	k := t.keyOf(value)
	old, ok := t.get(k)
	if ok && reflect.DeepEqual(old, value) {
		return false
	}
	t.pending[k] = &value
	return true
}

// remove reports whether there was such an object.
func (t *table[T]) remove(k key) bool {
	_, ok := t.get(k)
	if ok {
		t.pending[k] = nil
	}
	return ok
}

// list returns all objects, sorted. The list is never changed afterwards.
func (t *table[T]) list() []T {
	if len(t.pending) == 0 {
		return t.sorted
	}
	merged := make([]T, 0, len(t.sorted)+len(t.pending))
	rest := t.sorted
	for _, k := range slices.SortedFunc(maps.Keys(t.pending), compareKeys) {
		before, same := slices.BinarySearchFunc(rest, k, func(v T, k key) int { return compareKeys(t.keyOf(v), k) })
		merged = append(merged, rest[:before]...)
		if same {
			before++
		}
		rest = rest[before:]
		if value := t.pending[k]; value != nil {
			merged = append(merged, *value)
		}
	}
	merged = append(merged, rest...)
	t.sorted = merged
	clear(t.pending)
	return t.sorted
}

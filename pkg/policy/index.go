package policy

import (
	"slices"

	"k8s.io/apimachinery/pkg/labels"
	operator "k8s.io/apimachinery/pkg/selection"
)

// label is a label's key with its value.
type label struct{ key, value string }

// index finds the holders of the selectors that may choose what has given labels, so that an object meets only those that
// ask for one of its labels, and those that ask for no label by name and value.
type index[T comparable] struct {
	asking map[label][]T
	rest   []T
}

func (x *index[T]) add(s labels.Selector, holder T) {
	asked, some := asks(s)
	if some && len(asked) == 0 {
		x.rest = append(x.rest, holder)
	}
	for _, l := range asked {
		if x.asking == nil {
			x.asking = map[label][]T{}
		}
		x.asking[l] = append(x.asking[l], holder)
	}
}

func (x *index[T]) remove(s labels.Selector, holder T) {
	is := func(h T) bool { return h == holder }
	asked, _ := asks(s)
	for _, l := range asked {
		if left := slices.DeleteFunc(x.asking[l], is); len(left) > 0 {
			x.asking[l] = left
		} else {
			delete(x.asking, l)
		}
	}
	x.rest = slices.DeleteFunc(x.rest, is)
}

// find appends the holders whose selectors may choose what has these labels, each once.
func (x *index[T]) find(set labels.Set, found []T) []T {
	found = append(found, x.rest...)
	if len(x.asking) == 0 {
		return found
	}
	for key, value := range set {
		found = append(found, x.asking[label{key, value}]...)
	}
	return found
}

// asks returns labels of which everything that a selector chooses has exactly one; none where it asks for no values. The second
// result is false for a selector that chooses nothing.
func asks(s labels.Selector) ([]label, bool) {
	requirements, some := s.Requirements()
	var fewest []label
	for _, r := range requirements {
		op := r.Operator()
		if op != operator.In && op != operator.Equals && op != operator.DoubleEquals {
			continue
		}
		if values := r.ValuesUnsorted(); fewest == nil || len(values) < len(fewest) {
			fewest = make([]label, len(values))
			for i, v := range values {
				fewest[i] = label{r.Key(), v}
			}
		}
	}
	return fewest, some
}

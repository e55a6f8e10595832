package kube

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/warren-cni/warren/pkg/cluster"
)

func newPods() table[cluster.Pod] { return newTable((*cluster.Pod).Key, equalPods) }

// TestTableEqualsMap compares the table, and what a follower of its changes has, with a plain map over random changes.
func TestTableEqualsMap(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	pods := newPods()
	model, follower := make(map[cluster.Key]cluster.Pod), make(map[cluster.Key]cluster.Pod)
	for range 3000 {
		pod := cluster.Pod{
			Namespace: []string{"a", "a-b", "a.b"}[random.IntN(3)], Name: fmt.Sprint("p", random.IntN(20)), UID: fmt.Sprint(random.IntN(3)),
		}
		k := pod.Key()
		old, exists := model[k]
		switch random.IntN(6) {
		case 0:
			want := slices.SortedFunc(maps.Values(model), func(a, b cluster.Pod) int { return compareKeys(a.Key(), b.Key()) })
			if list := pods.list(); !slices.EqualFunc(list, want, samePod) {
				t.Fatalf("list: got %v, want %v", list, want)
			}
		case 1:
			for name, now := range pods.drain() {
				delete(follower, name)
				if now != nil {
					follower[name] = *now
				}
			}
			if !maps.EqualFunc(follower, model, samePod) {
				t.Fatalf("a follower of the changes has %v, want %v", follower, model)
			}
		case 2:
			if got := pods.remove(k); got != exists {
				t.Fatalf("removing %v: got %v, want %v", k, got, exists)
			}
			delete(model, k)
		default:
			if got, want := pods.set(&pod), !exists || old.UID != pod.UID; got != want {
				t.Fatalf("setting %v: got changed = %v, want %v", k, got, want)
			}
			model[k] = pod
		}
	}
}

func samePod(a, b cluster.Pod) bool { return equalPods(&a, &b) }

func TestTableBecomesAnother(t *testing.T) {
	now, next := newPods(), newPods()
	for _, name := range []string{"goes", "changes", "stays"} {
		now.set(&cluster.Pod{Name: name})
	}
	next.set(&cluster.Pod{Name: "stays"})
	next.set(&cluster.Pod{Name: "changes", UID: "2"})
	next.set(&cluster.Pod{Name: "comes"})
	now.drain()
	if !now.become(&next) {
		t.Error("nothing changed, want a change")
	}
	var changes []string
	for k, pod := range now.drain() {
		changes = append(changes, fmt.Sprint(k.Name, " ", pod != nil))
	}
	slices.Sort(changes)
	checkEqual(t, "changes", []string{"changes true", "comes true", "goes false"}, changes)
	if now.become(&next) || len(now.drain()) > 0 {
		t.Error("the same again changed something, want no change")
	}
}

// BenchmarkTableChange is the cost of one changed pod among 5,000 and of asking what changed.
func BenchmarkTableChange(b *testing.B) {
	pods := newPods()
	for i := range 5000 {
		pods.set(&cluster.Pod{Namespace: fmt.Sprint("ns", i%100), Name: fmt.Sprint("p", i)})
	}
	pods.drain()
	uids := [2]string{"1", "2"}
	for i := 0; b.Loop(); i++ {
		pods.set(&cluster.Pod{Namespace: "ns7", Name: "p7", UID: uids[i%2]})
		pods.drain()
	}
}

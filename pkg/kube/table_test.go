package kube

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/warren-cni/warren/pkg/cluster"
)

// TestTableEqualsMap compares the table with a plain map over random changes.
func TestTableEqualsMap(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	pods := newTable(podKey)
	model := make(map[key]cluster.Pod)
	var lists, copies [][]cluster.Pod
	for range 3000 {
		pod := cluster.Pod{
			Namespace: []string{"a", "a-b", "a.b"}[random.IntN(3)], Name: fmt.Sprint("p", random.IntN(20)), UID: fmt.Sprint(random.IntN(3)),
		}
		k := podKey(pod)
		old, exists := model[k]
		switch random.IntN(5) {
		case 0:
			list := pods.list()
			want := slices.SortedFunc(maps.Values(model), func(a, b cluster.Pod) int { return compareKeys(podKey(a), podKey(b)) })
			if !slices.EqualFunc(list, want, samePod) {
				t.Fatalf("list: got %v, want %v", list, want)
			}
			lists, copies = append(lists, list), append(copies, slices.Clone(list))
		case 1:
			if got := pods.remove(k); got != exists {
				t.Fatalf("removing %v: got %v, want %v", k, got, exists)
			}
			delete(model, k)
		default:
			if got, want := pods.set(pod), !exists || old.UID != pod.UID; got != want {
				t.Fatalf("setting %v: got changed = %v, want %v", k, got, want)
			}
			model[k] = pod
		}
		got, ok := pods.get(k)
		if want, wantOK := model[k]; ok != wantOK || got.UID != want.UID {
			t.Fatalf("getting %v: got %v %v, want %v %v", k, got, ok, want, wantOK)
		}
	}
	for i := range lists {
		if !slices.EqualFunc(lists[i], copies[i], samePod) {
			t.Errorf("list %d was changed after it was handed out", i)
		}
	}
}

func samePod(a, b cluster.Pod) bool { return podKey(a) == podKey(b) && a.UID == b.UID }

// BenchmarkTableChange is the cost of one changed pod among 5,000 and of the snapshot after it.
func BenchmarkTableChange(b *testing.B) {
	pods := newTable(podKey)
	for i := range 5000 {
		pods.set(cluster.Pod{Namespace: fmt.Sprint("ns", i%100), Name: fmt.Sprint("p", i)})
	}
	pods.list()
	for i := 0; b.Loop(); i++ {
		pods.set(cluster.Pod{Namespace: "ns7", Name: "p7", UID: fmt.Sprint(i)})
		pods.list()
	}
}

package kube

import (
	"fmt"
	"log/slog"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/warren-cni/warren/pkg/cluster"
)

// offline is a source whose watch is played by the test.
func offline(tb testing.TB) *API {
	tb.Helper()
	a, err := NewAPI(&rest.Config{Host: "https://127.0.0.1:1"}, "n1", slog.New(slog.DiscardHandler))
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

// podAt returns a pod of the server's state at a version; the uid tells the objects of one name apart.
func podAt(version int, name, uid string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		Namespace: "shop", Name: name, UID: "u", ResourceVersion: fmt.Sprint(version), Labels: map[string]string{"state": uid},
	}}
}

// states returns the label of each pod.
func states(a *API) map[string]string {
	snapshot, _ := a.Snapshot()
	got := make(map[string]string)
	for _, p := range snapshot.Pods {
		got[p.Name] = p.Labels["state"]
	}
	return got
}

// TestReadsBesideTheWatch plays what a watch that lags can say before and after a read, and what has to be there then.
func TestReadsBesideTheWatch(t *testing.T) {
	read := func(version int, pods ...*corev1.Pod) func(*testing.T, *API) {
		return func(_ *testing.T, a *API) { a.pods.take(pods, fmt.Sprint(version), nil) }
	}
	event := func(does func(*API) error) func(*testing.T, *API) {
		return func(t *testing.T, a *API) {
			t.Helper()
			if err := does(a); err != nil {
				t.Error(err)
			}
		}
	}
	list := func(version int, pods ...any) func(*testing.T, *API) {
		return event(func(a *API) error { return a.pods.Replace(pods, fmt.Sprint(version)) })
	}
	added := func(p *corev1.Pod) func(*testing.T, *API) {
		return event(func(a *API) error { return a.pods.Add(p) })
	}
	modified := func(p *corev1.Pod) func(*testing.T, *API) {
		return event(func(a *API) error { return a.pods.Update(p) })
	}
	deleted := func(p *corev1.Pod) func(*testing.T, *API) {
		return event(func(a *API) error { return a.pods.Delete(p) })
	}
	bookmark := func(version int) func(*testing.T, *API) {
		return event(func(a *API) error { return a.pods.Bookmark(fmt.Sprint(version)) })
	}
	for name, test := range map[string]struct {
		steps []func(*testing.T, *API)
		want  map[string]string
	}{
		"older events do not undo a read": {
			[]func(*testing.T, *API){list(10), read(20, podAt(18, "a", "new")), added(podAt(15, "a", "old")), deleted(podAt(16, "a", "old"))},
			map[string]string{"a": "new"},
		},
		"the read's own event and later ones count": {
			[]func(*testing.T, *API){list(10), read(20, podAt(18, "a", "new")), added(podAt(18, "a", "new")), modified(podAt(21, "a", "newer"))},
			map[string]string{"a": "newer"},
		},
		"a later end counts": {
			[]func(*testing.T, *API){list(10), read(20, podAt(18, "a", "new")), deleted(podAt(21, "a", "new"))},
			map[string]string{},
		},
		"an end of the same version as the read counts before it": {
			[]func(*testing.T, *API){list(10), read(20, podAt(18, "a", "new")), deleted(podAt(20, "a", "old"))},
			map[string]string{"a": "new"},
		},
		"a read that the watch has passed brings nothing back": {
			[]func(*testing.T, *API){list(10, podAt(5, "a", "old")), deleted(podAt(21, "a", "old")), read(20, podAt(5, "a", "old"))},
			map[string]string{},
		},
		"a read that a bookmark has passed changes nothing": {
			[]func(*testing.T, *API){list(10, podAt(5, "a", "old")), bookmark(21), read(20, podAt(18, "a", "new"))},
			map[string]string{"a": "old"},
		},
		"an older list does not undo a read": {
			[]func(*testing.T, *API){list(10), read(20, podAt(18, "a", "new"), podAt(19, "b", "new")), list(15, podAt(14, "b", "old"), podAt(14, "c", "old"))},
			map[string]string{"a": "new", "b": "new", "c": "old"},
		},
		"a newer list counts": {
			[]func(*testing.T, *API){list(10), read(20, podAt(18, "a", "new")), list(25)},
			map[string]string{},
		},
		"an earlier read does not undo a later one": {
			[]func(*testing.T, *API){list(10), read(20, podAt(18, "a", "new")), read(19, podAt(12, "a", "old"))},
			map[string]string{"a": "new"},
		},
		"before the first list": {
			[]func(*testing.T, *API){read(20, podAt(18, "a", "new")), list(15, podAt(12, "a", "old"), podAt(12, "b", "old"))},
			map[string]string{"a": "new", "b": "old"},
		},
		"a pod that ended in between goes with the watch": {
			[]func(*testing.T, *API){list(10), read(20, podAt(18, "a", "new")), added(podAt(18, "a", "new")), bookmark(20), list(30, podAt(29, "b", "x"))},
			map[string]string{"b": "x"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := offline(t)
			for _, step := range test.steps {
				step(t, a)
			}
			checkEqual(t, "states", test.want, states(a))
		})
	}
}

// A policy that a read of its namespace does not find is gone, whatever a watch says that is behind; those of other namespaces are not.
func TestReadFindsPoliciesGone(t *testing.T) {
	a := offline(t)
	at := func(version int, namespace string) *networkingv1.NetworkPolicy {
		return &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "p", ResourceVersion: fmt.Sprint(version)}}
	}
	expect := func(when string, want ...string) {
		t.Helper()
		var got []string
		snapshot, _ := a.Snapshot()
		for _, p := range snapshot.Policies {
			got = append(got, p.Namespace)
		}
		checkEqual(t, when, want, got)
	}
	inShop := func(k cluster.Key) bool { return k.Namespace == "shop" }
	if err := a.policies.Replace([]any{at(5, "other"), at(6, "shop")}, "10"); err != nil {
		t.Fatal(err)
	}
	a.policies.take(nil, "9", inShop)
	expect("after an older read", "other", "shop")
	a.policies.take(nil, "20", inShop)
	expect("after the read", "other")
	if err := a.policies.Update(at(15, "shop")); err != nil {
		t.Fatal(err)
	}
	expect("after what the watch says of an older state", "other")
	if err := a.policies.Add(at(21, "shop")); err != nil {
		t.Fatal(err)
	}
	expect("once it is made again", "other", "shop")
}

func TestFollowerForgetsReads(t *testing.T) {
	a := offline(t)
	a.pods.take([]*corev1.Pod{podAt(18, "a", "new")}, "20", nil)
	if err := a.pods.Bookmark("20"); err != nil {
		t.Fatal(err)
	}
	if len(a.pods.ahead) > 0 {
		t.Errorf("%v is remembered after the watch has caught up, want nothing", a.pods.ahead)
	}
}

// TestHeartbeatsAreNoChange checks that neither a signal nor a change comes of what is not read.
func TestHeartbeatsAreNoChange(t *testing.T) {
	a := offline(t)
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", ResourceVersion: "1"}, Spec: corev1.NodeSpec{PodCIDRs: []string{"10.1.0.0/24"}}}
	pod := podAt(1, "a", "x")
	beat := func() {
		t.Helper()
		node, pod = node.DeepCopy(), pod.DeepCopy()
		node.Status.Conditions = append(node.Status.Conditions, corev1.NodeCondition{Type: corev1.NodeReady})
		pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady})
		if err := a.nodes.Update(node); err != nil {
			t.Fatal(err)
		}
		if err := a.pods.Update(pod); err != nil {
			t.Fatal(err)
		}
	}
	beat()
	if changes := a.Changes(); len(changes.Nodes) != 1 || len(changes.Pods) != 1 || len(a.Changed()) != 1 {
		t.Fatalf("the first changes are %+v, want a node, a pod and a signal", changes)
	}
	drain(a.Changed())
	beat()
	if changes := a.Changes(); !changes.Empty() || len(a.Changed()) != 0 {
		t.Errorf("changes of a heartbeat: %+v and %d signals, want none", changes, len(a.Changed()))
	}
	pod.Labels["state"] = "y"
	beat()
	checkEqual(t, "changes", map[cluster.Key]bool{{Namespace: "shop", Name: "a"}: true}, present(a.Changes().Pods))
}

func present(pods map[cluster.Key]*cluster.Pod) map[cluster.Key]bool {
	names := make(map[cluster.Key]bool)
	for k, p := range pods {
		names[k] = p != nil
	}
	return names
}

package kube

import (
	"net/netip"
	"reflect"
	"testing"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
)

// TestEqualPods changes every field of a pod, also one that somebody adds later.
func TestEqualPods(t *testing.T) {
	values := map[reflect.Type]any{
		reflect.TypeFor[string](): "x", reflect.TypeFor[bool](): true, reflect.TypeFor[labels.Set](): labels.Set{"app": "x"},
		reflect.TypeFor[[]netip.Addr]():        []netip.Addr{addr("10.0.0.1")},
		reflect.TypeFor[[]cluster.NamedPort](): []cluster.NamedPort{{Name: "http"}},
	}
	if !equalPods(&cluster.Pod{}, &cluster.Pod{}) {
		t.Error("two empty pods differ")
	}
	for field := range reflect.TypeFor[cluster.Pod]().Fields() {
		value, ok := values[field.Type]
		if !ok {
			t.Errorf("this test knows no value for field %s", field.Name)
			continue
		}
		var changed, same cluster.Pod
		reflect.ValueOf(&changed).Elem().FieldByIndex(field.Index).Set(reflect.ValueOf(value))
		reflect.ValueOf(&same).Elem().FieldByIndex(field.Index).Set(reflect.ValueOf(value))
		if equalPods(&cluster.Pod{}, &changed) || !equalPods(&same, &changed) {
			t.Errorf("the comparison does not see field %s", field.Name)
		}
	}
}

func TestChangesNameEveryKind(t *testing.T) {
	d := newDirectory(t, map[string]string{
		"all.yaml": nodeYAML + "---\n" + podYAML + "---\n" + policyYAML + "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n",
	})
	snapshot, _ := d.Snapshot()
	checkEqual(t, "the first changes", snapshot.Delta(), d.Changes())
	if again := d.Changes(); !again.Empty() {
		t.Errorf("changes without a change: %+v, want none", again)
	}
	d.update("all.yaml", nodeYAML+"---\n"+podYAML)
	checkEqual(t, "changes after two objects went", cluster.Delta{
		Namespaces: map[string]*cluster.Namespace{"shop": nil},
		Policies:   map[cluster.Key]*cluster.Policy{{Namespace: "shop", Name: "deny"}: nil},
	}, d.Changes())
}

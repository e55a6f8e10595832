package kube

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/cluster"
)

// TestLogAnnotation reads the annotation of both kinds that have it, as the watch brings them and as the first list does.
func TestLogAnnotation(t *testing.T) {
	const field = "metadata.annotations[warren.cni/log]"
	for name, test := range map[string]struct {
		annotations map[string]string
		want        cluster.LogMode
		fields      []string
	}{
		"missing":        {map[string]string{"example.com/log": "all"}, cluster.LogNone, nil},
		"denied":         {map[string]string{"warren.cni/log": "denied"}, cluster.LogDenied, nil},
		"all":            {map[string]string{"warren.cni/log": "all"}, cluster.LogAll, nil},
		"empty":          {map[string]string{"warren.cni/log": ""}, cluster.LogNone, []string{field}},
		"something else": {map[string]string{"warren.cni/log": "Denied"}, cluster.LogNone, []string{field}},
	} {
		t.Run(name, func(t *testing.T) {
			meta := metav1.ObjectMeta{Namespace: "shop", Name: "api", Annotations: test.annotations}
			for how, prepare := range map[string]func(any) (any, error){
				"whole": func(o any) (any, error) { return o, nil }, "trimmed": trim,
			} {
				check := func(code string, got cluster.LogMode, problems []cluster.Problem) {
					t.Helper()
					if got != test.want {
						t.Errorf("%s: got mode %v, want %v", how, got, test.want)
					}
					checkEqual(t, how, test.fields, fieldsOf(problems))
					for _, p := range problems {
						if p.Code != code || !strings.Contains(p.Message, `"denied" or "all"`) {
							t.Errorf("%s: problem %v, want code %s and the valid values", how, p, code)
						}
					}
				}
				object, err := prepare(&networkingv1.NetworkPolicy{ObjectMeta: meta})
				if err != nil {
					t.Fatal(err)
				}
				policy, problems := convertPolicy(object.(*networkingv1.NetworkPolicy))
				check(codePolicy, policy.Log, problems)
				if object, err = prepare(&corev1.Namespace{ObjectMeta: meta}); err != nil {
					t.Fatal(err)
				}
				namespace, problems := convertNamespace(object.(*corev1.Namespace))
				check(codeNamespace, namespace.Log, problems)
			}
		})
	}
}

package kube

import (
	"log/slog"
	"slices"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/internal/apiserver"
)

// testAPIProtection takes a cluster from one without the policies to one with all of them, and away from it in each way that denies
// nothing.
func testAPIProtection(t *testing.T, server *apiserver.Server, admin kubernetes.Interface) {
	r := run(t, server.Admin(), "n1")
	missing := func(problems []cluster.Problem) (objects []string) {
		for _, p := range problems {
			if p.Code == codeUnconfined && p.Message != "" && p.Remedy != "" {
				objects = append(objects, strings.TrimPrefix(p.Object, "ValidatingAdmissionPolicy "))
			}
		}
		return objects
	}
	r.wait("all policies missing", func(_ cluster.Snapshot, problems []cluster.Problem) bool {
		return len(missing(problems)) == len(confinements())
	})

	policies, bindings := admin.AdmissionregistrationV1().ValidatingAdmissionPolicies(), admin.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings()
	for _, c := range confinements() {
		meta := metav1.ObjectMeta{Name: c.name}
		_, err := policies.Create(t.Context(), &admissionv1.ValidatingAdmissionPolicy{ObjectMeta: meta, Spec: admissionv1.ValidatingAdmissionPolicySpec{
			// Nothing that another test writes.
			MatchConstraints: &admissionv1.MatchResources{ResourceRules: []admissionv1.NamedRuleWithOperations{{RuleWithOperations: admissionv1.RuleWithOperations{
				Operations: []admissionv1.OperationType{admissionv1.Create},
				Rule:       admissionv1.Rule{APIGroups: []string{""}, APIVersions: []string{"v1"}, Resources: []string{"podtemplates"}},
			}}}},
			Validations: []admissionv1.Validation{{Expression: "false"}},
		}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		_, err = bindings.Create(t.Context(), &admissionv1.ValidatingAdmissionPolicyBinding{ObjectMeta: meta, Spec: admissionv1.ValidatingAdmissionPolicyBindingSpec{
			PolicyName: c.name, ValidationActions: []admissionv1.ValidationAction{admissionv1.Deny},
		}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	// look looks, again while the server's cache is behind, until that is missing.
	look := func(what string, want ...string) {
		t.Helper()
		for {
			_, again := r.protection.look(r.ctx)
			got := missing(r.Problems())
			if slices.Equal(got, want) {
				if well := len(want) == 0; well != (again == lookWhileWell) {
					t.Errorf("%s: it is looked again in %v", what, again)
				}
				return
			}
			if r.ctx.Err() != nil {
				t.Fatalf("%s: missing %q, want %q", what, got, want)
			}
		}
	}
	look("all of them stand")

	stranger, err := NewAPI(server.Kubelet("n1"), "n1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	stranger.protection.look(r.ctx)
	if got := missing(stranger.Problems()); len(got) != len(confinements()) {
		t.Errorf("who may not read the policies misses %q", got)
	}
	if found, err := Unconfined(r.ctx, server.Admin()); err != nil || len(found) > 0 {
		t.Errorf("who asks once misses %v, error %v", found, err)
	}

	name := confinements()[1].name
	patch := func(what, text string, want ...string) {
		t.Helper()
		if _, err := bindings.Patch(t.Context(), name, types.MergePatchType, []byte(text), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		look(what, want...)
	}
	patch("one only warns", `{"spec":{"validationActions":["Warn","Audit"]}}`, name)
	patch("one covers some", `{"spec":{"validationActions":["Deny"],"matchResources":{"namespaceSelector":{"matchLabels":{"a":"b"}}}}}`, name)
	patch("it covers all again", `{"spec":{"matchResources":null}}`)
	for _, to := range []admissionv1.FailurePolicyType{admissionv1.Ignore, admissionv1.Fail} {
		text := []byte(`{"spec":{"failurePolicy":"` + to + `"}}`)
		if _, err := policies.Patch(t.Context(), name, types.MergePatchType, text, metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		if to == admissionv1.Ignore {
			look("one lets pass what it cannot judge", name)
		}
	}
	look("all of them stand again")
}

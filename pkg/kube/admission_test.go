package kube

import (
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"

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
	shipped, shippedBindings := shippedPolicies(t)
	for _, c := range confinements() {
		if _, err := policies.Create(t.Context(), shipped[c.name], metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		if _, err := bindings.Create(t.Context(), shippedBindings[c.name], metav1.CreateOptions{}); err != nil {
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
	patch("one is of another policy", `{"spec":{"matchResources":null,"policyName":"another"}}`, name)
	patch("it covers all again", `{"spec":{"policyName":"`+name+`"}}`)
	for _, c := range []struct{ what, text string }{
		{"one lets pass what it cannot judge", `{"spec":{"failurePolicy":"Ignore"}}`},
		{"one is about something else", `{"spec":{"failurePolicy":"Fail","matchConstraints":{"resourceRules":[
			{"apiGroups":[""],"apiVersions":["v1"],"operations":["CREATE","UPDATE"],"resources":["podtemplates"]}]}}}`},
		{"one demands nothing", `{"spec":{"validations":null,"auditAnnotations":[{"key":"a","valueExpression":"'a'"}],"matchConstraints":{"resourceRules":[
			{"apiGroups":[""],"apiVersions":["v1"],"operations":["*"],"resources":["*"]}]}}}`},
		{"one demands what is always so", `{"spec":{"validations":[{"expression":"true"}]}}`},
	} {
		if _, err := policies.Patch(t.Context(), name, types.MergePatchType, []byte(c.text), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
		look(c.what, name)
	}
	again, err := policies.Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	again.Spec = shipped[name].Spec
	if _, err = policies.Update(t.Context(), again, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	look("all of them stand again")
}

// The policies of the manifests confine, and no longer do with any of these changes.
func TestConfinementMissing(t *testing.T) {
	type change func(*admissionv1.ValidatingAdmissionPolicySpec, *admissionv1.ValidatingAdmissionPolicyBindingSpec)
	rule := func(edit func(*admissionv1.NamedRuleWithOperations)) change {
		return func(p *admissionv1.ValidatingAdmissionPolicySpec, _ *admissionv1.ValidatingAdmissionPolicyBindingSpec) {
			edit(&p.MatchConstraints.ResourceRules[0])
		}
	}
	constraints := func(edit func(*admissionv1.MatchResources)) change {
		return func(p *admissionv1.ValidatingAdmissionPolicySpec, _ *admissionv1.ValidatingAdmissionPolicyBindingSpec) {
			edit(p.MatchConstraints)
		}
	}
	expressions := func(edit func(*admissionv1.ValidatingAdmissionPolicySpec)) change {
		return func(p *admissionv1.ValidatingAdmissionPolicySpec, _ *admissionv1.ValidatingAdmissionPolicyBindingSpec) {
			edit(p)
		}
	}
	some := &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}}
	namespaced := admissionv1.NamespacedScope
	policies, bindings := shippedPolicies(t)
	own, err := ownPolicies()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change change
		says   string
	}{
		"as shipped": {rule(func(*admissionv1.NamedRuleWithOperations) {}), ""},
		"as the server fills it in": {constraints(func(m *admissionv1.MatchResources) {
			m.NamespaceSelector, m.ObjectSelector = &metav1.LabelSelector{}, &metav1.LabelSelector{}
			all := admissionv1.AllScopes
			m.ResourceRules[0].Scope = &all
		}), ""},
		"more than shipped": {rule(func(r *admissionv1.NamedRuleWithOperations) {
			r.APIGroups, r.APIVersions, r.Resources, r.Operations = []string{"*"}, []string{"*"}, []string{"*"}, []admissionv1.OperationType{"*"}
		}), ""},
		"in two rules": {constraints(func(m *admissionv1.MatchResources) {
			m.ResourceRules = append(m.ResourceRules, m.ResourceRules[0])
			m.ResourceRules[0].Operations, m.ResourceRules[1].Operations = []admissionv1.OperationType{"CREATE"}, []admissionv1.OperationType{"UPDATE"}
		}), ""},
		"no constraints": {func(p *admissionv1.ValidatingAdmissionPolicySpec, _ *admissionv1.ValidatingAdmissionPolicyBindingSpec) {
			p.MatchConstraints = nil
		}, "spec.matchConstraints"},
		"no updates":       {rule(func(r *admissionv1.NamedRuleWithOperations) { r.Operations = r.Operations[:1] }), "spec.matchConstraints"},
		"another resource": {rule(func(r *admissionv1.NamedRuleWithOperations) { r.Resources = []string{"nodes/status"} }), "spec.matchConstraints"},
		"another group":    {rule(func(r *admissionv1.NamedRuleWithOperations) { r.APIGroups = []string{"apps"} }), "spec.matchConstraints"},
		"another version":  {rule(func(r *admissionv1.NamedRuleWithOperations) { r.APIVersions = []string{"v2"} }), "spec.matchConstraints"},
		"one object":       {rule(func(r *admissionv1.NamedRuleWithOperations) { r.ResourceNames = []string{"a"} }), "spec.matchConstraints"},
		"a scope":          {rule(func(r *admissionv1.NamedRuleWithOperations) { r.Scope = &namespaced }), "spec.matchConstraints"},
		"exceptions":       {constraints(func(m *admissionv1.MatchResources) { m.ExcludeResourceRules = m.ResourceRules }), "spec.matchConstraints"},
		"some objects":     {constraints(func(m *admissionv1.MatchResources) { m.ObjectSelector = some }), "spec.matchConstraints"},
		"some namespaces":  {constraints(func(m *admissionv1.MatchResources) { m.NamespaceSelector = some }), "spec.matchConstraints"},
		"nothing demanded": {func(p *admissionv1.ValidatingAdmissionPolicySpec, _ *admissionv1.ValidatingAdmissionPolicyBindingSpec) {
			p.Validations = nil
		}, "spec.validations"},
		"everything allowed": {expressions(func(p *admissionv1.ValidatingAdmissionPolicySpec) { p.Validations[0].Expression = "true" }), "spec.validations"},
		"one demand less": {expressions(func(p *admissionv1.ValidatingAdmissionPolicySpec) {
			p.Validations = p.Validations[:len(p.Validations)-1]
		}), "spec.validations"},
		"nobody concerned": {expressions(func(p *admissionv1.ValidatingAdmissionPolicySpec) {
			p.MatchConditions = append(p.MatchConditions, admissionv1.MatchCondition{Name: "nobody", Expression: "false"})
		}), "spec.matchConditions"},
		"another condition": {expressions(func(p *admissionv1.ValidatingAdmissionPolicySpec) { p.MatchConditions[0].Expression = "true" }), "spec.matchConditions"},
		"another variable": {expressions(func(p *admissionv1.ValidatingAdmissionPolicySpec) {
			p.Variables = append(p.Variables, admissionv1.Variable{Name: "a", Expression: "1"})
		}), "spec.variables"},
		"blanks around, other words": {expressions(func(p *admissionv1.ValidatingAdmissionPolicySpec) {
			p.Validations[0].Expression, p.Validations[0].Message = "\n "+p.Validations[0].Expression+"\n", "no"
		}), ""},
		"another policy's binding": {func(_ *admissionv1.ValidatingAdmissionPolicySpec, b *admissionv1.ValidatingAdmissionPolicyBindingSpec) {
			b.PolicyName = "another"
		}, "spec.policyName"},
		"a binding that warns": {func(_ *admissionv1.ValidatingAdmissionPolicySpec, b *admissionv1.ValidatingAdmissionPolicyBindingSpec) {
			b.ValidationActions = []admissionv1.ValidationAction{admissionv1.Warn}
		}, "spec.validationActions"},
	} {
		for _, confines := range confinements() {
			policy, binding := policies[confines.name].DeepCopy(), bindings[confines.name].DeepCopy()
			c.change(&policy.Spec, &binding.Spec)
			if got := confines.missing(own[confines.name], policy.Spec, binding.Spec); (got == "") != (c.says == "") || !strings.Contains(got, c.says) {
				t.Errorf("%s, %s: %q, want %q", confines.name, name, got, c.says)
			}
		}
	}
}

// shippedPolicies reads the policies and bindings of the manifests, by name.
func shippedPolicies(t *testing.T) (map[string]*admissionv1.ValidatingAdmissionPolicy, map[string]*admissionv1.ValidatingAdmissionPolicyBinding) {
	t.Helper()
	text, err := os.ReadFile("../../manifests/base/admission.yaml")
	if err != nil {
		t.Fatal(err)
	}
	policies, bindings := map[string]*admissionv1.ValidatingAdmissionPolicy{}, map[string]*admissionv1.ValidatingAdmissionPolicyBinding{}
	for document := range strings.SplitSeq(string(text), "\n---\n") {
		object, _, err := scheme.Codecs.UniversalDeserializer().Decode([]byte(document), nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		switch o := object.(type) {
		case *admissionv1.ValidatingAdmissionPolicy:
			policies[o.Name] = o
		case *admissionv1.ValidatingAdmissionPolicyBinding:
			bindings[o.Name] = o
		}
	}
	return policies, bindings
}

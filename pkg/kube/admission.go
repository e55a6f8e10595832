package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/rest"

	"github.com/warren-cni/warren/manifests"
	"github.com/warren-cni/warren/pkg/cluster"
)

// How often it is looked whether the admission policies stand, and how often while they do not, or while nobody can tell.
const (
	lookWhileWell = 10 * time.Minute
	lookWhileNot  = 30 * time.Second
	lookPatience  = 10 * time.Second
)

// confinement is an admission policy of the manifests, the resource of the core group that it is about, and what whoever steals a
// credential can do without it.
type confinement struct{ name, resource, without string }

// confinements are the policies, each with a binding of the same name.
func confinements() []confinement {
	return []confinement{
		{"warren-kubelet-keeps-podcidrs", "nodes", "who steals a kubelet's credential can choose pod CIDRs for a Node that has none yet"},
		{"warren-publishes-own-key", "nodes", "who steals the credential of one node's warrend can change every Node"},
		{"warren-writes-own-events", "events", "who steals the credential of one node's warrend can rewrite every Event"},
	}
}

// protection knows whether the API server confines what can be done with stolen credentials.
type protection struct {
	client rest.Interface

	mu    sync.Mutex
	found []cluster.Problem
}

// run looks from time to time until the context ends, and notifies when the answer changes.
func (p *protection) run(ctx context.Context, notify func()) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		changed, again := p.look(ctx)
		if changed {
			notify()
		}
		timer.Reset(again)
	}
}

// look reads the policies and their bindings. Where the server does not answer, what was known stays.
func (p *protection) look(ctx context.Context) (changed bool, again time.Duration) {
	found, err := unconfined(ctx, p.client)
	if err != nil {
		return false, lookWhileNot
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	changed = !slices.Equal(p.found, found)
	p.found = found
	if len(found) > 0 {
		return changed, lookWhileNot
	}
	return changed, lookWhileWell
}

// Unconfined asks an API server for the admission policies of the manifests, and returns what is wrong with them. An error says that
// the server did not answer.
func Unconfined(ctx context.Context, config *rest.Config) ([]cluster.Problem, error) {
	c, err := newClients(config, nil)
	if err != nil {
		return nil, err
	}
	found, err := unconfined(ctx, c.admission)
	if err != nil {
		return nil, fmt.Errorf("asking the API server for admission policies: %w", err)
	}
	return found, nil
}

// unconfined finds the policies that do not stand or deny nothing.
func unconfined(ctx context.Context, client rest.Interface) ([]cluster.Problem, error) {
	ctx, cancel := context.WithTimeout(ctx, lookPatience)
	defer cancel()
	shipped, err := ownPolicies()
	if err != nil {
		return nil, err
	}
	var found []cluster.Problem
	for _, c := range confinements() {
		weak, err := c.weakness(ctx, client, shipped[c.name])
		if err != nil {
			return nil, err
		}
		if weak != "" {
			found = append(found, cluster.Problem{
				Code: codeUnconfined, Object: "ValidatingAdmissionPolicy " + c.name, Message: weak + ": " + c.without,
				Remedy: "apply manifests/warren.yaml of this version; it needs Kubernetes 1.30 or newer",
			})
		}
	}
	return found, nil
}

// weakness says why a policy denies nothing; it is empty where the policy denies. An error says that the server did not answer.
func (c confinement) weakness(ctx context.Context, client rest.Interface, shipped admissionv1.ValidatingAdmissionPolicySpec) (string, error) {
	var policy admissionv1.ValidatingAdmissionPolicy
	var binding admissionv1.ValidatingAdmissionPolicyBinding
	// Every node asks, and nothing here is urgent: the server's cache will do.
	read := func(resource string) *rest.Request {
		return client.Get().Resource(resource).Name(c.name).Param("resourceVersion", "0")
	}
	for _, err := range []error{
		read("validatingadmissionpolicies").Do(ctx).Into(&policy),
		read("validatingadmissionpolicybindings").Do(ctx).Into(&binding),
	} {
		switch {
		case apierrors.IsNotFound(err):
			return "the policy or its binding does not exist", nil
		case apierrors.IsForbidden(err):
			return "warrend may not read whether it stands", nil
		case err != nil:
			return "", err
		}
	}
	return c.missing(shipped, policy.Spec, binding.Spec), nil
}

// missing is empty for a policy and a binding that deny what those deny that were shipped with this version, and says what is missing for others.
// What an expression comes to it cannot tell, so each has to be the one that was shipped.
func (c confinement) missing(
	shipped, policy admissionv1.ValidatingAdmissionPolicySpec, binding admissionv1.ValidatingAdmissionPolicyBindingSpec,
) string {
	if field := otherExpressions(shipped, policy); field != "" {
		return "the policy is not the one of this version of warrend (" + field + "), as while an upgrade goes on, and may not keep from this"
	}
	switch {
	case !c.covered(policy.MatchConstraints):
		return "the policy does not cover every creation and update of " + c.resource + " (spec.matchConstraints)"
	case policy.FailurePolicy != nil && *policy.FailurePolicy != admissionv1.Fail:
		return "the policy lets pass what it cannot judge (spec.failurePolicy)"
	case binding.PolicyName != c.name:
		return "its binding is one of another policy (spec.policyName)"
	case !slices.Contains(binding.ValidationActions, admissionv1.Deny):
		return "its binding does not deny (spec.validationActions)"
	case binding.MatchResources != nil:
		return "its binding covers only some objects (spec.matchResources)"
	default:
		return ""
	}
}

// otherExpressions returns the field whose expressions are not those that were shipped, "" where all are.
func otherExpressions(shipped, policy admissionv1.ValidatingAdmissionPolicySpec) string {
	conditions := func(m admissionv1.MatchCondition) string { return m.Expression }
	validations := func(v admissionv1.Validation) string { return v.Expression }
	variables := func(v admissionv1.Variable) string { return v.Name + " " + v.Expression }
	switch {
	case !sameTexts(shipped.MatchConditions, policy.MatchConditions, conditions):
		return "spec.matchConditions"
	case !sameTexts(shipped.Validations, policy.Validations, validations):
		return "spec.validations"
	case !sameTexts(shipped.Variables, policy.Variables, variables):
		return "spec.variables"
	default:
		return ""
	}
}

// sameTexts says whether two lists have the same texts in the same order, but for blanks around them.
func sameTexts[T any](a, b []T, text func(T) string) bool {
	return slices.EqualFunc(a, b, func(x, y T) bool { return strings.TrimSpace(text(x)) == strings.TrimSpace(text(y)) })
}

// ownPolicies returns the policies that were shipped with this version, by name.
func ownPolicies() (map[string]admissionv1.ValidatingAdmissionPolicySpec, error) {
	own := map[string]admissionv1.ValidatingAdmissionPolicySpec{}
	for documents := utilyaml.NewYAMLOrJSONDecoder(bytes.NewReader(manifests.Admission()), bytes.MinRead); ; {
		var policy admissionv1.ValidatingAdmissionPolicy
		err := documents.Decode(&policy)
		if errors.Is(err, io.EOF) {
			return own, nil
		}
		if err != nil {
			return nil, fmt.Errorf("reading the admission policies of this version: %w", err)
		}
		if policy.Kind == "ValidatingAdmissionPolicy" { // else a binding
			own[policy.Name] = policy.Spec
		}
	}
}

// covered says whether all that the manifest's policy is about is matched.
func (c confinement) covered(m *admissionv1.MatchResources) bool {
	if m == nil || len(m.ExcludeResourceRules) > 0 || selective(m.NamespaceSelector) || selective(m.ObjectSelector) {
		return false
	}
	named := func(names []string, name string) bool {
		return slices.Contains(names, name) || slices.Contains(names, "*")
	}
	for _, operation := range []admissionv1.OperationType{admissionv1.Create, admissionv1.Update} {
		if !slices.ContainsFunc(m.ResourceRules, func(r admissionv1.NamedRuleWithOperations) bool {
			return (slices.Contains(r.Operations, operation) || slices.Contains(r.Operations, admissionv1.OperationAll)) &&
				named(r.APIGroups, "") && named(r.APIVersions, "v1") && named(r.Resources, c.resource) &&
				len(r.ResourceNames) == 0 && (r.Scope == nil || *r.Scope == admissionv1.AllScopes)
		}) {
			return false
		}
	}
	return true
}

// selective says whether a selector leaves anything out.
func selective(s *metav1.LabelSelector) bool {
	return s != nil && len(s.MatchLabels)+len(s.MatchExpressions) > 0
}

// problems returns what was found when it was looked last.
func (p *protection) problems() []cluster.Problem {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.found)
}

package kube

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"

	"github.com/warren-cni/warren/pkg/cluster"
)

// How often it is looked whether the admission policies stand, and how often while they do not, or while nobody can tell.
const (
	lookWhileWell = 10 * time.Minute
	lookWhileNot  = 30 * time.Second
	lookPatience  = 10 * time.Second
)

// confinement is an admission policy of the manifests, and what whoever steals a credential can do without it.
type confinement struct{ name, without string }

// confinements are the policies, each with a binding of the same name.
func confinements() []confinement {
	return []confinement{
		{"warren-kubelet-keeps-podcidrs", "who steals a kubelet's credential can choose pod CIDRs for a Node that has none yet"},
		{"warren-publishes-own-key", "who steals the credential of one node's warrend can change every Node"},
		{"warren-writes-own-events", "who steals the credential of one node's warrend can rewrite every Event"},
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
	var found []cluster.Problem
	for _, c := range confinements() {
		weak, err := weakness(ctx, client, c.name)
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
func weakness(ctx context.Context, client rest.Interface, name string) (string, error) {
	var policy admissionv1.ValidatingAdmissionPolicy
	var binding admissionv1.ValidatingAdmissionPolicyBinding
	// Every node asks, and nothing here is urgent: the server's cache will do.
	read := func(resource string) *rest.Request {
		return client.Get().Resource(resource).Name(name).Param("resourceVersion", "0")
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
	return denies(policy.Spec, binding.Spec), nil
}

// denies is empty for a policy and a binding that deny, and says what is missing for others.
func denies(policy admissionv1.ValidatingAdmissionPolicySpec, binding admissionv1.ValidatingAdmissionPolicyBindingSpec) string {
	switch {
	case policy.FailurePolicy != nil && *policy.FailurePolicy != admissionv1.Fail:
		return "the policy lets pass what it cannot judge (spec.failurePolicy)"
	case !slices.Contains(binding.ValidationActions, admissionv1.Deny):
		return "its binding does not deny (spec.validationActions)"
	case binding.MatchResources != nil:
		return "its binding covers only some objects (spec.matchResources)"
	default:
		return ""
	}
}

// problems returns what was found when it was looked last.
func (p *protection) problems() []cluster.Problem {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.found)
}

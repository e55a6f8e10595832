package main

import (
	"bytes"
	"fmt"
	"os"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// tier is one of the three kinds of pods, each in a namespace of its own.
type tier struct {
	name   string
	labels map[string]string
	port   uint16
	// reaches is the tier that this one may open connections to.
	reaches string
}

// tiers are those of manifests/examples.
func tiers() []tier {
	return []tier{
		{name: "web", labels: map[string]string{"app": "web"}, port: 8080, reaches: "api"},
		{name: "api", labels: map[string]string{"app": "api"}, port: 8080, reaches: "database"},
		{name: "database", labels: map[string]string{"app": "database"}, port: 5432},
	}
}

// objects are the example's Namespaces and NetworkPolicies.
type objects struct {
	namespaces []corev1.Namespace
	policies   []networkingv1.NetworkPolicy
}

// loadTiers reads the example. Its workloads are left out: the demo makes pods itself, as a kubelet would.
func loadTiers(path string) (objects, error) {
	var o objects
	text, err := os.ReadFile(path)
	if err != nil {
		return o, fmt.Errorf("reading the example: %w", err)
	}
	for i, document := range bytes.Split(text, []byte("\n---\n")) {
		if err := o.add(document); err != nil {
			return o, fmt.Errorf("reading document %d of %s: %w", i+1, path, err)
		}
	}
	if len(o.namespaces) != len(tiers()) || len(o.policies) == 0 {
		return o, fmt.Errorf("reading %s: it has %d namespaces and %d policies, which is not the example of three tiers", path, len(o.namespaces), len(o.policies))
	}
	return o, nil
}

// add reads one document.
func (o *objects) add(document []byte) error {
	var head metav1.TypeMeta
	if err := yaml.Unmarshal(document, &head); err != nil {
		return err
	}
	switch head.Kind {
	case "Namespace":
		var namespace corev1.Namespace
		if err := yaml.UnmarshalStrict(document, &namespace); err != nil {
			return err
		}
		o.namespaces = append(o.namespaces, namespace)
	case "NetworkPolicy":
		var policy networkingv1.NetworkPolicy
		if err := yaml.UnmarshalStrict(document, &policy); err != nil {
			return err
		}
		o.policies = append(o.policies, policy)
	}
	return nil
}

// isolated returns the policies of a tier with every rule for incoming traffic taken away, by the file they belong in.
func (o *objects) withoutIngress(namespace string) []networkingv1.NetworkPolicy {
	var changed []networkingv1.NetworkPolicy
	for _, policy := range o.policies {
		if policy.Namespace == namespace && len(policy.Spec.Ingress) > 0 {
			policy = *policy.DeepCopy()
			policy.Spec.Ingress = nil
			changed = append(changed, policy)
		}
	}
	return changed
}

// policyFile is the name of the file that a policy is written to.
func policyFile(policy networkingv1.NetworkPolicy) string {
	return "policy-" + policy.Namespace + "-" + policy.Name
}

package kube

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/warren-cni/warren/pkg/cluster"
)

// AnnotationLog is the annotation of a NetworkPolicy or a Namespace that says which connections are logged: denied or all.
const AnnotationLog = annotationPrefix + "log"

func convertNamespace(n *corev1.Namespace) (cluster.Namespace, []cluster.Problem) {
	found := &findings{code: codeNamespace, object: "Namespace " + n.Name, remedy: "correct the annotation of the Namespace"}
	return cluster.Namespace{Name: n.Name, Labels: labelSet(n.Labels), Log: logMode(n.Annotations, found)}, found.list
}

// logMode logs nothing where the annotation is not understood: what is logged opens and closes nothing.
func logMode(annotations map[string]string, found *findings) cluster.LogMode {
	text, ok := annotations[AnnotationLog]
	switch {
	case !ok:
		return cluster.LogNone
	case text == "denied":
		return cluster.LogDenied
	case text == "all":
		return cluster.LogAll
	default:
		found.add(field.NewPath("metadata", "annotations").Key(AnnotationLog), `%q is not "denied" or "all": nothing is logged for it`, text)
		return cluster.LogNone
	}
}

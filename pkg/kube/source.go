// Package kube is the boundary towards Kubernetes: it turns API objects into the values of pkg/cluster and follows their
// changes, from an API server or from a directory of YAML files.
//
// Input: Node, Namespace, Pod and NetworkPolicy objects. Output: what changed as a cluster.Delta, the problems of what could
// not be understood, and one coalesced signal that something changed. Objects are converted once, when they change. What
// cannot be understood never opens anything: a bad peer or rule is absent, a bad selector isolates, and a broken file
// keeps the objects that it had. Services are read only when somebody asks for one.
package kube

import (
	"context"
	"errors"
)

// Codes of the problems that this package reports.
const (
	codeNode        = "NodeInvalid"
	codeNamespace   = "NamespaceInvalid"
	codePod         = "PodInvalid"
	codePolicy      = "PolicyInvalid"
	codeFile        = "FileInvalid"
	codeDuplicate   = "ObjectDuplicate"
	codeUnreachable = "APIUnreachable"
	codeUnconfined  = "AdmissionPolicyMissing"
)

// errKind says that an object is of another kind than the one that was asked for.
var errKind = errors.New("the object is of another kind")

// errPodUnknown says that a pod with that namespace, name and uid does not exist.
var errPodUnknown = errors.New("the pod is not known")

// signals is what an API and a Directory have in common: they tell others of their state.
type signals struct {
	changed chan struct{}
	synced  chan struct{}
}

func newSignals() signals {
	return signals{changed: make(chan struct{}, 1), synced: make(chan struct{})}
}

// Changed receives a value after the snapshot or its problems changed; several changes may give one value.
func (s signals) Changed() <-chan struct{} { return s.changed }

// WaitForSync returns once a snapshot holds everything that there was when Run began, or with the context's error.
func (s signals) WaitForSync(ctx context.Context) error {
	select {
	case <-s.synced:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// notify leaves a value for the reader unless one waits already.
func (s signals) notify() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

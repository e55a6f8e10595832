// Package kube is the boundary towards Kubernetes: it turns API objects into the values of pkg/cluster and follows their
// changes, from an API server or from a directory of YAML files.
//
// Input: Node, Namespace, Pod and NetworkPolicy objects. Output: a cluster.Snapshot, the problems of what could not be
// understood, and one coalesced signal that something changed. Objects are converted once, when they change. What cannot
// be understood never opens anything: a bad peer or rule is absent, a bad selector isolates, and a broken file keeps the
// objects that it had.
package kube

import (
	"context"
	"errors"

	"github.com/warren-cni/warren/pkg/cluster"
)

// Codes of the problems that this package reports.
const (
	codeNode        = "NodeInvalid"
	codePod         = "PodInvalid"
	codePolicy      = "PolicyInvalid"
	codeFile        = "FileInvalid"
	codeDuplicate   = "ObjectDuplicate"
	codeUnreachable = "APIUnreachable"
)

// ErrPodUnknown says that a pod with that namespace, name and uid does not exist.
var ErrPodUnknown = errors.New("the pod is not known")

// Source is where the objects come from: an API or a Directory.
type Source interface {
	// Run follows the objects until the context ends. It returns nil then, and an error when it cannot follow them at all.
	Run(ctx context.Context) error
	// Synced is true once a snapshot holds everything that there was when Run began.
	Synced() bool
	// WaitForSync returns when Synced is true, or with the context's error.
	WaitForSync(ctx context.Context) error
	// Changed receives a value after a snapshot or its problems changed; several changes may give one value.
	Changed() <-chan struct{}
	// Snapshot returns the state of the cluster and what could not be understood in it. The caller must not change it.
	Snapshot() (cluster.Snapshot, []cluster.Problem)
	// FetchPod makes sure that the snapshot holds the pod, reading it from the source when it has not arrived yet. An
	// error that is ErrPodUnknown means that there is no such pod.
	FetchPod(ctx context.Context, namespace, name, uid string) error
	// Publish sets annotations on the own Node, and writes only where they differ.
	Publish(ctx context.Context, annotations map[string]string) error
}

var (
	_ Source = (*API)(nil)
	_ Source = (*Directory)(nil)
)

// signals is the half of a Source that tells others of its state.
type signals struct {
	changed chan struct{}
	synced  chan struct{}
}

func newSignals() signals {
	return signals{changed: make(chan struct{}, 1), synced: make(chan struct{})}
}

// Changed receives a value after something changed.
func (s signals) Changed() <-chan struct{} { return s.changed }

// Synced is true once everything that there was at the start has arrived.
func (s signals) Synced() bool {
	select {
	case <-s.synced:
		return true
	default:
		return false
	}
}

// WaitForSync returns when Synced is true, or with the context's error.
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

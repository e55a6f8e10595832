package kube

import (
	"cmp"
	"context"
	"log/slog"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/record"
	"k8s.io/klog/v2"
)

// component is what the Events of this program say that they come from.
const component = "warren"

// eventsOfObject is how many different Events with one reason about one object are written at once; later ones follow one in five minutes.
// Equal ones raise a count.
const eventsOfObject = 10

// Event is something that whoever looks at an object shall see (kubectl describe, kubectl events).
type Event struct {
	Object Reference
	Type   EventType
	// Reason is one word in camel case that can be searched for.
	Reason  string
	Message string
}

// EventType says how bad an Event is.
type EventType string

// The types.
const (
	Normal  EventType = "Normal"
	Warning EventType = "Warning"
)

// Reference names an object.
type Reference struct {
	// Kind is NetworkPolicy, Pod, Namespace or Node.
	Kind string
	// Namespace is empty for kinds without one.
	Namespace string
	Name      string
	// UID is found by the source where it is empty.
	UID string
}

// Event writes an Event about an object. It never waits and never fails: what is too much, or finds no server, is dropped.
// There are no Events before Run.
func (a *API) Event(_ context.Context, e Event) {
	a.mu.Lock()
	e.Object.UID = cmp.Or(e.Object.UID, a.store.uid(e.Object))
	a.mu.Unlock()
	a.events.write(e)
}

// Event logs an Event about an object, as seldom as an API writes it.
func (d *Directory) Event(_ context.Context, e Event) {
	d.mu.Lock()
	e.Object.UID = cmp.Or(e.Object.UID, d.store.uid(e.Object))
	d.mu.Unlock()
	d.events.write(e)
}

// Reporters returns the nodes that shall write an Event about an object. Of a policy that is the first by name among the nodes with a pod
// that the policy selects, or else among all; of a Namespace the same with its pods. Of a Node they are two, as far as there are: the owner of
// what the Node claims, where it is somebody's, and one that is neither. There are none where there is no such object or no node.
func (a *API) Reporters(of Reference, owner string) []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.store.reporters(of, owner)
}

// Reporters returns the nodes that shall write an Event about an object, as that of an API does.
func (d *Directory) Reporters(of Reference, owner string) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.store.reporters(of, owner)
}

// events hands Events to a sink, in the background.
type events struct {
	mu       sync.Mutex
	recorder record.EventRecorder // nil before Run
}

// run begins to write Events as the node, until the context ends.
func (e *events) run(ctx context.Context, node string, sink record.EventSink) {
	broadcaster := record.NewBroadcaster(record.WithContext(ctx), record.WithCorrelatorOptions(record.CorrelatorOptions{
		BurstSize: eventsOfObject, SpamKeyFunc: limitedWith,
	}))
	broadcaster.StartRecordingToSink(sink)
	source := corev1.EventSource{Component: component, Host: node}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.recorder = broadcaster.NewRecorder(runtime.NewScheme(), source).WithLogger(klog.FromContext(ctx))
}

// limitedWith returns what is equal for Events that are limited together. By default they are for all reasons, and who is wrong in one way
// again and again would be told of no other.
func limitedWith(e *corev1.Event) string {
	o := e.InvolvedObject
	return strings.Join([]string{o.Kind, o.Namespace, o.Name, string(o.UID), e.Reason}, " ")
}

func (e *events) write(event Event) {
	e.mu.Lock()
	recorder := e.recorder
	e.mu.Unlock()
	if recorder == nil {
		return
	}
	version := corev1.SchemeGroupVersion
	if event.Object.Kind == kindPolicy {
		version = networkingv1.SchemeGroupVersion
	}
	recorder.Event(&corev1.ObjectReference{
		APIVersion: version.String(), Kind: event.Object.Kind,
		Namespace: event.Object.Namespace, Name: event.Object.Name, UID: types.UID(event.Object.UID),
	}, string(event.Type), event.Reason, event.Message)
}

// serverSink writes Events to the API server.
type serverSink struct {
	context func() context.Context
	client  rest.Interface
}

// Create writes a new Event.
func (s serverSink) Create(event *corev1.Event) (*corev1.Event, error) {
	var written corev1.Event
	err := s.client.Post().Namespace(event.Namespace).Resource("events").Body(event).Do(s.context()).Into(&written)
	return &written, err
}

// Patch changes the count and time of an Event.
func (s serverSink) Patch(event *corev1.Event, patch []byte) (*corev1.Event, error) {
	var written corev1.Event
	err := s.client.Patch(types.StrategicMergePatchType).Namespace(event.Namespace).Resource("events").Name(event.Name).
		Body(patch).Do(s.context()).Into(&written)
	return &written, err
}

// Update is never called: what changes of an Event is patched.
func (s serverSink) Update(event *corev1.Event) (*corev1.Event, error) { return event, nil }

// logSink logs new Events, for sources that no server stands behind.
type logSink struct{ log *slog.Logger }

// Create logs the Event.
func (s logSink) Create(event *corev1.Event) (*corev1.Event, error) {
	object := event.InvolvedObject
	s.log.Info("event", "type", event.Type, "reason", event.Reason, "message", event.Message,
		"kind", object.Kind, "namespace", object.Namespace, "name", object.Name)
	return event, nil
}

// Patch does not log again what was logged.
func (s logSink) Patch(event *corev1.Event, _ []byte) (*corev1.Event, error) { return event, nil }

// Update does not log again what was logged.
func (s logSink) Update(event *corev1.Event) (*corev1.Event, error) { return event, nil }

package kube

import (
	"cmp"
	"context"
	"log/slog"
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

// eventsOfObject is how many different Events about one object are written at once; later ones follow one in five minutes. Equal
// ones raise a count.
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

// Reporter returns the node that shall write an Event about an object, so that only one does. Of a policy that is the first by name
// among the nodes with a pod that the policy selects, or else among all; of a Namespace the same with its pods; of a Node the
// first that is another, if there is one. It is empty where there is no such object or no node.
func (a *API) Reporter(of Reference) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.store.reporter(of)
}

// Reporter returns the node that shall write an Event about an object, as that of an API does.
func (d *Directory) Reporter(of Reference) string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.store.reporter(of)
}

// events hands Events to a sink, in the background.
type events struct {
	mu       sync.Mutex
	recorder record.EventRecorder // nil before Run
}

// run begins to write Events as the node, until the context ends.
func (e *events) run(ctx context.Context, node string, sink record.EventSink) {
	broadcaster := record.NewBroadcaster(record.WithContext(ctx), record.WithCorrelatorOptions(record.CorrelatorOptions{BurstSize: eventsOfObject}))
	broadcaster.StartRecordingToSink(sink)
	source := corev1.EventSource{Component: component, Host: node}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.recorder = broadcaster.NewRecorder(runtime.NewScheme(), source).WithLogger(klog.FromContext(ctx))
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

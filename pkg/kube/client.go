package kube

import (
	"fmt"

	admissionv1 "k8s.io/api/admissionregistration/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/transport"
)

// What a node may ask of the API server: every pod that starts is read, and after a reboot they all start at once.
const (
	requestsPerSecond = 50
	requestsAtOnce    = 300
)

// Events are counted by themselves, so that they do not make pods wait.
const (
	eventsPerSecond = 1
	eventsAtOnce    = 25
)

// clients are the clients of the API groups that Warren reads.
type clients struct {
	core       *rest.RESTClient
	networking *rest.RESTClient
	discovery  *rest.RESTClient
	admission  *rest.RESTClient
	events     *rest.RESTClient
}

// newClients makes clients that share one connection, wrapped. They know these API groups and no more: the whole
// clientset would link the types of every group into the daemon.
func newClients(config *rest.Config, wrap transport.WrapperFunc) (clients, error) {
	scheme, err := newScheme()
	if err != nil {
		return clients{}, err
	}
	config = rest.CopyConfig(config)
	config.Wrap(wrap)
	if config.Dial == nil {
		config.Dial = newDialer().DialContext
	}
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	config.ContentType = runtime.ContentTypeProtobuf
	config.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	httpClient, err := rest.HTTPClientFor(config)
	if err != nil {
		return clients{}, fmt.Errorf("making a client of the API server: %w", err)
	}
	var c clients
	for _, group := range []struct {
		to         **rest.RESTClient
		path       string
		version    schema.GroupVersion
		qps, burst int
	}{
		{&c.core, "/api", corev1.SchemeGroupVersion, requestsPerSecond, requestsAtOnce},
		{&c.networking, "/apis", networkingv1.SchemeGroupVersion, requestsPerSecond, requestsAtOnce},
		{&c.discovery, "/apis", discoveryv1.SchemeGroupVersion, requestsPerSecond, requestsAtOnce},
		{&c.admission, "/apis", admissionv1.SchemeGroupVersion, requestsPerSecond, requestsAtOnce},
		{&c.events, "/api", corev1.SchemeGroupVersion, eventsPerSecond, eventsAtOnce},
	} {
		config.APIPath, config.GroupVersion = group.path, &group.version
		config.QPS, config.Burst = float32(group.qps), group.burst
		if *group.to, err = rest.RESTClientForConfigAndClient(config, httpClient); err != nil {
			return clients{}, fmt.Errorf("making a client of %s: %w", group.version, err)
		}
	}
	return c, nil
}

func newScheme() (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{
		corev1.AddToScheme, networkingv1.AddToScheme, discoveryv1.AddToScheme, admissionv1.AddToScheme,
	} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("registering the API types: %w", err)
		}
	}
	return scheme, nil
}

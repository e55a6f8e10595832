package kube

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/warren-cni/warren/pkg/cluster"
)

// Service reads a Service with its endpoints from the server. Services are not followed: only people ask for them.
func (a *API) Service(ctx context.Context, namespace, name string) (cluster.Service, error) {
	var s corev1.Service
	err := a.clients.core.Get().Namespace(namespace).Resource("services").Name(name).Do(ctx).Into(&s)
	if apierrors.IsNotFound(err) {
		err = errServiceUnknown
	}
	if err != nil {
		return cluster.Service{}, fmt.Errorf("reading Service %s/%s: %w", namespace, name, err)
	}
	return a.serviceWithEndpoints(ctx, &s)
}

// ServiceAt finds the Service that has an address, if one has.
func (a *API) ServiceAt(ctx context.Context, address netip.Addr) (cluster.Service, bool, error) {
	var list corev1.ServiceList
	// What the server has in memory is new enough for a question.
	if err := a.clients.core.Get().Resource("services").Param("resourceVersion", "0").Do(ctx).Into(&list); err != nil {
		return cluster.Service{}, false, fmt.Errorf("looking for the Service at %s: %w", address, err)
	}
	for i := range list.Items {
		if hasAddress(&list.Items[i], address) {
			service, err := a.serviceWithEndpoints(ctx, &list.Items[i])
			return service, err == nil, err
		}
	}
	return cluster.Service{}, false, nil
}

func (a *API) serviceWithEndpoints(ctx context.Context, s *corev1.Service) (cluster.Service, error) {
	service, err := convertService(s)
	if err != nil {
		return cluster.Service{}, fmt.Errorf("reading Service %s: %w", service.Key(), err)
	}
	var list discoveryv1.EndpointSliceList
	err = a.clients.discovery.Get().Namespace(s.Namespace).Resource("endpointslices").
		Param("labelSelector", discoveryv1.LabelServiceName+"="+s.Name).Do(ctx).Into(&list)
	if err != nil {
		return cluster.Service{}, fmt.Errorf("reading the endpoints of Service %s: %w", service.Key(), err)
	}
	service.Endpoints = endpointsOf(list.Items)
	return service, nil
}

// Service returns a Service of the files. Without EndpointSlices its endpoints are the pods that its selector chooses.
func (d *Directory) Service(_ context.Context, namespace, name string) (cluster.Service, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	s, ok := d.services[cluster.Key{Namespace: namespace, Name: name}]
	if !ok {
		return cluster.Service{}, fmt.Errorf("reading Service %s/%s in %s: %w", namespace, name, d.path, errServiceUnknown)
	}
	return d.serviceWithEndpoints(s)
}

// ServiceAt finds the Service that has an address, if one has.
func (d *Directory) ServiceAt(_ context.Context, address netip.Addr) (cluster.Service, bool, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, k := range slices.SortedFunc(maps.Keys(d.services), compareKeys) {
		if s := d.services[k]; hasAddress(s, address) {
			service, err := d.serviceWithEndpoints(s)
			return service, err == nil, err
		}
	}
	return cluster.Service{}, false, nil
}

// Services returns the Services of the files whose endpoints are known.
func (d *Directory) Services() []cluster.Service {
	d.mu.Lock()
	defer d.mu.Unlock()
	var known []cluster.Service
	for _, k := range slices.SortedFunc(maps.Keys(d.services), compareKeys) {
		if service, err := d.serviceWithEndpoints(d.services[k]); err == nil {
			known = append(known, service)
		}
	}
	return known
}

func (d *Directory) serviceWithEndpoints(s *corev1.Service) (cluster.Service, error) {
	service, err := convertService(s)
	if err != nil {
		return cluster.Service{}, fmt.Errorf("reading Service %s: %w", service.Key(), err)
	}
	var written []discoveryv1.EndpointSlice
	for k, slice := range d.endpoints {
		if k.Namespace == s.Namespace && slice.Labels[discoveryv1.LabelServiceName] == s.Name {
			written = append(written, *slice)
		}
	}
	if len(written) > 0 {
		service.Endpoints = endpointsOf(written)
		return service, nil
	}
	if service.Endpoints, err = selectEndpoints(s, d.store.pods.list()); err != nil {
		return cluster.Service{}, fmt.Errorf("reading Service %s: %w", service.Key(), err)
	}
	return service, nil
}

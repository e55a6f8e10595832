package kube

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Servers returns where the API server is: the addresses of the host that the client was told, and the endpoints of the Service
// default/kubernetes, to one of which kube-proxy may translate that. These are written by the API servers alone. An account that may not
// read them gets the first.
func (a *API) Servers(ctx context.Context) ([]netip.Addr, error) {
	host := a.clients.core.Get().URL().Hostname()
	addresses, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("looking up the API server's host: %w", err)
	}
	for i := range addresses {
		addresses[i] = addresses[i].Unmap()
	}
	var list discoveryv1.EndpointSliceList
	err = a.clients.discovery.Get().Namespace(metav1.NamespaceDefault).Resource("endpointslices").
		Param("labelSelector", discoveryv1.LabelServiceName+"=kubernetes").Do(ctx).Into(&list)
	if err != nil && !apierrors.IsForbidden(err) {
		return nil, fmt.Errorf("reading the endpoints of the API server: %w", err)
	}
	for _, e := range endpointsOf(list.Items) {
		addresses = append(addresses, e.Address)
	}
	return addresses, nil
}

// Servers returns nothing: there is no API server.
func (d *Directory) Servers(context.Context) ([]netip.Addr, error) { return nil, nil }

package kube

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/internal/apiserver"
)

// answers is what a Directory and an API both know of Services.
type answers interface {
	Service(ctx context.Context, namespace, name string) (cluster.Service, error)
	ServiceAt(ctx context.Context, address netip.Addr) (cluster.Service, bool, error)
}

var (
	_ answers = (*API)(nil)
	_ answers = (*Directory)(nil)
)

const (
	webPodsYAML = `apiVersion: v1
kind: List
items:
- {apiVersion: v1, kind: Pod, metadata: {name: b, namespace: shop, labels: {app: web}}, spec: {nodeName: n2, containers: [{name: c, image: i, ports: [{name: http, containerPort: 8081}]}]}, status: {podIPs: [{ip: 10.2.0.9}, {ip: "fd00:2::9"}]}}
- {apiVersion: v1, kind: Pod, metadata: {name: a, namespace: shop, labels: {app: web}}, spec: {nodeName: n1, containers: [{name: c, image: i, ports: [{name: http, containerPort: 8080}]}]}, status: {podIP: 10.1.0.9}}
- {apiVersion: v1, kind: Pod, metadata: {name: over, namespace: shop, labels: {app: web}}, spec: {nodeName: n1, containers: [{name: c, image: i}]}, status: {phase: Succeeded, podIP: 10.1.0.8}}
- {apiVersion: v1, kind: Pod, metadata: {name: other, namespace: shop, labels: {app: db}}, spec: {nodeName: n1, containers: [{name: c, image: i}]}, status: {podIP: 10.1.0.7}}
- {apiVersion: v1, kind: Pod, metadata: {name: away, namespace: bar, labels: {app: web}}, spec: {nodeName: n1, containers: [{name: c, image: i}]}, status: {podIP: 10.1.0.6}}
`
	webServiceYAML = `apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIP: 10.96.0.7
  externalIPs: [192.0.2.7]
  selector: {app: web}
  ports: [{name: http, port: 80, targetPort: http}, {name: dns, port: 53, protocol: UDP, targetPort: 1053}, {name: same, port: 9000}, {name: lost, port: 9, targetPort: missing}]
status: {loadBalancer: {ingress: [{ip: 198.51.100.7}]}}
`
	webSliceYAML = `apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [10.1.0.9], nodeName: n1, targetRef: {kind: Pod, namespace: shop, name: a}}, {addresses: [10.2.0.9], conditions: {ready: false}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-2, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: dns, port: 1053, protocol: UDP}, {name: any}]
endpoints: [{addresses: [10.1.0.9], conditions: {ready: false}}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: names, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: FQDN
endpoints: [{addresses: [web.example.com]}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: foreign, namespace: shop, labels: {kubernetes.io/service-name: other}}
addressType: IPv4
ports: []
endpoints: [{addresses: [10.1.0.77]}]
`
)

func TestServiceOfSelector(t *testing.T) {
	d := newDirectory(t, map[string]string{"pods.yaml": webPodsYAML, "web.yaml": webServiceYAML})
	got, err := d.Service(t.Context(), "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	b := cluster.Endpoint{
		Ports: map[string]uint16{"http": 8081, "dns": 1053, "same": 9000}, Pod: cluster.Key{Namespace: "shop", Name: "b"}, Node: "n2", Ready: true,
	}
	b4, b6 := b, b
	b4.Address, b6.Address = addr("10.2.0.9"), addr("fd00:2::9")
	want := cluster.Service{
		Namespace: "shop", Name: "web", ClusterIPs: []netip.Addr{addr("10.96.0.7")},
		Ports: []cluster.ServicePort{{Name: "http", Protocol: cluster.TCP, Port: 80}, {Name: "dns", Protocol: cluster.UDP, Port: 53}, {Name: "same", Protocol: cluster.TCP, Port: 9000}, {Name: "lost", Protocol: cluster.TCP, Port: 9}},
		Endpoints: []cluster.Endpoint{
			{
				Address: addr("10.1.0.9"), Ports: map[string]uint16{"http": 8080, "dns": 1053, "same": 9000},
				Pod: cluster.Key{Namespace: "shop", Name: "a"}, Node: "n1", Ready: true,
			},
			b4, b6,
		},
	}
	checkEqual(t, "service", want, got)

	d.update("web.yaml", strings.Replace(webServiceYAML, "spec:\n", "spec:\n  ipFamilies: [IPv4]\n", 1))
	if got, err = d.Service(t.Context(), "shop", "web"); err != nil || len(got.Endpoints) != 2 {
		t.Errorf("a Service of IPv4 has %v (%v), want two endpoints", got.Endpoints, err)
	}
}

func TestServiceOfEndpointSlices(t *testing.T) {
	d := newDirectory(t, map[string]string{"pods.yaml": webPodsYAML, "web.yaml": webServiceYAML, "slices.yaml": webSliceYAML})
	got, err := d.Service(t.Context(), "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	checkEqual(t, "endpoints", []cluster.Endpoint{
		{
			Address: addr("10.1.0.9"), Ports: map[string]uint16{"http": 8080, "dns": 1053},
			Pod: cluster.Key{Namespace: "shop", Name: "a"}, Node: "n1", Ready: true,
		},
		{Address: addr("10.2.0.9"), Ports: map[string]uint16{"http": 8080}},
	}, got.Endpoints)
}

func TestServiceAt(t *testing.T) {
	d := newDirectory(t, map[string]string{"pods.yaml": webPodsYAML, "web.yaml": webServiceYAML})
	for text, want := range map[string]bool{"10.96.0.7": true, "192.0.2.7": true, "198.51.100.7": true, "10.96.0.8": false, "10.1.0.9": false} {
		got, found, err := d.ServiceAt(t.Context(), addr(text))
		if err != nil || found != want || (found && got.Name != "web") {
			t.Errorf("%s: got %v %v (%v), want found = %v", text, got.Name, found, err, want)
		}
	}
}

func TestServicesWithoutEndpoints(t *testing.T) {
	meta := "apiVersion: v1\nkind: Service\nmetadata: {name: x, namespace: shop}\n"
	for name, test := range map[string]struct {
		spec    string
		message string
	}{
		"unknown":       {"", "no such Service"},
		"external name": {"spec: {type: ExternalName, externalName: db.example.com}\n", "db.example.com"},
		"no selector":   {"spec: {clusterIP: 10.96.0.9, ports: [{port: 80}]}\n", "no selector and no EndpointSlices"},
		"a bad port":    {"spec: {selector: {app: web}, ports: [{port: 70000}]}\n", "70000/ is not a port"},
	} {
		t.Run(name, func(t *testing.T) {
			files := map[string]string{}
			if test.spec != "" {
				files["x.yaml"] = meta + test.spec
			}
			_, err := newDirectory(t, files).Service(t.Context(), "shop", "x")
			if err == nil || !strings.Contains(err.Error(), test.message) || !strings.Contains(err.Error(), "shop/x") {
				t.Errorf("got %v, want an error that names shop/x and says %q", err, test.message)
			}
		})
	}
	headless := newDirectory(t, map[string]string{"pods.yaml": webPodsYAML, "x.yaml": meta + "spec: {clusterIP: None, selector: {app: web}, ports: [{port: 80}]}\n"})
	got, err := headless.Service(t.Context(), "shop", "x")
	if err != nil || len(got.ClusterIPs) > 0 || len(got.Endpoints) != 3 || got.Endpoints[0].Ports[""] != 80 {
		t.Errorf("a headless Service is %+v (%v), want three endpoints and no address", got, err)
	}
}

// testAPIService reads a Service that a real server has.
func testAPIService(t *testing.T, server *apiserver.Server, admin kubernetes.Interface) {
	service, err := admin.CoreV1().Services("shop").Create(t.Context(), &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Name: "http", Port: 80}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	name, port := "http", int32(8080)
	for service, address := range map[string]string{"web": "10.1.0.9", "other": "10.1.0.10"} {
		_, err = admin.DiscoveryV1().EndpointSlices("shop").Create(t.Context(), &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Name: service, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
			AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port}},
			Endpoints: []discoveryv1.Endpoint{{Addresses: []string{address}}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	a, err := NewAPI(server.Admin(), "n1", nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := a.Service(t.Context(), "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	checkEqual(t, "service", cluster.Service{
		Namespace: "shop", Name: "web", ClusterIPs: []netip.Addr{addr(service.Spec.ClusterIP)},
		Ports:     []cluster.ServicePort{{Name: "http", Protocol: cluster.TCP, Port: 80}},
		Endpoints: []cluster.Endpoint{{Address: addr("10.1.0.9"), Ports: map[string]uint16{"http": 8080}, Ready: true}},
	}, got)
	at, found, err := a.ServiceAt(t.Context(), addr(service.Spec.ClusterIP))
	if err != nil || !found {
		t.Errorf("the Service at %s: found = %v, %v, want it", service.Spec.ClusterIP, found, err)
	}
	checkEqual(t, "service at its address", got, at)
	if _, found, err = a.ServiceAt(t.Context(), addr("192.0.2.1")); found || err != nil {
		t.Errorf("the Service at a stranger's address: found = %v, %v, want none", found, err)
	}
	if _, err = a.Service(t.Context(), "shop", "none"); !errors.Is(err, errServiceUnknown) {
		t.Errorf("a Service that does not exist: got %v, want errServiceUnknown", err)
	}
}

// testAPIServers asks where a real server is.
func testAPIServers(t *testing.T, server *apiserver.Server, admin kubernetes.Interface) {
	for name, address := range map[string]string{"kubernetes": "192.0.2.17", "other": "192.0.2.18"} {
		_, err := admin.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault).Create(t.Context(), &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: name}},
			AddressType: discoveryv1.AddressTypeIPv4, Endpoints: []discoveryv1.Endpoint{{Addresses: []string{address}}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
	}
	ask := func(config *rest.Config) ([]netip.Addr, error) {
		a, err := NewAPI(config, "n1", nil)
		if err != nil {
			t.Fatal(err)
		}
		return a.Servers(t.Context())
	}
	for who, config := range map[string]*rest.Config{"admin": server.Admin(), "kubelet, which may not read endpoints": server.Kubelet("n1")} {
		want := []netip.Addr{addr("127.0.0.1")}
		if who == "admin" {
			want = append(want, addr("192.0.2.17"))
		}
		got, err := ask(config)
		if err != nil {
			t.Errorf("%s: %v", who, err)
		}
		checkEqual(t, who, want, got)
	}
	named := server.Admin()
	named.ServerName = "127.0.0.1" // as its certificate has it
	named.Host = strings.Replace(named.Host, "127.0.0.1", "localhost", 1)
	if got, err := ask(named); err != nil || !slices.Contains(got, addr("127.0.0.1")) || !slices.Contains(got, addr("192.0.2.17")) {
		t.Errorf("at %s: %v, error %v", named.Host, got, err)
	}
	named.Host = strings.Replace(named.Host, "localhost", "unknown.invalid", 1)
	if got, err := ask(named); err == nil {
		t.Errorf("at %s: %v, want an error", named.Host, got)
	}
}

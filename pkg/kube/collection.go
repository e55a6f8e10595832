package kube

import (
	"fmt"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/warren-cni/warren/pkg/cluster"
)

// object names a converted object of any kind.
type object struct {
	resource string
	cluster.Key
}

// String renders the name for messages.
func (o object) String() string {
	if o.Namespace == "" {
		return o.resource + "/" + o.Name
	}
	return o.resource + "/" + o.Namespace + "/" + o.Name
}

// collection converts the objects of several files.
type collection struct {
	store
	services  map[cluster.Key]*corev1.Service
	endpoints map[cluster.Key]*discoveryv1.EndpointSlice
	files     map[object]string
	problems  []cluster.Problem
}

func newCollection() *collection {
	return &collection{
		store: newStore(), services: make(map[cluster.Key]*corev1.Service), endpoints: make(map[cluster.Key]*discoveryv1.EndpointSlice),
		files: make(map[object]string),
	}
}

// add converts an object of a file, unless an earlier file has one with that name.
func (c *collection) add(file string, o apiObject) {
	switch o := o.(type) {
	case *corev1.Node:
		collect(c, file, kind[*corev1.Node, cluster.Node]{resource: resourceNodes, table: &c.nodes, convert: convertNode}, o)
	case *corev1.Namespace:
		collect(c, file, kind[*corev1.Namespace, cluster.Namespace]{
			resource: resourceNamespaces, table: &c.namespaces, convert: convertNamespace,
		}, o)
	case *corev1.Pod:
		collect(c, file, kind[*corev1.Pod, cluster.Pod]{resource: resourcePods, table: &c.pods, convert: convertPod}, o)
	case *networkingv1.NetworkPolicy:
		collect(c, file, kind[*networkingv1.NetworkPolicy, cluster.Policy]{
			resource: resourcePolicies, table: &c.policies, convert: convertPolicy,
		}, o)
	case *corev1.Service:
		if c.isFirst(file, object{"services", keyOf(o)}) {
			c.services[keyOf(o)] = o
		}
	case *discoveryv1.EndpointSlice:
		if c.isFirst(file, object{"endpointslices", keyOf(o)}) {
			c.endpoints[keyOf(o)] = o
		}
	}
}

// isFirst reports an object that an earlier file has.
func (c *collection) isFirst(file string, name object) bool {
	first, ok := c.files[name]
	if !ok {
		c.files[name] = file
		return true
	}
	c.problems = append(c.problems, cluster.Problem{
		Code: codeDuplicate, Object: name.String(),
		Message: fmt.Sprintf("it is in %s and again in %s: the first counts", first, file),
		Remedy:  "delete one of the two",
	})
	return false
}

func collect[O apiObject, T any](c *collection, file string, k kind[O, T], o O) {
	if !c.isFirst(file, object{k.resource, keyOf(o)}) {
		return
	}
	value, problems := k.convert(o)
	k.table.set(&value)
	c.problems = append(c.problems, problems...)
}

package policy

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
)

// pod is what the compiler keeps of a pod that may be a peer: what its object says, and no copy of it, and what was found
// about it.
type pod struct {
	*cluster.Pod

	// in are the selections that it is in, in no order.
	in []*selection
	// groups are those of a pod of the own node, by direction; nil where no policy isolates it.
	groups [2]*group
}

// isPeer tells whether a pod can be in a selection or a group at all.
func isPeer(p *cluster.Pod) bool { return p != nil && hasIdentity(p) && len(p.Addresses) > 0 }

// namespace is a namespace that has pods or policies, or is known itself.
type namespace struct {
	// object is nil where the namespace is not in the cluster (yet).
	object *cluster.Namespace
	pods   map[string]*pod
	// local are the pods of the own node.
	local map[*pod]bool
	// policies are sorted by name.
	policies []*cluster.Policy
	scopes   []*scope
}

// policy returns the place of a policy in the list.
func (n *namespace) policy(name string) (int, bool) {
	return slices.BinarySearchFunc(n.policies, name, func(p *cluster.Policy, name string) int { return strings.Compare(p.Name, name) })
}

// namespace returns the namespace with that name.
func (c *Compiler) namespace(name string) *namespace {
	n, ok := c.namespaces[name]
	if !ok {
		n = &namespace{pods: map[string]*pod{}, scopes: c.scopesOf(name, nil)}
		c.namespaces[name] = n
	}
	return n
}

// tidy forgets a namespace of which nothing is left.
func (c *Compiler) tidy(name string) {
	n := c.namespaces[name]
	if n != nil && n.object == nil && len(n.pods)+len(n.policies) == 0 {
		delete(c.namespaces, name)
	}
}

func (c *Compiler) setNamespace(name string, object *cluster.Namespace) {
	defer c.tidy(name)
	n := c.namespace(name)
	was := n.object
	n.object = object
	for p := range n.local { // what is logged may differ
		for _, g := range p.groups {
			if g != nil {
				c.stale[g] = true
			}
		}
	}
	if (was == nil) == (object == nil) && (was == nil || maps.Equal(was.Labels, object.Labels)) {
		return
	}
	n.scopes = c.scopesOf(name, object)
	for _, p := range n.pods {
		c.reselect(n, p, p.Pod)
	}
}

func (c *Compiler) setPolicy(key cluster.Key, object *cluster.Policy) {
	defer c.tidy(key.Namespace)
	n := c.namespace(key.Namespace)
	i, known := n.policy(key.Name)
	var was *cluster.Policy
	if known {
		was = n.policies[i]
	}
	switch {
	case known && object == nil:
		n.policies = slices.Delete(n.policies, i, i+1)
	case known:
		n.policies[i] = object
	case object != nil:
		n.policies = slices.Insert(n.policies, i, object)
	}
	for p := range n.local {
		if was != nil && selectsPod(was, p.Pod) || object != nil && selectsPod(object, p.Pod) {
			c.dirty[p] = n
		}
	}
}

func (c *Compiler) setPod(key cluster.Key, object *cluster.Pod) {
	n, ok := c.namespaces[key.Namespace]
	if !isPeer(object) {
		if ok && n.pods[key.Name] != nil {
			c.removePod(n, n.pods[key.Name])
			delete(n.pods, key.Name)
			c.tidy(key.Namespace)
		}
		return
	}
	if !ok {
		n = c.namespace(key.Namespace)
	}
	p, ok := n.pods[key.Name]
	if !ok {
		p = &pod{Pod: object}
		n.pods[key.Name] = p
		c.owners.add(p, object.Addresses)
		c.reselect(n, p, object)
		c.locate(n, p)
		return
	}
	was := p.Pod
	p.Pod = object
	moved := !slices.Equal(was.Addresses, object.Addresses)
	if moved {
		c.owners.remove(p, was.Addresses)
		c.owners.add(p, object.Addresses)
	}
	c.reselect(n, p, was)
	switch {
	case was.Node != object.Node:
		c.leave(p, was.Addresses)
		c.locate(n, p)
	case object.Node != c.self:
	case moved:
		c.leave(p, was.Addresses)
		c.affectOwn(object.Addresses)
		c.dirty[p], c.reframe = n, true
	case !maps.Equal(was.Labels, object.Labels):
		c.dirty[p] = n
	}
}

// locate notes whether a pod is one of the own node, whose policies are enforced here.
func (c *Compiler) locate(n *namespace, p *pod) {
	if p.Node != c.self {
		c.unlocate(n, p)
		return
	}
	if n.local == nil {
		n.local = map[*pod]bool{}
	}
	n.local[p], c.local[p] = true, true
	c.affectOwn(p.Addresses)
	c.dirty[p], c.reframe = n, true
}

func (c *Compiler) removePod(n *namespace, p *pod) {
	for _, s := range p.in {
		c.touch(s, p.Pod)
	}
	c.owners.remove(p, p.Addresses)
	c.leave(p, p.Addresses)
	c.unlocate(n, p)
}

// unlocate notes that a pod is not one of the own node, or not any more.
func (c *Compiler) unlocate(n *namespace, p *pod) {
	c.reframe = c.reframe || c.local[p]
	delete(n.local, p)
	delete(c.local, p)
	delete(c.dirty, p)
}

// owners are the pods that have an address.
type owners struct {
	first map[netip.Addr]*pod
	// more are the further pods of an address. That is rare and passes: the status of a pod that goes still names an address
	// that another one has got.
	more map[netip.Addr][]*pod
}

func (o *owners) add(p *pod, addresses []netip.Addr) {
	for _, a := range addresses {
		if _, ok := o.first[a]; ok {
			o.more[a] = append(o.more[a], p)
		} else {
			o.first[a] = p
		}
	}
}

func (o *owners) remove(p *pod, addresses []netip.Addr) {
	for _, a := range addresses {
		more := o.more[a]
		switch {
		case o.first[a] != p:
			i := slices.Index(more, p)
			more = slices.Delete(more, i, i+1)
		case len(more) > 0:
			o.first[a], more = more[0], more[1:]
		default:
			delete(o.first, a)
		}
		if len(more) > 0 {
			o.more[a] = more
		} else {
			delete(o.more, a)
		}
	}
}

// some tells whether one of the pods with an address is as asked.
func (o *owners) some(a netip.Addr, is func(*pod) bool) bool {
	p, ok := o.first[a]
	return ok && (is(p) || slices.ContainsFunc(o.more[a], is))
}

// of returns the pods with an address, by namespace and name.
func (o *owners) of(a netip.Addr) []*pod {
	p, ok := o.first[a]
	if !ok {
		return nil
	}
	all := append([]*pod{p}, o.more[a]...)
	slices.SortFunc(all, func(x, y *pod) int {
		return cmp.Or(strings.Compare(x.Namespace, y.Namespace), strings.Compare(x.Name, y.Name))
	})
	return all
}

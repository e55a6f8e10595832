package cluster

import "cmp"

// Key names an object of a kind that lives in namespaces.
type Key struct{ Namespace, Name string }

// String returns namespace and name as people write them.
func (k Key) String() string { return k.Namespace + "/" + k.Name }

// Compare orders keys by namespace and name.
func (k Key) Compare(o Key) int {
	return cmp.Or(cmp.Compare(k.Namespace, o.Namespace), cmp.Compare(k.Name, o.Name))
}

// Delta is what changed in the cluster: for each name the object as it is now, nil where it is gone. It tells the state that
// was reached and not how: several changes of one object are one. The objects are never changed once they are in a Delta.
type Delta struct {
	Nodes      map[string]*Node
	Namespaces map[string]*Namespace
	Pods       map[Key]*Pod
	Policies   map[Key]*Policy
}

// NewDelta returns a delta without changes.
func NewDelta() Delta {
	return Delta{
		Nodes: map[string]*Node{}, Namespaces: map[string]*Namespace{}, Pods: map[Key]*Pod{}, Policies: map[Key]*Policy{},
	}
}

// Empty is true where nothing changed.
func (d Delta) Empty() bool {
	return len(d.Nodes)+len(d.Namespaces)+len(d.Pods)+len(d.Policies) == 0
}

// Delta returns everything in the snapshot as new.
func (s Snapshot) Delta() Delta {
	d := NewDelta()
	for i := range s.Nodes {
		d.Nodes[s.Nodes[i].Name] = &s.Nodes[i]
	}
	for i := range s.Namespaces {
		d.Namespaces[s.Namespaces[i].Name] = &s.Namespaces[i]
	}
	for i := range s.Pods {
		d.Pods[s.Pods[i].Key()] = &s.Pods[i]
	}
	for i := range s.Policies {
		d.Policies[s.Policies[i].Key()] = &s.Policies[i]
	}
	return d
}

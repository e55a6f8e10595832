package cluster

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
)

// State is the cluster as one node sees it, kept up to date by deltas. It binds every pod to the addresses that it can
// really have, and says which of them the start gate may let pass.
//
// The pods of the own node have the addresses of their attachments and no others. Those of another node have what their
// status says, as far as it lies in that node's podCIDRs, and nobody here holds it: a status is written by the pod's kubelet, and one that
// is stale or not honest must not give its pod's identity to who has the address. A finished pod has no addresses: its labels
// choose it for no policy any more, so what still runs of it must not pass.
//
// An attachment counts for a pod only when namespace, name and uid agree: a pod that was deleted and made again under the
// same name is another pod. An address whose pod is unknown has no identity, and stays closed.
//
// What a State holds depends on the objects and attachments alone, not on the order in which they came.
type State struct {
	self        string
	nodes       map[string]*Node
	namespaces  map[string]*Namespace
	policies    map[Key]*Policy
	pods        map[Key]*boundPod
	byNode      map[string]map[Key]*boundPod
	attachments map[Key][]Attachment
	open        map[netip.Addr]Holder
	// strays are the addresses of attachments that lie outside of the own node's podCIDRs: a pod keeps what it got from those before.
	strays map[netip.Addr]bool
}

// boundPod is a pod as its object says, and with the addresses that it can have; of is the object that it was bound from.
type boundPod struct{ object, of, bound *Pod }

// Bound is what a change of objects or attachments comes to.
type Bound struct {
	// Delta names the objects that differ, its pods with the addresses that they can have.
	Delta

	// Opened are addresses that the start gate may let pass once the delta's policies are in the kernel, and could not before, or
	// that have another holder than before. Closed are those that it may not let pass any more. Both are sorted.
	Opened, Closed []netip.Addr
}

// NewState returns the state of the node self, in which there is nothing.
func NewState(self string) *State {
	return &State{
		self: self, nodes: map[string]*Node{}, namespaces: map[string]*Namespace{}, policies: map[Key]*Policy{},
		pods: map[Key]*boundPod{}, byNode: map[string]map[Key]*boundPod{},
		attachments: map[Key][]Attachment{}, open: map[netip.Addr]Holder{},
	}
}

// Attachments are news of the attachments of the own node.
type Attachments struct {
	List []Attachment
	// All says that there are no others. Otherwise they are new ones: each takes the place of one that had its container and
	// interface, or one of its addresses.
	All bool
}

// Update takes in what changed in the cluster and on the node.
func (s *State) Update(d Delta, a Attachments) Bound {
	again := map[Key]bool{} // pods to bind
	for name, node := range d.Nodes {
		for _, of := range s.rehomed(name, node) {
			for key := range s.byNode[of] {
				again[key] = true
			}
		}
		set(s.nodes, name, node)
	}
	for name, namespace := range d.Namespaces {
		set(s.namespaces, name, namespace)
	}
	for key, policy := range d.Policies {
		set(s.policies, key, policy)
	}
	for key, pod := range d.Pods {
		s.replace(key, pod)
		again[key] = true
	}
	if a.All {
		s.attachAll(a.List, again)
	} else {
		for _, one := range a.List {
			s.attach(one, again)
		}
	}
	if _, moved := d.Nodes[s.self]; moved || a.All || len(a.List) > 0 {
		s.stray(again)
	}
	b := s.bind(again)
	b.Nodes, b.Namespaces, b.Policies = d.Nodes, d.Namespaces, d.Policies
	return b
}

// rehomed returns the nodes whose pods may have other addresses when a node becomes another.
func (s *State) rehomed(name string, now *Node) []string {
	var had, has []netip.Prefix
	if before := s.nodes[name]; before != nil {
		had = before.PodCIDRs
	}
	if now != nil {
		has = now.PodCIDRs
	}
	switch {
	case slices.Equal(had, has):
		return nil
	case name == s.self: // no pod of another node has an address of this one
		return slices.Collect(maps.Keys(s.byNode))
	default:
		return []string{name}
	}
}

// set sets an object, or removes it where it is nil.
func set[K comparable, T any](objects map[K]*T, key K, object *T) {
	if object == nil {
		delete(objects, key)
	} else {
		objects[key] = object
	}
}

// replace takes in a pod's object.
func (s *State) replace(key Key, pod *Pod) {
	old := s.pods[key]
	if old != nil && old.object != nil {
		delete(s.byNode[old.object.Node], key)
		if len(s.byNode[old.object.Node]) == 0 {
			delete(s.byNode, old.object.Node)
		}
	}
	if pod == nil {
		if old != nil {
			old.object = nil // bind removes it
		}
		return
	}
	if old == nil {
		old = &boundPod{}
		s.pods[key] = old
	}
	old.object = pod
	if s.byNode[pod.Node] == nil {
		s.byNode[pod.Node] = map[Key]*boundPod{}
	}
	s.byNode[pod.Node][key] = old
}

// attachAll sets the attachments and notes the pods that it concerns.
func (s *State) attachAll(attachments []Attachment, again map[Key]bool) {
	before := s.attachments
	s.attachments = make(map[Key][]Attachment, len(attachments))
	for _, a := range attachments {
		s.hold(a)
	}
	for key, had := range before {
		if !slices.EqualFunc(had, s.attachments[key], Attachment.Equal) {
			again[key] = true
		}
	}
	for key := range s.attachments {
		if before[key] == nil {
			again[key] = true
		}
	}
}

// attach adds an attachment and notes the pods that it concerns.
func (s *State) attach(a Attachment, again map[Key]bool) {
	holdsOne := func(old Attachment) bool {
		return slices.ContainsFunc(old.Addresses, func(x netip.Addr) bool { return slices.Contains(a.Addresses, x) })
	}
	for key, have := range s.attachments {
		kept := slices.DeleteFunc(slices.Clone(have), func(old Attachment) bool { return old.Holder() == a.Holder() || holdsOne(old) })
		switch {
		case len(kept) == len(have):
			continue
		case len(kept) == 0:
			delete(s.attachments, key)
		default:
			s.attachments[key] = kept
		}
		again[key] = true
	}
	s.hold(a)
	again[Key{a.Namespace, a.Name}] = true
}

// hold adds an attachment to those of its pod.
func (s *State) hold(a Attachment) {
	key := Key{a.Namespace, a.Name}
	s.attachments[key] = append(s.attachments[key], a)
	slices.SortFunc(s.attachments[key], Attachment.Compare)
}

// stray finds the strays, and notes the pods that say to have one which is one no more, or was none before.
func (s *State) stray(again map[Key]bool) {
	strays, own := map[netip.Addr]bool{}, podCIDRs(s.nodes[s.self])
	for _, of := range s.attachments {
		for _, attachment := range of {
			for _, a := range attachment.Addresses {
				if !holds(own, a) {
					strays[a] = true
				}
			}
		}
	}
	before := s.strays
	if s.strays = strays; maps.Equal(strays, before) {
		return
	}
	for key, p := range s.pods {
		if p.object != nil && slices.ContainsFunc(p.object.Addresses, func(a netip.Addr) bool { return strays[a] != before[a] }) {
			again[key] = true
		}
	}
}

// bind gives pods their addresses anew and returns what differs.
func (s *State) bind(again map[Key]bool) Bound {
	b := Bound{Delta: NewDelta()}
	touched, opens := map[netip.Addr]bool{}, map[netip.Addr]Holder{}
	for key := range again {
		p := s.pods[key]
		if p == nil {
			continue
		}
		before := p.bound
		for _, a := range s.gated(before) {
			touched[a] = true
		}
		p.bind(s.addresses(key, p.object))
		if before != p.bound {
			b.Pods[key] = p.bound
		}
		for _, a := range s.gated(p.bound) {
			touched[a], opens[a] = true, s.holder(key, a)
		}
		if p.bound == nil {
			delete(s.pods, key)
		}
	}
	for a := range touched {
		holder, opened := opens[a]
		switch {
		case !opened:
			delete(s.open, a)
			b.Closed = append(b.Closed, a)
		case s.open[a] != holder:
			s.open[a] = holder
			b.Opened = append(b.Opened, a)
		}
	}
	slices.SortFunc(b.Opened, netip.Addr.Compare)
	slices.SortFunc(b.Closed, netip.Addr.Compare)
	return b
}

// gated returns the addresses of a pod that are the start gate's.
func (s *State) gated(pod *Pod) []netip.Addr {
	if pod == nil || pod.Node != s.self || pod.HostNetwork {
		return nil
	}
	return pod.Addresses
}

// holder returns the attachment of a pod that holds an address.
func (s *State) holder(key Key, address netip.Addr) Holder {
	at := slices.IndexFunc(s.attachments[key], func(a Attachment) bool { return slices.Contains(a.Addresses, address) })
	return s.attachments[key][at].Holder()
}

// bind gives the pod its addresses. It stays the same value where nothing differs.
func (p *boundPod) bind(addresses []netip.Addr) {
	switch {
	case p.object == nil:
		p.bound = nil
	case p.of == p.object && slices.Equal(p.bound.Addresses, addresses):
	case slices.Equal(p.object.Addresses, addresses):
		p.bound = p.object
	default:
		pod := *p.object
		pod.Addresses = addresses
		p.bound = &pod
	}
	p.of = p.object
}

// addresses are those that a pod can have.
func (s *State) addresses(key Key, pod *Pod) []netip.Addr {
	switch {
	case pod == nil, pod.Finished:
		return nil
	case pod.HostNetwork: // in no policy, and at its node's addresses
		return pod.Addresses
	case pod.Node == s.self:
		var leased []netip.Addr
		for _, a := range s.attachments[key] {
			if pod.owns(a) {
				leased = append(leased, a.Addresses...)
			}
		}
		slices.SortFunc(leased, netip.Addr.Compare)
		return leased
	default:
		return s.remote(pod)
	}
}

// owns says whether an attachment of the pod's name is its own, and not one of a pod that had the name before.
func (p *Pod) owns(a Attachment) bool {
	return a.UID == p.UID || p.StaticUID != "" && a.UID == p.StaticUID
}

// Has says whether the pod of an attachment is there and has not finished. A runtime that tells no uid means any pod of the name.
func (s *State) Has(a Attachment) bool {
	p := s.pods[Key{a.Namespace, a.Name}]
	return p != nil && p.object != nil && !p.object.Finished && (a.UID == "" || p.object.owns(a))
}

func podCIDRs(n *Node) []netip.Prefix {
	if n == nil {
		return nil
	}
	return n.PodCIDRs
}

// remote returns those of the addresses of another node's pod that lie in its node's podCIDRs, and that nobody on the own node can have.
func (s *State) remote(pod *Pod) []netip.Addr {
	node, own := podCIDRs(s.nodes[pod.Node]), podCIDRs(s.nodes[s.self])
	isForeign := func(a netip.Addr) bool { return !holds(node, a) || holds(own, a) || s.strays[a] }
	if !slices.ContainsFunc(pod.Addresses, isForeign) {
		return pod.Addresses
	}
	return slices.DeleteFunc(slices.Clone(pod.Addresses), isForeign)
}

// holds says whether one of the prefixes holds an address.
func holds(prefixes []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(prefixes, func(p netip.Prefix) bool { return p.Contains(a) })
}

// Attached returns the pod whose attachment holds an address.
func (s *State) Attached(address netip.Addr) (Key, bool) {
	for key, of := range s.attachments {
		if slices.ContainsFunc(of, func(a Attachment) bool { return slices.Contains(a.Addresses, address) }) {
			return key, true
		}
	}
	return Key{}, false
}

// Strays returns the addresses of attachments that lie outside of the own node's podCIDRs, sorted.
func (s *State) Strays() []netip.Addr {
	return slices.SortedFunc(maps.Keys(s.strays), netip.Addr.Compare)
}

// Open returns the addresses that the start gate may let pass, each with who holds it.
func (s *State) Open() map[netip.Addr]Holder { return maps.Clone(s.open) }

// Node returns a Node.
func (s *State) Node(name string) (Node, bool) {
	node := s.nodes[name]
	if node == nil {
		return Node{}, false
	}
	return *node, true
}

// Snapshot returns the whole state, its pods with the addresses that they can have.
func (s *State) Snapshot() Snapshot {
	snapshot := Snapshot{
		Self: s.self, Nodes: values(s.nodes), Namespaces: values(s.namespaces), Policies: values(s.policies),
		Pods: make([]Pod, 0, len(s.pods)),
	}
	slices.SortFunc(snapshot.Nodes, func(a, b Node) int { return cmp.Compare(a.Name, b.Name) })
	for _, p := range s.pods {
		snapshot.Pods = append(snapshot.Pods, *p.bound)
	}
	slices.SortFunc(snapshot.Namespaces, func(a, b Namespace) int { return cmp.Compare(a.Name, b.Name) })
	slices.SortFunc(snapshot.Pods, func(a, b Pod) int { return a.Key().Compare(b.Key()) })
	slices.SortFunc(snapshot.Policies, func(a, b Policy) int { return a.Key().Compare(b.Key()) })
	return snapshot
}

func values[K comparable, T any](objects map[K]*T) []T {
	all := make([]T, 0, len(objects))
	for _, o := range objects {
		all = append(all, *o)
	}
	return all
}

package policy

import (
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// selector identifies a selection: the canonical text of both selectors. own is the policy's namespace where there is no
// namespace selector.
type selector struct{ own, namespaces, pods string }

// selection are the pods that selectors choose. It is there as long as a rule needs one of its sets.
type selection struct {
	id selector
	// name identifies the selection in the names of sets, text says it to people.
	name  []string
	text  string
	scope *scope
	pods  labels.Selector
	// node is the only node whose pods count; empty for all.
	node string
	sets []*set
	// dead is true once no rule needs it.
	dead bool
	// round marks it in one comparison of what a pod was in with what it is in.
	round uint64
}

// chooses tells whether a pod of one of the selection's namespaces is in the selection.
func (s *selection) chooses(pod *cluster.Pod) bool {
	return (s.node == "" || s.node == pod.Node) && s.pods.Matches(pod.Labels)
}

// scope are the namespaces whose pods a selection chooses from: one by its name, those that a selector chooses, or all.
// Selections share scopes, so that a namespace meets each selector once.
type scope struct {
	id selector // without pods; empty for all namespaces
	// namespaces is nil for a scope that does not depend on labels.
	namespaces labels.Selector
	selections index[*selection]
	// live counts the selections, fresh are those among them that pods have not met yet.
	live  int
	fresh index[*selection]
	// stirred is true while the scope has news for the pods in it.
	stirred bool
}

// chosen returns the pods that a peer of a policy in a namespace chooses.
func (c *Compiler) chosen(own string, peer cluster.Peer) *selection {
	id := selector{own: own, pods: text(peer.Pods)}
	says := "pods " + id.pods + " in " + own
	if peer.Namespaces != nil {
		id = selector{namespaces: text(peer.Namespaces), pods: id.pods}
		says = "pods " + id.pods + " in namespaces " + id.namespaces
	}
	if s, ok := c.selections[id]; ok {
		return s
	}
	s := &selection{id: id, name: []string{id.own, id.namespaces, id.pods}, text: says, pods: peer.Pods}
	c.adopt(s, peer.Namespaces)
	return s
}

// everywhere returns all pods, for named ports towards everybody.
func (c *Compiler) everywhere() *selection {
	return c.wide(selection{id: selector{pods: "everywhere"}, text: "all pods"})
}

// here returns the pods of the own node, for named ports of selected pods: the chain of a group is reached by its pods
// only, so one set of a name does for all groups.
func (c *Compiler) here() *selection {
	return c.wide(selection{id: selector{pods: "here"}, text: "the pods of this node", node: c.self})
}

func (c *Compiler) wide(s selection) *selection {
	if known, ok := c.selections[s.id]; ok {
		return known
	}
	s.name, s.pods = []string{s.id.pods}, labels.Everything()
	c.adopt(&s, nil)
	return &s
}

// adopt puts a new selection into its scope. The pods meet it when everything is rendered, all new ones at once.
func (c *Compiler) adopt(s *selection, namespaces labels.Selector) {
	id := selector{own: s.id.own, namespaces: s.id.namespaces}
	in, ok := c.scopes[id]
	if !ok {
		in = &scope{id: id, namespaces: namespaces}
		c.scopes[id] = in
		if namespaces != nil {
			c.byLabels.add(namespaces, in)
		}
		c.rescoped = true
	}
	s.scope = in
	c.selections[s.id] = s
	in.live++
	in.selections.add(s.pods, s)
	in.fresh.add(s.pods, s)
	c.stir(in)
}

// discard removes a selection that has no sets any more.
func (c *Compiler) discard(s *selection) {
	in := s.scope
	s.dead = true
	delete(c.selections, s.id)
	in.selections.remove(s.pods, s)
	in.fresh.remove(s.pods, s)
	c.stir(in)
	if in.live--; in.live > 0 {
		return
	}
	delete(c.scopes, in.id)
	if in.namespaces != nil {
		c.byLabels.remove(in.namespaces, in)
	}
	c.rescoped = true
}

// stir notes that a scope has news for its pods.
func (c *Compiler) stir(s *scope) {
	if !s.stirred {
		s.stirred = true
		c.stirred = append(c.stirred, s)
	}
}

// scopesOf returns the scopes that a namespace is in. One that is not in the cluster (yet) has unknown labels, so that no
// selector chooses it.
func (c *Compiler) scopesOf(name string, object *cluster.Namespace) []*scope {
	var found []*scope
	for _, id := range []selector{{}, {own: name}} {
		if s, ok := c.scopes[id]; ok {
			found = append(found, s)
		}
	}
	if object == nil {
		return found
	}
	fixed := len(found)
	found = c.byLabels.find(object.Labels, found)
	chosen := slices.DeleteFunc(found[fixed:], func(s *scope) bool { return !s.namespaces.Matches(object.Labels) })
	return found[:fixed+len(chosen)]
}

// settle lets the pods know the selections that are new, and forget those that are gone, and fills the new sets: one walk over
// the pods that are concerned, however many there are of each.
func (c *Compiler) settle() {
	stirred := func(s *scope) bool { return s.stirred }
	if len(c.stirred) > 0 {
		for name, n := range c.namespaces {
			concerned := slices.ContainsFunc(n.scopes, stirred)
			if c.rescoped {
				n.scopes = c.scopesOf(name, n.object)
			}
			if concerned || slices.ContainsFunc(n.scopes, stirred) {
				for _, p := range n.pods {
					c.settlePod(n, p)
				}
			}
		}
	}
	for _, s := range c.stirred {
		s.stirred, s.fresh = false, index[*selection]{}
	}
	c.stirred, c.rescoped = c.stirred[:0], false
	for _, s := range c.fresh {
		if s.refs > 0 {
			s.Entries, s.fresh = netfilter.Entries(s.Entries), false
			c.changed(s, netfilter.SetChange{Set: s.Set, New: true})
		}
	}
	c.fresh = c.fresh[:0]
}

func (c *Compiler) settlePod(n *namespace, p *pod) {
	p.in = slices.DeleteFunc(p.in, func(s *selection) bool { return s.dead })
	for _, in := range n.scopes {
		c.found = in.fresh.find(p.Labels, c.found[:0])
		for _, s := range c.found {
			if s.chooses(p.Pod) {
				p.in = append(p.in, s)
			}
		}
	}
	for _, s := range p.in {
		for _, x := range s.sets {
			if x.fresh {
				x.Entries = x.entriesOf(p.Pod, x.Entries)
			}
		}
	}
}

// reselect finds the selections that a pod is in now, and notes the entries of sets that may differ from what they were; was
// is what the pod was before. It walks only over selectors that ask for one of the pod's labels.
func (c *Compiler) reselect(n *namespace, p *pod, was *cluster.Pod) {
	c.round++
	moved := !slices.Equal(was.Addresses, p.Addresses) || !slices.Equal(was.Ports, p.Ports)
	for _, s := range p.in {
		s.round = c.round
		if moved {
			c.touch(s, was)
		}
	}
	c.found = c.found[:0]
	for _, in := range n.scopes {
		c.found = in.selections.find(p.Labels, c.found)
	}
	c.found = slices.DeleteFunc(c.found, func(s *selection) bool { return !s.chooses(p.Pod) })
	stays := 0
	for _, s := range c.found {
		known := s.round == c.round
		if known {
			s.round = 0
			stays++
		}
		if !known || moved {
			c.touch(s, p.Pod)
		}
	}
	if stays == len(p.in) && stays == len(c.found) {
		return
	}
	for _, s := range p.in {
		if s.round == c.round { // it was not found again
			c.touch(s, was)
		}
	}
	p.in = slices.Clone(c.found)
}

// touched is an entry of a set that may have come or gone, and whether it is in.
type touched struct {
	set   *set
	entry netfilter.Entry
	in    bool
}

// compare orders by the names of the sets; of one set those that are in come first.
func (t touched) compare(u touched) int {
	switch {
	case t.set != u.set:
		return strings.Compare(t.set.Name, u.set.Name)
	case t.in != u.in:
		if t.in {
			return -1
		}
		return 1
	}
	return t.entry.Compare(u.entry)
}

// touch notes the entries that a pod gives, or gave, to the sets of a selection.
func (c *Compiler) touch(s *selection, pod *cluster.Pod) {
	for _, x := range s.sets {
		c.entries = x.entriesOf(pod, c.entries[:0])
		for _, e := range c.entries {
			c.touches = append(c.touches, touched{set: x, entry: e})
		}
	}
}

// retouch looks at the entries that were touched, now that every pod is what it is, and notes those that came or went.
func (c *Compiler) retouch() {
	moved := c.touches[:0]
	for _, t := range c.touches {
		if t.set.refs == 0 {
			continue
		}
		if t.in = c.holds(t.set, t.entry); t.in != t.set.has(t.entry) {
			t.set.put(t.entry, t.in)
			moved = append(moved, t)
		}
	}
	c.moves(moved)
	if cap(c.touches) > maxTouches {
		c.touches = nil
	}
	c.touches = c.touches[:0]
}

// maxTouches is for how many touches memory is kept. Few updates have more, but one namespace's labels can touch every pod.
const maxTouches = 1024

// moves notes the entries that came to sets or went.
func (c *Compiler) moves(moved []touched) {
	slices.SortFunc(moved, touched.compare)
	c.affected = slices.Grow(c.affected, len(moved))
	entries := make([]netfilter.Entry, len(moved))
	for i, t := range moved {
		entries[i] = t.entry
		c.affect(t.entry.Prefix.Addr())
	}
	for len(moved) > 0 {
		s, n, in := moved[0].set, 0, 0
		for ; n < len(moved) && moved[n].set == s; n++ {
			if moved[n].in {
				in++
			}
		}
		change := netfilter.SetChange{Set: s.Set}
		change.Entries = nil
		if in > 0 {
			change.Add = entries[:in:in]
		}
		if in < n {
			change.Remove = entries[in:n:n]
		}
		c.changed(s, change)
		moved, entries = moved[n:], entries[n:]
	}
}

// holds tells whether some pod of the set's selection gives the entry to it. It asks who has the address now, because two pods
// may have one for a moment.
func (c *Compiler) holds(s *set, e netfilter.Entry) bool {
	return c.owners.some(e.Prefix.Addr(), func(p *pod) bool {
		return slices.Contains(p.in, s.of) && (s.port == portName{} || s.port.numbers(p.Pod, e.Port))
	})
}

// text is the canonical text of a selector. The library writes the one that matches everything and the one that matches
// nothing alike; here they must not be the same set.
func text(s labels.Selector) string {
	if s.Empty() {
		return "*"
	}
	if t := s.String(); t != "" {
		return t
	}
	return "none"
}

package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/kube"
)

// Kinds of the objects that Events are about.
const (
	kindPolicy    = "NetworkPolicy"
	kindNamespace = "Namespace"
	kindPod       = "Pod"
	kindNode      = "Node"
)

// announceAgain is how often what lasts is announced again. An API server forgets an Event an hour after it was written last; with what
// was said of a Node just before (see refusedEvery) it is never longer than 55 minutes.
const announceAgain = 40 * time.Minute

// refusedEvery is how often a node says one thing of another Node. It has three owners at most to speak for: itself, the one before it by name,
// and nobody. That makes as many Events with one reason about an object as are let through for good.
const refusedEvery = 15 * time.Minute

// announcer writes Events about problems of policies, Namespaces and Nodes, each by as few nodes as will do. It works beside the loop, because
// to find out which node reports a policy is to look at all pods.
type announcer struct {
	self string
	// reporters are the nodes that shall report what all nodes see of an object, which may claim what is an owner's.
	reporters func(of kube.Reference, owner string) []string
	event     func(context.Context, kube.Event)
	// standing are the problems that there are.
	standing func() []cluster.Problem
	now      func() time.Time
	wake     chan struct{}
	// said is what was said of Nodes. There are only so many Events about an object: a hostile Node must not use them up, by
	// something else that is wrong with it every second, before it does what matters.
	said seldom

	mu      sync.Mutex
	waiting []cluster.Problem
}

func newAnnouncer(n *node) *announcer {
	return &announcer{
		self: n.options.nodeName, reporters: n.source.Reporters, event: n.source.Event, standing: func() []cluster.Problem { return n.outcomeNow().problems },
		now: n.clock, wake: make(chan struct{}, 1), said: seldom{every: refusedEvery},
	}
}

// add has a problem that is new announced.
func (a *announcer) add(p cluster.Problem) {
	a.mu.Lock()
	a.waiting = append(a.waiting, p)
	a.mu.Unlock()
	select {
	case a.wake <- struct{}{}:
	default: // it is awake
	}
}

// run announces what is added, and what lasts, until the context ends.
func (a *announcer) run(ctx context.Context) {
	again := time.NewTicker(announceAgain)
	defer again.Stop()
	for {
		var problems []cluster.Problem
		select {
		case <-ctx.Done():
			return
		case <-again.C:
			problems = a.standing()
		case <-a.wake:
			a.mu.Lock()
			problems, a.waiting = a.waiting, nil
			a.mu.Unlock()
		}
		for _, p := range problems {
			for _, object := range a.objects(p) {
				a.event(ctx, kube.Event{Object: object, Type: kube.Warning, Reason: p.Code, Message: problemText(p)})
			}
		}
	}
}

// objects are those that this node has to announce a problem on.
func (a *announcer) objects(p cluster.Problem) []kube.Reference {
	kind, names, _ := strings.Cut(p.Object, " ")
	var objects []kube.Reference
	for key := range strings.SplitSeq(names, ", ") {
		object := kube.Reference{Kind: kind, Name: key}
		switch kind {
		case kindPolicy:
			object.Namespace, object.Name, _ = strings.Cut(key, "/")
		case kindNamespace, kindNode:
		default:
			return nil
		}
		if a.reports(p, object) && (kind != kindNode || a.said.due(strings.Join([]string{p.Code, key, p.Owner}, " "), a.now())) {
			objects = append(objects, object)
		}
	}
	return objects
}

// reports says whether this node announces a problem of an object.
func (a *announcer) reports(p cluster.Problem, object kube.Reference) bool {
	switch {
	case object.Kind == kindNode && p.Owner == "" && (p.Field == "" || strings.HasPrefix(p.Code, codeNodeLacks)):
		return object.Name == a.self
	case p.Code == codeNotApplied: // what this node's kernel refused no other node knows of
		return true
	default:
		return slices.Contains(a.reporters(object, p.Owner), a.self)
	}
}

// codeNodeLacks begins the codes of what a Node does not have, as each new one for a moment: no other node makes an Event of that.
const codeNodeLacks = "NodeWithout"

// problemText is a problem as the message of an Event about its object. Where another Node is concerned it names both.
func problemText(p cluster.Problem) string {
	text := p.Message + "; " + p.Remedy
	if p.Field != "" {
		text = p.Field + ": " + text
	}
	if p.Owner != "" {
		text = p.Object + ": " + text
	}
	return text
}

// deniedEvent is the Event about a denied packet, on the pod of this node that policies isolate; it returns false where that is not
// known any more. Equal keys are Events about the same pod, direction and peer.
func (f flow) deniedEvent() (event kube.Event, key string, ok bool) {
	denied, peer, toward := f.Source, f.Destination, "to"
	if f.Direction == "ingress" {
		denied, peer, toward = f.Destination, f.Source, "from"
	}
	if f.Verdict != flowDenied || f.Direction == "" || denied.pod == nil {
		return kube.Event{}, "", false
	}
	port := f.Protocol
	if f.Destination.Port > 0 {
		port = fmt.Sprintf("%d/%s", f.Destination.Port, f.Protocol)
	}
	event = kube.Event{
		Object: kube.Reference{Kind: kindPod, Namespace: denied.pod.Namespace, Name: denied.pod.Name, UID: denied.pod.UID},
		Type:   kube.Warning, Reason: "PolicyDenied",
		Message: fmt.Sprintf("%s %s %s (%s) denied by %s", f.Direction, toward, peer, port, strings.Join(f.Policies, ", ")),
	}
	return event, strings.Join([]string{denied.Pod, f.Direction, peer.String()}, " "), true
}

// seldomKeys is how many keys are remembered.
const seldomKeys = 4096

// seldom tells what was done already in a span of time.
type seldom struct {
	every time.Duration
	since time.Time
	done  map[string]bool
}

// due tells whether something was not done yet in this span, and counts it as done. Where too much was done nothing more is due.
func (s *seldom) due(key string, now time.Time) bool {
	if s.done == nil || now.Sub(s.since) >= s.every {
		s.since, s.done = now, map[string]bool{}
	}
	if s.done[key] || len(s.done) >= seldomKeys {
		return false
	}
	s.done[key] = true
	return true
}

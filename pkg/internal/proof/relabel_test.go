package proof

import (
	"errors"
	"fmt"
	"net/http"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/plugins/pkg/ns"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

const (
	// port is where packets go; nobody listens, which does not matter to those who count them.
	port = 8080
	// often is the time between two salvos.
	often = 5 * time.Millisecond
	// frozenFor is how long a pod runs before any watch tells of it.
	frozenFor = 300 * time.Millisecond
	// slowAnswer is how long an answer takes of a server that is slow, and not yet given up: all that the daemon does meanwhile, its
	// audits too, must leave the pod closed.
	slowAnswer = 600 * time.Millisecond
	// tagClient is the client's; newcomers have those from tagPod on.
	tagClient, tagPod uint32 = 1, 100
)

// isolate creates a policy that lets nobody in to or out of the pods with a label.
func (c *cluster) isolate(name, app string) {
	c.t.Helper()
	policy := &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": app}},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress},
		},
	}
	if _, err := c.client.NetworkingV1().NetworkPolicies("a").Create(c.t.Context(), policy, metav1.CreateOptions{}); err != nil {
		c.t.Fatal(err)
	}
}

// pause lets the packets fly, and the watches bring what there is.
func (c *cluster) pause() {
	select {
	case <-time.After(frozenFor):
	case <-c.t.Context().Done():
	}
}

// change is what happens to a pod, or to its namespace, after the last event that the watches brought and before ADD.
type change struct {
	name string
	// closed says that nothing may pass, and refused that the pod may not start.
	closed, refused bool
	make            func(c *cluster, name string) lab.Pod
}

// changes are what can happen.
func changes() []change {
	of := func(c *cluster, name, app string) lab.Pod {
		object := c.createPod("a", name, "node-1", map[string]string{"app": app})
		return lab.Pod{Namespace: "a", Name: name, UID: object.UID}
	}
	return []change{
		{"nothing", false, false, func(c *cluster, name string) lab.Pod {
			pod := of(c, name, "open")
			c.proxy.freeze()
			return pod
		}},
		{"the pod that the watch brought is relabelled", true, false, func(c *cluster, name string) lab.Pod {
			object := c.createPod("a", name, "node-1", map[string]string{"app": "open"})
			c.pause()
			c.proxy.freeze()
			c.relabel(object, map[string]string{"app": "closed"})
			return lab.Pod{Namespace: "a", Name: name, UID: object.UID}
		}},
		{"the pod that the watch brought is relabelled, and the server is slow to say so", true, false, func(c *cluster, name string) lab.Pod {
			object := c.createPod("a", name, "node-1", map[string]string{"app": "open"})
			c.pause()
			c.proxy.freeze()
			c.relabel(object, map[string]string{"app": "closed"})
			c.proxy.slow(slowAnswer)
			return lab.Pod{Namespace: "a", Name: name, UID: object.UID}
		}},
		{"the pod that the watch brought is relabelled, and the server refuses to say so", true, true, func(c *cluster, name string) lab.Pod {
			object := c.createPod("a", name, "node-1", map[string]string{"app": "open"})
			c.pause()
			c.proxy.freeze()
			c.relabel(object, map[string]string{"app": "closed"})
			c.proxy.fail(http.StatusForbidden, isNoWatch)
			return lab.Pod{Namespace: "a", Name: name, UID: object.UID}
		}},
		{"the pod that no watch brought is relabelled", true, false, func(c *cluster, name string) lab.Pod {
			c.proxy.freeze()
			object := c.createPod("a", name, "node-1", map[string]string{"app": "open"})
			c.relabel(object, map[string]string{"app": "closed"})
			return lab.Pod{Namespace: "a", Name: name, UID: object.UID}
		}},
		{"its policy comes", true, false, func(c *cluster, name string) lab.Pod {
			pod := of(c, name, name)
			c.pause()
			c.proxy.freeze()
			c.isolate(name, name)
			return pod
		}},
		{"the pod and its policy come", true, false, func(c *cluster, name string) lab.Pod {
			c.proxy.freeze()
			c.isolate(name, name)
			return of(c, name, name)
		}},
	}
}

// What a pod is when it starts is what the API server says then, not what a watch has brought: where the labels of the pod or the
// policies of its namespace change before it starts, and no watch tells, not one packet passes that they forbid, either way.
func TestProofPodStartsAsWhatItIsNow(t *testing.T) {
	t.Parallel()
	c := newCluster(t, "wpnow")
	c.createNamespace("a")
	c.isolate("isolate", "closed")
	object := c.createPod("a", "client", "node-1", nil)
	client, err := c.node.AddPod(t.Context(), lab.Pod{Namespace: "a", Name: "client", UID: object.UID})
	if err != nil {
		t.Fatal(err)
	}
	atClient, err := tagged.Count(client.Netns())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if stopErr := atClient.Stop(); stopErr != nil {
			t.Error(stopErr)
		}
	})
	rounds := soak.Trials(50)
	tag, forbidden := tagPod, 0
	for range rounds {
		for _, change := range changes() {
			tag++
			in, out := c.starts(change, tag, client, atClient)
			if change.closed {
				forbidden += in + out
			}
			switch {
			case change.closed && in+out > 0:
				t.Errorf("%s: %d packets reached the pod, and %d of its own arrived", change.name, in, out)
			case !change.closed && (in == 0 || out == 0):
				t.Errorf("%s: %d packets reached the pod, and %d of its own arrived", change.name, in, out)
			}
		}
	}
	t.Logf("proof: %d starts behind the watches' back: %d forbidden packets passed", rounds*len(changes()), forbidden)
}

// starts adds a pod after a change of which no watch tells, under fire from the client and firing back, and counts what passes until
// some time after the watches have told.
func (c *cluster) starts(what change, tag uint32, client *lab.Pod, atClient *tagged.Counter) (in, out int) {
	c.t.Helper()
	defer c.proxy.flow()
	defer c.proxy.slow(0)
	pod := what.make(c, fmt.Sprintf("pod-%d", tag))
	var counter *tagged.Counter
	var own *tagged.Gun
	pod.Listen = func(netns ns.NetNS) (err error) {
		if counter, err = tagged.Count(netns); err != nil {
			return err
		}
		own, err = tagged.Start(c.t.Context(), netns, tagged.Fire{Tag: tag, Targets: client.Addresses, Port: port, Every: often})
		return err
	}
	fire := tagged.Fire{Tag: tagClient, Port: port, Every: often}
	for i, last := range client.Addresses { // the next ones of the node; where there are no more, those after the client's again
		for range tag - tagPod {
			if last = last.Next(); !c.node.PodCIDRs[i].Contains(last.Next()) {
				last = client.Addresses[i].Next()
			}
		}
		fire.Targets = append(fire.Targets, last)
	}
	gun, err := tagged.Start(c.t.Context(), client.Netns(), fire)
	if err != nil {
		c.t.Fatal(err)
	}
	added, err := c.node.AddPod(c.t.Context(), pod)
	c.proxy.recover()
	refusal, isRefusal := errors.AsType[*types.Error](err)
	switch {
	case what.refused && (!isRefusal || refusal.Code != types.ErrTryAgainLater):
		c.t.Errorf("%s: ADD gives %v", what.name, err)
	case what.refused:
	case err != nil:
		c.t.Fatal(err)
	case added.Addresses[0] != fire.Targets[0]:
		c.t.Fatalf("the pod has %v, and %v was fired at", added.Addresses, fire.Targets)
	}
	c.pause()
	c.proxy.flow()
	c.pause()
	gun.Cease()
	own.Cease()
	err = counter.Stop()
	if !what.refused {
		err = errors.Join(err, added.Delete(c.t.Context()))
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return counter.Packets(tagged.Of(tagClient)), atClient.Packets(tagged.Of(tag))
}

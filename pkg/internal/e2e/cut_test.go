//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// cutWithin is how long established connections may outlive the change that forbids them.
const cutWithin = time.Second

// cutStage is a source with flows to two servers on another node, each by its addresses and through a Service.
type cutStage struct {
	*cluster
	namespace string
	source    *probePod
	// held are the addresses of the server whose flows will be forbidden, and others those of the server next to it.
	held, others []string
	// forbidden says that the source does not reach the first server anew.
	forbidden reachTable
}

// testCut shows that flows end within a second of a change that forbids them, whatever has changed, that they go on when
// they are allowed again, and that the flows beside them are not disturbed.
func (c *cluster) testCut(t *testing.T) {
	s := c.newCutStage(t)
	t.Run("a policy denies ingress", func(t *testing.T) {
		s.check(t, s.policy("deny-ingress", networkingv1.NetworkPolicySpec{
			PodSelector: *labelled("app", "held"), PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
		}))
	})
	t.Run("a policy denies egress", func(t *testing.T) {
		s.check(t, s.policy("deny-egress", networkingv1.NetworkPolicySpec{
			PodSelector: *labelled("app", "source"), PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress},
			Egress: []networkingv1.NetworkPolicyEgressRule{{
				To: []networkingv1.NetworkPolicyPeer{{PodSelector: labelled("app", "others")}},
			}},
		}))
	})
	t.Run("a peer loses its label", func(t *testing.T) {
		friends := s.policy("friends", networkingv1.NetworkPolicySpec{
			PodSelector: *labelled("app", "held"),
			Ingress: []networkingv1.NetworkPolicyIngressRule{{
				From: []networkingv1.NetworkPolicyPeer{{PodSelector: labelled("friend", "yes")}},
			}},
		})
		friends.forbid(t) // all but friends
		s.check(t, change{
			forbid: func(t *testing.T) { s.label(t, `"no"`) },
			allow:  func(t *testing.T) { s.label(t, `"yes"`) },
		})
		friends.allow(t)
	})
}

// labelled selects what has a label.
func labelled(key, value string) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{key: value}}
}

// newCutStage starts the pods and Services.
func (c *cluster) newCutStage(t *testing.T) *cutStage {
	t.Helper()
	s := &cutStage{cluster: c, namespace: "e2e-cut", forbidden: reachTable{}}
	c.namespace(t, s.namespace)
	s.source = &probePod{name: "source", node: c.worker, labels: map[string]string{"app": "source", "friend": "yes"}}
	held := &probePod{name: "held", node: c.controlPlane, labels: map[string]string{"app": "held"}}
	others := &probePod{name: "others", node: c.controlPlane, labels: map[string]string{"app": "others"}}
	c.start(t, s.namespace, s.source, held, others)
	addresses := func(pod *probePod) []string {
		var all []string
		for _, host := range append(c.startService(t, s.namespace, pod.name, pod.labels, s.source.name), pod.addresses...) {
			all = append(all, hostPort(host, port))
		}
		return all
	}
	s.held, s.others = addresses(held), addresses(others)
	s.forbidden.set(s.namespace+"/"+s.source.name, held, false)
	s.forbidden.set(s.namespace+"/"+s.source.name, others, true)
	return s
}

// change forbids flows and allows them again. Each returns once the API server has taken it.
type change struct {
	forbid, allow func(t *testing.T)
}

// policy is the change of a policy that comes and goes.
func (s *cutStage) policy(name string, spec networkingv1.NetworkPolicySpec) change {
	policies := s.client.NetworkingV1().NetworkPolicies(s.namespace)
	return change{
		forbid: func(t *testing.T) {
			t.Helper()
			policy := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}
			if _, err := policies.Create(t.Context(), policy, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		},
		allow: func(t *testing.T) {
			t.Helper()
			if err := policies.Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		},
	}
}

// label changes the label by which a policy knows the source.
func (s *cutStage) label(t *testing.T, friend string) {
	t.Helper()
	patch := []byte(`{"metadata": {"labels": {"friend": ` + friend + `}}}`)
	_, err := s.client.CoreV1().Pods(s.namespace).Patch(t.Context(), s.source.name, types.StrategicMergePatchType, patch, metav1.PatchOptions{})
	if err != nil {
		t.Fatal(err)
	}
}

// check lets flows run, forbids those to one server, and allows them again.
func (s *cutStage) check(t *testing.T, change change) {
	t.Helper()
	held := s.startFlows(t, s.namespace, s.source.name, 2, s.held...)
	others := s.startFlows(t, s.namespace, s.source.name, 2, s.others...)
	<-time.After(time.Second)

	before := held.report(t)
	change.forbid(t)
	committed := now()
	for network, r := range before {
		if r.Received == 0 || committed.Sub(r.Silent) > 5*time.Second {
			t.Errorf("%s: the flows were not busy: %+v", network, r)
		}
	}
	<-time.After(cutWithin + 2*time.Second)
	for network, r := range held.report(t) {
		t.Logf("%s: a message came %v after the change", network, r.Heard.Sub(committed).Round(time.Millisecond))
		if r.Heard.Sub(committed) > cutWithin {
			t.Errorf("%s: messages still come %v after the change", network, r.Heard.Sub(committed).Round(time.Millisecond))
		}
	}
	if err := s.compare(t.Context(), s.forbidden, newMarker(t)); err != nil {
		t.Error(err)
	}

	change.allow(t)
	allowed := now()
	eventually(t, 30*time.Second, "all flows go on", func(context.Context) error {
		for network, r := range held.report(t) {
			if r.Errors > 0 || !r.Silent.After(allowed) {
				return fmt.Errorf("%s: %+v", network, r)
			}
		}
		return nil
	})
	held.stop(t)
	for network, r := range others.stop(t) {
		t.Logf("%s: %d flows beside them, longest gap %v", network, r.Flows, r.LongestGapNanoseconds.Round(time.Millisecond))
		if r.Errors != 0 || r.Received == 0 {
			t.Errorf("%s: the flows beside them were disturbed: %+v", network, r)
		}
	}
}

// now is the clock, which pods and this machine share.
func now() time.Time {
	return time.Now() //nolint:forbidigo // flows are held against the moment of a change
}

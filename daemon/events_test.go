package main

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/kube"
)

// A problem of an object is announced by those nodes that shall, once, again when it has come again, and while it lasts.
func TestProblemsAreAnnounced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []string
		var standing []cluster.Problem
		news := &announcer{
			self: "n1", wake: make(chan struct{}, 1), now: time.Now, //nolint:forbidigo // fake time
			reporters: func(of kube.Reference, owner string) []string {
				return map[string][]string{
					"NetworkPolicy shop/ours ": {"n1"}, "NetworkPolicy shop/theirs ": {"n2"}, "Namespace /shop ": {"n1"}, "Namespace /bar ": {"n2"},
					"Node /n2 ": {"n0", "n1"}, "Node /n1 ": {"n0", "n2"}, "Node /n2 n1": {"n1", "n3"}, "Node /n2 n3": {"n3", "n4"}, "Node /n3 n0": {"n0", "n1"},
				}[of.Kind+" "+of.Namespace+"/"+of.Name+" "+owner]
			},
			standing: func() []cluster.Problem { return standing }, said: seldom{every: refusedEvery},
			event: func(_ context.Context, e kube.Event) {
				got = append(got, string(e.Type)+" "+e.Reason+" "+e.Object.Kind+" "+e.Object.Namespace+"/"+e.Object.Name+": "+e.Message)
			},
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go news.run(ctx)
		n := &node{log: slog.New(slog.DiscardHandler), news: news}
		problem := func(code, object, field string) cluster.Problem {
			return cluster.Problem{Code: code, Object: object, Field: field, Message: "it is wrong", Remedy: "mend it"}
		}
		claimed := func(object, owner string) cluster.Problem {
			p := problem("PodCIDROverlap", object, "spec.podCIDRs[0]")
			p.Owner = owner
			return p
		}
		all := []cluster.Problem{
			problem("PolicyInvalid", "NetworkPolicy shop/ours", "spec.ingress[0]"),
			problem("PolicyInvalid", "NetworkPolicy shop/theirs", ""),
			problem("PolicyInvalid", "NetworkPolicy shop/gone", ""),
			problem(codeNotApplied, "NetworkPolicy shop/theirs, shop/ours", ""),
			problem("MeshApplyFailed", "Node n1", ""),
			problem("NodeInvalid", "Node n2", "metadata.annotations"),
			problem("NodeInvalid", "Node n1", "metadata.annotations"),
			problem("NodeWithoutKey", "Node n2", "metadata.annotations"),
			problem("NodeWithoutPodCIDR", "Node n1", "spec.podCIDRs"),
			claimed("Node n2", "n1"),
			claimed("Node n2", "n3"),
			claimed("Node n1", "n2"),
			claimed("Node n3", "n0"), // whose daemon may be dead
			problem("NamespaceInvalid", "Namespace shop", "metadata.annotations"),
			problem("NamespaceInvalid", "Namespace bar", "metadata.annotations"),
			problem("AdmissionPolicyMissing", "ValidatingAdmissionPolicy warren-publishes-own-key", ""),
			problem("FileInvalid", "/objects/pod.yaml", ""),
		}
		want := []string{
			"Warning PolicyInvalid NetworkPolicy shop/ours: spec.ingress[0]: it is wrong; mend it",
			"Warning PolicyNotApplied NetworkPolicy shop/theirs: it is wrong; mend it",
			"Warning PolicyNotApplied NetworkPolicy shop/ours: it is wrong; mend it",
			"Warning MeshApplyFailed Node /n1: it is wrong; mend it",
			"Warning NodeInvalid Node /n2: metadata.annotations: it is wrong; mend it",
			"Warning NodeWithoutPodCIDR Node /n1: spec.podCIDRs: it is wrong; mend it",
			"Warning PodCIDROverlap Node /n2: Node n2: spec.podCIDRs[0]: it is wrong; mend it",
			"Warning PodCIDROverlap Node /n3: Node n3: spec.podCIDRs[0]: it is wrong; mend it",
			"Warning NamespaceInvalid Namespace /shop: metadata.annotations: it is wrong; mend it",
		}
		expect := func(what string, before, now []cluster.Problem, want []string) {
			t.Helper()
			got = nil
			n.logProblems(before, now)
			synctest.Wait()
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", what, diff)
			}
		}
		expect("at first", nil, all, want)
		expect("while they last", all, all[:2], nil)
		expect("when one comes again", all[1:2], all[:2], want[:1])

		// A Node that has something new wrong with it every time is said to be wrong once in a while.
		again := func(message string) []cluster.Problem {
			p := claimed("Node n2", "n1")
			p.Message = message
			return []cluster.Problem{p}
		}
		expect("another claim of the same thing", nil, again("it is wrong, too"), nil)
		time.Sleep(refusedEvery) //nolint:forbidigo // fake time
		expect("the next one, later", nil, again("it is wrong as well"),
			[]string{"Warning PodCIDROverlap Node /n2: Node n2: spec.podCIDRs[0]: it is wrong as well; mend it"})

		// What lasts is said again before the first Event about it is forgotten, what does not is not.
		standing = all
		got = nil
		time.Sleep(announceAgain) //nolint:forbidigo // fake time
		synctest.Wait()
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("what lasts (-want +got):\n%s", diff)
		}
		standing, got = nil, nil
		time.Sleep(announceAgain) //nolint:forbidigo // fake time
		synctest.Wait()
		if len(got) > 0 {
			t.Errorf("what is over: %q", got)
		}
	})
}

package kube_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/kube"
)

// testKubelet checks the policy warren-kubelet-keeps-podcidrs, and what NodeRestriction does beside it, with the credential of a
// kubelet.
func testKubelet(t *testing.T, f fixture) {
	const message, another, one, both = "must not set spec.podCIDRs", "is not allowed to modify node", `{"spec":{"podCIDR":"10.244.9.0/24"}}`, takePodCIDRs
	kubelet := client(t, f.server.Kubelet("n1"))
	for name, patch := range map[string]change{
		"both fields":       merge(both),
		"the singular":      merge(one),
		"the list":          merge(`{"spec":{"podCIDRs":["10.244.9.0/24"]}}`),
		"two families":      merge(`{"spec":{"podCIDRs":["10.244.9.0/24","fd00:10:244:9::/64"]}}`),
		"somewhere else":    merge(`{"spec":{"podCIDRs":["8.8.8.8/32"]}}`),
		"a JSON patch":      {types.JSONPatchType, `[{"op":"add","path":"/spec/podCIDRs","value":["10.244.9.0/24"]}]`},
		"a strategic patch": {types.StrategicMergePatchType, both},
		"an apply":          {types.ApplyPatchType, `{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1"},"spec":{"podCIDRs":["10.244.9.0/24"]}}`},
	} {
		expectForbidden(t, "taking a podCIDR by "+name, patch.send(t, kubelet, "n1"), message)
	}
	expectForbidden(t, "taking a podCIDR by an update", update(t, kubelet, "n1", func(n *corev1.Node) { n.Spec.PodCIDRs = []string{"10.244.9.0/24"} }), message)
	expectForbidden(t, "changing another Node", patchNode(t.Context(), kubelet, "n2", ownKey), another)
	expectForbidden(t, "changing another Node's podCIDR", patchNode(t.Context(), kubelet, "n2", takePodCIDRs), another)

	fresh := client(t, f.server.Kubelet("n3"))
	register := func(spec corev1.NodeSpec) error {
		_, err := fresh.CoreV1().Nodes().Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n3"}, Spec: spec}, metav1.CreateOptions{})
		return err
	}
	expectForbidden(t, "registering with podCIDRs", register(corev1.NodeSpec{PodCIDRs: []string{"10.244.9.0/24"}}), message)
	expectForbidden(t, "registering with the singular podCIDR", register(corev1.NodeSpec{PodCIDR: "10.244.9.0/24"}), message)
	if err := register(corev1.NodeSpec{}); err != nil {
		t.Errorf("registering without a podCIDR: %v", err)
	}
	if err := fresh.CoreV1().Nodes().Delete(t.Context(), "n3", metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("deleting the own Node, to register anew: %v", err)
	}

	// With an allocated podCIDR the kubelet goes on with its own work, and can neither change it nor give it up for another.
	if err := patchNode(t.Context(), f.admin, "n1", `{"spec":{"podCIDR":"10.244.1.0/24","podCIDRs":["10.244.1.0/24"]}}`); err != nil {
		t.Fatal(err)
	}
	for _, patch := range []string{both, one, `{"spec":{"podCIDR":null,"podCIDRs":null}}`, `{"spec":{"podCIDRs":["10.244.1.0/24","fd00:10:244:9::/64"]}}`} {
		// The server itself knows no such change, whoever asks.
		if err := patchNode(t.Context(), kubelet, "n1", patch); err == nil || !strings.Contains(err.Error(), "may not change podCIDR") {
			t.Errorf("changing an allocated podCIDR by %s: %v", patch, err)
		}
	}
	// What its own Node says is lost with it: the proof of the key, and not the server, keeps it from speaking for others.
	for _, patch := range []string{`{"metadata":{"annotations":{"example.com/kubelet":"works"}}}`, ownKey, `{"spec":{"unschedulable":true}}`} {
		if err := patchNode(t.Context(), kubelet, "n1", patch); err != nil {
			t.Errorf("the kubelet changes its Node: %v", err)
		}
	}
	if err := patchNode(t.Context(), f.admin, "n1", `{"metadata":{"annotations":{"warren.cni/wireguard-public-key":null}},"spec":{"unschedulable":null}}`); err != nil {
		t.Fatal(err)
	}
}

// change is a patch of a Node.
type change struct {
	by   types.PatchType
	text string
}

func merge(text string) change { return change{types.MergePatchType, text} }

func (p change) send(t *testing.T, c kubernetes.Interface, node string) error {
	t.Helper()
	options := metav1.PatchOptions{}
	if p.by == types.ApplyPatchType {
		force := true
		options = metav1.PatchOptions{FieldManager: "test", Force: &force}
	}
	_, err := c.CoreV1().Nodes().Patch(t.Context(), node, p.by, []byte(p.text), options)
	return err
}

// update writes a whole Node.
func update(t *testing.T, c kubernetes.Interface, name string, edit func(*corev1.Node)) error {
	t.Helper()
	node, err := c.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	edit(node)
	_, err = c.CoreV1().Nodes().Update(t.Context(), node, metav1.UpdateOptions{})
	return err
}

// testDaemon checks RBAC and the policy warren-publishes-own-key with the token that a pod on n1 has.
func testDaemon(t *testing.T, f fixture, daemon *rest.Config) {
	own := client(t, daemon)
	unbound := client(t, f.server.Bearer(f.token(t, "")))
	const taken = `{"metadata":{"annotations":{"warren.cni/wireguard-public-key":null}}}`
	for _, patch := range []change{
		merge(ownKey),
		merge(taken),
		{types.ApplyPatchType, `{"apiVersion":"v1","kind":"Node","metadata":{"name":"n1","annotations":{"warren.cni/mtu":"1500"}}}`},
	} {
		if err := patch.send(t, own, "n1"); err != nil {
			t.Errorf("publishing %s: %v", patch.text, err)
		}
	}
	const onlyOwn, onlyOurs, onlyAnnotations = "may only change the Node", "may only change annotations that begin", "may change annotations only"
	const apply = `{"apiVersion":"v1","kind":"Node","metadata":{"name":"%s"%s}%s}`
	for name, test := range map[string]struct {
		client  kubernetes.Interface
		node    string
		patch   change
		message string
	}{
		"another node":                   {own, "n2", merge(ownKey), onlyOwn},
		"another node, by an apply":      {own, "n2", change{types.ApplyPatchType, fmt.Sprintf(apply, "n2", `,"annotations":{"warren.cni/mtu":"1"}`, "")}, onlyOwn},
		"a node that is not there":       {own, "n9", change{types.ApplyPatchType, fmt.Sprintf(apply, "n9", "", "")}, "cannot create"},
		"a token without a pod":          {unbound, "n1", merge(ownKey), onlyOwn},
		"a new foreign annotation":       {own, "n1", merge(`{"metadata":{"annotations":{"example.com/new":"x"}}}`), onlyOurs},
		"an old foreign annotation":      {own, "n1", merge(`{"metadata":{"annotations":{"example.com/owner":"x"}}}`), onlyOurs},
		"a foreign annotation's end":     {own, "n1", merge(`{"metadata":{"annotations":{"example.com/owner":null}}}`), onlyOurs},
		"all annotations' end":           {own, "n1", merge(`{"metadata":{"annotations":null}}`), onlyOurs},
		"a prefix that looks like it":    {own, "n1", merge(`{"metadata":{"annotations":{"warren.cni.example.com/x":"x"}}}`), onlyOurs},
		"a foreign one beside ours":      {own, "n1", merge(`{"metadata":{"annotations":{"warren.cni/mtu":"1500","node.alpha.kubernetes.io/ttl":"1"}}}`), onlyOurs},
		"a foreign one, by a JSON patch": {own, "n1", change{types.JSONPatchType, `[{"op":"remove","path":"/metadata/annotations/example.com~1owner"}]`}, onlyOurs},
		"a foreign one, by an apply":     {own, "n1", change{types.ApplyPatchType, fmt.Sprintf(apply, "n1", `,"annotations":{"example.com/owner":"x"}`, "")}, onlyOurs},
		"a label":                        {own, "n1", merge(`{"metadata":{"labels":{"zone":"b"}}}`), onlyAnnotations},
		"a label's end":                  {own, "n1", merge(`{"metadata":{"labels":null}}`), onlyAnnotations},
		"a label with our prefix":        {own, "n1", merge(`{"metadata":{"labels":{"warren.cni/x":"b"}}}`), onlyAnnotations},
		"a label, by an apply":           {own, "n1", change{types.ApplyPatchType, fmt.Sprintf(apply, "n1", `,"labels":{"zone":"b"}`, "")}, onlyAnnotations},
		"a taint":                        {own, "n1", change{types.StrategicMergePatchType, `{"spec":{"taints":[{"key":"a","effect":"NoExecute"}]}}`}, onlyAnnotations},
		"unschedulable":                  {own, "n1", change{types.JSONPatchType, `[{"op":"add","path":"/spec/unschedulable","value":true}]`}, onlyAnnotations},
		"the podCIDR":                    {own, "n2", merge(takePodCIDRs), onlyOwn},
		"the spec, by an apply":          {own, "n1", change{types.ApplyPatchType, fmt.Sprintf(apply, "n1", "", `,"spec":{"unschedulable":true}`)}, onlyAnnotations},
		"a finalizer":                    {own, "n1", merge(`{"metadata":{"finalizers":["example.com/stay"]}}`), onlyAnnotations},
		"an owner":                       {own, "n1", merge(`{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"Node","name":"n2","uid":"1"}]}}`), onlyAnnotations},
	} {
		t.Run(name, func(t *testing.T) {
			expectForbidden(t, "patching "+test.node, test.patch.send(t, test.client, test.node), test.message)
		})
	}
	testForbidden(t, f, own)
	testMayDo(t, own)
	testEvents(t, own)
}

// testForbidden checks writes that RBAC refuses.
func testForbidden(t *testing.T, f fixture, own kubernetes.Interface) {
	nodes := own.CoreV1().Nodes()
	_, err := nodes.Patch(t.Context(), "n1", types.MergePatchType, []byte(`{"status":{"addresses":[]}}`), metav1.PatchOptions{}, "status")
	expectForbidden(t, "changing a status", err, "cannot patch")
	node, err := f.admin.CoreV1().Nodes().Get(t.Context(), "n1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = nodes.Update(t.Context(), node, metav1.UpdateOptions{})
	expectForbidden(t, "writing a whole node", err, "cannot update")
	expectForbidden(t, "deleting a node", nodes.Delete(t.Context(), "n2", metav1.DeleteOptions{}), "cannot delete")
	_, err = nodes.Create(t.Context(), &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n4"}}, metav1.CreateOptions{})
	expectForbidden(t, "making a node", err, "cannot create")
	_, err = own.CoreV1().Secrets("").List(t.Context(), metav1.ListOptions{})
	expectForbidden(t, "listing secrets", err, "cannot list")
	expectForbidden(t, "deleting a pod", own.CoreV1().Pods(namespace).Delete(t.Context(), "warren-n1", metav1.DeleteOptions{}), "cannot delete")

	// A Node's name cannot be changed at all.
	_, err = nodes.Patch(t.Context(), "n1", types.JSONPatchType, []byte(`[{"op":"replace","path":"/metadata/name","value":"n2"}]`), metav1.PatchOptions{})
	if err == nil {
		t.Error("a node got another name")
	}
}

// testMayDo checks that there is no write that nobody has thought of: what RBAC allows beyond what it allows everybody.
func testMayDo(t *testing.T, own kubernetes.Interface) {
	review, err := own.AuthorizationV1().SelfSubjectRulesReviews().Create(t.Context(),
		&authorizationv1.SelfSubjectRulesReview{Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: namespace}}, metav1.CreateOptions{})
	if err != nil || review.Status.Incomplete {
		t.Fatalf("asking for what may be done: %+v, %v", review.Status, err)
	}
	var writes []string
	for _, rule := range review.Status.ResourceRules {
		for _, verb := range rule.Verbs {
			if !slices.Contains([]string{"get", "list", "watch"}, verb) {
				writes = append(writes, verb+" "+strings.Join(rule.APIGroups, ",")+"/"+strings.Join(rule.Resources, ","))
			}
		}
	}
	slices.Sort(writes)
	want := []string{
		"create /events",
		"create authentication.k8s.io/selfsubjectreviews",                              // as everybody
		"create authorization.k8s.io/selfsubjectaccessreviews,selfsubjectrulesreviews", // as everybody
		"patch /events",
		"patch /nodes",
	}
	if diff := cmp.Diff(want, writes); diff != "" {
		t.Errorf("what the daemon may write (-want +got):\n%s", diff)
	}
}

// testEvents checks the policy warren-writes-own-events.
func testEvents(t *testing.T, own kubernetes.Interface) {
	const message = "may only write Events of its own"
	create := func(name, component, host string) error {
		_, err := own.CoreV1().Events("default").Create(t.Context(), &corev1.Event{
			ObjectMeta: metav1.ObjectMeta{Name: name}, InvolvedObject: corev1.ObjectReference{Kind: "Node", Name: "n2"},
			Source: corev1.EventSource{Component: component, Host: host}, Reason: "Tested", Type: corev1.EventTypeWarning,
		}, metav1.CreateOptions{})
		return err
	}
	if err := create("own", "warren", "n1"); err != nil {
		t.Errorf("writing an Event: %v", err)
	}
	expectForbidden(t, "writing an Event as another node", create("a", "warren", "n2"), message)
	expectForbidden(t, "writing an Event as no node", create("b", "warren", ""), message)
	expectForbidden(t, "writing an Event as the kubelet", create("c", "kubelet", "n1"), message)
	patch := func(name, text string) error {
		_, err := own.CoreV1().Events("default").Patch(t.Context(), name, types.StrategicMergePatchType, []byte(text), metav1.PatchOptions{})
		return err
	}
	if err := patch("own", `{"count":2}`); err != nil {
		t.Errorf("counting an Event: %v", err)
	}
	expectForbidden(t, "giving an Event to another node", patch("own", `{"source":{"host":"n2"}}`), message)
	expectForbidden(t, "rewriting another's Event", patch("of-n2", `{"message":"all is well"}`), message)
	expectForbidden(t, "taking over another's Event", patch("of-n2", `{"source":{"host":"n1"}}`), message)
}

// testProtection checks that the daemon misses a policy that is not there, and no other: that it may read them, and knows their names.
func testProtection(t *testing.T, daemon *rest.Config, f fixture) {
	bindings := f.admin.AdmissionregistrationV1().ValidatingAdmissionPolicyBindings()
	for _, name := range []string{"warren-kubelet-keeps-podcidrs", "warren-publishes-own-key", "warren-writes-own-events"} {
		binding, err := bindings.Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err = bindings.Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		source, err := kube.NewAPI(daemon, "n1", slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- source.Run(ctx) }()
		missing := func() []cluster.Problem {
			return slices.DeleteFunc(source.Problems(), func(p cluster.Problem) bool { return p.Code != "AdmissionPolicyMissing" })
		}
		for len(missing()) == 0 && ctx.Err() == nil {
			select {
			case <-source.Changed():
			case <-ctx.Done():
			}
		}
		if found := missing(); len(found) != 1 || found[0].Object != "ValidatingAdmissionPolicy "+name {
			t.Errorf("without the binding of %s: %v", name, found)
		}
		cancel()
		if err = <-ended; err != nil {
			t.Error(err)
		}
		binding.ResourceVersion = ""
		if _, err = bindings.Create(t.Context(), binding, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

func expectForbidden(t *testing.T, what string, err error, message string) {
	t.Helper()
	if !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), message) {
		t.Errorf("%s: got %v, want it forbidden with %q", what, err, message)
	}
}

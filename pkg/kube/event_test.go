package kube

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/warren-cni/warren/pkg/internal/apiserver"
)

func denied(name, message string) Event {
	return Event{Reference{Kind: "Pod", Namespace: "shop", Name: name}, Warning, "Denied", message}
}

func testAPIEvents(t *testing.T, server *apiserver.Server, admin kubernetes.Interface) {
	pod := create(t, admin, newPod("seen"))
	defer deletePod(t, admin, "seen")
	r := run(t, server.Admin(), "n1")
	r.Event(t.Context(), denied("seen", "again"))
	r.Event(t.Context(), denied("seen", "again"))
	for i := range 100 {
		r.Event(t.Context(), denied("seen", fmt.Sprint("different ", i)))
	}
	policy := Reference{Kind: "NetworkPolicy", Namespace: "shop", Name: "last", UID: "u"}
	r.Event(t.Context(), Event{policy, Normal, "Last", "written after all others"})

	watch, err := admin.CoreV1().Events("shop").Watch(r.ctx, metav1.ListOptions{ResourceVersion: "0"})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()
	written := make(map[string]*corev1.Event)
	for last := false; !last; {
		select {
		case change := <-watch.ResultChan():
			event := change.Object.(*corev1.Event)
			written[event.Name] = event
			last = event.Reason == "Last"
		case <-r.ctx.Done():
			t.Fatalf("waiting for the last event: %v", written)
		}
	}
	again := 0
	for _, e := range written {
		if e.Source.Component != "warren" || e.ReportingInstance != "n1" || e.InvolvedObject.UID == "" {
			t.Errorf("event %+v: want component, node and uid", e)
		}
		if e.Reason == "Last" && (e.InvolvedObject.APIVersion != "networking.k8s.io/v1" || e.Type != "Normal") {
			t.Errorf("event %+v: want a normal one about a policy", e)
		}
		if e.Message == "again" {
			again++
			if e.Count != 2 || e.InvolvedObject.UID != pod.UID || e.InvolvedObject.APIVersion != "v1" || e.Type != "Warning" {
				t.Errorf("event %+v: want a warning about pod %s that was seen twice", e, pod.UID)
			}
		}
	}
	if again != 1 || len(written) < 3 || len(written) > eventsOfObject+1 {
		t.Errorf("%d events in all and %d times the same one, want at most %d and 1", len(written), again, eventsOfObject+1)
	}
}

func TestDirectoryLogsEvents(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "pod.yaml", podYAML)
	lines := make(logLines, 100)
	d, err := NewDirectory(dir, "n1", slog.New(slog.NewTextHandler(lines, nil)))
	if err != nil {
		t.Fatal(err)
	}
	d.Event(t.Context(), denied("api-1", "before Run there are none"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	if err = d.WaitForSync(ctx); err != nil {
		t.Fatal(err)
	}
	d.Event(ctx, denied("api-1", "again"))
	d.Event(ctx, denied("api-1", "again"))
	for i := range 2 * eventsOfObject { // as many as nobody shall keep from being told of another kind
		d.Event(ctx, denied("api-1", fmt.Sprint("different-", i)))
	}
	d.Event(ctx, Event{Reference{Kind: "Pod", Namespace: "shop", Name: "api-1"}, Warning, "Other", "other"})
	wanted := []string{"message=again"}
	for i := range eventsOfObject - 2 { // the same one counted twice
		wanted = append(wanted, fmt.Sprint("message=different-", i))
	}
	for _, want := range append(wanted, "message=other") {
		select {
		case line := <-lines:
			if !strings.Contains(line, want) || !strings.Contains(line, "level=INFO") || !strings.Contains(line, "namespace=shop name=api-1") {
				t.Errorf("logged %s, want %s", line, want)
			}
		case <-ctx.Done():
			t.Fatalf("nothing was logged, want %s", want)
		}
	}
	cancel()
	if err = <-ended; err != nil {
		t.Error(err)
	}
}

// logLines receives what is logged, line by line.
type logLines chan string

// Write passes a line on.
func (l logLines) Write(line []byte) (int, error) {
	l <- string(bytes.TrimSpace(line))
	return len(line), nil
}

func TestReporters(t *testing.T) {
	pod := func(name, node, more string) string {
		return strings.NewReplacer("api-1", name, "nodeName: n1", "nodeName: "+node+more).Replace(podYAML) + "---\n"
	}
	nodes := nodeYAML + "---\n" + strings.Replace(nodeYAML, "n1", "n0", 1) + "---\n"
	more := nodes + strings.Replace(nodeYAML, "n1", "n3", 1) + "---\n" + strings.Replace(nodeYAML, "n1", "n2", 1) + "---\n"
	deny := Reference{Kind: "NetworkPolicy", Namespace: "shop", Name: "deny"}
	ofNode := func(name string) Reference { return Reference{Kind: "Node", Name: name} }
	const shopYAML = "{apiVersion: v1, kind: Namespace, metadata: {name: shop}}\n---\n"
	shop := Reference{Kind: "Namespace", Name: "shop"}
	for name, test := range map[string]struct {
		objects string
		object  Reference
		want    string
	}{
		"the first node with a selected pod": {nodes + pod("a", "n3", "") + pod("b", "n2", "") + policyYAML, deny, "n2"},
		"pods that no policy selects": {
			nodes + pod("a", "n3", ", hostNetwork: true") + strings.Replace(pod("b", "n2", ""), "app: api", "app: db", 1) +
				strings.Replace(pod("c", "n4", ""), "namespace: shop", "namespace: bar", 1) + policyYAML,
			deny, "n0",
		},
		"a pod without a node":  {nodes + strings.Replace(pod("a", "n3", ""), "nodeName: n3, ", "", 1) + policyYAML, deny, "n0"},
		"a policy that is gone": {nodes + pod("a", "n3", ""), deny, ""},
		"no node":               {policyYAML, deny, ""},
		"a node":                {more, ofNode("n1"), "n0 n2"},
		"the first node":        {more + pod("a", "n0", ""), ofNode("n0"), "n1 n2"},
		"one of two nodes":      {nodes, ofNode("n0"), "n1 n0"},
		"the only node":         {nodeYAML, ofNode("n1"), "n1"},
		"a node that is gone":   {nodes, ofNode("n9"), ""},
		"a namespace":           {nodes + shopYAML + pod("a", "n3", "") + pod("b", "n2", ""), shop, "n2"},
		"a namespace alone":     {nodes + shopYAML, shop, "n0"},
		"another kind":          {nodes, Reference{Kind: "Service", Namespace: "shop", Name: "web"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDirectory(t, map[string]string{"a.yaml": test.objects})
			if problems := d.Problems(); len(problems) > 0 {
				t.Fatal(problems)
			}
			if got := strings.Join(d.Reporters(test.object, ""), " "); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}

	// What a Node claims of another's they both write that are neither hostile nor dead, if one of all nodes is.
	d := newDirectory(t, map[string]string{"a.yaml": more})
	for _, test := range []struct{ refused, owner, want string }{
		{"n1", "n2", "n2 n3"}, {"n1", "n3", "n3 n0"}, {"n1", "n0", "n0 n2"}, {"n0", "n3", "n3 n1"}, {"n3", "n2", "n2 n0"}, {"n1", "n2-is-gone", "n3 n0"},
	} {
		if got := strings.Join(d.Reporters(ofNode(test.refused), test.owner), " "); got != test.want {
			t.Errorf("of %s that claims what is %s's: got %q, want %q", test.refused, test.owner, got, test.want)
		}
	}
	d = newDirectory(t, map[string]string{"a.yaml": nodes})
	if got := strings.Join(d.Reporters(ofNode("n0"), "n1"), " "); got != "n1 n0" {
		t.Errorf("of one of two nodes: got %q", got)
	}
}

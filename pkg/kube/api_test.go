package kube

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/internal/apiserver"
)

// running is an API source that follows a real server until the test ends.
type running struct {
	*API
	t   *testing.T
	ctx context.Context
}

func run(t *testing.T, config *rest.Config, self string) running {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	a, err := NewAPI(config, self, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run ended with %v, want nil", err)
		}
	})
	if err := a.WaitForSync(ctx); err != nil {
		t.Fatal(err)
	}
	return running{API: a, t: t, ctx: ctx}
}

// wait returns when the snapshot and its problems are as wanted.
func (r running) wait(what string, ok func(cluster.Snapshot, []cluster.Problem) bool) {
	r.t.Helper()
	for {
		snapshot, problems := r.Snapshot()
		if ok(snapshot, problems) {
			return
		}
		select {
		case <-r.Changed():
		case <-r.ctx.Done():
			r.t.Fatalf("waiting for %s: objects %v, problems %v", what, summary(snapshot), problems)
		}
	}
}

func TestAPI(t *testing.T) {
	server := apiserver.Start(t)
	admin, err := kubernetes.NewForConfig(server.Admin())
	if err != nil {
		t.Fatal(err)
	}
	create(t, admin, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1"}, Spec: corev1.NodeSpec{PodCIDRs: []string{"10.1.0.0/24"}}})
	create(t, admin, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "shop", Labels: map[string]string{"team": "a"}}})
	create(t, admin, &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "default"}})
	t.Run("protection", func(t *testing.T) { testAPIProtection(t, server, admin) })
	t.Run("changes", func(t *testing.T) { testAPIChanges(t, server, admin) })
	t.Run("refresh", func(t *testing.T) { testAPIRefresh(t, server, admin) })
	t.Run("refresh in an outage", func(t *testing.T) { testAPIRefreshOutage(t, server, admin) })
	t.Run("service", func(t *testing.T) { testAPIService(t, server, admin) })
	t.Run("servers", func(t *testing.T) { testAPIServers(t, server, admin) })
	t.Run("events", func(t *testing.T) { testAPIEvents(t, server, admin) })
	t.Run("publish", func(t *testing.T) { testAPIPublish(t, server, admin) })
	t.Run("outage", func(t *testing.T) { testAPIOutage(t, server, admin) })
}

func testAPIChanges(t *testing.T, server *apiserver.Server, admin kubernetes.Interface) {
	r := run(t, server.Admin(), "n1")
	snapshot, problems := r.Snapshot()
	node, ok := snapshot.Node("n1")
	if !ok || len(node.PodCIDRs) != 1 || node.UID == "" || node.Created.IsZero() || len(problems) > 0 {
		t.Errorf("node n1 is %+v with problems %v: want podCIDR, uid and creation time", node, problems)
	}
	if !slices.ContainsFunc(snapshot.Namespaces, func(n cluster.Namespace) bool { return n.Name == "shop" && n.Labels["team"] == "a" }) {
		t.Errorf("namespaces are %v, want shop with its labels", snapshot.Namespaces)
	}

	pod := create(t, admin, newPod("web"))
	r.wait("the new pod", hasPod("web", func(p cluster.Pod) bool { return p.UID == string(pod.UID) && p.Node == "n1" }))
	pod.Labels = map[string]string{"app": "web"}
	pod, err := admin.CoreV1().Pods("shop").Update(t.Context(), pod, metav1.UpdateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	r.wait("the pod's new label", hasPod("web", func(p cluster.Pod) bool { return p.Labels["app"] == "web" }))

	policy := create(t, admin, &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "deny"}})
	r.wait("the new policy", func(s cluster.Snapshot, _ []cluster.Problem) bool {
		return len(s.Policies) == 1 && s.Policies[0].Ingress && s.Policies[0].UID == string(policy.UID)
	})

	// An annotation that nobody reads changes nothing; the signal that follows is that of the deletion.
	drain(r.Changed())
	pod.Annotations = map[string]string{"example.com/x": "y"}
	if _, err = admin.CoreV1().Pods("shop").Update(t.Context(), pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	deletePod(t, admin, "web")
	<-r.Changed()
	if snapshot, _ = r.Snapshot(); hasPod("web", nil)(snapshot, nil) {
		t.Error("a signal came for a change that the snapshot does not show")
	}
}

func testAPIPublish(t *testing.T, server *apiserver.Server, admin kubernetes.Interface) {
	r := run(t, server.Admin(), "n1")
	annotations := map[string]string{AnnotationPublicKey: "AQIDAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=", AnnotationPort: "51820"}
	if err := r.Publish(t.Context(), annotations); err != nil {
		t.Fatal(err)
	}
	r.wait("the published key", func(s cluster.Snapshot, _ []cluster.Problem) bool {
		node, _ := s.Node("n1")
		return node.WireGuard != nil && node.WireGuard.Port == 51820
	})
	before := getNode(t, admin)
	if err := r.Publish(t.Context(), annotations); err != nil {
		t.Fatal(err)
	}
	if after := getNode(t, admin); after.ResourceVersion != before.ResourceVersion {
		t.Error("publishing the same again wrote the Node")
	}
	// An empty value removes an annotation, in one write with others; that others' annotations stay is the server's promise.
	if err := r.Publish(t.Context(), map[string]string{AnnotationNextPublicKey: annotations[AnnotationPublicKey], AnnotationMTU: "1400"}); err != nil {
		t.Fatal(err)
	}
	r.wait("the next key", func(s cluster.Snapshot, _ []cluster.Problem) bool {
		node, _ := s.Node("n1")
		return node.WireGuard != nil && node.WireGuard.Next != nil && node.WireGuard.MTU == 1400
	})
	removal := map[string]string{AnnotationNextPublicKey: "", AnnotationNextKeyProof: "", AnnotationMTU: "1500"}
	if err := r.Publish(t.Context(), removal); err != nil {
		t.Fatal(err)
	}
	r.wait("the next key gone", func(s cluster.Snapshot, _ []cluster.Problem) bool {
		node, _ := s.Node("n1")
		return node.WireGuard != nil && node.WireGuard.Next == nil && node.WireGuard.MTU == 1500
	})
	before = getNode(t, admin)
	if _, there := before.Annotations[AnnotationNextPublicKey]; there {
		t.Error("the annotation is still there")
	}
	if err := r.Publish(t.Context(), removal); err != nil {
		t.Fatal(err)
	}
	if after := getNode(t, admin); after.ResourceVersion != before.ResourceVersion {
		t.Error("removing what is not there wrote the Node")
	}
	annotations[AnnotationPublicKey] = "garbage"
	if err := r.Publish(t.Context(), annotations); err != nil {
		t.Fatal(err)
	}
	r.wait("the problem of the garbage key", func(s cluster.Snapshot, problems []cluster.Problem) bool {
		node, _ := s.Node("n1")
		return node.WireGuard == nil && len(problems) == 1 && problems[0].Code == codeNode && problems[0].Object == "Node n1"
	})

	stranger := run(t, server.Admin(), "n9")
	if err := stranger.Publish(t.Context(), annotations); err == nil || !strings.Contains(err.Error(), "n9") {
		t.Errorf("publishing on a Node that does not exist: got %v, want an error that names it", err)
	}
}

func testAPIOutage(t *testing.T, server *apiserver.Server, admin kubernetes.Interface) {
	config := server.Admin()
	line := newProxy(t, config.Host)
	config.Host = "https://" + line.address
	r := run(t, config, "n1")
	before, _ := r.Snapshot()

	line.cut()
	r.wait("the problem of the outage", func(_ cluster.Snapshot, problems []cluster.Problem) bool {
		return slices.ContainsFunc(problems, func(p cluster.Problem) bool { return p.Code == codeUnreachable })
	})
	during, _ := r.Snapshot()
	if diff := cmp.Diff(summary(before), summary(during)); diff != "" {
		t.Errorf("the objects changed during the outage (-before +during):\n%s", diff)
	}
	create(t, admin, newPod("meanwhile"))
	defer deletePod(t, admin, "meanwhile")
	line.restore()
	r.wait("what happened meanwhile, and the end of the problem", func(s cluster.Snapshot, problems []cluster.Problem) bool {
		return hasPod("meanwhile", nil)(s, nil) && !slices.ContainsFunc(problems, func(p cluster.Problem) bool { return p.Code == codeUnreachable })
	})
}

// proxy is a TCP line to the server that can be cut.
type proxy struct {
	t       *testing.T
	server  string
	address string

	mu       sync.Mutex
	listener net.Listener // nil while the line is cut
	open     []net.Conn
}

func newProxy(t *testing.T, server string) *proxy {
	t.Helper()
	target, err := url.Parse(server)
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{t: t, server: target.Host, address: "127.0.0.1:0"}
	p.restore()
	t.Cleanup(p.cut)
	return p
}

// restore listens on the address of before.
func (p *proxy) restore() {
	p.t.Helper()
	listener, err := net.Listen("tcp", p.address)
	if err != nil {
		p.t.Fatal(err)
	}
	p.mu.Lock()
	p.listener, p.address = listener, listener.Addr().String()
	p.mu.Unlock()
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			p.join(listener, client)
		}
	}()
}

// join copies between the client and the server until one of the two ends, unless the line was cut meanwhile.
func (p *proxy) join(listener net.Listener, client net.Conn) {
	server, err := net.Dial("tcp", p.server)
	if err != nil {
		_ = client.Close()
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener != listener {
		_, _ = client.Close(), server.Close()
		return
	}
	p.open = append(p.open, client, server)
	for _, ends := range [][2]net.Conn{{client, server}, {server, client}} {
		go func() {
			_, _ = io.Copy(ends[0], ends[1])
			_ = ends[0].Close()
		}()
	}
}

func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener == nil {
		return
	}
	_ = p.listener.Close()
	p.listener = nil
	for _, c := range p.open {
		_ = c.Close()
	}
	p.open = nil
}

// hasPod is true for a snapshot with that pod in namespace shop, as wanted.
func hasPod(name string, wanted func(cluster.Pod) bool) func(cluster.Snapshot, []cluster.Problem) bool {
	return func(s cluster.Snapshot, _ []cluster.Problem) bool {
		return slices.ContainsFunc(s.Pods, func(p cluster.Pod) bool {
			return p.Namespace == "shop" && p.Name == name && (wanted == nil || wanted(p))
		})
	}
}

func newPod(name string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name},
		Spec:       corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Name: "c", Image: "i"}}},
	}
}

func create[O apiObject](t *testing.T, admin kubernetes.Interface, o O) O {
	t.Helper()
	var made any
	var err error
	switch o := any(o).(type) {
	case *corev1.Node:
		made, err = admin.CoreV1().Nodes().Create(t.Context(), o, metav1.CreateOptions{})
	case *corev1.Namespace:
		made, err = admin.CoreV1().Namespaces().Create(t.Context(), o, metav1.CreateOptions{})
	case *corev1.ServiceAccount:
		made, err = admin.CoreV1().ServiceAccounts(o.Namespace).Create(t.Context(), o, metav1.CreateOptions{})
	case *corev1.Pod:
		made, err = admin.CoreV1().Pods(o.Namespace).Create(t.Context(), o, metav1.CreateOptions{})
	case *networkingv1.NetworkPolicy:
		made, err = admin.NetworkingV1().NetworkPolicies(o.Namespace).Create(t.Context(), o, metav1.CreateOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	return made.(O)
}

func deletePod(t *testing.T, admin kubernetes.Interface, name string) {
	t.Helper()
	// There is no kubelet that would end the pod's grace period.
	if err := admin.CoreV1().Pods("shop").Delete(t.Context(), name, *metav1.NewDeleteOptions(0)); err != nil {
		t.Fatal(err)
	}
}

// getNode reads node n1.
func getNode(t *testing.T, admin kubernetes.Interface) *corev1.Node {
	t.Helper()
	node, err := admin.CoreV1().Nodes().Get(t.Context(), "n1", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return node
}

func drain(c <-chan struct{}) {
	select {
	case <-c:
	default:
	}
}

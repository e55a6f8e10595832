package kube

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/internal/apiserver"
)

func testAPIRefresh(t *testing.T, server *apiserver.Server, admin kubernetes.Interface) {
	watches := newDam()
	config := server.Admin()
	config.Wrap(watches.wrap)
	r := run(t, config, "n1")
	if err := r.Refresh(t.Context(), "shop", "late", "u"); !errors.Is(err, errPodUnknown) {
		t.Errorf("refreshing a pod that does not exist: got %v, want errPodUnknown", err)
	}

	watches.close()
	pod := create(t, admin, newPod("late"))
	defer deletePod(t, admin, "late")
	pod.Labels = map[string]string{"app": "web"}
	pod, err := admin.CoreV1().Pods("shop").Update(t.Context(), pod, metav1.UpdateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	create(t, admin, &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "late"}})
	patch := []byte(`{"metadata":{"labels":{"team":"b"}}}`)
	if _, err = admin.CoreV1().Namespaces().Patch(t.Context(), "shop", "application/merge-patch+json", patch, metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	isNew := func(s cluster.Snapshot) bool {
		policy, namespace := false, false
		for _, p := range s.Policies {
			policy = policy || p.Name == "late"
		}
		for _, n := range s.Namespaces {
			namespace = namespace || (n.Name == "shop" && n.Labels["team"] == "b")
		}
		return policy && namespace && hasPod("late", func(p cluster.Pod) bool { return p.Labels["app"] == "web" })(s, nil)
	}
	if snapshot, _ := r.Snapshot(); isNew(snapshot) {
		t.Fatal("the watch brought the changes, want it to lag")
	}
	if err = r.Refresh(t.Context(), "shop", "late", "other"); !errors.Is(err, errPodUnknown) {
		t.Errorf("refreshing a pod with another uid: got %v, want errPodUnknown", err)
	}
	if err = r.Refresh(t.Context(), "shop", "late", string(pod.UID)); err != nil {
		t.Fatal(err)
	}
	snapshot, _ := r.Snapshot()
	if !isNew(snapshot) {
		t.Errorf("after the refresh: %v, want the pod, its label, the policy and the namespace's label", snapshot)
	}

	watches.open()
	create(t, admin, newPod("marker"))
	defer deletePod(t, admin, "marker")
	r.wait("the watch to catch up", func(s cluster.Snapshot, _ []cluster.Problem) bool {
		if !isNew(s) {
			t.Errorf("the watch undid the refresh: %v", s)
		}
		return hasPod("marker", nil)(s, nil)
	})
}

func testAPIRefreshOutage(t *testing.T, server *apiserver.Server, admin kubernetes.Interface) {
	pod := create(t, admin, newPod("known"))
	defer deletePod(t, admin, "known")
	config := server.Admin()
	line := newProxy(t, config.Host)
	config.Host = "https://" + line.address
	r := run(t, config, "n1")
	line.cut()
	if err := r.Refresh(t.Context(), "shop", "known", string(pod.UID)); err != nil {
		t.Errorf("refreshing a pod that is known while the server is away: got %v, want nil", err)
	}
	if err := r.Refresh(t.Context(), "shop", "unknown", "u"); !errors.Is(err, errPodUnknown) {
		t.Errorf("refreshing a pod that is not known while the server is away: got %v, want errPodUnknown", err)
	}
	line.restore()

	// A server that refuses is not away, and one that does not answer is.
	refused, err := NewAPI(server.Bearer("nobody"), "n1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	silent := server.Admin()
	silent.Wrap(func(http.RoundTripper) http.RoundTripper { return silence{} })
	mute, err := NewAPI(silent, "n1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []*API{refused, mute} {
		if err = a.pods.Add(pod); err != nil {
			t.Fatal(err)
		}
	}
	if err = refused.Refresh(t.Context(), "shop", "known", string(pod.UID)); err == nil {
		t.Error("refreshing with a credential that is refused: got nil, want the refusal")
	}
	limited, cancel := context.WithTimeout(t.Context(), 10*refreshPatience)
	defer cancel()
	if err = mute.Refresh(limited, "shop", "known", string(pod.UID)); err != nil {
		t.Errorf("refreshing at a server that does not answer: got %v, want nil soon", err)
	}
}

// silence is a server that does not answer.
type silence struct{}

// RoundTrip waits for the request's end.
func (silence) RoundTrip(r *http.Request) (*http.Response, error) {
	<-r.Context().Done()
	return nil, r.Context().Err()
}

// dam holds back what watches bring while it is closed.
type dam struct {
	mu   sync.Mutex
	flow chan struct{} // closed while the dam is open
}

func newDam() *dam {
	d := &dam{flow: make(chan struct{})}
	close(d.flow)
	return d
}

func (d *dam) close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.flow = make(chan struct{})
}

func (d *dam) open() { close(d.flowing()) }

func (d *dam) flowing() chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flow
}

func (d *dam) wrap(next http.RoundTripper) http.RoundTripper { return dammed{next, d} }

type dammed struct {
	next http.RoundTripper
	dam  *dam
}

// RoundTrip puts the dam in a watch's answer.
func (d dammed) RoundTrip(r *http.Request) (*http.Response, error) {
	response, err := d.next.RoundTrip(r)
	if err == nil && r.URL.Query().Has("watch") {
		response.Body = heldBody{response.Body, d.dam, r}
	}
	return response, err
}

type heldBody struct {
	io.ReadCloser
	dam     *dam
	request *http.Request
}

// Read hands over what it has read once the dam is open.
func (b heldBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	select {
	case <-b.dam.flowing():
	case <-b.request.Context().Done():
	}
	return n, err
}

package kube

import (
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"

	"github.com/warren-cni/warren/pkg/cluster"
)

// reach watches the requests that list and watch, and knows which kinds cannot be read at the moment.
//
// It stands in the transport because client-go retries a refused connection without telling anybody, and tells nobody
// when a watch stands again.
type reach struct {
	notify func()

	mu      sync.Mutex
	failing map[string]string // by path
}

func newReach(notify func()) *reach {
	return &reach{notify: notify, failing: make(map[string]string)}
}

// wrap returns a transport that is watched.
func (r *reach) wrap(next http.RoundTripper) http.RoundTripper {
	return watchedTransport{next: next, reach: r}
}

type watchedTransport struct {
	next  http.RoundTripper
	reach *reach
}

// RoundTrip passes the request on and notes whether the server answered it.
func (t watchedTransport) RoundTrip(request *http.Request) (*http.Response, error) {
	response, err := t.next.RoundTrip(request)
	// A request that we gave up ourselves says nothing about the server.
	if request.Context().Err() == nil && isCollection(request) {
		fault := ""
		switch {
		case err != nil:
			fault = err.Error()
		// 410 Gone asks for a new list, which is the next request.
		case response.StatusCode >= http.StatusBadRequest && response.StatusCode != http.StatusGone:
			fault = "the answer was " + response.Status
		}
		t.reach.note(request.URL.Path, fault)
	}
	return response, err
}

// isCollection is true for the lists and watches of the informers.
func isCollection(request *http.Request) bool {
	path := request.URL.Path
	return request.Method == http.MethodGet && (strings.HasSuffix(path, "/api/v1/nodes") ||
		strings.HasSuffix(path, "/api/v1/namespaces") || strings.HasSuffix(path, "/api/v1/pods") ||
		strings.HasSuffix(path, "/apis/networking.k8s.io/v1/networkpolicies"))
}

func (r *reach) note(path, fault string) {
	r.mu.Lock()
	_, failed := r.failing[path]
	if fault == "" {
		delete(r.failing, path)
	} else {
		r.failing[path] = fault
	}
	r.mu.Unlock()
	if failed != (fault != "") {
		r.notify()
	}
}

func (r *reach) problems() []cluster.Problem {
	r.mu.Lock()
	defer r.mu.Unlock()
	var problems []cluster.Problem
	for _, path := range slices.Sorted(maps.Keys(r.failing)) {
		problems = append(problems, cluster.Problem{
			Code: codeUnreachable, Object: "API server", Field: path,
			Message: r.failing[path] + ": what is programmed stays as it was, changes are not seen",
			Remedy:  "check the API server, the network to it, and that Warren's ClusterRole is applied",
		})
	}
	return problems
}

package proof

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

// proxy stands between a daemon and the API server, and can do to watches what networks and servers do.
type proxy struct {
	http.Handler

	// kubeconfig is the path of one that leads to the proxy, and port is where it listens.
	kubeconfig string
	port       uint16

	mu      sync.Mutex
	watches map[*watch]bool
	// flowing is closed while watches get their events.
	flowing chan struct{}
	// answer is what the requests of which the condition holds get instead of an answer of the server's, 0 for none.
	answer int
	of     func(*http.Request) bool
	// delay is how long it takes until anything but a watch is forwarded.
	delay time.Duration
}

// watch is a request that has an answer without an end.
type watch struct{ cancel context.CancelFunc }

// newProxy makes a proxy that speaks plain HTTP on loopback in the namespace that within runs functions in.
func newProxy(t *testing.T, config *rest.Config, within func(func() error) error) *proxy {
	t.Helper()
	target, err := url.Parse(config.Host)
	if err != nil {
		t.Fatal(err)
	}
	transport, err := rest.TransportFor(config)
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{watches: map[*watch]bool{}, flowing: make(chan struct{})}
	close(p.flowing)
	forward := &httputil.ReverseProxy{
		Rewrite:        func(r *httputil.ProxyRequest) { r.SetURL(target) },
		Transport:      transport,
		FlushInterval:  -1,
		ModifyResponse: p.hold,
		ErrorLog:       log.New(io.Discard, "", 0), // of the watches that were cut
		ErrorHandler:   func(w http.ResponseWriter, _ *http.Request, _ error) { w.WriteHeader(http.StatusBadGateway) },
	}
	p.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { p.serve(forward, w, r) })
	var listener net.Listener
	err = within(func() (err error) {
		listener, err = new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: p}
	var group sync.WaitGroup
	group.Go(func() { _ = server.Serve(listener) }) // until it is closed
	t.Cleanup(func() {
		p.flow()
		if closeErr := server.Close(); closeErr != nil {
			t.Error(closeErr)
		}
		group.Wait()
	})
	p.kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	p.port = netip.MustParseAddrPort(listener.Addr().String()).Port()
	text := fmt.Sprintf(`{apiVersion: v1, kind: Config, current-context: c, clusters: [{name: c, cluster: {server: "http://%s"}}],
users: [{name: u, user: {}}], contexts: [{name: c, context: {cluster: c, user: u}}]}`, listener.Addr())
	if err = os.WriteFile(p.kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return p
}

// isWatch says whether a request is for a watch.
func isWatch(r *http.Request) bool { return r.URL.Query().Has("watch") }

// isNoWatch and isAny say what of other requests.
func isNoWatch(r *http.Request) bool { return !isWatch(r) }
func isAny(*http.Request) bool       { return true }

// serve forwards a request, unless it is to fail.
func (p *proxy) serve(forward http.Handler, w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	answer := p.answer
	if answer != 0 && !p.of(r) {
		answer = 0
	}
	delay := p.delay
	p.mu.Unlock()
	if !isWatch(r) {
		select {
		case <-time.After(delay):
		case <-r.Context().Done():
		}
	}
	if answer != 0 {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(answer)
		_, _ = fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"code":%d}`, reasonOf(answer), answer)
		return
	}
	if isWatch(r) {
		ctx, cancel := context.WithCancel(r.Context())
		one := &watch{cancel: cancel}
		p.mu.Lock()
		p.watches[one] = true
		p.mu.Unlock()
		defer func() {
			cancel()
			p.mu.Lock()
			delete(p.watches, one)
			p.mu.Unlock()
		}()
		r = r.WithContext(ctx)
	}
	defer func() { _ = recover() }() // the proxy panics where an answer is cut short, so that the client sees it
	forward.ServeHTTP(w, r)
}

// reasonOf is the reason that clients look for.
func reasonOf(code int) metav1.StatusReason {
	switch code {
	case http.StatusGone:
		return metav1.StatusReasonExpired
	case http.StatusForbidden:
		return metav1.StatusReasonForbidden
	default:
		return metav1.StatusReasonServiceUnavailable
	}
}

// hold makes the answers to watches wait while nothing flows.
func (p *proxy) hold(response *http.Response) error {
	if isWatch(response.Request) {
		response.Body = &held{ReadCloser: response.Body, proxy: p, done: response.Request.Context().Done()}
	}
	return nil
}

// held is the body of a watch.
type held struct {
	io.ReadCloser
	proxy *proxy
	done  <-chan struct{}
}

// Read hands on what was read once it may flow.
func (h *held) Read(buffer []byte) (int, error) {
	n, err := h.ReadCloser.Read(buffer)
	h.proxy.mu.Lock()
	flowing := h.proxy.flowing
	h.proxy.mu.Unlock()
	select {
	case <-flowing:
		return n, err
	case <-h.done:
		return 0, io.ErrUnexpectedEOF
	}
}

// cut ends all watches, in the middle of an event or not.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for one := range p.watches {
		one.cancel()
	}
}

// freeze lets no event of a watch through.
func (p *proxy) freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.flowing:
		p.flowing = make(chan struct{})
	default:
	}
}

// flow lets the events through again.
func (p *proxy) flow() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.flowing:
	default:
		close(p.flowing)
	}
}

// fail has the requests of which the condition holds answered with a status.
func (p *proxy) fail(answer int, of func(*http.Request) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.answer, p.of = answer, of
}

// recover lets the server answer again.
func (p *proxy) recover() { p.fail(0, isAny) }

// slow delays what is no watch.
func (p *proxy) slow(delay time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.delay = delay
}

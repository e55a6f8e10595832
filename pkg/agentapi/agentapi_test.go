package agentapi_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/warren-cni/warren/pkg/agentapi"
)

// serve runs a server until the test ends and returns its socket.
func serve(t *testing.T, handle agentapi.Handler) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "d.sock")
	start(t, socket, handle)
	return socket
}

// start runs a server on socket and returns what stops it.
func start(t *testing.T, socket string, handle agentapi.Handler) (stop func()) {
	t.Helper()
	l, err := agentapi.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() { done <- agentapi.ServeOn(ctx, l, handle) }()
	var stopped bool
	stop = func() {
		cancel()
		if stopped {
			return
		}
		stopped = true
		if serveErr := <-done; serveErr != nil {
			t.Errorf("Serve ended with %v", serveErr)
		}
	}
	t.Cleanup(stop)
	return stop
}

func TestCallCarriesRequestAndResponse(t *testing.T) {
	var got agentapi.Request
	socket := serve(t, func(_ context.Context, req agentapi.Request) agentapi.Response {
		got = req
		return agentapi.Response{Limited: "no tunnel"}
	})
	want := agentapi.Request{
		Version: agentapi.Version, Op: agentapi.OpAttach,
		Pod: &agentapi.Pod{
			ContainerID: "c1", Interface: "eth0", Namespace: "shop", Name: "web", UID: "u1",
			Addresses: []netip.Addr{netip.MustParseAddr("10.0.0.5"), netip.MustParseAddr("fd00::5")},
		},
	}
	resp, err := agentapi.Call(t.Context(), socket, agentapi.Request{Op: want.Op, Pod: want.Pod})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
	if resp.Limited != "no tunnel" || resp.Version != agentapi.Version {
		t.Errorf("response %+v", resp)
	}
}

func TestAskStatus(t *testing.T) {
	want := agentapi.Status{Node: "n1", Ready: true, Peers: []agentapi.Peer{{Node: "n2", LastHandshake: time.Unix(1700000000, 0).UTC()}}}
	text, err := json.Marshal(want)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		response agentapi.Response
		bad      bool
	}{
		"a status":  {agentapi.Response{Status: text}, false},
		"none":      {agentapi.Response{}, true},
		"a refusal": {agentapi.Response{Error: &agentapi.Error{Code: 11, Message: "later"}}, true},
	} {
		socket := serve(t, func(_ context.Context, req agentapi.Request) agentapi.Response {
			if req.Op != agentapi.OpStatus {
				t.Errorf("%s: asked for %q", name, req.Op)
			}
			return test.response
		})
		got, err := agentapi.AskStatus(t.Context(), socket)
		if test.bad != (err != nil) {
			t.Errorf("%s: error %v", name, err)
		}
		if diff := cmp.Diff(want, got); diff != "" && !test.bad {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func TestCallReturnsRefusal(t *testing.T) {
	socket := serve(t, func(context.Context, agentapi.Request) agentapi.Response {
		return agentapi.Response{Error: &agentapi.Error{Code: 11, Message: "pod shop/web is unknown"}}
	})
	_, err := agentapi.Call(t.Context(), socket, agentapi.Request{Op: agentapi.OpReady})
	var refused *agentapi.Error
	if !errors.As(err, &refused) || refused.Code != 11 || refused.Message != "pod shop/web is unknown" {
		t.Errorf("got %v, want the daemon's refusal", err)
	}
}

func TestCallWithoutDaemon(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	if _, err := agentapi.Call(t.Context(), socket, agentapi.Request{}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want %v", err, os.ErrNotExist)
	}
}

func TestCallGivesUpWithItsContext(t *testing.T) {
	left := make(chan struct{})
	entered := make(chan struct{})
	socket := serve(t, func(ctx context.Context, _ agentapi.Request) agentapi.Response {
		close(entered)
		<-ctx.Done() // only the client's leaving ends this
		close(left)
		return agentapi.Response{}
	})
	ctx, cancel := context.WithCancelCause(t.Context())
	go func() {
		<-entered
		cancel(errors.New("kubelet gave up"))
	}()
	_, err := agentapi.Call(ctx, socket, agentapi.Request{Op: agentapi.OpAttach})
	if err == nil || !strings.Contains(err.Error(), "kubelet gave up") {
		t.Errorf("got %v, want the context's cause", err)
	}
	<-left
}

func TestListenReplacesStaleSocket(t *testing.T) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "d.sock")
	handle := func(context.Context, agentapi.Request) agentapi.Response { return agentapi.Response{} }
	stop := start(t, socket, handle)
	stop()
	if _, err := agentapi.Call(t.Context(), socket, agentapi.Request{}); err == nil {
		t.Fatal("a socket without a daemon answered")
	}
	// What the daemon would have left if it had been killed before its socket was in its place.
	left := filepath.Join(dir, ".s123")
	if err := errors.Join(os.Mkdir(left, 0o700), os.WriteFile(filepath.Join(left, "s"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	start(t, socket, handle)
	if _, err := agentapi.Call(t.Context(), socket, agentapi.Request{}); err != nil {
		t.Errorf("after the restart: %v", err)
	}
	info, err := os.Stat(socket)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, want 0600", info.Mode())
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 1 {
		t.Errorf("%d files beside the socket are left: %v", len(entries)-1, entries)
	}
}

func TestListenInMissingDirectory(t *testing.T) {
	if _, err := agentapi.Listen(filepath.Join(t.TempDir(), "none", "d.sock")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want %v", err, os.ErrNotExist)
	}
}

// TestServeRefuses speaks the protocol by hand, as an older, newer or broken program does.
func TestServeRefuses(t *testing.T) {
	socket := serve(t, func(context.Context, agentapi.Request) agentapi.Response {
		t.Error("the handler saw a bad request")
		return agentapi.Response{}
	})
	tests := map[string]struct{ request, want string }{
		"other version": {`{"version":7,"op":"attach"}` + "\n", "the daemon of this node is too old for the program that asks: it speaks version 1 of their protocol, the program version 7"},
		"no JSON":       {"hello\n", "invalid character"},
		"too long":      {strings.Repeat("x", 64<<10), "message is too long"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			if got := raw(t, socket, tt.request); !strings.Contains(got, tt.want) || !strings.Contains(got, `"code":11`) {
				t.Errorf("answer %q, want code 11 and %q", got, tt.want)
			}
		})
	}
}

// raw writes request to the socket and returns everything that comes back.
func raw(t *testing.T, socket, request string) string {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err = conn.Write([]byte(request)); err != nil {
		t.Fatal(err)
	}
	var answer bytes.Buffer
	if _, err = answer.ReadFrom(conn); err != nil {
		t.Fatal(err)
	}
	return answer.String()
}

// TestCallRefusesOtherVersion stands for a daemon of another version.
func TestCallRefusesOtherVersion(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	go func() {
		conn, acceptErr := l.Accept()
		if acceptErr != nil {
			return
		}
		_, _ = conn.Read(make([]byte, 4096))
		_, _ = conn.Write([]byte(`{"version":9}` + "\n"))
	}()
	_, err = agentapi.Call(t.Context(), socket, agentapi.Request{Op: agentapi.OpReady})
	var differs *agentapi.VersionError
	if !errors.As(err, &differs) || *differs != (agentapi.VersionError{Client: agentapi.Version, Daemon: 9}) {
		t.Errorf("got %v, want both versions named", err)
	}
}

// TestVersionsThatMeetInAnUpdate: programs that are one version apart understand each other, whichever is newer, and others are told
// which of them to update.
func TestVersionsThatMeetInAnUpdate(t *testing.T) {
	older, newer, far := agentapi.Spoken{Oldest: 1, Newest: 1}, agentapi.Spoken{Oldest: 1, Newest: 2}, agentapi.Spoken{Oldest: 2, Newest: 3}
	tests := map[string]struct {
		client, daemon agentapi.Spoken
		spoken         int // by the handler and the answer
		want           string
	}{
		"the same":             {newer, newer, 2, ""},
		"plugin updated first": {newer, older, 1, ""},
		"plugin of before":     {older, newer, 1, ""},
		"plugin far behind":    {older, far, 0, "the program that asks is too old for the daemon of this node: it speaks version 1 of their protocol, the daemon version 3; update the program"},
		"daemon far behind":    {far, older, 0, "the daemon of this node is too old for the program that asks: it speaks version 1 of their protocol, the program version 3; update the daemon"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "d.sock")
			l, err := agentapi.Listen(socket)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			seen, done := 0, make(chan error, 1)
			go func() {
				done <- tt.daemon.Serve(ctx, l, func(_ context.Context, req agentapi.Request) agentapi.Response {
					seen = req.Version
					return agentapi.Response{Limited: "no tunnel"}
				})
			}()
			resp, err := tt.client.Call(t.Context(), socket, agentapi.Request{Op: agentapi.OpReady})
			cancel()
			if serveErr := <-done; serveErr != nil {
				t.Error(serveErr)
			}
			var differs *agentapi.VersionError
			switch {
			case seen != tt.spoken:
				t.Errorf("the handler was asked in version %d, want %d", seen, tt.spoken)
			case tt.want == "" && (err != nil || resp.Version != tt.spoken || resp.Limited != "no tunnel"):
				t.Errorf("answer %+v, %v", resp, err)
			case tt.want != "" && (!errors.As(err, &differs) || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
}

// TestProgramOfBeforeIsTold: one that knows no VersionError shows the daemon's refusal, which says what to do.
func TestProgramOfBeforeIsTold(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	l, err := agentapi.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- agentapi.Spoken{Oldest: 2, Newest: 3}.Serve(ctx, l, nil) }()
	answer := raw(t, socket, `{"version":1,"op":"ready"}`+"\n")
	cancel()
	if err = <-done; err != nil {
		t.Error(err)
	}
	if !strings.Contains(answer, `"code":11`) || !strings.Contains(answer, "update the program") {
		t.Errorf("answer %q", answer)
	}
}

// A server that clients do not find any more knows it: its file is gone, or another stands in its place.
func TestServerLooksForItsSocket(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "d.sock")
	l, err := agentapi.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if err = l.Look(); err != nil {
		t.Errorf("all is well: %v", err)
	}
	if err = os.Remove(socket); err != nil {
		t.Fatal(err)
	}
	if err = l.Look(); !errors.Is(err, agentapi.ErrSocketGone) || !strings.Contains(err.Error(), socket) {
		t.Errorf("the file is gone: %v", err)
	}
	other, err := agentapi.Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.Close() }()
	if err = l.Look(); err == nil || errors.Is(err, agentapi.ErrSocketGone) {
		t.Errorf("another server has the place: %v", err)
	}
	if err = other.Look(); err != nil {
		t.Errorf("the other server: %v", err)
	}
}

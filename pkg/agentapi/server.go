package agentapi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"
)

// requestTimeout is how long a client may take to send its request.
const requestTimeout = 5 * time.Second

// lookEvery is how often a server looks whether its socket file is still there.
const lookEvery = 5 * time.Second

// ErrSocketGone says that somebody removed the socket file under the server, so that no client finds it any more.
var ErrSocketGone = errors.New("the socket file was removed")

// codeTryAgainLater is the CNI error code for what passes by itself.
const codeTryAgainLater = 11

// Handler answers one request of a version that this program speaks, in that version. Its context ends when the client leaves or the
// server stops. The server fills in the response's version.
type Handler func(ctx context.Context, req Request) Response

// Serve listens on the unix socket and answers requests until ctx ends, and returns when every handler has. The error is nil
// when ctx ended it, and ErrSocketGone when the socket file was removed: then it may be called again.
func Serve(ctx context.Context, socket string, handle Handler) error {
	l, err := listen(socket)
	if err != nil {
		return err
	}
	return spoken().serve(ctx, l, handle)
}

// listen makes the socket, which only its owner may open, from its first moment on. A socket file that a dead daemon left
// is replaced.
//
// It is made in a directory that nobody else may enter and then renamed into its place, so that there is neither a
// moment with wider rights nor one without a socket. The file stays when the listener closes: by then it may be that
// of the next daemon, and a socket without a listener refuses every connection. A directory is removed that a daemon has left which was
// killed meanwhile; no two of them may listen in the same place at once.
func listen(socket string) (*listener, error) {
	left, _ := filepath.Glob(filepath.Join(filepath.Dir(socket), ".s[0-9]*"))
	for _, dir := range left {
		_ = os.RemoveAll(dir) // what stays does no harm
	}
	dir, err := os.MkdirTemp(filepath.Dir(socket), ".s")
	if err != nil {
		return nil, fmt.Errorf("making a directory for the socket %s: %w", socket, err)
	}
	l, err := listenIn(dir, socket)
	if rmErr := os.RemoveAll(dir); err == nil && rmErr != nil {
		return nil, errors.Join(fmt.Errorf("removing the directory of the socket: %w", rmErr), l.Close())
	}
	return l, err
}

// listener is a socket and the file by which clients find it.
type listener struct {
	*net.UnixListener
	path string
	file fs.FileInfo
}

// listenIn listens on a socket made in dir and moves it into its place.
func listenIn(dir, socket string) (*listener, error) {
	made := filepath.Join(dir, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: made, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listening for %s: %w", socket, err)
	}
	l.SetUnlinkOnClose(false)
	file, err := os.Lstat(made)
	if err = errors.Join(err, os.Chmod(made, 0o600), os.Rename(made, socket)); err != nil {
		return nil, errors.Join(fmt.Errorf("moving the socket to %s: %w", socket, err), l.Close())
	}
	return &listener{UnixListener: l, path: socket, file: file}, nil
}

// look returns an error where clients do not find this socket any more.
func (l *listener) look() error {
	now, err := os.Lstat(l.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("looking for %s: %w", l.path, ErrSocketGone)
	case err != nil:
		return fmt.Errorf("looking for the socket: %w", err)
	case !os.SameFile(l.file, now):
		return fmt.Errorf("looking for %s: another program has put its own file in this place", l.path)
	default:
		return nil
	}
}

// watch looks until ctx ends or there is an error.
func (l *listener) watch(ctx context.Context, lost func(error)) {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			if err := l.look(); err != nil {
				lost(err)
				return
			}
		}
	}
}

// serve answers what comes to the listener, and closes it in the end.
func (v versions) serve(ctx context.Context, l *listener, handle Handler) error {
	var running sync.WaitGroup
	defer running.Wait()
	serving, end := context.WithCancelCause(ctx)
	defer end(nil)
	context.AfterFunc(serving, func() { _ = l.Close() })
	running.Go(func() { l.watch(serving, end) })
	for {
		conn, err := l.Accept()
		switch {
		case err == nil:
			running.Go(func() { v.answer(serving, conn, handle) })
		case ctx.Err() != nil:
			return nil
		case serving.Err() != nil:
			return context.Cause(serving)
		default:
			return fmt.Errorf("accepting on %s: %w", l.path, err)
		}
	}
}

// answer reads one request from the connection and writes its response. Nothing is reported where that fails: the client
// knows, or has left.
func (v versions) answer(ctx context.Context, conn net.Conn, handle Handler) {
	var watcher sync.WaitGroup
	defer watcher.Wait()
	ctx, cancel := context.WithCancel(ctx)
	context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer cancel()

	req, err := readRequest(ctx, conn)
	if err != nil {
		_ = writeMessage(conn, v.refusal(err))
		return
	}
	if !v.speaks(req.Version) {
		_ = writeMessage(conn, v.refusal(&VersionError{Client: req.Version, Daemon: v.newest}))
		return
	}
	watcher.Go(func() {
		// A client sends nothing after its request, so that whatever ends this read says that it has left.
		_, _ = conn.Read(make([]byte, 1))
		cancel()
	})
	resp := handle(ctx, req)
	resp.Version = req.Version
	_ = writeMessage(conn, resp)
}

// readRequest reads the request, for no longer than requestTimeout.
func readRequest(ctx context.Context, conn net.Conn) (Request, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	var req Request
	if err := readMessage(conn, maxRequest, &req); err != nil {
		return Request{}, fmt.Errorf("reading the request: %w", err)
	}
	return req, nil
}

// refusal is the answer to a request that no handler saw.
func (v versions) refusal(err error) Response {
	return Response{Version: v.newest, Error: &Error{Code: codeTryAgainLater, Message: err.Error()}}
}

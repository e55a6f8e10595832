package apiserver

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// gracePeriod is how long a process may take to end by itself before it is killed.
const gracePeriod = 10 * time.Second

// process is a program that runs until the test ends.
type process struct {
	name string
	log  string
	done chan struct{} // closed when the program has ended, or could not start
	err  error         // why it ended; read it only once done is closed
}

// start runs a program of build/tools until the test ends, its output in a file of dir.
func start(tb testing.TB, dir, name string, args ...string) *process {
	tb.Helper()
	path, err := find(name)
	if err != nil {
		tb.Fatal(err)
	}
	p := &process{name: name, log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	log, err := os.Create(p.log)
	if err != nil {
		tb.Fatalf("creating the log of %s: %v", name, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, path, args...) //nolint:gosec // the path is one of the two programs of build/tools
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = gracePeriod
	// A test binary that is killed takes its servers with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	go func() {
		// The kernel sends that signal when the thread ends that started the program, so the thread must stay.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.done)
		p.err = cmd.Run()
	}()
	tb.Cleanup(func() {
		cancel()
		<-p.done
		if err := log.Close(); err != nil {
			tb.Errorf("closing the log of %s: %v", name, err)
		}
	})
	return p
}

// ended returns why the program is no longer there, with the end of its log, or nil while it runs.
func (p *process) ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("running %s: ended (%w), its last words:\n%s", p.name, p.err, p.lastWords())
	default:
		return nil
	}
}

// lastWords returns the end of the program's log.
func (p *process) lastWords() []byte {
	const lines = 20
	text, err := os.ReadFile(p.log)
	if err != nil {
		return []byte(err.Error())
	}
	all := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	return bytes.Join(all[max(0, len(all)-lines):], []byte("\n"))
}

// find returns the path of a program in the build/tools folder of the module that the test belongs to.
func find(name string) (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("finding %s: %w", name, err)
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("finding %s: no go.mod above the working directory", name)
		}
	}
	path := filepath.Join(dir, "build", "tools", name)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("%s is missing: run scripts/tools/build.sh kube-apiserver etcd", path)
	} else if err != nil {
		return "", fmt.Errorf("finding %s: %w", name, err)
	}
	return path, nil
}

// freePort returns a TCP port of the loopback that nobody listens on.
func freePort(ctx context.Context) (string, error) {
	var config net.ListenConfig
	listener, err := config.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", fmt.Errorf("finding a free port: %w", err)
	}
	port := listener.Addr().(*net.TCPAddr).Port
	if err := listener.Close(); err != nil {
		return "", fmt.Errorf("freeing port %d: %w", port, err)
	}
	return strconv.Itoa(port), nil
}

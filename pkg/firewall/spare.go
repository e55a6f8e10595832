package firewall

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
)

// spares runs the real programs, and keeps one of each that reads its input running in advance: iptables-restore takes longer to start
// than the kernel takes for a change. One that waits has read nothing, of its input or of the kernel, and holds no lock. It ends
// without a change when its input does, also when this process dies.
//
// Programs start in the network namespace of the calling thread, so all runs have to come from one.
type spares struct {
	programs
	waiting map[string]*spare
}

// newSpares returns spares of which none runs yet.
func newSpares() *spares { return &spares{waiting: map[string]*spare{}} }

// Run implements execer.
func (s *spares) Run(ctx context.Context, stdin, path string, args ...string) (stdout, stderr string, err error) {
	if stdin == "" {
		return s.programs.Run(ctx, stdin, path, args...)
	}
	key := strings.Join(append([]string{path}, args...), " ")
	p := s.waiting[key]
	delete(s.waiting, key)
	if p == nil || p.gone() {
		if p, err = startSpare(path, args); err != nil {
			return "", "", err
		}
	}
	stdout, stderr, err = p.finish(ctx, stdin)
	// Where it cannot be started, the next run says why.
	if next, startErr := startSpare(path, args); startErr == nil {
		s.waiting[key] = next
	}
	return stdout, stderr, err
}

// close ends the programs that wait.
func (s *spares) close() {
	for key, p := range s.waiting {
		_ = p.stdin.Close() // it has read nothing that could be lost
		<-p.done
		delete(s.waiting, key)
	}
}

// spare is a program that has been started.
type spare struct {
	stdin     io.WriteCloser
	out, errs bytes.Buffer
	process   *os.Process
	done      chan struct{} // closed once it has ended; then err says how
	err       error
}

// startSpare starts a program.
func startSpare(path string, args []string) (*spare, error) {
	p := &spare{done: make(chan struct{})}
	cmd := exec.Command(path, args...) //nolint:gosec,noctx // paths that LookPath found for names of ours; finish ends it
	cmd.Stdout, cmd.Stderr = &p.out, &p.errs
	var err error
	if p.stdin, err = cmd.StdinPipe(); err != nil {
		return nil, fmt.Errorf("making a pipe to %s: %w", path, err)
	}
	if err = cmd.Start(); err != nil {
		return nil, err
	}
	p.process = cmd.Process
	go func() {
		defer close(p.done)
		p.err = cmd.Wait()
	}()
	return p, nil
}

// gone says whether the program has ended already, because somebody killed it or it cannot run here.
func (p *spare) gone() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// finish gives the program its input, and returns what it wrote and how it ended. It is killed when the context ends before.
func (p *spare) finish(ctx context.Context, stdin string) (stdout, stderr string, err error) {
	stop := context.AfterFunc(ctx, func() { _ = p.process.Kill() })
	defer stop()
	_, err = io.WriteString(p.stdin, stdin)
	if errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrClosed) {
		err = nil // it has read as much as it wanted: how it ended tells
	}
	_ = p.stdin.Close() // the end of the input; where it was closed before, the program has ended
	<-p.done
	if p.err != nil {
		err = p.err
		if ctx.Err() != nil {
			err = ctx.Err()
		}
	}
	return p.out.String(), p.errs.String(), err
}

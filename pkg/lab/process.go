package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// patience is how long a process may take to end.
const patience = 10 * time.Second

// Process is a program that runs on a node.
type Process struct {
	process *os.Process
	log     string
	done    chan struct{}
	err     error // valid once done is closed
}

// Start starts a program on the node. It gets SIGTERM when ctx ends. Its output is appended to name.log in the node's
// directory; env is added to the environment.
func (n *Node) Start(ctx context.Context, name string, env, args []string) (*Process, error) {
	path := filepath.Join(n.dir, name+".log")
	log, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the log of %s: %w", name, err)
	}
	process, wait, err := n.spawn(ctx, env, args, log)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting %s on %s: %w", name, n.Name, err), log.Close())
	}
	p := &Process{process: process, log: path, done: make(chan struct{})}
	go func() {
		p.err = errors.Join(wait(), log.Close())
		close(p.done)
	}()
	n.processes = append(n.processes, p)
	return p, nil
}

// Stop asks the process to end (SIGTERM) and waits until it has. An exit status other than 0 is an error.
func (p *Process) Stop() error {
	if err := p.signal(syscall.SIGTERM); err != nil {
		return err
	}
	return p.err
}

// Kill ends the process as a crash would (SIGKILL) and waits until it has ended.
func (p *Process) Kill() error { return p.signal(syscall.SIGKILL) }

// signal sends a signal and waits for the process's end.
func (p *Process) signal(signal syscall.Signal) error {
	if err := p.process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("ending process %d: %w", p.process.Pid, err)
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(patience):
		_ = p.process.Kill()
		<-p.done
		return fmt.Errorf("process %d (log %s) did not end within %v of signal %v", p.process.Pid, p.log, patience, signal)
	}
}

// PID is the process's id.
func (p *Process) PID() int { return p.process.Pid }

// Child is the id of the process that this one started, of which there must be one.
func (p *Process) Child(ctx context.Context) (int, error) {
	children, err := execute(ctx, "", "pgrep", "-P", strconv.Itoa(p.PID()))
	if err != nil {
		return 0, fmt.Errorf("looking for the child of process %d: %w", p.PID(), err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(children))
	if err != nil {
		return 0, fmt.Errorf("process %d has more children than one: %w", p.PID(), err)
	}
	return child, nil
}

// Log returns the last lines that the process (and earlier ones of its name) wrote.
func (p *Process) Log(lines int) string {
	data, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// ended returns an error once the process has ended.
func (p *Process) ended() error {
	select {
	case <-p.done:
		return errors.Join(fmt.Errorf("the process has ended; its log ends in:\n%s", p.Log(20)), p.err)
	default:
		return nil
	}
}

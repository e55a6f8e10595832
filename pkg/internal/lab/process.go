package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// wireguardSockets is where wgctrl looks for WireGuard in user space, and finds it by the name of the link: several nodes
// on one machine each need another directory there.
const wireguardSockets = "/var/run/wireguard"

// patience is how long a process may take to end.
const patience = 10 * time.Second

// Process is a program that runs on a node.
type Process struct {
	cmd  *exec.Cmd
	log  string
	done chan struct{}
	err  error // valid once done is closed
}

// command makes a command that runs in the node's network namespace, in a mount namespace of its own that has the node's
// directory of WireGuard sockets. ip and sh replace themselves, so that the process is the program's.
func (n *Node) command(ctx context.Context, args []string) *exec.Cmd {
	script := `mount --bind "$0" ` + wireguardSockets + ` && exec "$@"`
	wrapped := append([]string{"netns", "exec", n.namespace, "sh", "-c", script, filepath.Join(n.dir, "wireguard")}, args...)
	cmd := exec.CommandContext(ctx, "ip", wrapped...)     //nolint:gosec // a lab runs what its caller says
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt at the terminal is the caller's to handle
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = patience
	return cmd
}

// Run runs a program on the node and returns what it wrote to stdout; the error holds what it wrote to stderr.
func (n *Node) Run(ctx context.Context, args ...string) (string, error) {
	return output(n.command(ctx, args))
}

// start starts a program on the node. It gets SIGTERM when ctx ends. Its output is appended to name.log in the node's
// directory; env is added to the environment.
func (n *Node) start(ctx context.Context, name string, env, args []string) (*Process, error) {
	path := filepath.Join(n.dir, name+".log")
	log, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the log of %s: %w", name, err)
	}
	cmd := n.command(ctx, args)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("starting %s on %s: %w", name, n.Name, err), log.Close())
	}
	p := &Process{cmd: cmd, log: path, done: make(chan struct{})}
	go func() {
		p.err = errors.Join(cmd.Wait(), log.Close())
		close(p.done)
	}()
	n.processes = append(n.processes, p)
	return p, nil
}

// Stop asks the process to end (SIGTERM) and waits until it has. An exit status other than 0 is an error.
func (p *Process) Stop() error { return p.end(syscall.SIGTERM) }

// Kill ends the process as a crash would (SIGKILL) and waits until it has ended.
func (p *Process) Kill() error {
	err := p.end(syscall.SIGKILL)
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}

// end sends a signal and waits for the process's end.
func (p *Process) end(signal syscall.Signal) error {
	if err := p.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("ending process %d: %w", p.cmd.Process.Pid, err)
	}
	select {
	case <-p.done:
		return p.err
	case <-time.After(patience):
		_ = p.cmd.Process.Kill()
		<-p.done
		return fmt.Errorf("process %d (log %s) did not end within %v of signal %v", p.cmd.Process.Pid, p.log, patience, signal)
	}
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

// ended returns an error once the process has ended by itself.
func (p *Process) ended() error {
	select {
	case <-p.done:
		return fmt.Errorf("the process ended (%w); its log ends in:\n%s", p.err, p.Log(20))
	default:
		return nil
	}
}

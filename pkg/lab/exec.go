package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec" //nolint:depguard // a lab's processes are what it is for; nothing of Warren itself links this package
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/warren-cni/warren/pkg/wgdevice"
)

// wireguardSockets is where wgctrl looks for WireGuard in user space, and finds it by the name of the link: several nodes
// on one machine each need another directory there.
const wireguardSockets = "/var/run/wireguard"

// The packages of the programs that a lab needs.
const (
	module  = "github.com/warren-cni/warren/"
	chained = "github.com/containernetworking/plugins/plugins/meta/"
)

// BuildWarren builds the plugin and the daemon into a directory.
func BuildWarren(ctx context.Context, dir string) error {
	if err := build(ctx, filepath.Join(dir, "warren"), module+"plugin"); err != nil {
		return err
	}
	return build(ctx, filepath.Join(dir, "warrend"), module+"daemon")
}

// BuildChained builds the reference plugins that the conflist names into a directory, at the version of go.mod.
func BuildChained(ctx context.Context, dir string) error {
	for _, plugin := range []string{"portmap", "bandwidth"} {
		if err := build(ctx, filepath.Join(dir, plugin), chained+plugin); err != nil {
			return err
		}
	}
	return nil
}

// The environment of tests that run where there is no compiler, and WireGuard in the kernel: the guest of scripts/vm.
const (
	programsVariable  = "WARREN_TEST_PROGRAMS"
	wireGuardVariable = "WARREN_TEST_WIREGUARD"
)

// TestedWireGuard is where WireGuard runs in tests, whatever the kernel has: in user space, or where WARREN_TEST_WIREGUARD says.
func TestedWireGuard() string {
	if named := os.Getenv(wireGuardVariable); named != "" {
		return named
	}
	return string(wgdevice.ModeUserspace)
}

// Programs are Warren's programs and the chained plugins, built once for all tests of a package that need them.
type Programs struct {
	once sync.Once
	dir  string
	// made is true where the directory goes after the tests.
	made bool
	err  error
}

// Main runs the tests of a package (in its TestMain), removes the programs after them, and returns the exit status.
func (p *Programs) Main(run func() int) int {
	status := run()
	if !p.made {
		return status
	}
	if err := os.RemoveAll(p.dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return max(status, 1)
	}
	return status
}

// Dir returns the directory of the programs, which WARREN_TEST_PROGRAMS names where they are built already. Else the first call
// builds them; only an error of that first call is returned by all.
func (p *Programs) Dir(ctx context.Context) (string, error) {
	p.once.Do(func() {
		if p.dir = os.Getenv(programsVariable); p.dir != "" {
			return
		}
		if p.dir, p.err = os.MkdirTemp("", "warren-programs-"); p.err == nil {
			p.made = true
			p.err = errors.Join(BuildWarren(ctx, p.dir), BuildChained(ctx, p.dir))
		}
	})
	return p.dir, p.err
}

// build builds a program.
func build(ctx context.Context, path, program string) error {
	if _, err := execute(ctx, "", "env", "CGO_ENABLED=0", "go", "build", "-o", path, program); err != nil {
		return fmt.Errorf("building %s: %w", program, err)
	}
	return nil
}

// execute runs a program of this machine with text as its input.
func execute(ctx context.Context, input string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...) //nolint:gosec // the names are this package's
	cmd.Stdin = strings.NewReader(input)
	return output(cmd)
}

// Run runs a program on the node and returns what it wrote to stdout; the error holds what it wrote to stderr.
func (n *Node) Run(ctx context.Context, args ...string) (string, error) {
	return output(n.command(ctx, args))
}

// output runs a command and returns what it wrote to stdout; its error holds what it wrote to stderr.
func output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
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

// spawn starts a program on the node, its output going to log, and returns its process and what waits for its end.
func (n *Node) spawn(ctx context.Context, env, args []string, log *os.File) (*os.Process, func() error, error) {
	cmd := n.command(ctx, args)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	return cmd.Process, cmd.Wait, nil
}

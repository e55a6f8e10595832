package lab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
)

// namespaces is where `ip netns` keeps its namespaces.
const namespaces = "/run/netns"

// addNamespace makes a network namespace.
func addNamespace(ctx context.Context, name string) (ns.NetNS, error) {
	if _, err := execute(ctx, "", "ip", "netns", "add", name); err != nil {
		return nil, fmt.Errorf("making network namespace %s: %w", name, err)
	}
	namespace, err := ns.GetNS(filepath.Join(namespaces, name))
	if err != nil {
		return nil, fmt.Errorf("opening network namespace %s: %w", name, err)
	}
	return namespace, nil
}

// deleteNamespace removes a network namespace; one that is not there is no error.
func deleteNamespace(ctx context.Context, name string) error {
	if _, err := os.Stat(filepath.Join(namespaces, name)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if _, err := execute(ctx, "", "ip", "netns", "delete", name); err != nil {
		return fmt.Errorf("removing network namespace %s: %w", name, err)
	}
	return nil
}

// batch runs lines of ip(8) in a network namespace.
func batch(ctx context.Context, namespace, lines string) error {
	_, err := execute(ctx, lines+"\n", "ip", "-netns", namespace, "-batch", "-")
	return err
}

// WireGuard runs a function with a client that finds the node's device, in the kernel or in user space.
func (n *Node) WireGuard(do func(*wgctrl.Client) error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread has a mount namespace of its own and ends with the goroutine
		result <- n.withClient(do)
	}()
	return <-result
}

// withClient is WireGuard in a thread that is thrown away.
func (n *Node) withClient(do func(*wgctrl.Client) error) error {
	err := errors.Join(
		n.netns.Set(),
		unix.Unshare(unix.CLONE_FS|unix.CLONE_NEWNS),
		unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""),
		unix.Mount(filepath.Join(n.dir, "wireguard"), wireguardSockets, "", unix.MS_BIND, ""))
	if err != nil {
		return fmt.Errorf("entering the namespaces of %s: %w", n.Name, err)
	}
	client, err := wgctrl.New()
	if err != nil {
		return fmt.Errorf("looking for the WireGuard device of %s: %w", n.Name, err)
	}
	return errors.Join(do(client), client.Close())
}

// sweep ends the processes in the network namespaces of the lab called name, and removes the namespaces.
func sweep(ctx context.Context, name string) error {
	paths, err := filepath.Glob(filepath.Join(namespaces, name+"-*"))
	if err != nil {
		return fmt.Errorf("looking for namespaces of lab %s: %w", name, err)
	}
	var errs []error
	for _, path := range paths {
		pids, err := execute(ctx, "", "ip", "netns", "pids", filepath.Base(path))
		if err != nil {
			errs = append(errs, err)
		}
		for field := range strings.FieldsSeq(pids) {
			if pid, err := strconv.Atoi(field); err == nil && pid != os.Getpid() {
				_ = syscall.Kill(pid, syscall.SIGKILL) // it may have ended by itself
			}
		}
		errs = append(errs, deleteNamespace(ctx, filepath.Base(path)))
	}
	return errors.Join(errs...)
}

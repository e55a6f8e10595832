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

	"github.com/containernetworking/plugins/pkg/ns"
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

package lab

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// The packages of the programs that a lab needs, by the program's name.
const (
	module    = "github.com/warren-cni/warren/"
	chained   = "github.com/containernetworking/plugins/plugins/meta/"
	portmap   = chained + "portmap"
	bandwidth = chained + "bandwidth"
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
	for _, plugin := range []string{portmap, bandwidth} {
		if err := build(ctx, filepath.Join(dir, filepath.Base(plugin)), plugin); err != nil {
			return err
		}
	}
	return nil
}

// build builds a program.
func build(ctx context.Context, path, program string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-o", path, program)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if _, err := output(cmd); err != nil {
		return fmt.Errorf("building %s: %w", program, err)
	}
	return nil
}
